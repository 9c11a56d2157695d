"""A kernel's arguments and what must come out: plain data, so that every build can run the same cases."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from harness import Schedule, Simulator


def index_workspace(slots: int, keys: int) -> np.ndarray:
    """Bytes enough for the inverted index of small problems, whichever way it is built."""
    return np.empty(24 * slots + 16 * keys + (1 << 17), np.uint8)


@dataclass
class Case:
    name: str
    kernel: str
    inputs: dict[str, np.ndarray]
    expected: dict[
        str, np.ndarray
    ]  # written by the kernel in full, unless `outputs` holds the rest
    outputs: dict[str, np.ndarray] = field(
        default_factory=dict
    )  # values that the kernel starts from
    workspace: dict[str, np.ndarray] = field(
        default_factory=dict
    )  # written and read, uninitialised
    scalars: dict[str, int | str] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)  # of 16-bit results, to tell NaN
    near: dict[str, np.ndarray] = field(
        default_factory=dict
    )  # how far results may be from what is expected; the rest has the very bits

    def check(
        self, sim: Simulator, schedule: Schedule, truncated_products: bool = False
    ) -> dict[str, np.ndarray]:
        """Runs the case and compares bit for bit; any NaN equals any other. Returns what was written."""
        outputs = {name: array.copy() for name, array in self.outputs.items()}
        fresh = {
            name: np.empty_like(array)
            for name, array in {**self.expected, **self.workspace}.items()
            if name not in outputs
        }
        sim.run(
            self.kernel, self.inputs, outputs, fresh, schedule, truncated_products, **self.scalars
        )
        got = {**outputs, **fresh}
        for name, expected in self.expected.items():
            differ = _without_nan(got[name], self.dtypes.get(name)) != _without_nan(
                expected, self.dtypes.get(name)
            )
            if name in self.near:
                here, there = (values_of(x, self.dtypes.get(name)) for x in (got[name], expected))
                with np.errstate(invalid="ignore"):
                    differ &= ~(np.abs(here - there) <= self.near[name])
            if differ.any():
                first = tuple(int(i) for i in np.argwhere(differ)[0])
                raise AssertionError(
                    f"{self.name} [{schedule}]: {int(differ.sum())} of {differ.size} elements of "
                    f"'{name}' differ, the first at {first}: "
                    f"{got[name][first]!r}, expected {expected[first]!r}"
                )
        return got


def values_of(array: np.ndarray, dtype: str | None) -> np.ndarray:
    """Bare bits as the numbers that they stand for."""
    if dtype == "bfloat16":
        return (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return array.view(np.float16) if dtype == "float16" else array


def _without_nan(array: np.ndarray, dtype: str | None) -> np.ndarray:
    """The bits, with one pattern for NaN."""
    values = values_of(array, dtype)
    bits = array.view(f"u{array.itemsize}").copy()
    if values.dtype.kind == "f":
        bits[np.isnan(values)] = np.iinfo(bits.dtype).max
    return bits
