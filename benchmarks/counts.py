"""FLOPs and bytes, counted from the shapes: those of served rows; each input read once, each output written once."""

from widenet_kernels.models import WideNetConfig

from .shapes import Case

WIDE, INDEX = 4, 4  # bytes: logits, probs and weights in fp32; int32


def layer_flops(case: Case, served: int) -> float:
    """The two layers' products of one forward pass; backward has twice as many."""
    return 2.0 * served * case.D * (case.width + case.F)


def layer_bytes(case: Case, element: int, experts: int) -> float:
    """Tokens, results, router and so many experts: in a forward pass those that serve, in a backward all gradients."""
    of_expert = case.D * (case.width + case.F) + (case.width + case.D if case.bias else 0)
    return float(element * (2 * case.T * case.D + case.E * case.D + experts * of_expert))


def routing_bytes(case: Case, num_rows: int, element: int) -> dict[str, float]:
    choices, of_experts = case.T * case.K, WIDE * case.T * case.E
    of_gate = (WIDE + INDEX) * choices  # weight and expert_index
    of_plan = INDEX * (choices + num_rows)  # choice_row and row_choice
    of_x, of_router = element * case.T * case.D, element * case.E * case.D
    gradient = of_experts + of_gate + (WIDE * choices if case.normalize else 0)  # grad_weight, index, probs; weight
    return {
        "topk_gate": 2 * of_experts + of_gate,
        "topk_gate backward": 2 * of_experts + gradient,
        "plan_routing": INDEX * choices + of_plan,
        "route": of_x + of_router + 2 * of_experts + of_gate + of_plan,
        "route backward": 2 * (of_x + of_router) + of_experts + gradient,
    }


def movement_bytes(case: Case, num_rows: int, served: int, element: int) -> dict[str, float]:
    of_choices = (WIDE + INDEX) * case.T * case.K  # weight and choice_row
    of_rows, of_served, of_tokens = (element * count * case.D for count in (num_rows, served, case.T))
    return {
        "permute": of_tokens + of_rows + INDEX * num_rows,
        "permute backward": of_served + of_tokens + INDEX * case.T * case.K,
        "combine": of_served + of_tokens + of_choices,
        "combine backward": of_tokens + of_served + of_rows + INDEX * num_rows + of_choices,
    }


def model_flops(config: WideNetConfig, images: int) -> float:
    """Of a training step, its products: patches, and in every block attention, router and both choices' experts."""
    length, dim = config.num_patches + 1, config.hidden_size
    tokens = images * length
    attention = 4 * 2 * tokens * dim**2 + 2 * 2 * tokens * length * dim  # four maps; scores and their sums of values
    router = 2 * tokens * dim * config.num_experts
    experts = 2 * 2 * tokens * config.k * dim * config.ffn_size
    patches = 2 * images * config.num_patches * config.num_channels * config.patch_size**2 * dim
    return 3.0 * (patches + config.num_layers * (attention + router + experts))
