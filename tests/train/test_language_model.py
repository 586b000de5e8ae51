import dataclasses
import itertools
import json
import math
import os
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import ModelCard
from recipes import CHECKPOINTS, StopAt, debug_run, logged
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_engram import EnnConfig
from hf_engram.hub_folder import find_problems
from train.checkpoints import find_checkpoint
from train.language_model import build_trainer, parse, run
from train.models import ARCHITECTURES, LanguageModelArguments
from train.streams import TextStreams, collate

DEBUG = "train/configs/debug.yaml"
OWN_OPTIONS = {"architecture", "parameters", "ablation", "count_embeddings", "raw_token_ids"}


def whole_text(text, rows=1):
    """One batch with the whole text, dealt to `rows` rows."""
    dataset = TextStreams(text, rows, segment_size=len(text.tokens), document_start=0)
    return collate([dataset[row] for row in range(rows)], padding=1)


def test_model_arguments_are_fields_of_the_config():
    fields = {field.name for field in dataclasses.fields(EnnConfig)}
    assert {field.name for field in dataclasses.fields(LanguageModelArguments)} - OWN_OPTIONS <= fields


def test_options_replace_the_values_of_the_file(tmp_path):
    model_args, data_args, training_args = parse(
        [DEBUG, "--learning_rate", "1e-3", "--hidden_size", "48", "--mode", "streams", "--no_residual"]
    )
    assert (training_args.learning_rate, model_args.hidden_size, data_args.mode) == (1e-3, 48, "streams")
    assert (model_args.residual, model_args.memory_size) == (False, 8)


def test_the_file_may_follow_the_options():
    assert parse(["--hidden_size", "48", DEBUG])[0].memory_size == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hidden_sise", "48"], "unrecognized arguments: --hidden_sise"),
        (["missing.yaml"], "No such file or directory: 'missing.yaml'"),
        ([DEBUG, "--mode", "shuffled"], "--mode: invalid choice: 'shuffled'"),
        ([DEBUG, "--train_files", "a.txt"], "give exactly one of them"),
        (["typo.yaml"], r"unknown options \['hidden_sise'\]; --help lists the known ones"),
        (["half.yaml"], "--block_size/--block-size: invalid int value: '2.5'"),
        (["list.yaml"], r"allowed: lines of `option: value`"),
        (["truth.yaml"], "save_strategy is False in truth.yaml, as YAML reads yes and no; allowed: a text, in quotes"),
        ([DEBUG, "--block_size", "None"], "invalid int value: 'None'"),
        (
            [DEBUG, "--raw_token_ids", "true", "--embedding_dropout", "0.1"],
            r"embedding_dropout is 0.1; allowed: 0, with",
        ),
        ([DEBUG, "--final_eval_streams", "0"], "final_eval_streams is 0; allowed: a positive integer"),
        (
            [DEBUG, "--early_stopping_patience", "2"],
            "load_best_model_at_end is False; allowed: early_stopping_patience",
        ),
        ([DEBUG, "--memory_steps", "0"], "memory_steps is 0; allowed: a positive integer, or None"),
    ],
)
def test_a_wrong_command_line_is_refused(arguments, message, tmp_path, monkeypatch, capsys):
    arguments = [str(Path(DEBUG).absolute()) if argument == DEBUG else argument for argument in arguments]
    monkeypatch.chdir(tmp_path)
    Path("typo.yaml").write_text("dataset_name: text\nhidden_sise: 48")
    Path("half.yaml").write_text("dataset_name: text\nblock_size: 2.5")
    Path("list.yaml").write_text("- hidden_size")
    Path("truth.yaml").write_text("dataset_name: text\nsave_strategy: no")
    with pytest.raises(SystemExit):
        parse(arguments)
    assert re.search(message, capsys.readouterr().err)


