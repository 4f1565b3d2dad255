"""Stage-1 data: pictures with a caption each, asked for with a brief instruction (section 4.1 of the paper)."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

from tqdm import tqdm

from llava_fast.data.scenes import CAPTION_REQUESTS
from llava_fast.datagen.built_in import draw_scenes
from llava_fast.datagen.noun_phrases import FEWEST, MOST, choose, spacy_phrases
from llava_fast.datagen.options import add_sources, read_sources
from llava_fast.datagen.pictures import Picture, read_pictures
from llava_fast.datagen.prompting import BUILT_IN, read_questions
from llava_fast.datagen.samples import ArrayFile, make_sample
from llava_fast.errors import ConfigError

TELLING = 3  # of a scene's five captions, the first three name its shapes


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m llava_fast.datagen captions",
        description="Stage-1 data in the LLaVA JSON: a brief instruction drawn from a list, a caption as the answer, "
        "picture before or after the question at random (equation 2).",
    )
    source = parser.add_argument_group("pictures")
    source.add_argument(
        "--cc3m", type=Path, metavar="FILE", help="CC3M's list (caption TAB address), or JSON of {'image', 'caption'}"
    )
    source.add_argument(
        "--image-name", default="GCC_train_{:09d}.jpg", help="of the n-th line of CC3M's list (default %(default)s)"
    )
    add_sources(source)
    source.add_argument("--images", type=Path, metavar="DIR", help="leave out pictures that are not in this folder")
    choice = parser.add_argument_group("choice of captions", "by noun phrases, as the paper chose 595K from CC3M")
    choice.add_argument("--noun-phrases", action="store_true", help="choose that way (needs spaCy)")
    choice.add_argument("--spacy-model", default="en_core_web_sm", help="spaCy's pipeline (default %(default)s)")
    choice.add_argument("--fewest", type=int, default=FEWEST, help="captions of a phrase that counts (default 3)")
    choice.add_argument("--most", type=int, default=MOST, help="captions taken for a phrase (default 100)")
    choice.add_argument("--workers", type=int, default=1, help="processes of spaCy (default %(default)s)")
    parser.add_argument("--questions", type=Path, help="file of instructions, one a line (default: the built-in list)")
    parser.add_argument("--every-caption", action="store_true", help="a sample for each caption, not for one drawn")
    parser.add_argument("--seed", type=int, default=0, help="of all draws (default %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file")
    return parser


def main(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    pairs = [pair for picture in pictures_of(args) for pair in captions_of(picture, args)]
    total = len(pairs)
    if args.noun_phrases:
        pairs = choose_pairs(pairs, args)
    questions = questions_of(args)
    with ArrayFile(args.out) as file:
        for picture, caption in pairs:
            file.add(make_sample(picture, "caption", [("", caption)], args.seed, questions))
    print(f"{file.count:,} of {total:,} captions in {args.out}")
    return 0


def pictures_of(args: argparse.Namespace) -> list[Picture]:
    """The pictures that are there.

    Raises:
        ConfigError: no source, one that cannot be read, or nothing in it.
    """
    pictures = list(read_cc3m(args.cc3m, args.image_name))[: args.limit] if args.cc3m else read_sources(args)
    if args.scenes:
        draw_scenes(args.out.parent, args.scenes, args.scene_seed)
    if args.images:
        pictures = [picture for picture in pictures if (args.images / picture.image).is_file()]
    if not pictures:
        raise ConfigError("no pictures: check the source, and --images where it is given")
    return pictures


def read_cc3m(path: Path, image_name: str) -> Iterator[Picture]:
    """CC3M's list, whose n-th line (from 0) is the picture ``image_name.format(n)``, or JSON rows.

    Raises:
        ConfigError: the file cannot be read, or a line has no caption.
    """
    if path.suffix != ".tsv":
        yield from read_pictures(path)
        return
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for number, columns in enumerate(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)):
                if not columns or not columns[0].strip():
                    raise ConfigError(f"{path}, line {number + 1}: no caption; a line is caption TAB address")
                yield Picture(f"GCC_train_{number:09d}", image_name.format(number), (columns[0].strip(),))
    except OSError as error:
        raise ConfigError(f"--cc3m {path}: {error.strerror}; give CC3M's list of captions") from error


def captions_of(picture: Picture, args: argparse.Namespace) -> list[tuple[Picture, str]]:
    texts = picture.captions[:TELLING] if args.scenes else picture.captions
    if not args.every_caption:
        return [(picture, Random(f"{args.seed}/{picture.id}").choice(texts))]
    numbered = [Picture(f"{picture.id}-{n}", picture.image, picture.captions) for n in range(len(texts))]
    return list(zip(numbered, texts, strict=True))


def choose_pairs(pairs: Sequence[tuple[Picture, str]], args: argparse.Namespace) -> list[tuple[Picture, str]]:
    phrases = spacy_phrases(args.spacy_model, args.workers)([caption for _, caption in pairs])
    watched = tqdm(phrases, total=len(pairs), desc="noun phrases", unit="caption", dynamic_ncols=True)
    return [pairs[n] for n in choose(watched, fewest=args.fewest, most=args.most, seed=args.seed)]


def questions_of(args: argparse.Namespace) -> Sequence[str]:
    if args.scenes and not args.questions:
        return CAPTION_REQUESTS
    return read_questions(args.questions or BUILT_IN / "brief_questions.txt")
