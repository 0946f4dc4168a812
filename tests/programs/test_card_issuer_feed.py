"""A card issuer's feed: Stripe Issuing's webhooks, mapped as examples/stripe_issuing does, earn and claw back.

Contract: rules-and-events.md 9.1 and 5.6.
"""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from examples.stripe_issuing.mapping import request_body
from tests.events_support import HttpProgram, credit, debit, settled
from tests.program_support import Buckets, Posting, amounts, buckets, entries_of, lots_of, postings

CARDHOLDER = "ich_1MzFMxK8F4fqH0lBXnFW0ROG"


def webhook(amount: int, kind: str = "capture", *, id: str = "ipi_1", **fields: Any) -> dict[str, Any]:
    """What Stripe posts for a transaction of so many cents, captures negative; `fields` are the transaction's."""
    transaction = {
        "id": id,
        "object": "issuing.transaction",
        "amount": amount,
        "authorization": "iauth_1MzFMzK8F4fqH0lBc9VdaZUp",
        "card": "ic_1MzFMxK8F4fqH0lBjIUITRYi",
        "cardholder": CARDHOLDER,
        "created": 1_682_065_867,
        "currency": "usd",
        "merchant_amount": amount,
        "merchant_currency": "usd",
        "merchant_data": {"category": "restaurants", "category_code": "5812", "name": 'JOE\'S "DINER"'},
        "type": kind,
        **fields,
    }
    return {"id": f"evt_{id}", "type": "issuing_transaction.created", "data": {"object": transaction}}


# --- the mapping ------------------------------------------------------------------------------------------------------


def test_a_capture_becomes_an_event() -> None:
    body = request_body(webhook(-4_999, id="ipi_1MzFN1K8F4fqH0lBmFq8CjbU"), "a-program")

    assert body is not None
    assert json.loads(body) == {
        "program_id": "a-program",
        "external_id": CARDHOLDER,
        "idempotency_key": "ipi_1MzFN1K8F4fqH0lBmFq8CjbU",
        "event_timestamp": "2023-04-21T08:31:07Z",
        "event_data": {
            "type": "capture",
            "amount": 49.99,
            "currency": "usd",
            "mcc": "5812",
            "merchant": 'JOE\'S "DINER"',
            "authorization_id": "iauth_1MzFMzK8F4fqH0lBc9VdaZUp",
        },
    }


@pytest.mark.parametrize(
    ("cents", "number"),
    [(-1, "0.01"), (-10, "0.10"), (-100, "1.00"), (0, "0.00"), (-90_071_992_547_409_93, "90071992547409.93")],
)
def test_an_amount_keeps_every_cent(cents: int, number: str) -> None:
    assert f'"amount":{number},' in (request_body(webhook(cents), "p") or "")


@pytest.mark.parametrize(
    ("kind", "cents", "expected"),
    [("capture", -100, "capture"), ("refund", 100, "refund"), ("refund", -100, "refund_reversal")],
)
def test_what_happened_is_told_by_type_and_for_refunds_by_sign(kind: str, cents: int, expected: str) -> None:
    data = json.loads(request_body(webhook(cents, kind), "p") or "")["event_data"]

    assert (data["type"], data["amount"]) == (expected, 1)


def test_expanded_objects_count_as_their_ids() -> None:
    expanded = webhook(-100, cardholder={"id": CARDHOLDER, "name": "Jenny"}, authorization={"id": "iauth_1"})

    event = json.loads(request_body(expanded, "p") or "")

    assert (event["external_id"], event["event_data"]["authorization_id"]) == (CARDHOLDER, "iauth_1")


def test_without_an_authorization_there_is_none_to_name() -> None:
    assert "authorization_id" not in (request_body(webhook(100, "refund", authorization=None), "p") or "")


