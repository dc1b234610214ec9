"""One function for every report of an engine or a benchmark, also for kinds from outside."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

from calibration.common.errors import CalibrationError, did_you_mean
from calibration.common.plugins import PLUGIN, PluginTable, make_plugin
from calibration.importers.aiperf import import_aiperf
from calibration.importers.origin import Origin
from calibration.importers.sglang import import_sglang
from calibration.importers.specdecode_bench import import_specdecode_bench
from calibration.importers.vllm import import_vllm_counters, import_vllm_log, import_vllm_requests
from calibration.traces import TraceSet

Path = str | os.PathLike[str]
ONE: Mapping[str, Callable[..., TraceSet]] = {
    "aiperf": import_aiperf,
    "sglang": import_sglang,
    "vllm-counters": import_vllm_counters,
    "vllm-log": import_vllm_log,
}
"""Kinds that read one file."""
SEVERAL: Mapping[str, Callable[..., TraceSet]] = {
    "specdecode-bench": import_specdecode_bench,
    "vllm-requests": import_vllm_requests,
}
"""Kinds that read any number of files."""


class PluginImporter(PluginTable):
    """An importer from outside."""

    group: ClassVar[str] = "paceline.importers"
    kind: Literal["plugin"] = "plugin"


def import_evidence(*files: Path, kind: str, **options: Any) -> TraceSet:
    """Return the TraceSet in `files`, a report of `kind`, with the `options` of its own importer.

    Args:
        files: One file, or several where the kind takes several.
        kind: A name of ``paceline traces import --help``, or ``plugin:NAME`` for an importer from outside.
        options: What the importer of that kind takes, such as `origin`, `lengths` or `seed`; of an importer from
            outside, `origin`, and `settings` for the rest.

    Raises:
        CalibrationError: A kind that is not known, several files where the kind reads one, or options that it does
            not have.
        TraceError: A file that cannot be used.
    """
    if kind.startswith(PLUGIN):
        return import_from_outside(kind.removeprefix(PLUGIN), files, **options)
    known = {**ONE, **SEVERAL}
    if kind not in known:
        hint = did_you_mean(kind, known)
        raise CalibrationError(f"kind: must be one of {', '.join(sorted(known))}, got '{kind}'{hint}")
    if not files or (kind in ONE and len(files) > 1):
        raise CalibrationError(f"files: '{kind}' reads {'one' if kind in ONE else 'at least one'}, got {len(files)}")
    try:
        return known[kind](files[0] if kind in ONE else files, **options)
    except TypeError as fault:
        if "argument" not in str(fault):
            raise
        raise CalibrationError(f"{kind}: {str(fault).partition(' ')[2]}") from fault


def import_from_outside(
    name: str, files: tuple[Path, ...], *, origin: Origin | None = None, settings: Mapping[str, Any] | None = None
) -> TraceSet:
    """Return what the entry point `name` of group ``paceline.importers`` reads in `files`.

    It is called with (settings, files, origin) and gives a TraceSet, whose tables were checked when it was built.
    """
    place = "importer"
    table = PluginImporter(name=name, settings=dict(settings or {}))
    found = make_plugin(table, place, CalibrationError, tuple(str(file) for file in files), origin or Origin())
    if not isinstance(found, TraceSet):
        raise CalibrationError(f"{place}: plugin '{name}' must give a TraceSet, got {type(found).__name__}")
    return found
