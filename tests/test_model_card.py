"""Model cards: filled from the files of a run, and from nothing else."""

import json
import re
import shutil
from importlib import resources
from pathlib import Path

import pytest
import torch
from helpers import ARCHITECTURES, tiny_model
from huggingface_hub import ModelCard
from PIL import Image, ImageDraw
from safetensors import safe_open
from transformers import AutoTokenizer, TrainingArguments

from hf_engram import (
    EnnForCausalLM,
    EnnForImageClassification,
    EnnForSequenceClassification,
    EnnImageProcessor,
    EnnModel,
)
from hf_engram.hub import DataSource, TrainingRun, save_for_hub, write_card

BOOKS = Path("model_cards/enn-books")
SHIPPED = {
    "enn-books": "It was",
    "enn-wikitext103-mixer": "It was",
    "enn-mnist-rows": "1",
}  # and what the cards' code prints
shipped = pytest.mark.parametrize("folder", [Path("model_cards", name) for name in SHIPPED], ids=SHIPPED)
RESULTS = {
    "train_tokens_seen": 7_654_321,
    "train_runtime": 1234.5678,
    "train_loss": 4.56789,
    "validation_loss": 3.21987,
    "validation_perplexity": 25.0248,
    "validation_word_perplexity": 23456.789,
    "validation_runtime": 8.7654,
    "test_accuracy": 0.98765,
}
LOG = [
    entry
    for step in range(10, 260, 10)
    for entry in (
        {"step": step, "epoch": step / 130, "loss": 7 - step / 77},
        {"step": step, "epoch": step / 130, "eval_loss": 6.9 - step / 79},
    )
]


@pytest.fixture
def folder(tmp_path):
    """A saved language model with all files of a run."""
    folder = tmp_path / "a-model"
    folder.mkdir()
    (folder / "all_results.json").write_text(json.dumps(RESULTS))
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": LOG}))
    arguments = TrainingArguments(
        str(tmp_path / "run"), learning_rate=0.00317, per_device_train_batch_size=27, seed=941
    )
    run = TrainingRun.on_this_machine(
        arguments,
        name="someone/a-model",
        description="A model for this test.",
        license="mit",
        language="en",
        data=[DataSource("WikiText-2", "cc-by-sa-3.0", "Salesforce/wikitext", "wikitext-2-raw-v1")],
        command="python -m train.language_model train/configs/wikitext2.yaml",
        arguments={"block_size": 119},
    )
    model = tiny_model(dtype=torch.float32, vocab_size=4096, hebbian_lr=0.0371)
    return save_for_hub(model, folder, AutoTokenizer.from_pretrained(BOOKS), run)


def numbers(text):
    """All numbers in a text, as they are written."""
    return re.findall(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?", text)


def leaves(value):
    """All numbers in what a JSON file holds, those inside texts included."""
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in leaves(item)]
    if isinstance(value, list):
        return [leaf for item in value for leaf in leaves(item)]
    if isinstance(value, str):
        return [float(number.replace(",", "")) for number in numbers(value)]
    return [] if value is None or isinstance(value, bool) else [float(value)]


def numbers_of_the_run(folder):
    known = [leaf for path in folder.glob("*.json") for leaf in leaves(json.loads(path.read_text()))]
    with safe_open(folder / "model.safetensors", "pt") as weights:
        known.append(float(sum(weights.get_tensor(name).numel() for name in weights.keys())))  # noqa: SIM118
    template = resources.files("hf_engram").joinpath("templates/model_card.md.jinja").read_text()
    return known + [float(number.replace(",", "")) for number in numbers(template)]


def unfounded(card, known):
    """The numbers in `card` that are none of `known`, to the digits that are written."""

    def is_known(written):
        digits = len(re.sub(r"e.*|\D", "", written).lstrip("0")) or 1
        value = float(written.replace(",", ""))
        return any(value == number or f"{value:.{digits}g}" == f"{number:.{digits}g}" for number in known)

    return [number for number in numbers(card) if not is_known(number)]


def test_every_number_in_a_card_is_in_the_files_of_the_run(folder):
    card, known = (folder / "README.md").read_text(), numbers_of_the_run(folder)
    for stated in ("7,654,321", "1,235 s", "23,457", "25.02", "0.9877", "0.00317", "119", "941", "0.0371"):
        assert stated in card
    assert unfounded(card, known) == []
    assert unfounded(card.replace("23,457", "23,458"), known) == ["23,458"]


