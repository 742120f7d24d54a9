"""RemoteHub: a hub that is reached over HTTP, with the same protocol as the one on this machine.

What is safe to say twice is said again when the network fails, with growing pauses, as long as `patience_s` without
any progress: reading, sending the pieces of a push, and its commit (the same bytes are the same version). What is not
(moving an alias, removing, keys) is said once; when the answer is lost, the error says that nobody knows, and how to
look. Every byte that arrives is re-hashed. A key goes to the origin that it was given for; redirects are refused.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

import httpx
from pydantic import TypeAdapter, ValidationError

from hub.blobs import gather
from hub.contract import LATEST, Adapter, Collected, Difference, Event, Pushed, Resolved, Verified
from hub.credentials import check_url
from hub.errors import BadReference, Corrupt, HubError, HubUnavailable, NotFound, UploadBusy, UploadGone
from hub.keys import Created, Key, Principal
from hub.ref import Reference, check_alias, check_name, printable
from hub.uploads import Missing, Upload
from hub.wire import API, History, hear

if TYPE_CHECKING:
    from hub.manifest import FileEntry, Manifest

T = TypeVar("T")
Progress = Callable[[str, int, int], None]  # file, bytes that are there, bytes in all

PATIENCE_S = 20.0
CONNECT_S = 5.0
READ_S = 60.0
SLOWEST_BYTES_S = 20e6  # of a hub that reads a file through before it answers: a commit, a resumed piece or download
WATCH_READ_S = 20.0  # the hub shows a sign of life more often than that
CHUNK_BYTES = 1 << 20
MAX_NOTE = 2000
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 3.0
_TRIES = 3
_AGAIN = frozenset({502, 503, 504})


class RemoteHub:
    """The Hub protocol over HTTP. Threads may share it. Units: seconds."""

    def __init__(
        self, url: str, *, key: str | None = None, patience_s: float = PATIENCE_S, progress: Progress | None = None
    ) -> None:
        self.url = check_url(url)
        self._patience_s = patience_s
        self._progress = progress
        headers = {"accept-encoding": "identity", "user-agent": "multigraft"}
        if key is not None:
            if not (key.isascii() and key.isprintable()) or " " in key:
                raise BadReference("the key holds characters that no key has; was it pasted whole?")
            headers["authorization"] = f"Bearer {key}"
        timeout = httpx.Timeout(READ_S, connect=CONNECT_S)
        self._http = httpx.Client(base_url=self.url, headers=headers, timeout=timeout, follow_redirects=False)

    def close(self) -> None:
        self._http.close()

    def push(
        self, folder: Path, name: str, *, aliases: Sequence[str] = (), note: str = "", base: Path | None = None
    ) -> Pushed:
        check_name(name)
        for alias in aliases:
            check_alias(alias)
        _check_note(note)
        from hub.validate import describe, validate
        from hub.wire import commit_body

        manifest = validate(folder, base=base)
        described, modules = describe(folder, base=base)
        body = commit_body(described, modules, aliases=list(aliases), note=note)
        for tries_left in reversed(range(_TRIES)):
            upload = self._begin(name, manifest)
            try:
                for missing in upload.missing:
                    self._send_file(folder, manifest, upload.upload, missing)
                path = f"{API}/uploads/{upload.upload}/commit"
                pushed = self._ask(Pushed, "POST", path, json=body, timeout=_timeout(manifest.files))
            except UploadGone:  # it expired, or our commit was done and its answer lost: then nothing is missing now
                if not tries_left:
                    raise
                continue
            if pushed.digest != manifest.digest:
                raise Corrupt(f"the hub has stored {name} as {pushed.digest}, here it is {manifest.digest}")
            return pushed
        raise AssertionError("the last try returns or raises")

    def resolve(self, reference: Reference, *, default_alias: str = LATEST) -> Resolved:
        asked = {"ref": str(reference), "default_alias": default_alias}
        return self._ask(Resolved, "GET", f"{API}/resolve", params=asked)

    def manifest(self, digest: str) -> Manifest:
        from hub.digest import check_digest
        from hub.manifest import parse_manifest

        return parse_manifest(self._send("GET", f"{API}/manifests/{check_digest(digest)}").text, digest)

    def read(self, digest: str, path: str) -> bytes:
        return b"".join(self.stream(digest, path))

    def stream(self, digest: str, path: str) -> Iterator[bytes]:
        entry = self.manifest(digest).file(path)
        if entry is None:
            raise NotFound(f"adapter {digest} has no file {printable(path)}")
        return self._fetch(digest, entry)

    def load(self, digest: str, entry: FileEntry) -> memoryview:
        return gather(self._fetch(digest, entry), entry.size)

    def at_hand(self, entry: FileEntry) -> bool:
        return False

    def pull(self, reference: Reference, folder: Path) -> Resolved:
        from hub.folder import pull_folder

        resolved = self.resolve(reference)
        manifest = self.manifest(resolved.digest)
        pull_folder(folder, manifest, lambda entry: self._fetch(resolved.digest, entry), what=str(reference))
        return resolved

    def verify(self, reference: Reference) -> Verified:
        from hub.compare import verify_files

        resolved = self.resolve(reference)
        return verify_files(resolved, self.manifest(resolved.digest), lambda entry: self._fetch(resolved.digest, entry))

    def move_alias(
        self, name: str, version: int, alias: str, *, expect: int | None = None, note: str = ""
    ) -> Event | None:
        _check_note(note)
        body = {"alias": check_alias(alias), "version": version, "expect": expect, "note": note}
        moved = self._send_once("POST", f"{API}/aliases/{_path(name)}", name, json=body)
        return _parse(Event | None, moved)

    def rollback(self, name: str, alias: str, *, note: str = "") -> Event:
        _check_note(note)
        body = {"alias": check_alias(alias), "note": note}
        return _parse(Event, self._send_once("POST", f"{API}/rollbacks/{_path(name)}", name, json=body))

    def remove(self, name: str, version: int, *, note: str = "") -> Event:
        _check_note(note)
        asked: dict[str, Any] = {"version": version, "note": note}
        removed = self._send_once("DELETE", f"{API}/versions/{_path(name)}", name, params=asked)
        return _parse(Event, removed)

    def collect(self) -> Collected:
        return self._ask(Collected, "POST", f"{API}/collect")

    def adapters(self, pattern: str | None = None) -> list[Adapter]:
        asked = {} if pattern is None else {"pattern": pattern}
        return _parse(list[Adapter], self._send("GET", f"{API}/adapters", params=asked))

    def log(self, name: str) -> list[Event]:
        return _parse(list[Event], self._send("GET", f"{API}/log/{_path(name)}"))

    def diff(self, before: Reference, after: Reference) -> Difference:
        from hub.compare import difference

        first, second = self.resolve(before), self.resolve(after)
        return difference(first, self.manifest(first.digest), second, self.manifest(second.digest))

    def head(self) -> int:
        return self._ask(int, "GET", f"{API}/head")

    def events(self, after: int) -> list[Event]:
        found: list[Event] = []
        while True:
            page = self._ask(History, "GET", f"{API}/history", params={"after": after})
            found += page.events
            if page.upto == after:
                return found
            after = page.upto

    def watch(self, after: int) -> Iterator[list[Event]]:
        timeout = httpx.Timeout(WATCH_READ_S, connect=CONNECT_S)
        try:
            with self._http.stream("GET", f"{API}/events", params={"after": after}, timeout=timeout) as answer:
                if answer.status_code != 200:
                    answer.read()
                    raise self._refusal(answer)
                for line in answer.iter_lines():
                    if line.startswith("data:"):
                        yield [_reader(Event).validate_json(line[5:])]
                    elif line.startswith(":"):
                        yield []
        except httpx.TransportError as error:
            raise self._lost(error) from error
        except ValidationError as error:
            raise HubUnavailable(f"{self.url} sends events that make no sense") from error
        raise HubUnavailable(f"{self.url} has ended the event stream")

    def whoami(self) -> Principal:
        """Who the hub takes us for."""
        return self._ask(Principal, "GET", f"{API}/whoami")

    def create_key(
        self, name: str, scopes: Sequence[str], *, names: Sequence[str] = ("*",), life_s: float | None = None
    ) -> Created:
        body = {"name": name, "scopes": list(scopes), "names": list(names), "life_s": life_s}
        return _parse(Created, self._send_once("POST", f"{API}/keys", None, json=body))

    def keys(self) -> list[Key]:
        return _parse(list[Key], self._send("GET", f"{API}/keys"))

    def revoke_key(self, key: str) -> Key:
        return _parse(Key, self._send_once("DELETE", f"{API}/keys/{_path(key)}", None))

    def _begin(self, name: str, manifest: Manifest) -> Upload:
        files = [{"path": entry.path, "size": entry.size, "sha256": entry.sha256} for entry in manifest.files]
        return self._ask(Upload, "POST", f"{API}/uploads", json={"name": name, "files": files})

    def _send_file(self, folder: Path, manifest: Manifest, upload: str, missing: Missing) -> None:
        """Send one file from where it stands, again and again, until the hub has it whole."""
        entry = next(entry for entry in manifest.files if entry.sha256 == missing.sha256)
        patience = _Patience(self._patience_s)
        offset = missing.offset
        while True:
            self._show(entry, offset)
            try:
                sent = self._send_piece(folder, manifest, entry, upload, offset)
                self._show(entry, sent.offset)
                if sent.offset == entry.size:
                    return
            except UploadBusy as error:
                if error.offset == entry.size and self._whole(upload, entry) is None:
                    return
                patience.wait(error)
            except HubUnavailable as error:
                patience.wait(error)
            stands = self._whole(upload, entry)
            if stands is None:
                return
            if stands > offset:
                patience.renew()
            offset = stands

    def _send_piece(self, folder: Path, manifest: Manifest, entry: FileEntry, upload: str, offset: int) -> Missing:
        from hub.validate import open_kept

        with open_kept(folder, manifest, entry=entry) as source:
            source.seek(offset)

            def body() -> Iterator[bytes]:
                left = entry.size - offset
                while left and (chunk := source.read(min(CHUNK_BYTES, left))):
                    left -= len(chunk)
                    yield chunk
                    self._show(entry, entry.size - left)

            headers = {"upload-offset": str(offset), "content-length": str(entry.size - offset)}
            path = f"{API}/uploads/{upload}/{entry.sha256}"
            sent = self._exchange("PATCH", path, content=body(), headers=headers, timeout=_timeout([entry]))
            return _parse(Missing, sent)

    def _whole(self, upload: str, entry: FileEntry) -> int | None:
        """How far the hub has come with a file; None when it has it."""
        state = self._ask(Upload, "GET", f"{API}/uploads/{upload}")
        return next((one.offset for one in state.missing if one.sha256 == entry.sha256), None)

    def _fetch(self, digest: str, entry: FileEntry) -> Iterator[bytes]:
        """The bytes of one file; what breaks off goes on where it broke off. Raises: Corrupt, NotFound."""
        hasher, position, held = hashlib.sha256(), 0, b""
        patience = _Patience(self._patience_s)
        while position < entry.size:
            try:
                for chunk in self._pieces(digest, entry, position):
                    patience.renew()
                    hasher.update(chunk)
                    position += len(chunk)
                    self._show(entry, position)
                    if held:
                        yield held
                    held = chunk
                if position < entry.size:
                    raise HubUnavailable(f"{self.url} sent {position} of the {entry.size} bytes of {entry.path}")
            except HubUnavailable as error:
                patience.wait(error)
        if hasher.hexdigest() != entry.sha256 or position != entry.size:
            raise Corrupt(f"{entry.path} of {digest} arrived damaged: its bytes hash to {hasher.hexdigest()}")
        if held:
            yield held

    def _pieces(self, digest: str, entry: FileEntry, start: int) -> Iterator[bytes]:
        path = f"{API}/files/{digest}/{quote(entry.path, safe='')}"
        headers = {"range": f"bytes={start}-"} if start else {}
        try:
            with self._http.stream("GET", path, headers=headers, timeout=_timeout([entry])) as answer:
                if answer.status_code != (206 if start else 200):
                    answer.read()
                    raise self._refusal(answer)
                yield from answer.iter_raw()  # as they come: what has arrived when it breaks is not asked for again
        except httpx.TransportError as error:
            raise self._lost(error) from error

    def _ask(self, kind: type[T], method: str, path: str, **options: Any) -> T:
        return _parse(kind, self._send(method, path, **options))

    def _send(self, method: str, path: str, **options: Any) -> httpx.Response:
        """For what may be said twice."""
        patience = _Patience(self._patience_s)
        while True:
            try:
                return self._exchange(method, path, **options)
            except HubUnavailable as error:
                patience.wait(error)

    def _send_once(self, method: str, path: str, name: str | None, **options: Any) -> httpx.Response:
        """For what may not: only a connection that was never made is tried again."""
        patience = _Patience(self._patience_s)
        while True:
            try:
                return self._answered(self._http.request(method, path, **options))
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                patience.wait(self._lost(error))
            except httpx.TransportError as error:
                look = "hub key ls" if name is None else f"hub log {name}"
                raise HubUnavailable(
                    f"the answer of {self.url} was lost ({_reason(error)}): whether it was done is not known; "
                    f"look with {look} before you try again"
                ) from error

    def _exchange(self, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            return self._answered(self._http.request(method, path, **options))
        except httpx.TransportError as error:
            raise self._lost(error) from error

    def _answered(self, answer: httpx.Response) -> httpx.Response:
        if answer.is_success:
            return answer
        raise self._refusal(answer)

    def _refusal(self, answer: httpx.Response) -> HubError:
        if answer.is_redirect:
            where = printable(answer.headers.get("location", ""))
            return BadReference(f"{self.url} redirects to {where}; a key never follows: use that address")
        otherwise = f"{self.url} answers {answer.status_code} and is no hub, or something stands before it"
        try:
            told = answer.json()
        except ValueError:
            told = None
        error = hear(told, otherwise=otherwise)
        if isinstance(error, HubUnavailable) and answer.status_code not in _AGAIN:
            return BadReference(str(error)) if answer.status_code < 500 else Corrupt(str(error))
        return error

    def _lost(self, error: httpx.TransportError) -> HubUnavailable:
        return HubUnavailable(f"{self.url} cannot be reached: {_reason(error)}")

    def _show(self, entry: FileEntry, there: int) -> None:
        if self._progress is not None:
            self._progress(entry.path, there, entry.size)


class _Patience:
    """Growing pauses between tries, until nothing has come of them for too long."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.renew()

    def renew(self) -> None:
        self._deadline = time.monotonic() + self._seconds
        self._pause_s = _FIRST_PAUSE_S

    def wait(self, error: HubError) -> None:
        """Raises: `error`, when patience is over."""
        pause_s = self._pause_s * random.uniform(0.5, 1.0)
        if time.monotonic() + pause_s > self._deadline:
            raise error
        time.sleep(pause_s)
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)


def _timeout(files: Iterable[FileEntry]) -> httpx.Timeout:
    """For what the hub answers when it has read these files through."""
    return httpx.Timeout(READ_S + sum(entry.size for entry in files) / SLOWEST_BYTES_S, connect=CONNECT_S)


@cache
def _reader(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _parse(kind: Any, answer: httpx.Response) -> Any:
    try:
        return _reader(kind).validate_json(answer.content)
    except ValidationError as error:
        raise HubUnavailable(f"{answer.url.copy_with(query=None)} gives an answer that makes no sense") from error


def _path(name: str) -> str:
    return quote(name, safe="/")


def _check_note(note: str) -> None:
    if len(note) > MAX_NOTE:
        raise BadReference(f"a note of {len(note)} characters is above the limit of {MAX_NOTE}")


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
