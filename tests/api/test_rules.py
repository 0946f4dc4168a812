"""Rules over HTTP. Contract: rules-and-events.md 2, 4 to 6, 8 and the examples of section 9."""

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import httpx
import psycopg
import pytest

from api.rules import ACTION_FIELDS, TARGET_FIELDS, RuleOut, RuleVersionOut, Simulation
from db.session import Database
from db.tables import Asset, ProgramAsset
from domain import limits
from domain.ids import new_id
from domain.rules import fields, store
from domain.rules.store import ORDER_MAX
from tests.conftest import SettableClock, Tenant

PURCHASE = "event.type == 'purchase'"
TAG = {"type": "TAG", "tag": "VIP"}

NewAsset = Callable[..., Awaitable[str]]
NewRule = Callable[..., Awaitable[dict[str, Any]]]


@pytest.fixture
async def program_id(client: httpx.AsyncClient) -> str:
    return str((await client.post("/programs", json={"name": "Loyalty"})).json()["id"])


@pytest.fixture
def new_asset(database: Database, organization: Tenant, program_id: str) -> NewAsset:
    """Make an asset of the organization, linked to the program unless `linked` says otherwise."""

    async def make(symbol: str = "POINTS", scale: int = 0, *, linked: bool = True, **more: Any) -> str:
        async with database.transaction(organization.id) as tx:
            fields: dict[str, Any] = {
                "inventory_mode": "SIMPLE",
                "issuance_policy": "UNLIMITED",
                "status": "ACTIVE",
                "created_at": tx.now,
                "updated_at": tx.now,
            }
            asset = Asset(
                organization_id=tx.organization_id,
                id=new_id(),
                name=symbol,
                symbol=symbol,
                scale=scale,
                **(fields | more),
            )
            await tx.insert(asset)
            if linked:
                link = ProgramAsset(
                    organization_id=tx.organization_id,
                    program_id=UUID(program_id),
                    asset_id=asset.id,
                    created_at=tx.now,
                )
                await tx.insert(link)
        return str(asset.id)

    return make


@pytest.fixture
def new_rule(client: httpx.AsyncClient, program_id: str) -> NewRule:
    async def make(**fields: Any) -> dict[str, Any]:
        answer = await client.post("/rules", json=rule_body(program_id, **fields))
        assert answer.status_code == 201, answer.text
        created: dict[str, Any] = answer.json()
        return created

    return make


def rule_body(program_id: str, /, **fields: Any) -> dict[str, Any]:
    return {"program_id": program_id, "name": "Base", "condition": PURCHASE, "actions": [TAG]} | fields


def credit(asset_id: str, amount: str = "10", **more: Any) -> dict[str, Any]:
    return {"type": "CREDIT", "asset_id": asset_id, "amount": amount, **more}


def assert_refused(answer: httpx.Response, status: int, code: str, field: str | None = None) -> dict[str, Any]:
    body: dict[str, Any] = answer.json()
    assert (answer.status_code, body["code"]) == (status, code), answer.text
    if field is not None:
        assert body["details"]["field"] == field
        assert field in [problem["field"] for problem in body["details"]["fields"]]
    return body


# --- create and read --------------------------------------------------------------------------------------------------


async def test_a_rule_needs_a_program_a_name_a_condition_and_an_action(
    client: httpx.AsyncClient, program_id: str
) -> None:
    answer = await client.post("/rules", json=rule_body(program_id))

    assert answer.status_code == 201
    rule = answer.json()
    assert rule | {"id": "", "created_at": "", "updated_at": ""} == {
        "id": "",
        "program_id": program_id,
        "name": "Base",
        "description": None,
        "condition": PURCHASE,
        "actions": [TAG],
        "order": 10,
        "stop_after_match": False,
        "active_from": None,
        "active_to": None,
        "budgets": [],
        "status": "ACTIVE",
        "created_at": "",
        "updated_at": "",
    }
    assert (await client.get(f"/rules/{rule['id']}")).json() == rule
    RuleOut.model_validate(rule, strict=False)


async def test_everything_that_can_be_given_comes_back(client: httpx.AsyncClient, program_id: str) -> None:
    given = {
        "name": "Dining 5%",
        "description": "Restaurants",
        "order": 100,
        "stop_after_match": True,
        "active_from": "2026-01-01T00:00:00Z",
        "active_to": "2026-02-01T00:00:00.5Z",
        "budgets": [],
        "status": "SUSPENDED",
        "actions": [{"type": "COUNTER", "key": "n", "value": "1", "payload": {"price": 1.50, "n": 12}, "tag": None}],
    }

    rule = (await client.post("/rules", json=rule_body(program_id, **given))).json()

    assert {name: rule[name] for name in given} == given | {"active_to": "2026-02-01T00:00:00.500000Z"}


async def test_actions_come_back_number_by_number(client: httpx.AsyncClient, program_id: str) -> None:
    body = (
        f'{{"program_id":"{program_id}","name":"n","condition":"true",'
        '"actions":[{"type":"TAG","tag":"x","payload":{"a":1.50,"b":12345678901234567890.123456789}}]}'
    )

    answer = await client.post("/rules", content=body)

    assert '"a":1.50' in answer.text
    assert "12345678901234567890.123456789" in (await client.get(f"/rules/{answer.json()['id']}")).text


@pytest.mark.parametrize("missing", ["program_id", "name", "condition", "actions"])
async def test_a_missing_field_is_required(client: httpx.AsyncClient, program_id: str, missing: str) -> None:
    body = rule_body(program_id)
    del body[missing]

    refused = assert_refused(await client.post("/rules", json=body), 400, "bad_request", missing)

    assert refused["details"]["reason"] == "required"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("program_id", "not-a-uuid"),
        ("name", ""),
        ("name", "x" * 256),
        ("name", 5),
        ("description", "x" * 1_001),
        ("condition", ""),
        ("condition", "   "),
        ("condition", True),
        ("condition", "event.type = 'purchase'"),
        ("condition", "event.amount >"),
        ("condition", "unknown_function(event.amount) > 1"),
        ("condition", "a" * (limits.EXPRESSION_CHARS + 1)),
        ("condition", "(" * 65 + "true" + ")" * 65),
        ("condition", "!" * 1_000 + "true"),
        ("condition", "[" * 4_000),
        ("actions", []),
        ("actions", {}),
        ("actions", [TAG] * 500),
        ("order", 0),
        ("order", -1),
        ("order", 1.5),
        ("order", "10"),
        ("order", True),
        ("order", ORDER_MAX + 1),
        ("order", 10**30),
        ("stop_after_match", "true"),
        ("stop_after_match", 1),
        ("active_from", "2026-01-01"),
        ("active_to", "yesterday"),
        ("active_to", 1767225600),
        ("status", "ARCHIVED"),
        ("status", "active"),
        ("budgets", {}),
    ],
)
async def test_a_wrong_field_is_named(client: httpx.AsyncClient, program_id: str, field: str, value: Any) -> None:
    answer = await client.post("/rules", json=rule_body(program_id, **{field: value}))

    assert_refused(answer, 400, "bad_request", field)
    assert (await client.get("/rules")).json()["data"] == []


