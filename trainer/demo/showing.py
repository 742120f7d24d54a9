"""What the demo puts on the terminal: bars, streams side by side, tables. No decision is taken here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from trainer.demo.asking import Answer
from trainer.demo.lessons import BASE, Version
from trainer.progress import Step, describe


class LessonBar:
    """One training run as a line of its own. Off a terminal rich prints the finished line only."""

    def __init__(self, console: Console, title: str) -> None:
        self._progress = Progress(
            TextColumn(f"{title:<24}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            console=console,
        )
        self._task = self._progress.add_task(title, total=None, state="")
        self._progress.start()

    def note(self, text: str) -> None:
        """The demo tells its own story."""

    def step(self, step: Step) -> None:
        self._progress.update(self._task, completed=step.number, total=step.of, state=describe(step))

    def close(self) -> None:
        self._progress.stop()


@dataclass(frozen=True)
class Line:
    """One row of the demo's table. Accuracies are shares of held-out items, asked over HTTP."""

    version: Version
    base_accuracy: float
    served_accuracy: float
    equal_to_peft: int
    compared: int


def streams_table(texts: Mapping[str, str], phrase: str) -> Table:
    """Every model's text as it grows, side by side."""
    table = Table(title=f'the same question to all of them, in one batch: "{phrase}"', expand=True)
    for model in texts:
        table.add_column(model.removeprefix("demo/"), overflow="fold", ratio=1)
    table.add_row(*texts.values())
    return table


def results_table(lines: Sequence[Line], rows: int) -> Table:
    table = Table(
        title=f"{rows} unseen items each, over HTTP",
        caption="= PEFT: prompts to which PEFT alone gives the same answer, token by token",
    )
    for column in ("adapter", "kind", "bytes", "parameters", "base", "served", "= PEFT"):
        table.add_column(column, justify="left" if column in ("adapter", "kind") else "right", no_wrap=True)
    for line in lines:
        table.add_row(
            line.version.label,
            line.version.lesson.kind,
            f"{line.version.weight_bytes:,}",
            f"{line.version.result.parameters:,}",
            f"{line.base_accuracy:.3f}",
            f"{line.served_accuracy:.3f}",
            f"{line.equal_to_peft}/{line.compared}",
        )
    return table


def served_by(answer: Answer) -> str:
    """What an answer says of itself, in the words of a mixture."""
    if not answer.adapters:
        return BASE
    return " + ".join(f"{one['ref']}*{one['weight']:g} ({str(one['digest'])[:15]}…)" for one in answer.adapters)


def show_next_steps(console: Console, url: str, versions: Sequence[Version], *, keep: bool) -> None:
    """The lines to try next, as they would be typed."""
    name = versions[-1].pushed.name
    if not keep:
        console.print("The server is stopped. Start it again, or run [bold]hub demo --keep[/bold]:")
        console.print(f"  hub serve --base {BASE}", highlight=False)
        url = "http://127.0.0.1:8000"
    console.print("Ask it from a shell:")
    body = f'{{"model": "{name}@prod", "messages": [{{"role": "user", "content": "red apple old lamp"}}]}}'
    console.print(
        f"  curl -s {url}/v1/chat/completions -H 'content-type: application/json' -d '{body}'",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip
    console.print("or from Python:")
    for line in (
        "from openai import OpenAI",
        f'client = OpenAI(base_url="{url}/v1", api_key="none")',
        f'answer = client.chat.completions.create(model="{name}@prod", '
        'messages=[{"role": "user", "content": "red apple old lamp"}])',
        "print(answer.choices[0].message.content)",
    ):
        console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"and see what the hub holds: [bold]hub ls[/bold], [bold]hub log {name}[/bold]")
