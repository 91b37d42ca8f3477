"""Stands for torchaudio, which LLaMA-Factory imports but needs for audio alone."""
