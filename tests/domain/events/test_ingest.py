"""Accepting events: once per key, in input order, numbers as they came. Contract: rules-and-events.md 7.2 to 7.5."""

import asyncio
import random
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import pytest

from domain.errors import Refusal
from domain.events.ingest import Accepted, NewEvent, ingest
from domain.ids import event_id, new_id
from tests.events_support import EventProgram, credit


def verdicts(results: list[Accepted | Refusal]) -> list[str]:
    """Per item: `new`, `replay` or the code of its refusal."""
    return [
        result.code if isinstance(result, Refusal) else "replay" if result.replayed else "new" for result in results
    ]


async def test_an_accepted_event_is_received_and_its_id_is_deterministic(program: EventProgram) -> None:
    event = program.event("alice", key="order-1", amount=Decimal("1.5"))

    (accepted,) = await program.ingest([event])

    assert isinstance(accepted, Accepted)
    assert accepted.id == event_id(program.id, "order-1")
    assert (accepted.status, accepted.participant_id, accepted.external_id) == ("RECEIVED", None, "alice")
    stored = await program.outcome(accepted.id)
    assert (stored.status, stored.processed_at, stored.error_message) == ("RECEIVED", None, None)


async def test_the_same_key_and_payload_is_the_event_as_it_is_now(program: EventProgram) -> None:
    points = await program.asset()
    await program.rule("true", credit(points, "1"))
    event = program.event("alice", key="order-1")

    first, *_ = await program.ingest([event])
    await program.settle()
    (again,) = await program.ingest([event])
    await program.settle()

    assert isinstance(first, Accepted)
    assert isinstance(again, Accepted)
    assert (again.id, again.replayed, again.status) == (first.id, True, "COMPLETED")
    assert again.participant_id == await program.id_of("alice")
    assert await program.balance("alice", points) == 1


@pytest.mark.parametrize(
    "data",
    [
        {"amount": Decimal("1.50"), "note": "x", "items": [Decimal(1), {"b": Decimal("2.0"), "a": None}]},
        {"items": [Decimal("1.000"), {"a": None, "b": Decimal(2)}], "note": "x", "amount": Decimal("1.5")},
        {"note": "x", "amount": Decimal("15e-1"), "items": [Decimal("1e0"), {"a": None, "b": Decimal("20E-1")}]},
    ],
)
async def test_key_order_trailing_zeros_and_notation_make_no_other_payload(
    program: EventProgram, data: dict[str, Any]
) -> None:
    first: dict[str, Any] = {"amount": Decimal("1.5"), "note": "x", "items": [Decimal(1), {"a": None, "b": Decimal(2)}]}

    results = await program.ingest([program.event(key="k", **first), program.event(key="k", **data)])

    assert verdicts(results) == ["new", "replay"]


async def test_an_instant_is_the_same_in_every_time_zone(program: EventProgram) -> None:
    utc = program.event(key="k", at=datetime(2025, 1, 15, 10, tzinfo=UTC))
    paris = program.event(key="k", at=datetime(2025, 1, 15, 11, tzinfo=timezone(timedelta(hours=1))))

    assert verdicts(await program.ingest([utc, paris])) == ["new", "replay"]


@pytest.mark.parametrize(
    "changes",
    [
        {"event_data": {"amount": Decimal("1.6")}},
        {"event_data": {"amount": "1.5"}},
        {"event_data": {"amount": Decimal("1.5"), "more": None}},
        {"event_data": {"amount": [Decimal("1.5")]}},
        {"event_timestamp": datetime(2025, 1, 15, 10, 0, 0, 1, tzinfo=UTC)},
        {"external_id": "bob"},
        {"recipient_external_id": "bob"},
    ],
)
async def test_any_other_field_is_another_payload(program: EventProgram, changes: dict[str, Any]) -> None:
    event = program.event("alice", key="k", amount=Decimal("1.5"))
    await program.ingest([event])

    results = await program.ingest([replace(event, **changes), event])

    assert verdicts(results) == ["idempotency_conflict", "replay"]


async def test_a_participant_named_in_another_way_is_another_payload(program: EventProgram) -> None:
    alice = await program.participant("alice")

    results = await program.ingest([program.event("alice", key="k"), program.event(alice, key="k")])

    assert verdicts(results) == ["new", "idempotency_conflict"]


async def test_the_same_key_in_another_program_is_another_key(program: EventProgram) -> None:
    other = await EventProgram.open(program.database, program.organization_id)

    results = await program.ingest([program.event(key="k"), other.event(key="k", more=1)])

    assert verdicts(results) == ["new", "new"]


async def test_two_items_with_one_key_are_treated_in_sequence(program: EventProgram) -> None:
    same, other = program.event(key="k", n=1), program.event(key="k", n=2)

    results = await program.ingest([same, other, same, program.event(key="l"), other])

    assert verdicts(results) == ["new", "idempotency_conflict", "replay", "new", "idempotency_conflict"]
    assert await program.sql("select count(*) from event") == [(2,)]


async def test_duplicates_of_a_refused_item_are_refused_alike(program: EventProgram) -> None:
    event = replace(program.event(key="k"), program_id=new_id())

    assert verdicts(await program.ingest([event, event])) == ["not_found", "not_found"]


async def test_a_refused_item_consumes_nothing(program: EventProgram) -> None:
    event = program.event(key="k")
    await program.sql("update program set status = 'SUSPENDED'")
    assert verdicts(await program.ingest([event])) == ["program_inactive"]

    await program.sql("update program set status = 'ACTIVE'")
    assert verdicts(await program.ingest([replace(event, event_data={"other": "payload"})])) == ["new"]


