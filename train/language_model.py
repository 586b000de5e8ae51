"""Train an Engram Neural Network, or a baseline in its place, as a language model.

    python -m train.language_model train/configs/wikitext2.yaml
    python -m train.language_model train/configs/wikitext2.yaml --learning_rate 1e-3 --output_dir runs/slower
    python -m train.language_model train/configs/wikitext2.yaml --architecture lstm --parameters 1919232
    accelerate launch -m train.language_model train/configs/wikitext2.yaml

The text comes from the Hub, a folder or plain text files. The YAML file holds any of the options below; options on the
command line replace its values. Ctrl-C saves a checkpoint, and `--resume_from_checkpoint true` goes on from the last
one as if nothing had happened. At the end output_dir holds the model, its tokenizer, its code, a model card, and
all_results.json with the perplexities of the validation and test text, per token and per word, read in order with
carried state; and of the test text in pieces of four blocks that begin with an empty memory ("restarted"), there also
by how many tokens were read before. To share it:

    python -m hf_engram.hub push runs/wikitext2 user/name
"""

import dataclasses
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

import torch
from datasets import Dataset, IterableDataset
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed

from hf_engram.configuration_enn import memory_layers

from .arguments import parse_arguments, require
from .checkpoints import find_checkpoint
from .data import DataArguments, load_text, tokenize
from .memory_log import RecordMemory
from .models import LanguageModelArguments, make_model
from .runs import RecipeTrainingArguments, callbacks_for, command_line, describe, finish, save, train
from .streams import StreamedBlocks, TextStreams, collate
from .trainer import LanguageTrainer, state_bytes
from .vocabulary import train_tokenizer, word_tokenizer

ROWS_IN_MEMORY_LOG = 4
EXAMPLE_TOKENS = 48  # of the validation text, whose memory is drawn for the model card
LONGER = 4  # times block_size: what is read without a memory from before, in the last evaluation


@dataclass
class LanguageTrainingArguments(RecipeTrainingArguments):
    """`TrainingArguments` with defaults for a recurrent language model."""

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
    final_eval_streams: int = field(
        default=1,
        metadata={"help": "Parallel streams in the evaluation at the end; more than one is quicker, and less exact."},
    )
    learning_rate: float = field(default=2e-3, metadata={"help": "Highest learning rate."})
    weight_decay: float = field(
        default=0.05, metadata={"help": "Weight decay of matrices; biases, norms and the memory bank have none."}
    )
    logging_steps: float = field(default=50, metadata={"help": "Log every so many steps."})
    eval_strategy: str = field(default="steps", metadata={"help": "When to evaluate: no, steps or epoch."})
    eval_steps: float | None = field(default=500, metadata={"help": "Evaluate every so many steps."})
    include_num_input_tokens_seen: str = field(
        default="all", metadata={"help": "Count the tokens seen: all, non_padding or no."}
    )
    # The loss is taken on `shift_labels`, a keyword argument that the model's signature does not show.
    remove_unused_columns: bool = field(default=False, metadata={"help": "Has to be false here."})

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "final_eval_streams", self.final_eval_streams >= 1, "a positive integer")


ARGUMENT_GROUPS = (LanguageModelArguments, DataArguments, LanguageTrainingArguments)
Arguments = tuple[LanguageModelArguments, DataArguments, LanguageTrainingArguments]


def parse(argv: list[str] | None = None) -> Arguments:
    """Read the command line: a YAML file (if any), and options, which replace its values."""
    return parse_arguments("language_model", __doc__, ARGUMENT_GROUPS, argv)


def with_window(args: LanguageModelArguments, block_size: int) -> LanguageModelArguments:
    """The same with attention's window, unless one is given: beyond a block are distances it has never learned."""
    return args if args.sliding_window is not None else dataclasses.replace(args, sliding_window=block_size)


