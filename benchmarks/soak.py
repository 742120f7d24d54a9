"""Half an hour of everything at once, and whether anything leaks, hangs or is mixed up.

    python -m benchmarks.soak [--minutes 30] [--adapters 200] [--at_once 32] [--out benchmarks/results]

A server of a tiny random base, with room for a quarter of the adapters and for a few sequences; adapters of every kind
that is served exactly (tests/oracle/kinds.py). Each is first asked for alone, which is what its answers are held
against. Then, at full concurrency: single adapters, fusions, streams whose client goes away, aliases that move between
two versions while they are asked for. In the end nothing may run, wait, hold blocks or hold a lease, and the memory is
told by quarters.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any

import httpx
import torch
from prometheus_client.parser import text_string_to_metric_families
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from benchmarks.engines.process import Process, free_port, process, wait_for
from benchmarks.engines.process import answers as is_up
from benchmarks.machine import machine
from benchmarks.report import SERVING, Counts, Report, command
from hub.ref import parse_reference
from hub.registry import LocalHub
from tests.oracle.conftest import ARCHITECTURES, SMALL, TinyBase
from tests.oracle.kinds import INVOCATION, make_adapter, rows

ARCHITECTURE = "llama"
PROMPTS, PROMPT, NEW = 4, 12, 24  # texts of so many tokens, so many new ones
FUSIONS = 40  # mixtures whose answer alone is known
MOVING = 10  # names with two versions, between which an alias moves
ALIAS = "live"
KV_BYTES = 1 << 19  # some dozens of sequences: now and then one is preempted
SHARE = 4  # one adapter in so many fits
TIE = 1e-3  # of log-probabilities: tokens as near as this may change places with the shape of the batch
SAMPLE_S, MOVE_S, QUIET_S = 5.0, 2.0, 60.0
HEADER = "x-multigraft-adapters"
ADMIN_KEY = "soak"
FAULT, TOLD_OF_A_FAULT = "Traceback", 6000  # characters of the server's log, from its first fault on
TOLD = 20  # wrong or failed answers that are told whole


@dataclass(frozen=True)
class Alone:
    """What a model answered by itself: its tokens, and how far behind its second choice each stood."""

    tokens: Sequence[str]
    leads: Sequence[float]

    def is_same(self, tokens: Sequence[str]) -> bool:
        """Up to the first token whose second choice was as good."""
        first = next((at for at, pair in enumerate(zip(self.tokens, tokens, strict=True)) if len(set(pair)) > 1), None)
        return first is None or self.leads[first] < TIE


@dataclass
class Tally:
    done: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    memory_mib: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Asker:
    """`alone`: by what the answer's header says of who served, and the number of the prompt."""

    client: httpx.AsyncClient
    alone: Mapping[tuple[str, int], Alone]
    tally: Tally

    async def ask(self, what: str, model: str, prompt: int) -> None:
        answer = await self.client.post("/v1/completions", json=body(model, prompt))
        if answer.status_code != httpx.codes.OK:
            self.tally.failed.append(f"{model}: {answer.status_code} {answer.text[:200]}")
            return
        known = self.alone[answer.headers[HEADER], prompt]
        self.tally.done[what] += 1
        if not known.is_same(read(answer.json()).tokens):
            self.tally.wrong.append(f"{model}, prompt {prompt}, by {answer.headers[HEADER]}")

    async def leave(self, model: str, prompt: int, pieces: int) -> None:
        """Go away in the middle of a stream."""
        asked = {**body(model, prompt), "stream": True}
        async with self.client.stream("POST", "/v1/completions", json=asked) as answer:
            if answer.status_code != httpx.codes.OK:
                self.tally.failed.append(f"{model}: {answer.status_code} {(await answer.aread())[:200]!r}")
                return
            seen = 0
            async for line in answer.aiter_lines():
                seen += line.startswith("data: {")
                if seen >= pieces:
                    break
        self.tally.done["left"] += 1


