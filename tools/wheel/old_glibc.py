"""Link stubs of an older C library, so that wheels built on a new system also load on an old one.

A binary asks for each function of the C library in the version that was the newest where it was linked,
and loads nowhere older. But a C library keeps its old versions. A stub is a library of names without code:
every symbol of this machine's library in the newest version that manylinux_2_28 has too. Linked against
stubs a binary asks for those, and a function that is too new is an undefined symbol, an error while
linking. What compiled code needs beyond them is in csrc/common/old_glibc.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

# The newest versions that manylinux_2_28 allows, as does auditwheel.
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11)}

# glibc 2.34 moved these into libc.so.6; a program that asks for the old versions finds them there and here.
HOMES = {
    "libpthread.so.0": r"_*(pthread|sem)_\w+",
    "libdl.so.2": r"dl(open|close|sym|vsym|mopen|error|addr|addr1|info)",
    "librt.so.1": r"(shm|timer|mq|aio|lio)_\w+",
}
KINDS = {"FUNC": "@function", "IFUNC": "@function", "OBJECT": "@object", "TLS": "@tls_object"}


class Symbol(NamedTuple):
    version: str
    kind: str
    size: str


def parsed(version: str) -> tuple[str, tuple[int, ...]] | None:
    """GLIBC_2.28 as ("GLIBC", (2, 28)); None for names without a number, such as GLIBC_PRIVATE."""
    found = re.fullmatch(r"([A-Z]+)_(\d+(?:\.\d+)*)", version)
    return (found[1], tuple(map(int, found[2].split(".")))) if found else None


def old_enough(version: str) -> bool:
    known = parsed(version)
    return known is not None and known[0] in NEWEST and known[1] <= NEWEST[known[0]]


def symbols_of(readelf: str) -> dict[str, Symbol]:
    """From `readelf -W --dyn-syms`: each defined name in its newest version that is old enough."""
    newest: dict[str, Symbol] = {}
    for line in readelf.splitlines():
        columns = line.split()
        if len(columns) < 8 or columns[6] in ("UND", "Ndx", "ABS") or "@" not in columns[7]:
            continue
        name, version = re.split("@+", columns[7])
        if not old_enough(version):
            continue
        if name not in newest or parsed(newest[name].version) < parsed(version):
            newest[name] = Symbol(version, columns[3], columns[2])
    return newest


def write_stubs(folder: Path) -> Path:
    """Fill `folder` with stubs of this machine's C and C++ libraries and return it, for `ld -L`."""
    folder.mkdir(parents=True, exist_ok=True)
    libraries: dict[str, dict[str, Symbol]] = {home: {} for home in (*HOMES, "libc.so.6")}
    for name, symbol in symbols_of(_dynamic_symbols("libc.so.6")).items():
        libraries[_home(name)][name] = symbol
    for soname in ("libm.so.6", "libstdc++.so.6"):
        libraries[soname] = symbols_of(_dynamic_symbols(soname))
    for soname, symbols in libraries.items():
        _write_library(folder, soname, symbols)
        link = folder / f"{soname.split('.so')[0]}.so"
        link.unlink(missing_ok=True)
        if soname != "libc.so.6":
            link.symlink_to(soname)
    # As the real libc.so: a linker script, with the few functions that are linked statically.
    others = " ".join(f'"{folder / home}"' for home in HOMES)
    static, loader = _path_of("libc_nonshared.a"), _path_of("ld-linux-x86-64.so.2")
    (folder / "libc.so").write_text(
        f'GROUP ( "{folder}/libc.so.6" {static} AS_NEEDED ( {others} {loader} ) )\n'
    )
    return folder


def _home(name: str) -> str:
    return next((home for home, names in HOMES.items() if re.fullmatch(names, name)), "libc.so.6")


def _path_of(library: str) -> Path:
    command = ["gcc", f"-print-file-name={library}"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return Path(done.stdout.strip()).resolve()


def _dynamic_symbols(library: str) -> str:
    command = ["readelf", "-W", "--dyn-syms", str(_path_of(library))]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _write_library(folder: Path, soname: str, symbols: dict[str, Symbol]) -> None:
    lines = []
    for number, (name, symbol) in enumerate(sorted(symbols.items())):
        section = '.section .tbss,"awT",@nobits' if symbol.kind == "TLS" else ".text"
        kind = KINDS.get(symbol.kind, "@notype")
        lines += [
            section,
            f".globl stub_{number}",
            f".type stub_{number},{kind}",
            f".size stub_{number},{symbol.size}",
            f"stub_{number}: .zero 1",
            f".symver stub_{number}, {name}@@{symbol.version}",
        ]
    versions = sorted({symbol.version for symbol in symbols.values()})
    script = [f"{versions[0]} {{ local: stub_*; }};", *(f"{v} {{ }};" for v in versions[1:])]
    assembly, exports = folder / f"{soname}.s", folder / f"{soname}.map"
    assembly.write_text("\n".join([*lines, ".section .note.GNU-stack", ""]))
    exports.write_text("\n".join([*script, ""]))
    command = ["gcc", "-shared", "-nostdlib", f"-Wl,-soname,{soname}"]
    command += [f"-Wl,--version-script={exports}", "-o", str(folder / soname), str(assembly)]
    subprocess.run(command, check=True)
