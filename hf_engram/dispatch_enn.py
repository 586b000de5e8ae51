"""Which form of the recurrence runs: one switch, the environment variable `HF_ENGRAM_SCAN`."""

import functools
import importlib.util
import os
import re

import torch
from torch import Tensor
from transformers.utils import logging

SCAN_VARIABLE = "HF_ENGRAM_SCAN"
SCANS = ("auto", "chunkwise", "definition")
# Operators of torch have global names, and each repository on the Hub brings a copy of this code: the one loaded last
# would take the place of the others, were they not named after the copy ("hf_engram" in the package).
OPERATORS = re.sub(r"\W", "_", __name__.rpartition(".")[0])


def selected_scan() -> str:
    """The scan in use: the environment variable `HF_ENGRAM_SCAN`, "auto" unless it is set.

    "auto" is the chunkwise form, compiled by numba where that is installed and the tensors are on the CPU; "chunkwise"
    is the same in PyTorch alone; "definition" runs `ops_enn.enn_loop`.

    Raises:
        ValueError: the variable holds an unknown name.
    """
    name = os.environ.get(SCAN_VARIABLE, "auto")
    if name not in SCANS:
        raise ValueError(f"{SCAN_VARIABLE} is {name!r}; allowed: {SCANS}.")
    return name


def use_compiled(tensor: Tensor) -> bool:
    """Whether compiled loops run on tensors like this one: float32 or float64, on the CPU, with numba, "auto"."""
    fits = tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.float64)
    return fits and selected_scan() == "auto" and has_numba()


@torch.compiler.assume_constant_result
def has_numba() -> bool:
    """Whether numba can be imported; asked when the first loop runs, since the import takes a while."""
    return _import_numba()


@functools.cache
def _import_numba() -> bool:
    if importlib.util.find_spec("numba") is None:
        return False
    try:
        import numba  # noqa: F401
    except ImportError as error:
        logging.get_logger(__name__).warning(f"numba is installed but not used: {error} Loops run in PyTorch, slower.")
        return False
    return True
