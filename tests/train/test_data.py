import os
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset

from train.data import DataArguments, TokenizedText, load_text, tokenize
from train.streams import IGNORED_LABEL, StreamedBlocks, TextStreams, collate
from train.vocabulary import END_OF_TEXT, train_tokenizer, word_tokenizer

ARTICLES = Path("tests/fixtures/articles")
TEXTS = Path("tests/fixtures/texts")
START = 0


def counting(num_tokens, documents_at=(0,)):
    """Tokens 1, 2, 3, …, with the document start token (0) at the places given."""
    tokens = np.arange(num_tokens, dtype=np.int32)
    tokens[list(documents_at)] = START
    return TokenizedText(tokens, words=num_tokens)


def batches(dataset):
    """All batches of `dataset.rows` examples, in order."""
    indices = range(len(dataset))
    return [collate([dataset[i] for i in indices[k : k + dataset.rows]], padding=0) for k in indices[:: dataset.rows]]


def test_tokens_of_lines_decode_to_the_file_byte_for_byte():
    text = load_text(DataArguments(dataset_name=str(ARTICLES)))
    tokenizer = train_tokenizer(text["train"], vocab_size=300)
    for split in ("train", "validation", "test"):
        tokens = tokenize(text[split], tokenizer).tokens
        assert tokens[0] == tokenizer.bos_token_id
        assert tokenizer.decode(tokens[1:]) == (ARTICLES / f"{split}.txt").read_text()


def test_words_are_counted_as_wikitext_counts_them():
    text = load_text(DataArguments(dataset_name=str(ARTICLES)))
    tokenizer = train_tokenizer(text["train"], vocab_size=300)
    lines = (ARTICLES / "test.txt").read_text().splitlines()
    assert tokenize(text["test"], tokenizer).words == sum(len(line.split()) + 1 for line in lines)


def test_text_files_are_documents_and_their_ends_are_held_out():
    text = load_text(DataArguments(train_files=[str(TEXTS / "*.txt")], validation_fraction=0.2))
    files = sorted(TEXTS.glob("*.txt"))
    assert set(text) == {"train", "validation"}
    for file, train, validation in zip(files, text["train"]["text"], text["validation"]["text"], strict=True):
        train, validation = train.removesuffix(END_OF_TEXT), validation.removesuffix(END_OF_TEXT)
        assert train + validation == file.read_text()
        assert train.endswith("\n")
        assert 0.2 <= len(validation) / len(file.read_text()) < 0.3


def test_validation_and_test_files_of_their_own():
    harbour, clockmaker = str(TEXTS / "harbour.txt"), str(TEXTS / "clockmaker.txt")
    args = DataArguments(train_files=[harbour], validation_files=[clockmaker], test_files=[clockmaker])
    text = load_text(args)
    assert text["train"]["text"] == [Path(harbour).read_text() + END_OF_TEXT]
    assert text["validation"]["text"] == text["test"]["text"] == [Path(clockmaker).read_text() + END_OF_TEXT]


def test_every_document_ends_with_the_end_of_text_token():
    text = load_text(DataArguments(dataset_name=str(ARTICLES), rows="documents"))
    tokenizer = train_tokenizer(text["train"], vocab_size=300)
    tokens = tokenize(text["test"], tokenizer).tokens
    assert (tokens == tokenizer.eos_token_id).sum() == 1 + len(text["test"])
    assert tokens[-1] == tokenizer.eos_token_id


def test_the_tokenizer_encodes_any_text_and_knows_its_special_tokens(tmp_path):
    text = load_text(DataArguments(dataset_name=str(ARTICLES)))
    tokenizer = train_tokenizer(text["train"], vocab_size=300)
    strange = "  naïve \n\n\t 引擎 🙂 \x00"
    assert tokenizer.decode(tokenizer(strange)["input_ids"]) == strange
    assert len(tokenizer) == 300
    assert tokenizer.bos_token == tokenizer.eos_token == END_OF_TEXT != tokenizer.pad_token


