"""LoRA adapters in PEFT's format: over a transformers LLaVA, or as the authors write them; read and written.

Both are ``adapter_config.json`` with ``adapter_model.safetensors`` (or ``.bin``). They differ in what lies below and in
where the projector stands, which is trained along:

- transformers: the base is a LLaVA directory, names are those of ``LlavaForConditionalGeneration`` 4.52 and later
  (``base_model.model.model.language_model.layers.*``), and the projector is among PEFT's ``modules_to_save``. Older
  names are read too.
- the authors (``llava/train/train.py``): the base is a LLaMA, or one of their own directories, names are
  ``base_model.model.model.layers.*``, the projector is in ``non_lora_trainables.bin``, and ``config.json`` describes
  the whole model.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava_fast.checkpoint import authors, huggingface
from llava_fast.checkpoint.files import (
    Entry,
    TensorFiles,
    read_json,
    replace_files,
    shorten,
    write_json,
    write_tensors,
)
from llava_fast.checkpoint.llama import canonical_llama
from llava_fast.checkpoint.names import PROJECTOR, TEXT, Source, canonical_parts, canonical_tensors, check, from_memory
from llava_fast.checkpoint.projector import authors_projector, canonical_projector
from llava_fast.config import ModelConfig
from llava_fast.errors import CheckpointError, ConfigError
from llava_fast.model import Llava
from llava_fast.model.lora import TARGETS, LoraConfig, LoraLinear, attach, lora_of

CONFIG, WEIGHTS, NON_LORA = "adapter_config.json", "adapter_model", "non_lora_trainables.bin"
OURS = "llava_fast.json"  # what the model was trained with and a LlavaConfig cannot say, such as its template
_WRAP = "base_model.model."  # what PEFT puts before every name
# Fields of a PEFT LoraConfig that change the arithmetic, and the values under which they do not.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "layer_replication": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, []),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
}
_LOW_RANK = re.compile(r"(.*)\.lora_([AB])(?:\.default)?\.weight")


def is_adapter(directory: Path) -> bool:
    return (directory / CONFIG).is_file()


class Adapter:
    """An adapter directory, listed and not yet read.

    Args:
        directory: holds adapter_config.json and the weights.

    Attributes:
        config: of the adapters; ``targets`` are the decoder's alone.
        pairs: canonical name of the weight below -> names of A and B in the files.
        whole: canonical name -> name in the files, of weights that take the place of the base's.

    Raises:
        CheckpointError: a kind of adapter whose arithmetic is another, no weights, or an A without its B.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.fields = read_json(directory / CONFIG)
        for name, plain in _PLAIN.items():
            value = self.fields.get(name, plain[0])
            if value not in plain:
                raise CheckpointError(
                    f"{directory / CONFIG}: {name}={value!r} is not supported; merge the adapter with PEFT "
                    f"(merge_and_unload) and load the result"
                )
        if not isinstance(self.fields.get("r"), int):
            raise CheckpointError(f"{directory / CONFIG} gives no rank (r); it is not PEFT's LoRA configuration")
        self.files = TensorFiles(_weight_files(directory))
        self.pairs: dict[str, dict[str, str]] = {}
        self.whole: dict[str, str] = {}
        for name in self.files.entries:
            self._sort_in(name)
        halves = [name for name, pair in self.pairs.items() if len(pair) < 2]
        if halves:
            raise CheckpointError(f"{directory}: A or B is missing of {shorten(halves)}; save the adapter again")
        self.config = self._lora_config()

    def _sort_in(self, name: str) -> None:
        bare = name.removeprefix(_WRAP).replace(".modules_to_save.default.", ".")
        low_rank = _LOW_RANK.fullmatch(bare)
        if low_rank:
            target = _canonical(f"{low_rank[1]}.weight")
            self.pairs.setdefault(target, {})[low_rank[2]] = name
        elif ".lora_" in bare:
            raise CheckpointError(
                f"{self.files.entries[name].file}: {name} is of a kind of adapter that is not supported; only LoRA on "
                f"linear layers is"
            )
        else:
            self.whole[_canonical(bare)] = name

    def _lora_config(self) -> LoraConfig:
        targets = {name.split(".")[-2] for name in self.pairs if name.startswith(TEXT)}
        strange = sorted(targets - set(TARGETS))
        if strange:
            raise CheckpointError(f"{self.directory}: adapters on {', '.join(strange)} are not supported")
        return LoraConfig(
            rank=int(self.fields["r"]),
            alpha=float(self.fields.get("lora_alpha", 8)),  # PEFT's own default
            dropout=float(self.fields.get("lora_dropout") or 0.0),
            targets=tuple(name for name in TARGETS if name in targets) or TARGETS,
            rank_stabilized=bool(self.fields.get("use_rslora")),
            base=self.fields.get("base_model_name_or_path"),
        )

    def extras(self) -> dict[str, Any]:
        """Fields of ModelConfig that the adapter was saved with, where they are not the base's."""
        file = self.directory / OURS
        return huggingface.read_extras(read_json(file)) if file.is_file() else {}

    def find_base(self, given: Path | str | None) -> Path:
        """The directory of the weights below: ``given``, else what the adapter names, downloaded where it is a hub id.

        Raises:
            CheckpointError: it names none, or one that is neither a directory nor can be downloaded.
        """
        named = given if given is not None else self.config.base
        if not named:
            raise CheckpointError(f"{self.directory / CONFIG} names no base_model_name_or_path; give it as base")
        if Path(named).is_dir():
            return Path(named)
        try:
            from huggingface_hub import snapshot_download

            return Path(snapshot_download(str(named), allow_patterns=["*.json", "*.safetensors", "*.bin", "*.model"]))
        except Exception as error:  # offline, no such repository, not a valid id: the cure is the same
            raise CheckpointError(
                f"the base {str(named)!r} of the adapter {self.directory} is neither a directory nor can it be "
                f"downloaded ({type(error).__name__}); give it as base"
            ) from error

    # ---- applied while the base is read ------------------------------------------------------------------------------

    def applied(self, config: ModelConfig, sources: list[Source], *, low_rank: bool) -> list[Source]:
        """``sources`` of the base with the adapter in them: whole weights replaced, and with ``low_rank`` every
        ``W + scale B A`` taken in float32 as W is read.

        Raises:
            CheckpointError: the adapter does not belong to this base.
        """
        self._check_fits(sources)
        whole = self._whole(config)
        present = {name for source in sources for name in source.entries}
        own = from_memory({n: t for n, t in whole.items() if n not in present}, self.directory)
        return [self._changed(source, whole, low_rank) for source in sources] + ([own] if own.entries else [])

    def _check_fits(self, sources: list[Source]) -> None:
        below = {name: entry for source in sources for name, entry in source.entries.items()}
        faults = []
        for name in self.pairs:
            a, b = (self._entry(name, kind).shape for kind in "AB")
            if name not in below:
                faults.append(f"{name} is not in the base")
            elif below[name].shape != (b[0], a[1]):
                faults.append(f"{name} is {below[name].shape} in the base, the adapter is for {(b[0], a[1])}")
            elif (a[0], b[1]) != (self.config.rank, self.config.rank):
                faults.append(f"the rank of {name} is {a[0]}, {CONFIG} says {self.config.rank}")
        if faults:
            raise CheckpointError(f"the adapter {self.directory} does not belong to its base: {shorten(faults)}")

    def _entry(self, name: str, kind: str) -> Entry:
        return self.files.entries[self.pairs[name][kind]]

    def read_pair(self, name: str) -> tuple[Tensor, Tensor]:
        """A (r, K) and B (N, r) of the weight with the canonical name ``name``, float32."""
        a, b = (self.files.read(self.pairs[name][kind]).float() for kind in "AB")
        return a, b

    def _whole(self, config: ModelConfig) -> dict[str, Tensor]:
        tensors = {name: self.files.read(there).clone() for name, there in self.whole.items()}
        second = f"{PROJECTOR}linear_2.weight"
        if config.projector == "linear" and second in tensors:  # as transformers has a linear projector
            projector = {name: tensors.pop(name) for name in list(tensors) if name.startswith(PROJECTOR)}
            needed = huggingface.projector_shapes(config)
            check(needed, [from_memory(projector, self.directory)], self.directory)
            tensors |= huggingface.fold_linear(projector)
        return tensors

    def _changed(self, source: Source, whole: dict[str, Tensor], low_rank: bool) -> Source:
        def stream() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in source.stream():
                if name in whole:
                    tensor = whole[name]
                if low_rank and name in self.pairs:
                    a, b = self.read_pair(name)
                    tensor = torch.addmm(tensor.float(), b, a, alpha=self.config.scale)
                yield name, tensor

        entries = {
            name: replace(entry, shape=tuple(whole[name].shape)) if name in whole else entry
            for name, entry in source.entries.items()
        }
        return Source(entries, stream)

    # ---- kept beside the base ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def attach_to(self, model: Llava) -> None:
        """Give ``model``, which holds the base, these adapters, to train them further.

        Raises:
            CheckpointError: the adapter has parts that do not stand on all layers of the decoder alike.
        """
        attach(model, self.config)
        views = low_rank_views(model)
        odd = sorted(set(views) ^ set(self.pairs))
        if odd:
            raise CheckpointError(
                f"{self.directory}: adapters that are not on every layer's {', '.join(self.config.targets)} cannot be "
                f"kept beside the weights: {shorten(odd)}; load them merged (merge_adapter=True)"
            )
        for name, views_of in views.items():
            for view, tensor in zip(views_of, self.read_pair(name), strict=True):
                view.copy_(tensor)


