"""The language of conditions and amounts. Goal: every sentence of rules-and-events.md 6 that can be observed.

Method: the worked examples of the contract first, then rule by rule, as tables of expression and value.
"""

import threading
from datetime import timedelta
from decimal import Decimal
from typing import Any

import pytest

from domain.rules.cel import (
    EvaluationError,
    Expression,
    ExpressionError,
    MissingField,
    compile_expression,
    evaluate_condition,
)
from tests.domain.rules.cel_data import NOW, activation, evaluate, failure

PURCHASE = {"type": "purchase", "amount": Decimal("105.00"), "mcc": "5812"}


# --- The contract's worked examples (section 9) ---


@pytest.mark.parametrize(("amount", "matches"), [("105.00", True), ("100", True), ("99.99", False)])
def test_examples_1_and_2_a_purchase_of_at_least_100(amount: str, matches: bool) -> None:
    condition = compile_expression("event.type == 'purchase' && event.amount >= 100.0")
    event = {"type": "purchase", "amount": Decimal(amount)}
    assert evaluate_condition(condition, activation(event)) is matches


def test_example_3_amount_times_an_integer() -> None:
    event = {"type": "purchase", "amount": Decimal(75)}
    assert evaluate("event.type == 'purchase' && event.amount > 0", event) is True
    assert evaluate("event.amount * 10", event) == Decimal(750)


def test_example_5_and_6_tags_are_tested_in_lower_case() -> None:
    assert evaluate("event.type == 'signup' && !('welcome_bonus' in participant.tags)", {"type": "signup"}) is True
    assert evaluate('"vip" in participant.tags') is True
    assert evaluate('"VIP" in participant.tags') is False


def test_examples_11_and_12_a_missing_field_is_an_error_and_has_is_not() -> None:
    error = failure('event.coupon_code == "X"', PURCHASE)
    assert isinstance(error, MissingField)
    assert str(error) == "no such field: coupon_code"
    assert evaluate('has(event.coupon_code) && event.coupon_code == "X"', PURCHASE) is False


def test_example_13_now_is_the_event_time() -> None:
    assert evaluate('now < timestamp("2025-02-01T00:00:00Z")') is True
    assert evaluate("now() == now") is True


def test_example_18_points_per_unit() -> None:
    assert evaluate("event.amount * 3", {"amount": Decimal("150.00"), "mcc": "5812"}) == 450


def test_example_20_a_numeric_string_needs_double() -> None:
    event = {"amount": "60"}
    assert str(failure("event.amount > 50.0", event)) == "no such overload: string > number"
    assert evaluate("double(event.amount) > 50.0", event) is True


def test_example_21_sets() -> None:
    assert evaluate('sets.contains(["vip","gold"],["vip","gold"])') is True
    assert evaluate('sets.intersects(["vip"],["vip","silver"])') is True
    assert evaluate('sets.contains(["vip"],["vip","gold"])') is False


def test_counter_reset_from_5_11() -> None:
    assert evaluate('-get(participant.counters, "monthly_spend", 0.0)') == Decimal("-12.50")


# --- Numbers ---


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("0.1 * 3", "0.3"),
        ("7 / 2", "3.5"),
        ("1 / 3", "0.33333333333333333333333333333333333333333333333333"),
        ("1 + 2.5", "3.5"),
        ("event.quantity * 5.0", "15.0"),
        ("event.amount * 10", "1050.00"),
        ("event.amount - 1", "104.00"),
        ("60 * 60 * 24 - 1 + 2", "86401"),
        ("7 % 3", "1"),
        ("-7 % 3", "-1"),
        ("7.5 % 2", "1.5"),
        ("-(2 - 5)", "3"),
        ("--2", "2"),
        ("event.amount -1", "104"),
        ("0x1F", "31"),
        ("10u", "10"),
        ("1.5e3", "1500"),
        (".5 + 1.", "1.5"),
        ("12345678901234567890.123456789 * 98765432109876543210.987654321", None),
    ],
)
def test_arithmetic_is_exact_and_mixes_int_and_double(source: str, expected: str | None) -> None:
    event = {"quantity": Decimal(3), "amount": Decimal("105.00")}
    if expected is None:
        # 2121932631... has 58 digits: 28 would have been the thread's default context.
        product = evaluate(source)
        assert len(product.as_tuple().digits) == 58
        assert int(product * 0) == 0
        return
    assert evaluate(source, event) == Decimal(expected)


