"""Bad input of prefix linear attention: one error each, the same words on CPU and fake tensors."""

import pytest
import torch
from prefix_support import Prefix
from torch._subclasses.fake_tensor import FakeTensorMode

ops = torch.ops.resona
F16, F32, F64, BF16 = torch.float16, torch.float32, torch.float64, torch.bfloat16


def step(**changes):
    p = Prefix(tokens=1, rows=0, state=True, dtype=F32)
    names = ("query", "key", "value", "mask")
    states = dict(state=p.arguments["initial_state"], normalizer=p.arguments["initial_normalizer"])
    return ops.prefix_linear_attention_step, {
        **{n: p.arguments[n] for n in names},
        **states,
        **changes,
    }


def whole(**changes):
    return ops.prefix_linear_attention, {**Prefix(dtype=F32, state=True).arguments, **changes}


def packed(**changes):
    return ops.prefix_linear_attention, {**Prefix(dtype=F32, lengths=[10, 20]).arguments, **changes}


def zeros(*shape, dtype=F32):
    return torch.zeros(*shape, dtype=dtype)


BOOL, I32, I64 = torch.bool, torch.int32, torch.int64

# maker, changes, argument, expected, got
BAD_SHAPES_AND_TYPES = [
    (whole, dict(query=zeros(70, 2, 4)), "query", "rank 4 [B, T, H, f]", "shape [70, 2, 4]"),
    (whole, dict(query=zeros(2, 70, 2, 4, dtype=I32)), "query", "dtype float32, float16, bfloat16 or float64", "int32"),
    (whole, dict(query=zeros(2, 70, 2, 0)), "query", "feature dim f from 1 to 32", "f = 0"),
    (whole, dict(query=zeros(2, 70, 2, 33)), "query", "feature dim f from 1 to 32", "f = 33"),
    (whole, dict(key=zeros(2, 70, 2, 5)), "key", "shape [B, T, H, f] = [2, 70, 2, 4]", "[2, 70, 2, 5]"),
    (whole, dict(key=zeros(2, 70, 2, 4, dtype=F16)), "key", "dtype float32 like query", "float16"),
    (whole, dict(value=zeros(2, 70, 2)), "value", "rank 4 [B, T, H, V]", "shape [2, 70, 2]"),
    (whole, dict(value=zeros(2, 70, 2, 129)), "value", "value dim V from 1 to 128", "V = 129"),
    (whole, dict(value=zeros(2, 69, 2, 6)), "value", "shape [B, T, H, V] = [2, 70, 2, 6]", "[2, 69, 2, 6]"),
    (whole, dict(value=zeros(2, 70, 2, 6, dtype=F64)), "value", "dtype float32 like query", "float64"),
    (whole, dict(prefix_key=zeros(2, 40, 4)), "prefix_key", "rank 4 [B, M, H, f]", "shape [2, 40, 4]"),
    (whole, dict(prefix_key=zeros(2, 40, 3, 4)), "prefix_key", "shape [B, M, H, f] = [2, 40, 2, 4]", "[2, 40, 3, 4]"),
    (whole, dict(prefix_key=zeros(2, 40, 2, 4, dtype=BF16)), "prefix_key", "dtype float32 like query", "bfloat16"),
    (whole, dict(prefix_value=zeros(2, 39, 2, 6)), "prefix_value", "shape [B, M, H, V] = [2, 40, 2, 6]", "[2, 39, 2, 6]"),
    (whole, dict(prefix_key=zeros(2, 71, 2, 4), prefix_value=zeros(2, 71, 2, 6)), "prefix_key", "M <= T = 70", "M = 71"),
    (packed, dict(prefix_key=zeros(1, 9, 2, 4), prefix_value=zeros(1, 9, 2, 6)), "prefix_key", "M = T = 30 (or 0) for packed sequences", "M = 9"),
    (whole, dict(cu_seqlens=zeros(3, dtype=I32)), "cu_seqlens", "B = 1 for packed sequences", "B = 2"),
    (packed, dict(cu_seqlens=zeros(3, dtype=I64)), "cu_seqlens", "dtype int32", "int64"),
    (packed, dict(cu_seqlens=zeros(0, dtype=I32)), "cu_seqlens", "at least one value", "none"),
    (packed, dict(cu_seqlens=zeros(1, 3, dtype=I32)), "cu_seqlens", "rank 1 [n + 1]", "shape [1, 3]"),
    (whole, dict(prefix_lengths=zeros(3, dtype=I32)), "prefix_lengths", "shape [n] = [2]", "[3]"),
    (whole, dict(prefix_lengths=zeros(2, dtype=I64)), "prefix_lengths", "dtype int32", "int64"),
    (whole, dict(mask=zeros(2, 69, dtype=BOOL)), "mask", "shape [B, T] = [2, 70]", "[2, 69]"),
    (whole, dict(mask=zeros(2, 70)), "mask", "dtype bool", "float32"),
    (whole, dict(initial_state=zeros(2, 2, 20, 6)), "initial_state", "shape [n, H, F, V] = [2, 2, 21, 6]", "[2, 2, 20, 6]"),
    (whole, dict(initial_state=zeros(2, 2, 21, 6, dtype=F64)), "initial_state", "dtype float32", "float64"),
    (whole, dict(initial_normalizer=zeros(2, 2, 21, 6)), "initial_normalizer", "shape [n, H, F] = [2, 2, 21]", "[2, 2, 21, 6]"),
    (whole, dict(initial_normalizer=None), "initial_normalizer", "to come together with initial_state", "one without the other"),
    (whole, dict(scale=0.0), "scale", "a positive finite number", "0.000000"),
    (whole, dict(scale=-1.5), "scale", "a positive finite number", "-1.500000"),
    (whole, dict(scale=float("nan")), "scale", "a positive finite number", "nan"),
    (whole, dict(scale=float("inf")), "scale", "a positive finite number", "inf"),
    (step, dict(query=zeros(2, 2, 2, 4), key=zeros(2, 2, 2, 4), value=zeros(2, 2, 2, 6)), "query", "T = 1, one new token per sequence", "shape [2, 2, 2, 4]"),
    (step, dict(state=zeros(2, 2, 21, 7)), "state", "shape [B, H, F, V] = [2, 2, 21, 6]", "[2, 2, 21, 7]"),
    (step, dict(state=zeros(2, 2, 21, 6, dtype=BF16)), "state", "dtype float32", "bfloat16"),
    (step, dict(normalizer=zeros(2, 21)), "normalizer", "shape [B, H, F] = [2, 2, 21]", "[2, 21]"),
    (step, dict(mask=zeros(2, dtype=BOOL)), "mask", "shape [B, 1] = [2, 1]", "[2]"),
    (step, dict(scale=-1.0), "scale", "a positive finite number", "-1.000000"),
]  # fmt: skip