def test_tokens_are_cached_on_disk(datasets_cache):
    def prepare():
        text = load_text(DataArguments(dataset_name=str(ARTICLES)))
        tokenize(text["train"], train_tokenizer(text["train"], vocab_size=310))
        return {file: file.stat().st_mtime_ns for file in datasets_cache.rglob("*.arrow")}

    assert prepare() == prepare()


def test_tokens_are_read_from_disk_and_not_held_in_memory(datasets_cache):
    text = load_text(DataArguments(dataset_name=str(ARTICLES)))
    tokenizer = train_tokenizer(text["train"], vocab_size=300)
    tokens = tokenize(text["train"], tokenizer).tokens
    assert isinstance(tokens, np.memmap)
    assert Path(tokens.filename).is_relative_to(datasets_cache)
    in_memory = tokenize(Dataset.from_list(list(text["train"])), tokenizer).tokens
    assert not isinstance(in_memory, np.memmap)
    assert np.array_equal(tokens, in_memory)


def test_word_tokens_are_the_lower_cased_words_of_all_splits_in_alphabetical_order():
    text = load_text(DataArguments(dataset_name=str(ARTICLES)))
    tokenizer = word_tokenizer(text.values())
    words = {word for split in text.values() for row in split["text"] for word in row.lower().split()}
    first = len(tokenizer) - len(words)
    assert tokenizer.convert_ids_to_tokens(range(first, len(tokenizer))) == sorted(words)
    assert tokenizer.tokenize("The river unheard-of") == ["the", "river", "<unk>"]


def streamed(**kwargs):
    args = DataArguments(dataset_name=str(ARTICLES), streaming=True)
    text = load_text(args)
    tokenizer = train_tokenizer(text["validation"], vocab_size=300)
    return StreamedBlocks(
        text["train"], tokenizer, **{"block_size": 16, "buffer_size": 1, "seed": 0, **kwargs}
    ), tokenizer


def test_streamed_blocks_are_those_of_the_whole_text():
    blocks, tokenizer = streamed()
    text = load_text(DataArguments(dataset_name=str(ARTICLES)))
    whole = TextStreams.blocks(tokenize(text["train"], tokenizer), 16, tokenizer.bos_token_id)
    blocks = iter(blocks)
    for index in [*range(len(whole)), *range(len(whole))]:  # it begins again after the last
        block = next(blocks)
        for name, values in whole[index].items():
            assert np.array_equal(block[name], values), name


def test_streamed_blocks_are_shuffled_by_seed_and_pass():
    def order(number=0, **kwargs):
        return [tuple(block["shift_labels"]) for block in streamed(**kwargs)[0].one_pass(number)]

    in_order, shuffled = order(), order(buffer_size=10)
    orders = [shuffled, order(buffer_size=10, seed=1), order(buffer_size=10, number=1)]
    assert order(buffer_size=10) == shuffled
    assert len({tuple(o) for o in [*orders, in_order]}) == 4
    assert all(sorted(o) == sorted(in_order) for o in orders)


@pytest.mark.parametrize("rows", [1, 3, 7])
def test_streams_continue_from_batch_to_batch(rows):
    text = counting(100)
    dataset = TextStreams(text, rows, segment_size=5, document_start=START)
    inputs = torch.cat([batch["labels"] for batch in batches(dataset)], dim=1)
    targets = torch.cat([batch["shift_labels"] for batch in batches(dataset)], dim=1)
    for row in range(rows):
        valid = inputs[row] != IGNORED_LABEL
        assert (inputs[row][valid].diff() == 1).all()
        assert torch.equal(targets[row][valid], inputs[row][valid] + 1)


