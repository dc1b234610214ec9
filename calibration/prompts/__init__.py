"""The prompts that calibration runs: 72 bundled ones over six domains, or a user's own file. No torch needed.

>>> from calibration.prompts import load_prompts
>>> [(file.domain, len(file.prompts)) for file in load_prompts(["code", "grounded"], limit_per_domain=5)]
[('code', 5), ('grounded', 5)]
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from calibration.common.errors import CalibrationError, did_you_mean

__all__ = ["DOMAINS", "Prompt", "PromptFile", "load_prompts", "read_prompt_file"]

DOMAINS = ("chat", "code", "mathematics", "science", "creative", "grounded")
"""Domains of the bundled prompts, in the order in which they are read and run."""

_FOLDER = Path(__file__).resolve().parent
_REQUIRED = ("id", "domain", "text")
_KEYS = (*_REQUIRED, "kind")
_DOMAIN_NAME = re.compile(r"[a-z][a-z0-9_-]*")


@dataclass(frozen=True)
class Prompt:
    """One user message. ``kind`` is a free word for the task (``summarise``, ``fix`` ...), ``None`` where not given.

    ``text`` stands as the file has it, less the line ends around it; no chat template is applied yet.
    """

    id: str
    domain: str
    text: str
    kind: str | None = None


@dataclass(frozen=True)
class PromptFile:
    """The prompts of one domain in one file.

    ``name`` is the file's name without folders, ``sha256`` that of all its bytes (also where only some prompts of
    it are here), ``prompts`` in the order of the file.
    """

    name: str
    domain: str
    sha256: str
    prompts: tuple[Prompt, ...]


def load_prompts(domains: Sequence[str] | None = None, limit_per_domain: int | None = None) -> tuple[PromptFile, ...]:
    """Read the bundled prompts, one `PromptFile` per domain, always in the order of `DOMAINS`.

    `domains` keeps only those named; `limit_per_domain` keeps the first so many prompts of each (all, where there
    are fewer). `CalibrationError` for an unknown domain or a limit below 1.
    """
    files = tuple(file for name in DOMAINS for file in read_prompt_file(_FOLDER / f"{name}.toml"))
    return _select(files, domains, limit_per_domain, "bundled prompts")


def read_prompt_file(
    path: Path | str, domains: Sequence[str] | None = None, limit_per_domain: int | None = None
) -> tuple[PromptFile, ...]:
    """Read a user's own prompts; one `PromptFile` per domain, in the order in which the domains first appear.

    A ``.toml`` file has ``domain`` at its top and ``[[prompt]]`` tables with ``id``, ``text`` and maybe ``kind``.
    A ``.jsonl`` file has one object a line with ``id``, ``domain``, ``text`` and maybe ``kind``, and may mix
    domains; blank lines are passed over. A domain may have any name in small letters. `domains` and
    `limit_per_domain` select as in `load_prompts`. `CalibrationError` names every faulty entry with its place.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as fault:
        raise CalibrationError(f"{path}: a prompt file must be readable, got '{fault.strerror}'") from None
    if path.suffix == ".toml":
        entries = _toml_entries(path, _decode(path, data))
    elif path.suffix == ".jsonl":
        entries = _jsonl_entries(path, _decode(path, data))
    else:
        raise CalibrationError(f"{path}: a prompt file must end in .toml or .jsonl, got '{path.suffix}'")
    prompts = _check(entries)
    if not prompts:
        raise CalibrationError(f"{path}: must hold at least one prompt, got none")
    sha256 = hashlib.sha256(data).hexdigest()
    files = tuple(
        PromptFile(path.name, domain, sha256, tuple(prompt for prompt in prompts if prompt.domain == domain))
        for domain in dict.fromkeys(prompt.domain for prompt in prompts)
    )
    return _select(files, domains, limit_per_domain, str(path))


def _select(
    files: tuple[PromptFile, ...], domains: Sequence[str] | None, limit: int | None, where: str
) -> tuple[PromptFile, ...]:
    """Keep the domains asked for, and the first `limit` prompts of each."""
    known = [file.domain for file in files]
    if domains is not None:
        if not domains:
            raise CalibrationError(f"{where}: domains: must name at least one, got none{did_you_mean('', known)}")
        for domain in domains:
            if domain not in known:
                hint = did_you_mean(domain, known)
                raise CalibrationError(f"{where}: domains: must be a known domain, got '{domain}'{hint}")
        files = tuple(file for file in files if file.domain in domains)
    if limit is None:
        return files
    if limit < 1:
        raise CalibrationError(f"{where}: limit_per_domain: must be at least 1, got {limit}")
    return tuple(replace(file, prompts=file.prompts[:limit]) for file in files)


