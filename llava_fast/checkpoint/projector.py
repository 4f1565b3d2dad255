"""A projector alone: ``mm_projector.bin`` or ``.safetensors``, as stage 1 writes it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from llava_fast.checkpoint.files import TensorFiles, write_tensors
from llava_fast.checkpoint.names import PROJECTOR, canonical_tensors, check, from_memory
from llava_fast.errors import CheckpointError
from llava_fast.model import Llava

# What stands behind ``mm_projector.`` in the authors' files -> the canonical layer.
AUTHORS_LAYERS = {"": "linear_1", "0.": "linear_1", "2.": "linear_2"}
_FILES = ("mm_projector.safetensors", "mm_projector.bin")


def canonical_projector(name: str) -> str | None:
    """The canonical name of a projector tensor in any spelling and behind any prefix; None for other tensors.

    ``model.mm_projector.weight`` (linear), ``model.mm_projector.0.weight`` and ``.2.`` (MLP), and transformers'
    ``multi_modal_projector.linear_1.weight``.
    """
    _, found, tail = name.rpartition("multi_modal_projector.")
    if found:
        return PROJECTOR + tail
    _, found, tail = name.rpartition("mm_projector.")
    if not found:
        return None
    layer, _, kind = tail.rpartition(".")
    layer = f"{layer}." if layer else ""
    return f"{PROJECTOR}{AUTHORS_LAYERS.get(layer, layer.removesuffix('.'))}.{kind}"


def authors_projector(name: str, *, linear: bool) -> str:
    """The authors' name of a canonical projector tensor, such as ``model.mm_projector.0.weight``."""
    layer, kind = name.removeprefix(PROJECTOR).split(".")
    return f"model.mm_projector.{'' if linear else {'linear_1': '0.', 'linear_2': '2.'}[layer]}{kind}"


@torch.no_grad()
def load_projector(model: Llava, path: Path | str) -> None:
    """Fill the projector from a file, or from the ``mm_projector`` file in a directory.

    The two marker embeddings that the v0 stage 1 learnt beside it are put into the embedding table; as in the authors'
    loader they may stand alone (2, D) or at the end of the whole table (V, D).

    Raises:
        CheckpointError: no such file, tensors missing, unexpected or mis-shaped, or marker embeddings for a model
            without marker tokens.
    """
    file = _projector_file(Path(path))
    files = TensorFiles([file])
    tensors: dict[str, Tensor] = {}
    markers = None
    for name, tensor in files.stream():
        if "embed_tokens" in name:
            markers = tensor.clone()
        else:
            tensors[canonical_projector(name) or name] = tensor.clone()
    targets = canonical_tensors(model, only=PROJECTOR)
    kind = "mlp2x_gelu" if any("linear_2" in name for name in tensors) else "linear"
    if kind != model.config.projector:
        raise CheckpointError(
            f"{file} holds a projector of kind {kind!r}, the model has {model.config.projector!r}; make the model with "
            f"projector={kind!r}"
        )
    check(targets, [from_memory(tensors, file)], file)
    if markers is not None:
        _put_markers(model, markers, file)
    for name, view in targets.items():
        view.copy_(tensors[name])


def _projector_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    for name in _FILES:
        if (path / name).is_file():
            return path / name
    raise CheckpointError(f"{path} holds no projector; looked for {' and '.join(_FILES)}")


def _put_markers(model: Llava, rows: Tensor, file: Path) -> None:
    config = model.config
    ids = [config.image_start_token_id, config.image_end_token_id]
    table = model.decoder.embed_tokens
    if None in ids:
        raise CheckpointError(
            f"{file} also holds embeddings {tuple(rows.shape)} of image marker tokens, but the model has none; set "
            f"image_start_token_id and image_end_token_id in its config, or take a projector trained without markers"
        )
    if rows.ndim != 2 or rows.shape[1] != table.shape[1] or len(rows) not in (2, len(table)):
        raise CheckpointError(
            f"{file}: marker embeddings of shape {tuple(rows.shape)} fit neither 2 rows nor the model's table "
            f"{tuple(table.shape)}"
        )
    table[ids] = rows[-2:].to(table) if len(rows) == 2 else rows[ids].to(table)


def save_projector(model: Llava, path: Path | str) -> None:
    """Write the projector under the authors' names to ``path``, a ``.safetensors`` file or a directory."""
    path = Path(path)
    if path.suffix != ".safetensors":
        path = path / _FILES[0]
    linear = model.config.projector == "linear"
    tensors = {
        authors_projector(name, linear=linear): t for name, t in canonical_tensors(model, only=PROJECTOR).items()
    }
    write_tensors(path.parent, tensors, stem=path.stem)
