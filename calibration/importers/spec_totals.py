"""Totals of speculation that servers count, and the acceptance law that follows from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from calibration.common.errors import TraceError
from calibration.importers.aggregates import AcceptanceLaw, Lengths, acceptance_law, even_lengths, geometric_law
from calibration.importers.origin import Origin
from calibration.observe.prometheus import by_position, counter_name, label, total

PREFIXES = ("vllm:", "llamacpp:")
"""Servers that expose the ``spec_decode_`` counters, by the prefix of their names."""
_TRAFFIC = {
    "vllm:": {"requests": "request_success", "prompt_tokens": "prompt_tokens", "output_tokens": "generation_tokens"},
    "llamacpp:": {"prompt_tokens": "prompt_tokens", "output_tokens": "tokens_predicted"},  # no requests
}
_BROKEN_OFF = ("abort", "error")
"""Reasons with which a request ends early; its tokens stay in the sums."""

MATERIAL_SHORTFALL = 0.05
"""By how much drafts may fall short of their full length before it must be known who cut them: the tokens per round
come back either way, and what differs is how many tokens a verification step is charged for."""


@dataclass(frozen=True)
class SpecTotals:
    """Counts over a run; accepted tokens leave the bonus out. None: not reported.

    `drafts`: rounds that had a draft. `by_position[p]`: rounds whose draft position p + 1 was accepted.
    `draft_tokens`: the configured draft length. `broken_off`: requests that were aborted or failed, beside
    `requests`; their tokens are in the sums. `exact`: counted, not worked out from rounded rates as logs have them.
    """

    place: str
    drafts: float
    drafted_tokens: float
    accepted_tokens: float
    by_position: tuple[float, ...] | None = None
    draft_tokens: int | None = None
    requests: int | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    broken_off: int = 0
    exact: bool = True

    def __post_init__(self) -> None:
        """Refuse counts that contradict each other."""
        if self.accepted_tokens > self.drafted_tokens * (1 + 1e-9):
            raise TraceError(
                f"{self.place}: accepted tokens must be at most the {self.drafted_tokens:.0f} drafted, got "
                f"{self.accepted_tokens:.0f}"
            )

    def known_from(self, requests: int | None, lengths: Lengths | None) -> SpecTotals:
        """Give these totals with what was not counted taken from what the user says of the run."""
        told = {"requests": requests}
        if lengths is not None:
            told = {
                "requests": len(lengths) if requests is None else requests,
                "prompt_tokens": sum(prompt for prompt, _ in lengths),
                "output_tokens": sum(output for _, output in lengths),
            }
        missing: dict[str, Any] = {name: value for name, value in told.items() if getattr(self, name) is None}
        return replace(self, **missing)

    def undrafted(self) -> float | None:
        """Give the share of rounds without a draft; None where requests or output tokens are not known.

        Every request has one token from prefill and every round 1 + accepted; what is left came from rounds that
        had no draft. Low by what the last rounds reached past the end of their outputs, at most a draft a request.
        """
        if self.requests is None or self.output_tokens is None:
            return None
        lone = max(self.output_tokens - self.requests - self.drafts - self.accepted_tokens, 0.0)
        return lone / (lone + self.drafts)

    def past_end(self) -> float:
        """Give how many tokens the last rounds may have reached past the ends of outputs: a draft a request."""
        longest = max(len(self.by_position or ()), self.drafted_tokens / max(self.drafts, 1))
        return ((self.requests or 0) + self.broken_off) * longest

    def check_outputs(self) -> None:
        """Refuse outputs that are too short for the rounds counted."""
        if self.requests is None or self.output_tokens is None:
            return
        least = self.requests + self.drafts + self.accepted_tokens
        rounding = 0.0 if self.exact else 0.01 * self.output_tokens
        if self.output_tokens < least - self.past_end() - rounding:
            raise TraceError(
                f"{self.place}: output tokens must be at least requests + drafts + accepted tokens ({least:.0f}), "
                f"got {self.output_tokens}; are the counts and the lengths of the same run?"
            )

    def law(self, origin: Origin, draft_tokens: int | None = None) -> AcceptanceLaw:
        """Give the acceptance law; `draft_tokens`: the configured draft length, needed where positions are missing.

        Only for a drafter that looks up do short drafts and rounds without one belong to the drafter. `TraceError`
        where it matters whose they are and `origin` does not tell the paradigm, and where a lookup's rounds without a
        draft cannot be known.
        """
        if self.drafts <= 0:
            raise TraceError(f"{self.place}: no draft was counted; was speculation on?")
        length = self.drafted_tokens / self.drafts
        longest = len(self.by_position) if self.by_position is not None else draft_tokens or self.draft_tokens
        if longest is None:
            raise TraceError(
                f"{self.place}: acceptance by position is not reported; give the configured draft length "
                "(--draft-tokens)"
            )
        if length > longest + 1e-6:
            raise TraceError(
                f"{self.place}: drafts must have at most {longest} token(s) on average, got {length:.3f}"
            )
        if self.by_position is None:
            law = geometric_law(self.accepted_tokens / self.drafts, longest, self.place)
        else:
            summed = sum(self.by_position)
            if abs(summed - self.accepted_tokens) > 0.01 * self.accepted_tokens + len(self.by_position):
                raise TraceError(
                    f"{self.place}: accepted tokens by position must add up to the {self.accepted_tokens:.0f} "
                    f"accepted, got {summed:.0f}"
                )
            law = acceptance_law([accepted / self.drafts for accepted in self.by_position], self.place)
        short = length if origin.looks_up and length < longest - 1e-6 else None
        undrafted = self._whose(origin, length / longest)
        return acceptance_law(law.rates, self.place, undrafted=undrafted, drafted_tokens=short)

    def _whose(self, origin: Origin, filled: float) -> float:
        """Give the share of rounds without a draft that is the drafter's own; `filled`: drafted tokens over asked."""
        share = self.undrafted()
        if share is None:
            raise TraceError(
                f"{self.place}: the rounds without a draft are not counted; give the number of requests and their "
                "tokens (--requests, or --lengths REQUESTS,PROMPT,OUTPUT), which tell them"
            )
        if origin.looks_up or not origin.paradigm_known:
            self.check_outputs()
        own = origin.own_undrafted(share, self.place)
        if 1 - filled > MATERIAL_SHORTFALL:
            origin.must_be_told(f"drafts had {filled:.1%} of their full length on average", self.place)
        return own

    def lengths(self) -> Lengths:
        """Give the mean prompt and output length to every request; `TraceError` where they were not counted."""
        if self.requests == 0:
            raise TraceError(f"{self.place}: no request ended; give --lengths REQUESTS,PROMPT,OUTPUT")
        if self.requests is None or self.prompt_tokens is None or self.output_tokens is None:
            missing = [name for name in ("requests", "prompt_tokens", "output_tokens") if getattr(self, name) is None]
            flag = "--requests" if missing == ["requests"] else "--lengths REQUESTS,PROMPT,OUTPUT"
            raise TraceError(f"{self.place}: {', '.join(missing)}: not reported; give {flag}")
        return even_lengths(self.requests, self.prompt_tokens, self.output_tokens, self.place)

    def remarks(self, looks_up: bool) -> list[str]:
        """Say what the counts hold that a law leaves out."""
        lines = []
        longest = len(self.by_position or ())
        if not looks_up and longest and self.drafted_tokens < (longest - 0.01) * self.drafts:
            lines.append(
                f"drafts had {self.drafted_tokens / self.drafts:.3f} of {longest} tokens on average, by the engine's "
                "choice: what was not drafted counts as not accepted in these rates, so full drafts would have more "
                "accepted"
            )
        share = self.undrafted()
        if share and not looks_up:
            lines.append(f"{share:.2%} of rounds had no draft, by the engine's choice: left out")
        if share and looks_up:
            lone = share / (1 - share) * self.drafts
            most = (lone + self.past_end()) / (lone + self.past_end() + self.drafts)
            lines.append(
                f"{lone:.0f} rounds had no draft: output tokens that no prefill and no counted round gave; at most "
                f"{most:.2%} of all, as last rounds may reach past the end of their output"
            )
        if self.broken_off:
            lines.append(
                f"{self.broken_off} requests were aborted or failed: not among the {self.requests} requests, but "
                "their tokens are in the sums and cannot be told apart"
            )
        return lines


