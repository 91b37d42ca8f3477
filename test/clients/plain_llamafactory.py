"""Trains with LLaMA-Factory without ktops, with the adapters of a given adapter_config.json.

LLaMA-Factory has no key for PEFT's target_parameters. Arguments: the adapter_config.json, then what
``llamafactory-cli train`` takes.
"""

import json
import sys
from pathlib import Path

from llamafactory.model import adapter
from llamafactory.train.tuner import run_exp

KEYS = ("target_modules", "target_parameters", "lora_dropout")

saved = json.loads(Path(sys.argv.pop(1)).read_text())
own_config = adapter.LoraConfig
adapter.LoraConfig = lambda **given: own_config(**given | {key: saved[key] for key in KEYS})
run_exp()
