"""One run of the paper's ablations: a network, trained on a task from a seed, and the numbers that are left of it."""

import time
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from widenet_kernels.models import WideNetEncoder
from widenet_kernels.nn import MoEAux
from widenet_kernels.training import warmup_decay

IGNORED = -100  # the label of what is not to be predicted
WARMUP = 0.1  # of the steps: the paper's 30 of 300 epochs

Record = dict[str, Any]


class Batch(NamedTuple):
    """What goes into a network, and what it is judged by."""

    inputs: dict[str, Tensor]  # the arguments of its forward, labels included
    labels: Tensor  # [N] classes, or [N, L] pieces, IGNORED where nothing is asked
    order: Tensor | None = None  # [N] sentence order: 0, or 1 for swapped


class Task(Protocol):
    """Something to learn: networks of any variant, batches without end, and fixed ones to be judged by."""

    held_out: list[Batch]

    def network(self, changes: dict[str, Any]) -> nn.Module: ...

    def batches(self, seed: int) -> Iterator[Batch]:
        """The same for every variant: what tells two variants apart is then not the data that they met."""
        ...


def shuffled(count: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Batches [batch] of indices below count without end; every index comes once before any comes again."""
    queue = torch.empty(0, dtype=torch.int64)
    while True:
        while len(queue) < batch:
            queue = torch.cat([queue, torch.randperm(count, generator=generator)])
        yield queue[:batch]
        queue = queue[batch:]


class Score:
    """Cross entropy and accuracy over batches; without label smoothing, mixed labels or the balance loss."""

    def __init__(self) -> None:
        self.count = self.loss = self.right = self.order_count = self.order_right = 0.0

    def add(self, output: Any, batch: Batch) -> None:
        asked = batch.labels != IGNORED
        logits, labels = output.logits.detach()[asked], batch.labels[asked]
        self.count += len(labels)
        self.loss += F.cross_entropy(logits, labels, reduction="sum").item()
        self.right += (logits.argmax(dim=1) == labels).sum().item()
        if batch.order is not None:
            self.order_count += len(batch.order)
            self.order_right += (output.sentence_order_logits.argmax(dim=1) == batch.order).sum().item()

    def record(self, prefix: str = "") -> Record:
        record = {f"{prefix}loss": self.loss / self.count, f"{prefix}accuracy": self.right / self.count}
        if self.order_count:
            record[f"{prefix}order_accuracy"] = self.order_right / self.order_count
        return record


def optimizer_for(model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """AdamW, not the paper's LAMB, whose steps are shares of a layer's length: good for batches of thousands.

    In the few hundred steps of a run what starts at 0, as every beta of a LayerNorm, would hardly leave it.
    """
    return torch.optim.AdamW(model.parameters(), learning_rate, betas=(0.9, 0.98), fused=True)


def train(task: Task, changes: dict[str, Any], seed: int, recipe: Record) -> Record:
    """What a run leaves: its learning curve, and the network's numbers at the end; the same for the same arguments.

    ``recipe`` has the steps, the learning rate, and how many times on the way the held-out data is looked at.
    """
    wall, cpu = time.perf_counter(), time.process_time()
    torch.manual_seed(seed)
    model = task.network(changes)
    optimizer = optimizer_for(model, recipe["learning_rate"])
    steps, evaluations = recipe["steps"], recipe["evaluations"]
    schedule = warmup_decay(optimizer, int(WARMUP * steps), steps)
    looks = {round(steps * part / evaluations) for part in range(1, evaluations + 1)}
    history, score = [], Score()
    for step, batch in zip(range(1, steps + 1), task.batches(seed), strict=False):
        output = model(**batch.inputs)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        schedule.step()
        score.add(output, batch)
        if step in looks:
            held_out, routing = evaluate(model, task.held_out)
            history.append({"step": step} | score.record("train_") | held_out)
            score = Score()
    return {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "history": history,
        **routing,
        "divergence": norm_divergence(model),
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
    }


@torch.inference_mode()
def evaluate(model: nn.Module, batches: list[Batch]) -> tuple[Record, Record]:
    """The score on the batches, and where the router sent their tokens at each depth; None where nothing is routed."""
    model.eval()
    score, routings = Score(), []
    for batch in batches:
        output = model(**batch.inputs)
        score.add(output, batch)
        routings.append(output.routing)
    model.train()
    if not routings[0]:
        return score.record(), {"load": None, "dropped": None}
    demand, served = (total(routings, name) for name in ("expert_demand", "expert_count"))  # [depths with experts, E]
    asked = demand.sum(dim=1)
    load, dropped = demand / asked[:, None], 1 - served.sum(dim=1) / asked
    return score.record(), {"load": load.tolist(), "dropped": dropped.tolist()}


def total(routings: list[tuple[MoEAux, ...]], name: str) -> Tensor:
    """A number of each depth and expert, added up over the batches."""
    return torch.stack([torch.stack([getattr(aux, name) for aux in routing]) for routing in routings]).sum(dim=0)


def norm_divergence(model: nn.Module) -> dict[str, list[float]]:
    """How far apart the FFNs' LayerNorms are, depth by depth (Figures 4 and 5 of the paper).

    Those of images stand in front of the FFNs, as in the paper; those of texts behind them, as in BERT and ALBERT.
    """
    (encoder,) = (module for module in model.modules() if isinstance(module, WideNetEncoder))
    norms = [block.ffn_norm for block in encoder.blocks]
    return {
        "gamma": divergence(torch.stack([norm.weight.detach() for norm in norms])).tolist(),
        "beta": divergence(torch.stack([norm.bias.detach() for norm in norms])).tolist(),
    }


def divergence(vectors: Tensor) -> Tensor:
    """[M, N], a vector of each of M LayerNorms -> [M], y_i = 1 / (M N^2) sum over j, m, n != j of |v_ij - v_mn|."""
    distance = (vectors[:, None, :, None] - vectors[None, :, None, :]).abs()  # [i, m, j, n]
    distance.diagonal(dim1=2, dim2=3).zero_()
    return distance.mean(dim=(1, 2, 3))
