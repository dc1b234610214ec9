"""Kinds from outside: the package of docs/plugins.md as if installed, and what is said of kinds that break a rule."""

from __future__ import annotations

import importlib
import json
import sys
import tomllib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from scenarios import LINEAR, random_runs, traces_of
from several import several

import paceline
from calibration.common.errors import CalibrationError, PacelineError
from calibration.traces import TraceSet
from simulator import RunResult, Scenario
from simulator.stopping import Policy

GUIDE = (Path(__file__).resolve().parents[1] / "docs" / "plugins.md").read_text(encoding="utf-8")


def fenced(language: str) -> list[str]:
    return [block.split("```")[0] for block in GUIDE.split(f"```{language}\n")[1:]]


def table(key: str) -> dict[str, Any]:
    """The example of the guide that has this table."""
    (found,) = [data for block in fenced("toml") if key in (data := tomllib.loads(block)) and "project" not in data]
    return found


def install(folder: Path, source: str, groups: dict[str, dict[str, str]]) -> None:
    """What pip leaves of a package: its module, and its entry points."""
    (folder / "my_package.py").write_text(source, encoding="utf-8")
    info = folder / "my_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my_package\nVersion: 1.0\n", encoding="utf-8")
    lines = [
        line
        for group, points in groups.items()
        for line in (f"[{group}]", *(f"{k} = {v}" for k, v in points.items()))
    ]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture
def _installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    source = "\n\n".join(block for block in fenced("python") if "load_scenario" not in block)
    site = tmp_path / "site"
    site.mkdir()
    install(site, source, tomllib.loads(fenced("toml")[0])["project"]["entry-points"])
    monkeypatch.syspath_prepend(site)
    importlib.invalidate_caches()
    monkeypatch.delitem(sys.modules, "my_package", raising=False)
    yield
    sys.modules.pop("my_package", None)


@pytest.fixture(scope="module")
def traces() -> TraceSet:
    rng = np.random.default_rng(0)
    return traces_of([random_runs(rng, 30) for _ in range(8)], prompts=[9, 3, 7, 1, 8, 2, 6, 4])


def run(traces: TraceSet, draft_tokens: int = 2, **tables: Any) -> RunResult:
    data: dict[str, Any] = {
        "drafter": {"name": "drafter"},
        "stopping": {"policy": "fixed", "draft_tokens": draft_tokens},
        "engine": {"max_num_seqs": 4},
        "workload": {"kind": "closed", "concurrency": 4, "stagger_s": 0.0},
        "costs": {"verifier": LINEAR, "drafter": {"kind": "linear", "base_s": 0.001}},
        **tables,
    }
    return paceline.simulate(Scenario.model_validate({k: v for k, v in data.items() if v is not None}), traces)


