"""Drafters: every way to draft, each recorded into the same TraceSet.

A drafter is described by settings (a ``[[drafter]]`` of a job file), built for a verifier, and then drafts in a live
loop and says what it drafts from every start; see `calibration.drafters.protocol`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calibration.drafters.combined import MergedTrees, NgramBeforeModel, RetrievalFused
    from calibration.drafters.cut import EarlyExit, LayerSkip, kept_layers, submodel
    from calibration.drafters.distilled import Distilled
    from calibration.drafters.dynamic_exit import DynamicExit
    from calibration.drafters.foreign import Foreign
    from calibration.drafters.heads import Block, Eagle, Medusa
    from calibration.drafters.info import DrafterSettings
    from calibration.drafters.kangaroo import Kangaroo
    from calibration.drafters.kinds import AnyDrafter, build_drafter, parse_drafter
    from calibration.drafters.lookup import PromptLookup
    from calibration.drafters.nested_exits import NestedExits
    from calibration.drafters.proposed import Memory, Retrieval, Suffix, Trigram
    from calibration.drafters.protocol import Drafter
    from calibration.drafters.standalone import Standalone
    from calibration.drafters.trimmed import Trimmed
    from calibration.drafters.windowed import Windowed

_HOME = {
    "AnyDrafter": "kinds",
    "Block": "heads",
    "Distilled": "distilled",
    "Drafter": "protocol",
    "DrafterSettings": "info",
    "DynamicExit": "dynamic_exit",
    "Eagle": "heads",
    "EarlyExit": "cut",
    "Foreign": "foreign",
    "Kangaroo": "kangaroo",
    "LayerSkip": "cut",
    "Medusa": "heads",
    "Memory": "proposed",
    "MergedTrees": "kinds",
    "NestedExits": "nested_exits",
    "NgramBeforeModel": "kinds",
    "PromptLookup": "lookup",
    "Retrieval": "proposed",
    "RetrievalFused": "kinds",
    "Standalone": "standalone",
    "Suffix": "proposed",
    "Trigram": "proposed",
    "Trimmed": "kinds",
    "Windowed": "kinds",
    "build_drafter": "kinds",
    "kept_layers": "cut",
    "parse_drafter": "kinds",
    "submodel": "cut",
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
        return getattr(importlib.import_module(f"calibration.drafters.{_HOME[name]}"), name)
    raise AttributeError(f"module 'calibration.drafters' has no attribute '{name}'")
