"""Every example of the verification guide runs as it stands and prints what the guide says."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "verification.md"
TEXT = GUIDE.read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```\n\n```text\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)


def test_every_example_has_its_output() -> None:
    assert len(EXAMPLES) == TEXT.count("```python") >= 6


@pytest.mark.parametrize(("code", "shown"), EXAMPLES)
def test_example(code: str, shown: str) -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, GUIDE.name, "exec"), {})
    assert printed.getvalue() == shown


def test_every_public_name_of_a_rule_is_in_the_guide() -> None:
    import calibration.verification as verification

    rules = [name for name in verification.__all__ if hasattr(getattr(verification, name), "lossless")]
    assert {"Naive", "Judge"} <= set(rules)
    assert [name for name in rules if name != "Rule" and f"`{name}" not in TEXT] == []
