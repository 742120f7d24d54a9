"""lora-moe: a trained router over LoRA experts, and the experts themselves on their Linears, frozen or trained with it.

    s_e = w_e . h / rms(h) + v_e . c in every decoder layer; the top_k best share softmax(s)
    y += sum_e g_e B_e A_e x at every Linear of the layer, over the chosen experts alone

h is the layer's input, c the mean of the embeddings of the row's prompt, at rms 1. Without c the first layer would know
nothing but the token itself, and those that all rows share (the template's) would get experts that spoil the answer.

Experts that were trained apart do not add up to anything of use, so the loss alone does not find the way from an even
mixture to a choice. In the first `imitation_steps` each row is therefore served by the one expert under which its own
answer is likeliest, and every layer learns, by cross entropy, to choose that one; nobody labels the rows. In steps
after that, if there are any, the router is trained as it is served, by the loss. Beside it stands Switch's price on
uneven use, E * sum_e (share of the choices that fell on e) * (mean probability of e), averaged over the layers. Both
prices are of one batch, however many batches make a step.
The router's file holds w, `router.weight`, and v, `router.prompt_weight`, both (L, E, H); experts are named by their
digests. Frozen ones stay in the hub. Those that are trained learn by the same loss, from what the hub has: while
imitating each its own rows, after that whatever part of a mixture they are. They are saved as adapters of their own.
Source: Shazeer et al. 2017 (arXiv:1701.06538); Fedus et al. 2021 (arXiv:2101.03961).

B batch, T tokens, E experts, H hidden size, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize, one_hot

from hub.companions import companions, expert_folder
from hub.connect import open_hub
from hub.ref import parse_reference
from trainer.encode import IGNORED
from trainer.errors import BaseUnfit
from trainer.modules.experts import Expert, Frozen, Trained, load_expert, write_expert
from trainer.modules.loreft import PROMPT_LENGTHS

RMS_EPSILON: Final = 1e-6  # as in the server
START_STD: Final = 0.01


# Of training alone, and of where experts lie: in no file.
UNSAVED: Final = ("imitation_steps", "experts_are", "expert_names", "expert_rate", "folder")


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
        """The keys of UNSAVED may stand in the config or not."""
        super().__init__()
        self.active = True
        self._config = config
        self._top_k = int(config["top_k"])
        self._price = float(config["router_aux_loss_coef"])
        self._imitation_steps = int(config.get("imitation_steps", 0))
        self._gates: Tensor | None = None
        self._served_B: Tensor | None = None  # by which expert alone, instead of by choice
        self._judging = False
        self._real_BT: Tensor | None = None
        blocks = decoder_layers(model)
        hidden = model.config.get_text_config().hidden_size
        self._embeddings = partial(_rows, model.get_input_embeddings())
        width = model.get_input_embeddings().weight.shape[1]
        if width != hidden:
            raise BaseUnfit(f"a router reads embeddings of {hidden} features, this base's have {width}")
        self._told_BLE: Tensor | None = None  # what the prompts of the batch at hand add to the scores
        self.weight = nn.Parameter(torch.zeros(len(blocks), len(experts), hidden))
        self.prompt_weight = nn.Parameter(torch.zeros_like(self.weight))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        for index, block in enumerate(blocks):
            block.register_forward_pre_hook(partial(self._enter, index), with_kwargs=True)
        self._experts = experts
        self.terms = nn.ModuleList()
        self._linears = sorted({name for expert in experts for name in expert.lows})
        make = partial(Trained, rate=float(config["expert_rate"])) if self.trains_experts else Frozen
        for name in self._linears:
            terms = make([expert.lows.get(name) for expert in experts])
            self.terms.append(terms)
            model.get_submodule(name).register_forward_hook(partial(self._add, terms))
        model.register_forward_pre_hook(self._read, with_kwargs=True)

    @property
    def trains_experts(self) -> bool:
        return bool(self._config.get("experts_are") == "trained")

    def start(self) -> None:
        nn.init.normal_(self.weight, std=START_STD)

    def tensors(self) -> dict[str, Tensor]:
        return {"router.weight": self.weight.detach(), "router.prompt_weight": self.prompt_weight.detach()}

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            self.weight.copy_(tensors["router.weight"])
            self.prompt_weight.copy_(tensors["router.prompt_weight"])

    def config(self) -> Mapping[str, Any]:
        return {name: value for name, value in self._config.items() if name not in UNSAVED}

    def write_experts(self, folder: Path, base_name: str) -> None:
        """Those that were trained, each into the folder of its new name beside the router's files."""
        if not self.trains_experts:
            return
        with torch.no_grad():
            factors = {name: terms.factors() for name, terms in zip(self._linears, self._trained(), strict=True)}
        owners = {name: terms.owner_P for name, terms in zip(self._linears, self._trained(), strict=True)}
        for number, (expert, name) in enumerate(zip(self._experts, self._config["expert_names"], strict=True)):
            mine = {
                linear: (factors[linear][0][owners[linear] == number], factors[linear][1][:, owners[linear] == number])
                for linear in expert.lows
            }
            write_expert(expert.config, mine, expert_folder(folder, name), base_name)

    def before_step(self) -> None:
        """Nothing is added to the gradients: the price is inside them."""

    def after_step(self, optimizer: Any, step: int) -> None:
        self.steps.fill_(step)

    def _read(self, model: Any, args: Any, kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
        """What is known of a batch before its first layer."""
        rest = {name: value for name, value in kwargs.items() if name != PROMPT_LENGTHS}
        mask = kwargs.get("attention_mask")
        self._real_BT = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
        if self._judging:
            return args, rest
        cache = kwargs.get("past_key_values")
        if cache is None or cache.get_seq_length() == 0:  # a step of decoding goes on with the prompt's
            ids_BT = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
            self._told_BLE = self._tell(ids_BT, mask, kwargs.get(PROMPT_LENGTHS))
        self._served_B = None
        if self.training and int(self.steps) < self._imitation_steps:
            self._served_B = self._best(model, rest)
        return args, rest

    def _tell(self, ids_BT: Tensor, mask_BT: Tensor | None, lengths_B: Tensor | None) -> Tensor:
        mask_BT = torch.ones_like(ids_BT) if mask_BT is None else mask_BT
        lengths_B = mask_BT.sum(1) if lengths_B is None else lengths_B
        of_prompt_BT = mask_BT.bool() & (mask_BT.cumsum(1) <= lengths_B[:, None])
        sums_BH = (self._embeddings(ids_BT) * of_prompt_BT[..., None]).sum(1)
        reading_BH = normalize(sums_BH, dim=-1) * sums_BH.shape[-1] ** 0.5
        return torch.einsum("bh,leh->ble", reading_BH, self.prompt_weight)

    def _best(self, model: Any, kwargs: Mapping[str, Any]) -> Tensor:
        """For every row of the batch the expert under which its learnt tokens are likeliest."""
        inputs = {name: value for name, value in kwargs.items() if name in ("input_ids", "attention_mask")}
        labels_BT = kwargs["labels"][:, 1:]
        losses = []
        self._judging = True
        try:
            with torch.no_grad():
                for expert in range(self.weight.shape[1]):
                    self._served_B = torch.full((len(labels_BT),), expert, device=labels_BT.device)
                    logits_BVT = model(**inputs).logits[:, :-1].float().transpose(1, 2)
                    losses.append(cross_entropy(logits_BVT, labels_BT, ignore_index=IGNORED, reduction="none").sum(1))
        finally:
            self._judging = False
        return torch.stack(losses).argmin(0)

    def _enter(self, layer: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.active:
            return None
        h_BTH = args[0] if args else kwargs["hidden_states"]
        normed = h_BTH * torch.rsqrt(h_BTH.square().mean(-1, keepdim=True) + RMS_EPSILON)
        scores_BTE = normed @ self.weight[layer].t()
        if self._told_BLE is not None:
            scores_BTE = scores_BTE + self._told_BLE[:, None, layer]
        probs_BTE = scores_BTE.softmax(-1)
        best_BTK, chosen_BTK = scores_BTE.topk(self._top_k, dim=-1)
        if self._served_B is not None:
            alone_BE = one_hot(self._served_B, probs_BTE.shape[-1]).to(probs_BTE)
            self._gates = alone_BE[:, None].expand_as(probs_BTE)
        else:
            self._gates = torch.zeros_like(probs_BTE).scatter(-1, chosen_BTK, best_BTK.softmax(-1))
        if not (self.training and torch.is_grad_enabled()):
            return None
        price = self._price * self._unevenness(probs_BTE, chosen_BTK)
        if self._served_B is not None:
            missed_BT = cross_entropy(
                scores_BTE.transpose(1, 2), self._served_B[:, None].expand(scores_BTE.shape[:2]), reduction="none"
            )
            price = price + self._of_real(missed_BT).mean()
        priced = _WithPrice.apply(h_BTH, price / len(self.weight))
        return ((priced, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": priced})

    def _unevenness(self, probs_BTE: Tensor, chosen_BTK: Tensor) -> Tensor:
        """One when use is even; only tokens that are no padding count."""
        experts = probs_BTE.shape[-1]
        used_BTE = torch.zeros_like(probs_BTE).scatter(-1, chosen_BTK, 1.0 / chosen_BTK.shape[-1])
        return experts * (self._of_real(used_BTE).mean(0) * self._of_real(probs_BTE).mean(0)).sum()

    def _of_real(self, value_BT: Tensor) -> Tensor:
        """The tokens that are no padding, in one row."""
        if self._real_BT is None:
            return value_BT.flatten(0, 1)
        return value_BT[self._real_BT]

    def _add(self, terms: nn.Module, linear: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor | None:
        if not self.active or self._gates is None:
            return None
        return y + terms(args[0], self._gates)

    def _trained(self) -> list[Trained]:
        return [terms for terms in self.terms if isinstance(terms, Trained)]


def _rows(embedding: nn.Module, ids_BT: Tensor) -> Tensor:
    """The table's own rows, in fp32, whatever the base scales them by."""
    table: Any = embedding.weight
    return table[ids_BT].float()


def build(model: Any, config: Mapping[str, Any]) -> Router:
    """With the experts that the config pins: those in its folder, the others from the hub.

    Raises: ExpertUnfit, HubError.
    """
    beside = {} if "folder" not in config else {one.pin.digest: one.folder for one in companions(config["folder"])}
    experts = []
    for reference in config["experts"]:
        parsed = parse_reference(reference)
        if parsed.digest in beside:
            experts.append(load_expert(model, beside[parsed.digest], reference))
            continue
        with TemporaryDirectory() as room:
            open_hub().pull(parsed, Path(room) / "expert")
            experts.append(load_expert(model, Path(room) / "expert", reference))
    return Router(model, config, experts)


def with_folder(config: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    """The saved config, and where experts may lie beside it."""
    return {**config, "folder": folder}


def decoder_layers(model: Any) -> Sequence[nn.Module]:
    """Raises: BaseUnfit."""
    decoder = model.base_model
    blocks = getattr(decoder, "layers", None) or getattr(decoder, "h", None)
    if blocks is None:
        raise BaseUnfit(f"no decoder layers are found in {type(model).__name__}, which a router reads")
    return list(blocks)
