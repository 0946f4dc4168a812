"""How the rest of the system reaches Temporal: one lazily connected client, and the calls we make through it."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar
from uuid import UUID, uuid4

import temporalio.api.enums.v1
import temporalio.api.operatorservice.v1
from temporalio.client import Client, WithStartWorkflowOperation, WorkflowUpdateFailedError
from temporalio.common import (
    Priority,
    SearchAttributePair,
    TypedSearchAttributes,
    WorkflowIDConflictPolicy,
    WorkflowIDReusePolicy,
)
from temporalio.exceptions import ApplicationError, TemporalError, WorkflowAlreadyStartedError
from temporalio.service import RPCError, RPCStatusCode
from temporalio.types import MethodAsyncSingleParam
from temporalio.workflow import UpdateMethodMultiParam

from domain import limits, two_step
from domain.balances import OperationResult
from domain.clock import format_timestamp
from domain.errors import STATUS_BY_CODE, Problem, Refusal
from domain.hold_ends import CarriedHold
from domain.redemptions import RedemptionStatus
from domain.simulations.records import CarriedSimulation
from domain.timed_holds import Reservation
from domain.two_step import CarriedRedemption
from settings import Settings
from workflows import broadcasts, hold, hold_ends, ledger_verification, queues, redemption, simulation
from workflows.broadcasts import Broadcasts, BroadcastsInput
from workflows.converter import DATA_CONVERTER
from workflows.event_processing import EventProcessing, EventProcessingInput, workflow_id
from workflows.hold import Hold, HoldInput
from workflows.hold_ends import HoldEnds, HoldEndsInput
from workflows.ledger_verification import LedgerVerification, VerificationInput
from workflows.redemption import Redemption, RedemptionInput
from workflows.search_attributes import ORGANIZATION, PARTICIPANT, PROGRAM, SEARCH_ATTRIBUTES, STATUS
from workflows.simulation import Simulation, SimulationInput
from workflows.summaries import summary

logger = logging.getLogger("scrip.temporal")

Input = TypeVar("Input")
P = TypeVar("P")
T = TypeVar("T")
W = TypeVar("W")

_PAUSE_S = 0.1


class TemporalUnavailable(Exception):
    """Temporal, or a worker behind it, didn't answer in time."""


async def connect(settings: Settings, *, lazy: bool = False) -> Client:
    """A client of the configured Temporal. With `lazy` it connects at its first call.

    Raises RuntimeError when Temporal can't be reached.
    """
    api_key = settings.temporal_api_key.get_secret_value() if settings.temporal_api_key else None
    return await Client.connect(
        settings.temporal_address,
        namespace=settings.temporal_namespace,
        api_key=api_key,
        tls=settings.temporal_tls or api_key is not None,
        data_converter=DATA_CONVERTER,
        lazy=lazy,
    )


@dataclass(frozen=True, slots=True)
class _Shown:
    """What a workflow is found by, where the server knows our search attributes."""

    organization_id: UUID
    program_id: UUID | None = None
    participant_id: UUID | None = None
    status: str | None = None


