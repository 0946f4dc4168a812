"""CEL: `compile_expression` and `evaluate` are all that the rest of the system knows of expressions.

The grammar and its parser come from cel-python, the evaluator is ours (docs/decisions/0002-expression-evaluator.md).
A text goes through four steps, once per rule version:

    syntax.py     text -> tree: strings and brackets checked, parsed by cel-python, simplified
    analysis.py   tree -> event types and state that it may read
    codegen.py    tree -> one Python function (an example of what is generated stands at its top)
    this module   the function, cached by its text, and the promise that nothing but EvaluationError leaves it

Contract: rules-and-events.md 6.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import Any

from domain.limits import EXPRESSION_DEPTH
from domain.rules.cel.analysis import event_types, references
from domain.rules.cel.codegen import generate
from domain.rules.cel.errors import EvaluationError, EvaluationLimit, ExpressionError, MissingField
from domain.rules.cel.syntax import Source, parse
from domain.rules.cel.values import Meter, Value, type_name

__all__ = [
    "Activation",
    "EvaluationError",
    "EvaluationLimit",
    "Expression",
    "ExpressionError",
    "MissingField",
    "compile_expression",
    "evaluate_condition",
]

# The cache is measured in characters of source: each keeps up to 160 bytes, so that hostile texts come to 80 MB a
# process at most, and usual ones, of a hundred characters, to 5,000 expressions.
_CACHED_CHARACTERS = 512 * 1024


@dataclass(frozen=True, slots=True)
class Activation:
    """What an expression can see: plain values (values.py), numbers as Decimal. Contract: 6.3.

    A variable that is None does not exist here (a program-scoped event has no participant): reading it is a
    MissingField.
    """

    event: dict[str, Any]
    participant: dict[str, Any] | None
    program: dict[str, Any]
    groups: list[Any]
    group: dict[str, Any] | None
    now: datetime


@dataclass(frozen=True, slots=True, eq=False)
class Expression:
    """A compiled expression: immutable, shared between threads.

    `event_types`: the condition can only be true for events of these types; None for any type.
    `references`: the state it may read, such as ("participant", "counters", "monthly_spend"); a shorter path means all
    that lies under it.
    `is_constant`: it reads no variable, so that its value is always the same.
    """

    source: str
    event_types: frozenset[str] | None
    references: frozenset[tuple[str, ...]]
    is_constant: bool
    _function: Callable[..., Value] = field(repr=False)
    _needs_charge: bool = field(repr=False)

    def evaluate(self, activation: Activation) -> object:
        """The value for this data: None, bool, str, Decimal, list, dict, datetime or timedelta; not to be modified.

        Raises EvaluationError, MissingField or EvaluationLimit, and nothing else. Lists and maps may contain one and
        the same part many times, so look at the type before walking one.
        """
        try:
            result = self._function(
                activation.event,
                activation.participant,
                activation.program,
                activation.groups,
                activation.group,
                activation.now,
                Meter().charge if self._needs_charge else None,
            )
        except EvaluationError:
            raise
        except (RecursionError, MemoryError):
            raise EvaluationLimit("evaluation needs too much memory or nests too deep") from None
        except Exception as error:
            # Values that none of ours can be, such as NaN. The rule is skipped or its action fails, the batch goes on.
            raise EvaluationError(f"evaluation failed: {type(error).__name__}") from error
        return Decimal(result) if type(result) is int else result


class _Cache:
    """The expressions compiled last, by their text, as many as `characters` characters allow. Shared by threads."""

    def __init__(self, characters: int) -> None:
        self._most = characters
        self._held = 0
        self._by_source: OrderedDict[str, Expression] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, source: str) -> Expression | None:
        with self._lock:
            found = self._by_source.get(source)
            if found is not None:
                self._by_source.move_to_end(source)
            return found

    def keep(self, expression: Expression) -> Expression:
        """Keeps it; gives the one kept by another thread in the meantime, if there is one."""
        with self._lock:
            kept = self._by_source.setdefault(expression.source, expression)
            if kept is expression:
                self._held += len(expression.source)
            while self._held > self._most:
                source, _ = self._by_source.popitem(last=False)
                self._held -= len(source)
            return kept


_cache = _Cache(_CACHED_CHARACTERS)


def compile_expression(source: str) -> Expression:
    """Compiles an expression, or finds it compiled. Contract: rules-and-events.md 5.17 and 6.5, README.md small print.

    Raises ExpressionError, with position and hint, for syntax errors, unknown functions, macros and variables, wrong
    numbers of arguments and expressions over the limits. Names of payload fields and types are not checked.
    """
    return _cache.get(source) or _cache.keep(_compile(source))


def _compile(source: str) -> Expression:
    text = Source(source)
    root = parse(text)
    try:
        compiled = generate(text, root)
        return Expression(
            source=source,
            event_types=event_types(root),
            references=references(root),
            is_constant=not compiled.uses_variables,
            _function=compiled.function,
            _needs_charge=compiled.needs_charge,
        )
    except (RecursionError, MemoryError, SyntaxError):
        # Python's own limits for source text, which lie beyond ours.
        raise ExpressionError(f"nested deeper than {EXPRESSION_DEPTH} levels") from None


def evaluate_condition(expression: Expression, activation: Activation) -> bool:
    """The condition's verdict. Raises as `evaluate` does, and EvaluationError for a value that is no bool."""
    result = expression.evaluate(activation)
    if result is True or result is False:
        return result
    raise EvaluationError(f"condition must give a bool, not {type_name(result)}")
