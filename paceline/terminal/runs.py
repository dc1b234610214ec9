"""Results as tables for the terminal: grouped, labelled, with units, and with what kind of number each one is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from calibration.common.errors import ScenarioError, did_you_mean
from simulator.experiments.axes import text_of
from simulator.experiments.replicate import COVERS, Estimate
from simulator.results.evidence import lowest_told, steps_told, verifier_on

if TYPE_CHECKING:
    from rich.table import Table

    from simulator.experiments.compare import Comparison, Contrast
    from simulator.experiments.replicate import Replications
    from simulator.experiments.sweep import SweepResult

LATENCIES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2el": "end to end"}
GROUPS: dict[str, dict[str, tuple[str, str]]] = {
    "requests": {
        "completed": ("requests measured", ""),
        "warmup_requests_removed": ("left out as warm-up", ""),
        "warmup_removed_s": ("warm-up", "s"),
        "startup_requests": ("left out of latencies as start-up", ""),
        "truncated_requests": ("stopped before the end of their recording", ""),
        "resampled_requests": ("longer than their recording", ""),
        "resampled_tokens": ("output tokens resampled", ""),
        "total_input_tokens": ("prompt tokens", ""),
        "total_output_tokens": ("output tokens", ""),
        "duration": ("time measured", "s"),
        "latency_growth": ("growth of end-to-end latency with arrival time", "s/s"),
    },
    "throughput": {
        "request_throughput": ("requests", "requests/s"),
        "request_goodput": ("goodput: requests within all SLOs", "requests/s"),
        "output_throughput": ("output tokens", "tokens/s"),
        "total_token_throughput": ("prompt and output tokens", "tokens/s"),
        "engine_output_throughput": ("output tokens, fillers included", "tokens/s"),
    },
    "service-level objectives": {
        "slo_attainment": ("share within all SLOs", ""),
        **{f"slo_attainment_{key}": (f"share within that of {label}", "") for key, label in LATENCIES.items()},
    },
    "speculation": {
        "spec_decode_num_drafts": ("drafts", ""),
        "spec_decode_draft_tokens": ("tokens drafted", ""),
        "spec_decode_accepted_tokens": ("tokens accepted (bonus excluded)", ""),
        "wasted_draft_tokens": ("rejected tokens", ""),
        "spec_decode_acceptance_rate": ("acceptance rate", "%"),
        "spec_decode_acceptance_length": ("accepted length (bonus included)", "tokens"),
        "tokens_per_round": ("per round, with and without a draft (bonus included)", "tokens"),
        "drafted_tokens_per_round": ("drafted per round", "tokens"),
    },
    "engine time": {
        "draft_s": ("drafting", "s"),
        "verify_s": ("verification", "s"),
        "prefill_s": ("prefill", "s"),
        "overhead_s": ("host overhead", "s"),
        "swap_s": ("swapping", "s"),
        "link_s": ("on the link to the drafter", "s"),
        "calibration_s": ("repairing the drafter's cache", "s"),
        "idle_s": ("idle", "s"),
        "iterations": ("engine iterations", ""),
        "extrapolated_iterations": ("iterations priced by extrapolation", ""),
    },
    "memory": {
        "num_gpu_blocks": ("KV blocks", ""),
        "mean_kv_cache_usage": ("share of KV blocks in use, mean", ""),
        "peak_kv_cache_usage": ("share of KV blocks in use, most", ""),
        "num_preemptions": ("preemptions", ""),
        "recomputed_tokens": ("tokens computed again", ""),
        "swapped_tokens": ("tokens swapped out", ""),
        "prefix_cache_queries": ("prompt tokens looked up in the prefix cache", ""),
        "prefix_cache_hits": ("prompt tokens found there", ""),
        "prefix_cache_hit_rate": ("share found there", ""),
    },
    "price": {
        "usd_per_million_output_tokens": ("per million output tokens", "USD"),
        "joules": ("energy of all steps", "J"),
        "joules_per_million_output_tokens": ("per million output tokens", "J"),
    },
}
"""Group, name of the number, (label, unit). Latencies have a table of their own; numbers known to none come last."""
HEADLINES = (
    "output_throughput",
    "request_throughput",
    "request_goodput",
    "slo_attainment",
    "mean_ttft_ms",
    "p99_ttft_ms",
    "mean_tpot_ms",
    "p99_tpot_ms",
    "p99_itl_ms",
    "mean_e2el_ms",
    "p99_e2el_ms",
    "spec_decode_acceptance_length",
    "usd_per_million_output_tokens",
    "joules_per_million_output_tokens",
)
"""What a comparison shows unless told otherwise, where it has it."""
COLUMNS = {
    "output_throughput": "tokens/s",
    "request_goodput": "goodput/s",
    "mean_ttft_ms": "TTFT ms",
    "mean_tpot_ms": "TPOT ms",
    "p99_e2el_ms": "p99 end to end ms",
    "spec_decode_acceptance_length": "accepted, with bonus",
    "usd_per_million_output_tokens": "USD/M tokens",
}
"""What a sweep shows unless told otherwise, where it has it, under short names."""
_QUIET = frozenset({"seed"})


def summary_table(summary: Mapping[str, Any]) -> Table:
    """Give every number of a run's summary as a table in groups, with a caption that says what the numbers are."""
    table = _table(f"{summary.get('name', 'run')}: simulated", caption(summary))
    table.add_column("")
    table.add_column("value", justify="right")
    table.add_column("unit")
    numbers = {name: value for name, value in summary.items() if _is_number(value) and name not in _QUIET}
    for title, rows in _groups(numbers):
        _heading(table, title)
        for name in rows:
            label, unit = labelled(name)
            table.add_row(f"  {label}", number_text(numbers[name]), unit)
        rates = summary.get("spec_decode_per_position_acceptance_rates")
        if title == "speculation" and rates:
            table.add_row("  accepted at position 1, 2, .. of all drafts", " ".join(f"{r:.2f}" for r in rates), "")
    return table


