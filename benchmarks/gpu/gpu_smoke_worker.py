"""What gpu_smoke.py runs in processes of its own: questions about the machine and the library, and jobs.

The jobs are those of tests/gpu/gpu_cases.py.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import json
import math
import platform
import sys
import time
import traceback
from itertools import zip_longest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "gpu")]

import torch  # noqa: E402

from benchmarks.kernels.timer import device_works  # noqa: E402

WARM_UP_SECONDS = 120
GRAPHS = ("graph", "replays")  # modes of jobs that capture one


def machine() -> dict:
    facts = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
    }
    if torch.version.cuda is None:
        return {
            **facts,
            "gpu": None,
            "why_no_gpu": f"torch {torch.__version__} is a build without CUDA",
        }
    if not torch.cuda.is_available():
        return {**facts, "gpu": None, "why_no_gpu": "torch.cuda.is_available() is false"}
    device = torch.cuda.get_device_properties(0)
    return {
        **facts,
        "gpu": device.name,
        "gpus": torch.cuda.device_count(),
        "capability": f"{device.major}.{device.minor}",
        "multiprocessors": device.multi_processor_count,
        "memory_bytes": device.total_memory,
    }


def load() -> dict:
    """Facts of the library, and what stands in the way of using it on this GPU."""
    import resona_ext

    build = json.loads(torch.ops.resona._build_info())
    library = ROOT / "resona_ext" / "libresona.so"
    facts = {
        "package": resona_ext.__version__,
        "library_bytes": library.stat().st_size,
        "library_sha256": hashlib.sha256(library.read_bytes()).hexdigest(),
        "build": build,
    }
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    operators = ("pool_chunks", "retrieve", "attend", "fused_retrieve_attend", "decode_step")
    operators += (
        "decode_step_two_level",
        "prefix_linear_attention",
        "prefix_linear_attention_step",
    )
    facts["on_cuda"] = [name for name in operators if has_kernel(f"resona::{name}", "CUDA")]
    facts["problems"] = []
    if build["cuda"] == "none":
        facts["problems"].append(
            "libresona.so: expected one built with CUDA, got one without; see docs/building.md"
        )
    elif torch.cuda.is_available() and not _covered(build["cuda_architectures"]):
        got = " ".join(build["cuda_architectures"])
        facts["problems"].append(f"libresona.so: expected code for {_capability()}, got {got}")
    return facts


def _capability() -> str:
    return "sm_{}{}".format(*torch.cuda.get_device_capability())


def _covered(architectures: list[str]) -> bool:
    """By machine code of the same generation, not newer than the device, or by PTX that is not newer."""
    major, minor = torch.cuda.get_device_capability()
    for name in architectures:
        kind, _, digits = name.partition("_")
        if digits[-1:].isalpha():  # this very device
            if digits[:-1] == f"{major}{minor}":
                return True
        elif digits.isdigit():
            compiled = divmod(int(digits), 10)
            same = kind == "compute" or compiled[0] == major
            if same and compiled <= (major, minor):
                return True
    return False


def in_turns(jobs: list) -> list:
    """One job of every operator after the other, so that each comes early, whatever becomes of one."""
    by_operator: dict[str, list] = {}
    for job in jobs:
        by_operator.setdefault(job.case.op, []).append(job)
    turns = zip_longest(*by_operator.values())
    return [job for turn in turns for job in turn if job is not None]


def choose(options: argparse.Namespace) -> list:
    """The same list for the same options, whatever operators are skipped: jobs have numbers."""
    import gpu_cases

    chosen = gpu_cases.jobs(options.device, options.small)
    if options.wrong:
        chosen = [job for job in chosen if job.wrong]
    if options.no_graphs:
        chosen = [job for job in chosen if job.mode not in GRAPHS]
    return in_turns(chosen)


def jobs(options: argparse.Namespace) -> int:
    """Runs jobs from number `first` on, and says of each when it begins and how it ended."""
    if options.device == "cpu":
        torch.set_num_threads(1)  # small problems: threads only wait for one another
    todo = choose(options)
    warm_up(options.device)
    failed = 0
    with Path(options.progress).open("a") as progress:

        def say(**event) -> None:
            progress.write(json.dumps(event) + "\n")
            progress.flush()

        for index, job in enumerate(todo[options.first :], options.first):
            head = {"index": index, "of": len(todo), "job": str(job), "op": job.case.op}
            if job.case.op in options.skip_op:
                say(**head, skipped=True)
                continue
            if time.time() > options.until:
                break
            print(f"job {index} of {len(todo)}: {job}", flush=True)  # tells reports apart
            say(**head)
            begin = time.perf_counter()
            error = attempt(job, options)
            seconds = round(time.perf_counter() - begin, 3)
            say(**head, ok=error is None, seconds=seconds, **({"error": error} if error else {}))
            failed += error is not None
            if error and not device_works(options.device):
                return 3  # the next process goes on
    return 1 if failed else 0


def attempt(job, options: argparse.Namespace) -> str | None:
    """What went wrong, if anything did."""
    # Ends the process, also one that hangs in the driver.
    faulthandler.dump_traceback_later(options.job_seconds, exit=True)
    try:
        job.run(options.device)
    except Exception:
        return traceback.format_exc(limit=-3)
    finally:
        faulthandler.cancel_dump_traceback_later()
    return None


def warm_up(device: str) -> None:
    """What only the first use of a GPU takes is not the first job's fault."""
    faulthandler.dump_traceback_later(WARM_UP_SECONDS, exit=True)
    if device == "cuda":
        torch.ones(64, device=device).sum().item()
    faulthandler.cancel_dump_traceback_later()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("machine", "load", "jobs"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--progress")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--wrong", action="store_true", help="only jobs with wrong values")
    parser.add_argument("--no-graphs", action="store_true", help="no jobs that capture graphs")
    parser.add_argument("--skip-op", action="append", default=[], help="an operator to leave out")
    parser.add_argument("--job-seconds", type=float, default=20)
    parser.add_argument(
        "--until", type=float, default=math.inf, help="begin no job after this time.time()"
    )
    options = parser.parse_args()
    if options.what == "jobs":
        return jobs(options)
    print(json.dumps(machine() if options.what == "machine" else load()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
