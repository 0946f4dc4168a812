"""Who an event is about: resolution, enrollment, recipients, targets.

Contract: rules-and-events.md 5.2, 5.3, 7.2; holders.md 3.3, 3.8; basics.md 5.6.
"""

from typing import Any
from uuid import UUID

import pytest

from db.session import Database
from domain import limits
from domain.events.queries import retry
from domain.ids import new_id
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


@pytest.fixture
async def strict(database: Database, organization: Tenant) -> EventProgram:
    """A program that rejects unknown participants."""
    return await EventProgram.open(database, organization.id, on_unknown_participant="REJECT")


async def participants(program: EventProgram) -> list[str]:
    return [row[0] for row in await program.sql("select external_id from participant order by external_id")]


# --- the participant ---


async def test_an_unknown_external_id_is_created_enrolled_and_processed_in_one_step(program: EventProgram) -> None:
    points = await program.asset()
    await program.rule("true", credit(points, "10"))

    event = await program.run("new")

    assert event.status == "COMPLETED"
    assert event.participant_id == await program.id_of("new")
    assert await program.enrollment("new") == "ACTIVE"
    assert await program.balance("new", points) == 10


async def test_under_reject_an_unknown_external_id_fails_and_makes_nobody(strict: EventProgram) -> None:
    event = await strict.run("new")

    assert (event.status, event.error_message) == ("FAILED", "unknown participant")
    assert (event.participant_id, event.external_id) == (None, "new")
    assert await participants(strict) == []


@pytest.mark.parametrize("policy", ["CREATE", "REJECT"])
async def test_an_unknown_participant_id_fails_under_either_policy(
    database: Database, organization: Tenant, policy: str
) -> None:
    program = await EventProgram.open(database, organization.id, on_unknown_participant=policy)

    event = await program.run(new_id())

    assert (event.status, event.error_message) == ("FAILED", "unknown participant")
    assert await participants(program) == []


async def test_a_participant_of_another_organization_is_unknown(
    program: EventProgram, database: Database, new_organization: Any
) -> None:
    stranger = await EventProgram.open(database, new_organization().id)
    theirs = await stranger.participant("theirs")

    assert (await program.run(theirs)).error_message == "unknown participant"


@pytest.mark.parametrize("names_by", ["external_id", "participant_id"])
async def test_a_known_participant_is_enrolled_by_its_event_also_under_reject(
    strict: EventProgram, names_by: str
) -> None:
    alice = await strict.participant("alice")
    assert await strict.enrollment("alice") is None

    event = await strict.run("alice" if names_by == "external_id" else alice)

    assert (event.status, event.participant_id) == ("COMPLETED", alice)
    assert await strict.enrollment("alice") == "ACTIVE"


@pytest.mark.parametrize("status", ["FROZEN", "LOCKED", "CLOSED"])
async def test_an_inactive_enrollment_is_reactivated_and_the_participants_own_status_is_not(
    program: EventProgram, status: str
) -> None:
    alice = await program.participant("alice", status="SUSPENDED")
    await program.sql(
        "insert into enrollment (organization_id, program_id, participant_id, status, created_at, updated_at)"
        " values (%s, %s, %s, %s, now(), now())",
        program.organization_id,
        program.id,
        alice,
        status,
    )

    await program.run("alice")

    assert await program.enrollment("alice") == "ACTIVE"
    assert await program.sql("select status from participant where id = %s", alice) == [("SUSPENDED",)]


async def test_an_event_enrolls_in_its_own_program_only(program: EventProgram) -> None:
    other = await EventProgram.open(program.database, program.organization_id)

    await program.run("alice")

    assert await other.enrollment("alice") is None


async def test_a_participant_that_an_event_creates_stays_though_the_event_fails(program: EventProgram) -> None:
    points = await program.asset()
    await program.rule("true", debit(points, "1"))

    event = await program.run("new")

    assert event.status == "FAILED"
    assert event.participant_id == await program.id_of("new")
    assert await program.enrollment("new") == "ACTIVE"


