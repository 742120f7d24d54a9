"""Files that AdapterHub's `adapters` made (adapterhub/make_fixtures.py): converted, they give its own logits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hub.methods import METHODS
from hub.validate import validate
from server.config import ModelConfig
from server.model.load import load_network
from tests.oracle.conftest import Bench
from trainer.adapterhub.command import import_folder
from trainer.errors import ImportRefused
from trainer.modules.attach import attach

FIXTURES = Path(__file__).parent / "adapterhub" / "fixtures"
TOLERANCE = 1e-4  # fp32; sums in another order, another release of transformers
REFUSED = ("noreft",)
MADE = [
    (folder.parent.name, folder.name)
    for folder in sorted(FIXTURES.glob("*/*"))
    if folder.is_dir() and folder.name != "base"
]
CONVERTED = [
    (base, name) for base, name in MADE if name not in REFUSED and (base, name) != ("gpt2", "prefix_tuning_flat")
]

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns of targets named whole


@pytest.fixture(scope="module")
def benches() -> Callable[[str], Bench]:
    made: dict[str, Bench] = {}

    def bench(base: str) -> Bench:
        if base not in made:
            made[base] = Bench(load_network(ModelConfig(base=base), FIXTURES / base / "base", name=base))
        return made[base]

    return bench


@pytest.mark.parametrize(("base", "name"), CONVERTED)
def test_a_converted_adapter_gives_the_logits_of_adapterhub(
    base: str, name: str, benches: Callable[[str], Bench], tmp_path: Path
) -> None:
    """By its training module or PEFT, and by the server where its kind is served."""
    truth = load_file(FIXTURES / base / "logits.safetensors")
    import_folder(FIXTURES / base / name, tmp_path / "out", str(FIXTURES / base / "base"))
    model = AutoModelForCausalLM.from_pretrained(FIXTURES / base / "base", dtype=torch.float32).eval()
    ids = truth["input_ids"]
    assert (logits(model, ids) - truth["base"]).abs().max() < TOLERANCE
    assert (truth[name] - truth["base"]).abs().max() > 100 * TOLERANCE
    assert (logits(attach(model, tmp_path / "out"), ids) - truth[name]).abs().max() < TOLERANCE
    peft_type = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["peft_type"]
    if peft_type in METHODS:
        manifest = validate(tmp_path / "out", base=FIXTURES / base / "base")
        bench = benches(base)
        served = bench.run([(ids.tolist(), [(bench.graft(tmp_path / "out", manifest.kind), 1.0)]), (ids.tolist(), [])])
        assert (served[0] - truth[name]).abs().max() < TOLERANCE
        assert (served[1] - truth["base"]).abs().max() < TOLERANCE


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None]).logits[0]
    return found[-len(ids) :]


@pytest.fixture
def refusal(tmp_path: Path) -> Callable[..., str]:
    """What the import says to a fixture whose config was changed."""

    def refused(name: str, base: str = "llama", about: dict[str, Any] | None = None, **changes: Any) -> str:
        folder = tmp_path / "in"
        shutil.copytree(FIXTURES / base / name, folder)
        config = json.loads((folder / "adapter_config.json").read_text())
        config["config"].update(changes)
        (folder / "adapter_config.json").write_text(json.dumps({**config, **(about or {})}))
        with pytest.raises(ImportRefused) as caught:
            import_folder(folder, tmp_path / "out", str(FIXTURES / base / "base"))
        assert not (tmp_path / "out").exists()
        return str(caught.value)

    return refused


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("noreft", {}, "orthogonality False is not converted (without it, the file does not tell NoReFT from DiReFT"),
        ("seq_bn", {"use_gating": True}, "use_gating True is not converted (its gate is averaged"),
        ("seq_bn", {"ln_after": True}, "ln_after True is not converted"),
        ("seq_bn", {"ln_before": True}, "ln_before True is not converted"),
        ("seq_bn", {"inv_adapter": "nice"}, "inv_adapter 'nice' is not converted"),
        ("seq_bn", {"residual_before_ln": "post_add"}, "residual_before_ln 'post_add'"),
        ("seq_bn", {"original_ln_after": False}, "together drop the residual stream or add it twice"),
        ("double_seq_bn", {"original_ln_after": False}, "together drop the residual stream or add it twice"),
        ("par_bn", {"original_ln_after": False}, "together drop the residual stream or add it twice"),
        ("seq_bn", {"non_linearity": "mish"}, "non_linearity mish is not converted"),
        ("seq_bn", {"future": 1}, "future is no field that is known"),
        ("double_seq_bn", {"mh_adapter": False}, "belongs to nothing in the config"),
        ("compacter", {"shared_W_phm": True}, "shared_W_phm True is not converted"),
        ("lora", {"vera_d": 0.1}, "vera_d 0.1 is not converted"),
        ("lora", {"use_gating": True}, "use_gating True"),
        ("lora", {"composition_mode": "maybe"}, "composition_mode 'maybe'"),
        ("lora", {"architecture": "mtl_lora"}, "architecture 'mtl_lora' is not converted; these are: bottleneck, reft"),
        ("dora", {"alpha": 6}, "use_dora with alpha 6 and r 3"),
        ("prefix_tuning", {"leave_out": [0]}, "leave_out [0] is not converted (a prefix stands in every layer)"),
        ("loreft", {"prefix_positions": 0, "suffix_positions": 0}, "are both 0"),
    ],
)
def test_what_cannot_be_converted_exactly_is_refused_by_name(
    name: str, changes: dict[str, Any], says: str, refusal: Callable[..., str]
) -> None:
    assert says in refusal(name, **changes)


def test_a_prefix_on_learned_positions_is_refused(refusal: Callable[..., str]) -> None:
    assert "takes no positions, for which only rotated keys make up" in refusal("prefix_tuning_flat", base="gpt2")


def test_an_adapter_of_another_base_is_refused(refusal: Callable[..., str]) -> None:
    assert "hidden_size 64, but base" in refusal("seq_bn", about={"hidden_size": 64})


def test_a_pickle_is_never_read_and_the_way_out_is_named(tmp_path: Path) -> None:
    """The way out is what made the fixtures of prefix tuning."""
    shutil.copytree(FIXTURES / "llama" / "seq_bn", tmp_path / "in")
    (tmp_path / "in" / "adapter.safetensors").rename(tmp_path / "in" / "pytorch_adapter.bin")
    with pytest.raises(ImportRefused, match="is a pickle, which is never read: save it with use_safetensors=True"):
        import_folder(tmp_path / "in", tmp_path / "out", str(FIXTURES / "llama" / "base"))


@pytest.mark.parametrize(
    ("file", "says"), [("head_config.json", "prediction heads"), ("adapter_config.json", "no JSON")]
)
def test_other_files_that_would_be_ignored_are_refused(file: str, says: str, tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "llama" / "seq_bn", tmp_path / "in")
    (tmp_path / "in" / file).write_text("?")
    with pytest.raises(ImportRefused, match=says):
        import_folder(tmp_path / "in", tmp_path / "out", str(FIXTURES / "llama" / "base"))


@pytest.mark.parametrize("extra", ["model.layers.0.odd.weight", "model.layers.0.output_adapters.adapters.seq_bn.odd"])
def test_a_tensor_too_many_is_refused(extra: str, tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "llama" / "seq_bn", tmp_path / "in")
    path = tmp_path / "in" / "adapter.safetensors"
    save_file({**load_file(path), extra: torch.zeros(2)}, path)
    with pytest.raises(ImportRefused, match=r"odd"):
        import_folder(tmp_path / "in", tmp_path / "out", str(FIXTURES / "llama" / "base"))
