"""A training step of whole language models of equal parameters, in sequences of 512 tokens."""

import dataclasses
import statistics
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from train.allocator import keep_freed_memory
from train.comparison import read_comparison
from train.language_model import parse
from train.models import make_model

from .peers import backward_step
from .timing import Step, ratio, rounds_of

COMPARISON = "train/configs/compare/wikitext103.yaml"
TOKENS, VOCABULARY = 512, 4096
BATCHES = (1, 2, 4, 8)
PEER = "LSTM"
# Of the comparison, and what the table calls them.
MODELS = {
    "mixer": "mixer",
    "mixer_token_memory": "mixer, token memory",
    "gated": "cell, gated",
    "engram_gru": "cell, gru",
    "lstm": PEER,
    "gru": "GRU",
    "transformer": "Transformer",
}


def language_models() -> dict[str, PreTrainedModel]:
    """The models of the comparison, untrained, by what the table calls them; attention sees a whole sequence."""
    comparison, models = read_comparison(COMPARISON), {}
    for name, called in MODELS.items():
        torch.manual_seed(0)
        model_args, *_ = parse(comparison.command_line(name, seed=0, folder=Path("runs")))
        model_args = dataclasses.replace(model_args, sliding_window=TOKENS)
        models[called] = make_model(model_args, "language", vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0)
    return models


def training_step(model: PreTrainedModel, input_ids: Tensor) -> Step:
    """A function that runs forward and backward once, on these tokens, as `train.trainer` does."""
    return backward_step(model, lambda: model(input_ids, labels=input_ids, skip_logits=True).loss)


def print_language_models(rounds: int) -> None:
    """Print the section. From it on the process keeps freed memory, as `train` does."""
    keep_freed_memory()
    models = language_models()
    print(f"{'batch':7}{'model':21}{'parameters':>11}{'tokens/s':>10}  over the {PEER}'s")
    for batch in BATCHES:
        input_ids = torch.randint(VOCABULARY, (batch, TOKENS))
        times = rounds_of({name: training_step(model, input_ids) for name, model in models.items()}, rounds)
        for name, model in models.items():
            rate = batch * TOKENS / statistics.median(times[name])
            # Seconds of the peer over seconds of the model: tokens/s of the model over the peer's.
            faster = "" if name == PEER else ratio(times[PEER], times[name])
            print(f"{batch:<7}{name:21}{model.num_parameters():>11,}{rate:>10,.0f}  {faster}", flush=True)
