"""The figure of a comparison: every number of the others over that of the first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from analysis.common.bootstrap import Estimate
from reports.page.drawing import INK, Drawing, bars, look, need, new_figure, or_nan, record, to_svg
from reports.page.text import short

_MOST = 10
"""Numbers drawn; all of them are in the tables."""


def contrast_ratios(told: Mapping[str, Any], quantities: Mapping[str, str]) -> Drawing:
    """Ratios to the first scenario with paired intervals; `told` is what comparison.json holds."""
    rivals = told["against_baseline"]
    names = [key for key in quantities if any("ratio" in found.get(key, {}) for found in rivals.values())][:_MOST]
    need(names, "comparison", "numbers that both scenarios have")
    figure, (ax,) = new_figure(1, 1, height=1.0 + 0.26 * len(names) * max(1, len(rivals) / 2))
    rows = []
    for index, (rival, found) in enumerate(rivals.items()):
        aside = 0.16 * (index - (len(rivals) - 1) / 2)
        for y, key in enumerate(names):
            ratio = found.get(key, {}).get("ratio")
            if ratio is None:
                continue
            value = Estimate(ratio["mean"], ratio.get("low"), ratio.get("high"), int(ratio["n"]))
            label = short(rival, 40) if key == names[0] else None
            style = {**look(index), "linestyle": "none"}
            ax.errorbar(or_nan(value.value), y + aside, xerr=bars([value]), elinewidth=0.8, label=label, **style)
            rows.append({"scenario": rival, "against": told["baseline"], "number": key} | record("ratio", value))
    ax.axvline(1, color=INK, lw=0.9, ls=(0, (4, 2)), zorder=0)
    ax.set_yticks(range(len(names)), [quantities[key] for key in names])
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.set_xlabel(f"Relative to {short(str(told['baseline']), 40)}")
    figure.legend(loc="outside lower center", ncols=min(3, len(rivals)))
    renamed = tuple({("replications" if k == "requests" else k): v for k, v in row.items()} for row in rows)
    return Drawing(
        "comparison",
        to_svg(figure),
        "Numbers relative to those of the first scenario on common random numbers; bars: paired 95% intervals over "
        f"replications. [simulated; n = {told['replications']} replications]",
        f"Dot plot of {len(names)} numbers of {len(rivals)} scenarios relative to the first one, with intervals; the "
        "numbers are in the tables that follow.",
        data=renamed,
    )
