"""Amounts are exact, or refused. Contract: README.md "Money", basics.md 6.7."""

import decimal
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain import money
from domain.errors import Refusal

amounts = st.decimals(allow_nan=False, allow_infinity=False, places=18, min_value=-(10**19), max_value=10**19)


@pytest.mark.parametrize(
    ("text", "scale", "printed"),
    [
        ("10", 0, "10"),
        ("10.00", 0, "10"),
        ("10.50", 1, "10.5"),
        ("1", 2, "1.00"),
        ("0.000000000000000001", 18, "0.000000000000000001"),
        ("99999999999999999999.999999999999999999", 18, "99999999999999999999.999999999999999999"),
    ],
)
def test_an_amount_within_the_scale_is_taken_as_it_is(text: str, scale: int, printed: str) -> None:
    assert money.format_amount(money.parse_amount(text, scale), scale) == printed


@pytest.mark.parametrize(
    "text", ["", "0", "0.00", "-1", "1e3", "NaN", "Infinity", "1,5", "abc", " 1", "1\n", "٣", "1" * 21]
)
def test_what_is_no_positive_plain_decimal_is_a_bad_request(text: str) -> None:
    with pytest.raises(Refusal) as refusal:
        money.parse_amount(text, 2, "amount")
    assert refusal.value.code == "bad_request"
    assert refusal.value.problems[0].field == "amount"


@pytest.mark.parametrize(("text", "scale"), [("1.005", 2), ("1.5", 0), ("0.0000000000000000001", 18)])
def test_more_decimals_than_the_scale_are_refused_never_rounded(text: str, scale: int) -> None:
    with pytest.raises(Refusal) as refusal:
        money.parse_amount(text, scale)
    assert refusal.value.code == "invalid_scale"


def test_an_amount_of_more_than_28_digits_keeps_every_one_of_them() -> None:
    # Python's default context has 28 digits and rounds silently, in abs() and unary minus too.
    huge = Decimal("99999999999999999999.999999999999999999")
    assert money.fits_size(huge)
    assert money.add(huge, Decimal("0.000000000000000001")) == Decimal(10) ** 20
    assert not money.fits_size(Decimal(10) ** 20)


def test_a_result_beyond_80_digits_is_an_error_not_a_rounded_number() -> None:
    with pytest.raises(decimal.Inexact):
        money.add(Decimal(10) ** 70, Decimal("1e-18"))


@given(amounts, amounts)
def test_what_is_added_can_be_taken_away_again(a: Decimal, b: Decimal) -> None:
    assert money.subtract(money.add(a, b), b) == a


@given(amounts)
def test_the_plain_form_is_the_same_number_without_exponent_or_trailing_zeros(number: Decimal) -> None:
    text = money.format_plain(number)
    assert Decimal(text) == number
    assert "e" not in text.lower()
    assert "." not in text or not text.endswith("0")
