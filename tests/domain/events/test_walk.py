"""The walk over the rules: order, windows, errors, limits, stopping, records. Contract: rules-and-events.md 4."""

import itertools
import time
from datetime import UTC, datetime
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import pytest

from domain import limits
from domain.events import engine
from domain.events.queries import retry
from domain.rules.cel import values
from domain.rules.store import patch_rule
from tests.conftest import SettableClock
from tests.events_support import EventProgram, attribute, counter, credit, schedule, tag

HOSTILE = "event.items.all(a, event.items.all(b, event.items.all(c, a + b + c >= 0)))"
"""More steps than any expression may take, for a list of 50 numbers."""


def outline(records: list[dict[str, Any]]) -> list[tuple[str, str, str | None]]:
    return [(record["rule_name"], record["status"], record.get("reason")) for record in records]


async def test_rules_run_by_ascending_order_whatever_order_they_were_made_in(program: EventProgram) -> None:
    for order in (500, 100, 1000, 300):
        await program.rule("true", tag(f"t{order}"), order=order, name=str(order))

    event = await program.run()

    assert [record["rule_name"] for record in await program.evaluations(event.id)] == ["100", "300", "500", "1000"]


async def test_several_rules_may_fire_for_one_event(program: EventProgram) -> None:
    points = await program.asset()
    await program.rule('event.mcc == "5812"', credit(points, "event.amount * 3"))
    await program.rule("event.amount > 100", credit(points, "100"))

    event = await program.run(amount=Decimal("150.00"), mcc="5812")

    assert await program.balance("alice", points) == 550
    assert {row[1] for row in await program.entries()} == {event.id}


async def test_a_match_with_stop_ends_the_walk_and_later_rules_are_listed_as_stopped(program: EventProgram) -> None:
    first = await program.rule("true", tag("a"), stop_after_match=True, name="first")
    await program.rule("true", tag("b"), name="second")
    await program.rule("event.missing == 1", tag("c"), name="third")
    await program.rule("event.type == 'other'", tag("d"), name="ruled out by type")
    await program.rule("true", tag("e"), name="suspended", status="SUSPENDED")

    event = await program.run(type="visit")

    assert await program.tags() == {"a"}
    records = await program.evaluations(event.id)
    assert outline(records) == [
        ("first", "SUCCESS", None),
        ("second", "SKIPPED", "STOPPED_BY_PRIOR_RULE"),
        ("third", "SKIPPED", "STOPPED_BY_PRIOR_RULE"),
    ]
    assert {record["stopped_by_rule_id"] for record in records[1:]} == {first.id}
    assert event.evaluations is not None
    assert len(event.evaluations) == 1, "stored is only the rule that ran"


async def test_a_stopping_rule_that_does_not_match_stops_nothing(program: EventProgram) -> None:
    await program.rule("event.n == 2", tag("a"), stop_after_match=True)
    await program.rule("true", tag("b"))

    event = await program.run(n=1)

    assert await program.tags() == {"b"}
    assert len(await program.evaluations(event.id)) == 1


async def test_stopped_rules_are_those_of_the_time_of_processing(program: EventProgram) -> None:
    first = await program.rule("true", tag("a"), stop_after_match=True, name="first")
    second = await program.rule("true", tag("b"), name="second")
    event = await program.run()

    async with program.database.transaction(program.organization_id) as tx:
        await patch_rule(tx, first.id, {"stop_after_match": False})
        await patch_rule(tx, second.id, {"name": "renamed"})
    await program.rule("true", tag("c"), name="new")

    records = await program.evaluations(event.id)
    assert outline(records) == [("first", "SUCCESS", None), ("second", "SKIPPED", "STOPPED_BY_PRIOR_RULE")]
    assert records[1]["rule_history_id"] == second.history_id


async def test_a_stopped_rule_has_an_id_of_its_own_in_each_event(program: EventProgram) -> None:
    await program.rule("true", tag("a"), stop_after_match=True)
    second = await program.rule("true", tag("b"))
    events = [await program.run(), await program.run()]

    first_look, second_look = [
        [(await program.evaluations(event.id))[1]["id"] for event in events] for _ in ("once", "again")
    ]

    assert first_look == second_look
    assert len({*first_look, second.id, second.history_id}) == 4


