"""A file whose marked part is the table of errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from calibration.common.errors import ReportError
from studies.pages.fidelity import BEGIN, END, replaced, write_between


def test_only_the_marked_part_of_a_file_changes(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n", encoding="utf-8")
    write_between(path, "| new |\n")
    assert path.read_text(encoding="utf-8") == f"before\n{BEGIN}\n| new |\n{END}\nafter\n"
    with pytest.raises(ReportError, match="once each"):
        replaced("no marks", "| new |\n", "README.md")
