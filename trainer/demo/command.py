"""`hub demo`: the whole of what Multigraft is for, on the embedded base, told as it happens.

Train four adapters of four kinds, push them, serve all of them and the bare base in one batch, compare with PEFT, fuse
two, then publish a better version of one while streams run. Every figure shown is measured in this run.
"""

import asyncio
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.live import Live

from clients.local import serving
from hub.connect import open_hub
from hub.contract import Hub
from trainer.demo.asking import Answer, Client, asked, exact_match
from trainer.demo.lessons import BASE, Lesson, Version, first_try, learn, peft_answers, shipped_lessons
from trainer.demo.showing import LessonBar, Line, results_table, served_by, show_next_steps, streams_table
from trainer.errors import DemoFailed
from trainer.quiet import quiet_libraries

RECIPES: Final = Path(str(files("trainer"))) / "recipes"
HELD_OUT: Final = 200
HELD_OUT_SEED: Final = 2026
COMPARED: Final = 20  # prompts that PEFT alone answers too, token by token
STREAMS: Final = 12  # open at any time while the alias moves
GATE: Final = 0.9  # what an adapter must reach as served, and
CEILING: Final = 0.05  # what the base may reach, asked the same way
SWAP_TIMEOUT_S: Final = 30


def run_demo(*, keep: bool, port: int) -> None:
    """Raises: DemoFailed, when anything that is shown did not hold."""
    quiet_libraries()
    console = Console()
    began = time.monotonic()
    hub = open_hub()
    with tempfile.TemporaryDirectory(prefix="multigraft-demo-") as room:
        console.rule("[bold]1  Train four adapters of one base, and push them")
        versions, better = train_all(console, hub, Path(room))
        console.rule("[bold]2  Serve all of them in one batch")
        with serving(BASE, Path(room) / "server.log", port=port) as url:
            console.print(f"one server, one copy of {BASE}: {url}", highlight=False)
            asyncio.run(show_all(console, hub, url, versions, better))
            console.rule(f"[bold]Done in {time.monotonic() - began:.0f} s")
            show_next_steps(console, url, versions, keep=keep)
            if keep:
                console.print("The server is up until Ctrl-C.")
                with suppress(KeyboardInterrupt):
                    signal.pause()


def train_all(console: Console, hub: Hub, room: Path) -> tuple[list[Version], Version]:
    """All four behind `prod`, and a better version of the last one, which nothing points to yet."""
    lessons = shipped_lessons(RECIPES)
    versions = [train_one(console, hub, room / one.kind, one, "the demo's") for one in lessons[:-1]]
    last = lessons[-1]
    versions.append(train_one(console, hub, room / "early", first_try(last), "stopped early"))
    better = train_one(console, hub, room / last.kind, last, "trained to the end")
    for version in versions:
        hub.move_alias(version.pushed.name, version.pushed.version, "prod", note="the demo begins")
    return versions, better


def train_one(console: Console, hub: Hub, folder: Path, lesson: Lesson, note: str) -> Version:
    bar = LessonBar(console, f"{lesson.kind} learns {lesson.task.name}")
    try:
        version = learn(lesson, folder, hub, bar, note=note)
    finally:
        bar.close()
    console.print(f"  {version.label} {version.pushed.digest[:19]}… {note}", highlight=False)
    return version


async def show_all(console: Console, hub: Hub, url: str, versions: list[Version], better: Version) -> None:
    client = Client(url)
    try:
        rows = versions[0].lesson.task.rows("eval", HELD_OUT, HELD_OUT_SEED)
        await side_by_side(console, client, versions, asked(rows[0]))
        await swap(console, hub, client, versions, better, asked(rows[1]))
        final = [*versions[:-1], better]
        await compare(console, client, final, old=versions[-1])
        await fuse(console, client, final, asked(rows[2]))
    finally:
        await client.close()


async def side_by_side(console: Console, client: Client, versions: Sequence[Version], phrase: str) -> None:
    """Base and all four at once."""
    models = [BASE, *(prod(version) for version in versions)]
    texts = dict.fromkeys(models, "")
    with Live(streams_table(texts, phrase), console=console, refresh_per_second=12) as live:

        def grow(model: str, text: str) -> None:
            texts[model] = text
            live.update(streams_table(texts, phrase))

        await asyncio.gather(*(client.stream(model, phrase, partial(grow, model)) for model in models))
    console.print()  # rich leaves the cursor on the table's last line where no terminal is