async def test_a_condition_that_does_not_compile_is_explained(client: httpx.AsyncClient, program_id: str) -> None:
    answer = await client.post("/rules", json=rule_body(program_id, condition="event.amount > 1\n&& event.type = 'x'"))

    message = assert_refused(answer, 400, "bad_request", "condition")["details"]["fields"][0]["message"]
    assert "line 2, column 15" in message
    assert "use ==" in message


async def test_problems_of_condition_and_actions_are_reported_together(
    client: httpx.AsyncClient, program_id: str
) -> None:
    actions = [TAG, {"type": "COUNTER", "key": "k", "value": "event.", "expires_att": "8760h"}]

    answer = await client.post("/rules", json=rule_body(program_id, condition="event.", actions=actions))

    refused = assert_refused(answer, 400, "bad_request", "condition")
    fields = [problem["field"] for problem in refused["details"]["fields"]]
    assert fields == ["condition", "actions[1].expires_att", "actions[1].value"]


@pytest.mark.parametrize(
    ("active_from", "active_to"),
    [("2026-01-02T00:00:00Z", "2026-01-01T00:00:00Z"), ("2026-01-01T00:00:00Z", "2026-01-01T01:00:00+01:00")],
)
async def test_a_window_ends_after_it_starts(
    client: httpx.AsyncClient, program_id: str, active_from: str, active_to: str
) -> None:
    answer = await client.post("/rules", json=rule_body(program_id, active_from=active_from, active_to=active_to))

    assert_refused(answer, 400, "bad_request", "active_to")


async def test_a_window_may_lie_in_the_past(new_rule: NewRule) -> None:  # example 13: it just never fires
    yesterday = (datetime.now(UTC) - timedelta(days=1)).isoformat()

    assert (await new_rule(active_to=yesterday))["status"] == "ACTIVE"


async def test_the_program_must_exist_and_be_the_organizations_own(
    client: httpx.AsyncClient, other_client: httpx.AsyncClient, program_id: str
) -> None:
    assert_refused(await client.post("/rules", json=rule_body(str(new_id()))), 404, "not_found")
    assert_refused(await other_client.post("/rules", json=rule_body(program_id)), 404, "not_found")


async def test_a_suspended_program_takes_rules_and_an_archived_one_does_not(
    client: httpx.AsyncClient, program_id: str, new_rule: NewRule
) -> None:
    rule = await new_rule()
    await client.patch(f"/programs/{program_id}", json={"status": "SUSPENDED"})
    assert (await client.post("/rules", json=rule_body(program_id))).status_code == 201
    assert (await client.patch(f"/rules/{rule['id']}", json={"name": "New"})).status_code == 200

    await client.patch(f"/programs/{program_id}", json={"status": "ARCHIVED"})

    assert_refused(await client.post("/rules", json=rule_body(program_id)), 409, "program_inactive")
    assert_refused(await client.patch(f"/rules/{rule['id']}", json={"name": "X"}), 409, "program_inactive")
    assert (await client.get(f"/rules/{rule['id']}")).json()["name"] == "New"


async def test_rules_of_another_organization_do_not_exist(other_client: httpx.AsyncClient, new_rule: NewRule) -> None:
    path = f"/rules/{(await new_rule())['id']}"

    assert_refused(await other_client.get(path), 404, "not_found")
    assert_refused(await other_client.patch(path, json={"name": "Mine"}), 404, "not_found")
    assert_refused(await other_client.get(f"{path}/history"), 404, "not_found")
    assert_refused(await other_client.post(f"{path}/simulate", json={"event": {}}), 404, "not_found")
    assert (await other_client.get("/rules")).json()["data"] == []


async def test_there_is_no_delete(client: httpx.AsyncClient, new_rule: NewRule) -> None:
    assert (await client.delete(f"/rules/{(await new_rule())['id']}")).status_code == 405


def test_the_documented_fields_of_an_action_are_those_that_are_read() -> None:
    assert set(ACTION_FIELDS) == set(fields.FIELDS)
    assert set(TARGET_FIELDS) == set(fields.TARGET_FIELDS)


# --- assets in actions ------------------------------------------------------------------------------------------------


async def test_a_linked_asset_can_be_credited(
    client: httpx.AsyncClient, new_asset: NewAsset, new_rule: NewRule
) -> None:
    asset_id = await new_asset()

    assert (await new_rule(actions=[credit(asset_id)]))["actions"] == [credit(asset_id)]


async def test_an_asset_must_exist_be_linked_and_not_be_archived(
    client: httpx.AsyncClient, program_id: str, new_asset: NewAsset
) -> None:
    cases = [
        (str(new_id()), 404, "not_found"),
        (await new_asset("FAR", linked=False), 422, "asset_not_linked"),
        (await new_asset("OLD", status="ARCHIVED"), 409, "asset_archived"),
    ]
    for asset_id, status, code in cases:
        body = rule_body(program_id, actions=[TAG, credit(asset_id)])
        assert_refused(await client.post("/rules", json=body), status, code, "actions[1].asset_id")


async def test_an_asset_of_another_organization_is_unknown(
    other_client: httpx.AsyncClient, new_asset: NewAsset
) -> None:
    asset_id = await new_asset()
    theirs = (await other_client.post("/programs", json={"name": "Theirs"})).json()["id"]

    answer = await other_client.post("/rules", json=rule_body(theirs, actions=[credit(asset_id)]))

    assert_refused(answer, 404, "not_found", "actions[0].asset_id")


@pytest.mark.parametrize(
    ("field", "value"), [("expires_at", "8760h"), ("matures_at", "720h"), ("reference_id", "event.auth")]
)
async def test_lot_fields_need_a_lot_asset(
    client: httpx.AsyncClient, program_id: str, new_asset: NewAsset, new_rule: NewRule, field: str, value: str
) -> None:  # 5.5
    on_simple = credit(await new_asset(), **{field: value})
    on_lots = credit(await new_asset("MILES", inventory_mode="LOT"), **{field: value})

    answer = await client.post("/rules", json=rule_body(program_id, actions=[TAG, on_simple]))

    assert_refused(answer, 400, "bad_request", f"actions[1].{field}")
    assert (await new_rule(actions=[on_lots]))["actions"] == [on_lots]


@pytest.mark.parametrize("action_type", ["CREDIT", "DEBIT", "HOLD", "RELEASE", "FORFEIT", "VOID_HOLD"])
async def test_a_reference_needs_a_lot_asset_whatever_the_action(
    client: httpx.AsyncClient, program_id: str, new_asset: NewAsset, action_type: str
) -> None:
    """On a SIMPLE asset a release "by reference" would silently release everything."""
    action = {"type": action_type, "asset_id": await new_asset(), "reference_id": "event.auth"}
    amount = {} if action_type == "VOID_HOLD" else {"amount": "1"}

    answer = await client.post("/rules", json=rule_body(program_id, actions=[action | amount]))

    refused = assert_refused(answer, 400, "bad_request")
    assert "actions[0].reference_id" in [problem["field"] for problem in refused["details"]["fields"]]


