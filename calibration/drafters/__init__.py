"""Drafters: every way to draft, each recorded into the same TraceSet.

A drafter is described by settings (a ``[[drafter]]`` of a job file), built for a verifier, and then drafts in a live
loop and says what it drafts from every start; see `calibration.models.drafter`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calibration.drafters.combined import MergedTrees, NgramBeforeModel, RetrievalFused
    from calibration.drafters.cut import EarlyExit, LayerSkip, kept_layers, submodel
    from calibration.drafters.distilled import Block, Distilled, Eagle, Kangaroo, Medusa
    from calibration.drafters.dynamic_exit import DynamicExit
    from calibration.drafters.foreign import Foreign
    from calibration.drafters.info import DrafterSettings
    from calibration.drafters.kinds import AnyDrafter, build_drafter, parse_drafter
    from calibration.drafters.nested import NestedExits
    from calibration.drafters.proposed import Memory, PromptLookup, Retrieval, Suffix, Trigram
    from calibration.drafters.standalone import Standalone, Trimmed
    from calibration.drafters.windowed import Windowed
    from calibration.models.drafter import Drafter

_HOME = {
    "AnyDrafter": "calibration.drafters.kinds",
    "Block": "calibration.drafters.distilled",
    "Distilled": "calibration.drafters.distilled",
    "Drafter": "calibration.models.drafter",
    "DrafterSettings": "calibration.drafters.info",
    "DynamicExit": "calibration.drafters.dynamic_exit",
    "Eagle": "calibration.drafters.distilled",
    "EarlyExit": "calibration.drafters.cut",
    "Foreign": "calibration.drafters.foreign",
    "Kangaroo": "calibration.drafters.distilled",
    "LayerSkip": "calibration.drafters.cut",
    "Medusa": "calibration.drafters.distilled",
    "Memory": "calibration.drafters.proposed",
    "MergedTrees": "calibration.drafters.kinds",
    "NestedExits": "calibration.drafters.nested",
    "NgramBeforeModel": "calibration.drafters.kinds",
    "PromptLookup": "calibration.drafters.proposed",
    "Retrieval": "calibration.drafters.proposed",
    "RetrievalFused": "calibration.drafters.kinds",
    "Standalone": "calibration.drafters.standalone",
    "Suffix": "calibration.drafters.proposed",
    "Trigram": "calibration.drafters.proposed",
    "Trimmed": "calibration.drafters.kinds",
    "Windowed": "calibration.drafters.kinds",
    "build_drafter": "calibration.drafters.kinds",
    "kept_layers": "calibration.drafters.cut",
    "parse_drafter": "calibration.drafters.kinds",
    "submodel": "calibration.drafters.cut",
}

__all__ = [
    "AnyDrafter",
    "Block",
    "Distilled",
    "Drafter",
    "DrafterSettings",
    "DynamicExit",
    "Eagle",
    "EarlyExit",
    "Foreign",
    "Kangaroo",
    "LayerSkip",
    "Medusa",
    "Memory",
    "MergedTrees",
    "NestedExits",
    "NgramBeforeModel",
    "PromptLookup",
    "Retrieval",
    "RetrievalFused",
    "Standalone",
    "Suffix",
    "Trigram",
    "Trimmed",
    "Windowed",
    "build_drafter",
    "kept_layers",
    "parse_drafter",
    "submodel",
]


def __getattr__(name: str) -> Any:
    # Settings must be readable without torch, which the drafters themselves need.
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'calibration.drafters' has no attribute '{name}'")
