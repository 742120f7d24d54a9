"""The command line `hub`: what a person types in, what a person or a program reads out.

The hub's own commands need nothing beyond this package. Those of the trainer and the server come in by the entry-point
group `hub.commands`, and only when one of them, or the list of all, is asked for.
Exit 0 done, 1 refused or failed (a clear line on stderr), 2 wrong usage.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from hub.connect import TOKEN_VARIABLE, URL_VARIABLE, open_hub, open_local, open_remote
from hub.contract import Adapter, Event, Hub, Resolved
from hub.errors import BadReference, HubError
from hub.ref import Reference, parse_reference, printable
from hub.registry import default_home

if TYPE_CHECKING:
    from hub.client import Progress

COMMANDS_GROUP = "hub.commands"
_OURS = ("hub", "server", "trainer")

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only what identifies the result.")]
Note = Annotated[str, typer.Option(help="Why: stands in the log.")]
Ref = Annotated[str, typer.Argument(metavar="REF", help="NAME, NAME@VERSION, NAME@ALIAS or NAME@sha256:...")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="[NAMESPACE/]SLUG, small letters.")]

Alias = Annotated[str, typer.Argument(metavar="ALIAS", help="A word such as prod; no number.")]


class HubCommands(TyperGroup):
    """Our own commands first; the other packages are asked only when these do not do. The edge for every error."""

    def list_commands(self, ctx: Any) -> list[str]:
        self._load_others()
        return list(super().list_commands(ctx))

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in self.commands:
            self._load_others()
        return super().get_command(ctx, cmd_name)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except HubError as error:
            fail(str(error))
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] in _OURS:
                raise
            fail(f"this command needs {error.name}, which is not installed: pip install 'multigraft[all]'")
        except BrokenPipeError:
            raise
        except OSError as error:
            fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")
        except KeyboardInterrupt:
            raise typer.Exit(130) from None

    def _load_others(self) -> None:
        from importlib.metadata import entry_points

        for entry in entry_points(group=COMMANDS_GROUP):
            others = typer.Typer()
            try:
                entry.load()(others)
            except ImportError as error:
                others.command(entry.name, help=f"Not usable here: {error}.")(_unusable(entry.name, error))
            for name, command in typer.main.get_group(others).commands.items():
                self.commands.setdefault(name, command)


_keys = typer.Typer(no_args_is_help=True, help="Make, list and revoke the keys of a hub that others reach.")
app = typer.Typer(cls=HubCommands, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)


def main() -> None:
    """The console script."""
    app(prog_name="hub")


def fail(message: str) -> None:
    """One refusal on stderr and exit 1."""
    typer.echo(f"hub: {message}", err=True)
    raise typer.Exit(1) from None


def print_version(wanted: bool) -> None:
    """What is installed; asked before anything else is looked at."""
    if wanted:
        typer.echo(f"multigraft {_installed_version()}")
        raise typer.Exit


@app.callback()
def hub_options(
    url: Annotated[
        str | None, typer.Option("--hub", envvar=URL_VARIABLE, help="A remote hub; without it the hub is local.")
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=print_version, help="Print the version and leave.")
    ] = False,
) -> None:
    """A registry of adapters for one language model: push, browse, move aliases, train, serve."""
    if url:
        os.environ[URL_VARIABLE] = url  # for every command of this process, those of the other packages too


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder in PEFT's format.")],
    name: Name,
    alias: Annotated[list[str] | None, typer.Option(help="Point this alias at it too; may be repeated.")] = None,
    note: Note = "",
    base: Annotated[
        str | None, typer.Option(help="The base to check against, if not the one that the config names.")
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Validate a folder and store it as the next version of NAME; the same bytes again are the same version."""
    from hub.base import find_base
    from hub.companions import push_whole

    with working(f"pushing {printable(str(folder))}") as progress:
        hub = open_hub(progress=progress)
        found = None if base is None else find_base(base)
        pushed, experts = push_whole(hub, folder, name, aliases=alias or (), note=note, base=found)
    for expert in experts:
        typer.echo(f"expert {expert.name}@{expert.version} {expert.digest}", err=True)
    if as_json:
        print_json(dataclasses.asdict(pushed))
    elif quiet:
        typer.echo(pushed.digest)
    else:
        typer.echo(f"{pushed.name}@{pushed.version} {pushed.digest}")
        if not pushed.created:
            typer.echo("the same bytes were there already", err=True)


