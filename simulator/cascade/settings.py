"""The tables of a cascade scenario: items, policy, hand-over, stages and objectives."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from calibration.common.settings import Count, Positive, Seconds, Table
from simulator.scenario.engine import EngineSettings
from simulator.scenario.fleet import Batching, ReplicaRouting
from simulator.scenario.inputs import InputFile
from simulator.scenario.scenario import Costs, DrafterChoice, TraceSource
from simulator.scenario.stopping import NoSpeculation, Stopping, spelled_out
from simulator.scenario.workload import ClosedLoop, GammaArrivals, PiecewiseArrivals, PoissonArrivals

CascadeWorkload = Annotated[
    ClosedLoop | PoissonArrivals | GammaArrivals | PiecewiseArrivals, Field(discriminator="kind")
]


class Items(Table):
    """The table of items: a CSV file, relative to the scenario file.

    A row per item and stage: item, domain, stage, correct (0..1), and as many more columns as it likes:
    ``item_prompt_tokens`` (or `prompt_tokens` here, for all of them), ``output_tokens`` (or that of each stage),
    ``cost`` in a unit of its own, and signals. Requests take the items in turn, as the workload says.
    """

    path: InputFile | None = None
    prompt_tokens: Count | None = None


class Always(Table):
    """Every request goes to `stage`, and to no other."""

    kind: Literal["always"]
    stage: str


class Threshold(Table):
    """Stages in order; a request stops at the first whose `signal` is at least `threshold` (or at most it).

    `threshold`: one number, or one for each stage but the last, which always answers.
    """

    kind: Literal["threshold"]
    signal: str = "confidence"
    threshold: float | Annotated[tuple[float, ...], Field(min_length=1, strict=False)]
    stop: Literal["at_least", "at_most"] = "at_least"


class Assigned(Table):
    """The stages that each item runs, from a CSV file with the columns item and stages: ``small;large``.

    The last of them answers. Any policy can be written so, as correctness and signals of an item do not change.
    """

    kind: Literal["assigned"]
    path: InputFile


Policy = Annotated[Always | Threshold | Assigned, Field(discriminator="kind")]


class Recompute(Table):
    """The next stage reads the prompt anew; what came before is discarded, and moving the text takes no time."""

    kind: Literal["recompute"] = "recompute"


class KvHandover(Table):
    """Keys and values of the prompt go to the next stage over a link, in place of its prefill.

    Seconds = bytes / bandwidth + latency; bytes = prompt tokens * the smaller ``bytes_per_token`` of the two stages.
    1e9 bytes a second are 1 GB/s. Every transfer has the whole link, and neither side's KV memory is held during it:
    optimistic on a link that is short of room. The next stage still computes one token, the prompt's last, as vLLM
    does for KV that comes from elsewhere: the first token of its answer needs it.

    Exact where both stages run the same weights over the layers they share (exits of one model, or one model under
    two policies): recomputing would give the same keys and values. Stages therefore name a ``format``, and others
    are refused. A deeper stage has layers that the shallower one never ran: with `hidden_bytes_per_token` the
    states at the shallower exit go along (added to the bytes), and the deeper one computes its own layers for the
    prompt. That is priced as a prefill of ceil(prompt * (1 - shared layers / its layers)) tokens behind the others,
    the same multiply-adds in the layers but an approximation of their time. What a drafter of the next stage would
    read of the prompt is left out.
    """

    kind: Literal["kv"]
    bandwidth_gb_s: Positive
    latency_s: Seconds = 0.0
    hidden_bytes_per_token: Positive | None = None


Handover = Annotated[Recompute | KvHandover, Field(discriminator="kind")]


class StageKv(Table):
    """Whose keys and values a stage has: `format` names the weights, of which it runs the first `layers`.

    `bytes_per_token`: 2 * layers * KV heads * head size * bytes of the dtype.
    """

    format: str
    layers: Count
    bytes_per_token: Positive


class Stage(Table):
    """One stage: `replicas` equal engines with prices of their own, which may speculate.

    Tables mean what they mean in a scenario. Of its TraceSet a stage that drafts nothing uses only the prices left
    out, and the memory of its device. `routing` chooses among its replicas. `usd_per_hour` is what one of them costs.
    """

    name: str
    replicas: Count = 1
    output_tokens: Count | None = None
    traces: TraceSource | None = None
    drafter: DrafterChoice | None = None
    stopping: Stopping = NoSpeculation()
    engine: EngineSettings = EngineSettings()
    costs: Costs = Costs()
    batching: Batching | None = None
    routing: ReplicaRouting | None = None
    kv: StageKv | None = None
    usd_per_hour: Positive | None = None

    @field_validator("stopping", mode="before")
    @classmethod
    def _plugin_by_name(cls, stopping: Any) -> Any:
        return spelled_out(stopping)


class AnswerObjectives(Table):
    """Objectives for every single answer, in ms after the request came, waiting at all stages included.

    `ttft_ms`: the first token of the final answer, `e2el_ms`: its last one.
    """

    ttft_ms: Positive | None = None
    e2el_ms: Positive | None = None
