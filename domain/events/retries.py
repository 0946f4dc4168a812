"""When a curable failure is tried again. Contract: rules-and-events.md 7.6."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How many attempts an event has, and how long it waits between them, in seconds.

    The last wait serves for all further attempts; an empty schedule means no wait.
    """

    max_attempts: int = 5
    waits_s: Sequence[float] = (2, 4, 8, 16, 32)

    def wait_after(self, attempt: int) -> timedelta | None:
        """The wait after attempt number `attempt` (1 is the first) failed, or None when it was the last."""
        if attempt >= self.max_attempts:
            return None
        if not self.waits_s:
            return timedelta(0)
        return timedelta(seconds=self.waits_s[min(attempt, len(self.waits_s)) - 1])
