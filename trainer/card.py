"""The README.md of an exported adapter: a short model card that the Hugging Face Hub also reads."""

from collections.abc import Mapping
from typing import Any, Final

CARD: Final = """---
base_model: {base}
library_name: peft
tags: [multigraft, {method}]
---
# A {method} adapter of {base}

Trained by `hub train` for {steps} steps of {batch} rows on `{data}` ({rows} rows, `{digest}`).

| on {eval_rows} held-out rows | this adapter | bare base |
|---|---|---|
| answered exactly | {eval_exact_match:.3f} | {base_exact_match:.3f} |
| loss on the answers | {eval_loss:.4f} | {base_eval_loss:.4f} |

`recipe.json` trains it again; `golden.json` lists prompts whose logits `golden.safetensors` holds.

```
hub push FOLDER NAME && hub serve --base {base}
```
"""


def write_card(recipe: Mapping[str, Any], metrics: Mapping[str, float]) -> str:
    data = recipe["data"]
    return CARD.format(
        base=recipe["base"],
        method=recipe["method"],
        steps=recipe["steps"],
        batch=recipe["batch_size"] * recipe["gradient_accumulation"],
        data=data["path"],
        rows=data["rows"],
        digest=data["digest"],
        **metrics,
    )
