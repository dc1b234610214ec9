"""A student distilled from the verifier: a small causal LM that uses the verifier's embedding and head.

Students are trained by `calibration.training`; only their own layers and final norm lie in their folder.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from calibration.common.errors import CalibrationError
from calibration.drafters.info import DrafterSettings, TrainedSettings
from calibration.models.load import Verifier, describe
from calibration.traces.manifest import DrafterInfo

if TYPE_CHECKING:
    from calibration.drafters.lanes import ModelDrafter


class Distilled(TrainedSettings):
    """The student in the folder `path`."""

    paradigm: ClassVar[str] = "distilled"
    kind: Literal["distilled"] = "distilled"

    def build(self, verifier: Verifier) -> ModelDrafter:
        """Load the student; `CalibrationError` where there is none, or it was made for another verifier."""
        from calibration.drafters.lanes import ModelDrafter
        from calibration.trained.folder import load_drafter
        from calibration.trained.students import KIND, load_student
        from calibration.trained.trainees import read_shape

        settings, tensors = load_drafter(self.path, KIND, verifier)
        shape = read_shape(self.path, settings)
        if shape.kind != "layers":
            raise CalibrationError(f"{self.path}: shape: must be of kind 'layers', got '{shape.kind}'")
        student = load_student(verifier, shape, tensors)
        return ModelDrafter(trained_info(self, student, self.path), student)


def trained_info(settings: DrafterSettings, model: Any, folder: str) -> DrafterInfo:
    """Describe a trained drafter: its shape, and the recipe that stands in its folder."""
    from calibration.trained.folder import read_about

    about = read_about(folder)
    told = {**settings.model_dump(mode="json", exclude={"kind", "name", "path"}), **about["settings"]}
    return DrafterInfo(
        **describe(settings.label, model).model_dump(),
        paradigm=settings.paradigm,
        deterministic=False,
        settings={**told, "recipe": about["recipe"]},
    )
