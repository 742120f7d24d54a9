"""The README.md of an adapter that was trained, fused or extracted: a card that the Hugging Face Hub also reads."""

from collections.abc import Mapping
from typing import Any, Final

CARD: Final = """---
base_model: {base}
library_name: peft
tags: [multigraft, {method}]
---
# A {method} adapter of {base}

Trained by `hub train`{held} for {steps} steps of {batch} rows on `{data}` ({rows} rows, `{digest}`).

| on {eval_rows} held-out rows | this adapter | bare base |
|---|---|---|
| answered exactly | {eval_exact_match:.3f} | {base_exact_match:.3f} |
| loss on the answers | {eval_loss:.4f} | {base_eval_loss:.4f} |

`recipe.json` trains it again; `golden.json` lists prompts whose logits `golden.safetensors` holds.

```
hub push FOLDER NAME && hub serve --base {base}{serve}
```
"""


def write_card(recipe: Mapping[str, Any], metrics: Mapping[str, float]) -> str:
    data = recipe["data"]
    return CARD.format(
        base=recipe["base"],
        method=recipe["method"],
        held=f" over the base in {recipe['quantize']}" if recipe["quantize"] else "",
        steps=recipe["steps"],
        batch=recipe["batch_size"] * recipe["gradient_accumulation"],
        serve=f" --quantize {recipe['quantize']}" if recipe["quantize"] else "",
        data=data["path"],
        rows=data["rows"],
        digest=data["digest"],
        **metrics,
    )


EXPERT: Final = """---
base_model: {base}
library_name: peft
tags: [multigraft, lora, lora-moe-expert]
---
# {name}, an expert of a router

`{origin}`, trained on together with the router that pins it, by `hub train --method lora-moe` for {steps} steps on
`{data}`. `recipe.json` holds the router's recipe.

Alone it answers {eval_exact_match:.3f} of {eval_rows} held-out rows of all skills exactly (loss {eval_loss:.4f}). It is
meant to be asked through its router.
"""

FUSION: Final = """---
base_model: {base}
library_name: peft
tags: [multigraft, fuse, {method}]
---
# {method} of {count} adapters of {base}

| parent | weight | digest |
|---|---|---|
{parents}

Made by `hub fuse --method {settings}`.
Relative error against the exact weighted sum of the deltas: {relative_error:.3g}.
"""

EXTRACTION: Final = """---
base_model: {base}
library_name: peft
tags: [multigraft, extract]
---
# {tuned} as a low-rank adapter of {base}

Made by `hub extract`: per Linear the nearest low-rank matrix to the difference of the two models, {settings}.

| | share of the norm |
|---|---|
| lost at the Linears, by rank | {relative_error:.3g} |
| lost in all, with what an adapter of Linears leaves out | {whole_relative_error:.3g} |

Tensors left out: {left_out}.
"""


def expert_card(recipe: Mapping[str, Any], metrics: Mapping[str, Any], origin: str) -> str:
    router = recipe["router"]
    return EXPERT.format(
        base=recipe["base"],
        name=recipe["name"],
        origin=origin,
        steps=router["steps"],
        data=router["data"]["path"],
        **metrics,
    )


def fusion_card(recipe: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    settings = recipe["fusion"]
    parents = [
        f"| {parent['name']}@{parent['version']} | {parent['weight']:g} | `{parent['digest']}` |"
        for parent in recipe["lineage"]
    ]
    return FUSION.format(
        base=recipe["base"],
        method=settings["method"],
        count=len(parents),
        parents="\n".join(parents),
        settings=" ".join(
            [settings["method"], *(f"--{key} {value}" for key, value in settings.items() if key != "method")]
        ),
        relative_error=metrics["relative_error"],
    )


def extraction_card(recipe: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    return EXTRACTION.format(
        base=recipe["base"],
        tuned=recipe["tuned"]["name"],
        settings=", ".join(f"{key} {value}" for key, value in recipe["extraction"].items()),
        relative_error=metrics["relative_error"],
        whole_relative_error=metrics["whole_relative_error"],
        left_out=len(metrics["left_out"]),
    )
