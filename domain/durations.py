"""Durations in Go's syntax ("24h", "1h30m", "1.5h", "300ms"), the form that the whole API uses.

Contract: rules-and-events.md 5.5, 5.11, 5.14 and 6.4. There is no unit for days: "720h" is 30 days.
"""

import re
from datetime import timedelta

MAX_TEXT_LENGTH = 64

# The int64 range of nanoseconds that Go's own parser accepts, about 292 years.
_MAX_NANOSECONDS = 2**63 - 1

_NANOSECONDS_PER_UNIT = {
    "ns": 1,
    "us": 1_000,
    "\u00b5s": 1_000,  # micro sign
    "\u03bcs": 1_000,  # Greek letter mu
    "ms": 1_000_000,
    "s": 1_000_000_000,
    "m": 60_000_000_000,
    "h": 3_600_000_000_000,
}
_COMPONENT = re.compile(r"(?P<whole>[0-9]*)(?:\.(?P<fraction>[0-9]*))?(?P<unit>ns|us|\u00b5s|\u03bcs|ms|s|m|h)")


def parse_duration(text: str) -> timedelta:
    """The duration that `text` writes in Go's syntax, cut to whole microseconds; it may be negative or zero.

    Raises ValueError, with a sentence fit for an API answer, for anything that Go's `time.ParseDuration` refuses.
    """
    if len(text) > MAX_TEXT_LENGTH:
        raise ValueError(f"invalid duration: longer than {MAX_TEXT_LENGTH} characters")
    negative = text.startswith("-")
    unsigned = text[1:] if text[:1] in ("-", "+") else text
    if unsigned == "0":
        return timedelta(0)
    nanoseconds = _sum_of_components(unsigned, text)
    if nanoseconds > _MAX_NANOSECONDS:
        raise ValueError(f'duration out of range: "{text}"')
    # Cut the magnitude, not the signed value: floor division would turn -1ns into -1us.
    duration = timedelta(microseconds=nanoseconds // 1_000)
    return -duration if negative else duration


def _sum_of_components(unsigned: str, text: str) -> int:
    total = 0
    position = 0
    while position < len(unsigned) or position == 0:
        component = _COMPONENT.match(unsigned, position)
        digits = component and (component["whole"] or component["fraction"])
        if component is None or not digits:
            raise ValueError(f'invalid duration "{text}": use the units h, m, s, ms, us, ns, such as "24h" or "1h30m"')
        fraction = component["fraction"] or ""
        unit = _NANOSECONDS_PER_UNIT[component["unit"]]
        total += int((component["whole"] or "0") + fraction) * unit // 10 ** len(fraction)
        position = component.end()
    return total


def format_duration(duration: timedelta) -> str:
    """`duration` in Go's syntax, exact and as short as possible: "720h", "1h30m", "1.5s", "300ms", "0s".

    `parse_duration` reads it back unchanged.
    """
    microseconds = duration // timedelta(microseconds=1)
    if microseconds == 0:
        return "0s"
    sign = "-" if microseconds < 0 else ""
    microseconds = abs(microseconds)
    if microseconds < 1_000:
        return f"{sign}{microseconds}us"
    if microseconds < 1_000_000:
        return f"{sign}{_with_fraction(microseconds, 1_000)}ms"
    minutes, rest = divmod(microseconds, 60_000_000)
    hours, minutes = divmod(minutes, 60)
    parts = [f"{hours}h" if hours else "", f"{minutes}m" if minutes else ""]
    if rest:
        parts.append(f"{_with_fraction(rest, 1_000_000)}s")
    return sign + "".join(parts)


def _with_fraction(count: int, per_unit: int) -> str:
    """`count / per_unit` as an exact decimal text; `per_unit` is a power of ten."""
    whole, fraction = divmod(count, per_unit)
    if not fraction:
        return str(whole)
    digits = len(str(per_unit)) - 1
    return f"{whole}.{fraction:0{digits}d}".rstrip("0")
