"""Each host twin against its definition, brute force; and the two sides of csrc/cuda/ptx agree."""

import math
import re

import harness
import numpy as np
import pytest
from harness import ROOT, SCHEDULES

PTX = ROOT / "csrc" / "cuda" / "ptx"
TWINS = harness.HERE / "include" / "cuda" / "ptx"
COVERING = SCHEDULES[::3]


@pytest.fixture(params=["plain", "race"])
def sim(request):
    return harness.build(request.param)


@pytest.fixture
def rng():
    return np.random.default_rng(11)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("matrices", [1, 2, 4])
def test_matrix_fragments(sim, rng, matrices, transposed):
    """PTX ISA: lane 4 r + c / 2 holds elements c and c + 1 of row r, the even one in the low half."""
    stored = rng.integers(0, 1 << 16, (matrices, 8, 8), dtype=np.uint16)
    registers = np.zeros((32, matrices), np.uint32)
    for m in range(matrices):
        for lane in range(32):
            r, c = lane // 4, 2 * (lane % 4)
            low, high = (
                (stored[m, c, r], stored[m, c + 1, r]) if transposed else stored[m, r, c : c + 2]
            )
            registers[lane, m] = int(low) | int(high) << 16
    for schedule in COVERING:
        common = {"schedule": schedule, "matrices": matrices, "transposed": int(transposed)}
        loaded, back = np.zeros_like(registers), np.zeros_like(stored)
        sim.run("matrices", {"in": stored}, {"out": loaded}, store=0, **common)
        sim.run("matrices", {"in": registers}, {"out": back}, store=1, **common)
        np.testing.assert_array_equal(loaded, registers)
        np.testing.assert_array_equal(back, stored)


def test_transposed_registers(sim, rng):
    """PTX ISA, movmatrix: fragments of a matrix become those of its transpose."""
    matrix = rng.integers(0, 1 << 16, (8, 8), dtype=np.uint16)
    for schedule in COVERING:
        out = np.zeros((8, 4), np.uint32)
        sim.run("transpose", {"in": matrix.view(np.uint32)}, {"out": out}, schedule=schedule)
        np.testing.assert_array_equal(out.view(np.uint16), matrix.T)


def _operands(rng, dtype, rows, columns):
    """Values, and their storage."""
    if dtype == "float16":
        stored = rng.standard_normal((rows, columns)).astype(np.float16)
        return stored.astype(np.float64), stored.view(np.uint16)
    kept = {"bfloat16": 16, "tf32": 13}[dtype]
    bits = rng.standard_normal((rows, columns)).astype(np.float32).view(np.uint32)
    bits = bits >> kept << kept
    values = bits.view(np.float32)
    stored = (bits >> 16).astype(np.uint16) if dtype == "bfloat16" else values
    return values.astype(np.float64), stored


@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize("dtype, depth", [("bfloat16", 16), ("float16", 16), ("tf32", 8)])
def test_multiply(sim, rng, dtype, depth, truncated):
    a, a_stored = _operands(rng, dtype, 16, depth)
    b, b_stored = _operands(rng, dtype, depth, 8)
    start = rng.standard_normal((16, 8)).astype(np.float32)
    exact = start + a @ b
    for schedule in COVERING:
        c = start.copy()
        sim.run(
            "multiply",
            {"a": a_stored, "b": b_stored},
            {"c": c},
            schedule=schedule,
            truncated_products=truncated,
            dtype=dtype,
        )
        if truncated:
            terms = np.abs(a[:, :, None] * b[None]).max(axis=1)
            bound = (depth + 1) * 2.0**-23 * np.maximum(terms, np.abs(start)) + 2.0**-23 * abs(
                exact
            )
            assert (np.abs(c - exact) <= bound).all()
            assert (c != exact.astype(np.float32)).any()
        else:
            np.testing.assert_array_equal(c, exact.astype(np.float32))


