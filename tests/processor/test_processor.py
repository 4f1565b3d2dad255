"""Processor: expansion, truncation and packing against plain loops, and what it saves against transformers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from llava_fast.config import IGNORE, IMAGE_SENTINEL, ModelConfig, TextConfig, VisionConfig
from llava_fast.errors import ConfigError, ImageError, LlavaError, PromptTooLongError, SampleError, TokenizerError
from llava_fast.processor import ImageProcessor, Processor, Tokenizer
from llava_fast.processor.conversation import encode_conversation

PICTURES = [Image.new("RGB", (20, 30), color) for color in ("red", "green", "blue")]


@pytest.fixture
def tokenizer(tiny_model: Path) -> Tokenizer:
    return Tokenizer.load(tiny_model)


def make(tokenizer: Tokenizer, **changes: Any) -> Processor:
    options: dict[str, Any] = {"template": "v1", "image_token_id": 400, "tokens_per_image": 9}
    return Processor(tokenizer, ImageProcessor(12), **{**options, **changes})


def sample(*values: str, image: Any = None, sample_id: Any = "s1") -> dict[str, Any]:
    turns = [{"from": "gpt" if n % 2 else "human", "value": value} for n, value in enumerate(values)]
    return {"id": sample_id, "conversations": turns} | ({} if image is None else {"image": image})


TWO = ("<image>\nwhat is this?", "a cat", "and <image> this?", "two dogs")


@pytest.mark.parametrize("mask", ["answers", "official"])
@pytest.mark.parametrize("image_token_id", [400, IMAGE_SENTINEL])
@pytest.mark.parametrize("markers", [(None, None), (401, 402), (401, None)])
def test_expansion_and_shift(
    tokenizer: Tokenizer, mask: str, image_token_id: int, markers: tuple[int | None, int | None]
) -> None:
    start, end = markers
    processor = make(
        tokenizer, image_token_id=image_token_id, image_start_token_id=start, image_end_token_id=end, template="v0"
    )
    encoded = processor.encode(sample(*TWO, image=PICTURES[:2]), mask=mask)
    unexpanded = encode_conversation(sample(*TWO)["conversations"], tokenizer, "v0", mask=mask)
    ids, labels = [], []
    for token, label in zip(unexpanded.input_ids, unexpanded.labels, strict=True):
        block = [token]
        if token == IMAGE_SENTINEL:
            block = [i for i in (start, *[image_token_id] * 9, end) if i is not None]
        ids += block
        labels += [label] if token != IMAGE_SENTINEL else [IGNORE] * len(block)
    assert encoded.input_ids.tolist() == ids
    assert encoded.labels.tolist() == [*labels[1:], IGNORE]
    assert encoded.input_ids.dtype == encoded.labels.dtype == np.int64
    assert encoded.images == PICTURES[:2] and encoded.sample_id == "s1"


def test_first_caption_token_is_predicted_from_the_last_image_row(tokenizer: Tokenizer) -> None:
    encoded = make(tokenizer, template="plain").encode(sample("<image>\nwhat?", "a cat", image=PICTURES[0]))
    caption = tokenizer.encode("a cat\n", prefix=True)[0]
    assert encoded.input_ids.tolist() == [tokenizer.bos_id, *[400] * 9, *caption]
    assert encoded.labels.tolist() == [IGNORE] * 9 + [*caption, IGNORE]


def test_random_places_depend_on_seed_epoch_and_id_alone(tokenizer: Tokenizer) -> None:
    processor = make(tokenizer)

    def first(sample_id: Any, **options: Any) -> bool:
        one = sample("what?\n<image>", "a", image=PICTURES[0], sample_id=sample_id)
        ids = processor.encode(one, image_position="random", **options).input_ids.tolist()
        before = processor.encode(one, image_position="first").input_ids.tolist()
        after = processor.encode(one).input_ids.tolist()
        assert ids in (before, after) and before != after
        return ids == before

    base = [first(n) for n in range(200)]
    assert base == [first(str(n)) for n in range(200)] and 70 < sum(base) < 130
    for options in ({"seed": 1}, {"epoch": 1}):
        other = [first(n, **options) for n in range(200)]
        assert 60 < sum(a != b for a, b in zip(base, other, strict=True)) < 140
    code = (
        "from llava_fast.processor.processor import _sample_rng;"
        "print([_sample_rng(0, 0, str(n)).random() < 0.5 for n in range(200)])"
    )
    fresh = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert fresh.stdout.strip() == str(base)  # another process, where hash() of a text would differ


def test_truncation(tokenizer: Tokenizer) -> None:
    whole = make(tokenizer).encode(sample(*TWO, image=PICTURES[:2]))
    rows = np.flatnonzero(whole.input_ids == 400)
    first, second = rows[:9], rows[9:]
    learned = np.flatnonzero(whole.labels != IGNORE)
    kept, refused = set(), {}
    for limit in range(1, len(whole.input_ids) + 1):
        try:
            cut = make(tokenizer, max_length=limit).encode(sample(*TWO, image=PICTURES[:2]))
        except SampleError as error:
            refused[limit] = error.message
            continue
        kept.add(limit)
        assert cut.input_ids.tolist() == whole.input_ids[:limit].tolist()
        assert cut.labels.tolist() == [*whole.labels[: limit - 1].tolist(), IGNORE]
        assert len(cut.images) * 9 == np.count_nonzero(cut.input_ids == 400)
    inside = {limit for block in (first, second) for limit in range(block[0] + 1, block[-1] + 1)}
    assert {limit for limit, why in refused.items() if "inside an image" in why} == inside
    too_early = set(range(1, int(learned[0]) + 2))
    assert {limit for limit, why in refused.items() if "nothing to learn" in why} == too_early - inside
    assert len(whole.input_ids) in kept and kept.isdisjoint(inside | too_early)
    assert f"it has {len(whole.input_ids)} tokens, {int(first[0]) + 1} are kept" in refused[int(first[0]) + 1]


def test_markers_belong_to_the_image_when_cutting(tokenizer: Tokenizer) -> None:
    options = {"image_start_token_id": 401, "image_end_token_id": 402}
    whole = make(tokenizer, **options).encode(sample("what?", "a cat", "<image>", "b", image=PICTURES[0]))
    end = int(np.flatnonzero(whole.input_ids == 402)[0])
    with pytest.raises(SampleError, match="inside an image"):
        make(tokenizer, max_length=end, **options).encode(sample("what?", "a cat", "<image>", "b", image=PICTURES[0]))
    cut = make(tokenizer, max_length=end + 1, **options).encode(
        sample("what?", "a cat", "<image>", "b", image=PICTURES[0])
    )
    assert cut.input_ids[-1] == 402 and len(cut.images) == 1


def test_prompt(tokenizer: Tokenizer) -> None:
    processor = make(tokenizer)
    parts = [{"type": "image", "image": PICTURES[0]}, {"type": "text", "text": "what is this?"}]
    prompt = processor.prompt([{"role": "user", "content": parts}])
    training = processor.encode(sample("<image>\nwhat is this?", "a cat", image=PICTURES[0]))
    length = len(prompt.input_ids)
    assert prompt.input_ids.tolist() == training.input_ids[:length].tolist()
    assert set(prompt.labels.tolist()) == {IGNORE} and prompt.images == [PICTURES[0]]
    assert training.labels[length - 1] == training.input_ids[length]  # the prompt's last position predicts the answer
    assert processor.decode(training.input_ids[length:].tolist()) == "a cat"
    assert make(tokenizer, max_length=length).prompt([{"role": "user", "content": parts}]).input_ids.size == length
    with pytest.raises(LlavaError, match=f"has {length} tokens, 9 of them image rows, where {length - 1} fit"):
        make(tokenizer, max_length=length - 1).prompt([{"role": "user", "content": parts}])


def test_a_text_that_cannot_fit_is_not_tokenized(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = [tokenizer.decode([i], skip_special=False) for i in range(400)]
    assert tokenizer.longest_token >= max(map(len, pieces))
    processor = make(tokenizer, max_length=50)
    most = 50 * tokenizer.longest_token
    for texts in ((most,), (most - 10, 5, 5)):
        messages = [{"role": "assistant" if n % 2 else "user", "content": "x" * k} for n, k in enumerate(texts)]
        with pytest.raises(PromptTooLongError, match="tokens"):  # tokenized, and too many
            processor.prompt(messages)
        messages[0]["content"] = [{"type": "text", "text": messages[0]["content"]}, {"type": "text", "text": "x"}]
        with monkeypatch.context() as patch:
            patch.setattr(Tokenizer, "encode", None)
            with pytest.raises(PromptTooLongError, match=f"{most + 1} characters, and 50 tokens hold {most} at most"):
                processor.prompt(messages)


@pytest.mark.parametrize("content", [None, 1, [1], [{"type": "text", "text": 1}], [{"type": "text"}]])
def test_malformed_messages_are_refused_as_such(tokenizer: Tokenizer, content: Any) -> None:
    with pytest.raises(LlavaError, match="content"):
        make(tokenizer).prompt([{"role": "user", "content": content}])


def test_pack(tokenizer: Tokenizer) -> None:
    processor = make(tokenizer)
    samples = [
        sample(*TWO, image=PICTURES[:2], sample_id=7),
        sample("what?", "a", sample_id="text"),
        sample("what?", "a", image=PICTURES[2], sample_id="b"),
    ]
    batch = processor.pack(samples)
    alone = [processor.encode(one) for one in samples]
    assert batch.input_ids.tolist() == [i for one in alone for i in one.input_ids.tolist()]
    assert batch.labels.tolist() == [i for one in alone for i in one.labels.tolist()]
    assert batch.position_ids.tolist() == [i for one in alone for i in range(len(one.input_ids))]
    assert batch.cu_seqlens.diff().tolist() == [len(one.input_ids) for one in alone]
    assert batch.position_ids.dtype == batch.cu_seqlens.dtype == torch.int32
    assert batch.sample_ids == ("7", "text", "b") and batch.max_seqlen == max(batch.seqlens)
    assert torch.equal(batch.pixel_values, torch.stack([processor.image(picture) for picture in PICTURES]))
    assert batch.image_rows.tolist() == np.flatnonzero(batch.input_ids.numpy() == 400).tolist()
    assert len(batch.image_rows) == 27
    words = processor.pack(samples[1:2])
    assert words.pixel_values.shape == (0, 3, 12, 12) and words.num_images == 0


def test_errors_name_the_sample(tokenizer: Tokenizer, tmp_path: Path) -> None:
    processor = make(tokenizer)
    with pytest.raises(SampleError, match="sample 's1': 1 <image> marks but 2 images"):
        processor.encode(sample("<image>", "a", image=PICTURES[:2]))
    with pytest.raises(SampleError, match="'conversations' is None"):
        processor.encode({"id": 3})
    with pytest.raises(SampleError, match="surrogate"):
        processor.encode(sample("\ud83d", "a"))
    (tmp_path / "fake.jpg").write_text("no picture")
    with pytest.raises(ImageError, match=r"sample 'x9'.*fake\.jpg"):
        processor.pack([sample("<image>", "a", image=str(tmp_path / "fake.jpg"), sample_id="x9")])
    with pytest.raises(ConfigError, match="at least one"):
        processor.collate([])
    with pytest.raises(ConfigError, match="template='v7'"):
        make(tokenizer, template="v7")
    with pytest.raises(ConfigError, match="max_length=0"):
        make(tokenizer, max_length=0)
    clash = tokenizer.encode("a cat", prefix=True)[0][0]
    with pytest.raises(SampleError, match="contains image_token_id"):
        make(tokenizer, image_token_id=clash).encode(sample("a cat", "a cat"))


def test_from_config(tokenizer: Tokenizer) -> None:
    config = ModelConfig(
        vision=VisionConfig(image_size=48, patch_size=8),
        text=TextConfig(vocab_size=401, max_position_embeddings=1024),
        image_token_id=400,
        image_aspect="pad",
        select_feature="cls_patch",
        template="v0",
    )
    processor = Processor.from_config(config, tokenizer)
    assert (processor.tokens_per_image, processor.image.size, processor.image.aspect) == (37, 48, "pad")
    assert (processor.template, processor.max_length, processor.image_token_id) == ("v0", 1024, 400)
    with pytest.raises(TokenizerError, match="reach 401, but the model embeds 401 tokens"):
        Processor.from_config(config.replace(image_token_id=401), tokenizer)
    with pytest.raises(TokenizerError, match="reach 399, but the model embeds 256"):
        Processor.from_config(config.replace(text=TextConfig(vocab_size=256), image_token_id=-200), tokenizer)


@pytest.mark.parametrize(("rows", "aspect"), [(9, "square"), (10, "square"), (9, "pad")])
def test_transformers_reads_what_save_writes(
    tokenizer: Tokenizer, tmp_path: Path, rows: int, aspect: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    ours = Processor(tokenizer, ImageProcessor(12, aspect), template="v1", image_token_id=400, tokens_per_image=rows)
    ours.save(tmp_path)
    theirs = transformers.LlavaProcessor.from_pretrained(tmp_path)
    prompt = ours.prompt([{"role": "user", "content": [{"type": "image", "image": PICTURES[0]}]}])
    text = tokenizer.decode([i for i in prompt.input_ids.tolist() if i != 400])
    before = text.removesuffix(" ASSISTANT:")
    found = theirs(images=PICTURES[0], text=f"{before}<image> ASSISTANT:", return_tensors="pt")
    assert found.input_ids[0].tolist().count(400) == rows
    assert torch.allclose(found.pixel_values[0], ours.image(PICTURES[0]), atol=0.05)
