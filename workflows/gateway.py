"""How the rest of the system reaches Temporal: one lazily connected client, and the calls we make through it."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from datetime import timedelta
from uuid import UUID

import temporalio.api.enums.v1
import temporalio.api.operatorservice.v1
from temporalio.client import Client
from temporalio.common import SearchAttributePair, TypedSearchAttributes, WorkflowIDReusePolicy
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.exceptions import WorkflowAlreadyStartedError
from temporalio.service import RPCError, RPCStatusCode

from domain import limits
from settings import Settings
from workflows import ledger_verification, queues
from workflows.event_processing import EventProcessing, EventProcessingInput, workflow_id
from workflows.ledger_verification import LedgerVerification, VerificationInput
from workflows.search_attributes import ORGANIZATION, PROGRAM, SEARCH_ATTRIBUTES

logger = logging.getLogger("scrip.temporal")


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
        data_converter=pydantic_data_converter,
        lazy=lazy,
    )


class Gateway:
    """Temporal as the API and the worker's timers see it. Open calls are bounded: a small server's queue is short."""

    def __init__(self, connect: Callable[[], Awaitable[Client]], *, timeout_s: float) -> None:
        self._connect = connect
        self._client: Client | None = None
        self._timeout = timedelta(seconds=timeout_s)
        self._open_calls = asyncio.Semaphore(limits.OPEN_TEMPORAL_CALLS)
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
        async with self._open_calls:
            client = await self.client()
            await client.start_workflow(
                EventProcessing.run,
                EventProcessingInput(organization_id, program_id, program_name),
                id=workflow_id(program_id),
                task_queue=queues.LEDGER,
                start_signal="wake",
                id_reuse_policy=WorkflowIDReusePolicy.ALLOW_DUPLICATE,
                static_summary=f"Events of {program_name}",
                search_attributes=await self._attributes(client, organization_id, program_id),
                rpc_timeout=self._timeout,
            )

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
                    search_attributes=await self._attributes(client, organization_id),
                    priority=ledger_verification.priority(organization_id),
                    rpc_timeout=self._timeout,
                )
            except WorkflowAlreadyStartedError:
                handle = client.get_workflow_handle(ledger_verification.workflow_id(organization_id))
                description = await handle.describe(rpc_timeout=self._timeout)
                return UUID(await description.memo_value(ledger_verification.MEMO_ID))
        return verification_id

    async def is_reachable(self) -> bool:
        """Whether Temporal answers."""
        try:
            client = await self.client()
            return await client.service_client.check_health(timeout=self._timeout)
        except (RPCError, RuntimeError):
            return False

    async def _attributes(
        self, client: Client, organization_id: UUID, program_id: UUID | None = None
    ) -> TypedSearchAttributes:
        if not await self._is_searchable(client):
            return TypedSearchAttributes.empty
        pairs = [SearchAttributePair(ORGANIZATION, str(organization_id))]
        if program_id is not None:
            pairs.append(SearchAttributePair(PROGRAM, str(program_id)))
        return TypedSearchAttributes(pairs)

    async def _is_searchable(self, client: Client) -> bool:
        """Whether search attributes can be set; a no, or a server that didn't say, is asked again after a minute."""
        if not self._searchable and time.monotonic() >= self._ask_again_at:
            self._ask_again_at = time.monotonic() + 60
            self._searchable = await has_search_attributes(client)
        return self._searchable


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
