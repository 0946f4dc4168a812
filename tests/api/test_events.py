"""Events over HTTP, processed by a real worker.

Contract: rules-and-events.md 7 to 9, basics.md 7 and 8, holders.md 9. Examples carry their number in the contract.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest

from db.session import Database
from domain.ids import event_id
from tests.api.calls import all_pages, problem, wrong_fields
from tests.conftest import SettableClock, Tenant
from tests.events_support import TO_PROGRAM, HttpProgram, counter, credit, debit, settled, tag
from tests.ledger_invariants import assert_ledger_invariants

pytestmark = pytest.mark.usefixtures("running_worker")

PURCHASE = "event.type == 'purchase'"


@pytest.fixture
async def program(client: httpx.AsyncClient) -> HttpProgram:
    return await HttpProgram.open(client)


@pytest.fixture(autouse=True)
async def sound_ledger(database: Database, organization: Tenant) -> AsyncIterator[None]:
    yield
    async with database.transaction(organization.id) as tx:
        await assert_ledger_invariants(tx.connection, organization.id)


async def get(client: httpx.AsyncClient, path: str, **params: Any) -> Any:
    answer = await client.get(path, params=params)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def entries_of(client: httpx.AsyncClient, event: str) -> list[dict[str, Any]]:
    """The journal entries of an event, with their postings."""
    found = (await get(client, "/journal-entries", event_id=event))["data"]
    return [await get(client, f"/journal-entries/{entry['id']}") for entry in found]


async def set_status(client: httpx.AsyncClient, external_id: str, status: str) -> None:
    participant = (await client.post("/participants", json={"external_id": external_id})).json()["id"]
    answer = await client.patch(f"/participants/{participant}/status", json={"status": status})
    assert answer.status_code == 200, answer.text


# --- worked flows and examples ----------------------------------------------------------------------------------------


async def test_quickstart(client: httpx.AsyncClient) -> None:
    """basics.md 7 A, rules-and-events.md 9 example 19."""
    program = (await client.post("/programs", json={"name": "Customer Loyalty"})).json()["id"]
    asset = {
        "program_id": program,
        "name": "Points",
        "symbol": "PTS",
        "inventory_mode": "SIMPLE",
        "issuance_policy": "UNLIMITED",
        "scale": 0,
    }
    points = (await client.post("/assets", json=asset)).json()["id"]
    rule = {
        "program_id": program,
        "name": "10 Points per Purchase",
        "condition": 'event.type == "purchase"',
        "actions": [{"type": "CREDIT", "asset_id": points, "amount": "10"}],
    }
    assert (await client.post("/rules", json=rule)).status_code == 201
    event = {
        "program_id": program,
        "external_id": "user_123",
        "idempotency_key": "order-1",
        "event_timestamp": "2025-01-15T10:00:00Z",
        "event_data": {"type": "purchase"},
    }
    accepted = await client.post("/events", json=event)
    assert accepted.status_code == 202
    await settled(client, accepted.json()["id"])

    found = (await client.get("/participants", params={"external_id": "user_123"})).json()["data"]
    balances = (await client.get(f"/participants/{found[0]['id']}/balances")).json()["data"]
    assert balances == [{"asset_id": points, "symbol": "PTS", "available": "10", "held": "0", "deferred": "0"}]


@pytest.mark.parametrize("policy", ["UNLIMITED", "PREFUNDED"])
async def test_conditional_credit(program: HttpProgram, policy: str) -> None:
    """basics.md 7 B, rules-and-events.md 9 examples 1 and 2."""
    points = await program.asset(issuance_policy=policy)
    if policy == "PREFUNDED":
        await program.client.post(f"/programs/{program.id}/assets/{points}/fund", json={"amount": "100"})
    rule = await program.rule("event.type == 'purchase' && event.amount >= 100.0", credit(points, "10"))

    met = await program.run(type="purchase", amount=105.00)
    missed = await program.run(type="purchase", amount=99.99)

    assert (met["status"], missed["status"]) == ("COMPLETED", "COMPLETED")
    (entry,) = await entries_of(program.client, met["id"])
    assert (entry["action_type"], entry["event_id"], entry["rule_id"]) == ("CREDIT", met["id"], rule["id"])
    source = "PROGRAM" if policy == "PREFUNDED" else "SYSTEM_ISSUANCE"
    assert [(p["entity_type"], p["amount"]) for p in entry["postings"]] == [
        (source, "-10.00"),
        ("PARTICIPANT", "10.00"),
    ]
    assert await entries_of(program.client, missed["id"]) == []
    assert await program.available("alice", points) == "10.00"


async def test_counters_add_up(program: HttpProgram) -> None:
    """rules-and-events.md 9 example 4, holders.md 9 example 2."""
    await program.client.post("/participants", json={"external_id": "alice"})
    alice = (await program.participant())["id"]
    for key, value in (("purchase_count", "7"), ("lifetime_spend", "340.00")):
        await program.client.put(f"/participants/{alice}/state/counters/{key}", json={"value": value})
    await program.rule(PURCHASE, counter("purchase_count", "1"), counter("lifetime_spend", "event.amount"))

    await program.run(type="purchase", amount=49.99)

    assert (await program.participant())["counters"] == {"purchase_count": "8", "lifetime_spend": "389.99"}


async def test_a_welcome_bonus_is_paid_once(program: HttpProgram) -> None:
    """rules-and-events.md 9 example 5."""
    points = await program.asset(scale=0)
    condition = "event.type == 'signup' && !('welcome_bonus' in participant.tags)"
    await program.rule(condition, credit(points, "100"), tag("welcome_bonus"))

    await program.run(type="signup")
    assert await program.available("alice", points) == "100"
    await program.run(type="signup")
    assert await program.available("alice", points) == "100"


async def test_tags_are_matched_in_lower_case(program: HttpProgram) -> None:
    """rules-and-events.md 9 example 6."""
    await program.rule("event.type == 'join'", tag("VIP"))
    await program.rule('"vip" in participant.tags', counter("lower", "1"))
    await program.rule('"VIP" in participant.tags', counter("upper", "1"))

    await program.run(type="join")
    await program.run(type="visit")

    assert (await program.participant())["counters"] == {"lower": "1"}


async def test_a_completed_event_cannot_be_retried(program: HttpProgram) -> None:
    """rules-and-events.md 9 example 7."""
    event = await program.run()

    problem(await program.client.post(f"/events/{event['id']}/retry"), 409, "conflict")


async def test_a_duplicate_is_the_same_event(program: HttpProgram) -> None:
    """rules-and-events.md 9 example 8."""
    points = await program.asset()
    await program.rule("true", credit(points, "event.amount"))
    body = program.event(key="order-1", amount=1.5, note="x")
    first = await program.client.post("/events", json=body)
    await settled(program.client, first.json()["id"])

    reordered = dict(reversed(body.items())) | {"event_data": {"note": "x", "amount": 1.5}}
    text = json.dumps(reordered, indent=3).replace("1.5", "1.50")
    again = await program.client.post("/events", content=text)

    assert (again.status_code, again.json()["id"]) == (202, first.json()["id"])
    assert again.json()["status"] == "COMPLETED"
    assert again.headers["Idempotent-Replayed"] == "true"
    assert "Idempotent-Replayed" not in first.headers
    other = await program.client.post("/events", json=program.event(key="order-1", amount=1.6, note="x"))
    problem(other, 409, "idempotency_conflict")
    assert await program.available("alice", points) == "1.50"


async def test_a_batch_takes_the_good_items_and_names_the_bad_ones(program: HttpProgram) -> None:
    """rules-and-events.md 9 example 9."""
    await program.rule("true", counter("n", "1"))
    items = [program.event(f"p{n}") for n in range(10)]
    items[4]["program_id"] = "not-a-uuid"

    answer = await program.client.post("/events/batch", json={"events": items})

    assert answer.status_code == 202
    body = answer.json()
    assert (body["total"], body["success_count"], body["error_count"]) == (10, 9, 1)
    assert [result["index"] for result in body["results"]] == list(range(10))
    assert body["results"][4] == {"index": 4, "status": "error", "error": "invalid program_id"}
    for result in body["results"][:4] + body["results"][5:]:
        assert (result["status"], result["event"]["status"]) == ("accepted", "RECEIVED")
        assert (await settled(program.client, result["event"]["id"]))["status"] == "COMPLETED"


@pytest.mark.parametrize(("items", "status"), [(0, 400), (1, 202), (100, 202), (101, 400)])
async def test_a_batch_has_1_to_100_items(program: HttpProgram, items: int, status: int) -> None:
    """rules-and-events.md 9 example 10."""
    answer = await program.client.post("/events/batch", json={"events": [program.event() for _ in range(items)]})

    assert answer.status_code == status
    if status == 400:
        assert wrong_fields(answer) == {"events": "invalid"}


async def test_a_missing_field_skips_the_rule(program: HttpProgram) -> None:
    """rules-and-events.md 9 example 11."""
    await program.rule('event.coupon_code == "X"', tag("coupon"))
    await program.rule('has(event.coupon_code) && event.coupon_code == "X"', tag("coupon"))

    event = await program.run(type="purchase")

    assert (event["status"], event["rule_evaluations"]) == ("COMPLETED", [])
    detail = await get(program.client, f"/events/{event['id']}", include_skipped=True)
    (record,) = detail["rule_evaluations"]
    assert (record["status"], record["reason"], record["actions"]) == ("SKIPPED_ERROR", None, [])
    assert record["error_message"]


async def test_windows_go_by_the_wall_clock_and_now_by_the_event(program: HttpProgram, clock: SettableClock) -> None:
    """rules-and-events.md 9 example 13."""
    clock.set("2026-05-10T12:00:00Z")
    await program.rule("true", tag("promotion"), active_to="2026-05-09T12:00:00Z", name="promotion")
    await program.rule('now < timestamp("2025-02-01T00:00:00Z")', tag("early"), name="early")

    last_week = await program.run(event_timestamp="2026-05-03T12:00:00Z")
    january = await program.run(event_timestamp="2025-01-15T00:00:00Z")

    (record,) = last_week["rule_evaluations"]
    assert (record["rule_name"], record["status"], record["reason"]) == (
        "promotion",
        "SKIPPED",
        "OUTSIDE_TIME_WINDOW",
    )
    assert [record["status"] for record in january["rule_evaluations"]] == ["SKIPPED", "SUCCESS"]
    assert (await program.participant())["tags"] == ["early"]


@pytest.mark.parametrize("status", ["SUSPENDED", "CLOSED"])
async def test_an_inactive_participant_is_blocked_from_value_only(program: HttpProgram, status: str) -> None:
    """rules-and-events.md 9 example 15, holders.md 9 example 4."""
    points = await program.asset()
    await program.rule("event.type == 'purchase' && event.amount >= 100.0", credit(points, "10"))
    await program.rule("event.type == 'visit'", tag("visitor"))
    await program.rule("event.type == 'count'", counter("n", "1"))
    await program.run(type="purchase", amount=105)
    await set_status(program.client, "alice", status)

    credited = await program.run(type="purchase", amount=105)
    tagged = await program.run(type="visit")
    counted = await program.run(type="count")

    assert (credited["status"], tagged["status"], counted["status"]) == ("FAILED", "COMPLETED", "FAILED")
    assert credited["error_message"] == f"action CREDIT failed: participant is {status}"
    assert (await program.participant())["tags"] == ["visitor"]
    assert await program.available("alice", points) == "10.00"


async def test_two_rules_may_fire_on_one_event(program: HttpProgram) -> None:
    """rules-and-events.md 9 example 18."""
    points = await program.asset()
    await program.rule('event.mcc == "5812"', credit(points, "event.amount * 3"))
    await program.rule("event.amount > 100", credit(points, "100"))

    event = await program.run(amount=150.00, mcc="5812")

    assert sorted(entry["postings"][1]["amount"] for entry in await entries_of(program.client, event["id"])) == [
        "100.00",
        "450.00",
    ]
    assert await program.available("alice", points) == "550.00"


async def test_a_number_sent_as_text_needs_double(program: HttpProgram) -> None:
    """rules-and-events.md 9 example 20."""
    await program.rule("event.amount > 50.0", tag("plain"))
    await program.rule("double(event.amount) > 50.0", tag("double"))

    await program.run(amount="60")

    assert (await program.participant())["tags"] == ["double"]


@pytest.mark.parametrize("status", ["SUSPENDED", "ARCHIVED"])
async def test_an_event_to_a_program_that_is_not_active_is_refused(program: HttpProgram, status: str) -> None:
    """basics.md 8 example 10."""
    points = await program.asset()
    await program.rule("true", credit(points, "1"))
    await program.client.patch(f"/programs/{program.id}", json={"status": status})

    problem(await program.client.post("/events", json=program.event()), 409, "program_inactive")
    batch = (await program.client.post("/events/batch", json={"events": [program.event()]})).json()

    assert batch["error_count"] == 1
    assert batch["results"][0]["error"].startswith("program_inactive")
    assert (await get(program.client, "/events"))["data"] == []


async def test_reject_refuses_strangers_and_enrolls_whom_it_knows(client: httpx.AsyncClient) -> None:
    """basics.md 8 example 11."""
    program = await HttpProgram.open(client, on_unknown_participant="REJECT")
    await client.post("/participants", json={"external_id": "known"})

    stranger, known = await program.run("stranger"), await program.run("known")

    assert (stranger["status"], stranger["error_message"]) == ("FAILED", "unknown participant")
    assert stranger["participant_id"] is None
    assert (await get(client, "/participants", external_id="stranger"))["data"] == []
    assert known["status"] == "COMPLETED"
    assert (await program.participant("known"))["program_ids"] == [program.id]


async def test_a_rules_credit_draws_on_the_wallet(program: HttpProgram) -> None:
    """basics.md 8 example 24, its movements and the balance they leave."""
    points = await program.asset(issuance_policy="PREFUNDED")
    await program.rule("true", credit(points, "200.00"))
    for call, amount in (("fund", "10000.00"), ("burn", "500.00")):
        path = f"/programs/{program.id}/assets/{points}/{call}"
        assert (await program.client.post(path, json={"amount": amount})).status_code == 200
    event = await program.run()

    (wallet,) = (await get(program.client, f"/programs/{program.id}/balance"))["data"]
    assert (wallet["asset_id"], wallet["available"]) == (points, "9300.00")
    (entry,) = await entries_of(program.client, event["id"])
    source = entry["postings"][0]
    assert (source["entity_type"], source["program_id"], source["amount"]) == ("PROGRAM", program.id, "-200.00")


# --- accepting --------------------------------------------------------------------------------------------------------


async def test_the_answer_to_an_accepted_event(program: HttpProgram) -> None:
    body = program.event("alice", key="order-1", event_timestamp="2025-01-15T11:00:00.5+01:00")

    answer = await program.client.post("/events", json=body)

    assert answer.status_code == 202
    assert answer.json() == {
        "id": str(event_id(UUID(program.id), "order-1")),
        "program_id": program.id,
        "participant_id": None,
        "external_id": "alice",
        "idempotency_key": "order-1",
        "event_timestamp": "2025-01-15T10:00:00.500000Z",
        "status": "RECEIVED",
    }


async def test_the_whole_event_as_it_is_shown(program: HttpProgram) -> None:
    rule = await program.rule("true", counter("n", "event.n"), name="count")

    event = await program.run("alice", key="order-1", n=2)

    alice = (await program.participant())["id"]
    (record,) = event.pop("rule_evaluations")
    assert {name: event[name] for name in ("received_at", "created_at", "processed_at", "updated_at")}
    for name in ("received_at", "created_at", "processed_at", "updated_at"):
        assert event.pop(name).endswith("Z")
    assert event == {
        "id": str(event_id(UUID(program.id), "order-1")),
        "program_id": program.id,
        "participant_id": alice,
        "external_id": "alice",
        "recipient_id": None,
        "idempotency_key": "order-1",
        "event_type": "EXTERNAL",
        "event_data": {"n": 2},
        "event_timestamp": "2025-01-15T10:00:00Z",
        "status": "COMPLETED",
        "error_message": None,
    }
    versions = (await get(program.client, f"/rules/{rule['id']}/history"))["data"]
    assert UUID(record.pop("id"))
    assert record.pop("created_at").endswith("Z")
    assert record == {
        "rule_id": rule["id"],
        "rule_name": "count",
        "rule_history_id": versions[0]["id"],
        "status": "SUCCESS",
        "reason": None,
        "error_message": None,
        "stopped_by_rule_id": None,
        "actions": [
            {
                "type": "COUNTER",
                "key": "n",
                "value": "2",
                "new_value": "2",
                "target": {"type": "PARTICIPANT", "id": alice},
            }
        ],
    }


@pytest.mark.parametrize("missing", ["program_id", "external_id", "idempotency_key", "event_timestamp", "event_data"])
async def test_every_required_field_is_named_when_it_is_missing(program: HttpProgram, missing: str) -> None:
    body = program.event()
    del body[missing]

    assert wrong_fields(await program.client.post("/events", json=body)) == {missing: "required"}
    batch = (await program.client.post("/events/batch", json={"events": [body, program.event()]})).json()
    assert [result["status"] for result in batch["results"]] == ["error", "accepted"]
    assert batch["results"][0]["error"] == f"missing {missing}"


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"program_id": "x"}, "program_id"),
        ({"program_id": None}, "program_id"),
        ({"participant_id": str(uuid4())}, "external_id"),
        ({"external_id": ""}, "external_id"),
        ({"external_id": "x" * 256}, "external_id"),
        ({"external_id": 5}, "external_id"),
        ({"external_id": None, "participant_id": "x"}, "participant_id"),
        ({"recipient_id": str(uuid4()), "recipient_external_id": "bob"}, "recipient_id"),
        ({"recipient_id": "x"}, "recipient_id"),
        ({"recipient_external_id": ""}, "recipient_external_id"),
        ({"idempotency_key": ""}, "idempotency_key"),
        ({"idempotency_key": "x" * 256}, "idempotency_key"),
        ({"idempotency_key": "automation:x"}, "idempotency_key"),
        ({"event_timestamp": "2025-01-15"}, "event_timestamp"),
        ({"event_timestamp": "2025-01-15T10:00:00"}, "event_timestamp"),
        ({"event_timestamp": 1736935200}, "event_timestamp"),
        ({"event_data": []}, "event_data"),
        ({"event_data": "x"}, "event_data"),
        ({"event_data": None}, "event_data"),
        ({"event_data": {"text": "x" * 65_536}}, "event_data"),
    ],
)
async def test_a_wrong_field_is_named_and_consumes_no_key(
    program: HttpProgram, changes: dict[str, Any], field: str
) -> None:
    good = program.event(key="k")
    body = good | changes

    assert list(wrong_fields(await program.client.post("/events", json=body))) == [field]
    batch = (await program.client.post("/events/batch", json={"events": [body]})).json()
    assert batch["error_count"] == 1
    assert field in batch["results"][0]["error"]
    answer = await program.client.post("/events", json=good)
    assert (answer.status_code, "Idempotent-Replayed" in answer.headers) == (202, False)


@pytest.mark.parametrize("levels", [33, 64, 300, 900])
async def test_a_payload_that_nests_too_deep_is_refused(program: HttpProgram, levels: int) -> None:
    deep = '{"a":' * levels + "1" + "}" * levels
    text = json.dumps(program.event(key="k")).replace('"event_data": {}', f'"event_data": {deep}')

    answer = await program.client.post("/events", content=text)

    problem(answer)
    batch = await program.client.post("/events/batch", content=f'{{"events": [{text}]}}')
    assert batch.status_code in (202, 400)
    assert batch.status_code == 400 or batch.json()["error_count"] == 1


@pytest.mark.parametrize(
    "fragment",
    [
        '{"n": NaN}',
        '{"n": Infinity}',
        '{"n": 1, "n": 1}',
        '{"n": "\\u0000"}',
        '{"\\ud800": 1}',
        '{"n": 1e65}',
        '{"n": }',
    ],
)
async def test_a_payload_that_is_no_exact_json_is_refused(program: HttpProgram, fragment: str) -> None:
    text = json.dumps(program.event()).replace('"event_data": {}', f'"event_data": {fragment}')

    problem(await program.client.post("/events", content=text))


async def test_a_payload_comes_back_number_by_number(program: HttpProgram) -> None:
    data = (
        '{"price":1.50,"zero":0,"hundred":100,"small":0.0000010,'
        '"forty":1234567890123456789012345678901234567890,"text":"1.50","list":[1.0,2.00]}'
    )
    text = json.dumps(program.event()).replace('"event_data": {}', f'"event_data": {data}')
    event = (await program.client.post("/events", content=text)).json()["id"]
    await settled(program.client, event)

    detail = (await program.client.get(f"/events/{event}")).text
    listed = (await program.client.get("/events")).text

    for number in ("1.50", "0", "100", "1234567890123456789012345678901234567890", "[1.0,2.00]"):
        assert f":{number}" in detail
    assert '"list":[1.0,2.00]' in listed
    assert '"text":"1.50"' in detail


async def test_items_of_a_batch_that_are_no_objects_are_errors_of_their_own(program: HttpProgram) -> None:
    items: list[Any] = [None, 5, "x", [], program.event(), {}]

    body = (await program.client.post("/events/batch", json={"events": items})).json()

    assert [result["status"] for result in body["results"]] == ["error"] * 4 + ["accepted", "error"]
    assert body["results"][0]["error"] == "invalid event"


async def test_duplicates_within_a_batch(program: HttpProgram) -> None:
    first, other = program.event(key="k", n=1), program.event(key="k", n=2)

    body = (await program.client.post("/events/batch", json={"events": [first, other, first]})).json()

    assert [result["status"] for result in body["results"]] == ["accepted", "error", "accepted"]
    assert body["results"][0]["event"]["id"] == body["results"][2]["event"]["id"]
    assert "idempotency_conflict" in body["results"][1]["error"]


async def test_an_unknown_program_is_404_and_another_organizations_too(
    program: HttpProgram, other_client: httpx.AsyncClient
) -> None:
    body = program.event()

    problem(await program.client.post("/events", json=body | {"program_id": str(uuid4())}), 404, "not_found")
    problem(await other_client.post("/events", json=body), 404, "not_found")
    batch = (await other_client.post("/events/batch", json={"events": [body]})).json()
    assert batch["results"] == [{"index": 0, "status": "error", "error": "invalid program_id"}]


async def test_many_clients_at_once_with_one_key_make_one_event(program: HttpProgram) -> None:
    points = await program.asset()
    await program.rule("true", credit(points, "1"))
    body = program.event(key="k")

    answers = await asyncio.gather(*(program.client.post("/events", json=body) for _ in range(20)))

    assert {answer.status_code for answer in answers} == {202}
    assert sum("Idempotent-Replayed" not in answer.headers for answer in answers) == 1
    await settled(program.client, answers[0].json()["id"])
    assert await program.available("alice", points) == "1.00"


# --- reading ----------------------------------------------------------------------------------------------------------


async def test_events_are_listed_by_every_filter(program: HttpProgram, clock: SettableClock) -> None:
    client = program.client
    other = await HttpProgram.open(client)
    rule = await program.rule("event.n == 1", tag("x"))
    await program.rule("event.n == 2", counter("x", "event.missing"))
    clock.set("2026-03-01T00:00:00Z")
    first = await program.run("alice", n=1, event_timestamp="2025-01-03T00:00:00Z")
    clock.advance(hours=1)
    second = await program.run("bob", n=2, event_timestamp="2025-01-02T00:00:00Z")
    clock.advance(hours=1)
    third = await other.run("alice", n=3, event_timestamp="2025-01-01T00:00:00Z")
    alice, bob = (await program.participant("alice"))["id"], (await program.participant("bob"))["id"]

    async def ids(path: str = "/events", **params: Any) -> list[str]:
        return [event["id"] for event in await all_pages(client, path, limit=2, **params)]

    one, two, three = first["id"], second["id"], third["id"]
    assert await ids() == [three, two, one]
    assert await ids(sort_dir="asc") == [one, two, three]
    assert await ids(sort_by="event_timestamp") == [one, two, three]
    assert await ids(sort_by="status", sort_dir="asc") in ([one, three, two], [three, one, two])
    assert await ids(program_id=program.id) == [two, one]
    assert await ids(status="FAILED") == [two]
    assert await ids(event_type="EXTERNAL") == [three, two, one]
    assert await ids(event_type="SYSTEM") == []
    assert await ids(participant_id=alice) == [three, one]
    assert await ids(external_id="bob") == [two]
    assert await ids(rule_id=rule["id"]) == [one]
    assert await ids(**{"from": "2026-03-01T01:00:00Z", "to": "2026-03-01T01:00:00Z"}) == [two]
    assert await ids(event_from="2025-01-02T00:00:00Z", event_to="2025-01-02T00:00:00Z") == [two]
    assert await ids(**{"from": "2026-03-01T01:00:00Z", "event_from": "2025-01-02T00:00:00Z"}) == [two]

    activity = f"/participants/{alice}/activity/events"
    assert await ids(activity) == [three, one]
    assert await ids(activity, program_id=program.id) == [one]
    assert await ids(activity, status="FAILED") == []
    assert await ids(f"/participants/{bob}/activity/events", status="FAILED") == [two]
    assert await ids(activity, event_to="2025-01-01T00:00:00Z") == [three]
    assert "rule_evaluations" not in (await get(client, "/events"))["data"][0]


async def test_an_event_of_another_organization_does_not_exist(
    program: HttpProgram, other_client: httpx.AsyncClient
) -> None:
    event = await program.run()

    problem(await other_client.get(f"/events/{event['id']}"), 404, "not_found")
    problem(await other_client.post(f"/events/{event['id']}/retry"), 404, "not_found")
    problem(await other_client.get(f"/participants/{event['participant_id']}/activity/events"), 404, "not_found")
    problem(await program.client.get(f"/events/{uuid4()}"), 404, "not_found")
    assert (await get(other_client, "/events"))["data"] == []


async def test_a_stopped_rule_names_who_stopped_it(program: HttpProgram) -> None:
    first = await program.rule("true", tag("a"), stop_after_match=True)
    second = await program.rule("true", tag("b"))

    event = await program.run()

    stopped = event["rule_evaluations"][1]
    assert (stopped["rule_id"], stopped["status"], stopped["reason"], stopped["stopped_by_rule_id"]) == (
        second["id"],
        "SKIPPED",
        "STOPPED_BY_PRIOR_RULE",
        first["id"],
    )


# --- failing and retrying ---------------------------------------------------------------------------------------------


async def test_a_failed_event_leaves_nothing_but_its_story(program: HttpProgram) -> None:
    points = await program.asset(scale=0)
    await program.rule("true", credit(points, "10"), tag("x"), counter("n", "1"), counter("n", "1", **TO_PROGRAM))
    await program.rule("true", credit(points, "event.amount"))

    event = await program.run(amount=0.5)

    assert (event["status"], event["error_message"]) == (
        "FAILED",
        "action CREDIT failed: amount exceeds asset scale",
    )
    assert [record["status"] for record in event["rule_evaluations"]] == ["SUCCESS", "FAILED"]
    assert await entries_of(program.client, event["id"]) == []
    alice = await program.participant()
    assert (alice["tags"], alice["counters"], alice["balances"]) == ([], {}, [])
    assert (await get(program.client, f"/programs/{program.id}/state/counters"))["data"] == []


async def test_a_retry_succeeds_once_its_cause_is_gone(program: HttpProgram) -> None:
    points = await program.asset()
    await program.rule("event.type == 'spend'", debit(points, "10"))
    await program.rule("event.type == 'earn'", credit(points, "10"))
    failed = await program.run(type="spend")
    assert failed["status"] == "FAILED"
    await program.run(type="earn")

    answer = await program.client.post(f"/events/{failed['id']}/retry")

    assert answer.status_code == 200
    assert answer.json() == {
        "event_id": failed["id"],
        "message": "Event queued for retry",
        "previous_error": "action DEBIT failed: insufficient balance",
        "previous_status": "FAILED",
        "status": "PENDING",
    }
    after = await settled(program.client, failed["id"])
    assert (after["status"], after["error_message"]) == ("COMPLETED", None)
    assert await program.available("alice", points) == "0.00"


async def test_of_many_retries_at_once_one_is_taken(program: HttpProgram) -> None:
    points = await program.asset()
    await program.rule("true", debit(points, "10"))
    failed = await program.run()

    answers = await asyncio.gather(*(program.client.post(f"/events/{failed['id']}/retry") for _ in range(8)))

    # Between two of them the event may have failed again, so that more than one can be right to be taken.
    codes = [answer.status_code for answer in answers]
    assert 200 in codes
    assert set(codes) <= {200, 409}
    assert (await settled(program.client, failed["id"]))["status"] == "FAILED"


async def test_failed_events_are_retried_in_bulk(program: HttpProgram, clock: SettableClock) -> None:
    clock.set("2026-03-01T00:00:00Z")
    points = await program.asset(scale=0)
    rule = await program.rule("true", credit(points, "event.amount"), counter("n", "1"))
    failed = []
    for _ in range(3):
        failed.append(await program.run(amount=0.5))
        clock.advance(hours=1)
    text = await program.run(amount="x")
    good = await program.run(amount=1)
    await program.client.patch(f"/rules/{rule['id']}", json={"actions": [counter("retried", "1")]})

    async def retry(**fields: Any) -> int:
        answer = await program.client.post("/events/retry", json={"program_id": program.id, **fields})
        assert answer.status_code == 202, answer.text
        for event in [*failed, text, good]:
            await settled(program.client, event["id"])
        return int(answer.json()["count"])

    assert await retry(error_contains="no such error") == 0
    assert await retry(**{"from": "2026-03-01T01:00:00Z", "to": "2026-03-01T01:00:00Z"}) == 1
    assert await retry(error_contains="exceeds asset scale") == 2
    assert await retry() == 1
    assert await retry() == 0
    assert (await program.participant())["counters"] == {"n": "1", "retried": "4"}


async def test_a_bulk_retry_of_a_strange_program_is_404(program: HttpProgram, other_client: httpx.AsyncClient) -> None:
    problem(await other_client.post("/events/retry", json={"program_id": program.id}), 404, "not_found")
    answer = await program.client.post(
        "/events/retry", json={"program_id": program.id, "from": "2026-03-02T00:00:00Z", "to": "2026-03-01T00:00:00Z"}
    )
    assert list(wrong_fields(answer)) == ["to"]


async def test_a_client_sees_its_effects_once_the_event_is_completed(program: HttpProgram) -> None:
    """COMPLETED appears together with the effects, never before them."""
    points = await program.asset()
    await program.rule("true", credit(points, "1"))

    for n in range(1, 6):
        await program.run()
        assert await program.available("alice", points) == f"{n}.00"


async def test_a_processed_at_lies_between_acceptance_and_now(program: HttpProgram) -> None:
    before = datetime.now(UTC)
    event = await program.run()

    received, processed = (datetime.fromisoformat(event[name]) for name in ("received_at", "processed_at"))
    assert before <= received <= processed <= datetime.now(UTC)
