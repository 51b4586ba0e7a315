"""WideNet written out literally from the paper (arXiv 2107.11817), token by token, to hold the model against."""

import torch
import torch.nn.functional as F
from torch import Tensor

from widenet_kernels.models import WideNetConfig

Parameters = dict[str, Tensor]


def literal_loss(p: Parameters, config: WideNetConfig, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, float]:
    """Loss, logits and the share of dropped choices in training without dropout; draws the router's noise itself."""
    size, side = config.patch_size, config.image_size // config.patch_size
    kernel = p["patch_embedding.weight"].flatten(1)
    sequences = []
    for image in images:
        sequence = [torch.zeros(config.hidden_size, dtype=image.dtype)]
        for row in range(side):
            for column in range(side):
                patch = image[:, row * size : (row + 1) * size, column * size : (column + 1) * size]
                sequence.append(kernel @ patch.flatten() + p["patch_embedding.bias"])
        sequences.append(torch.stack(sequence) + p["position_embedding"])
    x = torch.stack(sequences)
    balance = torch.zeros((), dtype=x.dtype)
    dropped = 0.0
    for depth in range(config.num_layers):
        block = f"encoder.blocks.{depth}."
        normed = norm(p, block + "attention_norm", x)
        x = x + torch.stack([attention(p, config.num_heads, sequence) for sequence in normed])
        tokens = norm(p, block + "ffn_norm", x).flatten(0, 1)
        y, term, lost = moe(p, config, tokens)
        x = x + y.view(x.shape)
        balance = balance + term
        dropped += lost / config.num_layers
    pooled = norm(p, "encoder.norm", x).sum(dim=1) / x.shape[1]
    pooled = torch.tanh(pooled @ p["representation.weight"].T + p["representation.bias"])
    logits = pooled @ p["head.weight"].T + p["head.bias"]
    smooth, classes = config.label_smoothing, config.num_classes
    target = torch.full_like(logits, smooth / classes)
    target[torch.arange(len(labels)), labels] += 1 - smooth
    main_loss = -(target * logits.log_softmax(dim=1)).sum() / len(labels)
    return main_loss + config.aux_loss_weight * balance, logits, dropped


def norm(p: Parameters, name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    deviation = (centred.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
    return centred / deviation * p[name + ".weight"] + p[name + ".bias"]


def attention(p: Parameters, num_heads: int, x: Tensor) -> Tensor:
    weight, bias = p["encoder.attention.qkv.weight"], p["encoder.attention.qkv.bias"]
    query, key, value = (x @ w.T + b for w, b in zip(weight.chunk(3), bias.chunk(3), strict=True))
    width = x.shape[1] // num_heads
    heads = []
    for head in range(num_heads):
        part = slice(head * width, (head + 1) * width)
        scores = query[:, part] @ key[:, part].T / width**0.5
        heads.append(scores.softmax(dim=1) @ value[:, part])
    return torch.cat(heads, dim=1) @ p["encoder.attention.out.weight"].T + p["encoder.attention.out.bias"]


def moe(p: Parameters, config: WideNetConfig, x: Tensor) -> tuple[Tensor, Tensor, float]:
    """Eq. 1 to 5: y, the balance loss and the share of dropped choices."""
    experts, k, tokens = config.num_experts, config.k, len(x)
    noise = torch.randn(tokens, experts, dtype=x.dtype) / experts
    probs = (x @ p["encoder.ffn.router.weight"].T + noise).softmax(dim=1)
    chosen = probs.topk(k).indices.tolist()
    room = int(config.capacity_factor * k * tokens / experts) - (1 if config.authors else 0)
    queue = [(token, choice) for token in range(tokens) for choice in range(k)]
    if not config.authors:
        queue.sort(key=lambda pair: pair[1])  # all first choices before all second ones
    served, demand = [0] * experts, [0] * experts
    y = [torch.zeros_like(x[0]) for _ in range(tokens)]
    for token, choice in queue:
        expert = chosen[token][choice]
        demand[expert] += 1
        if served[expert] < room:
            served[expert] += 1
            y[token] = y[token] + probs[token, expert] * feed_forward(p, config, expert, x[token])
    share = torch.tensor(demand, dtype=x.dtype) / (k * tokens)
    balance = experts * (share * probs.mean(dim=0)).sum()
    return torch.stack(y), balance, 1 - sum(served) / (k * tokens)


def feed_forward(p: Parameters, config: WideNetConfig, expert: int, x: Tensor) -> Tensor:
    w1, b1, w2, b2 = (p[f"encoder.ffn.experts.{name}"][expert] for name in ("w1", "b1", "w2", "b2"))
    if config.authors:
        return F.gelu(F.gelu(x @ w1 + b1, approximate="tanh") @ w2 + b2, approximate="tanh")
    return F.gelu(x @ w1 + b1) @ w2 + b2
