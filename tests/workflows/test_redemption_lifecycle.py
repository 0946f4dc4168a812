"""Two-step redemptions through the API, on real servers. Contract: redemptions.md 3; docs/two-step.md."""

import asyncio
import gc
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any
from uuid import UUID

import httpx
import psycopg
import pytest
from temporalio.client import Client, WorkflowExecutionStatus, WorkflowHandle

from db.session import Database, Transaction
from domain import faults, two_step
from domain.ids import keyed_id, new_id
from settings import Settings
from tests.api.calls import problem, wrong_fields
from tests.builders import d, open_shop
from tests.conftest import Tenant
from tests.due_support import entries_of
from tests.ledger_invariants import assert_ledger_invariants
from tests.program_support import eventually
from tests.redemption_invariants import assert_redemption_invariants
from tests.redemptions_support import Till
from worker import build_worker
from workflows import queues, redemption
from workflows.gateway import Gateway, TemporalUnavailable
from workflows.reconcile import reconcile_redemptions
from workflows.redemption import Redemption

CANCELED, RUNNING = WorkflowExecutionStatus.CANCELED, WorkflowExecutionStatus.RUNNING
ClientOf = Callable[[Gateway], Awaitable[httpx.AsyncClient]]


@dataclass(frozen=True)
class Counter:
    """Where alice redeems over HTTP."""

    client: httpx.AsyncClient
    till: Till
    temporal: Client

    async def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        return await self.client.post(path, json=body)

    async def create(self, amount: str = "100", **fields: Any) -> httpx.Response:
        desk = self.till.desk
        body = {
            "program_id": str(desk.program_id),
            "asset_id": str(desk.asset_id),
            "amount": amount,
            "description": "Gift card",
            "requires_confirmation": True,
            **fields,
        }
        return await self.post(f"/participants/{desk.holder.id}/redemptions", body)

    async def made(self, amount: str = "100", **fields: Any) -> UUID:
        answer = await self.create(amount, **fields)
        assert answer.status_code == 201, answer.text
        assert answer.json()["status"] == "PENDING"
        return UUID(answer.json()["id"])

    async def confirm(self, redemption_id: UUID, **body: Any) -> httpx.Response:
        return await self.post(f"/redemptions/{redemption_id}/confirm", body)

    async def cancel(self, redemption_id: UUID, reason: str = "changed my mind") -> httpx.Response:
        return await self.post(f"/redemptions/{redemption_id}/cancel", {"reason": reason})

    async def reverse(self, redemption_id: UUID, **body: Any) -> httpx.Response:
        return await self.post(f"/redemptions/{redemption_id}/reverse", {"reason": "returned", **body})

    async def status(self, redemption_id: UUID) -> str:
        status: str = (await self.client.get(f"/redemptions/{redemption_id}")).json()["status"]
        return status

    async def money(self) -> tuple[str, str]:
        """AVAILABLE and HELD."""
        available, held, _ = await self.till.desk.buckets()
        return available, held

    def handle(self, redemption_id: UUID, run_id: str | None = None) -> WorkflowHandle[Any, Any]:
        return self.temporal.get_workflow_handle(redemption.workflow_id(redemption_id), run_id=run_id)

    async def page(self, redemption_id: UUID) -> str:
        """What an operator reads on the page of the newest run."""
        return str(await self.handle(redemption_id).query("__temporal_workflow_metadata"))

    async def closed(self, redemption_id: UUID, run_id: str | None = None) -> WorkflowExecutionStatus | None:
        """How the workflow's newest run, or the one that is named, has ended, once it has."""
        handle = self.handle(redemption_id, run_id)

        async def is_closed() -> bool:
            return (await handle.describe()).status != RUNNING

        await eventually(is_closed)
        return (await handle.describe()).status


