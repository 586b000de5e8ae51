"""Token sequences that ask for what they held before: associative recall, a long gap, copying.

Generators are functions of sizes and a `torch.Generator` alone: the same seed draws the same questions.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

IGNORED = -100  # label of a step that asks nothing
KEYS = range(32)
VALUES = range(32, 64)
NOISE = range(64, 72)
MARK = 72  # after it, what came before is to be copied
VOCAB_SIZE = 73

TRAINING_LENGTH = 32  # steps of a training sequence; of "long_gap", of its longest gap
TRAINING_PAIRS = (1, 2, 4, 8)
TRAINING_SYMBOLS = (4, 8, 12, 16)
MULTIPLES = (1, 2, 4, 8, 16)  # of the longest in training


class Questions(NamedTuple):
    """Sequences and what they ask."""

    inputs: Tensor  # input_ids [B, T] of int64, or inputs_embeds [B, T, I]
    labels: Tensor  # [B, T], int64: the answer to each step, in the same place (not shifted), or IGNORED
    first: int  # the first step that asks, or says that asking begins; all that answers need is before it


Draw = Callable[[int, Generator], Questions]


class Task(NamedTuple):
    """What a model is trained on, and what it is then asked."""

    title: str
    fields: dict[str, Any]  # fields of the model's config
    training: tuple[Draw, ...]  # every batch comes from one of them; the longest is the last
    exams: dict[str, dict[int, Draw]]  # for every way to be difficult, a draw for each of its values
    answers: int  # answers to choose from, each as likely as the others


def token_tasks() -> dict[str, Task]:
    """The tasks of this file by name."""
    fields = {"vocab_size": VOCAB_SIZE}
    lengths = [TRAINING_LENGTH * multiple for multiple in MULTIPLES]
    pairs = [*TRAINING_PAIRS, 2 * TRAINING_PAIRS[-1]]
    gaps = [TRAINING_LENGTH // 4, TRAINING_LENGTH // 2, TRAINING_LENGTH]
    symbols = [*TRAINING_SYMBOLS[:2], *(TRAINING_SYMBOLS[-1] * multiple for multiple in MULTIPLES)]
    return {
        "mqar": Task(
            f"Multi-query associative recall, trained on {TRAINING_LENGTH} steps with up to {TRAINING_PAIRS[-1]} pairs",
            fields,
            tuple(partial(mqar, pairs=count, length=TRAINING_LENGTH) for count in TRAINING_PAIRS),
            {
                # What does not fit gets twice the length.
                "pairs": {count: partial(mqar, pairs=count, length=max(TRAINING_LENGTH, 4 * count)) for count in pairs},
                "steps, with 8 pairs": {length: partial(mqar, pairs=8, length=length) for length in lengths},
            },
            len(VALUES),
        ),
        "long_gap": Task(
            f"A long gap, trained on gaps of up to {TRAINING_LENGTH} steps with up to {TRAINING_PAIRS[-1]} pairs",
            fields,
            tuple(partial(long_gap, pairs=count, gap=gap) for gap in gaps for count in TRAINING_PAIRS),
            {
                "pairs": {count: partial(long_gap, pairs=count, gap=TRAINING_LENGTH) for count in pairs},
                "steps of the gap, with 4 pairs": {gap: partial(long_gap, pairs=4, gap=gap) for gap in lengths},
            },
            len(VALUES),
        ),
        "copying": Task(
            f"Copying, trained on up to {TRAINING_SYMBOLS[-1]} symbols",
            fields,
            tuple(partial(copying, symbols=count) for count in TRAINING_SYMBOLS),
            {"symbols": {count: partial(copying, symbols=count) for count in symbols}},
            len(VALUES),
        ),
    }


def mqar(rows: int, generator: Generator, pairs: int, length: int) -> Questions:
    """Multi-query associative recall (Zoology, Arora et al., arXiv 2312.04927).

    Pairs of a key and its value, then noise in which every key comes once more, at random steps: these ask for the
    value. Zoology draws the gaps from a power law and hides keys among other keys and values; here steps are drawn
    evenly, and noise has tokens of its own.

    Args:
        rows: sequences B.
        pairs: pairs of a sequence, each with another key.
        length: steps T, at least 3 * pairs.

    Raises:
        ValueError: so many pairs do not fit.
    """
    _check_pairs(pairs)
    if length < 3 * pairs:
        raise ValueError(f"length is {length}; allowed: at least {3 * pairs}, 3 * pairs.")
    context, keys, values = _context(rows, pairs, generator)
    rest = _draw(NOISE, (rows, length - 2 * pairs), generator)
    steps = _distinct(rows, pairs, rest.shape[1], generator)
    labels = torch.full((rows, length), IGNORED)
    labels[:, 2 * pairs :].scatter_(1, steps, values)
    return Questions(torch.cat([context, rest.scatter(1, steps, keys)], 1), labels, 2 * pairs)


def long_gap(rows: int, generator: Generator, pairs: int, gap: int) -> Questions:
    """Pairs of a key and its value, `gap` steps of noise, then every key once more, in another order.

    Args:
        rows: sequences B, of 3 * pairs + gap steps.
        pairs: pairs of a sequence, each with another key.
        gap: steps of noise.

    Raises:
        ValueError: there are not so many keys.
    """
    _check_pairs(pairs)
    context, keys, values = _context(rows, pairs, generator)
    noise = _draw(NOISE, (rows, gap), generator)
    order = _distinct(rows, pairs, pairs, generator)
    unasked = torch.full((rows, 2 * pairs + gap), IGNORED)
    return Questions(
        torch.cat([context, noise, keys.gather(1, order)], 1),
        torch.cat([unasked, values.gather(1, order)], 1),
        2 * pairs + gap,
    )


def copying(rows: int, generator: Generator, symbols: int) -> Questions:
    """Random symbols, a mark, and the same symbols again (Jelassi et al., arXiv 2402.01032).

    As when a language model writes the copy, each step of it reads the symbol before and asks for the next one.

    Args:
        rows: sequences B, of 2 * symbols steps.
        symbols: how many; they may repeat.
    """
    text = _draw(VALUES, (rows, symbols), generator)
    unasked = torch.full((rows, symbols), IGNORED)
    mark = torch.full((rows, 1), MARK)
    return Questions(torch.cat([text, mark, text[:, :-1]], 1), torch.cat([unasked, text], 1), symbols)


def _check_pairs(pairs: int) -> None:
    if not 1 <= pairs <= len(KEYS):
        raise ValueError(f"pairs is {pairs}; allowed: 1 to {len(KEYS)}.")


def _context(rows: int, pairs: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Key, value, key, value... `[B, 2 * pairs]`, and both alone, `[B, pairs]`."""
    keys = KEYS.start + _distinct(rows, pairs, len(KEYS), generator)
    values = _draw(VALUES, (rows, pairs), generator)
    return torch.stack([keys, values], 2).flatten(1), keys, values


def _draw(tokens: range, shape: tuple[int, int], generator: Generator) -> Tensor:
    return torch.randint(tokens.start, tokens.stop, shape, generator=generator)


def _distinct(rows: int, count: int, among: int, generator: Generator) -> Tensor:
    """`count` different numbers below `among` in random order, `[B, count]`."""
    return torch.rand(rows, among, generator=generator).argsort(1)[:, :count]
