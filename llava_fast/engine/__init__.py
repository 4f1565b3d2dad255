"""Inference inside the caller's process: requests in, text out, many at once over one paged cache."""

from llava_fast.engine.config import EngineConfig
from llava_fast.engine.engine import Engine
from llava_fast.engine.handle import Handle
from llava_fast.engine.request import Completion, Delta, Output, Request, SamplingParams, TokenLogprob
from llava_fast.engine.stats import Stats

__all__ = [
    "Completion",
    "Delta",
    "Engine",
    "EngineConfig",
    "Handle",
    "Output",
    "Request",
    "SamplingParams",
    "Stats",
    "TokenLogprob",
]
