"""What the service says no with: one status, one JSON form, whatever the reason."""

import math
from typing import Any

# status -> what kind of error a client of OpenAI's protocol takes it for
_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class Refusal(Exception):
    """A request that gets no answer: the HTTP status, a short code for programs, a sentence for people.

    field: which part of the request it is about. retry_after: seconds after which another try is worth it.
    """

    def __init__(self, status: int, code: str, message: str, field: str | None = None,
                 retry_after: float | None = None):
        super().__init__(message)
        self.status, self.code, self.message, self.field, self.retry_after = status, code, message, field, retry_after

    @property
    def body(self) -> dict[str, Any]:
        """The JSON that goes out, in the form that OpenAI's clients read too."""
        kind = _KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.field, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """The HTTP headers that go with it."""
        headers = {} if self.retry_after is None else {"Retry-After": str(max(1, math.ceil(self.retry_after)))}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})
