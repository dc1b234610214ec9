"""The shapes in which SGLang reports speculation, read into one: answers with their counts, or one mean of a run."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from calibration.common.errors import TraceError
from calibration.importers.aggregates import Lengths, even_lengths
from calibration.importers.origin import Origin
from calibration.importers.reading import Object, count, counts, measure
from calibration.traces.paradigms import paradigm_of


@dataclass(frozen=True)
class Answer:
    """One answer: its lengths in tokens, why it ended, and the object that holds its counts."""

    place: str
    size: tuple[int, int]
    finish_reason: str
    meta: Object


@dataclass(frozen=True)
class RunMean:
    """What a report says of a whole run. `accept_length` holds the bonus token; None: not said.

    `arguments`: objects that may hold the server's arguments.
    """

    kind: str
    accept_length: float
    arguments: tuple[Object, ...]
    lengths: Lengths | None = None
    notes: tuple[str, ...] = ()

    @property
    def longest(self) -> int | None:
        """Give the longest chain of drafts that the server's arguments allow; None where they do not tell.

        Of a chain all tokens verified but the root are drafts, also where a block is drafted in one step (DFLASH).
        """
        nodes, steps = self._argument("speculative_num_draft_tokens"), self._argument("speculative_num_steps")
        if nodes is not None and nodes > 1:
            return nodes - 1
        return steps if steps else None

    def check_chain(self, place: str) -> None:
        """Refuse trees: their verification costs all their nodes, and a mean length does not say how they branch."""
        width, nodes = self._argument("speculative_eagle_topk"), self._argument("speculative_num_draft_tokens")
        steps = self._argument("speculative_num_steps")
        if width is None and nodes is not None and steps is not None and nodes - 1 != steps and not self._one_shot():
            raise TraceError(
                f"{place}: {nodes} tokens verified after {steps} steps of drafting are no chain, and "
                "speculative_eagle_topk, which says how drafts branch, is not reported; give a report with all "
                "arguments"
            )
        if width is not None and width > 1:
            size = "" if nodes is None else f" of {nodes} nodes, the root included"
            depth = "" if steps is None else f", {steps} deep"
            raise TraceError(
                f"{place}: drafts are trees{size}{depth} (speculative_eagle_topk = {width}), whose verification "
                "costs every node; a mean length tells enough of chains alone (speculative_eagle_topk = 1)"
            )

    def _one_shot(self) -> bool:
        names = (one.get("speculative_algorithm") for one in self.arguments)
        return any(isinstance(name, str) and paradigm_of(name).one_shot for name in names)

    def _argument(self, key: str) -> int | None:
        found = (one.get(key) for one in self.arguments)
        return next((value for value in found if isinstance(value, int) and not isinstance(value, bool)), None)

    def named(self, origin: Origin) -> Origin:
        """Give `origin` with the names in the server's arguments, where the user did not give them."""
        for one in self.arguments:
            origin = origin.with_verifier(one.get("model_path"))
            algorithm = one.get("speculative_algorithm")
            if origin.paradigm == "unknown" and isinstance(algorithm, str):
                origin = replace(origin, paradigm=algorithm.lower())
        return origin


_IS = r"['\"]?\s*[=:]\s*"
"""Between the name of an argument and its value: keyword arguments, a dict, JSON."""


def is_json(text: str) -> bool:
    """Say whether `text` is JSON or JSON lines: whether it, or its first line, can be read as such."""
    first = next((line for line in text.splitlines() if line.strip()), "")
    for part in (first, text):
        try:
            json.loads(part)
        except json.JSONDecodeError:
            continue
        return True
    return False


def read_answer(answer: Object, place: str) -> Answer | None:
    """Read one answer; None where it holds no ``spec_verify_ct``."""
    meta = _meta(answer)
    if meta is None:
        return None
    usage = answer.get("usage")
    held = {**(usage if isinstance(usage, Mapping) else {}), **meta}
    size = count(held, "prompt_tokens", place, 1), count(held, "completion_tokens", place, 1)
    reason = meta.get("finish_reason")
    kind = reason.get("type") if isinstance(reason, Mapping) else reason
    return Answer(place, size, kind if kind in ("stop", "length") else "unknown", meta)


