"""Time the operators against FlashAttention and the sparse peers; benchmarks/README.md explains.

Every contender is checked before it is timed, all contenders of a case run in turns in one process,
and every figure goes into a record with a machine header. Interrupt it whenever you like: what is
finished is kept.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from resona_ext.cli import machine
from resona_ext.cli.errors import CliError

from . import compare, plots, record, shapes, table
from .baselines import Checkouts, all_baselines
from .operators import OPERATORS
from .runner import DeviceLost, Plan, Runner
from .timer import Budget

PROGRAM = "benchmarks.kernels"
LEGEND = """
ratio    time / time of resona, from calls in turns: above 1, resona is faster
GB/s     every tensor read or written once; GFLOP/s and floor: the work that the contender needs
floor    least time of the byte model at the measured ceilings / time
MiB      memory beyond what was held before the call"""
DEVICE_LOST = 3  # exit status
SMOKE_BUDGET = Budget(seconds=0.0, min_calls=1, max_calls=1)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m {PROGRAM}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("operators", nargs="*", metavar="OPERATOR", help=f"default: all of {_names(OPERATORS)}")
    add("--list", action="store_true", help="list operators and baselines, and what is missing")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where it can be used")
    add("--smoke", action="store_true", help="a tiny frozen suite, for function, not for time")
    add("--targets", action="store_true", help="the suite of docs/cpu-kernels.md's targets (CPU)")
    add("--max-length", type=int, metavar="N", help="leave out longer contexts")
    add("--lengths", metavar="A,B", help="only contexts of these lengths")
    add("--dtypes", metavar="A,B", help=f"only these of {_names(shapes.DTYPES)}")
    add("--patterns", metavar="A,B", help=f"only these of {_names(shapes.PATTERNS)}")
    add("--baselines", metavar="A,B", help='only these, "none" for none; default: all there are')
    add("--without", metavar="A,B", help="all baselines there are but these")
    add("--nsa", type=Path, metavar="PATH", help="checkout of native-sparse-attention-triton")
    add("--flashmoba", type=Path, metavar="PATH", help="checkout of flash-moba, built")
    add("--seconds", type=float, default=1.0, help="per contender and case (default: %(default)s)")
    add(
        "--patience",
        type=float,
        default=40.0,
        metavar="SECONDS",
        help="leave out calls that are foreseen to take longer (default: %(default)s)",
    )
    add("--ceilings", type=Path, metavar="JSON", help="what gpu_record.sh's ceilings found here")
    add("--parts", action="store_true", help="GPU: what our kernels take, by torch's profiler")
    add("--resume", action="store_true", help="go on with the record that is there, of this build")
    add("--no-plots", action="store_true", help="figures can be drawn from the record later")
    add("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add(
        "--output",
        type=Path,
        metavar="PREFIX",
        help="write PREFIX.json, PREFIX.csv and PREFIX-*.png (default: build/benchmarks/DEVICE)",
    )
    add("--compare", metavar="BASE", help="the same suite on this commit and on BASE, in turns")
    add("--rounds", type=int, default=3, help="of --compare, each runs both (default: %(default)s)")
    return parser


def _names(names) -> str:
    return ", ".join(names)


def make_plan(arguments: argparse.Namespace) -> Plan:
    """What the arguments ask for. Raises CliError where it cannot be done."""
    if arguments.threads is not None:
        _require(arguments.threads >= 1, "--threads: expected at least 1")
        torch.set_num_threads(arguments.threads)
    for flag in ("seconds", "patience"):
        _require(getattr(arguments, flag) >= 0, f"--{flag}: expected at least 0")
    _require(arguments.rounds >= 2, "--rounds: expected at least 2, a spread needs them")
    obstacle = gpu_obstacle()
    device = arguments.device or ("cpu" if obstacle else "cuda")
    _require(device == "cpu" or obstacle is None, f"--device cuda: {obstacle}")

    _require(
        not (arguments.smoke and arguments.targets), "--targets: expected alone, got --smoke too"
    )
    _require(device == "cpu" or not arguments.targets, f"--targets: expected cpu, got {device}")

    checkouts = Checkouts(arguments.nsa, arguments.flashmoba)
    for flag, path in (("--nsa", arguments.nsa), ("--flashmoba", arguments.flashmoba)):
        _require(path is None or path.is_dir(), f"{flag} {path}: no such directory")
    usable, reasons = _baselines(arguments.baselines, arguments.without, device, checkouts)
    scale = "smoke" if arguments.smoke else device
    budget = replace(Budget(), seconds=arguments.seconds)
    return Plan(
        sweeps=_sweeps(arguments, "targets" if arguments.targets else scale),
        device=device,
        baselines=usable,
        reasons=reasons,
        budget=SMOKE_BUDGET if arguments.smoke else budget,
        patience=arguments.patience,
        scale=scale,
        output=arguments.output or Path("build/benchmarks") / scale,
        checkouts=checkouts,
        seed=arguments.seed,
        ceilings=_measured(arguments.ceilings),
        parts=device == "cpu" or arguments.parts,
    )


def _measured(path: Path | None) -> dict:
    try:
        return json.loads(path.read_text()) if path else {}
    except (OSError, ValueError) as error:
        raise CliError(f"--ceilings {path}: {error}") from error


def gpu_obstacle() -> str | None:
    if not torch.cuda.is_available():
        return "torch sees no GPU on this machine"
    if not torch._C._dispatch_has_kernel_for_dispatch_key("resona::pool_chunks", "CUDA"):
        return "this build of resona_ext has no CUDA kernels"
    return None


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise CliError(message)


def _chosen(flag: str, text: str | None, known) -> tuple[str, ...]:
    if text is None:
        return tuple(known)
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        _require(name in known, f"{flag}: unknown {name!r}, expected some of {_names(known)}")
    return names


def _baselines(text: str | None, without: str | None, device: str, checkouts: Checkouts):
    """Those that can be used, and the reasons of the others."""
    known = all_baselines()
    names = () if text == "none" else _chosen("--baselines", text, known)
    left_out = _chosen("--without", without or "", known)
    names = tuple(name for name in names if name not in left_out)
    usable, reasons = {}, {}
    for name in names:
        reason = known[name].missing(device, checkouts)
        # Who asks for a baseline by name wants to know that it is not there.
        _require(reason is None or text is None, f"--baselines: {name} cannot be used, {reason}")
        if reason is None:
            usable[name] = known[name]
        else:
            reasons[name] = f"missing: {reason}"
    return usable, reasons | {name: "not asked for" for name in known if name not in names}


def _sweeps(arguments: argparse.Namespace, scale: str) -> list[shapes.Sweep]:
    for name in arguments.operators:
        expected = f"expected some of {_names(OPERATORS)}"
        _require(name in OPERATORS, f"unknown operator {name!r}, {expected}")
    operators = arguments.operators or tuple(OPERATORS)
    dtypes = _chosen("--dtypes", arguments.dtypes, shapes.DTYPES)
    patterns = _chosen("--patterns", arguments.patterns, shapes.PATTERNS)
    limit = math.inf if arguments.max_length is None else arguments.max_length
    only = arguments.lengths and arguments.lengths.split(",")
    sweeps = []
    for sweep in shapes.SUITES[scale]:
        kept = replace(
            sweep,
            lengths=tuple(n for n in sweep.lengths if n <= limit and (not only or str(n) in only)),
            dtypes=tuple(d for d in sweep.dtypes if d in dtypes),
            patterns=tuple(p for p in sweep.patterns if p in patterns),
        )
        if sweep.operator in operators and kept.lengths and kept.dtypes and kept.patterns:
            sweeps.append(kept)
    _require(bool(sweeps), f"the {scale} suite has no case that fits all of these choices")
    return sweeps


def run(plan: Plan, argv: Sequence[str], resume: bool = False, with_plots: bool = True) -> int:
    """Run the suite; 1 if a result of ours was wrong, 3 if the GPU no longer works in this process."""
    _check_writable(plan.output)
    cases = list(plan.cases())
    status = table.Status(len(cases))
    runner = Runner(plan, record.header(list(argv), plan.device), status)
    _print_head(plan, runner.record, len(cases))
    before = record.path_of(plan.output, "json")
    if resume and before.exists() and not runner.record.resume(record.load(before)):
        print(f"{before} is of another build or machine: from the beginning")
    runner.failures = record.count_failures(runner.record.rows.values(), plan.baselines)
    status.done = sum(runner.record.has(case.id) for _, case in cases)
    runner.measure_ceilings()
    status.clear()
    print(table.ceilings(runner.record.ceilings), flush=True)
    try:
        for id, rows in runner.run():
            status.clear()
            status.done += 1
            print(f"\n[{status.done}/{len(cases)}] {id}")
            print(*table.lines(rows), sep="\n", flush=True)
    except DeviceLost as error:
        print(
            f"\nthe GPU no longer works in this process, after {error}; --resume goes on behind it"
        )
        return DEVICE_LOST
    except KeyboardInterrupt:
        status.clear()
        print(f"\ninterrupted: {status.done} of {len(cases)} cases are finished and kept")
        runner.record.write(plan.output)
        _finish(runner, plan.output, with_plots)
        raise
    _finish(runner, plan.output, with_plots)
    return 1 if runner.failures else 0


def _print_head(plan: Plan, kept: record.Record, cases: int) -> None:
    print(f"{PROGRAM}: {cases} cases on {machine.summary()}, commit {kept.header['commit']}")
    if plan.device == "cuda":
        print(f"GPU: {kept.header['gpu']}")
    print(f"baselines: {_names(plan.baselines) or 'none'}")
    for name, reason in plan.reasons.items():
        print(f"  {name}: {reason}")


def _finish(runner: Runner, prefix: Path, with_plots: bool) -> None:
    names = [str(record.path_of(prefix, ending)) for ending in ("json", "csv")]
    if not with_plots:
        print("no plots: --no-plots")
    elif importlib.util.find_spec("matplotlib") is None:
        print("no plots: matplotlib is not installed (pip install matplotlib)")
    elif runner.record.rows:
        names += [str(path) for path in plots.save(runner.record.as_json(), prefix)]
    print(LEGEND)
    print(f"wrote {_names(names)}")


def _check_writable(prefix: Path) -> None:
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        probe = record.path_of(prefix, "json.part")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise CliError(f"--output {prefix}: cannot be written ({error.strerror})") from error


def list_all(checkouts: Checkouts, device: str) -> None:
    print("operators")
    for name, operator in OPERATORS.items():
        rivals = [b.name for b in all_baselines().values() if name in b.operators]
        versus = _names(rivals) if operator.theirs else "the same block without Resona"
        print(f"  {name:<14}versus {versus}")
    print("baselines")
    for name, baseline in all_baselines().items():
        reason = baseline.missing(device, checkouts)
        print(f"  {name:<14}{baseline.summary}; computes {baseline.computes}")
        if reason is not None:
            print(f"  {'':<14}missing: {reason}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one benchmark and return the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = build_parser()
    arguments = parser.parse_args(argv)
    try:
        plan = make_plan(arguments)
        if arguments.list:
            list_all(plan.checkouts, plan.device)
            return 0
        if arguments.compare is not None:
            return compare.run(arguments.compare, argv, arguments.rounds)
        return run(plan, argv, arguments.resume, not arguments.no_plots)
    except CliError as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
