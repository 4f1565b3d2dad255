"""Tokenizer: text to ids with character starts, over a sentencepiece model or a ``tokenizers`` JSON file.

Special tokens are never parsed out of text: ``"</s>"`` that a user types is text. Whoever wants a special token puts
its id in by name. What the authors' slow tokenizer does with such text is emulated in ``conversation``, on request.
"""

from __future__ import annotations

import copy
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import tokenizers

from llava_fast.errors import TokenizerError

SPACE = "\u2581"  # how SentencePiece writes a space
NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")
USUAL = dict(zip(NAMED, ("<s>", "</s>", "<unk>", "<pad>"), strict=True))  # for a tokenizer.json without a config

# Protobuf merges concatenated messages and the last value of a field wins, so these four bytes behind a model file
# switch the dummy prefix off: field 3 (normalizer_spec), 2 bytes long, in which field 3 (add_dummy_prefix) is 0.
NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class Tokenizer:
    """Text to ids and back. Make one with :meth:`load`.

    Attributes:
        bos_id: id that starts every sequence, or None when the vocabulary has none.
        eos_id: id that ends an answer.
        unk_id: id of unknown text, or None.
        pad_id: padding id; ``unk`` where no padding token is named, as in the authors' training, else ``eos``.
        vocab_size: number of ids, added tokens included.
        legacy: whether text after a special token gets the dummy prefix (transformers' ``legacy`` flag).
        special_tokens: text to id of the named and the added tokens.
    """

    def __init__(self, backend: _SentencePiece | _Fast, config: dict[str, Any], added: dict[str, int], legacy: bool):
        self._backend = backend
        self._config = config
        self._added = added
        self._added_text = {i: token for token, i in added.items()}
        self.legacy = legacy
        self.vocab_size = max([backend.size, *(i + 1 for i in added.values())])
        named = {key: self._named_id(key) for key in NAMED}
        self.bos_id, self.unk_id = named["bos_token"], named["unk_token"]
        if named["eos_token"] is None:
            raise TokenizerError(
                f"{backend.file_name} names no end-of-sequence token (eos_token={config.get('eos_token')!r}); "
                f"put a tokenizer_config.json with an eos_token from its vocabulary beside it"
            )
        self.eos_id = named["eos_token"]
        self.pad_id = next(i for i in (named["pad_token"], self.unk_id, self.eos_id) if i is not None)
        self._special_ids = frozenset(i for i in (*named.values(), *added.values()) if i is not None)
        self.special_tokens = {self._token_text(i): i for i in sorted(self._special_ids)}

    @staticmethod
    def load(source: str | Path, legacy: bool | None = None) -> Tokenizer:
        """Read ``tokenizer.model`` or else ``tokenizer.json`` from a directory, or the one given file.

        ``tokenizer_config.json``, ``special_tokens_map.json`` and ``added_tokens.json`` beside it are read as well.

        Args:
            source: directory or file.
            legacy: overrides the ``legacy`` flag of ``tokenizer_config.json`` (true where that is silent).

        Raises:
            TokenizerError: no tokenizer there, or it cannot be read, or it has no end-of-sequence token.
        """
        path = _find(Path(source))
        backend = _Fast(path) if path.suffix == ".json" else _SentencePiece(path)
        config = _read_config(path.parent)
        added = {t: i for t, i in {**backend.added, **config.pop("added")}.items() if backend.piece_id(t) != i}
        if legacy is None:
            legacy = True if config.get("legacy") is None else bool(config["legacy"])
        return Tokenizer(backend, config, added, legacy)

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest token: a text of more than n times as many does not fit into n tokens."""
        return max(len(self._token_text(i)) for i in range(self._backend.size))

    def encode(self, text: str, *, prefix: bool) -> tuple[list[int], list[int]]:
        """Ids of ``text`` and where each begins.

        Args:
            text: plain text; nothing in it is taken for a special token.
            prefix: put SentencePiece's dummy prefix (a space) before it: at the start of a sequence, after an image,
                and after a special token in legacy mode. No effect where the tokenizer was made without one.

        Returns:
            ``(ids, starts)`` of one length; ``starts[i]`` is the character of ``text`` at which token i begins, 0 for
            the dummy prefix; the byte tokens of one character all start at it. ``starts`` never decreases.

        Raises:
            TokenizerError: the text holds half of a surrogate pair, which no encoding can hold.
        """
        if not text:
            return [], []
        try:
            return self._backend.encode(text, prefix)
        except (UnicodeEncodeError, TypeError, RuntimeError) as error:  # each version of the libraries has its own
            where = next((i for i, c in enumerate(text) if "\ud800" <= c <= "\udfff"), None)
            if where is None:
                raise
            raise TokenizerError(
                f"character {where} of the text is {text[where]!r}, half of a surrogate pair; repair the text, for "
                f"example with text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')"
            ) from error

    def decode(self, ids: list[int], skip_special: bool = True) -> str:
        """Text of a whole run of ids. The dummy prefix is taken off; bytes that are no UTF-8 become U+FFFD.

        Args:
            ids: ids. Those outside the vocabulary, such as padding rows of the embedding, give no text.
            skip_special: leave named and added tokens out; otherwise they appear as they are written.
        """
        text, run = "", list[int]()
        for i in ids:
            if i in self._special_ids:
                if not skip_special:
                    text, run = text + self._decode_run(run, prefixed=self.legacy or not text) + self._token_text(i), []
            elif 0 <= i < self._backend.size:
                run.append(i)
        return text + self._decode_run(run, prefixed=self.legacy or not text)

    def token_id(self, token: str) -> int | None:
        """Id of the token that is written exactly so, or None."""
        return self._added[token] if token in self._added else self._backend.piece_id(token)

    def piece(self, token_id: int) -> str:
        """The token as the vocabulary writes it; empty outside of it, such as for padding rows of the embedding."""
        return self._token_text(token_id) if token_id in self._added_text or 0 <= token_id < self._backend.size else ""

    @property
    def byte_level(self) -> bool:
        """Whether pieces are written in GPT-2's alphabet of 256 characters, one a byte."""
        return self._backend.byte_level

    def with_token(self, token: str, token_id: int) -> Tokenizer:
        """A copy that also knows the special token ``token`` under ``token_id``.

        Raises:
            TokenizerError: the id or the text is taken.
        """
        known = self.token_id(token)
        if known == token_id:
            return self
        if known is not None or token_id in self._added_text or token_id < self._backend.size:
            raise TokenizerError(f"cannot add {token!r} as id {token_id}: the text or the id is taken; use a free id")
        return Tokenizer(self._backend, self._config, {**self._added, token: token_id}, self.legacy)

    def save(self, directory: str | Path) -> None:
        """Write a directory that :meth:`load` and transformers' ``AutoTokenizer`` can read."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self._backend.write(directory, self)
        named = {"bos_token": self.bos_id, "eos_token": self.eos_id, "unk_token": self.unk_id, "pad_token": self.pad_id}
        tokens = {key: self._token_text(i) for key, i in named.items() if i is not None}
        specials = {str(i): _added_token(text, i) for text, i in self.special_tokens.items()}
        config = {
            "tokenizer_class": self._backend.transformers_class,
            "add_bos_token": self.bos_id is not None,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            **{key: value for key, value in self._config.items() if key not in NAMED},
            **tokens,
            "added_tokens_decoder": {**self._config.get("added_tokens_decoder", {}), **specials},
            "legacy": self.legacy,
        }
        _write_json(directory / "tokenizer_config.json", config)
        _write_json(directory / "special_tokens_map.json", tokens)
        if self._added:
            _write_json(directory / "added_tokens.json", self._added)

    def _named_id(self, key: str) -> int | None:
        token = self._config.get(key)
        found = self.token_id(token) if token else None
        return self._backend.default_id(key) if found is None else found

    def _token_text(self, token_id: int) -> str:
        return self._added_text[token_id] if token_id in self._added_text else self._backend.piece(token_id)

    def _decode_run(self, run: list[int], prefixed: bool) -> str:
        text = self._backend.decode(run) if run else ""
        return text[1:] if prefixed and self._backend.has_prefix and text.startswith(" ") else text


class _SentencePiece:
    """A sentencepiece model, with and without its dummy prefix."""

    file_name = "tokenizer.model"
    byte_level = False
    transformers_class = "LlamaTokenizer"

    def __init__(self, path: Path):
        self.added: dict[str, int] = {}
        self._model = path.read_bytes()
        try:
            self._prefixed = sentencepiece.SentencePieceProcessor(model_proto=self._model)
            self._bare = sentencepiece.SentencePieceProcessor(model_proto=self._model + NO_DUMMY_PREFIX)
        except (RuntimeError, OSError, ValueError) as error:
            raise TokenizerError(f"{path} is no sentencepiece model{_lfs_hint(self._model)}: {error}") from error
        self.size: int = self._bare.vocab_size()
        self.has_prefix: bool = self._prefixed.normalize("a").startswith(SPACE)
        self._tables = self._length_tables()

    def _length_tables(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Characters that each piece covers, so that starts are a running sum instead of a tuple a token.

        Right only where normalization keeps every character and no text is unknown (byte fallback), as in LLaMA.

        Returns:
            ``(lengths, offsets)``, both (vocabulary,) int64: ``starts = cumsum(lengths[ids]) - offsets[ids]``.
        """
        probe = " a  b \ufb01 \uff21\u0301\t "  # a ligature, a wide letter, a combining accent, spaces at every place
        ids = list(range(self.size))
        is_byte = np.array([self._bare.is_byte(i) for i in ids])
        if self._bare.normalize(probe) != probe.replace(" ", SPACE) or np.count_nonzero(is_byte) != 256:
            return None
        pieces = self._bare.id_to_piece(ids)
        lengths = np.array([len(piece) for piece in pieces], dtype=np.int64)
        # The first byte of a character stands for all of it; a continuation byte (0b10......) lies one back.
        continues = np.zeros(self.size, dtype=np.int64)
        continues[is_byte] = [int(pieces[i][1:-1], 16) & 0xC0 == 0x80 for i in np.flatnonzero(is_byte)]
        lengths[is_byte] = 1 - continues[is_byte]
        return lengths, lengths + continues

    def encode(self, text: str, prefix: bool) -> tuple[list[int], list[int]]:
        model = self._prefixed if prefix else self._bare
        if self._tables is None:
            found = model.encode_as_offset_mapping(text)
            return found["ids"], [start for start, _ in found["offsets"]]
        lengths, offsets = self._tables
        ids: list[int] = model.encode(text)
        places = np.array(ids)
        starts = lengths[places].cumsum() - offsets[places]
        if prefix and self.has_prefix:
            starts = np.maximum(starts - 1, 0)
        return ids, starts.tolist()

    def decode(self, ids: list[int]) -> str:
        return self._bare.decode(ids)

    def piece_id(self, token: str) -> int | None:
        found = self._bare.piece_to_id(token)
        return None if found == self._bare.unk_id() and token != self.piece(found) else found

    def piece(self, token_id: int) -> str:
        return self._bare.id_to_piece(token_id)

    def default_id(self, key: str) -> int | None:
        found = getattr(self._bare, key.removesuffix("_token") + "_id")()
        return None if found < 0 else found

    def write(self, directory: Path, tokenizer: Tokenizer) -> None:
        """The model as it is, and as a tokenizer.json: transformers 5 gets other ids from the model alone."""
        (directory / self.file_name).write_bytes(self._model)
        if self._tables is None:
            return
        made = self._as_json(tokenizer)
        probe = "A chat between a curious user and an AI assistant.\n\nWhat   is it?  h\u00e9 \u4f60\u597d"
        bare = tokenizers.Tokenizer.from_str(json.dumps({**made, "post_processor": None}))
        if bare.encode(probe).ids == self._prefixed.encode(probe):  # not so for a unigram model
            _write_json(directory / _Fast.file_name, made)

    def _as_json(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """The same tokenizer as a tokenizer.json: BPE whose merges are ranked by the scores of what they make."""
        pieces = {self.piece(i): i for i in range(self.size)}
        ranked = [
            (-self._bare.get_score(i), k, f"{piece[:k]} {piece[k:]}")
            for piece, i in pieces.items()
            if not (self._bare.is_control(i) or self._bare.is_unknown(i) or self._bare.is_byte(i))
            for k in range(1, len(piece))
            if piece[:k] in pieces and piece[k:] in pieces
        ]
        space = {"pattern": {"String": " "}, "content": SPACE}
        prepend = [{"type": "Prepend", "prepend": SPACE}] if self.has_prefix else []
        legacy = {"type": "Sequence", "normalizers": [*prepend, {"type": "Replace", **space}]}
        scheme = "first" if self.has_prefix else "never"  # only the first text gets the prefix
        modern = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False}
        strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if self.has_prefix else []
        back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
        text, bos = {"Sequence": {"id": "A", "type_id": 0}}, tokenizer.decode([tokenizer.bos_id or 0], False)
        start = {"SpecialToken": {"id": bos, "type_id": 0}}
        template = {
            "type": "TemplateProcessing",
            "single": [start, text],
            "pair": [start, text, start, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}},
        }
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [_added_token(t, i) | {"id": i} for t, i in tokenizer.special_tokens.items()],
            "normalizer": legacy if tokenizer.legacy else None,
            "pre_tokenizer": None if tokenizer.legacy else modern,
            "post_processor": None if tokenizer.bos_id is None else template,
            "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
            "model": {
                "type": "BPE",
                "unk_token": self.piece(self._bare.unk_id()),
                "fuse_unk": True,
                "byte_fallback": True,
                "vocab": pieces,
                "merges": [merge for _, _, merge in sorted(ranked, key=lambda rank: rank[:2])],
            },
        }