def _meta(answer: Object) -> Object | None:
    choices = answer.get("choices")
    first = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], Mapping) else {}
    extension = answer.get("sglext")
    details = extension.get("spec_tokens_details") if isinstance(extension, Mapping) else None
    for found in (answer.get("meta_info"), first.get("meta_info"), details):
        if isinstance(found, Mapping) and found.get("spec_verify_ct") is not None:
            return found
    return None


def read_run(whole: Object, place: str) -> RunMean:
    """Read a server info, or a result of ``bench_serving``."""
    states = _states(whole)
    if "accept_length" in whole:
        length = measure(whole, "accept_length", place, 1)
        return RunMean("sglang bench_serving", length, (whole, *states), _bench_lengths(whole, place))
    named = "avg_spec_accept_length"
    means = [measure(state, named, place, 1) for state in states if state.get(named) is not None]
    if not means:
        raise TraceError(
            f"{place}: meta_info.spec_verify_ct, internal_states[].{named} or accept_length must be there; is this a "
            "report of SGLang with speculation on?"
        )
    notes = ["mean accepted length since the server started, all its traffic included"]
    if len(means) > 1:
        notes.append(f"unweighted mean over {len(means)} schedulers")
    return RunMean("sglang server info", sum(means) / len(means), (whole, *states), notes=tuple(notes))


def _states(whole: Object) -> list[Object]:
    """Give a server info, which may stand in a benchmark result, and the states of its schedulers.

    Where prefill and decoding are apart, those of all the servers that decode.
    """
    info = whole.get("server_info")
    info = info if isinstance(info, Mapping) else whole
    decode = info.get("decode")
    servers = [one for one in decode if isinstance(one, Mapping)] if isinstance(decode, list) else []
    found: list[Object] = []
    for server in servers or [info]:
        states = server.get("internal_states")
        found += (
            [server, *(one for one in states if isinstance(one, Mapping))] if isinstance(states, list) else [server]
        )
    return found


def _bench_lengths(whole: Object, place: str) -> Sequence[tuple[int, int]] | None:
    inputs, outputs = counts(whole, "input_lens", place), counts(whole, "output_lens", place)
    if inputs and outputs and len(inputs) == len(outputs):
        return [size for size in zip(inputs, outputs, strict=True) if min(size) > 0]
    if "completed" not in whole:
        return None
    return even_lengths(
        count(whole, "completed", place, 1),
        count(whole, "total_input_tokens", place, 1),
        count(whole, "total_output_tokens", place, 1),
        place,
    )


def read_log(path: Path, text: str) -> RunMean:
    """Read a log: the mean accept len of its decode lines, weighted by running requests."""
    weighted = total = 0.0
    notes = ["accept len of log lines, weighted by running requests: rounds are not counted there"]
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        if "Decode batch" not in line or "accept len:" not in line:
            continue
        length = re.search(r"accept len: (\d+(?:\.\d+)?)(?=[^\d.])", line)
        if length is None and not line.endswith(("\n", "\r")):
            notes.append(f"line {number}, the last one, is not finished: left out")
            continue
        running = re.search(r"#running-req: (\d+)", line)
        if length is None or running is None:
            raise TraceError(f"{path}:{number}: '#running-req: N' and 'accept len: X' must be in the line")
        weighted += float(length[1]) * int(running[1])
        total += int(running[1])
    if total == 0:
        raise TraceError(f"{path}: no 'Decode batch' line holds 'accept len:'; is this a log with speculation on?")
    return RunMean("sglang log", weighted / total, (_logged_arguments(path, text),), notes=tuple(notes))


def _logged_arguments(path: Path, text: str) -> Object:
    """Read the server's arguments; `TraceError` where the log holds several servers with others."""
    found: dict[str, Any] = {}
    numbers = ("speculative_num_steps", "speculative_eagle_topk", "speculative_num_draft_tokens")
    for key in (*numbers, "model_path", "speculative_algorithm"):
        value = r"(\d+)" if key in numbers else r"['\"]([^'\"]+)['\"]"
        told = list(dict.fromkeys(re.findall(rf"\b{key}{_IS}{value}", text)))
        if len(told) > 1:
            raise TraceError(f"{path}: must be the log of one server, got {key} = {' and '.join(told)}; cut the log")
        if told:
            found[key] = int(told[0]) if key in numbers else told[0]
    return found
