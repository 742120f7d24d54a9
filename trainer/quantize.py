"""Training over a frozen base that is held in few bits (QLoRA): what can be, and how the base is loaded for it.

nf4 is 4-bit NormalFloat with doubly quantised scales, int8 is LLM.int8, both of bitsandbytes, both as `hub serve
--quantize` holds them; what is not a Linear, and the output head, stays in fp32, and so does what is trained.
Only methods that never read the base's own weight: bitsandbytes packs NF4 anew on a CPU at the first evaluation, and
what is made of the weight after that is wrong without a word.
Source: Dettmers et al. 2023 (arXiv:2305.14314), 2022 (arXiv:2208.07339). Names of settings only: imports no torch.
"""

from __future__ import annotations

from typing import Any, Final, Literal

from trainer.anatomy import Anatomy, names
from trainer.method import Options

Quantize = Literal["nf4", "int8"]

METHODS: Final = ("lora", "adalora", "vera", "oft", "road", "ia3", "ln-tuning", "prefix", "prompt", "p-tuning")
INITS: Final = ("default", "gaussian", "orthogonal")  # of LoRA: the others read the base's weights, or run it
# What bitsandbytes' packed products of NF4 take.
INPUTS_OF, OUTPUTS_OF = 64, 32


def quantize_problems(method: str, options: Options, anatomy: Anatomy, quantize: Quantize) -> list[str]:
    """Why a method cannot be trained over a base in few bits."""
    if method not in METHODS:
        return [
            f"quantize {quantize} is for {', '.join(METHODS)}; {method} needs the base's own weights, or is no method "
            "of PEFT's that trains over a quantised base"
        ]
    found = []
    if anatomy.conv1d:
        found.append(f"quantize {quantize} is for Linear modules, and {anatomy.architecture} has Conv1D")
    if getattr(options, "dora", False):
        found.append(f"quantize {quantize} and dora exclude each other: it measures the rows of the base's own weight")
    init = getattr(options, "init", None)
    if method == "lora" and init not in INITS:
        found.append(f"quantize {quantize} and init {init} exclude each other: it starts from the base's own weights")
    linears = [name for name in anatomy.widths if name != anatomy.head]
    for one in getattr(options, "modules_to_save", None) or ():
        if any(names(one, name) for name in linears):
            found.append(f"quantize {quantize}: {one} is held in few bits, so it cannot be trained whole")
    if quantize == "nf4":
        found += _widths(anatomy, linears)
    return found


def _widths(anatomy: Anatomy, linears: list[str]) -> list[str]:
    for name in linears:
        inputs, outputs = anatomy.widths[name]
        if inputs % INPUTS_OF or outputs % OUTPUTS_OF:
            return [
                f"quantize nf4 needs inputs in multiples of {INPUTS_OF} and outputs in multiples of {OUTPUTS_OF}, and "
                f"{name} has {inputs} and {outputs}: try int8"
            ]
    return []


def loading(quantize: Quantize) -> Any:
    """What transformers loads the base by."""
    import torch
    from transformers import BitsAndBytesConfig

    if quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
