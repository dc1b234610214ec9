"""The text of a distillation job: read, or written first; split into training, held-out and streamed text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibration.common.errors import CalibrationError
from calibration.common.progress import StageProgress
from calibration.models.load import Verifier
from calibration.prompts import Prompt, load_prompts, read_prompt_file
from calibration.traces.manifest import DecodingInfo
from calibration.trained.corpus import Text, find_corpora, read_corpora, read_corpus, write_corpus
from calibration.training.jobfile import DistillJob
from calibration.training.online import make_stream
from calibration.training.topics import TRAINING_DOMAINS, training_prompts


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
