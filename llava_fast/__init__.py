"""llava_fast: train and run LLaVA ("Visual Instruction Tuning") on packed tokens."""

from typing import TYPE_CHECKING

from llava_fast import errors
from llava_fast.lazy import exporter

if TYPE_CHECKING:
    from llava_fast.batch import PackedBatch
    from llava_fast.config import ModelConfig
    from llava_fast.engine import Completion, Delta, Engine, EngineConfig, Handle, Request, SamplingParams
    from llava_fast.model import Llava
    from llava_fast.pretrained import load, save
    from llava_fast.processor import Processor
else:  # a type checker would take every name for one of these
    _ENGINE = ("Completion", "Delta", "Engine", "EngineConfig", "Handle", "Request", "SamplingParams")
    __getattr__ = exporter(
        __name__,
        {
            **dict.fromkeys(_ENGINE, "llava_fast.engine"),
            "PackedBatch": "llava_fast.batch",
            "ModelConfig": "llava_fast.config",
            "Llava": "llava_fast.model",
            "load": "llava_fast.pretrained",
            "save": "llava_fast.pretrained",
            "Processor": "llava_fast.processor",
        },
    )

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


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
