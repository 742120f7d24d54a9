"""The registry: how fast bytes go in and out beside a plain copy with sha256, how long a lookup takes in a large hub,
and how soon a moved alias answers.

    python -m benchmarks.registry [--rounds 5] [--megabytes 256] [--names 10000] [--out benchmarks/results]

All over HTTP on the loopback: registry, server and client share the cores. Push includes what a push does: the client
checks every value and hashes, the registry hashes what arrives, checks it all again, and flushes to the disk.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import Any

import httpx
import sqlalchemy as sa

from benchmarks.machine import machine
from benchmarks.report import Counts, Report, command
from hub.client import RemoteHub
from hub.manifest import WEIGHTS_FILE
from hub.ref import parse_reference
from hub.registry import LocalHub
from hub.sample import write_sample
from hub.schema import aliases, files, manifests, open_database, versions, writing
from tests.large import write_large
from tests.registries import ADMIN_KEY, READ_KEY, Registry, running
from tests.system.conftest import serving

PACKAGES = ("multigraft", "fastapi", "uvicorn", "httpx", "SQLAlchemy")
VERSIONS = 3
LOOKUPS = 500
LISTINGS = 20
MOVES = 10


@dataclass(frozen=True)
class Rate:
    """Megabytes (2**20) per second."""

    copy: float
    push: float
    pull: float


def copy_with_sha256(source: Path, target: Path) -> None:
    """What any registry must do at the least: read, hash, write, flush."""
    hasher = hashlib.sha256()
    with source.open("rb") as read, target.open("wb") as written:
        while chunk := read.read(1 << 20):
            hasher.update(chunk)
            written.write(chunk)
        written.flush()
        os.fsync(written.fileno())


def throughput(room: Path, registry: Registry, megabytes: int, rounds: int) -> list[Rate]:
    rates = []
    hub = registry.hub()
    for number in range(rounds):
        folder = write_large(room / "large", megabytes=megabytes, seed=number)
        (folder / WEIGHTS_FILE).read_bytes()  # into the page cache, for all three alike
        out = room / f"out-{number}"
        name = f"bench/large-{number}"
        work = (
            partial(copy_with_sha256, folder / WEIGHTS_FILE, room / "copy"),
            partial(hub.push, folder, name),
            partial(hub.pull, parse_reference(name), out),
        )
        rates.append(Rate(*(megabytes / seconds(one) for one in work)))
        shutil.rmtree(folder)
        shutil.rmtree(out)
    return rates


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def fill(home: Path, names: int, sample: Path, base: Path | None = None) -> None:
    """Names with versions that were never pushed: rows as a push would make them, of the sample's manifest."""
    seed = LocalHub(home).push(sample, "bench/seed", base=base).digest
    engine = open_database(home / "catalogue.sqlite")
    with writing(engine) as connection:
        real = connection.execute(sa.select(manifests).where(manifests.c.digest == seed)).one()
        kept = connection.execute(sa.select(files.c.path, files.c.sha256).where(files.c.digest == seed)).all()
        rows: dict[str, list[dict[str, Any]]] = {"manifests": [], "files": [], "versions": [], "aliases": []}
        for number in range(names):
            name = f"team-{number % 100}/adapter-{number}"
            for version in range(1, VERSIONS + 1):
                digest = "sha256:" + hashlib.sha256(f"{name}@{version}".encode()).hexdigest()
                rows["manifests"].append({**real._mapping, "digest": digest})
                rows["files"] += [{"digest": digest, "path": path, "sha256": sha256} for path, sha256 in kept]
                about = {"actor": "bench", "note": "", "at": "2026-01-01T00:00:00+00:00", "removed_at": None}
                rows["versions"].append({"name": name, "version": version, "digest": digest, **about})
            rows["aliases"] += [
                {"name": name, "alias": "latest", "version": VERSIONS},
                {"name": name, "alias": "prod", "version": 1},
            ]
        for table in (manifests, files, versions, aliases):
            connection.execute(table.insert(), rows[table.name])


