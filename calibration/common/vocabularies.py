"""Vocabularies: what every token says in bytes, whether two vocabularies agree, and which tokens correspond.

Two tokenizers meet in the bytes of a text. A token's bytes follow from its string where the tokenizer is byte-level
(GPT-2, Llama 3, Qwen, SmolLM), SentencePiece-like (a mark for blanks, ``<0x0A>`` for single bytes: Llama 2, Gemma) or
spells its tokens as they are. Special tokens say nothing in bytes; they correspond by their names and roles. No torch
needed.
"""

from __future__ import annotations

import codecs
import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from calibration.common.errors import CalibrationError

_LOOKBEHIND = 24
"""Characters of committed text in whose context a draft is encoded: enough to see the word that it goes on with."""

_MARK = "\u2581"


class Vocabulary:
    """The tokens of one (fast) tokenizer as bytes; ``name`` is for messages.

    ``pieces[i]``: bytes of token i, None for special tokens and for ids that the tokenizer does not know.
    ``specials``: ids of the special tokens by their strings. ``roles``: ids by role (``bos``, ``eos``).
    """

    def __init__(self, name: str, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            kind = type(tokenizer).__name__
            raise CalibrationError(f"'{name}': must have a fast tokenizer (tokenizer.json), got {kind}")
        self._backend = backend
        # NOTE: from start to start only the last run of a text changes; the others are looked up (500 tokens: 1 ms).
        self.encode = functools.lru_cache(maxsize=256)(self._encode)
        """Gives the tokens of a text, without any that the tokenizer puts around it."""
        style = _style(name, json.loads(backend.to_str())["decoder"])
        words: dict[str, int] = tokenizer.get_vocab()
        added = tokenizer.added_tokens_decoder
        self.specials = {str(token.content): i for i, token in added.items() if token.special}
        hidden = set(self.specials.values())
        pieces: list[bytes | None] = [None] * (max(words.values()) + 1)
        for word, i in words.items():
            if i not in hidden:
                pieces[i] = word.encode() if i in added else _piece(word, style)
        self.pieces = tuple(pieces)
        found = {role: getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos")}
        self.roles: dict[str, int] = {role: i for role, i in found.items() if i is not None}
        begins = tokenizer("a").input_ids[:1] == [self.roles.get("bos")]
        self.prefix: tuple[int, ...] = (self.roles["bos"],) if begins else ()

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._backend.encode(text, add_special_tokens=False).ids)

    def piece(self, token: int) -> bytes | None:
        """Give the bytes of `token`; None for a special or unknown one."""
        return self.pieces[token] if token < len(self.pieces) else None

    def encode_after(self, before: str, text: str) -> tuple[int, ...] | None:
        """Give the tokens of `text` as it stands behind `before`, whose own tokens stay as they are.

        Where the tokenizer would merge over the boundary, `text` is encoded by itself. None where it cannot be
        spelled exactly, such as text that reads like a special token.
        """
        wanted = text.encode()
        for context in (before[-_LOOKBEHIND:], "", "\n"):
            found = self._last(self.encode(context + text), wanted)
            if found is not None:
                return found
        return None

    def _last(self, tokens: Sequence[int], wanted: bytes) -> tuple[int, ...] | None:
        """Give those of the last tokens that spell `wanted`; None where none of them begin there."""
        missing = len(wanted)
        for index in range(len(tokens), -1, -1):
            if missing == 0:
                mine = tuple(tokens[index:])
                return mine if b"".join(self.pieces[i] or b"" for i in mine) == wanted else None
            piece = self.piece(tokens[index - 1]) if index else None
            if not piece or len(piece) > missing:
                return None
            missing -= len(piece)
        return None


def _style(name: str, decoder: Any) -> str:
    """Say how token strings spell bytes: ``bytes``, ``mark`` or ``plain``."""
    if decoder is None:
        return "plain"
    parts = decoder.get("decoders", [decoder])
    kinds = [part["type"] for part in parts]
    if "ByteLevel" in kinds:
        return "bytes"
    if "Metaspace" in kinds or any(p["type"] == "Replace" and p["pattern"] == {"String": _MARK} for p in parts):
        return "mark"
    rule = "must have a byte-level, SentencePiece-like or plain tokenizer"
    raise CalibrationError(f"'{name}': {rule}, got one that decodes by {', '.join(kinds)}")


def _piece(word: str, style: str) -> bytes:
    if style == "bytes":
        table = _byte_letters()
        return bytes(table[letter] for letter in word) if all(c in table for c in word) else word.encode()
    if style == "mark":
        byte = re.fullmatch(r"<0x([0-9A-F]{2})>", word)
        return bytes([int(byte[1], 16)]) if byte else word.replace(_MARK, " ").encode()
    return word.encode()


@functools.cache
def _byte_letters() -> dict[str, int]:
    """Give the byte behind each letter of a byte-level vocabulary: printable ones stand for themselves (GPT-2)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in set(shown)]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(rest)}


def first_difference(mine: Any, other: Any) -> str | None:
    """Say where two tokenizers first disagree about an ordinary token; None where they share a vocabulary.

    Special tokens may differ (members of a family rename them), and so may the number of ids at the end.
    """
    names = [{i: word for word, i in tokenizer.get_vocab().items()} for tokenizer in (mine, other)]
    special = {i for tok in (mine, other) for i, token in tok.added_tokens_decoder.items() if token.special}
    shared = range(min(max(names[0]), max(names[1])) + 1)
    for i in shared:
        a, b = names[0].get(i), names[1].get(i)
        if a != b and i not in special:
            return f"token {i} is {a!r} there, {b!r} here"
    return None


@dataclass(frozen=True)
class Correspondence:
    """Which tokens of a verifier and of a drafter stand for the same.

    ``direct``: drafter token -> verifier token of the same bytes. ``specials``: verifier token -> drafter token,
    by the same string, else by the same role; ``backward`` the other way.
    """

    verifier: Vocabulary
    drafter: Vocabulary
    direct: Mapping[int, int]
    specials: Mapping[int, int]
    backward: Mapping[int, int]

    @staticmethod
    def between(verifier: Vocabulary, drafter: Vocabulary) -> Correspondence:
        """Compare two vocabularies; `CalibrationError` where their texts have nothing in common."""
        place = {piece: i for i, piece in reversed(list(enumerate(verifier.pieces))) if piece}
        direct = {i: place[piece] for i, piece in enumerate(drafter.pieces) if piece in place and piece}
        if not direct:
            raise CalibrationError("vocabularies: must share at least one token string, got none")
        pairs = {i: drafter.specials[word] for word, i in verifier.specials.items() if word in drafter.specials}
        for role, token in verifier.roles.items():
            if role in drafter.roles:
                pairs.setdefault(token, drafter.roles[role])
        backward: dict[int, int] = {}
        for mine, its in pairs.items():
            backward.setdefault(its, mine)
        return Correspondence(verifier, drafter, direct, pairs, backward)

    def to_drafter(self, ids: Iterable[int]) -> tuple[int, ...] | None:
        """Read verifier tokens as the drafter would; None where the text ends inside a character.

        Special tokens without counterpart are left out, and what stands around them is read as texts of their own.
        Bytes that are no UTF-8 are read as U+FFFD.
        """
        found = [*self.drafter.prefix]
        whole = True
        for run in runs(self.verifier, ids):
            if isinstance(run, int):
                found += [self.specials[run]] if run in self.specials else []
                whole = True
            else:
                text, whole = readable(b"".join(self.verifier.pieces[i] or b"" for i in run))
                found += self.drafter.encode(text)
        return tuple(found) if whole and found else None

    def ngrams(self, ids: Iterable[int]) -> dict[tuple[int, ...], int]:
        """Give the n-grams of drafter tokens (n >= 2) that spell one verifier token each in the text of `ids`."""
        found: dict[tuple[int, ...], int] = {}
        for run in runs(self.verifier, ids):
            if isinstance(run, int):
                continue
            pieces = [self.verifier.pieces[i] or b"" for i in run]
            text, whole = readable(b"".join(pieces))
            if whole and text.encode() == b"".join(pieces):
                found |= self._aligned(run, pieces, self.drafter.encode(text))
        return found

    def _aligned(self, run: Sequence[int], pieces: Sequence[bytes], its: Sequence[int]) -> dict[tuple[int, ...], int]:
        """Find the verifier tokens of a run at both of whose ends a drafter token ends as well."""
        ends = {0: 0}
        at = sum(map(len, pieces)) - sum(len(self.drafter.piece(i) or b"") for i in its)
        spare = at < 0  # a blank that the drafter's tokenizer puts in front lies before the text
        if at not in (0, -1):
            return {}
        for index, token in enumerate(its):
            at += len(self.drafter.piece(token) or b"")
            ends[at] = index + 1
        found, begin = {}, 0
        for token, piece in zip(run, pieces, strict=True):
            end = begin + len(piece)
            if begin in ends and end in ends and ends[end] - ends[begin] > 1 and (begin or not spare):
                found[tuple(its[ends[begin] : ends[end]])] = token
            begin = end
        return found


def runs(vocabulary: Vocabulary, ids: Iterable[int]) -> list[int | list[int]]:
    """Split tokens into runs of ordinary ones (lists) and the special or unknown tokens between them."""
    found: list[int | list[int]] = []
    for token in ids:
        if vocabulary.piece(token) is None:
            found.append(token)
        elif found and isinstance(found[-1], list):
            found[-1].append(token)
        else:
            found.append([token])
    return found


def readable(text: bytes) -> tuple[str, bool]:
    """Decode UTF-8, U+FFFD for bytes that are none; False where it ends inside a character, which is left out."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    found = decoder.decode(text)
    return found, not decoder.getstate()[0]
