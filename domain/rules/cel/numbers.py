"""Numbers: every one is a Decimal. Contract: rules-and-events.md 5.4 and 6.5, README.md "Money".

`+ - *` are exact: what does not fit 80 digits is an error, never a rounded amount. `/` keeps 50 digits. Every operation
names its context; the context of the thread (28 digits, rounding silently) is never used.
"""

import decimal
import re
from collections.abc import Callable
from datetime import datetime, timedelta
from decimal import Decimal

from domain.rules.cel.errors import EvaluationError
from domain.rules.cel.values import (
    CHARACTERS_PER_STEP,
    ELEMENTS_PER_STEP,
    Charge,
    Value,
    bounded_text,
    check_list_length,
    no_overload,
    number,
)

MAX_DIGITS = 80
QUOTIENT_DIGITS = 50
MAX_EXPONENT = 999
MAX_DECIMALS = 80

_TRAPS = [decimal.InvalidOperation, decimal.Overflow]
_EXACT = decimal.Context(
    prec=MAX_DIGITS,
    rounding=decimal.ROUND_HALF_EVEN,
    Emin=-MAX_EXPONENT,
    Emax=MAX_EXPONENT,
    traps=[*_TRAPS, decimal.Inexact],
)
_QUOTIENT = decimal.Context(
    prec=QUOTIENT_DIGITS,
    rounding=decimal.ROUND_HALF_EVEN,
    Emin=-MAX_EXPONENT,
    Emax=MAX_EXPONENT,
    traps=[*_TRAPS, decimal.Underflow],
)
# Rounding an 80-digit number up can carry into one digit more.
_ROUNDING = decimal.Context(prec=MAX_DIGITS + 1, Emin=-MAX_EXPONENT, Emax=MAX_EXPONENT, traps=_TRAPS)

_ZERO = Decimal(0)
_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_MAX_NUMBER_LENGTH = 1_100  # the longest plain form of a number within the exponent limit, with some room
_MAX_HEXADECIMAL_LENGTH = 64

_exact_add = _EXACT.add
_exact_subtract = _EXACT.subtract
_exact_multiply = _EXACT.multiply


def parse_number(text: str) -> Decimal:
    """The number that `text` writes in JSON's or CEL's form. Raises EvaluationError: not a number, or out of range."""
    if len(text) > _MAX_NUMBER_LENGTH or not _NUMBER.fullmatch(text):
        raise EvaluationError("not a number" if len(text) > 40 else f'not a number: "{text}"')
    try:
        return _EXACT.create_decimal(text)
    except decimal.DecimalException:
        raise _out_of_range() from None


def parse_hexadecimal(text: str) -> Decimal:
    """The number of a literal such as 0x1F or -0x1F. Raises EvaluationError when it is out of range."""
    if len(text) > _MAX_HEXADECIMAL_LENGTH:
        raise _out_of_range()
    return Decimal(int(text, 16))


def _out_of_range() -> EvaluationError:
    return EvaluationError(f"number out of range: more than {MAX_DIGITS} digits or an exponent beyond {MAX_EXPONENT}")


def _arithmetic_error(error: decimal.DecimalException) -> EvaluationError:
    if isinstance(error, decimal.Inexact) and not isinstance(error, decimal.Overflow | decimal.Underflow):
        return EvaluationError(f"result needs more than {MAX_DIGITS} digits: round() it on the way")
    return _out_of_range()


# --- Operators -------------------------------------------------------------------------------------------------------


def add_numbers(left: Value, right: Value) -> Value:
    """`left + right` where one of them is known to be a number."""
    if type(left) is Decimal and type(right) is Decimal:
        try:
            return _exact_add(left, right)
        except decimal.DecimalException as error:
            raise _arithmetic_error(error) from None
    return _with_plain_ints("+", add_numbers, left, right)


