"""Find the prices that a scenario asks for: measured, stated, observed, by roofline, or given in it."""

from __future__ import annotations

from typing import assert_never

from calibration.common.errors import CostError, did_you_mean
from calibration.common.plugins import make_plugin, need
from calibration.traces import Manifest, ModelInfo, TraceSet
from calibration.traces.manifest import CostConstants, FractionOfVerify, LinearCost
from calibration.traces.paradigms import one_shot
from simulator.pricing.costs import (
    DraftCost,
    DraftFraction,
    DraftPerRound,
    DraftPerStep,
    LinearStep,
    PluginStep,
    Prices,
    Sharded,
    StepCost,
)
from simulator.pricing.fitted import fit_step
from simulator.pricing.observed import ObservedPrefill, PromptTokens, fit_observed
from simulator.pricing.observed_drafting import Drafting, Verified, fit_drafting
from simulator.pricing.roofline import Operation, RooflineStep, roofline_step
from simulator.pricing.steps import EngineSteps, read_steps
from simulator.scenario.costs import Roofline
from simulator.scenario.scenario import DrafterCost, Measured, Observed, PluginCost, Scenario, Stated, VerifierCost


def make_prices(scenario: Scenario, traces: TraceSet) -> Prices:
    """Give the prices that `scenario` asks for; those it leaves out come from `traces`.

    Raises `CostError` where neither has them.
    """
    costs, manifest = scenario.costs, traces.manifest
    pricing = _Pricing(scenario, traces)
    prefill, verify = pricing.verifier()
    draft, draft_prefill = None, None
    if scenario.speculates and scenario.drafter is not None:
        draft, draft_prefill = pricing.drafter(costs.drafter, "drafter", scenario.drafter.name)
    overhead = costs.overhead_s
    if overhead is None:
        stated = isinstance(verify, LinearStep) and not isinstance(costs.verifier, LinearCost)
        overhead = manifest.costs.overhead_s if stated and manifest.costs is not None else 0.0
    engine = scenario.engine
    size = engine.tensor_parallel_size or 1
    if size > 1:
        prefill, verify = (_shard(step, size, engine.all_reduce_s or 0.0) for step in (prefill, verify))
    prices = Prices(prefill, verify, draft, overhead, tuple(sorted(engine.cudagraph_capture_sizes or ())))
    prices.draft_prefill = draft_prefill
    if scenario.speculates and scenario.routing is not None and scenario.routing.drafter is not None:
        own = costs.drafters or {}
        for name in scenario.routing.drafter.drafters:
            place = f"drafters.{name}" if name in own else "drafter"
            prices.by_drafter[name] = pricing.drafter(own.get(name, costs.drafter), place, name)[0]
    return prices


def _shard(step: StepCost, size: int, all_reduce_s: float) -> StepCost:
    if isinstance(step, RooflineStep) and step.tensor_parallel == size:
        return step  # it has the sharding in it
    if not isinstance(step, LinearStep):
        raise CostError(
            f"engine.tensor_parallel_size: must be 1 for measured costs, which hold for the devices they were taken "
            f"on, got {size}; give [costs.verifier] kind = 'linear'"
        )
    return Sharded(step, size, all_reduce_s)


