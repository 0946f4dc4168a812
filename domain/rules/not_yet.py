"""What the contract has and this version does not run yet, refused at save with 400 instead of being ignored.

The one place: whoever adds a feature deletes its line here and finds every check that stood for it.
Contract: rules-and-events.md 5.
"""

ACTION_TYPES = frozenset({"SET_TIER"})


def message(what: str) -> str:
    """The sentence that says so, the same everywhere."""
    return f"this version does not run {what} yet"