def add(charge: Charge, left: Value, right: Value) -> Value:
    """`left + right`: numbers, strings, lists, durations, timestamp and duration."""
    kind = type(left)
    if kind is Decimal:
        return add_numbers(left, right)
    if kind is type(right):
        if kind is str:
            charge((len(left) + len(right)) // CHARACTERS_PER_STEP)
            return bounded_text(left + right)
        if kind is list:
            check_list_length(len(left) + len(right))
            charge((len(left) + len(right)) // ELEMENTS_PER_STEP)
            return left + right
        if kind is timedelta:
            return _in_time_range(lambda: left + right)
    if (kind is datetime and type(right) is timedelta) or (kind is timedelta and type(right) is datetime):
        return _in_time_range(lambda: left + right)
    return add_numbers(left, right)


def subtract(left: Value, right: Value) -> Value:
    """`left - right`: numbers, durations, timestamps, timestamp and duration."""
    if type(left) is Decimal and type(right) is Decimal:
        try:
            return _exact_subtract(left, right)
        except decimal.DecimalException as error:
            raise _arithmetic_error(error) from None
    kind = type(left)
    if (kind is datetime and type(right) in (datetime, timedelta)) or (kind is timedelta is type(right)):
        return _in_time_range(lambda: left - right)
    return _with_plain_ints("-", subtract, left, right)


def multiply(left: Value, right: Value) -> Value:
    """`left * right`, exact."""
    if type(left) is Decimal and type(right) is Decimal:
        try:
            return _exact_multiply(left, right)
        except decimal.DecimalException as error:
            raise _arithmetic_error(error) from None
    return _with_plain_ints("*", multiply, left, right)


def divide(left: Value, right: Value) -> Value:
    """`left / right` to 50 digits; there is no integer division: 7/2 is 3.5."""
    if type(left) is Decimal and type(right) is Decimal:
        if not right:
            raise EvaluationError("division by zero")
        try:
            return _QUOTIENT.divide(left, right)
        except decimal.DecimalException as error:
            raise _arithmetic_error(error) from None
    return _with_plain_ints("/", divide, left, right)


def remainder(left: Value, right: Value) -> Value:
    """`left % right`, with the sign of `left`."""
    if type(left) is Decimal and type(right) is Decimal:
        if not right:
            raise EvaluationError("division by zero")
        try:
            return _EXACT.remainder(left, right)
        except decimal.DecimalException as error:
            raise _arithmetic_error(error) from None
    return _with_plain_ints("%", remainder, left, right)


def negate(operand: Value) -> Value:
    """`-operand`"""
    operand = number(operand)
    if type(operand) is not Decimal:
        raise no_overload("-", operand)
    return _EXACT.minus(operand)


def _with_plain_ints(symbol: str, operation: Callable[[Value, Value], Value], left: Value, right: Value) -> Value:
    """Repeats `operation` with Decimals in place of plain ints, or says that these types have no such operation."""
    if type(left) is int or type(right) is int:
        return operation(number(left), number(right))
    raise no_overload(symbol, left, right)


def _in_time_range(operation: Callable[[], Value]) -> Value:
    try:
        return operation()
    except OverflowError:
        raise EvaluationError("timestamp or duration out of range") from None


def equals_number(left: Value, right: Value) -> bool:
    """`left == right` where `right` is known to be a number; true == 1 is false."""
    if type(left) is Decimal:
        return bool(left == right)
    return type(left) is int and bool(Decimal(left) == right)


def number_in(needle: Value, numbers: frozenset[Decimal]) -> bool:
    """Membership in a constant list of numbers; true is not in [1]."""
    kind = type(needle)
    return (kind is Decimal or kind is int) and needle in numbers


def less(left: Value, right: Value) -> Value:
    """`left < right`"""
    if type(left) is Decimal and type(right) is Decimal:
        return left < right
    left, right = _ordered("<", left, right)
    return left < right


def less_or_equal(left: Value, right: Value) -> Value:
    """`left <= right`"""
    if type(left) is Decimal and type(right) is Decimal:
        return left <= right
    left, right = _ordered("<=", left, right)
    return left <= right


def greater(left: Value, right: Value) -> Value:
    """`left > right`"""
    if type(left) is Decimal and type(right) is Decimal:
        return left > right
    left, right = _ordered(">", left, right)
    return left > right


def greater_or_equal(left: Value, right: Value) -> Value:
    """`left >= right`"""
    if type(left) is Decimal and type(right) is Decimal:
        return left >= right
    left, right = _ordered(">=", left, right)
    return left >= right


_ORDERED_TYPES = frozenset({Decimal, str, bool, datetime, timedelta})


def _ordered(symbol: str, left: Value, right: Value) -> tuple[Value, Value]:
    """Both operands, if values of their types have an order: numbers, strings, bools, timestamps, durations."""
    left, right = number(left), number(right)
    if type(left) is not type(right) or type(left) not in _ORDERED_TYPES:
        raise no_overload(symbol, left, right)
    return left, right


# --- Functions -------------------------------------------------------------------------------------------------------


def checked(name: str, value: Value) -> Decimal:
    """The operand as a Decimal. Raises EvaluationError, naming the function `name`, for anything but a number."""
    operand = number(value)
    if type(operand) is not Decimal:
        raise no_overload(name, value)
    return operand


def absolute(value: Value) -> Decimal:
    """`abs(x)`"""
    return _EXACT.abs(checked("abs", value))


def round_half_away(value: Value, decimals: Value = _ZERO) -> Decimal:
    """`round(x, n)`: to n decimals, half away from zero: 0.125 -> 0.13, -2.5 -> -3."""
    return _rounded("round", value, decimals, decimal.ROUND_HALF_UP)


def floor(value: Value, decimals: Value = _ZERO) -> Decimal:
    """`floor(x, n)`: to n decimals, down: -0.5 -> -1."""
    return _rounded("floor", value, decimals, decimal.ROUND_FLOOR)


def ceil(value: Value, decimals: Value = _ZERO) -> Decimal:
    """`ceil(x, n)`: to n decimals, up: -0.5 -> 0."""
    return _rounded("ceil", value, decimals, decimal.ROUND_CEILING)


def _rounded(name: str, value: Value, decimals: Value, rounding: str) -> Decimal:
    exact = checked(name, value)
    places = integral(decimals, "number of decimals")
    if abs(places) > MAX_DECIMALS:
        raise EvaluationError(f"number of decimals beyond {MAX_DECIMALS}")
    exponent = exact.as_tuple().exponent
    if isinstance(exponent, int) and exponent >= -places:
        return exact  # has no more decimals than asked for, and must not get needless ones
    try:
        rounded = exact.quantize(Decimal((0, (1,), -places)), rounding, _ROUNDING)
    except decimal.DecimalException as error:
        raise _arithmetic_error(error) from None
    return rounded or _ZERO  # never -0


def integral(value: Value, what: str) -> int:
    """A whole number as an int, for counts and positions. Raises EvaluationError; `what` names it there."""
    value = number(value)
    if type(value) is not Decimal or value.adjusted() > 18 or value != value.to_integral_value(context=_ROUNDING):
        raise EvaluationError(f"{what} must be a whole number")
    return int(value)


def greatest(charge: Charge, *values: Value) -> Decimal:
    """`max(a, b, ...)` and `math.greatest(a, b, ...)`; one list of numbers is accepted too."""
    return max(_operands(charge, "max", values))


def least(charge: Charge, *values: Value) -> Decimal:
    """`min(a, b, ...)` and `math.least(a, b, ...)`; one list of numbers is accepted too."""
    return min(_operands(charge, "min", values))


def _operands(charge: Charge, name: str, values: tuple[Value, ...]) -> list[Decimal]:
    candidates = values[0] if len(values) == 1 and type(values[0]) is list else values
    charge(len(candidates))
    if not candidates:
        raise EvaluationError(f"{name} of an empty list")
    return [checked(name, candidate) for candidate in candidates]


def truncate(value: Decimal) -> Decimal:
    """The number without its decimals, cut toward zero."""
    whole = value.to_integral_value(decimal.ROUND_DOWN, _ROUNDING)
    return whole or _ZERO  # never -0


def format_number(value: Decimal) -> str:
    """Plain decimal, no exponent, no needless fraction: 99.0 is `99`. Contract: README.md, small print."""
    if not value:
        return "0"
    text = format(value, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text
