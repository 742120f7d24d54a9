"""A training run, whole: what it makes, that it makes the same again, and that nothing is lost when it is stopped."""

import json
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hub.methods import METHODS as SERVED_KINDS
from hub.registry import LocalHub
from hub.validate import validate
from trainer.base import open_base
from trainer.data import load_dataset
from trainer.errors import BaseUnfit, Diverged, Interrupted, MethodUnfit, OutputExists, RecipeChanged
from trainer.evaluate import evaluate
from trainer.export import golden_prompts, load_adapter
from trainer.methods import METHODS
from trainer.progress import SILENT, Step
from trainer.recipe import Recipe, method_of, parse_recipe, read_fields
from trainer.train import Workshop, adapted, plan_of, prepare, train, work_folder

EXACT_LOGITS = 0.0  # the same torch operations on the same machine
SAME_SUMS = 1e-5  # fp32 sums in another order
SERVED = 1e-4  # fp32, packed, and a change of full rank by its factors
STEPS = 12
GPT2 = {
    "model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "num_key_value_heads": 4,
    "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0,
}  # fmt: skip
# Options beyond the defaults, so that what is random while training is random in every method that can be.
OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 2, "dropout": 0.3},
    "ia3": {},
    "prefix": {"virtual_tokens": 3, "projection": True},
    "prompt": {"virtual_tokens": 3},
    "p-tuning": {"virtual_tokens": 3, "encoder": "lstm", "encoder_dropout": 0.3},
    "bottleneck": {"style": "compacter", "size": 4, "terms": 2, "scaling": "learned", "dropout": 0.3},
    "loreft": {"rank": 2, "positions": "f2+l3", "dropout": 0.3},
    "lt-sft": {"density": 0.01, "search_steps": 4},
    "diff-pruning": {"density": 0.02, "search_steps": 8},
    "adalora": {"rank": 3, "target_rank": 2, "dropout": 0.3, "hold_steps": 1, "final_steps": 4},
    "vera": {"rank": 4, "dropout": 0.3},
    "loha": {"rank": 2},
    "hra": {"rank": 2},
    "miss": {"rank": 2, "dropout": 0.3},
    "delora": {"rank": 2},
    "beft": {},
    "lora-moe": {"experts": ["first", "second"], "imitation_steps": 5},
    "oft": {"block_size": 8, "block_share": True, "dropout": 0.3},
    "boft": {"dropout": 0.3},
    "road": {"variant": 2},
    "shira": {"rank": 2},
    "lokr": {"rank": 2, "factor": 4, "decompose_both": True},
    "fourierft": {"frequencies": 30},
    "c3a": {},
    "hira": {"rank": 2, "dropout": 0.3},
    "bitfit": {},
    "ln-tuning": {"targets": ["input_layernorm", "model.norm"]},
    "trainable-tokens": {"tokens": ["bag", 7]},
}
NEEDED = {  # without which a method is not one
    "trainable-tokens": {"tokens": ["a", "<|end|>"]},
    "lora-head": {"targets": ["lm_head", "q_proj"]},
}
EXPERTS = ("first", "second")
# What PEFT trains as it trains LoRA needs no resumed run of its own.
LIKE_LORA = (
    "vera", "loha", "hra", "miss", "delora", "beft", "boft", "road", "shira", "lokr", "fourierft", "c3a", "hira",
    "ln-tuning",
)  # fmt: skip


def recipe(method: str, base: Path, data: Path | str, **fields: Any) -> Recipe:
    least = {"method": method, "base": str(base), "data": str(data), "options": OPTIONS[method], "batch_size": 8}
    return parse_recipe({**least, "steps": STEPS, **fields}, "test")


@pytest.fixture
def base_of(request: pytest.FixtureRequest, make_base: Any, tiny_base: Path) -> Path:
    """One with biases for the method that needs some."""
    return biased_base(make_base) if request.node.callspec.params["method"] == "bitfit" else tiny_base


