"""Past one machine: a Ray data set of prompts in, the same with answers out. Needs ``llava-fast[ray]``.

    dataset = ray.data.read_json("s3://bucket/prompts/", lines=True)
    generate_dataset(dataset, "/models/llava-1.5-7b", concurrency=8).write_json("s3://bucket/answers/")

Rows are those of :mod:`llava_fast.generate.requests`; an image may also be bytes or an array, as ``ray.data`` reads
them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llava_fast.engine import Completion, EngineConfig, Request
from llava_fast.errors import ConfigError, EngineClosedError, InvalidRequestError, LlavaError, QueueFullError
from llava_fast.generate.setup import Setup

COLUMNS = {
    "answer": "string",
    "finish_reason": "string",
    "generated_tokens": "int64",
    "prompt_tokens": "int64",
    "error": "string",
}


def generate_dataset(
    dataset: Any,
    model: str | Path,
    *,
    config: EngineConfig | None = None,
    sampling: Mapping[str, Any] | None = None,
    image_dir: str | Path | None = None,
    dtype: str | None = None,
    quantization: str | None = None,
    concurrency: int = 1,
    num_gpus: float | None = None,
    batch_size: int = 128,
) -> Any:
    """Answer every row of a Ray data set; nothing is run before the result is asked for.

    Args:
        dataset: of ``ray.data``.
        model: checkpoint directory, at the same path on every machine, or hub id.
        config: budgets of each engine.
        sampling: fields of SamplingParams for rows whose own ``sampling`` does not say otherwise.
        image_dir: what paths of images are relative to.
        dtype: such as "bfloat16"; default bfloat16 on CUDA, float32 on a CPU.
        quantization: None, "int8", "int4" or "fp8".
        concurrency: engines, each in an actor of its own.
        num_gpus: of each engine; default one where the cluster has any.
        batch_size: rows handed over at a time; an engine works on several such batches at once.

    Returns:
        The data set with these columns: ``answer``, ``finish_reason``, ``generated_tokens``, ``prompt_tokens`` and
        ``error``, which is None or says what was wrong with the row. A row has one answer: ``n`` above 1 is an error.

    Raises:
        ConfigError: Ray is not installed.
    """
    try:
        import ray
    except ImportError:
        raise ConfigError("Ray is not installed; pip install 'llava-fast[ray]'") from None
    if num_gpus is None:
        num_gpus = 1 if ray.cluster_resources().get("GPU") else 0
    setup = Setup(
        model=str(model),
        dtype=dtype,
        quantization=quantization,
        engine=config or EngineConfig(),
        sampling=dict(sampling or {}),
        image_dir=None if image_dir is None else Path(image_dir),
        seed=None,  # rows have no number that is the same in every run
    )
    return dataset.map_batches(
        Generator,
        fn_constructor_args=(setup, "cuda" if num_gpus else "cpu"),
        compute=ray.data.ActorPoolStrategy(size=concurrency),
        num_gpus=num_gpus,
        batch_size=batch_size,
        batch_format="pyarrow",
    )


class Generator:
    """An engine for ``map_batches``. A coroutine, so that Ray sends further batches while one is being finished."""

    def __init__(self, setup: Setup, device: str):
        if device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("this actor has a GPU that torch cannot use; install torch with CUDA, or pass num_gpus=0")
        self._setup = setup
        self._engine = setup.open(device if device == "cpu" else "cuda:0")  # the one that Ray shows this actor

    async def __call__(self, batch: Any) -> Any:
        """A pyarrow table of rows, and the same with the answers' columns."""
        answers = await asyncio.gather(*(self._answer(plain(row)) for row in batch.to_pylist()))
        batch = batch.drop_columns([name for name in COLUMNS if name in batch.column_names])
        for name, kind in COLUMNS.items():
            batch = batch.append_column(name, pyarrow_array([answer[name] for answer in answers], kind))
        return batch

    async def _answer(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            completion = await self._complete(self._request(row))
        except EngineClosedError:
            raise  # this actor is of no more use
        except LlavaError as error:
            return {**dict.fromkeys(COLUMNS), **_NO_TOKENS, "error": f"{type(error).__name__}: {error}"}
        return {
            "answer": completion.text,
            "finish_reason": completion.finish_reason,
            "generated_tokens": len(completion.token_ids),
            "prompt_tokens": completion.prompt_tokens,
            "error": None,
        }

    def _request(self, row: dict[str, Any]) -> Request:
        request = self._setup.request(row, 0)
        if request.sampling.n > 1:
            raise InvalidRequestError(f"n={request.sampling.n} where a row has one answer; repeat the row instead")
        return request

    async def _complete(self, request: Request) -> Completion:
        while True:
            try:
                return await self._engine.submit(request)
            except QueueFullError:
                await asyncio.sleep(0.01)


_NO_TOKENS = {"generated_tokens": 0, "prompt_tokens": 0}


def plain(value: Any) -> Any:
    """A value without the None that Arrow fills its records up with."""
    if isinstance(value, dict):
        return {name: plain(one) for name, one in value.items() if one is not None}
    return [plain(one) for one in value] if isinstance(value, list) else value


def pyarrow_array(values: list[Any], kind: str) -> Any:
    import pyarrow  # Ray Data brings it

    return pyarrow.array(values, kind)
