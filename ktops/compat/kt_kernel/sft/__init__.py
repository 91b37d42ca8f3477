"""The names of KTransformers' module ``kt_kernel.sft``."""
