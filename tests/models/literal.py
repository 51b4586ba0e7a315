"""WideNet and its baselines written out literally from the paper (arXiv 2107.11817), token by token.

They train without dropout, and draw the router's noise themselves.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from widenet_kernels.models import EncoderConfig, WideNetConfig, WideNetTextConfig

Parameters = dict[str, Tensor]


ACTIVATIONS = {"gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu, "silu": F.silu}


class Ways(NamedTuple):
    """One routing: who is served by whom."""

    served: list[tuple[int, int, Tensor]]  # token, expert, gate weight
    balance: Tensor
    dropped: float  # share of the choices


def literal_loss(p: Parameters, config: WideNetConfig, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, float]:
    """Loss, logits and the share of dropped choices."""
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
    x, balance, dropped = encoder(p, config, x, [x.shape[1]] * len(images))
    pooled = x.sum(dim=1) / x.shape[1] if config.pooling == "mean" else x[:, 0]
    pooled = torch.tanh(linear(p, "representation", pooled))
    logits = linear(p, "head", pooled)
    smooth, classes = config.label_smoothing, config.num_classes
    target = torch.full_like(logits, smooth / classes)
    target[torch.arange(len(labels)), labels] += 1 - smooth
    main_loss = -(target * logits.log_softmax(dim=1)).sum() / len(labels)
    return main_loss + config.aux_loss_weight * balance, logits, dropped


def literal_masked_lm_loss(
    p: Parameters, config: WideNetTextConfig, texts: list[list[int]], segments: list[list[int]],
    words: list[dict[int, int]], orders: list[int], longest: int,
) -> tuple[Tensor, float]:  # fmt: skip
    """Loss and the share of dropped choices; words: for each text what stood at which of its positions."""
    names = {name.removeprefix("model."): value for name, value in p.items()}
    lengths = [len(text) for text in texts]
    embedding = names["word_embedding.weight"]
    x = torch.zeros(len(texts), longest, config.hidden_size, dtype=embedding.dtype)
    for n, (text, segment) in enumerate(zip(texts, segments, strict=True)):
        for position, (word, kind) in enumerate(zip(text, segment, strict=True)):
            token = embedding[word] + names["position_embedding.weight"][position]
            token = norm(names, "embedding_norm", token + names["token_type_embedding.weight"][kind], config)
            x[n, position] = linear(names, "projection", token)
    x, balance, dropped = encoder(names, config, x, lengths)
    word_losses, order_losses = [], []
    for n, (hidden, order) in enumerate(zip(x, orders, strict=True)):
        for position, word in words[n].items():
            token = norm(
                names, "norm", ACTIVATIONS[config.activation](linear(names, "dense", hidden[position])), config
            )
            logits = torch.stack([token @ row for row in embedding]) + names["decoder_bias"]
            word_losses.append(logits.exp().sum().log() - logits[word])
        logits = linear(names, "sentence_order", torch.tanh(linear(names, "pooler", hidden[0])))
        order_losses.append(logits.exp().sum().log() - logits[order])
    main_loss = sum(word_losses) / len(word_losses) + sum(order_losses) / len(order_losses)
    return main_loss + config.aux_loss_weight * balance, dropped


def encoder(p: Parameters, config: EncoderConfig, x: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor, float]:
    """x, the sum of the balance losses over the routings, and the mean share of dropped choices."""
    valid = [position < length for length in lengths for position in range(x.shape[1])]
    routings: list[Ways] = []
    for depth in range(config.num_layers):
        own = "" if config.share_blocks else f".{depth}"
        norms = f"encoder.blocks.{0 if config.share_norms else depth}."
        normed = norm(p, norms + "attention_norm", x, config) if config.pre_norm else x
        y = torch.zeros_like(x)
        for n, length in enumerate(lengths):  # nobody looks behind the end of a text
            y[n, :length] = attention(p, "encoder.attention" + own, config.num_heads, normed[n, :length])
        x = x + y if config.pre_norm else norm(p, norms + "attention_norm", x + y, config)

        normed = norm(p, norms + "ffn_norm", x, config) if config.pre_norm else x
        tokens = normed.flatten(0, 1)
        if config.dense or (config.moe_layers and depth < config.num_layers - config.moe_layers):
            hidden = ACTIVATIONS[config.activation](linear(p, f"encoder.ffn{own}.linear1", tokens))
            y = linear(p, f"encoder.ffn{own}.linear2", hidden).view(x.shape)
        else:
            if depth % (config.num_layers // (config.routing_groups or config.num_layers)) == 0:
                routings.append(find_ways(p, "encoder.ffn" + own, config, tokens, valid))
            y = serve(p, "encoder.ffn" + own, config, tokens, routings[-1]).view(x.shape)
        x = x + y if config.pre_norm else norm(p, norms + "ffn_norm", x + y, config)
    if config.pre_norm:
        x = norm(p, "encoder.norm", x, config)
    balance = sum((ways.balance for ways in routings), start=torch.zeros((), dtype=x.dtype))
    return x, balance, sum(ways.dropped for ways in routings) / max(len(routings), 1)


def linear(p: Parameters, name: str, x: Tensor) -> Tensor:
    return x @ p[name + ".weight"].T + p[name + ".bias"]


def norm(p: Parameters, name: str, x: Tensor, config: EncoderConfig) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    deviation = (centred.square().mean(dim=-1, keepdim=True) + config.layer_norm_eps).sqrt()
    return centred / deviation * p[name + ".weight"] + p[name + ".bias"]


def attention(p: Parameters, name: str, num_heads: int, x: Tensor) -> Tensor:
    weight, bias = p[name + ".qkv.weight"], p[name + ".qkv.bias"]
    query, key, value = (x @ w.T + b for w, b in zip(weight.chunk(3), bias.chunk(3), strict=True))
    width = x.shape[1] // num_heads
    heads = []
    for head in range(num_heads):
        part = slice(head * width, (head + 1) * width)
        scores = query[:, part] @ key[:, part].T / width**0.5
        heads.append(scores.softmax(dim=1) @ value[:, part])
    return linear(p, name + ".out", torch.cat(heads, dim=1))


def find_ways(p: Parameters, name: str, config: EncoderConfig, x: Tensor, valid: list[bool]) -> Ways:
    """Eq. 1 to 5, up to the experts; tokens that are not valid ask for nothing, but count in the capacity."""
    experts, k, tokens = config.num_experts, config.k, len(x)
    noise = torch.randn(tokens, experts, dtype=x.dtype) / experts
    probs = (x @ p[name + ".router.weight"].T + noise).softmax(dim=1)
    chosen = probs.topk(k).indices.tolist()
    room = int(config.capacity_factor * k * tokens / experts) - (1 if config.authors else 0)
    queue = [(token, choice) for token in range(tokens) if valid[token] for choice in range(k)]
    if not config.authors:
        queue.sort(key=lambda pair: pair[1])  # all first choices before all second ones
    count, demand = [0] * experts, [0] * experts
    served = []
    for token, choice in queue:
        expert = chosen[token][choice]
        demand[expert] += 1
        if count[expert] < room:
            count[expert] += 1
            total = probs[token, chosen[token]].sum() if config.normalize else 1.0
            served.append((token, expert, probs[token, expert] / total))
    share = torch.tensor(demand, dtype=x.dtype) / len(queue)
    balance = experts * (share * probs[torch.tensor(valid)].mean(dim=0)).sum()
    return Ways(served, balance, 1 - len(served) / len(queue))


def serve(p: Parameters, name: str, config: EncoderConfig, x: Tensor, ways: Ways) -> Tensor:
    """Eq. 1: the sum of gate weight * expert(x) over the experts that have room."""
    y = [torch.zeros_like(token) for token in x]
    for token, expert, weight in ways.served:
        w1, b1, w2, b2 = (p[f"{name}.experts.{part}"][expert] for part in ("w1", "b1", "w2", "b2"))
        if config.authors:
            out = F.gelu(F.gelu(x[token] @ w1 + b1, approximate="tanh") @ w2 + b2, approximate="tanh")
        else:
            out = ACTIVATIONS[config.activation](x[token] @ w1 + b1) @ w2 + b2
        y[token] = y[token] + weight * out
    return torch.stack(y)