def _weight_files(directory: Path) -> list[Path]:
    files = [f for f in (directory / f"{WEIGHTS}.safetensors", directory / f"{WEIGHTS}.bin") if f.is_file()][:1]
    if not files:
        raise CheckpointError(f"{directory} holds no adapter weights; looked for {WEIGHTS}.safetensors and .bin")
    return files + [f for f in (directory / NON_LORA,) if f.is_file()]


def _canonical(name: str) -> str:
    """The canonical name of a weight as PEFT names it behind its prefix, in transformers' or the authors' spelling."""
    projector = canonical_projector(name)
    if projector is not None:
        return projector
    if name.startswith(("model.layers.", "model.embed_tokens.", "model.norm.")):
        return canonical_llama(name, tied=False) or name
    return huggingface.canonical_hub(name) or name


def low_rank_views(model: Llava) -> dict[str, tuple[Tensor, Tensor]]:
    """Views of every A and B in the model, by the canonical name of the weight below."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LoraLinear)}
    names = canonical_parts(model.config)
    views = {}
    for path, layer in layers.items():
        canonical = {name.split(".")[-2]: name for name, _ in names[f"{path}.weight"]}
        for piece, _, a, b in layer.pieces():
            views[canonical[piece]] = (a.detach(), b.detach())
    return views


# ---- writing ---------------------------------------------------------------------------------------------------------


def write(model: Llava, directory: Path | str) -> None:
    """Write the model's adapters and its projector: transformers' kind over a transformers LLaVA base, else the
    authors'. The base itself is not written.

    Raises:
        ConfigError: the adapters name no base.
    """
    directory, lora = Path(directory), lora_of(model)
    assert lora is not None
    if lora.base is None:
        raise ConfigError("the adapters name no base, so nobody could load them; set LoraConfig.base")
    over_transformers = lora.vision_tower is None and not authors.is_authors(_config_below(lora.base))
    (_write_over_transformers if over_transformers else _write_as_authors)(model, directory, lora)


def _config_below(base: str) -> dict[str, Any]:
    """config.json of the base, from its directory or from the hub's cache; empty where neither has it."""
    file: Any = Path(base) / "config.json"
    if not Path(base).is_dir():
        from huggingface_hub import try_to_load_from_cache

        file = try_to_load_from_cache(base, "config.json")
    return read_json(Path(file)) if isinstance(file, str | Path) and Path(file).is_file() else {}