@pytest.mark.parametrize(
    "source",
    [
        "1 < 2.5",
        "2 == 2.0",
        "2.0 in [1, 2]",
        "event.n >= 3.0",
        "event.n != 3.5",
        "3 in event.list",
        "[1.0, 2] == [1, 2.0]",
    ],
)
def test_comparison_mixes_int_and_double(source: str) -> None:
    assert evaluate(source, {"n": Decimal(3), "list": [Decimal("3.00")]}) is True


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("round(0.125, 2)", "0.13"),
        ("round(-0.125, 2)", "-0.13"),
        ("round(2.5)", "3"),
        ("round(-2.5)", "-3"),
        ("round(2.4999999999999999999999)", "2"),
        ("round(1.005, 2)", "1.01"),
        ("round(1.5, 3)", "1.5"),
        ("round(1250, -2)", "1300"),
        ("round(-0.4)", "0"),
        ("round(0.20 * 0.01, 2)", "0"),
        ("round(100 / 3, 2)", "33.33"),
        ("floor(-1.55, 1)", "-1.6"),
        ("floor(12345, -2)", "12300"),
        ("ceil(-1.55, 1)", "-1.5"),
        ("ceil(12345, -2)", "12400"),
        ("math.least([3, 1.5])", "1.5"),
        ("dyn(2.5) + 1", "3.5"),
        ("floor(2.7)", "2"),
        ("floor(-0.5)", "-1"),
        ("floor(2.789, 2)", "2.78"),
        ("ceil(2.1)", "3"),
        ("ceil(-0.5)", "0"),
        ("ceil(2.781, 2)", "2.79"),
        ("abs(-3.5)", "3.5"),
        ("min(3, 1.5, 2)", "1.5"),
        ("max(3, 1.5)", "3"),
        ("max([1, 4, 2])", "4"),
        ("math.greatest(1, 2.5, 2)", "2.5"),
        ("math.least(4)", "4"),
        ('double("49.99")', "49.99"),
        ("int(2.9)", "2"),
        ("int(-2.9)", "-2"),
        ('int("42")', "42"),
        ('size("abc") + [1, 2].size()', "5"),
    ],
)
def test_rounding_and_number_functions(source: str, expected: str) -> None:
    value = evaluate(source)
    assert value == Decimal(expected)
    assert not (value == 0 and value.is_signed()), "never -0"


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("string(99.0)", "99"),
        ("string(99.50)", "99.5"),
        ("string(1e3)", "1000"),
        ("string(-0.0)", "0"),
        ("string(0.000001)", "0.000001"),
        ("string(12345678901234567890123456789012345.5)", "12345678901234567890123456789012345.5"),
        ("string(true)", "true"),
        ("string(now)", "2025-01-15T10:30:00Z"),
        ('string(duration("1h30m"))', "5400s"),
        ('string(duration("1500ms"))', "1.5s"),
        ('"ref-" + string(event.n)', "ref-7"),
    ],
)
def test_string_prints_plainly(source: str, text: str) -> None:
    assert evaluate(source, {"n": Decimal("7.00")}) == text


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("1 / 0", "division by zero"),
        ("0 / 0", "division by zero"),
        ("1 % 0", "division by zero"),
        ("(1.0 / 3) * (1.0 / 3)", "result needs more than 80 digits: round() it on the way"),
        ("1e40 * 1e40 + 0.1", "result needs more than 80 digits: round() it on the way"),
        ("1e999 * 10", "number out of range: more than 80 digits or an exponent beyond 999"),
        ('double("NaN")', 'not a number: "NaN"'),
        ('double("Infinity")', 'not a number: "Infinity"'),
        ('double("1_000")', 'not a number: "1_000"'),
        ('double(" 1")', 'not a number: " 1"'),
        ('double("")', 'not a number: ""'),
        ('double("\u0661")', 'not a number: "\u0661"'),
        ('int("4.2")', "not an integer"),
        ("double(true)", "no such overload: double(bool)"),
        ("event.list[0.5]", "list index must be a whole number"),
        ("event.list[2]", "index out of bounds: 2"),
        ("event.list[-1]", "index out of bounds: -1"),
        ("round(1.5, 0.5)", "number of decimals must be a whole number"),
        ("max([])", "max of an empty list"),
        ('max(1, "2")', "no such overload: max(string)"),
    ],
)
def test_number_errors(source: str, cause: str) -> None:
    assert str(failure(source, {"list": ["a", "b"]})) == cause


def test_a_list_index_may_be_any_integral_number() -> None:
    assert evaluate("event.list[1.0] + event.list[event.n]", {"list": ["a", "b"], "n": Decimal("0.0")}) == "ba"


def test_the_context_of_the_thread_is_neither_used_nor_changed() -> None:
    import decimal

    with decimal.localcontext(prec=3) as context:
        context.clear_flags()
        assert evaluate("1.23456789 + 1") == Decimal("2.23456789")
        assert evaluate("round(1.23456789, 7)") == Decimal("1.2345679")
        assert not decimal.getcontext().flags[decimal.Inexact]


