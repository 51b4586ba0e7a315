import pytest
import torch
from literal import literal_masked_lm_loss
from tiny import (
    LENGTHS,
    STILL,
    TEXT_BASELINES,
    Texts,
    as_lists,
    away_from_the_start,
    masked_words,
    overfit,
    texts,
    tiny_text,
)
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from widenet_kernels.models import (
    WideNetForMaskedLM,
    WideNetForQuestionAnswering,
    WideNetForSequenceClassification,
    WideNetTextModel,
)

KINDS = (WideNetForMaskedLM, WideNetForSequenceClassification, WideNetForQuestionAnswering)
TARGETS = {  # what each kind is trained on
    WideNetForMaskedLM: lambda batch: dict(zip(("labels", "sentence_order_labels"), masked_words(batch), strict=True)),
    WideNetForSequenceClassification: lambda batch: {"labels": torch.arange(len(batch.input_ids)) % 3},
    WideNetForQuestionAnswering: lambda batch: {
        "start_positions": torch.arange(len(batch.input_ids)) % batch.attention_mask.sum(dim=1),
        "end_positions": batch.attention_mask.sum(dim=1) - 1,
    },
}


def with_other_padding(batch: Texts) -> Texts:
    """The same texts; other words and segments behind them."""
    other = texts(longest=batch.input_ids.shape[1], seed=2, lengths=(batch.input_ids.shape[1],) * len(LENGTHS))
    mask = batch.attention_mask
    ids, kinds = (
        torch.where(mask == 1, own, padding)
        for own, padding in ((batch.input_ids, other.input_ids), (batch.token_type_ids, other.token_type_ids))
    )
    return Texts(ids, mask, kinds)


def main_losses(output: tuple, batch: Texts, targets: dict[str, Tensor]) -> list[Tensor]:
    """The cross entropies by themselves, over the texts cut to their lengths."""
    lengths = batch.attention_mask.sum(dim=1).tolist()
    losses = []
    for name, target in targets.items():
        if name == "labels" and target.dim() == 2:
            logits = torch.cat([text[:length] for text, length in zip(output.logits, lengths, strict=True)])
            target = torch.cat([labels[:length] for labels, length in zip(target, lengths, strict=True)])
            losses.append(nn.functional.cross_entropy(logits, target))
        elif name.endswith("positions"):
            logits = output.start_logits if name.startswith("start") else output.end_logits
            parts = [
                nn.functional.cross_entropy(row[:length], position)
                for row, length, position in zip(logits, lengths, target, strict=True)
            ]
            losses.append(torch.stack(parts).mean() / 2)
        else:
            logits = output.logits if name == "labels" else output.sentence_order_logits
            losses.append(nn.functional.cross_entropy(logits, target))
    return losses


# What it is made of


def test_decoder_is_the_word_embedding() -> None:
    model = tiny_text(WideNetForMaskedLM)
    state = model.state_dict()
    assert len({tensor.data_ptr() for tensor in state.values()}) == len(state) == len(list(model.parameters()))
    assert [name for name, tensor in state.items() if tensor.shape == (23, 6)] == ["model.word_embedding.weight"]


def test_initial_values() -> None:
    config = {"vocab_size": 500, "embedding_size": 64, "hidden_size": 128, "ffn_size": 256}
    model = tiny_text(WideNetForMaskedLM, **config)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            assert (parameter == 1).all(), name
        elif name.endswith(("bias", "b1", "b2")):
            assert not parameter.any(), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.15), name


def test_epsilon_of_bert_is_in_every_norm() -> None:
    norms = [module for module in tiny_text(WideNetForMaskedLM).modules() if isinstance(module, nn.LayerNorm)]
    assert [norm.eps for norm in norms] == [1e-12] * (1 + 2 * 3 + 1)


