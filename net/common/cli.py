"""Command lines from dataclasses: flags, TOML files, presets, and one-line errors."""

import argparse
import dataclasses
import importlib.util
import os
import re
import signal
import sys
import threading
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from ..data.config import SYNTHETIC
from ..readers.toml import read_toml, toml
from .errors import DataError, RankError, UsageError
from .fields import flag_name, near, typed, unwrapped
from .printing import prepare_streams, printable

Config = TypeVar("Config")
#: The package of the commands.
PACKAGE = __package__.rpartition(".")[0]
#: Columns of ``--help`` that a flag and its metavar may take.
FLAG_COLUMNS = 34


class Parser(argparse.ArgumentParser):
    """Reports errors in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {printable(message)}\n")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        result, unknown = self.parse_known_args(args, namespace)
        if unknown:
            first = next((word for word in unknown if word.startswith("--")), "").partition("=")[0]
            hint = near(first.replace("_", "-"), self._option_string_actions) if first else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return result


class _Help(argparse.Action):
    """``--help``, which only notes that it was asked for: the defaults to show depend on the other flags."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *_: Any) -> None:
        namespace.help = True
        for action in parser._actions:
            action.required = False


def _key_value(text: str) -> tuple[str, Any]:
    """``NAME=VALUE`` with VALUE in TOML, or a bare string."""
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, toml(f"value = {value}")["value"]
    except ValueError:
        return name, value


class Grouped(argparse.HelpFormatter):
    """Help of a command with many flags: one line each where it fits, ``--[no-]crop`` for a flag and its opposite."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=FLAG_COLUMNS)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, argparse.BooleanOptionalAction):
            return action.option_strings[0].replace("--", "--[no-]", 1)
        if action.nargs != 0 and len(action.option_strings) > 1:
            return f"{', '.join(action.option_strings)} {self._format_args(action, (action.dest.upper()))}"
        return super()._format_action_invocation(action)


def parser(
    config: type[Any], program: str, description: str, defaults: Mapping[str, Any] | None = None
) -> argparse.ArgumentParser:
    """A parser whose result holds only the flags that were given.

    Args:
        config: the dataclass of the command.
        program: what follows ``python -m``.
        description: the first paragraph of ``--help``.
        defaults: defaults to show in ``--help`` instead of the dataclass's own.
    """
    headings: tuple[str, ...] = getattr(config, "GROUPS", ())
    grouped = bool(headings)
    result = Parser(
        prog=f"python -m {program}",
        usage=f"python -m {program} [flags]" if grouped else None,
        description=description,
        argument_default=argparse.SUPPRESS,
        add_help=False,
        allow_abbrev=False,
        formatter_class=Grouped if grouped else argparse.HelpFormatter,
    )
    result.add_argument("-h", "--help", nargs=0, action=_Help, help="show this help message and exit")
    groups = {heading: result.add_argument_group(heading) for heading in headings}
    hints = typing.get_type_hints(config)
    for item in dataclasses.fields(config):
        options = item.metadata
        annotation = unwrapped(hints[item.name])
        keywords: dict[str, Any] = {"help": options["help"].replace("%", "%%")}
        default = (defaults or {}).get(item.name, item.default)
        if isinstance(default, bool):
            if grouped:
                keywords["help"] += f" ({'on' if default else 'off'})"
        elif default not in (None, (), "", dataclasses.MISSING):
            keywords["help"] += f" ({default})"
        if options.get("metavar"):
            keywords["metavar"] = options["metavar"]
        if options.get("key_values"):
            keywords.update(nargs="+", type=_key_value, metavar="NAME=VALUE")
        elif annotation is bool:
            keywords.update(action=argparse.BooleanOptionalAction)
        elif typing.get_origin(annotation) is typing.Literal:
            keywords.update(choices=typing.get_args(annotation))
        elif typing.get_origin(annotation) is tuple:
            keywords.update(nargs=options.get("nargs", "+"), type=typing.get_args(annotation)[0])
        else:
            keywords.update(type=annotation)
        if "optional_value" in options:
            keywords.update(nargs="?", const=options["optional_value"])
        if options.get("positional"):
            result.add_argument(item.name, **keywords)
        else:
            names = [f"-{options['short']}"] if "short" in options else []
            place = groups[options["group"]] if "group" in options else result
            place.add_argument(*names, flag_name(item.name), dest=item.name, **keywords)
    return result


def resolve(given: Mapping[str, Any], config: type[Config], saved: Mapping[str, Any] | None = None) -> Config:
    """Merge the defaults, the preset, the configuration file and the command line; later ones override earlier ones.

    Args:
        given: the flags on the command line.
        config: the dataclass of the command.
        saved: the flags of a run to resume; they replace ``config.defaults``.

    Raises:
        UsageError: an invalid value.
    """
    given = _with_file(given, config)
    if saved is not None:
        return config(**{**saved, **given})
    return config(**{**_defaults(config, given), **given})


def _with_file(given: Mapping[str, Any], config: type[Any]) -> dict[str, Any]:
    """The flags in ``given`` and those of the configuration file that they name."""
    return {**read_toml(given["config"], config), **given} if "config" in given else dict(given)


def _defaults(config: type[Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of the preset in ``given``; empty for commands without presets."""
    defaults = getattr(config, "defaults", None)
    return {} if defaults is None else defaults(given)


