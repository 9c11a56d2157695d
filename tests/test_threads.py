"""The operators beside threads and processes that others have made."""

import os
import resource
import signal
import threading

import pytest
import torch

from resona_ext.ops import resona as ops


def forward(seed=0, strided=False):
    """Enough work for several threads."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(1, 3000, 4, 32, generator=generator) for _ in range(3))
    if strided:
        query = torch.randn(1, 3000, 32, 4, generator=generator).mT
    embedding = torch.randn(1, 3000, 1, 32, generator=generator)
    return ops.fused_retrieve_attend(query, key, value, embedding, embedding, 16, 4)


def address_space():
    """Bytes that this process has mapped."""
    return int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def packed_chunks():
    context = torch.randn(1, 100_000, 1, 32, generator=torch.Generator().manual_seed(0))
    return ops.pool_chunks(context, 4, torch.tensor([0, 50_001, 100_000], dtype=torch.int32))


def assert_same(got, expected):
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("seed", [0, 1])
def test_any_number_of_threads_gives_the_same_bits(seed, threads):
    results = []
    for count in (1, 2, 5):
        threads(count)
        results.append(forward(seed))
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


def test_python_threads_call_at_once(threads):
    threads(2)
    expected = [forward(seed) for seed in range(4)]
    got = [None] * 4

    def work(i):
        for _ in range(3):
            got[i] = forward(i)

    callers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=60)
    for a, b in zip(got, expected, strict=True):
        assert_same(a, b)


CALLS = {
    "plain": forward,
    # Left to torch, the copy and the zeros would wait for its workers.
    "rows that are copied first": lambda: forward(strided=True),
    "results that start as zeros": lambda: (packed_chunks(),),
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("starve", [False, True], ids=["", "no threads to be had"])
@pytest.mark.parametrize("call", CALLS)
def test_a_forked_child_does_not_wait_for_the_threads_of_its_parent(call, starve, threads):
    """torch's own operators do (2.13): its OpenMP workers are gone in the child."""
    threads(2)
    expected = CALLS[call]()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(30)
        if starve:
            resource.setrlimit(resource.RLIMIT_AS, (address_space() + (7 << 20),) * 2)
        # Compared by numpy: torch would wait for its workers.
        same = [
            (a.numpy() == b.numpy()).all() for a, b in zip(CALLS[call](), expected, strict=True)
        ]
        os._exit(0 if all(same) else 1)
    _, status = os.waitpid(child, 0)
    assert status == 0, (
        f"the child hung or died: {status}" if os.WIFSIGNALED(status) else "other results"
    )
