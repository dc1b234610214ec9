"""Placements: where and when drafting happens, and so what one decode round gives and how long it takes.

A placement composes a round: it asks the policy, replays acceptance and prices the work. `Serial` is the default;
the others are found by the `kind` of a scenario's ``[placement]``. What reaches the user is the same text under every
one of them: a placement changes when, never what.

Policies that weigh time (goodput, budget) price rounds as if they were serial.
"""

from simulator.placement.layer_parallel import LayerParallel
from simulator.placement.make import make_placement, placed_prices, placed_replay
from simulator.placement.overlapped import Asynchronous, Overlapped, Remote
from simulator.placement.servers import ManyServers
from simulator.rounds.protocols import Placement, Serial

__all__ = [
    "Asynchronous",
    "LayerParallel",
    "ManyServers",
    "Overlapped",
    "Placement",
    "Remote",
    "Serial",
    "make_placement",
    "placed_prices",
    "placed_replay",
]