def _decode(path: Path, data: bytes) -> str:
    """Give the text of UTF-8 bytes, with or without a byte order mark."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as fault:
        line = fault.object[: fault.start].count(b"\n") + 1
        byte = fault.object[fault.start]
        raise CalibrationError(f"{path}:{line}: must be UTF-8, got byte 0x{byte:02x}") from None


def _parse_toml(path: Path, text: str) -> dict[str, Any]:
    """Give the top table of a prompt file: a valid ``domain`` and a list ``prompt``, nothing else."""
    try:
        top = tomllib.loads(text)
    except tomllib.TOMLDecodeError as fault:
        at = re.search(r" \(at line (\d+), column \d+\)$", str(fault))
        line = int(at[1]) if at else text.count("\n") + 1  # else the fault is at the end of the file
        message = str(fault)[: at.start()] if at else str(fault)
        raise CalibrationError(f"{path}:{line}: must be valid TOML, got '{message}'") from None
    keys = ("domain", "prompt")
    faults = [f"{path}: {key}: unknown key{did_you_mean(key, keys)}" for key in top if key not in keys]
    faults += [f"{path}: {key}: required, missing" for key in keys if key not in top]
    if "domain" in top:
        faults += _domain_faults(str(path), top["domain"])
    if not isinstance(top.get("prompt", []), list):
        faults.append(f"{path}: prompt: must be tables headed [[prompt]], got {_show(top['prompt'])}")
    if faults:
        raise CalibrationError("\n".join(faults))
    return top


def _toml_entries(path: Path, text: str) -> list[tuple[str, Any]]:
    """Give (place, entry) for each ``[[prompt]]``, every entry with the file's domain."""
    top = _parse_toml(path, text)
    entries: list[tuple[str, Any]] = []
    for number, table in enumerate(top["prompt"], start=1):
        place = f"{path}: prompt {number}"
        if isinstance(table, dict):
            if "domain" in table:
                raise CalibrationError(f"{place}: domain: must stand at the top of a TOML file, got it here")
            if isinstance(table.get("id"), str):
                place += f" ({table['id']})"
            table = {**table, "domain": top["domain"]}
        entries.append((place, table))
    return entries


def _jsonl_entries(path: Path, text: str) -> list[tuple[str, Any]]:
    """Give (place, entry) for each line that is not blank."""
    entries: list[tuple[str, Any]] = []
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: U+2028 may stand in a string
        if not line.strip():
            continue
        try:
            entries.append((f"{path}:{number}", json.loads(line)))
        except json.JSONDecodeError as fault:
            got = f"'{fault.msg}' at column {fault.colno}"
            raise CalibrationError(f"{path}:{number}: must be a JSON object on one line, got {got}") from None
    return entries


def _check(entries: list[tuple[str, Any]]) -> list[Prompt]:
    """Turn entries into prompts; `CalibrationError` with one line for every fault."""
    faults: list[str] = []
    prompts: list[Prompt] = []
    first: dict[str, str] = {}
    for place, entry in entries:
        found = list(_entry_faults(place, entry))
        if not found and entry["id"] in first:
            found = [f"{place}: id: must be unique, got '{entry['id']}' (first at {first[entry['id']]})"]
        if found:
            faults += found
            continue
        first[entry["id"]] = place
        text = entry["text"].strip("\r\n")
        prompts.append(Prompt(entry["id"], entry["domain"], text, entry.get("kind")))
    if faults:
        raise CalibrationError("\n".join(faults))
    return prompts


def _entry_faults(place: str, entry: Any) -> Iterator[str]:
    if not isinstance(entry, dict):
        yield f"{place}: must be an object with id, domain and text, got {_show(entry)}"
        return
    for key in entry:
        if key not in _KEYS:
            yield f"{place}: {key}: unknown key{did_you_mean(key, _KEYS)}"
    for key in _REQUIRED:
        if key not in entry:
            yield f"{place}: {key}: required, missing"
    for key in ("id", "text", "kind"):
        if key in entry:
            yield from _text_faults(f"{place}: {key}", entry[key])
    if "domain" in entry:
        yield from _domain_faults(place, entry["domain"])


def _text_faults(where: str, value: Any) -> Iterator[str]:
    if not isinstance(value, str):
        yield f"{where}: must be a string, got {_show(value)}"
    elif not value.strip():
        yield f"{where}: must not be empty, got {value!r}"
    elif any("\ud800" <= letter <= "\udfff" for letter in value):
        yield f"{where}: must be Unicode text, got half of a surrogate pair"


def _domain_faults(place: str, value: Any) -> Iterator[str]:
    if not isinstance(value, str) or not _DOMAIN_NAME.fullmatch(value):
        yield f"{place}: domain: must be a name in small letters, digits, - and _, got {_show(value)}"


def _show(value: Any) -> str:
    """Show a value in an error: containers by their type, everything else in full."""
    return f"a {type(value).__name__}" if isinstance(value, dict | list) else repr(value)
