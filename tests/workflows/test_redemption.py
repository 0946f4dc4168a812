"""When Redemption waits, acts and ends. Contract: redemptions.md 3; docs/two-step.md."""

from collections.abc import AsyncIterator
from decimal import Decimal
from functools import partial

import pytest
from temporalio.client import WorkflowExecutionStatus
from temporalio.testing import WorkflowEnvironment
from temporalio.worker import Worker

from tests.workflows import redemption_scenarios
from tests.workflows.record import HISTORIES
from tests.workflows.redemption_scenarios import DAY, SCENARIOS
from tests.workflows.scenarios import time_skipping

DAY_S = round(DAY.total_seconds())
COMPLETED, CANCELED = WorkflowExecutionStatus.COMPLETED, WorkflowExecutionStatus.CANCELED
BY_AN_OPERATOR = "cancel: canceled by an operator"


@pytest.fixture(scope="module")
async def env() -> AsyncIterator[WorkflowEnvironment]:
    async with time_skipping() as env:
        yield env


@pytest.mark.parametrize(
    ("scenario", "steps", "status", "result"),
    [
        ("redeems_when_confirmed", ["reserve", "confirm"], COMPLETED, "COMPLETED"),
        ("redeems_a_part", ["reserve", "confirm"], COMPLETED, "COMPLETED"),
        ("redeems_nothing_when_canceled", ["reserve", "cancel: changed my mind"], COMPLETED, "CANCELED"),
        ("redeems_nothing_when_due", ["reserve", "expire"], COMPLETED, "EXPIRED"),
        ("redeems_by_signal", ["reserve", "confirm"], COMPLETED, "COMPLETED"),
        ("redeems_a_part_by_signal", ["reserve", "confirm"], COMPLETED, "COMPLETED"),
        ("redeems_nothing_by_signal", ["reserve", "cancel: sold out"], COMPLETED, "CANCELED"),
        ("redeems_nothing_by_a_signal_without_reason", ["reserve", BY_AN_OPERATOR], COMPLETED, "CANCELED"),
        ("redeems_nothing_when_timed_out_by_signal", ["reserve", "expire at once"], COMPLETED, "EXPIRED"),
        ("redeems_not_what_is_refused_by_signal", ["reserve", "confirm", "find", "expire"], COMPLETED, "EXPIRED"),
        ("redeems_nothing_after_an_outage_at_its_end", ["reserve", *["expire"] * 4], COMPLETED, "EXPIRED"),
        ("redeems_nothing_when_cancelled", ["reserve", BY_AN_OPERATOR], CANCELED, None),
        ("redeems_nothing_when_cancelled_while_it_reserves", ["reserve", BY_AN_OPERATOR], CANCELED, None),
        ("redeems_although_cancelled_while_it_confirms", ["reserve", "confirm"], CANCELED, None),
        ("redeems_although_cancelled_while_it_confirms_by_signal", ["reserve", "confirm"], CANCELED, None),
        ("redeems_nothing_when_cancelled_while_it_expires", ["reserve", "expire at once"], CANCELED, None),
        ("redeems_nothing_when_refused", ["reserve"], COMPLETED, "NONE"),
        ("redeems_what_was_made_before_with_the_key", ["reserve", "find", "expire"], COMPLETED, "EXPIRED"),
        ("redeems_what_was_made_in_a_lost_attempt", ["reserve", "find", "expire"], COMPLETED, "EXPIRED"),
        ("redeems_not_what_is_refused", ["reserve", "confirm", "expire"], COMPLETED, "EXPIRED"),
        ("redeems_once_when_asked_twice", ["reserve", "reserve", "expire"], COMPLETED, "EXPIRED"),
        ("redeems_nothing_without_a_reservation", ["find"], COMPLETED, "NONE"),
        ("redeems_nothing_after_its_workflow_was_lost", ["find", "expire"], COMPLETED, "EXPIRED"),
        ("redeems_after_its_workflow_was_lost", ["confirm"], COMPLETED, "COMPLETED"),
        ("redeems_and_is_reversed_later", ["reserve", "confirm", "reverse"], COMPLETED, "FULLY_REVERSED"),
    ],
)
@pytest.mark.parametrize("cached", [True, False], ids=["", "evicted at every step"])
async def test_a_redemption(
    env: WorkflowEnvironment,
    monkeypatch: pytest.MonkeyPatch,
    scenario: str,
    steps: list[str],
    status: WorkflowExecutionStatus,
    result: str | None,
    cached: bool,
) -> None:
    if not cached:
        monkeypatch.setattr(redemption_scenarios, "Worker", partial(Worker, max_cached_workflows=0))

    played = await SCENARIOS[scenario](env)

    assert played.till.steps == steps
    assert (played.status, played.result) == (status, result)


