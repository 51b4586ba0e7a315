"""One GEMM per expert over that expert's rows: rows @ weight, its data gradient, and the weight gradient.

The grid follows from shapes alone; how many rows an expert has is read on the device. Where a tile says so, operands
come by tensor descriptors (TMA). Work of one product: 2 * served rows * M * N FLOPs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from widenet_kernels.routing import GATED
from widenet_kernels.triton.activation import activate, activation_backward, activation_constants, sum_slots
from widenet_kernels.triton.tiles import (
    Problem,
    Tile,
    choose_tile,
    current_target,
    dot,
    find_rows,
    halves,
    input_precision,
    place,
    sum_dtype,
)


@triton.jit
def product(a_ptr, a_rows, a_stride_row, a_stride_k, w_ptr, w_stride_k, w_stride_n, column, N, half, depth,
            SUM: tl.constexpr, GLU: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
            PRECISION: tl.constexpr):  # fmt: skip
    """a[a_rows] @ w[:, column], and the same with w[:, half + column] when gated (else again the first)."""
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    a_ptrs = a_ptr + a_rows[:, None] * a_stride_row + k[None, :] * a_stride_k
    w_ptrs = w_ptr + k[:, None] * w_stride_k + column[None, :] * w_stride_n
    a_step, w_step = tl.cast(a_stride_k, tl.int64) * BLOCK_K, tl.cast(w_stride_k, tl.int64) * BLOCK_K
    to_half = tl.cast(half, tl.int64) * w_stride_n
    total = tl.zeros((a_rows.shape[0], column.shape[0]), SUM)
    total_half = total
    for first in range(0, depth, BLOCK_K):
        mask = (column < N)[None, :]
        if EVEN_K:
            a = tl.load(a_ptrs)
        else:
            inside = k < depth - first
            a = tl.load(a_ptrs, mask=inside[None, :], other=0.0)
            mask = mask & inside[:, None]
        total = dot(a, tl.load(w_ptrs, mask=mask, other=0.0), total, PRECISION)
        if GLU:
            total_half = dot(a, tl.load(w_ptrs + to_half, mask=mask, other=0.0), total_half, PRECISION)
        a_ptrs += a_step
        w_ptrs += w_step
    return total, total_half


@triton.jit
def described_product(a, w, expert, first_row, column, half, depth, SUM: tl.constexpr, GLU: tl.constexpr,
                      DESCRIBED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                      PRECISION: tl.constexpr):  # fmt: skip
    """The same of BLOCK_M rows and BLOCK_N columns from the first on, by descriptors: 0 beyond the tensors' ends."""
    total = tl.zeros((BLOCK_M, BLOCK_N), SUM)
    total_half = total
    for k in range(0, depth, BLOCK_K):
        rows = a.load([first_row, k])
        total = dot(rows, described_weight(w, expert, k, column, DESCRIBED, BLOCK_K, BLOCK_N), total, PRECISION)
        if GLU:
            w_half = described_weight(w, expert, k, half + column, DESCRIBED, BLOCK_K, BLOCK_N)
            total_half = dot(rows, w_half, total_half, PRECISION)
    return total, total_half


@triton.jit
def described_weight(w, expert, k, column, DESCRIBED: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr):
    """[BLOCK_K, BLOCK_N] of one expert's weight, which lies in memory as [M, N] ("kn") or as [N, M] ("nk")."""
    if DESCRIBED == "kn":
        tile = tl.reshape(w.load([expert, k, column]), (BLOCK_K, BLOCK_N))
    else:
        tile = tl.trans(tl.reshape(w.load([expert, column, k]), (BLOCK_N, BLOCK_K)))
    return tile


