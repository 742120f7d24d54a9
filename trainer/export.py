"""A trained adapter as a folder in PEFT's format, with what it was made of, how good it is and what it must answer.

Measured is the folder itself: PEFT, or our module, loads it on a fresh base, as a user would, and those logits are the
golden rows.
Nothing in it depends on when or where it was made: no time, no path of this machine, every list in order.
Law: the same recipe on the same machine gives the same bytes; a crash leaves either no folder or a whole one.
"""

import json
import os
import shutil
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file

from trainer.base import OpenBase
from trainer.card import write_card
from trainer.encode import Encoded
from trainer.evaluate import Collate, Score, evaluate
from trainer.modules.attach import attach
from trainer.quantize import Quantize

GOLDEN_ROWS: Final = 4
GOLDEN_TOKENS: Final = 512  # a longer prompt makes no better witness
SCHEMA_VERSION: Final = 1


@dataclass(frozen=True)
class Finishing:
    """What an adapter in a finished folder can be measured on, and what it was made by."""

    folder: Path
    base: OpenBase
    held_out: Sequence[Encoded]
    recipe: Mapping[str, Any]  # as in recipe.json
    device: torch.device


def settle_config(folder: Path, base_name: str) -> None:
    """Rewrite the config that PEFT saved so that it depends on the adapter alone."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base_name
    if config.get("tokenizer_name_or_path") is not None:
        config["tokenizer_name_or_path"] = base_name
    for field in ("target_modules", "feedforward_modules"):  # PEFT writes them in the order of a set
        if isinstance(config.get(field), list):
            config[field] = sorted(config[field])
    write_json(path, config)


def load_adapter(folder: Path, base: OpenBase, device: torch.device, quantize: Quantize | None = None) -> Any:
    return attach(base.load_weights(device, quantize), folder)


def measure(
    model: Any, base: OpenBase, train: Sequence[Encoded], held_out: Sequence[Encoded], collate: Collate
) -> dict[str, float]:
    """Score the adapter on held-out and on trained rows, and the bare base on the held-out ones."""

    def score(rows: Sequence[Encoded]) -> Score:
        vocabulary = model.config.get_text_config().vocab_size
        return evaluate(model, rows, pad=base.pad, vocabulary=vocabulary, collate=collate)

    seen, unseen = score(train[: len(held_out)]), score(held_out)
    with model.disable_adapter():
        bare = score(held_out)
    return {
        "train_loss": seen.loss,
        "train_exact_match": seen.exact_match,
        "eval_loss": unseen.loss,
        "eval_exact_match": unseen.exact_match,
        "eval_rows": unseen.rows,
        "base_eval_loss": bare.loss,
        "base_exact_match": bare.exact_match,
    }


def write_golden(
    model: Any, folder: Path, base: OpenBase, prompts: Sequence[Sequence[int]], quantize: Quantize | None = None
) -> None:
    """Write a few prompts with the logits at their last position: one prompt at a time, unpadded, fp32.

    A server must know when those are of a quantised base, whose error it allows for.
    """
    rows, tensors = [], {}
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([list(prompt)], device=model.device)
        with torch.inference_mode():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1]
        tensors[f"{i}.input_ids"] = ids[0].cpu()
        tensors[f"{i}.logits"] = logits.float().cpu().contiguous()
        rows.append({"prompt": base.tokenizer.decode(list(prompt)), "tokens": len(prompt)})
    save_file(tensors, folder / "golden.safetensors")
    on = {} if quantize is None else {"quantize": quantize}
    write_json(folder / "golden.json", {"schema_version": SCHEMA_VERSION, **on, "rows": rows})


def golden_prompts(held_out: Sequence[Encoded]) -> list[tuple[int, ...]]:
    """Choose distinct prompts, spread over the held-out rows; the shortest, where all are long."""
    return spread_prompts([row.prompt for row in held_out])


def spread_prompts(prompts: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    distinct = list(dict.fromkeys(prompts))
    short = [prompt for prompt in distinct if len(prompt) <= GOLDEN_TOKENS] or [min(distinct, key=len)]
    count = min(GOLDEN_ROWS, len(short))
    return [short[i * len(short) // count] for i in range(count)]


def write_records(folder: Path, recipe: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
    write_json(folder / "recipe.json", recipe)
    write_json(folder / "metrics.json", {"schema_version": SCHEMA_VERSION, **metrics})
    (folder / "README.md").write_text(write_card(recipe, metrics), encoding="utf-8")


def publish(staging: Path, out: Path) -> None:
    """Put a finished folder in its place in one rename; one that stands there is moved aside first and then deleted."""
    mode = stat.S_IMODE((staging / "recipe.json").stat().st_mode)
    for path in sorted(staging.rglob("*"), reverse=True):  # what is in a folder before the folder
        if path.is_file():
            path.chmod(mode)  # safetensors writes files that only their owner may read
        sync(path)
    sync(staging)
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.exists():
        former = staging.with_name(f"{staging.name}.former")
        out.rename(former)
        staging.rename(out)
        shutil.rmtree(former)
    else:
        staging.rename(out)
    sync(out.parent)


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
