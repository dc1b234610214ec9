"""Run a distillation job: text, students, and how each drafts in every domain; resumable as a whole.

The output folder holds ``corpus/<domain>`` (text that the job wrote), ``held_out``, ``students/<name>`` (each a
trained drafter with its learning curve and ``quality.json``), ``results.csv`` and ``results.json``, and, with
``[online]``, ``online.csv`` (request by request) and ``shifts.csv``.

The text of a distillation job: read, or written first; split into training, held-out and streamed text.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from calibration.common.errors import CalibrationError
from calibration.common.files import write_whole
from calibration.common.progress import StageProgress
from calibration.models.load import Verifier
from calibration.prompts import Prompt, load_prompts, read_prompt_file
from calibration.traces.manifest import DecodingInfo
from calibration.trained.corpus import Text, find_corpora, read_corpora, read_corpus, write_corpus
from calibration.trained.evaluate import Quality, by_domain
from calibration.trained.folder import read_about
from calibration.trained.trainees import load_trained
from calibration.training.jobfile import TRAINING_DOMAINS, DistillJob, OnlineTable, StudentTable, training_prompts
from calibration.training.online import make_stream, online_csv, serve, shifts
from calibration.training.train import train_student


@dataclass(frozen=True)
class Material:
    """The text of a job, by domain: to train on, held out, and kept for the online stream; and how it was written."""

    texts: dict[str, list[Text]]
    held_out: dict[str, list[Text]]
    decoding: DecodingInfo
    stream: tuple[tuple[int, Text], ...] = ()


def gather(job: DistillJob, verifier: Verifier, out: Path, progress: StageProgress | None = None) -> Material:
    """Read the text of `job`, writing first what is not there yet; split off what is held out."""
    spec = job.corpus
    if spec.folder is not None:
        folders = find_corpora(Path(spec.folder))
    else:
        folders = [
            write_corpus(verifier, prompts, out / "corpus" / domain, **_writing(job), progress=progress)
            for domain, prompts in _prompts(job).items()
        ]
    found, decoding = read_corpora(folders)
    known = found.keys() if spec.domains is None else spec.domains
    texts = {domain: mine[: spec.count(domain)] for domain, mine in found.items() if domain in known}
    wanted = {name for student in job.student for name in student.domains or ()} | set(spec.domains or ())
    missing = sorted(wanted - texts.keys())
    if missing:
        raise CalibrationError(f"corpus: must hold texts of {', '.join(missing)}, got {', '.join(texts)}")
    held_out = {domain: mine[: spec.held_out] for domain, mine in texts.items()}
    if spec.held_out_prompts == "bundled":
        held_out = _bundled(job, verifier, out, list(texts), decoding, progress)
    else:
        texts = {domain: mine[spec.held_out :] for domain, mine in texts.items()}
    stream: tuple[tuple[int, Text], ...] = ()
    if job.online is not None:
        stream = tuple(make_stream(texts, job.online))
        seen = {id(text) for _, text in stream}
        texts = {domain: [text for text in mine if id(text) not in seen] for domain, mine in texts.items()}
    for domain, mine in texts.items():
        if not mine:
            raise CalibrationError(
                f"corpus: must hold more texts of {domain}, got none to train on beside the others"
            )
    return Material(texts, held_out, decoding, stream)


def _writing(job: DistillJob) -> dict[str, Any]:
    return job.corpus.model_dump(include={"temperature", "max_new_tokens", "batch_size", "seed"})


def _prompts(job: DistillJob) -> dict[str, tuple[Prompt, ...]]:
    spec = job.corpus
    if spec.prompt_file is not None:
        files = read_prompt_file(Path(spec.prompt_file), spec.domains)
        return {file.domain: file.prompts[: spec.count(file.domain)] for file in files}
    domains = spec.domains or TRAINING_DOMAINS
    return {domain: training_prompts(domain, spec.count(domain) or 0, spec.seed) for domain in domains}


def _bundled(
    job: DistillJob,
    verifier: Verifier,
    out: Path,
    domains: Sequence[str],
    decoding: DecodingInfo,
    progress: StageProgress | None,
) -> dict[str, list[Text]]:
    """Let the verifier write to calibration prompts, as it wrote the training text."""
    files = load_prompts(domains, job.corpus.held_out)
    prompts = [prompt for file in files for prompt in file.prompts]
    writing = {**_writing(job), "temperature": decoding.temperature}
    folder = write_corpus(verifier, prompts, out / "held_out", **writing, progress=progress)
    texts = read_corpus(folder)
    return {domain: [text for text in texts if text.domain == domain] for domain in domains}


CURVE_TEXTS = 16
"""Held-out texts on which a learning curve is measured, drawn evenly from the student's domains."""


@dataclass(frozen=True)
class StudentResult:
    """One student: size, what it learnt from, and its quality on the held-out text of every domain.

    ``parameters``: without embedding and head; ``share``: of the verifier's. ``tokens``: output tokens learnt from.
    """

    name: str
    kind: str
    parameters: int
    share: float
    learnt_from: tuple[str, ...]
    divergence: str
    tokens: int
    seconds: float
    quality: dict[str, Quality]


def run_distill(job: DistillJob, out: Path | str, progress: StageProgress | None = None) -> list[StudentResult]:
    """Do what `job` says in the folder `out`; give the results, also written there as CSV and JSON.

    Text shards and students that are finished stay; a student under way goes on from its last checkpoint.
    `CalibrationError` where the job does not fit what the folder holds.
    """
    return distill_all(job, job.verifier.load(progress), Path(out), progress)


