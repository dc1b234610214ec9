"""Which questions the inputs can answer, their answers one by one, and why the others stay open.

The questions about one TraceSet: each gives findings, or raises a `PacelineError` that says what is lacking.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from analysis import Findings, study
from analysis.capacity import Objective, plan_capacity, study_scenarios
from analysis.cascade import CascadeFindings
from calibration.common.errors import PacelineError, ReportError
from calibration.common.progress import StageProgress
from calibration.traces import TraceSet
from reports.page.document import Part
from reports.page.inputs import Inputs
from simulator.results.result import RunResult
from simulator.scenario.scenario import Scenario

Step = Callable[[int, int], None]
Reply = tuple[Part, Any]


@dataclass(frozen=True)
class TraceQuestion:
    """A question about a TraceSet and the folder it was read from."""

    key: str
    title: str
    ask: Callable[[TraceSet, Path, Step], Reply]


def _size(traces: TraceSet, folder: Path, step: Step) -> Reply:
    from analysis.size import study_size
    from reports.questions.size import size_part

    findings = study_size(traces)
    return size_part(findings), findings


def _laws(traces: TraceSet, folder: Path, step: Step) -> Reply:
    """Laws of what the TraceSet has; learning curves, where it was distilled, lie beside it."""
    from analysis.laws.find import find_laws
    from reports.questions.laws import laws_part

    curves = folder / "recipe" / "curves.csv"
    findings = find_laws(family=traces, curves=curves if curves.is_file() else None, traces=traces)
    return laws_part(findings), findings


def _tokens(traces: TraceSet, folder: Path, step: Step) -> Reply:
    from analysis.tokens.study import study_tokens
    from reports.questions.tokens import tokens_part

    findings = study_tokens(traces)
    return tokens_part(findings), findings


def _knowledge(traces: TraceSet, folder: Path, step: Step) -> Reply:
    from analysis.knowledge import study_knowledge
    from reports.questions.knowledge import knowledge_part

    findings = study_knowledge(traces, progress=step)
    return knowledge_part(findings), findings


def _routing(traces: TraceSet, folder: Path, step: Step) -> Reply:
    from analysis.routing.study import study_routing
    from reports.questions.routing import routing_part

    findings = study_routing(traces, progress=step)
    return routing_part(findings), findings


QUESTIONS = (
    TraceQuestion("size", "Drafter size", _size),
    TraceQuestion("laws", "Scaling laws", _laws),
    TraceQuestion("tokens", "Acceptance token by token", _tokens),
    TraceQuestion("knowledge", "Generalist or specialists", _knowledge),
    TraceQuestion("routing", "Routing between drafters", _routing),
)
"""In the order of the report."""


T = TypeVar("T")


@dataclass(frozen=True)
class Options:
    """What a report is asked for beside its inputs; see `plan_capacity` for those of the capacity plan.

    ``requests`` of a run of the capacity plan: None lets the plan find a stable number.
    """

    template: str = "study"
    workers: int = 2
    load_rps: float | None = None
    price_per_hour: float | None = None
    objective: Objective | None = None
    requests: int | None = None


@dataclass(frozen=True)
class Answered:
    """One question answered: its part of the report, and the findings behind it."""

    key: str
    part: Part
    findings: Any


@dataclass(frozen=True)
class Unanswered:
    """One question that these inputs cannot answer, and why."""

    title: str
    reason: str


@dataclass(frozen=True)
class Answers:
    """Everything that was found, of what was made until ``created`` (ISO 8601; empty where nothing is dated).

    ``study`` is that of the first TraceSet, None without one.
    """

    created: str
    study: Findings | None
    answered: tuple[Answered, ...]
    unanswered: tuple[Unanswered, ...]


@dataclass(frozen=True)
class _Question:
    """A question about one input; ``ask`` gives the part and the findings, or raises a `PacelineError`."""

    key: str
    title: str
    ask: Callable[[Step], Reply]


def collect(inputs: Inputs, options: Options, progress: StageProgress | None = None) -> Answers:
    """Answer every question of the template that `inputs` have data for, one after the other.

    A question that its data cannot answer is named with the reason, never left out in silence. Raises
    `PacelineError` where a TraceSet cannot be studied at all: the report has nothing to stand on then.
    """
    tell = progress or (lambda name, done, total: None)
    studies = {}
    for name, traces in inputs.traces.items():
        title = f"study {name}" if len(inputs.traces) > 1 else "study"
        studies[name] = study(traces, workers=options.workers, progress=_named(tell, title))
    answered: list[Answered] = []
    unanswered: list[Unanswered] = []
    for question in _questions(inputs, studies, options, unanswered):
        heard = _Heard(tell, question.key)
        try:
            part, findings = question.ask(heard)
        except PacelineError as fault:
            unanswered.append(Unanswered(question.title, str(fault)))
        else:
            answered.append(Answered(question.key, part, findings))
        heard.end()
    first = next(iter(studies.values()), None)
    dates = [inputs.created, *(str(getattr(one.findings, "created", "")) for one in answered)]
    return Answers(max(dates), first, tuple(answered), tuple(unanswered))


def answers_of(given: Sequence[object], created: str | None, progress: Step) -> Answers:
    """Give the answers that findings from Python already are; the first study of a TraceSet leads.

    Several of one kind are told apart by their number. Raises `ReportError` for what is no findings.
    """
    studies = [one for one in given if isinstance(one, Findings)]
    first = studies[0] if studies else None
    kinds = [_part_of(one) for one in given if one is not first]
    answered, seen = [], dict[str, int]()
    for number, (one, (key, make)) in enumerate(zip((f for f in given if f is not first), kinds, strict=True)):
        progress(number, len(given))
        seen[key] = seen.get(key, 0) + 1
        again = f"{key}-{seen[key]}"
        part = _of(make(), again) if seen[key] > 1 else make()
        answered.append(Answered(again if seen[key] > 1 else key, part, None if isinstance(one, RunResult) else one))
    dates = [getattr(getattr(one, "provenance", one), "created", "") for one in given]
    dates += [one.summary["provenance"]["traces_created"] for one in given if isinstance(one, RunResult)]
    youngest = max((str(date) for date in dates if date), default="")
    moment = created or youngest or datetime.now(UTC).isoformat(timespec="seconds")
    return Answers(moment, first, tuple(answered), ())


def _part_of(findings: object) -> tuple[str, Callable[[], Part]]:
    """Give the key of a question and what makes its part; `ReportError` for what is no findings."""
    from analysis.capacity.findings import CapacityFindings
    from analysis.fidelity.table import Fidelity
    from analysis.knowledge.findings import KnowledgeFindings
    from analysis.laws.law import LawFindings
    from analysis.routing.findings import RoutingFindings
    from analysis.size.findings import SizeFindings
    from analysis.tokens.study import TokenFindings
    from analysis.tuning.findings import TuneFindings
    from reports.questions import (
        capacity,
        cascade,
        fidelity,
        knowledge,
        laws,
        routing,
        runs,
        size,
        study,
        tokens,
        tuning,
    )

    parts: list[tuple[type[Any], str, Callable[[Any], Part]]] = [
        (Findings, "study", lambda one: study.study_part(one, "another")),
        (SizeFindings, "size", size.size_part),
        (LawFindings, "laws", laws.laws_part),
        (TokenFindings, "tokens", tokens.tokens_part),
        (KnowledgeFindings, "knowledge", knowledge.knowledge_part),
        (RoutingFindings, "routing", routing.routing_part),
        (CascadeFindings, "cascade", cascade.cascade_part),
        (TuneFindings, "tuning", tuning.tuning_part),
        (CapacityFindings, "capacity", capacity.capacity_part),
        (Fidelity, "fidelity", fidelity.fidelity_part),
        (RunResult, "run", lambda one: runs.run_part(one, one.scenario.name)),
    ]
    for kind, key, make in parts:
        if isinstance(findings, kind):
            return key, partial(make, findings)
    known = ", ".join(kind.__name__ for kind, _, _ in parts)
    raise ReportError(
        f"write_report: findings must be one of {known}, or a list of them, got {type(findings).__name__}"
    )


class _Heard:
    """Tells the steps of one question, and that it has ended, however many it had."""

    def __init__(self, tell: StageProgress, name: str) -> None:
        self._tell, self._name, self._total = tell, name, 1
        tell(name, 0, 1)

    def __call__(self, done: int, total: int) -> None:
        self._total = total
        self._tell(self._name, done, total)

    def end(self) -> None:
        self._tell(self._name, self._total, self._total)


def _named(tell: StageProgress, name: str) -> Step:
    return lambda done, total: tell(name, done, total)


def _questions(
    inputs: Inputs, studies: Mapping[str, Findings], options: Options, unanswered: list[Unanswered]
) -> list[_Question]:
    """List what is to be asked, in the order of the report; what has no data at all goes to `unanswered`."""
    found = _about_studies(studies)
    if options.template != "capacity":
        found += _about_traces(inputs, unanswered)
    found += _about_results(inputs)
    if options.template != "capacity":
        found += _about_policies(inputs, unanswered)
    capacity = _about_capacity(inputs, studies, options)
    if not capacity:
        reason = "there is no TraceSet and no scenario among the inputs"
        unanswered.append(Unanswered("Capacity plan", reason))
    return [*capacity, *found] if options.template == "capacity" else [*found, *capacity]


def _about_studies(studies: Mapping[str, Findings]) -> list[_Question]:
    """The studies of all TraceSets but the first, which the report itself is about."""
    from reports.questions.study import study_part

    def ask(name: str) -> Callable[[Step], Reply]:
        return lambda step: (study_part(studies[name], name), studies[name])

    return [_Question(f"study-{name}", f"Study of {name}", ask(name)) for name in list(studies)[1:]]


def _each(kind: str, title: str, given: Mapping[str, T], ask: Callable[[str, T, Step], Reply]) -> list[_Question]:
    """Ask the same of every one of `given`; where they are several, each answer and figure bears its name."""
    several = len(given) > 1
    found = []
    for name, value in given.items():

        def asked(step: Step, name: str = name, value: T = value) -> Reply:
            part, findings = ask(name, value, step)
            return (_of(part, name) if several else part), findings

        found.append(
            _Question(f"{kind}-{name}" if several else kind, f"{title}, {name}" if several else title, asked)
        )
    return found


def _of(part: Part, name: str) -> Part:
    """Give `part` with the name of its input in its title, its answer and the names of its figures."""
    drawings = tuple(replace(one, name=f"{name}-{one.name}") for one in part.drawings)
    answer = replace(part.answer, text=f"{name}: {part.answer.text}")
    return replace(part, title=f"{part.title}: {name}", answer=answer, drawings=drawings)


def _about_traces(inputs: Inputs, unanswered: list[Unanswered]) -> list[_Question]:
    found = []
    for question in QUESTIONS:
        if not inputs.traces:
            unanswered.append(Unanswered(question.title, "there is no TraceSet among the inputs"))

        def ask(name: str, traces: TraceSet, step: Step, one: TraceQuestion = question) -> Reply:
            return one.ask(traces, inputs.folders[name], step)

        found += _each(question.key, question.title, inputs.traces, ask)
    return found


def _about_results(inputs: Inputs) -> list[_Question]:
    from reports.questions.runs import comparison_part, replications_part, run_part

    found = _each("run", "Run", inputs.runs, lambda name, run, step: (run_part(run, name), None))
    found += _each(
        "replications",
        "Replications",
        inputs.replications,
        lambda name, several, step: (replications_part(several, name), None),
    )
    found += _each(
        "comparison",
        "Comparison",
        inputs.comparisons,
        lambda name, several, step: (comparison_part(several, name), None),
    )
    return found


def _about_policies(inputs: Inputs, unanswered: list[Unanswered]) -> list[_Question]:
    """Tuning, cascades and fidelity: what was given; of the last two else what comes with the package."""
    from reports.questions.fidelity import fidelity_part
    from reports.questions.tuning import tuning_part

    if not inputs.tuned:
        unanswered.append(Unanswered("Tuned policies", "there is no result of paceline tune among the inputs"))
    found = _each(
        "tuning", "Tuned policies", inputs.tuned, lambda name, one, step: (tuning_part(one.findings), one.findings)
    )
    found += _each("cascade", "Cascade", inputs.cascades, lambda name, one, step: _cascade(one))
    if not inputs.cascades:
        found.append(_Question("cascade", "Cascade", _bundled_cascade))
    title = "Predicted against measured"
    found += _each("fidelity", title, inputs.fidelities, lambda name, one, step: (fidelity_part(one), one))
    if not inputs.fidelities:
        found.append(_Question("fidelity", title, _bundled_fidelity))
    return found


def _cascade(findings: CascadeFindings) -> Reply:
    from reports.questions.cascade import cascade_part

    return cascade_part(findings), findings


def _bundled_cascade(step: Step) -> Reply:
    """Study the quality table that comes with the package: its stages are exits, which can go on from each other."""
    from analysis.cascade import bundled_tables, read_quality_table, study_cascade
    from reports.questions.cascade import cascade_part

    names = bundled_tables()
    if not names:
        raise ReportError("no table of graded answers was given, and none comes with the package")
    both = []
    for done, continued in enumerate((True, False)):
        step(done, 2)
        both.append(study_cascade(read_quality_table(names[0], continued=continued)))
    step(2, 2)
    return cascade_part(*both), both[0]


def _bundled_fidelity(step: Step) -> Reply:
    """Predict the measured runs that come with the package; in this process, they are short."""
    from analysis.fidelity.measured import bundled_runs
    from analysis.fidelity.validate import validate
    from reports.questions.fidelity import fidelity_part

    found = validate(bundled_runs(), workers=1, progress=step)
    return fidelity_part(found), found


def _about_capacity(inputs: Inputs, studies: Mapping[str, Findings], options: Options) -> list[_Question]:
    """Plan for the scenarios of results, those on the same TraceSet together; else for what the study recommends."""

    def ask(name: str, given: tuple[Sequence[Scenario], TraceSet | None], step: Step) -> Reply:
        from reports.questions.capacity import capacity_part

        scenarios, traces = given
        findings = plan_capacity(
            scenarios[0],
            others=scenarios[1:],
            slo=options.objective,
            load_rps=options.load_rps,
            price_per_hour=options.price_per_hour,
            requests=options.requests,
            traces=traces,
            workers=options.workers,
            progress=step,
        )
        return capacity_part(findings), findings

    return _each("capacity", "Capacity plan", _to_plan(inputs, studies), ask)


def _to_plan(
    inputs: Inputs, studies: Mapping[str, Findings]
) -> dict[str, tuple[Sequence[Scenario], TraceSet | None]]:
    """Give the scenarios to plan for, by the name of their TraceSet, with that where it is not theirs to read."""
    groups: dict[str, list[Scenario]] = {}
    for scenario in inputs.scenarios.values():
        source = scenario.traces
        place = source.bundled or str(scenario.locate(source.path or "").resolve())
        groups.setdefault(place, []).append(scenario)
    if groups:
        short = [Path(place).name for place in groups]
        names = short if len(set(short)) == len(short) else [f"plan-{i}" for i in range(1, len(groups) + 1)]
        return {name: (group, None) for name, group in zip(names, groups.values(), strict=True)}
    return {
        name: (study_scenarios(findings, inputs.traces[name]), inputs.traces[name])
        for name, findings in list(studies.items())[:1]
    }
