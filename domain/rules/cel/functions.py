"""What expressions can call: access to fields and elements, and the functions of rules-and-events.md 6.4.

Every function here is called by generated code with values of any type, so each checks the exact types it takes and
raises nothing but EvaluationError. One that does work in proportion to the size of its operands takes `charge` first.
"""

import functools
import importlib.resources
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta, timezone, tzinfo
from decimal import Decimal
from zoneinfo import ZoneInfo

import re2

from domain.clock import format_timestamp
from domain.durations import parse_duration
from domain.limits import EXPRESSION_STRING_BYTES
from domain.rules.cel import numbers
from domain.rules.cel.errors import EvaluationError, MissingField
from domain.rules.cel.values import (
    ABSENT,
    CHARACTERS_PER_STEP,
    ELEMENTS_PER_STEP,
    KEY_TYPES,
    CelType,
    Charge,
    Value,
    bounded_text,
    check_list_length,
    contained,
    lookup,
    no_overload,
    number,
    text_too_long,
    type_name,
    type_of,
)

# --- Fields and elements ---------------------------------------------------------------------------------------------


def _named(name: str) -> str:
    """A field name as far as an error message shows it."""
    return name if len(name) <= 100 else name[:100] + "..."


def absent_variable(name: str) -> Value:
    """Raises MissingField for a variable that this evaluation does not have."""
    raise MissingField(f"no such variable here: {name}")


def select(operand: Value, field: str) -> Value:
    """`operand.field`. Null has no fields; anything else but a map is a type error."""
    if type(operand) is dict:
        value = operand.get(field, ABSENT)
        if value is not ABSENT:
            return value
    elif operand is not None:
        raise EvaluationError(f"no such overload: {type_name(operand)}.{_named(field)}")
    raise MissingField(f"no such field: {_named(field)}")


def has_field(operand: Value, field: str) -> bool:
    """`has(operand.field)`"""
    if type(operand) is dict:
        return field in operand
    if operand is None:
        return False
    raise no_overload("has", operand)


def index(operand: Value, key: Value) -> Value:
    """`operand[key]`: an element of a list or the value under a key of a map; MissingField where there is none."""
    if type(operand) is list:
        return _element(operand, key)
    if type(operand) is not dict and operand is not None:
        raise EvaluationError(f"no such overload: {type_name(operand)}[{type_name(key)}]")
    value = ABSENT if operand is None else lookup(operand, key)
    if value is ABSENT:
        shown = _named(key) if type(key) is str else type_name(key)
        raise MissingField(f"no such field: {shown}")
    return value


def _element(elements: list[Value], key: Value) -> Value:
    position = numbers.integral(key, "list index")
    if not 0 <= position < len(elements):
        raise MissingField(f"index out of bounds: {position}")
    return elements[position]


def get(mapping: Value, key: Value, default: Value) -> Value:
    """`get(map, key, default)`; null has no keys."""
    if mapping is None:
        return default
    if type(mapping) is not dict:
        raise no_overload("get", mapping, key, default)
    value = lookup(mapping, key)
    return default if value is ABSENT else value


def is_in(charge: Charge, needle: Value, haystack: Value) -> bool:
    """`needle in haystack`: an element of a list or a key of a map."""
    if type(haystack) is list:
        return contained(charge, needle, haystack)
    if type(haystack) is dict and type(needle) in KEY_TYPES:
        return lookup(haystack, needle) is not ABSENT
    raise no_overload("in", needle, haystack)


def make_map(*keys_and_values: Value) -> dict[Value, Value]:
    """A map literal, from its keys and values in turn."""
    result: dict[Value, Value] = {}
    for position in range(0, len(keys_and_values), 2):
        key = number(keys_and_values[position])
        if type(key) not in KEY_TYPES:
            raise EvaluationError(f"a map key cannot be a {type_name(key)}")
        if key in result:
            raise EvaluationError("duplicate key in a map")
        result[key] = keys_and_values[position + 1]
    return result


