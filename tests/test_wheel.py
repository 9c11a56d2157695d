"""The wheel tooling: which compiler it takes, what it refuses, what it checks. test_wheel_smoke builds."""

from __future__ import annotations

import errno
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from tools.wheel import audit, build, old_glibc, toolkit, watch
from tools.wheel.cli import main
from tools.wheel.errors import WheelError, refused

ROOT = Path(__file__).parents[1]
Disk = namedtuple("Disk", "total used free")
check_tools = audit.check_tools


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch, tmp_path):
    """A machine without nvcc, where the tests put theirs, and with the audit tools on every Python."""
    monkeypatch.setattr(audit, "check_tools", lambda: "torch-abi-audit")
    for variable in ("CUDACXX", "CUDA_HOME", "TORCH_CUDA_ARCH_LIST", "RESONA_PYTHONS"):
        monkeypatch.delenv(variable, raising=False)
    real = shutil.which
    monkeypatch.setattr(
        toolkit.shutil, "which", lambda p, **k: None if p == "nvcc" else real(p, **k)
    )


def fake_nvcc(folder: Path, version: str, script: str = "") -> Path:
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && echo "tools, release {version}, V{version}.88" && exit\n{script}'
    )
    nvcc.chmod(0o755)
    return nvcc


# --- which compiler -------------------------------------------------------------------------------


@pytest.mark.parametrize("cuda", ["cpu", "12.8", "13.0", "13.7"])
def test_versions_that_may_exist(cuda):
    toolkit.check_version(cuda)


@pytest.mark.parametrize("cuda", ["", "13", "cu130", "11.8", "13.0.2", "newest", "CPU", "13.x"])
def test_unknown_versions_are_one_clear_error(cuda, capsys):
    assert main(["--cuda", cuda]) == 2
    error = capsys.readouterr().err
    assert error.startswith("wheel: error: CUDA: expected cpu or a version such as 13.0")
    assert repr(cuda) in error and "13.5" in error and len(error.splitlines()) == 1


def test_the_installed_compiler_is_taken_when_it_matches(tmp_path, monkeypatch):
    home = fake_nvcc(tmp_path / "home", "13.1")
    named = fake_nvcc(tmp_path / "named", "12.8")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CUDACXX", str(named))
    monkeypatch.setattr(toolkit, "bring", lambda cuda, folder: f"brought {cuda}")
    assert toolkit.find("13.1", tmp_path) == str(home)
    assert toolkit.find("12.8", tmp_path) == str(named)
    assert toolkit.find("13.0", tmp_path) == "brought 13.0"


@pytest.mark.parametrize("cuda", ["12.8", "13.99"])
def test_what_pip_has_not_must_be_installed(cuda, tmp_path, monkeypatch, capsys):
    nvcc = fake_nvcc(tmp_path / "home", "13.0")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert main(["--cuda", cuda, "--build", str(tmp_path / "build")]) == 2
    error = capsys.readouterr().err
    for part in (f"CUDA {cuda}: expected an installed compiler", f"{nvcc} (13.0)", "CUDA_HOME"):
        assert part in error


def test_a_compiler_that_does_not_run_is_none(tmp_path):
    assert toolkit.version_of(str(tmp_path / "nvcc")) is None
    (tmp_path / "nvcc").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "nvcc").chmod(0o755)
    assert toolkit.version_of(str(tmp_path / "nvcc")) is None


# --- pip's compiler -------------------------------------------------------------------------------


@pytest.fixture
def pip(monkeypatch):
    """Stands in for pip: writes what the packages would; `fails` makes it stop half way."""

    class Pip:
        fails = False
        calls = 0

        def run(self, command, **_):
            self.calls += 1
            target = Path(command[command.index("--target") + 1])
            (target / "nvidia" / "cu13" / "bin").mkdir(parents=True)
            if not self.fails:
                (target / "nvidia" / "cu13" / "bin" / "nvcc").touch()
                (target / "nvidia" / "cu13" / "lib").mkdir()
            return subprocess.CompletedProcess(command, int(self.fails))

    pip = Pip()
    monkeypatch.setattr(toolkit.subprocess, "run", pip.run)
    return pip


