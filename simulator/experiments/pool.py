"""Many simulations, in this process or in others; what comes out does not depend on how many work on it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from calibration.common.errors import PacelineError, PacelineWarning, ScenarioError
from calibration.traces import TraceSet
from simulator.running.run import read_traces, simulate
from simulator.scenario.scenario import Scenario

T = TypeVar("T")
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
"""Set to 1 for workers: one thread each is fastest where every core has a worker."""

_given: TraceSet | None = None
_kept: dict[tuple[str, ...], TraceSet] = {}
"""In a worker: the TraceSet it was started with, and those it read last."""
_KEEP = 4


@dataclass(frozen=True)
class Outcome:
    """The summary of one run, or the fault that kept it from running; and what it warned of."""

    summary: dict[str, Any]
    fault: PacelineError | None = None
    said: tuple[tuple[type[PacelineWarning], str], ...] = ()


def run_all(
    scenarios: Sequence[Scenario], traces: TraceSet | None = None, *, workers: int = 2
) -> Generator[tuple[int, Outcome], None, None]:
    """Simulate every one of `scenarios`; give (its index, outcome) as they end, in any order.

    `traces` replaces the TraceSets that they name; every worker receives it once. `workers` processes are spawned;
    1 simulates in this one. When the iteration is left early (an error, Ctrl-C), running workers are stopped, at once
    if the generator is closed.
    """
    if workers < 1:
        raise ScenarioError(f"workers: must be at least 1, got {workers}")
    if workers == 1 or len(scenarios) < 2:
        for index, scenario in enumerate(scenarios):
            yield index, run_one(scenario, traces)
        return
    with process_pool(min(workers, len(scenarios)), traces) as pool:
        futures: dict[Future[Outcome], int] = {}
        try:
            for index, scenario in enumerate(scenarios):
                futures[_submit(pool, run_prepared, scenario)] = index
            # NOTE: the pool looks for dead workers among those it knew when it last woke; this wakes it for the last.
            _submit(pool, _nothing)
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as broken:
            raise PacelineError(
                "workers: a worker process ended abruptly or could not start (out of memory, or killed; a script "
                "must start simulations below if __name__ == '__main__'); workers = 1 runs in one process"
            ) from broken.__cause__


def _submit(pool: ProcessPoolExecutor, work: Callable[..., T], *given: object) -> Future[T]:
    try:
        return pool.submit(work, *given)
    except OSError as fault:  # no process to be had, or another had just died and took the pipes along
        raise BrokenProcessPool(str(fault)) from fault


@contextmanager
def process_pool(workers: int, traces: TraceSet | None) -> Iterator[ProcessPoolExecutor]:
    """Give a pool of spawned single-threaded workers that hold `traces`; leaving it by an exception stops them."""
    before = {name: os.environ.get(name) for name in THREADS}
    os.environ.update(dict.fromkeys(THREADS, "1"))  # read when numpy is loaded, so it must be there at their start
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_prepare, initargs=(traces,))
    try:
        yield pool
    except BaseException:
        # NOTE: 3.14 has terminate_workers(); before, a running simulation can only be waited for or stopped so.
        for process in list((pool._processes or {}).values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _prepare(traces: TraceSet | None) -> None:
    global _given
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches them too; the parent decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _given = traces


def _end_with_parent() -> None:
    """End this worker when its parent is gone; a killed parent cannot tell it, and it would wait forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _nothing() -> None:
    return


def run_prepared(scenario: Scenario) -> Outcome:
    """Simulate one scenario in a worker of `process_pool`, with the traces that it was given."""
    return run_one(scenario, _given)


def run_one(scenario: Scenario, traces: TraceSet | None = None) -> Outcome:
    """Simulate one scenario in this process; paceline's own warnings are collected, not shown."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", PacelineWarning)
        try:
            result = simulate(scenario, traces=traces if traces is not None else _read(scenario))
        except PacelineError as fault:
            return Outcome({}, fault)
    said = []
    for warning in caught:
        if issubclass(warning.category, PacelineWarning):
            said.append((warning.category, str(warning.message)))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return Outcome(result.summary, None, tuple(said))


def _read(scenario: Scenario) -> TraceSet:
    """Read the TraceSet of `scenario`, unless the same files were read a moment ago."""
    key = tuple(digest for place, digest in scenario.inputs_sha256().items() if place.startswith("traces."))
    if key not in _kept:
        while len(_kept) >= _KEEP:
            del _kept[next(iter(_kept))]
        _kept[key] = read_traces(scenario)
    return _kept[key]


def retell(outcomes: Sequence[Outcome], stacklevel: int = 3) -> None:
    """Warn once for every kind of warning among `outcomes`, in the words of the first run that gave it."""
    first: dict[type[PacelineWarning], str] = {}
    runs: dict[type[PacelineWarning], int] = {}
    for outcome in outcomes:
        for category in dict.fromkeys(category for category, _ in outcome.said):
            runs[category] = runs.get(category, 0) + 1
        for category, text in outcome.said:
            first.setdefault(category, text)
    for category, text in first.items():
        more = f" (the first of {runs[category]} of {len(outcomes)} runs to say so)" if len(outcomes) > 1 else ""
        warnings.warn(f"{text}{more}", category, stacklevel=stacklevel)
