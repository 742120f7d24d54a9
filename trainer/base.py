"""A base opened for training: its tokenizer and anatomy first, its weights only when they are asked for.

The anatomy is taken from a model without weights (torch's meta device), so that a method that cannot be trained on this
base says so before anything large is read. Weights are fp32 on every device: what a golden row says must hold anywhere.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hub.base import find_base
from trainer.anatomy import Anatomy
from trainer.errors import BaseUnfit, DeviceMissing
from trainer.quantize import Quantize, loading

DEFAULT_MAX_LENGTH: Final = 1024
NO_REMOTE_CODE: Final = {"trust_remote_code": False}  # left out, transformers asks on the terminal
CONTEXT_FIELDS: Final = ("max_position_embeddings", "n_positions", "max_seq_len")


@dataclass(frozen=True)
class OpenBase:
    name: str  # as the user gave it
    folder: Path
    tokenizer: Any
    anatomy: Anatomy
    pad: int
    stops: frozenset[int]  # tokens at which the base stops when it is served
    ends: frozenset[int]  # tokens that may end a turn: those and every special token

    def load_weights(self, device: torch.device, quantize: Quantize | None = None) -> Any:
        """Load the model in fp32, its Linear modules in few bits where that is asked for.

        Raises BaseUnfit where weights are missing, broken or only there as a pickle.
        """
        options: dict[str, Any] = dict(NO_REMOTE_CODE)
        if quantize is not None:
            options |= {"quantization_config": loading(quantize), "device_map": str(device)}
        try:
            model, found = AutoModelForCausalLM.from_pretrained(
                self.folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **options
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise BaseUnfit(f"the weights of base {self.name} cannot be loaded: {error}") from None
        missing = sorted(found["missing_keys"])
        if missing:  # transformers would go on with random values
            raise BaseUnfit(f"base {self.name} lacks {len(missing)} of its tensors, {missing[0]} among them")
        return model.eval() if quantize is not None else model.to(device).eval()


def open_base(name: str) -> OpenBase:
    """Open a base by name, id or folder. Raises hub errors if it is not found, BaseUnfit if it cannot be trained."""
    folder = find_base(name)
    try:
        config = AutoConfig.from_pretrained(folder, **NO_REMOTE_CODE)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, **NO_REMOTE_CODE)
        tokenizer = AutoTokenizer.from_pretrained(folder, **NO_REMOTE_CODE)
    except (OSError, ValueError, KeyError) as error:
        raise BaseUnfit(f"base {name} is no causal language model that transformers can load: {error}") from None
    head = model.get_output_embeddings()
    if head is None:
        raise BaseUnfit(f"base {name} ({type(model).__name__}) has no output head, so it gives no next token")
    anatomy = read_anatomy(model, folder, tokenizer)
    stops = stop_tokens(folder, config, tokenizer)
    return OpenBase(name, folder, tokenizer, anatomy, pad_of(tokenizer), stops, stops | set(tokenizer.all_special_ids))


def read_anatomy(model: Any, folder: Path, tokenizer: Any) -> Anatomy:
    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    modules = dict(model.named_modules())
    linears = [name for name, module in modules.items() if is_linear(module) and module is not head]
    norms = [name for name, module in modules.items() if is_norm(module)]
    adaptable = [*linears, *norms, *(name for name, module in modules.items() if module is head)]
    heads = getattr(config, "num_attention_heads", None)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    hidden = getattr(config, "hidden_size", None)
    head_dim = getattr(config, "head_dim", None) or (hidden // heads if hidden and heads else None)
    return Anatomy(
        folder=folder,
        architecture=type(model).__name__,
        model_type=config.model_type,
        hidden_size=hidden,
        layers=getattr(config, "num_hidden_layers", None),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        uneven_heads=uneven_heads(config),
        context=next((getattr(config, field) for field in CONTEXT_FIELDS if getattr(config, field, None)), None),
        sliding_window=getattr(config, "sliding_window", None),
        linears=tuple(linears),
        head=next(name for name, module in modules.items() if module is head),
        widths={name: widths(module) for name, module in modules.items() if is_linear(module)},
        norms=tuple(norms),
        biased=frozenset(name for name in adaptable if getattr(modules[name], "bias", None) is not None),
        embedding=next(name for name, module in modules.items() if module is model.get_input_embeddings()),
        tied=head.weight is model.get_input_embeddings().weight,
        conv1d=any(type(modules[name]).__name__ == "Conv1D" for name in linears),
        attention_interface=bool(type(model)._can_set_attn_implementation()),
        count_tokens=lambda text: len(tokenizer(text)["input_ids"]),
        plain_tokens=lambda text: tuple(tokenizer.encode(text, add_special_tokens=False)),
        vocabulary=model.get_input_embeddings().weight.shape[0],
    )


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def is_norm(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 1


def widths(module: Any) -> tuple[int, int]:
    """Inputs and outputs; a Conv1D holds its weight transposed."""
    rows, columns = module.weight.shape
    return (rows, columns) if type(module).__name__ == "Conv1D" else (columns, rows)


def uneven_heads(config: Any) -> bool:
    """Latent attention (keys and values of two widths) and layers with heads of their own shape."""
    fields = config.to_dict()  # per_layer_config is a property of every config, but written only by those that have one
    return any(fields.get(name) is not None for name in ("kv_lora_rank", "global_head_dim", "per_layer_config"))


def pad_of(tokenizer: Any) -> int:
    """Padding is masked, so any token will do where the tokenizer names none."""
    return next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)


def stop_tokens(folder: Path, config: Any, tokenizer: Any) -> frozenset[int]:
    """Gather every token at which generation from this base stops."""
    from transformers import GenerationConfig

    found = [tokenizer.eos_token_id, config.get_text_config().eos_token_id]
    if (folder / "generation_config.json").is_file():
        found.append(GenerationConfig.from_pretrained(folder).eos_token_id)
    flat = [token for item in found for token in (item if isinstance(item, list) else [item])]
    return frozenset(token for token in flat if token is not None)


def library_versions() -> Mapping[str, str]:
    import peft
    import transformers
    import trl

    modules = {"peft": peft, "torch": torch, "transformers": transformers, "trl": trl}
    return {name: str(module.__version__) for name, module in modules.items()}


def choose_device(wanted: str) -> torch.device:
    """Take the device asked for; `auto` is the GPU where there is one. Raises DeviceMissing."""
    there = torch.cuda.is_available()
    if wanted == "cuda" and not there:
        raise DeviceMissing("device cuda was asked for, but torch finds no GPU; cpu or auto will do")
    return torch.device("cuda" if there and wanted != "cpu" else "cpu")
