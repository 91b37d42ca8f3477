"""Declares how ktops runs each model with experts; the others run through the experts interface."""

SWAPPED: set[str] = set()
"""Folders whose experts are outside the interface and run after ``ktops.swap_experts``."""

_CLAMPED = "Its experts clamp or cap the gate and up projections."
_TRANSPOSED = "Its weights are stored as `[E, in, out]`."
_SIGNATURE = "Its experts are outside the interface and have another signature or layout."
_NO_GATE = "Its experts have no gate projection."

NOT_SUPPORTED = {
    "aria": _TRANSPOSED,
    "bamba": "It has no experts.",
    "dbrx": _SIGNATURE,
    "deepseek_v4": _CLAMPED,
    "doge": "Its experts are single neurons, looked up in embeddings; there is no matrix product.",
    "glm5_next": _CLAMPED,
    "gpt_oss": f"{_TRANSPOSED} {_CLAMPED}",
    "hy_v4": _CLAMPED,
    "hy_v4_vl": _CLAMPED,
    "inkling2": _CLAMPED,
    "inkling2_loop": _CLAMPED,
    "jetmoe": _SIGNATURE,
    "llama4": _SIGNATURE,
    "longcat_flash": "Some of its experts compute nothing.",
    "minimax_m3_vl": _CLAMPED,
    "muse_spark": "It normalizes the output of every expert.",
    "nemotron_h": _NO_GATE,
    "nllb_moe": _NO_GATE,
    "openai_privacy_filter": f"{_TRANSPOSED} {_CLAMPED}",
    "step3p7": _CLAMPED,
    "switch_transformers": _NO_GATE,
    "vitpose_backbone": "Its experts are one linear layer per data set, chosen for a picture, not a token.",
}
"""Maps folders to the reason why ktops does not run their experts."""

LIMITED = {
    "deepseek_v4", "glm5_next", "gpt_oss", "hy_v4", "hy_v4_vl", "inkling2", "inkling2_loop",
    "minimax_m3_vl", "openai_privacy_filter", "step3p7",
}  # fmt: skip
"""Folders whose experts clamp or cap their projections."""


def support_table(folders: list[str]) -> str:
    """Returns a Markdown table of how ktops runs the models in these folders of transformers."""
    rows = ["| model | supported by |", "|---|---|"]
    for folder in folders:
        way = "`swap_experts`" if folder in SWAPPED else "`experts_implementation`"
        reason = NOT_SUPPORTED.get(folder)
        rows.append(f"| {folder} | {f'not: {reason}' if reason else way} |")
    return "\n".join(rows)