async def test_void_hold_needs_a_lot_asset(client: httpx.AsyncClient, program_id: str, new_asset: NewAsset) -> None:
    action = {"type": "VOID_HOLD", "asset_id": await new_asset(), "reference_id": "event.auth"}

    answer = await client.post("/rules", json=rule_body(program_id, actions=[action]))

    assert_refused(answer, 400, "bad_request", "actions[0].asset_id")


async def test_a_field_that_the_type_does_not_use_has_no_effect_on_a_simple_asset_either(
    new_asset: NewAsset, new_rule: NewRule
) -> None:  # 5.1
    action = credit(await new_asset(), expires_at="8760h") | {"type": "DEBIT"}

    assert (await new_rule(actions=[action]))["actions"] == [action]


async def test_hold_until_serves_simple_and_lot_assets_alike(new_asset: NewAsset, new_rule: NewRule) -> None:  # 5.7
    for mode in ("SIMPLE", "LOT"):
        asset_id = await new_asset(mode, inventory_mode=mode)
        actions = [
            credit(asset_id, hold_until="72h") | {"type": "HOLD"},
            credit(asset_id, bucket="HELD", hold_until="event.settled_at"),
        ]
        assert (await new_rule(actions=actions))["actions"] == actions


@pytest.mark.parametrize(
    ("action", "field"),
    [
        ({"type": "CREDIT", "amount": "1", "hold_until": "72h"}, "hold_until"),
        ({"type": "CREDIT", "amount": "1", "bucket": "HELD", "hold_until": "soon"}, "hold_until"),
        ({"type": "CREDIT", "amount": "1", "bucket": "HELD", "matures_at": "24h"}, "matures_at"),
        ({"type": "CREDIT", "amount": "1", "expires_at": "1 year"}, "expires_at"),
        ({"type": "DEBIT", "amount": "1", "bucket": "HELD", "allow_negative": True}, "allow_negative"),
        ({"type": "HOLD"}, "amount"),
        ({"type": "RELEASE", "hold_until": "72h"}, "hold_until"),
        ({"type": "VOID_HOLD"}, "reference_id"),
        ({"type": "VOID_HOLD", "reference_id": "event.auth", "amount": "1"}, "amount"),
        ({"type": "FORFEIT", "target": {"type": "PROGRAM"}}, "target.type"),
        ({"type": "SCHEDULE_EVENT", "event_name": "x", "delay": "1 day"}, "delay"),
        ({"type": "SCHEDULE_EVENT", "event_name": "x", "delay": "8785h"}, "delay"),
        ({"type": "SCHEDULE_EVENT", "event_name": "x", "delay": "1h", "payload": {"a": "x" * 65_536}}, "payload"),
        ({"type": "BROADCAST", "event_name": "x" * 256}, "event_name"),
        ({"type": "BROADCAST", "event_name": "x", "target": {"type": "PROGRAM"}}, "target"),
        ({"type": "SET_TIER", "tier": "status", "level": "gold"}, "type"),
    ],
)
async def test_a_wrong_action_is_refused_under_the_name_of_its_field(
    client: httpx.AsyncClient, program_id: str, new_asset: NewAsset, action: dict[str, Any], field: str
) -> None:  # 5.17
    asset_id = await new_asset(inventory_mode="LOT")

    answer = await client.post("/rules", json=rule_body(program_id, actions=[TAG, {"asset_id": asset_id} | action]))

    assert_refused(answer, 400, "bad_request", f"actions[1].{field}")


async def test_a_patch_checks_actions_in_the_same_way(
    client: httpx.AsyncClient, new_asset: NewAsset, new_rule: NewRule
) -> None:
    path = f"/rules/{(await new_rule())['id']}"
    held = credit(await new_asset(), bucket="HELD")

    wrong = await client.patch(path, json={"actions": [held | {"matures_at": "24h"}]})
    right = await client.patch(path, json={"actions": [held | {"hold_until": "24h"}]})

    assert_refused(wrong, 400, "bad_request", "actions[0].matures_at")
    assert right.json()["actions"] == [held | {"hold_until": "24h"}]


async def test_a_program_target_is_any_program_of_the_organization(
    client: httpx.AsyncClient, other_client: httpx.AsyncClient, program_id: str, new_rule: NewRule
) -> None:
    other = (await client.post("/programs", json={"name": "Other"})).json()["id"]
    theirs = (await other_client.post("/programs", json={"name": "Theirs"})).json()["id"]

    def tag_on(target_id: str) -> dict[str, Any]:
        return TAG | {"target": {"type": "PROGRAM", "id": target_id}}

    await new_rule(actions=[tag_on(program_id), tag_on(other)])

    for unknown in (theirs, str(new_id())):
        answer = await client.post("/rules", json=rule_body(program_id, actions=[tag_on(other), tag_on(unknown)]))
        assert_refused(answer, 404, "not_found", "actions[1].target.id")


async def test_groups_and_participants_are_looked_up_when_the_action_runs(new_rule: NewRule) -> None:  # 5.2
    for target_type in ("GROUP", "PARTICIPANT"):
        await new_rule(actions=[TAG | {"target": {"type": target_type, "id": str(new_id())}}])


# --- order ------------------------------------------------------------------------------------------------------------


async def test_without_an_order_a_rule_comes_10_after_the_highest(
    client: httpx.AsyncClient, program_id: str, new_rule: NewRule
) -> None:  # example 14
    await new_rule(order=10)
    await new_rule(order=500)

    assert (await new_rule())["order"] == 510
    assert_refused(await client.post("/rules", json=rule_body(program_id, order=500)), 409, "conflict", "order")


async def test_suspended_rules_count_for_the_highest_order_and_archived_ones_do_not(
    client: httpx.AsyncClient, new_rule: NewRule
) -> None:
    await new_rule(order=20)
    await new_rule(order=300, status="SUSPENDED")
    archived = await new_rule(order=900)
    await client.patch(f"/rules/{archived['id']}", json={"status": "ARCHIVED"})

    assert (await new_rule())["order"] == 310


async def test_only_active_rules_reserve_their_order(client: httpx.AsyncClient, new_rule: NewRule) -> None:
    suspended = await new_rule(order=100, status="SUSPENDED")
    active = await new_rule(order=100)
    path = f"/rules/{suspended['id']}"

    assert_refused(await client.patch(path, json={"status": "ACTIVE"}), 409, "conflict", "order")
    assert (await client.patch(path, json={"status": "ACTIVE", "order": 101})).json()["status"] == "ACTIVE"
    assert_refused(await client.patch(path, json={"order": 100}), 409, "conflict", "order")

    await client.patch(f"/rules/{active['id']}", json={"status": "ARCHIVED"})
    assert (await client.patch(path, json={"order": 100})).json()["order"] == 100


async def test_programs_have_orders_of_their_own(client: httpx.AsyncClient, new_rule: NewRule) -> None:
    await new_rule(order=100)
    other = (await client.post("/programs", json={"name": "Other"})).json()["id"]

    assert (await client.post("/rules", json=rule_body(other, order=100))).status_code == 201


async def test_when_the_last_order_is_taken_the_next_rule_must_say_where_it_goes(
    client: httpx.AsyncClient, program_id: str, new_rule: NewRule
) -> None:
    await new_rule(order=ORDER_MAX)

    assert_refused(await client.post("/rules", json=rule_body(program_id)), 409, "conflict")
    assert (await new_rule(order=5))["order"] == 5


async def test_parallel_creates_never_collide(client: httpx.AsyncClient, program_id: str) -> None:
    answers = await asyncio.gather(*(client.post("/rules", json=rule_body(program_id)) for _ in range(20)))

    assert [answer.status_code for answer in answers] == [201] * 20
    assert sorted(answer.json()["order"] for answer in answers) == list(range(10, 201, 10))


async def test_of_parallel_creates_with_one_order_exactly_one_wins(client: httpx.AsyncClient, program_id: str) -> None:
    answers = await asyncio.gather(*(client.post("/rules", json=rule_body(program_id, order=7)) for _ in range(20)))

    assert sorted(answer.status_code for answer in answers) == [201] + [409] * 19
    assert {answer.json()["code"] for answer in answers if answer.status_code == 409} == {"conflict"}


async def test_of_parallel_activations_onto_one_order_exactly_one_wins(
    client: httpx.AsyncClient, new_rule: NewRule
) -> None:
    rules = [await new_rule(order=7, status="SUSPENDED") for _ in range(8)]

    answers = await asyncio.gather(*(client.patch(f"/rules/{r['id']}", json={"status": "ACTIVE"}) for r in rules))

    assert sorted(answer.status_code for answer in answers) == [200] + [409] * 7


async def test_the_database_itself_refuses_two_active_rules_of_one_order(
    new_rule: NewRule,
    owner: psycopg.Connection[Any],
) -> None:
    await new_rule(order=1)
    other = await new_rule(order=2)

    with pytest.raises(psycopg.errors.UniqueViolation):
        owner.execute("update rule set rule_order = 1 where id = %s", [other["id"]])


async def test_what_the_database_refuses_is_a_conflict_too(
    client: httpx.AsyncClient, program_id: str, new_rule: NewRule, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def see_nothing(*_: Any) -> None:
        return None

    monkeypatch.setattr(store, "_check_order_is_free", see_nothing)
    await new_rule(order=1)
    other = await new_rule(order=2)

    created = await client.post("/rules", json=rule_body(program_id, order=1))
    patched = await client.patch(f"/rules/{other['id']}", json={"order": 1})

    assert_refused(created, 409, "conflict", "order")
    assert_refused(patched, 409, "conflict", "order")


async def test_a_program_has_a_bounded_number_of_rules(
    client: httpx.AsyncClient, program_id: str, new_rule: NewRule, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "RULES_PER_PROGRAM", 2)
    first, _ = await new_rule(), await new_rule(status="SUSPENDED")

    assert_refused(await client.post("/rules", json=rule_body(program_id)), 409, "conflict")
    await client.patch(f"/rules/{first['id']}", json={"status": "ARCHIVED"})
    assert (await client.post("/rules", json=rule_body(program_id))).status_code == 201


# --- change -----------------------------------------------------------------------------------------------------------


async def test_what_is_left_out_of_a_patch_stays(client: httpx.AsyncClient, new_rule: NewRule) -> None:
    rule = await new_rule(description="d", active_from="2026-01-01T00:00:00Z", active_to="2026-02-01T00:00:00Z")

    patched = (await client.patch(f"/rules/{rule['id']}", json={"name": "New", "stop_after_match": True})).json()

    assert patched == rule | {"name": "New", "stop_after_match": True, "updated_at": patched["updated_at"]}
    assert patched["updated_at"] > rule["updated_at"]


async def test_null_opens_the_window_and_clears_the_description(client: httpx.AsyncClient, new_rule: NewRule) -> None:
    rule = await new_rule(description="d", active_from="2026-01-01T00:00:00Z", active_to="2026-02-01T00:00:00Z")
    cleared = {"description": None, "active_from": None, "active_to": None}

    patched = (await client.patch(f"/rules/{rule['id']}", json=cleared)).json()

    assert {name: patched[name] for name in cleared} == cleared


@pytest.mark.parametrize("field", ["name", "condition", "actions", "order", "stop_after_match", "status"])
async def test_null_is_no_value_for_anything_else(client: httpx.AsyncClient, new_rule: NewRule, field: str) -> None:
    rule = await new_rule()

    assert_refused(await client.patch(f"/rules/{rule['id']}", json={field: None}), 400, "bad_request", field)
    assert (await client.get(f"/rules/{rule['id']}")).json() == rule


@pytest.mark.parametrize("body", [{}, {"program_id": str(new_id())}, {"unknown": 1}])
async def test_a_patch_changes_at_least_one_field(
    client: httpx.AsyncClient, new_rule: NewRule, body: dict[str, Any]
) -> None:
    assert_refused(await client.patch(f"/rules/{(await new_rule())['id']}", json=body), 400, "bad_request")


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("name", "", "name"),
        ("condition", "event.", "condition"),
        ("actions", [], "actions"),
        ("actions", [TAG, {"type": "TAG", "tag": "x", "expires_att": "1h"}], "actions[1].expires_att"),
        ("actions", [credit(str(new_id()), "event.")], "actions[0].amount"),
        ("order", 0, "order"),
        ("budgets", [{}], "budgets[0].asset_id"),
        ("status", "DELETED", "status"),
        ("active_to", "2026-13-01T00:00:00Z", "active_to"),
    ],
)
async def test_a_wrong_field_of_a_patch_is_named(
    client: httpx.AsyncClient, new_rule: NewRule, field: str, value: Any, named: str
) -> None:
    answer = await client.patch(f"/rules/{(await new_rule())['id']}", json={field: value})

    assert_refused(answer, 400, "bad_request", named)


async def test_a_patch_checks_new_assets(client: httpx.AsyncClient, new_rule: NewRule, new_asset: NewAsset) -> None:
    path = f"/rules/{(await new_rule())['id']}"
    unlinked = await new_asset(linked=False)

    assert_refused(await client.patch(path, json={"actions": [credit(unlinked)]}), 422, "asset_not_linked")


async def test_a_patch_of_one_end_is_checked_against_the_other(client: httpx.AsyncClient, new_rule: NewRule) -> None:
    path = f"/rules/{(await new_rule(active_from='2026-06-01T00:00:00Z'))['id']}"

    assert_refused(
        await client.patch(path, json={"active_to": "2026-05-01T00:00:00Z"}), 400, "bad_request", "active_to"
    )
    both = {"active_from": None, "active_to": "2026-05-01T00:00:00Z"}
    assert (await client.patch(path, json=both)).status_code == 200


async def test_the_status_goes_back_and_forth_until_it_is_archived(
    client: httpx.AsyncClient, new_rule: NewRule
) -> None:
    path = f"/rules/{(await new_rule())['id']}"
    for status in ("SUSPENDED", "ACTIVE", "ACTIVE", "SUSPENDED", "ARCHIVED"):
        patched = (await client.patch(path, json={"status": status})).json()
        assert patched["status"] == status
        assert ("deleted_at" in patched) is (status == "ARCHIVED")

    for change in ({"status": "ACTIVE"}, {"status": "ARCHIVED"}, {"name": "New"}):
        assert_refused(await client.patch(path, json=change), 409, "conflict")
    assert (await client.get(path)).json()["deleted_at"] is not None


# --- history ----------------------------------------------------------------------------------------------------------


async def history(client: httpx.AsyncClient, rule_id: str, **params: Any) -> list[dict[str, Any]]:
    answer = await client.get(f"/rules/{rule_id}/history", params=params)
    assert answer.status_code == 200, answer.text
    rows: list[dict[str, Any]] = answer.json()["data"]
    return rows


async def test_every_change_is_a_version_with_its_snapshot(
    client: httpx.AsyncClient, organization: Tenant, new_rule: NewRule
) -> None:
    created = await new_rule(order=5)
    path = f"/rules/{created['id']}"
    answers = [
        (await client.patch(path, json=change)).json()
        for change in (
            {"name": "New", "order": 6},
            {"status": "SUSPENDED", "name": "Newer"},
            {"status": "ACTIVE"},
            {"status": "ARCHIVED"},
        )
    ]

    versions = await history(client, created["id"])

    assert [v["change_type"] for v in versions] == ["archived", "activated", "suspended", "updated", "created"]
    assert [v["snapshot"] for v in versions] == [*reversed(answers), created]
    assert versions[3]["changes"] == {"name": {"old": "Base", "new": "New"}, "order": {"old": 5, "new": 6}}
    assert versions[2]["changes"] == {
        "status": {"old": "ACTIVE", "new": "SUSPENDED"},
        "name": {"old": "New", "new": "Newer"},
    }
    assert versions[4]["changes"]["condition"] == {"old": None, "new": PURCHASE}
    for version in versions:
        assert version["changed_by_api_key_id"] == str(organization.api_key_id)
        assert version["changed_by_user_id"] is None
        assert version["rule_id"] == created["id"]
        assert set(version) == set(RuleVersionOut.model_fields)


async def test_a_patch_that_changes_nothing_makes_no_version(client: httpx.AsyncClient, new_rule: NewRule) -> None:
    rule = await new_rule(order=5)

    same = {name: rule[name] for name in ("name", "condition", "actions", "order", "status", "active_to", "budgets")}
    answer = await client.patch(f"/rules/{rule['id']}", json=same)

    assert (answer.status_code, answer.json()) == (200, rule)
    assert len(await history(client, rule["id"])) == 1


async def test_a_refused_change_makes_no_version(client: httpx.AsyncClient, new_rule: NewRule) -> None:
    await new_rule(order=5)
    rule = await new_rule(order=6)

    await client.patch(f"/rules/{rule['id']}", json={"order": 5, "name": "New"})

    assert [v["change_type"] for v in await history(client, rule["id"])] == ["created"]


async def test_versions_read_in_the_order_of_changes_even_when_the_clock_stands_still(
    client: httpx.AsyncClient, new_rule: NewRule, clock: SettableClock
) -> None:
    clock.set("2026-03-01T12:00:00+00:00")
    rule = await new_rule()
    for name in ("a", "b", "c"):
        await client.patch(f"/rules/{rule['id']}", json={"name": name})

    versions = await history(client, rule["id"])

    assert [v["snapshot"]["name"] for v in versions] == ["c", "b", "a", "Base"]
    assert len({v["changed_at"] for v in versions}) == 4


async def test_concurrent_changes_of_one_rule_all_count(client: httpx.AsyncClient, new_rule: NewRule) -> None:
    rule = await new_rule()
    changes = [{"name": f"name {i}"} for i in range(8)]

    await asyncio.gather(*(client.patch(f"/rules/{rule['id']}", json=change) for change in changes))

    versions = await history(client, rule["id"])
    assert len(versions) == 9
    for newer, older in itertools.pairwise(versions):
        assert newer["changes"]["name"] == {"old": older["snapshot"]["name"], "new": newer["snapshot"]["name"]}


async def test_history_is_filtered_and_paged(
    client: httpx.AsyncClient, new_rule: NewRule, clock: SettableClock
) -> None:
    clock.set("2026-03-01T12:00:00+00:00")
    rule = await new_rule()
    for i in range(24):
        clock.advance(hours=1)
        await client.patch(f"/rules/{rule['id']}", json={"name": f"name {i}"})
    path = f"/rules/{rule['id']}/history"

    first = (await client.get(path)).json()
    assert (len(first["data"]), first["pagination"]["has_more"]) == (20, True)
    second = (await client.get(path, params={"cursor": first["pagination"]["next_cursor"]})).json()
    assert (len(second["data"]), second["pagination"]) == (5, {"has_more": False, "next_cursor": None})

    assert len(await history(client, rule["id"], limit=1_000)) == 25
    assert len(await history(client, rule["id"], change_type="created")) == 1
    window = {"from": "2026-03-01T13:00:00Z", "to": "2026-03-01T15:00:00Z"}
    assert len(await history(client, rule["id"], **window)) == 3
    assert_refused(await client.get(path, params={"change_type": "deleted"}), 400, "bad_request", "change_type")
    assert_refused(await client.get(path, params={"from": "monday"}), 400, "bad_request", "from")
    assert_refused(await client.get(path, params={"cursor": "?"}), 400, "bad_request", "cursor")
    assert_refused(await client.get(f"/rules/{new_id()}/history"), 404, "not_found")


# --- list -------------------------------------------------------------------------------------------------------------


async def names(client: httpx.AsyncClient, **params: Any) -> list[str]:
    answer = await client.get("/rules", params=params)
    assert answer.status_code == 200, answer.text
    return [rule["name"] for rule in answer.json()["data"]]


async def test_rules_are_listed_in_the_order_in_which_they_run(client: httpx.AsyncClient, new_rule: NewRule) -> None:
    for order, name in ((500, "b"), (100, "c"), (1_000, "a")):
        await new_rule(order=order, name=name)

    assert await names(client) == ["c", "b", "a"]
    assert await names(client, sort_dir="desc") == ["a", "b", "c"]
    assert await names(client, sort_by="name") == ["a", "b", "c"]
    assert await names(client, sort_by="created_at") == ["b", "c", "a"]
    assert await names(client, sort_by="updated_at", sort_dir="desc") == ["a", "c", "b"]


async def test_archived_rules_are_listed_only_when_asked_for(client: httpx.AsyncClient, new_rule: NewRule) -> None:
    await new_rule(name="active")
    await new_rule(name="suspended", status="SUSPENDED")
    archived = await new_rule(name="archived")
    await client.patch(f"/rules/{archived['id']}", json={"status": "ARCHIVED"})

    assert await names(client) == ["active", "suspended"]
    assert await names(client, include_archived="true") == ["active", "suspended", "archived"]
    assert await names(client, status="ARCHIVED") == ["archived"]
    assert await names(client, status="SUSPENDED", include_archived="true") == ["suspended"]


async def test_rules_are_found_by_program_and_by_a_part_of_their_name(
    client: httpx.AsyncClient, new_rule: NewRule
) -> None:
    await new_rule(name="Dining 5%")
    await new_rule(name="Groceries")
    other = (await client.post("/programs", json={"name": "Other"})).json()["id"]
    await client.post("/rules", json=rule_body(other, name="Other's"))

    assert await names(client, search="dIn") == ["Dining 5%"]
    assert await names(client, search="%") == ["Dining 5%"]
    assert await names(client, search="_") == []
    assert await names(client, program_id=other) == ["Other's"]
    assert await names(client, program_id=str(new_id())) == []


async def test_pages_of_rules_neither_skip_nor_repeat(client: httpx.AsyncClient, new_rule: NewRule) -> None:
    for i in range(7):
        await new_rule(name=f"{i}", order=100 if i == 0 else None, status="SUSPENDED")
    seen: list[str] = []
    cursor: str | None = None
    while True:
        page = (await client.get("/rules", params={"limit": 3} | ({"cursor": cursor} if cursor else {}))).json()
        seen += [rule["name"] for rule in page["data"]]
        cursor = page["pagination"]["next_cursor"]
        if cursor is None:
            break
        await new_rule(name="late", order=1, status="SUSPENDED")

    assert seen == [f"{i}" for i in range(7)]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("program_id", "x"),
        ("status", "DELETED"),
        ("sort_by", "status"),
        ("sort_dir", "up"),
        ("limit", "0"),
        ("cursor", "!"),
        ("include_archived", "maybe"),
    ],
)
async def test_a_wrong_query_parameter_is_named(client: httpx.AsyncClient, name: str, value: str) -> None:
    assert_refused(await client.get("/rules", params={name: value}), 400, "bad_request", name)


# --- validate ---------------------------------------------------------------------------------------------------------


async def validate(client: httpx.AsyncClient, condition: Any) -> dict[str, Any]:
    answer = await client.post("/rules/validate", json={"condition": condition})
    assert answer.status_code == 200, answer.text
    verdict: dict[str, Any] = answer.json()
    return verdict


async def test_a_valid_condition_comes_with_a_note_that_only_syntax_was_checked(client: httpx.AsyncClient) -> None:
    verdict = await validate(client, "event.no_such_field >= 100.0 && now() > timestamp('2026-09-01')")

    assert (verdict["valid"], verdict["message"]) == (True, "CEL condition is valid")
    assert "syntax" in verdict["note"]


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("event.type = 'purchase'", ["line 1, column 12", "use =="]),
        ("event.a > 1 and event.b > 2", ["line 1, column 13", "use &&"]),
        ("amount > 1", ["amount", "event.amount"]),
        ("rounds(event.amount) > 1", ["rounds", "round"]),
        ("event.a >\n", ["unexpected end"]),
        ("x" * 4_097, ["4096"]),
        ("(" * 200, ["64"]),
    ],
)
async def test_an_invalid_condition_is_200_with_position_and_hint(
    client: httpx.AsyncClient, condition: str, expected: list[str]
) -> None:
    verdict = await validate(client, condition)

    assert verdict["valid"] is False
    assert "note" not in verdict
    for part in expected:
        assert part in verdict["message"]


@pytest.mark.parametrize("body", [{}, {"condition": ""}, {"condition": None}, {"condition": 1}, []])
async def test_validate_needs_a_condition(client: httpx.AsyncClient, body: Any) -> None:
    assert_refused(await client.post("/rules/validate", json=body), 400, "bad_request")


# --- simulate ---------------------------------------------------------------------------------------------------------


async def simulate(client: httpx.AsyncClient, rule: dict[str, Any], event: Any, **state: Any) -> dict[str, Any]:
    body = {"event": event} | ({"participant_state": state} if state else {})
    answer = await client.post(f"/rules/{rule['id']}/simulate", json=body)
    assert answer.status_code == 200, answer.text
    simulation: dict[str, Any] = answer.json()
    Simulation.model_validate(simulation)
    assert simulation["rule"] == {name: rule[name] for name in ("id", "name", "condition", "order", "stop_after_match")}
    evaluation: dict[str, Any] = simulation["evaluation"]
    return evaluation


async def test_a_match_shows_what_would_be_credited(
    client: httpx.AsyncClient, new_asset: NewAsset, new_rule: NewRule
) -> None:  # example 3
    action = credit(await new_asset("POINTS", 0), "event.amount * 10")
    rule = await new_rule(condition="event.type == 'purchase' && event.amount > 0", actions=[action])

    evaluation = await simulate(client, rule, {"type": "purchase", "amount": 75})

    assert evaluation == {
        "matched": True,
        "status": "evaluated",
        "results": [
            {
                "action": action,
                "result": {
                    "amount": "750",
                    "asset_symbol": "POINTS",
                    "description": "Credit 750 POINTS to participant",
                },
            }
        ],
    }


async def test_a_missing_field_fails_the_condition_with_a_reason(client: httpx.AsyncClient, new_rule: NewRule) -> None:
    rule = await new_rule(condition='event.coupon_code == "X"')  # examples 11 and 12

    evaluation = await simulate(client, rule, {"type": "purchase"})

    assert (evaluation["matched"], evaluation["status"]) == (False, "condition_failed")
    assert "coupon_code" in evaluation["reason"]
    assert "results" not in evaluation


async def test_a_condition_that_is_false_has_been_evaluated(client: httpx.AsyncClient, new_rule: NewRule) -> None:
    rule = await new_rule(condition='has(event.coupon_code) && event.coupon_code == "X"')

    assert await simulate(client, rule, {"type": "purchase"}) == {"matched": False, "status": "evaluated"}


@pytest.mark.parametrize("condition", ["event.amount > 50.0", "event.amount", "event.list.map(x, x + 1).size() > 0"])
async def test_any_error_fails_the_condition(client: httpx.AsyncClient, new_rule: NewRule, condition: str) -> None:
    evaluation = await simulate(client, await new_rule(condition=condition), {"amount": "60", "list": ["a"]})

    assert (evaluation["matched"], evaluation["status"]) == (False, "condition_failed")
    assert evaluation["reason"]


