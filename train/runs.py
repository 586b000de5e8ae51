"""A run from its first step, or its last checkpoint, to the saved model: what all recipes do."""

import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import EarlyStoppingCallback, PreTrainedModel, TrainerCallback, TrainingArguments

from hf_engram import EnnConfig
from hf_engram.configuration_enn import memory_layers
from hf_engram.hub import DataSource, TrainingRun, save_for_hub, write_card

from .allocator import keep_freed_memory
from .arguments import require
from .callbacks import ClipEachParameter, SaveOnInterrupt, Stopwatch
from .checkpoints import step
from .trainer import RecipeTrainer


@dataclass
class RecipeTrainingArguments(TrainingArguments):
    """`TrainingArguments` with defaults for recurrent models, and options of our own."""

    _argument_group_name = "training"

    lr_scheduler_type: str = field(default="cosine", metadata={"help": "How the learning rate falls."})
    warmup_steps: float = field(
        default=0.02, metadata={"help": "Steps in which the learning rate rises; below 1, a share of all steps."}
    )
    adam_beta2: float = field(default=0.98, metadata={"help": "Beta2 of AdamW."})
    clip_each_parameter: float | None = field(
        default=None,
        metadata={
            "help": "Bound the gradient's norm of every parameter by this, as Keras' clipnorm does. Give "
            "max_grad_norm 0 with it. None: max_grad_norm bounds the norm of the whole gradient."
        },
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={
            "help": "Stop after so many evaluations without a better metric_for_best_model; needs "
            "load_best_model_at_end. None: never."
        },
    )
    memory_steps: int | None = field(
        default=None,
        metadata={"help": "Log what the ENN's memory does (entropy of recall, slots in use, ...) every so many steps."},
    )
    memory_plot_steps: int | None = field(
        default=None, metadata={"help": "Save a heat map of recall and trace to output_dir/memory every so many steps."}
    )
    model_license: str | None = field(
        default=None, metadata={"help": "Licence of the weights (apache-2.0), for the model card."}
    )
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep."})
    # Every parameter takes part in every step, so that processes need not look for those that do not.
    ddp_find_unused_parameters: bool = field(default=False, metadata={"help": "Look for parameters without gradient."})
    dataloader_pin_memory: bool = field(default=False, metadata={"help": "Pin memory, for training on a GPU."})
    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "Go on with the patience and the time that a checkpoint holds."}
    )
    # The Trainer copies it into the saved config: a checkpoint has to return its state when loaded.
    use_cache: bool = field(default=True, metadata={"help": "Whether the saved model returns its state by default."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.early_stopping_patience is not None and not self.load_best_model_at_end:
            raise ValueError(
                f"early_stopping_patience is {self.early_stopping_patience}, load_best_model_at_end is False; allowed: "
                "early_stopping_patience None, or load_best_model_at_end true."
            )
        for name in ("memory_steps", "memory_plot_steps"):
            every = getattr(self, name)
            require(self, name, every is None or every >= 1, "a positive integer, or None")


def callbacks_for(args: RecipeTrainingArguments) -> list[TrainerCallback]:
    """The callbacks that the options ask for."""
    callbacks: list[TrainerCallback] = [Stopwatch()]
    if args.clip_each_parameter is not None:
        callbacks.append(ClipEachParameter(args.clip_each_parameter))
    if args.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(args.early_stopping_patience))
    return callbacks


def train(trainer: RecipeTrainer, checkpoint: str | None) -> dict[str, Any]:
    """Train from `checkpoint` on; ends the process with code 130 on an interrupt.

    Returns:
        the Trainer's metrics and `parameters`, `train_seconds` (over all resumptions, evaluations included).
    """
    keep_freed_memory()
    interrupt = SaveOnInterrupt()
    trainer.add_callback(interrupt)
    metrics = trainer.train(checkpoint).metrics
    if checkpoint is not None and trainer.state.global_step == step(Path(checkpoint)):
        metrics = {"epoch": metrics["epoch"]}  # the run ended in its last evaluation: there is nothing else to tell
    if interrupt.interrupted:
        print("Stopped. --resume_from_checkpoint true goes on from here.")
        sys.exit(130)
    trainer.remove_callback(EarlyStoppingCallback)  # which would look for its metric in the last evaluations, too
    trainer.save_state()
    stopwatch = next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, Stopwatch))
    return {
        **metrics,
        "parameters": trainer.model.num_parameters(only_trainable=True),
        "train_seconds": stopwatch.seconds,
    }


def is_enn(model: PreTrainedModel) -> bool:
    """Whether a model is one of hf_engram, whatever its layers are, and not a baseline with a class of its own."""
    return model.config.model_type == EnnConfig.model_type


def command_line(recipe: str, argv: list[str]) -> str:
    """What is typed to run a recipe, for the model card."""
    return shlex.join(["python", "-m", f"{__package__}.{recipe}", *argv])


def describe(args: RecipeTrainingArguments, data: DataSource, command: str | None, **known: Any) -> TrainingRun:
    """What the model card tells of a run.

    Args:
        args: its options.
        data: what it was trained on.
        command: what was typed ([`command_line`]).
        known: further attributes of [`TrainingRun`].
    """
    return TrainingRun.on_this_machine(
        args, name=args.hub_model_id, license=args.model_license, data=[data], command=command, **known
    )


def save(trainer: RecipeTrainer, description: TrainingRun, example: Mapping[str, Tensor]) -> None:
    """Save the model to output_dir: an ENN with all that the Hub needs, a baseline as the Trainer does it.

    Args:
        description: for the card.
        example: inputs whose memory is drawn for the card, if the model has one.
    """
    model = trainer.model
    if not is_enn(model):
        trainer.save_model()
    elif trainer.is_world_process_zero():
        drawn = example if memory_layers(model.config.layer_types) else None
        save_for_hub(model, trainer.args.output_dir, trainer.processing_class, description, drawn)


def finish(trainer: RecipeTrainer, metrics: dict[str, float], table: str) -> None:
    """Save `metrics` as all_results.json, write them into the card of an ENN, and print `table`."""
    trainer.save_metrics("all", metrics, combined=False)
    if trainer.is_world_process_zero():
        if is_enn(trainer.model):
            write_card(trainer.args.output_dir)
        print(table)
