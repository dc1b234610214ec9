"""Speculation of one request, as vLLM reports it in the last chunk of an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from calibration.common.errors import CalibrationError

_WHERE = "metrics.speculative_decoding"


@dataclass(frozen=True)
class SpecMetrics:
    """How speculation went for one request; accepted tokens never include the bonus token.

    `drafts`: rounds with at least one drafted token. `per_step_drafted`, `per_step_accepted`: one entry per round, in
    order (level ``detailed``). `accepted_by_position`: rounds that accepted more than p drafted tokens, p from 0; it
    is known at both levels. `draft_tokens_max`: the configured draft length.
    """

    drafts: int
    drafted_tokens: int
    accepted_tokens: int
    per_step_drafted: tuple[int, ...] | None = None
    per_step_accepted: tuple[int, ...] | None = None
    accepted_by_position: tuple[int, ...] | None = None
    draft_tokens_max: int | None = None

    @property
    def acceptance_by_position(self) -> tuple[float, ...] | None:
        """Unconditional acceptance rate of draft position p = 0, 1, ...: rounds that accepted it over all drafts.

        As vLLM's counters by position divided by its drafts; a position that was not drafted counts as not accepted.
        """
        if self.accepted_by_position is None or not self.drafts:
            return None
        return tuple(number / self.drafts for number in self.accepted_by_position)


def read_spec_metrics(obj: Mapping[str, Any]) -> SpecMetrics | None:
    """Read vLLM's ``metrics.speculative_decoding`` (``--per-request-spec-decode-metrics summary`` or ``detailed``).

    `obj` is a whole answer (its last chunk, when streamed), its ``metrics``, or the object itself. None where the
    server did not report it; `CalibrationError` where what it reports contradicts itself.
    """
    found = _find(obj)
    if found is None:
        return None
    steps = _count(found, "num_spec_steps")
    drafted, accepted = _count(found, "num_draft_tokens"), _count(found, "num_accepted_draft_tokens")
    _check(accepted <= drafted, f"num_accepted_draft_tokens must be at most num_draft_tokens ({drafted})", accepted)
    step_drafted, step_accepted = _counts(found, "per_step_drafted"), _counts(found, "per_step_accepted")
    histogram = _counts(found, "acceptance_histogram")
    _check_steps(steps, drafted, "per_step_drafted", step_drafted)
    _check_steps(steps, accepted, "per_step_accepted", step_accepted)
    if histogram is not None:
        _check(sum(histogram) == steps, f"acceptance_histogram must add up to {steps} steps", histogram)
    return SpecMetrics(
        steps if step_drafted is None else sum(number > 0 for number in step_drafted),
        drafted,
        accepted,
        step_drafted,
        step_accepted,
        _by_position(histogram, step_accepted),
        _count(found, "num_spec_tokens") if found.get("num_spec_tokens") is not None else None,
    )


def _find(obj: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Go down to the object that holds the counts."""
    found: Any = obj
    for key in ("metrics", "speculative_decoding"):
        if isinstance(found, Mapping) and "num_spec_steps" not in found:
            found = found.get(key, found if key == "metrics" else None)
    if found is None:
        return None
    _check(isinstance(found, Mapping), "must be an object", found)
    return found  # type: ignore[no-any-return]


def _by_position(histogram: Sequence[int] | None, steps: Sequence[int] | None) -> tuple[int, ...] | None:
    """Count the rounds that accepted more than p tokens, from rounds that accepted exactly j or from every round."""
    if histogram is not None:
        return tuple(sum(histogram[p + 1 :]) for p in range(len(histogram) - 1))
    if steps is not None:
        return tuple(sum(number > p for number in steps) for p in range(max(steps, default=0)))
    return None


def _count(found: Mapping[str, Any], key: str) -> int:
    value = found.get(key)
    _check(isinstance(value, int) and not isinstance(value, bool) and value >= 0, f"{key} must be a count", value)
    return int(value)  # type: ignore[arg-type]


def _counts(found: Mapping[str, Any], key: str) -> tuple[int, ...] | None:
    value = found.get(key)
    if value is None:
        return None
    fine = isinstance(value, Sequence) and all(type(one) is int and one >= 0 for one in value)
    _check(fine, f"{key} must be a list of counts", value)
    return tuple(value)


def _check_steps(steps: int, tokens: int, key: str, values: tuple[int, ...] | None) -> None:
    if values is not None:
        _check(len(values) == steps, f"{key} must have one entry per step ({steps})", len(values))
        _check(sum(values) == tokens, f"{key} must add up to {tokens} tokens", sum(values))


def _check(fine: bool, rule: str, got: Any) -> None:
    if not fine:
        raise CalibrationError(f"{_WHERE}: {rule}, got {got!r}")


@dataclass(frozen=True)
class Speculation:
    """Tokens drafted for one request and accepted (bonus excluded), in how many rounds where the server tells."""

    drafted_tokens: int
    accepted_tokens: int
    drafts: int | None = None


def read_speculation(event: Mapping[str, Any]) -> Speculation | None:
    """Read the speculation that one event of a stream reports, in the form of the server that sent it.

    vLLM: see `read_spec_metrics`. SGLang: ``sglext.spec_tokens_details``, which ``return_spec_tokens_details`` asks
    for. llama.cpp: ``timings`` with ``draft_n`` and ``draft_n_accepted``, without the number of rounds; it leaves
    both out where nothing was drafted, so that ``timings`` without them (known by ``predicted_n``) mean 0.
    """
    found = read_spec_metrics(event) if "metrics" in event else None
    if found is not None:
        return Speculation(found.drafted_tokens, found.accepted_tokens, found.drafts)
    details = _inner(event, "sglext", "spec_tokens_details")
    if details is not None:
        keys = ("spec_num_proposed_drafts", "spec_num_correct_drafts", "spec_verify_ct")
        return Speculation(*(_count(details, key) for key in keys))
    timings = _inner(event, "timings")
    if timings is not None and timings.get("draft_n") is not None:
        return Speculation(_count(timings, "draft_n"), _count(timings, "draft_n_accepted"))
    if timings is not None and timings.get("predicted_n") is not None:
        return Speculation(0, 0, 0)
    return None


def _inner(event: Mapping[str, Any], *keys: str) -> Mapping[str, Any] | None:
    found: Any = event
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) else None
