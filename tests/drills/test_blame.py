"""Goal: what goes wrong is charged to the event it went wrong with, also when the queue moves on at that moment.

Method: the wait of another event ends while an event fails; another attempt takes an event right after it was marked.
Contract: rules-and-events.md 7.6.
"""

from collections.abc import Awaitable, Callable
from typing import Any
from uuid import UUID

import pytest

from db.session import Database
from domain import faults
from domain.events import batch, drain
from domain.events.engine import apply_event
from domain.events.retries import RetryPolicy
from tests.conftest import SettableClock, Tenant
from tests.events_support import EventProgram, debit

IMPOSSIBLE = "processing failed: InjectedFault"


@pytest.fixture
async def program(database: Database, organization: Tenant) -> EventProgram:
    return await EventProgram.open(database, organization.id)


def after_each_mark(monkeypatch: pytest.MonkeyPatch, act: Callable[[], Awaitable[None]]) -> None:
    async def mark_and_act(*arguments: Any) -> batch.Start | None:
        begun = await batch.mark_started(*arguments)
        await act()
        return begun

    monkeypatch.setattr(drain, "mark_started", mark_and_act)


async def drained(program: EventProgram, *, after_loss: bool) -> None:
    retries = RetryPolicy(max_attempts=3, waits_s=(2,))
    arguments = (program.database, program.organization_id, program.id, retries, lambda _: None)
    await drain.drain(*arguments, after_loss=after_loss)


async def starts(program: EventProgram, event_id: UUID) -> int:
    ((count,),) = await program.sql("select starts from event where id = %s", event_id)
    return int(count)


@pytest.mark.parametrize("after_loss", [True, False])
async def test_an_event_whose_wait_ends_right_now_is_not_blamed_for_another(
    program: EventProgram, clock: SettableClock, monkeypatch: pytest.MonkeyPatch, after_loss: bool
) -> None:
    clock.set("2026-03-01T12:00:00Z")
    points = await program.asset()
    await program.rule("event.pays", debit(points, "1"))
    waiting = await program.send(pays=True)
    await program.settle(retries=RetryPolicy(max_attempts=3, waits_s=(2,)))
    impossible = await program.send("bob", pays=False)

    def apply(world: Any, rules: Any, event: Any, now: Any) -> Any:
        if event.id == impossible:
            clock.advance(seconds=2)
            raise faults.InjectedFault("event.applying")
        return apply_event(world, rules, event, now)

    monkeypatch.setattr(batch, "apply_event", apply)
    for _ in range(3):
        await drained(program, after_loss=after_loss)

    assert await program.status(impossible) == ("FAILED", IMPOSSIBLE)
    assert (await program.status(waiting))[1] == "action DEBIT failed: insufficient balance"


async def test_an_event_that_another_attempt_took_meanwhile_leaves_the_next_one_alone(
    program: EventProgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = await program.send(), await program.send()
    await program.sql("update event set starts = 3 where id = %s", first)

    async def another_attempt_takes_it() -> None:
        await program.batch(limit=1)

    after_each_mark(monkeypatch, another_attempt_takes_it)
    await drained(program, after_loss=True)

    assert [await program.status(event_id) for event_id in (first, second)] == [("COMPLETED", None)] * 2
    assert await starts(program, second) == 0
