"""Step costs on the command line, for recordings that come without timings."""

from __future__ import annotations

from typing import Any

import click

from calibration.traces.manifest import CostConstants, DrafterCost, FractionOfVerify, LinearCost


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
