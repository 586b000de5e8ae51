"""PyTorch models of the Engram Neural Network: the backbone and its heads."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .cache_enn import are_of_types, empty_state, misfit, own_layers, state_on
from .configuration_enn import IMAGE_SEQUENCES, EnnConfig
from .generation_enn import EnnGenerationMixin
from .images_enn import PositionEmbeddings, image_to_sequence
from .layers_enn import EnnCell, EnnLayer, Pooling, StatefulLayer, initial_gate_bias, make_layer
from .masks_enn import check_packing, mean_entropy, padding_mask, slots_by_layer, step_masks
from .mixer_enn import INITIAL_TEMPERATURE, INITIAL_TRACE_SCALE, EngramMixer, initial_decay_bias
from .ops_enn import NO_MASKS, StepMasks
from .ops_mixer_enn import MixerReads
from .ops_token_memory_enn import TokenReads
from .projections_enn import Projection, ResidualProjection
from .safetensors_enn import SafetensorsOnly
from .token_memory_enn import INITIAL_SCALE, INITIAL_TIMESCALE, TokenMemory, mean_loss
from .token_memory_enn import INITIAL_TEMPERATURE as INITIAL_TOKEN_TEMPERATURE


@dataclass
class EnnModelOutput(BaseModelOutputWithPast):
    """Output of [`EnnModel`].

    Attributes:
        last_hidden_state: `[B, T, H]`.
        past_key_values: the state after the last step, with `use_cache=True`.
        hidden_states: input of the first layer and output of every layer, that of the last one after the final
            normalisation where there is one, with `output_hidden_states=True`.
        recall: per layer with a memory, the recall weights over slots `[B, T, N]`, of a mixer `[B, T, heads, N]`, with
            `output_recall=True`.
        traces: per layer with a memory, the trace after the last step `[B, N, H]`, of a mixer
            `[B, heads, N, 2 * head_dim + 1]` (keys, values and mass of the writes), with `output_traces=True`.
        encodings: per engram layer, the encoding of every step `[B, T, H]`, which it compared with the memory and
            wrote, with `output_encodings=True`.
        reads: per mixer, what every step asked the memory and wrote into it (a [`MixerReads`]), with
            `output_reads=True`.
        recall_entropy: each row's mean entropy of recall in nats, over layers and valid steps, `[B]`, when
            `config.recall_entropy_weight` is not 0.
    """

    recall: tuple[Tensor, ...] | None = None
    traces: tuple[Tensor, ...] | None = None
    encodings: tuple[Tensor, ...] | None = None
    reads: tuple[MixerReads, ...] | None = None
    recall_entropy: Tensor | None = None


@dataclass
class EnnCausalLMOutput(EnnModelOutput, CausalLMOutputWithPast):
    """`loss` (a scalar, when `labels` are given), `logits` `[B, T, vocab_size]`, and the backbone's outputs.

    Attributes:
        token_reads: what every step asked the token memory and wrote into it (a [`TokenReads`]), with
            `output_reads=True`; `None` without a token memory.
    """

    token_reads: TokenReads | None = None


@dataclass
class EnnSequenceClassifierOutput(EnnModelOutput, SequenceClassifierOutputWithPast):
    """`loss` (a scalar, when `labels` are given), `logits` `[B, num_labels]`, and the backbone's outputs."""


