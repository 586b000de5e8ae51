"""The HF Trainer for recurrent models: carried state, perplexity over a whole text, shifted images."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import EvalPrediction, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.trainer_utils import EvalLoopOutput

from hf_engram import EnnConfig
from hf_engram.cache_enn import empty_state

from .checkpoints import CheckpointTrainer
from .models import ModelArguments
from .streams import IGNORED_LABEL, TextStreams


class RecipeTrainer(CheckpointTrainer):
    """What the recipes share.

    Args:
        make_model: makes another model for the same data from other arguments, for `train.search`.
    """

    def __init__(self, *args: Any, make_model: Callable[[ModelArguments], PreTrainedModel], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.make_model = make_model

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """All matrices but banks: recall compares directions, decay would only shrink slots beside the trace."""
        matrices = {name for name, weight in model.named_parameters() if weight.ndim > 1}
        banks = ("memory_bank", "bank_keys", "bank_values")
        return [
            name for name in super().get_decay_parameter_names(model) if name in matrices and not name.endswith(banks)
        ]


class LanguageTrainer(RecipeTrainer):
    """`Trainer` for causal language models on [`TextStreams`].

    With `carry_state=True` every batch begins with the state that the last one ended with, detached from it; the
    examples then have to come in order. The state is part of every checkpoint.

    Evaluation reads a text from its first token to its last in `eval_dataset.rows` parallel streams, each carrying its
    state, or block by block, each beginning without one, and scores every token once. Several processes all read the
    whole text.
    """

    def __init__(self, *args: Any, carry_state: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.carry_state = carry_state
        self.past_key_values: Cache | None = None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The loss of a batch, which goes on from the last batch's state if `carry_state`."""
        inputs = {
            **inputs,
            "past_key_values": self.past_key_values,
            "use_cache": self.carry_state,
            "skip_logits": self.label_smoother is None and not return_outputs,
        }
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self.past_key_values = outputs.past_key_values
        return (loss, outputs) if return_outputs else loss

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        """As `Trainer.train`; the carried state is that of the checkpoint, empty without one."""
        self.past_key_values = None
        if resume_from_checkpoint is not None and self.carry_state:
            path = self._state_file(resume_from_checkpoint)
            self.past_key_values = load_state(path, self.model.config, self.args.device)
        return super().train(resume_from_checkpoint, **kwargs)

    def save_extras(self, folder: Path) -> None:
        """Save the carried state of this process's streams."""
        if self.carry_state:
            save_state(self.past_key_values, self._state_file(folder))

    def _state_file(self, folder: str | Path) -> Path:
        return Path(folder, f"state_{self.args.process_index}.safetensors")

    def get_eval_dataloader(self, eval_dataset: TextStreams | None = None) -> DataLoader:
        """Batches of one segment of every stream, in order; of blocks as many as are as long as those in training."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        rows = dataset.rows
        if dataset.are_blocks:
            rows = self.args.eval_batch_size * self.eval_dataset.segment_size // dataset.segment_size
        return DataLoader(dataset, batch_size=max(rows, 1), collate_fn=self.data_collator)

    @torch.no_grad()
    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Read the text once.

        Returns:
            metrics `loss`: mean negative log-likelihood of a token, in nats; `perplexity`: its exponential;
            `word_perplexity`: the exponential of the sum over tokens divided by the number of words
            ([`TokenizedText.words`]), which compares models with different tokenizers; and, if the dataset has
            `places`, for 0 and each place p, `loss_from_<p>`: the mean over the tokens at p or later, and before the
            next place, and `tokens_from_<p>`: how many these are.
        """
        model, dataset = self.model, dataloader.dataset
        self.callback_handler.eval_dataloader = dataloader
        model.eval()
        state, carries = None, not dataset.are_blocks
        borders = torch.tensor(dataset.places, device=self.args.device)
        sums, counts = torch.zeros(2, len(borders) + 1, dtype=torch.float64)
        for batch in dataloader:
            batch = self._prepare_inputs(batch)
            with self.compute_loss_context_manager():
                outputs = model(
                    batch["input_ids"], position_ids=batch["position_ids"], past_key_values=state, use_cache=carries
                )
            state = outputs.past_key_values
            targets = batch["shift_labels"].flatten()
            losses = F.cross_entropy(
                outputs.logits.flatten(0, 1).float(), targets, ignore_index=IGNORED_LABEL, reduction="none"
            )
            place = torch.bucketize(batch["position_ids"].flatten(), borders, right=True)
            sums += torch.bincount(place, losses.double(), len(sums)).cpu()
            counts += torch.bincount(place[targets != IGNORED_LABEL], minlength=len(sums)).cpu()
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)

        total = sums.sum().item()
        metrics = {
            "loss": total / dataset.num_targets,
            "perplexity": perplexity(total / dataset.num_targets),
            "word_perplexity": perplexity(total / dataset.text.words),
        }
        if dataset.places:
            for place, nats, count in zip((0, *dataset.places), sums.tolist(), counts.tolist(), strict=True):
                metrics |= {f"loss_from_{place}": nats / count, f"tokens_from_{place}": int(count)} if count else {}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=len(dataset))


