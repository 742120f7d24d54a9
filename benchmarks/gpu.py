"""Everything that only a GPU can show, in one go: first that it is right, then how fast it is. Under ten minutes.

    python -m benchmarks.gpu [--rounds 5] [--seconds 540] [--out benchmarks/results]

Proofs: the laws of the Triton kernels on the device, and every kind of adapter against PEFT with CUDA graphs on.
Figures, on a base of random weights (hidden 2048, 16 layers, 32 query and 8 KV heads, bfloat16, 1.0 B parameters):
  * a decode step of the bare base against its floor, the bytes that it must move over the measured copy bandwidth;
  * the same step with 1, 16, 64 and 256 distinct adapters, ranks 8, 16, 64 and mixed, from a graph and without;
  * what it costs that an adapter joins; paged attention against torch's `varlen_attn` and against gathering the cache;
  * requests in process, 16 at a time: ours, PEFT's mixed batch, transformers' continuous batching.
A part that fails is a line in the result with its error, and the others go on; what the time does not allow is left out
by name. Without a CUDA device it says so and exits with 2. `--rehearse 1` goes through all parts at toy size on a CPU,
under TRITON_INTERPRET=1, to find errors of this file: give it an --out of its own, its times mean nothing.
"""

from __future__ import annotations

import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import machine
from benchmarks.report import SERVING, Counts, Report, command
from server.adapters.bank import Bank
from server.config import ModelConfig
from server.engine.loop import ProbeLease, course_of
from server.engine.pack import pack_step
from server.model.attention import AttentionPlan
from server.model.kv import KvCache, block_bytes
from server.model.load import load_network
from server.model.network import Batch, Network
from server.policy.blocks import BlockPool
from server.policy.schedule import Scheduler
from server.policy.schedule import Sequence as Scheduled
from server.primitives.gates import gates_from_rows
from server.primitives.graft import Graft, combined
from server.primitives.lowrank import LowRank
from server.primitives.site import SiteValue

PROOFS = (
    "tests/laws/test_gathered_laws.py",
    "tests/laws/test_paged_attention_laws.py",
    "tests/oracle/test_graph_steps.py",
    "tests/oracle/test_on_a_gpu.py",
)
PROOF_SECONDS = 240
BLOCK = 16
Term = tuple[Graft, float]


