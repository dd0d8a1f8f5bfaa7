"""The one exception that users see: a sentence and the next thing to do."""


class HtsrError(Exception):
    """A known failure.

    Args:
        message: one sentence that says what is wrong and where.
        hint: what the user can do about it; printed on a line of its own.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
