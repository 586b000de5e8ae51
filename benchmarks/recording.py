"""What recording costs while *enn-books* writes: `python -m benchmarks.recording`.

Plain and recorded `generate` alternate in one process, in an order that changes every round, with the same seed and so
the same text. The ratio is the median over rounds of the recorded run's time divided by the plain one's in the same
round, the range is from the lower to the upper quartile.
"""

import argparse
import statistics
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from tqdm import trange
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_engram import EnnForCausalLM
from hf_engram.traces import Recorder

CHECKPOINT = Path(__file__).parent.parent / "model_cards" / "enn-books"
PROMPT = "It is a truth universally acknowledged"


def seconds(model: EnnForCausalLM, input_ids: torch.Tensor, new_tokens: int, recorder: Recorder | None) -> float:
    """Time that `generate` takes, with or without a recorder."""
    torch.manual_seed(0)
    start = time.perf_counter()
    with recorder or nullcontext():
        model.generate(input_ids, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=True)
    return time.perf_counter() - start


def main() -> None:
    """Print tokens per second and the ratio, and what reading a recording takes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21, help="how often each of the two runs (default: 21)")
    parser.add_argument("--new_tokens", type=int, default=200, help="tokens written per run (default: 200)")
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT)
    input_ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    plain, recorded = [], []
    seconds(model, input_ids, arguments.new_tokens, None)  # compiles the loops
    for turn in trange(arguments.rounds, desc="rounds", disable=None):
        recorder = Recorder(model, tokenizer)
        runs = [(plain, None), (recorded, recorder)]
        for times, with_recorder in runs if turn % 2 else reversed(runs):
            times.append(seconds(model, input_ids, arguments.new_tokens, with_recorder))

    ratios = [after / before for before, after in zip(plain, recorded, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    per_second = [arguments.new_tokens / statistics.median(times) for times in (plain, recorded)]
    print(f"generate {per_second[0]:.0f} tokens/s, recorded {per_second[1]:.0f} tokens/s")
    print(f"time recorded / plain: {statistics.median(ratios):.3f} ({low:.3f} to {high:.3f})")

    start = time.perf_counter()
    [recording] = recorder.recordings()
    joined = time.perf_counter()
    _ = recording.layers[0].attribution
    print(
        f"reading {len(recording)} tokens: {1e3 * (joined - start):.0f} ms; "
        f"attributing them: {1e3 * (time.perf_counter() - joined):.0f} ms"
    )


if __name__ == "__main__":
    main()
