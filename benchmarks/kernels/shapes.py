"""What is measured: shapes and suites, as data. Letters as in resona_ext.functional."""

from __future__ import annotations

from dataclasses import dataclass, replace

PATTERNS = ("random", "correlated", "skewed")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Shape:
    """One problem. Query row i stands at position i + (length - rows)."""

    length: int  # L, context tokens
    chunk_size: int = 64  # S
    top_k: int = 8  # k
    heads: int = 4  # H
    kv_heads: int = 4  # Hkv
    head_dim: int = 64  # D
    retrieval_heads: int = 1  # R
    retrieval_dim: int = 64  # E
    batch: int = 1  # B
    queries: int | None = None  # T; None: as many as context tokens

    @property
    def rows(self) -> int:
        return self.length if self.queries is None else self.queries

    @property
    def label(self) -> str:
        """All sizes, as they stand in the id of a row: L4096T1/S64k8/B1H4x4D64R1E64."""
        rows = "" if self.queries is None else f"T{self.queries}"
        heads = f"B{self.batch}H{self.heads}x{self.kv_heads}D{self.head_dim}"
        retrieval = f"R{self.retrieval_heads}E{self.retrieval_dim}"
        return f"L{self.length}{rows}/S{self.chunk_size}k{self.top_k}/{heads}{retrieval}"

    def with_length(self, length: int) -> Shape:
        return replace(self, length=length)


@dataclass(frozen=True)
class Sweep:
    """One operator over lengths, dtypes and patterns."""

    operator: str
    lengths: tuple[int, ...]
    shape: Shape  # its length is replaced
    dtypes: tuple[str, ...] = ("float32",)
    patterns: tuple[str, ...] = ("random",)
    # Baselines that take part, where calls are long; the others are listed as skipped. None: all.
    baselines: tuple[str, ...] | None = None


CPU = Shape(length=0)
SMALL_CHUNKS = replace(CPU, chunk_size=16, top_k=4)
PAIRS = replace(CPU, chunk_size=2, top_k=1)
ONE_QUERY = replace(CPU, queries=1)

# Dense attention is most of the time of this suite: 25 s a call at 65,536 tokens on two cores. The
# slower baselines stop earlier, and say so.
ANCHORS = ("sdpa", "gather-whole")
CPU_SUITE = (
    Sweep("pool", (4096, 16384, 65536), CPU, ("float32", "bfloat16")),
    Sweep("search", (4096, 16384, 65536), CPU, ("float32", "bfloat16")),
    Sweep("search", (16384,), PAIRS),
    Sweep(
        "attend",
        (1024, 4096, 16384, 65536),
        CPU,
        ("float32", "bfloat16"),
        baselines=("flex", "gather"),
    ),
    Sweep("fused", (1024, 2048, 4096), CPU, ("float32", "bfloat16")),
    Sweep("fused", (8192, 16384, 32768, 65536), CPU, ("float32", "bfloat16"), baselines=ANCHORS),
    Sweep("fused", (16384,), CPU, patterns=("correlated", "skewed"), baselines=ANCHORS),
    Sweep("fused", (16384,), SMALL_CHUNKS, baselines=ANCHORS),
    Sweep("fused", (16384,), PAIRS, baselines=ANCHORS),
    Sweep("backward", (1024, 4096), CPU),
    Sweep("backward", (16384,), CPU, baselines=("sdpa",)),
    Sweep("backward", (65536,), CPU, baselines=()),
    Sweep("decode", (4096, 16384, 65536), ONE_QUERY),
    Sweep("layer-forward", (1024, 4096, 16384), CPU),
    Sweep("layer-train", (1024, 4096, 16384), CPU),
    Sweep("layer-decode", (1024, 4096, 16384), CPU),
)

GPU = Shape(length=0, heads=16, kv_heads=16, head_dim=128, retrieval_dim=128)
GPU_GROUPED = replace(GPU, kv_heads=2)
GPU_NSA = replace(GPU, heads=64, kv_heads=4)  # groups of 16, the shape that Triton NSA is made for
GPU_LONG = (1024, 4096, 16384, 65536, 262144)
BF16 = ("bfloat16",)

