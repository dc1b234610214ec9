"""A drafter for long contexts that keeps few keys and values: sink, memory block and a sliding window (MASW).

MASW is not published in a form that could be followed; this is our reading of it. The drafter attends to the first
`sink` tokens of a text, to its last `recent` ones, and to a memory block of the prompt: groups of
`calibration.drafters.memory_block.BLOCK` neighbouring tokens that the prompt's own last tokens attend to most. The
memory is chosen once, after the prompt, and is a function of the prompt alone, so that replays stay exact. The
verifier keeps its whole context.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from calibration.common.errors import CalibrationError
from calibration.common.settings import Count, Natural
from calibration.drafters.info import DrafterSettings
from calibration.drafters.nested import build_lane
from calibration.models.load import Verifier

if TYPE_CHECKING:
    from calibration.drafters.info import AnyDrafter
    from calibration.drafters.lanes import ModelDrafter
    from calibration.models.lane import Window


class Windowed(DrafterSettings):
    """`drafter` with `sink` first, `recent` last and up to `memory` tokens of the prompt in sight.

    ``prefill`` says what the prompt's own tokens attend to: ``whole``, everything before them, and keys and values
    are dropped behind the prompt; or ``window``, the same few tokens as later ones. ``memory_queries`` last tokens of
    the prompt choose the memory block by their attention in layer ``memory_layer`` (from 0; none: the sum over all).
    """

    paradigm: ClassVar[str] = "windowed"
    kind: Literal["windowed"] = "windowed"
    drafter: AnyDrafter
    sink: Natural = 4
    recent: Count = 512
    memory: Natural = 0
    memory_queries: Count = 32
    memory_layer: Natural | None = None
    prefill: Literal["whole", "window"] = "whole"

    @property
    def default_name(self) -> str:
        """Name where none is given."""
        return f"{self.drafter.label}-window-{self.sink}-{self.memory}-{self.recent}"

    def build(self, verifier: Verifier) -> ModelDrafter:
        """Make the drafter; it costs no memory of its own."""
        from calibration.drafters.lanes import ModelDrafter

        inner = build_lane(self, self.drafter, verifier)
        if inner.window is not None:
            raise CalibrationError(f"drafter '{self.label}': drafter must have no window of its own, got one")
        layers = inner.model.config.num_hidden_layers
        if self.memory_layer is not None and self.memory_layer >= layers:
            rule = f"memory_layer must be less than the drafter's {layers} layers"
            raise CalibrationError(f"drafter '{self.label}': {rule}, got {self.memory_layer}")
        told = {
            "drafter": {"paradigm": inner.info.paradigm, **inner.info.settings},
            **self.model_dump(exclude={"name", "kind", "drafter"}),
        }
        info = inner.info.model_copy(update={"name": self.label, "paradigm": self.paradigm, "settings": told})
        return ModelDrafter(info, inner.model, window=self.window(inner), stop=inner.stop)

    def window(self, drafter: ModelDrafter) -> Window:
        """Give the limits of `drafter`'s attention."""
        from calibration.drafters.memory_block import MemoryBlock
        from calibration.models.lane import Window

        choose = None
        if self.memory:
            choose = MemoryBlock(
                drafter.model, self.memory, self.sink, self.recent, self.memory_queries, self.memory_layer
            )
        return Window(self.sink, self.recent, self.prefill == "whole", choose, self.memory)
