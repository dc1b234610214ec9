"""Routing to drafters: what classifiers, bandits, merges and oracles are worth on recorded and drifting traffic."""

from analysis.routing.findings import RoutingFindings
from analysis.routing.study import RoutingSettings, study_routing

__all__ = ["RoutingFindings", "RoutingSettings", "study_routing"]
