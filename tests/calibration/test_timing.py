"""Step times: every cell of the grid, repeats in the outer loop, and a clock that times the right model."""

from __future__ import annotations

import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import tiny_verifier

import calibration.drafters.timing as timing
from calibration.drafters import build_drafter, parse_drafter
from calibration.models import clock
from calibration.models.clock import energy_counter_mj
from calibration.timing import Cell, TimingGrid, measure
from calibration.traces import make_table

GRID = TimingGrid(
    batches=(1, 3),
    new_tokens=(1, 4),
    contexts=(5, 9),
    prefill_batches=(2,),
    prefill_tokens=(6,),
    warmups=2,
    repeats=3,
)


@pytest.fixture(scope="module")
def columns():
    verifier = tiny_verifier(0)
    drafters = [build_drafter(parse_drafter(name), verifier) for name in ("prompt-lookup", "exit-2")]
    stages = []
    table = measure("tiny", verifier.model, drafters, GRID, lambda *step: stages.append(step))
    return table, stages


def test_every_cell_is_timed_in_every_repeat(columns):
    table, stages = columns
    cells = set(GRID.cells("tiny", ["prompt-lookup", "exit-2"]))
    assert len(cells) == 1 + 2 * 2 * 2 + 2 * 2 * 2
    assert Cell("tiny", "prefill", 2, 6, 0) in cells
    assert Cell("tiny", "verify", 3, 4, 9) in cells
    assert Cell("exit-2", "draft", 3, 1, 5) in cells
    names = ("model", "operation", "batch", "new_tokens", "context_tokens", "repeat")
    rows = list(zip(*(table[name] for name in names), strict=True))
    wanted = {(*vars(cell).values(), repeat) for cell in cells for repeat in range(3)}
    assert set(rows) == wanted
    assert len(rows) == len(wanted)
    assert table["repeat"] == sorted(table["repeat"])  # a disturbance spreads over many cells
    assert min(table["seconds"]) > 0
    assert set(table["joules"]) == {None}  # a CPU reports none: missing, not zero
    assert stages[-1] == ("time steps", 5 * len(cells), 5 * len(cells))
    assert make_table("timings", table).num_rows == len(rows)


def test_the_clock_runs_while_the_model_does_and_not_while_its_cache_is_filled(monkeypatch):
    """The verifier is made 20 ms slower, filling caches 20 ms too: only the first may show."""
    verifier = tiny_verifier(0)
    drafter = build_drafter(parse_drafter("exit-2"), verifier)
    fill = timing._filled_cache

    def slow_fill(*args):
        time.sleep(0.02)
        return fill(*args)

    monkeypatch.setattr(timing, "_filled_cache", slow_fill)
    forward = verifier.model.forward

    def slow_forward(*args, **options):
        time.sleep(0.02)
        return forward(*args, **options)

    verifier.model.forward = slow_forward
    grid = TimingGrid((1,), (2,), (4,), (1,), (3,), warmups=1, repeats=5)
    table = measure("tiny", verifier.model, [drafter], grid)
    seconds = {
        op: [s for s, o in zip(table["seconds"], table["operation"], strict=True) if o == op]
        for op in ("verify", "draft")
    }
    assert min(seconds["verify"]) >= 0.02
    assert np.median(seconds["draft"]) < 0.02


def test_steps_see_the_cache_and_the_new_tokens_of_their_cell():
    verifier = tiny_verifier(0)
    seen = []
    verifier.model.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(
            (tuple(kwargs["input_ids"].shape), kwargs["past_key_values"].get_seq_length())
        ),
        with_kwargs=True,
    )
    grid = TimingGrid((3,), (2,), (4,), (1,), (6,), warmups=0, repeats=1)
    measure("tiny", verifier.model, [], grid)
    assert seen == [((1, 6), 0), ((3, 2), 4)]


def test_a_cpu_has_no_energy_counter():
    assert energy_counter_mj(torch.device("cpu")) is None


def test_energy_is_the_mean_over_a_window_of_steps(monkeypatch):
    """A counter that rises by 7 J with every verify step and by 2 J with every other one."""
    counter = {"mj": 0}
    forward = timing.forward_step

    def metered(*sizes, prefill):
        step = forward(*sizes, prefill=prefill)

        def run():
            counter["mj"] += 2000 if prefill else 7000
            return step()

        return run

    monkeypatch.setattr(timing, "forward_step", metered)
    monkeypatch.setattr(clock, "energy_counter_mj", lambda device: lambda: counter["mj"])
    monkeypatch.setattr(clock, "ENERGY_WINDOW_S", 0.02)
    grid = TimingGrid((1,), (2,), (4,), (1,), (6,), warmups=1, repeats=2)
    table = measure("tiny", tiny_verifier(0).model, [], grid)
    assert list(zip(table["operation"], table["joules"], strict=True)) == [("prefill", 2.0), ("verify", 7.0)] * 2


class FakeNvml:
    """Stands for pynvml on a machine with a driver."""

    class NVMLError(Exception):
        pass

    def __init__(self, supported):
        self.supported = supported

    def nvmlInit(self):  # noqa: N802
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid):  # noqa: N802
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):  # noqa: N802
        if not self.supported:
            raise self.NVMLError
        return 42 if handle == "GPU-abc" else 0


@pytest.mark.parametrize("supported", [True, False])
def test_the_energy_counter_is_that_of_the_torch_device(monkeypatch, supported):
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(supported))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="abc"))
    counter = energy_counter_mj(torch.device("cuda"))
    assert (counter() if counter else None) == (42 if supported else None)


def test_without_the_binding_there_is_no_energy(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert energy_counter_mj(torch.device("cuda")) is None
