"""Epsilon from the model's confidence; online label smoothing: loop, state, kill -9, two processes."""

import os
import signal

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from forked import Forked, all_ended

from hf_ls.losses.adaptive import (
    MAX_ONLINE_CLASSES,
    OnlineLabelSmoothing,
    adaptive_smoothed_terms,
    graduated_epsilon,
    instance_epsilon,
)
from hf_ls.losses.cross_entropy import smoothed_terms
from hf_ls.losses.priors import confusion_prior, support_prior
from hf_ls.losses.smoothing import Schedule, Smoothing

K = 5
UNIGRAM = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05])


def _batch(n=40, seed=0, dtype=torch.float64, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, K, generator=generator, dtype=torch.float64) * scale
    return logits.to(dtype), torch.randint(0, K, (n,), generator=generator)


# --- graduated and instance-wise epsilon


def test_graduated_epsilon_against_numpy_digitize():
    confidence = torch.rand(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    thresholds, values = (0.1, 0.5, 0.9), (0.05, 0.4, 0.0, 0.2)
    expected = np.array(values)[np.digitize(confidence.numpy(), thresholds)]
    np.testing.assert_array_equal(graduated_epsilon(confidence, thresholds, values).numpy(), expected)
    paper = graduated_epsilon(torch.tensor([[0.0, 0.29, 0.3], [0.69, 0.7, 1.0]]))
    assert torch.equal(paper, torch.tensor([[0.0, 0.0, 0.1], [0.1, 0.3, 0.3]]))


@pytest.mark.parametrize(
    ("thresholds", "values", "text"),
    [
        ((0.7, 0.3), (0.0, 0.1, 0.3), "thresholds increasing"),
        ((0.0, 0.3), (0.0, 0.1, 0.3), "thresholds increasing"),
        ((0.3, 0.7), (0.0, 0.1), "3 values"),
        ((0.3, 0.7), (0.0, 0.1, 1.0), r"values with 0 <= epsilon < 1, got \(0.0, 0.1, 1.0\)"),
        ((0.3,), (-0.1, 0.1), r"values with 0 <= epsilon < 1, got \(-0.1, 0.1\)"),
    ],
)
def test_graduated_epsilon_refuses(thresholds, values, text):
    with pytest.raises(ValueError, match=text):
        graduated_epsilon(torch.tensor([0.5]), thresholds, values)


@pytest.mark.parametrize("convention", ["all", "wrong"])
@pytest.mark.parametrize("prior", [None, UNIGRAM, confusion_prior(torch.arange(K * K).view(K, K))], ids=str)
def test_adaptive_terms_are_those_of_each_epsilon_alone(convention, prior):
    logits, labels = _batch()
    labels[::7] = -100
    logits.requires_grad_()
    p_y = logits.softmax(-1).gather(1, labels.clamp_min(0).unsqueeze(1)).squeeze(1)
    bucket = torch.where(p_y < 0.3, 0, torch.where(p_y < 0.7, 1, 2))
    assert bucket[labels >= 0].unique().tolist() == [0, 1, 2]
    own = Smoothing(0.9, convention, prior=prior, schedule=Schedule("linear"))  # its epsilon plays no part
    terms = adaptive_smoothed_terms(logits, labels, own)
    for i, epsilon in enumerate([0.0, 0.1, 0.3]):
        alone = smoothed_terms(logits, labels, Smoothing(epsilon, convention, prior=prior))
        rows = bucket == i
        torch.testing.assert_close(terms.nll[rows], alone.nll[rows])
        torch.testing.assert_close(terms.smoothing_term[rows], alone.smoothing_term[rows])
        (gradient,) = torch.autograd.grad(terms.loss[rows].sum(), logits, retain_graph=True)
        torch.testing.assert_close(gradient, torch.autograd.grad(alone.loss[rows].sum(), logits)[0])
    assert not terms.loss[labels == -100].any()


def test_no_gradient_flows_through_a_smooth_epsilon():
    logits, labels = _batch()
    logits.requires_grad_()
    terms = adaptive_smoothed_terms(logits, labels, Smoothing(), instance_epsilon, confidence="max")
    (gradient,) = torch.autograd.grad(terms.loss.sum(), logits)
    p = logits.detach().softmax(-1)
    epsilon = 0.2 * p.amax(-1, keepdim=True)
    target = (1 - epsilon) * F.one_hot(labels, K) + epsilon / K
    torch.testing.assert_close(gradient, p - target)


def test_instance_epsilon_by_entropy_against_numpy():
    logits, labels = _batch()
    p = logits.softmax(-1).numpy()
    expected = 0.5 * (1 + (p * np.log(p)).sum(-1) / np.log(K))
    seen = []

    def epsilon_of_confidence(confidence):
        seen.append(instance_epsilon(confidence, maximum=0.5))
        return seen[-1]

    adaptive_smoothed_terms(logits, labels, Smoothing(), epsilon_of_confidence, confidence="entropy")
    np.testing.assert_allclose(seen[0].numpy(), expected, rtol=1e-12)


def test_entropy_confidence_ends_and_impossible_classes():
    inf = torch.inf
    logits = torch.tensor([[0.0, 0, 0, 0, -inf], [50.0, 0, 0, 0, -inf], [-inf, -inf, -inf, 7.0, -inf]])
    labels = torch.tensor([0, 0, 3])
    seen = []

    def epsilon_of_confidence(confidence):
        seen.append(confidence)
        return confidence

    for num_classes in (4, 5):
        own, wide = Smoothing(prior=support_prior([3], num_classes)), logits[:, :num_classes]
        adaptive_smoothed_terms(wide, labels, own, epsilon_of_confidence, confidence="entropy")
    assert torch.equal(seen[0], seen[1]), "a class with logit -inf does not count"
    torch.testing.assert_close(seen[0], torch.tensor([0.0, 1.0, 1.0]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("confidence", ["label", "max", "entropy"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_adaptive_terms_of_ignored_rows_are_zero_even_where_they_are_nan(confidence, dtype):
    logits, labels = _batch(12, dtype=dtype)
    whole = adaptive_smoothed_terms(logits, labels, Smoothing(), instance_epsilon, confidence=confidence)
    labels, logits = labels.view(3, 4).clone(), logits.view(3, 4, K).clone()
    labels[1], logits[1] = -100, torch.nan
    terms = adaptive_smoothed_terms(logits, labels, Smoothing(), instance_epsilon, confidence=confidence)
    assert terms.loss.shape == (3, 4)
    assert terms.loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not terms.loss[1].any()
    assert torch.equal(terms.loss[[0, 2]], whole.loss.view(3, 4)[[0, 2]])


@pytest.mark.parametrize(
    "epsilon_of_confidence",
    [lambda c: c + 0.5, lambda c: -c, lambda c: c[:1], lambda c: c * torch.nan],
    ids=["above 1", "below 0", "wrong shape", "nan"],
)
def test_adaptive_terms_refuse_bad_epsilons(epsilon_of_confidence):
    logits, labels = _batch()
    with pytest.raises(ValueError, match="expected epsilons"):
        adaptive_smoothed_terms(logits, labels, Smoothing(), epsilon_of_confidence)


def test_adaptive_refuses_an_unknown_confidence_and_a_bad_maximum():
    with pytest.raises(ValueError, match="'label', 'max', 'entropy'"):
        adaptive_smoothed_terms(*_batch(), Smoothing(), confidence="margin")
    with pytest.raises(ValueError, match="maximum"):
        instance_epsilon(torch.tensor([0.5]), maximum=1.5)


# --- online label smoothing


def _paper_loop(epochs, num_classes, alpha):
    """The paper's algorithm, example by example in NumPy: the loss of each batch and the last matrix."""
    matrix = np.full((num_classes, num_classes), 1 / num_classes)
    losses = []
    for batches in epochs:
        total, count = np.zeros_like(matrix), np.zeros(num_classes)
        for logits, labels in batches:
            batch_losses = []
            for z, y in zip(logits.double().numpy(), labels.tolist(), strict=True):
                if y == -100:
                    continue
                p = np.exp(z) / np.exp(z).sum()
                batch_losses.append(-alpha * np.log(p[y]) - (1 - alpha) * (matrix[y] * np.log(p)).sum())
                if p.argmax() == y:
                    total[y] += p
                    count[y] += 1
            losses.append(np.mean(batch_losses))
        seen = count > 0
        matrix[seen] = total[seen] / count[seen, None]
    return losses, matrix


def _epochs(dtype=torch.float64):
    epochs = [[_batch(30, seed=10 * e + b, dtype=dtype) for b in range(3)] for e in range(3)]
    for logits, labels in epochs[1]:
        labels[labels == 4] = -100  # class 4 has no right prediction in this epoch
        labels[3] = -100
        logits[3] = torch.nan
    return epochs


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("alpha", [0.5, 0.0, 1.0])
def test_online_label_smoothing_is_the_papers_loop(dtype, tolerance, alpha):
    epochs = _epochs(dtype)
    loss_function = OnlineLabelSmoothing(K, alpha=alpha)
    losses = []
    for batches in epochs:
        for logits, labels in batches:
            losses.append(loss_function(logits, labels).item())
        loss_function.end_epoch()
    expected_losses, expected_matrix = _paper_loop(epochs, K, alpha)
    np.testing.assert_allclose(losses, expected_losses, rtol=tolerance)
    np.testing.assert_allclose(loss_function.matrix.numpy(), expected_matrix, atol=tolerance)
    assert not loss_function.total.any() and not loss_function.count.any()
    torch.testing.assert_close(loss_function.matrix.sum(1), torch.ones(K, dtype=torch.float64))


def test_the_first_epoch_is_label_smoothing_with_epsilon_one_minus_alpha():
    logits, labels = _batch()
    logits.requires_grad_()
    loss = OnlineLabelSmoothing(K, alpha=0.9)(logits, labels)
    expected = F.cross_entropy(logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits)[0])


def test_evaluation_is_the_plain_nll_and_adds_nothing():
    logits, labels = _batch()
    loss_function = OnlineLabelSmoothing(K).eval()
    torch.testing.assert_close(loss_function(logits, labels), F.cross_entropy(logits, labels))
    assert not loss_function.total.any() and not loss_function.count.any()


def test_it_takes_model_outputs_sequences_and_a_global_item_count():
    logits, labels = _batch(12)
    labels[5] = -100
    summed = 11 * OnlineLabelSmoothing(K)(logits, labels)
    outputs = {"loss": None, "logits": logits.view(3, 4, K)}
    loss = OnlineLabelSmoothing(K)(outputs, labels.view(3, 4), num_items_in_batch=44)
    torch.testing.assert_close(loss, summed / 44)


def test_a_batch_with_everything_ignored_is_a_differentiable_zero():
    logits = torch.full((3, K), torch.nan, requires_grad=True)
    loss_function = OnlineLabelSmoothing(K)
    loss = loss_function(logits, torch.full((3,), -100))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.item() == 0 and not gradient.any() and not loss_function.count.any()


def test_minus_inf_classes_without_prior_mass_are_the_sliced_problem():
    logits, labels = _batch()
    wide = F.pad(logits, (0, 1), value=-torch.inf).requires_grad_()
    masked = OnlineLabelSmoothing(K + 1, prior=support_prior(range(K), K + 1))
    sliced = OnlineLabelSmoothing(K)
    for _ in range(2):
        loss = masked(wide, labels)
        torch.testing.assert_close(loss, sliced(logits, labels))
        (gradient,) = torch.autograd.grad(loss, wide)
        assert torch.isfinite(gradient).all() and not gradient[:, K].any()
        masked.end_epoch()
        sliced.end_epoch()
    assert not masked.matrix[:K, K].any()
    with pytest.raises(ValueError, match="masked classes"):
        OnlineLabelSmoothing(K + 1)(wide, labels)


def test_sums_do_not_depend_on_the_order_of_the_examples():
    logits, labels = _batch(3000, dtype=torch.float32, scale=8.0)
    order = torch.randperm(3000, generator=torch.Generator().manual_seed(0))
    once, pieces = OnlineLabelSmoothing(K), OnlineLabelSmoothing(K)
    once(logits, labels)
    for rows in order.split(7):
        pieces(logits[rows], labels[rows])
    assert torch.equal(once.total, pieces.total) and torch.equal(once.count, pieces.count)
    # The rounding earns this: plain float64 sums of the same probabilities depend on the order.
    p = logits.softmax(-1).double()
    assert not torch.equal(p.cumsum(0)[-1], p[order].cumsum(0)[-1])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"num_classes": MAX_ONLINE_CLASSES + 1}, "unigram_prior"),
        ({"num_classes": 1}, "2 to 4096"),
        ({"num_classes": 3, "alpha": 1.1}, "alpha"),
        ({"num_classes": 3, "prior": UNIGRAM}, "prior over 3 classes"),
    ],
)
def test_online_label_smoothing_refuses(arguments, text):
    with pytest.raises(ValueError, match=text):
        OnlineLabelSmoothing(**arguments)


