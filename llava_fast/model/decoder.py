"""The LLaMA decoder on packed tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from llava_fast.config import TextConfig
from llava_fast.model.linear import Linear
from llava_kernels import add_rms_norm, rms_norm, rope, swiglu

# How a layer attends: (layer, qkv (T, heads + 2 kv_heads, head_dim), cos, sin (T, head_dim/2)) -> (T, heads, head_dim).
# The decoder does not know whether keys lie in the batch or in a cache; who calls it does, and may turn and store them
# in one go.
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]

PRODUCTS = ("aten.mm.", "aten.addmm.", "aten.bmm.", "aten._scaled_mm.", "aten.linear.", "llava_kernels.frozen_linear.")


def turned(qkv: Tensor, cos: Tensor, sin: Tensor, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """The merged product as q (T, heads, head_dim), k and v (T, kv_heads, head_dim), q and k at their positions."""
    heads = qkv.shape[1] - 2 * kv_heads
    qk, v = qkv.split((heads + kv_heads, kv_heads), dim=1)
    q, k = rope(qk, cos, sin).split((heads, kv_heads), dim=1)
    return q, k, v


def projections(config: TextConfig) -> dict[str, dict[str, slice]]:
    """For each of a layer's products the rows of its weight that belong to each of LLaMA's, by LLaMA's names."""
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    inner = config.intermediate_size
    return {
        "qkv": {"q_proj": slice(0, q), "k_proj": slice(q, q + kv), "v_proj": slice(q + kv, q + 2 * kv)},
        "out": {"o_proj": slice(0, config.hidden_size)},
        "gate_up": {"gate_proj": slice(0, inner), "up_proj": slice(inner, 2 * inner)},
        "down": {"down_proj": slice(0, config.hidden_size)},
    }


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def after_adding(self, x: Tensor, update: Tensor | None) -> tuple[Tensor, Tensor]:
        """(norm of x + update, x + update); without an update, of x itself."""
        if update is None:
            return self(x), x
        return add_rms_norm(update, x, self.weight, self.eps)