async def test_a_rejected_event_can_be_retried_once_the_participant_exists(strict: EventProgram) -> None:
    await strict.rule("true", tag("seen"))
    event = await strict.run("late")
    assert event.status == "FAILED"
    await strict.participant("late")

    async with strict.database.transaction(strict.organization_id) as tx:
        await retry(tx, event.id)
    assert (await strict.outcome(event.id)).status == "PENDING"
    await strict.settle()

    after = await strict.outcome(event.id)
    assert (after.status, after.error_message, after.attempts) == ("COMPLETED", None, 1)
    assert await strict.tags("late") == {"seen"}


async def test_one_participant_under_two_names_is_one_participant(program: EventProgram) -> None:
    alice = await program.participant("alice")
    await program.rule("true", counter("n", "event.step"), attribute("last", "string(event.step)"))

    for who, step in (("alice", 1), (alice, 2), ("alice", 3)):
        await program.send(who, step=step)
    await program.settle()

    assert await program.counters() == {"n": 6}
    assert await program.attributes() == {"last": "3"}


# --- what a status blocks ---


@pytest.mark.parametrize("status", ["SUSPENDED", "CLOSED"])
async def test_blocked_actions_fail_the_event_at_once(program: EventProgram, status: str) -> None:
    points = await program.asset()
    await program.participant("alice", status=status)
    await program.rule("event.do == 'credit'", tag("x"), credit(points, "1"))
    await program.rule("event.do == 'debit'", debit(points, "1", allow_negative=True))
    await program.rule("event.do == 'counter'", counter("n", "1"))

    for action in ("credit", "debit", "counter"):
        event = await program.run(do=action)
        assert event.status == "FAILED"
        assert event.error_message == f"action {action.upper()} failed: participant is {status}"
        assert event.attempts == 1
    assert (await program.tags(), await program.counters(), await program.entries()) == (set(), {}, [])


@pytest.mark.parametrize("status", ["SUSPENDED", "CLOSED"])
async def test_allowed_actions_work_whatever_the_status(program: EventProgram, status: str) -> None:
    await program.participant("alice", status=status)
    await program.rule("true", tag("a"), tag("b"), untag("b"), attribute("city", "Paris"))

    assert (await program.run()).status == "COMPLETED"
    assert (await program.tags(), await program.attributes()) == ({"a"}, {"city": "Paris"})


async def test_nothing_triggered_completes_for_an_inactive_participant(program: EventProgram) -> None:
    points = await program.asset()
    await program.participant("alice", status="CLOSED")
    await program.rule("event.type == 'purchase'", credit(points, "1"))

    assert (await program.run(type="visit")).status == "COMPLETED"


async def test_the_targets_own_status_is_what_counts(program: EventProgram) -> None:
    points = await program.asset()
    await program.participant("alice", status="SUSPENDED")
    await program.participant("bob", status="CLOSED")
    await program.participant("carol")
    await program.rule("true", credit(points, "1", **to_participant(external_id="event.to")))

    assert (await program.run("alice", to="carol")).status == "COMPLETED"
    failed = await program.run("carol", to="bob")
    assert failed.error_message == "action CREDIT failed: participant is CLOSED"
    assert await program.balance("carol", points) == 1


async def test_the_program_has_no_status_that_blocks_a_counter(program: EventProgram) -> None:
    await program.participant("alice", status="SUSPENDED")
    await program.rule("true", counter("n", "1", **TO_PROGRAM))

    assert (await program.run()).status == "COMPLETED"
    assert await program.counters(program.id) == {"n": 1}


# --- recipients ---


async def test_assets_go_to_the_recipient_and_state_to_the_participant(program: EventProgram) -> None:
    points = await program.asset()
    await program.rule("true", credit(points, "10"), counter("gifts", "1"), tag("giver"), attribute("last", "gift"))

    await program.ingest([program.event("alice", recipient="bob", type="gift")])
    await program.settle()

    assert await program.balances(points, "alice", "bob") == [0, 10]
    assert await program.counters("alice") == {"gifts": 1}
    assert await program.counters("bob") == {}
    assert (await program.tags("alice"), await program.attributes("alice")) == ({"giver"}, {"last": "gift"})
    assert await program.enrollment("bob") == "ACTIVE"


async def test_conditions_look_at_the_participant_not_the_recipient(program: EventProgram) -> None:
    points = await program.asset()
    await program.rule('participant.external_id == "alice"', credit(points, "1"))

    await program.ingest([program.event("alice", recipient="bob"), program.event("bob", recipient="alice")])
    await program.settle()

    assert await program.balances(points, "alice", "bob") == [0, 1]


