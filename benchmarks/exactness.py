"""Prints every exactness claim of the README with its measured error: `python -m benchmarks.exactness`.

Errors are relative to the largest entry of what is compared. The command fails if one is beyond what is allowed.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

from benchmarks.reference import TOLERANCES, cell_errors, classifier_errors, relative_error
from hf_engram import EnnConfig, EnnForCausalLM, load_memory, save_memory
from hf_engram.dispatch_enn import SCAN_VARIABLE

SHIPPED_REFERENCE = Path(__file__).parent.parent / "tests" / "fixtures" / "reference"
STEPS = 150  # three chunks of the fast scan, the last one partial
LAYERS = {
    "cells": {"layer_types": ["engram", "engram"]},
    "gated cells": {"layer_types": ["engram", "engram"], "integrator": "gated"},
    "cells with a GRU": {"layer_types": ["engram", "engram"], "integrator": "gru"},
    "mixers": {"layer_types": ["engram_mixer", "engram_mixer"]},
    "hybrid": {"layer_types": ["engram_mixer", "full_attention"]},
    "token memory": {"layer_types": ["engram_mixer", "engram"], "token_memory_size": 12},
}


class Claim(NamedTuple):
    """One line of the report."""

    text: str
    error: float
    allowed: float


def make_model(dtype: torch.dtype, layers: str, **options: object) -> EnnForCausalLM:
    """A small two-layer language model with random weights."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "memory_size": 16, "num_hidden_layers": 2}
    config = EnnConfig(**sizes, **LAYERS[layers], residual=True, **options)
    return EnnForCausalLM(config).to(dtype).eval()


def token_ids(rows: int, steps: int = STEPS) -> Tensor:
    """Random token ids `[rows, steps]`."""
    return torch.randint(0, 97, (rows, steps), generator=torch.Generator().manual_seed(1))


def gradients(model: EnnForCausalLM, input_ids: Tensor) -> Tensor:
    """All gradients of the language model's loss, in one vector."""
    return gradients_of(model(input_ids, labels=input_ids, use_cache=False).loss, model)


