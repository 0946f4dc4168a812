"""When Hold and HoldEnds wait, act and end. Contract: holders.md 6.8; docs/upkeep.md."""

from collections.abc import AsyncIterator
from functools import partial

import pytest
from temporalio.client import WorkflowExecutionStatus
from temporalio.testing import WorkflowEnvironment
from temporalio.worker import Worker

from tests.workflows import hold_scenarios
from tests.workflows.hold_scenarios import SCENARIOS, WEEK
from tests.workflows.record import HISTORIES
from tests.workflows.scenarios import time_skipping

WEEK_S = round(WEEK.total_seconds())
COMPLETED, CANCELED = WorkflowExecutionStatus.COMPLETED, WorkflowExecutionStatus.CANCELED


@pytest.fixture(scope="module")
async def env() -> AsyncIterator[WorkflowEnvironment]:
    async with time_skipping() as env:
        yield env


@pytest.mark.parametrize(
    ("scenario", "steps", "status", "result"),
    [
        ("holds_until_due", ["reserve", "end"], COMPLETED, "EXPIRED"),
        ("holds_until_released_by_signal", ["reserve", "release"], COMPLETED, "RELEASED"),
        ("holds_until_forfeited_by_signal", ["reserve", "forfeit"], COMPLETED, "FORFEITED"),
        ("holds_and_finds_nothing_at_the_end", ["reserve", "end"], COMPLETED, "SETTLED"),
        ("holds_until_told_to_look", ["reserve", "find"], COMPLETED, "SETTLED"),
        ("holds_on_after_a_look", ["reserve", "find", "end"], COMPLETED, "EXPIRED"),
        ("holds_until_cancelled", ["reserve", "release"], CANCELED, None),
        ("holds_and_is_cancelled_while_it_reserves", ["reserve", "release"], CANCELED, None),
        ("holds_and_is_cancelled_while_it_releases", ["reserve", "release"], CANCELED, None),
        ("holds_nothing_when_refused", ["reserve"], COMPLETED, "NONE"),
        ("holds_what_was_made_in_a_lost_attempt", ["reserve", "find", "end"], COMPLETED, "EXPIRED"),
        ("holds_once_when_asked_twice", ["reserve", "reserve", "end"], COMPLETED, "EXPIRED"),
        ("holds_nothing_without_a_reservation", ["find"], COMPLETED, "NONE"),
        ("holds_on_after_its_workflow_was_lost", ["find", "end"], COMPLETED, "EXPIRED"),
        ("holds_for_long_and_looks_now_and_then", ["find", "find", "find", "end"], COMPLETED, "EXPIRED"),
    ],
)
@pytest.mark.parametrize("cached", [True, False], ids=["", "evicted at every step"])
async def test_a_hold(
    env: WorkflowEnvironment,
    monkeypatch: pytest.MonkeyPatch,
    scenario: str,
    steps: list[str],
    status: WorkflowExecutionStatus,
    result: str | None,
    cached: bool,
) -> None:
    if not cached:
        monkeypatch.setattr(hold_scenarios, "Worker", partial(Worker, max_cached_workflows=0))

    played = await SCENARIOS[scenario](env)

    assert played.bank.steps == steps
    assert (played.status, played.result) == (status, result)


async def test_a_hold_ends_when_it_is_due_and_not_before(env: WorkflowEnvironment) -> None:
    played = await SCENARIOS["holds_until_due"](env)

    assert played.bank.seconds() == [0, WEEK_S]


async def test_a_hold_sleeps_thirty_days_at_most(env: WorkflowEnvironment) -> None:
    played = await SCENARIOS["holds_for_long_and_looks_now_and_then"](env)

    assert [round(second / 86_400) for second in played.bank.seconds()] == [0, 30, 60, 70]


async def test_a_refusal_reaches_the_caller_as_it_was(env: WorkflowEnvironment) -> None:
    played = await SCENARIOS["holds_nothing_when_refused"](env)

    assert played.refused == "insufficient_balance"


async def test_a_hold_that_was_made_without_an_answer_is_found_and_carried(env: WorkflowEnvironment) -> None:
    """The database was away until the caller had given up; what it knows afterwards is what counts."""
    played = await SCENARIOS["holds_what_was_made_without_an_answer"](env)

    assert played.refused == "service_unavailable"
    assert set(played.bank.steps[:-2]) == {"reserve"}
    assert played.bank.steps[-2:] == ["find", "end"]
    assert played.result == "EXPIRED"


async def test_nothing_is_forgotten_when_it_continues_as_new(env: WorkflowEnvironment) -> None:
    played = await SCENARIOS["holds_on_in_a_new_run"](env)

    assert played.status == WorkflowExecutionStatus.CONTINUED_AS_NEW
    assert played.bank.steps == ["reserve", "find", "end"]
    assert played.bank.seconds()[-1] == WEEK_S


async def test_a_program_without_holds_is_looked_at_for_an_idle_minute(env: WorkflowEnvironment) -> None:
    played = await SCENARIOS["ends_holds_and_is_gone_after_an_idle_minute"](env)

    assert played.bank.seconds() == [0]
    assert played.status == COMPLETED


async def test_a_program_sleeps_until_its_next_end(env: WorkflowEnvironment) -> None:
    """It is told which end it slept for, so that a clock that is behind doesn't make it wait."""
    played = await SCENARIOS["ends_holds_when_they_fall_due"](env)

    assert played.bank.seconds() == [0, 30, 30 + 36 * 3_600]
    assert played.bank.dues[0] is None
    slept_for = [due for due in played.bank.dues[1:] if due is not None]
    assert [round((due - played.bank.at[0]).total_seconds()) for due in slept_for] == [30, 30 + 36 * 3_600]


async def test_a_program_sleeps_thirty_days_at_most(env: WorkflowEnvironment) -> None:
    """It looks in between, and only at the end is it told which end it slept for."""
    played = await SCENARIOS["ends_holds_far_ahead_and_looks_now_and_then"](env)

    assert [round(second / 86_400) for second in played.bank.seconds()] == [0, 30, 60, 70]
    assert [due is not None for due in played.bank.dues] == [False, False, False, True]
    assert played.status == COMPLETED


async def test_a_program_goes_on_at_once_while_more_is_due(env: WorkflowEnvironment) -> None:
    played = await SCENARIOS["ends_holds_at_once_while_there_are_more"](env)

    assert played.bank.seconds() == [0, 0]


async def test_an_operator_ends_one_hold_of_a_program(env: WorkflowEnvironment) -> None:
    played = await SCENARIOS["ends_holds_by_order"](env)

    assert played.bank.steps.count("forfeit") == 1
    assert played.bank.state is not None
    assert played.bank.state.status == "FORFEITED"


async def test_cancelling_waits_for_the_batch_under_way(env: WorkflowEnvironment) -> None:
    played = await SCENARIOS["ends_holds_until_cancelled"](env)

    assert played.bank.steps == ["end due"]
    assert played.status == CANCELED


def test_every_path_is_recorded() -> None:
    """tests/workflows/test_event_processing.py replays whatever is recorded."""
    assert {path.name.partition(".")[0] for path in HISTORIES.glob("*.json")} >= set(SCENARIOS)