@pytest.fixture(params=["SIMPLE", "LOT"])
async def till(database: Database, organization: Tenant, request: pytest.FixtureRequest) -> AsyncIterator[Till]:
    """Alice's till, where she has 150."""
    shop = await open_shop(database, organization.id, inventory_mode=request.param)
    till = Till.of(database, organization.id, shop)
    await till.desk.credit("90")
    await till.desk.credit("60")
    yield till
    async with database.transaction(organization.id) as tx:
        await assert_ledger_invariants(tx.connection, organization.id)
        await assert_redemption_invariants(tx.connection, organization.id)


@pytest.fixture
def counter(client: httpx.AsyncClient, till: Till, temporal: Client) -> Counter:
    return Counter(client, till, temporal)


@pytest.fixture
async def cut_off(client_of: ClientOf, settings: Settings, counter: Counter) -> Counter:
    """The same counter at an API process that cannot reach Temporal."""
    return replace(counter, client=await client_of(Gateway.from_settings(settings)))


@pytest.fixture
def short_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let redemptions expire sooner than in a minute."""
    monkeypatch.setattr(sys.modules["domain.redemptions.create"], "SHORTEST_EXPIRY", timedelta(0))


@pytest.mark.usefixtures("running_worker")
class TestWithAWorker:
    """While everything runs."""

    async def test_worked_example_i(self, counter: Counter, organization: Tenant) -> None:
        answer = await counter.create("100")
        made = answer.json()
        assert (answer.status_code, made["status"], made["amount"]) == (201, "PENDING", "100.00")
        assert (made["requested_amount"], "confirmed_at" in made) == ("100.00", False)
        assert "Idempotent-Replayed" not in answer.headers
        assert await counter.money() == ("50", "100")

        answer = await counter.confirm(UUID(made["id"]))

        confirmed = answer.json()
        assert (answer.status_code, confirmed["status"], confirmed["amount"]) == (200, "COMPLETED", "100.00")
        assert confirmed["journal_entry_id"] != made["journal_entry_id"]
        assert await counter.money() == ("50", "0")
        postings = await counter.till.desk.postings(UUID(confirmed["journal_entry_id"]))
        assert postings == [("PARTICIPANT", "HELD", "-100"), ("SYSTEM_REDEMPTION", "AVAILABLE", "100")]
        assert await counter.handle(UUID(made["id"])).result() == "COMPLETED"
        entries = await entries_of(counter.till.desk, "HOLD", "REDEMPTION")
        assert [entry["api_key_id"] for entry in entries] == [organization.api_key_id] * 2
        assert entries[1]["request_id"] == answer.headers["X-Request-Id"]

    async def test_a_part_can_be_confirmed_and_the_rest_comes_back(self, counter: Counter) -> None:
        made = await counter.made("100")

        confirmed = (await counter.confirm(made, amount="60")).json()

        assert (confirmed["amount"], confirmed["requested_amount"]) == ("60.00", "100.00")
        assert await counter.money() == ("90", "0")

    async def test_a_cancel_gives_everything_back(self, counter: Counter) -> None:
        made = await counter.made("100")

        answers = [await counter.cancel(made) for _ in range(2)]

        assert [(answer.status_code, answer.json()["status"]) for answer in answers] == [(200, "CANCELED")] * 2
        assert await counter.money() == ("150", "0")
        assert await counter.till.desk.entries("RELEASE") == 1
        problem(await counter.confirm(made), 409, "redemption_not_pending")

    async def test_it_expires_by_itself(self, counter: Counter, short_lives: None) -> None:
        made = await counter.made("100", expires_in="1s")

        assert await counter.handle(made).result() == "EXPIRED"

        assert await counter.status(made) == "EXPIRED"
        assert await counter.money() == ("150", "0")

    async def test_what_an_operator_sees(self, counter: Counter, organization: Tenant) -> None:
        made = await counter.made("100")

        description = await counter.handle(made).describe()

        shown = {key: value for key, value in description.search_attributes.items() if key.startswith("Scrip")}
        desk = counter.till.desk
        assert shown == {
            "ScripOrganization": [str(organization.id)],
            "ScripProgram": [str(desk.program_id)],
            "ScripParticipant": [str(desk.holder.id)],
            "ScripStatus": ["PENDING"],
        }
        await counter.confirm(made)
        closed = await counter.handle(made).describe()
        assert closed.search_attributes["ScripStatus"] == ["COMPLETED"]

    @pytest.mark.parametrize(
        ("signal", "argument", "status", "money"),
        [
            ("confirm", [], "COMPLETED", ("50", "0")),
            ("confirm", [{"amount": "60"}], "COMPLETED", ("90", "0")),
            ("cancel", ["sold out"], "CANCELED", ("150", "0")),
            ("cancel", [], "CANCELED", ("150", "0")),
            ("expire_now", [], "EXPIRED", ("150", "0")),
        ],
    )
    async def test_an_operator_settles_it_by_a_signal(
        self, counter: Counter, signal: str, argument: list[Any], status: str, money: tuple[str, str]
    ) -> None:
        made = await counter.made("100")

        await counter.handle(made).signal(signal, args=argument)

        assert await counter.handle(made).result() == status
        assert await counter.status(made) == status
        assert await counter.money() == money

    async def test_a_typo_of_an_operator_takes_nothing_and_is_shown(self, counter: Counter) -> None:
        made = await counter.made("100")

        await counter.handle(made).signal("confirm", {"amout": "60"})

        assert "was refused: it takes nothing, " in await counter.page(made)
        assert (await counter.status(made), await counter.money()) == ("PENDING", ("50", "100"))
        await counter.handle(made).signal("confirm", {"amount": "60"})
        assert await counter.handle(made).result() == "COMPLETED"
        assert await counter.money() == ("90", "0")

    async def test_an_order_that_can_never_succeed_keeps_no_other_from_its_turn(
        self, counter: Counter, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Postgres takes no NUL, and the signal refuses it: this is as if one had got through."""
        cancel = two_step.cancel

        async def with_nul(tx: Transaction, order: two_step.CancelOrder) -> two_step.RedemptionState:
            reason = "sold\0out" if order.reason == "sold out" else order.reason
            return await cancel(tx, replace(order, reason=reason))

        monkeypatch.setattr(two_step, "cancel", with_nul)
        made = await counter.made("100")
        await counter.handle(made).signal("cancel", "sold out")

        async def is_shown() -> bool:
            return "Last order, cancel, failed: DataError: " in await counter.page(made)

        await eventually(is_shown)
        assert (await counter.status(made), await counter.money()) == ("PENDING", ("50", "100"))
        await counter.handle(made).cancel()

        assert await counter.closed(made) == CANCELED
        assert (await counter.status(made), await counter.money()) == ("CANCELED", ("150", "0"))

    async def test_temporals_own_cancel_gives_money_and_stock_back(self, counter: Counter) -> None:
        reward_id = await counter.till.reward(max_total=2, unit_cost=d("40"))
        body = {"program_id": str(counter.till.desk.program_id), "reward_id": str(reward_id), "quantity": 2}
        path = f"/participants/{counter.till.desk.holder.id}/redemptions/items"
        made = UUID((await counter.post(path, {**body, "requires_confirmation": True})).json()["id"])
        assert await counter.till.stock(reward_id) == ("OUT_OF_STOCK", 2, 2)

        await counter.handle(made).cancel()

        assert await counter.closed(made) == CANCELED
        assert await counter.status(made) == "CANCELED"
        assert await counter.money() == ("150", "0")
        assert await counter.till.stock(reward_id) == ("ACTIVE", 0, 0)

    @pytest.mark.parametrize(
        ("point", "status"),
        [("redemption.reserved", "CANCELED"), ("redemption.confirmed", "COMPLETED"), ("redemption.expired", "EXPIRED")],
    )
    async def test_temporals_cancel_waits_for_the_step_under_way(
        self, counter: Counter, short_lives: None, capfd: pytest.CaptureFixture[str], point: str, status: str
    ) -> None:
        """The step is held open with its work written and not committed; nothing stays held whatever comes of it."""
        made = keyed_id(counter.till.desk.program_id, "redemption", "k")
        with faults.arm(f"{point}=stall:2"):
            expiry = "1s" if point == "redemption.expired" else "1h"
            calls = [asyncio.create_task(counter.create(expires_in=expiry, idempotency_key="k"))]
            if point == "redemption.confirmed":
                await calls[0]
                calls.append(asyncio.create_task(counter.confirm(made)))

            async def is_held_open() -> bool:
                return f"fault point {point}" in capfd.readouterr().err

            await eventually(is_held_open)
            run_id = (await counter.handle(made).describe()).run_id
            await counter.handle(made).cancel()
            await asyncio.gather(*calls)

        # A confirm whose workflow task the cancel overtook is sent again, and may have got a short run of its own.
        assert await counter.closed(made, run_id) == CANCELED
        assert await counter.status(made) == status
        assert (await counter.money())[1] == "0"

    async def test_a_key_makes_one_and_replays_cost_no_call(self, counter: Counter, cut_off: Counter) -> None:
        answers = await asyncio.gather(*(counter.create("10", idempotency_key="k") for _ in range(20)))
        replay = await cut_off.create("10.00", idempotency_key="k")
        other = await cut_off.create("11", idempotency_key="k")

        assert sorted(answer.status_code for answer in answers) == [200] * 19 + [201]
        assert len({answer.json()["id"] for answer in [*answers, replay]}) == 1
        assert replay.headers["Idempotent-Replayed"] == "true"
        problem(other, 409, "idempotency_conflict")
        assert await counter.money() == ("140", "10")
        assert len(await counter.till.listed()) == 1

    @pytest.mark.parametrize("key", [{}, {"idempotency_key": "k"}], ids=["keyless", "keyed"])
    async def test_a_call_answered_503_makes_nothing_though_its_worker_goes_on(
        self, counter: Counter, client_of: ClientOf, gateway: Gateway, key: dict[str, str]
    ) -> None:
        """The worker stands still with everything written and its locks held until long after the answer."""
        brief = replace(counter, client=await client_of(gateway))
        with faults.arm("redemption.reserved=stall:3"):
            refused = problem(await brief.create("100", **key), 503, "service_unavailable")
        assert "outcome is unknown" in refused["message"]
        assert "same idempotency_key" in refused["message"]

        answer = await counter.create("100", **key)

        assert (answer.status_code, answer.headers.get("Idempotent-Replayed")) == (201, None)
        assert [made.id for made in await counter.till.listed()] == [UUID(answer.json()["id"])]
        assert await counter.money() == ("50", "100")

    async def test_an_item_is_replayed_though_its_reward_asks_for_no_confirm_any_more(self, counter: Counter) -> None:
        reward_id = await counter.till.reward(requires_confirmation=True)
        body = {
            "program_id": str(counter.till.desk.program_id),
            "reward_id": str(reward_id),
            "expires_in_seconds": 600,
            "idempotency_key": "k",
        }
        path = f"/participants/{counter.till.desk.holder.id}/redemptions/items"
        first = await counter.post(path, body)
        await counter.till.change_reward(reward_id, requires_confirmation=False)

        replay = await counter.post(path, body)

        assert (first.status_code, replay.status_code, replay.json()) == (201, 200, first.json())
        fresh = await counter.post(path, {**body, "idempotency_key": "l"})
        assert wrong_fields(fresh) == {"expires_in_seconds": "invalid"}
        problem(await counter.post(path, {**body, "quantity": 2}), 409, "idempotency_conflict")

    async def test_a_confirm_needs_no_body(self, counter: Counter) -> None:
        made = await counter.made("100")

        answer = await counter.client.post(f"/redemptions/{made}/confirm")

        assert (answer.status_code, answer.json()["amount"]) == (200, "100.00")

    async def test_what_is_settled_is_answered_without_temporal(self, counter: Counter, cut_off: Counter) -> None:
        confirmed, canceled = await counter.made("10"), await counter.made("20")
        await counter.confirm(confirmed, amount="9")
        await counter.cancel(canceled)
        reversed_once = await counter.reverse(confirmed, amount="4", idempotency_key="r")

        assert (await cut_off.confirm(confirmed, amount="9")).json()["status"] == "PARTIALLY_REVERSED"
        problem(await cut_off.confirm(confirmed, amount="8"), 409, "redemption_not_pending")
        problem(await cut_off.cancel(confirmed), 409, "redemption_not_pending")
        assert (await cut_off.cancel(canceled)).json()["status"] == "CANCELED"
        problem(await cut_off.confirm(canceled), 409, "redemption_not_pending")
        replay = await cut_off.reverse(confirmed, amount="4", idempotency_key="r")
        assert (replay.status_code, replay.json()) == (200, reversed_once.json())
        problem(await cut_off.reverse(canceled), 409, "redemption_not_confirmed")
        problem(await cut_off.reverse(confirmed, amount="6"), 422, "reversal_exceeds_redemption")

    async def test_a_reversal_is_a_short_run_of_the_same_workflow(self, counter: Counter) -> None:
        made = await counter.made("100")
        await counter.confirm(made)

        first = await counter.reverse(made, amount="30")
        second = await counter.reverse(made, idempotency_key="rest")

        assert (first.status_code, second.status_code) == (201, 201)
        assert second.json()["amount"] == "70.00"
        assert await counter.handle(made).result() == "FULLY_REVERSED"
        description = await counter.handle(made).describe()
        assert await description.static_summary() == "Reversal of a redemption"
        assert description.search_attributes["ScripStatus"] == ["FULLY_REVERSED"]
        begun = (await counter.handle(made).fetch_history()).events[0].workflow_execution_started_event_attributes
        assert "ScripStatus" not in begun.search_attributes.indexed_fields
        assert await counter.money() == ("150", "0")
        problem(await counter.reverse(made), 422, "already_fully_reversed")

    async def test_a_terminated_workflow_loses_nothing(
        self, counter: Counter, database: Database, gateway: Gateway
    ) -> None:
        confirmed, carried = await counter.made("100"), await counter.made("50")
        for made in (confirmed, carried):
            await counter.handle(made).terminate()

        assert (await counter.confirm(confirmed)).json()["status"] == "COMPLETED"
        assert await counter.handle(confirmed).result() == "COMPLETED"

        async def is_running() -> bool:
            # What Temporal lists as running may be a moment old.
            await reconcile_redemptions(database, gateway)
            return (await counter.handle(carried).describe()).status == WorkflowExecutionStatus.RUNNING

        await eventually(is_running)
        await counter.handle(carried).signal(Redemption.order_cancel, "sold out")
        assert await counter.handle(carried).result() == "CANCELED"
        assert await counter.money() == ("50", "0")

    async def test_an_order_that_comes_too_late_meets_it_expired(
        self, counter: Counter, cut_off: Counter, short_lives: None, owner: psycopg.Connection[Any]
    ) -> None:
        """Its workflow is lost and nobody has looked since: the value goes back all the same, without Temporal."""
        redemptions = [await counter.made("10") for _ in range(3)]
        for made in redemptions:
            await counter.handle(made).terminate()
        owner.execute("update redemption set expires_at = now() where id = any(%s)", (redemptions,))
        owner.execute("update hold set expires_at = r.expires_at from redemption r where hold.id = r.id")

        problem(await cut_off.confirm(redemptions[0]), 409, "redemption_not_pending")
        problem(await cut_off.cancel(redemptions[1]), 409, "redemption_not_pending")
        assert await counter.money() == ("140", "10")
        assert await cut_off.status(redemptions[2]) == "EXPIRED"
        assert await counter.money() == ("150", "0")

    @pytest.mark.parametrize(
        ("fields", "status", "code"),
        [
            ({"amount": "150.01"}, 422, "insufficient_balance"),
            ({"amount": "1.001"}, 400, "invalid_scale"),
            ({"asset_id": str(new_id())}, 404, "not_found"),
            ({"expires_in_seconds": 59}, 400, "bad_request"),
        ],
    )
    async def test_refusals_need_no_temporal(
        self, counter: Counter, cut_off: Counter, fields: dict[str, Any], status: int, code: str
    ) -> None:
        problem(await cut_off.create(**{"idempotency_key": "k", **fields}), status, code)

        assert await counter.money() == ("150", "0")
        await counter.made(idempotency_key="k")

    async def test_a_confirm_that_asks_for_too_much_is_refused_at_once(
        self, counter: Counter, cut_off: Counter
    ) -> None:
        made = await counter.made("100")

        assert wrong_fields(await cut_off.confirm(made, amount="100.01")) == {"amount": "invalid"}
        assert wrong_fields(await cut_off.confirm(made, quantity=1)) == {"quantity": "invalid"}
        await counter.till.set_status("SUSPENDED")
        problem(await cut_off.confirm(made), 409, "participant_inactive")

    async def test_a_refusal_by_the_workflow_reaches_the_caller(self, counter: Counter) -> None:
        """Both pass the look of the API; the second finds nothing left when it is reserved."""
        answers = await asyncio.gather(*(counter.create("100") for _ in range(2)))

        refused, made = sorted(answers, key=lambda answer: answer.status_code, reverse=True)
        problem(refused, 422, "insufficient_balance")
        assert made.status_code == 201
        assert await counter.money() == ("50", "100")

    @pytest.mark.parametrize("round", range(4))
    async def test_of_confirm_cancel_and_time_exactly_one_wins(self, counter: Counter, round: int) -> None:
        made = await counter.made("100")

        confirmed, canceled, _, cancelled = await asyncio.gather(
            counter.confirm(made),
            counter.cancel(made),
            counter.handle(made).signal("expire_now"),
            counter.confirm(made),
            return_exceptions=True,
        )

        status = await counter.status(made)
        assert status in ("COMPLETED", "CANCELED", "EXPIRED")
        for answer, wanted in ((confirmed, "COMPLETED"), (canceled, "CANCELED"), (cancelled, "COMPLETED")):
            assert isinstance(answer, httpx.Response)
            assert answer.status_code == (200 if status == wanted else 409)
        assert await counter.money() == (("50", "0") if status == "COMPLETED" else ("150", "0"))
        assert await counter.till.desk.entries("REDEMPTION") + await counter.till.desk.entries("RELEASE") == 1

    @pytest.mark.parametrize(("call", "wanted"), [("confirm", "COMPLETED"), ("cancel", "CANCELED")])
    @pytest.mark.parametrize("milliseconds", [30, 80, 200])
    async def test_of_a_call_and_the_real_timer_exactly_one_wins(
        self, counter: Counter, monkeypatch: pytest.MonkeyPatch, call: str, wanted: str, milliseconds: int
    ) -> None:
        expiry = timedelta(milliseconds=milliseconds)
        monkeypatch.setattr(sys.modules["domain.redemptions.create"], "DEFAULT_EXPIRY", expiry)
        made = UUID((await counter.create("100")).json()["id"])

        answer = await getattr(counter, call)(made)

        await counter.closed(made)
        status = await counter.status(made)
        assert (answer.status_code, status) in ((200, wanted), (409, "EXPIRED"))
        assert await counter.money() == (("50", "0") if status == "COMPLETED" else ("150", "0"))
        assert await counter.till.desk.entries("REDEMPTION") + await counter.till.desk.entries("RELEASE") == 1


