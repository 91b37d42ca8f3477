"""Whole models at the sizes of published ones: makes them, and measures what a person does with them.

``configs`` has the configurations of published models, as far as transformers and ktops read them; the model
that each belongs to is its ``_name_or_path``. The layers of DeepSeek-V4's ``compress_ratios`` follow the
pattern of the published list, without the entry of the layer for multi-token prediction.
"""
