"""lora-moe: a trained router over frozen LoRA experts, and the experts themselves on their Linears.

    s_e = w_e . h / rms(h) in every decoder layer, h the layer's input; the top_k best share softmax(s)
    y += sum_e g_e B_e A_e x at every Linear of the layer, over the chosen experts alone

While the first `dense_steps` are trained every expert takes part with its share of the softmax over all, so that each
row of the router learns from every token; then as served. Beside the loss stands Switch's price on uneven use,
E * sum_e (share of the choices that fell on e) * (mean probability of e), averaged over the layers; the gradient of one
batch, however many batches make a step.
Only the router is trained and saved: `router.weight` (L, E, H). Experts stay in the hub and are named by their digests.
Source: Shazeer et al. 2017 (arXiv:1701.06538); Fedus et al. 2021 (arXiv:2101.03961).

B batch, T tokens, E experts, H hidden size, L layers, r rank, I in, O out, P sum of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import torch
from peft import PeftModel
from torch import Tensor, nn

from hub.connect import open_hub
from hub.ref import parse_reference
from trainer.errors import BaseUnfit, ExpertUnfit

RMS_EPSILON: Final = 1e-6  # as in the server
START_STD: Final = 0.01


@dataclass(frozen=True, slots=True)
class Low:
    """One expert at one Linear; its scaling is inside B."""

    A_rI: Tensor
    B_Or: Tensor


Expert = Mapping[str, Low]  # by the Linear's name


class _WithPrice(torch.autograd.Function):
    """Hands h on as it is, and gives the price its gradient."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, price: Tensor) -> Tensor:
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], torch.ones((), device=gradients[0].device)


class Router(nn.Module):
    steps: Tensor  # that have been trained; in the checkpoints

    def __init__(self, model: Any, config: Mapping[str, Any], experts: Sequence[Expert]) -> None:
        """`config["dense_steps"]` is of training alone and not saved."""
        super().__init__()
        self.active = True
        self._config = config
        self._top_k = int(config["top_k"])
        self._price = float(config["router_aux_loss_coef"])
        self._dense_steps = int(config.get("dense_steps", 0))
        self._gates: Tensor | None = None
        self._real_BT: Tensor | None = None
        blocks = decoder_layers(model)
        hidden = model.config.get_text_config().hidden_size
        self.weight = nn.Parameter(torch.zeros(len(blocks), len(experts), hidden))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        for index, block in enumerate(blocks):
            block.register_forward_pre_hook(partial(self._enter, index), with_kwargs=True)
        linears = dict(model.named_modules())
        for name in sorted({name for expert in experts for name in expert}):
            self._hook(linears[name], [expert.get(name) for expert in experts])
        model.register_forward_pre_hook(self._read_mask, with_kwargs=True)

    def start(self) -> None:
        nn.init.normal_(self.weight, std=START_STD)

    def tensors(self) -> dict[str, Tensor]:
        return {"router.weight": self.weight.detach()}

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            self.weight.copy_(tensors["router.weight"])

    def config(self) -> Mapping[str, Any]:
        return {name: value for name, value in self._config.items() if name != "dense_steps"}

    def before_step(self) -> None:
        """Nothing is added to the gradients: the price is inside them."""

    def after_step(self, optimizer: Any, step: int) -> None:
        self.steps.fill_(step)

    def _read_mask(self, model: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        self._real_BT = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None

    def _enter(self, layer: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.active:
            return None
        h_BTH = args[0] if args else kwargs["hidden_states"]
        normed = h_BTH * torch.rsqrt(h_BTH.square().mean(-1, keepdim=True) + RMS_EPSILON)
        scores_BTE = normed @ self.weight[layer].t()
        probs_BTE = scores_BTE.softmax(-1)
        best_BTK, chosen_BTK = scores_BTE.topk(self._top_k, dim=-1)
        if self.training and int(self.steps) < self._dense_steps:
            self._gates = probs_BTE
        else:
            self._gates = torch.zeros_like(probs_BTE).scatter(-1, chosen_BTK, best_BTK.softmax(-1))
        if not (self.training and torch.is_grad_enabled() and self._price):
            return None
        priced = _WithPrice.apply(h_BTH, self._price * self._unevenness(probs_BTE, chosen_BTK) / len(self.weight))
        return ((priced, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": priced})

    def _unevenness(self, probs_BTE: Tensor, chosen_BTK: Tensor) -> Tensor:
        """One when use is even; only tokens that are no padding count."""
        experts = probs_BTE.shape[-1]
        used_BTE = torch.zeros_like(probs_BTE).scatter(-1, chosen_BTK, 1.0 / chosen_BTK.shape[-1])
        if self._real_BT is not None and self._real_BT.shape == probs_BTE.shape[:2]:
            used_BTE, probs_BTE = used_BTE[self._real_BT], probs_BTE[self._real_BT]
        return experts * (used_BTE.reshape(-1, experts).mean(0) * probs_BTE.reshape(-1, experts).mean(0)).sum()

    def _hook(self, linear: nn.Module, lows: Sequence[Low | None]) -> None:
        there = [(number, low) for number, low in enumerate(lows) if low is not None]
        A_PI = torch.cat([low.A_rI for _, low in there])
        B_OP = torch.cat([low.B_Or for _, low in there], dim=1)
        owner_P = torch.tensor([number for number, low in there for _ in range(low.A_rI.shape[0])])

        def add(module: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor | None:
            if not self.active or self._gates is None:
                return None
            return y + ((args[0] @ A_PI.t()) * self._gates[..., owner_P]) @ B_OP.t()

        linear.register_forward_hook(add)


def build(model: Any, config: Mapping[str, Any]) -> Router:
    """With the experts that the config pins, from the hub. Raises: ExpertUnfit, HubError."""
    hub = open_hub()
    experts = []
    for reference in config["experts"]:
        with TemporaryDirectory() as folder:
            hub.pull(parse_reference(reference), Path(folder) / "expert")
            experts.append(load_expert(model, Path(folder) / "expert", reference))
    return Router(model, config, experts)


def load_expert(model: Any, folder: Path, reference: str) -> Expert:
    """A LoRA's terms as PEFT loads them onto this base, which is left as it was. Raises: ExpertUnfit."""
    loaded = PeftModel.from_pretrained(model, str(folder))
    config = loaded.peft_config["default"]
    plain = str(config.peft_type.value) == "LORA" and config.bias == "none"
    if not plain or config.use_dora or config.lora_bias:
        loaded.unload()
        raise ExpertUnfit(f"expert {reference} is no plain LoRA: experts are low-rank terms alone")
    expert = {}
    for name, module in loaded.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            A_rI, B_Or = module.lora_A["default"].weight, module.lora_B["default"].weight
            scaled = B_Or.detach().clone() * module.scaling["default"]
            expert[name.removeprefix("base_model.model.")] = Low(A_rI.detach().clone(), scaled)
    loaded.unload()
    return expert


def decoder_layers(model: Any) -> Sequence[nn.Module]:
    """Raises: BaseUnfit."""
    decoder = model.base_model
    blocks = getattr(decoder, "layers", None) or getattr(decoder, "h", None)
    if blocks is None:
        raise BaseUnfit(f"no decoder layers are found in {type(model).__name__}, which a router reads")
    return list(blocks)
