"""Settings of a drafter: what a job file says of it, and what the manifest keeps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from calibration.common.settings import Table
from calibration.traces.manifest import DrafterInfo

if TYPE_CHECKING:
    from calibration.models.drafter import Drafter
    from calibration.models.load import Verifier


class DrafterSettings(Table):
    """One ``[[drafter]]`` of a job. ``name`` is how the TraceSet calls it; each kind has a default of its own."""

    paradigm: ClassVar[str]
    name: str = ""

    @property
    def label(self) -> str:
        """Name in the manifest."""
        return self.name or self.default_name

    @property
    def default_name(self) -> str:
        """Name where none is given."""
        return self.paradigm

    def placed(self, folder: Path) -> Self:
        """Give the settings with relative paths (fields ``path`` and ``..._path``) begun at `folder`."""
        changes: dict[str, Any] = {}
        for field in type(self).model_fields:
            value = getattr(self, field)
            if isinstance(value, DrafterSettings):
                changes[field] = value.placed(folder)
            elif isinstance(value, str) and (field == "path" or field.endswith("_path")):
                changes[field] = str(folder / value)
        return self.model_copy(update=changes)

    def build(self, verifier: Verifier) -> Drafter:
        """Make the drafter for `verifier`; `CalibrationError` where it does not fit."""
        raise NotImplementedError

    def made_of(self, **settings: Any) -> DrafterInfo:
        """Describe a drafter that has no model of its own; `settings` make it reproducible."""
        return DrafterInfo(
            name=self.label,
            parameters=0,
            parameters_non_embedding=0,
            layers=0,
            paradigm=self.paradigm,
            deterministic=True,
            settings=settings,
        )


if TYPE_CHECKING:
    AnyDrafter = DrafterSettings
    """A drafter inside another's settings. `calibration.drafters.kinds`, which knows all kinds, gives pydantic their
    union under this name, so that no kind needs to import the others."""


class TrainedSettings(DrafterSettings):
    """A trained drafter: the folder ``path`` that `calibration.trained.folder.save_drafter` wrote."""

    path: str

    @property
    def default_name(self) -> str:
        """Name where none is given: the folder's."""
        return Path(self.path).name or self.paradigm
