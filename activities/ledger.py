"""Activities of background verification. Contract: README.md "Small print"; docs/ledger.md "In the background"."""

import logging
import time
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from temporalio import activity
from temporalio.exceptions import ApplicationError, CancelledError

from activities.threads import ThreadDatabases
from db.session import Database
from domain.errors import Refusal
from domain.ledger import verifications, verify
from domain.ledger.verify import Walk

logger = logging.getLogger("scrip.ledger")

SPAN_S = 30.0


@dataclass(frozen=True)
class Verification:
    """A verification of an organization's ledger."""

    organization_id: UUID
    verification_id: UUID


@dataclass(frozen=True)
class Stage:
    """The next part of a verification: `walk` is where the part before stopped, as `Progress` brought it."""

    organization_id: UUID
    verification_id: UUID
    walk: dict[str, Any]


@dataclass(frozen=True)
class Progress:
    """How far a verification has come. `walk` is what the next activity goes on with; the rest is for people."""

    walk: dict[str, Any]
    entries_checked: int
    head_sequence: int
    finished: bool
    first_invalid_entry_id: UUID | None
    problem: str | None


@dataclass(frozen=True)
class OrganizationsPage:
    """Which organizations to list: the first `limit` with an id above `after`."""

    after: UUID | None
    limit: int


class LedgerActivities:
    """The steps of a verification. They run in threads: hashing is computation, and heartbeats and workflow tasks must
    go on beside it.
    """

    def __init__(self, databases: ThreadDatabases) -> None:
        self._databases = databases

    @activity.defn(no_thread_cancel_exception=True)
    def begin_verification(self, request: Verification) -> Progress:
        """Record that the verification runs, and fix the head as its target. A repetition takes the head as it is then.

        Raises ApplicationError, not to be repeated, for an organization that doesn't exist.
        """
        return self._databases.run(lambda database: self._begin(database, request))

    @activity.defn(no_thread_cancel_exception=True)
    def verify_entries(self, request: Stage) -> Progress:
        """Check page after page, a transaction each, for half a minute or to the end; the record is kept up to date.

        The outcome is recorded, and a broken ledger logged as an error, with the last page. An attempt that follows
        a lost one goes on where the last heartbeat was.
        """
        return self._databases.run(lambda database: self._verify(database, request))

    @activity.defn(no_thread_cancel_exception=True)
    def abandon_verification(self, request: Verification) -> None:
        """Record that the verification ends without a result, unless it has one."""
        self._databases.run(lambda database: self._abandon(database, request))

    @activity.defn(no_thread_cancel_exception=True)
    def list_organizations(self, request: OrganizationsPage) -> list[UUID]:
        """A page of the organizations, in the order of their ids."""
        return self._databases.run(lambda database: self._list_organizations(database, request))

    async def _begin(self, database: Database, request: Verification) -> Progress:
        async with database.transaction(request.organization_id) as tx:
            try:
                walk = await verifications.begin(tx, request.verification_id)
            except Refusal as refusal:
                raise ApplicationError(refusal.message, type=refusal.code, non_retryable=True) from refusal
        return _progress(walk)

    async def _verify(self, database: Database, request: Stage) -> Progress:
        heartbeats = activity.info().heartbeat_details
        walk = verify.resume(heartbeats[0] if heartbeats else request.walk)
        ends_at = time.monotonic() + SPAN_S
        while not walk.finished and time.monotonic() < ends_at:
            async with database.transaction(request.organization_id) as tx:
                await verify.advance(tx, walk)
                await verifications.note(tx, request.verification_id, walk)
            activity.heartbeat(verify.save(walk))
            if activity.is_cancelled():
                raise CancelledError("cancelled between two pages")
        if walk.finished and not walk.valid:
            _report(request, walk)
        return _progress(walk)

    async def _abandon(self, database: Database, request: Verification) -> None:
        async with database.transaction(request.organization_id) as tx:
            await verifications.abandon(tx, request.verification_id)

    async def _list_organizations(self, database: Database, request: OrganizationsPage) -> list[UUID]:
        return await verifications.organizations_after(database, request.after, request.limit)


def _progress(walk: Walk) -> Progress:
    return Progress(
        walk=verify.save(walk),
        entries_checked=walk.entries_checked,
        head_sequence=walk.head_sequence,
        finished=walk.finished,
        first_invalid_entry_id=walk.first_invalid_entry_id,
        problem=walk.problem,
    )


def _report(request: Stage, walk: Walk) -> None:
    logger.error(
        "a ledger is invalid",
        extra={
            "organization_id": str(request.organization_id),
            "verification_id": str(request.verification_id),
            "first_invalid_entry_id": walk.first_invalid_entry_id and str(walk.first_invalid_entry_id),
            "problem": walk.problem,
            "entries_checked": walk.entries_checked,
        },
    )
