"""Figures of cost: where the time goes, and how well the fits meet the timings."""

from __future__ import annotations

from collections.abc import Sequence

from analysis.speedup.costfit import CostFit
from analysis.speedup.findings import Findings
from reports.page.drawing import Drawing, label, need, new_figure
from reports.page.style import INK, REFERENCE, look, to_svg
from reports.page.text import short, sim_label


def time_breakdown(findings: Findings) -> Drawing:
    """Where the time of an output token goes, without speculation and with each drafter at its best length."""
    smallest = findings.settings.batches[0]
    chosen = {(r.drafter, r.speculative_tokens) for r in findings.best if r.domain is None and r.batch == smallest}
    plain = [r for r in findings.runs if r.batch == smallest and r.draft_tokens == 0]
    runs = plain + [r for r in findings.runs if r.batch == smallest and (r.drafter, r.draft_tokens) in chosen]
    need(runs, "time-breakdown", "runs")
    figure, axes = new_figure(1, 1, height=0.9 + 0.24 * len(runs))
    ax = axes[0]
    parts = (
        ("prefill", "#f0f0f0", "...."),
        ("draft", "#e69f00", ""),
        ("verify", "#56708f", "////"),
        ("overhead", "#1a1a1a", ""),
    )
    left = [0.0] * len(runs)
    widths: dict[str, list[float]] = {}
    for part, colour, hatch in parts:
        width = [
            1000
            / r.tokens_per_second
            * getattr(r, f"{part}_s")
            / (r.prefill_s + r.draft_s + r.verify_s + r.overhead_s)
            for r in runs
        ]
        widths[part] = width
        if max(width) > 0:
            ax.barh(
                range(len(runs)),
                width,
                left=left,
                color=colour,
                hatch=hatch,
                edgecolor=INK,
                lw=0.5,
                label=part,
                height=0.66,
            )
        left = [a + b for a, b in zip(left, width, strict=True)]
    names = [f"{short(r.drafter)}, draft {r.draft_tokens}" if r.draft_tokens else "no speculation" for r in runs]
    if len(plain) > 1:  # drafters recorded on different requests have baselines of their own
        names[: len(plain)] = [f"none, requests of {short(r.drafter, 12)}" for r in plain]
    ax.set_yticks(range(len(runs)), names)
    ax.invert_yaxis()
    ax.axvline(left[0], color=INK, lw=0.9, ls=(0, (4, 2)), zorder=5)
    ax.grid(axis="y", visible=False)
    ax.set_xlabel("Engine time per output token, ms")
    figure.legend(loc="outside lower center", ncols=4)
    return Drawing(
        "time-breakdown",
        to_svg(figure),
        f"Where the time of an output token goes at batch {smallest}: without speculation, and with each drafter at "
        f"its best draft length. Left of the dashed line is faster. {label(findings, sim_label(findings))}",
        "Stacked bars of milliseconds per output token, divided into prefill, draft, verify and overhead, for no "
        f"speculation ({left[0]:.1f} ms) and {len(runs) - 1} drafters.",
        data=tuple(
            {"drafter": r.drafter if r.draft_tokens else "none", "draft_tokens": r.draft_tokens, "batch": r.batch}
            | {"requests_of": r.drafter, "tokens_per_second": r.tokens_per_second}
            | {f"{part}_ms_per_token": round(width[i], 6) for part, width in widths.items()}
            for i, r in enumerate(runs)
        ),
    )


def cost_fit(findings: Findings) -> Drawing:
    """Fitted against measured seconds of every timed configuration, by operation."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    fits = [f for f in findings.cost_fits if f.points]
    need(fits, "cost-fit", "timed configurations")
    groups = _by_scale(findings, fits)
    figure, axes = new_figure(1, len(groups), height=2.4)
    models = list(dict.fromkeys(f.model for f in fits))
    for (title, mine), ax in zip(groups.items(), axes, strict=True):
        values = [1000 * v for f in mine for p in f.points for v in (p.measured_s, p.fitted_s)]
        span = [min(values) / 1.3, max(values) * 1.3]
        ax.plot(span, span, color=REFERENCE, lw=0.9, ls=(0, (4, 2)), zorder=0)
        for fit in mine:
            style = look(models.index(fit.model))
            ax.plot(
                [1000 * p.measured_s for p in fit.points],
                [1000 * p.fitted_s for p in fit.points],
                ls="none",
                marker=style["marker"],
                mfc="none",
                mec=style["color"],
                ms=4,
                label=short(fit.model),
            )
        ax.set(xscale="log", yscale="log", xlim=span, ylim=span)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
            axis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axis.set_minor_formatter(NullFormatter())
        ax.set_title(title)
        ax.set_xlabel("Measured step, ms")
    axes[0].set_ylabel("Fitted step, ms", rotation_mode="anchor")
    handles = {label: h for ax in axes for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
    steps = sum(len(f.points) for f in fits)
    return Drawing(
        "cost-fit",
        to_svg(figure),
        f"Fitted against measured time of {steps} timed configurations (median of the repeats); on the dashed line "
        f"both agree. [measured, fitted; {findings.sizes.timed_steps:,} timed steps]",
        f"Scatter plots of fitted against measured step time in milliseconds: {', '.join(groups)}; "
        "the errors are in the table that follows.",
        data=tuple(
            {"model": f.model, "operation": f.operation, "batch": p.batch, "new_tokens": p.new_tokens}
            | {"context_tokens": p.context_tokens, "repeats": p.repeats}
            | {"measured_s": p.measured_s, "fitted_s": p.fitted_s}
            for f in fits
            for p in f.points
        ),
    )


def _by_scale(findings: Findings, fits: Sequence[CostFit]) -> dict[str, list[CostFit]]:
    """Fits by operation; lookups, which take microseconds, apart from drafters that have weights."""
    lookups = {m.name for m in findings.provenance.models if m.parameters == 0}
    groups: dict[str, list[CostFit]] = {"prefill": [], "verify": [], "draft": [], "lookup": []}
    for fit in fits:
        groups["lookup" if fit.model in lookups else fit.operation].append(fit)
    return {title: mine for title, mine in groups.items() if mine}
