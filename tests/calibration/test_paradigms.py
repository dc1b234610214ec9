"""Facts about paradigms: one record each, the names of engines, and which drafters bring weights of their own."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import TypeAdapter

from calibration.drafters.info import DrafterSettings
from calibration.drafters.kinds import AnyDrafter
from calibration.traces import DrafterInfo
from calibration.traces.paradigms import PARADIGMS, one_shot, own_models, paradigm_of


def kinds(of: type[DrafterSettings] = DrafterSettings) -> set[str]:
    found = {of.paradigm} if "paradigm" in vars(of) else set()
    return found.union(*(kinds(one) for one in of.__subclasses__()))


def drafter(paradigm: str, parameters: int | None = 100, name: str = "d", **settings: Any) -> DrafterInfo:
    return DrafterInfo(name=name, paradigm=paradigm, deterministic=False, parameters=parameters, settings=settings)


def test_every_kind_of_drafter_has_a_record() -> None:
    TypeAdapter(AnyDrafter)
    assert kinds() - set(PARADIGMS) == set()


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("n-gram", "ngram"),
        ("NGRAM", "ngram"),
        ("ngram_gpu", "ngram"),
        ("ngram-map-k", "ngram"),
        ("prompt_lookup", "prompt-lookup"),
        ("suffix_decoding", "suffix"),
        ("draft_model", "draft-model"),
        ("EAGLE3", "eagle3"),
        ("deepseek_mtp", "mtp"),
    ],
)
def test_names_that_engines_use(name: str, same: str) -> None:
    found, wanted = paradigm_of(name), PARADIGMS[same]
    assert (found.looks_up, found.family, found.one_shot, found.known) == (
        wanted.looks_up,
        wanted.family,
        wanted.one_shot,
        True,
    )


def test_an_unknown_paradigm_is_taken_for_a_model() -> None:
    found = paradigm_of("telepathy")
    assert (found.known, found.looks_up, found.one_shot, found.own_weights, found.family) == (
        False,
        False,
        False,
        True,
        None,
    )


@pytest.mark.parametrize(
    ("info", "names"),
    [
        (drafter("prompt-lookup", 0), []),
        (drafter("early-exit"), []),
        (drafter("nested-exits"), []),
        (drafter("nested-exits", recipe={"steps": 10}), ["d"]),
        (drafter("standalone"), ["d"]),
        (drafter("telepathy"), ["d"]),
        (drafter("windowed", drafter={"paradigm": "early-exit", "layers": 24}), []),
        (drafter("trimmed", drafter={"paradigm": "layer-skip", "first": 3}), []),
        (drafter("windowed", drafter={"paradigm": "distilled"}), ["d"]),
        (drafter("windowed", drafter={"paradigm": "nested-exits", "recipe": {}}), ["d"]),
        (drafter("merged"), ["d"]),  # an older recording that does not say of what
    ],
)
def test_what_brings_weights_of_its_own(info: DrafterInfo, names: list[str]) -> None:
    assert [model.name for model in own_models(info)] == names


def test_a_pair_brings_what_its_parts_bring() -> None:
    def part(*given: Any, **named: Any) -> dict[str, Any]:
        return drafter(*given, **named).model_dump(mode="json", exclude_none=True)

    lookup, exit_, student = part("suffix", 0), part("early-exit", 70), part("distilled", 30, name="student")
    for paradigm in ("ngram-before-model", "merged", "retrieval-fused"):
        assert own_models(drafter(paradigm, first=lookup, second=exit_)) == []
        (found,) = own_models(drafter(paradigm, first=lookup, second=student))
        assert (found.name, found.parameters) == ("student", 30)
    deep = part("merged", 100, first=exit_, second=student)
    assert [one.name for one in own_models(drafter("merged", first=deep, second=lookup))] == ["student"]


def test_what_drafts_in_one_step() -> None:
    assert one_shot(drafter("medusa"))
    assert one_shot(drafter("dflash"))
    assert one_shot(DrafterInfo(name="d", paradigm="mine", deterministic=True, layers=0, parameters=0))
    assert not one_shot(drafter("eagle3"))
    assert not one_shot(drafter("mine"))
