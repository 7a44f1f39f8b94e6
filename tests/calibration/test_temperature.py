"""Temperature: the fit against scikit-learn and known truth, and baking against five architectures' own logits."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.calibration import CalibratedClassifierCV
from sklearn.frozen import FrozenEstimator
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BartConfig,
    BertConfig,
    DistilBertConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    ModernBertConfig,
    RobertaConfig,
)

from hf_ls.calibration.temperature import NoFiniteTemperature, apply_temperature, bake_temperature, fit_temperature
from hf_ls.metrics import nll


def sampled(n, num_classes, temperature=1.0, seed=0, scale=2.0):
    """Logits with labels drawn from softmax(logits / temperature)."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, num_classes)) * scale
    return logits, (logits / temperature + rng.gumbel(size=logits.shape)).argmax(1)


class Scores(ClassifierMixin, BaseEstimator):
    """A 'classifier' whose decision function is its input."""

    def __init__(self, num_classes=3):
        self.num_classes = num_classes

    def fit(self, x, y):
        self.classes_ = np.arange(self.num_classes)
        return self

    def predict(self, x):
        return x.argmax(1)

    def decision_function(self, x):
        return x[:, 1] - x[:, 0] if self.num_classes == 2 else x


@pytest.mark.parametrize(("num_classes", "factor"), [(2, 2.0), (3, 1.0), (8, 1.0)])
def test_equals_scikit_learn_whose_temperature_is_doubled_at_two_classes(num_classes, factor):
    logits, labels = sampled(1500, num_classes, temperature=1.7)
    base = FrozenEstimator(Scores(num_classes).fit(logits, labels))
    theirs = CalibratedClassifierCV(base, method="temperature", ensemble=False).fit(logits, labels)
    beta = theirs.calibrated_classifiers_[0].calibrators[0].beta_
    assert factor * fit_temperature(logits, labels) == pytest.approx(1 / float(beta), rel=1e-6)


@pytest.mark.parametrize("truth", [0.4, 1.0, 3.0])
def test_recovers_the_temperature_that_drew_the_labels(truth):
    logits, labels = sampled(40_000, 5, temperature=truth, scale=3 * truth)
    assert fit_temperature(logits, labels) == pytest.approx(truth, rel=0.03)


def test_is_the_minimum_of_the_nll():
    logits, labels = sampled(500, 4, temperature=2.5)
    t = fit_temperature(logits, labels)
    best = nll(apply_temperature(logits, t), labels)
    assert best < nll(logits, labels)
    for factor in (0.9, 0.999, 1.001, 1.1):
        assert nll(apply_temperature(logits, t * factor), labels) > best


@settings(deadline=None, max_examples=30)
@given(scale=st.floats(1e-6, 1e6), shift=st.floats(-50, 50), seed=st.integers(0, 50))
def test_scales_with_the_logits_and_ignores_shifts(scale, shift, seed):
    logits, labels = sampled(60, 3, temperature=2.0, seed=seed)
    t = fit_temperature(logits, labels)
    assert fit_temperature(logits * scale, labels) == pytest.approx(scale * t, rel=1e-6)
    assert fit_temperature(logits + shift, labels) == pytest.approx(t, rel=1e-6)


def test_a_temperature_never_changes_a_prediction():
    logits, labels = sampled(300, 6, temperature=0.5)
    scaled = apply_temperature(logits, fit_temperature(logits, labels))
    np.testing.assert_array_equal(scaled.argmax(1), logits.argmax(1))
    assert scaled.dtype == np.float64


def test_float32_logits_are_fitted_in_float64():
    # In float32 the NLL near its minimum is flat to 1e-7, which leaves T wrong in the fourth digit or stuck at 1.
    logits, labels = sampled(3000, 5, temperature=1.8)
    single = logits.astype(np.float32)
    assert fit_temperature(single, labels) == fit_temperature(single.astype(np.float64), labels)


def test_masked_classes_do_not_matter():
    logits, labels = sampled(400, 3, temperature=1.5)
    padded = np.hstack([logits, np.full((400, 2), -np.inf)])
    assert fit_temperature(padded, labels) == pytest.approx(fit_temperature(logits, labels), rel=1e-7)
    with pytest.raises(ValueError, match="must not be masked"):
        fit_temperature(padded, np.full(400, 4))


def test_perfectly_separated_rows_have_no_temperature():
    logits, _ = sampled(100, 3)
    with pytest.raises(NoFiniteTemperature, match=r"misclassified.*larger validation split, or keep T = 1"):
        fit_temperature(logits, logits.argmax(1))
    wrong = logits.argmax(1)
    wrong[0] = logits[0].argmin()
    assert 0 < fit_temperature(logits, wrong) < 1  # one mistake suffices


