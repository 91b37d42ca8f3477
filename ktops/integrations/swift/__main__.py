"""Prints the path of the plugin file: ``--external_plugins "$(python -m ktops.integrations.swift)"``."""

from pathlib import Path

print(Path(__file__).with_name("ktops_plugin.py"))
