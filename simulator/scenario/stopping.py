"""The ``[stopping]`` table of a scenario: one section for each policy, told apart by its name."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from calibration.common.plugins import PluginTable, by_name
from calibration.common.settings import Count, Fraction, Inside, Natural, Table

"""What the name of a third party's policy begins with."""


class NoSpeculation(Table):
    """One verified token per slot and iteration."""

    policy: Literal["none"] = "none"


class FixedLength(Table):
    """The same draft length for every slot in every round; 0 drafts nothing."""

    policy: Literal["fixed"]
    draft_tokens: Natural


class OracleLength(Table):
    """As many tokens as will be accepted."""

    policy: Literal["oracle"]


class OracleCost(Table):
    """As many of the tokens that will be accepted as bring the most tokens per second in this round."""

    policy: Literal["oracle_cost"]


class ByBatch(Table):
    """A draft length for each range of batch sizes: vLLM's `num_speculative_tokens_per_batch_size`.

    `table` holds ``[first, last, K]``, ranges in order, without gaps, from 1 on; larger batches take the last K.
    """

    policy: Literal["by_batch"]
    table: Annotated[
        tuple[Annotated[tuple[int, int, int], Field(strict=False)], ...], Field(min_length=1, strict=False)
    ]

    @field_validator("table")
    @classmethod
    def _in_order(cls, table: tuple[tuple[int, int, int], ...]) -> tuple[tuple[int, int, int], ...]:
        expected = 1
        for entry in table:
            first, last, draft_tokens = entry
            if first != expected:
                raise ValueError(f"ranges must follow each other from 1 on: expected one from {expected}")
            if last < first or draft_tokens < 0:
                raise ValueError(f"each entry must be [first, last >= first, K >= 0], not {list(entry)}")
            expected = last + 1
        return table


class Heuristic(Table):
    """transformers' schedule: two tokens more where all matched, else one less, from `start_tokens` on.

    20 is today's `num_assistant_tokens`; releases in which this schedule was the default started from 5.
    """

    policy: Literal["heuristic"]
    start_tokens: Count = 20
    max_draft_tokens: Count = 64

    @model_validator(mode="after")
    def _start_fits(self) -> Self:
        if self.start_tokens > self.max_draft_tokens:
            raise ValueError(f"start_tokens must be at most max_draft_tokens = {self.max_draft_tokens}")
        return self


class Confidence(Table):
    """Stop after a token of which the drafter is less sure than `threshold`; transformers' default is 0.4."""

    policy: Literal["confidence"]
    threshold: Fraction = 0.4
    max_draft_tokens: Count = 20


class AdaEDL(Table):
    """Stop after a token where 1 - sqrt(gamma * entropy) falls below a threshold that follows the acceptance rate."""

    policy: Literal["adaedl"]
    threshold: Fraction = 0.6
    gamma: Annotated[float, Field(gt=0)] = 0.2
    target_acceptance: Fraction = 0.9
    step: Annotated[float, Field(ge=0)] = 0.01
    acceptance_decay: Fraction = 0.5
    threshold_decay: Fraction = 0.9
    max_draft_tokens: Count = 20


class SpecDecPP(Table):
    """SpecDec++: stop when a rejection among the drafted tokens is more likely than `threshold`.

    `coefficients` of (1, logit of the confidence, entropy) predict acceptance; left out, they are fitted.
    """

    policy: Literal["specdec++"]
    threshold: Inside = 0.3
    min_draft_tokens: Count = 2
    max_draft_tokens: Count = 20
    coefficients: Annotated[tuple[float, float, float], Field(strict=False)] | None = None

    @model_validator(mode="after")
    def _bounds_fit(self) -> Self:
        if self.min_draft_tokens > self.max_draft_tokens:
            raise ValueError(f"min_draft_tokens must be at most max_draft_tokens = {self.max_draft_tokens}")
        return self


class Tier(Table):
    """What SGLang's adaptive steps choose from, for batches from this size on."""

    candidate_steps: Annotated[tuple[Natural, ...], Field(min_length=1, strict=False)]
    up_hysteresis: float = 0.0
    down_hysteresis: float = -0.25
    ceiling_coeff: Annotated[float, Field(ge=0)] = 0.0


def _tiers() -> dict[str, Tier]:
    """SGLang's own table."""
    return {
        "1": Tier(candidate_steps=(1, 3, 5, 7)),
        "8": Tier(candidate_steps=(0, 1, 3), down_hysteresis=0.0),
        "32": Tier(candidate_steps=(0, 1), down_hysteresis=0.0),
        "64": Tier(candidate_steps=(0,), down_hysteresis=0.0),
    }


class Learned(Table):
    """Draft on while what the next tokens are forecast to gain pays for their time.

    The forecast reads confidence and entropy of the draft, and the request's own past: how the drafter fared there,
    above all where the same text stood before.
    """

    policy: Literal["learned"]
    max_draft_tokens: Count = 8


