"""`ktops chat`: what it loads, says and writes."""

import io
import json
import os
import pty
import re
import select
import shutil
import signal
import sys
from pathlib import Path

import gguf
import pytest
import torch
from model_files import save_model
from safetensors.torch import load_file, save_file

import ktops
from ktops.cli import inference
from ktops.cli.finetune.rendering import CHAT_TEMPLATE

QUESTION = "Who lives in the forest?"

GREEDY = ("--dtype", "f32", "--temperature", 0, "--max-new-tokens", 8)


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory, tokenizer):
    """A random model for chats, which never ends an answer by itself, with a chat template."""
    directory = tmp_path_factory.mktemp("chat")
    save_model(directory, tokenizer, max_position_embeddings=100_000)
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    weights = load_file(directory / "model.safetensors")
    weights["lm_head.weight"][tokenizer.eos_token_id] = 0
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.fixture(scope="session")
def adapter(tmp_path_factory, chat_model):
    """``make(folder, ...)`` saves a random adapter for a model, as `ktops finetune` would."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    def make(folder, model=chat_model, **recorded):
        torch.manual_seed(1)
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        lora = LoraConfig(
            r=4,
            target_modules=["q_proj"],
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            init_lora_weights=False,
        )
        get_peft_model(base, lora).save_pretrained(folder)
        if recorded:
            (folder / "options.json").write_text(
                json.dumps({"model": str(model), "dtype": "f32", **recorded})
            )
        return folder

    return make


def generated(model, tokenizer, question: str = QUESTION, max_new_tokens: int = 8) -> str:
    """Returns the answer of a model by transformers' generate alone."""
    tokenizer.chat_template = CHAT_TEMPLATE
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    output = model.eval().generate(
        **inputs, do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id
    )
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def plain(model, experts_implementation="eager", **options):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, experts_implementation=experts_implementation, **options
    )


def test_a_prompt(ktops_command, chat_model, tokenizer, tmp_path):
    """The answer alone goes to stdout, and is the one of transformers' eager experts."""
    expected = generated(plain(chat_model), tokenizer)
    status, out, err = ktops_command(
        "chat", chat_model, "--prompt", QUESTION, *GREEDY, "--metrics", "figures.json"
    )
    assert (status, out) == (0, expected + "\n")
    assert re.search(r"Qwen3MoeForCausalLM, .* M parameters, loaded in [\d.]+ s", err)
    assert "always the likeliest token; at most 8 tokens per answer" in err
    assert re.search(
        r"prompt \d+ tokens, [\d.,]+ tokens/s; answer 8, [\d.,]+ tokens/s, stopped at the limit; "
        r"kt ops \d+%; memory [\d.]+ [MG]iB, peak [\d.]+ [MG]iB",
        err,
    )
    figures = json.loads((tmp_path / "figures.json").read_text())
    [answer] = figures["answers"]
    assert (answer["text"], answer["answer_tokens"], answer["stopped"]) == (expected, 8, "length")
    assert answer["prompt_tokens_per_second"] == answer["prompt_tokens"] / answer["prompt_seconds"]
    assert answer["answer_tokens_per_second"] == 7 / answer["answer_seconds"]
    assert 0 < answer["prompt_kt_seconds"] < answer["prompt_seconds"]
    assert 0 < answer["answer_kt_seconds"] < answer["answer_seconds"]
    assert figures["options"]["model"] == str(chat_model)
    assert figures["load_seconds"] > 0 and figures["peak_rss_bytes"] > 2**20
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]


