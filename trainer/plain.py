"""A plain adapter out of matrices: LoRA with a scaling of one, or IA3, as the folder that PEFT loads and a hub takes.

Ranks may differ from Linear to Linear: they stand in rank_pattern, and alpha beside them, so that alpha / r is one.
Golden rows come from the folder itself, loaded by PEFT on a fresh base, as the trainer's do.
Law: PEFT, loading the folder, adds exactly B A and the bias at each Linear, and nothing anywhere else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hub.base import Modules, conv1d_layers
from hub.families.method import TENSOR_PREFIX
from hub.fields import MAX_PATTERNS
from hub.manifest import GOLDEN_TENSORS_FILE, METRICS_FILE, README_FILE, RECIPE_FILE, WEIGHTS_FILE
from hub.targets import target_modules
from trainer import export
from trainer.base import OpenBase
from trainer.factors import Factors, stored

# Asked where nobody has said what the adapter is for; any text makes a witness.
PROMPTS: Final = (
    "The capital of France is",
    "Write one sentence about the sea.",
    "12 + 30 =",
    "def add(a, b):",
)
IDS_ENDING: Final = ".input_ids"


@dataclass(frozen=True, slots=True)
class Stock:
    """What an adapter is written for: the base's modules, its type, and the name by which the config calls it."""

    modules: Modules
    model_type: str
    name: str

    def transposes(self, targeted: Iterable[str]) -> bool:
        """Whether these are GPT-2's Conv1D."""
        return any(module.rpartition(".")[2] in conv1d_layers(self.model_type) for module in targeted)


def write_lora(
    folder: Path,
    linears: Mapping[str, Factors],
    biases_O: Mapping[str, Tensor],
    stock: Stock,
) -> None:
    """Write config and weights. A Linear with a bias alone gets a rank of zeros to carry it."""
    from peft import LoraConfig

    whole = {**{module: _nothing(stock.modules, module) for module in biases_O}, **linears}
    targeted = [module for module in stock.modules.linears if module in whole]
    ranks = {module: whole[module].rank for module in targeted}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    pattern = rank_pattern(ranks, usual)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=usual,
        lora_alpha=usual,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=shortest_names(targeted, stock.modules),
        lora_bias=bool(biases_O),
        fan_in_fan_out=stock.transposes(targeted),
        inference_mode=True,
    )
    tensors = {}
    for module in targeted:
        root, factors = f"{TENSOR_PREFIX}{module}", stored(whole[module])
        tensors[f"{root}.lora_A.weight"] = factors.A_RI.cpu()
        tensors[f"{root}.lora_B.weight"] = factors.B_OR.cpu()
        if biases_O:
            none = torch.zeros(stock.modules.linears[module].outputs)
            tensors[f"{root}.lora_B.bias"] = biases_O.get(module, none).float().cpu().contiguous()
    _write(folder, config, tensors, stock.name)


def write_ia3(folder: Path, scales: Mapping[str, Tensor], stock: Stock) -> None:
    """`scales` are (O, 1) on an output, (1, I) on an input."""
    from peft import IA3Config

    targeted = [module for module in stock.modules.linears if module in scales]
    feedforward = [module for module in targeted if scales[module].shape[0] == 1]
    config = IA3Config(
        task_type="CAUSAL_LM",
        # PEFT wants the one list within the other, name by name.
        target_modules=targeted if feedforward else shortest_names(targeted, stock.modules),
        feedforward_modules=feedforward,
        fan_in_fan_out=stock.transposes(targeted),
        inference_mode=True,
    )
    tensors = {f"{TENSOR_PREFIX}{module}.ia3_l": scales[module].float().cpu().contiguous() for module in targeted}
    _write(folder, config, tensors, stock.name)


def finish(
    folder: Path,
    base: OpenBase,
    prompts: Sequence[tuple[int, ...]],
    device: torch.device,
    *,
    recipe: Mapping[str, Any],
    metrics: Mapping[str, Any],
    card: str,
) -> None:
    """Write what stands beside the weights: golden rows, recipe, metrics, card."""
    loaded = export.load_adapter(folder, base, device)
    export.write_golden(loaded, folder, base, prompts)
    export.write_json(folder / RECIPE_FILE, recipe)
    export.write_json(folder / METRICS_FILE, {"schema_version": export.SCHEMA_VERSION, **metrics})
    (folder / README_FILE).write_text(card, encoding="utf-8")


def golden_prompts(folders: Iterable[Path], base: OpenBase) -> list[tuple[int, ...]]:
    """Some of the prompts that the adapters in these folders were proved on, or else a few of ours."""
    found: list[list[tuple[int, ...]]] = []
    for folder in folders:
        if (folder / GOLDEN_TENSORS_FILE).is_file():
            tensors = load_file(folder / GOLDEN_TENSORS_FILE)
            names = sorted(name for name in tensors if name.endswith(IDS_ENDING))
            found.append([tuple(tensors[name].tolist()) for name in names])
    prompts = [prompt for row in found for prompt in row]
    return export.spread_prompts(prompts or [encode_prompt(text, base.tokenizer) for text in PROMPTS])


def encode_prompt(text: str, tokenizer: Any) -> tuple[int, ...]:
    """A user's message where the base has a chat template that takes one, the bare text elsewhere."""
    from jinja2 import TemplateError

    if tokenizer.chat_template is not None:
        try:
            chat = [{"role": "user", "content": text}]
            whole = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            return tuple(tokenizer.encode(whole, add_special_tokens=False))
        except TemplateError:
            pass
    return tuple(tokenizer.encode(text))


def rank_pattern(ranks: Mapping[str, int], usual: int) -> dict[str, int]:
    """The ranks other than the usual one: by the last part of the name where that tells them, else by the whole."""
    pattern: dict[str, int] = {}
    for module, rank in ranks.items():
        leaf = module.rpartition(".")[2]
        alike = {other for name, other in ranks.items() if name.rpartition(".")[2] == leaf} == {rank}
        if rank != usual:
            pattern[leaf if alike else module.replace(".", r"\.")] = rank
    return pattern


def patterns_fit(modules: int) -> bool:
    """Whether so many Linears can each have a rank of their own."""
    return modules <= MAX_PATTERNS


def shortest_names(targeted: Sequence[str], modules: Modules) -> list[str]:
    """The last parts of the names where they mean just these modules, else the whole names."""
    leaves = sorted({module.rpartition(".")[2] for module in targeted})
    meant = target_modules({"target_modules": leaves}, modules)
    others = [name for name in modules.others if name.rpartition(".")[2] in leaves]
    return leaves if set(meant) == set(targeted) and not others else list(targeted)


def _nothing(modules: Modules, module: str) -> Factors:
    linear = modules.linears[module]
    return Factors(torch.zeros(1, linear.inputs), torch.zeros(linear.outputs, 1))


def _write(folder: Path, config: Any, tensors: Mapping[str, Tensor], base_name: str) -> None:
    config.save_pretrained(str(folder))
    export.settle_config(folder, base_name)
    save_file(dict(tensors), folder / WEIGHTS_FILE, metadata={"format": "pt"})
