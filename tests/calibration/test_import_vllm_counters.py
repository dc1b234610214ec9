"""Import of vLLM's aggregates: what is made up replays to the counted rates, and says that it is made up."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from imported import acceptance, near, walk
from scenarios import scenario, traces_of
from scipy.stats import chisquare
from shared_data import shared_data

from calibration.common.errors import TraceError
from calibration.importers.aggregates import (
    AcceptanceLaw,
    acceptance_law,
    even_lengths,
    geometric_law,
    spread_laws,
    synthesize,
)
from calibration.importers.origin import Origin
from calibration.importers.spec_totals import totals_of
from calibration.importers.vllm import import_vllm_counters, import_vllm_log
from calibration.observe.prometheus import parse_counters
from calibration.traces import TraceSet
from simulator import simulate

EAGLE = Origin(drafter="eagle3", paradigm="eagle3", temperature=0.0)
NGRAM = Origin(drafter="ngram", paradigm="ngram", temperature=0.0)
LABELS = 'engine="0",model_name="m"'


def metrics(
    drafts: float,
    drafted: float,
    positions: list[float],
    *,
    requests: float | None = None,
    prompt: float = 9000,
    output: float = 40000,
    prefix: str = "vllm",
) -> str:
    """Give what ``/metrics`` of vLLM shows."""
    lines = []

    def counter(name: str, value: float, labels: str = "") -> None:
        lines.append(f"# HELP {prefix}:{name} What it counts.\n# TYPE {prefix}:{name} counter")
        lines.append(f"{prefix}:{name}_total{{{LABELS}{labels}}} {value}")

    counter("spec_decode_num_drafts", drafts)
    counter("spec_decode_num_draft_tokens", drafted)
    counter("spec_decode_num_accepted_tokens", sum(positions))
    name = f"{prefix}:spec_decode_num_accepted_tokens_per_pos"
    lines.append(f"# HELP {name} Accepted tokens per draft position.\n# TYPE {name} counter")
    lines += [f'{name}_total{{{LABELS},position="{at}"}} {value}' for at, value in enumerate(positions)]
    if requests is not None:
        counter("prompt_tokens", prompt)
        counter("generation_tokens", output)
        name = f"{prefix}:request_success"
        lines.append(f"# HELP {name} Count of successfully processed requests.\n# TYPE {name} counter")
        lines += [f'{name}_total{{{LABELS},finished_reason="{why}"}} {requests / 2}' for why in ("stop", "length")]
    return "\n".join(lines) + "\n"


def write(folder: Path, text: str, name: str = "after.prom") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def law_of(rounds: list[Any], longest: int) -> np.ndarray:
    accepted = [one.accepted for one in rounds if one.whole and one.drafted]
    return np.bincount(accepted, minlength=longest + 1)


def test_replay_gives_the_counted_rates(tmp_path: Path) -> None:
    positions = [13000.0, 9500.0, 7000.0]
    path = write(tmp_path, metrics(20000, 60000, positions, requests=100, output=49600))
    traces = import_vllm_counters(path, origin=EAGLE)
    wanted = np.array(positions) / 20000
    rounds = walk(traces, 3)
    rates, number = acceptance(rounds, 3)
    assert number > 18000
    assert near(rates, wanted, number)
    # The whole law, not its tail alone; and rounds that know nothing of the one before.
    seen = law_of(rounds, 3)
    expected = -np.diff([1, *wanted, 0]) * seen.sum()
    assert chisquare(seen, expected).pvalue > 1e-4
    accepted = np.array([one.accepted for one in rounds if one.whole])
    assert abs(np.corrcoef(accepted[:-1], accepted[1:])[0, 1]) < 4 / math.sqrt(len(accepted))
    # Shorter drafts see the first rates.
    for draft_tokens in (1, 2):
        rates, number = acceptance(walk(traces, draft_tokens), draft_tokens)
        assert near(rates, wanted[:draft_tokens], number)
    # Mean acceptance length, bonus included, as vLLM has it.
    mean, error = 1 + accepted.mean(), accepted.std() / math.sqrt(len(accepted))
    assert abs(mean - (1 + sum(positions) / 20000)) < 4 * error


def test_lengths_and_labels(tmp_path: Path) -> None:
    path = write(tmp_path, metrics(2000, 6000, [1300, 950, 700], requests=8, prompt=83, output=5000))
    traces = import_vllm_counters(path, origin=EAGLE)
    assert traces.sequences["prompt_tokens"].to_pylist() == [11, 11, 11, 10, 10, 10, 10, 10]
    assert sum(traces.sequences["output_tokens"].to_pylist()) == 5000
    manifest = traces.manifest
    assert (manifest.kind, manifest.seed, manifest.drafters[0].max_draft_tokens) == ("imported", 0, 3)
    assert manifest.notes[0].startswith("MADE UP FROM AGGREGATES")
    assert "0.6500, 0.4750, 0.3500; mean acceptance length, bonus included: 2.4750" in manifest.notes[1]
    told = " ".join(manifest.unknown)
    for item in ("burstiness", "variance between requests", "every request has the mean", "beyond the draft length"):
        assert item in told
    assert traces.positions["proposal_length"].null_count == traces.positions.num_rows
    again = import_vllm_counters(path, origin=EAGLE)
    assert again.positions.equals(traces.positions)
    assert not import_vllm_counters(path, origin=EAGLE, seed=1).positions.equals(traces.positions)


def test_only_what_happened_in_between_counts(tmp_path: Path) -> None:
    before = write(tmp_path, metrics(1000, 3000, [900, 800, 700]), "before.prom")
    after = write(tmp_path, metrics(3000, 9000, [1500, 1200, 1000]))
    manifest = import_vllm_counters(after, before=before, lengths=[(5, 50)], origin=EAGLE).manifest
    assert "0.3000, 0.2000, 0.1500;" in manifest.notes[1]
    assert "counted over 2000 drafts" in manifest.notes[1]
    with pytest.raises(TraceError, match="must not go back"):
        import_vllm_counters(before, before=after, lengths=[(5, 50)])


def test_a_lookup_that_finds_nothing_and_proposes_less(tmp_path: Path) -> None:
    # 60 000 tokens of 100 requests: 8000 drafts, 13 000 accepted, so 38 900 rounds had no draft.
    positions = [5000.0, 3500.0, 2500.0, 2000.0]
    path = write(tmp_path, metrics(8000, 8000 * 3.6, positions, requests=100, output=60000))
    traces = import_vllm_counters(path, origin=NGRAM)
    rounds = walk(traces, 4)
    whole = [one for one in rounds if one.whole]
    share = 38900 / (38900 + 8000)
    assert near(np.mean([one.drafted == 0 for one in whole]), share, len(whole))
    rates, number = acceptance(rounds, 4)
    assert near(rates, np.array(positions) / 8000, number)
    drafted = np.array([one.drafted for one in whole if one.drafted])
    assert abs(drafted.mean() - 3.6) < 4 * drafted.std() / math.sqrt(len(drafted))
    # 1 + 13,000 accepted over 46,900 rounds; the 100 last rounds may have given up to 4 tokens more than were kept.
    assert (
        "82.94% of rounds had no draft: 1.28 tokens per round over all; drafts of 3.600" in traces.manifest.notes[1]
    )
    assert traces.manifest.notes[2].startswith("38900 rounds had no draft")
    assert "at most 83.09% of all" in traces.manifest.notes[2]  # 39,300 of 47,300
    # For a model that always proposes these were the engine's choices: said, not replayed.
    model = import_vllm_counters(path, origin=EAGLE)
    assert all(one.drafted == 4 for one in walk(model, 4))
    assert any("what was not drafted counts as not accepted" in note for note in model.manifest.notes)
    assert any("82.94% of rounds had no draft, by the engine's choice" in note for note in model.manifest.notes)


def test_llama_cpp_counts_with_a_prefix_of_its_own(tmp_path: Path) -> None:
    path = write(tmp_path, metrics(100, 300, [80, 50, 20], prefix="llamacpp"))
    manifest = import_vllm_counters(path, lengths=[(5, 100)], origin=EAGLE).manifest
    assert "0.8000, 0.5000, 0.2000" in manifest.notes[1]


def test_llama_cpp_counts_output_tokens_by_another_name(tmp_path: Path) -> None:
    """120 prompt and 5,000 output tokens; 2,000 drafts of 2, 2,600 accepted; requests are not counted."""
    lines = [
        f"# TYPE llamacpp:{name} counter\nllamacpp:{name} {value}"
        for name, value in (
            ("prompt_tokens_total", 120),
            ("tokens_predicted_total", 5000),
            ("spec_decode_num_drafts_total", 2000),
            ("spec_decode_num_draft_tokens_total", 4000),
            ("spec_decode_num_accepted_tokens_total", 2600),
        )
    ]
    path = write(tmp_path, "\n".join(lines) + "\n")
    with pytest.raises(TraceError, match=r"requests: not reported; give --requests$"):
        import_vllm_counters(path, draft_tokens=2, origin=EAGLE)
    for origin in (NGRAM, Origin()):
        with pytest.raises(TraceError, match=r"requests: not reported; give --requests$"):
            import_vllm_counters(path, draft_tokens=2, origin=origin)
    with pytest.raises(TraceError, match=r"rounds without a draft are not counted; .*--requests"):
        totals_of(parse_counters("\n".join(lines) + "\n"), "here").law(NGRAM, 2)
    traces = import_vllm_counters(path, draft_tokens=2, requests=10, origin=NGRAM)
    assert traces.sequences["output_tokens"].to_pylist() == [500] * 10
    assert traces.sequences["prompt_tokens"].to_pylist() == [12] * 10
    assert "16.32% of rounds had no draft" in traces.manifest.notes[1]  # (5000 - 10 - 2000 - 2600) / (390 + 2000)


def test_whose_rounds_without_a_draft_are_must_be_said(tmp_path: Path) -> None:
    """The counters do not tell a lookup that found nothing from an engine that switched drafting off."""
    path = write(tmp_path, metrics(8000, 8000 * 4, [5000.0, 3500.0, 2500.0, 2000.0], requests=100, output=60000))
    with pytest.raises(TraceError, match=r"82.9% of rounds had no draft; .*--paradigm ngram .*--paradigm eagle3"):
        import_vllm_counters(path)
    with pytest.raises(TraceError, match=r"82.9% of rounds .*, got the unknown 'ngarm'$"):
        import_vllm_counters(path, origin=Origin(paradigm="ngarm"))
    short = write(tmp_path, metrics(8000, 8000 * 3.6, [5000.0, 3500.0, 2500.0, 2000.0], requests=100, output=21100))
    with pytest.raises(TraceError, match=r"drafts had 90.0% of their full length on average; .*--paradigm ngram"):
        import_vllm_counters(short)
    # 150 rounds of 8,150, less than what the last rounds reach past their ends: said nowhere, asked of nobody.
    few = write(tmp_path, metrics(8000, 8000 * 4, [5000.0, 3500.0, 2500.0, 2000.0], requests=100, output=21250))
    assert import_vllm_counters(few).manifest.drafters[0].paradigm == "unknown"


def test_aborted_requests_are_told_apart(tmp_path: Path) -> None:
    text = metrics(2000, 6000, [1300, 950, 700], requests=8, prompt=83, output=5000)
    line = next(one for one in text.splitlines() if 'finished_reason="stop"' in one)
    text += "".join(
        line.replace('"stop"', f'"{why}"').rsplit(" ", 1)[0] + f" {n}\n" for why, n in (("abort", 3), ("error", 2))
    )
    traces = import_vllm_counters(write(tmp_path, text), origin=EAGLE)
    assert traces.sequences.num_rows == 8
    assert any(
        note.startswith("5 requests were aborted or failed: not among the 8") for note in traces.manifest.notes
    )


@pytest.mark.parametrize("seed", range(6))
def test_counted_rounds_of_a_lookup_come_back(tmp_path: Path, seed: int) -> None:
    """Rounds are played, counted as vLLM counts them, imported and replayed: share and tokens per round return."""
    rng = np.random.default_rng(seed)
    longest, none, rate = int(rng.integers(1, 7)), rng.uniform(0.05, 0.95), rng.uniform(0.2, 0.95)
    drafts = tokens = lone = 0
    accepted_by = np.zeros(longest)
    requests, output = 60, 400
    for _ in range(requests):
        left = output - 1
        while left > 0:
            accepted = 0 if rng.random() < none else -1
            if accepted:
                accepted = min(int((np.cumprod(rng.random(longest) < rate)).sum()), left - 1)
                drafts, accepted_by[:accepted] = drafts + 1, accepted_by[:accepted] + 1
            else:
                lone += 1
            left, tokens = left - 1 - accepted, tokens + 1 + accepted
    page = metrics(drafts, drafts * longest, accepted_by.tolist(), requests=requests, output=requests * output)
    log = NEWEST.format(
        mean=1 + accepted_by.sum() / drafts,
        accepted=int(accepted_by.sum()),
        drafted=drafts * longest,
        rates=", ".join(f"{one / drafts:.3f}" for one in accepted_by),
        percent=100 * accepted_by.sum() / drafts / longest,
    )
    for traces in (
        import_vllm_counters(write(tmp_path, page), origin=NGRAM),
        import_vllm_log(write(tmp_path, log + "\n", "server.log"), lengths=[(5, output)] * requests, origin=NGRAM),
    ):
        rounds = [one for one in walk(traces, longest) if one.whole]
        assert near(np.mean([one.drafted == 0 for one in rounds]), lone / (lone + drafts), len(rounds))
        committed = np.array([1 + one.accepted for one in rounds])
        assert (
            abs(committed.mean() - tokens / (lone + drafts)) < 4 * committed.std() / math.sqrt(len(committed)) + 0.01
        )


def mixed(laws: list[AcceptanceLaw], lengths: list[tuple[int, int]]) -> np.ndarray:
    """Pool laws by the rounds that requests need on average."""
    rounds = np.array([(output - 1) / law.tokens_per_round for (_, output), law in zip(lengths, laws, strict=True)])
    return np.asarray(rounds @ np.array([law.rates for law in laws]) / rounds.sum())


@pytest.mark.parametrize("wanted", [0.2, 0.5])
def test_a_spread_between_requests_is_what_was_asked(tmp_path: Path, wanted: float) -> None:
    law = acceptance_law([0.7, 0.5, 0.4, 0.3], "here")
    lengths = [(10, 60 + 7 * i) for i in range(80)]
    laws = spread_laws(law, lengths, wanted, np.random.default_rng(3))
    assert np.std([one.mean_accepted for one in laws]) == pytest.approx(wanted, abs=1e-8)
    assert mixed(laws, lengths) == pytest.approx(np.array(law.rates), abs=1e-9)
    # And so it replays: pooled over rounds the counted rates, between requests the spread and what chance adds.
    positions = [rate * 30000 for rate in law.rates]
    path = write(tmp_path, metrics(30000, 120000, positions))
    traces = import_vllm_counters(path, lengths=lengths * 3, request_std_tokens=wanted, origin=EAGLE)
    rounds = walk(traces, 4)
    rates, number = acceptance(rounds, 4)
    clusters = {name: [one for one in rounds if one.sequence == name] for name in {one.sequence for one in rounds}}
    # Requests differ, so the error of the pooled rates is that of a mean over 240 requests of unlike sizes.
    assert np.abs(rates - np.array(law.rates)).max() < 4 * wanted / math.sqrt(240) / 2 + 4 * 0.5 / math.sqrt(number)
    means, within = [], []
    for mine in clusters.values():
        accepted = [one.accepted for one in mine if one.whole]
        if len(accepted) > 5:
            means.append(np.mean(accepted))
            within.append(np.var(accepted, ddof=1) / len(accepted))
    between = np.var(means, ddof=1) - np.mean(within)
    assert abs(math.sqrt(between) - wanted) < 0.15 * wanted + 0.03
    assert "standard deviation of" in " ".join(traces.manifest.unknown)


def test_a_spread_with_lookups_keeps_drafts(tmp_path: Path) -> None:
    law = acceptance_law([0.6, 0.4, 0.2], "here", undrafted=0.5, drafted_tokens=2.5)
    lengths = [(10, 400)] * 60
    laws = spread_laws(law, lengths, 0.4, np.random.default_rng(0))
    rounds = np.array([399 / one.tokens_per_round for one in laws])
    drafted = np.array([one.drafted_tokens for one in laws])
    assert rounds @ drafted / rounds.sum() == pytest.approx(2.5, abs=1e-9)


def test_no_such_spread() -> None:
    law = acceptance_law([0.5, 0.4], "here")
    for wrong in (-0.1, 2.0, float("nan")):
        with pytest.raises(TraceError, match="request_std_tokens: must lie in"):
            spread_laws(law, [(5, 50)] * 10, wrong, np.random.default_rng(0))


def test_geometric_law_has_the_mean() -> None:
    for mean in (0.0, 0.37, 1.9, 4.999, 5.0):
        law = geometric_law(mean, 5, "here")
        assert law.mean_accepted == pytest.approx(mean, abs=1e-9)
        ratios = [b / a for a, b in zip((1.0, *law.rates), law.rates, strict=False) if a > 1e-12]
        assert ratios == pytest.approx([law.rates[0]] * len(ratios), rel=1e-6)
    with pytest.raises(TraceError, match=r"must lie in \[1, 6\] with the bonus token and drafts of 5, got 6.1"):
        geometric_law(5.1, 5, "here")


NEWEST = (
    "(APIServer pid=1) INFO 09-04 11:01:16 [metrics.py:125] SpecDecoding metrics: "
    "Mean acceptance length: {mean:.2f}, "
    "Current speculative depth: 3, Accepted throughput: 6.46 tokens/s, Drafted throughput: 7.77 tokens/s, "
    "Accepted: {accepted} tokens, Drafted: {drafted} tokens, Per-position acceptance rate: {rates}, "
    "Avg Draft acceptance rate: {percent:.1f}%"
)
EARLIER = (
    "INFO 05-18 11:19:54 [metrics.py:86] SpecDecoding metrics: Draft acceptance rate: {percent:.1f}%, "
    "Mean acceptance length: {mean:.2f}, Accepted: {accepted} tokens, Drafted: {drafted} tokens, "
    "Per-position acceptance rate: {rates}"
)
EARLIEST = (
    "INFO 03-21 [metrics.py:51] SpecDecoding metrics: Draft acceptance rate: {percent:.1f}%, "
    "Accepted: {accepted} tokens, Drafted: {drafted} tokens"
)
V0 = (
    "INFO 10-16 19:05:47 metrics.py:367] Speculative metrics: Draft acceptance rate: 0.642, "
    "System efficiency: 0.598, "
    "Number of speculative tokens: 3, Number of accepted tokens: 8547, Number of draft tokens: 13311, "
    "Number of emitted tokens: 10616."
)


def logged(form: str, drafts: int, positions: list[int]) -> str:
    """Give the line that vLLM would log for these counts."""
    accepted, drafted = sum(positions), drafts * len(positions)
    return form.format(
        mean=1 + accepted / drafts,
        accepted=accepted,
        drafted=drafted,
        rates=", ".join(f"{count / drafts:.3f}" for count in positions),
        percent=100 * accepted / drafted,
    )


def rates_in(traces: TraceSet) -> list[float]:
    return [float(rate) for rate in traces.manifest.notes[1].split(": ")[1].split(";")[0].split(", ")]


@pytest.mark.parametrize("form", [NEWEST, EARLIER])
def test_log_lines_are_pooled_by_their_drafts(tmp_path: Path, form: str) -> None:
    counts = [(279, [257, 231, 188]), (1277, [600, 410, 333]), (31, [0, 0, 0])]
    text = "\n".join(["INFO Engine 000: Running: 3 reqs", *(logged(form, *one) for one in counts)])
    traces = import_vllm_log(write(tmp_path, text, "server.log"), lengths=[(20, 300)] * 40, origin=EAGLE)
    drafts = sum(one for one, _ in counts)
    pooled = np.sum([positions for _, positions in counts], axis=0) / drafts
    assert rates_in(traces) == pytest.approx(pooled.tolist(), abs=1e-3)  # the lines round to 0.001
    assert f"counted over {drafts} drafts" in traces.manifest.notes[1]
    rates, number = acceptance(walk(traces, 3), 3)
    assert near(rates, rates_in(traces), number)


def test_a_line_as_posted(tmp_path: Path) -> None:
    # Posted with a public benchmark: 837 drafted in threes are 279 drafts.
    line = (
        "(APIServer pid=1) INFO 05-18 11:19:54 [metrics.py:101] SpecDecoding metrics: Mean acceptance length: 3.42, "
        "Accepted throughput: 67.60 tokens/s, Drafted throughput: 83.70 tokens/s, Accepted: 676 tokens, Drafted: 837 "
        "tokens, Per-position acceptance rate: 0.921, 0.828, 0.674, Avg Draft acceptance rate: 80.8%"
    )
    traces = import_vllm_log(write(tmp_path, line, "server.log"), lengths=[(20, 300)] * 10, origin=EAGLE)
    assert "counted over 279 drafts" in traces.manifest.notes[1]
    assert rates_in(traces) == [0.921, 0.828, 0.674]


def test_a_log_that_was_cut_off_and_intervals_without_a_draft(tmp_path: Path) -> None:
    whole = [logged(NEWEST, 279, [257, 231, 188]), logged(NEWEST, 1277, [600, 410, 333])]
    idle = NEWEST.format(mean=math.nan, accepted=0, drafted=0, rates="nan, nan, nan", percent=math.nan)
    lengths = [(20, 300)] * 40

    def read(text: str) -> TraceSet:
        return import_vllm_log(write(tmp_path, text, "server.log"), lengths=lengths, origin=EAGLE)

    wanted = read("\n".join(whole) + "\n")
    nothing = read("\n".join([idle, *whole, idle]) + "\n")
    assert nothing.positions.equals(wanted.positions)
    assert "2 line(s) of intervals in which nothing was drafted: they add nothing" in nothing.manifest.notes
    for kept in (150, 250, len(whole[0]) - 30, len(whole[0]) - 3, len(whole[0]) - 1):
        cut = read("\n".join([*whole, whole[0][:kept]]))
        assert cut.positions.equals(wanted.positions)
        assert "line 3, the last one, is not finished: left out" in cut.manifest.notes
    assert read("\n".join(whole)).positions.equals(wanted.positions)  # a whole line without its line break
    with pytest.raises(TraceError, match="only lines without a draft"):
        read(idle + "\n")


def test_lengths_tell_the_rounds_without_a_draft(tmp_path: Path) -> None:
    """900 drafts of 2 with 900 accepted, 50 requests, 5,000 tokens: 3,150 rounds of 4,050 had no draft."""
    path = write(tmp_path, logged(NEWEST, 900, [600, 300]) + "\n", "server.log")
    traces = import_vllm_log(path, lengths=[(20, 100)] * 50, origin=NGRAM)
    assert "77.78% of rounds had no draft" in traces.manifest.notes[1]
    rounds = [one for one in walk(traces, 2) if one.whole]
    assert near(np.mean([one.drafted == 0 for one in rounds]), 3150 / 4050, len(rounds))
    with pytest.raises(TraceError, match=r"77.8% of rounds had no draft"):
        import_vllm_log(path, lengths=[(20, 100)] * 50)


def test_lines_without_positions_are_taken_as_geometric(tmp_path: Path) -> None:
    path = write(tmp_path, logged(EARLIEST, 1000, [700, 500, 300]), "server.log")
    with pytest.raises(TraceError, match=r"server.log:1: .* is missing; give the configured"):
        import_vllm_log(path, lengths=[(20, 300)])
    traces = import_vllm_log(path, lengths=[(20, 300)] * 40, draft_tokens=3, origin=EAGLE)
    assert sum(rates_in(traces)) == pytest.approx(1.5, abs=2e-4)
    assert any("ASSUMED to fall geometrically" in item for item in traces.manifest.unknown)


def test_the_old_engine_counts_emitted_tokens(tmp_path: Path) -> None:
    # Posted in vllm-project/vllm#9539: 13311 / 3 rounds emitted 10616 tokens. The last line holds all before it.
    path = write(tmp_path, V0.replace("10616", "9000").replace("13311", "12000") + "\n" + V0, "server.log")
    traces = import_vllm_log(path, lengths=[(20, 400)] * 60, origin=EAGLE)
    assert sum(rates_in(traces)) == pytest.approx(10616 * 3 / 13311 - 1, abs=2e-4)
    accepted = np.array([one.accepted for one in walk(traces, 3) if one.whole])
    assert abs(1 + accepted.mean() - 2.3926) < 4 * accepted.std() / math.sqrt(len(accepted))


def test_faults(tmp_path: Path) -> None:
    good = metrics(2000, 6000, [1300, 950, 700], requests=8)
    wrong: list[tuple[str, str, dict[str, Any]]] = [
        ("{", "must be Prometheus text", {}),
        ("# TYPE a counter\na_total 3\n", "spec_decode_num_drafts_total must be there with a prefix of vllm:", {}),
        (metrics(2000, 6000, [1300, 950, 700]), "requests, prompt_tokens, output_tokens: not reported", {}),
        (metrics(0, 0, [0, 0]), "no draft was counted", {"lengths": [(5, 5)]}),
        (metrics(10, 30, [12, 5, 1]), "position 1 must lie in", {"lengths": [(5, 5)]}),
        (metrics(100, 120, [60, 50, 40]), "accepted tokens must be at most the 120 drafted, got 150", {}),
        (metrics(100, 500, [60, 50, 40]), r"at most 3 token\(s\) on average, got 5.000", {"lengths": [(5, 500)]}),
        (
            metrics(100, 300, [60, 50, 40]),
            r"at least requests \+ drafts \+ accepted tokens \(251\), got 90",
            {"lengths": [(5, 90)]},
        ),
        (
            metrics(2000, 6000, [1300, 700, 701], requests=8, output=5000),
            r"position 3 must be at most that of position 2 \(700\), got 701",
            {"origin": EAGLE},
        ),
        (
            metrics(2000, 6000, [1300, 950, 700], requests=8, output=4900),
            r"at least requests \+ drafts \+ accepted tokens \(4958\), got 4900",
            {"origin": EAGLE},
        ),
        (metrics(2000, 6000, [1300, 950, 700], requests=0, output=5000), "no request ended; give --lengths", {}),
        (metrics(100, 300, [40, 60, 1]), "position 2 must be at most that of position 1", {"lengths": [(5, 5)]}),
        (good.replace("tokens_total{" + LABELS + "} 2950", "tokens_total{" + LABELS + "} 3950"), "must add up", {}),
        (good.replace("per_pos", "by_depth"), "acceptance by position is not reported; give the configured", {}),
    ]
    for text, message, options in wrong:
        path = write(tmp_path, text)
        with pytest.raises(TraceError, match=message) as caught:
            import_vllm_counters(path, **options)
        assert str(caught.value).startswith(f"{path}")
    with pytest.raises(TraceError, match="not found"):
        import_vllm_counters(tmp_path / "none")
    bare = write(tmp_path, good.replace("per_pos", "by_depth"))
    assert len(rates_in(import_vllm_counters(bare, draft_tokens=4, origin=EAGLE))) == 4
    for text, message in (
        (
            V0 + "\n" + V0.replace("13311", "900").replace("10616", "700"),
            "server.log:2: counts since the start must not",
        ),
        (
            V0 + "\n" + logged(NEWEST, 9, [5, 1]) + "\n",
            "must be the log of one server, got lines of vLLM's present and of",
        ),
        ("INFO nothing here", "no line holds 'SpecDecoding metrics:'"),
        (
            logged(NEWEST, 9, [5, 1]).replace("Accepted:", "Took:"),
            "server.log:1: 'Accepted: NUMBER' must be in the line",
        ),
        (
            logged(NEWEST, 279, [257, 231, 188]).split("74, Avg")[0],
            "server.log:1: 'Mean acceptance length' must be 1 .* was the line cut off",
        ),
        (
            V0.replace("speculative tokens: 3", "speculative tokens: 0"),
            "server.log:1: 'Number of speculative tokens'",
        ),
    ):
        with pytest.raises(TraceError, match=message):
            import_vllm_log(write(tmp_path, text, "server.log"), lengths=[(5, 5)])
    with pytest.raises(TraceError, match="output_tokens must be at least one per request"):
        even_lengths(5, 10, 4)


def table_rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


def cell_key(row: dict[str, str]) -> tuple[str, ...]:
    return tuple(row[key] for key in ("variant", "workload", "concurrency", "repeat"))


PUBLIC = (("canitedit", "L31-70B-I"), ("human-eval", "L31-8B-I"))


def test_public_counters_of_70b_on_vllm(tmp_path: Path) -> None:
    table = shared_data("vllm-sd-empirical-70b", "vllm_sd_metrics_tidy.dev.csv")
    rows = [
        row
        for row in table_rows(table)
        if (row["benchmark"], row["model"]) in PUBLIC and row["method"] in ("eagle3", "ngram", "suffix")
    ]
    assert len(rows) == 6
    for row in rows:
        positions = [float(row[f"acc_pos_{at}"]) for at in range(32) if row[f"acc_pos_{at}"]]
        text = metrics(
            float(row["num_drafts"]),
            float(row["num_draft_tokens"]),
            positions,
            requests=float(row["requests"]),
            prompt=float(row["prompt_tokens"]),
            output=float(row["generation_tokens"]),
        )
        origin = Origin(verifier=row["model"], drafter=row["method"], paradigm=row["method"], temperature=0.0)
        traces = import_vllm_counters(write(tmp_path, text), origin=origin)
        rounds = walk(traces, len(positions))
        accepted = np.array([one.accepted for one in rounds if one.whole and one.drafted])
        stated = float(row["mean_accept_len_plus1"])
        assert abs(1 + accepted.mean() - stated) < 4 * accepted.std() / math.sqrt(len(accepted))
        # As many rounds had a draft as the server counted, but for chance and for what reaches past the ends.
        drafts = sum(one.drafted > 0 for one in rounds)
        assert abs(drafts / float(row["num_drafts"]) - 1) < 0.05


def test_public_rates_agree_with_the_stated_means() -> None:
    tables = shared_data("apertus-70b")
    rates = table_rows(tables / "per_position.dev.csv")
    cells = {cell_key(row): row for row in table_rows(tables / "cells.dev.csv")}
    checked = 0
    for row in rates:
        cell = cells[cell_key(row)]
        stated = float(cell["mean_acceptance_length"])
        law = acceptance_law([float(row[f"pos{at}_uncond"]) for at in range(3)], "per_position.dev.csv")
        lengths = even_lengths(200, 20000, 40000)
        rng = np.random.default_rng(checked)
        traces = synthesize(
            lengths, [law] * 200, "table", origin=EAGLE, seed=checked, rng=rng, prompts=(), domain=row["workload"]
        )
        accepted = np.array([one.accepted for one in walk(traces, 3) if one.whole])
        error = 4 * accepted.std() / math.sqrt(len(accepted)) + 3 * 0.0005  # three rates rounded to 0.001
        assert abs(1 + accepted.mean() - stated) < error
        checked += 1
    assert checked == len(rates) > 10


def test_published_rates_agree_with_the_stated_means() -> None:
    table = shared_data("published-tables", "issue_tables.csv")
    stated: dict[tuple[str, ...], float] = {}
    rates: dict[tuple[str, ...], list[float]] = {}
    for row in table_rows(table):
        key = tuple(row[name] for name in ("thread", "drafter", "dataset"))
        if row["quantity"].startswith("uncond_accept_pos"):
            rates.setdefault(key, []).append(float(row["value"]))
        elif row["quantity"] == "mean_accept_len_incl_bonus":
            stated[key] = float(row["value"])
    both = [key for key in rates if key in stated]
    assert len(both) >= 5
    for key in both:
        law = acceptance_law(rates[key], "issue_tables.csv")
        assert 1 + law.mean_accepted == pytest.approx(stated[key], abs=0.0005 * (len(rates[key]) + 1))


def lookup_traces(rng: np.random.Generator, longest: int) -> TraceSet:
    """Requests whose text repeats in stretches: there a lookup drafts, and is right to their end; elsewhere none."""
    runs, proposals = [], []
    for _ in range(40):
        repeats = np.zeros(301, dtype=bool)
        for start in rng.integers(1, 280, 12):
            repeats[start : start + int(rng.geometric(0.2))] = True
        left = [next((j for j in range(301 - t) if not repeats[t + j]), 301 - t) for t in range(301)]
        runs.append([min(n, longest) for n in left])
        proposals.append([longest * (n > 0) for n in left])
    return traces_of(runs, proposals=proposals, first=1, deterministic=True, max_draft_tokens=longest)


@pytest.mark.parametrize(("seed", "longest"), [(0, 4), (1, 2), (2, 6)])
def test_advice_from_counters_is_that_of_the_rounds_counted(tmp_path: Path, seed: int, longest: int) -> None:
    """Played, counted, imported and simulated: speculation pays exactly where it does with the rounds themselves.

    A step costs 20 ms and 0.1 ms a token, a lookup c a round. Tokens per round over all decide for which c it pays;
    leaving the rounds without a draft out would have it pay for far dearer ones.
    """
    truth = lookup_traces(np.random.default_rng(seed), longest)
    rounds = [one for one in walk(truth, longest) if one.drafted]
    positions = [float(sum(one.accepted > at for one in rounds)) for at in range(longest)]
    told = {"requests": 40, "prompt": sum(truth.sequences["prompt_tokens"].to_pylist()), "output": 40 * 301}
    page = write(tmp_path, metrics(len(rounds), len(rounds) * longest, positions, **told))
    imported = import_vllm_counters(page, origin=replace(NGRAM, drafter="drafter"))
    flipped = import_vllm_counters(page, origin=replace(EAGLE, drafter="drafter"))
    mean = 40 * 300 / len(walk(truth, longest))

    def speedup(traces: TraceSet, lookup_s: float) -> float:
        costs = {
            "verifier": {"kind": "linear", "base_s": 0.02, "per_token_s": 1e-4},
            "drafter": {"kind": "linear", "base_s": lookup_s, "charged": "per_round"},
        }
        fast, plain = (
            simulate(scenario(drafts, workload={"requests": 40}, costs=costs), traces).summary["output_throughput"]
            for drafts in (longest, None)
        )
        return fast / plain

    for lookup_s in (0.0, 0.02 * (mean - 1) * 0.6, 0.02 * (mean - 1) * 1.5):
        right = speedup(truth, lookup_s)
        assert speedup(imported, lookup_s) == pytest.approx(right, rel=0.04)
        assert (speedup(imported, lookup_s) > 1) == (right > 1) == (lookup_s < 0.02 * (mean - 1))
    assert speedup(flipped, 0.02 * (mean - 1) * 1.5) > 1 > right
