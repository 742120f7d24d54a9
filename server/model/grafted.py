"""Grafting: every Linear of a stock network, its embedding and its norms are replaced by ones that ask the step's
adapters.

The base product always runs without its bias, whether adapters are active or not, so that a request to the bare base is
bit-identical in any company. Weights stay where they are: a head that is tied to the embedding shares its weight still.
The output head sees only the tokens whose logits are wanted, and so asks for their gates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from server.kernels.adapted import Adapted, Native
from server.kernels.gathered import Gathered
from server.kernels.native import MEMBERS
from server.kernels.products import Plain, Product, fastest
from server.kernels.quantized import Held
from server.model.norms import NativeNorm, Unit, embedding_factor, fast_norm, norm_shape, prove_norm
from server.model.weights import Stock
from server.primitives.gates import Gates
from server.primitives.site import (
    Active,
    EmbeddingShape,
    NormShape,
    SiteShape,
    after_product,
    apply_embedding,
    apply_norm,
    before_product,
)

GatesOf = Callable[[Active], Gates | None]


@dataclass(frozen=True, slots=True)
class Sites:
    """Where adapters can act on a grafted network, by module name."""

    linears: Mapping[str, SiteShape]
    norms: Mapping[str, NormShape]
    embedding: EmbeddingShape | None
    groups: tuple[tuple[str, ...], ...]  # of Linears that read the same input
    numbers: Mapping[str, int]  # of the Linears, group by group, and of the norms that native functions can change


def gates_of_all(active: Active) -> Gates | None:
    return active.gates


def gates_of_wanted(active: Active) -> Gates | None:
    return active.wanted_gates


@dataclass(frozen=True, slots=True)
class Member:
    """One Linear of a joint: its columns of the joint's product, the base's own bias, and its number (`Sites`)."""

    name: str
    first: int
    end: int
    bias_O: Tensor | None
    number: int


@dataclass(frozen=True, slots=True)
class Changed:
    """Some tokens of a step, and the inputs (n, I) that a Linear has of them instead of the step's."""

    tokens_n: Tensor
    x_nI: Tensor


