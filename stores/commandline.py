"""What the three command lines share: parsing with jsonargparse, one-line errors, logging, progress.

Exit codes: 0 done; 1 the work was done and found something wrong (`stores verify`); 2 a bad value, file or store;
130 interrupted.
"""

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import jsonargparse
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(stderr=True)

_SECONDS_BETWEEN_LINES = 2.0


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Parameters
    ----------
    name
        As typed.
    help
        One line, for the list of commands.
    config
        The dataclass that its options make; its fields' docstrings are the options' help.
    run
        Called with the config; returns the exit code.
    positional
        Names of the config's fields that are given without a flag.
    """

    name: str
    help: str
    config: type
    run: Callable[[Any], int]
    positional: tuple[str, ...] = ()


def run_commands(
    prog: str,
    description: str,
    commands: Sequence[Command],
    errors: tuple[type[Exception], ...],
    argv: list[str] | None,
) -> int:
    """Parse a command line, run the command, and turn expected errors into one line and exit code 2.

    Parameters
    ----------
    prog, description
        For the help.
    commands
        What there is.
    errors
        Exceptions whose message is for the user.
    argv
        Arguments; None takes the process's.
    """
    parser = jsonargparse.ArgumentParser(prog=prog, description=description, exit_on_error=False)
    subcommands = parser.add_subcommands(title="commands", metavar="COMMAND", description=None)
    for command in commands:
        sub = jsonargparse.ArgumentParser(description=command.help, exit_on_error=False)
        sub.add_argument(
            "--config", action="config", help="A YAML file with any of the options below; flags override it."
        )
        for name in command.positional:
            sub.add_argument(name, type=str, help=_field_help(command.config, name))
        # A switch is given without a value (`--random_weights`), which jsonargparse's own reading of bool is not.
        switches = [field.name for field in fields(command.config) if field.type is bool]
        sub.add_class_arguments(command.config, skip={*command.positional, *switches})
        for name in switches:
            sub.add_argument(f"--{name}", action="store_true", help=_field_help(command.config, name))
        subcommands.add_subcommand(command.name, sub, help=command.help)
    try:
        namespace = parser.parse_args(argv)
        command = next(command for command in commands if command.name == namespace.subcommand)
        options = namespace[command.name].as_dict()
        options.pop("config", None)
        config = command.config(**options)
        _log_to(console)
        return command.run(config)
    except jsonargparse.ArgumentError as error:
        return _fail(prog, str(error))
    except errors as error:
        return _fail(prog, str(error))
    except OSError as error:  # a file that is not there or not ours to read: the path says which
        return _fail(prog, f"{error.strerror or error}: {error.filename}: check the path and its permissions")
    except KeyboardInterrupt:
        console.print(f"{prog}: interrupted; the same command goes on from here", style="yellow", highlight=False)
        return 130


@contextlib.contextmanager
def progress_bar(title: str, total: float, *, unit: str) -> Generator[Callable[..., None]]:
    """Show progress: a bar on a terminal, a plain line now and then elsewhere.

    Yields
    ------
    Callable
        `advance(amount, note="")`.
    """
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as progress:
            task = progress.add_task(title, total=total, note="")
            yield lambda amount, note="": progress.update(task, advance=amount, note=note)
        return
    done, printed, last = 0.0, 0, time.monotonic()

    def advance(amount: float, note: str = "") -> None:
        nonlocal done, printed, last
        done += amount
        tenths = int(10 * done / total + 1e-9) if total else 0
        now = time.monotonic()
        if tenths > printed and (now - last >= _SECONDS_BETWEEN_LINES or tenths == 10):
            printed, last = tenths, now
            print(f"{title}: {10 * tenths}% of {total:,.0f} {unit}  {note}".rstrip(), file=sys.stderr, flush=True)

    yield advance


def _fail(prog: str, message: str) -> int:
    line = " ".join(message.split())
    print(f"{prog}: error: {line}", file=sys.stderr)
    return 2


def _log_to(where: Console) -> None:
    handler: logging.Handler
    if where.is_terminal:
        handler = RichHandler(console=where, show_path=False, show_time=False)
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    for package in ("pipeline", "sae", "stores"):
        logging.getLogger(package).setLevel(logging.INFO)


def _field_help(config: type, name: str) -> str:
    import docstring_parser

    parsed = docstring_parser.parse(config.__doc__ or "")
    return next((param.description or "" for param in parsed.params if param.arg_name == name), "")
