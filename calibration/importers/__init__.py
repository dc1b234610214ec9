"""Read what others have measured into TraceSets."""

from calibration.importers.specdecode_bench import import_specdecode_bench

__all__ = ["import_specdecode_bench"]
