"""Print the plan for a problem: which kernel runs each stage, why, and how much workspace.

The plan is a pure function of the problem, so it can be asked on any machine, GPU or not.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import textwrap

import torch

from .errors import CliError

BOUND = "\N{NO-BREAK SPACE}"  # between a name and its value, while lines are broken
# (flag, default, help); None stands for a default that depends on another value.
SIZES = [
    ("batch", 1, "B, sequences"),
    ("queries", 16384, "T, query tokens"),
    ("context", None, "L, context tokens (default: as many as queries)"),
    ("heads", 4, "H, query heads"),
    ("kv-heads", None, "Hkv, key/value heads (default: as many as heads)"),
    ("head-dim", 64, "D, head dimension"),
    ("retrieval-heads", 1, "R, retrieval heads"),
    ("retrieval-dim", 64, "E, retrieval dimension"),
    ("chunk-size", 64, "S, tokens per chunk"),
    ("top-k", 8, "k, chunks retrieved per query"),
    ("threads", None, "CPU threads (default: torch.get_num_threads())"),
]
PREFIX_SIZES = [
    ("prefix-rows", None, "explain prefix linear attention instead, with a prefix of so many rows"),
    ("feature-dim", 16, "its f, dimension of queries and keys"),
    ("value-dim", 64, "its V, dimension of values"),
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for flag, default, meaning in SIZES + PREFIX_SIZES:
        note = "" if default is None else " (default: %(default)s)"
        parser.add_argument(f"--{flag}", type=_int64, default=default, help=meaning + note)
    parser.add_argument("--dtype", default="float32", help="default: %(default)s")
    parser.add_argument("--embedding-dtype", help="default: like --dtype")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument(
        "--isa",
        help="CPU: amx, avx512_bf16, avx512, avx2 or portable (default: what this machine runs)",
    )
    parser.add_argument(
        "--sm",
        type=_int64,
        help="CUDA: compute capability, 90 for 9.0 (default: the GPU here, or 90)",
    )
    parser.add_argument(
        "--sms", type=_int64, help="CUDA: multiprocessors (default: of the GPU here, or 132)"
    )


def run(arguments: argparse.Namespace) -> None:
    prefix = arguments.prefix_rows is not None
    problem = _prefix_problem(arguments) if prefix else _problem(arguments)
    extension = _load_extension()
    try:
        plan = (extension.plan_prefix if prefix else extension.plan)(**problem)
    except ValueError as error:
        raise CliError(str(error)) from error
    print(render(problem, plan, shutil.get_terminal_size((100, 24)).columns))


def render(problem: dict[str, int | str], plan, width: int) -> str:
    """The plan as text: one block per stage, its parameters and reason below its name."""
    lines = textwrap.wrap(
        "problem  " + ", ".join(f"{name}{BOUND}{value}" for name, value in problem.items()),
        width,
        subsequent_indent=" " * 9,
        break_on_hyphens=False,
    )
    name_width = max((len(stage.name) for stage in plan.stages), default=0)
    kernel_width = max((len(stage.kernel) for stage in plan.stages), default=0)
    indent = " " * (name_width + 2)
    for stage in plan.stages:
        parameters = ", ".join(
            f"{name}{BOUND}{value:,}" for name, value in stage.parameters.items()
        )
        head = f"{stage.name:<{name_width}}  {stage.kernel:<{kernel_width}}  "
        lines.append("")
        lines += textwrap.wrap(head + parameters, width, subsequent_indent=" " * len(head))
        lines += textwrap.wrap(stage.reason, width, initial_indent=indent, subsequent_indent=indent)
    lines += ["", f"workspace  {_bytes(plan.workspace_bytes)}"]
    return "\n".join(lines).replace(BOUND, " ")


def _problem(arguments: argparse.Namespace) -> dict[str, int | str]:
    problem = {
        name: getattr(arguments, name) for name in (flag.replace("-", "_") for flag, _, _ in SIZES)
    }
    defaults = {
        "context": arguments.queries,
        "kv_heads": arguments.heads,
        "threads": torch.get_num_threads(),
    }
    for name, default in defaults.items():
        if problem[name] is None:
            problem[name] = default
    problem |= {
        "dtype": arguments.dtype,
        "embedding_dtype": arguments.embedding_dtype or arguments.dtype,
        "device": arguments.device,
    }
    if arguments.device == "cpu":
        problem["isa"] = arguments.isa or json.loads(torch.ops.resona._build_info())["cpu_isa"]
    return problem | _device(arguments)


def _prefix_problem(arguments: argparse.Namespace) -> dict[str, int | str]:
    """The tokens are those of --queries."""
    names = ("batch", "heads", "prefix_rows", "feature_dim", "value_dim", "dtype", "device")
    problem = {name: getattr(arguments, name) for name in names}
    return {"tokens": arguments.queries} | problem | _device(arguments)


def _device(arguments: argparse.Namespace) -> dict[str, int]:
    if arguments.device != "cuda":
        return {}
    sm, sms = _cuda_device()
    return {
        "sm": sm if arguments.sm is None else arguments.sm,
        "sms": sms if arguments.sms is None else arguments.sms,
    }


def _cuda_device() -> tuple[int, int]:
    """Compute capability and multiprocessors of the current GPU, or of an H100 where there is none."""
    if not torch.cuda.is_available():
        return 90, 132
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return 10 * properties.major + properties.minor, properties.multi_processor_count


def _load_extension():
    try:
        return importlib.import_module("resona_ext._C")
    except ImportError as error:
        raise CliError(
            f"plans need the extension module resona_ext._C ({error}); build it with `make build` "
            "in a checkout, or reinstall the package with `pip install --no-build-isolation .`"
        ) from error


def _int64(text: str) -> int:
    value = int(text)
    if not -(2**63) <= value < 2**63:
        raise ValueError  # argparse names the flag and the text
    return value


_int64.__name__ = "64-bit integer"  # argparse prints it: invalid 64-bit integer value: 'x'


def _bytes(count: int) -> str:
    if count < 2**20:
        return f"{count:,} bytes"
    return f"{count:,} bytes ({count / 2**20:,.1f} MiB)"
