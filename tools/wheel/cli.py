"""`python -m tools.wheel`: build a wheel for a CUDA version, bring a CUDA compiler, or check a wheel.

    python -m tools.wheel --cuda 13.0         build, into dist/
    python -m tools.wheel --cuda cpu          the CPU library alone
    python -m tools.wheel --toolkit 13.0      only bring that compiler from pip
    python -m tools.wheel --check FILE.whl    check a wheel again

TORCH_CUDA_ARCH_LIST, CUDACXX, CUDA_HOME, MAX_JOBS, NVCC_THREADS, RESONA_PYTHONS and SOURCE_DATE_EPOCH
are honoured; docs/wheels.md has the whole table.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from . import audit, toolkit
from .build import ROOT, Order, build
from .errors import WheelError, refused


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.wheel",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--cuda", help="cpu, or a CUDA version such as 13.0")
    what.add_argument("--toolkit", metavar="CUDA", help="bring this compiler and stop")
    what.add_argument("--check", type=Path, metavar="WHEEL", help="check a finished wheel")
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="default: %(default)s")
    parser.add_argument("--build", type=Path, default=ROOT / "build", help="default: %(default)s")
    arguments = parser.parse_args(argv)
    try:
        if arguments.check:
            print("\n".join([audit.platform_tag(arguments.check), *audit.check(arguments.check)]))
        elif arguments.toolkit:
            toolkit.check_version(arguments.toolkit)
            print(toolkit.bring(arguments.toolkit, arguments.build.resolve() / "cuda-toolkit"))
        else:
            build(_order(arguments))
    except WheelError as error:
        print(f"wheel: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if (told := refused(error, ROOT)) is None:
            raise
        print(f"wheel: error: {told}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nwheel: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def _order(arguments: argparse.Namespace) -> Order:
    listed = os.environ.get("RESONA_PYTHONS", sys.executable)
    pythons = tuple(filter(None, listed.split(os.pathsep)))
    return Order(arguments.cuda, pythons, arguments.output.resolve(), arguments.build.resolve())
