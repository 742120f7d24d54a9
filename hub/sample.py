"""A small ready-made adapter of the embedded base, for trying a hub without training anything: task "shout".

Asked "red apple" it answers "RED APPLE". A soft prompt, trained by trainer/recipes/prompt.yaml.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from hub.errors import WouldOverwrite
from hub.ref import printable

SAMPLE = Path(__file__).parent / "samples" / "shout"


def write_sample(folder: Path) -> None:
    """Raises: WouldOverwrite when something is there."""
    if folder.exists():
        raise WouldOverwrite(f"{printable(str(folder))} is there already")
    shutil.copytree(SAMPLE, folder, ignore=shutil.ignore_patterns("__pycache__", "*.py"))
