"""From a source archive to a wheel in a fresh environment and out of it again, as a user does it; CPU only.

The CUDA wheels are built and checked by hand: docs/wheels.md.
"""

from __future__ import annotations

import os
import re
import shutil
import site
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SMOKE = ROOT / "tools" / "wheel_smoke.py"
# cmake and ninja come from the environment that runs the tests, activated or not.
ENVIRONMENT = {
    **os.environ,
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "RESONA_USE_CUDA": "0",
    "RESONA_PYTHONS": sys.executable,
}
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.version_info < (3, 11), reason="torch-abi-audit needs Python 3.11"),
]


def run(*command, **options) -> subprocess.CompletedProcess:
    options = {"capture_output": True, "text": True, "env": ENVIRONMENT, **options}
    done = subprocess.run([*map(str, command)], **options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """What is in the source archive of this checkout, unpacked; the checkout may hold binaries."""
    folder = tmp_path_factory.mktemp("sdist")
    checkout = folder / "checkout"
    skip = shutil.ignore_patterns(
        ".venv", "build", "dist", ".git", "*.so", "*.egg-info", "__pycache__", "results"
    )
    shutil.copytree(ROOT, checkout, ignore=skip)
    (checkout / "resona_ext" / "libresona.so").write_bytes(b"not to be packed")
    (checkout / "resona_ext" / "_C.other.so").write_bytes(b"not to be packed")
    run(sys.executable, "setup.py", "-q", "sdist", cwd=checkout)
    (archive,) = (checkout / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as content:
        content.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return unpacked


@pytest.fixture(scope="module")
def wheel(source):
    (source / "resona_ext" / "_C.stale.so").write_bytes(b"of an earlier build, not to be packed")
    run(sys.executable, "-m", "tools.wheel", "--cuda", "cpu", cwd=source)
    (built,) = (source / "dist").glob("*.whl")
    return built


def test_sdist_holds_what_a_build_needs_and_no_binary(source):
    names = {str(path.relative_to(source)) for path in source.rglob("*")}
    assert {
        "CMakeLists.txt",
        "csrc/cpu/micro/kernel_set.inc",
        "csrc/exports.map",
        "tests/support.py",
        "tools/wheel/old_glibc.py",
    } <= names
    before = {name for name in names if not name.startswith(("build", "dist"))}
    assert not any(name.endswith(".so") and "stale" not in name for name in before)


def test_tag_and_contents(wheel, source):
    assert re.fullmatch(
        r"resona_ext-\d+\.\d+\.\d+\+cpu-py3-none-(manylinux_2_\d+|linux)_\w+\.whl", wheel.name
    )
    content = zipfile.ZipFile(wheel)
    binaries = [name for name in content.namelist() if name.endswith(".so")]
    assert len(binaries) == 2 and "resona_ext/libresona.so" in binaries
    for name in binaries:
        assert str(source).encode() not in content.read(name), f"{name} tells where it was built"


def test_wheel_in_a_fresh_environment(wheel, tmp_path):
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "env")
    python = tmp_path / "env" / "bin" / "python"
    (packages,) = (tmp_path / "env" / "lib").glob("*/site-packages")
    # torch is that of the tests: it lies behind the fresh packages, and no .pth file of it counts
    (packages / "torch-of-the-tests.pth").write_text("\n".join(site.getsitepackages()))
    before = sorted(packages.iterdir())
    run(*PIP, "--python", python, "install", "--no-deps", "--no-index", wheel)
    assert '"passed": true' in run(python, SMOKE, cwd=tmp_path).stdout
    (module,) = (packages / "resona_ext").glob("_C.*.so")
    module.rename(tmp_path / module.name)
    run(python, SMOKE, "--without-pybind", cwd=tmp_path)
    (tmp_path / module.name).rename(module)
    run(*PIP, "--python", python, "uninstall", "-y", "resona_ext")
    assert sorted(packages.iterdir()) == before


def test_pip_builds_the_source_tree(wheel, source, tmp_path):
    """`pip wheel --no-build-isolation`, on the objects of the wheel before, so that it only links."""
    environment = {**ENVIRONMENT, "RESONA_BUILD_DIR": str(source / "build" / "wheel-cpu" / "cmake")}
    del environment["RESONA_PYTHONS"]
    command = [*PIP, "wheel", "--no-build-isolation", "--no-deps", "-w", tmp_path, source]
    run(*command, env=environment)
    (built,) = tmp_path.glob("*.whl")
    assert re.fullmatch(r"resona_ext-[\d.]+-py3-none-linux_\w+\.whl", built.name)
    assert "resona_ext/libresona.so" in zipfile.ZipFile(built).namelist()
