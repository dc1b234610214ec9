"""Items to grade models on: a question, its options, and which of them is right. No torch needed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from calibration.common.errors import CalibrationError, did_you_mean

_KEYS = ("id", "domain", "question", "options", "answer")


@dataclass(frozen=True)
class Item:
    """One graded question. `options` are distinct and stand in the order shown; `answer` is the right one of them."""

    id: str
    domain: str
    question: str
    options: tuple[str, ...]
    answer: str

    @property
    def right(self) -> int:
        """Index of the right option."""
        return self.options.index(self.answer)

    @property
    def chance(self) -> float:
        """Probability that a blind guess is right."""
        return 1.0 / len(self.options)


def read_items(path: str | os.PathLike[str]) -> tuple[Item, ...]:
    """Read items from a JSONL file: one object a line with id, domain, question, options (a list) and answer.

    Raises:
        CalibrationError: the file cannot be read, is empty, or a line breaks a rule; names the line.
    """
    file = Path(path)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as fault:
        reason = fault.strerror if isinstance(fault, OSError) else "not UTF-8"
        raise CalibrationError(f"{file.name}: must be a JSONL file of items ({reason})") from None
    items = [_parsed(f"{file.name}: line {n}", line) for n, line in enumerate(lines, 1) if line.strip()]
    if not items:
        raise CalibrationError(f"{file.name}: must hold an item a line, got none")
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise CalibrationError(f"{file.name}: id: must be unique, got '{item.id}' twice")
        seen.add(item.id)
    return tuple(items)


def _parsed(place: str, line: str) -> Item:
    """Give the item of one line."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as fault:
        raise CalibrationError(f"{place}: must be a JSON object ({fault.msg})") from None
    if not isinstance(row, dict):
        raise CalibrationError(f"{place}: must be a JSON object, got {line.strip()[:60]}")
    for key in row:
        if key not in _KEYS:
            raise CalibrationError(f"{place}: key not known, got '{key}'{did_you_mean(key, _KEYS)}")
    for key in _KEYS:
        if key not in row:
            raise CalibrationError(f"{place}: {key}: must be given")
    for key in ("id", "domain", "question", "answer"):
        if not isinstance(row[key], str) or not row[key].strip():
            raise CalibrationError(f"{place}: {key}: must be a text that is not empty, got {row[key]!r}")
    return Item(row["id"], row["domain"], row["question"], _options(place, row), row["answer"])


def _options(place: str, row: dict[str, Any]) -> tuple[str, ...]:
    """Give the options of one line, which must be at least two different texts, the answer among them."""
    options = row["options"]
    if not isinstance(options, list) or not all(isinstance(option, str) and option.strip() for option in options):
        raise CalibrationError(f"{place}: options: must be a list of texts, got {options!r}")
    if len(options) < 2 or len(set(options)) < len(options):
        raise CalibrationError(f"{place}: options: must be at least two different texts, got {options!r}")
    if row["answer"] not in options:
        raise CalibrationError(f"{place}: answer: must be one of the options {options!r}, got {row['answer']!r}")
    return tuple(options)


def to_jsonl(items: Iterable[Item]) -> str:
    """Give `items` as the text of a JSONL file that `read_items` reads."""
    return "".join(json.dumps(asdict(item), ensure_ascii=False) + "\n" for item in items)


def digest(items: Sequence[Item]) -> str:
    """Give the sha256 of `items`, with which a table says what it was graded on."""
    return hashlib.sha256(to_jsonl(items).encode()).hexdigest()
