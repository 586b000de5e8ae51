"""WikiText as one would write it."""

import os
from itertools import chain
from pathlib import Path

import pytest
from datasets import load_dataset

from train.data import DataArguments, load_text, tokenize
from train.detokenize import detokenize
from train.vocabulary import train_tokenizer

ARTICLES = Path(__file__).parents[1] / "fixtures" / "articles"


def marks(text):
    """What detokenizing may not touch."""
    return "".join(text.replace("@-@", "-").replace("@,@", ",").replace("@.@", ".").split())


@pytest.mark.parametrize(
    ("row", "written"),
    [
        (" = = Early life = = \n", "== Early life ==\n"),
        (" = The band 's tour ( 1994 ) = \n", "= The band's tour (1994) =\n"),
        (" It was , as he said , over . \n", "It was, as he said, over.\n"),
        (" a well @-@ known 1 @,@ 500 @.@ 5 m ( 4 @,@ 922 ft ) wall ; \n", "a well-known 1,500.5 m (4,922 ft) wall;\n"),
        (' He called it " a gem " , and " the best [ one ] . " \n', 'He called it "a gem", and "the best [one]."\n'),
        (
            " the city 's walls , the pupils ' hall ; they didn 't \n",
            "the city's walls, the pupils' hall; they didn't\n",
        ),
        (" about 50 % of £ 3 and $ 4 \n", "about 50% of £3 and $4\n"),
        (' one " mark alone \n', 'one " mark alone\n'),
        (" = 3 is a number \n", "= 3 is a number\n"),
        ("", ""),
        (" \n", "\n"),
    ],
)
def test_rows_as_one_would_write_them(row, written):
    assert detokenize(row) == written


def test_a_row_that_is_written_like_this_already_stays_as_it_is():
    written = 'The city\'s walls (1,500 m), well-known, were "a gem".\n'
    assert detokenize(written) == written


def test_nothing_but_spaces_and_marks_of_the_tokenizer_is_taken_out():
    rows = (ARTICLES / "train.txt").read_text().splitlines(keepends=True)
    assert [marks(detokenize(row)) for row in rows] == [marks(row) for row in rows]


@pytest.mark.data
def test_nothing_else_is_taken_out_of_wikitext():
    splits = load_dataset(str(Path(os.environ["HF_ENGRAM_DATA"], "wikitext")), "wikitext-2-raw-v1")
    rows = list(chain.from_iterable(split["text"] for split in splits.values()))
    assert [marks(detokenize(row)) for row in rows] == [marks(row) for row in rows]


def test_detokenized_text_is_read_and_its_words_are_counted_as_published():
    plain, written = (
        load_text(DataArguments(dataset_name=str(ARTICLES), detokenized=detokenized)) for detokenized in (False, True)
    )
    assert written["test"]["text"] == [detokenize(row) for row in plain["test"]["text"]] != plain["test"]["text"]
    tokenizer = train_tokenizer(written["train"], vocab_size=300)
    of_plain, of_written = tokenize(plain["test"], tokenizer), tokenize(written["test"], tokenizer)
    assert of_written.words == of_plain.words
    assert len(of_written.tokens) < len(of_plain.tokens)


def test_files_are_read_as_they_are():
    with pytest.raises(ValueError, match="detokenized is True; allowed: False, with train_files"):
        DataArguments(train_files=["a.txt"], detokenized=True)
