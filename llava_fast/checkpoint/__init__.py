"""Reading and writing weights: one module a format, and the functions that find out which it is."""

from llava_fast.checkpoint.clip import save_clip
from llava_fast.checkpoint.files import SHARD_BYTES
from llava_fast.checkpoint.join import join
from llava_fast.checkpoint.llama import save_llama
from llava_fast.checkpoint.load import config_of, load_model, save_model
from llava_fast.checkpoint.names import canonical_parts
from llava_fast.checkpoint.projector import load_projector, save_projector

__all__ = [
    "SHARD_BYTES",
    "canonical_parts",
    "config_of",
    "join",
    "load_model",
    "load_projector",
    "save_clip",
    "save_llama",
    "save_model",
    "save_projector",
]
