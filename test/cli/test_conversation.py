"""Conversation: the answers, what it computes for them, and Ctrl-C."""

import os
import signal

import pytest
import torch
import transformers

from ktops.cli.chat.conversation import END, INTERRUPTED, LENGTH, Conversation
from ktops.cli.chat.sampling import generation_config
from ktops.cli.errors import UserError
from ktops.cli.finetune.rendering import CHAT_TEMPLATE

PROMPTS = ("Who lives in the forest?", "And what does the fox eat?", "Why?")

SIZES = {
    "hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "num_experts_per_tok": 2,
    "max_position_embeddings": 512, "initializer_range": 0.3,
}  # fmt: skip

LINEAR_ATTENTION = {
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 2, "shared_expert_intermediate_size": 16, "num_experts": 8,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip

CONFIGS = {
    "full": ("Qwen3MoeConfig", {"num_experts": 8}),
    "linear": ("Qwen3NextConfig", LINEAR_ATTENTION),
    "sliding": ("GptOssConfig", {"num_local_experts": 4, "sliding_window": 24}),
}
"""Models by what their caches keep."""

WITHOUT_REASONING = (
    "{%- for message in messages -%}"
    "{{ message.role + ':' }}"
    "{{ message.content if loop.index0 == messages | length - 1 else message.content[:4] }}"
    "{{ eos_token }}"
    "{%- endfor -%}assistant:"
)
"""A template that shortens earlier messages, as others leave out their reasoning."""


@pytest.fixture
def conversation(tokenizer, enabled):
    """``make(kind, ...)`` returns a conversation with a random model, whose experts run through ktops."""
    template = tokenizer.chat_template

    def make(kind: str = "full", max_new_tokens: int = 12, implementation: str = "ktops", **sizes: int):
        name, config = CONFIGS[kind]
        torch.manual_seed(0)
        config = getattr(transformers, name)(vocab_size=len(tokenizer), **(SIZES | config | sizes))
        config.eos_token_id = config.pad_token_id = config.bos_token_id = None
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, experts_implementation=implementation
        ).eval()
        with torch.no_grad():
            model.lm_head.weight[tokenizer.eos_token_id] = 0  # never the likeliest
        return Conversation(model, tokenizer, generation_config(model, tokenizer, max_new_tokens, 0.0, None))

    yield make
    tokenizer.chat_template = template


def discard(text: str) -> None:
    pass


@pytest.fixture
def computed(monkeypatch):
    """``count(conversation)`` returns a list that gets the number of tokens of every later forward."""

    def count(conversation: Conversation) -> list[int]:
        lengths: list[int] = []
        embeddings = conversation.model.get_input_embeddings()
        embeddings.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
        return lengths

    return count


def whole(conversation: Conversation, prompt: str, max_new_tokens: int) -> str:
    """Returns what eager experts answer to the whole conversation, computed at once."""
    messages = [*conversation.messages, {"role": "user", "content": prompt}]
    inputs = conversation.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    conversation.model.set_experts_implementation("eager")
    output = conversation.model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=conversation.tokenizer.eos_token_id,
        pad_token_id=0,
    )
    conversation.model.set_experts_implementation("ktops")
    return conversation.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("template", [CHAT_TEMPLATE, WITHOUT_REASONING], ids=["whole", "shortened"])
def test_answers_are_those_to_the_whole_conversation(conversation, tokenizer, kind, template):
    made = conversation(kind)
    tokenizer.chat_template = template
    for prompt in PROMPTS:
        expected, pieces = whole(made, prompt, 12), []
        answer = made.answer(prompt, pieces.append)
        assert answer.text == "".join(pieces) == expected
        assert (answer.answer_tokens, answer.stopped) == (12, LENGTH)
    assert [message["role"] for message in made.messages] == ["user", "assistant"] * len(PROMPTS)


def test_a_turn_computes_only_what_is_new(conversation, computed, tokenizer):
    made = conversation()
    lengths = computed(made)
    first = made.answer(PROMPTS[0], discard)
    assert lengths == [first.prompt_tokens] + [1] * 11 and first.cached_tokens == 0
    del lengths[:]
    second = made.answer(PROMPTS[1], discard)
    assert second.cached_tokens >= first.prompt_tokens
    assert lengths == [second.prompt_tokens - second.cached_tokens] + [1] * 11
    made.clear()
    assert made.messages == []
    assert made.answer(PROMPTS[0], discard).text == first.text


