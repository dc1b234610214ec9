"""Checks of settings: every fault in one error."""

from __future__ import annotations

from calibration.common.errors import CalibrationError


def refuse(where: str, *rules: tuple[bool, str]) -> None:
    """Raise one `CalibrationError` that names every broken rule; a rule is (is it kept, what to say where not)."""
    faults = [text for kept, text in rules if not kept]
    if faults:
        raise CalibrationError(f"{where}: {'; '.join(faults)}")


def whole(name: str, value: object, low: int = 1) -> tuple[bool, str]:
    """Give the rule that `value` is an integer of at least `low`."""
    kept = isinstance(value, int) and not isinstance(value, bool) and value >= low
    return kept, f"{name}: must be an integer >= {low}, got {value!r}"


def within(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> tuple[bool, str]:
    """Give the rule that `value` is a number in [low, high], or in (low, high] with `open_low`."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    kept = number and (low < value <= high if open_low else low <= value <= high)  # type: ignore[operator]
    return kept, f"{name}: must lie in {'(' if open_low else '['}{low:g}, {high:g}], got {value!r}"


def one_of(name: str, value: object, choices: tuple[str, ...]) -> tuple[bool, str]:
    """Give the rule that `value` is one of `choices`."""
    return value in choices, f"{name}: must be one of {', '.join(choices)}, got {value!r}"
