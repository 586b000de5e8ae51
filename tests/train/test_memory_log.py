import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ARCHITECTURES, close, tiny_model, tokens
from PIL import Image
from recipes import CHECKPOINTS, debug_images_run, debug_run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from train import image_classification, language_model
from train.memory_log import memory_numbers, read


@pytest.mark.parametrize("layers", [1, 2])
def test_the_numbers_are_those_of_the_cell(layers):
    model = tiny_model(num_hidden_layers=layers)
    text = tokens(3, 9)
    recalls, before, traces = read(model, {"input_ids": text})
    numbers = memory_numbers(model, recalls, before, traces)
    output = model(text, output_recall=True, output_traces=True)
    for layer in range(layers):
        recall = output.recall[layer]
        close(recalls[layer], recall)
        close(traces[layer], output.traces[layer])
        entropy = -(recall * recall.log()).sum(-1).mean()
        mean = recall.mean((0, 1))
        assert numbers[f"memory_{layer}_recall_entropy"] == pytest.approx(entropy.item())
        assert numbers[f"memory_{layer}_slots_recalled"] == pytest.approx(entropy.exp().item())
        assert numbers[f"memory_{layer}_slots_in_use"] == pytest.approx((-(mean * mean.log()).sum()).exp().item())
        norm = output.traces[layer].square().sum((1, 2)).sqrt().mean().item()
        assert numbers[f"memory_{layer}_trace_norm"] == pytest.approx(norm)

        # What the last step recalls is (M + s A) weighted: the part that M gives and the part that A gives.
        cell, weights = model.model.layers[layer].cell, recall[:, -1]
        bank = (weights @ cell.memory_bank).norm(dim=-1)
        trace = model(text[:, :-1], output_traces=True).traces[layer]
        from_trace = (weights[:, :, None] * trace * model.config.trace_scale).sum(1).norm(dim=-1)
        share = (from_trace / (bank + from_trace)).mean().item()
        assert numbers[f"memory_{layer}_trace_share"] == pytest.approx(share)
        assert numbers[f"memory_{layer}_bank_share"] == pytest.approx(1 - share)


@pytest.mark.parametrize("architecture", ["mixer", "hybrid"])
def test_the_numbers_of_a_mixer_are_means_over_its_heads(architecture):
    model, text = tiny_model(**ARCHITECTURES[architecture]), tokens(3, 9)
    numbers = memory_numbers(model, *read(model, {"input_ids": text}))
    output = model(text, output_recall=True, output_traces=True)
    recall, trace = output.recall[0], output.traces[0]
    entropy = -(recall * recall.log()).sum(-1).mean((0, 1))
    mean = recall.mean((0, 1))
    assert numbers["memory_0_recall_entropy"] == pytest.approx(entropy.mean().item())
    assert numbers["memory_0_slots_in_use"] == pytest.approx((-(mean * mean.log()).sum(-1)).exp().mean().item())
    assert numbers["memory_0_trace_norm"] == pytest.approx(trace.square().sum((2, 3)).sqrt().mean().item())
    layers = {"mixer": {0, 1}, "hybrid": {0, 2}}[architecture]  # attention has no memory
    assert {int(name.split("_")[1]) for name in numbers} == layers

    # Where the bank holds ones and zeros are written, the recalled memory is the bank's share.
    mixer = model.model.layers[0].mixer
    mixer.bank_values.data.fill_(1)
    mixer.v_proj.weight.data.zero_()
    recalled = []
    mixer.output_norm.register_forward_pre_hook(lambda _, inputs: recalled.append(inputs[0]))
    model(text)
    assert numbers["memory_0_bank_share"] == pytest.approx(recalled[0][:, -1].mean().item())
    assert numbers["memory_0_trace_share"] == pytest.approx(1 - numbers["memory_0_bank_share"])


@pytest.mark.parametrize(("architecture", "layers"), [("mixer", {0, 1}), ("hybrid", {0}), ("transformer", set())])
def test_layers_with_a_memory_are_logged_and_drawn(architecture, layers, tmp_path):
    options = [*CHECKPOINTS, "--architecture", architecture, "--memory_steps", "4", "--memory_plot_steps", "8"]
    trainer, _ = language_model.build_trainer(*debug_run(tmp_path, *options))
    trainer.train()
    logged = {name for entry in trainer.state.log_history for name in entry if name.startswith("memory_")}
    assert {int(name.split("_")[1]) for name in logged} == layers
    assert (tmp_path / "memory" / "step-000008.png").exists() == bool(layers)


def test_reading_leaves_the_model_as_it_was():
    model = tiny_model(hidden_dropout=0.5).train()
    state = torch.get_rng_state()
    read(model, {"input_ids": tokens(2, 5)})
    assert model.training
    tokens(2, 5)
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    tokens(2, 5), tokens(2, 5)
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("recipe", ["text", "images", "images with places"])
def test_the_memory_is_logged_and_drawn_while_training_goes_on(recipe, tmp_path):
    options = [*CHECKPOINTS, "--memory_steps", "2", "--memory_plot_steps", "4"]
    if recipe == "text":
        language_model.run(*debug_run(tmp_path, *options))
    else:
        places = ["--position_embedding_size", "4"] if recipe == "images with places" else []
        image_classification.run(*debug_images_run(tmp_path, *options, *places))
    history = json.loads(Path(tmp_path, "trainer_state.json").read_text())["log_history"]
    entries = [entry for entry in history if "memory_0_recall_entropy" in entry]
    assert [entry["step"] for entry in entries] == [2, 4, 6, 8]
    assert all(
        1 <= entry["memory_0_slots_recalled"] <= entry["memory_0_slots_in_use"] + 1e-6 <= 8.001 for entry in entries
    )
    assert entries[0]["memory_0_trace_norm"] != entries[-1]["memory_0_trace_norm"]
    pictures = sorted(path.name for path in (tmp_path / "memory").iterdir())
    assert pictures == ["step-000004.png", "step-000008.png"]
    assert np.asarray(Image.open(tmp_path / "memory" / pictures[0])).std() > 10


def test_few_validation_images_are_enough_for_the_log(tmp_path):
    trainer, splits = image_classification.build_trainer(
        *debug_images_run(tmp_path, *CHECKPOINTS, "--memory_steps", "8", "--validation_fraction", "0.03")
    )
    assert len(splits["validation"]) < 16
    trainer.train()
    assert any("memory_0_recall_entropy" in entry for entry in trainer.state.log_history)


def test_tensorboard_holds_the_loss_and_what_the_memory_does(tmp_path):
    options = ["--memory_steps", "2", "--report_to", "tensorboard"]
    trainer, _ = language_model.build_trainer(*debug_run(tmp_path, *CHECKPOINTS, *options))
    trainer.train()
    [file] = tmp_path.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file)).Reload()
    expected = {}
    for entry in trainer.state.log_history:
        for name in entry.keys() & {"loss", "memory_0_recall_entropy", "memory_1_trace_share"}:
            expected.setdefault(f"train/{name}", []).append((entry["step"], entry[name]))
    assert [len(expected[name]) for name in sorted(expected)] == [8, 4, 4]
    for name, values in expected.items():
        steps, numbers = zip(*values, strict=True)
        assert [event.step for event in events.Scalars(name)] == list(steps)
        assert [event.value for event in events.Scalars(name)] == pytest.approx(numbers)


def test_recording_changes_nothing(tmp_path):
    def losses(folder, *options):
        trainer, _ = language_model.build_trainer(*debug_run(tmp_path / folder, *CHECKPOINTS, *options))
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    assert losses("plain") == losses("recorded", "--memory_steps", "1")
