"""How many tokens are drafted: one number, or one for each range of batch sizes."""

from __future__ import annotations

from collections.abc import Sequence

from calibration.common.errors import CalibrationError

Range = tuple[int, int, int]
"""First and last batch size, and the draft length K for them."""


class DraftLengths:
    """A draft length by the number of requests that decode, the same for all of them.

    A table has the form and meaning of vLLM's `num_speculative_tokens_per_batch_size`, and of the scenario policy
    `by_batch`: ranges from 1 on, without gaps; larger batches take the last K.
    """

    def __init__(self, draft_tokens: int | Sequence[Range]) -> None:
        self.table = ((1, 1, draft_tokens),) if isinstance(draft_tokens, int) else tuple(draft_tokens)
        self._fixed = isinstance(draft_tokens, int)
        expected = 1
        for entry in self.table:
            if len(entry) != 3 or entry[0] != expected or entry[1] < entry[0] or entry[2] < 0:
                rule = "must be at least 0, or ranges [first, last, K] that follow each other from 1 on, K >= 0"
                got = draft_tokens if self._fixed else [list(row) for row in self.table]
                raise CalibrationError(f"engine: draft_tokens: {rule}, got {got}")
            expected = entry[1] + 1

    @property
    def longest(self) -> int:
        """The longest draft; 0 also for an empty table."""
        return max((draft_tokens for _, _, draft_tokens in self.table), default=0)

    def at(self, batch: int) -> int:
        """Give the draft length where `batch` requests decode."""
        for _, last, draft_tokens in self.table:
            if batch <= last:
                return draft_tokens
        return self.table[-1][2] if self.table else 0

    def __str__(self) -> str:
        """Give the number, or the table as it is written in a scenario."""
        return str(self.table[0][2] if self._fixed else [list(row) for row in self.table])
