"""Memory files of visitors: written for a download, read with distrust."""

from pathlib import Path

import torch
from transformers.cache_utils import Cache

from hf_engram import EnnConfig, load_memory, save_memory

from .memories import state_layers, tokens_seen


def write_memory_file(memory: Cache, config: EnnConfig, folder: Path) -> Path:
    """Write `memory` into `folder`, under a name that says how much it has read."""
    path = folder / f"memory-after-{tokens_seen(memory)}-tokens.safetensors"
    save_memory(memory, path, config)
    return path


def read_memory_file(path: Path, config: EnnConfig) -> Cache:
    """The memory in an uploaded file, which is deleted.

    Raises:
        ValueError: it is not the memory file of one text for this architecture; the message says why.
    """
    try:
        memory = load_memory(path, config)
    except ValueError as error:
        # The path on the server is nobody's business.
        reason = str(error).replace(repr(str(path)), f"{path.name!r}")
        raise ValueError(f"This memory was not loaded. {reason}") from error
    finally:
        path.unlink(missing_ok=True)
    states = [layer.state for layer in state_layers(memory)]
    if any(state is None or len(state[0]) != 1 for state in states):
        raise ValueError(f"This memory was not loaded. {path.name!r} is not the memory of one text.")
    if not all(torch.isfinite(value).all() for state in states for value in state):
        raise ValueError(f"This memory was not loaded. {path.name!r} holds values that are not finite numbers.")
    if tokens_seen(memory) < 1:
        raise ValueError(f"This memory was not loaded. {path.name!r} does not say how many tokens it has read.")
    return memory
