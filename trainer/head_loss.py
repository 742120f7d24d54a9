"""Training of an adapter that changes the output head: the loss goes through the head's own module.

TRL multiplies by the head's weight itself, only where something is learnt and never all logits at once, which saves
memory; an adapter of the head would not be seen there. Here the network gives its logits as it does when it is served.
Law: on a head that nothing changes, both give the same loss.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.functional import cross_entropy
from transformers import Trainer
from trl import SFTTrainer

from trainer.checkpoint import CheckpointingTrainer, Checkpoints
from trainer.encode import IGNORED


class HeadTrainer(Checkpoints, Trainer):
    """transformers' trainer with TRL's loss, the price of uneven experts included, over the network's own logits."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.model_accepts_loss_kwargs = True  # the loss below divides by the tokens of all batches of a step
        if self.args.gradient_checkpointing and hasattr(self.model, "peft_config"):
            self.model.enable_input_require_grads()
        shape = self.model.config.get_text_config()
        balanced = hasattr(shape, "output_router_logits")
        self.price_of_imbalance: float = getattr(shape, "router_aux_loss_coef", 0.0) if balanced else 0.0

    def compute_loss(self, model: Any, inputs: Any, return_outputs: Any = False, num_items_in_batch: Any = None) -> Any:
        labels_BT = inputs["labels"][:, 1:]
        given = {name: value for name, value in inputs.items() if name != "labels"}
        if self.price_of_imbalance:
            given["output_router_logits"] = True
        outputs = model(**given, use_cache=False)
        learnt_BT = labels_BT != IGNORED
        logits_NV = outputs.logits[:, :-1][learnt_BT].float()
        total = cross_entropy(logits_NV, labels_BT[learnt_BT], reduction="sum")
        count = learnt_BT.sum() if num_items_in_batch is None else num_items_in_batch
        loss = total / count
        if self.price_of_imbalance:
            steps = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
            loss = loss + self.price_of_imbalance * outputs.aux_loss / steps
        return (loss, outputs) if return_outputs else loss


def trainer_for(model: Any) -> type[SFTTrainer] | type[HeadTrainer]:
    """TRL's where the head is as the base has it."""
    return CheckpointingTrainer if head_is_the_bases(model) else HeadTrainer


def head_is_the_bases(model: Any) -> bool:
    head = model.get_output_embeddings()
    hooked = head._forward_hooks or head._forward_pre_hooks
    return type(head) is nn.Linear and not hooked and not head.weight.requires_grad
