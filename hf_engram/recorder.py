"""Records forward passes of a model: what every token recalled and wrote, kept as N + H numbers per layer."""

import inspect
import threading
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from .masks_enn import padding_mask, slots_by_layer, write_steps
from .modeling_enn import EnnModel, EnnModelOutput, EnnPreTrainedModel
from .ops_enn import state_dtype
from .recordings import LayerRecording, Recording


class Packet(NamedTuple):
    """What one forward pass recalled and wrote; B rows, T tokens, N slots, H hidden width."""

    input_ids: Tensor | None  # [B, T]; None for inputs that are not tokens
    recall: tuple[Tensor, ...]  # per layer [B, T, N], float32 at least
    encodings: tuple[Tensor, ...]  # per layer [B, T, H], in the model's dtype
    valid: Tensor | None  # bool [B, T]; False at padding
    restart: Tensor | None  # bool [B, T]; True where the memory was cleared before the token
    writes: Tensor | None  # bool [B, T]; False where the token wrote nothing
    plastic: bool  # False: the memory neither decayed nor was written
    slots: list[Tensor | None]  # per layer bool [N]; False for slots that were switched off


class Recorder:
    """Records every forward pass that this thread makes while the recorder is entered.

    ```python
    with Recorder(model, tokenizer) as recorder:
        model.generate(**inputs, max_new_tokens=40)
    [recording] = recorder.recordings()
    ```

    It may be entered many times, one forward pass at a time, and by another thread each time; other threads that run
    the same model meanwhile are not recorded. All passes must belong to one run of the memory: each goes on from the
    state that the one before left behind. What a model computes does not change while it is recorded.

    Args:
        model: any ENN model, in evaluation mode.
        tokenizer: for the text of the tokens.

    Attributes:
        packets: what was recorded so far, one [`Packet`] per forward pass, on the model's device.

    Raises:
        TypeError: the model is no ENN.
        NotImplementedError: it has layers of other types than "engram", whose recalls are not attributed yet.
    """

    def __init__(self, model: EnnPreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        if not isinstance(model, EnnPreTrainedModel):
            raise TypeError(f"model is a {type(model).__name__}; expected a model of hf_engram (EnnForCausalLM, ...).")
        others = sorted(set(model.config.layer_types) - {"engram"})
        if others:
            raise NotImplementedError(f"layer_types holds {others}; only layers of the type 'engram' can be recorded.")
        self.model = model
        self.tokenizer = tokenizer
        self.packets: list[Packet] = []
        self._backbone: EnnModel = model.base_model
        self._carried: list[Tensor | None] = []
        self._last_traces: list[Tensor | None] = []  # empty when the run has left no state to go on from
        self._handles: list[RemovableHandle] = []
        self._thread = 0

    def __enter__(self) -> Self:
        if self._handles:
            raise RuntimeError("This recorder is recording already: use one recorder per run.")
        self._thread = threading.get_ident()
        self._handles = [
            self._backbone.register_forward_pre_hook(self._before, with_kwargs=True),
            self._backbone.register_forward_hook(self._after, with_kwargs=True),
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def recordings(self) -> list[Recording]:
        """What was recorded so far, one [`Recording`] per row, on the CPU.

        Raises:
            ValueError: nothing was recorded.
        """
        if not self.packets:
            raise ValueError("Nothing was recorded: run the model inside `with recorder:`.")
        run = join(self.packets)
        return [self._row(run, row) for row in range(len(run.valid))]

    def _row(self, run: Packet, row: int) -> Recording:
        """The recording of one row of a joined run: its tokens, padding left out."""
        valid = run.valid[row]
        token_ids = None if run.input_ids is None else run.input_ids[row, valid]
        tokens = token_texts(token_ids, int(valid.sum()), self.tokenizer)
        layers = []
        for index, (recall, encodings) in enumerate(zip(run.recall, run.encodings, strict=True)):
            cell = self._backbone.layers[index].cell
            dtype = state_dtype(encodings.dtype)
            bank = cell.memory_bank.detach().to("cpu", dtype, copy=True)
            carried = self._carried[index]
            layers.append(
                LayerRecording(
                    layer=index,
                    tokens=tokens,
                    recall=recall[row, valid].to(dtype),
                    encodings=encodings[row, valid].to(dtype),
                    plastic=run.plastic[valid],
                    written=run.plastic[valid] & run.writes[row, valid],
                    restart=run.restart[row, valid],
                    active_slots=run.slots[index][valid],
                    bank=bank,
                    carried_trace=torch.zeros_like(bank) if carried is None else carried[row].detach().to("cpu", dtype),
                    settings=cell.settings,
                )
            )
        return Recording(tokens, token_ids, tuple(layers))

    def _before(self, backbone: EnnModel, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        if threading.get_ident() != self._thread:
            return None
        kwargs = bound(backbone, args, kwargs)
        self._check_call(kwargs)
        traces = traces_of(kwargs.get("past_key_values"))
        if not self.packets:
            self._carried = traces or [None] * len(backbone.layers)
        elif not traces or not self._last_traces or not all(map(is_same, traces, self._last_traces)):
            raise ValueError(
                "The memory is not the one that the last recorded step left behind. A recording follows one memory: "
                "decode with use_cache=True and without beams, and use a new Recorder for a new run."
            )
        return (), {**kwargs, "output_recall": True, "output_encodings": True}

    def _after(self, backbone: EnnModel, args: tuple, kwargs: dict[str, Any], outputs: EnnModelOutput) -> None:
        if threading.get_ident() != self._thread:
            return
        [first, *_], position_ids = outputs.encodings, kwargs.get("position_ids")
        self.packets.append(
            Packet(
                input_ids=kwargs.get("input_ids"),
                recall=tuple(recall.detach() for recall in outputs.recall),
                encodings=tuple(encoding.detach() for encoding in outputs.encodings),
                valid=padding_mask(kwargs.get("attention_mask"), first),
                restart=None if position_ids is None else (position_ids == 0).expand(first.shape[:2]),
                writes=write_steps(kwargs.get("write_mask"), first),
                plastic=kwargs.get("plastic", True),
                slots=slots_by_layer(kwargs.get("slot_mask"), backbone.config),
            )
        )
        given = kwargs.get("past_key_values")
        self._last_traces = traces_of(outputs.past_key_values if given is None else given)

    def _check_call(self, kwargs: dict[str, Any]) -> None:
        if kwargs.get("return_dict", self._backbone.config.return_dict) is False:
            raise ValueError("return_dict is False: outputs without names cannot be recorded; pass return_dict=True.")
        if self._backbone.training:
            raise ValueError("The model is in training mode, in which memories are noisy: call `model.eval()` first.")
        rows = len(kwargs["inputs_embeds"] if kwargs.get("input_ids") is None else kwargs["input_ids"])
        if self._backbone.config.trace_scope == "batch" and rows > 1:
            raise ValueError(
                f"This model shares one trace among the rows of a batch (trace_scope='batch'), and there are {rows} "
                "rows: a row recalls what others wrote. Record one row at a time."
            )


def record(
    model: EnnPreTrainedModel,
    input_ids: Tensor | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **inputs: Any,
) -> list[Recording]:
    """Let a model read, and record its memory.

    Args:
        model: any ENN model, in evaluation mode.
        input_ids: token ids `[B, T]`.
        tokenizer: for the text of the tokens.
        inputs: other arguments of the model's `forward` (`attention_mask`, `past_key_values`, `write_mask`, ...;
            `pixel_values` for images). `past_key_values` is carried on, as in any forward pass.

    Returns:
        one [`Recording`] per row.
    """
    if input_ids is not None:
        inputs["input_ids"] = input_ids
    recorder = Recorder(model, tokenizer)
    with torch.no_grad(), recorder:
        model(**inputs)
    return recorder.recordings()


def join(packets: list[Packet]) -> Packet:
    """All packets of a run as one, on the CPU, with no mask left out, and `plastic` and `slots` per token."""

    def along_time(values: list[Tensor]) -> Tensor:
        return torch.cat(values, dim=1).cpu()

    def masks(name: str, default: bool) -> Tensor:
        given = (getattr(packet, name) for packet in packets)
        shapes = (packet.recall[0].shape[:2] for packet in packets)
        filled = (torch.full(shape, default) if m is None else m.cpu() for m, shape in zip(given, shapes, strict=True))
        return torch.cat(list(filled), dim=1)

    layers = range(len(packets[0].recall))
    steps = [packet.recall[0].shape[1] for packet in packets]

    def active_slots(layer: int) -> Tensor:
        every = torch.ones(packets[0].recall[layer].shape[-1], dtype=torch.bool)
        given = (packet.slots[layer] for packet in packets)
        return torch.cat([(every if m is None else m.cpu()).expand(n, -1) for m, n in zip(given, steps, strict=True)])

    ids = [packet.input_ids for packet in packets]
    return Packet(
        input_ids=None if any(i is None for i in ids) else along_time(ids),
        recall=tuple(along_time([packet.recall[index] for packet in packets]) for index in layers),
        encodings=tuple(along_time([packet.encodings[index] for packet in packets]) for index in layers),
        valid=masks("valid", True),
        restart=masks("restart", False),
        writes=masks("writes", True),
        plastic=torch.cat([torch.full((n,), packet.plastic) for n, packet in zip(steps, packets, strict=True)]),
        slots=[active_slots(layer) for layer in layers],
    )


def token_texts(token_ids: Tensor | None, count: int, tokenizer: PreTrainedTokenizerBase | None) -> tuple[str, ...]:
    """The text of each of `count` tokens: their ids without a tokenizer, their positions without ids."""
    if token_ids is None:
        return tuple(map(str, range(count)))
    if tokenizer is None:
        return tuple(map(str, token_ids.tolist()))
    return tuple(tokenizer.batch_decode(token_ids[:, None]))


def bound(backbone: EnnModel, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call of the backbone by name."""
    names = inspect.signature(backbone.forward).parameters if args else ()
    return {**dict(zip(names, args, strict=False)), **kwargs}


def traces_of(past_key_values: Cache | None) -> list[Tensor | None]:
    """The stored traces of all layers, as they are (`None` where nothing is stored); empty without a state."""
    if past_key_values is None:
        return []
    return [layer.recurrent_states[1] for layer in past_key_values.layers]


def is_same(trace: Tensor | None, other: Tensor | None) -> bool:
    """Whether two traces are equal; quick where they are the same tensor."""
    return trace is other or (trace is not None and other is not None and torch.equal(trace, other))
