"""Drafters with another vocabulary: any causal LM with any tokenizer drafts for any verifier.

The committed text is read by the drafter's tokenizer, the drafter drafts greedily, and its draft becomes tokens of
the verifier: through text, or through n-grams of drafter tokens (OmniDraft); see
`calibration.drafters.foreign_drafting`. The committed tokens are never changed.

What is proposed is a function of the committed text alone, in greedy and in sampled decoding: given tokens, accepted
with probability p(x). Drafts are therefore lossless, and recorded run lengths replay exactly. The confidence of a
proposed token is the product of the drafter's probabilities of those tokens that it needs and the ones before it did
not (for an n-gram OmniDraft's q'(t) = prod q(d)), its entropy the sum of theirs.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, ClassVar, Literal

from calibration.common.settings import Count
from calibration.common.vocabularies import Correspondence, Vocabulary
from calibration.drafters.standalone import LoadedSettings
from calibration.models.load import Verifier, describe
from calibration.traces.manifest import DrafterInfo

if TYPE_CHECKING:
    from calibration.drafters.foreign_drafting import ForeignDrafter


class Foreign(LoadedSettings):
    """A causal LM with a tokenizer of its own.

    ``through``: ``text`` encodes the draft anew, ``ngrams`` maps its tokens; ``corpus_path`` gives n-grams to begin
    with, from a TraceSet or a corpus of training text. ``max_draft_tokens``: passes of the drafter per round at most,
    and tokens proposed at most.
    """

    paradigm: ClassVar[str] = "foreign"
    kind: Literal["foreign"] = "foreign"
    through: Literal["text", "ngrams"] = "text"
    corpus_path: str | None = None
    max_draft_tokens: Count = 16

    def build(self, verifier: Verifier) -> ForeignDrafter:
        """Load the drafter and compare the vocabularies."""
        from calibration.drafters.foreign_drafting import ForeignDrafter

        model, tokenizer = self.load(verifier)
        words = Correspondence.between(
            Vocabulary(verifier.info.name, verifier.tokenizer), Vocabulary(self.label, tokenizer)
        )
        known = self._known(words)
        told = {"model": self.model, "through": self.through, "shared_tokens": len(words.direct)}
        if self.corpus_path is not None:
            told |= {"ngrams": len(known), "ngrams_sha256": _hash(known)}
        info = DrafterInfo(
            **describe(self.label, model).model_dump(),
            paradigm=self.paradigm,
            deterministic=True,
            max_draft_tokens=self.max_draft_tokens,
            settings=told,
        )
        return ForeignDrafter(info, model, words, self.through, known)

    def _known(self, words: Correspondence) -> dict[tuple[int, ...], int]:
        """Give the n-grams of the corpus."""
        if self.corpus_path is None:
            return {}
        from calibration.drafters.proposed import read_texts

        found: dict[tuple[int, ...], int] = {}
        for text in read_texts(self.corpus_path):
            found |= words.ngrams(text)
        return found


def _hash(ngrams: dict[tuple[int, ...], int]) -> str:
    lines = sorted(f"{' '.join(map(str, key))} {token}" for key, token in ngrams.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