async def test_a_call_that_temporal_refuses_leaves_no_complaint_of_asyncios(
    client_of: ClientOf, counter: Counter
) -> None:
    """The start fails together with the update. Nobody asks for its result, and asyncio logs such failures."""
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    nowhere = Client(counter.temporal.service_client, namespace="nowhere")
    alone = replace(counter, client=await client_of(Gateway(lambda: asyncio.sleep(0, nowhere), timeout_s=0.5)))

    problem(await alone.create(), 503, "service_unavailable")

    gc.collect()
    assert complaints == []


async def test_without_temporal_nothing_is_reserved_and_the_answer_is_503(cut_off: Counter) -> None:
    for key in ({}, {"idempotency_key": "k"}):
        problem(await cut_off.create(**key), 503, "service_unavailable")

    assert await cut_off.money() == ("150", "0")
    assert await cut_off.till.listed() == []


async def test_one_step_redemptions_need_no_temporal(cut_off: Counter) -> None:
    made = (await cut_off.create("100", requires_confirmation=False)).json()

    assert made["status"] == "COMPLETED"
    assert (await cut_off.reverse(UUID(made["id"]))).status_code == 201


@pytest.mark.parametrize("step", ["create", "confirm", "cancel", "reverse"])
async def test_a_call_answered_503_is_never_carried_out_not_even_when_a_worker_comes_back(
    client_of: ClientOf, counter: Counter, database: Database, settings: Settings, step: str
) -> None:
    """Temporal takes the call, but no worker is there. It comes back later and finds that it is too late."""
    queue = f"nobody-{new_id()}"
    gateway = Gateway(lambda: asyncio.sleep(0, counter.temporal), timeout_s=0.5)
    alone = replace(counter, client=await client_of(gateway))
    made = keyed_id(counter.till.desk.program_id, "redemption", "k")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(queues, "LIFECYCLE", queue)
        patch.setattr(queues, "LEDGER", f"ledger-of-{queue}")
        if step != "create":
            await counter.till.reserve("100", redemption_id=made, idempotency_key="k")
        if step == "reverse":
            await counter.till.confirm(made)
        before = await counter.money()
        answer = await (alone.create("100", idempotency_key="k") if step == "create" else getattr(alone, step)(made))
        problem(answer, 503, "service_unavailable")

        with ThreadPoolExecutor(settings.worker_drains) as executor:
            async with build_worker(counter.temporal, settings, database.clock, executor):
                if step in ("create", "reverse"):
                    assert await counter.handle(made).result() == ("NONE" if step == "create" else "COMPLETED")
                else:
                    await counter.handle(made).query("__temporal_workflow_metadata")
                assert await counter.money() == before
                if step in ("confirm", "cancel"):
                    assert await counter.status(made) == "PENDING"
                    await counter.handle(made).cancel()
                    assert await counter.closed(made) == CANCELED


