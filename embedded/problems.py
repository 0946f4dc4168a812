"""The one error that the embedded mode shows to people."""

PROBLEM_EXIT_STATUS = 1
USAGE_EXIT_STATUS = 2


class StartupProblem(Exception):
    """Something that the person who started Scrip can put right; the message says what is wrong and what to do.

    `exit_status` is what the command ends with: 2 when an option has to change, else 1.
    """

    def __init__(self, message: str, *, exit_status: int = PROBLEM_EXIT_STATUS) -> None:
        super().__init__(message)
        self.exit_status = exit_status
