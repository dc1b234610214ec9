"""What recorded drafts are made of, where they are not chains of equal steps: trees, and drafters of varying depth.

*Trees* (``proposal_nodes``): a draft cut at depth k verifies all its nodes down to that depth. With the run lengths
recorded beside them, every cut of a recorded tree is replayed exactly.

*Varying depth* (``draft_layers``): a drafter that runs as many decoder layers for a token as it sees fit. A token of
l of L layers is priced at l / L of a whole draft step, an **approximation**: embedding, head and launching are not
divided by layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from calibration.common.arrays import Floats, Ints
from calibration.common.errors import ReplayError
from calibration.traces import DrafterInfo

SHAPE_COLUMNS = ("proposal_nodes", "draft_layers")
"""What is read of positions.parquet."""


@dataclass(frozen=True)
class DraftShapes:
    """Drafts by recorded place (`Replay.positions` of cursors).

    `nodes`, `layers` [places, longest + 1]: nodes that are verified, and layers that are run, for a draft of depth 0,
    1, ... `whole`: layers of a whole draft step.
    """

    nodes: Ints | None
    layers: Ints | None
    whole: int

    def verified(self, places: Ints, drafted: Ints) -> Ints:
        """Give how many drafted tokens are verified for drafts that are `drafted` deep: a tree's nodes."""
        return drafted if self.nodes is None else self.nodes[places, drafted]

    def shares(self, places: Ints, drafted: Ints) -> Floats | None:
        """Give the part of a whole draft step that each token takes (slots, steps); 0 behind the last.

        None where every token takes a whole one.
        """
        if self.layers is None:
            return None
        steps = np.arange(1, int(drafted.max(initial=0)) + 1)
        run = np.diff(self.layers[places][:, : len(steps) + 1], axis=1) / self.whole
        return np.asarray(np.where(steps <= drafted[:, None], run, 0.0))

    def most(self, depth: int) -> int:
        """Give the most tokens that a draft cut at `depth` verifies."""
        return depth if self.nodes is None else int(self.nodes[:, : depth + 1].max(initial=0))


def compile_shapes(info: DrafterInfo, table: pa.Table, place: Ints, places: int) -> DraftShapes | None:
    """Give the shapes of the drafts in the rows of `table`, which belong at `place`; None where all are plain chains.

    Raises `ReplayError` where layers were recorded and the drafter's own number of layers is not known.
    """
    nodes = _cumulative(table["proposal_nodes"], place, places, 1)
    if nodes is None and table["draft_layers"].null_count == len(table):
        return None
    if table["draft_layers"].null_count < len(table) and not info.layers:
        raise ReplayError(
            f"manifest.json: drafters: '{info.name}': layers must be known where draft_layers are recorded, got "
            f"{info.layers}"
        )
    return DraftShapes(nodes, _cumulative(table["draft_layers"], place, places, info.layers or 0), info.layers or 0)


def _cumulative(column: pa.ChunkedArray, place: Ints, places: int, plain: int) -> Ints | None:
    """Give the running counts of each row with a 0 in front; of `plain` a token in rows that have none.

    None where no row has any.
    """
    if column.null_count == len(column):
        return None
    rows = column.combine_chunks()
    lengths = np.nan_to_num(rows.value_lengths().to_numpy(zero_copy_only=False)).astype(np.int64)
    owner = np.repeat(place, lengths)
    depth = np.arange(len(owner)) - np.repeat(np.cumsum(lengths) - lengths, lengths) + 1
    longest = int(lengths.max(initial=0))
    counts = np.tile(plain * np.arange(longest + 1, dtype=np.int64), (places, 1))
    counts[owner, depth] = rows.flatten().to_numpy()
    return counts
