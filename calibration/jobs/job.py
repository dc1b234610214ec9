"""The recording job: from names of models and prompts to a TraceSet, shard by shard, resumable.

A shard is one batch of prompts. Every finished shard is written at once into ``<out>.partial/``; an interrupted job
goes on from there, and `out` itself appears whole or not at all. Step times come last, and can be taken anew with
`record_timings` when the machine is quiet. A long-context study, where one is asked for, runs once all shards are
there; its table lies beside `out` (`calibration.jobs.long_context_job`).
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.common.errors import CalibrationError, did_you_mean, require
from calibration.common.fetch import Advance
from calibration.common.progress import StageProgress
from calibration.common.version import paceline_version
from calibration.models.load import DeviceChoice, DtypeChoice, Verifier, load_verifier
from calibration.prompts import PromptFile, load_prompts, read_prompt_file
from calibration.recording.shards import Partial
from calibration.traces import DecodingInfo, Manifest, PromptSource, TraceSet, make_table

if TYPE_CHECKING:
    from calibration.drafters.info import DrafterSettings
    from calibration.jobs.long_context_job import LongContextTable
    from calibration.models.drafter import Drafter
    from calibration.recording.record import Recording, Request
    from calibration.timing import TimingGrid

_NOT_IDENTITY = (
    "command",
    "drafters",
    "timings",
    "timing_repeats",
    "grid",
    "long_context",
    "prompt_file",
    "device",
    "dtype",
    "device_map",
)


@dataclass(frozen=True)
class CalibrationSettings:
    """What to record.

    ``temperature`` 0 is greedy. ``prompt_file`` None takes the bundled prompts, of which ``domains`` and
    ``limit_per_domain`` select. ``gamma_max`` and ``rollout_stride`` rule the drafters' own free runs (steps of each,
    and at every how many positions one starts; stride 0 records none). ``command`` is the command line that the
    manifest shows. Drafters are settings, or names that `calibration.drafters.parse_drafter` reads. ``device_map``
    spreads the verifier over several devices. ``grid`` says which steps are timed (None: the standard ones).
    ``long_context`` is the long-context study of one of the drafters (None: none).
    """

    verifier: str = "smollm2-135m"
    drafters: tuple[str | DrafterSettings, ...] = ("prompt-lookup", "exit-20", "exit-26", "skip-13-17")
    prompt_file: Path | None = None
    domains: tuple[str, ...] | None = None
    limit_per_domain: int | None = None
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    batch_size: int = 8
    gamma_max: int = 8
    rollout_stride: int = 8
    timings: bool = True
    timing_repeats: int = 5
    device: DeviceChoice = "auto"
    dtype: DtypeChoice = "auto"
    device_map: str | None = None
    grid: TimingGrid | None = None
    long_context: LongContextTable | None = None
    command: str = "calibration.jobs.job.calibrate"

    def __post_init__(self) -> None:
        """Check the values; `CalibrationError` names every fault."""
        least = {"max_new_tokens": 1, "batch_size": 1, "gamma_max": 1, "timing_repeats": 1, "rollout_stride": 0}
        least["seed"] = 0
        faults = [
            f"{k}: must be >= {low}, got {getattr(self, k)}" for k, low in least.items() if getattr(self, k) < low
        ]
        if not 0 <= self.temperature < float("inf"):
            faults.append(f"temperature: must be >= 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            faults.append(f"top_p: must lie in (0, 1], got {self.top_p}")
        elif self.temperature == 0 and self.top_p != 1:
            faults.append(f"top_p: must be 1 where temperature is 0 (greedy), got {self.top_p}")
        if not self.drafters:
            faults.append("drafters: must name at least one, got none")
        names = [d if isinstance(d, str) else d.label for d in self.drafters]
        if len(set(names)) != len(names):
            faults.append(f"drafters: must be unique, got {', '.join(names)}")
        if self.long_context is not None and self.long_context.drafter not in names:
            chosen = self.long_context.drafter
            rule = "must be the name of one of the job's drafters"
            faults.append(f"long_context.drafter: {rule}, got '{chosen}'{did_you_mean(chosen, names)}")
        if faults:
            raise CalibrationError("\n".join(faults))

    @property
    def decoding(self) -> DecodingInfo:
        """How the verifier writes, as the manifest has it."""
        return DecodingInfo(
            mode="sampled" if self.temperature > 0 else "greedy",
            temperature=float(self.temperature),
            top_p=float(self.top_p),
            max_new_tokens=self.max_new_tokens,
        )


def calibrate(settings: CalibrationSettings, out: str | Path, progress: StageProgress | None = None) -> TraceSet:
    """Record the TraceSet that `settings` describe into the folder `out`; give it.

    ``progress(stage, done, total)`` is called for the stages "download ..." and "convert ..." (first use of a
    published verifier), "record" (tokens of every batch, written and read), "long contexts" and "time steps". The
    same settings and seed on the same machine give the same tables, timings apart, whether interrupted or not.

    Raises:
        CalibrationError: a setting, model or prompt cannot be used; `out` holds other files; ``<out>.partial`` holds
            a job with other settings.
        MissingExtraError: the extra ``calibration`` is not installed.
    """
    for module in ("torch", "transformers"):
        require(module)
    target = Path(out)
    _check_target(target)
    files = _prompt_files(settings)
    verifier, drafters = _load(settings, progress)
    requests = _requests(files, verifier, settings)
    study = None
    if settings.long_context is not None:
        from calibration.jobs.long_context_job import prepare_study

        study = prepare_study(settings.long_context, verifier, drafters, settings.seed)
    partial = Partial.open(target.with_name(target.name + ".partial"), _identity(settings, files, verifier, drafters))
    shards = [requests[i : i + settings.batch_size] for i in range(0, len(requests), settings.batch_size)]
    _record_shards(settings, verifier, drafters, shards, partial, progress)
    tables = partial.tables(len(shards))
    if study is not None:
        study.run(target, progress)
    if settings.timings:
        tables["timings"] = _timings(verifier, drafters, settings, progress)
    manifest = _manifest(settings, files, verifier, drafters, partial.facts(len(shards)))
    TraceSet.build(manifest, tables).write(target)
    partial.remove()
    return TraceSet.read(target)


def record_timings(
    settings: CalibrationSettings, folder: str | Path, progress: StageProgress | None = None
) -> TraceSet:
    """Take the step times of the TraceSet in `folder` anew, leaving its other tables as they are; give the new set.

    `settings` are those that it was recorded with; verifier, drafters and what to time count. `CalibrationError`
    where the set was recorded with other models or on another device.
    """
    require("torch")
    from calibration.traces.surroundings import device_info

    old = TraceSet.read(folder)
    verifier, drafters = _load(settings, progress)
    here = device_info(verifier.device)
    if verifier.info != old.manifest.verifier:
        raise CalibrationError(f"verifier: must be {old.manifest.verifier}, got {verifier.info}")
    if (here.name, here.kind) != (old.manifest.device.name, old.manifest.device.kind):
        raise CalibrationError(f"device: must be {old.manifest.device.name}, got {here.name}")
    names = tuple(drafter.name for drafter in drafters)
    if names != old.manifest.drafter_names:
        raise CalibrationError(f"drafters: must be {', '.join(old.manifest.drafter_names)}, got {', '.join(names)}")
    timings = _timings(verifier, drafters, settings, progress)
    manifest = old.manifest.model_copy(update={"device": here, "tables": {}})
    new = replace(old, manifest=manifest, timings=timings)
    TraceSet.build(manifest, {name: getattr(new, name) for name in ("sequences", "positions", "rollouts", "timings")})
    new.write(folder)
    return TraceSet.read(folder)


def _load(settings: CalibrationSettings, progress: StageProgress | None) -> tuple[Verifier, list[Drafter]]:
    """Load the verifier, and make its drafters."""
    from calibration.drafters import build_drafter, parse_drafter

    specs = [parse_drafter(d) if isinstance(d, str) else d for d in settings.drafters]
    verifier = load_verifier(
        settings.verifier,
        device=settings.device,
        dtype=settings.dtype,
        device_map=settings.device_map,
        progress=progress,
    )
    return verifier, [build_drafter(spec, verifier) for spec in specs]


def _check_target(target: Path) -> None:
    """Refuse a folder that could not be written at the end, before hours are spent."""
    if target.is_file() or (target.is_dir() and any(target.iterdir()) and not (target / "manifest.json").is_file()):
        raise CalibrationError(f"{target}: must be new, empty or an older TraceSet; it holds something else")


def _prompt_files(settings: CalibrationSettings) -> tuple[PromptFile, ...]:
    if settings.prompt_file is None:
        return load_prompts(settings.domains, settings.limit_per_domain)
    return read_prompt_file(settings.prompt_file, settings.domains, settings.limit_per_domain)


def _requests(files: Sequence[PromptFile], verifier: Verifier, settings: CalibrationSettings) -> list[Request]:
    """Encode every prompt; `CalibrationError` for one that the model's context cannot hold."""
    from calibration.recording.record import Request

    limit = getattr(verifier.model.config, "max_position_embeddings", None)
    requests = []
    for prompt in (prompt for file in files for prompt in file.prompts):
        ids = verifier.encode(prompt.text)
        if not ids or (limit is not None and len(ids) + settings.max_new_tokens > limit):
            rule = f"must have 1 to {limit} tokens with max_new_tokens = {settings.max_new_tokens}"
            raise CalibrationError(f"prompt '{prompt.id}': {rule}, got {len(ids)}")
        requests.append(Request(prompt.id, prompt.domain, tuple(ids)))
    return requests