def test_uninformative_logits_have_no_temperature():
    logits, _ = sampled(100, 3)
    with pytest.raises(NoFiniteTemperature, match="no better than a uniform guess"):
        fit_temperature(logits, logits.argmin(1))
    with pytest.raises(NoFiniteTemperature, match="no better than a uniform guess"):
        fit_temperature(np.ones((5, 3)), np.arange(5) % 3)


def test_rows_that_are_all_but_separated_are_refused():
    logits = np.tile([10.0, 0.0], (50, 1))
    logits[:2] = [[1e-6, 0.0], [0.0, 1e-9]]  # the only mistake is a billionth wide: T near 1e-7
    with pytest.raises(NoFiniteTemperature, match="all but separable"):
        fit_temperature(logits, np.zeros(50, dtype=int))


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        ([[0.9, 0.1, 0.0]] * 4, ValueError, "one hard class per row"),
        ([0.0, 1.0, 2.0, 0.0], TypeError, "integer labels"),
        ([0, 1, 2, -100], ValueError, "ignore_index"),
        ([0, 1, 2, 3], ValueError, r"\[0, 3\), got 3"),
        ([0, 1], ValueError, "one label per prediction"),
    ],
)
def test_wrong_labels_are_refused(labels, error, message):
    with pytest.raises(error, match=message):
        fit_temperature(np.eye(4, 3), labels)


def test_wrong_logits_are_refused():
    with pytest.raises(ValueError, match="NaN"):
        fit_temperature([[np.nan, 0.0], [0.0, 1.0]], [0, 1])
    with pytest.raises(ValueError, match="at least 2 rows"):
        fit_temperature([[0.0, 1.0]], [0])


@pytest.mark.parametrize("t", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_temperatures_are_refused(t):
    with pytest.raises(ValueError, match="above 0"):
        apply_temperature([[1.0, 2.0]], t)
    with pytest.raises(ValueError, match="above 0"):
        bake_temperature(classifier("bert"), t)


def test_a_temperature_is_a_number():
    for t in ("2", None, True, torch.tensor(2.0)):
        with pytest.raises(TypeError, match="expected a number"):
            apply_temperature([[1.0, 2.0]], t)


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 40}
CONFIGS = {
    "bert": lambda **k: BertConfig(**SMALL, **k),
    "distilbert": lambda **k: DistilBertConfig(dim=16, n_layers=2, n_heads=2, hidden_dim=24, vocab_size=40, **k),
    "roberta": lambda **k: RobertaConfig(**SMALL, max_position_embeddings=40, **k),
    "modernbert": lambda **k: ModernBertConfig(
        **SMALL, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2, **k
    ),
    "llama": lambda **k: LlamaConfig(**SMALL, pad_token_id=0, **k),
    "bart": lambda **k: BartConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=24, decoder_ffn_dim=24, vocab_size=40, max_position_embeddings=40, **k,
    ),
}  # fmt: skip


def classifier(name, num_labels=3, seed=0, **settings):
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_config(CONFIGS[name](num_labels=num_labels, **settings))
    with torch.no_grad():
        for parameter in model.parameters():  # biases start at 0, which would hide one left unscaled
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def batch():
    ids = torch.randint(4, 40, (4, 7), generator=torch.Generator().manual_seed(1))
    ids[:, -1] = 2
    mask = torch.ones_like(ids)
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def logits_of(model):
    return model(**batch()).logits


@pytest.mark.parametrize("name", list(CONFIGS))
def test_baked_logits_are_the_logits_over_t_and_survive_saving(name, tmp_path):
    model = classifier(name)
    before = logits_of(model)
    assert before.std() > 1e-2
    others = {key: value.clone() for key, value in model.state_dict().items()}
    bake_temperature(model, 2.5)
    torch.testing.assert_close(logits_of(model), before / 2.5, rtol=1e-5, atol=1e-6)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, others[key])}
    assert {key.rpartition(".")[2] for key in changed} == ({"weight"} if name == "llama" else {"weight", "bias"})
    assert len({key.rpartition(".")[0] for key in changed}) == 1
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits_of(again), before / 2.5, rtol=1e-5, atol=1e-6)
    assert again.config.calibration_temperature == 2.5


def test_llama_without_a_padding_token_can_be_baked():
    model = classifier("llama")
    model.config.pad_token_id = None
    weight = model.score.weight.clone()
    bake_temperature(model, 4.0)
    torch.testing.assert_close(model.score.weight, weight / 4)


