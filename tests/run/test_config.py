"""Settings: types, YAML traps, unknown keys, contradictions."""

from __future__ import annotations

import pytest
from places import ROOT

from hf_ls.common.errors import did_you_mean, one_sentence
from hf_ls.run.config import parse_config

BASE = ["--dataset_name", "snippets", "--report_to", "none", "--use_cpu", "true"]


def parse(tmp_path, text="", *argv):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return parse_config([*BASE, "--output_dir", str(tmp_path / "out"), "--config", str(path), *argv])


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_config_parses_and_shows_its_launch_line(path):
    config = parse_config(["--config", str(path), "--use_cpu", "true"])
    assert config.run.task in path.read_text()
    assert f"scripts/finetune.py --config configs/{path.name}" in path.read_text()


def test_trap_13_yaml_scalars_are_read_as_they_are_written(tmp_path):
    text = "learning_rate: 2e-5\nsave_strategy: no\nlabel_smoothing_factor: .1\nseed: 007\nbf16: false\nwarmup_steps: 0.1\ndata_seed: null\n"
    training = parse(tmp_path, text).training
    assert (training.learning_rate, training.save_strategy.value, training.label_smoothing_factor) == (2e-5, "no", 0.1)
    assert (training.seed, training.bf16, training.warmup_steps, training.data_seed) == (7, False, 0.1, None)


def test_trap_13_no_abbreviations(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'label_smoothing_factor'"):
        parse(tmp_path, "", "--label_smoothing_facto", "0.1")
    with pytest.raises(ValueError, match="expected known settings, got --label_smoothing"):
        parse(tmp_path, "", "--label_smoothing", "0.1")


@pytest.mark.parametrize("value", ["True", "true", "False"])
def test_trap_13_resume_is_last_or_a_path(tmp_path, value):
    with pytest.raises(ValueError, match="'last' or a checkpoint folder"):
        parse(tmp_path, "", "--resume_from_checkpoint", value)
    assert parse(tmp_path, "resume_from_checkpoint: last").training.resume_from_checkpoint == "last"


def test_command_line_wins_over_the_file(tmp_path):
    config = parse(
        tmp_path, "seed: 1\nsnippet_sources: [tweets, amazonReviewSnippets]\n", "--seed", "2", "--snippet_sources", "tweets"
    )
    assert (config.training.seed, config.data.snippet_sources) == (2, ["tweets"])
    assert (
        parse(tmp_path, "with_baseline: true\nlabel_smoothing_factor: 0.1", "--with_baseline", "false").run.with_baseline is False
    )


def test_null_on_the_command_line_takes_back_the_file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("dataset_name: snippets\nseed: 3\n")
    for null in (["--dataset_name", "null"], ["--dataset_name=null"]):
        config = parse_config(["--config", str(path), "--use_cpu", "true", "--report_to", "none", *null, "--train_file", "a.csv"])
        assert (config.data.dataset_name, config.data.train_file, config.training.seed) == (None, "a.csv", 3)


def test_mappings_become_json(tmp_path):
    config = parse(tmp_path, "model_config_overrides:\n  num_hidden_layers: 3\n  hidden_dropout_prob: 0.0\n")
    assert config.model.overrides == {"num_hidden_layers": 3, "hidden_dropout_prob": 0.0}
    assert parse(tmp_path, "lr_scheduler_kwargs: {num_cycles: 2}\n").training.lr_scheduler_kwargs == {"num_cycles": 2}


def test_negative_numbers_are_values(tmp_path):
    with pytest.raises(ValueError, match=r"0 <= epsilon < 1, got -0\.1"):
        parse(tmp_path, "label_smoothing_factor: -0.1")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("learning_rat: 1e-3", "did you mean 'learning_rate'"),
        ("help: 1", "expected known settings"),
        ("seed: 1\nseed: 2", "'seed' twice"),
        ("learning_rate: fast", "invalid float value: 'fast'"),
        ("seed: 1.5", "invalid int value"),
        ("bf16: maybe", "Truthy"),
        ("- seed", "`name: value`"),
        ("seed: [1", "valid YAML"),
        ("seed: !!python/object/apply:os.system ['true']", "tag"),
        ("seed: !exec x", "tag"),
        ("snippet_sources: [[a]]", "nested"),
        ("task: regression", "invalid choice"),
        ("peft: qlora", "invalid choice"),
        ("label_smoothing_factor: 1.0", "0 <= epsilon < 1"),
        ("label_smoothing_convention: half", "'all' or 'wrong'"),
        ("train_file: a.csv", "either dataset_name or train_file"),
        ("validation_fraction: 1.0", "0 < validation_fraction < 1"),
        ("max_train_samples: 0", "max_train_samples >= 1"),
        ("early_stopping_patience: 2", "load_best_model_at_end"),
        ("early_stopping_patience: 0", "early_stopping_patience >= 1"),
        ("with_baseline: true", "label_smoothing_factor > 0"),
        ("with_baseline: true\nlabel_smoothing_factor: 0.1\nresume_from_checkpoint: out/checkpoint-5", "use last"),
        ("metric_for_best_model: test_accuracy", "only ever reported on"),
        ("metric_for_best_model: eval_test_ece", "only ever reported on"),
        ("metric_for_best_model: ece\ngreater_is_better: true", "greater_is_better=False"),
        ("model_config_overrides: '{'", "as JSON"),
        ("model_config_overrides: '[1]'", "as a mapping"),
    ],
)
def test_wrong_settings_are_refused_with_a_remedy(tmp_path, text, match):
    with pytest.raises(ValueError, match=match):
        parse(tmp_path, text)


