"""What the machine can do: a large copy, a large product, a call that does nothing."""

import functools
from collections.abc import Iterator

from . import limits
from .results import Section
from .shapes import Case, Inputs
from .timing import Contender

MACHINE = Case("machine", 0, 0, 0, 0, 0, None)
COPY, PRODUCT = "copy", "product"


def sections(inputs: Inputs) -> Iterator[Section]:
    size, side = (1 << 30, 8192) if inputs.device == "cuda" else (1 << 28, 2048)
    flops = 2.0 * side**3
    copied = functools.partial(limits.copy, 2 * size, inputs.device)
    multiplied = functools.partial(limits.product, side, inputs.device, inputs.dtype)
    contenders = [
        Contender(COPY, "limit", copied, nbytes=2.0 * size),
        Contender(PRODUCT, "limit", multiplied, flops=flops, work=flops),
        Contender(limits.LAUNCH, "limit", functools.partial(limits.empty_call, inputs.device)),
    ]
    yield Section("ceilings", MACHINE, "forward", contenders, None)