@dataclass(frozen=True)
class Size:
    """How large everything is. `loads` are (adapters, sequences, ranks), `attention` (sequences, context)."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    context: int
    copied_bytes: int
    batches: tuple[int, ...]
    loads: tuple[tuple[int, int, tuple[int, ...]], ...]
    attention: tuple[tuple[int, int], ...]
    at_once: int
    prompt: int
    new: int


MIXED = (8, 16, 64, 256)
FULL = Size(
    *(2048, 16, 32, 8, 8192, 32_000),
    context=512,
    copied_bytes=1 << 30,
    batches=(1, 16, 64, 256),
    loads=(
        *((count, 64, (8,)) for count in (1, 16, 64)),
        (256, 256, (8,)),
        *((64, 64, ranks) for ranks in ((16,), (64,), MIXED)),
    ),
    attention=((16, 1024), (64, 1024), (4, 16_384)),
    at_once=16,
    prompt=128,
    new=64,
)
TOY = Size(
    *(64, 1, 4, 2, 96, 128),
    context=20,
    copied_bytes=1 << 16,
    batches=(1, 3),
    loads=((1, 2, (8,)), (3, 3, (4, 20))),
    attention=((2, 48),),
    at_once=2,
    prompt=5,
    new=2,
)


class Bench:
    """The base, its cache, and its adapters of random weights."""

    def __init__(self, room: Path, size: Size, rounds: int) -> None:
        from server.engine.graphs import GraphConfig, GraphRunner

        self.size, self.rounds = size, rounds
        self.folder = _make_base(room / "base", size)
        cuda = torch.cuda.is_available()
        config = ModelConfig(
            base=str(self.folder), dtype="bfloat16" if cuda else "float32", device="cuda" if cuda else "cpu"
        )
        self.network: Network = load_network(config, self.folder, name="bench")
        self.widest = max(*size.batches, *(sequences for _, sequences, _ in size.loads))
        self.most = max(count for count, _, _ in size.loads)
        width = -(-max(size.context, size.prompt + size.new) // BLOCK) + 1
        self.cache: KvCache = self.network.new_cache(self.widest * width, BLOCK)
        began = time.perf_counter()
        sizes = tuple(sorted({*size.batches, size.at_once, *(sequences for _, sequences, _ in size.loads)}))
        config_ = GraphConfig(blocks=width, slots=self.most, sizes=sizes, tiles=8)
        self.runner = GraphRunner(self.network, self.cache, config_)
        self.runner.capture_all()
        self.capture_s = time.perf_counter() - began
        self._grafts: dict[tuple[int, int], Graft] = {}

    def graft(self, number: int, rank: int) -> Graft:
        """LoRA of one rank on the seven Linears of each layer, in pinned memory where there is a GPU."""
        if (number, rank) not in self._grafts:
            rng = torch.Generator().manual_seed(number * 1000 + rank)
            facts = self.network.facts

            def normal(*shape: int) -> Tensor:
                return (torch.randn(*shape, generator=rng) * 0.02).to(facts.device, facts.dtype)

            sites = {
                name: SiteValue(lowrank=LowRank(normal(rank, shape.in_features), normal(shape.out_features, rank), 2.0))
                for name, shape in facts.sites.items()
                if "layers" in name
            }
            self._grafts[number, rank] = Graft(f"{number}-{rank}", f"bench/{number}@{rank}", sites)
        return self._grafts[number, rank]

    def mixtures(self, count: int, sequences: int, ranks: Sequence[int]) -> list[list[Term]]:
        grafts = [self.graft(number, ranks[number % len(ranks)]) for number in range(count)]
        return [[(grafts[row % count], 1.0)] if count else [] for row in range(sequences)]

    def step(self, mixtures: Sequence[Sequence[Term]]) -> tuple[Batch, list[Graft], Mapping[str, int]]:
        """A decode step of as many sequences, each with the context of this size."""
        device, count, length = self.network.facts.device, len(mixtures), self.size.context
        wide = -(-length // BLOCK)
        blocks = torch.arange(count * wide, device=device).view(count, wide)
        plan = AttentionPlan(
            self.cache,
            rows_T=blocks[:, (length - 1) // BLOCK] * BLOCK + (length - 1) % BLOCK,
            decode_lengths_B=torch.full((count,), length, device=device),
            decode_blocks_BN=blocks,
            spans=[],
        )
        bank, grafts = Bank(self.network.facts.dtype), [graft for mixture in mixtures for graft, _ in mixture]
        columns = bank.activate(grafts)
        rows = [(1, [(columns[graft.key], weight) for graft, weight in mixture]) for mixture in mixtures]
        gates = gates_from_rows(rows, bank.size, self.cache.keys[0]) if columns else None
        ids = torch.arange(count, device=device) % self.size.vocabulary
        wanted = torch.arange(count, device=device)
        positions = torch.full((count,), length - 1, device=device)
        operands = bank.operands if columns else {}
        return Batch(ids, positions, plan, wanted, gates, operands, wanted_gates=gates), grafts, columns

    def timed(self, work: Callable[[], object]) -> dict[str, float]:
        """Milliseconds of one run, as a step has them: launched and waited for."""
        work()
        times = []
        for _ in range(self.rounds * 4):
            _wait()
            began = time.perf_counter()
            work()
            _wait()
            times.append(1e3 * (time.perf_counter() - began))
        return {"median_ms": statistics.median(times), "min_ms": min(times), "max_ms": max(times)}


def run(room: Path, counts: Counts) -> Report:
    if not torch.cuda.is_available() and not counts["rehearse"]:
        print("benchmarks.gpu: torch sees no CUDA device on this machine; nothing was measured", file=sys.stderr)  # noqa: T201
        raise SystemExit(2)
    until = time.monotonic() + counts["seconds"]
    report: Report = {"machine": {**machine(SERVING), **_device()}, "rehearsal": bool(counts["rehearse"])}
    if not counts["rehearse"]:
        report["proofs"] = _tried(_proofs)
    bench = Bench(room, TOY if counts["rehearse"] else FULL, counts["rounds"])
    parts: dict[str, Callable[[Bench], Any]] = {
        "base_step": _base_steps,
        "adapters": _adapter_steps,
        "joining": _joining,
        "attention": _attention,
        "requests": _requests,
    }
    for name, part in parts.items():
        left = until - time.monotonic()
        report[name] = _tried(partial(part, bench)) if left > 0 else {"left_out": "the time was over"}
    return report


def _tried(part: Callable[[], Any]) -> Any:
    """The edge of this program: one part's error is a result, and the others go on."""
    try:
        return part()
    except Exception as error:  # noqa: BLE001
        return {"failed": f"{type(error).__name__}: {error}"[:500]}


def _proofs() -> dict[str, Any]:
    made = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *PROOFS],
        capture_output=True,
        text=True,
        timeout=PROOF_SECONDS,
        check=False,
        cwd=Path(__file__).parents[1],
    )
    return {"returncode": made.returncode, "end": made.stdout.splitlines()[-8:]}


