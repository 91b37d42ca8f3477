"""The plugin file for ms-swift.

ms-swift imports files by path, and puts their folder in front of ``sys.path``; hence a folder of its own.
``python -m ktops.integrations.swift`` prints the path.
"""
