"""Chat in a terminal, on an engine of this process. See ``python -m llava_fast.chat --help``."""
