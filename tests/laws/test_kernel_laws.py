"""The fast paths of a CPU against their plain loops: the gathered low-rank product, decodes that read the cache where
it is, and the base's packed products.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from server.kernels import native, pages
from server.kernels.changes import Change, Changes, ChangeTable, SiteChange, tabulate_changes
from server.kernels.gathered import Gathered, Row, Runs, Term, tabulate
from server.kernels.products import HALF_STEP, Half, Ordered, Panels, Plain, Tiled, fastest, fits_half
from server.kernels.quantized import BYTE, Int8Panels, round_rows
from server.model.attention import AttentionPlan, decode_gathered, decode_in_place
from server.model.kv import KvCache
from server.primitives import bias, gain, rotate, scale
from server.primitives.bias import Bias
from server.primitives.gain import Gain
from server.primitives.gates import Gates
from server.primitives.lowrank import LowRank, apply_loop
from server.primitives.prefix import LayerShape
from server.primitives.rotate import Rotate
from server.primitives.scale import Scale

CLOSE = 1e-4  # fp32, sums of up to a hundred products in another order
CLOSE_BF16 = 2e-2  # one rounding of a result of size one to bf16, and one of a difference
STORED = (torch.float32, torch.bfloat16, torch.float16)

built = pytest.mark.skipif(native.LIBRARY is None, reason="no C compiler was at hand when this was installed")


def test_the_native_kernels_were_built_wherever_there_is_a_compiler() -> None:
    assert native.LIBRARY is not None or shutil.which("cc") is None


def low_rank(generator: torch.Generator, rank: int, inputs: int, outputs: int, stored: torch.dtype) -> LowRank:
    A_RI = torch.randn(rank, inputs, generator=generator).to(stored)
    B_RO = torch.randn(rank, outputs, generator=generator).to(stored)
    return LowRank(A_RI, B_RO.t(), 0.25)


@contextmanager
def threads_of(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@built
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    inputs=st.sampled_from([5, 16, 37, 96]),
    outputs=st.lists(st.sampled_from([1, 7, 16, 130, 1100]), min_size=1, max_size=3),
    ranks=st.lists(st.sampled_from([1, 2, 4, 8, 13, 64]), min_size=1, max_size=4),
    counts=st.lists(st.integers(0, 27), min_size=1, max_size=5),
    activations=st.sampled_from([torch.float32, torch.bfloat16]),
    threads=st.sampled_from([1, 2, 3]),
)
def test_the_gathered_product_is_the_plain_loop(
    seed: int,
    inputs: int,
    outputs: list[int],
    ranks: list[int],
    counts: list[int],
    activations: torch.dtype,
    threads: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    lows = [
        [low_rank(generator, rank, inputs, wide, STORED[(column + place) % 3]) for place, wide in enumerate(outputs)]
        for column, rank in enumerate(ranks)
    ]
    # Every second adapter has nothing at the last Linear, and the first group is empty for all.
    rows: list[Row | None] = [
        tabulate([[], [_term(low, place) for place, low in enumerate(own[: len(own) - column % 2])]])
        for column, own in enumerate(lows)
    ]
    gates = torch.randint(-2, 3, (len(counts), len(ranks)), generator=generator) / 2
    runs = Runs([(n, [(k, float(g)) for k, g in enumerate(row)]) for n, row in zip(counts, gates, strict=True)])
    tokens = sum(counts)
    x = torch.randn(tokens, inputs, generator=generator).to(activations)
    wide = torch.randn(tokens, sum(outputs), generator=generator).to(activations)
    ys = wide.split(outputs, 1)
    expected = [
        apply_loop(
            y.double(),
            x.double(),
            gates.double().repeat_interleave(torch.tensor(counts), 0),
            [(column, own[place]) for column, own in enumerate(lows) if place < len(own) - column % 2],
        )
        for place, y in enumerate(ys)
    ]
    gathered = Gathered(rows)
    assert not gathered.acts(0) and not gathered.acts(2)
    with threads_of(threads):
        gathered.add(1, x, wide, [sum(outputs[:place]) for place in range(len(outputs))], runs)
    for y, wanted in zip(ys, expected, strict=True):
        close = CLOSE if activations == torch.float32 else CLOSE_BF16
        torch.testing.assert_close(y.double(), wanted, rtol=close, atol=close * inputs)


@built
def test_tokens_without_a_gate_and_beside_an_overflow_are_the_same_to_the_bit() -> None:
    generator = torch.Generator().manual_seed(1)
    bad, good = (low_rank(generator, 4, 32, 48, torch.float32) for _ in range(2))
    bad.A_RI.fill_(3e38)
    gathered = Gathered([tabulate([[_term(bad, 0)]]), tabulate([[_term(good, 0)]])])
    x, y = torch.randn(5, 32, generator=generator), torch.randn(5, 48, generator=generator)
    alone, beside = y.clone(), y.clone()
    gathered.add(0, x, alone, [0], Runs([(4, []), (1, [(1, 0.5)])]))
    gathered.add(
        0, x, beside, [0], Runs([(1, []), (1, [(0, 1.0)]), (1, [(0, 0.0)]), (1, []), (1, [(1, 0.5), (0, 0.0)])])
    )
    assert not beside[1].isfinite().all()
    for token in (0, 2, 3, 4):
        assert torch.equal(beside[token], alone[token])
    assert torch.equal(alone[:4], y[:4]) and not torch.equal(alone[4], y[4])


@built
def test_runs_of_some_tokens_are_their_own_rows() -> None:
    runs = Runs([(2, [(0, 1.0)]), (0, [(1, 9.0)]), (3, [(1, 2.0), (0, 3.0)])]).at([4, 0])
    assert runs.tokens == 2
    carried = [
        [(int(pair["column"]), float(pair["gate"])) for pair in runs.pairs[run["first_pair"] :][: run["pairs"]]]
        for run in runs.runs
    ]
    assert carried == [[(1, 2.0), (0, 3.0)], [(0, 1.0)]]


@built
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=5),
    kv_heads=st.sampled_from([1, 2, 3]),
    group=st.sampled_from([1, 2, 5, 7, 8]),
    dim=st.sampled_from([16, 48, 128]),
    window=st.sampled_from([None, 1, 9, 200]),
    softcap=st.sampled_from([None, 3.0]),
    sinks=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_decodes_in_place_are_what_they_are_over_a_copy(
    seed: int,
    lengths: list[int],
    kv_heads: int,
    group: int,
    dim: int,
    window: int | None,
    softcap: float | None,
    sinks: bool,
    dtype: torch.dtype,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    size = 8
    width = -(-max(lengths) // size)
    cache = KvCache(
        [LayerShape(kv_heads, dim)], blocks=width * len(lengths), block_size=size, dtype=dtype,
        device=torch.device("cpu"),
    )  # fmt: skip
    for store in (cache.keys[0], cache.values[0]):
        store.copy_(torch.randn(store.shape, generator=generator))
    blocks = torch.randperm(cache.blocks, generator=generator).view(len(lengths), width)
    plan = AttentionPlan(cache, torch.empty(0), torch.tensor(lengths), blocks, [])
    heads = kv_heads * group
    query = torch.randn(len(lengths), heads, dim, generator=generator).to(dtype).transpose(0, 1)
    learned = torch.randn(heads, generator=generator).to(dtype) if sinks else None
    asked = (plan, 0, window, dim**-0.5, softcap, learned)
    close = CLOSE if dtype == torch.float32 else CLOSE_BF16
    torch.testing.assert_close(decode_in_place(query, *asked), decode_gathered(query, *asked), rtol=close, atol=close)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    tokens=st.sampled_from([1, 2, 16, 33]),
    inputs=st.sampled_from([16, 33, 96]),
    outputs=st.sampled_from([8, 40, 129]),
)
def test_the_packed_products_are_the_plain_one(seed: int, tokens: int, inputs: int, outputs: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, tokens, inputs, generator=generator)
    weight = torch.randn(outputs, inputs, generator=generator).bfloat16().float()
    packed = fastest(weight, torch.float32, torch.bfloat16)
    torch.testing.assert_close(packed(x), F.linear(x, weight), rtol=CLOSE, atol=CLOSE)
    assert (packed.weight() - weight).abs().max() <= HALF_STEP
    ordered = Ordered(weight)
    torch.testing.assert_close(ordered(x), F.linear(x, weight), rtol=CLOSE, atol=CLOSE)
    assert torch.equal(ordered.weight(), weight)
    if fits_half(weight):
        half = Half(weight)
        torch.testing.assert_close(half(x), F.linear(x, weight), rtol=CLOSE, atol=CLOSE)
        assert (half.weight() - weight).abs().max() <= HALF_STEP


@built
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(1, 40),
    inputs=st.sampled_from([1, 33, 256, 257, 1024, 1025, 1100]),
    outputs=st.sampled_from([1, 16, 40, 129]),
    threads=st.sampled_from([1, 2]),
    in_bytes=st.booleans(),
)
def test_panels_are_the_plain_product_and_tokens_do_not_meet(
    seed: int, tokens: int, inputs: int, outputs: int, threads: int, in_bytes: bool
) -> None:
    """Inputs around DEPTH and WIDE_DEPTH, whole panels and a last one that is not, rows that lie apart."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, inputs + 3, generator=generator)[:, 2:-1]
    weight = torch.randn(outputs, inputs, generator=generator).bfloat16()
    rows = round_rows(weight, BYTE)
    if in_bytes:
        weight = rows.weight()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        panels = Int8Panels(rows) if in_bytes else Panels(weight)
        made = panels(x)
        alone = torch.cat([panels(row) for row in x.split(1)])
        plain = F.linear(x.double(), weight.double()).float()
        x[0] = torch.inf
        beside = panels(x)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(panels.weight(), weight.float())
    torch.testing.assert_close(made, plain, rtol=CLOSE, atol=CLOSE * inputs**0.5)
    assert torch.equal(made, alone)
    assert torch.equal(beside[1:], alone[1:])