@triton.jit(do_not_specialize=["num_rows", "num_slots"])
def _multiply_kernel(
    a_ptr, a_stride_row, a_stride_k,  # [R, M]; its descriptor if DESCRIBED
    w_ptr, w_stride_e, w_stride_k, w_stride_n,  # [E, M, N], 2N columns when gated; its descriptor if DESCRIBED
    bias_ptr, bias_stride_e, bias_stride_n,  # [E, N] or None, 2N when gated
    out_ptr, z_ptr,  # [R, N] and, or None, [R, N] or [R, 2N]: contiguous
    expert_begin_ptr, expert_count_ptr, num_rows, num_slots, N, depth,
    E: tl.constexpr, ACTIVATION: tl.constexpr, GLU: tl.constexpr, CLEAR: tl.constexpr,
    SUM: tl.constexpr, PRECISION: tl.constexpr, EVEN_K: tl.constexpr, DESCRIBED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out = act(a @ w + bias), z the same before act; CLEAR: and 0 in the rows that nobody uses."""
    slot, tile = place(tl.program_id(0), num_slots, tl.cdiv(N, BLOCK_N), GROUP)
    expert, first_row, served, room = find_rows(slot, expert_begin_ptr, expert_count_ptr, num_rows, E, BLOCK_M)
    rows = first_row + tl.arange(0, BLOCK_M)
    column = tile * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    offset = rows[:, None] * N + column[None, :]
    if CLEAR:
        unused = (rows >= served) & (rows < room)
        nothing = tl.zeros((BLOCK_M, BLOCK_N), out_ptr.dtype.element_ty)
        tl.store(out_ptr + offset, nothing, mask=unused[:, None] & (column < N)[None, :])
    if first_row >= served:
        return

    if DESCRIBED != "":
        z, v = described_product(a_ptr, w_ptr, expert.to(tl.int32), first_row.to(tl.int32), tile * BLOCK_N, N, depth,
                                 SUM, GLU, DESCRIBED, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)  # fmt: skip
    else:
        a_rows = tl.minimum(rows, served - 1)  # beyond the end, any place inside the tensor
        z, v = product(a_ptr, a_rows, a_stride_row, a_stride_k, w_ptr + expert * w_stride_e, w_stride_k, w_stride_n,
                       column, N, N, depth, SUM, GLU, BLOCK_K, EVEN_K, PRECISION)  # fmt: skip
    if bias_ptr is not None:
        bias_ptr += expert * bias_stride_e
    z_left, z_right = halves(z)
    v_left, v_right = halves(v)
    column = tile * BLOCK_N + tl.arange(0, BLOCK_N // 2).to(tl.int64)
    _store_layer(z_left, v_left, bias_ptr, bias_stride_n, out_ptr, z_ptr, rows, served, column, N, ACTIVATION, GLU)
    column += BLOCK_N // 2
    _store_layer(z_right, v_right, bias_ptr, bias_stride_n, out_ptr, z_ptr, rows, served, column, N, ACTIVATION, GLU)


@triton.jit
def _store_layer(z, v, bias_ptr, bias_stride_n, out_ptr, z_ptr, rows, served, column, N,
                 ACTIVATION: tl.constexpr, GLU: tl.constexpr):  # fmt: skip
    """From the products to z and out: bias, activation, rounding."""
    if bias_ptr is not None:
        bias_ptrs = bias_ptr + column * bias_stride_n
        z += tl.load(bias_ptrs, mask=column < N, other=0.0).to(z.dtype)[None, :]
        if GLU:
            to_half = tl.cast(N, tl.int64) * bias_stride_n
            v += tl.load(bias_ptrs + to_half, mask=column < N, other=0.0).to(z.dtype)[None, :]
    mask = (rows < served)[:, None] & (column < N)[None, :]
    out = activate(z, ACTIVATION)
    if GLU:
        out *= v
    tl.store(out_ptr + rows[:, None] * N + column[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)
    if z_ptr is not None:
        width = 2 * N if GLU else N
        z_ptrs = z_ptr + rows[:, None] * width + column[None, :]
        tl.store(z_ptrs, z.to(z_ptr.dtype.element_ty), mask=mask)
        if GLU:
            tl.store(z_ptrs + N, v.to(z_ptr.dtype.element_ty), mask=mask)


def multiply(
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    expert_begin: Tensor,
    expert_count: Tensor,
    num_rows: int,
    activation: str = "",
    save: bool = False,
    clear: bool = False,
) -> tuple[Tensor, Tensor]:
    """act(a[r] @ weight[e] + bias[e]) [R, N] and, if ``save``, the pre-activation (else of no rows).

    Unused rows are 0 if ``clear``, else unwritten.
    """
    glu = activation in GATED
    num_experts, depth, width = weight.shape
    columns = width // 2 if glu else width
    out = a.new_empty(num_rows, columns)
    z = a.new_empty(num_rows if save else 0, width)
    if not out.numel():
        return out, z
    precision = input_precision(a.dtype)
    form = "glu" if glu else "activated" if activation else "rows"
    problem = Problem(form, a.dtype, num_rows // num_experts, columns, depth, precision)
    tile = choose_tile(problem, current_target())
    num_slots = num_rows // tile.block_m + num_experts
    described = description(a, weight, columns) if tile.described else ""
    operands = describe(a, weight, described, tile) if described else (a, weight)
    _multiply_kernel[(num_slots * triton.cdiv(columns, tile.block_n),)](
        operands[0], *a.stride(), operands[1], *weight.stride(), bias, *((0, 0) if bias is None else bias.stride()),
        out, z if save else None, expert_begin, expert_count, num_rows, num_slots, columns, depth,
        E=num_experts, CLEAR=clear, SUM=sum_dtype(a), PRECISION=precision, EVEN_K=depth % tile.block_k == 0,
        DESCRIBED=described, **activation_constants(activation, a.dtype), **tile.launch(),
    )  # fmt: skip
    return out, z


def description(a: Tensor, weight: Tensor, half: int) -> str:
    """How weight [E, M, N] lies in memory, "kn" or "nk", if it and a [R, M] can be described, else "".

    The gated half of the columns, from ``half`` on, begins at a multiple of 16 bytes too.
    """
    if not can_be_described(a) or half * weight.itemsize % 16:
        return ""
    return "kn" if can_be_described(weight) else "nk" if can_be_described(weight.transpose(1, 2)) else ""


def can_be_described(tensor: Tensor) -> bool:
    """A descriptor wants neighbours in its last dimension, all else at multiples of 16 bytes, and nothing empty."""
    *strides, last = tensor.stride()
    apart = [tensor.data_ptr(), *(stride * tensor.itemsize for stride in strides)]
    return tensor.numel() > 0 and last == 1 and min(strides) > 0 and not any(place % 16 for place in apart)


def describe(a: Tensor, weight: Tensor, described: str, tile: Tile) -> tuple[TensorDescriptor, TensorDescriptor]:
    if described == "kn":
        blocks = [1, tile.block_k, tile.block_n]
    else:
        weight, blocks = weight.transpose(1, 2), [1, tile.block_n, tile.block_k]
    return (
        TensorDescriptor.from_tensor(a, [tile.block_m, tile.block_k]),
        TensorDescriptor.from_tensor(weight, blocks),
    )


# ------------------------------------------------------------------------------------------------- weight gradient


@triton.jit
def add_product(total, a_ptr, a_stride_row, a_stride_m, b_ptr, b_stride_row, b_stride_n, rows, served, m, M, n, N,
                PRECISION: tl.constexpr):  # fmt: skip
    """total + a[rows]^T @ b[rows], of the rows before ``served``."""
    inside = rows < served
    # a is loaded as its transpose, which the tensor cores take as it is
    a_ptrs = a_ptr + m[:, None] * a_stride_m + rows[None, :] * a_stride_row
    b_ptrs = b_ptr + rows[:, None] * b_stride_row + n[None, :] * b_stride_n
    a = tl.load(a_ptrs, mask=inside[None, :] & (m < M)[:, None], other=0.0)
    b = tl.load(b_ptrs, mask=inside[:, None] & (n < N)[None, :], other=0.0)
    return dot(a, b, total, PRECISION)


@triton.jit(do_not_specialize=["num_rows"])
def _weight_gradient_kernel(
    a_ptr, a_stride_row, a_stride_m, b_ptr, b_stride_row, b_stride_n,  # [R, M], [R, N]
    a_described, b_described,  # the same, or both None
    out_ptr, out_stride_e, out_stride_m, out_stride_n,  # [E, M, N]
    expert_begin_ptr, expert_count_ptr, num_rows, M, N,
    ADD: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out[e] = a[rows of e]^T @ b[rows of e]; ADD: added to what out holds."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    expert = tl.program_id(0) // (tiles_m * tiles_n)
    tile_m, tile_n = place(tl.program_id(0) % (tiles_m * tiles_n), tiles_m, tiles_n, GROUP)
    begin = tl.maximum(tl.load(expert_begin_ptr + expert), 0)
    count = tl.minimum(tl.load(expert_count_ptr + expert), num_rows - begin)
    served = begin.to(tl.int64) + count

    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    total = tl.zeros((BLOCK_M, BLOCK_N), SUM)
    if a_described is None:
        for first in range(0, count, BLOCK_K):
            rows = begin.to(tl.int64) + first + tl.arange(0, BLOCK_K)
            total = add_product(total, a_ptr, a_stride_row, a_stride_m, b_ptr, b_stride_row, b_stride_n,
                                rows, served, m, M, n, N, PRECISION)  # fmt: skip
    else:
        # a descriptor knows the end of the tensor and not that of the expert: the last rows come by pointers
        whole = tl.maximum(count, 0) // BLOCK_K * BLOCK_K
        for first in range(0, whole, BLOCK_K):
            a = a_described.load([begin + first, tile_m * BLOCK_M])
            b = b_described.load([begin + first, tile_n * BLOCK_N])
            total = dot(tl.trans(a), b, total, PRECISION)
        if whole < count:
            rows = begin.to(tl.int64) + whole + tl.arange(0, BLOCK_K)
            total = add_product(total, a_ptr, a_stride_row, a_stride_m, b_ptr, b_stride_row, b_stride_n,
                                rows, served, m, M, n, N, PRECISION)  # fmt: skip

    out_ptr += expert.to(tl.int64) * out_stride_e
    left, right = halves(total)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N // 2).to(tl.int64)
    _store_sum(left, out_ptr, out_stride_m, out_stride_n, m, M, n, N, ADD)
    _store_sum(right, out_ptr, out_stride_m, out_stride_n, m, M, n + BLOCK_N // 2, N, ADD)


@triton.jit
def _store_sum(total, out_ptr, out_stride_m, out_stride_n, m, M, n, N, ADD: tl.constexpr):
    out_ptrs = out_ptr + m[:, None] * out_stride_m + n[None, :] * out_stride_n
    mask = (m < M)[:, None] & (n < N)[None, :]
    if ADD:
        total += tl.load(out_ptrs, mask=mask, other=0.0).to(total.dtype)
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=mask)


def weight_gradient(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    expert_begin: Tensor,
    expert_count: Tensor,
    num_rows: int,
    add: bool = False,
) -> None:
    """out[e] [M, N] = a[rows of e]^T @ b[rows of e], 0 for an expert without rows; ``add``: added to ``out``."""
    num_experts, m, n = out.shape
    if not out.numel():
        return
    precision = input_precision(a.dtype)
    tile = choose_tile(Problem("weight", a.dtype, m, n, num_rows // num_experts, precision), current_target())
    described = (None, None)
    if tile.described and can_be_described(a) and can_be_described(b):
        described = (
            TensorDescriptor.from_tensor(a, [tile.block_k, tile.block_m]),
            TensorDescriptor.from_tensor(b, [tile.block_k, tile.block_n]),
        )
    _weight_gradient_kernel[(num_experts * triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n),)](
        a, *a.stride(), b, *b.stride(), *described, out, *out.stride(), expert_begin, expert_count, num_rows, m, n,
        ADD=add, SUM=sum_dtype(a), PRECISION=precision, **tile.launch(),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------- launchers


def grouped_gemm(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    expert_begin: Tensor,
    expert_count: Tensor,
    activation: str,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """act(rows @ weight + bias), and the pre-activation if there is an activation and ``save`` (else of no rows)."""
    places = (expert_begin, expert_count, rows.shape[0])
    return multiply(rows, weight, bias, *places, activation, save=save and activation != "", clear=True)


def grouped_gemm_backward(
    grad: Tensor,
    rows: Tensor,
    weight: Tensor,
    z: Tensor,
    expert_begin: Tensor,
    expert_count: Tensor,
    activation: str,
    need_rows: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """d rows [R, M], d weight [E, M, N] and d bias [E, N]; of no elements where not needed."""
    places = (expert_begin, expert_count, rows.shape[0])
    dz, grad_bias = grad, weight.new_empty(0)
    if need_bias or activation:
        gradient = activation_backward(grad, z, *places[:2], activation, need_rows or need_weight, need_bias)
        dz = grad if gradient.dz is None else gradient.dz
        if gradient.partial is not None:
            grad_bias = weight.new_empty(weight.shape[0], weight.shape[2])
            sum_slots(gradient.partial, grad_bias, *places)
    grad_rows, grad_weight = rows.new_empty(0), weight.new_empty(0)
    if need_rows:
        grad_rows, _ = multiply(dz, weight.transpose(1, 2), None, *places, clear=True)
    if need_weight:
        grad_weight = torch.empty_like(weight)
        weight_gradient(rows, dz, grad_weight, *places)
    return grad_rows, grad_weight, grad_bias
