"""Card authorizations: points are promised at the authorization and reconciled at the settlement, by reference.

An authorization credits HELD under the issuer's reference. Its settlement credits AVAILABLE under the same reference:
what is held goes, the true amount comes, and only the difference moves against the source. A reversal voids, and an
authorization that nobody settles comes to its end. Contract: rules-and-events.md 5.5, 5.7, 5.9; holders.md 6.6 to 6.8.
"""

from typing import Any
from uuid import UUID

import pytest

from tests.conftest import SettableClock, Tenant
from tests.events_support import HttpProgram, counter, credit, debit, move
from tests.program_support import (
    Buckets,
    Posting,
    amounts,
    buckets,
    entries_of,
    eventually,
    get,
    holds_of,
    lots_of,
    post,
    postings,
    run_all,
    verdicts,
)
from workflows.gateway import Gateway

REFERENCE = "event.authorization_id"
ISSUANCE = "SYSTEM_ISSUANCE"


class Card:
    """A card program: a point a dollar, promised with the authorization."""

    def __init__(self, program: HttpProgram, points: str) -> None:
        self.program = program
        self.points = points

    @classmethod
    async def open(cls, program: HttpProgram, hold_until: str = "168h", **asset: Any) -> "Card":
        points = await program.asset(inventory_mode="LOT", **asset)
        authorize = credit(points, "event.amount", bucket="HELD", reference_id=REFERENCE, hold_until=hold_until)
        await program.rule("event.type == 'authorization'", authorize, name="authorize")
        settle = credit(points, "event.amount", reference_id=REFERENCE)
        await program.rule("event.type == 'settlement'", settle, name="settle")
        void = move("VOID_HOLD", points, reference_id=REFERENCE)
        await program.rule("event.type == 'reversal'", void, name="void")
        return cls(program, points)

    async def run(self, kind: str, amount: float = 0, reference: str = "auth1", **data: Any) -> dict[str, Any]:
        """Process an event of the issuer's to its end."""
        return await self.program.run(type=kind, amount=amount, authorization_id=reference, **data)

    async def buckets(self) -> Buckets:
        return await buckets(self.program, self.points)

    async def hold(self) -> dict[str, Any]:
        """The only hold there is."""
        (hold,) = await holds_of(self.program)
        return hold


@pytest.fixture
async def card(program: HttpProgram) -> Card:
    return await Card.open(program)


def action_of(event: dict[str, Any]) -> dict[str, Any]:
    """What the only action of the only rule that matched has done."""
    (record,) = event["rule_evaluations"]
    (action,) = record["actions"]
    result: dict[str, Any] = action
    return result


# --- settling ---------------------------------------------------------------------------------------------------------


async def test_an_authorization_promises_and_gives_nothing_to_spend(card: Card, clock: SettableClock) -> None:
    clock.set("2030-03-01T10:00:00Z")

    event = await card.run("authorization", 50)

    assert await card.buckets() == Buckets("0.00", "50.00", "0.00")
    hold, action = await card.hold(), action_of(event)
    assert (hold["hold_id"], hold["reference_id"]) == (action["hold_id"], action["reference_id"])
    assert (hold["status"], hold["remaining"], hold["on_expiry"]) == ("ACTIVE", "50.00", "RELEASE")
    assert hold["expires_at"] == "2030-03-08T10:00:00Z", "a week after the action ran, whatever the event's own time"
    (lot,) = await lots_of(card.program, card.points)
    assert (lot["status"], lot["reference_id"]) == ("HELD", "auth1")


@pytest.mark.parametrize(
    ("settled", "delta", "moved"),
    [
        (60, "10.00", {Posting(ISSUANCE, "AVAILABLE", "-10.00")}),
        (40, "-10.00", {Posting(ISSUANCE, "AVAILABLE", "10.00")}),
        (50, "0.00", set()),
    ],
    ids=["more", "less", "the same"],
)
async def test_a_settlement_moves_only_the_difference(
    card: Card, settled: float, delta: str, moved: set[Posting]
) -> None:
    await card.run("authorization", 50)

    event = await card.run("settlement", settled)

    amount = f"{settled:.2f}"
    assert await card.buckets() == Buckets(amount, "0.00", "0.00")
    (entry,) = await entries_of(card.program.client, event_id=event["id"])
    assert (entry["action_type"], entry["reference_id"]) == ("CREDIT", "auth1")
    assert postings(entry) == {
        Posting("PARTICIPANT", "HELD", "-50.00"),
        Posting("PARTICIPANT", "AVAILABLE", amount),
        *moved,
    }
    action = action_of(event)
    assert (action["amount"], action["settle"]) == (amount, {"held_amount": "50.00", "delta": delta})
    assert action["journal_entry_id"] == entry["id"]
    hold = await card.hold()
    assert (hold["status"], hold["remaining"]) == ("SETTLED", "0.00")


