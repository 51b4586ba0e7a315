"""Rows of the expert buffers back to tokens, weighted and summed, in plain torch."""

import torch
from torch import Tensor

from widenet_kernels.reference.gate import math_dtype


def gather_sum(rows: Tensor, weight: Tensor | None, choice_row: Tensor) -> Tensor:
    """y [T, D] = sum over k of weight[t, k] * rows[choice_row[t, k]], skipping dropped choices."""
    num_tokens, k = choice_row.shape
    dtype = math_dtype(rows, weight)
    total = torch.zeros(num_tokens, rows.shape[1], dtype=dtype, device=rows.device)
    if rows.shape[0] == 0:
        return total.to(rows.dtype)
    for choice in range(k):
        row = choice_row[:, choice]
        served = (row >= 0)[:, None]
        term = torch.where(served, rows.index_select(0, row.clamp(min=0)), 0).to(dtype)
        if weight is not None:
            term = term * torch.where(served, weight[:, choice, None], 0).to(dtype)
        total = total + term
    return total.to(rows.dtype)


def combine(rows: Tensor, weight: Tensor, choice_row: Tensor, row_choice: Tensor) -> Tensor:
    return gather_sum(rows, weight, choice_row)


def combine_backward(
    grad: Tensor,
    rows: Tensor,
    weight: Tensor,
    choice_row: Tensor,
    row_choice: Tensor,
    need_rows: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """d rows [R, D] and d weight [T, K]: 0 for unused rows and dropped choices; of no elements where not needed."""
    k = choice_row.shape[1]
    dtype = math_dtype(rows, weight)
    grad_rows, grad_weight = rows.new_zeros(rows.shape), weight.new_zeros(weight.shape)
    if rows.shape[0] and choice_row.shape[0]:
        used = (row_choice >= 0)[:, None]
        choice = row_choice.clamp(min=0)
        grad_of_row = grad.index_select(0, choice // k).to(dtype)
        weight_of_row = weight.reshape(-1).index_select(0, choice)[:, None].to(dtype)
        grad_rows = torch.where(used, grad_of_row * weight_of_row, 0).to(rows.dtype)
        dot = (grad_of_row * torch.where(used, rows, 0).to(dtype)).sum(dim=-1)
        row = choice_row.reshape(-1)
        grad_weight = torch.where(row >= 0, dot.index_select(0, row.clamp(min=0)), 0)
        grad_weight = grad_weight.view(weight.shape).to(weight.dtype)
    return grad_rows if need_rows else rows.new_empty(0), grad_weight if need_weight else weight.new_empty(0)
