"""Keeps the libraries from talking over a run: their advice is for programmers, their progress bars cover ours."""

import warnings
from logging import ERROR, getLogger


def quiet_libraries() -> None:
    """Silence what the libraries of a training run print about themselves. Errors are still raised."""
    quiet_models()
    import datasets

    datasets.disable_progress_bars()


def quiet_models() -> None:
    """The same for work that only loads models and adapters, and so without the libraries that train."""
    for library in ("transformers", "trl", "peft", "datasets", "torch"):
        warnings.filterwarnings("ignore", module=library)
    getLogger("bitsandbytes").setLevel(ERROR)  # it tells of every product that it rounds its inputs
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
