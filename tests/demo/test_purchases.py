"""Goal: the demo's data is what its maker says, so that anyone can make it again and trust it."""

from collections import Counter
from decimal import Decimal

from demo.make_purchases import PURCHASES_CSV, as_csv, make_purchases, read_purchases


def test_the_file_is_made_again_byte_for_byte() -> None:
    assert as_csv(make_purchases()).encode() == PURCHASES_CSV.read_bytes()


def test_it_holds_5000_purchases_of_200_cardholders_over_three_months() -> None:
    purchases = read_purchases()
    assert len(purchases) == 5_000
    assert len({purchase.transaction_id for purchase in purchases}) == 5_000
    assert len({purchase.cardholder for purchase in purchases}) == 200
    assert {purchase.occurred_at[:7] for purchase in purchases} == {"2026-07", "2026-08", "2026-09"}
    assert [purchase.occurred_at for purchase in purchases] == sorted(purchase.occurred_at for purchase in purchases)


def test_every_amount_is_dollars_and_cents_and_more_than_nothing() -> None:
    for purchase in read_purchases():
        assert Decimal(purchase.amount) > 0
        assert Decimal(purchase.amount).as_tuple().exponent == -2


def test_some_cardholders_reach_the_line_and_most_do_not() -> None:
    spent: Counter[tuple[str, str]] = Counter()
    for purchase in read_purchases():
        spent[purchase.cardholder, purchase.occurred_at[:7]] += Decimal(purchase.amount)  # type: ignore[assignment]
    reached = {cardholder for (cardholder, _), total in spent.items() if total >= 2_500}
    assert 10 <= len(reached) <= 50
