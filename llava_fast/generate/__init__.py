"""Offline batch: a file of prompts in, a file of answers out. See ``python -m llava_fast.generate --help``."""
