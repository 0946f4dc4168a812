"""Verification in the background: workflows, records, API, schedule. docs/ledger.md "In the background"."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any
from uuid import UUID

import httpx
import psycopg
import pytest
from pydantic import SecretStr
from temporalio.client import (
    Client,
    ScheduleActionExecutionStartWorkflow,
    ScheduleHandle,
    ScheduleOverlapPolicy,
    ScheduleUpdate,
    WorkflowExecutionStatus,
    WorkflowFailureError,
)
from temporalio.exceptions import ApplicationError, CancelledError
from temporalio.testing import WorkflowEnvironment
from temporalio.worker import UnsandboxedWorkflowRunner
from temporalio.workflow import Info

from api.app import create_app
from db.session import Database
from domain import limits, organizations
from domain.ids import new_id
from domain.ledger import verifications
from domain.ledger.journal import load_accounts, write
from domain.locks import lock_participants
from settings import Settings
from tests.builders import Shop, d, open_shop
from tests.conftest import SettableClock, Tenant, new_namespace
from tests.servers import Postgres
from tests.workflows.ledger_verification_scenarios import (
    ENTRIES,
    ENTRY_ID,
    SCENARIOS,
    Ledgers,
    ended,
    progress,
    serving,
    start,
    start_night,
)
from tests.workflows.record import HISTORIES
from tests.workflows.scenarios import time_skipping
from worker import build_worker
from workflows import ledger_verification, queues
from workflows.gateway import Gateway
from workflows.ledger_verification import LEDGER_INVALID, NIGHTLY_ID, workflow_id
from workflows.schedules import ensure_schedules
from workflows.search_attributes import ORGANIZATION


@pytest.fixture(scope="module")
async def env() -> AsyncIterator[WorkflowEnvironment]:
    async with time_skipping() as env:
        yield env


# --- One ledger --------------------------------------------------------------------------------------------------


async def test_it_checks_stage_after_stage_to_the_end(env: WorkflowEnvironment) -> None:
    played = await SCENARIOS["verifies_in_stages"](env)

    assert played.ledgers.resumed_at == [0, 400, 800]
    assert (played.result.entries_checked, played.result.finished, played.result.problem) == (ENTRIES, True, None)
    assert played.ledgers.abandoned == []


async def test_a_broken_ledger_ends_it_as_failed_with_the_entry_in_the_message(env: WorkflowEnvironment) -> None:
    played = await SCENARIOS["verifies_and_finds_a_broken_ledger"](env)

    assert isinstance(played.error, ApplicationError)
    assert (played.error.type, played.error.non_retryable) == (LEDGER_INVALID, True)
    assert str(ENTRY_ID) in played.error.message
    assert played.ledgers.resumed_at == [0, 400]
    assert played.ledgers.abandoned == [], "it has a result"


async def test_a_fault_is_repeated(env: WorkflowEnvironment) -> None:
    played = await SCENARIOS["verifies_again_after_a_fault"](env)

    assert played.ledgers.resumed_at == [0, 0]
    assert played.result.finished


async def test_what_cannot_be_repeated_abandons_it(env: WorkflowEnvironment) -> None:
    played = await SCENARIOS["verifies_and_gives_up"](env)

    assert played.error is not None
    assert len(played.ledgers.abandoned) == 1


async def test_cancelling_abandons_it_and_shows_as_cancelled(env: WorkflowEnvironment) -> None:
    played = await SCENARIOS["verifies_until_cancelled"](env)

    assert isinstance(played.error, CancelledError)
    assert len(played.ledgers.abandoned) == 1
    assert (await played.handle.describe()).status == WorkflowExecutionStatus.CANCELED


async def test_a_long_history_is_left_behind_and_the_walk_goes_on(
    env: WorkflowEnvironment, monkeypatch: pytest.MonkeyPatch
) -> None:
    suggested = iter([True])
    monkeypatch.setattr(Info, "is_continue_as_new_suggested", lambda _: next(suggested, False))
    organization_id = new_id()
    ledgers = Ledgers(stages={organization_id: [progress(400), progress(ENTRIES)]})
    async with serving(env, ledgers, workflow_runner=UnsandboxedWorkflowRunner()) as queue:
        played = await ended(ledgers, await start(env, queue, organization_id))

    assert ledgers.begun == [organization_id], "the second run begins nothing"
    assert ledgers.resumed_at == [0, 400]
    assert played.result.finished


# --- Every ledger ------------------------------------------------------------------------------------------------


async def test_a_night_checks_every_ledger_a_few_at_once(env: WorkflowEnvironment) -> None:
    played = await SCENARIOS["verifies_every_ledger_at_night"](env)

    assert sorted(played.ledgers.begun) == sorted(played.ledgers.organizations)
    assert played.ledgers.most_at_once <= ledger_verification.AT_ONCE
    assert (played.result.checked, played.result.invalid, played.result.unfinished) == (6, 0, 0)


async def test_a_broken_ledger_does_not_keep_others_from_being_checked(env: WorkflowEnvironment) -> None:
    played = await SCENARIOS["verifies_at_night_and_counts_what_failed"](env)

    assert sorted(played.ledgers.begun) == sorted(played.ledgers.organizations)
    assert isinstance(played.error, ApplicationError)
    assert played.error.message == "4 ledgers checked: 1 invalid, 1 without a result"


async def test_a_ledger_that_is_being_checked_is_passed_over(env: WorkflowEnvironment) -> None:
    played = await SCENARIOS["verifies_at_night_beside_a_running_verification"](env)

    assert len(played.ledgers.begun) == 2
    assert (played.result.checked, played.result.unfinished) == (2, 0)


async def test_cancelling_a_night_cancels_what_it_checks(env: WorkflowEnvironment) -> None:
    played = await SCENARIOS["verifies_at_night_until_cancelled"](env)

    assert isinstance(played.error, CancelledError)
    assert played.ledgers.abandoned == played.ledgers.organizations


async def test_a_night_goes_through_pages_of_organizations(
    env: WorkflowEnvironment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_verification, "ORGANIZATIONS_PER_RUN", 2)
    organizations = [new_id() for _ in range(5)]
    ledgers = Ledgers(organizations=organizations, stages={organizations[0]: [progress(3, problem="a hole")]})
    async with serving(env, ledgers, workflow_runner=UnsandboxedWorkflowRunner()) as queue:
        played = await ended(ledgers, await start_night(env, queue))

    assert sorted(ledgers.begun) == organizations
    assert isinstance(played.error, ApplicationError)
    assert played.error.message == "5 ledgers checked: 1 invalid, 0 without a result", "counts pass from run to run"


def test_every_path_is_recorded() -> None:
    """tests/workflows/test_event_processing.py replays whatever is recorded."""
    assert {path.name.partition(".")[0] for path in HISTORIES.glob("*.json")} >= set(SCENARIOS)


# --- On real servers ---------------------------------------------------------------------------------------------

LEDGER = 7
STARTED_WITHIN_S = 20


@pytest.fixture
async def shop(database: Database, organization: Tenant) -> Shop:
    return await open_shop(database, organization.id)


@pytest.fixture
async def entries(database: Database, organization: Tenant, shop: Shop, monkeypatch: pytest.MonkeyPatch) -> list[UUID]:
    """A ledger of seven entries, which is long: more than is checked within a request, and several pages."""
    monkeypatch.setattr(limits, "VERIFY_IN_REQUEST", LEDGER - 1)
    monkeypatch.setattr(limits, "VERIFY_PAGE", 3)
    async with database.transaction(organization.id) as tx:
        await lock_participants(tx, [shop.alice])
        books = await load_accounts(tx, [shop.alice], [shop.asset_id])
        source = books.system("SYSTEM_ISSUANCE", shop.asset_id)
        alice = books.account("PARTICIPANT", shop.alice, shop.asset_id, "AVAILABLE")
        for n in range(1, LEDGER + 1):
            books.post("CREDIT", [(source, d(f"-{n}")), (alice, d(str(n)))], program_id=shop.program_id)
        await write(tx, books)
    return [entry.id for entry in books.entries]


def change_one_posting(postgres: Postgres, entry_id: UUID) -> None:
    with psycopg.connect(postgres.superuser_url, autocommit=True) as attacker:
        attacker.execute("set session_replication_role = replica")
        changed = attacker.execute("update posting set amount = 99 where entry_id = %s and ordinal = 1", (entry_id,))
        assert changed.rowcount == 1


@pytest.fixture
def nobody_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verifications are started, and no worker serves their queue."""
    monkeypatch.setattr(queues, "LEDGER", f"nobody-{new_id().hex}")


@pytest.mark.usefixtures("running_worker")
async def test_a_long_ledger_is_verified_in_the_background(
    client: httpx.AsyncClient, temporal: Client, organization: Tenant, entries: list[UUID]
) -> None:
    accepted = await client.get("/ledger/verify")
    assert accepted.status_code == 202, accepted.text
    verification_id = accepted.json()["verification_id"]
    handle = temporal.get_workflow_handle(workflow_id(organization.id))
    await handle.result()

    record = (await client.get(f"/ledger/verify/{verification_id}")).json()

    assert (record["status"], record["valid"], record["problem"]) == ("VALID", True, None)
    assert (record["entries_checked"], record["head_sequence"]) == (LEDGER, LEDGER)
    assert (record["organization_id"], record["verification_id"]) == (str(organization.id), verification_id)
    assert record["started_at"] <= record["finished_at"]
    description = await handle.describe()
    assert description.typed_search_attributes[ORGANIZATION] == str(organization.id)
    assert await description.static_summary() == "Verification of the whole ledger"


@pytest.mark.usefixtures("running_worker")
async def test_one_changed_posting_is_found_by_every_check_and_each_names_the_entry(
    client: httpx.AsyncClient,
    temporal: Client,
    organization: Tenant,
    entries: list[UUID],
    postgres: Postgres,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """holders.md example 15; the command line and the stand-alone verifier: tests/test_cli_export.py."""
    change_one_posting(postgres, entries[4])

    with caplog.at_level(logging.ERROR, "scrip.ledger"):
        verification_id = (await client.get("/ledger/verify")).json()["verification_id"]
        with pytest.raises(WorkflowFailureError) as failed:
            await temporal.get_workflow_handle(workflow_id(organization.id)).result()
    record = (await client.get(f"/ledger/verify/{verification_id}")).json()
    monkeypatch.setattr(limits, "VERIFY_IN_REQUEST", LEDGER)
    at_once = (await client.get("/ledger/verify")).json()
    attested = (await client.get("/reports/integrity")).json()

    invalid = str(entries[4])
    assert (record["status"], record["valid"], record["first_invalid_entry_id"]) == ("INVALID", False, invalid)
    assert (at_once["valid"], at_once["first_invalid_entry_id"]) == (False, invalid)
    assert (attested["valid"], attested["first_invalid_entry_id"]) == (False, invalid)
    assert isinstance(failed.value.cause, ApplicationError)
    assert invalid in failed.value.cause.message
    (line,) = [record for record in caplog.records if record.name == "scrip.ledger"]
    assert (line.levelname, vars(line)["first_invalid_entry_id"]) == ("ERROR", invalid)
    assert vars(line)["organization_id"] == str(organization.id)


@pytest.mark.usefixtures("nobody_works")
async def test_one_runs_at_a_time_and_a_second_request_answers_with_it(
    client: httpx.AsyncClient, entries: list[UUID]
) -> None:
    first, *others = await asyncio.gather(*(client.get("/ledger/verify") for _ in range(5)))

    assert {answer.status_code for answer in (first, *others)} == {202}
    assert {answer.json()["verification_id"] for answer in others} == {first.json()["verification_id"]}
    record = (await client.get(f"/ledger/verify/{first.json()['verification_id']}")).json()
    assert (record["status"], record["valid"], record["finished_at"]) == ("RUNNING", None, None)
    assert (record["entries_checked"], record["head_sequence"]) == (0, LEDGER)


async def test_one_that_was_lost_is_abandoned_when_the_next_begins(
    client: httpx.AsyncClient,
    temporal: Client,
    organization: Tenant,
    entries: list[UUID],
    running_worker: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Temporal's state can be thrown away: here the workflow is terminated, which no code of ours sees."""
    handle = temporal.get_workflow_handle(workflow_id(organization.id))
    with monkeypatch.context() as patch:
        patch.setattr(queues, "LEDGER", "nobody")
        lost = (await client.get("/ledger/verify")).json()["verification_id"]
    await handle.terminate()

    second = (await client.get("/ledger/verify")).json()["verification_id"]
    await handle.result()

    assert second != lost
    found = [(await client.get(f"/ledger/verify/{id_}")).json() for id_ in (lost, second)]
    assert [(record["status"], record["valid"]) for record in found] == [("ABANDONED", None), ("VALID", True)]


async def test_what_has_ended_never_changes(database: Database, organization: Tenant, entries: list[UUID]) -> None:
    """A worker that was thought dead comes back after its verification was given up."""
    verification_id = new_id()
    async with database.transaction(organization.id) as tx:
        walk = await verifications.begin(tx, verification_id)
        await verifications.abandon(tx, verification_id)
        walk.finished = True
        await verifications.note(tx, verification_id, walk)
        record = await verifications.get(tx, verification_id)

    assert record.status == "ABANDONED"


async def test_without_temporal_none_is_started_or_recorded(
    settings: Settings,
    database: Database,
    shared_clock: SettableClock,
    organization: Tenant,
    entries: list[UUID],
    owner: psycopg.Connection[Any],
) -> None:
    app = create_app(settings, database, shared_clock, Gateway.from_settings(settings))
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(
            transport=httpx.ASGITransport(app),
            base_url="http://scrip.test/v1",
            headers={"Authorization": f"Bearer {organization.api_key}"},
        ) as client,
    ):
        answer = await client.get("/ledger/verify")

    assert (answer.status_code, answer.json()["code"]) == (503, "service_unavailable")
    query = "select count(*) from ledger_verification where organization_id = %s"
    assert owner.execute(query, (organization.id,)).fetchone() == (0,)


async def test_waiting_for_temporal_holds_no_database_connection(
    settings: Settings,
    database_url: str,
    shared_clock: SettableClock,
    organization: Tenant,
    entries: list[UUID],
) -> None:
    """The pool has one connection: who asks for it while Temporal is being waited for gets it."""
    database = Database(database_url, size=1, timeout_s=5, clock=shared_clock)

    class Slow(Gateway):
        async def start_verification(self, organization_id: UUID, verification_id: UUID) -> UUID:
            async with database.transaction(organization_id):
                return verification_id

    app = create_app(settings, database, shared_clock, Slow.from_settings(settings))
    await database.open()
    try:
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(
                transport=httpx.ASGITransport(app),
                base_url="http://scrip.test/v1",
                headers={"Authorization": f"Bearer {organization.api_key}"},
            ) as client,
        ):
            answer = await client.get("/ledger/verify")
    finally:
        await database.close()

    assert (answer.status_code, answer.json()["status"]) == (202, "RUNNING"), answer.text


@pytest.mark.usefixtures("nobody_works")
async def test_a_verification_of_another_organization_is_not_found(
    client: httpx.AsyncClient, other_client: httpx.AsyncClient, entries: list[UUID]
) -> None:
    verification_id = (await client.get("/ledger/verify")).json()["verification_id"]

    assert (await other_client.get(f"/ledger/verify/{verification_id}")).status_code == 404
    assert (await client.get(f"/ledger/verify/{new_id()}")).status_code == 404


async def test_readiness_tells_of_ledgers_that_were_found_invalid(
    settings: Settings, database: Database, organization: Tenant, entries: list[UUID], owner: psycopg.Connection[Any]
) -> None:
    """The newest result counts, and none of it makes the process unready."""
    owner.execute("delete from ledger_verification")

    async def result(**found: Any) -> dict[str, Any]:
        async with database.transaction(organization.id) as tx:
            verification_id = new_id()
            walk = await verifications.begin(tx, verification_id)
            walk.finished = True
            walk.problem = found.get("problem")
            await verifications.note(tx, verification_id, walk)
        app = create_app(settings, database, database.clock)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://scrip.test") as client:
            answer = await client.get("/readyz")
        assert answer.status_code == 200
        shown: dict[str, Any] = answer.json()["ledger"]
        return shown

    assert await result(problem="a hole") == {"status": "invalid", "invalid_organizations": 1}
    assert await result() == {"status": "ok", "invalid_organizations": 0}


