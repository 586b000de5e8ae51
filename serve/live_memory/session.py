"""One visitor: their memory, their run, and the packets their browser is sent."""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from hf_engram import EnnForCausalLM

from .packets import reset_packet, status_packet, to_json, tokens_packet
from .streaming import Sampling, TokenStep, TokenStream

logger = logging.getLogger(__name__)
PACKETS_PER_SECOND = 30


@dataclass
class Session:
    """What belongs to one visitor. Gradio copies it for every browser, so there is no model and no lock in it.

    Attributes:
        memory: the state after the last run, `None` when there is none.
        running: a run has been asked for and has not ended.
        stop_requested: the run is to end before its next token.
        packets_sent: how many so far; numbers them, so that the browser notices a gap.
    """

    memory: Cache | None = None
    running: bool = False
    stop_requested: bool = False
    packets_sent: int = 0

    def begin(self) -> str:
        """Announce a run.

        Returns:
            the packet that tells the browser so.

        Raises:
            ValueError: there is one already.
        """
        if self.running:
            raise ValueError("The model is still writing: press Stop first.")
        self.running, self.stop_requested = True, False
        return self._numbered(status_packet("waiting"))

    def stop(self) -> None:
        """Let the run end before its next token."""
        self.stop_requested = True

    def finish(self) -> None:
        """Allow the next run."""
        self.running = False

    def generate(
        self,
        model: EnnForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        prompt: str,
        sampling: dict[str, Any],
        keep_memory: bool,
    ) -> Iterator[str]:
        """Continue `prompt`, as packets.

        Args:
            sampling: fields of [`Sampling`].
            keep_memory: go on from the memory of the last run instead of an empty one.
        """
        try:
            memory = self.memory if keep_memory else None
            stream = TokenStream(
                model, tokenizer, prompt, Sampling(**sampling), memory, should_stop=lambda: self.stop_requested
            )
        except ValueError as error:
            yield self._numbered(status_packet("error", str(error)))
            return
        self.memory = stream.memory
        try:
            yield self._numbered(reset_packet(model.config, self.memory, "running"))
            for steps in batched_in_time(stream, 1 / PACKETS_PER_SECOND):
                yield self._numbered(tokens_packet(steps))
            yield self._numbered(status_packet(stream.finish_reason))
        except Exception as error:
            # A step that broke off may have changed some layers and not others.
            self.memory = None
            logger.exception("A run failed.")
            message = (
                f"The model failed ({type(error).__name__}) and the memory was cleared. The server's log says more."
            )
            yield self._numbered(status_packet("error", message))

    def clear(self, model: EnnForCausalLM) -> str:
        """Forget everything.

        Returns:
            the packet that tells the browser so.
        """
        self.memory = None
        return self._numbered(reset_packet(model.config, None, "idle"))

    def _numbered(self, packet: dict[str, Any]) -> str:
        self.packets_sent += 1
        return to_json(packet, self.packets_sent)


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