async def test_a_settlement_of_several_authorizations_takes_them_all(card: Card) -> None:
    """An authorization that was raised comes as a second one under the same reference."""
    await card.run("authorization", 50)
    await card.run("authorization", 25)
    await card.run("authorization", 9, reference="auth2")

    event = await card.run("settlement", 70)

    assert action_of(event)["settle"] == {"held_amount": "75.00", "delta": "-5.00"}
    assert await card.buckets() == Buckets("70.00", "9.00", "0.00")


async def test_without_an_authorization_a_settlement_is_a_plain_credit(card: Card) -> None:
    """A forced capture; and a second settlement credits again, as its contract says."""
    first, second = await card.run("settlement", 30), await card.run("settlement", 30)

    for event in (first, second):
        assert action_of(event)["settle"] == {"held_amount": "0.00", "delta": "30.00"}
    assert await card.buckets() == Buckets("60.00", "0.00", "0.00")


async def test_a_settlement_of_nothing_is_no_settlement(card: Card) -> None:
    """An amount of exactly 0 does nothing, here as everywhere (5.4): what is not wanted any more is to be voided."""
    await card.run("authorization", 50)

    event = await card.run("settlement", 0)

    assert (event["status"], amounts(event)) == ("COMPLETED", {"settle": "0.00"})
    assert await card.buckets() == Buckets("0.00", "50.00", "0.00")


async def test_own_funds_held_under_the_same_reference_are_no_authorization(card: Card) -> None:
    await card.program.rule("event.type == 'hold'", move("HOLD", card.points, "20", reference_id=REFERENCE))
    await card.run("settlement", 20, reference="earlier")
    await card.run("hold")

    event = await card.run("settlement", 30)

    assert action_of(event)["settle"] == {"held_amount": "0.00", "delta": "30.00"}
    assert await card.buckets() == Buckets("30.00", "20.00", "0.00")


async def test_a_prefunded_wallet_pays_the_authorization_and_then_the_difference(program: HttpProgram) -> None:
    card = await Card.open(program, issuance_policy="PREFUNDED")
    client = program.client

    async def wallet() -> str:
        (balance,) = (await get(client, f"/programs/{program.id}/balance"))["data"]
        return str(balance["available"])

    await post(client, f"/programs/{program.id}/assets/{card.points}/fund", amount="100")
    await card.run("authorization", 90)
    assert await wallet() == "10.00"
    refused = await card.run("settlement", 100.01)
    assert (refused["status"], refused["error_message"]) == (
        "FAILED",
        "action CREDIT failed: insufficient program balance",
    )
    assert (await wallet(), await card.buckets()) == ("10.00", Buckets("0.00", "90.00", "0.00"))
    await card.run("settlement", 80)
    assert (await wallet(), await card.buckets()) == ("20.00", Buckets("80.00", "0.00", "0.00"))


async def test_a_settled_lot_expires_as_its_settlement_says_or_as_the_first_of_those_it_replaces(
    program: HttpProgram, clock: SettableClock
) -> None:
    points = await program.asset(inventory_mode="LOT", scale=0)
    held = {"bucket": "HELD", "reference_id": REFERENCE}
    await program.rule("event.type == 'auth' && event.n == 1", credit(points, "5", expires_at="48h", **held))
    await program.rule("event.type == 'auth' && event.n == 2", credit(points, "5", expires_at="24h", **held))
    await program.rule("event.type == 'settle'", credit(points, "8", reference_id=REFERENCE))
    await program.rule("event.type == 'settle again'", credit(points, "8", reference_id=REFERENCE, expires_at="1h"))
    clock.set("2030-03-01T00:00:00Z")

    for reference, settle in (("a", "settle"), ("b", "settle again")):
        events = [program.event(type="auth", n=n, authorization_id=reference) for n in (1, 2)]
        await run_all(program, [*events, program.event(type=settle, authorization_id=reference)])

    lots = await lots_of(program, points, status="AVAILABLE")
    assert [(lot["amount"], lot["expires_at"]) for lot in lots] == [
        ("8", "2030-03-02T00:00:00Z"),
        ("8", "2030-03-01T01:00:00Z"),
    ]


