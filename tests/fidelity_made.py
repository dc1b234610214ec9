"""A small error table made by hand, for tests of what reads one."""

from __future__ import annotations

from analysis.fidelity.table import Compared, Condition, Crossover, Fidelity, Source


def made_fidelity() -> Fidelity:
    """Give two driven engines and one published table; errors are known: see the tests."""
    sources = (
        Source("engine-a", "Engine A, CPU", "measured", "a CPU", "CPU time of one thread", "Fitted on plain runs."),
        Source(
            "engine-b",
            "Engine B, GPU",
            "measured",
            "a GPU",
            "wall",
            "Fitted on plain runs.",
            explained=("Prefill is mixed in.",),
        ),
        Source(
            "table", "A published table", "published", "H100", "as published", "Nothing.", citation="A paper (2025)"
        ),
    )
    conditions = [
        Condition(
            "engine-a",
            f"lookup-{k}-batch-{batch}",
            "fit" if k == 0 else "held-out",
            3,
            (
                Compared("output_throughput", 40.0 * batch**0.5 + k, (40.0 * batch**0.5 + k) * (1 + 0.01 * k), 0.012),
                Compared("p99_tpot_ms", 30.0 + batch, (30.0 + batch) * 0.95, 0.03),
                Compared("mean_ttft_ms", 100.0 + 10 * batch, 110.0 + 10 * batch, 0.02),
                Compared("spec_decode_acceptance_length", 1.8, 1.79, 0.0),
            ),
            {"batch": str(batch), "draft_tokens": str(k)},
            open_loop=batch == 4,
        )
        for k in (0, 2, 4)
        for batch in (1, 4, 8)
    ]
    conditions.append(
        Condition(
            "engine-b", "poisson", "held-out", 1, (Compared("output_throughput", 1000.0, 850.0),), open_loop=True
        )
    )
    conditions += [
        Condition("table", f"batch {b}", "held-out", 1, (Compared("speedup", 1.7 - b / 300, 1.72 - b / 300),))
        for b in (1, 16, 64)
    ]
    crossings = (
        Crossover("engine-a", "prompt-lookup", "4", (1, 4, 8), 4, 8, (1.3, 0.9, 0.8), (1.25, 1.01, 0.82)),
        Crossover("engine-a", "prompt-lookup", "2", (1, 4, 8), None, 1, (1.3, 1.1, 1.05), (0.99, 1.01, 1.02)),
    )
    return Fidelity(sources, tuple(conditions), crossings, created="2026-01-02T03:04:05+00:00")
