"""The conformance cases of CEL itself against our evaluator. Goal: each difference is known and meant.

Method: every case runs. One that is no deviation has to give what the standard says. One that is must give what
cel_conformance/deviations.json says, and that must not be what the standard says: so a deviation that has gone fails
here as loudly as a new one. Where the cases come from: cel_conformance/README.md.
"""

import enum
import json
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from domain.durations import parse_duration
from domain.rules.cel import EvaluationError, ExpressionError, compile_expression
from domain.rules.cel.functions import to_string
from domain.rules.cel.values import NUMBER_TYPE, TYPE_NAMES, CelType
from tests.domain.rules.cel_data import activation

HERE = Path(__file__).parent / "cel_conformance"
CASES: list[dict[str, Any]] = json.loads((HERE / "cases.json").read_text("utf-8"))
DEVIATIONS: dict[str, dict[str, str]] = json.loads((HERE / "deviations.json").read_text("utf-8"))

# How far we are from plain CEL, on purpose: how many cases differ, and why.
REASONS = {
    "no messages": (81, "protobuf messages: a payload is JSON"),
    "no bytes": (44, "bytes: JSON has none"),
    "no uint()": (13, "uint(x): there is one number type, and 1u is the number 1"),
    "exact decimals": (40, "one type of exact decimals: no overflow of int64, no NaN, no infinity, nothing is lossy"),
    "refused at save": (22, "unknown names, wrong numbers of arguments and bare types: refused before they run"),
    "microseconds": (7, "time in microseconds, as everywhere in the API, and not limited to int64 nanoseconds"),
    "no qualified names": (5, "variables with dots in their names"),
    "no quoted fields": (6, 'map.`field-name`: written map["field-name"]'),
}


class Failure(enum.Enum):
    """What an expression can give instead of a value."""

    REFUSED = "refused"
    ERROR = "error"


NUMBERS = ("int", "uint", "double")


def standards(value: Any) -> Any:
    """A value of the data file: {"int": "1"}, {"map": [[key, value]]} and so on, the rest as in JSON."""
    if isinstance(value, list):
        return [standards(element) for element in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    match kind:
        case "map":
            return {standards(key): standards(element) for key, element in content}
        case "int" | "uint":
            return Decimal(content)
        case "double":
            return float(content)
        case "duration":
            return parse_duration(content)
        case "type":
            return NUMBER_TYPE if content in NUMBERS else TYPE_NAMES.get(content, CelType(content))
    return value


def ours(case: dict[str, Any]) -> Any:
    """What our evaluator gives: a value or a Failure."""
    bindings = {name: standards(value) for name, value in case.get("bindings", {}).items()}
    bindings = {name: Decimal(repr(value)) if type(value) is float else value for name, value in bindings.items()}
    # We have no variables but our own, so that others are bound by a macro. Reserved words keep their meaning.
    names = [name for name in bindings if name not in ("true", "false", "null")]
    source = case["expression"]
    for name in names:
        source = f'[event["{name}"]].map({name}, {source})'
    try:
        expression = compile_expression(source)
    except ExpressionError:
        return Failure.REFUSED
    try:
        value = expression.evaluate(activation(bindings))
    except EvaluationError:
        return Failure.ERROR
    for _ in names:
        assert isinstance(value, list)
        value = value[0]
    return value


def agree(standard: Any, our: Any) -> bool:
    """Whether both are the same value; a double of the standard is the one nearest to our exact decimal."""
    if isinstance(standard, float):
        return type(our) is Decimal and float(our) == standard
    if type(standard) is not type(our):
        return False
    if isinstance(standard, list):
        return len(standard) == len(our) and all(map(agree, standard, our))
    if isinstance(standard, dict):
        return standard.keys() == our.keys() and all(agree(standard[key], our[key]) for key in standard)
    return bool(standard == our)


def is_as_standard(case: dict[str, Any], our: Any) -> bool:
    """Whether it is what the standard says. Of an error only that there is one at run time."""
    if "error" in case:
        return our is Failure.ERROR
    return agree(standards(case["value"]), our)


def shown(our: Any) -> str:
    """An outcome as deviations.json writes it."""
    return str(our.value) if isinstance(our, Failure) else f"{type(our).__name__} {to_string(our)}"


REASON_OF = {name: reason for reason, cases in DEVIATIONS.items() for name in cases}


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case["name"]) for case in CASES if case["name"] not in REASON_OF]
)
def test_agrees_with_standard_cel(case: dict[str, Any]) -> None:
    our = ours(case)
    assert is_as_standard(case, our), f"{case}: {our!r}"


@pytest.mark.parametrize("case", [pytest.param(case, id=case["name"]) for case in CASES if case["name"] in REASON_OF])
def test_differs_from_standard_cel_in_the_known_way(case: dict[str, Any]) -> None:
    our = ours(case)
    assert shown(our) == DEVIATIONS[REASON_OF[case["name"]]][case["name"]]
    assert not is_as_standard(case, our), "agrees with the standard: no deviation any more"


def test_deviations_are_counted_by_their_reasons() -> None:
    assert {reason: len(cases) for reason, cases in DEVIATIONS.items()} == {
        r: count for r, (count, _) in REASONS.items()
    }
    names = Counter(case["name"] for case in CASES)
    assert max(names.values()) == 1
    assert REASON_OF.keys() <= names.keys()
    assert sum(len(cases) for cases in DEVIATIONS.values()) == len(REASON_OF), "each has a single reason"