def given(config: type[Any], program: str, description: str, arguments: Sequence[str] | None) -> dict[str, Any]:
    """Parse the command line (``sys.argv`` if ``arguments`` is None) and check the types.

    With ``--help`` it prints the flags, with the defaults that apply given the other flags, and exits.

    Raises:
        UsageError: an invalid value, such as an empty path, which would mean the current folder.
    """
    values = vars(parser(config, program, description).parse_args(arguments))
    wants_help = values.pop("help", False)
    for item in dataclasses.fields(config):
        if item.metadata.get("key_values") and item.name in values:
            values[item.name] = dict(values[item.name])
    hints = typing.get_type_hints(config)
    values = {name: typed(flag_name(name), value, hints[name]) for name, value in values.items()}
    if wants_help:
        shown = parser(config, program, description, _defaults(config, _with_file(values, config)))
        shown.print_help()
        shown.exit()
    return values


def subcommand(
    program: str, description: str, summaries: Mapping[str, str], arguments: Sequence[str] | None
) -> tuple[str, list[str]]:
    """The first argument, which names one of the subcommands, and the remaining arguments.

    Without arguments this prints the help and exits with status 2.

    Args:
        program: the command.
        description: of the command.
        summaries: a one-line summary of each subcommand, for ``--help``.
        arguments: ``sys.argv`` if None.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    lines = [f"  {name:<{max(map(len, summaries))}}  {summary}" for name, summary in summaries.items()]
    result = Parser(
        prog=f"python -m {program}",
        usage=f"python -m {program} {{{','.join(summaries)}}} ...",
        description=description,
        epilog="\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("name", choices=summaries, metavar="NAME", help=argparse.SUPPRESS)
    if not arguments:
        result.print_help(sys.stderr)
        result.exit(2)
    return result.parse_args(arguments[:1]).name, arguments[1:]


def spin_briefly() -> None:
    """Make OpenMP threads sleep soon at a barrier; call it before torch is imported.

    GNU OpenMP threads spin for about a millisecond first. When another program uses one of the cores, threads spin
    while the one they wait for has no core to run on, and training of a small network slows down by far more than the
    lost core.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "5000")


def first_rank() -> bool:
    """Whether this is rank 0, or torchrun did not start this process."""
    return os.environ.get("RANK", "0") == "0"


def check_exist(**paths: str | Sequence[str] | None) -> None:
    """Check that paths exist, before the slow imports.

    Args:
        paths: by flag; ``positional`` for a positional argument, whose message names no flag.

    Raises:
        DataError: there is no such file or folder.
    """
    for name, given in paths.items():
        for path in [given] if isinstance(given, str) else given or ():
            if path.partition(":")[0] != SYNTHETIC and not os.path.exists(path):
                raise DataError(f"{'' if name == 'positional' else flag_name(name) + ' '}{path} does not exist")


def load(*modules: str) -> None:
    """Import modules of :mod:`net` that take seconds. Ctrl-C takes effect after the imports, a second one at once.

    An exception in the middle of an import leaves a half-initialized library behind, and some libraries swallow it.
    """
    before = signal.getsignal(signal.SIGINT)
    heeded = before is signal.default_int_handler and threading.current_thread() is threading.main_thread()
    came = False

    def note(number: int, frame: object) -> None:
        nonlocal came
        if came:
            os._exit(130)
        came = True

    if heeded:
        signal.signal(signal.SIGINT, note)
    try:
        for module in modules:
            importlib.import_module(f"{PACKAGE}.{module}")
    finally:
        if heeded:
            signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt


def _terminate(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def end_in_order() -> None:
    """Make SIGTERM and SIGHUP (unless ignored, as under nohup) end the command cleanly, so that it saves its work."""
    for name in ("SIGTERM", "SIGHUP"):
        # Windows has no SIGHUP.
        number = getattr(signal, name, signal.SIGTERM)
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _terminate)


#: PyTorch's messages about insufficient memory, in exceptions other than MemoryError.
_OUT_OF_MEMORY = re.compile(r"out of memory|allocate memory|not enough memory|Storage size calculation overflowed")


def _check_kernels() -> None:
    """Check that ``import kernels`` finds this project's package: Hugging Face has one of the same name.

    Raises:
        UsageError: it would import another package, or none.
    """
    found = importlib.util.find_spec("kernels")
    place = None if found is None else found.origin
    if place is None or "relu_lrn_max_pool2d" not in Path(place).read_text(encoding="utf-8"):
        raise UsageError(
            f"import kernels finds {place or 'nothing'}, not the package of alexnet-fused; Hugging Face has a package "
            "of the same name: install the two in separate environments"
        )


def run(command: Callable[[], int | None]) -> NoReturn:
    """Run a command and exit: 2 for a usage error, 1 for unusable data, each with one line on stderr.

    Under torchrun only rank 0 prints usage and data errors, which all ranks share.
    """
    spin_briefly()
    prepare_streams()
    try:
        _check_kernels()
        status = command() or 0
    except UsageError as error:
        status = _refused(str(error), 2) if first_rank() else 2
    except DataError as error:
        status = _refused(str(error), 1) if first_rank() else 1
    except RankError as error:
        status = _refused(str(error), 1)
    except BrokenPipeError:
        # The reader closed the pipe; avoid a second error from Python's flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 128 + getattr(signal, "SIGPIPE", 13)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        status = _refused(f"{place}{error.strerror or error}", 1)
    except MemoryError as error:
        status = _refused(f"out of memory: {error}".rstrip(": "), 1)
    except RuntimeError as error:
        if not _OUT_OF_MEMORY.search(str(error)):
            raise
        status = _refused(f"out of memory: {str(error).splitlines()[0]}", 1)
    except KeyboardInterrupt:
        status = _refused("interrupted", 130)
    sys.stdout.flush()
    sys.exit(status)


def _refused(message: str, status: int) -> int:
    sys.stdout.flush()
    print(f"error: {printable(message)}", file=sys.stderr)
    return status
