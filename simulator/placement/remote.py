"""Remote placement: the drafter on another device, behind a link."""

from __future__ import annotations

from dataclasses import replace

from calibration.common.arrays import Ints
from simulator.playback.replay import Replay
from simulator.rounds.round import Played, Round
from simulator.rounds.serial import Serial
from simulator.stopping import StoppingPolicy

_TOKEN_ID_BYTES = 4


class Remote:
    """Draft there, verify here, in turn: a round takes draft_s + verify_s + round trip + bytes / bandwidth.

    Edge-cloud speculative decoding; with independent acceptance, draft length g and a fast link, the speed-up over
    none is E[tokens] t_t / (g t_d + t_v + RTT). Drafted tokens cross to the verifier, emitted ones back. Rounds in
    which no slot drafts do not use the link. Everything else as `Serial`, trees included. The link's time is part of
    `seconds` and stands in ``extra["link_s"]``.

    Approximation: drafts of a batch travel together, after the last one is complete; the prompt's way to the drafter
    is not charged (it overlaps with the verifier's prefill).
    """

    def __init__(self, round_trip_s: float, bytes_per_s: float | None, bytes_per_drafted_token: float) -> None:
        self._serial = Serial()
        self._round_trip_s, self._bytes_per_s = round_trip_s, bytes_per_s
        self._bytes = bytes_per_drafted_token

    def opened(self, slots: Ints) -> None:
        """Nothing to forget."""

    def play(self, round_: Round, left: Ints, policy: StoppingPolicy, replay: Replay) -> Played:
        """Play one round."""
        played = self._serial.play(round_, left, policy, replay)
        drafted = played.verified_tokens - round_.active
        if drafted == 0:
            return played
        link_s = self._round_trip_s
        if self._bytes_per_s is not None:
            link_s += (self._bytes * drafted + _TOKEN_ID_BYTES * int(played.emitted.sum())) / self._bytes_per_s
        return replace(played, seconds=played.seconds + link_s, extra={**played.extra, "link_s": link_s})
