"""A cashback card as rules: 5 % on dining, 3 % on groceries, 1 % on the rest (the base). Contract:
rules-and-events.md 9.1.

From 2,500 dollars a month on the base earns 3 %; crossing that line pays the missing 2 % of the month's base so far.

Every rule of an event reads the counters as they were before it. So the purchase that crosses the line still earns the
base rate, and the one after it the higher one.
"""

from collections.abc import Iterator
from typing import Any

from demo.make_purchases import Purchase

PROGRAM_NAME = "Cashback Card (demo)"
ASSET_NAME = "CASHBACK_USD"
ASSET_SYMBOL = "CASHBACKUSD"
DINING = ("5812", "5813", "5814")
GROCERIES = ("5411", "5422")
MONTHLY_LINE = "2500"

PURCHASE = 'event.type == "purchase" && event.amount > 0'
MONTHLY_SPEND = 'get(participant.counters, "monthly_spend", 0.0)'
MONTHLY_BASE_SPEND = 'get(participant.counters, "monthly_base_spend", 0.0)'


def program() -> dict[str, Any]:
    """The program, as `POST /v1/programs` takes it."""
    return {"name": PROGRAM_NAME, "description": "Made by `scrip demo`.", "on_unknown_participant": "CREATE"}


def asset(program_id: str) -> dict[str, Any]:
    """Cashback in dollars and cents, as `POST /v1/assets` takes it."""
    return {
        "program_id": program_id,
        "name": ASSET_NAME,
        "symbol": ASSET_SYMBOL,
        "inventory_mode": "SIMPLE",
        "issuance_policy": "UNLIMITED",
        "scale": 2,
    }


def rules(program_id: str, asset_id: str) -> list[dict[str, Any]]:
    """The program's rules in the order in which they run, as `POST /v1/rules` takes them."""

    def rule(order: int, name: str, condition: str, *actions: dict[str, str], stop: bool = False) -> dict[str, Any]:
        return {
            "program_id": program_id,
            "name": name,
            "order": order,
            "condition": condition,
            "actions": list(actions),
            "stop_after_match": stop,
        }

    def count(key: str, value: str) -> dict[str, str]:
        return {"type": "COUNTER", "key": key, "value": value}

    def credit(amount: str, description: str) -> dict[str, str]:
        return {
            "type": "CREDIT",
            "asset_id": asset_id,
            "amount": f"round({amount}, 2)",
            "description": description,
        }

    is_base = f"!(event.mcc in {_listed(DINING + GROCERIES)})"
    crosses = f"{MONTHLY_SPEND} < {MONTHLY_LINE} && {MONTHLY_SPEND} + event.amount >= {MONTHLY_LINE}"
    return [
        rule(
            10,
            "monthly reset",
            'event.type == "month_start"',
            count("monthly_spend", f"-{MONTHLY_SPEND}"),
            count("monthly_base_spend", f"-{MONTHLY_BASE_SPEND}"),
            stop=True,
        ),
        rule(50, "track monthly spend", PURCHASE, count("monthly_spend", "event.amount")),
        rule(55, "track monthly base spend", f"{PURCHASE} && {is_base}", count("monthly_base_spend", "event.amount")),
        rule(
            60,
            "high spender, catch-up 2 %",
            f"{PURCHASE} && {crosses}",
            credit(f"{MONTHLY_BASE_SPEND} * 0.02", "Catch-up: 2 % of this month's base purchases"),
            {"type": "TAG", "tag": "high_spender"},
        ),
        rule(
            500,
            "dining 5 %",
            f"{PURCHASE} && event.mcc in {_listed(DINING)}",
            credit("event.amount * 0.05", "Dining: 5 %"),
            stop=True,
        ),
        rule(
            510,
            "groceries 3 %",
            f"{PURCHASE} && event.mcc in {_listed(GROCERIES)}",
            credit("event.amount * 0.03", "Groceries: 3 %"),
            stop=True,
        ),
        rule(
            900,
            "high spender 3 %",
            f"{PURCHASE} && {MONTHLY_SPEND} >= {MONTHLY_LINE}",
            credit("event.amount * 0.03", "High spender: 3 %"),
            stop=True,
        ),
        rule(1_000, "base 1 %", PURCHASE, credit("event.amount * 0.01", "Base: 1 %")),
    ]


def events_of(program_id: str, purchases: list[Purchase]) -> Iterator[str]:
    """One cardholder's `purchases`, in order, as items of `POST /v1/events/batch`; each month opens with a reset.

    The items are JSON text: an amount goes in with the digits that it has, and never becomes a float on the way. Keys
    are names of what happened, so that sending everything again adds nothing.
    """
    month = purchases[0].occurred_at[:7] if purchases else ""
    for purchase in purchases:
        if purchase.occurred_at[:7] != month:
            month = purchase.occurred_at[:7]
            yield _event(
                program_id,
                purchase.cardholder,
                f"month-start-{purchase.cardholder}-{month}",
                f"{month}-01T00:00:00Z",
                '{"type":"month_start"}',
            )
        yield _event(
            program_id,
            purchase.cardholder,
            purchase.transaction_id,
            purchase.occurred_at,
            f'{{"type":"purchase","amount":{purchase.amount},"currency":"USD","mcc":"{purchase.mcc}",'
            f'"merchant":"{purchase.merchant}"}}',
        )


def _event(program_id: str, external_id: str, key: str, timestamp: str, data: str) -> str:
    return (
        f'{{"program_id":"{program_id}","external_id":"{external_id}","idempotency_key":"{key}",'
        f'"event_timestamp":"{timestamp}","event_data":{data}}}'
    )


def _listed(codes: tuple[str, ...]) -> str:
    return "[" + ", ".join(f'"{code}"' for code in codes) + "]"
