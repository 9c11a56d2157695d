"""The command line: `python -m resona_ext demo | info | explain`.

Every command is one module with `add_arguments(parser)` and `run(arguments) -> None`. A problem
that the user can mend is a `CliError`: one line on stderr and exit status 2, never a traceback.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import demo, explain, info
from .errors import CliError

COMMANDS = {
    "demo": (demo, "train, retrieve and time: what the operator does, in a few minutes"),
    "info": (info, "what this build contains and what machine it runs on"),
    "explain": (explain, "which kernels, tiles and workspace a problem would use"),
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m resona_ext")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=summary,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status."""
    arguments = build_parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except CliError as error:
        print(f"resona_ext {arguments.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nresona_ext {arguments.command}: interrupted", file=sys.stderr)
        return 130
    return 0