def distill_all(
    job: DistillJob, verifier: Verifier, out: Path, progress: StageProgress | None = None
) -> list[StudentResult]:
    """Do what `job` says with a `verifier` that is loaded."""
    material = gather(job, verifier, out, progress)
    results = []
    for student in job.student:
        results.append(_one(job, student, verifier, material, out / "students" / student.name, progress))
        write_results(results, out)
    if job.online is not None:
        _online(job.online, job, verifier, material, out, progress)
    return results


def curve_texts(held_out: Mapping[str, Sequence[Text]], domains: Sequence[str]) -> list[Text]:
    """Give up to `CURVE_TEXTS` held-out texts, the first ones of each of `domains` in turn."""
    ranked = [(place, text) for domain in domains for place, text in enumerate(held_out.get(domain, ()))]
    return [text for _, text in sorted(ranked, key=lambda pair: pair[0])][:CURVE_TEXTS]


def write_results(results: Sequence[StudentResult], out: Path) -> None:
    """Write ``results.json`` and ``results.csv`` (one row per student and held-out domain)."""
    rows = []
    for result in results:
        about = {name: value for name, value in asdict(result).items() if name != "quality"}
        about |= {"learnt_from": "+".join(result.learnt_from), "share": round(result.share, 5)}
        rows += [{**about, "domain": domain, **quality.row()} for domain, quality in result.quality.items()]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(out / "results.csv", text.getvalue())
    write_whole(out / "results.json", json.dumps([asdict(result) for result in results], indent=2) + "\n")


def _one(
    job: DistillJob,
    student: StudentTable,
    verifier: Verifier,
    material: Material,
    folder: Path,
    progress: StageProgress | None,
) -> StudentResult:
    """Train one student, where that is not done, and measure it, where that is not done."""
    settings, domains = job.settings(student), student.domains or tuple(material.texts)
    if not (folder / "curve.csv").is_file():
        texts = [text for domain in domains for text in material.texts[domain]]
        held = curve_texts(material.held_out, domains) or curve_texts(material.held_out, list(material.held_out))
        train_student(
            verifier=verifier,
            shape=student.shape,
            texts=texts,
            held_out=held,
            decoding=material.decoding,
            settings=settings,
            folder=folder,
            progress=progress,
        )
    about = read_about(folder)
    recipe = about["recipe"]
    wanted = {"shape": student.shape.model_dump(mode="json", exclude_none=True), "settings": settings.model_dump()}
    for key, value in wanted.items():
        if recipe[key] != value:
            raise CalibrationError(f"{folder}: holds a student with {key} = {recipe[key]}, got {value}")
    if recipe["domains"] != sorted(domains):
        raise CalibrationError(
            f"{folder}: holds a student of {', '.join(recipe['domains'])}, got {', '.join(domains)}"
        )
    own = sum(tensor.numel() for tensor in load_trained(folder, verifier)[1].values())
    whole = verifier.info.parameters_non_embedding or 1
    return StudentResult(
        name=student.name,
        kind=about["kind"],
        parameters=own,
        share=own / whole,
        learnt_from=tuple(domains),
        divergence=settings.divergence,
        tokens=recipe["tokens"],
        seconds=recipe["seconds"],
        quality=_quality(folder, verifier, material, progress),
    )


def _online(
    spec: OnlineTable,
    job: DistillJob,
    verifier: Verifier,
    material: Material,
    out: Path,
    progress: StageProgress | None,
) -> None:
    """Serve the stream; write ``online.csv`` (requests) and ``shifts.csv``, where that is not done."""
    folder = out / "students" / spec.student
    student = next(student for student in job.student if student.name == spec.student)
    identity = {"settings": spec.model_dump(mode="json"), "stream": _text_hash({"": [t for _, t in material.stream]})}
    about = out / "online.json"
    if about.is_file() and json.loads(about.read_text(encoding="utf-8")) == identity:
        return
    served = serve(
        verifier=verifier,
        folder=folder,
        stream=material.stream,
        decoding=material.decoding,
        settings=spec,
        training=job.settings(student),
        progress=progress,
    )
    write_whole(out / "online.csv", online_csv(served))
    write_whole(out / "shifts.csv", online_csv(shifts(served)))
    write_whole(about, json.dumps(identity, indent=2) + "\n")


def _quality(
    folder: Path, verifier: Verifier, material: Material, progress: StageProgress | None
) -> dict[str, Quality]:
    """Measure the student in `folder` on every domain, or read what was measured on the same texts."""
    path, identity = folder / "quality.json", _text_hash(material.held_out)
    if path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["held_out"] == identity:
            return {domain: Quality(**values) for domain, values in kept["quality"].items()}
    if progress:
        progress(f"measure {folder.name}", 0, 1)
    student, _ = load_trained(folder, verifier)
    found = by_domain(student, verifier, material.held_out, material.decoding)
    about = {"held_out": identity, "quality": {domain: quality.row() for domain, quality in found.items()}}
    write_whole(path, json.dumps(about, indent=2) + "\n")
    if progress:
        progress(f"measure {folder.name}", 1, 1)
    return found


def _text_hash(texts: Mapping[str, Sequence[Text]]) -> str:
    ids = [[domain, [[t.prompt_ids, t.output_ids] for t in mine]] for domain, mine in texts.items()]
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()