@pytest.mark.parametrize("num_tokens", [2, 6, 100, 101])
@pytest.mark.parametrize("cut", ["blocks", "streams"])
def test_every_token_but_the_first_is_a_target_once(num_tokens, cut):
    text = counting(num_tokens)
    if cut == "blocks":
        dataset = TextStreams.blocks(text, 5, document_start=START)
        assert len(dataset) == dataset.rows
    else:
        dataset = TextStreams(text, 4, segment_size=5, document_start=START)
    targets = torch.cat([batch["shift_labels"].flatten() for batch in batches(dataset)])
    targets = targets[targets != IGNORED_LABEL]
    assert targets.sort().values.tolist() == list(range(1, num_tokens))
    assert dataset.num_targets == num_tokens - 1


def test_position_0_marks_where_the_memory_begins_empty():
    text = counting(41, documents_at=(0, 7, 8, 25))
    dataset = TextStreams(text, 2, segment_size=5, document_start=START)
    positions = torch.cat([batch["position_ids"] for batch in batches(dataset)], dim=1)
    assert (positions[0] == 0).nonzero().flatten().tolist() == [0, 7, 8]
    assert (positions[1] == 0).nonzero().flatten().tolist() == [0, 5]
    assert positions[0, 8:10].tolist() == [0, 1]


def test_padding_is_no_target():
    dataset = TextStreams(counting(9), 3, segment_size=5, document_start=START)
    batch = collate([dataset[row] for row in range(3)], padding=99)
    assert batch["input_ids"].tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 99]]
    assert batch["shift_labels"].tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, IGNORED_LABEL]]
    assert batch["labels"].tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, IGNORED_LABEL]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "dataset_name is None, train_files is None: give exactly one"),
        ({"dataset_name": "a", "train_files": ["b"]}, "give exactly one"),
        ({"dataset_name": "a", "test_files": ["b"]}, "test_files go with train_files"),
        ({"dataset_name": "a", "mode": "shuffled"}, "mode is 'shuffled'; allowed: one of \\('blocks', 'streams'\\)"),
        ({"dataset_name": "a", "rows": "words"}, "rows is 'words'; allowed: one of"),
        ({"dataset_name": "a", "block_size": 0}, "block_size is 0; allowed: a positive integer"),
        ({"dataset_name": "a", "vocab_size": 100}, "vocab_size is 100; allowed: 258 or more"),
        ({"dataset_name": "a", "tokenizer": "words", "streaming": True}, "tokenizer is 'words'; allowed: 'bpe' or a"),
        ({"dataset_name": "a", "streaming": True, "mode": "streams"}, "mode is 'streams'; allowed: 'blocks', with str"),
        ({"train_files": ["a"], "streaming": True}, "train_files is .*; allowed: None"),
        ({"dataset_name": "a", "shuffle_buffer": 0}, "shuffle_buffer is 0; allowed: a positive integer"),
        ({"train_files": ["a"], "validation_fraction": 1.0}, "validation_fraction is 1.0; allowed: between 0 and 1"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        DataArguments(**options)


def test_a_dataset_without_the_text_or_a_split_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"text_column is 'body'; allowed: one of the dataset's columns, \['text'\]"):
        load_text(DataArguments(dataset_name=str(ARTICLES), text_column="body"))
    (tmp_path / "train.txt").write_text("one\ntwo\n")
    with pytest.raises(ValueError, match=r"has the splits \['train'\]; \['validation'\] missing"):
        load_text(DataArguments(dataset_name=str(tmp_path)))


@pytest.mark.data
def test_wikitext_2_has_its_published_number_of_words():
    folder = Path(os.environ["HF_ENGRAM_DATA"], "wikitext")
    text = load_text(DataArguments(dataset_name=str(folder), dataset_config="wikitext-2-raw-v1"))
    tokenizer = train_tokenizer(text["validation"], vocab_size=1000)
    published = {"train": 2_088_628, "validation": 217_646, "test": 245_569}
    assert {split: tokenize(text[split], tokenizer).words for split in published} == published