def _identity(
    settings: CalibrationSettings, files: Sequence[PromptFile], verifier: Verifier, drafters: Sequence[Drafter]
) -> dict[str, Any]:
    """Everything that decides what the shards hold; a job goes on only where all of it is the same."""
    chosen = {f.name: getattr(settings, f.name) for f in fields(settings) if f.name not in _NOT_IDENTITY}
    chosen["drafters"] = [drafter.info.model_dump() for drafter in drafters]
    chosen["prompts"] = [[file.name, file.sha256, len(file.prompts)] for file in files]
    chosen["model"] = verifier.info.model_dump()
    chosen["device_kind"] = verifier.device.type
    return chosen


def _record_shards(
    settings: CalibrationSettings,
    verifier: Verifier,
    drafters: Sequence[Drafter],
    shards: Sequence[Sequence[Request]],
    partial: Partial,
    progress: StageProgress | None,
) -> None:
    """Generate and record every shard that `partial` does not hold yet; each has random numbers of its own."""
    report: StageProgress = progress or (lambda stage, done, total: None)
    unit = 2 * settings.max_new_tokens  # every token is written once and read once
    total = unit * len(shards)
    done = unit * sum(partial.has(number) for number in range(len(shards)))
    report("record", done, total)
    for number, shard in enumerate(shards):
        if partial.has(number):
            continue

        def advance(tokens: int, begun: int = done) -> None:
            nonlocal done
            done = min(done + tokens, begun + unit)
            report("record", done, total)

        begun = done
        recording = _record_shard(settings, verifier, drafters, number, shard, advance)
        facts = {"tokens": recording.tokens, "disagreements": recording.disagreements}
        partial.put(number, recording.tables, facts)
        done = begun + unit
        report("record", done, total)