def replications_table(replications: Replications) -> Table:
    """Give mean, standard deviation and 95% interval of every number over the replications."""
    n = len(replications.seeds)
    said = "all equal: nothing is random, no interval" if replications.deterministic else "95% Student's t intervals"
    title = f"{replications.scenario.name}: {n} replications, {said}"
    covers = "" if replications.deterministic else f"intervals {COVERS}\n"
    table = _table(title, covers + caption(replications.summaries[0]))
    for name in ("", "mean", "95% interval (seeds)", "sd", "unit"):
        table.add_column(name, justify="left" if name in ("", "unit") else "right")
    estimates = {name: e for name, e in replications.estimates.items() if "[" not in name}
    for group, names in _groups(estimates):
        _heading(table, group)
        for name in names:
            label, unit = labelled(name)
            found = estimates[name]
            some = "" if found.n == n else f" (in {found.n})"
            sd = "-" if found.sd is None else number_text(found.sd)
            table.add_row(f"  {label}{some}", number_text(found.mean), interval_text(found), sd, unit)
    return table


def comparison_table(comparison: Comparison, metrics: Sequence[str] | None = None) -> Table:
    """Give the first scenario against each other one: means, paired difference and ratio, verdict.

    `metrics`: which numbers (default: `HEADLINES`); an unknown one is a `ScenarioError`.
    """
    n = len(comparison.seeds)
    table = _table(
        f"against '{comparison.labels[0]}': {n} replications on common random numbers, 95% paired t intervals",
        "difference: other minus baseline; variance reduction: how many times smaller common random numbers make its "
        f"variance; intervals {COVERS}, each by itself\n" + caption(*(run.summaries[0] for run in comparison.runs)),
    )
    for name in ("", "baseline", "other", "difference", "ratio", "variance reduction", "verdict"):
        table.add_column(name, justify="left" if name in ("", "verdict") else "right")
    known = {name for contrasts in comparison.contrasts for name in contrasts}
    for label, contrasts in zip(comparison.labels[1:], comparison.contrasts, strict=True):
        _heading(table, label)
        for name in _chosen(metrics, known):
            if name in contrasts:
                table.add_row(*_contrast_row(name, contrasts[name]))
    return table


def _contrast_row(name: str, contrast: Contrast) -> tuple[str, ...]:
    label, unit = labelled(name)
    ratio = "-" if contrast.ratio is None else estimate_text(contrast.ratio)
    reduction = "-" if contrast.variance_reduction is None else f"{contrast.variance_reduction:.3g}x"
    return (
        f"  {label}{f', {unit}' if unit else ''}",
        number_text(contrast.a.mean),
        number_text(contrast.b.mean),
        estimate_text(contrast.difference),
        ratio,
        reduction,
        contrast.verdict,
    )


def sweep_table(result: SweepResult, metrics: Sequence[str] | None = None) -> Table:
    """Give a row per point of a sweep: the value of every axis and the chosen numbers, with half their interval.

    `metrics`: which numbers (default: `COLUMNS`); an unknown one is a `ScenarioError`.
    """
    from rich.text import Text

    plan = result.plan
    several = plan.replications > 1
    said = f", {plan.replications} replications each: mean +- half the 95% interval" if several else ""
    covers = f"intervals {COVERS}\n" if several else ""
    title = f"{plan.points} scenarios{said}; {result.reused} of {len(plan.cells)} cells from the store"
    table = _table(title, covers + caption(*result.summaries))
    points = result.estimates()
    known = {name for _, estimates in points for name in estimates}
    chosen = [name for name in COLUMNS if name in known] if metrics is None else _chosen(metrics, known)
    for key in plan.axes:
        table.add_column(Text(key.rpartition(".")[2]), overflow="fold")
    for name in chosen:
        table.add_column(COLUMNS.get(name, name), justify="right", overflow="fold")
    for point, estimates in points:
        found = (estimates.get(name) for name in chosen)
        table.add_row(*(Text(text_of(value)) for value in point.values()), *(half_text(e) for e in found))
    return table


