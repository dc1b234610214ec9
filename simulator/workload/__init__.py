"""Workloads: which requests arrive, and when.

The engine asks a source for the requests that may start now; the source decides the order and the moment.

    processes, clients, formats -> Arrivals ─┐
    binding (turns, lengths, classes) -> Bindings ─┴-> OpenSource | ClosedSource
"""

from simulator.workload.closed import ClosedSource, OpenSource
from simulator.workload.lengths import Request, Source
from simulator.workload.make import make_source

__all__ = ["ClosedSource", "OpenSource", "Request", "Source", "make_source"]
