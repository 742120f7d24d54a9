"""How a run tells what it is doing: to a Reporter, so that a terminal, a log and the demo each show it their way."""

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, TextIO, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")


@dataclass(frozen=True)
class Step:
    number: int  # steps done
    of: int
    loss: float | None  # None until the first one was logged
    tokens_per_s: float


class Reporter(Protocol):
    def note(self, text: str) -> None: ...

    def step(self, step: Step) -> None: ...


class Counter(Protocol):
    """For work that goes through a list, such as the Linears of a base."""

    def note(self, text: str) -> None: ...

    def count(self, done: int, of: int, what: str) -> None: ...


class Silent:
    def note(self, text: str) -> None:
        pass

    def step(self, step: Step) -> None:
        pass

    def count(self, done: int, of: int, what: str) -> None:
        pass


SILENT: Final = Silent()


class Lines:
    """A line for each tenth of the run: for logs, and wherever no terminal is watching."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def note(self, text: str) -> None:
        print(text, file=self._out, flush=True)

    def step(self, step: Step) -> None:
        tenth = max(1, step.of // 10)
        if step.number % tenth == 0 or step.number == step.of:
            self.note(f"step {step.number}/{step.of}  {describe(step)}")

    def count(self, done: int, of: int, what: str) -> None:
        if done % math.ceil(of / 10) == 0 or done == of:
            self.note(f"{done}/{of} {what}")


class Bar:
    """A progress bar with loss and tokens per second, or with what is counted."""

    def __init__(self, console: Console, work: str) -> None:
        columns: tuple[Any, ...] = (
            TextColumn(work),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=console, refresh_per_second=4)
        self._task = self._progress.add_task(work, total=None, state="")

    def note(self, text: str) -> None:
        self._progress.console.print(text, highlight=False, markup=False)

    def step(self, step: Step) -> None:
        self._progress.start()
        self._progress.update(self._task, completed=step.number, total=step.of, state=describe(step))
        if step.number == step.of:
            self._progress.stop()

    def count(self, done: int, of: int, what: str) -> None:
        self._progress.start()
        self._progress.update(self._task, completed=done, total=of, state=what)
        if done == of:
            self._progress.stop()

    def close(self) -> None:
        self._progress.stop()


def counted(items: Sequence[T], what: str, report: Counter) -> Iterator[T]:
    """Go through the items and tell how many are done."""
    for number, item in enumerate(items, start=1):
        yield item
        report.count(number, len(items), what)


def describe(step: Step) -> str:
    loss = "loss   ...  " if step.loss is None else f"loss {step.loss:.4f}"
    return f"{loss}  {step.tokens_per_s:,.0f} tokens/s"


def terminal_reporter(work: str = "training") -> Bar | Lines:
    """Show a bar to a person at a terminal, lines to everything else; on stderr, since stdout holds the result."""
    if sys.stderr.isatty():
        return Bar(Console(stderr=True), work)
    return Lines(sys.stderr)
