"""Log-probabilities of options against one plain forward for each of them, in float64, without the package."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from byte_tokenizer import MERGES, byte_tokenizer
from helpers import tiny_bert, tiny_llama, tiny_t5
from small_tokenizer import save_tokenizer

import hf_ls
from hf_ls.answers import scoring
from hf_ls.answers.questions import Question, continuation
from hf_ls.answers.scoring import answer_logits, option_scores
from hf_ls.metrics import PredictionStatistics

SIZE = 280
QUESTIONS = [
    {"prompt": "Is water wet?\nAnswer:", "options": ["yes", "no"], "answer": 0},
    {"prompt": "Which letter comes first?\nA. b\nB. a\nC. c\nAnswer:", "options": ["A", "B", "C"], "answer": 1},
    {"prompt": "2 + 2 is ", "options": ["four", "5", "a number of which nobody knows anything", "4"], "answer": 3},
    {"prompt": "Wie heißt die Stadt an der Donau? ", "options": ["Ulm", "Köln"], "answer": 0},
    {"prompt": "x" * 60, "options": [" yes", " y"], "answer": 0},
]


def llama(**kwargs: Any) -> Any:
    return tiny_llama(vocab_size=SIZE, **kwargs).double().eval()


def gemma() -> Any:
    """Soft-caps its logits."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=SIZE, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    return tf.Gemma2ForCausalLM(tf.Gemma2Config(**sizes, intermediate_size=64, final_logit_softcapping=5.0)).double().eval()


def neo() -> Any:
    torch.manual_seed(0)
    sizes = dict(vocab_size=SIZE, n_embd=32, n_layer=2, n_head=4, n_positions=256)
    return tf.GPT2LMHeadModel(tf.GPT2Config(**sizes, attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)).double().train()


def plain(model: Any, tokenizer: Any, questions: list[dict[str, Any]], prefix: str = " ") -> np.ndarray:
    """One forward for each option, of itself alone."""
    table = np.full((len(questions), max(len(q["options"]) for q in questions)), -np.inf)
    model = model.eval()
    for i, question in enumerate(questions):
        for k, option in enumerate(question["options"]):
            blank = "" if question["prompt"][-1:].isspace() or option[:1].isspace() else prefix
            prompt = tokenizer(question["prompt"].rstrip())["input_ids"]
            ids = torch.tensor([tokenizer(question["prompt"] + blank + option)["input_ids"]])
            with torch.no_grad():
                z = model(input_ids=ids).logits[0].double()
            p = torch.exp(z - torch.logsumexp(z, -1, keepdim=True))
            table[i, k] = sum(float(torch.log(p[t - 1, ids[0, t]])) for t in range(len(prompt), ids.shape[1]))
    return table


@pytest.mark.parametrize("build", [llama, gemma, neo])
@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_equal_to_one_forward_for_each_option(build, batch_size):
    model, tokenizer = build(), byte_tokenizer()
    expected = plain(build(), tokenizer, QUESTIONS)
    found = answer_logits(model, tokenizer, QUESTIONS, batch_size=batch_size)
    assert found.dtype == np.float64 and found.shape == (5, 4)
    assert np.array_equal(np.isneginf(found), np.isneginf(expected))
    np.testing.assert_allclose(found[np.isfinite(found)], expected[np.isfinite(expected)], rtol=0, atol=1e-9)
    assert np.isfinite(found).sum() == 13


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("bos", [True, False])
def test_padding_side_and_beginning_of_the_tokenizer(side, bos):
    model, tokenizer = llama(), byte_tokenizer(bos=bos, padding_side=side)
    np.testing.assert_allclose(answer_logits(model, tokenizer, QUESTIONS), plain(model, tokenizer, QUESTIONS), rtol=0, atol=1e-9)


def test_without_logits_and_with_them(monkeypatch):
    model, tokenizer = llama(), byte_tokenizer()
    without = answer_logits(model, tokenizer, QUESTIONS)
    assert scoring._head(model, scoring._inputs([scoring._Row((1, 2, 3, 4), [(3, 5, (0, 0))])], 0)) is not None
    monkeypatch.setattr(scoring, "_head", lambda *args: None)
    np.testing.assert_allclose(answer_logits(model, tokenizer, QUESTIONS), without, rtol=0, atol=1e-12)


def test_options_of_one_token_share_the_pass_of_their_prompt(monkeypatch):
    model, tokenizer, rows = llama(), byte_tokenizer(), []
    monkeypatch.setattr(scoring, "_inputs", lambda part, pad, made=scoring._inputs: rows.append(len(part)) or made(part, pad))
    answer_logits(model, tokenizer, [QUESTIONS[1]])
    assert set(rows) == {1}


