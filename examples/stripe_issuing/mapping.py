"""From Stripe Issuing to Scrip: one webhook event of Stripe becomes the body of one `POST /v1/events`, or nothing.

This is the whole of a middleware but for its two ends. In front of it, verify the request's signature with Stripe's own
library (`stripe.Webhook.construct_event`); behind it, send the body and answer Stripe with 2xx once Scrip has answered
202. Whatever else happens, answer with an error: Stripe delivers again, and the idempotency key makes a transaction
that was sent twice count once. Contract: rules-and-events.md 9.1.

Rewards are earned on settled transactions only, so authorizations are not looked at.
"""

import json
from datetime import UTC, datetime
from typing import Any

WEBHOOK_TYPE = "issuing_transaction.created"

_CURRENCIES_WITH_CENTS = frozenset({"usd", "eur", "gbp"})


def request_body(stripe_event: dict[str, Any], program_id: str) -> str | None:
    """The JSON body that reports Stripe's event to this program; None for an event of another type.

    | field of the event | what it is |
    |---|---|
    | `external_id` | the cardholder's id at Stripe, `ich_...` |
    | `idempotency_key` | the transaction's id at Stripe, `ipi_...` |
    | `event_timestamp` | when Stripe made the transaction |
    | `event_data.type` | `capture`, `refund`, or `refund_reversal`: a refund that the merchant has taken back |
    | `event_data.amount` | a positive number of units of the currency: Stripe's captures are negative cents |
    | `event_data.currency`, `.mcc`, `.merchant` | currency, merchant category code and name |
    | `event_data.authorization_id` | the authorization, `iauth_...`; absent where Stripe knows of none |

    Raises ValueError for a transaction without a cardholder, and for one in a currency that isn't counted in cents.
    """
    if stripe_event["type"] != WEBHOOK_TYPE:
        return None
    transaction = stripe_event["data"]["object"]
    data = {
        "type": json.dumps(_kind(transaction)),
        "amount": _units(transaction),
        "currency": json.dumps(transaction["currency"]),
        "mcc": json.dumps(transaction["merchant_data"]["category_code"]),
        "merchant": json.dumps(transaction["merchant_data"]["name"]),
    }
    authorization_id = _id(transaction["authorization"])
    if authorization_id is not None:
        data["authorization_id"] = json.dumps(authorization_id)
    return _object(
        {
            "program_id": json.dumps(program_id),
            "external_id": json.dumps(_cardholder(transaction)),
            "idempotency_key": json.dumps(transaction["id"]),
            "event_timestamp": json.dumps(_timestamp(transaction["created"])),
            "event_data": _object(data),
        }
    )


def _kind(transaction: dict[str, Any]) -> str:
    """What happened. Stripe tells a refund from one that is taken back by the sign of its amount alone."""
    if transaction["type"] == "refund" and transaction["amount"] < 0:
        return "refund_reversal"
    return str(transaction["type"])


def _units(transaction: dict[str, Any]) -> str:
    """The amount as a JSON number with its cents. It never becomes a float: what is money stays exact."""
    if transaction["currency"] not in _CURRENCIES_WITH_CENTS:
        raise ValueError(f"amounts in {transaction['currency']} are not known to be in cents")
    units, cents = divmod(abs(transaction["amount"]), 100)
    return f"{units}.{cents:02d}"


def _cardholder(transaction: dict[str, Any]) -> str:
    cardholder_id = _id(transaction["cardholder"])
    if cardholder_id is None:
        raise ValueError(f"transaction {transaction['id']} has no cardholder")
    return cardholder_id


def _id(reference: str | dict[str, Any] | None) -> str | None:
    """The id of another object of Stripe's, which may be expanded to the object itself."""
    return reference["id"] if isinstance(reference, dict) else reference


def _timestamp(unix_s: int) -> str:
    return datetime.fromtimestamp(unix_s, UTC).isoformat().replace("+00:00", "Z")


def _object(members: dict[str, str]) -> str:
    """A JSON object of these members, whose values are JSON already."""
    return "{" + ",".join(f"{json.dumps(name)}:{value}" for name, value in members.items()) + "}"
