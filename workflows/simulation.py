"""Simulation: rules against past events, carried to the end. Contract: README.md "Simulations"; docs/simulations.md.

It only calls an activity that simulates for ten seconds at a time, over and over: how far it has come is in Postgres,
so that neither the activity nor the history grows with the events, and a run that is lost goes on where it was.
Temporal's own cancel cancels the simulation, as the API's DELETE does.
"""

import asyncio
from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID

from temporalio import workflow
from temporalio.common import Priority, RetryPolicy
from temporalio.exceptions import ApplicationError

with workflow.unsafe.imports_passed_through():
    from activities.simulations import SimulationActivities, SimulationReport, SimulationStep
    from workflows.shield import through_cancel

SIMULATION_FAILED = "SimulationFailed"
"""The type of the error with which the workflow of a simulation ends that can't be carried out."""

# Simulating can wait: the same workers process events, in the order of priorities where they are busy.
LOW_PRIORITY_KEY = 5

_RETRIES = RetryPolicy(initial_interval=timedelta(milliseconds=200), maximum_interval=timedelta(seconds=30))


@dataclass(frozen=True)
class SimulationInput:
    """Which simulation. Everything else is in the database."""

    organization_id: UUID
    simulation_id: UUID


def workflow_id(simulation_id: UUID) -> str:
    """The id of the workflow that carries this simulation."""
    return f"simulation/{simulation_id}"


def priority(organization_id: UUID) -> Priority:
    """Behind everything else, and no organization before another."""
    return Priority(priority_key=LOW_PRIORITY_KEY, fairness_key=str(organization_id))


@workflow.defn(name="Simulation")
class Simulation:
    """Carries one simulation to its end."""

    @workflow.init
    def __init__(self, request: SimulationInput) -> None:
        self._step = SimulationStep(request.organization_id, request.simulation_id)
        self._cancelling: asyncio.Task[None] | None = None

    @workflow.run
    async def run(self, request: SimulationInput) -> SimulationReport:
        """Simulate until it has ended and is cleared away; how it stands then.

        Raises ApplicationError `SimulationFailed` where it could not be carried out.
        """
        while True:
            report = await through_cancel(self._simulate(), self._cancel)
            workflow.set_current_details(_details(report))
            if self._cancelling is not None:
                await through_cancel(_finished(self._cancelling), self._cancel)
            if report.finished:
                break
            if self._cancelling is None and workflow.info().is_continue_as_new_suggested():
                workflow.continue_as_new(request)
        if self._cancelling is not None:
            raise asyncio.CancelledError
        if report.status == "FAILED":
            raise ApplicationError(report.error or "failed", type=SIMULATION_FAILED, non_retryable=True)
        return report

    async def _simulate(self) -> SimulationReport:
        return await workflow.execute_activity_method(
            SimulationActivities.simulate,
            self._step,
            summary="ten seconds of events",
            start_to_close_timeout=timedelta(minutes=5),
            # Longer than the database lets one statement run, which is what lies between two heartbeats.
            heartbeat_timeout=timedelta(seconds=90),
            retry_policy=_RETRIES,
        )

    def _cancel(self) -> None:
        """Cancel the simulation now; the step under way sees it at its next batch."""
        if self._cancelling is None:
            self._cancelling = asyncio.create_task(self._cancel_simulation())

    async def _cancel_simulation(self) -> None:
        await workflow.execute_activity_method(
            SimulationActivities.cancel_simulation,
            self._step,
            summary="cancel the simulation",
            start_to_close_timeout=timedelta(seconds=30),
            retry_policy=_RETRIES,
        )


async def _finished(task: "asyncio.Task[None]") -> None:
    await task


def _details(report: SimulationReport) -> str:
    done = f"{report.status}: {report.events_done:,} of {report.events_total:,} events"
    return done if report.error is None else f"{done}; **{report.error}**"
