"""Fused versions against explicitly summed weights and against PEFT's own merges, where those are right."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import (
    AdaLoraConfig,
    DeloraConfig,
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    PeftModel,
    VeraConfig,
)
from peft import get_peft_model as adapted
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hub.errors import Refused
from hub.methods import Limits
from hub.ref import parse_mixture, parse_reference
from hub.registry import LocalHub
from server.config import ModelConfig
from server.model.load import load_network
from tests.oracle.conftest import Bench as Engine
from tests.unit.trainer.conftest import MakeBase
from trainer.errors import FusionRefused
from trainer.factors import Factors, everything, share_of_energy
from trainer.fuse import Fused, Plan, fuse, fused_linear
from trainer.parents import Parent

TOLERANCE = 2e-6  # fp32 weights of about one, summed in another order
SERVED_TOLERANCE = 1e-4  # fp32; the packed products sum in another order
PROMPT = [5, 9, 77, 3, 101, 42, 64, 8]
COMMON: dict[str, Any] = {"task_type": "CAUSAL_LM"}
ATTENTION = ["q_proj", "v_proj"]

# What a Linear does: its matrix (O, I) and its bias.
Affine = tuple[Tensor, Tensor]
Maps = Mapping[str, Affine]

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns of what these adapters are on purpose

CONFIGS: Mapping[str, Any] = {
    "plain": LoraConfig(r=4, lora_alpha=8, target_modules=[*ATTENTION, "down_proj"], **COMMON),
    "other": LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "up_proj"], **COMMON),
    "rslora": LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=ATTENTION, **COMMON),
    "rslora-too": LoraConfig(r=4, lora_alpha=4, use_rslora=True, target_modules=ATTENTION, **COMMON),
    "patterns": LoraConfig(
        r=3, lora_alpha=6, rank_pattern={"v_proj": 5}, alpha_pattern={"layers.1.*q_proj": 9}, target_modules=ATTENTION,
        layers_to_transform=[1], **COMMON,
    ),
    "biases": LoraConfig(r=2, lora_alpha=8, lora_bias=True, bias="all", target_modules=["q_proj"], **COMMON),
    "adalora": AdaLoraConfig(init_r=4, total_step=9, target_modules=ATTENTION, **COMMON),
    "vera": VeraConfig(r=4, target_modules=["q_proj", "down_proj"], **COMMON),
    "loha": LoHaConfig(r=2, target_modules=ATTENTION, **COMMON),
    "delora": DeloraConfig(r=3, target_modules=ATTENTION, **COMMON),
    "ia3": IA3Config(target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"], **COMMON),
    "ia3-too": IA3Config(target_modules=["q_proj", "v_proj"], feedforward_modules=[], **COMMON),
    "ia3-input": IA3Config(target_modules=["v_proj"], feedforward_modules=["v_proj"], **COMMON),
    "miss": MissConfig(r=5, target_modules=[*ATTENTION, "down_proj"], bias="all", **COMMON),
    "miss-mini": MissConfig(r=3, init_weights="mini", mini_r=8, target_modules=ATTENTION, **COMMON),
    "hra": HRAConfig(r=4, target_modules=[*ATTENTION, "up_proj"], bias="hra_only", **COMMON),
    "hra-gs": HRAConfig(r=2, apply_GS=True, target_modules=["q_proj"], **COMMON),
    "dora": LoraConfig(r=4, use_dora=True, target_modules=ATTENTION, **COMMON),
    "dora-biased": LoraConfig(r=2, use_dora=True, bias="all", target_modules=["q_proj", "down_proj"], **COMMON),
    "oft": OFTConfig(oft_block_size=8, target_modules=ATTENTION, **COMMON),
}  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """A hub with adapters of one base, and what each of them makes of every Linear."""

    hub: LocalHub
    base: Path
    folders: Mapping[str, Path]
    maps: Mapping[str, Maps]

    def fuse(self, mixture: str, plan: Plan, work: Path, **limits: int) -> tuple[Fused, Maps, Path]:
        folder = work / "fused"
        folder.mkdir(parents=True)
        made = fuse(self.hub, parse_mixture(mixture), folder, plan=plan, work=work, limits=Limits(**limits))
        return made, affine_maps(with_adapter(self.base, folder)), folder

    def summed(self, mixture: str) -> Maps:
        plain = self.maps["base"]
        terms = [(self.maps[term.reference.name], term.weight) for term in parse_mixture(mixture)]
        return {
            name: (
                plain[name][0] + sum(weight * (maps[name][0] - plain[name][0]) for maps, weight in terms),
                plain[name][1] + sum(weight * (maps[name][1] - plain[name][1]) for maps, weight in terms),
            )
            for name in plain
        }


def load(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def with_adapter(base: Path, folder: Path) -> Any:
    return PeftModel.from_pretrained(load(base), str(folder)).eval()


def affine_maps(model: nn.Module) -> Maps:
    """Each Linear's matrix and bias as it answers to zero and to the unit vectors, adapter and all."""
    maps: dict[str, Affine] = {}
    for name, module in model.named_modules():
        linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        inner = any(part in name for part in (".base_layer", "lora_", "vera_", "ia3_"))
        if inner or "lm_head" in name or not (linear or hasattr(module, "base_layer")):
            continue
        stock: Any = getattr(module, "base_layer", module)
        inputs = stock.weight.shape[0] if type(stock).__name__ == "Conv1D" else stock.weight.shape[1]
        with torch.inference_mode():
            bias = module(torch.zeros(1, inputs))[0]
            maps[name.removeprefix("base_model.model.")] = ((module(torch.eye(inputs)) - bias).mT, bias)
    return maps


