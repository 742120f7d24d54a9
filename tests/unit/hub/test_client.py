"""RemoteHub on a network that fails: what is said again, what is said once, where a key goes, and what is believed.

A real registry stands behind a relay that breaks connections at chosen bytes and requests.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hub.client import RemoteHub
from hub.contract import Pushed
from hub.digest import sha256_of
from hub.errors import BadReference, Corrupt, HubError, HubUnavailable, LogLost, NotFound, UploadGone
from hub.manifest import WEIGHTS_FILE
from hub.ref import parse_reference
from hub.registry import LocalHub
from tests.networks import WAIT_S, Relay, answer, answering
from tests.registries import ADMIN_KEY, Registry, threaded
from tests.unit.hub.makers import HEAD_DIM, HEADS, LAYERS, write_adapter, write_base, write_lora

WIDTH, TOKENS = 1024, 1000
PATIENCE_S = 20.0
SHORT_S = 0.3  # for what must fail in the end
TALK_BYTES = 32 << 10  # more than all heads and JSON bodies of one command take
UNREAD_BYTES = 192 << 10  # what has arrived but was not taken yet is lost when a connection breaks: uvicorn drops it
OK = answer("200 OK", json.dumps({"id": "x", "name": "ada", "scopes": ["read"], "names": ["*"]}))


@dataclass
class Far:
    """A hub, and the same seen through a relay."""

    near: LocalHub
    relay: Relay
    hub: RemoteHub

    def versions(self) -> list[int]:
        return [event.version for event in self.near.events(0) if event.kind == "pushed"]

    def moves(self) -> list[tuple[str | None, int]]:
        return [(event.alias, event.version) for event in self.near.events(0) if event.kind == "alias_moved"]


@pytest.fixture
def far(tmp_path: Path) -> Iterator[Far]:
    near = LocalHub(tmp_path / "home")
    with threaded(near) as url, Relay(url) as relay:
        hub = RemoteHub(relay.url, key=ADMIN_KEY, patience_s=PATIENCE_S)
        yield Far(near, relay, hub)
        hub.close()


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """An adapter of 4 MB: many times what a connection that breaks may lose."""
    wide = write_base(tmp_path / "wide", hidden_size=WIDTH, head_dim=HEAD_DIM)
    config = {
        "peft_type": "PROMPT_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(wide),
        "num_virtual_tokens": TOKENS,
        "token_dim": WIDTH,
        "num_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_transformer_submodules": 1,
    }
    values = np.random.default_rng(0).normal(size=(TOKENS, WIDTH)).astype(np.float32)
    return write_adapter(tmp_path / "large", config, {"prompt_embeddings": values})


def weight_bytes(folder: Path) -> int:
    return (folder / WEIGHTS_FILE).stat().st_size


def test_reading_is_tried_again_when_the_connection_breaks(far: Far, adapter: Path) -> None:
    far.near.push(adapter, "legal")
    far.relay.lose_answer_to(b"GET /api/v1/resolve", times=2)
    assert far.hub.resolve(parse_reference("legal")).version == 1
    assert far.relay.connections == 3


def test_reading_gives_up_when_patience_is_over_and_says_why(tmp_path: Path) -> None:
    with answering(b"") as (url, requests):
        with pytest.raises(HubUnavailable, match=rf"{url} cannot be reached: "):
            RemoteHub(url, patience_s=SHORT_S).head()
        assert len(requests) > 1


def test_busy_is_tried_again_and_no_other_refusal_is() -> None:
    busy = answer("503 Service Unavailable", '{"error": {"code": "hub_unavailable", "message": "the disk is full"}}')
    with answering(busy, busy, OK) as (url, requests):
        assert RemoteHub(url).whoami().name == "ada"
        assert len(requests) == 3
    with answering(busy) as (url, _), pytest.raises(HubUnavailable, match=r"^the disk is full$"):
        RemoteHub(url, patience_s=SHORT_S).head()
    gone = answer("404 Not Found", '{"error": {"code": "not_found", "message": "there is no adapter legal"}}')
    with answering(gone, OK) as (url, requests):
        with pytest.raises(NotFound, match=r"^there is no adapter legal$"):
            RemoteHub(url).log("legal")
        assert len(requests) == 1


def test_a_push_that_breaks_off_goes_on_where_it_was(far: Far, large: Path) -> None:
    far.relay.break_at("up", after=2_000_000)
    assert far.hub.push(large, "legal").version == 1
    assert far.relay.connections > 1
    assert far.relay.passed["up"] < weight_bytes(large) + UNREAD_BYTES + TALK_BYTES
    assert far.hub.verify(parse_reference("legal")).version == 1


def test_a_network_that_breaks_again_and_again_is_outlasted_while_something_comes_through(
    far: Far, large: Path, tmp_path: Path
) -> None:
    hub = RemoteHub(far.relay.url, key=ADMIN_KEY, patience_s=2.0)
    far.relay.break_at("up", after=700_000, times=5)
    hub.push(large, "legal")
    far.relay.break_at("down", after=700_000, times=5)
    hub.pull(parse_reference("legal"), tmp_path / "out")
    assert (tmp_path / "out" / WEIGHTS_FILE).read_bytes() == (large / WEIGHTS_FILE).read_bytes()
    assert far.relay.passed["up"] < weight_bytes(large) + 5 * UNREAD_BYTES + TALK_BYTES
    assert far.relay.passed["down"] < weight_bytes(large) + TALK_BYTES


def test_a_commit_whose_answer_is_lost_is_said_again_and_makes_one_version(far: Far, adapter: Path) -> None:
    far.relay.lose_answer_to(b"/commit HTTP")
    pushed = far.hub.push(adapter, "legal", aliases=["prod"])
    assert (pushed.version, far.versions()) == (1, [1])
    assert sorted(far.moves()) == [("latest", 1), ("prod", 1)]


def test_a_piece_whose_answer_is_lost_is_not_sent_again(far: Far, large: Path) -> None:
    far.relay.lose_answer_to(b"PATCH ")
    far.hub.push(large, "legal")
    assert far.relay.passed["up"] < weight_bytes(large) + TALK_BYTES


ONCE: dict[str, tuple[str, Callable[[RemoteHub], Any]]] = {
    "an alias move": ("POST /api/v1/aliases/", lambda hub: hub.move_alias("team/bot", 2, "prod")),
    "a rollback": ("POST /api/v1/rollbacks/", lambda hub: hub.rollback("team/bot", "prod")),
    "a removal": ("DELETE /api/v1/versions/", lambda hub: hub.remove("team/bot", 3)),
}


@pytest.mark.parametrize("what", ONCE)
def test_what_must_not_be_done_twice_is_said_once_and_a_lost_answer_is_told_with_where_to_look(
    far: Far, tmp_path: Path, base: Path, what: str
) -> None:
    request, act = ONCE[what]
    for seed, aliases in enumerate((["prod"], [], [], [])):
        far.near.push(write_lora(tmp_path / str(seed), base, seed=seed), "team/bot", aliases=aliases)
    far.near.move_alias("team/bot", 4, "prod")
    before = far.near.head()
    far.relay.lose_answer_to(request.encode())
    with pytest.raises(HubUnavailable, match="whether it was done is not known; look with hub log team/bot before"):
        act(far.hub)
    assert len(far.near.events(before)) == 1, "it was done, once"


def test_a_key_whose_making_or_revoking_is_not_answered_is_looked_up_with_key_ls(far: Far) -> None:
    far.relay.lose_answer_to(b"POST /api/v1/keys")
    with pytest.raises(HubUnavailable, match="not known; look with hub key ls"):
        far.hub.create_key("ci", ["read"])
    (key,) = far.near.keys.listed()
    far.relay.lose_answer_to(b"DELETE /api/v1/keys")
    with pytest.raises(HubUnavailable, match="not known; look with hub key ls"):
        far.hub.revoke_key(key.key)
    assert far.hub.keys()[0].revoked_at is not None


def test_a_hub_that_is_not_there_yet_is_waited_for_also_by_what_is_said_once(tmp_path: Path, adapter: Path) -> None:
    """A connection that was never made has asked for nothing."""
    LocalHub(tmp_path / "home").push(adapter, "legal")
    registry = Registry(tmp_path / "home")
    with pytest.raises(HubUnavailable, match="cannot be reached"):
        registry.hub(patience_s=0).move_alias("legal", 1, "prod")
    moved: list[Any] = []
    waiting = threading.Thread(target=lambda: moved.append(registry.hub().move_alias("legal", 1, "prod")))
    waiting.start()
    registry.start()
    try:
        waiting.join(WAIT_S)
        assert [event.version for event in moved] == [1]
    finally:
        registry.kill()


def test_redirects_are_refused_and_a_key_goes_nowhere_else(tmp_path: Path, adapter: Path) -> None:
    with answering(OK) as (elsewhere, stolen):
        for status in ("301 Moved", "302 Found", "307 Temporary Redirect", "308 Permanent Redirect"):
            with answering(answer(status, "", f"location: {elsewhere}/api/v1/whoami")) as (url, requests):
                hub = RemoteHub(url, key="secret-key")
                asked: list[Callable[[], Any]] = [
                    hub.whoami,
                    lambda hub=hub: hub.push(adapter, "legal"),  # type: ignore[misc]
                    lambda hub=hub: hub.move_alias("legal", 1, "prod"),  # type: ignore[misc]
                    lambda hub=hub: next(hub.watch(0)),  # type: ignore[misc]
                ]
                for ask in asked:
                    with pytest.raises(BadReference, match=rf"{url} redirects to {elsewhere}/api/v1/whoami; a key"):
                        ask()
                assert len(requests) == len(asked)
                assert all(b"authorization: Bearer secret-key\r\n" in request for request in requests)
        assert stolen == []


def test_the_environments_proxy_and_netrc_get_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An address is what the user said it is; a key that was not given is not found elsewhere."""
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login ada password stranger\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with answering(OK) as (url, requests):
        RemoteHub(url).whoami()
    assert b"authorization" not in requests[0].lower()