@pytest.mark.parametrize("fields", [{"cardholder": None}, {"currency": "jpy"}])
def test_what_cannot_be_mapped_is_an_error_and_no_event(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        request_body(webhook(-100, **fields), "p")


def test_other_webhooks_are_not_for_us() -> None:
    assert request_body({**webhook(-100), "type": "issuing_authorization.created"}, "p") is None


# --- the program ------------------------------------------------------------------------------------------------------

Deliver = Callable[[dict[str, Any]], Any]


@pytest.fixture
async def points(program: HttpProgram) -> str:
    """Three points a dollar for dining, one for the rest; a refund takes back what the purchase has earned."""
    points = await program.asset(inventory_mode="LOT")
    for order, multiplier, where in ((100, 3, 'event.mcc == "5812"'), (1_000, 1, "true")):
        await program.rule(
            f"event.type == 'capture' && {where}",
            credit(points, f"event.amount * {multiplier}"),
            order=order,
            name=f"earn {multiplier}x",
            stop_after_match=True,
        )
        await program.rule(
            f"event.type == 'refund' && {where}",
            debit(points, f"event.amount * {multiplier}", allow_negative=True),
            order=order + 1,
            name=f"take back {multiplier}x",
            stop_after_match=True,
        )
    return points


@pytest.fixture
def deliver(program: HttpProgram) -> Deliver:
    """What the middleware does with a webhook, until the event has been processed; the event."""

    async def sent(stripe_event: dict[str, Any]) -> dict[str, Any]:
        answer = await accept(program, stripe_event)
        return await settled(program.client, answer.json()["id"])

    return sent


async def accept(program: HttpProgram, stripe_event: dict[str, Any]) -> httpx.Response:
    answer = await program.client.post("/events", content=request_body(stripe_event, program.id) or "")
    assert answer.status_code == 202, answer.text
    return answer


async def test_captures_earn_by_category(program: HttpProgram, points: str, deliver: Deliver) -> None:
    dining = await deliver(webhook(-4_999, id="ipi_1"))
    books = await deliver(
        webhook(-2_001, id="ipi_2", merchant_data={"category_code": "5942", "name": "Books"}, created=1_700_000_000)
    )

    assert amounts(dining) == {"earn 3x": "149.97"}
    assert amounts(books) == {"earn 1x": "20.01"}
    assert (dining["external_id"], dining["event_timestamp"]) == (CARDHOLDER, "2023-04-21T08:31:07Z")
    assert await program.available(CARDHOLDER, points) == "169.98"


async def test_a_refund_takes_back_what_the_purchase_earned(
    program: HttpProgram, points: str, deliver: Deliver
) -> None:
    await deliver(webhook(-10_000, id="ipi_1"))

    refund = await deliver(webhook(2_500, "refund", id="ipi_2"))

    assert amounts(refund) == {"take back 3x": "75.00"}
    (entry,) = await entries_of(program.client, event_id=refund["id"])
    assert postings(entry) == {
        Posting("PARTICIPANT", "AVAILABLE", "-75.00"),
        Posting("SYSTEM_BREAKAGE", "AVAILABLE", "75.00"),
    }
    assert await buckets(program, points, CARDHOLDER) == Buckets("225.00", "0.00", "0.00")


async def test_a_refund_of_points_already_spent_leaves_a_debt_that_the_next_purchase_repays(
    program: HttpProgram, points: str, deliver: Deliver
) -> None:
    await deliver(webhook(-10_000, id="ipi_1"))
    participant_id = (await program.participant(CARDHOLDER))["id"]
    spend = {"program_id": program.id, "asset_id": points, "type": "DEBIT", "amount": "280", "description": "Flight"}
    path = f"/participants/{participant_id}/balances/adjust"
    assert (await program.client.post(path, json=spend)).status_code == 200

    await deliver(webhook(10_000, "refund", id="ipi_2"))
    assert await buckets(program, points, CARDHOLDER) == Buckets("-280.00", "0.00", "0.00")
    await deliver(webhook(-10_000, id="ipi_3"))

    assert await buckets(program, points, CARDHOLDER) == Buckets("20.00", "0.00", "0.00")
    lots = await lots_of(program, points, CARDHOLDER)
    # 300 earned of which 280 spent and 20 taken back; of the next 300, 280 repay the debt.
    assert [(lot["amount"], lot["remaining"], lot["status"]) for lot in lots] == [
        ("300.00", "0.00", "CONSUMED"),
        ("300.00", "20.00", "AVAILABLE"),
    ]


async def test_a_refund_without_a_purchase_goes_below_zero(program: HttpProgram, points: str, deliver: Deliver) -> None:
    refund = await deliver(webhook(1_000, "refund", authorization=None))

    assert refund["status"] == "COMPLETED"
    assert await program.available(CARDHOLDER, points) == "-30.00"


async def test_a_transaction_that_is_delivered_again_counts_once(program: HttpProgram, points: str) -> None:
    """Stripe delivers at least once, at times several times at once and in an envelope of its own each time."""
    deliveries = [{**webhook(-5_000, id="ipi_1"), "id": f"evt_{n}"} for n in range(8)]

    answers = await asyncio.gather(*(accept(program, delivery) for delivery in deliveries))

    assert len({answer.json()["id"] for answer in answers}) == 1
    await settled(program.client, answers[0].json()["id"])
    assert (await accept(program, deliveries[0])).headers["Idempotent-Replayed"] == "true"
    assert await program.available(CARDHOLDER, points) == "150.00"
    assert len(await entries_of(program.client, asset_id=points)) == 1


async def test_what_no_rule_expects_changes_nothing(program: HttpProgram, points: str, deliver: Deliver) -> None:
    reversal = await deliver(webhook(-1_000, "refund", id="ipi_9"))

    assert (reversal["status"], reversal["rule_evaluations"]) == ("COMPLETED", [])
    assert await program.available(CARDHOLDER, points) == "-"
