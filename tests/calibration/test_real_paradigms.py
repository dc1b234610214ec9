"""Every kind of drafter that needs no training, on the real verifier: live rounds are those of the replay."""

from __future__ import annotations

import pytest
from replayed import GREEDY, live, recorded, rows_of, walk

from calibration.drafters import AnyDrafter, build_drafter
from calibration.models.lane import generate
from calibration.models.sampling import generator_for
from calibration.prompts import load_prompts

pytestmark = pytest.mark.model

EXIT = {"kind": "early-exit", "layers": 28}
KINDS = [
    {"kind": "suffix"},
    {"kind": "trigram"},
    {"kind": "memory"},
    {"kind": "retrieval", "corpus_path": "corpus"},
    {"kind": "dynamic-exit", "exits": [20, 26, 28]},
    {"kind": "nested-exits", "exits": [24, 28], "thresholds": [0.8]},
    {"kind": "trimmed", "tokens": 2048, "counts_path": "corpus", "drafter": EXIT},
    {"kind": "windowed", "recent": 32, "drafter": EXIT},
    {"kind": "ngram-before-model", "first": {"kind": "prompt-lookup"}, "second": EXIT},
    {"kind": "merged", "first": {"kind": "trigram"}, "second": EXIT},
    {"kind": "retrieval-fused", "first": {"kind": "retrieval", "corpus_path": "corpus"}, "second": EXIT},
]
TOKENS = 16


@pytest.fixture(scope="module")
def material(smollm2, tmp_path_factory):
    """Drafters of all kinds, two prompts, their greedy continuations, and one recording of everything."""
    from pydantic import TypeAdapter

    from calibration.traces import bundled

    folder = tmp_path_factory.mktemp("kinds")
    bundled("smollm2-135m-cpu-sampled").write(folder / "corpus")  # other texts of the same prompts, sampled
    settings = [TypeAdapter(AnyDrafter).validate_python(kind, strict=False).placed(folder) for kind in KINDS]
    drafters = {kind["kind"]: build_drafter(chosen, smollm2) for kind, chosen in zip(KINDS, settings, strict=True)}
    texts = [p.text for file in load_prompts(["code", "mathematics"], 3) for p in file.prompts]
    prompts = sorted((smollm2.encode(text) for text in texts), key=len)[:2]
    outputs = generate(smollm2.model, prompts, GREEDY, TOKENS, smollm2.end_ids, generator_for(smollm2.device, 0))
    trace = recorded(smollm2, list(drafters.values()), prompts, outputs, GREEDY, gamma_max=8)
    return drafters, prompts, outputs, trace


@pytest.mark.parametrize("kind", [kind["kind"] for kind in KINDS])
def test_live_rounds_are_those_of_the_replay(smollm2, material, kind):
    drafters, prompts, outputs, trace = material
    runs = live(smollm2, drafters[kind], prompts, 4, GREEDY, TOKENS, smollm2.end_ids)
    for row, (run, output) in enumerate(zip(runs, outputs, strict=True)):
        assert run.ids == output.ids
        assert run.rounds == walk(rows_of(trace.positions, f"r{row}", drafters[kind].name), 4)
    if kind in ("trimmed", "windowed", "merged"):  # good enough to be accepted now and then
        assert any(r.accepted for run in runs for r in run.rounds)
