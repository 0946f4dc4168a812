"""Cron expressions. Goal: the contract's dialect and nothing more of anyone's, and every instant it names, in order.

Method: worked examples, refusals, and a comparison with a reference that tries one day after the other.
Contract: tiers-and-automations.md B6.
"""

from datetime import UTC, date, datetime, timedelta, timezone
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.cron import MAX_TEXT_LENGTH, parse_cron


def instants(text: str, after: str, count: int = 1) -> list[str]:
    moment = datetime.fromisoformat(after)
    found = []
    for _ in range(count):
        moment = parse_cron(text).next_after(moment)
        found.append(moment.strftime("%Y-%m-%d %H:%M"))
    return found


@pytest.mark.parametrize(
    ("text", "after", "expected"),
    [
        ("0 0 1 * *", "2026-01-15T10:00:00Z", ["2026-02-01 00:00", "2026-03-01 00:00"]),
        ("0 9 * * 1", "2026-01-01T00:00:00Z", ["2026-01-05 09:00", "2026-01-12 09:00"]),
        ("*/15 * * * *", "2026-01-01T10:07:00Z", ["2026-01-01 10:15", "2026-01-01 10:30"]),
        ("5/20 10 * * *", "2026-01-01T00:00:00Z", ["2026-01-01 10:05", "2026-01-01 10:25", "2026-01-01 10:45"]),
        ("10-30/10 8,20 * * *", "2026-01-01T08:20:00Z", ["2026-01-01 08:30", "2026-01-01 20:10"]),
        ("0 0 ? * SUN", "2026-01-01T00:00:00Z", ["2026-01-04 00:00", "2026-01-11 00:00"]),
        ("0 0 ? * 0", "2026-01-01T00:00:00Z", ["2026-01-04 00:00"]),
        ("0 0 * * mon-Fri", "2026-01-02T00:00:00Z", ["2026-01-05 00:00", "2026-01-06 00:00"]),
        ("0 0 1 JAN,jul *", "2026-01-01T00:00:00Z", ["2026-07-01 00:00", "2027-01-01 00:00"]),
        ("0 0 31 * *", "2026-01-31T00:00:00Z", ["2026-03-31 00:00", "2026-05-31 00:00"]),
        ("0 0 29 2 *", "2096-03-01T00:00:00Z", ["2104-02-29 00:00"]),
        (" 0\t0 1  1 * ", "2026-01-01T00:00:00Z", ["2027-01-01 00:00"]),
        ("@hourly", "2026-01-01T10:00:00Z", ["2026-01-01 11:00"]),
        ("@daily", "2026-01-01T10:00:00Z", ["2026-01-02 00:00"]),
        ("@weekly", "2026-01-01T10:00:00Z", ["2026-01-04 00:00"]),
        ("@monthly", "2026-01-01T00:00:00Z", ["2026-02-01 00:00"]),
        ("@yearly", "2026-01-01T00:00:00Z", ["2027-01-01 00:00"]),
    ],
)
def test_instants_follow_one_another(text: str, after: str, expected: list[str]) -> None:
    assert instants(text, after, len(expected)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # The 13th or a Friday; 2026-02-13 is both.
        ("0 0 13 * FRI", ["2026-02-06 00:00", "2026-02-13 00:00", "2026-02-20 00:00"]),
        # A stepped star restricts: odd days of the month or Mondays.
        ("0 0 */2 * 1", ["2026-02-02 00:00", "2026-02-03 00:00", "2026-02-05 00:00"]),
        ("0 0 10 * */6", ["2026-02-07 00:00", "2026-02-08 00:00", "2026-02-10 00:00"]),
        # A step of one doesn't, and neither does a star in a list.
        ("0 0 */1 * 1", ["2026-02-02 00:00", "2026-02-09 00:00"]),
        ("0 0 5,* * 1", ["2026-02-02 00:00", "2026-02-09 00:00"]),
        # That day of February doesn't exist, its Mondays do.
        ("0 0 31 2 MON", ["2026-02-02 00:00", "2026-02-09 00:00"]),
    ],
)
def test_where_both_day_fields_are_restricted_either_one_matches(text: str, expected: list[str]) -> None:
    assert instants(text, "2026-02-01T00:00:00Z", len(expected)) == expected


