"""Rule sets: the index over event types, what a set can reach, and the cache. Contract: rules-and-events.md 4."""

import logging
from collections import OrderedDict
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import psycopg
import pytest

from db.session import Database, Transaction
from domain import programs
from domain.ids import new_id
from domain.rules import compiled, store
from domain.rules.actions import parse_actions
from domain.rules.cel import compile_expression
from domain.rules.compiled import CompiledRule, Keys, RuleSet, known_rule_set, learn_rules
from tests.conftest import Tenant

TAG = {"type": "TAG", "tag": "seen"}


def rule(order: int, condition: str, *actions: dict[str, Any], **more: Any) -> CompiledRule:
    fields: dict[str, Any] = {
        "id": new_id(),
        "name": f"rule {order}",
        "history_id": new_id(),
        "stop_after_match": False,
        "active_from": None,
        "active_to": None,
        **more,
    }
    return CompiledRule(
        order=order, condition=compile_expression(condition), actions=parse_actions(actions or [TAG]), **fields
    )


def rule_set(*rules: CompiledRule) -> RuleSet:
    return RuleSet(new_id(), 1, rules)


def orders(rules: Sequence[CompiledRule]) -> list[int]:
    return [found.order for found in rules]


# --- the window -------------------------------------------------------------------------------------------------------


def test_the_window_is_open_from_its_start_until_just_before_its_end() -> None:
    start = datetime(2026, 1, 1, tzinfo=UTC)
    end = start + timedelta(days=31)
    windowed = rule(1, "true", active_from=start, active_to=end)
    instant = timedelta(microseconds=1)

    assert [windowed.is_open(at) for at in (start - instant, start, end - instant, end)] == [False, True, True, False]
    assert rule(1, "true").is_open(start)


# --- the index --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed() -> RuleSet:
    return rule_set(
        rule(30, "event.type in ['refund', 'purchase']"),
        rule(10, "event.type == 'purchase' && event.amount > 0"),
        rule(20, "event.amount > 100"),
        rule(40, "event.type == 'signup' || event.vip"),
        rule(50, "'login' == event['type']"),
    )


def test_a_type_meets_the_rules_that_name_it_and_those_that_name_none_in_order(mixed: RuleSet) -> None:
    assert orders(mixed.candidates("purchase")) == [10, 20, 30, 40]
    assert orders(mixed.candidates("refund")) == [20, 30, 40]
    assert orders(mixed.candidates("login")) == [20, 40, 50]


def test_a_type_that_no_rule_names_meets_the_rules_without_one(mixed: RuleSet) -> None:
    assert orders(mixed.candidates("unheard of")) == [20, 40]
    assert orders(mixed.candidates("signup")) == [20, 40]


@pytest.mark.parametrize("event_type", [None, Decimal(5), True, ["purchase"], {"a": Decimal(1)}])
def test_an_event_whose_type_is_no_string_meets_all_rules(mixed: RuleSet, event_type: object) -> None:
    assert orders(mixed.candidates(event_type)) == [10, 20, 30, 40, 50]


def test_the_index_stays_within_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "TYPES_CACHED", 3)
    rules = rule_set(*(rule(i, f"event.type == 't{i}'") for i in range(1, 9)))

    for _ in range(2):
        assert [orders(rules.candidates(f"t{i}")) for i in range(1, 9)] == [[i] for i in range(1, 9)]
        assert len(rules._by_type) <= 3


def test_candidates_of_many_unknown_types_are_not_kept() -> None:
    rules = rule_set(rule(1, "event.type == 'a'"))

    assert all(not rules.candidates(f"unknown {i}") for i in range(100))
    assert rules._by_type == {}


# --- what a set can reach ---------------------------------------------------------------------------------------------


NONE: frozenset[str] = frozenset()


def counter(key: str, value: str = "1", **target: str) -> dict[str, Any]:
    return {"type": "COUNTER", "key": key, "value": value} | ({"target": target} if target else {})


def test_asset_ids_are_those_of_all_actions() -> None:
    asset, other = new_id(), new_id()
    credit = {"type": "CREDIT", "asset_id": str(asset), "amount": "1"}
    debit = {"type": "DEBIT", "asset_id": str(other), "amount": "1"}

    assert rule_set(rule(1, "true", credit), rule(2, "true", TAG, debit, credit)).asset_ids == {asset, other}


def test_keys_are_those_that_expressions_read_or_actions_write() -> None:
    rules = rule_set(
        rule(
            1,
            "get(participant.counters, 'a', 0.0) > 1 && participant.attributes.tier == 'x'",
            counter("b", "participant.counters.c + program.counters.p"),
            {"type": "SET_ATTRIBUTE", "key": "country", "value": "participant.attributes['home']"},
            counter("q", type="PROGRAM"),
        )
    )

    assert rules.keys["PARTICIPANT"] == Keys(
        frozenset({"a", "b", "c"}), frozenset({"tier", "country", "home"}), tags=False
    )
    assert rules.keys["PROGRAM"] == Keys(frozenset({"p", "q"}), NONE, tags=False)
    assert rules.keys["GROUP"] == Keys(NONE, NONE, tags=False)