async def test_state_is_projected(client: httpx.AsyncClient, new_rule: NewRule) -> None:
    actions = [
        {"type": "TAG", "tag": "Gold"},
        {"type": "TAG", "tag": "VIP"},
        {"type": "UNTAG", "tag": "vip"},
        {"type": "UNTAG", "tag": "gold"},
        {"type": "COUNTER", "key": "purchase_count", "value": "1"},
        {"type": "COUNTER", "key": "lifetime_spend", "value": "event.amount"},
        {"type": "COUNTER", "key": "new", "value": "-0.50"},
        {"type": "SET_ATTRIBUTE", "key": "country", "value": "US"},
        {"type": "SET_ATTRIBUTE", "key": "last", "value": "event.amount"},
    ]
    rule = await new_rule(
        condition="'vip' in participant.tags && participant.counters.lifetime_spend > 300", actions=actions
    )
    state = {
        "tags": ["VIP"],
        "counters": {"purchase_count": "7", "lifetime_spend": "340.00"},
        "attributes": {"country": "US"},
    }

    evaluation = await simulate(client, rule, {"amount": 49.99}, **state)

    results = [item["result"] for item in evaluation["results"]]
    assert [item["action"] for item in evaluation["results"]] == actions
    assert all(result.pop("description") for result in results)
    assert results == [
        {"current_tags": ["vip"], "would_add": True},
        {"current_tags": ["vip"], "would_add": False},
        {"current_tags": ["vip"], "would_remove": True},
        {"current_tags": ["vip"], "would_remove": False},
        {"current_value": "7", "projected_value": "8", "value": "1"},
        {"current_value": "340", "projected_value": "389.99", "value": "49.99"},
        {"current_value": "0", "projected_value": "-0.5", "value": "-0.5"},
        {"current_value": "US", "would_change": False},
        {"current_value": None, "would_change": True},
    ]


async def test_projections_are_shown_for_the_events_participant_only(
    client: httpx.AsyncClient, new_asset: NewAsset, new_rule: NewRule
) -> None:
    referrer = {"type": "PARTICIPANT", "external_id": "event.referrer_id"}
    rule = await new_rule(
        actions=[
            credit(await new_asset("POINTS", 2), "event.amount * 0.1", target=referrer),
            {"type": "COUNTER", "key": "n", "value": "1", "target": {"type": "PROGRAM"}},
            TAG | {"target": referrer},
        ]
    )

    evaluation = await simulate(client, rule, {"type": "purchase", "amount": 5, "referrer_id": "user_9"})

    assert [item["result"] for item in evaluation["results"]] == [
        {
            "amount": "0.50",
            "asset_symbol": "POINTS",
            "description": "Credit 0.50 POINTS to participant user_9",
        },
        {"value": "1", "description": "Add 1 to counter n of program"},
        {"description": "Add tag vip to participant user_9"},
    ]


async def test_every_balance_action_says_what_it_would_do(
    client: httpx.AsyncClient, new_asset: NewAsset, new_rule: NewRule, clock: SettableClock
) -> None:  # 8.1
    clock.set("2026-03-01T12:00:00+00:00")
    of: dict[str, Any] = {"asset_id": await new_asset("MILES", 2, inventory_mode="LOT")}
    group_id = str(new_id())
    expected: list[tuple[dict[str, Any], str]] = [
        (
            {"type": "CREDIT", "amount": "event.amount", "expires_at": "48h", "matures_at": "event.settled_at"},
            "Credit 7.50 MILES to participant, matures 2026-03-02T00:00:00Z, expires 2026-03-03T12:00:00Z",
        ),
        (
            {"type": "CREDIT", "amount": "5", "bucket": "HELD", "reference_id": "event.auth", "hold_until": "now"},
            "Credit 5.00 MILES to participant, in HELD, reference auth_1, held until 2026-03-01T12:00:00Z",
        ),
        ({"type": "DEBIT", "amount": "5", "bucket": "HELD"}, "Debit 5.00 MILES from participant, in HELD"),
        (
            {"type": "HOLD", "amount": "5", "reference_id": "event.auth", "hold_until": "1h30m"},
            "Hold 5.00 MILES of participant, reference auth_1, held until 2026-03-01T13:30:00Z",
        ),
        ({"type": "RELEASE", "amount": "5"}, "Release 5.00 MILES of participant"),
        ({"type": "RELEASE"}, "Release all held MILES of participant"),
        (
            {"type": "RELEASE", "reference_id": "event.auth", "target": {"type": "GROUP", "id": "event.group"}},
            f"Release all held MILES of group {group_id}, reference auth_1",
        ),
        ({"type": "FORFEIT", "amount": "event.amount"}, "Forfeit 7.50 MILES of participant"),
        ({"type": "FORFEIT"}, "Forfeit all MILES of participant"),
        ({"type": "FORFEIT", "bucket": "HELD"}, "Forfeit all held MILES of participant, in HELD"),
    ]
    rule = await new_rule(actions=[of | action for action, _ in expected])
    event = {"type": "purchase", "amount": 7.5, "auth": "auth_1", "group": group_id, "settled_at": "2026-03-02"}

    evaluation = await simulate(client, rule, event)

    results = [item["result"] for item in evaluation["results"]]
    assert [result["description"] for result in results] == [description for _, description in expected]
    assert {result["asset_symbol"] for result in results} == {"MILES"}
    assert [result.get("amount") for result in results] == [
        *("7.50", "5.00", "5.00", "5.00", "5.00", None, None, "7.50", None, None)
    ]
    assert all("amount" in result or "all" in result["description"] for result in results)


async def test_events_to_be_made_are_described(client: httpx.AsyncClient, new_rule: NewRule) -> None:
    friend = {"type": "PARTICIPANT", "external_id": "event.friend"}
    scheduled = {"type": "SCHEDULE_EVENT", "event_name": "check_status", "delay": "36h", "payload": {"n": 1}}
    rule = await new_rule(
        actions=[scheduled, scheduled | {"target": friend}, {"type": "BROADCAST", "event_name": "news"}]
    )

    evaluation = await simulate(client, rule, {"type": "purchase", "friend": "user_2"})

    assert [item["result"] for item in evaluation["results"]] == [
        {"description": "Schedule event check_status for participant in 36h"},
        {"description": "Schedule event check_status for participant user_2 in 36h"},
        {"description": "Broadcast event news to every active participant of program"},
    ]


async def test_void_hold_is_not_simulated(client: httpx.AsyncClient, new_asset: NewAsset, new_rule: NewRule) -> None:
    asset_id = await new_asset(inventory_mode="LOT")
    rule = await new_rule(actions=[{"type": "VOID_HOLD", "asset_id": asset_id, "reference_id": "event.auth"}, TAG])

    evaluation = await simulate(client, rule, {"type": "purchase", "auth": "auth_1"})

    voided, tagged = (item["result"] for item in evaluation["results"])
    assert voided == {"error": "VOID_HOLD is not supported in simulation"}
    assert tagged["would_add"] is True


