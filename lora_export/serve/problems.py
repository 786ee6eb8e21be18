"""`Problem`: a request that is not answered, with its HTTP status, in the form of OpenAI's API."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lora_export.errors import EnvironmentUnusable, LoraExportError

# What OpenAI's client makes an exception of its own of, by status.
_KINDS = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    408: "timeout_error", 409: "conflict_error", 413: "request_too_large", 421: "invalid_request_error",
    429: "rate_limit_error", 499: "client_closed_request", 503: "unavailable_error", 504: "timeout_error",
}  # fmt: skip


class Problem(Exception):
    """A request is not answered.

    Args:
        param: The field of the request that it is about.
        code: A word for programs.
        retry_after_s: When it is worth another try.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after_s = retry_after_s

    @property
    def body(self) -> dict:
        kind = _KINDS.get(self.status, "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after_s is None else {"retry-after": str(self.retry_after_s)}


def problem_of(error: BaseException) -> Problem:
    """What a client is told of an error: all of one that is about the request, nothing of a defect."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, EnvironmentUnusable):
        return Problem(503, error.what, code="environment", retry_after_s=1)
    if isinstance(error, LoraExportError):
        return Problem(400, one_line(error), code="refused")
    return Problem(500, "The server failed to answer; its log says why", code="defect")


def problem_of_body(errors: Sequence[Mapping], *, in_body: bool = True) -> Problem:
    """The first field of a request that is wrong, by its name.

    Args:
        errors: As pydantic lists them.
        in_body: Whether the first part of each place says only that it is the body.
    """
    first = errors[0]
    field = ".".join(str(part) for part in first["loc"][int(in_body) :])
    if first["type"] == "extra_forbidden":
        return Problem(400, f"The field {field!r} is not supported", param=field, code="unsupported_field")
    if first["type"] == "json_invalid":
        return Problem(400, "The request is no JSON", code="bad_json")
    return Problem(400, f"{field or 'The request'}: {first['msg']}", param=field or None, code="bad_value")


def one_line(error: LoraExportError) -> str:
    """An error of this package as one sentence: what, where, expected, found, next."""
    where = error.where if "/" not in (error.where or "") else None  # a place on this machine is not the client's
    rows = ((None, error.what), ("where", where), ("expected", error.expected), ("found", error.found),
            ("next", error.next_step))  # fmt: skip
    return "; ".join(f"{label}: {text}" if label else text for label, text in rows if text)
