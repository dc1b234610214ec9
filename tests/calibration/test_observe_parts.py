"""What an observed run is read from: event streams, answers, Prometheus text, speculation of requests, prompts."""

from __future__ import annotations

import json
import sys

import pytest
from builders import manifest

from calibration.common.errors import CalibrationError, MissingExtraError
from calibration.observe.answer import AnswerReader, Speculation, read_spec_metrics, read_speculation
from calibration.observe.client import EventReader
from calibration.observe.prometheus import by_position, difference, parse_counters, parse_gauges, total
from calibration.observe.prompts import Prompt, recorded_prompts, with_text
from calibration.traces import TraceSet, make_table

TEXT = r"""# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{model_name="a \"b\", c",engine="0"} 1000.0
vllm:spec_decode_num_drafts_total{model_name="a \"b\", c",engine="1"} 24.0
# TYPE vllm:spec_decode_num_drafts_created gauge
vllm:spec_decode_num_drafts_created{engine="0"} 1.79e+09
# TYPE vllm:spec_decode_num_accepted_tokens_per_pos_total counter
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="0"} 700.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="2"} 200.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="1",position="0"} 10.0
# TYPE vllm:iteration_tokens_total histogram
vllm:iteration_tokens_total_bucket{le="1.0"} 3.0
vllm:iteration_tokens_total_bucket{le="+Inf"} 8.0
vllm:iteration_tokens_total_sum 58.0
vllm:iteration_tokens_total_count 8.0
# TYPE sglang:spec_accept_length gauge
sglang:spec_accept_length{model_name="m"} 2.5
untyped_total 3
untyped_value 4
"""
PER_POSITION = "vllm:spec_decode_num_accepted_tokens_per_pos_total"


def events(*pieces):
    reader = EventReader()
    return [event for piece in pieces for event in reader.feed(piece)], reader


class TestEvents:
    def test_they_are_whole_however_the_bytes_are_cut(self):
        text = 'data: {"a": "é"}\n\n: a comment\nevent: chunk\nid: 3\ndata: {"b":\ndata: 2}\r\n\r\ndata:[DONE]\n\n'
        stream = text.encode()
        for cut in range(len(stream)):
            found, reader = events(stream[:cut], stream[cut:])
            assert found == [{"a": "é"}, {"b": 2}]
            assert reader.done
            assert not reader.cut

    def test_an_end_in_the_middle_is_seen(self):
        assert events(b'data: {"a": 1}\n')[1].cut
        assert events(b'data: {"a"')[1].cut

    @pytest.mark.parametrize(
        ("stream", "rule"),
        [
            (b"<html>\n", r"must be server-sent events, got the line '<html>'"),
            (b"data: {oh}\n\n", r"every event must be a JSON object, got '\{oh\}'"),
            (b"data: 3\n\n", r"every event must be a JSON object, got '3'"),
            (b"data: \xff\n\n", r"must be UTF-8"),
        ],
    )
    def test_what_is_none_is_refused(self, stream, rule):
        with pytest.raises(CalibrationError, match=rule):
            events(stream)


def read(*taken):
    reader = AnswerReader()
    for now, event in taken:
        reader.take(event, now)
    return reader.answer()


def chunk(text, *, finish=None, ids=None, usage=None):
    return {"choices": [{"text": text, "finish_reason": finish, "token_ids": ids}], "usage": usage}


