"""RNN, GRU and LSTM in the ENN's place.

Embeddings, dropout, residual blocks, pooling, heads, losses and the order of pixels are the ENN's own code: only the
layers differ. Their state is returned as `past_key_values` like the ENN's, detached and with one row per sequence, so
that streams, evaluation and `generate` treat all architectures alike. A Transformer needs no class of its own: it is an
ENN whose layers are all attention.
"""

from typing import Any, NamedTuple

import torch
import torch.nn as nn
from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    configuration_utils,
)
from transformers import initialization as init
from transformers.utils.output_capturing import OutputRecorder

from hf_engram import EnnConfig, EnnForCausalLM, EnnForImageClassification, EnnModel
from hf_engram.cache_enn import StateLayer
from hf_engram.layers_enn import StatefulLayer, initial_gate_bias
from hf_engram.ops_enn import StepMasks

BASELINES = ("rnn", "gru", "lstm")
configuration_utils.ALLOWED_ATTN_LAYER_TYPES += BASELINES


@strict
class BaselineConfig(EnnConfig):
    """Configuration of a baseline.

    The fields of the memory are inherited and have no effect; neither has `longest_timescale` in an RNN.

    Args:
        architecture: one of `BASELINES`.
    """

    model_type = "enn_baseline"

    architecture: str = "lstm"

    def __post_init__(self, **kwargs: Any) -> None:
        if self.layer_types is None:
            self.layer_types = [self.architecture] * self.num_hidden_layers
        super().__post_init__(**kwargs)

    def validate_layer_type(self) -> None:
        """Layers of one known architecture."""
        self._require("architecture", self.architecture in BASELINES, f"one of {BASELINES}")
        wanted = [self.architecture] * self.num_hidden_layers
        self._require("layer_types", self.layer_types == wanted, f"{wanted} or None")

    def validate_baseline(self) -> None:
        """There is no recall to regularise."""
        self._require("recall_entropy_weight", self.recall_entropy_weight == 0, "0: a baseline recalls nothing")


class HiddenState(NamedTuple):
    """What an RNN or GRU layer carries from step to step."""

    hidden: Tensor  # [B, H]


class LstmState(NamedTuple):
    """What an LSTM layer carries from step to step."""

    hidden: Tensor  # [B, H]
    cell: Tensor  # [B, H]


class RecurrentStateLayer(StateLayer):
    """Vectors of hidden_size in the cache."""

    _layer_type = None
    state_class = HiddenState

    @staticmethod
    def shapes(config: EnnConfig, rows: int, state: HiddenState | LstmState) -> list[tuple[int, ...]]:
        """Independent of how many tokens were seen."""
        return [(rows, config.hidden_size)] * len(state)


class RnnStateLayer(RecurrentStateLayer):
    """State of an RNN layer."""

    _layer_type = "rnn"


class GruStateLayer(RecurrentStateLayer):
    """State of a GRU layer."""

    _layer_type = "gru"


class LstmStateLayer(RecurrentStateLayer):
    """State of an LSTM layer."""

    _layer_type = "lstm"
    state_class = LstmState


class RecurrentCell(nn.Module):
    """`torch.nn.RNN`, `GRU` or `LSTM` with padding and document starts.

    It computes in its own dtype under autocast, too: oneDNN lacks the LSTM's loop in bfloat16 on some processors.
    """

    CELLS = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}

    def __init__(self, config: BaselineConfig, input_size: int) -> None:
        super().__init__()
        self.rnn = self.CELLS[config.architecture](input_size, config.hidden_size, batch_first=True)
        self.state_class = LstmState if config.architecture == "lstm" else HiddenState

    def forward(
        self, x: Tensor, state: HiddenState | LstmState | None, masks: StepMasks
    ) -> tuple[Tensor, HiddenState | LstmState]:
        """Run over `x` `[B, T, I]`; arguments as in the ENN's cell.

        Returns:
            outputs `[B, T, H]` and the state after the last step.
        """
        dtype, x = x.dtype, x.to(self.rnn.weight_hh_l0.dtype)
        if state is None:
            nothing = x.new_zeros(len(x), self.rnn.hidden_size)
            state = (nothing,) * len(self.state_class._fields)
        valid, restart = masks.valid, masks.restart
        outputs = []
        for first, last in pieces(x.shape[1], valid, restart):
            if restart is not None:
                state = tuple(value.masked_fill(restart[:, first, None], 0) for value in state)
            hidden = [value[None].to(x.dtype).contiguous() for value in state]
            with torch.autocast(x.device.type, enabled=False):
                piece, new = self.rnn(x[:, first:last], tuple(hidden) if len(hidden) == 2 else hidden[0])
            new = tuple(value[0] for value in (new if isinstance(new, tuple) else (new,)))
            if valid is not None:
                going_on = valid[:, first, None]
                new = tuple(torch.where(going_on, a, b) for a, b in zip(new, state, strict=True))
            outputs.append(piece)
            state = new
        return torch.cat(outputs, 1).to(dtype), self.state_class(*state)


