"""CUDA graphs: a training step captured by torch.cuda.graph, a graphed module, and mode="reduce-overhead".

benchmarks/gpu_graph.py, which benchmarks/on_gpu.sh runs too, has more shapes of the forward and backward alone.
"""

import pytest
import torch
from torch import Tensor, nn

import widenet_kernels as wk
from widenet_kernels.testing import inputs
from widenet_kernels.testing.numerics import assert_same_bits

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

T, D, F, E = 48, 64, 128, 4


def make() -> wk.MoELayer:
    torch.manual_seed(0)
    return wk.MoELayer(D, F, E, noise_std=0).cuda()


def batches() -> list[Tensor]:
    """Whose tokens want different experts."""
    return [inputs.normal(T, D, seed=seed, device="cuda") for seed in range(4)]


def loss_of(y: Tensor, balance_loss: Tensor) -> Tensor:
    return y.float().square().mean() + balance_loss


def test_a_training_step_as_one_graph() -> None:
    """Autocast, backward and optimizer inside: replayed on new tokens it gives the bits of eager steps."""

    def trained(graphed: bool) -> list[Tensor]:
        layer, x = make(), batches()[0].clone()
        optimizer = torch.optim.AdamW(layer.parameters(), 1e-2, capturable=True)

        def train() -> None:
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
                y, aux = layer(x)
            loss_of(y, aux.balance_loss).backward()
            optimizer.step()

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                train()
        torch.cuda.current_stream().wait_stream(side)
        if graphed:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                train()
        for batch in batches()[1:]:
            x.copy_(batch)
            if graphed:
                graph.replay()
            else:
                train()
        return list(layer.parameters())

    for ours, expected in zip(trained(graphed=True), trained(graphed=False), strict=True):
        assert_same_bits(ours, expected)


class Residual(nn.Module):
    def __init__(self, layer: wk.MoELayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, aux = self.layer(x)
        return x + y, aux.balance_loss


def gradients(module: nn.Module, x: Tensor) -> list[Tensor]:
    """y, the balance loss and every gradient, copied from where a later replay writes."""
    module.zero_grad()
    x = x.detach().requires_grad_()
    y, balance_loss = module(x)
    loss_of(y, balance_loss).backward()
    results = [y, balance_loss, x.grad, *(parameter.grad for parameter in module.parameters())]
    return [tensor.detach().clone() for tensor in results]


def test_a_graphed_module() -> None:
    graphed, plain = Residual(make()), Residual(make())
    torch.cuda.make_graphed_callables(graphed, (batches()[0].requires_grad_(),))
    for x in batches():
        for ours, expected in zip(gradients(graphed, x), gradients(plain, x), strict=True):
            assert_same_bits(ours, expected)


def test_compiled_with_reduced_overhead() -> None:
    """Every part of it runs as a CUDA graph."""
    plain = Residual(make())
    compiled = torch.compile(Residual(make()), mode="reduce-overhead", fullgraph=True)
    torch._dynamo.utils.counters.clear()
    for x in batches():
        torch.compiler.cudagraph_mark_step_begin()
        for ours, expected in zip(gradients(compiled, x), gradients(plain, x), strict=True):
            torch.testing.assert_close(ours, expected)
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