def test_baking_twice_multiplies():
    model = classifier("bert")
    before = logits_of(model)
    bake_temperature(model, 2.0)
    bake_temperature(model, 1.5)
    torch.testing.assert_close(logits_of(model), before / 3, rtol=1e-5, atol=1e-6)
    assert model.config.calibration_temperature == 3.0


def test_baked_nll_is_that_of_the_fitted_temperature():
    model = classifier("bert")
    labels = np.array([0, 2, 1, 0])
    logits = logits_of(model).numpy()
    labels[:3] = logits[:3].argmax(1)  # three right and the last wrong
    labels[3] = logits[3].argsort()[1]
    t = fit_temperature(logits, labels)
    bake_temperature(model, t)
    assert nll(logits_of(model).numpy(), labels) == pytest.approx(nll(apply_temperature(logits, t), labels), rel=1e-5)


def test_a_hidden_layer_as_wide_as_the_labels_is_not_mistaken_for_the_head():
    model = classifier("roberta", num_labels=16)  # classifier.dense is 16 -> 16 too
    dense = model.classifier.dense.weight.clone()
    before = logits_of(model)
    bake_temperature(model, 2.0)
    torch.testing.assert_close(logits_of(model), before / 2, rtol=1e-5, atol=1e-6)
    assert torch.equal(model.classifier.dense.weight, dense)


def test_modes_hooks_and_gradients_are_left_as_they_were():
    model = classifier("bert").train()
    model.bert.eval()
    bake_temperature(model, 2.0)
    assert model.training and model.classifier.training and not model.bert.encoder.training
    assert not model.classifier._forward_hooks
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_half_precision_rounds_but_is_baked():
    model = classifier("bert").to(torch.bfloat16)
    before = logits_of(model).float()
    bake_temperature(model, 3.0)
    assert model.classifier.weight.dtype == torch.bfloat16
    torch.testing.assert_close(logits_of(model).float(), before / 3, rtol=0.05, atol=0.02)


def refused(model, message, **inputs):
    """The model is refused and unchanged."""
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        bake_temperature(model, 2.0, **inputs)
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert not hasattr(getattr(model, "config", None), "calibration_temperature")


def test_tied_heads_are_refused():
    model = classifier("bert", num_labels=16)
    model.classifier.weight = model.bert.pooler.dense.weight
    refused(model, "tied to bert.pooler.dense.weight")


def test_frozen_heads_are_refused():
    model = classifier("bert")
    model.classifier.requires_grad_(False)
    refused(model, "frozen parameter; call requires_grad_")


def test_quantised_and_adapted_heads_are_refused():
    class Int8Linear(nn.Linear):
        pass

    model = classifier("bert")
    model.classifier.__class__ = Int8Linear
    refused(model, "plain floating-point nn.Linear, got Int8Linear")
    model = classifier("bert")
    nn.utils.parametrizations.weight_norm(model.classifier)
    refused(model, "plain floating-point nn.Linear, got ParametrizedLinear")


def test_a_head_followed_by_a_curve_is_refused_and_restored():
    # The output of the layer is the logits on the check batch only: tanh is linear near 0.
    class Curved(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = classifier("bert").config
            self.out_proj = nn.Linear(4, 3, bias=False)
            self.device = torch.device("cpu")
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            logits = self.out_proj(x)
            return type("Output", (), {"logits": logits if self.calls == 1 else logits.tanh() + 1})

    refused(Curved(), "not linear in that layer", inputs={"x": torch.ones(2, 4)})


def test_logits_that_no_linear_layer_made_are_refused():
    model = classifier("bert")
    model.register_forward_hook(lambda _, __, output: setattr(output, "logits", output.logits.tanh()))
    refused(model, r"got \['classifier'\]")


def test_models_without_a_softmax_over_classes_are_refused():
    refused(classifier("bert", problem_type="multi_label_classification"), "multi_label_classification")
    refused(classifier("bert", num_labels=1), "num_labels=1")
    language_model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40, n_positions=16))
    refused(language_model, "got none; use apply_temperature")
    refused(nn.Linear(2, 2), "config.num_labels")


def test_a_model_that_cannot_take_the_example_says_to_pass_one():
    model = classifier("bert")
    refused(model, "pass inputs= with a small batch", inputs={"pixel_values": torch.ones(1)})
    before = logits_of(model)
    bake_temperature(model, 2.0, inputs=batch())
    torch.testing.assert_close(logits_of(model), before / 2, rtol=1e-5, atol=1e-6)
