"""What can go wrong with an expression: before it runs (ExpressionError) and while it runs (EvaluationError)."""


class ExpressionError(ValueError):
    """The text is not an expression that may be saved. `str(error)` is a sentence with position and hint.

    `line` and `column` count from 1; they are None where the whole text is at fault. Contract: README.md, small print.
    """

    def __init__(
        self, message: str, line: int | None = None, column: int | None = None, hint: str | None = None
    ) -> None:
        self.message = message
        self.line = line
        self.column = column
        self.hint = hint
        where = f" at line {line}, column {column}" if line is not None else ""
        advice = f"; hint: {hint}" if hint else ""
        super().__init__(f"{message}{where}{advice}")


class EvaluationError(Exception):
    """The expression has no value for this data; `str(error)` is the cause, fit for an API answer."""


class MissingField(EvaluationError):
    """It read a payload field, a map key or a variable that is not there. Contract: rules-and-events.md 6.5."""


class EvaluationLimit(EvaluationError):
    """It used up its steps, its time or the size that a value may have. `&&` and `||` never absorb it."""
