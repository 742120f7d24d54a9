"""A program that uses huggingface_hub and PEFT and nothing of ours; what it is asked stands on stdin, in lines of JSON.

It is a process of its own because those libraries read HF_ENDPOINT and HF_HOME when they are imported.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    out, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no answer
    for line in sys.stdin:
        asked = json.loads(line)
        name = asked["call"]
        try:
            done = OWN[name] if name in OWN else library(name)
            told = {"result": plain(done(*asked["args"], **asked["options"]))}
        except Exception as error:  # noqa: BLE001  the test judges which
            told = {"error": [kind.__name__ for kind in type(error).__mro__], "message": str(error)}
        out.write(json.dumps(told) + "\n")
        out.flush()


def library(name: str) -> Any:
    import huggingface_hub

    return getattr(huggingface_hub, name)


def plain(value: Any) -> Any:
    """As JSON; the libraries' records by their fields."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    if hasattr(value, "__dict__"):
        return plain(vars(value))
    return [plain(one) for one in value] if hasattr(value, "__iter__") else str(value)


def logits(base: str, adapter: str, revision: str | None) -> Any:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter, revision=revision)
    with torch.no_grad():
        return model.eval()(torch.arange(8)[None]).logits


def same_logits(base: str, adapter: str, revision: str | None, folder: str) -> bool:
    """Whether the base answers with an adapter of the hub, to the bit, as with that of a folder, and not as without."""
    import torch
    from transformers import AutoModelForCausalLM

    found, expected = logits(base, adapter, revision), logits(base, folder, None)
    with torch.no_grad():
        alone = AutoModelForCausalLM.from_pretrained(base).eval()(torch.arange(8)[None]).logits
    assert not torch.equal(expected, alone), "the adapter does nothing, so it proves nothing"
    return torch.equal(found, expected)


def make_peft_adapter(base: str, folder: str, seed: int) -> None:
    """A LoRA adapter as PEFT saves it, on a tiny random llama that is made once."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    if not Path(base).exists():
        tiny = LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2,
        )  # fmt: skip
        LlamaForCausalLM(tiny).save_pretrained(base)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)


OWN: dict[str, Any] = {"same_logits": same_logits, "make_peft_adapter": make_peft_adapter}

if __name__ == "__main__":
    main()
