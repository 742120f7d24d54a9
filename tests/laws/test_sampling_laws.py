"""Every sampler against its distribution, and each draw against its neighbours."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.sample import Draw, adjust, distribution, draw_tokens, invert, score, uniform
from server.records import Sampling

VOCABULARY = 12
SETTINGS = settings(max_examples=80, deadline=None)

samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_p=st.sampled_from([1.0, 0.9, 0.4, 0.0]),
    top_k=st.sampled_from([0, 1, 3, 100]),
    min_p=st.sampled_from([0.0, 0.1, 0.9]),
    presence_penalty=st.sampled_from([0.0, 1.5]),
    frequency_penalty=st.sampled_from([0.0, -0.5]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    logit_bias=st.sampled_from([(), ((3, 2.0), (4, -100.0))]),
    seed=st.integers(-(2**63), 2**64),
)


def logits_of(seed: int, rows: int) -> torch.Tensor:
    return 2 * torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 2**31), st.lists(samplings, min_size=1, max_size=6))
@SETTINGS
def test_a_draw_does_not_depend_on_the_batch(seed: int, settings_: list[Sampling]) -> None:
    logits = logits_of(seed, len(settings_))
    draws = [Draw(s, [1, 2, 2, row % VOCABULARY], 2) for row, s in enumerate(settings_)]
    together = draw_tokens(logits, draws)
    alone = [draw_tokens(logits[row : row + 1], [draw])[0] for row, draw in enumerate(draws)]
    assert together == alone
    assert torch.equal(logits, logits_of(seed, len(settings_))), "the logits were changed"


@given(st.integers(0, 2**31), samplings)
@SETTINGS
def test_a_token_of_probability_zero_is_never_drawn(seed: int, sampling: Sampling) -> None:
    sampling = Sampling(**{**_fields(sampling), "temperature": max(sampling.temperature, 0.3)})
    probs = distribution(logits_of(seed, 1), [sampling])
    assert math.isclose(float(probs.sum()), 1.0, rel_tol=1e-9)
    points = torch.tensor([0.0, 0.25, 0.5, 0.75, 1 - 2**-53], dtype=torch.float64)
    for token in invert(probs.expand(len(points), -1), points):
        assert probs[0, token] > 0


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7),
        Sampling(temperature=1.0, top_k=4),
        Sampling(temperature=1.3, top_p=0.7),
        Sampling(temperature=1.0, min_p=0.2),
        Sampling(temperature=0.9, top_k=6, top_p=0.8, min_p=0.05),
    ],
)
def test_frequencies_fit_the_reference_distribution(sampling: Sampling) -> None:
    """Chi-squared against a plain reimplementation; 20,000 draws with as many seeds."""
    logits = logits_of(7, 1)
    expected = _reference(logits[0].double().numpy(), sampling)
    draws = 20_000
    points = torch.tensor([uniform(seed, 5) for seed in range(draws)], dtype=torch.float64)
    tokens = invert(distribution(logits, [sampling]).expand(draws, -1), points)
    counts = np.bincount(tokens, minlength=VOCABULARY)
    assert not counts[expected == 0].any()
    kept = expected > 0
    statistic = float((((counts - draws * expected) ** 2)[kept] / (draws * expected)[kept]).sum())
    # 99.99 % quantile of chi-squared with 11 degrees of freedom is 37.4; the seeds are fixed.
    assert statistic < 37.4


def test_the_uniform_numbers_depend_on_seed_and_index_alone() -> None:
    assert uniform(1, 2) == uniform(1, 2)
    assert len({uniform(seed, index) for seed in range(20) for index in range(20)}) == 400


def test_penalties_are_those_of_the_field() -> None:
    logits = torch.tensor([1.0, -1.0, 2.0, 0.5])
    adjust(logits, Draw(Sampling(repetition_penalty=2.0), [0, 1], 2))
    assert logits.tolist() == [0.5, -2.0, 2.0, 0.5]
    logits = torch.zeros(4)
    adjust(logits, Draw(Sampling(presence_penalty=1.0, frequency_penalty=0.25), [3, 3, 1, 1, 2], 2))
    assert logits.tolist() == [0.0, -1.5, -1.25, 0.0]


def test_scores_are_log_probabilities_with_the_best_first() -> None:
    logits = logits_of(3, 2)
    first, second = score(logits, [4, 0], 3)
    expected = logits.log_softmax(-1)
    assert first.logprob == pytest.approx(expected[0, 4].item())
    best, value = second.top[0]
    assert best == int(logits[1].argmax())
    assert value == pytest.approx(expected[1].max().item())
    assert [value for _, value in second.top] == sorted((value for _, value in second.top), reverse=True)


def _fields(sampling: Sampling) -> dict[str, Any]:
    return {name: getattr(sampling, name) for name in Sampling.__dataclass_fields__}


def _reference(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The same order of truncations, one token at a time."""
    exps = np.exp(logits / sampling.temperature - max(logits / sampling.temperature))
    probs = exps / exps.sum()
    order = sorted(range(VOCABULARY), key=lambda token: -probs[token])[: sampling.top_k or VOCABULARY]
    mass = sum(probs[token] for token in order)
    kept: list[int] = []
    before = 0.0
    for token in order:
        if before < sampling.top_p or not kept:
            kept.append(token)
        before += probs[token] / mass
    out = np.zeros(VOCABULARY)
    out[kept] = probs[kept]
    # min-p is relative to the likeliest token, after renormalising what is left
    out /= out.sum()
    out[out < sampling.min_p * out.max()] = 0
    result: np.ndarray = out / out.sum()
    return result
