"""The training text: what a verifier writes to training prompts, with the states from which its head predicted it.

A corpus is a folder, grown shard by shard and resumable: ``corpus.json`` (who wrote it, and how), and per shard
``shard-NNNN.parquet`` (prompt id, domain, prompt and output token ids) and ``shard-NNNN.npy`` (float16
[output tokens, hidden size]: the final norm's output at the position that predicts each token). From the states the
head gives back the verifier's distributions, so that a student is trained without running the verifier again.

Training batches: texts of nearly equal length side by side, in a seeded order that any step can be found in.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from calibration.common.errors import CalibrationError
from calibration.common.files import check_identity, whole_file, write_whole
from calibration.common.progress import StageProgress
from calibration.models.lane import Lane, Output, cut, pad_left
from calibration.models.load import Verifier
from calibration.models.sampling import choose, generator_for
from calibration.prompts import Prompt
from calibration.traces.manifest import DecodingInfo


@dataclass(frozen=True)
class Text:
    """One prompt and what was written to it; ``states`` [output tokens, hidden size] predicted each output token."""

    prompt_id: str
    domain: str
    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]
    states: NDArray[np.float16]


def write_corpus(
    verifier: Verifier,
    prompts: Sequence[Prompt],
    folder: Path | str,
    *,
    temperature: float = 0.8,
    max_new_tokens: int = 192,
    batch_size: int = 64,
    seed: int = 0,
    progress: StageProgress | None = None,
) -> Path:
    """Let `verifier` write to every prompt, sampled at `temperature` (0: greedy); give `folder`.

    Finished shards stay: the same call goes on where it stopped. `CalibrationError` where the folder holds a corpus
    written otherwise.
    """
    target = Path(folder)
    decoding = DecodingInfo(mode="sampled" if temperature > 0 else "greedy", temperature=temperature)
    shards = [prompts[i : i + batch_size] for i in range(0, len(prompts), batch_size)]
    _begin(target, _identity(verifier, decoding, max_new_tokens, batch_size, seed))
    for number, shard in enumerate(shards):
        if progress:
            progress("write training text", number, len(shards))
        if (target / f"shard-{number:04d}.parquet").is_file():
            _check_shard(target, number, shard)
            continue
        ids = [verifier.encode(prompt.text) for prompt in shard]
        generator = generator_for(verifier.device, seed, number)
        outputs, states = generate_states(verifier, ids, decoding, max_new_tokens, generator)
        _write_shard(target, number, shard, ids, outputs, states)
    if progress:
        progress("write training text", len(shards), len(shards))
    return target


def read_corpus(folder: Path | str, domains: Sequence[str] | None = None) -> list[Text]:
    """Read every text of the corpus in `folder`, or those of `domains`; states are memory-mapped, not loaded.

    `CalibrationError` where there is no corpus, or none of these domains.
    """
    target = Path(folder)
    if not (target / "corpus.json").is_file():
        raise CalibrationError(f"{target}: must be a corpus (a folder with corpus.json)")
    texts = []
    for path in sorted(target.glob("shard-*.parquet")):
        states = np.load(path.with_suffix(".npy"), mmap_mode="r")
        begin = 0
        for row in pq.read_table(path).to_pylist():
            end = begin + len(row["output_ids"])
            if domains is None or row["domain"] in domains:
                mine = (tuple(row["prompt_ids"]), tuple(row["output_ids"]), states[begin:end])
                texts.append(Text(row["prompt_id"], row["domain"], *mine))
            begin = end
    if not texts:
        wanted = "any domain" if domains is None else ", ".join(domains)
        raise CalibrationError(f"{target}: must hold texts of {wanted}, got none")
    return texts


def corpus_decoding(folder: Path | str) -> DecodingInfo:
    """Say how the texts of the corpus in `folder` were written; `CalibrationError` where there is none."""
    path = Path(folder) / "corpus.json"
    if not path.is_file():
        raise CalibrationError(f"{folder}: must be a corpus (a folder with corpus.json)")
    return DecodingInfo.model_validate(json.loads(path.read_text(encoding="utf-8"))["decoding"])


def find_corpora(folder: Path) -> list[Path]:
    """Give `folder`, or the corpora in it; `CalibrationError` where there are none."""
    if (folder / "corpus.json").is_file():
        return [folder]
    found = sorted(path.parent for path in folder.glob("*/corpus.json"))
    if not found:
        raise CalibrationError(f"corpus.folder: must be a corpus or a folder of corpora, got '{folder}'")
    return found


def read_corpora(folders: Sequence[Path]) -> tuple[dict[str, list[Text]], DecodingInfo]:
    """Read all texts of the corpora in `folders` by domain, and how they were written.

    `CalibrationError` where not all were written alike.
    """
    texts: dict[str, list[Text]] = {}
    decoding = corpus_decoding(folders[0])
    for folder in folders:
        if corpus_decoding(folder) != decoding:
            raise CalibrationError(f"{folder}: must be written as {folders[0]} is, at one temperature")
        for text in read_corpus(folder):
            texts.setdefault(text.domain, []).append(text)
    return texts, decoding


@torch.inference_mode()
def generate_states(
    verifier: Verifier,
    prompts: Sequence[Sequence[int]],
    decoding: DecodingInfo,
    max_new_tokens: int,
    generator: torch.Generator,
) -> tuple[list[Output], NDArray[np.float16]]:
    """Continue every prompt; give the outputs, and the states of all their tokens one after the other."""
    model = verifier.model
    tokens, real = pad_left(prompts, model.device)
    lane = Lane(model, len(prompts), taps=("norm",))
    ends = torch.tensor(sorted(verifier.end_ids), dtype=torch.long, device=model.device)
    done = torch.zeros(len(prompts), dtype=torch.bool, device=model.device)
    columns, states = [], []
    logits = lane.feed(tokens, real, last=1)
    while True:
        states.append(lane.tapped["norm"][:, -1].to(torch.float16).cpu())
        columns.append(choose(logits[:, -1], decoding, generator))
        done |= torch.isin(columns[-1], ends)
        if len(columns) == max_new_tokens or bool(done.all()):
            break
        logits = lane.feed(columns[-1][:, None])
    outputs = [cut(row, verifier.end_ids) for row in torch.stack(columns, 1).tolist()]
    stacked = torch.stack(states, 1).numpy()
    return outputs, np.concatenate([stacked[row, : len(out.ids)] for row, out in enumerate(outputs)])


def _identity(
    verifier: Verifier, decoding: DecodingInfo, max_new_tokens: int, batch_size: int, seed: int
) -> dict[str, Any]:
    return {
        "verifier": verifier.info.model_dump(),
        "decoding": decoding.model_dump(),
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "seed": seed,
    }


def _begin(folder: Path, identity: dict[str, Any]) -> None:
    path = folder / "corpus.json"
    if path.is_file():
        check_identity(folder, "corpus", json.loads(path.read_text(encoding="utf-8")), identity)
        return
    if folder.exists() and any(folder.iterdir()):
        raise CalibrationError(f"{folder}: must be new or a corpus, it holds other files")
    write_whole(path, json.dumps(identity, indent=2) + "\n")


def _check_shard(folder: Path, number: int, prompts: Sequence[Prompt]) -> None:
    found = pq.read_table(folder / f"shard-{number:04d}.parquet", columns=["prompt_id"])["prompt_id"].to_pylist()
    if found != [prompt.id for prompt in prompts]:
        raise CalibrationError(f"{folder}: shard {number} holds other prompts; choose another folder")


def _write_shard(
    folder: Path,
    number: int,
    prompts: Sequence[Prompt],
    ids: Sequence[Sequence[int]],
    outputs: Sequence[Output],
    states: NDArray[np.float16],
) -> None:
    """Write the states first: a shard counts as finished once its Parquet file is there."""
    columns = {
        "prompt_id": [prompt.id for prompt in prompts],
        "domain": [prompt.domain for prompt in prompts],
        "prompt_ids": [list(row) for row in ids],
        "output_ids": [list(output.ids) for output in outputs],
    }
    name = f"shard-{number:04d}"
    with whole_file(folder / f"{name}.npy") as scratch, scratch.open("wb") as file:
        np.save(file, states)
    with whole_file(folder / f"{name}.parquet") as scratch:
        pq.write_table(pa.table(columns), scratch, compression="zstd")


POOL = 16
"""How many batches' worth of texts are sorted by length together."""


