"""The window of unverified tokens that a drafter is ahead by, where it drafts while the verifier verifies."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from calibration.common.arrays import Ints


class Compared(NamedTuple):
    """What the end of an overlapped round tells; arrays have shape (active,).

    `compared` drafted tokens met the verifier's choice, `accepted` of them agreed; `pending` tokens are drafted and
    unverified from now on; `on` says which drafts go on.
    """

    compared: Ints
    accepted: Ints
    emitted: Ints
    pending: Ints
    on: NDArray[np.bool_]


def compare(pending: Ints, drafted: Ints, run: Ints, left: Ints) -> Compared:
    """Verify `pending` tokens while `drafted` ones were added behind them.

    The verifier reads the last committed token and the pending ones, and so knows the token behind each of them. That
    behind the last is the first of `drafted`, if there is one: it is compared as well. All agreed: the draft goes on,
    and its other new tokens are pending. Else the first that disagreed is replaced and the rest is void. `run`: how
    many drafted tokens agree from the committed position on, for a draft that goes on as for a new one: exact for
    drafters that see tokens alone.
    """
    fresh = drafted > 0
    compared = pending + fresh
    accepted = np.minimum(run, compared)
    on = fresh & (accepted == compared)
    emitted = np.minimum(np.minimum(run, pending) + 1, left)
    return Compared(compared, accepted, emitted, np.where(on, drafted - 1, 0), on)
