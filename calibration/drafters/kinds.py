"""Every kind of drafter by its name: for the command line (``exit-20``), for job files (``kind = "early-exit"``)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from calibration.common.errors import CalibrationError, did_you_mean
from calibration.common.plugins import by_name
from calibration.drafters.combined import MergedTrees, NgramBeforeModel, RetrievalFused
from calibration.drafters.cut import EarlyExit, LayerSkip
from calibration.drafters.distilled import Block, Distilled, Eagle, Kangaroo, Medusa
from calibration.drafters.dynamic_exit import DynamicExit
from calibration.drafters.foreign import Foreign
from calibration.drafters.info import DrafterSettings
from calibration.drafters.nested import NestedExits
from calibration.drafters.proposed import FromOutside, Memory, PromptLookup, Retrieval, Suffix, Trigram
from calibration.drafters.standalone import Standalone, Trimmed
from calibration.drafters.windowed import Windowed
from calibration.models.load import Verifier

if TYPE_CHECKING:
    from calibration.models.drafter import Drafter

AnyDrafter = Annotated[
    PromptLookup
    | Standalone
    | Foreign
    | Trimmed
    | Windowed
    | EarlyExit
    | LayerSkip
    | DynamicExit
    | NestedExits
    | Distilled
    | Kangaroo
    | Suffix
    | Retrieval
    | Trigram
    | Memory
    | NgramBeforeModel
    | MergedTrees
    | RetrievalFused
    | Medusa
    | Eagle
    | Block
    | FromOutside,
    Field(discriminator="kind"),
    by_name("kind", "plugin"),
]
"""What a ``[[drafter]]`` of a job file can be."""

for _kind in (
    Trimmed,
    Windowed,
    NgramBeforeModel,
    MergedTrees,
    RetrievalFused,
):  # made of other kinds, which are known only now
    _kind.model_rebuild(_types_namespace={"AnyDrafter": AnyDrafter})


def parse_drafter(text: str) -> DrafterSettings:
    """Read ``prompt-lookup``, ``exit-L`` or ``skip-A-B``; `CalibrationError` for anything else."""
    if text == "prompt-lookup":
        return PromptLookup()
    if found := re.fullmatch(r"exit-(\d+)", text):
        return EarlyExit(layers=int(found[1]))
    if found := re.fullmatch(r"skip-(\d+)-(\d+)", text):
        return LayerSkip(first=int(found[1]), stop=int(found[2]))
    hint = did_you_mean(text, ("prompt-lookup", "exit-L", "skip-A-B"))
    raise CalibrationError(
        f"drafter '{text}': must be prompt-lookup, exit-L or skip-A-B (others are set in a job file){hint}"
    )


def build_drafter(settings: DrafterSettings, verifier: Verifier) -> Drafter:
    """Make the drafter that `settings` describe for `verifier`; `CalibrationError` where it does not fit."""
    return settings.build(verifier)
