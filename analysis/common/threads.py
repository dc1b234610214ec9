"""One thread for linear algebra on small matrices, where more only wait for each other."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def one_thread(work: Callable[P, T]) -> Callable[P, T]:
    """Let `work` run with one thread of BLAS and OpenMP, whatever the process has.

    NOTE: a fit of many small steps spends its time handing over between threads. The study of the bundled cascade
    took 200 s with two threads on two busy cores, and 15 s with one; the numbers are the same.
    """

    @functools.wraps(work)
    def limited(*args: P.args, **kwargs: P.kwargs) -> T:
        import scipy.linalg  # noqa: F401 - only what is loaded can be limited, and scipy brings a BLAS of its own
        from threadpoolctl import threadpool_limits

        with threadpool_limits(1):
            return work(*args, **kwargs)

    return limited