def _base_steps(bench: Bench) -> dict[str, Any]:
    bandwidth = _bandwidth(bench)
    rows = []
    for count in bench.size.batches:
        batch, _, _ = bench.step([[]] * count)
        moved = _weight_bytes(bench) + count * _kv_bytes(bench)
        graph = bench.timed(partial(bench.runner.run, batch, [], {}))
        rows.append(
            {
                "sequences": count,
                "graph": graph,
                "without": bench.timed(partial(bench.network.forward, batch)),
                "floor_ms": 1e3 * moved / bandwidth,
                "of_floor": graph["median_ms"] / (1e3 * moved / bandwidth),
            }
        )
    return {"copy_gb_per_s": bandwidth / 1e9, "capture_s": bench.capture_s, "rows": rows, **_replayed(bench)}


def _adapter_steps(bench: Bench) -> dict[str, Any]:
    rows = []
    for count, sequences, ranks in bench.size.loads:
        base, _, _ = bench.step([[]] * sequences)
        batch, grafts, columns = bench.step(bench.mixtures(count, sequences, ranks))
        graph = partial(bench.runner.run, batch, grafts, columns)
        plain = bench.network.forward(batch)
        error = (graph() - plain).abs().max().item() / plain.abs().max().item()
        bare, loaded = bench.timed(partial(bench.runner.run, base, [], {})), bench.timed(graph)
        rows.append(
            {
                "adapters": count,
                "sequences": sequences,
                "ranks": list(ranks),
                "base": bare,
                "graph": loaded,
                "without": bench.timed(partial(bench.network.forward, batch)),
                "of_base": bare["median_ms"] / loaded["median_ms"],
                "largest_difference": error,  # of the two ways, relative to the largest logit
                "adapter_bytes": sum({graft.key: graft.bytes for graft in grafts}.values()),
            }
        )
    return {"rows": rows, **_replayed(bench)}


def _joining(bench: Bench) -> dict[str, Any]:
    """A step into which one adapter comes from pinned memory, against one whose adapter is there."""
    slots = bench.runner.slots
    fresh = [bench.graft(10_000 + number, 8) for number in range(bench.rounds * 4 + 1)]
    for graft in fresh:
        slots.stage(graft)
    steps = iter([bench.step([[(graft, 1.0)]]) for graft in fresh])
    warm = bench.step([[(fresh[0], 1.0)]])
    return {
        "bytes": fresh[0].bytes,
        "cold": bench.timed(lambda: bench.runner.run(*next(steps))),
        "warm": bench.timed(lambda: bench.runner.run(*warm)),
    }


