"""Mixtures of clients as ServeGen (arXiv 2505.09999) describes production load.

Each client has its own rate over windows of time, its own burstiness and its own lengths; their arrivals are
superposed. As in ServeGen's generator, a window of rate r and length w holds the number of arrivals that was measured
in it, r * w, with gaps drawn from the window's law and scaled to fill it. So rates come out as stated even where gaps
are so bursty (Weibull with a shape of 0.1) that a free renewal process would not show its rate in days; that the gaps
of a window have their law is an approximation, the better the more of them there are. Unlike ServeGen, which rounds
up and then loses the last arrival, r * w is rounded at random, up or down, so that its mean is kept.

Client mixtures from CSV files, in the columns in which ServeGen's data are at hand.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from calibration.common.arrays import Floats, Ints
from calibration.common.errors import ScenarioError, did_you_mean
from simulator.workload.arrivals import Arrivals, Limits
from simulator.workload.files import CsvColumns, sha256
from simulator.workload.lengths import ARRIVALS, LENGTHS, Pmf, stream


@dataclass(frozen=True)
class Law:
    """Gaps up to a factor: gamma(`shape`), Weibull(`shape`) or exponential."""

    name: str
    shape: float

    def gaps(self, number: int, rng: np.random.Generator) -> Floats:
        """Draw gaps."""
        if self.name == "gamma":
            return rng.gamma(self.shape, 1.0, number)
        if self.name == "weibull":
            return rng.weibull(self.shape, number)
        return rng.exponential(1.0, number)


@dataclass(frozen=True)
class Window:
    """Seconds from `start_s` to `end_s`, the rate in them, and the law of the gaps."""

    start_s: float
    end_s: float
    rate_rps: float
    law: Law

    def arrivals(self, rng: np.random.Generator) -> Floats:
        """Give the arrival times within."""
        seconds = self.end_s - self.start_s
        number = int(self.rate_rps * seconds + rng.random())
        if number == 0:
            return np.zeros(0)
        points = np.cumsum(self.law.gaps(number + 1, rng))
        # NOTE: with shapes near SMALLEST_SHAPE all of a few gaps may underflow; then they are taken as equal.
        whole = points[-1] if points[-1] > 0 else np.inf
        inside = points[:-1] / whole if whole < np.inf else np.arange(1, number + 1) / (number + 1)
        times: Floats = self.start_s + seconds * inside
        return times


@dataclass(frozen=True)
class Client:
    """One client: its windows, in order, and the laws of its lengths where they are known."""

    name: str
    windows: tuple[Window, ...]
    prompt: Pmf | None = None
    output: Pmf | None = None

    def arrivals(self, until_s: float, rng: np.random.Generator) -> Floats:
        """Give its arrival times from 0 to `until_s`; a later `until_s` only adds to them."""
        times = [window.arrivals(rng) for window in self.windows if window.start_s < until_s]
        joined = np.concatenate(times) if times else np.zeros(0)
        return joined[(joined >= 0) & (joined < until_s)]


def superpose(clients: Iterable[Client], limits: Limits, seed: int) -> Arrivals:
    """Give the arrivals of all clients together, with the lengths of those that know them.

    A client's draws depend on seed and name alone: leaving another client out changes nothing for it.
    """
    crowd = tuple(clients)
    end = min(limits.until_s, max((window.end_s for client in crowd for window in client.windows), default=0.0))
    until = end if limits.number is None else min(end, _guess(crowd, limits.number))
    while True:
        per_client = [client.arrivals(until, stream(seed, ARRIVALS, client.name)) for client in crowd]
        if limits.number is None or sum(map(len, per_client)) >= limits.number or until >= end:
            break
        until = min(2 * until, end)
    who = np.repeat(np.arange(len(crowd)), [len(times) for times in per_client])
    times = np.concatenate(per_client) if crowd else np.zeros(0)
    prompt, output = _lengths(crowd, per_client, seed)
    arrivals = Arrivals(times, prompt, output, who, tuple(client.name for client in crowd))
    return arrivals.rows(np.argsort(times, kind="stable")[: limits.number])


def _guess(clients: tuple[Client, ...], number: int) -> float:
    """Give the end of the window in which `number` arrivals are expected to be reached."""
    windows = [window for client in clients for window in client.windows]
    ends = sorted({window.end_s for window in windows})
    for end in ends:
        mass = sum(w.rate_rps * (min(w.end_s, end) - w.start_s) for w in windows if w.start_s < end)
        if mass >= number:
            return end
    return ends[-1] if ends else 0.0


def _lengths(clients: tuple[Client, ...], per_client: list[Floats], seed: int) -> tuple[Ints | None, Ints | None]:
    """Draw prompt and output tokens of every client's arrivals; None where no lengths are known."""
    if not clients or clients[0].prompt is None or clients[0].output is None:
        return None, None
    drawn: tuple[list[Ints], list[Ints]] = ([], [])
    for client, times in zip(clients, per_client, strict=True):
        for which, law in enumerate((client.prompt, client.output)):
            assert law is not None  # all clients have lengths or none has
            drawn[which].append(law.draw(len(times), stream(seed, LENGTHS, client.name, which)))
    return np.concatenate(drawn[0]), np.concatenate(drawn[1])


LAWS = {"gamma": "gamma", "weibull": "weibull", "exponential": "exponential", "expon": "exponential"}
"""Names of gap laws in files, small letters, and ours."""
SMALLEST_SHAPE = 0.01
"""Below it, gaps are zero or beyond all numbers."""