class ImageTrainer(RecipeTrainer):
    """`Trainer` for image classification.

    Args:
        random_shift: in training, move every image by up to so many pixels in both directions.
        random_flip: in training, mirror every second image, left to right.
    """

    def __init__(self, *args: Any, random_shift: int = 0, random_flip: bool = False, **kwargs: Any) -> None:
        super().__init__(
            *args, compute_metrics=accuracy, preprocess_logits_for_metrics=lambda logits, _: logits.argmax(-1), **kwargs
        )
        self.random_shift = random_shift
        self.random_flip = random_flip

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`.

        The images are changed here and not in the data loader, which reads ahead: a checkpoint holds the state of the
        random generator, and what was drawn for a batch that was not trained on yet would be drawn again.
        """
        if model.training:
            pixel_values = inputs["pixel_values"]
            if self.random_shift > 0:
                pixel_values = shift(pixel_values, self.random_shift)
            if self.random_flip:
                mirrored = torch.rand(len(pixel_values), 1, 1, 1, device=pixel_values.device) < 0.5
                pixel_values = torch.where(mirrored, pixel_values.flip(-1), pixel_values)
            inputs = {**inputs, "pixel_values": pixel_values}
        return super().compute_loss(model, inputs, *args, **kwargs)


def shift(images: Tensor, most: int) -> Tensor:
    """Move every image `[B, C, H, W]` by -`most` to `most` pixels in both directions, repeating its edge."""
    batch, channels, height, width = images.shape
    padded = F.pad(images, (most,) * 4, mode="replicate")
    down, right = torch.randint(2 * most + 1, (2, batch, 1), device=images.device)
    rows = down + torch.arange(height, device=images.device)
    columns = right + torch.arange(width, device=images.device)
    batch_index = torch.arange(batch, device=images.device)[:, None, None, None]
    channel_index = torch.arange(channels, device=images.device)[None, :, None, None]
    return padded[batch_index, channel_index, rows[:, None, :, None], columns[:, None, None, :]]


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of images whose most likely class is theirs."""
    return {"accuracy": float(np.mean(prediction.predictions == prediction.label_ids))}


def perplexity(nats: float) -> float:
    """Exponential of a mean loss; infinite where a float cannot hold it."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


def save_state(past_key_values: Cache, path: str | Path) -> None:
    """Write the state of any architecture, layer by layer, to a safetensors file."""
    tensors = {
        f"{index}.{name}": value.contiguous()
        for index, layer in enumerate(past_key_values.layers)
        for name, value in layer.recurrent_states.items()
    }
    save_file(tensors, path)


def load_state(path: str | Path, config: EnnConfig, device: torch.device) -> Cache:
    """Read what [`save_state`] wrote for a model with this config."""
    tensors = load_file(path)
    cache = empty_state(config)
    for index, layer in enumerate(cache.layers):
        values = [tensors[f"{index}.{name}"].to(device) for name in layer.recurrent_states]
        layer.store(layer.state_class(*values), 0)
    return cache


def state_bytes(past_key_values: Cache) -> int:
    """Bytes that the state takes for one row, over all layers."""
    tensors = [value for layer in past_key_values.layers for value in layer.recurrent_states.values()]
    return sum(value.numel() * value.element_size() // len(value) for value in tensors)