class Gateway:
    """Temporal as the API and the worker's timers see it. Open calls are bounded: a small server's queue is short."""

    def __init__(self, connect: Callable[[], Awaitable[Client]], *, timeout_s: float) -> None:
        self._connect = connect
        self._client: Client | None = None
        self._timeout = timedelta(seconds=timeout_s)
        self._open_calls = asyncio.Semaphore(limits.OPEN_TEMPORAL_CALLS)
        # Updates wait for a worker: where there is none they must not keep wakes from going out.
        self._telling: set[asyncio.Task[None]] = set()
        self._open_updates = asyncio.Semaphore(limits.OPEN_TEMPORAL_UPDATES)
        self._searchable = False
        self._ask_again_at = 0.0

    @classmethod
    def from_settings(cls, settings: Settings) -> "Gateway":
        """A gateway to the configured Temporal, which need not be up yet."""
        return cls(lambda: connect(settings, lazy=True), timeout_s=settings.temporal_timeout_s)

    async def client(self) -> Client:
        """The client, connected at its first call."""
        if self._client is None:
            self._client = await self._connect()
        return self._client

    async def wake_event_processing(self, organization_id: UUID, program_id: UUID, program_name: str) -> None:
        """Tell the program's EventProcessing that there may be events, starting it if it isn't running.

        Raises RPCError when Temporal is out of reach.
        """
        await self._start(
            EventProcessing.run,
            EventProcessingInput(organization_id, program_id, program_name),
            workflow_id(program_id),
            queues.LEDGER,
            summary(f"Events of {program_name}"),
            _Shown(organization_id, program_id),
            start_signal="wake",
        )

    async def _start(
        self,
        run: MethodAsyncSingleParam[Any, Input, Any],
        argument: Input,
        id: str,
        task_queue: str,
        static_summary: str,
        shown: "_Shown",
        *,
        start_signal: str | None = None,
        priority: Priority = Priority.default,
    ) -> bool:
        """Start a workflow; False where it runs already. With a `start_signal` that is sent to it either way.

        Raises RPCError when Temporal is out of reach.
        """
        async with self._open_calls:
            client = await self.client()
            try:
                await client.start_workflow(
                    run,
                    argument,
                    id=id,
                    task_queue=task_queue,
                    start_signal=start_signal,
                    id_reuse_policy=WorkflowIDReusePolicy.ALLOW_DUPLICATE,
                    static_summary=static_summary,
                    search_attributes=await self._attributes(client, shown),
                    priority=priority,
                    rpc_timeout=self._timeout,
                )
            except WorkflowAlreadyStartedError:
                return False
        return True

    async def start_verification(self, organization_id: UUID, verification_id: UUID) -> UUID:
        """Start the organization's LedgerVerification; the id of the verification that runs now.

        That is `verification_id`, or another one that was started before and hasn't ended.
        Raises RPCError when Temporal is out of reach.
        """
        async with self._open_calls:
            client = await self.client()
            try:
                await client.start_workflow(
                    LedgerVerification.run,
                    VerificationInput(organization_id, verification_id),
                    id=ledger_verification.workflow_id(organization_id),
                    task_queue=queues.LEDGER,
                    id_reuse_policy=WorkflowIDReusePolicy.ALLOW_DUPLICATE,
                    memo={ledger_verification.MEMO_ID: str(verification_id)},
                    static_summary="Verification of the whole ledger",
                    search_attributes=await self._attributes(client, _Shown(organization_id)),
                    priority=ledger_verification.priority(organization_id),
                    rpc_timeout=self._timeout,
                )
            except WorkflowAlreadyStartedError:
                handle = client.get_workflow_handle(ledger_verification.workflow_id(organization_id))
                description = await handle.describe(rpc_timeout=self._timeout)
                return UUID(await description.memo_value(ledger_verification.MEMO_ID))
        return verification_id

    async def start_simulation(self, carried: CarriedSimulation) -> bool:
        """Start the workflow of a simulation; False where it runs already.

        Raises RPCError when Temporal is out of reach.
        """
        return await self._start(
            Simulation.run,
            SimulationInput(carried.organization_id, carried.id),
            simulation.workflow_id(carried.id),
            queues.LEDGER,
            "Simulation of rules on past events",
            _Shown(carried.organization_id, carried.program_id),
            priority=simulation.priority(carried.organization_id),
        )

    async def make_hold(self, reservation: Reservation, wait_s: float) -> OperationResult:
        """Make a hold with an end by its workflow, which then carries it; what the reservation did.

        Raises Refusal for what the contract refuses, and TemporalUnavailable where no answer came within `wait_s`:
        whether the hold was made has then to be asked of the database.
        """
        return await self._answer(lambda left_s: self._reserve(reservation, left_s), wait_s)

    async def _answer(self, ask: Callable[[float], Awaitable[T]], wait_s: float) -> T:
        """The answer of an update, asked until there is one: `ask` is told how many seconds are left.

        Raises Refusal for what the update refuses, and TemporalUnavailable where no answer came within `wait_s`.
        """
        ends_at = time.monotonic() + wait_s
        try:
            async with asyncio.timeout(wait_s):
                await self._open_updates.acquire()
        except TimeoutError as error:
            raise TemporalUnavailable("too many calls are waiting") from error
        try:
            while True:
                try:
                    return await ask(max(ends_at - time.monotonic(), _PAUSE_S))
                except RPCError:
                    # Out of reach, or the run that would have taken it was just ending. Repeating is safe.
                    if time.monotonic() + _PAUSE_S > ends_at:
                        raise
                    await asyncio.sleep(_PAUSE_S)
        except WorkflowUpdateFailedError as error:
            raise _refusal_of(error) or TemporalUnavailable(str(error.cause or error)) from error
        except (TemporalError, RuntimeError) as error:
            raise TemporalUnavailable(str(error)) from error
        finally:
            self._open_updates.release()

    async def _reserve(self, reservation: Reservation, wait_s: float) -> OperationResult:
        client = await self.client()
        request, holder = reservation.request, reservation.holder
        end = request.expires_at
        start = WithStartWorkflowOperation(
            Hold.run,
            HoldInput(reservation.organization_id, reservation.hold_id),
            id=hold.workflow_id(reservation.hold_id),
            task_queue=queues.LIFECYCLE,
            id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
            id_reuse_policy=WorkflowIDReusePolicy.ALLOW_DUPLICATE,
            static_summary=f"Hold until {format_timestamp(end)}" if end else f"Hold for {request.expires_in}",
            search_attributes=await self._attributes(
                client,
                _Shown(
                    reservation.organization_id,
                    request.program_id,
                    holder.id if holder.type == "PARTICIPANT" else None,
                ),
            ),
        )
        return await _update_with_start(client, Hold.reserve, reservation, start, wait_s)

    async def reserve_redemption(self, reservation: two_step.Reservation, wait_s: float) -> two_step.Reserved:
        """Make a two-step redemption by its workflow, which then carries it.

        Raises Refusal for what the contract refuses, and TemporalUnavailable where no answer came within `wait_s`:
        whether it was made has then to be asked of the database.
        """
        return await self._order_redemption(Redemption.reserve, reservation.carried, reservation, wait_s)

    async def confirm_redemption(
        self, carried: CarriedRedemption, order: two_step.ConfirmOrder, wait_s: float
    ) -> two_step.RedemptionState:
        """Confirm a redemption by its workflow, started anew if need be. Raises as `reserve_redemption`."""
        return await self._order_redemption(Redemption.confirm, carried, order, wait_s)

    async def cancel_redemption(
        self, carried: CarriedRedemption, order: two_step.CancelOrder, wait_s: float
    ) -> two_step.RedemptionState:
        """Cancel a redemption by its workflow, started anew if need be. Raises as `reserve_redemption`."""
        return await self._order_redemption(Redemption.cancel, carried, order, wait_s)

    async def reverse_redemption(
        self, carried: CarriedRedemption, order: two_step.ReverseOrder, wait_s: float
    ) -> two_step.ReversalDone:
        """Reverse a two-step redemption by a short run of its workflow. Raises as `reserve_redemption`."""
        return await self._order_redemption(
            Redemption.reverse, carried, order, wait_s, summary=redemption.REVERSAL_SUMMARY, status=None
        )

    async def _order_redemption(
        self,
        update: UpdateMethodMultiParam[[Redemption, P], T],
        carried: CarriedRedemption,
        order: P,
        wait_s: float,
        *,
        summary: str | None = None,
        status: RedemptionStatus | None = "PENDING",
    ) -> T:
        """What the update answers. `summary` and `status` are what a run shows that is started for it."""
        shown = _Shown(carried.organization_id, carried.program_id, carried.participant_id, status)

        async def ask(left_s: float) -> T:
            client = await self.client()
            start = WithStartWorkflowOperation(
                Redemption.run,
                RedemptionInput(carried.organization_id, carried.id),
                id=redemption.workflow_id(carried.id),
                task_queue=queues.LIFECYCLE,
                id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
                id_reuse_policy=WorkflowIDReusePolicy.ALLOW_DUPLICATE,
                static_summary=summary or redemption.summary_of(carried.expires_at),
                search_attributes=await self._attributes(client, shown),
            )
            return await _update_with_start(client, update, order, start, left_s)

        return await self._answer(ask, wait_s)

    async def carry_redemption(self, carried: CarriedRedemption) -> bool:
        """Start the workflow of a redemption that waits to be confirmed; False where it runs already.

        Raises RPCError when Temporal is out of reach.
        """
        return await self._start(
            Redemption.run,
            RedemptionInput(carried.organization_id, carried.id),
            redemption.workflow_id(carried.id),
            queues.LIFECYCLE,
            redemption.summary_of(carried.expires_at),
            _Shown(carried.organization_id, carried.program_id, carried.participant_id, "PENDING"),
        )

    async def running_redemptions(self, redemption_ids: Collection[UUID]) -> set[UUID]:
        """Which of these redemptions have a workflow that runs, as far as Temporal's visibility knows.

        Raises RPCError when Temporal is out of reach.
        """
        return await self._running([redemption.workflow_id(redemption_id) for redemption_id in redemption_ids])

    async def carry_hold(self, organization_id: UUID, carried: CarriedHold) -> bool:
        """Start the workflow of a hold that exists; False where it runs already.

        Raises RPCError when Temporal is out of reach.
        """
        return await self._start(
            Hold.run,
            HoldInput(organization_id, carried.id),
            hold.workflow_id(carried.id),
            queues.LIFECYCLE,
            f"Hold until {format_timestamp(carried.expires_at)}",
            _Shown(organization_id, carried.program_id, carried.participant_id),
        )

    async def running_holds(self, hold_ids: Collection[UUID]) -> set[UUID]:
        """Which of these holds have a workflow that runs, as far as Temporal's visibility knows.

        Raises RPCError when Temporal is out of reach.
        """
        return await self._running([hold.workflow_id(hold_id) for hold_id in hold_ids])

    async def _running(self, workflow_ids: Collection[str]) -> set[UUID]:
        ids = ", ".join(f"'{workflow_id}'" for workflow_id in workflow_ids)
        async with self._open_calls:
            client = await self.client()
            found = client.list_workflows(
                f"WorkflowId IN ({ids}) AND ExecutionStatus = 'Running'", rpc_timeout=self._timeout
            )
            return {UUID(running.id.partition("/")[2]) async for running in found}

    def tell_holds_ended(self, hold_ids: Collection[UUID]) -> None:
        """Let the workflows of holds that have ended end too, in the background. Returns at once.

        What isn't told (Temporal is out of reach, too many are being told) costs nothing but a workflow that waits for
        the hold's end and finds nothing to do.
        """
        for hold_id in hold_ids:
            if len(self._telling) >= limits.OPEN_TEMPORAL_CALLS:
                return
            task = asyncio.create_task(self._tell_hold(hold_id))
            self._telling.add(task)
            task.add_done_callback(self._telling.discard)

    async def _tell_hold(self, hold_id: UUID) -> None:
        try:
            async with self._open_calls:
                client = await self.client()
                handle = client.get_workflow_handle(hold.workflow_id(hold_id))
                await handle.signal(Hold.look, rpc_timeout=self._timeout)
        except (TemporalError, RuntimeError) as error:
            logger.info("the workflow of hold %s was not told of its end: %s", hold_id, error)

    async def wake_hold_ends(self, organization_id: UUID, program_id: UUID, program_name: str) -> None:
        """Tell the program's HoldEnds that there may be new holds with an end, starting it if it isn't running.

        To be called once for a batch, not per hold. Raises RPCError when Temporal is out of reach.
        """
        await self._start(
            HoldEnds.run,
            HoldEndsInput(organization_id, program_id, program_name),
            hold_ends.workflow_id(program_id),
            queues.LIFECYCLE,
            summary(f"Ends of holds of {program_name}"),
            _Shown(organization_id, program_id),
            start_signal="wake",
        )

    async def wake_broadcasts(self, organization_id: UUID, program_id: UUID, program_name: str) -> None:
        """Tell the program's Broadcasts that there may be a new one, starting it if it isn't running.

        To be called once for a batch, not per broadcast. Raises RPCError when Temporal is out of reach.
        """
        await self._start(
            Broadcasts.run,
            BroadcastsInput(organization_id, program_id, program_name),
            broadcasts.workflow_id(program_id),
            queues.LIFECYCLE,
            summary(f"Broadcasts of {program_name}"),
            _Shown(organization_id, program_id),
            start_signal="wake",
        )

    async def is_reachable(self) -> bool:
        """Whether Temporal answers."""
        try:
            client = await self.client()
            return await client.service_client.check_health(timeout=self._timeout)
        except (RPCError, RuntimeError):
            return False

    async def _attributes(self, client: Client, shown: "_Shown") -> TypedSearchAttributes:
        if not await self._is_searchable(client):
            return TypedSearchAttributes.empty
        pairs = [SearchAttributePair(ORGANIZATION, str(shown.organization_id))]
        if shown.program_id is not None:
            pairs.append(SearchAttributePair(PROGRAM, str(shown.program_id)))
        if shown.participant_id is not None:
            pairs.append(SearchAttributePair(PARTICIPANT, str(shown.participant_id)))
        if shown.status is not None:
            pairs.append(SearchAttributePair(STATUS, shown.status))
        return TypedSearchAttributes(pairs)

    async def _is_searchable(self, client: Client) -> bool:
        """Whether search attributes can be set; a no, or a server that didn't say, is asked again after a minute."""
        if not self._searchable and time.monotonic() >= self._ask_again_at:
            self._ask_again_at = time.monotonic() + 60
            self._searchable = await has_search_attributes(client)
        return self._searchable