async def test_a_last_match_that_does_not_stop_lists_no_stopped_rules(program: EventProgram) -> None:
    await program.rule("event.n == 2", tag("a"), stop_after_match=True)
    await program.rule("true", tag("b"), name="last")
    await program.rule("event.missing == 1", tag("c"), name="broken")

    event = await program.run(n=1)

    assert outline(await program.evaluations(event.id)) == [("last", "SUCCESS", None)]


async def test_another_programs_rules_are_not_listed_as_stopped(program: EventProgram) -> None:
    other = await EventProgram.open(program.database, program.organization_id)
    await other.rule("true", tag("x"), name="foreign", order=9)
    await program.rule("true", tag("a"), name="first", order=1, stop_after_match=True)

    event = await program.run()

    assert outline(await program.evaluations(event.id)) == [("first", "SUCCESS", None)]


async def test_a_rule_outside_its_window_is_skipped_by_wall_clock(program: EventProgram, clock: SettableClock) -> None:
    opens, closes = datetime(2026, 3, 1, tzinfo=UTC), datetime(2026, 4, 1, tzinfo=UTC)
    await program.rule("true", tag("x"), active_from=opens, active_to=closes)

    async def outcome_at(wall: str, happened: datetime) -> list[tuple[str, str | None]]:
        clock.set(wall)
        (accepted,) = await program.ingest([program.event(at=happened)])
        await program.settle()
        return [(r["status"], r.get("reason")) for r in await program.evaluations(accepted.id)]  # type: ignore[union-attr]

    outside, inside = [("SKIPPED", "OUTSIDE_TIME_WINDOW")], [("SUCCESS", None)]
    march, january = datetime(2026, 3, 15, tzinfo=UTC), datetime(2025, 1, 15, tzinfo=UTC)
    assert await outcome_at("2026-02-28T23:59:59.999999Z", march) == outside
    assert await outcome_at("2026-03-01T00:00:00Z", january) == inside
    assert await outcome_at("2026-03-31T23:59:59.999999Z", january) == inside
    assert await outcome_at("2026-04-01T00:00:00Z", march) == outside


async def test_now_is_the_events_own_time(program: EventProgram) -> None:
    await program.rule('now < timestamp("2025-02-01T00:00:00Z")', tag("early"))
    await program.rule("now() == now", tag("same"))

    await program.run()

    assert await program.tags() == {"early", "same"}


async def test_a_missing_field_skips_the_rule_and_the_event_goes_on(program: EventProgram) -> None:
    await program.rule('event.coupon_code == "X"', tag("coupon"), name="coupon")
    await program.rule('has(event.coupon_code) && event.coupon_code == "X"', tag("has"), name="has")
    await program.rule("true", tag("always"), name="always")

    event = await program.run(type="purchase")

    assert (event.status, await program.tags()) == ("COMPLETED", {"always"})
    assert outline(await program.evaluations(event.id)) == [("always", "SUCCESS", None)]
    assert outline(await program.evaluations(event.id, include_skipped=True)) == [
        ("coupon", "SKIPPED_ERROR", None),
        ("always", "SUCCESS", None),
    ]


async def test_a_number_as_text_is_no_number(program: EventProgram) -> None:
    await program.rule("event.amount > 50.0", tag("text"))
    await program.rule("double(event.amount) > 50.0", tag("double"))

    await program.run(amount="60")

    assert await program.tags() == {"double"}


async def test_an_error_that_or_absorbs_is_none(program: EventProgram) -> None:
    await program.rule("event.missing == 1 || true", tag("or"))
    await program.rule("event.missing == 1 && true", tag("and"))
    await program.rule("!(event.missing == 1)", tag("not"))

    await program.run()

    assert await program.tags() == {"or"}


