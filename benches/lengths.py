"""Real sample lengths, drawn with seed 0 and counted with the LLaMA-2 tokenizer under the v1 template.

Each row: (tokens of the prompt without image rows, supervised tokens, images).
"""

LCS_558K = [  # stage-1 captions
    *((48, 11, 1), (52, 31, 1), (45, 13, 1), (53, 9, 1), (51, 14, 1), (54, 13, 1), (53, 16, 1), (51, 17, 1)),
    *((52, 17, 1), (50, 13, 1), (53, 11, 1), (51, 13, 1), (55, 10, 1), (45, 17, 1), (50, 11, 1), (54, 11, 1)),
    *((53, 14, 1), (55, 8, 1), (52, 21, 1), (51, 15, 1), (52, 13, 1), (51, 11, 1), (55, 11, 1), (46, 28, 1)),
]
SCIENCEQA_PICTURE = [  # reasoning first where the problem has one
    *((96, 9, 1), (160, 9, 1), (107, 436, 1), (248, 9, 1), (79, 9, 1), (75, 9, 1), (89, 9, 1), (262, 9, 1)),
    *((254, 9, 1), (146, 9, 1), (246, 9, 1), (77, 175, 1), (86, 100, 1), (96, 234, 1), (96, 9, 1), (307, 380, 1)),
]
SCIENCEQA_TEXT = [
    *((111, 407, 0), (105, 124, 0), (77, 336, 0), (99, 476, 0), (254, 185, 0), (103, 302, 0), (79, 247, 0)),
    *((74, 231, 0), (115, 283, 0), (168, 152, 0), (97, 360, 0), (85, 232, 0), (99, 455, 0), (144, 146, 0)),
]


def mixed(count: int) -> list[tuple[int, int, int]]:
    """``count`` rows: half captions, a quarter problems with a picture, a quarter without."""
    quarter = count // 4
    return LCS_558K[: count - 2 * quarter] + SCIENCEQA_PICTURE[:quarter] + SCIENCEQA_TEXT[:quarter]