@pytest.mark.parametrize(
    "condition",
    ["participant.counters[event.key] > 1", "participant.counters.size() > 1", "participant.counters == {}"],
)
def test_a_computed_key_means_all_keys(condition: str) -> None:
    assert rule_set(rule(1, condition)).keys["PARTICIPANT"] == Keys(None, NONE)


def test_the_whole_participant_means_all_keys_of_everything() -> None:
    rules = rule_set(rule(1, "participant[event.member].size() > 1"))

    assert rules.keys["PARTICIPANT"] == Keys(None, None)
    assert rules.keys["PROGRAM"] == Keys(NONE, NONE, tags=False)


def test_tags_read_no_keys_at_all() -> None:
    assert rule_set(rule(1, "'vip' in participant.tags")).keys["PARTICIPANT"] == Keys(NONE, NONE)


def test_reading_one_group_reads_its_keys_and_reading_all_groups_reads_everything() -> None:
    one = rule_set(rule(1, "group.counters.visits > 1"))
    every = rule_set(rule(1, "groups.exists(g, g.counters.visits > 1)"))

    assert (one.reads_groups, one.keys["GROUP"]) == (True, Keys(frozenset({"visits"}), NONE, tags=False))
    assert (every.reads_groups, every.keys["GROUP"]) == (True, Keys(None, None))


@pytest.mark.parametrize(
    ("action", "expected"),
    [
        ({"type": "CREDIT", "amount": "1"}, None),
        ({"type": "CREDIT", "amount": "1", "bucket": "HELD", "reference_id": "event.r"}, None),
        ({"type": "CREDIT", "amount": "1", "reference_id": "event.r"}, "HELD"),
        ({"type": "DEBIT", "amount": "1"}, "AVAILABLE"),
        ({"type": "DEBIT", "amount": "1", "bucket": "HELD"}, "HELD"),
        ({"type": "HOLD", "amount": "1"}, "AVAILABLE"),
        ({"type": "RELEASE"}, "HELD"),
        ({"type": "FORFEIT"}, "AVAILABLE"),
        ({"type": "FORFEIT", "bucket": "HELD"}, "HELD"),
        ({"type": "VOID_HOLD", "reference_id": "event.r"}, "HELD"),
    ],
)
def test_which_lots_and_holds_an_action_takes_from(action: dict[str, Any], expected: str | None) -> None:
    asset = new_id()
    rules = rule_set(rule(1, "true", action | {"asset_id": str(asset)}))

    assert rules.taking == ({(asset, expected)} if expected else frozenset())


@pytest.mark.parametrize(
    ("condition", "action", "expected"),
    [
        ("true", TAG, False),
        ("'x' in program.tags", TAG, True),
        ("true", counter("k", "program.counters.n"), True),
        ("true", TAG | {"target": {"type": "PROGRAM"}}, True),
        ("true", TAG | {"target": {"type": "PARTICIPANT", "external_id": "program.attributes.owner"}}, True),
    ],
)
def test_whether_program_state_is_used(condition: str, action: dict[str, Any], expected: bool) -> None:
    assert rule_set(rule(1, condition, action)).uses_program_state is expected


@pytest.mark.parametrize(
    ("action", "expected"),
    [
        (TAG, False),
        (TAG | {"target": {"type": "PROGRAM"}}, False),
        (TAG | {"target": {"type": "PARTICIPANT", "external_id": "event.referrer"}}, True),
        (TAG | {"target": {"type": "PARTICIPANT", "id": str(new_id())}}, True),
    ],
)
def test_whether_other_participants_are_targeted(action: dict[str, Any], expected: bool) -> None:
    assert rule_set(rule(1, "true", action)).has_targets is expected


def test_an_empty_set_reaches_nothing() -> None:
    rules = rule_set()

    assert rules.candidates("purchase") == ()
    assert (rules.asset_ids, rules.has_targets, rules.uses_program_state) == (frozenset(), False, False)


# --- loading ----------------------------------------------------------------------------------------------------------


async def new_program(tx: Transaction) -> UUID:
    program = await programs.create(tx, name="Loyalty", description=None, on_unknown_participant="CREATE")
    return program.id


async def load(database: Database, organization: Tenant, program_id: UUID) -> RuleSet:
    """The rule set as the engine asks for it: with the version that the program has now."""
    async with database.transaction(organization.id) as tx:
        version = (await programs.get(tx, program_id)).rules_version
    if (known := known_rule_set(organization.id, program_id, version)) is None:
        await learn_rules(database, organization.id, program_id)
        known = known_rule_set(organization.id, program_id, version)
    assert known is not None
    return known


def draft(program_id: UUID, condition: str = "event.type == 'purchase'", **more: Any) -> store.RuleDraft:
    return store.RuleDraft(program_id=program_id, name="Base", condition=condition, actions=[TAG], **more)


