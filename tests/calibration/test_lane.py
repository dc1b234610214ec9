"""A lane with padding and rejected columns must equal a plain pass over what it kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import VOCABULARY, random_prompts, tiny_llama

from calibration.models.lane import Lane, pad_left, pad_right

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    return tiny_llama(3)


def plain(model, text):
    """Logits behind the last token of `text`, without cache, mask or padding."""
    return model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1]


def test_padding():
    tokens, real = pad_left([[5], [6, 7, 8]], CPU)
    assert tokens.tolist() == [[0, 0, 5], [6, 7, 8]]
    assert real.tolist() == [[False, False, True], [True, True, True]]
    tokens, real = pad_right([[5], []], CPU)
    assert tokens.tolist() == [[5], [0]]
    assert real.tolist() == [[True], [False]]


@given(seed=st.integers(0, 2**32 - 1), steps=st.integers(1, 6))
@settings(max_examples=25)
def test_feeding_and_forgetting_equals_a_plain_pass_over_the_kept_text(model, seed, steps):
    rng = np.random.default_rng(seed)
    texts = random_prompts(seed % 1000, 3, 1, 6)
    lane = Lane(model, 3)
    logits = lane.feed(*pad_left(texts, CPU))
    for _ in range(steps):
        for row, text in enumerate(texts):
            torch.testing.assert_close(logits[row, -1], plain(model, text))
        # Feed drafts with padding in front, forget some of them from a random column on, and end with a real token.
        width = int(rng.integers(1, 5))
        tokens = torch.tensor(rng.integers(0, VOCABULARY, (3, width)))
        real = torch.tensor(rng.random((3, width)) < 0.7)
        lane.feed(tokens, real)
        keep = torch.tensor(rng.integers(0, width + 1, 3))
        lane.forget(torch.arange(width) >= keep[:, None])
        for row, text in enumerate(texts):
            text += [int(t) for i, t in enumerate(tokens[row]) if real[row, i] and i < keep[row]]
        new = torch.tensor(rng.integers(0, VOCABULARY, (3, 1)))
        logits = lane.feed(new, last=1)
        for row, text in enumerate(texts):
            text.append(int(new[row, 0]))


def test_last_gives_only_the_last_columns(model):
    tokens, real = pad_left(random_prompts(1, 3), CPU)
    whole = Lane(model, 3).feed(tokens, real)
    assert Lane(model, 3).feed(tokens, real, last=2).shape[1] == 2
    torch.testing.assert_close(Lane(model, 3).feed(tokens, real, last=2), whole[:, -2:])
