"""Rules of one event see the state before it, and its effects are all or nothing. Contract: rules-and-events.md 4."""

from decimal import Decimal

from tests.events_support import TO_PROGRAM, EventProgram, attribute, counter, credit, debit, tag, untag


async def test_conditions_of_later_rules_read_the_state_before_the_event(program: EventProgram) -> None:
    points = await program.asset()
    await program.rule("true", tag("seen"), counter("visits", "1"), attribute("last", "event.page"))
    await program.rule('"seen" in participant.tags', credit(points, "100"))
    await program.rule('get(participant.counters, "visits", 0) > 0', credit(points, "10"))
    await program.rule("has(participant.attributes.last)", credit(points, "1"))

    await program.run(page="home")
    assert await program.balance("alice", points) == 0

    await program.run(page="cart")
    assert await program.balance("alice", points) == 111


async def test_amounts_and_values_read_the_state_before_the_event(program: EventProgram) -> None:
    points = await program.asset()
    await program.rule("true", counter("visits", "1"))
    await program.rule(
        "true",
        credit(points, 'get(participant.counters, "visits", 0) + 1'),
        counter("copy", 'get(participant.counters, "visits", 0)'),
        attribute("visits", 'string(get(participant.counters, "visits", 0))'),
    )

    await program.run()
    await program.run()

    assert await program.balance("alice", points) == 3
    assert await program.counters() == {"visits": 2, "copy": 1}
    assert await program.attributes() == {"visits": "1"}


async def test_an_action_sees_the_state_before_its_own_rule(program: EventProgram) -> None:
    points = await program.asset()
    await program.rule(
        "true", counter("n", "5"), credit(points, 'get(participant.counters, "n", 0) + 1'), counter("n", "-2")
    )

    await program.run()

    assert await program.balance("alice", points) == 1


async def test_program_state_is_a_snapshot_too(program: EventProgram) -> None:
    points = await program.asset()
    await program.rule("true", counter("total", "1", **TO_PROGRAM))
    await program.rule('get(program.counters, "total", 0) >= 2', credit(points, "1"))

    events = [await program.send(who) for who in ("alice", "bob", "carol")]
    await program.settle()

    assert [await program.balance(who, points) for who in ("alice", "bob", "carol")] == [0, 0, 1]
    assert [(await program.status(event))[0] for event in events] == ["COMPLETED"] * 3
    assert await program.counters(program.id) == {"total": 3}


async def test_two_counter_actions_on_one_key_in_one_event_add_up(program: EventProgram) -> None:
    await program.rule("true", counter("points", "1.5"), counter("points", "2"))
    await program.rule("true", counter("points", "-0.25"))

    await program.run()

    assert await program.counters() == {"points": Decimal("3.25")}
    assert [row[3:] for row in await program.history()] == [(None, "1.5"), ("1.5", "3.5"), ("3.5", "3.25")]


async def test_tag_and_untag_in_one_event_take_effect_in_order(program: EventProgram) -> None:
    await program.rule("true", tag("a"), untag("a"), tag("b"))
    await program.rule("true", untag("b"), tag("b"), tag("b"))

    await program.run()

    assert await program.tags() == {"b"}
    assert [(row[1], row[2]) for row in await program.history()] == [
        ("a", "add"),
        ("a", "remove"),
        ("b", "add"),
        ("b", "remove"),
        ("b", "add"),
    ]


async def test_the_next_event_of_the_same_batch_sees_what_the_first_one_did(program: EventProgram) -> None:
    points = await program.asset()
    await program.rule(
        "event.type == 'signup' && !('welcome_bonus' in participant.tags)",
        credit(points, "100"),
        tag("welcome_bonus"),
    )

    first, second = await program.send(type="signup"), await program.send(type="signup")
    assert (await program.batch()).events == 2

    assert await program.balance("alice", points) == 100
    assert len(await program.evaluations(first)) == 1
    assert await program.evaluations(second) == []


async def test_one_failing_action_leaves_nothing_of_its_event(program: EventProgram) -> None:
    points, miles = await program.asset(), await program.asset(scale=0)
    await program.rule(
        "true",
        credit(points, "10"),
        counter("n", "1"),
        counter("total", "1", **TO_PROGRAM),
        tag("gold"),
        attribute("city", "Paris"),
    )
    await program.rule("true", credit(points, "5"), credit(miles, "0.5"), tag("never"))
    await program.rule("true", tag("later"))

    event = await program.run()

    assert (event.status, event.error_message) == ("FAILED", "action CREDIT failed: amount exceeds asset scale")
    assert await program.entries() == []
    assert await program.balance("alice", points) == 0
    assert (await program.counters(), await program.counters(program.id)) == ({}, {})
    assert (await program.tags(), await program.attributes(), await program.history()) == (set(), {}, [])


async def test_the_records_of_a_failed_event_say_how_far_it_came(program: EventProgram) -> None:
    points, miles = await program.asset(), await program.asset(scale=0)
    first = await program.rule("true", credit(points, "10"))
    second = await program.rule("true", credit(miles, "0.5"))
    await program.rule("true", tag("never"))

    event = await program.run()

    records = await program.evaluations(event.id)
    assert [(record["rule_id"], record["status"]) for record in records] == [
        (str(first.id), "SUCCESS"),
        (str(second.id), "FAILED"),
    ]
    assert records[1]["error_message"] == "action CREDIT failed: amount exceeds asset scale"


async def test_a_failing_event_is_undone_beside_others_of_its_batch(program: EventProgram) -> None:
    points = await program.asset()
    await program.rule(
        "true", counter("n", "1"), tag("{}"), attribute("last", "event.page"), credit(points, "event.amount")
    )
    await program.rule("event.amount == 2", untag("{}"), counter("n", "100"), debit(points, "1000"))

    outcomes = [await program.send(amount=amount, page=f"t{amount}") for amount in (1, 2, 3)]
    assert (await program.batch()).events == 3

    assert [(await program.status(event))[0] for event in outcomes] == ["COMPLETED", "FAILED", "COMPLETED"]
    assert await program.balance("alice", points) == 4
    assert await program.counters() == {"n": 2}
    assert await program.tags() == {"{}"}
    assert await program.attributes() == {"last": "t3"}
    assert {row[0] for row in await program.sql("select event_id from state_history")} == {outcomes[0], outcomes[2]}
    assert {row[1] for row in await program.entries()} == {outcomes[0], outcomes[2]}


async def test_every_effect_names_its_event_and_rule(program: EventProgram) -> None:
    points = await program.asset()
    rule = await program.rule("true", credit(points, "1"), tag("a"), counter("n", "1"))

    event = await program.run()

    assert await program.entries() == [("CREDIT", event.id, rule.id)]
    rows = await program.sql("select distinct event_id, rule_id, api_key_id from state_history")
    assert rows == [(event.id, rule.id, None)]


async def test_no_rule_matched_is_completed_with_nothing_done(program: EventProgram) -> None:
    await program.rule("event.type == 'other'", tag("x"))

    event = await program.run(type="purchase")

    assert (event.status, event.error_message) == ("COMPLETED", None)
    assert event.processed_at is not None
    assert await program.evaluations(event.id, include_skipped=True) == []
    assert (await program.tags(), await program.entries()) == (set(), [])
