"""Callbacks for the HF Trainer."""

import signal
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class SaveOnInterrupt(TrainerCallback):
    """On Ctrl-C or SIGTERM finishes the step at hand, saves a checkpoint and stops; a second signal stops at once.

    Saved between two steps, the checkpoint resumes to the very run that was interrupted. `interrupted` tells
    afterwards whether that happened.
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
        if self.interrupted:
            control.should_save = control.should_training_stop = True

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