async def test_items_are_judged_each_for_itself(program: EventProgram) -> None:
    suspended = await EventProgram.open(program.database, program.organization_id, status="SUSPENDED")

    results = await program.ingest(
        [
            program.event(key="a"),
            replace(program.event(key="b"), program_id=new_id()),
            suspended.event(key="c"),
            program.event(key="d", text="x" * 65_536),
            program.event(key="e"),
        ]
    )

    assert verdicts(results) == ["new", "not_found", "program_inactive", "bad_request", "new"]


async def test_a_replay_is_answered_though_the_program_is_not_active_any_more(program: EventProgram) -> None:
    event = program.event(key="k")
    await program.ingest([event])
    await program.sql("update program set status = 'ARCHIVED'")

    assert verdicts(await program.ingest([event, program.event(key="new")])) == ["replay", "program_inactive"]


def nested(depth: int) -> Any:
    """A value of `depth` objects one inside another."""
    value: Any = "x"
    for _ in range(depth):
        value = {"a": value}
    return value


@pytest.mark.parametrize(("levels", "verdict"), [(32, "new"), (33, "bad_request"), (60, "bad_request")])
async def test_a_payload_nests_at_most_32_deep(program: EventProgram, levels: int, verdict: str) -> None:
    event = replace(program.event(), event_data=nested(levels))

    assert verdicts(await program.ingest([event])) == [verdict]


@pytest.mark.parametrize(("text", "verdict"), [("x" * 65_526, "new"), ("x" * 65_527, "bad_request")])
async def test_a_payload_has_at_most_64_kib(program: EventProgram, text: str, verdict: str) -> None:
    event = replace(program.event(), event_data={"text": text})  # {"text":""} is 11 bytes: 65,536 - 11 = 65,525

    assert verdicts(await program.ingest([replace(event, event_data={"text": text[1:]})])) == [verdict]


async def test_the_size_of_a_payload_is_counted_in_bytes(program: EventProgram) -> None:
    assert verdicts(await program.ingest([program.event(text="é" * 32_762)])) == ["new"]
    assert verdicts(await program.ingest([program.event(text="é" * 32_763)])) == ["bad_request"]


NUMBERS = [
    "1.50",
    "0",
    "-0",
    "0.000",
    "1E+2",
    "1E-7",
    "1E+64",
    "1.23E-64",
    "1234567890123456789012345678901234567890",
    "0.123456789012345678901234567890123456789",
    "-9007199254740993",
    "0.1",
]


@pytest.mark.parametrize("number", NUMBERS)
async def test_a_payload_comes_back_digit_by_digit(program: EventProgram, number: str) -> None:
    event = await program.run(n=Decimal(number), deep=[{"n": Decimal(number)}])

    assert str(event.event_data["n"]) == number
    assert str(event.event_data["deep"][0]["n"]) == number


async def test_a_payload_keeps_texts_nulls_booleans_and_the_order_of_keys(program: EventProgram) -> None:
    data: dict[str, Any] = {"z": None, "a": True, "é": '\U0001f600\n\t"\\', "A": False, "": [], "o": {"b": 1, "a": {}}}

    event_row = await program.run(**data)

    assert event_row.event_data == data
    assert list(event_row.event_data) == list(data)


async def test_clients_that_send_the_same_keys_in_different_orders_agree(program: EventProgram) -> None:
    """Twenty clients retry the same hundred events at once: no deadlock, every event is new for exactly one of them."""
    points = await program.asset()
    await program.rule("true", credit(points, "1"))
    events = [program.event(f"p{i % 7}", key=f"k{i}", n=i) for i in range(100)]

    async def client(seed: int) -> list[tuple[str, str]]:
        shuffled = random.Random(seed).sample(events, len(events))
        results = await program.ingest(shuffled)
        return list(zip((event.idempotency_key for event in shuffled), verdicts(results), strict=True))

    answers = [answer for client_answers in await asyncio.gather(*map(client, range(20))) for answer in client_answers]

    assert Counter(verdict for _, verdict in answers) == {"new": 100, "replay": 1_900}
    assert {key for key, verdict in answers if verdict == "new"} == {event.idempotency_key for event in events}
    assert await program.settle() == 100
    assert sum([await program.balance(f"p{i}", points) for i in range(7)]) == 100


async def test_of_two_payloads_under_one_key_exactly_one_wins(program: EventProgram) -> None:
    async def send(n: int) -> str:
        return verdicts(await program.ingest([program.event(key="k", n=n % 2)]))[0]

    answers = Counter(await asyncio.gather(*map(send, range(20))))

    assert answers == {"new": 1, "replay": 9, "idempotency_conflict": 10}


async def test_a_client_whose_transaction_is_lost_leaves_the_key_free(program: EventProgram) -> None:
    """The second sender waits for the first, which then fails: the event is the second's."""
    event: NewEvent = program.event(key="k")
    stored, lost = asyncio.Event(), asyncio.Event()

    async def first() -> None:
        async with program.database.transaction(program.organization_id) as tx:
            await ingest(tx, [event])
            stored.set()
            await lost.wait()
            raise ConnectionError

    async def second() -> list[Accepted | Refusal]:
        await stored.wait()
        return await program.ingest([event])

    failing, waiting = asyncio.create_task(first()), asyncio.create_task(second())
    await stored.wait()
    lost.set()
    with pytest.raises(ConnectionError):
        await failing
    assert verdicts(await waiting) == ["new"]
