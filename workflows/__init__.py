"""Orchestration: what happens over time. Deterministic; no I/O and no business rules in here."""
