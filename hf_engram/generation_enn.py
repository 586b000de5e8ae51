"""`generate` for a model whose state must not move once a row has finished."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, StoppingCriteriaList
from transformers.cache_utils import Cache


class FinishedRows(StoppingCriteriaList):
    """Stopping criteria that remember which rows have finished, in `rows` (bool `[B]`, `None` before the first check).

    `generate` feeds padding with an attention mask of 1 to rows that have finished while others go on.
    """

    rows: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Ask all criteria; a row that has finished stays finished."""
        done = super().__call__(input_ids, scores, **kwargs)
        self.rows = done if self.rows is None else self.rows | done
        return done


class EnnGenerationMixin(GenerationMixin):
    """`GenerationMixin` with frozen finished rows and memories that outlive a sequence."""

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        finished_rows: FinishedRows | None = None,
        write_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As in `GenerationMixin`; rows that have finished are masked, and tokens beyond `write_mask` `[B, S]` write.

        The columns of `write_mask` are the tokens of the sequence, those that `past_key_values` has seen included.
        """
        inputs = super().prepare_inputs_for_generation(
            input_ids, next_sequence_length, past_key_values, attention_mask, inputs_embeds, **kwargs
        )
        has_finished = finished_rows is not None and finished_rows.rows is not None and finished_rows.rows.any()
        if has_finished and past_key_values is not None:
            going_on = ~finished_rows.rows[:, None]
            mask = inputs.get("attention_mask")
            inputs["attention_mask"] = (
                going_on.long() if mask is None else torch.cat([mask[:, :-1], mask[:, -1:] * going_on], -1)
            )
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        if write_mask is not None and seen < write_mask.shape[1]:
            steps = inputs["input_ids"].shape[1]
            given = write_mask[:, seen : seen + steps].bool()
            inputs["write_mask"] = F.pad(given, (0, steps - given.shape[1]), value=True)
        return inputs

    def _prefill(
        self,
        input_ids: Tensor,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        is_first_iteration: bool = True,
    ) -> Any:
        """As in `GenerationMixin`, at once or in chunks.

        Raises:
            ValueError: `input_ids` is taken to contain what `past_key_values` has seen, but is not longer than that; or
                `write_mask` is given with `inputs_embeds`, or is longer than `input_ids`.
        """
        inputs_embeds, write_mask = model_kwargs.get("inputs_embeds"), model_kwargs.get("write_mask")
        past_key_values, attention_mask = model_kwargs.get("past_key_values"), model_kwargs.get("attention_mask")
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        given = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
        # As transformers tells it: a mask of another length than what is given says that these are new tokens.
        masked = getattr(generation_config, "_mask_length", -1) if attention_mask is None else attention_mask.shape[1]
        only_new = inputs_embeds is None and masked != given
        if past_key_values is not None and given <= seen and not only_new:
            raise ValueError(
                f"past_key_values has seen {seen} tokens, input_ids has only {given}. Pass the whole "
                "sequence; or the new tokens with an attention_mask over the whole sequence; or "
                "`hf_engram.as_new_sequence(past_key_values)` to begin a new sequence on this memory."
            )
        if write_mask is not None:
            if inputs_embeds is not None:
                raise ValueError("write_mask goes with input_ids in `generate`; given: inputs_embeds.")
            if write_mask.shape[1] > given:
                raise ValueError(
                    f"write_mask has shape {tuple(write_mask.shape)}; expected at most {given} columns, one for every "
                    "token of input_ids."
                )
            model_kwargs["write_mask"] = F.pad(write_mask, (seen if only_new else 0, 0), value=True)
        return super()._prefill(input_ids, generation_config, model_kwargs, is_first_iteration)

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        # transformers repeats every tensor for beams and returned sequences; these are the same for all rows.
        of_all_rows = {
            name: kwargs.pop(name)
            for name in ("slot_mask", "write_mask", "position_ids")
            if kwargs.get(name) is not None and (name == "slot_mask" or len(kwargs[name]) == 1)
        }
        input_ids, kwargs = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)
        return input_ids, kwargs | of_all_rows

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
        """Keep the two-dimensional mask: the layers make what they need of it themselves."""
        return attention_mask

    def _prepare_position_ids_for_generation(self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]) -> None:
        # Position 0 clears the state, which a memory handed to `generate` must survive. Position ids given by the
        # caller are used as they are.
        return None

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: StoppingCriteriaList,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        finished_rows = FinishedRows(stopping_criteria)
        return super()._sample(input_ids, logits_processor, finished_rows, *args, finished_rows=finished_rows, **kwargs)
