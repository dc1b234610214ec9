"""The scenarios that a study recommends to a capacity plan."""

from __future__ import annotations

import numpy as np
import pytest
from drawn import clustered

from analysis import StudySettings, study
from analysis.capacity import study_scenarios
from calibration.common.errors import ExtrapolationWarning
from simulator import simulate


def test_the_headline_and_its_schedule_by_batch_are_planned_for() -> None:
    traces = clustered(np.random.default_rng(1), sequences=12, tokens=40)
    settings = StudySettings(draft_tokens=(1, 2, 4), batches=(1, 2, 16), draws=200)
    findings = study(traces, settings=settings, workers=1)
    head = findings.answer.headline
    fixed, scheduled = study_scenarios(findings, traces)
    assert fixed.drafter is not None
    assert fixed.drafter.name == head.drafter == "lookup"
    assert fixed.stopping.policy == "fixed"
    assert fixed.stopping.draft_tokens == head.speculative_tokens  # type: ignore[union-attr]
    assert fixed.engine.max_num_seqs == 4  # the largest batch of the timings
    best = {row.batch: row.draft_tokens for row in findings.best if row.drafter == "lookup" and row.domain is None}
    # A best length holds from its batch size on until the next one that was studied.
    table = ((1, 1, best[1]), (2, 15, best[2]), (16, 16, best[16]))
    assert scheduled.stopping.table == table  # type: ignore[union-attr]
    for one in (fixed, scheduled):
        few = one.model_copy(update={"workload": one.workload.model_copy(update={"requests": 5})})
        with pytest.warns(ExtrapolationWarning):
            assert simulate(few, traces).summary["completed"] == 5


def test_where_nothing_pays_there_is_no_schedule() -> None:
    traces = clustered(np.random.default_rng(1), sequences=12, tokens=40, drafters=("slow",))
    settings = StudySettings(draft_tokens=(1, 2), batches=(1, 2), draws=200)
    (fixed,) = study_scenarios(study(traces, settings=settings, workers=1), traces)
    assert fixed.stopping.policy == "fixed"
