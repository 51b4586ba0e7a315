"""Masked pieces of words and the order of sentences as a task of paper_claims.py: ALBERT's pre-training, but smaller.

ALBERT masks n-grams of whole words; the n-grams here are of pieces, of which there are only a few hundred. What stands
around a masked piece, often the rest of its word, then says something of it that a network learns in minutes.
"""

import random
from collections.abc import Iterator
from itertools import chain
from types import SimpleNamespace
from typing import Any

import torch
from claims_corpus import CLS, MASK, MASKED, PAD, SEP, SPECIAL, Pair, choose_ngrams, corrupted
from claims_training import IGNORED, Batch, Record, evaluate, shuffled
from torch import Tensor, nn

from widenet_kernels.models import WideNetForMaskedLM, WideNetTextConfig

WIDER = 2.5  # BERT's normal distribution is for 768 dimensions; the few here learn sooner from 0.05 than from its 0.02
JUDGE = 0  # the seed of what is masked and swapped in the held-out texts


class TextTask:
    """Texts are [CLS] first [SEP] second [SEP]; half of them are swapped, and pieces are masked anew each time."""

    def __init__(self, settings: dict[str, Any], data: dict[str, Any]) -> None:
        self.model, recipe = settings["model"], settings["recipe"]
        self.batch, self.positions = recipe["batch"], recipe["positions"]
        vocabulary: dict[str, int] = data["vocabulary"]
        self.vocabulary = vocabulary
        self.special = {vocabulary[piece] for piece in SPECIAL}
        self.pairs: list[Pair] = data["train"]
        judged = shuffled(len(data["held_out"]), self.batch, torch.Generator().manual_seed(JUDGE))
        rng = random.Random(JUDGE)
        held_out = range(min(recipe["held_out_batches"], len(data["held_out"]) // self.batch))
        self.held_out = [
            self.collate([data["held_out"][n] for n in index], rng) for _, index in zip(held_out, judged, strict=False)
        ]

    def network(self, changes: dict[str, Any]) -> WideNetForMaskedLM:
        sizes = {"vocab_size": len(self.vocabulary), "max_positions": self.positions}
        network = WideNetForMaskedLM(WideNetTextConfig(**sizes | self.model | changes))
        with torch.no_grad():
            for weight in network.parameters():
                if weight.dim() > 1:  # no bias and no LayerNorm
                    weight.mul_(WIDER)
        return network

    def batches(self, seed: int) -> Iterator[Batch]:
        rng = random.Random(seed)
        for index in shuffled(len(self.pairs), self.batch, torch.Generator().manual_seed(seed)):
            yield self.collate([self.pairs[n] for n in index], rng)

    def without_context(self) -> Record:
        """The score of the best that can be said of a masked piece without a look at the others."""
        pieces = torch.tensor(list(chain(*chain(*self.pairs))))
        counts = torch.bincount(pieces, minlength=len(self.vocabulary)) + 1.0
        return evaluate(ContextFree(counts, self.vocabulary[MASK]), self.held_out)[0]

    def collate(self, pairs: list[Pair], rng: random.Random) -> Batch:
        shape = (len(pairs), self.positions)
        ids = torch.full(shape, self.vocabulary[PAD])
        labels, types = torch.full(shape, IGNORED), torch.zeros(shape, dtype=torch.int64)
        order = torch.zeros(len(pairs), dtype=torch.int64)
        for row, pair in enumerate(pairs):
            order[row] = swapped = rng.randrange(2)
            first, second = reversed(pair) if swapped else pair
            pieces, wanted = self.mask(self.join(first, second), rng)
            ids[row, : len(pieces)] = torch.tensor(pieces)
            labels[row, : len(pieces)] = torch.tensor(wanted)
            types[row, len(first) + 2 : len(pieces)] = 1
        inputs = {
            "input_ids": ids,
            "attention_mask": ids != self.vocabulary[PAD],
            "token_type_ids": types,
            "labels": labels,
            "sentence_order_labels": order,
        }
        return Batch(inputs, labels, order)

    def join(self, first: list[int], second: list[int]) -> list[int]:
        return [self.vocabulary[CLS], *first, self.vocabulary[SEP], *second, self.vocabulary[SEP]]

    def mask(self, pieces: list[int], rng: random.Random) -> tuple[list[int], list[int]]:
        """What the network sees, and the labels: the pieces themselves where it has to predict them."""
        places = [position for position, piece in enumerate(pieces) if piece not in self.special]
        budget = max(1, round(MASKED * len(places)))
        seen, labels = list(pieces), [IGNORED] * len(pieces)
        for position in chain(*choose_ngrams(places, budget, rng)):
            labels[position] = pieces[position]
            seen[position] = corrupted(pieces[position], self.vocabulary[MASK], len(self.vocabulary), rng)
        return seen, labels


class ContextFree(nn.Module):
    """By Bayes: how frequent each piece is, and that a visible one is as often itself as any (see ``corrupted``)."""

    def __init__(self, counts: Tensor, mask: int) -> None:
        super().__init__()
        self.frequency, self.mask = counts / counts.sum(), mask

    def forward(self, input_ids: Tensor, **_: Tensor) -> SimpleNamespace:
        size = len(self.frequency)
        itself = nn.functional.one_hot(input_ids, size) * (input_ids != self.mask)[..., None]
        logits = (self.frequency * (itself + 1 / (size - len(SPECIAL)))).log()
        return SimpleNamespace(logits=logits, sentence_order_logits=torch.zeros(len(input_ids), 2), routing=())