def pieces(steps: int, valid: Tensor | None, restart: Tensor | None) -> list[tuple[int, int]]:
    """First and last (excluded) step of the longest pieces in which no row restarts, begins or ends to be padding."""
    cuts = torch.zeros(steps, dtype=torch.bool)
    if restart is not None:
        cuts |= restart.any(0).cpu()
    if valid is not None:
        cuts[1:] |= (valid[:, 1:] != valid[:, :-1]).any(0).cpu()
    starts = sorted({0, *cuts.nonzero().flatten().tolist()})
    return list(zip(starts, [*starts[1:], steps], strict=True))


class BaselineLayer(StatefulLayer):
    """One layer of a baseline: the bare cell, or the cell in a pre-norm residual block."""

    def __init__(self, config: BaselineConfig, layer_idx: int, input_size: int) -> None:
        super().__init__(config, layer_idx, input_size)
        self.cell = RecurrentCell(config, input_size)

    def mix(
        self,
        x: Tensor,
        state: HiddenState | LstmState | None,
        masks: StepMasks,
        plastic: bool,
        slots: Tensor | None,
    ) -> tuple[Tensor, None, HiddenState | LstmState]:
        """The cell; what would change a memory is refused."""
        if masks.writes is not None or slots is not None or not plastic:
            raise ValueError("A baseline has no memory that write_mask, slot_mask or plastic=False could change.")
        outputs, state = self.cell(x, state, masks)
        return outputs, None, state


class BaselineInitialization:
    """Recurrent layers begin as in Keras: Glorot input weights, orthogonal recurrent weights, forget bias 1.

    With a `longest_timescale`, the units of GRU and LSTM begin at time scales spread like the gated ENN's instead.
    """

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if not isinstance(module, nn.RNNBase):
            super()._init_weights(module)
            return
        init.xavier_uniform_(module.weight_ih_l0)
        init.orthogonal_(module.weight_hh_l0)
        init.zeros_(module.bias_ih_l0)
        init.zeros_(module.bias_hh_l0)
        if isinstance(module, nn.LSTM):
            gates = torch.zeros(4, module.hidden_size)  # input, forget, proposal, output
            gates[1] = 1
            if self.config.longest_timescale is not None:
                gates[0] = initial_gate_bias(self.config.longest_timescale, module.hidden_size)
                gates[1] = -gates[0]
            init.copy_(module.bias_ih_l0, gates.flatten())
        elif isinstance(module, nn.GRU) and self.config.longest_timescale is not None:
            gates = torch.zeros(3, module.hidden_size)  # reset, update, proposal
            gates[1] = -initial_gate_bias(self.config.longest_timescale, module.hidden_size)  # the share that is kept
            init.copy_(module.bias_ih_l0, gates.flatten())


class BaselineModel(BaselineInitialization, EnnModel):
    """The ENN's backbone with the layers of a baseline."""

    config: BaselineConfig
    _no_split_modules = ["BaselineLayer"]
    _can_record_outputs = {"hidden_states": OutputRecorder(StatefulLayer, index=0)}

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__(config)
        first = config.embedding_size if self.embedding_projection is None else config.hidden_size
        self.layers = nn.ModuleList(
            BaselineLayer(config, index, config.hidden_size if index else first)
            for index in range(config.num_hidden_layers)
        )
        self.post_init()


class BaselineForCausalLM(BaselineInitialization, EnnForCausalLM):
    """A baseline with the ENN's language modelling head."""

    config: BaselineConfig

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__(config)
        self.model = BaselineModel(config)
        self.post_init()


class BaselineForImageClassification(BaselineInitialization, EnnForImageClassification):
    """A baseline with the ENN's image classification head."""

    config: BaselineConfig

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__(config)
        self.model = BaselineModel(config)
        self.post_init()


AutoConfig.register("enn_baseline", BaselineConfig, exist_ok=True)
AutoModelForCausalLM.register(BaselineConfig, BaselineForCausalLM, exist_ok=True)
AutoModelForImageClassification.register(BaselineConfig, BaselineForImageClassification, exist_ok=True)
