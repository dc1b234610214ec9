"""Import the acceptance lists of SpecDecode-Bench's simulator (arXiv 2601.11580).

One JSON object a line: ``id``, ``prompt_token_ids``, ``generated_token_ids`` and, per drafter,
``acc_<drafter>: {acc_len: [...]}``, the number of tokens *emitted* (bonus token included) had a round started at
each output position. Run lengths exclude the bonus, so run_length = acc_len - 1, cut at the end of the output.

Two things about these files that are not documented there were found by checking them:

* ``acc_len[i]`` belongs to the round that starts when i output tokens are known (position i). For the n-gram
  drafter this is certain: a lookup of 7- to 3-grams, earliest match, 20 tokens, gives the list back from the
  token ids. The published simulator reads the list one place too early (its first round, at position 1, uses
  ``acc_len[0]``), which lowers its speed-ups by about 1%. ``alignment="published"`` repeats that on purpose.
* The EAGLE list often differs in length from the generated tokens: it was recorded on a text of its own. Such
  requests become a sequence of their own, without token ids.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from calibration.common.errors import TraceError
from calibration.common.version import paceline_version
from calibration.proposers.lookup import lookup_runs
from calibration.traces import (
    DecodingInfo,
    DeviceInfo,
    DrafterInfo,
    Manifest,
    ModelInfo,
    PromptSource,
    TraceSet,
    make_table,
)
from calibration.traces.manifest import CostConstants

Alignment = Literal["position", "published"]
FORMAT = "specdecode-bench"
_NGRAM = {"ngram_max": 7, "ngram_min": 3, "max_draft_tokens": 20}
_UNKNOWN = (
    "step timings: not in the files; prices come from constants given by the user",
    "confidences, entropies, overlap and rollouts: not in the files",
    "whether the EAGLE run produced the same text where its length agrees with the token ids (taken as yes)",
    "the model shapes, the software versions and the decoding seed of the recording",
)


def import_specdecode_bench(
    files: Sequence[str | os.PathLike[str]],
    *,
    alignment: Alignment = "position",
    domain: str | None = None,
    costs: CostConstants | None = None,
    command: str = "",
    progress: Callable[[str, int, int], None] | None = None,
) -> TraceSet:
    """Give the TraceSet of SpecDecode-Bench `files`; the domain is the file's name without ``combined_``.

    Drafters keep the files' names (``eagle``, ``ngram``). For ``ngram`` the proposal lengths are derived from the
    token ids by the drafter's documented rule, and the manifest notes how many run lengths that rule reproduces.
    `costs` are linear constants that travel in the manifest. Replay of every fixed draft length is exact.

    Raises `TraceError` with file, line and rule for malformed input.
    """
    if not files:
        raise TraceError("import: at least one file is needed")
    rows = _Rows(alignment)
    prompts = []
    for done, name in enumerate(files):
        path = Path(name)
        requests = _read_requests(path)
        label = domain or path.stem.removeprefix("combined_")
        if progress:
            progress(f"import {path.name}", done, len(files))
        for line, request in requests:
            rows.add(label, request, f"{path.name}:{line}")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        prompts.append(PromptSource(name=path.name, sha256=digest, domain=label, prompts=len(requests)))
    if progress:
        progress("import", len(files), len(files))
    notes = [rows.agreement()]
    if alignment == "published":
        notes.append("acceptance lists are read one place too early, as the published simulator reads them")
    manifest = Manifest(
        paceline_version=paceline_version(),
        kind="imported",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
        seed=None,
        verifier=ModelInfo(name="Llama-3.1-8B-Instruct"),
        drafters=tuple(_drafter(name) for name in rows.drafters),
        decoding=DecodingInfo(mode="greedy"),
        device=DeviceInfo(name="NVIDIA H100", kind="cuda"),
        prompts=tuple(prompts),
        import_format=f"{FORMAT} ({alignment} alignment)",
        import_grain="position",
        unknown=_UNKNOWN,
        notes=tuple(notes),
        costs=costs,
    )
    return TraceSet.build(manifest, rows.tables())


def _drafter(name: str) -> DrafterInfo:
    if name == "ngram":
        return DrafterInfo(
            name=name,
            paradigm="prompt-lookup",
            deterministic=True,
            max_draft_tokens=20,
            settings=dict(_NGRAM),
        )
    return DrafterInfo(name=name, paradigm=name, deterministic=False)


def _read_requests(path: Path) -> list[tuple[int, dict[str, Any]]]:
    if not path.is_file():
        raise TraceError(f"{path}: not found")
    requests = []
    with path.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                request = json.loads(line)
            except json.JSONDecodeError as fault:
                raise TraceError(f"{path}:{number}: not valid JSON ({fault.msg})") from None
            _check_request(request, f"{path}:{number}")
            requests.append((number, request))
    if not requests:
        raise TraceError(f"{path}: holds no request")
    return requests


def _check_request(request: Any, place: str) -> None:
    if not isinstance(request, Mapping):
        raise TraceError(f"{place}: must be a JSON object, got {type(request).__name__}")
    for key in ("id", "prompt_token_ids", "generated_token_ids"):
        if key not in request:
            raise TraceError(f"{place}: key '{key}' is missing; is this a SpecDecode-Bench file?")
    for key in ("prompt_token_ids", "generated_token_ids"):
        if not _are_ints(request[key], 0):
            raise TraceError(f"{place}: {key}: must be a list of token ids, not empty")
    lists = [key for key in request if key.startswith("acc_")]
    if not lists:
        raise TraceError(f"{place}: no acceptance list (acc_<drafter>) found")
    for key in lists:
        lengths = request[key].get("acc_len") if isinstance(request[key], Mapping) else None
        if not _are_ints(lengths, 1):
            raise TraceError(f"{place}: {key}.acc_len: must be a list of integers >= 1 (bonus included)")


def _are_ints(values: Any, low: int) -> bool:
    return (
        isinstance(values, list)
        and bool(values)
        and all(isinstance(v, int) and not isinstance(v, bool) and v >= low for v in values)
    )


class _Rows:
    """Collects the rows of both tables, request by request."""

    def __init__(self, alignment: Alignment) -> None:
        self.first = 0 if alignment == "position" else 1
        self.drafters: list[str] = []
        self.sequences: list[dict[str, Any]] = []
        self.positions: dict[str, list[Any]] = {
            name: []
            for name in (
                "sequence_id",
                "drafter",
                "position",
                "run_length",
                "proposal_length",
                "accept_probability",
            )
        }
        self.seen: set[str] = set()
        self.checked = 0
        self.agreed = 0

    def add(self, domain: str, request: dict[str, Any], place: str) -> None:
        """Add one request: a sequence for every distinct output length among its lists."""
        name = f"{domain}/{request['id']}"
        if name in self.seen:
            raise TraceError(f"{place}: id '{request['id']}' occurs twice in domain '{domain}'")
        self.seen.add(name)
        length = len(request["generated_token_ids"])
        lists = {key.removeprefix("acc_"): request[key]["acc_len"] for key in request if key.startswith("acc_")}
        for drafter in lists:
            if drafter not in self.drafters:
                self.drafters.append(drafter)
        if any(len(values) == length for values in lists.values()):
            self._sequence(name, domain, request, length, request["generated_token_ids"])
        for drafter, values in lists.items():
            if len(values) == length:
                self._run(name, drafter, values, request)
        for drafter, values in lists.items():
            if len(values) != length:
                own = f"{name}/{drafter}"
                self._sequence(own, domain, request, len(values), None)
                self._run(own, drafter, values, None)

    def _sequence(
        self, name: str, domain: str, request: dict[str, Any], length: int, output: list[int] | None
    ) -> None:
        self.sequences.append(
            {
                "sequence_id": name,
                "domain": domain,
                "prompt_tokens": len(request["prompt_token_ids"]),
                "output_tokens": length,
                "finish_reason": "unknown",
                "prompt_token_ids": request["prompt_token_ids"],
                "output_token_ids": output,
            }
        )

    def _run(self, name: str, drafter: str, emitted: list[int], request: dict[str, Any] | None) -> None:
        total = len(emitted)
        proposals: list[int | None] = [None] * total
        if drafter == "ngram" and request is not None:
            by_rule, lengths = lookup_runs(request["prompt_token_ids"], request["generated_token_ids"], **_NGRAM)
            recorded = [min(value - 1, total - t) for t, value in enumerate(emitted)]
            self.checked += total
            self.agreed += sum(a == b for a, b in zip(recorded, by_rule, strict=True))
            proposals = [max(a, b) for a, b in zip(recorded, lengths, strict=True)]
        for t in range(self.first, total):
            run = min(emitted[t - self.first] - 1, total - t)
            proposal = proposals[t - self.first]
            self.positions["sequence_id"].append(name)
            self.positions["drafter"].append(drafter)
            self.positions["position"].append(t)
            self.positions["run_length"].append(run)
            self.positions["proposal_length"].append(proposal)
            self.positions["accept_probability"].append(float(run > 0))

    def agreement(self) -> str:
        """Say how well the n-gram rule reproduces the recorded list."""
        if not self.checked:
            return "no n-gram list with token ids: proposal lengths are unknown"
        return (
            f"proposal lengths of ngram are derived by lookup of {_NGRAM['ngram_max']}- to "
            f"{_NGRAM['ngram_min']}-grams, which reproduces {self.agreed} of {self.checked} recorded run lengths"
        )

    def tables(self) -> dict[str, Any]:
        """Give the two tables."""
        columns = {key: [row[key] for row in self.sequences] for key in self.sequences[0]}
        return {
            "sequences": make_table("sequences", columns),
            "positions": make_table("positions", self.positions),
        }
