"""The adapter store over a real hub and a real engine: who is loaded, held, refused, and what an alias serves."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from hub.registry import LocalHub
from server.errors import (
    AdapterIncompatible,
    AdapterUnavailable,
    InvalidValue,
    MixtureRefused,
    ModelNotFound,
    ServerError,
    Unavailable,
)
from tests.unit.server.conftest import CONFIGS, make_adapter, make_base, set_tensor

PROMPT = [5, 9, 2, 7, 7, 3]
EXACT = 1e-4  # of logits, in fp32, whose sums run in another order than PEFT's


async def refused(server: Any, *terms: tuple[str, float]) -> ServerError:
    with pytest.raises(ServerError) as caught:
        await server.store.acquire(terms)
    assert all(status.leases == 0 for status in server.store.resident()), "a refused mixture keeps a lease"
    return caught.value


def loads(server: Any) -> int:
    value = server.metrics.registry.get_sample_value("multigraft_adapter_load_seconds_count", {"tier": "disk"})
    return int(value or 0)


def test_a_hundred_requests_for_an_absent_adapter_load_it_once(
    rig: Any, run: Any, hub: LocalHub, adapter: Callable[..., Path]
) -> None:
    hub.push(adapter("lora", 1), "bot")

    async def work() -> None:
        async with rig() as server:
            leases = await asyncio.gather(*(server.store.acquire([("bot", 1.0)]) for _ in range(100)))
            assert loads(server) == 1
            assert server.store.resident()[0].leases == 100
            for lease in leases:
                lease.release()
                lease.release()
            assert server.store.resident()[0].leases == 0

    run(work())


def test_the_same_adapter_twice_is_one_with_the_sum_of_the_weights(
    rig: Any, run: Any, hub: LocalHub, adapter: Callable[..., Path]
) -> None:
    hub.push(adapter("lora", 1), "bot")

    async def work() -> None:
        async with rig() as server:
            twice, _ = await server.ask(PROMPT, ("bot", 0.3), ("bot", 0.2), ("bot@1", 0.5))
            once, _ = await server.ask(PROMPT, ("bot", 1.0))
            zero, _ = await server.ask(PROMPT, ("bot", 1.0), ("bot@1", -1.0))
            bare, _ = await server.ask(PROMPT)
            assert twice == once != bare
            assert zero == bare

    run(work())


def test_mixtures_without_an_exact_sum_are_refused_by_name(
    rig: Any, run: Any, hub: LocalHub, adapter: Callable[..., Path]
) -> None:
    for kind in ("lora", "ia3", "ia3-in", "prefix", "prompt"):
        hub.push(adapter(kind, 1), kind)

    async def work() -> None:
        async with rig(max_terms=3, max_weight=10) as server:
            half = await refused(server, ("prefix", 0.5))
            assert "weight 0.5 on prefix@1" in half.message
            cross = await refused(server, ("ia3-in", 1.0), ("ia3", 1.0))
            assert isinstance(cross, MixtureRefused)
            assert "v_proj" in cross.message
            many = await refused(server, *((f"x{n}", 1.0) for n in range(4)))
            assert "4 adapters is above the limit of 3" in many.message
            for weight in (11.0, float("nan"), float("inf")):
                assert isinstance(await refused(server, ("lora", weight)), InvalidValue)
            twice = await refused(server, ("prefix", 1.0), ("prefix@1", 1.0))
            assert "weight 2 on prefix@1" in twice.message
            left_out, _ = await server.ask(PROMPT, ("prefix", 0.0), ("prompt", 0.0))
            assert left_out == (await server.ask(PROMPT))[0]

    run(work())


def test_several_prefixes_stand_in_the_order_written_and_are_counted(
    rig: Any, run: Any, hub: LocalHub, adapter: Callable[..., Path]
) -> None:
    for kind in ("prefix", "prompt", "lora"):
        hub.push(adapter(kind, 1), kind)
    alone = ("prefix", "prompt")

    async def work() -> None:
        async with rig() as server:
            one_way, first = await server.ask(PROMPT, ("prefix", 1.0), ("prompt", 1.0))
            other_way, second = await server.ask(PROMPT, ("prompt", 1.0), ("prefix", 1.0))
            again, third = await server.ask(PROMPT, ("prefix", 1.0), ("prompt", 1.0))
            beside, _ = await server.ask(PROMPT, ("lora", 0.5), ("prefix", 1.0), ("prompt", 1.0))
            assert one_way == again != other_way
            assert beside not in (one_way, other_way)
            assert (first.cached_tokens, second.cached_tokens) == (0, 0)
            assert third.cached_tokens > 0
            sizes = {status.name: status.bytes for status in server.store.resident()}
        room = sum(sizes[kind] for kind in alone)
        async with rig(cache_bytes=room) as server:
            full = await refused(server, ("prefix", 1.0), ("prompt", 1.0))
            assert isinstance(full, MixtureRefused)
            assert "prefix@1 and prompt@1 and what is served with it take" in full.message
            assert {status.leases for status in server.store.resident()} == {0}
        async with rig(cache_bytes=room + 3 * sizes["prefix"]) as server:
            await server.ask(PROMPT, ("prefix", 1.0), ("prompt", 1.0))
            await server.ask(PROMPT, ("prompt", 1.0), ("prefix", 1.0))
            assert {status.leases for status in server.store.resident()} == {0}
        async with rig(max_virtual=9) as server:
            long = await refused(server, ("prefix", 1.0), ("prompt", 1.0))
            assert "virtual tokens, the limit is 9" in long.message

    run(work())


def test_an_activated_adapter_shares_the_bases_kv_up_to_its_invocation_and_is_refused_without_one(
    rig: Any, run: Any, hub: LocalHub, adapter: Callable[..., Path]
) -> None:
    hub.push(adapter("alora", 1), "bot")
    before, called = [3, 9, 4, 11, 5, 6, 2, 8], [7, 1, 13]

    async def work() -> None:
        async with rig() as server:
            bare, _ = await server.ask([*before, *called])
            woken, end = await server.ask([*before, *called], ("bot", 1.0))
            assert woken != bare
            assert end.cached_tokens == len(before)
            _, end = await server.ask([*before, *called, *called], ("bot", 1.0))
            assert end.cached_tokens == len(before), "the first call is no call in the longer prompt"
            with pytest.raises(InvalidValue, match="bot@1 works from its invocation tokens on"):
                await server.ask(before, ("bot", 1.0))
            assert server.store.resident()[0].leases == 0

    run(work())


def test_a_wrong_base_is_named_with_the_field_and_both_values(
    rig: Any, run: Any, hub: LocalHub, tmp_path: Path
) -> None:
    other = make_base(tmp_path / "other", hidden=64)
    hub.push(make_adapter(other, "lora", tmp_path / "adapter", seed=1), "bot")

    async def work() -> None:
        async with rig() as server:
            error = await refused(server, ("bot", 1.0))
            assert isinstance(error, AdapterIncompatible)
            assert "hidden_size 64" in error.message
            assert "hidden_size 32" in error.message
            assert [line.id for line in await server.store.servable()] == []

    run(work())


def test_a_rank_above_the_maximum_is_refused_with_both(
    rig: Any, run: Any, hub: LocalHub, adapter: Callable[..., Path]
) -> None:
    hub.push(adapter("lora-16", 1), "wide")

    async def work() -> None:
        async with rig(max_rank=8) as server:
            error = await refused(server, ("wide", 1.0))
            assert isinstance(error, AdapterIncompatible)
            assert re.search(r"wide@1: rank 16 of .*q_proj is above max_rank 8", error.message)
            assert server.store.resident()[0].tier == "failed"

    run(work())


def test_how_far_a_change_of_full_rank_is_off_is_told_and_limited(
    rig: Any, run: Any, hub: LocalHub, adapter: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    hub.push(adapter("fourierft", 1), "waves")
    hub.push(adapter("lora", 1), "bot")

    async def work() -> None:
        async with rig(max_rank=16, max_delta_error=0.5) as server:
            with caplog.at_level("INFO", logger="server.adapters.store"):
                await server.store.warm("waves")
                await server.store.warm("bot")
            waves, bot = server.store.resident()
            assert bot.approximation is None
            assert waves.approximation is not None
            assert 0.01 < waves.approximation <= 0.5
            told = next(record.getMessage() for record in caplog.records if "waves" in record.getMessage())
            assert f"off by {waves.approximation:.2g} of its change at most" in told
        for limit in (0.0, 0.01):
            async with rig(max_rank=16, max_delta_error=limit) as server:
                error = await refused(server, ("waves", 1.0))
                assert isinstance(error, AdapterIncompatible)
                says = (
                    r"waves@1: its change of model\.layers\.\d\..*q_proj has full rank: of rank 16 .*max_delta_error "
                )
                assert re.search(rf"{says}{limit:g}$", error.message)

    run(work())


def test_what_is_unknown_or_no_reference_is_said_so(
    rig: Any, run: Any, hub: LocalHub, adapter: Callable[..., Path]
) -> None:
    hub.push(adapter("lora", 1), "support-bot")

    async def work() -> None:
        async with rig() as server:
            unknown = await refused(server, ("suport-bot", 1.0))
            assert isinstance(unknown, ModelNotFound)
            assert "support-bot" in unknown.message
            assert isinstance(await refused(server, ("support-bot@7", 1.0)), ModelNotFound)
            for text in ("../etc/passwd", "/etc/x", "a b", "", "support-bot@"):
                assert isinstance(await refused(server, (text, 1.0)), InvalidValue)

    run(work())


def test_corrupt_bytes_are_never_served_and_mended_bytes_are(
    rig: Any, run: Any, hub: LocalHub, adapter: Callable[..., Path], tmp_path: Path
) -> None:
    hub.push(adapter("lora", 1), "bot")
    stored = [path for path in (tmp_path / "home").rglob("*") if path.is_file() and path.stat().st_size > 4000]
    weights = (adapter("lora", 1) / "adapter_model.safetensors").read_bytes()
    blob = next(path for path in stored if path.read_bytes() == weights)

    async def work() -> None:
        async with rig() as server:
            blob.chmod(0o600)
            blob.write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
            error = await refused(server, ("bot", 1.0))
            assert isinstance(error, AdapterUnavailable)
            assert "corrupt" in error.message
            assert str(tmp_path) not in error.message
            blob.write_bytes(weights)
            assert (await server.ask(PROMPT, ("bot", 1.0)))[0]

    run(work())


def test_a_full_cache_waits_for_a_lease_to_end(
    rig: Any, run: Any, hub: LocalHub, adapter: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in (1, 2):
        hub.push(adapter("lora", seed), f"bot-{seed}")

    async def work() -> None:
        async with rig() as server:
            size = (await server.store.warm("bot-1")).bytes
        async with rig(cache_bytes=size) as server:
            first = await server.store.acquire([("bot-1", 1.0)])
            second = asyncio.create_task(server.store.acquire([("bot-2", 1.0)]))
            await asyncio.sleep(0.2)
            assert not second.done()
            first.release()
            (await second).release()
            assert [status.name for status in server.store.resident()] == ["bot-2"]
            held = await server.store.acquire([("bot-2", 1.0)])
            monkeypatch.setattr("server.adapters.room.WAIT_S", 0.05)
            with pytest.raises(Unavailable, match=f"cache of {size} bytes is in use"):
                await server.store.acquire([("bot-1", 1.0)])
            held.release()
        async with rig(cache_bytes=size - 1) as server:
            too_big = await refused(server, ("bot-1", 1.0))
            assert f"takes {size} bytes, the adapter cache holds {size - 1}" in too_big.message

    run(work())


def golden(folder: Path, base: Path, *, spoil: float) -> Path:
    """The folder with a golden row as PEFT answers it, off by `spoil` of its spread."""
    ids = torch.tensor([4, 7, 1, 30])
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    with torch.inference_mode():
        logits = model(ids[None]).logits[0, -1]
    logits = logits + spoil * logits.std() * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    safetensors.torch.save_file({"0.input_ids": ids, "0.logits": logits}, folder / "golden.safetensors")
    (folder / "golden.json").write_text('{"schema_version": 1, "rows": [{"prompt": "?", "tokens": 4}]}')
    return folder


@pytest.mark.parametrize("kind", sorted({*CONFIGS} - {"lora-16", "lora-head", "ia3-in"}))
def test_every_kind_goes_from_the_hub_through_its_golden_rows_into_service(
    kind: str, rig: Any, run: Any, hub: LocalHub, adapter: Callable[..., Path], base: Path, tmp_path: Path
) -> None:
    for name, spoil in (("good", 0.0), ("bad", 0.1)):
        copied = set_tensor(adapter(kind, 1), tmp_path / name, lambda tensors: None)
        hub.push(golden(copied, base, spoil=spoil), name)

    async def work() -> None:
        async with rig() as server:
            assert (await server.ask(PROMPT, ("good", 1.0)))[0] != (await server.ask(PROMPT))[0]
            assert server.store.resident()[0].kind == ("lora" if kind in ("dora", "alora") else kind)
            assert "golden row 0 is off by" in (await refused(server, ("bad", 1.0))).message

    run(work())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_file_of_half_precision_is_served_exactly_in_the_bytes_of_its_file(
    dtype: torch.dtype, rig: Any, run: Any, hub: LocalHub, adapter: Callable[..., Path], base: Path, tmp_path: Path
) -> None:
    def halve(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})

    folder = set_tensor(adapter("lora", 1), tmp_path / "half", halve)
    hub.push(folder, "half")
    weights = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    with torch.inference_mode():
        expected_V = model(torch.tensor([PROMPT])).logits[0, -1]

    async def work() -> None:
        async with rig() as server:
            _, end = await server.ask(PROMPT, ("half", 1.0), new=0, keep_logits=True)
            got_V = torch.frombuffer(bytearray(end.logits), dtype=torch.float32)
            assert (got_V - expected_V).abs().max() < EXACT
            assert server.store.resident()[0].bytes == sum(tensor.nbytes for tensor in weights.values())

    run(work())


def test_golden_rows_of_a_base_in_few_bits_are_held_to_the_error_of_such_a_base(
    rig: Any, run: Any, hub: LocalHub, adapter: Callable[..., Path], base: Path, tmp_path: Path
) -> None:
    for name, spoil in (("good", 0.1), ("bad", 1.0)):
        folder = golden(set_tensor(adapter("lora", 1), tmp_path / name, lambda tensors: None), base, spoil=spoil)
        told = json.loads((folder / "golden.json").read_text())
        (folder / "golden.json").write_text(json.dumps({**told, "quantize": "nf4"}))
        hub.push(folder, name)

    async def work() -> None:
        async with rig() as server:
            assert (await server.ask(PROMPT, ("good", 1.0)))[0] != (await server.ask(PROMPT))[0]
            assert "the limit is 0.6" in (await refused(server, ("bad", 1.0))).message

    run(work())


def test_an_alias_serves_the_old_version_until_the_new_one_has_proved_itself(
    rig: Any, run: Any, hub: LocalHub, adapter: Callable[..., Path], base: Path, tmp_path: Path
) -> None:
    def copy(seed: int, spoil: float) -> Path:
        copied = set_tensor(adapter("lora", seed), tmp_path / f"{seed}", lambda tensors: None)
        return golden(copied, base, spoil=spoil)

    async def version(server: Any) -> int:
        lease = await server.store.acquire([("bot", 1.0)])
        lease.release()
        return int(lease.mixture.terms[0].version)

    async def work() -> None:
        hub.push(copy(1, 0.0), "bot")
        async with rig(watch=True) as server:
            assert await version(server) == 1
            running = await server.submit(PROMPT, ("bot", 1.0), new=60)
            hub.push(copy(2, 0.1), "bot")
            while not any(status.tier == "failed" for status in server.store.resident()):
                await asyncio.sleep(0.01)
            assert await version(server) == 1
            failed = next(status for status in server.store.resident() if status.tier == "failed")
            assert re.search(r"golden row 0 is off by 0\.\d+, the limit is 0\.01", failed.error or "")
            hub.push(copy(3, 0.0), "bot")
            while await version(server) != 3:
                await asyncio.sleep(0.01)
            hub.rollback("bot", "latest")  # to version 2, which is known to fail
            await asyncio.sleep(0.2)
            assert await version(server) == 3
            hub.move_alias("bot", 1, "latest")
            while await version(server) != 1:
                await asyncio.sleep(0.01)
            running.cancel()
        hub.move_alias("bot", 2, "latest")
        async with rig() as late:  # never saw a good version under this alias
            assert await version(late) == 1
            assert [status.tier for status in late.store.resident()] == ["device", "failed"]
            with pytest.raises(AdapterUnavailable):
                await late.store.acquire([("bot@2", 1.0)])

    run(work())


def test_names_given_by_hand_are_served_until_they_are_taken_away(
    rig: Any, run: Any, hub: LocalHub, adapter: Callable[..., Path]
) -> None:
    hub.push(adapter("lora", 1), "team/bot")

    async def work() -> None:
        async with rig() as server:
            status = await server.store.load("my-bot", "team/bot@1")
            assert "my-bot" in status.references
            assert (await server.ask(PROMPT, ("my-bot", 1.0)))[0] == (await server.ask(PROMPT, ("team/bot", 1.0)))[0]
            assert {line.id for line in await server.store.servable()} == {"team/bot", "my-bot"}
            await server.store.unload("my-bot")
            assert isinstance(await refused(server, ("my-bot", 1.0)), ModelNotFound)
            with pytest.raises(InvalidValue, match="bare name"):
                await server.store.load("my-bot@2", "team/bot")
            with pytest.raises(InvalidValue):
                await server.store.load("my-bot", "../../etc")

    run(work())


@pytest.mark.parametrize("kind", sorted(set(CONFIGS) - {"lora"}))
def test_an_adapter_that_has_left_the_batch_leaves_no_trace(
    rig: Any, run: Any, hub: LocalHub, adapter: Callable[..., Path], kind: str
) -> None:
    """It may stay packed for a while, with no token that carries it."""
    hub.push(adapter("lora", 1), "stays")
    hub.push(adapter(kind, 2), "leaves")
    prompt = [*PROMPT, *CONFIGS["alora"]().alora_invocation_tokens]

    async def work() -> None:
        async with rig() as server:
            alone, _ = await server.ask(prompt, ("stays", 1.0))
            await asyncio.gather(server.ask(prompt, ("stays", 1.0)), server.ask(prompt, ("leaves", 1.0)))
            assert (await server.ask(prompt, ("stays", 1.0)))[0] == alone

    run(work())
