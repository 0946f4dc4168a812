"""LedgerVerification: one organization's whole chain, checked in the background; NightlyVerification: everyone's.

One LedgerVerification runs per organization, whoever asked for it: its id says so. It checks half a minute of entries
per activity, so that a chain of any length makes neither a long activity nor a long history. A broken ledger ends it as
Failed, with the entry in the message, so that it stands out in Temporal's UI and in its `workflow_failed` metric; the
record in Postgres is the result itself. Contract: README.md "Small print", holders.md 8.4.
"""

import asyncio
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any
from uuid import UUID

from temporalio import workflow
from temporalio.common import Priority, RetryPolicy, SearchAttributePair, TypedSearchAttributes
from temporalio.exceptions import (
    ActivityError,
    ApplicationError,
    ChildWorkflowError,
    WorkflowAlreadyStartedError,
    is_cancelled_exception,
)

from workflows.search_attributes import ORGANIZATION

with workflow.unsafe.imports_passed_through():
    from activities.ledger import LedgerActivities, OrganizationsPage, Progress, Stage, Verification

NIGHTLY_ID = "nightly-verification"
MEMO_ID = "verification_id"
"""The memo that tells a second request which verification it is that runs."""

LEDGER_INVALID = "LedgerInvalid"
"""The type of the error with which a verification ends that found something."""

ORGANIZATIONS_PER_RUN = 100
AT_ONCE = 4
# Checking can wait: the same workers process events and carry money, in the order of priorities where they are busy.
LOW_PRIORITY_KEY = 5

_QUICK = timedelta(seconds=30)
_RETRY = RetryPolicy(maximum_interval=timedelta(seconds=30))


@dataclass(frozen=True)
class VerificationInput:
    """Whose ledger, and the id of the record. `walk` is None at the start: then it is where the run before stopped."""

    organization_id: UUID
    verification_id: UUID
    walk: dict[str, Any] | None = None


@dataclass(frozen=True)
class NightlyInput:
    """How far the night has come. `searchable` says that Scrip's search attributes are registered."""

    searchable: bool
    after: UUID | None = None
    checked: int = 0
    invalid: int = 0
    unfinished: int = 0


def workflow_id(organization_id: UUID) -> str:
    """The id of the workflow that verifies this organization's ledger."""
    return f"verify/{organization_id}"


def priority(organization_id: UUID) -> Priority:
    """Behind everything else, and no organization before another."""
    return Priority(priority_key=LOW_PRIORITY_KEY, fairness_key=str(organization_id))


@workflow.defn(name="LedgerVerification")
class LedgerVerification:
    """Checks one organization's chain from genesis to the head as it was at the start."""

    @workflow.run
    async def run(self, request: VerificationInput) -> Progress:
        """Check the chain; how it ended. Raises ApplicationError `LedgerInvalid` when something is wrong with it."""
        try:
            progress = await self._verify(request)
        except (ActivityError, asyncio.CancelledError):
            await asyncio.shield(self._abandon(request))
            raise
        if progress.problem is not None:
            raise ApplicationError(_finding(progress), type=LEDGER_INVALID, non_retryable=True)
        return progress

    async def _verify(self, request: VerificationInput) -> Progress:
        walk = request.walk
        if walk is None:
            walk = (await self._begin(request)).walk
        while True:
            progress = await self._advance(replace(request, walk=walk))
            workflow.set_current_details(_details(progress))
            if progress.finished:
                return progress
            walk = progress.walk
            if workflow.info().is_continue_as_new_suggested():
                workflow.continue_as_new(replace(request, walk=walk))

    async def _begin(self, request: VerificationInput) -> Progress:
        return await workflow.execute_activity_method(
            LedgerActivities.begin_verification,
            Verification(request.organization_id, request.verification_id),
            summary="fix the head as the target",
            start_to_close_timeout=_QUICK,
            retry_policy=_RETRY,
        )

    async def _advance(self, request: VerificationInput) -> Progress:
        assert request.walk is not None, "a walk has begun"
        return await workflow.execute_activity_method(
            LedgerActivities.verify_entries,
            Stage(request.organization_id, request.verification_id, request.walk),
            summary=f"from sequence {request.walk['sequence'] + 1}",
            start_to_close_timeout=timedelta(minutes=5),
            # Longer than the database lets one statement run, which is what lies between two heartbeats.
            heartbeat_timeout=timedelta(seconds=90),
            retry_policy=_RETRY,
        )

    async def _abandon(self, request: VerificationInput) -> None:
        await workflow.execute_activity_method(
            LedgerActivities.abandon_verification,
            Verification(request.organization_id, request.verification_id),
            summary="record that there is no result",
            start_to_close_timeout=_QUICK,
            retry_policy=_RETRY,
        )


