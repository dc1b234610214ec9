"""Kinds from outside: what other packages add to a scenario or a job, found by name through entry points.

A table names one as ``policy = "plugin:name"`` (or ``kind = "plugin:name"``) and gives it its ``settings``. Every
kind has a group of its own; what is called is in docs/plugins.md.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points
from typing import Any, ClassVar

from pydantic import BaseModel, BeforeValidator, Field

from calibration.common.errors import PacelineError, did_you_mean
from calibration.common.files import joint_sha256
from calibration.common.settings import Table
from calibration.common.version import package_files

PLUGIN = "plugin:"
_UNSEEN = uuid.uuid4().hex


class PluginTable(Table):
    """A kind from outside, by the name of its entry point in `group`; written ``"plugin:name"``."""

    group: ClassVar[str]
    name: str
    settings: dict[str, Any] = Field(default_factory=dict)


def by_name(key: str, into: str = "name") -> BeforeValidator:
    """Let a union of tables that are told apart by `key` be written with ``key = "plugin:name"``.

    `into`: where the table of a plug-in keeps the name.
    """

    def spelled_out(table: Any) -> Any:
        named = table.get(key) if isinstance(table, dict) else None
        if not isinstance(named, str) or not named.startswith(PLUGIN):
            return table
        return {**table, key: "plugin", into: named.removeprefix(PLUGIN)}

    return BeforeValidator(spelled_out)


def load_plugin(group: str, name: str, place: str, error: type[PacelineError]) -> Any:
    """Load the entry point `name` of `group`; `error`, which begins with `place`, where there is none."""
    known = {point.name: point for point in entry_points(group=group)}
    if name not in known:
        raise error(f"{place}: no entry point of group '{group}' is called '{name}'{did_you_mean(name, known)}")
    return known[name].load()


def make_plugin(table: PluginTable, place: str, error: type[PacelineError], *arguments: Any) -> Any:
    """Call the entry point that `table` names with its settings and `arguments`.

    Raises `error` where there is none of that name, or where it does not take its settings (TypeError, ValueError,
    KeyError).
    """
    make = load_plugin(table.group, table.name, place, error)
    try:
        return make(dict(table.settings), *arguments)
    except (TypeError, ValueError, KeyError) as fault:
        raise error(f"{place}.settings: plugin '{table.name}' does not take them ({fault})") from fault


def need(made: Any, parts: tuple[str, ...], what: str, name: str, place: str, error: type[PacelineError]) -> None:
    """Raise `error` where what the plug-in `name` made lacks one of `parts` of the contract of `what`."""
    lacking = [part for part in parts if not hasattr(made, part)]
    if lacking:
        raise error(f"{place}: what plugin '{name}' makes must be {what}; it has no {', '.join(lacking)}")


def plugin_sha256(group: str, name: str) -> str:
    """Give the sha256 of the code behind an entry point: every file of the package that it comes from.

    A plug-in whose code cannot be seen has another one in every process, so that nothing kept of it is used again.
    """
    found: dict[str, str] = {}
    for point in entry_points(group=group):
        if point.name == name:
            found |= {"point": point.value} | package_files(_package(point))
    return joint_sha256(found) if len(found) > 1 else _UNSEEN


def _package(point: EntryPoint) -> str:
    return point.module.partition(".")[0]


def plugin_tables(value: Any, place: str = "") -> Iterator[tuple[str, PluginTable]]:
    """Give (place, table) of every kind from outside in the checked settings `value`."""
    if isinstance(value, PluginTable):
        yield place, value
    elif isinstance(value, BaseModel):
        for key in type(value).model_fields:
            yield from plugin_tables(getattr(value, key), f"{place}.{key}" if place else key)
    elif isinstance(value, tuple):
        for number, item in enumerate(value):
            yield from plugin_tables(item, f"{place}[{number}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from plugin_tables(item, f"{place}.{key}")