async def swap(
    console: Console, hub: Hub, client: Client, versions: Sequence[Version], better: Version, phrase: str
) -> None:
    """Move `prod` to the better version while streams run; every text must be its own digest's."""
    console.rule("[bold]3  A better version, while streams run")
    old = versions[-1]
    models = [BASE, *(prod(version) for version in versions), prod(old)]
    alone = {
        answer.digest: answer.text
        for answer in [await client.ask(model, phrase) for model in models[:-1]]
        + [await client.ask(better.label, phrase)]
    }
    finished: Counter[str] = Counter()
    stop = asyncio.Event()

    async def keep_asking(model: str) -> None:
        while not stop.is_set():
            answer = await client.stream(model, phrase, lambda text: None)
            if answer.text != alone[answer.digest]:
                raise DemoFailed(f"{model} said {answer.text!r}, its digest alone says {alone[answer.digest]!r}")
            finished[answer.digest] += 1

    streams = [asyncio.create_task(keep_asking(models[place % len(models)])) for place in range(STREAMS)]
    try:
        await until(lambda: finished[old.pushed.digest] >= STREAMS, streams)
        moved = time.monotonic()
        hub.move_alias(better.pushed.name, better.pushed.version, "prod", note="the better version")
        await until(lambda: finished[better.pushed.digest] >= 1, streams)
        took = time.monotonic() - moved
        await until(lambda: finished[better.pushed.digest] >= STREAMS, streams)
    finally:
        stop.set()
        await asyncio.gather(*streams)
    console.print(
        f"{prod(old)} moved from {old.label} to {better.label} with {STREAMS} streams open: "
        f"{sum(finished.values())} streams finished, 0 dropped; the new version had answered after {took:.2f} s",
        highlight=False,
    )
    names = {"": BASE, better.pushed.digest: better.label} | {v.pushed.digest: v.label for v in versions}
    for digest, count in sorted(finished.items(), key=lambda item: names[item[0]]):
        console.print(f"  {names[digest]:<16} {digest[:19] or 'no adapter':<20} {count} streams", highlight=False)


async def until(condition: Callable[[], bool], streams: Sequence[asyncio.Task[None]]) -> None:
    """Wait for a condition that the streams bring about; a stream that fails ends the wait with its error."""
    deadline = time.monotonic() + SWAP_TIMEOUT_S
    while not condition():
        for stream in streams:
            if stream.done():
                stream.result()
        if time.monotonic() > deadline:
            raise DemoFailed(f"the new version did not serve within {SWAP_TIMEOUT_S} s")
        await asyncio.sleep(0.02)


async def compare(console: Console, client: Client, versions: Sequence[Version], *, old: Version) -> None:
    """Held-out accuracy of base and adapters as served, and token by token against PEFT."""
    console.rule("[bold]4  As good as trained, and equal to PEFT")
    lines = [await measure(client, version) for version in versions]
    before = await measure(client, old)
    console.print(results_table([*lines[:-1], before, lines[-1]], HELD_OUT))
    if before.served_accuracy >= lines[-1].served_accuracy:
        raise DemoFailed(f"{old.label} answers as well as {versions[-1].label}, which was to be better")
    for line in lines:
        if line.served_accuracy < GATE or line.base_accuracy > CEILING or line.equal_to_peft < line.compared:
            raise DemoFailed(
                f"{line.version.label}: served {line.served_accuracy:.3f} (at least {GATE}), base "
                f"{line.base_accuracy:.3f} (at most {CEILING}), equal to PEFT {line.equal_to_peft}/{line.compared}"
            )


async def measure(client: Client, version: Version) -> Line:
    rows = version.lesson.task.rows("eval", HELD_OUT, HELD_OUT_SEED)
    served = await client.answers(version.label, rows)
    base = await client.answers(BASE, rows)
    some = served[:COMPARED]
    theirs = await asyncio.to_thread(peft_answers, version, some)
    equal = sum(answer.ids == ids for answer, ids in zip(some, theirs, strict=True))
    return Line(version, exact_match(base, rows), exact_match(served, rows), equal, COMPARED)


async def fuse(console: Console, client: Client, versions: Sequence[Version], phrase: str) -> None:
    """Two adapters in one request: exactly the weighted sum of their deltas."""
    console.rule("[bold]5  Two adapters fused in one request")
    first, second = (version for version in versions if version.lesson.kind in ("ia3", "lora"))
    for left, right in ((1.0, 0.0), (0.7, 0.3), (0.3, 0.7), (0.0, 1.0)):
        answer: Answer = await client.ask(f"{prod(first)}*{left}+{prod(second)}*{right}", phrase)
        console.print(f"  {served_by(answer)}", highlight=False)
        console.print(f"    {phrase}  →  [bold]{answer.text}[/bold]", highlight=False)


def prod(version: Version) -> str:
    return f"{version.pushed.name}@prod"
