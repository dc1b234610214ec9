"""The extra ``calibration``: torch and transformers, imported when needed and kept quiet."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

from calibration.common.errors import MissingExtraError


def require(module: str) -> Any:
    """Import `module` of the extra ``calibration``; `MissingExtraError` says which pip command brings it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as fault:
        if fault.name and fault.name.split(".")[0] != module.split(".")[0]:
            raise
        raise MissingExtraError(module, "calibration") from None


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' own progress bars and advice off the terminal for a while."""
    logging = require("transformers").utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