class EnnPreTrainedModel(SafetensorsOnly, PreTrainedModel):
    """Base of all ENN models: config, initialisation, and what transformers needs to know about them."""

    config: EnnConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _is_stateful = True
    _no_split_modules = ["EnnLayer", "EnnBlock", "TokenMemory"]
    _skip_keys_device_placement = ["past_key_values"]
    _can_record_outputs = {
        "hidden_states": OutputRecorder(StatefulLayer, index=0),
        "recall": [OutputRecorder(EnnCell, index=1), OutputRecorder(EngramMixer, index=1)],
        "traces": [OutputRecorder(EnnCell, index=2), OutputRecorder(EngramMixer, index=2)],
        "encodings": OutputRecorder(EnnCell, index=3),
        "reads": OutputRecorder(EngramMixer, index=3),
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Projection):
            init.normal_(module.weight, std=module.in_features**-0.5)
        elif isinstance(module, ResidualProjection):
            init.normal_(module.weight, std=self.config.initializer_range * module.in_features**-0.5)
        elif isinstance(module, EnnCell):
            for linear in (module.encoder, module.integrator, module.output):
                if linear is not None:
                    init.kaiming_normal_(linear.weight, nonlinearity="relu")
            init.xavier_uniform_(module.memory_bank)
            gate_bias = initial_gate_bias(self.config.longest_timescale, len(module.encoder.bias))
            if module.gate is not None:
                init.xavier_uniform_(module.gate.weight)
                init.copy_(module.gate.bias, gate_bias)
            if module.recurrence is not None:  # begins as Keras' GRU
                init.xavier_uniform_(module.integrator.weight)
                init.orthogonal_(module.recurrence.weight)
                kept = torch.stack([torch.zeros_like(gate_bias), -gate_bias, torch.zeros_like(gate_bias)])
                init.copy_(module.integrator.bias, kept.flatten())  # reset, update, proposal
        elif isinstance(module, EnnLayer):
            if module.layer_scale is not None:
                init.constant_(module.layer_scale, self.config.layer_scale_init_value)
        elif isinstance(module, EngramMixer):
            bound = len(module.conv_weight) ** -0.5
            init.uniform_(module.conv_weight, -bound, bound)
            init.normal_(module.bank_keys)
            init.normal_(module.bank_values, std=self.config.initializer_range)
            # A token first recalls what tokens like it wrote: mixers bind keys to values sooner from there.
            init.copy_(module.q_proj.weight, module.k_proj.weight)
            init.constant_(module.log_trace_scale, math.log(INITIAL_TRACE_SCALE))
            for temperature in (module.log_write_temperature, module.log_read_temperature):
                init.constant_(temperature, math.log(INITIAL_TEMPERATURE))
            heads = module.num_heads
            init.copy_(module.plasticity.bias, torch.cat([torch.zeros(heads), initial_decay_bias(heads)]))
        elif isinstance(module, PositionEmbeddings):
            init.normal_(module.weight)  # as large as standardised pixels, beside which they are read
        elif isinstance(module, TokenMemory):
            init.normal_(module.slot_keys)
            init.zeros_(module.scale.weight)
            init.constant_(module.scale.bias, math.log(INITIAL_SCALE))
            init.constant_(module.log_temperature, math.log(INITIAL_TOKEN_TEMPERATURE))
            init.constant_(module.log_timescale, math.log(INITIAL_TIMESCALE))

    def add_recall_entropy(
        self, loss: Tensor, outputs: EnnModelOutput, targets: Tensor, num_items_in_batch: Any = None, **kwargs: Any
    ) -> Tensor:
        """Add the sparsity regulariser to a loss: the entropy of recall, each row weighted by its share of the targets.

        `num_items_in_batch` counts the targets of all micro-batches of an accumulated step, so that the step is that
        of one big batch.
        """
        if outputs.recall_entropy is None:
            return loss
        counts = (targets != -100)[..., None].flatten(1).sum(1)
        total = counts.sum() if num_items_in_batch is None else num_items_in_batch
        return loss + self.config.recall_entropy_weight * (counts * outputs.recall_entropy).sum() / total


