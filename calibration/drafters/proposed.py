"""Training-free drafters as kinds of a job: suffix automaton, retrieval, tri-gram search and speculation memory.

Each proposes given tokens, chains or trees; `calibration.proposers` says how. Their fields are those of the settings
there. All but prompt lookup take texts of others, ``corpus_path``: the outputs of a TraceSet, or of a corpus of
training text (`calibration.trained.corpus`), all of them. A text that is being recorded must not be among them, or
its drafts are its own words. The manifest says how many tokens were read, and their sha256.

Prompt lookup as a drafter.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from calibration.common.errors import CalibrationError
from calibration.common.plugins import PluginTable, make_plugin, need
from calibration.common.settings import Count
from calibration.drafters.info import DrafterSettings
from calibration.models.load import Verifier
from calibration.proposers import (
    Datastore,
    MemorySettings,
    RetrievalSettings,
    Settings,
    SuffixSettings,
    TrigramSettings,
    maker,
)
from calibration.proposers.lookup import LookupSettings
from calibration.proposers.protocol import Proposer
from calibration.traces import TraceSet

if TYPE_CHECKING:
    from calibration.drafters.given import GivenDrafter

Texts = list[tuple[int, ...]]


class _Proposed(DrafterSettings):
    """What these kinds share: texts of others, and a longest draft."""

    corpus_path: str | None = None
    max_draft_tokens: int

    def proposer(self) -> Settings:
        """Give the settings of the proposer; `CalibrationError` names every fault."""
        raise NotImplementedError

    def datastore(self) -> Datastore | None:
        """Give the datastore that is read from a file, where there is one."""
        return None

    def build(self, verifier: Verifier) -> GivenDrafter:
        """Make the drafter; texts are read once, here."""
        from calibration.drafters.given import GivenDrafter

        settings, store = self.proposer(), self.datastore()
        texts = None if self.corpus_path is None else read_texts(self.corpus_path)
        told: dict[str, Any] = json.loads(json.dumps(asdict(settings)))
        tokens = None if store is None else store.tokens
        if texts is not None:
            tokens = _joined(texts)
        if tokens is not None:
            _check_vocabulary(self.label, tokens, verifier.model.config.vocab_size)
            told |= {"corpus_tokens": int((tokens >= 0).sum()), "corpus_texts": int((tokens < 0).sum())}
            told["corpus_sha256"] = hashlib.sha256(tokens.astype("<i4").tobytes()).hexdigest()
        make = maker(settings, corpus=texts, datastore=store)
        make()  # a datastore that does not suit the settings is refused here, not in the middle of a recording
        info = self.made_of(**told).model_copy(update={"max_draft_tokens": self.max_draft_tokens})
        return GivenDrafter(info, make)

    def _own(self) -> dict[str, Any]:
        """Give the fields that the proposer's settings have as well."""
        shared = {"name", "kind", "corpus_path", "datastore_path"}
        return {field: getattr(self, field) for field in type(self).model_fields if field not in shared}


class Suffix(_Proposed):
    """Copies what followed the longest match of the text's end, in the request or in other texts; chains."""

    paradigm: ClassVar[str] = "suffix"
    kind: Literal["suffix"] = "suffix"
    min_match: int = SuffixSettings.min_match
    occurrence: str = SuffixSettings.occurrence
    length_factor: float | None = SuffixSettings.length_factor
    min_probability: float = SuffixSettings.min_probability
    max_draft_tokens: int = SuffixSettings.max_draft_tokens

    def proposer(self) -> SuffixSettings:
        """Give the settings of the proposer."""
        return SuffixSettings(**self._own())


class Retrieval(_Proposed):
    """Drafts a tree, or a chain, of what followed the longest match in a datastore.

    The datastore is the file ``datastore_path``, or is made of the texts of ``corpus_path``: one of the two.
    """

    paradigm: ClassVar[str] = "retrieval"
    kind: Literal["retrieval"] = "retrieval"
    datastore_path: str | None = None
    max_match: int = RetrievalSettings.max_match
    min_match: int = RetrievalSettings.min_match
    shape: str = RetrievalSettings.shape
    nodes: int = RetrievalSettings.nodes
    max_draft_tokens: int = RetrievalSettings.max_draft_tokens
    max_occurrences: int = RetrievalSettings.max_occurrences

    def proposer(self) -> RetrievalSettings:
        """Give the settings of the proposer."""
        return RetrievalSettings(**self._own())

    def datastore(self) -> Datastore | None:
        """Read the datastore from its file."""
        if (self.datastore_path is None) == (self.corpus_path is None):
            got = "neither" if self.corpus_path is None else "both"
            raise CalibrationError(f"drafter '{self.label}': must have datastore_path or corpus_path, got {got}")
        return None if self.datastore_path is None else Datastore.load(self.datastore_path)


class Trigram(_Proposed):
    """Grows a tree by search over tri-gram counts of other texts and of the request (ADED)."""

    paradigm: ClassVar[str] = "trigram"
    kind: Literal["trigram"] = "trigram"
    nodes: int = TrigramSettings.nodes
    simulations: int = TrigramSettings.simulations
    max_draft_tokens: int = TrigramSettings.max_draft_tokens
    branching: int = TrigramSettings.branching
    exploration: float = TrigramSettings.exploration
    back_off: float = TrigramSettings.back_off
    online_weight: int = TrigramSettings.online_weight

    def proposer(self) -> TrigramSettings:
        """Give the settings of the proposer."""
        return TrigramSettings(**self._own())


