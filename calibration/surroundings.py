"""What a recording ran on: the device and the software, as the manifest names them. Never host names or paths."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from calibration.traces.manifest import DeviceInfo


def device_info(device: torch.device) -> DeviceInfo:
    """Describe `device`: its name, memory and driver, and the threads that torch uses on a CPU."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return DeviceInfo(
            name=properties.name, kind="cuda", memory_bytes=properties.total_memory, driver=_nvidia_driver()
        )
    return DeviceInfo(
        name=_processor(), kind="cpu", memory_bytes=_main_memory_bytes(), threads=torch.get_num_threads()
    )


def software_versions() -> dict[str, str]:
    """Give the versions of everything that can move a recorded number."""
    found = {"python": platform.python_version(), "system": platform.system()}
    for name in ("torch", "transformers", "numpy", "pyarrow"):
        found[name] = metadata.version(name)
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
