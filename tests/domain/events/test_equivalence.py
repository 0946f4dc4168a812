"""Batches of any size do exactly what one event at a time does. Contract: rules-and-events.md 4, 7.7.

Goal: no combination of rules and events may make the result depend on how the queue was cut into batches. Method: the
same rules and events go through two organizations, in one of them one by one, in the other in batches of drawn sizes;
then everything that can be seen of the two must be equal, identifiers and instants aside.
"""

from collections.abc import Callable
from decimal import Decimal
from typing import Any
from uuid import UUID

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from db.session import Database
from domain import wallet
from domain.wallet import WalletRequest
from tests.conftest import Tenant
from tests.events_support import (
    TO_PROGRAM,
    EventProgram,
    attribute,
    counter,
    credit,
    debit,
    tag,
    to_participant,
    untag,
)
from tests.ledger_invariants import assert_ledger_invariants

PEOPLE = ("ann", "ben", "suspended")
STRANGERS = ("cat", "dan")

TO_OTHER = to_participant(external_id="event.to")
SPENT = 'get(participant.counters, "spent", 0)'
TOTAL = 'get(program.counters, "total", 0)'

Template = tuple[str, list[dict[str, Any]], dict[str, Any]]

# (condition, actions, fields of the rule). `points`, `cash` and `miles` stand for assets: unlimited with two decimals,
# prefunded and soon empty, and without decimals.
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
)

EVENTS = st.fixed_dictionaries(
    {
        "type": st.sampled_from(["buy", "spend", "refund", "give", "take", "mark"]),
        "who": st.sampled_from([*PEOPLE, "cat"]),
        "to": st.sampled_from([*PEOPLE, *STRANGERS]),
        "recipient": st.sampled_from([None, None, None, *PEOPLE, "dan"]),
        "amount": st.sampled_from([Decimal(n) for n in ("0", "0.5", "2", "7", "12.34", "20")]),
    }
)


@given(
    rules=st.lists(st.sampled_from(range(len(TEMPLATES))), min_size=1, max_size=9, unique=True),
    events=st.lists(EVENTS, min_size=1, max_size=24),
    sizes=st.lists(st.integers(1, 24), min_size=1, max_size=4),
    policy=st.sampled_from(["CREATE", "CREATE", "REJECT"]),
)
@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
async def test_batches_of_any_size_do_what_one_event_at_a_time_does(
    database: Database,
    new_organization: Callable[[], Tenant],
    rules: list[int],
    events: list[dict[str, Any]],
    sizes: list[int],
    policy: str,
) -> None:
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
    }
    async with database.transaction(organization_id) as tx:
        await wallet.fund(tx, WalletRequest(program_id=program.id, asset_id=assets["cash"], amount="30"))
    for name in PEOPLE:
        await program.participant(name, status="SUSPENDED" if name == "suspended" else "ACTIVE")
    for number in rules:
        condition, actions, fields = TEMPLATES[number]
        mapped = [
            action | {"asset_id": str(assets[action["asset_id"]])} if "asset_id" in action else action
            for action in actions
        ]
        await program.rule(condition, *mapped, name=f"rule {number}", **fields)
    await program.ingest(
        [
            program.event(
                e["who"], key=f"k{n}", recipient=e["recipient"], type=e["type"], to=e["to"], amount=e["amount"]
            )
            for n, e in enumerate(events)
        ]
    )
    assert await program.settle(*sizes) == len(events)
    async with database.transaction(organization_id) as tx:
        await assert_ledger_invariants(tx.connection, organization_id)
    return await seen(program, {asset_id: name for name, asset_id in assets.items()})


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
            gone = ("id", "rule_id", "rule_history_id", "created_at", "journal_entry_id", "asset_id")
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
