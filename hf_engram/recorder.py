"""Records forward passes of a model: what every token recalled and wrote, kept as O(N + H) numbers per layer."""

import inspect
import threading
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from .cell_recordings import CellRecording
from .configuration_enn import MEMORY_LAYER_TYPES, memory_layers
from .layers_enn import EnnCell
from .masks_enn import padding_mask, slots_by_layer, write_steps
from .mixer_enn import EngramMixer
from .mixer_recordings import HeadRecording, MixerRecording
from .modeling_enn import EnnModel, EnnPreTrainedModel
from .ops_enn import state_dtype
from .ops_mixer_enn import MixerBank
from .ops_token_memory_enn import TokenReads
from .packets import MixerWrites, Packet, join
from .recordings import LayerRecording, Recording
from .token_memory_enn import TokenMemory
from .token_memory_recordings import TokenMemoryRecording
from .wrapped_enn import fetched


class Recorder:
    """Records every forward pass that this thread makes while the recorder is entered.

    ```python
    with Recorder(model, tokenizer) as recorder:
        model.generate(**inputs, max_new_tokens=40)
    [recording] = recorder.recordings()
    ```

    It may be entered many times, one forward pass at a time, and by another thread each time; other threads that run
    the same model meanwhile are not recorded. All passes must belong to one run of the memory: each goes on from the
    state that the one before left behind. What a model computes does not change while it is recorded. Layers of
    attention have no memory, and are left out.

    Args:
        model: any ENN model, in evaluation mode.
        tokenizer: for the text of the tokens.

    Attributes:
        packets: what was recorded so far, one [`Packet`] per forward pass, on the model's device.

    Raises:
        TypeError: the model is no ENN.
        ValueError: it has no layer with a memory, or another library has wrapped one.
    """

    def __init__(self, model: EnnPreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        if not isinstance(model, EnnPreTrainedModel):
            raise TypeError(f"model is a {type(model).__name__}; expected a model of hf_engram (EnnForCausalLM, ...).")
        layer_types = model.config.layer_types
        self._memories = memory_layers(layer_types)
        if not self._memories:
            raise ValueError(
                f"layer_types is {layer_types}: there is no memory to record; expected an 'engram' or 'engram_mixer' "
                "layer at least."
            )
        self.model = model
        self.tokenizer = tokenizer
        self.packets: list[Packet] = []
        self._backbone: EnnModel = model.base_model
        for index in self._memories:
            memory = self._memory(index)
            if not isinstance(memory, (EnnCell, EngramMixer)):
                raise ValueError(
                    f"The memory of layer {index} is wrapped in a {type(memory).__name__} ({type(memory).__module__}), "
                    "as PEFT does for target_parameters: merge the adapter first (`merge_and_unload()`)."
                )
        self._token_memory: TokenMemory | None = getattr(model, "token_memory", None)
        self._carried_tokens: Tensor | None = None  # the trace of the token memory before the first step
        self._carried: list[Tensor | None] = []  # per layer with a memory, as the next
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
        if self._token_memory is not None:
            self._handles.append(self._token_memory.register_forward_hook(self._after_token_memory))
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
            ValueError: nothing was recorded, or nothing of a row.
        """
        if not self.packets:
            raise ValueError("Nothing was recorded: run the model inside `with recorder:`.")
        run = join(self.packets)
        empty = (~run.valid.any(1)).nonzero().flatten().tolist()
        if empty:
            raise ValueError(f"attention_mask is 0 all along the rows {empty}: there is nothing to record of padding.")
        return [self._row(run, row) for row in range(len(run.valid))]

    def _memory(self, index: int) -> EnnCell | EngramMixer:
        layer = self._backbone.layers[index]
        return layer.cell if self.model.config.layer_types[index] == "engram" else layer.mixer

    def _row(self, run: Packet, row: int) -> Recording:
        """The recording of one row of a joined run: its tokens, padding left out."""
        valid = run.valid[row]
        token_ids = None if run.input_ids is None else run.input_ids[row, valid]
        tokens = token_texts(token_ids, int(valid.sum()), self.tokenizer)
        layers: list[LayerRecording] = []
        encodings, mixer_writes = iter(run.encodings), iter(run.mixer_writes)
        for index, recall, carried in zip(self._memories, run.recall, self._carried, strict=True):
            about = {
                "layer": index,
                "tokens": tokens,
                "plastic": run.plastic[valid],
                "written": run.plastic[valid] & run.writes[row, valid],
                "restart": run.restart[row, valid],
                "active_slots": run.slots[index][valid],
            }
            carried_row = None if carried is None else carried[row].detach().cpu()
            memory = self._memory(index)
            if isinstance(memory, EnnCell):
                written = next(encodings)[row, valid]
                layers.append(cell_recording(memory, recall[row, valid], written, carried_row, about))
            else:
                of_row = MixerWrites(*(value[row][:, valid] for value in next(mixer_writes)))
                layers.append(mixer_recording(memory, recall[row, valid], of_row, carried_row, about))
        return Recording(tokens, token_ids, tuple(layers), self._row_of_token_memory(run, row))

    def _row_of_token_memory(self, run: Packet, row: int) -> TokenMemoryRecording | None:
        if run.token_reads is None:
            return None
        valid, carried = run.valid[row], self._carried_tokens
        reads = TokenReads(*(value[row, valid] for value in run.token_reads))
        carried = None if carried is None else carried[row].cpu().to(reads.addresses.dtype)
        return TokenMemoryRecording(reads, run.restart[row, valid], carried)

    # torch notes a hook and that it wants keyword arguments one after the other: a pass that another thread makes in
    # between calls it without them.

    def _before(self, backbone: EnnModel, args: tuple, *rest: Any) -> tuple[tuple, dict[str, Any]] | None:
        if threading.get_ident() != self._thread:
            return None
        (kwargs,) = rest
        kwargs = bound(backbone, args, kwargs)
        self._check_call(kwargs)
        traces = traces_of(kwargs.get("past_key_values"))
        if not self.packets:
            self._carried = traces or [None] * len(self._memories)
        elif not traces or not self._last_traces or not all(map(is_same, traces, self._last_traces)):
            raise ValueError(
                "The memory is not the one that the last recorded step left behind. A recording follows one memory: "
                "decode with use_cache=True and without beams, and use a new Recorder for a new run."
            )
        return (), {**kwargs, "output_recall": True, "output_encodings": True, "output_reads": True}

    def _after(self, backbone: EnnModel, args: tuple, *rest: Any) -> None:
        if threading.get_ident() != self._thread:
            return
        kwargs, outputs = rest
        [first, *_], position_ids = outputs.recall, kwargs.get("position_ids")
        self.packets.append(
            Packet(
                input_ids=kwargs.get("input_ids"),
                recall=tuple(recall.detach() for recall in outputs.recall),
                encodings=tuple(encoding.detach() for encoding in outputs.encodings or ()),
                mixer_writes=tuple(
                    MixerWrites(*(value.detach() for value in reads[1:])) for reads in outputs.reads or ()
                ),
                valid=padding_mask(kwargs.get("attention_mask"), first),
                restart=None if position_ids is None else (position_ids == 0).expand(first.shape[:2]),
                writes=write_steps(kwargs.get("write_mask"), first),
                plastic=kwargs.get("plastic", True),
                slots=slots_by_layer(kwargs.get("slot_mask"), backbone.config),
            )
        )
        given = kwargs.get("past_key_values")
        self._last_traces = traces_of(outputs.past_key_values if given is None else given)

    def _after_token_memory(self, module: TokenMemory, args: tuple, outputs: tuple) -> None:
        if threading.get_ident() != self._thread:
            return
        state, reads = args[3], outputs[2]
        if len(self.packets) == 1 and state is not None:
            self._carried_tokens = state.trace.detach()
        self.packets[-1] = self.packets[-1]._replace(token_reads=TokenReads(*(value.detach() for value in reads)))

    def _check_call(self, kwargs: dict[str, Any]) -> None:
        if kwargs.get("return_dict", self._backbone.config.return_dict) is False:
            raise ValueError("return_dict is False: outputs without names cannot be recorded; pass return_dict=True.")
        if self._backbone.training:
            raise ValueError("The model is in training mode, in which memories are noisy: call `model.eval()` first.")
        rows = len(kwargs["inputs_embeds"] if kwargs.get("input_ids") is None else kwargs["input_ids"])
        config = self._backbone.config
        if config.trace_scope == "batch" and "engram" in config.layer_types and rows > 1:
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


def cell_recording(
    cell: EnnCell, recall: Tensor, encodings: Tensor, carried: Tensor | None, about: dict[str, Any]
) -> CellRecording:
    """The recording of an engram layer from recall weights `[T, N]`, encodings `[T, H]` and carried trace `[N, H]`."""
    dtype = state_dtype(encodings.dtype)
    with fetched(cell):
        bank = cell.memory_bank.detach().to("cpu", dtype, copy=True)
    return CellRecording(
        recall=recall.to(dtype),
        encodings=encodings.to(dtype),
        bank=bank,
        carried_trace=torch.zeros_like(bank) if carried is None else carried.to(dtype),
        settings=cell.settings,
        **about,
    )


def mixer_recording(
    mixer: EngramMixer, recall: Tensor, writes: MixerWrites, carried: Tensor | None, about: dict[str, Any]
) -> MixerRecording:
    """The recording of a mixer from recall weights `[T, A, N]`, the writes of one row, `[A, T, ...]`, and its trace."""
    dtype = writes.values.dtype
    with fetched(mixer):
        bank = MixerBank(*(value.detach().to("cpu", copy=True) for value in mixer.bank(dtype)))
    if carried is None:
        carried = recall.new_zeros(*bank.values.shape[:2], 2 * mixer.head_dim + 1)
    heads = tuple(
        HeadRecording(
            head=head,
            recall=recall[:, head].to(dtype),
            bank=MixerBank(*(value[head] for value in bank)),
            carried_trace=carried[head].to(dtype),
            **{name: value[head] for name, value in writes._asdict().items()},
            **about,
        )
        for head in range(mixer.num_heads)
    )
    return MixerRecording(heads=heads, **about)


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
    """The traces of all layers with a memory, as they are stored (`None` where nothing is); none without a state."""
    layers = () if past_key_values is None else past_key_values.layers
    # By name: where several copies of this code are loaded, the cache layers may be those of another copy.
    memories = [layer for layer in layers if getattr(layer, "_layer_type", None) in MEMORY_LAYER_TYPES]
    return [layer.recurrent_states[1] for layer in memories]  # the second field of `CellState` and `MixerState`


def is_same(trace: Tensor | None, other: Tensor | None) -> bool:
    """Whether two traces are equal; quick where they are the same tensor."""
    return trace is other or (trace is not None and other is not None and torch.equal(trace, other))