# --- Types, equality, errors ---


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("true == 1", False),
        ("false == 0", False),
        ("true in [1]", False),
        ("1 in [true]", False),
        ("[true] == [1]", False),
        ('{"a": true} == {"a": 1}', False),
        ("event.text == 60", False),
        ('60 in ["60"]', False),
        ("event.text in [60, 61]", False),
        ('event.text in ["60"]', True),
        ("event.none == null", True),
        ('event.none == ""', False),
        ('{"a": [1, {"b": 2.0}]} == {"a": [1.0, {"b": 2}]}', True),
        ('{1: "one"}[1.0] == "one"', True),
        ("true in {1: 2}", False),
        ('"a" in {"a": 1}', True),
        ('type(1) == int && type(1.5) == double && type("") == string && type(true) == bool', True),
        ("type(now) == google.protobuf.Timestamp && type(now) == timestamp && type(null) == null_type", True),
        ("type([]) == list && type({}) == map && type(type(1)) == type", True),
        ("true > false", True),
        ('"a" < "b"', True),
    ],
)
def test_equality_never_crosses_types(source: str, expected: bool) -> None:
    assert evaluate(source, {"text": "60", "none": None}) is expected


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("event.text + 1", "no such overload: string + number"),
        ("1 - event.text", "no such overload: number - string"),
        ("event.text * 2", "no such overload: string * number"),
        ("true < 1", "no such overload: bool < number"),
        ("null < 1", "no such overload: null < number"),
        ("[1] < [2]", "no such overload: list < list"),
        ("!event.text", "no such overload: !string"),
        ("-event.text", "no such overload: -string"),
        ("event.text && true", "no such overload: && needs a bool, not string"),
        ("event.text ? 1 : 2", "no such overload: ?: needs a bool, not string"),
        ("event.text.field", "no such overload: string.field"),
        ("event.text[0]", "no such overload: string[number]"),
        ("1 in event.text", "no such overload: number in string"),
        ("event.text.exists(x, true)", "no such overload: a macro over a string"),
        ("[1].exists(x, x)", "no such overload: exists needs a bool, not number"),
        ("size(1)", "no such overload: size(number)"),
        ("1.5.size()", "no such overload: size(number)"),
        ('get(event.text, "a", 1)', "no such overload: get(string, string, number)"),
        ('bool("yes")', "not a bool: use true or false"),
        ('{"a": 1, "a": 2}', "duplicate key in a map"),
        ("{true: 1, 1: 2}", "duplicate key in a map"),
        ("{null: 1}", "a map key cannot be a null"),
        ("{[1]: 1}", "a map key cannot be a list"),
    ],
)
def test_type_errors_name_the_types(source: str, cause: str) -> None:
    error = failure(source, {"text": "60"})
    assert str(error) == cause
    assert not isinstance(error, MissingField)


@pytest.mark.parametrize(
    ("source", "missing"),
    [
        ("event.coupon", "no such field: coupon"),
        ('event["coupon"]', "no such field: coupon"),
        ("event.address.city", "no such field: address"),
        ("event.none.city", "no such field: city"),
        ("participant.counters.unknown + 1", "no such field: unknown"),
        ("participant.tiers.status.level", "no such field: status"),
        ("participant.foo", "no such field: foo"),
        ("group.id", "no such variable here: group"),
        ('!(event.coupon == "x")', "no such field: coupon"),
        ("event.coupon ? 1 : 2", "no such field: coupon"),
        ("[event.coupon]", "no such field: coupon"),
        ("get(event.coupons, 'a', 1)", "no such field: coupons"),
    ],
)
def test_a_missing_field_is_a_missing_field(source: str, missing: str) -> None:
    error = failure(source, {"none": None})
    assert isinstance(error, MissingField)
    assert str(error) == missing


def test_without_a_participant_reading_it_is_a_missing_field() -> None:
    error = failure('"vip" in participant.tags', participant=None)
    assert isinstance(error, MissingField)
    assert str(error) == "no such variable here: participant"
    assert evaluate("has(participant.tags)", participant=None) is False
    assert evaluate("true || participant.id == 'x'", participant=None) is True


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("has(event.a)", True),
        ("has(event.none)", True),
        ("has(event.x)", False),
        ("has(event.a.b)", True),
        ("has(event.a.x)", False),
        ("has(event.x.y.z)", False),
        ("has(event.none.x)", False),
        ("!has(event.x)", True),
        ("has(event.list[0].sku)", True),
        ("has(event.list[0].x)", False),
        ("has(event.list[7].x)", False),
        ('has(event.x["y"].z)', False),
        ("has(participant.counters.monthly_spend)", True),
        ("has(participant.tiers.loyalty)", True),
        ("has({'a': 1}.a)", True),
    ],
)
def test_has_is_a_presence_test_that_looks_through_absent_parents(source: str, expected: bool) -> None:
    event = {"a": {"b": Decimal(1)}, "none": None, "list": [{"sku": "s"}]}
    assert evaluate(source, event) is expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("event.missing || true", True),
        ("true || event.missing", True),
        ("event.missing && false", False),
        ("false && event.missing", False),
        ("event.missing && event.other && false", False),
        ("event.missing == 1 || 1 / 0 == 1 || true", True),
        ("(event.missing && true) && false", False),
        ("1 && false", False),
        ('"a" || true', True),
        ("true ? 1 : event.missing", Decimal(1)),
        ("false ? event.missing : 2", Decimal(2)),
        ("[1, 2].exists(x, x == 2 || event.missing)", True),
        ("[event.text, 2].exists(x, x > 1)", True),
        ("[event.text, 0].all(x, x > 1)", False),
    ],
)
def test_logic_absorbs_errors_as_standard_cel_does(source: str, expected: Any) -> None:
    assert evaluate(source, {"text": "t"}) == expected


@pytest.mark.parametrize(
    "source",
    [
        "event.missing || false",
        "event.missing && true",
        "true && event.missing",
        "false || event.missing",
        "[1, 2].all(x, x > 0 && event.missing)",
        "[1, 2].exists(x, x > 5 || event.missing)",
        "[1].map(x, event.missing)",
        "[1].filter(x, event.missing)",
        "[1].exists_one(x, event.missing)",
    ],
)
def test_an_error_that_remains_is_raised(source: str) -> None:
    assert isinstance(failure(source), MissingField)


def test_the_first_error_is_the_one_reported() -> None:
    assert str(failure("event.a && event.b && true")) == "no such field: a"


def test_a_condition_must_give_a_bool() -> None:
    with pytest.raises(EvaluationError, match="condition must give a bool, not number"):
        evaluate_condition(compile_expression("1 + 1"), activation())


