"""Redemptions: participants spending AVAILABLE value, in one step or reserved first. Contract: redemptions.md 2 and 3.

Each function below is a transaction's whole work: it ends by sealing its entries with the commit, so the caller commits
at once after it and calls nothing else of the ledger's. A redemption's row changes under its participant's lock; locks
are taken in the global order (`domain.locks`).

    records.py     what a redemption is, how it is asked for, how its row is read
    create.py      the gates, and the two ways to make one
    pending.py     what becomes of a reserved one: confirm, cancel, expire
    reversals.py   giving value back
    queries.py     reads, which never meet a pending one that is overdue
"""

from domain.redemptions.create import consider_reservation, create, reserve
from domain.redemptions.pending import (
    cancel,
    confirm,
    expire,
    expire_due,
    expire_overdue,
    find_overdue,
    require_confirmable,
    require_in_time,
)
from domain.redemptions.queries import RedemptionFilter, find_page, get
from domain.redemptions.records import (
    DEFAULT_EXPIRY,
    LONGEST_EXPIRY,
    SHORTEST_EXPIRY,
    ConfirmRequest,
    Created,
    Redemption,
    RedemptionRequest,
    RedemptionStatus,
    Reversal,
)
from domain.redemptions.reversals import Reversed, ReverseRequest, consider_reversal, find_reversals, reverse

__all__ = [
    "DEFAULT_EXPIRY",
    "LONGEST_EXPIRY",
    "SHORTEST_EXPIRY",
    "ConfirmRequest",
    "Created",
    "Redemption",
    "RedemptionFilter",
    "RedemptionRequest",
    "RedemptionStatus",
    "Reversal",
    "ReverseRequest",
    "Reversed",
    "cancel",
    "confirm",
    "consider_reservation",
    "consider_reversal",
    "create",
    "expire",
    "expire_due",
    "expire_overdue",
    "find_overdue",
    "find_page",
    "find_reversals",
    "get",
    "require_confirmable",
    "require_in_time",
    "reserve",
    "reverse",
]
