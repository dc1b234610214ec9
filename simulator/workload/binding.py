"""Binding: which recorded sequence each request replays, with which lengths, and in which service class."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from calibration.common.arrays import Floats, Ints
from calibration.common.errors import ScenarioError, did_you_mean
from simulator.playback.replay import SequenceTable
from simulator.scenario.workload import Bound, Order, ServiceClass
from simulator.workload.lengths import CLASSES, MIX, ORDER, make_lengths, stream


def serving_order(number: int, order: Order, rng: np.random.Generator) -> Iterator[int]:
    """Give 0 .. number-1 forever: pass after pass in trace order, or each pass newly shuffled."""
    while True:
        yield from range(number) if order == "trace" else rng.permutation(number).tolist()


class Turns:
    """Chooses sequences: those of a domain, or all of them, take turns; `mix` draws domains by their weights."""

    def __init__(self, sequences: SequenceTable, order: Order, mix: Mapping[str, float] | None, seed: int) -> None:
        self._sequences, self._order, self._seed = sequences, order, seed
        self._turns: dict[str | None, Iterator[int]] = {}
        self._mix_rng = stream(seed, MIX)
        self._names = tuple(mix or ())
        weights = np.array([(mix or {})[name] for name in self._names])
        self._cumulated = np.cumsum(weights) / weights.sum() if mix else weights
        for name, weight in (mix or {}).items():
            if weight > 0:
                self._of(name, "workload.mix")

    def take(self, number: int, domains: Sequence[str | None] | None = None) -> Ints:
        """Give the next `number` sequences; `domains` says which domain each must have, None where any will do."""
        wanted: list[str | None] = [None] * number
        if self._names:
            drawn = np.searchsorted(self._cumulated, self._mix_rng.random(number), side="right")
            wanted = [self._names[i] for i in drawn.tolist()]
        if domains is not None:
            wanted = [mixed if own is None else own for own, mixed in zip(domains, wanted, strict=True)]
        kinds = dict.fromkeys(wanted)
        if len(kinds) == 1:
            return self._next(wanted[0], number)
        chosen = np.zeros(number, dtype=np.int64)
        for domain in kinds:
            places = [k for k, name in enumerate(wanted) if name == domain]
            chosen[places] = self._next(domain, len(places))
        return chosen

    def _next(self, domain: str | None, number: int) -> Ints:
        return np.fromiter(itertools.islice(self._of(domain, "workload.client_domains"), number), np.int64, number)

    def _of(self, domain: str | None, place: str) -> Iterator[int]:
        """Give the endless turns of one domain, or of all sequences (None)."""
        if domain not in self._turns:
            names = self._sequences.domains
            own = [i for i, name in enumerate(names) if domain is None or name == domain]
            if domain is not None and not own:
                raise ScenarioError(
                    f"{place}: no sequence of it is served, got '{domain}'{did_you_mean(domain, names)}"
                )
            rng = stream(self._seed, ORDER) if domain is None else stream(self._seed, ORDER, domain)
            self._turns[domain] = map(own.__getitem__, serving_order(len(own), self._order, rng))
        return self._turns[domain]


@dataclass(frozen=True)
class Bindings:
    """Columns with an entry per request. `deadline_s` counts from the arrival; infinite where there is none."""

    sequence: Ints
    prompt_tokens: Ints
    output_tokens: Ints
    recorded_tokens: Ints
    """Output tokens recorded of its sequence."""
    priority: Ints
    deadline_s: Floats

    @property
    def resampled_tokens(self) -> Ints:
        """Output tokens beyond the recording."""
        beyond: Ints = np.maximum(self.output_tokens - self.recorded_tokens, 0)
        return beyond

    @property
    def truncated(self) -> int:
        """Requests that replay only the beginning of their sequence."""
        return int(np.count_nonzero(self.output_tokens < self.recorded_tokens))


class Binder:
    """Binds requests in the order of their ids; binding twice 5 gives the same as once 10."""

    def __init__(
        self, load: Bound, order: Order, sequences: SequenceTable, seed: int, locate: Callable[[str], Path]
    ) -> None:
        self._turns = Turns(sequences, order, load.mix, seed)
        self._prompt, self._output = (
            np.array(column, dtype=np.int64) for column in (sequences.prompt_tokens, sequences.output_tokens)
        )
        self._lengths = None if load.lengths is None else make_lengths(load.lengths, locate, seed)
        self._classes = None if load.classes is None else _Classes(load.classes, seed)

    def bind(
        self,
        number: int,
        *,
        prompt_tokens: Ints | None = None,
        output_tokens: Ints | None = None,
        domains: Sequence[str | None] | None = None,
    ) -> Bindings:
        """Bind the next `number` requests; lengths that come with the arrivals give way to the scenario's own."""
        sequence = self._turns.take(number, domains)
        prompt, output = prompt_tokens, output_tokens
        if self._lengths is not None:
            prompt, output = self._lengths[0](number), self._lengths[1](number)
        recorded = self._output[sequence]
        priority, deadline = np.zeros(number, dtype=np.int64), np.full(number, math.inf)
        if self._classes is not None:
            priority, deadline = self._classes.draw(number)
        return Bindings(
            sequence,
            self._prompt[sequence] if prompt is None else prompt,
            recorded if output is None else output,
            recorded,
            priority,
            deadline,
        )


class _Classes:
    """Draws service classes by their weights."""

    def __init__(self, classes: Mapping[str, ServiceClass], seed: int) -> None:
        several = list(classes.values())
        weights = np.array([one.weight for one in several])
        self._cumulated = np.cumsum(weights) / weights.sum()
        self._priority = np.array([one.priority for one in several], dtype=np.int64)
        self._deadline = np.array([math.inf if one.deadline_s is None else one.deadline_s for one in several])
        self._rng = stream(seed, CLASSES)

    def draw(self, number: int) -> tuple[Ints, Floats]:
        """Give (priority, deadline in seconds after arrival) of the next requests."""
        index = np.searchsorted(self._cumulated, self._rng.random(number), side="right")
        return self._priority[index], self._deadline[index]
