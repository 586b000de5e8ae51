"""A run may end anywhere: the next one goes on from the last whole checkpoint, to the losses of an unbroken run."""

import json
import signal
import subprocess
import sys

import pytest
import torch
from recipes import CHECKPOINTS, DEBUG_RUN, command, debug_images_run, debug_run, environment, logged

from train import image_classification, language_model
from train.checkpoints import find_checkpoint
from train.trainer import ImageTrainer

EVERY_SECOND = [*CHECKPOINTS, "--save_steps", "2"]
STREAMS = [*EVERY_SECOND, "--mode", "streams"]
SAVES_OF_A_CHECKPOINT = 4  # calls of torch.save: training_args.bin, optimizer.pt, scheduler.pt, rng_state.pth


def history(folder):
    return logged(json.loads((folder / "trainer_state.json").read_text())["log_history"])


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["language_model", "image_classification"])
@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_run_that_ends_while_it_saves_goes_on_from_the_last_whole_checkpoint(
    recipe, at, tmp_path, monkeypatch, capsys
):
    if recipe == "language_model":
        run, arguments = language_model.run, lambda *more: debug_run(*more, *STREAMS)
    else:
        run, arguments = image_classification.run, lambda *more: debug_images_run(*more, *EVERY_SECOND)
    run(*arguments(tmp_path / "unbroken"))

    save, calls = torch.save, []

    def dying_save(*args, **kwargs):
        calls.append(args)
        if len(calls) == SAVES_OF_A_CHECKPOINT + at:
            raise MemoryError("the end")
        return save(*args, **kwargs)

    monkeypatch.setattr(torch, "save", dying_save)
    with pytest.raises(MemoryError, match="the end"):
        run(*arguments(tmp_path / "broken"))
    monkeypatch.setattr(torch, "save", save)
    assert (tmp_path / "broken" / "checkpoint-4").is_dir()

    capsys.readouterr()
    run(*arguments(tmp_path / "broken", "--resume_from_checkpoint", "true"))
    printed = capsys.readouterr().out
    assert "checkpoint-4 is not whole: the run ended while it was saved." in printed
    assert f"Going on from {tmp_path / 'broken' / 'checkpoint-2'}." in printed
    assert history(tmp_path / "broken") == history(tmp_path / "unbroken")


def test_there_is_a_whole_checkpoint_at_any_time(tmp_path, monkeypatch):
    # With one checkpoint to keep, the old one must not go before the new one is whole.
    save, calls = torch.save, []

    def watched_save(*args, **kwargs):
        calls.append(args)
        if len(calls) > SAVES_OF_A_CHECKPOINT:
            assert list((tmp_path / "run").glob("checkpoint-*/whole"))
        return save(*args, **kwargs)

    monkeypatch.setattr(torch, "save", watched_save)
    arguments = debug_images_run(tmp_path / "run", *EVERY_SECOND, "--save_total_limit", "1")
    image_classification.build_trainer(*arguments)[0].train()
    assert len(calls) == 4 * SAVES_OF_A_CHECKPOINT
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-8"]


def test_a_checkpoint_that_is_not_whole_is_never_gone_on_from(tmp_path):
    (tmp_path / "checkpoint-5").mkdir()
    arguments = debug_run(tmp_path, "--resume_from_checkpoint", "true")
    with pytest.raises(ValueError, match="has no checkpoint; checkpoint-5 ended while it was written"):
        find_checkpoint(arguments[2])
    arguments = debug_run(tmp_path, "--resume_from_checkpoint", str(tmp_path / "checkpoint-5"))
    with pytest.raises(ValueError, match="there is no whole checkpoint at this place"):
        find_checkpoint(arguments[2])
    assert find_checkpoint(debug_run(tmp_path)[2]) is None


