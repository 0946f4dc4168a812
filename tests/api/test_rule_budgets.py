"""Rule budgets over HTTP. Contract: rules-and-events.md 2.5, 3 and 8."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal
from itertools import pairwise
from typing import Any, LiteralString
from uuid import UUID

import httpx
import psycopg
import pytest

from api.rules import BudgetOut, RuleOut
from db.session import Database, Transaction
from domain import limits
from domain.ids import new_id
from domain.rules import store
from domain.rules.budgets import BudgetDraft, load_budgets, rules_with_budgets, write_budgets
from tests.api.calls import all_pages, created, new_asset, new_program, problem, wrong_fields
from tests.builders import d
from tests.conftest import SettableClock, Tenant

TAG = {"type": "TAG", "tag": "vip"}


@dataclass(frozen=True)
class Shop:
    """A program with two assets, `cash` of scale 2 and `points` of scale 0, and rules that tag."""

    client: httpx.AsyncClient
    program_id: str
    cash: str
    points: str

    async def post(self, budgets: Any, **fields: Any) -> httpx.Response:
        rule = {"program_id": self.program_id, "name": "Base", "condition": "true", "actions": [TAG]}
        return await self.client.post("/rules", json=rule | {"budgets": budgets} | fields)

    async def rule(self, *budgets: dict[str, Any], **fields: Any) -> dict[str, Any]:
        answer = await self.post(list(budgets), **fields)
        assert answer.status_code == 201, answer.text
        rule: dict[str, Any] = answer.json()
        return rule

    async def patch(self, rule: dict[str, Any], **changes: Any) -> httpx.Response:
        return await self.client.patch(f"/rules/{rule['id']}", json=changes)

    async def read(self, rule: dict[str, Any]) -> list[dict[str, Any]]:
        budgets: list[dict[str, Any]] = (await self.client.get(f"/rules/{rule['id']}")).json()["budgets"]
        return budgets

    async def reset(self, rule: dict[str, Any], asset_id: str) -> httpx.Response:
        return await self.client.post(f"/rules/{rule['id']}/reset-budget", params={"asset_id": asset_id})

    async def history(self, rule: dict[str, Any]) -> list[dict[str, Any]]:
        return await all_pages(self.client, f"/rules/{rule['id']}/history")


@pytest.fixture
async def shop(client: httpx.AsyncClient, clock: SettableClock) -> Shop:
    clock.set("2026-01-15T12:00:00Z")
    program_id = (await new_program(client))["id"]
    assets = [await new_asset(client, program_id, scale=scale) for scale in (2, 0)]
    return Shop(client, program_id, *(asset["id"] for asset in assets))


Consume = Callable[[dict[str, Any], str, str], Any]


@pytest.fixture
def consume(database: Database, organization: Tenant) -> Consume:
    """Consume an amount of a rule's budget, as an event does."""

    async def charge(rule: dict[str, Any], asset_id: str, amount: str) -> None:
        async with database.transaction(organization.id) as tx:
            (budget,) = [
                b for b in await load_budgets(tx, [UUID(rule["id"])], locked=True) if str(b.asset_id) == asset_id
            ]
            budget.next_reset_at = budget.next_reset_after(tx.now)
            budget.consumed = budget.consumed_at(tx.now) + d(amount)
            await write_budgets(tx, [budget])

    return charge


def by_asset(*budgets: dict[str, Any]) -> list[dict[str, Any]]:
    return sorted(budgets, key=lambda budget: str(budget["asset_id"]))


# --- create and read --------------------------------------------------------------------------------------------------


async def test_budgets_come_back_with_their_state_at_their_assets_scale(shop: Shop) -> None:
    monthly = {"asset_id": shop.cash, "limit": "10000.5", "schedule_type": "CRON", "cron_expression": "0 0 1 * *"}
    lifetime = {"asset_id": shop.points, "limit": "500.00"}

    rule = await shop.rule(lifetime, monthly)

    assert rule["budgets"] == by_asset(
        monthly | {"limit": "10000.50", "consumed": "0.00", "next_reset_at": "2026-02-01T00:00:00Z"},
        lifetime | {"limit": "500", "schedule_type": None, "consumed": "0", "next_reset_at": None},
    )
    assert await shop.read(rule) == rule["budgets"]
    RuleOut.model_validate(rule, strict=False)


async def test_an_interval_is_counted_from_the_creation(shop: Shop) -> None:
    rule = await shop.rule({"asset_id": shop.cash, "limit": "1", "schedule_type": "INTERVAL", "interval": "720h"})

    assert rule["budgets"][0] == {
        "asset_id": shop.cash,
        "limit": "1.00",
        "schedule_type": "INTERVAL",
        "interval": "720h",
        "consumed": "0.00",
        "next_reset_at": "2026-02-14T12:00:00Z",
    }


@pytest.mark.parametrize("fields", [{}, {"budgets": []}, {"budgets": None}])
async def test_a_rule_needs_no_budget(shop: Shop, fields: dict[str, Any]) -> None:
    body = {"program_id": shop.program_id, "name": "Base", "condition": "true", "actions": [TAG], **fields}

    assert (await created(shop.client, "/rules", body))["budgets"] == []


async def test_what_only_reads_carry_is_ignored_in_requests(shop: Shop, consume: Consume) -> None:
    rule = await shop.rule({"asset_id": shop.cash, "limit": "9", "consumed": "5", "next_reset_at": "2020-01-01"})
    assert rule["budgets"][0]["consumed"] == "0.00"
    await consume(rule, shop.cash, "2.50")

    sent_back = [
        budget | {"limit": "10"} for budget in await shop.read(rule) for budget in [budget | {"consumed": "0"}]
    ]
    answer = await shop.patch(rule, budgets=sent_back)

    assert answer.json()["budgets"] == [rule["budgets"][0] | {"limit": "10.00", "consumed": "2.50"}]


async def test_a_read_sees_the_period_it_falls_into(shop: Shop, consume: Consume, clock: SettableClock) -> None:
    rule = await shop.rule(
        {"asset_id": shop.cash, "limit": "9", "schedule_type": "CRON", "cron_expression": "@daily"},
        {"asset_id": shop.points, "limit": "9"},
    )
    await consume(rule, shop.cash, "9")
    await consume(rule, shop.points, "4")

    async def seen() -> dict[str, tuple[str, str | None]]:
        (listed,) = (await shop.client.get("/rules")).json()["data"]
        assert listed["budgets"] == await shop.read(rule)
        return {b["asset_id"]: (b["consumed"], b["next_reset_at"]) for b in listed["budgets"]}

    clock.set("2026-01-15T23:59:59.999999Z")
    assert await seen() == {shop.cash: ("9.00", "2026-01-16T00:00:00Z"), shop.points: ("4", None)}
    clock.set("2026-01-16T00:00:00Z")
    assert await seen() == {shop.cash: ("0.00", "2026-01-17T00:00:00Z"), shop.points: ("4", None)}
    clock.set("2036-07-01T12:00:00Z")
    assert await seen() == {shop.cash: ("0.00", "2036-07-02T00:00:00Z"), shop.points: ("4", None)}


async def test_a_list_reads_the_budgets_of_all_its_rules_at_once(
    shop: Shop, database: Database, organization: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    for limit in ("1", "2", "3"):
        await shop.rule({"asset_id": shop.cash, "limit": limit}, {"asset_id": shop.points, "limit": limit})
    await shop.rule()
    queries: list[str] = []
    execute = Transaction.execute

    async def counted(tx: Transaction, query: LiteralString, params: Any = None) -> Any:
        queries.append(query)
        return await execute(tx, query, params)

    monkeypatch.setattr(Transaction, "execute", counted)

    listed = (await shop.client.get("/rules")).json()["data"]

    assert [[budget["limit"].split(".")[0] for budget in rule["budgets"]] for rule in listed] == [
        ["1", "1"],
        ["2", "2"],
        ["3", "3"],
        [],
    ]
    assert len([query for query in queries if "rule_budget" in query]) == 1


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "field"),
    [
        ({"limit": "1"}, "budgets[0].asset_id"),
        ({"asset_id": "cash", "limit": "1"}, "budgets[0].asset_id"),
        ({"asset_id": None, "limit": "1"}, "budgets[0].asset_id"),
        ({}, "budgets[0].limit"),
        ({"limit": 100}, "budgets[0].limit"),
        ({"limit": None}, "budgets[0].limit"),
        ({"limit": ""}, "budgets[0].limit"),
        ({"limit": "0.00"}, "budgets[0].limit"),
        ({"limit": "-5"}, "budgets[0].limit"),
        ({"limit": "100000000000000000000"}, "budgets[0].limit"),
        ({"limit": "1", "schedule_type": "MONTHLY"}, "budgets[0].schedule_type"),
        ({"limit": "1", "schedule_type": "CRON"}, "budgets[0].cron_expression"),
        ({"limit": "1", "schedule_type": "CRON", "cron_expression": "0 0 0 1 * *"}, "budgets[0].cron_expression"),
        ({"limit": "1", "schedule_type": "CRON", "cron_expression": "0 0 31 2 *"}, "budgets[0].cron_expression"),
        ({"limit": "1", "schedule_type": "CRON", "cron_expression": 5}, "budgets[0].cron_expression"),
        ({"limit": "1", "schedule_type": "INTERVAL"}, "budgets[0].interval"),
        ({"limit": "1", "schedule_type": "INTERVAL", "interval": "0h"}, "budgets[0].interval"),
        ({"limit": "1", "schedule_type": "INTERVAL", "interval": "30d"}, "budgets[0].interval"),
        ({"limit": "1", "schedule_type": "INTERVAL", "interval": 3600}, "budgets[0].interval"),
        ({"limit": "1", "cron_expression": "0 0 1 * *"}, "budgets[0].cron_expression"),
        ({"limit": "1", "schedule_type": None, "interval": "1h"}, "budgets[0].interval"),
    ],
)
async def test_a_wrong_field_is_named(shop: Shop, budget: dict[str, Any], field: str) -> None:
    if not field.endswith("asset_id"):
        budget = {"asset_id": shop.cash} | budget
    rule = await shop.rule()

    assert list(wrong_fields(await shop.post([budget]))) == [field]
    assert list(wrong_fields(await shop.patch(rule, budgets=[budget]))) == [field]
    assert len((await shop.client.get("/rules")).json()["data"]) == 1


@pytest.mark.parametrize("budgets", [{}, "all", [5], [None], 1])
async def test_budgets_are_a_list_of_objects(shop: Shop, budgets: Any) -> None:
    for answer in (await shop.post(budgets), await shop.patch(await shop.rule(), budgets=budgets)):
        assert next(iter(wrong_fields(answer))).startswith("budgets")


async def test_an_asset_has_one_budget(shop: Shop) -> None:
    twice = [{"asset_id": shop.cash, "limit": "1"}, {"asset_id": shop.cash.upper(), "limit": "2"}]

    assert wrong_fields(await shop.post(twice)) == {"budgets[1].asset_id": "invalid"}


async def test_problems_of_the_condition_and_of_budgets_are_reported_together(shop: Shop) -> None:
    answer = await shop.post([{"asset_id": shop.cash, "limit": "0"}], condition="event.")

    assert list(wrong_fields(answer)) == ["condition", "budgets[0].limit"]


async def test_the_number_of_budgets_is_limited(shop: Shop) -> None:
    budgets = [{"asset_id": str(new_id()), "limit": "1"} for _ in range(limits.BUDGETS_PER_RULE + 1)]

    assert list(wrong_fields(await shop.post(budgets))) == ["budgets"]


async def test_a_limit_fits_its_assets_scale(shop: Shop) -> None:
    rule = await shop.rule({"asset_id": shop.points, "limit": "10.00"})
    wrong = [{"asset_id": shop.cash, "limit": "1.25"}, {"asset_id": shop.points, "limit": "1.5"}]

    for answer in (await shop.post(wrong), await shop.patch(rule, budgets=wrong)):
        assert problem(answer, 400, "invalid_scale")["details"]["field"] == "budgets[1].limit"
    assert [budget["limit"] for budget in await shop.read(rule)] == ["10"]


async def test_the_asset_exists_is_active_and_linked(shop: Shop, other_client: httpx.AsyncClient) -> None:
    elsewhere = await new_asset(shop.client, (await new_program(shop.client))["id"])
    strangers = await new_asset(other_client, (await new_program(other_client))["id"])
    archived = await new_asset(shop.client, shop.program_id)
    await shop.client.patch(f"/assets/{archived['id']}", json={"status": "ARCHIVED"})
    rule = await shop.rule()

    for asset_id, status, code in [
        (str(new_id()), 404, "not_found"),
        (strangers["id"], 404, "not_found"),
        (archived["id"], 409, "asset_archived"),
        (elsewhere["id"], 422, "asset_not_linked"),
    ]:
        budgets = [{"asset_id": shop.cash, "limit": "1"}, {"asset_id": asset_id, "limit": "1"}]
        for answer in (await shop.post(budgets), await shop.patch(rule, budgets=budgets)):
            assert problem(answer, status, code)["details"]["field"] == "budgets[1].asset_id"


# --- PATCH ------------------------------------------------------------------------------------------------------------


async def test_a_patch_replaces_all_budgets(shop: Shop, consume: Consume) -> None:
    other = (await new_asset(shop.client, shop.program_id))["id"]
    rule = await shop.rule({"asset_id": shop.cash, "limit": "1"}, {"asset_id": shop.points, "limit": "10"})
    await consume(rule, shop.points, "4")

    answer = await shop.patch(
        rule, budgets=[{"asset_id": shop.points, "limit": "20"}, {"asset_id": other, "limit": "3"}]
    )

    assert answer.status_code == 200, answer.text
    shown = {"schedule_type": None, "next_reset_at": None}
    assert answer.json()["budgets"] == by_asset(
        {"asset_id": shop.points, "limit": "20", "consumed": "4", **shown},
        {"asset_id": other, "limit": "3.00", "consumed": "0.00", **shown},
    )
    assert await shop.read(rule) == answer.json()["budgets"]


async def test_a_patch_without_budgets_leaves_them(shop: Shop, consume: Consume) -> None:
    rule = await shop.rule({"asset_id": shop.cash, "limit": "9"})
    await consume(rule, shop.cash, "2")

    assert (await shop.patch(rule, name="New")).json()["budgets"] == [rule["budgets"][0] | {"consumed": "2.00"}]


async def test_an_empty_array_removes_all_and_null_is_no_array(shop: Shop, consume: Consume) -> None:
    budget = {"asset_id": shop.cash, "limit": "9"}
    rule = await shop.rule(budget)
    await consume(rule, shop.cash, "9")

    assert wrong_fields(await shop.patch(rule, budgets=None)) == {"budgets": "invalid"}
    assert (await shop.patch(rule, budgets=[])).json()["budgets"] == []
    # One that was removed begins anew when it comes back.
    assert (await shop.patch(rule, budgets=[budget])).json()["budgets"][0]["consumed"] == "0.00"


async def test_a_limit_lowered_below_what_was_consumed_keeps_the_truth(shop: Shop, consume: Consume) -> None:
    rule = await shop.rule({"asset_id": shop.cash, "limit": "100"})
    await consume(rule, shop.cash, "80")

    lowered = (await shop.patch(rule, budgets=[{"asset_id": shop.cash, "limit": "50"}])).json()["budgets"][0]
    raised = (await shop.patch(rule, budgets=[{"asset_id": shop.cash, "limit": "90"}])).json()["budgets"][0]

    assert (lowered["limit"], lowered["consumed"]) == ("50.00", "80.00")
    assert (raised["limit"], raised["consumed"]) == ("90.00", "80.00")


async def test_a_changed_schedule_recomputes_the_reset_and_keeps_what_was_consumed(
    shop: Shop, consume: Consume, clock: SettableClock
) -> None:
    daily = {"asset_id": shop.cash, "limit": "9", "schedule_type": "INTERVAL", "interval": "24h"}
    rule = await shop.rule(daily)
    await consume(rule, shop.cash, "5")
    clock.advance(hours=6)

    async def patched(**schedule: Any) -> tuple[str, str | None]:
        answer = await shop.patch(rule, budgets=[{"asset_id": shop.cash, "limit": "10", **schedule}])
        budget = answer.json()["budgets"][0]
        return budget["consumed"], budget["next_reset_at"]

    same = {"schedule_type": "INTERVAL", "interval": "24h"}
    assert await patched(**same) == ("5.00", "2026-01-16T12:00:00Z")
    assert await patched(schedule_type="INTERVAL", interval="48h") == ("5.00", "2026-01-17T18:00:00Z")
    assert await patched(schedule_type="CRON", cron_expression="@monthly") == ("5.00", "2026-02-01T00:00:00Z")
    assert await patched() == ("5.00", None)
    assert await patched(**same) == ("5.00", "2026-01-16T18:00:00Z")


async def test_the_history_tells_what_changed_and_shows_the_whole_rule(shop: Shop, consume: Consume) -> None:
    rule = await shop.rule({"asset_id": shop.cash, "limit": "9"})
    await consume(rule, shop.cash, "5")
    patched = (await shop.patch(rule, budgets=[{"asset_id": shop.cash, "limit": "10"}])).json()
    await shop.patch(rule, budgets=[])

    removed, updated, made = await shop.history(rule)

    spent = rule["budgets"][0] | {"consumed": "5.00"}
    assert made["changes"]["budgets"] == {"old": None, "new": rule["budgets"]}
    assert made["snapshot"] == rule
    assert updated["changes"] == {"budgets": {"old": [spent], "new": [spent | {"limit": "10.00"}]}}
    assert updated["snapshot"] == patched
    assert removed["changes"] == {"budgets": {"old": patched["budgets"], "new": []}}
    assert removed["snapshot"]["budgets"] == []


async def test_the_same_budgets_again_make_no_version(shop: Shop, consume: Consume) -> None:
    budgets = [{"asset_id": shop.cash, "limit": "9"}, {"asset_id": shop.points, "limit": "9"}]
    rule = await shop.rule(*budgets)
    await consume(rule, shop.cash, "5")

    answer = await shop.patch(rule, budgets=[budgets[1], budgets[0] | {"limit": "9.00"}])

    assert answer.json()["updated_at"] == rule["updated_at"]
    assert len(await shop.history(rule)) == 1


async def test_a_refused_patch_leaves_the_budgets(shop: Shop) -> None:
    await shop.rule(order=5)
    rule = await shop.rule({"asset_id": shop.cash, "limit": "9"}, order=6)

    problem(await shop.patch(rule, budgets=[], order=5), 409, "conflict")

    assert await shop.read(rule) == rule["budgets"]


async def test_concurrent_replacements_of_budgets_all_count(shop: Shop) -> None:
    rule = await shop.rule()
    wanted = [
        [{"asset_id": shop.cash, "limit": str(n)}, {"asset_id": shop.points, "limit": "1"}][n % 2 :]
        for n in range(1, 9)
    ]

    answers = await asyncio.gather(*(shop.patch(rule, budgets=budgets) for budgets in wanted))

    assert {answer.status_code for answer in answers} == {200}
    versions = await shop.history(rule)
    for newer, older in pairwise(versions):
        assert newer["changes"]["budgets"]["old"] == older["snapshot"]["budgets"]
        assert newer["changes"]["budgets"]["new"] == newer["snapshot"]["budgets"]
    assert await shop.read(rule) == versions[0]["snapshot"]["budgets"]


# --- reset ------------------------------------------------------------------------------------------------------------


async def test_a_reset_sets_consumed_to_zero_and_shows_the_budget(
    shop: Shop, consume: Consume, clock: SettableClock
) -> None:
    monthly = {"asset_id": shop.cash, "limit": "9", "schedule_type": "CRON", "cron_expression": "@monthly"}
    rule = await shop.rule(monthly, {"asset_id": shop.points, "limit": "9"})
    await consume(rule, shop.cash, "9")
    await consume(rule, shop.points, "9")
    clock.advance(hours=1)

    answer = await shop.reset(rule, shop.cash)

    assert answer.status_code == 200, answer.text
    assert answer.json() == monthly | {"limit": "9.00", "consumed": "0.00", "next_reset_at": "2026-02-01T00:00:00Z"}
    BudgetOut.model_validate(answer.json(), strict=False)
    assert {budget["asset_id"]: budget["consumed"] for budget in await shop.read(rule)} == {
        shop.cash: "0.00",
        shop.points: "9",
    }
    assert len(await shop.history(rule)) == 1


async def test_a_reset_of_a_lifetime_budget_leaves_it_without_a_reset(shop: Shop, consume: Consume) -> None:
    rule = await shop.rule({"asset_id": shop.cash, "limit": "9"})
    await consume(rule, shop.cash, "9")

    answer = (await shop.reset(rule, shop.cash)).json()

    assert (answer["consumed"], answer["next_reset_at"]) == ("0.00", None)


async def test_a_reset_begins_a_whole_interval(shop: Shop, consume: Consume, clock: SettableClock) -> None:
    rule = await shop.rule({"asset_id": shop.cash, "limit": "9", "schedule_type": "INTERVAL", "interval": "24h"})
    await consume(rule, shop.cash, "9")
    clock.advance(hours=6)

    assert (await shop.reset(rule, shop.cash)).json()["next_reset_at"] == "2026-01-16T18:00:00Z"
    clock.advance(hours=72)
    assert (await shop.read(rule))[0]["next_reset_at"] == "2026-01-19T18:00:00Z"


async def test_a_reset_after_missed_periods_goes_on_in_the_future(shop: Shop, clock: SettableClock) -> None:
    rule = await shop.rule({"asset_id": shop.cash, "limit": "9", "schedule_type": "CRON", "cron_expression": "@yearly"})
    clock.set("2029-05-05T00:00:00Z")

    assert (await shop.reset(rule, shop.cash)).json()["next_reset_at"] == "2030-01-01T00:00:00Z"


async def test_a_reset_needs_a_rule_a_budget_and_an_asset_id(
    shop: Shop, client: httpx.AsyncClient, other_client: httpx.AsyncClient
) -> None:
    rule = await shop.rule({"asset_id": shop.cash, "limit": "9"})
    path = f"/rules/{rule['id']}/reset-budget"

    assert wrong_fields(await client.post(path)) == {"asset_id": "required"}
    assert wrong_fields(await client.post(path, params={"asset_id": "cash"})) == {"asset_id": "invalid"}
    problem(await shop.reset(rule, shop.points), 404, "not_found")
    problem(await shop.reset({"id": str(new_id())}, shop.cash), 404, "not_found")
    problem(await other_client.post(path, params={"asset_id": shop.cash}), 404, "not_found")


async def test_the_budgets_of_an_archived_rule_are_readable_and_final(shop: Shop, consume: Consume) -> None:
    rule = await shop.rule({"asset_id": shop.cash, "limit": "9"})
    await consume(rule, shop.cash, "5")
    await shop.patch(rule, status="ARCHIVED")

    problem(await shop.reset(rule, shop.cash), 409, "conflict")
    problem(await shop.patch(rule, budgets=[]), 409, "conflict")
    assert await shop.read(rule) == [rule["budgets"][0] | {"consumed": "5.00"}]


async def test_an_archived_program_forbids_resets(shop: Shop) -> None:
    rule = await shop.rule({"asset_id": shop.cash, "limit": "9"})
    await shop.client.patch(f"/programs/{shop.program_id}", json={"status": "SUSPENDED"})
    assert (await shop.reset(rule, shop.cash)).status_code == 200

    await shop.client.patch(f"/programs/{shop.program_id}", json={"status": "ARCHIVED"})
    problem(await shop.reset(rule, shop.cash), 409, "program_inactive")


# --- what the engine relies on ----------------------------------------------------------------------------------------


async def test_every_change_of_budgets_announces_itself(shop: Shop, database: Database, organization: Tenant) -> None:
    async def known() -> tuple[int, dict[UUID, frozenset[UUID]]]:
        async with database.transaction(organization.id) as tx:
            program = await tx.row("select rules_version from program where id = %s", [shop.program_id])
            assert program is not None
            return program["rules_version"], await rules_with_budgets(tx, UUID(shop.program_id))

    await shop.rule()
    rule = await shop.rule({"asset_id": shop.cash, "limit": "1"})
    before, budgeted = await known()
    assert budgeted == {UUID(rule["id"]): frozenset({UUID(shop.cash)})}

    await shop.patch(rule, budgets=[{"asset_id": shop.points, "limit": "1"}])
    assert await known() == (before + 1, {UUID(rule["id"]): frozenset({UUID(shop.points)})})

    await shop.reset(rule, shop.points)
    assert (await known())[0] == before + 1

    await shop.patch(rule, budgets=[])
    assert await known() == (before + 2, {})


async def test_suspended_rules_have_no_budgets_to_load(shop: Shop, database: Database, organization: Tenant) -> None:
    await shop.rule({"asset_id": shop.cash, "limit": "1"}, status="SUSPENDED")

    async with database.transaction(organization.id) as tx:
        assert await rules_with_budgets(tx, UUID(shop.program_id)) == {}


