"""Our evaluator against Google's own runtime (cel-expr-python, C++). Goal: where numbers play no part, both agree.

Method: seeded random expressions over bools, strings, lists, maps, null, `in`, `has`, the ternary, macros and string
functions, well typed or not, each evaluated by both over the same payload: the same value, or an error in both.

Numbers are left out: ours are exact decimals, where 7/2 is 3.5 and int and double mix; CEL's are int64 and double. A
size and an index, which are the same in both, are in. Deviations on purpose, kept out of the generator or named here:

- `has(event.a.b)` with `a` absent or null is false with us and an error in CEL (contract 6.5). So an expression in
  which ours answers and Google's ends in an error is accepted if it holds a `has` that looks through another field.
- The keys of a map are walked in the order of the payload; CEL has no order. So `map` and `filter` get lists only.
- A map key that is null or repeated, bytes, and uint are errors or plain numbers with us.
- Type names of numbers: int, double and number are one type with us.
- A list or map literal whose element fails is an error in both; which one is reported may differ.
"""

import random
import re
from decimal import Decimal
from typing import Any

import pytest
from cel_expr_python import cel
from cel_expr_python.ext import ext_strings

from domain.rules.cel import EvaluationError, EvaluationLimit, compile_expression
from tests.domain.rules.cel_data import activation

EVENT: dict[str, Any] = {
    "type": "purchase",
    "mcc": "5812",
    "flag": True,
    "off": False,
    "nothing": None,
    "tags": ["vip", "gold", "a"],
    "empty": [],
    "mixed": ["a", True, None, ["a"], {"k": "v"}],
    "address": {"city": "Zürich", "zip": "8001"},
    "items": [{"sku": "a", "ok": True}, {"sku": "b", "ok": False}, {"sku": "c"}],
}
FIELDS = [*EVENT, "missing"]
TEXTS = ["a", "b", "vip", "gold", "", "purchase", "5812", "k", "city", "Z\u00fcrich", "A,b,,c", 'quo\\"te', "\\n"]
EXPRESSIONS_PER_SEED = 600


