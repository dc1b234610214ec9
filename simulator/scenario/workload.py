"""The ``[workload]`` table of a scenario: who arrives when, with which lengths, and which recordings answer.

Rules between the keys of ``[workload]``, told before anything is run.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

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
    `block_tokens` recorded positions of its domain continue it (see `simulator.playback.replay`).
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
    include_startup: bool | None = None

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
    rate_rps: Positive
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


def workload_faults(load: Mapping[str, Any], engine: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Give (place, rule) for every rule between keys that the (maybe unchecked) workload `load` breaks."""
    kind = load.get("kind")
    faults = _bound_faults(load)
    if kind == "closed":
        faults += _closed_faults(load, engine)
    if kind == "piecewise":
        faults += _piecewise_faults(load)
    if kind == "clients" and load.get("requests") is None and load.get("duration_s") is None:
        faults.append(("workload", "must have requests or duration_s where kind is 'clients'"))
    if load.get("format") == "mooncake" and load.get("lengths") is not None:
        faults.append(("workload.lengths", "must be left out for format 'mooncake': prefix blocks belong to prompts"))
    return faults


def _closed_faults(load: Mapping[str, Any], engine: Mapping[str, Any]) -> list[tuple[str, str]]:
    faults = []
    if load.get("think_law") is not None and load.get("think_s") is None:
        faults.append(("workload.think_s", "must be given where think_law is"))
    copies = load.get("copies", 1)
    if not isinstance(copies, int) or copies < 2:
        return faults
    concurrency = load.get("concurrency", copies)
    if concurrency != copies:
        faults.append(("workload.concurrency", f"must equal copies = {copies}, got {concurrency}"))
    requests = load.get("requests")
    if isinstance(requests, int) and requests % copies:
        faults.append(("workload.requests", f"must be a multiple of copies = {copies}, got {requests}"))
    if load.get("keep_full"):
        faults.append(("workload.keep_full", "must be false where copies > 1, got true"))
    for key in ("think_s", "mix", "lengths"):
        if load.get(key) is not None:
            faults.append((f"workload.{key}", "must be left out where copies > 1"))
    slots = engine.get("max_num_seqs", copies)
    if isinstance(slots, int) and slots < copies:
        faults.append(("engine.max_num_seqs", f"must be at least workload.copies = {copies}, got {slots}"))
    return faults


def _bound_faults(load: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Check weights, which must not all be zero, and laws of lengths."""
    faults = []
    if _all_zero(mix.values() if isinstance(mix := load.get("mix"), Mapping) else ()):
        faults.append(("workload.mix", "must have a weight above zero"))
    classes = load.get("classes")
    shares = list(classes.values()) if isinstance(classes, Mapping) else []
    if _all_zero([share.get("weight", 1.0) if isinstance(share, Mapping) else 1.0 for share in shares]):
        faults.append(("workload.classes", "must have a weight above zero"))
    lengths = load.get("lengths")
    if not isinstance(lengths, Mapping) or lengths.get("kind") != "drawn":
        return faults
    laws = {key: law for key in ("prompt", "output") if isinstance(law := lengths.get(key), Mapping)}
    if not laws:
        faults.append(("workload.lengths", "must have prompt or output where kind is 'drawn'"))
    for key, law in laws.items():
        tokens, weights = law.get("tokens"), law.get("weights")
        if law.get("kind") != "pmf" or not isinstance(tokens, list | tuple) or not isinstance(weights, list | tuple):
            continue
        if len(tokens) != len(weights):
            rule = f"must be as many as tokens, {len(tokens)}, got {len(weights)}"
            faults.append((f"workload.lengths.{key}.weights", rule))
        elif _all_zero(weights):
            faults.append((f"workload.lengths.{key}.weights", "must have a weight above zero"))
    return faults


def _all_zero(weights: Any) -> bool:
    values = list(weights)
    return bool(values) and all(isinstance(value, int | float) and value == 0 for value in values)


def _piecewise_faults(load: Mapping[str, Any]) -> list[tuple[str, str]]:
    rates = load.get("rates")
    if not isinstance(rates, Sequence) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(x, int | float) for x in pair)
        for pair in rates
    ):
        return []  # told by its type
    starts, rps, repeat = [pair[0] for pair in rates], [pair[1] for pair in rates], load.get("repeat_s")
    if not starts:
        return []
    faults = []
    if starts[0] != 0:
        faults.append(("workload.rates", f"must start at 0 seconds, got {starts[0]}"))
    if any(later <= sooner for sooner, later in itertools.pairwise(starts)):
        faults.append(("workload.rates", f"must have increasing starts, got {starts}"))
    if _all_zero(rps):
        faults.append(("workload.rates", "must have a rate above zero"))
    elif rps[-1] == 0 and repeat is None and load.get("duration_s") is None:
        faults.append(("workload.rates", "must end with a rate above zero, or have repeat_s or duration_s, got 0"))
    if isinstance(repeat, int | float) and repeat <= starts[-1]:
        faults.append(("workload.repeat_s", f"must be after the last start, {starts[-1]}, got {repeat}"))
    return faults
