"""The shared shape: checks of arguments, the residual, drawing, and the package's shop window."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from enumeration import chi_square_p_value

import calibration.verification as verification
from calibration.common.errors import CalibrationError
from calibration.verification import Law, Naive, Recursive, TokenLevel, Verdict, residual, total_variation
from calibration.verification.common import draw

HALF = [0.5, 0.5]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: TokenLevel().law([[0.5, 0.5]], HALF, [0]),
            r"TokenLevel.law: p must .* shape \[V\], got shape \(1, 2\)",
        ),
        (lambda: TokenLevel().law([], HALF, [0]), r"p must be one distribution of shape \[V\], got shape \(0,\)"),
        (lambda: TokenLevel().law(HALF, [0.5, -0.1], [0]), "q must not be negative, got -0.1 at token 1"),
        (lambda: TokenLevel().law(HALF, [0.5, np.nan], [0]), "q must be finite, got nan at token 1"),
        (lambda: TokenLevel().law([0.5, 0.4], HALF, [0]), "p must sum to 1 within 0.0001, got 0.9"),
        (lambda: TokenLevel().law(HALF, [0.5, 0.25, 0.25], [0]), "share a vocabulary, got 2 and 3 tokens"),
        (lambda: TokenLevel().law(HALF, HALF, [2]), "drafts must lie in a vocabulary of 2 tokens, got 2"),
        (lambda: TokenLevel().law(HALF, HALF, [-1]), "drafts must lie in a vocabulary of 2 tokens, got -1"),
        (lambda: TokenLevel().law(HALF, [0.0, 1.0], [0]), "drafts must have q > 0, got token 0 with q = 0"),
        (lambda: TokenLevel().law(HALF, HALF, []), r"drafts must be token ids of shape \[k\], k >= 1, got \[\]"),
        (lambda: TokenLevel().law(HALF, HALF, [0.5]), r"drafts must be token ids .* got \[0.5\]"),
        (lambda: TokenLevel().law(HALF, HALF, [0, 1]), "k must be 1, this rule verifies a single draft, got 2"),
        (lambda: Naive().acceptance(HALF, HALF, 0), "Naive.acceptance: k must be a whole number .* got 0"),
        (lambda: Naive().acceptance(HALF, HALF, True), "k must be a whole number of drafts >= 1, got True"),
        (lambda: Recursive("top"), "Recursive: drafting must be one of iid, without_replacement, got 'top'"),
        (lambda: Naive("all"), "Naive: drafting must be one of iid, without_replacement, top, got 'all'"),  # type: ignore[arg-type]
    ],
)
def test_mistakes_are_named(call: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        call()


def test_float32_rounding_is_forgiven_and_normalised() -> None:
    rng = np.random.default_rng(0)
    p = np.exp(rng.normal(size=50_000)).astype(np.float32)
    p = (p / p.sum() * np.float32(1.00002)).astype(np.float32)
    assert TokenLevel().law(p, p, [3]).tokens.sum() == pytest.approx(1.0, abs=1e-12)


def test_residual_in_closed_form() -> None:
    p, q = np.array([0.5, 0.5, 0.0]), np.array([0.25, 0.25, 0.5])
    assert residual(p, q).tolist() == [0.5, 0.5, 0.0]
    assert residual(q, p).tolist() == [0.0, 0.0, 1.0]
    assert residual(p, p).tolist() == p.tolist()
    assert total_variation(p, q) == 0.5


def test_law_puts_its_parts_together() -> None:
    law = Law(np.array([2, 0]), np.array([0.5, 0.25]), np.array([0.0, 0.4, 0.6]))
    assert law.acceptance == 0.75
    assert law.tokens == pytest.approx([0.25, 0.1, 0.65])
    rng = np.random.default_rng(1)
    verdicts = [law.sample(rng) for _ in range(8000)]
    counts = [sum(v.accepted_index == index for v in verdicts) for index in (0, 1, None)]
    assert chi_square_p_value(np.array(counts), np.array([0.5, 0.25, 0.25])) > 1e-3
    assert all(v.token == (2, 0)[v.accepted_index] for v in verdicts if v.accepted_index is not None)
    assert Verdict(2, 0).accepted
    assert not Verdict(2, None).accepted


def test_draw_never_gives_an_impossible_token() -> None:
    class Edge:
        """A generator at either end of its range."""

        def __init__(self, value: float) -> None:
            self.value = value

        def random(self) -> float:
            return self.value

    p = np.array([0.0, 0.3, 0.0, 0.7, 0.0])
    assert draw(p, Edge(0.0)) == 1  # type: ignore[arg-type]
    assert draw(p, Edge(1.0)) == 3  # type: ignore[arg-type]
    rng = np.random.default_rng(2)
    counts = np.bincount([draw(p, rng) for _ in range(3000)], minlength=5)
    assert chi_square_p_value(counts, p) > 1e-3


def test_rules_leave_their_arguments_alone() -> None:
    p, q = np.array([0.7, 0.2, 0.1]), np.array([0.1, 0.2, 0.7])
    kept = p.copy(), q.copy()
    for rule in (Naive("top"), Recursive(), Recursive("iid")):
        rule.law(p, q, [2, 1]).tokens.sum()
        rule.acceptance(p, q, 2)
    assert p.tolist() == kept[0].tolist()
    assert q.tolist() == kept[1].tolist()


def test_shop_window_is_sorted_and_complete() -> None:
    assert list(verification.__all__) == sorted(verification.__all__)
    for name in set(verification.__all__) - {"Drafting", "NextToken"}:  # aliases of types
        assert getattr(verification, name).__doc__, name
    folder = Path(verification.__file__).parent
    for file in (*folder.glob("*.py"), *folder.glob("*/__init__.py")):
        place = ".".join(("calibration.verification", *file.relative_to(folder).with_suffix("").parts))
        module = import_module(place.removesuffix(".__init__"))
        assert set(getattr(module, "__all__", [])) <= set(verification.__all__), place


def test_importing_needs_neither_torch_nor_scipy() -> None:
    code = "import sys, calibration.verification as v; print([m for m in ('torch', 'scipy') if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"
