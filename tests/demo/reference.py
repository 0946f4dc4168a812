"""The cashback card once more, in plain Python that shares nothing with the rules: what every cardholder has to get."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from decimal import ROUND_HALF_UP, Decimal

from demo.make_purchases import Purchase

CENT = Decimal("0.01")
DINING = {"5812", "5813", "5814"}
GROCERIES = {"5411", "5422"}


@dataclass
class Expected:
    """Cashback by cardholder, how many events each rule matches, and how many credits are not zero."""

    cashback: dict[str, Decimal] = field(default_factory=lambda: defaultdict(Decimal))
    hits: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    entries: int = 0

    def pay(self, cardholder: str, rule: str, amount: Decimal) -> None:
        rounded = amount.quantize(CENT, ROUND_HALF_UP)
        self.cashback[cardholder] += rounded
        self.hits[rule] += 1
        self.entries += rounded > 0


def expect(purchases: Iterable[Purchase]) -> Expected:
    """What the rules have to do with `purchases`, which come in order of time."""
    expected = Expected()
    spend: dict[tuple[str, str], Decimal] = defaultdict(Decimal)
    base_spend: dict[tuple[str, str], Decimal] = defaultdict(Decimal)
    for purchase in purchases:
        amount, month = Decimal(purchase.amount), (purchase.cardholder, purchase.occurred_at[:7])
        before = spend[month]
        spend[month] += amount
        expected.hits["track monthly spend"] += 1
        if before < 2500 <= before + amount:
            expected.pay(purchase.cardholder, "high spender, catch-up 2 %", base_spend[month] * 2 / 100)
        if purchase.mcc in DINING:
            expected.pay(purchase.cardholder, "dining 5 %", amount * 5 / 100)
        elif purchase.mcc in GROCERIES:
            expected.pay(purchase.cardholder, "groceries 3 %", amount * 3 / 100)
        else:
            base_spend[month] += amount
            expected.hits["track monthly base spend"] += 1
            if before >= 2500:
                expected.pay(purchase.cardholder, "high spender 3 %", amount * 3 / 100)
            else:
                expected.pay(purchase.cardholder, "base 1 %", amount / 100)
    months: dict[str, set[str]] = defaultdict(set)
    for cardholder, name in spend:
        months[cardholder].add(name)
    expected.hits["monthly reset"] = sum(len(names) - 1 for names in months.values())
    return expected
