"""How the event processing of a program is woken, on a real Temporal server. docs/decisions/0005-wakes.md."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import psycopg
import pytest
from temporalio.service import RPCError, RPCStatusCode

import worker
from api.app import create_app
from db.session import Database, DatabaseUnavailable
from domain import limits
from settings import Settings
from tests.conftest import SettableClock, Tenant
from tests.events_support import HttpProgram, counter, settled
from workflows.gateway import Gateway
from workflows.reconcile import find_lost_wakes, reconcile

pytestmark = pytest.mark.usefixtures("running_worker")


@pytest.fixture(autouse=True)
def nothing_left_by_others(owner: psycopg.Connection[Any]) -> None:
    """Lost wakes are looked for in all of the database, where other tests may have left some unprocessed."""
    owner.execute("update event set status = 'COMPLETED' where status in ('RECEIVED', 'PENDING')")
    owner.execute("update automation set status = 'archived' where status = 'active' and trigger_type = 'one_time'")


@pytest.fixture
async def cut_off(
    settings: Settings, database: Database, shared_clock: SettableClock, organization: Tenant
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an API process that can't reach Temporal."""
    app = create_app(settings, database, shared_clock, Gateway.from_settings(settings))
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(
            transport=httpx.ASGITransport(app),
            base_url="http://scrip.test/v1",
            headers={"Authorization": f"Bearer {organization.api_key}"},
        ) as client,
    ):
        yield client


async def test_events_are_accepted_without_temporal_and_found_by_the_timer(
    cut_off: httpx.AsyncClient, database: Database, gateway: Gateway, clock: SettableClock
) -> None:
    clock.set("2026-03-01T12:00:00Z")
    program = await HttpProgram.open(cut_off)
    await program.rule("true", counter("n", "1"))
    event = await program.send()
    batch = (await cut_off.post("/events/batch", json={"events": [program.event() for _ in range(3)]})).json()
    assert (batch["success_count"], batch["error_count"]) == (3, 0)

    assert await find_lost_wakes(database, gateway) == 0, "not lost before it is a second old"
    assert (await cut_off.get(f"/events/{event}")).json()["status"] == "RECEIVED"

    clock.advance(seconds=1)
    assert await find_lost_wakes(database, gateway) == 1
    for result in [{"event": {"id": event}}, *batch["results"]]:
        assert (await settled(cut_off, result["event"]["id"]))["status"] == "COMPLETED"
    assert (await program.participant())["counters"] == {"n": "4"}


async def test_reconcile_starts_what_waits_whether_it_is_due_or_not(
    cut_off: httpx.AsyncClient, database: Database, gateway: Gateway
) -> None:
    program = await HttpProgram.open(cut_off)
    event = await program.send()

    assert await reconcile(database, gateway) == 1

    assert (await settled(cut_off, event))["status"] == "COMPLETED"


async def test_events_wake_a_quiet_program_or_are_found_by_its_drain(
    client: httpx.AsyncClient,
) -> None:
    program = await HttpProgram.open(client)

    events = [await program.send(f"p{n}") for n in range(30)]

    for event in events:
        assert (await settled(client, event))["status"] == "COMPLETED"


@pytest.mark.parametrize("character", ["\U0001f600", '"'])
async def test_a_program_with_the_longest_name_is_processed_like_any_other(
    client: httpx.AsyncClient, character: str
) -> None:
    program = await HttpProgram.open(client, name=character * 255)

    assert (await program.run())["status"] == "COMPLETED"


async def test_a_program_that_cannot_be_woken_does_not_keep_others_asleep(
    client_for: Any, cut_off: httpx.AsyncClient, database: Database, gateway: Gateway, clock: SettableClock
) -> None:
    clock.set("2026-03-01T12:00:00Z")
    programs = [await HttpProgram.open(cut_off, name=f"{n}") for n in range(4)]
    events = [await program.send() for program in programs]
    clock.advance(seconds=1)

    class Picky(Gateway):
        async def wake_event_processing(self, organization_id: Any, program_id: Any, program_name: str) -> None:
            if program_name in "01":
                raise RPCError("not this one", RPCStatusCode.INVALID_ARGUMENT, b"")
            await gateway.wake_event_processing(organization_id, program_id, program_name)

    picky = Picky(gateway.client, timeout_s=5)
    assert await find_lost_wakes(database, picky) == 2

    for event in events[2:]:
        assert (await settled(cut_off, event))["status"] == "COMPLETED"


@pytest.mark.parametrize("error", [DatabaseUnavailable("no"), psycopg.OperationalError("lost"), KeyError("a mistake")])
async def test_the_look_for_lost_wakes_survives_whatever_happens(
    error: Exception, database: Database, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: asyncio.Queue[int] = asyncio.Queue()

    async def look(_database: Database, _gateway: Gateway) -> int:
        looks.put_nowait(1)
        raise error

    monkeypatch.setattr(worker, "reconcile", look)
    monkeypatch.setattr(limits, "LOST_WAKE_INTERVAL_S", 0)
    timer = asyncio.create_task(worker.keep_reconciled(database, gateway))
    try:
        async with asyncio.timeout(10):
            for _ in range(3):
                await looks.get()
        assert not timer.done()
    finally:
        timer.cancel()


async def test_a_worker_serves_until_it_is_stopped() -> None:
    stop = asyncio.Event()
    timer: asyncio.Task[None] = asyncio.create_task(asyncio.sleep(3_600))
    stop.set()
    await worker.serve_until(stop, timer)
    timer.cancel()


async def test_a_worker_fails_when_its_look_for_lost_wakes_ends() -> None:
    async def end(error: BaseException | None) -> None:
        if error is not None:
            raise error

    for error in (None, KeyError("a mistake"), asyncio.CancelledError()):
        with pytest.raises(RuntimeError, match="lost wakes has ended"):
            await worker.serve_until(asyncio.Event(), asyncio.create_task(end(error)))


def test_a_worker_that_fails_exits_with_1(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(_settings: Settings) -> None:
        raise RuntimeError("the look for lost wakes has ended")

    class Exited(BaseException):
        pass

    def leave(status: int) -> None:
        raise Exited(status)

    monkeypatch.setattr(worker, "run", fail)
    monkeypatch.setattr(worker, "get_settings", lambda: settings)
    monkeypatch.setattr("os._exit", leave)
    monkeypatch.setattr("logging.shutdown", lambda: None)
    with pytest.raises(Exited) as exited:
        worker.main()
    assert exited.value.args == (1,)
