"""Every law that the data at hand can be asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from analysis.common.threads import one_thread
from analysis.laws.batch import BATCHES, batch_laws, context_law, engine_batch_law
from analysis.laws.law import Law, LawFindings
from analysis.laws.size import size_law, training_law
from calibration.common.errors import PacelineError
from calibration.traces import TraceSet

DRAFT_TOKENS = 4


@one_thread
def find_laws(
    *,
    family: TraceSet | None = None,
    curves: str | Path | None = None,
    traces: TraceSet | None = None,
    runs: str | Path | None = None,
    draft_tokens: int = DRAFT_TOKENS,
    batches: Sequence[int] = BATCHES,
    workers: int = 1,
    seed: int = 0,
) -> LawFindings:
    """Find the laws of size (`family`: a TraceSet of drafters by size), training (`curves`: a CSV of learning curves,
    ``recipe/curves.csv`` in the folder of a distilled TraceSet), context and simulated batch (`traces`), and measured
    batch (`runs`: a folder of measured runs, such as `analysis.fidelity.bundled_runs` gives).

    A law whose data were not given, or do not bear it, is named in ``absent`` with the reason. `draft_tokens` is the
    draft length of accepted lengths (learning curves have theirs, 4); `workers` simulate, with the same results for
    any number. The same arguments give the same findings.
    """
    wanted: list[tuple[str, object, Callable[[], Sequence[Law]]]] = [
        ("size", family, lambda: [_size(family, draft_tokens, False, seed), _size(family, draft_tokens, True, seed)]),
        ("training tokens", curves, lambda: [training_law(curves or "", seed=seed)]),
        ("output position", traces, lambda: [context_law(_given(traces), draft_tokens, seed=seed)]),
        ("context", traces, lambda: [context_law(_given(traces), draft_tokens, axis="context", seed=seed)]),
        (
            "batch size",
            traces,
            lambda: batch_laws(_given(traces), draft_tokens, batches=batches, workers=workers, seed=seed),
        ),
    ]
    wanted.append(("measured batch size", runs, lambda: [engine_batch_law(runs or "", seed=seed)]))
    laws: list[Law] = []
    absent = []
    for name, given, find in wanted:
        if given is None:
            absent.append(f"{name}: no data were given")
            continue
        try:
            laws += find()
        except PacelineError as fault:
            absent.append(f"{name}: {fault}")
    return LawFindings(draft_tokens, seed, tuple(laws), tuple(absent))


def _size(family: TraceSet | None, draft_tokens: int, with_embedding: bool, seed: int) -> Law:
    return size_law(_given(family), draft_tokens, with_embedding=with_embedding, seed=seed)


def _given(traces: TraceSet | None) -> TraceSet:
    assert traces is not None
    return traces
