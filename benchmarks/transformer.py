"""A Mixtral-shaped model of transformers, its experts by our kernels and by transformers' own implementations.

Random weights, one model for all: before each call it is told whose experts to use. A training step is forward, loss
and backward; a step of decoding is one more token for each of some texts.
"""

import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import counts
from .layer import OURS
from .results import Section
from .shapes import Case, Inputs
from .timing import Call, Contender, Unavailable

LAYERS, VOCABULARY, HEADS, KEY_HEADS = 4, 1024, 8, 2
TEXT = Case("mixtral-4-text", 512, 512, 1792, 8, 2, None, "swiglu", bias=False, normalize=True)  # one text of T tokens
DECODE = TEXT._replace(name="mixtral-4-decode", T=8)  # T texts, each with PAST tokens
PAST = 128
EAGER = "eager"
THEIRS = (EAGER, "batched_mm", "grouped_mm")


def sections(inputs: Inputs) -> Iterator[Section]:
    """Of these two shapes, whatever shapes were asked for."""
    model = functools.cache(functools.partial(mixtral, inputs.device, inputs.dtype))
    for case, direction, run in (
        (TEXT, "forward", Forward), (TEXT, "forward+backward", Step), (DECODE, "forward", Decode),
    ):  # fmt: skip
        yield Section("transformers", case, direction, contenders(case, direction, run, model, inputs.dtype), None)


def contenders(
    case: Case, direction: str, run: Callable[..., Call], model: Callable[[], Any], dtype: torch.dtype
) -> list[Contender]:
    flops = model_flops(case) * (1 if direction == "forward" else 3)
    truth = functools.cache(lambda: called(EAGER, model, case, run)())
    gathered = (
        case.T * case.K * case.D * (case.width + case.F) * dtype.itemsize
    )  # batched_mm: the weights of each choice
    found = []
    for name in (OURS, *THEIRS):
        found.append(
            Contender(
                name,
                "ours" if name == OURS else "peer",
                functools.partial(called, "widenet" if name == OURS else name, model, case, run),
                lambda result: disagreement(result, truth()),
                flops=flops,
                work=0.0 if name == OURS else flops,
                memory=gathered * (1 if direction == "forward" else LAYERS) if name == "batched_mm" else 0.0,
            )
        )
    return found


def called(implementation: str, model: Callable[[], Any], case: Case, run: Callable[..., Call]) -> Call:
    if importlib.util.find_spec("transformers") is None:
        raise Unavailable("transformers is not installed")
    use(model(), EAGER)  # for what comes before the call: batched_mm would gather gigabytes
    call = run(model(), case)

    def switched() -> Any:
        use(model(), implementation)
        return call()

    return switched


def use(model: Any, implementation: str) -> None:
    """As set_experts_implementation, without a walk over the modules."""
    model.config._experts_implementation = implementation


def mixtral(device: str, dtype: torch.dtype) -> Any:
    """In evaluation mode; Mixtral has no dropout that training would turn on."""
    import transformers

    from widenet_kernels.integrations.transformers import register

    register()
    config = transformers.MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=TEXT.D, intermediate_size=TEXT.F, num_local_experts=TEXT.E,
        num_experts_per_tok=TEXT.K, num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=KEY_HEADS,
        max_position_embeddings=TEXT.T,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = transformers.MixtralForCausalLM(config)
    return model.to(device, dtype).eval()


class Forward:
    """Logits of one text."""

    def __init__(self, model: Any, case: Case) -> None:
        self.model = model
        self.ids = words(model, 1, case.T)

    @torch.no_grad()
    def __call__(self) -> list[Tensor]:
        return [self.model(self.ids, use_cache=False).logits]


class Step(Forward):
    """Loss of one text, and every parameter's gradient."""

    @torch.enable_grad()
    def __call__(self) -> list[Tensor]:
        loss = self.model(self.ids, labels=self.ids, use_cache=False).loss
        return [loss.detach(), *torch.autograd.grad(loss, list(self.model.parameters()))]


class Decode:
    """Logits of one more token for each text, which is then forgotten again."""

    @torch.no_grad()
    def __init__(self, model: Any, case: Case) -> None:
        self.model = model
        self.next = words(model, case.T, 1)
        self.past = model(words(model, case.T, PAST), use_cache=True).cache

    @torch.no_grad()
    def __call__(self) -> list[Tensor]:
        logits = self.model(self.next, cache=self.past).logits
        self.past.crop(-1)
        return [logits]


def words(model: Any, texts: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(texts * length)
    return torch.randint(VOCABULARY, (texts, length), generator=generator).to(model.device)


def disagreement(result: list[Tensor], truth: list[Tensor]) -> float:
    """The largest ||out - truth|| / ||truth|| of a tensor.

    In bf16 and fp16 that of the median row of the first one, logits or loss: there rounding exchanges experts of a few
    tokens, in every implementation, and each gradient with them.
    """
    pairs = [(out.double(), exact.double()) for out, exact in zip(result, truth, strict=True)]
    if all(exact.dtype.itemsize >= 4 for exact in truth):
        return max(float((out - exact).norm() / exact.norm()) for out, exact in pairs)
    out, exact = pairs[0]
    return float(((out - exact).norm(dim=-1) / exact.norm(dim=-1)).median())


def model_flops(case: Case) -> float:
    """Of one forward pass, its products but those of the attention's scores."""
    key_size = case.D * KEY_HEADS // HEADS
    attention, router, head = 2 * case.D * (case.D + key_size), case.D * case.E, case.D * VOCABULARY
    dense = 2.0 * case.T * (LAYERS * (attention + router) + head)
    return dense + LAYERS * counts.layer_flops(case, case.T * case.K)
