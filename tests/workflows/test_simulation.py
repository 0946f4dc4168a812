"""Simulations as Temporal carries them: the workflow's paths, its steps, crashes and cancels. docs/simulations.md."""

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator, Iterator
from uuid import UUID

import pytest
from temporalio.client import Client, WorkflowExecutionStatus, WorkflowFailureError
from temporalio.exceptions import ApplicationError, CancelledError
from temporalio.testing import ActivityEnvironment, WorkflowEnvironment
from temporalio.worker import UnsandboxedWorkflowRunner
from temporalio.workflow import Info

from activities.simulations import SimulationActivities, SimulationReport, SimulationStep
from activities.threads import ThreadDatabases
from db.session import Database, DatabaseUnavailable
from db.tables import Simulation
from domain import faults, limits
from domain.simulations import batches, records
from domain.simulations.beginnings import TooMuchToSimulate
from domain.simulations.records import CarriedSimulation
from domain.simulations.stage import Played, Stage
from settings import Settings
from tests.conftest import SettableClock, Tenant
from tests.events_support import EventProgram, credit
from tests.simulations_support import make_simulation
from tests.workflows.record import HISTORIES
from tests.workflows.scenarios import time_skipping
from tests.workflows.simulation_scenarios import DONE, SCENARIOS, Steps, ended, running, serving, start
from workflows.gateway import Gateway
from workflows.search_attributes import ORGANIZATION, PROGRAM
from workflows.simulation import SIMULATION_FAILED, workflow_id

EVENTS = 12


@pytest.fixture(scope="module")
async def env() -> AsyncIterator[WorkflowEnvironment]:
    async with time_skipping() as env:
        yield env


# --- the workflow ---


async def test_it_simulates_step_after_step_until_all_is_cleared_away(env: WorkflowEnvironment) -> None:
    played = await SCENARIOS["simulates_in_steps"](env)

    assert played.result == DONE
    assert played.steps.taken == 4


async def test_a_fault_is_repeated(env: WorkflowEnvironment) -> None:
    played = await SCENARIOS["simulates_again_after_a_fault"](env)

    assert (played.result, played.steps.taken) == (DONE, 2)


async def test_one_that_fails_stands_out_and_says_why(env: WorkflowEnvironment) -> None:
    played = await SCENARIOS["simulates_and_fails"](env)

    assert isinstance(played.error, ApplicationError)
    assert (played.error.type, played.error.non_retryable) == (SIMULATION_FAILED, True)
    assert played.error.message == "a holder has too much"


async def test_temporals_cancel_cancels_the_simulation_and_clears_it_away(env: WorkflowEnvironment) -> None:
    played = await SCENARIOS["simulates_until_cancelled"](env)

    assert isinstance(played.error, CancelledError)
    assert (played.steps.cancelled, played.steps.taken) == (1, 3)
    assert (await played.handle.describe()).status == WorkflowExecutionStatus.CANCELED


async def test_one_that_the_api_cancels_ends_by_itself(env: WorkflowEnvironment) -> None:
    played = await SCENARIOS["simulates_until_the_api_cancels"](env)

    assert (played.result.status, played.steps.cancelled) == ("CANCELED", 0)


