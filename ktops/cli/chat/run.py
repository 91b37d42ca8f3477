"""`ktops chat`: loads a model and answers prompts, in a terminal or one from a file or a pipe."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import transformers
from rich.console import Console
from rich.text import Text

from ktops._display import format_bytes
from ktops.cli import inference
from ktops.cli.chat.conversation import INTERRUPTED, LENGTH, Answer, Conversation
from ktops.cli.chat.metrics import Metrics, rss_bytes
from ktops.cli.chat.sampling import describe, generation_config
from ktops.cli.chat.terminal import HELP, Terminal
from ktops.cli.errors import Interrupted, UserError
from ktops.cli.finetune.measure import peak_rss_bytes
from ktops.cli.finetune.rendering import CHAT_TEMPLATE
from ktops.cli.inference import LoadOptions

STDIN = Path("-")


@dataclass(frozen=True)
class ChatOptions(LoadOptions):
    """The options of `ktops chat`; None where the model decides."""

    prompt: str | None = None
    file: Path | None = None
    system: str | None = None
    no_chat_template: bool = False
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    metrics: Path | None = None


def chat(options: ChatOptions) -> None:
    """Runs `ktops chat`.

    Raises:
        UserError: something is wrong with an option, the model, the adapter or the prompt.
        Interrupted: Ctrl-C while the model is loaded, or during the only answer.
    """
    console = Console(stderr=True, highlight=False)

    def say(line: str) -> None:
        console.print(Text(f"  {line}", style="dim"), soft_wrap=True)

    _check(options)
    prompt = _only_prompt(options)
    try:
        _run(options, prompt, say)
    except KeyboardInterrupt:
        raise Interrupted("Interrupted.") from None
    except BrokenPipeError:  # who reads the answer has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(options: ChatOptions, prompt: str | None, say: inference.Say) -> None:
    loaded = inference.load(options, say)
    conversation = _conversation(options, loaded, say)
    say(f"{inference.describe(loaded.model)}, loaded in {loaded.seconds:.1f} s")
    say(describe(conversation.generation))
    if options.seed is not None:
        transformers.set_seed(options.seed)
    metrics = Metrics(options, loaded)
    if prompt is None:
        _talk(conversation, metrics, say)
    elif _answer(conversation, prompt, metrics, say).stopped == INTERRUPTED:
        raise Interrupted("Interrupted.")


def _check(options: ChatOptions) -> None:
    if options.prompt is not None and options.file is not None:
        raise UserError("--prompt and --file cannot be combined")
    for name, least, most in (("max_new_tokens", 1, None), ("temperature", 0, None), ("top_p", 0, 1)):
        value = getattr(options, name)
        if value is not None and not least <= value <= (float("inf") if most is None else most):
            bounds = f"at least {least}" if most is None else f"from {least} to {most}"
            raise UserError(f"--{name.replace('_', '-')} must be {bounds}, got {value}")
    if options.metrics is not None and not options.metrics.absolute().parent.is_dir():
        raise UserError(f"--metrics: no such directory: {options.metrics.absolute().parent}")


def _only_prompt(options: ChatOptions) -> str | None:
    """Returns the prompt of the options or of a pipe; None in a terminal.

    Raises:
        UserError: it is empty, or cannot be read.
    """
    prompt = _read_prompt(options)
    if prompt is not None and not prompt.strip():
        source = "--prompt" if options.prompt is not None else f"--file {options.file or STDIN}"
        raise UserError(f"{source}: the prompt is empty")
    return prompt


def _read_prompt(options: ChatOptions) -> str | None:
    if options.prompt is not None:
        return options.prompt
    if options.file is None and sys.stdin.isatty():
        return None
    try:
        if options.file in (None, STDIN):
            return sys.stdin.read().rstrip("\n")
        assert options.file is not None
        return options.file.read_text(encoding="utf-8").rstrip("\n")
    except OSError as error:
        raise UserError(f"--file: {options.file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--file: {options.file or 'stdin'} is not UTF-8: {error}") from None


def _conversation(options: ChatOptions, loaded: inference.Loaded, say: inference.Say) -> Conversation:
    """Returns an empty conversation, and says which template it uses if that is not the tokenizer's own."""
    tokenizer = loaded.tokenizer
    if options.no_chat_template:
        tokenizer.chat_template = None
    elif tokenizer.chat_template is None and loaded.trained_by_ktops:
        say("the tokenizer has no chat template: the one that ktops finetune trained with")
        tokenizer.chat_template = CHAT_TEMPLATE
    if tokenizer.chat_template is None:
        if options.system is not None:
            raise UserError("--system needs a chat template; the tokenizer has none, or it is not used")
        if not options.no_chat_template:
            say("the tokenizer has no chat template: each prompt is continued as plain text, on its own")
    generation = generation_config(
        loaded.model, tokenizer, options.max_new_tokens, options.temperature, options.top_p
    )
    return Conversation(loaded.model, tokenizer, generation, options.system)


def _answer(conversation: Conversation, prompt: str, metrics: Metrics, say: inference.Say) -> Answer:
    def write(text: str) -> None:
        print(text, end="", flush=True)

    answer = conversation.answer(prompt, write)
    print(flush=True)
    metrics.add(answer)
    say(_summary(answer))
    return answer


def _summary(answer: Answer) -> str:
    def speed(tokens_per_second: float | None) -> str:
        return "" if tokens_per_second is None else f", {tokens_per_second:,.1f} tokens/s"

    cached = f" ({answer.cached_tokens:,} known)" if answer.cached_tokens else ""
    kt = f"kt ops {answer.kt_share:.0%}; " if answer.answer_tokens else ""
    why = {LENGTH: ", stopped at the limit", INTERRUPTED: ", interrupted"}.get(answer.stopped, "")
    return (
        f"prompt {answer.prompt_tokens:,} tokens{cached}{speed(answer.prompt_tokens_per_second)}; "
        f"answer {answer.answer_tokens:,}{speed(answer.answer_tokens_per_second)}{why}; {kt}"
        f"memory {format_bytes(rss_bytes())}, peak {format_bytes(peak_rss_bytes())}"
    )


def _talk(conversation: Conversation, metrics: Metrics, say: inference.Say) -> None:
    """Answers prompts from the terminal until the user ends it."""
    say("/help lists the commands")
    terminal, interrupts = Terminal(), 0
    while interrupts < 2:
        try:
            prompt = terminal.read()
        except EOFError:
            break
        except UnicodeDecodeError as error:
            say(f"the prompt is not UTF-8: {error}")
            continue
        except KeyboardInterrupt:
            interrupts += 1
            print(file=sys.stderr)
            if interrupts == 1:
                say("Ctrl-C again, Ctrl-D or /exit ends the conversation")
            continue
        interrupts = 0
        if prompt in ("/exit", "/quit"):
            return
        if prompt == "/help":
            print(HELP, file=sys.stderr)
        elif prompt == "/clear":
            conversation.clear()
            say("a new conversation")
        elif prompt:
            try:
                _answer(conversation, prompt, metrics, say)
            except UserError as error:
                say(str(error))
    print(file=sys.stderr)
