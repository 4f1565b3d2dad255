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
from llava_fast.data.scenes import FORMS, QUESTIONS, Scene, as_sample, scene_at, turns_for
from llava_fast.model import Llava
from llava_fast.model.decoder import DecoderLayer
from llava_fast.processor import ImageProcessor, Processor, Tokenizer
from llava_fast.processor.conversation import TEMPLATES

SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
UNK, BOS, EOS, PAD, IMAGE = range(5)
TWINS = 4  # scenes of a contrastive batch that differ in their forms alone
PLACES_BACK = (1, 2, 3)  # head by head: how far before its own word the decoder's first layer starts to look
SEED = 1_000_003  # of the pretraining scenes: neither the training set's nor the held-out set's


# ---- text --------------------------------------------------------------------------------------------------------


def describe(scene: Scene, rng: Random) -> str:
    """Everything about a scene in words, the shapes in any order.

    The colour stands on both sides of the form. A small decoder soon learns to look up what follows a word, and late or
    never what precedes it; so told, every look-up that a question needs goes forward.
    """
    shapes = rng.sample(scene.shapes, len(scene.shapes))
    return " ".join(f"{s.color} {s.form} {s.color} {s.size} {s.place}." for s in shapes)


def documents(seed: int) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """(description, turns) without end: a scene told in words, ten questions about it, and one longer request.

    The questions come first: what a longer answer has already said need not be looked up in the description.
    """
    index = 0
    while True:
        scene, rng = scene_at(seed, index)
        asked = rng.choices(tuple(QUESTIONS), [1 if kind == "count" else 3 for kind in QUESTIONS], k=10)
        turns = [QUESTIONS[kind](scene, rng) for kind in asked]
        yield describe(scene, rng), turns + turns_for(scene, rng.choice(("caption", "detail", "reasoning")), rng)
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
    look_up(model)
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


@torch.no_grad()
def look_up(model: Llava) -> None:
    """Start the decoder as a reader that finds a word again and copies what stands there.

    From plain random weights it learns to answer from a description only after many thousands of steps. In the manner
    of mimetic initialisation (Trockman and Kolter, 2023), queries equal keys, so that equal words attend to each other,
    values times output is near the identity, so that what is attended to is copied, and the head names a word by its
    own embedding. Some heads of the first layer attend to the words a few places before, as a constant part of every
    embedding lets them.
    """
    text, decoder = model.config.text, model.decoder
    heads, dim, size = text.num_attention_heads, text.hidden_size, text.head_dim
    assert text.num_key_value_heads == heads and heads * size == dim and model.lm_head is not None
    generator = torch.Generator().manual_seed(9)
    model.lm_head.weight.copy_(decoder.embed_tokens)
    constant = F.normalize(torch.randn(dim, generator=generator), dim=0)
    decoder.embed_tokens.add_(decoder.embed_tokens.std() * dim**0.5 * constant)
    for layer in decoder.layers:
        assert isinstance(layer, DecoderLayer)
        q, k, v = layer.qkv.weight.split(dim)
        q.copy_(k)
        v.copy_(torch.linalg.qr(torch.randn(dim, dim, generator=generator))[0])
        layer.out.weight.copy_(v.T)
    # In the three fastest rotary pairs keys are all equal, and queries the same, turned back by some positions. The
    # constant is half of an embedding's square, so its part after the norm is sqrt(dim / 2); scores peak at 3 * 5.
    first = decoder.layers[0]
    assert isinstance(first, DecoderLayer)
    q, k, _ = first.qkv.weight.split(dim)
    pairs, scale = 3, (5 * size**0.5) ** 0.5 / (dim / 2) ** 0.5
    for head, back in enumerate(PLACES_BACK):
        angle = back * decoder.inv_freq[:pairs]
        query, key = torch.zeros(size), torch.zeros(size)
        key[:pairs] = 1
        query[:pairs], query[size // 2 : size // 2 + pairs] = angle.cos(), -angle.sin()
        rows = slice(head * size, (head + 1) * size)
        q[rows], k[rows] = scale * torch.outer(query, constant), scale * torch.outer(key, constant)


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
    parser.add_argument("--vision-steps", type=int, default=1500)
    parser.add_argument("--decoder-steps", type=int, default=3000)
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
