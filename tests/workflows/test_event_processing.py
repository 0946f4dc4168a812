"""When EventProcessing drains, sleeps and ends. Contract: rules-and-events.md 7.6; docs/decisions/0005-wakes.md."""

from collections.abc import AsyncIterator
from datetime import timedelta

import pytest
from temporalio.client import WorkflowHistory
from temporalio.testing import WorkflowEnvironment
from temporalio.worker import Replayer, UnsandboxedWorkflowRunner
from temporalio.workflow import Info

from activities.events import DrainReport
from domain.ids import new_id
from tests.workflows.record import HISTORIES
from tests.workflows.scenarios import SCENARIOS, SOME, play, serving, time_skipping
from worker import WORKFLOWS
from workflows.converter import DATA_CONVERTER

IDLE_S = 60


@pytest.fixture(scope="module")
async def env() -> AsyncIterator[WorkflowEnvironment]:
    async with time_skipping() as env:
        yield env


def whole_seconds(span: timedelta) -> int:
    return round(span.total_seconds())


async def test_it_drains_once_and_ends_after_an_idle_minute(env: WorkflowEnvironment) -> None:
    run = await play(env, "drains_once_and_ends_after_an_idle_minute")

    assert run.drains.seconds() == [0]
    assert whole_seconds(run.lasted) == IDLE_S


async def test_a_wake_during_a_drain_is_answered_by_exactly_one_more(env: WorkflowEnvironment) -> None:
    run = await play(env, "drains_again_when_woken_during_a_drain")

    assert run.drains.seconds() == [0, 0]
    assert whole_seconds(run.lasted) == IDLE_S


async def test_it_sleeps_until_the_next_event_falls_due_however_long(env: WorkflowEnvironment) -> None:
    run = await play(env, "drains_again_when_the_next_event_falls_due")

    assert run.drains.seconds() == [0, 30, 30 + 36 * 3_600]
    assert whole_seconds(run.lasted) == 30 + 36 * 3_600 + IDLE_S


async def test_it_drains_again_at_once_when_more_is_due(env: WorkflowEnvironment) -> None:
    run = await play(env, "drains_again_at_once_when_more_is_due")

    assert run.drains.seconds() == [0, 0, 0]


async def test_a_drain_that_fails_is_repeated_until_it_works(env: WorkflowEnvironment) -> None:
    run = await play(env, "repeats_a_drain_that_failed")

    assert len(run.drains.at) == 3
    assert whole_seconds(run.lasted) <= IDLE_S + 2


async def test_pause_and_resume_are_carried_out_before_the_next_drain(env: WorkflowEnvironment) -> None:
    run = await play(env, "carries_out_pause_and_resume")

    assert run.drains.pauses == [(1, True), (2, False)]
    assert len(run.drains.at) == 3


async def test_of_several_orders_the_last_one_counts(env: WorkflowEnvironment) -> None:
    run = await play(env, "carries_out_the_last_of_several_orders")

    assert run.drains.pauses == [(1, True)]


async def test_a_wake_after_the_end_starts_it_anew(env: WorkflowEnvironment) -> None:
    program_id = new_id()
    async with serving(env, [[SOME], [SOME]]) as (drains, wake):
        runs = set()
        for _ in range(2):
            handle = await wake(program_id)
            runs.add((await handle.describe()).run_id)
            await handle.result()

    assert len(runs) == 2
    assert len(drains.at) == 2


async def test_a_wake_during_the_idle_minute_is_answered_by_the_same_run(env: WorkflowEnvironment) -> None:
    program_id = new_id()
    async with serving(env, [[SOME], [SOME]]) as (drains, wake):
        runs = set()
        for _ in range(2):
            handle = await wake(program_id)
            runs.add((await handle.describe()).run_id)
            await env.sleep(30)
        await handle.result()

    assert len(runs) == 1
    assert drains.seconds() == [0, 30]


async def test_nothing_is_forgotten_when_it_continues_as_new(
    env: WorkflowEnvironment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long history is left behind; an operator's order that came during the last drain of it is still carried out."""
    suggested = iter([True])
    monkeypatch.setattr(Info, "is_continue_as_new_suggested", lambda _: next(suggested, False))
    script: list[list[str | DrainReport]] = [["pause", "wake", SOME], [SOME]]
    async with serving(env, script, workflow_runner=UnsandboxedWorkflowRunner()) as (drains, wake):
        handle = await wake(new_id())
        await handle.result()

    assert [paused for _, paused in drains.pauses] == [True]
    assert len(drains.at) >= 2


@pytest.mark.parametrize("name", [path.name for path in sorted(HISTORIES.glob("*.json"))])
async def test_recorded_runs_replay(name: str) -> None:
    """The code takes every recorded run the way it went: workflows that are under way survive an upgrade."""
    history = WorkflowHistory.from_json("recorded", (HISTORIES / name).read_text())

    await Replayer(workflows=WORKFLOWS, data_converter=DATA_CONVERTER).replay_workflow(history)


def test_every_path_is_recorded() -> None:
    assert {path.name.partition(".")[0] for path in HISTORIES.glob("*.json")} >= set(SCENARIOS)
