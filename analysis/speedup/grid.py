"""Run the simulator over drafters, draft lengths and batch sizes, on several processes.

Results do not depend on the number of workers: every cell carries its own seed and shares nothing, and the results
come back in the order of the grid.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from analysis.common.simulated import simulate_and_hear
from calibration.common.arrays import Floats
from calibration.common.errors import ReplayError
from calibration.common.progress import Progress
from calibration.traces import TraceSet
from simulator import RunResult

if TYPE_CHECKING:
    from simulator import Scenario


EXTRAPOLATED_SHARE = 0.01
"""A run with more than this share of iterations outside the measured range is labelled extrapolated."""


@dataclass(frozen=True)
class Cell:
    """One simulation: a drafter at a draft length (0: no speculation) and a batch size kept full.

    A cell without speculation names a drafter too: it serves the requests that were recorded with it.
    """

    drafter: str
    draft_tokens: int
    batch: int


OPERATIONS = ("prefill", "verify", "draft")
"""What a step does; `Steps.operation` points here."""


@dataclass(frozen=True)
class Steps:
    """The engine steps of one simulation in kinds: one operation at one batch size and number of new tokens.

    Arrays have shape (kinds,). ``batch``, ``new_tokens`` (sum over the batch) and ``context_tokens`` (likewise) are
    means over the time of the kind; steps of a decode round are told apart by both, prefills by batch alone, and all
    draft steps of a round count as its first one. ``seconds`` (requests, kinds) is the time of each kind attributed
    to each request, as ``engine_seconds`` of a run is.
    """

    operation: NDArray[np.int64]
    batch: NDArray[np.float64]
    new_tokens: NDArray[np.float64]
    context_tokens: NDArray[np.float64]
    seconds: NDArray[np.float64]


@dataclass(frozen=True)
class CellRun:
    """What one simulation gives: per request of the TraceSet, in its order, and in total.

    Requests that were not recorded with the drafter hold zeros. ``warnings`` are what the simulator said.
    ``engine_seconds`` is the time of engine iterations attributed to each request; ``draft_s`` to ``overhead_s``
    divide the time of the whole run. ``extrapolated_share`` is the share of iterations priced outside the
    measured range. ``steps`` says in which steps the time was spent; None for runs that were not simulated here.
    """

    drafter: str
    draft_tokens: int
    batch: int
    output_tokens: NDArray[np.float64]
    engine_seconds: NDArray[np.float64]
    rounds: NDArray[np.float64]
    prefill_s: float
    draft_s: float
    verify_s: float
    overhead_s: float
    extrapolated_share: float
    warnings: tuple[str, ...]
    steps: Steps | None = None

    @property
    def extrapolated(self) -> bool:
        """Whether the label of every number from this run must be *extrapolated*."""
        return self.extrapolated_share > EXTRAPOLATED_SHARE

    @property
    def throughput(self) -> float:
        """Output tokens per second of engine time."""
        return float(self.output_tokens.sum() / self.engine_seconds.sum())


def baselines(traces: TraceSet) -> dict[str, str]:
    """Give, per drafter, the drafter whose plain runs serve the same requests: the first one with the same set."""
    first: dict[frozenset[str], str] = {}
    found = {}
    for name in traces.manifest.drafter_names:
        found[name] = first.setdefault(requests_of(traces, name), name)
    return found


def grid_cells(traces: TraceSet, draft_tokens: Sequence[int], batches: Sequence[int]) -> list[Cell]:
    """List the cells: each plain baseline once per batch size, then every drafter at the lengths it can replay."""
    cells = [Cell(name, 0, b) for name in dict.fromkeys(baselines(traces).values()) for b in batches]
    for info in traces.manifest.drafters:
        allowed = [k for k in draft_tokens if info.max_draft_tokens is None or k <= info.max_draft_tokens]
        cells += [Cell(info.name, k, batch) for k in allowed for batch in batches]
    return cells


def requests_of(traces: TraceSet, drafter: str) -> frozenset[str]:
    """Ids of the sequences that were recorded with `drafter`."""
    mine = pc.equal(traces.positions["drafter"], drafter)
    return frozenset(pc.unique(traces.positions["sequence_id"].filter(mine)).to_pylist())


def run_grid(
    traces: TraceSet,
    cells: Sequence[Cell],
    *,
    costs: Mapping[str, Any] | None = None,
    seed: int = 0,
    workers: int = 2,
    progress: Progress | None = None,
) -> list[CellRun]:
    """Simulate every cell; give the runs in the order of `cells`.

    `costs` is the ``costs`` table of a scenario; what it leaves out comes from the TraceSet.
    """
    prices = dict(costs or {})
    report = progress or (lambda done, total: None)
    if workers <= 1:
        runs = []
        for cell in cells:
            runs.append(run_cell(traces, cell, prices, seed))
            report(len(runs), len(cells))
        return runs
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_prepare, initargs=(traces, prices, seed))
    try:
        # Long runs (small batches) first, so that no worker is left alone with one at the end.
        order = sorted(range(len(cells)), key=lambda i: cells[i].batch)
        futures = {pool.submit(_run_prepared, cells[i]): i for i in order}
        pending = set(futures)
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
            report(len(futures) - len(pending), len(futures))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    by_cell = {index: future.result() for future, index in futures.items()}
    return [by_cell[index] for index in range(len(cells))]


def cell_scenario(cell: Cell, costs: Mapping[str, Any], seed: int) -> Scenario:
    """Give the scenario of one cell: a batch kept full."""
    from simulator import Scenario

    speculate = {"policy": "fixed", "draft_tokens": cell.draft_tokens}
    return Scenario.model_validate(
        {
            "name": f"{cell.drafter} draft {cell.draft_tokens} batch {cell.batch}",
            "seed": seed,
            "traces": {"path": "."},
            "drafter": {"name": cell.drafter},
            "stopping": speculate if cell.draft_tokens else {"policy": "none"},
            "engine": {"max_num_seqs": cell.batch},
            "workload": {"kind": "closed", "concurrency": cell.batch, "keep_full": True},
            "costs": dict(costs),
        }
    )


def run_cell(traces: TraceSet, cell: Cell, costs: Mapping[str, Any], seed: int) -> CellRun:
    """Simulate one cell: every request of `traces` once, in a batch kept full."""
    result, said = simulate_and_hear(cell_scenario(cell, costs, seed), traces)
    return _summarise(traces, cell, result, said)


def _summarise(traces: TraceSet, cell: Cell, result: RunResult, said: tuple[str, ...]) -> CellRun:
    """Put the counted requests in the order of the TraceSet; each recorded one must be there exactly once."""
    requests, summary = result.requests, result.summary
    ids = traces.sequences["sequence_id"].combine_chunks()
    counted = requests.filter(requests["counted"])
    row = np.asarray(pc.index_in(counted["sequence_id"], value_set=ids).to_numpy(zero_copy_only=False))
    recorded = requests_of(traces, cell.drafter)
    if len(set(row.tolist())) != len(row) or len(row) != len(recorded):
        raise ReplayError(
            f"simulation of {cell}: every recorded request must be counted once, "
            f"got {len(row)} counted requests for {len(recorded)} recorded"
        )

    def column(name: str) -> NDArray[np.float64]:
        values = np.zeros(len(ids))
        values[row] = counted[name].to_numpy(zero_copy_only=False)
        return values

    return CellRun(
        cell.drafter,
        cell.draft_tokens,
        cell.batch,
        output_tokens=column("output_tokens"),
        engine_seconds=column("engine_seconds"),
        rounds=column("rounds"),
        prefill_s=float(summary["prefill_s"]),
        draft_s=float(summary["draft_s"]),
        verify_s=float(summary["verify_s"]),
        overhead_s=float(summary["overhead_s"]),
        extrapolated_share=float(summary["extrapolated_iterations"]) / max(1, int(summary["iterations"])),
        warnings=said,
        steps=_steps(counted, result.iterations, row, len(ids)),
    )


def _steps(counted: pa.Table, iterations: pa.Table, row: NDArray[Any], requests: int) -> Steps:
    """Attribute the time of every kind of step to the requests that were in it.

    The batch is kept full and nothing is preempted: a request is in every decode round between its first token and
    its end, and in the prefill that ends with its first token.
    """
    it = {
        name: iterations[name].to_numpy(zero_copy_only=False).astype(np.float64)
        for name in (
            *("start_s", "duration_s", "active", "drafted_tokens", "context_tokens"),
            *("prefill_tokens", "draft_s", "verify_s"),
        )
    }
    prefill = np.asarray(pc.equal(iterations["kind"], "prefill").to_numpy(zero_copy_only=False))
    active, ends = it["active"], it["start_s"] + it["duration_s"]
    none = np.zeros(len(active))
    parts = (  # operation, which steps, new tokens, new tokens that tell kinds apart, seconds
        (0, prefill, it["prefill_tokens"], none, it["verify_s"]),
        (1, ~prefill, active + it["drafted_tokens"], active + it["drafted_tokens"], it["verify_s"]),
        (2, ~prefill & (it["draft_s"] > 0), active, active, it["draft_s"]),
    )
    first, last = (counted[name].to_numpy() for name in ("first_token_s", "finish_s"))
    kinds: list[tuple[int, float, float, float]] = []
    columns = []
    for operation, mine, new, apart, seconds in parts:
        at = np.flatnonzero(mine)
        if not len(at):
            continue
        key, kind = np.unique(np.stack([active[at], apart[at]], axis=1), axis=0, return_inverse=True)
        share = np.zeros((len(at) + 1, len(key)))
        share[np.arange(1, len(at) + 1), kind.ravel()] = seconds[at] / active[at]
        total = share.cumsum(axis=0)
        # Ends are sums of the same seconds in another order than the times of requests: half a step is far from both.
        middle = ends[at] - it["duration_s"][at] / 2
        after = np.searchsorted(middle, last)
        before = np.searchsorted(middle, first)
        if operation == 0:
            before, after = before - 1, before  # its own prefill is the last one before its first token
        columns.append(total[after] - total[before])
        for i, (batch, _) in enumerate(key.tolist()):
            held = kind.ravel() == i
            weights = share[1:, i][held]
            means = (weighted_mean(values[at][held], weights) for values in (new, it["context_tokens"]))
            kinds.append((operation, batch, *means))
    by_request = np.zeros((requests, len(kinds)))
    by_request[row] = np.concatenate(columns, axis=1)
    operation, batch, new, context = np.array(kinds).T
    return Steps(operation.astype(np.int64), batch, new, context, by_request)


_prepared: tuple[TraceSet, dict[str, Any], int] | None = None
"""What a worker process keeps between cells: sent once, not with every cell."""


def _prepare(traces: TraceSet, costs: dict[str, Any], seed: int) -> None:
    global _prepared
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent alone answers Ctrl-C
    _prepared = (traces, costs, seed)


def _run_prepared(cell: Cell) -> CellRun:
    assert _prepared is not None
    traces, costs, seed = _prepared
    return run_cell(traces, cell, costs, seed)


def weighted_mean(values: Floats, weights: Floats) -> float:
    """Return the mean of `values` (n,) by `weights` (n,), never outside of their range.

    Equal values give exactly that value: a step of one token that rounding made 1 + 1e-16 would be priced as one of
    several. Summed without BLAS, whose last digit depends on the number of its threads.
    """
    mean = np.average(values, weights=weights)
    return float(np.clip(mean, values.min(), values.max()))