def test_answering_has_no_pooler_and_every_parameter_gets_a_gradient() -> None:
    batch = texts()
    for kind in KINDS:
        model = tiny_text(kind)
        model(*batch, **TARGETS[kind](batch)).loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
    assert not any("pooler" in name for name in model.state_dict())
    pretrained = tiny_text(WideNetForMaskedLM, seed=1)
    unused = model.model.load_state_dict(pretrained.model.state_dict(), strict=False)
    assert unused.missing_keys == []
    assert unused.unexpected_keys == ["pooler.weight", "pooler.bias"]


@pytest.mark.parametrize(
    ("task", "unused"),
    [("labels", ("model.pooler.", "sentence_order.")), ("sentence_order_labels", ("dense.", "norm.", "decoder_bias"))],
)
def test_one_task_alone_leaves_the_other_head_without_gradients(task: str, unused: tuple[str, ...]) -> None:
    """What DistributedDataParallel has to be told of."""
    model, batch = tiny_text(WideNetForMaskedLM), texts()
    model(*batch, **{task: TARGETS[WideNetForMaskedLM](batch)[task]}).loss.backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is None} == {
        name for name, _ in model.named_parameters() if name.startswith(unused)
    }


def test_a_pretrained_model_moves_under_another_head() -> None:
    pretrained, classifying = tiny_text(WideNetForMaskedLM, seed=1), tiny_text(WideNetForSequenceClassification)
    classifying.model.load_state_dict(pretrained.model.state_dict())
    batch = texts()
    hidden = pretrained.eval().model(*batch).pooled
    assert torch.equal(classifying.eval()(*batch).logits, classifying.head(hidden))


def test_int32_words_and_segments_are_as_int64() -> None:
    model, batch = tiny_text(WideNetTextModel).eval(), texts()
    narrow = Texts(batch.input_ids.int(), batch.attention_mask.to(torch.uint8), batch.token_type_ids.int())
    assert torch.equal(model(*narrow).hidden, model(*batch).hidden)


def test_dropouts_of_bert() -> None:
    """On the normalised embeddings, attention weights, attention output, FFN output, and in front of the classifier."""
    model = tiny_text(WideNetForSequenceClassification)
    called: list[nn.Module] = []
    for module in model.modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            module.register_forward_hook(lambda module, *_: called.append(module))
    model(*texts())
    assert (called[0], called[-1]) == (model.model.dropout, model.dropout)
    assert len(called) == 1 + 2 * 3 + 1
    assert model.model.encoder.attention.dropout == 0.1
    still = tiny_text(WideNetTextModel, dropout=0.0, noise_std=0.0)  # attention's dropout alone
    assert not torch.equal(still(*texts()).hidden, still(*texts()).hidden)
    still.eval()
    assert torch.equal(still(*texts()).hidden, still(*texts()).hidden)


# What it computes


@pytest.mark.parametrize("options", [{}, *TEXT_BASELINES.values()], ids=["widenet", *TEXT_BASELINES])
def test_loss_and_gradients_against_the_literal_model(options: dict) -> None:
    """The literal model never sees padding; it knows the length of the longest text for the capacity alone."""
    options = {"capacity_factor": 0.6, "dropout": 0.0, "attention_dropout": 0.0, "aux_loss_weight": 0.5} | options
    model = away_from_the_start(tiny_text(WideNetForMaskedLM, **options).double())
    batch = texts()
    literal = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}
    torch.manual_seed(7)
    labels, orders = masked_words(batch)
    output = model(*batch, labels=labels, sentence_order_labels=orders)
    output.loss.backward()
    torch.manual_seed(7)
    loss, dropped = literal_masked_lm_loss(literal, model.config, **as_lists(batch))
    loss.backward()
    assert (dropped > 0.05) != model.config.dense
    torch.testing.assert_close(output.loss, loss, rtol=1e-10, atol=1e-10)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, literal[name].grad, rtol=1e-9, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_the_cross_entropies_plus_the_weighted_sum_of_the_balance_losses(kind: type[nn.Module]) -> None:
    model = away_from_the_start(tiny_text(kind, aux_loss_weight=0.25)).eval()
    batch = texts()
    targets = TARGETS[kind](batch)
    output = model(*batch, **targets)
    assert len(output.routing) == 3
    assert torch.equal(output.aux_loss, sum(aux.balance_loss for aux in output.routing))
    torch.testing.assert_close(output.loss, sum(main_losses(output, batch, targets)) + output.aux_loss / 4)
    assert model(*batch).loss is None


