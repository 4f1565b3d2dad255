"""Tokenizer against sentencepiece's own offsets, transformers' tokenizers and the tokenizers library."""

from __future__ import annotations

import json
import pickle
import random
import shutil
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer as Json
from tokenizers import decoders, models, normalizers, pre_tokenizers

from llava_fast.errors import TokenizerError
from llava_fast.processor.tokenizer import Tokenizer
from tests.realdata import real_data

PIECES = [
    *(
        "a",
        "the cat",
        " ",
        "  ",
        "\n",
        "\t",
        ".",
        "</s>",
        "<s>",
        "<unk>",
        "<0x0A>",
        "<image>",
        "###",
        "USER:",
        "\u2581",
    ),
    *("\u00e9", "\u4f60\u597d", "\U0001f600", "\ufb01", "\x00", "e\u0301", "\uff21"),
]


def texts(count: int) -> list[str]:
    draw = random.Random(0)
    return ["".join(draw.choices(PIECES, k=draw.randint(1, 9))) for _ in range(count)]


def llama_json(model: Path, pre_tokenizer: bool) -> Json:
    """The same model for the tokenizers library: BPE whose merges are ranked by the pieces' scores."""
    sp = sentencepiece.SentencePieceProcessor(model_file=str(model))
    vocab = {sp.id_to_piece(i): i for i in range(sp.vocab_size())}
    ranked = [
        (-sp.get_score(i), len(piece[:k]), piece[:k], piece[k:])
        for piece, i in vocab.items()
        for k in range(1, len(piece))
        if piece[:k] in vocab and piece[k:] in vocab
    ]
    merges = [(left, right) for _, _, left, right in sorted(ranked, key=lambda rank: rank[:2])]
    made = Json(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if pre_tokenizer:
        made.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", "first", split=False)
    else:
        made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return made


@pytest.fixture(params=["tiny", "llama"])
def model(request: pytest.FixtureRequest, tiny_model: Path) -> Path:
    return tiny_model if request.param == "tiny" else real_data("tokenizer", "llama2_tokenizer.model")


@pytest.fixture
def tiny(tiny_model: Path) -> Tokenizer:
    return Tokenizer.load(tiny_model)


def test_ids_and_starts_are_sentencepieces_own(model: Path) -> None:
    tokenizer = Tokenizer.load(model)
    sp = sentencepiece.SentencePieceProcessor(model_file=str(model))
    for text in texts(2000):
        found = sp.encode_as_offset_mapping(text)
        assert tokenizer.encode(text, prefix=True) == (found["ids"], [begin for begin, _ in found["offsets"]])
        after_newline = sp.encode_as_offset_mapping("\n" + text)  # a newline is one byte token, so what follows is bare
        ids, starts = tokenizer.encode(text, prefix=False)
        assert ids == after_newline["ids"][2:]
        assert starts == [begin - 1 for begin, _ in after_newline["offsets"][2:]]


def test_decode_gives_the_text_back(model: Path) -> None:
    tokenizer = Tokenizer.load(model)
    for text in texts(500):
        text = text.replace("\u2581", "_")  # sentencepiece's own sign for a space cannot be told from one
        assert tokenizer.decode(tokenizer.encode(text, prefix=True)[0]) == text


def test_text_never_becomes_a_special_token(tiny: Tokenizer) -> None:
    ids, _ = tiny.encode("<s>x</s> <unk>", prefix=True)
    assert not {tiny.bos_id, tiny.eos_id, tiny.unk_id} & set(ids)
    assert tiny.encode("", prefix=True) == ([], [])


def test_decode_of_special_partial_and_unknown_ids(tiny: Tokenizer) -> None:
    cat = tiny.encode("a cat", prefix=True)[0]
    ids = [1, *cat, tiny.eos_id, -200, 10**6]
    assert tiny.decode(ids) == "a cat"
    assert tiny.decode(ids, skip_special=False) == "<s>a cat</s>"
    half = tiny.encode("\U0001f600", prefix=False)[0][:2]
    assert set(tiny.decode(half)) == {"\ufffd"}


def test_a_model_that_normalizes_still_gets_right_starts(tmp_path: Path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat", "find a fine cat"] * 20),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=2,
    )  # NFKC, extra spaces removed, no byte fallback
    tokenizer = Tokenizer.load(tmp_path)
    ids, starts = tokenizer.encode("the  \ufb01ne   cat", prefix=True)
    assert tokenizer.decode(ids) == "the fine cat"
    assert starts[0] == 0 and starts == sorted(starts)
    assert any(start >= 7 for start in starts) and max(starts) < len("the  \ufb01ne   cat")


@pytest.mark.parametrize("metaspace", [False, True])
def test_json_agrees_with_the_model_it_was_made_from(model: Path, metaspace: bool, tmp_path: Path) -> None:
    llama_json(model, metaspace).save(str(tmp_path / "tokenizer.json"))
    ours, reference = Tokenizer.load(tmp_path), Tokenizer.load(model)
    assert (ours.bos_id, ours.eos_id, ours.unk_id, ours.pad_id, ours.vocab_size) == (
        *(reference.bos_id, reference.eos_id, reference.unk_id, reference.pad_id, reference.vocab_size),
    )
    for text in texts(400):
        for prefix in (True, False):
            assert ours.encode(text, prefix=prefix) == reference.encode(text, prefix=prefix), (text, prefix)
        ids, _ = reference.encode(text, prefix=True)
        assert ours.decode(ids) == reference.decode(ids)


@pytest.mark.parametrize("kind", ["whitespace", "bytelevel"])
def test_simple_json_has_no_prefix(kind: str, tmp_path: Path) -> None:
    words = ["<unk>", "<s>", "</s>", "<image>", "what", "is", "this", "?"]
    if kind == "whitespace":
        made = Json(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:
        letters = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        made = Json(models.BPE(letters, []))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>", "<image>"])
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    text = "what is </s> this <image>"
    ids, starts = tokenizer.encode(text, prefix=True)
    assert (ids, starts) == tokenizer.encode(text, prefix=False)
    assert not {tokenizer.bos_id, tokenizer.eos_id, tokenizer.token_id("<image>")} & set(ids)
    if kind == "whitespace":
        assert (ids, starts) == ([4, 5, 0, 6, 0], [0, 5, 8, 13, 18])
        assert tokenizer.decode([1, 4, 5, 6, 2]) == "what is this"
    else:
        assert tokenizer.decode(ids) == text and starts == list(range(len(text)))
    assert tokenizer.token_id("<image>") == made.token_to_id("<image>")


def test_added_tokens_and_config_are_read(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_model, tmp_path / "tokenizer.model")
    (tmp_path / "added_tokens.json").write_text('{"[PAD]": 400, "<im_patch>": 401}')
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": {"content": "[PAD]"}, "bos_token": ""}')
    (tmp_path / "tokenizer_config.json").write_text('{"legacy": false, "model_max_length": 2048}')
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (1, 2, 400, 402)
    assert not tokenizer.legacy and Tokenizer.load(tmp_path, legacy=True).legacy
    assert tokenizer.token_id("<im_patch>") == 401 and tokenizer.token_id("absent") is None
    assert 401 not in tokenizer.encode("<im_patch>", prefix=True)[0]
    assert tokenizer.decode([400, 401], skip_special=False) == "[PAD]<im_patch>"
    tokenizer.save(tmp_path / "again")
    again = Tokenizer.load(tmp_path / "again")
    assert (again.special_tokens, again.pad_id, again.legacy) == (tokenizer.special_tokens, 400, False)
    assert json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())["model_max_length"] == 2048


def test_with_token(tiny: Tokenizer) -> None:
    more = tiny.with_token("<image>", 400)
    assert more.token_id("<image>") == 400 and more.vocab_size == 401 and tiny.token_id("<image>") is None
    assert more.with_token("<image>", 400) is more
    for token, token_id in (("<image>", 401), ("<other>", 400), ("<other>", 5), ("</s>", 402)):
        with pytest.raises(TokenizerError, match="taken"):
            more.with_token(token, token_id)


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("with_config", [True, False])
@pytest.mark.parametrize("form", ["model", "json"])
def test_transformers_loads_what_save_writes(
    tiny_model: Path, form: str, with_config: bool, legacy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    source = tiny_model
    if form == "json":
        source = tmp_path / "tokenizer.json"
        llama_json(tiny_model, False).save(str(source))
    ours = Tokenizer.load(source, legacy=legacy).with_token("<image>", 400)
    ours.save(tmp_path / "saved")
    if with_config:  # then transformers 5 takes tokenizer.json as it stands; without it, it rebuilds LlamaTokenizer
        (tmp_path / "saved" / "config.json").write_text('{"model_type": "llava"}')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in (
        "A cat.",
        "two  cats   on\n\n  a    couch  ",
        "What is this?\nTwo cats, h\u00e9 \u4f60 \U0001f600.",
        "a red couch: 7 dogs!",
    ):
        ids = ours.encode(text, prefix=True)[0]
        assert theirs(text, add_special_tokens=False).input_ids == ids
        assert theirs.decode(ids) == text
        if form == "model":
            assert theirs(text).input_ids == [1, *ids]
    assert theirs.convert_tokens_to_ids("<image>") == 400
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (ours.bos_id, ours.eos_id, ours.pad_id)
    assert len(theirs) == ours.vocab_size


def test_transformers_ids_of_a_saved_llama_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    ours = Tokenizer.load(real_data("tokenizer", "llama2_tokenizer.model"))
    ours.save(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in texts(300):
        if not any(special in text for special in ours.special_tokens):  # transformers parses those
            assert theirs(text).input_ids == [1, *ours.encode(text, prefix=True)[0]], text


def test_save_and_load_again(model: Path, tmp_path: Path) -> None:
    before = Tokenizer.load(model, legacy=False)
    before.save(tmp_path / "a" / "b")
    after = Tokenizer.load(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b" / "tokenizer.model").read_bytes() == model.read_bytes()
    assert (after.legacy, after.special_tokens, after.vocab_size) == (False, before.special_tokens, before.vocab_size)


def test_a_tokenizer_crosses_process_borders(tiny: Tokenizer) -> None:
    copy = pickle.loads(pickle.dumps(tiny))
    assert copy.encode("a cat \u4f60", prefix=True) == tiny.encode("a cat \u4f60", prefix=True)


def test_errors_name_cause_and_cure(tiny: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="does not exist"):
        Tokenizer.load(tmp_path / "nowhere")
    with pytest.raises(TokenizerError, match=r"neither tokenizer\.model nor tokenizer\.json"):
        Tokenizer.load(tmp_path)
    for name, content in (
        ("tokenizer.json", "{}"),
        ("tokenizer.model", "version https://git-lfs.github.com/spec/v1\n"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(TokenizerError, match="LFS" if name.endswith("model") else r"tokenizer\.json"):
            Tokenizer.load(tmp_path)
    with pytest.raises(TokenizerError, match=r"character 2 .*surrogate"):
        tiny.encode("ab\ud83d", prefix=True)
    (tmp_path / "tokenizer_config.json").write_text("{")
    (tmp_path / "tokenizer.model").unlink()
    Json(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match="not JSON"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(TokenizerError, match="end-of-sequence"):
        Tokenizer.load(tmp_path)
