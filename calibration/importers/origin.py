"""Where imported figures come from: what their user knows of the run, and the manifest that says so.

Step costs on the command line, for recordings that come without timings.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from calibration.common.errors import TraceError
from calibration.common.version import paceline_version
from calibration.traces import DecodingInfo, DeviceInfo, DrafterInfo, Manifest, ModelInfo, PromptSource
from calibration.traces.manifest import CostConstants, DrafterCost, FractionOfVerify, Grain, LinearCost
from calibration.traces.paradigms import paradigm_of

MATERIAL_SHARE = 0.02
"""Share of rounds without a draft from which on it must be known whose they are: it moves the tokens per round, and
with them the advice, by up to as much. What a last round reaches past the end of its output stays below."""


@dataclass(frozen=True)
class Origin:
    """What the user says about a run whose report does not tell it.

    `paradigm`: how the drafter drafts, in the field's word or the engine's name of the method (``ngram``, ``suffix``,
    ``eagle3``, ``draft_model`` ...), see `calibration.traces.paradigms`; lookups may propose less than asked, the
    others always propose.
    `domain`: of all requests; default: the name of each file. `temperature`: 0 is greedy; None: not known.
    """

    verifier: str = "unknown"
    drafter: str = "drafter"
    paradigm: str = "unknown"
    domain: str | None = None
    temperature: float | None = None
    device: str = "unknown"
    costs: CostConstants | None = None
    command: str = ""

    @property
    def looks_up(self) -> bool:
        """Say whether the drafter finds its drafts in text."""
        return paradigm_of(self.paradigm).looks_up

    @property
    def paradigm_known(self) -> bool:
        """Say whether it was told how the drafter drafts, in a word that is known."""
        return paradigm_of(self.paradigm).known

    @property
    def sees_tokens_alone(self) -> bool:
        """Say whether match bits determine the run lengths of the drafter."""
        facts = paradigm_of(self.paradigm)
        return facts.tokens_alone and not facts.looks_up

    def own_undrafted(self, share: float, place: str) -> float:
        """Give the part of `share`, of rounds without a draft, that is the drafter's own: of a lookup all of it.

        A model always proposes, so that the engine chose not to draft there. `TraceError` where the share matters and
        the paradigm is not told, or not known.
        """
        if self.looks_up:
            return share
        if share > MATERIAL_SHARE:
            self.must_be_told(f"{share:.1%} of rounds had no draft", place)
        return 0.0

    def must_be_told(self, what: str, place: str) -> None:
        """Refuse `what` was seen unless the paradigm says whose choice it was: the drafter's or the engine's."""
        if self.paradigm_known:
            return
        got = "" if self.paradigm == "unknown" else f", got the unknown '{self.paradigm}'"
        raise TraceError(
            f"{place}: {what}; whose choice that was decides the advice: give --paradigm ngram (or suffix ...) if "
            "the drafter found nothing there, --paradigm eagle3 (or draft_model, medusa, mtp ...) if the engine "
            f"switched drafting off, or the counts are not of the whole run{got}"
        )

    def domain_of(self, path: Path) -> str:
        """Give the domain of the requests of `path`."""
        return self.domain or path.stem

    def with_verifier(self, name: object) -> Origin:
        """Give this origin with the verifier that a report names, where the user did not name it."""
        return replace(self, verifier=name) if self.verifier == "unknown" and isinstance(name, str) and name else self

    def manifest(
        self,
        import_format: str,
        grain: Grain,
        *,
        longest_draft: int,
        prompts: Sequence[PromptSource],
        seed: int,
        unknown: Sequence[str],
        notes: Sequence[str],
    ) -> Manifest:
        """Give the manifest of an import that tells acceptance by `grain`, with drafts of up to `longest_draft`."""
        temperature = self.temperature or 0.0
        drafter = DrafterInfo(
            name=self.drafter,
            paradigm=self.paradigm,
            deterministic=self.looks_up,
            max_draft_tokens=longest_draft,
        )
        return Manifest(
            paceline_version=paceline_version(),
            kind="imported",
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            command=self.command,
            seed=seed,
            verifier=ModelInfo(name=self.verifier),
            drafters=(drafter,),
            decoding=DecodingInfo(mode="sampled" if temperature > 0 else "greedy", temperature=temperature),
            device=DeviceInfo(name=self.device, kind="unknown"),
            prompts=tuple(prompts),
            import_format=import_format,
            import_grain=grain,
            unknown=(*unknown, *self._not_told()),
            notes=tuple(notes),
            costs=self.costs,
        )

    def _not_told(self) -> list[str]:
        missing = ["confidences, entropies, overlap and rollouts: engines do not report them"]
        if self.costs is None:
            missing.append("step timings: not reported; prices must come from a cost model")
        else:
            missing.append("step timings: not reported; prices come from constants given by the user")
        if self.temperature is None:
            missing.append("temperature and top-p: not given; written down as greedy")
        elif self.temperature > 0:
            missing.append(
                "what other draws of the sampler would have accepted: run lengths hold those of this one run"
            )
        for what in ("verifier", "paradigm", "device"):
            if getattr(self, what) == "unknown":
                missing.append(f"{what}: not given")
        missing.append("model shapes and software versions")
        return missing


def prompt_source(path: Path, domain: str, requests: int) -> PromptSource:
    """Describe one imported file, with the sha256 of its bytes."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return PromptSource(name=path.name, sha256=digest, domain=domain, prompts=requests)


def cost_constants(
    verifier: str | None, drafters: tuple[str, ...], overhead: float, source: str
) -> CostConstants | None:
    """Read step costs as the command line states them; None without those of the verifier.

    `verifier` is BASE,TOKEN,CONTEXT in seconds, each of `drafters` NAME=BASE,TOKEN,CONTEXT[,per_round] or
    NAME=FRACTION; `click.UsageError` says which option is at fault.
    """
    if verifier is None:
        if drafters or overhead:
            raise click.UsageError("--drafter-cost and --overhead need --verifier-cost beside them")
        return None
    prices: dict[str, DrafterCost] = {}
    for text in drafters:
        name, found, numbers = text.partition("=")
        if not found:
            raise click.BadParameter(f"must be NAME=BASE,TOKEN,CONTEXT, got '{text}'", param_hint="--drafter-cost")
        prices[name] = _drafter_cost(numbers)
    return CostConstants(
        source=source, verifier=_linear(verifier, "--verifier-cost"), drafters=prices, overhead_s=overhead
    )


def _drafter_cost(text: str) -> DrafterCost:
    if "," not in text:
        return FractionOfVerify(fraction=_numbers(text, 1, "--drafter-cost")[0])
    charged = "per_round" if text.endswith(",per_round") else "per_step"
    return _linear(text.removesuffix(",per_round").removesuffix(",per_step"), "--drafter-cost", charged)


def _linear(text: str, option: str, charged: Any = "per_step") -> LinearCost:
    base, token, context = _numbers(text, 3, option)
    return LinearCost(base_s=base, per_token_s=token, per_context_token_s=context, charged=charged)


def _numbers(text: str, count: int, option: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise click.BadParameter(f"must be {count} number(s), got '{text}'", param_hint=option) from None
    if len(values) != count or min(values) < 0:
        raise click.BadParameter(f"must be {count} number(s) >= 0, got '{text}'", param_hint=option)
    return values