def test_card_follows_the_files(folder):
    (folder / "all_results.json").write_text(json.dumps({**RESULTS, "validation_perplexity": 17.125}))
    write_card(folder)
    card = (folder / "README.md").read_text()
    assert "| validation | perplexity per token | 17.12 |" in card
    assert "25.02" not in card


def test_log_is_shown_from_first_to_last_step(folder):
    card = (folder / "README.md").read_text()
    rows = re.findall(r"^\| (\d+) \| [\d.]+ \| ([\d.]+) \| ([\d.]+) \|$", card, re.MULTILINE)
    assert len(rows) == 10
    assert rows[0] == ("10", "6.87", "6.773")
    assert rows[-1][0] == "250"


def test_metadata_is_what_the_hub_reads(folder):
    data = ModelCard.load(folder / "README.md").data
    assert data.license == "mit"
    assert data.language == "en"
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-generation"
    assert data.datasets == ["Salesforce/wikitext"]
    assert data.model_name == "a-model"
    scores = {(score.dataset_split, score.metric_name): score.metric_value for score in data.eval_results}
    assert scores == {
        ("validation", "loss"): 3.21987,
        ("validation", "perplexity per token"): 25.0248,
        ("validation", "perplexity per word"): 23456.789,
        ("test", "accuracy"): 0.98765,
    }
    assert {score.dataset_type for score in data.eval_results} == {"Salesforce/wikitext"}
    assert {score.dataset_config for score in data.eval_results} == {"wikitext-2-raw-v1"}


def test_what_is_not_known_is_not_stated(folder):
    for name in ("all_results.json", "trainer_state.json", "run.json"):
        (folder / name).unlink()
    write_card(folder)
    card = ModelCard.load(folder / "README.md")
    assert card.data.eval_results is None
    assert card.data.license is None
    for line in (
        "| data | not recorded |",
        "| tokens seen | not recorded |",
        "| time | not recorded |",
        "Not measured.",
    ):
        assert line in card.text
    assert "The weights' licence is not stated." in card.text
    assert unfounded(str(card), numbers_of_the_run(folder)) == []


def test_card_says_how_far_rows_see_each_other(folder):
    assert "no other row of a batch\nchanges it" in (folder / "README.md").read_text()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"trace_scope": "batch"}))
    write_card(folder)
    assert "Rows of a batch write into each other's traces" in (folder / "README.md").read_text()


TRANSFORMER = {"layer_types": ["sliding_attention"], "num_attention_heads": 2, "sliding_window": 5}
CELL = ("`hebbian_lr`", "Every write of a cell")
MIXER = (
    "`conv_kernel`",
    "each of their 2 heads has a bank and a trace of\nits own",
    "every head has a time scale of its own",
)
ATTENTION = ("see the last 5 steps",)
MEMORY = ("`memory_size`", "hebbian-memory", "an explicit\nmemory", "The trace belongs to one sequence", "A slot holds")
LAYERS = {
    "cells": (
        ARCHITECTURES["stacked"],
        (*MEMORY, *CELL),
        (*MIXER, *ATTENTION, "`layer_types`", "`num_attention_heads`"),
    ),
    "mixers": (ARCHITECTURES["mixer"], (*MEMORY, *MIXER, "| engram_mixer, engram_mixer |"), (*CELL, *ATTENTION)),
    "token_memory": (ARCHITECTURES["token_memory"], ("token memory of 6 slots", "`token_memory_size` | 6 |"), ()),
    "hybrid": (ARCHITECTURES["hybrid"], (*MEMORY, *CELL, *MIXER, *ATTENTION, "state grows with the sequence"), ()),
    "transformer": (
        TRANSFORMER,
        (*ATTENTION, "A Transformer", "`num_attention_heads` | 2 |"),
        (*MEMORY, *CELL, *MIXER),
    ),
}


@pytest.mark.parametrize(("fields", "said", "not_said"), LAYERS.values(), ids=LAYERS)
def test_card_says_what_is_true_of_the_layers(tmp_path, fields, said, not_said):
    model = tiny_model(dtype=torch.float32, vocab_size=4096, **fields)
    save_for_hub(model, tmp_path, AutoTokenizer.from_pretrained(BOOKS))
    card = (tmp_path / "README.md").read_text()
    assert [text for text in said if text not in card] == []
    assert [text for text in not_said if text in card] == []


