"""Why a request is refused: an HTTP status and a sentence for the user."""

from __future__ import annotations


class RefusedError(Exception):
    """A request that is refused; the API answers with the status, pages show the sentence."""

    def __init__(self, status: int, detail: str, *, retry_seconds: float | None = None) -> None:
        """Describe the refusal.

        Args:
            status: HTTP status, 400 to 599.
            detail: what is wrong and what to do, without names of cases or files of other users.
            retry_seconds: when the request may succeed, for the header Retry-After.
        """
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.retry_seconds = retry_seconds


def not_found(what: str) -> RefusedError:
    """Return the refusal for something that does not exist, or that belongs to another user."""
    return RefusedError(404, f"There is no such {what}.")


def no_room() -> RefusedError:
    """Return the refusal while the disk is full."""
    return RefusedError(507, "The server's disk is full. Nothing was lost; try again later.", retry_seconds=60)
