"""Text for language modelling: loading and encoding.

A text becomes one stream of tokens. It begins with the end-of-text token, from which its first token is predicted, and
every row of the dataset is followed by its end: a newline where rows are lines of one running text (WikiText), the
end-of-text token where every row is a document (stories, files). Nothing else is added or removed, so the tokens of a
line-wise dataset decode to its text, byte for byte; unless it is to be detokenized (`detokenize`).
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, Features, IterableDataset, List, Value, load_dataset
from transformers import PreTrainedTokenizerBase

from hf_engram.hub import DataSource

from .arguments import require
from .detokenize import detokenize
from .sources import dataset_source
from .vocabulary import END_OF_TEXT, SMALLEST_VOCABULARY

ROW_KINDS = ("lines", "documents")
MODES = ("blocks", "streams")
HELD_OUT = ("validation", "test")


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
    detokenized: bool = field(
        default=False,
        metadata={
            "help": "Undo the spaces that WikiText has around punctuation. Words are counted before, as published."
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
    tokenizer: str = field(
        default="bpe",
        metadata={
            "help": "'bpe': byte-level BPE, trained on the text. 'words': every lower-cased word of all splits is a "
            "token, as in the paper. Else the tokenizer of a model: a local folder, or a name on the Hub."
        },
    )
    vocab_size: int = field(
        default=8192, metadata={"help": f"Tokens of the BPE tokenizer; {SMALLEST_VOCABULARY} or more."}
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
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read the train split while training, for text that fits on no disk; with mode blocks and "
            "max_steps. Without it, the tokens are kept on disk and never in memory as a whole."
        },
    )
    shuffle_buffer: int = field(default=10_000, metadata={"help": "Blocks among which streaming shuffles."})
    data_license: str | None = field(default=None, metadata={"help": "Licence of the text, for the model card."})
    language: str | None = field(default=None, metadata={"help": "Code of its language (en), for the model card."})

    def __post_init__(self) -> None:
        if (self.dataset_name is None) == (self.train_files is None):
            raise ValueError(
                f"dataset_name is {self.dataset_name!r}, train_files is {self.train_files!r}: give exactly one of them."
            )
        if self.dataset_name is not None and (self.validation_files or self.test_files):
            raise ValueError("validation_files and test_files go with train_files; a dataset brings its own splits.")
        require(self, "detokenized", not self.detokenized or self.dataset_name is not None, "False, with train_files")
        require(self, "rows", self.rows in ROW_KINDS, f"one of {ROW_KINDS}")
        require(self, "mode", self.mode in MODES, f"one of {MODES}")
        require(self, "shuffle_buffer", self.shuffle_buffer >= 1, "a positive integer")
        require(self, "block_size", self.block_size >= 1, "a positive integer")
        require(self, "vocab_size", self.vocab_size >= SMALLEST_VOCABULARY, f"{SMALLEST_VOCABULARY} or more")
        require(self, "validation_fraction", 0 < self.validation_fraction < 1, "between 0 and 1")

        if self.streaming:
            require(self, "mode", self.mode == "blocks", "'blocks', with streaming")
            require(self, "tokenizer", self.tokenizer != "words", "'bpe' or a model's, with streaming")
            require(self, "train_files", self.train_files is None, "None (a dataset_name), with streaming")

    def source(self) -> DataSource:
        """The text as the model card names it."""
        if self.dataset_name is None:
            return DataSource(", ".join(self.train_files), self.data_license)
        return dataset_source(self.dataset_name, self.dataset_config, self.data_license)


def load_text(args: DataArguments) -> dict[str, Dataset | IterableDataset]:
    """Load the text with two columns: `text`, whose rows carry their end, and how many `words` a row has.

    Returns:
        splits "train" (an `IterableDataset` with `args.streaming`), "validation" and, where there is one, "test".

    Raises:
        ValueError: the dataset lacks a split or the text column.
    """
    if args.dataset_name is not None:
        dataset = load_dataset(args.dataset_name, args.dataset_config, streaming=args.streaming)
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
    columns = dataset["train"].column_names or list(next(iter(dataset["train"])))
    if args.text_column not in columns:
        raise ValueError(f"text_column is {args.text_column!r}; allowed: one of the dataset's columns, {columns}.")
    options = {
        "batched": True,
        "remove_columns": columns,
        "fn_kwargs": {"text_column": args.text_column, "row_end": row_end, "detokenized": args.detokenized},
    }
    if not args.streaming:
        options["desc"] = "Reading"
    splits = {split: dataset[split].map(finish_rows, **options) for split in ("train", *HELD_OUT) if split in dataset}
    if args.streaming:
        splits |= {split: Dataset.from_list(list(splits[split])) for split in HELD_OUT if split in splits}
    return splits


def finish_rows(batch: dict[str, list[str]], text_column: str, row_end: str, detokenized: bool) -> dict[str, list]:
    """The rows, with `row_end` where they do not have it (on the Hub, WikiText's blank lines have lost theirs), and
    their words."""
    rows = [row.removesuffix(row_end) for row in batch[text_column]]
    words = [len(row.split()) + 1 for row in rows]
    return {"text": [(detokenize(row) if detokenized else row) + row_end for row in rows], "words": words}


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


@dataclass(frozen=True)
class TokenizedText:
    """A text as one stream of tokens.

    Attributes:
        tokens: token ids `[num_tokens]`, the first of them the end-of-text token that begins the text.
        words: whitespace-separated words of the dataset plus one end per row (a text file is one row), the count by
            which perplexities per word are published: 245,569 for WikiText's test split.
    """

    tokens: np.ndarray
    words: int


def tokenize(text: Dataset, tokenizer: PreTrainedTokenizerBase) -> TokenizedText:
    """Encode the rows of `text`, in order.

    The tokens are kept in a file beside the text's own in the cache of `datasets`, made once, and mapped into memory;
    those of a text that is in memory stay there.
    """
    encoded = text.map(
        encode_rows,
        batched=True,
        remove_columns=text.column_names,
        features=Features({"tokens": List(Value("int32"))}),
        fn_kwargs={"tokenizer": tokenizer},
        desc="Tokenizing",
    )
    words = pc.sum(text.data.column("words")).as_py()
    column = encoded.data.column("tokens")
    if not encoded.cache_files:
        tokens = np.empty(1 + token_count(column), dtype=np.int32)
        fill(tokens, column, tokenizer.bos_token_id)
        return TokenizedText(tokens, words)
    path = Path(encoded.cache_files[0]["filename"]).with_suffix(".npy")
    if not path.exists():
        partial = path.with_suffix(f".{os.getpid()}.partial")
        tokens = np.lib.format.open_memmap(partial, "w+", np.int32, (1 + token_count(column),))
        fill(tokens, column, tokenizer.bos_token_id)
        tokens.flush()
        partial.replace(path)
    return TokenizedText(np.load(path, mmap_mode="r"), words)


def token_count(column: pa.ChunkedArray) -> int:
    """Number of tokens of all rows."""
    return pc.sum(pc.list_value_length(column)).as_py()


def fill(tokens: np.ndarray, column: pa.ChunkedArray, first: int) -> None:
    """Write `first` and then the tokens of all rows to `tokens`."""
    tokens[0] = first
    place = 1
    for chunk in column.chunks:
        values = chunk.flatten().to_numpy()
        tokens[place : place + len(values)] = values
        place += len(values)


def encode_rows(batch: dict[str, list], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[list[int]]]:
    """Tokens of a batch of rows."""
    return {"tokens": tokenizer(batch["text"])["input_ids"]}