class TestAnswers:
    def test_token_ids_count_tokens_and_empty_text_may_hold_one(self):
        answer = read(
            (1.0, chunk("a", ids=[5])), (2.0, chunk("", ids=[6, 7])), (3.0, chunk("", finish="stop", ids=[]))
        )
        assert answer.emission_s == (1.0, 2.0)
        assert answer.emitted == (1, 2)
        assert answer.token_ids == (5, 6, 7)
        assert (answer.output_tokens, answer.counted, answer.finish_reason) == (3, True, "stop")

    def test_running_usage_counts_tokens(self):
        taken = [(1.0, chunk("", usage={"completion_tokens": 0})), (2.0, chunk("ab", usage={"completion_tokens": 2}))]
        answer = read(*taken, (3.0, chunk("c", usage={"completion_tokens": 3, "prompt_tokens": 9}, finish="length")))
        assert answer.emission_s == (2.0, 3.0)
        assert answer.emitted == (2, 1)
        assert (answer.prompt_tokens, answer.token_ids) == (9, None)

    def test_a_usage_at_the_end_counts_the_whole_and_not_the_last_chunk(self):
        taken = [(1.0, chunk("a")), (2.0, chunk("b"))]
        answer = read(*taken, (3.0, chunk("", finish="stop", usage={"completion_tokens": 2})))
        assert (answer.emission_s, answer.emitted) == ((1.0, 2.0), (1, 1))
        other = read(*taken, (3.0, chunk("", finish="stop", usage={"completion_tokens": 5})))
        assert (other.emission_s, other.emitted, other.output_tokens) == ((1.0, 2.0), None, 5)

    def test_one_chunk_with_the_whole_answer(self):
        answer = read((1.0, chunk("a b c", finish="stop", usage={"completion_tokens": 3})))
        assert (answer.emission_s, answer.emitted) == ((1.0,), (3,))

    def test_reasoning_of_a_chat_is_text_too(self):
        thought = {"choices": [{"delta": {"reasoning_content": "hm"}, "finish_reason": None}]}
        answer = read((1.0, thought), (2.0, {"choices": [{"delta": {"content": "a"}, "finish_reason": "stop"}]}))
        assert (answer.emission_s, answer.output_tokens, answer.counted) == ((1.0, 2.0), 2, False)

    def test_no_token_at_all_is_an_error(self):
        with pytest.raises(CalibrationError, match="at least one token, none arrived"):
            read((1.0, chunk("", finish="stop")))

    def test_two_choices_are_an_error(self):
        with pytest.raises(CalibrationError, match="at most one object"):
            read((1.0, {"choices": [{"text": "a"}, {"text": "b"}]}))


class TestPrometheus:
    def test_counters_are_what_only_grows(self):
        assert parse_counters(TEXT) == {
            r'vllm:spec_decode_num_drafts_total{engine="0",model_name="a \"b\", c"}': 1000.0,
            r'vllm:spec_decode_num_drafts_total{engine="1",model_name="a \"b\", c"}': 24.0,
            f'{PER_POSITION}{{engine="0",position="0"}}': 700.0,
            f'{PER_POSITION}{{engine="0",position="2"}}': 200.0,
            f'{PER_POSITION}{{engine="1",position="0"}}': 10.0,
            "vllm:iteration_tokens_total_sum": 58.0,
            "vllm:iteration_tokens_total_count": 8.0,
            "untyped_total": 3.0,
        }
        assert parse_gauges(TEXT)['sglang:spec_accept_length{model_name="m"}'] == 2.5

    def test_counters_are_added_up_over_engines(self):
        counters = parse_counters(TEXT)
        assert total(counters, "vllm:spec_decode_num_drafts_total") == 1024.0
        assert total(counters, "vllm:spec_decode_num_draft_tokens_total") is None
        assert by_position(counters, PER_POSITION) == [710.0, 0.0, 200.0]
        assert by_position(counters, "untyped_total") is None

    def test_difference(self):
        assert difference({"a": 1.0, "gone": 5.0}, {"a": 4.0, "new": 2.0}) == {"a": 3.0, "new": 2.0}
        assert difference({}, {}) == {}
        with pytest.raises(CalibrationError, match="b: a counter must not go back, got 5 and then 3; was the server"):
            difference({"a": 0.0, "b": 5.0}, {"a": 9.0, "b": 3.0})

    def test_a_page_that_is_none_is_refused(self):
        with pytest.raises(CalibrationError, match="metrics: must be Prometheus text"):
            parse_counters("<html>no</html>")

    def test_without_the_library_the_extra_is_named(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "prometheus_client.parser", None)
        with pytest.raises(MissingExtraError, match=r"paceline\[observe\]"):
            parse_counters(TEXT)


