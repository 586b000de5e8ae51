"""One visitor: their memory, their runs, and the packets their browser is sent."""

import copy
import dataclasses
import logging
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.cache_utils import Cache

from .comparison import largest_changes
from .controls import Controls, Recorded, Settings, SettingsSource
from .limits import Limits
from .memories import tokens_seen
from .memory_files import read_memory_file, write_memory_file
from .models import LoadedModel, ModelChoice
from .packets import Feed, changes_packet, model_packet, run_packet, status_packet, tokens_packet
from .sampling import Sampling
from .streaming import TokenStep, TokenStream, prompt_ids

logger = logging.getLogger(__name__)

EMPTY, SHOWN = "an empty memory", "the memory shown"
CHANGES_SHOWN = 8


@dataclass
class Run:
    """What it takes to repeat a run.

    Attributes:
        start: the memory before it.
        ids: every token read, the first `num_prompt` of which are the prompt.
        settings: how each was read.
    """

    start: Cache | None
    sampling: Sampling
    num_prompt: int
    ids: list[int] = field(default_factory=list)
    settings: list[Settings] = field(default_factory=list)
    finish_reason: str = ""

    def record(self, steps: list[TokenStep]) -> None:
        """Note tokens that have been read."""
        self.ids += [step.token_id for step in steps]
        self.settings += [step.settings for step in steps]

    def without(self, erased: int, controls: Controls) -> tuple[list[int], Sampling, Recorded]:
        """The tokens that are given when the run is repeated without one write, its sampling and its settings."""
        given = self.ids[: max(self.num_prompt, erased + 1)]
        sampling = self.sampling
        if self.finish_reason == "stopped":  # where the visitor had read enough
            sampling = dataclasses.replace(sampling, max_new_tokens=max(1, len(self.ids) - self.num_prompt))
        return given, sampling, Recorded(self.settings, erased, controls)


