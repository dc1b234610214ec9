"""The catalogue of devices: every figure has a source, and ridge points are those worked out from the sheets."""

from __future__ import annotations

import dataclasses

import pytest
from timing_estimate import H100

from calibration.common.errors import CostError
from simulator.hardware.devices import DEVICES, ELEMENT_BYTES, generic_cpu, get_device

FIGURES = ("flops", "bandwidth", "memory_bytes", "link", "tdp_watts", "idle_watts")


@pytest.mark.parametrize("name", DEVICES)
def test_every_figure_has_a_source_and_no_source_lacks_its_figure(name: str) -> None:
    device = DEVICES[name]
    assert set(device.sources) == {figure for figure in FIGURES if getattr(device, figure) is not None}
    assert all(len(source) > 20 for source in device.sources.values())
    assert set(FIGURES) < {field.name for field in dataclasses.fields(device)}


@pytest.mark.parametrize("name", DEVICES)
def test_figures_are_in_the_units_they_claim(name: str) -> None:
    device = DEVICES[name]
    assert device.name == name
    assert 1e10 < device.bandwidth < 1e13
    assert 1e10 < device.memory_bytes < 3e11
    assert set(device.flops) <= set(ELEMENT_BYTES)
    assert all(1e11 < rate < 1e16 for rate in device.flops.values())
    assert device.flops["bf16"] == device.flops["fp16"] >= device.flops["fp32"]
    if device.idle_watts is not None and device.tdp_watts is not None:
        assert device.idle_watts < device.tdp_watts / 2


@pytest.mark.parametrize(
    ("name", "dtype", "tokens"),
    [
        ("h200", "bf16", 206),
        ("h200", "fp8", 206),
        ("a100-sxm", "bf16", 153),
        ("h100-sxm", "bf16", 295),
        ("h100-pcie", "bf16", 378),
        ("rtx-4090", "bf16", 164),
        ("l40s", "bf16", 419),
        ("b200", "fp8", 293),
        ("m2-ultra", "fp16", 34),
    ],
)
def test_ridge_points(name: str, dtype: str, tokens: int) -> None:
    """Peak / bandwidth from the sheets, by hand: 989.5e12 x 2 / (2 x 4.8e12) = 206 for the H200."""
    assert round(get_device(name).ridge_tokens(dtype)) == tokens


def test_what_the_timing_jobs_plan_with_is_in_the_catalogue() -> None:
    device = get_device("h100-sxm")
    assert device.bandwidth == H100.bandwidth
    for dtype in ("bf16", "fp8", "fp32"):
        assert device.flops_per_s(dtype) == pytest.approx(H100.flops[dtype], rel=1e-3)


def test_a_generic_cpu_scales_with_its_cores() -> None:
    """Two 8-lane FMA units at 3 GHz: 96 GFLOP/s a core. Two channels of DDR4-3200: 51.2 GB/s."""
    assert generic_cpu(1).flops["fp32"] == 96e9
    assert generic_cpu(16).flops["fp32"] == 16 * 96e9
    assert get_device("cpu").bandwidth == 51.2e9
    assert generic_cpu(channels=8).bandwidth == 204.8e9


def test_what_is_not_known_is_refused_with_a_hint() -> None:
    with pytest.raises(CostError, match=r"^device 'H100-sxm5': not known; did you mean 'h100-sxm'\?$"):
        get_device("H100-sxm5")
    with pytest.raises(CostError, match=r"^dtype: NVIDIA A100 SXM 80 GB has no rate for it, got 'fp8'; choose from"):
        get_device("a100-sxm").flops_per_s("fp8")
