"""Configuration of the Engram Neural Network (ENN)."""

import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig, configuration_utils

ATTENTION_LAYER_TYPES = ("full_attention", "sliding_attention")
BLOCK_LAYER_TYPES = ("engram_mixer", *ATTENTION_LAYER_TYPES)  # these are residual blocks with a feed-forward layer
MEMORY_LAYER_TYPES = ("engram", "engram_mixer")
LAYER_TYPES = ("engram", *BLOCK_LAYER_TYPES)
# Fields of the config that only layers of these types read.
FIELDS_OF_LAYER_TYPES = {
    ("engram",): (
        "integrator",
        "integrator_size",
        "longest_timescale",
        "use_layer_norm",
        "hebbian_lr",
        "trace_scale",
        "trace_clip",
        "trace_scope",
        "trace_noise",
        "initial_state_std",
        "recall_temperature",
        "sparsity_strength",
        "layer_scale_init_value",
    ),
    ("engram_mixer",): ("conv_kernel",),
    MEMORY_LAYER_TYPES: ("memory_size", "recall_entropy_weight"),
    BLOCK_LAYER_TYPES: ("num_attention_heads", "intermediate_size"),
    ("sliding_attention",): ("sliding_window",),
}
# The Trainer reads a checkpoint's config.json as a plain PreTrainedConfig, which refuses layer types it does not know.
configuration_utils.ALLOWED_ATTN_LAYER_TYPES += tuple(
    name for name in LAYER_TYPES if name not in configuration_utils.ALLOWED_ATTN_LAYER_TYPES
)
TRACE_SCOPES = ("sequence", "batch")
INTEGRATORS = ("recurrent", "gated", "gru")
POOLINGS = ("last", "mean", "attention")
IMAGE_SEQUENCES = ("row", "pixel", "patch")


def memory_layers(layer_types: list[str]) -> list[int]:
    """Indices of the layers that have a memory; attention and the layers of baselines have none."""
    return [index for index, layer_type in enumerate(layer_types) if layer_type in MEMORY_LAYER_TYPES]


