"""The studies of public measurements are not installed: they are found beside the tests, after what is."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))