@pytest.mark.parametrize("names_by", ["external_id", "id"])
async def test_the_recipient_is_visible_under_both_names(program: EventProgram, names_by: str) -> None:
    bob = await program.participant("bob")
    await program.rule("true", attribute("to", 'event.recipient_external_id + "/" + event.recipient_id'))

    (accepted,) = await program.ingest([program.event("alice", recipient="bob" if names_by == "external_id" else bob)])
    await program.settle()

    assert await program.attributes() == {"to": f"bob/{bob}"}
    event = await program.outcome(accepted.id)  # type: ignore[union-attr]
    assert event.recipient_id == bob
    assert event.event_data == {}


async def test_a_payload_field_of_that_name_is_left_as_it_is(program: EventProgram) -> None:
    await program.rule("true", attribute("to", "event.recipient_id"))

    await program.ingest([program.event("alice", recipient="bob", recipient_id="from the payload")])
    await program.settle()

    assert await program.attributes() == {"to": "from the payload"}


async def test_a_recipient_who_is_the_participant_is_visible_too(program: EventProgram) -> None:
    points = await program.asset()
    await program.rule('event.recipient_external_id == "alice"', credit(points, "1"))

    (accepted,) = await program.ingest([program.event("alice", recipient="alice")])
    await program.settle()

    assert await program.balance("alice", points) == 1
    assert (await program.outcome(accepted.id)).recipient_id is None  # type: ignore[union-attr]


async def test_without_a_recipient_the_names_are_missing_fields(program: EventProgram) -> None:
    await program.rule("has(event.recipient_id) || has(event.recipient_external_id)", tag("x"))

    await program.run()

    assert await program.tags() == set()


async def test_an_unknown_recipient_follows_the_rules_of_participants(
    program: EventProgram, strict: EventProgram
) -> None:
    await strict.participant("alice")
    (by_name,) = await strict.ingest([strict.event("alice", recipient="nobody")])
    (by_id,) = await program.ingest([program.event("alice", recipient=new_id())])
    await strict.settle()
    await program.settle()

    assert await strict.status(by_name.id) == ("FAILED", "unknown recipient")  # type: ignore[union-attr]
    assert await program.status(by_id.id) == ("FAILED", "unknown recipient")  # type: ignore[union-attr]
    assert await participants(program) == ["alice"]


async def test_an_inactive_recipient_blocks_what_would_go_to_it(program: EventProgram) -> None:
    points = await program.asset()
    await program.participant("bob", status="SUSPENDED")
    await program.rule("true", credit(points, "1"))

    (accepted,) = await program.ingest([program.event("alice", recipient="bob")])
    await program.settle()

    status = await program.status(accepted.id)  # type: ignore[union-attr]
    assert status == ("FAILED", "action CREDIT failed: participant is SUSPENDED")


# --- targets ---


async def test_a_referral_credits_the_referrer_by_external_id(program: EventProgram) -> None:
    points = await program.asset()
    await program.rule(
        "event.type == 'signup'",
        credit(points, "500", **to_participant(external_id="event.referrer_id")),
        tag("referrer", **to_participant(external_id="event.referrer_id")),
        counter("referrals", "1", **to_participant(external_id="event.referrer_id")),
        attribute("brought", "participant.external_id", **to_participant(external_id="event.referrer_id")),
    )
    await program.participant("ref")

    await program.run("alice", type="signup", referrer_id="ref")

    assert await program.balance("ref", points) == 500
    assert await program.tags("ref") == {"referrer"}
    assert await program.counters("ref") == {"referrals": 1}
    assert await program.attributes("ref") == {"brought": "alice"}
    assert await program.balance("alice", points) == 0
    assert await program.enrollment("ref") is None


async def test_targets_by_literal_id_and_by_participant_id_expression(program: EventProgram) -> None:
    points = await program.asset()
    bob, carol = await program.participant("bob"), await program.participant("carol")
    await program.rule(
        "true",
        credit(points, "1", **to_participant(id=str(bob))),
        credit(points, "2", **to_participant(participant_id="event.to")),
    )

    assert (await program.run("alice", to=str(carol))).status == "COMPLETED"
    assert await program.balances(points, "bob", "carol") == [1, 2]


