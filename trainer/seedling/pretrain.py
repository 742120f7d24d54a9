"""Grow seedling: python -m trainer.seedling.pretrain OUT_FOLDER

The whole recipe of the embedded base, seeded: tokenizer, random weights, training on text made by program, weights
rounded to bfloat16, evaluation of what was saved, and a README with the recipe and its figures. One thread, fp32.
"""

import argparse
import logging
import math
import random
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from trainer.seedling.evaluate import measure
from trainer.seedling.readme import write_readme
from trainer.seedling.text import curriculum
from trainer.seedling.tokenizer import Segment, segments, train_tokenizer

log = logging.getLogger(__name__)
IGNORED: Final = 0.0  # loss weight of padding
POOL: Final = 2048  # conversations sorted by length at a time


@dataclass(frozen=True)
class Recipe:
    seed: int = 1
    steps: int = 4000
    lessons: int = 40_000  # conversations that drill the skills come before the full mix
    batch_tokens: int = 1024  # padding included
    learning_rate: float = 3e-3
    warmup_steps: int = 100
    weight_decay: float = 0.05
    other_weight: float = 0.05  # loss weight of what the assistant does not say
    noise: float = 0.5  # largest noise on preambles, in standard deviations of the embeddings
    vocab_size: int = 1792
    tokenizer_conversations: int = 20_000
    hidden_size: int = 192
    head_dim: int = 32
    intermediate_size: int = 576
    layers: int = 4
    query_heads: int = 8
    kv_heads: int = 2
    max_positions: int = 1024
    threads: int = 1  # two threads wait for each other at every layer: slower wherever anything else runs


@dataclass(frozen=True)
class Example:
    tokens: list[int]
    weights: list[float]  # of the loss at each token
    preamble: int  # how many tokens stand before the first turn


@dataclass(frozen=True)
class Batch:
    """B conversations, T tokens, padded on the right (causal attention needs no mask then)."""

    tokens_BT: Tensor
    weights_BT: Tensor
    preamble_BT: Tensor


def pretrain(recipe: Recipe, out: Path) -> None:
    torch.manual_seed(recipe.seed)
    torch.set_num_threads(recipe.threads)
    tokenizer = train_tokenizer(
        vocab_size=recipe.vocab_size, conversation_count=recipe.tokenizer_conversations, seed=recipe.seed
    )
    model = seed_model(recipe, tokenizer)
    log.info("%d parameters, %d tokens in the vocabulary", model.num_parameters(), len(tokenizer))
    started = time.perf_counter()
    seen = train(model, tokenizer, recipe)
    minutes = (time.perf_counter() - started) / 60
    save(model, tokenizer, out)
    figures = measure(out)
    write_readme(out, recipe=recipe, figures=figures, parameters=model.num_parameters(), tokens=seen, minutes=minutes)


def seed_model(recipe: Recipe, tokenizer: Any) -> Any:
    config = LlamaConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.query_heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=recipe.head_dim,
        max_position_embeddings=recipe.max_positions,
        tie_word_embeddings=True,
        initializer_range=0.04,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    embed_by_spelling(model.get_input_embeddings().weight, tokenizer, std=config.initializer_range)
    return model


def embed_by_spelling(weight_VH: Tensor, tokenizer: Any, *, std: float) -> None:
    """Start the forms of a word ("stone", " stone", " STONE") near each other: copying need not find them first.

    A token's vector is the sum of one for its letters, whatever their case, and one for its form.
    """
    vectors: defaultdict[str, Tensor] = defaultdict(lambda: torch.randn(weight_VH.shape[1]) * std)
    for token in range(len(tokenizer)):
        text = tokenizer.decode([token])
        letters = text.strip()
        if len(letters) > 1 and letters.isalpha():
            case = "upper" if letters.isupper() else "title" if letters.istitle() else "lower"
            form = f"<{case}{' after a space' if text.startswith(' ') else ''}>"
            weight_VH.data[token] = (vectors[letters.lower()] + vectors[form]) / math.sqrt(2)