class Memory(_Proposed):
    """Remembers recurring pieces, and learns while it reads when to trust them; chains."""

    paradigm: ClassVar[str] = "memory"
    kind: Literal["memory"] = "memory"
    min_order: int = MemorySettings.min_order
    max_order: int = MemorySettings.max_order
    half_life: float = MemorySettings.half_life
    doubt: float = MemorySettings.doubt
    corpus_weight: float = MemorySettings.corpus_weight
    thresholds: Annotated[tuple[float, ...], Field(strict=False)] = MemorySettings.thresholds
    first_threshold: float = MemorySettings.first_threshold
    draft_cost: float = MemorySettings.draft_cost
    rate: float = MemorySettings.rate
    warm_up: int = MemorySettings.warm_up
    max_draft_tokens: int = MemorySettings.max_draft_tokens

    def proposer(self) -> MemorySettings:
        """Give the settings of the proposer."""
        return MemorySettings(**self._own())


def read_texts(path: str | Path) -> Texts:
    """Read the output tokens of every text of a TraceSet or of a corpus of training text.

    `CalibrationError` where `path` is neither, or a text has no token ids: none is left out.
    """
    folder = Path(path)
    if (folder / "corpus.json").is_file():
        from calibration.trained.corpus import read_corpus

        return [text.output_ids for text in read_corpus(folder)]
    if not (folder / "manifest.json").is_file():
        raise CalibrationError(
            f"{folder}: must be a TraceSet or a corpus (a folder with manifest.json or corpus.json)"
        )
    table = TraceSet.read(folder).sequences
    texts = table["output_token_ids"].to_pylist()
    if None in texts:
        name = table["sequence_id"][texts.index(None)].as_py()
        raise CalibrationError(f"{folder}: must hold the token ids of every output, '{name}' has none")
    return [tuple(text) for text in texts]


def _joined(texts: Sequence[Sequence[int]]) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Give all texts one behind the other, each closed by -1, as a datastore keeps them."""
    return np.concatenate([np.array([*text, -1], dtype=np.int32) for text in texts])


def _check_vocabulary(label: str, tokens: np.ndarray[Any, np.dtype[np.int32]], vocabulary: int) -> None:
    largest = int(tokens.max(initial=-1))
    if largest >= vocabulary:
        rule = f"token ids of its texts must be below the verifier's vocabulary {vocabulary}"
        raise CalibrationError(f"drafter '{label}': {rule}, got {largest}")


class PromptLookup(DrafterSettings):
    """Prompt lookup with suffixes of `ngram_max` down to `ngram_min` tokens; see `calibration.proposers.lookup`."""

    paradigm: ClassVar[str] = "prompt-lookup"
    kind: Literal["prompt-lookup"] = "prompt-lookup"
    ngram_max: int = LookupSettings.ngram_max
    ngram_min: int = LookupSettings.ngram_min
    max_draft_tokens: int = LookupSettings.max_draft_tokens

    def build(self, verifier: Verifier) -> GivenDrafter:
        """Make the drafter."""
        from calibration.drafters.given import GivenDrafter
        from calibration.proposers.lookup import LookupProposer

        sizes = LookupSettings(self.ngram_max, self.ngram_min, self.max_draft_tokens)
        info = self.made_of(ngram_max=self.ngram_max, ngram_min=self.ngram_min, match="earliest")
        info = info.model_copy(update={"max_draft_tokens": self.max_draft_tokens})
        return GivenDrafter(info, lambda: LookupProposer(sizes))


class FromOutside(DrafterSettings):
    """A proposer from outside, by the name of its entry point; written ``kind = "plugin:name"``.

    The entry point is a callable (settings) -> proposer, see `calibration.proposers.protocol.Proposer`; it is called
    once for every request.
    """

    paradigm: ClassVar[str] = "plugin"
    kind: Literal["plugin"]
    plugin: str
    settings: dict[str, Any] = Field(default_factory=dict)
    max_draft_tokens: Count = 20

    @property
    def default_name(self) -> str:
        """Name where none is given: the entry point's."""
        return self.plugin

    def build(self, verifier: Verifier) -> GivenDrafter:
        """Make the drafter; what does not take its settings is refused here."""
        from calibration.drafters.given import GivenDrafter

        table = PluginProposer(name=self.plugin, settings=self.settings)
        place = f"drafter '{self.label}'"

        def make() -> Proposer:
            made: Proposer = make_plugin(table, place, CalibrationError)
            need(made, ("extend", "propose"), "a proposer", self.plugin, place, CalibrationError)
            return made

        make()
        told = {"paradigm": f"plugin:{self.plugin}", "max_draft_tokens": self.max_draft_tokens}
        return GivenDrafter(self.made_of(**self.settings).model_copy(update=told), make)


class PluginProposer(PluginTable):
    """The entry point of `FromOutside`."""

    group: ClassVar[str] = "paceline.drafters"