class EnnModel(EnnPreTrainedModel):
    """The ENN without a head.

    Token embeddings (unless `config.vocab_size` is `None`), `config.num_hidden_layers` engram layers, and a final
    layer normalisation when the layers are residual blocks.
    """

    def __init__(self, config: EnnConfig) -> None:
        super().__init__(config)
        if config.vocab_size is None:
            self.embed_tokens = None
        else:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.embedding_size)
        self.embedding_dropout = nn.Dropout(config.embedding_dropout)
        # A residual stream is hidden_size wide from the start.
        widen = config.residual and config.embedding_size != config.hidden_size
        self.embedding_projection = nn.Linear(config.embedding_size, config.hidden_size) if widen else None
        first = config.hidden_size if widen else config.embedding_size
        self.layers = nn.ModuleList(
            make_layer(config, index, config.hidden_size if index else first)
            for index in range(config.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.residual else None
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        write_mask: Tensor | None = None,
        plastic: bool = True,
        slot_mask: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> EnnModelOutput:
        r"""
        Args:
            input_ids: token ids `[B, T]`; or give `inputs_embeds`.
            attention_mask: `[B, T]`, or `[B, S]` with S > T when the first S - T tokens are already in
                `past_key_values`. 0 marks padding, anywhere: it leaves the state as it is.
            position_ids: `[B, T]` or `[1, T]`. A 0 begins a new document: the state is cleared before that token.
                Packed documents are told by these alone (not by `seq_idx` or `cu_seq_lens_q`).
            past_key_values: the state to go on from.
            inputs_embeds: features `[B, T, embedding_size]`.
            use_cache: return the state; not with activation checkpointing in training mode.
            write_mask: bool `[B, T]` or `[1, T]`. `False` erases what that token would write: the trace decays, and
                nothing is added.
            plastic: `False` freezes the traces: they are read, but neither decay nor are written.
            slot_mask: bool `[N]`, or `[num_hidden_layers, N]`. Slots that are `False` are neither recalled nor
                written; their trace stays as it is.
            output_hidden_states, output_recall, output_traces, output_encodings, output_reads: return these, too
                ([`EnnModelOutput`]).

        Raises:
            ValueError: inputs that do not fit each other or the config.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self._embed(input_ids)
        self._check_features(inputs_embeds)
        check_packing(position_ids, kwargs)
        if self.gradient_checkpointing and self.training:
            # Layers that run twice would go on from what they have left themselves the first time.
            if past_key_values is not None:
                raise ValueError(
                    "past_key_values cannot be carried on with activation checkpointing in training mode: leave it "
                    "out, or call `model.activation_checkpointing_disable()`."
                )
            use_cache = False
        if use_cache and past_key_values is None:
            past_key_values = empty_state(self.config)
        if past_key_values is not None:
            self.check_state(past_key_values, inputs_embeds.shape[0])

        masks = step_masks(inputs_embeds, attention_mask, position_ids, write_mask, past_key_values)
        if masks.valid is not None:
            # Padding may hold anything, NaN as well, which a product with 0 would not keep out of the sums over time.
            inputs_embeds = inputs_embeds.masked_fill(~masks.valid[..., None], 0)
        hidden_states = self.embedding_dropout(inputs_embeds)
        if self.embedding_projection is not None:
            hidden_states = self.embedding_projection(hidden_states)
        if self.gradient_checkpointing and self.training and not hidden_states.requires_grad:
            # Reentrant checkpointing gives a layer no gradients unless one of its inputs takes part in autograd.
            hidden_states = hidden_states.detach().requires_grad_()
        entropies = []
        for layer, slots in zip(self.layers, slots_by_layer(slot_mask, self.config), strict=True):
            hidden_states, recall = layer(
                hidden_states, past_key_values=past_key_values, masks=masks, plastic=plastic, slots=slots
            )
            if self.config.recall_entropy_weight > 0 and recall is not None:
                entropies.append(mean_entropy(recall, masks.valid))
        if self.norm is not None:
            hidden_states = self.norm(hidden_states)
        return EnnModelOutput(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values if use_cache else None,
            recall_entropy=torch.stack(entropies).mean(0) if entropies else None,
        )

    def _embed(self, input_ids: Tensor) -> Tensor:
        if self.embed_tokens is None:
            raise ValueError("This model has no token embeddings (vocab_size is None): give inputs_embeds.")
        if input_ids.ndim != 2 or input_ids.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"input_ids has shape {tuple(input_ids.shape)} and dtype {input_ids.dtype}; "
                "expected [batch, steps] of torch.int64 or torch.int32."
            )
        return self.embed_tokens(input_ids)

    def _check_features(self, inputs_embeds: Tensor) -> None:
        if inputs_embeds.ndim != 3 or inputs_embeds.shape[-1] != self.config.embedding_size:
            raise ValueError(
                f"inputs_embeds has shape {tuple(inputs_embeds.shape)}; "
                f"expected [batch, steps, {self.config.embedding_size}] (embedding_size)."
            )
        mixed = torch.is_autocast_enabled(inputs_embeds.device.type) and inputs_embeds.is_floating_point()
        if inputs_embeds.dtype != self.dtype and not mixed:
            raise ValueError(f"inputs_embeds has dtype {inputs_embeds.dtype}; expected the model's, {self.dtype}.")
        if inputs_embeds.shape[1] == 0:
            raise ValueError("The inputs have no steps: give at least one token or feature vector.")

    def check_state(self, past_key_values: Cache, batch: int) -> None:
        """Let our layers take their places in an empty cache, and refuse what is not a state of this model.

        Raises:
            ValueError: it is another model's, or of another batch size.
        """
        layers = own_layers(past_key_values, self.config).layers if isinstance(past_key_values, Cache) else ()
        if not are_of_types(layers, self.config):
            raise ValueError(
                f"past_key_values ({type(past_key_values).__name__}) is not the state of this model: make an empty one "
                "with `DynamicCache(config=model.config)`, or pass what the model returned."
            )
        for index, layer in enumerate(layers):
            wrong = None if layer.state is None else misfit(layer, layer.state, self.config, batch)
            if wrong is not None:
                raise ValueError(
                    f"past_key_values holds, in layer {index}, {wrong} for a batch of {batch}. "
                    "`past_key_values.batch_repeat_interleave(n)` repeats the rows."
                )


class EnnForCausalLM(EnnPreTrainedModel, EnnGenerationMixin):
    """The ENN with a language modelling head, for training and `generate`."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: EnnConfig) -> None:
        super().__init__(config)
        if config.vocab_size is None:
            raise ValueError("EnnForCausalLM needs token embeddings: `vocab_size` is None in the config.")
        if config.tie_word_embeddings and config.embedding_size != config.hidden_size:
            raise ValueError(
                f"`tie_word_embeddings` needs embedding_size ({config.embedding_size}) to be hidden_size "
                f"({config.hidden_size}); allowed otherwise: tie_word_embeddings=False."
            )
        self.model = EnnModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.token_memory = None if config.token_memory_size is None else TokenMemory(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        write_mask: Tensor | None = None,
        plastic: bool = True,
        slot_mask: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        skip_logits: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> EnnCausalLMOutput:
        r"""
        Args, beside those of [`EnnModel`]:
            labels: token ids `[B, T]`, shifted inside; -100 is ignored.
            logits_to_keep: how many last steps to compute logits for (0: all), or their indices.
            skip_logits: with labels, return the loss alone; `logits` is `None`. Training with a token memory is
                faster so, since only the labels' probabilities are mixed.

        With a token memory, `logits` are logarithms of probabilities; it reads `input_ids`, obeys `write_mask` and
        `plastic`, and knows nothing of `slot_mask`.

        Raises:
            ValueError: as [`EnnModel`]; or skip_logits without labels, or with logits_to_keep.
        """
        every_step = isinstance(logits_to_keep, int) and logits_to_keep == 0
        if skip_logits and (labels is None or not every_step):
            raise ValueError("skip_logits=True leaves the loss alone: give labels, and no logits_to_keep.")
        masks, token_reads = NO_MASKS, None
        if self.token_memory is not None:
            if input_ids is None:
                raise ValueError(
                    "The token memory (token_memory_size) reads input_ids; inputs_embeds do not tell them."
                )
            if past_key_values is not None:
                self.model.check_state(past_key_values, input_ids.shape[0])
            masks = step_masks(input_ids, attention_mask, position_ids, write_mask, past_key_values)
        outputs: EnnModelOutput = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            write_mask=write_mask,
            plastic=plastic,
            slot_mask=slot_mask,
            return_dict=True,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden_states[:, keep])
        targets = None if labels is None else kwargs.get("shift_labels")
        if labels is not None and targets is None:
            targets = F.pad(labels[:, 1:], (0, 1), value=-100)
        if self.token_memory is not None:
            cache = outputs.past_key_values if past_key_values is None else past_key_values
            some = {
                "kept": None if every_step else torch.arange(input_ids.shape[1], device=logits.device)[keep],
                "targets": targets if skip_logits else None,
            }
            logits, reads = self._remember(logits, hidden_states, input_ids, cache, masks, plastic, **some)
            token_reads = reads if kwargs.get("output_reads") else None
        loss = None
        if labels is not None:
            if self.token_memory is not None and skip_logits:
                loss = mean_loss(logits, targets, kwargs.get("num_items_in_batch"))
            else:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            loss = self.add_recall_entropy(loss, outputs, targets, **kwargs)
        return EnnCausalLMOutput(
            loss=loss,
            logits=None if skip_logits else logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            recall=outputs.recall,
            traces=outputs.traces,
            encodings=outputs.encodings,
            reads=outputs.reads,
            recall_entropy=outputs.recall_entropy,
            token_reads=token_reads,
        )

    def _remember(
        self,
        logits: Tensor,
        hidden_states: Tensor,
        input_ids: Tensor,
        past_key_values: Cache | None,
        masks: StepMasks,
        plastic: bool,
        **some: Tensor | None,
    ) -> tuple[Tensor, TokenReads]:
        """What the token memory makes of the logits, and its reads; its new state goes to the cache.

        `some` steps, or tokens, are told as to [`TokenMemory`].
        """
        cache = None if past_key_values is None else past_key_values.layers[-1]
        state = state_on(logits.device, cache)
        logits, state, reads = self.token_memory(
            logits, hidden_states, input_ids, state, masks, plastic, with_state=cache is not None, **some
        )
        if cache is not None:
            cache.store(state, input_ids.shape[1])
        return logits, reads


class EnnClassifier(EnnPreTrainedModel):
    """What the classification heads share: backbone, pooling over valid steps, dropout, one linear layer, loss."""

    def __init__(self, config: EnnConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = EnnModel(config)
        self.pooling = Pooling(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def classify(
        self,
        attention_mask: Tensor | None,
        labels: Tensor | None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> EnnSequenceClassifierOutput:
        """Logits `[B, num_labels]` and, with `labels`, the loss; `kwargs` go to [`EnnModel`]."""
        outputs: EnnModelOutput = self.model(attention_mask=attention_mask, return_dict=True, **kwargs)
        hidden_states = outputs.last_hidden_state
        pooled = self.pooling(hidden_states, padding_mask(attention_mask, hidden_states))
        logits = self.classifier(self.dropout(pooled))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                labels=labels, pooled_logits=logits, config=self.config, num_items_in_batch=num_items_in_batch
            )
            if num_items_in_batch is not None and self.config.problem_type != "single_label_classification":
                loss = loss * labels.numel() / num_items_in_batch  # transformers does so for class labels only
            loss = self.add_recall_entropy(loss, outputs, labels, num_items_in_batch)
        return EnnSequenceClassifierOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            recall=outputs.recall,
            traces=outputs.traces,
            encodings=outputs.encodings,
            reads=outputs.reads,
            recall_entropy=outputs.recall_entropy,
        )


class EnnForSequenceClassification(EnnClassifier):
    """The ENN with a classification or regression head, for tokens or continuous features.

    `num_labels=1` is regression with a mean squared error, as everywhere in transformers.
    """

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> EnnSequenceClassifierOutput:
        r"""
        Args, beside those of [`EnnModel`]:
            labels: class indices `[B]`, or targets `[B]` or `[B, num_labels]` for regression.
        """
        return self.classify(
            attention_mask,
            labels,
            input_ids=input_ids,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )


class EnnForImageClassification(EnnClassifier):
    """The ENN reading an image as a sequence of rows, pixels or patches (`config.image_sequence`)."""

    main_input_name = "pixel_values"
    input_modalities = ("image",)

    def __init__(self, config: EnnConfig) -> None:
        if config.image_sequence is None:
            raise ValueError(
                f"EnnForImageClassification needs `image_sequence` in the config; allowed: {IMAGE_SEQUENCES}."
            )
        super().__init__(config)
        width = config.position_embedding_size
        self.position_embeddings = None if width is None else PositionEmbeddings(config.image_steps, width)
        self.post_init()

    def embed_images(self, pixel_values: Tensor) -> Tensor:
        """Images `[B, num_channels, image_size, image_size]` as the sequences that the first layer reads.

        Returns:
            `inputs_embeds` `[B, T, embedding_size]`: the pixels of every step, and the embedding of its place.
        """
        sequence = image_to_sequence(pixel_values.to(self.dtype), self.config)
        if self.position_embeddings is None:
            return sequence
        places = self.position_embeddings(torch.arange(sequence.shape[1], device=sequence.device))
        return torch.cat([sequence, places.expand(len(sequence), -1, -1)], -1)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> EnnSequenceClassifierOutput:
        r"""
        Args:
            pixel_values: images `[B, num_channels, image_size, image_size]`, as [`EnnImageProcessor`] returns them.
            labels: class indices `[B]`.
            inputs_embeds: sequences `[B, T, embedding_size]` instead of images ([`embed_images`]).
            attention_mask: `[B, T]`, 0 at padding of `inputs_embeds`.
            use_cache, and further arguments: as in [`EnnModel`].
        """
        if (pixel_values is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of pixel_values and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_images(pixel_values)
        return self.classify(attention_mask, labels, inputs_embeds=inputs_embeds, use_cache=use_cache, **kwargs)
