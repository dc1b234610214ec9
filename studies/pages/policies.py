"""The page on hybrid drafts and learned lengths: how much of the way to the oracle policies come.

``python -m studies.pages.policies FOLDER docs``, with the folder of the public measurements, evaluates everything and
writes ``policies.json`` and ``policies.md`` to ``docs``; without FOLDER it writes the page from the JSON again.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from analysis.common.bootstrap import Estimate
from analysis.common.records import from_json, to_json
from calibration.common.files import write_whole
from studies.hybrid.evaluate import PER_ROUND
from studies.hybrid.findings import Cell, TargetResult
from studies.hybrid.gap import NEVER_BELOW
from studies.hybrid.study import PolicyStudy, study_policies
from studies.pages.roofline import markdown

_TOP = """# How far policies come towards the oracle

All numbers here are *simulated* from recorded acceptance at stated prices; brackets are 95% intervals of one number
taken alone. A **gap** is the way from the best fixed single drafter and length (chosen on the very requests that it
serves) to an oracle that knows what will be accepted; a policy's share says how much of it the policy closes. A
target is **met** (or missed) where bounds that hold for all targets of its section at once say so, against the best
fixed draft, whichever that truly is; else it is **open**. Policies see what an engine sees:
tokens, past acceptance, confidence, the batch. What they learn, they learn from other requests than they serve; their
features and forms, though, were chosen on these same traces, so that the shares lean to the good side. This page is
written by `python -m studies.pages.policies`.

- *plain rule* (`context_match`): the last three tokens occurred before: an n-gram draft of 20; else EAGLE with 7.
- *tuned rule* (`context_match`): threshold and lengths chosen for the batch size.
- *forecast* (`forecast`): drafter and length from the forecast survival of each drafted token and the prices; with
  the n-gram drafts of the traces, or with those of a suffix lookup, recomputed from the token ids.
"""


def page(study: PolicyStudy) -> str:
    """Give the page (Markdown)."""
    names = [one.policy for one in study.per_round.cells[0].policies]
    own = [one.policy for one in study.lengths[0].policies]
    return "\n".join(
        (
            _TOP,
            "## Hybrids of n-gram and EAGLE drafts, published prices\n",
            f"{study.per_round.source}. {study.per_round.method} {'; '.join(study.per_round.notes)}.\n",
            _cells(study.per_round.cells, names),
            "Targets, by policy (a share of the gap; a loss of at most 1% against the best fixed draft):\n",
            _targets(one for one in study.per_round.targets if one.pricing == PER_ROUND),
            "## The same with EAGLE charged by the step\n",
            "The published constants price an EAGLE draft alike for every length. Here its price is spread over so "
            "many steps: shorter drafts cost less, longer ones more.\n",
            _cells([one for one in study.per_step.cells if one.pricing != "per round"], names),
            "What is missing at larger batches is how much of EAGLE's draft will be accepted: these traces hold no "
            "confidence of it.\n",
            "Which conclusions survive (shares of the gap; bold where the target is met, in brackets where it is "
            "open):\n",
            _survival(study),
            "## Draft lengths from the drafter's confidence\n",
            "Bundled traces, closed batches of copies; published constants of the verifier and 0.305 ms a draft step "
            "(a seventh of EAGLE's), as at the CPU prices of these traces hardly any draft pays and there is no gap. "
            "The oracle knows the length that brings each round most tokens per second. Target: 40% of the gap.\n",
            _cells(study.lengths, own),
            _targets(study.length_targets),
        )
    )


def _cells(cells: Iterable[Cell], policies: list[str]) -> str:
    header = ("traces", "prices", "batch", "n", "best fixed", "oracle", *policies)
    rows = []
    for cell in cells:
        fixed = f"{_times(cell.best)} ({cell.best_drafter} {cell.best_tokens})"
        shares = (
            f"{_times(one.speedup)}, {_share(one.gap_share)}" for one in (cell.policy(name) for name in policies)
        )
        first = (cell.dataset, cell.pricing, str(cell.batch), str(cell.requests))
        rows.append((*first, fixed, _times(cell.oracle), *shares))
    return markdown(header, rows)


def _targets(targets: Iterable[TargetResult]) -> str:
    grouped: dict[tuple[str, str, float], list[TargetResult]] = {}
    every = list(targets)
    policies = list(dict.fromkeys(one.policy for one in every))
    for one in sorted(every, key=lambda each: policies.index(each.policy)):
        grouped.setdefault((one.policy, one.target, one.wanted), []).append(one)
    rows = []
    for (policy, target, wanted), several in grouped.items():
        met, open_, missed = (
            [f"{one.dataset} at {one.batch}: {_percent(one.reached)}" for one in several if one.verdict == verdict]
            for verdict in ("met", "open", "missed")
        )
        shown = f"{len(met)} of {len(several)}" if target == NEVER_BELOW else "; ".join(met)
        rows.append((policy, target, f"{100 * wanted:.0f}%", shown, "; ".join(open_), "; ".join(missed)))
    return markdown(("policy", "target", "wanted", "met", "open", "missed"), rows)


def _survival(study: PolicyStudy) -> str:
    """Give every target on a share under every pricing."""
    pricings = list(dict.fromkeys(one.pricing for one in study.per_step.cells))
    found = {(t.policy, t.dataset, t.batch, t.pricing, t.target): t for t in study.per_step.targets}
    rows = []
    policies = list(dict.fromkeys(one.policy for one in study.per_round.targets))
    for one in sorted(study.per_round.targets, key=lambda each: policies.index(each.policy)):
        if one.target == NEVER_BELOW:
            continue
        key = (one.policy, one.dataset, one.batch)
        shown = [_marked(found[*key, pricing, one.target]) for pricing in pricings]
        rows.append((one.policy, f"{one.dataset} at {one.batch}", f"{100 * one.wanted:.0f}%", *shown))
    return markdown(("policy", "traces", "wanted", *pricings), rows)


def _marked(result: TargetResult) -> str:
    share = _percent(result.reached)
    return {"met": f"**{share}**", "open": f"({share})", "missed": share}[result.verdict]


def _times(value: Estimate) -> str:
    return "" if value.value is None else f"{value.value:.2f}x"


def _share(value: Estimate) -> str:
    if value.value is None:
        return "no gap"
    shown = f"{100 * value.value:.0f}%"
    if value.low is not None and value.high is not None:
        shown += f" [{100 * value.low:.0f}, {100 * value.high:.0f}]"
    return shown


def _percent(value: Estimate) -> str:
    return "no gap" if value.value is None else f"{100 * value.value:.1f}%"


def main(arguments: list[str]) -> None:
    """Evaluate where a folder of measurements is given; write the page."""
    *folder, out = (Path(one) for one in arguments)
    kept = out / "policies.json"
    if folder:
        study = study_policies(folder[0], lambda what, done, total: print(what, done, total, file=sys.stderr))
        write_whole(kept, to_json(study).encode())
    study = from_json(PolicyStudy, kept.read_text(encoding="utf-8"), str(kept))
    write_whole(out / "policies.md", page(study).encode())


if __name__ == "__main__":
    main(sys.argv[1:])
