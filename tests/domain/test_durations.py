"""Durations as Go writes them. Goal: accept what Go's time.ParseDuration accepts, refuse the rest, lose nothing."""

from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.durations import format_duration, parse_duration


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("24h", timedelta(hours=24)),
        ("720h", timedelta(days=30)),
        ("8760h", timedelta(days=365)),
        ("1h30m", timedelta(minutes=90)),
        ("1.5h", timedelta(minutes=90)),
        ("300ms", timedelta(milliseconds=300)),
        ("1h0m0.5s", timedelta(hours=1, milliseconds=500)),
        ("-1.5h", timedelta(minutes=-90)),
        ("+5s", timedelta(seconds=5)),
        ("0", timedelta(0)),
        ("0s", timedelta(0)),
        (".5s", timedelta(milliseconds=500)),
        ("1.s", timedelta(seconds=1)),
        ("2us", timedelta(microseconds=2)),
        ("2\u00b5s", timedelta(microseconds=2)),
        ("1500ns", timedelta(microseconds=1)),
        ("-1500ns", timedelta(microseconds=-1)),
        ("1m1h", timedelta(minutes=61)),
    ],
)
def test_go_durations_are_read(text: str, expected: timedelta) -> None:
    assert parse_duration(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", " ", "24", "h", "1d", "1h ", " 1h", "1 h", "--1h", "+-1h", "1H", ".h", ".", "1e3s", "1,5h", "\u0661h", "1hh",
     "0x1h", "9999999999h", "1" * 60 + "h", "1h" * 1_000, "-", "1h-30m", "P1D", "NaNs"],
)  # fmt: skip
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="duration"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("duration", "text"),
    [
        (timedelta(days=30), "720h"),
        (timedelta(minutes=90), "1h30m"),
        (timedelta(seconds=90.5), "1m30.5s"),
        (timedelta(milliseconds=300), "300ms"),
        (timedelta(microseconds=1500), "1.5ms"),
        (timedelta(microseconds=7), "7us"),
        (timedelta(0), "0s"),
        (timedelta(hours=-1), "-1h"),
        (timedelta(hours=1, microseconds=1), "1h0.000001s"),
    ],
)
def test_durations_are_written_as_short_as_possible(duration: timedelta, text: str) -> None:
    assert format_duration(duration) == text


@given(st.timedeltas(min_value=timedelta(days=-100_000), max_value=timedelta(days=100_000)))
def test_what_is_written_reads_back_unchanged(duration: timedelta) -> None:
    assert parse_duration(format_duration(duration)) == duration
