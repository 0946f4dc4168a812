"""Counters, tags and attributes as rules write them. Contract: rules-and-events.md 5.10 to 5.12, holders.md 5."""

from decimal import Decimal

import pytest

from domain.state import counters as shown_counters
from domain.state import lock, set_counter
from tests.conftest import SettableClock
from tests.events_support import EventProgram, attribute, counter, credit, tag, untag


async def shown(program: EventProgram) -> dict[str, str]:
    """The counters of alice as the API shows them: after auto-reset."""
    alice = await program.id_of("alice")
    assert alice is not None
    async with program.database.transaction(program.organization_id) as tx:
        return {view.key: view.value for view in await shown_counters(tx, alice)}


async def put_counter(program: EventProgram, key: str, value: str, reset_after: str | None = None) -> None:
    alice = await program.id_of("alice")
    assert alice is not None
    async with program.database.transaction(program.organization_id) as tx:
        await set_counter(tx, await lock(tx, "participant", alice), key, value, reset_after)


async def test_purchase_count_7_and_lifetime_spend_340_become_8_and_389_99(program: EventProgram) -> None:
    await program.participant("alice")
    await put_counter(program, "purchase_count", "7")
    await put_counter(program, "lifetime_spend", "340.00")
    await program.rule("true", counter("purchase_count", "1"), counter("lifetime_spend", "event.amount"))

    await program.run(amount=Decimal("49.99"))

    assert await program.counters() == {"purchase_count": 8, "lifetime_spend": Decimal("389.99")}


async def test_a_counter_is_decremented_and_reset_by_its_negated_value(program: EventProgram) -> None:
    await program.rule("event.type == 'add'", counter("monthly", "event.amount"))
    await program.rule("event.type == 'reset'", counter("monthly", '-get(participant.counters, "monthly", 0.0)'))

    await program.run(type="add", amount=Decimal("12.5"))
    await program.run(type="add", amount=-3)
    assert await program.counters() == {"monthly": Decimal("9.5")}
    await program.run(type="reset")
    assert await program.counters() == {"monthly": 0}


async def test_a_counter_keeps_eighteen_decimals_and_twenty_digits_and_no_more(program: EventProgram) -> None:
    await program.rule("true", counter("n", "event.by"))

    await program.run(by=Decimal("99999999999999999999"))
    await program.run(by=Decimal("0.999999999999999999"))
    largest = {"n": Decimal("99999999999999999999.999999999999999999")}
    assert await program.counters() == largest

    for by in ("0.000000000000000001", "1e-19", "1e40", "1e64", "-1e-64"):
        event = await program.run(by=Decimal(by))
        assert event.error_message == "action COUNTER failed: counter out of range"
    assert await program.counters() == largest


async def test_a_value_that_is_no_number_fails_the_event(program: EventProgram) -> None:
    await program.rule("true", tag("x"), counter("n", "event.by"))

    assert (await program.run(by="1")).error_message == "action COUNTER failed: value is not a number"
    assert (await program.run()).status == "FAILED"
    assert (await program.tags(), await program.counters()) == (set(), {})


async def test_the_window_runs_from_creation_and_an_increment_does_not_restart_it(
    program: EventProgram, clock: SettableClock
) -> None:
    clock.set("2026-03-01T00:00:00Z")
    await program.rule("true", counter("daily", "1", reset_after="24h"))

    await program.run()
    clock.advance(hours=23)
    await program.run()
    assert await program.counters() == {"daily": 2}

    clock.advance(hours=1)
    assert await shown(program) == {"daily": "2"}, "at exact equality not yet"
    await program.run()
    assert await program.counters() == {"daily": 3}

    clock.advance(microseconds=1)
    assert await shown(program) == {"daily": "0"}
    await program.run()
    assert await program.counters() == {"daily": 1}
    assert (await program.history())[-2:] == [
        ("counter", "daily", "auto_reset", "3", "0"),
        ("counter", "daily", "set", "0", "1"),
    ]
    assert await program.sql("select last_reset_at from counter") == [(clock(),)]


async def test_conditions_see_an_elapsed_window_as_zero(program: EventProgram, clock: SettableClock) -> None:
    clock.set("2026-03-01T00:00:00Z")
    points = await program.asset()
    await program.rule("true", counter("daily", "1", reset_after="24h"))
    await program.rule('get(participant.counters, "daily", 0) == 0', credit(points, "1"))

    for _ in range(3):
        await program.run()
    assert await program.balance("alice", points) == 1
    clock.advance(days=1, seconds=1)
    for _ in range(3):
        await program.run()
    assert await program.balance("alice", points) == 2


async def test_a_window_that_elapses_without_increments_leaves_no_history(
    program: EventProgram, clock: SettableClock
) -> None:
    clock.set("2026-03-01T00:00:00Z")
    await program.rule("event.type == 'count'", counter("daily", "1", reset_after="24h"))
    await program.rule("event.type == 'look'", attribute("seen", 'string(get(participant.counters, "daily", 9))'))

    await program.run(type="count")
    clock.advance(days=2)
    await program.run(type="look")

    assert await program.attributes() == {"seen": "0"}
    assert [row[2] for row in await program.history() if row[0] == "counter"] == ["set"]


async def test_reset_after_is_changed_by_the_action_that_carries_it(
    program: EventProgram, clock: SettableClock
) -> None:
    clock.set("2026-03-01T00:00:00Z")
    await program.rule("event.set == 'hour'", counter("n", "1", reset_after="1h"))
    await program.rule("event.set == 'none'", counter("n", "1", reset_after=""))
    await program.rule("event.set == 'leave'", counter("n", "1"))

    windows = []
    for event in ("leave", "hour", "leave", "none", "leave"):
        await program.run(set=event)
        windows += await program.sql("select reset_after from counter")
    assert windows == [(None,), ("1h",), ("1h",), (None,), (None,)]

    clock.advance(days=1)
    await program.run(set="leave")
    assert await program.counters() == {"n": 6}