@strict
class EnnConfig(PreTrainedConfig):
    r"""
    Configuration of [`EnnModel`] and its heads.

    The cell is the one of Szelogowski, *Hebbian Memory-Augmented Recurrent Networks: Engram Neurons in Deep Learning*
    (arXiv 2507.21474). The defaults keep one Hebbian trace per sequence, so that a row's output depends on that row
    alone; [`EnnConfig.paper`] gives the published behaviour instead.

    Args:
        > Parameters of the network

        vocab_size (`int`, *optional*, defaults to 32000):
            Number of token embeddings. `None` for models that read continuous features through `inputs_embeds`;
            always `None` when `image_sequence` is set.
        hidden_size (`int`, *optional*, defaults to 128):
            Width H of the hidden state and of every memory slot.
        embedding_size (`int`, *optional*):
            Width of what the first layer reads. Defaults to `hidden_size`, or to the width of one image step.
        num_hidden_layers (`int`, *optional*, defaults to 1):
            Number of stacked engram layers.
        layer_types (`list[str]`, *optional*):
            One entry per layer. `"engram"` (default): the paper's recurrent cell. `"engram_mixer"` (ours): a memory of
            several heads and time scales that trains in parallel over time. `"full_attention"`,
            `"sliding_attention"`: attention over all past tokens, or over `sliding_window` of them, for hybrids.
            All but `"engram"` make the network residual.
        integrator (`str`, *optional*, defaults to `"recurrent"`):
            How the hidden state is made: `"recurrent"`, the paper's, replaces it at every step; `"gated"` (ours) moves
            it by a learned share towards a proposal, `h + g * (proposal - h)`; `"gru"` (ours) is a GRU that reads the
            sum of the encoding and what was recalled, better than `"gated"` at language (docs/log.md, 2026-11-28).
        integrator_size (`int`, *optional*):
            Width of the integrator's inner layer; a `"gru"` has none. Defaults to `3 * hidden_size`, the paper's; for
            `"gated"` to the largest multiple of 8 that leaves the cell no more parameters than that.
        longest_timescale (`float`, *optional*):
            Longest of the time scales, in steps, at which the units of a `"gated"` or `"gru"` integrator start out,
            spread evenly on a log scale from 2 (compare the chrono initialisation, arXiv 1804.11188): as many as the
            steps of a sequence are a good choice where the last step has to know the first. By default all start at
            3.7. With 2, a state that is carried on beyond the length of training sequences stays what it was there:
            slower units drift (docs/log.md, 2026-11-28).
        use_layer_norm (`bool`, *optional*, defaults to `True`):
            Layer normalisation of the encoding and of the hidden state (which a `"gru"` leaves as it is).
        layer_norm_eps (`float`, *optional*, defaults to 1e-6):
            Epsilon of every layer normalisation.
        residual (`bool`, *optional*, defaults to `False`):
            Wrap each cell in a pre-norm residual block (`x + cell(norm(x))`) and normalise after the last one. Always
            so when there are layers of other types than `"engram"`.
        layer_scale_init_value (`float`, *optional*):
            What `"engram"` layers add to the residual stream is scaled, unit by unit, by learned numbers that begin at
            this value (LayerScale, arXiv 2103.17239). A cell's hidden state is normalised, fifty times as large as
            the embeddings: scaled to their size (0.02) it learns language sooner. `None`: no scale.
        hidden_dropout (`float`, *optional*, defaults to 0.0):
            Dropout on the output of every layer.
        embedding_dropout (`float`, *optional*, defaults to 0.0):
            Dropout on the input of the first layer.
        classifier_dropout (`float`, *optional*, defaults to 0.0):
            Dropout before a classification or regression head.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of the embeddings and of the heads. The cell's own weights follow the paper's
            initialisers (He normal, Glorot uniform for the bank). What mixers, attention and feed-forward layers add
            to the residual stream begins with about this size.

        > Parameters of the memory

        memory_size (`int`, *optional*, defaults to 64):
            Number N of slots in the bank and in the trace.
        hebbian_lr (`float`, *optional*, defaults to 0.05):
            Plasticity: the share of the trace that one write replaces.
        trace_scale (`float`, *optional*, defaults to 0.5):
            Weight of the trace beside the bank.
        trace_clip (`float`, *optional*):
            Bound of every trace entry (the paper: 0.1). `None` leaves the trace unbounded, which keeps the
            attribution of recalls to writes exact.
        trace_scope (`str`, *optional*, defaults to `"sequence"`):
            `"sequence"`: one trace per row. `"batch"`: every row adds the mean write of the batch, as published.
        trace_noise (`float`, *optional*, defaults to 0.0):
            Standard deviation of the noise inside every write, in training mode only.
        initial_state_std (`float`, *optional*, defaults to 0.0):
            Standard deviation of a random first hidden state and trace, in training mode only.
        recall_temperature (`float`, *optional*, defaults to 1.5):
            Temperature of recall before `sparsity_strength` divides it.
        sparsity_strength (`float`, *optional*, defaults to 0.1):
            The softmax over slots runs at `recall_temperature / (1 + 10 * sparsity_strength)`.
        recall_entropy_weight (`float`, *optional*, defaults to 0.0):
            Weight of the mean entropy of recall (in nats) in the loss: a sparsity regulariser.

        > Parameters of mixers and attention

        num_attention_heads (`int`, *optional*, defaults to 4):
            Heads A of every mixer and attention layer, each of width D, `hidden_size / num_attention_heads` rounded up
            to an even number. A head of a mixer has `memory_size` slots and forgets over a time scale of its own; the
            constants of the memory above are learned there, and have no effect.
        conv_kernel (`int`, *optional*, defaults to 4):
            Tokens that a mixer's convolution reads, the token at hand included.
        intermediate_size (`int`, *optional*):
            Width of the feed-forward layers. Defaults to `8 / 3 * hidden_size`, rounded to a multiple of 8.
        sliding_window (`int`, *optional*):
            Tokens that a `"sliding_attention"` layer attends to, the token at hand included.

        > Parameters of the heads

        token_memory_size (`int`, *optional*):
            Slots of a token memory (ours) in [`EnnForCausalLM`]: it remembers which token followed which hidden state,
            and mixes what it recalls into the prediction. Its state has `token_memory_size * vocab_size` numbers for a
            sequence. `None`: no token memory.
        pooling (`str`, *optional*, defaults to `"last"`):
            What a classification head reads: the `"last"` valid step, the `"mean"` over valid steps, or learned
            `"attention"` over them.
        image_sequence (`str`, *optional*):
            How [`EnnForImageClassification`] reads an image: one `"row"`, `"pixel"` or `"patch"` per step.
        image_size (`int`, *optional*, defaults to 28):
            Height and width of the images.
        num_channels (`int`, *optional*, defaults to 1):
            Channels of the images.
        patch_size (`int`, *optional*, defaults to 4):
            Height and width of a patch, for `image_sequence="patch"`.
        pixel_permutation_seed (`int`, *optional*):
            Read the steps of an image in a fixed random order made from this seed.
        position_embedding_size (`int`, *optional*):
            Width of a learned embedding of every step's place in the image, which the first layer reads beside the
            pixels, so that the memory can be addressed by places. `None`: none.
        tie_word_embeddings (`bool`, *optional*, defaults to `True`):
            Use the token embeddings as the language head; needs `embedding_size == hidden_size`.
        use_cache (`bool`, *optional*, defaults to `True`):
            Return the state as `past_key_values`.
        bos_token_id, eos_token_id, pad_token_id (`int`, *optional*):
            Special tokens.

    Raises:
        `huggingface_hub.errors.StrictDataclassError`: a value has the wrong type or is out of range; the message names
            the field, the value given and what is allowed.

    Example:

    ```python
    >>> from hf_engram import EnnConfig, EnnForCausalLM

    >>> model = EnnForCausalLM(EnnConfig(vocab_size=4096, hidden_size=192))
    ```
    """

    model_type = "enn"
    keys_to_ignore_at_inference = [
        "past_key_values",
        "hidden_states",
        "recall",
        "traces",
        "encodings",
        "reads",
        "recall_entropy",
        "token_reads",
    ]

    vocab_size: int | None = 32000
    hidden_size: int = 128
    embedding_size: int | None = None
    num_hidden_layers: int = 1
    layer_types: list[str] | None = None
    integrator: str = "recurrent"
    integrator_size: int | None = None
    longest_timescale: float | int | None = None
    use_layer_norm: bool = True
    layer_norm_eps: float = 1e-6
    residual: bool = False
    layer_scale_init_value: float | int | None = None
    hidden_dropout: float | int = 0.0
    embedding_dropout: float | int = 0.0
    classifier_dropout: float | int = 0.0
    initializer_range: float = 0.02

    memory_size: int = 64
    hebbian_lr: float | int = 0.05
    trace_scale: float | int = 0.5
    trace_clip: float | int | None = None
    trace_scope: str = "sequence"
    trace_noise: float | int = 0.0
    initial_state_std: float | int = 0.0
    recall_temperature: float | int = 1.5
    sparsity_strength: float | int = 0.1
    recall_entropy_weight: float | int = 0.0

    num_attention_heads: int = 4
    conv_kernel: int = 4
    intermediate_size: int | None = None
    sliding_window: int | None = None

    token_memory_size: int | None = None
    pooling: str = "last"
    image_sequence: str | None = None
    image_size: int = 28
    num_channels: int = 1
    patch_size: int = 4
    pixel_permutation_seed: int | None = None
    position_embedding_size: int | None = None
    tie_word_embeddings: bool = True
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.layer_types is None:
            self.layer_types = ["engram"] * self.num_hidden_layers
        if any(layer_type in BLOCK_LAYER_TYPES for layer_type in self.layer_types):
            self.residual = True
        if self.intermediate_size is None:
            self.intermediate_size = max(round(self.hidden_size / 3) * 8, 8)
        if self.integrator_size is None:
            self.integrator_size = 3 * self.hidden_size
            if self.integrator == "gated":
                # 4 H K + K of the two layers and 3 H² + H of the gate, within the paper's 12 H² + 3 H.
                width = (9 * self.hidden_size + 2) * self.hidden_size // (4 * self.hidden_size + 1)
                self.integrator_size = max(width // 8 * 8, 1)
        if self.image_sequence is not None:
            self.vocab_size = None
        if self.embedding_size is None:
            self.embedding_size = self.hidden_size if self.image_sequence is None else self.image_step_size
        super().__post_init__(**kwargs)

    @classmethod
    def paper(cls, **kwargs: Any) -> "EnnConfig":
        """The published cell: batch-mean trace, clip, write noise, random start, one layer, dropout before the head.

        The published code draws noise and the random start at inference too; here both are drawn in training mode
        only (`model.train()`), so that evaluation is deterministic.
        """
        published = {
            "trace_clip": 0.1,
            "trace_scope": "batch",
            "trace_noise": 0.001,
            "initial_state_std": 0.01,
            "recall_temperature": 1.5,
            "sparsity_strength": 0.1,
            "classifier_dropout": 0.3,
        }
        return cls(**{**published, **kwargs})

    @property
    def effective_temperature(self) -> float:
        """Temperature of the softmax over slots, `recall_temperature / (1 + 10 * sparsity_strength)`."""
        return self.recall_temperature / (1 + 10 * self.sparsity_strength)

    @property
    def head_dim(self) -> int:
        """Width D of a head."""
        # transformers asks for it before it is known that there are heads.
        return 2 * math.ceil(self.hidden_size / max(self.num_attention_heads, 1) / 2)

    @property
    def image_step_size(self) -> int:
        """Features of one step of an image sequence: a row, pixel or patch, all channels, and its place's embedding."""
        pixels = {"row": self.image_size, "pixel": 1, "patch": self.patch_size**2}
        return self.num_channels * pixels.get(self.image_sequence, 1) + (self.position_embedding_size or 0)

    @property
    def image_steps(self) -> int:
        """Steps of an image sequence."""
        if self.image_sequence == "row":
            return self.image_size
        width = self.patch_size if self.image_sequence == "patch" else 1
        return (self.image_size // width) ** 2

    def validate_sizes(self) -> None:
        """Sizes are positive."""
        for name in ("hidden_size", "embedding_size", "num_hidden_layers", "integrator_size", "memory_size"):
            self._require(name, getattr(self, name) >= 1, "a positive integer")
        for name in ("num_attention_heads", "conv_kernel", "intermediate_size"):
            self._require(name, getattr(self, name) >= 1, "a positive integer")
        needs_window = "sliding_attention" in self.layer_types
        fits = not needs_window if self.sliding_window is None else self.sliding_window >= 1
        self._require("sliding_window", fits, 'a positive integer, or None without "sliding_attention" layers')
        self._require("integrator", self.integrator in INTEGRATORS, f"one of {INTEGRATORS}")
        longest = self.longest_timescale
        self._require(
            "longest_timescale", longest is None or 2 <= longest < math.inf, "a finite number from 2, or None"
        )
        self._require("vocab_size", self.vocab_size is None or self.vocab_size >= 1, "a positive integer or None")

    def validate_memory(self) -> None:
        """Constants of the memory are in the range in which the cell's equations hold."""
        self._require("hebbian_lr", 0 <= self.hebbian_lr <= 1, "between 0 and 1")
        self._require("trace_scale", math.isfinite(self.trace_scale), "a finite number")
        self._require("recall_temperature", 0 < self.recall_temperature < math.inf, "a finite number above 0")
        self._require("trace_clip", self.trace_clip is None or self.trace_clip > 0, "above 0, or None for no clip")
        self._require("trace_scope", self.trace_scope in TRACE_SCOPES, f"one of {TRACE_SCOPES}")
        for name in ("trace_noise", "initial_state_std", "sparsity_strength", "recall_entropy_weight"):
            self._require(name, 0 <= getattr(self, name) < math.inf, "a finite number, 0 or more")

    def validate_constants(self) -> None:
        """Dropouts are probabilities, the other constants of the network finite."""
        scale = self.layer_scale_init_value
        fits = scale is None or (self.residual and 0 < scale < math.inf)
        self._require("layer_scale_init_value", fits, "a finite number above 0 with residual=True, or None")
        self._require("layer_norm_eps", 0 < self.layer_norm_eps < math.inf, "a finite number above 0")
        self._require("initializer_range", 0 <= self.initializer_range < math.inf, "a finite number, 0 or more")
        for name in ("hidden_dropout", "embedding_dropout", "classifier_dropout"):
            self._require(name, 0 <= getattr(self, name) < 1, "from 0 up to, but not including, 1")

    def validate_heads(self) -> None:
        """The fields of the heads agree with each other."""
        slots, has_tokens = self.token_memory_size, self.vocab_size is not None
        self._require(
            "token_memory_size",
            slots is None or (slots >= 1 and has_tokens),
            f"a positive integer, or None{'' if has_tokens else ' where there is no vocabulary'}",
        )
        self._require("pooling", self.pooling in POOLINGS, f"one of {POOLINGS}")
        places, has_images = self.position_embedding_size, self.image_sequence is not None
        self._require(
            "position_embedding_size",
            places is None or (places >= 1 and has_images),
            f"a positive integer, or None{'' if has_images else ' where there are no images (image_sequence)'}",
        )
        if not has_images:
            return
        self._require("image_sequence", self.image_sequence in IMAGE_SEQUENCES, f"one of {IMAGE_SEQUENCES} or None")
        self._require("image_size", self.image_size >= 1, "a positive integer")
        self._require("num_channels", self.num_channels >= 1, "a positive integer")
        if self.image_sequence == "patch":
            divides = self.patch_size >= 1 and self.image_size % self.patch_size == 0
            self._require("patch_size", divides, f"a divisor of image_size ({self.image_size})")
        self._require(
            "embedding_size",
            self.embedding_size == self.image_step_size,
            f"{self.image_step_size} (one {self.image_sequence} of the image, and position_embedding_size) or None",
        )

    def validate_layer_type(self) -> None:
        """One known layer type per layer."""
        allowed = all(layer_type in LAYER_TYPES for layer_type in self.layer_types)
        self._require("layer_types", allowed, f"a list of {LAYER_TYPES}")
        self._require(
            "layer_types",
            len(self.layer_types) == self.num_hidden_layers,
            f"one entry for each of the {self.num_hidden_layers} layers (num_hidden_layers)",
        )

    def validate_token_ids(self) -> None:
        """Special tokens are in the vocabulary."""
        if self.vocab_size is None:
            return
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            token_ids = value if isinstance(value, list) else [] if value is None else [value]
            in_vocabulary = all(0 <= token_id < self.vocab_size for token_id in token_ids)
            self._require(name, in_vocabulary, f"0 to {self.vocab_size - 1} (vocab_size - 1), or None")

    def _require(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise ValueError(f"EnnConfig: `{name}` is {getattr(self, name)!r}; allowed: {allowed}.")
