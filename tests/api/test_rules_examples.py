"""The worked examples of rules over HTTP, processed by a real worker. Contract: rules-and-events.md 9, holders.md 9.

Of rules-and-events.md 9, these are in other files: 1, 2, 4 to 11, 13, 15 and 18 to 20 in test_events.py, each under its
number; 3, 12 and 14 in test_rules.py (`test_a_match_shows_what_would_be_credited`,
`test_a_missing_field_fails_the_condition_with_a_reason`, `test_without_an_order_a_rule_comes_10_after_the_highest`).
Of holders.md 9, 2 and 4 are in test_events.py; here are those in which rules make lots.
"""

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from temporalio.client import Client

from db.session import Database
from domain.ids import new_id
from tests.api.calls import new_participant, problem
from tests.conftest import SettableClock, Tenant
from tests.events_support import HttpProgram, credit, debit, move, tag
from tests.ledger_invariants import assert_ledger_invariants
from tests.program_support import (
    Buckets,
    Posting,
    amounts,
    buckets,
    entries_of,
    holds_of,
    lots_of,
    post,
    postings,
    verdicts,
)
from workflows import queues
from workflows.upkeep import Upkeep, UpkeepInput

pytestmark = pytest.mark.usefixtures("running_worker")

MORNING = "2025-01-15T10:00:00Z"


@pytest.fixture
async def program(client: httpx.AsyncClient) -> HttpProgram:
    return await HttpProgram.open(client)


@pytest.fixture(autouse=True)
async def sound_ledger(database: Database, organization: Tenant) -> AsyncIterator[None]:
    yield
    async with database.transaction(organization.id) as tx:
        await assert_ledger_invariants(tx.connection, organization.id)


async def call(program: HttpProgram, operation: str, asset_id: str, **fields: Any) -> httpx.Response:
    """A balance operation on alice by the API."""
    alice = (await program.participant())["id"]
    body = {"program_id": program.id, "asset_id": asset_id, "description": "by hand", **fields}
    return await program.client.post(f"/participants/{alice}/balances/{operation}", json=body)


# --- rules-and-events.md 9 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("void", ["rule", "call"])
async def test_a_void_leaves_a_hold_of_own_funds_alone(program: HttpProgram, void: str) -> None:
    """Example 16; by the direct operation it is refused, as holders.md 6.6 says."""
    points = await program.asset(inventory_mode="LOT")
    await program.rule("event.type == 'earn'", credit(points, "80"))
    await program.rule("event.type == 'hold'", move("HOLD", points, "50", reference_id="event.reference"))
    await program.rule("event.type == 'void'", move("VOID_HOLD", points, reference_id="event.reference"), name="void")
    await program.run(type="earn")
    await program.run(type="hold", reference="B")

    if void == "rule":
        event = await program.run(type="void", reference="B")
        assert (event["status"], verdicts(event), amounts(event)) == (
            "COMPLETED",
            {"void": "SUCCESS"},
            {"void": "0.00"},
        )
        assert await entries_of(program.client, event_id=event["id"]) == []
    else:
        problem(await call(program, "void-hold", points, reference_id="B"), 422, "insufficient_balance")

    assert await buckets(program, points) == Buckets("30.00", "50.00", "0.00")
    (hold,) = await holds_of(program)
    assert (hold["status"], hold["remaining"], hold["reference_id"]) == ("ACTIVE", "50.00", "B")


async def test_a_lot_expires_a_duration_after_it_was_made(program: HttpProgram, clock: SettableClock) -> None:
    """Example 17, holders.md example 7: from the lot's creation, whatever the event's own time."""
    points = await program.asset(inventory_mode="LOT", scale=0)
    await program.rule("true", credit(points, "100", expires_at="8760h"))
    clock.set(MORNING)

    await program.run(event_timestamp="2024-06-01T00:00:00Z")

    (lot,) = await lots_of(program, points)
    assert lot.pop("id")
    assert lot == {
        "asset_id": points,
        "amount": "100",
        "remaining": "100",
        "status": "AVAILABLE",
        "created_at": MORNING,
        "expires_at": "2026-01-15T10:00:00Z",
        "matures_at": None,
        "reference_id": None,
    }


async def test_sets_are_compared(program: HttpProgram) -> None:
    """Example 21, the participant's own tags included."""
    await program.rule('sets.contains(["vip","gold"], ["vip","gold"])', tag("equal"))
    await program.rule('sets.intersects(["vip"], ["vip","silver"])', tag("overlapping"))
    await program.rule('sets.contains(["vip"], ["vip","gold"])', tag("wrong"))
    await program.rule("sets.contains(participant.tags, event.all_of)", tag("has_all"))
    await program.rule("sets.intersects(participant.tags, event.any_of)", tag("has_any"))
    await program.client.post("/participants", json={"external_id": "alice", "tags": ["VIP", "gold"]})

    await program.run(all_of=["vip", "gold", "silver"], any_of=["silver", "gold"])

    assert set((await program.participant())["tags"]) == {"vip", "gold", "equal", "overlapping", "has_any"}