# --- reversing --------------------------------------------------------------------------------------------------------


async def test_a_reversal_takes_the_promise_back_once(card: Card) -> None:
    await card.run("authorization", 50)
    await card.run("authorization", 7, reference="auth2")

    reversal, again = await card.run("reversal"), await card.run("reversal")

    (entry,) = await entries_of(card.program.client, event_id=reversal["id"])
    assert postings(entry) == {Posting("PARTICIPANT", "HELD", "-50.00"), Posting(ISSUANCE, "AVAILABLE", "50.00")}
    assert amounts(again) == {"void": "0.00"}, "nothing is left under the reference, which is no error"
    assert (again["status"], verdicts(again)) == ("COMPLETED", {"void": "SUCCESS"})
    assert await card.buckets() == Buckets("0.00", "7.00", "0.00")
    by_reference = {hold["reference_id"]: hold["status"] for hold in await holds_of(card.program)}
    assert by_reference == {"auth1": "VOIDED", "auth2": "ACTIVE"}


@pytest.mark.parametrize("status", ["SUSPENDED", "CLOSED"])
async def test_a_promise_is_taken_back_from_inactive_participants_too_but_never_kept(card: Card, status: str) -> None:
    await card.run("authorization", 50)
    alice = (await card.program.participant())["id"]
    assert (await card.program.client.patch(f"/participants/{alice}/status", json={"status": status})).is_success

    settlement = await card.run("settlement", 50)
    reversal = await card.run("reversal")

    assert (settlement["status"], settlement["error_message"]) == (
        "FAILED",
        f"action CREDIT failed: participant is {status}",
    )
    assert (reversal["status"], await card.buckets()) == ("COMPLETED", Buckets("0.00", "0.00", "0.00"))


async def test_an_authorization_whose_event_fails_leaves_no_hold(program: HttpProgram) -> None:
    points = await program.asset(inventory_mode="LOT")
    held = credit(points, "10", bucket="HELD", reference_id=REFERENCE, hold_until="1s")
    await program.rule("true", held, counter("n", "event.missing"))

    event = await program.run(authorization_id="auth1")

    assert event["status"] == "FAILED"
    assert await holds_of(program) == []
    assert await buckets(program, points) == Buckets("-", "-", "-")


# --- coming to an end -------------------------------------------------------------------------------------------------


async def test_what_nobody_settles_is_released_at_its_end(
    program: HttpProgram, clock: SettableClock, gateway: Gateway, organization: Tenant
) -> None:
    """HoldEnds of the program carries them. It sleeps by Temporal's time, so a test that moves the clock wakes it."""
    card = await Card.open(program, hold_until="event.until")
    clock.set("2030-03-01T10:00:00Z")
    await card.run("authorization", 50, "due", until="2030-03-08T10:00:00Z")
    await card.run("authorization", 5, "one microsecond later", until="2030-03-08T10:00:00.000001Z")
    await card.run("authorization", 3, "settled", until="168h")
    await card.run("settlement", 3, "settled")

    clock.set("2030-03-08T10:00:00Z")
    await gateway.wake_hold_ends(organization.id, UUID(program.id), "Customer Loyalty")

    async def states() -> dict[str, str]:
        return {hold["reference_id"]: hold["status"] for hold in await holds_of(program)}

    async def is_over() -> bool:
        return (await states())["due"] != "ACTIVE"

    await eventually(is_over)
    assert await states() == {"due": "EXPIRED", "one microsecond later": "ACTIVE", "settled": "SETTLED"}
    assert await card.buckets() == Buckets("53.00", "5.00", "0.00")
    (released,) = await entries_of(program.client, action_type="RELEASE")
    assert (released["event_id"], released["rule_id"], released["created_by_api_key_id"]) == (None, None, None)

    late = await card.run("settlement", 60, "due")
    assert action_of(late)["settle"] == {"held_amount": "0.00", "delta": "60.00"}, "what was released is held no more"


@pytest.mark.parametrize("hold_until", ["300ms", "2020-01-01T00:00:00Z"], ids=["by its timer", "passed already"])
async def test_the_worker_sees_to_the_end_by_itself(program: HttpProgram, hold_until: str) -> None:
    card = await Card.open(program, hold_until=hold_until)

    await card.run("authorization", 50)

    async def is_released() -> bool:
        return await card.buckets() == Buckets("50.00", "0.00", "0.00")

    await eventually(is_released)
    assert (await card.hold())["status"] == "EXPIRED"


