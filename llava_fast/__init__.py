"""llava_fast: train and run LLaVA ("Visual Instruction Tuning") on packed tokens."""

from llava_fast import errors
from llava_fast.batch import PackedBatch
from llava_fast.config import ModelConfig
from llava_fast.engine import Completion, Delta, Engine, EngineConfig, Handle, Request, SamplingParams
from llava_fast.model import Llava
from llava_fast.pretrained import load, save
from llava_fast.processor import Processor

__version__ = "0.1.0.dev0"
__all__ = [
    "Completion",
    "Delta",
    "Engine",
    "EngineConfig",
    "Handle",
    "Llava",
    "ModelConfig",
    "PackedBatch",
    "Processor",
    "Request",
    "SamplingParams",
    "errors",
    "load",
    "save",
]