def elements(operand: Value) -> list[Value]:
    """What a macro walks: the elements of a list, the keys of a map."""
    if type(operand) is list:
        return operand
    if type(operand) is dict:
        return list(operand)
    raise EvaluationError(f"no such overload: a macro over a {type_name(operand)}")


def invert(operand: Value) -> bool:
    """`!operand`"""
    if operand is True:
        return False
    if operand is False:
        return True
    raise no_overload("!", operand)


def size(operand: Value) -> Decimal:
    """`size(x)` and `x.size()`: characters, elements or keys."""
    if type(operand) not in (str, list, dict):
        raise no_overload("size", operand)
    return Decimal(len(operand))


# --- Sets ------------------------------------------------------------------------------------------------------------


def _two_lists(name: str, left: Value, right: Value) -> tuple[list[Value], list[Value]]:
    if type(left) is not list or type(right) is not list:
        raise no_overload(name, left, right)
    return left, right


def sets_contains(charge: Charge, whole: Value, part: Value) -> bool:
    """`sets.contains(a, b)`: all of b in a."""
    whole, part = _two_lists("sets.contains", whole, part)
    return all(_member(charge, element, whole) for element in part)


def sets_intersects(charge: Charge, left: Value, right: Value) -> bool:
    """`sets.intersects(a, b)`: any of b in a."""
    left, right = _two_lists("sets.intersects", left, right)
    return any(_member(charge, element, left) for element in right)


def sets_equivalent(charge: Charge, left: Value, right: Value) -> bool:
    """`sets.equivalent(a, b)`: all of b in a and all of a in b."""
    left, right = _two_lists("sets.equivalent", left, right)
    return all(_member(charge, e, left) for e in right) and all(_member(charge, e, right) for e in left)


def _member(charge: Charge, element: Value, elements_: list[Value]) -> bool:
    charge(1)
    return contained(charge, element, elements_)


# --- Conversions -----------------------------------------------------------------------------------------------------


def to_double(value: Value) -> Decimal:
    """`double(x)`: of a number or a numeric string."""
    value = number(value)
    if type(value) is Decimal:
        return value
    if type(value) is str:
        return numbers.parse_number(value)
    raise no_overload("double", value)


