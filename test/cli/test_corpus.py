"""The packaged corpus and the small model made from it."""

import re
import string
from importlib import resources

import pytest
import torch

from ktops.cli.finetune import corpus, demo_model
from ktops.cli.finetune.layouts import from_alpaca


def test_corpus_is_packaged():
    names = {file.name for file in resources.files("ktops.cli.finetune").joinpath("data").iterdir()}
    assert {"village.json", "stories.json", "instructions.json"} <= names


def test_stories_depend_on_the_seed_only():
    assert corpus.stories(20) == corpus.stories(20)
    assert corpus.stories(20) == corpus.stories(40)[:20]
    assert corpus.stories(20) != corpus.stories(20, seed=1)
    assert all("{" not in story and story[0] in string.ascii_uppercase + '"' for story in corpus.stories(300))


def test_every_fact_that_is_asked_for_is_told_in_the_stories():
    text = " ".join(corpus.stories(demo_model.NUM_STORIES))
    for record in (record for part in corpus.instructions() for record in part):
        if record["instruction"].startswith("Where does"):
            name = record["instruction"].removeprefix("Where does ").removesuffix(" live?")
            home = record["output"].removeprefix("The home is ")
            assert f"{name} lives in {home}" in text


def test_what_is_held_out_is_not_in_the_training_set_in_any_phrasing():
    train, held_out = corpus.instructions()
    assert len(train) > 700 and len(held_out) > 100
    people = {
        record["instruction"].split()[-1][:-1]
        for record in train
        if record["instruction"].startswith("Greet")
    }

    def facts(records):
        """Returns (person, answer) of every question about a person."""
        pairs = ((people & set(re.findall(r"\w+", r["instruction"])), r["output"]) for r in records)
        return {(*names, output) for names, output in pairs if names}

    assert len(facts(held_out)) > 15
    assert not facts(held_out) & facts(train)
    questions = {(record["instruction"], record["input"]) for record in train}
    assert not questions & {(record["instruction"], record["input"]) for record in held_out}
    assert all(from_alpaca(record).messages for record in train + held_out)


def test_instructions_with_an_input_keep_it_apart():
    train, _ = corpus.instructions()
    record = next(record for record in train if record["instruction"].startswith("Write the words"))
    assert record["input"] and record["output"].startswith("1. " + record["input"].split(",")[0])


def test_tokenizer_round_trip_and_vocabulary():
    documents, tokenizer = demo_model.make_tokenizer()
    assert 1000 < len(tokenizer) <= demo_model.VOCAB_SIZE
    for text in (documents[0], "Grüße, 你好! \t\n  two  spaces"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    words = documents[0].split()
    assert len(tokenizer(documents[0])["input_ids"]) < 1.5 * len(words)


def test_pretraining_examples_are_documents_with_an_end(tokenizer):
    documents = corpus.stories(30)
    examples = demo_model.pretraining_examples(documents, tokenizer)
    assert len(examples) == len(documents)
    for document, example in zip(documents, examples, strict=True):
        text = document + tokenizer.eos_token
        length = len(example["input_ids"])
        assert text.startswith(tokenizer.decode(example["input_ids"]))
        assert length == demo_model.MAX_LENGTH or example["input_ids"][-1] == tokenizer.eos_token_id
        assert example["labels"] == example["input_ids"] and example["attention_mask"] == [1] * length


def test_model_has_a_few_million_parameters_and_spread_out_routers(tokenizer):
    torch.manual_seed(0)
    model = demo_model.create(tokenizer, torch.float32, "eager")
    assert 2e6 < model.num_parameters() < 8e6
    hidden = torch.nn.functional.normalize(torch.randn(512, model.config.hidden_size), dim=-1)
    logits = hidden * model.config.hidden_size**0.5 @ model.model.layers[0].mlp.gate.weight.T
    assert float(logits.detach().std()) == pytest.approx(1, rel=0.1)
    busiest = logits.topk(model.config.num_experts_per_tok).indices.flatten().bincount().max()
    assert busiest < 2 * 512 * model.config.num_experts_per_tok / model.config.num_experts
