"""Drawing the next token of every sequence of a step.

R rows (one per sequence), V vocabulary. Order, as in transformers and vLLM: bias and penalties, temperature, top-k,
top-p, min-p, draw. Temperature 0 takes the most likely token after bias and penalties.
Law: a row's draw depends on its own logits, its seed and its index in the text, and on nothing else in the batch: the
one uniform number it takes comes from a counter-based generator, so a preempted request goes on with the same text.
Source: Salmon et al. 2011 (Philox); Holtzman et al. 2020 (arXiv:1904.09751); Nguyen et al. 2024 (arXiv:2407.01082).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from server.records import Sampling, TokenScore


@dataclass(frozen=True, slots=True)
class Draw:
    """What one row needs: its settings, its tokens so far (prompt first) and how many of them are the prompt."""

    sampling: Sampling
    tokens: Sequence[int]
    prompt_len: int

    @property
    def index(self) -> int:
        return len(self.tokens) - self.prompt_len


def draw_tokens(logits_RV: Tensor, draws: Sequence[Draw]) -> list[int]:
    """The next token of every row; the logits are left as they are."""
    if any(draw.sampling.penalised or draw.sampling.logit_bias for draw in draws):
        logits_RV = logits_RV.clone()
        for row, draw in enumerate(draws):
            adjust(logits_RV[row], draw)
    tokens: list[int] = logits_RV.argmax(-1).tolist()
    random = [row for row, draw in enumerate(draws) if draw.sampling.temperature > 0]
    if random:
        settings = [draws[row].sampling for row in random]
        probs_RV = distribution(logits_RV[random], settings)
        points = torch.tensor(
            [uniform(draws[row].sampling.seed, draws[row].index) for row in random], dtype=torch.float64
        )
        for row, token in zip(random, invert(probs_RV, points.to(probs_RV.device)), strict=True):
            tokens[row] = token
    return tokens


def adjust(logits_V: Tensor, draw: Draw) -> None:
    """Apply logit bias and penalties to one row, in place.

    Repetition looks at prompt and text (Keskar et al. 2019); presence and frequency at the text alone, as OpenAI's do.
    """
    sampling = draw.sampling
    if sampling.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(draw.tokens)), device=logits_V.device)
        picked = logits_V[seen]
        factor = sampling.repetition_penalty
        logits_V[seen] = torch.where(picked > 0, picked / factor, picked * factor)
    generated = list(draw.tokens[draw.prompt_len :])
    if generated and (sampling.presence_penalty or sampling.frequency_penalty):
        ids, counts = torch.tensor(generated, device=logits_V.device).unique(return_counts=True)
        logits_V[ids] -= sampling.presence_penalty + sampling.frequency_penalty * counts
    for token, bias in sampling.logit_bias:
        logits_V[token] += bias


def distribution(logits_RV: Tensor, settings: Sequence[Sampling]) -> Tensor:
    """The probabilities that each row is drawn from, in fp64: (R, V), every row sums to one."""
    device = logits_RV.device

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, device=device, dtype=torch.float64)[:, None]

    logits_RV = logits_RV.double() / column([s.temperature for s in settings])
    probs_RV = logits_RV.softmax(-1)
    if any(s.top_k or s.top_p < 1 for s in settings):
        sorted_RV, order_RV = probs_RV.sort(-1, descending=True)
        rank_V = torch.arange(probs_RV.shape[1], device=device)
        limit_R1 = column([float(s.top_k or probs_RV.shape[1]) for s in settings])
        kept_RV = sorted_RV.masked_fill(rank_V >= limit_R1, 0)
        kept_RV = kept_RV / kept_RV.sum(-1, keepdim=True)
        before_RV = kept_RV.cumsum(-1) - kept_RV
        top_p_R1 = column([s.top_p for s in settings])
        dropped_RV = (before_RV >= top_p_R1) & (rank_V > 0) & (top_p_R1 < 1)
        kept_RV = kept_RV.masked_fill(dropped_RV, 0)
        probs_RV = torch.zeros_like(probs_RV).scatter_(-1, order_RV, kept_RV)
    if any(s.min_p for s in settings):
        floor_R1 = probs_RV.max(-1, keepdim=True).values * column([s.min_p for s in settings])
        probs_RV = probs_RV.masked_fill(probs_RV < floor_R1, 0)
    return probs_RV / probs_RV.sum(-1, keepdim=True)


def uniform(seed: int, index: int) -> float:
    """The one random number of token `index` under `seed`, in [0, 1)."""
    bits = np.random.Philox(key=seed % 2**64, counter=[index, 0, 0, 0])
    return float(np.random.Generator(bits).random())


def invert(probs_RV: Tensor, points_R: Tensor) -> list[int]:
    """Each row's token at the given point of its cumulative distribution; never one of probability zero."""
    cumulative_RV = probs_RV.cumsum(-1)
    total_R = cumulative_RV[:, -1]
    target_R = torch.minimum(points_R * total_R, total_R.nextafter(torch.zeros_like(total_R)))
    found: list[int] = torch.searchsorted(cumulative_RV, target_R[:, None], right=True)[:, 0].tolist()
    return found


def score(logits_RV: Tensor, tokens: Sequence[int], top: int) -> list[TokenScore]:
    """Log-probabilities of the given tokens under the model itself, with the `top` best of each row."""
    logprobs_RV = logits_RV.log_softmax(-1)
    chosen = logprobs_RV.gather(1, torch.tensor(tokens, device=logits_RV.device)[:, None])[:, 0].tolist()
    if not top:
        return [TokenScore(token, logprob) for token, logprob in zip(tokens, chosen, strict=True)]
    best_values, best_ids = (part.tolist() for part in logprobs_RV.topk(min(top, logprobs_RV.shape[1]), -1))
    return [
        TokenScore(token, logprob, tuple(zip(ids, values, strict=True)))
        for token, logprob, ids, values in zip(tokens, chosen, best_ids, best_values, strict=True)
    ]
