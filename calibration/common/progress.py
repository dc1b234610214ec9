"""How long work tells of its progress."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Called with what is done and what there is to do."""

StageProgress = Callable[[str, int, int], None]
"""Called with the name of a stage, what is done of it and what there is to do."""
