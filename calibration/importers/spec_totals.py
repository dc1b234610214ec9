"""Totals of speculation that servers count, and the acceptance law that follows from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from calibration.errors import TraceError
from calibration.importers.aggregates import AcceptanceLaw, Lengths, acceptance_law, even_lengths, geometric_law
from calibration.observe.prometheus import by_position, counter_name, total

PREFIXES = ("vllm:", "llamacpp:")
"""Servers that expose the ``spec_decode_`` counters, by the prefix of their names."""
_TRAFFIC = {"requests": "request_success", "prompt_tokens": "prompt_tokens", "output_tokens": "generation_tokens"}


@dataclass(frozen=True)
class SpecTotals:
    """Counts over a run; accepted tokens leave the bonus out. None: not reported.

    `drafts`: rounds that had a draft. `by_position[p]`: rounds whose draft position p + 1 was accepted.
    `draft_tokens`: the configured draft length.
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

    def undrafted(self) -> float | None:
        """Give the share of rounds without a draft; None where requests or output tokens were not counted.

        Every request has one token from prefill and every round 1 + accepted; what is left came from rounds that
        had no draft. Low by what the last rounds reached past the end of their outputs, at most a draft a request.
        """
        if self.requests is None or self.output_tokens is None:
            return None
        lone = max(self.output_tokens - self.requests - self.drafts - self.accepted_tokens, 0.0)
        return lone / (lone + self.drafts)

    def law(self, looks_up: bool, draft_tokens: int | None = None) -> AcceptanceLaw:
        """Give the acceptance law; `draft_tokens`: the configured draft length, needed where positions are missing.

        Only for a drafter that `looks_up` do short drafts and rounds without one belong to the drafter.
        """
        if self.drafts <= 0:
            raise TraceError(f"{self.place}: no draft was counted; was speculation on?")
        length = self.drafted_tokens / self.drafts
        if self.by_position is None:
            longest = draft_tokens or self.draft_tokens
            if longest is None:
                raise TraceError(
                    f"{self.place}: acceptance by position is not reported; give the configured draft length"
                )
            return geometric_law(self.accepted_tokens / self.drafts, longest, self.place)
        summed = sum(self.by_position)
        if abs(summed - self.accepted_tokens) > 0.01 * self.accepted_tokens + len(self.by_position):
            raise TraceError(
                f"{self.place}: accepted tokens by position must add up to the {self.accepted_tokens:.0f} accepted, "
                f"got {summed:.0f}"
            )
        rates = [accepted / self.drafts for accepted in self.by_position]
        if not looks_up:
            return acceptance_law(rates, self.place)
        short = length < len(rates) - 1e-6
        undrafted = self.undrafted() or 0.0
        return acceptance_law(rates, self.place, undrafted=undrafted, drafted_tokens=length if short else None)

    def lengths(self) -> Lengths:
        """Give the mean prompt and output length to every request; `TraceError` where they were not counted."""
        if self.requests is None or self.prompt_tokens is None or self.output_tokens is None:
            missing = ", ".join(name for name in _TRAFFIC if getattr(self, name) is None)
            raise TraceError(f"{self.place}: {missing}: not reported; give the lengths of the requests")
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
        if share is None and looks_up:
            lines.append("rounds in which the lookup found nothing: not reported; taken as none")
        elif share and not looks_up:
            lines.append(f"{share:.2%} of rounds had no draft, by the engine's choice: left out")
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

    traffic = {
        key: None if (found := total(counters, f"{prefix}{name}_total")) is None else round(found)
        for key, name in _TRAFFIC.items()
    }
    positions = by_position(counters, f"{prefix}spec_decode_num_accepted_tokens_per_pos_total")
    return SpecTotals(
        place,
        spec("drafts"),
        spec("draft_tokens"),
        spec("accepted_tokens"),
        None if positions is None else tuple(positions),
        **traffic,
    )
