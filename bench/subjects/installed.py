"""Packages that only rivals need: measured if installed, else left out with the reason."""

import importlib
from typing import Any


class NotInstalledError(Exception):
    """A rival's package is missing; the message is the status of its rows."""


def package(name: str) -> Any:
    """The package ``name`` of the extra ``rivals``, imported.

    Raises:
        NotInstalledError: it is not installed. Errors inside an installed package are raised as they are.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise NotInstalledError("not installed: pip install '.[rivals]' in the checkout") from None
