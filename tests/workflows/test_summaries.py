"""What operators read in Temporal's UI is cut to what Temporal takes, whatever a program is called."""

import pytest
from temporalio.contrib.pydantic import pydantic_data_converter

from workflows.summaries import SUMMARY_BYTES, summary

TEMPORAL_TAKES_BYTES = 400


def test_a_short_summary_stays_as_it_is() -> None:
    assert summary("Events of Café Zoë") == "Events of Café Zoë"


def test_a_long_one_is_cut_between_two_characters() -> None:
    assert summary("x" * 1_000) == "x" * SUMMARY_BYTES
    assert summary("a" + "\U0001f600" * 255) == "a" + "\U0001f600" * 44


def test_it_is_one_line() -> None:
    assert summary("one\ntwo\tthree\x01") == "one two three "


@pytest.mark.parametrize("character", ["x", "é", "\U0001f600", '"', "\\", "\n", "\x01", "\x7f", "\u2028"])
async def test_temporal_takes_it_whatever_it_is_made_of(character: str) -> None:
    (payload,) = await pydantic_data_converter.encode([summary(character * 255)])

    assert payload.ByteSize() <= TEMPORAL_TAKES_BYTES
