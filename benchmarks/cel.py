"""What one evaluation of an expression costs: `python -m benchmarks.cel`.

Ours beside cel-python's CompiledRunner, which it replaces (docs/decisions/0002-expression-evaluator.md). The
baseline gets its activation converted beforehand, ours takes the payload as it is.
"""

import json
import logging
import timeit
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import celpy
from celpy.adapter import json_to_cel
from celpy.celparser import CELParser
from celpy.evaluation import CELEvalError

from domain.rules.cel import Activation, EvaluationError, compile_expression

EVENT = """{"type": "purchase", "amount": 105.00, "mcc": "5812", "currency": "USD", "merchant": "m-17",
  "channel": "pos",
  "items": [{"sku": "a", "price": 3.50}, {"sku": "b", "price": 12.00}, {"sku": "c", "price": 7.25}]}"""
CASES = {
    "three conjuncts": 'event.type == "purchase" && event.amount >= 100.0 && event.mcc in ["5812", "5813"]',
    "missing field": 'event.coupon_code == "X"',
    "comprehension": "event.items.exists(i, i.price > 10.0)",
    "amount": "round(event.amount * 0.03, 2)",
}
# CompiledRunner emits the functions of its host by a qualified name that it cannot find again.
NOT_IN_BASELINE = frozenset({"amount"})
ROUNDS = 20_000
REPEATS = 5


def microseconds(run: Callable[[], object], rounds: int) -> float:
    """The best of some repeats: what the code costs, not what the machine was doing besides."""
    return min(timeit.repeat(run, number=rounds, repeat=REPEATS)) / rounds * 1e6


def ours(source: str) -> Callable[[], object]:
    """One evaluation by the evaluator of the rules."""
    expression = compile_expression(source)
    activation = Activation(
        event=json.loads(EVENT, parse_float=Decimal, parse_int=Decimal),
        participant={"tags": [], "counters": {}, "attributes": {}, "tiers": {}},
        program={"tags": [], "counters": {}, "attributes": {}},
        groups=[],
        group=None,
        now=datetime(2026, 1, 15, tzinfo=UTC),
    )

    def run() -> object:
        try:
            return expression.evaluate(activation)
        except EvaluationError as error:
            return error

    return run


def baseline(source: str) -> Callable[[], object]:
    """One evaluation by cel-python's CompiledRunner."""
    # The parser is a singleton whose trees belong to the first runner that made it.
    CELParser.CEL_PARSER = None
    environment = celpy.Environment(runner_class=celpy.CompiledRunner)
    program = environment.program(environment.compile(source))
    context: dict[str, Any] = {"event": json_to_cel(json.loads(EVENT))}

    def run() -> object:
        try:
            return program.evaluate(context)
        except CELEvalError as error:
            return error

    return run


def main() -> None:
    """Prints one line per case."""
    logging.disable(logging.CRITICAL)
    print(f"{'µs per evaluation':<20}{'ours':>8}{'cel-python':>14}")
    for name, source in CASES.items():
        own = microseconds(ours(source), ROUNDS)
        other = "-" if name in NOT_IN_BASELINE else f"{microseconds(baseline(source), ROUNDS // 20):.1f}"
        print(f"{name:<20}{own:>8.2f}{other:>14}")


if __name__ == "__main__":
    main()