class _Fast:
    """A tokenizer.json, without its added tokens, post-processor and dummy prefix: the caller puts those in."""

    file_name = "tokenizer.json"
    transformers_class = "PreTrainedTokenizerFast"

    def __init__(self, path: Path):
        raw = path.read_bytes()
        try:
            self._spec = json.loads(raw)
            self.added = {token["content"]: int(token["id"]) for token in self._spec.get("added_tokens") or []}
            bare = copy.deepcopy(self._spec)
            bare.update(added_tokens=[], post_processor=None, truncation=None, padding=None)
            bare["normalizer"] = _without_prefix(bare.get("normalizer"))
            bare["pre_tokenizer"] = _without_prefix(bare.get("pre_tokenizer"))
            bare["decoder"] = _without_prefix(bare.get("decoder"))
            _hide_tokens(self.added, bare["model"])
            self._bare = tokenizers.Tokenizer.from_str(json.dumps(bare))
        except Exception as error:  # the library raises plain Exception for what it cannot parse
            raise TokenizerError(f"{path} is no tokenizer.json{_lfs_hint(raw)}: {error}") from error
        self.has_prefix = any(bare[part] != self._spec.get(part) for part in ("normalizer", "pre_tokenizer"))
        self.byte_level = "'ByteLevel'" in str(bare.get("decoder"))
        self.size: int = max(self._bare.get_vocab(with_added_tokens=False).values(), default=-1) + 1

    def encode(self, text: str, prefix: bool) -> tuple[list[int], list[int]]:
        if prefix and self.has_prefix:
            found = self._bare.encode(" " + text, add_special_tokens=False)
            return found.ids, [start - 1 if start else 0 for start, _ in found.offsets]
        found = self._bare.encode(text, add_special_tokens=False)
        return found.ids, [start for start, _ in found.offsets]

    def decode(self, ids: list[int]) -> str:
        return self._bare.decode(ids, skip_special_tokens=False)

    def piece_id(self, token: str) -> int | None:
        return self._bare.token_to_id(token)

    def piece(self, token_id: int) -> str:
        return self._bare.id_to_token(token_id) or ""

    def default_id(self, key: str) -> int | None:
        token = USUAL[key]
        if key == "unk_token":
            token = self._spec["model"].get("unk_token") or token
        return self.added[token] if token in self.added else self.piece_id(token)

    def write(self, directory: Path, tokenizer: Tokenizer) -> None:
        known = self._spec.get("added_tokens") or []
        missing = [_added_token(t, i) | {"id": i} for t, i in tokenizer.special_tokens.items() if t not in self.added]
        _write_json(directory / self.file_name, {**self._spec, "added_tokens": known + missing})