def test_a_weight_stays_as_it_is_where_16_bits_would_change_it() -> None:
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    half = Half if "fbgemm" in torch.backends.quantized.supported_engines else Plain
    wide = Panels if native.has_panels() else half
    assert type(fastest(weight, torch.float32, torch.bfloat16)) is wide
    assert type(fastest(weight.half().float(), torch.float32, torch.float16)) is half
    assert type(fastest(weight, torch.float32, torch.float32)) is Plain
    for large in (1e6, 1 + 2.0**-12, float("inf"), float("nan")):
        changed = weight.clone()
        changed[3, 3] = large
        assert type(fastest(changed, torch.float32, torch.float16)) is Plain, large
    for number, kind in (
        (2.0**100, Panels if native.has_panels() else Plain),
        (1 + 2.0**-7, wide),
        (1 + 2.0**-12, Plain),
    ):
        changed = weight.clone()
        changed[3, 3] = number
        assert type(fastest(changed, torch.float32, torch.bfloat16)) is kind, number


def _term(low: LowRank, place: int) -> Term:
    B_RO: Tensor = low.B_OR.t()
    return Term(low.A_RI, B_RO, low.scaling, place)


@built
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    tokens=st.sampled_from([1, 3, 40]),
    features=st.sampled_from([1, 7, 16, 33, 4864]),
    offset=st.sampled_from([0.0, 1.0]),
    size=st.sampled_from([1e-3, 1.0, 50.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_norms_and_gated_units_in_one_pass_are_torchs(
    seed: int, tokens: int, features: int, offset: float, size: float, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    wide = (torch.randn(1, tokens, 2 * features, generator=generator) * size).to(dtype)
    x, other = wide.split(features, 2)
    weight = torch.randn(features, generator=generator).to(dtype)
    close = CLOSE if dtype == torch.float32 else CLOSE_BF16
    normed = native.rms_norm(x, weight, offset=offset, eps=1e-6)
    expected = F.rms_norm(x.double(), (features,), weight.double() + offset, 1e-6)
    torch.testing.assert_close(normed.double(), expected, rtol=close, atol=close)
    gated = native.swiglu(x[0], other[0])
    torch.testing.assert_close(gated.double(), F.silu(x[0].double()) * other[0].double(), rtol=close, atol=close)


@built
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    tokens=st.sampled_from([1, 3, 40]),
    features=st.sampled_from([1, 7, 16, 33, 4864]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_a_sum_and_its_norm_in_one_pass_are_one_after_the_other(
    seed: int, tokens: int, features: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, tokens, features, generator=generator).to(dtype)
    weight = torch.randn(features, generator=generator).to(dtype)
    total = x + y
    normed = native.add_and_norm(x, y, weight, offset=1.0, eps=1e-6)
    assert torch.equal(y, total)
    assert torch.equal(normed, native.rms_norm(total, weight, offset=1.0, eps=1e-6))


@built
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    tokens=st.sampled_from([0, 1, 3, 40]),
    features=st.sampled_from([1, 7, 16, 33, 4864]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_rows_in_bytes_are_those_of_plain_operations(seed: int, tokens: int, features: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(tokens, 2 * features, generator=generator) * 10).to(dtype)[:, :features]
    codes, scales = native.round_rows(x, least=1e-30)
    wanted = (x.float().abs().amax(1) / 127).clamp(min=1e-30)
    assert torch.equal(scales, wanted)
    assert torch.equal(codes.int() - 128, (x.float() / wanted[:, None]).round().int())
    y = torch.randn(tokens, features, generator=generator)
    expected = (y * scales[:, None]).to(dtype)
    assert torch.equal(native.scale_rows(y, scales, dtype), expected)


@built
def test_a_row_of_zeros_or_of_what_is_no_number_keeps_to_itself_in_bytes() -> None:
    x = torch.zeros(4, 20)
    x[1, 3], x[2, 17] = torch.nan, -torch.inf
    codes, scales = native.round_rows(x, least=1e-30)
    assert (codes[[0, 3]] == 128).all() and (scales[[0, 3]] == torch.tensor(1e-30)).all()
    assert scales[1].isnan() and scales[2] == torch.inf


def some_turn(rng: torch.Generator, features: int, kind: int, dtype: torch.dtype) -> Rotate:
    """Blocks of all features, of some dozen, of a few, or pairs half of everything apart."""
    size, stride = ((features, 1), (features // 4, 1), (2, 1), (2, features // 2))[kind]
    return Rotate(torch.randn(features // size, size, size, generator=rng).to(dtype), stride)


@built
@settings(deadline=None, max_examples=100)
@given(
    seed=st.integers(0, 2**16),
    counts=st.lists(st.integers(0, 7), min_size=1, max_size=4),
    features=st.sampled_from([8, 20, 64, 132]),
    kinds=st.lists(st.integers(0, 15), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_what_adapters_change_where_it_is_is_the_plain_loop(
    seed: int, counts: list[int], features: int, kinds: list[int], dtype: torch.dtype
) -> None:
    """Scales, biases and rotations of every second column, in columns of a wider tensor."""
    rng = torch.Generator().manual_seed(seed)
    tokens = sum(counts)
    whole = torch.randn(tokens, features + 5, generator=rng).to(dtype)
    before, columns = whole.clone(), slice(2, 2 + features)
    places = range(1, 2 * len(kinds), 2)
    scales = {
        k: torch.randn(features, generator=rng).to(dtype) for k, kind in zip(places, kinds, strict=True) if kind & 4
    }
    biases = {
        k: torch.randn(features, generator=rng).to(dtype) for k, kind in zip(places, kinds, strict=True) if kind & 8
    }
    turns = {k: some_turn(rng, features, kind & 3, dtype) for k, kind in zip(places, kinds, strict=True) if k % 4 == 1}
    tables: list[ChangeTable | None] = [None] * (2 * len(kinds))
    for k in places:
        turn = turns.get(k, Rotate(torch.zeros(0, 1, 1)))
        blocks_BSS = turn.excess_BSS.transpose(1, 2).contiguous() if k in turns else None
        change = Change(scales.get(k), biases.get(k), blocks_BSS, turn.stride)
        tables[k] = tabulate_changes({1: SiteChange(behind=change)}, 2)
    rows = torch.randint(-2, 3, (len(counts), 2 * len(kinds)), generator=rng) / 4
    rows[0] = 0
    carried = [[(k, gate) for k, gate in enumerate(row) if gate] for row in rows.tolist()]
    runs = Runs(list(zip(counts, carried, strict=True)))
    changes = Changes(tables)
    changes.change_output(0, whole[:, columns], runs.places)
    changes.change_input(1, whole[:, columns], runs.places)
    assert torch.equal(whole, before) and not changes.columns_before(1)
    changes.change_output(1, whole[:, columns], runs.places)
    gates_TK = rows.repeat_interleave(torch.tensor(counts), 0)
    x_TF = before[:, columns].float()
    expected = scale.apply_loop(x_TF, gates_TK, [(k, Scale(one.float())) for k, one in scales.items()])
    wide = [(k, Rotate(one.excess_BSS.float(), one.stride)) for k, one in turns.items()]
    expected = rotate.apply_loop(expected, x_TF, gates_TK, wide)
    expected = bias.apply_loop(expected, gates_TK, [(k, Bias(one.float())) for k, one in biases.items()])
    close = CLOSE if dtype == torch.float32 else CLOSE_BF16
    torch.testing.assert_close(whole[:, columns], expected.to(dtype), atol=close, rtol=close)
    bare = ~gates_TK[:, 1::2].any(1)
    assert torch.equal(whole[bare], before[bare])
    assert torch.equal(whole[:, :2], before[:, :2])
    assert torch.equal(whole[:, columns.stop :], before[:, columns.stop :])


@built
def test_several_threads_change_what_one_changes() -> None:
    rng = torch.Generator().manual_seed(0)
    features = 4096
    each = Change(torch.randn(features, generator=rng)), Change(blocks_BSS=torch.randn(64, 64, 64, generator=rng))
    changes = Changes([tabulate_changes({0: SiteChange(before=one)}, 1) for one in each])
    assert changes.columns_before(0) == (0, 1)
    y = torch.randn(30, features, generator=rng)
    runs = Runs([(3, [(0, 1.0)]), (2, []), (20, [(1, 0.5)]), (5, [(0, 0.5), (1, -1.0)])])
    one, other = y.clone(), y.clone()
    with threads_of(1):
        changes.change_input(0, one, runs.places)
    with threads_of(3):
        changes.change_input(0, other, runs.places)
    assert torch.equal(one, other)
    assert torch.equal(one[3:5], y[3:5]) and not (one == y).all(1)[5:].any()


@built
@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**16),
    tokens=st.integers(1, 9),
    features=st.sampled_from([1, 16, 37, 896]),
    adapters=st.integers(1, 4),
    offset=st.sampled_from([0.0, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_a_norm_whose_weight_adapters_change_is_the_plain_loop(
    seed: int, tokens: int, features: int, adapters: int, offset: float, dtype: torch.dtype
) -> None:
    rng = torch.Generator().manual_seed(seed)
    x_TF, weight_F = (
        torch.randn(tokens, features, generator=rng).to(dtype),
        torch.randn(features, generator=rng).to(dtype),
    )
    gains = [(2 * k, Gain(torch.randn(features, generator=rng).to(dtype))) for k in range(adapters)]
    gates_TK = torch.randint(-2, 3, (tokens, 2 * adapters), generator=rng) / 4
    gates_TK[0] = 0
    base_TF = native.rms_norm(x_TF, weight_F, offset=offset, eps=1e-6)
    made_TF = base_TF.clone()
    tables = [tabulate_changes({0: SiteChange(gain_F=one.weight_F)}, 1) for _, one in gains]
    changes = Changes([one for table in tables for one in (table, None)])
    changes.change_norm(0, x_TF, made_TF, Gates(gates_TK).runs.places, weight_F, offset, 1e-6)
    n_TF = x_TF.float() / (x_TF.float().pow(2).mean(1, keepdim=True) + 1e-6).sqrt()
    wide = [(k, Gain(one.weight_F.float())) for k, one in gains]
    expected = gain.apply_loop(n_TF * (weight_F.float() + offset), n_TF, gates_TK, wide, axis=0)
    close = CLOSE if dtype == torch.float32 else CLOSE_BF16
    torch.testing.assert_close(made_TF, expected.to(dtype), atol=close, rtol=close)
    bare = ~gates_TK[:, ::2].any(1)
    assert torch.equal(made_TF[bare], base_TF[bare])


@built
def test_numbers_become_bf16_as_torch_rounds_them() -> None:
    """Ties to even, subnormals, infinities and what is no number among them."""
    bits = torch.arange(0, 2**32, 2**32 // (1 << 20), dtype=torch.int64)
    for low in (0x0000, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        x = (bits | low).to(torch.int32).view(torch.float32).view(-1, 1024)
        made = native.scale_rows(x.clone(), torch.ones(len(x)), torch.bfloat16)
        torch.testing.assert_close(made, x.bfloat16(), rtol=0, atol=0, equal_nan=True)


@built
def test_what_is_no_number_is_none_after_a_gated_unit_and_a_norm() -> None:
    x = torch.tensor([[1.0, torch.nan, torch.inf, -torch.inf, -1e30]])
    gated = native.swiglu(x, torch.ones_like(x))[0]
    assert gated[1].isnan() and gated[2] == torch.inf and gated[4] == 0
    assert native.rms_norm(x, torch.ones(5), offset=0.0, eps=1e-6).isnan().any()


@built
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    tokens=st.sampled_from([1, 5, 70]),
    heads=st.sampled_from([1, 6]),
    kv_heads=st.sampled_from([1, 2]),
    rotated=st.sampled_from([2, 6, 16, 48]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_keys_are_rotated_on_their_way_to_the_cache(
    seed: int, tokens: int, heads: int, kv_heads: int, rotated: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    dim, rows = 48, tokens + 9
    joint = torch.randn(tokens, (heads + 2 * kv_heads) * dim, generator=generator).to(dtype)
    query, key, value = (
        part.view(tokens, -1, dim) for part in joint.split([heads * dim, kv_heads * dim, kv_heads * dim], 1)
    )
    angles = torch.rand(tokens, rotated // 2, generator=generator).repeat(1, 2) * 6
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def turned(x: Tensor) -> Tensor:
        low, high = x[..., : rotated // 2].double(), x[..., rotated // 2 : rotated].double()
        turned = x[..., :rotated].double() * cos[:, None].double() + torch.cat([-high, low], -1) * sin[:, None].double()
        return torch.cat([turned, x[..., rotated:].double()], -1)

    wanted_query, wanted_key, wanted_value = turned(query), turned(key), value.clone()
    places = torch.randperm(rows, generator=generator)[:tokens]
    keys, values = (torch.full((kv_heads, rows, dim), 7.0, dtype=dtype) for _ in range(2))
    native.rotate_and_store(query, key, value, cos, sin, places, keys, values)
    close = CLOSE if dtype == torch.float32 else CLOSE_BF16
    torch.testing.assert_close(query.double(), wanted_query, rtol=close, atol=close)
    torch.testing.assert_close(keys[:, places].transpose(0, 1).double(), wanted_key, rtol=close, atol=close)
    assert torch.equal(values[:, places].transpose(0, 1), wanted_value)
    others = torch.ones(rows, dtype=torch.bool)
    others[places] = False
    assert (keys[:, others] == 7).all() and (values[:, others] == 7).all()


@built
@given(
    seed=st.integers(0, 2**16),
    tokens=st.integers(1, 70),
    outputs=st.integers(1, 150),
    deep=st.integers(1, 5),
    wide=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_a_product_in_tiles_is_the_plain_one_and_every_token_is_for_itself(
    seed: int, tokens: int, outputs: int, deep: int, wide: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs = native.DEEP // 2 * deep
    weight = torch.randn(outputs, inputs, generator=generator).bfloat16()
    x = torch.randn(tokens, inputs + 8 * wide, generator=generator).bfloat16()[:, :inputs]
    tiled = Tiled(weight)
    made = tiled(x)
    plain = x.double() @ weight.double().t()
    assert ((made.double() - plain).abs() <= 2**-8 * plain.abs() + 1e-5 * inputs).all()
    assert torch.equal(tiled.weight(), weight.float())
    alone = torch.cat([tiled(x[t : t + 1]) for t in range(tokens)])
    assert torch.equal(made, alone), "company changes an answer"
    x = x.clone()
    x[0, 0] = float("nan")
    assert torch.equal(tiled(x)[1:], made[1:])
    assert tiled(x)[0].isnan().all()


def any_numbers(rng: torch.Generator, *shape: int) -> Tensor:
    """In bf16, of any bits."""
    return torch.randint(-(2**15), 2**15, shape, generator=rng).short().view(torch.bfloat16)


def odd_weight(rng: torch.Generator, outputs: int, inputs: int, odd: int) -> Tensor:
    """(O, I) in bf16, normally distributed, but for so many numbers of any bits."""
    weight_OI = torch.randn(outputs, inputs, generator=rng).bfloat16()
    places = torch.randperm(weight_OI.numel(), generator=rng)[:odd]
    weight_OI.view(-1)[places] = any_numbers(rng, len(places))
    return weight_OI


@built
@given(
    seed=st.integers(0, 2**16),
    tokens=st.integers(1, 100),
    outputs=st.integers(1, 150),
    deep=st.integers(1, 5),
    rare=st.floats(0, 1),
)
@settings(max_examples=60, deadline=None)
def test_a_weight_in_codes_is_the_weight_to_the_bit(
    seed: int, tokens: int, outputs: int, deep: int, rare: float
) -> None:
    """With infinities, numbers that are none, zeros of both signs and the smallest numbers among the odd ones."""
    rng = torch.Generator().manual_seed(seed)
    inputs = native.DEEP // 2 * deep
    weight = odd_weight(rng, outputs, inputs, int(rare * native.MOST_ODD * outputs * inputs / 2))
    coded = native.code(weight)
    assert coded is not None
    assert torch.equal(native.untile(coded, outputs, inputs).view(torch.int16), weight.view(torch.int16))
    x = torch.randn(tokens, inputs, generator=rng).bfloat16()
    made = native.multiply(x, coded, outputs)
    assert torch.equal(made.view(torch.int16), native.multiply(x, native.tile(weight), outputs).view(torch.int16))


@built
def test_codes_are_short_or_there_are_none() -> None:
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 512, generator=rng).bfloat16()
    coded = native.code(weight)
    assert coded is not None
    assert coded.nbytes < 0.76 * weight.nbytes
    wild = any_numbers(rng, *weight.shape)
    assert native.code(wild) is None
    tiled = Tiled(wild)
    assert torch.equal(tiled.weight().isnan(), wild.isnan())
    assert tiled.bytes == wild.nbytes
    pruned = weight * (torch.rand(weight.shape, generator=rng) < 0.5)
    assert native.code(pruned) is not None, "zeros have an exponent like others"


def test_what_pages_are_taken_of_is_apart() -> None:
    taken = [pages.take(numbers, dtype) for numbers, dtype in ((3, torch.int8), (5, torch.bfloat16), (0, torch.int8))]
    taken += [pages.take(pages.PIECE + 1, torch.uint8), pages.take(7, torch.float32)]
    for number, one in enumerate(taken):
        one.fill_(number)
        assert one.data_ptr() % pages.LINE == 0
    assert [set(one.tolist()) for one in taken[:3] + taken[4:]] == [{0}, {1}, set(), {4}]
    assert (taken[3] == 3).all()
    assert len(taken[3]) == pages.PIECE + 1
