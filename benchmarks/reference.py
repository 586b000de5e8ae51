"""Compares our cell with numbers recorded from the original implementation (tests/fixtures/reference/README.md)."""

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from hf_engram import EnnConfig, EnnForImageClassification
from hf_engram.ops_enn import CellSettings, CellState, CellWeights, enn_loop, enn_step
from hf_engram.scan_enn import enn_scan

TOLERANCES = {torch.float32: 2e-5, torch.float64: 1e-10}
TRACE_CLIP = 0.1
LAYER_NORM_EPS = 1e-6
WEIGHT_NAMES = (
    "input_encoder.kernel",
    "input_encoder.bias",
    "layer_norm1.gamma",
    "layer_norm1.beta",
    "memory_bank",
    "hidden_integrator.kernel",
    "hidden_integrator.bias",
    "output_dense.kernel",
    "output_dense.bias",
    "layer_norm2.gamma",
    "layer_norm2.beta",
)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Arrays and metadata of a reference file."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, relative to the largest entry of the recorded array."""
    scale = theirs.abs().max().clamp_min(torch.finfo(theirs.dtype).tiny)
    return ((ours.to(theirs.dtype) - theirs).abs().max() / scale).item()


def cell_weights(leaves: dict[str, Tensor]) -> CellWeights:
    """The recorded weights in our layout: kernels are transposed, norms may be absent."""

    def norm(name: str) -> tuple[Tensor, Tensor] | None:
        return (leaves[f"{name}.gamma"], leaves[f"{name}.beta"]) if f"{name}.gamma" in leaves else None

    return CellWeights(
        leaves["input_encoder.kernel"].T,
        leaves["input_encoder.bias"],
        norm("layer_norm1"),
        leaves["memory_bank"],
        leaves["hidden_integrator.kernel"].T,
        leaves["hidden_integrator.bias"],
        leaves["output_dense.kernel"].T,
        leaves["output_dense.bias"],
        norm("layer_norm2"),
    )


def cell_settings(metadata: dict[str, str], trace_scope: str) -> CellSettings:
    """The recorded hyperparameters."""
    temperature, sparsity = float(metadata["temperature"]), float(metadata["sparsity_strength"])
    return CellSettings(
        hebbian_lr=float(metadata["hebbian_lr"]),
        trace_scale=float(metadata["scale_factor"]),
        temperature=temperature / (1 + 10 * sparsity),
        trace_clip=TRACE_CLIP,
        trace_scope=trace_scope,
        layer_norm_eps=LAYER_NORM_EPS,
    )


def cell_errors(path: Path, dtype: torch.dtype, trace_scope: str = "batch") -> dict[str, float]:
    """Relative error of every recorded array of one `cell_*` file.

    Args:
        dtype: float32, or float64, which has its own recorded arrays.
        trace_scope: "batch" runs the definition with the original's shared trace; "sequence" runs the fast scan, and
            is the same thing for files of one sequence.
    """
    arrays, metadata = read(path)
    prefix = "f64." if dtype == torch.float64 else ""
    names = [n for n in (*WEIGHT_NAMES, "inputs", "initial_hidden", "initial_trace") if n in arrays]
    leaves = {name: arrays[name].to(dtype).requires_grad_() for name in names}
    weights, settings = cell_weights(leaves), cell_settings(metadata, trace_scope)
    x = leaves["inputs"]
    state = CellState(leaves["initial_hidden"], leaves["initial_trace"].expand(len(x), -1, -1))
    noise = arrays["noise"].to(dtype) if "noise" in arrays else None

    scan = enn_scan if trace_scope == "sequence" else enn_loop
    outputs, recall, _, final = scan(x, state, weights, settings, noise=noise)
    loss = (outputs * arrays["cotangent"].to(dtype)).sum()
    gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))

    ours = {
        "outputs": outputs,
        "attention": recall,
        "final_hidden": final.hidden,
        "final_trace": final.trace[0],
        "loss": loss[None],
        **{f"grad.{name}": gradient for name, gradient in gradients.items()},
        "grad.hidden_integrator.kernel.sum_axis0": gradients["hidden_integrator.kernel"].sum(0),
        "grad.hidden_integrator.kernel.sum_axis1": gradients["hidden_integrator.kernel"].sum(1),
    }
    if dtype == torch.float32:
        ours["trace"] = trace_steps(x, state, weights, settings, noise)[arrays["trace_steps"]]
    return {
        name: relative_error(value.detach(), arrays[prefix + name])
        for name, value in ours.items()
        if prefix + name in arrays
    }


