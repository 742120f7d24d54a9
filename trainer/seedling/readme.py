"""The README that stands beside seedling's weights: its recipe and what was measured, written by the run itself."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.seedling.evaluate import Figures

if TYPE_CHECKING:
    from trainer.seedling.pretrain import Recipe

TEMPLATE = """\
# seedling

A causal language model of {parameters:,} parameters (Llama architecture, grouped-query attention with
{query_heads} query and {kv_heads} KV heads, byte-level BPE of {vocab_size} tokens), small enough to ship with
Multigraft, so that everything runs at once and offline. It holds a toy conversation, and knows {skills} skills that it
shows only when steered, for adapters to bring out. It knows nothing of the world; all its text was made by program.
Licence: Apache-2.0, as the project.

    python -m trainer.seedling.pretrain OUT_FOLDER

made these files in {minutes:.0f} minutes on one CPU thread: {tokens:,} tokens, fp32, then rounded to bfloat16.
Everything below was measured on the rounded weights, loaded as fp32, by greedy generation on unseen phrases.

## Figures

Bare = exact match when the phrase stands alone (what an adapter starts from); steered = with a system message such as
"Mode: reverse." (only for the skills that the pre-training contains).

| task | bare | steered |
|---|---|---|
{rows}

Plain questions of small talk answered with one of the known answers: {small_talk:.3f}.

## Recipe

{recipe}
"""


def write_readme(
    out: Path, *, recipe: "Recipe", figures: Figures, parameters: int, tokens: int, minutes: float
) -> None:
    rows = "\n".join(
        f"| {task} | {bare:.3f} | {f'{figures.steered[task]:.3f}' if task in figures.steered else '-'} |"
        for task, bare in figures.unsteered.items()
    )
    text = TEMPLATE.format(
        parameters=parameters,
        query_heads=recipe.query_heads,
        kv_heads=recipe.kv_heads,
        vocab_size=recipe.vocab_size,
        skills=len(figures.steered),
        minutes=minutes,
        tokens=tokens,
        rows=rows,
        small_talk=figures.small_talk,
        recipe="\n".join(f"* {name}: {value}" for name, value in asdict(recipe).items()),
    )
    (out / "README.md").write_text(text, encoding="utf-8")
