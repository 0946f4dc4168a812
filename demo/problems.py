"""The one error that the demo shows to people."""


class DemoProblem(Exception):
    """Something that the person who started the demo can put right; the message says what is wrong and what to do."""