def run(room: Path, counts: Counts) -> Report:
    base = make_base(room / "base")
    hub = LocalHub(room / "home")
    moving, names = push_all(hub, base, room, counts["adapters"])
    whole = sum(entry.size for name in names for entry in hub.manifest(hub.resolve(parse_reference(name)).digest).files)
    options: Mapping[str, object] = {
        "adapter-bytes": whole // SHARE,
        "kv-bytes": KV_BYTES,
        "max-running": counts["at_once"] // 2,
        "port": free_port(),
    }
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    environment = {"MULTIGRAFT_HOME": str(room / "home"), "MULTIGRAFT_ADMIN_KEY": ADMIN_KEY}
    url = f"http://127.0.0.1:{options['port']}"
    served: list[str | Path] = [sys.executable, "-m", "hub.cli", "serve", "--base", base.folder, *arguments]
    with process(served, room / "server.log", environment) as server:
        wait_for(server, lambda: is_up(f"{url}/health"))
        tally, seconds, left = asyncio.run(soak(url, server, hub, names, moving, counts))
    said = (room / "server.log").read_text(encoding="utf-8", errors="replace")
    if FAULT in said:  # the room goes away, and the log with it
        print(said[said.index(FAULT) :][:TOLD_OF_A_FAULT], file=sys.stderr)  # noqa: T201
    return {
        "machine": machine(SERVING),
        "adapters": len(names) + len(moving),
        "seconds": seconds,
        "left": left,
        **asdict(tally),
        "done": dict(tally.done),  # what asdict makes of a Counter counts its pairs
        "wrong": tally.wrong[:TOLD],
        "failed": tally.failed[:TOLD],
        "wrong_count": len(tally.wrong),
        "failed_count": len(tally.failed),
    }


async def soak(
    url: str, server: Process, hub: LocalHub, names: Sequence[str], moving: Sequence[str], counts: Counts
) -> tuple[Tally, float, Report]:
    tally = Tally()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
        models_ = [*names, *(f"{name}@{version}" for name in moving for version in (1, 2))]
        alone, fusions = await ask_alone(client, models_, random.Random(0))
        asker = Asker(client, alone, tally)
        end = time.monotonic() + 60 * counts["minutes"]
        began = time.monotonic()
        work = [churn(asker, names, moving, fusions, seed, end) for seed in range(counts["at_once"])]
        await asyncio.gather(*work, move_aliases(hub, moving, end), weigh(server, tally, end))
        seconds = time.monotonic() - began
        return tally, seconds, await what_is_left(client)


async def ask_alone(
    client: httpx.AsyncClient, models_: Sequence[str], rng: random.Random
) -> tuple[dict[tuple[str, int], Alone], list[str]]:
    """Every model by itself, and some mixtures: those that are refused are no mixtures."""
    alone = {}
    fusions: list[str] = []
    pairs = ("*0.5+".join(rng.sample(models_, 2)) + "*-0.75" for _ in count())
    for model in (*models_, *islice(pairs, 10 * FUSIONS)):
        mixed = "+" in model
        if mixed and len(fusions) == FUSIONS:
            break
        for prompt in range(PROMPTS):
            answer = await client.post("/v1/completions", json=body(model, prompt))
            if mixed and answer.status_code == httpx.codes.BAD_REQUEST:
                break
            if not answer.is_success:
                raise RuntimeError(f"{model} does not serve alone: {answer.text[:500]}")
            alone[answer.headers[HEADER], prompt] = read(answer.json())
        else:
            fusions += [model] if mixed else []
    return alone, fusions


async def churn(
    asker: Asker, names: Sequence[str], moving: Sequence[str], fusions: Sequence[str], seed: int, end: float
) -> None:
    rng = random.Random(seed)
    while time.monotonic() < end:
        prompt, what = rng.randrange(PROMPTS), rng.random()
        try:
            if what < 0.5:
                await asker.ask("single", rng.choice(names), prompt)
            elif what < 0.7:
                await asker.ask("fusion", rng.choice(fusions), prompt)
            elif what < 0.85:
                await asker.ask("moving", f"{rng.choice(moving)}@{ALIAS}", prompt)
            else:
                await asker.leave(rng.choice(names), prompt, rng.randrange(1, NEW))
        except httpx.HTTPError as error:
            asker.tally.failed.append(f"{type(error).__name__}: {error}")


