"""Every sampling setting against the model's own logits of the whole sequence, worked out apart from the engine."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import llava_fast as lf
from tests.engine.conftest import IMAGE, VOCAB, picture, prompt, question
from tests.kernels.test_sample import allowed, assert_distributed

BAN = float("-inf")
TOKEN_BYTES = 2 * 2 * 2 * 16 * 4  # in the cache: keys and values, layers, heads, head size, float32
PIECES = range(259, 400)  # ids that are pieces of words: no bytes, no special tokens
WORDS_ALONE = {token: BAN for token in range(VOCAB) if token not in PIECES}


@pytest.fixture(scope="module")
def engine(pair):
    with pair.engine() as engine:
        yield engine


def run(engine: lf.Engine, ids: list[int], images=(), **settings) -> lf.Completion:
    sampling = lf.SamplingParams(**{"max_tokens": 12, "ignore_eos": True, **settings})
    return engine.submit(lf.Request(token_ids=ids, images=images, sampling=sampling)).result()


@torch.inference_mode()
def logits_of(pair, ids: list[int], images=(), answer=()) -> np.ndarray:
    """(len(answer) + 1, V) float64: what each token of the answer, and the one after it, is drawn from."""
    batch = pair.processor.collate([pair.processor.prompt_of_ids([*ids, *answer], list(images))])
    return pair.model.logits(batch)[-len(answer) - 1 :].double().numpy()


TEXT = prompt(np.random.default_rng(1), 11)
PICTURE = picture(np.random.default_rng(2))
SEEING = [1, 9, IMAGE, 30, 40]


@pytest.mark.parametrize("ids, images", [(TEXT, []), (SEEING, [PICTURE])], ids=["text", "image"])
def test_greedy_is_the_largest_logit(pair, engine, ids, images):
    tokens = run(engine, ids, images).token_ids
    assert tokens == logits_of(pair, ids, images, tokens[:-1]).argmax(-1).tolist()


def test_biases_are_added_and_bans_hold(pair, engine):
    plain = run(engine, TEXT).token_ids
    bias = {plain[0]: BAN, 50: 2.0, 60: -3.0, 70: 1.5}
    tokens = run(engine, TEXT, logit_bias=bias).token_ids
    logits = logits_of(pair, TEXT, answer=tokens[:-1])
    for token, value in bias.items():
        logits[:, token] += value
    assert tokens == logits.argmax(-1).tolist() and tokens != plain and plain[0] not in tokens
    assert set(run(engine, TEXT, logit_bias={77: 1e4}, temperature=1.0).token_ids) == {77}


PENALTIES = [
    {"repetition_penalty": 1.8},
    {"repetition_penalty": 0.6},
    {"presence_penalty": 3.0},
    {"frequency_penalty": 1.1},
    {"frequency_penalty": -2.0},
    {"repetition_penalty": 1.3, "presence_penalty": 0.7, "frequency_penalty": 0.4},
]


@pytest.mark.parametrize("penalties", PENALTIES, ids=str)
def test_penalties_step_by_step(pair, penalties):
    """Also while answers give way and begin again, and with others in the batch that have no penalties."""
    requests = [
        lf.Request(
            token_ids=[*TEXT[:-1], 20 + i],
            sampling=lf.SamplingParams(max_tokens=24, ignore_eos=True, **(penalties if i % 2 == 0 else {})),
        )
        for i in range(6)
    ]
    with pair.engine(block_size=8, kv_cache_bytes=15 * 8 * TOKEN_BYTES, max_step_tokens=20, max_sequences=6) as engine:
        completions = engine.generate(requests)
        assert engine.stats().preemptions
    changed = 0
    for request, completion in zip(requests, completions, strict=True):
        tokens = completion.token_ids
        logits = logits_of(pair, request.token_ids, answer=tokens[:-1])
        changed += tokens != logits.argmax(-1).tolist()
        for step, (token, row) in enumerate(zip(tokens, logits, strict=True)):
            assert token == penalized(row, request, tokens[:step]).argmax()
    assert changed


def penalized(row: np.ndarray, request: lf.Request, answer: list[int]) -> np.ndarray:
    row, settings = row.copy(), request.sampling
    for token in {*request.token_ids, *answer} - {IMAGE}:
        row[token] = (
            row[token] / settings.repetition_penalty if row[token] > 0 else row[token] * settings.repetition_penalty
        )
    for token in set(answer):
        row[token] -= settings.presence_penalty + settings.frequency_penalty * answer.count(token)
    return row


# ---- where an answer ends


def test_nothing_ends_an_answer_before_min_tokens(pair, engine):
    end = pair.processor.tokenizer.eos_id
    settings = {"ignore_eos": False, "logit_bias": {end: 50.0, 33: 40.0}, "stop_token_ids": (33,)}
    assert run(engine, TEXT, **settings).token_ids == [end]
    done = run(engine, TEXT, min_tokens=5, **settings)
    assert len(done.token_ids) == 6 and done.token_ids[-1] == end and done.finish_reason == "stop"
    logits = logits_of(pair, TEXT, answer=done.token_ids[:4])
    logits[:, [end, 33]] = BAN
    assert done.token_ids[:5] == logits.argmax(-1).tolist()


def test_end_of_text_and_stop_ids(pair, engine):
    end, plain = pair.processor.tokenizer.eos_id, run(engine, TEXT)
    third = plain.token_ids[2]
    assert third not in plain.token_ids[:2]
    stopped = run(engine, TEXT, stop_token_ids=(third,))
    assert stopped.token_ids == plain.token_ids[:3] and stopped.finish_reason == "stop"
    assert stopped.text == pair.processor.tokenizer.decode(plain.token_ids[:2])  # it is no part of the text
    on = run(engine, TEXT, logit_bias={end: 50.0}, max_tokens=4)
    assert on.token_ids == [end] * 4 and on.finish_reason == "length" and on.text == ""


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_text_across_tokens_ends_the_answer_and_is_never_shown_in_part(pair, engine, include):
    settings = {"max_tokens": 30, "logit_bias": WORDS_ALONE, "temperature": 1.0, "seed": 3}
    plain, decode = run(engine, TEXT, **settings), pair.processor.tokenizer.decode
    tried = 0
    for count in range(4, 24, 3):
        edge = len(decode(plain.token_ids[:count]))
        stop = plain.text[edge - 2 : edge + 2]  # two characters on each side of where a token ends
        at = plain.text.index(stop)
        needed = next(n for n in range(1, 31) if stop in decode(plain.token_ids[:n]))
        request = lf.Request(
            token_ids=TEXT,
            sampling=lf.SamplingParams(ignore_eos=True, stop=[stop, "not there"], include_stop=include, **settings),
        )
        shown = ""
        for delta in engine.submit(request):
            shown += delta.text
            assert plain.text[:at].startswith(shown) or delta.finish_reason == "stop"
        done = engine.submit(request).result()
        assert shown == done.text == plain.text[:at] + stop * include
        assert done.token_ids == plain.token_ids[:needed] and done.finish_reason == "stop"
        tried += 1
    assert tried == 7


def test_a_stop_text_counts_from_min_tokens_on(pair, engine):
    settings = {"max_tokens": 20, "logit_bias": {**WORDS_ALONE, 300: 100.0}}
    piece = pair.processor.tokenizer.decode([300, 300])[-1]
    assert len(run(engine, TEXT, stop=piece, **settings).token_ids) == 1
    assert len(run(engine, TEXT, stop=piece, min_tokens=7, **settings).token_ids) in (7, 8)


def test_a_full_context_ends_the_answer(pair):
    with pair.engine(max_length=30) as engine:
        for length, fits in ((11, 18), (28, 1)):
            done = run(engine, prompt(np.random.default_rng(1), length), max_tokens=100)
            assert len(done.token_ids) == fits and done.finish_reason == "length"
        assert len(run(engine, TEXT, max_tokens=5).token_ids) == 5


def test_the_template_s_stop_ends_answers_to_messages(pair, monkeypatch):
    """v0 ends a turn by a text and not by the end of text."""
    monkeypatch.setattr(pair.processor, "template", "v0")
    hashes = pair.processor.tokenizer.token_id("#")
    forced = lf.SamplingParams(max_tokens=6, logit_bias={hashes: 1e4})
    with pair.engine() as engine:
        asked = engine.submit(lf.Request(messages=question(), sampling=forced)).result()
        given = engine.submit(lf.Request(token_ids=TEXT, sampling=forced)).result()
    assert asked.text == "" and asked.finish_reason == "stop" and len(asked.token_ids) == 3
    assert given.text == "#" * 6 and given.finish_reason == "length"


# ---- draws

DRAWN = {"max_tokens": 20, "temperature": 1.3, "top_p": 0.95, "frequency_penalty": 0.3, "repetition_penalty": 1.1}


def test_answers_of_one_seed_are_the_same_again_and_differ_from_one_another(engine):
    first, again, other = (run(engine, TEXT, n=4, seed=seed, **DRAWN).outputs for seed in (5, 5, 6))
    assert [o.token_ids for o in first] == [o.token_ids for o in again]
    assert [o.index for o in first] == [0, 1, 2, 3]
    assert len({tuple(o.token_ids) for o in [*first, *other]}) == 8
    assert run(engine, TEXT, seed=5, **DRAWN).token_ids == first[0].token_ids
    free = [run(engine, TEXT, **DRAWN).token_ids for _ in range(2)]
    assert free[0] != free[1]


CROWDED = {
    "full batch": {},
    "lookahead": {"lookahead": 1},
    "two steps ahead": {"lookahead": 2},
    "chunks": {"max_step_tokens": 17},
    "preemption": {"block_size": 8, "kv_cache_bytes": 30 * 8 * TOKEN_BYTES, "lookahead": 1},
    "no prefix cache": {"prefix_caching": False},
}


@pytest.mark.parametrize("name", CROWDED)
def test_a_seed_gives_one_answer_whatever_else_is_going_on(pair, engine, name):
    requests = [
        lf.Request(
            token_ids=prompt(np.random.default_rng(i), 3 * i, i % 2),
            images=[PICTURE] * (i % 2),
            sampling=lf.SamplingParams(seed=i, n=1 + i % 3 // 2, ignore_eos=True, **DRAWN),
        )
        for i in range(14)
    ]
    with pair.engine(**CROWDED[name]) as crowded:
        together = crowded.generate(requests)
        stats = crowded.stats()
    assert (stats.preemptions > 0) == (name == "preemption")
    for request, completion in zip(requests, together, strict=True):
        alone = engine.submit(request).result()
        assert [o.token_ids for o in completion.outputs] == [o.token_ids for o in alone.outputs]


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 0.8}, {"temperature": 1.5, "top_k": 7}, {"temperature": 1.2, "top_p": 0.7, "min_p": 0.02}],
)
def test_draws_follow_the_model_s_distribution(pair, settings):
    expected = allowed(logits_of(pair, TEXT)[-1].tolist(), **settings)
    with pair.engine(max_n=1500, max_sequences=500, max_step_tokens=2048) as engine:
        outputs = run(engine, TEXT, n=1500, max_tokens=1, seed=11, **settings).outputs
    assert_distributed(torch.tensor([o.token_ids[0] for o in outputs]), expected)


# ---- log-probabilities


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return torch.from_numpy(logits).log_softmax(-1).numpy()


def assert_logprob(found: lf.engine.TokenLogprob, token: int, row: np.ndarray, k: int) -> None:
    assert found.token_id == token and abs(found.logprob - row[token]) < 1e-4
    assert [i for i, _ in found.top] == np.argsort(-row, kind="stable")[:k].tolist()
    assert np.allclose([value for _, value in found.top], np.sort(row)[::-1][:k], atol=1e-4)


def test_logprobs_are_the_model_s_before_all_settings(pair, engine):
    settings = {"temperature": 1.4, "seed": 2, "logit_bias": {50: 3.0}, "presence_penalty": 1.0}
    for k in (0, 5):
        done = run(engine, SEEING, [PICTURE], logprobs=k, **settings)
        rows = log_softmax(logits_of(pair, SEEING, [PICTURE], done.token_ids[:-1]))
        assert len(done.outputs[0].logprobs) == 12
        for found, token, row in zip(done.outputs[0].logprobs, done.token_ids, rows, strict=True):
            assert_logprob(found, token, row, k)


def test_each_request_of_a_batch_gets_the_logprobs_it_asked_for(engine):
    wanted = [None, 0, 3, None, 7]
    requests = [lf.Request(token_ids=TEXT, sampling=lf.SamplingParams(max_tokens=3, logprobs=k)) for k in wanted]
    for k, done in zip(wanted, engine.generate(requests), strict=True):
        scores = done.outputs[0].logprobs
        assert [len(s.top) for s in scores] == ([] if k is None else [k] * len(done.token_ids))


LONG = [*prompt(np.random.default_rng(8), 25), IMAGE, 50, *prompt(np.random.default_rng(9), 9), IMAGE]


@pytest.mark.parametrize("tokens", [256, 20, 17])
@pytest.mark.parametrize("cached", [True, False])
def test_prompt_logprobs(pair, tokens, cached):
    """By chunks that end within images, and with the prompt in the prefix cache already."""
    images = [PICTURE, picture(np.random.default_rng(3))]
    with pair.engine(max_step_tokens=tokens, prefix_caching=cached, block_size=8) as engine:
        plain = run(engine, LONG, images)
        done = run(engine, LONG, images, prompt_logprobs=3, n=2, temperature=1.0)
        assert plain.prompt_logprobs is None and done.cached_tokens == 0
        if cached:
            assert run(engine, LONG, images).cached_tokens > 0
    ids = pair.processor.prompt_of_ids(LONG, images).input_ids
    batch = pair.processor.collate([pair.processor.prompt_of_ids(LONG, images)])
    with torch.inference_mode():
        rows = log_softmax(pair.model.logits(batch).double().numpy())
    assert len(done.prompt_logprobs) == len(ids) and done.prompt_logprobs[0] is None
    for place in range(1, len(ids)):
        if ids[place] == IMAGE:
            assert done.prompt_logprobs[place] is None
        else:
            assert_logprob(done.prompt_logprobs[place], ids[place], rows[place - 1], 3)
