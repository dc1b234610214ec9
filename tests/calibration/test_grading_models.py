"""Grading by models: packed scores against plain ones, exits against cut models, the job from end to end."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibration.common.errors import CalibrationError
from calibration.grading.builtin import Item, builtin_items
from calibration.grading.job import GradingSettings, run_grading, write_grading

ITEMS = [
    Item("a", "letters", "say a long word", ("abc", "z", "hello there"), "z"),
    Item("b", "letters", "go", ("q", "pq"), "pq"),
    Item("c", "digits", "count from one, please", ("12", "34", "5"), "12"),
]


def plain(model: Any, packed: Any) -> list[np.ndarray]:
    """Log-likelihoods with a forward pass of its own for each option: no packing, no mask, no batch."""
    import torch

    found = []
    for item in packed:
        sums = []
        for option in item.options:
            ids = torch.tensor([[*item.prompt, *option]])
            told = torch.log_softmax(model(ids).logits[0].double(), -1)
            at = range(len(item.prompt) - 1, len(item.prompt) + len(option) - 1)
            sums.append(sum(float(told[place, token]) for place, token in zip(at, option, strict=True)))
        found.append(np.array(sums))
    return found


def test_packed_scores_are_those_of_single_passes_at_every_exit(tiny: Any) -> None:
    from calibration.drafters.cut import submodel
    from calibration.grading.scoring import pack, score

    packed = [pack(tiny.tokenizer, item) for item in ITEMS]
    exits = (1, 3, 4)
    for batch_size in (1, 3):
        scores = score(tiny.model, packed, [item.right for item in ITEMS], exits, batch_size=batch_size)
        for stage, layers in enumerate(exits):
            model = tiny.model if layers == 4 else submodel(tiny.model, tuple(range(layers)))
            for mine, theirs in zip(scores.log_likelihood[stage], plain(model, packed), strict=True):
                assert mine == pytest.approx(theirs, abs=1e-5)


def test_exact_is_greedy_decoding(tiny: Any) -> None:
    import torch

    from calibration.grading.scoring import pack, score

    item = ITEMS[0]
    prompt = pack(tiny.tokenizer, item).prompt
    ids = torch.tensor([list(prompt)])
    for _ in range(3):
        ids = torch.cat([ids, tiny.model(ids).logits[:, -1:].argmax(-1)], 1)
    greedy = tuple(ids[0, len(prompt) :].tolist())
    from calibration.grading.scoring import Packed

    other = (greedy[0], (greedy[1] + 1) % 97)
    packed = Packed(prompt, (greedy, other))
    exact = [bool(score(tiny.model, [packed], [right], (4,)).exact[0, 0]) for right in (0, 1)]
    assert exact == [True, False]


def test_options_are_tokens_behind_the_prompt(tiny: Any) -> None:
    from calibration.grading.scoring import PROMPT, pack

    packed = pack(tiny.tokenizer, ITEMS[1])
    whole = tiny.tokenizer(PROMPT.format(question="go") + " pq").input_ids
    assert [*packed.prompt, *packed.options[1]] == whole
    assert packed.tokens == len(packed.prompt) + 1 + 2
    with pytest.raises(CalibrationError, match="item 'x': every option must have a token of its own, got ''"):
        pack(lambda text: tiny.tokenizer(text.rstrip()), Item("x", "x", "go", ("", "a"), "a"))


def saved(tiny: Any, folder: Path) -> str:
    tiny.model.save_pretrained(folder)
    tiny.tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_job_from_end_to_end(tiny: Any, tmp_path: Path) -> None:
    model = saved(tiny, tmp_path / "model")
    heard = []
    settings = GradingSettings(verifier=model, exits=(3, 1), limit_per_domain=2, timed_items=3, device="cpu")
    grading = run_grading(settings, lambda stage, done, total: heard.append((stage, done, total)))
    out = write_grading(grading, tmp_path / "table.csv")
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert [row["stage"] for row in rows[:3]] == ["exit-1", "exit-3", "model"]
    assert len(rows) == 3 * 2 * 12
    told = json.loads((tmp_path / "table.json").read_text())
    assert told["items"]["count"] == 24
    assert told["timed_items"] == 3
    for name, stage in told["stages"].items():
        mine = [row for row in rows if row["stage"] == name]
        assert stage["quality"] == pytest.approx(np.mean([int(row["correct"]) for row in mine]), abs=1e-4)
        assert {float(row["cost"]) for row in mine} == {stage["cost_s"]}
        assert stage["cost_s"] > 0
    assert heard[-1] == ("time model", 3, 3)
    again = run_grading(settings)
    assert again.grades == grading.grades


def test_models_as_stages(tiny: Any, tmp_path: Path) -> None:
    from tiny import tiny_verifier

    names = tuple(saved(tiny_verifier(seed), tmp_path / name) for seed, name in ((1, "one"), (2, "two")))
    grading = run_grading(GradingSettings(models=names, limit_per_domain=1, timed_items=1, device="cpu"))
    assert list(grading.costs) == ["one", "two"]
    assert [g.stage for g in grading.grades[:4]] == ["one", "two", "one", "two"]
    assert [g.item.id for g in grading.grades[:4:2]] == ["addition-001", "subtraction-001"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (GradingSettings(), "grade: must have either a verifier with exits"),
        (
            GradingSettings(verifier="a", models=("b", "c")),
            "grade: must have either a verifier with exits, or models",
        ),
        (GradingSettings(verifier="a"), "exits: must name a number of layers or more beside a verifier, got none"),
        (GradingSettings(models=("a", "b"), exits=(1,)), "exits: belong to a verifier, got them beside models"),
        (GradingSettings(models=("a",)), "models: must be two or more, got 1"),
    ],
)
def test_settings_must_name_stages(settings: GradingSettings, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        run_grading(settings)


def test_exits_must_fit_the_verifier(tiny: Any, tmp_path: Path) -> None:
    model = saved(tiny, tmp_path / "model")
    with pytest.raises(CalibrationError, match=r"exits: must lie in \[1, 4\], the layers of the verifier, got 9"):
        run_grading(GradingSettings(verifier=model, exits=(9,), device="cpu"))
    with pytest.raises(CalibrationError, match="models: must have a name of its own each, got 'model' twice"):
        run_grading(GradingSettings(models=(model, model), limit_per_domain=1, timed_items=1, device="cpu"))


@pytest.mark.model
def test_the_real_verifier_beats_chance_and_its_exits_rise(smollm2: Any) -> None:
    from calibration.grading.scoring import pack, score

    items = [item for item in builtin_items() if item.domain in ("opposites", "geography")][::6]
    packed = [pack(smollm2.tokenizer, item) for item in items]
    scores = score(smollm2.model, packed, [item.right for item in items], (20, 30), batch_size=10)
    right = [
        np.mean([np.argmax(told) == item.right for told, item in zip(stage, items, strict=True)])
        for stage in scores.log_likelihood
    ]
    assert len(items) == 20
    # Chance is 1/4, standard deviation 0.1: the whole model is far above it, and above its exit at 20 layers.
    assert right[1] >= 0.7
    assert right[1] > right[0] + 0.2