class MovingAverage(Table):
    """SGLang's adaptive steps: one moving average of accepted tokens for each tier of batch sizes.

    The keys of `tiers` are the smallest batch sizes they are meant for; `initial_steps` is `speculative_num_steps`.
    """

    policy: Literal["moving_average"]
    initial_steps: Natural = 3
    ema_alpha: Annotated[float, Field(gt=0, le=1)] = 0.2
    warmup_batches: Natural = 10
    update_interval: Count = 5
    tiers: Annotated[dict[str, Tier], Field(min_length=1)] = Field(default_factory=_tiers)

    @field_validator("tiers")
    @classmethod
    def _keys_are_sizes(cls, tiers: dict[str, Tier]) -> dict[str, Tier]:
        for key in tiers:
            if not key.isdecimal() or int(key) < 1:
                raise ValueError(f"keys must be batch sizes from 1 on, not '{key}'")
        return tiers


class Estimated(Table):
    """What online estimates of acceptance share: a start, how fast the past fades, and the longest draft."""

    max_draft_tokens: Count = 8
    start_acceptance: Inside = 0.7
    decay: Inside = 0.95


class Goodput(Estimated):
    """SmartSpec / TurboSpec: the one draft length that promises the most tokens per second.

    `probe_rounds` > 0 drafts one token after so many rounds without a draft, to hear again how it fares.
    """

    policy: Literal["goodput"]
    probe_rounds: Natural = 0


class PerRequest(Estimated):
    """For each request the draft length that promises the most tokens per second at its own acceptance rate."""

    policy: Literal["per_request"]


class Budget(Estimated):
    """A verification budget for the whole batch, given to the tokens that most probably survive.

    `estimate` is where probabilities come from: ``acceptance`` so far of each request, before anything is drafted; or
    ``confidence`` in the drafted tokens, after all of `max_draft_tokens` were drafted (vLLM's adaptive verification).
    `tokens_per_request` fixes the budget; without it the budget is the one that promises most tokens per second.
    """

    policy: Literal["budget"]
    estimate: Literal["acceptance", "confidence"] = "acceptance"
    tokens_per_request: Annotated[float, Field(ge=0)] | None = None
    coefficients: Annotated[tuple[float, float, float], Field(strict=False)] | None = None


class ChainShape(Table):
    """One branch of `depth` nodes."""

    kind: Literal["chain"]
    depth: Count


class BranchingShape(Table):
    """Every node has the `branching` likeliest children, down to `depth`."""

    kind: Literal["k_ary"]
    branching: Count
    depth: Count


class PathsShape(Table):
    """Nodes by their paths of child ranks (0 is the drafter's first choice), as Medusa's choices."""

    kind: Literal["paths"]
    paths: Annotated[
        tuple[Annotated[tuple[Natural, ...], Field(min_length=1, strict=False)], ...],
        Field(min_length=1, strict=False),
    ]


class ParentsShape(Table):
    """Nodes by parent (index of an earlier node, -1 for the root) and rank among its children."""

    kind: Literal["parents"]
    parents: Annotated[tuple[Annotated[int, Field(ge=-1)], ...], Field(min_length=1, strict=False)]
    ranks: Annotated[tuple[Natural, ...], Field(min_length=1, strict=False)]


class SequoiaShape(Table):
    """The tree of `nodes` nodes, at most `depth` deep, that Sequoia's programme finds.

    `acceptance` by rank of the child; left out, the frequency of each rank in the recording.
    """

    kind: Literal["sequoia"]
    nodes: Count
    depth: Count
    acceptance: Annotated[tuple[Fraction, ...], Field(min_length=1, strict=False)] | None = None


class DynamicShape(Table):
    """EAGLE-2's dynamic tree: `top_k` children of the `top_k` best nodes a level, best `total_tokens` nodes kept."""

    kind: Literal["dynamic"]
    total_tokens: Count = 60
    depth: Count = 6
    top_k: Count = 10


Shape = Annotated[
    ChainShape | BranchingShape | PathsShape | ParentsShape | SequoiaShape | DynamicShape, Field(discriminator="kind")
]


class TreeDraft(Table):
    """A tree of drafted tokens in every round."""

    policy: Literal["tree"]
    shape: Shape


class Plugin(PluginTable):
    """A policy from outside, by the name of its entry point; written ``policy = "plugin:name"``."""

    group: ClassVar[str] = "paceline.stopping"
    policy: Literal["plugin"]


Stopping = Annotated[
    NoSpeculation
    | FixedLength
    | OracleLength
    | OracleCost
    | ByBatch
    | Heuristic
    | Confidence
    | AdaEDL
    | SpecDecPP
    | Learned
    | MovingAverage
    | Goodput
    | PerRequest
    | Budget
    | TreeDraft
    | Plugin,
    Field(discriminator="policy"),
    by_name("policy"),
]