# --- Collections, strings, time ---


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("event.items[0].sku", "a"),
        ('event.items.exists(i, i.sku == "b" && i.price > 4)', True),
        ("event.items.all(i, i.price > 4)", False),
        ("event.items.exists_one(i, i.price > 4)", True),
        ("event.items.exists_one(i, i.price > 0)", False),
        ("event.items.map(i, i.sku)", ["a", "b"]),
        ("event.items.map(i, i.price > 4, i.sku)", ["b"]),
        ("event.items.filter(i, i.price > 4).size()", Decimal(1)),
        ("[].all(x, false)", True),
        ("[].exists(x, true)", False),
        ('{"a": 1, "b": 2}.exists(k, k == "b")', True),
        ("participant.counters.map(k, participant.counters[k])", [Decimal("12.50")]),
        ("[1, 2].map(x, [3, 4].map(y, x * y))", [[Decimal(3), Decimal(4)], [Decimal(6), Decimal(8)]]),
        ("[1, 2].map(x, [x].map(x, x + 1)[0] + x)", [Decimal(3), Decimal(5)]),
        ("[1].map(event, event + 1)", [Decimal(2)]),
        ("[1] + [2]", [Decimal(1), Decimal(2)]),
        ('get(event, "nothing", "d")', "d"),
        ('get(event.none, "nothing", "d")', "d"),
        ('get(get(event, "nothing", {}), "below", "d")', "d"),
        ("sets.equivalent([1, 2, 2], [2, 1])", True),
        ("sets.contains([[1], [2]], [[2]])", True),
        ("sets.intersects([], [])", False),
        ('{"5812": 5, "5411": 3}[event.mcc]', Decimal(5)),
        ('participant.tiers.loyalty.level == "gold" && participant.tiers.loyalty.rank >= 2', True),
        ('"launch" in program.tags && program.counters.issued == 7', True),
        ("groups.size() == 0 && !groups.exists(g, 'x' in g.tags)", True),
    ],
)
def test_collections(source: str, expected: Any) -> None:
    items = [{"sku": "a", "price": Decimal(3)}, {"sku": "b", "price": Decimal(5)}]
    assert evaluate(source, {"items": items, "mcc": "5812", "none": None}) == expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ('"abc".contains("b")', True),
        ('"abc".startsWith("ab") && "abc".endsWith("bc")', True),
        ('"order-123".matches("^order-[0-9]+$")', True),
        ('matches("abc", "b")', True),
        ('"ÄbC".lowerAscii()', "Äbc"),
        ('"äbc".upperAscii()', "äBC"),
        ('"  a ".trim()', "a"),
        (r'" \u00a0\u2003a\u001f".trim()', "a\x1f"),
        ('"a,b".split(",", 1)', ["a,b"]),
        ('"a,b".split(",", -1)', ["a", "b"]),
        ('"aaa".replace("a", "b", 0)', "aaa"),
        ('"abc".substring(3)', ""),
        ('"a,b,c".split(",")', ["a", "b", "c"]),
        ('"a,b,c".split(",", 2)', ["a", "b,c"]),
        ('"a,b".split(",", 0)', []),
        ('"abc".split("")', ["a", "b", "c"]),
        ('"".split("")', []),
        ('"".split(",")', [""]),
        ('"aaa".replace("a", "b")', "bbb"),
        ('"aaa".replace("a", "b", 2)', "bba"),
        ('"ab".replace("", "-")', "-a-b-"),
        ('"hello".substring(1)', "ello"),
        ('"hello".substring(1, 3)', "el"),
        ('"héllo".size()', Decimal(5)),
        (r'"a\"b\\\n\u00e9\x41\101"', 'a"b\\\né' + "AA"),
        (r"r'a\d'", r"a\d"),
        ("'''line\n\"quoted\"'''", 'line\n"quoted"'),
        ("'it' + \"'s\" // and a comment", "it's"),
    ],
)
def test_strings(source: str, expected: Any) -> None:
    assert evaluate(source) == expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ('timestamp("2026-09-01") == timestamp("2026-09-01T00:00:00Z")', True),
        ('timestamp("2026-09-01T02:00:00+02:00") == timestamp("2026-09-01")', True),
        ('timestamp("2026-09-01T00:00:00.123456789Z") > timestamp("2026-09-01")', True),
        ("timestamp(0).getFullYear()", Decimal(1970)),
        ("int(timestamp('1970-01-02'))", Decimal(86400)),
        ('now - timestamp("2025-01-01") > days(14)', True),
        ('now - timestamp(event.enrolled) < duration("720h")', True),
        ("now + hours(24) - days(1) == now", True),
        ('duration("1h") + now > now', True),
        ('duration("1h30m") == hours(1.5)', True),
        ('duration("90m") - hours(1) == duration("30m")', True),
        ("now.getFullYear()", Decimal(2025)),
        ("now.getMonth()", Decimal(0)),
        ("now.getDate()", Decimal(15)),
        ("now.getDayOfMonth()", Decimal(14)),
        ("now.getDayOfWeek()", Decimal(3)),
        ("now.getDayOfYear()", Decimal(14)),
        ("now.getHours()", Decimal(10)),
        ("now.getMinutes()", Decimal(30)),
        ('now.getHours("America/New_York")', Decimal(5)),
        ('now.getHours("Asia/Kolkata")', Decimal(16)),
        ('now.getHours("-11:00")', Decimal(23)),
        ('now.getDate("-11:00")', Decimal(14)),
        ('timestamp("2025-07-15T10:30:00Z").getHours("America/New_York")', Decimal(6)),
        ('timestamp("2025-01-19").getDayOfWeek()', Decimal(0)),
        ('duration("90m").getHours()', Decimal(1)),
        ('duration("-90m").getMinutes()', Decimal(-90)),
        ('duration("61.5s").getMilliseconds()', Decimal(500)),
        ('now.getHours("UTC") == now.getHours() && now.getHours("Etc/GMT+5") == 5', True),
        ('now.getMinutes("+05:45")', Decimal(15)),
        ('now.getMinutes("05:45")', Decimal(15)),
        ('timestamp("2025-03-30T00:59:59Z").getHours("Europe/Berlin")', Decimal(1)),
        ('timestamp("2025-03-30T01:00:00Z").getHours("Europe/Berlin")', Decimal(3)),
        ('timestamp("2024-12-31T23:30:00Z").getFullYear("Asia/Tokyo")', Decimal(2025)),
        ('timestamp("2024-12-31T23:30:00Z").getMonth("Asia/Tokyo")', Decimal(0)),
        ('timestamp("2024-12-31T23:30:00Z").getDayOfWeek("Asia/Tokyo")', Decimal(3)),
        ("timestamp('2026-09-01t00:00:00z') == timestamp('2026-09-01')", True),
        ("timestamp(now) == now && timestamp(int(now)) == now", True),
        ("now().getHours() == 10", True),
        ("[5].map(now, now() - now() == duration('0'))[0]", True),
        ('duration("-1h30m") + hours(1.5) == duration("0s")', True),
        ('duration("1h") == duration("3600s") && duration("1ms") == duration("1000us")', True),
        ("days(1.5) == hours(36) && days(-1) < hours(0)", True),
    ],
)
def test_time(source: str, expected: Any) -> None:
    assert evaluate(source, {"enrolled": "2025-01-01"}) == expected


