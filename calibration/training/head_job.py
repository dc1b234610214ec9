"""The job file that trains heads on text that is there already, in TOML.

    out = "heads"

    [corpus]
    folder = "corpus"

    [training]
    tokens = 1_000_000

    [[head]]
    name = "medusa-4"
    kind = "medusa"
    shape = { tokens = 4 }

Every key is checked, and all faults are told at once with their places. Paths are relative to the file's folder.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import Field, model_validator

from calibration.common.errors import CalibrationError
from calibration.common.progress import StageProgress
from calibration.common.settings import Count, FromList, Table
from calibration.common.toml import check, read_toml
from calibration.models.load import Verifier
from calibration.traces.manifest import DecodingInfo
from calibration.trained.shapes import HeadKind, HeadSettings, HeadShape
from calibration.training.jobfile import Names, TrainingJob, name_faults, overlaid

if TYPE_CHECKING:
    from calibration.trained.corpus import Text


class TextTable(Table):
    """The training text: a corpus that `calibration.trained.corpus.write_corpus` wrote, or a folder of them.

    ``domains`` None takes all, ``texts_per_domain`` limits each. The first ``held_out`` texts of each domain are kept
    from training, for the learning curve.
    """

    folder: str
    domains: Names | None = None
    texts_per_domain: Count | None = None
    held_out: Count = 2


class HeadTable(Table):
    """One head: its folder's name, its kind and shape, and what it trains otherwise than ``[training]`` says."""

    name: str
    kind: HeadKind
    shape: HeadShape = HeadShape()
    training: HeadSettings | None = None


class HeadsJob(TrainingJob):
    """One job: a verifier, training text, and heads."""

    corpus: TextTable
    training: HeadSettings = HeadSettings()
    head: Annotated[tuple[HeadTable, ...], FromList, Field(min_length=1)]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        faults = []
        names = [head.name for head in self.head]
        for number, head in enumerate(self.head):
            faults += name_faults("head", names, number)
            try:
                head.shape.checked(head.kind)
            except CalibrationError as fault:
                faults.append(f"head[{number}].shape: {fault}")
        if faults:
            raise ValueError("\n".join(faults))
        return self

    def settings(self, head: HeadTable) -> HeadSettings:
        """Give how `head` is trained: the job's settings, and over them its own."""
        return overlaid(self.training, head.training)


def load_heads_job(path: str | os.PathLike[str]) -> tuple[HeadsJob, Path]:
    """Read the job in the TOML file at `path`; give it with its paths made absolute, and its output folder.

    `CalibrationError` names every fault with its place.
    """
    return parse_heads_job(read_toml(path, CalibrationError), where=str(path), folder=Path(path).parent)


def parse_heads_job(
    data: Mapping[str, Any], *, where: str = "heads job", folder: Path | str = "."
) -> tuple[HeadsJob, Path]:
    """Give the job in `data` and its output folder; relative paths begin at `folder`."""
    return check(HeadsJob, data, where, CalibrationError).placed(folder)


def run_heads(job: HeadsJob, out: Path | str, progress: StageProgress | None = None) -> list[Path]:
    """Train every head of `job` into ``<out>/<name>``; give these folders, each a trained drafter with ``curve.csv``.

    Finished heads stay; one under way goes on from its last checkpoint. `CalibrationError` where the job does not fit
    what the folder holds.
    """
    return train_all(job, job.verifier.load(progress), Path(out), progress)


def train_all(job: HeadsJob, verifier: Verifier, out: Path, progress: StageProgress | None = None) -> list[Path]:
    """Train the heads of `job` with a `verifier` that is loaded."""
    from calibration.training.head_train import train_head

    texts, held_out, decoding = read_texts(job.corpus, verifier)
    folders = []
    for head in job.head:
        folder, settings = out / head.name, job.settings(head)
        folders.append(folder)
        if (folder / "curve.csv").is_file():
            _same(folder, head, head.shape.for_verifier(head.kind, verifier), settings)
        else:
            train_head(
                kind=head.kind,
                verifier=verifier,
                shape=head.shape,
                texts=texts,
                held_out=held_out,
                decoding=decoding,
                settings=settings,
                folder=folder,
                progress=progress,
            )
    return folders


def read_texts(table: TextTable, verifier: Verifier) -> tuple[list[Text], list[Text], DecodingInfo]:
    """Read the texts to train on, those held out, and how they were written.

    `CalibrationError` where there are none, not all were written alike, or the states are of another size.
    """
    from calibration.trained.corpus import find_corpora, read_corpora

    folder = Path(table.folder)
    by_domain, decoding = read_corpora(find_corpora(folder))
    texts: list[Text] = []
    held_out: list[Text] = []
    for domain in table.domains or tuple(by_domain):
        mine = by_domain.get(domain, [])[: table.texts_per_domain]
        if len(mine) <= table.held_out:
            rule = f"must hold more than {table.held_out} texts of {domain}"
            raise CalibrationError(f"{folder}: {rule}, got {len(mine)}")
        held_out += mine[: table.held_out]
        texts += mine[table.held_out :]
    _check_states(folder, texts[0], verifier)
    return texts, held_out, decoding


def _check_states(folder: Path, text: Text, verifier: Verifier) -> None:
    size = verifier.model.config.hidden_size
    if text.states.shape[1] != size:
        rule = f"must hold states of the verifier '{verifier.info.name}' with hidden size {size}"
        raise CalibrationError(f"{folder}: {rule}, got {text.states.shape[1]}")


def _same(folder: Path, head: HeadTable, shape: HeadShape, settings: HeadSettings) -> None:
    from calibration.trained.folder import read_about

    about = read_about(folder)
    wanted = {"kind": head.kind, "settings": shape.model_dump()}
    for key, value in wanted.items():
        if about[key] != value:
            raise CalibrationError(f"{folder}: holds a head with {key} = {about[key]}, got {value}")
    if about["recipe"]["settings"] != settings.model_dump():
        raise CalibrationError(f"{folder}: holds a head trained otherwise; choose another folder")
