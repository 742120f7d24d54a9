"""Experts that are trained with their router: versions of their own, pinned before they are pushed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from hub.cli import app
from hub.companions import companions, folder_digest, push_whole
from hub.errors import NotFound, Refused
from hub.ref import parse_reference
from hub.registry import LocalHub
from hub.validate import validate
from tests.unit.trainer.test_train import EXACT_LOGITS, StopAt
from trainer.base import open_base
from trainer.data import load_dataset
from trainer.errors import ExpertUnfit, Interrupted, MethodUnfit, RecipeInvalid
from trainer.export import load_adapter
from trainer.families.moe import EXPERT_RATE
from trainer.modules.experts import Frozen, Low, Trained
from trainer.progress import SILENT
from trainer.recipe import Recipe, method_of, parse_recipe, read_fields
from trainer.train import Workshop, adapted, plan_of, prepare, settle, train

CPU = torch.device("cpu")
NAMES = ["moe-first", "team/second"]
TRAINED: dict[str, Any] = {
    "experts": ["first", "second"], "experts_are": "trained", "expert_names": NAMES, "imitation_steps": 4,
}  # fmt: skip
# Ranks, scalings and targets differ, as those of the hub do.
LORAS: dict[str, dict[str, Any]] = {
    "first": {"rank": 2, "alpha": 6},
    "second": {"rank": 3, "rslora": True, "targets": ["q_proj", "down_proj"]},
}


def recipe(base: Path, data: Path, **fields: Any) -> Recipe:
    least = {"method": "lora-moe", "base": str(base), "data": str(data), "options": TRAINED, "batch_size": 8}
    return parse_recipe({**least, "steps": 8, "learning_rate": 0.05, **fields}, "test")


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def golden_error(model: Any, folder: Path) -> float:
    """The largest difference from the logits that the folder promises."""
    tensors = load_file(folder / "golden.safetensors")
    worst = 0.0
    for name in (name for name in tensors if name.endswith(".input_ids")):
        ids = tensors[name][None]
        with torch.inference_mode():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1]
        worst = max(worst, (logits - tensors[name.replace("input_ids", "logits")]).abs().max().item())
    return worst


@pytest.fixture(scope="module")
def loras(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two LoRAs."""
    room = tmp_path_factory.mktemp("loras")
    for seed, (name, options) in enumerate(LORAS.items()):
        lora = {"method": "lora", "seed": seed, "options": options, "steps": 2}
        train(recipe(tiny_base, Path("task:echo:40"), **lora), room / name)
    return room


