"""Callbacks for the HF Trainer."""

import signal
import time
from types import FrameType
from typing import Any

import torch
import torch.distributed
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState


class SaveOnInterrupt(TrainerCallback):
    """On Ctrl-C or SIGTERM finishes the step at hand, saves a checkpoint and stops; a second signal stops at once.

    Saved between two steps, the checkpoint resumes to the very run that was interrupted. `interrupted` tells
    afterwards whether that happened. Of several processes, one that is told to stop stops all after the same step.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.interrupted = False
        self._former_handlers: dict[int, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start to listen."""
        self._former_handlers = {number: signal.signal(number, self._note) for number in self.SIGNALS}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save and stop if a signal came."""
        if args.world_size > 1:
            told = torch.tensor(float(self.interrupted), device=args.device)
            torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
            self.interrupted = bool(told)
        if self.interrupted:
            control.should_save = control.should_training_stop = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the end of an epoch that was cut short to the run that goes on; save what a true end has changed.

        The Trainer ends the epoch of a run that stops in its midst, too: an evaluation there would count for patience,
        learning rate and best model, and the unbroken run has none.
        """
        if self.interrupted and control.should_training_stop:
            over = float(state.epoch).is_integer()
            control.should_save = over
            control.should_evaluate &= over
            control.should_log &= over

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop to listen."""
        self._stop_listening()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.interrupted = True
        self._stop_listening()
        print("\nInterrupted: saving a checkpoint after this step. Interrupt again to stop at once.", flush=True)

    def _stop_listening(self) -> None:
        while self._former_handlers:
            signal.signal(*self._former_handlers.popitem())


class Stopwatch(TrainerCallback, ExportableState):
    """Seconds spent in training, evaluations included, over all resumptions; part of every checkpoint."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._since = time.monotonic()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start."""
        self._since = time.monotonic()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop."""
        self.state()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        now = time.monotonic()
        self.seconds, self._since = self.seconds + now - self._since, now
        return {"args": {}, "attributes": {"seconds": self.seconds}}


class ClipEachParameter(TrainerCallback):
    """Bounds the norm of every parameter's gradient on its own, as Keras' `clipnorm` does.

    Args:
        max_norm: the bound.
    """

    def __init__(self, max_norm: float) -> None:
        self.max_norm = max_norm

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Clip."""
        for parameter in model.parameters():
            if parameter.grad is not None:
                nn.utils.clip_grad_norm_(parameter, self.max_norm)