@pytest.mark.parametrize("length_normalisation", ["tokens", "characters"])
def test_length_normalisation(length_normalisation):
    model, tokenizer = llama(), byte_tokenizer()
    found = answer_logits(model, tokenizer, QUESTIONS, length_normalisation=length_normalisation)
    whole = plain(model, tokenizer, QUESTIONS)
    for i, question in enumerate(QUESTIONS):
        for k, option in enumerate(question["options"]):
            joined = "".join(continuation(question["prompt"], option, " "))
            tokens = len(tokenizer(joined)["input_ids"]) - len(tokenizer(question["prompt"].rstrip())["input_ids"])
            size = tokens if length_normalisation == "tokens" else len(option.strip())
            assert found[i, k] == pytest.approx(whole[i, k] / size, abs=1e-9)


def test_probability_of_all_options_together():
    scores = option_scores(llama(), byte_tokenizer(), QUESTIONS[:2])
    whole = plain(llama(), byte_tokenizer(), QUESTIONS[:2])
    assert scores.mass == pytest.approx(np.exp(whole).sum(1).mean(), rel=1e-9)


def test_every_metric_takes_them():
    logits = hf_ls.answer_logits(llama(sharpness=40.0), byte_tokenizer(), QUESTIONS)
    labels = [question["answer"] for question in QUESTIONS]
    p = np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))
    stats = PredictionStatistics.from_logits(logits, labels)
    np.testing.assert_allclose(stats.nll, -np.log(p[np.arange(5), labels]), rtol=0, atol=1e-12)
    np.testing.assert_allclose(stats.brier, ((p - np.eye(4)[labels]) ** 2).sum(1), rtol=0, atol=1e-12)
    report = hf_ls.calibration_report(logits=logits, labels=labels)
    assert report.rows[0].value("nll") == pytest.approx(stats.nll.mean())


def test_a_long_prompt_loses_its_beginning_alike_for_all_options(caplog):
    model, tokenizer = llama(), byte_tokenizer()
    asked = [{"prompt": "abcdefghij" * 3, "options": ["yes", "four"]}]
    with caplog.at_level(logging.WARNING):
        found = answer_logits(model, tokenizer, asked, max_length=20)
    assert "1 of 1 prompts lose their beginning" in caplog.text
    # " yes" is 1 token and " four" 5: 16 tokens are left for the prompt, the first of the text among them.
    prompt = tokenizer(asked[0]["prompt"])["input_ids"]
    kept = [prompt[0], *prompt[-15:]]
    for k, option in enumerate((" yes", " four")):
        tail = tokenizer(option, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            log_p = model(input_ids=torch.tensor([[*kept, *tail]])).logits[0].log_softmax(-1)
        assert found[0, k] == pytest.approx(sum(float(log_p[15 + t, token]) for t, token in enumerate(tail)), abs=1e-9)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "  ", "options": ["a", "b"]}, "expected a prompt"),
        ({"prompt": "Q:", "options": ["a"]}, "expected 2 options or more"),
        ({"prompt": "Q:", "options": ["a", " "]}, "got option 1 empty"),
        ({"prompt": "Q:", "options": ["a", "a "]}, "got 'a' twice"),
        ({"prompt": "Q:", "options": ["a", "b"], "answer": 2}, "expected an answer from 0 to 1"),
        ({"prompt": "Q:", "options": ["a", "b"], "answer": "a"}, "expected answer as the place"),
        ({"prompt": "Q:", "options": "ab"}, "expected a text as prompt and a list of texts"),
        ({"question": "Q:", "options": ["a", "b"]}, "expected a question as"),
    ],
)
def test_what_is_no_question(row, said):
    with pytest.raises((ValueError, TypeError), match=said):
        answer_logits(llama(), byte_tokenizer(), [row])


def test_a_token_over_the_boundary_is_refused():
    tokenizer = byte_tokenizer(merges=[MERGES[0], (":", "Ġy"), *MERGES[1:]], over_blanks=True)
    with pytest.raises(ValueError, match=r"got others where 'Q:' meets ' yes'.*end the prompt with a sign"):
        answer_logits(llama(), tokenizer, [{"prompt": "Q:", "options": ["yes", "no"]}])


def test_options_with_the_same_tokens_are_refused(tmp_path):
    save_tokenizer(tmp_path)
    words = tf.AutoTokenizer.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected options with different tokens"):
        answer_logits(llama(), words, [{"prompt": "w1", "options": ["yes", "no"]}])


@pytest.mark.parametrize("model", [tiny_bert, tiny_t5])
def test_other_models_are_refused(model):
    with pytest.raises(ValueError, match="expected a causal language model"):
        answer_logits(model(), byte_tokenizer(), QUESTIONS)


def test_an_option_beyond_the_limit_is_refused():
    with pytest.raises(ValueError, match="expected options within max_length=4"):
        answer_logits(llama(), byte_tokenizer(), QUESTIONS, max_length=4)


def test_training_mode_and_a_question_of_ones_own_stay_as_they_are():
    model, question = neo(), Question("Q:", ("yes", "no"))
    answer_logits(model, byte_tokenizer(), [question])
    assert model.training and question == Question("Q:", ("yes", "no"))
