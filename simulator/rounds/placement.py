"""What a placement is."""

from __future__ import annotations

from typing import Protocol

from calibration.common.arrays import Ints
from simulator.playback.replay import Replay
from simulator.rounds.policy import StoppingPolicy
from simulator.rounds.round import Played, Round


class Placement(Protocol):
    """Plays decode rounds. Every slot emits at least one token in each of them."""

    def opened(self, slots: Ints) -> None:
        """Hear that `slots` now hold other requests: forget what was known of the old ones."""
        ...

    def play(self, round_: Round, left: Ints, policy: StoppingPolicy, replay: Replay) -> Played:
        """Play one round; `left`: output tokens to come, shape (active,), beyond which nothing is emitted."""
        ...