class Joint:
    """Linears that read the same input, or one alone: one product of the base and one of the low-rank terms.

    The first of them that is called computes all; the others find theirs. x is (1, T, I) or (T, I): the packed tokens
    of the step, in order.
    """

    def __init__(
        self, group: int, members: Sequence[Member], product: Product, active: Active, gates_of: GatesOf
    ) -> None:
        """`group` is the joint's number among the groups of `active.gathered`."""
        self.members = members
        self.product = product
        self.group = group
        self._active = active
        self._gates_of = gates_of
        self.bias = _one_bias(members)  # of all members side by side, None where none has any
        self._widths = [member.end - member.first for member in members]
        self._firsts = [member.first for member in members]
        self._adapted = None
        if isinstance(product, Native):
            self._adapted = Adapted(product, group, members[0].number, [*self._firsts, members[-1].end])
        self._x: Tensor | None = None
        self._ready: dict[int, Tensor] = {}

    def output(self, place: int, x: Tensor) -> Tensor:
        """y of the member at that place."""
        if len(self.members) == 1:
            (y_TO,) = self.compute(x.reshape(-1, x.shape[-1]))
            return y_TO.view(*x.shape[:-1], y_TO.shape[1])
        y = self._ready.pop(place, None) if x is self._x else None
        if y is None:
            outputs = self.compute(x.reshape(-1, x.shape[-1]))
            self._x = x
            self._ready = {i: y_TO.view(*x.shape[:-1], y_TO.shape[1]) for i, y_TO in enumerate(outputs)}
            y = self._ready.pop(place)
        if not self._ready:
            self._x = None
        return y

    def compute(self, x_TI: Tensor) -> list[Tensor]:
        """y (T, O) of every member, in order; nobody else holds them."""
        y_TO = self._in_place(x_TI)
        outputs = self._columns(y_TO)
        replaced = False
        gates = self._gates_of(self._active)
        for place, member in enumerate(self.members):
            operand = self._active.operands.get(member.name)
            if operand is not None and gates is not None:
                check_count(member.name, x_TI.shape[0], gates)
                outputs[place] = after_product(outputs[place], x_TI, gates, operand)
                replaced = True
        if self.bias is None:
            return outputs
        if not replaced:
            y_TO += self.bias
            return outputs
        return [
            y if member.bias_O is None else y + member.bias_O for y, member in zip(outputs, self.members, strict=True)
        ]

    def side_by_side(self, x_TI: Tensor) -> Tensor | None:
        """y (T, O) of all members without the base's bias; None where adapters do more than the kernels know."""
        active = self._active
        if active.routes is not None or any(member.name in active.operands for member in self.members):
            return None
        return self._in_place(x_TI)

    def _in_place(self, x_TI: Tensor) -> Tensor:
        """y (T, O) of all members, with what the kernels know of the adapters."""
        gates, gathered = self._gates_of(self._active), self._active.gathered
        if gates is None:
            return self.product(x_TI)
        if gathered is None:
            return self._multiply(x_TI, gates)
        check_count(self.members[0].name, x_TI.shape[0], gates)
        if self._adapted is not None and x_TI.dtype == self._adapted.dtype:
            return self._adapted(x_TI, gathered, gates.runs)
        return self._in_passes(x_TI, gates, gathered)

    def _in_passes(self, x_TI: Tensor, gates: Gates, gathered: Gathered) -> Tensor:
        """The same one after the other: what tests compare the native call with."""
        y_TO = self._multiply(x_TI, gates)
        if gathered.changes is not None:
            for member, own_TO in zip(self.members, self._columns(y_TO), strict=True):
                gathered.changes.change_output(member.number, own_TO, gates.runs.places)
        if gathered.acts(self.group):
            gathered.add(self.group, x_TI, y_TO, self._firsts, gates.runs)
        return y_TO

    def _columns(self, y_TO: Tensor) -> list[Tensor]:
        return [y_TO] if len(self.members) == 1 else list(torch.split_with_sizes(y_TO, self._widths, 1))

    def _multiply(self, x_TI: Tensor, gates: Gates) -> Tensor:
        """W x, or W x' of the members and tokens whose input adapters change: at once where that changes no row."""
        changed = self._changed_inputs(x_TI, gates)
        if len(self.members) == 1:  # nobody else reads what those tokens had
            for one in changed.values():
                x_TI = x_TI.index_copy(0, one.tokens_n, one.x_nI)
            return self.product(x_TI)
        inputs = [one.x_nI for one in changed.values()]
        if changed and isinstance(self.product, Native):
            y_TO, *made = self.product(torch.cat([x_TI, *inputs])).split([len(x_TI), *map(len, inputs)])
        else:
            y_TO, made = self.product(x_TI), [self.product(x_nI) for x_nI in inputs]
        outputs = self._columns(y_TO)
        for (place, one), y_nO in zip(changed.items(), made, strict=True):
            member = self.members[place]
            outputs[place].index_copy_(0, one.tokens_n, y_nO[:, member.first : member.end])
        return y_TO

    def _changed_inputs(self, x_TI: Tensor, gates: Gates) -> dict[int, Changed]:
        """By a member's place, for the tokens whose input some adapter changes there; the others keep their W x."""
        active = self._active
        changes = None if active.gathered is None else active.gathered.changes
        changed = {}
        for place, member in enumerate(self.members):
            operand = active.operands.get(member.name)
            layout = () if operand is None else operand.input_layout
            columns = () if changes is None else changes.columns_before(member.number)
            if not layout and not columns:
                continue
            check_count(member.name, x_TI.shape[0], gates)
            tokens_n, own = gates.carrying(layout + columns)
            if not len(tokens_n):  # those that did have left the batch
                continue
            x_nI = x_TI.index_select(0, tokens_n)
            if operand is not None:
                x_nI = before_product(x_nI, own, operand)
            if changes is not None:
                changes.change_input(member.number, x_nI, own.runs.places)
            changed[place] = Changed(tokens_n, x_nI)
        return changed


class GraftedLinear(nn.Module):
    """Stands for a Linear of the base: its place in a joint."""

    def __init__(self, joint: Joint, place: int, active: Active) -> None:
        super().__init__()
        self.joint = joint
        self.place = place
        self.active = active
        self.name = joint.members[place].name

    def forward(self, x: Tensor) -> Tensor:
        y = self.joint.output(self.place, x)
        if self.active.routes is not None:
            self.active.routes.add(self.name, x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1]))
        return y

    @property
    def beside(self) -> list[str]:
        """The Linears of its joint, in order, itself among them."""
        return [member.name for member in self.joint.members]

    def weight(self) -> Tensor:
        """The base's (O, I), in fp32, not to be written to."""
        member = self.joint.members[self.place]
        return self.joint.product.weight()[member.first : member.end]


