"""LoRA and its options: rsLoRA, DoRA, activated LoRA, ranks and alphas by pattern, biases; routers and experts.

DoRA is m / ||W + s B A|| * (W + s B A), the norm over each row. The row's factor scales the base product and B; the
base's bias stays as it is. The norm is that of the weight that a server really multiplies with.
What works at some tokens alone, on the embedding, on routers and experts is lowered in `server.adapters.lowering.lora`.

r rank, I in, O out.
Source: Hu et al. 2021 (arXiv:2106.09685); Kalajdzievski 2023 (arXiv:2312.03732); Liu et al. 2024 (arXiv:2402.09353);
Greenewald et al. 2025 (arXiv:2504.12397); peft 0.21.2, tuners/lora/config.py, layer.py and dora.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hub import fields
from hub.base import Base, Linear, Modules
from hub.families import parameters
from hub.families.change import Change, Found
from hub.families.linears import TARGETS, bias_field, linear_layout, pattern_rank, pattern_ranks
from hub.families.method import INERT, AtLinear, Complaint, Config, Field, Layout, Method, Part, Shapes
from hub.ref import printable
from hub.targets import ALL_LINEAR, pattern_value

if TYPE_CHECKING:
    from torch import Tensor

# What LoRA and AdaLoRA share: PEFT derives the one config from the other.
SHARED: Mapping[str, Field] = {
    **TARGETS,
    "bias": bias_field("lora_only"),
    "fan_in_fan_out": Field(fields.boolean),  # follows from the base's own layers
    "init_lora_weights": Field(fields.initialisation),
    "trainable_token_indices": Field(fields.token_rows, shapes_tensors=True),
    # Inert: they act while training, or only through an init_lora_weights that is refused above.
    "lora_dropout": Field(fields.number),
    "eva_config": INERT,
    "corda_config": INERT,
    "lora_ga_config": INERT,
    "loftq_config": INERT,
    "megatron_core": INERT,
    "qalora_group_size": INERT,
    # Neutral: each changes what a forward pass computes, or the network itself.
    "use_qalora": Field(fields.neutral(False, why="it pools the layer's input")),
    "use_bdlora": Field(fields.neutral(None, why="block-diagonal LoRA")),
    "target_parameters": Field(fields.neutral(None, [], why="it adapts bare parameters, such as fused experts")),
    "layer_replication": Field(fields.neutral(None, [], why="it changes the network")),
    "arrow_config": Field(fields.neutral(None, why="it routes between adapters")),
    "kasa_config": Field(fields.neutral(None, why="KaSA truncates the base's weights")),
    "velora_config": Field(fields.neutral(None, why="VeLoRA")),
    "monteclora_config": Field(fields.neutral(None, why="it samples")),
    "megatron_config": Field(fields.neutral(None, why="Megatron layers")),
    "ensure_weight_tying": Field(fields.neutral(False, why="it ties adapters to the embedding")),
    "runtime_config": Field(fields.neutral(None, {"ephemeral_gpu_offload": False}, {}, why="a setting of one process")),
}

FIELDS: Mapping[str, Field] = {
    **SHARED,
    **parameters.FIELDS,
    "r": Field(fields.positive, shapes_tensors=True),
    "lora_alpha": Field(fields.number),
    "use_rslora": Field(fields.boolean),
    "rank_pattern": Field(fields.patterns_of(fields.positive), shapes_tensors=True),
    "alpha_pattern": Field(fields.patterns_of(fields.number)),
    "use_dora": Field(fields.boolean, shapes_tensors=True),
    "lora_bias": Field(fields.boolean, shapes_tensors=True),
    "alora_invocation_tokens": Field(fields.optional_token_ids, shapes_tensors=True),
}
PART_A, PART_B = "lora_A.weight", "lora_B.weight"
FACTORS = frozenset({PART_A, PART_B})
# An activated LoRA leaves the tokens before its invocation to the base, and these would change them.
NOT_ACTIVATED = ("use_dora", "bias", "modules_to_save", "trainable_token_indices", "target_parameters")


def _part(config: Config, module: str, linear: Linear) -> Part:
    """An embedding's inputs are the tokens of the vocabulary."""
    rank = pattern_rank(config, module)
    if isinstance(linear, _Table):
        return Part(_table_shapes(config, rank, linear), rank, _table_complaint(config, module))
    shapes: dict[str, tuple[int, ...]] = {
        PART_A: (rank, linear.inputs),
        PART_B: (linear.outputs, rank),
    }
    if config.get("lora_bias"):
        shapes["lora_B.bias"] = (linear.outputs,)
    if config.get("use_dora"):
        shapes["lora_magnitude_vector"] = (linear.outputs,)
        return Part(shapes, rank)
    return Part(shapes, rank, as_stored=FACTORS)


