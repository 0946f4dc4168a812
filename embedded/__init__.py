"""Scrip on one machine: Postgres, Temporal, the worker and the API under one supervisor, behind `scrip up`."""

from embedded.postgres import EmbeddedPostgres
from embedded.problems import StartupProblem
from embedded.temporal import EmbeddedTemporal

__all__ = ["EmbeddedPostgres", "EmbeddedTemporal", "StartupProblem"]
