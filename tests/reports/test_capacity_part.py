"""The part on capacity: its sentences follow from its numbers, and what is unknown is not shown."""

from __future__ import annotations

import dataclasses

import pytest
from capacity_made import about, made_capacity, made_policy

from analysis.capacity import CapacityFindings
from analysis.common.bootstrap import Estimate
from reports.page.document import Paragraph, Part, Table
from reports.questions.capacity import capacity_part


def tables(part: Part) -> list[Table]:
    return [block for block in part.blocks if isinstance(block, Table)]


def words(part: Part) -> str:
    return " ".join(block.text for block in part.blocks if isinstance(block, Paragraph))


def with_policies(**changes: object) -> CapacityFindings:
    found = made_capacity()
    return dataclasses.replace(
        found,
        policies=tuple(dataclasses.replace(policy, **changes) for policy in found.policies),  # type: ignore[arg-type]
    )


def test_the_answer_names_rate_ratio_objective_and_devices() -> None:
    part = capacity_part(made_capacity())
    for said in (
        "99% of requests with a TTFT of at most 500 ms and a TPOT of at most 40 ms",
        "3 (2.7\u20133.3) requests per second with \u2018four tokens\u2019",
        "1.5 (1.35\u20131.65) times what it carries without speculation",
        "A load of 40 requests per second needs 26 devices (30 to 50)",
    ):
        assert said in part.answer.text
    assert part.drawings[0].caption.endswith(
        "[simulated, costs roofline; n = 2,000 judged requests at the sustained rates]"
    )


def test_every_policy_has_a_row_and_every_point_is_in_the_data() -> None:
    part = capacity_part(made_capacity())
    main, bill = tables(part)
    assert [row[0] for row in main.rows] == ["no speculation", "four tokens"]
    assert main.rows[1][4] == "TTFT"
    assert bill.header == (
        "Policy",
        "Replicas for 40/s",
        "Devices for 40/s",
        "USD per million tokens",
        "Joules per output token",
        "kWh per million tokens",
    )
    # 3.6 MJ for a million tokens are 3.6 J for one and 1 kWh for all.
    assert bill.rows[1][4:] == ("3.6 (3.24\u20133.96)", "1 (0.9\u20131.1)")
    assert len(part.drawings[0].data) == 8
    assert {row["policy"] for row in part.drawings[0].data} == {"no speculation", "four tokens"}


def test_unknown_money_load_and_energy_are_not_shown() -> None:
    bare = dataclasses.replace(
        with_policies(needed=None, usd_per_million_output_tokens=None, joules_per_million_output_tokens=None),
        load_rps=None,
        usd_per_device_hour=None,
        energy_counts=None,
    )
    part = capacity_part(bare)
    assert len(tables(part)) == 1
    assert "Nothing is said of money: no price of a device was given." in words(part)
    assert "USD" not in words(part)
    assert "devices" not in part.answer.text


def test_a_difference_within_the_interval_is_called_none() -> None:
    found = made_capacity()
    same = dataclasses.replace(made_policy("four tokens", 2.1), ratio=about(1.05))
    part = capacity_part(dataclasses.replace(found, policies=(found.policies[0], same)))
    assert "cannot be told apart from no speculation (1.05 (0.945\u20131.16) times as much)" in part.answer.text


def test_an_objective_that_nobody_keeps_is_the_answer() -> None:
    part = capacity_part(with_policies(rate_rps=Estimate(0.0, 0.0, 0.0, 10), needed=None))
    assert part.answer.text.startswith("No policy keeps the objective")
    assert part.guidelines[0].text.startswith("Loosen the objective")


@pytest.mark.parametrize(
    ("changes", "lead"),
    [
        ({"stable": False}, "Run length."),
        ({"objective": dataclasses.replace(made_capacity().objective, source="assumed, as it is")}, "Objective."),
        ({"warnings": ("something was odd",)}, "Warning."),
    ],
)
def test_limits_tell_what_was_assumed_and_what_did_not_settle(changes: dict[str, object], lead: str) -> None:
    plain = {one.lead for one in capacity_part(made_capacity()).limits}
    told = {one.lead for one in capacity_part(dataclasses.replace(made_capacity(), **changes)).limits}  # type: ignore[arg-type]
    assert told - plain == {lead}
    assert "Prices." in plain  # 5% of the iterations were extrapolated
