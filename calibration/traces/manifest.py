"""The manifest of a TraceSet: what was recorded, from which models, where, and how."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from calibration.common.errors import TraceError, did_you_mean
from calibration.common.secrets import Command
from calibration.common.settings import Count, Natural, Table

SCHEMA_VERSION = 2
"""TraceSet schema that this version writes, and the newest that it reads. 2 brought draft trees (`proposal_nodes`)
and drafters whose depth varies (`draft_layers`)."""

Grain = Literal["position", "round", "histogram", "aggregate"]
"""How finely an import tells acceptance: at every position; round by round; rounds counted by their length, request
by request; or only summed up over requests (counters, rates, a mean), so that rounds had to be synthesised."""

M = TypeVar("M", bound=BaseModel)


class ModelInfo(Table):
    """Shape of one model. ``None`` means unknown (an import), never zero.

    ``parameters`` counts everything once (tied embeddings too); ``parameters_non_embedding`` leaves the input
    embedding and the LM head out. ``dtype`` is that of the weights as they were run.
    """

    name: str
    parameters: Natural | None = None
    parameters_non_embedding: Natural | None = None
    layers: Natural | None = None
    hidden_size: Natural | None = None
    heads: Natural | None = None
    kv_heads: Natural | None = None
    vocabulary: Natural | None = None
    dtype: str | None = None


class DrafterInfo(ModelInfo):
    """A drafter: a model's shape plus how it drafts.

    ``paradigm`` is the field's word (``prompt-lookup``, ``early-exit``, ``layer-skip``, ``eagle``, ``ngram`` ...).
    ``deterministic`` drafters propose given tokens (a one-hot q), so run lengths replay under sampling as well.
    ``max_draft_tokens`` caps the recorded run lengths; ``None`` where they run to the end of the trajectory.
    ``settings`` holds what makes the drafter reproducible (exit layer, n-gram sizes ...).
    """

    paradigm: str
    deterministic: bool
    max_draft_tokens: Count | None = None
    settings: dict[str, Any] = Field(default_factory=dict)


class DecodingInfo(Table):
    """How the verifier's text was produced. ``temperature`` 0 is greedy; ``top_p`` 1 keeps the whole vocabulary."""

    mode: Literal["greedy", "sampled"]
    temperature: Annotated[float, Field(ge=0)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_new_tokens: Count | None = None


class DeviceInfo(Table):
    """Where it ran."""

    name: str
    kind: Literal["cpu", "cuda", "mps", "unknown"]
    memory_bytes: Count | None = None
    driver: str | None = None
    threads: Count | None = None


class PromptSource(Table):
    """One file of prompts: its name, the sha256 of its bytes, its domain and how many prompts were used."""

    name: str
    sha256: str | None
    domain: str
    prompts: Count


class LinearCost(Table):
    """Seconds of one step: base_s + per_token_s * new tokens + per_context_token_s * cached tokens.

    Both token counts are sums over the batch. A drafter is ``charged`` once for every lock-step draft step or once
    for every round, whatever its length (heads that propose several tokens in one go; published constants).
    """

    kind: Literal["linear"] = "linear"
    base_s: Annotated[float, Field(ge=0)]
    per_token_s: Annotated[float, Field(ge=0)] = 0.0
    per_context_token_s: Annotated[float, Field(ge=0)] = 0.0
    charged: Literal["per_step", "per_round"] = "per_step"


class FractionOfVerify(Table):
    """Seconds of drafting a round: a fraction of that round's verification (n-gram lookup on the host)."""

    kind: Literal["fraction_of_verify"] = "fraction_of_verify"
    fraction: Annotated[float, Field(ge=0)]


DrafterCost = Annotated[LinearCost | FractionOfVerify, Field(discriminator="kind")]


class CostConstants(Table):
    """Prices that came with an import instead of timings: stated by somebody, not measured here."""

    source: str
    verifier: LinearCost
    drafters: dict[str, DrafterCost] = Field(default_factory=dict)
    overhead_s: Annotated[float, Field(ge=0)] = 0.0


class TableInfo(Table):
    """One Parquet file of the set: how many rows it holds and the sha256 of its bytes."""

    rows: Natural
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Sealing(Table):
    """Tables whose sha256 was stated after the set was written, when (ISO 8601), and what was different before."""

    tables: tuple[str, ...]
    sealed: str
    reason: Literal["edited by hand", "no sha256 before"]


def sealings(stated: Mapping[str, str], found: Mapping[str, str]) -> tuple[Sealing, ...]:
    """Give what sealing says of the names in `found` (sha256 by name) stated otherwise or not at all."""
    when = datetime.now(UTC).isoformat(timespec="seconds")
    edited = tuple(name for name in found if name in stated and stated[name] != found[name])
    unstated = tuple(name for name in found if name not in stated)
    told = (
        Sealing(tables=edited, sealed=when, reason="edited by hand"),
        Sealing(tables=unstated, sealed=when, reason="no sha256 before"),
    )
    return tuple(one for one in told if one.tables)


class Manifest(Table):
    """Everything about a TraceSet that is not a table.

    ``kind`` is ``recorded`` (measured by ``paceline calibrate``) or ``imported`` (measured by others; see
    ``import_format``, ``import_grain``, `Grain`, and ``unknown``, the list of what could not be known). ``sealed``:
    see `calibration.traces.traceset.seal`. It and ``import_grain`` are left out of the file where there is none.
    """

    schema_version: Count = SCHEMA_VERSION
    paceline_version: str
    kind: Literal["recorded", "imported"]
    created: str
    command: Command
    seed: int | None
    verifier: ModelInfo
    drafters: Annotated[tuple[DrafterInfo, ...], Field(min_length=1)]
    decoding: DecodingInfo
    device: DeviceInfo
    software: dict[str, str] = Field(default_factory=dict)
    prompts: tuple[PromptSource, ...] = ()
    import_format: str | None = None
    import_grain: Grain | None = None
    unknown: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    costs: CostConstants | None = None
    tables: dict[str, TableInfo] = Field(default_factory=dict)
    sealed: tuple[Sealing, ...] = ()

    @model_serializer(mode="wrap")
    def _without_what_is_not_said(self, inner: SerializerFunctionWrapHandler) -> dict[str, Any]:
        data: dict[str, Any] = inner(self)
        for name in ("sealed", "import_grain"):
            if not data.get(name):
                data.pop(name, None)  # so that versions of the schema that do not know it read on
        return data

    @property
    def edited(self) -> tuple[str, ...]:
        """Tables that were edited by hand after the set was written."""
        hands = (one.tables for one in self.sealed if one.reason == "edited by hand")
        return tuple(dict.fromkeys(name for tables in hands for name in tables))

    def drafter(self, name: str) -> DrafterInfo:
        """Give the drafter called `name`; `TraceError` if there is none."""
        for info in self.drafters:
            if info.name == name:
                return info
        raise TraceError(f"drafter '{name}': not in this TraceSet{did_you_mean(name, self.drafter_names)}")

    @property
    def drafter_names(self) -> tuple[str, ...]:
        """Names of the drafters, in the order of recording."""
        return tuple(info.name for info in self.drafters)


def parse_manifest(text: str, path: Path) -> Manifest:
    """Read a manifest from JSON; `TraceError` names every fault, a newer schema version first of all."""
    manifest = parse_versioned(Manifest, text, path, SCHEMA_VERSION, "TraceSet")
    names = manifest.drafter_names
    if len(set(names)) != len(names):
        raise TraceError(f"{path}: drafters: names must be unique, got {list(names)}")
    return manifest


def parse_versioned(model: type[M], text: str, path: Path, newest: int, what: str) -> M:
    """Read JSON `text`, the manifest of a `what`, as a `model`; `TraceError` for every fault and any newer schema."""
    try:
        raw = json.loads(text)
    except json.JSONDecodeError as fault:
        raise TraceError(f"{path}:{fault.lineno}: not valid JSON ({fault.msg})") from None
    if not isinstance(raw, dict):
        raise TraceError(f"{path}: the manifest must be a JSON object, got {type(raw).__name__}")
    version = raw.get("schema_version")
    if isinstance(version, int) and version > newest:
        raise TraceError(
            f"{path}: schema_version must be at most {newest}, got {version}; "
            f"a newer paceline wrote this {what}, upgrade to read it"
        )
    try:
        return model.model_validate_json(text)
    except ValidationError as fault:
        lines = [
            f"{path}: {'.'.join(str(part) for part in error['loc']) or 'manifest'}: {error['msg']}"
            + ("" if isinstance(error["input"], dict | list) else f", got {error['input']!r}")
            for error in fault.errors()
        ]
        raise TraceError("\n".join(lines)) from None
