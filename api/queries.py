"""Query parameters that many lists share. Contract: basics.md 2.3."""

from collections.abc import Callable, Coroutine
from typing import Annotated, Any, Literal

from fastapi import Depends, Query

from api.models import ListOf, Pagination, Timestamp
from domain import limits
from domain.pagination import Page, PageRequest

SortDirection = Annotated[Literal["asc", "desc"], Query(description="Direction of the order.")]
Search = Annotated[
    str | None, Query(max_length=255, description="Keep rows that contain this text, whatever its case.")
]
IncludeArchived = Annotated[bool, Query(description="Also list what is archived.")]
From = Annotated[Timestamp | None, Query(alias="from", description="Stored at or after this instant.")]
To = Annotated[Timestamp | None, Query(description="Stored at or before this instant.")]
EventFrom = Annotated[Timestamp | None, Query(description="Occurred at or after this instant.")]
EventTo = Annotated[Timestamp | None, Query(description="Occurred at or before this instant.")]


def page_query(default: int, maximum: int) -> Callable[..., Coroutine[Any, Any, PageRequest]]:
    """A dependency that reads `limit` (clamped to `maximum`) and `cursor`."""

    async def read(
        limit: Annotated[
            int, Query(ge=1, description=f"Rows per page; more than {maximum} means {maximum}.")
        ] = default,
        cursor: Annotated[str | None, Query(description="`next_cursor` of the page before.")] = None,
    ) -> PageRequest:
        return PageRequest(min(limit, maximum), cursor)

    return read


PageOf50 = Annotated[PageRequest, Depends(page_query(limits.PAGE_DEFAULT, limits.PAGE_MAX))]
"""`limit` (default 50, at most 200) and `cursor`."""

PageOf20 = Annotated[PageRequest, Depends(page_query(20, 100))]
"""`limit` (default 20, at most 100) and `cursor`."""

PageOf50Max100 = Annotated[PageRequest, Depends(page_query(50, 100))]
"""`limit` (default 50, at most 100) and `cursor`."""


def pagination_of(page: Page[Any]) -> Pagination:
    """The `pagination` member for `page`."""
    return Pagination(has_more=page.has_more, next_cursor=page.next_cursor)


def listed(page: Page[Any], present: Callable[[Any], Any]) -> ListOf[Any]:
    """The envelope of `page`, each row shown by `present`."""
    # Nothing is validated again: rows come from our own tables, and this runs for every row of every list.
    return ListOf[Any].model_construct(data=[present(row) for row in page.items], pagination=pagination_of(page))
