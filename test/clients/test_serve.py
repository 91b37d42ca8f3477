"""transformers' server through ktops, asked over HTTP by OpenAI's client."""

import json
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from compare import MODEL, environment_in, example, run
from openai import OpenAI
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import save_model
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig, MistralForCausalLM

import ktops

QUESTION = [{"role": "user", "content": "Who lives in the forest?"}]

NEW_TOKENS = 12


@pytest.fixture(scope="module")
def served_model(tmp_path_factory) -> Path:
    """A model whose tokens are ASCII, so that a piece of the answer is no part of a character."""
    folder = save_model(tmp_path_factory.mktemp("served"), "mixtral")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    others = [token for token in range(len(tokenizer)) if not tokenizer.decode(token).isascii()]
    config = {"suppress_tokens": others, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, served_model) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(1)
    lora = LoraConfig(
        r=4,
        target_modules=["q_proj", "v_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        init_lora_weights=False,
    )
    get_peft_model(AutoModelForCausalLM.from_pretrained(served_model), lora).save_pretrained(folder)
    return folder


@contextmanager
def server(command: str, folder: Path) -> Iterator[str]:
    """Starts a documented command on a free port; yields the port.

    Afterwards, asserts that kt operators ran in it.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environment, witness = environment_in(folder)
    words = command.strip().replace("8000", port).split()
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(words, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        while not _is_open(int(port)):
            assert process.poll() is None, (folder / "log").read_text()
            time.sleep(0.2)
        yield port
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=60)
        finally:
            process.kill()
    assert witness.exists()


def _is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("localhost", port)) == 0


def generated(model, folder: Path) -> str:
    """Returns the answer of a model in this process."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer.apply_chat_template(
        QUESTION, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    output = model.eval().generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def asked(port: str, model: object) -> tuple[str, str]:
    """Returns a server's answer in one piece, and in pieces."""
    client = OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", max_retries=0)
    arguments = {
        "model": str(model), "messages": QUESTION, "temperature": 0, "max_tokens": NEW_TOKENS,
    }  # fmt: skip
    whole = client.chat.completions.create(**arguments).choices[0].message.content
    stream = list(client.chat.completions.create(**arguments, stream=True))
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert len(pieces) > NEW_TOKENS // 2
    return whole, "".join(pieces)


def test_an_adapter_under_launch(served_model, adapter, tmp_path):
    """The answer is that of transformers and PEFT without ktops."""
    base = AutoModelForCausalLM.from_pretrained(served_model, experts_implementation="eager")
    expected = generated(PeftModel.from_pretrained(base, adapter), served_model)
    assert expected != generated(AutoModelForCausalLM.from_pretrained(served_model), served_model)
    command = example("serve-launch", {" out ": f" {adapter} "})
    with server(command, tmp_path) as port:
        assert asked(port, adapter) == (expected, expected)


def test_a_weight_format(served_model, adapter, tmp_path):
    ktops.enable()
    base = AutoModelForCausalLM.from_pretrained(served_model, experts_implementation="ktops")
    ktops.quantize_experts(base, "int4", show_progress=False)
    expected = generated(PeftModel.from_pretrained(base, adapter), served_model)
    command = example("serve", {MODEL: str(served_model), " out ": f" {adapter} "})
    with server(command, tmp_path) as port:
        assert asked(port, served_model) == (expected, expected)


def test_the_client_of_the_example(served_model, adapter, tmp_path, capsys):
    command = example("serve", {MODEL: str(served_model), " out ": f" {adapter} "})
    with server(command, tmp_path) as port:
        names = {MODEL: str(served_model), "8000": port, "    stream=True": "    max_tokens=4, stream=True"}
        exec(example("serve-client", names), {})
    assert capsys.readouterr().out


def test_the_adapter_of_another_model(served_model, adapter, tmp_path):
    other = save_model(tmp_path / "other", "mixtral", intermediate_size=48)
    printed, _ = run("ktops", "serve", other, "--adapter", adapter, folder=tmp_path, succeeds=False)
    assert f"{adapter}, which was trained on {served_model}, does not fit {other}" in printed


def test_a_model_without_experts(served_model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(served_model)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = MistralConfig(vocab_size=len(tokenizer), num_key_value_heads=2, **sizes)
    MistralForCausalLM(config).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    command = ("ktops", "launch", "transformers", "serve", tmp_path / "dense")
    printed, ran = run(*command, folder=tmp_path, succeeds=False)
    assert not ran and "ktops runs no experts of" in printed