@dataclass(frozen=True)
class Batch:
    """Texts side by side.

    ``tokens`` [rows, longest]: prompt and output but its last token, flush left; what stands behind is never seen,
    since attention is causal. ``places`` [n]: where, counted row by row, the n output tokens are predicted; the
    prompt is context alone. ``targets`` [n] are those output tokens, ``states`` [n, hidden size] the verifier's.
    """

    tokens: Tensor
    places: Tensor
    targets: Tensor
    states: Tensor


def epoch_order(texts: Sequence[Text], batch_tokens: int, seed: int, epoch: int) -> list[list[int]]:
    """Give one epoch's batches, each a list of indices: every text once, at most `batch_tokens` tokens with padding.

    A text longer than that is a batch by itself.
    """
    rng = np.random.default_rng([seed, epoch])
    lengths = np.array([len(text.prompt_ids) + len(text.output_ids) - 1 for text in texts])
    order = rng.permutation(len(texts))
    pool = max(1, POOL * batch_tokens // int(lengths.mean()))
    batches: list[list[int]] = []
    for begin in range(0, len(order), pool):
        mine = order[begin : begin + pool]
        rows: list[int] = []
        for index in mine[np.argsort(lengths[mine], kind="stable")].tolist():
            if rows and (len(rows) + 1) * lengths[index] > batch_tokens:
                batches.append(rows)
                rows = []
            rows.append(index)
        batches.append(rows)
    return [batches[i] for i in rng.permutation(len(batches)).tolist()]


def steps(texts: Sequence[Text], batch_tokens: int, seed: int) -> Iterator[list[int]]:
    """Give batches of indices epoch after epoch, without end."""
    epoch = 0
    while True:
        yield from epoch_order(texts, batch_tokens, seed, epoch)
        epoch += 1


def collate(texts: Sequence[Text], device: torch.device) -> Batch:
    """Lay `texts` side by side."""
    rows = [(*text.prompt_ids, *text.output_ids[:-1]) for text in texts]
    width = max(len(row) for row in rows)
    tokens = torch.zeros(len(rows), width, dtype=torch.long)
    places = []
    for number, (text, row) in enumerate(zip(texts, rows, strict=True)):
        tokens[number, : len(row)] = torch.as_tensor(row, dtype=torch.long)
        begin = number * width + len(text.prompt_ids) - 1
        places.append(torch.arange(begin, begin + len(text.output_ids)))
    targets = torch.tensor([token for text in texts for token in text.output_ids])
    states = torch.from_numpy(np.concatenate([text.states for text in texts]))
    return Batch(tokens.to(device), torch.cat(places).to(device), targets.to(device), states.to(device))


def frequent_tokens(texts: Sequence[Text], count: int, vocabulary: int) -> Tensor:
    """Give the `count` tokens most frequent in the outputs, in rising order; the lowest ids where fewer occur."""
    seen = Counter(token for text in texts for token in text.output_ids)
    ranked = sorted(range(vocabulary), key=lambda token: (-seen[token], token))
    return torch.tensor(sorted(ranked[:count]))