def test_times_leave_as_python_values() -> None:
    assert evaluate("now + duration('1h')") == NOW + timedelta(hours=1)
    assert evaluate("days(2)") == timedelta(days=2)


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ('timestamp("yesterday")', 'not a timestamp: use "2026-09-01T00:00:00Z" or "2026-09-01"'),
        ('timestamp("2026-02-30")', "timestamp out of range"),
        ('timestamp("2026-09-01T00:00:00")', 'not a timestamp: use "2026-09-01T00:00:00Z" or "2026-09-01"'),
        ('timestamp("9999-12-31T23:59:59-10:00")', "timestamp out of range"),
        ("timestamp(1e30)", "timestamp out of range"),
        ("now + days(9999999)", "timestamp or duration out of range"),
        ("days(1e900)", "duration out of range"),
        ('now.getHours("Mars/Olympus")', 'unknown time zone: use "Europe/Berlin" or "+02:00"'),
        ("now + now", "no such overload: timestamp + timestamp"),
        ("now - 1", "no such overload: timestamp - number"),
        ("now < 1", "no such overload: timestamp < number"),
        ("event.getHours()", "no such overload: getHours(map)"),
    ],
)
def test_time_errors(source: str, cause: str) -> None:
    assert str(failure(source)) == cause


# --- Compiling ---


@pytest.mark.parametrize(
    ("source", "message", "column", "hint"),
    [
        # Operators of other languages.
        ('event.type = "x"', "unexpected '='", 12, "did you mean ==? use == to compare"),
        ('event.type === "x"', "unexpected '='", 14, "use =="),
        ('event.type !== "x"', "unexpected '='", 14, "use !="),
        ("event.a and event.b", "unexpected 'and'", 9, "use &&"),
        ("event.a OR event.b", "unexpected 'OR'", 9, "use ||"),
        ("not event.a", "unexpected 'event'", 5, "use ! for not"),
        ("event.a & event.b", "unexpected '&'", 9, "use &&"),
        ("event.a && && event.b", "unexpected '&&'", 12, "an operand is missing before it"),
        ("event.a <> 1", "unexpected '>'", 10, "use !="),
        ("event.a => 1", "unexpected '='", 9, "use >="),
        ("event.a =< 1", "unexpected '='", 9, "use <="),
        ("event.a += 1", "unexpected '='", 10, "an expression cannot assign"),
        ("event.a ** 2", "unexpected '*'", 10, "there is no power: write x * x"),
        ("event.a is null", "unexpected 'is'", 9, "use =="),
        ('event.name like "a%"', "unexpected 'like'", 12, 'use text.contains(part) or text.matches("pattern")'),
        ('"vip" not in participant.tags', "unexpected 'not'", 7, "use !(x in list)"),
        ("event.a between 1 and 5", "unexpected 'between'", 9, "use a <= x && x <= b"),
        ("if event.a then 1 else 2", "unexpected 'event'", 4, "use condition ? a : b"),
        ("event.a == 1;", "unexpected ';'", 13, "leave it out: an expression is a single value"),
        ("event.a > 1 # big", "unexpected '#'", 13, "a comment begins with //"),
        # Things left out.
        ("event.a ==", "unexpected end of the expression", 11, "an operand is missing after =="),
        ("event.a > 1 ? 2", "unexpected end of the expression", 16, "condition ? a : b needs both values"),
        ("event.a.", "unexpected end of the expression", 9, "a name is missing after ."),
        ("event..a", "unexpected '.'", 7, "a name is missing between the dots"),
        ('event.mcc in ["a" "b"]', "unexpected '\"'", 19, "an operator or a comma is missing before it"),
        ('event.name.contains "a"', "unexpected '\"'", 21, "a method is called with parentheses: text.contains(part)"),
        (
            'event.tags contains "a"',
            "unexpected 'contains'",
            12,
            "a method is called with parentheses: text.contains(part)",
        ),
        ("true false", "unexpected 'false'", 6, "an operator or a comma is missing before it"),
        # Brackets, quotes, numbers.
        ("(1 + 2", "'(' is not closed", 1, "add ')'"),
        ("event.items[0.sku == 1", "'[' is not closed", 12, "add ']'"),
        ("1 + 2)", "unexpected ')'", 6, "no bracket is open here"),
        ("[(1 + 2]", "unexpected ']'", 8, "'(' of line 1, column 2 has to be closed by ')' first"),
        ("[1, 2, ]", "unexpected ']'", 8, "remove the comma before it"),
        ('event.mcc in ("a", "b")', "unexpected ','", 18, 'a list is written in brackets: ["a", "b"]'),
        ("event.a > 1,000", "unexpected ','", 12, "write 1000 or 0.5, without a comma"),
        ("event.a > $5", "unexpected '$'", 11, "leave it out"),
        ("now - 30d", "unexpected 'd'", 9, 'write days(30), hours(12) or duration("90m")'),
        ("now - 30 days", "unexpected 'days'", 10, 'write days(30), hours(12) or duration("90m")'),
        ("now > 2026-01-01T00:00:00Z", "unexpected 'T00'", 17, 'write timestamp("2026-09-01T00:00:00Z")'),
        ("\u201cvip\u201d in participant.tags", "unexpected '\u201c'", 1, 'use straight quotes "'),
        ('event.a == "x', "string is not closed", 12, 'end it with "'),
        ("event.a == 'x", "string is not closed", 12, "end it with '"),
        (r'"\q"', "invalid escape in a string", 2, r"write \\ for a backslash, or use r'...'"),
        ('b"abc"', "bytes literals are not supported", 1, None),
        # Names of fields.
        ("event.`a-b`", "unexpected '`'", 7, 'for such a name write ["..."] instead of the dot'),
        ("event.true", "unexpected 'true'", 7, 'for such a name write ["..."] instead of the dot'),
        ("event.5812", "unexpected '5'", 7, 'for such a name write ["..."] instead of the dot'),
        ("event.prix.\u00e9t\u00e9", "unexpected '\u00e9'", 12, 'for such a name write ["..."] instead of the dot'),
        ("event.first-name", "unknown variable 'name'", 13, 'for a name with a - write event["first-name"]'),
        ("event.amount inevent", "unexpected 'inevent'", 14, "an operator or a comma is missing before it"),
        # Functions and macros.
        ("rond(1.5)", "unknown function 'rond'", 1, "did you mean round?"),
        ("event.name.startswith('a')", "unknown function 'startswith'", 12, "did you mean startsWith?"),
        ("event.items.filtr(x, true)", "unknown function 'filtr'", 13, "did you mean filter?"),
        ("event.items.any(x, x)", "unknown function 'any'", 13, "use list.exists(x, condition)"),
        ("len(event.items)", "unknown function 'len'", 1, "use size(x)"),
        ("event.amount.toString()", "unknown function 'toString'", 14, "use string(x)"),
        ("math.max(1, 2)", "unknown function 'math.max'", 6, "use max(a, b) or math.greatest(a, b)"),
        ("contains('abc', 'b')", "unknown function 'contains'", 1, "call it as x.contains(...)"),
        ("exists(event.items, x, x)", "unknown function 'exists'", 1, "call it as list.exists(x, condition)"),
        ("event.amount.round(2)", "unknown function 'round'", 14, "call it as round(x, n)"),
        ("math.sqrt(4)", "unknown function 'math.sqrt'", 6, None),
        ("event.items.sortBy(x, x)", "unknown function 'sortBy'", 13, None),
        ("round(1, 2, 3)", "round takes 1 to 2 arguments, not 3", 1, "write round(x, n)"),
        ("get(event, 'a')", "get takes 3 arguments, not 2", 1, "write get(map, key, default)"),
        ("now(1)", "unknown function 'now'", 1, "now takes no arguments"),
        ("has(event)", "has() takes one field", 1, 'such as has(event.coupon); for a key use "key" in map'),
        ("[1].all(1, true)", "the first argument of all must be a name", 5, "write list.all(x, condition)"),
        ("[1].exists(x == 1)", "exists takes 2 arguments, not 1", 5, "write list.exists(x, condition)"),
        ("[1].all(x -> x > 1)", "unexpected '>'", 12, "a macro is written list.exists(x, condition)"),
        # Variables.
        ("events.type", "unknown variable 'events'", 1, "did you mean event?"),
        ("particpant.tags", "unknown variable 'particpant'", 1, "did you mean participant?"),
        ("set.contains([1], [1])", "unknown variable 'set'", 1, "did you mean sets?"),
        (
            "amount > 1",
            "unknown variable 'amount'",
            1,
            'payload fields are read as event.amount, texts are quoted: "amount"',
        ),
        ("event.a == None", "unknown variable 'None'", 12, "use null"),
        ("event.a == True", "unknown variable 'True'", 12, "use true"),
        ('"vip" in tags', "unknown variable 'tags'", 10, "use participant.tags"),
        ("round", "unknown variable 'round'", 1, "round is a function"),
        ("[1].all(x, true) && x", "unknown variable 'x'", 21, None),
        ("string", "a type is not a value", 1, "compare it: type(x) == string"),
    ],
)
def test_compile_errors_say_where_and_what_to_do(source: str, message: str, column: int, hint: str | None) -> None:
    with pytest.raises(ExpressionError) as caught:
        compile_expression(source)
    error = caught.value
    assert (error.message, error.line, error.column) == (message, 1, column)
    if hint is not None:
        assert error.hint == hint
        assert str(error) == f"{message} at line 1, column {column}; hint: {hint}"


