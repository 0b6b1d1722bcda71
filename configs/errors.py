"""The one exception class for mistakes that a user can mend."""


class UserError(Exception):
    """A mistake in the user's input: shown as one message without a stack trace, exit code 2.

    Every message says what is wrong, what was found, what was expected, and what to do.
    """

    def __init__(self, what: str, *, got: object = None, expected: object = None, fix: str = "") -> None:
        self.what = what
        parts = [what]
        if got is not None:
            parts.append(f"got: {got}")
        if expected is not None:
            parts.append(f"expected: {expected}")
        if fix:
            parts.append(f"to fix: {fix}")
        super().__init__("\n  ".join(parts))


class ConfigError(UserError):
    """A configuration that does not parse or contradicts itself."""