@pytest.mark.parametrize(
    ("argv", "match"),
    [
        (["--train_file", "a.csv", "--test_file", "a.csv"], "different files per split"),
        (["--validation_file", "a.csv"], "expected train_file"),
        ([], "either dataset_name or train_file"),
        (["--train_file", "a.csv", "--snippet_sources", "tweets"], "snippet_sources only"),
        (["--dataset_name", "snippets", "--output_dir"], "expected one argument"),
    ],
)
def test_wrong_data_settings_are_refused(tmp_path, argv, match):
    with pytest.raises(ValueError, match=match):
        parse_config(["--use_cpu", "true", "--output_dir", str(tmp_path), *argv])


def test_a_file_which_takes_back_all_it_says_is_as_if_it_said_nothing(tmp_path):
    (tmp_path / "c.yaml").write_text("seed: null\n", encoding="utf-8")
    with pytest.raises(ValueError, match="either dataset_name or train_file"):
        parse_config(["--config", str(tmp_path / "c.yaml")])


def test_missing_config_file(tmp_path):
    with pytest.raises(ValueError, match="no file at"):
        parse_config([*BASE, f"--config={tmp_path / 'none.yaml'}"])


def test_an_empty_file_leaves_the_defaults(tmp_path):
    assert parse(tmp_path, "# nothing\n").training.label_smoothing_factor == 0.0


def test_a_baseline_beside_an_objective_needs_no_epsilon(tmp_path):
    config = parse(
        tmp_path, "with_baseline: true\nlabel_smoothing_objective: focal\nlabel_smoothing_objective_params: {gamma: 3}\n"
    )
    assert config.training.label_smoothing_objective_params == '{"gamma": 3}'
    with pytest.raises(ValueError, match="gamm"):
        parse(tmp_path, "label_smoothing_objective: focal\nlabel_smoothing_objective_params: {gamm: 3}\n")


# Each of them is refused by transformers, accelerate, torch or argparse, or would end the run after its start.
WRONG = """
--load_best_model_at_end true --eval_strategy epoch --save_strategy steps
--load_best_model_at_end true --eval_strategy steps --eval_steps 30 --save_steps 50
--eval_strategy steps --eval_steps 0 --logging_steps 0
--warmup_steps -1
--warmup_steps nan
--logging_steps 1.5
--logging_steps inf
--save_steps 2.5
--optim adamW
--optim adafactor --optim_args x
--lr_scheduler_type lineer
--lr_scheduler_kwargs a=b
--lr_scheduler_kwargs {
--eval_strategy epochs
--fp16 true --bf16 true
--train_sampling_strategy grouped
--fsdp full_shards
--fsdp full_shard --fsdp_config nofile.json
--hub_strategy al
--dataloader_prefetch_factor 2
--dataloader_prefetch_factor 0 --dataloader_num_workers 1
--dataloader_num_workers -1
--deepspeed ds.json
--accelerator_config nofile.json
--accelerator_config {
--accelerator_config {"a":1}
--torch_empty_cache_steps 0
--neftune_noise_alpha x
--parallelism_config x
--max_length=--
--generation_config nofile.json
--debug x
--report_to wandbb
--log_level loud
--liger_kernel_config x
--gradient_checkpointing_kwargs {
--learning_rate nan
--learning_rate -1e-3
--weight_decay inf
--adam_beta1 1
--adam_beta2 -0.1
--seed -1
--seed 4294967296
--data_seed -3
--per_device_train_batch_size 0
--per_device_eval_batch_size -2
--gradient_accumulation_steps 0
--num_train_epochs -1
--eval_accumulation_steps 0
--save_total_limit 0
--peft lora --lora_r 0
--peft lora --lora_dropout 1
--mixup_alpha -1
--distillation_teacher a --distillation_alpha 2
--label_smoothing_factor nan
--label_smoothing_objective focl
--label_smoothing_objective focal --label_smoothing_objective_params {"gama":1}
--torch_compile_backend nonsense --torch_compile true
--ddp_backend carrier_pigeon
--local_rank x
--output_dir
""".strip().splitlines()


