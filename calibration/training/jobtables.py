"""What the job files of trainings have in common: the verifier's table, names, paths, and settings over settings."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Self, TypeVar

from pydantic import Field

from calibration.common.progress import StageProgress
from calibration.common.settings import FromList, Table
from calibration.models.load import DeviceChoice, DtypeChoice, Verifier, load_verifier
from calibration.trained.settings import TrainSettings

Names = Annotated[tuple[str, ...], FromList, Field(min_length=1)]
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_PATHS = ("folder", "prompt_file")
"""Keys of ``[corpus]`` that are paths."""

Settings = TypeVar("Settings", bound=TrainSettings)


class VerifierTable(Table):
    """The verifier, and how it is loaded."""

    name: str = "smollm2-135m"
    device: DeviceChoice = "auto"
    dtype: DtypeChoice = "auto"
    device_map: str | None = None

    def load(self, progress: StageProgress | None = None) -> Verifier:
        """Load the verifier."""
        return load_verifier(
            self.name, device=self.device, dtype=self.dtype, device_map=self.device_map, progress=progress
        )


class TrainingJob(Table):
    """A verifier, training text, and what is made of them in the folder ``out``."""

    out: str
    verifier: VerifierTable = VerifierTable()
    corpus: Table

    def placed(self, folder: Path | str) -> tuple[Self, Path]:
        """Give the job and its output folder, paths that were relative to `folder` made absolute."""
        root = Path(folder).resolve()
        paths = {key: str(root / path) for key in _PATHS if (path := getattr(self.corpus, key, None)) is not None}
        changes: dict[str, Table] = {"corpus": self.corpus.model_copy(update=paths)}
        if (root / self.verifier.name).is_dir():
            changes["verifier"] = self.verifier.model_copy(update={"name": str(root / self.verifier.name)})
        return self.model_copy(update=changes), root / self.out


def name_faults(key: str, names: Sequence[str], number: int) -> list[str]:
    """Say what is wrong with the name of the table `number` of ``[[key]]``, if anything is."""
    name, place = names[number], f"{key}[{number}].name"
    if not _NAME.fullmatch(name):
        return [f"{place}: must be a file name (letters, digits, . _ -), got '{name}'"]
    return [f"{place}: must be unique, got '{name}'"] if name in names[:number] else []


def overlaid(settings: Settings, own: Settings | None) -> Settings:
    """Give `settings`, and over them what `own` gives itself."""
    changes = {} if own is None else {name: getattr(own, name) for name in own.model_fields_set}
    return settings.model_copy(update=changes)