def test_a_toolkit_is_brought_once(pip, tmp_path):
    nvcc = Path(toolkit.bring("13.0", tmp_path))
    assert nvcc.exists() and (nvcc.parents[1] / "lib64").is_dir()
    assert toolkit.bring("13.0", tmp_path) == str(nvcc) and pip.calls == 1
    assert toolkit.bring("13.1", tmp_path) != str(nvcc) and pip.calls == 2
    (tmp_path / "13.0" / ".ready").write_text(
        "cuda-toolkit[nvcc]==13.0.0"
    )  # other pins than today's
    assert toolkit.bring("13.0", tmp_path) == str(nvcc) and pip.calls == 3


def test_an_interrupted_toolkit_is_brought_again(pip, tmp_path):
    pip.fails = True
    with pytest.raises(WheelError, match=r"CUDA 13\.0: pip could not install .*PIP_INDEX_URL"):
        toolkit.bring("13.0", tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "13.0.part" / "nvidia").mkdir(parents=True)  # as after a power failure
    pip.fails = False
    assert Path(toolkit.bring("13.0", tmp_path)).exists()
    assert [path.name for path in tmp_path.iterdir()] == ["13.0"]


def test_no_room_for_the_toolkit(pip, tmp_path, monkeypatch):
    monkeypatch.setattr(toolkit.shutil, "disk_usage", lambda _: Disk(2**40, 2**40, 2**20))
    with pytest.raises(WheelError, match=r"expected 1 GB of free disk .* got 0\.0 GB\. Make room"):
        toolkit.bring("13.0", tmp_path)
    assert pip.calls == 0


# --- what else cannot be ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (
            "echo \"nvcc fatal   : Unsupported gpu architecture 'compute_120'\" >&2; exit 1",
            "compute_120",
        ),
        (
            "echo noise >&2; echo 'host_config.h: #error -- unsupported GNU version!' >&2; exit 1",
            "GNU version",
        ),
        ("exit 1", "cannot compile"),
    ],
)
def test_compiler_that_does_not_fit(script, reason, tmp_path):
    nvcc = fake_nvcc(tmp_path, "12.6", script)
    with pytest.raises(WheelError) as caught:
        toolkit.check_compiles(str(nvcc), ["80", "120"], tmp_path)
    message = str(caught.value)
    assert reason in message and "(12.6) cannot compile for 80, 120" in message
    assert "TORCH_CUDA_ARCH_LIST" in message and "noise" not in message


