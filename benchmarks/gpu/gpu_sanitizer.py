"""The small jobs under the tools of compute-sanitizer, and what their reports say; imports no torch."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass

from gpu_jobs import run_jobs
from gpu_run import Run, end_of, find_program, outcome

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
FOUND = 86  # the exit status that compute-sanitizer is told to use
# A busy machine is slow to start torch; stacks of the host are long and tell nothing that the job does not.
COMMON = ("--launch-timeout", 0, "--show-backtrace", "no")
PROBE = "import torch; print('sum', torch.ones(9, device='cuda').sum().item())"
PROBE_SECONDS = 60
REPORT_BYTES = 8192
MARGIN = 20  # seconds that a tool may take to end
SUMMARY = re.compile(r"^=+ (?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard).*", re.MULTILINE)
REPORT = re.compile(r"^=========\s+(?!COMPUTE-SANITIZER)(?!.*SUMMARY:)\S", re.MULTILINE)


@dataclass(frozen=True)
class Report:
    """What one process under a tool left behind."""

    status: int
    summary: str  # the first that is not zero, else the last; empty: none was printed
    has_found: bool
    text: str  # from the first error on, with the job's name before it, and the end

    @property
    def is_clean(self) -> bool:
        return bool(self.summary) and not self.has_found


def read(status: int, text: str) -> Report:
    summaries = list(SUMMARY.finditer(text))
    bad = [found for found in summaries if int(found[1])]
    told = bad[:1] or summaries[-1:]
    summary = told[0][0].strip("= ") if told else ""
    has_found = bool(bad) or status == FOUND
    return Report(status, summary, has_found, excerpt(text) if has_found else end_of(text))


def excerpt(text: str) -> str:
    first = REPORT.search(text)
    if first is None:
        return end_of(text)
    job = text.rfind("\njob ", 0, first.start())
    begin = first.start() if job < 0 else job + 1
    head, tail = text[begin : begin + REPORT_BYTES], text[begin + REPORT_BYTES :]
    return head + (f"\n...\n{end_of(tail)}" if tail else "")


def probe(run: Run, program: str) -> dict:
    """Asked once in a run: can the tool follow a program of torch here at all?"""
    if "sanitizer" not in run.record:
        command = [program, "--tool", "memcheck", *COMMON, "--report-api-errors", "no"]
        status, text = run.call([*command, sys.executable, "-c", PROBE], PROBE_SECONDS)
        works = SUMMARY.search(text) is not None and "sum 9.0" in text
        run.record["sanitizer"] = {"works": works, "probe": outcome(status), "output": end_of(text)}
    return run.record["sanitizer"]


def command(program: str, tool: str) -> list:
    made = [program, "--tool", tool, "--error-exitcode", FOUND, "--print-limit", 20, *COMMON]
    if tool == "memcheck":
        made += ["--report-api-errors", "no"]  # torch asks for things that it can do without
    # The slow tools watch our kernels only; the others must also see torch's, which write our inputs.
    if tool in ("racecheck", "synccheck"):
        made += ["--kernel-name", "kns=resona"]
    return made


def judge(entry: dict, reports: list[Report]) -> None:
    """Passed is what every process ended with a clean summary of, and all jobs ran well in."""
    entry["summaries"] = [report.summary for report in reports]
    found = [report for report in reports if report.has_found]
    silent = [report for report in reports if not report.summary]
    if found:
        text = "\n".join(r.text[: 2 * REPORT_BYTES // len(found)] for r in found)
        entry.update(output=text, status="failed")
        entry["reason"] = f"found errors, see output ({found[0].summary}); {entry['reason']}"
    elif silent:
        entry.update(output=silent[0].text, status="failed")
        entry["reason"] = f"a process {outcome(silent[0].status)}, no summary; {entry['reason']}"


def sanitizer(run: Run, tool: str, limit: Callable[[], float]) -> Callable[[dict], None]:
    """limit: seconds, asked when the step begins."""

    def body(entry: dict) -> None:
        program = find_program("compute-sanitizer")
        if run.options.device != "cuda":
            entry.update(status="missing", reason="it watches a GPU")
            return
        if program is None:
            where = "compute-sanitizer is not on PATH nor under CUDA_HOME"
            entry.update(status="missing", reason=where)
            return
        probed = probe(run, program)
        if not probed["works"]:
            reason = f"cannot follow a line of torch here: it {probed['probe']}"
            entry.update(status="missing", reason=reason, output=probed["output"])
            return
        reports: list[Report] = []

        def seen(status: int, text: str) -> None:
            reports.append(read(status, text))

        # A graph's capture cannot allocate once torch hands every tensor its own memory, which it has to, or
        # tensors share what the tool takes for one.
        arguments = ["--small", "--no-graphs", "--job-seconds", "100"]
        uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        made = command(program, tool)
        run_jobs(run, entry, limit(), arguments, made, MARGIN, seen, **uncached)
        judge(entry, reports)

    return body
