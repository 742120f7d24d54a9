"""The files of an adapter in, a Manifest or all their problems out; from a folder, or from wherever a hub keeps them.

Fails closed: a file, a field, a tensor or a value that is not known to be good is refused, and nothing in the folder
is ever run, unpickled or followed out of it.
Law: whatever the bytes in the folder, the outcome is a Manifest or Refused, never another error.
"""

from __future__ import annotations

import math
import os
import re
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from hub.base import Base, Modules, check_against_weights, describe_base, find_local_base, modules, name_of
from hub.centroids import centroids_problems
from hub.digest import DIGEST, sha256_of
from hub.errors import BaseNotFound, BaseUnusable, NotFound, Problem, Refused
from hub.families.method import Layout, Method
from hub.fidelity import served_exactly
from hub.manifest import (
    CENTROID_TENSORS_FILE,
    CENTROIDS_FILE,
    CONFIG_FILE,
    GOLDEN_ROWS_FILE,
    GOLDEN_TENSORS_FILE,
    MANIFEST_FILE,
    METRICS_FILE,
    README_FILE,
    RECIPE_FILE,
    TEMPLATE_FILE,
    WEIGHTS_FILE,
    FileEntry,
    Manifest,
    identity,
)
from hub.methods import (
    Limits,
    canonical_config,
    config_complaints,
    layout_of,
    method_of,
    shapes_are_told,
    virtual_tokens,
)
from hub.pins import pins_of
from hub.ref import is_name, printable
from hub.strict_json import BadJson, parse, readable
from hub.targets import matching_complaint
from hub.weights import Scan, golden_problems, scan_centroids, scan_golden, scan_weights

MAX_GOLDEN_BYTES = 512 << 20
MAX_CENTROID_BYTES = 64 << 20
MAX_FILES = 64
MAX_PROBLEMS = 1000

# What an adapter may consist of, with the most bytes of each; the tensor files have limits of their own.
TEXT_BYTES: Mapping[str, int] = {
    CONFIG_FILE: 1 << 20,
    GOLDEN_ROWS_FILE: 4 << 20,
    CENTROIDS_FILE: 64 << 10,
    RECIPE_FILE: 1 << 20,
    METRICS_FILE: 1 << 20,
    README_FILE: 1 << 20,
    TEMPLATE_FILE: 256 << 10,
    MANIFEST_FILE: 4 << 20,  # written by a pull; made anew at a push, never kept
}
JSON_OBJECTS = (CONFIG_FILE, GOLDEN_ROWS_FILE, CENTROIDS_FILE, RECIPE_FILE, METRICS_FILE)
PAIRS = ((GOLDEN_ROWS_FILE, GOLDEN_TENSORS_FILE), (CENTROIDS_FILE, CENTROID_TENSORS_FILE))
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz")
_PICKLE_STARTS = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04", b"\x93NUMPY")
_OF_THE_BASE = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt",
                "tokenizer.model", "added_tokens.json", "config.json", "generation_config.json")  # fmt: skip


# Opens one of the files for reading and tells its size in bytes. Raises: OSError.
Opener = Callable[[str], tuple[BinaryIO, int]]
# The base that a config means: what it is and its modules, or None for both when that cannot be told.
Described = tuple[Base | None, Modules | None]


@dataclass(slots=True)
class _Findings:
    """What has been read so far; problems are gathered, never thrown."""

    problems: list[Problem]
    texts: dict[str, bytes]
    values: dict[str, Any]

    def add(self, file: str, field: str | None, reason: str) -> None:
        self.problems.append(Problem(file, field, reason))


@dataclass(frozen=True, slots=True)
class _Demand:
    """What the tensors must be; None where that could not be told."""

    base: Base | None = None
    modules: Modules | None = None
    layout: Layout | None = None


def validate(folder: Path, *, base: Path | None = None, limits: Limits | None = None) -> Manifest:
    """The manifest of an adapter folder, on the base that its config names or on the given one.

    Raises: Refused with every problem; NotFound when there is no such folder.
    """
    if not folder.is_dir():
        raise NotFound(f"there is no folder {printable(str(folder))}")
    findings = _Findings([], {}, {})
    sizes = _files(folder, findings)

    def described(config: Any) -> Described:
        return _base(config, base, findings=findings)

    def opened(name: str) -> tuple[BinaryIO, int]:
        source = open_regular(folder / name)
        return source, os.fstat(source.fileno()).st_size

    what = printable(folder.name)
    return _validated(what, sizes, opened, described=described, findings=findings, limits=limits or Limits())


