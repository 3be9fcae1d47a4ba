"""How to install an extra: the package is on no index, so it depends on where this copy of it comes from."""

import importlib.metadata
import json
import shlex
from pathlib import Path

PACKAGE = "alexnet-fused"


def install(extra: str) -> str:
    """The command that installs what ``extra`` needs, for an error message."""
    checkout = Path(__file__).parents[2]
    if (checkout / "pyproject.toml").is_file():
        return f"pip install -e {shlex.quote(f'{checkout}[{extra}]')}"
    return f"pip install {shlex.quote(f'{PACKAGE}[{extra}]{_source()}')}"


def _source() -> str:
    """`` @ URL`` of where pip installed the package from, as pip noted it; empty if it came from an index."""
    try:
        noted = importlib.metadata.distribution(PACKAGE).read_text("direct_url.json")
        where = json.loads(noted or "{}")
        version = where.get("vcs_info")
        return f" @ {version['vcs']}+{where['url']}@{version['commit_id']}" if version else f" @ {where['url']}"
    except (importlib.metadata.PackageNotFoundError, ValueError, KeyError):
        return ""