@app.command()
def pull(
    ref: Ref,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where to write it: a new or an empty folder.")],
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Write an adapter as a folder that PEFT loads, whole or not at all; every byte is re-hashed."""
    with working(f"pulling {printable(ref)}") as progress:
        resolved = open_hub(progress=progress).pull(parse_reference(ref), folder)
    _print_resolved(resolved, quiet=quiet, as_json=as_json)


@app.command()
def verify(
    ref: Annotated[str | None, typer.Argument(metavar="[REF]", help="Without it: every version of every name.")] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Re-hash every byte of a version, or of the whole hub."""
    hub = open_hub()
    wanted = every_version(hub) if ref is None else [parse_reference(ref)]
    with working(f"verifying {len(wanted)} {'version' if len(wanted) == 1 else 'versions'}"):
        outcomes = [_outcome(hub, reference) for reference in wanted]
    if as_json:
        print_json([outcome for _, outcome in outcomes])
    for whole, outcome in outcomes:
        if not whole:
            typer.echo(f"hub: {outcome['error']}", err=True)
        elif not quiet and not as_json:
            typer.echo(
                f"{outcome['name']}@{outcome['version']} {outcome['digest']} whole: "
                f"{outcome['files']} files, {outcome['bytes']} bytes"
            )
    if not all(whole for whole, _ in outcomes):
        raise typer.Exit(1)


@app.command()
def ls(
    pattern: Annotated[
        str | None, typer.Argument(metavar="[PATTERN]", help="Names that fit; * and ? stand for anything.")
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """List the adapters, their versions and aliases."""
    found = open_hub().adapters(pattern)
    if as_json:
        print_json([_listing(adapter) for adapter in found])
    elif quiet:
        for adapter in found:
            typer.echo(adapter.name)
    elif not found:
        typer.echo("nothing here yet" if pattern is None else f"nothing fits {printable(pattern)}", err=True)
    else:
        from hub import tables

        tables.print_table(tables.adapters_table(found))


@app.command()
def show(ref: Ref, as_json: AsJson = False) -> None:
    """Show one version: digest, base, shapes, metrics, lineage, files."""
    from hub.fidelity import deviation, served_exactly

    hub = open_hub()
    resolved = hub.resolve(parse_reference(ref))
    manifest = hub.manifest(resolved.digest)
    adapter = hub.adapters(resolved.name)[0]
    version = next(item for item in adapter.versions if item.version == resolved.version)
    pointing = sorted(alias for alias, target in adapter.aliases.items() if target == resolved.version)
    if as_json:
        pushed = {"at": version.at, "by": version.actor, "note": version.note}
        off = deviation(manifest)
        print_json(
            {
                "name": resolved.name,
                "version": resolved.version,
                "digest": resolved.digest,
                "aliases": pointing,
                "pushed": pushed,
                "served_exactly": served_exactly(manifest.kind),
                "deviation": None if off is None else dataclasses.asdict(off),
                "manifest": manifest.model_dump(mode="json"),
            }
        )
    else:
        from hub import tables

        tables.print_table(tables.version_table(version, manifest, name=resolved.name, aliases=pointing))


@app.command()
def log(name: Name, as_json: AsJson = False) -> None:
    """Show everything that happened to NAME: who moved what when, and why."""
    found = open_hub().log(name)
    if as_json:
        print_json([dataclasses.asdict(event) for event in found])
    else:
        from hub import tables

        tables.print_table(tables.log_table(found))


@app.command()
def diff(
    before: Annotated[str, typer.Argument(metavar="REF")],
    after: Annotated[str, typer.Argument(metavar="REF")],
    as_json: AsJson = False,
) -> None:
    """Show what parts two versions: config, files, metrics, lineage."""
    difference = open_hub().diff(parse_reference(before), parse_reference(after))
    if as_json:
        print_json(dataclasses.asdict(difference))
    elif not difference.changes:
        typer.echo("no difference", err=True)
    else:
        from hub import tables

        tables.print_table(tables.difference_table(difference))


@app.command()
def alias(
    ref: Annotated[str, typer.Argument(metavar="NAME@N", help="The version to point at.")],
    alias: Alias,
    expect: Annotated[
        int | None, typer.Option(min=0, help="Move only if the alias points to this version now; 0: to none.")
    ] = None,
    note: Note = "",
    as_json: AsJson = False,
) -> None:
    """Point an alias at a version, by compare-and-set when --expect is given."""
    hub = open_hub()
    resolved = hub.resolve(parse_reference(ref))
    event = hub.move_alias(resolved.name, resolved.version, alias, expect=expect, note=note)
    if event is None and not as_json:
        typer.echo(f"{resolved.name}@{alias} points to version {resolved.version} already", err=True)
    else:
        _print_move(event, as_json=as_json)


@app.command()
def rollback(name: Name, alias: Alias, note: Note = "", as_json: AsJson = False) -> None:
    """Point an alias back to where it was before; again, and it goes further back."""
    _print_move(open_hub().rollback(name, alias, note=note), as_json=as_json)


@app.command()
def rm(
    ref: Annotated[str, typer.Argument(metavar="NAME@N", help="The version, by its number or digest.")],
    note: Note = "",
    as_json: AsJson = False,
) -> None:
    """Remove a version; refused while an alias points there or a router needs it. Its number is never used again."""
    reference = parse_reference(ref)
    if reference.version is None and reference.digest is None:
        raise BadReference(f"{ref} names no version to remove; write {reference.name}@VERSION")
    hub = open_hub()
    resolved = hub.resolve(reference)
    event = hub.remove(resolved.name, resolved.version, note=note)
    if as_json:
        print_json(dataclasses.asdict(event))
    else:
        typer.echo(f"removed {event.name}@{event.version} {event.digest}; hub gc frees its bytes")


@app.command()
def gc(as_json: AsJson = False) -> None:
    """Free the bytes that no version needs and no running push is about to need."""
    with working("collecting"):
        freed = open_hub().collect()
    if as_json:
        print_json(dataclasses.asdict(freed))
    else:
        typer.echo(f"freed {freed.blobs} blobs, {freed.bytes} bytes")


@app.command()
def base(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Without it: list the embedded bases.")] = None,
    as_json: AsJson = False,
) -> None:
    """Print the folder of a base: a plain Hugging Face model folder."""
    from hub.base import describe_base, embedded_bases, find_base

    if name is None:
        names = embedded_bases()
        if as_json:
            print_json([describe_base(find_base(item), name=item).model_dump(mode="json") for item in names])
        else:
            for item in names:
                typer.echo(item)
        return
    folder = find_base(name)
    if as_json:
        print_json({"folder": str(folder), **describe_base(folder).model_dump(mode="json")})
    else:
        typer.echo(folder)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what this machine can do, what it cannot, and why not."""
    from hub.doctor import examine

    findings = examine(default_home())
    if as_json:
        print_json([dataclasses.asdict(finding) for finding in findings])
        return
    for finding in findings:
        mark = {True: "+", False: "-", None: " "}[finding.good]
        typer.echo(f"{mark} {finding.topic + ':':20} {finding.found}")


@app.command()
def sample(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where to write it: a new folder.")],
) -> None:
    """Write a small ready-made adapter of the embedded base: something to push and to ask."""
    from hub.sample import write_sample

    write_sample(folder)
    typer.echo(str(folder))


@app.command()
def login(
    url: Annotated[str, typer.Argument(metavar="URL", help="The hub's address, such as https://hub.example.")],
    key: Annotated[
        str | None, typer.Option("--key", envvar=TOKEN_VARIABLE, help="The key; without it you are asked, unseen.")
    ] = None,
) -> None:
    """Store the key of a remote hub, for you alone, and for that address alone."""
    from hub.credentials import store_key

    if key is None:
        if not sys.stdin.isatty():
            raise BadReference("no key: give --key, set HUB_TOKEN, or run this in a terminal")
        key = typer.prompt("key", hide_input=True)
    asking = open_remote(url, key=key).whoami()
    where = store_key(default_home(), url, key)
    typer.echo(f"{url} knows you as {asking.name}, who may {', '.join(sorted(asking.scopes))}; stored in {where}")
    typer.echo(f"use it with: export {URL_VARIABLE}={url}", err=True)


@app.command()
def logout(url: Annotated[str, typer.Argument(metavar="URL")]) -> None:
    """Forget the key of a remote hub."""
    from hub.credentials import forget_key

    typer.echo(f"{'forgot the key of' if forget_key(default_home(), url) else 'there was no key for'} {url}", err=True)


@app.command(context_settings={"auto_envvar_prefix": "MULTIGRAFT_REGISTRY"})
def registry(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65535)] = 8080,
    anonymous: Annotated[
        list[str] | None, typer.Option(help="A scope for whoever shows no key: read, push ...; may be repeated.")
    ] = None,
    max_body_bytes: Annotated[int, typer.Option(help="Bytes of the request that ends a push.", min=1)] = 16 << 20,
    max_rank: Annotated[int, typer.Option(help="Largest rank of an adapter.", min=1)] = 256,
    max_virtual: Annotated[int, typer.Option(help="Most virtual tokens of an adapter.", min=1)] = 1024,
    max_weights_bytes: Annotated[int, typer.Option(help="Bytes of an adapter's weights.", min=1)] = 8 << 30,
    max_connections: Annotated[int, typer.Option(help="Open connections; the silent ones leave first.", min=1)] = 1024,
    max_watchers: Annotated[int, typer.Option(help="Open event streams.", min=1)] = 512,
    header_timeout: Annotated[float, typer.Option(help="Seconds for a request's head to arrive.", min=0.1)] = 10.0,
    body_timeout: Annotated[float, typer.Option(help="Seconds between two arrivals of a body.", min=0.1)] = 30.0,
    drain_timeout: Annotated[
        float, typer.Option(help="Seconds that running requests get after SIGTERM.", min=0)
    ] = 30.0,
    collect: Annotated[float, typer.Option(help="Seconds between two collections; 0: only hub gc.", min=0)] = 3600.0,
) -> None:
    """Serve the hub on this machine to others, over HTTP.

    Nobody gets in without a key: make one with hub key create NAME --scope admin, or set MULTIGRAFT_REGISTRY_ADMIN_KEY
    (all scopes) and MULTIGRAFT_REGISTRY_READ_KEY (read). Every option is read from MULTIGRAFT_REGISTRY_OPTION, too.
    """
    from hub.http.config import RegistryConfig
    from hub.http.serve import serve
    from hub.keys import SCOPES
    from hub.methods import Limits
    from hub.registry import LocalHub

    strange = [scope for scope in anonymous or () if scope not in SCOPES]
    if strange:
        raise BadReference(f"--anonymous {printable(strange[0])}: known are {', '.join(SCOPES)}")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for chatty in ("alembic", "httpx"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    limits = Limits(max_rank=max_rank, max_virtual_tokens=max_virtual, max_weights_bytes=max_weights_bytes)
    config = RegistryConfig(
        host=host,
        port=port,
        admin_key=os.environ.get("MULTIGRAFT_REGISTRY_ADMIN_KEY") or None,
        read_key=os.environ.get("MULTIGRAFT_REGISTRY_READ_KEY") or None,
        anonymous=frozenset(anonymous or ()),
        max_body_bytes=max_body_bytes,
        max_connections=max_connections,
        max_watchers=max_watchers,
        header_timeout_s=header_timeout,
        body_timeout_s=body_timeout,
        drain_timeout_s=drain_timeout,
        collect_s=collect,
    )
    serve(LocalHub(default_home(), limits=limits), config)


@_keys.command("create")
def create_key(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Whose key it is, such as ci or alice; stands in the log.")
    ],
    scope: Annotated[list[str], typer.Option(help="read, push, promote or admin; may be repeated.")],
    names: Annotated[
        list[str] | None, typer.Option(help="Only names that fit, such as 'team/*'; may be repeated.")
    ] = None,
    days: Annotated[float | None, typer.Option(help="When it expires; without it, never.", min=0.001)] = None,
    as_json: AsJson = False,
) -> None:
    """Make a key, and print it this once: the hub keeps only its hash."""
    life_s = None if days is None else days * 86400
    wanted = names or ["*"]
    url = os.environ.get(URL_VARIABLE)
    if url:
        created = open_remote(url).create_key(name, scope, names=wanted, life_s=life_s)
    else:
        from hub.registry import system_user

        created = open_local().keys.create(name, scope, names=wanted, life_s=life_s, actor=system_user())
    if as_json:
        print_json(dataclasses.asdict(created))
    else:
        typer.echo(created.secret)
        typer.echo(f"key {created.key.key} of {name}: {', '.join(created.key.scopes)}", err=True)


@_keys.command("ls")
def list_keys(as_json: AsJson = False) -> None:
    """List the keys that were made, and what became of them; never the keys themselves."""
    url = os.environ.get(URL_VARIABLE)
    found = open_remote(url).keys() if url else open_local().keys.listed()
    if as_json:
        print_json([dataclasses.asdict(key) for key in found])
    else:
        from hub import tables

        tables.print_table(tables.keys_table(found))


@_keys.command("revoke")
def revoke_key(key: Annotated[str, typer.Argument(metavar="KEY", help="Its id, as hub key ls shows it.")]) -> None:
    """Make a key useless, at once and for ever."""
    url = os.environ.get(URL_VARIABLE)
    revoked = open_remote(url).revoke_key(key) if url else open_local().keys.revoke(key)
    typer.echo(f"revoked key {revoked.key} of {revoked.name}")


def every_version(hub: Hub) -> list[Reference]:
    """A reference to each live version of each name."""
    return [Reference(adapter.name, str(version.version)) for adapter in hub.adapters() for version in adapter.versions]


def print_json(value: Any) -> None:
    """For programs: stable keys, times in ISO 8601."""
    typer.echo(json.dumps(value, indent=2, default=_jsonable))


@contextmanager
def working(what: str) -> Iterator[Progress | None]:
    """A spinner on stderr while something takes its time, and a bar for each file that travels; nothing when nobody
    watches."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich import progress
    from rich.console import Console

    columns = (
        progress.SpinnerColumn(),
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        bars.add_task(what, total=None)
        files: dict[str, progress.TaskID] = {}

        def show(file: str, there: int, size: int) -> None:
            if file not in files:
                files[file] = bars.add_task(file, total=size)
            bars.update(files[file], completed=there)

        yield show


def _outcome(hub: Hub, reference: Reference) -> tuple[bool, dict[str, Any]]:
    from hub.errors import Corrupt

    try:
        return True, dataclasses.asdict(hub.verify(reference)) | {"whole": True}
    except Corrupt as error:
        return False, {"name": reference.name, "selector": reference.selector, "whole": False, "error": str(error)}


def _print_resolved(resolved: Resolved, *, quiet: bool, as_json: bool) -> None:
    if as_json:
        print_json(dataclasses.asdict(resolved))
    elif quiet:
        typer.echo(resolved.digest)
    else:
        typer.echo(f"{resolved.name}@{resolved.version} {resolved.digest}")


def _print_move(event: Event | None, *, as_json: bool) -> None:
    if as_json:
        print_json(None if event is None else dataclasses.asdict(event))
    elif event is not None:
        before = "nowhere" if event.previous is None else event.previous
        typer.echo(f"{event.name}@{event.alias}: {before} -> {event.version} {event.digest}")


def _listing(adapter: Adapter) -> dict[str, Any]:
    versions = [{"version": item.version, "digest": item.digest, "kind": item.kind} for item in adapter.versions]
    return {"name": adapter.name, "versions": versions, "aliases": dict(adapter.aliases)}


def _jsonable(value: Any) -> str:
    if isinstance(value, datetime):
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _unusable(name: str, error: ImportError) -> Any:
    def explain() -> None:
        fail(f"hub {name} is not usable here: {error}; pip install 'multigraft[{name}]'")

    return explain


def _installed_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("multigraft")
    except PackageNotFoundError:
        return "(not installed)"


app.add_typer(_keys, name="key")

if __name__ == "__main__":
    main()