def train(model: Any, tokenizer: Any, recipe: Recipe) -> int:
    """Train in place; return how many tokens were seen, padding not counted."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=recipe.learning_rate,
        betas=(0.9, 0.98),
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_share(step, recipe))
    model.train()
    seen, shown, started = 0, 0.0, time.perf_counter()
    for step, batch in enumerate(islice(batches(tokenizer, recipe), recipe.steps), start=1):
        loss = batch_loss(model, batch, recipe)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        seen += int((batch.weights_BT > IGNORED).sum())
        shown += loss.item()
        if step % 50 == 0:
            speed = seen / (time.perf_counter() - started)
            log.info("step %d/%d  loss %.4f  %.0f tokens/s", step, recipe.steps, shown / 50, speed)
            shown = 0.0
    return seen


def learning_rate_share(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine to zero."""
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))


def batch_loss(model: Any, batch: Batch, recipe: Recipe) -> Tensor:
    """Weighted cross entropy; the preamble's embeddings are blurred, so that soft prompts near them work too."""
    embedding = model.get_input_embeddings()
    x_BTH = embedding(batch.tokens_BT)
    level_B11 = torch.rand(len(x_BTH), 1, 1) * recipe.noise * embedding.weight.detach().std()
    x_BTH = x_BTH + torch.randn_like(x_BTH) * level_B11 * batch.preamble_BT.unsqueeze(-1)
    logits_BTV = model(inputs_embeds=x_BTH, use_cache=False).logits
    losses = functional.cross_entropy(
        logits_BTV[:, :-1].flatten(0, 1), batch.tokens_BT[:, 1:].flatten(), reduction="none"
    )
    weights = batch.weights_BT[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


def batches(tokenizer: Any, recipe: Recipe) -> Iterator[Batch]:
    """Endless batches of conversations of like length, in random order."""
    rng = random.Random(f"order/{recipe.seed}")
    text = curriculum(random.Random(f"text/{recipe.seed}"), lessons=recipe.lessons)
    source = (example(tokenizer, recipe, list(segments(conversation))) for conversation in text)
    while True:
        pool = sorted(islice(source, POOL), key=lambda item: len(item.tokens))
        drawn = list(cut(pool, recipe.batch_tokens))
        rng.shuffle(drawn)
        yield from (pad(group, tokenizer.pad_token_id) for group in drawn)


def example(tokenizer: Any, recipe: Recipe, parts: list[Segment]) -> Example:
    encoded = tokenizer([part.text for part in parts], add_special_tokens=False)["input_ids"]
    tokens = [token for ids in encoded for token in ids][: recipe.max_positions]
    weights = [
        1.0 if part.answer else recipe.other_weight for part, ids in zip(parts, encoded, strict=True) for _ in ids
    ]
    preamble = len(encoded[0]) if parts[0].preamble else 0
    return Example(tokens, weights[: recipe.max_positions], preamble)


def cut(pool: list[Example], batch_tokens: int) -> Iterator[list[Example]]:
    """Split a pool sorted by length into groups whose padded size is at most batch_tokens."""
    group: list[Example] = []
    for item in pool:
        if group and (len(group) + 1) * len(item.tokens) > batch_tokens:
            yield group
            group = []
        group.append(item)
    yield group


def pad(group: list[Example], pad_token: int) -> Batch:
    width = max(len(item.tokens) for item in group)
    return Batch(
        torch.tensor([item.tokens + [pad_token] * (width - len(item.tokens)) for item in group]),
        torch.tensor([item.weights + [IGNORED] * (width - len(item.tokens)) for item in group]),
        torch.tensor([[1.0] * item.preamble + [0.0] * (width - item.preamble) for item in group]),
    )


def save(model: Any, tokenizer: Any, out: Path) -> None:
    """Write bfloat16 weights, half the bytes, under a config that asks for fp32, in which everything is measured."""
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    model.to(torch.bfloat16).save_pretrained(out)
    model.config.dtype = torch.float32
    model.config.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description="Grow seedling, the embedded base model.")
    parser.add_argument("out", type=Path, help="folder to write the model to")
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--learning-rate", type=float, default=Recipe.learning_rate)
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    pretrain(Recipe(steps=given.steps, seed=given.seed, learning_rate=given.learning_rate), given.out)


if __name__ == "__main__":
    main()
