"""What a stage costs: seconds of one item at batch 1, each stage run by itself (torch)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from calibration.common.fetch import Advance
from calibration.drafters.cut import submodel
from calibration.grading.scoring import Packed, read


def clock_name(device: torch.device) -> str:
    """Name the clock that `stage_seconds` reads: processor time does not count waiting for others."""
    return "processor time of the process" if device.type == "cpu" else "wall clock, device synchronised"


@torch.inference_mode()
def stage_seconds(
    model: Any, packed: Sequence[Packed], exits: Sequence[int], advance: Advance | None = None
) -> list[float]:
    """Give, per exit, the median over `packed` items of the measured seconds to grade one of them, alone.

    A stage computes its own layers, the final norm and the head for the prompt and every option, from nothing: an
    exit does not profit from a shallower one that ran before. Stages take turns item by item, so that a change of
    the machine's speed hits all of them; the first item warms up and is not counted.
    """
    whole = model.config.num_hidden_layers
    parts = [model if layers == whole else submodel(model, tuple(range(layers))) for layers in exits]
    rounds = []
    for item in (packed[0], *packed):
        rounds.append([_seconds(part, item, layers) for part, layers in zip(parts, exits, strict=True)])
        if advance is not None and len(rounds) > 1:
            advance(1)
    return [float(seconds) for seconds in np.median(np.array(rounds[1:]), axis=0)]


def _seconds(model: Any, item: Packed, layers: int) -> float:
    """Give the seconds of grading one item by a model of `layers` layers."""
    cuda = model.device.type == "cuda"
    clock = time.perf_counter if cuda else time.process_time
    if cuda:
        torch.cuda.synchronize(model.device)
    began = clock()
    read(model, [item], (layers,))
    if cuda:
        torch.cuda.synchronize(model.device)
    return clock() - began
