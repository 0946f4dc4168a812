"""The cashback card, month by month, with figures worked out by hand. Contract: rules-and-events.md 9.1.

Dining earns 5 %, groceries 3 %, everything else (the base) 1 %. From 2,500 of total spend in a month on, the base earns
3 %; crossing that line pays, once, the missing 2 % on the month's base spend so far. All rules of an event read the
counters as they were before it: the purchase that crosses the line earns the base rate itself, and does not count
towards the bonus that it triggers.

The contract's monthly cron automation is an event `month_end` here, which the test sends.
"""

from typing import Any

import pytest

from tests.events_support import HttpProgram, counter, credit
from tests.program_support import amounts, entries_of, get, run_all

DINING, GROCERIES, OTHER = "5812", "5411", "5732"

PURCHASE = "event.type == 'purchase' && event.amount > 0"
SPEND = 'get(participant.counters, "monthly_spend", 0.0)'
BASE_SPEND = 'get(participant.counters, "monthly_base_spend", 0.0)'


def rules(cashback: str) -> list[dict[str, Any]]:
    """The eight rules of the contract."""

    def rule(order: int, name: str, condition: str, *actions: dict[str, Any], stop: bool = False) -> dict[str, Any]:
        return {
            "order": order,
            "name": name,
            "condition": condition,
            "actions": list(actions),
            "stop_after_match": stop,
        }

    def percent(rate: str, of: str = "event.amount") -> dict[str, Any]:
        return credit(cashback, f"round({of} * {rate}, 2)")

    base = f'{PURCHASE} && !(event.mcc in ["5812", "5813", "5814", "5411", "5422"])'
    return [
        rule(50, "track_monthly_spend", PURCHASE, counter("monthly_spend", "event.amount")),
        rule(55, "track_monthly_base_spend", base, counter("monthly_base_spend", "event.amount")),
        rule(
            60,
            "retro_bonus",
            f"{PURCHASE} && {SPEND} < 2500 && {SPEND} + event.amount >= 2500",
            percent("0.02", of=BASE_SPEND),
        ),
        rule(100, "dining", f'{PURCHASE} && event.mcc in ["5812", "5813", "5814"]', percent("0.05"), stop=True),
        rule(200, "groceries", f'{PURCHASE} && event.mcc in ["5411", "5422"]', percent("0.03"), stop=True),
        rule(300, "high_spender", f"{PURCHASE} && {SPEND} >= 2500", percent("0.03"), stop=True),
        rule(1_000, "base", PURCHASE, percent("0.01")),
        rule(
            2_000,
            "monthly_reset",
            "event.type == 'month_end'",
            counter("monthly_spend", f"-{SPEND}"),
            counter("monthly_base_spend", f"-{BASE_SPEND}"),
        ),
    ]


# Per purchase: amount, category, what each rule that pays has to pay; above, the month's spend and base spend so far.
JANUARY: list[tuple[float, str, dict[str, str]]] = [
    # 0.00, 0.00
    (200.00, DINING, {"dining": "10.00"}),
    # 200.00, 0.00
    (300.00, GROCERIES, {"groceries": "9.00"}),
    # 500.00, 0.00: 1 % is 9.9999
    (999.99, OTHER, {"base": "10.00"}),
    # 1,499.99, 999.99: 7.0001
    (700.01, OTHER, {"base": "7.00"}),
    # 2,200.00, 1,700.00
    (250.00, DINING, {"dining": "12.50"}),
    # 2,450.00, 1,700.00: 0.4999, and the month is one cent short of the line
    (49.99, OTHER, {"base": "0.50"}),
    # 2,499.99, 1,749.99: the cent crosses it, so 2 % of 1,749.99 = 34.9998; its own 1 % rounds to nothing
    (0.01, OTHER, {"retro_bonus": "35.00", "base": "0.00"}),
    # 2,500.00, 1,750.00
    (100.00, OTHER, {"high_spender": "3.00"}),
    # 2,600.00, 1,850.00: categories keep their rates
    (100.00, DINING, {"dining": "5.00"}),
    # 2,700.00, 1,850.00: 0.9999
    (33.33, GROCERIES, {"groceries": "1.00"}),
    # 2,733.33, 1,850.00: the bonus is not paid again
    (2500.00, OTHER, {"high_spender": "75.00"}),
    # 5,233.33, 4,350.00
]
FEBRUARY: list[tuple[float, str, dict[str, str]]] = [
    # 0.00, 0.00
    (100.00, OTHER, {"base": "1.00"}),
    # 100.00, 100.00: dining crosses the line, which pays 2 % of the base spend and not of the total
    (2400.00, DINING, {"retro_bonus": "2.00", "dining": "120.00"}),
    # 2,500.00, 100.00
    (10.00, OTHER, {"high_spender": "0.30"}),
]
# 10 + 9 + 10 + 7 + 12.5 + 0.5 + 35 + 3 + 5 + 1 + 75, and 1 + 2 + 120 + 0.3
JANUARY_TOTAL, BOTH_MONTHS_TOTAL = "168.00", "291.30"


