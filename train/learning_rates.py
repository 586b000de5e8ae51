"""The search for a model's own learning rate, the same for all models of a comparison."""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

MOST_RATES_BEYOND = 3
Score = TypeVar("Score")


def search(
    grid: Sequence[float], score: Callable[[float], Score], best: Callable[[dict[float, Score]], float]
) -> dict[float, Score]:
    """Scores of all rates of a grid, and of rates beyond it.

    Where the best rate is the lowest or the highest of the grid the search goes on beyond it, in steps as wide, until a
    rate is worse, at most `MOST_RATES_BEYOND` times.

    Args:
        grid: learning rates, in any order.
        score: makes a run with a rate.
        best: the best rate of those that have a score.

    Returns:
        the scores by rate, from the lowest on.
    """
    scores = {rate: score(rate) for rate in grid}
    for _ in range(MOST_RATES_BEYOND):
        rate = rate_beyond(scores, best(scores))
        if rate is None:
            break
        scores[rate] = score(rate)
    return dict(sorted(scores.items()))


def rate_beyond(rates: Iterable[float], best: float) -> float | None:
    """The rate next to try if the best of those tried is the lowest or the highest of several, else `None`."""
    ordered = sorted(rates)
    if len(ordered) < 2 or best not in (ordered[0], ordered[-1]):
        return None
    neighbour = ordered[1] if best == ordered[0] else ordered[-2]
    return float(f"{best * best / neighbour:g}")
