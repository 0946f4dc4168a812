"""How the number of rules tells on the fixed workload, of which three match every event.

The 20 and the 100 rules belong to 4 and to 20 types of events, five to each, so that an index by type leaves five to be
looked at. Beside them the honest other case: 100 rules that all ask for the events' own type.
"""

from collections.abc import Iterator
from typing import Any

from benchmarks.case import Bench, Case, Figure
from benchmarks.load import middle
from benchmarks.throughput import measure_events
from benchmarks.workload import batch_requests, make_program, warm_up

CLIENTS = 4
FIXED_RULES = 5


def run(bench: Bench) -> Iterator[Figure]:
    """Yield events per second with 5, 20 and 100 rules, with 100 rules of one type, and 100 over 5."""
    rates: dict[str, float] = {}
    for name, further in (
        ("5_rules", []),
        ("20_rules", _of_other_types(20)),
        ("100_rules", _of_other_types(100)),
        ("100_rules_of_one_type", _of_one_type(100)),
    ):
        figure = _measure(bench, name, further)
        rates[name] = figure.value
        yield figure
    yield Figure("100_rules_over_5", rates["100_rules"] / rates["5_rules"], "x")


def _measure(bench: Bench, name: str, further_rules: list[dict[str, Any]]) -> Figure:
    endpoint, count = bench.system.endpoint, bench.sizes.batch_events // 2
    program = make_program(bench.rest, name, further_rules=further_rules)
    warm_up(endpoint, program, bench.population, bench.sizes.warm_up_events)
    reports = measure_events(
        bench,
        name,
        program,
        lambda: batch_requests(endpoint, program, bench.population, count),
        count,
        CLIENTS,
    )
    rates = tuple(count / report.done_s for report in reports)
    share = max(report.client_cpu_share for report in reports)
    return Figure(f"events_per_s_{name}", middle(rates), "/s", rates, share)


def _of_other_types(total: int) -> list[dict[str, Any]]:
    """Rules that make the fixed ones up to `total`, five for each further type."""
    return [
        _rule(number, f'event.type == "type_{number // FIXED_RULES}" && event.amount >= {number}.0')
        for number in range(total - FIXED_RULES)
    ]


def _of_one_type(total: int) -> list[dict[str, Any]]:
    """Rules of the events' own type that make the fixed ones up to `total`, none of which matches."""
    return [
        _rule(number, f'event.type == "purchase" && event.merchant == "shop-{number}" && event.amount >= 1.0')
        for number in range(total - FIXED_RULES)
    ]


def _rule(number: int, condition: str) -> dict[str, Any]:
    return {"name": f"Rule {number}", "condition": condition, "actions": [{"type": "TAG", "tag": f"tag_{number}"}]}


CASE = Case(
    "rules",
    "Numbers of rules",
    (
        "events_per_s_5_rules",
        "events_per_s_20_rules",
        "events_per_s_100_rules",
        "events_per_s_100_rules_of_one_type",
        "100_rules_over_5",
    ),
    run,
)
