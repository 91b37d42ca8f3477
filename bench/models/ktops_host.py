"""Answers prompts as `ktops chat` does: ``python -m bench.models.ktops_host``."""

import sys
import time

import numpy
import torch

import ktops
from bench import serving
from ktops.cli.chat.conversation import Conversation
from ktops.cli.chat.sampling import generation_config
from ktops.cli.inference import LoadOptions, load


class Host(serving.Host):
    """Holds a model; the most probable token is always the next."""

    def load(self, model: str, options: dict) -> dict:
        """Loads a directory; ``options`` are those of :class:`ktops.cli.inference.LoadOptions`."""
        self.loaded = load(LoadOptions(model, **options), lambda line: print(line, file=sys.stderr))
        self.tokenizer = self.loaded.tokenizer
        self.tokenizer.chat_template = None
        return {"version": ktops.__version__, "system": ktops.cpu_capability()}

    def tokens(self, text: str, count: int) -> dict:
        """Cuts a text to ``count`` tokens; replies with the text and its token ids."""
        cut = self.tokenizer.decode(self.tokenizer(text)["input_ids"][:count])
        ids = self.tokenizer(cut)["input_ids"]
        if len(ids) != count:
            raise ValueError(f"the text has {len(ids)} tokens when it is cut to {count}")
        return {"text": cut, "tokens": ids}

    def answer(self, text: str, new_tokens: int) -> dict:
        """Replies with the tokens, and the seconds to the first and from the first to the last."""
        generation = generation_config(self.loaded.model, self.tokenizer, new_tokens, 0, None)
        generation.eos_token_id = None
        cpu = time.process_time()
        answer = Conversation(self.loaded.model, self.tokenizer, generation).answer(text, lambda piece: None)
        return {
            "tokens": answer.answer_tokens,
            "prompt_seconds": answer.prompt_seconds,
            "answer_seconds": answer.answer_seconds,
            "cpu_seconds": time.process_time() - cpu,
        }

    @torch.inference_mode()
    def logits(self, prompt: list[int], file: str) -> dict:
        """Writes the logits after a prompt."""
        output = self.loaded.model(torch.tensor([prompt]), logits_to_keep=1)
        numpy.save(file, output.logits[0, -1].float().numpy())
        return {}


if __name__ == "__main__":
    serving.serve(Host())
