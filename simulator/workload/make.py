"""From the ``[workload]`` table of a scenario to the source that the engine asks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import assert_never

import numpy as np

from calibration.common.arrays import Floats
from simulator.playback.arrivals import bind_rows, read_arrivals
from simulator.playback.replay import SequenceTable
from simulator.scenario.scenario import Scenario
from simulator.scenario.workload import (
    ArrivalFile,
    Bound,
    ClientMixture,
    ClosedLoop,
    Drawn,
    GammaArrivals,
    Limited,
    PiecewiseArrivals,
    PoissonArrivals,
    TraceArrivals,
)
from simulator.workload.arrivals import Arrivals, Limits, PiecewiseRate, gamma, piecewise, poisson
from simulator.workload.binding import Binder, Bindings
from simulator.workload.clients import provenance, read_clients, superpose
from simulator.workload.closed import ClosedSource, OpenSource
from simulator.workload.files import read_trace
from simulator.workload.lengths import ARRIVALS, Source, stream


def make_source(scenario: Scenario, sequences: SequenceTable) -> Source:
    """Give the source that the scenario's workload describes.

    Raises `ScenarioError` where a file of it is faulty, or asks for what `sequences` do not have.
    """
    load = scenario.workload
    if isinstance(load, ArrivalFile):
        return _from_file(scenario, load, sequences)
    binder = Binder(load, load.order, sequences, scenario.seed, scenario.locate)
    if isinstance(load, ClosedLoop):
        source: Source = ClosedSource(load, binder, len(sequences), scenario.seed)
    else:
        arrivals = _arrivals(scenario, load, len(sequences))
        bindings = binder.bind(
            len(arrivals),
            prompt_tokens=arrivals.prompt_tokens,
            output_tokens=arrivals.output_tokens,
            domains=_client_domains(load, arrivals),
        )
        source = OpenSource(arrivals, bindings)
    source.provenance |= {"lengths": _length_source(load)}
    return source


def _arrivals(scenario: Scenario, load: Drawn | ClientMixture | TraceArrivals, sequences: int) -> Arrivals:
    if isinstance(load, TraceArrivals):
        arrivals = read_trace(scenario.locate(load.path), load.format, load.requests)
        return arrivals.limited(load.requests, load.duration_s, load.rate_multiplier)
    if isinstance(load, ClientMixture):
        path = scenario.locate(load.path)
        lengths_path = None if load.lengths_path is None else scenario.locate(load.lengths_path)
        clients = read_clients(path, lengths_path, load.category, load.clients, load.start_s)
        drawn = superpose(clients, _limits(load, load.requests), scenario.seed)
        drawn.provenance.update(provenance(path, clients))
        return drawn.limited(load.requests, load.duration_s, load.rate_multiplier)
    number = load.requests
    if number is None and load.duration_s is None:
        number = sequences
    times = _times(load, _limits(load, number), stream(scenario.seed, ARRIVALS))
    return Arrivals(times, provenance={"arrivals": load.kind}).limited(number, load.duration_s, load.rate_multiplier)


def _times(load: Drawn, limits: Limits, rng: np.random.Generator) -> Floats:
    if isinstance(load, PoissonArrivals):
        return poisson(load.rate_rps, limits, rng)
    if isinstance(load, GammaArrivals):
        return gamma(load.rate_rps, load.cv, limits, rng)
    if isinstance(load, PiecewiseArrivals):
        return piecewise(PiecewiseRate(load.rates, load.repeat_s), limits, rng)
    assert_never(load)


def _limits(load: Limited, number: int | None) -> Limits:
    """Give the limits in the time of the process, before it is compressed."""
    duration = math.inf if load.duration_s is None else load.duration_s
    return Limits(number, duration * (load.rate_multiplier or 1.0))


def _client_domains(load: Bound, arrivals: Arrivals) -> Sequence[str | None] | None:
    """Give the domain that every request's client has of its own."""
    if not isinstance(load, ClientMixture) or load.client_domains is None or arrivals.client is None:
        return None
    own = [load.client_domains.get(name) for name in arrivals.clients]
    return [own[code] for code in arrivals.client.tolist()]


def _length_source(load: Bound) -> str:
    """Say where token counts come from."""
    if load.lengths is not None:
        return load.lengths.kind
    if isinstance(load, TraceArrivals):
        return "trace"
    return "clients" if isinstance(load, ClientMixture) and load.lengths_path is not None else "recorded"


def _from_file(scenario: Scenario, load: ArrivalFile, sequences: SequenceTable) -> OpenSource:
    """Bind rows by length, as kind ``csv`` asks for."""
    path = scenario.locate(load.path)
    rows = read_arrivals(path, load.requests if load.duration_s is None else None)
    columns = [np.array(column) for column in zip(*rows, strict=True)]
    whole = Arrivals(columns[0].astype(np.float64), columns[1], columns[2], provenance={"arrivals": "csv"})
    arrivals = whole.limited(load.requests, load.duration_s, load.rate_multiplier)
    kept = rows[: len(arrivals)]
    sequence = np.array(bind_rows(kept, sequences, path), dtype=np.int64)
    assert arrivals.prompt_tokens is not None
    assert arrivals.output_tokens is not None
    number = len(arrivals)
    recorded = np.array(sequences.output_tokens, dtype=np.int64)[sequence]
    bindings = Bindings(
        sequence,
        arrivals.prompt_tokens,
        arrivals.output_tokens,
        recorded,
        np.zeros(number, dtype=np.int64),
        np.full(number, math.inf),
    )
    return OpenSource(arrivals, bindings)
