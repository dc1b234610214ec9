"""Studies of worlds whose truth is known: where nothing pays hardly any says so, and a true winner is found.

Each study is drawn whole and goes the way of a real one: runs of six drafters at six draft lengths, bounds, answer,
headline and advice. Requests differ in length, in how well each drafter does on them, and in noise that the lengths
of a drafter share.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from drawn import clustered
from numpy.random import Generator

from analysis import Findings, StudySettings, study
from analysis.common.bootstrap import ClusterBootstrap
from analysis.speedup.grid import CellRun
from analysis.speedup.speedup import best_length, compare_lengths, crossovers, schedules
from analysis.speedup.study import _answer
from reports.questions.answer import study_guidelines, verdict

DRAFTERS = tuple("abcdef")
LENGTHS = (1, 2, 3, 4, 6, 8)
REQUESTS = 72
DOMAINS = [f"domain-{i % 3}" for i in range(REQUESTS)]
STUDIES = 120
DRAWS = 300


def drawn_runs(rng: Generator, speedup: dict[str, float]) -> list[CellRun]:
    """One study: plain decoding, and runs whose expected time is that over the true speed-up of their drafter."""

    def run(drafter: str, length: int, seconds: np.ndarray) -> CellRun:
        tokens, rounds = 100 * size, 50 * size
        times = (0.0, 0.0, 1.0, 0.0, 0.0)
        return CellRun(drafter, length, 1, tokens, seconds, rounds, *times, warnings=())

    size = rng.lognormal(0, 0.3, REQUESTS)
    runs = [run("a", 0, size)]
    for drafter in DRAFTERS:
        shared = rng.normal(0, 0.2, REQUESTS)
        for length in LENGTHS:
            noise = shared + rng.normal(0, 0.25, REQUESTS)
            runs.append(run(drafter, length, size * np.exp(noise - (0.2**2 + 0.25**2) / 2) / speedup[drafter]))
    return runs


@pytest.fixture(scope="module")
def template() -> Findings:
    """A small study of these drafters, to take the place of everything that the text does not depend on."""
    traces = clustered(np.random.default_rng(1), sequences=6, tokens=12, drafters=DRAFTERS)
    settings = StudySettings(draft_tokens=LENGTHS, batches=(1,), draws=100)
    return study(traces, settings=settings, workers=1)


def answered(template: Findings, rng: Generator, speedup: dict[str, float]) -> Findings:
    """What a study of a drawn world finds."""
    shared = ClusterBootstrap(DOMAINS, rng, draws=DRAWS)
    compared = compare_lengths(
        drawn_runs(rng, speedup), dict.fromkeys(DRAFTERS, "a"), shared, (None, *shared.domains)
    )
    best = [best_length(lengths) for lengths in compared]
    cells = tuple(cell for lengths in compared for cell in lengths.cells)
    crossing = crossovers(best)
    return dataclasses.replace(
        template,
        speedup=cells,
        best=tuple(best),
        crossovers=tuple(crossing),
        schedules=tuple(schedules(best, cells)),
        answer=_answer(best, crossing),
    )


def says_pays(found: Findings) -> bool:
    """Whether anything that a reader sees of the study says that something pays; all say the same."""
    advice = " ".join(one.text for one in study_guidelines(found))
    pooled = " pays at " in verdict(found)
    assert pooled == found.answer.headline.pays == bool(found.answer.paying)
    assert pooled == advice.startswith("Speculate with ")
    assert pooled == any(cell.pays for cell in found.speedup if cell.domain is None)
    return pooled or bool(found.answer.paying_domains)


def test_where_nothing_pays_at_most_one_study_in_twenty_says_so(template: Findings) -> None:
    """Every true speed-up is 1, the hardest case; an interval of a fixed choice says "pays" in a third of these."""
    rng = np.random.default_rng(20)
    wrong = fixed_choice = 0
    for _ in range(STUDIES):
        found = answered(template, rng, dict.fromkeys(DRAFTERS, 1.0))
        wrong += says_pays(found)
        top = max((c for c in found.speedup if c.domain is None), key=lambda cell: cell.speedup.value or 0)
        fixed_choice += (top.speedup.low or 0) > 1
    # 5% of 120 studies and three binomial standard errors: 6 + 3 * 2.4.
    assert wrong <= 13
    assert fixed_choice > 0.2 * STUDIES


def test_drafters_that_cost_time_are_not_said_to_pay(template: Findings) -> None:
    rng = np.random.default_rng(21)
    worse = dict(zip(DRAFTERS, (0.95, 0.9, 0.85, 0.8, 0.7, 0.6), strict=True))
    found = [answered(template, rng, worse) for _ in range(STUDIES // 4)]
    assert not any(says_pays(one) for one in found)
    last = [row for one in found for row in one.best if row.drafter == "f" and row.domain is None]
    assert all(row.loses for row in last)


def test_one_true_winner_is_found(template: Findings) -> None:
    """One drafter of six gains 1.25x: found, and named, in all of these studies (power near 1 at 72 requests)."""
    rng = np.random.default_rng(22)
    world = dict.fromkeys(DRAFTERS, 0.9) | {"c": 1.25}
    found = [answered(template, rng, world) for _ in range(STUDIES // 3)]
    right = sum(one.answer.headline.drafter == "c" and one.answer.headline.pays for one in found)
    assert right >= 0.8 * len(found)
    assert all(says_pays(one) for one in found if one.answer.headline.pays)


def test_a_small_gain_is_found_less_often_and_never_overstated(template: Findings) -> None:
    """1.10x: found in about half of the studies; lower bounds above the truth stay rare."""
    rng = np.random.default_rng(23)
    world = dict.fromkeys(DRAFTERS, 0.9) | {"c": 1.1}
    found = [answered(template, rng, world) for _ in range(STUDIES // 3)]
    rows = [row for one in found for row in one.best if row.drafter == "c" and row.domain is None]
    assert 0.1 <= np.mean([row.pays for row in rows]) <= 0.95
    assert sum((row.simultaneous.low or 0) > 1.1 for row in rows) <= 3
