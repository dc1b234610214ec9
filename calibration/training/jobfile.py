"""The job file of ``paceline distill``: which students to make from which text, in TOML.

    out = "students"

    [corpus]
    domains = ["code", "creative"]
    texts_per_domain = 640

    [training]
    tokens = 500_000
    loss_vocabulary = 8192

    [[student]]
    name = "generalist"
    shape = { layers = 1 }

    [[student]]
    name = "coder"
    shape = { layers = 1 }
    domains = ["code"]

Every key is checked, and all faults are told at once with their places. Paths are relative to the file's folder.

What the job files of trainings have in common: the verifier's table, names, paths, and settings over settings.

Training prompts: templates with slots, expanded in a seeded order. No torch needed.

They are written apart from the bundled calibration prompts, which stay held out for evaluation.
"""

from __future__ import annotations

import itertools
import os
import re
import string
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import numpy as np
from pydantic import Field, PlainValidator, model_validator

from calibration.common.errors import CalibrationError, did_you_mean
from calibration.common.progress import StageProgress
from calibration.common.settings import Count, FromList, Natural, Table
from calibration.common.toml import check, read_toml
from calibration.models.load import DeviceChoice, DtypeChoice, Verifier, load_verifier
from calibration.prompts import Prompt
from calibration.trained.shapes import AnyShape, TrainSettings

TRAINING_DOMAINS = ("chat", "code", "mathematics", "science", "creative")
"""Domains that have training prompts, in the order of generation."""

_FOLDER = Path(__file__).resolve().parent / "topics"


def training_prompts(domain: str, count: int, seed: int = 0) -> tuple[Prompt, ...]:
    """Give `count` different training prompts of `domain`, drawn without replacement; the same for the same seed.

    A longer list begins with the shorter one of the same seed. `CalibrationError` for an unknown domain or where
    there are fewer prompts than asked for.
    """
    texts = all_texts(domain)
    if not 1 <= count <= len(texts):
        raise CalibrationError(f"training prompts of '{domain}': count must lie in [1, {len(texts)}], got {count}")
    order = np.random.default_rng([seed, TRAINING_DOMAINS.index(domain)]).permutation(len(texts))
    return tuple(Prompt(f"train-{domain}-{i:05d}", domain, texts[i]) for i in order[:count].tolist())


def all_texts(domain: str) -> tuple[str, ...]:
    """Give every training text of `domain`: each template with every choice of its slots."""
    if domain not in TRAINING_DOMAINS:
        raise CalibrationError(
            f"training prompts: domain not known, got '{domain}'{did_you_mean(domain, TRAINING_DOMAINS)}"
        )
    table = tomllib.loads((_FOLDER / f"{domain}.toml").read_text(encoding="utf-8"))
    slots: dict[str, Sequence[str]] = table["slots"]
    texts: dict[str, None] = {}
    for template in table["templates"]:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name]
        for values in itertools.product(*(slots[name] for name in names)):
            texts.setdefault(template.format(**dict(zip(names, values, strict=True))))
    return tuple(texts)


Names = Annotated[tuple[str, ...], FromList, Field(min_length=1)]
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_PATHS = ("folder", "prompt_file")
"""Keys of ``[corpus]`` that are paths."""

Settings = TypeVar("Settings", bound=TrainSettings)


class VerifierTable(Table):
    """The verifier, and how it is loaded."""

    name: str = "smollm2-135m"
    device: DeviceChoice = "auto"
    dtype: DtypeChoice = "auto"
    device_map: str | None = None

    def load(self, progress: StageProgress | None = None) -> Verifier:
        """Load the verifier."""
        return load_verifier(
            self.name, device=self.device, dtype=self.dtype, device_map=self.device_map, progress=progress
        )


class TrainingJob(Table):
    """A verifier, training text, and what is made of them in the folder ``out``."""

    out: str
    verifier: VerifierTable = VerifierTable()
    corpus: Table

    def placed(self, folder: Path | str) -> tuple[Self, Path]:
        """Give the job and its output folder, paths that were relative to `folder` made absolute."""
        root = Path(folder).resolve()
        paths = {key: str(root / path) for key in _PATHS if (path := getattr(self.corpus, key, None)) is not None}
        changes: dict[str, Table] = {"corpus": self.corpus.model_copy(update=paths)}
        if (root / self.verifier.name).is_dir():
            changes["verifier"] = self.verifier.model_copy(update={"name": str(root / self.verifier.name)})
        return self.model_copy(update=changes), root / self.out


def name_faults(key: str, names: Sequence[str], number: int) -> list[str]:
    """Say what is wrong with the name of the table `number` of ``[[key]]``, if anything is."""
    name, place = names[number], f"{key}[{number}].name"
    if not _NAME.fullmatch(name):
        return [f"{place}: must be a file name (letters, digits, . _ -), got '{name}'"]
    return [f"{place}: must be unique, got '{name}'"] if name in names[:number] else []


def overlaid(settings: Settings, own: Settings | None) -> Settings:
    """Give `settings`, and over them what `own` gives itself."""
    changes = {} if own is None else {name: getattr(own, name) for name in own.model_fields_set}
    return settings.model_copy(update=changes)


