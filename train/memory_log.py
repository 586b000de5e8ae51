"""What an ENN's memory does while it is trained: numbers in the logs, and pictures."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_engram.configuration_enn import memory_layers
from hf_engram.layers_enn import EnnCell
from hf_engram.mixer_enn import EngramMixer


class RecordMemory(TrainerCallback):
    """Lets the model read a few sequences every so many steps, and logs what its memory did ([`memory_numbers`]).

    Args:
        log: takes the numbers, such as `trainer.log`; from there they go wherever `report_to` says.
        inputs: for the model as it is then, arguments of its backbone: `input_ids` `[B, T]` or `inputs_embeds`
            `[B, T, I]` with T of 2 or more.
        steps: log every so many steps; `None` for never.
        plot_steps: save a picture to output_dir/memory every so many steps; `None` for never.
    """

    def __init__(
        self,
        log: Callable[[dict[str, float]], None],
        inputs: Callable[[PreTrainedModel], dict[str, Tensor]],
        steps: int | None,
        plot_steps: int | None,
    ) -> None:
        self.log = log
        self.inputs = inputs
        self.steps = steps
        self.plot_steps = plot_steps

    @torch.no_grad()
    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel,
        **kwargs: Any,
    ) -> None:
        """Read, log and draw if it is time."""
        logs = self.steps is not None and state.global_step % self.steps == 0
        draws = self.plot_steps is not None and state.global_step % self.plot_steps == 0
        if not (logs or draws):
            return
        recalls, traces_before, traces = read(
            model, {name: x.to(args.device) for name, x in self.inputs(model).items()}
        )
        if logs:
            log_loss = control.should_log  # which any log takes back
            self.log(memory_numbers(model, recalls, traces_before, traces))
            control.should_log = log_loss
        if draws and state.is_world_process_zero:
            folder = Path(args.output_dir, "memory")
            folder.mkdir(parents=True, exist_ok=True)
            draw([x[0] for x in recalls], [x[0] for x in traces], folder / f"step-{state.global_step:06}.png")


@torch.no_grad()
def read(
    model: PreTrainedModel, inputs: dict[str, Tensor]
) -> tuple[list[Tensor], tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Let the model read, in evaluation mode.

    Returns:
        per layer with a memory, in the shapes of `EnnModelOutput`: recall weights of all steps, and the traces before
        and after the last step.
    """
    was_training = model.training
    model.eval()
    try:
        wanted = {"use_cache": True, "output_recall": True, "output_traces": True}
        body = model.base_model
        before = body(**{name: x[:, :-1] for name, x in inputs.items()}, **wanted)
        last = body(**{name: x[:, -1:] for name, x in inputs.items()}, past_key_values=before.past_key_values, **wanted)
    finally:
        model.train(was_training)
    recalls = [torch.cat(pair, 1) for pair in zip(before.recall, last.recall, strict=True)]
    return recalls, before.traces, last.traces


@torch.no_grad()
def memory_numbers(
    model: PreTrainedModel, recalls: list[Tensor], traces_before: tuple[Tensor, ...], traces: tuple[Tensor, ...]
) -> dict[str, float]:
    """What the memory of every layer did, from what [`read`] returned.

    Returns:
        for layer l, under `memory_<l>_<name>`:
        `recall_entropy`: mean entropy of a step's recall, in nats;
        `slots_recalled`: its exponential, the number of slots that a step recalls;
        `slots_in_use`: exponential of the entropy of the mean recall over all steps and rows;
        `trace_norm`: mean Frobenius norm of a row's trace after the last step;
        `trace_share`: share of the trace in what the last step recalls, mean over rows: of a cell
        |s a A| / (|a M| + |s a A|), of a mixer its weight in that mean of bank and writes (`ops_mixer_enn`);
        `bank_share`: the rest.
        Those of a mixer are means over its heads, each with slots and a trace of its own.
    """
    numbers = {}
    for index, recall, before, after in zip(
        memory_layers(model.config.layer_types), recalls, traces_before, traces, strict=True
    ):
        layer = model.base_model.layers[index]
        entropy = torch.special.entr(recall).sum(-1).mean()
        if model.config.layer_types[index] == "engram":
            trace_share = cell_trace_share(layer.cell, recall[:, -1], before)
        else:  # a mixer writes first, and then recalls
            trace_share = mixer_trace_share(layer.mixer, recall[:, -1], after)
        values = {
            "recall_entropy": entropy,
            "slots_recalled": entropy.exp(),
            "slots_in_use": torch.special.entr(recall.mean((0, 1))).sum(-1).exp().mean(),
            "trace_norm": after.flatten(-2).norm(dim=-1).mean(),
            "trace_share": trace_share,
            "bank_share": 1 - trace_share,
        }
        numbers |= {f"memory_{index}_{name}": value.item() for name, value in values.items()}
    return numbers


def cell_trace_share(cell: EnnCell, weights: Tensor, trace: Tensor) -> Tensor:
    """Share of the trace `[B, N, H]` in what is recalled with `weights` `[B, N]`, mean over rows."""
    from_bank = (weights @ cell.memory_bank.to(weights.dtype)).norm(dim=-1)
    from_trace = cell.settings.trace_scale * torch.einsum("bn,bnh->bh", weights, trace.to(weights))
    from_trace = from_trace.norm(dim=-1)
    return (from_trace / (from_bank + from_trace)).mean()


def mixer_trace_share(mixer: EngramMixer, weights: Tensor, trace: Tensor) -> Tensor:
    """Share of writes, 1 - Σ_n r_n / (1 + s mass_n), in a recall `[B, heads, N]`, mean over rows and heads."""
    mass = trace[..., -1]
    scale = mixer.bank(mass.dtype).trace_scale[:, None]
    return 1 - (weights.to(mass) / (1 + scale * mass)).sum(-1).mean()


def draw(recalls: list[Tensor], traces: list[Tensor], path: Path) -> None:
    """Save a picture of one row: per layer, recall over slots and steps beside the trace after the last step.

    The heads of a mixer are stacked.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3 * len(recalls)), layout="constrained")
    axes = figure.subplots(len(recalls), 2, squeeze=False)
    for (left, right), recall, trace in zip(axes, recalls, traces, strict=True):
        for axis, values, title, horizontal in (
            (left, recall.flatten(1).T, "recall", "step"),
            (right, trace.flatten(0, -2), "trace", "feature"),
        ):
            image = axis.imshow(values.float().cpu().numpy(), aspect="auto", interpolation="nearest")
            axis.set(title=title, xlabel=horizontal, ylabel="slot")
            figure.colorbar(image, ax=axis)
    figure.savefig(path, dpi=100)
