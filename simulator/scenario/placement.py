"""The ``[placement]`` table of a scenario: one section for each placement, told apart by its kind."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from calibration.common.settings import Count, Fraction, Positive, Seconds, Table


class SerialPlacement(Table):
    """Draft, then verify, on one device.

    `pad_drafts`: the engine fills every draft up to the policy's length with padding that is verified and never
    accepted, so that a slot always costs draft length + 1 tokens, also where its drafter proposes fewer (OpenVINO
    GenAI's prompt lookup).
    """

    replay: ClassVar[str] = "as recorded"
    kind: Literal["serial"] = "serial"
    pad_drafts: bool = False


class OverlappedPlacement(Table):
    """PEARL: the drafter drafts on its own device while the verifier verifies what was drafted before."""

    replay: ClassVar[str] = "replay as in serial placement, for drafters that see tokens alone"
    kind: Literal["overlapped"]


class AsynchronousPlacement(Table):
    """AMUSD: drafter and verifier never wait for each other; a mismatch rolls the drafter back.

    The policy's draft length bounds what is drafted during one verification.
    """

    replay: ClassVar[str] = (
        "replay as in serial placement, for drafters that see tokens alone; approximation: all slots "
        "share passes and draft steps"
    )
    kind: Literal["asynchronous"]


class ManyServersPlacement(Table):
    """DSI: blocks of drafted tokens are verified by several target servers at once, while drafting goes on.

    `servers`: how many verify blocks, beside one that decodes plainly; left out, as many as needed,
    ceil(verifier step / drafting of a block). Where they are fewer, blocks wait for them. What they cost an hour
    belongs in `costs.usd_per_hour`.
    """

    replay: ClassVar[str] = (
        "replay as in serial placement, for drafters that see tokens alone; approximation: a batch sees "
        "tokens at the end of a common round"
    )
    kind: Literal["many_servers"]
    servers: Count | None = None


class RemotePlacement(Table):
    """The drafter on another device behind a link, in turn with the verifier; ``[costs.drafter]`` is for that device.

    `round_trip_s`: latency of a round, there and back. `bandwidth_gb_s` (1e9 bytes a second; left out: unlimited)
    carries `bytes_per_drafted_token` of every token that is to be verified - 4 for its id alone; sampled verification
    also needs the drafter's probabilities, up to 2 * vocabulary - and 4 bytes back for every token emitted.
    """

    replay: ClassVar[str] = "replay as in serial placement; approximation: drafts of a batch travel together"
    kind: Literal["remote"]
    round_trip_s: Seconds
    bandwidth_gb_s: Positive | None = None
    bytes_per_drafted_token: Positive = 4.0


class LayerParallelPlacement(Table):
    """EasySpec: `group` consecutive layers of the drafter run at once, each on a device of its own.

    A draft step takes ceil(layers / group) / layers of its time, and `sync_s`. `layers`: those of the drafter,
    default what the TraceSet says. `acceptance_drop`: the share of accepted tokens that the drafter loses by it;
    published alignment drops are at most 0.07.
    """

    replay: ClassVar[str] = (
        "approximation: recorded acceptance thinned, draft steps proportional to layers run in turn"
    )
    kind: Literal["layer_parallel"]
    group: Count
    layers: Count | None = None
    sync_s: Seconds = 0.0
    acceptance_drop: Fraction


Placement = Annotated[
    SerialPlacement
    | OverlappedPlacement
    | AsynchronousPlacement
    | ManyServersPlacement
    | RemotePlacement
    | LayerParallelPlacement,
    Field(discriminator="kind"),
]