def vllm(**changes):
    found = {
        "mean_acceptance_length": 2.75,
        "draft_acceptance_rate": 0.7,
        "acceptance_histogram": [1, 1, 0, 2],
        "num_spec_steps": 4,
        "num_accepted_draft_tokens": 7,
        "num_draft_tokens": 10,
        "num_spec_tokens": 3,
        "per_step_accepted": [3, 0, 1, 3],
        "per_step_drafted": [3, 3, 1, 3],
    }
    return {key: value for key, value in {**found, **changes}.items() if value != "leave out"}


class TestSpeculation:
    @pytest.mark.parametrize("wrap", [lambda o: o, lambda o: {"speculative_decoding": o}, lambda o: whole(o)])
    def test_detailed_metrics_are_found_at_every_depth(self, wrap):
        found = read_spec_metrics(wrap(vllm()))
        assert (found.drafts, found.drafted_tokens, found.accepted_tokens) == (4, 10, 7)
        assert (found.per_step_drafted, found.per_step_accepted) == ((3, 3, 1, 3), (3, 0, 1, 3))
        assert found.accepted_by_position == (3, 2, 2)
        assert found.acceptance_by_position == (0.75, 0.5, 0.5)
        assert found.draft_tokens_max == 3

    def test_a_summary_has_positions_but_no_steps(self):
        found = read_spec_metrics(vllm(per_step_accepted="leave out", per_step_drafted="leave out"))
        assert (found.drafts, found.per_step_drafted, found.accepted_by_position) == (4, None, (3, 2, 2))

    def test_rounds_without_a_draft_are_no_drafts(self):
        steps = {"per_step_accepted": [3, 0, 1, 3], "per_step_drafted": [4, 0, 2, 4]}
        assert read_spec_metrics(vllm(**steps)).drafts == 3

    @pytest.mark.parametrize(
        "obj", [{}, {"metrics": None}, {"metrics": {"speculative_decoding": None}}, {"usage": {}}]
    )
    def test_what_does_not_speculate_has_none(self, obj):
        assert read_spec_metrics(obj) is None
        assert read_speculation(obj) is None

    def test_nothing_drafted_is_not_unknown(self):
        nothing = {"num_spec_steps": 0, "num_accepted_draft_tokens": 0, "num_draft_tokens": 0}
        found = read_spec_metrics({"speculative_decoding": {**nothing, "acceptance_histogram": [0, 0]}})
        assert (found.drafts, found.drafted_tokens, found.acceptance_by_position) == (0, 0, None)

    @pytest.mark.parametrize(
        ("changes", "rule"),
        [
            ({"num_draft_tokens": 5}, r"num_accepted_draft_tokens must be at most num_draft_tokens \(5\), got 7"),
            ({"num_spec_steps": "4"}, "num_spec_steps must be a count, got '4'"),
            ({"num_draft_tokens": "leave out"}, "num_draft_tokens must be a count, got None"),
            ({"acceptance_histogram": [1, 1, 0, 3]}, "acceptance_histogram must add up to 4 steps"),
            ({"per_step_accepted": [3, 0, 4]}, r"per_step_accepted must have one entry per step \(4\), got 3"),
            ({"per_step_drafted": [3, 3, 3, 3]}, "per_step_drafted must add up to 10 tokens, got 12"),
            ({"per_step_drafted": [3, -3, 3, 3]}, "per_step_drafted must be a list of counts"),
        ],
    )
    def test_what_contradicts_itself_is_refused(self, changes, rule):
        with pytest.raises(CalibrationError, match=f"metrics.speculative_decoding: {rule}"):
            read_spec_metrics(vllm(**changes))

    def test_every_engine_in_its_own_words(self):
        assert read_speculation(whole(vllm())) == Speculation(10, 7, 4)
        details = {"spec_verify_ct": 4, "spec_num_proposed_drafts": 12, "spec_num_correct_drafts": 7}
        assert read_speculation({"sglext": {"spec_tokens_details": details}}) == Speculation(12, 7, 4)
        assert read_speculation({"timings": {"draft_n": 12, "draft_n_accepted": 7}}) == Speculation(12, 7)
        assert read_speculation({"timings": {"predicted_n": 12}}) == Speculation(0, 0, 0)  # left out where it is 0
        assert read_speculation({"timings": {"prompt_ms": 12.0}}) is None


