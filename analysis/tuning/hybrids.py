"""Candidates that choose drafter and length in every round from the text so far; only what an engine could see."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from analysis.tuning.findings import BatchLength
from analysis.tuning.runs import best_by_batch
from analysis.tuning.space import Base, Candidate
from calibration.traces import TraceSet

MATCHES = (2, 3, 5)
"""Shortest earlier matches, in tokens, from which on a copy is drafted."""
DEEP = 20
"""A copy may go on for long: drafted tokens at most, where nothing shorter was asked for."""
MATCH = "shortest match (tokens)"


def hybrids(
    base: Base,
    traces: TraceSet,
    served: Sequence[str],
    leaders: Sequence[tuple[str, int]],
    longest: int,
    rows: Sequence[BatchLength],
) -> list[Candidate]:
    """Give the rules that need token ids: copy or model by the length of the match, and forecasts of acceptance.

    `served`: ids of the sequences that are served; `leaders`: drafters with their best fixed lengths, best first;
    `longest`: the longest draft asked for; `rows`: the lengths by batch size, where there are any. Empty where the
    recording lacks token ids.
    """
    if not _has_ids(traces, served):
        return []
    lookups = {info.name for info in traces.manifest.drafters if info.deterministic}
    copying = [pair for pair in leaders if pair[0] in lookups]
    models = [pair for pair in leaders if pair[0] not in lookups]
    found: list[Candidate] = []
    if copying and models:
        found += _matches(base, copying[0], models[0], longest)
        found += _by_batch(base, copying[0][0], models[0][0], rows)
    if traces.manifest.decoding.mode == "greedy":
        found += _forecasts(base, [name for name, _ in leaders], lookups, longest)
    return found


def context_match(base: Base, lookup: str, model: str, tiers: dict[str, dict[str, int]], name: str) -> Candidate:
    """Give the rule that copies with `lookup` where the match is long enough, and drafts with `model` elsewhere."""
    rule = {"policy": "context_match", "drafters": [lookup, model], "lookup": lookup, "tiers": tiers}
    deepest = max(max(tier["lookup_tokens"], tier["model_tokens"]) for tier in tiers.values())
    overrides = base.routed(rule, {"policy": "fixed", "draft_tokens": deepest})
    return Candidate(name, "context_match", (lookup, model), overrides)


def _matches(base: Base, copying: tuple[str, int], model: tuple[str, int], longest: int) -> Iterator[Candidate]:
    """Every shortest match, copies of some depths, and the model's best fixed length or nothing beside them."""
    for least in MATCHES:
        for copied in sorted({copying[1], longest, max(longest, DEEP)}):
            for drafted in (model[1], 0):
                tier = {"min_match": least, "lookup_tokens": copied, "model_tokens": drafted}
                other = f"{model[0]} {drafted}" if drafted else "nothing"
                name = f"{copying[0]} {copied} after a match of {least}, else {other}"
                plain = context_match(base, copying[0], model[0], {"1": tier}, name)
                yield Candidate(
                    name=plain.name,
                    kind=plain.kind,
                    drafters=plain.drafters,
                    overrides=plain.overrides,
                    axis=MATCH,
                    at=least,
                    series=f"copy {copied}, else {drafted}",
                )


def _by_batch(base: Base, lookup: str, model: str, rows: Sequence[BatchLength]) -> list[Candidate]:
    """The best lengths of both at every batch size, after a match of three tokens."""
    copied, drafted = best_by_batch(rows, lookup), best_by_batch(rows, model)
    if not copied or copied.keys() != drafted.keys():
        return []
    firsts = [1, *(size + 1 for size in list(copied)[:-1])]
    tiers = {
        str(first): {"min_match": 3, "lookup_tokens": copied[size], "model_tokens": drafted[size]}
        for first, size in zip(firsts, copied, strict=True)
    }
    if all(tier["lookup_tokens"] == tier["model_tokens"] == 0 for tier in tiers.values()):
        return []
    name = f"{lookup} after a match of 3, else {model}: by batch size"
    return [context_match(base, lookup, model, tiers, name)]


def _forecasts(base: Base, names: Sequence[str], lookups: set[str], longest: int) -> Iterator[Candidate]:
    """Forecasts for the best drafter alone, for the best with the next ones, and for the best copy with a model."""
    copying = [name for name in names if name in lookups]
    models = [name for name in names if name not in lookups]
    groups = [tuple(names[:1]), tuple(names[:2]), tuple(names[:3])]
    if copying and models:
        groups.append((copying[0], models[0]))
    for group in dict.fromkeys(tuple(sorted(one)) for one in groups):
        deepest = max(longest, DEEP) if lookups & set(group) else longest
        rule: dict[str, Any] = {"policy": "forecast", "drafters": list(group)}
        overrides = base.routed(rule, {"policy": "fixed", "draft_tokens": deepest})
        yield Candidate(f"{' + '.join(group)}: forecast up to {deepest}", "forecast", tuple(group), overrides)


def _has_ids(traces: TraceSet, served: Sequence[str]) -> bool:
    """Whether every sequence that is served has the token ids of its prompt and output."""
    names = ("prompt_token_ids", "output_token_ids")
    if not set(names) <= set(traces.sequences.column_names):
        return False
    mine = traces.sequences.filter(pc.is_in(traces.sequences["sequence_id"], value_set=pa.array(served)))
    return all(mine[name].null_count == 0 for name in names)
