"""What one request received: when tokens arrived, how many each time, and what the server said at the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from calibration.common.errors import CalibrationError
from calibration.observe.request_metrics import Speculation, read_speculation


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
            tuple(self._times),
            tuple(1 if number is None else number for number in self._counts) if tokens == self.tokens else None,
            tokens,
            tokens == counted or known,
            self._usage.get("prompt_tokens"),
            details.get("cached_tokens") if isinstance(details, Mapping) else None,
            tuple(self._ids) if len(self._ids) == tokens else None,
            self._speculation,
            self._finish,
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