def test_an_instant_is_strictly_after_the_moment_whatever_its_fraction_and_offset() -> None:
    daily = parse_cron("@daily")
    midnight = datetime(2026, 1, 1, tzinfo=UTC)
    microsecond = timedelta(microseconds=1)

    assert daily.next_after(midnight - microsecond) == midnight
    assert daily.next_after(midnight) == midnight + timedelta(days=1)
    assert daily.next_after(midnight + microsecond) == midnight + timedelta(days=1)
    west = datetime(2025, 12, 31, 20, tzinfo=timezone(timedelta(hours=-5)))  # 01:00 of the next day in UTC
    assert daily.next_after(west) == midnight + timedelta(days=1)
    assert daily.next_after(west).tzinfo is UTC


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "*", "* * * *", "0 * * * * *", "0 0 1 * * 2026", "@midnight", "@annually", "@every 1h", "@Daily",
        "@reboot", "TZ=UTC 0 9 * * 1", "CRON_TZ=UTC 0 9 * * 1", "60 * * * *", "* 24 * * *", "* * 0 * *", "* * 32 * *",
        "* * * 0 *", "* * * 13 *", "0 0 * * 7", "0 0 * * 5-7", "0 0 * * 1,7", "0 0 * * FRI-SUN", "0 0 * * 0-7",
        "0 0 L * *", "0 0 LW * *", "0 0 15W * *", "0 0 * * 5L", "0 0 * * FRI#2", "0 0 * * 5#2", "-1 * * * *",
        "5-1 * * * *", "*/0 * * * *", "1/0 * * * *", "*/-5 * * * *", "*/ * * * *", "/5 * * * *", "1- * * * *",
        "1,,2 * * * *", ",1 * * * *", "1, * * * *", "*-5 * * * *", "** * * * *", "1-5-7 * * * *", "1/2/3 * * * *",
        "1.5 * * * *", "1e1 * * * *", "0x1 * * * *", "+1 * * * *", "\u0661 * * * *", "\u00b2 * * * *", "JAN * * * *",
        "0 0 * MON *", "0 0 * * JAN", "0 0 * * MONDAY", "0 0 * January *", "H * * * *", "~ * * * *",
        "9" * 40 + " * * * *", "*/99999 * * * *",
    ],
)  # fmt: skip
def test_what_the_dialect_does_not_have_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r".{10}"):
        parse_cron(text)


@pytest.mark.parametrize("text", ["0 0 31 2 *", "0 0 30,31 2 ?", "0 0 31 4,6,9,11 *", "0 0 30-31 FEB */1"])
def test_what_never_fires_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="never fires"):
        parse_cron(text)


def test_an_expression_has_a_longest_length() -> None:
    minutes = ",".join(["0"] * 123)
    assert len(minutes) + len(" * * * *") == MAX_TEXT_LENGTH - 2
    parse_cron(f"{minutes} * * * * ")

    with pytest.raises(ValueError, match="at most"):
        parse_cron(f"{minutes},0,0 * * * *")


@given(st.text(alphabet="0123456789*/-,?@LW#MONJAdaily ", max_size=24))
def test_any_text_is_refused_or_fires_within_eight_years(text: str) -> None:
    after = datetime(2096, 2, 29, 12, 30, tzinfo=UTC)
    try:
        cron = parse_cron(text)
    except ValueError:
        return
    assert after < cron.next_after(after) < after + timedelta(days=8 * 366)


@st.composite
def part(draw: st.DrawFn, lowest: int, highest: int) -> tuple[str, set[int], bool]:
    """A field's text, what it admits, and whether it is restricted."""
    kind = draw(st.sampled_from(["star", "step", "list", "range"]))
    if kind == "star":
        return "*", set(range(lowest, highest + 1)), False
    if kind == "step":
        step = draw(st.integers(2, highest))
        return f"*/{step}", set(range(lowest, highest + 1, step)), True
    if kind == "list":
        values = draw(st.sets(st.integers(lowest, highest), min_size=1, max_size=4))
        return ",".join(map(str, values)), values, True
    first, last = sorted(draw(st.tuples(st.integers(lowest, highest), st.integers(lowest, highest))))
    return f"{first}-{last}", set(range(first, last + 1)), True


@given(
    st.tuples(part(0, 59), part(0, 23), part(1, 31), part(1, 12), part(0, 6)),
    st.integers(0, 110 * 366 * 86_400).map(lambda seconds: datetime(2000, 1, 1, tzinfo=UTC) + timedelta(0, seconds)),
)
def test_the_next_instant_is_the_first_one_that_matches(
    parts: tuple[tuple[str, set[int], bool], ...], after: datetime
) -> None:
    minutes, hours, days, months, weekdays = parts

    def is_due(day: date) -> bool:
        by_day, by_weekday = day.day in days[1], day.isoweekday() % 7 in weekdays[1]
        either = days[2] and weekdays[2]
        return day.month in months[1] and (by_day or by_weekday if either else by_day and by_weekday)

    def reference() -> datetime | None:
        times = [(hour, minute) for hour in sorted(hours[1]) for minute in sorted(minutes[1])]
        for offset in range(8 * 366):
            day = (after + timedelta(days=offset)).date()
            for hour, minute in times if is_due(day) else ():
                found = datetime(day.year, day.month, day.day, hour, minute, tzinfo=UTC)
                if found > after:
                    return found
        return None

    expected = reference()
    text = " ".join(text for text, _, _ in parts)
    if expected is None:
        with pytest.raises(ValueError, match="never fires"):
            parse_cron(text)
    else:
        assert parse_cron(text).next_after(after) == expected


def test_a_schedule_can_be_walked_for_years() -> None:
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    found = [moment := parse_cron("0 0 1 * *").next_after(moment) for _ in range(600)]

    assert found[-1] == datetime(2076, 1, 1, tzinfo=UTC)
    assert all(earlier < later for earlier, later in pairwise(found))
