"""Padding in a widened model: what tells of it, and what it asks for."""

import copy
from typing import Any

import pytest
import torch
from dense_models import FFN, LENGTHS, D, E, batch, demands, dense, logits, padding, random, settle
from torch import Tensor, nn

from widenet_kernels.integrations import widen
from widenet_kernels.integrations.padding import Padding
from widenet_kernels.testing.numerics import assert_float64


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_padding_asks_for_no_expert(kind: str, attention: str) -> None:
    pytest.importorskip("transformers", minversion="5.0")
    model, before = (dense(kind, attn_implementation=attention) for _ in range(2))
    widen(model, E)
    asked = demands(model)
    given = batch(kind)
    assert_float64(logits(model(**given)), logits(before(**given)))
    assert asked == [2 * sum(LENGTHS)] * 3
    asked.clear()
    model(given["input_ids"])  # no mask, and none left of the last forward
    assert asked == [2 * 21] * 3


def test_llama_generates_the_same() -> None:
    pytest.importorskip("transformers", minversion="5.0")
    model, before = dense("llama"), dense("llama")
    widen(model, E)
    asked = demands(model)
    given = {name: value.flip(1) for name, value in batch("llama").items() if name != "labels"}  # padded on the left
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(**given, **options), before.generate(**given, **options))
    assert asked == [2 * sum(LENGTHS)] * 3 + [2 * 3] * 9  # the texts, then a token of each, three times


class Attention(nn.Module):
    def forward(self, x: Tensor, attention_mask: Any = None) -> Tensor:
        return x


@pytest.mark.parametrize("by_name", [False, True], ids=["positional", "keyword"])
@pytest.mark.parametrize("form", ["int", "bool", "4d", "additive", "heads", "causal"])
def test_forms_of_transformers_masks(form: str, by_name: bool) -> None:
    valid = ~padding()
    square = valid[:, None, None, :].expand(3, 1, 7, 7)
    mask = {
        "int": valid.long(),
        "bool": valid,
        "4d": square,
        "additive": torch.zeros(3, 1, 7, 7).masked_fill(~square, torch.finfo(torch.float32).min),
        "heads": square.expand(3, 2, 7, 7),
        "causal": square & torch.ones(7, 7, dtype=torch.bool).tril(),
    }[form]
    attention = Attention()
    block = nn.Sequential(attention)
    told = Padding(block, attention)
    x = random(3, 7, D)
    assert told.valid(x) is None
    attention(x, attention_mask=mask) if by_name else attention(x, mask)
    assert torch.equal(told.valid(x), valid)
    assert copy.deepcopy(told).mask is None
    assert told.valid(random(3, 1, D)) is None  # other tokens
    attention(x, object())  # flex attention's
    assert told.valid(x) is None
    attention(x, mask)
    block(x)
    assert told.valid(x) is None


def test_a_network_before_the_attention_knows_no_mask() -> None:
    """Nor that of the forward before, of other texts: a Conformer's first network serves every token."""
    pytest.importorskip("transformers", minversion="5.0")
    from transformers.models.wav2vec2_conformer import modeling_wav2vec2_conformer as conformer

    sizes = {"hidden_size": D, "intermediate_size": FFN, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = conformer.Wav2Vec2ConformerConfig(**sizes, position_embeddings_type=None, vocab_size=23)
    config._attn_implementation = "eager"
    model = settle(conformer.Wav2Vec2ConformerEncoderLayer(config))
    widen(model, E, modules=["ffn1", "ffn2"])
    asked = demands(model)
    mask = torch.zeros(3, 1, 7, 7).masked_fill(padding()[:, None, None, :], -torch.inf).double()
    for _ in range(2):
        model(random(3, 7, D), attention_mask=mask)
    assert asked == [2 * 21, 2 * sum(LENGTHS)] * 2


def test_a_mask_of_another_shape_is_none() -> None:
    """With a cache the mask covers the earlier tokens too; each new token is served."""
    pytest.importorskip("transformers", minversion="5.0")
    model = dense("llama")
    widen(model, E)
    asked = demands(model)
    given = batch("llama")
    cache = model(given["input_ids"][:, :5], given["attention_mask"][:, :5], use_cache=True).cache
    asked.clear()
    model(given["input_ids"][:, 5:], given["attention_mask"], cache=cache)
    assert asked == [2 * 3 * 2] * 3