def validate_kept(
    what: str, sizes: Mapping[str, int], opened: Opener, *, base: Base, modules: Modules, limits: Limits | None = None
) -> Manifest:
    """The manifest of files that came over the network, on a base that is described rather than here.

    Raises: Refused with every problem.
    """
    findings = _Findings([], {}, {})
    reasons = {name: why_no_part(name) for name in sorted(sizes)}
    for name, reason in reasons.items():
        if reason is not None:
            findings.add(printable(name), None, reason)
    known = {name: size for name, size in sizes.items() if reasons[name] is None}
    _demand_both(known, findings)
    try:
        check_against_weights(base, modules)
    except BaseUnusable as error:
        findings.add(CONFIG_FILE, "base_model_name_or_path", str(error))
    return _validated(
        what, known, opened, described=lambda config: (base, modules), findings=findings, limits=limits or Limits()
    )


def describe(folder: Path, *, base: Path | None) -> tuple[Base, Modules]:
    """What `validate` checked an adapter folder against, for those who cannot see the base. Raises: BaseNotFound."""
    with open_regular(folder / CONFIG_FILE) as source:
        declared = parse(source.read(TEXT_BYTES[CONFIG_FILE])).get("base_model_name_or_path")
    found = base if base is not None else find_local_base(str(declared))
    return describe_base(found, name=name_of(found, declared)), modules(found)


def _validated(
    what: str,
    sizes: Mapping[str, int],
    opened: Opener,
    *,
    described: Callable[[Any], Described],
    findings: _Findings,
    limits: Limits,
) -> Manifest:
    _read_texts(sizes, opened, findings)
    config = findings.values.get(CONFIG_FILE)
    method = _method(config, findings)
    demand = _demand(config, method, described=described(config), findings=findings, limits=limits)
    if CENTROIDS_FILE in findings.values:
        findings.problems += centroids_problems(findings.values[CENTROIDS_FILE], demand.base)
    scans = _scan_tensors(sizes, opened, demand=demand, findings=findings, limits=limits)
    if findings.problems:
        raise Refused(what, _told(findings.problems))
    assert method is not None and demand.base is not None and demand.layout is not None and isinstance(config, dict)
    return _manifest(method, config, base=demand.base, layout=demand.layout, scans=scans, findings=findings)


def _told(problems: list[Problem]) -> list[Problem]:
    """All of them, unless they are more than anybody reads."""
    more = len(problems) - MAX_PROBLEMS
    if more <= 0:
        return problems
    return [*problems[:MAX_PROBLEMS], Problem(problems[-1].file, None, f"has more problems; {more} are not told")]


def file_limits(limits: Limits) -> Mapping[str, int]:
    """The files that an adapter may consist of, with the most bytes of each."""
    kept = {name: limit for name, limit in TEXT_BYTES.items() if name != MANIFEST_FILE}
    return {**kept, **_tensor_limits(limits)}


def _tensor_limits(limits: Limits) -> dict[str, int]:
    return {
        WEIGHTS_FILE: limits.max_weights_bytes,
        GOLDEN_TENSORS_FILE: MAX_GOLDEN_BYTES,
        CENTROID_TENSORS_FILE: MAX_CENTROID_BYTES,
    }


def config_bytes(manifest: Manifest) -> bytes:
    """adapter_config.json as it is kept: the canonical config in lines."""
    return readable(manifest.config)


def open_kept(folder: Path, manifest: Manifest, *, entry: FileEntry) -> BinaryIO:
    """One file of a validated folder as it is kept.

    Raises: OSError.
    """
    return BytesIO(config_bytes(manifest)) if entry.path == CONFIG_FILE else open_regular(folder / entry.path)


