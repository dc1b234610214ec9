"""Every stopping rule against a slow one written slot by slot from its description."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.traces.manifest import FractionOfVerify, LinearCost
from simulator.pricing.costs import DraftCost, DraftFraction, DraftPerRound, DraftPerStep, LinearStep, Prices
from simulator.rounds.protocols import Played, Round
from simulator.scenario.stopping import MovingAverage, Tier
from simulator.stopping import ByBatch, OracleCost, StoppingPolicy, ask
from simulator.stopping.budget import AdaptiveSteps, Budget
from simulator.stopping.confidence import AdaEDL, ConfidenceThreshold, SpecDecPP
from simulator.stopping.goodput import Goodput, PerRequest, expected_tokens
from simulator.stopping.lengths import Heuristic

SLOTS, CURSORS = 6, 400
VERIFY = LinearStep(LinearCost(base_s=0.006, per_token_s=0.0002, per_context_token_s=4e-8), "test")
DRAFT_STEP = LinearStep(LinearCost(base_s=0.001, per_token_s=0.0001, per_context_token_s=3e-7), "test")
PER_STEP = DraftPerStep(DRAFT_STEP)
DRAFTS: list[DraftCost] = [
    PER_STEP,
    DraftPerRound(DRAFT_STEP, tokens=True),
    DraftPerRound(DRAFT_STEP, tokens=False),
    DraftFraction(FractionOfVerify(fraction=0.2), "test"),
]


def prices_of(draft: DraftCost = PER_STEP, capture_sizes: tuple[int, ...] = ()) -> Prices:
    return Prices(VERIFY, VERIFY, draft, 0.001, capture_sizes)


@dataclass
class Felt:
    """Signals drawn at random, one row for each cursor."""

    rng: np.random.Generator
    estimated_steps: int = 0
    sure: np.ndarray = field(init=False)
    unsure: np.ndarray = field(init=False)
    good: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.sure, self.good = self.rng.uniform(0, 1, (2, CURSORS, 24))
        self.unsure = self.rng.uniform(0, 4, (CURSORS, 24))

    def confidence(self, cursor: np.ndarray, steps: int) -> np.ndarray:
        return self.sure[cursor, :steps]

    def entropy(self, cursor: np.ndarray, steps: int) -> np.ndarray:
        return self.unsure[cursor, :steps]

    def acceptance(self, cursor: np.ndarray, steps: int) -> np.ndarray:
        return self.good[cursor, :steps] ** 0.3


def a_round(rng: np.random.Generator, felt: Felt | None = None, prices: Prices | None = None, **given_: Any) -> Round:
    slots = rng.permutation(SLOTS)[: rng.integers(1, SLOTS + 1)]
    active = len(slots)
    values: dict[str, Any] = {
        "active": active,
        "slots": slots,
        "position": rng.integers(1, 50, active),
        "context": rng.integers(20, 900, active),
        "cursor": rng.integers(0, CURSORS, active),
        "now_s": 0.0,
        "prices": prices or prices_of(),
        "signals": felt,
    }
    return Round(**{**values, **given_})


def played(drafted: np.ndarray, proposed: np.ndarray, runs: np.ndarray) -> Played:
    drafted = np.minimum(drafted, proposed)
    accepted = np.minimum(runs, drafted)
    return Played(drafted, accepted, accepted + 1, 0.0, 0.0, 0.0)


class Reference:
    """A rule for one slot: `new` request, `choose` a length, `hear` what came of it."""

    def new(self) -> dict[str, float]:
        return {}

    def choose(self, state: dict[str, float], sure: list[float], unsure: list[float], good: list[float]) -> int:
        raise NotImplementedError

    def hear(self, state: dict[str, float], drafted: int, accepted: int) -> None:
        pass


class PlainHeuristic(Reference):
    def new(self) -> dict[str, float]:
        return {"k": 5}

    def choose(self, state: dict[str, float], *felt: list[float]) -> int:
        return int(state["k"])

    def hear(self, state: dict[str, float], drafted: int, accepted: int) -> None:
        if drafted:
            state["k"] = min(12, state["k"] + 2) if accepted == drafted else max(1, state["k"] - 1)


class PlainConfidence(Reference):
    def choose(self, state: dict[str, float], sure: list[float], unsure: list[float], good: list[float]) -> int:
        for step, probability in enumerate(sure[:9], start=1):
            if probability < 0.4:
                return step
        return 9


class PlainAdaEDL(Reference):
    def new(self) -> dict[str, float]:
        return {"threshold": 0.3, "rate": 0.0}

    def choose(self, state: dict[str, float], sure: list[float], unsure: list[float], good: list[float]) -> int:
        length = 0
        while length < 7:
            length += 1
            if 1 - math.sqrt(0.2 * unsure[length - 1]) < state["threshold"]:
                break
        return length

    def hear(self, state: dict[str, float], drafted: int, accepted: int) -> None:
        if not drafted:
            return
        state["rate"] = 0.5 * state["rate"] + 0.5 * accepted / drafted
        moved = state["threshold"]
        if state["rate"] < 0.4:
            moved += 0.05
        elif drafted < 7:
            moved -= 0.05
        state["threshold"] = 0.9 * state["threshold"] + 0.1 * moved


class PlainSpecDecPP(Reference):
    def choose(self, state: dict[str, float], sure: list[float], unsure: list[float], good: list[float]) -> int:
        all_accepted = 1.0
        for step in range(1, 10):
            all_accepted *= good[step - 1] ** 0.3
            if step >= 2 and 1 - all_accepted > 0.5:
                return step
        return 9


RULES: list[tuple[StoppingPolicy, Reference]] = [
    (Heuristic(5, 12, SLOTS), PlainHeuristic()),
    (ConfidenceThreshold(0.4, 9), PlainConfidence()),
    (AdaEDL(0.3, 0.2, 0.4, 0.05, (0.5, 0.9), 7, SLOTS), PlainAdaEDL()),
    (SpecDecPP(0.5, 2, 9), PlainSpecDecPP()),
]


@pytest.mark.parametrize(("policy", "reference"), RULES, ids=lambda rule: type(rule).__name__)
def test_rules_of_one_request_are_those_of_their_descriptions(policy: StoppingPolicy, reference: Reference) -> None:
    rng = np.random.default_rng(1)
    felt = Felt(rng)
    states = [reference.new() for _ in range(SLOTS)]
    policy.opened(np.arange(SLOTS))
    lengths = set()
    for _ in range(300):
        if rng.random() < 0.1:
            slot = int(rng.integers(SLOTS))
            states[slot] = reference.new()
            policy.opened(np.array([slot]))
        round_ = a_round(rng, felt)
        asked = policy.draft_tokens(round_)
        expected = [
            reference.choose(states[slot], *(list(t[cursor]) for t in (felt.sure, felt.unsure, felt.good)))
            for slot, cursor in zip(round_.slots.tolist(), round_.cursor.tolist(), strict=True)
        ]
        assert asked.tolist() == expected
        assert policy.longest_draft is not None
        assert max(expected) <= policy.longest_draft
        lengths |= set(expected)
        heard = played(asked, rng.integers(0, 12, round_.active), rng.integers(0, 7, round_.active))
        policy.observe(round_, heard)
        for slot, drafted, accepted in zip(round_.slots.tolist(), heard.drafted, heard.accepted, strict=True):
            reference.hear(states[slot], int(drafted), int(accepted))
    assert len(lengths) > 4


def test_a_table_by_batch_size_goes_on_with_its_last_entry() -> None:
    policy = ByBatch([(1, 2, 5), (3, 3, 2), (4, 4, 0)], 6)
    rng = np.random.default_rng(0)
    for active, expected in zip(range(1, 7), (5, 5, 2, 0, 0, 0), strict=True):
        round_ = a_round(rng, active=active)
        assert policy.draft_tokens(round_).tolist() == [expected] * active
    assert policy.longest_draft == 5


# --- SGLang


class PlainSteps:
    """From the description alone: move down as long as the average is low, else up as long as it is high."""

    def __init__(self, candidates: list[int], up: float, down: float, start: int) -> None:
        self.candidates, self.up, self.down = candidates, up, down
        self.now = start if start in candidates else candidates[len(candidates) // 2]
        self.average, self.count = self.now - 1.0, 0

    def hear(self, mean: float) -> None:
        self.average = 0.8 * self.average + 0.2 * mean if self.now else self.average
        self.count += 1
        if self.count <= 10 or (self.count - 10) % 5:
            return
        if self.now == 0:
            self.now = self.candidates[1] if len(self.candidates) > 1 else 0
            if self.now and self.average < 0:
                self.average = self.now - 1.0
            return
        lower = [
            c for c in self.candidates if c < self.now and self.average > (0.5 if c == 0 else c - 0.5) + self.down
        ]
        below = [c for c in self.candidates if c < self.now]
        if below and (not lower or max(lower) != max(below)):
            # every step down is taken in turn: stop above the first candidate that the average clears
            self.now = min([c for c in self.candidates if c <= self.now and c > max(lower, default=-1)])
            return
        while self.average > self.now - 0.5 + self.up and self.now != self.candidates[-1]:
            self.now = self.candidates[self.candidates.index(self.now) + 1]


@pytest.mark.parametrize("seed", range(6))
def test_adaptive_steps_follow_sglangs_rule(seed: int) -> None:
    rng = np.random.default_rng(seed)
    tiers = {"1": [1, 3, 5, 7], "3": [0, 1, 3], "5": [0]}
    policy = AdaptiveSteps(
        MovingAverage(
            policy="moving_average",
            tiers={
                "1": Tier(candidate_steps=(1, 3, 5, 7)),
                "3": Tier(candidate_steps=(0, 1, 3), down_hysteresis=0.0),
                "5": Tier(candidate_steps=(0,), down_hysteresis=0.0),
            },
        )
    )
    plain = {
        1: PlainSteps(tiers["1"], 0.0, -0.25, 3),
        3: PlainSteps(tiers["3"], 0.0, 0.0, 3),
        5: PlainSteps([0], 0.0, 0.0, 3),
    }
    seen = set()
    for number in range(900):
        level = (0.2, 2.0, 6.5)[number // 60 % 3]
        runs = rng.poisson(level, SLOTS)
        round_ = a_round(rng)
        tier = plain[max(size for size in plain if size <= round_.active)]
        asked = policy.draft_tokens(round_)
        assert asked.tolist() == [tier.now] * round_.active
        seen.add((tuple(tier.candidates), tier.now))
        heard = played(asked, np.full(round_.active, 99), runs[: round_.active])
        policy.observe(round_, heard)
        tier.hear(float(np.mean(heard.accepted)))
    assert {steps for candidates, steps in seen if candidates[-1] == 7} == {1, 3, 5, 7}
    assert {steps for candidates, steps in seen if candidates[-1] == 3} == {0, 1, 3}
    assert policy.longest_draft == 7


# --- Rules that price steps


def seconds_of(round_: Round, drafted: list[int]) -> float:
    """Price a round as the engine does: asked for nothing, the drafter does not run."""
    asked = np.array(drafted) if any(drafted) else None
    draft_s, verify_s = round_.prices.decode_s(asked, round_.context, int(round_.context.sum()))
    return draft_s + verify_s + round_.prices.overhead_s


@pytest.mark.parametrize("draft", DRAFTS, ids=lambda draft: type(draft).__name__)
@pytest.mark.parametrize("capture_sizes", [(), (4, 8, 24)])
def test_goodput_is_the_best_of_all_lengths(draft: DraftCost, capture_sizes: tuple[int, ...]) -> None:
    rng = np.random.default_rng(2)
    policy, own = Goodput(8, 0.7, 0.9, 0), PerRequest(8, 0.7, 0.9, SLOTS)
    accepted, compared = 0.7 * 5, 5.0
    per_slot = [[0.7 * 5, 5.0] for _ in range(SLOTS)]
    chosen = set()
    for _ in range(150):
        round_ = a_round(rng, prices=prices_of(draft, capture_sizes))
        step_s = [seconds_of(round_, [k] * round_.active) for k in range(9)]
        a = accepted / compared
        rates = [(1 - a ** (k + 1)) / (1 - a) / step_s[k] for k in range(9)]
        asked = policy.draft_tokens(round_)
        assert asked.tolist() == [rates.index(max(rates))] * round_.active
        mine = own.draft_tokens(round_)
        for slot, k in zip(round_.slots.tolist(), mine.tolist(), strict=True):
            a = per_slot[slot][0] / per_slot[slot][1]
            rates = [sum(a**i for i in range(j + 1)) / step_s[j] for j in range(9)]
            assert rates[k] == pytest.approx(max(rates))
        chosen |= set(mine.tolist())
        heard = played(asked, rng.integers(0, 9, round_.active), rng.integers(0, 7, round_.active))
        policy.observe(round_, heard)
        seen = [min(n + 1, d) for n, d in zip(heard.accepted.tolist(), heard.drafted.tolist(), strict=True)]
        if sum(seen):
            accepted, compared = 0.9 * accepted + int(heard.accepted.sum()), 0.9 * compared + sum(seen)
        heard = played(mine, np.full(round_.active, 99), rng.integers(0, 7, round_.active))
        own.observe(round_, heard)
        for slot, n, d in zip(round_.slots.tolist(), heard.accepted.tolist(), heard.drafted.tolist(), strict=True):
            before = per_slot[slot]
            per_slot[slot] = [0.9 * before[0] + 0.5 * 0.7 + n, 0.9 * before[1] + 0.5 + min(n + 1, d)]
        if rng.random() < 0.1:
            own.opened(np.array([2]))
            per_slot[2] = [0.7 * 5, 5.0]
    assert len(chosen) > 2
    assert round_.prices.extrapolated_iterations == 0


def test_expected_tokens_are_the_closed_form() -> None:
    a = np.array([0.1, 0.6, 0.95])
    k = np.arange(6)
    assert expected_tokens(a, 5) == pytest.approx((1 - a[:, None] ** (k + 1)) / (1 - a[:, None]))


def test_goodput_probes_when_it_is_told_to() -> None:
    dear = Prices(VERIFY, VERIFY, DraftPerStep(LinearStep(LinearCost(base_s=1.0), "test")), 0.0)
    rng = np.random.default_rng(0)
    never, sometimes = Goodput(4, 0.5, 0.9, 0), Goodput(4, 0.5, 0.9, 3)
    asked = [[int(p.draft_tokens(a_round(rng, prices=dear))[0]) for p in (never, sometimes)] for _ in range(8)]
    assert asked == [[0, 0], [0, 0], [0, 0], [0, 1]] * 2


@settings(max_examples=60)
@given(st.integers(0, 2**32), st.sampled_from(DRAFTS[:2]))
def test_the_oracle_by_cost_is_the_best_of_all_sets_of_lengths(seed: int, draft: DraftCost) -> None:
    rng = np.random.default_rng(seed)
    round_ = a_round(rng, prices=prices_of(draft))
    runs = rng.integers(0, 4, round_.active)
    # Contexts alike: then no slot is cheaper to draft for than another.
    round_.context = np.full(round_.active, 300)

    def rate(lengths: list[int]) -> float:
        return (round_.active + sum(lengths)) / seconds_of(round_, lengths)

    best = max(rate(list(lengths)) for lengths in itertools.product(*(range(n + 1) for n in runs.tolist())))
    asked = ask(OracleCost(), round_, runs)
    assert (asked <= runs).all()
    assert rate(asked.tolist()) == pytest.approx(best)


@settings(max_examples=60)
@given(st.integers(0, 2**32), st.booleans())
def test_a_given_budget_goes_to_the_largest_survival_probabilities(seed: int, confident: bool) -> None:
    rng = np.random.default_rng(seed)
    felt = Felt(rng)
    policy = Budget("confidence" if confident else "acceptance", 5, 0.7, 0.9, 1.7, SLOTS)
    for _ in range(4):
        round_ = a_round(rng, felt)
        policy.observe(
            round_,
            played(rng.integers(0, 6, round_.active), np.full(round_.active, 9), rng.integers(0, 7, round_.active)),
        )
    round_ = a_round(rng, felt)
    survival = policy.survival(round_)
    if confident:
        for i, cursor in enumerate(round_.cursor.tolist()):
            product = 1.0
            for j in range(5):
                product *= felt.good[cursor, j] ** 0.3
                assert survival[i, j] == pytest.approx(product)
    given_tokens = [0] * round_.active
    for _ in range(int(1.7 * round_.active)):  # token by token to the slot whose next one survives most probably
        next_ = [survival[i, n] if n < 5 else -1.0 for i, n in enumerate(given_tokens)]
        given_tokens[next_.index(max(next_))] += 1
    asked = policy.draft_tokens(round_)
    assert asked.sum() == sum(given_tokens)
    kept = [sorted(survival[i, :n].tolist()) for i, n in enumerate(asked.tolist())]
    expected = [sorted(survival[i, :n].tolist()) for i, n in enumerate(given_tokens)]
    assert sum(map(sum, kept)) == pytest.approx(sum(map(sum, expected)))
    assert policy.drafts_ahead == (5 if confident else None)


@settings(max_examples=40)
@given(st.integers(0, 2**32))
def test_the_budget_that_it_chooses_promises_most(seed: int) -> None:
    """Against all sets of prefixes, for confidence: everything is drafted, verification alone is chosen."""
    rng = np.random.default_rng(seed)
    felt = Felt(rng)
    policy = Budget("confidence", 3, 0.7, 0.9, None, SLOTS)
    round_ = a_round(rng, felt)
    survival = policy.survival(round_)
    whole = np.full(round_.active, 3)

    def rate(lengths: tuple[int, ...]) -> float:
        promised = round_.active + sum(survival[i, :n].sum() for i, n in enumerate(lengths))
        parts = round_.prices.partly_verified_s(whole, np.array(lengths), round_.context, int(round_.context.sum()))
        return float(promised / (sum(parts) + round_.prices.overhead_s))

    best = max(rate(lengths) for lengths in itertools.product(range(4), repeat=round_.active))
    assert rate(tuple(policy.draft_tokens(round_).tolist())) == pytest.approx(best)


def test_a_budget_by_acceptance_gives_more_to_requests_that_fare_better() -> None:
    policy = Budget("acceptance", 6, 0.7, 0.95, None, SLOTS)
    slots = np.arange(4)
    round_ = a_round(
        np.random.default_rng(0), active=4, slots=slots, context=np.full(4, 200), cursor=slots, position=slots
    )
    for _ in range(40):
        drafted = np.full(4, 4)
        accepted = np.array([4, 3, 1, 0])
        policy.observe(round_, Played(drafted, accepted, accepted + 1, 0.0, 0.0, 0.0))
    asked = policy.draft_tokens(round_).tolist()
    assert asked == sorted(asked, reverse=True)
    assert asked[0] > asked[-1]
