"""Packages that only rivals need: measured where they are installed, left out with a reason where they are not."""

import importlib
from typing import Any


class NotInstalledError(Exception):
    """A rival's package is missing; the message is the status of its rows."""


def package(name: str) -> Any:
    """The package ``name`` of the extra ``rivals``, imported.

    Raises:
        NotInstalledError: it is not installed. What fails in one that is installed is raised as it is.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise NotInstalledError("not installed: pip install '.[rivals]' in the checkout") from None