def open_regular(path: Path) -> BinaryIO:
    """Open a plain file for reading, never through a link and never a pipe.

    Raises: OSError.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(0, "is no plain file")
    return os.fdopen(descriptor, "rb")


def _files(folder: Path, findings: _Findings) -> dict[str, int]:
    """The sizes of the known files; everything else in the folder becomes a problem."""
    sizes: dict[str, int] = {}
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    if len(found) > MAX_FILES:
        findings.add(printable(folder.name), None, f"{len(found)} files are above the limit of {MAX_FILES}")
        found = found[:MAX_FILES]
    for entry in found:
        reason = _why_not_kept(entry)
        if reason is None:
            sizes[entry.name] = entry.stat(follow_symlinks=False).st_size
        else:
            findings.add(printable(entry.name), None, reason)
    _demand_both({entry.name: 0 for entry in found}, findings)
    return sizes


def _demand_both(names: Mapping[str, int], findings: _Findings) -> None:
    """What every adapter has, and what comes in pairs."""
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if name not in names:
            findings.add(name, None, "is missing")
    for one, other in (*PAIRS, *((second, first) for first, second in PAIRS)):
        if one in names and other not in names:
            findings.add(other, None, f"is missing beside {one}")


def _why_not_kept(entry: os.DirEntry[str]) -> str | None:
    name = entry.name
    if entry.is_symlink():
        return "is a symbolic link; copy the file itself here"
    if entry.is_dir(follow_symlinks=False):
        return "is a folder; an adapter is flat (push the checkpoint's own folder, or remove it)"
    if not entry.is_file(follow_symlinks=False):
        return "is no plain file"
    return why_no_part(name)


def why_no_part(name: str) -> str | None:
    """Why a file of this name is no part of an adapter, or None."""
    if name.lower().endswith(PICKLES):
        return "is a pickle or an archive of one, which can run code; only safetensors are read: remove it"
    if name in _OF_THE_BASE:
        return "belongs to the base, whose own is used; remove it"
    tensors = _tensor_limits(Limits())
    if name not in TEXT_BYTES and name not in tensors:
        kept = sorted([*TEXT_BYTES, *tensors])
        return f"is no part of an adapter, which is made of {', '.join(kept)}; remove it"
    return None


def _read_texts(sizes: Mapping[str, int], opened: Opener, findings: _Findings) -> None:
    for name in sorted(sizes.keys() & TEXT_BYTES.keys() - {MANIFEST_FILE}):
        limit = TEXT_BYTES[name]
        try:
            source, _ = opened(name)
            with source:
                data = source.read(limit + 1)
        except OSError as error:
            findings.add(name, None, f"cannot be read: {error.strerror}")
            continue
        if len(data) > limit:
            findings.add(name, None, f"has {sizes[name]} bytes, above the limit of {limit}")
        elif data.startswith(_PICKLE_STARTS):
            findings.add(name, None, "holds a pickle or an archive, whatever its name says")
        else:
            findings.texts[name] = data
            _parse_text(name, data, findings)


def _parse_text(name: str, data: bytes, findings: _Findings) -> None:
    if name in JSON_OBJECTS:
        try:
            value = parse(data)
        except BadJson as error:
            findings.add(name, None, f"is no usable JSON: {error}")
            return
        if not isinstance(value, dict):
            findings.add(name, None, f"must be a JSON object, not {type(value).__name__}")
            return
        findings.values[name] = value
        if name == GOLDEN_ROWS_FILE:
            findings.problems += golden_problems(value)
        if name == RECIPE_FILE:
            findings.problems += _recipe_problems(value)
    else:
        try:
            data.decode("utf-8")
        except UnicodeDecodeError as error:
            findings.add(name, None, f"is no UTF-8 text (byte {error.start})")


def _recipe_problems(recipe: dict[str, Any]) -> list[Problem]:
    """Only what the manifest takes out of a recipe must have a form; the rest is the trainer's own."""
    problems = []
    parents = recipe.get("parents")
    if parents is not None and not (isinstance(parents, list) and all(_is_digest(item) for item in parents)):
        problems.append(Problem(RECIPE_FILE, "parents", "must be a list of digests, sha256: and 64 of 0-9 a-f"))
    lineage = recipe.get("lineage")
    if lineage is not None and not _is_lineage(lineage, parents):
        reason = "must name each of parents in order, as {name, version, digest, weight}"
        problems.append(Problem(RECIPE_FILE, "lineage", reason))
    data = recipe.get("data")
    if data is not None and not isinstance(data, dict):
        problems.append(Problem(RECIPE_FILE, "data", "must be an object"))
    elif data is not None and not isinstance(data.get("digest"), str | None):
        problems.append(Problem(RECIPE_FILE, "data", "must have a text as its digest"))
    return problems


def _is_lineage(lineage: Any, parents: Any) -> bool:
    return (
        isinstance(lineage, list)
        and all(isinstance(item, dict) and set(item) == {"name", "version", "digest", "weight"} for item in lineage)
        and all(isinstance(item["name"], str) and is_name(item["name"]) for item in lineage)
        and all(type(item["version"]) is int and item["version"] > 0 for item in lineage)
        and all(type(item["weight"]) in (int, float) and math.isfinite(item["weight"]) for item in lineage)
        and [item["digest"] for item in lineage] == parents
    )


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(DIGEST, value) is not None