async def test_an_unknown_external_id_as_target_is_created_and_enrolled(program: EventProgram) -> None:
    points = await program.asset()
    await program.rule("true", credit(points, "1", **to_participant(external_id="event.to")))

    assert (await program.run("alice", to="new")).status == "COMPLETED"
    assert await program.balance("new", points) == 1
    assert await program.enrollment("new") == "ACTIVE"


async def test_an_unknown_external_id_as_target_fails_under_reject(strict: EventProgram) -> None:
    points = await strict.asset()
    await strict.participant("alice")
    await strict.rule("true", tag("x"), credit(points, "1", **to_participant(external_id="event.to")))

    event = await strict.run("alice", to="nobody")

    assert event.status == "FAILED"
    assert (event.error_message or "").startswith("action CREDIT failed: target participant not found")
    assert await participants(strict) == ["alice"]
    assert await strict.tags() == set()


@pytest.mark.parametrize(
    ("target", "data"),
    [
        ({"participant_id": "event.to"}, {"to": "6f1c1a52-3c1e-4d0b-9a55-5c7d0e6b9a11"}),
        ({"participant_id": "event.to"}, {"to": "not a uuid"}),
        ({"participant_id": "event.to"}, {"to": 5}),
        ({"external_id": "event.to"}, {"to": 5}),
        ({"external_id": "event.to"}, {"to": ""}),
        ({"external_id": "event.to"}, {"to": None}),
        ({"external_id": "event.to"}, {"to": "x" * 256}),
        ({"external_id": "event.to"}, {}),
        ({"id": "6f1c1a52-3c1e-4d0b-9a55-5c7d0e6b9a11"}, {}),
    ],
)
async def test_a_target_that_cannot_be_resolved_fails_the_event(
    program: EventProgram, target: dict[str, str], data: dict[str, Any]
) -> None:
    await program.rule("true", tag("x"), tag("y", **to_participant(**target)))

    event = await program.run("alice", **data)

    assert event.status == "FAILED"
    assert (event.error_message or "").startswith("action TAG failed: ")
    assert event.attempts == 1
    assert await participants(program) == ["alice"]


async def test_a_split_credit_is_atomic(program: EventProgram) -> None:
    points = await program.asset()
    await program.participant("closed", status="CLOSED")
    await program.rule(
        "true",
        credit(points, "7", **to_participant(external_id="event.first")),
        credit(points, "3", **to_participant(external_id="event.second")),
    )

    assert (await program.run("alice", first="bob", second="carol")).status == "COMPLETED"
    assert (await program.run("alice", first="bob", second="closed")).status == "FAILED"

    assert await program.balances(points, "bob", "carol") == [7, 3]


async def test_an_event_may_debit_many_participants(program: EventProgram) -> None:
    """Each debit needs a balance that is known only once its target has been loaded."""
    points = await program.asset()
    names = [f"payer-{i:02}" for i in range(20)]
    await program.rule("event.type == 'open'", credit(points, "10"))
    await program.rule(
        "event.type == 'collect'",
        *[debit(points, "4", **to_participant(external_id=f"event.payers[{i}]")) for i in range(20)],
    )
    for name in names:
        await program.send(name, type="open")
    await program.settle()

    event = await program.run("alice", type="collect", payers=names)

    assert (event.status, event.error_message) == ("COMPLETED", None)
    assert {await program.balance(name, points) for name in names} == {6}


async def test_a_batch_may_reach_from_one_event_to_the_next(program: EventProgram) -> None:
    """What an event may debit can depend on the one before it: every link is known only once the one before worked."""
    points = await program.asset()
    await program.rule("event.type == 'open'", credit(points, "10"))
    await program.rule(
        "event.type == 'pass'", debit(points, "10"), credit(points, "10", **to_participant(external_id="event.to"))
    )
    await program.run("p0", type="open")

    events = [await program.send(f"p{i}", type="pass", to=f"p{i + 1}") for i in range(30)]
    await program.settle()

    assert {(await program.status(event))[0] for event in events} == {"COMPLETED"}
    assert await program.balance("p30", points) == 10


