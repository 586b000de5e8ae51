"""Token streams cut into training examples: blocks, streams that carry their state on, and text that is streamed."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.utils.data
from datasets import IterableDataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .data import TokenizedText

IGNORED_LABEL = -100
ROWS_AT_ONCE = 1000


class TextStreams(torch.utils.data.Dataset):
    """A text dealt to `rows` streams of equal length, cut into segments of at most `segment_size` tokens.

    Examples are ordered by segment, then by row: read in order in batches of `rows`, row i of a batch continues row i
    of the batch before. Every token but the very first is a target exactly once.

    Args:
        text: the text.
        rows: number of streams.
        segment_size: tokens of a segment.
        document_start: the token that begins a document.
        places: positions in a document, or in a stream before its first document, by which an evaluation tells the
            loss apart.
    """

    def __init__(
        self, text: TokenizedText, rows: int, segment_size: int, document_start: int, places: tuple[int, ...] = ()
    ) -> None:
        self.text = text
        self.rows = rows
        self.segment_size = segment_size
        self.document_start = document_start
        self.places = places
        self.num_targets = len(text.tokens) - 1
        self.row_length = math.ceil(self.num_targets / rows)

    @classmethod
    def blocks(
        cls, text: TokenizedText, block_size: int, document_start: int, places: tuple[int, ...] = ()
    ) -> "TextStreams":
        """As many streams as it takes for each of them to be one block."""
        rows = math.ceil((len(text.tokens) - 1) / block_size)
        return cls(text, rows, block_size, document_start, places)

    @property
    def are_blocks(self) -> bool:
        """Whether every stream is one segment, so that no row goes on from another."""
        return self.row_length <= self.segment_size

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
        return positions(inputs, self.document_start, -offset)


class StreamedBlocks(torch.utils.data.IterableDataset):
    """Blocks of a text that is read, tokenized and shuffled while training goes on, and never kept as a whole.

    After the last block it begins again: a run ends with its number of steps. Blocks are drawn from a buffer: an
    example is a random one of the `buffer_size` blocks at hand, whose place the next one takes. The order depends on
    `seed` and the number of the pass alone.

    Args:
        text: rows with the column `text`.
        tokenizer: encodes them.
        block_size: tokens of a block.
        buffer_size: blocks of the buffer; 1 for no shuffling.
        seed: of the order.
    """

    def __init__(
        self, text: IterableDataset, tokenizer: PreTrainedTokenizerBase, block_size: int, buffer_size: int, seed: int
    ) -> None:
        self.text = text
        self.tokenizer = tokenizer
        self.block_size = block_size
        self.buffer_size = buffer_size
        self.seed = seed

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        for number in itertools.count():
            yield from self.one_pass(number)

    def one_pass(self, number: int) -> Iterator[dict[str, np.ndarray]]:
        """The blocks of the text, once."""
        random = np.random.default_rng((self.seed, number))
        buffer: list[dict[str, np.ndarray]] = []
        for block in self._blocks():
            if len(buffer) < self.buffer_size:
                buffer.append(block)
                continue
            place = random.integers(self.buffer_size)
            yield buffer[place]
            buffer[place] = block
        yield from (buffer[place] for place in random.permutation(len(buffer)))

    def _blocks(self) -> Iterator[dict[str, np.ndarray]]:
        start = self.tokenizer.bos_token_id
        waiting = np.array([start], dtype=np.int32)
        for rows in self.text.iter(batch_size=ROWS_AT_ONCE):
            encoded = self.tokenizer(rows["text"])["input_ids"]
            waiting = np.concatenate([waiting, *(np.array(tokens, dtype=np.int32) for tokens in encoded)])
            whole = (len(waiting) - 1) // self.block_size * self.block_size
            for first in range(0, whole, self.block_size):
                yield self._example(waiting[first : first + self.block_size + 1])
            waiting = waiting[whole:]
        if len(waiting) > 1:
            yield self._example(waiting)

    def _example(self, window: np.ndarray) -> dict[str, np.ndarray]:
        return {
            "input_ids": window[:-1],
            "shift_labels": window[1:],
            "position_ids": positions(window[:-1], self.tokenizer.bos_token_id, 0),
        }


def positions(inputs: np.ndarray, document_start: int, stream_start: int) -> np.ndarray:
    """Position of every token within its document, which began at step `stream_start` if not within `inputs`."""
    steps = np.arange(len(inputs))
    starts = np.where(inputs == document_start, steps, stream_start)
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
