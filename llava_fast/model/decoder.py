"""The LLaMA decoder on packed tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llava_fast.config import TextConfig
from llava_fast.model.linear import Linear
from llava_kernels import add_rms_norm, rms_norm, rope, swiglu

# How a layer attends: (layer, qkv (T, heads + 2 kv_heads, head_dim), cos, sin (T, head_dim/2)) -> (T, heads, head_dim).
# The decoder does not know whether keys lie in the batch or in a cache; who calls it does, and may turn and store them
# in one go.
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


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
        self, x: Tensor, update: Tensor | None, cos: Tensor, sin: Tensor, attend: Attend
    ) -> tuple[Tensor, Tensor]:
        """x, update: (T, D), the residual stream and what the layer before adds to it. The same two are returned.

        An addition is left to the norm that follows it: one pass over the stream instead of two.
        """
        h, x = self.attention_norm.after_adding(x, update)
        h, x = self.mlp_norm.after_adding(x, self.attention(h, cos, sin, attend))
        return x, self.down(swiglu(self.gate_up(h)))

    def attention(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim))  # (T, heads + 2 kv_heads, head_dim)
        return self.out(attend(self.index, qkv, cos, sin).flatten(1))


class Decoder(nn.Module):
    """Token embeddings, layers and final norm; the output head belongs to :class:`Llava`."""

    inv_freq: Tensor  # (head_dim/2,) float32

    def __init__(self, config: TextConfig, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.config = config
        self.checkpoint_activations = False  # recompute each layer in the backward pass instead of keeping it
        self.embed_tokens = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size, dtype=dtype, device=device))
        self.layers = nn.ModuleList(DecoderLayer(config, i, dtype, device) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, device)
        self.register_buffer("inv_freq", torch.empty(config.head_dim // 2, device=device), persistent=False)
        self.rope_scale = 1.0  # yarn multiplies cosines and sines by this

    def reset_rope(self) -> None:
        """Work out the rotary frequencies; called once the module has left the meta device."""
        inv_freq, self.rope_scale = rope_frequencies(self.config)
        self.inv_freq.copy_(inv_freq)

    def angles(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """position_ids: (T,) -> cosines and sines, (T, head_dim/2) float32 each."""
        freqs = position_ids.float().unsqueeze(1) * self.inv_freq
        return freqs.cos() * self.rope_scale, freqs.sin() * self.rope_scale

    def forward(self, x: Tensor, position_ids: Tensor, attend: Attend) -> Tensor:
        """x: (T, D) embeddings -> (T, D) hidden states before the final norm."""
        cos, sin = self.angles(position_ids)
        update = None
        for layer in self.layers:
            if self.checkpoint_activations and torch.is_grad_enabled():
                x, update = checkpoint(layer, x, update, cos, sin, attend, use_reentrant=False)
            else:
                x, update = layer(x, update, cos, sin, attend)
        return x if update is None else x + update


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
