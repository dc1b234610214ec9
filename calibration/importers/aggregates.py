"""Trajectories synthesised from acceptance rates: what replays to the figures that an engine aggregated.

An aggregate says how many drafted tokens were accepted over all rounds, position by position, and not which ones.
What it does not tell is assumed and said so in the manifest: *every round independent of every other* and every
request alike, unless a spread between requests is asked for. Nothing here is a recording.

The construction: at every position a run length is drawn on its own, P(run >= j) = the rate of position j. Rounds of
one request start at places of their own, and where the next one starts depends only on runs drawn before, so the runs
that a replay meets are independent draws from that law: with drafts of K tokens, K the number of positions, the
rates come back, and with shorter drafts those of the first positions. Beyond K nothing is known; drafts are capped.
Rates are unconditional as vLLM's are: position 2 counts all rounds, not those that reached it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.random import Generator

from calibration.common.arrays import Floats, Ints
from calibration.common.errors import TraceError
from calibration.importers.origin import Origin
from calibration.importers.reading import Collected
from calibration.traces import PromptSource, TraceSet

_ROUNDING = 0.005
"""By how much a rate may exceed the one before it: tables and logs are rounded."""

Lengths = Sequence[tuple[int, int]]
"""Prompt and output tokens of every request."""


@dataclass(frozen=True)
class AcceptanceLaw:
    """What is known of a round: `rates[j - 1]` = P(at least j drafted tokens accepted), over rounds that had a draft.

    `undrafted`: share of rounds without a draft (a lookup that found nothing). `drafted_tokens`: mean length of the
    drafts, where drafters propose fewer than asked; None: as many as asked.
    """

    rates: tuple[float, ...]
    undrafted: float = 0.0
    drafted_tokens: float | None = None

    @property
    def longest(self) -> int:
        """Draft length K that the rates were counted with."""
        return len(self.rates)

    @property
    def mean_accepted(self) -> float:
        """Accepted tokens of a round that had a draft, bonus excluded: the sum of the rates."""
        return float(sum(self.rates))

    @property
    def tokens_per_round(self) -> float:
        """Tokens that a round emits, bonus included, over all rounds."""
        return 1 + (1 - self.undrafted) * self.mean_accepted


def acceptance_law(
    rates: Sequence[float], place: str, *, undrafted: float = 0.0, drafted_tokens: float | None = None
) -> AcceptanceLaw:
    """Check what was stated `place` and give its law; rates that rounding made rise by a little are levelled."""
    values = np.array(rates, dtype=np.float64)
    if len(values) == 0:
        raise TraceError(f"{place}: at least one acceptance rate is needed")
    for position, rate in enumerate(values.tolist(), start=1):
        if not 0 <= rate <= 1:
            raise TraceError(f"{place}: the acceptance rate of position {position} must lie in [0, 1], got {rate:g}")
    rises = np.flatnonzero(np.diff(values) > _ROUNDING)
    if len(rises):
        at = int(rises[0]) + 1
        raise TraceError(
            f"{place}: the acceptance rate of position {at + 1} must be at most that of position {at} "
            f"({values[at - 1]:g}), got {values[at]:g}; are these rates conditional? they must count all rounds"
        )
    if not 0 <= undrafted < 1:
        raise TraceError(f"{place}: the share of rounds without a draft must lie in [0, 1), got {undrafted:g}")
    law = AcceptanceLaw(tuple(np.minimum.accumulate(values).tolist()), undrafted, drafted_tokens)
    if drafted_tokens is not None:
        least = law.mean_accepted + 1 - law.rates[0]
        if not least - _ROUNDING <= drafted_tokens <= law.longest + _ROUNDING:
            raise TraceError(
                f"{place}: drafts must have between {least:.3f} (what was accepted) and {law.longest} tokens on "
                f"average, got {drafted_tokens:.3f}"
            )
    return law


def geometric_law(mean_accepted: float, longest: int, place: str) -> AcceptanceLaw:
    """Give the law with a constant conditional rate a, cut at `longest` tokens, of mean `mean_accepted`.

    P(run >= j) = a^j and the sum over j = 1 .. longest is the mean (bonus excluded). An assumption, for sources that
    state a mean alone: measured acceptance changes with depth.
    """
    if longest < 1:
        raise TraceError(f"{place}: drafts must have at least 1 token, got {longest}")
    if not 0 <= mean_accepted <= longest:
        raise TraceError(
            f"{place}: the mean accepted length must lie in [1, {longest + 1}] with the bonus token and drafts of "
            f"{longest}, got {mean_accepted + 1:g}"
        )
    depth = np.arange(1, longest + 1)
    low, high = 0.0, 1.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if float((middle**depth).sum()) < mean_accepted else (low, middle)
    return AcceptanceLaw(tuple((((low + high) / 2) ** depth).tolist()))


def even_lengths(
    requests: int, prompt_tokens: int, output_tokens: int, place: str = "lengths"
) -> list[tuple[int, int]]:
    """Share out total token counts evenly among `requests`: each gets the mean, some one token more."""
    for name, tokens in (("prompt_tokens", prompt_tokens), ("output_tokens", output_tokens)):
        if requests < 1 or tokens < requests:
            raise TraceError(f"{place}: {name} must be at least one per request ({requests}), got {tokens}")

    def share(total: int, index: int) -> int:
        return total // requests + (index < total % requests)

    return [(share(prompt_tokens, index), share(output_tokens, index)) for index in range(requests)]


def draw_positions(law: AcceptanceLaw, positions: int, rng: Generator) -> tuple[Ints, Ints | None]:
    """Draw run lengths and proposal lengths (None: as many as asked) for `positions` positions of one request.

    Of drafts shorter than asked only the mean is known: those that are not `law.longest` long are taken to have ended
    where they were accepted, which gives the mean and leaves the rates alone.
    """
    luck = rng.random(positions)
    runs = (luck[:, None] < np.array(law.rates)[None, :]).sum(axis=1).astype(np.int64)
    if law.drafted_tokens is None and law.undrafted == 0:
        return np.minimum(runs, positions - np.arange(positions)), None
    least = law.mean_accepted + 1 - law.rates[0]
    spare = law.longest - least
    short = 0.0
    if law.drafted_tokens is not None and spare > 0:
        short = min(max((law.longest - law.drafted_tokens) / spare, 0.0), 1.0)
    proposals = np.where(rng.random(positions) < short, np.maximum(runs, 1), law.longest)
    none = rng.random(positions) < law.undrafted
    runs[none], proposals[none] = 0, 0
    return np.minimum(runs, positions - np.arange(positions)), proposals


def spread_laws(law: AcceptanceLaw, lengths: Lengths, std_tokens: float, rng: Generator) -> list[AcceptanceLaw]:
    """Give every request a law of its own, so that their mean accepted lengths differ by `std_tokens`.

    Request i has P(run = n) proportional to base(n) exp(theta z_i n), z the normal scores in random order. base and
    theta are solved for: (1) the standard deviation over requests of the mean accepted length (bonus excluded, rounds
    with a draft) is `std_tokens`; (2) weighted by their expected rounds (T_i - 1) / tokens per round, the requests'
    laws add up to `law`. `TraceError` where no such spread exists.
    """
    if std_tokens == 0 or len(lengths) < 2:
        return [law] * len(lengths)
    from scipy.optimize import brentq
    from scipy.special import ndtri

    scores = rng.permutation(ndtri((np.arange(len(lengths)) + 0.5) / len(lengths)))
    output = np.array([tokens for _, tokens in lengths], dtype=np.float64)

    def excess(theta: float) -> float:
        return float((_tilted(law, output, scores, theta) @ np.arange(law.longest + 1)).std()) - std_tokens

    most = 20.0 / law.longest
    if not std_tokens > 0 or excess(most) < 0:
        raise TraceError(
            f"request_std_tokens: must lie in [0, {excess(most) + std_tokens:.2f}] for these rates and requests, got "
            f"{std_tokens:g}"
        )
    laws = _tilted(law, output, scores, float(brentq(excess, 0.0, most, xtol=1e-10)))
    tails = np.minimum(np.cumsum(laws[:, ::-1], axis=1)[:, ::-1][:, 1:], 1.0)
    drafted = law.drafted_tokens
    if drafted is None:
        return [replace(law, rates=tuple(row)) for row in tails.tolist()]
    # A request that accepts more than the mean draft must have had longer drafts: the same share of them is short.
    least = 1 + law.mean_accepted - law.rates[0]
    short = (law.longest - drafted) / (law.longest - least) if law.longest > least else 0.0
    own = law.longest - short * (law.longest - (1 + tails.sum(axis=1) - tails[:, 0]))
    return [
        replace(law, rates=tuple(row), drafted_tokens=mean)
        for row, mean in zip(tails.tolist(), own.tolist(), strict=True)
    ]


def _tilted(law: AcceptanceLaw, output: Floats, scores: Floats, theta: float) -> Floats:
    """Give P(run = n) of every request (requests, K + 1), for which the requests' rounds add up to `law`."""
    wanted = -np.diff(np.concatenate(([1.0], law.rates, [0.0])))
    held = np.arange(law.longest + 1)
    tilt = np.exp(theta * scores[:, None] * (held - law.longest / 2)[None, :])
    base = wanted.copy()
    for _ in range(5000):
        laws = base * tilt
        laws /= laws.sum(axis=1, keepdims=True)
        rounds = np.maximum(output - 1, 0) / (1 + (1 - law.undrafted) * (laws @ held))
        pooled = rounds @ laws / rounds.sum()
        if np.abs(pooled - wanted).max() < 1e-12:
            break
        base = base * np.divide(wanted, pooled, out=np.ones_like(wanted), where=pooled > 0)
        base /= base.sum()
    return np.asarray(laws)


