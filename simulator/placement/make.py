"""From a scenario's ``[placement]`` table to a placement, and to the prices and the replay that belong to it."""

from __future__ import annotations

from typing import Any, assert_never, cast

import numpy as np

from calibration.common.arrays import Ints
from calibration.common.errors import ScenarioError
from calibration.common.plugins import make_plugin, need
from calibration.traces import DrafterInfo
from simulator.placement.layer_parallel import LayerParallel, grouped_draft
from simulator.placement.overlapped import Asynchronous, Overlapped, Remote, ThinnedRuns
from simulator.placement.servers import ManyServers
from simulator.playback.replay import Replay
from simulator.pricing.costs import DraftPerStep, Prices
from simulator.rounds.protocols import Placement, Played, Round, Serial
from simulator.scenario import fleet as settings
from simulator.stopping import StoppingPolicy


def make_placement(
    chosen: settings.Placement | None,
    max_num_seqs: int,
    policy: StoppingPolicy | None,
    prices: Prices,
    replay: Replay | None,
) -> Placement:
    """Give the placement that a scenario names; `Serial` where it names none or drafts nothing.

    `prices` must have gone through `placed_prices`. Raises `ScenarioError` for a policy or a drafter that cannot be
    placed so.
    """
    if chosen is None or policy is None or replay is None:
        return Serial()
    _check(chosen, policy, replay)
    match chosen:
        case settings.OverlappedPlacement():
            return Overlapped(max_num_seqs)
        case settings.AsynchronousPlacement():
            return Asynchronous(max_num_seqs)
        case settings.ManyServersPlacement(servers=servers):
            return ManyServers(max_num_seqs, servers)
        case settings.RemotePlacement(bandwidth_gb_s=bandwidth):
            bytes_per_s = None if bandwidth is None else bandwidth * 1e9
            return Remote(chosen.round_trip_s, bytes_per_s, chosen.bytes_per_drafted_token)
        case settings.LayerParallelPlacement():
            assert isinstance(prices.draft, DraftPerStep)
            return LayerParallel(prices.draft)
        case settings.SerialPlacement(pad_drafts=padded):
            return Serial(padded)
        case settings.PluginPlacement():
            return _FromOutside(chosen, max_num_seqs)
    assert_never(chosen)


class _FromOutside:
    """A placement that an entry point (settings, max_num_seqs) -> placement makes; what it plays is checked."""

    def __init__(self, chosen: settings.PluginPlacement, max_num_seqs: int) -> None:
        self._name, self._place = chosen.name, "placement.kind"
        self._placement = make_plugin(chosen, self._place, ScenarioError, max_num_seqs)
        need(self._placement, ("play",), "a placement", self._name, self._place, ScenarioError)

    def opened(self, slots: Ints) -> None:
        """Tell the placement, if it listens."""
        if hasattr(self._placement, "opened"):
            self._placement.opened(slots)

    def play(self, round_: Round, left: Ints, policy: StoppingPolicy, replay: Replay) -> Played:
        """Let the placement play."""
        played = self._placement.play(round_, left, policy, replay)
        fault = _fault(played, round_, left)
        if fault is not None:
            raise ScenarioError(f"{self._place}: plugin '{self._name}' must give a Played whose {fault}")
        return cast(Played, played)


def _fault(played: Any, round_: Round, left: Ints) -> str | None:
    """Say what is wrong about a round that was played outside; None where nothing is."""
    shape = f"integer arrays have shape ({round_.active},)"
    for name in ("drafted", "accepted", "emitted"):
        value = getattr(played, name, None)
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu" or value.shape != (round_.active,):
            return f"{shape}, got {name} = {value!r}"
    if (played.accepted < 0).any() or (played.accepted > played.drafted).any():
        return "accepted is from 0 to drafted"
    if (played.emitted < 1).any() or (played.emitted > np.minimum(played.accepted + 1, left)).any():
        return "emitted is from 1 to accepted + 1, and no more than is left"
    if not (np.isfinite(played.seconds) and played.seconds > 0 and played.draft_s >= 0 and played.verify_s >= 0):
        return f"seconds are above zero, got {played.seconds}"
    return None


def _check(chosen: settings.Placement, policy: StoppingPolicy, replay: Replay) -> None:
    """Refuse what a placement cannot play."""
    place = f"placement.kind: '{chosen.kind}'"
    if policy.tree is not None and chosen.kind not in ("serial", "remote"):
        raise ScenarioError(f"{place} drafts chains, got stopping.policy = 'tree'; choose serial or remote")
    if chosen.kind not in ("overlapped", "asynchronous", "many_servers"):
        return
    if policy.longest_draft is None or policy.needs_signals or policy.drafts_ahead is not None:
        raise ScenarioError(
            f"{place} drafts before it is known where from, so that stopping.policy must neither read the drafter's "
            "confidence nor be an oracle; choose e.g. fixed, by_batch, heuristic or goodput"
        )
    if replay.proposal_length is not None:
        raise ScenarioError(
            f"{place} needs a drafter that proposes as many tokens as asked; this one was recorded with its own "
            "proposal lengths; choose serial or remote"
        )


def placed_prices(chosen: settings.Placement | None, prices: Prices, drafter: DrafterInfo | None) -> Prices:
    """Give `prices` with the drafter's step as this placement runs it.

    `drafter` is None where nothing is drafted: then nothing changes. Raises `ScenarioError` where the number of its
    layers is not known and `CostError` where it has no step of its own.
    """
    if not isinstance(chosen, settings.LayerParallelPlacement) or drafter is None:
        return prices
    layers = chosen.layers if chosen.layers is not None else drafter.layers
    if layers is None:
        raise ScenarioError(
            f"placement.layers: must be given: the TraceSet does not say how many '{drafter.name}' has"
        )
    prices.draft = grouped_draft(prices.draft, layers, chosen.group, chosen.sync_s)
    return prices


def acceptance_drop(chosen: settings.Placement | None) -> float:
    """Give the share of accepted tokens that this placement loses."""
    return chosen.acceptance_drop if isinstance(chosen, settings.LayerParallelPlacement) else 0.0


def placed_replay(
    chosen: settings.Placement | None, replay: Replay | None, lengths: tuple[int, ...], seed: int
) -> Replay | None:
    """Give `replay` with what this placement loses of it; `lengths`: output tokens of each recorded sequence."""
    drop = acceptance_drop(chosen)
    return replay if replay is None or drop == 0 else ThinnedRuns(replay, lengths, drop, seed)


def placement_provenance(chosen: settings.Placement | None) -> dict[str, Any]:
    """Say how a placement was simulated; nothing for serial ones."""
    if chosen is None or chosen.kind == "serial":
        return {}
    told = {"placement": f"{chosen.kind}: {chosen.replay}"}
    return told | ({"replay": "approximation: recorded acceptance, thinned"} if acceptance_drop(chosen) else {})