async def _update_with_start(
    client: Client,
    update: UpdateMethodMultiParam[[W, P], T],
    order: P,
    start: WithStartWorkflowOperation[W, Any],
    wait_s: float,
) -> T:
    """The answer of an update that starts its workflow if need be. Raises what the client raises."""
    started = asyncio.create_task(start.workflow_handle())
    try:
        return await client.execute_update_with_start_workflow(
            update,
            order,
            start_workflow_operation=start,
            id=str(uuid4()),
            rpc_timeout=timedelta(seconds=wait_s),
        )
    finally:
        # A start that failed tells that twice, and asyncio logs whatever nobody has listened to.
        started.cancel()
        await asyncio.gather(started, return_exceptions=True)


def _refusal_of(error: WorkflowUpdateFailedError) -> Refusal | None:
    """The refusal that a step raised, as `activities.holds.as_application_error` packed it; None for anything else.

    Nor for a step that came too late: it may have been the second attempt of one whose commit had got lost.
    """
    cause = error.cause
    if not isinstance(cause, ApplicationError) or not cause.non_retryable or cause.type not in STATUS_BY_CODE:
        return None
    if cause.type == "service_unavailable":
        return None
    problems = cause.details[0] if cause.details else []
    return Refusal(cause.type, cause.message, [Problem(**problem) for problem in problems])


