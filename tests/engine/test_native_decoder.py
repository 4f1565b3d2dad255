"""Decoding through the C library beside decoding with torch."""

import os.path
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import llava_fast as lf
from llava_fast.config import ModelConfig
from llava_fast.engine.native_decoder import NativeDecoder
from llava_fast.model.quantized import quantize
from llava_fast.processor import Processor, Tokenizer
from llava_kernels import implementation, library

pytestmark = pytest.mark.skipif(library.load() is None, reason="libllava_kernels was not built")
TOKENIZER = Path(lf.__file__).parent / "train" / "tiny" / "decoder"


def model(dtype: torch.dtype = torch.float32, kv_heads: int = 2) -> lf.Llava:
    preset = ModelConfig.preset("tiny")
    config = ModelConfig(
        vision=preset.vision,
        text=type(preset.text)(**{**vars(preset.text), "num_key_value_heads": kv_heads}),
        image_token_id=preset.image_token_id,
    )
    made = lf.Llava(config, dtype=dtype, seed=0).requires_grad_(False)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(2)
    return made


def answers(made: lf.Llava, choice: str, scored: bool = True, **budgets) -> list[lf.Completion]:
    """Mixed lengths, with and without a picture, in a cache that is too small for all of them at once. scored: prompts
    too, for which all of their tokens go through the last layer."""
    rng, requests = np.random.default_rng(0), []
    for i in range(12):
        words = [
            1,
            *([made.config.image_token_id] * (i % 2)),
            *rng.integers(10, 600, int(rng.integers(1, 150))).tolist(),
        ]
        picture = [rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)] * (i % 2)
        wanted = 0 if scored else None
        sampling = lf.SamplingParams(max_tokens=int(rng.integers(1, 30)), ignore_eos=True, prompt_logprobs=wanted)
        requests.append(lf.Request(token_ids=words, images=picture, sampling=sampling))
    processor = Processor.from_config(made.config, Tokenizer.load(TOKENIZER))
    config = lf.EngineConfig(**{"kv_cache_bytes": 1 << 20, "max_sequences": 8, "max_step_tokens": 100, **budgets})
    with implementation(choice), lf.Engine(made, processor, config, background=False) as engine:
        assert isinstance(engine._runner.host_decoder, NativeDecoder) == (choice == "native")
        return engine.generate(requests)


@pytest.mark.parametrize("scored", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_the_same_tokens_in_float32(kv_heads, scored):
    made = model(kv_heads=kv_heads)
    ours, theirs = answers(made, "native", scored), answers(made, "reference")
    assert [c.token_ids for c in ours] == [c.token_ids for c in theirs]


def scores(completions: list[lf.Completion]) -> np.ndarray:
    return np.array([s.logprob for c in completions for s in c.prompt_logprobs if s is not None])


def test_bfloat16_is_no_further_from_float32_than_torch():
    made = model(torch.bfloat16)
    wide = model(torch.bfloat16).float()
    exact = scores(answers(wide, "reference"))
    ours, torchs = scores(answers(made, "native")), scores(answers(made, "reference"))
    assert np.abs(ours - exact).mean() <= np.abs(torchs - exact).mean()


def native(made: lf.Llava, **budgets) -> NativeDecoder:
    processor = Processor.from_config(made.config, Tokenizer.load(TOKENIZER))
    config = lf.EngineConfig(kv_cache_bytes=1 << 20, **budgets)
    decoder = lf.Engine(made, processor, config, background=False)._runner.host_decoder
    assert isinstance(decoder, NativeDecoder)
    return decoder


def test_compact_weights_give_the_same_tokens():
    """One answer at a time: more than two rows meet the weights themselves. Sums differ in their order, so that nearly
    equal logits may change places."""
    made = model(torch.bfloat16)
    ours, plain = (
        [c.token_ids for c in answers(made, "native", max_sequences=1, compact_weights=on)] for on in (True, False)
    )
    alike = sum(len(os.path.commonprefix([a, b])) for a, b in zip(ours, plain, strict=True))
    assert alike >= 0.9 * sum(map(len, plain))


def test_weights_are_compact_in_bfloat16_where_there_is_memory(monkeypatch):
    made = model(torch.bfloat16)
    reads_them = library.Handle().instructions != "portable"
    products = (4 * made.config.text.num_hidden_layers + 1) * reads_them
    assert len(native(made).compact) == products
    assert native(made, compact_weights=False).compact == []
    monkeypatch.setattr("llava_fast.engine.native_decoder.free_bytes", lambda device: 1 << 20)
    assert native(made).compact == []
    assert len(native(made, compact_weights=True).compact) == products
    assert native(model(), compact_weights=True).compact == []  # float32
    quantize(made, "int4")  # of which only the head is left: little to be won
    assert native(made, compact_weights=True).compact == []


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantized_weights_give_what_torch_gives_with_them(kind):
    made = model()
    quantize(made, kind)
    ours, theirs = scores(answers(made, "native")), scores(answers(made, "reference"))
    np.testing.assert_allclose(ours, theirs, atol=5e-3)  # activations of 16 bits


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_activations_of_eight_bits_move_less_than_the_weights_do(kind):
    """In bfloat16 they are the default, in float32 they must be asked for; without VNNI only int4 has such products."""
    exact = scores(answers(model(), "native"))
    made = model()
    quantize(made, kind)
    precise = scores(answers(made, "native"))
    rounded = scores(answers(made, "native", activation_bits=8))
    assert np.abs(rounded - precise).mean() < np.abs(precise - exact).mean()
    with_them = ("avxvnni", "avx512vnni", "avx512bf16") + (("avx2", "avx512", "amx") if kind == "int4" else ())
    has_them = library.Handle().instructions in with_them
    assert (np.abs(rounded - precise).max() > 1e-6) == has_them
    half = made.to(torch.bfloat16)
    default = scores(answers(half, "native"))
    np.testing.assert_array_equal(default, scores(answers(half, "native", activation_bits=8)))
    assert (np.abs(default - scores(answers(half, "native", activation_bits=16))).max() > 1e-6) == has_them


def test_other_activation_bits_are_refused():
    with pytest.raises(lf.errors.ConfigError, match="activation_bits=4 must be 8 or 16"):
        lf.EngineConfig(activation_bits=4)


def test_a_first_answer_imports_no_compiler():
    """torch's way to a custom op, and its shapes of tensors on the meta device, import these: seconds of each start."""
    program = f"""
import os, sys
os.environ.pop("TRITON_INTERPRET", None)
import llava_fast as lf, numpy as np, torch
picture = {{"type": "image", "image": np.zeros((40, 60, 3), np.uint8)}}
for kind in (None, "int8", "int4"):
    model, processor = lf.load({str(Path(lf.__file__).parent / "built_in")!r}, dtype=torch.float32, quantization=kind)
    engine = lf.Engine(model, processor, background=False)
    for temperature in (0.0, 0.7):
        content = [picture, {{"type": "text", "text": f"{{temperature}}?"}}]  # none goes on where another's cache ends
        sampling = lf.SamplingParams(temperature=temperature, max_tokens=3)
        (answer,) = engine.generate([lf.Request(messages=[{{"role": "user", "content": content}}], sampling=sampling)])
        assert answer.error is None and answer.token_ids
print(sorted({{"sympy", "torch._dynamo", "transformers"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
