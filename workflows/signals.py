"""Arguments of operators' signals, read leniently: where one doesn't fit a handler's type the SDK drops the signal, and
where there are too many it stops the workflow. So handlers take whatever is sent and say what they don't understand.
"""

from collections.abc import Sequence
from typing import Any
from uuid import UUID

from temporalio import workflow

MOST_ORDERS = 100
"""How many orders may wait to be carried out; further ones are refused."""


def sent_id(signal: str, sent: Sequence[Any], waiting: Sequence[object]) -> UUID | None:
    """The one id that an operator sent with this signal; None, with a line in the log, for anything else.

    `waiting` are the orders that haven't been carried out yet.
    """
    if len(waiting) >= MOST_ORDERS:
        workflow.logger.warning("signal %s is refused: %d orders are waiting already", signal, MOST_ORDERS)
        return None
    try:
        (text,) = sent
        return UUID(str(text))
    except ValueError:
        workflow.logger.warning("signal %s is refused: it takes one id", signal)
        return None
