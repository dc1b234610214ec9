"""The built-in items: twelve domains, written for this package, the same ones for the same seed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from calibration.common.errors import CalibrationError
from calibration.grading.arithmetic import WRONG, arithmetic_items
from calibration.grading.items import Item

_FACTS = Path(__file__).resolve().parent / "facts.txt"
PER_ARITHMETIC_DOMAIN = 60


def builtin_items(seed: int = 0, per_arithmetic_domain: int = PER_ARITHMETIC_DOMAIN) -> tuple[Item, ...]:
    """Give the built-in items, four options each: six domains of arithmetic drawn from `seed`, six of knowledge.

    `seed` draws the arithmetic, the wrong answers that a list of facts leaves open, and the order of options.
    """
    generator = np.random.default_rng(seed)
    return (*arithmetic_items(per_arithmetic_domain, generator), *_facts(_FACTS.read_text("utf-8"), generator))


def _facts(text: str, generator: np.random.Generator) -> Iterator[Item]:
    """Give the items of a list of facts (the format stands at its top)."""
    sections: dict[str, list[tuple[str, str, list[str]]]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("["):
            rows = sections.setdefault(line.strip("[] "), [])
        elif line and not line.startswith("#"):
            parts = [part.strip() for part in line.split("|")]
            if len(parts) != 3:
                raise CalibrationError(f"facts: line {number}: must be question | right | wrong; wrong, got {line}")
            rows.append((parts[0], parts[1], [wrong.strip() for wrong in parts[2].split(";") if wrong.strip()]))
    for domain, rows in sections.items():
        drawn = sorted({right for _, right, wrong in rows if not wrong})
        for index, (question, right, given) in enumerate(rows, 1):
            others = [other for other in drawn if other != right and other.lower() not in question.lower().split()]
            wrong = given or [others[i] for i in generator.choice(len(others), WRONG, replace=False)]
            options = [right, *wrong]
            shuffled = tuple(options[i] for i in generator.permutation(len(options)))
            yield Item(f"{domain}-{index:03d}", domain, question, shuffled, right)
