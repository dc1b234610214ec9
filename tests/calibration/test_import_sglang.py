"""Import of SGLang's accept lengths: histograms of requests, means of requests, of a server, of a log."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from imported import near, walk

from calibration.common.errors import TraceError
from calibration.importers.origin import Origin
from calibration.importers.sglang import import_sglang
from calibration.traces import TraceSet

EAGLE = Origin(drafter="eagle3", paradigm="eagle3", temperature=0.0)


def write(folder: Path, *objects: Any, name: str = "answers.jsonl") -> Path:
    path = folder / name
    path.write_text("\n".join(json.dumps(one) for one in objects) + "\n", encoding="utf-8")
    return path


def generated(
    histogram: list[int] | None, prompt: int = 20, tokens: int | None = None, **more: Any
) -> dict[str, Any]:
    """What ``/generate`` answers."""
    held = histogram or []
    rounds, accepted = sum(held), sum(j * number for j, number in enumerate(held))
    total = 1 + rounds + accepted if tokens is None else tokens
    meta: dict[str, Any] = {
        "id": "cf5e164f",
        "finish_reason": {"type": "length", "length": total},
        "prompt_tokens": prompt,
        "completion_tokens": total,
        "spec_verify_ct": rounds,
        "spec_accept_length": total / max(rounds, 1),
        "spec_accept_histogram": histogram,
        **more,
    }
    return {"text": "...", "meta_info": meta}


def mean(traces: TraceSet, draft_tokens: int) -> tuple[float, float]:
    """Give tokens per round, bonus included, and 4 standard errors of it."""
    accepted = np.array([one.accepted for one in walk(traces, draft_tokens) if one.whole])
    return 1 + float(accepted.mean()), 4 * float(accepted.std()) / math.sqrt(len(accepted))


def test_histograms_keep_every_round(tmp_path: Path) -> None:
    # Posted with sgl-project/sglang#33518: 106 tokens, 43 rounds of drafts of 5, 63 accepted; the token of prefill
    # makes 107, so the last round reached one past the end.
    posted = {
        "choices": [{"index": 0, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 31, "completion_tokens": 106},
        "sglext": {
            "spec_tokens_details": {
                "spec_accept_rate": 0.2930232558139535,
                "spec_accept_length": 2.4651162790697674,
                "spec_num_correct_drafts": 63,
                "spec_num_proposed_drafts": 215,
                "spec_verify_ct": 43,
                "spec_correct_drafts_histogram": [11, 14, 11, 4, 0, 3],
            }
        },
    }
    older = generated([4, 2, 0, 3])
    short = generated([], tokens=1)  # over before a round
    inside = {"choices": [{"meta_info": {**generated([5, 0, 1])["meta_info"]}}]}
    traces = import_sglang(write(tmp_path, posted, older, inside, short, {"text": "no speculation"}), origin=EAGLE)
    assert traces.sequences["output_tokens"].to_pylist() == [106, 21, 9, 1]
    assert traces.sequences["finish_reason"].to_pylist() == ["unknown", "length", "length", "length"]
    rounds = walk(traces, 5)
    held = [[one.accepted for one in rounds if one.sequence.endswith(f"/{i}")] for i in range(3)]
    assert sorted(held[1]) == [0] * 4 + [1] * 2 + [3] * 3
    assert sorted(held[2]) == [0] * 5 + [2]
    assert len(held[0]) in (42, 43)
    assert sum(held[0]) + len(held[0]) in (105, 106)
    manifest = traces.manifest
    assert manifest.drafters[0].max_draft_tokens == 5
    assert any("order of rounds in 3 request(s)" in item for item in manifest.unknown)
    assert manifest.notes[0] == "drafts taken to be chains of 5 tokens, as deep as the histograms"
    assert manifest.notes[-1] == "answers.jsonl: 1 object(s) without rounds left out"


def test_means_of_requests_keep_their_variance(tmp_path: Path) -> None:
    # The three names that the accepted drafts have had, and none: then the tokens tell, less the one of prefill.
    names = ("spec_num_correct_drafts", "spec_accepted_drafts", "spec_accept_token_num", None)
    answers = []
    for i in range(60):
        rounds = 150
        accepted = rounds // 4 + 5 * i
        name = names[i % 4]
        answers.append(
            generated(None, tokens=1 + rounds + accepted, spec_verify_ct=rounds, **({name: accepted} if name else {}))
        )
    path = write(tmp_path, *answers)
    with pytest.raises(TraceError, match=r"answers.jsonl:1: has no histogram; give draft_tokens"):
        import_sglang(path)
    traces = import_sglang(path, draft_tokens=4, origin=EAGLE)
    rounds_made = walk(traces, 4)
    for i in range(60):
        mine = np.array([one.accepted for one in rounds_made if one.sequence.endswith(f"/{i}") and one.whole])
        stated = (150 // 4 + 5 * i) / 150
        assert abs(mine.mean() - stated) < 5 * max(mine.std(), 0.3) / math.sqrt(len(mine))
    assert any("ASSUMED to fall geometrically" in item for item in traces.manifest.unknown)


def test_server_info(tmp_path: Path) -> None:
    states = [{"avg_spec_accept_length": 2.9}, {"avg_spec_accept_length": None}, {"avg_spec_accept_length": 3.1}]
    info = {
        "model_path": "Qwen/Qwen3-8B",
        "speculative_algorithm": "EAGLE3",
        "speculative_num_steps": 5,
        "speculative_eagle_topk": 1,
        "speculative_num_draft_tokens": 6,
        "internal_states": states,
    }
    path = write(tmp_path, info, name="info.json")
    with pytest.raises(TraceError, match="does not say how many requests there were"):
        import_sglang(path)
    traces = import_sglang(path, lengths=[(30, 500)] * 40)
    manifest = traces.manifest
    assert (manifest.verifier.name, manifest.drafters[0].paradigm) == ("Qwen/Qwen3-8B", "eagle3")
    assert manifest.drafters[0].max_draft_tokens == 5
    measured, error = mean(traces, 5)
    assert abs(measured - 3.0) < error
    assert "unweighted mean over 2 schedulers" in manifest.notes
    nested = write(tmp_path, {"decode": [{**info, "speculative_num_steps": None}]}, name="nested.json")
    assert import_sglang(nested, lengths=[(3, 50)]).manifest.drafters[0].max_draft_tokens == 5


def test_benchmark_result(tmp_path: Path) -> None:
    result: dict[str, Any] = {
        "backend": "sglang",
        "completed": 50,
        "total_input_tokens": 5000,
        "total_output_tokens": 20000,
        "accept_length": 2.25,
    }
    path = write(tmp_path, result, name="bench.jsonl")
    with pytest.raises(TraceError, match="does not say how long drafts were; give draft_tokens"):
        import_sglang(path)
    traces = import_sglang(path, draft_tokens=3, origin=EAGLE)
    assert sum(traces.sequences["output_tokens"].to_pylist()) == 20000
    measured, error = mean(traces, 3)
    assert abs(measured - 2.25) < error
    detailed = {**result, "input_lens": [7, 9], "output_lens": [40, 50], "server_info": {"speculative_num_steps": 4}}
    traces = import_sglang(write(tmp_path, detailed, name="bench.jsonl"), origin=EAGLE)
    assert traces.sequences["output_tokens"].to_pylist() == [40, 50]
    assert traces.manifest.drafters[0].max_draft_tokens == 4


LOG = """\
[2026-08-19 00:01:00] server_args=ServerArgs(model_path='m', speculative_num_steps=3, speculative_num_draft_tokens=4)
[2026-08-19 00:02:15] Decode batch, #running-req: 1, #token: 9, accept len: 3.10, accept rate: 0.70, #queue-req: 0
[2026-08-19 00:02:25] Decode batch. #running-req: 3, #token: 9, accept len: 2.30, gen throughput (token/s): 40.29
[2026-08-19 00:02:30] Prefill batch. #new-seq: 1
"""


def test_log(tmp_path: Path) -> None:
    path = tmp_path / "server.log"
    path.write_text(LOG, encoding="utf-8")
    traces = import_sglang(path, lengths=[(30, 500)] * 40, origin=EAGLE)
    assert traces.manifest.drafters[0].max_draft_tokens == 3
    measured, error = mean(traces, 3)
    assert abs(measured - (3.10 + 3 * 2.30) / 4) < error
    spread = import_sglang(path, lengths=[(30, 500)] * 40, request_std_tokens=0.3, origin=EAGLE)
    measured, error = mean(spread, 3)
    assert abs(measured - 2.5) < 1.5 * error  # requests differ, so the pooled mean does by more than rounds
    again = import_sglang(path, lengths=[(30, 500)] * 40, origin=EAGLE)
    assert again.positions.equals(traces.positions)


def test_the_arguments_of_a_log_as_text_as_a_dict_and_as_json(tmp_path: Path) -> None:
    path = tmp_path / "server.log"
    _, rest = LOG.split("\n", 1)
    for arguments in (
        "{'model_path': 'm', 'speculative_algorithm': 'EAGLE3', 'speculative_num_steps': 3, "
        "'speculative_eagle_topk': 1, 'speculative_num_draft_tokens': 4}",
        '{"model_path": "m", "speculative_algorithm": "EAGLE3", "speculative_num_draft_tokens": 4}',
    ):
        path.write_text(f"[2026-08-19 00:01:00] server_args={arguments}\n{rest}", encoding="utf-8")
        manifest = import_sglang(path, lengths=[(30, 500)]).manifest
        assert manifest.drafters[0].max_draft_tokens == 3
        assert (manifest.verifier.name, manifest.drafters[0].paradigm) == ("m", "eagle3")


def test_a_block_drafter_drafts_a_block_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "server.log"
    arguments = "speculative_algorithm='DFLASH', speculative_num_steps=1, speculative_eagle_topk=1, "
    text = LOG.replace("speculative_num_steps=3, ", arguments).replace("draft_tokens=4", "draft_tokens=6")
    path.write_text(text, encoding="utf-8")
    traces = import_sglang(path, lengths=[(30, 500)] * 40)
    assert traces.manifest.drafters[0].max_draft_tokens == 5
    measured, error = mean(traces, 5)
    assert abs(measured - 2.5) < error


def test_trees_are_not_taken_for_chains(tmp_path: Path) -> None:
    path = tmp_path / "server.log"
    path.write_text(LOG.replace("steps=3", "steps=5, speculative_eagle_topk=8").replace("tokens=4", "tokens=64"))
    with pytest.raises(
        TraceError, match=r"trees of 64 nodes, the root included, 5 deep \(speculative_eagle_topk = 8\)"
    ):
        import_sglang(path, lengths=[(30, 500)])
    path.write_text(LOG.replace("steps=3", "steps=5").replace("tokens=4", "tokens=64"))
    with pytest.raises(TraceError, match=r"64 tokens verified after 5 steps of drafting are no chain"):
        import_sglang(path, lengths=[(30, 500)])
    info = {"accept_length": 3.0, "server_info": {"speculative_num_steps": 4, "speculative_eagle_topk": 4}}
    with pytest.raises(TraceError, match=r"trees, 4 deep"):
        import_sglang(write(tmp_path, info), lengths=[(30, 500)])


def test_a_log_that_was_cut_off_and_one_of_two_servers(tmp_path: Path) -> None:
    path = tmp_path / "server.log"
    path.write_text(LOG, encoding="utf-8")
    whole = import_sglang(path, lengths=[(30, 500)], origin=EAGLE)
    for end in (
        "#running-req: 9, accept len: 1.",
        "#running-req: 9, accept len: 1.7",
        "#running-req: 9, accept len: ",
    ):
        path.write_text(f"{LOG}[2026-08-19 00:02:35] Decode batch, {end}", encoding="utf-8")
        cut = import_sglang(path, lengths=[(30, 500)], origin=EAGLE)
        assert cut.positions.equals(whole.positions)
        assert "line 5, the last one, is not finished: left out" in cut.manifest.notes
    path.write_text(LOG + LOG.replace("steps=3", "steps=5").replace("tokens=4", "tokens=6"), encoding="utf-8")
    with pytest.raises(TraceError, match=r"the log of one server, got speculative_num_steps = 3 and 5; cut the log"):
        import_sglang(path, lengths=[(30, 500)])


def test_all_servers_that_decode_count(tmp_path: Path) -> None:
    servers = [{"speculative_num_steps": 3, "internal_states": [{"avg_spec_accept_length": x}]} for x in (2.0, 3.0)]
    traces = import_sglang(write(tmp_path, {"decode": servers}, name="info.json"), lengths=[(30, 500)] * 40)
    measured, error = mean(traces, 3)
    assert abs(measured - 2.5) < error
    assert "unweighted mean over 2 schedulers" in traces.manifest.notes


def test_rounds_without_verification_are_the_lookups_own(tmp_path: Path) -> None:
    """301 tokens: 1 of prefill, 80 rounds that accepted 40, 180 rounds more: 180 of 260 had no draft."""
    told = {"spec_verify_ct": 80, "spec_num_correct_drafts": 40}
    path = write(tmp_path, *(generated(None, tokens=301, **told) for _ in range(50)))
    with pytest.raises(TraceError, match=r"69.2% of rounds had no draft; .*--paradigm ngram"):
        import_sglang(path, draft_tokens=2)
    ngram = import_sglang(path, draft_tokens=2, origin=Origin(paradigm="ngram"))
    rounds = [one for one in walk(ngram, 2) if one.whole]
    assert near(np.mean([one.drafted == 0 for one in rounds]), 180 / 260, len(rounds))
    model = import_sglang(path, draft_tokens=2, origin=EAGLE)
    assert all(one.drafted == 2 for one in walk(model, 2))


def test_of_several_benchmarks_in_one_file_one_must_be_chosen(tmp_path: Path) -> None:
    sizes = {"completed": 20, "total_input_tokens": 2000, "total_output_tokens": 9000}
    path = write(tmp_path, *({**sizes, "accept_length": length} for length in (2.25, 1.75, 3.5)))
    with pytest.raises(
        TraceError, match=r"3 runs with mean accepted lengths of 2.25, 1.75, 3.5; say which \(--run 1 to 3\)"
    ):
        import_sglang(path, draft_tokens=3)
    with pytest.raises(TraceError, match=r"run must lie in \[1, 3\], got 4"):
        import_sglang(path, draft_tokens=3, run=4)
    for run, wanted in ((1, 2.25), (2, 1.75), (3, 3.5)):
        measured, error = mean(import_sglang(path, draft_tokens=3, run=run, origin=EAGLE), 3)
        assert abs(measured - wanted) < error


def test_faults(tmp_path: Path) -> None:
    wrong: list[tuple[Any, str, dict[str, Any]]] = [
        ({"internal_states": [{}]}, "avg_spec_accept_length or accept_length must be there", {}),
        ({"accept_length": None}, "accept_length: must be a number >= 1, got None", {}),
        ({"accept_length": 6.0, "completed": 0}, "completed: must be a whole number >= 1, got 0", {}),
        ({"accept_length": 6.0}, "must lie in [1, 4] with the bonus token", {"draft_tokens": 3, "lengths": [(5, 5)]}),
        (generated([3, 1], spec_accept_histogram=[1, "2"]), "spec_accept_histogram: must be a list", {}),
        (generated([3, 0, 1]), "rounds must accept at most 1 token(s), got 2", {"draft_tokens": 1}),
        (generated([3, 1]), "holds requests of its own, so lengths must not be given", {"lengths": [(5, 5)]}),
        (
            generated(None, tokens=50, spec_verify_ct=51),
            "spec_verify_ct must be at most the 50 completion_tokens, got 51",
            {"draft_tokens": 3},
        ),
        (
            generated(None, tokens=50, spec_verify_ct=40, spec_num_correct_drafts=20),
            "completion_tokens must be at least 1 + rounds + accepted tokens (61)",
            {"draft_tokens": 3},
        ),
        (
            {"accept_length": 2.0, "server_info": {"speculative_num_steps": 4}},
            "draft_tokens must be the 4 that the server's arguments give, got 3",
            {"draft_tokens": 3, "lengths": [(5, 5)]},
        ),
        (generated([3, 1], prompt_tokens=None), "prompt_tokens: must be a whole number >= 1, got None", {}),
        (generated([3, 1]), "draft_tokens: must be >= 1, got 0", {"draft_tokens": 0}),
    ]
    for answer, message, options in wrong:
        with pytest.raises(TraceError) as caught:
            import_sglang(write(tmp_path, answer), **options)
        assert message in str(caught.value)
    path = tmp_path / "server.log"
    path.write_text("INFO nothing\n", encoding="utf-8")
    with pytest.raises(TraceError, match="no 'Decode batch' line holds"):
        import_sglang(path, lengths=[(5, 5)])
    path.write_text(LOG.replace("#running-req: 3", "#req: 3"), encoding="utf-8")
    with pytest.raises(TraceError, match=r"server.log:3: '#running-req: N' and 'accept len: X' must be in the line"):
        import_sglang(path, lengths=[(5, 5)])
