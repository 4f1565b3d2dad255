"""Makes the pretrained parts of the tiny preset: what CLIP and Vicuna are to LLaVA, on the built-in scenes.

    python -m llava_fast.train.tiny FOLDER

The vision tower learns as CLIP does: pictures and their captions are drawn together by a contrastive loss, with a text
encoder that is thrown away. The decoder learns as Vicuna does, to answer in text alone: descriptions in words,
followed by questions and answers about them. Neither has ever seen the other; joining them is the work of the two
stages. The results are a CLIP directory and a LLaMA directory, which ship with the package (llava_fast/train/tiny/).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

import tokenizers
import torch
import torch.nn.functional as F
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from tqdm import tqdm

from llava_fast.checkpoint import save_clip, save_llama
from llava_fast.config import ModelConfig
from llava_fast.data.scenes import FORMS, KINDS, Scene, as_sample, scene_at, turns_for
from llava_fast.model import Llava
from llava_fast.processor import ImageProcessor, Processor, Tokenizer
from llava_fast.processor.conversation import TEMPLATES

SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
UNK, BOS, EOS, PAD, IMAGE = range(5)
TWINS = 4  # scenes of a contrastive batch that differ in their forms alone
SEED = 1_000_003  # of the pretraining scenes: neither the training set's nor the held-out set's


# ---- text --------------------------------------------------------------------------------------------------------


def describe(scene: Scene, rng: Random) -> str:
    """Everything about a scene in words, the shapes in any order."""
    shapes = rng.sample(scene.shapes, len(scene.shapes))
    return " ".join(f"A {s.size} {s.name} at the {s.place}." for s in shapes)


def documents(seed: int) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """(description, turns) without end: a scene told in words, and every kind of instruction data about it."""
    index = 0
    while True:
        scene, rng = scene_at(seed, index)
        turns = [turn for kind in KINDS for turn in turns_for(scene, kind, rng)]
        yield describe(scene, rng), rng.sample(turns, len(turns))
        index += 1


def train_tokenizer(vocab_size: int) -> tokenizers.Tokenizer:
    """Byte-level BPE over the data set's own texts: any text can be encoded, its own words are mostly one token."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    source = documents(SEED)
    texts = []
    for _ in range(2000):
        description, turns = next(source)
        texts.append(" ".join([TEMPLATES["v1"].system, description, *(f"USER: {q} ASSISTANT: {a}" for q, a in turns)]))
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


# ---- decoder -----------------------------------------------------------------------------------------------------


def pretrain_decoder(config: ModelConfig, tokenizer: Tokenizer, steps: int) -> Llava:
    """Instruction tuning on text alone: questions and answers about scenes described in words."""
    model = Llava(config, seed=1)
    enlarge(model.decoder)
    processor = Processor.from_config(config, tokenizer)
    source = documents(SEED)
    parts = [p for name, p in model.named_parameters() if name.startswith(("decoder.", "lm_head."))]

    def loss() -> Tensor:
        return model.loss(processor.pack([as_text(*next(source)) for _ in range(12)]))

    fit("decoder", parts, loss, steps, lr=2e-3)
    return model


@torch.no_grad()
def enlarge(module: nn.Module) -> None:
    """A narrow model learns sooner from larger weights than N(0, 0.02)."""
    for weight in module.parameters():
        if weight.dim() > 1:
            weight.mul_(4)


def as_text(description: str, turns: list[tuple[str, str]]) -> dict:
    """A sample without an image: the description stands before the first question."""
    sample = as_sample("", None, [(f"{description}\n{turns[0][0]}", turns[0][1]), *turns[1:]])
    sample["conversations"][0]["value"] = sample["conversations"][0]["value"].removeprefix("<image>\n")
    return sample


# ---- vision tower ------------------------------------------------------------------------------------------------


class CaptionEncoder(nn.Module):
    """The text half of the contrastive pair; used here only."""

    def __init__(self, vocab_size: int, dim: int, length: int):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, dim)
        self.position = nn.Parameter(torch.randn(length, dim) * 0.02)
        layer = nn.TransformerEncoderLayer(dim, 4, 2 * dim, 0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.out = nn.Linear(dim, dim)

    def forward(self, ids: Tensor) -> Tensor:  # (B, n), padded with PAD
        real = ids != PAD
        x = self.layers(self.embed(ids) + self.position[: ids.shape[1]], src_key_padding_mask=~real)
        return self.out((x * real.unsqueeze(-1)).sum(1) / real.sum(1, keepdim=True))


def pretrain_vision(config: ModelConfig, tokenizer: Tokenizer, steps: int, pool: int, batch_size: int = 192) -> Llava:
    """CLIP's symmetric contrastive loss between the class token of the last layer and the caption.

    A batch holds groups of scenes that differ in their forms alone, as hard negatives.
    """
    model = Llava(config, seed=2)
    tower, dim = model.vision_tower, config.vision.hidden_size
    enlarge(tower)
    torch.nn.init.normal_(tower.position_embedding, std=0.5, generator=torch.Generator().manual_seed(5))
    tower.layers_run = config.vision.num_hidden_layers  # the class token is read after the last layer
    tower.keep_class_token = True
    process = ImageProcessor(config.vision.image_size, "square")
    pixels, captions = [], []
    for index in tqdm(range(pool), desc="scenes", unit="scene"):
        scene, rng = scene_at(SEED, index // TWINS)
        scene = with_other_forms(scene, rng) if index % TWINS else scene
        pixels.append(process(scene.image()).half())
        captions.append(torch.tensor(tokenizer.encode(describe(scene, rng), prefix=False)[0]))
    images = torch.stack(pixels)
    texts = nn.utils.rnn.pad_sequence(captions, batch_first=True, padding_value=PAD)
    torch.manual_seed(3)
    text_encoder = CaptionEncoder(config.text.vocab_size, dim, texts.shape[1])
    to_shared = nn.Linear(dim, dim, bias=False)
    scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
    parts = [*tower.parameters(), *text_encoder.parameters(), *to_shared.parameters(), scale]
    generator = torch.Generator().manual_seed(4)

    def loss() -> Tensor:
        groups = torch.randperm(pool // TWINS, generator=generator)[: batch_size // TWINS]
        rows = (groups.unsqueeze(1) * TWINS + torch.arange(TWINS)).flatten()
        seen = F.normalize(to_shared(tower.post_norm(tower(images[rows].float())[:, 0])), dim=-1)
        told = F.normalize(text_encoder(texts[rows]), dim=-1)
        scores = seen @ told.T * scale.clamp(max=math.log(100)).exp()
        match = torch.arange(batch_size)
        return (F.cross_entropy(scores, match) + F.cross_entropy(scores.T, match)) / 2

    fit("vision tower", parts, loss, steps, lr=1e-3)
    return model


def with_other_forms(scene: Scene, rng: Random) -> Scene:
    """The scene with its forms drawn anew: colours and places alone then no longer tell it from its twins."""
    forms = rng.sample(FORMS, len(scene.shapes))
    shapes = tuple(replace(shape, form=form) for shape, form in zip(scene.shapes, forms, strict=True))
    return Scene(shapes, scene.background)


def fit(name: str, parts: list[nn.Parameter], loss_of_batch, steps: int, lr: float) -> None:
    """Adam with warm-up and cosine decay."""
    optimizer = torch.optim.AdamW(parts, lr=lr, weight_decay=0.01, betas=(0.9, 0.98), fused=True)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * i / steps))
    )
    bar = tqdm(range(steps), desc=name, unit="step", mininterval=5)
    for _ in bar:
        loss = loss_of_batch()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parts, 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m llava_fast.train.tiny", description="Make the pretrained parts of the tiny preset."
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--vision-steps", type=int, default=500)
    parser.add_argument("--decoder-steps", type=int, default=2500)
    parser.add_argument("--pool", type=int, default=30_000, help="scenes that the vision tower learns from")
    parser.add_argument("--part", choices=("all", "vision", "decoder"), default="all")
    args = parser.parse_args()
    config = ModelConfig.preset("tiny")
    write_tokenizer(train_tokenizer(config.text.vocab_size), args.folder / "decoder")
    tokenizer = Tokenizer.load(args.folder / "decoder")
    if args.part in ("all", "vision"):
        model = pretrain_vision(config, tokenizer, args.vision_steps, args.pool).half()
        save_clip(model, args.folder / "vision")
    if args.part in ("all", "decoder"):
        model = pretrain_decoder(config, tokenizer, args.decoder_steps).half()
        save_llama(model, args.folder / "decoder")


def write_tokenizer(tokenizer: tokenizers.Tokenizer, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = dict(zip(("unk_token", "bos_token", "eos_token", "pad_token"), SPECIAL, strict=False))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "legacy": False, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main()
