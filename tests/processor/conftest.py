"""A small LLaMA-like sentencepiece model, trained on the spot, for tests that need no real data."""

from __future__ import annotations

from pathlib import Path

import pytest
import sentencepiece

TEXT = (
    "a chat between curious user and an artificial intelligence assistant the gives helpful detailed polite answers to "
    "questions what is in this image there are two cats on red couch USER ASSISTANT Human Assistant INST SYS ### :"
)
WORDS = TEXT.split()
CORPUS = [" ".join(WORDS[i:] + WORDS[:i]) + f". What is {i}? A cat, {i * 7} dogs!" for i in range(len(WORDS))]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Path of a tokenizer.model: BPE of 400 pieces with byte fallback and no normalization, as LLaMA's."""
    prefix = tmp_path_factory.mktemp("tiny") / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 3),
        model_prefix=str(prefix),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.99,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    return prefix.with_suffix(".model")