async def test_what_was_done_while_nobody_listened_is_answered(client_of: ClientOf, counter: Counter) -> None:
    """The answers of Temporal are lost: the database says what was done, so the callers hear of it."""
    database, organization_id = counter.till.desk.database, counter.till.desk.organization_id

    class Deaf(Gateway):
        async def reserve_redemption(self, reservation: Any, wait_s: float) -> Any:
            await database.repeat(organization_id, lambda tx: two_step.reserve(tx, reservation))
            raise TemporalUnavailable("the line went dead")

        async def confirm_redemption(self, carried: Any, order: Any, wait_s: float) -> Any:
            await database.repeat(organization_id, lambda tx: two_step.confirm(tx, order))
            raise TemporalUnavailable("the line went dead")

        async def cancel_redemption(self, carried: Any, order: Any, wait_s: float) -> Any:
            await database.repeat(organization_id, lambda tx: two_step.cancel(tx, order))
            raise TemporalUnavailable("the line went dead")

        async def reverse_redemption(self, carried: Any, order: Any, wait_s: float) -> Any:
            await database.repeat(organization_id, lambda tx: two_step.reverse(tx, order))
            raise TemporalUnavailable("the line went dead")

    deaf = replace(counter, client=await client_of(Deaf(lambda: asyncio.sleep(0, counter.temporal), timeout_s=1)))

    first, second = await deaf.create("10"), await deaf.create("20", idempotency_key="k")
    assert [(answer.status_code, answer.headers.get("Idempotent-Replayed")) for answer in (first, second)] == [
        (201, None),
        (200, "true"),
    ]
    ids = [UUID(answer.json()["id"]) for answer in (first, second)]
    assert (await deaf.confirm(ids[0])).json()["status"] == "COMPLETED"
    assert (await deaf.cancel(ids[1])).json()["status"] == "CANCELED"
    reversal = await deaf.reverse(ids[0], amount="4")
    assert (reversal.status_code, reversal.json()["amount"]) == (201, "4.00")
    assert await counter.money() == ("144", "0")
