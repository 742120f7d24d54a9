"""OpenVINO GenAI's continuous batching. A batch has one adapter: requests are batched by adapter."""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai

from benchmarks.workers.lines import Generate, serve

AT_ONCE = 16
CACHE_GIB = 1


def start(options: dict[str, Any]) -> Generate:
    scheduler = genai.SchedulerConfig()
    scheduler.max_num_seqs = AT_ONCE
    scheduler.cache_size = CACHE_GIB
    adapters = [genai.Adapter(f"{folder}/adapter_model.safetensors") for folder in options["adapters"]]
    registered = {"adapters": genai.AdapterConfig(adapters)} if adapters else {}
    threads = {"INFERENCE_NUM_THREADS": options["threads"]}
    tokenizer = genai.Tokenizer(options["model"])
    pipeline = genai.ContinuousBatchingPipeline(options["model"], tokenizer, scheduler, "CPU", **registered, **threads)

    def config(adapter: int | None, new: int) -> Any:
        made = genai.GenerationConfig(max_new_tokens=new, ignore_eos=True, do_sample=False)
        if adapters:
            made.adapters = genai.AdapterConfig() if adapter is None else genai.AdapterConfig(adapters[adapter])
        return made

    def generate(prompts: list[list[int]], asked: list[int | None], new: int) -> int:
        tokens = 0
        for adapter in dict.fromkeys(asked):
            mine = [prompt for prompt, one in zip(prompts, asked, strict=True) if one == adapter]
            batch = [ov.Tensor(np.array([prompt], dtype=np.int64)) for prompt in mine]
            done = pipeline.generate(batch, [config(adapter, new)] * len(batch))
            tokens += sum(len(one.m_generation_ids[0]) for one in done)
        return tokens

    return generate


if __name__ == "__main__":
    serve(start)
