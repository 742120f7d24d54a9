"""How a run tells what it is doing: to a Reporter, so that a terminal, a log and the demo each show it their way."""

import sys
from dataclasses import dataclass
from typing import Any, Final, Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@dataclass(frozen=True)
class Step:
    number: int  # steps done
    of: int
    loss: float | None  # None until the first one was logged
    tokens_per_s: float


class Reporter(Protocol):
    def note(self, text: str) -> None: ...

    def step(self, step: Step) -> None: ...


class Silent:
    def note(self, text: str) -> None:
        pass

    def step(self, step: Step) -> None:
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


class Bar:
    """A progress bar with loss and tokens per second."""

    def __init__(self, console: Console) -> None:
        columns: tuple[Any, ...] = (
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=console, refresh_per_second=4)
        self._task = self._progress.add_task("training", total=None, state="")

    def note(self, text: str) -> None:
        self._progress.console.print(text, highlight=False, markup=False)

    def step(self, step: Step) -> None:
        self._progress.start()
        self._progress.update(self._task, completed=step.number, total=step.of, state=describe(step))
        if step.number == step.of:
            self._progress.stop()

    def close(self) -> None:
        self._progress.stop()


def describe(step: Step) -> str:
    loss = "loss   ...  " if step.loss is None else f"loss {step.loss:.4f}"
    return f"{loss}  {step.tokens_per_s:,.0f} tokens/s"


def terminal_reporter() -> Bar | Lines:
    """Show a bar to a person at a terminal, lines to everything else; on stderr, since stdout holds the result."""
    if sys.stderr.isatty():
        return Bar(Console(stderr=True))
    return Lines(sys.stderr)
