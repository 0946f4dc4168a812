"""The values that expressions compute with, their names, their equality, and the budget of one evaluation.

A value is None, bool, str, Decimal (every number), list, dict, datetime (aware, UTC), timedelta or CelType. Types are
compared with `type(x) is T`, because in Python a bool is an int and `True == Decimal(1)`.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

from domain.limits import EXPRESSION_LIST, EXPRESSION_MS, EXPRESSION_STEPS, EXPRESSION_STRING_BYTES
from domain.rules.cel.errors import EvaluationError, EvaluationLimit

STEPS_BETWEEN_CLOCK_LOOKS = 256

# Work that runs at the speed of C is charged by size: one step per so many characters or elements.
CHARACTERS_PER_STEP = 64
ELEMENTS_PER_STEP = 16

Value = Any
Charge = Callable[[int], None]


class Meter:
    """The steps and the time that one evaluation has left. `charge` is what the generated code calls."""

    __slots__ = ("_deadline", "_look_below", "_remaining")

    def __init__(self) -> None:
        self._remaining = EXPRESSION_STEPS
        self._look_below = EXPRESSION_STEPS - STEPS_BETWEEN_CLOCK_LOOKS
        # Computing time of this thread: while a worker stands still no expression gets any slower.
        self._deadline = time.thread_time() + EXPRESSION_MS / 1000

    def charge(self, steps: int) -> None:
        """Takes `steps` off; raises EvaluationLimit when none are left or the time is over."""
        self._remaining -= steps
        if self._remaining < self._look_below:
            self._look()

    def _look(self) -> None:
        if self._remaining < 0:
            raise EvaluationLimit(f"more than {EXPRESSION_STEPS} evaluation steps")
        if time.thread_time() > self._deadline:
            raise EvaluationLimit(f"longer than {EXPRESSION_MS} ms")
        # Never below zero, so that the one comparison in `charge` notices the end of the steps as well.
        self._look_below = max(self._remaining - STEPS_BETWEEN_CLOCK_LOOKS, 0)


@dataclass(frozen=True, slots=True)
class CelType:
    """The value of `type(x)` and of a bare type name; it can only be compared."""

    name: str


NUMBER_TYPE = CelType("number")
_TYPES: dict[type, CelType] = {
    type(None): CelType("null_type"),
    bool: CelType("bool"),
    str: CelType("string"),
    Decimal: NUMBER_TYPE,
    int: NUMBER_TYPE,
    list: CelType("list"),
    dict: CelType("map"),
    datetime: CelType("timestamp"),
    timedelta: CelType("duration"),
    CelType: CelType("type"),
}

# All numbers are decimals, so that `type(x) == int` and `type(x) == double` ask the same: is x a number?
TYPE_NAMES: dict[str, CelType] = {
    **{cel_type.name: cel_type for cel_type in _TYPES.values()},
    "int": NUMBER_TYPE,
    "double": NUMBER_TYPE,
}


def type_of(value: Value) -> CelType:
    """The CEL type of a value. Raises EvaluationError for a Python value that is none of ours (a float, say)."""
    found = _TYPES.get(type(value))
    if found is None:
        raise EvaluationError(f"unsupported value: {type(value).__name__}")
    return found


def type_name(value: Value) -> str:
    """The name of the type as it is shown in error messages: `null` rather than `null_type`."""
    found = _TYPES.get(type(value))
    if found is None:
        return type(value).__name__
    return "null" if value is None else found.name


def no_overload(operation: str, *operands: Value) -> EvaluationError:
    """The error of an operation that these types do not have: `no such overload: string > number`."""
    names = [type_name(operand) for operand in operands]
    if operation[0].isalpha() and operation != "in":
        return EvaluationError(f"no such overload: {operation}({', '.join(names)})")
    if len(names) == 2:
        return EvaluationError(f"no such overload: {names[0]} {operation} {names[1]}")
    return EvaluationError(f"no such overload: {operation}{names[0]}")


def not_a_bool(operation: str, value: Value) -> EvaluationError:
    """The error of a logical operation that met something else than a bool."""
    return EvaluationError(f"no such overload: {operation} needs a bool, not {type_name(value)}")


def number(value: Value) -> Value:
    """The Decimal of a plain int, which state built in Python may hold (a tier's rank); other values unchanged."""
    return Decimal(value) if type(value) is int else value


def equals(charge: Charge, left: Value, right: Value) -> bool:
    """CEL's `==`: false, not an error, across types; lists and maps by their elements. Contract: 6.5."""
    left_type = type(left)
    if left_type is type(right):
        if left_type is list:
            return _equal_lists(charge, left, right)
        if left_type is dict:
            return _equal_maps(charge, left, right)
        return bool(left == right)
    if left_type is int or type(right) is int:
        return _equal_numbers(number(left), number(right))
    return False


def _equal_numbers(left: Value, right: Value) -> bool:
    return type(left) is Decimal and type(right) is Decimal and left == right


def _equal_lists(charge: Charge, left: list[Value], right: list[Value]) -> bool:
    if len(left) != len(right):
        return False
    for one, other in zip(left, right, strict=True):
        charge(1)
        if not equals(charge, one, other):
            return False
    return True


def _equal_maps(charge: Charge, left: dict[Value, Value], right: dict[Value, Value]) -> bool:
    if len(left) != len(right):
        return False
    for key, value in left.items():
        charge(1)
        found = lookup(right, key)
        if found is ABSENT or not equals(charge, value, found):
            return False
    return True


class _Absent:
    """The type of ABSENT."""

    __slots__ = ()


ABSENT = _Absent()
KEY_TYPES = frozenset({str, bool, Decimal, int})


def lookup(mapping: dict[Value, Value], key: Value) -> Value:
    """The value under `key`, or ABSENT; true and 1 are different keys."""
    if type(key) is str:
        return mapping.get(key, ABSENT)
    key = number(key)
    if type(key) not in (Decimal, bool) or key not in mapping:
        return ABSENT
    if key != 0 and key != 1:
        return mapping[key]
    # Python takes True and 1 for the same key, so a hit counts only if the key found has the type asked for.
    for candidate, value in mapping.items():
        if candidate == key:
            return value if type(candidate) is type(key) else ABSENT
    return ABSENT


def contained(charge: Charge, needle: Value, elements: list[Value]) -> bool:
    """Whether an element of the list equals `needle`."""
    if type(needle) is list or type(needle) is dict:
        # Not Python's own `in`: values may share structure, and it would walk all of it uncharged.
        return any(_equal_after_charge(charge, needle, element) for element in elements)
    charge(len(elements) // ELEMENTS_PER_STEP)
    if needle not in elements:
        return False
    return type(needle) is str or any(_equal_after_charge(charge, needle, element) for element in elements)


def _equal_after_charge(charge: Charge, left: Value, right: Value) -> bool:
    charge(1)
    return equals(charge, left, right)


def bounded_text(text: str) -> str:
    """`text` itself; raises EvaluationLimit when it is longer than a string may be."""
    if len(text) > EXPRESSION_STRING_BYTES or (
        not text.isascii() and len(text.encode("utf-8", "surrogatepass")) > EXPRESSION_STRING_BYTES
    ):
        raise text_too_long()
    return text


def text_too_long() -> EvaluationLimit:
    """The error of a string beyond the limit, also for one that is not built at all because it would be."""
    return EvaluationLimit(f"string longer than {EXPRESSION_STRING_BYTES} bytes")


def check_list_length(length: int) -> None:
    """Raises EvaluationLimit for a list that would be longer than a list may be."""
    if length > EXPRESSION_LIST:
        raise EvaluationLimit(f"list longer than {EXPRESSION_LIST} elements")
