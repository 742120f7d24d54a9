"""What can go wrong in a hub, and the HTTP status of each.

HubError
├── BadReference        400   text that the grammar of references, names, aliases or mixtures does not allow
├── Refused             400   an adapter folder with problems; carries every one of them
├── BadTensors          400   a safetensors file whose header cannot be trusted; carries every reason
├── TensorsUnusable     400   tensors of the right shapes whose values mean no adapter
├── BadUpload           400   bytes that are not what the upload said they would be
├── BadRequest          400   a request over the network that is not what the route takes
├── BaseUnusable        400   a base model that is there but whose shapes cannot be read
├── Unauthorized        401   no key, or one that is unknown, revoked or expired
├── Forbidden           403   a key without the scope, or beyond the names that it is for
├── NotFound            404   no such name, version, alias, digest or file
├── BaseNotFound        404   no such base model, embedded, on disk or in the Hugging Face cache
├── UploadGone          404   an upload that nobody began, or that has expired
├── AliasMoved          409   compare-and-set lost: the alias is not where the caller believed
├── InUse               409   a version that an alias still points to, or that a router has as an expert
├── WouldOverwrite      409   a folder that holds something else than what would be written there
├── UploadBusy          409   a piece that does not go on where the upload is, or that another process is sending now
├── LogLost             409   a watcher has seen more events than the hub has: it was put back to an older state
├── TooLarge            413   above a limit of bytes
├── Corrupt             500   stored bytes that do not match their digest
├── InternalError       500   a bug of ours, in the registry service
└── HubUnavailable      503   the hub cannot be opened, read, written or reached
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SHOWN_PROBLEMS = 20


@dataclass(frozen=True, slots=True)
class Problem:
    """One reason why a folder is no adapter: which file, which tensor or field, and what is wrong, with its limit."""

    file: str
    field: str | None
    reason: str

    def __str__(self) -> str:
        where = self.file if self.field is None else f"{self.file}: {self.field}"
        return f"{where}: {self.reason}"


class HubError(Exception):
    """The root: everything that a user, a file or the network can cause in this package."""

    status: int = 500


class BadReference(HubError):
    status = 400


class Refused(HubError):
    """Raised with all problems at once, so that one round of mending is enough."""

    status = 400

    def __init__(self, what: str, problems: Sequence[Problem]) -> None:
        self.what = what
        self.problems = tuple(problems)
        super().__init__(what, self.problems)

    def __str__(self) -> str:
        count = len(self.problems)
        head = f"{self.what} was refused: {count} problem{'' if count == 1 else 's'}"
        lines = [f"  {problem}" for problem in self.problems[:SHOWN_PROBLEMS]]
        if count > SHOWN_PROBLEMS:
            lines.append(f"  ... and {count - SHOWN_PROBLEMS} more")
        return "\n".join([head, *lines])


class BadTensors(HubError):
    status = 400

    def __init__(self, reasons: Sequence[tuple[str | None, str]]) -> None:
        self.reasons = tuple(reasons)
        super().__init__(self.reasons)

    def __str__(self) -> str:
        return "; ".join(reason if name is None else f"{name}: {reason}" for name, reason in self.reasons)


class TensorsUnusable(HubError):
    """Raised where the values are read: by a kind in a server, not at push."""

    status = 400


class BadUpload(HubError):
    status = 400


class BadRequest(HubError):
    status = 400


class BaseUnusable(HubError):
    status = 400


class Unauthorized(HubError):
    status = 401


class Forbidden(HubError):
    status = 403


class NotFound(HubError):
    status = 404


class BaseNotFound(HubError):
    status = 404


class UploadGone(HubError):
    status = 404


class AliasMoved(HubError):
    status = 409


class InUse(HubError):
    status = 409


class WouldOverwrite(HubError):
    status = 409


class UploadBusy(HubError):
    """`offset` is how many bytes of the piece the hub has."""

    status = 409

    def __init__(self, message: str, *, offset: int) -> None:
        self.offset = offset
        super().__init__(message)


class LogLost(HubError):
    status = 409


class TooLarge(HubError):
    status = 413


class Corrupt(HubError):
    status = 500


class InternalError(HubError):
    status = 500


class HubUnavailable(HubError):
    status = 503
