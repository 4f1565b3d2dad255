"""LLaVA: vision tower, projector and decoder over one packed token sequence."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llava_fast.batch import PackedBatch
from llava_fast.config import ModelConfig
from llava_fast.errors import ConfigError
from llava_fast.model import generation
from llava_fast.model.decoder import Attend, Decoder, RMSNorm, turned
from llava_fast.model.linear import Linear
from llava_fast.model.memory import give_memory
from llava_fast.model.projector import Projector
from llava_fast.model.quantized import QuantizedLinear
from llava_fast.model.vision import VisionTower
from llava_kernels import linear, linear_cross_entropy, varlen_attention
from llava_kernels.attention import IMPLEMENTATIONS


class Llava(nn.Module):
    """The model of "Visual Instruction Tuning": ``Z_v = g(X_v)``, ``H_v = W Z_v``, a LLaMA decoder over the sequence.

    Args:
        config: sizes and choices, such as ``ModelConfig.preset("tiny")``.
        device: where the weights are made; default the CPU.
        dtype: what they are made in; default float32.
        seed: of the random weights; None leaves the memory as it is, for a loader to fill. Weights are made once, in
            place: no second copy exists at any time.
        attention: "auto" or a name in ``llava_kernels.attention.IMPLEMENTATIONS``, such as "flash-attn" or "sdpa".

    Raises:
        ConfigError: ``attention`` is unknown or not installed.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        seed: int | None = 0,
        attention: str = "auto",
    ):
        super().__init__()
        if attention != "auto" and attention not in IMPLEMENTATIONS:
            raise ConfigError(f"attention={attention!r} is not known; choose auto, {', '.join(IMPLEMENTATIONS)}")
        if attention != "auto" and (why := IMPLEMENTATIONS[attention].missing()):
            install = IMPLEMENTATIONS[attention].install
            raise ConfigError(f"attention={attention!r} is not installed ({why}); install it with: {install}")
        self.config = config
        self.attention = attention
        meta = torch.device("meta")
        self.vision_tower = VisionTower(config, dtype, meta)
        self.projector = Projector(config, dtype, meta)
        self.decoder = Decoder(config.text, dtype, meta)
        self.lm_head = (
            None
            if config.text.tie_word_embeddings
            else Linear(config.text.hidden_size, config.text.vocab_size, bias=False, dtype=dtype, device=meta)
        )
        give_memory(self, device or "cpu")
        self.decoder.reset_rope()
        if seed is not None:
            self.init_weights(seed)

    @property
    def device(self) -> torch.device:
        return self.decoder.embed_tokens.device

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.embed_tokens.dtype

    @property
    def head_weight(self) -> Tensor:
        """(V, D) output head; the embedding table itself where the two are tied, made anew where it is quantized."""
        if self.lm_head is None:
            return self.decoder.embed_tokens
        if isinstance(self.lm_head, QuantizedLinear):
            return self.lm_head.dequantize().to(self.dtype)
        return self.lm_head.weight

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fill every weight: matrices from N(0, 0.02), norms 1, biases 0."""
        generator = torch.Generator(self.device).manual_seed(seed)
        for module in self.modules():
            for name, weight in module.named_parameters(recurse=False):
                if isinstance(module, nn.LayerNorm | RMSNorm) and name == "weight":
                    weight.fill_(1.0)
                elif name == "bias":
                    weight.zero_()
                else:
                    weight.normal_(0.0, 0.02, generator=generator)

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """Z_v: pixel_values (N, 3, H, W), or (N, tokens_per_image, C), which are features and returned as such, ->
        (N, tokens_per_image, C). No graph is built while the tower is frozen."""
        if pixel_values.shape[0] == 0:  # text alone
            return pixel_values.new_zeros(
                (0, self.config.tokens_per_image, self.config.vision.hidden_size), dtype=self.dtype
            )
        if pixel_values.dim() == 3:  # features already, from a cache
            return pixel_values.to(self.dtype)
        trained = any(p.requires_grad for p in self.vision_tower.parameters())
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            return self.vision_tower(pixel_values.to(self.dtype))

    def embed(self, batch: PackedBatch) -> Tensor:
        """The decoder's input (T, D): token embeddings with the projected image rows H_v = W Z_v in their places."""
        features = self.image_features(batch.pixel_values)
        if features.shape[0] * features.shape[1] != batch.image_rows.shape[0]:
            raise ValueError(
                f"the batch has places for {batch.image_rows.shape[0]} image rows but its {features.shape[0]} images "
                f"give {features.shape[0] * features.shape[1]}; pack it with this model's processor"
            )
        return self.projector(features, self.decoder.embed_tokens, batch.input_ids, batch.image_rows, batch.text_rows)

    def hidden(self, batch: PackedBatch, attend: Attend | None = None, rows: Tensor | None = None) -> Tensor:
        """Hidden states (T, D) before the final norm, or (L, D) of ``rows`` (L,) alone.

        ``attend`` replaces attention within the batch.
        """
        return self.decoder(self.embed(batch), batch.position_ids, attend or self._attend_within(batch), rows)

    def _attend_within(self, batch: PackedBatch) -> Attend:
        def attend(layer: int, qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            q, k, v = turned(qkv, cos, sin, self.config.text.num_key_value_heads)
            return varlen_attention(
                q, k, v, batch.seqlens, causal=True, implementation=self.attention, cu_seqlens=batch.cu_seqlens
            )

        return attend

    def head(self, hidden: Tensor) -> Tensor:
        """Final norm and output head: (n, D) -> logits (n, V)."""
        hidden = self.decoder.norm(hidden)
        return linear(hidden, self.decoder.embed_tokens) if self.lm_head is None else self.lm_head(hidden)

    def logits(self, batch: PackedBatch) -> Tensor:
        """Logits (T, V) of every position, for study and parity; training never holds them."""
        return self.head(self.hidden(batch))

    def loss(self, batch: PackedBatch, denominator: int | Tensor | None = None) -> Tensor:
        """Mean cross entropy over the supervised tokens (equation 3), a float32 scalar.

        Args:
            batch: at least one supervised token, unless ``denominator`` is given.
            denominator: divide the sum by this instead, such as the count over all batches of an optimizer step; a
                scalar tensor stays on the device.
        """
        rows = batch.supervised_rows
        hidden = self.decoder.norm(self.hidden(batch, rows=rows))  # (L, D): unsupervised rows end in the last layer
        total = linear_cross_entropy(hidden, self.head_weight, batch.labels.index_select(0, rows))
        return total / (batch.num_supervised if denominator is None else denominator)

    def generate(
        self,
        batch: PackedBatch,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
        stop_ids: tuple[int, ...] | None = None,
    ) -> list[list[int]]:
        """Continue every sequence of ``batch``; see :func:`llava_fast.model.generation.generate`."""
        return generation.generate(
            self,
            batch,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            stop_ids=stop_ids,
        )
