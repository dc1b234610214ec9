"""Streams of random numbers of a workload, next to the seed: what one stream is used for never shifts another.

The k-th draw of a stream belongs to the k-th request (of a client, where clients have streams of their own), so the
workload is the same for every policy and for any number of workers.
"""

from __future__ import annotations

import zlib

import numpy as np

ORDER, ARRIVALS, MIX, LENGTHS, THINK, CLASSES = 1, 2, 3, 4, 5, 6


def stream(seed: int, *key: int | str) -> np.random.Generator:
    """Give the generator of `seed` for the stream `key`; words stand for their CRC-32."""
    return np.random.default_rng(
        [seed, *(part if isinstance(part, int) else zlib.crc32(part.encode()) for part in key)]
    )