def _write_over_transformers(model: Llava, directory: Path, lora: LoraConfig) -> None:
    tensors = _low_rank_tensors(model, lambda name: "model." + name.replace("language_model.model.", "language_model."))
    projector = dict(canonical_tensors(model, only=PROJECTOR))
    if model.config.projector == "linear":
        projector |= huggingface.second_linear(model.projector.linear_1.bias.detach())
    tensors |= {f"{_WRAP}model.{name}": tensor for name, tensor in projector.items()}
    write_tensors(directory, tensors, stem=WEIGHTS, shard_bytes=1 << 62)  # PEFT reads one file
    # The tower has projections of the same names, so the decoder's are told by a pattern.
    targets = rf".*language_model\..*\.({'|'.join(lora.targets)})"
    write_json(directory / CONFIG, _peft_fields(lora, targets) | {"modules_to_save": ["multi_modal_projector"]})
    # Not as config.json: transformers would look for the whole model's weights beside it.
    write_json(directory / OURS, {huggingface.EXTRAS_KEY: huggingface.extras(model.config)})


def _write_as_authors(model: Llava, directory: Path, lora: LoraConfig) -> None:
    tensors = _low_rank_tensors(model, lambda name: name.removeprefix("language_model."))
    write_tensors(directory, tensors, stem=WEIGHTS, shard_bytes=1 << 62)
    linear = model.config.projector == "linear"
    projector = {
        _WRAP + authors_projector(name, linear=linear): tensor.cpu().clone()
        for name, tensor in canonical_tensors(model, only=PROJECTOR).items()
    }
    # The one file here that is no safetensors: the authors' loader knows it under this name and in this form alone.
    replace_files(directory, {NON_LORA: partial(_save_bin, projector)})
    fields = _peft_fields(lora, list(lora.targets)) | {"task_type": "CAUSAL_LM"}
    write_json(directory / CONFIG, fields)
    tower = lora.vision_tower or _config_below(lora.base or "").get("mm_vision_tower") or ""
    write_json(directory / "config.json", authors.config_fields(model, vision_tower=tower))


def _save_bin(tensors: dict[str, Tensor], path: Path) -> None:
    with path.open("wb") as out:
        torch.save(tensors, out)
        out.flush()
        os.fsync(out.fileno())


def _low_rank_tensors(model: Llava, spell: Any) -> dict[str, Tensor]:
    """Every A and B under the name that PEFT gives it; ``spell`` turns a canonical name into the base class's."""
    return {
        f"{_WRAP}{spell(name).removesuffix('weight')}lora_{kind}.weight": view
        for name, views in low_rank_views(model).items()
        for kind, view in zip("AB", views, strict=True)
    }


def _peft_fields(lora: LoraConfig, targets: str | list[str]) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": lora.base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rank_stabilized,
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None,
        "task_type": None,
    }