def make_language_model(args: LanguageModelArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A model for the tokens of `tokenizer`."""
    fields = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    vocab_size = len(tokenizer)
    if not args.raw_token_ids:
        return make_model(args, "language", vocab_size=vocab_size, **fields)
    model = make_model(args, "language", vocab_size=vocab_size, embedding_size=1, tie_word_embeddings=False, **fields)
    embeddings = model.get_input_embeddings()
    embeddings.weight.data[:, 0] = torch.arange(vocab_size)
    embeddings.requires_grad_(False)
    return model


def build_trainer(
    model_args: LanguageModelArguments,
    data_args: DataArguments,
    training_args: LanguageTrainingArguments,
    tokenizer: PreTrainedTokenizerBase | None = None,
    callbacks: Iterable[TrainerCallback] = (),
) -> tuple[LanguageTrainer, dict[str, TextStreams]]:
    """Make tokenizer, data and model.

    Args:
        tokenizer: the tokenizer to use; `None` trains one.
        callbacks: further callbacks for the trainer.

    Returns:
        the trainer, and the texts "validation" and "test" (if there is one) for the evaluation at the end.
    """
    bounded = training_args.max_steps > 0 or not data_args.streaming
    require(training_args, "max_steps", bounded, "a positive integer, with streaming")
    kept = not training_args.activation_checkpointing or data_args.mode != "streams"
    require(training_args, "activation_checkpointing", kept, "False, with mode streams, which carries states on")
    with training_args.main_process_first():
        text = load_text(data_args)
        if tokenizer is None:
            tokenizer = find_tokenizer(data_args, text)
        whole = {split: rows for split, rows in text.items() if split != "train" or not data_args.streaming}
        texts = {split: tokenize(rows, tokenizer) for split, rows in whole.items()}

    block_size, start = data_args.block_size, tokenizer.bos_token_id
    model_args = with_window(model_args, block_size)
    carries_state = data_args.mode == "streams"
    if data_args.streaming:
        seed = training_args.data_seed or training_args.seed
        train_dataset = StreamedBlocks(text["train"], tokenizer, block_size, data_args.shuffle_buffer, seed)
    elif carries_state:
        training_args.train_sampling_strategy = "sequential"
        rows = training_args.train_batch_size * training_args.world_size
        train_dataset = TextStreams(texts["train"], rows, block_size, start)
    else:
        train_dataset = TextStreams.blocks(texts["train"], block_size, start)

    make = partial(make_language_model, tokenizer=tokenizer)
    set_seed(training_args.seed)
    trainer = LanguageTrainer(
        model=make(model_args),
        make_model=make,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=TextStreams(texts["validation"], training_args.eval_batch_size, block_size, start),
        processing_class=tokenizer,
        data_collator=partial(collate, padding=tokenizer.pad_token_id),
        carry_state=carries_state,
        callbacks=[*callbacks_for(training_args), *callbacks],
    )
    held_out = {
        split: TextStreams(texts[split], training_args.final_eval_streams, block_size, start)
        for split in ("validation", "test")
        if split in texts
    }
    if memory_layers(trainer.model.config.layer_types) and (
        training_args.memory_steps or training_args.memory_plot_steps
    ):
        blocks = TextStreams.blocks(texts["validation"], block_size, start)
        some = trainer.data_collator([blocks[index] for index in range(min(ROWS_IN_MEMORY_LOG, len(blocks)))])
        steps = training_args.memory_steps, training_args.memory_plot_steps
        trainer.add_callback(RecordMemory(trainer.log, lambda model: {"input_ids": some["input_ids"]}, *steps))
    return trainer, held_out


def find_tokenizer(data_args: DataArguments, text: dict[str, Dataset | IterableDataset]) -> PreTrainedTokenizerBase:
    """The tokenizer that the options ask for, trained on the text if need be.

    Raises:
        ValueError: it has no token that begins a document, or none for padding.
    """
    if data_args.tokenizer == "words":
        return word_tokenizer(text.values())
    if data_args.tokenizer == "bpe":
        return train_tokenizer(text["train"], data_args.vocab_size)
    tokenizer = AutoTokenizer.from_pretrained(data_args.tokenizer)
    missing = [name for name in ("bos_token", "pad_token") if getattr(tokenizer, name) is None]
    if missing:
        raise ValueError(f"tokenizer is {data_args.tokenizer!r}, which has no {' and no '.join(missing)}.")
    return tokenizer


def run(
    model_args: LanguageModelArguments,
    data_args: DataArguments,
    training_args: LanguageTrainingArguments,
    command: str | None = None,
) -> dict[str, float]:
    """Train, save, evaluate, and write the model card of an ENN.

    Args:
        command: what was typed, for the model card.

    Returns:
        what all_results.json holds.
    """
    checkpoint = find_checkpoint(training_args)
    tokenizer = None if checkpoint is None else AutoTokenizer.from_pretrained(checkpoint)
    trainer, texts = build_trainer(model_args, data_args, training_args, tokenizer)
    metrics = train(trainer, checkpoint)
    told = {
        "mode": True,
        "block_size": True,
        "validation_fraction": data_args.train_files is not None,
        "detokenized": data_args.detokenized,
    }
    arguments = {name: getattr(data_args, name) for name, matters in told.items() if matters}
    language = data_args.language
    description = describe(training_args, data_args.source(), command, language=language, arguments=arguments)
    example = torch.tensor(texts["validation"].text.tokens[None, :EXAMPLE_TOKENS], dtype=torch.long)
    save(trainer, description, {"input_ids": example})
    for split, text in texts.items():
        metrics |= trainer.evaluate(text, metric_key_prefix=split)
    split = "test" if "test" in texts else "validation"
    metrics |= trainer.evaluate(restarted(texts[split], data_args.block_size), metric_key_prefix=f"{split}_restarted")
    seen = trainer.state.num_input_tokens_seen
    metrics |= {
        "state_bytes": text_state_bytes(trainer, data_args.block_size),
        "train_tokens_seen": seen,
        "train_tokens_per_second": seen / metrics["train_seconds"],
    }
    finish(trainer, metrics, report(metrics, texts))
    return metrics


def restarted(text: TextStreams, block_size: int) -> TextStreams:
    """The text in blocks of `LONGER` times the training length, each read from an empty memory on."""
    places = tuple(sorted({max(block_size // 4, 1), block_size, 2 * block_size}))
    return TextStreams.blocks(text.text, LONGER * block_size, text.document_start, places)


@torch.no_grad()
def text_state_bytes(trainer: LanguageTrainer, block_size: int) -> int:
    """Bytes of the state with which the model has read a block of text."""
    tokens = torch.zeros(1, block_size, dtype=torch.long, device=trainer.args.device)
    return state_bytes(trainer.model.eval()(tokens, use_cache=True).past_key_values)


def report(metrics: dict[str, float], texts: Iterable[str]) -> str:
    """The numbers that matter, as a small table."""
    lines = [f"{'':12}{'loss/token':>12}{'perplexity/token':>18}{'perplexity/word':>18}"]
    for text in texts:
        loss, token, word = (metrics[f"{text}_{name}"] for name in ("loss", "perplexity", "word_perplexity"))
        lines.append(f"{text:12}{loss:12.4f}{token:18.2f}{word:18.2f}")
    lines.append(
        f"{metrics['parameters']:,} parameters; a state of {metrics['state_bytes']:,} bytes; "
        f"{metrics['train_tokens_seen']:,} tokens seen in {metrics['train_seconds']:,.0f} s of training, evaluations "
        f"included ({metrics['train_tokens_per_second']:,.0f} tokens/s)"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    run(*parse(), command=command_line("language_model", sys.argv[1:]))
