"""Which token a caller means by a number."""


def resolve_step(step: int, tokens: int) -> int:
    """The place, from 0, of token `step` of so many; negative steps count from the end.

    Raises:
        IndexError: there is no such token.
    """
    if not -tokens <= step < tokens:
        raise IndexError(f"step is {step}; allowed: {-tokens} to {tokens - 1}, there are {tokens} tokens.")
    return step % tokens