# --- The schedule ------------------------------------------------------------------------------------------------


async def test_the_schedule_is_made_once_and_brought_up_to_date(temporal: Client) -> None:
    await ensure_schedules(temporal)
    handle = temporal.get_schedule_handle(NIGHTLY_ID)
    await handle.pause(note="by an operator")

    async def at_noon(found: Any) -> ScheduleUpdate:
        found.description.schedule.policy.catchup_window = timedelta(minutes=1)
        return ScheduleUpdate(found.description.schedule)

    await handle.update(at_noon)
    await asyncio.gather(*(ensure_schedules(temporal) for _ in range(3)))

    schedule = (await handle.describe()).schedule
    assert schedule.policy.overlap == ScheduleOverlapPolicy.SKIP
    assert schedule.policy.catchup_window == timedelta(hours=12)
    assert schedule.spec.jitter == timedelta(minutes=10)
    assert [(hour.start, hour.end) for hour in schedule.spec.calendars[0].hour] == [(2, 2)]
    assert (schedule.state.paused, schedule.state.note) == (True, "by an operator"), "that is the operator's"
    await handle.unpause()
    next_times = (await handle.describe()).info.next_action_times
    assert {(time.hour, time.minute < 10) for time in next_times} == {(2, True)}


@pytest.mark.usefixtures("running_worker")
async def test_the_schedule_verifies_every_organization(
    postgres: Postgres, temporal_address: str, settings: Settings, shared_clock: SettableClock
) -> None:
    """Started by hand, as an operator may do in Temporal's UI; in a database where three organizations are all."""
    own = postgres.create_database("nightly")
    temporal = await new_namespace(temporal_address, "nightly")
    with psycopg.connect(own.owner_url, autocommit=True) as owner:
        ids = [
            organizations.create_organization(owner, name, rate_per_second=1, rate_burst=1, now=shared_clock())
            for name in ("first", "second", "third")
        ]
        own_settings = settings.model_copy(update={"database_url": SecretStr(own.app_url)})
        with ThreadPoolExecutor(settings.worker_drains) as executor:
            async with build_worker(temporal, own_settings, shared_clock, executor):
                await ensure_schedules(temporal)
                handle = temporal.get_schedule_handle(NIGHTLY_ID)
                await handle.trigger()
                await temporal.get_workflow_handle(await _night_started_by(handle)).result()
        found = owner.execute("select organization_id, status from ledger_verification").fetchall()
    assert sorted(found) == sorted((organization_id, "VALID") for organization_id in ids)


async def _night_started_by(handle: ScheduleHandle) -> str:
    """The id of the workflow that the schedule started."""
    deadline = time.monotonic() + STARTED_WITHIN_S
    while True:
        actions = (await handle.describe()).info.recent_actions
        if actions:
            started = actions[-1].action
            assert isinstance(started, ScheduleActionExecutionStartWorkflow)
            return started.workflow_id
        assert time.monotonic() < deadline, "the schedule started nothing"
        await asyncio.sleep(0.05)
