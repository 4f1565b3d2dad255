"""Measuring a model: LLaVA-Bench, ScienceQA, POPE. See ``python -m llava_fast.evaluate --help``."""
