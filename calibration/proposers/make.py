"""From settings to proposers: what is fixed is prepared once and shared, and every request gets a fresh proposer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from calibration.common.errors import CalibrationError
from calibration.proposers.lookup import LookupProposer, LookupSettings
from calibration.proposers.memory import Memory, MemoryProposer, MemorySettings
from calibration.proposers.protocol import Proposer
from calibration.proposers.retrieval import Datastore, RetrievalProposer, RetrievalSettings
from calibration.proposers.suffix import Corpus, SuffixProposer, SuffixSettings
from calibration.proposers.trigram import TrigramCounts, TrigramProposer, TrigramSettings

Settings = LookupSettings | SuffixSettings | RetrievalSettings | TrigramSettings | MemorySettings


def maker(
    settings: Settings, *, corpus: Iterable[Sequence[int]] | None = None, datastore: Datastore | None = None
) -> Callable[[], Proposer]:
    """Give a function that makes a fresh proposer of `settings` for a request.

    `corpus`: token sequences of other texts, read once, here. Retrieval needs them, or a `datastore` built earlier;
    prompt lookup takes none. `CalibrationError` where they are missing or would go unused.
    """
    if datastore is not None and not isinstance(settings, RetrievalSettings):
        raise CalibrationError(f"datastore: is for retrieval alone, got one for {type(settings).__name__}")
    match settings:
        case LookupSettings():
            if corpus is not None:
                raise CalibrationError("corpus: prompt lookup takes none")
            return lambda: LookupProposer(settings)
        case SuffixSettings():
            history = None if corpus is None else Corpus(corpus)
            return lambda: SuffixProposer(settings, history)
        case RetrievalSettings():
            if (corpus is None) == (datastore is None):
                got = "neither" if corpus is None else "both"
                raise CalibrationError(f"retrieval: needs a corpus or a datastore, got {got}")
            store = datastore or Datastore.build(corpus or (), order=settings.max_match)
            return lambda: RetrievalProposer(settings, store)
        case TrigramSettings():
            counts = TrigramCounts(corpus or (), branching=settings.branching)
            return lambda: TrigramProposer(settings, counts)
        case MemorySettings():
            memory = Memory(settings, corpus or ())
            return lambda: MemoryProposer(settings, memory)


def make(
    settings: Settings, *, corpus: Iterable[Sequence[int]] | None = None, datastore: Datastore | None = None
) -> Proposer:
    """Give one fresh proposer; where several requests share a corpus, `maker` reads it once."""
    return maker(settings, corpus=corpus, datastore=datastore)()