def assert_same(got: Maps, wanted: Maps) -> None:
    assert got.keys() == wanted.keys()
    for name in wanted:
        for one, other in zip(got[name], wanted[name], strict=True):
            torch.testing.assert_close(one, other, atol=TOLERANCE, rtol=0, msg=lambda text: f"{name}: {text}")  # noqa: B023


def make_bench(base: Path, root: Path, configs: Mapping[str, Any]) -> Bench:
    hub, folders, maps = LocalHub(root / "home"), {}, {"base": affine_maps(load(base))}
    for seed, (name, config) in enumerate(configs.items()):
        torch.manual_seed(seed)
        model = adapted(load(base), config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.2 * torch.randn_like(parameter)
        folders[name] = root / name
        model.save_pretrained(str(folders[name]))
        (folders[name] / "README.md").unlink(missing_ok=True)
        hub.push(folders[name], name)
        maps[name] = affine_maps(with_adapter(base, folders[name]))
    return Bench(hub, base, folders, maps)


@pytest.fixture(scope="module")
def bench(make_base: MakeBase, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Qwen2 has biases at q, k and v; a fresh one's are zero, which would hide how they are read."""
    base = make_base(model_type="qwen2")
    tensors = load_file(base / "model.safetensors")
    torch.manual_seed(0)
    tensors = {
        name: tensor + torch.randn_like(tensor) if "bias" in name else tensor for name, tensor in tensors.items()
    }
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    return make_bench(base, tmp_path_factory.mktemp("bench"), CONFIGS)


@pytest.mark.parametrize("method", ["cat", "linear"])
@pytest.mark.parametrize(
    "mixture",
    ["plain*0.7+other*-0.4", "rslora*0.5+rslora-too*2", "plain+patterns*-1+biases*0.5", "plain*0.5+plain*0.25",
     "adalora*0.5+vera+loha*-1+delora*0.3", "miss*0.5+plain*-0.3", "miss-mini*-2+hra", "hra*-0.5+hra-gs+miss"],
)  # fmt: skip
def test_an_exact_method_is_the_weighted_sum_of_the_deltas(
    bench: Bench, mixture: str, method: str, tmp_path: Path
) -> None:
    made, maps, folder = bench.fuse(mixture, Plan(method), tmp_path)
    assert_same(maps, bench.summed(mixture))
    assert made.metrics["relative_error"] < 1e-6
    assert made.metrics["worst_relative_error"] < 1e-6
    pushed = bench.hub.push(folder, "fused")
    manifest = bench.hub.manifest(pushed.digest)
    assert manifest.kind == "lora" and manifest.parents == tuple(parent.digest for parent in made.parents)


@pytest.mark.parametrize(
    ("mixture", "plan"),
    [
        ("hra*0.6+miss*-0.4+plain*0.5", Plan("cat")),
        ("miss-mini+hra-gs*-0.7", Plan("linear")),
        ("dora*0.5+dora-biased*-0.5+hra*0.2", Plan("svd", rank=64)),
    ],
    ids=["cat", "linear", "svd"],
)
def test_a_fused_version_is_served_as_the_summed_weights_and_as_the_mixture_itself(
    bench: Bench, mixture: str, plan: Plan, tmp_path: Path
) -> None:
    _, _, folder = bench.fuse(mixture, plan, tmp_path)
    engine = Engine(load_network(ModelConfig(base="base"), bench.base, name="base"))
    kinds = {name: bench.hub.manifest(bench.hub.resolve(parse_reference(name)).digest).kind for name in CONFIGS}
    terms = [
        (engine.graft(bench.folders[one.reference.name], kinds[one.reference.name]), one.weight)
        for one in parse_mixture(mixture)
    ]
    fused, mixed, plain = engine.run([(PROMPT, [(engine.graft(folder, "lora"), 1.0)]), (PROMPT, terms), (PROMPT, [])])
    summed = load(bench.base)
    for name, (matrix, bias) in bench.summed(mixture).items():
        module = summed.get_submodule(name)
        module.weight, module.bias = nn.Parameter(matrix.clone()), nn.Parameter(bias.clone())
    with torch.inference_mode():
        wanted = summed(input_ids=torch.tensor([PROMPT])).logits[0]
    for got in (fused, mixed):
        torch.testing.assert_close(got, wanted, atol=SERVED_TOLERANCE, rtol=0)
    assert (fused - plain).abs().max() > 100 * SERVED_TOLERANCE


def test_linear_finds_the_rank_that_cat_does_not(bench: Bench, tmp_path: Path) -> None:
    again = tmp_path / "again"
    bench.hub.pull(parse_reference("plain"), again)
    config = json.loads((again / "adapter_config.json").read_text())
    (again / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 3}))
    bench.hub.push(again, "scaled")
    ranks = {}
    for method in ("cat", "linear"):
        made, _, _ = bench.fuse("plain+scaled*0.5", Plan(method), tmp_path / method)
        ranks[method] = {one["rank"] for one in made.metrics["linears"].values()}
    assert ranks == {"cat": {8}, "linear": {4}}
    for method in ("cat", "linear"):
        with pytest.raises(FusionRefused, match="the deltas cancel each other out"):
            bench.fuse("plain*3+scaled*-8", Plan(method), tmp_path / f"no {method}")


def peft_merge(bench: Bench, names: list[str], weights: list[float], method: str, **options: Any) -> Maps:
    model = PeftModel.from_pretrained(load(bench.base), str(bench.folders[names[0]]), adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(str(bench.folders[name]), adapter_name=name)
    model.add_weighted_adapter(names, weights, "merged", combination_type=method, **options)
    model.set_adapter("merged")
    return affine_maps(model.eval())


@pytest.mark.parametrize(
    ("plan", "theirs", "options"),
    [
        (Plan("cat"), "cat", {}),
        (Plan("svd", rank=3), "svd", {"svd_rank": 3}),
        (Plan("ties", density=0.4, rank=5), "ties_svd", {"svd_rank": 5, "density": 0.4}),
        (Plan("magnitude_prune", density=0.3, rank=4), "magnitude_prune_svd", {"svd_rank": 4, "density": 0.3}),
    ],
    ids=lambda value: value.method if isinstance(value, Plan) else "",
)
def test_a_method_is_that_of_peft_where_peft_is_right(
    bench: Bench, plan: Plan, theirs: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """Equal weights: with others PEFT elects the signs of unweighted deltas, and we those of the weighted ones."""
    _, maps, _ = bench.fuse("plain*0.5+other*0.5", plan, tmp_path)
    assert_same(maps, peft_merge(bench, ["plain", "other"], [0.5, 0.5], theirs, **options))


@pytest.mark.parametrize("plan", [Plan("cat"), Plan("svd", rank=8)], ids=lambda plan: plan.method)
def test_rslora_is_summed_right_where_peft_scales_it_again(bench: Bench, plan: Plan, tmp_path: Path) -> None:
    mixture, names = "rslora*0.5+rslora-too*2", ["rslora", "rslora-too"]
    _, maps, _ = bench.fuse(mixture, plan, tmp_path)
    wanted, plain = bench.summed(mixture), bench.maps["base"]
    assert_same(maps, wanted)
    theirs = peft_merge(bench, names, [0.5, 2.0], plan.method, **({"svd_rank": 8} if plan.method == "svd" else {}))
    module = "model.layers.0.self_attn.q_proj"
    ratio = (theirs[module][0] - plain[module][0]).norm() / (wanted[module][0] - plain[module][0]).norm()
    assert float(ratio) == pytest.approx(8**0.5, rel=1e-3)  # when this fails, PEFT has mended it


@pytest.mark.parametrize("mixture", ["plain*0.7+rslora*-0.4", "dora*0.7+dora-biased*-0.5+hra"])
def test_an_approximation_tells_its_error(bench: Bench, mixture: str, tmp_path: Path) -> None:
    for plan in (Plan("svd", rank=2), Plan("dare_ties", density=0.5, rank=3), Plan("svd", energy=0.8)):
        made, maps, _ = bench.fuse(mixture, plan, tmp_path / f"{plan.method}{plan.rank}")
        wanted, plain = bench.summed(mixture), bench.maps["base"]
        lost = {name: float((maps[name][0] - wanted[name][0]).norm()) for name in plain}
        size = {name: float((wanted[name][0] - plain[name][0]).norm()) for name in plain}
        overall = sum(one**2 for one in lost.values()) ** 0.5 / sum(one**2 for one in size.values()) ** 0.5
        assert made.metrics["relative_error"] == pytest.approx(overall, rel=1e-4)
        relative = {name: lost[name] / size[name] for name in plain if size[name] > 100 * TOLERANCE}
        assert made.metrics["worst_relative_error"] == pytest.approx(max(relative.values()), rel=1e-4)
        assert relative[made.metrics["worst_linear"]] == pytest.approx(max(relative.values()), rel=1e-4)
        if plan.energy is not None:
            assert max(relative.values()) <= (1 - plan.energy) ** 0.5 + TOLERANCE


def test_a_delta_of_full_rank_is_what_it_is_at_a_rank_that_holds_it(bench: Bench, tmp_path: Path) -> None:
    mixture = "dora*0.7+dora-biased*-1.5+plain"
    made, maps, folder = bench.fuse(mixture, Plan("svd", rank=64), tmp_path)
    assert_same(maps, bench.summed(mixture))
    assert made.metrics["relative_error"] < 1e-6
    assert max(one["rank"] for one in made.metrics["linears"].values()) == 32, "all of the smaller side"
    assert bench.hub.push(folder, "of-full-rank").version == 1


def test_a_rank_that_cuts_the_energy_off_is_counted(bench: Bench, tmp_path: Path) -> None:
    for limit in (6, 2):
        made, _, _ = bench.fuse("plain+other", Plan("svd", energy=0.99), tmp_path / str(limit), max_rank=limit)
        below = [name for name, one in made.metrics["linears"].items() if one["relative_error"] ** 2 > 0.01]
        assert made.metrics["linears_below_energy"] == len(below)
        assert bool(below) == (limit == 2)


def test_ia3_is_summed_around_one(bench: Bench, tmp_path: Path) -> None:
    mixture = "ia3*0.5+ia3-too*-2"
    _, maps, folder = bench.fuse(mixture, Plan("linear"), tmp_path)
    assert_same(maps, bench.summed(mixture))
    assert bench.hub.manifest(bench.hub.push(folder, "scales").digest).kind == "ia3"
    with pytest.raises(FusionRefused, match=r"scales one side of .*v_proj and another parent the other side"):
        bench.fuse("ia3+ia3-input", Plan("linear"), tmp_path / "sides")
    with pytest.raises(FusionRefused, match="ia3 is fused by linear"):
        bench.fuse("ia3+ia3-too", Plan("svd"), tmp_path / "svd")


def test_conv1d_is_fused_as_what_it_multiplies_with(make_base: MakeBase, tmp_path: Path) -> None:
    base = make_base(model_type="gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=64)
    rows = {
        "one": LoraConfig(r=3, target_modules=["c_attn", "mlp.c_proj"], fan_in_fan_out=True, **COMMON),
        "two": VeraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, **COMMON),
        "dora": LoraConfig(r=2, use_dora=True, target_modules=["attn.c_proj"], fan_in_fan_out=True, **COMMON),
    }
    bench = make_bench(base, tmp_path, rows)
    _, maps, folder = bench.fuse("one*0.5+two*-1", Plan("cat"), tmp_path / "work")
    assert_same(maps, bench.summed("one*0.5+two*-1"))
    assert bench.hub.push(folder, "fused").version == 1
    _, maps, _ = bench.fuse("one*0.5+dora*-1", Plan("svd", rank=64), tmp_path / "full")
    assert_same(maps, bench.summed("one*0.5+dora*-1"))


@pytest.mark.parametrize(
    ("mixture", "plan", "limit", "reason"),
    [
        ("plain+dora", Plan("cat"), 256, "dora@1 has use_dora, which scales .* of full rank, which cat cannot hold"),
        ("dora", Plan("linear"), 256, "dora@1 has use_dora, which scales .* of full rank, which linear cannot hold"),
        ("plain+oft", Plan("svd"), 256, "oft@1 cannot be fused.*kind oft is none of .*no low-rank term"),
        ("plain+ia3", Plan("linear"), 256, "ia3@1 is ia3, which scales, and the others add"),
        ("plain+other", Plan("cat"), 5, "cat makes rank 6 at .*q_proj, which is above max_rank 5"),
        ("plain+other", Plan("svd", rank=6), 5, "rank 6 is above max_rank 5"),
        ("plain+other", Plan("linear"), 5, "linear makes rank 6 at .*q_proj, which is above max_rank 5"),
        ("plain+plain*-1", Plan("cat"), 256, "the weight of plain@1 is 0"),
    ],
)
def test_what_no_file_can_hold_is_refused(
    bench: Bench, mixture: str, plan: Plan, limit: int, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(FusionRefused, match=reason):
        bench.fuse(mixture, plan, tmp_path, max_rank=limit)


def test_a_parent_of_another_base_is_refused_with_both_values(
    bench: Bench, make_base: MakeBase, tmp_path: Path
) -> None:
    other = make_base(model_type="qwen2", intermediate_size=64)
    torch.manual_seed(0)
    adapted(load(other), CONFIGS["plain"]).save_pretrained(str(tmp_path / "stranger"))
    (tmp_path / "stranger" / "README.md").unlink()
    bench.hub.push(tmp_path / "stranger", "stranger")
    with pytest.raises(FusionRefused, match=r"stranger@1 was made for base .*intermediate_size 64 against 48"):
        bench.fuse("plain+stranger", Plan("cat"), tmp_path)


def test_the_same_mixture_gives_the_same_version_with_its_parents(bench: Bench, tmp_path: Path) -> None:
    plan = Plan("dare_linear", density=0.5, rank=4, seed=7)
    digests = []
    for number in range(2):
        _, _, folder = bench.fuse("plain*0.7+other", plan, tmp_path / str(number))
        digests.append(bench.hub.push(folder, f"dare-{number}").digest)
    assert digests[0] == digests[1]
    manifest = bench.hub.manifest(digests[0])
    assert manifest.recipe is not None and manifest.metrics is not None
    plain, other = (bench.hub.resolve(parse_reference(name)).digest for name in ("plain", "other"))
    assert manifest.recipe["lineage"] == [
        {"name": "plain", "version": 1, "digest": plain, "weight": 0.7},
        {"name": "other", "version": 1, "digest": other, "weight": 1.0},
    ]
    assert manifest.recipe["fusion"] == {"method": "dare_linear", "rank": 4, "density": 0.5, "seed": 7}
    assert manifest.metrics["relative_error"] > 0
    assert 0 < manifest.metrics["rank_error"] < 1
    golden = load_file(tmp_path / "0" / "fused" / "golden.safetensors")
    model = with_adapter(bench.base, tmp_path / "0" / "fused")
    with torch.inference_mode():
        logits = model(input_ids=golden["0.input_ids"][None]).logits[0, -1]
    torch.testing.assert_close(logits, golden["0.logits"])


def test_a_lineage_that_contradicts_the_parents_is_refused(bench: Bench, tmp_path: Path) -> None:
    _, _, folder = bench.fuse("plain*0.7+other", Plan("cat"), tmp_path)
    recipe = json.loads((folder / "recipe.json").read_text())
    recipe["lineage"].reverse()
    (folder / "recipe.json").write_text(json.dumps(recipe))
    with pytest.raises(Refused, match="lineage: must name each of parents in order"):
        bench.hub.push(folder, "lies")


terms = st.lists(
    st.tuples(st.floats(-2, 2).filter(lambda weight: abs(weight) > 1e-3), st.integers(1, 4)), min_size=1, max_size=4
)


@given(terms, st.integers(2, 8), st.integers(2, 8), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_any_mixture_is_its_weighted_sum_or_as_near_as_it_says(
    mixture: list[tuple[float, int]], outputs: int, inputs: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    parents = [
        (
            Parent(f"p{number}", 1, f"sha256:{number}", weight, cast(Any, None)),
            Factors(torch.randn(rank, inputs, generator=generator), torch.randn(outputs, rank, generator=generator)),
        )
        for number, (weight, rank) in enumerate(mixture)
    ]
    exact = sum(parent.weight * factors.dense() for parent, factors in parents)
    assert isinstance(exact, Tensor)
    cpu = torch.device("cpu")
    for method in ("cat", "linear"):
        made = fused_linear(parents, "m", Plan(method), everything, cpu)
        torch.testing.assert_close(made.factors.dense(), exact, atol=1e-5, rtol=1e-5)
    for plan in (Plan("svd", energy=0.7), Plan("ties", density=0.5), Plan("dare_linear", density=0.5)):
        made = fused_linear(parents, "m", plan, share_of_energy(0.7, limit=8), cpu)
        lost = torch.linalg.matrix_norm(made.factors.dense() - exact)
        assert made.error == pytest.approx(float(lost), abs=1e-5)
    assert made.size == pytest.approx(float(torch.linalg.matrix_norm(exact)), rel=1e-6)
