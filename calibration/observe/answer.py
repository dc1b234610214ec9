"""What one request received: when tokens arrived, how many each time, and what the server said at the end.

Speculation of one request, as vLLM reports it in the last chunk of an answer.
"""

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
        drafts=steps if step_drafted is None else sum(number > 0 for number in step_drafted),
        drafted_tokens=drafted,
        accepted_tokens=accepted,
        per_step_drafted=step_drafted,
        per_step_accepted=step_accepted,
        accepted_by_position=_by_position(histogram, step_accepted),
        draft_tokens_max=_count(found, "num_spec_tokens") if found.get("num_spec_tokens") is not None else None,
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


@dataclass(frozen=True)
class Answer:
    """The whole answer to one request; times are seconds on the caller's clock.

    `emitted`: tokens of each arrival, None where the server does not tell. `token_ids` and `prompt_tokens` are None
    where it does not tell either; `cached_tokens`: prompt tokens that it found in its prefix cache. `counted`:
    whether the server itself counted `output_tokens`; otherwise one arrival is taken for one token.
    """

    emission_s: tuple[float, ...]
    emitted: tuple[int, ...] | None
    output_tokens: int
    counted: bool
    prompt_tokens: int | None
    cached_tokens: int | None
    token_ids: tuple[int, ...] | None
    speculation: Speculation | None
    finish_reason: str | None
    sent_s: float = 0.0


class AnswerReader:
    """Takes the events of one stream, in order, and gives the `Answer`."""

    def __init__(self) -> None:
        self._times: list[float] = []
        self._counts: list[int | None] = []
        self._ids: list[int] = []
        self._usage: Mapping[str, Any] = {}
        self._told = 0  # output tokens that the running usage counted up to the last event
        self._finish: str | None = None
        self._speculation: Speculation | None = None

    @property
    def tokens(self) -> int:
        """How many tokens are known to have arrived; an arrival of unknown size counts as one."""
        return sum(1 if number is None else number for number in self._counts)

    @property
    def finished(self) -> bool:
        """Whether the server said why the answer ended."""
        return self._finish is not None

    def take(self, event: Mapping[str, Any], now: float) -> None:
        """Take one event that arrived at `now`; `CalibrationError` where it reports an error or is malformed."""
        if event.get("error"):
            raise CalibrationError(f"the server broke off, {said(event)}")
        usage = event.get("usage")
        if isinstance(usage, Mapping):
            self._usage = usage
        self._speculation = read_speculation(event) or self._speculation
        choice = _choice(event)
        if choice is None:
            return
        number, text = self._number(choice, usage), _text(choice)
        if number or (number is None and text):
            self._times.append(now)
            self._counts.append(number)
        self._finish = choice.get("finish_reason") or self._finish

    def answer(self) -> Answer:
        """Give the answer as a whole; `CalibrationError` where not one token arrived."""
        if not self._times:
            raise CalibrationError("the answer must hold at least one token, none arrived")
        counted = self._usage.get("completion_tokens")
        known = all(number is not None for number in self._counts)
        tokens = counted if isinstance(counted, int) and counted > 0 else self.tokens
        details = self._usage.get("prompt_tokens_details")
        return Answer(
            emission_s=tuple(self._times),
            emitted=tuple(1 if number is None else number for number in self._counts)
            if tokens == self.tokens
            else None,
            output_tokens=tokens,
            counted=tokens == counted or known,
            prompt_tokens=self._usage.get("prompt_tokens"),
            cached_tokens=details.get("cached_tokens") if isinstance(details, Mapping) else None,
            token_ids=tuple(self._ids) if len(self._ids) == tokens else None,
            speculation=self._speculation,
            finish_reason=self._finish,
        )

    def _number(self, choice: Mapping[str, Any], usage: Any) -> int | None:
        """Give the number of tokens in an event: from its token ids, or from a running usage."""
        ids = choice.get("token_ids")
        if isinstance(ids, list):
            self._ids.extend(ids)
        told = usage.get("completion_tokens") if isinstance(usage, Mapping) else None
        if isinstance(told, int):
            before, self._told = self._told, told
            # A usage that comes with the last event alone counts the whole answer, not this event.
            if not isinstance(ids, list) and (before or not self._counts):
                return told - before
        return len(ids) if isinstance(ids, list) else None


def said(body: Any) -> str:
    """Give the message in a server's error object: OpenAI's ``error.message``, or FastAPI's ``detail``."""
    found = body
    for key in ("error", "message", "detail"):
        if isinstance(found, Mapping) and key in found:
            found = found[key]
    return str(found).strip()[:500] or "without a message"


def _choice(event: Mapping[str, Any]) -> Mapping[str, Any] | None:
    choices = event.get("choices")
    if choices is None:
        choices = []
    if not isinstance(choices, list) or len(choices) > 1 or not all(isinstance(one, Mapping) for one in choices):
        raise CalibrationError(f"stream: choices must be a list of at most one object, got {str(choices)[:120]}")
    return choices[0] if choices else None


def _text(choice: Mapping[str, Any]) -> str:
    delta = choice.get("delta")
    places = (choice, delta if isinstance(delta, Mapping) else {})
    return "".join(str(place[key]) for place in places for key in _TEXTS if place.get(key))


_TEXTS = ("text", "content", "reasoning_content", "reasoning")
