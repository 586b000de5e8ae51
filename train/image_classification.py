"""Train an Engram Neural Network, or a baseline in its place, to classify images read as sequences.

    python -m train.image_classification train/configs/mnist_rows.yaml
    python -m train.image_classification train/configs/mnist_rows.yaml --architecture gru --parameters 210826
    python -m train.image_classification train/configs/mnist_permuted.yaml --seed 2 --output_dir runs/permuted-2
    accelerate launch -m train.image_classification train/configs/cifar10_rows.yaml

The YAML file holds any of the options below; options on the command line replace its values. Ctrl-C saves a
checkpoint, and `--resume_from_checkpoint true` goes on from the last one as if nothing had happened. At the end
output_dir holds the model, its image processor, its code, a model card, and all_results.json with loss and accuracy on
the validation and test images. To share it:

    python -m hf_engram.hub push runs/mnist_rows user/name
"""

import sys
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel, set_seed

from hf_engram.configuration_enn import memory_layers

from .arguments import parse_arguments
from .checkpoints import find_checkpoint
from .images import ImageArguments, collate, load_images, make_processor
from .memory_log import RecordMemory
from .models import ImageModelArguments, make_model
from .runs import RecipeTrainingArguments, callbacks_for, command_line, describe, finish, save, train
from .trainer import ImageTrainer, state_bytes

IMAGES_IN_MEMORY_LOG = 16


@dataclass
class ImageTrainingArguments(RecipeTrainingArguments):
    """`TrainingArguments` with defaults for images read as sequences."""

    per_device_train_batch_size: int = field(default=128, metadata={"help": "Images of a batch, on each device."})
    per_device_eval_batch_size: int = field(default=500, metadata={"help": "Images of a batch in evaluation."})
    num_train_epochs: float = field(default=10, metadata={"help": "Passes over the train split."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Highest learning rate."})
    weight_decay: float = field(
        default=0.01, metadata={"help": "Weight decay of matrices; biases, norms and the memory bank have none."}
    )
    logging_steps: float = field(default=100, metadata={"help": "Log every so many steps."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate: no, steps or epoch."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save a checkpoint: no, steps or epoch."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Has to be false here."})


ARGUMENT_GROUPS = (ImageModelArguments, ImageArguments, ImageTrainingArguments)
Arguments = tuple[ImageModelArguments, ImageArguments, ImageTrainingArguments]


def parse(argv: list[str] | None = None) -> Arguments:
    """Read the command line: a YAML file (if any), and options, which replace its values."""
    return parse_arguments("image_classification", __doc__, ARGUMENT_GROUPS, argv)


def make_image_model(
    model_args: ImageModelArguments, image_args: ImageArguments, class_names: list[str]
) -> PreTrainedModel:
    """A model for these images and classes."""
    return make_model(
        model_args,
        "images",
        image_sequence=image_args.image_sequence,
        image_size=image_args.image_size,
        num_channels=image_args.num_channels,
        patch_size=image_args.patch_size,
        pixel_permutation_seed=image_args.pixel_permutation_seed,
        id2label=dict(enumerate(class_names)),
        label2id={name: index for index, name in enumerate(class_names)},
    )


def build_trainer(
    model_args: ImageModelArguments, image_args: ImageArguments, training_args: ImageTrainingArguments
) -> tuple[ImageTrainer, dict]:
    """Make processor, data and model.

    Returns:
        the trainer, and the splits "validation" and "test" for the evaluation at the end.
    """
    with training_args.main_process_first():
        splits, class_names = load_images(image_args)
    processor = make_processor(image_args)
    data_collator = partial(collate, processor=processor)
    make = partial(make_image_model, image_args=image_args, class_names=class_names)
    set_seed(training_args.seed)
    trainer = ImageTrainer(
        model=make(model_args),
        make_model=make,
        args=training_args,
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        processing_class=processor,
        data_collator=data_collator,
        random_shift=image_args.random_shift,
        random_flip=image_args.random_flip,
        callbacks=callbacks_for(training_args),
    )
    if memory_layers(trainer.model.config.layer_types) and (
        training_args.memory_steps or training_args.memory_plot_steps
    ):
        validation = splits["validation"]
        some = data_collator([validation[index] for index in range(min(IMAGES_IN_MEMORY_LOG, len(validation)))])

        def sequences(model: PreTrainedModel) -> dict[str, Tensor]:
            return {"inputs_embeds": model.embed_images(some["pixel_values"].to(model.device))}

        steps = training_args.memory_steps, training_args.memory_plot_steps
        trainer.add_callback(RecordMemory(trainer.log, sequences, *steps))
    return trainer, {split: splits[split] for split in ("validation", "test")}


def run(
    model_args: ImageModelArguments,
    image_args: ImageArguments,
    training_args: ImageTrainingArguments,
    command: str | None = None,
) -> dict[str, float]:
    """Train, save, evaluate, and write the model card of an ENN.

    Args:
        command: what was typed, for the model card.

    Returns:
        what all_results.json holds.
    """
    checkpoint = find_checkpoint(training_args)
    trainer, splits = build_trainer(model_args, image_args, training_args)
    metrics = train(trainer, checkpoint)
    changes = {name: getattr(image_args, name) for name in ("random_shift", "random_flip")}
    save(trainer, describe(training_args, image_args.source(), command, arguments=changes), first_image(trainer))
    for split, images in splits.items():
        metrics |= trainer.evaluate(images, metric_key_prefix=split)
    metrics["state_bytes"] = image_state_bytes(trainer)
    finish(trainer, metrics, report(metrics, list(splits)))
    return metrics


def first_image(trainer: ImageTrainer) -> dict[str, Tensor]:
    """The first validation image, as an input of the model."""
    image = trainer.data_collator([trainer.eval_dataset[0]])["pixel_values"]
    return {"pixel_values": image.to(trainer.args.device)}


@torch.no_grad()
def image_state_bytes(trainer: ImageTrainer) -> int:
    """Bytes of the state with which the model has read one image."""
    return state_bytes(trainer.model.eval()(**first_image(trainer), use_cache=True).past_key_values)


def report(metrics: dict[str, float], splits: list[str]) -> str:
    """The numbers that matter, as a small table."""
    lines = [f"{'':12}{'loss':>10}{'accuracy':>10}"]
    lines += [f"{split:12}{metrics[f'{split}_loss']:10.4f}{metrics[f'{split}_accuracy']:10.4f}" for split in splits]
    lines.append(
        f"{metrics['parameters']:,} parameters; a state of {metrics['state_bytes']:,} bytes; "
        f"{metrics['train_seconds']:,.0f} s of training, evaluations included"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    run(*parse(), command=command_line("image_classification", sys.argv[1:]))
