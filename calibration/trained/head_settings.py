"""How a head is trained; readable without torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from calibration.common.settings import Count
from calibration.trained.settings import TrainSettings


class HeadSettings(TrainSettings):
    """One training run of a head: a student's settings (there are no on-policy batches), and its own.

    ``starts``: so many starts of each text, drawn anew each time it comes, are drafted from; None takes all. The
    divergence of draft j is weighted with ``depth_decay`` ** (j - 1). ``regression`` weighs the smooth L1 distance
    between a predicted feature and the verifier's state, relative to the divergence (EAGLE: 10; None: 1 for an EAGLE
    head and 0 for the others, whose features need not be the verifier's). ``noise``: features are read with uniform
    noise of at most that share of their root mean square (EAGLE trains so, against the errors of its own features).
    ``prompt_states``: the verifier reads the prompts once, so that EAGLE and block heads are trained with them as
    context; else with the output alone. Medusa heads read one state and need none.
    """

    batch_tokens: Count = 512
    starts: Count | None = 64
    depth_decay: Annotated[float, Field(gt=0, le=1)] = 0.8
    regression: Annotated[float, Field(ge=0)] | None = None
    noise: Annotated[float, Field(ge=0)] = 0.0
    prompt_states: bool = True
    loss_vocabulary: Annotated[int, Field(ge=2)] | None = 8192
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3

    @model_validator(mode="after")
    def _off_policy(self) -> HeadSettings:
        if self.on_policy:
            raise ValueError(f"on_policy: heads read the verifier's own states, must be 0, got {self.on_policy}")
        return self
