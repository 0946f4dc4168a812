"""Every case, in the order in which they run."""

from benchmarks.case import Case
from benchmarks.cases import (
    adjust,
    balance_read,
    batch,
    chain_lock,
    counters,
    growth,
    holds,
    latency,
    lots,
    parallel_programs,
    postgres_ceiling,
    processes,
    rule_holds,
    rules,
    single,
    temporal_cost,
    transfers,
    workflow_per_event,
)

CASES: tuple[Case, ...] = (
    batch.CASE,
    single.CASE,
    latency.CASE,
    adjust.CASE,
    chain_lock.CASE,
    counters.CASE,
    rules.CASE,
    rule_holds.CASE,
    holds.CASE,
    transfers.CASE,
    processes.CASE,
    temporal_cost.CASE,
    postgres_ceiling.CASE,
    workflow_per_event.CASE,
    lots.CASE,
    parallel_programs.CASE,
    balance_read.CASE,
    growth.CASE,
)
