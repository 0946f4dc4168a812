"""Holds with an end through the API, on real servers. Contract: holders.md 6.8; docs/upkeep.md."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any
from uuid import UUID

import httpx
import psycopg
import pytest
from temporalio.client import Client, WorkflowExecutionStatus

from db.session import Database
from domain import faults, timed_holds
from domain.hold_ends import CarriedHold
from domain.ids import keyed_id, new_id
from settings import Settings
from tests.api.calls import problem
from tests.builders import Shop, open_shop
from tests.conftest import Tenant
from tests.due_support import entries_of, timed_hold
from tests.holdings_support import Desk, HoldSeen
from tests.ledger_invariants import assert_ledger_invariants
from tests.program_support import eventually
from worker import build_worker
from workflows import hold, hold_ends, queues
from workflows.gateway import Gateway, TemporalUnavailable
from workflows.hold import Hold
from workflows.reconcile import CarriedHolds, reconcile_holds


@pytest.fixture
async def shop(database: Database, organization: Tenant) -> AsyncIterator[Shop]:
    """A shop with a LOT asset, of which alice has 100."""
    shop = await open_shop(database, organization.id, inventory_mode="LOT")
    await Desk.of(database, organization.id, shop).credit("100")
    yield shop
    async with database.transaction(organization.id) as tx:
        await assert_ledger_invariants(tx.connection, organization.id)


@pytest.fixture
def desk(database: Database, organization: Tenant, shop: Shop) -> Desk:
    return Desk.of(database, organization.id, shop)


async def post_hold(client: httpx.AsyncClient, shop: Shop, amount: str = "30", **fields: Any) -> httpx.Response:
    body = {
        "program_id": str(shop.program_id),
        "asset_id": str(shop.asset_id),
        "description": "Card authorization",
        "amount": amount,
        **fields,
    }
    return await client.post(f"/participants/{shop.alice}/balances/hold", json=body)


async def made(client: httpx.AsyncClient, shop: Shop, amount: str = "30", **fields: Any) -> UUID:
    answer = await post_hold(client, shop, amount, **fields)
    assert answer.status_code == 200, answer.text
    return UUID(answer.json()["hold_id"])


@pytest.mark.usefixtures("running_worker")
class TestWithAWorker:
    """While everything runs."""

    async def test_a_hold_is_released_at_its_end(
        self, client: httpx.AsyncClient, shop: Shop, desk: Desk, temporal: Client
    ) -> None:
        hold_id = await made(client, shop, expires_in="1s")

        handle = temporal.get_workflow_handle_for(Hold.run, hold.workflow_id(hold_id))
        assert await handle.result() == "EXPIRED"

        assert await desk.buckets() == ("100", "0", "0")
        (entry,) = await entries_of(desk, "RELEASE")
        assert (entry["event_id"], entry["rule_id"], entry["api_key_id"]) == (None, None, None)

    async def test_a_hold_is_forfeited_at_its_end(
        self, client: httpx.AsyncClient, shop: Shop, desk: Desk, temporal: Client
    ) -> None:
        hold_id = await made(client, shop, expires_in="1s", on_expiry="FORFEIT")

        assert await temporal.get_workflow_handle(hold.workflow_id(hold_id)).result() == "EXPIRED"
        assert await desk.buckets() == ("70", "0", "0")

    async def test_the_answer_is_that_of_any_hold(
        self, client: httpx.AsyncClient, shop: Shop, desk: Desk, temporal: Client, organization: Tenant
    ) -> None:
        answer = await post_hold(client, shop, reference_id="auth1", expires_in="1h", idempotency_key="k")

        body = answer.json()
        ((lot_id, _),) = [(lot["id"], lot) for lot in await desk.lot_rows() if lot["status"] == "HELD"]
        assert "Idempotent-Replayed" not in answer.headers
        assert body == {
            "amount_processed": "30.00",
            "asset_id": str(shop.asset_id),
            "balance": {"available": "70.00", "held": "30.00", "deferred": "0.00"},
            "hold_id": body["hold_id"],
            "journal_entry_id": body["journal_entry_id"],
            "lots_processed": [{"id": str(lot_id), "amount": "30.00"}],
            "message": "Processed 30.00",
            "operation": "HOLD",
            "program_id": str(shop.program_id),
            "reference_id": "auth1",
        }
        (entry,) = await entries_of(desk, "HOLD")
        assert entry["api_key_id"] == organization.api_key_id
        assert entry["request_id"] == answer.headers["X-Request-Id"]
        description = await temporal.get_workflow_handle(hold.workflow_id(UUID(body["hold_id"]))).describe()
        shown = {key: value for key, value in description.search_attributes.items() if key.startswith("Scrip")}
        assert shown == {
            "ScripOrganization": [str(organization.id)],
            "ScripProgram": [str(shop.program_id)],
            "ScripParticipant": [str(shop.alice)],
            "ScripStatus": ["ACTIVE"],
        }
        assert await description.static_summary() == "Hold for 1:00:00"

    async def test_a_key_makes_one_hold_and_replays_cost_no_call(
        self,
        client: httpx.AsyncClient,
        shop: Shop,
        desk: Desk,
        client_of: Callable[[Gateway], Awaitable[httpx.AsyncClient]],
        settings: Settings,
    ) -> None:
        answers = await asyncio.gather(
            *(post_hold(client, shop, expires_in="1h", idempotency_key="k") for _ in range(8))
        )
        cut_off = await client_of(Gateway.from_settings(settings))
        replay = await post_hold(cut_off, shop, expires_in="1h", idempotency_key="k")
        other = await post_hold(cut_off, shop, expires_in="2h", idempotency_key="k")

        assert {answer.status_code for answer in answers} == {200}
        assert len({answer.json()["hold_id"] for answer in [*answers, replay]}) == 1
        assert len({answer.json()["journal_entry_id"] for answer in [*answers, replay]}) == 1
        assert sum("Idempotent-Replayed" not in answer.headers for answer in answers) == 1
        assert replay.headers["Idempotent-Replayed"] == "true"
        problem(other, 409, "idempotency_conflict")
        assert await desk.buckets() == ("70", "30", "0")

    @pytest.mark.parametrize(
        ("fields", "status", "code"),
        [
            ({"amount": "100.01"}, 422, "insufficient_balance"),
            ({"amount": "1.001"}, 400, "invalid_scale"),
            ({"asset_id": str(new_id())}, 404, "not_found"),
            ({"expires_in": "0s"}, 400, "bad_request"),
            ({"expires_in": None, "expires_at": "2020-01-01T00:00:00Z"}, 400, "bad_request"),
        ],
    )
    async def test_a_refusal_is_the_same_as_without_an_end(
        self, client: httpx.AsyncClient, shop: Shop, desk: Desk, fields: dict[str, Any], status: int, code: str
    ) -> None:
        answer = await post_hold(client, shop, **{"expires_in": "1h", "idempotency_key": "k", **fields})

        problem(answer, status, code)
        assert await desk.buckets() == ("100", "0", "0")
        await made(client, shop, expires_in="1h", idempotency_key="k")

    @pytest.mark.parametrize("key", [{}, {"idempotency_key": "k"}], ids=["keyless", "keyed"])
    async def test_a_call_answered_503_makes_nothing_though_its_worker_goes_on(
        self,
        client: httpx.AsyncClient,
        client_of: Callable[[Gateway], Awaitable[httpx.AsyncClient]],
        gateway: Gateway,
        shop: Shop,
        desk: Desk,
        key: dict[str, str],
    ) -> None:
        """The worker stands still with everything written and its locks held until long after the answer."""
        brief = await client_of(gateway)
        with faults.arm("ledger.written=stall:3"):
            refused = problem(await post_hold(brief, shop, "60", expires_in="1h", **key), 503, "service_unavailable")
        assert "outcome is unknown" in refused["message"]

        await made(client, shop, "60", expires_in="1h", **key)

        assert await desk.buckets() == ("40", "60", "0")
        assert await desk.holds() == [HoldSeen("ACTIVE", "60", "60")]

    async def test_a_refusal_by_the_workflow_names_the_field(self, client: httpx.AsyncClient, shop: Shop) -> None:
        answer = await post_hold(client, shop, expires_at="2020-01-01T00:00:00Z")

        details = problem(answer, 400)["details"]
        assert (details["field"], details["expected"]) == ("expires_at", "a later timestamp")

    async def test_a_hold_that_the_api_released_ends_its_workflow(
        self, client: httpx.AsyncClient, shop: Shop, desk: Desk, temporal: Client
    ) -> None:
        hold_id = await made(client, shop, expires_in="1h")
        answer = await client.post(f"/holds/{hold_id}/release", json={"description": "by hand"})
        assert answer.status_code == 200

        assert await temporal.get_workflow_handle(hold.workflow_id(hold_id)).result() == "RELEASED"
        assert await desk.entries("RELEASE") == 1

    async def test_a_debit_of_held_that_settles_a_hold_ends_its_workflow(
        self, client: httpx.AsyncClient, shop: Shop, desk: Desk, temporal: Client
    ) -> None:
        hold_id = await made(client, shop, expires_in="1h")
        debit = {"type": "DEBIT", "bucket": "HELD", "amount": "30", "description": "Settled"}
        holder = {"program_id": str(shop.program_id), "asset_id": str(shop.asset_id)}

        answer = await client.post(f"/participants/{shop.alice}/balances/adjust", json=debit | holder)

        assert answer.status_code == 200
        assert await temporal.get_workflow_handle(hold.workflow_id(hold_id)).result() == "SETTLED"
        assert await desk.buckets() == ("70", "0", "0")

    @pytest.mark.parametrize(
        ("signal", "status", "available"), [("release", "RELEASED", "100"), ("forfeit", "FORFEITED", "70")]
    )
    async def test_an_operator_ends_a_hold_by_a_signal(
        self,
        client: httpx.AsyncClient,
        shop: Shop,
        desk: Desk,
        temporal: Client,
        signal: str,
        status: str,
        available: str,
    ) -> None:
        hold_id = await made(client, shop, expires_in="1h")
        handle = temporal.get_workflow_handle(hold.workflow_id(hold_id))

        await handle.signal(signal)

        assert await handle.result() == status
        assert await desk.buckets() == (available, "0", "0")
        assert await desk.holds() == [HoldSeen(status, "30", "0")]

    async def test_temporals_own_cancel_releases_and_shows_canceled(
        self, client: httpx.AsyncClient, shop: Shop, desk: Desk, temporal: Client
    ) -> None:
        hold_id = await made(client, shop, expires_in="1h", on_expiry="FORFEIT")
        handle = temporal.get_workflow_handle(hold.workflow_id(hold_id))

        await handle.cancel()

        async def is_closed() -> bool:
            return (await handle.describe()).status != WorkflowExecutionStatus.RUNNING

        await eventually(is_closed)
        assert (await handle.describe()).status == WorkflowExecutionStatus.CANCELED
        assert await desk.buckets() == ("100", "0", "0")
        assert await desk.holds() == [HoldSeen("RELEASED", "30", "0")]

    async def test_groups_have_holds_with_an_end_too(self, client: httpx.AsyncClient, shop: Shop, desk: Desk) -> None:
        group = {"name": "Family", "members": [{"participant_id": str(shop.alice), "role": "ADMIN"}]}
        group_id = (await client.post("/groups", json=group)).json()["id"]
        body = {
            "program_id": str(shop.program_id),
            "asset_id": str(shop.asset_id),
            "description": "x",
        }
        credit = {**body, "type": "CREDIT", "amount": "5"}
        assert (await client.post(f"/groups/{group_id}/balances/adjust", json=credit)).status_code == 200

        answer = await client.post(f"/groups/{group_id}/balances/hold", json={**body, "expires_in": "1h"})

        assert answer.json()["balance"] == {"available": "0.00", "held": "5.00", "deferred": "0.00"}

    async def test_lost_workflows_are_started_again(
        self,
        shop: Shop,
        desk: Desk,
        temporal: Client,
        gateway: Gateway,
        database: Database,
        owner: psycopg.Connection[Any],
    ) -> None:
        owner.execute("update hold set expires_at = null, carrier = null where status = 'ACTIVE'")
        end = database.clock() + timedelta(hours=1)
        own = await timed_hold(desk, "10", end, carrier="WORKFLOW")
        carried = await timed_hold(desk, "20", end, carrier="PROGRAM")

        assert await reconcile_holds(database, gateway) == CarriedHolds(started=1, woken=1)

        handle = temporal.get_workflow_handle(hold.workflow_id(own))
        assert not await gateway.carry_hold(desk.organization_id, CarriedHold(own, shop.program_id, shop.alice, end)), (
            "it runs"
        )
        await handle.signal(Hold.release)
        assert await handle.result() == "RELEASED"
        ends = temporal.get_workflow_handle(hold_ends.workflow_id(shop.program_id))
        await ends.signal("release", carried)

        async def is_released() -> bool:
            return await desk.buckets() == ("100", "0", "0")

        await eventually(is_released)
        await ends.cancel()

    async def test_a_program_ends_the_holds_that_its_rules_made(
        self, shop: Shop, desk: Desk, gateway: Gateway, database: Database, temporal: Client
    ) -> None:
        for second in (1, 2):
            await timed_hold(desk, "10", database.clock() + timedelta(seconds=second))
        await gateway.wake_hold_ends(desk.organization_id, shop.program_id, "Loyalty")

        async def are_released() -> bool:
            return await desk.buckets() == ("100", "0", "0")

        await eventually(are_released)
        assert await desk.entries("RELEASE") == 2
        await temporal.get_workflow_handle(hold_ends.workflow_id(shop.program_id)).cancel()


async def test_holds_without_an_end_need_no_temporal(
    client_of: Callable[[Gateway], Awaitable[httpx.AsyncClient]], settings: Settings, shop: Shop, desk: Desk
) -> None:
    cut_off = await client_of(Gateway.from_settings(settings))

    await made(cut_off, shop)

    assert await desk.buckets() == ("70", "30", "0")


async def test_without_temporal_nothing_is_reserved_and_the_answer_is_503(
    client_of: Callable[[Gateway], Awaitable[httpx.AsyncClient]], settings: Settings, shop: Shop, desk: Desk
) -> None:
    cut_off = await client_of(Gateway.from_settings(settings))

    answer = await post_hold(cut_off, shop, expires_in="1h", idempotency_key="k")

    problem(answer, 503, "service_unavailable")
    assert await desk.buckets() == ("100", "0", "0")


async def test_a_call_answered_503_never_reserves_not_even_when_a_worker_comes_back(
    client_of: Callable[[Gateway], Awaitable[httpx.AsyncClient]],
    shop: Shop,
    desk: Desk,
    settings: Settings,
    temporal: Client,
) -> None:
    """Temporal takes the call, but no worker is there. It comes back later and finds that it is too late."""
    queue = f"nobody-{new_id()}"
    gateway = Gateway(lambda: asyncio.sleep(0, temporal), timeout_s=0.5)
    client = await client_of(gateway)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(queues, "LIFECYCLE", queue)
        answer = await post_hold(client, shop, expires_in="1h", idempotency_key="k")
    problem(answer, 503, "service_unavailable")

    with ThreadPoolExecutor(settings.worker_drains) as executor, pytest.MonkeyPatch.context() as patch:
        patch.setattr(queues, "LIFECYCLE", queue)
        patch.setattr(queues, "LEDGER", f"ledger-of-{queue}")
        async with build_worker(temporal, settings, desk.database.clock, executor):
            handle = temporal.get_workflow_handle(hold.workflow_id(keyed_id(shop.program_id, "hold", "k")))
            assert await handle.result() == "NONE"

    assert await desk.buckets() == ("100", "0", "0")
    assert await desk.holds() == []


async def test_a_reservation_that_was_made_while_nobody_listened_is_answered(
    client_of: Callable[[Gateway], Awaitable[httpx.AsyncClient]], shop: Shop, desk: Desk, settings: Settings
) -> None:
    """The answer of Temporal is lost: the database says that the hold was made, so the caller hears of it."""

    class Deaf(Gateway):
        async def make_hold(self, reservation: Any, wait_s: float) -> Any:
            await desk.database.repeat(desk.organization_id, lambda tx: timed_holds.reserve(tx, reservation))
            raise TemporalUnavailable("the line went dead")

    client = await client_of(Deaf.from_settings(settings))

    answers = [await post_hold(client, shop, expires_in="1h"), await post_hold(client, shop, "5", expires_in="1h")]

    assert [answer.status_code for answer in answers] == [200, 200]
    assert "Idempotent-Replayed" not in answers[0].headers
    assert await desk.buckets() == ("65", "35", "0")


async def test_nothing_runs_for_a_hold_that_was_refused(
    client: httpx.AsyncClient, running_worker: None, shop: Shop, temporal: Client
) -> None:
    await post_hold(client, shop, "100.01", expires_in="1h", idempotency_key="k")

    handle = temporal.get_workflow_handle(hold.workflow_id(keyed_id(shop.program_id, "hold", "k")))
    assert await handle.result() == "NONE"
