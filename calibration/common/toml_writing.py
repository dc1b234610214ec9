"""Write a nested dictionary as TOML (the standard library only reads it)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

_BARE = re.compile(r"[A-Za-z0-9_-]+")
"""A key that needs no quotes."""


def dumps(data: Mapping[str, Any]) -> str:
    """Give `data` (strings, numbers, booleans, lists of these, and tables of these) as TOML."""
    return "\n".join(_table(data, ())).lstrip("\n") + "\n"


def _table(table: Mapping[str, Any], path: tuple[str, ...]) -> list[str]:
    lines = _scalars(table)
    if path and lines:
        lines = ["", f"[{'.'.join(map(_key, path))}]", *lines]
    return lines + _tables(table, path)


def _scalars(table: Mapping[str, Any]) -> list[str]:
    return [
        f"{_key(key)} = {_value(value)}"
        for key, value in table.items()
        if not (isinstance(value, Mapping) or _is_list_of_tables(value))
    ]


def _tables(table: Mapping[str, Any], path: tuple[str, ...]) -> list[str]:
    lines = []
    for key, value in table.items():
        if isinstance(value, Mapping):
            lines += _table(value, (*path, key))
        elif _is_list_of_tables(value):
            for item in value:
                header = f"[[{'.'.join(map(_key, (*path, key)))}]]"
                lines += ["", header, *_scalars(item), *_tables(item, (*path, key))]
    return lines


def _is_list_of_tables(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0 and isinstance(value[0], Mapping)


def _key(name: str) -> str:
    return name if _BARE.fullmatch(name) else _value(name)


def _value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(_value(item) for item in value)}]"
    if isinstance(value, str):  # JSON's escapes are TOML's, but for DEL
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return json.dumps(value)
