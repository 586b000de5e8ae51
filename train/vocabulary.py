"""Tokenizers trained on the text at hand."""

from collections.abc import Iterable, Iterator
from itertools import islice

from datasets import Dataset, IterableDataset
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"
UNKNOWN = "<unk>"
SPECIAL_TOKENS = [END_OF_TEXT, PADDING]
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)
ROWS_OF_A_STREAM = 200_000  # as many rows of a streamed text are enough to train a tokenizer on


def train_tokenizer(text: Dataset | IterableDataset, vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on the rows of `text`; it can encode any text and give it back unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    length = len(text) if isinstance(text, Dataset) else None
    tokenizer.train_from_iterator(batches_of_rows(text), trainer, length=length)
    return finished(tokenizer)


def word_tokenizer(texts: Iterable[Dataset]) -> PreTrainedTokenizerFast:
    """Every lower-cased, whitespace-separated word of `texts` is a token, in alphabetical order, as in the paper.

    The end of a line is no word and is lost.
    """
    words = sorted({word for text in texts for rows in batches_of_rows(text) for row in rows for word in split(row)})
    vocabulary = dict.fromkeys([*SPECIAL_TOKENS, UNKNOWN, *words])
    numbered = {word: index for index, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(numbered, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL_TOKENS])
    return finished(tokenizer, unk_token=UNKNOWN)


def split(row: str) -> list[str]:
    """The words of a row."""
    return row.removesuffix(END_OF_TEXT).lower().split()


def batches_of_rows(text: Dataset | IterableDataset) -> Iterator[list[str]]:
    """The rows of `text`, the first ones only of a text that is streamed."""
    batches = (batch["text"] for batch in text.iter(batch_size=1000))
    return batches if isinstance(text, Dataset) else islice(batches, ROWS_OF_A_STREAM // 1000)


def finished(tokenizer: Tokenizer, **special_tokens: str) -> PreTrainedTokenizerFast:
    """The tokenizer as transformers uses it."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        clean_up_tokenization_spaces=False,
        **special_tokens,
    )
