"""What a report can be made from is told by its files; anything else is an error that says what was sought."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from builders import iid_traces
from cascade_made import graded_by_difficulty
from fidelity_made import made_fidelity
from scenarios import scenario

from analysis.cascade import study_cascade
from analysis.common.records import to_json
from analysis.fidelity.validate import write as write_fidelity
from analysis.tuning import TuneSettings, tune
from analysis.tuning.write import write_findings
from calibration.common.errors import ReportError, ScenarioError
from reports.page.inputs import read_inputs
from simulator import Scenario, compare, replicate, simulate


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a TraceSet, a run, replications, a comparison and a validation."""
    root = tmp_path_factory.mktemp("given")
    traces = iid_traces(0.7, np.random.default_rng(1), sequences=6, output_tokens=20)
    traces.write(root / "set")
    plan = at(root, 2)
    simulate(plan).write(root / "run")
    replicate(plan, 2, workers=1).write(root / "several")
    compare(at(root, None), plan, replications=2, workers=1).write(root / "versus")
    write_fidelity(made_fidelity(), root / "validation")
    return root


def at(root: Path, draft_tokens: int | None) -> Scenario:
    """A scenario on the TraceSet in `root`."""
    load = {"kind": "poisson", "rate_rps": 2.0, "requests": 12}
    named = "plain" if draft_tokens is None else f"draft {draft_tokens}"
    return scenario(draft_tokens, workload=load, traces={"path": "set"}, name=named).placed(root)


def test_each_kind_is_told_by_its_files(folder: Path) -> None:
    read = read_inputs([folder / name for name in ("set", "run", "several", "versus", "validation")])
    assert list(read.traces) == list(read.folders) == ["set"]
    assert list(read.runs) == ["run"]
    assert read.replications["several"].told["replications"] == 2
    assert [one.name for one in read.comparisons["versus"].scenarios] == ["plain", "draft 2"]
    assert read.fidelities["validation"] == made_fidelity()
    # The same scenario was run, replicated and compared: it is one.
    assert list(read.scenarios) == ["draft 2", "plain"]
    assert read.created == max("2026-01-01T00:00:00+00:00", made_fidelity().created)


def test_the_file_itself_will_do_and_names_are_unique(folder: Path) -> None:
    read = read_inputs([folder / "validation" / "fidelity.json", folder / "validation"])
    assert list(read.fidelities) == ["validation", "validation-2"]


def test_a_bundled_name_is_a_traceset() -> None:
    read = read_inputs(["smollm2-135m-cpu-greedy"])
    assert list(read.traces) == ["smollm2-135m-cpu-greedy"]
    assert (read.folders["smollm2-135m-cpu-greedy"] / "manifest.json").is_file()


def test_what_is_nothing_says_what_was_sought(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello", encoding="utf-8")
    with pytest.raises(
        ReportError, match=r"looked for manifest\.json \(a TraceSet\); summary\.json .*got notes\.txt"
    ):
        read_inputs([tmp_path])
    with pytest.raises(ReportError, match="is no file that a report can read"):
        read_inputs([tmp_path / "notes.txt"])
    with pytest.raises(ReportError, match="did you mean 'smollm2-135m-cpu-greedy'"):
        read_inputs(["smollm2-135m-cpu-gredy"])
    with pytest.raises(ReportError, match="at least one"):
        read_inputs([])


def test_damaged_results_are_named(folder: Path, tmp_path: Path) -> None:
    for name, text in (("broken", "{"), ("hollow", "{}")):
        place = tmp_path / name
        place.mkdir()
        (place / "replications.json").write_text(text, encoding="utf-8")
    with pytest.raises(ReportError, match=r"replications\.json: is no JSON"):
        read_inputs([tmp_path / "broken"])
    with pytest.raises(ReportError, match=r"replications\.json: must have 'name'"):
        read_inputs([tmp_path / "hollow"])
    half = tmp_path / "half"
    half.mkdir()
    (half / "summary.json").write_text(json.dumps({}), encoding="utf-8")
    with pytest.raises(ScenarioError, match=r"scenario\.toml: is missing"):
        read_inputs([half])


def test_a_search_and_a_cascade_are_read_with_what_belongs_to_them(folder: Path, tmp_path: Path) -> None:
    plan = at(folder, None)
    found = tune(plan, TuneSettings(replications=3, workers=1, drafters=("drafter",), draft_tokens=(1, 2)))
    write_findings(found, plan, folder / "search")
    table = graded_by_difficulty(np.random.default_rng(1), 120)
    cascade = study_cascade(table, (1.0, 10.0), draws=200)
    (tmp_path / "cascade.json").write_text(to_json(cascade), encoding="utf-8")
    read = read_inputs([folder / "search", tmp_path])
    assert read.tuned["search"].findings == found
    assert list(read.cascades.values()) == [cascade]
    # The scenario of the best candidate finds the TraceSet from its own folder, and goes into the capacity plan.
    best = read.tuned["search"].best
    assert (best.locate(best.traces.path or "") / "manifest.json").is_file()
    (planned,) = read.scenarios.values()
    assert planned.name == f"tuned: {found.best.name}"
    assert planned.stopping == best.stopping
    assert planned.locate("set") == best.locate("set")
    assert read.created == "2026-01-01T00:00:00+00:00"
