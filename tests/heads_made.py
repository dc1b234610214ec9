"""Heads for tests: text that a tiny verifier wrote, and heads trained on it for a moment or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

KINDS = ("medusa", "eagle", "block")
SHAPES = {
    "medusa": {"tokens": 4, "layers": 2},
    "eagle": {"tokens": 3, "heads": 4, "kv_heads": 2, "head_dim": 6, "intermediate_size": 20},
    "block": {"tokens": 5, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 8, "intermediate_size": 20},
}


def head_shape(kind: str) -> Any:
    """The shape that tests give to heads of `kind`: small, and unlike the verifier's."""
    from calibration.trained.shapes import HeadShape

    return HeadShape(**SHAPES[kind])


def written_texts(verifier: Any, rows: int, length: int, decoding: Any, seed: int = 3, low: int = 1) -> list[Any]:
    """Texts by `verifier` with the states that predicted them; prompts have one token and more."""
    import torch
    from tiny import random_prompts

    from calibration.models.sampling import generator_for
    from calibration.trained.corpus import Text, generate_states

    prompts = random_prompts(seed, rows, low=low, high=6, vocabulary=verifier.model.config.vocab_size)
    generator = generator_for(torch.device("cpu"), seed)
    outputs, states = generate_states(verifier, prompts, decoding, length, generator)
    texts, begin = [], 0
    for row, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        mine = states[begin : begin + len(output.ids)]
        texts.append(Text(f"t{row}", "chat", tuple(prompt), output.ids, mine))
        begin += len(output.ids)
    return texts


def random_head(kind: str, verifier: Any, folder: Path, seed: int = 0, size: float = 0.2) -> Path:
    """Save an untrained head, every tensor of it moved at random; give its folder."""
    import torch

    from calibration.trained.folder import save_drafter
    from calibration.trained.heads import fresh_head

    generator = torch.Generator().manual_seed(seed)
    shape = head_shape(kind).for_verifier(kind, verifier)
    head = fresh_head(kind, shape, verifier.model, generator)
    tensors = {
        name: tensor.detach() + size * torch.randn(tensor.shape, generator=generator)
        for name, tensor in head.named_parameters()
    }
    save_drafter(folder, kind, shape.model_dump(), verifier.info, tensors, {"seed": seed})
    return folder


def built_head(kind: str, verifier: Any, folder: Path) -> Any:
    """Build the drafter whose head lies in `folder`, as a job file would."""
    from pydantic import TypeAdapter

    from calibration.drafters import AnyDrafter, build_drafter

    settings = TypeAdapter(AnyDrafter).validate_python({"kind": kind, "path": str(folder), "name": kind})
    return build_drafter(settings, verifier)