async def test_nobody_is_created_who_is_only_almost_reached(program: EventProgram) -> None:
    """The second signup doesn't match any more once the first has been applied: its referrer must not be made."""
    points = await program.asset()
    await program.rule(
        "!('signed_up' in participant.tags)",
        tag("signed_up"),
        credit(points, "1", **to_participant(external_id="event.referrer_id")),
    )

    await program.send("alice", referrer_id="first")
    await program.send("alice", referrer_id="second")
    assert (await program.batch()).events == 2

    assert await participants(program) == ["alice", "first"]


async def test_nobody_is_left_behind_who_was_reached_until_more_was_loaded(program: EventProgram) -> None:
    """The first event takes more lots than are read at first, so the second is tried without it and reaches further."""
    points = await program.asset(inventory_mode="LOT")
    await program.rule("event.type == 'earn'", credit(points, "1"))
    await program.rule(
        "event.type == 'collect'",
        debit(points, "event.amount", **to_participant(external_id="event.payer")),
        tag("collected"),
    )
    await program.rule(
        "event.type == 'invite' && !('collected' in participant.tags)",
        credit(points, "1", **to_participant(external_id="event.friend")),
    )
    lots = 2 * limits.SHELF_BEGINNING
    await program.ingest([program.event("payer", type="earn") for _ in range(lots)])
    await program.settle()

    events = [
        await program.send("alice", type="collect", payer="payer", amount=lots),
        await program.send("alice", type="invite", friend="nobody"),
    ]
    assert (await program.batch()).events == 2

    assert [await program.status(event) for event in events] == [("COMPLETED", None)] * 2
    assert await participants(program) == ["alice", "payer"]
    assert await program.sql("select count(*)::int from enrollment") == [(2,)]


async def test_nobody_is_created_behind_an_action_that_fails(program: EventProgram) -> None:
    points = await program.asset()
    await program.rule(
        "true",
        debit(points, "1", **to_participant(external_id="event.payer")),
        credit(points, "1", **to_participant(external_id="event.payee")),
    )
    await program.participant("payer")

    assert (await program.run("alice", payer="payer", payee="payee")).status == "FAILED"
    assert await participants(program) == ["alice", "payer"]


async def test_a_target_may_be_the_participant_and_named_in_two_ways(program: EventProgram) -> None:
    points = await program.asset()
    alice = await program.participant("alice")
    await program.rule(
        "true",
        credit(points, "1"),
        credit(points, "2", **to_participant(external_id="participant.external_id")),
        credit(points, "4", **to_participant(participant_id="participant.id")),
        credit(points, "8", **to_participant(id=str(alice))),
    )

    await program.run("alice")

    assert await program.balance("alice", points) == 15


async def test_targets_across_events_of_one_batch_keep_their_order(program: EventProgram) -> None:
    points = await program.asset()
    await program.rule("event.type == 'give'", credit(points, "10", **to_participant(external_id="event.to")))
    await program.rule("event.type == 'spend'", debit(points, "10"))

    given = await program.send("alice", type="give", to="bob")
    spent = await program.send("bob", type="spend")
    spent_again = await program.send("bob", type="spend")
    assert (await program.batch()).events == 3

    statuses = [(await program.status(event))[0] for event in (given, spent, spent_again)]
    assert statuses == ["COMPLETED", "COMPLETED", "FAILED"]


async def test_program_state_is_written_by_program_targets_with_or_without_id(program: EventProgram) -> None:
    own: dict[str, Any] = {"target": {"type": "PROGRAM", "id": str(program.id)}}
    await program.rule(
        "true",
        tag("Live", **TO_PROGRAM),
        counter("n", "event.amount", **own),
        attribute("last", "participant.external_id", **TO_PROGRAM),
    )

    await program.run("alice", amount=2)
    await program.run("bob", amount=3)

    assert await program.tags(program.id) == {"live"}
    assert await program.counters(program.id) == {"n": 5}
    assert await program.attributes(program.id) == {"last": "bob"}
    assert await program.counters("alice") == {}


async def test_who_the_event_is_about_is_visible_to_expressions(program: EventProgram) -> None:
    alice: UUID = await program.participant("alice", status="SUSPENDED")
    await program.rule(
        "true", attribute("me", 'participant.id + " " + participant.external_id + " " + participant.status')
    )

    await program.run("alice")

    assert await program.attributes() == {"me": f"{alice} alice SUSPENDED"}
