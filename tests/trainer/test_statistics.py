"""Logits reduced to four numbers per item, exactly and in bounded memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import arguments, collate, tiny_llama, token_rows
from largest import Largest

from hf_ls import LabelSmoothingTrainer
from hf_ls.metrics.core import bin_index
from hf_ls.trainer import evaluation as module
from hf_ls.trainer.evaluation import item_statistics


def test_four_numbers_of_each_item():
    g = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(3, 5, 11, generator=g), torch.randint(0, 11, (3, 5), generator=g)
    labels[1, 2:] = -100
    items = item_statistics(logits, labels)
    p = logits.double().softmax(-1)
    kept = labels != -100
    confidence, prediction = p.max(-1)
    y = labels.clamp_min(0)
    nll = F.cross_entropy(logits.double().reshape(-1, 11), y.reshape(-1), reduction="none").reshape(3, 5)
    expected = torch.stack([confidence, (prediction == y).double(), nll, ((p - F.one_hot(y, 11)) ** 2).sum(-1)], -1)
    torch.testing.assert_close(items[kept], expected[kept], atol=1e-12, rtol=1e-12)
    assert items[~kept].isnan().all()


@pytest.mark.parametrize("classes", [3, 15, 16, 400])
@pytest.mark.parametrize("sharpness", [0.0, 1.0, 4.0, 30.0])
def test_gaps_of_bins_are_those_of_all_probabilities(classes, sharpness):
    """The largest 15 stand for all; equal ones lie on the edge of a bin at 15 classes."""
    g = torch.Generator().manual_seed(1)
    logits, labels = sharpness * torch.randn(40, classes, generator=g), torch.randint(0, classes, (40,), generator=g)
    found = item_statistics(logits, labels, gaps=True)[:, 4:].sum(0).numpy()
    p = np.exp(logits.double().numpy() - np.logaddexp.reduce(logits.double().numpy(), axis=1, keepdims=True))
    outcome, cell = np.eye(classes)[labels], bin_index(p, 15)
    expected = [(p - outcome)[cell == b].sum() for b in range(15)]
    np.testing.assert_allclose(found, expected[1:], rtol=0, atol=1e-11)
    assert -found.sum() == pytest.approx(expected[0], abs=1e-11)


def test_extreme_logits_keep_an_exact_nll():
    items = item_statistics(torch.tensor([[1000.0, 0.0], [0.0, float("-inf")]]), torch.tensor([1, 0]))
    assert items[:, 2].tolist() == [1000.0, 0.0]
    assert items[:, 3].tolist() == [2.0, 0.0]


def test_trap_15_memory_does_not_grow_with_the_number_of_tokens(monkeypatch):
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 4 * 1000)
    logits, labels = torch.randn(2, 50, 1000), torch.randint(0, 1000, (2, 50))
    with Largest(torch.float64) as largest:
        item_statistics(logits, labels)
    assert largest.elements <= 4 * 1000


def test_trap_15_evaluation_gathers_a_few_numbers_and_the_label_of_a_token_and_no_logits(tmp_path, monkeypatch):
    trainer = LabelSmoothingTrainer(
        model=tiny_llama(),
        args=arguments(tmp_path, per_device_eval_batch_size=4),
        eval_dataset=token_rows(),
        data_collator=collate,
    )
    shapes = []
    gather = trainer.accelerator.gather
    monkeypatch.setattr(trainer.accelerator, "gather", lambda items: shapes.append(tuple(items.shape)) or gather(items))
    trainer.evaluate()
    assert {shape[-1] for shape in shapes if len(shape) == 3} == {4 + 1 + 14}  # and the gaps of 14 bins
    assert all(len(shape) in (1, 3) for shape in shapes)


def test_labels_out_of_range_and_nan_are_refused():
    with pytest.raises(ValueError, match=r"labels in \[0, 3\)"):
        item_statistics(torch.zeros(2, 3), torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="NaN"):
        item_statistics(torch.full((1, 3), float("nan")), torch.tensor([0]))
