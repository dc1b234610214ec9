"""The reference of a TOML file's keys, written from the models that read it, so that it cannot fall behind them."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Any, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined


def reference(root: type[BaseModel], what: str, command: str) -> str:
    """Give the reference of all keys of a file that `root` describes, as Markdown.

    `what` names the file (scenario, recording job ...), `command` is the one that writes the page.
    """
    head = (
        f"# Reference: {what}\n\nEvery table and key that a {what} may hold; this page is written by `{command}`.\n"
        "A key without a default must be given where its table stands. Unknown keys are refused, and all faults are\n"
        "told at once.\n"
    )
    return "\n".join([head, *_section(what, root, "", set())]).rstrip() + "\n"


def _section(title: str, model: type[BaseModel], path: str, told: set[type[BaseModel]]) -> Iterator[str]:
    yield f"## {title}\n"
    yield inspect.cleandoc(model.__doc__ or "") + "\n"
    if model.model_fields:
        yield "| key | value | default |\n|---|---|---|"
        for name, field in model.model_fields.items():
            yield f"| `{name}` | {_value(field.annotation, field.metadata)} | {_default(field)} |"
        yield ""
    for name, field in model.model_fields.items():
        place = f"{path}.{name}" if path else name
        for section in dict.fromkeys(_models(field.annotation)):
            if section not in told:
                told.add(section)
                yield from _section(_title(place, section, _is_list(field.annotation)), section, place, told)


def _title(place: str, section: type[BaseModel], listed: bool) -> str:
    table = f"[[{place}]]" if listed else f"[{place}]"
    for key in ("policy", "kind", "format"):
        word = section.model_fields.get(key)
        if word is not None and typing.get_origin(word.annotation) is Literal:
            return f"{table} {key} = {_words(word.annotation)}"
    return table


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """Sections that a value may be, in order."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in typing.get_args(annotation):
        yield from _models(part)


def _is_list(annotation: Any) -> bool:
    if typing.get_origin(annotation) is tuple:
        return any(True for _ in _models(annotation))
    return any(_is_list(part) for part in typing.get_args(annotation))


def _value(annotation: Any, rules: Any = ()) -> str:
    if typing.get_origin(annotation) is typing.Annotated:
        inner, *more = typing.get_args(annotation)
        return _value(inner, more)
    if any(True for _ in _models(annotation)):
        return "tables" if _is_list(annotation) else "table"
    if typing.get_origin(annotation) is Literal:
        return _words(annotation)
    if isinstance(annotation, UnionType) or typing.get_origin(annotation) is typing.Union:
        return " or ".join(
            dict.fromkeys(_value(part, rules) for part in typing.get_args(annotation) if part is not NoneType)
        )
    if typing.get_origin(annotation) is tuple:
        items = [_value(part) for part in typing.get_args(annotation) if part is not Ellipsis]
        return "list of " + (items[0] if len(set(items)) == 1 else f"({', '.join(items)})")
    if typing.get_origin(annotation) is dict:
        return "table of " + _value(typing.get_args(annotation)[1])
    names = {int: "whole number", float: "number", str: "text", bool: "true or false"}
    return names.get(annotation, "any value") + _limits(rules)


def _limits(rules: Any) -> str:
    words = []
    for rule in [part for given in rules for part in getattr(given, "metadata", [given])]:
        for kind, sign, key in ((Ge, ">=", "ge"), (Gt, ">", "gt"), (Le, "<=", "le"), (Lt, "<", "lt")):
            if isinstance(rule, kind):
                words.append(f"{sign} {getattr(rule, key):g}")
        if isinstance(rule, MinLen):
            words.append("not empty")
    return f", {', '.join(words)}" if words else ""


def _words(annotation: Any) -> str:
    return " or ".join(f'"{word}"' for word in typing.get_args(annotation))


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "" if field.default_factory is None else "see below"
    if field.default is None:
        return "left out"
    if isinstance(field.default, BaseModel):
        return "its defaults"
    value = field.default
    return f"`{str(value).lower() if isinstance(value, bool) else value!r}`".replace("'", '"')