def test_time_and_patience_are_part_of_a_checkpoint(tmp_path):
    patience = ["--load_best_model_at_end", "true", "--early_stopping_patience", "100", "--learning_rate", "0"]
    options = [*EVERY_SECOND, "--eval_strategy", "steps", "--eval_steps", "2", *patience]
    image_classification.build_trainer(*debug_images_run(tmp_path, *options))[0].train()
    state = json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())["stateful_callbacks"]
    assert state["EarlyStoppingCallback"]["attributes"]["early_stopping_patience_counter"] == 3
    seconds = state["Stopwatch"]["attributes"]["seconds"]
    results = image_classification.run(*debug_images_run(tmp_path, *options, "--resume_from_checkpoint", "true"))
    assert results["train_seconds"] > seconds > 0


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [language_model, image_classification])
def test_a_run_that_ended_in_its_last_evaluation_trains_no_further(recipe, tmp_path):
    options = debug_run if recipe is language_model else debug_images_run
    whole = recipe.run(*options(tmp_path / "run", *CHECKPOINTS))
    again = recipe.run(*options(tmp_path / "run", *CHECKPOINTS, "--resume_from_checkpoint", "true"))
    assert again["test_loss"] == whole["test_loss"]
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert state["global_step"] == 8
    assert again["parameters"] == whole["parameters"]
    assert "train_loss" not in again  # that of no step would be 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_save_a_checkpoint_that_resumes_to_the_unbroken_run(number, tmp_path, datasets_cache):
    options = [*CHECKPOINTS, "--mode", "streams", "--max_steps", "60"]
    process = subprocess.Popen(
        command("language_model", tmp_path / "broken", *options),
        env=environment(datasets_cache),
        stdout=subprocess.PIPE,
        text=True,
    )
    losses = (line for line in process.stdout if "'loss'" in line)
    for _ in range(5):
        next(losses)
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 130
    assert "--resume_from_checkpoint true goes on from here" in output
    assert not (tmp_path / "broken" / "all_results.json").exists()

    language_model.run(*debug_run(tmp_path / "broken", *options, "--resume_from_checkpoint", "true"))
    language_model.run(*debug_run(tmp_path / "unbroken", *options))
    assert history(tmp_path / "broken") == history(tmp_path / "unbroken")


@pytest.mark.slow
@pytest.mark.parametrize(("at", "save_strategy"), [(13, "epoch"), (18, "no")])
def test_an_interrupt_in_an_epoch_and_at_its_end_leaves_evaluations_as_they_are(
    at, save_strategy, tmp_path, monkeypatch
):
    # Every evaluation lowers the rate here: one more, or one less, and the losses are others.
    worse = '{"patience": 0, "threshold": 9}'
    options = ["--lr_scheduler_type", "reduce_lr_on_plateau", "--lr_scheduler_kwargs", worse]
    options += ["--logging_steps", "1", "--save_strategy", save_strategy, "--num_train_epochs", "3"]
    image_classification.run(*debug_images_run(tmp_path / "unbroken", *options))
    unbroken = json.loads((tmp_path / "unbroken" / "trainer_state.json").read_text())
    assert unbroken["max_steps"] == 27  # three epochs of nine steps

    step = ImageTrainer.training_step

    def interrupted_step(trainer, *args, **kwargs):
        if trainer.state.global_step == at - 1:
            signal.raise_signal(signal.SIGINT)
        return step(trainer, *args, **kwargs)

    monkeypatch.setattr(ImageTrainer, "training_step", interrupted_step)
    with pytest.raises(SystemExit, match="130"):
        image_classification.run(*debug_images_run(tmp_path / "broken", *options))
    monkeypatch.setattr(ImageTrainer, "training_step", step)
    image_classification.run(*debug_images_run(tmp_path / "broken", *options, "--resume_from_checkpoint", "true"))
    assert history(tmp_path / "broken") == history(tmp_path / "unbroken")
    rates = [
        [entry["learning_rate"] for entry in json.loads(path.read_text())["log_history"] if "learning_rate" in entry]
        for path in (tmp_path / "broken" / "trainer_state.json", tmp_path / "unbroken" / "trainer_state.json")
    ]
    assert rates[0] == rates[1]
    assert len(set(rates[0])) == 3


KILLED_WHILE_SAVING = """
import os, signal, torch
from train.language_model import parse, run
save, calls = torch.save, []
def killing_save(*args, **kwargs):
    calls.append(args)
    if len(calls) == {call}:
        os.kill(os.getpid(), signal.SIGKILL)
    return save(*args, **kwargs)
torch.save = killing_save
run(*parse({argv}))
"""


@pytest.mark.slow
def test_kill_9_during_a_save(tmp_path, datasets_cache, capsys):
    argv = [*DEBUG_RUN, "--output_dir", str(tmp_path / "broken"), *STREAMS]
    code = KILLED_WHILE_SAVING.format(call=SAVES_OF_A_CHECKPOINT + 2, argv=argv)
    killed = subprocess.run([sys.executable, "-c", code], env=environment(datasets_cache), timeout=200)
    assert killed.returncode == -signal.SIGKILL
    language_model.run(*debug_run(tmp_path / "broken", *STREAMS, "--resume_from_checkpoint", "true"))
    assert "checkpoint-4 is not whole" in capsys.readouterr().out
    language_model.run(*debug_run(tmp_path / "unbroken", *STREAMS))
    assert history(tmp_path / "broken") == history(tmp_path / "unbroken")