def gradients_of(loss: Tensor, model: EnnForCausalLM) -> Tensor:
    """All gradients of a loss, in one vector."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def original(reference: Path) -> Iterator[Claim]:
    """The definition, and the fast scan where it applies, against the recorded original."""
    for dtype, allowed in TOLERANCES.items():
        for path in sorted(reference.glob("cell_*.safetensors")):
            yield Claim(f"original, {path.stem}, {name_of(dtype)}", max(cell_errors(path, dtype).values()), allowed)
            if path.stem.endswith("_b1"):
                error = max(cell_errors(path, dtype, "sequence").values())
                yield Claim(f"original, {path.stem}, fast scan, {name_of(dtype)}", error, allowed)
        for path in sorted(reference.glob("classifier_*.safetensors")):
            error = max(classifier_errors(path, dtype).values())
            yield Claim(f"original, {path.stem}, {name_of(dtype)}", error, allowed)


def scans(dtype: torch.dtype, layers: str) -> Iterator[Claim]:
    """The fast scans against the definition, through a whole model."""
    input_ids = token_ids(3)
    cells = set(LAYERS[layers]["layer_types"]) == {"engram"}
    for clip in (None, 0.02) if cells else (None,):  # the second is active; mixers have none
        model = make_model(dtype, layers, trace_clip=clip)
        clipped = "" if clip is None else f", trace_clip={clip}"
        with mock.patch.dict(os.environ, {SCAN_VARIABLE: "definition"}):
            logits, grads = model(input_ids).logits, gradients(model, input_ids)
        for scan in ("auto", "chunkwise") if cells else ("auto",):
            with mock.patch.dict(os.environ, {SCAN_VARIABLE: scan}):
                error = relative_error(model(input_ids).logits, logits)
                yield claim(f"{layers}: scan {scan} = definition{clipped}, logits", error, dtype)
                error = relative_error(gradients(model, input_ids), grads)
                yield claim(f"{layers}: scan {scan} = definition{clipped}, gradients", error, dtype)


@torch.no_grad()
def state(dtype: torch.dtype, layers: str) -> Iterator[Claim]:
    """The state: however a sequence is cut, padded, batched or packed, the logits are the same."""
    model, input_ids = make_model(dtype, layers), token_ids(3)
    logits = model(input_ids).logits

    cache, steps = None, []
    for t in range(STEPS):
        output = model(input_ids[:, t : t + 1], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        steps.append(output.logits)
    yield claim(f"{layers}: token by token = whole", relative_error(torch.cat(steps, 1), logits), dtype)

    errors = []
    for cut in range(1, STEPS):
        first = model(input_ids[:, :cut], use_cache=True)
        second = model(input_ids[:, cut:], past_key_values=first.past_key_values)
        errors.append(relative_error(torch.cat([first.logits, second.logits], 1), logits))
    yield claim(f"{layers}: split anywhere = whole", max(errors), dtype)

    for name, columns in {
        "left": torch.arange(20, STEPS + 20),
        "right": torch.arange(STEPS),
        "interior": torch.randperm(STEPS + 20, generator=torch.Generator().manual_seed(2))[:STEPS].sort().values,
    }.items():
        padded = torch.zeros(3, STEPS + 20, dtype=torch.long)
        mask = torch.zeros_like(padded)
        padded[:, columns], mask[:, columns] = input_ids, 1
        found = model(padded, attention_mask=mask).logits[:, columns]
        yield claim(f"{layers}: {name} padding = none", relative_error(found, logits), dtype)

    single = torch.cat([model(row[None]).logits for row in input_ids])
    yield claim(f"{layers}: batched = single", relative_error(single, logits), dtype)

    positions = torch.cat([torch.arange(70), torch.arange(STEPS - 70)])[None]
    packed = model(input_ids, position_ids=positions).logits
    separate = torch.cat([model(input_ids[:, :70]).logits, model(input_ids[:, 70:]).logits], 1)
    yield claim(f"{layers}: packed documents = separate", relative_error(packed, separate), dtype)

    with tempfile.TemporaryDirectory() as folder:
        first = model(input_ids[:, :70], use_cache=True)
        save_memory(first.past_key_values, Path(folder) / "memory.safetensors", model.config)
        memory = load_memory(Path(folder) / "memory.safetensors", model.config)
    loaded = model(input_ids[:, 70:], past_key_values=memory).logits
    kept = model(input_ids[:, 70:], past_key_values=first.past_key_values).logits
    yield Claim(f"{layers}: memory file = state in memory, {name_of(dtype)}", relative_error(loaded, kept), 0.0)


def checkpointing(dtype: torch.dtype, layers: str) -> Iterator[Claim]:
    """Activation checkpointing does not change the gradients."""
    model, input_ids = make_model(dtype, layers).train(), token_ids(3)
    plain = gradients(model, input_ids)
    model.activation_checkpointing_enable()
    yield claim(
        f"{layers}: gradients under activation checkpointing", relative_error(gradients(model, input_ids), plain), dtype
    )


def loss_alone(dtype: torch.dtype, layers: str) -> Iterator[Claim]:
    """With a token memory, the loss without logits has the gradients of the logits' own."""
    if "token_memory_size" in LAYERS[layers]:
        model, input_ids = make_model(dtype, layers), token_ids(3)
        scores = model(input_ids).logits[:, :-1].gather(2, input_ids[:, 1:, None])
        found = gradients_of(model(input_ids, labels=input_ids, skip_logits=True).loss, model)
        error = relative_error(found, gradients_of(-scores.mean(), model))
        yield claim(f"{layers}: gradients of the loss without logits", error, dtype)


def claim(text: str, error: float, dtype: torch.dtype) -> Claim:
    """A claim with the tolerance of its dtype."""
    return Claim(f"{text}, {name_of(dtype)}", error, TOLERANCES[dtype])


def name_of(dtype: torch.dtype) -> str:
    """`float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def all_claims(reference: Path) -> Iterator[Claim]:
    """Every claim, measured as it is asked for."""
    yield from original(reference)
    for dtype, layers in product(TOLERANCES, LAYERS):
        for group in (scans, state, checkpointing, loss_alone):
            yield from group(dtype, layers)


def main() -> None:
    """Print the report; exit with 1 if a claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--reference", type=Path, default=SHIPPED_REFERENCE, help="folder of recorded numbers of the original"
    )
    failed = 0
    print(f"{'claim':72} {'measured':>9} {'allowed':>9}")
    for text, error, allowed in all_claims(parser.parse_args().reference):
        holds = error <= allowed
        failed += not holds
        print(f"{text:72} {error:9.1e} {allowed:9.1e}{'' if holds else '  DOES NOT HOLD'}", flush=True)
    if failed:
        sys.exit(f"{failed} claims do not hold.")


if __name__ == "__main__":
    main()
