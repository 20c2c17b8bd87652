"""Packages that only some uses need: imported where they are used, with one error that says how to get them."""

import importlib
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Import `module`, which comes with `pip install "spa3r_hf[extra]"`.

    Raises:
        ImportError: The package is missing; the message names the extra that brings it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f'{module} is needed here: pip install "spa3r_hf[{extra}]"') from error
