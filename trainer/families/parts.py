"""Methods that train some of the base's own parameters: its biases, its norms, rows of its vocabulary."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any, Final

from pydantic import Field

from trainer.anatomy import Anatomy, names, short_name
from trainer.families.edits import GENERAL, module_tuner
from trainer.method import Method, Options, Plan


class BitfitOptions(Options):
    targets: tuple[str, ...] | None = Field(
        None, min_length=1, description="linear modules and norms; default: all that have a bias"
    )


class LnTuningOptions(Options):
    targets: tuple[str, ...] | None = Field(None, min_length=1, description="norms to train; default: all")


class TrainableTokensOptions(Options):
    tokens: tuple[int | str, ...] = Field(
        min_length=1, description="tokens whose rows are trained: ids, or texts, of which every token counts"
    )


def bitfit_config(options: BitfitOptions, anatomy: Anatomy) -> dict[str, Any]:
    targets = None if options.targets is None else sorted(options.targets)
    return {**GENERAL, "peft_type": "BITFIT", "target_modules": targets}


def bitfit_problems(options: BitfitOptions, anatomy: Anatomy, plan: Plan) -> list[str]:
    if not anatomy.biased:
        return [f"{anatomy.architecture} has no biases here: try beft, which gives its linear modules some"]
    return strangers(options.targets or (), anatomy.biased, what="bias")


def ln_tuning_config(options: LnTuningOptions, anatomy: Anatomy) -> Any:
    from peft import LNTuningConfig

    targets = options.targets or {short_name(name) for name in anatomy.norms}
    return LNTuningConfig(task_type="CAUSAL_LM", target_modules=sorted(targets))


def ln_tuning_problems(options: LnTuningOptions, anatomy: Anatomy, plan: Plan) -> list[str]:
    if not anatomy.norms:
        return [f"{anatomy.architecture} has no norm with a weight"]
    return strangers(options.targets or (), anatomy.norms, what="norm")


def trainable_tokens_config(options: TrainableTokensOptions, anatomy: Anatomy) -> Any:
    from peft import TrainableTokensConfig

    return TrainableTokensConfig(
        task_type="CAUSAL_LM",
        token_indices=token_ids(options.tokens, anatomy),
        target_modules=[short_name(anatomy.embedding)],
    )


def trainable_tokens_problems(options: TrainableTokensOptions, anatomy: Anatomy, plan: Plan) -> list[str]:
    return token_problems(options.tokens, anatomy)


def token_ids(tokens: Iterable[int | str], anatomy: Anatomy) -> list[int]:
    """Each once, in the order of the vocabulary."""
    found: set[int] = set()
    for token in tokens:
        found |= {token} if isinstance(token, int) else {*anatomy.plain_tokens(token)}
    return sorted(found)


def token_problems(tokens: Iterable[int | str], anatomy: Anatomy) -> list[str]:
    problems = []
    for token in tokens:
        if isinstance(token, int) and not 0 <= token < anatomy.vocabulary:
            problems.append(f"token {token} is not in the base's vocabulary, which has {anatomy.vocabulary}, from 0 on")
        if isinstance(token, str) and not anatomy.plain_tokens(token):
            problems.append(f"the text {token!r} has no tokens")
    return problems


def strangers(targets: Iterable[str], known: Iterable[str], *, what: str) -> list[str]:
    short = sorted({short_name(name) for name in known})
    problems = []
    for target in targets:
        if not any(names(target, name) for name in known):
            near = get_close_matches(target, short, n=1)
            hint = f" (nearest: {near[0]})" if near else ""
            problems.append(f"target {target} has no {what} in the base{hint}; these have: {', '.join(short)}")
    return problems


PARTS: Final = (
    Method(
        "bitfit",
        "trains the biases that the base has, of linear modules and norms, and nothing else; steers",
        BitfitOptions, 5e-3, bitfit_config, bitfit_problems, module_tuner,
    ),
    Method(
        "ln-tuning",
        "trains the weights and biases of the norms and nothing else; steers, in very few numbers",
        LnTuningOptions, 1e-2, ln_tuning_config, ln_tuning_problems,
    ),
    Method(
        "trainable-tokens",
        "trains the rows of some tokens of the vocabulary; gives tokens of your own a meaning",
        TrainableTokensOptions, 1e-2, trainable_tokens_config, trainable_tokens_problems,
    ),
)  # fmt: skip
