"""The fidelity page and the README's table: bundled measured runs and public measurements in one comparison.

``python -m studies.pages.fidelity FOLDER README.md docs``, with the folder of the public measurements, predicts
everything and writes the README's table, ``docs/fidelity.md`` and ``docs/fidelity.json``.
"""

from __future__ import annotations

import sys
from pathlib import Path

from analysis.fidelity.measured import bundled_runs
from analysis.fidelity.table import merged
from analysis.fidelity.validate import validate, write
from calibration.common.errors import ReportError
from calibration.common.files import write_whole
from reports.writing.validation import fidelity_markdown, fidelity_page
from studies.public import public_fidelity

BEGIN, END = "<!-- fidelity: begin -->", "<!-- fidelity: end -->"


def replaced(text: str, table: str, place: str) -> str:
    """Give `text` with what stands between the marks replaced by `table`; `ReportError` where it has no marks."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ReportError(f"{place}: must hold '{BEGIN}' and '{END}' once each, in this order")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table}{END}{after}"


def write_between(path: Path, table: str) -> None:
    """Put `table` between the marks in the file `path`, which changes whole or not at all."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as fault:
        raise ReportError(f"{path}: cannot be read ({fault.strerror or fault})") from None
    write_whole(path, replaced(text, table, str(path)))


def main(arguments: list[str]) -> None:
    """Predict everything; write the table, the page and the numbers."""
    data, readme, docs = (Path(one) for one in arguments)
    found = merged(validate(bundled_runs()), public_fidelity(data))
    write(found, docs)
    (docs / "conditions.csv").unlink()
    write_between(readme, fidelity_markdown(found))
    write_whole(docs / "fidelity.md", fidelity_page(found))


if __name__ == "__main__":
    main(sys.argv[1:])
