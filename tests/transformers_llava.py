"""transformers' own LLaVA, with random weights: the independent implementation that ours is held against."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from llava_fast.batch import PackedBatch
from llava_fast.config import IGNORE

IMAGE = 4


def make(
    *,
    kv_heads: int = 4,
    projector: str = "mlp2x_gelu",
    select_layer: int = -2,
    strategy: str = "default",
    rope: dict | None = None,
    vocab: int = 120,
    hidden: int = 64,
    layers: int = 2,
    seed: int = 0,
) -> LlavaForConditionalGeneration:
    """A small random model, float32, eval mode. A "linear" projector is transformers' two with act linear, W2 = I."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=3, image_size=28, patch_size=7
    )
    text = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=112,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        rope_parameters=rope or {"rope_type": "default", "rope_theta": 10000.0},
        initializer_range=0.2,  # larger than usual: differences show, and greedy tokens vary
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        vision_feature_layer=select_layer,
        vision_feature_select_strategy=strategy,
        projector_hidden_act="gelu" if projector == "mlp2x_gelu" else "linear",
        image_seq_length=16 + (strategy == "full"),
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for p in model.model.vision_tower.parameters():
            p.add_(0.1 * torch.randn_like(p))
        for p in model.model.multi_modal_projector.parameters():
            p.add_(0.1 * torch.randn_like(p))
        if projector == "linear":
            second = model.model.multi_modal_projector.linear_2
            second.weight.copy_(torch.eye(hidden))
            second.bias.zero_()
    return model


def sequences(images: list[int], per_image: int, vocab: int = 120, seed: int = 1) -> tuple[list[Tensor], list[Tensor]]:
    """One sequence an entry of ``images`` with that many images in it; returns token ids and pixel values of each."""
    generator = torch.Generator().manual_seed(seed)
    ids, pixels = [], []
    for n, count in enumerate(images):

        def text(length: int) -> Tensor:
            return torch.randint(5, vocab, (length,), generator=generator)

        parts = [torch.tensor([1]), text(3 + n)]
        for _ in range(count):
            parts += [torch.full((per_image,), IMAGE), text(4)]
        ids.append(torch.cat([*parts, text(5 + 2 * n)]))
        pixels.append(torch.randn(count, 3, 28, 28, generator=generator))
    return ids, pixels


def pack(ids: list[Tensor], pixels: list[Tensor], supervised_from: int = 2) -> PackedBatch:
    """The sequences as a PackedBatch; every text target after the first tokens is learned."""
    labels = []
    for row in ids:
        shifted = torch.cat([row[1:], torch.tensor([IGNORE])])
        shifted[shifted == IMAGE] = IGNORE
        shifted[:supervised_from] = IGNORE
        labels.append(shifted)
    lengths = [len(row) for row in ids]
    return PackedBatch(
        input_ids=torch.cat(ids),
        labels=torch.cat(labels),
        position_ids=torch.cat([torch.arange(n, dtype=torch.int32) for n in lengths]),
        cu_seqlens=torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32),
        pixel_values=torch.cat(pixels),
        image_token_id=IMAGE,
    )


def run_each(model: LlavaForConditionalGeneration, ids: list[Tensor], pixels: list[Tensor]) -> list[Tensor]:
    """transformers' logits of every sequence, run alone so that no padding is involved."""
    return [
        model(input_ids=row.unsqueeze(0), pixel_values=image if len(image) else None).logits[0]
        for row, image in zip(ids, pixels, strict=True)
    ]
