"""What is sent to the browser: the memory at the start of a run, then every token's write, to be replayed there.

The write of a token is of rank one, `trace ← kept · trace + share ⊗ content` (see `memories`), so that recall, shares
and content are all the browser needs, a hundredth of the trace. Arrays are little-endian float32 in base64, in
row-major order. M is the number of memories. Every packet is one string: Gradio compares structured values element by
element at every update.
"""

import base64
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers.cache_utils import Cache

from .comparison import Change
from .controls import Settings
from .memories import WatchedMemory, tokens_seen, traces, watched_memories
from .models import LoadedModel
from .streaming import TokenStep


class Feed:
    """Packets as they are sent to one view, numbered from 1: Gradio passes on only a value that is not the last one."""

    def __init__(self) -> None:
        self.sent = 0

    def send(self, packet: dict[str, Any]) -> str:
        """The string for the view."""
        self.sent += 1
        return to_json(packet, self.sent)


def to_json(packet: dict[str, Any], number: int) -> str:
    """A packet as it is sent. Gradio warns of `<script` in the value of a component, even where it is only text."""
    return json.dumps({"number": number, **packet}, separators=(",", ":")).replace("<", "\\u003c")


def encode_array(values: np.ndarray) -> str:
    """An array as base64 of little-endian float32."""
    return base64.b64encode(np.ascontiguousarray(values, "<f4").tobytes()).decode()


def model_packet(loaded: LoadedModel) -> dict[str, Any]:
    """A model that is going to be watched: its sizes, its memories and its classes."""
    config = loaded.model.config
    return {
        "kind": "model",
        "layers": config.num_hidden_layers,
        "slots": config.memory_size,
        "memories": [encode_memory(memory) for memory in watched_memories(loaded.model)],
        "classes": [str(config.id2label[i]) for i in range(config.num_labels)] if loaded.reads == "image" else [],
    }


def encode_memory(memory: WatchedMemory) -> dict[str, Any]:
    """One memory, with its bank `[N, W]`."""
    return {
        "layer": memory.layer,
        "head": memory.head,
        "width": memory.bank.shape[1],
        "scale": memory.scale,
        "clip": memory.clip,
        "averages": memory.averages,
        "bank": encode_array(memory.bank.float().cpu().numpy()),
    }


def run_packet(memory: Cache | None, status: str, erased: int | None = None) -> dict[str, Any]:
    """The memory as it is now: before a run (`status` "running"), or on its own ("idle").

    Args:
        erased: the run repeats the one before it, but that this token does not write; it is shown beside it.

    `traces` are M arrays, the trace `[N, W]` and, of a mixer's, the mass of its writes `[N]`; `None` for zeros.
    """
    seen = tokens_seen(memory)
    return {
        "kind": "run",
        "status": status,
        "erased": erased,
        "tokens_seen": seen,
        "traces": encode_traces(memory) if memory is not None and seen else None,
    }


def encode_traces(memory: Cache) -> list[str]:
    """Trace and mass of every memory."""
    return [
        encode_array(trace.ravel() if mass is None else np.concatenate([trace.ravel(), mass]))
        for trace, mass in traces(memory)
    ]


def tokens_packet(steps: Sequence[TokenStep], part: int) -> dict[str, Any]:
    """Tokens in the order in which the memory read them.

    Args:
        part: which of these packets of a run it is, from 1, so that the browser notices a gap. (Other packets may come
            from other events, and overtake.)
    """
    return {"kind": "tokens", "part": part, "tokens": [encode_step(step) for step in steps]}


def encode_step(step: TokenStep) -> dict[str, Any]:
    """A token with what all memories recalled and wrote; settings only where they are not the usual ones."""
    encoded = {
        "text": step.text,
        "is_prompt": step.is_prompt,
        "memories": encode_array(step.memories),
    }
    if step.probability is not None:
        encoded["probability"] = round(step.probability, 5)
        encoded["candidates"] = [[text, round(probability, 5)] for text, probability in step.candidates]
    if step.remembered is not None:
        writers = [[index, round(part, 5)] for index, part in step.remembered.writers]
        encoded["remembered"] = {"probability": round(step.remembered.probability, 5), "writers": writers}
    usual = Settings()._asdict()
    return encoded | {name: value for name, value in step.settings._asdict().items() if value != usual[name]}


def changes_packet(changes: Sequence[Change]) -> dict[str, Any]:
    """The next-token probabilities that an erased write changed most."""
    rows = [[c.index, c.token, round(c.before, 5), round(c.after, 5)] for c in changes]
    return {"kind": "changes", "changes": rows}


def slots_packet(slots_off: Sequence[int]) -> dict[str, Any]:
    """Slots that are switched off from now on."""
    return {"kind": "slots", "slots": list(slots_off)}


def status_packet(status: str, message: str = "") -> dict[str, Any]:
    """How the run is doing: "waiting" before it, "eos", "length" or "stopped" after it, "error" with a sentence."""
    return {"kind": "status", "status": status, "message": message}