class GraftedEmbedding(nn.Module):
    """The base's embedding and its Site. Ids are (1, T)."""

    def __init__(self, name: str, base: nn.Module, active: Active) -> None:
        super().__init__()
        self.name = name
        self.base = base
        self.active = active

    @property
    def weight(self) -> Tensor:
        """Some networks ask for its dtype or device."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, ids: Tensor) -> Tensor:
        operand = self.active.operands.get(self.name)
        gates = self.active.gates
        if operand is None or gates is None:
            return self.base(ids)
        ids_T = ids.reshape(-1)
        check_count(self.name, len(ids_T), gates)
        return apply_embedding(ids_T, gates, operand, self.base).view(*ids.shape, -1)


class GraftedNorm(nn.Module):
    """A norm of the base and its Site."""

    def __init__(
        self, name: str, base: nn.Module, unit: Unit, active: Active, fast: NativeNorm | None, number: int | None
    ) -> None:
        """`fast` gives what the base gives; with a number (`Sites`) a row is a token."""
        super().__init__()
        self.name = name
        self.base = base
        self.fast = fast
        self.compute = fast or base.forward
        self.number = number
        self.unit = unit.norm
        self.axis = unit.axis
        self.active = active

    def forward(self, x: Tensor) -> Tensor:
        return self._with_adapters(x, self.compute(x))

    def of_sum(self, x: Tensor, y: Tensor) -> Tensor:
        """What `forward` gives for y + x, which y becomes."""
        if self.fast is None or not (x.is_contiguous() and y.is_contiguous()):
            return self.forward(y.add_(x))
        return self._with_adapters(y, self.fast.of_sum(x, y))

    def _with_adapters(self, x: Tensor, y: Tensor) -> Tensor:
        """From what the base's norm gives for x, which may become it."""
        active = self.active
        operand, gates = active.operands.get(self.name), active.gates
        if gates is None:
            return y
        if (
            self.number is not None
            and self.fast
            and active.gathered is not None
            and active.gathered.changes is not None
        ):
            check_count(self.name, x.shape[self.axis], gates)
            rows = x.contiguous().view(-1, x.shape[-1]), y.view(-1, y.shape[-1])
            active.gathered.changes.change_norm(
                self.number, *rows, gates.runs.places, self.fast.weight_F, self.fast.offset, self.fast.eps
            )
        if operand is None:
            return y
        check_count(self.name, x.shape[self.axis], gates)
        return apply_norm(y, lambda: self.unit(x), gates, operand, axis=self.axis)


@contextmanager
def linear_inputs(network: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """What every Linear is called with, by its name, until the end of the block."""
    seen: dict[str, list[Tensor]] = {}
    hooks = []
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear):
            hooks.append(module.register_forward_pre_hook(lambda _, x, name=name: seen.setdefault(name, []).extend(x)))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def graft_network(
    network: nn.Module,
    active: Active,
    seen: Mapping[str, Sequence[Tensor]],
    lengths: Sequence[int],
    *,
    inputs: Mapping[str, Sequence[Tensor]],
    stored: torch.dtype,
    held: Mapping[str, Held],
) -> Sites:
    """Replace every Linear, the embedding and the norms in place.

    `seen` holds what each norm was called with on probes of those lengths: see `norm_inputs`. A norm or an embedding
    that does not compute what its adapters need stays as it is, and no adapter is served there. `inputs` are those of
    the Linears on the same probes; `stored` is the dtype of the checkpoint; `held` are the weights that are kept in few
    bits, whatever the network has there.
    """
    head = network.get_output_embeddings()  # type: ignore[operator]
    table = network.get_input_embeddings()  # type: ignore[operator]
    norms: dict[str, NormShape] = {}
    embedding = None
    factor = embedding_factor(table)
    modules = dict(network.named_modules())
    linears = {name: module for name, module in modules.items() if isinstance(module, nn.Linear | Conv1D)}
    head_name = next((name for name, module in linears.items() if module is head), "")
    tied = head is not None and head.weight is table.weight
    groups = _groups(linears, inputs, head_name, held)
    shapes: dict[str, SiteShape] = {}
    numbers = {name: number for number, name in enumerate(name for names in groups for name in names)}
    for number, names in enumerate(groups):
        product = _product([linears[name] for name in names], [held[name] for name in names if name in held], stored)
        gates_of = gates_of_wanted if head_name in names else gates_of_all
        shapes |= _join(network, number, {name: numbers[name] for name in names}, active, gates_of, product)
    for name, module in modules.items():
        grafted: nn.Module
        if module is table and factor is not None:
            embedding = EmbeddingShape(name, len(table.weight), table.weight.shape[1], factor, head_name, tied)
            grafted = GraftedEmbedding(name, module, active)
        elif name in seen and (unit := prove_norm(module, seen[name], lengths)) is not None:
            norms[name] = norm_shape(module)
            fast = fast_norm(module, seen[name])
            if fast is not None and all(x.shape[:-1].numel() == n for x, n in zip(seen[name], lengths, strict=True)):
                numbers[name] = len(numbers)
            grafted = GraftedNorm(name, module, unit, active, fast, numbers.get(name))
        else:
            continue
        _replace(network, name, grafted)
    return Sites({name: shapes[name] for name in linears}, norms, embedding, groups, numbers)


