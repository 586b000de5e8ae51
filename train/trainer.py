"""The HF Trainer for recurrent language models: carried state, and perplexity over a whole text."""

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.cache_utils import Cache
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput

from hf_engram import load_memory, save_memory

from .data import IGNORED_LABEL, TextStreams


class LanguageTrainer(Trainer):
    """`Trainer` for causal language models on [`TextStreams`].

    With `carry_state=True` every batch begins with the state that the last one ended with, detached from it; the
    examples then have to come in order. The state is part of every checkpoint.

    Evaluation reads a text from its first token to its last in `eval_dataset.rows` parallel streams, each carrying its
    state, and scores every token once. Several processes all read the whole text.
    """

    def __init__(self, *args: Any, carry_state: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.carry_state = carry_state
        self.past_key_values: Cache | None = None

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """All matrices but the bank: recall compares directions, decay would only shrink slots beside the trace."""
        return [name for name in super().get_decay_parameter_names(model) if not name.endswith("memory_bank")]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The loss of a batch, which goes on from the last batch's state if `carry_state`."""
        inputs = {**inputs, "past_key_values": self.past_key_values, "use_cache": self.carry_state}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self.past_key_values = outputs.past_key_values
        return (loss, outputs) if return_outputs else loss

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        """As `Trainer.train`; the carried state is that of the checkpoint, empty without one."""
        self.past_key_values = None
        if resume_from_checkpoint is not None and self.carry_state:
            self.past_key_values = load_memory(
                self._memory_file(resume_from_checkpoint), self.model.config, self.args.device
            )
        return super().train(resume_from_checkpoint, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.carry_state:
            folder = Path(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
            save_memory(self.past_key_values, self._memory_file(folder), self.model.config)

    def _memory_file(self, folder: str | Path) -> Path:
        return Path(folder, f"memory_{self.args.process_index}.safetensors")

    def get_eval_dataloader(self, eval_dataset: TextStreams | None = None) -> DataLoader:
        """Batches of one segment of every stream, in order."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        return DataLoader(dataset, batch_size=dataset.rows, collate_fn=self.data_collator)

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
            ([`TokenizedText.words`]), which compares models with different tokenizers.
        """
        model, dataset = self.model, dataloader.dataset
        self.callback_handler.eval_dataloader = dataloader
        model.eval()
        state = None
        total = torch.zeros((), dtype=torch.float64)
        for batch in dataloader:
            batch = self._prepare_inputs(batch)
            with self.compute_loss_context_manager():
                outputs = model(
                    batch["input_ids"], position_ids=batch["position_ids"], past_key_values=state, use_cache=True
                )
            state = outputs.past_key_values
            losses = F.cross_entropy(
                outputs.logits.flatten(0, 1).float(),
                batch["shift_labels"].flatten(),
                ignore_index=IGNORED_LABEL,
                reduction="sum",
            )
            total += losses.double().cpu()
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)

        loss = total.item() / dataset.num_targets
        metrics = {
            f"{metric_key_prefix}_loss": loss,
            f"{metric_key_prefix}_perplexity": perplexity(loss),
            f"{metric_key_prefix}_word_perplexity": perplexity(total.item() / dataset.text.words),
        }
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=len(dataset))


def perplexity(nats: float) -> float:
    """Exponential of a mean loss; infinite where a float cannot hold it."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf
