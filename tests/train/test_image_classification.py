import json
import os
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from huggingface_hub import ModelCard
from PIL import Image
from recipes import CHECKPOINTS, StopAt, debug_images_run, logged
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

from hf_engram.hub_folder import find_problems
from train.checkpoints import find_checkpoint
from train.image_classification import build_trainer, parse, run
from train.images import load_images
from train.models import ARCHITECTURES

COLOUR = ["--image_mean", "0.5", "0.5", "0.5", "--image_std", "0.3", "0.3", "0.3"]
CHANGED = ["--random_shift", "1", "--random_flip", "true"]


def test_a_run_learns_and_leaves_a_model_that_loads(tmp_path, capsys):
    results = run(*debug_images_run(tmp_path))
    assert results == json.loads((tmp_path / "all_results.json").read_text())
    assert results["test_accuracy"] > 0.8
    assert f"{results['test_accuracy']:.4f}" in capsys.readouterr().out

    model = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert results["parameters"] == model.num_parameters()
    assert results["state_bytes"] == 24 * 4 + 8 * 24 * 4
    assert model.config.use_cache is True
    _, names = load_images(debug_images_run(tmp_path)[1])
    assert list(model.config.id2label.values()) == names
    classify = pipeline(
        "image-classification", model=model, image_processor=AutoImageProcessor.from_pretrained(tmp_path)
    )
    test = load_dataset("tests/fixtures/shapes", split="test")
    right = [classify(row["image"])[0]["label"] == names[row["label"]] for row in test]
    assert sum(right) / len(right) == results["test_accuracy"]


@pytest.mark.parametrize("architecture", ["enn", "mixer", "transformer"])
def test_a_run_leaves_a_folder_that_is_ready_for_the_hub(architecture, tmp_path):
    licences = ["--data_license", "cc0-1.0", "--model_license", "mit"]
    arguments = debug_images_run(tmp_path, "--architecture", architecture, "--max_steps", "2", *licences)
    results = run(*arguments, command="python -m train.image_classification mine.yaml")
    assert find_problems(tmp_path) == []
    assert not list(tmp_path.glob("*.bin"))
    model = AutoModelForImageClassification.from_pretrained(tmp_path, trust_remote_code=True)
    processor = AutoImageProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    assert model(**processor(Image.new("L", (8, 8)), return_tensors="pt")).logits.shape == (1, 4)

    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "mit"
    scores = {(score.dataset_split, score.metric_type, score.metric_value) for score in card.data.eval_results}
    assert scores >= {(split, "accuracy", results[f"{split}_accuracy"]) for split in ("validation", "test")}
    stated = ["python -m train.image_classification mine.yaml", "| data | shapes; licence: cc0-1.0 |"]
    stated += [f"| parameters | {results['parameters']:,} |", "| `learning_rate` | 0.01 |", "| `random_shift` | 0 |"]
    stated += [f"| {split} | accuracy | {results[f'{split}_accuracy']:.4g} |" for split in ("validation", "test")]
    assert [text for text in stated if text not in card.text] == []
    assert ("An image being read" in card.text) == (architecture != "transformer")
    assert "tokens seen" not in card.text


def test_a_baselines_folder_has_neither_code_nor_card(tmp_path):
    run(*debug_images_run(tmp_path, "--architecture", "gru", "--max_steps", "2"))
    assert {path.name for path in tmp_path.iterdir()} >= {"model.safetensors", "preprocessor_config.json"}
    assert not [*tmp_path.glob("*.py"), *tmp_path.glob("README.md")]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["enn", "mixer", "lstm", "transformer"])
@pytest.mark.parametrize("stop", [4, 7])
def test_a_resumed_run_is_the_unbroken_run(architecture, stop, tmp_path):
    options = [*CHECKPOINTS, *CHANGED, "--architecture", architecture, "--classifier_dropout", "0.2"]
    options += ["--per_device_train_batch_size", "36"]

    def trained(folder, *more_options, callback=None):
        arguments = debug_images_run(folder, *options, *more_options)
        trainer, _ = build_trainer(*arguments)
        if callback is not None:
            trainer.add_callback(callback)
        trainer.train(find_checkpoint(arguments[2]))
        return trainer

    unbroken = trained(tmp_path / "unbroken")
    assert len(unbroken.get_train_dataloader()) == 6
    stopped = trained(tmp_path / "broken", callback=StopAt(stop))
    assert stopped.state.global_step == stop
    resumed = trained(tmp_path / "broken", "--resume_from_checkpoint", "true")
    assert logged(resumed.state.log_history) == logged(unbroken.state.log_history)
    for name, weight in unbroken.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name


