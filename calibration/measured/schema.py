"""The tables of a measured run. All times are seconds on the run's clock, from the start of their repeat."""

from __future__ import annotations

import pyarrow as pa

from calibration.traces.schema import Column

OPERATIONS = ("prefill", "decode", "mixed", "draft")
"""What a step did: prompt tokens only, a decode or verify round only, both, or one step of a drafter."""

REQUESTS = (
    Column("repeat", pa.int32(), "which repeat of the condition, from 0", low=0),
    Column("request_id", pa.int32(), "as in the simulated run of the same scenario", low=0),
    Column("sequence_id", pa.string(), "recorded sequence whose prompt it had"),
    Column("domain", pa.string(), "domain of its prompt"),
    Column("counted", pa.bool_(), "false for a filler that only kept the batch full"),
    Column("arrival_s", pa.float64(), "when it arrived", low=0),
    Column("first_token_s", pa.float64(), "when its first token was there", low=0),
    Column("finish_s", pa.float64(), "when its last token was there", low=0),
    Column("prompt_tokens", pa.int32(), "tokens of its prompt", low=1),
    Column("output_tokens", pa.int32(), "tokens it received", low=1),
    Column("drafts", pa.int32(), "rounds with at least one drafted token", nullable=True, low=0),
    Column("drafted_tokens", pa.int32(), "tokens drafted for it and verified", nullable=True, low=0),
    Column("accepted_tokens", pa.int32(), "of these, accepted; bonus excluded", nullable=True, low=0),
    Column("emission_s", pa.list_(pa.float64()), "when tokens arrived, one entry per arrival", nullable=True),
    Column("emitted", pa.list_(pa.int32()), "how many tokens arrived each time", nullable=True),
    Column("output_token_ids", pa.list_(pa.int32()), "the tokens it received", nullable=True),
)

STEPS = (
    Column("repeat", pa.int32(), "which repeat of the condition, from 0", low=0),
    Column("step", pa.int32(), "engine iteration; the draft steps of a round share its number", low=0),
    Column("operation", pa.string(), "what was done", choices=OPERATIONS),
    Column("model", pa.string(), "who computed: the verifier or a drafter, as the TraceSet names them"),
    Column("start_s", pa.float64(), "when it began", low=0),
    Column("seconds", pa.float64(), "how long it took on the run's clock; an iteration's host time included", low=0),
    Column("wall_s", pa.float64(), "how long it took on the wall clock", low=0),
    Column("sequences", pa.int32(), "sequences in a decode or draft step", low=0),
    Column("new_tokens", pa.int32(), "tokens that these had computed, drafted ones included; a sum", low=0),
    Column("context_tokens", pa.int32(), "tokens that these had in their caches before; a sum", low=0),
    Column("prefill_sequences", pa.int32(), "sequences that had prompt tokens computed", low=0),
    Column("prefill_tokens", pa.int32(), "prompt tokens computed; a sum", low=0),
    Column("prefill_context_tokens", pa.int32(), "prompt tokens of theirs that were cached before; a sum", low=0),
    Column("drafted_tokens", pa.int32(), "drafted tokens that were verified; a sum", nullable=True, low=0),
    Column("accepted_tokens", pa.int32(), "of these, accepted; bonus excluded", nullable=True, low=0),
    Column("emitted_tokens", pa.int32(), "tokens that requests received; a sum", low=0),
)
"""One row per timed forward pass, in order; the seconds of all rows of a repeat add up to its busy time."""

TABLES: dict[str, tuple[Column, ...]] = {"requests": REQUESTS, "steps": STEPS}
