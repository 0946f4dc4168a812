"""When Redemption waits, acts and ends. Contract: redemptions.md 3; docs/two-step.md."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from decimal import Decimal
from functools import partial
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import pytest
from temporalio.client import WorkflowExecutionStatus, WorkflowUpdateFailedError
from temporalio.exceptions import ApplicationError
from temporalio.testing import WorkflowEnvironment
from temporalio.worker import UnsandboxedWorkflowRunner, Worker
from temporalio.workflow import Info

from domain.ids import new_id
from tests.workflows import redemption_scenarios
from tests.workflows.hold_scenarios import until_seen
from tests.workflows.record import HISTORIES
from tests.workflows.redemption_scenarios import DAY, SCENARIOS, Till
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
        ("redeems_not_by_a_typo", ["reserve", "expire"], COMPLETED, "EXPIRED"),
        (
            "redeems_nothing_when_cancelled_after_a_fault",
            ["reserve", "cancel: sold out", "find", BY_AN_OPERATOR],
            CANCELED,
            None,
        ),
        ("redeems_nothing_when_cancelled_while_it_looks", ["find", BY_AN_OPERATOR], CANCELED, None),
        ("redeems_nothing_when_cancelled_in_an_outage", ["reserve", *["expire at once"] * 4], CANCELED, None),
        ("redeems_nothing_after_faults_at_its_end", ["find", *["expire", "find"] * 4, "expire"], COMPLETED, "EXPIRED"),
        ("redeems_nothing_after_faults_at_a_look", [*["find"] * 4, "expire"], COMPLETED, "EXPIRED"),
        (
            "redeems_nothing_after_faults_of_a_cancel",
            ["find", *[BY_AN_OPERATOR, "find"] * 2, BY_AN_OPERATOR],
            CANCELED,
            None,
        ),
        ("redeems_nothing_that_is_gone", ["reserve", "expire"], COMPLETED, "NONE"),
        ("redeems_nothing_that_is_gone_when_cancelled", ["reserve", BY_AN_OPERATOR, "find"], CANCELED, None),
        ("redeems_nothing_that_is_gone_when_confirmed", ["reserve", "confirm", "find"], COMPLETED, "NONE"),
        ("redeems_nothing_that_was_settled_by_others", ["reserve", "confirm", "find"], COMPLETED, "EXPIRED"),
        ("redeems_what_was_confirmed_in_a_lost_attempt", ["reserve", "confirm", "find"], COMPLETED, "COMPLETED"),
        ("redeems_what_is_made_while_it_looks", ["find", "reserve", "find", "expire"], COMPLETED, "EXPIRED"),
        ("redeems_not_after_a_fault_of_a_call", ["reserve", "confirm", "find", "expire"], COMPLETED, "EXPIRED"),
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
        ("redeems_nothing_that_is_gone_when_confirmed", "not_found"),
        ("redeems_nothing_that_was_settled_by_others", "redemption_not_pending"),
        ("redeems_what_was_confirmed_in_a_lost_attempt", "service_unavailable"),
        ("redeems_not_after_a_fault_of_a_call", "service_unavailable"),
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


@pytest.mark.parametrize(
    ("signal", "sent"),
    [
        ("confirm", [{"amout": "60"}]),
        ("confirm", [{"amount": "60", "note": "x"}]),
        ("confirm", [{"amount": 60}]),
        ("confirm", [{"amount": None}]),
        ("confirm", [{"amount": ""}]),
        ("confirm", [{"quantity": True}]),
        ("confirm", [{"quantity": "1"}]),
        ("confirm", [{"quantity": 0}]),
        ("confirm", [{"quantity": 1.0}]),
        ("confirm", ["60"]),
        ("confirm", [60]),
        ("confirm", [True]),
        ("confirm", [["60"]]),
        ("confirm", [{"amount": "60"}, {"amount": "70"}]),
        ("cancel", [5]),
        ("cancel", [{"reason": "x"}]),
        ("cancel", [""]),
        ("cancel", ["x" * 501]),
        ("cancel", ["sold\0out"]),
        ("cancel", ["sold", "out"]),
        ("expire_now", ["please"]),
        ("confrim", []),
        ("canecl", ["sold out"]),
    ],
)
async def test_what_is_not_understood_changes_nothing_and_the_operator_sees_why(
    env: WorkflowEnvironment, signal: str, sent: list[Any]
) -> None:
    played = await redemption_scenarios.told(env, signal, *sent)

    assert played.till.steps == ["reserve", "expire"]
    assert f"Signal \\'{signal}\\' was refused: " in played.page


@pytest.mark.parametrize(
    ("signal", "sent", "step"),
    [
        ("confirm", [None], "confirm"),
        ("confirm", [{}], "confirm"),
        ("confirm", [{"quantity": 1}], "confirm"),
        ("cancel", [None], BY_AN_OPERATOR),
        ("cancel", ["x" * 500], f"cancel: {'x' * 500}"),
        ("expire_now", [None], "expire at once"),
    ],
)
async def test_what_is_understood(env: WorkflowEnvironment, signal: str, sent: list[Any], step: str) -> None:
    played = await redemption_scenarios.told(env, signal, *sent)

    assert played.till.steps == ["reserve", step]


async def test_an_order_that_can_never_succeed_is_shown_and_keeps_nobody_waiting(env: WorkflowEnvironment) -> None:
    played = await SCENARIOS["redeems_nothing_when_cancelled_after_a_fault"](env)

    assert "Redemption **CANCELED** of 100." in played.page
    assert "Last order, cancel, failed: DataError: no such thing." in played.page
    assert played.till.seconds() == [0] * 4


@pytest.mark.parametrize(
    ("scenario", "step"),
    [
        ("redeems_nothing_after_faults_at_its_end", "expire"),
        ("redeems_nothing_after_faults_at_a_look", "find"),
        ("redeems_nothing_after_faults_of_a_cancel", BY_AN_OPERATOR),
    ],
)
async def test_what_nobody_ordered_is_repeated_after_longer_and_longer_pauses(
    env: WorkflowEnvironment, scenario: str, step: str
) -> None:
    played = await SCENARIOS[scenario](env)

    at = [second for name, second in zip(played.till.steps, played.till.seconds(), strict=True) if name == step]
    pauses = [after - before for before, after in pairwise(at)]
    assert pauses == [2**n for n in range(len(pauses))]


async def test_an_order_for_another_redemption_is_refused(env: WorkflowEnvironment) -> None:
    till = Till(env)
    async with redemption_scenarios.serving(till):
        await till.reserve()
        other, stranger = replace(till, redemption_id=new_id()), replace(till, organization_id=new_id())
        for asking in (other, stranger):
            for call in (asking.reserve, asking.confirm, asking.cancel, asking.reverse):
                with pytest.raises(WorkflowUpdateFailedError) as refused:
                    await call(of=till)
                assert isinstance(refused.value.cause, ApplicationError)
                assert refused.value.cause.type == "another_redemption"
        played = await redemption_scenarios.ended(till)

    assert played.till.steps == ["reserve", "expire"]


async def test_a_suggested_new_run_waits_for_the_step_under_way_without_looking(env: WorkflowEnvironment) -> None:
    suggested = False
    till = Till(env, gates={"confirm": asyncio.Event()})
    with patch.object(Info, "is_continue_as_new_suggested", lambda _: suggested):
        async with redemption_scenarios.serving(till, workflow_runner=UnsandboxedWorkflowRunner()):
            await till.reserve()
            asking = asyncio.create_task(till.confirm())
            await till.reached["confirm"].wait()
            suggested = True
            await till.handle.signal("confirm", "a typo")
            await until_seen(till.handle, "WORKFLOW_EXECUTION_SIGNALED")
            till.gates["confirm"].set()
            await asking
            played = await redemption_scenarios.ended(till)

    assert (played.status, played.result) == (COMPLETED, "COMPLETED")
    assert played.till.steps == ["reserve", "confirm"]


async def test_nothing_is_forgotten_when_it_continues_as_new(env: WorkflowEnvironment) -> None:
    played = await SCENARIOS["redeems_in_a_new_run"](env)

    assert played.status == WorkflowExecutionStatus.CONTINUED_AS_NEW
    assert played.till.steps == ["reserve", "find", "expire"]
    assert played.till.seconds()[-1] == DAY_S


def test_every_path_is_recorded() -> None:
    """tests/workflows/test_event_processing.py replays whatever is recorded."""
    assert {path.name.partition(".")[0] for path in HISTORIES.glob("*.json")} >= set(SCENARIOS)