def test_either_task_of_pretraining_by_itself() -> None:
    model = tiny_text(WideNetForMaskedLM, aux_loss_weight=0.0).eval()
    batch = texts()
    labels, orders = masked_words(batch)
    words = model(*batch, labels=labels).loss
    order = model(*batch, sentence_order_labels=orders).loss
    torch.testing.assert_close(model(*batch, labels=labels, sentence_order_labels=orders).loss, words + order)


def test_nothing_to_predict_costs_nothing() -> None:
    model = tiny_text(WideNetForMaskedLM, aux_loss_weight=0.0)
    batch = texts()
    loss = model(*batch, labels=torch.full_like(batch.input_ids, -100)).loss
    loss.backward()
    assert loss == 0
    assert not model.model.word_embedding.weight.grad.any()


# Padding


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, TEXT_BASELINES["groups"], TEXT_BASELINES["bert"]], ids=["", "groups", "bert"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_what_stands_in_padding_changes_no_bit(kind: type[nn.Module], options: dict, dtype: torch.dtype) -> None:
    """Neither of the outputs nor of the gradients, in training with dropout, noise and a capacity."""
    model = away_from_the_start(tiny_text(kind, **options).to(dtype))
    results = []
    batch = texts()
    for one in (batch, with_other_padding(batch)):
        torch.manual_seed(3)
        model.zero_grad()
        output = model(*one, **TARGETS[kind](batch))
        output.loss.backward()
        per_token = [logits for logits in output if isinstance(logits, Tensor) and logits.shape[:2] == (5, 7)]
        seen = [logits[batch.attention_mask == 1] for logits in per_token]
        whole = [tensor for tensor in output[:-1] if tensor.shape[:2] != (5, 7)]
        aux = [tensor for aux in output.routing for tensor in aux]
        results.append([*seen, *whole, *aux, *(parameter.grad.clone() for parameter in model.parameters())])
    assert not torch.equal(batch.input_ids, one.input_ids)
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("kind", KINDS)
def test_longer_padding_changes_rounding_alone(kind: type[nn.Module]) -> None:
    """Matrices of another size are multiplied in another order; no choice of an expert and no capacity changes."""
    model = away_from_the_start(tiny_text(kind, capacity_factor=None).double()).eval()
    short, long = texts(longest=7), texts(longest=9)
    for name, tensor in zip(short._fields, short, strict=True):
        getattr(long, name)[:, :7] = tensor
    first = model(*short, **TARGETS[kind](short))
    second = model(*long, **TARGETS[kind](long))
    for one, other in zip(first[:-1], second[:-1], strict=True):
        if one.shape[:2] == (5, 7):
            one, other = one[short.attention_mask == 1], other[long.attention_mask == 1]
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    for one, other in zip(first.routing, second.routing, strict=True):
        assert torch.equal(one.expert_demand, other.expert_demand)
        assert torch.equal(one.expert_count, other.expert_count)


def test_a_text_without_padding_is_as_without_a_mask() -> None:
    model = tiny_text(WideNetTextModel).double().eval()
    batch = texts(lengths=(7, 7))
    with_mask, without = model(*batch), model(batch.input_ids, token_type_ids=batch.token_type_ids)
    torch.testing.assert_close(with_mask.hidden, without.hidden, rtol=1e-12, atol=1e-12)
    for mask in (batch.attention_mask.bool(), batch.attention_mask.int()):
        assert torch.equal(model(batch.input_ids, mask, batch.token_type_ids).hidden, with_mask.hidden)


def test_padding_asks_for_no_expert_and_takes_no_slot() -> None:
    batch = texts()
    output = tiny_text(WideNetTextModel, capacity_factor=None)(*batch)
    assert [int(aux.expert_demand.sum()) for aux in output.routing] == [2 * sum(LENGTHS)] * 3
    assert [int(aux.expert_count.sum()) for aux in output.routing] == [2 * sum(LENGTHS)] * 3
    model = tiny_text(WideNetTextModel, capacity_factor=1.0, num_experts=2, k=1).eval()
    with torch.no_grad():
        model.encoder.ffn.router.weight.zero_()  # ties: all 22 ask for expert 0, which has room for 17 of all 35
    for aux in model(*batch).routing:
        assert aux.expert_demand.tolist() == [22, 0]
        assert aux.expert_count.tolist() == [17, 0]
        assert aux.balance_loss == 1  # 2 * (1 * 0.5 + 0 * 0.5)
        assert aux.dropped_share.item() == pytest.approx(5 / 22)


def test_labels_at_padding_count_nothing() -> None:
    model = tiny_text(WideNetForMaskedLM).eval()
    batch = texts()
    labels, _ = masked_words(batch)
    everywhere = torch.where(batch.attention_mask == 1, labels, 5)
    assert torch.equal(model(*batch, labels=everywhere).loss, model(*batch, labels=labels).loss)


def test_answers_never_stand_in_padding() -> None:
    batch = texts()
    output = tiny_text(WideNetForQuestionAnswering)(*batch)
    for logits in (output.start_logits, output.end_logits):
        assert torch.equal(logits.isneginf(), batch.attention_mask == 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_of_padding_alone_harms_nothing(kind: type[nn.Module]) -> None:
    batch = texts(lengths=(7, 0, 5))
    model = tiny_text(kind)
    if kind is WideNetForQuestionAnswering:
        targets = {"start_positions": torch.tensor([0, -100, 2]), "end_positions": torch.tensor([5, -100, 4])}
    else:
        targets = TARGETS[kind](batch)
    loss = model(*batch, **targets).loss
    loss.backward()
    assert loss.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


# How it behaves


@pytest.mark.parametrize("kind", KINDS)
def test_overfits_a_handful_of_texts(kind: type[nn.Module]) -> None:
    batch = texts()
    output = overfit(tiny_text(kind, **STILL), batch, steps=150, **TARGETS[kind](batch))
    assert output.loss - 0.01 * output.aux_loss < 0.1


def test_autocast_and_bf16_parameters() -> None:
    model = tiny_text(WideNetForMaskedLM, **STILL)
    batch = texts()
    labels, orders = masked_words(batch)
    full = model(*batch, labels=labels, sentence_order_labels=orders)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(*batch, labels=labels, sentence_order_labels=orders)
    narrow = model.bfloat16()(*batch, labels=labels, sentence_order_labels=orders)
    for output in (mixed, narrow):
        assert output.logits.dtype == torch.bfloat16
        assert output.loss.dtype == output.aux_loss.dtype == torch.float32
        torch.testing.assert_close(output.loss, full.loss, rtol=0.02, atol=0)
        wide = output._replace(logits=output.logits.float(), sentence_order_logits=output.sentence_order_logits.float())
        losses = main_losses(wide, batch, {"labels": labels, "sentence_order_labels": orders})
        torch.testing.assert_close(output.loss, sum(losses) + 0.01 * output.aux_loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("options", [{}, TEXT_BASELINES["groups"]], ids=["widenet", "groups"])
def test_training_compiles_as_one_graph(options: dict) -> None:
    model = tiny_text(WideNetForMaskedLM, **STILL | options)
    batch = texts()
    targets = TARGETS[WideNetForMaskedLM](batch)
    model(*batch, **targets).loss.backward()
    eager = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    counter = CompileCounterWithBackend("aot_eager")
    output = torch.compile(model, fullgraph=True, backend=counter)(*batch, **targets)
    output.loss.backward()
    assert counter.frame_count == 1
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, eager[name], rtol=1e-4, atol=1e-6)


def test_compiles_to_three_graphs_for_every_batch() -> None:
    """As it first comes, for every length, for every length and number of texts."""
    model = tiny_text(WideNetForMaskedLM, **STILL, num_layers=1)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for lengths, longest in (((7, 3, 6), 7), ((2, 6, 1), 6), ((8, 4), 8), ((3, 4, 2, 5, 1), 5), ((9, 1, 2, 3), 9)):
        batch = texts(lengths, longest)
        targets = TARGETS[WideNetForMaskedLM](batch)
        loss = compiled(*batch, **targets).loss
        torch.testing.assert_close(loss, model(*batch, **targets).loss)
        loss.backward()
    assert counter.frame_count <= 3


def test_forward_compiles_with_the_default_compiler() -> None:
    model = tiny_text(WideNetTextModel, num_layers=1).eval()
    batch = texts()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(*batch).hidden, model(*batch).hidden)


# What it refuses


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (0, {"input_ids": zeros(7)}, "input_ids: expected [N, L] = [any, any], got [7]"),
        (0, {"input_ids": zeros(5, 10)}, "input_ids: expected [N, L] with L from 1 to max_positions 9, got [5, 10]"),
        (0, {"input_ids": zeros(5, 0)}, "input_ids: expected [N, L] with L from 1 to max_positions 9, got [5, 0]"),
        (0, {"input_ids": zeros(5, 7).short()}, "input_ids: expected [N, L] of torch.int64 or torch.int32, got torch"),
        (0, {"input_ids": [[1, 2]]}, "input_ids: expected [N, L] of torch.int64 or torch.int32, got list"),
        (0, {"attention_mask": zeros(5, 6)}, "attention_mask: expected [N, L] = [5, 7], got [5, 6]"),
        (0, {"attention_mask": torch.zeros(5, 7)}, "attention_mask: expected [N, L] of torch.bool or torch.int64 or "),
        (0, {"token_type_ids": zeros(5, 7).bool()}, "token_type_ids: expected [N, L] of torch.int64 or torch.int32, g"),
        (0, {"token_type_ids": zeros(7, 5)}, "token_type_ids: expected [N, L] = [5, 7], got [7, 5]"),
        (0, {"labels": zeros(7, 5)}, "labels: expected [N, L] = [5, 7], got [7, 5]"),
        (0, {"sentence_order_labels": zeros(7)}, "sentence_order_labels: expected [N] = [5], got [7]"),
        (0, {"labels": zeros(5, 7).int()}, "labels: expected [N, L] of torch.int64, got torch.int32"),
        (0, {"sentence_order_labels": zeros(5).bool()}, "sentence_order_labels: expected [N] of torch.int64, got"),
        (1, {"labels": torch.zeros(5)}, "labels: expected [N] of torch.int64, got torch.float32"),
        (2, {"start_positions": zeros(5)}, "end_positions: expected both positions or none, got one"),
        (2, {"end_positions": zeros(5)}, "start_positions: expected both positions or none, got one"),
        (2, {"start_positions": zeros(5, 1), "end_positions": zeros(5)}, "start_positions: expected [N] = [5], got"),
        (2, {"start_positions": zeros(5), "end_positions": zeros(6)}, "end_positions: expected [N] = [5], got [6]"),
    ],
)
def test_arguments_of_another_shape_or_dtype(kind: int, arguments: dict, message: str) -> None:
    error = TypeError if " of torch" in message else ValueError
    with pytest.raises(error, match=r"^WideNet") as caught:
        tiny_text(KINDS[kind])(**texts()._asdict() | arguments)
    assert message in str(caught.value)