class DecoderLayer(nn.Module):
    """Pre-norm layer with merged QKV and gate/up weights, grouped-query heads, no biases."""

    def __init__(self, config: TextConfig, index: int, dtype: torch.dtype, device: torch.device):
        super().__init__()
        kw: Any = {"bias": False, "dtype": dtype, "device": device}
        self.index = index
        self.head_dim = config.head_dim
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        dim, inner = config.hidden_size, config.intermediate_size
        self.attention_norm = RMSNorm(dim, config.rms_norm_eps, dtype, device)
        self.qkv = Linear(dim, (heads + 2 * kv_heads) * self.head_dim, **kw)
        self.out = Linear(heads * self.head_dim, dim, **kw)
        self.mlp_norm = RMSNorm(dim, config.rms_norm_eps, dtype, device)
        self.gate_up = Linear(dim, 2 * inner, **kw)
        self.down = Linear(inner, dim, **kw)

    def forward(
        self,
        x: Tensor,
        update: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        attend: Attend,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x, update: (T, D), the residual stream and what the layer before adds to it. The same two are returned.

        An addition is left to the norm that follows it: one pass over the stream instead of two. With ``rows`` (L,)
        integer, every token is attended to, but what follows attention is computed and returned for these rows alone.
        """
        h, x = self.attention_norm.after_adding(x, update)
        qkv = self.qkv(h).unflatten(-1, (-1, self.head_dim))  # (T, heads + 2 kv_heads, head_dim)
        attended = self.attended(attend, qkv, cos, sin).flatten(1)
        if rows is not None:
            attended, x = attended.index_select(0, rows), x.index_select(0, rows)
        h, x = self.mlp_norm.after_adding(x, self.out(attended))
        return x, self.down(swiglu(self.gate_up(h)))

    def attended(self, attend: Attend, qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return attend(self.index, qkv, cos, sin)


class Decoder(nn.Module):
    """Token embeddings, layers and final norm; the output head belongs to :class:`Llava`."""

    inv_freq: Tensor  # (head_dim/2,) float32

    def __init__(self, config: TextConfig, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.config = config
        self.checkpoint_activations = "none"  # what the backward pass computes anew instead of keeping it: see below
        self.embed_tokens = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size, dtype=dtype, device=device))
        self.layers = nn.ModuleList(DecoderLayer(config, i, dtype, device) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, device)
        self.register_buffer("inv_freq", torch.empty(config.head_dim // 2, device=device), persistent=False)
        self.rope_scale = 1.0  # yarn multiplies cosines and sines by this

    def compile_layers(self) -> None:
        """Compile the layers, for any number of tokens. Attention, which depends on the batch's lengths, is left out.

        All layers share the compiled code, so what is left out is left out of the class and not of each layer.
        """
        if not hasattr(DecoderLayer.attended, "_torchdynamo_disable"):
            DecoderLayer.attended = torch.compiler.disable(DecoderLayer.attended)  # type: ignore[method-assign]
        for layer in self.layers:
            layer.compile(dynamic=True)

    def reset_rope(self) -> None:
        """Work out the rotary frequencies; called once the module has left the meta device."""
        inv_freq, self.rope_scale = rope_frequencies(self.config)
        self.inv_freq.copy_(inv_freq)

    def angles(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """position_ids: (T,) -> cosines and sines, (T, head_dim/2) float32 each."""
        freqs = position_ids.float().unsqueeze(1) * self.inv_freq
        return freqs.cos() * self.rope_scale, freqs.sin() * self.rope_scale

    def forward(self, x: Tensor, position_ids: Tensor, attend: Attend, rows: Tensor | None = None) -> Tensor:
        """x: (T, D) embeddings -> (T, D) hidden states before the final norm; (L, D) of ``rows`` (L,) when given.

        ``checkpoint_activations`` says what of a layer is kept for the backward pass: "none" is checkpointed, all is
        kept; "selective" keeps the products' and attention's results and computes norms, rotation and SwiGLU anew;
        "full" keeps the layer's input alone.
        """
        cos, sin = self.angles(position_ids)
        run = self._run_layer if torch.is_grad_enabled() else _run
        update = None
        *layers, last = self.layers
        for layer in layers:
            x, update = run(layer, x, update, cos, sin, attend)
        x, update = run(last, x, update, cos, sin, attend, rows)
        return x + update

    def _run_layer(self, layer: nn.Module, *inputs: Any) -> tuple[Tensor, Tensor]:
        if self.checkpoint_activations == "none":
            return layer(*inputs)
        selective: Any = {"context_fn": _keep_products} if self.checkpoint_activations == "selective" else {}
        return checkpoint(layer, *inputs, use_reentrant=False, **selective)


def _run(layer: nn.Module, *inputs: Any) -> tuple[Tensor, Tensor]:
    return layer(*inputs)


def _keep_products() -> Any:
    """The two contexts of selective checkpointing: the results of matrix products and of attention are kept."""
    return create_selective_checkpoint_contexts(_keep_or_recompute)


def _keep_or_recompute(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = str(op)
    dear = name.startswith(PRODUCTS) or "attention" in name or "attn" in name
    return CheckpointPolicy.MUST_SAVE if dear else CheckpointPolicy.PREFER_RECOMPUTE


def rope_frequencies(config: TextConfig) -> tuple[Tensor, float]:
    """Inverse frequencies (head_dim/2,) float32 and the factor on cosines and sines, with the config's scaling.

    Types: default; linear (position interpolation, Chen et al. 2023); llama3 (Llama 3.1's smooth split by wavelength);
    yarn (Peng et al. 2023).
    """
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    inv_freq = 1.0 / config.rope_theta**half
    scaling = config.rope_scaling or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "linear":
        return inv_freq / scaling["factor"], 1.0
    if kind == "llama3":
        return _llama3(inv_freq, scaling), 1.0
    if kind == "yarn":
        return _yarn(inv_freq, config, scaling)
    return inv_freq, 1.0


def _llama3(inv_freq: Tensor, scaling: dict) -> Tensor:
    context = scaling["original_max_position_embeddings"]
    low, high, factor = scaling["low_freq_factor"], scaling["high_freq_factor"], scaling["factor"]
    turns = context * inv_freq / (2 * math.pi)  # turns that a pair makes over the original context
    smooth = ((turns - low) / (high - low)).clamp(0, 1)  # 0: slow pairs, stretched; 1: fast pairs, kept
    return inv_freq / factor * (1 - smooth) + inv_freq * smooth


def _yarn(inv_freq: Tensor, config: TextConfig, scaling: dict) -> tuple[Tensor, float]:
    context = scaling.get("original_max_position_embeddings") or config.max_position_embeddings
    factor = scaling["factor"]

    def pair_at(turns: float) -> float:  # which pair makes this many turns over the original context
        return config.head_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = pair_at(scaling.get("beta_fast") or 32), pair_at(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    ramp = ((torch.arange(len(inv_freq), dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    default_scale = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    return inv_freq / factor * ramp + inv_freq * (1 - ramp), scaling.get("attention_factor") or default_scale
