"""Places on the residual stream: where the step's adapters may edit it, found in any decoder and proved on a probe.

A decoder layer gets the stream r; its attention reads n and makes x, the stream is r + x; its MLP likewise. Which child
of the layer makes x (the attention itself, or a norm behind it), and whether the MLP's stream has the attention's x in
it, is seen on a probe, where r + x must be, to the bit, what the layer hands on. A layer that computes something else
(scaled residuals) has no places; its base is served all the same.
Hooks stand only while an active adapter edits something, so that a server without such adapters pays nothing.

T tokens, H hidden. r, x, n, v as in decision 17.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from server.primitives import edit
from server.primitives.edit import place
from server.primitives.site import Active, SiteOperand

MLP_NAMES = ("mlp", "feed_forward", "block_sparse_moe", "ffn")


@dataclass(frozen=True, slots=True)
class Sublayer:
    """`reader` gets n, `writer` gives x; they differ where a norm stands behind the sublayer."""

    reader: nn.Module
    writer: nn.Module


@dataclass(frozen=True, slots=True)
class Anatomy:
    """One decoder layer. `sequential`: the MLP's r has the attention's x in it. None: not to be found here."""

    layer: nn.Module
    attention: Sublayer | None
    mlp: Sublayer | None
    sequential: bool = True

    def places(self, index: int) -> list[str]:
        found = [place(index, "mlp", "stream")]
        if self.attention is not None:
            found += [place(index, "attention", reads) for reads in edit.READS]
        if self.attention is not None and self.mlp is not None:
            found += [place(index, "mlp", reads) for reads in edit.READS if reads != "stream"]
        return found


@dataclass(slots=True)
class _Call:
    """What one child of a layer got and gave on the probe."""

    module: nn.Module
    input: Tensor
    output: Tensor


@dataclass(slots=True)
class _Traced:
    """One decoder layer on the probe."""

    layer: nn.Module
    before: Tensor | None = None
    after: Tensor | None = None
    calls: list[_Call] = field(default_factory=list)


def find_anatomy(stock: nn.Module, attentions: Mapping[int, nn.Module], run: Callable[[], object]) -> list[Anatomy]:
    """The decoder layers around these attention modules, watched during one `run` of the untouched network.

    Empty where the stream does not pass from layer to layer as it is.
    """
    names = {module: name for name, module in stock.named_modules()}
    parents = [names[attentions[index]].rpartition(".")[0] for index in sorted(attentions)]
    if len(set(parents)) != len(parents) or "" in parents:
        return []
    traced = [_Traced(stock.get_submodule(parent)) for parent in parents]
    handles = [handle for one in traced for handle in _watch(one)]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    if any(one.before is None or one.after is None for one in traced):
        return []
    if not all(_same(one.after, other.before) for one, other in pairwise(traced)):
        return []
    return [_anatomy(one, attentions[index]) for one, index in zip(traced, sorted(attentions), strict=True)]


class Places:
    """The hooks through which the active adapters edit the stream."""

    def __init__(self, anatomies: Sequence[Anatomy], active: Active) -> None:
        self._layers = [_Layer(index, anatomy, active) for index, anatomy in enumerate(anatomies)]
        self._operands: Mapping[str, SiteOperand] | None = None
        self._handles: list[Any] = []
        self.names = frozenset(name for layer in self._layers for name in layer.names)

    def arm(self, operands: Mapping[str, SiteOperand]) -> None:
        """Hook the layers that these adapters edit, and no others; the operands are the same in most steps."""
        if operands is self._operands:
            return
        self._operands = operands
        for handle in self._handles:
            handle.remove()
        edited = [layer for layer in self._layers if not operands.keys().isdisjoint(layer.names)]
        self._handles = [handle for layer in edited for handle in layer.hook()]


class _Layer:
    """One decoder layer under edits; what it has seen in this forward pass lasts to its end."""

    def __init__(self, index: int, anatomy: Anatomy, active: Active) -> None:
        self.names = anatomy.places(index)
        self._anatomy = anatomy
        self._active = active
        self._place = partial(place, index)
        self._stream: Tensor | None = None  # r
        self._inputs: dict[str, Tensor | None] = {}  # n

    def hook(self) -> list[Any]:
        own = self._anatomy
        handles = [
            own.layer.register_forward_pre_hook(self._enter, with_kwargs=True),
            own.layer.register_forward_hook(self._leave),
        ]
        for name, sublayer in (("attention", own.attention), ("mlp", own.mlp)):
            if own.attention is not None and sublayer is not None:
                read, write = partial(self._read, name), partial(self._write, name)
                handles.append(sublayer.reader.register_forward_pre_hook(read, with_kwargs=True))
                handles.append(sublayer.writer.register_forward_hook(write))
        return handles

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._stream = _first(args, kwargs)

    def _read(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._inputs[name] = _first(args, kwargs)

    def _write(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        made = made_before = _made(output)
        assert self._stream is not None and made is not None, "a sublayer ran outside of its layer"
        seen = {"output": made, "residual": self._stream, "input": self._inputs[name]}
        for reads, value in seen.items():
            made = self._edit(name, reads, made, value)
        if name == "attention":
            made = self._edit(name, "stream", made, self._stream + made)
            if self._anatomy.sequential:
                self._stream = self._stream + made
        return output if made is made_before else _remade(output, made)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        self._stream = None
        self._inputs.clear()
        made = _made(output)
        assert made is not None, "proved on the probe"
        edited = self._edit("mlp", "stream", made, made)
        return output if edited is made else _remade(output, edited)

    def _edit(self, name: str, reads: str, made: Tensor, value: Tensor | None) -> Tensor:
        """`made` with what the active adapters add, which read `value`."""
        operand = self._active.operands.get(self._place(name, reads))
        gates = self._active.gates
        if operand is None or gates is None:
            return made
        assert operand.edit is not None and value is not None, "a place has edits only"
        made_TH = made.reshape(-1, made.shape[-1])
        if made_TH.shape[0] != gates.gates_TK.shape[0]:
            raise ValueError(f"{self._place(name, reads)} saw {made_TH.shape[0]} tokens of {gates.gates_TK.shape[0]}")
        return edit.apply(made_TH, value.reshape(made_TH.shape), gates, operand.edit).view(made.shape)


def _watch(traced: _Traced) -> list[Any]:
    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        traced.before = _first(args, kwargs)

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        traced.after = _made(output)

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        read, made = _first(args, kwargs), _made(output)
        if read is not None and made is not None:
            traced.calls.append(_Call(module, read, made))

    handles: list[Any] = [
        traced.layer.register_forward_pre_hook(enter, with_kwargs=True),
        traced.layer.register_forward_hook(leave),
    ]
    return handles + [child.register_forward_hook(note, with_kwargs=True) for child in traced.layer.children()]


def _anatomy(traced: _Traced, attention: nn.Module) -> Anatomy:
    """Which children make the x of either sublayer, by what the layer did with their outputs."""
    assert traced.before is not None and traced.after is not None
    once = [call for call in traced.calls if sum(call.module is other.module for other in traced.calls) == 1]
    calls = [call for call in once if call.output.shape == traced.before.shape]
    mlp = next((module for name in MLP_NAMES if (module := getattr(traced.layer, name, None)) is not None), None)
    of_attention, of_mlp = _from(calls, attention), _from(calls, mlp)
    for made in of_attention:
        stream = traced.before + made.output
        if not any(_same(call.input, stream) for call in _after(calls, made)):
            continue
        own = Sublayer(attention, made.module)
        other = next((call.module for call in of_mlp if _same(stream + call.output, traced.after)), None)
        return Anatomy(traced.layer, own, None if mlp is None or other is None else Sublayer(mlp, other))
    for made in of_attention:
        for other_made in of_mlp:
            if mlp is not None and _side_by_side(traced.before, made.output, other_made.output, traced.after):
                both = Sublayer(attention, made.module), Sublayer(mlp, other_made.module)
                return Anatomy(traced.layer, *both, sequential=False)
    return Anatomy(traced.layer, None, None)


def _side_by_side(before: Tensor, one: Tensor, other: Tensor, after: Tensor) -> bool:
    """The three added in any order: rounding depends on it."""
    sums = (before + one + other, before + other + one, one + other + before)
    return any(_same(total, after) for total in sums)


def _from(calls: Sequence[_Call], module: nn.Module | None) -> list[_Call]:
    """The call of a module and all that came after it."""
    start = next((index for index, call in enumerate(calls) if call.module is module), len(calls))
    return list(calls[start:])


def _after(calls: Sequence[_Call], call: _Call) -> list[_Call]:
    return _from(calls, call.module)[1:]


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and one.shape == other.shape and torch.equal(one, other)


def _first(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """What a module reads: the first tensor it is given."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)


def _made(output: Any) -> Tensor | None:
    made = output[0] if isinstance(output, tuple) and output else output
    return made if isinstance(made, Tensor) else None


def _remade(output: Any, made: Tensor) -> Any:
    return (made, *output[1:]) if isinstance(output, tuple) else made