def _method(config: Any, findings: _Findings) -> Method | None:
    if config is None:
        return None
    method = method_of(config)
    if isinstance(method, str):
        findings.add(CONFIG_FILE, "peft_type", method)
        return None
    return method


def _base(config: Any, given: Path | None, *, findings: _Findings) -> Described:
    declared = None if config is None else config.get("base_model_name_or_path")
    declared = declared if isinstance(declared, str) and declared else None
    if given is None and declared is None:
        if config is not None:
            findings.add(CONFIG_FILE, "base_model_name_or_path", "names no base; name one with --base")
        return None, None
    try:
        folder = given if given is not None else find_local_base(str(declared))
        return describe_base(folder, name=name_of(folder, declared)), modules(folder)
    except (BaseNotFound, BaseUnusable) as error:
        findings.add(CONFIG_FILE, "base_model_name_or_path", f"{error}; name one with --base")
        return None, None


def _demand(
    config: Any, method: Method | None, *, described: Described, findings: _Findings, limits: Limits
) -> _Demand:
    base, found = described
    if method is None:
        return _Demand(base, found)
    for key, reason in config_complaints(method, config, limits):
        findings.add(CONFIG_FILE, key, reason)
    if base is None or found is None or not shapes_are_told(method, config):
        return _Demand(base, found)
    too_long = matching_complaint(config, found)
    if too_long is not None:
        findings.add(CONFIG_FILE, "target_modules", too_long)
        return _Demand(base, found)
    layout = layout_of(method, config, base, found)
    for key, reason in layout.complaints:
        findings.add(CONFIG_FILE, key, reason)
    return _Demand(base, found, layout)


def _scan_tensors(
    sizes: Mapping[str, int], opened: Opener, *, demand: _Demand, findings: _Findings, limits: Limits
) -> dict[str, Scan]:
    scans: dict[str, Scan] = {}
    for name, limit in _tensor_limits(limits).items():
        if name not in sizes:
            continue
        try:
            source, size = opened(name)
            with source:
                if size > limit:
                    findings.add(name, None, f"has {size} bytes, above the limit of {limit}")
                    continue
                if name == WEIGHTS_FILE:
                    scans[name] = scan_weights(source, size, layout=demand.layout, modules=demand.modules)
                elif name == GOLDEN_TENSORS_FILE:
                    rows = findings.values.get(GOLDEN_ROWS_FILE)
                    scans[name] = scan_golden(source, size, rows=rows, base=demand.base)
                else:
                    said = findings.values.get(CENTROIDS_FILE)
                    scans[name] = scan_centroids(source, size, said=said, base=demand.base)
        except OSError as error:
            findings.add(name, None, f"cannot be read: {error.strerror}")
            continue
        findings.problems += scans[name].problems
    return scans


def _manifest(
    method: Method,
    config: dict[str, Any],
    *,
    base: Base,
    layout: Layout,
    scans: Mapping[str, Scan],
    findings: _Findings,
) -> Manifest:
    canonical = canonical_config(config)
    texts = {**findings.texts, CONFIG_FILE: readable(canonical)}
    entries = [FileEntry(path=name, size=len(data), sha256=sha256_of(data)) for name, data in texts.items()]
    entries += [FileEntry(path=name, size=scan.size, sha256=scan.sha256) for name, scan in scans.items()]
    files = tuple(sorted(entries, key=lambda entry: entry.path))
    recipe = findings.values.get(RECIPE_FILE)
    weights = scans[WEIGHTS_FILE]
    pinned = [pin.digest for pin in pins_of(config)]
    return Manifest(
        digest=identity(canonical, files),
        kind=method.kind,
        base=base,
        config=canonical,
        files=files,
        rank=layout.rank,
        virtual_tokens=virtual_tokens(config),
        targets=layout.targets,
        parameters=sum(entry.elements for entry in weights.entries.values()),
        bytes=weights.size,
        exact=served_exactly(method.kind),
        parents=tuple(dict.fromkeys([*((recipe or {}).get("parents") or ()), *pinned])),
        recipe=recipe,
        data_digest=((recipe or {}).get("data") or {}).get("digest"),
        metrics=findings.values.get(METRICS_FILE),
    )