def _record_shard(
    settings: CalibrationSettings,
    verifier: Verifier,
    drafters: Sequence[Drafter],
    number: int,
    shard: Sequence[Request],
    advance: Advance,
) -> Recording:
    """Let the verifier write the outputs of one batch of prompts, and everyone read them."""
    from calibration.models.lane import generate
    from calibration.models.sampling import generator_for
    from calibration.recording.record import record

    generator = generator_for(verifier.device, settings.seed, number)
    prompts = [request.prompt_ids for request in shard]
    limit, decoding = settings.max_new_tokens, settings.decoding
    outputs = generate(
        model=verifier.model,
        prompts=prompts,
        decoding=decoding,
        max_new_tokens=limit,
        end_ids=verifier.end_ids,
        generator=generator,
        advance=advance,
    )
    return record(
        verifier.model,
        drafters,
        shard,
        outputs,
        decoding,
        generator,
        gamma_max=settings.gamma_max,
        rollout_stride=settings.rollout_stride,
        advance=advance,
    )


def _timings(
    verifier: Verifier, drafters: Sequence[Drafter], settings: CalibrationSettings, progress: StageProgress | None
) -> Any:
    from calibration.timing import TimingGrid, measure

    grid = replace(settings.grid or TimingGrid(), repeats=settings.timing_repeats)
    return make_table("timings", measure(verifier.info.name, verifier.model, drafters, grid, progress))


def _manifest(
    settings: CalibrationSettings,
    files: Sequence[PromptFile],
    verifier: Verifier,
    drafters: Sequence[Drafter],
    facts: dict[str, int],
) -> Manifest:
    from calibration.traces.surroundings import device_info, software_versions

    sources = [
        PromptSource(name=file.name, sha256=file.sha256, domain=file.domain, prompts=len(file.prompts))
        for file in files
    ]
    return Manifest(
        paceline_version=paceline_version(),
        kind="recorded",
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=settings.command,
        seed=settings.seed,
        verifier=verifier.info,
        drafters=tuple(d.info for d in drafters),
        decoding=settings.decoding,
        device=device_info(verifier.device),
        software=software_versions(),
        prompts=tuple(sources),
        notes=tuple(_notes(settings, verifier, facts)),
    )


def _notes(settings: CalibrationSettings, verifier: Verifier, facts: dict[str, int]) -> list[str]:
    """What a reader must know beyond the fields of the manifest."""
    greedy = settings.decoding.mode == "greedy"
    notes = [verifier.provenance] if verifier.provenance else []
    wrong, tokens = facts["disagreements"], facts["tokens"]
    notes.append(f"rounding: the teacher-forced pass disagrees with {wrong} of {tokens} generated tokens")
    notes.append(
        "confidence, entropy and overlap: of the unmodified distributions (temperature 1)"
        if greedy
        else "confidence, entropy and overlap: of the distributions after temperature and top-p"
    )
    if settings.rollout_stride:
        kind = "greedy" if greedy else "sampled, one per start"
        steps = f"{settings.gamma_max} steps from every {settings.rollout_stride}th position on"
        notes.append(f"rollouts: the drafter's own free run ({kind}), {steps}")
    return notes
