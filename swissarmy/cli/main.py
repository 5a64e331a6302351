"""`sat`: finds the command, and turns errors into messages and exit codes.

Exit codes: 0 done, 1 the run failed, 2 usage, 130 interrupted.
"""

import importlib
import os
import sys
import traceback
from collections.abc import Sequence

from swissarmy.cli import output
from swissarmy.cli.arguments import parse
from swissarmy.cli.command import DONE, FAILED, INTERRUPTED, USAGE, Command, CommandGroup, UsageError
from swissarmy.core.errors import SwissArmyError, nearest

COMMANDS = ("models", "info", "train", "generate", "chat", "eval", "merge", "migrate", "convert", "data", "plot")
"""Each is a file of this folder."""

PROMISE = "sat: load any supported Transformer checkpoint, look inside it, train it, and generate with it."
CLOSING = "`sat COMMAND --help` lists its flags; `--config run.yaml` reads them from a file."


def main(argv: Sequence[str] | None = None) -> int:
    """Run `sat` and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    output.tolerate_any_encoding()
    try:
        code = _dispatch(arguments)
        output.flush()
    except BrokenPipeError:  # `| head` has what it wanted
        output.discard()
        return DONE
    except KeyboardInterrupt:
        return INTERRUPTED
    except (SwissArmyError, OSError) as error:
        if "--traceback" in arguments or os.environ.get("SAT_TRACEBACK") == "1":
            traceback.print_exc()
        output.print_error(_message(error, arguments))
        return USAGE if isinstance(error, UsageError) else FAILED
    return code


def find_command(name: str) -> Command | CommandGroup:
    """A command by its name.

    Raises:
        UsageError: There is none.
    """
    if name not in COMMANDS:
        kind, known = ("flag", ("--help", "--version")) if name.startswith("-") else ("command", COMMANDS)
        cure = "" if kind == "flag" else f" The commands are: {', '.join(COMMANDS)}."
        raise UsageError(f"there is no {kind} '{name}'.{nearest(name, known)}{cure} See `sat --help`.")
    command: Command | CommandGroup = importlib.import_module(f"swissarmy.cli.{name}").COMMAND
    return command


def _dispatch(arguments: Sequence[str]) -> int:
    match arguments:
        case ["--help" | "-h" | "help"]:
            print(_help())
            return DONE
        case ["--version" | "-V"]:
            from swissarmy import __version__

            print(f"swissarmy {__version__}")
            return DONE
        case []:
            output.print_error(_help())
            return USAGE
        case [name, *rest]:
            command = find_command(name)
            return _run(name, command, rest) if isinstance(command, Command) else _run_one_of(name, command, rest)
    raise AssertionError(arguments)


def _run(name: str, command: Command, arguments: Sequence[str]) -> int:
    try:
        options = parse(name, command, arguments)
    except SystemExit as stop:  # the flag parser has printed help, or what is wrong
        return stop.code if isinstance(stop.code, int) else USAGE
    return command.run(options)


def _run_one_of(name: str, group: CommandGroup, arguments: Sequence[str]) -> int:
    """Run the command of a group that the first of the arguments names."""
    match arguments:
        case ["--help" | "-h" | "help"]:
            print(_help(name, group))
            return DONE
        case []:
            output.print_error(_help(name, group))
            return USAGE
        case [second, *rest] if second in group.commands:
            return _run(f"{name} {second}", group.commands[second], rest)
    raise UsageError(
        f"there is no command '{name} {arguments[0]}'.{nearest(arguments[0], group.commands)} The commands are: "
        f"{', '.join(group.commands)}. See `sat {name} --help`."
    )


def _help(prefix: str = "", group: CommandGroup | None = None) -> str:
    commands = {name: find_command(name) for name in COMMANDS} if group is None else group.commands
    lines = [PROMISE if group is None else f"sat {prefix}: {group.summary}.", ""]
    lines += [f"usage: {f'sat {prefix}'.strip()} COMMAND [flags]", "", "commands:"]
    lines += [f"  {name:<10} {command.summary}" for name, command in commands.items()]
    lines += ["", "examples:"]
    lines += [f"  {example}" for command in commands.values() for example in command.examples[:1]]
    return "\n".join([*lines, "", CLOSING.replace("sat", f"sat {prefix}".strip(), 1)])


def _message(error: Exception, arguments: Sequence[str]) -> str:
    """`sat generate: what went wrong`, with the notes that the error carries."""
    name = arguments[0] if arguments and arguments[0] in COMMANDS else ""
    text = str(error)
    if isinstance(error, OSError) and not isinstance(error, SwissArmyError):
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror or text
    return "\n".join([f"{f'sat {name}'.strip()}: {text}", *getattr(error, "__notes__", [])])
