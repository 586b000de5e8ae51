"""Small runs of the recipes that several test files use."""

import os
import sys

from transformers import TrainerCallback

from train import image_classification, language_model

DEBUG_RUN = ["train/configs/debug.yaml", "--disable_tqdm", "true"]
DEBUG_IMAGES_RUN = ["train/configs/debug_images.yaml", "--disable_tqdm", "true"]
# Eight steps, a checkpoint at the end, the loss of every step.
CHECKPOINTS = ["--save_strategy", "steps", "--logging_steps", "1", "--eval_strategy", "no", "--max_steps", "8"]


def debug_run(folder, *options):
    """Arguments of a small language run, from its command line."""
    return language_model.parse([*DEBUG_RUN, "--output_dir", str(folder), *options])


def debug_images_run(folder, *options):
    """Arguments of a small image run, from its command line."""
    return image_classification.parse([*DEBUG_IMAGES_RUN, "--output_dir", str(folder), *options])


def logged(log_history):
    """What training logged at every step, times and rates left out."""
    return [(entry["step"], entry["loss"], entry["grad_norm"]) for entry in log_history if "loss" in entry]


def environment(datasets_cache):
    """For a process that computes and prints as this one does."""
    ours = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "HF_DATASETS_CACHE": str(datasets_cache)}
    return {**os.environ, **ours}


def command(recipe, folder, *options):
    """Command line of a run in a process of its own."""
    run = {"language_model": DEBUG_RUN, "image_classification": DEBUG_IMAGES_RUN}[recipe]
    return [sys.executable, "-m", f"train.{recipe}", *run, "--output_dir", str(folder), *options]


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True
