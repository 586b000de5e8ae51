"""Checkpoints that are whole or do not count: a run that is killed while it saves goes on from the one before."""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints, sort_checkpoints

WHOLE = "whole"  # an empty file, the last that is written to a checkpoint


class CheckpointTrainer(Trainer):
    """`Trainer` that marks a checkpoint as whole once every process has written its part.

    Older checkpoints are deleted only after that, so that there is a whole one at any time after the first. A run that
    goes on from its last step trains no further.
    """

    def save_extras(self, folder: Path) -> None:
        """What a subclass adds to the checkpoint in `folder`, in every process."""

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Where the last step is none of an epoch's end, transformers would make one more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run = Path(self._get_output_dir(trial))
        folder = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            (folder / WHOLE).unlink(missing_ok=True)  # there is one if the run went back to an older checkpoint
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.save_extras(folder)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            (folder / WHOLE).touch()
            rotate_checkpoints(str(run), limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()


def find_checkpoint(args: TrainingArguments) -> str | None:
    """The checkpoint to go on from, `None` to start afresh; says which one it is, and which are not whole.

    Raises:
        ValueError: there is none to go on from, or a fresh run would mix its checkpoints with another's.
    """
    folders = checkpoints(args.output_dir)
    whole = whole_checkpoints(args.output_dir)
    wanted = str(args.resume_from_checkpoint or False)
    if wanted.lower() == "true":
        if not whole:
            broken = f"; {names(folders)} ended while it was written" if folders else ""
            raise ValueError(
                f"resume_from_checkpoint is true, but output_dir ({args.output_dir!r}) has no checkpoint{broken}. "
                "Leave the option out to start afresh."
            )
        broken = [folder for folder in folders if folder not in whole and step(folder) > step(whole[-1])]
        if args.process_index == 0:
            if broken:
                print(f"{names(broken)} is not whole: the run ended while it was saved.")
            print(f"Going on from {whole[-1]}.", flush=True)
        return str(whole[-1])
    if wanted.lower() != "false":
        if not (Path(wanted) / WHOLE).exists():
            raise ValueError(f"resume_from_checkpoint is {wanted!r}: there is no whole checkpoint at this place.")
        return wanted
    if whole:
        raise ValueError(
            f"output_dir ({args.output_dir!r}) holds checkpoints of another run: give --resume_from_checkpoint true to "
            "go on with it, choose another output_dir, or delete it."
        )
    return None


def checkpoints(output_dir: str | Path) -> list[Path]:
    """All checkpoints of a run, oldest first."""
    return [Path(path) for path in sort_checkpoints(str(output_dir), PREFIX_CHECKPOINT_DIR)]


def whole_checkpoints(output_dir: str | Path) -> list[Path]:
    """Those that were written to the end."""
    return [folder for folder in checkpoints(output_dir) if (folder / WHOLE).exists()]


def step(folder: Path) -> int:
    """Number of the step after which the checkpoint in `folder` was saved."""
    return int(folder.name.rpartition("-")[2])


def names(folders: list[Path]) -> str:
    """The names of folders, for a message."""
    return ", ".join(folder.name for folder in folders)
