"""What an OpenVINO GenAI pipeline computes in its next step: its documented scheduling, kept in account beside it.

From outside, a step shows which requests received tokens, and how many requests were scheduled. Which prompt tokens
it computed, and how many tokens it drafted, follows from the rules of the engine (openvino.genai 2026.4,
``continuous_batching/scheduler.hpp``, ``prompt_lookup`` and ``speculative_decoding``), which were checked against it:

- ``dynamic_split_fuse``: all requests that decode, in the order of their arrival, then prompts in that order, each
  cut to what is left of ``max_num_batched_tokens``. ``max_num_seqs`` is not looked at.
- else: if a whole prompt fits, only prompts, in the order of their arrival, up to the first that does not fit into
  ``max_num_batched_tokens`` or would decode beside ``max_num_seqs`` others; else all that decode.
- Prompt lookup: the earliest occurrence of the longest suffix of ``max_ngram_size`` down to 1 tokens, as in
  `calibration.proposers.lookup`; never more than the request can still receive less one. The drafts of a request are
  filled up to ``num_assistant_tokens`` with padding that is verified and never accepted, so that a request
  always costs ``num_assistant_tokens + 1`` tokens, also where nothing matches.
- Draft model: min(``num_assistant_tokens``, what the request can still receive less one), without padding.
- The step that computes the last prompt token gives the first token; nothing is drafted for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from calibration.common.errors import CalibrationError
from calibration.proposers.lookup import NgramIndex
from calibration.proposers.protocol import one_of, refuse, whole

Mode = Literal["plain", "prompt-lookup", "draft-model"]
Numerics = Literal["exact", "engine"]
BLOCK_TOKENS = 32
"""Tokens of a KV block on a CPU."""


@dataclass(frozen=True)
class OpenVinoSettings:
    """Settings of the engine; names are those of its ``SchedulerConfig`` and ``GenerationConfig``.

    `num_assistant_tokens` is for both kinds of speculation, `max_ngram_size` for prompt lookup. The KV memory holds
    `num_kv_blocks` blocks of 32 tokens from the beginning on. `threads`: of inference and of the sampler.

    `numerics`: ``engine`` leaves everything to the engine, which rounds activations to 8 bits: a text that is
    verified in another batch of tokens then turns elsewhere sooner or later (6 of 8 requests within 96 tokens).
    ``exact`` computes in float32, and speculation gives the text of a plain run, token by token (8 of 8); steps take
    1.5 to 2.5 times as long.
    """

    mode: Mode = "plain"
    num_assistant_tokens: int | None = None
    max_ngram_size: int | None = None
    max_num_batched_tokens: int = 256
    max_num_seqs: int = 256
    num_kv_blocks: int = 64
    dynamic_split_fuse: bool = True
    numerics: Numerics = "exact"
    threads: int = 1

    def __post_init__(self) -> None:
        """Refuse settings that cannot be, all faults in one `CalibrationError`."""
        fixed = ("max_num_batched_tokens", "max_num_seqs", "num_kv_blocks", "threads")
        rules = [whole(name, getattr(self, name)) for name in fixed]
        rules.append(one_of("mode", self.mode, ("plain", "prompt-lookup", "draft-model")))
        rules.append(one_of("numerics", self.numerics, ("exact", "engine")))
        for name, wanted in (
            ("num_assistant_tokens", self.mode != "plain"),
            ("max_ngram_size", self.mode == "prompt-lookup"),
        ):
            value = getattr(self, name)
            if wanted:
                rules.append(whole(name, value))
            else:
                rules.append((value is None, f"{name}: must be left out in mode {self.mode}, got {value!r}"))
        text = f"dynamic_split_fuse: must be true in mode {self.mode}: the engine (2026.4) drafts a second time for"
        text += " requests that sit out a prefill step, and fails"
        rules.append((self.dynamic_split_fuse or self.mode == "plain", text))
        if not self.dynamic_split_fuse and all(kept for kept, _ in rules):
            text = f"max_num_seqs: must be <= max_num_batched_tokens = {self.max_num_batched_tokens} without"
            text += f" dynamic_split_fuse, got {self.max_num_seqs}"
            rules.append((self.max_num_seqs <= self.max_num_batched_tokens, text))
        refuse("openvino", *rules)

    @property
    def draft_tokens(self) -> int:
        """Most tokens that are drafted for a request in a step."""
        return self.num_assistant_tokens or 0


@dataclass
class Account:
    """A request in the engine: what of its prompt is computed, and what it received.

    `index` holds its prompt, and then its text, where drafts are looked up there.
    """

    request_id: int
    prompt: Sequence[int]
    output_tokens: int
    index: NgramIndex | None = None
    computed: int = 0
    received: list[int] = field(default_factory=list)

    @property
    def decoding(self) -> bool:
        """Whether its prompt is computed."""
        return bool(self.received)

    @property
    def cached(self) -> int:
        """Tokens of it in the KV memory: all but the last one received."""
        return self.computed + max(len(self.received) - 1, 0)

    @property
    def left(self) -> int:
        """Tokens that it is still to receive."""
        return self.output_tokens - len(self.received)

    def take(self, tokens: Sequence[int]) -> None:
        """Note what it received."""
        if self.index is not None:
            self.index.extend(tokens)
        self.received += tokens


class Decode(NamedTuple):
    """A request that decodes: how many tokens are computed for it, and how many of them were drafted.

    `proposal`: the drafted tokens, where they are known.
    """

    account: Account
    new_tokens: int
    drafted: int
    proposal: tuple[int, ...] | None


class Chunk(NamedTuple):
    """A part of a prompt that is computed."""

    account: Account
    tokens: int

    @property
    def last(self) -> bool:
        """Whether it ends the prompt."""
        return self.account.computed + self.tokens == len(self.account.prompt)


class Plan(NamedTuple):
    """What a step computes."""

    decodes: tuple[Decode, ...]
    chunks: tuple[Chunk, ...]


def plan_step(accounts: Sequence[Account], settings: OpenVinoSettings) -> Plan:
    """Give what the engine computes next for `accounts`, which stand in the order of their arrival.

    `CalibrationError` where the engine would do what is not to be seen from outside: preempt a request, cut a draft,
    or compute a prompt in parts beside a draft model.
    """
    plan = _fused(accounts, settings) if settings.dynamic_split_fuse else _separate(accounts, settings)
    blocks = {id(account): _blocks(account.cached) for account in accounts}
    for decode in plan.decodes:
        blocks[id(decode.account)] = _blocks(decode.account.cached + decode.new_tokens)
    for chunk in plan.chunks:
        blocks[id(chunk.account)] = _blocks(chunk.account.cached + chunk.tokens)
    if sum(blocks.values()) > settings.num_kv_blocks:
        rule = "must hold all requests in service, or the engine preempts some unseen"
        raise CalibrationError(
            f"openvino: num_kv_blocks: {rule}, got {settings.num_kv_blocks} of {sum(blocks.values())}"
        )
    return plan


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK_TOKENS)


def _fused(accounts: Sequence[Account], settings: OpenVinoSettings) -> Plan:
    decodes = _decodes(accounts, settings)
    room = settings.max_num_batched_tokens - sum(decode.new_tokens for decode in decodes)
    chunks = []
    for account in accounts:
        if account.decoding or room == 0:
            continue
        tokens = min(room, len(account.prompt) - account.computed)
        chunk = Chunk(account, tokens)
        if settings.mode == "draft-model" and not (chunk.last and account.computed == 0):
            rule = "must hold every prompt whole beside all drafts with a draft model"
            raise CalibrationError(f"openvino: max_num_batched_tokens: {rule}, got {settings.max_num_batched_tokens}")
        chunks.append(chunk)
        room -= tokens
    return Plan(decodes, tuple(chunks))


def _separate(accounts: Sequence[Account], settings: OpenVinoSettings) -> Plan:
    running = sum(account.decoding for account in accounts)
    room = settings.max_num_batched_tokens
    chunks = []
    for account in accounts:
        if account.decoding:
            continue
        if running >= settings.max_num_seqs or len(account.prompt) > room:
            break
        chunks.append(Chunk(account, len(account.prompt)))
        running, room = running + 1, room - len(account.prompt)
    return Plan((), tuple(chunks)) if chunks else Plan(_decodes(accounts, settings), ())


def _decodes(accounts: Sequence[Account], settings: OpenVinoSettings) -> tuple[Decode, ...]:
    """Give who decodes: the first to come, while the batch has room."""
    room, found = settings.max_num_batched_tokens, []
    for account in accounts:
        if not account.decoding or room == 0:
            continue
        decode = _decode(account, settings)
        if decode.new_tokens > room:
            rule = "must hold a token and its drafts for every request that decodes"
            raise CalibrationError(f"openvino: max_num_batched_tokens: {rule}, got {settings.max_num_batched_tokens}")
        found.append(decode)
        room -= decode.new_tokens
    return tuple(found)


def _decode(account: Account, settings: OpenVinoSettings) -> Decode:
    most = min(settings.draft_tokens, account.left - 1)
    if account.index is None:
        return Decode(account, most + 1, most, None)
    proposal = tuple(account.index.propose(most))
    return Decode(account, settings.draft_tokens + 1, len(proposal), proposal)
