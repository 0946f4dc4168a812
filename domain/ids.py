"""Identifiers. Contract: README.md "Identifiers"."""

from uuid import UUID, uuid5

from uuid_utils.compat import uuid7

EVENT_NAMESPACE = UUID("6f1c1a52-3c1e-5d0b-9a55-5c7d0e6b9a11")
OPERATION_NAMESPACE = UUID("b0b3a1de-8d7f-5a52-9a63-0f6a8f3d6c11")

__all__ = ["EVENT_NAMESPACE", "OPERATION_NAMESPACE", "event_id", "keyed_id", "new_id", "stopped_evaluation_id"]


def new_id() -> UUID:
    """A UUIDv7: rows made one after another lie side by side in the indexes."""
    return uuid7()


def event_id(program_id: UUID, idempotency_key: str) -> UUID:
    """The id of the event with this key: the same for every retry. Contract: rules-and-events.md 7.4."""
    return uuid5(EVENT_NAMESPACE, f"{program_id}:{idempotency_key}")


def keyed_id(program_id: UUID, operation: str, idempotency_key: str) -> UUID:
    """The id of what this operation makes with this key: the same for every retry.

    For what a workflow makes, whose own id follows from it. Contract: README.md "Identifiers".
    """
    return uuid5(OPERATION_NAMESPACE, f"{program_id}:{operation}:{idempotency_key}")


def stopped_evaluation_id(event_id: UUID, rule_id: UUID) -> UUID:
    """The id of the record of a rule that was stopped: it is not stored, and is the same whenever it is shown."""
    return uuid5(event_id, str(rule_id))
