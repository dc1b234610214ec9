"""Stopping policies: how many tokens each slot drafts in the next round, found by name from a scenario.

One module for each family. A policy sees only what an engine would know at that moment; an oracle says that it is
one. Each says in its docstring where it comes from and how exact its replay is. Those of third parties are found
through entry points: see `simulator.stopping.make`.
"""

from simulator.playback.signals import DrafterRecording
from simulator.rounds.protocols import OraclePolicy, Policy, StoppingPolicy, ask
from simulator.stopping.lengths import ByBatch, Fixed, Oracle, OracleCost
from simulator.stopping.make import make_policy, policy_signals

__all__ = [
    "ByBatch",
    "DrafterRecording",
    "Fixed",
    "Oracle",
    "OracleCost",
    "OraclePolicy",
    "Policy",
    "StoppingPolicy",
    "ask",
    "make_policy",
    "policy_signals",
]
