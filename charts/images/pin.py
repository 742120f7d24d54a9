"""Write down what is installed here of what the images need:
python charts/images/pin.py > charts/images/constraints.txt

Only packages that the extras reach are named; what torch itself pins (the CUDA libraries) it pins without us.
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

EXTRAS = ("registry", "serve", "train")
BUILD = ("setuptools",)
LEFT_TO_TORCH = ("nvidia-", "triton", "cuda-")


def pins() -> dict[str, str]:
    """Name -> version, of the project's requirements and of theirs in turn."""
    found: dict[str, str] = {}
    open_ = [Requirement(name) for name in BUILD] + [Requirement(f"multigraft[{','.join(EXTRAS)}]")]
    done: set[str] = set()
    while open_:
        wanted = open_.pop()
        name = canonicalize_name(wanted.name)
        if str(wanted) in done or name.startswith(LEFT_TO_TORCH):
            continue
        done.add(str(wanted))
        try:
            there = distribution(name)
        except PackageNotFoundError:
            continue  # needed on another platform only
        if name != "multigraft":
            found[name] = Version(there.version).public
        for line in there.requires or ():
            inner = Requirement(line)
            if inner.marker is None or any(inner.marker.evaluate({"extra": extra}) for extra in ("", *wanted.extras)):
                open_.append(inner)
    return found


if __name__ == "__main__":
    sys.stdout.writelines(f"{name}=={version}\n" for name, version in sorted(pins().items()))
