"""The bundled families of distilled drafters: sizes, equal budgets, held-out prompts, curves, and what they show."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from calibration.jobs.jobfile import load_job
from calibration.prompts import load_prompts
from calibration.traces import TraceSet, bundled, bundled_path
from calibration.training.jobfile import TRAINING_DOMAINS, all_texts, load_distill_job

NAME = "smollm2-135m-cpu-distilled"
SPECIALISTS = {f"specialist-{d}": d for d in ("code", "mathematics", "science", "creative")}


@pytest.fixture(scope="module")
def traces() -> TraceSet:
    return bundled(NAME)


@pytest.fixture(scope="module")
def tokens_per_round(traces: TraceSet) -> pd.DataFrame:
    """Tokens per round of drafts of 4, bonus included: a row per drafter, a column per domain."""
    positions = traces.frame("positions")
    domains = traces.frame("sequences").set_index("sequence_id").domain
    rows: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for (drafter, sequence), part in positions.groupby(["drafter", "sequence_id"], sort=False):
        runs, t, rounds = part.run_length.to_numpy(), 1, 0
        while t < len(runs):
            t, rounds = t + min(int(runs[t]), 4) + 1, rounds + 1
        rows.setdefault((str(drafter), str(domains[sequence])), []).append((len(runs) - 1, rounds))
    table: dict[str, dict[str, float]] = {}
    for (drafter, domain), values in rows.items():
        tokens, rounds = np.sum(values, 0)
        table.setdefault(domain, {})[drafter] = tokens / rounds
    return pd.DataFrame(table)


def test_it_is_small_and_has_its_recipe_beside_it() -> None:
    folder = bundled_path(NAME)
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 4_000_000
    distill, _ = load_distill_job(folder / "recipe" / "distill.toml")
    record, _ = load_job(folder / "recipe" / "calibrate.toml")
    assert {s.name for s in distill.student} == {d.label for d in record.drafters if not isinstance(d, str)}


def test_the_sizes_span_what_they_promise(traces: TraceSet) -> None:
    whole = traces.manifest.verifier.parameters_non_embedding or 0
    infos = [info for info in traces.manifest.drafters if info.name.startswith("size-")]
    shares = sorted((info.parameters_non_embedding or 0) / whole for info in infos)
    assert len(shares) >= 5
    assert shares[0] == pytest.approx(0.007, abs=0.0005)
    assert shares[-1] == pytest.approx(0.2, abs=0.005)
    for info in infos:
        share = 100 * (info.parameters_non_embedding or 0) / whole
        assert float(info.name.removeprefix("size-")) == pytest.approx(share, abs=0.06)


def test_generalist_and_specialists_are_equal_but_for_their_text(traces: TraceSet) -> None:
    generalist = traces.manifest.drafter("size-6.7")
    for name, domain in SPECIALISTS.items():
        info = traces.manifest.drafter(name)
        assert info.parameters == generalist.parameters
        assert info.settings["shape"] == generalist.settings["shape"]
        recipe = info.settings["recipe"]
        assert recipe["settings"] == generalist.settings["recipe"]["settings"]
        assert recipe["tokens"] == pytest.approx(generalist.settings["recipe"]["tokens"], rel=0.005)
        assert recipe["domains"] == [domain]
    assert set(generalist.settings["recipe"]["domains"]) == set(TRAINING_DOMAINS)


def test_the_prompts_were_held_out() -> None:
    recorded = {" ".join(p.text.split()) for file in load_prompts() for p in file.prompts}
    trained = {" ".join(text.split()) for domain in TRAINING_DOMAINS for text in all_texts(domain)}
    assert not recorded & trained


def test_curves_end_where_the_recipe_says(traces: TraceSet) -> None:
    with (bundled_path(NAME) / "recipe" / "curves.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for info in traces.manifest.drafters:
        mine = [row for row in rows if row["student"] == info.name]
        assert [int(row["tokens"]) for row in mine] == sorted(int(row["tokens"]) for row in mine)
        assert float(mine[-1]["match"]) == info.settings["recipe"]["held_out"]["match"]
        assert float(mine[-1]["match"]) > float(mine[1]["match"]) > float(mine[0]["match"])


def test_larger_drafters_match_more(traces: TraceSet) -> None:
    infos = sorted(
        (info for info in traces.manifest.drafters if info.name.startswith("size-")),
        key=lambda info: info.parameters_non_embedding or 0,
    )
    matches = traces.frame("positions").assign(match=lambda p: p.emitted_rank == 0).groupby("drafter").match.mean()
    values = [float(matches[info.name]) for info in infos]
    assert all(small < large for small, large in itertools.pairwise(values))


def test_specialists_win_at_home_and_lose_elsewhere(tokens_per_round: pd.DataFrame) -> None:
    generalist = tokens_per_round.loc["size-6.7"]
    for name, domain in SPECIALISTS.items():
        mine = tokens_per_round.loc[name]
        assert mine[domain] > generalist[domain]
        assert (mine.drop(domain) < generalist.drop(domain)).all()


def test_documented_numbers_are_those_of_the_traces(tokens_per_round: pd.DataFrame) -> None:
    """The table of docs/measured.md."""
    text = (Path(__file__).resolve().parents[2] / "docs" / "measured.md").read_text(encoding="utf-8")
    columns = ["chat", "code", "mathematics", "science", "creative", "grounded"]
    for name, row in tokens_per_round.iterrows():
        line = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
        told = [float(cell.strip(" *")) for cell in line.split("|")[4:10]]
        assert told == [round(float(row[column]), 3) for column in columns]