def _attention(bench: Bench) -> list[dict[str, Any]]:
    """One layer, alone: ours, torch's, and gathering; the largest difference of each from gathering."""
    from server.kernels.gpu.attention import decode_paged

    facts, size = bench.network.facts, bench.size
    layer = facts.layers[0]
    rows = []
    for count, length in size.attention:
        wide = -(-length // BLOCK)
        cache = KvCache([layer], blocks=count * wide, block_size=BLOCK, dtype=facts.dtype, device=facts.device)
        cache.keys[0].normal_()
        cache.values[0].normal_()
        blocks = torch.randperm(count * wide, device=facts.device).view(count, wide)
        lengths = torch.full((count,), length, device=facts.device)
        query = torch.randn(size.heads, count, layer.head_dim, device=facts.device).to(facts.dtype)
        scale = layer.head_dim**-0.5
        ways = {
            "gathered": partial(_gathered, query, cache, blocks, scale),
            "ours": partial(
                decode_paged,
                query,
                cache.keys[0],
                cache.values[0],
                blocks,
                lengths,
                block_size=BLOCK,
                scale=scale,
                window=None,
                softcap=None,
                sinks_H=None,
            ),
            "varlen_attn": partial(_varlen, query, cache, blocks, lengths, scale),
        }
        made = {name: _tried(way) for name, way in ways.items()}
        rows.append(
            {
                "sequences": count,
                "context": length,
                "cache_bytes": count * length * layer.kv_heads * layer.head_dim * 2 * facts.dtype.itemsize,
                **{
                    name: out
                    if isinstance(out, dict)
                    else {**bench.timed(ways[name]), "difference": (out - made["gathered"]).abs().max().item()}
                    for name, out in made.items()
                },
            }
        )
    return rows


def _gathered(query_HBD: Tensor, cache: KvCache, blocks_BN: Tensor, scale: float) -> Tensor:
    """What serves without the kernel; every position of the blocks is seen."""
    keys, values = cache.gather(0, blocks_BN)
    kv_heads, sequences = keys.shape[:2]
    query = query_HBD.view(kv_heads, -1, sequences, query_HBD.shape[2]).transpose(1, 2)
    out = ((query @ keys.transpose(2, 3)) * scale).float().softmax(-1).to(query.dtype) @ values
    return out.permute(1, 0, 2, 3).reshape(sequences, query_HBD.shape[0], -1)


def _varlen(query_HBD: Tensor, cache: KvCache, blocks_BN: Tensor, lengths_B: Tensor, scale: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    def pages(store: Tensor) -> Tensor:
        return store.view(store.shape[0], cache.blocks, cache.block_size, -1).permute(1, 2, 0, 3)

    starts = torch.arange(len(lengths_B) + 1, device=lengths_B.device, dtype=torch.int32)
    out = varlen_attn(
        query_HBD.transpose(0, 1).contiguous(),
        pages(cache.keys[0]),
        pages(cache.values[0]),
        starts,
        None,
        1,
        blocks_BN.shape[1] * cache.block_size,
        scale=scale,
        enable_gqa=True,
        seqused_k=lengths_B.int(),
        block_table=blocks_BN.int(),
        num_splits=1,
    )
    assert isinstance(out, Tensor)
    return out


def _requests(bench: Bench) -> dict[str, Any]:
    """New tokens per second of requests in process, rounds interleaved."""
    size = bench.size
    rng = random.Random(0)
    prompts = [[rng.randrange(size.vocabulary) for _ in range(size.prompt)] for _ in range(size.at_once)]
    none, distinct = bench.mixtures(0, size.at_once, ()), bench.mixtures(size.at_once, size.at_once, (8,))
    theirs = _tried(partial(_Peers, bench))
    loads: dict[str, Callable[[], object]] = {
        "base": partial(_served, bench, prompts, none),
        "distinct adapters": partial(_served, bench, prompts, distinct),
    }
    if isinstance(theirs, _Peers):
        loads |= {
            "transformers continuous batching, base": partial(theirs.continuous, prompts),
            "PEFT, distinct adapters": partial(theirs.mixed, prompts),
        }
    out: dict[str, Any] = {} if isinstance(theirs, _Peers) else {"peers": theirs}
    for number in range(bench.rounds + 1):  # the first warms up
        for name, load in loads.items():
            _wait()
            began = time.perf_counter()
            failed = _tried(load)
            _wait()
            rate = size.at_once * size.new / (time.perf_counter() - began)
            if isinstance(failed, dict):
                out[name] = failed
            elif number:
                out.setdefault(name, []).append(rate)
    return out


def _served(bench: Bench, prompts: Sequence[list[int]], mixtures: Sequence[list[Term]]) -> None:
    """Plan, pack, compute, draw the likeliest, commit: the engine's step without its thread and HTTP."""
    scheduler = Scheduler(
        BlockPool(bench.cache.blocks), block_size=BLOCK, max_batch_tokens=2048, max_running=len(prompts)
    )
    bank = Bank(bench.network.facts.dtype)
    leases = [ProbeLease(combined(mixture)) for mixture in mixtures]
    for index, (ids, lease) in enumerate(zip(prompts, leases, strict=True)):
        course = course_of(lease, ids)
        scheduler.add(Scheduled(index, list(ids), len(ids), bench.size.new, course, 0, reuse=False))
    grafts = {index: lease.grafts for index, lease in enumerate(leases)}
    while scheduler.running or scheduler.waiting:
        step = scheduler.plan()
        packed = pack_step(step, bench.cache, bank, grafts, frozenset())
        at_work = [graft for chunk in step.chunks for graft, _ in grafts[chunk.sequence.id]]
        likeliest = bench.runner.run(packed.batch, at_work, bank.activate(at_work)).argmax(-1).tolist()
        drawn = {
            chunk.sequence.id: likeliest[first + count - 1] for chunk, first, count in packed.rows if chunk.completes
        }
        for outcome in scheduler.commit(step, drawn):
            if outcome.finish is not None:
                scheduler.finish(outcome.sequence)


class _Peers:
    """transformers' continuous batching on the bare base; PEFT's mixed batch with an adapter a row."""

    def __init__(self, bench: Bench) -> None:
        import peft
        from transformers import AutoModelForCausalLM

        facts = bench.network.facts
        self._size = bench.size

        def load() -> Any:
            model = AutoModelForCausalLM.from_pretrained(bench.folder, dtype=facts.dtype)
            return model.eval().to(facts.device)

        self._base = load()
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=targets, init_lora_weights=False)
        self._mixed: Any = peft.get_peft_model(load(), config, adapter_name="a0")
        for number in range(1, bench.size.at_once):
            self._mixed.add_adapter(f"a{number}", config)
        self._mixed = self._mixed.to(facts.device, facts.dtype).eval()
        self._device = facts.device

    def continuous(self, prompts: Sequence[list[int]]) -> None:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        config = GenerationConfig(
            max_new_tokens=self._size.new, do_sample=False, eos_token_id=-1, pad_token_id=0, use_cache=True
        )
        # Room for these requests; by default it takes nine tenths of the memory. It keeps its graphs between rounds.
        room = ContinuousBatchingConfig(num_blocks=len(prompts) * 2, max_batch_tokens=2048)
        answers = self._base.generate_batch(list(prompts), config, room, persistent_manager=True)
        tokens = [len(answer.generated_tokens) for answer in answers.values()]
        if tokens != [self._size.new] * len(prompts):
            raise RuntimeError(f"tokens of its answers: {tokens}")

    def mixed(self, prompts: Sequence[list[int]]) -> None:
        ids = torch.tensor(prompts, device=self._device)
        with torch.inference_mode():
            self._mixed.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=self._size.new,
                min_new_tokens=self._size.new,
                do_sample=False,
                adapter_names=[f"a{row}" for row in range(len(prompts))],
                pad_token_id=0,
            )