@pytest.mark.parametrize("argv", WRONG)
def test_whatever_refuses_a_setting_the_user_reads_one_sentence(tmp_path, monkeypatch, argv):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as caught:
        parse_config([*BASE, *argv.split()])
    sentence = one_sentence(caught.value)
    assert (
        sentence is not None
        and sentence.startswith("expected ")
        and "\n" not in sentence
        and ", got" in sentence
        and "; " in sentence
    )


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("--epsilon", "label_smoothing_factor"), ("--lr", "learning_rate"), ("--epochs", "num_train_epochs"),
        ("--batch_size", "per_device_train_batch_size"), ("--batch-size=4", "per_device_train_batch_size"), ("--use_peft", "peft"),
        ("--model", "model_name_or_path"), ("--dataset", "dataset_name"), ("--random_seed", "seed"), ("--sed", "seed"),
        ("--max_source_length", "max_length"), ("--metric_name", "metric_for_best_model"), ("--dtype", "bf16"),
        ("--text_column_names", "text_column"), ("--validation_split_percentage", "validation_fraction"),
        ("--label_list", None), ("--calibration_bins", None), ("--zzz", None),
    ],
)  # fmt: skip
def test_an_unknown_setting_is_answered_with_the_one_which_is_meant(tmp_path, asked, meant):
    with pytest.raises(ValueError, match="expected known settings") as caught:
        parse(tmp_path, "", asked, "0.1")
    assert ("did you mean" in str(caught.value)) == (meant is not None)
    assert meant is None or f"did you mean {meant!r}?" in str(caught.value)


def test_only_what_exists_is_suggested():
    assert did_you_mean("epsilon", ["seed", "adam_epsilon_of_mine"], "choose one") == "choose one"
    assert did_you_mean("smECE", ["ece", "smooth_ece"]) == "did you mean 'smooth_ece'?"


@pytest.mark.parametrize(("task", "known", "unknown"), [
    ("text-classification", "accuracy", "f1"), ("text-classification", "eval_nll", "perplexity"),

    ("causal-lm --source_column a --target_column b", "perplexity", "exact_match"),
    ("seq2seq --source_column a --target_column b", "eos_ece", "chrf"),
    ("seq2seq --source_column a --target_column b --predict_with_generate", "exact_match", "bleu"),
    ("token-classification", "perplexity", "eos_ece"),
])  # fmt: skip
def test_the_best_model_is_chosen_by_a_metric_which_evaluations_give(tmp_path, task, known, unknown):
    argv = ["--dataset_name", "some/set", "--task", *task.split(), "--metric_for_best_model"]
    assert parse(tmp_path, "", *argv, known).training.metric_for_best_model == known
    with pytest.raises(ValueError, match=f"expected metric_for_best_model among .* got '{unknown}'"):
        parse(tmp_path, "", *argv, unknown)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--license Apache_2.0!", "as the Hub names it"),
        ("--language english_us", "codes such as en"),
        ("--dataset_id a/b/c", "use dataset_title"),
        ("--dataset_title=\x20", "got blanks"),
    ],
)
def test_what_the_hub_would_refuse_in_a_card_is_refused_before_the_training(line, message):
    with pytest.raises(ValueError, match=message):
        parse_config(["--dataset_name", "snippets", *(part.replace("\\x20", " ") for part in line.split())])


def test_what_the_user_says_of_the_card_is_kept():
    card = parse_config(["--dataset_name", "snippets", "--license", "mit", "--language", "en", "de"]).card
    assert (card.hub.license, card.hub.language, card.dataset_id) == ("mit", ["en", "de"], None)
