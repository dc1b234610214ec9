"""Published comparisons of generic and tuned drafters, read where their files are at hand: facts of others."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path

from analysis.common.bootstrap import number
from analysis.knowledge.findings import PublishedRow
from calibration.common.errors import ReportError, did_you_mean

TUNED, ONLINE = "domain-tuned-draft/ablations.csv", "osd-token-alpha/osd_per_token_counts.csv"


def published_rows(folder: Path | None) -> tuple[PublishedRow, ...]:
    """Give what `folder` holds of the tables that are known here, in their layout; none where there is no folder.

    Of Online Speculative Decoding (Liu et al. 2023): LLaMA-160M for Vicuna-7B on spider, before and after
    distillation from the verifier; accepted over proposed, summed over vocabulary tokens. Raises `ReportError` where
    a table lacks a column, or `folder` holds none of them.
    """
    if folder is None:
        return ()
    rows = []
    if (folder / TUNED).is_file():
        rows += _tuned(folder / TUNED)
    if (folder / ONLINE).is_file():
        rows.append(_online(folder / ONLINE))
    if not rows:
        raise ReportError(f"{folder}: must hold {TUNED} or {ONLINE}, got neither")
    return tuple(rows)


def _tuned(path: Path) -> list[PublishedRow]:
    """Rows ``<domain>:generic`` and ``<domain>:tuned``, and the share of the tuning data that was used."""
    values = {
        (row["ablation"], row["setting"]): float(row["value"])
        for row in _rows(path, "ablation", "setting", "quantity", "value")
        if row["quantity"] == "acceptance_rate"
    }
    source = "domain-tuned drafter, ablations"
    found = []
    for (ablation, setting), tuned in values.items():
        domain, _, kind = setting.partition(":")
        generic = values.get((ablation, f"{domain}:generic"))
        if kind == "tuned" and generic is not None:
            found.append(PublishedRow(source, f"domain generalization, {domain}", generic, tuned, None))
    generic = values.get(("A1_dataset_size", "generic (0%)"))
    if generic is not None:
        found += [
            PublishedRow(source, f"{setting} of the tuning data", generic, tuned, None)
            for (ablation, setting), tuned in values.items()
            if ablation == "A1_dataset_size" and setting.endswith("%")
        ]
    return found


def _online(path: Path) -> PublishedRow:
    names = [f"{model}-spider:{count}" for model in ("org", "teacher-fwd") for count in ("correct", "proposed")]
    total = dict.fromkeys(names, 0)
    for row in _rows(path, *names):
        for name in names:
            total[name] += int(row[name])
    generic, tuned = (number(total[a] / total[b]) or 0.0 for a, b in (names[:2], names[2:]))
    source = "Online Speculative Decoding, LLaMA-160M for Vicuna-7B"
    return PublishedRow(source, "spider, distilled on its own text", generic, tuned, total[names[3]])


def _rows(path: Path, *columns: str) -> Iterator[Mapping[str, str]]:
    with path.open(encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream)
        header = reader.fieldnames or ()
        for column in columns:
            if column not in header:
                raise ReportError(f"{path}: column '{column}': is missing{did_you_mean(column, header)}")
        yield from reader
