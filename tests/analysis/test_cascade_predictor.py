"""The quality predictor, its scores, and cells of its posteriors."""

from __future__ import annotations

import numpy as np
import pytest
from cascade_made import table_of
from sklearn.metrics import brier_score_loss, roc_auc_score

from analysis.cascade.predictor import KINDS, Kind, calibrate, crossfit, features, fit_predictor, split
from analysis.cascade.scores import calibration_error, error_by_chance, score
from analysis.cascade.table import fit_cells
from analysis.common.bootstrap import ClusterBootstrap
from analysis.common.records import from_json, to_json


def logistic_data(items: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two columns, chances of two stages that follow a logistic law in them, and draws."""
    rng = np.random.default_rng(seed)
    x = rng.normal([5.0, -2.0], [10.0, 0.1], size=(items, 2))
    z = (x - [5.0, -2.0]) / [10.0, 0.1]
    p = 1 / (1 + np.exp(-np.stack([1.5 * z[:, 0] - 0.5, z[:, 1] - z[:, 0]], axis=1)))
    return x, p, (rng.random(p.shape) < p).astype(float)


@pytest.mark.parametrize("kind", KINDS)
def test_chances_of_a_known_law_are_found(kind: Kind) -> None:
    x, p, y = logistic_data(3000)
    found = fit_predictor(("one", "two"), x[:2000], y[:2000], kind, 0)
    found = calibrate(found, found.logits(x[2000:2500]), y[2000:2500])
    assert np.abs(found(x[2500:]) - p[2500:]).mean() < 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_a_stage_that_is_always_right_has_nothing_to_learn(kind: Kind) -> None:
    x, _, y = logistic_data(200)
    y[:, 0] = 1
    chances = fit_predictor(("one", "two"), x, y, kind, 0)(x)
    assert np.ptp(chances[:, 0]) < 1e-9
    assert chances[0, 0] == pytest.approx(200.5 / 201)


@pytest.mark.parametrize("kind", KINDS)
def test_graded_correctness_is_predicted_as_its_mean(kind: Kind) -> None:
    x, p, _ = logistic_data(1000)
    chances = fit_predictor(("one", "two"), x, p, kind, 0)(x)
    assert np.abs(chances - p).mean() < 0.05


def test_without_a_column_the_rate_is_predicted() -> None:
    y = np.array([[1.0, 0], [1, 0], [0, 0], [1, 1]])
    chances = fit_predictor((), np.empty((4, 0)), y, "logistic", 0)(np.empty((2, 0)))
    assert chances == pytest.approx(np.array([[3.5 / 5, 1.5 / 5]] * 2))


def test_calibration_never_turns_the_order() -> None:
    """Logits that point the wrong way on the calibration items are flattened, not turned."""
    x, _, y = logistic_data(300)
    found = fit_predictor(("one", "two"), x, y, "logistic", 0)
    turned = calibrate(found, -found.logits(x), y)
    assert turned.slope == (0.0, 0.0)
    assert turned(x).mean(axis=0) == pytest.approx(y.mean(axis=0), abs=0.01)


def test_a_written_predictor_predicts_the_same() -> None:
    x, _, y = logistic_data(100)
    x[3, 0] = np.nan
    found = fit_predictor(("one", "two"), x, y, "network", 0)
    np.testing.assert_array_equal(from_json(type(found), to_json(found), "here")(x), found(x))


def test_columns_hold_only_what_has_been_seen() -> None:
    some = np.array([[0.1, 0.2], [np.nan, 0.4]])
    table = table_of(
        np.eye(2),
        (1, 2),
        {"confidence": some, "margin": np.array([[np.nan, 1.0], [np.nan, 2.0]])},
        {"item_n": np.ones(2)},
    )
    assert features(table, (), known_domain=False)[0] == ("item_n",)
    assert features(table, (), known_domain=True)[0] == ("item_n", "domain=a", "domain=b")
    names, values = features(table, (0,), known_domain=False)
    assert names == ("item_n", "stage-0.confidence", "stage-0.confidence missing")
    assert values[:, 2].tolist() == [0, 1]
    assert features(table, (1,), known_domain=False)[0] == ("item_n", "stage-1.confidence", "stage-1.margin")


def test_nobody_is_judged_by_what_has_seen_him() -> None:
    """A column that names each item predicts nothing out of fold, however well it could be learned by heart."""
    rng = np.random.default_rng(0)
    y = (rng.random((120, 2)) < 0.5).astype(float)
    signals = {f"s{k}": rng.normal(size=(120, 2)) for k in range(40)}
    folds = crossfit(table_of(y, (1, 2), signals), [(), (0,)], 0, known_domain=False)
    assert sorted(np.concatenate([fold.held for fold in folds]).tolist()) == list(range(120))
    unseen = [roc_auc_score(y[fold.held, 0], fold.unseen[(0,)][:, 0]) for fold in folds]
    assert abs(np.mean(unseen) - 0.5) < 0.15
    trained = [roc_auc_score(y[fold.train, 0], fold.trained[(0,)][:, 0]) for fold in folds]
    assert abs(np.mean(trained) - 0.5) < 0.1


def test_folds_share_every_domain_out_evenly() -> None:
    domains = ["a"] * 23 + ["b"] * 10
    place = split(domains, 5, np.random.default_rng(0))
    assert np.bincount(place[:23]).tolist() in ([5, 5, 5, 4, 4],)
    assert np.bincount(place[23:]).tolist() == [2] * 5


def test_scores_are_those_of_scikit_learn() -> None:
    _, p, y = logistic_data(500)
    p, y = p[:, 0].round(2), y[:, 0]
    bootstrap = ClusterBootstrap(["a"] * 500, np.random.default_rng(0), draws=300)
    found = score("13B", 1, p, np.full(500, 0.4), y, np.zeros(500, dtype=int), bootstrap)
    assert found.brier.value == pytest.approx(brier_score_loss(y, p), rel=1e-5)
    assert found.brier_base.value == pytest.approx(((y - 0.4) ** 2).mean(), rel=1e-5)
    assert found.skill.value == pytest.approx(1 - brier_score_loss(y, p) / ((y - 0.4) ** 2).mean(), rel=1e-4)
    assert found.auroc.value == pytest.approx(roc_auc_score(y, p), abs=1e-5)
    assert found.auroc.low is not None
    assert found.auroc.high is not None
    assert 0.005 < found.auroc.high - found.auroc.low < 0.15
    assert found.ece_chance_low <= found.ece <= found.ece_chance_high
    for one in found.reliability:
        assert one.observed.low is not None
        assert one.observed.high is not None
    inside = [(b.observed.low or 0) <= b.predicted <= (b.observed.high or 1) for b in found.reliability]
    assert sum(inside) >= 8


def test_auroc_compares_within_folds_alone() -> None:
    """Two folds, the scores of one shifted by a lot: the mean of the two AUROCs, as their pairs weigh."""
    _, p, y = logistic_data(400)
    p, y, fold = p[:, 0], y[:, 0], np.arange(400) % 2
    shifted = np.where(fold == 1, p / 10, p)
    bootstrap = ClusterBootstrap(["a"] * 400, np.random.default_rng(0), draws=200)
    found = score("13B", 1, shifted, np.full(400, 0.4), y, fold, bootstrap).auroc
    parts = [
        (y[fold == k].sum() * (1 - y[fold == k]).sum(), roc_auc_score(y[fold == k], p[fold == k])) for k in (0, 1)
    ]
    assert found.value == pytest.approx(sum(n * a for n, a in parts) / sum(n for n, _ in parts), abs=1e-5)


def test_intervals_of_auroc_are_as_wide_as_those_of_a_full_bootstrap() -> None:
    _, p, y = logistic_data(200)
    p, y = p[:, 0], y[:, 0]
    rng = np.random.default_rng(1)
    draws = [roc_auc_score(y[rows], p[rows]) for rows in (rng.integers(0, 200, 200) for _ in range(400))]
    bootstrap = ClusterBootstrap(["a"] * 200, np.random.default_rng(0), draws=800)
    found = score("13B", 1, p, np.full(200, 0.4), y, np.zeros(200, dtype=int), bootstrap).auroc
    assert found.low is not None
    assert found.high is not None
    low, high = np.quantile(draws, [0.025, 0.975])
    assert found.high - found.low == pytest.approx(high - low, rel=0.15)


def test_calibration_error_of_a_constant_shift() -> None:
    """Predictions of 0.6 for outcomes of 0.5: the error is 0.1, and chance explains it at 1,000 items no more."""
    p, y = np.full(1000, 0.6), np.tile([0.0, 1.0], 500)
    assert calibration_error(p, y) == pytest.approx(0.1)
    low, high = error_by_chance(p, np.random.default_rng(0))
    assert 0 <= low < high < 0.05


def test_cells_are_quantiles_that_hold_enough() -> None:
    rng = np.random.default_rng(0)
    points = rng.random((400, 3)) * [1.0, 0.3, 0.1]
    cells = fit_cells(points, 25)
    counts = np.bincount(cells.find(points), minlength=cells.count)
    assert cells.count == 16
    assert counts.min() >= 25
    assert cells.splits[0].coordinate == 0
    assert cells.splits[0].threshold == pytest.approx(np.median(points[:, 0]))


def test_ties_stay_in_one_cell() -> None:
    points = np.repeat([[0.1], [0.5], [0.9]], [60, 10, 60], axis=0)
    cells = fit_cells(points, 20)
    found = cells.find(points)
    assert cells.count == 2
    assert len(set(found[:60].tolist())) == len(set(found[60:70].tolist())) == 1
    assert fit_cells(np.full((100, 2), 0.3), 10).count == 1
    assert fit_cells(np.empty((100, 0)), 10).count == 1