@pytest.mark.parametrize("source", ["file", "dash", "stdin"])
def test_other_sources_of_the_prompt(ktops_command, chat_model, tokenizer, tmp_path, monkeypatch, source):
    question = "Who lives in the forest?\nAnd who in the sea?"
    (tmp_path / "question.txt").write_text(question + "\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO(question + "\n"))
    arguments = {"file": ["--file", "question.txt"], "dash": ["--file", "-"], "stdin": []}[source]
    status, out, _ = ktops_command("chat", chat_model, *arguments, *GREEDY)
    assert (status, out) == (0, generated(plain(chat_model), tokenizer, question) + "\n")


def test_sampling(ktops_command, chat_model, tmp_path):
    """The model's own generation_config counts, and the options override it."""
    shutil.copytree(chat_model, tmp_path / "model")
    own = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "max_new_tokens": 6}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(own))
    answers = []
    for options in (["--seed", 1], ["--seed", 1], ["--seed", 2], ["--seed", 1, "--temperature", 5]):
        status, out, err = ktops_command("chat", "model", "--prompt", QUESTION, *options)
        assert status == 0
        temperature = 0.7 if len(options) == 2 else 5
        expected = (
            f"sampling with temperature {temperature}, top_k 20, top_p 0.9; at most 6 tokens per answer"
        )
        assert expected in err
        answers.append(out)
    assert answers[0] == answers[1] and len(set(answers)) == 3
    _, out, err = ktops_command("chat", "model", "--prompt", QUESTION, "--top-p", 0.5, "--max-new-tokens", 3)
    assert "sampling with temperature 0.7, top_k 20, top_p 0.5; at most 3 tokens per answer" in err


def test_without_a_chat_template(ktops_command, model_directory, tokenizer):
    model = plain(model_directory)
    ids = tokenizer(QUESTION, return_tensors="pt")["input_ids"]
    output = model.generate(ids, do_sample=False, max_new_tokens=8, pad_token_id=tokenizer.pad_token_id)
    expected = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    status, out, err = ktops_command("chat", model_directory, "--prompt", QUESTION, *GREEDY)
    assert (status, out) == (0, expected + "\n")
    assert err.count("no chat template: each prompt is continued as plain text") == 1
    status, _, err = ktops_command("chat", model_directory, "--prompt", QUESTION, "--system", "Be brief.")
    assert (status, "--system needs a chat template" in err) == (1, True)


def test_an_adapter_on_the_experts_that_it_was_trained_on(
    ktops_command, chat_model, adapter, tokenizer, tmp_path
):
    """The directory of the adapter is enough."""
    from peft import PeftModel

    trained = adapter(tmp_path / "out", weight_format="int4", group_size=32, quantize_method="mse")
    ktops.enable()
    base = plain(chat_model, "ktops")
    ktops.quantize_experts(base, "int4", group_size=32, method="mse", show_progress=False)
    expected = generated(PeftModel.from_pretrained(base, trained), tokenizer)
    options = ("--prompt", QUESTION, "--temperature", 0, "--max-new-tokens", 8)
    for arguments in (["out"], [chat_model, "--adapter", "out"]):
        status, out, err = ktops_command("chat", *arguments, *options)
        assert (status, out) == (0, expected + "\n")
        assert "--weight-format int4 --group-size 32 --quantize-method mse, as the adapter was trained" in err
        assert "experts in int4 (" in err
    status, out, err = ktops_command("chat", "out", "--weight-format", "int8", *options)
    assert status == 0 and "experts in int8 (" in err
    assert re.search(r"was trained with --weight-format int4 .*, not with --weight-format int8", err)


def test_an_adapter_on_a_converted_model(ktops_command, chat_model, adapter, tmp_path):
    adapter(tmp_path / "out", weight_format="int4")
    assert ktops_command("convert", chat_model, "converted", "--weight-format", "int8")[0] == 0
    status, _, err = ktops_command("chat", "converted", "--adapter", "out", "--prompt", QUESTION, *GREEDY)
    assert status == 0 and "experts in int8 (" in err
    assert re.search(r"was trained with --weight-format int4; .*converted keeps its own weights", err)
    assert "was trained on" not in err


