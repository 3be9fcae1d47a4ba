"""How to install an extra. The package is on no index, so the command depends on where this copy came from."""

import importlib.metadata
import json
import shlex
from pathlib import Path

PACKAGE = "alexnet-fused"


def install(extra: str) -> str:
    """The pip command that installs ``extra``, for an error message."""
    checkout = Path(__file__).parents[2]
    if (checkout / "pyproject.toml").is_file():
        return f"pip install -e {shlex.quote(f'{checkout}[{extra}]')}"
    return f"pip install {shlex.quote(f'{PACKAGE}[{extra}]{_source()}')}"


def _source() -> str:
    """`` @ URL`` from which pip installed the package (``direct_url.json``); empty if it came from an index."""
    try:
        noted = importlib.metadata.distribution(PACKAGE).read_text("direct_url.json")
        where = json.loads(noted or "{}")
        version = where.get("vcs_info")
        return f" @ {version['vcs']}+{where['url']}@{version['commit_id']}" if version else f" @ {where['url']}"
    except (importlib.metadata.PackageNotFoundError, ValueError, KeyError):
        return ""
