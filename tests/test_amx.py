"""The kernels for AMX where there is none: their source, with tile instructions that are ordinary C++."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from resona_ext.ops import resona

ROOT = Path(__file__).resolve().parents[1]
HEADER = ROOT / "tests" / "amx" / "emulated_tiles.h"
ISAS = json.loads(resona._build_info())["cpu_isas"]

pytestmark = [
    pytest.mark.skipif("amx" in ISAS, reason="this processor has AMX: all tests run on it"),
    pytest.mark.skipif(
        "avx512_bf16" not in ISAS, reason="this processor has no vectors of bfloat16"
    ),
    pytest.mark.timeout(900),
]


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A checkout whose library emulates tiles."""
    folder = tmp_path_factory.mktemp("amx")
    build = ["cmake", "-S", ROOT, "-B", folder / "build", "-GNinja", "-DCMAKE_BUILD_TYPE=Release",
             "-DRESONA_USE_CUDA=0", "-DRESONA_PYBIND=0", f"-DPython3_EXECUTABLE={sys.executable}",
             f"-DCMAKE_CXX_FLAGS=-include '{HEADER}' -Wno-unused"]  # fmt: skip
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for command in (build, ["ninja", "-C", folder / "build", "resona"]):
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "PATH": path}
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    (folder / "resona_ext").mkdir()
    for source in (ROOT / "resona_ext").iterdir():
        if source.suffix != ".so":
            (folder / "resona_ext" / source.name).symlink_to(source)
    for name in ("tests", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "build" / "libresona.so").rename(folder / "resona_ext" / "libresona.so")
    return folder


@pytest.mark.parametrize("name", ["test_attention_bfloat16.py", "test_retrieval.py"])
def test_on_emulated_tiles(package, name):
    environment = {**os.environ, "RESONA_CPU_ISA": "amx"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/{name}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=package, env=environment)
    assert done.returncode == 0, done.stdout[-3000:]
