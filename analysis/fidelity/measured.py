"""What was measured: the runs below a folder, and their summaries by the rules of the simulator's own.

Measured runs that come with the package.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from calibration.common.arrays import Floats
from calibration.common.errors import TraceError
from calibration.measured import MeasuredRun
from calibration.measured.run import MARKER
from calibration.traces import TraceSet
from simulator.results.metrics import measured, request_latencies, spread, throughputs
from simulator.results.result import measured_window, without_startup
from simulator.scenario.loading import load_scenario
from simulator.scenario.scenario import Scenario


def bundled_runs() -> Path:
    """Give the folder of the bundled measured runs: one sub-folder an engine, for `analysis.fidelity.validate`."""
    return Path(__file__).parent / "bundled"


@dataclass(frozen=True)
class MeasuredCondition:
    """A measured run in its folder: `source` is the sub-folder of the validation folder that it lies in."""

    source: str
    name: str
    folder: Path
    run: MeasuredRun
    scenario: Scenario


def find_conditions(folder: Path) -> list[MeasuredCondition]:
    """Read every measured run below `folder`, sorted by source and name.

    Raises `TraceError` where there is none or one is damaged, `ScenarioError` where a scenario has faults.
    """
    if (folder / MARKER).is_file():
        raise TraceError(f"{folder}: is a measured run itself; give the folder above those of its source")
    places = sorted(marker.parent for marker in folder.rglob(MARKER))
    if not places:
        raise TraceError(f"{folder}: no measured run below it (a folder with {MARKER})")
    found = []
    for place in places:
        parts = place.relative_to(folder).parts
        source, name = (parts[0], "/".join(parts[1:])) if len(parts) > 1 else (folder.resolve().name, parts[0])
        found.append(
            MeasuredCondition(source, name, place, MeasuredRun.read(place), load_scenario(place / "scenario.toml"))
        )
    return sorted(found, key=lambda condition: (condition.source, _natural(condition.name)))


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort plain-8 before plain-16."""
    words = "".join(c if c.isdigit() else f" {c} " for c in name).split()
    return [(int(word), "") if word.isdigit() else (-1, word) for word in words]


def summaries(run: MeasuredRun, scenario: Scenario) -> list[dict[str, Any]]:
    """Give the summary of each repeat of `run`, under the keys and by the rules of a simulated run's.

    The stretch that ``[measure]`` keeps, throughputs and spreads are those of `simulator.results`; a TPOT is
    (end - first token) / (output tokens - 1), an ITL the gap between two arrivals of tokens of a request. What was
    not seen is absent.
    """
    found = []
    for repeat in range(run.manifest.repeats):
        requests, steps = (table.filter(pc.equal(table["repeat"], repeat)) for table in (run.requests, run.steps))
        if not pc.any(requests["counted"]).as_py():
            raise TraceError(f"requests.parquet: repeat {repeat} of {run.manifest.repeats}: no counted request")
        found.append(_summary(requests, steps, scenario))
    return found


def _summary(requests: pa.Table, steps: pa.Table, scenario: Scenario) -> dict[str, Any]:
    window = measured_window(scenario.measure, requests)
    iterations = pa.table(
        {
            "emitted_tokens": steps["emitted_tokens"],
            "start_s": steps["start_s"],
            "duration_s": steps["seconds"],
        }
    )
    totals = throughputs(requests, iterations, window)
    if steps.num_rows == 0:
        del totals["engine_output_throughput"]
    kept = measured(requests, window)
    steady, left_out = without_startup(scenario.workload, window, kept)
    late = measured(requests, steady)
    ttft, tpot, e2el = request_latencies(late)
    return {
        **totals,
        **window.describe(),
        **left_out,
        **spread("ttft", ttft),
        **spread("tpot", tpot),
        **spread("itl", _gaps(late)),
        **spread("e2el", e2el),
        **_acceptance(requests),
    }


def _gaps(requests: pa.Table) -> Floats:
    """Give the seconds between neighbouring arrivals of tokens of each request that they are known of."""
    known = [times for times in requests["emission_s"].to_pylist() if times]
    return np.concatenate([np.diff(times) for times in known]) if known else np.zeros(0)


def _acceptance(requests: pa.Table) -> dict[str, float]:
    """Give vLLM's counters of speculation over all requests that ended, fillers included."""
    names = {
        "spec_decode_num_drafts": "drafts",
        "spec_decode_draft_tokens": "drafted_tokens",
        "spec_decode_accepted_tokens": "accepted_tokens",
    }
    known = {key: requests[name] for key, name in names.items() if requests[name].null_count < requests.num_rows}
    counts: dict[str, float] = {key: int(pc.sum(column).as_py()) for key, column in known.items()}
    drafts, drafted, accepted = (counts.get(key) for key in names)
    if drafted and accepted is not None:
        counts["spec_decode_acceptance_rate"] = 100 * accepted / drafted
    if drafts and accepted is not None:
        counts["spec_decode_acceptance_length"] = 1 + accepted / drafts
    return counts


def text_note(run: MeasuredRun, traces: TraceSet) -> str | None:
    """Say how many counted requests received the recorded text; None where token ids are not known.

    A text that drifted (another kernel, another rounding) has other acceptance than the recording.
    """
    table = traces.sequences
    texts = dict(zip(table["sequence_id"].to_pylist(), table["output_token_ids"].to_pylist(), strict=True))
    counted = run.requests.filter(run.requests["counted"])
    ids = zip(counted["sequence_id"].to_pylist(), counted["output_token_ids"].to_pylist(), strict=True)
    pairs = [(texts[name], own) for name, own in ids if own is not None and texts.get(name) is not None]
    if not pairs:
        return None
    # A continued text is longer than its recording: only what was recorded can be compared.
    same = sum(recorded[: len(own)] == own[: len(recorded)] for recorded, own in pairs)
    return f"text as recorded in {same} of {len(pairs)} requests"
