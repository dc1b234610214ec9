"""Strict TOML files, checked with pydantic: every fault is told at once, in the user's words.

A sentence reads *place: rule, got value; did you mean ...?*, where the place is that in the file.

Write a nested dictionary as TOML (the standard library only reads it).
"""

from __future__ import annotations

import json
import os
import re
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from calibration.common.errors import PacelineError, did_you_mean

_PLAIN = {
    "Input should": "must",
    "Value should": "must",
    "Dictionary should": "must",
    "Tuple should": "must",
    " after validation, not 0": "",
    "greater than or equal to": ">=",
    "less than or equal to": "<=",
    "greater than": ">",
    "less than": "<",
    "a valid dictionary or object to extract fields from": "a table",
    "a valid tuple": "a list",
    "a valid integer": "an integer",
    "a valid": "a",
}
"""Pydantic's words in a user's words."""


Model = TypeVar("Model", bound=BaseModel)


def read_toml(path: str | os.PathLike[str], error: type[PacelineError]) -> dict[str, Any]:
    """Read the TOML file at `path`; `error` says why it cannot be read."""
    file = Path(path)
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"{file}: not found") from None
    except UnicodeDecodeError:
        raise error(f"{file}: not UTF-8 text") from None
    except OSError as fault:
        raise error(f"{file}: cannot be read ({fault.strerror})") from None
    except tomllib.TOMLDecodeError as fault:
        raise error(f"{file}: not valid TOML ({fault})") from None


def check(model: type[Model], data: Mapping[str, Any], where: str, error: type[PacelineError]) -> Model:
    """Give `data` as a `model`; `error` names every fault after `where`."""
    try:
        return model.model_validate(data)
    except ValidationError as fault:
        raise error("\n".join(f"{where}: {line}" for line in sentences(fault.errors(), model))) from None


def sentences(errors: Iterable[Any], root: type[BaseModel]) -> list[str]:
    """Give one sentence for each of the `errors` that pydantic found in a file that `root` describes."""
    return [_sentence(error, root) for error in errors]


def _sentence(error: Any, root: type[BaseModel]) -> str:
    """Give *place: rule, got value; did you mean* for one fault that pydantic found."""
    place, sections = _walk(error["loc"], root)
    got = error["input"]
    match error["type"]:
        case "extra_forbidden":
            known = {name for section in sections for name in section.model_fields}
            return f"{place}: no such key{did_you_mean(str(error['loc'][-1]), known)}"
        case "missing":
            return f"{place}: must be given"
        case "union_tag_not_found":
            choices = sorted(_tags(error["loc"], root))
            return f"{place}.{error['ctx']['discriminator'].strip(chr(39))}: must be given; {_choose(choices)}"
        case "union_tag_invalid":
            tag = str(error["ctx"]["tag"])
            key = error["ctx"]["discriminator"].strip("'")
            return f"{place}.{key}: no such {key}, got '{tag}'{did_you_mean(tag, _tags(error['loc'], root))}"
        case "literal_error":
            known = {word.strip("'") for word in error["ctx"]["expected"].replace(" or ", ", ").split(", ")}
            return f"{place}: {_choose(sorted(known))}, got {got!r}{did_you_mean(str(got), known)}"
    rule: str = re.sub(
        r"a valid dictionary or instance of \w+", "a table", error["msg"].removeprefix("Value error, ")
    )
    for words, plain in _PLAIN.items():
        rule = rule.replace(words, plain)
    if not place:  # a rule about several keys at once
        return rule
    return f"{place}: {rule}" + ("" if isinstance(got, Mapping | list | tuple) else f", got {got!r}")


def _choose(choices: Iterable[str]) -> str:
    return f"must be one of {', '.join(choices)}"


def _walk(loc: tuple[int | str, ...], root: type[BaseModel]) -> tuple[str, list[type[BaseModel]]]:
    """Follow `loc` through the models; give the place in the user's words and the models its last key could be in.

    A tag of a union ('closed') is part of pydantic's location but not of the file.
    """
    place: list[str] = []
    here: list[type[BaseModel]] = [root]
    parents = here
    named = False
    for part in loc:
        tagged = [model for model in here if part in _own_tags(model)]
        if len(here) > 1 and tagged:
            here = tagged
            continue
        if isinstance(part, int) and place:  # one of a list
            place[-1] += f"[{part}]"
            continue
        place.append(str(part))
        parents = here
        if named:  # the user's own word for one of several equal tables
            named = False
            continue
        annotations = [model.model_fields[str(part)].annotation for model in here if str(part) in model.model_fields]
        here = [model for annotation in annotations for model in _models(annotation)]
        named = any(_is_table(annotation) for annotation in annotations)
    return ".".join(place), parents


def _tags(loc: tuple[int | str, ...], root: type[BaseModel]) -> set[str]:
    """Give the tags that a union at `loc` knows."""
    # A key that no table has: the walk ends in the tables that may stand at `loc`.
    return {tag for model in _walk((*loc, ""), root)[1] for tag in _own_tags(model)}


def _own_tags(model: type[BaseModel]) -> tuple[str, ...]:
    for key in ("kind", "policy"):
        if key in model.model_fields:
            return typing.get_args(model.model_fields[key].annotation)
    return ()


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Give the models inside an annotation: a model, an optional one, a tagged union, or a table of equal ones."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated, dict, tuple):
        return [model for argument in typing.get_args(annotation) for model in _models(argument)]
    return []


def _is_table(annotation: Any) -> bool:
    """Whether an annotation is a table whose keys the user chooses."""
    if typing.get_origin(annotation) is dict:
        return True
    return any(_is_table(argument) for argument in typing.get_args(annotation))


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
