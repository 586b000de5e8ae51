"""Mixers without one of their parts, to measure what it is worth: `--ablation`.

A part is taken out by fixing the parameters that make it what it is. The engram cell needs none of this: there
`trace_scale: 0` leaves the trace out and a high `recall_temperature` recalls all slots alike.
"""

import math
from collections.abc import Callable

import torch
from torch.nn import Parameter
from transformers import PreTrainedModel

from hf_engram.mixer_enn import EngramMixer

ALL_ALIKE = 1e6  # a temperature
ONE_TIMESCALE = 128  # tokens; the geometric mean of those at which heads begin


def fix(parameter: Parameter, value: float) -> None:
    """Set a parameter for good."""
    parameter.fill_(value)
    parameter.requires_grad_(False)


def no_trace(mixer: EngramMixer) -> None:
    """A write weighs nothing."""
    fix(mixer.log_trace_scale, -math.inf)


def no_bank(mixer: EngramMixer) -> None:
    """The slots begin empty; their keys still address the writes."""
    fix(mixer.bank_values, 0)


def uniform_recall(mixer: EngramMixer) -> None:
    """All slots are written and recalled alike."""
    fix(mixer.log_write_temperature, math.log(ALL_ALIKE))
    fix(mixer.log_read_temperature, math.log(ALL_ALIKE))


def one_timescale(mixer: EngramMixer) -> None:
    """All heads begin by forgetting over 128 tokens."""
    mixer.plasticity.bias[mixer.num_heads :] = math.log(math.expm1(1 / ONE_TIMESCALE))


def constant_plasticity(mixer: EngramMixer) -> None:
    """Writing and forgetting do not depend on the input."""
    fix(mixer.plasticity.weight, 0)


def free_queries(mixer: EngramMixer) -> None:
    """Queries do not begin as the keys of their own features, but as those of others."""
    mixer.q_proj.weight.copy_(mixer.k_proj.weight.flip(0))


def faint_writes(mixer: EngramMixer) -> None:
    """A write begins with the weight of the bank's entry."""
    mixer.log_trace_scale.zero_()


ABLATIONS: dict[str, Callable[[EngramMixer], None]] = {
    "no_trace": no_trace,
    "no_bank": no_bank,
    "uniform_recall": uniform_recall,
    "one_timescale": one_timescale,
    "constant_plasticity": constant_plasticity,
    "free_queries": free_queries,
    "faint_writes": faint_writes,
}


@torch.no_grad()
def ablate(model: PreTrainedModel, name: str) -> None:
    """Take one part out of every mixer of a model.

    Args:
        name: one of `ABLATIONS`.

    Raises:
        ValueError: there is no such ablation, or the model has no mixer.
    """
    if name not in ABLATIONS:
        raise ValueError(f"ablation is {name!r}; allowed: one of {tuple(ABLATIONS)}.")
    mixers = [module for module in model.modules() if isinstance(module, EngramMixer)]
    if not mixers:
        raise ValueError(f"ablation is {name!r}; allowed: None, since the model has no engram_mixer layer.")
    for mixer in mixers:
        ABLATIONS[name](mixer)
