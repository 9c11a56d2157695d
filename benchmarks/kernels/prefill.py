"""Prefill of "just read twice" against FlashAttention, as the paper measured it and as a user would.

    python -m benchmarks.kernels.prefill --out benchmarks/results/prefill-cpu

op       the attention operator alone, on random tensors, as in the paper (arXiv 2407.05483, figure 3):
             jrt-rnn     prefix linear attention over n tokens, half of them prefix
             jrt-prompt  causal linear attention over 2 n tokens: everything read twice
             sdpa        causal softmax attention over n tokens
         The paper's kernel leaves out the scale, the denominators and the state; ours has them all.
layer    what a user calls: projections, attention, output projection, over n tokens of width H V:
             jrt-rnn-layer   PrefixLinearAttention
             attention-layer the same with softmax attention and queries and keys of V

ratio    time of sdpa / time, at the same n: above 1, faster than attention.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resona_ext.jrt import PrefixLinearAttention, prefix_linear_attention, reference

from .baselines import import_reason, importable, needs_gpu
from .record import Record, header, path_of
from .timer import Budget, Call, CpuClock, CudaClock, interleaved

# Of the paper, one H100, batch 16, 16 heads, n = 32768: the operator's time against FlashAttention-2's.
PAPER = {"jrt-prompt": 11.9, "jrt-rnn": 19.2}
ANCHOR = {"op": "sdpa", "layer": "attention-layer"}


@dataclass(frozen=True)
class Shape:
    batch: int
    heads: int
    tokens: int
    dtype: torch.dtype
    device: str
    feature_dim: int = 16
    value_dim: int = 64

    def rows(self, tokens: int, dim: int) -> Tensor:
        shape = (self.batch, tokens, self.heads, dim)
        return torch.randn(shape, device=self.device, dtype=self.dtype)


@dataclass
class Contender:
    name: str
    level: str  # "op" or "layer"
    call: Call
    check: Callable[[Tensor], float] | None = None  # of what the call returns: the error


def _error_of_rows(out: Tensor, rows: tuple, prefix: tuple) -> float:
    """Largest error at three tokens of one head against the definition in float64."""
    query, key, value, prefix_key, prefix_value = (t[:1, :, :1].double() for t in (*rows, *prefix))
    worst = 0.0
    for i in (0, query.shape[1] // 3, query.shape[1] - 1):
        seen = (key[:, : i + 1], value[:, : i + 1])
        keys, values = (
            torch.cat(pair, 1) for pair in zip((prefix_key, prefix_value), seen, strict=True)
        )
        features = reference.taylor_features(query[0, i, 0])
        weight = reference.taylor_features(keys[0, :, 0]) @ features
        expected = weight @ values[0, :, 0] / weight.sum()
        worst = max(worst, (out[0, i, 0].double() - expected).abs().max().item())
    return worst


def _linear(name: str, s: Shape, tokens: int, prefix_rows: int) -> Contender:
    query, key = s.rows(tokens, s.feature_dim), s.rows(tokens, s.feature_dim)
    value = s.rows(tokens, s.value_dim)
    prefix = (s.rows(prefix_rows, s.feature_dim), s.rows(prefix_rows, s.value_dim))
    rows = (query, key, value)
    call = lambda: prefix_linear_attention(*rows, *prefix, return_state=True)[0]  # noqa: E731
    return Contender(name, "op", call, lambda out: _error_of_rows(out, rows, prefix))


def _sdpa(s: Shape) -> Contender:
    query, key, value = (s.rows(s.tokens, s.value_dim).transpose(1, 2) for _ in range(3))
    return Contender(
        "sdpa", "op", lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True)
    )


def _flash_attention(s: Shape) -> Contender:
    module = importable("flash_attn")
    query, key, value = (s.rows(s.tokens, s.value_dim) for _ in range(3))
    return Contender(
        "flash-attn", "op", lambda: module.flash_attn_func(query, key, value, causal=True)
    )


def _fla_based(s: Shape) -> Contender:
    """The same features, causal, over what the model would read twice."""
    module = importable("fla.ops.based")
    query, key = (s.rows(2 * s.tokens, s.feature_dim) for _ in range(2))
    value = s.rows(2 * s.tokens, s.value_dim)
    return Contender("fla-based", "op", lambda: module.parallel_based(query, key, value))


def _fla_linear(s: Shape) -> Contender:
    """First-order linear attention at the features' width, over what would be read twice."""
    module = importable("fla.ops.linear_attn")
    query, key = (s.rows(2 * s.tokens, s.value_dim) for _ in range(2))
    value = s.rows(2 * s.tokens, s.value_dim)
    return Contender(
        "fla-linear", "op", lambda: module.chunk_linear_attn(query, key, value, normalize=True)
    )


class ProcessorClock(CpuClock):
    """Time that the process was given, for machines that others use as well; meant for one thread."""

    def prepare(self, call: Call, check=None) -> tuple[Call, str]:
        return call, "processor"

    def seconds(self, call: Call) -> float:
        begin = time.process_time()
        call()
        return time.process_time() - begin


class _AttentionLayer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv_proj = nn.Linear(width, 3 * width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            self.qkv_proj(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))


def _layers(s: Shape) -> list[Contender]:
    width = s.heads * s.value_dim
    x = torch.randn(s.batch, s.tokens, width, device=s.device, dtype=s.dtype)
    ours = PrefixLinearAttention(
        width, s.heads, feature_dim=s.feature_dim, prefix_length=s.tokens // 2
    ).to(s.device, s.dtype)
    theirs = _AttentionLayer(width, s.heads).to(s.device, s.dtype)
    return [
        Contender("jrt-rnn-layer", "layer", lambda: ours(x)[0]),
        Contender("attention-layer", "layer", lambda: theirs(x)),
    ]


# name -> (why it cannot be used on a device, or None; how it is built)
BASELINES = {
    "flash-attn": ("flash_attn", _flash_attention),
    "fla-based": ("fla.ops.based", _fla_based),
    "fla-linear": ("fla.ops.linear_attn", _fla_linear),
}


def _ours_missing(device: str) -> str | None:
    """What keeps the operator from running on a device."""
    if device == "cpu":
        return None
    if not torch._C._dispatch_has_kernel_for_dispatch_key(
        "resona::prefix_linear_attention", "CUDA"
    ):
        return "this build of resona_ext has no CUDA kernels"
    return None if torch.cuda.is_available() else "torch sees no GPU on this machine"


