"""Tokens to rows of the expert buffers, in plain torch."""

import torch
from torch import Tensor

from widenet_kernels.reference.combine import gather_sum


def permute(x: Tensor, choice_row: Tensor, row_choice: Tensor) -> Tensor:
    """rows [R, D]: row r is the token it serves, unused rows are zero."""
    if x.shape[0] == 0:
        return x.new_zeros(row_choice.shape[0], x.shape[1])
    token = row_choice.clamp(min=0) // choice_row.shape[1]
    return torch.where((row_choice >= 0)[:, None], x.index_select(0, token), 0)


def permute_backward(grad: Tensor, choice_row: Tensor) -> Tensor:
    """d x [T, D]: the sum of the gradients of the token's rows, in k order."""
    return gather_sum(grad, None, choice_row)