async def test_an_explicit_set_restarts_the_window(program: EventProgram, clock: SettableClock) -> None:
    clock.set("2026-03-01T00:00:00Z")
    await program.rule("true", counter("daily", "1", reset_after="24h"))
    await program.run()
    clock.advance(hours=20)
    await put_counter(program, "daily", "40")
    clock.advance(hours=20)

    await program.run()

    assert await program.counters() == {"daily": 41}


async def test_a_failed_event_does_not_reset_a_window(program: EventProgram, clock: SettableClock) -> None:
    clock.set("2026-03-01T00:00:00Z")
    points = await program.asset(scale=0)
    await program.rule("true", counter("daily", "1", reset_after="24h"))
    await program.rule("event.fail", credit(points, "0.5"))
    await program.run(fail=False)
    clock.advance(days=2)

    await program.run(fail=True)

    assert await program.counters() == {"daily": 1}
    assert len(await program.history()) == 1


async def test_tags_are_stored_and_matched_in_lower_case(program: EventProgram) -> None:
    points = await program.asset()
    await program.rule("event.type == 'join'", tag("VIP"))
    await program.rule('"vip" in participant.tags', credit(points, "1"))
    await program.rule('"VIP" in participant.tags', credit(points, "1000"))
    await program.rule("event.type == 'leave'", untag("Vip"))

    await program.run(type="join")
    await program.run(type="visit")
    assert await program.tags() == {"vip"}
    assert await program.balance("alice", points) == 1
    await program.run(type="leave")
    assert await program.tags() == set()


async def test_tagging_twice_and_untagging_an_absent_tag_are_no_ops(program: EventProgram) -> None:
    await program.rule("true", tag("a"), tag("A"), untag("b"))

    await program.run()
    await program.run()

    assert await program.history() == [("tag", "a", "add", None, "a")]


@pytest.mark.parametrize(
    ("value", "stored"),
    [
        ("US", "US"),
        ("gold", "gold"),
        ("2024-01-15", "2024-01-15"),
        ("not cel at all!", "not cel at all!"),
        ("unknown_name + 1", "unknown_name + 1"),
        ("event.city", "Paris"),
        ("event.amount", "12.5"),
        ("event.amount * 2", "25"),
        ("event.flag", "true"),
        ('"literal"', "literal"),
        ("string(99.0)", "99"),
        ("1e3 + 0.0", "1000"),
    ],
)
async def test_an_attribute_is_evaluated_where_its_text_compiles_and_literal_otherwise(
    program: EventProgram, value: str, stored: str
) -> None:
    await program.rule("true", attribute("a", value))

    event = await program.run(city="Paris", amount=Decimal("12.50"), flag=True)

    assert (event.status, event.error_message) == ("COMPLETED", None)
    assert await program.attributes() == {"a": stored}


@pytest.mark.parametrize("value", ["event.list", "event.nothing", "event.empty", "event.long", "event.missing"])
async def test_an_attribute_value_that_is_no_text_fails_the_event(program: EventProgram, value: str) -> None:
    await program.rule("true", tag("x"), attribute("a", value))

    event = await program.run(list=[1], nothing=None, empty="", long="x" * 4097)

    assert event.status == "FAILED"
    assert (event.error_message or "").startswith("action SET_ATTRIBUTE failed: value")
    assert (await program.tags(), await program.attributes()) == (set(), {})


async def test_setting_an_attribute_to_what_it_is_leaves_no_history(program: EventProgram) -> None:
    await program.rule("true", attribute("city", "event.city"))

    for city in ("Paris", "Paris", "Rome"):
        await program.run(city=city)

    assert await program.history() == [
        ("attribute", "city", "set", None, "Paris"),
        ("attribute", "city", "set", "Paris", "Rome"),
    ]


async def test_of_a_thousand_counters_only_the_touched_ones_are_written(program: EventProgram) -> None:
    alice = await program.participant("alice")
    await program.sql(
        "insert into counter (organization_id, entity_id, key, value, last_reset_at)"
        " select %s, %s, 'k' || i, i, now() from generate_series(1, 1000) i",
        program.organization_id,
        alice,
    )
    points = await program.asset()
    await program.rule('get(participant.counters, "k7", 0) == 7', counter("k500", "0.5"), credit(points, "1"))

    for _ in range(3):
        await program.send()
    await program.settle()

    assert await program.balance("alice", points) == 3
    written = await program.sql(
        "select key, value from counter group by key, value, xmin having xmin in"
        " (select xmin from counter where key = 'k500')"
    )
    assert written == [("k500", Decimal("501.5"))]
    assert len(await program.history()) == 3


async def test_keys_that_are_computed_reach_every_counter_and_attribute(program: EventProgram) -> None:
    alice = await program.participant("alice")
    await put_counter(program, "visits_fr", "41")
    await program.sql(
        "insert into attribute (organization_id, entity_id, key, value, updated_at)"
        " values (%s, %s, 'fr', 'Paris', now())",
        program.organization_id,
        alice,
    )
    await program.rule(
        "true",
        attribute("seen", 'string(participant.counters["visits_" + event.country])'),
        attribute("capital", "participant.attributes[event.country]"),
    )

    await program.run(country="fr")

    assert await program.attributes() == {"fr": "Paris", "seen": "41", "capital": "Paris"}
