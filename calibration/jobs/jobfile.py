"""The job file of ``paceline calibrate``: what to record, in TOML.

    verifier = "smollm2-135m"
    out = "traces/pair"

    [[drafter]]
    kind = "early-exit"
    layers = 24

Every key is checked, and all faults are told at once with their places. Paths are relative to the file's folder.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from calibration.common.errors import CalibrationError
from calibration.common.settings import Count, FromList, Natural, Table
from calibration.common.toml import check, read_toml
from calibration.drafters.info import DrafterSettings
from calibration.drafters.kinds import AnyDrafter
from calibration.drafters.timing import TimingGrid
from calibration.jobs.job import CalibrationSettings
from calibration.jobs.long_context_job import LongContextTable
from calibration.models.load import DeviceChoice, DtypeChoice

Counts = Annotated[tuple[Count, ...], FromList, Field(min_length=1)]


class ModelTable(Table):
    """How the verifier is loaded.

    ``device`` auto takes a CUDA device where there is one; ``device_map`` ("auto", "balanced" ...) spreads the model
    over several instead, as accelerate does. ``dtype`` auto is float32 on a CPU and bfloat16 on a GPU; fp8 rounds the
    decoder layers (compute capability 8.9 or newer).
    """

    device: DeviceChoice = "auto"
    dtype: DtypeChoice = "auto"
    device_map: str | None = None


class PromptsTable(Table):
    """Which prompts: a file of your own (.toml or .jsonl), else the bundled ones; some domains, the first of each."""

    file: str | None = None
    domains: Annotated[tuple[str, ...], FromList, Field(min_length=1)] | None = None
    limit_per_domain: Count | None = None


class DecodingTable(Table):
    """How the verifier writes; temperature 0 is greedy."""

    max_new_tokens: Count = 256
    temperature: Annotated[float, Field(ge=0)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0


class RecordTable(Table):
    """How the recording goes.

    ``batch_size``: prompts of a shard, which an interrupted job does not lose once it is done. ``gamma_max``: longest
    draft of the drafters' free runs, of which one starts at every ``rollout_stride``-th position (0: none).
    """

    batch_size: Count = 8
    gamma_max: Count = 8
    rollout_stride: Natural = 8


class TimingsTable(Table):
    """Which steps are timed, and how often; ``skip = true`` times none. See `calibration.timing.TimingGrid`."""

    skip: bool = False
    batches: Counts = TimingGrid.batches
    new_tokens: Counts = TimingGrid.new_tokens
    contexts: Counts = TimingGrid.contexts
    prefill_batches: Counts = TimingGrid.prefill_batches
    prefill_tokens: Counts = TimingGrid.prefill_tokens
    warmups: Count = TimingGrid.warmups
    repeats: Count = TimingGrid.repeats


class Job(Table):
    """One recording job: a verifier, its drafters, the prompts, and where the TraceSet goes.

    ``long_context`` also measures one drafter after long prompts, under windows; its table goes beside ``out``.
    """

    verifier: str
    out: str
    seed: Natural = 0
    model: ModelTable = ModelTable()
    prompts: PromptsTable = PromptsTable()
    decoding: DecodingTable = DecodingTable()
    record: RecordTable = RecordTable()
    timings: TimingsTable = TimingsTable()
    drafter: Annotated[tuple[AnyDrafter, ...], FromList, Field(min_length=1)]
    long_context: LongContextTable | None = None

    def settings(self, folder: Path, command: str) -> CalibrationSettings:
        """Give the settings of the job; relative paths begin at `folder`."""
        grid = TimingGrid(**self.timings.model_dump(exclude={"skip"}))
        drafters: tuple[DrafterSettings, ...] = tuple(d.placed(folder) for d in self.drafter)
        return CalibrationSettings(
            verifier=_model(self.verifier, folder),
            drafters=drafters,
            prompt_file=None if self.prompts.file is None else folder / self.prompts.file,
            domains=self.prompts.domains,
            limit_per_domain=self.prompts.limit_per_domain,
            **self.decoding.model_dump(),
            **self.record.model_dump(),
            **self.model.model_dump(),
            seed=self.seed,
            timings=not self.timings.skip,
            timing_repeats=self.timings.repeats,
            grid=grid,
            long_context=None if self.long_context is None else self.long_context.placed(folder),
            command=command,
        )


def load_job(
    path: str | os.PathLike[str], command: str = "calibration.jobs.jobfile.load_job"
) -> tuple[CalibrationSettings, Path]:
    """Read the job in the TOML file at `path`; give its settings and the folder of the TraceSet to write.

    `CalibrationError` names every fault with its place.
    """
    return parse_job(read_toml(path, CalibrationError), where=str(path), folder=Path(path).parent, command=command)


def parse_job(
    data: Mapping[str, Any],
    *,
    where: str = "job",
    folder: Path | str = ".",
    command: str = "calibration.jobs.jobfile.parse_job",
) -> tuple[CalibrationSettings, Path]:
    """Give the settings of the job in `data`, and where it writes; `CalibrationError` names every fault."""
    root = Path(folder)
    job = check(Job, data, where, CalibrationError)
    try:
        return job.settings(root, command), Path(os.path.normpath(root / job.out))
    except CalibrationError as fault:
        raise CalibrationError("\n".join(f"{where}: {line}" for line in str(fault).splitlines())) from None


def _model(name: str, folder: Path) -> str:
    """Give a model's name, or its folder where there is one of that name beside the job file."""
    return str(folder / name) if (folder / name).is_dir() else name
