"""Sampler: each running answer's settings as a row of tables on the device, and the draw from a step's logits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llava_fast.engine.request import TokenLogprob
from llava_fast.engine.sequence import Sequence
from llava_fast.engine.transfer import download, upload
from llava_kernels import sample

COLUMNS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}


@dataclass
class Logprobs:
    """Of n rows, on the host: chosen (n,) float32, and the k likeliest, top (n, k) float32 with their ids (n, k)."""

    chosen: Tensor
    top: Tensor
    ids: Tensor

    @staticmethod
    def of(logits: Tensor, chosen: Tensor, k: int) -> Logprobs:
        """logits: (n, V); chosen: (n,) ids."""
        logprobs = logits.float().log_softmax(-1)
        top = logprobs.topk(min(k, logits.shape[-1]), dim=-1)
        picked = logprobs.gather(1, chosen[:, None])[:, 0]
        return Logprobs(download(picked), download(top.values), download(top.indices))

    def of_token(self, row: int, token: int, k: int) -> TokenLogprob:
        top = zip(self.ids[row, :k].tolist(), self.top[row, :k].tolist(), strict=True)
        return TokenLogprob(token, float(self.chosen[row]), tuple(top))


class Sampler:
    """Tables of ``rows`` + 1 rows, the last for the padding of CUDA graphs.

    Attributes:
        last: (rows + 1,) int64, the token that each row drew last.
    """

    def __init__(self, rows: int, vocab_size: int, device: torch.device):
        self.device = device
        self.vocab_size = vocab_size
        self.last = torch.zeros(rows + 1, dtype=torch.int64, device=device)
        self._settings = torch.zeros(rows + 1, len(COLUMNS), device=device)
        self._seeds = torch.zeros(rows + 1, dtype=torch.int64, device=device)
        self._counts: Tensor | None = None  # (rows + 1, V) int32, how often the answer holds each id
        self._in_prompt: Tensor | None = None  # (rows + 1, V) bool

    def admit(self, sequences: list[Sequence]) -> None:
        """Fill the rows of sequences that begin, or begin again."""
        if not sequences:
            return
        settings = [[getattr(s.sampling, name) for name in COLUMNS] for s in sequences]
        arrays: dict[str, np.ndarray] = {
            "rows": np.array([s.slot for s in sequences], dtype=np.int64),
            "settings": np.array(settings, dtype=np.float32),
            "seeds": np.array([s.seed for s in sequences], dtype=np.int64),
        }
        sent = upload(arrays, self.device)
        self._settings.index_copy_(0, sent["rows"], sent["settings"])
        self._seeds.index_copy_(0, sent["rows"], sent["seeds"])
        for sequence in sequences:
            if sequence.sampling.penalizes:
                self._count_tokens(sequence)

    def settings_of(self, rows: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Of a sampler on the host: (n,) float32 of each column, and (n,) int64 seeds, of the rows (n,)."""
        columns = np.ascontiguousarray(self._settings.numpy()[rows].T)  # (columns, n)
        return dict(zip(COLUMNS, columns, strict=True)), self._seeds.numpy()[rows]

    def seen(self) -> tuple[np.ndarray, np.ndarray]:
        """Of a sampler on the host, once a sequence with penalties was admitted: how often each id was drawn,
        (rows + 1, V) int32, and whether the prompt has it, (rows + 1, V) bool."""
        assert self._counts is not None and self._in_prompt is not None
        return self._counts.numpy(), self._in_prompt.numpy()

    def _count_tokens(self, sequence: Sequence) -> None:
        if self._counts is None or self._in_prompt is None:
            shape = (len(self.last), self.vocab_size)
            self._counts = torch.zeros(shape, dtype=torch.int32, device=self.device)
            self._in_prompt = torch.zeros(shape, dtype=torch.bool, device=self.device)
        prompt, row = sequence.prompt, sequence.slot
        text = np.ones(len(prompt.ids), dtype=bool)
        for start in prompt.starts:
            text[start : start + prompt.rows] = False
        sent = upload(
            {"prompt": prompt.ids[text], "answer": sequence.ids[len(prompt.ids) : sequence.known]}, self.device
        )
        self._in_prompt[row] = False
        self._in_prompt[row].index_fill_(0, sent["prompt"], True)
        self._counts[row] = 0
        self._counts[row].index_add_(0, sent["answer"], torch.ones_like(sent["answer"], dtype=torch.int32))

    def draw(
        self, logits: Tensor, sequences: list[Sequence], rows: Tensor, positions: Tensor
    ) -> tuple[Tensor, Logprobs | None]:
        """The next token of each sequence.

        Args:
            logits: (n, V).
            sequences: n.
            rows: (n,) their rows, on the device.
            positions: (n,) the place that the token will have in its sequence.

        Returns:
            (n,) int64 ids on the device, and the log-probabilities if any sequence wants them, of all n.
        """
        if all(s.plain for s in sequences):
            ids = _likeliest(logits)
            self.last.index_copy_(0, rows, ids)
            return ids, None
        settings = [s.sampling for s in sequences]
        chosen_from = self._biased(logits, sequences)
        if all(s.greedy and not s.penalizes for s in settings):
            ids = _likeliest(chosen_from)
        else:
            ids = self._sample(chosen_from, sequences, rows, positions)
        self.last.index_copy_(0, rows, ids)
        if all(s.logprobs is None for s in settings):
            return ids, None
        return ids, Logprobs.of(logits, ids, max(s.logprobs or 0 for s in settings))

    def _sample(self, logits: Tensor, sequences: list[Sequence], rows: Tensor, positions: Tensor) -> Tensor:
        settings = [s.sampling for s in sequences]
        table = self._settings[rows]  # (n, columns)
        given: dict[str, Tensor] = {"temperature": table[:, 0]}
        for name, off in OFF.items():
            if any(getattr(s, name) != off for s in settings):
                given[name] = table[:, COLUMNS.index(name)]
        if "top_k" in given:
            given["top_k"] = given["top_k"].int()
        if any(s.penalizes for s in settings):
            assert self._counts is not None and self._in_prompt is not None
            given |= {name: table[:, COLUMNS.index(name)] for name in COLUMNS[4:]}
            given |= {"counts": self._counts[rows], "in_prompt": self._in_prompt[rows]}
        ids, _ = sample(logits, seeds=self._seeds[rows], positions=positions, **given)
        if "counts" in given:
            assert self._counts is not None
            self._counts.index_put_((rows, ids), torch.ones_like(ids, dtype=torch.int32), accumulate=True)
        return ids

    def _biased(self, logits: Tensor, sequences: list[Sequence]) -> Tensor:
        """Logit biases, and no end before min_tokens."""
        biases = [(row, token, value) for row, s in enumerate(sequences) for token, value in _biases(s)]
        if not biases:
            return logits
        arrays: dict[str, np.ndarray] = {
            "rows": np.array([row for row, _, _ in biases], dtype=np.int64),
            "ids": np.array([token for _, token, _ in biases], dtype=np.int64),
            "values": np.array([value for _, _, value in biases], dtype=np.float32),
        }
        sent = upload(arrays, self.device)
        return logits.float().index_put((sent["rows"], sent["ids"]), sent["values"], accumulate=True)


def _likeliest(logits: Tensor) -> Tensor:
    """argmax of each row, the first of equals; numpy's is several times as fast as torch's on a CPU."""
    if logits.device.type != "cpu" or logits.dtype != torch.float32:
        return logits.argmax(-1)
    return torch.from_numpy(logits.numpy().argmax(-1))


def _biases(sequence: Sequence) -> list[tuple[int, float]]:
    sampling = sequence.sampling
    biases = list(sampling.logit_bias.items())
    if sequence.generated < sampling.min_tokens:
        biases += [(token, float("-inf")) for token in sequence.stop_ids]
    return biases
