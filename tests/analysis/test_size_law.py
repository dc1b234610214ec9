"""Acceptance carried from families with many sizes to a pair with one, and the band that leaves."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit, logit
from shared_data import shared_data

from analysis.laws import fit_form
from analysis.size.facts import ANCHORS, FAMILIES, UNPLACED, SizedPair
from analysis.size.law import LawCurves, acceptance_draws, carried_over, check_bands, measured_laws, public_laws

SHARES = np.array([0.0007, 0.005, 0.02, 0.1, 0.5])
ANCHOR = SizedPair("big", "small", 70e9, 7e9, "chat", 0.8, "made up", "quoted")


def band(laws: dict[str, tuple[LawCurves, ...]], shares: np.ndarray = SHARES) -> np.ndarray:
    draws, _ = acceptance_draws(laws, [ANCHOR], shares, 400, np.random.default_rng(1))
    return np.quantile(draws, [0.025, 0.975], axis=0)


def test_the_odds_and_the_misses_of_the_anchor_change_by_the_factor_of_the_family() -> None:
    curve, at = np.array([0.4, 0.6]), np.array([0.5])
    odds = carried_over(curve, at, 0.8, "odds")
    assert odds / (1 - odds) == pytest.approx(4 * np.array([2 / 3, 3 / 2]))
    misses = carried_over(curve, at, 0.8, "misses")
    assert 1 - misses == pytest.approx(0.2 * np.array([1.2, 0.8]))


@pytest.mark.parametrize("way", ["odds", "misses"])
def test_the_anchor_keeps_its_acceptance(way: str) -> None:
    assert carried_over(np.array([0.37]), np.array([0.37]), 0.83, way) == pytest.approx([0.83])


def test_a_known_law_comes_back() -> None:
    """One family, logit-linear in size: its form and the odds carry it over without any error."""
    x = np.geomspace(0.001, 0.3, 6)
    curve = fit_form("logit", x, expit(1.5 + 0.4 * np.log(x / 0.1)), scale=1.0)
    draws, _ = acceptance_draws(
        {"v": (LawCurves("f", "logit", (curve,)),)}, [ANCHOR], SHARES, 200, np.random.default_rng(0)
    )
    truth = expit(logit(0.8) + 0.4 * np.log(SHARES / 0.1))
    closest = np.abs(draws - truth).max(axis=1)
    assert (closest < 1e-6).mean() == pytest.approx(0.5, abs=0.12)  # the other half carries the misses over
    assert np.allclose(draws[:, 3], 0.8)


def test_the_band_is_narrowest_at_the_anchor_and_widens_away_from_it() -> None:
    low, high = band(public_laws(np.random.default_rng(0)))
    width = logit(high) - logit(low)
    assert width[3] < 0.01
    assert (np.diff(width[:4]) < 0).all()
    assert width[4] > 10 * width[3]
    assert width[0] > 1.5 * width[2]


def test_more_families_that_disagree_widen_the_band() -> None:
    laws = public_laws(np.random.default_rng(0))
    one = {"LaMDA 137B": tuple(law for law in laws["LaMDA 137B"] if law.form == "logit")}
    (low, high), (all_low, all_high) = band(one), band(laws)
    assert all_high[0] - all_low[0] > 1.2 * (high[0] - low[0])


def test_a_family_that_follows_the_law_of_another_lies_within_its_band() -> None:
    """Two made-up verifiers whose misses fall by one power of size; then one whose acceptance falls with size."""

    def members(verifier: str, misses: float, power: float) -> list[SizedPair]:
        return [
            SizedPair(verifier, f"{s}", 1.0, s, "t", 1 - misses * (s / 0.1) ** -power, "made up", "quoted")
            for s in (0.004, 0.02, 0.1)
        ]

    alike = [*members("a", 0.3, 0.1), *members("b", 0.4, 0.1)]
    checks = check_bands(public_laws(np.random.default_rng(0), alike), alike, 300, np.random.default_rng(1))
    assert [c.family for c in checks] == ["a, t", "b, t"]
    assert all(c.inside for c in checks)
    assert checks[0].measured == pytest.approx(1 - 0.3 * 25**0.1, abs=1e-5)
    unlike = [*members("a", 0.3, 0.1), *members("b", 0.4, -0.1)]
    checks = check_bands(public_laws(np.random.default_rng(0), unlike), unlike, 300, np.random.default_rng(1))
    assert not any(c.inside for c in checks)


def test_acceptance_grows_with_size_in_every_public_family() -> None:
    for name in {p.family for p in FAMILIES}:
        members = sorted((p for p in FAMILIES if p.family == name), key=lambda p: p.share)
        assert len(members) == 3
        rates = [p.acceptance for p in members]
        assert rates == sorted(rates)


def test_a_measured_family_keeps_the_forms_that_it_cannot_tell_apart_and_says_so() -> None:
    x = np.geomspace(0.01, 0.2, 6)
    rates = 0.2 + 0.05 * np.log(x / 0.01)
    rng = np.random.default_rng(5)
    laws, said = measured_laws("own", x, rates, rates + rng.normal(0, 0.01, (5, 6)))
    assert "log-linear" in {law.form for law in laws}
    assert all(len(law.curves) == 6 for law in laws)
    assert "interpolation" in said
    few, said = measured_laws("own", x[:3], rates[:3], rates[None, :3])
    assert {law.form for law in few} == {"log-linear", "power", "logit"}
    assert "too few" in said


def test_facts_agree_with_the_public_tables() -> None:
    import csv

    with shared_data("apertus-70b", "cells.dev.csv").open() as file:
        rows = [r for r in csv.DictReader(file) if r["variant"] == "draft-n3-tp4"]
    for task, workload in (("code", "code"), ("open chat", "open_chat")):
        lengths = [float(r["mean_acceptance_length"]) for r in rows if r["workload"] == workload]
        (fact,) = [a for a in ANCHORS if a.verifier == "Apertus-70B" and a.task == task]
        a = fact.acceptance
        assert 1 + a + a**2 + a**3 == pytest.approx(np.mean(lengths), abs=0.002)
    with shared_data("sequoia-70b-logs", "recovered_acceptance_vectors.csv").open() as file:
        first = next(r for r in csv.DictReader(file) if r["source_file"] == "7b_70b_offloading.log")
    assert float(first["p_accept_at_rank"]) == ANCHORS[0].acceptance


def test_a_length_without_its_draft_length_bounds_the_rate() -> None:
    for fact in UNPLACED:
        endless = 1 / (1 - fact.least_rate)
        assert endless == pytest.approx(fact.tokens)