def to_int(value: Value) -> Decimal:
    """`int(x)`: a number cut toward zero, an integer string, a timestamp as unix seconds."""
    value = number(value)
    if type(value) is Decimal:
        return numbers.truncate(value)
    if type(value) is datetime:
        return Decimal((value - _EPOCH) // timedelta(seconds=1))
    if type(value) is not str:
        raise no_overload("int", value)
    parsed = numbers.parse_number(value)
    if not _INTEGER.fullmatch(value):
        raise EvaluationError("not an integer")
    return parsed


_INTEGER = re.compile(r"[+-]?[0-9]+")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def to_string(value: Value) -> str:
    """`string(x)`: 99.0 is `99`; a timestamp in RFC 3339, a duration in seconds (`5400s`)."""
    kind = type(value)
    if kind is str:
        return str(value)
    if kind is bool:
        return "true" if value else "false"
    value = number(value)
    if type(value) is Decimal:
        return numbers.format_number(value)
    if kind is datetime:
        return format_timestamp(value)
    if kind is timedelta:
        seconds = numbers.divide(Decimal(value // timedelta(microseconds=1)), Decimal(1_000_000))
        return numbers.format_number(seconds) + "s"
    raise no_overload("string", value)


_TRUE_TEXTS = frozenset({"true", "True", "TRUE", "t", "1"})
_FALSE_TEXTS = frozenset({"false", "False", "FALSE", "f", "0"})


def to_bool(value: Value) -> bool:
    """`bool(x)`: of a bool or of the texts that CEL names."""
    if type(value) is bool:
        return value
    if type(value) is not str:
        raise no_overload("bool", value)
    if value in _TRUE_TEXTS:
        return True
    if value in _FALSE_TEXTS:
        return False
    raise EvaluationError("not a bool: use true or false")


def to_type(value: Value) -> CelType:
    """`type(x)`"""
    return type_of(value)


def dyn(value: Value) -> Value:
    """`dyn(x)`: x itself. Standard CEL's way out of static types, which we don't have."""
    return value


# --- Time ------------------------------------------------------------------------------------------------------------

_TIMESTAMP = re.compile(
    r"(?P<date>[0-9]{4}-[0-9]{2}-[0-9]{2})"
    r"(?:[Tt](?P<time>[0-9]{2}:[0-9]{2}:[0-9]{2})(?:\.(?P<fraction>[0-9]{1,9}))?"
    r"(?P<zone>[Zz]|[+-][0-9]{2}:[0-9]{2}))?"
)
_MAX_UNIX_SECONDS = 253_402_300_800  # the year 10000


def to_timestamp(value: Value) -> datetime:
    """`timestamp(x)`: an RFC 3339 text, a bare date (midnight UTC), unix seconds; cut to microseconds."""
    value = number(value)
    if type(value) is datetime:
        return value
    if type(value) is Decimal:
        return _from_unix_seconds(value)
    if type(value) is not str:
        raise no_overload("timestamp", value)
    match = _TIMESTAMP.fullmatch(value)
    if match is None:
        raise EvaluationError('not a timestamp: use "2026-09-01T00:00:00Z" or "2026-09-01"')
    try:
        if match["time"] is None:
            day = date.fromisoformat(match["date"])
            return datetime(day.year, day.month, day.day, tzinfo=UTC)
        fraction = (match["fraction"] or "")[:6].ljust(6, "0")
        zone = "+00:00" if match["zone"] in "Zz" else match["zone"]
        return datetime.fromisoformat(f"{match['date']}T{match['time']}.{fraction}{zone}").astimezone(UTC)
    except (ValueError, OverflowError):
        raise EvaluationError("timestamp out of range") from None


def _from_unix_seconds(value: Decimal) -> datetime:
    if abs(value) > _MAX_UNIX_SECONDS:
        raise EvaluationError("timestamp out of range")
    try:
        return _EPOCH + _span(value, 1_000_000)
    except OverflowError:
        raise EvaluationError("timestamp out of range") from None


def to_duration(value: Value) -> timedelta:
    """`duration("24h")`, in Go's syntax."""
    if type(value) is timedelta:
        return value
    if type(value) is not str:
        raise no_overload("duration", value)
    try:
        return parse_duration(value)
    except ValueError as error:
        raise EvaluationError(str(error)) from None


def days(count: Value) -> timedelta:
    """`days(n)`: n times 24 hours; n may have decimals."""
    return _span(numbers.checked("days", count), 86_400_000_000)


def hours(count: Value) -> timedelta:
    """`hours(n)`; n may have decimals."""
    return _span(numbers.checked("hours", count), 3_600_000_000)


def _span(count: Decimal, unit_microseconds: int) -> timedelta:
    if abs(count) > 10**15:
        raise EvaluationError("duration out of range")
    microseconds = numbers.truncate(numbers.multiply(count, Decimal(unit_microseconds)))
    try:
        return timedelta(microseconds=int(microseconds))
    except OverflowError:
        raise EvaluationError("duration out of range") from None


_ZONE_OFFSET = re.compile(r"(?P<sign>[+-]?)(?P<hours>[0-9]{1,2}):(?P<minutes>[0-5][0-9])")
# The names and the data of the package, not of the machine: what a rule gives must not depend on where it runs, and
# `localtime` or `right/UTC` would.
_ZONE_FILES = importlib.resources.files("tzdata")
_ZONE_NAMES = frozenset(_ZONE_FILES.joinpath("zones").read_text("utf-8").split())


@functools.lru_cache(maxsize=256)
def _zone(name: str) -> tzinfo:
    """A time zone by its IANA name (`Europe/Berlin`) or its offset (`+02:00`)."""
    if name in _ZONE_NAMES:
        with _ZONE_FILES.joinpath("zoneinfo", *name.split("/")).open("rb") as file:
            return ZoneInfo.from_file(file, key=name)
    if offset := _ZONE_OFFSET.fullmatch(name):
        distance = timedelta(hours=int(offset["hours"]), minutes=int(offset["minutes"]))
        if distance < timedelta(days=1):
            return timezone(-distance if offset["sign"] == "-" else distance)
    raise EvaluationError('unknown time zone: use "Europe/Berlin" or "+02:00"')


def _local(name: str, instant: Value, zone: Value) -> datetime:
    if type(instant) is not datetime or not (zone is None or type(zone) is str):
        raise no_overload(name, instant) if zone is None else no_overload(name, instant, zone)
    if zone is None:
        return instant
    try:
        return instant.astimezone(_zone(zone))
    except OverflowError:
        raise EvaluationError("timestamp out of range") from None


def _getter(name: str, read: Callable[[datetime], int]) -> Callable[..., Decimal]:
    """A timestamp's getter, with an optional time zone."""

    def getter(instant: Value, zone: Value = None) -> Decimal:
        return Decimal(read(_local(name, instant, zone)))

    return getter


def _span_getter(
    name: str, read: Callable[[datetime], int], span: Callable[[timedelta], int]
) -> Callable[..., Decimal]:
    """A getter that durations have too, where `span` reads the magnitude of the duration."""

    def getter(value: Value, zone: Value = None) -> Decimal:
        if type(value) is timedelta and zone is None:
            magnitude = span(abs(value))
            return Decimal(-magnitude if value < timedelta(0) else magnitude)
        return Decimal(read(_local(name, value, zone)))

    return getter


# --- Strings ---------------------------------------------------------------------------------------------------------


def _texts(name: str, *operands: Value) -> None:
    for operand in operands:
        if type(operand) is not str:
            raise no_overload(name, *operands)


def contains(charge: Charge, text: Value, part: Value) -> bool:
    """`text.contains(part)`"""
    _texts("contains", text, part)
    charge(len(text) // CHARACTERS_PER_STEP)
    return part in text


def starts_with(text: Value, prefix: Value) -> bool:
    """`text.startsWith(prefix)`"""
    _texts("startsWith", text, prefix)
    return bool(text.startswith(prefix))


def ends_with(text: Value, suffix: Value) -> bool:
    """`text.endsWith(suffix)`"""
    _texts("endsWith", text, suffix)
    return bool(text.endswith(suffix))


_UPPER_TO_LOWER = {code: code + 32 for code in range(ord("A"), ord("Z") + 1)}
_LOWER_TO_UPPER = {code + 32: code for code in _UPPER_TO_LOWER}


def lower_ascii(charge: Charge, text: Value) -> str:
    """`text.lowerAscii()`; letters outside ASCII stay as they are."""
    _texts("lowerAscii", text)
    charge(len(text) // CHARACTERS_PER_STEP)
    return str(text.lower() if text.isascii() else text.translate(_UPPER_TO_LOWER))


def upper_ascii(charge: Charge, text: Value) -> str:
    """`text.upperAscii()`; letters outside ASCII stay as they are."""
    _texts("upperAscii", text)
    charge(len(text) // CHARACTERS_PER_STEP)
    return str(text.upper() if text.isascii() else text.translate(_LOWER_TO_UPPER))


# Python's own set has four control characters more.
_WHITE_SPACE = "".join(chr(code) for code in range(0x3001) if chr(code).isspace() and not 0x1C <= code <= 0x1F)


def trim(charge: Charge, text: Value) -> str:
    """`text.trim()`: without the white space of Unicode at both ends."""
    _texts("trim", text)
    charge(len(text) // CHARACTERS_PER_STEP)
    return str(text.strip(_WHITE_SPACE))


def split(charge: Charge, text: Value, separator: Value, limit: Value = Decimal(-1)) -> list[Value]:
    """`text.split(separator[, limit])`: at most `limit` parts; 0 gives none, a negative limit all."""
    _texts("split", text, separator)
    parts = numbers.integral(limit, "limit of split")
    charge(len(text) // CHARACTERS_PER_STEP)
    if parts == 0:
        return []
    most = len(text) if separator == "" else text.count(separator) + 1
    expected = most if parts < 0 else min(most, parts)
    check_list_length(expected)
    charge(expected // ELEMENTS_PER_STEP)
    if separator:
        return list(text.split(separator, expected - 1))
    return [*text[: expected - 1], text[expected - 1 :]] if text else []


def replace(charge: Charge, text: Value, old: Value, new: Value, limit: Value = Decimal(-1)) -> str:
    """`text.replace(old, new[, limit])`: at most `limit` times; a negative limit replaces all."""
    _texts("replace", text, old, new)
    most = numbers.integral(limit, "limit of replace")
    charge(len(text) // CHARACTERS_PER_STEP)
    found = text.count(old)
    times = found if most < 0 else min(found, most)
    length = len(text) + times * (len(new) - len(old))
    if length > EXPRESSION_STRING_BYTES:  # before it is built: 64 KiB times 64 KiB would be 4 GiB
        raise text_too_long()
    charge(length // CHARACTERS_PER_STEP)
    return bounded_text(text.replace(old, new, times))


def substring(charge: Charge, text: Value, start: Value, end: Value = None) -> str:
    """`text.substring(start[, end])`, positions in characters."""
    _texts("substring", text)
    first = numbers.integral(start, "start of substring")
    last = len(text) if end is None else numbers.integral(end, "end of substring")
    if not 0 <= first <= last <= len(text):
        raise EvaluationError(f"substring out of bounds: {first} to {last} of {len(text)} characters")
    charge((last - first) // CHARACTERS_PER_STEP)
    return str(text[first:last])


_MAX_PATTERN_LENGTH = 1_024
# What RE2 may use for one pattern. That \pL{99} needs more, it finds out in half a millisecond; in 1 MiB it took four.
_PATTERN_BYTES = 128 * 1024
# More than an expression has room for, so that it never compiles one of its patterns twice: 32 MiB at most.
_CACHED_PATTERNS = 256
# For a pattern that is computed: its compilation, whether or not it is found compiled, so that steps stay repeatable.
_STEPS_PER_PATTERN = 60
_STEPS_PER_PATTERN_CHARACTER = 2
# Bytes of the text times instructions of the pattern, for the search.
_PROGRAM_BYTES_PER_STEP = 1_024
_PATTERN_OPTIONS = re2.Options()
_PATTERN_OPTIONS.max_mem = _PATTERN_BYTES
_PATTERN_OPTIONS.never_capture = True
_PATTERN_OPTIONS.log_errors = False


@functools.lru_cache(maxsize=_CACHED_PATTERNS)
def _pattern(text: str) -> re2._Regexp | str:
    """The compiled pattern, or what is wrong with it: that is kept as well, because finding out takes as long."""
    if len(text) > _MAX_PATTERN_LENGTH:
        return f"pattern longer than {_MAX_PATTERN_LENGTH} characters"
    try:
        return re2.compile(text, _PATTERN_OPTIONS)
    except re2.error as error:
        return "pattern too large" if "too large" in str(error) else "not a valid RE2 pattern"
    except UnicodeError:
        return "not a valid RE2 pattern"


def matches(charge: Charge, text: Value, pattern: Value) -> bool:
    """`text.matches(pattern)`: RE2, linear in the text; true when any part of the text matches."""
    _texts("matches", text, pattern)
    charge(_STEPS_PER_PATTERN + len(pattern) * _STEPS_PER_PATTERN_CHARACTER)
    return _search(charge, text, pattern)


def matches_constant(charge: Charge, text: Value, pattern: Value) -> bool:
    """`text.matches("pattern")`: compiled once, and charged for the search only."""
    _texts("matches", text, pattern)
    return _search(charge, text, pattern)


def _search(charge: Charge, text: str, pattern: str) -> bool:
    compiled = _pattern(pattern)
    if isinstance(compiled, str):
        raise EvaluationError(compiled)
    length = len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
    # RE2 is linear in the text, but the factor is the size of the program: (a?){500} took 600 ms over 64 KiB.
    charge(1 + length * int(compiled.programsize) // _PROGRAM_BYTES_PER_STEP)
    try:
        return compiled.search(text) is not None
    except UnicodeError:
        raise EvaluationError("text is not valid Unicode") from None


# --- The table -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Function:
    """A function that expressions may call: how many arguments it takes and the kind of its result, if it has one."""

    implementation: Callable[..., Value]
    least: int
    most: int | None
    result: str | None = None
    charged: bool = False


FUNCTIONS: dict[str, Function] = {
    "get": Function(get, 3, 3),
    "size": Function(size, 1, 1, "number"),
    "round": Function(numbers.round_half_away, 1, 2, "number"),
    "floor": Function(numbers.floor, 1, 2, "number"),
    "ceil": Function(numbers.ceil, 1, 2, "number"),
    "abs": Function(numbers.absolute, 1, 1, "number"),
    "min": Function(numbers.least, 1, None, "number", charged=True),
    "max": Function(numbers.greatest, 1, None, "number", charged=True),
    "math.least": Function(numbers.least, 1, None, "number", charged=True),
    "math.greatest": Function(numbers.greatest, 1, None, "number", charged=True),
    "double": Function(to_double, 1, 1, "number"),
    "int": Function(to_int, 1, 1, "number"),
    "string": Function(to_string, 1, 1, "string"),
    "bool": Function(to_bool, 1, 1, "bool"),
    "type": Function(to_type, 1, 1),
    "dyn": Function(dyn, 1, 1),
    "timestamp": Function(to_timestamp, 1, 1, "timestamp"),
    "duration": Function(to_duration, 1, 1, "duration"),
    "days": Function(days, 1, 1, "duration"),
    "hours": Function(hours, 1, 1, "duration"),
    "matches": Function(matches, 2, 2, "bool", charged=True),
    "sets.contains": Function(sets_contains, 2, 2, "bool", charged=True),
    "sets.intersects": Function(sets_intersects, 2, 2, "bool", charged=True),
    "sets.equivalent": Function(sets_equivalent, 2, 2, "bool", charged=True),
}
NAMESPACES = frozenset(name.partition(".")[0] for name in FUNCTIONS if "." in name)

# Called on a value, which is the first argument.
METHODS: dict[str, Function] = {
    "size": Function(size, 1, 1, "number"),
    "contains": Function(contains, 2, 2, "bool", charged=True),
    "startsWith": Function(starts_with, 2, 2, "bool"),
    "endsWith": Function(ends_with, 2, 2, "bool"),
    "matches": Function(matches, 2, 2, "bool", charged=True),
    "lowerAscii": Function(lower_ascii, 1, 1, "string", charged=True),
    "upperAscii": Function(upper_ascii, 1, 1, "string", charged=True),
    "trim": Function(trim, 1, 1, "string", charged=True),
    "split": Function(split, 2, 3, charged=True),
    "replace": Function(replace, 3, 4, "string", charged=True),
    "substring": Function(substring, 2, 3, "string", charged=True),
    **{
        name: Function(_getter(name, read), 1, 2, "number")
        for name, read in {
            "getFullYear": lambda t: t.year,
            "getMonth": lambda t: t.month - 1,
            "getDate": lambda t: t.day,
            "getDayOfMonth": lambda t: t.day - 1,
            "getDayOfWeek": lambda t: t.isoweekday() % 7,
            "getDayOfYear": lambda t: t.timetuple().tm_yday - 1,
        }.items()
    },
    **{
        name: Function(_span_getter(name, read, span), 1, 2, "number")
        for name, (read, span) in {
            "getHours": (lambda t: t.hour, lambda d: d // timedelta(hours=1)),
            "getMinutes": (lambda t: t.minute, lambda d: d // timedelta(minutes=1)),
            "getSeconds": (lambda t: t.second, lambda d: d // timedelta(seconds=1)),
            # Of a duration, too, within the second: standard CEL counts whole units of the other three only.
            "getMilliseconds": (lambda t: t.microsecond // 1000, lambda d: d.microseconds // 1000),
        }.items()
    },
}
