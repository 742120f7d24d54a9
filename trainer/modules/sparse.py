"""Sparse changes of Linear weights, chosen over the whole network: lottery-ticket tuning and diff pruning.

Both train a dense change D of every target first, keep its k largest entries, and train those on for the rest of the
run. LT-SFT (Ansell et al. 2022, arXiv:2110.07560) rewinds them to zero in between. Diff pruning (Guo et al. 2021,
2012.07463) trains D under hard-concrete gates (Louizos et al. 2018, 1712.01312) with a price on every open gate, and
goes on from where it is. Format: docs/decisions/0018. Needs the memory of the targets once more, with gates twice.

O out, I in; a Linear or Conv1D computes y + D x, so D is (O, I) for both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

ROOT: Final = "base_model.model."
BETA, LOW, HIGH = 2 / 3, -0.1, 1.1  # temperature and ends of the stretched gate, as in the paper
GATES_OPEN: Final = 2.0  # logit of a gate at the start: open in 0.98 of all draws
TRAINING_ONLY: Final = ("targets", "search_steps", "gate_price")  # of the config, not saved
SHIFT: Final = BETA * math.log(-LOW / HIGH)


class Change(nn.Module):
    """D of one Linear, with what says which of its entries count."""

    kept: Tensor

    def __init__(self, outputs: int, inputs: int, *, gated: bool) -> None:
        super().__init__()
        self.delta = nn.Parameter(torch.zeros(outputs, inputs))
        self.register_buffer("kept", torch.ones(outputs, inputs, dtype=torch.bool))
        self.gates: nn.Parameter | None = nn.Parameter(torch.full((outputs, inputs), GATES_OPEN)) if gated else None

    def dense(self, *, chosen: bool) -> Tensor:
        """What is added to the weight now: with noise in the gates only while training, with none once chosen."""
        if chosen or self.gates is None:
            return self.delta * self.kept
        logits: Tensor = self.gates
        if self.training:
            noise = torch.rand_like(logits).clamp(1e-6, 1 - 1e-6)
            logits = (logits + noise.log() - (1 - noise).log()) / BETA
        return self.delta * (torch.sigmoid(logits) * (HIGH - LOW) + LOW).clamp(0, 1)

    def price(self) -> Tensor:
        """How much the expected share of open gates grows with each logit."""
        assert self.gates is not None
        open_ = torch.sigmoid(self.gates.detach() - SHIFT)
        return open_ * (1 - open_)


class SparseChanges(nn.Module):
    """The changes of all targets. The choice falls after `search_steps`; a file that is loaded has been chosen."""

    chosen: Tensor

    def __init__(self, model: Any, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.active = True
        self._config = config
        self._gated = config["algorithm"] == "diff-pruning"
        self._names = tuple(config["targets"])
        self.register_buffer("chosen", torch.tensor(False))
        modules = dict(model.named_modules())
        self.changes: list[Change] = []
        for name in self._names:
            outputs, inputs = shape_of(modules[name])
            change = Change(outputs, inputs, gated=self._gated)
            self.changes.append(change)
            modules[name].register_forward_hook(self._hook(change))
        self.registered = nn.ModuleList(self.changes)

    def start(self) -> None:
        """D starts at zero: the untrained adapter changes nothing."""

    def tensors(self) -> dict[str, Tensor]:
        found = {}
        for name, change in zip(self._names, self.changes, strict=True):
            indices = change.kept.flatten().nonzero()[:, 0]
            if len(indices):
                found[f"{ROOT}{name}.sparse_indices"] = indices.to(torch.int32)
                found[f"{ROOT}{name}.sparse_values"] = change.delta.detach().flatten()[indices]
        return found

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        for name, change in zip(self._names, self.changes, strict=True):
            indices = tensors[f"{ROOT}{name}.sparse_indices"].long()
            change.kept.fill_(False).view(-1)[indices] = True
            change.delta.data.zero_().view(-1)[indices] = tensors[f"{ROOT}{name}.sparse_values"].float()
        self.chosen.fill_(True)

    def config(self) -> Mapping[str, Any]:
        entries = {
            name: int(change.kept.sum())
            for name, change in zip(self._names, self.changes, strict=True)
            if bool(change.kept.any())
        }
        general = {key: value for key, value in self._config.items() if key not in TRAINING_ONLY}
        return {**general, "entries": entries}

    def before_step(self) -> None:
        """Put the price of open gates onto their gradients."""
        if not self._gated or bool(self.chosen):
            return
        total = sum(change.delta.numel() for change in self.changes)
        for change in self.changes:
            if change.gates is not None and change.gates.grad is not None:
                change.gates.grad += self._config["gate_price"] / total * change.price()

    def after_step(self, optimizer: Any, step: int) -> None:
        if step == self._config["search_steps"]:
            self._choose()
            optimizer.state.clear()  # what it remembers is of another search

    @torch.no_grad()
    def _choose(self) -> None:
        """Keep the k largest entries over all targets; ties go to the first."""
        dense = [self._settled(change) for change in self.changes]
        sizes = torch.cat([value.abs().flatten() for value in dense])
        count = max(1, round(self._config["density"] * len(sizes)))
        kept = torch.zeros_like(sizes, dtype=torch.bool)
        kept[sizes.sort(descending=True, stable=True).indices[:count]] = True
        parts = kept.split([value.numel() for value in dense])
        for change, value, part in zip(self.changes, dense, parts, strict=True):
            change.kept.copy_(part.view_as(value))
            change.delta.copy_(value * change.kept if self._gated else torch.zeros_like(value))
        self.chosen.fill_(True)

    def _settled(self, change: Change) -> Tensor:
        """D under its gates without noise."""
        if change.gates is None:
            return change.delta.clone()
        gate = (torch.sigmoid(change.gates) * (HIGH - LOW) + LOW).clamp(0, 1)
        return change.delta * gate

    def _hook(self, change: Change) -> Any:
        def add(module: nn.Module, args: Any, out: Tensor) -> Tensor:
            if not self.active:
                return out
            return out + functional.linear(args[0], change.dense(chosen=bool(self.chosen)))

        return add


def shape_of(module: Any) -> tuple[int, int]:
    """(O, I) of a Linear or a Conv1D."""
    rows, columns = module.weight.shape
    return (columns, rows) if type(module).__name__ == "Conv1D" else (rows, columns)


def loaded_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a saved config means to `SparseChanges`."""
    targets: Sequence[str] = list(config["entries"])
    return {**config, "targets": targets, "algorithm": None, "search_steps": None, "gate_price": None}