def test_a_long_name_is_cut_in_the_message() -> None:
    for source in ("x" * 4_000, "x" * 4_000 + "(1)", "event." + "x" * 4_000 + "(1)", "1 " + "x" * 4_000):
        with pytest.raises(ExpressionError) as caught:
            compile_expression(source)
        assert len(str(caught.value)) < 500


def test_every_error_of_syntax_has_a_position() -> None:
    for source in ("true = 1", "event.a true", "true.", "(true", "true ? : 1", "[true true]", "!", "-", "true &&"):
        with pytest.raises(ExpressionError) as caught:
            compile_expression(source)
        assert caught.value.line == 1
        assert caught.value.column is not None


def test_compile_errors_count_lines() -> None:
    with pytest.raises(ExpressionError) as caught:
        compile_expression('event.type == "x" && // the type\n  event.amount = 1')
    assert (caught.value.line, caught.value.column) == (2, 16)


@pytest.mark.parametrize("source", ["", "   ", "gold", "US", "VIP member", "2026-09-01", "#", "a.b.c", "T{a: 1}", "_"])
def test_texts_that_are_no_expression_do_not_compile(source: str) -> None:
    if source == "2026-09-01":
        assert evaluate(source) == Decimal(2016)  # which the grammar cannot tell from a date
        return
    with pytest.raises(ExpressionError):
        compile_expression(source)


def test_names_of_payload_fields_are_not_checked() -> None:
    compile_expression("event.whatever.x.y[0].null_field && event.in_store && event.return && participant.anything")


@pytest.mark.parametrize("merchants", [70, 90])
def test_long_chains_are_not_too_deep(merchants: int) -> None:
    source = " || ".join(f'event.merchant == "merchant-{i}"' for i in range(merchants))
    assert evaluate(source, {"merchant": f"merchant-{merchants - 1}"}) is True
    assert evaluate(source, {"merchant": "other"}) is False


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("||".join(["event.m"] * 450), True),
        ("&&".join(["true"] * 680), True),
        ("+".join(["1"] * 2000), Decimal(2000)),
        ("-".join(["1"] * 2000), Decimal(-1998)),
        ("+".join(["'a'"] * 1000), "a" * 1000),
        ("".join(f'event.n=="{i}"?{i}:' for i in range(200)) + "7", Decimal(7)),
        ("[" + ",".join(["1"] * 2000) + "].size()", Decimal(2000)),
    ],
)
def test_chains_of_hundreds_are_flattened(source: str, expected: Any) -> None:
    assert evaluate(source, {"m": True, "n": "none"}) == expected


def test_equal_sources_are_compiled_once() -> None:
    assert compile_expression("event.once == 1") is compile_expression("event.once == 1")


# --- What is known of an expression ---


@pytest.mark.parametrize(
    ("source", "types"),
    [
        ('event.type == "purchase" && event.amount > 1', {"purchase"}),
        ('event.amount > 1 && ("purchase" == event.type)', {"purchase"}),
        ('event["type"] == "purchase"', {"purchase"}),
        ('event.type in ["a", "b"] && true', {"a", "b"}),
        ('(event.type in ["a", "b"] && true) && event.type == "a"', {"a"}),
        ('event.type == "a" && event.type == "b"', set()),
        ('event.type == "a" || event.type == "b"', None),
        ('event.type == "a" ? true : false', None),
        ('!(event.type == "a")', None),
        ("event.type == event.other", None),
        ('event.type in ["a", event.b]', None),
        ("event.amount > 1", None),
    ],
)
def test_event_types_of_a_condition(source: str, types: set[str] | None) -> None:
    assert compile_expression(source).event_types == (None if types is None else frozenset(types))


SPEND = ("participant", "counters", "monthly_spend")


