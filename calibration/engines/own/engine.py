"""Our serving engine: continuous batching with speculative decoding, ragged acceptance and real KV caches.

An iteration computes what the scheduler planned (see `calibration.engines.own.scheduler`). A decode round:

1. *Draft.* Every request asks for the same number of tokens, also near its end, where some of them can no longer be
   received: the rule of the simulated engine, whose rounds these are.
2. *Verify.* One pass of the verifier over the last received token and the drafts of every request.
3. *Accept* drafts as long as they are the verifier's own choice, and the choice behind them (correction or bonus);
   both are cut where the request has received what it wants.
4. *Roll back.* Caches are cut to the text, less its last token.

Greedy decoding: the text is the verifier's own (Leviathan, Kalman and Matias 2023; Chen and others 2023).
"""

from __future__ import annotations

from collections.abc import Sequence

from calibration.common.errors import CalibrationError, did_you_mean
from calibration.common.version import paceline_version
from calibration.drafters.given import GivenDrafter
from calibration.engines.drive import DraftStep, EngineRequest, Operation, Step
from calibration.engines.own.cache import Kind, KvCache, make_cache
from calibration.engines.own.decoder import Decoder, Span
from calibration.engines.own.drafting import (
    Drafting,
    DraftLengths,
    ModelDrafting,
    ProposerDrafting,
    Range,
    model_of,
    prompt_groups,
)
from calibration.engines.own.scheduler import Chunk, Limits, Scheduler, Served
from calibration.measured.run import EngineInfo, Setting
from calibration.models.drafter import Drafter
from calibration.models.load import Verifier
from calibration.traces.surroundings import device_info