@pytest.fixture
async def cashback(program: HttpProgram) -> str:
    """The asset, with the program's rules in place."""
    asset_id = await program.asset(name="CASHBACK_USD", symbol="CASHBACKUSD")
    for rule in rules(asset_id):
        await program.rule(rule.pop("condition"), *rule.pop("actions"), **rule)
    return asset_id


def purchases(program: HttpProgram, who: str, month: list[tuple[float, str, dict[str, str]]]) -> list[dict[str, Any]]:
    return [program.event(who, type="purchase", amount=amount, mcc=mcc) for amount, mcc, _ in month]


async def test_two_months_of_a_customer(program: HttpProgram, cashback: str) -> None:
    january = await run_all(program, purchases(program, "alice", JANUARY))

    assert [amounts(event) for event in january] == [expected for _, _, expected in JANUARY]
    alice = await program.participant()
    assert alice["counters"] == {"monthly_spend": "5233.33", "monthly_base_spend": "4350"}
    assert await program.available("alice", cashback) == JANUARY_TOTAL

    month_end, *february = await run_all(
        program, [program.event("alice", type="month_end"), *purchases(program, "alice", FEBRUARY)]
    )

    assert [action["new_value"] for action in month_end["rule_evaluations"][0]["actions"]] == ["0", "0"]
    assert [amounts(event) for event in february] == [expected for _, _, expected in FEBRUARY]
    assert await program.available("alice", cashback) == BOTH_MONTHS_TOTAL
    assert (await get(program.client, "/ledger/verify"))["valid"]


async def test_customers_do_not_see_each_other(program: HttpProgram, cashback: str) -> None:
    """Three customers, their purchases interleaved in one batch: each of them crosses the line for herself."""
    names = ["alice", "bob", "carol"]
    streams = [purchases(program, name, JANUARY) for name in names]

    events = await run_all(program, [event for together in zip(*streams, strict=True) for event in together])

    assert [amounts(event) for event in events] == [expected for _, _, expected in JANUARY for _ in names]
    for name in names:
        assert await program.available(name, cashback) == JANUARY_TOTAL
    assert len(await entries_of(program.client, min_amount="35", max_amount="35")) == len(names), "a bonus for each"


@pytest.mark.parametrize(
    ("amount", "mcc"),
    [(0, OTHER), (-25.00, OTHER), (-25.00, DINING), (None, OTHER), ("25.00", OTHER)],
    ids=["nothing", "negative", "negative dining", "no amount", "text"],
)
async def test_what_is_no_purchase_earns_and_counts_nothing(
    program: HttpProgram, cashback: str, amount: Any, mcc: str
) -> None:
    fields = {"mcc": mcc} if amount is None else {"mcc": mcc, "amount": amount}

    event = await program.run(type="purchase", **fields)

    assert (event["status"], event["rule_evaluations"]) == ("COMPLETED", [])
    assert (await program.participant())["counters"] == {}
    assert await program.available("alice", cashback) == "-"
