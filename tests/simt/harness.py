"""Builds the simulator on demand and runs kernels in it.

    sim = harness.build("plain")          # or "race", "asan"
    sim.run("pool", inputs={...}, outputs={...}, chunk_size=4, schedule=harness.SCHEDULES[0])

Needs g++ and pybind11, no CUDA. The runtime and the Python module are compiled once and shared by the
three builds; each build compiles the kernels in its own way. Objects are kept in build/simt under a
name that is a hash of what went into them.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CACHE = ROOT / "build" / "simt"
COMPILER = "g++"
INCLUDES = (HERE / "include", ROOT / "csrc", HERE)

COMMON = [
    *("-std=c++17", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas"),
    *("-fvisibility=hidden", "-fno-gnu-unique", "-fno-strict-aliasing", "-ffp-contract=off"),
    *(f"-I{folder}" for folder in INCLUDES),
]
# How kernels are compiled in each build. The race build is instrumented by ThreadSanitizer's compiler
# pass; runtime/hooks.cpp takes the place of its library.
BUILDS = {
    "plain": ["-O2", "-g1"],
    "race": ["-O1", "-g1", "-fsanitize=thread"],
    "asan": ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
}
PRELOADS = ("libasan.so", "libubsan.so")


@dataclass(frozen=True)
class Schedule:
    """How the threads of a launch are interleaved; runtime/scheduler.cpp tells what the names mean."""

    order: str = "lockstep"
    copies_land_early: bool = False
    resident: int = 1  # blocks of a kernel that run at once; 0: as many as fit
    seed: int = 0

    def __str__(self) -> str:
        copies = "early" if self.copies_land_early else "late"
        return f"{self.order}-{copies}-resident{self.resident}-seed{self.seed}"


ORDERS = [("lockstep", 0), ("reversed", 0), ("run-ahead", 0), ("run-ahead", 3), ("shuffle", 1)]
SCHEDULES = [
    Schedule(order, early, resident, seed)
    for order, seed in ORDERS
    for early, resident in ((False, 1), (True, 2), (False, 0), (True, 0))
]


@dataclass
class Simulator:
    """One build of the simulator."""

    name: str
    path: Path
    seconds_to_build: float
    seconds_to_run: float = field(default=0.0)
    runs: int = 0

    def __post_init__(self):
        name = f"{self.name}.resona_simt"  # pybind11 keeps one module per full name
        loader = importlib.machinery.ExtensionFileLoader(name, str(self.path))
        spec = importlib.util.spec_from_loader(name, loader)
        self.module = importlib.util.module_from_spec(spec)
        loader.exec_module(self.module)

    @property
    def Error(self) -> type[Exception]:
        return self.module.SimulationError

    def run(
        self,
        kernel: str,
        inputs: dict | None = None,
        outputs: dict | None = None,
        fresh: dict | None = None,
        schedule: Schedule = SCHEDULES[0],
        truncated_products: bool = False,
        **scalars,
    ) -> None:
        """Runs a runner of tests/simt/kernels on numpy arrays, in place.

        inputs may only be read. outputs hold values; fresh ones hold none, like memory that an
        allocator returns: they are filled with NaN, and the race build reports reads before writes.
        """
        for array in (fresh or {}).values():
            array.view(np.uint8)[...] = 0xFF
        begin = time.perf_counter()
        try:
            self.module.run(
                kernel=kernel,
                inputs=inputs or {},
                outputs=outputs or {},
                fresh=fresh or {},
                scalars=scalars,
                schedule=schedule.order,
                copies_land_early=schedule.copies_land_early,
                resident=schedule.resident,
                seed=schedule.seed,
                truncated_products=truncated_products,
            )
        except self.Error as error:
            raise self.Error(f"{locate(str(error), self.path)}\n[{schedule}]") from None
        finally:
            if self.name not in BUILDS:  # one of many mutants, run once or twice
                self.module.release_stacks()
            self.seconds_to_run += time.perf_counter() - begin
            self.runs += 1


def locate(message: str, library: Path) -> str:
    """Replaces the program counters in a report by source lines."""
    counters = sorted(set(re.findall(r"\{pc:([0-9a-f]+)\}", message)))
    tool = shutil.which("addr2line")
    if not counters or not tool:
        return message
    lines = check_output([tool, "-e", str(library), *counters]).splitlines()
    for counter, line in zip(counters, lines, strict=True):
        place = Path(line.split(" (discriminator")[0]).name  # the folder may have spaces
        message = message.replace(f"{{pc:{counter}}}", place)
    return message


def files_of(source: Path, *folders: Path) -> list[Path]:
    """A source and every header that it includes, in turn, from these folders."""
    found, left = set(), [source]
    while left:
        path = left.pop()
        found.add(path)
        for name in re.findall(r'^#include "(.+)"', path.read_text(), re.MULTILINE):
            places = (folder / name for folder in (path.parent, *folders))
            header = next((place for place in places if place.exists()), None)
            if header is not None and header not in found:
                left.append(header)
    return sorted(found)


def hash_of(parts) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.read_bytes() if isinstance(part, Path) else str(part).encode())
        digest.update(b"\0")
    return digest.hexdigest()[:16]


def missing() -> str:
    """What keeps the simulator from being built here, '' if nothing does."""
    if shutil.which(COMPILER) is None:
        return f"the simulator needs {COMPILER} >= 9 on PATH"
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return "the simulator needs Python's headers (on Debian: python3-dev)"
    if importlib.util.find_spec("pybind11") is None:
        return "the simulator needs pybind11"
    return ""


@functools.cache
def _compiler() -> tuple[str, list[str]]:
    """The compiler's version, and flags that only newer ones know."""
    major = int(check_output([COMPILER, "-dumpversion"]).split(".")[0])
    newer = ["-ftrivial-auto-var-init=pattern"] if major >= 12 else []
    return check_output([COMPILER, "--version"]), newer


def check_output(command: list[str], stderr_too: bool = False, **options) -> str:
    """What a command writes; if it fails, an error with all that it said."""
    stderr = subprocess.STDOUT if stderr_too else subprocess.PIPE
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=stderr, text=True, **options)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr or ''}")
    return done.stdout


def _make(output: Path, command: list[str]) -> Path:
    """Runs the compiler unless the output is there. Written aside first: tests may run in parallel."""
    if not output.exists():
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = output.with_suffix(f".{os.getpid()}.tmp")
        check_output([*command, "-o", str(partial)])
        partial.replace(output)
    return output


def _object(source: Path, flags: list[str]) -> Path:
    version, newer = _compiler()
    key = hash_of([version, *flags, *files_of(source, *INCLUDES)])
    command = [COMPILER, *flags, *newer, *COMMON, "-c", str(source)]  # an overlay comes first
    return _make(CACHE / f"{source.stem}-{key}.o", command)


def _python_flags() -> list[str]:
    import pybind11

    includes = [sysconfig.get_paths()["include"], pybind11.get_include()]
    return ["-O1", *(f"-isystem{path}" for path in includes)]


def _runners() -> list[Path]:
    """All of tests/simt/kernels, or those that SIMT_KERNELS names, to work on one kernel at a time."""
    sources = sorted(HERE.glob("kernels/*.cpp"))
    chosen = os.environ.get("SIMT_KERNELS")
    return [s for s in sources if s.stem in chosen.split(",")] if chosen else sources


other_times: list[tuple[str, float]] = []  # what else a test session reports
_built: dict[str, Simulator] = {}


def library(build: str, changed: str = "", overlay: Path | None = None) -> Path:
    """The shared library of a build, compiled if need be.

    The runner `changed` is compiled with the headers of `overlay` in place of their originals.
    """
    jobs = [(source, ["-O2"]) for source in sorted(HERE.glob("runtime/*.cpp"))]
    jobs.append((HERE / "module.cpp", _python_flags()))
    for source in _runners():
        first = [f"-I{overlay}"] if source.name == changed else []
        jobs.append((source, [*first, *BUILDS[build]]))
    # A template that several runners use is taken from the first object: it has to be the changed one.
    jobs.sort(key=lambda job: job[0].name != changed)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda job: _object(*job), jobs))
    link = ["-shared", "-Wl,-Bsymbolic"]
    if build == "asan":
        link.append("-fsanitize=address,undefined")
    key = hash_of([*link, *(path.name for path in objects)])
    return _make(CACHE / f"{build}-{key}.so", [COMPILER, *link, *map(str, objects)])


def mutant(build: str, runner: str, header: str, old: str, new: str, *more: tuple) -> Simulator:
    """A build in which the first `old` in csrc/cuda/`header` reads `new`: a mistake to be caught.

    `more` are further (header, old, new).
    """
    texts = {}
    for name, was, becomes in ((header, old, new), *more):
        text = texts.get(name) or (ROOT / "csrc" / "cuda" / name).read_text()
        before, found, after = text.partition(was)
        assert found, f"{name} has no longer a line that says: {was}"
        texts[name] = before + becomes + after
    overlay = CACHE / f"mutant-{hash_of([part for item in texts.items() for part in item])}"
    for name, text in texts.items():
        path = overlay / "cuda" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Simulator(f"mutant_{overlay.name[-16:]}", library(build, runner, overlay), 0.0)


def build(name: str) -> Simulator:
    if name not in _built:
        begin = time.perf_counter()
        path = library(name)
        _built[name] = Simulator(name, path, time.perf_counter() - begin)
    return _built[name]


def built() -> list[Simulator]:
    return list(_built.values())


def _preloads() -> list[str]:
    """Paths of the sanitizers' libraries; a bare name where the compiler has none."""
    return [check_output([COMPILER, f"-print-file-name={name}"]).strip() for name in PRELOADS]


def has_sanitizers() -> bool:
    return all(Path(path).is_absolute() for path in _preloads())


def asan_environment() -> dict[str, str]:
    """What a Python process needs to load the asan build."""
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(_preloads()),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
    }


if __name__ == "__main__":
    if missing():
        sys.exit(print(missing()))
    for name in sys.argv[1:] or [name for name in BUILDS if name != "asan" or has_sanitizers()]:
        begin = time.perf_counter()
        print(f"{name}: {library(name).relative_to(ROOT)} {time.perf_counter() - begin:.1f} s")