async def test_only_active_rules_of_the_program_are_loaded_by_order(database: Database, organization: Tenant) -> None:
    async with database.transaction(organization.id) as tx:
        program_id, other_program_id = await new_program(tx), await new_program(tx)
        await store.create_rule(tx, draft(program_id, order=20))
        await store.create_rule(tx, draft(program_id, order=10, stop_after_match=True))
        await store.create_rule(tx, draft(program_id, order=15, status="SUSPENDED"))
        archived = await store.create_rule(tx, draft(program_id, order=30))
        await store.patch_rule(tx, archived.id, {"status": "ARCHIVED"})
        await store.create_rule(tx, draft(other_program_id, order=5))

    rules = await load(database, organization, program_id)

    assert [(r.order, r.stop_after_match) for r in rules.rules] == [(10, True), (20, False)]


async def test_the_same_version_is_compiled_once(database: Database, organization: Tenant) -> None:
    async with database.transaction(organization.id) as tx:
        program_id = await new_program(tx)
        await store.create_rule(tx, draft(program_id))

    assert await load(database, organization, program_id) is await load(database, organization, program_id)


@pytest.mark.parametrize(
    "changes",
    [
        {"condition": "event.type == 'signup'"},
        {"order": 99},
        {"stop_after_match": True},
        {"active_to": datetime(2030, 1, 1, tzinfo=UTC)},
    ],
)
async def test_every_change_makes_a_new_version(
    database: Database, organization: Tenant, changes: dict[str, Any]
) -> None:
    async with database.transaction(organization.id) as tx:
        program_id = await new_program(tx)
        changed = await store.create_rule(tx, draft(program_id))
        await store.create_rule(tx, draft(program_id))
    before = await load(database, organization, program_id)

    async with database.transaction(organization.id) as tx:
        history_id = (await store.patch_rule(tx, changed.id, changes)).history_id
    after = await load(database, organization, program_id)

    assert after.version > before.version
    assert history_id in {r.history_id for r in after.rules}
    assert history_id not in {r.history_id for r in before.rules}
    # The rule that did not change was not compiled again.
    assert {id(r) for r in before.rules} & {id(r) for r in after.rules}


async def test_suspending_takes_a_rule_out_and_activating_brings_it_back(
    database: Database, organization: Tenant
) -> None:
    async with database.transaction(organization.id) as tx:
        program_id = await new_program(tx)
        created = await store.create_rule(tx, draft(program_id))
    counts = []
    for status in ("SUSPENDED", "ACTIVE", "ARCHIVED"):
        async with database.transaction(organization.id) as tx:
            await store.patch_rule(tx, created.id, {"status": status})
        counts.append(len((await load(database, organization, program_id)).rules))

    assert counts == [0, 1, 0]


async def test_a_rolled_back_change_leaves_the_version(database: Database, organization: Tenant) -> None:
    async with database.transaction(organization.id) as tx:
        program_id = await new_program(tx)
        created = await store.create_rule(tx, draft(program_id))
    before = await load(database, organization, program_id)

    async def change_and_fail() -> None:
        async with database.transaction(organization.id) as tx:
            await store.patch_rule(tx, created.id, {"order": 77})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await change_and_fail()

    assert await load(database, organization, program_id) is before


async def test_a_rule_that_no_longer_compiles_is_left_out_and_logged(
    database: Database,
    organization: Tenant,
    owner: psycopg.Connection[Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with database.transaction(organization.id) as tx:
        program_id = await new_program(tx)
        good = await store.create_rule(tx, draft(program_id))
        bad_condition = await store.create_rule(tx, draft(program_id))
        bad_action = await store.create_rule(tx, draft(program_id))
    owner.execute("update rule set condition = 'event.' where id = %s", [bad_condition.id])
    owner.execute("""update rule set actions = '[{"type": "MINT"}]' where id = %s""", [bad_action.id])

    with caplog.at_level(logging.ERROR, logger="scrip.rules"):
        rules = await load(database, organization, program_id)

    assert [r.id for r in rules.rules] == [good.id]
    assert {record.rule_id for record in caplog.records} == {str(bad_condition.id), str(bad_action.id)}  # type: ignore[attr-defined]


async def test_the_cache_keeps_the_programs_used_last(
    database: Database, organization: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "_cache", OrderedDict())
    async with database.transaction(organization.id) as tx:
        ids = [await new_program(tx) for _ in range(3)]
        for program_id in ids:
            await store.create_rule(tx, draft(program_id))
    first, second = [await load(database, organization, program_id) for program_id in ids[:2]]
    monkeypatch.setattr(compiled, "RULE_CHARS_CACHED", first.size + second.size)

    assert await load(database, organization, ids[0]) is first
    await load(database, organization, ids[2])  # pushes out the second, which was used least recently

    assert await load(database, organization, ids[0]) is first
    assert await load(database, organization, ids[1]) is not second
    assert len(compiled._cache) == 2