BAD_VALUES = [
    (packed, dict(cu_seqlens=torch.tensor([1, 10, 30], dtype=I32)), "cu_seqlens", "a first value of 0", "1"),
    (packed, dict(cu_seqlens=torch.tensor([0, 10, 29], dtype=I32)), "cu_seqlens", "a last value of T = 30", "29"),
    (packed, dict(cu_seqlens=torch.tensor([0, 31, 30], dtype=I32)), "cu_seqlens", "values that never decrease", "31 before 30"),
    (packed, dict(prefix_lengths=torch.tensor([11, 0], dtype=I32)), "prefix_lengths", "0 to 10, the prefix rows of the sequence", "11 at [0]"),
    (whole, dict(prefix_lengths=torch.tensor([40, 41], dtype=I32)), "prefix_lengths", "0 to 40, the prefix rows of the sequence", "41 at [1]"),
    (whole, dict(prefix_lengths=torch.tensor([-1, 3], dtype=I32)), "prefix_lengths", "0 to 40, the prefix rows of the sequence", "-1 at [0]"),
]  # fmt: skip


def message_of(case) -> tuple:
    make, changes, argument, expected, got = case
    op, arguments = make(**changes)
    name = op.__name__ if hasattr(op, "__name__") else str(op)
    return (
        op,
        arguments,
        f"resona::{name.split('.')[-1]}: {argument}: expected {expected}, got {got}",
    )


@pytest.mark.parametrize("case", BAD_SHAPES_AND_TYPES, ids=lambda c: f"{c[2]}-{c[4]}")
def test_bad_shapes_and_types(case):
    op, arguments, expected = message_of(case)
    with torch.no_grad(), pytest.raises(RuntimeError) as real:
        op(**arguments)
    assert expected in str(real.value)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        fakes = {
            k: mode.from_tensor(t) if isinstance(t, torch.Tensor) else t
            for k, t in arguments.items()
        }
        with pytest.raises(RuntimeError) as fake:
            op(**fakes)
    assert expected in str(fake.value)


@pytest.mark.parametrize("case", BAD_VALUES, ids=lambda c: f"{c[2]}-{c[4]}")
def test_bad_values(case):
    op, arguments, expected = message_of(case)
    with pytest.raises(RuntimeError) as error:
        op(**arguments)
    assert expected in str(error.value)


@pytest.mark.parametrize("argument", ["state", "normalizer"])
def test_a_state_is_written_in_place_so_it_is_contiguous(argument):
    op, arguments = step()
    arguments[argument] = arguments[argument].transpose(0, 1).contiguous().transpose(0, 1)
    before = arguments["state"].clone()
    with pytest.raises(
        RuntimeError, match=f"{argument}: expected a contiguous tensor, as it is written"
    ):
        op(**arguments)
    assert torch.equal(arguments["state"], before)


def test_a_step_refuses_gradients():
    op, arguments = step()
    arguments["value"] = arguments["value"].clone().requires_grad_()
    with pytest.raises(
        RuntimeError, match="prefix_linear_attention_step: value: expected no gradient"
    ):
        op(**arguments)
