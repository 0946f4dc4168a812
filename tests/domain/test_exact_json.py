"""Bodies are parsed exactly, and what can't be kept is refused by name. Contract: README.md "Money"."""

import json
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from db.json import dumps
from domain import exact_json

values = st.recursive(
    st.none() | st.booleans() | st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abc", max_size=3), inner, max_size=4),
    max_leaves=20,
)


@pytest.mark.parametrize(
    "number", ["1", "-0", "1.50", "105.00", "0.1", "1E+2", "12345678901234567890.123456789012345678"]
)
def test_a_number_comes_back_digit_by_digit(number: str) -> None:
    parsed = exact_json.loads(f'{{"n":{number}}}')
    assert dumps(parsed) == f'{{"n":{number}}}'.encode()


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b'{"a":', "body"),
        (b"", "body"),
        (b"\xff", "body"),
        (b'{"a":NaN}', "a"),
        (b'{"a":{"b":[1,Infinity]}}', "a.b[1]"),
        (b'{"a":-Infinity}', "a"),
        (b'{"a":1,"a":2}', "a"),
        (b'{"x":[{"a":1,"a":2}]}', "x[0].a"),
        (b'{"a":"\\u0000"}', "a"),
        (b'{"a":"\\ud800"}', "a"),
        (b'{"\\u0000":1}', "body"),
        (b'{"a":' + b"1" * 41 + b"}", "a"),
        (b'{"a":1e65}', "a"),
        (b'{"a":1e-65}', "a"),
        (b'{"a":1e99999999999}', "a"),
        (b"[" * 100_000, "body"),
        (b"[" * 65 + b"]" * 65, "body"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_name(body: bytes, field: str) -> None:
    with pytest.raises(exact_json.JsonError) as error:
        exact_json.loads(body)
    assert error.value.field == field


@given(values)
def test_everything_else_is_what_json_says_it_is(value: Any) -> None:
    assert exact_json.loads(json.dumps(value)) == value


def test_64_levels_are_taken() -> None:
    assert exact_json.depth(exact_json.loads("[" * 64 + "]" * 64)) == 64


def test_depth_counts_containers_and_survives_any_nesting() -> None:
    nested: Any = 1
    for _ in range(100_000):
        nested = [nested]
    assert exact_json.depth(nested) == 100_000
    assert exact_json.depth({"a": Decimal(1)}) == 1
    assert exact_json.depth("x") == 0
