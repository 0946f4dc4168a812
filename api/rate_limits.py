"""Token buckets, one per organization, and one per address for requests without a valid key. Contract: basics.md 3.

Buckets live in the memory of the process: with several API processes each grants the whole rate (docs/api.md).
Levels are integers, so the figures in the headers are exact.
"""

from collections import OrderedDict
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from uuid import UUID

from api.context import RateStatus
from domain.errors import Refusal

BUCKETS = 10_000
"""How many buckets are remembered; the one unused for longest is forgotten, which fills it."""

_TOKEN = 1_000_000
"""Levels count millionths of a token: in one microsecond a bucket regains exactly its rate."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


class TooManyRequests(Refusal):
    """429: the caller's bucket is empty, or its backlog is full. `retry_after_s` goes into `Retry-After`."""

    def __init__(self, message: str, retry_after_s: int = 1) -> None:
        super().__init__("too_many_requests", message)
        self.retry_after_s = max(1, retry_after_s)


@dataclass(slots=True)
class _Bucket:
    spent: int = 0  # millionths of tokens missing from a full bucket
    seen_us: int = 0


class RateLimiter:
    """The buckets of one process, keyed by organization or by client address."""

    def __init__(self) -> None:
        self._buckets: OrderedDict[UUID | str, _Bucket] = OrderedDict()

    def take(self, owner: UUID | str, rate: int, burst: int, now: datetime) -> RateStatus:
        """Take one token from `owner`'s bucket of `burst` tokens, refilled with `rate` per second; its state after.

        Raises TooManyRequests, with nothing taken, when there is none.
        """
        bucket, now_us = self._refilled(owner, rate, now)
        missing = bucket.spent + _TOKEN - burst * _TOKEN
        if missing > 0:
            wait_us = -(-missing // rate)
            raise TooManyRequests("rate limit exceeded", retry_after_s=-(-wait_us // 1_000_000))
        bucket.spent += _TOKEN
        return _status(bucket, rate, burst, now_us)

    def status(self, owner: UUID | str, rate: int, burst: int, now: datetime) -> RateStatus:
        """The state of `owner`'s bucket; nothing is taken."""
        bucket, now_us = self._refilled(owner, rate, now)
        return _status(bucket, rate, burst, now_us)

    def _refilled(self, owner: UUID | str, rate: int, now: datetime) -> tuple[_Bucket, int]:
        now_us = (now - _EPOCH) // _MICROSECOND
        bucket = self._buckets.get(owner)
        if bucket is None:
            bucket = self._buckets[owner] = _Bucket(seen_us=now_us)
            if len(self._buckets) > BUCKETS:
                self._buckets.popitem(last=False)
            return bucket, now_us
        self._buckets.move_to_end(owner)
        # A clock that was set back refills nothing.
        bucket.spent = max(0, bucket.spent - max(0, now_us - bucket.seen_us) * rate)
        bucket.seen_us = now_us
        return bucket, now_us


def _status(bucket: _Bucket, rate: int, burst: int, now_us: int) -> RateStatus:
    full_at_us = now_us + -(-bucket.spent // rate)
    remaining = max(0, (burst * _TOKEN - bucket.spent) // _TOKEN)
    return RateStatus(limit=burst, remaining=remaining, reset=-(-full_at_us // 1_000_000))