async def test_simple_assets_have_ends_of_holds_too(program: HttpProgram) -> None:
    cash = await program.asset()
    await program.rule("true", credit(cash, "10", bucket="HELD", hold_until="2020-01-01T00:00:00Z"))

    await program.run()

    async def is_released() -> bool:
        return await buckets(program, cash) == Buckets("10.00", "0.00", "0.00")

    await eventually(is_released)


# --- own funds --------------------------------------------------------------------------------------------------------


async def test_own_funds_are_held_and_then_released_and_debited_by_their_true_amount(program: HttpProgram) -> None:
    """Paying with points: the recommended settlement of a hold of own funds. Contract: 5.7."""
    points = await program.asset(inventory_mode="LOT", scale=0)
    await program.rule("event.type == 'earn'", credit(points, "event.amount", expires_at="8760h"))
    hold = move("HOLD", points, "event.amount", reference_id=REFERENCE, hold_until="72h")
    await program.rule("event.type == 'pay'", hold)
    release = move("RELEASE", points, reference_id=REFERENCE)
    await program.rule("event.type == 'paid'", release, debit(points, "event.amount"), name="paid")
    earned = [program.event(type="earn", amount=amount) for amount in (100, 40)]
    await run_all(program, earned)
    vintage = [(lot["created_at"], lot["expires_at"]) for lot in await lots_of(program, points)]

    await program.run(type="pay", amount=110, authorization_id="a")
    assert await buckets(program, points) == Buckets("30", "110", "0")
    await program.run(type="pay", amount=20, authorization_id="b")
    paid = await program.run(type="paid", amount=105, authorization_id="a")

    assert amounts(paid) == {"paid": "110+105"}
    assert await buckets(program, points) == Buckets("15", "20", "0")
    assert {h["reference_id"]: (h["status"], h["remaining"]) for h in await holds_of(program)} == {
        "a": ("RELEASED", "0"),
        "b": ("ACTIVE", "20"),
    }
    lots = await lots_of(program, points)
    assert {(lot["created_at"], lot["expires_at"]) for lot in lots} == set(vintage), "parts of lots keep their age"
    assert sum(int(lot["remaining"]) for lot in lots) == 35


async def test_what_is_held_cannot_be_spent_and_a_short_hold_fails(program: HttpProgram) -> None:
    points = await program.asset(inventory_mode="LOT")
    await program.rule("event.type == 'earn'", credit(points, "10"))
    await program.rule("event.type == 'hold'", move("HOLD", points, "event.amount"))
    await program.rule("event.type == 'spend'", debit(points, "event.amount"))
    await program.run(type="earn")
    await program.run(type="hold", amount=8)

    for kind, action in (("hold", "HOLD"), ("spend", "DEBIT")):
        event = await program.run(type=kind, amount=2.01)
        assert (event["status"], event["error_message"]) == ("FAILED", f"action {action} failed: insufficient balance")
    assert await buckets(program, points) == Buckets("2.00", "8.00", "0.00")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"reference_id": "'a'"}, Buckets("80.00", "20.00", "0.00")),
        ({"reference_id": "'a'", "amount": "10"}, Buckets("60.00", "40.00", "0.00")),
        ({"amount": "40"}, Buckets("90.00", "10.00", "0.00")),
        ({}, Buckets("100.00", "0.00", "0.00")),
        ({"reference_id": "'a'", "amount": "31"}, Buckets("80.00", "20.00", "0.00")),
    ],
    ids=["all of a reference", "part of a reference", "part, the oldest lots first", "all", "more than there is"],
)
async def test_a_release_takes_what_it_names(program: HttpProgram, fields: dict[str, Any], expected: Buckets) -> None:
    """The table of 5.7, over 100 points of which 30 are held under `a` and 20 under `b`."""
    points = await program.asset(inventory_mode="LOT")
    await program.rule("event.type == 'earn'", credit(points, "100"))
    await program.rule("event.type == 'hold'", move("HOLD", points, "event.amount", reference_id=REFERENCE))
    await program.rule("event.type == 'release'", move("RELEASE", points, **fields))
    holds = [
        program.event(type="hold", amount=amount, authorization_id=name) for amount, name in ((30, "a"), (20, "b"))
    ]

    await run_all(program, [program.event(type="earn"), *holds, program.event(type="release")])

    assert await buckets(program, points) == expected
