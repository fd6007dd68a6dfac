"""Errors as HTTP answers: a status, and the form of the dialect in which was asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from fastapi.responses import JSONResponse

from steerbridge.errors import DataError, SteerbridgeError, SteeringFailed, UnsupportedFeature
from steerbridge.serving import Cancelled

OPENAI_TYPES: Final = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


@dataclass(frozen=True, slots=True)
class Trouble:
    """Why a request is not answered.

    Attributes:
        kind: TGI's name for it, or one like TGI's.
        field: of the body, if one is wrong.
    """

    status: int
    kind: str
    text: str
    field: str | None = None
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def body(self, path: str) -> dict[str, Any]:
        """The body of the answer, in the dialect of a path."""
        if path.startswith("/v1"):
            kind = OPENAI_TYPES.get(self.status, "invalid_request_error")
            error = {"message": self.text, "type": kind, "param": self.field, "code": self.kind}
            return {"error": error}
        if path.startswith("/api/"):
            return {"error": self.text}
        return {"error": self.text, "error_type": self.kind}

    def response(self, path: str) -> JSONResponse:
        return JSONResponse(self.body(path), self.status, dict(self.headers))


class NotAllowed(SteerbridgeError):
    """What this server was started without; `status` is that of the answer."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


def trouble(error: BaseException) -> Trouble:
    """What a client is told of an error."""
    if isinstance(error, NotAllowed):
        return Trouble(error.status, "validation", str(error))
    if isinstance(error, DataError):
        return Trouble(422, "validation", str(error), error.problem.field)
    if isinstance(error, UnsupportedFeature):
        return Trouble(422, "validation", str(error))
    if isinstance(error, Cancelled):
        return Trouble(503, "overloaded", "the server is closing")
    if isinstance(error, SteeringFailed):
        return Trouble(500, "steering", str(error))
    # Of a bug, or of the runtime: its text may tell what is nobody's business.
    return Trouble(500, "generation", f"internal error ({type(error).__name__}); see the log")