@pytest.mark.usefixtures("_installed")
def test_stopping(traces: TraceSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(traces, **table("stopping"))
    rounds = found.iterations.to_pandas()
    assert set(rounds[(rounds["kind"] == "decode") & (rounds["active"] == 4)]["drafted_tokens"]) == {4 * 2}
    again = tmp_path / "again"
    found.write(again)
    assert paceline.load_scenario(again / "scenario.toml").stopping == found.scenario.stopping


@pytest.mark.usefixtures("_installed")
def test_batching(traces: TraceSet) -> None:
    load = {"kind": "closed", "concurrency": 8, "stagger_s": 0.0}
    found = run(traces, workload=load, engine={"max_num_seqs": 1}, **table("batching")).requests.sort_by("start_s")
    prompts = found["prompt_tokens"].to_pylist()
    assert prompts[1:] == sorted(prompts[1:])
    assert len(prompts) == 8


@pytest.mark.usefixtures("_installed")
def test_replica_routing(traces: TraceSet) -> None:
    found = run(traces, **table("replica"))
    assert set(found.requests["replica"].to_pylist()) == {"replica-1"}


@pytest.mark.usefixtures("_installed")
def test_drafter_routing() -> None:
    (guide,) = [d for b in fenced("toml") if "drafter" in (d := tomllib.loads(b)).get("routing", {})]
    rule = guide["routing"]["drafter"]
    rng = np.random.default_rng(1)
    both = several({name: [random_runs(rng, 20) for _ in range(6)] for name in rule["drafters"]})
    found = run(both, drafter=None, routing={"drafter": rule})
    rounds = {name: told["rounds"] for name, told in found.summary["drafter_routing"]["drafters"].items()}
    assert set(rounds) == set(rule["drafters"])
    assert min(rounds.values()) > 0


@pytest.mark.usefixtures("_installed")
def test_placement(traces: TraceSet) -> None:
    serial, remote = run(traces).iterations.to_pandas(), run(traces, **table("placement")).iterations.to_pandas()
    rounds = serial["kind"] == "decode"
    assert (remote["duration_s"] - serial["duration_s"])[rounds].to_numpy() == pytest.approx(0.01)


@pytest.mark.usefixtures("_installed")
def test_costs(traces: TraceSet) -> None:
    stopping = {"policy": "none"}
    verifier = table("costs")["costs"]["verifier"]
    found = run(traces, stopping=stopping, costs={"verifier": verifier})
    linear = {"kind": "linear", "base_s": 0.02, "per_token_s": 0.0001}
    same = run(traces, stopping=stopping, costs={"verifier": linear})
    assert found.requests.equals(same.requests)
    assert found.summary["provenance"]["step_time_grades"]["verifier"] == "stated constants"
    drafting = run(
        traces, costs={"verifier": LINEAR, "drafter": {**verifier, "settings": {"base_s": 0.5, "token_s": 0}}}
    )
    assert drafting.summary["duration"] > 2 * run(traces).summary["duration"]


@pytest.mark.usefixtures("_installed")
def test_drafters(tmp_path: Path, tiny: Any) -> None:
    from calibration.drafters.kinds import build_drafter
    from calibration.jobs.jobfile import load_job

    job = 'verifier = "smollm2-135m"\nout = "traces"\n' + "\n".join(fenced("toml")[-1].splitlines()[1:])
    (tmp_path / "job.toml").write_text(job, encoding="utf-8")
    settings, _ = load_job(tmp_path / "job.toml")
    drafter = build_drafter(settings.drafters[0], tiny)
    assert (drafter.name, drafter.info.paradigm, drafter.info.max_draft_tokens) == ("repeat", "plugin:repeat", 4)
    proposer = drafter.make()
    proposer.extend([5, 7])
    assert proposer.propose(3).tokens == (7, 7, 7)


@pytest.mark.usefixtures("_installed")
def test_importers(tmp_path: Path) -> None:
    spec = {
        "acceptance_histogram": [1, 1, 1, 0],
        "num_spec_steps": 3,
        "num_accepted_draft_tokens": 3,
        "num_draft_tokens": 9,
        "num_spec_tokens": 3,
        "per_step_accepted": [2, 0, 1],
        "per_step_drafted": [3, 3, 3],
    }
    answer = {
        "model": "verifier-8b",
        "choices": [{"index": 0, "finish_reason": "length"}],
        "usage": {"prompt_tokens": 11, "completion_tokens": 7},
        "metrics": {"speculative_decoding": spec},
    }
    file = tmp_path / "log.jsonl"
    file.write_text(json.dumps({"answer": answer}) + "\n", encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = paceline.import_evidence(file, kind="plugin:lines")
        done = CliRunner().invoke(
            paceline.main, ["traces", "import", "plugin", "lines", str(file), "--out", str(tmp_path / "traces")]
        )
    assert done.exit_code == 0, done.output
    assert found.positions["run_length"].to_pylist()[0] == 2
    assert TraceSet.read(tmp_path / "traces").sequences.equals(found.sequences)
    with pytest.raises(
        CalibrationError, match=r"kind: must be one of aiperf, .*, got 'sglan'; did you mean 'sglang'"
    ):
        paceline.import_evidence(file, kind="sglan")


class Threes(Policy):
    """A policy from Python."""

    def __init__(self, settings: Any = None, max_num_seqs: int = 0, shape: int | None = None) -> None:
        self.longest_draft, self._shape = 3, shape

    def draft_tokens(self, round_: Any) -> Any:
        return np.full(round_.active if self._shape is None else self._shape, 3, dtype=np.int64)


def test_a_policy_object_is_the_policy_by_name(traces: TraceSet) -> None:
    scenario = run(traces).scenario
    fixed = paceline.simulate(scenario.replace("stopping.draft_tokens", 3), traces)
    for policy in (Threes(), Threes):
        found = paceline.simulate(scenario, traces, policy=policy)
        assert found.requests.equals(fixed.requests)
        assert (
            repr(found)
            .splitlines()[0]
            .endswith("stopping policy Threes, " + repr(fixed).split("fixed, ")[1].split("\n")[0])
        )
    assert scenario.stopping.policy == "fixed"
    assert len(repr(fixed).splitlines()) == 5
    with pytest.raises(
        PacelineError, match=r"plugin 'Threes' must give draft lengths .* of shape \(4,\), got int64 of"
    ):
        paceline.simulate(scenario, traces, policy=Threes(shape=1))
    fleet = scenario.replace("replica", [{"count": 2}])
    assert paceline.simulate(fleet, traces, policy=Threes).summary["completed"] == 8
    with pytest.raises(PacelineError, match="policy: must be a class"):
        paceline.simulate(fleet, traces, policy=Threes())


BROKEN = """
import numpy as np

def no_number(settings): return lambda request: "soon"
class Nowhere:
    def __init__(self, settings, seed): pass
    def choose(self, job, replicas): return "replica-7"
class Third:
    def __init__(self, settings, drafters, seed): pass
    def choose(self, newcomer): return 2
class Stuck:
    def __init__(self, settings, max_num_seqs): pass
    def play(self, round_, left, policy, replay):
        from simulator.rounds.protocols import Played
        none = np.zeros(round_.active, dtype=np.int64)
        return Played(none, none, none, 0.0, 0.1, 0.1)
class Backwards:
    def __init__(self, settings, model): pass
    def step_seconds(self, batch, new_tokens, context_tokens): return -1.0 + 0.0 * (batch + new_tokens +
    context_tokens)
class Empty:
    def __init__(self, settings, *rest): settings["needed"]
"""
NONE = {"policy": "none"}
GROUPS = {
    "paceline.batching": {"bad": "my_package:no_number", "empty": "my_package:Empty"},
    "paceline.replica_routing": {"bad": "my_package:Nowhere"},
    "paceline.drafter_routing": {"bad": "my_package:Third"},
    "paceline.placement": {"bad": "my_package:Stuck"},
    "paceline.costs": {"bad": "my_package:Backwards"},
}


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        (
            {"batching": {"policy": "plugin:bad"}},
            "batching.policy: plugin 'bad' must give a number for every request",
        ),
        (
            {"batching": {"policy": "plugin:bat"}},
            "no entry point of group 'paceline.batching' is called 'bat'; did you",
        ),
        ({"batching": {"policy": "plugin:empty"}}, "batching.policy.settings: plugin 'empty' does not take them"),
        (
            {"routing": {"replica": {"policy": "plugin:bad"}}, "replica": [{"count": 2}]},
            "routing.replica.policy: plugin 'bad' must choose one of the 2 replicas",
        ),
        (
            {"routing": {"drafter": {"policy": "plugin:bad", "drafters": ["drafter"]}}, "drafter": None},
            "routing.drafter.policy: plugin 'bad' must choose a drafter by its number, from 0 to 0, got 2",
        ),
        (
            {"placement": {"kind": "plugin:bad"}},
            "placement.kind: plugin 'bad' must give a Played whose emitted is from 1",
        ),
        (
            {"stopping": NONE, "costs": {"verifier": {"kind": "plugin:bad"}}},
            "costs.verifier: plugin 'bad' must give seconds >= 0",
        ),
    ],
)
def test_what_breaks_its_contract_is_named(
    tables: dict[str, Any], message: str, traces: TraceSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, BROKEN, GROUPS)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    monkeypatch.delitem(sys.modules, "my_package", raising=False)
    with pytest.raises(PacelineError) as caught:
        run(traces, **tables)
    assert message in str(caught.value)
