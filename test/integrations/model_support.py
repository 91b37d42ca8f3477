"""Declares how ktops runs each model with experts; the others run through the experts interface."""

SWAPPED = {"dbrx", "jetmoe", "llama4", "longcat_flash", "nllb_moe", "step3p7", "switch_transformers"}
"""Folders whose experts are outside the interface and run after ``ktops.swap_experts``."""

NOT_SUPPORTED = {
    "bamba": "It has no experts.",
    "doge": "Its experts are single neurons, looked up in embeddings; there is no matrix product.",
    "vitpose_backbone": "Its experts are one linear layer per data set, chosen for a picture, not a token.",
}
"""Maps folders to the reason why ktops does not run their experts."""


def support_table(folders: list[str]) -> str:
    """Returns a Markdown table of how ktops runs the models in these folders of transformers."""
    rows = ["| model | supported by |", "|---|---|"]
    for folder in folders:
        way = "`swap_experts`" if folder in SWAPPED else "`experts_implementation`"
        reason = NOT_SUPPORTED.get(folder)
        rows.append(f"| {folder} | {f'not: {reason}' if reason else way} |")
    return "\n".join(rows)