class Session:
    """What belongs to one open page.

    Args:
        choices: as the attribute.

    Attributes:
        choices: the checkpoints that are watched, by what they read; none where it is the page's own.
        memory: the memory shown, `None` when it is empty.
        forks: copies of it to go back to, by name.
        controls: what the visitor has set.
        running: a run has been asked for and has not ended.
        run: the run whose text is shown, `None` when there is none.
        feed, image_feed: number what is sent to the views of texts and of images.
        to_erase: the token whose write is erased next.
        switches, drawings: the latest of the events that may overtake each other.
    """

    def __init__(self, choices: dict[str, ModelChoice] | None = None) -> None:
        self.choices = choices or {}
        self.memory: Cache | None = None
        self.forks: dict[str, Cache] = {}
        self.controls = Controls()
        self.running = False
        self.feed = Feed()
        self.image_feed = Feed()
        self.to_erase = 0
        self.switches = self.drawings = 0
        self.run: Run | None = None
        self._started = False
        self._forked = 0
        self._folder: tempfile.TemporaryDirectory | None = None

    def begin(self) -> str:
        """Announce a run.

        Returns:
            the packet that tells the browser so.

        Raises:
            ValueError: there is one already.
        """
        if self.running:
            raise ValueError("The model is still writing: press Stop first.")
        self.running, self._started = True, False
        self.controls.stop = self.controls.clear = False
        return self.feed.send(status_packet("waiting"))

    def finish(self) -> str | None:
        """Allow the next run.

        Returns:
            a packet with a sentence if the run never began, or of the empty memory if it was to be cleared before a
            token that never came.
        """
        never_began = self.running and not self._started
        self.running = False
        if never_began:
            sentence = "Too many visitors are waiting for the model. Try again in a minute."
            return self.feed.send(status_packet("error", sentence))
        return self.clear() if self.controls.clear else None

    def refuse(self, sentence: str) -> str:
        """The packet that says why there is no run."""
        self._started = True
        return self.feed.send(status_packet("error", sentence))

    def generate(
        self, loaded: LoadedModel, prompt: str, sampling: dict[str, Any], begin_with: str, limits: Limits
    ) -> Iterator[str]:
        """Continue `prompt`, as packets.

        Args:
            sampling: fields of `Sampling`.
            begin_with: `EMPTY`, `SHOWN` or the name of a fork.
        """
        self._started = True
        try:
            if begin_with not in self.beginnings():
                raise ValueError(f"There is no memory called {begin_with!r} any more.")
            ids = prompt_ids(loaded.processor, prompt, limits.prompt_tokens)
            chosen = Sampling(**sampling)
            chosen.check_length(limits.new_tokens)
        except ValueError as error:
            yield self.refuse(str(error))
            return
        start = {EMPTY: None, SHOWN: self.memory, **self.forks}[begin_with]
        run = Run(copy.deepcopy(start), chosen, len(ids))
        self.run = run
        stream = self._stream(loaded, run, ids, chosen, self.controls, limits)
        self.memory = stream.memory

        def packets() -> Iterator[dict[str, Any]]:
            yield run_packet(run.start, "running")
            yield from self._read(stream, run, limits)
            run.finish_reason = stream.finish_reason
            yield status_packet(stream.finish_reason)

        yield from self._send(packets())

    def erase(self, loaded: LoadedModel, index: int, limits: Limits) -> Iterator[str]:
        """Repeat the last run without the write of token `index`, to be shown beside it, as packets."""
        self._started = True
        run = self.run
        if run is None or not 0 <= index < len(run.ids) or len(run.ids) < run.num_prompt:
            yield self.refuse("Generate a text first, then choose one of its tokens.")
            return
        ids, sampling, source = run.without(index, self.controls)
        again = Run(copy.deepcopy(run.start), sampling, run.num_prompt)
        stream = self._stream(loaded, again, ids, sampling, source, limits)

        def packets() -> Iterator[dict[str, Any]]:
            yield run_packet(run.start, "running", erased=index)
            yield from self._read(stream, again, limits)
            if stream.finish_reason != "stopped":
                model, tokenizer = loaded.model, loaded.processor
                yield changes_packet(
                    largest_changes(model, tokenizer, run.ids, run.settings, index, run.start, CHANGES_SHOWN)
                )
                self._keep(f"without the write of token {index + 1}", stream.memory, limits)
            yield status_packet(stream.finish_reason)

        yield from self._send(packets())

    def clear(self) -> str | None:
        """Empty the memory: at once, or before the next token of a run.

        Returns:
            the packet that tells the browser so, `None` during a run.
        """
        self.controls.clear = self.running
        return None if self.running else self.show(None)

    def show(self, memory: Cache | None) -> str:
        """Make `memory` the one that is shown; the packet for it."""
        self.memory = memory
        self.run = None
        return self.feed.send(run_packet(memory, "idle"))

    def choose(self, loaded: LoadedModel) -> str:
        """Watch another checkpoint; memories of the one before mean nothing to it.

        Returns:
            the packet for the view of what it reads.

        Raises:
            ValueError: a run is going on.
        """
        if self.running:
            raise ValueError("The model is still writing: press Stop first.")
        self.choices[loaded.reads] = loaded.choice
        if loaded.reads == "image":
            return self.image_feed.send(model_packet(loaded))
        self.memory = self.run = None
        self.forks.clear()
        self.controls.slots_off = ()
        return self.feed.send(model_packet(loaded))

    def beginnings(self) -> list[str]:
        """What a run can begin with."""
        return [EMPTY, SHOWN, *self.forks]

    def fork(self, limits: Limits) -> str:
        """Keep a copy of the memory shown; its name.

        Raises:
            ValueError: there is nothing to copy, or a run is going on.
        """
        memory = self._memory_at_rest()
        self._forked += 1
        name = f"fork {self._forked}, after {tokens_seen(memory)} tokens"
        self._keep(name, copy.deepcopy(memory), limits)
        return name

    def download(self, loaded: LoadedModel) -> Path:
        """Write the memory shown to a file.

        Raises:
            ValueError: there is nothing to write, or a run is going on.
        """
        memory = self._memory_at_rest()
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="engram-memory-")
        return write_memory_file(memory, loaded.model.config, Path(self._folder.name))

    def upload(self, loaded: LoadedModel, path: Path) -> str:
        """Show the memory in an uploaded file, which is deleted; the packet for it.

        Raises:
            ValueError: it is not a memory of this model, or a run is going on.
        """
        if self.running:
            path.unlink(missing_ok=True)
            raise ValueError("The model is still writing: press Stop first.")
        return self.show(read_memory_file(path, loaded.model.config))

    def close(self) -> None:
        """End the run and give up everything that was kept."""
        self.controls.stop = True
        self.memory = self.run = None
        self.forks.clear()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _stream(
        self, loaded: LoadedModel, run: Run, ids: list[int], sampling: Sampling, source: SettingsSource, limits: Limits
    ) -> TokenStream:
        memory = copy.deepcopy(run.start)
        return TokenStream(
            loaded.model, loaded.processor, ids, sampling, memory, source, run.num_prompt, limits.candidates
        )

    def _read(self, stream: TokenStream, run: Run, limits: Limits) -> Iterator[dict[str, Any]]:
        for part, steps in enumerate(batched_in_time(stream, 1 / limits.packets_per_second), 1):
            run.record(steps)
            yield tokens_packet(steps, part)

    def _send(self, packets: Iterator[dict[str, Any]]) -> Iterator[str]:
        try:
            for packet in packets:
                yield self.feed.send(packet)
        except Exception as error:
            # A step that broke off may have changed some layers and not others.
            self.memory = self.run = None
            # Without message and traceback, which may quote the prompt.
            logger.error("A run failed: %s at %s.", type(error).__name__, _place(error))
            sentence = f"The model failed ({type(error).__name__}) and the memory was cleared."
            yield self.feed.send(status_packet("error", f"{sentence} The server's log says where."))

    def _keep(self, name: str, memory: Cache, limits: Limits) -> None:
        self.forks[name] = memory
        while len(self.forks) > limits.forks:
            self.forks.pop(next(iter(self.forks)))

    def _memory_at_rest(self) -> Cache:
        if self.running:
            raise ValueError("The model is still writing: press Stop first.")
        if self.memory is None or not tokens_seen(self.memory):
            raise ValueError("The memory is empty: generate a text first.")
        return self.memory


def batched_in_time(stream: TokenStream, interval: float) -> Iterator[list[TokenStep]]:
    """The steps of `stream` in batches that are at least `interval` seconds apart, except for the last one."""
    waiting: list[TokenStep] = []
    due = 0.0
    for steps in stream:
        waiting += steps
        if time.monotonic() >= due:
            yield waiting
            waiting, due = [], time.monotonic() + interval
    if waiting:
        yield waiting


def _place(error: BaseException) -> str:
    """File and line that raised an error."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "unknown" if trace is None else f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
