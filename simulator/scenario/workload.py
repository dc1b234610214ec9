"""The ``[workload]`` table of a scenario: who arrives when, with which lengths, and which recordings answer."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from calibration.common.settings import Count, Positive, Seconds, Table
from simulator.scenario.inputs import InputFile

Order = Literal["trace", "shuffled"]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Weights = Annotated[dict[str, Weight], Field(min_length=1)]
Instant = Annotated[tuple[Seconds, Weight], Field(strict=False)]
Instants = Annotated[tuple[Instant, ...], Field(min_length=1, strict=False)]
"""Pairs of (start in seconds, rate per second)."""
BLOCK_TOKENS = 32
"""Positions of a resampled block, unless the scenario says otherwise."""


class ConstantTokens(Table):
    """Always `tokens`."""

    kind: Literal["constant"]
    tokens: Count


class LognormalTokens(Table):
    """Lognormal with mean `mean_tokens` and coefficient of variation `cv`, rounded to at least 1 token.

    `max_tokens` cuts longer ones down to it, which lowers the mean.
    """

    kind: Literal["lognormal"]
    mean_tokens: Annotated[float, Field(ge=1, allow_inf_nan=False)]
    cv: Positive
    max_tokens: Count | None = None


class PmfTokens(Table):
    """`tokens[i]` with a probability in proportion to `weights[i]`."""

    kind: Literal["pmf"]
    tokens: Annotated[tuple[Count, ...], Field(min_length=1, strict=False)]
    weights: Annotated[tuple[Weight, ...], Field(min_length=1, strict=False)]


TokenLaw = Annotated[ConstantTokens | LognormalTokens | PmfTokens, Field(discriminator="kind")]


class RecordedLengths(Table):
    """Those of the recorded sequence that the request replays."""

    kind: Literal["recorded"]


class DrawnLengths(Table):
    """Drawn from a law, prompt and output independently; what is left out is as recorded."""

    kind: Literal["drawn"]
    prompt: TokenLaw | None = None
    output: TokenLaw | None = None


class SampledLengths(Table):
    """Rows of a CSV file (prompt and output together), drawn with replacement: ShareGPT-like samples."""

    kind: Literal["samples"]
    path: InputFile
    prompt_column: str = "prompt_tokens"
    output_column: str = "output_tokens"


Lengths = Annotated[RecordedLengths | DrawnLengths | SampledLengths, Field(discriminator="kind")]


class ServiceClass(Table):
    """A share of the requests, in proportion to `weight`.

    `priority`: smaller goes first, as in vLLM. `deadline_s`: seconds after arrival in which it should have ended.
    """

    weight: Weight = 1.0
    priority: int = 0
    deadline_s: Positive | None = None


Classes = Annotated[dict[str, ServiceClass], Field(min_length=1)]


class Bound(Table):
    """What binds requests to recordings.

    `mix`: weights of the domains that requests belong to (default: sequences in turn, whatever their domain).
    `lengths`: token counts other than the kind's own. Where an output is longer than its recording, blocks of
    `block_tokens` recorded positions of its domain continue it (see `simulator.playback.blocks`).
    """

    lengths: Lengths | None = None
    mix: Weights | None = None
    classes: Classes | None = None
    block_tokens: Count | None = None


class Limited(Table):
    """Limits of an open loop. `rate_multiplier` above 1 compresses time: arrival times are divided by it.

    Arrivals end after `requests` of them or `duration_s` simulated seconds, whichever comes first.
    """

    duration_s: Positive | None = None
    rate_multiplier: Positive | None = None


DEFAULT_STAGGER_S = 0.001
"""Seconds between the starts of two clients of a closed loop: as long as a client program takes to send a request."""


class ClosedLoop(Bound):
    """A fixed number of clients, each submitting its next request the moment its last one ends.

    `requests`: how many are counted; every sequence once (times `copies`) by default. `keep_full` goes on submitting
    uncounted fillers until the last counted request has ended, so that no batch runs empty. `copies` = B serves B
    copies of one sequence as one batch, the next sequence when all of them have ended (then `concurrency` is B too).
    With `think_s` a client thinks before each request, the first included: so many seconds, or, with `think_law`
    ``exponential``, so many on average.

    Clients start one after the other, `stagger_s` apart (left out: 1 ms; 0 where the loop is kept full or serves
    copies, which stand for an engine in full swing): a server sees the first request alone and prefills it by itself,
    where clients in lock-step would share one large prefill. The first request of every client meets an engine that
    is still filling up: it is left out of latency statistics, if as many others remain, unless `include_startup` is
    true. A ``[measure]`` table replaces that rule. Throughput covers all requests either way.
    """

    kind: Literal["closed"]
    concurrency: Count
    requests: Count | None = None
    keep_full: bool = False
    copies: Count = 1
    order: Order = "trace"
    think_s: Seconds | None = None
    think_law: Literal["constant", "exponential"] | None = None
    stagger_s: Seconds | None = None
    include_startup: bool = False

    @property
    def in_full_swing(self) -> bool:
        """Whether the loop stands for an engine in full swing: kept full by fillers, or batches of copies."""
        return self.keep_full or self.copies > 1

    @property
    def starts_apart_s(self) -> float:
        """Seconds between the starts of two clients."""
        if self.stagger_s is not None:
            return self.stagger_s
        return 0.0 if self.in_full_swing else DEFAULT_STAGGER_S


class PoissonArrivals(Bound, Limited):
    """Independent exponential gaps between arrivals, `rate_rps` a second on average."""

    kind: Literal["poisson"]
    rate_rps: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    requests: Count | None = None
    order: Order = "trace"


class GammaArrivals(Bound, Limited):
    """Independent gamma gaps with mean 1 / `rate_rps` and coefficient of variation `cv`; 1 is Poisson.

    ``vllm bench serve --burstiness`` is 1 / cv squared.
    """

    kind: Literal["gamma"]
    rate_rps: Positive
    cv: Positive
    requests: Count | None = None
    order: Order = "trace"


class PiecewiseArrivals(Bound, Limited):
    """Poisson arrivals whose rate changes: `rates` are [start_s, rate_rps], the last one goes on.

    With `repeat_s` the pattern starts anew after so many seconds.
    """

    kind: Literal["piecewise"]
    rates: Instants
    repeat_s: Positive | None = None
    requests: Count | None = None
    order: Order = "trace"


class ClientMixture(Bound, Limited):
    """Superposed clients, each with its own rate, burstiness and lengths, as ServeGen (arXiv 2505.09999) has them.

    `path`: a CSV file with the columns client, t_s, rate_rps, dist (gamma, weibull or exponential) and a (the shape
    of the gaps), a row per window. `lengths_path`: client, field (input_tokens or output_tokens), tokens, prob.
    `category` and `clients` choose rows; `start_s` is where in the file the simulation begins. `client_domains`
    gives clients a domain of their own.
    """

    kind: Literal["clients"]
    path: InputFile
    lengths_path: InputFile | None = None
    category: str | None = None
    clients: Annotated[tuple[str, ...], Field(min_length=1, strict=False)] | None = None
    client_domains: dict[str, str] | None = None
    start_s: Seconds = 0.0
    requests: Count | None = None
    order: Order = "trace"


class TraceArrivals(Bound, Limited):
    """A recorded trace of arrivals and lengths; time counts from its first row (`csv`: as written).

    `format`: ``azure`` (TIMESTAMP, ContextTokens, GeneratedTokens), ``mooncake`` (JSON lines with prefix blocks),
    ``burstgpt`` (Timestamp, Request tokens, Response tokens) or ``csv`` (arrival_s, prompt_tokens, output_tokens).
    Sequences take turns, whatever their length: an output may be cut or continued.
    """

    kind: Literal["trace"]
    format: Literal["azure", "mooncake", "burstgpt", "csv"]
    path: InputFile
    requests: Count | None = None
    order: Order = "trace"


class ArrivalFile(Limited):
    """A CSV file with the columns arrival_s, prompt_tokens and output_tokens; `requests` keeps the first rows.

    A row takes its prompt length from the file and its acceptance from the recorded sequence with the shortest
    output that is at least as long, cut at `output_tokens`; equally short ones take turns. An output that is longer
    than every recorded one is refused; kind ``trace`` continues it.
    """

    kind: Literal["csv"]
    path: InputFile
    requests: Count | None = None


def block_tokens(load: Bound | ArrivalFile) -> int:
    """Give the positions of a block that continues an output beyond its recording."""
    given = load.block_tokens if isinstance(load, Bound) else None
    return BLOCK_TOKENS if given is None else given


Drawn = PoissonArrivals | GammaArrivals | PiecewiseArrivals
"""Open loops that are drawn from a law alone."""
Workload = Annotated[
    ClosedLoop | PoissonArrivals | GammaArrivals | PiecewiseArrivals | ClientMixture | TraceArrivals | ArrivalFile,
    Field(discriminator="kind"),
]