def test_experts_in_a_gguf_file(ktops_command, chat_model, tokenizer, tmp_path):
    """Beside the Hugging Face directory; the answer is that of the decoded weights in eager experts."""
    model, writer = plain(chat_model), gguf.GGUFWriter(tmp_path / "experts.gguf", "qwen3moe")
    for number, layer in enumerate(model.model.layers):
        experts = layer.mlp.experts
        gate, up = experts.gate_up_proj.data.chunk(2, dim=1)
        kinds = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.F16
        for name, weight, kind in (
            ("gate", gate, kinds[0]),
            ("up", up, kinds[0]),
            ("down", experts.down_proj.data, kinds[1]),
        ):
            blocks = gguf.quantize(weight.numpy(), kind)
            writer.add_tensor(f"blk.{number}.ffn_{name}_exps.weight", blocks, raw_dtype=kind)
            weight.copy_(torch.from_numpy(gguf.dequantize(blocks, kind)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    expected = generated(model, tokenizer)
    options = ("--experts-path", "experts.gguf", "--prompt", QUESTION)
    status, out, err = ktops_command("chat", chat_model, *options, *GREEDY)
    assert (status, out) == (0, expected + "\n")
    assert "experts in q8_0, fp16 (" in err


def test_linear_layers_in_int8(ktops_command, chat_model, adapter, tokenizer, tmp_path):
    """As the options say, or as the adapter was trained."""
    ktops.enable()
    model = plain(chat_model, "ktops")
    ktops.quantize_linear(model, "int8")
    expected = generated(model, tokenizer)
    options = ("--prompt", QUESTION, *GREEDY)
    status, out, err = ktops_command("chat", chat_model, "--linear-format", "int8", *options)
    assert (status, out) == (0, expected + "\n")
    assert re.search(r"\d+ linear layers: .* in int8", err)
    adapter(tmp_path / "out", linear_format="int8")
    status, _, err = ktops_command("chat", "out", *options)
    assert status == 0 and "--linear-format int8, as the adapter was trained" in err
    assert re.search(r"\d+ linear layers: .* in int8", err)


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    monkeypatch.setattr(inference, "load_base", lambda *_, **__: pytest.fail("loaded"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], r"MODEL: no such directory: .*missing"),
        (["{model}", "--adapter", "missing"], r"--adapter: no such directory: missing"),
        (["{model}", "--adapter", "{model}"], r"--adapter: .* has no adapter_config.json"),
        (["{model}", "--experts-path", "e.gguf"], r"--experts-path: no such file or directory: .*e\.gguf"),
        (["{model}", "--weight-format", "int5"], r"--weight-format int5: "),
        (["{model}", "--group-size", "32"], r"--group-size and --quantize-method need --weight-format"),
        (["{model}", "--linear-format", "int4"], r"--linear-format must be int8, got 'int4'"),
        (["{model}", "--dtype", "f16"], r"--dtype must be bf16 or f32, got 'f16'"),
        (["{model}", "--device", "tpu"], r"--device"),
        (["{model}", "--num-gpu-experts", "1"], r"--num-gpu-experts needs --device"),
        (["{model}", "--temperature", "-1"], r"--temperature must be at least 0, got -1"),
        (["{model}", "--top-p", "2"], r"--top-p must be from 0 to 1, got 2"),
        (["{model}", "--max-new-tokens", "0"], r"--max-new-tokens must be at least 1, got 0"),
        (["{model}", "--prompt", " "], r"--prompt: the prompt is empty"),
        (["{model}", "--file", "missing.txt"], r"--file: missing.txt: No such file"),
        (["{model}", "--metrics", "no/m.json"], r"--metrics: no such directory: .*no"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)  # fmt: skip
def test_errors_before_anything_is_loaded(ktops_command, nothing_is_loaded, chat_model, arguments, message):
    prompt = [] if {"--file", "--prompt"} & {*arguments} else ["--prompt", QUESTION]
    given = [argument.replace("{model}", str(chat_model)) for argument in arguments]
    status, out, err = ktops_command("chat", *given, *prompt)
    assert (status, out) == (1, "")
    assert re.match(f"ktops: {message}", err)


def test_the_adapter_of_another_model(
    ktops_command, nothing_is_loaded, chat_model, adapter, tokenizer, tmp_path
):
    """The message names both models."""
    save_model(tmp_path / "other", tokenizer, moe_intermediate_size=32)
    adapter(tmp_path / "out", tmp_path / "other")
    status, _, err = ktops_command("chat", chat_model, "--adapter", "out", "--prompt", QUESTION)
    assert status == 1
    assert re.search(rf"--adapter: out, which was trained on .*other, does not fit {chat_model}: ", err)
    status, _, err = ktops_command("chat", "out", "--adapter", "out", "--prompt", QUESTION)
    assert status == 1
    assert "MODEL: out is an adapter, and --adapter names another: out. Pass the model as MODEL, or" in err
    assert re.search(
        r"MODEL: .*out is an adapter, not a model. Pass the model that it was trained on, .*other",
        ktops_command("plan", "out")[2],
    )
    shutil.rmtree(tmp_path / "other")
    status, _, err = ktops_command("chat", "out", "--prompt", QUESTION)
    assert status == 1
    assert re.search(r"MODEL: out is an adapter, and its model, '.*other', is not on this machine", err)


def test_a_model_without_experts(ktops_command, tokenizer, tmp_path):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    status, out, err = ktops_command("chat", "dense", "--prompt", QUESTION)
    assert (status, out) == (1, "")
    assert re.search("MODEL: ktops runs no experts of .*dense: it has no Mixture-of-Experts layers", err)


def test_figures_that_cannot_be_written(ktops_command, chat_model, tmp_path, monkeypatch):
    """The answer is shown, and an older file is left as it was."""
    (tmp_path / "figures.json").write_text("{}")

    def refuse(self, target):
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr("pathlib.Path.replace", refuse)
    options = ("--prompt", QUESTION, *GREEDY, "--metrics", "figures.json")
    status, out, err = ktops_command("chat", chat_model, *options)
    assert status == 1 and out.strip()
    assert "--metrics: figures.json.tmp: No space left on device" in err
    assert (tmp_path / "figures.json").read_text() == "{}"


class Typist:
    """Types into a command that runs in a terminal of its own; ends the command with the block."""

    def __init__(self, *command: object, environment: dict[str, str]) -> None:
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            os.execve(sys.executable, [sys.executable, *map(str, command)], environment)
        self.shown, self.ended = "", False

    def __enter__(self) -> "Typist":
        return self

    def __exit__(self, *_: object) -> None:
        if not self.ended:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.terminal)

    def type(self, text: str) -> None:
        os.write(self.terminal, text.encode())

    def expect(self, pattern: str) -> None:
        """Waits until the pattern is shown, after what was expected before."""
        while not (found := re.search(pattern, self.shown)):
            assert select.select([self.terminal], [], [], 120)[0], f"{pattern!r} is not in:\n{self.shown}"
            self.shown += os.read(self.terminal, 4096).decode(errors="replace")
        self.shown = self.shown[found.end() :]

    def wait_for_prompt(self) -> None:
        """Waits until the command waits for a line.

        Between showing the prompt and waiting, readline would notice Ctrl-C only with the next key.
        """
        self.expect(">>> ")
        state = ""
        while state != "S":
            state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]

    def status(self) -> int:
        """Waits for the end of the command."""
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self.ended = True
        return status