@pytest.mark.parametrize("condition", ["event.n", "'yes'", "1", "event.list"])
async def test_a_condition_that_gives_no_bool_skips_its_rule(program: EventProgram, condition: str) -> None:
    await program.rule(condition, tag("x"))

    event = await program.run(n=1, list=[True])

    (record,) = await program.evaluations(event.id, include_skipped=True)
    assert (event.status, record["status"], await program.tags()) == ("COMPLETED", "SKIPPED_ERROR", set())


async def test_a_hostile_rule_times_out_and_harms_nobody(program: EventProgram) -> None:
    points = await program.asset()
    await program.rule(HOSTILE, tag("hostile"), name="hostile", stop_after_match=True)
    await program.rule("true", credit(points, "1"), name="good")

    events = [await program.send(who, items=list(range(50))) for who in ("alice", "bob")]
    events.append(await program.send("carol", items=[1]))
    await program.settle()

    assert [(await program.status(event))[0] for event in events] == ["COMPLETED"] * 3
    assert outline(await program.evaluations(events[0], include_skipped=True)) == [
        ("hostile", "SKIPPED_TIMEOUT", None),
        ("good", "SUCCESS", None),
    ]
    assert outline(await program.evaluations(events[0])) == [("good", "SUCCESS", None)]
    assert [await program.balance(who, points) for who in ("alice", "bob", "carol")] == [1, 1, 0]
    assert await program.tags("carol") == {"hostile"}


async def test_an_amount_that_takes_too_long_fails_its_event_only(program: EventProgram) -> None:
    points = await program.asset()
    await program.rule("true", credit(points, f"{HOSTILE} ? 1 : 2"))

    bad, good = await program.send("alice", items=list(range(50))), await program.send("bob", items=[])
    await program.settle()

    assert (await program.status(bad))[0] == "FAILED"
    assert await program.status(good) == ("COMPLETED", None)


async def test_the_event_type_index_leaves_no_record_of_what_it_rules_out(program: EventProgram) -> None:
    await program.rule("event.type == 'refund' && event.missing == 1", tag("a"), name="refund")
    await program.rule("event.type == 'purchase' && event.missing == 1", tag("b"), name="purchase")

    event = await program.run(type="purchase")

    records = await program.evaluations(event.id, include_skipped=True)
    assert outline(records) == [("purchase", "SKIPPED_ERROR", None)]


@pytest.mark.parametrize("payload", [{}, {"type": 7}, {"type": None}, {"type": ["purchase"]}])
async def test_an_event_without_a_textual_type_meets_all_rules(program: EventProgram, payload: dict[str, Any]) -> None:
    await program.rule("event.type == 'purchase'", tag("a"))
    await program.rule("true", tag("b"))

    event = await program.run(**payload)

    assert (event.status, await program.tags()) == ("COMPLETED", {"b"})


async def test_rules_of_another_program_are_never_evaluated(program: EventProgram) -> None:
    other = await EventProgram.open(program.database, program.organization_id)
    await other.rule("true", tag("other"))
    await program.rule("true", tag("own"))

    await program.run()

    assert await program.tags() == {"own"}


async def test_a_changed_rule_is_what_the_next_event_meets(program: EventProgram) -> None:
    rule = await program.rule("true", tag("old"))
    first = await program.run()

    async with program.database.transaction(program.organization_id) as tx:
        await patch_rule(tx, rule.id, {"actions": [tag("new")]})
    second = await program.run()
    async with program.database.transaction(program.organization_id) as tx:
        await patch_rule(tx, rule.id, {"status": "ARCHIVED"})
    third = await program.run()

    assert await program.tags() == {"old", "new"}
    versions = [
        [record["rule_history_id"] for record in await program.evaluations(event.id)]
        for event in (first, second, third)
    ]
    assert versions[0] != versions[1]
    assert versions[2] == []


async def test_a_retry_meets_the_rules_as_they_are_now_at_the_events_own_time(program: EventProgram) -> None:
    points = await program.asset(scale=0)
    rule = await program.rule('now < timestamp("2025-02-01T00:00:00Z")', credit(points, "event.amount"))
    event = await program.run(amount=Decimal("2.5"))
    assert event.status == "FAILED"

    async with program.database.transaction(program.organization_id) as tx:
        await patch_rule(tx, rule.id, {"actions": [credit(points, "round(event.amount)")]})
        await retry(tx, event.id)
    await program.settle()

    after = await program.outcome(event.id)
    assert (after.status, after.error_message) == ("COMPLETED", None)
    assert await program.balance("alice", points) == 3
    assert [record["status"] for record in await program.evaluations(event.id)] == ["SUCCESS"]