def contenders(s: Shape) -> tuple[list[Contender], dict[str, str]]:
    """Who takes part, and the state of each baseline."""
    found = [
        _linear("jrt-rnn", s, s.tokens, s.tokens // 2),
        _linear("jrt-prompt", s, 2 * s.tokens, 0),
        _sdpa(s),
        *_layers(s),
    ]
    states = {}
    for name, (module, build) in BASELINES.items():
        states[name] = needs_gpu(s.device) or import_reason(module) or "used"
        if states[name] == "used":
            found.append(build(s))
    return found, states


def tolerance(dtype: torch.dtype) -> float:
    """Of outputs, which are means of values of size 1: a rounding, or the sums' in float32."""
    return max(2 * torch.finfo(dtype).eps, 1e-4)


@torch.no_grad()
def measure(s: Shape, clock, budget: Budget, result: Record) -> None:
    """Check every contender once, time all in turns, add a row for each."""
    found, states = contenders(s)
    result.baselines.update(states)
    for c in found:
        out = c.call()
        error = 0.0 if c.check is None else c.check(out)
        if error > tolerance(s.dtype) or not bool(out.isfinite().all()):
            raise RuntimeError(
                f"prefill: {c.name}: expected an error below {tolerance(s.dtype)}, got {error}"
            )
    timings, failed = interleaved({c.name: c.call for c in found}, clock, budget)
    for c in found:
        row = {
            "id": f"{c.name}/{s.tokens}",
            "contender": c.name,
            "level": c.level,
            "tokens": s.tokens,
            "batch": s.batch,
            "heads": s.heads,
            "feature_dim": s.feature_dim,
            "value_dim": s.value_dim,
            "dtype": str(s.dtype).removeprefix("torch."),
        }
        if c.name in failed:
            result.add({**row, "status": "failed", "reason": str(failed[c.name]).splitlines()[0]})
            continue
        seconds, anchor = timings[c.name].median, timings.get(ANCHOR[c.level])
        ratio = None if anchor is None else round(anchor.median / seconds, 3)
        calls = len(timings[c.name].samples)
        row |= {
            "status": "ok",
            "median_ms": round(seconds * 1e3, 3),
            "calls": calls,
            "ratio": ratio,
        }
        row |= {"method": timings[c.name].method, "paper_ratio": PAPER.get(c.name)}
        result.add(row)
        print(
            f"{row['id']:24} {row['median_ms']:10.2f} ms   {ratio} x {ANCHOR[c.level]}", flush=True
        )


def plot(result: dict, path: Path) -> None:
    """Ratio to attention against length."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(8, 3.4))
    for axis, (level, anchor) in zip(axes, ANCHOR.items(), strict=True):
        curves: dict[str, list[tuple[int, float]]] = {}
        for row in result["rows"].values():
            if row["level"] == level and row["contender"] != anchor and row["status"] == "ok":
                curves.setdefault(row["contender"], []).append((row["tokens"], row["ratio"]))
        for name, points in curves.items():
            axis.plot(*zip(*sorted(points), strict=True), "o-", label=name)
        axis.axhline(1, color="#8a8f98", linewidth=1)
        axis.set(title=f"time of {anchor} / time", xlabel="n", xscale="log")
        axis.set_xscale("log", base=2)
        axis.legend(frameon=False)
        axis.grid(alpha=0.3)
    machine = result["machine"]
    figure.suptitle(
        f"{machine.get('gpu') or machine['cpu']}, {machine['threads']} threads", fontsize=9
    )
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels.prefill",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    cuda = torch.cuda.is_available()
    add("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    add("--batch", type=int, help="default: 16 as in the paper, 1 on a CPU")
    add("--heads", type=int, default=16)
    add("--lengths", help="n, with commas; default: 2048 to 32768, to 8192 on a CPU")
    add(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="default: bfloat16, float32 on a CPU",
    )
    add(
        "--seconds", type=float, default=1.0, help="per contender and length (default: %(default)s)"
    )
    add("--threads", type=int, help="of the CPU")
    add("--processor-time", action="store_true", help="in place of wall time; needs --threads 1")
    add("--out", type=Path, required=True, metavar="PREFIX", help="of the .json, .csv and .png")
    args = parser.parse_args(argv)
    on_cpu = args.device == "cpu"
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.processor_time and not (on_cpu and args.threads == 1):
        parser.error("--processor-time: expected --device cpu --threads 1")
    reason = _ours_missing(args.device)
    if reason:
        parser.error(f"--device {args.device}: {reason}")
    lengths = args.lengths or ("2048,4096,8192" if on_cpu else "2048,4096,8192,16384,32768")
    dtype = getattr(torch, args.dtype or ("float32" if on_cpu else "bfloat16"))
    clock = ProcessorClock() if args.processor_time else CpuClock() if on_cpu else CudaClock()
    result = Record(header([], args.device))
    result.header["command"] = "python -m benchmarks.kernels.prefill " + shlex.join(argv)
    for n in map(int, lengths.split(",")):
        torch.manual_seed(0)
        batch = args.batch or (1 if on_cpu else 16)
        shape = Shape(batch, args.heads, n, dtype, args.device)
        measure(shape, clock, Budget(args.seconds), result)
        result.write(args.out)
    result.complete = True
    result.write(args.out)
    plot(result.as_json(), path_of(args.out, "png"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
