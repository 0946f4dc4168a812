"""One injectable clock: UTC everywhere, no naive datetime. Contract: README.md "Clock"."""

from collections.abc import Callable
from datetime import UTC, datetime

Clock = Callable[[], datetime]


def system_clock() -> datetime:
    """The present instant in UTC, with microseconds."""
    return datetime.now(UTC)


def format_timestamp(instant: datetime) -> str:
    """`instant` as RFC 3339 in UTC with `Z`; microseconds, left out when zero. Contract: README.md "Small print".

    Raises ValueError for a naive datetime.
    """
    if instant.tzinfo is None:
        raise ValueError("a timestamp needs a time zone")
    return instant.astimezone(UTC).replace(tzinfo=None).isoformat() + "Z"
