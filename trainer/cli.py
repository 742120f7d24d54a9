"""`hub train`: a recipe or flags in, an adapter folder or a version in the hub out. No torch until it trains."""

import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from importlib.resources import files
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer
import yaml

from trainer.errors import RecipeInvalid, TrainError
from trainer.method import Method
from trainer.methods import METHODS
from trainer.recipe import Recipe, method_of, parse_recipe, read_fields

if TYPE_CHECKING:
    from trainer.train import TrainResult

RECIPES: Final = Path(str(files("trainer"))) / "recipes"


class DeviceName(StrEnum):
    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


@dataclass(frozen=True)
class Destination:
    """Where the adapter goes: into a folder, into the hub, or both."""

    out: Path
    keep: bool  # whether the user asked for the folder, or it is only on its way to the hub
    push: str | None
    aliases: tuple[str, ...]
    note: str


def register(app: typer.Typer) -> None:
    from trainer.commands import extract_command, fuse_command  # they share this file's parts

    app.command("train")(train_command)
    app.command("import")(import_command)
    app.command("centroids")(centroids_command)
    app.command("fuse")(fuse_command)
    app.command("extract")(extract_command)


def train_command(
    recipe: Annotated[
        str | None,
        typer.Argument(help="A recipe in YAML, a recipe.json, or the name of one that ships with Multigraft."),
    ] = None,
    method: Annotated[str | None, typer.Option(help=f"One of: {', '.join(METHODS)}.")] = None,
    base: Annotated[
        str | None, typer.Option(help="An embedded base, a folder, or an id on the Hugging Face Hub.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="A file of chat JSON lines, or task:NAME[:ROWS].")] = None,
    eval_data: Annotated[
        str | None, typer.Option(help="Held-out rows; without it a share of the data is held out.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The folder to write the adapter to.")] = None,
    push: Annotated[
        str | None, typer.Option(metavar="NAME", help="Push the adapter to the hub under this name.")
    ] = None,
    alias: Annotated[list[str] | None, typer.Option(help="With --push: an alias to move there.")] = None,
    note: Annotated[str, typer.Option(help="With --push: a note for the log.")] = "",
    steps: Annotated[int | None, typer.Option(help="How many optimizer steps to train for.")] = None,
    epochs: Annotated[float | None, typer.Option(help="How often to go through the data, instead of steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows in a batch.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate; each method has its own.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Leave out rows of more tokens than this.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    quantize: Annotated[str | None, typer.Option(help="Hold the frozen base in nf4 or int8 (QLoRA).")] = None,
    rank: Annotated[int | None, typer.Option(help="lora and its like, loreft: the rank.")] = None,
    alpha: Annotated[float | None, typer.Option(help="lora: alpha.")] = None,
    targets: Annotated[
        str | None, typer.Option(help="lora, ia3 and others: the modules to adapt, with commas.")
    ] = None,
    experts: Annotated[str | None, typer.Option(help="lora-moe: the adapters to route among, with commas.")] = None,
    virtual_tokens: Annotated[int | None, typer.Option(help="prefix, prompt, p-tuning: how many.")] = None,
    init: Annotated[str | None, typer.Option(help="lora, prefix, prompt: the first values.")] = None,
    init_text: Annotated[
        str | None, typer.Option(help="prompt: the text whose embeddings are the first values.")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Any other option of the method; see --list.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of this run.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
    checkpoint_steps: Annotated[int, typer.Option(min=1, help="Save a checkpoint every so many steps.")] = 200,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: all cores.")] = None,
    device: Annotated[DeviceName, typer.Option(help="Where to train.")] = DeviceName.AUTO,
    show_list: Annotated[bool, typer.Option("--list", help="List the methods and their options.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the list, or the result, as JSON.")] = False,
) -> None:
    """Train an adapter on a base: a recipe or flags in, a folder or a version in the hub out."""
    if show_list:
        typer.echo(methods_json() if as_json else methods_text())
        return
    if resume and overwrite:
        raise typer.BadParameter("--resume and --overwrite exclude each other")
    fields = {
        "method": method, "base": base, "data": data, "eval_data": eval_data, "steps": steps, "epochs": epochs,
        "batch_size": batch_size, "learning_rate": learning_rate, "max_length": max_length, "seed": seed,
        "quantize": quantize,
    }  # fmt: skip
    options = {
        "rank": rank, "alpha": alpha, "targets": targets.split(",") if targets else None,
        "experts": experts.split(",") if experts else None,
        "virtual_tokens": virtual_tokens, "init": init, "init_text": init_text, **parse_options(option or []),
    }  # fmt: skip
    destination = parse_destination(out, push, tuple(alias or ()), note)
    existing: Literal["refuse", "resume", "overwrite"] = "resume" if resume else "overwrite" if overwrite else "refuse"
    with failures_on_stderr():
        read = named(merge(recipe, given(fields), given(options)), destination)
        result = run(read, destination, existing, checkpoint_steps, threads, device)
        version = push_result(result, read, destination) if destination.push else None
    typer.echo(result_json(result, destination, version) if as_json else result_text(result, destination, version))


def import_command(
    folder: Annotated[Path, typer.Argument(help="A folder that AdapterHub's `adapters` library saved.")],
    out: Annotated[Path, typer.Argument(help="The folder to write, for `hub push`.")],
    base: Annotated[str | None, typer.Option(help="The base; default: the one that the folder names.")] = None,
) -> None:
    """Convert an adapter of AdapterHub's library into one that `hub push` takes, exactly or not at all."""
    from trainer.adapterhub.command import import_folder

    with failures_on_stderr():
        kind = import_folder(folder, out, base)
    typer.echo(f"{kind} adapter in {out}; hub push {out} NAME puts it into the hub")


def centroids_command(
    folder: Annotated[Path, typer.Argument(help="An adapter that has none, or old ones.")],
    data: Annotated[str, typer.Option(help="What it is for: a file of chat JSON lines, or task:NAME[:ROWS].")],
    base: Annotated[str | None, typer.Option(help="The base; default: the one that the adapter names.")] = None,
    max_length: Annotated[int | None, typer.Option(min=1, help="Leave out rows of more tokens than this.")] = None,
    device: Annotated[DeviceName, typer.Option(help="Where to run the base.")] = DeviceName.AUTO,
) -> None:
    """Write beside an adapter where its prompts lie, so that model auto can choose it. Push it again afterwards."""
    with failures_on_stderr():
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see docs/decisions/0009
        from trainer.quiet import quiet_libraries

        quiet_libraries()
        from trainer.centroids import add_centroids

        prompts = add_centroids(folder, data, base=base, max_length=max_length, device=device.value)
    typer.echo(f"centroids of {prompts} prompts in {folder}")


def run(
    recipe: Recipe,
    destination: Destination,
    existing: Literal["refuse", "resume", "overwrite"],
    checkpoint_steps: int,
    threads: int | None,
    device: DeviceName,
) -> "TrainResult":
    """Train with a bar, and stop at the next step when a signal asks for it."""
    if destination.push:
        check_push(destination, recipe)
    from trainer.progress import Bar, terminal_reporter
    from trainer.quiet import quiet_libraries

    report = terminal_reporter()
    report.note("loading the libraries")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see docs/decisions/0009
    quiet_libraries()
    from trainer.train import Workshop, train

    workshop = Workshop(existing=existing, checkpoint_steps=checkpoint_steps, threads=threads, device=device.value)
    try:
        with stop_on_signals() as stop:
            return train(recipe, destination.out, workshop=workshop, report=report, stop=stop)
    finally:
        if isinstance(report, Bar):
            report.close()


def merge(source: str | None, flags: Mapping[str, Any], options: Mapping[str, Any]) -> Recipe:
    """Lay the flags over the recipe file, if there is one."""
    fields = read_fields(find_recipe(source)) if source else {}
    if "steps" in flags or "epochs" in flags:
        fields = {name: value for name, value in fields.items() if name not in ("steps", "epochs")}
    merged = {**fields, **flags}
    written = fields.get("options")
    if options and (written is None or isinstance(written, Mapping)):
        merged["options"] = {**(written or {}), **options}
    return parse_recipe(merged, source or "the flags")


def named(recipe: Recipe, destination: Destination) -> Recipe:
    """The recipe with what follows from the name that its adapter is pushed under. Raises RecipeInvalid."""
    if destination.push is None:
        return recipe
    try:
        options = method_of(recipe).named(recipe.options, destination.push)
    except ValueError as error:
        raise RecipeInvalid(f"--push {destination.push}", [str(error)]) from None
    return recipe.model_copy(update={"options": options})


def find_recipe(source: str) -> Path:
    """A file, or the name of a recipe that ships with the package."""
    if Path(source).is_file():
        return Path(source)
    shipped = {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}
    if source not in shipped:
        raise RecipeInvalid(
            source, [f"is neither a file nor a recipe that ships with Multigraft: {', '.join(shipped)}"]
        )
    return shipped[source]


def given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def parse_options(pairs: list[str]) -> dict[str, Any]:
    """Read NAME=VALUE pairs, the value as YAML would read it."""
    options = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise typer.BadParameter(f"--option {pair}: NAME=VALUE is wanted")
        options[name] = yaml.safe_load(value)
    return options


def parse_destination(out: Path | None, push: str | None, aliases: tuple[str, ...], note: str) -> Destination:
    if push is None and out is None:
        raise typer.BadParameter("give --out FOLDER, --push NAME or both")
    if push is None and (aliases or note):
        raise typer.BadParameter("--alias and --note go with --push")
    folder = out if out is not None else Path(str(push).replace("/", "-"))
    return Destination(folder, out is not None, push, aliases, note)


def check_push(destination: Destination, recipe: Recipe) -> None:
    """Refuse before the work what the push would refuse after it: the name, the hub, an adapter above its limits."""
    from hub.connect import open_hub
    from hub.errors import BadReference
    from hub.methods import Limits
    from hub.ref import parse_reference

    if parse_reference(str(destination.push)).selector is not None:
        raise BadReference(f"--push {destination.push}: a name is wanted, without a version or alias")
    open_hub()
    limits = Limits()
    options = recipe.options
    sizes = (
        ("rank", getattr(options, "saved_rank", getattr(options, "rank", 0)), limits.max_rank),
        ("virtual_tokens", getattr(options, "virtual_tokens", 0), limits.max_virtual_tokens),
    )
    problems = [f"{name} {size} is above the hub's limit of {limit}" for name, size, limit in sizes if size > limit]
    if problems:
        raise RecipeInvalid(f"--push {destination.push}", problems)


def push_result(result: "TrainResult", recipe: Recipe, destination: Destination) -> str:
    """Push the folder; return `NAME@N sha256:...`. A folder that was only on its way to the hub is then deleted."""
    from hub.base import find_base
    from hub.companions import push_whole
    from hub.connect import open_hub
    from hub.errors import HubError

    try:
        pushed, experts = push_whole(
            open_hub(),
            result.folder,
            str(destination.push),
            aliases=destination.aliases,
            note=destination.note,
            base=find_base(recipe.base),
        )
    except HubError:
        typer.echo(f"the trained adapter stays in {result.folder}", err=True)
        raise
    for expert in experts:
        typer.echo(f"expert {expert.name}@{expert.version} {expert.digest}", err=True)
    if not destination.keep:
        shutil.rmtree(result.folder)
    return f"{pushed.name}@{pushed.version} {pushed.digest}"


@contextmanager
def failures_on_stderr() -> Iterator[None]:
    """Turn what a user can cause into its message on stderr and exit code 1, as the hub does with its own errors."""
    try:
        yield
    except TrainError as error:
        typer.echo(f"hub: {error}", err=True)
        raise typer.Exit(1) from None


@contextmanager
def stop_on_signals() -> Iterator[Event]:
    """Give an event that the first SIGINT or SIGTERM sets; the second one acts as ever."""
    stop = Event()
    former = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: object) -> None:
        stop.set()
        restore()
        # Not print: the signal may come while stderr is being written, and its buffer cannot be entered twice.
        os.write(sys.stderr.fileno(), b"\nstopping after this step, with a checkpoint; once more stops at once\n")

    def restore() -> None:
        for number, handler in former.items():
            signal.signal(number, handler)

    for number in former:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        restore()


def methods_text() -> str:
    lines = []
    for method in METHODS.values():
        lines.append(f"{method.name}: {method.summary}")
        for name, default, text in options_of(method):
            lines.append(f"    {name} = {default}: {text}" if default is not None else f"    {name}: {text}")
    shipped = ", ".join(path.stem for path in sorted(RECIPES.glob("*.yaml")))
    return "\n".join([*lines, f"recipes that ship with Multigraft: {shipped}"])


def methods_json() -> str:
    return json.dumps(
        [
            {
                "method": method.name,
                "summary": method.summary,
                "learning_rate": method.learning_rate,
                "options": [
                    {"name": name, "default": default, "description": text}
                    for name, default, text in options_of(method)
                ],
            }
            for method in METHODS.values()
        ],
        indent=2,
    )


def options_of(method: Method) -> list[tuple[str, Any, str]]:
    return [
        (name, None if field.is_required() else field.default, field.description or "")
        for name, field in method.options.model_fields.items()
    ]


def result_text(result: "TrainResult", destination: Destination, version: str | None) -> str:
    metrics = result.metrics
    line = (
        f"{metrics['eval_exact_match']:.1%} of {metrics['eval_rows']} held-out rows answered exactly "
        f"(bare base {metrics['base_exact_match']:.1%}), loss {metrics['eval_loss']:.4f} "
        f"(bare base {metrics['base_eval_loss']:.4f}); {result.steps - result.resumed_at} steps "
        f"in {result.train_s:.1f} s"
    )
    lines = [line]
    if destination.keep:
        lines.append(f"adapter in {result.folder}")
    return "\n".join([*lines, version] if version else lines)


def result_json(result: "TrainResult", destination: Destination, version: str | None) -> str:
    name, _, digest = (version or "").partition(" ")
    return json.dumps(
        {
            "folder": str(result.folder) if destination.keep else None,
            "pushed": {"reference": name, "digest": digest} if version else None,
            "parameters": result.parameters,
            "steps": result.steps,
            "metrics": dict(result.metrics),
        },
        indent=2,
    )
