"""A real Llama of a few thousand random weights, for tests that need a causal LM and no download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

VOCABULARY = 97


def tiny_llama(
    seed: int = 0, *, layers: int = 4, vocabulary: int = VOCABULARY, spread: float = 0.4, dtype: str = "float64"
) -> Any:
    """A random decoder: hidden 32, 4 query and 2 KV heads. `spread` sets how peaked its distributions are."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=spread,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    return model.to(getattr(torch, dtype)).eval().requires_grad_(False)


def tiny_tokenizer(vocabulary: int = VOCABULARY) -> Any:
    """A tokenizer that reads letters, digits and blanks one by one, and has a chat template."""
    import string

    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<start>", "<end>", "<user>"]
    letters = [*special, *(string.ascii_letters + string.digits + " .,?!")]
    words = {word: index for index, word in enumerate(letters[:vocabulary])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<start>", eos_token="<end>", pad_token="<unk>"
    )
    fast.add_special_tokens({"additional_special_tokens": ["<user>"]})
    fast.chat_template = "{% for m in messages %}<user>{{ m['content'] }}<start>{% endfor %}"
    return fast


def tiny_verifier(seed: int = 0, **options: Any) -> Any:
    """A `Verifier` around `tiny_llama`."""
    from calibration.models.load import make_verifier

    return make_verifier("tiny", tiny_llama(seed, **options), tiny_tokenizer())


def save_tiny(folder: Path, seed: int = 0) -> Path:
    """Write a tiny model with its tokenizer as a folder that `load_verifier` reads."""
    tiny_llama(seed, dtype="float32").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def random_prompts(
    seed: int, rows: int, low: int = 2, high: int = 12, vocabulary: int = VOCABULARY
) -> list[list[int]]:
    """Prompts of mixed lengths."""
    import numpy as np

    rng = np.random.default_rng(seed)
    return [rng.integers(3, vocabulary, rng.integers(low, high + 1)).tolist() for _ in range(rows)]
