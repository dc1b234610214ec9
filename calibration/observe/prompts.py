"""Prompts to send: as token ids where the server takes them, else as text."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow.compute as pc

from calibration.common.errors import CalibrationError, require
from calibration.traces import TraceSet


@dataclass(frozen=True)
class Prompt:
    """The prompt of one sequence: token ids, text, or both."""

    sequence_id: str
    domain: str
    token_ids: tuple[int, ...] | None = None
    text: str | None = None

    def __post_init__(self) -> None:  # noqa: D105
        if not self.token_ids and not self.text:
            raise CalibrationError(f"prompt of {self.sequence_id}: must have token ids or text, got neither")

    def of_length(self, tokens: int) -> list[int]:
        """Give exactly `tokens` token ids: the end of the prompt, which is repeated where it is too short."""
        ids = self.token_ids or ()
        times = -(-tokens // max(len(ids), 1))
        return list(ids * times)[-tokens:]


def recorded_prompts(traces: TraceSet, sequence_ids: Sequence[str] | None = None) -> list[Prompt]:
    """Give the prompts recorded in `traces`, of `sequence_ids` in that order (default: all).

    `CalibrationError` where the TraceSet holds no prompt token ids, or not a sequence that is asked for.
    """
    table = traces.sequences.select(["sequence_id", "domain", "prompt_token_ids"])
    missing = table.filter(pc.is_null(table["prompt_token_ids"]))
    if missing.num_rows:
        first = missing["sequence_id"][0].as_py()
        raise CalibrationError(
            f"traces: prompt_token_ids must be recorded to be sent to a server, sequence '{first}' has none; "
            "give the prompts as text"
        )
    found = {row["sequence_id"]: row for row in table.to_pylist()}
    wanted = list(found) if sequence_ids is None else list(sequence_ids)
    for name in wanted:
        if name not in found:
            raise CalibrationError(f"traces: must hold every sequence of the workload, '{name}' is not there")
    return [Prompt(name, found[name]["domain"], tuple(found[name]["prompt_token_ids"])) for name in wanted]


def with_text(
    prompts: Sequence[Prompt],
    tokenizer: str | os.PathLike[str] | None = None,
    texts: Mapping[str, str] | None = None,
) -> list[Prompt]:
    """Give `prompts` with text beside their token ids, for servers and endpoints that take no ids.

    From `texts` by sequence id, or detokenised by the tokenizer in folder `tokenizer` (extra ``calibration``). Text
    may be tokenised otherwise than it was recorded; the run then holds the server's own count.
    """
    if texts is not None:
        return [replace(prompt, text=texts.get(prompt.sequence_id, prompt.text)) for prompt in prompts]
    if tokenizer is None:
        return list(prompts)
    if not Path(tokenizer).is_dir():
        raise CalibrationError(f"{tokenizer}: must be a folder with a tokenizer, it is not there")
    try:
        decoder = require("transformers").AutoTokenizer.from_pretrained(tokenizer)
    except (OSError, ValueError) as fault:
        raise CalibrationError(f"{tokenizer}: must hold a tokenizer, {fault}") from None
    return [
        prompt if prompt.token_ids is None else replace(prompt, text=decoder.decode(list(prompt.token_ids)))
        for prompt in prompts
    ]
