"""The memory of large CPU tensors, which the native ops keep for the next of about the same size."""

import concurrent.futures
import ctypes
import gc
import os
import signal
import threading

import pytest
import torch

import widenet_kernels as wk
from widenet_kernels.ops.native import LIBRARY_FILE
from widenet_kernels.testing.numerics import assert_same_bits

MIB = 1 << 20
KEEPS = tuple(int(n) for n in torch.__version__.split("+")[0].split(".")[:2]) >= (2, 11)
pytestmark = pytest.mark.skipif(not KEEPS, reason="torch before 2.11 has no from_blob that says when memory is free")


@pytest.fixture(autouse=True)
def nothing_kept():
    gc.collect()  # tensors of earlier tests would come back in the midst of one
    wk.empty_cache()
    yield
    wk.empty_cache()


def rows(mib, value=1.0):
    """A new tensor of so many MiB, by an op."""
    x = torch.full((mib * MIB // 4 // 64, 64), value)
    index = torch.zeros(len(x), 1, dtype=torch.int64)
    return wk.permute(x, wk.plan_routing(index, num_experts=1, capacity=None), backend="native")


def test_what_is_no_longer_used_is_used_again():
    first = rows(4).data_ptr()
    assert rows(4).data_ptr() == first
    view = rows(4)[5:]
    assert rows(4).data_ptr() != first, "which the view still has"
    del view
    assert wk.empty_cache() == 8 * MIB


def test_what_is_used_is_left_alone():
    kept, view = rows(4, 1.0), rows(4, 2.0)[5:]
    others = [rows(4, 3.0) for _ in range(3)]
    assert len({t.data_ptr() for t in (kept, *others)}) == 4
    assert (kept == 1).all()
    assert (view == 2).all()
    assert all((t == 3).all() for t in others)


def test_gives_back_what_nobody_uses():
    used, unused = rows(4), rows(8)
    del unused
    assert wk.empty_cache() == 8 * MIB
    assert wk.empty_cache() == 0
    del used
    assert wk.empty_cache() == 4 * MIB


def test_small_tensors_are_not_kept():
    rows(1)
    assert wk.empty_cache() == 0


def test_a_little_less_takes_the_same_much_less_does_not():
    rows(10)
    rows(8)
    assert wk.empty_cache() == 10 * MIB
    rows(10)
    rows(7)  # for which the other is given back
    assert wk.empty_cache() == 7 * MIB


def test_no_more_is_kept_than_was_in_use_at_once():
    for mib in (4, 6, 9, 14, 21):  # none fits into the memory of another
        rows(mib)
    assert wk.empty_cache() == 21 * MIB
    both = rows(4), rows(6)
    del both
    rows(9)
    assert wk.empty_cache() == 9 * MIB


def test_what_cannot_be_had_does_not_count():
    """2^48 bytes are more than a process can address."""
    x, index = torch.zeros(1, 1 << 22), torch.zeros(1, 1, dtype=torch.int64)
    plan = wk.plan_routing(index, num_experts=1, capacity=1 << 24)
    rows(4)
    with pytest.raises(RuntimeError):
        wk.permute(x, plan, backend="native")
    assert wk.empty_cache() == 0, "what was kept may have been what was missing"
    for mib in (4, 6, 9):
        rows(mib)
    assert wk.empty_cache() == 9 * MIB


def test_what_rests_long_is_given_back():
    both = rows(4), rows(30)
    del both
    x, plan = torch.zeros(1 << 14, 64), wk.plan_routing(torch.zeros(1 << 14, 1, dtype=torch.int64), 1, None)
    for _ in range(1100):
        wk.permute(x, plan, backend="native")
    assert wk.empty_cache() == 4 * MIB


def test_gradients_use_the_memory_of_the_last_ones():
    w1, w2 = (torch.randn(4, *shape).requires_grad_() for shape in ((256, 1024), (1024, 256)))
    x, index, weight = torch.randn(8, 256), torch.randint(4, (8, 1)), torch.ones(8, 1)
    plan, where = wk.plan_routing(index, num_experts=4, capacity=None), []
    for _ in range(3):
        wk.moe_ffn(x, weight, plan, w1, None, w2, None, backend="native").sum().backward()
        where.append((w1.grad.data_ptr(), w2.grad.data_ptr()))
        w1.grad = w2.grad = None
    assert where[0] == where[1] == where[2]
    assert wk.empty_cache() == 8 * MIB


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (2, 1, 0), (1, 0, 2)], ids=str)
def test_a_gradient_lies_as_its_weight_does(order):
    """Or autograd would copy it."""
    dense = torch.randn([(4, 512, 256)[i] for i in order])
    w1 = dense.permute([order.index(i) for i in range(3)]).requires_grad_()
    plan = wk.plan_routing(torch.randint(4, (8, 1)), num_experts=4, capacity=None)
    wk.grouped_gemm(torch.randn(8, 512), w1, plan, backend="native").sum().backward()
    assert w1.grad.stride() == w1.stride()


def test_a_gradient_is_dense_where_its_weight_is_not():
    w1 = torch.randn(8, 512, 512)[::2, :, ::2].requires_grad_()
    plan = wk.plan_routing(torch.randint(4, (8, 1)), num_experts=4, capacity=None)
    (grad,) = torch.autograd.grad(wk.grouped_gemm(torch.randn(8, 512), w1, plan, backend="native").sum(), [w1])
    assert grad.is_contiguous()


def test_a_gradient_of_a_repeated_weight_is_contiguous():
    w1 = torch.randn(1, 512, 512).expand(4, -1, -1).requires_grad_()
    plan = wk.plan_routing(torch.randint(4, (8, 1)), num_experts=4, capacity=None)
    (grad,) = torch.autograd.grad(wk.grouped_gemm(torch.randn(8, 512), w1, plan, backend="native").sum(), [w1])
    assert grad.is_contiguous()


def test_a_process_forks_while_threads_take_and_return():
    """The child has the pool as no thread was in the midst of changing it, its lock free, and memory of its own."""
    held, stop = rows(4, 1.0), threading.Event()

    def repeat(work):
        while not stop.is_set():
            work()

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        threads = [pool.submit(repeat, work) for work in (lambda: rows(2), hold_the_lock)]
        try:
            assert all(status_of_a_fork() == 0 for _ in range(30))
        finally:
            stop.set()
        assert all(thread.result() is None for thread in threads)
    assert (held == 1).all()


def hold_the_lock():
    """Most of the time: qsort empties the cache for every comparison, and needs no interpreter, which a fork has."""
    elements = ctypes.create_string_buffer(1 << 17)
    ctypes.CDLL(None).qsort(elements, len(elements), 1, ctypes.CDLL(str(LIBRARY_FILE)).widenet_empty_cache)


def status_of_a_fork():
    """Of a process that takes memory by itself; one that waits for a lock that nobody holds is ended by its alarm."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.alarm(20)
            status = int(not (rows(4, 2.0) == 2).all())
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]


def test_threads_take_and_return_at_once():
    def work(value):
        return all((rows(mib, value) == value).all() for _ in range(20) for mib in (2, 3, 5))

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, map(float, range(8))))


def test_tensors_are_as_torch_makes_them():
    """What moves or keeps a tensor's memory can do so with ours."""
    out = rows(4, 7.0)
    assert_same_bits(out.clone(), out)
    assert (out.numpy() == 7).all()
    out.share_memory_()
    assert out.is_shared()
    assert (out == 7).all()
