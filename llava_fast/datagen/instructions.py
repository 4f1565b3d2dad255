"""What instructions ask for: the root verb and its noun where spaCy is installed, else how they begin."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

SPACY_MODEL = "en_core_web_sm"
Pairs = Counter[tuple[str, str]]

# Words between a question's opening and what it is about.
_FILLERS = frozenset(
    re.findall(
        r"\w+",
        """
        a an the this that these those is are was were be being been do does did can could would will might
        may must should has have had there it its of in on at to for with about and or me you i we they he
        she his her their your my please some any one more most very also not so as by from into what which
        who how many much where when why
        """,
    )
)


def parser() -> Any | None:
    """spaCy's small English pipeline, None where it is not installed."""
    try:
        import spacy

        return spacy.load(SPACY_MODEL, exclude=["ner"])
    except (ImportError, OSError):
        return None


def verb_nouns(questions: Iterable[str], pipeline: Any) -> Pairs:
    """How often each (root verb, noun) occurs: the noun is the verb's object, or its subject where that is none."""
    found: Pairs = Counter()
    for doc in pipeline.pipe(questions, batch_size=256):
        pair = next((pair for sentence in doc.sents if (pair := _root_pair(sentence.root))), None)
        if pair:
            found[pair] += 1
    return found


def _root_pair(root: Any) -> tuple[str, str] | None:
    if root.pos_ not in ("VERB", "AUX"):
        return None
    for roles in (("dobj", "obj", "attr"), ("nsubj", "nsubjpass"), ("pobj",)):
        for token in root.subtree if roles == ("pobj",) else root.children:
            if token.dep_ in roles and token.pos_ in ("NOUN", "PROPN"):
                return root.lemma_.lower(), token.lemma_.lower()
    return None


def openings(questions: Iterable[str]) -> Pairs:
    """How often each (first word, first telling word after it) occurs; no parser is needed."""
    found: Pairs = Counter()
    for question in questions:
        words = re.findall(r"[a-z']+", question.lower())
        if words:
            first = " ".join(words[:2]) if words[:2] in (["how", "many"], ["how", "much"]) else words[0]
            rest = words[len(first.split()) :]
            found[first, next((word for word in rest if word not in _FILLERS), "...")] += 1
    return found
