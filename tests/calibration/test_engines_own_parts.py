"""Parts of our engine: its forward pass against transformers, and the bookkeeping of its memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import random_prompts, tiny_llama
from transformers import AutoModelForCausalLM, LlamaConfig

from calibration.engines.own.cache import BlockTables, Rows, make_cache
from calibration.engines.own.decoder import Decoder, Span
from calibration.timing import SHAPES

KINDS = ("paged", "padded")
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
"""The norms of transformers compute in float32, whatever the model's dtype is."""


# --- The forward pass


def llama_3(seed=0):
    """A Llama with the stretched rotary frequencies of Llama 3.1 and later, and untied embeddings."""
    stretched = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0}
    stretched |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=3,
        max_position_embeddings=512,
        rope_parameters=stretched,
    )
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config)


def qwen(seed=0):
    """A Qwen2: biases on the projections."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(SHAPES["tiny-qwen"].config())


@pytest.mark.parametrize("make", [tiny_llama, llama_3, qwen])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers_however_the_text_is_fed(make, kind):
    """Prompts of mixed length, ragged steps, a part of a prompt beside decoding rows, and steps taken back."""
    with torch.random.fork_rng(devices=[]):
        model = make(0).double().eval()
    for parameter in model.parameters():  # biases and norms that matter
        parameter.requires_grad_(False).add_(0.05 * torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
    decoder = Decoder(model, "model", 64)
    cache = make_cache(kind, decoder.cache_shape, rows=4, capacity=64, block_size=4)
    rows = [list(text) for text in random_prompts(3, 4, 30, 40)]
    fed = [0] * 4
    turns = [[[(0, 9)], [(1, 5)]], [[(0, 1), (1, 4)], [(2, 7), (3, 2)]], [[(1, 1), (0, 5)], [(3, 6)]]]
    turns += [[[(3, 1), (0, 1), (2, 1)]], [[(2, 1)]], [[(2, 3)]], [[(0, 2), (1, 2), (2, 2), (3, 2)]]]
    wanted = [model(torch.tensor([row])).logits[0] for row in rows]
    for turn in turns:
        groups = []
        for group in turn:
            groups.append([Span(row, rows[row][fed[row] : fed[row] + count], count) for row, count in group])
            for row, _ in group:
                if not fed[row]:
                    cache.open(row)
        logits = decoder.logits(groups, cache)
        want = [wanted[row][fed[row] : fed[row] + count] for group in turn for row, count in group]
        torch.testing.assert_close(logits, torch.cat(want), **CLOSE)
        for row, count in (span for group in turn for span in group):
            fed[row] += count - (count > 2)  # drafts that were rejected
            cache.truncate(row, fed[row])
    cache.close(1)  # where rows are side by side, another one moves to its place
    groups = [[Span(row, rows[row][fed[row] : fed[row] + 2], 1) for row in (0, 2, 3)]]
    logits = decoder.logits(groups, cache)
    torch.testing.assert_close(logits, torch.stack([wanted[row][fed[row] + 1] for row in (0, 2, 3)]), **CLOSE)


def test_nothing_is_computed_where_no_logits_are_wanted(tiny):
    decoder = Decoder(tiny.model, "model", 16)
    cache = make_cache("paged", decoder.cache_shape, rows=1, capacity=16, block_size=4)
    cache.open(0)
    assert decoder.choose([[Span(0, [5, 6, 7], 0)]], cache) == [[]]
    assert cache.length(0) == 3


@pytest.mark.model
def test_the_real_verifiers_logits_are_those_of_transformers(smollm2):
    tokens = smollm2.encode("Why is the sky blue?")
    decoder = Decoder(smollm2.model, "smollm2", 64)
    cache = make_cache("paged", decoder.cache_shape, rows=1, capacity=64, block_size=16)
    cache.open(0)
    first = decoder.logits([[Span(0, tokens[:-5], 3)]], cache)
    rest = decoder.logits([[Span(0, tokens[-5:], 5)]], cache)
    wanted = smollm2.model(torch.tensor([tokens])).logits[0, -8:]
    torch.testing.assert_close(torch.cat([first, rest]), wanted, atol=2e-3, rtol=1e-4)


# --- Memory


@given(st.integers(1, 5), st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40)), max_size=40))
def test_blocks_are_held_by_one_sequence_each_and_never_leak(size, moves):
    tables = BlockTables(4 * -(-40 // size), size)
    total = tables.free
    for sequence, tokens in moves:
        if tokens == 0 and sequence in tables.tables:
            tables.close(sequence)
        elif sequence not in tables.tables:
            tables.open(sequence)
        else:
            tables.resize(sequence, tokens)
            slots = tables.slots(sequence, 0, tokens)
            assert len(set(slots)) == tokens
            assert len(tables.tables[sequence]) == -(-tokens // size)
        held = [block for table in tables.tables.values() for block in table]
        assert len(held) == len(set(held)) == total - tables.free
    for sequence in list(tables.tables):
        tables.close(sequence)
    assert tables.free == total


@given(st.lists(st.integers(0, 4), max_size=40))
def test_rows_have_no_holes_and_say_who_moves(moves):
    rows, content = Rows(5), [None] * 5
    for sequence in moves:
        if sequence in content[: len(rows)]:
            hole = rows.of(sequence)
            moved = rows.close(sequence)
            if moved is not None:
                assert content[moved[1]] == moved[0]
                content[hole] = moved[0]
        else:
            rows.open(sequence)
            content[rows.of(sequence)] = sequence
        assert all(rows.of(held) == row for row, held in enumerate(content[: len(rows)]))
        assert len(set(content[: len(rows)])) == len(rows)
