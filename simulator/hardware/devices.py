"""The catalogue of devices: peak rates, memory, links and power, each figure with its source.

Rates are dense (data sheets print them "with sparsity", twice as high) and tensor-core rates with fp32 accumulation
where there are any. Nothing of this is measured here; how much of a peak a step reaches is for a fit to say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from calibration.common.errors import CostError, did_you_mean

Dtype = Literal["bf16", "fp16", "fp8", "fp32"]

ELEMENT_BYTES: Mapping[str, int] = MappingProxyType({"bf16": 2, "fp16": 2, "fp8": 1, "fp32": 4})
"""Bytes of one number of each type."""


@dataclass(frozen=True)
class Device:
    """One device as its vendor describes it; None where no source was found. Missing is not zero.

    ``flops``: dense FLOP/s by type of number; the device has no rate for a type that is not in it. ``bandwidth``:
    bytes/s of its memory. ``memory_bytes``: as the driver reports it where that was read, else as sold. ``link``:
    bytes/s that it sends to its peers (one direction; data sheets add both). ``idle_watts``: drawn with nothing to
    compute. ``tdp_watts``: the most that it may draw for long. ``sources``: where each figure was read, by the name
    of its field.
    """

    name: str
    title: str
    kind: Literal["gpu", "cpu"]
    flops: Mapping[str, float]
    bandwidth: float
    memory_bytes: int
    sources: Mapping[str, str]
    link: float | None = None
    tdp_watts: float | None = None
    idle_watts: float | None = None

    def flops_per_s(self, dtype: str) -> float:
        """Give the dense FLOP/s with numbers of type `dtype`; `CostError` where the device has no rate for it."""
        if dtype not in self.flops:
            raise CostError(f"dtype: {self.title} has no rate for it, got '{dtype}'{did_you_mean(dtype, self.flops)}")
        return self.flops[dtype]

    def ridge_tokens(self, dtype: str) -> float:
        """Give the tokens in a step above which matrices are bound by arithmetic, not by reading the weights.

        FLOP/s x bytes of a weight / (2 x bytes/s): a weight is read once a step and takes two operations a token.
        """
        return self.flops_per_s(dtype) * ELEMENT_BYTES[dtype] / (2 * self.bandwidth)


def _fixed(**entries: float) -> Mapping[str, float]:
    return MappingProxyType(entries)


def _told(everything: str, **exceptions: str) -> Mapping[str, str]:
    """Give the source of every figure: `everything`, but for those named."""
    figures = ("flops", "bandwidth", "memory_bytes", "link", "tdp_watts")
    return MappingProxyType({**dict.fromkeys(figures, everything), **exceptions})


_HOPPER = (
    "NVIDIA H100 data sheet, its table with sparsity halved (nvidia.com/en-us/data-center/h100), read in "
    "archive-lib.hpctech.co.jp/gpuproduct/nvidia-h100.html"
)
_ACCELERATORS = "github.com/stas00/ml-engineering, compute/accelerator/README.md, rates without sparsity"
_DRIVER = "nvidia-smi, total memory: "

A100_SXM = Device(
    name="a100-sxm",
    title="NVIDIA A100 SXM 80 GB",
    kind="gpu",
    flops=_fixed(bf16=312e12, fp16=312e12, fp32=19.5e12),
    bandwidth=2.039e12,
    memory_bytes=81_920 * 2**20,
    link=300e9,
    tdp_watts=400.0,
    sources=_told(
        "NVIDIA A100 data sheet (nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf), read in "
        "glennklockwood.com/garden/processors/A100",
        memory_bytes=_DRIVER + "github.com/dexmal/dexbotic/issues/41 (A800, the same memory)",
    ),
)
H100_SXM = Device(
    name="h100-sxm",
    title="NVIDIA H100 SXM 80 GB",
    kind="gpu",
    flops=_fixed(bf16=989.5e12, fp16=989.5e12, fp8=1979e12, fp32=67e12),
    bandwidth=3.35e12,
    memory_bytes=81_559 * 2**20,
    link=450e9,
    tdp_watts=700.0,
    sources=_told(_HOPPER, memory_bytes=_DRIVER + "github.com/wilicc/gpu-burn/issues/114"),
)
H100_PCIE = Device(
    name="h100-pcie",
    title="NVIDIA H100 PCIe 80 GB",
    kind="gpu",
    flops=_fixed(bf16=756.5e12, fp16=756.5e12, fp8=1513e12, fp32=51e12),
    bandwidth=2.0e12,
    memory_bytes=80 * 10**9,
    link=64e9,
    tdp_watts=350.0,
    sources=_told(
        _HOPPER,
        link=_HOPPER + "; PCIe Gen5, 128 GB/s both ways; 300e9 between two cards that share an NVLink bridge",
        tdp_watts="NVIDIA H100 PCIe product brief PB-11133-001_v02, November 2022",
    ),
)
H200 = Device(
    name="h200",
    title="NVIDIA H200 SXM 141 GB",
    kind="gpu",
    flops=_fixed(bf16=989.5e12, fp16=989.5e12, fp8=1979e12, fp32=67e12),
    bandwidth=4.8e12,
    memory_bytes=141 * 10**9,
    link=450e9,
    tdp_watts=700.0,
    idle_watts=80.3,
    sources=_told(
        "github.com/mlcommons/inference_results_v4.1, closed/NVIDIA/systems/H200-SXM-141GBx8_TRT_MaxQ.json",
        flops="github.com/meta-pytorch/tritonbench/issues/78, without sparsity; the chip is the H100's",
        bandwidth=_ACCELERATORS,
        idle_watts="Serial Alice GPU Energy Benchmark, June 2026: one H200 with nothing to do",
    ),
)
B200 = Device(
    name="b200",
    title="NVIDIA B200 SXM 180 GB",
    kind="gpu",
    flops=_fixed(bf16=2250e12, fp16=2250e12, fp8=4500e12, fp32=80e12),
    bandwidth=7.672e12,
    memory_bytes=183_359 * 2**20,
    link=900e9,
    tdp_watts=1000.0,
    idle_watts=192.0,
    sources=_told(
        "NVIDIA Blackwell architecture brief, HGX B200 at 1000 W, read in glennklockwood.com/garden/processors/B200",
        bandwidth="github.com/pytorch/ao/pull/4002: 7680 bits x 3996 MHz x 2 by the driver; the brief has 8e12",
        memory_bytes=_DRIVER + "github.com/NVIDIA/TensorRT-LLM/issues/10278",
        idle_watts="nvidia-smi with a model loaded, 0 % busy: github.com/NVIDIA/TensorRT-LLM/issues/10278",
    ),
)
L40S = Device(
    name="l40s",
    title="NVIDIA L40S 48 GB",
    kind="gpu",
    flops=_fixed(bf16=362.05e12, fp16=362.05e12, fp8=733e12, fp32=91.6e12),
    bandwidth=864e9,
    memory_bytes=48_305_799_168,
    link=32e9,
    tdp_watts=350.0,
    sources=_told(
        "NVIDIA L40S data sheet, read in mullet.se (product 355414)",
        link="NVIDIA L40S data sheet, read in mullet.se (product 355414): PCIe Gen4, 64 GB/s both ways; no NVLink",
        memory_bytes="metadata of a training run, apjanco/es_qwen2_vl_pangea: memoryTotal",
    ),
)
RTX_4090 = Device(
    name="rtx-4090",
    title="NVIDIA GeForce RTX 4090",
    kind="gpu",
    flops=_fixed(bf16=165.15e12, fp16=165.15e12, fp8=330.3e12, fp32=82.58e12),
    bandwidth=1.008e12,
    memory_bytes=24_564 * 2**20,
    link=32e9,
    tdp_watts=450.0,
    sources=_told(
        "waredb.com/processor/nvidia-geforce-rtx-4090, with fp32 accumulation (tensor cores are halved by it)",
        link="PCIe Gen4 x16, 32 GB/s each way; the card has no NVLink",
        memory_bytes=_DRIVER + "github.com/vllm-project/vllm/issues/7553",
        tdp_watts="gfxspeak.com/featured/nvidias-latest-lovelace",
    ),
)
M2_ULTRA = Device(
    name="m2-ultra",
    title="Apple M2 Ultra, GPU of 76 cores",
    kind="gpu",
    flops=_fixed(bf16=27.2e12, fp16=27.2e12, fp32=27.2e12),
    bandwidth=800e9,
    memory_bytes=192 * 10**9,
    sources=MappingProxyType(
        {
            "flops": "27.2 teraflops: apple.com/mac-pro (2023); 16 bits as fast as 32: "
            "github.com/philipturner/metal-benchmarks, README.md; bf16 taken as fp16: an assumption",
            "bandwidth": "apple.com/newsroom/2023/06/apple-introduces-m2-ultra",
            "memory_bytes": "apple.com/newsroom/2023/06/apple-introduces-m2-ultra, the largest; the GPU may use less",
        }
    ),
)


def generic_cpu(cores: int = 8, ghz: float = 3.0, channels: int = 2, memory_bytes: int = 64 * 2**30) -> Device:
    """Give a CPU of `cores` cores at `ghz` with `channels` channels of DDR4-3200: an assumption, not a product.

    A core has two 256-bit FMA units: 2 x 8 lanes x 2 = 32 fp32 operations a cycle (Intel since Haswell, AMD since
    Zen 2); narrower types gain nothing, as without AMX or AVX-512 BF16 they are widened first. A channel moves 8
    bytes 3.2e9 times a second.
    """
    rate = cores * ghz * 1e9 * 32
    formula = "assumption: see simulator.hardware.devices.generic_cpu"
    return Device(
        name="cpu",
        title=f"generic CPU, {cores} cores",
        kind="cpu",
        flops=_fixed(bf16=rate, fp16=rate, fp32=rate),
        bandwidth=channels * 8 * 3.2e9,
        memory_bytes=memory_bytes,
        sources=MappingProxyType(dict.fromkeys(("flops", "bandwidth", "memory_bytes"), formula)),
    )


_ALL = (A100_SXM, H100_SXM, H100_PCIE, H200, B200, L40S, RTX_4090, M2_ULTRA, generic_cpu())

DEVICES: Mapping[str, Device] = MappingProxyType({device.name: device for device in _ALL})
"""Every known device, by name."""


def get_device(name: str) -> Device:
    """Give the device called `name`; `CostError` where there is none."""
    if name not in DEVICES:
        raise CostError(f"device '{name}': not known{did_you_mean(name.lower(), DEVICES)}")
    return DEVICES[name]
