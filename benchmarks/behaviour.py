"""What the cost of a layer depends on, and what it does not: length, the clip, memory, the first call."""

import os
import subprocess
import sys
import tempfile

from .peers import WORKS, Work, definition_step, engram_step
from .timing import peak_memory, ratio, rounds_of

# The same number of tokens in both, in batches that a training run would use.
SHORT, LONG = Work(256, 256, 128, 128, 64), Work(16, 4096, 128, 128, 64)
FIRST_STEP = """
import time
import torch, transformers.modeling_utils, transformers.generation, transformers.image_processing_backends
from transformers import AutoImageProcessor, AutoModelForCausalLM, AutoModelForImageClassification
begin = time.perf_counter()
from hf_engram import EnnConfig, EnnForCausalLM
imported = time.perf_counter()
model = EnnForCausalLM(EnnConfig(vocab_size=100, hidden_size=64, memory_size=32))
input_ids = torch.randint(100, (4, 70))
loss = model(input_ids, labels=input_ids).loss
forward = time.perf_counter()
loss.backward()
print(imported - begin, forward - imported, time.perf_counter() - forward)
"""


def print_behaviour(rounds: int) -> None:
    """Print the section."""
    times = rounds_of({"long": engram_step(LONG), "short": engram_step(SHORT)}, rounds)
    print(
        f"time of 16 x 4,096 tokens over that of 256 x 256 tokens: {ratio(times['long'], times['short'])}", flush=True
    )

    work = WORKS["b"]
    clips = {"none": None, "inactive": 1e3, "active": 1e-3}
    times = rounds_of({name: engram_step(work, trace_clip=clip) for name, clip in clips.items()}, rounds)
    print(f"time with an inactive clip over that without, work b: {ratio(times['inactive'], times['none'])}")
    active = ratio(times["active"], times["inactive"])
    print(f"time with a clip active in every chunk over that with an inactive one: {active}", flush=True)

    ours, definition = peak_memory(engram_step, WORKS["d"]), peak_memory(definition_step, WORKS["d"])
    if ours is not None and definition is not None:
        shown = f"{ours:.0f} MiB, definition {definition:.0f} MiB, ratio {ours / definition:.3f}"
        print(f"peak memory of a training step, work d: {shown}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        for cache in ("with nothing", "with everything"):
            command = [sys.executable, "-c", FIRST_STEP]
            environment = {**os.environ, "NUMBA_CACHE_DIR": folder}
            output = subprocess.check_output(command, env=environment, text=True)
            imported, forward, backward = map(float, output.split())
            print(
                f"{cache} compiled: first forward pass {forward:.1f} s, first backward pass {backward:.1f} s; "
                f"import of hf_engram after transformers' models {imported:.2f} s",
                flush=True,
            )
