"""The TraceSet contract: read, write and check recorded behaviour. No torch needed.

>>> from calibration.traces import bundled
>>> traces = bundled("smollm2-135m-cpu-greedy")
>>> traces.manifest.verifier.layers
30
"""

from calibration.traces.manifest import (
    SCHEMA_VERSION,
    DecodingInfo,
    DeviceInfo,
    DrafterInfo,
    Manifest,
    ModelInfo,
    PromptSource,
)
from calibration.traces.traceset import TraceSet, bundled, bundled_names, bundled_path
from calibration.traces.validate import TABLES, arrow_schema, make_table

__all__ = [
    "SCHEMA_VERSION",
    "TABLES",
    "DecodingInfo",
    "DeviceInfo",
    "DrafterInfo",
    "Manifest",
    "ModelInfo",
    "PromptSource",
    "TraceSet",
    "arrow_schema",
    "bundled",
    "bundled_names",
    "bundled_path",
    "make_table",
]
