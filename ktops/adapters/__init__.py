"""Reads LoRA adapters of PEFT, kt-kernel and servers, writes them for each other, merges them into models."""

from ktops.adapters.adapter import Adapter, open_adapter
from ktops.adapters.errors import AdapterError
from ktops.adapters.export import export_adapter
from ktops.adapters.merge import merge_adapter

__all__ = ["Adapter", "AdapterError", "export_adapter", "merge_adapter", "open_adapter"]
