"""The numbers about fidelity in README.md and docs/ are those that the bundled and the public measurements give."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
from shared_data import shared_data

from analysis.fidelity.measured import bundled_runs
from analysis.fidelity.table import Condition, Fidelity, errors_of
from analysis.fidelity.validate import read, validate
from reports.writing.validation import fidelity_markdown, fidelity_page
from studies.pages.fidelity import BEGIN, END

ROOT = Path(__file__).resolve().parent.parent.parent
WRITE_ANEW = "python -m studies.pages.fidelity FOLDER README.md docs"


@pytest.fixture(scope="module")
def stated() -> Fidelity:
    return read(ROOT / "docs")


def test_readme_and_page_say_what_the_file_says(stated: Fidelity) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme.split(BEGIN)[1].split(END)[0].strip()
    assert table == fidelity_markdown(stated).strip(), WRITE_ANEW
    assert (ROOT / "docs" / "fidelity.md").read_text(encoding="utf-8") == fidelity_page(stated), WRITE_ANEW


def same(found: Iterable[Condition], told: Iterable[Condition]) -> None:
    mine, theirs = ({(c.source, c.name): c for c in several} for several in (found, told))
    assert mine.keys() == theirs.keys(), WRITE_ANEW
    for key, one in mine.items():
        assert one.role == theirs[key].role
        for compared, other in zip(one.compared, theirs[key].compared, strict=True):
            assert compared.name == other.name
            assert compared.measured == pytest.approx(other.measured, rel=1e-6), (key, WRITE_ANEW)
            assert compared.predicted == pytest.approx(other.predicted, rel=1e-4), (key, WRITE_ANEW)


def test_bundled_measurements_give_these_numbers(stated: Fidelity) -> None:
    found = validate(bundled_runs(), workers=2)
    names = {source.name for source in found.sources}
    same(found.conditions, [c for c in stated.conditions if c.source in names])
    crossed = [c for c in stated.crossovers if c.source in names]
    assert [(c.measured, c.predicted) for c in found.crossovers] == [(c.measured, c.predicted) for c in crossed]


def test_public_measurements_give_these_numbers(stated: Fidelity) -> None:
    from studies.public import public_fidelity

    data = shared_data("specdecode-bench-simulator", "data", "llama3.1-8B", "combined_gsm8k.jsonl").parents[3]
    found = public_fidelity(data)
    names = {source.name for source in found.sources}
    same(found.conditions, [c for c in stated.conditions if c.source in names])


def test_enough_was_held_out(stated: Fidelity) -> None:
    """At least forty held-out conditions, twelve of them on the engine of others, some with arrivals of their own."""
    assert len(stated.held_out()) >= 40
    foreign = [c for s in stated.sources if s.name.startswith("openvino") for c in stated.held_out(s.name)]
    assert len(foreign) >= 12
    assert sum(c.open_loop for c in foreign) >= 3
    published = [s for s in stated.sources if s.kind == "published"]
    assert all(
        errors_of("output_throughput", stated.held_out(s.name)) or s.kind == "published" for s in stated.sources
    )
    assert len(published) >= 3
