"""The engine beside transformers' generate: one answer, 64 answers at once, the first token, a second question.

Both get the same weights, pictures and prompts; pictures are resized by the same code on both sides. transformers gets
what its users give it: ``generate`` with SDPA attention, and for many prompts one left-padded batch, which runs until
its longest answer is done. Greedy but where it says so, and the answers' lengths are fixed.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import DynamicCache, LlavaForConditionalGeneration

import llava_fast as lf
from llava_fast.checkpoint import save_model
from llava_fast.config import TextConfig, VisionConfig
from llava_fast.model.quantized import quantize
from llava_fast.processor import Tokenizer

TOKENIZER = Path(lf.__file__).parent / "train" / "tiny" / "decoder"
SHAPES = {
    "tiny": (lf.ModelConfig.preset("tiny"), torch.float32),
    "160M": (
        lf.ModelConfig(
            vision=VisionConfig(
                hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8, patch_size=32
            ),
            text=TextConfig(
                hidden_size=768,
                intermediate_size=2048,
                num_hidden_layers=12,
                num_attention_heads=12,
                num_key_value_heads=12,
                head_dim=64,
            ),
            projector="mlp2x_gelu",
            image_token_id=31_999,
        ),
        torch.bfloat16,
    ),
}
DECODED, BEHIND = 48, 600  # tokens of the answer whose speed is measured, and of the prompt before it


@dataclass
class Pair:
    name: str
    model: lf.Llava
    theirs: LlavaForConditionalGeneration
    processor: lf.Processor

    def engine(self, impl: str = "ours", background: bool = False) -> lf.Engine:
        """impl: "ours", or with the weights quantized "ours int8" and "ours int4". background: steps and pictures on
        threads of the engine's own, as by default."""
        config = lf.EngineConfig(kv_cache_bytes=1 << 30, max_sequences=64)
        model = self.model
        if impl.startswith("ours "):
            quantize(model := deepcopy(model), impl.removeprefix("ours "))
        return lf.Engine(model, self.processor, config, background=background)

    @torch.inference_mode()
    def generate(self, requests: list[lf.Request], cache: DynamicCache | None = None) -> list[list[int]]:
        """transformers' tokens for one left-padded batch. cache: of all but the last of a prompt's tokens; it grows."""
        ids = [self.expanded(request) for request in requests]
        longest, sampling = max(map(len, ids)), requests[0].sampling
        drawn = {"do_sample": not sampling.greedy}
        if not sampling.greedy:
            drawn |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        tokens = max(request.sampling.max_tokens for request in requests)
        pictures = [picture for request in requests for picture in request.images]
        seen = {"pixel_values": self.processor.image.stack(pictures).to(self.model.dtype)} if pictures else {}
        made = self.theirs.generate(
            input_ids=torch.tensor([[0] * (longest - len(row)) + row for row in ids]),
            attention_mask=torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids]),
            **seen,
            past_key_values=cache,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            **drawn,
            pad_token_id=0,
        )
        return [row[longest:].tolist() for row in made]

    @torch.inference_mode()
    def remembered(self, request: lf.Request) -> DynamicCache:
        """transformers' cache of all tokens of a prompt without pictures but the last."""
        cache = DynamicCache(config=self.theirs.config.text_config)
        self.theirs(input_ids=torch.tensor([self.expanded(request)[:-1]]), past_key_values=cache, use_cache=True)
        return cache

    def expanded(self, request: lf.Request) -> list[int]:
        image = self.processor.image_token_id
        rows = self.processor.tokens_per_image
        return [token for t in request.token_ids for token in ([image] * rows if t == image else [t])]


@pytest.fixture(scope="module", params=list(SHAPES))
def pair(request, tmp_path_factory):
    config, dtype = SHAPES[request.param]
    model = lf.Llava(config, dtype=dtype, seed=0).requires_grad_(False)
    with torch.no_grad():  # larger weights than usual: the likeliest token stands out
        for parameter in model.parameters():
            parameter.mul_(2)
    folder = tmp_path_factory.mktemp("weights")
    save_model(model, folder)
    theirs = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").eval()
    processor = lf.Processor.from_config(config, Tokenizer.load(TOKENIZER))
    made = Pair(request.param, model, theirs, processor)
    check(made)
    return made


def check(pair: Pair) -> None:
    """The same tokens in float32; in bfloat16 log-probabilities as near those of float32 as transformers' are."""
    request = ask(pair, 0, words=32, tokens=16)
    if pair.model.dtype == torch.float32:
        with pair.engine() as engine:
            assert engine.generate([request])[0].token_ids == pair.generate([request])[0]
        return
    scored = ask(pair, 0, words=32, tokens=1, prompt_logprobs=0)
    with pair.engine() as engine:
        found = engine.generate([scored])[0].prompt_logprobs
    ids = torch.tensor([pair.expanded(request)])
    pixels = pair.processor.image.stack(request.images)
    with torch.inference_mode():
        theirs = pair.theirs(input_ids=ids, pixel_values=pixels.to(pair.model.dtype)).logits[0].float().log_softmax(-1)
        exact = deepcopy(pair.theirs).float()(input_ids=ids, pixel_values=pixels).logits[0].log_softmax(-1)
    text = [(i - 1, score.token_id, score.logprob) for i, score in enumerate(found) if score is not None]
    ours_off = np.mean([abs(logprob - exact[i, token].item()) for i, token, logprob in text])
    theirs_off = np.mean([abs(theirs[i, token] - exact[i, token]).item() for i, token, _ in text])
    assert len(text) >= 32 and ours_off < 1.2 * theirs_off, (ours_off, theirs_off)


def ask(pair: Pair, seed: int, words: int, tokens: int, picture: int | None = 0, **sampling) -> lf.Request:
    """A prompt of ``words`` random tokens behind one picture, whose answer has exactly ``tokens`` tokens."""
    rng = np.random.default_rng(seed)
    text = rng.integers(10, 600, words).tolist()
    settings = lf.SamplingParams(max_tokens=tokens, ignore_eos=True, **sampling)
    if picture is None:
        return lf.Request(token_ids=[1, *text], sampling=settings)
    pixels = np.random.default_rng(1000 + picture).integers(0, 256, (240, 320, 3), dtype=np.uint8)
    return lf.Request(token_ids=[1, pair.processor.image_token_id, *text], images=[pixels], sampling=settings)


@pytest.mark.parametrize("impl", ["ours", "ours int8", "ours int4", "transformers"])
def test_decode(benchmark, pair, impl):
    benchmark.group = f"engine, {pair.name}: decode, batch 1"
    request = ask(pair, 1, words=8, tokens=DECODED if benchmark.enabled else 2, picture=None)
    run(benchmark, pair, impl, [request], rounds=5)


@pytest.mark.parametrize("impl", ["ours", "ours int8", "ours int4", "transformers"])
def test_decode_drawn(benchmark, pair, impl):
    """As chats do, tokens are drawn, not the likeliest."""
    benchmark.group = f"engine, {pair.name}: decode, batch 1, drawn at temperature 0.7 and top-p 0.9"
    drawn = {"temperature": 0.7, "top_p": 0.9}
    request = ask(pair, 1, words=8, tokens=DECODED if benchmark.enabled else 2, picture=None, **drawn)
    run(benchmark, pair, impl, [request], rounds=5)


@pytest.mark.parametrize("impl", ["ours", "ours int8", "ours int4", "transformers"])
def test_decode_behind_a_prompt(benchmark, pair, impl):
    """The prompt, as long as a picture of LLaVA-1.5 and a question, is in the cache on both sides."""
    words = BEHIND if benchmark.enabled else 20
    benchmark.group = f"engine, {pair.name}: decode, batch 1, behind {BEHIND} tokens"
    request = ask(pair, 1, words=words, tokens=DECODED if benchmark.enabled else 2, picture=None)
    cache = pair.remembered(request)
    assert pair.generate([request], deepcopy(cache)) == pair.generate([request])
    run(benchmark, pair, impl, [request], rounds=5, before=request, cache=cache)


@pytest.mark.parametrize("impl", ["ours", "transformers"])
def test_first_token(benchmark, pair, impl):
    benchmark.group = f"engine, {pair.name}: first token, one picture and 32 words"
    run(benchmark, pair, impl, [ask(pair, 2, words=32, tokens=1)], rounds=5)


@pytest.mark.parametrize("impl", ["ours", "transformers"])
def test_second_question(benchmark, pair, impl):
    benchmark.group = f"engine, {pair.name}: first token of a second question on the same picture"
    first, second = ask(pair, 2, words=32, tokens=1), ask(pair, 3, words=32, tokens=1)
    run(benchmark, pair, impl, [second], rounds=5, before=first)


@pytest.mark.parametrize("impl", ["ours", "ours int8", "ours int4", "transformers"])
def test_64_requests(benchmark, pair, impl):
    benchmark.group = f"engine, {pair.name}: 64 requests at once, one picture each"
    rng = np.random.default_rng(4)
    count, longest = (64, 64) if benchmark.enabled else (3, 4)
    lengths = [(int(rng.integers(8, 64)), int(rng.integers(1, longest + 1))) for _ in range(count)]
    requests = [ask(pair, 10 + i, words, tokens, picture=i) for i, (words, tokens) in enumerate(lengths)]
    run(benchmark, pair, impl, requests, rounds=3 if pair.name == "tiny" else 1)


def run(
    benchmark,
    pair: Pair,
    impl: str,
    requests: list[lf.Request],
    rounds: int,
    before: lf.Request | None = None,
    cache: DynamicCache | None = None,
) -> None:
    """Time one pass over ``requests`` with nothing remembered but ``before``, and by transformers ``cache``."""
    with pair.engine(impl, background=len(requests) > 1) as engine:
        copied = None

        def forget() -> None:
            nonlocal copied
            copied = deepcopy(cache)
            engine.clear_caches()
            if before is not None:
                engine.generate([before])

        ours, theirs = lambda: engine.generate(requests), lambda: pair.generate(requests, copied)
        work = theirs if impl == "transformers" else ours
        benchmark.pedantic(work, setup=forget, rounds=rounds, warmup_rounds=1)
    if benchmark.stats is None:
        return
    tokens = sum(request.sampling.max_tokens for request in requests)
    benchmark.extra_info |= {
        "shape": f"{pair.name}, {pair.model.dtype}, {len(requests)} requests, {tokens} tokens",
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "tokens_per_s": tokens / benchmark.stats.stats.median,
    }
