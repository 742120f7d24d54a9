"""Experts that lie in the folder of the router that pins them: pushed before it, under the names of its pins.

An adapter is flat, and stays so in the hub. A router that was trained together with its experts brings them in
`experts/NAME/`, each a whole adapter folder ("/" in a name is "-" there). Where the hub has the experts already, or the
folder was pulled, there is no such folder, and nothing here does anything.
Law: what lies in `experts/` has the digest that the router pins, or nothing at all is pushed.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hub.contract import Hub, Pushed
from hub.digest import sha256_of_stream
from hub.errors import Problem, Refused
from hub.manifest import CONFIG_FILE, MANIFEST_FILE, FileEntry, identity
from hub.methods import canonical_config, method_of
from hub.pins import PINNING_FIELD, Pin, pins_of
from hub.ref import check_alias, check_name, printable
from hub.strict_json import BadJson, parse
from hub.validate import TEXT_BYTES, open_regular

EXPERTS_FOLDER = "experts"


@dataclass(frozen=True, slots=True)
class Companion:
    folder: Path
    pin: Pin


def expert_folder(router: Path, name: str) -> Path:
    """Where a router's folder holds the expert of that name."""
    return router / EXPERTS_FOLDER / name.replace("/", "-")


def companions(folder: Path) -> tuple[Companion, ...]:
    """The experts in a router's folder, in the order of its pins; none in any other folder.

    Raises: Refused where one is not what the router pins.
    """
    place = folder / EXPERTS_FOLDER
    if place.is_symlink() or not place.is_dir() or not (pins := _pins(folder)):
        return ()
    wanted = {expert_folder(folder, pin.name).name: pin for pin in pins}
    found = {path.name: path for path in sorted(place.iterdir())}
    problems = [
        Problem(f"{EXPERTS_FOLDER}/{printable(name)}", None, "is no expert that the router pins: remove it")
        for name in found
        if name not in wanted
    ]
    there = [Companion(found[one], pin) for one, pin in wanted.items() if one in found]
    for one in there:
        if (digest := folder_digest(one.folder)) != one.pin.digest:
            reason = (
                f"is {digest}, where the router pins {one.pin.digest}: it is not the expert that was trained with it"
            )
            problems.append(Problem(f"{EXPERTS_FOLDER}/{one.folder.name}", None, reason))
    if problems:
        raise Refused(printable(folder.name), problems)
    return tuple(there)


def push_whole(
    hub: Hub, folder: Path, name: str, *, aliases: Sequence[str] = (), note: str = "", base: Path | None = None
) -> tuple[Pushed, tuple[Pushed, ...]]:
    """Push an adapter, and before it the experts that its folder holds. Raises: HubError."""
    check_name(name)
    for alias in aliases:
        check_alias(alias)
    there = companions(folder)
    if not there:
        return hub.push(folder, name, aliases=aliases, note=note, base=base), ()
    with TemporaryDirectory() as room:
        flat = Path(room) / folder.absolute().name
        _copy_flat(folder, flat)
        experts = tuple(hub.push(one.folder, one.pin.name, note=f"expert of {name}", base=base) for one in there)
        return hub.push(flat, name, aliases=aliases, note=note, base=base), experts


def folder_digest(folder: Path) -> str:
    """The digest that an adapter folder gets at a push, if the push accepts it. Raises: Refused."""
    if folder.is_symlink() or not folder.is_dir():
        raise Refused(printable(folder.name), [Problem(printable(folder.name), None, "is no folder")])
    config = _config(folder)
    names = sorted(path.name for path in folder.iterdir() if path.name not in (CONFIG_FILE, MANIFEST_FILE))
    entries = []
    for name in names:
        try:
            with open_regular(folder / name) as source:
                entries.append(FileEntry.model_construct(path=name, size=0, sha256=sha256_of_stream(source)))
        except OSError as error:
            raise Refused(printable(folder.name), [_unread(name, error)]) from None
    return identity(canonical_config(config), tuple(entries))


def _pins(folder: Path) -> tuple[Pin, ...]:
    """What the adapter pins; nothing where that cannot be told, which the push then says."""
    if not (folder / CONFIG_FILE).exists():
        return ()
    config = _config(folder)
    method = method_of(config)
    if isinstance(method, str) or PINNING_FIELD not in method.fields:
        return ()
    return pins_of(config) if method.fields[PINNING_FIELD].check(config.get(PINNING_FIELD)) is None else ()


def _config(folder: Path) -> dict[str, Any]:
    try:
        with open_regular(folder / CONFIG_FILE) as source:
            value = parse(source.read(TEXT_BYTES[CONFIG_FILE]))
    except OSError as error:
        raise Refused(printable(folder.name), [_unread(CONFIG_FILE, error)]) from None
    except BadJson as error:
        raise Refused(printable(folder.name), [Problem(CONFIG_FILE, None, f"is no usable JSON: {error}")]) from None
    if not isinstance(value, dict):
        raise Refused(printable(folder.name), [Problem(CONFIG_FILE, None, "must be a JSON object")])
    return value


def _copy_flat(folder: Path, target: Path) -> None:
    """The router without the folder of its experts, since an adapter is flat. Raises: Refused."""
    target.mkdir()
    for path in sorted(folder.iterdir()):
        if path.name == EXPERTS_FOLDER:
            continue
        try:
            with open_regular(path) as source, (target / path.name).open("wb") as copy:
                shutil.copyfileobj(source, copy)
        except OSError as error:
            raise Refused(printable(folder.name), [_unread(printable(path.name), error)]) from None


def _unread(name: str, error: OSError) -> Problem:
    return Problem(name, None, f"cannot be read: {error.strerror}")
