"""Training text of a tiny verifier, for tests of distillation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def drawn_prompts(domain: str, count: int, seed: int = 0) -> list[Any]:
    """Prompts of a few letters: the first half of the alphabet in 'code', the second half elsewhere."""
    from calibration.prompts import Prompt

    rng = np.random.default_rng([seed, len(domain)])
    letters = list(LETTERS[:13] if domain == "code" else LETTERS[13:])
    texts = ("".join(rng.choice(letters, rng.integers(2, 7))) for _ in range(count))
    return [Prompt(f"{domain}-{i}", domain, text) for i, text in enumerate(texts)]


def tiny_corpus(verifier: Any, folder: Path, domain: str = "code", count: int = 24, **options: Any) -> list[Any]:
    """Texts of up to 24 tokens that `verifier` wrote in `folder`."""
    from calibration.trained.corpus import read_corpus, write_corpus

    settings = {"max_new_tokens": 24, "batch_size": 8, "temperature": 0.8, **options}
    write_corpus(verifier, drawn_prompts(domain, count), folder, **settings)
    return read_corpus(folder)