class Generator:
    """Random expressions of bounded depth; `kind` steers them to be mostly well typed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._variables: list[str] = []

    def any(self, depth: int) -> str:
        """An expression of any kind."""
        return self._random.choice([self.bool, self.bool, self.text, self.list, self.map, self.field])(depth)

    def bool(self, depth: int) -> str:
        """An expression that should give a bool."""
        pick = self._random.choice
        if depth <= 0:
            return pick(
                ["true", "false", "event.flag", "event.off", "event.missing", "event.type == 'purchase'", "null"]
            )
        forms = [
            lambda: f"({self.bool(depth - 1)} && {self.bool(depth - 1)})",
            lambda: f"({self.bool(depth - 1)} || {self.bool(depth - 1)})",
            lambda: f"{self.bool(depth - 1)} && {self.bool(depth - 1)} || {self.bool(depth - 1)}",
            lambda: f"!({self.bool(depth - 1)})",
            lambda: f"({self.any(depth - 1)} {pick(['==', '!='])} {self.any(depth - 1)})",
            lambda: f"({self.text(depth - 1)} {pick(['<', '<=', '>', '>='])} {self.text(depth - 1)})",
            lambda: f"({self.any(depth - 1)} in {self.container(depth - 1)})",
            lambda: f"({self.bool(depth - 1)} ? {self.bool(depth - 1)} : {self.bool(depth - 1)})",
            lambda: f"has(event.{pick(FIELDS)})",
            lambda: f"has(event.{pick(FIELDS)}.{pick(['city', 'missing', 'sku'])})",
            lambda: f"{self.text(depth - 1)}.{pick(['contains', 'startsWith', 'endsWith'])}({self.text(depth - 1)})",
            lambda: f"{self.text(depth - 1)}.matches({pick(['a', '^v.p$', '[', '(a|b)+', 'ü'])!r})",
            lambda: f"({self.container(depth - 1)}.size() {pick(['==', '>', '<='])} {pick('0123')})",
            lambda: self.macro(depth, pick(["all", "exists", "exists_one"])),
            lambda: f"type({self.any(depth - 1)}) == {pick(['string', 'bool', 'list', 'map', 'null_type'])}",
        ]
        return pick(forms)()

    def macro(self, depth: int, name: str) -> str:
        """A macro with a new or a shadowing variable."""
        target = self.list(depth - 1) if name in ("map", "filter") else self.container(depth - 1)
        variable = self._random.choice("xyz")
        self._variables.append(variable)
        body = self.any(depth - 1) if name == "map" else self.bool(depth - 1)
        self._variables.pop()
        return f"{target}.{name}({variable}, {body})"

    def text(self, depth: int) -> str:
        """An expression that should give a string."""
        pick = self._random.choice
        if depth <= 0:
            return pick([f'"{pick(TEXTS)}"', "event.type", "event.mcc", "event.address.city", self.field(0), "null"])
        forms = [
            lambda: self.text(0),
            lambda: f"({self.text(depth - 1)} + {self.text(depth - 1)})",
            lambda: f"{self.text(depth - 1)}.{pick(['lowerAscii', 'upperAscii', 'trim'])}()",
            lambda: f"{self.text(depth - 1)}.replace({self.text(depth - 1)}, {self.text(depth - 1)})",
            lambda: f"{self.text(depth - 1)}.substring({pick('012')})",
            lambda: f"({self.bool(depth - 1)} ? {self.text(depth - 1)} : {self.text(depth - 1)})",
            lambda: f"{self.list(depth - 1)}[{pick('0123')}]",
            lambda: f"string({self.text(depth - 1)})",
        ]
        return pick(forms)()

    def list(self, depth: int) -> str:
        """An expression that should give a list."""
        pick = self._random.choice
        if depth <= 0:
            return pick(["event.tags", "event.items", "event.empty", "event.mixed", '["a", "b"]', "[true]", "[]"])
        forms = [
            lambda: self.list(0),
            lambda: f"[{self.any(depth - 1)}, {self.any(depth - 1)}]",
            lambda: f"({self.list(depth - 1)} + {self.list(depth - 1)})",
            lambda: self.macro(depth, "map"),
            lambda: self.macro(depth, "filter"),
            lambda: f"{self.text(depth - 1)}.split({self.text(depth - 1)})",
        ]
        return pick(forms)()

    def map(self, depth: int) -> str:
        """An expression that should give a map."""
        pick = self._random.choice
        if depth <= 0:
            return pick(["event.address", "event.items[0]", '{"k": "v"}', "{}"])
        return f'{{"k": {self.any(depth - 1)}, {pick(["true", self.literal()])}: {self.any(depth - 1)}}}'

    def literal(self) -> str:
        """A string that is not the key "k"."""
        return self._random.choice(['"a"', '"city"', '""'])

    def container(self, depth: int) -> str:
        """A list, mostly, or a map."""
        return self._random.choice([self.list, self.list, self.map])(depth)

    def field(self, depth: int) -> str:
        """A field of the payload or of a macro's variable, present or not."""
        pick = self._random.choice
        if self._variables and self._random.random() < 0.6:
            name = pick(self._variables)
            return pick([name, name, f"{name}.sku", f"{name}.ok"])
        return pick([f"event.{pick(FIELDS)}", f'event["{pick(FIELDS)}"]', f"event.items[{pick('0123')}].sku"])


ENVIRONMENT = cel.NewEnv(variables={"event": cel.Type.DYN}, extensions=[ext_strings.ExtStrings()])
ERROR = "an error"
LOOKS_THROUGH_A_FIELD = re.compile(r"has\(event\.\w+\.")


def by_google(source: str) -> Any:
    """The value that Google's runtime gives, or ERROR."""
    value = ENVIRONMENT.compile(source, disable_check=True).eval(data={"event": EVENT})
    return ERROR if value.type() == cel.Type.ERROR else comparable(value.plain_value())


def by_ours(source: str) -> Any:
    """The value that our evaluator gives, or ERROR."""
    try:
        return comparable(compile_expression(source).evaluate(activation(EVENT)))
    except EvaluationLimit:
        raise AssertionError(f"ran out of steps: {source}") from None
    except EvaluationError:
        return ERROR


def comparable(value: Any) -> Any:
    """A value in which true and 1 differ, as they do not in Python."""
    if isinstance(value, list):
        return [comparable(element) for element in value]
    if isinstance(value, dict):
        return {str(comparable(key)): comparable(element) for key, element in value.items()}
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return (type(value).__name__, value)
    return ("number", Decimal(value)) if isinstance(value, int | Decimal) else str(value)


@pytest.mark.parametrize("seed", range(5))
def test_random_expressions_agree_with_googles_runtime(seed: int) -> None:
    generator = Generator(seed)
    answered = 0
    for _ in range(EXPRESSIONS_PER_SEED):
        source = generator.any(3)
        ours, googles = by_ours(source), by_google(source)
        if googles == ERROR and LOOKS_THROUGH_A_FIELD.search(source):
            continue
        assert ours == googles, source
        answered += ours != ERROR
    assert answered > EXPRESSIONS_PER_SEED / 4, "most expressions fail: the generator tests little"