def test_online_label_smoothing_refuses_bad_batches_and_keeps_its_sums():
    loss_function = OnlineLabelSmoothing(K)
    with pytest.raises(ValueError, match="over 5 classes"):
        loss_function(torch.zeros(2, 3), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"labels in \[0, 5\)"):
        loss_function(torch.zeros(2, K), torch.tensor([0, -1]))
    with pytest.raises(ValueError, match="labels"):
        loss_function(torch.zeros(2, K), torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="NaN"):
        loss_function(torch.full((2, K), torch.nan), torch.tensor([0, 1]))
    assert not loss_function.total.any() and not loss_function.count.any()


def test_state_dict_round_trip_in_the_middle_of_an_epoch_is_exact(tmp_path):
    first = OnlineLabelSmoothing(K)
    first(*_batch(seed=1))
    first.end_epoch()
    first(*_batch(seed=2))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = OnlineLabelSmoothing(K)
    second.load_state_dict(torch.load(tmp_path / "state.pt"))
    for loss_function in (first, second):
        loss_function(*_batch(seed=3))
        loss_function.end_epoch()
    assert torch.equal(first.matrix, second.matrix)
    assert set(first.state_dict()) == {"matrix", "total", "count"}
    assert first.matrix.dtype == first.total.dtype == torch.float64 and first.count.dtype == torch.int64


