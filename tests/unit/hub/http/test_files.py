"""One kept file over HTTP: any range of it, and never the whole of one that is damaged on the disk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hub.digest import CHUNK_BYTES
from hub.manifest import CONFIG_FILE, README_FILE, WEIGHTS_FILE
from hub.methods import Limits
from hub.ref import parse_reference
from hub.registry import LocalHub
from tests.registries import ADMIN_KEY, threaded
from tests.unit.hub.makers import write_base, write_prompt

EXAMPLES = 60
TOKENS = 26_000  # so that the weights are a little more than three pieces


@dataclass(frozen=True)
class Kept:
    """One adapter of a registry: a small file, an empty one, and one of several pieces."""

    client: httpx.Client
    hub: LocalHub
    digest: str
    weights: bytes

    def ask(self, path: str = WEIGHTS_FILE, *, method: str = "GET", **headers: str) -> httpx.Response:
        return self.client.request(method, f"/api/v1/files/{self.digest}/{path}", headers=headers)

    def blob(self, path: str = WEIGHTS_FILE) -> Path:
        entry = self.hub.manifest(self.digest).file(path)
        assert entry is not None
        return self.hub.home / "blobs" / "sha256" / entry.sha256[:2] / entry.sha256


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kept]:
    root = tmp_path_factory.mktemp("files")
    folder = write_prompt(root / "adapter", write_base(root / "base"), tokens=TOKENS)
    (folder / README_FILE).write_bytes(b"")
    hub = LocalHub(root / "home", limits=Limits(max_virtual_tokens=TOKENS))
    digest = hub.push(folder, "team/legal").digest
    weights = (folder / WEIGHTS_FILE).read_bytes()
    assert 3 * CHUNK_BYTES < len(weights) < 4 * CHUNK_BYTES
    headers = {"authorization": f"Bearer {ADMIN_KEY}"}
    with threaded(hub) as url, httpx.Client(base_url=url, headers=headers, timeout=30) as client:
        yield Kept(client, hub, digest, weights)


@pytest.fixture
def damaged(kept: Kept) -> Iterator[Path]:
    """The blob of the weights, put right again after the test."""
    yield kept.blob()
    kept.blob().write_bytes(kept.weights)


def test_a_file_comes_whole_and_says_what_it_is(kept: Kept) -> None:
    answer = kept.ask()
    assert (answer.status_code, answer.content == kept.weights) == (200, True)
    assert answer.headers["etag"] == f'"{kept.blob().name}"'
    assert answer.headers["content-length"] == str(len(kept.weights))
    assert answer.headers["accept-ranges"] == "bytes"
    assert answer.headers["content-type"] == "application/octet-stream"


def test_an_empty_file_is_empty(kept: Kept) -> None:
    answer = kept.ask(README_FILE)
    assert (answer.status_code, answer.content, answer.headers["content-length"]) == (200, b"", "0")


@settings(max_examples=EXAMPLES, deadline=None)
@given(data=st.data())
def test_a_range_is_that_part_of_the_file(kept: Kept, data: st.DataObject) -> None:
    """Law, with the borders of pieces and of the file among the examples."""
    size = len(kept.weights)
    near = st.sampled_from([0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES, size - 2, size - 1])
    start = data.draw(near | st.integers(0, size - 1))
    last = data.draw(st.none() | near | st.integers(start, size + 10**6))
    answer = kept.ask(range=f"bytes={start}-{'' if last is None else last}")
    if last is not None and last < start:
        assert answer.status_code == 416
        return
    wanted = kept.weights[start : size if last is None else last + 1]
    assert (answer.status_code, answer.content == wanted) == (206, True)
    assert answer.headers["content-range"] == f"bytes {start}-{start + len(wanted) - 1}/{size}"
    assert answer.headers["content-length"] == str(len(wanted))


@pytest.mark.parametrize("path", [WEIGHTS_FILE, README_FILE])
def test_a_range_beyond_the_end_is_told_in_our_words(kept: Kept, path: str) -> None:
    size = kept.blob(path).stat().st_size
    for start in (size, size + 1, 10**15 - 1):
        answer = kept.ask(path, range=f"bytes={start}-")
        assert (answer.status_code, answer.headers["content-range"]) == (416, f"bytes */{size}")
        assert f"{path} has {size} bytes" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "header",
    ["bytes=-5", "bytes=0-1,5-6", "bytes=a-b", "bytes", "", "items=0-1", "bytes=0x1-", "bytes= 0-1", "bytes=1e3-",
     "bytes=" + "9" * 4000 + "-", "bytes=-", "bytes=\u0661-"],
)  # fmt: skip
def test_a_range_that_is_not_understood_is_passed_over_as_the_standard_says(kept: Kept, header: str) -> None:
    answer = kept.client.get(f"/api/v1/files/{kept.digest}/{CONFIG_FILE}", headers=[(b"range", header.encode("utf-8"))])
    assert (answer.status_code, answer.content) == (200, kept.blob(CONFIG_FILE).read_bytes())


def test_the_hugging_face_route_gives_the_same_bytes_and_the_length_without_them(kept: Kept) -> None:
    path = f"/team/legal/resolve/main/{WEIGHTS_FILE}"
    assert kept.client.get(path).content == kept.weights
    head = kept.client.head(path)
    assert (head.content, head.headers["content-length"]) == (b"", str(len(kept.weights)))
    part = kept.client.get(path, headers={"range": "bytes=5-9"})
    assert (part.status_code, part.content) == (206, kept.weights[5:10])
    part = kept.client.head(path, headers={"range": "bytes=5-9"})
    assert (part.status_code, part.content, part.headers["content-length"]) == (206, b"", "5")


@pytest.mark.parametrize(
    "path",
    ["nothing.json", "manifest.json", "..", "%2e%2e", "%2e%2e%2f%2e%2e%2fcatalogue.sqlite", "..%5c..%5cx", "%00",
     f"{CONFIG_FILE}%00", f".%2f{CONFIG_FILE}", "x" * 128, "%2fetc%2fpasswd", CONFIG_FILE.upper()],
)  # fmt: skip
def test_a_file_that_the_manifest_does_not_name_is_not_there(kept: Kept, path: str) -> None:
    answer = kept.ask(path)
    wanted = (400, "bad_request") if "%00" in path else (404, "not_found")
    assert (answer.status_code, answer.json()["error"]["code"]) == wanted


def received(kept: Kept, path: str, **headers: str) -> tuple[int, bytes, bool]:
    """Status, bytes, and whether the answer ended as it said it would."""
    found = b""
    with kept.client.stream("GET", path, headers=headers) as answer:
        try:
            for piece in answer.iter_raw():
                found += piece
        except httpx.RemoteProtocolError:
            return answer.status_code, found, False
        return answer.status_code, found, True


@pytest.mark.parametrize("header", [{}, {"range": "bytes=0-"}, {"range": "bytes=0-9"}, {"range": "bytes=3145000-"}])
@pytest.mark.parametrize("damage", ["first byte", "last byte", "cut", "longer", "cut at a piece", "other"])
def test_a_file_that_is_damaged_on_the_disk_is_never_sent_whole(
    kept: Kept, damaged: Path, damage: str, header: dict[str, str]
) -> None:
    good = kept.weights
    damaged.write_bytes(
        {
            "first byte": bytes([good[0] ^ 1]) + good[1:],
            "last byte": good[:-1] + bytes([good[-1] ^ 1]),
            "cut": good[:-1],
            "longer": good + b"x",
            "cut at a piece": good[: 2 * CHUNK_BYTES],
            "other": good[::-1],
        }[damage]
    )
    for path in (f"/api/v1/files/{kept.digest}/{WEIGHTS_FILE}", f"/team/legal/resolve/main/{WEIGHTS_FILE}"):
        status, found, whole = received(kept, path, **header)
        if whole:
            assert (status, b'"code": "corrupt"' in found) == (500, True)
        else:
            assert status in (200, 206)
    answer = kept.client.get(f"/api/v1/manifests/{kept.digest}")
    assert answer.status_code == 200, "the registry goes on"


def test_a_small_file_that_is_damaged_is_told_with_a_status(kept: Kept) -> None:
    blob = kept.blob(CONFIG_FILE)
    good = blob.read_bytes()
    try:
        blob.write_bytes(good + b" ")
        answer = kept.ask(CONFIG_FILE)
    finally:
        blob.write_bytes(good)
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "corrupt")
    assert str(kept.hub.home) not in answer.text


def test_a_file_that_is_gone_from_the_disk_is_told_with_a_status(kept: Kept, damaged: Path) -> None:
    damaged.unlink()
    answer = kept.ask()
    assert answer.status_code == 404
    assert str(kept.hub.home) not in answer.text


def test_a_removed_version_gives_no_bytes(kept: Kept, tmp_path: Path) -> None:
    folder = write_prompt(tmp_path / "other", write_base(tmp_path / "base"), tokens=2)
    digest = kept.hub.push(folder, "team/other").digest
    assert kept.client.get(f"/api/v1/files/{digest}/{WEIGHTS_FILE}").status_code == 200
    kept.hub.remove("team/other", 1)
    assert kept.client.get(f"/api/v1/files/{digest}/{WEIGHTS_FILE}").status_code == 404
    assert kept.hub.verify(parse_reference("team/legal")).digest == kept.digest