@pytest.mark.parametrize("key", ["two words", "line\nbreak", "smörgås", "tab\t", "nul\0"])
def test_a_key_that_no_header_can_hold_is_refused_before_it_is_sent(key: str) -> None:
    with answering(OK) as (url, requests):
        with pytest.raises(BadReference, match="characters that no key has"):
            RemoteHub(url, key=key)
        assert requests == []


def test_a_download_that_breaks_off_goes_on_where_it_was(far: Far, large: Path, tmp_path: Path) -> None:
    far.near.push(large, "legal")
    far.relay.break_at("down", after=1_500_000)
    far.hub.pull(parse_reference("legal"), tmp_path / "out")
    assert far.relay.connections > 1
    assert far.relay.passed["down"] < weight_bytes(large) + TALK_BYTES, "no byte is fetched twice"
    assert (tmp_path / "out" / WEIGHTS_FILE).read_bytes() == (large / WEIGHTS_FILE).read_bytes()


def test_a_download_that_never_goes_on_fails_and_leaves_no_folder(far: Far, large: Path, tmp_path: Path) -> None:
    pushed = far.near.push(large, "legal")
    far.relay.lose_answer_to(b"GET /api/v1/files/", times=1000)
    with pytest.raises(HubUnavailable, match="cannot be reached"):
        RemoteHub(far.relay.url, key=ADMIN_KEY, patience_s=SHORT_S).pull(parse_reference("legal"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith((".", "out"))] == []
    assert far.near.manifest(pushed.digest).file(WEIGHTS_FILE)


@pytest.mark.parametrize("text", ["all is right", '"bias":"none"'])
def test_bytes_that_changed_on_the_way_are_refused(far: Far, adapter: Path, tmp_path: Path, text: str) -> None:
    """Of a file, and of the manifest."""
    (adapter / "README.md").write_text("all is right")
    pushed = far.near.push(adapter, "legal")
    far.relay.replace(text.encode(), text.swapcase().encode())
    for refused in (
        lambda: far.hub.pull(parse_reference("legal"), tmp_path / "out"),
        lambda: far.hub.verify(parse_reference("legal")),
        lambda: far.hub.read(pushed.digest, "README.md"),
    ):
        with pytest.raises(Corrupt):
            refused()
    assert not (tmp_path / "out").exists()


def test_bytes_that_are_damaged_in_the_hub_are_told_and_not_asked_for_again(far: Far, large: Path) -> None:
    pushed = far.near.push(large, "legal")
    entry = far.near.manifest(pushed.digest).file(WEIGHTS_FILE)
    assert entry is not None
    blob = far.near.home / "blobs" / "sha256" / entry.sha256[:2] / entry.sha256
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    with pytest.raises(Corrupt, match="damaged"):
        far.hub.verify(parse_reference("legal"))
    assert far.relay.passed["down"] < weight_bytes(large), "the last piece was never sent, and no other twice"


def test_a_push_of_the_same_bytes_mends_what_was_damaged_in_the_hub(far: Far, large: Path) -> None:
    far.hub.push(large, "legal")
    blob = far.near.home / "blobs" / "sha256" / (sha256 := sha256_of((large / WEIGHTS_FILE).read_bytes()))[:2] / sha256
    data = bytearray(blob.read_bytes())
    data[len(data) // 2] ^= 1
    blob.write_bytes(data)
    with pytest.raises(Corrupt):
        far.near.verify(parse_reference("legal"))
    pushed = far.hub.push(large, "legal")
    assert (pushed.version, far.versions()) == (1, [1])
    assert far.near.verify(parse_reference("legal")).version == 1


def test_a_hub_that_forgets_every_upload_is_not_asked_for_ever(tmp_path: Path, adapter: Path) -> None:
    with threaded(LocalHub(tmp_path / "home", lease_s=0)) as url, pytest.raises(UploadGone, match="has expired"):
        RemoteHub(url, key=ADMIN_KEY).push(adapter, "legal")


def test_a_file_that_is_changed_while_it_is_pushed_becomes_no_version(far: Far, large: Path) -> None:
    def change(file: str, there: int, size: int) -> None:
        if file == WEIGHTS_FILE and not there:
            data = bytearray((large / WEIGHTS_FILE).read_bytes())
            data[-1] ^= 1
            (large / WEIGHTS_FILE).write_bytes(data)

    hub = RemoteHub(far.relay.url, key=ADMIN_KEY, progress=change)
    with pytest.raises(HubError, match=r"hash to [0-9a-f]{64}, not to"):
        hub.push(large, "legal")
    assert far.versions() == []
    assert list((far.near.home / "uploads").rglob("*.part")) == []


def test_what_is_no_hub_is_told_in_one_line() -> None:
    page = "<html>It works!</html>"
    cases: dict[bytes, tuple[type[HubError], str]] = {
        answer("200 OK", page): (HubUnavailable, "gives an answer that makes no sense"),
        answer("200 OK", '{"login": "admin"}'): (HubUnavailable, "gives an answer that makes no sense"),
        answer("404 Not Found", page): (BadReference, "answers 404 and is no hub"),
        answer("403 Forbidden", '{"error": "nginx"}'): (BadReference, "answers 403 and is no hub"),
        answer("502 Bad Gateway", page): (HubUnavailable, "answers 502 and is no hub, or something stands before it"),
        b"SSH-2.0-OpenSSH_9.2\r\n": (HubUnavailable, "cannot be reached"),
    }
    for told, (kind, words) in cases.items():
        with answering(told) as (url, _), pytest.raises(kind) as caught:
            RemoteHub(url, key="k", patience_s=SHORT_S).whoami()
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_hub_that_stores_something_else_than_what_was_sent_is_not_believed(far: Far, adapter: Path) -> None:
    expected = LocalHub(far.near.home.parent / "other").push(adapter, "legal").digest
    far.relay.replace(expected.encode(), b"sha256:" + b"0" * 64)
    with pytest.raises(Corrupt, match=rf"has stored legal as sha256:0+, here it is {expected}"):
        far.hub.push(adapter, "legal")


def test_a_kind_that_only_a_newer_hub_knows_is_listed_and_described(far: Far, adapter: Path) -> None:
    digest = far.hub.push(adapter, "legal").digest
    far.relay.replace(b'"kind":"lora"', b'"kind":"nova"')
    assert far.hub.adapters()[0].versions[0].kind == far.hub.manifest(digest).kind == "nova"
    far.relay.replace(b'"kind":"lora"', b'"kind":"no/a"')
    with pytest.raises(Corrupt, match="is damaged: 1 fields do not fit"):
        far.hub.manifest(digest)


def test_a_watcher_learns_of_everything_and_is_told_when_the_hub_is_lost(far: Far, adapter: Path) -> None:
    watching = far.hub.watch(0)
    assert next(watching) == []
    far.near.push(adapter, "legal", aliases=["prod"])
    seen = [next(watching)[0] for _ in range(3)]
    assert seen == far.near.events(0)
    far.relay.break_all()
    with pytest.raises(HubUnavailable):
        next(watching)
    again = far.hub.watch(seen[0].seq)
    assert [next(again), next(again)] == [[], [seen[1]]]
    with pytest.raises(LogLost):
        next(far.hub.watch(99))


def test_progress_tells_how_far_each_file_has_come(far: Far, large: Path, tmp_path: Path) -> None:
    shown: list[tuple[str, int, int]] = []
    hub = RemoteHub(far.relay.url, key=ADMIN_KEY, progress=lambda *told: shown.append(told))
    pushed: Pushed = hub.push(large, "legal")
    weights = [there for file, there, size in shown if file == WEIGHTS_FILE and size == weight_bytes(large)]
    assert weights == sorted(weights)
    assert (weights[0], weights[-1]) == (0, weight_bytes(large))
    shown.clear()
    assert sha256_of(hub.read(pushed.digest, WEIGHTS_FILE)) == sha256_of((large / WEIGHTS_FILE).read_bytes())
    assert shown[-1] == (WEIGHTS_FILE, weight_bytes(large), weight_bytes(large))