def synthesize(
    lengths: Lengths,
    laws: Sequence[AcceptanceLaw],
    import_format: str,
    *,
    origin: Origin,
    seed: int,
    rng: Generator,
    prompts: Sequence[PromptSource],
    domain: str,
    unknown: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> TraceSet:
    """Give the TraceSet of requests with `lengths` whose rounds follow `laws`, one law each."""
    collected = Collected()
    for index, ((prompt_tokens, output_tokens), law) in enumerate(zip(lengths, laws, strict=True)):
        name = f"{domain}/{index}"
        collected.sequence(name, domain, prompt_tokens, output_tokens, "unknown")
        runs, proposals = draw_positions(law, output_tokens - 1, rng)
        collected.positions(name, origin.drafter, runs, proposals)
    manifest = origin.manifest(
        import_format,
        "aggregate",
        longest_draft=max(law.longest for law in laws),
        prompts=prompts,
        seed=seed,
        unknown=(*UNTOLD, *unknown),
        notes=(MADE_UP, *notes),
    )
    return TraceSet.build(manifest, collected.tables())


MADE_UP = (
    "MADE UP FROM AGGREGATES: run lengths are drawn so that replay gives the reported acceptance rates; "
    "no single run length was measured"
)
UNTOLD = (
    "burstiness: aggregates do not tell it; rounds are drawn independently of one another",
    "acceptance beyond the draft length of the report",
)


def law_note(law: AcceptanceLaw, drafts: float | None = None) -> str:
    """Say what a law promises."""
    rates = ", ".join(f"{rate:.4f}" for rate in law.rates)
    text = f"acceptance by position, of all rounds with a draft: {rates}; mean acceptance length, bonus included: "
    text += f"{1 + law.mean_accepted:.4f}"
    if drafts is not None:
        text += f"; counted over {drafts:.0f} drafts"
    if law.undrafted:
        text += f"; {law.undrafted:.2%} of rounds had no draft: {law.tokens_per_round:.2f} tokens per round over all"
    if law.drafted_tokens is not None:
        text += (
            f"; drafts of {law.drafted_tokens:.3f} tokens on average, those below {law.longest} taken to have ended "
            "where they were accepted"
        )
    return text


def spread_note(std_tokens: float) -> str:
    """Say what is assumed of the variance between requests."""
    if std_tokens == 0:
        return "variance between requests: aggregates do not tell it; all requests are alike (not asked for)"
    return (
        f"variance between requests: asked for, not reported: their mean accepted lengths have a standard deviation "
        f"of {std_tokens:g} tokens, normal scores tilted exponentially"
    )
