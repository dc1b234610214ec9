"""Small real tokenizers and models over them: byte-level BPE learned from a few lines, for two vocabularies."""

from __future__ import annotations

from typing import Any

LINES = (
    "The ferry at Hallin carried people, cattle and later cars across the mouth of the river.",
    "Zwölf süße Äpfel für Jürgen: naïve café, déjà vu… ¿qué?",
    "def area(width, height):\n    return width * height\n\n\nprint(area(3, 4))",
    "日本語のテキスト and 中文 together with emoji 🙂🙃 and tabs\t\tand  double  blanks.",
    "I'll say it's 1234567 times (or more), won't you? \"Yes,\" they said: yes-yes-yes!",
)


def byte_tokenizer(
    vocabulary: int, special_tokens: tuple[str, ...] = ("<end>",), lines: tuple[str, ...] = LINES
) -> Any:
    """A byte-level BPE; its last special token ends texts."""
    from calibration.training.foreign import train_tokenizer

    return train_tokenizer(lines * 3, vocabulary, special_tokens)


def mark_tokenizer() -> Any:
    """A SentencePiece-like BPE: blanks as marks, one in front, unknown characters as bytes."""
    import json

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    bpe = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace()
    plain = [line for line in LINES if line.isascii() and "\n" not in line]
    bpe.train_from_iterator(plain * 3, trainers.BpeTrainer(vocab_size=400, special_tokens=names, show_progress=False))
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    told = json.loads(bpe.to_str())
    told["added_tokens"] = told["added_tokens"][:3]  # single bytes are ordinary tokens
    bpe = Tokenizer.from_str(json.dumps(told))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def tokens_verifier(seed: int, vocabulary: int, special_tokens: tuple[str, ...] = ("<end>",), **options: Any) -> Any:
    """A random tiny `Verifier` whose tokens are those of `byte_tokenizer`."""
    from tiny import tiny_llama

    from calibration.models.load import make_verifier

    tokenizer = byte_tokenizer(vocabulary, special_tokens)
    return make_verifier("tokens", tiny_llama(seed, vocabulary=len(tokenizer), **options), tokenizer)