def _change(config: Config, found: Found) -> Change:
    """y += s B A x, and the same times m / ||W + s B A|| on all of W with `use_dora`."""
    A_rI = found.tensors[PART_A]
    factor = scaling(config, found.module, len(A_rI))
    B_Or = found.tensors[PART_B]
    if config.get("use_dora"):
        return _dora(A_rI, B_Or * factor, magnitude_O=found.tensors["lora_magnitude_vector"], weight_OI=found.weight())
    bias_O = found.tensors["lora_B.bias"] * factor if config.get("lora_bias") else None
    return Change(A_rI, B_Or, scaling=factor, bias_O=bias_O)


def scaling(config: Config, module: str, rank: int) -> float:
    """What B A is multiplied with at a module, by alpha and its pattern."""
    alpha: float = pattern_value(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _dora(A_rI: Tensor, B_Or: Tensor, *, magnitude_O: Tensor, weight_OI: Tensor) -> Change:
    A_rI, B_Or, magnitude_O = (tensor.to(weight_OI.device) for tensor in (A_rI, B_Or, magnitude_O))
    factor_O = magnitude_O / (weight_OI + B_Or @ A_rI).norm(dim=1)
    return Change(A_rI, factor_O[:, None] * B_Or, excess_out_O=factor_O - 1)


@dataclass(frozen=True, slots=True)
class _Table(Linear):
    """The embedding, as the Linear layer of one-hot tokens that it is."""


def _table_shapes(config: Config, rank: int, table: _Table) -> Shapes:
    shapes: dict[str, tuple[int, ...]] = {
        "lora_embedding_A": (rank, table.inputs),
        "lora_embedding_B": (table.outputs, rank),
    }
    return {**shapes, "lora_magnitude_vector": (table.outputs,)} if config.get("use_dora") else shapes


def _table_complaint(config: Config, module: str) -> Complaint | None:
    for key in ("lora_bias", "alora_invocation_tokens"):
        if config.get(key):
            return key, f"cannot stand beside the embedding {printable(module)} among the target modules"
    return None


def _with_table(config: Config, modules: Modules) -> Modules:
    """The embedding among the layers that may be adapted, but for "all-linear", which does not mean it."""
    table, wanted = modules.embedding, config["target_modules"]
    if table is None or (isinstance(wanted, str) and wanted.lower() == ALL_LINEAR):
        return modules
    linears = {**modules.linears, table.name: _Table(table.rows, table.features)}
    return replace(modules, linears=linears, others=modules.others - {table.name})


def _layout(config: Config, base: Base, modules: Modules) -> Layout:
    adapted = _with_table(config, modules)
    layout = Layout({})
    if config.get("target_modules"):
        layout = linear_layout(config, base, adapted, part=_part, what="Linear layer or embedding")
    layout = parameters.with_parameters(layout, config, base, modules)
    strange = [token for token in config.get("alora_invocation_tokens") or [] if token >= base.vocab_size]
    if not strange:
        return layout
    complaint = (
        "alora_invocation_tokens",
        f"token {strange[0]} is not in the base's vocabulary of {base.vocab_size}",
    )
    return replace(layout, complaints=(*layout.complaints, complaint))


def _contradictions(config: Config) -> list[Complaint]:
    complaints = list(parameters.parameter_contradictions(config))
    if config.get("use_dora") is True:
        without = {"lora_bias": True, "init_lora_weights": "mica"}
        complaints += [
            (key, "cannot stand beside use_dora") for key, value in without.items() if config.get(key) == value
        ]
    if config.get("alora_invocation_tokens"):
        complaints += [
            (key, "cannot stand beside alora_invocation_tokens")
            for key in NOT_ACTIVATED
            if config.get(key, "none") not in ("none", False, None, [], {})
        ]
    return complaints


AT_LINEAR = AtLinear(_part, _change)
LORA = Method(
    "lora",
    "LORA",
    FIELDS,
    required=("r", "lora_alpha", "target_modules"),
    layout=_layout,
    ranks=pattern_ranks,
    contradictions=_contradictions,
)