def test_a_shortened_conversation_is_computed_from_there(conversation, computed, tokenizer):
    made = conversation()
    tokenizer.chat_template = WITHOUT_REASONING
    made.answer(PROMPTS[0], discard)
    lengths = computed(made)
    second = made.answer(PROMPTS[1], discard)
    assert 0 < second.cached_tokens < 10
    assert lengths[0] == second.prompt_tokens - second.cached_tokens


def test_the_end_of_text_token_ends_an_answer(conversation, tokenizer):
    made = conversation()
    made.generation.suppress_tokens = [
        token for token in range(len(tokenizer)) if token != tokenizer.eos_token_id
    ]
    answer = made.answer(PROMPTS[0], discard)
    assert (answer.text, answer.answer_tokens, answer.stopped) == ("", 1, END)


def test_without_a_chat_template_prompts_are_continued_on_their_own(conversation, tokenizer):
    made = conversation()
    tokenizer.chat_template = None
    first = made.answer(PROMPTS[0], discard)
    made.answer(PROMPTS[1], discard)
    assert first.prompt_tokens == len(tokenizer(PROMPTS[0])["input_ids"])
    assert made.answer(PROMPTS[0], discard).text == first.text
    assert made.messages == []


def test_ctrl_c_ends_an_answer_after_a_token(conversation, computed):
    made = conversation(max_new_tokens=100)
    handler = signal.getsignal(signal.SIGINT)

    pieces: list[str] = []

    def interrupt(text: str) -> None:
        pieces.append(text)
        if len(pieces) == 1:
            os.kill(os.getpid(), signal.SIGINT)

    answer = made.answer(PROMPTS[0], interrupt)
    assert answer.stopped == INTERRUPTED and answer.text == "".join(pieces)
    assert 1 <= answer.answer_tokens < 50
    assert made.messages[-1] == {"role": "assistant", "content": answer.text}
    assert signal.getsignal(signal.SIGINT) is handler
    made.generation.max_new_tokens = 12
    expected = whole(made, PROMPTS[1], 12)
    following = made.answer(PROMPTS[1], discard)
    assert following.text == expected
    assert following.cached_tokens >= answer.prompt_tokens


def test_ctrl_c_before_the_first_token(conversation):
    """The prompt is forgotten, and what was computed of it."""
    made = conversation()
    made.answer(PROMPTS[0], discard)
    messages = list(made.messages)
    layer = made.model.model.layers[1]
    hook = layer.register_forward_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGINT))
    answer = made.answer(PROMPTS[1], discard)
    hook.remove()
    assert (answer.stopped, answer.answer_tokens, answer.text) == (INTERRUPTED, 0, "")
    assert answer.prompt_tokens_per_second is answer.answer_tokens_per_second is None
    assert made.messages == messages
    expected = whole(made, PROMPTS[1], 12)
    assert made.answer(PROMPTS[1], discard).text == expected


def test_a_second_ctrl_c_ends_an_answer_at_once(conversation):
    made = conversation(max_new_tokens=100)
    layer = made.model.model.layers[1]

    def interrupt(text: str) -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    answer = made.answer(PROMPTS[0], interrupt)
    assert answer.stopped == INTERRUPTED and answer.answer_tokens < 50
    assert layer.training is False
    expected = whole(made, PROMPTS[1], 100)
    assert made.answer(PROMPTS[1], discard).text == expected


def test_the_length_of_the_model(conversation):
    made = conversation(max_new_tokens=500, max_position_embeddings=80)
    answer = made.answer(PROMPTS[0], discard)
    assert answer.prompt_tokens + answer.answer_tokens == 80
    messages = list(made.messages)
    with pytest.raises(
        UserError, match=r"the conversation has \d+ tokens, and the model's longest sequence is 80"
    ):
        made.answer(PROMPTS[1], discard)
    assert made.messages == messages


def test_a_template_that_rejects_the_conversation(conversation, tokenizer):
    made = conversation()
    tokenizer.chat_template = "{{ raise_exception('no user messages') }}"
    with pytest.raises(UserError, match="chat template rejects the conversation: no user messages"):
        made.answer(PROMPTS[0], discard)


def test_an_empty_prompt(conversation, tokenizer):
    made = conversation()
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="the prompt is empty"):
        made.answer("", discard)
