"""What a recording ran on: the device and the software, as the manifest names them. Never host names or paths."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.traces.manifest import DeviceInfo

if TYPE_CHECKING:
    import torch


def device_info(device: torch.device) -> DeviceInfo:
    """Describe `device`: its name, memory and driver, and the threads that torch uses on a CPU."""
    import torch

    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return DeviceInfo(
            name=properties.name, kind="cuda", memory_bytes=properties.total_memory, driver=_nvidia_driver()
        )
    return cpu_info(torch.get_num_threads())


def cpu_info(threads: int | None = None) -> DeviceInfo:
    """Describe the processor of this machine, of which `threads` are used. No torch needed."""
    return DeviceInfo(name=_processor(), kind="cpu", memory_bytes=_main_memory_bytes(), threads=threads)


def software_versions(packages: tuple[str, ...] = ("torch", "transformers", "numpy", "pyarrow")) -> dict[str, str]:
    """Give the versions of what can move a recorded number: Python and those of `packages` that are installed."""
    found = {"python": platform.python_version(), "system": platform.system()}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown CPU"


def _main_memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _nvidia_driver() -> str | None:
    library = nvml()
    return None if library is None else str(library.nvmlSystemGetDriverVersion())


def nvml() -> Any | None:
    """Give the started NVML binding (``pynvml``), or None where it is not installed or finds no driver."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml
