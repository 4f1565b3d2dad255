"""One training step (forward, backward, AdamW) beside transformers' own, on the same samples and weights.

transformers gets what its users give it: one right-padded batch with an attention mask, the same parts frozen, SDPA
attention. Ours gets the same samples packed. The plain PyTorch model of this package is also the eager reference: there
is no other implementation of it yet to put beside.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

import llava_fast as lf
from benches.lengths import LCS_558K, mixed
from llava_fast.checkpoint import save_model
from llava_fast.config import IGNORE, TextConfig, VisionConfig
from llava_fast.train.stages import freeze

IMAGE = 31_999
CONFIG = lf.ModelConfig(
    vision=VisionConfig(hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=4),
    text=TextConfig(
        vocab_size=32_000,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=64,
        rms_norm_eps=1e-5,
    ),
    projector="mlp2x_gelu",
    image_token_id=IMAGE,
)
SAMPLES = {"stage1": LCS_558K[:8], "stage2": mixed(8)}


@dataclass
class Sample:
    ids: Tensor  # (n,) image rows expanded
    labels: Tensor  # (n,) not shifted, IGNORE where nothing is learned
    pixels: Tensor  # (images, 3, 224, 224)


def make_samples(rows: list[tuple[int, int, int]]) -> list[Sample]:
    generator = torch.Generator().manual_seed(0)
    samples = []
    for prompt, supervised, images in rows:
        text = torch.randint(5, IMAGE, (prompt + supervised,), generator=generator)
        image = torch.full((images * CONFIG.tokens_per_image,), IMAGE)
        ids = torch.cat([text[:5], image, text[5:]])
        labels = ids.clone()
        labels[: len(ids) - supervised] = IGNORE
        samples.append(Sample(ids, labels, torch.randn(images, 3, 224, 224, generator=generator)))
    return samples


def packed(samples: list[Sample]) -> lf.PackedBatch:
    lengths = [len(s.ids) for s in samples]
    return lf.PackedBatch(
        input_ids=torch.cat([s.ids for s in samples]),
        labels=torch.cat([torch.cat([s.labels[1:], torch.tensor([IGNORE])]) for s in samples]),
        position_ids=torch.cat([torch.arange(n, dtype=torch.int32) for n in lengths]),
        cu_seqlens=torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32),
        pixel_values=torch.cat([s.pixels for s in samples]),
        image_token_id=IMAGE,
    )


def padded(samples: list[Sample]) -> dict[str, Tensor]:
    def pad(rows: list[Tensor], value: int) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    return {
        "input_ids": pad([s.ids for s in samples], 0),
        "attention_mask": pad([torch.ones_like(s.ids) for s in samples], 0),
        "labels": pad([s.labels for s in samples], IGNORE),
        "pixel_values": torch.cat([s.pixels for s in samples]),
    }


class Ours:
    def __init__(self, stage: int, samples: list[Sample], folder) -> None:
        self.model = lf.Llava(CONFIG, seed=0)
        save_model(self.model, folder)
        freeze(self.model, stage)
        self.batch = packed(samples)
        self.optimizer = adamw(self.model)

    def loss(self) -> Tensor:
        return self.model.loss(self.batch)


class Transformers:
    def __init__(self, stage: int, samples: list[Sample], folder) -> None:
        self.model = LlavaForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa"
        )
        self.model.train()
        self.model.requires_grad_(False)
        self.model.model.multi_modal_projector.requires_grad_(True)
        if stage == 2:
            self.model.model.language_model.requires_grad_(True)
            self.model.lm_head.requires_grad_(True)
        self.inputs = padded(samples)
        self.optimizer = adamw(self.model)

    def loss(self) -> Tensor:
        return self.model(**self.inputs, use_cache=False).loss


def adamw(model: torch.nn.Module) -> torch.optim.AdamW:
    # A rate of zero does all the work of a step and leaves the weights alone, so every round is the same.
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, weight_decay=0.0, fused=True)


def step(run) -> Tensor:
    loss = run.loss()
    loss.backward()
    run.optimizer.step()
    run.optimizer.zero_grad()
    return loss.detach()


@pytest.fixture(scope="module", params=[1, 2], ids=["stage1", "stage2"])
def runs(request, tmp_path_factory):
    samples = make_samples(SAMPLES[f"stage{request.param}"])
    folder = tmp_path_factory.mktemp("weights")
    pair = {"ours": Ours(request.param, samples, folder), "transformers": Transformers(request.param, samples, folder)}
    losses = {name: step(run) for name, run in pair.items()}
    torch.testing.assert_close(losses["ours"], losses["transformers"], rtol=1e-4, atol=0)
    return request.param, samples, pair


@pytest.mark.parametrize("impl", ["ours", "transformers"])
def test_training_step(benchmark, runs, impl):
    stage, samples, pair = runs
    benchmark.group = f"training step, stage {stage}"
    benchmark.pedantic(step, args=(pair[impl],), rounds=5, warmup_rounds=1)
    if benchmark.stats is None:
        return  # --benchmark-disable: the check above is all that was asked for
    seconds = benchmark.stats.stats.median
    supervised = sum(int((s.labels != IGNORE).sum()) for s in samples)
    tokens = sum(len(s.ids) for s in samples)
    benchmark.extra_info |= {
        "shape": f"{len(samples)} samples, {tokens} tokens, {supervised} supervised, decoder 512 x 6, vocabulary 32000",
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "tokens_per_s": tokens / seconds,
        "supervised_tokens_per_s": supervised / seconds,
    }
