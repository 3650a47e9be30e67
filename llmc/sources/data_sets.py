"""The package `datasets`, which reads data sets of the Hugging Face hub."""

from __future__ import annotations

from typing import Any

from llmc.errors import UserError

OLDEST = 4  # older ones may run a script that a data set brings along


def datasets_library(what: str, instead: str = "") -> Any:
    """The package `datasets` in a version that runs no code of a data set.

    what: what needs it, for the error. instead: what the user can do without it, for the hint.
    """
    try:
        import datasets

        if int(datasets.__version__.split(".")[0]) < OLDEST:
            raise ImportError(f"{datasets.__version__} is too old")
    except ImportError as e:
        raise UserError(f"{what} needs the package `datasets`, {OLDEST} or newer ({e})",
                        f"{instead}{', or ' if instead else ''}pip install 'datasets>={OLDEST}'") from e
    return datasets
