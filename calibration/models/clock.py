"""Seconds and joules of a step: wall clock on a CPU, events on a CUDA device, the energy counter of NVML."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

ENERGY_WINDOW_S = 1.0
"""A device's energy counter ticks slowly: energy is read over a window of repeated steps at least this long."""


def start_clock(device: torch.device) -> Callable[[], float]:
    """Start a clock now; give the function that stops it and returns seconds."""
    if device.type != "cuda":
        begin = time.perf_counter()
        return lambda: time.perf_counter() - begin
    import torch

    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize(device)
    first.record()

    def stop() -> float:
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last)) / 1e3

    return stop


def energy_j(step: Callable[[], object], device: torch.device) -> float | None:
    """Give the mean joules of one step over a window of `ENERGY_WINDOW_S`, or None where nothing reports them.

    The window includes what stands between two steps (refilling the cache), so short steps come out a little high.
    """
    counter = energy_counter_mj(device)
    if counter is None:
        return None
    begin_mj, begin, count = counter(), time.perf_counter(), 0
    while time.perf_counter() - begin < ENERGY_WINDOW_S:
        step()
        count += 1
    return (counter() - begin_mj) / 1e3 / count


def energy_counter_mj(device: torch.device) -> Callable[[], int] | None:
    """Give a function that reads the total energy of `device` in mJ, or None where NVML cannot say."""
    if device.type != "cuda":
        return None
    import torch

    from calibration.traces.surroundings import nvml

    library = nvml()
    if library is None:
        return None
    try:
        handle = library.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        library.nvmlDeviceGetTotalEnergyConsumption(handle)
    except library.NVMLError:
        return None
    return lambda: int(library.nvmlDeviceGetTotalEnergyConsumption(handle))