def _counts(value: Any) -> Any:
    """Check a number of texts, or one for each domain."""
    numbers = value.values() if isinstance(value, dict) else [value]
    if value is not None and not all(type(number) is int and number >= 1 for number in numbers):
        raise ValueError(f"must be a number >= 1, or one for each domain, got {value!r}")
    return value


class CorpusTable(Table):
    """The training text: corpora that are there already, else what the verifier writes to training prompts.

    ``folder``: a corpus, or a folder of corpora; nothing is written then. Else ``domains`` of the training prompts
    that come with the package, or a ``prompt_file`` of one's own (.toml or .jsonl), at ``temperature`` (0: greedy).
    ``texts_per_domain`` (one number, or a table by domain) limits both. ``held_out`` texts of each domain, the first
    ones, are kept from training; with ``held_out_prompts = "bundled"`` the verifier writes to that many of the
    package's calibration prompts instead, and every text is trained on.
    """

    folder: str | None = None
    domains: Names | None = None
    prompt_file: str | None = None
    texts_per_domain: Annotated[int | dict[str, int] | None, PlainValidator(_counts)] = None
    held_out: Count = 16
    held_out_prompts: Literal["corpus", "bundled"] = "corpus"
    temperature: Annotated[float, Field(ge=0)] = 0.8
    max_new_tokens: Count = 192
    batch_size: Count = 64
    seed: Natural = 1

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.folder is not None and self.prompt_file is not None:
            raise ValueError("must give at most one of folder and prompt_file")
        if self.folder is None and self.prompt_file is None:
            unknown = [name for name in self.domains or () if name not in TRAINING_DOMAINS]
            if unknown:
                known = ", ".join(TRAINING_DOMAINS)
                raise ValueError(f"domains must be those of the training prompts ({known}), got '{unknown[0]}'")
            missing = [domain for domain in self.domains or TRAINING_DOMAINS if self.count(domain) is None]
            if missing:
                raise ValueError(
                    f"texts_per_domain must be given where text is to be written, got none of {missing[0]}"
                )
        counts = self.texts_per_domain if isinstance(self.texts_per_domain, dict) else {"": self.texts_per_domain}
        few = [count for count in counts.values() if count is not None and count <= self.held_out]
        if few and self.held_out_prompts == "corpus":
            raise ValueError(f"texts_per_domain must be more than held_out = {self.held_out}, got {few[0]}")
        return self

    def count(self, domain: str) -> int | None:
        """Give the limit for the texts of `domain`; None: as many as there are."""
        limit = self.texts_per_domain
        return limit.get(domain) if isinstance(limit, dict) else limit


class StudentTable(Table):
    """One student: its shape, the domains that it learns from (all where not given), and what it trains otherwise."""

    name: str
    shape: AnyShape
    domains: Names | None = None
    training: TrainSettings | None = None


class OnlineTable(Table):
    """Online distillation of one of the students under a domain shift; see `calibration.training.online`.

    ``domains``: the stream, phase after phase, ``requests`` texts in each. Every ``interval`` requests the student
    takes ``steps`` steps on the positions kept in a buffer of the last ``buffer`` ones that the verifier rejected.
    """

    student: str
    domains: Names
    requests: Count = 60
    interval: Count = 4
    steps: Count = 4
    buffer: Count = 512
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    seed: Natural = 0


class DistillJob(TrainingJob):
    """One job: a verifier, training text, and students."""

    corpus: CorpusTable
    training: TrainSettings = TrainSettings()
    student: Annotated[tuple[StudentTable, ...], FromList, Field(min_length=1)]
    online: OnlineTable | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        faults = []
        names = [student.name for student in self.student]
        for number, student in enumerate(self.student):
            faults += name_faults("student", names, number)
            known = self.corpus.domains
            faults += [
                f"student[{number}].domains: must be among the corpus' {', '.join(known)}, got '{domain}'"
                for domain in student.domains or ()
                if known is not None and domain not in known
            ]
        if self.online and self.online.student not in names:
            faults.append(f"online.student: must be a student's name, got '{self.online.student}'")
        if faults:
            raise ValueError("\n".join(faults))
        return self

    def settings(self, student: StudentTable) -> TrainSettings:
        """Give how `student` is trained: the job's settings, and over them its own."""
        return overlaid(self.training, student.training)


def load_distill_job(path: str | os.PathLike[str]) -> tuple[DistillJob, Path]:
    """Read the job in the TOML file at `path`; give it with its paths made absolute, and its output folder.

    `CalibrationError` names every fault with its place.
    """
    return parse_distill_job(read_toml(path, CalibrationError), where=str(path), folder=Path(path).parent)


def parse_distill_job(
    data: Mapping[str, Any], *, where: str = "distill job", folder: Path | str = "."
) -> tuple[DistillJob, Path]:
    """Give the job in `data` and its output folder; relative paths begin at `folder`."""
    return check(DistillJob, data, where, CalibrationError).placed(folder)
