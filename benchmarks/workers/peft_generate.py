"""PEFT's own mixed batch: `generate` with one adapter name a row, 16 rows at a time."""

from __future__ import annotations

from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM

from benchmarks.workers.lines import Generate, serve

AT_ONCE = 16


def start(options: dict[str, Any]) -> Generate:
    torch.set_num_threads(options["threads"])
    model: Any = AutoModelForCausalLM.from_pretrained(options["base"], dtype=getattr(torch, options["dtype"])).eval()
    for number, folder in enumerate(options["adapters"]):
        if number:
            model.load_adapter(folder, adapter_name=f"a{number}")
        else:
            model = peft.PeftModel.from_pretrained(model, folder, adapter_name="a0").eval()

    def generate(prompts: list[list[int]], adapters: list[int | None], new: int) -> int:
        for start in range(0, len(prompts), AT_ONCE):
            batch = torch.tensor(prompts[start : start + AT_ONCE])
            rows = ["__base__" if one is None else f"a{one}" for one in adapters[start : start + AT_ONCE]]
            mixed = {"adapter_names": rows} if options["adapters"] else {}
            with torch.inference_mode():
                model.generate(
                    input_ids=batch,
                    attention_mask=torch.ones_like(batch),
                    max_new_tokens=new,
                    min_new_tokens=new,
                    do_sample=False,
                    pad_token_id=0,
                    **mixed,
                )
        return new * len(prompts)

    return generate


if __name__ == "__main__":
    serve(start)
