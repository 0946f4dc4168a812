"""Exact amounts: Decimal only, one explicit context, never a float. Contract: README.md "Money", basics.md 6.7."""

import decimal
import re
from collections.abc import Iterable
from decimal import Decimal

from domain import limits
from domain.errors import Problem, Refusal, bad_field

EXACT = decimal.Context(
    prec=80,
    rounding=decimal.ROUND_HALF_EVEN,
    Emin=-999_999,
    Emax=999_999,
    traps=[decimal.Inexact, decimal.InvalidOperation, decimal.Overflow, decimal.DivisionByZero],
)
"""All arithmetic on money: 80 digits, and an error instead of a rounded result."""

ZERO = Decimal(0)

_PLAIN = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)", re.ASCII)


def add(a: Decimal, b: Decimal) -> Decimal:
    """`a + b`, exactly. Raises decimal.Inexact when the result doesn't fit 80 digits."""
    return EXACT.add(a, b)


def subtract(a: Decimal, b: Decimal) -> Decimal:
    """`a - b`, exactly. Raises decimal.Inexact when the result doesn't fit 80 digits."""
    return EXACT.subtract(a, b)


def total(amounts: Iterable[Decimal]) -> Decimal:
    """The exact sum of `amounts`."""
    result = ZERO
    for amount in amounts:
        result = EXACT.add(result, amount)
    return result


def fits_scale(amount: Decimal, scale: int) -> bool:
    """Whether `amount` has no significant decimals beyond `scale`; trailing zeros don't count."""
    exponent = amount.as_tuple().exponent
    assert isinstance(exponent, int), "NaN and Infinity never get this far"
    if -exponent <= scale:
        return True
    return amount == amount.quantize(Decimal(1).scaleb(-scale), context=_TRUNCATING)


def fits_size(amount: Decimal) -> bool:
    """Whether `amount` has at most 20 digits before the point. Contract: README.md "Money"."""
    return amount.copy_abs() < _TOO_LARGE


def parse_number(text: str) -> Decimal | None:
    """The plain decimal number in `text` (no exponent, no NaN), or None."""
    if len(text) > 100 or not _PLAIN.fullmatch(text):
        return None
    return Decimal(text)


def parse_amount(text: str, scale: int, field: str = "amount") -> Decimal:
    """The positive amount in `text` of an asset with `scale` decimals.

    Raises Refusal: `bad_request` when it isn't a positive plain decimal of at most 20 integer digits,
    `invalid_scale` when it has more significant decimals than `scale`. Nothing is ever rounded.
    """
    amount = parse_number(text)
    if amount is None or amount <= 0 or not fits_size(amount):
        raise bad_field(
            field,
            "must be a positive decimal string with at most 20 digits before the point",
            expected="decimal string",
            received=text[:100],
        )
    if not fits_scale(amount, scale):
        message = f"{field} has more than {scale} decimals"
        problem = Problem(field, message, expected=f"at most {scale} decimals", received=text)
        raise Refusal("invalid_scale", message, [problem])
    return amount


def format_amount(amount: Decimal, scale: int) -> str:
    """`amount` with exactly `scale` decimals, as responses print it."""
    return format(EXACT.quantize(amount, Decimal(1).scaleb(-scale)), "f")


def format_plain(number: Decimal) -> str:
    """`number` without exponent and without trailing zeros: the canonical form of hashes, counters and CEL strings."""
    if number == 0:
        return "0"
    text = format(number, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


_TRUNCATING = decimal.Context(prec=200, rounding=decimal.ROUND_DOWN, Emin=-999_999, Emax=999_999)
_TOO_LARGE = Decimal(10) ** limits.AMOUNT_INTEGER_DIGITS
