"""How an answer's tokens are chosen."""

from transformers import GenerationConfig

MAX_NEW_TOKENS = 2048
"""Most tokens of an answer, if the model does not say."""


def generation_config(
    model, tokenizer, max_new_tokens: int | None, temperature: float | None, top_p: float | None
) -> GenerationConfig:
    """Returns a model's generation_config with the values given; the tokenizer's end-of-text token ends too.

    ``temperature`` 0 means greedy decoding; another value, or ``top_p``, sampling.
    """
    own = model.generation_config
    config = GenerationConfig.from_dict(own.to_dict())
    config.max_new_tokens = max_new_tokens or own.max_new_tokens or MAX_NEW_TOKENS
    if temperature == 0:
        config.do_sample = False
    elif temperature is not None or top_p is not None:
        config.do_sample = True
    if temperature:
        config.temperature = temperature
    if top_p is not None:
        config.top_p = top_p
    ends = own.eos_token_id
    ends = list(ends) if isinstance(ends, list) else [] if ends is None else [ends]
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        ends.append(tokenizer.eos_token_id)
    config.eos_token_id = ends or None
    if config.pad_token_id is None:
        config.pad_token_id = next(iter(ends), 0)
    return config


def describe(config: GenerationConfig) -> str:
    """Returns how tokens are chosen, in a line."""
    if config.do_sample:
        given = {name: getattr(config, name) for name in ("temperature", "top_k", "top_p", "min_p")}
        chosen = ", ".join(f"{name} {value:g}" for name, value in given.items() if value is not None)
        how = f"sampling with {chosen}" if chosen else "sampling"
    else:
        how = "always the likeliest token"
    return f"{how}; at most {config.max_new_tokens:,} tokens per answer"