def totals_of(counters: Mapping[str, float], place: str) -> SpecTotals:
    """Read the totals from counters as `calibration.observe.prometheus.parse_counters` gives them.

    `TraceError` where the counters of speculative decoding are not among them.
    """
    names = {counter_name(key) for key in counters}
    prefix = next((one for one in PREFIXES if one + "spec_decode_num_drafts_total" in names), None)
    if prefix is None:
        raise TraceError(
            f"{place}: spec_decode_num_drafts_total must be there with a prefix of {', '.join(PREFIXES)}, got "
            f"{len(names)} other counters; was speculation on?"
        )

    def spec(name: str) -> float:
        return total(counters, f"{prefix}spec_decode_num_{name}_total") or 0.0

    broken_off = sum(
        value
        for key, value in counters.items()
        if counter_name(key) == f"{prefix}request_success_total" and label(key, "finished_reason") in _BROKEN_OFF
    )
    traffic = {
        key: None if (found := total(counters, f"{prefix}{name}_total")) is None else round(found)
        for key, name in _TRAFFIC[prefix].items()
    }
    finished = traffic.get("requests")
    positions = by_position(counters, f"{prefix}spec_decode_num_accepted_tokens_per_pos_total")
    _check_positions(positions or [], place)
    return SpecTotals(
        place,
        spec("drafts"),
        spec("draft_tokens"),
        spec("accepted_tokens"),
        None if positions is None else tuple(positions),
        requests=None if finished is None else round(finished - broken_off),
        prompt_tokens=traffic["prompt_tokens"],
        output_tokens=traffic["output_tokens"],
        broken_off=round(broken_off),
    )


def _check_positions(positions: Sequence[float], place: str) -> None:
    """Refuse counters by position that rise: a position is accepted only behind the one before it."""
    for at, (before, here) in enumerate(pairwise(positions), start=2):
        if here > before:
            raise TraceError(
                f"{place}: accepted tokens of position {at} must be at most that of position {at - 1} "
                f"({before:.0f}), got {here:.0f}"
            )
