"""What the machine can do: a large copy, a large product by torch and by us, a call that does nothing."""

import functools
from collections.abc import Iterator

import torch

import widenet_kernels as wk

from . import limits
from .agreement import relative_error
from .results import Section
from .shapes import Case, Inputs
from .timing import Contender

MACHINE = Case("machine", 0, 0, 0, 0, 0, None)
COPY, TORCH, OURS = "copy", "torch.mm", "grouped_gemm, one expert"


def sections(inputs: Inputs) -> Iterator[Section]:
    size, side = (1 << 30, 8192) if inputs.device == "cuda" else (1 << 28, 2048)
    flops = 2.0 * side**3
    copied = functools.partial(limits.copy, 2 * size, inputs.device)
    a, b = (torch.randn(side, side, device=inputs.device).to(inputs.dtype) for _ in range(2))
    by_torch = functools.partial(torch.mm, a, b, out=torch.empty_like(a))
    plan = wk.plan_routing(torch.zeros(side, 1, dtype=torch.int32, device=inputs.device), 1, None)
    wide = torch.promote_types(inputs.dtype, torch.float32)
    by_us = torch.no_grad()(functools.partial(wk.grouped_gemm, a, b[None], plan))
    contenders = [
        Contender(COPY, "limit", copied, nbytes=2.0 * size),
        Contender(TORCH, "limit", lambda: by_torch, flops=flops, work=flops),
        Contender(
            OURS, "limit", lambda: by_us, lambda out: relative_error(out, [a.to(wide) @ b.to(wide)]), flops=flops
        ),
        Contender(limits.LAUNCH, "limit", functools.partial(limits.empty_call, inputs.device)),
    ]
    yield Section("ceilings", MACHINE, "forward", contenders, None)
