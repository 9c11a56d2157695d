"""The GPU's cases, on the GPU where there is one and on the CPU, which shows that they can be met."""

import json

import gpu_cases
import gpu_runs
import pytest
import torch
from gpu_operators import Case


def why_not() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device: torch.cuda.is_available() is false"
    if json.loads(torch.ops.resona._build_info())["cuda"] == "none":
        return "libresona.so was built without CUDA"
    return None


@pytest.mark.gpu
@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
@pytest.mark.parametrize("job", gpu_cases.jobs("cuda"), ids=str)
def test_on_gpu(job):
    job.run("cuda")


@pytest.mark.parametrize("job", gpu_cases.jobs("cpu"), ids=str)
def test_on_cpu(job, threads):
    threads(1)  # small problems
    job.run("cpu")


def test_a_wrong_result_is_seen():
    expected = torch.tensor([1.0, -0.0, float("nan")])
    gpu_runs.assert_same_bits("x", expected.clone(), expected)
    for i, value in ((0, 1.0000001), (1, 0.0), (2, 3.0)):
        other = expected.clone()
        other[i] = value
        with pytest.raises(
            AssertionError, match=rf"x: 1 of 3 elements differ, the first at \[{i}\]"
        ):
            gpu_runs.assert_same_bits("x", other, expected)


@pytest.mark.parametrize("op", ["pool_chunks", "retrieve"])
def test_a_wrong_gradient_is_seen(op):
    problem = gpu_runs.Problem(Case(op, "small"))
    names = problem.operator.differentiable
    right = problem._reference_gradients(problem.arguments)
    problem.check_gradients(right)
    for i in range(len(names)):
        wrong = [g.clone() for g in right]
        wrong[i][0, 3, 0, 0] += 1e-4
        with pytest.raises(AssertionError, match=f"gradient of {names[i]}: error"):
            problem.check_gradients(tuple(wrong))


def test_names_are_unique():
    names = [str(job) for job in gpu_cases.jobs("cuda")]
    assert len(names) == len(set(names))
