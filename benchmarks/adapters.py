"""Packages that a user may have beside this one, each as a peer: where one cannot run, its row says why.

All are dropless here: a shape whose capacity drops choices is none of theirs. They are written from the packages'
sources; what does not fit the version that is installed shows as an error or a wrong answer, and is not timed.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from widenet_kernels.routing import GATED

from .peers import Layer, Parameters, Peer, activate, gate, leaf, rows_bytes
from .shapes import Inputs
from .timing import Unavailable


def require_gpu(inputs: Inputs) -> None:
    if inputs.device != "cuda":
        raise Unavailable("needs a GPU")


def require_all_served(inputs: Inputs) -> None:
    dropped = inputs.case.T * inputs.case.K - inputs.served
    if dropped:
        raise Unavailable(f"knows no capacity, and this shape's drops {dropped} choices")


def require_swiglu(inputs: Inputs) -> None:
    if inputs.case.activation != "swiglu":
        raise Unavailable(f"has swiglu experts only, not {inputs.case.activation}")


def require_no_bias(inputs: Inputs) -> None:
    if inputs.case.bias:
        raise Unavailable("has no biases in its experts")


def out_in(inputs: Inputs) -> Parameters:
    """The parameters with weights as [E, out, in], as torch.nn.Linear has them."""
    transposed = {name: inputs.experts[name].transpose(1, 2).contiguous() for name in ("w1", "w2")}
    parameters = {"router": inputs.router, **inputs.experts, **transposed}
    return {name: leaf(tensor) for name, tensor in parameters.items() if tensor is not None}


def of_out_in(inputs: Inputs, forward: Callable[[Tensor], Tensor], parameters: Parameters) -> Layer:
    def canonical(grads: list[Tensor]) -> dict[str, Tensor]:
        named = dict(zip(parameters, grads, strict=True))
        return named | {name: named[name].transpose(1, 2) for name in ("w1", "w2")}

    return Layer(forward, list(parameters.values()), canonical, inputs.case.normalize)


def scattermoe(inputs: Inputs) -> Layer:
    require_gpu(inputs)
    require_all_served(inputs)
    from scattermoe.parallel_experts import flatten_sort_count, parallel_linear

    case, p = inputs.case, out_in(inputs)

    def forward(x: Tensor) -> Tensor:
        weight, index = gate(x, p["router"], case)
        order = flatten_sort_count(index, case.E)
        w1, w2 = p["w1"].transpose(1, 2), p["w2"].transpose(1, 2)
        z = parallel_linear(x, w1, case.K, *order, expert_biases=p.get("b1"), grouped_out=True)
        hidden, gates = activate(z, case.activation), weight.to(x.dtype)
        return parallel_linear(hidden, w2, 1, *order, expert_biases=p.get("b2"), gates=gates, grouped_in=True)

    return of_out_in(inputs, forward, p)


def liger(inputs: Inputs) -> Layer:
    require_gpu(inputs)
    require_all_served(inputs)
    require_swiglu(inputs)
    require_no_bias(inputs)
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    p = out_in(inputs)

    def forward(x: Tensor) -> Tensor:
        weight, index = gate(x, p["router"], inputs.case)
        return LigerFusedMoEFunction.apply(x, p["w1"], p["w2"], index.to(torch.int32), weight.to(x.dtype))

    return of_out_in(inputs, forward, p)


def sonicmoe(inputs: Inputs) -> Layer:
    require_gpu(inputs)
    require_all_served(inputs)
    require_swiglu(inputs)
    from sonicmoe.enums import ActivationType
    from sonicmoe.functional import moe_general_routing_inputs

    case, p = inputs.case, out_in(inputs)
    token = torch.arange(case.T, device=inputs.device, dtype=torch.int32).repeat_interleave(case.K)

    def forward(x: Tensor) -> Tensor:
        weight, index = gate(x, p["router"], case)
        return moe_general_routing_inputs(
            x, weight.flatten(), token, index.flatten().to(torch.int32), p["w1"].permute(1, 2, 0), p.get("b1"),
            p["w2"].permute(1, 2, 0), p.get("b2"), case.E, torch.cuda.current_stream().cuda_stream,
            ActivationType.SWIGLU, concat_layout=True,
        )[0]  # fmt: skip

    return of_out_in(inputs, forward, p)


def megablocks(inputs: Inputs) -> Layer:
    require_gpu(inputs)
    require_all_served(inputs)
    require_no_bias(inputs)
    from megablocks.layers.arguments import Arguments
    from megablocks.layers.dmoe import dMoE

    case, gated = inputs.case, inputs.case.activation in GATED
    plain = GATED.get(case.activation, case.activation)
    arguments = Arguments(
        hidden_size=case.D, ffn_hidden_size=case.F, moe_num_experts=case.E, moe_top_k=case.K, bias=False,
        return_bias=False, activation_fn=functional.silu if plain == "silu" else functional.gelu,
        mlp_type="glu" if gated else "mlp", mlp_impl="grouped", fp16=False, bf16=inputs.dtype == torch.bfloat16,
        moe_normalize_expert_weights=1 if case.normalize else None, device=torch.device(inputs.device),
    )  # fmt: skip
    layer = dMoE(arguments).to(inputs.dtype).eval()
    halves = dict(zip(("w1", "v1"), inputs.experts["w1"].chunk(1 + gated, dim=2), strict=False))
    weights = {name: half.transpose(1, 2) for name, half in halves.items()} | {"w2": inputs.experts["w2"]}
    for name, weight in weights.items():
        setattr(layer.experts.mlp, name, nn.Parameter(weight.reshape(case.E * case.F, case.D)))
    layer.router.layer.weight = nn.Parameter(inputs.router.detach())
    parameters = [layer.router.layer.weight, *(getattr(layer.experts.mlp, name) for name in weights)]

    def canonical(grads: list[Tensor]) -> dict[str, Tensor]:
        router, *firsts, second = grads[:1] + [grad.view(case.E, case.F, case.D) for grad in grads[1:]]
        return {"router": router, "w1": torch.cat(firsts, dim=1).transpose(1, 2), "w2": second}

    return Layer(lambda x: layer(x[:, None])[:, 0], parameters, canonical, case.normalize)


def tutel(inputs: Inputs) -> Layer:
    """It normalizes the weights of a token, and is held to that."""
    require_gpu(inputs)
    require_all_served(inputs)
    from tutel import moe

    case = inputs.case
    if case.activation in GATED:
        raise Unavailable("has no gated experts")
    experts = {
        "type": "ffn", "num_experts_per_device": case.E, "hidden_size_per_expert": case.F,
        "activation_fn": lambda z: activate(z, case.activation),
        "has_fc1_bias": case.bias, "has_fc2_bias": case.bias,
    }  # fmt: skip
    gate_type = {"type": "top", "k": case.K, "fp32_gate": False, "capacity_factor": 0}  # 0: as many rows as needed
    layer = moe.moe_layer(gate_type=gate_type, experts=experts, model_dim=case.D).to(inputs.device, inputs.dtype).eval()
    own = {"w1": "batched_fc1_w", "b1": "batched_fc1_bias", "w2": "batched_fc2_w", "b2": "batched_fc2_bias"}
    own = {name: place for name, place in own.items() if inputs.experts[name] is not None}
    for name, place in own.items():
        tensor = inputs.experts[name].detach()
        setattr(layer.experts, place, nn.Parameter(tensor.transpose(1, 2).contiguous() if name == "w1" else tensor))
    layer.gates[0].wg.weight = nn.Parameter(inputs.router.detach())
    parameters = [layer.gates[0].wg.weight, *(getattr(layer.experts, place) for place in own.values())]

    def canonical(grads: list[Tensor]) -> dict[str, Tensor]:
        named = dict(zip(("router", *own), grads, strict=True))
        return named | {"w1": named["w1"].transpose(1, 2)}

    return Layer(layer, parameters, canonical, True)


PEERS: Mapping[str, Peer] = {
    name: Peer(build, lambda inputs: rows_bytes(inputs, inputs.served), package=package, graph=graph)
    for name, package, build, graph in (
        ("ScatterMoE", "scattermoe", scattermoe, True),
        ("MegaBlocks", "megablocks", megablocks, False),
        ("SonicMoE", "sonicmoe", sonicmoe, True),
        ("Liger", "liger_kernel", liger, False),
        ("Tutel", "tutel", tutel, False),
    )
}
