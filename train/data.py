"""Text for language modelling: loading, a byte-level BPE tokenizer, and token streams cut into training examples.

A text becomes one stream of tokens. It begins with the end-of-text token, from which its first token is predicted, and
every row of the dataset is followed by its end: a newline where rows are lines of one running text (WikiText), the
end-of-text token where every row is a document (stories, files). Nothing else is added or removed, so the tokens of a
line-wise dataset decode to its text, byte for byte.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.utils.data
from datasets import Dataset, DatasetDict, Features, List, Value, load_dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hf_engram.hub import DataSource

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"
SPECIAL_TOKENS = [END_OF_TEXT, PADDING]
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)
IGNORED_LABEL = -100
ROW_KINDS = ("lines", "documents")
MODES = ("blocks", "streams")


@dataclass
class DataArguments:
    """The text to train on, and how it is cut into examples."""

    _argument_group_name = "data"

    dataset_name: str | None = field(
        default=None, metadata={"help": "Dataset on the Hub (Salesforce/wikitext), or a local folder with one."}
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of the dataset, such as wikitext-103-raw-v1."}
    )
    text_column: str = field(default="text", metadata={"help": "Column of the dataset that holds the text."})
    rows: str = field(
        default="lines",
        metadata={
            "help": "What a row of the dataset is: one of the 'lines' of a running text, as in WikiText, or one of "
            "many 'documents', which do not see each other. Text files are documents.",
            "choices": ROW_KINDS,
        },
    )
    train_files: list[str] | None = field(
        default=None, metadata={"help": "Plain text files (or globs) to train on, instead of a dataset."}
    )
    validation_files: list[str] | None = field(
        default=None, metadata={"help": "Text files for validation. None: the end of every training file."}
    )
    test_files: list[str] | None = field(
        default=None, metadata={"help": "Text files for the final test. None: no test."}
    )
    validation_fraction: float = field(
        default=0.05,
        metadata={"help": "Share of every training file, at its end, that is held out when validation_files is None."},
    )
    vocab_size: int = field(
        default=8192,
        metadata={
            "help": f"Tokens of the byte-level BPE tokenizer trained on the text; {SMALLEST_VOCABULARY} or more."
        },
    )
    mode: str = field(
        default="blocks",
        metadata={
            "help": "'blocks': shuffled blocks that begin with an empty memory. 'streams': every row of a batch goes "
            "on where that row of the last batch ended, memory included (truncated backpropagation through time).",
            "choices": MODES,
        },
    )
    block_size: int = field(default=256, metadata={"help": "Tokens that a row of a batch holds at most."})
    data_license: str | None = field(default=None, metadata={"help": "Licence of the text, for the model card."})
    language: str | None = field(default=None, metadata={"help": "Code of its language (en), for the model card."})

    def __post_init__(self) -> None:
        if (self.dataset_name is None) == (self.train_files is None):
            raise ValueError(
                f"dataset_name is {self.dataset_name!r}, train_files is {self.train_files!r}: give exactly one of them."
            )
        if self.dataset_name is not None and (self.validation_files or self.test_files):
            raise ValueError("validation_files and test_files go with train_files; a dataset brings its own splits.")
        self._require("rows", self.rows in ROW_KINDS, f"one of {ROW_KINDS}")
        self._require("mode", self.mode in MODES, f"one of {MODES}")
        self._require("block_size", self.block_size >= 1, "a positive integer")
        self._require("vocab_size", self.vocab_size >= SMALLEST_VOCABULARY, f"{SMALLEST_VOCABULARY} or more")
        self._require("validation_fraction", 0 < self.validation_fraction < 1, "between 0 and 1")

    def source(self) -> DataSource:
        """The text as the model card names it."""
        if self.dataset_name is None:
            return DataSource(", ".join(self.train_files), self.data_license)
        on_the_hub = not Path(self.dataset_name).is_dir()
        return DataSource(
            name=self.dataset_name if on_the_hub else Path(self.dataset_name).name,
            license=self.data_license,
            hub_id=self.dataset_name if on_the_hub else None,
            config=self.dataset_config,
        )

    def _require(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: {allowed}.")


def load_text(args: DataArguments) -> DatasetDict:
    """Load the text with one column, `text`, whose rows carry their end.

    Returns:
        splits "train", "validation" and, where there is one, "test".

    Raises:
        ValueError: the dataset lacks a split or the text column.
    """
    if args.dataset_name is not None:
        dataset = load_dataset(args.dataset_name, args.dataset_config)
        row_end = "\n" if args.rows == "lines" else END_OF_TEXT
    else:
        files = {"train": args.train_files, "validation": args.validation_files, "test": args.test_files}
        files = {split: paths for split, paths in files.items() if paths}
        dataset = load_dataset("text", data_files=files, sample_by="document")
        row_end = END_OF_TEXT
        if args.validation_files is None:
            dataset = hold_out_ends(dataset, args.validation_fraction)
    missing = {"train", "validation"} - set(dataset)
    if missing:
        raise ValueError(f"{args.dataset_name!r} has the splits {sorted(dataset)}; {sorted(missing)} missing.")
    columns = dataset["train"].column_names
    if args.text_column not in columns:
        raise ValueError(f"text_column is {args.text_column!r}; allowed: one of the dataset's columns, {columns}.")
    splits = {split: dataset[split] for split in ("train", "validation", "test") if split in dataset}
    return DatasetDict(splits).map(
        end_rows,
        batched=True,
        remove_columns=columns,
        fn_kwargs={"text_column": args.text_column, "row_end": row_end},
        desc="Reading",
    )


def end_rows(batch: dict[str, list[str]], text_column: str, row_end: str) -> dict[str, list[str]]:
    """Add `row_end` to the rows that do not have it (on the Hub, WikiText's blank lines have lost theirs)."""
    return {"text": [row if row.endswith(row_end) else row + row_end for row in batch[text_column]]}


def hold_out_ends(dataset: DatasetDict, fraction: float) -> DatasetDict:
    """Cut the last `fraction` of every training document off, at a line break where there is one, for validation."""

    def cut(row: dict[str, str]) -> dict[str, str]:
        text = row["text"]
        wanted = round(len(text) * (1 - fraction))
        place = text.rfind("\n", 0, wanted) + 1 or wanted
        return {"text": text[:place], "held_out": text[place:]}

    halves = dataset["train"].map(cut, desc="Holding out")
    validation = halves.remove_columns("text").rename_column("held_out", "text")
    return DatasetDict({**dataset, "train": halves.remove_columns("held_out"), "validation": validation})


def train_tokenizer(text: Dataset, vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on the rows of `text`; it can encode any text and give it back unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    batches = (batch["text"] for batch in text.iter(batch_size=1000))
    tokenizer.train_from_iterator(batches, trainer, length=len(text))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        clean_up_tokenization_spaces=False,
    )


@dataclass(frozen=True)
class TokenizedText:
    """A text as one stream of tokens.

    Attributes:
        tokens: token ids `[num_tokens]`, the first of them the end-of-text token that begins the text.
        words: whitespace-separated words plus one end per row (a text file is one row), the count by which perplexities
            per word are published: 245,569 for WikiText's test split.
    """

    tokens: np.ndarray
    words: int


def tokenize(text: Dataset, tokenizer: PreTrainedTokenizerBase) -> TokenizedText:
    """Encode the rows of `text`, in order; `datasets` caches the result on disk."""
    encoded = text.map(
        encode_rows,
        batched=True,
        remove_columns=text.column_names,
        features=Features({"tokens": List(Value("int32")), "words": Value("int32")}),
        fn_kwargs={"tokenizer": tokenizer},
        desc="Tokenizing",
    )
    rows = [chunk.flatten().to_numpy() for chunk in encoded.data.column("tokens").chunks]
    first = np.array([tokenizer.bos_token_id], dtype=np.int32)
    return TokenizedText(np.concatenate([first, *rows]), sum(encoded["words"]))


def encode_rows(batch: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase) -> dict[str, list]:
    """Tokens and word counts of a batch of rows."""
    words = [len(row.removesuffix(END_OF_TEXT).split()) + 1 for row in batch["text"]]
    return {"tokens": tokenizer(batch["text"])["input_ids"], "words": words}


class TextStreams(torch.utils.data.Dataset):
    """A text dealt to `rows` streams of equal length, cut into segments of at most `segment_size` tokens.

    Examples are ordered by segment, then by row: read in order in batches of `rows`, row i of a batch continues row i
    of the batch before. Every token but the very first is a target exactly once.

    Args:
        text: the text.
        rows: number of streams.
        segment_size: tokens of a segment.
        document_start: the token that begins a document.
    """

    def __init__(self, text: TokenizedText, rows: int, segment_size: int, document_start: int) -> None:
        self.text = text
        self.rows = rows
        self.segment_size = segment_size
        self.document_start = document_start
        self.num_targets = len(text.tokens) - 1
        self.row_length = math.ceil(self.num_targets / rows)

    @classmethod
    def blocks(cls, text: TokenizedText, block_size: int, document_start: int) -> "TextStreams":
        """As many streams as it takes for each of them to be one block."""
        rows = math.ceil((len(text.tokens) - 1) / block_size)
        return cls(text, rows, block_size, document_start)

    def __len__(self) -> int:
        return math.ceil(self.row_length / self.segment_size) * self.rows

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Inputs, targets and positions within the document, each `[T]` with T at most `segment_size`."""
        segment, row = divmod(index, self.rows)
        offset = segment * self.segment_size
        first = row * self.row_length + offset
        last = min(first + self.segment_size, (row + 1) * self.row_length, self.num_targets)
        window = self.text.tokens[first : last + 1]
        return {
            "input_ids": window[:-1],
            "shift_labels": window[1:],
            "position_ids": self._positions(window[:-1], offset),
        }

    def _positions(self, inputs: np.ndarray, offset: int) -> np.ndarray:
        # Counted from the document's start if the stream has met one, else from the stream's own: in either case 0,
        # which clears the state, is where the memory has to begin empty.
        steps = np.arange(len(inputs))
        starts = np.where(inputs == self.document_start, steps, -offset)
        return steps - np.maximum.accumulate(starts)


def collate(examples: list[dict[str, np.ndarray]], padding: int) -> dict[str, Tensor]:
    """A batch, `[B, T]` each, padded at the right to the longest example.

    `labels` are the inputs, as everywhere in transformers; the loss is taken on `shift_labels`, which also hold the
    token after the last input.
    """
    filler = {"input_ids": padding, "labels": IGNORED_LABEL, "shift_labels": IGNORED_LABEL, "position_ids": 1}
    examples = [{**example, "labels": example["input_ids"]} for example in examples]
    longest = max(len(example["input_ids"]) for example in examples)
    batch: dict[str, Any] = {}
    for name, fill in filler.items():
        rows = np.full((len(examples), longest), fill, dtype=np.int64)
        for row, example in zip(rows, examples, strict=True):
            row[: len(example[name])] = example[name]
        batch[name] = torch.from_numpy(rows)
    return batch