def caption(*summaries: Mapping[str, Any]) -> str:
    """Say what stands behind the numbers of runs: the lowest grades, how exact the replay, whose prices."""
    found = [summary.get("provenance", {}) for summary in summaries]

    def all_of(key: str, missing: str = "unknown") -> str:
        return " / ".join(dict.fromkeys(str(one.get(key) or missing) for one in found))

    lowest = lowest_told(found)
    imported = dict.fromkeys(str(one["acceptance"]) for one in found if ": " in str(one.get("acceptance", "")))
    origin = f" ({' / '.join(imported)})" if imported else ""
    others = dict.fromkeys(str(one["costs_of"]) for one in found if "costs_of" in one)
    priced = f", priced as {' / '.join(others)}" if others else ""
    where = " / ".join(dict.fromkeys(verifier_on(one) for one in found))
    return (
        f"simulated; acceptance {lowest['acceptance_grade']}{origin}, replay {all_of('replay')}; step costs "
        f"{all_of('costs')} ({steps_told(lowest)}){priced}; {where}; drafter {all_of('drafter', 'none')}"
        + _doubts(*summaries)
    )


def _doubts(*summaries: Mapping[str, Any]) -> str:
    """Name the recorded tables that nothing vouches for: without a stated sha256, or edited by hand since."""
    told = ""
    for key, words in (("unverified_tables", "unverified"), ("edited_tables", "edited by hand")):
        names = dict.fromkeys(name for one in summaries for name in one.get("provenance", {}).get(key, ()))
        told += f"; recorded {', '.join(names)} {words}" if names else ""
    return told


def labelled(name: str) -> tuple[str, str]:
    """Give (label, unit) of a number of a summary; an unknown one is its own label."""
    for rows in GROUPS.values():
        if name in rows:
            return rows[name]
    statistic, _, rest = name.partition("_")
    kind = rest.removesuffix("_ms")
    if rest.endswith("_ms") and kind in LATENCIES:
        return f"{LATENCIES[kind]} {'sd' if statistic == 'std' else statistic}", "ms"
    return name, ""


def number_text(value: float) -> str:
    """Give a number for reading: whole ones with commas, others to four significant digits."""
    if isinstance(value, int) or (float(value).is_integer() and abs(value) >= 1000):
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def interval_text(found: Estimate) -> str:
    """Give the interval, or a dash."""
    if found.low is None or found.high is None:
        return "-"
    return f"{number_text(found.low)} .. {number_text(found.high)}"


def estimate_text(found: Estimate) -> str:
    """Give mean and interval: ``1.2 [1.1, 1.3]``."""
    if found.low is None or found.high is None:
        return number_text(found.mean)
    return f"{number_text(found.mean)} [{number_text(found.low)}, {number_text(found.high)}]"


def half_text(found: Estimate | None) -> str:
    """Give mean +- half the interval, where there is one."""
    if found is None:
        return "-"
    half = found.half_width
    return number_text(found.mean) + ("" if half is None else f" +- {half:.2g}")


def _groups(numbers: Iterable[str]) -> list[tuple[str, list[str]]]:
    """Sort names into groups, in the order of `GROUPS`, latencies after throughput, unknown ones last."""
    names = list(numbers)
    found: list[tuple[str, list[str]]] = []
    placed: set[str] = set()
    for title, rows in GROUPS.items():
        found.append((title, [name for name in rows if name in names]))
        if title == "throughput":
            found.append(("latency", [n for n in names if n.endswith("_ms") and labelled(n)[1] == "ms"]))
    for _, rows_found in found:
        placed |= set(rows_found)
    found.append(("other", [name for name in names if name not in placed]))
    return [(title, rows_found) for title, rows_found in found if rows_found]


def _chosen(metrics: Sequence[str] | None, known: set[str]) -> list[str]:
    if metrics is None:
        return [name for name in HEADLINES if name in known]
    for name in metrics:
        if name not in known:
            raise ScenarioError(f"metric '{name}': not in these results{did_you_mean(name, known)}")
    return list(metrics)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _table(title: str, note: str) -> Table:
    from rich.table import Table
    from rich.text import Text

    return Table(
        title=Text(title), caption=Text(note), title_justify="left", caption_justify="left", header_style="bold"
    )


def _heading(table: Table, text: str) -> None:
    from rich.text import Text

    table.add_row(Text(text, style="bold"), *[""] * (len(table.columns) - 1))