def biased_base(make_base: Any) -> Path:
    folder: Path = make_base(model_type="phi", num_key_value_heads=4)
    weights = load_file(folder / "model.safetensors")
    torch.manual_seed(0)
    moved = {name: torch.randn_like(value) if name.endswith("bias") else value for name, value in weights.items()}
    save_file(moved, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(autouse=True)
def hub(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> LocalHub:
    """Where a router finds its experts."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("MULTIGRAFT_HOME", str(home))
    return LocalHub(home)


@pytest.fixture
def experts(request: pytest.FixtureRequest, hub: LocalHub, tiny_base: Path, chats: Path, tmp_path: Path) -> None:
    for seed, name in enumerate(EXPERTS if request.node.callspec.params["method"] == "lora-moe" else ()):
        train(recipe("lora", tiny_base, chats, steps=2, seed=seed), tmp_path / name)
        hub.push(tmp_path / name, name, base=tiny_base)


def served_error(adapter: Path, folder: Path) -> float:
    """The largest difference between its golden rows and the server's logits, all rows in one packed batch."""
    from server.config import ModelConfig
    from server.model.load import load_network
    from tests.oracle.conftest import Bench

    bench = Bench(load_network(ModelConfig(base=str(folder)), folder, name="base"), max_rank=256)
    kind = SERVED_KINDS[json.loads((adapter / "adapter_config.json").read_text())["peft_type"]].kind
    graft = bench.graft(adapter, kind)
    golden = load_file(adapter / "golden.safetensors")
    rows = range(len(golden) // 2)
    got = bench.run([(golden[f"{row}.input_ids"].tolist(), [(graft, 1.0)]) for row in rows])
    return max((got[row][-1] - golden[f"{row}.logits"]).abs().max().item() for row in rows)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


class StopAt:
    """A reporter that asks the run to stop once a step is told."""

    def __init__(self, step: int) -> None:
        self.event, self.steps, self._at = Event(), list[Step](), step

    def note(self, text: str) -> None:
        pass

    def step(self, step: Step) -> None:
        self.steps.append(step)
        if step.number == self._at:
            self.event.set()


@pytest.mark.usefixtures("experts")
@pytest.mark.parametrize("method", [method for method in METHODS if method not in LIKE_LORA])
def test_a_run_that_was_stopped_and_resumed_makes_the_same_bytes(
    method: str, base_of: Path, chats: Path, tmp_path: Path
) -> None:
    """Seven and a half epochs and dropout: the order of rows and every generator must be taken up where they were."""
    wanted = recipe(method, base_of, chats, warmup_steps=4, schedule="cosine", batch_size=25)
    train(wanted, tmp_path / "whole")
    stopped = StopAt(6)
    with pytest.raises(Interrupted, match=r"stopped at step 7 of 12; the same command with --resume"):
        train(wanted, tmp_path / "resumed", report=stopped, stop=stopped.event)
    assert not (tmp_path / "resumed").exists()
    result = train(wanted, tmp_path / "resumed", workshop=Workshop(existing="resume"))
    assert result.resumed_at == 7
    assert contents(tmp_path / "resumed") == contents(tmp_path / "whole")
    assert not work_folder(tmp_path / "resumed").exists()


def test_adalora_ends_at_its_target_rank_and_the_hub_accepts_it(tiny_base: Path, chats: Path, tmp_path: Path) -> None:
    train(recipe("adalora", tiny_base, chats), tmp_path / "out")
    kept = [
        value for name, value in tensors(tmp_path / "out" / "adapter_model.safetensors").items() if "lora_E" in name
    ]
    assert sum(len(value) for value in kept) == 2 * len(kept)
    assert validate(tmp_path / "out", base=tiny_base).kind == "adalora"


def test_dora_is_taken_up_where_it_was_and_the_hub_accepts_it(tiny_base: Path, chats: Path, tmp_path: Path) -> None:
    wanted = recipe("lora", tiny_base, chats, options={"rank": 2, "dropout": 0.3, "dora": True})
    train(wanted, tmp_path / "whole")
    stopped = StopAt(6)
    with pytest.raises(Interrupted):
        train(wanted, tmp_path / "resumed", report=stopped, stop=stopped.event)
    train(wanted, tmp_path / "resumed", workshop=Workshop(existing="resume"))
    assert contents(tmp_path / "resumed") == contents(tmp_path / "whole")
    manifest = validate(tmp_path / "whole", base=tiny_base)
    assert (manifest.kind, manifest.config["use_dora"]) == ("lora", True)


def test_when_checkpoints_are_saved_changes_nothing(tiny_base: Path, chats: Path, tmp_path: Path) -> None:
    wanted = recipe("lora", tiny_base, chats)
    train(wanted, tmp_path / "seldom")
    train(wanted, tmp_path / "often", workshop=Workshop(checkpoint_steps=1))
    assert contents(tmp_path / "often") == contents(tmp_path / "seldom")


def test_another_seed_makes_other_weights(tiny_base: Path, chats: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        train(recipe("lora", tiny_base, chats, seed=seed), tmp_path / str(seed))
    one, other = (contents(tmp_path / name)["adapter_model.safetensors"] for name in ("0", "1"))
    assert one != other


def test_resuming_before_the_first_checkpoint_starts_at_the_beginning(
    tiny_base: Path, chats: Path, tmp_path: Path
) -> None:
    result = train(recipe("ia3", tiny_base, chats), tmp_path / "out", workshop=Workshop(existing="resume"))
    assert (result.resumed_at, result.steps) == (0, STEPS)


def test_a_run_is_not_resumed_by_another_recipe(tiny_base: Path, chats: Path, tmp_path: Path) -> None:
    stopped = StopAt(3)
    with pytest.raises(Interrupted):
        train(recipe("lora", tiny_base, chats), tmp_path / "out", report=stopped, stop=stopped.event)
    other = recipe("lora", tiny_base, chats, learning_rate=0.5)
    with pytest.raises(RecipeChanged, match=r"learning_rate was 0.001 and is 0.5"):
        train(other, tmp_path / "out", workshop=Workshop(existing="resume"))
    with pytest.raises(OutputExists, match="--resume goes on with it, --overwrite starts again"):
        train(other, tmp_path / "out")
    assert train(other, tmp_path / "out", workshop=Workshop(existing="overwrite")).resumed_at == 0


def test_a_folder_that_is_there_is_replaced_only_when_asked(tiny_base: Path, chats: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    wanted = recipe("ia3", tiny_base, chats)
    for careful in (Workshop(existing="refuse"), Workshop(existing="resume")):
        with pytest.raises(OutputExists, match="--overwrite replaces it"):
            train(wanted, out, workshop=careful)
    assert (out / "mine.txt").read_text() == "keep"
    train(wanted, out, workshop=Workshop(existing="overwrite"))
    assert "mine.txt" not in contents(out)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == ["out"]


@pytest.mark.usefixtures("experts")
@pytest.mark.parametrize("method", METHODS)
def test_what_is_exported_is_what_peft_loads_and_the_golden_rows_say(
    method: str, base_of: Path, chats: Path, tmp_path: Path
) -> None:
    """And what the server serves."""
    out = tmp_path / "out"
    result = train(recipe(method, base_of, chats, steps=4 if method in LIKE_LORA else STEPS), out)
    found_by = [] if method == "lora-moe" else ["centroids.json", "centroids.safetensors"]
    assert sorted(contents(out)) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", *found_by,
        "golden.json", "golden.safetensors", "metrics.json", "recipe.json",
    ]  # fmt: skip
    if json.loads((out / "adapter_config.json").read_text())["peft_type"] in SERVED_KINDS:
        validate(out, base=base_of)
    base = open_base(str(base_of))
    model = load_adapter(out, base, torch.device("cpu"))
    golden = json.loads((out / "golden.json").read_text())["rows"]
    with safe_open(out / "golden.safetensors", framework="pt") as tensors:
        for i, row in enumerate(golden):
            ids = tensors.get_tensor(f"{i}.input_ids")
            assert (ids.dtype, len(ids)) == (torch.int64, row["tokens"])
            assert base.tokenizer.decode(ids) == row["prompt"]
            with torch.inference_mode():
                logits = model(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None]).logits[0, -1]
            assert (logits - tensors.get_tensor(f"{i}.logits")).abs().max().item() <= EXACT_LOGITS
    assert len(golden) == 4
    assert method == "lora-moe" or served_error(out, base_of) < SERVED
    metrics = json.loads((out / "metrics.json").read_text())
    assert {name: metrics[name] for name in result.metrics} == dict(result.metrics)
    assert metrics["eval_rows"] == 4
    assert metrics["eval_loss"] < metrics["base_eval_loss"]


@pytest.mark.parametrize(
    ("method", "sizes"),
    [
        *((method, {"model_type": "llama"}) for method in METHODS if method not in ("lora-moe", "bitfit")),
        ("bitfit", {"model_type": "phi", "num_key_value_heads": 4}),  # llama has no biases
        ("prompt", {"model_type": "gemma2", "head_dim": 8, "query_pre_attn_scalar": 8}),  # caps its logits
        ("lora", {"model_type": "phi", "num_key_value_heads": 4}),  # its head has a bias
        ("lora", GPT2),  # its linear modules are Conv1D
        ("lora-head", {"model_type": "gemma2", "head_dim": 8, "query_pre_attn_scalar": 8}),  # caps what its head gives
        ("prefix", {"model_type": "qwen3", "head_dim": 16}),  # its heads are wider than hidden_size / heads
    ],
)
def test_the_loss_that_is_trained_is_the_loss_that_is_measured(
    method: str, sizes: dict[str, Any], make_base: Any, chats: Path, tmp_path: Path
) -> None:
    """Oracle: TRL's head, which computes learnt positions only, against cross-entropy over all logits.

    But for a router, which imitates first.
    """
    options = NEEDED.get(method, {})
    method = method.removesuffix("-head")
    wanted = recipe(method, make_base(**sizes), chats, options=options, steps=2, batch_size=36)
    base = open_base(wanted.base)
    lesson = prepare(wanted, load_dataset(wanted), base, plan_of(wanted, base), SILENT)
    model = adapted(wanted, base, torch.device("cpu"))
    collate = method_of(wanted).tuner().collate
    measured = evaluate(model, lesson.train, pad=base.pad, vocabulary=261, collate=collate).loss
    watch = StopAt(-1)
    train(wanted, tmp_path / "out", report=watch)
    assert watch.steps[0].loss == pytest.approx(measured, rel=SAME_SUMS)


def test_each_step_trains_on_the_rows_that_the_order_gives(tiny_base: Path, chats: Path, tmp_path: Path) -> None:
    """At a rate that moves no weight, the loss of a step tells which rows it saw."""
    wanted = recipe("prompt", tiny_base, chats, batch_size=2, learning_rate=1e-30)
    base = open_base(wanted.base)
    lesson = prepare(wanted, load_dataset(wanted), base, plan_of(wanted, base), SILENT)
    model = adapted(wanted, base, torch.device("cpu"))
    batches = [[lesson.train[row] for row in lesson.order[i : i + 2]] for i in range(0, 2 * STEPS, 2)]
    watch = StopAt(-1)
    train(wanted, tmp_path / "out", report=watch)
    assert [step.loss for step in watch.steps] == [
        pytest.approx(evaluate(model, batch, pad=base.pad, vocabulary=261).loss, rel=SAME_SUMS) for batch in batches
    ]


def test_training_teaches_unseen_rows(tmp_path: Path) -> None:
    wanted = recipe("lora", Path("seedling"), "task:pirate:200", steps=15, eval_rows=32, learning_rate=5e-3)
    metrics = train(wanted, tmp_path / "out").metrics
    assert metrics["eval_loss"] < 0.7 * metrics["base_eval_loss"]


def test_an_exported_recipe_trains_the_same_adapter_again(tiny_base: Path, chats: Path, tmp_path: Path) -> None:
    train(recipe("prompt", tiny_base, chats, steps=None, epochs=2), tmp_path / "one")
    again = parse_recipe(read_fields(tmp_path / "one" / "recipe.json"), "test")
    train(again, tmp_path / "two")
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_epochs_become_steps(tiny_base: Path, chats: Path, tmp_path: Path) -> None:
    result = train(recipe("ia3", tiny_base, chats, steps=None, epochs=1.5, batch_size=8), tmp_path / "out")
    assert result.steps == 7  # 36 rows left to train on, in steps of 8
    assert result.recipe["epochs"] is None
    assert result.recipe["steps"] == 7


def test_accumulated_batches_train_like_one_large_batch(tiny_base: Path, chats: Path, tmp_path: Path) -> None:
    for name, batch, times in (("large", 8, 1), ("split", 2, 4)):
        train(recipe("prefix", tiny_base, chats, batch_size=batch, gradient_accumulation=times), tmp_path / name)
    large, split = (tensors(tmp_path / name / "adapter_model.safetensors") for name in ("large", "split"))
    for name, value in large.items():
        assert torch.allclose(value, split[name], atol=1e-4)  # the same sums in another order, through Adam


@pytest.mark.parametrize("method", ["lora", "prompt"])
def test_gradient_checkpointing_changes_nothing(method: str, tiny_base: Path, chats: Path, tmp_path: Path) -> None:
    for name in ("with", "without"):
        train(recipe(method, tiny_base, chats, gradient_checkpointing=name == "with"), tmp_path / name)
    one, other = (contents(tmp_path / name)["adapter_model.safetensors"] for name in ("with", "without"))
    assert one == other


def tensors(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict


def test_the_progress_tells_every_step_once_with_a_finite_loss(tiny_base: Path, chats: Path, tmp_path: Path) -> None:
    watch = StopAt(-1)
    train(recipe("lora", tiny_base, chats), tmp_path / "out", report=watch)
    assert [step.number for step in watch.steps] == list(range(1, STEPS + 1))
    assert all(step.loss is not None and 0 < step.loss < 100 and step.tokens_per_s > 0 for step in watch.steps)


def test_a_loss_that_is_no_number_ends_the_run(tiny_base: Path, chats: Path, tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"the loss is \w+ at step \d+: a learning rate below 1e\+30 may hold"):
        train(recipe("lora", tiny_base, chats, learning_rate=1e30), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_method_that_does_not_fit_says_so_before_a_weight_is_read(
    make_base: Any, chats: Path, tmp_path: Path
) -> None:
    base = make_base()
    (base / "model.safetensors").unlink()
    with pytest.raises(MethodUnfit):
        train(recipe("prefix", base, chats, gradient_checkpointing=True), tmp_path / "out")
    assert not work_folder(tmp_path / "out").exists()


def test_no_list_in_the_config_is_in_the_order_of_a_set(tiny_base: Path, chats: Path, tmp_path: Path) -> None:
    train(recipe("ia3", tiny_base, chats), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(config["target_modules"])
    assert config["base_model_name_or_path"] == str(tiny_base)


def test_an_adapter_of_an_embedded_base_names_no_path_of_this_machine(tmp_path: Path) -> None:
    options = {"virtual_tokens": 8, "init": "text", "init_text": "say"}
    train(recipe("prompt", Path("seedling"), "task:echo:40", options=options, steps=1, eval_rows=4), tmp_path / "out")
    said = b"".join(content for name, content in contents(tmp_path / "out").items() if not name.endswith("tensors"))
    assert str(open_base("seedling").folder).encode() not in said
    assert b'"tokenizer_name_or_path": "seedling"' in said


def test_golden_prompts_are_distinct_and_short_where_they_can_be() -> None:
    from trainer.encode import IGNORED, Encoded

    def row(length: int, token: int) -> Encoded:
        return Encoded((*[token] * length, 1), (*[IGNORED] * length, 1))

    assert golden_prompts([row(2, 5), row(2, 5), row(600, 6)]) == [(5, 5)]
    assert golden_prompts([row(700, 5), row(600, 6)]) == [(6,) * 600]
    assert len(golden_prompts([row(3, token) for token in range(20)])) == 4


TIED = {"model_type": "llama", "tie_word_embeddings": True}
OF_THE_VOCABULARY: dict[str, dict[str, Any]] = {
    "head": {"targets": ["q_proj", "lm_head"], "dropout": 0.3},
    "head-dora": {"targets": ["lm_head"], "dora": True},
    "head-pissa": {"targets": ["lm_head", "v_proj"], "init": "pissa"},
    "whole": {"targets": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens", "model.norm"]},
    "tokens": {"targets": ["q_proj"], "trainable_token_indices": ["bag", 9], "init": "olora"},
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", OF_THE_VOCABULARY)
def test_head_and_vocabulary_are_trained_saved_and_served(
    name: str, tied: bool, make_base: Any, chats: Path, tmp_path: Path
) -> None:
    base = make_base(**TIED if tied else {})
    wanted = recipe("lora", base, chats, options={"rank": 2, **OF_THE_VOCABULARY[name]}, steps=4)
    if tied and name == "head-pissa":
        with pytest.raises(MethodUnfit, match="takes its start off the output head's weight, which is the embedding's"):
            train(wanted, tmp_path / "out")
        return
    if tied and name == "head-dora":  # the padding token's row
        with pytest.raises(BaseUnfit, match="lm_head has rows of zeros, and DoRA divides by their length"):
            train(wanted, tmp_path / "out")
        return
    metrics = train(wanted, tmp_path / "out").metrics
    assert metrics["eval_loss"] < metrics["base_eval_loss"]
    validate(tmp_path / "out", base=base)
    assert served_error(tmp_path / "out", base) < SERVED


def test_an_adapted_head_is_trained_alike_in_one_batch_in_several_and_with_checkpointing(
    tiny_base: Path, chats: Path, tmp_path: Path
) -> None:
    options = {"rank": 2, "targets": ["lm_head", "q_proj"]}
    made, watches = [], []
    for index, (batch, times, again) in enumerate(((8, 1, False), (2, 4, False), (8, 1, True))):
        fields = {"batch_size": batch, "gradient_accumulation": times, "gradient_checkpointing": again}
        watches.append(StopAt(-1))
        wanted = recipe("lora", tiny_base, chats, options=options, steps=4, **fields)
        train(wanted, tmp_path / str(index), report=watches[-1])
        made.append(tensors(tmp_path / str(index) / "adapter_model.safetensors"))
    assert watches[1].steps[0].loss == pytest.approx(watches[0].steps[0].loss, rel=SAME_SUMS)
    for name, value in made[0].items():
        assert torch.allclose(value, made[1][name], atol=1e-4)  # the same sums in another order, through Adam
        assert torch.equal(value, made[2][name])


def test_a_bias_of_the_output_head_is_trained(make_base: Any, chats: Path, tmp_path: Path) -> None:
    base = biased_base(make_base)
    train(recipe("bitfit", base, chats, steps=2, options={"targets": ["lm_head"]}), tmp_path / "out")
    trained = tensors(tmp_path / "out" / "adapter_model.safetensors")
    assert not torch.equal(
        trained["base_model.model.lm_head.bias"], load_file(base / "model.safetensors")["lm_head.bias"]
    )


def test_what_the_hub_would_refuse_is_refused_before_a_weight_is_read(
    tiny_base: Path, chats: Path, tmp_path: Path
) -> None:
    with pytest.raises(MethodUnfit, match="block_size 12 does not divide"):
        train(recipe("c3a", tiny_base, chats, options={"block_size": 12}), tmp_path / "out")
    assert not work_folder(tmp_path / "out").exists()


def test_a_run_that_adapts_the_head_is_taken_up_where_it_was(tiny_base: Path, chats: Path, tmp_path: Path) -> None:
    wanted = recipe("lora", tiny_base, chats, options=OF_THE_VOCABULARY["head"])
    train(wanted, tmp_path / "whole")
    stopped = StopAt(6)
    with pytest.raises(Interrupted):
        train(wanted, tmp_path / "resumed", report=stopped, stop=stopped.event)
    train(wanted, tmp_path / "resumed", workshop=Workshop(existing="resume"))
    assert contents(tmp_path / "resumed") == contents(tmp_path / "whole")
