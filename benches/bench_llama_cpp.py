"""One answer of the engine beside llama.cpp on CPUs: text alone, random weights of bench_engine's 160M-class decoder.

The same weights on both sides: bfloat16 beside BF16, int8 beside Q8_0, int4 beside Q4_0 (blocks of 32 where ours are
groups of 128; the head stays bfloat16 on both sides, as our int4 leaves it). It needs llama-cpp-python and gguf, which
are no dependencies of this package: ``pip install llama-cpp-python gguf``.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import llava_fast as lf
from benches.bench_engine import SHAPES, TOKENIZER
from llava_fast.model.quantized import quantize
from llava_fast.processor import Tokenizer
from llava_kernels import library

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed", exc_type=ImportError)
gguf = pytest.importorskip("gguf", reason="gguf is not installed")
pytestmark = pytest.mark.skipif(library.load() is None, reason="libllava_kernels was not built")
KINDS = {"bfloat16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}  # ours and the type in the file
PROMPT, DECODED = 9, 64  # tokens


@pytest.fixture(scope="module", params=list(KINDS))
def sides(request, tmp_path_factory):
    """Ours as (prompt -> tokens), theirs as (prompt -> tokens), and the kind."""
    config = SHAPES["160M"][0]
    model = lf.Llava(config, dtype=torch.bfloat16, seed=0).requires_grad_(False)
    path = tmp_path_factory.mktemp("gguf") / "decoder.gguf"
    write_gguf(model, KINDS[request.param], path)
    if request.param != "bfloat16":
        quantize(model, request.param)
    processor = lf.Processor.from_config(config, Tokenizer.load(TOKENIZER))
    engine_config = lf.EngineConfig(kv_cache_bytes=1 << 28, max_sequences=1)
    threads = torch.get_num_threads()
    theirs = llama_cpp.Llama(str(path), n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False)
    with lf.Engine(model, processor, engine_config, background=False) as engine:

        def ours(prompt: list[int], tokens: int) -> list[int]:
            engine.clear_caches()
            settings = lf.SamplingParams(max_tokens=tokens, ignore_eos=True)
            return engine.generate([lf.Request(token_ids=prompt, sampling=settings)])[0].token_ids

        def llama(prompt: list[int], tokens: int) -> list[int]:
            theirs.reset()
            made, given = [], prompt
            for _ in range(tokens):
                theirs.eval(given)
                logits = np.ctypeslib.as_array(theirs._ctx.get_logits_ith(-1), shape=(config.text.vocab_size,))
                made.append(int(logits.argmax()))
                given = made[-1:]
            return made

        yield request.param, {"ours": ours, "llama.cpp": llama}
    theirs.close()


@pytest.mark.parametrize("impl", ["ours", "llama.cpp"])
def test_decode(benchmark, sides, impl):
    kind, runs = sides
    benchmark.group = f"decode beside llama.cpp, 160M, batch 1, {kind}"
    prompt = [1, *np.random.default_rng(0).integers(10, 600, PROMPT - 1).tolist()]
    if kind == "bfloat16":  # the others round differently
        assert runs["ours"](prompt, 1) == runs["llama.cpp"](prompt, 1)
    tokens = DECODED if benchmark.enabled else 2
    benchmark.pedantic(lambda: runs[impl](prompt, tokens), rounds=7, warmup_rounds=1)
    if benchmark.stats is None:
        return
    benchmark.extra_info |= {
        "shape": f"160M, {kind}, {PROMPT} + {DECODED} tokens",
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "tokens_per_s": DECODED / benchmark.stats.stats.median,
    }


def write_gguf(model: lf.Llava, kind: str, path) -> None:
    """The decoder as llama.cpp reads it; its vocabulary is made up, for nothing is tokenized."""
    text, decoder = model.config.text, model.decoder
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(text.max_position_embeddings)
    writer.add_embedding_length(text.hidden_size)
    writer.add_block_count(text.num_hidden_layers)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv(text.num_key_value_heads)
    writer.add_rope_dimension_count(text.head_dim)
    writer.add_rope_freq_base(text.rope_theta)
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    writer.add_vocab_size(text.vocab_size)
    byte_tokens = [f"<0x{i:02X}>" for i in range(256)]
    others = [f"token{i}" for i in range(text.vocab_size - 259)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *byte_tokens, *others])
    writer.add_token_scores([0.0] * text.vocab_size)
    kinds = gguf.TokenType
    writer.add_token_types(
        [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL] + [kinds.BYTE] * 256 + [kinds.NORMAL] * len(others)
    )

    def put(name: str, weight: torch.Tensor, as_type: str) -> None:
        values = weight.detach().float().numpy()
        wanted = gguf.GGMLQuantizationType[as_type]
        writer.add_tensor(name, gguf.quants.quantize(values, wanted), raw_dtype=wanted)

    def paired(weight: torch.Tensor, heads: int) -> torch.Tensor:
        """llama.cpp turns neighbours where we turn halves."""
        halves = weight.view(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
        return halves.transpose(1, 2).reshape(weight.shape)

    put("token_embd.weight", decoder.embed_tokens, "BF16")
    put("output_norm.weight", decoder.norm.weight, "F32")
    assert model.lm_head is not None
    put("output.weight", model.lm_head.weight, "BF16" if kind == "Q4_0" else kind)
    rows, kv_rows = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    for i, layer in enumerate(decoder.layers):
        q, k, v = layer.qkv.weight.split([rows, kv_rows, kv_rows])
        gate, up = layer.gate_up.weight.chunk(2)
        put(f"blk.{i}.attn_norm.weight", layer.attention_norm.weight, "F32")
        put(f"blk.{i}.ffn_norm.weight", layer.mlp_norm.weight, "F32")
        put(f"blk.{i}.attn_q.weight", paired(q, text.num_attention_heads), kind)
        put(f"blk.{i}.attn_k.weight", paired(k, text.num_key_value_heads), kind)
        put(f"blk.{i}.attn_v.weight", v, kind)
        put(f"blk.{i}.attn_output.weight", layer.out.weight, kind)
        put(f"blk.{i}.ffn_gate.weight", gate, kind)
        put(f"blk.{i}.ffn_up.weight", up, kind)
        put(f"blk.{i}.ffn_down.weight", layer.down.weight, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