async def test_budgets_are_loaded_and_written_in_bulk(shop: Shop, database: Database, organization: Tenant) -> None:
    rules = [
        await shop.rule({"asset_id": shop.cash, "limit": "9"}, {"asset_id": shop.points, "limit": "9"}) for _ in "ab"
    ]
    ids = [UUID(rule["id"]) for rule in rules]

    async with database.transaction(organization.id) as tx:
        budgets = await load_budgets(tx, [*ids, new_id()], locked=True)
        assert [(b.rule_id, str(b.asset_id)) for b in budgets] == [
            (rule_id, asset_id) for rule_id in sorted(ids) for asset_id in sorted((shop.cash, shop.points))
        ]
        for place, budget in enumerate(budgets):
            budget.consumed = Decimal(place)
        await write_budgets(tx, budgets)
        await write_budgets(tx, [])
        assert await load_budgets(tx, [], locked=True) == []

    async with database.transaction(organization.id) as tx:
        assert await load_budgets(tx, ids, locked=False) == budgets


async def wait_for_somebody_waiting(owner: psycopg.Connection[Any]) -> None:
    """Return once some backend of this database waits for a row that another has locked."""
    waiting = "select from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"
    for _ in range(1_000):
        if owner.execute(waiting).rowcount:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("nobody waits")


@pytest.mark.parametrize("call", ["patch", "reset", "remove"])
async def test_budgets_are_locked_before_the_program_so_nobody_waits_in_a_circle(
    shop: Shop, database: Database, organization: Tenant, owner: psycopg.Connection[Any], call: str
) -> None:
    rule = await shop.rule({"asset_id": shop.cash, "limit": "9"})
    calls = {
        "patch": lambda: shop.patch(rule, budgets=[{"asset_id": shop.cash, "limit": "8"}]),
        "reset": lambda: shop.reset(rule, shop.cash),
        "remove": lambda: shop.patch(rule, budgets=[]),
    }

    async with database.transaction(organization.id) as tx:
        await load_budgets(tx, [UUID(rule["id"])], locked=True)
        answer = asyncio.create_task(calls[call]())
        await wait_for_somebody_waiting(owner)
        # Free, although the call is under way: it waits for the budgets and holds nothing that comes after them.
        await tx.execute("select from program where id = %s for no key update nowait", [shop.program_id])

    assert (await answer).status_code == 200


async def test_an_amount_is_kept_exactly(shop: Shop, database: Database, organization: Tenant) -> None:
    fine = (await new_asset(shop.client, shop.program_id, scale=18))["id"]
    limit = "99999999999999999999.000000000000000001"

    rule = await shop.rule({"asset_id": fine, "limit": limit})

    assert rule["budgets"][0]["limit"] == limit
    async with database.transaction(organization.id) as tx:
        (budget,) = await load_budgets(tx, [UUID(rule["id"])], locked=False)
        assert budget.maximum == Decimal(limit)


async def test_the_database_itself_refuses_a_budget_that_makes_no_sense(
    shop: Shop, database: Database, organization: Tenant
) -> None:
    rule = await shop.rule({"asset_id": shop.cash, "limit": "9"})
    for nonsense in (
        "consumed = -1",
        "maximum = 0",
        "schedule_type = 'MONTHLY'",
        "schedule_type = 'CRON', cron_expression = '@daily'",
        "next_reset_at = now()",
        "interval = '1h'",
    ):
        with pytest.raises(psycopg.errors.CheckViolation):
            async with database.transaction(organization.id) as tx:
                await tx.execute(f"update rule_budget set {nonsense} where rule_id = %s", [rule["id"]])


async def test_a_patch_inside_one_transaction_sees_its_own_budgets(
    shop: Shop, database: Database, organization: Tenant
) -> None:
    async with database.transaction(organization.id) as tx:
        drafts = [BudgetDraft(UUID(shop.cash), "5")]
        rule = await store.create_rule(tx, store.RuleDraft(UUID(shop.program_id), "n", "true", [TAG], budgets=drafts))
        tx.now += timedelta(seconds=1)
        await store.patch_rule(tx, rule.id, {"budgets": [BudgetDraft(UUID(shop.cash), "6")]})
        (shown,) = await store.documents(tx, [rule])

    assert [budget["limit"] for budget in shown["budgets"]] == ["6.00"]
