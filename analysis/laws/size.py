"""Accepted length against the size of the drafter, within one family of one recipe.

Accepted length against the tokens that a drafter was trained on, from the learning curves of a distillation.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from analysis.common.bootstrap import DRAWS, ClusterBootstrap, Estimate
from analysis.common.rounds import recording, replay_rounds
from analysis.laws import fit
from analysis.laws.law import Curve, Law, LawPoint, compare_curves, fit_all
from calibration.common.arrays import Floats
from calibration.common.errors import ReportError
from calibration.traces import DrafterInfo, TraceSet

LEAST_SIZES = 3


def family(traces: TraceSet) -> tuple[DrafterInfo, ...]:
    """Give the drafters that differ in size alone, smallest first.

    Of the drafters with known parameters: those trained on the most domains where a recipe tells (specialists are
    left out), then the largest group of one paradigm. Raises `ReportError` for fewer than three sizes.
    """
    known = [d for d in traces.manifest.drafters if d.parameters_non_embedding]
    widest = max((_domains(d) for d in known), default=0)
    groups: dict[str, list[DrafterInfo]] = defaultdict(list)
    for drafter in known:
        if _domains(drafter) == widest:
            groups[drafter.paradigm].append(drafter)
    members = max(groups.values(), key=len, default=[])
    sizes = {d.parameters_non_embedding: d for d in members}
    if len(sizes) < LEAST_SIZES:
        raise ReportError(
            f"size law: needs {LEAST_SIZES} drafters of one paradigm that differ in size, got {len(sizes)}"
        )
    return tuple(sizes[n] for n in sorted(sizes, key=lambda n: n or 0))


def size_law(traces: TraceSet, draft_tokens: int, *, with_embedding: bool = False, seed: int = 0) -> Law:
    """Give accepted tokens per round (bonus not included) against the parameters of the drafter.

    Replayed rounds of `draft_tokens`, complete ones only; exact for greedy traces, exact in expectation for sampled
    ones. The pooled curve has intervals over requests, drawn alike for all sizes; the forms are compared on the
    domains. The logit has the draft length as its scale: no drafter accepts more.
    """
    members = family(traces)
    recorded = [recording(traces, d.name) for d in members]
    rounds = [replay_rounds(each, draft_tokens) for each in recorded]
    sums = np.concatenate(
        [np.stack([r.accepted for r in rounds], axis=1), np.stack([r.rounds for r in rounds], axis=1)], axis=1
    )
    x = [float((d.parameters if with_embedding else d.parameters_non_embedding) or 0) for d in members]
    pooled, *domains = curves_over_domains(x, sums, recorded[0].domains, scale=float(draft_tokens), seed=seed)
    counted = "with" if with_embedding else "without"
    return Law(
        key="size-with-embedding" if with_embedding else "size",
        title=f"Accepted length against drafter parameters, {counted} embedding",
        x_name=f"Drafter parameters {counted} embedding",
        y_name=f"Accepted tokens per round of {draft_tokens} drafted (bonus not included)",
        kind="measured",
        source=f"{len(members)} drafters ({members[0].name} to {members[-1].name}) of one recipe",
        requests=len(recorded[0].domains),
        curves=(pooled, *domains),
        compared="domains",
        comparison=compare_curves(domains or (pooled,), scale=float(draft_tokens), seed=seed),
        caution=_caution(members, with_embedding),
    )


def curves_over_domains(
    x: Sequence[float], sums: Floats, domains: Sequence[str], *, scale: float | None, seed: int
) -> list[Curve]:
    """Give the curve over all requests, its fits with intervals over requests, and then one curve a domain.

    `sums` holds, per request, the numerators of y at each x and then its denominators: shape (requests, 2 len(x)).
    """
    bootstrap = ClusterBootstrap(domains, np.random.default_rng(seed), draws=DRAWS)
    brief = ClusterBootstrap(domains, np.random.default_rng(seed), draws=fit.DRAWS)

    def ratio(s: Floats) -> Floats:
        over, under = np.split(s, 2, axis=-1)
        return np.asarray(over / under)

    def points(domain: str | None) -> list[LawPoint]:
        return [LawPoint(at, y) for at, y in zip(x, bootstrap.estimates(ratio, sums, domain), strict=True)]

    def redraw(refit: Callable[[Floats], Floats]) -> Sequence[Estimate]:
        return brief.estimates(lambda s: refit(ratio(s)), sums)

    curves = [fit_all("all domains", points(None), scale=scale, redraw=redraw)]
    return curves + [Curve(domain, tuple(points(domain)), ()) for domain in bootstrap.domains]


def _domains(drafter: DrafterInfo) -> int:
    """On how many domains the drafter was trained, as far as its recipe tells."""
    recipe = drafter.settings.get("recipe")
    return len(recipe.get("domains", ())) if isinstance(recipe, dict) else 0


def _caution(members: Sequence[DrafterInfo], with_embedding: bool) -> str:
    said = ["intervals are over requests, not over repeated training"]
    layers = {d.layers for d in members if d.layers}
    if len(layers) > 1:
        said.append(f"depth grows with size ({min(layers)} to {max(layers)} layers), and the two are not told apart")
    if _mixed_starts(members):
        said.append("the smaller drafters start from random weights, the larger from layers of the verifier")
    if with_embedding:
        said.append("the embedding is most of the smaller drafters, so the range of x is narrow")
    return "; ".join(said)


def _mixed_starts(members: Sequence[DrafterInfo]) -> bool:
    shapes = [d.settings.get("shape") for d in members]
    copied = ["from_layers" in shape for shape in shapes if isinstance(shape, dict)]
    return any(copied) and not all(copied)


COLUMNS = ("student", "tokens", "tokens_per_round", "held_out_tokens")
"""What the table must have; `calibration.training` writes them, tokens per round with drafts of 4, bonus included."""

CURVE_DRAFT_TOKENS = 4


def training_law(path: str | Path, *, seed: int = 0) -> Law:
    """Give accepted tokens per round (bonus not included) against training tokens, one curve a student.

    `path` is a CSV with the columns of `COLUMNS`, one row a student and checkpoint; its tokens per round are those
    of `calibration.training`, for drafts of 4, and are counted here less one. Rows before any training (0 tokens)
    have no logarithm and are left out. The points carry no interval: the table has none. Raises `ReportError` for a
    table that cannot be used.
    """
    rows = _read(Path(path))
    held_out = {int(row["held_out_tokens"]) for row in rows}
    grouped: dict[str, list[LawPoint]] = defaultdict(list)
    for row in rows:
        if float(row["tokens"]) > 0:
            accepted = float(row["tokens_per_round"]) - 1
            grouped[row["student"]].append(LawPoint(float(row["tokens"]), Estimate(accepted, None, None, 0)))
    scale = float(CURVE_DRAFT_TOKENS)
    ordered = sorted(grouped.items(), key=lambda item: -max(p.y.value or 0.0 for p in item[1]))
    curves = tuple(fit_all(name, points, scale=scale) for name, points in ordered)
    if not curves:
        raise ReportError(f"{path}: at least one row must have tokens > 0, got none")
    levels = max(len(curve.points) for curve in curves)
    reach = max(p.x for c in curves for p in c.points) / min(p.x for c in curves for p in c.points)
    return Law(
        key="training-tokens",
        title="Accepted length against training tokens",
        x_name="Training tokens",
        y_name=f"Accepted tokens per round of {CURVE_DRAFT_TOKENS} drafted (bonus not included)",
        kind="measured",
        source=f"{len(curves)} students at up to {levels} checkpoints, on {_span(held_out)} held-out tokens each",
        requests=None,
        curves=curves,
        compared="students",
        comparison=compare_curves(curves, scale=scale, seed=seed),
        caution=(
            f"the tokens span a factor of {reach:.3g} only; checkpoints of one run under one learning-rate schedule, "
            "not runs trained for each number of tokens; every student is measured on the same held-out text"
        ),
    )


def _read(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise ReportError(
                    f"{path}: learning curves need the columns {', '.join(COLUMNS)}, got no {missing[0]}"
                )
            rows = list(reader)
    except OSError as fault:
        raise ReportError(f"{path}: learning curves must be a readable CSV file, got {fault.strerror}") from None
    for line, row in enumerate(rows, start=2):
        for name in COLUMNS[1:]:
            try:
                float(row[name])
            except (TypeError, ValueError):
                raise ReportError(f"{path}, line {line}: {name} must be a number, got '{row[name]}'") from None
    return rows


def _span(values: set[int]) -> str:
    return f"{min(values):,}" if len(values) == 1 else f"{min(values):,} to {max(values):,}"