class _Pricing:
    """Finds the prices of one scenario."""

    def __init__(self, scenario: Scenario, traces: TraceSet) -> None:
        self._scenario, self._costs, self._traces = scenario, scenario.costs, traces

    def verifier(self) -> tuple[StepCost, StepCost]:
        """Give the prices of (prefill, verify)."""
        traces, name = self._traces, self._traces.manifest.verifier.name
        choice = _resolve(self._costs.verifier, traces, name)
        if isinstance(choice, Observed):
            if self._costs.overhead_s:
                raise CostError(
                    "costs.overhead_s: must be left out for observed costs, whose steps contain it, "
                    f"got {self._costs.overhead_s}"
                )
            return fit_observed(*self._verified(choice))
        if isinstance(choice, Measured):
            return fit_step(traces.timings, name, "prefill"), fit_step(traces.timings, name, "verify")
        if isinstance(choice, Roofline):
            return _roofline(choice, "prefill"), _roofline(choice, "verify")
        if isinstance(choice, PluginCost):
            step_ = _from_outside(choice, "costs.verifier", traces.manifest.verifier)
            return step_, step_
        source = "scenario"
        if isinstance(choice, Stated):
            choice, source = _constants(traces.manifest).verifier, _constants(traces.manifest).source
        if isinstance(choice, FractionOfVerify):
            raise CostError(
                f"costs.verifier.kind: must be measured, stated, observed, roofline or linear, got '{choice.kind}'"
            )
        if not isinstance(choice, LinearCost):
            assert_never(choice)
        if choice.base_s + choice.per_token_s <= 0:
            raise CostError("costs.verifier: base_s or per_token_s must be above zero, got 0: time would stand still")
        step = LinearStep(choice, source)
        return step, step

    def _steps(self, choice: Observed, place: str) -> EngineSteps:
        return read_steps([self._scenario.locate(run) for run in choice.runs], f"costs.{place}.runs")

    def _verified(self, choice: Observed) -> Verified:
        info = self._traces.manifest.verifier
        return Verified(self._steps(choice, "verifier"), info.name, _head_share(info))

    def drafter(
        self, cost: DrafterCost | None, place: str, name: str
    ) -> tuple[DraftCost, ObservedPrefill | PromptTokens | None]:
        """Give the price of drafting by `name`, and of its own prefill where that is known."""
        traces, verifier = self._traces, self._costs.verifier
        if cost is None and isinstance(verifier, Observed):
            cost = verifier
        info = traces.manifest.drafter(name)
        choice, source = _resolve(cost, traces, name), "scenario"
        in_one = one_shot(info)
        if isinstance(choice, Observed):
            verified = self._verified(verifier) if isinstance(verifier, Observed) else None
            found = fit_drafting(self._steps(choice, place), name, in_one, verified)
            return _observed_draft(found, in_one), found.prefill
        if isinstance(choice, Measured):
            step = fit_step(traces.timings, name, "draft")
            return DraftPerRound(step, tokens=False) if in_one else DraftPerStep(step), None
        if isinstance(choice, Stated):
            constants = _constants(traces.manifest)
            source = constants.source
            if name not in constants.drafters:
                known = did_you_mean(name, constants.drafters)
                raise CostError(f"manifest.json: costs.drafters: no constants for drafter '{name}'{known}")
            choice = constants.drafters[name]
        if isinstance(choice, Roofline):
            if in_one:
                raise CostError(
                    f"costs.{place}.kind: must be measured, stated, linear or fraction_of_verify for '{name}', which "
                    "drafts in one step, got 'roofline'"
                )
            return DraftPerStep(_roofline(choice, "draft")), None
        if isinstance(choice, PluginCost):
            given = _from_outside(choice, f"costs.{place}", info)
            return DraftPerRound(given, tokens=True) if in_one else DraftPerStep(given), None
        if isinstance(choice, FractionOfVerify):
            return DraftFraction(choice, source), None
        if not isinstance(choice, LinearCost):
            assert_never(choice)
        linear = LinearStep(choice, source)
        return DraftPerRound(linear, tokens=True) if choice.charged == "per_round" else DraftPerStep(linear), None


def _from_outside(table: PluginCost, place: str, model: ModelInfo) -> PluginStep:
    made = make_plugin(table, place, CostError, model)
    need(made, ("step_seconds",), "a cost", table.name, place, CostError)
    return PluginStep(table.name, made, place)


def _roofline(choice: Roofline, operation: Operation) -> RooflineStep:
    options = choice.model_dump(exclude={"kind", "model", "device"})
    return roofline_step(choice.model, choice.device, operation=operation, **options)


def _observed_draft(found: Drafting, in_one: bool) -> DraftCost:
    if found.rounds:
        return DraftPerRound(found.step, tokens=True)
    return DraftPerRound(found.step, tokens=False) if in_one else DraftPerStep(found.step)


def _head_share(model: ModelInfo) -> float:
    """Give the FLOPs of the LM head over those of the layers, for one token: hidden size * vocabulary / parameters.

    Parameters without the embedding and the head. 0 where the shape is not known.
    """
    if model.vocabulary is None or model.hidden_size is None or not model.parameters_non_embedding:
        return 0.0
    return model.hidden_size * model.vocabulary / model.parameters_non_embedding


def _resolve(cost: VerifierCost | DrafterCost | None, traces: TraceSet, model: str) -> VerifierCost | DrafterCost:
    """Choose where a price left out comes from: timings first, then stated constants."""
    if cost is not None:
        return cost
    if model in traces.timings["model"].to_pylist() or traces.manifest.costs is None:
        return Measured(kind="measured")
    return Stated(kind="stated")


def _constants(manifest: Manifest) -> CostConstants:
    if manifest.costs is None:
        raise CostError("manifest.json: costs: the TraceSet states none; give [costs.verifier] kind = 'linear'")
    return manifest.costs