def trace_steps(
    x: Tensor, state: CellState, weights: CellWeights, settings: CellSettings, noise: Tensor | None
) -> Tensor:
    """The first row's trace after every step, `[T, N, H]`."""
    traces = []
    for t in range(x.shape[1]):
        _, _, state = enn_step(x[:, t], state, weights, settings, noise=None if noise is None else noise[t])
        traces.append(state.trace[0])
    return torch.stack(traces)


def classifier(path: Path, dtype: torch.dtype) -> tuple[EnnForImageClassification, dict[str, Tensor]]:
    """Our image classifier with the weights of the recorded `EngramClassifier`, in evaluation mode, and the file."""
    arrays, _ = read(path)
    config = EnnConfig.paper(image_sequence="row", image_size=28, num_labels=10)
    model = EnnForImageClassification(config).to(dtype).eval()
    cell = model.model.layers[0].cell
    linears = {
        "input_encoder": cell.encoder,
        "hidden_integrator": cell.integrator,
        "output_dense": cell.output,
        "head": model.classifier,
    }
    with torch.no_grad():
        for name, linear in linears.items():
            linear.weight.copy_(arrays[f"{name}.kernel"].T)
            linear.bias.copy_(arrays[f"{name}.bias"])
        for name, norm in {"layer_norm1": cell.encoder_norm, "layer_norm2": cell.output_norm}.items():
            norm.weight.copy_(arrays[f"{name}.gamma"])
            norm.bias.copy_(arrays[f"{name}.beta"])
        cell.memory_bank.copy_(arrays["memory_bank"])
    return model, arrays


def classifier_errors(path: Path, dtype: torch.dtype) -> dict[str, float]:
    """Relative errors of logits, probabilities, final states, loss and gradients of the recorded classifier."""
    model, arrays = classifier(path, dtype)
    prefix = "f64." if dtype == torch.float64 else ""
    output = model(arrays["inputs"][:, None].to(dtype), labels=arrays["labels"], use_cache=True)
    output.loss.backward()
    state, cell = output.past_key_values.layers[0].state, model.model.layers[0].cell
    ours = {
        "logits": output.logits,
        "probabilities": output.logits.softmax(-1),
        "final_hidden": state.hidden,
        "final_trace": state.trace[0],
        "loss": output.loss[None],
        "grad.head.kernel": model.classifier.weight.grad.T,
        "grad.head.bias": model.classifier.bias.grad,
        "grad.input_encoder.kernel": cell.encoder.weight.grad.T,
        "grad.input_encoder.bias": cell.encoder.bias.grad,
        "grad.layer_norm1.gamma": cell.encoder_norm.weight.grad,
        "grad.layer_norm1.beta": cell.encoder_norm.bias.grad,
        "grad.memory_bank": cell.memory_bank.grad,
        "grad.hidden_integrator.bias": cell.integrator.bias.grad,
        "grad.hidden_integrator.kernel.sum_axis0": cell.integrator.weight.grad.sum(1),
        "grad.hidden_integrator.kernel.sum_axis1": cell.integrator.weight.grad.sum(0),
        "grad.output_dense.kernel": cell.output.weight.grad.T,
        "grad.output_dense.bias": cell.output.bias.grad,
        "grad.layer_norm2.gamma": cell.output_norm.weight.grad,
        "grad.layer_norm2.beta": cell.output_norm.bias.grad,
    }
    return {
        name: relative_error(value.detach(), arrays[prefix + name])
        for name, value in ours.items()
        if prefix + name in arrays
    }


def classifier_training_losses(path: Path, steps: int = 10) -> tuple[Tensor, Tensor]:
    """Losses of the recorded training run, ours and theirs, `[steps + 1]` each.

    Keras' Adam(1e-3, clipnorm=1): each variable's gradient is clipped to norm 1 by itself, and epsilon is added before
    the second moment's bias is corrected.
    """
    model, arrays = classifier(path, torch.float32)
    images, labels = arrays["inputs"][:, None], arrays["labels"]
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in model.parameters()]
    losses = []
    for step in range(1, steps + 1):
        loss = model(images, labels=labels).loss
        losses.append(loss.detach())
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        rate = 1e-3 * (1 - 0.999**step) ** 0.5 / (1 - 0.9**step)
        with torch.no_grad():
            for parameter, gradient, (first, second) in zip(model.parameters(), gradients, moments, strict=True):
                gradient = gradient / gradient.norm().clamp_min(1)
                first.lerp_(gradient, 0.1)
                second.lerp_(gradient.square(), 0.001)
                parameter -= rate * first / (second.sqrt() + 1e-7)
    with torch.no_grad():
        losses.append(model(images, labels=labels).loss)
    return torch.stack(losses), arrays["train_losses"]
