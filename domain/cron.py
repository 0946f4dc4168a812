"""Cron expressions: one dialect for everything that recurs.

Contract: tiers-and-automations.md B6 "Cron dialect", rules-and-events.md 3.

Five fields: minute, hour, day of month, month, day of week. Each is a list of values, ranges (`1-5`) and steps (`*/15`,
`10-30/5`, `5/10` for every tenth from 5 on); months and days of the week also by their English names (`JAN`, `mon`);
`?` means `*`. Sunday is 0 only. Where both day fields are restricted, either one matches; a field with an unstepped `*`
is not restricted, one with a step such as `*/2` is. In place of the five fields one of `@hourly`, `@daily`, `@weekly`,
`@monthly` and `@yearly`.

The text is read here, strictly, and handed to the library as plain lists of numbers. So nothing of the library's own
dialect gets in: a seconds field, 7 for Sunday, `L`, `W`, `#`, stepped stars that count as unrestricted.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache

from cronsim import CronSim, CronSimError

MAX_TEXT_LENGTH = 255

_MACROS = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
}
_TERM = re.compile(
    r"(?:(?P<star>[*?])|(?P<first>[0-9]{1,4}|[A-Z]{3})(?:-(?P<last>[0-9]{1,4}|[A-Z]{3}))?)(?:/(?P<step>[0-9]{1,4}))?",
    re.ASCII,
)
_EXAMPLE = 'five fields such as "0 0 1 * *", or @hourly, @daily, @weekly, @monthly or @yearly'


@dataclass(frozen=True, slots=True)
class Cron:
    """A schedule that fires again and again, in UTC; made by `parse_cron`.

    `fields` are its five fields, each `*` or the values it admits in ascending order.
    """

    fields: tuple[str, str, str, str, str]

    def next_after(self, moment: datetime) -> datetime:
        """The first instant of the schedule strictly after `moment`, which has a time zone; in UTC.

        Takes at most some hundred steps, also where the next instant is eight years away.
        Raises OverflowError beyond the year 9999.
        """
        return next(_simulate(self.fields, moment.astimezone(UTC)))


@dataclass(frozen=True, slots=True)
class _Field:
    name: str
    lowest: int
    highest: int
    names: Mapping[str, int]


def _numbered(first: int, names: str) -> dict[str, int]:
    return {name: number for number, name in enumerate(names.split(), first)}


_FIELDS = (
    _Field("minute", 0, 59, {}),
    _Field("hour", 0, 23, {}),
    _Field("day of month", 1, 31, {}),
    _Field("month", 1, 12, _numbered(1, "JAN FEB MAR APR MAY JUN JUL AUG SEP OCT NOV DEC")),
    _Field("day of week", 0, 6, _numbered(0, "SUN MON TUE WED THU FRI SAT")),
)


@lru_cache(maxsize=1_024)
def parse_cron(text: str) -> Cron:
    """The schedule that `text` writes.

    Raises ValueError, with a sentence fit for an API answer, for what the dialect doesn't have and for a schedule that
    never fires, such as the 31st of February.
    """
    if len(text) > MAX_TEXT_LENGTH:
        raise ValueError(f"a cron expression has at most {MAX_TEXT_LENGTH} characters")
    parts = _MACROS.get(text.strip(), text).split()
    if len(parts) != len(_FIELDS):
        raise ValueError(f"not a cron expression: it has {_EXAMPLE}")
    minute, hour, day, month, weekday = (_read(field, part) for field, part in zip(_FIELDS, parts, strict=True))
    cron = Cron((minute, hour, day, month, weekday))
    try:
        _simulate(cron.fields, datetime(2000, 1, 1, tzinfo=UTC))
    except CronSimError:
        # Its fields are in range, so it is the day that no month has which the library complains about.
        raise ValueError("the cron expression never fires: no such day in these months") from None
    return cron


def _simulate(fields: Sequence[str], after: datetime) -> CronSim:
    return CronSim(" ".join(fields), after)


def _read(field: _Field, part: str) -> str:
    """`*`, or the values that this part of an expression admits."""
    values: set[int] = set()
    is_restricted = True
    for text in part.upper().split(","):
        term = _TERM.fullmatch(text)
        if term is None:
            raise ValueError(f"not a cron expression: cannot read {text[:20]!r} as {field.name}")
        step = int(term["step"] or 1)
        if step == 0:
            raise ValueError(f"the step of the {field.name} is zero")
        values.update(_range(field, term)[::step])
        is_restricted = is_restricted and not (term["star"] and step == 1)
    return ",".join(map(str, sorted(values))) if is_restricted else "*"


def _range(field: _Field, term: re.Match[str]) -> range:
    if term["star"]:
        return range(field.lowest, field.highest + 1)
    first = _value(field, term["first"])
    last = first
    if term["last"] is not None:
        last = _value(field, term["last"])
    elif term["step"] is not None:
        last = field.highest
    if last < first:
        raise ValueError(f"the range {term['first']}-{term['last']} of the {field.name} runs backwards")
    return range(first, last + 1)


def _value(field: _Field, text: str) -> int:
    value = field.names.get(text) if text.isalpha() else int(text)
    if value is None or not field.lowest <= value <= field.highest:
        raise ValueError(f"{text} is not a {field.name}: it goes from {field.lowest} to {field.highest}")
    return value
