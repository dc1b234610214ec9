"""Columns of recorded positions as flat arrays, numbered as `simulator.playback.replay` numbers them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from calibration.common.arrays import Floats, Ints
from calibration.common.errors import ReplayError
from calibration.traces import DrafterInfo, TraceSet
from simulator.playback.replay import SequenceTable


@dataclass(frozen=True)
class Material:
    """What was recorded of one drafter on the sequences served; what policies may be fitted to."""

    traces: TraceSet
    drafter: str
    sequences: SequenceTable

    @property
    def info(self) -> DrafterInfo:
        """The drafter in the manifest."""
        return self.traces.manifest.drafter(self.drafter)

    @property
    def greedy(self) -> bool:
        """Whether the verifier's text was decoded greedily."""
        return self.traces.manifest.decoding.mode == "greedy"

    @property
    def lengths(self) -> Ints:
        """Output tokens of each sequence."""
        return np.array(self.sequences.output_tokens, dtype=np.int64)

    @property
    def starts(self) -> Ints:
        """Where each sequence begins in the flat arrays."""
        return np.concatenate(([0], np.cumsum(self.lengths)[:-1]))

    @property
    def owners(self) -> Ints:
        """Which sequence each flat place belongs to."""
        return np.repeat(np.arange(len(self.sequences)), self.lengths)

    @property
    def needed(self) -> Ints:
        """Places where a draft can start: all but the first of a sequence, which prefill emits."""
        return np.setdiff1d(np.arange(int(self.lengths.sum())), self.starts)

    def rows(self, table: pa.Table, columns: Sequence[str]) -> tuple[pa.Table, Ints]:
        """Give this drafter's rows of `table` on these sequences, and each row's flat place."""
        mine = table.select(["sequence_id", "position", *columns]).filter(pc.equal(table["drafter"], self.drafter))
        code = pc.index_in(mine["sequence_id"], value_set=pa.array(self.sequences.ids))
        mine = mine.filter(pc.is_valid(code))
        owner = code.drop_null().to_numpy().astype(np.int64)
        return mine, self.starts[owner] + mine["position"].to_numpy()

    def columns(self, *names: str) -> list[Floats]:
        """Give columns of positions.parquet, NaN where missing."""
        table, place = self.rows(self.traces.positions, names)
        flat = []
        for name in names:
            values = np.full(int(self.lengths.sum()), np.nan)
            values[place] = table[name].cast(pa.float64()).to_numpy(zero_copy_only=False)
            flat.append(values)
        return flat

    def whole(self, name: str, values: Floats, needed_by: str) -> None:
        """Refuse a column that lacks a value where a draft can start: `ReplayError` says where."""
        missing = self.needed[np.isnan(values[self.needed])]
        if len(missing):
            owner = int(np.searchsorted(self.starts, missing[0], side="right")) - 1
            raise ReplayError(
                f"positions.parquet: column '{name}': must be recorded for {needed_by}; missing for drafter "
                f"'{self.drafter}' at {len(missing)} positions, first sequence '{self.sequences.ids[owner]}', "
                f"position {int(missing[0] - self.starts[owner])}"
            )
