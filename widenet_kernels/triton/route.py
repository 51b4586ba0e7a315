"""The router: logits = x router_weight^T, gate and mask in one kernel that reads x once, then the plan.

Backward is one kernel for d logits and d x, and two for d router_weight: parts of the tokens each give a partial
sum, and these are added in their order. Products are those of fp32 (fp64) operands: 2 T E D FLOPs each.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from widenet_kernels.triton.gate import choose, gradient, load_rows, store_rows, with_strides
from widenet_kernels.triton.plan import plan_routing
from widenet_kernels.triton.tiles import convert, dot, sum_dtype

MOST_PARTS = 64  # of the tokens, in the sum over them


@triton.jit
def load_tile(ptr, row, stride_row, column, stride_column, mask, SUM: tl.constexpr):
    """[rows, columns] of a matrix, 0 where masked; the indices are int64."""
    tile = tl.load(ptr + row[:, None] * stride_row + column[None, :] * stride_column, mask=mask, other=0.0)
    return convert(tile, SUM)


@triton.jit(do_not_specialize=["num_tokens"])
def _route_kernel(
    x_ptr, x_stride_t, x_stride_d,  # [T, D]
    router_ptr, router_stride_e, router_stride_d,  # [E, D]
    noise_ptr, noise_stride_t, noise_stride_e,  # [T, E] or None
    mask_ptr,  # [T] or None
    weight_ptr, expert_index_ptr, probs_ptr, logits_ptr,  # [T, K], [T, K], [T, E], [T, E]: contiguous
    num_tokens, D,
    E: tl.constexpr, K: tl.constexpr, NORMALIZE: tl.constexpr, SUM: tl.constexpr,
    E_PADDED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    expert = tl.arange(0, E_PADDED).to(tl.int64)
    logits = tl.zeros((BLOCK_T, E_PADDED), SUM)
    for first in range(0, D, BLOCK_D):
        column = first + tl.arange(0, BLOCK_D).to(tl.int64)
        x_mask = (token < num_tokens)[:, None] & (column < D)[None, :]
        x = load_tile(x_ptr, token, x_stride_t, column, x_stride_d, x_mask, SUM)
        router_mask = (expert < E)[:, None] & (column < D)[None, :]
        router = load_tile(router_ptr, expert, router_stride_e, column, router_stride_d, router_mask, SUM)
        logits = dot(x, tl.trans(router), logits, "ieee")
    store_rows(logits_ptr, logits, token, num_tokens, E)
    if noise_ptr is not None:
        logits += load_rows(noise_ptr, noise_stride_t, noise_stride_e, token, num_tokens, E, E_PADDED, SUM)
    weight, expert_index, probs = choose(logits, E, K, NORMALIZE)
    if mask_ptr is not None:
        takes_part = (tl.load(mask_ptr + token, mask=token < num_tokens, other=0) != 0)[:, None]
        weight = tl.where(takes_part, weight, 0.0)
        expert_index = tl.where(takes_part, expert_index, -1)
    store_rows(weight_ptr, weight, token, num_tokens, K)
    store_rows(expert_index_ptr, expert_index, token, num_tokens, K)
    store_rows(probs_ptr, probs, token, num_tokens, E)


@triton.jit(do_not_specialize=["num_tokens"])
def _route_backward_kernel(
    grad_weight_ptr, grad_weight_stride_t, grad_weight_stride_k,  # [T, K] or None
    grad_probs_ptr, grad_probs_stride_t, grad_probs_stride_e,  # [T, E] or None
    grad_logits_ptr, grad_logits_stride_t, grad_logits_stride_e,  # [T, E] or None
    weight_ptr, weight_stride_t, weight_stride_k,  # [T, K]
    expert_index_ptr,  # [T, K], contiguous
    probs_ptr, probs_stride_t, probs_stride_e,  # [T, E]
    router_ptr, router_stride_e, router_stride_d,  # [E, D]
    grad_ptr, asked_ptr, grad_x_ptr,  # [T, E], [T], [T, D] or None: contiguous
    num_tokens, D,
    E: tl.constexpr, K: tl.constexpr, NORMALIZE: tl.constexpr, SUM: tl.constexpr,
    E_PADDED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """grad = d logits, asked = whether a token's is not all 0, grad_x = grad @ router."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    grad = gradient(
        grad_weight_ptr, grad_weight_stride_t, grad_weight_stride_k,
        grad_probs_ptr, grad_probs_stride_t, grad_probs_stride_e,
        weight_ptr, weight_stride_t, weight_stride_k,
        expert_index_ptr, probs_ptr, probs_stride_t, probs_stride_e,
        token, num_tokens, E, K, NORMALIZE, SUM, E_PADDED,
    )  # fmt: skip
    if grad_logits_ptr is not None:
        grad += load_rows(
            grad_logits_ptr, grad_logits_stride_t, grad_logits_stride_e, token, num_tokens, E, E_PADDED, SUM
        )
    store_rows(grad_ptr, grad, token, num_tokens, E)
    asked = tl.max((grad != 0.0).to(tl.int32), axis=1)
    tl.store(asked_ptr + token, asked, mask=token < num_tokens)
    if grad_x_ptr is not None:
        tl.debug_barrier()  # from here on other threads of the program read what has been stored
        for first in range(0, D, BLOCK_D):
            column = first + tl.arange(0, BLOCK_D).to(tl.int64)
            total = tl.zeros((BLOCK_T, BLOCK_D), SUM)
            for first_expert in range(0, E_PADDED, BLOCK_E):
                expert = first_expert + tl.arange(0, BLOCK_E).to(tl.int64)
                grad_mask = (token < num_tokens)[:, None] & (expert < E)[None, :]
                part = load_tile(grad_ptr, token, E, expert, 1, grad_mask, SUM)
                router_mask = (expert < E)[:, None] & (column < D)[None, :]
                router = load_tile(router_ptr, expert, router_stride_e, column, router_stride_d, router_mask, SUM)
                total = dot(part, router, total, "ieee")
            mask = (token < num_tokens)[:, None] & (column < D)[None, :]
            out_ptrs = grad_x_ptr + token[:, None] * D + column[None, :]
            tl.store(out_ptrs, convert(total, grad_x_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_tokens", "part_size"])
def _router_weight_gradient_kernel(
    grad_ptr, asked_ptr,  # [T, E], [T]: contiguous
    x_ptr, x_stride_t, x_stride_d,  # [T, D]
    partial_ptr,  # [parts, E, D], contiguous
    num_tokens, part_size, D,
    E: tl.constexpr, SUM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """partial[p] = grad^T @ x over the tokens of part p; the x of tokens that nothing is asked of is not read."""
    tiles_e, tiles_d = tl.cdiv(E, BLOCK_E), tl.cdiv(D, BLOCK_D)
    part = tl.program_id(0) // (tiles_e * tiles_d)
    tile = tl.program_id(0) % (tiles_e * tiles_d)
    expert = tile // tiles_d * BLOCK_E + tl.arange(0, BLOCK_E).to(tl.int64)
    column = tile % tiles_d * BLOCK_D + tl.arange(0, BLOCK_D).to(tl.int64)
    begin = part.to(tl.int64) * part_size
    total = tl.zeros((BLOCK_E, BLOCK_D), SUM)
    for first in range(0, part_size, BLOCK_T):
        token = begin + first + tl.arange(0, BLOCK_T)
        asked = tl.load(asked_ptr + token, mask=token < num_tokens, other=0) != 0
        grad = load_tile(grad_ptr, expert, 1, token, E, (expert < E)[:, None] & asked[None, :], SUM)  # transposed
        x = load_tile(x_ptr, token, x_stride_t, column, x_stride_d, asked[:, None] & (column < D)[None, :], SUM)
        total = dot(grad, x, total, "ieee")
    mask = (expert < E)[:, None] & (column < D)[None, :]
    tl.store(partial_ptr + (part.to(tl.int64) * E + expert)[:, None] * D + column[None, :], total, mask=mask)


@triton.jit(do_not_specialize=["parts"])
def _sum_parts_kernel(partial_ptr, out_ptr, parts, size, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """out [size] = the sum of partial [parts, size]; 0 of no parts."""
    part = tl.arange(0, PARTS).to(tl.int64)
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = (part < parts)[:, None] & (place < size)[None, :]
    total = tl.sum(tl.load(partial_ptr + part[:, None] * size + place[None, :], mask=mask, other=0.0), axis=0)
    tl.store(out_ptr + place, convert(total, out_ptr.dtype.element_ty), mask=place < size)


# -------------------------------------------------------------------------------------------------------- launchers


def token_blocks(num_experts: int, itemsize: int) -> dict[str, int]:
    """Up to 16 KiB of logits a program: more do not fit its registers beside what the products need."""
    padded = triton.next_power_of_2(num_experts)
    return {
        "E_PADDED": padded,
        "BLOCK_T": max(4, min(128, 16384 // padded) // itemsize),
        "num_warps": 4 if padded <= 256 else 8,
        "num_stages": 2,
    }


def route(
    x: Tensor,
    router_weight: Tensor,
    k: int,
    capacity: int | None,
    noise: Tensor | None,
    normalize: bool,
    priority: str,
    mask: Tensor | None,
) -> tuple[Tensor, ...]:
    """weight, expert_index, probs, logits, and the five tensors of the plan."""
    (num_tokens, dim), num_experts = x.shape, router_weight.shape[0]
    is_wide = torch.float64 in (x.dtype, router_weight.dtype)
    dtype = torch.float64 if is_wide else torch.float32
    weight = x.new_empty(num_tokens, k, dtype=dtype)
    expert_index = x.new_empty(num_tokens, k, dtype=torch.int32)
    probs = x.new_empty(num_tokens, num_experts, dtype=dtype)
    logits = x.new_empty(num_tokens, num_experts, dtype=dtype)
    if num_tokens:
        blocks = token_blocks(num_experts, probs.itemsize)
        _route_kernel[(triton.cdiv(num_tokens, blocks["BLOCK_T"]),)](
            *with_strides(x), *with_strides(router_weight), *with_strides(noise), mask,
            weight, expert_index, probs, logits, num_tokens, dim,
            E=num_experts, K=k, NORMALIZE=normalize, SUM=sum_dtype(x, router_weight),
            **blocks, BLOCK_D=32 if num_experts <= 128 and not is_wide else 16,
        )  # fmt: skip
    score = weight[:, 0] if priority == "score" else None
    return weight, expert_index, probs, logits, *plan_routing(expert_index, num_experts, capacity, priority, score)


def route_backward(
    grad_weight: Tensor | None,
    grad_probs: Tensor | None,
    grad_logits: Tensor | None,
    x: Tensor,
    router_weight: Tensor,
    weight: Tensor,
    expert_index: Tensor,
    probs: Tensor,
    normalize: bool,
    need_x: bool,
    need_router_weight: bool,
) -> tuple[Tensor, Tensor]:
    """d x [T, D] and d router_weight [E, D]; of no elements where not needed."""
    (num_tokens, dim), (num_experts, k) = x.shape, (router_weight.shape[0], expert_index.shape[1])
    grad_x = x.new_empty(x.shape if need_x else 0)
    grad_router_weight = router_weight.new_empty(router_weight.shape if need_router_weight else 0)
    grad = probs.new_empty(num_tokens, num_experts)
    asked = probs.new_empty(num_tokens, dtype=torch.int32)
    if x.numel() and (need_x or need_router_weight):
        blocks = token_blocks(num_experts, probs.itemsize)
        _route_backward_kernel[(triton.cdiv(num_tokens, blocks["BLOCK_T"]),)](
            *with_strides(grad_weight), *with_strides(grad_probs), *with_strides(grad_logits), *with_strides(weight),
            expert_index, *with_strides(probs), *with_strides(router_weight), grad, asked, grad_x if need_x else None,
            num_tokens, dim, E=num_experts, K=k, NORMALIZE=normalize, SUM=sum_dtype(probs),
            **blocks, BLOCK_E=16, BLOCK_D=64,
        )  # fmt: skip
    if grad_router_weight.numel():
        _router_weight_gradient(grad, asked, x, grad_router_weight)
    return grad_x, grad_router_weight


def _router_weight_gradient(grad: Tensor, asked: Tensor, x: Tensor, out: Tensor) -> None:
    """out [E, D] = grad^T @ x, in parts of at least 256 tokens and about as many programs as a GPU holds."""
    (num_tokens, dim), (num_experts, _) = x.shape, out.shape
    block_t, block_d = 16, 128 if grad.itemsize == 4 else 32
    block_e = min(32, triton.next_power_of_2(num_experts))
    tiles = triton.cdiv(num_experts, block_e) * triton.cdiv(dim, block_d)
    parts = min(MOST_PARTS, triton.cdiv(num_tokens, 256), max(1, 1024 // tiles))
    partial = grad.new_empty(parts, num_experts, dim)
    if parts:
        part_size = triton.cdiv(triton.cdiv(num_tokens, parts), block_t) * block_t
        _router_weight_gradient_kernel[(parts * tiles,)](
            grad, asked, *with_strides(x), partial, num_tokens, part_size, dim,
            E=num_experts, SUM=sum_dtype(grad), BLOCK_T=block_t, BLOCK_E=block_e, BLOCK_D=block_d, num_warps=4,
        )  # fmt: skip
    _sum_parts_kernel[(triton.cdiv(out.numel(), 64),)](
        partial, out, parts, out.numel(), PARTS=MOST_PARTS, BLOCK=64, num_warps=4
    )
