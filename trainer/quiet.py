"""Keeps the libraries from talking over a run: their advice is for programmers, their progress bars cover ours."""

import warnings


def quiet_libraries() -> None:
    """Silence what transformers, datasets and PEFT print about themselves. Errors are still raised."""
    for library in ("transformers", "trl", "peft", "datasets", "torch"):
        warnings.filterwarnings("ignore", module=library)
    import datasets
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