async def test_a_long_history_is_left_behind(env: WorkflowEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
    suggested = iter([True])
    monkeypatch.setattr(Info, "is_continue_as_new_suggested", lambda _: next(suggested, False))
    steps = Steps([running(400), running(800), DONE])
    async with serving(env, steps, workflow_runner=UnsandboxedWorkflowRunner()) as queue:
        handle = await start(env, queue)
        played = await ended(steps, handle)

    assert played.result == DONE
    first = handle.first_execution_run_id
    description = await env.client.get_workflow_handle(handle.id, run_id=first).describe()
    assert description.status == WorkflowExecutionStatus.CONTINUED_AS_NEW


async def test_every_path_has_been_recorded() -> None:
    """tests/workflows/test_event_processing.py replays all recordings."""
    assert {path.name.partition(".")[0] for path in HISTORIES.glob("*.json")} >= set(SCENARIOS)


# --- its steps ---


@pytest.fixture
async def program(database: Database, organization: Tenant) -> EventProgram:
    """A program whose one rule has credited a point for each of a dozen events."""
    program = await EventProgram.open(database, organization.id)
    points = await program.asset()
    await program.rule("true", credit(points, "1"))
    for _ in range(EVENTS):
        await program.send()
    await program.settle(1)
    return program


@pytest.fixture
def simulations(settings: Settings, shared_clock: SettableClock) -> Iterator[SimulationActivities]:
    databases = ThreadDatabases(settings.database_url.get_secret_value(), shared_clock)
    yield SimulationActivities(databases)
    closing = threading.Thread(target=databases.close)
    closing.start()
    closing.join()


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five events a batch."""
    monkeypatch.setattr(limits, "SIMULATION_EVENTS", 5)


async def made(program: EventProgram) -> SimulationStep:
    simulation_id = await make_simulation(program.database, program.organization_id, program.id)
    return SimulationStep(program.organization_id, simulation_id)


async def taken(simulations: SimulationActivities, step: SimulationStep, attempt: int = 1) -> SimulationReport:
    """A step in a thread of its own, as a worker takes it."""
    env = ActivityEnvironment()
    env.info = env.default_info().__class__(**{**vars(env.default_info()), "attempt": attempt})
    return await asyncio.to_thread(env.run, simulations.simulate, step)


async def row(program: EventProgram, step: SimulationStep) -> Simulation:
    async with program.database.transaction(program.organization_id) as tx:
        return await records.get(tx, program.id, step.simulation_id)


async def holders(program: EventProgram) -> int:
    ((count,),) = await program.sql("select count(*) from simulation_holder")
    return int(count)


async def test_a_step_carries_it_to_its_end_and_leaves_no_holders_behind(
    program: EventProgram, simulations: SimulationActivities
) -> None:
    step = await made(program)

    report = await taken(simulations, step)

    assert report == SimulationReport("COMPLETED", EVENTS, EVENTS, finished=True)
    assert await holders(program) == 0
    assert await taken(simulations, step) == report


@pytest.mark.usefixtures("small_batches")
async def test_a_step_that_has_no_more_time_reports_how_far_it_is(
    program: EventProgram, simulations: SimulationActivities, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "SIMULATION_S", 0.0)
    step = await made(program)

    reports = [await taken(simulations, step) for _ in range(3)]

    assert [report.events_done for report in reports] == [5, 10, 12]
    assert {report.status for report in reports} == {"RUNNING"}
    assert (await row(program, step)).events_total == EVENTS


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("point", ["simulation.played", "simulation.written", "simulation.committed"])
async def test_wherever_it_is_lost_it_goes_on_behind_the_last_committed_batch(
    program: EventProgram, simulations: SimulationActivities, point: str
) -> None:
    undisturbed, step = await made(program), await made(program)
    await taken(simulations, undisturbed)

    class Lost(DatabaseUnavailable):
        """What a database that is lost just there comes to."""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(faults, "InjectedFault", Lost)
        with faults.arm(f"{point}=fail@2"), pytest.raises(Lost):
            await taken(simulations, step)
    assert (await row(program, step)).events_done == (10 if point == "simulation.committed" else 5)
    report = await taken(simulations, step, attempt=2)

    assert (report.status, report.events_done) == ("COMPLETED", EVENTS)
    assert (await row(program, step)).results == (await row(program, undisturbed)).results


async def test_what_brings_its_worker_down_three_times_is_given_up(
    program: EventProgram, simulations: SimulationActivities
) -> None:
    step = await made(program)
    async with program.database.transaction(program.organization_id) as tx:
        for _ in range(limits.LOST_STARTS):
            await records.note_start(tx, step.simulation_id, 1)

    report = await taken(simulations, step, attempt=5)

    assert (report.status, report.finished) == ("FAILED", True)
    assert report.error == f"simulating brought its worker down {limits.LOST_STARTS} times"


async def test_an_outage_is_no_loss_of_a_worker(
    program: EventProgram, simulations: SimulationActivities, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = await made(program)

    async def away(*_: object) -> None:
        raise DatabaseUnavailable("gone")

    with monkeypatch.context() as patch:
        patch.setattr("activities.simulations.advance", away)
        for attempt in range(2, 8):
            with pytest.raises(DatabaseUnavailable):
                await taken(simulations, step, attempt)

    assert (await taken(simulations, step, attempt=8)).status == "COMPLETED"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (TooMuchToSimulate("a holder has too much"), "a holder has too much"),
        (ZeroDivisionError("oops"), "simulating failed: ZeroDivisionError"),
    ],
)
async def test_what_cannot_be_simulated_fails_and_says_why(
    program: EventProgram,
    simulations: SimulationActivities,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    message: str,
) -> None:
    step = await made(program)

    async def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(batches, "_frame", refuse)
    report = await taken(simulations, step)

    assert (report.status, report.error, report.finished) == ("FAILED", message, True)
    assert (await row(program, step)).error == message


@pytest.mark.usefixtures("small_batches")
async def test_a_cancel_does_not_wait_for_a_batch_and_undoes_it(
    program: EventProgram, simulations: SimulationActivities, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = await made(program)
    save, batch = Stage.save, itertools.count(1)

    async def save_while_cancelled(stage: Stage, played: Played) -> None:
        await save(stage, played)
        if next(batch) == 2:
            await asyncio.to_thread(ActivityEnvironment().run, simulations.cancel_simulation, step)

    monkeypatch.setattr(Stage, "save", save_while_cancelled)
    report = await taken(simulations, step)

    assert (report.status, report.events_done, report.finished) == ("CANCELED", 5, True)
    assert await holders(program) == 0


async def test_a_step_for_a_simulation_that_never_was_has_nothing_to_do(
    program: EventProgram, simulations: SimulationActivities
) -> None:
    report = await taken(simulations, SimulationStep(program.organization_id, UUID(int=1)))

    assert report.finished


# --- with a worker ---


async def test_the_gateway_starts_it_once_and_operators_find_it(
    program: EventProgram, gateway: Gateway, temporal: Client, running_worker: None
) -> None:
    step = await made(program)
    carried = CarriedSimulation(step.organization_id, step.simulation_id, program.id)

    assert await gateway.start_simulation(carried)
    handle = temporal.get_workflow_handle(workflow_id(step.simulation_id), result_type=SimulationReport)
    assert (await handle.result()).status == "COMPLETED"

    description = await handle.describe()
    assert description.typed_search_attributes[ORGANIZATION] == str(program.organization_id)
    assert description.typed_search_attributes[PROGRAM] == str(program.id)
    assert await description.static_summary() == "Simulation of rules on past events"


async def test_one_that_was_terminated_is_carried_on_by_whoever_reconciles(
    program: EventProgram, gateway: Gateway, temporal: Client, monkeypatch: pytest.MonkeyPatch, running_worker: None
) -> None:
    step = await made(program)
    carried = CarriedSimulation(step.organization_id, step.simulation_id, program.id)
    with monkeypatch.context() as patch:
        patch.setattr("workflows.queues.LEDGER", "nobody")
        assert await gateway.start_simulation(carried)
        assert not await gateway.start_simulation(carried)
    handle = temporal.get_workflow_handle(workflow_id(step.simulation_id))
    await handle.terminate()
    with pytest.raises(WorkflowFailureError):
        await handle.result()

    assert await gateway.start_simulation(carried)
    await handle.result()

    assert (await row(program, step)).status == "COMPLETED"


async def test_what_an_ended_one_leaves_behind_is_cleared_away_by_a_run_of_its_own(
    program: EventProgram, gateway: Gateway, temporal: Client, running_worker: None
) -> None:
    """Cancelled by the API while its workflow had been lost."""
    step = await made(program)
    async with program.database.transaction(program.organization_id) as tx:
        await batches.advance(tx, step.simulation_id)
    async with program.database.transaction(program.organization_id) as tx:
        await records.cancel(tx, step.simulation_id)
    assert await holders(program) > 0
    (carried,) = [c for c in await records.open_simulations(program.database) if c.id == step.simulation_id]

    await gateway.start_simulation(carried)
    await temporal.get_workflow_handle(workflow_id(step.simulation_id)).result()

    assert await holders(program) == 0
    assert step.simulation_id not in {c.id for c in await records.open_simulations(program.database)}
