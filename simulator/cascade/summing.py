"""From the logs of all stages to the table of requests and the summary of a cascade.

CascadeResult: what the simulation of a cascade gives, in memory and as a folder of files.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from calibration.common.arrays import Floats
from calibration.common.errors import ScenarioError
from calibration.common.files import fresh_folder
from calibration.common.version import paceline_version
from simulator.cascade.items import ItemTable
from simulator.cascade.router import CascadeRouter
from simulator.cascade.scenario import AnswerObjectives, CascadeScenario, Stage
from simulator.playback.replay import SequenceTable
from simulator.results.evidence import graded
from simulator.results.metrics import acceptance, request_latencies, spread
from simulator.results.result import Record, iterations_table, requests_table
from simulator.running.assemble import ReplicaSetup
from simulator.scenario.inputs import traces_identity
from simulator.workload import Source


@dataclass(frozen=True)
class StageRun:
    """One stage after the run: its replicas, the sequences it served, and what they noted."""

    stage: Stage
    places: list[ReplicaSetup]
    sequences: SequenceTable
    record: Record


def requests_of(router: CascadeRouter, table: ItemTable, runs: list[StageRun]) -> pa.Table:
    """Give one row per request with an answer, in order of submission.

    ``path``: the stages it ran, with semicolons, the last of which answered. ``first_token_s`` and
    ``output_tokens`` are those of that answer; ``correct`` is what the table says of it, ``table_cost`` the sum of
    the table's costs over the path (missing where it has none). ``transfer_s`` and ``transfer_bytes``: hand-overs.
    ``engine_s_<stage>``: its share of that stage's iterations (see `requests_table`), 0 where it did not run;
    they sum to the stage's busy time. Fillers are in here; `counted` says which are not.
    """
    visits = [requests_table(run.record, run.sequences) for run in runs]
    at = [{int(r): row for row, r in enumerate(v["request_id"].to_pylist())} for v in visits]
    columns = [{name: v[name].to_numpy() for name in _OF_ANSWER} for v in visits]
    sent = [t for _, t in sorted(router.sent.items()) if not np.isnan(t.finish_s)]
    last = [(t.path[-1], at[t.path[-1]][t.request.id]) for t in sent]
    items = [t.request.sequence for t in sent]
    told: dict[str, Any] = {
        "request_id": np.array([t.request.id for t in sent], dtype=np.int64),
        "item": pa.array([table.items[i] for i in items], type=pa.string()),
        "domain": pa.array([table.domains[i] for i in items], type=pa.string()),
        "counted": np.array([t.request.counted for t in sent], dtype=bool),
        "path": pa.array([";".join(table.stages[s] for s in t.path) for t in sent], type=pa.string()),
        "arrival_s": np.array([t.request.arrival_s for t in sent]),
        "first_token_s": np.array([columns[s]["first_token_s"][row] for s, row in last]),
        "finish_s": np.array([t.finish_s for t in sent]),
        "prompt_tokens": np.array([columns[s]["prompt_tokens"][row] for s, row in last], dtype=np.int64),
        "output_tokens": np.array([columns[s]["output_tokens"][row] for s, row in last], dtype=np.int64),
        "correct": np.array([table.correct[i][t.path[-1]] for i, t in zip(items, sent, strict=True)]),
        "table_cost": _table_cost(table, items, [t.path for t in sent]),
        "transfer_s": np.array([sum(x.seconds for x in t.transfers) for t in sent], dtype=np.float64),
        "transfer_bytes": np.array([sum(x.nbytes for x in t.transfers) for t in sent], dtype=np.float64),
    }
    for stage, (rows, own) in enumerate(zip(at, columns, strict=True)):
        shares = [float(own["engine_seconds"][rows[t.request.id]]) if t.request.id in rows else 0.0 for t in sent]
        told[f"engine_s_{table.stages[stage]}"] = np.array(shares, dtype=np.float64)
    return pa.table(told)


_OF_ANSWER = ("first_token_s", "prompt_tokens", "output_tokens", "engine_seconds")


def _table_cost(table: ItemTable, items: list[int], paths: list[tuple[int, ...]]) -> pa.Array:
    if table.cost is None:
        return pa.nulls(len(items), pa.float64())
    cost = table.cost
    return pa.array([sum(cost[i][s] for s in path) for i, path in zip(items, paths, strict=True)], type=pa.float64())


def summarise(
    scenario: CascadeScenario, table: ItemTable, entry: Source, runs: list[StageRun], requests: pa.Table
) -> dict[str, Any]:
    """Give the summary: names as in a run's summary where that has one; all over counted requests.

    ``request_throughput``: answers a second, from the first arrival to the last end. ``ttft`` is the time to the
    first token of the final answer. ``quality``: mean of ``correct`` over answers; ``distinct_items`` says over how
    many different items, as only these carry information; ``quality_95`` takes these for drawn at random.
    ``busy_s_per_answer``: seconds of replicas in iterations; ``replica_s_per_answer``: those that pass, idle ones
    included. A replica of several devices counts once.
    """
    counted = requests.filter(requests["counted"])
    arrival, finish = (counted[name].to_numpy() for name in ("arrival_s", "finish_s"))
    duration = float(finish.max() - arrival.min())
    answers = counted.num_rows
    ttft, tpot, e2el = request_latencies(counted)
    stages = {run.stage.name: _stage(run, counted, at, duration) for at, run in enumerate(runs)}
    return {
        "name": scenario.name,
        "duration": duration,
        "completed": answers,
        "distinct_items": len(set(counted["item"].to_pylist())),
        "request_throughput": answers / duration,
        **_quality(counted),
        **_cost(counted, runs, stages, duration),
        "handovers_per_answer": _handovers(counted) / answers,
        "transfer_bytes": float(counted["transfer_bytes"].to_numpy().sum()),
        "mean_transfer_ms": float(counted["transfer_s"].to_numpy().mean() * 1000),
        **spread("ttft", ttft),
        **spread("tpot", tpot),
        **spread("e2el", e2el),
        **_goodput(scenario.slo, ttft, e2el, duration),
        "stages": stages,
        "extrapolated_iterations": sum(p.prices.extrapolated_iterations for run in runs for p in run.places),
        "seed": scenario.seed,
        "scenario_hash": scenario.hash,
        "paceline_version": paceline_version(),
        "provenance": _provenance(scenario, table, entry, runs),
    }


def _quality(counted: pa.Table) -> dict[str, Any]:
    """Give the mean quality of answers and its 95% interval, by the normal approximation, clustered by item.

    All requests of an item have the same answer. Variance of a weighted mean of independent items (Cochran 1977):
    sum over items of (its share of the requests)^2 * (its quality - mean)^2.
    """
    grouped = counted.group_by("item").aggregate([("correct", "mean"), ("correct", "count")])
    quality, number = (grouped[f"correct_{what}"].to_numpy() for what in ("mean", "count"))
    weight = number / number.sum()
    mean = float(counted["correct"].to_numpy().mean())
    half = float(1.959963984540054 * np.sqrt(np.sum(weight**2 * (quality - mean) ** 2)))
    return {"quality": mean, "quality_95": [max(0.0, mean - half), min(1.0, mean + half)]}


def _handovers(counted: pa.Table) -> int:
    return sum(path.count(";") for path in counted["path"].to_pylist())


def _stage(run: StageRun, counted: pa.Table, at: int, duration: float) -> dict[str, Any]:
    """Give what one stage did: who ran there and was answered there, how busy its replicas were, its prices."""
    name, paths = run.stage.name, [path.split(";") for path in counted["path"].to_pylist()]
    answered = np.array([path[-1] == name for path in paths])
    iterations = iterations_table(run.record)
    busy = float(iterations["duration_s"].to_numpy().sum())
    active, seconds = iterations["active"].to_numpy(), iterations["duration_s"].to_numpy()
    told: dict[str, Any] = {
        "replicas": run.stage.replicas,
        "ran": float(np.mean([name in path for path in paths])),
        "answered": float(answered.mean()),
        "utilisation": busy / (run.stage.replicas * duration),
        "busy_s_per_answer": float(counted[f"engine_s_{name}"].to_numpy().sum()) / counted.num_rows,
        "iterations": iterations.num_rows,
        "costs": run.places[0].prices.describe(),
    }
    if answered.any():
        told["quality_where_answered"] = float(counted["correct"].to_numpy()[answered].mean())
    if busy > 0:
        told["mean_batch"] = float(np.average(active, weights=seconds))
    if run.places[0].policy is not None:
        told |= acceptance(run.record)
    return told


def _cost(
    counted: pa.Table, runs: list[StageRun], stages: dict[str, dict[str, Any]], duration: float
) -> dict[str, float]:
    """Give what an answer costs: device seconds, money where every stage has a price, and by the table of items."""
    answers = counted.num_rows
    told = {
        "busy_s_per_answer": sum(stage["busy_s_per_answer"] for stage in stages.values()),
        "replica_s_per_answer": sum(run.stage.replicas for run in runs) * duration / answers,
    }
    rates = [run.stage.usd_per_hour for run in runs]
    if all(rate is not None for rate in rates):
        hourly = sum((rate or 0.0) * run.stage.replicas for rate, run in zip(rates, runs, strict=True))
        told["usd_per_answer"] = hourly / 3600 * duration / answers
    if counted["table_cost"].null_count == 0:
        told["table_cost_per_answer"] = float(counted["table_cost"].to_numpy().mean())
    return told


def _goodput(objectives: AnswerObjectives | None, ttft: Floats, e2el: Floats, duration: float) -> dict[str, float]:
    """Give answers a second that keep every stated objective, and their share; a limit is kept by its own value."""
    if objectives is None:
        return {}
    limits = {"ttft": (ttft, objectives.ttft_ms), "e2el": (e2el, objectives.e2el_ms)}
    kept = {name: seconds * 1000 <= limit for name, (seconds, limit) in limits.items() if limit is not None}
    good = np.logical_and.reduce(list(kept.values()))
    return {
        "request_goodput": float(good.sum()) / duration,
        "slo_attainment": float(good.mean()),
        **{f"slo_attainment_{name}": float(mask.mean()) for name, mask in kept.items()},
    }


def _provenance(scenario: CascadeScenario, table: ItemTable, entry: Source, runs: list[StageRun]) -> dict[str, Any]:
    """Say where the numbers come from."""
    return {
        "results": "simulated",
        "quality": "exact counterfactual of the table of items",
        "items": {"count": len(table), "sha256": table.sha256},
        "workload": entry.provenance,
        "handover": scenario.handover.kind,
        "inputs_sha256": scenario.inputs_sha256(),
        "stages": {
            run.stage.name: {
                "costs": run.places[0].prices.verify.describe().get("kind", "stated linear constants"),
                "acceptance": "nothing is drafted"
                if run.places[0].policy is None
                else "approximation: recorded sequences of the item's domain, not of the item",
                **graded([place.traces.manifest for place in run.places], [place.prices for place in run.places]),
                **traces_identity(run.places[0].traces),
            }
            for run in runs
        },
    }


@dataclass(frozen=True)
class CascadeResult:
    """One finished run: `summary`, and `requests` with a row per answered request (units in the names)."""

    scenario: CascadeScenario
    summary: dict[str, Any]
    requests: pa.Table

    def write(self, folder: str | os.PathLike[str]) -> Path:
        """Write scenario.toml, summary.json and requests.parquet to `folder`, which appears whole or not at all.

        A folder that holds an older result is replaced; any other that is not empty is refused.
        """
        target = Path(folder)
        with fresh_folder(target, "summary.json", error=ScenarioError) as scratch:
            (scratch / "scenario.toml").write_text(self.scenario.to_toml(target.absolute()), encoding="utf-8")
            text = json.dumps(self.summary, indent=2, ensure_ascii=False, allow_nan=False)
            (scratch / "summary.json").write_text(text + "\n", encoding="utf-8")
            pq.write_table(self.requests, scratch / "requests.parquet", compression="zstd")
        return target
