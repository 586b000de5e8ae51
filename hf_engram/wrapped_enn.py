"""Weights of layers that other libraries have wrapped.

The scan uses the weights of a cell's layers step by step and never calls the layers. A call, however, is when
accelerate fetches what it has offloaded and when PEFT adds its adapters. Both are done here instead.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.nn as nn
from torch import Tensor


def weight_and_bias(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of a linear layer or layer normalisation, as its own forward pass would use them.

    Raises:
        NotImplementedError: the layer is quantized, or carries adapters of PEFT other than plain LoRA, or one of its
            own for each row.
    """
    if "base_layer" not in layer._modules:  # as fast as it can be: this runs at every token of `generate`
        return _fetch(layer)
    if layer._forward_pre_hooks:  # how PEFT hands `adapter_names` to its layers
        raise NotImplementedError(
            "`adapter_names`, an adapter for each row, does not reach layers inside an engram cell."
        )
    if layer.disable_adapters and layer.merged:
        layer.unmerge()  # as the layer itself would
    weight, bias = weight_and_bias(layer.base_layer)
    if layer.disable_adapters or layer.merged:
        return weight, bias
    for adapter in layer.active_adapters:
        if adapter in layer._get_available_adapters():
            weight = weight + _lora(layer, adapter).to(weight.dtype)
    return weight, bias


def _fetch(layer: nn.Module) -> tuple[Tensor, Tensor]:
    if not (isinstance(layer.weight, Tensor) and layer.weight.is_floating_point()):
        raise NotImplementedError(
            f"{type(layer).__name__} holds a quantized weight, and the scan of an engram cell reads the weights "
            "themselves. Allowed: quantized layers outside the cells."
        )
    if "_hf_hook" not in vars(layer):
        return layer.weight, layer.bias
    with fetched(layer):
        return layer.weight, layer.bias


@contextmanager
def fetched(module: nn.Module) -> Iterator[None]:
    """Within it, a module's own parameters are where its forward pass would find them, wherever they are kept."""
    hook = vars(module).get("_hf_hook")
    if hook is None:
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)


def _lora(layer: nn.Module, adapter: str) -> Tensor:
    """What LoRA adds to the weight. Dropout drops input features: the same ones for all steps of a forward pass."""
    if adapter not in getattr(layer, "lora_A", ()) or adapter in layer.lora_variant or layer.lora_bias[adapter]:
        raise NotImplementedError(
            f"The adapter {adapter!r} ({type(layer).__module__}) of a layer inside an engram cell is not plain LoRA. "
            "Allowed: LoRA without DoRA and lora_bias; any adapter once it is merged; any outside the cells."
        )
    delta = layer.get_delta_weight(adapter)
    return delta * layer.lora_dropout[adapter](delta.new_ones(delta.shape[1]))