def test_accumulated_batches_are_the_big_batch(tmp_path):
    def losses(folder, *batch):
        trainer, _ = build_trainer(*debug_images_run(tmp_path / folder, *CHECKPOINTS, *batch))
        trainer.train()
        return [loss for _, loss, _ in logged(trainer.state.log_history)]

    big = losses("big", "--per_device_train_batch_size", "24")
    small = losses("small", "--per_device_train_batch_size", "6", "--gradient_accumulation_steps", "4")
    assert small == pytest.approx(big, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_trains_in_bfloat16(architecture, tmp_path):
    options = ["--architecture", architecture, "--bf16", "true"]
    assert run(*debug_images_run(tmp_path, *options))["test_accuracy"] > 0.4


@pytest.mark.parametrize(
    ("fields", "more", "width"),
    [
        ({"image_sequence": "pixel"}, [], 1),
        ({"image_sequence": "pixel", "pixel_permutation_seed": 1}, [], 1),
        ({"image_sequence": "patch", "patch_size": 2}, [], 4),
        ({"image_sequence": "row", "image_size": 14, "num_channels": 3}, COLOUR, 42),
    ],
    ids=["pixels", "permuted", "patches", "colour"],
)
def test_images_are_read_in_other_orders_and_sizes(fields, more, width, tmp_path):
    options = [word for name, value in fields.items() for word in (f"--{name}", str(value))]
    run(*debug_images_run(tmp_path, "--max_steps", "2", *options, *more))
    config = AutoModelForImageClassification.from_pretrained(tmp_path).config
    assert fields.items() <= config.to_dict().items()
    assert config.embedding_size == width


def test_the_authors_protocol_halves_the_rate_stops_and_keeps_the_best(tmp_path, caplog):
    small = ["--image_size", "8", "--hidden_size", "16", "--memory_size", "8", "--num_train_epochs", "12"]
    options = ["--dataset_name", "tests/fixtures/shapes", "--output_dir", str(tmp_path), "--learning_rate", "0.05"]
    arguments = parse(["train/configs/paper_mnist_rows.yaml", *small, *options, "--disable_tqdm", "true"])
    with caplog.at_level("WARNING"):
        results = run(*arguments)
    assert "early stopping" not in caplog.text  # neither is it off nor does it watch the last evaluations
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    losses = {entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry}
    assert state["best_global_step"] == min(losses, key=losses.get)
    assert results["validation_loss"] == pytest.approx(min(losses.values()), rel=1e-4)
    config = AutoModelForImageClassification.from_pretrained(tmp_path).config
    assert (config.trace_scope, config.trace_clip, config.trace_noise) == ("batch", 0.1, 0.001)


def test_each_parameters_gradient_is_bounded_on_its_own(tmp_path):
    options = ["--clip_each_parameter", "0.01", "--max_grad_norm", "0", "--max_steps", "1", "--optim", "sgd"]
    options += ["--lr_scheduler_type", "constant", "--learning_rate", "1", "--weight_decay", "0", "--warmup_steps", "0"]
    trainer, _ = build_trainer(*debug_images_run(tmp_path, *options))
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    moved = [(weight - before[name]).norm().item() for name, weight in trainer.model.named_parameters()]
    assert all(0 < distance <= 0.0101 for distance in moved)
    assert sum(distance > 0.0099 for distance in moved) > 3


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize("config", ["mnist_rows", "mnist_permuted", "cifar10_rows"])
def test_thirty_steps_on_real_images_lower_the_loss(config, tmp_path):
    name = config.split("_")[0]
    folder = Path(os.environ["HF_ENGRAM_DATA"], name)
    options = ["--dataset_name", str(folder), "--max_steps", "30", "--logging_steps", "1", "--disable_tqdm", "true"]
    small = ["--per_device_train_batch_size", "32", "--eval_strategy", "no", "--save_strategy", "no"]
    arguments = parse([f"train/configs/{config}.yaml", "--output_dir", str(tmp_path), *options, *small])
    trainer, splits = build_trainer(*arguments)
    assert len(trainer.train_dataset) + len(splits["validation"]) == {"mnist": 60_000, "cifar10": 50_000}[name]
    trainer.train()
    losses = [loss for _, loss, _ in logged(trainer.state.log_history)]
    assert sum(losses[-5:]) / 5 < losses[0] - 0.1


@pytest.mark.data
@pytest.mark.slow
def test_all_784_pixels_in_a_random_order(tmp_path):
    folder = Path(os.environ["HF_ENGRAM_DATA"], "mnist")
    options = ["--dataset_name", str(folder), "--image_size", "28", "--max_steps", "2", "--logging_steps", "1"]
    small = ["--per_device_train_batch_size", "16", "--eval_strategy", "no", "--save_strategy", "no"]
    arguments = parse(["train/configs/mnist_permuted.yaml", "--output_dir", str(tmp_path), *options, *small])
    trainer, _ = build_trainer(*arguments)
    trainer.train()
    losses = [loss for _, loss, _ in logged(trainer.state.log_history)]
    assert losses == pytest.approx([2.3, 2.3], abs=0.5)
