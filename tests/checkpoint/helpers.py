"""Small transformers models with random weights, and how both implementations are run on the same tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import llava_fast as lf

VOCAB, IMAGE = 96, 90
PATCHES = 16  # 32 pixels in patches of 8
VISION = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 1,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}


def reference(text: dict[str, Any] | None = None, **fields: Any) -> LlavaForConditionalGeneration:
    """transformers' LLaVA with random float32 weights of a size that makes logits differ."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(**(TEXT | (text or {}))),
        **({"image_token_index": IMAGE, "image_seq_length": PATCHES} | fields),
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    return model


def tokens(image_token: int = IMAGE) -> Tensor:
    """(1, T): text, one image's places, text."""
    return torch.tensor([[1, 17, 4] + [image_token] * PATCHES + [33, 8, 71, 2, 60]])


def pixels() -> Tensor:
    return torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def their_logits(model: LlavaForConditionalGeneration, image_token: int = IMAGE) -> Tensor:
    """(T, V) of transformers."""
    return model(input_ids=tokens(image_token), pixel_values=pixels()).logits[0]


@torch.no_grad()
def our_logits(model: lf.Llava) -> Tensor:
    """(T, V) of ours on the same tokens, whatever its image token is."""
    ids = tokens(model.config.image_token_id)[0]
    batch = lf.PackedBatch(
        input_ids=ids,
        labels=torch.full_like(ids, -100),
        position_ids=torch.arange(len(ids), dtype=torch.int32),
        cu_seqlens=torch.tensor([0, len(ids)], dtype=torch.int32),
        pixel_values=pixels(),
        image_token_id=model.config.image_token_id,
    )
    return model.logits(batch)


def assert_same_logits(ours: lf.Llava, theirs: LlavaForConditionalGeneration) -> None:
    torch.testing.assert_close(our_logits(ours), their_logits(theirs), atol=1e-4, rtol=0)


def rename(directory: Path, change: Callable[[str], str]) -> None:
    """Rename every tensor of a single-file checkpoint."""
    file = directory / "model.safetensors"
    save_file({change(n): t for n, t in load_file(file).items()}, file, metadata={"format": "pt"})


def edit_json(file: Path, **changes: Any) -> None:
    """Set fields of a JSON file; None removes a field."""
    fields = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({n: v for n, v in fields.items() if v is not None}))
