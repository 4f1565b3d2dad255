"""One training step (forward, backward, clipping, AdamW) beside transformers' own, on the same samples and weights.

The samples have real lengths (benches/lengths.py): 16 captions in stage 1; 16 of ScienceQA's problems, half of them
without a picture, and GPT-4's conversations in stage 2. Sixteen is what the authors' scripts give a card.

Three shapes. ``vocabulary``: the real vocabulary of 32,000 on a decoder too small for it, so that the head weighs as
much as the layers. ``160M``: the same vocabulary on the decoder of the engine's benches, where the head is a quarter
of it; minutes a step on a CPU, so one round of ours and transformers' alone. ``proportions``: head, tower and layers in
the proportions of LLaVA-7B, where head and tower are a few percent of the work. ``no_packing``, ``no_rows`` and
``no_frozen`` are our step with one saving switched off, and ``none`` with all of them (benches/training.py). Read the
least time, not the mean: a busy machine only adds to it.
Where others use the machine too, count processor time on one thread, which is nearly the same whoever else runs:

    OMP_NUM_THREADS=1 python -m pytest benches/bench_training_step.py --benchmark-only \\
        --benchmark-timer=time.process_time --benchmark-columns=min,median,rounds
"""

from __future__ import annotations

import pytest
import torch
from transformers import LlavaForConditionalGeneration

import llava_fast as lf
from benches.lengths import of_stage
from benches.training import SAVINGS, Ours, Transformers, make_samples
from llava_fast.checkpoint import save_model
from llava_fast.config import IGNORE, TextConfig, VisionConfig

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
TOLERANCE = 2e-2 if DEVICE.type == "cuda" else 1e-4
SAMPLES = 16
TO_CHECK = 3  # when nothing is timed


def config_of(width: int, layers: int, vocabulary: int, tower_width: int, tower_layers: int) -> lf.ModelConfig:
    return lf.ModelConfig(
        vision=VisionConfig(
            hidden_size=tower_width,
            intermediate_size=4 * tower_width,
            num_hidden_layers=tower_layers,
            num_attention_heads=tower_width // 64,
        ),
        text=TextConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=width * 11008 // 4096 // 8 * 8,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            num_key_value_heads=width // 64,
            head_dim=64,
            rms_norm_eps=1e-5,
        ),
        projector="mlp2x_gelu",
        image_token_id=vocabulary - 1,
    )


SHAPES = {
    "vocabulary": config_of(256, 4, 32_000, 128, 4),
    "160M": config_of(768, 12, 32_000, 512, 8),
    "proportions": config_of(256, 8, 512, 64, 6),
}
IMPLS = {
    "ours": (),
    "no_packing": ("packing",),
    "no_rows": ("rows",),
    "no_frozen": ("frozen",),
    "none": SAVINGS,
    "transformers": None,
}


class Runs:
    """One stage at one shape. All sides give the same loss, which is checked as each is made."""

    def __init__(self, shape: str, stage: int, count: int, folder) -> None:
        self.shape, self.stage, self.folder = shape, stage, folder
        self.config = SHAPES[shape]
        self.samples = make_samples(self.config, of_stage(stage, count))
        save_model(self.model(), folder)
        self.expected = self.make("ours").step()

    def make(self, impl: str) -> Ours | Transformers:
        without = IMPLS[impl]
        if without is None:
            model = LlavaForConditionalGeneration.from_pretrained(self.folder, dtype=DTYPE, attn_implementation="sdpa")
            return Transformers(model, self.stage, [self.samples], DEVICE)
        return Ours(self.model(), self.stage, [self.samples], without)

    def model(self) -> lf.Llava:
        return lf.Llava(self.config, device=DEVICE, dtype=DTYPE, seed=0)


@pytest.fixture(
    scope="module",
    params=[(shape, stage) for shape in SHAPES for stage in (1, 2)],
    ids=lambda p: f"{p[0]}-stage{p[1]}",
)
def runs(request, tmp_path_factory):
    if request.config.getoption("benchmark_disable") and request.param[0] == "160M":
        pytest.skip("the other shapes check the same")
    count = TO_CHECK if request.config.getoption("benchmark_disable") else SAMPLES
    return Runs(*request.param, count, tmp_path_factory.mktemp("weights"))


@pytest.mark.parametrize("impl", IMPLS)
def test_training_step(benchmark, runs, impl):
    large = runs.shape == "160M" and DEVICE.type == "cpu"
    if large and impl not in ("ours", "transformers"):
        pytest.skip("minutes a step")
    run = runs.make(impl)
    torch.testing.assert_close(run.step(), runs.expected, rtol=TOLERANCE, atol=0)
    benchmark.group = f"training step, stage {runs.stage}, {runs.shape}"

    def step():
        run.step()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    if benchmark.disabled:
        benchmark(lambda: None)  # the check above is all that was asked for
        return
    benchmark.pedantic(step, rounds=1 if large else 3)
    seconds = benchmark.stats.stats.min
    tokens = sum(len(s.ids) for s in runs.samples)
    supervised = sum(int((s.labels != IGNORE).sum()) for s in runs.samples)
    text = runs.config.text
    benchmark.extra_info |= {
        "impl": impl,
        "shape": f"{len(runs.samples)} samples, {tokens} tokens, {supervised} supervised, the longest "
        f"{max(len(s.ids) for s in runs.samples)}; decoder {text.hidden_size} x {text.num_hidden_layers}, "
        f"vocabulary {text.vocab_size}",
        "device": str(DEVICE),
        "threads": torch.get_num_threads(),
        "tokens_per_s": tokens / seconds,
        "supervised_tokens_per_s": supervised / seconds,
    }
