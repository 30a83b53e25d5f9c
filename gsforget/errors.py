"""What can go wrong, as the person at the keyboard meets it: one sentence, a hint what to type, an exit status.

The ground floor of the package: standard library only, and every room may import it.
"""


class GsforgetError(Exception):
    """Base of all errors meant for people.

    Args:
        message: one sentence that says what is wrong and where.
        hint: what to type or change instead.
        kind: short stable identifier for programs, e.g. ``unknown_class``.
    """

    exit_status = 1
    default_kind = "failed"

    def __init__(self, message: str, hint: str = "", kind: str | None = None):
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.kind = kind or self.default_kind

    def to_json(self) -> dict[str, dict[str, str]]:
        return {"error": {"kind": self.kind, "message": self.message, "hint": self.hint}}


class RequestError(GsforgetError):
    """The request, data, arguments or installation do not fit (exit status 2)."""

    exit_status = 2
    default_kind = "bad_request"


class GateError(GsforgetError):
    """A gate failed: forgetting, retention, audit or parity; nothing was published (exit status 3)."""

    exit_status = 3
    default_kind = "gate_failed"


class SafetyError(GsforgetError):
    """Refused for safety: signature, rollback, hash, broken ledger, a pickle with code (exit status 4)."""

    exit_status = 4
    default_kind = "refused"
