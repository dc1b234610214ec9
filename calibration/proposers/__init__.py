"""Training-free drafters: proposers that know tokens alone. No torch needed.

>>> from calibration.proposers import SuffixSettings, make
>>> proposer = make(SuffixSettings())
>>> proposer.extend([5, 6, 7, 8, 5, 6])
>>> proposer.propose(3)
Draft(tokens=(7, 8, 5), parents=None)
"""

from calibration.proposers import draft_trees
from calibration.proposers.draft_trees import ProposalRuns, proposals, run_lengths
from calibration.proposers.lookup import LookupProposer, LookupSettings
from calibration.proposers.make import Settings, make, maker
from calibration.proposers.memory import Memory, MemoryProposer, MemorySettings
from calibration.proposers.protocol import Draft, Proposer
from calibration.proposers.retrieval import Datastore, RetrievalProposer, RetrievalSettings
from calibration.proposers.suffix import Corpus, SuffixProposer, SuffixSettings
from calibration.proposers.trigram import TrigramCounts, TrigramProposer, TrigramSettings

__all__ = [
    "Corpus",
    "Datastore",
    "Draft",
    "LookupProposer",
    "LookupSettings",
    "Memory",
    "MemoryProposer",
    "MemorySettings",
    "ProposalRuns",
    "Proposer",
    "RetrievalProposer",
    "RetrievalSettings",
    "Settings",
    "SuffixProposer",
    "SuffixSettings",
    "TrigramCounts",
    "TrigramProposer",
    "TrigramSettings",
    "draft_trees",
    "make",
    "maker",
    "proposals",
    "run_lengths",
]