def test_a_file_may_give_one_of_a_list_alone_and_none(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(f"train_files: docs/*.md\nsliding_window: 8\ntoken_memory_size: null\noutput_dir: {tmp_path}")
    model_args, data_args, _ = parse([str(file), "--sliding_window", "None"])
    assert data_args.train_files == ["docs/*.md"]
    assert data_args.source().name == "docs/*.md"
    assert (model_args.sliding_window, model_args.token_memory_size) == (None, None)


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = capsys.readouterr().out
    for expected in ("python -m train.language_model train/configs/wikitext2.yaml", "--memory_size", "--dataset_name"):
        assert expected in text
    for field in dataclasses.fields(LanguageModelArguments):
        assert field.metadata["help"]


def test_a_run_learns_and_leaves_a_model_that_loads(tmp_path, capsys):
    results = run(*debug_run(tmp_path))

    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert model.config.use_cache is True
    assert model(**tokenizer("The old river", return_tensors="pt")).past_key_values is not None
    assert model.config.vocab_size == len(tokenizer) == 300
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id

    assert results == json.loads((tmp_path / "all_results.json").read_text())
    assert results["parameters"] == model.num_parameters()
    assert results["validation_perplexity"] < 150 < len(tokenizer)
    assert results["train_tokens_seen"] >= 30 * 8 * 25
    table = capsys.readouterr().out
    for split in ("validation", "test"):
        assert f"{results[f'{split}_word_perplexity']:.2f}" in table


@pytest.mark.parametrize("architecture", ["enn", "mixer", "hybrid", "transformer"])
def test_a_run_leaves_a_folder_that_is_ready_for_the_hub(architecture, tmp_path):
    told = ["--data_license", "cc0-1.0", "--model_license", "mit", "--detokenized", "true"]
    arguments = debug_run(tmp_path, "--architecture", architecture, *told)
    results = run(*arguments, command="python -m train.language_model mine.yaml")
    assert find_problems(tmp_path) == []
    assert not list(tmp_path.glob("*.bin"))
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "mit"
    assert {(score.dataset_split, score.metric_value) for score in card.data.eval_results} >= {
        (split, results[f"{split}_perplexity"]) for split in ("validation", "test")
    }
    rows = "| `learning_rate` | 0.01 |", "| `detokenized` | True |"
    for stated in ("python -m train.language_model mine.yaml", "cc0-1.0", *rows):
        assert stated in card.text
    assert ("](trace.png)" in card.text) == (architecture != "transformer")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert model.num_parameters() == results["parameters"]


def test_perplexity_is_that_of_one_pass_over_the_whole_text(tmp_path):
    trainer, texts = build_trainer(*debug_run(tmp_path))
    metrics = trainer.evaluate(texts["test"], metric_key_prefix="test")

    batch = whole_text(texts["test"].text)
    with torch.no_grad():
        logits = trainer.model.eval()(batch["input_ids"]).logits
    losses = F.cross_entropy(logits[0], batch["shift_labels"][0], reduction="none").double()
    lines = Path("tests/fixtures/articles/test.txt").read_text().splitlines()
    words = sum(len(line.split()) + 1 for line in lines)
    assert metrics["test_loss"] == pytest.approx(losses.mean().item(), rel=1e-6)
    assert metrics["test_perplexity"] == pytest.approx(losses.mean().exp().item(), rel=1e-5)
    assert metrics["test_word_perplexity"] == pytest.approx(math.exp(losses.sum().item() / words), rel=1e-5)


def test_losses_are_told_apart_by_how_much_was_read_since_the_memory_was_empty(tmp_path):
    results = run(*debug_run(tmp_path, "--block_size", "8"))
    places = (0, 2, 8, 16)
    assert [name for name in results if "from" in name] == [
        f"test_restarted_{kind}_from_{place}" for place in places for kind in ("loss", "tokens")
    ]

    # The same from blocks of four times the training length, read one by one.
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    _, texts = build_trainer(*debug_run(tmp_path / "again", "--block_size", "8"))
    text = texts["test"]
    blocks = TextStreams.blocks(text.text, 32, text.document_start)
    losses, positions = [], []
    for example in (blocks[index] for index in range(len(blocks))):
        inputs, targets, places_of = (torch.tensor(example[name]).long() for name in example)
        with torch.no_grad():
            logits = model(inputs[None], position_ids=places_of[None]).logits[0]
        losses.append(F.cross_entropy(logits, targets, reduction="none").double())
        positions.append(places_of)
    losses, positions = torch.cat(losses), torch.cat(positions)
    assert results["test_restarted_loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    for place, end in zip(places, (*places[1:], 10**9), strict=True):
        of_place = losses[(positions >= place) & (positions < end)]
        assert results[f"test_restarted_tokens_from_{place}"] == len(of_place) > 0
        assert results[f"test_restarted_loss_from_{place}"] == pytest.approx(of_place.mean().item(), rel=1e-5)


def test_attention_looks_no_further_back_than_in_training(tmp_path):
    options = "--architecture", "transformer", "--block_size", "24"
    for window, expected in ((), 24), (("--sliding_window", "40"), 40):
        trainer, _ = build_trainer(*debug_run(tmp_path, *options, *window))
        assert trainer.model.config.sliding_window == expected


def test_the_tokenizer_of_a_model_is_used_as_it_is(tmp_path):
    trainer, _ = build_trainer(*debug_run(tmp_path, "--tokenizer", "model_cards/enn-books"))
    books = AutoTokenizer.from_pretrained("model_cards/enn-books")
    assert trainer.model.config.vocab_size == len(books)
    assert trainer.processing_class.get_vocab() == books.get_vocab()


def test_a_tokenizer_without_padding_is_refused(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained("model_cards/enn-books")
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match=r"tokenizer is '.*tokenizer', which has no pad_token"):
        build_trainer(*debug_run(tmp_path, "--tokenizer", str(tmp_path / "tokenizer")))


def test_streams_train_on_from_the_state_of_the_last_batch(tmp_path):
    # At learning rate 0 the losses of the segments are those of one pass over every stream.
    options = ["--mode", "streams", "--learning_rate", "0", "--max_steps", "5", "--logging_steps", "1"]
    no_dropout = ["--hidden_dropout", "0", "--embedding_dropout", "0", "--eval_steps", "2"]
    trainer, _ = build_trainer(*debug_run(tmp_path, *options, *no_dropout))
    trainer.train()

    batch = whole_text(trainer.train_dataset.text, rows=8)
    with torch.no_grad():
        logits = trainer.model.eval()(batch["input_ids"]).logits
    losses = F.cross_entropy(logits.flatten(0, 1), batch["shift_labels"].flatten(), reduction="none")
    segments = losses.view(8, -1)[:, : 5 * 32].reshape(8, 5, 32)
    assert [loss for _, loss, _ in logged(trainer.state.log_history)] == pytest.approx(
        segments.mean((0, 2)).tolist(), rel=1e-5
    )


def test_a_stream_begins_every_epoch_with_an_empty_memory(tmp_path):
    options = ["--mode", "streams", "--learning_rate", "0", "--max_steps", "-1", "--num_train_epochs", "2"]
    no_dropout = ["--hidden_dropout", "0", "--embedding_dropout", "0", "--logging_steps", "1", "--eval_strategy", "no"]
    trainer, _ = build_trainer(*debug_run(tmp_path, *options, *no_dropout))
    trainer.train()
    losses = [loss for _, loss, _ in logged(trainer.state.log_history)]
    assert losses[: len(losses) // 2] == losses[len(losses) // 2 :]


MODES = {
    "blocks": ["--mode", "blocks"],
    "streams": ["--mode", "streams"],
    "gru": ["--mode", "streams", "--architecture", "gru"],
    "transformer": ["--mode", "streams", "--architecture", "transformer"],
    "mixer": ["--mode", "streams", "--architecture", "mixer"],
    "streaming": ["--streaming", "true", "--shuffle_buffer", "20"],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "stop"),
    [
        *itertools.product(("blocks", "streams"), (4, 6, 7)),
        *itertools.product(("gru", "transformer", "mixer", "streaming"), (7,)),
    ],
)
def test_a_resumed_run_is_the_unbroken_run(mode, stop, tmp_path):
    options = [*CHECKPOINTS, *MODES[mode], "--per_device_train_batch_size", "16"]

    def trained(folder, *more_options, callbacks=()):
        arguments = debug_run(folder, *options, *more_options)
        trainer, _ = build_trainer(*arguments, callbacks=callbacks)
        trainer.train(find_checkpoint(arguments[2]))
        return trainer

    unbroken = trained(tmp_path / "unbroken")
    if mode != "streaming":  # which has no end
        steps_per_epoch = len(unbroken.get_train_dataloader())
        assert steps_per_epoch == 6  # so that the runs stop inside, at the end of, and after the first epoch

    stopped = trained(tmp_path / "broken", callbacks=[StopAt(stop)])
    assert stopped.state.global_step == stop
    resumed = trained(tmp_path / "broken", "--resume_from_checkpoint", "true")
    assert logged(resumed.state.log_history) == logged(unbroken.state.log_history)
    assert resumed.state.num_input_tokens_seen == unbroken.state.num_input_tokens_seen
    for name, weight in unbroken.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name


def test_accumulated_blocks_are_the_big_batch(tmp_path):
    no_dropout = ["--hidden_dropout", "0", "--embedding_dropout", "0"]

    def losses(folder, *batch):
        trainer, _ = build_trainer(*debug_run(tmp_path / folder, *CHECKPOINTS, *no_dropout, *batch))
        trainer.train()
        return [loss for _, loss, _ in logged(trainer.state.log_history)]

    big = losses("big", "--per_device_train_batch_size", "8")
    small = losses("small", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "4")
    assert small == pytest.approx(big, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_trains_in_bfloat16_streams(architecture, tmp_path):
    options = ["--architecture", architecture, "--bf16", "true", "--mode", "streams", "--hidden_size", "24"]
    results = run(*debug_run(tmp_path, *options))
    assert results["validation_perplexity"] < 150 < 300


def test_raw_token_ids_replace_the_embeddings(tmp_path):
    options = ["--tokenizer", "words", "--raw_token_ids", "true", "--embedding_dropout", "0"]
    results = run(*debug_run(tmp_path, *options))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    table = model.get_input_embeddings().weight
    assert torch.equal(table[:, 0], torch.arange(len(table)).float())
    assert results["parameters"] == model.num_parameters() - len(table)


def test_states_are_not_carried_through_activation_checkpointing(tmp_path):
    with pytest.raises(ValueError, match="activation_checkpointing is True; allowed: False, with mode streams"):
        build_trainer(*debug_run(tmp_path, "--mode", "streams", "--activation_checkpointing", "true"))


def test_streaming_needs_a_number_of_steps(tmp_path):
    with pytest.raises(ValueError, match="max_steps is -1; allowed: a positive integer, with streaming"):
        run(*debug_run(tmp_path, "--streaming", "true", "--max_steps", "-1"))


def test_a_fresh_run_does_not_mix_with_an_old_one(tmp_path):
    arguments = debug_run(tmp_path, *CHECKPOINTS)
    with pytest.raises(ValueError, match=r"resume_from_checkpoint is true, but output_dir .* has no checkpoint"):
        run(*debug_run(tmp_path, *CHECKPOINTS, "--resume_from_checkpoint", "true"))
    run(*arguments)
    with pytest.raises(ValueError, match="holds checkpoints of another run"):
        run(*arguments)


def test_bank_norms_and_biases_have_no_weight_decay(tmp_path):
    trainer, _ = build_trainer(*debug_run(tmp_path, "--weight_decay", "0.1"))
    decayed, kept = trainer.create_optimizer().param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    assert all(names[parameter].endswith("weight") and parameter.ndim == 2 for parameter in decayed["params"])
    assert all(parameter.ndim == 1 or names[parameter].endswith("memory_bank") for parameter in kept["params"])
    assert len(decayed["params"]) + len(kept["params"]) == len(names)


@pytest.mark.data
@pytest.mark.slow
def test_twenty_steps_on_wikitext_2_lower_the_loss(tmp_path):
    folder = Path(os.environ["HF_ENGRAM_DATA"], "wikitext")
    options = ["--dataset_name", str(folder), "--max_steps", "20", "--logging_steps", "1", "--eval_strategy", "no"]
    arguments = parse(["train/configs/wikitext2.yaml", "--output_dir", str(tmp_path), "--hidden_size", "64", *options])
    trainer, _ = build_trainer(*arguments)
    trainer.train()
    losses = [loss for _, loss, _ in logged(trainer.state.log_history)]
    assert losses[0] == pytest.approx(math.log(trainer.model.config.vocab_size), abs=0.3)
    assert sum(losses[-5:]) / 5 < losses[0] - 0.5
