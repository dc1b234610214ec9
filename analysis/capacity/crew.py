"""Many calls of one function, here or in other processes, counted for a progress bar."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import as_completed
from typing import Any, Self, TypeVar

from calibration.common.progress import Progress
from calibration.traces import TraceSet
from simulator.experiments.pool import process_pool

T = TypeVar("T")


class Steps:
    """Counts the steps of a plan for a progress bar."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def one(self) -> None:
        """Count one step."""
        self.reach(self._done + 1)

    def reach(self, done: int) -> None:
        """Count up to `done`: steps that turned out not to be needed are counted as done."""
        self._done = done
        if self._progress is not None:
            self._progress(done, self._total)


class Crew:
    """Calls a function of a scenario many times, in this process or in others, in the order that it was asked."""

    def __init__(self, workers: int, traces: TraceSet, steps: Steps) -> None:
        self._traces, self.steps = traces, steps
        self._context = process_pool(workers, None) if workers > 1 else None
        self._pool: Any = None

    def __enter__(self) -> Self:
        """Start the processes, where there are any."""
        if self._context is not None:
            self._pool = self._context.__enter__()
        return self

    def __exit__(self, *fault: Any) -> None:
        """End them."""
        if self._context is not None:
            self._context.__exit__(*fault)

    def all(self, work: Callable[..., T], asked: Sequence[tuple[Any, ...]]) -> list[T]:
        """Call `work` with each of `asked` and the TraceSet."""
        if self._pool is None:
            found = []
            for given in asked:
                found.append(work(*given, self._traces))
                self.steps.one()
            return found
        futures = [self._pool.submit(work, *given, self._traces) for given in asked]
        for future in as_completed(futures):
            future.result()
            self.steps.one()
        return [future.result() for future in futures]