async def test_it_expires_when_it_is_due_and_not_before(env: WorkflowEnvironment) -> None:
    played = await SCENARIOS["redeems_nothing_when_due"](env)

    assert played.till.seconds() == [0, DAY_S]


@pytest.mark.parametrize("scenario", ["redeems_a_part", "redeems_a_part_by_signal"])
async def test_a_smaller_amount_reaches_the_step(env: WorkflowEnvironment, scenario: str) -> None:
    played = await SCENARIOS[scenario](env)

    assert played.till.state is not None
    assert played.till.state.amount == Decimal(60)


@pytest.mark.parametrize(
    ("scenario", "code"),
    [
        ("redeems_nothing_when_refused", "insufficient_balance"),
        ("redeems_what_was_made_before_with_the_key", "idempotency_conflict"),
        ("redeems_not_what_is_refused", "bad_request"),
    ],
)
async def test_a_refusal_reaches_the_caller_as_it_was(env: WorkflowEnvironment, scenario: str, code: str) -> None:
    played = await SCENARIOS[scenario](env)

    assert played.refused == code


@pytest.mark.parametrize(
    ("scenario", "step", "then", "result"),
    [
        ("redeems_what_was_made_without_an_answer", "reserve", ["find", "expire"], "EXPIRED"),
        ("redeems_what_was_confirmed_without_an_answer", "confirm", ["find"], "COMPLETED"),
    ],
)
async def test_what_was_done_without_an_answer_is_found(
    env: WorkflowEnvironment, scenario: str, step: str, then: list[str], result: str
) -> None:
    """The database was away until the caller had given up; what it knows afterwards is what counts."""
    played = await SCENARIOS[scenario](env)

    assert played.refused == "service_unavailable"
    assert played.till.steps[-len(then) :] == then
    assert set(played.till.steps[: -len(then)]) == {"reserve", step}
    assert played.result == result


async def test_of_several_orders_at_once_one_wins(env: WorkflowEnvironment) -> None:
    played = await SCENARIOS["redeems_or_not_when_all_come_at_once"](env)

    assert played.till.state is not None
    assert played.result == played.till.state.status != "PENDING"
    assert played.status == COMPLETED


async def test_an_operator_sees_how_it_stands_and_why_an_order_was_refused(env: WorkflowEnvironment) -> None:
    played = await SCENARIOS["redeems_not_what_is_refused_by_signal"](env)

    assert "Redemption **EXPIRED** of 100." in played.page
    assert "Last order, confirm, was refused: participant is SUSPENDED." in played.page
    for signal in ("confirm", "cancel", "expire_now"):
        assert f'name: "{signal}"' in played.page


async def test_nothing_is_forgotten_when_it_continues_as_new(env: WorkflowEnvironment) -> None:
    played = await SCENARIOS["redeems_in_a_new_run"](env)

    assert played.status == WorkflowExecutionStatus.CONTINUED_AS_NEW
    assert played.till.steps == ["reserve", "find", "expire"]
    assert played.till.seconds()[-1] == DAY_S


def test_every_path_is_recorded() -> None:
    """tests/workflows/test_event_processing.py replays whatever is recorded."""
    assert {path.name.partition(".")[0] for path in HISTORIES.glob("*.json")} >= set(SCENARIOS)
