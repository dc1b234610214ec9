"""What a router can see of a prompt, and a classifier of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.sparse import csr_matrix

from calibration.common.arrays import Floats, Ints
from calibration.common.errors import ReplayError
from calibration.traces import TraceSet
from simulator.playback.replay import SequenceTable
from simulator.workload.lengths import stream


def token_counts(traces: TraceSet, sequences: SequenceTable, needed_by: str) -> csr_matrix:
    """Give how often each token is in each prompt, shape (sequences, distinct tokens).

    Raises `ReplayError` where prompts were recorded without their token ids.
    """
    table = traces.sequences
    rows = pc.index_in(pa.array(sequences.ids), value_set=table["sequence_id"])
    prompts = table["prompt_token_ids"].combine_chunks().take(rows)
    if prompts.null_count:
        first = sequences.ids[int(np.argmax(pc.is_null(prompts).to_numpy(zero_copy_only=False)))]
        raise ReplayError(
            f"sequences.parquet: column 'prompt_token_ids': must be recorded for {needed_by}; missing for "
            f"{prompts.null_count} of {len(sequences)} sequences, first '{first}'"
        )
    lengths = pc.list_value_length(prompts).to_numpy(zero_copy_only=False).astype(np.int64)
    kinds, token = np.unique(prompts.flatten().to_numpy(), return_inverse=True)
    owner = np.repeat(np.arange(len(sequences)), lengths)
    shape = (len(sequences), max(len(kinds), 1))
    counts = csr_matrix((np.ones(len(token)), (owner, token)), shape=shape)
    counts.sum_duplicates()
    return counts


def prompt_contexts(counts: csr_matrix) -> tuple[list[int], Floats]:
    """Give (context of each sequence, inner products of contexts): a context for each distinct prompt, length 1."""
    groups = equal_rows(counts)
    first = np.unique(groups, return_index=True)[1]
    chosen = counts[first]
    norms = np.sqrt(np.asarray(chosen.multiply(chosen).sum(axis=1)).ravel())
    unit = chosen.multiply(1 / np.maximum(norms, 1e-300)[:, None]).tocsr()
    return groups.tolist(), np.asarray((unit @ unit.T).todense(), dtype=np.float64)


def domain_contexts(domains: Sequence[str]) -> tuple[list[int], Floats]:
    """Give the same for one-hot vectors of the domain."""
    names, context = np.unique(domains, return_inverse=True)
    return context.tolist(), np.eye(len(names))


def equal_rows(counts: csr_matrix) -> Ints:
    """Give each row the number of its kind: rows with equal counts are of one kind."""
    kinds: dict[tuple[bytes, bytes], int] = {}
    counts.sort_indices()
    rows = zip(counts.indptr[:-1].tolist(), counts.indptr[1:].tolist(), strict=True)
    keys = [(counts.indices[a:b].tobytes(), counts.data[a:b].tobytes()) for a, b in rows]
    return np.array([kinds.setdefault(key, len(kinds)) for key in keys], dtype=np.int64)


def naive_bayes(counts: csr_matrix, labels: Ints, classes: int) -> tuple[Floats, Floats]:
    """Fit multinomial naive Bayes; give (log prior, shape (classes,); log likelihood, shape (classes, tokens)).

    P(w | c) = (1 + count of w in c) / (tokens + all counts in c); P(c) = share of c (McCallum and Nigam 1998). A
    class without a row has prior 0.
    """
    member = csr_matrix((np.ones(len(labels)), (labels, np.arange(len(labels)))), shape=(classes, len(labels)))
    total = np.asarray((member @ counts).todense()) + 1.0
    share = np.bincount(labels, minlength=classes) / len(labels)
    prior = np.array([math.log(p) if p else -math.inf for p in share])
    return prior, np.log(total / total.sum(axis=1, keepdims=True))


def out_of_fold(counts: csr_matrix, labels: Ints, classes: int, folds: int, seed: int) -> Ints:
    """Give the class of each row, by a model that was trained without its fold; equal rows share a fold.

    Folds are dealt at random, by `seed`. Raises `ReplayError` where all rows are equal.
    """
    kinds = equal_rows(counts)
    number = int(kinds.max()) + 1
    if number < 2:
        raise ReplayError(
            "routing.drafter.policy: 'classifier' must have at least 2 different prompts to learn from, got 1"
        )
    order = stream(seed, "folds").permutation(number)
    fold = (np.argsort(order) % min(folds, number))[kinds]
    guesses = np.zeros(len(labels), dtype=np.int64)
    for part in range(min(folds, number)):
        held = fold == part
        prior, likelihood = naive_bayes(counts[~held], labels[~held], classes)
        guesses[held] = np.argmax(counts[held] @ likelihood.T + prior, axis=1)
    return guesses
