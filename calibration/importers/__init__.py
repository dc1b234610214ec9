"""Read what others have measured, and what engines report, into TraceSets."""

from calibration.importers.aiperf import import_aiperf
from calibration.importers.evidence import import_evidence
from calibration.importers.measured_run import import_measured_run
from calibration.importers.origin import Origin
from calibration.importers.sglang import import_sglang
from calibration.importers.specdecode_bench import import_specdecode_bench
from calibration.importers.vllm import import_vllm_counters, import_vllm_log, import_vllm_requests

__all__ = [
    "Origin",
    "import_aiperf",
    "import_evidence",
    "import_measured_run",
    "import_sglang",
    "import_specdecode_bench",
    "import_vllm_counters",
    "import_vllm_log",
    "import_vllm_requests",
]