@workflow.defn(name="NightlyVerification")
class NightlyVerification:
    """Checks every organization's ledger, a few at once, each as a LedgerVerification of its own."""

    @workflow.init
    def __init__(self, request: NightlyInput) -> None:
        self._night = request
        self._slots = asyncio.Semaphore(AT_ONCE)

    @workflow.run
    async def run(self, request: NightlyInput) -> NightlyInput:
        """Check a page of organizations, then go on as a new run; the last one returns the counts of the night.

        Raises ApplicationError `LedgerInvalid` at the end when a ledger was found invalid or could not be checked.
        """
        page = await workflow.execute_activity_method(
            LedgerActivities.list_organizations,
            OrganizationsPage(request.after, ORGANIZATIONS_PER_RUN),
            summary="the next organizations",
            start_to_close_timeout=_QUICK,
            retry_policy=_RETRY,
        )
        # With exceptions as results all of them are waited for: when the night is cancelled, so are its verifications.
        outcomes = await asyncio.gather(*(self._verify(id_) for id_ in page), return_exceptions=True)
        for outcome in outcomes:
            if outcome is not None:
                raise outcome
        if len(page) == ORGANIZATIONS_PER_RUN:
            workflow.continue_as_new(replace(self._night, after=page[-1]))
        if self._night.invalid or self._night.unfinished:
            raise ApplicationError(_summary(self._night), type=LEDGER_INVALID, non_retryable=True)
        return self._night

    async def _verify(self, organization_id: UUID) -> None:
        async with self._slots:
            try:
                await self._run_child(organization_id)
            except WorkflowAlreadyStartedError:
                # Somebody has asked for it just now: it is being checked.
                pass
            except ChildWorkflowError as error:
                if is_cancelled_exception(error) and workflow.cancellation_reason() is not None:
                    raise
                self._count_failure(error)
        self._night = replace(self._night, checked=self._night.checked + 1)
        workflow.set_current_details(_summary(self._night))

    async def _run_child(self, organization_id: UUID) -> None:
        verification_id = workflow.uuid4()
        attributes = [SearchAttributePair(ORGANIZATION, str(organization_id))] if self._night.searchable else []
        await workflow.execute_child_workflow(
            LedgerVerification.run,
            VerificationInput(organization_id, verification_id),
            id=workflow_id(organization_id),
            memo={MEMO_ID: str(verification_id)},
            search_attributes=TypedSearchAttributes(attributes),
            static_summary="Verification of the whole ledger",
            # A child that outlives a night that was terminated finds its result all the same.
            parent_close_policy=workflow.ParentClosePolicy.ABANDON,
            priority=priority(organization_id),
        )

    def _count_failure(self, error: ChildWorkflowError) -> None:
        if isinstance(error.cause, ApplicationError) and error.cause.type == LEDGER_INVALID:
            self._night = replace(self._night, invalid=self._night.invalid + 1)
        else:
            workflow.logger.error("a ledger could not be verified: %s", error.cause)
            self._night = replace(self._night, unfinished=self._night.unfinished + 1)


def _finding(progress: Progress) -> str:
    if progress.first_invalid_entry_id is None:
        return f"the ledger is invalid: {progress.problem}"
    return f"the ledger is invalid from entry {progress.first_invalid_entry_id} on: {progress.problem}"


def _details(progress: Progress) -> str:
    done = f"{progress.entries_checked:,} of {progress.head_sequence:,} entries checked"
    return done if progress.problem is None else f"{done}; **{_finding(progress)}**"


def _summary(night: NightlyInput) -> str:
    return f"{night.checked} ledgers checked: {night.invalid} invalid, {night.unfinished} without a result"
