"""Compares ktops with llama.cpp and PEFT on the same model, in one run, in turns.

Example:
    python -m bench.models compare FOLDER --llama-cpp VENV/bin/python

Answers: the engine of `ktops chat` and llama.cpp, with the same experts in a GGUF file of a model as wide as
--like (a Qwen3-MoE). The other matrices are in bfloat16 in both, unless --others quantizes llama.cpp's and
--linear-format those of ktops. The logits after the prompt are compared first. Training: steps of `ktops
finetune` with and without ktops; without, it is PEFT on transformers' grouped_mm. The files are made in
FOLDER, unless they are there.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy

from bench.arguments import Parser, positive
from bench.contest import Worker, say
from bench.models import finetune, layout
from bench.models.gguf_model import make_gguf
from bench.models.make import make
from ktops.cli.finetune import corpus

_PEFT = ("--experts-implementation", "grouped_mm")
_SIMILAR = 0.95
"""The least cosine of both engines' logits; each rounds activations to 8 bits, in blocks of its own."""


def _model(folder: Path, args: argparse.Namespace, layers: int, *, experts: bool) -> Path:
    """Returns the directory of a model with so many layers, and makes it if it is not there."""
    path = folder / f"{args.like}-{layers}{'' if experts else '-without-experts'}"
    if not path.exists():
        make(layout.changed_config(layout.read_config(args.like), layers, "bf16"), path, experts=experts)
    return path


def _answers(args: argparse.Namespace) -> None:
    model = _model(args.folder, args, args.layers, experts=False)
    file = args.folder / f"{args.like}-{args.layers}-{args.weight_format}-{args.others}.gguf"
    if not file.exists():
        make_gguf(model, file, args.weight_format, args.others)
    environment = {"OMP_NUM_THREADS": str(args.threads)}
    with tempfile.TemporaryDirectory() as scratch:
        ours = Worker(sys.executable, environment, Path(scratch, "ktops"), module="bench.models.ktops_host")
        theirs = Worker(
            args.llama_cpp, environment, Path(scratch, "llama"), module="bench.models.llama_cpp_host"
        )
        try:
            options = {"experts_path": str(file), "num_threads": args.threads}
            if args.linear_format:
                options["linear_format"] = args.linear_format
            about = ours.ask("load", model=str(model), options=options)
            context = args.prompt + args.answer
            about_theirs = theirs.ask("load", gguf=str(file), threads=args.threads, context=context)
            print(f"ktops {about['version']} {about['system']}; llama-cpp-python {about_theirs['version']}")
            _take_turns(args, ours, theirs, Path(scratch))
        finally:
            ours.close()
            theirs.close()


def _take_turns(args: argparse.Namespace, ours: Worker, theirs: Worker, scratch: Path) -> None:
    prompt = ours.ask("tokens", text=" ".join(corpus.stories(args.prompt)), count=args.prompt)
    logits = []
    for name, worker in (("ktops", ours), ("llama", theirs)):
        worker.ask("logits", prompt=prompt["tokens"], file=str(scratch / f"{name}.npy"))
        logits.append(numpy.load(scratch / f"{name}.npy"))
    cosine = float(logits[0] @ logits[1] / numpy.linalg.norm(logits[0]) / numpy.linalg.norm(logits[1]))
    if cosine < _SIMILAR:
        raise ValueError(f"logits differ: their cosine is {cosine:.3f}, and must be at least {_SIMILAR}")
    samples: dict[str, list[dict]] = {"ktops": [], "llama.cpp": []}
    for number in range(args.rounds):
        replies = {
            "ktops": ours.ask("answer", text=prompt["text"], new_tokens=args.answer),
            "llama.cpp": theirs.ask("answer", prompt=prompt["tokens"], new_tokens=args.answer),
        }
        for name, reply in replies.items():
            samples[name].append(reply)
            seconds = f"prompt {reply['prompt_seconds']:.2f} s, answer {reply['answer_seconds']:.2f} s"
            say(f"round {number + 1} of {args.rounds}, {name}: {seconds}, CPU {reply['cpu_seconds']:.2f} s")
    sizes = f"{args.layers} layers, {args.prompt} tokens of prompt, {args.answer} of answer"
    print(f"{sizes}; cosine of the logits {cosine:.4f}")
    figures = {name: speeds(replies, args.prompt, args.answer) for name, replies in samples.items()}
    print_table(figures, ("prompt tokens/s", "answer tokens/s"))


def speeds(replies: list[dict], prompt: int, answer: int) -> tuple[float, float]:
    """Returns tokens per second of prompt and answer; medians of the replies' seconds."""
    prompts = statistics.median(reply["prompt_seconds"] for reply in replies)
    answers = statistics.median(reply["answer_seconds"] for reply in replies)
    return prompt / prompts, (answer - 1) / answers


def print_table(figures: Mapping[str, tuple[float, ...]], columns: tuple[str, ...]) -> None:
    """Prints a line for each contestant, and the ratio of the first to the second."""
    print(f"{'':12}" + "".join(f"{column:>18}" for column in columns))
    for name, row in figures.items():
        print(f"{name:12}" + "".join(f"{value:18.2f}" for value in row))
    first, second = figures.values()
    print(f"{'ratio':12}" + "".join(f"{a / b:18.2f}" for a, b in zip(first, second, strict=True)))


def _training(args: argparse.Namespace) -> None:
    model = _model(args.folder, args, args.training_layers, experts=True)
    seconds: dict[str, list[float]] = {"ktops": [], "PEFT": []}
    for number in range(args.rounds):
        for name, options in (("ktops", ()), ("PEFT", _PEFT)):
            say(f"round {number + 1} of {args.rounds}: {name}")
            with tempfile.TemporaryDirectory() as scratch:
                run = finetune.run(model, args.training_tokens, args.steps, Path(scratch), *options)
            seconds[name] += run.step_seconds
    print(f"training, {args.training_tokens} tokens a step, {args.training_layers} layers")
    figures = {name: (args.training_tokens / statistics.median(steps),) for name, steps in seconds.items()}
    print_table(figures, ("tokens/s",))


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser("models compare", __doc__)
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help="for the models")
    add("--like", default="qwen3-30b-a3b", metavar="NAME", help="default: %(default)s")
    add("--llama-cpp", metavar="PYTHON", help="an interpreter with llama-cpp-python; without it, no answers")
    add("--layers", type=positive, default=12, help="of the model that answers (default: %(default)s)")
    add("--prompt", type=positive, default=512, help="tokens (default: %(default)s)")
    add("--answer", type=positive, default=64, help="tokens (default: %(default)s)")
    add("--weight-format", default="q4_k", help="of the experts (default: %(default)s)")
    add("--others", choices=("bf16", "q8_0"), default="bf16", help="llama.cpp's other matrices")
    add("--linear-format", help="of the other matrices of ktops; see ktops chat")
    add("--training-layers", type=int, default=2, help="0: no training (default: %(default)s)")
    add("--training-tokens", type=positive, default=512, help="of a step (default: %(default)s)")
    add("--steps", type=positive, default=3, help="of a training run (default: %(default)s)")
    parser.threads()
    parser.rounds(3)
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = parse_arguments(argv)
    family = json.loads((layout.CONFIGS / f"{args.like}.json").read_text())["model_type"]
    if args.llama_cpp and family != "qwen3_moe":
        say(f"error: --like must be a Qwen3-MoE for llama.cpp, got {args.like}")
        return 2
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.llama_cpp:
        _answers(args)
    if args.training_layers:
        _training(args)
    return 0