async def move_aliases(hub: LocalHub, moving: Sequence[str], end: float) -> None:
    rng = random.Random(1)
    while time.monotonic() < end:
        await asyncio.to_thread(hub.move_alias, rng.choice(moving), rng.choice((1, 2)), ALIAS)
        await asyncio.sleep(MOVE_S)


async def weigh(server: Process, tally: Tally, end: float) -> None:
    while time.monotonic() < end:
        tally.memory_mib.append(round(server.memory_bytes() / 2**20, 1))
        await asyncio.sleep(SAMPLE_S)


async def what_is_left(client: httpx.AsyncClient) -> Report:
    """Once nothing runs any more, or after a while in which it should have ended."""
    deadline = time.monotonic() + QUIET_S
    while True:
        gauges = {
            sample.name: sample.value
            for family in text_string_to_metric_families((await client.get("/metrics")).text)
            for sample in family.samples
        }
        listed = (await client.get("/v1/adapters", headers={"authorization": f"Bearer {ADMIN_KEY}"})).json()["data"]
        left = {
            "running": gauges["vllm:num_requests_running"],
            "waiting": gauges["vllm:num_requests_waiting"],
            "kv_share": gauges["vllm:kv_cache_usage_perc"],
            "leases": sum(one["leases"] for one in listed),
        }
        if not any(left.values()) or time.monotonic() > deadline:
            return left
        await asyncio.sleep(0.2)


def body(model: str, prompt: int) -> dict[str, Any]:
    """Every prompt holds the tokens that wake an activated adapter."""
    ids = torch.randint(3, SMALL["vocab_size"], (PROMPT,), generator=torch.Generator().manual_seed(prompt)).tolist()
    ids[PROMPT // 2 : PROMPT // 2] = INVOCATION
    return {"model": model, "prompt": ids, "max_tokens": NEW, "temperature": 0, "ignore_eos": True, "logprobs": 2}


def read(answer: Any) -> Alone:
    told = answer["choices"][0]["logprobs"]
    tops = [sorted(top.values(), reverse=True) for top in told["top_logprobs"]]
    return Alone(told["tokens"], [top[0] - top[1] if len(top) > 1 else 0.0 for top in tops])


def make_base(folder: Path) -> TinyBase:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, **ARCHITECTURES[ARCHITECTURE])).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(SMALL["vocab_size"])}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)
    return TinyBase(ARCHITECTURE, folder)


def push_all(hub: LocalHub, base: TinyBase, room: Path, adapters: int) -> tuple[list[str], list[str]]:
    """Names with two versions, and names with one; as many folders as are wanted, the kinds in turn."""
    moving, names = list[str](), list[str]()
    with quiet():
        for seed, (row_name, row) in islice(
            ((s, item) for s in count() for item in rows(ARCHITECTURE).items()), adapters
        ):
            folder = room / f"{row_name}-{seed}"
            make_adapter(base, row, folder, seed)
            twice = seed == 1 and f"soak/{row_name}" in names and len(moving) < MOVING
            name = f"soak/{row_name}" if twice or seed == 0 else f"soak/{row_name}-{seed}"
            hub.push(folder, name, base=base.folder, aliases=[ALIAS])
            names += [] if twice else [name]
            moving += [name] if twice else []
    return moving, [name for name in names if name not in moving]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """PEFT warns of what these adapters are on purpose."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def table(report: Report) -> str:
    memory = report["memory_mib"]
    quarters = [memory[len(memory) * n // 4 : len(memory) * (n + 1) // 4] for n in range(4)]
    medians = ", ".join(f"{statistics.median(one):.0f}" for one in quarters if one)
    done = ", ".join(f"{number} {what}" for what, number in report["done"].items())
    return "\n".join(
        [
            f"{report['seconds'] / 60:.0f} minutes, {report['adapters']} adapters: {done}",
            f"wrong {report['wrong_count']}, failed {report['failed_count']}",
            f"memory by quarters, MiB: {medians}",
            f"left at the end: {report['left']}",
        ]
    )


def main() -> None:
    command("soak", __doc__, {"minutes": 30, "adapters": 200, "at_once": 32}, run, table)


if __name__ == "__main__":
    main()
