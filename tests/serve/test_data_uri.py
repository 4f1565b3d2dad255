"""data: URIs against Python's own base64, and what browsers mend and this does not."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

import llava_fast.serve.data_uri as data_uri
from llava_fast.errors import ImageError
from llava_fast.serve.data_uri import decode_data_uri


def uri(data: bytes, head: str = "data:image/png;base64,") -> str:
    return head + base64.b64encode(data).decode()


@given(st.binary(max_size=200))
def test_any_bytes_come_back(data: bytes):
    assert decode_data_uri(uri(data), max_bytes=200) == data


@pytest.mark.parametrize("length", range(40))
def test_steps_change_nothing(length: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(data_uri, "_STEP", 8)
    assert decode_data_uri(uri(bytes(range(length))), 100) == bytes(range(length))


@pytest.mark.parametrize(
    "head",
    [
        "data:image/jpeg;base64,",
        "DATA:Image/X-MS-bmp;BASE64,",
        "data:image/webp;name=cat.webp;base64,",
        "data:image/png;charset=utf-8;base64,",
    ],
)
def test_heads(head: str):
    assert decode_data_uri(uri(b"abc", head), 3) == b"abc"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "data:",
        "data:,abc",
        "data:image/png,abc",
        "data:image/png;base64",
        " data:image/png;base64,AAAA",
        "data:;base64,AAAA",
        "data:text/html;base64,AAAA",
        "data:application/pdf;base64,AAAA",
        "data:image/svg+xml;base64,AAAA",
        "data:image/SVG;base64,AAAA",
        "data:image/;base64,AAAA",
        "data:image/png;base64;base64,AAAA",
        "data:image/png\n;base64,AAAA",
        "data:image/png;base64,AAA",
        "data:image/png;base64,A",
        "data:image/png;base64,AA=",
        "data:image/png;base64,AA==AAAA",
        "data:image/png;base64,=AAA",
        "data:image/png;base64,====",
        "data:image/png;base64,AA%3D%3D",
        "data:image/png;base64,AAAA\n",
        "data:image/png;base64,AA AA",
        "data:image/png;base64,AA-_",
        "data:image/png;base64,AAA\u00e4",
        "data:image/png;base64,AAA\ud800",
        "data:image/png;base64,AAAA#",
        "data:" + "x" * 100_000,
        "data:image/png;" + "a=b;" * 100_000 + "base64,AAAA",
    ],
)
def test_what_is_refused(text: str):
    with pytest.raises(ImageError) as refused:
        decode_data_uri(text, 1000)
    assert "AAA" not in str(refused.value)
    assert len(str(refused.value)) < 200


def test_padding_in_the_middle_where_a_step_ends(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(data_uri, "_STEP", 4)
    with pytest.raises(ImageError, match="not valid base64"):
        decode_data_uri("data:image/png;base64,AA==AAAA", 1000)


@pytest.mark.parametrize("length", [98, 99, 100, 101, 102, 103])
def test_the_limit_is_exact_and_judged_before_decoding(length: int, monkeypatch: pytest.MonkeyPatch):
    text = uri(bytes(length))
    if length <= 100:
        assert len(decode_data_uri(text, 100)) == length
        return
    monkeypatch.setattr(data_uri.base64, "b64decode", None)
    with pytest.raises(ImageError, match=f"has {length} bytes, over the limit of 100"):
        decode_data_uri(text, 100)