def _make_base(folder: Path, size: Size) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=32_768,
        tie_word_embeddings=True,
        eos_token_id=None,
    )
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config)
    model.to(torch.bfloat16 if torch.cuda.is_available() else torch.float32).save_pretrained(folder)
    return folder


def _weight_bytes(bench: Bench) -> int:
    """Of every Linear: a tied embedding is read once, by the head; looking up its rows is nothing beside it."""
    dtype = bench.network.facts.dtype
    return sum(shape.in_features * shape.out_features for shape in bench.network.facts.sites.values()) * dtype.itemsize


def _kv_bytes(bench: Bench) -> int:
    """Of one sequence."""
    facts = bench.network.facts
    return bench.size.context * block_bytes(facts.layers, 1, facts.dtype)


def _bandwidth(bench: Bench) -> float:
    """Bytes read and written per second by a copy on the device."""
    source = torch.empty(bench.size.copied_bytes, dtype=torch.uint8, device=bench.network.facts.device)
    target = torch.empty_like(source)
    return 2e3 * bench.size.copied_bytes / bench.timed(partial(target.copy_, source))["min_ms"]


def _replayed(bench: Bench) -> dict[str, int]:
    """Steps that a graph has served so far: where it stands still, the figures above are of steps without one."""
    return {"replays": bench.runner.replays}


def _device() -> dict[str, Any]:
    if not torch.cuda.is_available():
        return {"gpu": None}
    import triton

    facts = torch.cuda.get_device_properties(0)
    return {
        "gpu": facts.name,
        "memory_bytes": facts.total_memory,
        "multiprocessors": facts.multi_processor_count,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
    }


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def table(report: Report) -> str:
    proofs = report.get("proofs", {})
    lines = [f"proofs: {'passed' if proofs.get('returncode') == 0 else proofs}", ""]
    if "rows" in report["base_step"]:
        lines += ["| sequences | graph, ms | without, ms | floor, ms | of the floor |", "|---|---|---|---|---|"]
        lines += [
            f"| {row['sequences']} | {row['graph']['median_ms']:.2f} | {row['without']['median_ms']:.2f} "
            f"| {row['floor_ms']:.2f} | {row['of_floor']:.2f} |"
            for row in report["base_step"]["rows"]
        ]
    if "rows" in report["adapters"]:
        lines += [
            "",
            "| adapters | sequences | ranks | graph, ms | without, ms | of base |",
            "|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {row['adapters']} | {row['sequences']} | {row['ranks']} | {row['graph']['median_ms']:.2f} "
            f"| {row['without']['median_ms']:.2f} | {row['of_base']:.2f} |"
            for row in report["adapters"]["rows"]
        ]
    others = {name: report[name] for name in ("base_step", "adapters", "joining", "attention", "requests")}
    failed = [f"{name}: {one}" for name, one in others.items() if isinstance(one, dict) and one.keys() <= {"failed"}]
    return "\n".join([*lines, "", *failed, f"requests: {report['requests']}"])


def main() -> None:
    command("gpu", __doc__, {"rounds": 5, "seconds": 540, "rehearse": 0}, run, table)


if __name__ == "__main__":
    main()