# --- holders.md 9 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("void", ["rule", "call"])
async def test_what_was_credited_to_held_is_voided_back_to_issuance(program: HttpProgram, void: str) -> None:
    """Example 9: by a rule or by the direct operation; own funds held under the same reference stay."""
    points = await program.asset(inventory_mode="LOT", scale=0)
    await program.rule("event.type == 'authorize'", credit(points, "10", bucket="HELD", reference_id="event.reference"))
    await program.rule("event.type == 'earn'", credit(points, "7"))
    await program.rule("event.type == 'hold'", move("HOLD", points, "7", reference_id="event.reference"))
    await program.rule("event.type == 'void'", move("VOID_HOLD", points, reference_id="event.reference"))
    await program.run(type="authorize", reference="auth1")
    assert await buckets(program, points) == Buckets("0", "10", "0")
    await program.run(type="earn")
    await program.run(type="hold", reference="auth1")

    if void == "rule":
        await program.run(type="void", reference="auth1")
    else:
        assert (await call(program, "void-hold", points, reference_id="auth1")).status_code == 200

    assert await buckets(program, points) == Buckets("0", "7", "0")
    authorized, _, _, voided = await entries_of(program.client, asset_id=points)
    assert postings(authorized) == {
        Posting("SYSTEM_ISSUANCE", "AVAILABLE", "-10"),
        Posting("PARTICIPANT", "HELD", "10"),
    }
    assert postings(voided) == {
        Posting("PARTICIPANT", "HELD", "-10"),
        Posting("SYSTEM_ISSUANCE", "AVAILABLE", "10"),
    }
    assert (voided["action_type"], voided["reference_id"]) == ("VOID_HOLD", "auth1")
    assert {hold["status"]: hold["remaining"] for hold in await holds_of(program)} == {"VOIDED": "0", "ACTIVE": "7"}


async def test_deferred_value_is_out_of_reach_until_the_sweep_matures_it(
    program: HttpProgram, clock: SettableClock, temporal: Client
) -> None:
    """Example 10."""
    points = await program.asset(inventory_mode="LOT", scale=0)
    await program.rule("event.type == 'earn'", credit(points, "500", matures_at="720h"))
    await program.rule("event.type == 'hold'", move("HOLD", points, "1"))
    await program.rule("event.type == 'spend'", debit(points, "1"))
    clock.set(MORNING)
    await program.run(type="earn")
    assert await buckets(program, points) == Buckets("0", "0", "500")

    async def sweep() -> None:
        run_id = f"upkeep-of-a-test-{new_id()}"
        await temporal.execute_workflow(Upkeep.run, UpkeepInput(), id=run_id, task_queue=queues.LEDGER)

    for by_rule in ("hold", "spend"):
        event = await program.run(type=by_rule)
        assert event["status"] == "FAILED"
        assert event["error_message"].endswith("insufficient balance")
    for operation, fields in (
        ("hold", {"amount": "1"}),
        ("adjust", {"type": "DEBIT", "amount": "1"}),
        ("forfeit", {"bucket": "AVAILABLE", "amount": "1"}),
    ):
        problem(await call(program, operation, points, **fields), 422, "insufficient_balance")
    transfer = {
        "program_id": program.id,
        "asset_id": points,
        "source_external_id": "alice",
        "recipients": [{"participant_id": (await new_participant(program.client))["id"], "amount": "1"}],
        "description": "Dinner",
    }
    problem(await program.client.post("/transfers", json=transfer), 422, "insufficient_balance")
    clock.set("2025-02-14T09:59:59.999999Z")
    await sweep()
    assert await buckets(program, points) == Buckets("0", "0", "500"), "it is not due yet"
    clock.set("2025-02-14T10:00:00Z")
    await sweep()

    assert await buckets(program, points) == Buckets("500", "0", "0")
    (matured,) = await entries_of(program.client, action_type="MATURITY")
    assert postings(matured) == {Posting("PARTICIPANT", "DEFERRED", "-500"), Posting("PARTICIPANT", "AVAILABLE", "500")}
    assert (matured["event_id"], matured["rule_id"], matured["created_by_api_key_id"]) == (None, None, None)
    (lot,) = await lots_of(program, points)
    assert (lot["status"], lot["created_at"]) == ("AVAILABLE", MORNING), "its age counts from when it was earned"
    await sweep()
    assert len(await entries_of(program.client, asset_id=points)) == 2, "a second run writes nothing"
    assert (await post(program.client, "/transfers", **transfer))["total_amount"] == "1"
