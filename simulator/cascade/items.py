"""The table of items: what each stage answers to each of them, whether or not it is asked. Read from a CSV file.

What moves when a request is handed on, how long that takes, and how much of its prompt need not be computed.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from calibration.common.errors import ScenarioError, did_you_mean
from calibration.common.files import check_beside, sha256
from simulator.cascade.scenario import Handover, KvHandover, Stage

_KEYS = ("item", "domain", "stage", "correct")
_PROMPT, _OUTPUT, _COST = "item_prompt_tokens", "output_tokens", "cost"

Row = tuple[float, ...]
"""One number for each stage."""


@dataclass(frozen=True)
class ItemTable:
    """Items in the order of the file, and per item one number for each of `stages`.

    `correct` in 0..1; `prompt_tokens` per item; `output_tokens`, `cost` (in the unit of the file) and `signals` (by
    name, NaN where a cell is empty) per item and stage. What the file does not have is None.
    """

    items: tuple[str, ...]
    domains: tuple[str, ...]
    stages: tuple[str, ...]
    correct: tuple[Row, ...]
    prompt_tokens: tuple[int, ...] | None = None
    output_tokens: tuple[tuple[int, ...], ...] | None = None
    cost: tuple[Row, ...] | None = None
    signals: Mapping[str, tuple[Row, ...]] = field(default_factory=dict)
    sha256: str | None = None

    def __len__(self) -> int:
        """Give the number of items."""
        return len(self.items)


def read_items(path: str | os.PathLike[str], stages: Sequence[str], signals: Sequence[str] = ()) -> ItemTable:
    """Read the rows of `stages` from the CSV file at `path`, with these `signals`; all else is left aside.

    Raises:
        ScenarioError: the file cannot be read, lacks a column or the row of an item and stage, has two of one, or a
            cell breaks a rule; names file, row (as a spreadsheet numbers it) and column.
    """
    file = Path(path)
    try:
        raw = file.read_bytes()
        check_beside(file, raw, ScenarioError)
        rows = list(csv.DictReader(raw.decode("utf-8").splitlines()))
    except FileNotFoundError:
        raise ScenarioError(f"items.path: no such file, got '{file}'") from None
    except (OSError, UnicodeDecodeError, csv.Error) as fault:
        raise ScenarioError(f"{file.name}: must be a CSV file ({fault})") from None
    if not rows:
        raise ScenarioError(f"{file.name}: must have a row per item and stage, got none")
    columns = [name for name in rows[0] if name is not None]
    for key in (*_KEYS, *signals):
        if key not in columns:
            raise ScenarioError(f"{file.name}: must have a column '{key}'{did_you_mean(key, columns)}")
    return _Reader(file.name, rows, tuple(stages)).table(columns, signals, sha256(raw))


class _Reader:
    """Sorts the rows of one file by item and stage, and checks their cells."""

    def __init__(self, where: str, rows: list[dict[str, str]], stages: tuple[str, ...]) -> None:
        self._where, self._rows, self._stages = where, rows, stages
        known = dict.fromkeys(row["stage"] for row in rows)
        for stage in stages:
            if stage not in known:
                raise ScenarioError(f"{where}: must have rows of stage '{stage}'{did_you_mean(stage, known)}")
        self._place: dict[tuple[str, str], int] = {}
        for number, row in enumerate(rows):
            key = (row["item"], row["stage"])
            if not row["item"]:
                raise self._fault(number, "item", "must not be empty", "")
            if key in self._place:
                raise self._fault(number, "item", f"must be once for stage '{row['stage']}'", row["item"])
            self._place[key] = number
        self._items = tuple(dict.fromkeys(row["item"] for row in rows if row["stage"] in stages))
        for item in self._items:
            for stage in stages:
                if (item, stage) not in self._place:
                    raise ScenarioError(f"{where}: must have a row of item '{item}' for stage '{stage}'")

    def table(self, columns: Sequence[str], signals: Sequence[str], sha256: str) -> ItemTable:
        """Give the table with what `columns` the file has."""
        first = self._stages[0]
        prompt = None
        if _PROMPT in columns:
            prompt = tuple(self._count(self._place[item, first], _PROMPT) for item in self._items)
        output = None
        if _OUTPUT in columns:
            output = tuple(tuple(self._count(n, _OUTPUT) for n in self._of(item)) for item in self._items)
        return ItemTable(
            items=self._items,
            domains=tuple(self._rows[self._place[item, first]]["domain"] for item in self._items),
            stages=self._stages,
            correct=self._numbers("correct", 0.0, 1.0),
            prompt_tokens=prompt,
            output_tokens=output,
            cost=self._numbers(_COST, 0.0, math.inf) if _COST in columns else None,
            signals={name: self._numbers(name, -math.inf, math.inf, empty=True) for name in signals},
            sha256=sha256,
        )

    def _of(self, item: str) -> list[int]:
        return [self._place[item, stage] for stage in self._stages]

    def _numbers(self, column: str, low: float, high: float, *, empty: bool = False) -> tuple[Row, ...]:
        return tuple(tuple(self._number(n, column, low, high, empty) for n in self._of(item)) for item in self._items)

    def _number(self, row: int, column: str, low: float, high: float, empty: bool) -> float:
        text = (self._rows[row][column] or "").strip()
        if empty and not text:
            return math.nan
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and low <= value <= high):
            rule = "must be a number" if math.isinf(high) else f"must be a number from {low:g} to {high:g}"
            raise self._fault(row, column, rule + (" >= 0" if math.isinf(high) and low == 0 else ""), text)
        return value

    def _count(self, row: int, column: str) -> int:
        text = (self._rows[row][column] or "").strip()
        if not text.isdigit() or int(text) < 1:
            raise self._fault(row, column, "must be a whole number of at least 1", text)
        return int(text)

    def _fault(self, row: int, column: str, rule: str, got: str) -> ScenarioError:
        return ScenarioError(f"{self._where}: row {row + 2}, column '{column}': {rule}, got '{got}'")


@dataclass(frozen=True)
class Transfer:
    """One hand-over: `seconds` on the link for `nbytes`; of the prompt, `carried_tokens` need not be computed."""

    seconds: float = 0.0
    nbytes: float = 0.0
    carried_tokens: int = 0


def transfer(how: Handover, sender: Stage, receiver: Stage, prompt_tokens: int) -> Transfer:
    """Give the hand-over of a prompt from one stage to another; see `KvHandover` for formula and exactness.

    At least one token is always computed anew: carried <= prompt_tokens - 1.
    """
    if not isinstance(how, KvHandover) or sender.kv is None or receiver.kv is None:
        return Transfer()
    shared = min(sender.kv.layers, receiver.kv.layers)
    per_token = min(sender.kv.bytes_per_token, receiver.kv.bytes_per_token)
    if shared < receiver.kv.layers:
        per_token += how.hidden_bytes_per_token or 0.0
    computed = max(1, math.ceil(prompt_tokens * (receiver.kv.layers - shared) / receiver.kv.layers))
    nbytes = prompt_tokens * per_token
    return Transfer(nbytes / (how.bandwidth_gb_s * 1e9) + how.latency_s, nbytes, prompt_tokens - computed)