def test_mixers_of_different_rows_are_apart_whatever_the_scope_of_cells(tmp_path):
    fields = {"trace_scope": "batch", **ARCHITECTURES["mixer"]}
    save_for_hub(tiny_model(vocab_size=4096, **fields), tmp_path, AutoTokenizer.from_pretrained(BOOKS))
    assert "Rows of a batch write" not in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("model_class", "fields"),
    [
        (EnnForCausalLM, {"vocab_size": 4096}),
        (EnnForCausalLM, {"vocab_size": 4096, **ARCHITECTURES["mixer"]}),
        (EnnForImageClassification, {}),
    ],
    ids=["text", "text read by mixers", "image"],
)
def test_card_shows_what_the_memory_did_with_an_example(tmp_path, model_class, fields):
    model = tiny_model(model_class, dtype=torch.float32, **fields)
    if model_class is EnnForCausalLM:
        processor = AutoTokenizer.from_pretrained(BOOKS)
        example = processor("It was the best of times", return_tensors="pt")
    else:
        processor = EnnImageProcessor(num_channels=3, size={"height": 8, "width": 8})
        example = processor(Image.new("RGB", (20, 30)), return_tensors="pt")
    save_for_hub(model.train(), tmp_path, processor, example=example)
    assert model.training
    read = "An image" if model_class is EnnForImageClassification else "A text"
    assert f"![{read} being read: " in (tmp_path / "README.md").read_text()
    with Image.open(tmp_path / "trace.png") as picture:
        assert min(picture.size) > 200
    save_for_hub(model, tmp_path, processor)
    assert "](trace.png)" in (tmp_path / "README.md").read_text()


def test_unknown_fields_of_a_run_are_named(folder):
    (folder / "run.json").write_text(json.dumps({"licence": "mit"}))
    with pytest.raises(ValueError, match=r"run.json has the unknown fields \['licence'\]; allowed: \['name', "):
        write_card(folder)


EXAMPLES = {
    "backbone": (EnnModel, {"vocab_size": 4096}),
    "features": (EnnModel, {"vocab_size": None}),
    "text": (EnnForCausalLM, {"vocab_size": 4096}),
    "mixer": (EnnForCausalLM, {"vocab_size": 4096, **ARCHITECTURES["mixer"]}),
    "transformer": (EnnForCausalLM, {"vocab_size": 4096, **TRANSFORMER}),
    "text_classes": (EnnForSequenceClassification, {"vocab_size": 4096}),
    "feature_classes": (EnnForSequenceClassification, {"vocab_size": None}),
    "images": (EnnForImageClassification, {}),
}


@pytest.mark.parametrize(("model_class", "fields"), EXAMPLES.values(), ids=EXAMPLES)
def test_example_of_a_card_runs(tmp_path, monkeypatch, capsys, model_class, fields):
    model, processor = tiny_model(model_class, dtype=torch.float32, **fields), None
    if model_class is EnnForImageClassification:
        processor = EnnImageProcessor(num_channels=3, size={"height": 8, "width": 8})
        Image.new("RGB", (20, 30)).save(tmp_path / "image.png")
    elif fields["vocab_size"]:
        processor = AutoTokenizer.from_pretrained(BOOKS)
    monkeypatch.chdir(tmp_path)
    save_for_hub(model, "model", processor)
    code = example(Path("model/README.md"))
    assert 'from_pretrained("model", trust_remote_code=True)' in code
    assert len(code.splitlines()) <= 10
    exec(code, {})
    assert capsys.readouterr().out.strip()


def example(card):
    """The code that a card shows."""
    return re.search(r"^```python\n(.*?)^```", card.read_text(), re.MULTILINE | re.DOTALL)[1]


@shipped
def test_folder_without_code_is_opened_with_the_package(folder, capsys, tmp_path, monkeypatch):
    code = example(folder / "README.md")
    assert code.startswith("import hf_engram")
    assert "trust_remote_code" not in code
    (tmp_path / "model_cards").symlink_to(Path("model_cards").resolve())
    one = Image.new("L", (28, 28))
    ImageDraw.Draw(one).line((14, 5, 14, 23), fill=255, width=3)
    one.save(tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert SHIPPED[folder.name] in capsys.readouterr().out


@shipped
def test_card_of_a_shipped_checkpoint_is_what_its_files_say(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / folder.name)
    (copy / "README.md").unlink()
    write_card(copy)
    card = (folder / "README.md").read_text()
    assert (copy / "README.md").read_text() == card
    assert unfounded(card, numbers_of_the_run(folder)) == []


def test_options_that_are_zero_say_something(tmp_path):
    arguments = TrainingRun.on_this_machine(TrainingArguments(str(tmp_path), seed=0, max_grad_norm=0.0)).arguments
    assert (arguments["seed"], arguments["max_grad_norm"]) == (0, 0.0)
    assert "max_steps" not in arguments