def test_torch_that_does_not_fit(tmp_path):
    """CMake finds a torch that is too old, and one message says what to do."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").touch()
    (tmp_path / "torch" / "version.py").write_text("__version__ = '2.10.0+cu128'\n")
    command = ["cmake", f"-S{ROOT}", f"-B{tmp_path / 'build'}", "-GNinja", "-DRESONA_USE_CUDA=0",
               f"-DPython3_EXECUTABLE={sys.executable}"]  # fmt: skip
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    message = " ".join(done.stderr.split())
    assert done.returncode != 0
    assert "Expected torch >= 2.11" in message and "got 2.10.0." in message


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_disks_that_refuse(number, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(number, os.strerror(number), "/full/file")

    monkeypatch.setattr(build.old_glibc, "write_stubs", full)
    monkeypatch.setattr(build.toolkit, "find", full)
    assert main(["--cuda", "13.0", "--build", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("wheel: error: /full/file: ") and "--build and --output" in error
    assert len(error.splitlines()) == 1


def test_other_errors_are_not_explained_away():
    assert refused(FileNotFoundError(errno.ENOENT, "no such file", "x"), ROOT) is None


def test_a_full_disk_is_told_before_compiling(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build.shutil, "disk_usage", lambda _: Disk(2**40, 2**40, 2**20))
    assert main(["--cuda", "cpu", "--build", str(tmp_path)]) == 2
    assert "expected 256 MB of free disk, got 1 MB. Make room" in capsys.readouterr().err


def test_missing_audit_tools_are_told_before_compiling(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(audit, "check_tools", check_tools)
    monkeypatch.setattr(audit.importlib.util, "find_spec", lambda _: None)
    assert main(["--cuda", "cpu", "--build", str(tmp_path)]) == 2
    assert "pip install auditwheel torch-abi-audit" in capsys.readouterr().err


def test_a_build_that_fails_tells_how_to_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build.watch, "run", lambda *_: watch.Record(status=1))
    assert main(["--cuda", "cpu", "--build", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "stopped with status 1" in error and "MAX_JOBS=1 NVCC_THREADS=1" in error


def test_interrupted(monkeypatch, tmp_path, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(build.watch, "run", interrupt)
    assert main(["--cuda", "cpu", "--build", str(tmp_path)]) == 130
    assert "goes on from here" in capsys.readouterr().err


@pytest.mark.parametrize("pythons", ["/nowhere/python", os.pathsep.join([sys.executable] * 2)])
def test_pythons_that_cannot_be(pythons, tmp_path):
    command = ["cmake", f"-S{ROOT}", f"-B{tmp_path}", "-GNinja", "-DRESONA_USE_CUDA=0",
               f"-DPython3_EXECUTABLE={sys.executable}",
               f"-DRESONA_PYTHONS={pythons.replace(os.pathsep, ';')}"]  # fmt: skip
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": path})
    assert done.returncode != 0 and "RESONA_PYTHONS: expected" in done.stderr


# --- what is told to setup.py and to CMake --------------------------------------------------------


@pytest.mark.parametrize(
    ("listed", "expected"),
    [(None, ["80", "90a", "100", "120"]), ("8.0 9.0a;12.0+PTX", ["80", "90a", "120"])],
)
def test_architectures(listed, expected, monkeypatch):
    if listed:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    assert build.architectures() == expected


def test_default_architectures_are_those_of_cmake():
    text = (ROOT / "CMakeLists.txt").read_text()
    listed = re.search(r"set\(CMAKE_CUDA_ARCHITECTURES (80-real.*)\)", text)[1].split()
    machine = [name.removesuffix("-real") for name in listed if name.endswith("-real")]
    assert machine == build.DEFAULT_ARCHITECTURES


@pytest.mark.parametrize(("cuda", "label"), [("cpu", "cpu"), ("13.0", "cu130"), ("12.8", "cu128")])
def test_label(cuda, label):
    assert build.Order(cuda, (), Path(), Path()).label == label


def test_tags_are_ordered_by_glibc():
    tags = [
        "manylinux_2_17_x86_64",
        "manylinux_2_28_x86_64",
        "manylinux_2_34_x86_64",
        "linux_x86_64",
    ]
    assert sorted(reversed(tags), key=build._glibc_of) == tags


GIB = 1 << 30


def setup_names(monkeypatch) -> dict:
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    for variable in ("MAX_JOBS", "NVCC_THREADS"):
        monkeypatch.delenv(variable, raising=False)
    return runpy.run_path(str(ROOT / "setup.py"))


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_jobs_fit_into_memory(cuda, threads, monkeypatch):
    names = setup_names(monkeypatch)
    world = names["jobs"].__globals__
    monkeypatch.setitem(world, "available_memory", lambda: memory)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setenv("NVCC_THREADS", str(threads))
    for memory in (0, 1 * GIB, 3 * GIB, 8 * GIB, 1024 * GIB):
        jobs = names["jobs"](cuda)
        each = world["HOST_BYTES"]
        if cuda:
            each = max(each, world["DEVICE_BYTES_PER_THREAD"] * threads)
        assert 1 <= jobs <= 16
        assert jobs == 1 or jobs * each <= memory
        assert jobs == 16 or (jobs + 1) * each > memory
    monkeypatch.setenv("MAX_JOBS", "3")
    assert names["jobs"](cuda) == 3


@pytest.mark.parametrize("variable", ["MAX_JOBS", "NVCC_THREADS"])
@pytest.mark.parametrize("bad", ["0", "-1", "many", "1.5"])
def test_bad_numbers_are_one_clear_error(variable, bad, monkeypatch):
    names = setup_names(monkeypatch)
    monkeypatch.setenv(variable, bad)
    with pytest.raises(SystemExit, match=f"{variable}: expected a number from 1 on, got '{bad}'"):
        names["jobs"](True)


def test_unwritable_build_folder(tmp_path):
    """A file where a folder should be stands for a source tree on a read-only disk."""
    (tmp_path / "file").touch()
    environment = {**os.environ, "RESONA_BUILD_DIR": str(tmp_path / "file" / "build")}
    command = [sys.executable, "setup.py", "-q", "build_ext", f"--build-lib={tmp_path / 'lib'}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode != 0
    assert (
        done.stderr.strip()
        .splitlines()[-1]
        .endswith("Set RESONA_BUILD_DIR to one that can be written.")
    )


# --- link stubs -----------------------------------------------------------------------------------

READELF = """
   Num:    Value          Size Type    Bind   Vis      Ndx Name
     1: 0000000000000000     0 FUNC    GLOBAL DEFAULT  UND other@GLIBC_2.2.5
     2: 0000000000031000    96 FUNC    GLOBAL DEFAULT   14 exp@@GLIBC_2.29
     3: 0000000000041000    80 FUNC    GLOBAL DEFAULT   14 exp@GLIBC_2.2.5
     4: 0000000000051000    80 IFUNC   GLOBAL DEFAULT   14 expf@@GLIBC_2.27
     5: 0000000000061000    80 FUNC    GLOBAL DEFAULT   14 expf@GLIBC_2.2.5
     6: 0000000000071000    80 FUNC    GLOBAL DEFAULT   14 brand_new@@GLIBC_2.36
     7: 0000000000081000     8 TLS     GLOBAL DEFAULT   20 errno@GLIBC_PRIVATE
     8: 0000000000000000     0 OBJECT  GLOBAL DEFAULT  ABS GLIBC_2.29
