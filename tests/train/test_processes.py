"""Two processes train like one."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from recipes import CHECKPOINTS, command, debug_images_run, debug_run, environment, logged

from train import image_classification, language_model

TWO_PROCESSES = "train/configs/accelerate/two_processes.yaml"
NO_DROPOUT = ["--hidden_dropout", "0", "--embedding_dropout", "0"]
TWENTY = [*CHECKPOINTS, "--max_steps", "20", "--save_steps", "5"]
RUNS = {
    "streams": ("language_model", ["--mode", "streams", *NO_DROPOUT], 8),
    # The last, smaller batch of an epoch would be filled up with repeated blocks in two processes.
    "blocks": ("language_model", ["--mode", "blocks", "--dataloader_drop_last", "true", *NO_DROPOUT], 8),
    "images": ("image_classification", [], 24),
}


def two_processes(recipe, folder, *options):
    """The command that runs a recipe in two processes on the CPU."""
    launch = [str(Path(sys.executable).with_name("accelerate")), "launch", "--config_file", TWO_PROCESSES]
    return [*launch, *command(recipe, folder, *options)[1:]]


def in_process(recipe, folder, *options):
    if recipe == "language_model":
        return language_model.run(*debug_run(folder, *options))
    return image_classification.run(*debug_images_run(folder, *options))


def losses(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [loss for _, loss, _ in logged(history)]


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "options", "rows"), RUNS.values(), ids=RUNS)
def test_two_processes_train_like_one(recipe, options, rows, tmp_path, datasets_cache):
    options = [*TWENTY, *options, "--per_device_train_batch_size"]
    two = two_processes(recipe, tmp_path / "two", *options, str(rows // 2))
    subprocess.run(two, env=environment(datasets_cache), check=True, timeout=200)
    in_process(recipe, tmp_path / "one", *options, str(rows))
    assert len(losses(tmp_path / "one")) == 20
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)

    results = [json.loads((tmp_path / name / "all_results.json").read_text()) for name in ("two", "one")]
    assert results[0]["test_loss"] == pytest.approx(results[1]["test_loss"], rel=1e-3)


@pytest.mark.slow
def test_a_run_goes_on_after_one_of_its_processes_was_killed(tmp_path, datasets_cache):
    options = [*TWENTY, "--mode", "streams", *NO_DROPOUT, "--per_device_train_batch_size", "4", "--max_steps", "400"]
    options += ["--lr_scheduler_type", "constant"]
    launcher = subprocess.Popen(
        two_processes("language_model", tmp_path / "run", *options),
        env=environment(datasets_cache),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 200
    while not (tmp_path / "run" / "checkpoint-10" / "whole").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(children(launcher.pid)[-1], signal.SIGKILL)
    output = launcher.communicate(timeout=100)[0]
    assert launcher.returncode != 0, output

    options[options.index("400")] = "40"
    done = [int(path.parent.name.partition("-")[2]) for path in (tmp_path / "run").glob("checkpoint-*/whole")]
    assert max(done) < 400
    resume = ["--resume_from_checkpoint", "true", "--max_steps", str(max(done) + 10)]
    resumed = subprocess.run(
        two_processes("language_model", tmp_path / "run", *options, *resume),
        env=environment(datasets_cache),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
    )
    assert resumed.returncode == 0, resumed.stdout
    assert re.search(rf"Going on from .*checkpoint-{max(done)}\.", resumed.stdout)
    in_process("language_model", tmp_path / "one", *options, "--per_device_train_batch_size", "8", *resume[2:])
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)


def children(pid):
    """Process ids of the training processes that a launcher has started."""
    listed = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    lines = [line.split(maxsplit=1) for line in listed.splitlines()]
    return [int(number) for number, args in lines if "train.language_model" in args]
