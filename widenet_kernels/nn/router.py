"""TopKRouter: which experts each token goes to."""

import torch
from torch import Tensor, nn

from widenet_kernels.ops.route import route
from widenet_kernels.routing import Gate, RoutingPlan


class TopKRouter(nn.Module):
    """A linear map without bias to E logits, noise in training, softmax, the k largest.

    Args:
        dim: D.
        num_experts: E.
        k: choices per token.
        noise_std: standard deviation of the noise added to the logits in training; None: 1/E (Xue et al. 2021,
            arXiv 2107.11817, eq. 2), 0: no noise.
        normalize: divide each weight by the sum over the token's k choices.
    """

    def __init__(
        self, dim: int, num_experts: int, k: int = 2, noise_std: float | None = None, normalize: bool = False
    ) -> None:
        super().__init__()
        if not 1 <= k <= num_experts:
            raise ValueError(f"TopKRouter: k: expected 1 to {num_experts}, the number of experts, got {k}")
        self.dim, self.num_experts, self.k = dim, num_experts, k
        self.noise_std = 1 / num_experts if noise_std is None else noise_std
        self.normalize = normalize
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight)

    def forward(
        self,
        x: Tensor,
        capacity: int | None = None,
        *,
        priority: str = "choice",
        mask: Tensor | None = None,
        backend: str | None = None,
    ) -> tuple[Gate, RoutingPlan, Tensor]:
        """x [T, D] -> gate, plan and logits [T, E], as :func:`widenet_kernels.route` gives them."""
        noise = None
        if self.training and self.noise_std:
            wide = torch.float64 if torch.float64 in (x.dtype, self.weight.dtype) else torch.float32
            noise = torch.randn(x.shape[0], self.num_experts, dtype=wide, device=x.device) * self.noise_std
        return route(
            x,
            self.weight,
            self.k,
            capacity,
            noise=noise,
            normalize=self.normalize,
            priority=priority,
            mask=mask,
            backend=backend,
        )

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_experts={self.num_experts}, k={self.k}, noise_std={self.noise_std:g}"