class OwnEngine:
    """A serving engine for `verifier` and, if any, a `drafter` built for it; see `calibration.engines.drive`.

    `draft_tokens`: as in `DraftLengths`. `kv`: ``paged`` (blocks of `block_size` tokens; no padding but in attention)
    or ``padded`` (a row per request; every step is padded to its longest request). The other settings are those of
    `calibration.engines.own.scheduler.Limits`. On the CPU it uses the threads that torch is set to; seconds of CPU in
    `DraftStep` are those of the calling thread, so that they are all of them only where torch has one.

    Raises:
        CalibrationError: settings that do not go together, a model that the engine cannot compute, or a drafter that
            is neither a causal LM nor a proposer of chains.
    """

    def __init__(
        self,
        verifier: Verifier,
        *,
        max_num_seqs: int,
        drafter: Drafter | None = None,
        draft_tokens: int | Sequence[Range] = 0,
        kv: Kind = "paged",
        block_size: int = 16,
        max_model_len: int = 2048,
        max_num_batched_tokens: int | None = None,
        enable_chunked_prefill: bool = False,
        long_prefill_token_threshold: int | None = None,
    ) -> None:
        self._lengths = DraftLengths(draft_tokens)
        if (drafter is None) != (self._lengths.longest == 0):
            got = "no drafter" if drafter is None else f"drafter '{drafter.name}'"
            rule = "must be above 0 somewhere exactly where there is a drafter"
            raise CalibrationError(f"engine: draft_tokens: {rule}, got {self._lengths} and {got}")
        if kv not in ("paged", "padded"):
            raise CalibrationError(f"engine: kv: not known, got '{kv}'{did_you_mean(kv, ('paged', 'padded'))}")
        if block_size < 1:
            raise CalibrationError(f"engine: block_size: must be at least 1, got {block_size}")
        limits = Limits(
            max_num_seqs,
            max_model_len,
            max_num_batched_tokens,
            enable_chunked_prefill,
            long_prefill_token_threshold,
            self._lengths.longest,
        )
        self.model = verifier.info.name
        self.device = device_info(verifier.device)
        self._kind: Kind = kv
        self._block_size = block_size
        self._scheduler = Scheduler(limits)
        self._capacity = -(-(max_model_len + self._lengths.longest) // 8) * 8
        self._verifier = Decoder(verifier.model, self.model, self._capacity)
        self._cache = self._new_cache(self._verifier)
        self._drafting = None if drafter is None else self._make_drafting(drafter)
        self._ids: set[int] = set()
        self.info = EngineInfo(name="paceline", version=paceline_version(), settings=self._settings(drafter))

    def _new_cache(self, decoder: Decoder) -> KvCache:
        rows = self._scheduler.limits.max_num_seqs
        return make_cache(
            self._kind, decoder.cache_shape, rows=rows, capacity=self._capacity, block_size=self._block_size
        )

    def _make_drafting(self, drafter: Drafter) -> Drafting:
        if isinstance(drafter, GivenDrafter):
            return ProposerDrafting(drafter)
        decoder = Decoder(model_of(drafter), drafter.name, self._capacity)
        shared = decoder.begins(self._verifier)
        return ModelDrafting(decoder, self._cache if shared else self._new_cache(decoder), shared=shared)

    def _settings(self, drafter: Drafter | None) -> dict[str, Setting]:
        limits = self._scheduler.limits
        found: dict[str, Setting | None] = {
            "max_num_seqs": limits.max_num_seqs,
            "max_model_len": limits.max_model_len,
            "max_num_batched_tokens": limits.max_num_batched_tokens,
            "enable_chunked_prefill": limits.enable_chunked_prefill,
            "long_prefill_token_threshold": limits.long_prefill_token_threshold,
            "kv": self._kind,
            "block_size": self._block_size if self._kind == "paged" else None,
            "dtype": str(self._verifier.dtype).removeprefix("torch."),
            "drafter": None if drafter is None else drafter.name,
            "draft_tokens": str(self._lengths),
        }
        return {name: value for name, value in found.items() if value is not None}

    # --- the protocol

    def submit(self, request: EngineRequest) -> None:
        """Take a request; it waits until a step has room for it. `CalibrationError` where it can never be served."""
        where, prompt = f"engine: request {request.request_id}", [int(token) for token in request.prompt_token_ids]
        if request.request_id in self._ids:
            raise CalibrationError(f"{where}: must have an id that no other request in the engine has")
        if odd := [token for token in prompt if not 0 <= token < self._verifier.vocabulary]:
            rule = f"token ids must lie in [0, {self._verifier.vocabulary - 1}]"
            raise CalibrationError(f"{where}: {rule}, got {odd[0]}")
        self._scheduler.submit(Served(request.request_id, len(prompt), request.output_tokens, prompt))
        self._ids.add(request.request_id)

    @property
    def busy(self) -> bool:
        """Whether a request is waiting or being served."""
        return self._scheduler.busy

    def step(self) -> Step:
        """Run one iteration; to be called only while `busy`."""
        chunks, decodes = self._scheduler.plan()
        live = sorted(self._scheduler.decoding, key=self._row) if decodes else []
        drafts, draft_steps = self._draft(live)
        context = sum(self._cache.length(request.request_id) for request in live)
        chosen = self._verify(live, drafts, chunks)

        received: dict[int, Sequence[int]] = {}
        accepted: dict[int, int] = {}
        for request, draft, own in zip(live, drafts, chosen[: len(live)], strict=True):
            received[request.request_id], accepted[request.request_id] = self._accept(request, draft, own)
        draft_steps += self._prefilled(chunks, chosen[len(live) :], received)
        self._retire()
        operation: Operation = "decode" if not chunks else "mixed" if live else "prefill"
        return Step(
            operation,
            received,
            sequences=len(live),
            new_tokens=len(live) + sum(len(draft) for draft in drafts),
            context_tokens=context,
            prefill_sequences=len(chunks),
            prefill_tokens=sum(chunk.tokens for chunk in chunks),
            prefill_context_tokens=sum(chunk.cached for chunk in chunks),
            drafted_tokens=None
            if self._drafting is None
            else {request.request_id: len(draft) for request, draft in zip(live, drafts, strict=True)},
            accepted_tokens=None if self._drafting is None else accepted,
            drafts=tuple(draft_steps),
        )

    def close(self) -> None:
        """Free the caches; nothing can be submitted or computed after it."""
        self._scheduler = Scheduler(self._scheduler.limits)
        self._cache.layers.clear()
        self._drafting = None

    # --- its parts

    def _row(self, request: Served) -> int:
        return self._cache.order(request.request_id)

    def _draft(self, live: Sequence[Served]) -> tuple[list[Sequence[int]], list[DraftStep]]:
        """Give the drafts of a round, empty ones where it has none, and what drafting took."""
        tokens = self._lengths.at(len(live)) if live else 0
        if self._drafting is None or tokens == 0:
            return [[] for _ in live], []
        return self._drafting.draft(live, tokens)

    def _verify(
        self, live: Sequence[Served], drafts: Sequence[Sequence[int]], chunks: Sequence[Chunk]
    ) -> list[list[int]]:
        """Run the verifier over drafts and prompts; give its own choices for each of `live`, then of `chunks`."""
        for chunk in chunks:
            if not chunk.cached:
                self._cache.open(chunk.request.request_id)
        decoding = [
            Span(request.request_id, [request.text[-1], *draft], 1 + len(draft))
            for request, draft in zip(live, drafts, strict=True)
        ]
        prompts = [Span(chunk.request.request_id, chunk.token_ids, int(chunk.whole)) for chunk in chunks]
        return self._verifier.choose([decoding, *prompt_groups(prompts, self._cache)], self._cache)

    def _accept(self, request: Served, draft: Sequence[int], own: Sequence[int]) -> tuple[Sequence[int], int]:
        """Let a request take what it can of a round; give what it received and how many of its drafts are in it."""
        agreed = 0
        while agreed < len(draft) and draft[agreed] == own[agreed]:
            agreed += 1
        before, new = len(request.text), own[: min(agreed + 1, request.left)]
        accepted = min(agreed, request.left)
        self._take(request, new)
        self._cache.truncate(request.request_id, len(request.text) - 1)
        if self._drafting is not None:
            self._drafting.settle(request, before + agreed)
        return new, accepted

    def _take(self, request: Served, tokens: Sequence[int]) -> None:
        request.text.extend(tokens)
        request.left -= len(tokens)

    def _prefilled(
        self, chunks: Sequence[Chunk], chosen: Sequence[Sequence[int]], received: dict[int, Sequence[int]]
    ) -> list[DraftStep]:
        """Note computed prompts and the first tokens that they gave; let the drafter read them too."""
        if not chunks:
            return []
        for chunk, first in zip(chunks, chosen, strict=True):
            if chunk.whole:
                received[chunk.request.request_id] = first
                self._take(chunk.request, first)
            self._scheduler.computed(chunk)
        return [] if self._drafting is None else self._drafting.prefill(chunks)

    def _retire(self) -> None:
        """Free what requests hold that have received everything."""
        for request in self._scheduler.retire():
            self._cache.close(request.request_id)
            if self._drafting is not None:
                self._drafting.close(request)
            self._ids.remove(request.request_id)