def _find(source: Path) -> Path:
    if source.is_file():
        return source
    for name in (_SentencePiece.file_name, _Fast.file_name):
        if (source / name).is_file():
            return source / name
    what = "has neither tokenizer.model nor tokenizer.json" if source.is_dir() else "does not exist"
    raise TokenizerError(f"no tokenizer: {source} {what}; give the folder that holds it, or the file itself")


def _read_config(directory: Path) -> dict[str, Any]:
    """tokenizer_config.json and its companions as one: names as plain text, every added token under ``added``."""
    config = {**_read_json(directory / "special_tokens_map.json"), **_read_json(directory / "tokenizer_config.json")}
    for key in NAMED:
        token = config.get(key)
        config[key] = token.get("content") if isinstance(token, dict) else token
    added = {t: int(i) for t, i in _read_json(directory / "added_tokens.json").items()}
    added |= {t["content"]: int(i) for i, t in (config.get("added_tokens_decoder") or {}).items()}
    return {**config, "added": added}


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TokenizerError(f"{path} is not JSON: {error}; fetch it again or remove it") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} holds a {type(value).__name__}, not an object; fetch it again or remove it")
    return value


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _added_token(text: str, token_id: int) -> dict[str, Any]:
    flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    return {"content": text, **flags, "special": True}