async def has_search_attributes(client: Client) -> bool:
    """Whether our search attributes are registered in the namespace; a server that won't say counts as no."""
    try:
        listed = await client.operator_service.list_search_attributes(
            temporalio.api.operatorservice.v1.ListSearchAttributesRequest(namespace=client.namespace),
            timeout=timedelta(seconds=5),
        )
    except RPCError:
        return False
    return all(key.name in listed.custom_attributes for key in SEARCH_ATTRIBUTES)


async def register_search_attributes(client: Client) -> None:
    """Register our search attributes where the server allows it; otherwise log the command that does it."""
    if await has_search_attributes(client):
        return
    keyword = temporalio.api.enums.v1.IndexedValueType.INDEXED_VALUE_TYPE_KEYWORD
    request = temporalio.api.operatorservice.v1.AddSearchAttributesRequest(
        namespace=client.namespace, search_attributes={key.name: keyword for key in SEARCH_ATTRIBUTES}
    )
    try:
        await client.operator_service.add_search_attributes(request)
    except RPCError as error:
        if error.status == RPCStatusCode.ALREADY_EXISTS:
            return
        names = " ".join(f"--name {key.name} --type Keyword" for key in SEARCH_ATTRIBUTES)
        command = f"temporal operator search-attribute create --namespace {client.namespace} {names}"
        logger.warning("search attributes are not registered; workflows start without them. To add them: %s", command)