async def test_matched_rules_are_kept_for_the_list_of_events(program: EventProgram) -> None:
    yes = await program.rule("true", tag("a"))
    await program.rule("event.n == 2", tag("b"))

    event = await program.run(n=1)

    assert event.matched_rule_ids == [yes.id]


async def test_the_records_of_a_failed_event_name_nothing_that_was_taken_back(program: EventProgram) -> None:
    points = await program.asset()
    await program.rule("true", credit(points, "5", bucket="HELD", hold_until="1h"), schedule("later", "1h"))
    await program.rule("true", credit(points, "0.001"))

    event = await program.run()

    assert event.status == "FAILED"
    first, second = await program.evaluations(event.id)
    assert [sorted(action) for action in first["actions"]] == [
        ["amount", "asset_id", "target", "type"],
        ["event_name", "target", "trigger_at", "type"],
    ]
    assert second["error_message"] == "action CREDIT failed: amount exceeds asset scale"


async def test_rules_that_compute_for_too_long_fail_their_event_instead_of_dropping_what_it_earned(
    program: EventProgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = await program.asset()
    await program.rule("true", credit(points, "1"))
    await program.rule("true", credit(points, "2"))
    monkeypatch.setattr(limits, "EVENT_MS", -1)

    event = await program.run()

    assert (event.status, event.attempts) == ("FAILED", 1)
    assert "compute for longer" in (event.error_message or "")
    assert await program.entries() == []


async def test_a_worker_that_stands_still_changes_nobodys_reward(
    program: EventProgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    hours = itertools.count()
    standing_still = SimpleNamespace(monotonic=lambda: next(hours) * 3600.0, thread_time=time.thread_time)
    for module in (engine, values):
        monkeypatch.setattr(module, "time", standing_still)
    points = await program.asset()
    for _ in range(3):
        await program.rule("event.items.all(x, x >= 0)", credit(points, "1"))

    event = await program.run(items=list(range(600)))

    assert event.status == "COMPLETED"
    assert await program.balance("alice", points) == 3


async def test_one_event_runs_a_bounded_number_of_actions(
    program: EventProgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "ACTIONS_PER_EVENT", 3)
    await program.rule("true", tag("a"), tag("b"))
    await program.rule("true", tag("c"), tag("d"))

    event = await program.run()

    assert (event.status, event.error_message) == ("FAILED", "action TAG failed: more than 3 actions for one event")
    assert await program.tags() == set()


async def test_busy_events_cut_a_batch_short(program: EventProgram, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BATCH_ACTIONS", 3)
    await program.rule("true", tag("a"), tag("b"))
    for _ in range(5):
        await program.send()

    assert [(await program.batch()).events for _ in range(4)] == [2, 2, 1, 0]


async def test_a_holder_has_a_bounded_number_of_tags_counters_and_attributes(
    program: EventProgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "STATE_KEYS", 2)
    for name in ("a", "b", "c"):
        await program.rule(f"event.kind == 'tag' && event.name == '{name}'", tag(name))
        await program.rule(f"event.kind == 'counter' && event.name == '{name}'", counter(name, "1"))
        await program.rule(f"event.kind == 'attribute' && event.name == '{name}'", attribute(name, "'x'"))

    for kind in ("tag", "counter", "attribute"):
        events = [await program.send(kind=kind, name=name) for name in ("a", "b", "a", "c", "b")]
        await program.settle()
        statuses = [await program.status(event) for event in events]
        assert [status for status, _ in statuses] == ["COMPLETED"] * 3 + ["FAILED", "COMPLETED"]
        assert f"more than 2 {kind}s" in (statuses[3][1] or "")
    assert await program.counters() == {"a": 2, "b": 2}