def _without_prefix(part: Any) -> Any:
    """A normalizer, pre-tokenizer or decoder of a tokenizer.json without what adds or strips the dummy prefix."""
    if not isinstance(part, dict):
        return part
    kind = part.get("type")
    if kind == "Prepend" or (kind == "Strip" and part.get("start") == 1 and part.get("content") == " "):
        return None
    if kind == "Sequence":
        key = next(k for k, v in part.items() if isinstance(v, list))  # normalizers, pretokenizers or decoders
        return {**part, key: [kept for kept in map(_without_prefix, part[key]) if kept is not None]}
    if kind == "Metaspace":
        never = {"prepend_scheme": "never"} if part.get("prepend_scheme", "always") != "never" else {}
        return {k: v for k, v in part.items() if k != "add_prefix_space"} | never
    if kind == "ByteLevel" and part.get("add_prefix_space"):
        return {**part, "add_prefix_space": False}
    return part


def _hide_tokens(tokens: dict[str, int], model: dict[str, Any]) -> None:
    """Take special tokens out of a model's vocabulary and merges, so that no text can give them."""
    if not isinstance(model["vocab"], dict):
        raise ValueError(f"its model {model.get('type')!r} is not BPE, WordLevel or WordPiece; use tokenizer.model")
    hidden = tokens.keys() - {model.get("unk_token")}  # unknown words still need that one
    model["vocab"] = {token: i for token, i in model["vocab"].items() if token not in hidden}
    if model.get("merges"):
        pairs = [merge if isinstance(merge, list) else merge.split(" ") for merge in model["merges"]]
        model["merges"] = [pair for pair in pairs if hidden.isdisjoint((*pair, "".join(pair)))]


def _lfs_hint(raw: bytes) -> str:
    return " (it is a Git LFS pointer; fetch the file itself)" if raw.startswith(b"version https://git-lfs") else ""
