"""Turn the text of a measured run into a TraceSet, with the acceptance of drafters that know tokens alone.

A drafter that proposes given tokens needs nothing but the text: where its rule is known, what it drafts, and how much
of that is accepted, is known before any engine runs with it. Text and prompts come from a run without speculation;
costs are not in the set, they come from the steps of such runs (``[costs.verifier] kind = "observed"``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from calibration.common.errors import TraceError
from calibration.measured.run import MeasuredRun
from calibration.observe.prompts import Prompt
from calibration.proposers.draft_trees import proposals, run_lengths
from calibration.proposers.lookup import LookupSettings
from calibration.proposers.make import Settings, maker
from calibration.traces import DecodingInfo, DrafterInfo, Manifest, ModelInfo, PromptSource, TraceSet, make_table


@dataclass(frozen=True)
class TokenDrafter:
    """A drafter of given tokens: what the TraceSet calls it, and the settings of its proposer.

    Proposals are recorded as deep as the settings allow, so that one drafter serves every shorter draft length.
    """

    name: str
    settings: Settings = LookupSettings()  # noqa: RUF009

    @property
    def info(self) -> DrafterInfo:
        """Its entry in the manifest."""
        lookup = isinstance(self.settings, LookupSettings)
        paradigm = "prompt-lookup" if lookup else type(self.settings).__name__.removesuffix("Settings").lower()
        told = {key: value for key, value in asdict(self.settings).items() if key != "max_draft_tokens"}
        if lookup:
            told["match"] = "earliest"
        return DrafterInfo(
            name=self.name,
            paradigm=paradigm,
            deterministic=True,
            max_draft_tokens=self.settings.max_draft_tokens,
            parameters=0,
            parameters_non_embedding=0,
            layers=0,
            settings=told,
        )


@dataclass(frozen=True)
class Text:
    """A sequence: its prompt, and what the verifier wrote."""

    prompt: Prompt
    output_ids: tuple[int, ...]


def import_measured_run(
    run: MeasuredRun,
    prompts: Sequence[Prompt],
    drafters: Sequence[TokenDrafter] = (TokenDrafter("prompt-lookup"),),
    *,
    sources: Sequence[PromptSource] = (),
    command: str = "",
) -> TraceSet:
    """Give the TraceSet of a run without speculation; one sequence for every prompt that it served.

    The text is that of the first repeat: of the first request of a prompt, or of a longer one that agrees with it. A
    note says how many other requests received another text. `prompts` hold the token ids, by sequence id; `sources`
    says where they come from. Replay is exact for every draft length (greedy decoding).

    Raises:
        TraceError: a run with speculation, without token ids, or with a prompt that is not among `prompts`.
    """
    where = f"measured run {run.manifest.name}"
    if any(value for value in run.requests["drafted_tokens"].to_pylist()):
        raise TraceError(f"{where}: must be a run without speculation, requests.parquet has drafted tokens")
    known = {prompt.sequence_id: prompt for prompt in prompts}
    texts, note = _texts(run, known, where)
    manifest = Manifest(
        paceline_version=run.manifest.paceline_version,
        kind="recorded",
        created=run.manifest.created,
        command=command or run.manifest.command,
        seed=None,
        verifier=ModelInfo(name=run.manifest.model),
        drafters=tuple(drafter.info for drafter in drafters),
        decoding=DecodingInfo(mode="greedy"),
        device=run.manifest.device,
        software=run.manifest.software,
        prompts=tuple(sources) or _counted(texts),
        notes=(f"text: of the measured run {run.manifest.name} on {_engine(run)}", note),
    )
    return TraceSet.build(manifest, _tables(texts, drafters))


def _engine(run: MeasuredRun) -> str:
    engine = run.manifest.engine
    return engine.name if engine.version is None else f"{engine.name} {engine.version}"


def _texts(run: MeasuredRun, prompts: Mapping[str, Prompt], where: str) -> tuple[list[Text], str]:
    """Give the text of every prompt in the order in which the run has them, and a note on how far it repeats."""
    columns = ("repeat", "request_id", "sequence_id", "prompt_tokens", "output_token_ids")
    rows = sorted(run.requests.select(columns).to_pylist(), key=lambda row: (row["repeat"], row["request_id"]))
    found: dict[str, tuple[int, ...]] = {}
    first: dict[str, int] = {}
    others = differ = 0
    for row in rows:
        name, ids = row["sequence_id"], row["output_token_ids"]
        if ids is None:
            raise TraceError(f"{where}: output_token_ids must be recorded, request {row['request_id']} has none")
        if name not in prompts or len(prompts[name].token_ids or ()) != row["prompt_tokens"]:
            got = f"{len(prompts[name].token_ids or ())} tokens" if name in prompts else "no such prompt"
            rule = f"prompts must hold the {row['prompt_tokens']} token ids of '{name}'"
            raise TraceError(f"{where}: {rule}, got {got}")
        if name in found:
            others += 1
            both = min(len(ids), len(found[name]))
            if tuple(ids[:both]) != found[name][:both]:
                differ += 1
            elif row["repeat"] == first[name] and len(ids) > both:
                found[name] = tuple(ids)
            continue
        found[name], first[name] = tuple(ids), row["repeat"]
    note = f"text repeats: {others} further requests of these prompts, of which {differ} received another text"
    return [Text(prompts[name], ids) for name, ids in found.items()], note


def _counted(texts: Iterable[Text]) -> tuple[PromptSource, ...]:
    """Give a prompt source for each domain, where nothing is known about their files."""
    counts: dict[str, int] = {}
    for text in texts:
        counts[text.prompt.domain] = counts.get(text.prompt.domain, 0) + 1
    return tuple(
        PromptSource(name="measured run", sha256=None, domain=domain, prompts=count)
        for domain, count in counts.items()
    )


def _tables(texts: Sequence[Text], drafters: Sequence[TokenDrafter]) -> dict[str, Any]:
    sequences = {
        "sequence_id": [text.prompt.sequence_id for text in texts],
        "domain": [text.prompt.domain for text in texts],
        "prompt_tokens": [len(text.prompt.token_ids or ()) for text in texts],
        "output_tokens": [len(text.output_ids) for text in texts],
        "finish_reason": ["length"] * len(texts),
        "prompt_token_ids": [list(text.prompt.token_ids or ()) for text in texts],
        "output_token_ids": [list(text.output_ids) for text in texts],
    }
    positions: dict[str, list[Any]] = {name: [] for name in _POSITIONS}
    for drafter in drafters:
        make = maker(drafter.settings)
        depth = drafter.settings.max_draft_tokens
        for text in texts:
            drafts = proposals(make(), text.prompt.token_ids or (), text.output_ids, depth)
            runs = run_lengths(drafts, text.output_ids)
            trees = any(draft.parents is not None for draft in drafts)
            count = len(text.output_ids)
            positions["sequence_id"] += [text.prompt.sequence_id] * count
            positions["drafter"] += [drafter.name] * count
            positions["position"] += range(count)
            positions["run_length"] += runs.run.tolist()
            positions["proposal_length"] += runs.depth.tolist()
            nodes = [row[:deep].tolist() for row, deep in zip(runs.nodes, runs.depth.tolist(), strict=True)]
            positions["proposal_nodes"] += nodes if trees else [None] * count
    return {"sequences": make_table("sequences", sequences), "positions": make_table("positions", positions)}


_POSITIONS = ("sequence_id", "drafter", "position", "run_length", "proposal_length", "proposal_nodes")
