"""Mixtures of experts: which tensors of a checkpoint are a router's or an expert's, and what they are once loaded.

transformers 5 loads the weights of all experts as one fused parameter of three dimensions, most checkpoints keep them
expert by expert, and neither they nor a router are Linear layers. What stands here is what PEFT then finds by
`target_parameters`. Never imports torch.
Source: transformers 5.23, conversion_mapping.py, integrations/mxfp4.py, models/*/modeling_*.py of the types below;
peft 0.21.2, utils/transformers_weight_conversion.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from hub.errors import BaseUnusable
from hub.ref import printable
from hub.tensors import TensorEntry

GATE_UP, DOWN = "gate_up_proj", "down_proj"
MXFP4_VALUES_PER_BYTE = 2

_OF_ONE = re.compile(r"(?P<experts>.+\.experts)\.(?P<number>[0-9]{1,6})\.(?P<part>\w+)\.weight", re.ASCII)
_OF_ALL = re.compile(
    rf"(?P<experts>.+\.experts)\.(?P<fused>{GATE_UP}|{DOWN})(?P<rest>_blocks|_scales|_bias)?", re.ASCII
)


@dataclass(frozen=True, slots=True)
class Parameter:
    """The sizes of a weight that belongs to no Linear: of one router, or of all experts of a layer."""

    experts: int  # 1 for a router
    inputs: int
    outputs: int


@dataclass(frozen=True, slots=True)
class Kind:
    """How one type of base has its experts: the router's name beside them, and the parts that are stored one by one.

    `before` are the names that the same layers had before transformers 5 and that PEFT takes for the new ones.
    """

    router: str
    parts: Mapping[str, str] = field(default_factory=dict)
    transposed: bool = False  # the fused parameter is (experts, in, out), not (experts, out, in)
    before: frozenset[str] = frozenset()


KINDS: Mapping[str, Kind] = {
    "mixtral": Kind("gate", {"w1": GATE_UP, "w3": GATE_UP, "w2": DOWN}, before=frozenset({"gate", "w1", "w2", "w3"})),
    "qwen3_moe": Kind(
        "gate",
        {"gate_proj": GATE_UP, "up_proj": GATE_UP, "down_proj": DOWN},
        before=frozenset({"gate", "gate_proj", "up_proj", "down_proj"}),
    ),
    "gpt_oss": Kind("router", transposed=True),
}


@dataclass(frozen=True, slots=True)
class Experts:
    """`parameters` by their full names, those of one module in its own order; `modules` hold them, some with biases.

    `taken` are the tensors that are accounted for.
    """

    parameters: Mapping[str, Parameter]
    modules: frozenset[str]
    biased: frozenset[str]
    taken: frozenset[str]


def experts_of(model_type: str, tensors: Mapping[str, TensorEntry], *, shown: str) -> Experts:
    """`tensors` by their names in the loaded base. Raises: BaseUnusable for experts that do not fit each other."""
    kind = KINDS.get(model_type)
    if kind is None:
        return Experts({}, frozenset(), frozenset(), frozenset())
    fused: dict[str, Parameter] = {}
    biased: set[str] = set()
    taken: set[str] = set()
    for name, entry in tensors.items():
        match = _OF_ALL.fullmatch(name)
        if match is None:
            continue
        taken.add(name)
        if match["rest"] == "_bias":
            biased.add(match["experts"])
        elif match["rest"] != "_scales":
            fused[f"{match['experts']}.{match['fused']}"] = _stored_fused(entry, kind, shown)
    for name, part, parameter in _stored_one_by_one(kind, tensors, shown):
        before = fused.get(name, Parameter(parameter.experts, parameter.inputs, 0))
        if (before.experts, before.inputs) != (parameter.experts, parameter.inputs):
            raise BaseUnusable(f"{shown}: the {part} of {printable(name)} do not fit its other parts")
        fused[name] = Parameter(before.experts, before.inputs, before.outputs + parameter.outputs)
    taken |= {name for name in tensors if (one := _OF_ONE.fullmatch(name)) and one["part"] in kind.parts}
    modules = sorted({name.rpartition(".")[0] for name in fused})
    ordered = {name: fused[name] for module in modules for name in _in_order(module, fused)}
    routers = {}
    for module in modules:
        router = f"{module.rpartition('.')[0]}.{kind.router}"
        weight = tensors.get(f"{router}.weight")
        if weight is None or len(weight.shape) != 2:
            raise BaseUnusable(f"{shown}: {printable(module)} has no router {kind.router} beside it")
        routers[f"{router}.weight"] = Parameter(1, weight.shape[1], weight.shape[0])
    held = frozenset(name.rpartition(".")[0] for name in (*ordered, *routers))
    return Experts({**ordered, **routers}, held, frozenset(biased), frozenset(taken | routers.keys()))


def _in_order(module: str, fused: Mapping[str, Parameter]) -> list[str]:
    return [name for name in (f"{module}.{GATE_UP}", f"{module}.{DOWN}") if name in fused]


def _stored_fused(entry: TensorEntry, kind: Kind, shown: str) -> Parameter:
    if len(entry.shape) == 4 and entry.name.endswith("_blocks"):  # MXFP4: (experts, out, blocks, bytes of a block)
        experts, outputs, blocks, block = entry.shape
        return Parameter(experts, blocks * block * MXFP4_VALUES_PER_BYTE, outputs)
    if len(entry.shape) != 3 or entry.name.endswith("_blocks"):
        raise BaseUnusable(f"{shown}: {printable(entry.name)} has shape {list(entry.shape)}, not one of all experts")
    experts, rows, columns = entry.shape
    return Parameter(experts, rows, columns) if kind.transposed else Parameter(experts, columns, rows)


def _stored_one_by_one(
    kind: Kind, tensors: Mapping[str, TensorEntry], shown: str
) -> Iterator[tuple[str, str, Parameter]]:
    """(fused name, part, what all experts' parts are together)."""
    found: dict[tuple[str, str], dict[int, tuple[int, ...]]] = {}
    for name, entry in tensors.items():
        match = _OF_ONE.fullmatch(name)
        if match is not None and match["part"] in kind.parts:
            found.setdefault((match["experts"], match["part"]), {})[int(match["number"])] = entry.shape
    for (module, part), shapes in found.items():
        alike = set(shapes.values())
        shape = next(iter(alike))
        if len(alike) > 1 or len(shape) != 2 or set(shapes) != set(range(len(shapes))):
            raise BaseUnusable(f"{shown}: the {part} of {printable(module)} are not alike, or some are missing")
        yield f"{module}.{kind.parts[part]}", part, Parameter(len(shapes), shape[1], shape[0])
