"""`hub fuse` and `hub extract`: adapters out of what is there already, without training. No torch until they work."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from hub.errors import BadReference, HubError
from hub.methods import Limits
from hub.ref import parse_mixture, parse_reference
from trainer.cli import DeviceName, failures_on_stderr
from trainer.errors import ExtractionRefused, OutputExists

if TYPE_CHECKING:
    from hub.contract import Pushed
    from trainer.progress import Bar, Lines


class FuseMethod(StrEnum):
    CAT = "cat"
    LINEAR = "linear"
    SVD = "svd"
    TIES = "ties"
    DARE_TIES = "dare_ties"
    DARE_LINEAR = "dare_linear"
    MAGNITUDE_PRUNE = "magnitude_prune"


EXACT: Final = (FuseMethod.CAT, FuseMethod.LINEAR)
DICE: Final = (FuseMethod.DARE_TIES, FuseMethod.DARE_LINEAR)
LARGEST_RANK: Final = Limits().max_rank

Aliases = Annotated[list[str] | None, typer.Option("--alias", help="Point this alias at it too; may be repeated.")]
Note = Annotated[str, typer.Option(help="Why: stands in the log.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
OnDevice = Annotated[DeviceName, typer.Option(help="Where to compute.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; default: all cores.")]
Energy = Annotated[
    float | None,
    typer.Option(help="Instead of --rank: the least rank per Linear that keeps this share of the squared norm."),
]


def fuse_command(
    mixture: Annotated[str, typer.Argument(metavar="MIXTURE", help="Such as legal@prod*0.7+tone*0.3.")],
    method: Annotated[FuseMethod, typer.Option(help="How; docs/fuse.md says what each computes.")],
    name: Annotated[str, typer.Option("--as", metavar="NAME", help="Push the fused adapter under this name.")],
    rank: Annotated[
        int | None, typer.Option(min=1, help="All but cat and linear: the rank; default: the parents' largest.")
    ] = None,
    energy: Energy = None,
    density: Annotated[
        float | None,
        typer.Option(help="ties, dare_*, magnitude_prune: the share of each delta's entries that is kept."),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="dare_*: which entries are dropped; default 0.")] = None,
    base: Annotated[str | None, typer.Option(help="The base, if not the one that the adapters name.")] = None,
    alias: Aliases = None,
    note: Note = "",
    device: OnDevice = DeviceName.AUTO,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Build a fused version of several adapters offline, with its parents as lineage and its measured error."""
    check_fuse_options(method, rank, energy, density, seed)
    check_push_name("--as", name)
    from hub.base import find_base
    from hub.connect import open_hub
    from hub.ref import format_mixture

    terms = parse_mixture(mixture)
    hub = open_hub()
    with failures_on_stderr(), working("fusing", threads) as report, scratch() as work:
        from trainer.fuse import Plan, fuse

        folder = work / "fused"
        folder.mkdir()
        plan = Plan(method.value, rank, energy, density, seed or 0)
        fused = fuse(hub, terms, folder, plan=plan, work=work, base=base, device=device.value, report=report)
        pushed = hub.push(
            folder,
            name,
            aliases=tuple(alias or ()),
            note=note or f"fuse {method.value} {format_mixture(terms)}",
            base=find_base(str(fused.base_folder)),
        )
    if as_json:
        made = {"method": method.value, "parents": fused.recipe["lineage"], "metrics": dict(fused.metrics)}
        typer.echo(json.dumps({"pushed": pushed_json(pushed), **made}, indent=2))
        return
    metrics = fused.metrics
    typer.echo(f"relative error against the exact sum of the deltas: {metrics['relative_error']:.3g}{worst(metrics)}")
    if method.value not in (*EXACT, FuseMethod.SVD):
        typer.echo(f"of which the rank alone takes {metrics['rank_error']:.3g}")
    typer.echo(f"{pushed.name}@{pushed.version} {pushed.digest}")