def whole(obj):
    return {"choices": [], "usage": {"completion_tokens": 12}, "metrics": {"speculative_decoding": obj}}


def traces(ids):
    columns = {
        "sequence_id": ["a", "b"],
        "domain": ["chat", "code"],
        "prompt_tokens": [3, 2],
        "output_tokens": [4, 4],
        "finish_reason": ["length", "length"],
        "prompt_token_ids": ids,
    }
    rows = {"sequence_id": ["a"], "drafter": ["drafter"], "position": [0], "run_length": [0]}
    tables = {"sequences": make_table("sequences", columns), "positions": make_table("positions", rows)}
    return TraceSet.build(manifest(), tables)


class TestPrompts:
    def test_recorded_prompts_come_in_the_order_asked_for(self):
        recorded = traces([[1, 2, 3], [4, 5]])
        assert recorded_prompts(recorded, ["b", "a"]) == [Prompt("b", "code", (4, 5)), Prompt("a", "chat", (1, 2, 3))]
        assert [prompt.sequence_id for prompt in recorded_prompts(recorded)] == ["a", "b"]
        with pytest.raises(CalibrationError, match="'c' is not there"):
            recorded_prompts(recorded, ["c"])

    def test_ids_that_were_not_recorded_are_asked_for(self):
        with pytest.raises(CalibrationError, match=r"prompt_token_ids must be recorded .* sequence 'b' has none"):
            recorded_prompts(traces([[1, 2, 3], None]))

    def test_a_prompt_is_cut_at_its_beginning_and_repeated_when_too_short(self):
        prompt = Prompt("a", "chat", (1, 2, 3))
        assert prompt.of_length(2) == [2, 3]
        assert prompt.of_length(3) == [1, 2, 3]
        assert prompt.of_length(7) == [3, 1, 2, 3, 1, 2, 3]

    def test_text_is_given_or_detokenised(self, tmp_path):
        given = [Prompt("a", "chat", (1,)), Prompt("b", "chat", (2,))]
        assert [prompt.text for prompt in with_text(given, texts={"a": "hello"})] == ["hello", None]
        assert with_text(given) == given
        with pytest.raises(CalibrationError, match="must be a folder with a tokenizer, it is not there"):
            with_text(given, tmp_path / "none")
        with pytest.raises(CalibrationError, match="must have token ids or text, got neither"):
            Prompt("a", "chat")

    def test_a_tokenizer_folder_turns_ids_into_text(self, tmp_path):
        pytest.importorskip("transformers", reason="the extra calibration brings transformers")
        words = {"type": "WordLevel", "vocab": {"un": 0, "hello": 1, "you": 2}, "unk_token": "un"}
        layout = {"version": "1.0", "added_tokens": [], "model": words, "pre_tokenizer": {"type": "Whitespace"}}
        layout |= {"truncation": None, "padding": None, "normalizer": None, "post_processor": None, "decoder": None}
        (tmp_path / "tokenizer.json").write_text(json.dumps(layout))
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
        (prompt,) = with_text([Prompt("a", "chat", (1, 2))], tmp_path)
        assert (prompt.text, prompt.token_ids) == ("hello you", (1, 2))