def _train(checkpoint: str, result: str, kill_at: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    inputs, labels = torch.randn(48, 4), torch.randint(0, 5, (48,))
    model, loss_function = torch.nn.Linear(4, 5), OnlineLabelSmoothing(5)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    parts = {"model": model, "loss_function": loss_function, "optimizer": optimizer}
    saved = torch.load(checkpoint) if os.path.exists(checkpoint) else {"step": 0}
    start = saved.pop("step")
    for name, state in saved.items():
        parts[name].load_state_dict(state)
    for step in range(start, 18):
        if step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        rows = torch.arange(8) + 8 * (step % 6)
        optimizer.zero_grad()
        loss_function(model(inputs[rows]), labels[rows]).backward()
        optimizer.step()
        if step % 6 == 5:
            loss_function.end_epoch()
        if step % 2 == 1:
            state = {name: part.state_dict() for name, part in parts.items()}
            torch.save({"step": step + 1, **state}, checkpoint + ".tmp")
            os.replace(checkpoint + ".tmp", checkpoint)
    torch.save({"matrix": loss_function.matrix, "weight": model.weight.data}, result)


def test_training_killed_inside_an_epoch_resumes_exactly(tmp_path):
    def train(name: str, kill_at: int) -> int:
        return Forked(_train, str(tmp_path / f"{name}.checkpoint"), str(tmp_path / f"{name}.result"), kill_at).wait()

    assert train("whole", kill_at=-1) == 0
    assert train("killed", kill_at=9) == -signal.SIGKILL
    partial = torch.load(tmp_path / "killed.checkpoint")
    assert partial["step"] == 8 and partial["loss_function"]["count"].any(), "its epoch must be open"
    assert train("killed", kill_at=-1) == 0
    whole, resumed = (torch.load(tmp_path / f"{name}.result") for name in ("whole", "killed"))
    assert all(torch.equal(whole[key], resumed[key]) for key in ("matrix", "weight"))


def _two_processes(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    loss_function = OnlineLabelSmoothing(K)
    matrices = []
    for epoch in range(3):
        logits, labels = _batch(101, seed=epoch, dtype=torch.float32)
        rows = torch.arange(101)[rank * 60 : 60 + rank * 41]  # 60 and 41 examples
        for part in rows.split(9):
            loss_function(logits[part], labels[part])
            if int(part[0]) not in (18, 78):
                continue
            # A checkpoint inside each epoch; in the second one a fresh module on both processes reads it.
            loss_function.synchronise()
            if epoch == 1:
                if rank == 0:
                    torch.save(loss_function.state_dict(), f"{folder}/state.pt")
                dist.barrier()
                loss_function = OnlineLabelSmoothing(K)
                loss_function.load_state_dict(torch.load(f"{folder}/state.pt"))
        loss_function.end_epoch()
        matrices.append(loss_function.matrix.clone())
    torch.save(matrices, f"{folder}/matrices_{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_and_a_checkpoint_between_give_the_matrix_of_one(tmp_path):
    code, output = all_ended([Forked(_two_processes, rank, str(tmp_path)) for rank in (0, 1)], 120)
    assert code == 0, output
    one = OnlineLabelSmoothing(K)
    for epoch in range(3):
        one(*_batch(101, seed=epoch, dtype=torch.float32))
        one.end_epoch()
        for rank in (0, 1):
            assert torch.equal(torch.load(tmp_path / f"matrices_{rank}.pt")[epoch], one.matrix), (epoch, rank)
