"""Batches of any size do exactly what one event at a time does. Contract: rules-and-events.md 4, 7.7.

Goal: no combination of rules and events may make the result depend on how the queue was cut into batches. Method: the
same rules and events go through two organizations, in one of them one by one, in the other in batches of drawn sizes;
then everything that can be seen of the two must be equal, identifiers and instants aside. Shelves are read two lots at
a time, so that batches have to reach further all the time.
"""

from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from db.session import Database
from domain import limits, wallet
from domain.rules.budgets import BudgetDraft
from domain.wallet import WalletRequest
from tests.builders import make_group
from tests.conftest import Tenant
from tests.events_support import (
    TO_PROGRAM,
    EventProgram,
    attribute,
    counter,
    credit,
    debit,
    move,
    schedule,
    tag,
    to_participant,
    untag,
)
from tests.ledger_invariants import assert_ledger_invariants

FAR = datetime(2100, 1, 1, tzinfo=UTC)
"""When the events happen: what they schedule isn't due yet, as it would be released at the next look."""

PEOPLE = ("ann", "ben", "suspended")
STRANGERS = ("cat", "dan")

TO_OTHER = to_participant(external_id="event.to")
SPENT = 'get(participant.counters, "spent", 0)'
TOTAL = 'get(program.counters, "total", 0)'

TO_FAMILY: dict[str, Any] = {"target": {"type": "GROUP", "id": "family"}}
TO_ANY_FAMILY: dict[str, Any] = {"target": {"type": "GROUP", "id": "has(group.id) ? group.id : event.family"}}
FAMILY_VISITS = 'get(group.counters, "visits", 0)'

Template = tuple[str, list[dict[str, Any]], dict[str, Any]]

# (condition, actions, fields of the rule). `points`, `cash` and `miles` stand for assets: unlimited with two decimals,
# prefunded and soon empty, and without decimals; `lots` and `vouchers` are the first two with lots; `family` a group.
TEMPLATES: tuple[Template, ...] = (
    ("event.type == 'buy'", [credit("points", "10")], {}),
    ("event.type == 'buy'", [counter("spent", "event.amount"), credit("points", "event.amount * 2")], {}),
    ("event.amount >= 5", [credit("cash", "event.amount")], {}),
    ("event.amount < 5", [credit("miles", "event.amount"), tag("miles")], {}),
    ("event.type == 'spend'", [debit("points", "event.amount"), counter("burnt", "1")], {}),
    ("event.type == 'spend'", [tag("spender"), debit("points", "15")], {}),
    ("event.type == 'refund'", [debit("points", "event.amount", allow_negative=True)], {}),
    ("true", [tag("seen")], {}),
    ('"seen" in participant.tags', [credit("points", "1"), untag("seen")], {}),
    (f"{SPENT} >= 20", [tag("big"), credit("points", f"{SPENT} / 4"), counter("spent", f"-{SPENT}")], {}),
    ("!('signed' in participant.tags)", [tag("signed"), credit("points", "5", **TO_OTHER)], {}),
    ("event.type == 'give'", [debit("points", "3"), credit("points", "3", **TO_OTHER)], {}),
    ("event.type == 'take'", [debit("points", "4", **TO_OTHER), credit("points", "4")], {}),
    ("event.type == 'mark'", [tag("marked", **TO_OTHER), counter("marks", "1", **TO_OTHER)], {}),
    ('"marked" in participant.tags', [credit("miles", "1"), attribute("by", "event.to")], {}),
    (
        "has(participant.attributes.by)",
        [counter("n", "1", **to_participant(external_id="participant.attributes.by"))],
        {},
    ),
    ("true", [counter("total", "1", **TO_PROGRAM)], {}),
    (f"{TOTAL} > 0 && {TOTAL} % 3 == 0", [credit("cash", "1", **TO_OTHER), tag("third")], {"stop_after_match": True}),
    ("event.missing == 1", [tag("never")], {}),
    ("event.type == 'buy' && event.amount == 7", [tag("lucky")], {"stop_after_match": True}),
    ("event.type == 'give'", [attribute("to", "event.to"), credit("points", "0.001")], {}),
    ("has(event.recipient_id)", [counter("gifts", "1")], {}),
    # Lots and holds.
    ("event.type == 'buy'", [credit("lots", "event.amount", expires_at="8760h")], {}),
    ("event.amount >= 7", [credit("lots", "3"), credit("lots", "1", matures_at="720h")], {}),
    ("event.type == 'spend'", [debit("lots", "event.amount")], {}),
    ("event.type == 'refund'", [debit("lots", "event.amount * 3", allow_negative=True)], {}),
    ("event.type == 'take'", [debit("lots", "1", **TO_OTHER), credit("lots", "1")], {}),
    ("event.type == 'buy'", [move("HOLD", "lots", "event.amount / 2", reference_id="event.ref")], {}),
    ("event.type == 'give'", [move("RELEASE", "lots", reference_id="event.ref")], {}),
    ("event.type == 'mark'", [move("RELEASE", "lots", "2.5")], {}),
    (
        "event.type == 'take'",
        [
            move("RELEASE", "lots", reference_id="'r1'"),
            debit("lots", "1"),
            move("RELEASE", "lots", reference_id="'r2'"),
            debit("lots", "1"),
        ],
        {},
    ),
    ("event.type == 'refund'", [move("FORFEIT", "lots", bucket="HELD"), tag("forfeited")], {}),
    ("event.type == 'spend'", [move("FORFEIT", "lots", "0.5")], {}),
    ("event.type == 'take'", [debit("lots", "1", bucket="HELD")], {}),
    ("event.amount >= 2", [credit("lots", "event.amount", bucket="HELD", reference_id="event.ref")], {}),
    (
        "event.amount >= 2",
        [credit("vouchers", "event.amount", bucket="HELD", reference_id="event.ref", hold_until="72h")],
        {},
    ),
    ("event.type == 'mark'", [credit("lots", "event.amount", reference_id="event.ref")], {}),
    ("event.type == 'give'", [credit("vouchers", "event.amount / 2", reference_id="event.ref")], {}),
    ("event.type == 'refund'", [move("VOID_HOLD", "vouchers", reference_id="event.ref")], {}),
    ("event.type == 'spend'", [move("VOID_HOLD", "lots", reference_id="event.ref", **TO_OTHER)], {}),
    ("event.type == 'buy'", [credit("points", "9"), move("HOLD", "points", "4", hold_until="1h")], {}),
    ("event.type == 'give'", [credit("points", "1", bucket="HELD"), move("RELEASE", "points", "0.75")], {}),
    ("event.type == 'mark'", [move("RELEASE", "points")], {}),
    ("event.type == 'take'", [move("FORFEIT", "points", "2", bucket="HELD")], {}),
    # Groups.
    ("event.type == 'buy'", [credit("lots", "2", **TO_FAMILY), counter("visits", "1", **TO_FAMILY)], {}),
    (f"{FAMILY_VISITS} < 3", [counter("visits", "1", **TO_ANY_FAMILY), credit("points", FAMILY_VISITS)], {}),
    ("event.type == 'spend'", [debit("lots", "1", **TO_ANY_FAMILY)], {}),
    ("groups.exists(g, 'rich' in g.tags)", [untag("rich", **TO_FAMILY)], {}),
    ("event.amount > 10", [tag("rich", **TO_FAMILY), move("HOLD", "lots", "1", **TO_FAMILY)], {}),
    # Budgets and further events.
    ("event.amount > 0", [credit("points", "event.amount")], {"budgets": [("points", "25")]}),
    (
        "event.ref == 'r1'",
        [credit("lots", "event.amount", reference_id="event.ref"), tag("settled")],
        {"budgets": [("lots", "15")], "stop_after_match": True},
    ),
    ("event.type == 'give'", [schedule("check", "24h", payload={"amount": 5}), schedule("ping", "1h")], {}),
    ("event.type == 'mark'", [{"type": "BROADCAST", "event_name": "news"}, debit("points", "1")], {}),
)

EVENTS = st.fixed_dictionaries(
    {
        "type": st.sampled_from(["buy", "spend", "refund", "give", "take", "mark"]),
        "who": st.sampled_from([*PEOPLE, "cat"]),
        "to": st.sampled_from([*PEOPLE, *STRANGERS]),
        "recipient": st.sampled_from([None, None, None, *PEOPLE, "dan"]),
        "amount": st.sampled_from([Decimal(n) for n in ("0", "0.5", "2", "7", "12.34", "20")]),
        "ref": st.sampled_from(["r1", "r2"]),
    }
)


@given(
    rules=st.lists(st.sampled_from(range(len(TEMPLATES))), min_size=1, max_size=12, unique=True),
    events=st.lists(EVENTS, min_size=1, max_size=24),
    sizes=st.lists(st.integers(1, 24), min_size=1, max_size=4),
    policy=st.sampled_from(["CREATE", "CREATE", "REJECT"]),
)
@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
async def test_batches_of_any_size_do_what_one_event_at_a_time_does(
    database: Database,
    new_organization: Callable[[], Tenant],
    monkeypatch: pytest.MonkeyPatch,
    rules: list[int],
    events: list[dict[str, Any]],
    sizes: list[int],
    policy: str,
) -> None:
    monkeypatch.setattr(limits, "SHELF_BEGINNING", 2)
    one_by_one = await processed(database, new_organization().id, policy, rules, events, [1])
    in_batches = await processed(database, new_organization().id, policy, rules, events, sizes)

    for what in one_by_one:
        assert in_batches[what] == one_by_one[what], what


async def processed(
    database: Database,
    organization_id: UUID,
    policy: str,
    rules: list[int],
    events: list[dict[str, Any]],
    sizes: list[int],
) -> dict[str, Any]:
    """Everything that can be seen of a new organization after these rules have met these events."""
    program = await EventProgram.open(database, organization_id, on_unknown_participant=policy)
    assets = {
        "points": await program.asset(),
        "cash": await program.asset(issuance_policy="PREFUNDED"),
        "miles": await program.asset(scale=0),
        "lots": await program.asset(inventory_mode="LOT"),
        "vouchers": await program.asset(inventory_mode="LOT", issuance_policy="PREFUNDED"),
    }
    for asset in ("cash", "vouchers"):
        async with database.transaction(organization_id) as tx:
            await wallet.fund(tx, WalletRequest(program_id=program.id, asset_id=assets[asset], amount="30"))
    people = [
        await program.participant(name, status="SUSPENDED" if name == "suspended" else "ACTIVE") for name in PEOPLE
    ]
    async with database.transaction(organization_id) as tx:
        family = await make_group(tx, people[0], people[1])
    for number in rules:
        condition, actions, fields = TEMPLATES[number]
        mapped = [placed(action, assets, family) for action in actions]
        budgets = [BudgetDraft(assets[name], limit) for name, limit in fields.get("budgets", [])]
        await program.rule(condition, *mapped, name=f"rule {number}", **fields | {"budgets": budgets})
    await program.ingest(
        [
            program.event(e["who"], key=f"k{n}", recipient=e["recipient"], at=FAR, family=str(family), **told(e))
            for n, e in enumerate(events)
        ]
    )
    assert await program.settle(*sizes) >= len(events)
    async with database.transaction(organization_id) as tx:
        await assert_ledger_invariants(tx.connection, organization_id)
    return await seen(program, {asset_id: name for name, asset_id in assets.items()} | {family: "family"})


def placed(action: dict[str, Any], assets: dict[str, UUID], family: UUID) -> dict[str, Any]:
    """The action with the ids of the asset and the group that it names."""
    if "asset_id" in action:
        action = action | {"asset_id": str(assets[action["asset_id"]])}
    if action.get("target", {}).get("id") == "family":
        action = action | {"target": {"type": "GROUP", "id": str(family)}}
    return action


def told(event: dict[str, Any]) -> dict[str, Any]:
    """The payload."""
    return {name: event[name] for name in ("type", "to", "amount", "ref")}


async def seen(program: EventProgram, assets: dict[UUID, str]) -> dict[str, Any]:
    """The organization without its identifiers and instants."""
    names: dict[Any, str] = {program.id: "program", None: "-", **assets}
    names |= {row[0]: row[1] for row in await program.sql("select id, external_id from participant")}
    names |= {row[0]: row[1] for row in await program.sql("select id, idempotency_key from event")}
    names |= {row[0]: row[1] for row in await program.sql("select id, name from rule")}

    def named(rows: list[Any]) -> list[Any]:
        return [tuple(names[value] if isinstance(value, UUID) else value for value in row) for row in rows]

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            gone = {"id", "rule_id", "rule_history_id", "created_at", "journal_entry_id", "asset_id", "hold_id"}
            gone.add("automation_id")
            return {
                key: plain(part) for key, part in value.items() if key not in gone or (key == "id" and "type" in value)
            }
        if isinstance(value, list):
            return [plain(part) for part in value]
        return names.get(UUID(value), value) if isinstance(value, str) and len(value) == 36 else value

    outcomes = await program.sql(
        "select idempotency_key, status, error_message, attempts, participant_id, recipient_id, evaluations"
        " from event order by seq"
    )
    return {
        "participants": sorted(await program.sql("select external_id, status from participant")),
        "enrollments": sorted(named(await program.sql("select participant_id, status from enrollment"))),
        "outcomes": [(*named([row[:-1]])[0], plain(row[-1])) for row in outcomes],
        "ledger": named(
            await program.sql(
                "select e.sequence, e.action_type, e.description, e.event_id, e.rule_id, a.entity_type, a.entity_id,"
                " a.asset_id, a.bucket, p.amount, p.version, p.balance from journal_entry e"
                " join posting p on p.organization_id = e.organization_id and p.entry_id = e.id"
                " join account a on a.organization_id = p.organization_id and a.id = p.account_id"
                " order by e.sequence, p.ordinal"
            )
        ),
        "lots": sorted(
            named(
                await program.sql(
                    "select entity_id, asset_id, status, amount, remaining, coalesce(reference_id, '-'),"
                    " is_provisional, expires_at is null, matures_at is null from lot"
                )
            )
        ),
        "holds": sorted(
            named(
                await program.sql(
                    "select entity_id, asset_id, kind, status, amount, remaining, coalesce(reference_id, '-'),"
                    " expires_at is null, coalesce(carrier, '-') from hold"
                )
            )
        ),
        "budgets": sorted(named(await program.sql("select rule_id, asset_id, consumed from rule_budget"))),
        "automations": sorted(
            named(
                await program.sql(
                    "select event_id, rule_id, action_index, event_name, trigger_type, participant_id, depth, status"
                    " from automation"
                )
            )
        ),
        "tags": sorted(named(await program.sql("select entity_id, tag from tag"))),
        "attributes": sorted(named(await program.sql("select entity_id, key, value from attribute"))),
        "counters": sorted(named(await program.sql("select entity_id, key, value from counter"))),
        "history": named(
            await program.sql(
                "select entity_id, state_type, key, operation, old_value, new_value, event_id, rule_id"
                " from state_history order by changed_at, id"
            )
        ),
    }
