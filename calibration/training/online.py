"""Online distillation: a drafter that goes on learning from the requests it serves, against the same one frozen.

The drafter keeps a buffer of (context, verifier's state) at positions where the verifier rejected its draft, and
takes a few distillation steps on it every so many requests. Under a domain shift its acceptance falls, then recovers.

Source: Liu and others, "Online Speculative Decoding" (2024). Which positions are rejected is drawn as a live loop
with drafts of `GAMMA` tokens would have it, given the text: exact in distribution.
"""

from __future__ import annotations

import csv
import io
import itertools
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from calibration.common.errors import CalibrationError
from calibration.common.progress import StageProgress
from calibration.models.load import Verifier
from calibration.traces.manifest import DecodingInfo
from calibration.trained.batches import Batch, collate
from calibration.trained.corpus import Text
from calibration.trained.evaluate import GAMMA, positions
from calibration.trained.settings import TrainSettings
from calibration.trained.trainees import load_trained, resume_trainee
from calibration.training.jobfile import OnlineTable
from calibration.training.learner import Learner, training_dtype

STEP_TEXTS = 8
"""Requests whose rejected positions one step learns from."""


@dataclass(frozen=True)
class Served:
    """One request: the mean acceptance probability of the frozen and of the learning drafter over its text.

    ``steps``: learning steps taken before it, in all.
    """

    request: int
    phase: int
    domain: str
    frozen: float
    online: float
    steps: int


@dataclass(frozen=True)
class Shift:
    """What a domain shift did: mean acceptance in the last third before it, and the first and last third after it.

    ``drift`` = first - before and ``recovery`` = last - first of the learning drafter; ``frozen_first`` and
    ``frozen_last`` say what the new text alone would have made of them.
    """

    before_domain: str
    after_domain: str
    before: float
    first: float
    last: float
    frozen_before: float
    frozen_first: float
    frozen_last: float
    drift: float
    recovery: float


def serve(
    verifier: Verifier,
    folder: Path | str,
    stream: Sequence[tuple[int, Text]],
    decoding: DecodingInfo,
    settings: OnlineTable,
    training: TrainSettings,
    progress: StageProgress | None = None,
) -> list[Served]:
    """Let the trained drafter in `folder` serve `stream`, (phase, text) by request, once frozen and once learning.

    `training` says by which divergence it learns, and how exactly. A request is measured before it is learnt from.
    """
    frozen, _ = load_trained(folder, verifier)
    trainee = resume_trainee(folder, verifier, training_dtype(verifier))
    learner = Learner(verifier, trainee, [text for _, text in stream], training)
    buffer = Buffer(settings.buffer)
    rng = np.random.default_rng(settings.seed)
    served, steps = [], 0
    for number, (phase, text) in enumerate(stream):
        if progress:
            progress("serve online", number, len(stream))
        batch = collate([text], verifier.device)
        accept = positions(trainee.model, verifier, batch, decoding)[2]
        still = positions(frozen, verifier, batch, decoding)[2]
        served.append(Served(number, phase, text.domain, float(still.mean()), float(accept.mean()), steps))
        buffer.add(text, rejected(accept, GAMMA, rng))
        if (number + 1) % settings.interval == 0 and len(buffer):
            for _ in range(settings.steps):
                batch = buffer.draw(STEP_TEXTS, rng, verifier.device)
                learner.step(batch, settings.learning_rate, settings.seed, steps)
                steps += 1
    learner.rest()
    if progress:
        progress("serve online", len(stream), len(stream))
    return served


def rejected(accept: NDArray[np.float64], gamma: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Draw the output positions at which a live loop with drafts of `gamma` tokens rejects one.

    ``accept`` [T]: acceptance probability of each position given the text, which starts with round 1 at position 1.
    """
    luck = rng.random(len(accept))
    found, t = [], 1
    while t < len(accept):
        end = min(t + gamma, len(accept))
        refused = np.flatnonzero(luck[t:end] >= accept[t:end])
        if len(refused):
            found.append(t + int(refused[0]))
            t = found[-1] + 1
        else:
            t += gamma + 1
    return np.array(found, dtype=np.int64)


class Buffer:
    """The rejected positions of the last requests, `capacity` of them at most; the oldest requests leave first."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._kept: deque[tuple[Text, NDArray[np.int64]]] = deque()

    def __len__(self) -> int:
        """Count the positions kept."""
        return sum(len(where) for _, where in self._kept)

    def add(self, text: Text, where: NDArray[np.int64]) -> None:
        """Keep the output positions `where` of `text`; of a request that alone is too long, the last ones."""
        if len(where):
            self._kept.append((text, where[-self._capacity :]))
        while len(self) > self._capacity:
            self._kept.popleft()

    def draw(self, texts: int, rng: np.random.Generator, device: torch.device) -> Batch:
        """Draw up to `texts` requests without replacement; give a batch of their kept positions alone."""
        chosen = rng.permutation(len(self._kept))[:texts].tolist()
        rows = [self._kept[index] for index in chosen]
        batch = collate([text for text, _ in rows], device)
        begins = np.cumsum([0, *(len(text.output_ids) for text, _ in rows)])
        where = np.concatenate([begin + mine for begin, (_, mine) in zip(begins, rows, strict=False)])
        keep = torch.as_tensor(where, device=device)
        return Batch(batch.tokens, batch.places[keep], batch.targets[keep], batch.states[keep])


def shifts(served: Sequence[Served]) -> list[Shift]:
    """Give what every change of phase did."""
    phases = [list(group) for _, group in itertools.groupby(served, key=lambda row: row.phase)]
    found = []
    for old, new in itertools.pairwise(phases):
        third_old, third_new = max(1, len(old) // 3), max(1, len(new) // 3)
        parts = (old[-third_old:], new[:third_new], new[-third_new:])
        before, first, last = (float(np.mean([row.online for row in part])) for part in parts)
        still = [float(np.mean([row.frozen for row in part])) for part in parts]
        names = (old[0].domain, new[0].domain)
        found.append(Shift(*names, before, first, last, still[0], still[1], still[2], first - before, last - first))
    return found


def make_stream(texts: Mapping[str, Sequence[Text]], settings: OnlineTable) -> list[tuple[int, Text]]:
    """Give the requests of all phases; every text of a domain is used once, in its order."""
    needed = {domain: settings.domains.count(domain) * settings.requests for domain in settings.domains}
    for domain, count in needed.items():
        if len(texts.get(domain, ())) < count:
            rule = f"must have {count} texts of {domain} for its phases"
            raise CalibrationError(f"online: {rule}, got {len(texts.get(domain, ()))}")
    left = {domain: iter(texts[domain]) for domain in needed}
    return [
        (phase, next(left[domain])) for phase, domain in enumerate(settings.domains) for _ in range(settings.requests)
    ]


def online_csv(rows: Sequence[Served] | Sequence[Shift]) -> str:
    """Write a table of `Served` or of `Shift` as CSV, numbers rounded to 5 decimals."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(rows[0])] if rows else [], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        values = asdict(row)
        writer.writerow({name: round(v, 5) if isinstance(v, float) else v for name, v in values.items()})
    return text.getvalue()
