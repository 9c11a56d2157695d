"""Does an installed resona_ext work here? Run it with the Python of a fresh environment, from anywhere:

    /path/to/environment/bin/python tools/wheel_smoke.py

Needs torch and the wheel, nothing else, and no GPU. Prints what it ran on as one JSON object; stops with an
error where something is wrong. `--without-pybind` expects resona_ext._C to be missing, and all else to work.
"""

import argparse
import importlib.util
import json
import platform
import subprocess
import sys
import warnings
from pathlib import Path

del sys.path[0]  # the folder of this file: what is tested is what is installed

import torch  # noqa: E402

with warnings.catch_warnings(record=True) as heard:
    warnings.simplefilter("always")
    import resona_ext
from resona_ext import reference  # noqa: E402

SIZES = {"chunk_size": 8, "top_k": 3}
OPS = torch.ops.resona


def tensors(dtype: torch.dtype = torch.float32, grad: bool = False) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    batch, tokens, heads, dim = 2, 96, 4, 16
    shapes = {
        "query": (heads, dim),
        "key": (2, dim),
        "value": (2, dim),
        "query_embedding": (1, 24),
        "context_embedding": (1, 24),
    }
    made = {name: torch.randn(batch, tokens, *s).to(dtype) for name, s in shapes.items()}
    for name in ("query", "key", "value"):
        made[name].requires_grad_(grad)
    return made


def check_forward() -> None:
    """Against the reference: the same selection, the same numbers up to rounding."""
    given = tensors()
    out, lse, indices, scores = OPS.fused_retrieve_attend(**given, **SIZES)
    chunks = OPS.pool_chunks(given["context_embedding"], SIZES["chunk_size"])
    picked, best = reference.retrieve(given["query_embedding"], chunks, 8, 3, 96)
    assert torch.equal(indices, picked) and torch.equal(scores, best)
    expected, expected_lse = reference.attend(
        given["query"], given["key"], given["value"], indices, SIZES["chunk_size"]
    )
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    for dtype in (torch.bfloat16, torch.float16):
        low = OPS.fused_retrieve_attend(**tensors(dtype), **SIZES)[0]
        assert low.dtype == dtype and low.isfinite().all()


def check_gradients() -> None:
    given = tensors(grad=True)
    OPS.fused_retrieve_attend(**given, **SIZES)[0].square().sum().backward()
    assert all(given[name].grad.abs().sum() > 0 for name in ("query", "key", "value"))
    layer = resona_ext.Resona(32, num_heads=2, chunk_size=8, top_k=2)
    x = torch.randn(1, 64, 32)
    layer(x, x).square().sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())


def check_torch_tools() -> None:
    """What is registered from Python: fakes and autograd, by torch's own checker; tracing without a break."""
    given = tensors(grad=True)
    torch.library.opcheck(OPS.fused_retrieve_attend.default, (*given.values(), 8, 3))
    traced = torch.compile(
        lambda **kw: OPS.fused_retrieve_attend(**kw, **SIZES)[0],
        fullgraph=True,
        backend="aot_eager",
    )
    torch.testing.assert_close(
        traced(**tensors()), OPS.fused_retrieve_attend(**tensors(), **SIZES)[0]
    )


def check_errors() -> None:
    try:
        OPS.pool_chunks(torch.ones(1, 4, 1, 4), 0)
    except RuntimeError as error:
        assert "resona::pool_chunks: chunk_size: expected at least 1, got 0" in str(error), error
    else:
        raise AssertionError("chunk_size 0 was accepted")


def command_line(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "resona_ext", *arguments]
    folder = Path(sys.executable).parent  # anywhere but the checkout
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)


def check_command_line(with_pybind: bool) -> dict:
    done = command_line("info", "--json")
    assert done.returncode == 0, done.stderr
    explained = command_line("explain", "--queries", "4096")
    assert (explained.returncode == 0) == with_pybind, explained.stderr
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--without-pybind", action="store_true")
    with_pybind = not parser.parse_args().without_pybind
    package = Path(resona_ext.__file__).parent
    assert package.parent.name in ("site-packages", "dist-packages"), f"not installed: {package}"
    found = importlib.util.find_spec("resona_ext._C")
    assert (found is not None) == with_pybind, f"resona_ext._C: {found}"
    check_forward()
    check_gradients()
    check_torch_tools()
    check_errors()
    info = check_command_line(with_pybind)
    facts = {
        "wheel": info["package"]["installed as"],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch cuda": torch.version.cuda,
        "built with cuda": info["build"]["cuda"],
        "pybind module": with_pybind,
        "cuda usable": info["cuda"]["usable"],
        "why": info["cuda"]["why"],
        "warnings at import": [str(w.message) for w in heard if "resona" in str(w.message)],
        "passed": True,
    }
    print(json.dumps(facts, indent=1))


main()
