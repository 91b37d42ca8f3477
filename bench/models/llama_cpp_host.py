"""Answers prompts by llama.cpp: ``python -m bench.models.llama_cpp_host``, where its package is installed."""

import time

import llama_cpp
import numpy

from bench import serving


class Host(serving.Host):
    """Holds a model; token ids go in and out, and the most probable token is always the next."""

    def load(self, gguf: str, threads: int, context: int) -> dict:
        """Loads a GGUF file with llama.cpp's defaults for the CPU."""
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(gguf.encode(), options)
        if not self.model:
            raise ValueError(f"llama.cpp cannot load {gguf}")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = context, context, context
        settings.n_threads = settings.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        return {"version": llama_cpp.__version__, "system": llama_cpp.llama_print_system_info().decode()}

    def answer(self, prompt: list[int], new_tokens: int) -> dict:
        """Replies with the tokens, and the seconds to the first and from the first to the last."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        start, cpu = time.perf_counter(), time.process_time()
        tokens = [self._next(prompt)]
        first = time.perf_counter()
        while len(tokens) < new_tokens:
            tokens.append(self._next(tokens[-1:]))
        seconds = {"prompt_seconds": first - start, "answer_seconds": time.perf_counter() - first}
        return {"tokens": tokens, **seconds, "cpu_seconds": time.process_time() - cpu}

    def logits(self, prompt: list[int], file: str) -> dict:
        """Writes the logits after a prompt."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        self._next(prompt)
        numpy.save(file, self._logits())
        return {}

    def _next(self, tokens: list[int]) -> int:
        ids = (llama_cpp.llama_token * len(tokens))(*tokens)
        if llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(ids, len(tokens))):
            raise RuntimeError(f"llama_decode failed for {len(tokens)} tokens")
        return int(self._logits().argmax())

    def _logits(self) -> numpy.ndarray:
        return numpy.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.context, -1), (self.vocabulary,))


if __name__ == "__main__":
    serving.serve(Host())