def weight_bytes(network: nn.Module) -> int:
    """What the weights of a grafted network take, each counted once."""
    own = {weight.data_ptr(): weight.nbytes for weight in network.parameters()}
    joints = {id(module.joint): module.joint for module in network.modules() if isinstance(module, GraftedLinear)}
    products = [joint.product for joint in joints.values()]
    shared = [one for one in products if isinstance(one, Plain) and one.weight_OI.data_ptr() in own]
    return sum(own.values()) + sum(one.bytes for one in products) - sum(one.bytes for one in shared)


def _groups(
    linears: Mapping[str, nn.Module], inputs: Mapping[str, Sequence[Tensor]], head: str, held: Mapping[str, Held]
) -> tuple[tuple[str, ...], ...]:
    """The Linears that were called with the very same tensors on every probe; every other alone."""
    groups: dict[object, list[str]] = {}
    for name, module in linears.items():
        key: object = name
        if (type(module) is nn.Linear or name in held) and inputs.get(name) and name != head:
            kin = held[name].kin() if name in held else module.weight.dtype
            key = (kin, *(id(x) for x in inputs[name]))
        if len(groups.get(key, ())) >= MEMBERS:
            key = name
        groups.setdefault(key, []).append(name)
    return tuple(map(tuple, groups.values()))


def _join(
    network: nn.Module, group: int, numbers: Mapping[str, int], active: Active, gates_of: GatesOf, product: Product
) -> dict[str, SiteShape]:
    """Put one joint in the places of these Linears."""
    modules = [network.get_submodule(name) for name in numbers]
    shapes = {}
    members: list[Member] = []
    for (name, number), module in zip(numbers.items(), modules, strict=True):
        inputs, outputs = _features(module)
        bias_O = _detach_bias(module)
        shapes[name] = SiteShape(inputs, outputs, bias_O, isinstance(module, Conv1D))
        first = members[-1].end if members else 0
        members.append(Member(name, first, first + outputs, bias_O, number))
    joint = Joint(group, members, product, active, gates_of)
    for place, name in enumerate(numbers):
        _replace(network, name, GraftedLinear(joint, place, active))
    return shapes


def _replace(network: nn.Module, name: str, by: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, by)


def _one_bias(members: Sequence[Member]) -> Tensor | None:
    """All members' biases side by side, zeros where there is none; None where there are none at all."""
    some = next((member.bias_O for member in members if member.bias_O is not None), None)
    if some is None:
        return None
    return torch.cat([some.new_zeros(one.end - one.first) if one.bias_O is None else one.bias_O for one in members])


def check_count(name: str, tokens: int, gates: Gates) -> None:
    if tokens != gates.gates_TK.shape[0]:
        raise ValueError(f"{name} saw {tokens} tokens of a step of {gates.gates_TK.shape[0]}")


def _features(module: nn.Linear | Conv1D) -> tuple[int, int]:
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    return module.in_features, module.out_features


def _detach_bias(base: nn.Module) -> Tensor | None:
    bias = base.bias
    if not isinstance(bias, Tensor):
        return None
    if not isinstance(base, Conv1D):
        base.register_parameter("bias", None)
    return bias.detach()


def _product(modules: Sequence[nn.Module], held: Sequence[Held], stored: torch.dtype) -> Product:
    """The product of these Linears side by side, without their biases: of all in few bits, or of none."""
    if held:
        return held[0].product(held[1:])
    if type(modules[0]) is nn.Linear:
        weights = [module.weight.detach() for module in modules if isinstance(module.weight, Tensor)]
        whole = weights[0] if len(weights) == 1 else torch.cat(weights)
        return fastest(whole, whole.dtype, stored)
    (module,) = modules
    return Stock(module)