def extract_command(
    base: Annotated[str, typer.Argument(metavar="BASE", help="An embedded base, a folder, or a Hugging Face id.")],
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="The whole fine-tune: a model folder or an id.")],
    rank: Annotated[int | None, typer.Option(min=1, help="The rank at every Linear.")] = None,
    energy: Energy = None,
    max_rank: Annotated[int, typer.Option(min=1, help="With --energy: the largest rank of a Linear.")] = LARGEST_RANK,
    out: Annotated[Path | None, typer.Option(help="The folder to write the adapter to.")] = None,
    push: Annotated[str | None, typer.Option(metavar="NAME", help="Push it to the hub under this name.")] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse where anything differs that an adapter of Linears leaves out.")
    ] = False,
    alias: Aliases = None,
    note: Note = "",
    device: OnDevice = DeviceName.AUTO,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Turn a whole fine-tune into a low-rank adapter of its base, with its measured error."""
    if (rank is None) == (energy is None):
        raise typer.BadParameter("give --rank N or --energy E")
    check_share("--energy", energy)
    if out is None and push is None:
        raise typer.BadParameter("give --out FOLDER, --push NAME or both")
    if push is None and (alias or note):
        raise typer.BadParameter("--alias and --note go with --push")
    with failures_on_stderr():
        hub = None
        if push is not None:
            check_push_name("--push", push)
            check_hub_rank(rank if rank is not None else max_rank)
            from hub.connect import open_hub

            hub = open_hub()
        if out is not None and out.exists():
            raise OutputExists(f"{out} is already there")
    with failures_on_stderr(), working("extracting", threads) as report:
        from trainer.export import publish
        from trainer.extract import Plan, extract, told_of

        with scratch(beside=out) as work:
            folder = work / "adapter"
            folder.mkdir()
            plan = Plan(rank, energy, max_rank)
            made = extract(base, tuned, folder, plan=plan, strict=strict, device=device.value, report=report)
            pushed = None
            if hub is not None:
                try:
                    pushed = hub.push(folder, str(push), aliases=tuple(alias or ()), note=note, base=made.base_folder)
                except HubError:
                    if out is not None:
                        publish(folder, out)
                        typer.echo(f"the extracted adapter stays in {out}", err=True)
                    raise
            if out is not None:
                publish(folder, out)
    if as_json:
        where = {"folder": None if out is None else str(out), "pushed": pushed and pushed_json(pushed)}
        typer.echo(json.dumps({**where, "metrics": dict(made.metrics)}, indent=2))
        return
    typer.echo(told_of(made.metrics))
    if out is not None:
        typer.echo(f"adapter in {out}")
    if pushed is not None:
        typer.echo(f"{pushed.name}@{pushed.version} {pushed.digest}")


def check_fuse_options(
    method: FuseMethod, rank: int | None, energy: float | None, density: float | None, seed: int | None
) -> None:
    """What does not go together is wrong usage."""
    if method in EXACT and (rank is not None or energy is not None):
        raise typer.BadParameter(f"{method} is exact: --rank and --energy go with svd and the merges")
    if rank is not None and energy is not None:
        raise typer.BadParameter("--rank and --energy exclude each other")
    merges = method not in (*EXACT, FuseMethod.SVD)
    if merges and density is None:
        raise typer.BadParameter(f"{method} needs --density")
    if not merges and density is not None:
        raise typer.BadParameter(f"{method} keeps every entry: --density goes with ties, dare_* and magnitude_prune")
    if seed is not None and method not in DICE:
        raise typer.BadParameter(f"{method} throws no dice: --seed goes with dare_ties and dare_linear")
    check_share("--energy", energy)
    check_share("--density", density)


def check_share(option: str, value: float | None) -> None:
    if value is not None and not 0 < value <= 1:
        raise typer.BadParameter(f"{option} is {value}, not above 0 and at most 1")


def check_push_name(option: str, name: str) -> None:
    if parse_reference(name).selector is not None:
        raise BadReference(f"{option} {name}: a name is wanted, without a version or alias")


def check_hub_rank(rank: int) -> None:
    if rank > LARGEST_RANK:
        raise ExtractionRefused(f"rank {rank} is above max_rank {LARGEST_RANK} (the largest that the hub accepts)")


def worst(metrics: Any) -> str:
    """Where it is worst, when there is an error worth a word."""
    if not metrics.get("worst_linear") or metrics["linears_fused"] < 2:
        return ""
    return f" (worst: {metrics['worst_relative_error']:.3g} at {metrics['worst_linear']})"


def pushed_json(pushed: Pushed) -> dict[str, Any]:
    return {"reference": f"{pushed.name}@{pushed.version}", **dataclasses.asdict(pushed)}


@contextmanager
def scratch(beside: Path | None = None) -> Iterator[Path]:
    """A folder that is gone afterwards; on the disk of the folder that it becomes."""
    parent = None if beside is None else beside.absolute().parent
    if parent is not None:
        parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".multigraft-", dir=parent) as name:
        yield Path(name)


@contextmanager
def working(work: str, threads: int | None) -> Iterator[Bar | Lines]:
    """The libraries, quiet, and a bar or lines on stderr."""
    from trainer.progress import Bar, terminal_reporter
    from trainer.quiet import quiet_libraries

    report = terminal_reporter(work)
    report.note("loading the libraries")
    quiet_libraries()
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    try:
        yield report
    finally:
        if isinstance(report, Bar):
            report.close()
