"""Client mixtures: rates, gap laws and lengths of hand-made files, and of the public ServeGen data."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import iid_traces
from scipy import stats
from shared_data import shared_data

from calibration.common.errors import ScenarioError
from simulator import Scenario
from simulator.playback.replay import select_sequences
from simulator.workload import OpenSource, Request, make_source
from simulator.workload.arrivals import Limits
from simulator.workload.clients import Client, Law, Window, read_clients, superpose

HEAD = "t_s,rate_rps,cv,dist,a,b,category,client\n"
LENGTHS = "category,client,field,tokens,prob\n"
SEQUENCES = select_sequences(
    iid_traces(0.5, np.random.default_rng(0), sequences=6, output_tokens=50, domains=("chat", "code"))
)


def write(tmp_path: Path, text: str, name: str = "windows.csv") -> str:
    (tmp_path / name).write_text(text, encoding="utf-8")
    return str(tmp_path / name)


def requests_of(path: str, seed: int = 0, **load: Any) -> list[Request]:
    data = {"seed": seed, "workload": {"kind": "clients", "path": path, **load}}
    source = make_source(Scenario.model_validate(data), SEQUENCES)
    assert isinstance(source, OpenSource)
    return source.admit(math.inf, source.counted)


LAWS = {
    Law("gamma", 0.4): stats.gamma(0.4, scale=1 / 0.4),
    Law("gamma", 6.0): stats.gamma(6.0, scale=1 / 6),
    Law("weibull", 0.6): stats.weibull_min(0.6, scale=1 / math.gamma(1 + 1 / 0.6)),
    Law("weibull", 2.0): stats.weibull_min(2.0, scale=1 / math.gamma(1.5)),
    Law("exponential", 0.0): stats.expon(),
}


@pytest.mark.parametrize("law", LAWS)
def test_gaps_of_a_window_have_their_law_and_the_window_its_rate(law: Law) -> None:
    window = Window(100.0, 1100.0, 20.0, law)
    times = window.arrivals(np.random.default_rng(8))
    assert len(times) == 20_000
    assert (times >= 100).all()
    assert (times < 1100).all()
    gaps = 20.0 * np.diff(times, prepend=100.0)
    # Scaled to fill the window, the gaps fit a little better than free ones would.
    grid = np.geomspace(1e-7, gaps.max(), 2000)
    empirical = np.searchsorted(np.sort(gaps), grid, side="right") / len(gaps)
    assert np.abs(empirical - LAWS[law].cdf(grid)).max() < 1.63 / math.sqrt(len(gaps))


def test_a_window_rounds_so_that_its_mean_is_kept() -> None:
    rng = np.random.default_rng(0)
    counts = np.array([len(Window(0, 10, 0.23, Law("gamma", 0.1)).arrivals(rng)) for _ in range(5000)])
    assert set(counts.tolist()) == {2, 3}
    assert counts.mean() == pytest.approx(2.3, abs=3.5 * math.sqrt(0.3 * 0.7 / 5000))


def test_gaps_too_small_for_numbers_are_taken_as_equal() -> None:
    class Underflow(np.random.Generator):
        def gamma(self, *_: Any, **__: Any) -> Any:
            return np.zeros(4)

    window = Window(0, 8, 3 / 8, Law("gamma", 0.01))
    assert window.arrivals(Underflow(np.random.PCG64(1))).tolist() == [2.0, 4.0, 6.0]


def test_rates_add_up_and_change_with_the_windows(tmp_path: Path) -> None:
    rows = "0,4,1,Gamma,1,0.25,x,a\n0,1,3,Weibull,0.4,1,x,b\n100,0,0,,0,0,x,a\n100,6,3,Weibull,0.4,1,x,b\n"
    path = write(tmp_path, HEAD + rows + "200,2,1,Expon,,,x,a\n")
    requests = requests_of(path, duration_s=250.0)
    arrivals = np.array([r.arrival_s for r in requests])
    assert (np.diff(arrivals) >= 0).all()
    for client, low, high, expected in (
        ("a", 0, 100, 400),
        ("a", 100, 200, 0),
        ("b", 0, 100, 100),
        ("b", 100, 200, 600),
    ):
        own = [r for r in requests if r.client == client and low <= r.arrival_s < high]
        assert len(own) == expected
    # The last window of a client is as long as the one before: a goes on to 300 (cut at 250), b ends at 200.
    assert {r.client for r in requests if r.arrival_s >= 200} == {"a"}
    assert np.count_nonzero(arrivals >= 200) == pytest.approx(100, abs=3.5 * math.sqrt(50))
    assert [r.id for r in requests] == list(range(len(requests)))


def test_leaving_a_client_out_changes_nothing_for_the_others(tmp_path: Path) -> None:
    path = write(tmp_path, HEAD + "".join(f"0,{2 + i},1,Gamma,0.5,1,x,c{i}\n" for i in range(3)))
    lengths = write(
        tmp_path,
        LENGTHS
        + "".join(
            f"x,c{i},{f},{n},0.5\n" for i in range(3) for f in ("input_tokens", "output_tokens") for n in (3, 9)
        ),
        "lengths.csv",
    )

    def of(client: str, **load: Any) -> list[tuple[float, int, int]]:
        requests = requests_of(path, lengths_path=lengths, duration_s=100.0, **load)
        return [(r.arrival_s, r.prompt_tokens, r.output_tokens) for r in requests if r.client == client]

    assert of("c1") == of("c1", clients=["c1"]) == of("c1", clients=["c2", "c1"])
    assert of("c1", seed=1) != of("c1")


def test_the_first_requests_are_the_same_whatever_comes_later(tmp_path: Path) -> None:
    rows = "".join(f"{600 * w},{1 + w % 3},1,Gamma,0.7,1,x,c{i}\n" for w in range(20) for i in range(2))
    path = write(tmp_path, HEAD + rows)
    key = [(r.arrival_s, r.client) for r in requests_of(path, requests=5000)]
    assert len(key) == 5000
    assert [(r.arrival_s, r.client) for r in requests_of(path, requests=700)] == key[:700]
    assert [(r.arrival_s, r.client) for r in requests_of(path, duration_s=1000.0)] == [k for k in key if k[0] < 1000]


def test_start_moves_into_the_file_and_a_multiplier_compresses(tmp_path: Path) -> None:
    path = write(tmp_path, HEAD + "0,1,1,Gamma,1,1,x,a\n100,9,1,Gamma,1,1,x,a\n200,2,1,Gamma,1,1,x,a\n")
    assert len(requests_of(path, start_s=100.0, duration_s=100.0)) == 900
    half = requests_of(path, start_s=150.0, duration_s=50.0)
    assert len(half) == pytest.approx(450, abs=3.5 * math.sqrt(225))
    fast = requests_of(path, start_s=100.0, duration_s=20.0, rate_multiplier=5.0)
    slow = requests_of(path, start_s=100.0, duration_s=100.0)
    assert [r.arrival_s for r in fast] == pytest.approx([r.arrival_s / 5 for r in slow])


def test_lengths_are_drawn_from_the_clients_own_laws(tmp_path: Path) -> None:
    path = write(tmp_path, HEAD + "0,40,1,Gamma,1,1,x,a\n0,10,1,Gamma,1,1,x,b\n")
    rows = "x,a,input_tokens,10,0.25\nx,a,input_tokens,20,0.75\nx,a,output_tokens,0,0.1\nx,a,output_tokens,70,0.9\n"
    rows += "x,b,input_tokens,7,1\nx,b,output_tokens,8,1\nx,b,reason_ratio,0,1\ny,a,input_tokens,999,1\n"
    lengths = write(tmp_path, LENGTHS + rows, "lengths.csv")
    requests = requests_of(path, lengths_path=lengths, category="x", requests=10_000)
    own = [r for r in requests if r.client == "a"]
    prompts = np.array([r.prompt_tokens for r in own])
    outputs = np.array([r.output_tokens for r in own])
    n = len(own)
    assert set(prompts.tolist()) == {10, 20}
    assert (prompts == 10).mean() == pytest.approx(0.25, abs=3.5 * math.sqrt(0.1875 / n))
    # A drawn length of 0 counts as 1.
    assert set(outputs.tolist()) == {1, 70}
    assert (outputs == 1).mean() == pytest.approx(0.1, abs=3.5 * math.sqrt(0.09 / n))
    assert abs(np.corrcoef(prompts, outputs)[0, 1]) < 3.5 / math.sqrt(n)
    assert {(r.prompt_tokens, r.output_tokens) for r in requests if r.client == "b"} == {(7, 8)}
    assert {r.resampled_tokens for r in own} == {0, 20}


def test_clients_may_have_a_domain_of_their_own(tmp_path: Path) -> None:
    path = write(tmp_path, HEAD + "0,4,1,Gamma,1,1,x,a\n0,4,1,Gamma,1,1,x,b\n")
    requests = requests_of(path, requests=600, client_domains={"a": "code"}, mix={"chat": 1.0, "code": 0.0})
    assert {SEQUENCES.domains[r.sequence] for r in requests if r.client == "a"} == {"code"}
    assert {SEQUENCES.domains[r.sequence] for r in requests if r.client == "b"} == {"chat"}
    free = requests_of(path, requests=600, client_domains={"a": "code"})
    assert {SEQUENCES.domains[r.sequence] for r in free if r.client == "b"} == {"chat", "code"}
    with pytest.raises(
        ScenarioError, match=r"client_domains: no sequence of it is served, got 'cod'; did you mean 'code'"
    ):
        requests_of(path, requests=600, client_domains={"a": "cod"})


@pytest.mark.parametrize(
    ("windows", "lengths", "load", "message"),
    [
        ("t_s,rate_rps,a,client\n", None, {}, "column 'dist': is missing"),
        (HEAD, None, {}, "must hold at least one client, got none"),
        (
            HEAD + "0,1,1,Gama,1,1,x,a\n",
            None,
            {},
            ":2: column 'dist': must be gamma, weibull or exponential, got 'Gama'",
        ),
        (HEAD + "0,1,1,Gamma,0,1,x,a\n", None, {}, ":2: column 'a': must be at least 0.01, got '0'"),
        (HEAD + "0,-1,1,Gamma,1,1,x,a\n", None, {}, ":2: column 'rate_rps': must be a number >= 0, got '-1'"),
        (HEAD + "0,1,1,Gamma,1,1,x,a\n0,1,1,Gamma,1,1,y,a\n", None, {}, "category: must be given, one of x, y"),
        (HEAD + "0,1,1,Gamma,1,1,chat,a\n", None, {"category": "cht"}, "got 'cht'; did you mean 'chat'?"),
        (
            HEAD + "0,1,1,Gamma,1,1,x,ann\n",
            None,
            {"clients": ["an"]},
            "workload.clients: not in windows.csv, got 'an'",
        ),
        (HEAD + "0,1,1,Gamma,1,1,x,a\n", LENGTHS, {}, "of client 'a' must sum to 1, got 0"),
        (
            HEAD + "0,1,1,Gamma,1,1,x,a\n",
            LENGTHS + "x,a,input_tokens,4,0.6\nx,a,output_tokens,1.5,1\n",
            {},
            ":3: column 'tokens': must be a whole number >= 0, got '1.5'",
        ),
        (
            HEAD + "0,1,1,Gamma,1,1,x,a\n",
            LENGTHS + "x,a,input_tokens,4,0.6\nx,a,output_tokens,1,1\n",
            {},
            "field 'input_tokens' of client 'a' must sum to 1, got 0.6",
        ),
        (HEAD + "0,1,1,Gamma,1,1,x,a\n", None, {"requests": 601}, "must be at most the 600 that there are, got 601"),
    ],
)
def test_faults(tmp_path: Path, windows: str, lengths: str | None, load: dict[str, Any], message: str) -> None:
    path = write(tmp_path, windows)
    if lengths is not None:
        load = {**load, "lengths_path": write(tmp_path, lengths, "lengths.csv")}
    with pytest.raises(ScenarioError) as caught:
        requests_of(path, **{"requests": 10, **load})
    assert message in str(caught.value)


def test_superposing_nobody_gives_nothing() -> None:
    assert len(superpose([Client("idle", ())], Limits(until_s=5.0), 0)) == 0


def test_the_public_servegen_clients() -> None:
    windows = shared_data("servegen", "top_clients_windows.csv.gz")
    lengths = shared_data("servegen", "top_clients_length_pmf.csv.gz")
    names = ("chunk-35", "chunk-48", "chunk-3")
    clients = read_clients(windows, lengths, "deepseek-r1", names, 0.0)
    assert [client.name for client in clients] == list(names)
    for client in clients:
        for law in (client.prompt, client.output):
            assert law is not None
            assert law.tokens.min() >= 1
    arrivals = superpose(clients, Limits(until_s=6 * 3600.0), 0)
    assert arrivals.client is not None
    for number, client in enumerate(clients):
        expected = sum(w.rate_rps * (w.end_s - w.start_s) for w in client.windows if w.end_s <= 6 * 3600)
        # Every window is rounded up or down.
        assert np.count_nonzero(arrivals.client == number) == pytest.approx(expected, abs=36)
    # ServeGen's figure for the gaps of a window is near the coefficient of variation that they have here.
    busiest = max(clients[0].windows, key=lambda window: window.rate_rps)
    gaps = np.diff(busiest.arrivals(np.random.default_rng(0)))
    assert gaps.mean() == pytest.approx(1 / busiest.rate_rps, rel=0.02)
