"""Top-k gating, one kernel forward and one backward: a program takes whole rows of a few tokens, read once.

What the kernels do to a tile of tokens stands apart from them, for ``route`` does the same to the logits it has
just computed: the same bits. A tile is [BLOCK_T, E_PADDED], E padded to a power of two.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from widenet_kernels.triton.tiles import convert, sum_dtype

# ---------------------------------------------------------------------------------------------- of a tile of tokens


@triton.jit
def load_rows(ptr, stride_t, stride_n, token, num_tokens, WIDTH: tl.constexpr, PADDED: tl.constexpr, SUM: tl.constexpr):
    """The tokens' rows of a [T, WIDTH] tensor, 0 outside it."""
    column = tl.arange(0, PADDED)[None, :].to(tl.int64)
    mask = (token < num_tokens)[:, None] & (column < WIDTH)
    return convert(tl.load(ptr + token[:, None] * stride_t + column * stride_n, mask=mask, other=0.0), SUM)


@triton.jit
def store_rows(ptr, rows, token, num_tokens, WIDTH: tl.constexpr):
    """To the tokens' rows of a contiguous [T, WIDTH] tensor."""
    column = tl.arange(0, rows.shape[1])[None, :]
    mask = (token < num_tokens)[:, None] & (column < WIDTH)
    tl.store(ptr + token[:, None] * WIDTH + column, rows.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def row_sum(tile):
    """[BLOCK_T, width] -> [BLOCK_T, 1], added in pairs: an order that does not depend on which thread holds what."""
    for _ in tl.static_range(16):
        if tile.shape[1] > 1:
            tile = tl.sum(tl.reshape(tile, (tile.shape[0], tile.shape[1] // 2, 2)), axis=2)
    return tile


@triton.jit
def quotient(a, b):
    """a / b rounded to nearest: a plain fp32 division is an approximate one on NVIDIA GPUs."""
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def ranking_key(z):
    """Integers in the order in which z ranks: NaN below -inf, -0 equal to +0. The lowest integer is left free."""
    if z.dtype == tl.float64:
        bits = (z + 0.0).to(tl.int64, bitcast=True)  # -0.0 + 0.0 is +0.0
        return tl.where(z != z, -(2**63) + 1, bits ^ ((bits >> 63) & (2**63 - 1)))
    else:
        bits = (z + 0.0).to(tl.int32, bitcast=True)
        return tl.where(z != z, -(2**31) + 1, bits ^ ((bits >> 31) & (2**31 - 1)))


@triton.jit
def ranked_value(key):
    """The z that a key stands for."""
    if key.dtype == tl.int64:
        return (key ^ ((key >> 63) & (2**63 - 1))).to(tl.float64, bitcast=True)
    else:
        return (key ^ ((key >> 31) & (2**31 - 1))).to(tl.float32, bitcast=True)


@triton.jit
def choose(z, E: tl.constexpr, K: tl.constexpr, NORMALIZE: tl.constexpr):
    """weight and expert_index [BLOCK_T, K padded], 0 in the padding, and probs, from z [BLOCK_T, E_PADDED]."""
    expert = tl.arange(0, z.shape[1])[None, :]
    choice = tl.arange(0, triton.next_power_of_2(K))[None, :]
    LOWEST: tl.constexpr = -(2**63) if z.dtype == tl.float64 else -(2**31)  # padding, and what has been chosen
    z = tl.where(expert < E, z, float("-inf"))
    highest = tl.max(z, axis=1, keep_dims=True)
    probs = tl.exp(z - highest)
    total = row_sum(probs)
    scale = quotient(tl.full(total.shape, 1.0, total.dtype), total)
    probs *= scale

    key = tl.where(expert < E, ranking_key(z), LOWEST)
    weight = tl.zeros((z.shape[0], choice.shape[1]), z.dtype)
    expert_index = tl.zeros((z.shape[0], choice.shape[1]), tl.int32)
    for k in tl.static_range(K):
        best = tl.max(key, axis=1, keep_dims=True)
        first = tl.min(tl.where(key == best, expert, E), axis=1, keep_dims=True)
        key = tl.where(expert == first, LOWEST, key)
        share = tl.exp(ranked_value(best) - highest) * scale  # the bits of probs
        weight = tl.where(choice == k, share, weight)
        expert_index = tl.where(choice == k, first, expert_index)
    if NORMALIZE:
        weight, total = tl.broadcast(weight, row_sum(weight))
        weight = quotient(weight, total)
    return weight, expert_index, probs


@triton.jit
def load_choice(expert_index_ptr, grad_ptr, grad_stride_t, grad_stride_k, weight_ptr, weight_stride_t, weight_stride_k,
                token, num_tokens, k, E: tl.constexpr, K: tl.constexpr, SUM: tl.constexpr):  # fmt: skip
    """The tokens' k-th expert, its d weight and weight, each [BLOCK_T, 1]: -1, 0 and 0 where there is none."""
    expert = tl.load(expert_index_ptr + token * K + k, mask=token < num_tokens, other=-1)
    chosen = (expert >= 0) & (expert < E)
    grad_ptrs = grad_ptr + token * grad_stride_t + tl.cast(grad_stride_k, tl.int64) * k
    weight_ptrs = weight_ptr + token * weight_stride_t + tl.cast(weight_stride_k, tl.int64) * k
    grad = tl.load(grad_ptrs, mask=chosen, other=0.0).to(SUM)
    weight = tl.load(weight_ptrs, mask=chosen, other=0.0).to(SUM)
    return tl.where(chosen, expert, -1)[:, None], grad[:, None], weight[:, None]


@triton.jit
def gradient(
    grad_weight_ptr, grad_weight_stride_t, grad_weight_stride_k,  # [T, K] or None
    grad_probs_ptr, grad_probs_stride_t, grad_probs_stride_e,  # [T, E] or None
    weight_ptr, weight_stride_t, weight_stride_k,  # [T, K]
    expert_index_ptr,  # [T, K], contiguous
    probs_ptr, probs_stride_t, probs_stride_e,  # [T, E]
    token, num_tokens,
    E: tl.constexpr, K: tl.constexpr, NORMALIZE: tl.constexpr, SUM: tl.constexpr, E_PADDED: tl.constexpr,
):  # fmt: skip
    """d logits [BLOCK_T, E_PADDED], 0 for a token of which nothing is asked, whatever its probs hold."""
    expert = tl.arange(0, E_PADDED)[None, :]
    probs = load_rows(probs_ptr, probs_stride_t, probs_stride_e, token, num_tokens, E, E_PADDED, SUM)
    if grad_probs_ptr is None:
        total = tl.zeros(probs.shape, SUM)
    else:
        total = load_rows(grad_probs_ptr, grad_probs_stride_t, grad_probs_stride_e, token, num_tokens, E, E_PADDED, SUM)
    if grad_weight_ptr is not None:
        kept = tl.zeros((probs.shape[0], 1), SUM)  # normalized: w = p / kept, so d p = (d w - sum of d w * w) / kept
        mean = kept
        if NORMALIZE:
            for k in tl.static_range(K):
                index, share, weight = load_choice(
                    expert_index_ptr, grad_weight_ptr, grad_weight_stride_t, grad_weight_stride_k,
                    weight_ptr, weight_stride_t, weight_stride_k, token, num_tokens, k, E, K, SUM,
                )  # fmt: skip
                mean += share * weight
                kept += tl.sum(tl.where(expert == index, probs, 0.0), axis=1, keep_dims=True)
        for k in tl.static_range(K):
            index, share, _ = load_choice(
                expert_index_ptr, grad_weight_ptr, grad_weight_stride_t, grad_weight_stride_k,
                weight_ptr, weight_stride_t, weight_stride_k, token, num_tokens, k, E, K, SUM,
            )  # fmt: skip
            if NORMALIZE:
                share = quotient(share - mean, kept)
            total += tl.where(expert == index, share, 0.0)
    asked = tl.max((total != 0.0).to(tl.int32), axis=1, keep_dims=True) > 0
    grad = probs * (total - tl.sum(total * probs, axis=1, keep_dims=True))
    return tl.where(asked, grad, 0.0)


# ---------------------------------------------------------------------------------------------------------- kernels


@triton.jit(do_not_specialize=["num_tokens"])
def _topk_gate_kernel(
    logits_ptr, logits_stride_t, logits_stride_e,  # [T, E]
    noise_ptr, noise_stride_t, noise_stride_e,  # [T, E] or None
    weight_ptr, expert_index_ptr, probs_ptr,  # [T, K], [T, K], [T, E]: contiguous
    num_tokens,
    E: tl.constexpr, K: tl.constexpr, NORMALIZE: tl.constexpr,
    SUM: tl.constexpr, E_PADDED: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    z = load_rows(logits_ptr, logits_stride_t, logits_stride_e, token, num_tokens, E, E_PADDED, SUM)
    if noise_ptr is not None:
        z += load_rows(noise_ptr, noise_stride_t, noise_stride_e, token, num_tokens, E, E_PADDED, SUM)
    weight, expert_index, probs = choose(z, E, K, NORMALIZE)
    store_rows(weight_ptr, weight, token, num_tokens, K)
    store_rows(expert_index_ptr, expert_index, token, num_tokens, K)
    store_rows(probs_ptr, probs, token, num_tokens, E)


@triton.jit(do_not_specialize=["num_tokens"])
def _topk_gate_backward_kernel(
    grad_weight_ptr, grad_weight_stride_t, grad_weight_stride_k,
    grad_probs_ptr, grad_probs_stride_t, grad_probs_stride_e,
    weight_ptr, weight_stride_t, weight_stride_k,
    expert_index_ptr,
    probs_ptr, probs_stride_t, probs_stride_e,
    out_ptr, num_tokens,  # [T, E], contiguous
    E: tl.constexpr, K: tl.constexpr, NORMALIZE: tl.constexpr,
    SUM: tl.constexpr, E_PADDED: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    grad = gradient(
        grad_weight_ptr, grad_weight_stride_t, grad_weight_stride_k,
        grad_probs_ptr, grad_probs_stride_t, grad_probs_stride_e,
        weight_ptr, weight_stride_t, weight_stride_k,
        expert_index_ptr, probs_ptr, probs_stride_t, probs_stride_e,
        token, num_tokens, E, K, NORMALIZE, SUM, E_PADDED,
    )  # fmt: skip
    store_rows(out_ptr, grad, token, num_tokens, E)


# -------------------------------------------------------------------------------------------------------- launchers


def with_strides(tensor: Tensor | None) -> tuple:
    """A matrix as a kernel takes it; None stays None."""
    return (None, 0, 0) if tensor is None else (tensor, *tensor.stride())


def token_blocks(num_experts: int) -> dict[str, int]:
    """1,024 elements a program: few enough that 50,000 tokens of 4 experts keep a GPU busy.

    A longer row is the work of one warp, so that the many reductions over it never wait for another.
    """
    padded = triton.next_power_of_2(num_experts)
    return {"E_PADDED": padded, "BLOCK_T": max(1, 1024 // padded), "num_warps": 4 if padded <= 128 else 1}


def topk_gate(logits: Tensor, k: int, noise: Tensor | None, normalize: bool) -> tuple[Tensor, Tensor, Tensor]:
    num_tokens, num_experts = logits.shape
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    weight = logits.new_empty(num_tokens, k, dtype=dtype)
    expert_index = logits.new_empty(num_tokens, k, dtype=torch.int32)
    probs = logits.new_empty(num_tokens, num_experts, dtype=dtype)
    if num_tokens:
        blocks = token_blocks(num_experts)
        _topk_gate_kernel[(triton.cdiv(num_tokens, blocks["BLOCK_T"]),)](
            *with_strides(logits), *with_strides(noise), weight, expert_index, probs, num_tokens,
            E=num_experts, K=k, NORMALIZE=normalize, SUM=sum_dtype(logits), **blocks,
        )  # fmt: skip
    return weight, expert_index, probs


def topk_gate_backward(
    grad_weight: Tensor | None,
    grad_probs: Tensor | None,
    weight: Tensor,
    expert_index: Tensor,
    probs: Tensor,
    normalize: bool,
) -> Tensor:
    """d logits [T, E] in the dtype of probs."""
    (num_tokens, num_experts), k = probs.shape, expert_index.shape[1]
    out = probs.new_empty(num_tokens, num_experts)
    if num_tokens:
        blocks = token_blocks(num_experts)
        _topk_gate_backward_kernel[(triton.cdiv(num_tokens, blocks["BLOCK_T"]),)](
            *with_strides(grad_weight), *with_strides(grad_probs), *with_strides(weight), expert_index,
            *with_strides(probs), out, num_tokens,
            E=num_experts, K=k, NORMALIZE=normalize, SUM=sum_dtype(probs), **blocks,
        )  # fmt: skip
    return out
