"""How a person sees the hub's records in a terminal; programs read the JSON beside it instead."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hub.contract import LATEST, Adapter, Difference, Event, Version
from hub.fidelity import deviation, served_as
from hub.keys import Key
from hub.manifest import Manifest

SHORT_DIGEST = len("sha256:") + 12
# Wide enough that nothing is cut when the output goes into a file or a pipe.
PIPE_COLUMNS = 240
_SHOWN_ITEMS = 6
_UNITS = ("kB", "MB", "GB", "TB")
_DIGEST = re.compile(r"[0-9a-f]{64}")


def print_table(table: Table) -> None:
    """On standard output, without markup, so that a name or a note cannot colour or hide anything."""
    width = None if sys.stdout.isatty() else PIPE_COLUMNS
    console = Console(markup=False, highlight=False, emoji=False, width=width)
    with console.capture() as captured:
        console.print(table)
    for line in captured.get().splitlines():
        typer.echo(line.rstrip())


def adapters_table(adapters: Iterable[Adapter]) -> Table:
    """One line per name: its newest version and where its aliases point."""
    table = _table("NAME", "VERSIONS", "KIND", "SIZE", "ALIASES", "PUSHED", "BY")
    for adapter in adapters:
        newest = adapter.versions[-1]
        table.add_row(
            adapter.name,
            _numbers([version.version for version in adapter.versions]),
            _one_line(newest.kind),
            size(newest.bytes),
            aliases_text(adapter.aliases),
            moment(newest.at),
            _one_line(newest.actor),
        )
    return table


def version_table(version: Version, manifest: Manifest, *, name: str, aliases: Sequence[str]) -> Table:
    """One version in full: a line per fact."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    base = manifest.base
    facts: dict[str, str | None] = {
        "name": f"{name}@{version.version}",
        "digest": manifest.digest,
        "kind": manifest.kind,
        "aliases": ", ".join(aliases) or None,
        "pushed": f"{moment(version.at)} by {_one_line(version.actor)}",
        "note": _one_line(version.note) or None,
        "base": f"{base.name}  ({base.model_type}, {base.layers} layers, hidden {base.hidden_size}, "
        f"{base.heads} heads over {base.kv_heads} KV heads; fingerprint {base.fingerprint[:12]})",
        "rank": _text(manifest.rank),
        "virtual tokens": _text(manifest.virtual_tokens),
        "targets": ", ".join(manifest.targets) or None,
        "parameters": f"{manifest.parameters:,}",
        "size": f"{size(manifest.bytes)}  ({manifest.bytes:,} bytes)",
        "served": served_as(manifest.kind),
        "made by": _making(manifest.recipe),
        "deviation": _text(deviation(manifest)),
        "parents": _parents(manifest),
        "data": _text(manifest.data_digest),
        "metrics": _pairs(manifest.metrics),
        "files": "\n".join(f"{entry.path}  {size(entry.size)}" for entry in manifest.files),
    }
    for fact, text in facts.items():
        if text is not None:
            table.add_row(fact, Text(text))
    return table


def log_table(events: Iterable[Event]) -> Table:
    """One line per event, oldest first."""
    table = _table("SEQ", "WHEN", "WHO", "WHAT", "NOTE")
    for event in events:
        table.add_row(str(event.seq), moment(event.at), _one_line(event.actor), what(event), _one_line(event.note))
    return table


def difference_table(difference: Difference) -> Table:
    """One line per field that differs."""
    before, after = difference.before, difference.after
    table = _table("FIELD", f"{before.name}@{before.version}", f"{after.name}@{after.version}")
    for change in difference.changes:
        table.add_row(change.field, _short(change.before), _short(change.after))
    return table


def keys_table(keys: Iterable[Key]) -> Table:
    """One line per key."""
    table = _table("KEY", "NAME", "SCOPES", "NAMES", "MADE", "BY", "STATE")
    for key in keys:
        made = moment(key.at), _one_line(key.actor)
        table.add_row(key.key, key.name, " ".join(key.scopes), " ".join(key.names), *made, _state(key))
    return table


def what(event: Event) -> str:
    """What an event did, in the words of the command line."""
    if event.kind == "pushed":
        return f"pushed {event.name}@{event.version} {(event.digest or '')[:SHORT_DIGEST]}"
    if event.kind == "removed":
        return f"removed {event.name}@{event.version}"
    step = "rolled back" if event.rollback else "moved"
    return f"{step} {event.alias} {'-' if event.previous is None else event.previous} -> {event.version}"


def aliases_text(aliases: Mapping[str, int]) -> str:
    """`latest` first, then by name."""
    ordered = sorted(aliases.items(), key=lambda item: (item[0] != LATEST, item[0]))
    return " ".join(f"{alias}={version}" for alias, version in ordered)


def size(count: int) -> str:
    """Bytes in powers of ten, as disks and downloads are counted."""
    if count < 1000:
        return f"{count} B"
    exponent = min((len(str(count)) - 1) // 3, len(_UNITS))
    return f"{count / 1000**exponent:.1f} {_UNITS[exponent - 1]}"


def moment(at: datetime) -> str:
    """In the reader's own time zone."""
    return at.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _state(key: Key) -> str:
    if key.revoked_at is not None:
        return f"revoked {moment(key.revoked_at)}"
    if key.expires_at is None:
        return "alive"
    return f"{'expired' if key.expires_at <= datetime.now(UTC) else 'until'} {moment(key.expires_at)}"


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(Text(column), overflow="fold")
    return table


def _numbers(numbers: Sequence[int]) -> str:
    """1-3,5 rather than 1,2,3,5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _parents(manifest: Manifest) -> str | None:
    """A parent a line, with its weight where the recipe tells it."""
    lineage = (manifest.recipe or {}).get("lineage")
    if not lineage:
        return ", ".join(manifest.parents) or None
    return "\n".join(f"{item['name']}@{item['version']} * {item['weight']:g}  {item['digest']}" for item in lineage)


def _making(recipe: Mapping[str, Any] | None) -> str | None:
    """How it came about without training, and by which settings."""
    for how, key in (("fuse", "fusion"), ("extract", "extraction")):
        settings = (recipe or {}).get(key)
        if isinstance(settings, dict) and settings:
            return " ".join([how, *(f"{name}={_text(value)}" for name, value in settings.items())])
    return None


def _pairs(metrics: Mapping[str, Any] | None) -> str | None:
    return None if not metrics else "\n".join(f"{key} = {_text(value)}" for key, value in sorted(metrics.items()))


def _text(value: Any) -> str | None:
    if isinstance(value, dict | list) and len(value) > _SHOWN_ITEMS:
        return f"{len(value)} entries, which --json shows"
    return None if value is None else _one_line(f"{value:.6g}" if isinstance(value, float) else str(value))


def _short(value: Any) -> str:
    """Twelve digits of a digest tell two apart, and `hub show` has them all."""
    return _DIGEST.sub(lambda match: match[0][:12], _text(value) or "-")


def _one_line(text: str) -> str:
    """Control characters of a stranger's text must not reach the terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)