def read_clients(
    path: Path, lengths_path: Path | None, category: str | None, names: tuple[str, ...] | None, start_s: float
) -> tuple[Client, ...]:
    """Read clients, in the order of the file (or of `names`), with time counted from `start_s`.

    A window lasts to the client's next one, the last as long as the one before it (600 s if it is alone). The column
    b (scale) is not needed: rate_rps says how many arrivals a window has. Raises `ScenarioError` with every fault.
    """
    table = CsvColumns.read(path, ("client", "t_s", "rate_rps", "dist", "a"), ("category",))
    chosen = _choose(table, category, names)
    start, rate = table.numbers("t_s"), table.numbers("rate_rps")
    shape = _shapes(table, rate, np.concatenate(list(chosen.values())))
    table.faults.raise_if_any()
    laws = [LAWS.get(text.strip().lower(), "") for text in table.texts["dist"]]
    lengths = read_lengths(lengths_path, category, tuple(chosen)) if lengths_path is not None else {}
    clients = []
    for name, rows in chosen.items():
        rows = rows[np.argsort(start[rows], kind="stable")]
        ends = np.append(start[rows][1:], start[rows][-1] + (np.diff(start[rows])[-1] if len(rows) > 1 else 600.0))
        windows = tuple(
            Window(begin - start_s, end - start_s, float(rate[row]), Law(laws[row], float(shape[row])))
            for row, begin, end in zip(rows.tolist(), start[rows].tolist(), ends.tolist(), strict=True)
            if end > start_s
        )
        clients.append(Client(name, windows, *lengths.get(name, (None, None))))
    return tuple(clients)


def _choose(table: CsvColumns, category: str | None, names: tuple[str, ...] | None) -> dict[str, Ints]:
    """Give the rows of every client that was asked for."""
    clients, categories = table.texts["client"], table.texts.get("category")
    known = list(dict.fromkeys(categories or ()))
    if category is None and len(known) > 1:
        raise ScenarioError(
            f"workload.category: must be given, one of {', '.join(sorted(known))} ({table.path.name})"
        )
    if category is not None and category not in known:
        raise ScenarioError(
            f"workload.category: not in {table.path.name}, got '{category}'{did_you_mean(category, known)}"
        )
    rows: dict[str, list[int]] = {}
    for row, client in enumerate(clients):
        if category is None or categories is None or categories[row] == category:
            rows.setdefault(client, []).append(row)
    faults = [
        f"workload.clients: not in {table.path.name}, got '{name}'{did_you_mean(name, rows)}"
        for name in names or ()
        if name not in rows
    ]
    if faults or not rows:
        raise ScenarioError("\n".join(faults) or f"{table.path}: must hold at least one client, got none")
    return {name: np.array(rows[name], dtype=np.int64) for name in names or rows}


def _shapes(table: CsvColumns, rate: Floats, rows: Ints) -> Floats:
    """Give the shapes of the gap laws, with a fault where one of `rows` has arrivals and no proper law."""
    shape = table.numbers("a", blank="0")
    for row in np.sort(rows[rate[rows] > 0]).tolist():
        text = table.texts["dist"][row]
        law = LAWS.get(text.strip().lower())
        if law is None:
            table.faults.add(table.lines[row], "dist", "must be gamma, weibull or exponential", text)
        elif law != "exponential" and shape[row] < SMALLEST_SHAPE:
            table.faults.add(table.lines[row], "a", f"must be at least {SMALLEST_SHAPE}", table.texts["a"][row])
    return shape


def read_lengths(path: Path, category: str | None, names: tuple[str, ...]) -> dict[str, tuple[Pmf, Pmf]]:
    """Read the (prompt, output) laws of the clients `names`: columns client, field, tokens, prob, maybe category.

    Fields other than input_tokens and output_tokens are ignored. A length of 0 counts as 1: a request has a prompt
    and emits a token. Raises `ScenarioError` where a client has no law or probabilities do not sum to 1.
    """
    table = CsvColumns.read(path, ("client", "field", "tokens", "prob"), ("category",))
    tokens, prob = table.numbers("tokens", whole=True), table.numbers("prob")
    table.faults.raise_if_any()
    clients, categories, fields = (table.texts.get(name) for name in ("client", "category", "field"))
    assert clients is not None
    assert fields is not None
    rows: dict[tuple[str, str], list[int]] = {}
    for row, key in enumerate(zip(clients, fields, strict=True)):
        if categories is None or category is None or categories[row] == category:
            rows.setdefault(key, []).append(row)
    faults, laws = [], {}
    for name in names:
        pair = []
        for field in ("input_tokens", "output_tokens"):
            own = rows.get((name, field), [])
            total = float(prob[own].sum())
            if abs(total - 1) > 1e-3:
                rule = f"probabilities of field '{field}' of client '{name}' must sum to 1"
                faults.append(f"{path}: column 'prob': {rule}, got {total:.4g}")
            else:
                pair.append(Pmf(np.maximum(tokens[own], 1).astype(np.int64), prob[own]))
        if len(pair) == 2:
            laws[name] = (pair[0], pair[1])
    if faults:
        raise ScenarioError("\n".join(faults))
    return laws


def provenance(path: Path, clients: tuple[Client, ...]) -> dict[str, object]:
    """Say where a mixture comes from."""
    return {"arrivals": "client mixture", "file": path.name, "file_sha256": sha256(path), "clients": len(clients)}
