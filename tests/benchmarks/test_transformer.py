"""The bench of a model of transformers: who takes part, that all agree, and what is said without transformers."""

import importlib.util

import pytest
import torch

from widenet_kernels.benchmarks import transformer
from widenet_kernels.benchmarks.shapes import Case, Inputs
from widenet_kernels.benchmarks.timing import Budget, Clock, measure

TINY = Case("tiny", 24, 16, 24, 4, 2)
EVERYBODY = ["widenet_kernels", "eager", "batched_mm", "grouped_mm"]


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch):
    text = transformer.TEXT._replace(T=24, D=32, F=24, E=4)
    monkeypatch.setattr(transformer, "TEXT", text)
    monkeypatch.setattr(transformer, "DECODE", text._replace(T=3))
    monkeypatch.setattr(transformer, "PAST", 5)


def measured(section, tolerance=1e-4):
    rows = {}
    budget = Budget(seconds=0, patience=60, largest_error=tolerance)
    measure(section.contenders, torch.float32, Clock(), budget, rows, lambda name: None)
    return rows


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 6e-2)], ids=str)
def test_everybody_gives_the_same(dtype, tolerance):
    pytest.importorskip("transformers", minversion="5.0")
    sections = list(transformer.sections(Inputs(TINY, "cpu", dtype)))
    passes = [(section.case.T, section.direction) for section in sections]
    assert passes == [(24, "forward"), (24, "forward+backward"), (3, "forward")]
    for section in sections:
        rows = measured(section, tolerance)
        assert list(rows) == EVERYBODY
        assert all("ms" in row for row in rows.values()), rows
        assert rows["eager"]["relative_error"] == 0


def test_a_wrong_answer_is_seen(monkeypatch):
    pytest.importorskip("transformers", minversion="5.0")
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._local_mapping, "batched_mm", lambda self, x, index, weight: 0 * x)
    section = next(transformer.sections(Inputs(TINY, "cpu", torch.float32)))
    assert measured(section)["batched_mm"]["why"].startswith("WRONG: off by")


def test_without_transformers(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for section in transformer.sections(Inputs(TINY, "cpu", torch.float32)):
        assert {row["why"] for row in measured(section).values()} == {"transformers is not installed"}


def test_the_work_of_a_forward_pass():
    """Per token: attention 32 x (32 + 8 + 8 + 32), router, two experts of three products; a head; each twice."""
    of_a_layer = 32 * (32 + 8 + 8 + 32) + 32 * 4 + 2 * 3 * 32 * 24
    head = 32 * transformer.VOCABULARY
    assert transformer.model_flops(transformer.TEXT) == 2 * 24 * (transformer.LAYERS * of_a_layer + head)
