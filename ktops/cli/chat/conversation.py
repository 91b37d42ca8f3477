"""Conversation: answers prompts one after the other, and computes what is new in each."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, TextStreamer
from transformers.generation.stopping_criteria import StoppingCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

import ktops
from ktops.cli.errors import UserError

Write = Callable[[str], object]
"""Takes a piece of the answer as soon as its text is known."""

CACHE = "cache" if "cache" in GenerateDecoderOnlyOutput.__dataclass_fields__ else "past_key_values"
"""The name of the cache in arguments and results of ``generate``; the second in older transformers."""

END, LENGTH, INTERRUPTED = "end", "length", "interrupted"
"""Why an answer stopped: the model ended it, it had as many tokens as allowed, or Ctrl-C."""


@dataclass(frozen=True)
class Answer:
    """An answer, and what it took.

    Attributes:
        text: without special tokens.
        prompt_tokens: tokens of the conversation up to the answer.
        cached_tokens: how many of these had been computed for earlier answers.
        prompt_seconds: until the first token of the answer.
        answer_tokens: including the token that ends the answer.
        answer_seconds: from the first token of the answer to the last.
        prompt_kt_seconds, answer_kt_seconds: how much of both was spent inside the operators of ktops.
        stopped: END, LENGTH or INTERRUPTED.
    """

    text: str
    prompt_tokens: int
    cached_tokens: int
    prompt_seconds: float
    answer_tokens: int
    answer_seconds: float
    prompt_kt_seconds: float
    answer_kt_seconds: float
    stopped: str

    @property
    def prompt_tokens_per_second(self) -> float | None:
        """Tokens of the prompt that were not cached, per second; None if no answer has begun."""
        computed = self.prompt_tokens - self.cached_tokens
        return computed / self.prompt_seconds if self.answer_tokens else None

    @property
    def answer_tokens_per_second(self) -> float | None:
        """Tokens of the answer after the first, per second; None if there are none."""
        return (self.answer_tokens - 1) / self.answer_seconds if self.answer_tokens > 1 else None

    @property
    def kt_share(self) -> float:
        """The share of prompt and answer that was spent inside the operators of ktops."""
        seconds = self.prompt_seconds + self.answer_seconds
        return (self.prompt_kt_seconds + self.answer_kt_seconds) / seconds if seconds else 0.0


class Conversation:
    """A conversation with a model.

    A new prompt is computed from where it differs from what the model has seen: for most chat templates, from
    the end of the last answer.

    Args:
        model: a causal language model, with or without PEFT adapters, in evaluation mode.
        tokenizer: its tokenizer. Without a chat template, prompts are continued, each on its own.
        generation: how to choose tokens.
        system: the first message, with a chat template.

    Attributes:
        messages: the conversation so far, in the form that chat templates take.
    """

    def __init__(self, model, tokenizer, generation: GenerationConfig, system: str | None = None) -> None:
        self.model, self.tokenizer, self.generation, self.system = model, tokenizer, generation, system
        self.clear()

    def clear(self) -> None:
        """Begins a new conversation."""
        self.messages: list[dict[str, str]] = []
        if self.system is not None:
            self.messages.append({"role": "system", "content": self.system})
        self._cache: Any = None
        self._cached: list[int] = []

    def answer(self, prompt: str, write: Write) -> Answer:
        """Answers a prompt; Ctrl-C ends the answer.

        If an answer has begun, it and the prompt become part of the conversation.

        Args:
            prompt: what the user says.
            write: is called with every piece of the answer.

        Raises:
            UserError: the chat template rejects the conversation, or it is too long for the model.
        """
        messages = [*self.messages, {"role": "user", "content": prompt}]
        input_ids = self._encode(prompt, messages)
        limit = self._most_new_tokens(len(input_ids))
        reused = self._reuse(input_ids)
        with ktops.profile() as whole, ExitStack() as until_first:
            before_first = until_first.enter_context(ktops.profile())
            stream = _Stream(self.tokenizer, write, until_first.close)
            with _interruptible(stream):
                self._generate(input_ids, limit, stream)
        prompt_kt, whole_kt = (sum(step.wall for step in found.steps) for found in (before_first, whole))
        tokens = stream.tokens
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        if tokens and self.tokenizer.chat_template is not None:
            self.messages = [*messages, {"role": "assistant", "content": text}]
        return Answer(
            text,
            len(input_ids),
            reused,
            stream.first - stream.begin,
            len(tokens),
            stream.last - stream.first,
            prompt_kt,
            whole_kt - prompt_kt,
            self._why_stopped(stream, limit),
        )

    def _encode(self, prompt: str, messages: list[dict[str, str]]) -> list[int]:
        if self.tokenizer.chat_template is None:
            return self.tokenizer(prompt)["input_ids"]
        from jinja2 import TemplateError

        try:
            encoded = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=True
            )
        except TemplateError as error:
            raise UserError(f"the model's chat template rejects the conversation: {error}") from None
        return encoded["input_ids"]

    def _most_new_tokens(self, length: int) -> int:
        """Returns how many tokens an answer to a prompt of this length may have."""
        asked = self.generation.max_new_tokens
        assert asked is not None
        if not length:
            raise UserError("the prompt is empty")
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if positions is None:
            return asked
        if length >= positions:
            raise UserError(
                f"the conversation has {length} tokens, and the model's longest sequence is {positions}"
            )
        return min(asked, positions - length)

    def _reuse(self, input_ids: list[int]) -> int:
        """Shortens the cache to what a prompt begins with; returns how many of its tokens that is."""
        common = 0
        for known, token in zip(self._cached, input_ids[:-1], strict=False):
            if known != token:
                break
            common += 1
        surplus = len(self._cached) - common
        if surplus and not (common and _crop(self._cache, surplus)):
            self._cache, common = None, 0
        self._cached = self._cached[:common]
        return common

    @torch.inference_mode()
    def _generate(self, input_ids: list[int], limit: int, stream: "_Stream") -> None:
        cache, self._cache, self._cached = self._cache, None, []  # unusable if the user interrupts a forward
        prompt = torch.tensor([input_ids], device=self.model.device)
        result = self.model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            generation_config=self.generation,
            max_new_tokens=limit,
            streamer=stream,
            stopping_criteria=[stream.stopping],
            return_dict_in_generate=True,
            **{CACHE: cache},
        )
        self._cache = getattr(result, CACHE)
        if self._cache is not None:
            self._cached = [*input_ids, *stream.tokens][: int(self._cache.get_seq_length())]

    def _why_stopped(self, stream: "_Stream", limit: int) -> str:
        ends = self.generation.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        if stream.tokens and stream.tokens[-1] in ends:
            return END
        return LENGTH if len(stream.tokens) == limit else INTERRUPTED


class _Stream(TextStreamer):
    """Hands on the text of an answer, and reads the clock at its first and last token.

    Args:
        write: as in :meth:`Conversation.answer`.
        at_first: is called at the first token.

    Attributes:
        tokens: the answer so far.
        begin, first, last: when the prompt, the first and the last token of the answer came.
        stopping: ends the answer after ``stopped`` has been set.
    """

    def __init__(self, tokenizer, write: Write, at_first: Callable[[], object]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write, self.at_first, self.stopped = write, at_first, False
        self.tokens: list[int] = []
        self.begin = self.first = self.last = time.perf_counter()
        self.stopping = _Stopping(self)

    def put(self, value: torch.Tensor) -> None:
        now = time.perf_counter()
        if self.next_tokens_are_prompt:
            self.begin = now
        else:
            if not self.tokens:
                self.first = now
                self.at_first()
            self.last = now
            self.tokens += value.tolist()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.write(text)


class _Stopping(StoppingCriteria):
    def __init__(self, stream: _Stream) -> None:
        self.stream = stream

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        return torch.full(input_ids.shape[:1], self.stream.stopped, device=input_ids.device)


@contextmanager
def _interruptible(stream: _Stream) -> Iterator[None]:
    """Lets Ctrl-C end an answer: after the current token or, before the first token and the second time, at
    once."""

    def interrupt(signum, frame) -> None:
        if stream.stopped or not stream.tokens:
            raise KeyboardInterrupt
        stream.stopped = True

    previous = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        stream.stopped = True
        stream.end()
    finally:
        signal.signal(signal.SIGINT, previous)


def _crop(cache, surplus: int) -> bool:
    """Removes the last tokens from a cache; returns False, with the cache unusable, if it cannot."""
    layers = getattr(cache, "layers", None)
    if layers is None or any(hasattr(layer, "conv_states") for layer in layers):  # recurrent: no past states
        return False
    try:
        cache.crop(-surplus)
    except (RuntimeError, ValueError):  # a sliding window that has dropped what precedes them
        return False
    return True