"""


def test_symbols_in_their_newest_version_that_is_old_enough():
    found = old_glibc.symbols_of(READELF)
    assert {name: symbol.version for name, symbol in found.items()} == {
        "exp": "GLIBC_2.2.5",
        "expf": "GLIBC_2.27",
    }
    assert found["expf"].kind == "IFUNC"


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("GLIBC_2.28", True),
        ("GLIBC_2.29", False),
        ("GLIBC_2.4", True),
        ("GLIBCXX_3.4.24", True),
        ("GLIBCXX_3.4.25", False),
        ("CXXABI_1.3.11", True),
        ("CXXABI_1.3.12", False),
        ("CXXABI_FLOAT128", False),
        ("OTHER_1.0", False),
    ],
)
def test_old_enough(version, expected):
    assert old_glibc.old_enough(version) is expected


needs_glibc = pytest.mark.skipif(
    sys.platform != "linux" or os.uname().machine != "x86_64" or not shutil.which("readelf"),
    reason="stubs are for x86-64 Linux with gcc and binutils",
)


@needs_glibc
def test_stubs_link_old_versions_and_refuse_new_functions(tmp_path):
    stubs = old_glibc.write_stubs(tmp_path / "a path" / "stubs")
    source, library = tmp_path / "x.c", tmp_path / "x.so"
    command = ["gcc", "-shared", "-fPIC", "-fno-builtin", "-Wl,-z,defs", "-o", library, source]
    command += [f"-L{stubs}", "-lpthread", "-ldl", "-lm"]

    def link(body: str) -> subprocess.CompletedProcess:
        source.write_text(body)
        return subprocess.run(command, capture_output=True, text=True)

    done = link(
        "#include <pthread.h>\n#include <dlfcn.h>\n#include <math.h>\n#include <errno.h>\n"
        "double f(double x) { pthread_key_create(0, 0); dlopen(0, errno); return exp(x); }\n"
    )
    assert done.returncode == 0, done.stderr
    text = subprocess.run(
        ["objdump", "-T", library], check=True, capture_output=True, text=True
    ).stdout
    versions = set(re.findall(r"\(((?:GLIBC)_[\d.]+)\)", text))
    assert versions and all(map(old_glibc.old_enough, versions)), versions
    assert {"libpthread.so.0", "libdl.so.2", "libm.so.6"} <= audit.needed_by(library)
    done = link("extern int gnu_dev_brand_new(void); int f(void) { return gnu_dev_brand_new(); }\n")
    assert done.returncode != 0 and "undefined reference" in done.stderr


# --- checks of a wheel ----------------------------------------------------------------------------


def compiled(folder: Path, source: str, *flags: str) -> Path:
    (folder / "x.c").write_text(source)
    library = folder / "libresona.so"
    command = ["gcc", "-shared", "-fPIC", "-nostdlib", *flags, "-o", library, folder / "x.c"]
    subprocess.run(command, check=True)
    return library


ENTRY = "int PyInit__C(void) { return 0; }"


@needs_glibc
@pytest.mark.parametrize(
    ("source", "flags", "message"),
    [
        (ENTRY, [], "stripped"),
        (ENTRY + "int more;", ["-Wl,-s"], "exported.*more"),
        ("static int nothing;", ["-Wl,-s"], "exported"),
        (ENTRY, ["-Wl,-s", "-Wl,--no-as-needed", "-l:libresolv.so.2"], "libresolv"),
    ],
)
def test_binaries_that_break_a_promise(source, flags, message, tmp_path):
    audit._check_binary(Path("x.whl"), compiled(tmp_path, ENTRY, "-Wl,-s"), set())
    with pytest.raises(WheelError, match=message):
        audit._check_binary(Path("x.whl"), compiled(tmp_path, source, *flags), set())


@needs_glibc
def test_a_library_that_does_not_need_torch_is_refused(tmp_path):
    library = compiled(tmp_path, "static int x;", "-Wl,-s")
    with pytest.raises(WheelError, match=r"libresona\.so to need .*libtorch"):
        audit._check_binary(Path("x.whl"), library, audit.TORCH)


# --- watching a build -----------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("folder", ["plain", "with a space"])
def test_watch_sees_each_compilation(tmp_path, folder):
    tmp_path = tmp_path / folder
    (tmp_path / "csrc").mkdir(parents=True)
    source = tmp_path / "csrc" / "slow.cpp"
    source.write_text("x")
    program = "import time; block = bytearray(64 << 20); time.sleep(0.6)"
    (tmp_path / "build.ninja").write_text(
        f"rule compile\n  command = {shlex.quote(sys.executable)} -c '{program}' $in && touch $out\n"
        f"build x.o: compile {str(source).replace(' ', '$ ')}\n"
    )
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    ninja = shutil.which("ninja", path=path)
    record = watch.run([ninja, "-C", str(tmp_path)], dict(os.environ), tmp_path)
    assert record.status == 0 and record.seconds > 0.5
    (compilation,) = record.compilations.items()
    assert compilation[0] == "slow.cpp"
    assert 64 << 20 <= compilation[1].peak_bytes <= 160 << 20
    assert record.peak_bytes == compilation[1].peak_bytes
    assert watch.run([sys.executable, "-c", "exit(3)"], dict(os.environ), tmp_path).status == 3
