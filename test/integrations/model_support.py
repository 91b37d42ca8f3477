"""Declares how ktops runs each model with experts; the others run through the experts interface."""

SWAPPED = {
    "dbrx", "jetmoe", "llama4", "longcat_flash", "nllb_moe", "step3p7", "switch_transformers",
}  # fmt: skip
"""Folders whose experts are outside the interface and run after ``ktops.swap_experts``."""

NOT_SUPPORTED = {
    "bamba": "It has no experts.",
    "doge": "Its experts are single neurons, looked up in embeddings; there is no matrix product.",
    "vitpose_backbone": "Its experts are one linear layer per data set, chosen for an image, not a token.",
}
"""Maps folders to the reason why ktops does not run their experts."""

LIMITED = {
    "deepseek_v4", "glm5_next", "gpt_oss", "hy_v4", "hy_v4_vl", "inkling2", "inkling2_loop",
    "minimax_m3_vl", "openai_privacy_filter", "step3p7",
}  # fmt: skip
"""Folders whose experts clamp or cap their projections."""

WITHOUT_ROUTER_LOSS = {"llama4", "nllb_moe", "openai_privacy_filter", "switch_transformers"}
"""Folders whose models return no auxiliary loss of the routers, though their configurations weigh it."""


WITHOUT_STACKS = {"dbrx", "jetmoe", "nllb_moe", "switch_transformers"}
"""Folders whose experts are not stacked in parameters of three dimensions, where LoRA could reach them."""


def support_table(folders: list[str]) -> str:
    """Returns a Markdown table of how ktops runs the models in these folders of transformers."""
    rows = ["| model | supported by |", "|---|---|"]
    for folder in folders:
        way = "`swap_experts`" if folder in SWAPPED else "`experts_implementation`"
        reason = NOT_SUPPORTED.get(folder)
        rows.append(f"| {folder} | {f'not: {reason}' if reason else way} |")
    return "\n".join(rows)
