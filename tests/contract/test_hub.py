"""What every hub does, wherever it lies."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from hub.contract import Event, Hub
from hub.digest import sha256_of
from hub.errors import AliasMoved, BadReference, InUse, LogLost, NotFound, Refused, WouldOverwrite
from hub.manifest import CONFIG_FILE, WEIGHTS_FILE
from hub.ref import parse_reference
from tests.contract.conftest import Folders
from tests.unit.hub.kinds import CASES
from tests.unit.hub.makers import write_base, write_lora, write_router


def at(hub: Hub, reference: str) -> int:
    return hub.resolve(parse_reference(reference)).version


def told(event: Event | None) -> tuple[str, str | None, int | None, int, bool]:
    assert event is not None
    return event.kind, event.alias, event.previous, event.version, event.rollback


def test_an_empty_hub_has_nothing(hub: Hub) -> None:
    assert hub.adapters() == []
    assert hub.head() == 0
    assert hub.events(0) == []
    assert hub.collect().blobs == 0
    for reference in ("legal", "legal@1", "legal@prod", "legal@sha256:" + "0" * 12):
        with pytest.raises(NotFound):
            hub.resolve(parse_reference(reference))
    with pytest.raises(NotFound):
        hub.log("legal")


def test_versions_are_counted_from_one_and_latest_follows_each_push(hub: Hub, folders: Folders) -> None:
    for version in (1, 2, 3):
        pushed = hub.push(folders[f"lora-{version}"], "legal")
        assert (pushed.name, pushed.version, pushed.created) == ("legal", version, True)
        assert at(hub, "legal") == at(hub, "legal@latest") == version
    assert hub.push(folders["lora-1"], "team/other").version == 1


def test_the_same_bytes_are_the_same_version_and_latest_goes_there(hub: Hub, folders: Folders) -> None:
    first = hub.push(folders["lora-1"], "legal")
    hub.push(folders["lora-2"], "legal")
    again = hub.push(folders["lora-1"], "legal")
    assert (again.version, again.digest, again.created) == (1, first.digest, False)
    assert at(hub, "legal") == 1
    assert hub.push(folders["lora-3"], "legal").version == 3


def test_the_same_bytes_under_two_names_have_one_digest(hub: Hub, folders: Folders) -> None:
    assert hub.push(folders["lora-1"], "legal").digest == hub.push(folders["lora-1"], "tone").digest


def test_a_push_that_is_refused_leaves_no_trace(hub: Hub, tmp_path: Path, folders: Folders) -> None:
    broken = Path(shutil.copytree(folders["lora-1"], tmp_path / "broken"))
    (broken / "evil.bin").write_bytes(b"")
    with pytest.raises(Refused):
        hub.push(broken, "legal")
    assert hub.adapters() == []
    assert hub.head() == 0


@pytest.mark.parametrize("kind", ["lora-0", "ia3", "prefix", "prompt", "p-tuning", *CASES])
def test_every_kind_goes_in_and_comes_out_with_the_same_bytes(
    hub: Hub, tmp_path: Path, folders: Folders, kind: str
) -> None:
    pushed = hub.push(folders[kind], "legal")
    manifest = hub.manifest(pushed.digest)
    assert kind.startswith(manifest.kind)
    resolved = hub.pull(parse_reference("legal@1"), tmp_path / "out")
    assert resolved.digest == pushed.digest
    assert (tmp_path / "out" / WEIGHTS_FILE).read_bytes() == (folders[kind] / WEIGHTS_FILE).read_bytes()
    for entry in manifest.files:
        data = hub.read(pushed.digest, entry.path)
        assert data == (tmp_path / "out" / entry.path).read_bytes()
        assert (len(data), sha256_of(data)) == (entry.size, entry.sha256)
        loaded = hub.load(pushed.digest, entry)
        assert loaded == data
        assert not loaded.readonly, "it is the caller's own"
    assert hub.verify(parse_reference("legal")).files == len(manifest.files)


def test_what_was_pulled_is_the_same_version_when_it_is_pushed(hub: Hub, tmp_path: Path, folders: Folders) -> None:
    digest = hub.push(folders["lora-1"], "legal").digest
    hub.pull(parse_reference("legal"), tmp_path / "out")
    again = hub.push(tmp_path / "out", "legal")
    assert (again.digest, again.created) == (digest, False)


def test_peft_writing_its_sets_in_another_order_makes_no_new_version(
    hub: Hub, tmp_path: Path, folders: Folders
) -> None:
    digest = hub.push(folders["lora-1"], "legal").digest
    other = Path(shutil.copytree(folders["lora-1"], tmp_path / "other"))
    config = json.loads((other / CONFIG_FILE).read_text())
    config["target_modules"].reverse()
    (other / CONFIG_FILE).write_text(json.dumps(dict(reversed(config.items())), indent=4))
    assert hub.push(other, "legal").digest == digest


def test_a_pull_never_overwrites_anything_else(hub: Hub, tmp_path: Path, folders: Folders) -> None:
    hub.push(folders["lora-1"], "legal")
    hub.push(folders["lora-2"], "legal")
    (tmp_path / "empty").mkdir()
    hub.pull(parse_reference("legal@1"), tmp_path / "empty")
    hub.pull(parse_reference("legal@1"), tmp_path / "empty")  # it is there already
    with pytest.raises(WouldOverwrite):
        hub.pull(parse_reference("legal@2"), tmp_path / "empty")
    assert (tmp_path / "empty" / WEIGHTS_FILE).read_bytes() == (folders["lora-1"] / WEIGHTS_FILE).read_bytes()
    (tmp_path / "empty" / "mine.txt").write_text("mine")
    with pytest.raises(WouldOverwrite):
        hub.pull(parse_reference("legal@1"), tmp_path / "empty")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(WouldOverwrite):
        hub.pull(parse_reference("legal@2"), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_digest_or_its_beginning_finds_its_version(hub: Hub, folders: Folders) -> None:
    first = hub.push(folders["lora-1"], "legal")
    hub.push(folders["lora-2"], "legal")
    assert at(hub, f"legal@{first.digest}") == 1
    assert at(hub, f"legal@{first.digest[:20]}") == 1
    with pytest.raises(NotFound):
        hub.resolve(parse_reference(f"tone@{first.digest}"))


def test_a_resolved_reference_names_the_alias_that_was_followed(hub: Hub, folders: Folders) -> None:
    hub.push(folders["lora-1"], "legal", aliases=["prod"])
    assert hub.resolve(parse_reference("legal")).alias == "latest"
    assert hub.resolve(parse_reference("legal"), default_alias="prod").alias == "prod"
    assert hub.resolve(parse_reference("legal@1")).alias is None
    with pytest.raises(NotFound, match="no alias staging"):
        hub.resolve(parse_reference("legal"), default_alias="staging")


def test_a_push_may_move_further_aliases_with_it(hub: Hub, folders: Folders) -> None:
    hub.push(folders["lora-1"], "legal", aliases=["prod", "staging"])
    hub.push(folders["lora-2"], "legal", aliases=["staging"])
    (adapter,) = hub.adapters()
    assert dict(adapter.aliases) == {"latest": 2, "prod": 1, "staging": 2}


def test_an_alias_moves_only_from_where_it_is_expected(hub: Hub, folders: Folders) -> None:
    for seed in (1, 2, 3):
        hub.push(folders[f"lora-{seed}"], "legal")
    assert told(hub.move_alias("legal", 1, "prod", expect=0)) == ("alias_moved", "prod", None, 1, False)
    with pytest.raises(AliasMoved, match="points to version 1, not to no version"):
        hub.move_alias("legal", 2, "prod", expect=0)
    with pytest.raises(AliasMoved, match="points to version 1, not to version 3"):
        hub.move_alias("legal", 2, "prod", expect=3)
    assert at(hub, "legal@prod") == 1
    assert told(hub.move_alias("legal", 2, "prod", expect=1)) == ("alias_moved", "prod", 1, 2, False)
    assert told(hub.move_alias("legal", 3, "prod")) == ("alias_moved", "prod", 2, 3, False)


def test_moving_an_alias_to_where_it_is_does_nothing(hub: Hub, folders: Folders) -> None:
    hub.push(folders["lora-1"], "legal")
    before = hub.head()
    assert hub.move_alias("legal", 1, "latest") is None
    assert hub.head() == before


def test_an_alias_cannot_point_to_what_is_not_there(hub: Hub, folders: Folders) -> None:
    hub.push(folders["lora-1"], "legal")
    with pytest.raises(NotFound, match="the last version is 1"):
        hub.move_alias("legal", 2, "prod")
    with pytest.raises(NotFound, match="no adapter tone"):
        hub.move_alias("tone", 1, "prod")
    with pytest.raises(BadReference):
        hub.move_alias("legal", 1, "7")


def test_a_rollback_goes_back_step_by_step_and_never_forward_again(hub: Hub, folders: Folders) -> None:
    for seed in (1, 2, 3):
        hub.push(folders[f"lora-{seed}"], "legal", aliases=["prod"])
    assert told(hub.rollback("legal", "prod")) == ("alias_moved", "prod", 3, 2, True)
    assert told(hub.rollback("legal", "prod")) == ("alias_moved", "prod", 2, 1, True)
    with pytest.raises(NotFound, match="nowhere before"):
        hub.rollback("legal", "prod")
    assert at(hub, "legal@prod") == 1
    hub.move_alias("legal", 3, "prod")
    assert told(hub.rollback("legal", "prod")) == ("alias_moved", "prod", 3, 1, True)
    with pytest.raises(NotFound, match="no alias staging"):
        hub.rollback("legal", "staging")


def test_a_rollback_to_a_removed_version_is_refused(hub: Hub, folders: Folders) -> None:
    for seed in (1, 2):
        hub.push(folders[f"lora-{seed}"], "legal", aliases=["prod"])
    hub.remove("legal", 1)
    with pytest.raises(NotFound, match="legal@1 before, which was removed"):
        hub.rollback("legal", "prod")
    assert at(hub, "legal@prod") == 2


def test_a_version_in_use_is_not_removed(hub: Hub, folders: Folders) -> None:
    hub.push(folders["lora-1"], "legal", aliases=["prod"])
    hub.push(folders["lora-2"], "legal")
    with pytest.raises(InUse, match="legal@1 is in use: prod"):
        hub.remove("legal", 1)
    with pytest.raises(InUse, match="legal@2 is in use: latest"):
        hub.remove("legal", 2)
    assert len(hub.adapters()[0].versions) == 2


def test_a_removed_version_is_gone_and_its_number_never_comes_back(hub: Hub, folders: Folders) -> None:
    digest = hub.push(folders["lora-1"], "legal").digest
    hub.push(folders["lora-2"], "legal")
    assert told(hub.remove("legal", 1))[0] == "removed"
    for reference in ("legal@1", f"legal@{digest}"):
        with pytest.raises(NotFound):
            hub.resolve(parse_reference(reference))
    with pytest.raises(NotFound):
        hub.manifest(digest)
    with pytest.raises(NotFound, match="was removed on"):
        hub.remove("legal", 1)
    again = hub.push(folders["lora-1"], "legal")
    assert (again.version, again.created) == (3, True)
    assert [version.version for version in hub.adapters()[0].versions] == [2, 3]


def test_the_last_version_of_a_name_goes_with_its_latest(hub: Hub, folders: Folders) -> None:
    hub.push(folders["lora-1"], "legal")
    hub.remove("legal", 1)
    assert hub.adapters() == []
    with pytest.raises(NotFound):
        hub.resolve(parse_reference("legal"))
    assert hub.push(folders["lora-2"], "legal").version == 2
    assert at(hub, "legal") == 2
    with pytest.raises(NotFound, match="nowhere before"):
        hub.rollback("legal", "latest")


def test_collection_frees_what_nothing_needs_and_nothing_else(hub: Hub, folders: Folders) -> None:
    digest = hub.push(folders["lora-1"], "legal").digest
    hub.push(folders["lora-1"], "tone")
    hub.push(folders["lora-2"], "legal")
    hub.remove("legal", 1)
    assert hub.collect().blobs == 0, "another name has the same bytes"
    hub.push(folders["lora-3"], "tone")
    hub.remove("tone", 1)
    freed = hub.collect()
    assert freed.blobs == 1, "the config is shared with the other versions"
    assert freed.bytes == (folders["lora-1"] / WEIGHTS_FILE).stat().st_size
    with pytest.raises(NotFound):
        hub.read(digest, WEIGHTS_FILE)
    for reference in ("legal", "tone"):
        hub.verify(parse_reference(reference))
    assert hub.push(folders["lora-1"], "legal").version == 3
    hub.verify(parse_reference("legal@3"))


def test_every_change_is_an_event_and_watchers_see_each_once(hub: Hub, folders: Folders) -> None:
    hub.push(folders["lora-1"], "legal", aliases=["prod"], note="first")
    head = hub.head()
    hub.push(folders["lora-2"], "legal")
    hub.move_alias("legal", 2, "prod", note="better")
    hub.rollback("legal", "prod")
    seen = hub.events(head)
    assert [(event.kind, event.alias, event.previous, event.version) for event in seen] == [
        ("pushed", None, None, 2),
        ("alias_moved", "latest", 1, 2),
        ("alias_moved", "prod", 1, 2),
        ("alias_moved", "prod", 2, 1),
    ]
    assert [event.seq for event in hub.events(0)] == list(range(1, hub.head() + 1))
    assert hub.events(hub.head()) == []
    first, moved = hub.events(0)[0], seen[2]
    assert (first.note, first.digest) == ("first", hub.resolve(parse_reference("legal@1")).digest)
    assert (moved.note, moved.digest) == ("better", hub.resolve(parse_reference("legal@2")).digest)
    assert first.actor == moved.actor != ""


def test_a_watcher_hears_everything_after_what_it_saw(hub: Hub, folders: Folders) -> None:
    hub.push(folders["lora-1"], "legal")
    watching = hub.watch(1)
    heard: list[Event] = []
    while len(heard) < 1:
        heard += next(watching)
    hub.push(folders["lora-2"], "tone", aliases=["prod"])
    while len(heard) < 4:
        heard += next(watching)
    assert [event.seq for event in heard] == [2, 3, 4, 5]
    assert heard == hub.events(1)


def test_a_watcher_who_has_seen_more_than_there_is_is_told(hub: Hub, folders: Folders) -> None:
    hub.push(folders["lora-1"], "legal")
    with pytest.raises(LogLost, match="event 99 is beyond the last one of this hub, 2"):
        next(hub.watch(99))


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        (None, ["a", "a.b_c", "a/b", "team/a"]),
        ("a", ["a"]),
        ("a*", ["a", "a.b_c", "a/b"]),
        ("?", ["a"]),
        ("a?b*", ["a.b_c", "a/b"]),
        ("*_*", ["a.b_c"]),
        ("a%", []),
        ("A*", []),
        ("team/*", ["team/a"]),
    ],
)
def test_names_are_listed_by_pattern(hub: Hub, folders: Folders, pattern: str | None, names: list[str]) -> None:
    for name in ("team/a", "a", "a.b_c", "a/b"):
        hub.push(folders["lora-1"], name)
    assert [adapter.name for adapter in hub.adapters(pattern)] == names


def test_the_log_of_a_name_holds_only_its_own_events(hub: Hub, folders: Folders) -> None:
    hub.push(folders["lora-1"], "legal")
    hub.push(folders["lora-1"], "tone")
    hub.remove("tone", 1)
    assert [event.kind for event in hub.log("legal")] == ["pushed", "alias_moved"]
    assert [event.kind for event in hub.log("tone")] == ["pushed", "alias_moved", "removed"]


def test_names_are_listed_in_order_and_by_pattern(hub: Hub, folders: Folders) -> None:
    for name in ("tone", "team/legal", "legal"):
        hub.push(folders["lora-1"], name)
    assert [adapter.name for adapter in hub.adapters()] == ["legal", "team/legal", "tone"]
    assert [adapter.name for adapter in hub.adapters("*legal")] == ["legal", "team/legal"]
    assert hub.adapters("nothing*") == []


def test_a_difference_names_what_parts_two_versions(hub: Hub, tmp_path: Path, folders: Folders) -> None:
    hub.push(folders["lora-1"], "legal")
    changed = Path(shutil.copytree(folders["lora-1"], tmp_path / "changed"))
    config = json.loads((changed / CONFIG_FILE).read_text())
    (changed / CONFIG_FILE).write_text(json.dumps({**config, "lora_alpha": 99}))
    (changed / "metrics.json").write_text(json.dumps({"eval_loss": 0.25}))
    hub.push(changed, "legal")
    difference = hub.diff(parse_reference("legal@1"), parse_reference("legal@2"))
    changes = {change.field: (change.before, change.after) for change in difference.changes}
    assert changes["config.lora_alpha"] == (8, 99)
    assert changes["metrics.eval_loss"] == (None, 0.25)
    assert set(changes) == {
        "config.lora_alpha", "metrics.eval_loss", "files.adapter_config.json", "files.metrics.json",
    }  # fmt: skip
    assert hub.diff(parse_reference("legal@1"), parse_reference("legal@1")).changes == ()


def router(folder: Path, folders: Folders, pins: list[str]) -> Path:
    base = json.loads((folders["lora-1"] / CONFIG_FILE).read_text())["base_model_name_or_path"]
    return write_router(folder, Path(base), pins)


def pin(hub: Hub, folders: Folders, *kinds: str) -> list[str]:
    """Each pushed under its own name; what a router writes of it."""
    return [f"{kind}@{hub.push(folders[kind], kind).digest}" for kind in kinds]


def test_an_expert_stays_as_long_as_a_router_pins_it(hub: Hub, tmp_path: Path, folders: Folders) -> None:
    pins = pin(hub, folders, "lora-1", "lora-2")
    for version, order in enumerate((pins, pins[::-1]), 1):
        hub.push(router(tmp_path / f"r{version}", folders, order), "team/router")
    assert hub.manifest(hub.resolve(parse_reference("team/router@1")).digest).parents == tuple(
        text.partition("@")[2] for text in pins
    )
    refusal = (
        "lora-1@1 is in use: routers team/router@1, team/router@2 pin it as expert; remove those first: "
        "hub rm team/router@1"
    )
    with pytest.raises(InUse, match=re.escape(refusal)):
        hub.remove("lora-1", 1)
    hub.remove("team/router", 1)
    with pytest.raises(InUse, match="router team/router@2 pins it as expert; remove that first: hub rm team/router@2"):
        hub.remove("lora-1", 1)
    hub.collect()
    for text in pins:
        hub.verify(parse_reference(text))
    hub.remove("team/router", 2)
    assert told(hub.remove("lora-1", 1))[0] == "removed"
    assert hub.collect().blobs > 0


def test_only_the_name_that_is_pinned_is_kept(hub: Hub, tmp_path: Path, folders: Folders) -> None:
    pins = pin(hub, folders, "lora-1", "lora-2")
    hub.push(folders["lora-1"], "copy")
    hub.push(router(tmp_path / "r", folders, pins), "router")
    hub.remove("copy", 1)
    with pytest.raises(InUse):
        hub.remove("lora-1", 1)


def test_a_router_is_refused_with_every_expert_that_is_not_here_or_is_none(
    hub: Hub, tmp_path: Path, folders: Folders
) -> None:
    first, second, gone, ia3, dora = pin(hub, folders, "lora-1", "lora-2", "lora-3", "ia3", "lora-dora")
    hub.remove("lora-3", 1)
    strange = f"nobody@sha256:{'0' * 64}"
    elsewhere = f"lora-1@{second.partition('@')[2]}"
    head = hub.head()
    with pytest.raises(Refused) as refusal:
        hub.push(router(tmp_path / "r", folders, [first, gone, strange, elsewhere, ia3, dora]), "router")
    reasons = [problem.reason.partition("@sha256:")[2][65:] for problem in refusal.value.problems]
    assert {problem.field for problem in refusal.value.problems} == {"experts"}
    assert [reason[:40] for reason in reasons] == [
        "is not in this hub (lora-3@1, sha256:" + gone.partition("sha256:")[2][:3],
        "is not in this hub (there is no adapter ",
        "is not in this hub (no version of lora-1",
        "is of kind ia3; a router's experts are L",
        "has use_dora true; experts are low-rank ",
    ]
    assert all("push that expert first" in reason for reason in reasons[:3])
    assert hub.head() == head and hub.adapters("router") == []


def test_a_router_is_refused_when_an_expert_is_of_another_base(hub: Hub, tmp_path: Path, folders: Folders) -> None:
    (first,) = pin(hub, folders, "lora-1")
    other = write_lora(tmp_path / "other", write_base(tmp_path / "another", vocab_size=65), seed=9)
    digest = hub.push(other, "other").digest
    with pytest.raises(Refused, match=r"is of base another \(fingerprint \w{12}\), the router of base \("):
        hub.push(router(tmp_path / "r", folders, [first, f"other@{digest}"]), "router")
