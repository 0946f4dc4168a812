"""The demo's tests meet a system that runs as a user's does."""

from tests.system import running_system

__all__ = ["running_system"]