def lookups(hub: RemoteHub, local: LocalHub, names: int) -> dict[str, list[float]]:
    """Seconds of each call, in the registry's own process and over HTTP."""
    asked = [parse_reference(f"team-{n % 100}/adapter-{n}@prod") for n in range(0, names, max(1, names // LOOKUPS))]
    return {
        "resolve, local": [seconds(partial(local.resolve, one)) for one in asked],
        "resolve, HTTP": [seconds(partial(hub.resolve, one)) for one in asked],
        "ls of one namespace, HTTP": [seconds(partial(hub.adapters, "team-7/*")) for _ in range(LISTINGS)],
        "ls of all, local": [seconds(local.adapters) for _ in range(LISTINGS)],
        "ls of all, HTTP": [seconds(hub.adapters) for _ in range(LISTINGS)],
    }


def swaps(room: Path, registry: Registry, sample: Path, *, streams: int) -> list[float]:
    """Seconds from the order to move an alias until new requests on two servers are answered by the new version.

    The version is new to both, so its fetch, its load and its golden rows are in the time. `streams` run all the while.
    """
    hub = registry.hub()
    name = f"bench/bot-{streams}"
    hub.push(sample, name, aliases=["prod"])
    environment = {"HUB_URL": registry.url, "HUB_TOKEN": READ_KEY}
    waits = []
    with ExitStack() as stack:
        homes = [room / f"site-{streams}-{number}" for number in range(2)]
        urls = [stack.enter_context(serving(home, env=environment)).url for home in homes]
        done = Event()
        stack.callback(done.set)
        for number in range(streams):
            Thread(target=keep_streaming, args=(urls[number % 2], f"{name}@prod", done), daemon=True).start()
        clients = [stack.enter_context(httpx.Client(base_url=url, timeout=60)) for url in urls]
        for client in clients:
            answering(client, name)
        for number in range(MOVES):
            (sample / "README.md").write_text(f"version {number} of {streams}\n")
            version = hub.push(sample, name).version
            began = time.perf_counter()
            hub.move_alias(name, version, "prod")
            for client in clients:
                while answering(client, name) != version:
                    time.sleep(0.005)
            waits.append(time.perf_counter() - began)
    return waits


def keep_streaming(url: str, model: str, done: Event) -> None:
    body = {"model": model, "prompt": "red apple", "max_tokens": 64, "ignore_eos": True, "stream": True}
    with httpx.Client(timeout=60) as client, suppress(httpx.TransportError):
        while not done.is_set():
            with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
                for _ in answer.iter_lines():
                    pass


def answering(client: httpx.Client, name: str) -> int:
    """The version that answers now."""
    body = {"model": f"{name}@prod", "prompt": "red apple", "max_tokens": 1}
    return int(client.post("/v1/completions", json=body).raise_for_status().json()["adapters"][0]["version"])


def summary(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "median": statistics.median(ordered),
        "p99": ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))],
        "max": ordered[-1],
        "count": len(ordered),
    }


def run(room: Path, counts: Counts) -> Report:
    rounds, megabytes, names = counts["rounds"], counts["megabytes"], counts["names"]
    report: Report = {
        "machine": machine(PACKAGES),
        "megabytes": megabytes,
        "names": names,
        "versions": VERSIONS,
    }
    sample = room / "sample"
    write_sample(sample)
    with running(room / "hub") as registry:
        rates = throughput(room, registry, megabytes, rounds)
        report["megabytes_per_s"] = {
            kind: summary([getattr(one, kind) for one in rates]) for kind in ("copy", "push", "pull")
        }
        report["ratio_to_copy"] = {
            kind: summary([getattr(one, kind) / one.copy for one in rates]) for kind in ("push", "pull")
        }
        report["alias_move_to_answer_s"] = {
            f"{streams} streams": summary(swaps(room, registry, sample, streams=streams)) for streams in (0, 24)
        }
    fill(room / "many", names, sample)
    with running(room / "many") as registry:
        found = lookups(RemoteHub(registry.url, key=ADMIN_KEY), LocalHub(room / "many"), names)
        report["lookups_s"] = {what: summary(values) for what, values in found.items()}
    return report


def table(report: Report) -> str:
    lines = ["| | median | p99 | max |", "|---|---|---|---|"]
    for kind, rate in report["megabytes_per_s"].items():
        ratio = report["ratio_to_copy"].get(kind)
        beside = f" ({ratio['median']:.2f} of the copy)" if ratio else ""
        lines.append(f"| {kind}, MB/s | {rate['median']:.0f}{beside} | | {rate['max']:.0f} |")
    moves = {f"alias moved to both answers, {load}": one for load, one in report["alias_move_to_answer_s"].items()}
    timed = {**moves, **report["lookups_s"]}
    for what, one in timed.items():
        lines.append(f"| {what}, ms | {one['median'] * 1e3:.1f} | {one['p99'] * 1e3:.1f} | {one['max'] * 1e3:.1f} |")
    return "\n".join(lines)


def main() -> None:
    command("registry", __doc__, {"rounds": 5, "megabytes": 256, "names": 10_000}, run, table)


if __name__ == "__main__":
    main()
