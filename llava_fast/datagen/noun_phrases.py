"""The paper's choice of captions from CC3M by their noun phrases (section 4.1, appendix E).

Phrases that fewer than three captions hold are passed over. Then, from the rarest phrase on, the captions that hold it
are taken into the pool; of a phrase in more than a hundred captions, a hundred drawn at random. Common concepts are
thinned out that way and rare ones kept: CC3M's 3 million captions come to some 595,000.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from random import Random

from llava_fast.errors import ConfigError

FEWEST, MOST = 3, 100


def choose(phrases: Iterable[Iterable[str]], *, fewest: int = FEWEST, most: int = MOST, seed: int = 0) -> list[int]:
    """Which captions to keep.

    Args:
        phrases: the noun phrases of each caption.
        fewest: phrases in fewer captions than that are passed over.
        most: captions taken for one phrase.

    Returns:
        places of captions, ascending.
    """
    holders: dict[str, list[int]] = defaultdict(list)
    for place, found in enumerate(phrases):
        for phrase in set(found):
            holders[phrase].append(place)
    rng = Random(seed)
    pool: set[int] = set()
    for _, places in sorted(holders.items(), key=lambda item: (len(item[1]), item[0])):
        if len(places) >= fewest:
            pool.update(places if len(places) <= most else rng.sample(places, most))
    return sorted(pool)


def spacy_phrases(model: str, workers: int = 1) -> Callable[[Sequence[str]], Iterator[list[str]]]:
    """A function from captions to their noun phrases, in lower case and without articles, by spaCy.

    Args:
        model: one of spaCy's pipelines with a parser, by name or folder.

    Raises:
        ConfigError: spaCy or the pipeline is not installed.
    """
    try:
        import spacy

        pipeline = spacy.load(model, exclude=["ner"])
    except ImportError as error:
        raise ConfigError("the filter finds noun phrases with spaCy: pip install 'llava-fast[cc3m]'") from error
    except OSError as error:
        raise ConfigError(f"spaCy has no {model!r}: python -m spacy download en_core_web_sm") from error

    def phrases(captions: Sequence[str]) -> Iterator[list[str]]:
        for doc in pipeline.pipe(captions, batch_size=512, n_process=workers):
            yield [_plain(chunk) for chunk in doc.noun_chunks]

    return phrases


def _plain(chunk: Iterable) -> str:
    return " ".join(token.lower_ for token in chunk if token.pos_ != "DET")
