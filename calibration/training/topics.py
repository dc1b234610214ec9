"""Training prompts: templates with slots, expanded in a seeded order. No torch needed.

They are written apart from the bundled calibration prompts, which stay held out for evaluation.
"""

from __future__ import annotations

import itertools
import string
import tomllib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from calibration.common.errors import CalibrationError, did_you_mean
from calibration.prompts import Prompt

TRAINING_DOMAINS = ("chat", "code", "mathematics", "science", "creative")
"""Domains that have training prompts, in the order of generation."""

_FOLDER = Path(__file__).resolve().parent / "topics"


def training_prompts(domain: str, count: int, seed: int = 0) -> tuple[Prompt, ...]:
    """Give `count` different training prompts of `domain`, drawn without replacement; the same for the same seed.

    A longer list begins with the shorter one of the same seed. `CalibrationError` for an unknown domain or where
    there are fewer prompts than asked for.
    """
    texts = all_texts(domain)
    if not 1 <= count <= len(texts):
        raise CalibrationError(f"training prompts of '{domain}': count must lie in [1, {len(texts)}], got {count}")
    order = np.random.default_rng([seed, TRAINING_DOMAINS.index(domain)]).permutation(len(texts))
    return tuple(Prompt(f"train-{domain}-{i:05d}", domain, texts[i]) for i in order[:count].tolist())


def all_texts(domain: str) -> tuple[str, ...]:
    """Give every training text of `domain`: each template with every choice of its slots."""
    if domain not in TRAINING_DOMAINS:
        raise CalibrationError(
            f"training prompts: domain not known, got '{domain}'{did_you_mean(domain, TRAINING_DOMAINS)}"
        )
    table = tomllib.loads((_FOLDER / f"{domain}.toml").read_text(encoding="utf-8"))
    slots: dict[str, Sequence[str]] = table["slots"]
    texts: dict[str, None] = {}
    for template in table["templates"]:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name]
        for values in itertools.product(*(slots[name] for name in names)):
            texts.setdefault(template.format(**dict(zip(names, values, strict=True))))
    return tuple(texts)