async def test_state_of_groups_and_programs_is_described_but_not_projected(
    client: httpx.AsyncClient, new_rule: NewRule
) -> None:
    other = (await client.post("/programs", json={"name": "Other"})).json()["id"]
    group_id = str(new_id())
    targets = [{"type": "GROUP", "id": group_id}, {"type": "PROGRAM", "id": other}]
    rule = await new_rule(actions=[TAG | {"target": target} for target in targets])

    evaluation = await simulate(client, rule, {"type": "purchase"})

    assert [item["result"] for item in evaluation["results"]] == [
        {"description": f"Add tag vip to group {group_id}"},
        {"description": f"Add tag vip to program {other}"},
    ]


@pytest.mark.parametrize(
    ("amount", "cause"),
    [
        ("event.amount * 0.001", "amount exceeds asset scale"),
        ("0 - event.amount", "amount is negative"),
        ("event.nothing", "nothing"),
        ("event.type", "amount is not a number"),
        ("1000000000000000000000", "amount is too large"),
        ("event.amount / 0", ""),
    ],
)
async def test_an_amount_that_cannot_be_computed_is_an_error_of_its_action_alone(
    client: httpx.AsyncClient, new_asset: NewAsset, new_rule: NewRule, amount: str, cause: str
) -> None:
    asset_id = await new_asset(scale=2)
    rule = await new_rule(actions=[credit(asset_id, amount), credit(asset_id, "1")])

    evaluation = await simulate(client, rule, {"type": "purchase", "amount": 1.5})

    failed, other = (item["result"] for item in evaluation["results"])
    assert list(failed) == ["error"]
    assert failed["error"].startswith("action CREDIT failed: ")
    assert cause in failed["error"]
    assert other["amount"] == "1.00"


async def test_counters_and_targets_that_cannot_be_computed_are_errors_too(
    client: httpx.AsyncClient, new_rule: NewRule
) -> None:
    actions = [
        {"type": "COUNTER", "key": "k", "value": "event.amount / 3"},
        {"type": "COUNTER", "key": "k", "value": "1" + "0" * 900},
        {"type": "SET_ATTRIBUTE", "key": "k", "value": "[event.amount]"},
        {"type": "SET_ATTRIBUTE", "key": "k", "value": "event.empty"},
        TAG | {"target": {"type": "PARTICIPANT", "external_id": "event.amount"}},
        TAG | {"target": {"type": "GROUP", "id": "event.type"}},
    ]

    evaluation = await simulate(client, await new_rule(actions=actions), {"type": "purchase", "amount": 1, "empty": ""})

    assert [list(item["result"]) for item in evaluation["results"]] == [["error"]] * 6


@pytest.mark.parametrize(
    ("terms", "cause"),
    [
        ({"reference_id": "event.amount"}, "reference_id is not a string"),
        ({"expires_at": "event.amount"}, "expires_at gives neither a time nor a duration"),
        ({"expires_at": "2020-01-01T00:00:00Z"}, "expires_at is not in the future"),
        ({"bucket": "HELD", "hold_until": "event.nothing"}, "hold_until: no such field: nothing"),
    ],
)
async def test_terms_that_would_fail_the_action_fail_its_simulation(
    client: httpx.AsyncClient, new_asset: NewAsset, new_rule: NewRule, terms: dict[str, str], cause: str
) -> None:
    asset_id = await new_asset(inventory_mode="LOT")

    evaluation = await simulate(
        client, await new_rule(actions=[credit(asset_id, **terms)]), {"type": "purchase", "amount": 1}
    )

    assert [item["result"] for item in evaluation["results"]] == [{"error": f"action CREDIT failed: {cause}"}]


async def test_only_the_condition_decides(client: httpx.AsyncClient, new_rule: NewRule, clock: SettableClock) -> None:
    rule = await new_rule(active_to="2020-01-01T00:00:00Z", condition="now == timestamp('2026-03-01T12:00:00Z')")
    await client.patch(f"/rules/{rule['id']}", json={"status": "ARCHIVED"})
    clock.set("2026-03-01T12:00:00+00:00")

    assert (await simulate(client, rule, {}))["matched"] is True


async def test_simulating_stores_nothing(
    client: httpx.AsyncClient,
    new_asset: NewAsset,
    new_rule: NewRule,
    organization: Tenant,
    owner: psycopg.Connection[Any],
) -> None:
    rule = await new_rule(actions=[credit(await new_asset()), TAG])

    await simulate(client, rule, {"type": "purchase"}, tags=["a"])

    assert (await client.get(f"/rules/{rule['id']}")).json() == rule
    for table in ("event", "participant", "journal_entry", "tag", "counter", "state_history"):
        count = owner.execute(f"select count(*) from {table} where organization_id = %s", [organization.id]).fetchone()
        assert count == (0,)


async def test_numbers_of_a_simulated_event_are_exact(
    client: httpx.AsyncClient, new_asset: NewAsset, new_rule: NewRule
) -> None:
    rule = await new_rule(condition="event.a * 3 == 0.3", actions=[credit(await new_asset(scale=18), "event.b")])

    body = '{"event": {"a": 0.1, "b": 12345678901234567890.123456789012345678}}'
    answer = await client.post(f"/rules/{rule['id']}/simulate", content=body)

    evaluation = answer.json()["evaluation"]
    assert evaluation["results"][0]["result"]["amount"] == "12345678901234567890.123456789012345678"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "event"),
        ({"event": None}, "event"),
        ({"event": []}, "event"),
        ({"event": {"a": "x" * 70_000}}, "event"),
        ({"event": {}, "participant_state": []}, "participant_state"),
        ({"event": {}, "participant_state": {"tags": "vip"}}, "participant_state.tags"),
        ({"event": {}, "participant_state": {"tags": ["x" * 256]}}, "participant_state.tags[0]"),
        ({"event": {}, "participant_state": {"counters": {"n": "many"}}}, "participant_state.counters.n"),
        ({"event": {}, "participant_state": {"counters": {"n": True}}}, "participant_state.counters.n"),
        ({"event": {}, "participant_state": {"counters": {"n": "1e5"}}}, "participant_state.counters.n"),
        ({"event": {}, "participant_state": {"counters": {"n": "1" * 21}}}, "participant_state.counters.n"),
        ({"event": {}, "participant_state": {"attributes": {"n": 1}}}, "participant_state.attributes.n"),
    ],
)
async def test_a_simulation_of_something_else_is_refused(
    client: httpx.AsyncClient, new_rule: NewRule, body: dict[str, Any], field: str
) -> None:
    answer = await client.post(f"/rules/{(await new_rule())['id']}/simulate", json=body)

    assert_refused(answer, 400, "bad_request", field)


async def test_an_event_nested_too_deep_is_refused(client: httpx.AsyncClient, new_rule: NewRule) -> None:
    event: dict[str, Any] = {}
    for _ in range(limits.EVENT_DATA_DEPTH):
        event = {"a": event}

    answer = await client.post(f"/rules/{(await new_rule())['id']}/simulate", json={"event": event})

    assert_refused(answer, 400, "bad_request", "event")


async def test_an_unknown_rule_cannot_be_simulated(client: httpx.AsyncClient) -> None:
    assert_refused(await client.post(f"/rules/{new_id()}/simulate", json={"event": {}}), 404, "not_found")
