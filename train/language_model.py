"""Train an Engram Neural Network as a language model, on text from the Hub, a folder or plain text files.

    python -m train.language_model train/configs/wikitext2.yaml
    python -m train.language_model train/configs/wikitext2.yaml --learning_rate 1e-3 --output_dir runs/slower
    accelerate launch -m train.language_model train/configs/wikitext2.yaml

The YAML file holds any of the options below; options on the command line replace its values. Ctrl-C saves a
checkpoint, and `--resume_from_checkpoint true` goes on from the last one as if nothing had happened. At the end
output_dir holds the model, its tokenizer, its code, a model card, and all_results.json with the perplexities of the
validation and test text, per token and per word. To share it:

    python -m hf_engram.hub push runs/wikitext2 user/name
"""

import dataclasses
import shlex
import sys
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from transformers import (
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from hf_engram import EnnConfig, EnnForCausalLM
from hf_engram.hub import TrainingRun, save_for_hub, write_card

from .callbacks import SaveOnInterrupt
from .data import DataArguments, TextStreams, collate, load_text, tokenize, train_tokenizer
from .trainer import LanguageTrainer


@dataclass
class ModelArguments:
    """The fields of `EnnConfig` that a language model may want to set."""

    _argument_group_name = "model"

    hidden_size: int = field(default=256, metadata={"help": "Width of the hidden state and of every memory slot."})
    num_hidden_layers: int = field(default=2, metadata={"help": "Stacked engram layers."})
    memory_size: int = field(default=64, metadata={"help": "Slots of the bank and of the trace."})
    integrator_size: int | None = field(
        default=None, metadata={"help": "Width of the integrator's inner layer. None: three times hidden_size."}
    )
    residual: bool = field(default=True, metadata={"help": "Wrap each cell in a pre-norm residual block."})
    tie_word_embeddings: bool = field(default=True, metadata={"help": "Use the token embeddings as output layer."})
    hebbian_lr: float = field(default=0.05, metadata={"help": "Share of the trace that one write replaces."})
    trace_scale: float = field(default=0.5, metadata={"help": "Weight of the trace beside the bank."})
    trace_clip: float | None = field(
        default=None, metadata={"help": "Bound of every trace entry (the paper: 0.1). None: no bound."}
    )
    recall_temperature: float = field(
        default=1.5, metadata={"help": "Temperature of recall, before 1 + 10 * sparsity_strength divides it."}
    )
    sparsity_strength: float = field(default=0.1, metadata={"help": "Sharpens recall; see recall_temperature."})
    recall_entropy_weight: float = field(
        default=0.0, metadata={"help": "Weight of recall's mean entropy in the training loss."}
    )
    hidden_dropout: float = field(default=0.1, metadata={"help": "Dropout on the output of every layer."})
    embedding_dropout: float = field(default=0.1, metadata={"help": "Dropout on the embeddings."})
    initializer_range: float = field(default=0.02, metadata={"help": "Standard deviation of the first embeddings."})


@dataclass
class LanguageTrainingArguments(TrainingArguments):
    """`TrainingArguments` with defaults for a recurrent language model."""

    _argument_group_name = "training"

    per_device_train_batch_size: int = field(
        default=16, metadata={"help": "Rows of a batch: blocks, or parallel streams, on each device."}
    )
    per_device_eval_batch_size: int = field(
        default=16,
        metadata={
            "help": "Parallel streams that the validation text is dealt to in evaluations during training. The "
            "evaluation at the end reads every text as one stream."
        },
    )
    learning_rate: float = field(default=2e-3, metadata={"help": "Highest learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "How the learning rate falls."})
    warmup_steps: float = field(
        default=0.02, metadata={"help": "Steps in which the learning rate rises; below 1, a share of all steps."}
    )
    weight_decay: float = field(
        default=0.05, metadata={"help": "Weight decay of matrices; biases, norms and the memory bank have none."}
    )
    adam_beta2: float = field(default=0.98, metadata={"help": "Beta2 of AdamW."})
    logging_steps: float = field(default=50, metadata={"help": "Log every so many steps."})
    eval_strategy: str = field(default="steps", metadata={"help": "When to evaluate: no, steps or epoch."})
    eval_steps: float | None = field(default=500, metadata={"help": "Evaluate every so many steps."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep."})
    include_num_input_tokens_seen: str = field(
        default="all", metadata={"help": "Count the tokens seen: all, non_padding or no."}
    )
    dataloader_pin_memory: bool = field(default=False, metadata={"help": "Pin memory, for training on a GPU."})
    # The Trainer copies it into the saved config: a checkpoint has to return its state when loaded.
    use_cache: bool = field(default=True, metadata={"help": "Whether the saved model returns its state by default."})
    # The loss is taken on `shift_labels`, a keyword argument that the model's signature does not show.
    remove_unused_columns: bool = field(default=False, metadata={"help": "Has to be false here."})
    model_license: str | None = field(
        default=None, metadata={"help": "Licence of the weights (apache-2.0), for the model card."}
    )


ARGUMENT_GROUPS = (ModelArguments, DataArguments, LanguageTrainingArguments)


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Help with defaults, below this module's text as it stands."""


def parse_arguments(
    argv: list[str] | None = None,
) -> tuple[ModelArguments, DataArguments, LanguageTrainingArguments]:
    """Read the command line: a YAML file (if any), and options, which replace its values."""
    parser = HfArgumentParser(
        ARGUMENT_GROUPS,
        prog="python -m train.language_model",
        usage="%(prog)s [config.yaml] [--option value ...]",
        description=__doc__,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("config", nargs="?", help="YAML file with options")
    argv = sys.argv[1:] if argv is None else argv
    config = parser.parse_args(argv).config
    try:
        if config is not None:
            parser.set_defaults(**read_options(config))
        *arguments, _ = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return tuple(arguments)


def read_options(path: str) -> dict[str, Any]:
    """The options in a YAML file; numbers as text, so that the parser checks them like those typed by hand.

    Raises:
        ValueError: the file holds something else than known options.
    """
    options = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(options, dict):
        raise ValueError(f"{path} holds {options!r}; allowed: lines of `option: value`.")
    known = {option.name for group in ARGUMENT_GROUPS for option in dataclasses.fields(group)}
    unknown = sorted(set(options) - known)
    if unknown:
        raise ValueError(f"{path} has the unknown options {unknown}; --help lists the known ones.")
    return {name: str(value) if type(value) in (int, float) else value for name, value in options.items()}


def find_checkpoint(args: TrainingArguments) -> str | None:
    """The checkpoint to go on from, `None` to start afresh.

    Raises:
        ValueError: there is none to go on from, or a fresh run would mix its checkpoints with another's.
    """
    last = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
    wanted = str(args.resume_from_checkpoint or False)
    if wanted.lower() == "true":
        if last is None:
            raise ValueError(f"resume_from_checkpoint is true, but output_dir ({args.output_dir!r}) has no checkpoint.")
        return last
    if wanted.lower() != "false":
        return wanted
    if last is not None:
        raise ValueError(
            f"output_dir ({args.output_dir!r}) holds checkpoints of another run: give --resume_from_checkpoint true to "
            "go on with it, choose another output_dir, or delete it."
        )
    return None


def build_trainer(
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: LanguageTrainingArguments,
    tokenizer: PreTrainedTokenizerBase | None = None,
    callbacks: list[TrainerCallback] | None = None,
) -> tuple[LanguageTrainer, dict[str, TextStreams]]:
    """Make tokenizer, data and model.

    Args:
        tokenizer: the tokenizer to use; `None` trains one.
        callbacks: further callbacks for the trainer.

    Returns:
        the trainer, and the texts "validation" and "test" (if there is one) for the evaluation at the end.
    """
    with training_args.main_process_first():
        text = load_text(data_args)
        if tokenizer is None:
            tokenizer = train_tokenizer(text["train"], data_args.vocab_size)
        texts = {split: tokenize(rows, tokenizer) for split, rows in text.items()}

    set_seed(training_args.seed)
    config = EnnConfig(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **dataclasses.asdict(model_args),
    )
    streams = data_args.mode == "streams"
    block_size, start = data_args.block_size, tokenizer.bos_token_id
    if streams:
        training_args.train_sampling_strategy = "sequential"
        rows = training_args.train_batch_size * training_args.world_size
        train_dataset = TextStreams(texts["train"], rows, block_size, start)
    else:
        train_dataset = TextStreams.blocks(texts["train"], block_size, start)
    trainer = LanguageTrainer(
        model=EnnForCausalLM(config),
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=TextStreams(texts["validation"], training_args.eval_batch_size, block_size, start),
        processing_class=tokenizer,
        data_collator=partial(collate, padding=tokenizer.pad_token_id),
        carry_state=streams,
        callbacks=callbacks,
    )
    held_out = {
        split: TextStreams(texts[split], 1, block_size, start) for split in ("validation", "test") if split in texts
    }
    return trainer, held_out


def describe(
    data_args: DataArguments, training_args: LanguageTrainingArguments, command: str | None = None
) -> TrainingRun:
    """What the model card tells of the run."""
    options = ("mode", "block_size") if data_args.train_files is None else ("mode", "block_size", "validation_fraction")
    return TrainingRun.on_this_machine(
        training_args,
        name=training_args.hub_model_id,
        license=training_args.model_license,
        language=data_args.language,
        data=[data_args.source()],
        command=command,
        arguments={name: getattr(data_args, name) for name in options},
    )


def run(
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: LanguageTrainingArguments,
    command: str | None = None,
) -> dict[str, float]:
    """Train, save, evaluate, and write the model card.

    Args:
        command: what was typed, for the model card.

    Returns:
        what all_results.json holds.
    """
    checkpoint = find_checkpoint(training_args)
    tokenizer = None if checkpoint is None else AutoTokenizer.from_pretrained(checkpoint)
    interrupt = SaveOnInterrupt()
    trainer, texts = build_trainer(model_args, data_args, training_args, tokenizer, [interrupt])
    metrics = trainer.train(checkpoint).metrics
    if interrupt.interrupted:
        print("Stopped. --resume_from_checkpoint true goes on from here.")
        sys.exit(130)
    trainer.save_state()
    output = Path(training_args.output_dir)
    if trainer.is_world_process_zero():
        save_for_hub(trainer.model, output, trainer.processing_class, describe(data_args, training_args, command))

    for split, text in texts.items():
        metrics |= trainer.evaluate(text, metric_key_prefix=split)
    seen = trainer.state.num_input_tokens_seen
    metrics |= {
        "parameters": trainer.model.num_parameters(),
        "train_tokens_seen": seen,
        "train_tokens_per_second": seen / trainer.state.global_step * metrics["train_steps_per_second"],
    }
    trainer.save_metrics("all", metrics, combined=False)
    if trainer.is_world_process_zero():
        write_card(output)
        print(report(metrics, texts))
    return metrics


def report(metrics: dict[str, float], texts: Iterable[str]) -> str:
    """The numbers that matter, as a small table."""
    lines = [f"{'':12}{'loss/token':>12}{'perplexity/token':>18}{'perplexity/word':>18}"]
    for text in texts:
        loss, token, word = (metrics[f"{text}_{name}"] for name in ("loss", "perplexity", "word_perplexity"))
        lines.append(f"{text:12}{loss:12.4f}{token:18.2f}{word:18.2f}")
    lines.append(
        f"{metrics['parameters']:,} parameters; {metrics['train_tokens_seen']:,} tokens seen; "
        f"{metrics['train_runtime']:,.0f} s since the start or the last resumption, evaluations included "
        f"({metrics['train_tokens_per_second']:,.0f} tokens/s)"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    run(*parse_arguments(), command=shlex.join(["python", "-m", "train.language_model", *sys.argv[1:]]))
