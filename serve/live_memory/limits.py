"""Every limit of the page, in one place."""

from dataclasses import dataclass

MAX_SEED = 2**32 - 1


@dataclass(frozen=True)
class Limits:
    """What visitors may ask for, and what is kept for them.

    Attributes:
        prompt_tokens: length of a prompt.
        new_tokens: length of a continuation.
        api_tokens: length of prompt and continuation together in an answer of the API.
        concurrent_runs: runs that the model works on at the same time; further ones wait in the queue.
        queued_runs: runs that may wait; whoever comes then is told to try again.
        visitors: how many have a memory on the server; the one who has been idle for longest gives theirs up.
        choices: visitors without a memory on the server whose choice of a model is remembered, as their page shows it.
        forks: copies of the memory that a visitor may keep.
        upload_bytes: size of a memory file or an image.
        models: checkpoints kept in the server's memory.
        packets_per_second: how often a browser is sent tokens; tokens written faster than that travel together.
        candidates: tokens that are named, with their probabilities, beside the one that was chosen.
    """

    prompt_tokens: int = 4096
    new_tokens: int = 2000
    api_tokens: int = 1024
    concurrent_runs: int = 4
    queued_runs: int = 28
    visitors: int = 100
    choices: int = 10_000
    forks: int = 6
    upload_bytes: int = 64 * 2**20
    models: int = 3
    packets_per_second: int = 25
    candidates: int = 5