GPU_SUITE = (
    Sweep("pool", GPU_LONG, GPU, BF16),
    Sweep("search", GPU_LONG, GPU, BF16),
    Sweep("search", GPU_LONG, replace(GPU, chunk_size=2, top_k=1), BF16),
    Sweep("attend", GPU_LONG, GPU, BF16),
    Sweep("attend", (16384, 65536), GPU_NSA, BF16),
    Sweep("fused", GPU_LONG, GPU, BF16),
    Sweep("fused", (16384, 65536), GPU, BF16, ("correlated", "skewed")),
    Sweep("fused", GPU_LONG, replace(GPU, chunk_size=128), BF16),
    Sweep("fused", GPU_LONG, replace(GPU, chunk_size=16, top_k=4), BF16),
    Sweep("fused", GPU_LONG, replace(GPU, chunk_size=2, top_k=1), BF16),
    Sweep("fused", GPU_LONG, GPU_GROUPED, BF16),
    Sweep("fused", (16384, 65536), replace(GPU, head_dim=64), BF16),
    Sweep("fused", (16384, 65536), GPU_NSA, BF16),
    Sweep("backward", GPU_LONG, GPU, BF16),
    Sweep("backward", GPU_LONG, replace(GPU, chunk_size=16, top_k=4), BF16),
    Sweep("backward", GPU_LONG, replace(GPU, chunk_size=2, top_k=1), BF16),
    Sweep("backward", (16384, 65536), GPU_NSA, BF16),
    Sweep("decode", (16384, 65536, 262144, 1048576), replace(GPU, queries=1), BF16),
    Sweep("layer-forward", (1024, 4096, 16384), replace(GPU, head_dim=64), BF16),
    Sweep("layer-train", (1024, 4096, 16384), replace(GPU, head_dim=64), BF16),
    Sweep("layer-decode", (4096, 65536), replace(GPU, head_dim=64), BF16),
)

# The shapes that docs/cpu-kernels.md sets targets for, against dense attention and FlexAttention.
TARGET = replace(CPU, heads=16, kv_heads=16, head_dim=128, retrieval_dim=128)
TARGET_SUITE = (
    Sweep("fused", (1024, 2048), TARGET, BF16, baselines=("sdpa",)),
    Sweep("fused", (4096,), TARGET, BF16, baselines=("sdpa",)),
    Sweep("attend", (4096,), TARGET, BF16, baselines=("flex",)),
    Sweep("fused", (16384,), TARGET, ("bfloat16", "float32"), baselines=("sdpa",)),
    Sweep("fused", (16384,), replace(TARGET, chunk_size=16, top_k=4), BF16, baselines=("sdpa",)),
    Sweep("fused", (65536,), replace(TARGET, heads=4, kv_heads=4), BF16, baselines=("sdpa",)),
    Sweep("backward", (16384,), TARGET, BF16, baselines=("sdpa",)),
)

# Frozen: continuous integration runs it for function, never for time. Odd sizes on purpose.
TINY = Shape(
    length=0, chunk_size=8, top_k=2, heads=4, kv_heads=2, head_dim=16, retrieval_dim=24, batch=2
)
SMOKE_SUITE = (
    Sweep("pool", (203,), TINY, patterns=PATTERNS),
    Sweep("search", (203,), TINY, ("float32", "bfloat16")),
    Sweep("attend", (203,), TINY, ("float32", "bfloat16")),
    Sweep("fused", (101, 203), TINY, ("float32", "bfloat16")),
    Sweep("backward", (203,), TINY),
    Sweep("decode", (203,), replace(TINY, queries=1)),
    Sweep("layer-forward", (203,), TINY),
    Sweep("layer-train", (203,), TINY),
    Sweep("layer-decode", (203,), TINY),
)

SUITES = {"cpu": CPU_SUITE, "cuda": GPU_SUITE, "smoke": SMOKE_SUITE, "targets": TARGET_SUITE}
