"""A small model with a tokenizer of its own, trained on plain text: a drafter in another vocabulary.

Nothing is taken from the verifier but the text that it wrote: the tokenizer is a byte-level BPE learned from it, the
model a Llama trained on it by next-token cross-entropy. Where no published small model is at hand, this makes one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from calibration.common.errors import CalibrationError, quiet_transformers, require
from calibration.common.files import fresh_folder
from calibration.common.progress import StageProgress
from calibration.models.load import DeviceChoice, choose_device
from calibration.trained.corpus import read_corpus


@dataclass(frozen=True)
class LlamaShape:
    """Shape of the model. ``intermediate`` is the width of the MLP, ``context`` the most positions it can read."""

    hidden: int = 192
    layers: int = 4
    heads: int = 3
    kv_heads: int = 3
    intermediate: int = 512
    context: int = 2048


@dataclass(frozen=True)
class Budget:
    """How much it trains: `steps` of AdamW over `batch` pieces of `tokens` tokens each; the rate falls as a cosine.

    ``autocast`` multiplies in bfloat16, with weights in float32.
    """

    steps: int = 400
    batch: int = 16
    tokens: int = 128
    learning_rate: float = 2e-3
    warmup: int = 20
    autocast: bool = True


def train_standalone(
    texts: Sequence[str],
    folder: Path | str,
    *,
    vocabulary: int = 4096,
    shape: LlamaShape | None = None,
    budget: Budget | None = None,
    special_tokens: Sequence[str] = ("<|endoftext|>",),
    device: DeviceChoice = "auto",
    seed: int = 0,
    progress: StageProgress | None = None,
) -> Path:
    """Train a tokenizer of `vocabulary` tokens and a model on `texts`; give the folder, which any drafter kind reads.

    ``special_tokens`` stand in the texts as themselves; the last one ends each text. ``recipe.json`` beside the
    weights keeps the recipe and the loss (nats per token, mean of every twentieth part of the run). The same
    arguments give the same weights on the same machine.
    """
    transformers = require("transformers")
    shape, budget = shape or LlamaShape(), budget or Budget()
    tokenizer = train_tokenizer(texts, vocabulary, special_tokens)
    end = tokenizer.eos_token_id
    stream = np.array([i for text in texts for i in (*tokenizer(text).input_ids, end)], dtype=np.int64)
    if len(stream) <= budget.tokens:
        raise CalibrationError(f"training text: must have more than {budget.tokens} tokens, got {len(stream)}")
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=end,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM(config).to(choose_device(device))
    curve = fit(model, stream, budget, np.random.default_rng(seed), progress)
    recipe = {"shape": asdict(shape), "budget": asdict(budget), "seed": seed, "training_tokens": len(stream)}
    with fresh_folder(folder, "config.json", error=CalibrationError, what="model") as scratch:
        with quiet_transformers():
            model.eval().save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        text = json.dumps({**recipe, "loss_nats": curve}, indent=2) + "\n"
        (scratch / "recipe.json").write_text(text, encoding="utf-8")
    return Path(folder)


def train_tokenizer(texts: Sequence[str], vocabulary: int, special_tokens: Sequence[str]) -> Any:
    """Learn a byte-level BPE of up to `vocabulary` tokens; the last of `special_tokens` is its end token."""
    tokenizers = require("tokenizers")
    least = 256 + len(special_tokens)
    if not special_tokens or vocabulary < least:
        rule = f"must be at least 256 bytes + {len(special_tokens)} special tokens (one or more)"
        raise CalibrationError(f"vocabulary: {rule}, got {vocabulary}")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(special_tokens),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    fast = require("transformers").PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=special_tokens[-1])
    if len(special_tokens) > 1:
        fast.add_special_tokens({"additional_special_tokens": list(special_tokens[:-1])})
    return fast


def fit(
    model: Any,
    stream: NDArray[np.int64],
    budget: Budget,
    rng: np.random.Generator,
    progress: StageProgress | None = None,
) -> list[float]:
    """Train `model` in place on random pieces of `stream` by next-token cross-entropy; give the loss curve."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=budget.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    losses = []
    model.train()
    for step, piece in enumerate(_pieces(stream, budget, rng)):
        for group in optimizer.param_groups:
            group["lr"] = budget.learning_rate * _rate(step, budget)
        tokens = torch.as_tensor(piece, device=model.device)
        with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=budget.autocast):
            logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        if progress:
            progress("train", step + 1, budget.steps)
    parts = np.array_split(np.array(losses), min(20, len(losses)))
    return [round(float(part.mean()), 4) for part in parts]


def _pieces(stream: NDArray[np.int64], budget: Budget, rng: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    for _ in range(budget.steps):
        begin = rng.integers(0, len(stream) - budget.tokens, budget.batch)
        yield stream[begin[:, None] + np.arange(budget.tokens + 1)]


def _rate(step: int, budget: Budget) -> float:
    """Give the part of the learning rate at `step`: a linear warm-up, then a cosine down to a tenth."""
    if step < budget.warmup:
        return (step + 1) / budget.warmup
    done = (step - budget.warmup) / max(1, budget.steps - budget.warmup)
    return 0.55 + 0.45 * math.cos(math.pi * done)


def corpus_texts(folders: Sequence[Path | str], tokenizer: Any) -> list[str]:
    """Give the texts of corpora (`calibration.trained.corpus`) as strings, prompts and special tokens included."""
    return [
        tokenizer.decode([*text.prompt_ids, *text.output_ids]) for folder in folders for text in read_corpus(folder)
    ]