@pytest.fixture
def hub(loras: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalHub:
    """They are in it."""
    monkeypatch.setenv("MULTIGRAFT_HOME", str(tmp_path / "home"))
    found = LocalHub(tmp_path / "home")
    for name in LORAS:
        found.push(loras / name, name, base=tiny_base)
    return found


def test_what_comes_out_is_a_router_and_whole_adapters_that_it_pins(
    tiny_base: Path, chats: Path, tmp_path: Path, hub: LocalHub, loras: Path
) -> None:
    """One run, looked at from all sides: it takes seconds."""
    out = tmp_path / "out"
    result = train(recipe(tiny_base, chats), out)
    config = json.loads((out / "adapter_config.json").read_text())
    folders = [out / "experts" / "moe-first", out / "experts" / "team-second"]
    manifests = [validate(folder, base=tiny_base) for folder in folders]
    assert config["experts"] == [f"{name}@{one.digest}" for name, one in zip(NAMES, manifests, strict=True)]
    assert [folder_digest(folder) for folder in folders] == [one.digest for one in manifests]
    assert not {"experts_are", "expert_names", "expert_rate", "imitation_steps"} & config.keys()
    for name, folder, manifest in zip(LORAS, folders, manifests, strict=True):
        origin = loras / name
        assert manifest.parents == (hub.resolve(parse_reference(name)).digest,)
        now, then = (load_file(place / "adapter_model.safetensors") for place in (folder, origin))
        assert {key: value.shape for key, value in now.items()} == {key: value.shape for key, value in then.items()}
        assert any(not torch.equal(now[key], then[key]) for key in now), "it has learnt nothing"
        before = json.loads((origin / "adapter_config.json").read_text())
        assert json.loads((folder / "adapter_config.json").read_text()) == before, "scaling, ranks and targets stay"
        assert golden_error(load_adapter(folder, open_base(str(tiny_base)), CPU), folder) <= EXACT_LOGITS
        assert sorted(path.name for path in folder.iterdir()) == [
            "README.md", "adapter_config.json", "adapter_model.safetensors", "golden.json", "golden.safetensors",
            "metrics.json", "recipe.json",
        ]  # fmt: skip
    loaded = load_adapter(out, open_base(str(tiny_base)), CPU)  # the hub does not have these experts
    assert golden_error(loaded, out) <= EXACT_LOGITS
    assert result.recipe["options"]["expert_rate"] == EXPERT_RATE

    pushed, experts = push_whole(hub, out, "router", aliases=["prod"], base=tiny_base)
    assert [f"{one.name}@{one.digest}" for one in experts] == config["experts"]
    assert hub.manifest(pushed.digest).parents == tuple(one.digest for one in manifests)
    assert [hub.resolve(parse_reference(name)).version for name in LORAS] == [1, 1], "users of the skills see no change"
    assert hub.resolve(parse_reference("router@prod")).digest == pushed.digest
    with pytest.raises(NotFound):
        hub.resolve(parse_reference("moe-first@prod"))
    hub.pull(parse_reference("router"), tmp_path / "pulled")
    assert golden_error(load_adapter(tmp_path / "pulled", open_base(str(tiny_base)), CPU), out) <= EXACT_LOGITS

    train(parse_recipe(read_fields(out / "recipe.json"), "test"), tmp_path / "again")
    assert everything(tmp_path / "again") == everything(out)


@pytest.mark.usefixtures("hub")
def test_a_run_that_was_stopped_and_resumed_makes_the_same_bytes(tiny_base: Path, chats: Path, tmp_path: Path) -> None:
    """Stopped while imitating and again after it."""
    wanted = recipe(tiny_base, chats, schedule="cosine", weight_decay=0.1)
    train(wanted, tmp_path / "whole")
    for step in (2, 6):
        watch = StopAt(step)
        with pytest.raises(Interrupted):
            workshop = Workshop(existing="resume")
            train(wanted, tmp_path / "resumed", report=watch, stop=watch.event, workshop=workshop)
    train(wanted, tmp_path / "resumed", workshop=Workshop(existing="resume"))
    assert everything(tmp_path / "resumed") == everything(tmp_path / "whole")


@pytest.mark.usefixtures("hub")
def test_while_imitating_an_expert_learns_from_its_own_rows_alone(tiny_base: Path, chats: Path) -> None:
    wanted = recipe(tiny_base, chats)
    base = open_base(wanted.base)
    dataset = load_dataset(wanted)
    lesson = prepare(wanted, dataset, base, plan_of(wanted, base), SILENT)
    settled = settle(wanted, dataset, plan_of(wanted, base), lesson.steps)
    model = adapted(settled, base, CPU).train()
    batch = method_of(settled).tuner().collate(lesson.train[:1], base.pad)
    model(**batch).loss.backward()
    alone = int(model.graft._best(model, batch)[0])
    moved = [
        terms.b_OP.grad[:, terms.owner_P == number].any().item() for terms in model.graft.terms for number in (0, 1)
    ]
    assert not any(moved[1 - alone :: 2]), "an expert learnt from a row that another one served"
    assert any(moved[alone::2])
    model.zero_grad()
    model.graft.after_step(None, 4)  # imitation is over
    model(**batch).loss.backward()
    both = [terms for terms in model.graft.terms if len(set(terms.owner_P.tolist())) == 2]
    assert both
    assert all(terms.b_OP.grad[:, terms.owner_P == number].any() for terms in both for number in (0, 1))


def test_experts_begin_as_they_are_in_the_hub() -> None:
    torch.manual_seed(0)
    lows = [Low(torch.randn(2, 5), torch.randn(4, 2), 3.0), None, Low(torch.randn(1, 5), torch.randn(4, 1), 0.5)]
    x, gates = torch.randn(2, 7, 5), torch.rand(2, 7, 3)
    wanted = sum(
        gates[..., number, None] * low.scaling * (x @ low.A_rI.t() @ low.B_Or.t())
        for number, low in enumerate(lows)
        if low is not None
    )
    torch.testing.assert_close(Frozen(lows)(x, gates), wanted)
    assert torch.equal(Trained(lows, 0.1)(x, gates), Frozen(lows)(x, gates))


def test_hub_push_takes_the_folder_and_refuses_what_is_not_pinned(
    tiny_base: Path, chats: Path, tmp_path: Path, hub: LocalHub
) -> None:
    out = tmp_path / "out"
    train(recipe(tiny_base, chats, steps=2), out)
    push = ["push", str(out), "router", "--base", str(tiny_base)]
    readme = out / "experts" / "moe-first" / "README.md"
    text = readme.read_text()
    readme.write_text(f"{text}\n")
    (out / "experts" / "third").mkdir()
    refused = CliRunner().invoke(app, push)
    assert refused.exit_code == 1
    assert "experts/third: is no expert that the router pins: remove it" in refused.stderr
    assert "it is not the expert that was trained with it" in refused.stderr
    assert [one.name for one in hub.adapters()] == sorted(LORAS), "something was pushed"
    with pytest.raises(Refused):
        load_adapter(out, open_base(str(tiny_base)), CPU)
    readme.write_text(text)
    (out / "experts" / "third").rmdir()
    with pytest.raises(Refused, match="is a folder; an adapter is flat"):
        hub.push(out, "router", base=tiny_base)  # who pushes the router alone must take the experts away
    done = CliRunner().invoke(app, [*push, "--quiet"])
    assert done.exit_code == 0, done.stderr
    assert done.stdout.strip() == hub.resolve(parse_reference("router")).digest
    assert [line.partition("@")[0] for line in done.stderr.splitlines()] == [f"expert {name}" for name in NAMES]
    shutil.rmtree(out / "experts")
    again = CliRunner().invoke(app, [*push, "--quiet"])
    assert (again.exit_code, again.stdout) == (0, done.stdout), "where its experts lie is in the digest"


def test_an_adapter_that_is_no_router_stays_flat(tmp_path: Path, hub: LocalHub) -> None:
    hub.pull(parse_reference("first"), tmp_path / "mine")
    (tmp_path / "mine" / "experts").mkdir()
    assert companions(tmp_path / "mine") == ()
    with pytest.raises(Refused, match="experts: is a folder; an adapter is flat"):
        push_whole(hub, tmp_path / "mine", "first")


@pytest.mark.usefixtures("hub")
def test_a_push_names_the_experts_that_have_no_names(tiny_base: Path, chats: Path, tmp_path: Path) -> None:
    least = ["train", "--method", "lora-moe", "--base", str(tiny_base), "--data", str(chats), "--steps", "1"]
    wanted = [*least, "--experts", "first,second", "--option", "experts_are=trained"]
    done = CliRunner().invoke(app, [*wanted, "--push", "team/moe", "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.stderr
    assert "expert team/moe-first@1 sha256:" in done.stderr
    assert (tmp_path / "out" / "experts" / "team-moe-second").is_dir()
    refused = CliRunner().invoke(app, [*wanted, "--out", str(tmp_path / "other")])
    assert "give expert_names, or --push NAME for NAME-EXPERT" in refused.stderr
    twice = CliRunner().invoke(
        app, [*least, "--experts", "a/x,b/x", "--option", "experts_are=trained", "--push", "moe"]
    )
    assert "expert_names moe-x, moe-x name one folder twice: give others" in twice.stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"experts": 4}, "experts 4: a router is trained over adapters of the hub, not over a number of new ones"),
        ({"experts": ["4"]}, "experts 4: a router is trained over adapters of the hub, not over a number of new ones"),
        ({"experts": ["a", "b"], "expert_rate": 0.2}, "expert_rate: only with experts_are: trained"),
        ({**TRAINED, "expert_names": ["one"]}, "expert_names are 1, experts 2"),
        ({**TRAINED, "expert_names": ["one", "Two"]}, "expert_names: 'Two' does not fit"),
        ({**TRAINED, "expert_names": ["one", "first"]}, "whoever asks for first would get what was trained for this"),
        ({**TRAINED, "expert_names": ["a/b", "a-b"]}, "a/b, a-b name one folder twice"),
        ({**TRAINED, "experts_are": "thawed"}, "experts_are is 'thawed'"),
    ],
)
def test_options_that_do_not_fit_are_refused_by_name(options: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeInvalid, match=says.replace("[", r"\[")):
        recipe(Path("seedling"), Path("rows.jsonl"), options=options)


@pytest.mark.usefixtures("hub")
def test_trained_experts_without_names_are_refused_before_a_weight_is_read(
    tiny_base: Path, chats: Path, tmp_path: Path
) -> None:
    options = {"experts": ["first", "second"], "experts_are": "trained"}
    with pytest.raises(MethodUnfit, match="give expert_names, or --push NAME"):
        train(recipe(tiny_base, chats, options=options), tmp_path / "out")


def test_an_expert_that_is_more_than_two_factors_at_linears_is_refused(
    tiny_base: Path, chats: Path, tmp_path: Path, hub: LocalHub
) -> None:
    """Else what it has besides would be left out without a word."""
    train(recipe(tiny_base, chats, method="lora", options={"rank": 2, "dora": True}, steps=1), tmp_path / "dora")
    hub.push(tmp_path / "dora", "dora", base=tiny_base)
    options = {"experts": ["first", "dora"]}
    with pytest.raises(ExpertUnfit, match=r"expert dora@sha256:\w+ is no plain LoRA \(use_dora true\)"):
        train(recipe(tiny_base, chats, options=options), tmp_path / "out")
