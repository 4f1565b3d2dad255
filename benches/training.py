"""The two sides of a training benchmark: our step on packed samples, transformers' own on a padded batch.

transformers gets what its users give it: right-padded batches with an attention mask, the same parts frozen, SDPA
attention, gradients clipped, fused AdamW. Each of our savings can be switched off:

    packing     every sample is padded to the longest of its batch, as transformers has them, and computed in full
    rows        the last layer and the head run for all tokens, and the loss picks the supervised ones
    frozen      gradients are built for every weight, and those of frozen ones thrown away
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import llava_fast as lf
from benches.lengths import Row
from llava_fast.config import IGNORE
from llava_fast.train.optimizer import MasterAdamW
from llava_fast.train.stages import freeze, trained

SAVINGS = ("packing", "rows", "frozen")


@dataclass
class Sample:
    ids: Tensor  # (n,) image rows expanded
    labels: Tensor  # (n,) not shifted, IGNORE where nothing is learned
    pixels: Tensor  # (images, 3, H, W)


def make_samples(config: lf.ModelConfig, rows: list[Row], seed: int = 0) -> list[Sample]:
    """Random tokens and pixels of these lengths; the answer comes last."""
    generator = torch.Generator().manual_seed(seed)
    size = config.vision.image_size
    samples = []
    for prompt, supervised, images in rows:
        text = torch.randint(5, config.image_token_id, (prompt + supervised,), generator=generator)
        image = torch.full((images * config.tokens_per_image,), config.image_token_id)
        ids = torch.cat([text[:5], image, text[5:]])
        labels = ids.clone()
        labels[: len(ids) - supervised] = IGNORE
        samples.append(Sample(ids, labels, torch.randn(images, 3, size, size, generator=generator)))
    return samples


def packed(config: lf.ModelConfig, samples: list[Sample]) -> lf.PackedBatch:
    lengths = [len(s.ids) for s in samples]
    return lf.PackedBatch(
        input_ids=torch.cat([s.ids for s in samples]),
        labels=torch.cat([torch.cat([s.labels[1:], torch.tensor([IGNORE])]) for s in samples]),
        position_ids=torch.cat([torch.arange(n, dtype=torch.int32) for n in lengths]),
        cu_seqlens=torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32),
        pixel_values=torch.cat([s.pixels for s in samples]),
        image_token_id=config.image_token_id,
    )


def to_longest(samples: list[Sample]) -> list[Sample]:
    """Each sample padded on the right, with tokens that are not learned, to the longest of them."""
    longest = max(len(s.ids) for s in samples)
    return [
        Sample(
            F.pad(s.ids, (0, longest - len(s.ids)), value=0),
            F.pad(s.labels, (0, longest - len(s.ids)), value=IGNORE),
            s.pixels,
        )
        for s in samples
    ]


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
    """The step of :class:`llava_fast.train.trainer.Trainer` at a learning rate of zero, which does all of the work and
    leaves the weights alone, so that every round is the same.

    Args:
        model: on the device, in the dtype to compute in. What it trains is set here.
        stage: 1 or 2.
        bins: samples of each forward pass.
        without: savings that are switched off.
    """

    def __init__(self, model: lf.Llava, stage: int, bins: list[list[Sample]], without: tuple[str, ...] = ()) -> None:
        self.model, self.without = model, without
        freeze(model, stage)
        named = trained(model)
        if "packing" in without:
            bins = [to_longest(samples) for samples in bins]
        self.batches = [packed(model.config, samples).to(model.device, model.dtype) for samples in bins]
        self.supervised = sum(batch.num_supervised for batch in self.batches)
        self.optimizer = MasterAdamW(named, lr=1e-3)
        self.thrown_away = [p for p in model.parameters() if not p.requires_grad] if "frozen" in without else []

    def step(self) -> Tensor:
        for param in self.thrown_away:
            param.requires_grad_(True)
        total = torch.zeros((), device=self.model.device)
        for batch in self.batches:
            loss = self.loss(batch)
            loss.backward()
            total += loss.detach()
        self.optimizer.step(0.0)
        for param in self.thrown_away:
            param.requires_grad_(False)
            param.grad = None
        return total

    def loss(self, batch: lf.PackedBatch) -> Tensor:
        if "rows" not in self.without:
            return self.model.loss(batch, denominator=self.supervised)
        logits = self.model.logits(batch).float()  # (T, V)
        return F.cross_entropy(logits, batch.labels, ignore_index=IGNORE, reduction="sum") / self.supervised


class Transformers:
    """transformers' step: one padded batch after the other, then one update at a rate of zero, in the weights' dtype.

    Args:
        model: its LLaVA, in the dtype to compute in.
        stage, bins: as for :class:`Ours`.
        device: to compute on.
        checkpointing: whole layers are computed anew in the backward pass.
    """

    def __init__(
        self,
        model: Any,
        stage: int,
        bins: list[list[Sample]],
        device: torch.device,
        checkpointing: bool = False,
    ) -> None:
        self.model = model.to(device).train()
        self.model.requires_grad_(False)
        self.model.model.multi_modal_projector.requires_grad_(True)
        if stage == 2:
            self.model.model.language_model.requires_grad_(True)
            self.model.lm_head.requires_grad_(True)
        if checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.inputs = [{k: v.to(device) for k, v in padded(samples).items()} for samples in bins]
        self.supervised = sum(int((s.labels != IGNORE).sum()) for samples in bins for s in samples)
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.params, lr=0.0, weight_decay=0.0, fused=True)

    def step(self) -> Tensor:
        total = torch.zeros((), device=self.model.device)
        for inputs in self.inputs:
            # Of several batches the loss is the mean over the supervised tokens of all, as its Trainer has it.
            loss = self.model(**inputs, num_items_in_batch=self.supervised, use_cache=False).loss
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total


def with_image_token(config: lf.ModelConfig) -> lf.ModelConfig:
    """``config`` with the last id of the vocabulary at images: no random text holds it."""
    return config.replace(image_token_id=config.text.vocab_size - 1)