@pytest.mark.parametrize(
    ("source", "references"),
    [
        ('get(participant.counters, "monthly_spend", 0.0) > 1', {SPEND}),
        ("participant.counters.monthly_spend > 1", {SPEND}),
        ('participant.counters["monthly_spend"] > 1', {SPEND}),
        ('participant["counters"].monthly_spend > 1', {SPEND}),
        ('"monthly_spend" in participant.counters', {SPEND}),
        ("has(participant.counters.monthly_spend)", {SPEND}),
        ("get(participant.counters, event.key, 0)", {("participant", "counters")}),
        ("participant.counters[event.key]", {("participant", "counters")}),
        ("participant.counters[program.attributes.k]", {("participant", "counters"), ("program", "attributes", "k")}),
        ("participant.counters.exists(k, k == 'x')", {("participant", "counters")}),
        ("participant.counters.size()", {("participant", "counters")}),
        ('"vip" in participant.tags', {("participant", "tags")}),
        ("participant.tags[0]", {("participant", "tags")}),
        ('participant.tiers.loyalty.level == "gold"', {("participant", "tiers", "loyalty")}),
        ('"loyalty" in participant.tiers', {("participant", "tiers", "loyalty")}),
        ("participant.id", {("participant", "id")}),
        ("participant[event.x].y", {("participant",)}),
        ("[participant].exists(p, p.counters.x > 1)", {("participant",)}),
        ("get(participant.counters, 'a', program.counters.b)",
         {("participant", "counters", "a"), ("program", "counters", "b")}),
        ("group.counters.x", {("group", "counters", "x")}),
        ("groups.exists(g, 'x' in g.tags)", {("groups",)}),
        ("groups[0].counters.x", {("groups",)}),
        ("event.items.exists(participant, participant.x)", set()),
        ("event.amount > 1 && now > timestamp('2025-01-01')", set()),
        ("event.a[participant.attributes.k] ? [program.tags] : {'x': -group.counters.y}",
         {("participant", "attributes", "k"), ("program", "tags"), ("group", "counters", "y")}),
    ],
)  # fmt: skip
def test_references_name_the_state_that_may_be_read(source: str, references: set[tuple[str, ...]]) -> None:
    assert compile_expression(source).references == frozenset(references)


@pytest.mark.parametrize(
    ("source", "constant"),
    [("10", True), ("1 + 2", True), ('"gold"', True), ("[1].map(x, x)", True), ("now", False), ("event.a", False)],
)
def test_constant_expressions_are_known(source: str, constant: bool) -> None:
    assert compile_expression(source).is_constant is constant


def test_names_may_begin_like_keywords() -> None:
    event = {"nullable": True, "trueish": True, "index": True, "in": True, "falsey": True, "size": True, "has": True}
    assert evaluate('event.nullable && event.trueish && event.index && event["in"] && event.falsey', event) is True
    assert evaluate("event.size && event.has", event) is True
    for name in ("nullable", "trueish", "index", "inner", "falsey", "in_", "asset", "iffy"):
        assert evaluate(f"[1].all({name}, {name} in [1] && {name}==1)") is True


FUNCTIONS_OF_THE_CONTRACT = """
    get(event, "k", 0); has(event.k); round(1.5); round(1.55, 1); double("1"); timestamp("2026-09-01T00:00:00Z");
    timestamp("2026-09-01"); "a".size(); [1].size(); {"a": 1}.size(); size("a"); sets.contains([1], [1]);
    sets.intersects([1], [1]); sets.equivalent([1], [1]); int("1"); string(1); bool("true"); type(1) == int;
    duration("24h"); "a".matches("a"); "a".startsWith("a"); "a".endsWith("a"); "a".contains("a"); "a".lowerAscii();
    "a".upperAscii(); "a".trim(); "a".split(","); "a".split(",", 1); "a".replace("a", "b"); "a".replace("a", "b", 1);
    "a".substring(0); "a".substring(0, 1); [1].all(x, true); [1].exists(x, true); [1].exists_one(x, true);
    [1].map(x, x); [1].map(x, true, x); [1].filter(x, true); math.greatest(1, 2); math.least(1, 2); min(1, 2, 3);
    max(1, 2, 3); abs(-1); floor(1.5); floor(1.55, 1); ceil(1.5); ceil(1.55, 1); now.getFullYear(); now.getMonth();
    now.getDate(); now.getDayOfMonth(); now.getDayOfWeek(); now.getHours(); now.getMinutes(); now.getFullYear("UTC");
    now.getMonth("UTC"); now.getDate("UTC"); now.getDayOfMonth("UTC"); now.getDayOfWeek("UTC"); now.getHours("UTC");
    now.getMinutes("UTC"); now + duration("1h"); now - duration("1h"); now - now; now(); days(1); hours(1)
"""


@pytest.mark.parametrize("source", [source.strip() for source in FUNCTIONS_OF_THE_CONTRACT.split(";")])
def test_everything_that_6_4_names_is_there(source: str) -> None:
    evaluate(source, {"k": Decimal(1)})


# --- Threads ---


def test_three_threads_with_different_data_never_mix() -> None:
    source = 'event.items.map(i, i.n * event.factor) == event.expected && event.name in ["a", "b", "c"]'
    wrong: list[int] = []

    def work(expression: Expression, number: int) -> None:
        items = [{"n": Decimal(n)} for n in range(5)]
        expected = [Decimal(n * number) for n in range(5)]
        name = "abc"[number % 3]
        mine = activation({"items": items, "factor": Decimal(number), "expected": expected, "name": name})
        for _ in range(1_000):
            if expression.evaluate(mine) is not True:
                wrong.append(number)

    expression = compile_expression(source)
    threads = [threading.Thread(target=work, args=(expression, number)) for number in (2, 3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_threads_may_compile_at_the_same_time() -> None:
    values: dict[int, Any] = {}

    def work(start: int) -> None:
        for n in range(start, start + 30):
            values[n] = evaluate(f"{n} + {n} * 2")

    threads = [threading.Thread(target=work, args=(start,)) for start in (0, 30, 60)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert values == {n: Decimal(3 * n) for n in range(90)}
