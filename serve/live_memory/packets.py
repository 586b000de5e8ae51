"""What is sent to the browser: the trace at the start of a run, then every token's write, to be replayed there.

The write of a token is of rank one, `trace ← (1 - η) trace + η recall ⊗ encoding`, so that recall and encoding are
all the browser needs, a hundredth of the trace. Arrays are little-endian float32 in base64, in row-major order.
"""

import base64
import json
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from transformers.cache_utils import Cache

from hf_engram import EnnConfig
from hf_engram.cache_enn import EnnCacheLayer

from .streaming import TokenStep


def to_json(packet: dict[str, Any], number: int) -> str:
    """A packet as it is sent. `number` grows by one from packet to packet of a session."""
    return json.dumps({"number": number, **packet}, separators=(",", ":"))


def encode_array(values: np.ndarray) -> str:
    """An array as base64 of little-endian float32."""
    return base64.b64encode(np.ascontiguousarray(values, "<f4").tobytes()).decode()


def reset_packet(config: EnnConfig, memory: Cache | None, status: str) -> dict[str, Any]:
    """The memory as it is now, for a new run (`status` "running") or after clearing it ("idle").

    `trace` is `[L, N, H]`, or `None` for zeros.
    """
    tokens_seen = 0 if memory is None else engram_layers(memory)[0].tokens_seen
    return {
        "kind": "reset",
        "status": status,
        "layers": config.num_hidden_layers,
        "slots": config.memory_size,
        "width": config.hidden_size,
        "hebbian_lr": config.hebbian_lr,
        "trace_clip": config.trace_clip,
        "tokens_seen": tokens_seen,
        "trace": encode_array(traces(memory)) if memory is not None and tokens_seen else None,
    }


def tokens_packet(steps: Sequence[TokenStep]) -> dict[str, Any]:
    """Tokens in the order in which the memory read them, with recall weights `[L, N]` and encodings `[L, H]`."""
    tokens = [
        {
            "text": step.text,
            "is_prompt": step.is_prompt,
            "recall": encode_array(step.recall),
            "encoding": encode_array(step.encoding),
        }
        for step in steps
    ]
    return {"kind": "tokens", "tokens": tokens}


def status_packet(status: str, message: str = "") -> dict[str, Any]:
    """How the run is doing: "waiting" before it, "eos", "length" or "stopped" after it, "error" with a sentence."""
    return {"kind": "status", "status": status, "message": message}


def traces(memory: Cache) -> np.ndarray:
    """The traces of all layers of a one-row state, float32 `[L, N, H]`."""
    return torch.stack([layer.state.trace[0] for layer in engram_layers(memory) if layer.state]).float().cpu().numpy()


def engram_layers(memory: Cache) -> list[EnnCacheLayer]:
    """The layers of the state of an ENN."""
    return cast(list[EnnCacheLayer], memory.layers)