def test_warp_operations(sim, rng):
    x = rng.integers(-50, 50, 32, dtype=np.int32)
    lane = np.arange(32)
    u = x.view(np.uint32)
    remainder = np.fmod(x, 3)  # of C, towards zero
    expected = [
        np.full(32, x[5]),
        x[lane // 8 * 8 + (lane + 3) % 8],
        x[np.where(lane >= 3, lane - 3, lane)],
        x[np.where(lane % 16 + 3 < 16, lane + 3, lane)],
        x[lane ^ 9],
        np.full(32, sum(1 << i for i in range(32) if x[i] > 0)),
        np.zeros(32),
        np.ones(32),
        [sum(1 << j for j in range(32) if remainder[j] == remainder[i]) for i in range(32)],
        np.full(32, x.sum()),
        np.full(32, x.min()),
        np.full(32, u.max()),
        np.full(32, np.bitwise_xor.reduce(u)),
        np.where(lane % 2, x[1::2].max(), x[::2].max()),
    ]
    expected = np.array([np.asarray(row, np.int64) for row in expected]).astype(np.uint32)
    for schedule in COVERING:
        out = np.zeros((len(expected), 32), np.int32)
        sim.run("warp_operations", {"in": x}, {"out": out}, schedule=schedule)
        np.testing.assert_array_equal(out.view(np.uint32), expected)


@pytest.mark.parametrize("count", [1, 3, 128, 261, 384])
def test_named_barriers_and_zero_fill(sim, rng, count):
    tiles = -(-count // 128)
    source = rng.integers(1, 1 << 30, count, dtype=np.uint32)
    expected = np.pad(source, (0, 128 * tiles - count))
    for schedule in SCHEDULES:
        out = np.zeros(128 * tiles, np.uint32)
        sim.run(
            "pipeline",
            {"in": source},
            fresh={"out": out},
            schedule=schedule,
            tiles=tiles,
            count=count,
        )
        np.testing.assert_array_equal(out, expected)


def test_small_copies_and_dynamic_shared_memory(sim, rng):
    source = rng.integers(1, 1 << 30, 96, dtype=np.uint32)
    expected = np.concatenate([source[:94], [0, 0]])[::-1]
    for schedule in COVERING:
        out = np.zeros(96, np.uint32)
        sim.run("small_copies", {"in": source}, {"out": out}, schedule=schedule)
        np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("threads", [1, 31, 33, 96])
def test_barrier_votes(sim, rng, threads):
    x = rng.integers(-9, 9, threads, dtype=np.int32)
    expected = np.repeat([(x > 0).sum(), (x > 5).any(), (x > -100).all()], threads)
    for schedule in COVERING:
        out = np.zeros(3 * threads, np.int32)
        sim.run("barrier_votes", {"in": x}, {"out": out}, schedule=schedule, threads=threads)
        np.testing.assert_array_equal(out, expected)


def _convert(sim, bits, what):
    out = np.zeros_like(bits)
    sim.run("convert", {"in": bits}, {"out": out}, count=bits.size, what=what)
    return out


def test_conversions(plain, rng):
    """Against numpy's rounding, NaN apart; bfloat16 and TF32 against rounding in integers."""
    halves = np.arange(1 << 16, dtype=np.uint32)
    exact = halves.astype(np.uint16).view(np.float16).astype(np.float32)
    np.testing.assert_array_equal(_convert(plain, halves, 0).view(np.float32), exact)
    np.testing.assert_array_equal(_convert(plain, halves, 1), halves << 16)

    bits = np.concatenate([rng.integers(0, 1 << 32, 40000, dtype=np.uint32), halves << 16])
    near_halves = exact.view(np.uint32)[:, None] + np.array(
        [0, 1, 0xFFF, 0x1000, 0x1001], np.uint32
    )
    bits = np.concatenate([bits, near_halves.ravel()])
    value = bits.view(np.float32)
    bits = bits[~np.isnan(value)]
    value = bits.view(np.float32)
    with np.errstate(over="ignore"):
        half = value.astype(np.float16).view(np.uint16)
    np.testing.assert_array_equal(_convert(plain, bits, 2), half)
    wide = bits.astype(np.uint64)
    brain = (wide + 0x7FFF + (wide >> 16 & 1)) >> 16
    np.testing.assert_array_equal(_convert(plain, bits, 3), brain)
    tf32 = np.where(np.isinf(value), wide, (wide + 0x1000) & 0xFFFFE000)
    np.testing.assert_array_equal(_convert(plain, bits, 4), tf32)
    np.testing.assert_array_equal(
        _convert(plain, bits, 5), half.astype(np.uint32) << 16 | half ^ 0x8000
    )
    np.testing.assert_array_equal(_convert(plain, bits, 6), brain << 16 | brain ^ 0x8000)
    nan = np.array([0x7FC00000, 0xFFFFFFFF, 0x7F800001], np.uint32)
    for what, expected in ((2, 0x7FFF), (3, 0x7FFF), (4, 0x7FFFFFFF)):
        assert (_convert(plain, nan, what) == expected).all()


def test_powers_of_two(plain, rng):
    """Rounded once, with subnormals flushed on both sides."""
    x = np.concatenate([rng.uniform(-160, 140, 20000), rng.uniform(-1, 1, 2000), [0, -0.0, 1e-40]])
    x = np.concatenate([x, [-math.inf, math.inf, math.nan, -126, -127, 128]]).astype(np.float32)
    got = _convert(plain, x.view(np.uint32), 7).view(np.float32)
    with np.errstate(over="ignore"):
        exact = np.exp2(x.astype(np.float64)).astype(np.float32)
    exact[exact < 2.0**-126] = 0
    np.testing.assert_allclose(got, exact, rtol=2.0**-23, atol=0)
    assert (got[(exact == 0) | np.isinf(exact)] == exact[(exact == 0) | np.isinf(exact)]).all()


def _functions(path):
    return sorted(re.findall(r"inline(?:__)?\s+[\w:]+\s+(\w+)\(", path.read_text()))


def test_every_instruction_has_a_twin():
    assert [p.name for p in sorted(PTX.iterdir())] == [p.name for p in sorted(TWINS.iterdir())]
    for path in PTX.iterdir():
        assert _functions(path) == _functions(TWINS / path.name), path.name


def test_assembly_only_in_ptx_and_no_torch():
    for path in (ROOT / "csrc" / "cuda").rglob("*"):
        if not path.is_file():
            continue
        text = path.read_text()
        if path.parent != PTX:
            assert not re.search(r"\basm\b", text), f"{path.name}: inline assembly outside ptx/"
        assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", text), (
            f"{path.name} includes torch"
        )


def test_fibers_without_assembly(tmp_path):
    """The ucontext fallback, for processors other than x86-64."""
    driver = tmp_path / "driver.cpp"
    driver.write_text(
        """
        #include "runtime/fiber.h"
        static simt::Context host, fiber;
        static int steps;
        static void entry() {
          simt::entered();
          for (;; ++steps) simt::switch_context(fiber, host);
        }
        int main() {
          simt::prepare(fiber, simt::stack_of_slot(3), entry);
          for (int i = 0; i < 5; ++i) simt::switch_context(host, fiber);
          return steps == 4 ? 0 : 1;
        }
        """
    )
    program = tmp_path / "driver"
    sources = [str(driver), str(harness.HERE / "runtime" / "fiber.cpp")]
    command = [harness.COMPILER, *harness.COMMON, "-DSIMT_UCONTEXT", *sources, "-o", str(program)]
    harness.check_output(command)
    harness.check_output([str(program)])