def test_ctrl_c_in_a_terminal(chat_model, tmp_path):
    """It stops an answer, and the next prompt is answered with what has been computed; twice, it ends."""
    changes = {"XDG_STATE_HOME": str(tmp_path), "TERM": "dumb", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = ("-m", "ktops.cli.main", "chat", chat_model, "--dtype", "f32", "--temperature", 0)
    endless = ("--max-new-tokens", 90_000)
    with Typist(*command, *endless, environment={**os.environ, **changes}) as typist:
        typist.wait_for_prompt()
        for known in ("", r" \(\d+ known\)"):
            typist.type(QUESTION + "\n")
            typist.expect(re.escape(QUESTION) + r"\s+\S")
            typist.type("\x03")
            typist.expect(rf"prompt \d+ tokens{known}.*answer \d+.*, interrupted; kt ops \d+%; memory")
            typist.wait_for_prompt()
        typist.type("/clear\n")
        typist.expect("a new conversation")
        typist.wait_for_prompt()
        typist.type('"""Two\nlines"""\n')
        typist.expect(r"lines\"\"\"\s+\S")
        typist.type("\x03")
        typist.expect(r"interrupted; kt ops \d+%; memory")
        typist.wait_for_prompt()
        typist.type("\x03")
        typist.expect("Ctrl-C again, Ctrl-D or /exit ends")
        typist.wait_for_prompt()
        typist.type("\x03")
        assert typist.status() == 0
    assert (tmp_path / "ktops" / "chat_history").read_text() == f"{QUESTION}\n{QUESTION}\n/clear\n"
