"""TraceSets to evaluate hybrid policies on: with a suffix lookup beside the recorded drafters, and paired lists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from calibration.common.errors import TraceError
from calibration.proposers.draft_trees import proposals, run_lengths
from calibration.proposers.suffix import SuffixProposer, SuffixSettings
from calibration.traces import DrafterInfo, TraceSet, make_table

SUFFIX = "suffix"
"""Name of the drafter that `with_suffix` adds."""
_POSITIONS = ("sequence_id", "drafter", "position", "run_length", "proposal_length", "accept_probability")


def with_suffix(traces: TraceSet, settings: SuffixSettings | None = None) -> TraceSet:
    """Add drafter ``suffix``, where token ids are known: it copies what followed the longest earlier match.

    Exact: its proposals depend on the committed tokens alone, see `calibration.proposers.draft_trees`. Sequences
    without token ids stay without it. By default any match, its latest occurrence, 20 tokens.
    """
    chosen = settings if settings is not None else SuffixSettings()
    columns: dict[str, list[Any]] = {name: [] for name in _POSITIONS}
    names = ("sequence_id", "prompt_token_ids", "output_token_ids")
    for name, prompt, output in zip(*(traces.sequences[column].to_pylist() for column in names), strict=True):
        if prompt is None or output is None:
            continue
        found = run_lengths(proposals(SuffixProposer(chosen), prompt, output, chosen.max_draft_tokens), output)
        columns["sequence_id"] += [name] * len(output)
        columns["drafter"] += [SUFFIX] * len(output)
        columns["position"] += range(len(output))
        columns["run_length"] += found.run.tolist()
        columns["proposal_length"] += found.depth.tolist()
        columns["accept_probability"] += (found.run > 0).astype(float).tolist()
    info = DrafterInfo(
        name=SUFFIX, paradigm="prompt-lookup", deterministic=True, max_draft_tokens=chosen.max_draft_tokens
    )
    manifest = traces.manifest.model_copy(update={"drafters": (*traces.manifest.drafters, info)})
    positions = pa.concat_tables([traces.positions, make_table("positions", columns)], promote_options="default")
    tables = {name: getattr(traces, name) for name in ("sequences", "rollouts", "timings")}
    return TraceSet.build(manifest, tables | {"positions": positions})


def paired(traces: TraceSet, drafter: str, partner: str) -> TraceSet:
    """Give the sequences of `partner` with the list of `drafter` beside it, place by place, where texts differ too.

    An imported request whose lists differ in length is two sequences, ``id`` and ``id/drafter``, as they were
    recorded on texts of their own. Here both are cut to the shorter one and stand side by side: true as far as the
    texts agree, an approximation behind that (it is what SpecDecode-Bench's own simulation does).
    """
    table = traces.sequences
    ids, lengths = table["sequence_id"].to_pylist(), dict(zip(*_pair(table), strict=True))
    own = {name: f"{name}/{drafter}" for name in ids if f"{name}/{drafter}" in lengths}
    kept = [name for name in ids if not name.endswith(f"/{drafter}")]
    length = {name: min(lengths[name], lengths[own.get(name, name)]) for name in kept}
    rows = table.take(pc.index_in(pa.array(kept), value_set=table["sequence_id"].combine_chunks()))
    tokens = [ids[: length[name]] for name, ids in zip(kept, rows["output_token_ids"].to_pylist(), strict=True)]
    cut = {name: rows[name] for name in rows.column_names}
    cut |= {"output_tokens": [length[name] for name in kept], "output_token_ids": tokens}
    columns = {name: _listed(cut[name]) for name in cut}
    back = {v: k for k, v in own.items()}
    found: dict[str, list[Any]] = {name: [] for name in _POSITIONS}
    for row in traces.positions.select(_POSITIONS).to_pylist():
        name = row["sequence_id"]
        if row["drafter"] == drafter:
            name = back.get(name, name)
        if row["drafter"] not in (drafter, partner) or row["position"] >= length.get(name, 0):
            continue
        run = min(row["run_length"], length[name] - row["position"])
        for key, value in (row | {"sequence_id": name, "run_length": run}).items():
            found[key].append(value)
    tables = {"sequences": make_table("sequences", columns), "positions": make_table("positions", found)}
    info = tuple(d for d in traces.manifest.drafters if d.name in (drafter, partner))
    return TraceSet.build(traces.manifest.model_copy(update={"drafters": info}), tables)


def _pair(table: pa.Table) -> tuple[list[str], list[int]]:
    return table["sequence_id"].to_pylist(), table["output_tokens"].to_pylist()


def _listed(values: Any) -> list[Any]:
    return values if isinstance(values, list) else list(values.to_pylist())


def complete(traces: TraceSet, drafters: Sequence[str]) -> TraceSet:
    """Give the sequences that were recorded with all `drafters` and token ids, and these drafters alone."""
    table, positions = traces.sequences, traces.positions
    keep = pc.and_(pc.is_valid(table["prompt_token_ids"]), pc.is_valid(table["output_token_ids"]))
    for name in drafters:
        having = pc.unique(positions["sequence_id"].filter(pc.equal(positions["drafter"], name)))
        keep = pc.and_(keep, pc.is_in(table["sequence_id"], value_set=having))
    table = table.filter(keep)
    if not table.num_rows:
        raise TraceError(f"traces: must hold sequences with token ids and drafters {', '.join(drafters)}; none has")
    mine = pc.and_(
        pc.is_in(positions["sequence_id"], value_set=table["sequence_id"].combine_chunks()),
        pc.is_in(positions["drafter"], value_set=pa.array(list(drafters))),
    )
    info = tuple(d for d in traces.manifest.drafters if d.name in drafters)
    tables = {"sequences": table, "positions": positions.filter(mine), "timings": traces.timings}
    return TraceSet.build(traces.manifest.model_copy(update={"drafters": info}), tables)


def of_domains(traces: TraceSet, names: Mapping[str, str]) -> TraceSet:
    """Give `traces` with domains renamed by sequence id (`names`), to learn from some and serve others."""
    table = traces.sequences
    own = [
        names.get(i, d) for i, d in zip(table["sequence_id"].to_pylist(), table["domain"].to_pylist(), strict=True)
    ]
    place = table.schema.get_field_index("domain")
    renamed = table.set_column(
        place, table.schema.field(place), pc.cast(pa.array(own), table.schema.field(place).type)
    )
    tables = {name: getattr(traces, name) for name in ("positions", "rollouts", "timings")}
    return TraceSet.build(traces.manifest, tables | {"sequences": renamed})


def halves(traces: TraceSet) -> dict[str, str]:
    """Give ``domain/first`` or ``domain/second`` for each sequence: by order; equal prompts go together."""
    columns = ("sequence_id", "domain", "prompt_token_ids")
    ids, domains, prompts = (traces.sequences[name].to_pylist() for name in columns)
    number: dict[str, dict[tuple[int, ...], int]] = {}
    place = []
    for domain, prompt in zip(domains, prompts, strict=True):
        seen = number.setdefault(domain, {})
        place.append(seen.setdefault(tuple(prompt), len(seen)))
    half = {domain: len(seen) / 2 for domain, seen in number.items()}
    return {
        name: f"{domain}/{'first' if at < half[domain] else 'second'}"
        for name, domain, at in zip(ids, domains, place, strict=True)
    }


def output_tokens(traces: TraceSet) -> int:
    """Give the tokens of all outputs."""
    return int(np.sum(traces.sequences["output_tokens"].to_numpy()))
