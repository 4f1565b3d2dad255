"""sample: what may be drawn, against lists sorted in float64; how often, by chi-square; Triton and the reference."""

from __future__ import annotations

import math

import pytest
import torch

import llava_kernels
from llava_kernels import library, native_sample, sample
from llava_kernels.sample import _race_times

needs_library = pytest.mark.skipif(
    library.load() is None or torch.cuda.is_available(), reason="the C library draws on CPUs, where it was built"
)
PATHS = ["reference", "triton", pytest.param("native", marks=needs_library)]
FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def settings(device, rows, **values):
    """Every value as a tensor (rows,): numbers are repeated, lists taken as they are."""
    made = {}
    for name, value in values.items():
        value = [value] * rows if isinstance(value, int | float) else value
        kind = torch.float32 if name in FLOATS else torch.int64
        made[name] = torch.as_tensor(value, dtype=kind, device=device)
    return {"seeds": torch.arange(rows, device=device), "positions": torch.zeros(rows, device=device).long()} | made


def allowed(logits, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Ids with their probabilities, for one row of logits, by sorting and adding up in float64."""
    z = sorted(((x / temperature, i) for i, x in enumerate(logits)), reverse=True)
    if 0 < top_k < len(z):
        z = [(x, i) for x, i in z if x >= z[top_k - 1][0]]
    weights = [(math.exp(x - z[0][0]), i) for x, i in z]
    if top_p < 1:
        total, mass, n = sum(w for w, _ in weights), 0.0, 0
        while mass < top_p * total or n == 0:
            mass += weights[n][0]
            n += 1
        weights = [(w, i) for w, i in weights if w >= weights[n - 1][0]]
    weights = [(w, i) for w, i in weights if w >= min_p * weights[0][0]]
    total = sum(w for w, _ in weights)
    return {i: w / total for w, i in weights}


def assert_distributed(ids, probabilities):
    """Chi-square at one in a million (Wilson and Hilferty's approximation of its quantile)."""
    observed = torch.bincount(ids.cpu(), minlength=max(probabilities) + 1).tolist()
    assert all(i in probabilities for i, count in enumerate(observed) if count)
    rare = {i for i, p in probabilities.items() if len(ids) * p < 5}  # among them the statistic is not chi-square
    assert sum(observed[i] for i in rare) <= 10 * len(rare)
    n, mass = (sum(x[i] for i in probabilities if i not in rare) for x in (observed, probabilities))
    probabilities = {i: p / mass for i, p in probabilities.items() if i not in rare}
    statistic = sum((observed[i] - n * p) ** 2 / (n * p) for i, p in probabilities.items())
    freedom = len(probabilities) - 1
    assert statistic < freedom * (1 - 2 / (9 * freedom) + 4.75 * math.sqrt(2 / (9 * freedom))) ** 3


ROW = [2.0, -1.0, 0.5, 1.9, 0.5, -3.0, 1.0, 0.0]
FILTERS = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.5},
    {"top_k": 3},
    {"top_k": 4},  # the fourth and the fifth are equal
    {"top_k": 100},
    {"top_p": 0.6},
    {"top_p": 0.88},
    {"min_p": 0.2},
    {"temperature": 1.5, "top_k": 6, "top_p": 0.9, "min_p": 0.15},
    {"temperature": 0.7, "top_k": 3, "top_p": 0.6},  # 0.6 of what top-k left, not of everything
]


@pytest.mark.parametrize("options", FILTERS, ids=str)
@pytest.mark.parametrize("way", ["seeds", "positions"])
def test_distribution(device, options, way):
    """One row of logits, once over many seeds and once over many positions of one seed."""
    rows = 20_000
    logits = torch.tensor(ROW, device=device).expand(rows, -1)
    given = settings(device, rows, **options)
    if way == "positions":
        given["positions"], given["seeds"] = given["seeds"], torch.full((rows,), 12345, device=device)
    assert_distributed(sample(logits, **given)[0], allowed(ROW, **options))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="slow in the interpreter, where it chooses as the reference")
@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_distribution_of_the_kernel(triton_path, device, options):
    rows = 20_000
    logits = torch.tensor(ROW, device=device).expand(rows, -1)
    assert_distributed(sample(logits, **settings(device, rows, **options))[0], allowed(ROW, **options))


@pytest.mark.parametrize(("seed_step", "position_step"), [(0, 1), (1, 0), (1, 1), (2**32, 0)])
def test_neighbouring_draws_are_independent(device, seed_step, position_step):
    """Pairs of draws, from neighbouring positions or seeds, fill the table of both evenly; also the high bits count."""
    rows, vocab = 30_000, 7
    logits = torch.zeros(rows, vocab, device=device)
    seeds = 40 + 3 * torch.arange(rows, device=device)
    positions = torch.arange(rows, device=device) % 97
    first, _ = sample(logits, seeds=seeds, positions=positions)
    second, _ = sample(logits, seeds=seeds + seed_step, positions=positions + position_step)
    assert_distributed(first * vocab + second, dict.fromkeys(range(vocab**2), vocab**-2))


def test_no_two_draws_share_their_noise(device):
    """All 64 bits count that seed and position are mixed to: of 32, ten pairs of so many would be equal."""
    draws = 300_000
    seeds, positions = torch.randint(-(2**63), 2**63 - 1, (draws,)), torch.randint(0, 4096, (draws,))
    times = _race_times(seeds.to(device), positions.to(device), 3)
    assert len(times.unique(dim=0)) == draws


def test_rare_tokens_are_drawn_as_often_as_they_should(device):
    """A thousand tokens with a ten-thousandth of the mass each: the race's short times must be right too."""
    rows, vocab = 8_000, 1001
    logits = torch.full((vocab,), math.log(1e-4), device=device)
    logits[500] = math.log(0.9)
    ids, _ = sample(logits.expand(rows, -1), **settings(device, rows))
    rare = ids[ids != 500]
    assert_distributed((ids == 500).long(), {0: 0.1, 1: 0.9})
    assert_distributed((rare > 500).long() * 2 + (rare % 2), {0: 0.25, 1: 0.25, 2: 0.25, 3: 0.25})


@pytest.mark.parametrize("path", PATHS)
def test_filters_against_sorted_lists(path, device, dtype):
    """Random rows and settings: what is drawn may be drawn, and of that no more is missed than chance misses."""
    rows, positions = (4, 4) if path == "triton" and device.type == "cpu" else (40, 12)  # slow in the interpreter
    vocab = 8
    logits = (2 * torch.randn(rows, vocab, device=device)).to(dtype)
    k, p = torch.randint(0, vocab + 2, (rows,)), torch.rand(rows).clamp(min=0.05)
    t, m = torch.rand(rows) + 0.5, torch.rand(rows) / 4
    drawn: list[set[int]] = [set() for _ in range(rows)]
    for position in range(positions):
        given = settings(device, rows, temperature=t, top_k=k, top_p=p, min_p=m, positions=position)
        with llava_kernels.implementation(path):
            now = sample(logits, **given)[0].tolist()
        for ids, one in zip(drawn, now, strict=True):
            ids.add(one)
    missed = expected = 0.0
    for i, ids in enumerate(drawn):
        row = logits[i].double().tolist()
        may = allowed(row, temperature=t[i].item(), top_k=int(k[i]), top_p=p[i].item(), min_p=m[i].item())
        assert ids <= may.keys()
        missed += len(may) - len(ids)
        expected += sum((1 - chance) ** positions for chance in may.values())
    assert missed <= expected + 5 * math.sqrt(expected)


@pytest.mark.parametrize(("rows", "vocab"), [(5, 5), (3, 640), (2, 1000), (1, 5001)])
def test_kernel_and_reference_choose_the_same(triton_path, device, dtype, rows, vocab):
    choose_the_same((4 * torch.randn(rows, vocab, device=device)).to(dtype))


@needs_library
@pytest.mark.parametrize(("rows", "vocab"), [(5, 5), (300, 640), (200, 1001), (40, 32_003)])
def test_library_and_reference_choose_the_same(monkeypatch, rows, vocab):
    calls, draw = [], native_sample.sample
    monkeypatch.setattr(native_sample, "sample", lambda *given: calls.append(1) or draw(*given))
    choose_the_same(4 * torch.randn(rows, vocab))
    assert len(calls) == 5


def choose_the_same(logits):
    """What runs now and the reference, with random settings."""
    (rows, vocab), device = logits.shape, logits.device
    given = settings(
        device,
        rows,
        temperature=torch.rand(rows) * 2 * (torch.rand(rows) > 0.2),
        top_k=torch.randint(0, vocab, (rows,)) * (torch.rand(rows) > 0.3),
        top_p=torch.rand(rows) + 0.2,
        min_p=torch.rand(rows) / 10,
        repetition_penalty=torch.rand(rows) + 0.7,
        presence_penalty=torch.randn(rows),
        frequency_penalty=torch.randn(rows),
        seeds=torch.randint(-(2**62), 2**62, (rows,)),
        positions=torch.randint(0, 4096, (rows,)),
    )
    counts = torch.randint(-4, 4, (rows, vocab), device=device, dtype=torch.int32).clamp(min=0)
    in_prompt = torch.rand(rows, vocab, device=device) < 0.2
    for names in (
        (),
        ("temperature", "top_p"),
        ("top_k", "min_p"),
        ("temperature", "repetition_penalty"),
        tuple(given),
    ):
        chosen = {n: v for n, v in given.items() if n in names or n in ("seeds", "positions")}
        tables = {"counts": counts, "in_prompt": in_prompt} if "repetition_penalty" in names else {}
        ids, logprobs = sample(logits, **chosen, **tables)
        with llava_kernels.implementation("reference"):
            expected, expected_logprobs = sample(logits, **chosen, **tables)
        assert torch.equal(ids, expected)
        torch.testing.assert_close(logprobs, expected_logprobs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
class TestBoth:
    """What holds for the kernel and for the reference alike."""

    @pytest.fixture(autouse=True)
    def choose(self, path):
        with llava_kernels.implementation(path):
            yield

    def test_greedy_takes_the_lowest_of_equals(self, device):
        logits = torch.zeros(4, 2500, device=device)  # more than one block of the kernel's
        logits[0, [2450, 3, 40]] = 1
        logits[1, 2499] = 1e-3
        logits[2] = -5
        logits[3, 512] = -1
        ids, logprobs = sample(logits, **settings(device, 4, temperature=[0, 0, 1e-6, 0]))
        assert ids.tolist() == [3, 2499, 0, 0]
        expected = logits.double().log_softmax(-1).gather(1, ids[:, None])[:, 0]
        torch.testing.assert_close(logprobs.double(), expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("one", [{"top_k": 1}, {"top_p": 0.0}, {"top_p": 1e-6}, {"min_p": 1.0}, {"min_p": 3.0}])
    def test_one_candidate_is_greedy(self, device, one):
        logits = torch.randn(3, 300, device=device)
        ids, _ = sample(logits, **settings(device, 3, temperature=0.8, **one))
        assert torch.equal(ids, logits.argmax(-1))

    def test_the_stricter_of_top_k_and_top_p_decides(self, device):
        logits = torch.linspace(0, 0.1, 10, device=device).expand(8, -1)
        given = settings(device, 8, top_k=[1] * 4 + [9] * 4, top_p=[0.95] * 4 + [0.05] * 4)
        assert sample(logits, **given)[0].tolist() == [9] * 8

    @pytest.mark.parametrize(("top_p", "kept"), [(0.39, 1), (0.41, 601)])
    def test_top_p_is_about_mass(self, device, top_p, kept):
        """One token has 0.4 of it, 600 equal ones the rest: one by one, 0.39 would be reached by 234 of them."""
        logits = torch.full((8, 601), math.log(0.001), device=device)
        logits[:, 17] = math.log(0.4)
        ids, _ = sample(logits, **settings(device, 8, top_p=top_p))
        assert (ids == 17).all() == (kept == 1)

    def test_the_longest_time_is_still_finite(self, device):
        """The noise of token 1 is the largest there is; it wins all the same where it runs alone."""
        logits = torch.tensor([[0.0, 9.0, 0.0]], device=device)
        given = settings(device, 1, seeds=0, positions=56_148_081)
        assert _race_times(given["seeds"], given["positions"], 3)[0, 1].item() == pytest.approx(24 * math.log(2))
        assert sample(logits, top_k=torch.ones(1, device=device).long(), **given)[0].tolist() == [1]

    def test_a_row_of_several_blocks(self, device):
        """Only its end may be drawn, and is also what the log-probability is about."""
        logits = torch.full((3, 6000), -30.0, device=device)
        logits[:, 5000:] = 0
        ids, logprobs = sample(logits, **settings(device, 3, temperature=[0, 1, 1]))
        assert ids[0] == 5000
        assert ((ids >= 5000) & (ids < 6000)).all() and ids[1] != ids[2]
        torch.testing.assert_close(logprobs, torch.full((3,), -math.log(1000), device=device), rtol=1e-5, atol=0)

    def test_settings_that_are_off(self, device):
        logits = torch.randn(4, 300, device=device)
        plain, _ = sample(logits, **settings(device, 4))
        none = torch.zeros(4, 300, device=device, dtype=torch.int32)
        off = {"temperature": 1.0, "top_k": [0, -1, 300, 301], "top_p": [1.0, 1.5] * 2, "min_p": [0.0, -1.0] * 2}
        penalties = {"repetition_penalty": 2.0, "presence_penalty": 3.0, "frequency_penalty": 3.0}
        ids, _ = sample(logits, **settings(device, 4, **off, **penalties), counts=none)
        assert torch.equal(ids, plain)

    def test_the_draw_knows_nothing_of_the_batch(self, device):
        logits = torch.randn(5, 50, device=device)
        given = settings(device, 5, temperature=1.3, top_k=20, positions=list(range(5)))
        ids, logprobs = sample(logits, **given)
        order = torch.tensor([4, 1, 0], device=device)
        some, some_logprobs = sample(logits[order], **{n: v[order] for n, v in given.items()})
        assert torch.equal(some, ids[order])
        torch.testing.assert_close(some_logprobs, logprobs[order])
        others, _ = sample(logits, **given | {"seeds": given["seeds"] + 100})
        assert not torch.equal(others, ids)

    def test_penalties(self, device):
        """Each is large enough to move the choice from one id to the next, or just too small to."""
        row = [4.0, 3.0, -1.0, -1.5]
        counts = torch.tensor([[2, 0, 0, 0]] * 5 + [[3, 3, 1, 0]], device=device, dtype=torch.int32)
        in_prompt = torch.tensor([[False] * 4] * 4 + [[True, True, False, False]] * 2, device=device)
        given = settings(
            device,
            6,
            temperature=0.0,
            repetition_penalty=[1.0, 1.4, 1.3, 1.0, 9.0, 9.0],
            presence_penalty=[0.9, 0.0, 0.0, 0.0, 0.0, 4.0],
            frequency_penalty=[0.0, 0.0, 0.0, 0.6, 0.0, 0.0],
        )
        ids, logprobs = sample(torch.tensor([row] * 6, device=device), counts=counts, in_prompt=in_prompt, **given)
        # 4 - 0.9; 4 / 1.4; 4 / 1.3; 4 - 2 * 0.6; 4 / 9 and, in the prompt alone, 3 / 9; all pushed below -1.5
        assert ids.tolist() == [0, 1, 0, 1, 0, 3]
        expected = torch.tensor(row, device=device).log_softmax(-1)[ids]  # before penalties
        torch.testing.assert_close(logprobs, expected)

    def test_the_prompt_counts_for_repetition_alone(self, device):
        logits = torch.tensor([[2.0, 1.5]] * 3, device=device)
        in_prompt, counts = torch.tensor([[True, False]] * 3, device=device), torch.zeros(3, 2, device=device).int()
        given = {"temperature": 0, "repetition_penalty": [1, 1, 2], "presence_penalty": [1, 0, 0]}
        given["frequency_penalty"] = [0, 1, 0]
        ids, _ = sample(logits, counts=counts, in_prompt=in_prompt, **settings(device, 3, **given))
        assert ids.tolist() == [0, 0, 1]

    @pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy's, in the interpreter
    def test_rows_of_nan_and_infinity(self, device):
        inf, nan = float("inf"), float("nan")
        rows = [
            [nan] * 5,
            [-inf] * 5,
            [nan, -inf, 1.0, nan, -inf],
            [1.0, inf, nan, 2.0, 3.0],
            [-inf, 0.0, -inf, 0.0, 9.0],
            [torch.finfo(torch.float32).min] * 5,
        ]
        for options in ({"temperature": 0.0}, {"temperature": 0.5}, {"top_k": 2, "top_p": 0.9, "min_p": 0.1}):
            ids, logprobs = sample(torch.tensor(rows, device=device), **settings(device, 6, **options))
            assert ids[:4].tolist() == [0, 0, 2, 1] and ids[5] == 0
            assert ids[4] in (1, 3, 4)
            assert logprobs.isnan().tolist() == [True, True, False, False, False, True]
            assert logprobs[2:4].tolist() == [0, 0]

    @pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy's, in the interpreter
    def test_large_logits(self, device):
        logits = torch.tensor([[3e38, -3e38, 0.0], [-3e38, -3.3e38, -3.2e38], [60000.0, 59990.0, 0.0]], device=device)
        ids, logprobs = sample(logits, **settings(device, 3, temperature=[0.1, 2.0, 0.5], top_p=0.9, top_k=2))
        assert ids.tolist() == [0, 0, 0]
        torch.testing.assert_close(logprobs, torch.tensor([0.0, 0.0, -math.exp(-10)], device=device), rtol=0, atol=1e-4)

    def test_strides_of_logits_and_settings(self, device):
        rows, vocab = 3, 70
        logits = torch.randn(rows, 2 * vocab, device=device)[:, :vocab]
        given = settings(device, rows, temperature=[0.9, 0.0, 2.0], top_k=[9, 9, 30])
        every_other = {n: torch.stack([v, v + 5], 1).flatten()[::2] for n, v in given.items()}
        expected, _ = sample(logits.contiguous(), **given)
        assert torch.equal(sample(logits, **every_other)[0], expected)
        assert torch.equal(sample(logits.t().contiguous().t(), **given)[0], expected)

    @pytest.mark.parametrize("layout", ["rows apart", "columns apart", "by columns"])
    def test_strides_of_counts_and_prompt(self, device, layout):
        """Even ids were generated, odd ones are in the prompt, but for one of each row, which is the one that wins."""
        rows, vocab, free = 3, 70, [5, 68, 33]
        ids = torch.arange(vocab, device=device)
        seen = ids != torch.tensor(free, device=device)[:, None]
        counts, in_prompt = (seen & (ids % 2 == 0)).int(), seen & (ids % 2 == 1)
        around = {
            "rows apart": lambda x: torch.cat([x, torch.zeros_like(x)], 1)[:, :vocab],
            "columns apart": lambda x: torch.stack([x, torch.zeros_like(x)], 2).flatten(1)[:, ::2],
            "by columns": lambda x: x.t().contiguous().t(),
        }[layout]
        given = settings(device, rows, temperature=0.0, repetition_penalty=1e3)
        logits = 1 + torch.rand(rows, vocab, device=device)
        assert sample(logits, counts=around(counts), in_prompt=around(in_prompt), **given)[0].tolist() == free

    def test_no_rows_and_one_token(self, device):
        ids, logprobs = sample(torch.zeros(0, 9, device=device), **settings(device, 0, temperature=1.0, top_k=3))
        assert ids.shape == logprobs.shape == (0,) and ids.dtype == torch.int64
        ids, logprobs = sample(torch.full((3, 1), 5.0, device=device), **settings(device, 3, top_p=0.5))
        assert ids.tolist() == logprobs.tolist() == [0, 0, 0]


def test_wrong_shapes_are_refused(device):
    logits, given = torch.zeros(3, 9, device=device), settings(device, 3)
    with pytest.raises(ValueError, match="V > 0"):
        sample(torch.zeros(3, 0, device=device), **given)
    with pytest.raises(ValueError, match=r"need \(3,\)"):
        sample(logits, top_k=torch.ones(2, device=device).long(), **given)
    with pytest.raises(ValueError, match=r"seeds are torch\.int32"):
        sample(logits, **given | {"seeds": given["seeds"].int()})
    with pytest.raises(ValueError, match="counts or in_prompt"):
        sample(logits, counts=torch.zeros(3, 8, device=device).int(), **given)
    with pytest.raises(ValueError, match="penalties need counts"):
        sample(logits, presence_penalty=torch.ones(3, device=device), **given)


def test_opcheck(device):
    logits = torch.randn(3, 20, device=device)
    given = settings(device, 3, temperature=0.7, top_k=5, top_p=0.9)
    all_of_them = (logits, given["seeds"], given["positions"], given["temperature"], given["top_k"], given["top_p"])
    torch.library.opcheck(torch.ops.llava_kernels.sample, (*all_of_them, *[None] * 6))


def test_compiled(triton_path, device):
    logits, given = torch.randn(5, 40, device=device), settings(device, 5, temperature=0.7, top_p=0.9)

    def step(logits):
        ids, logprobs = sample(logits * 2, **given)
        return ids + 1, logprobs

    for a, b in zip(torch.compile(step, backend="aot_eager")(logits), step(logits), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_cuda_graph(device):
    logits, given = torch.randn(5, 4000, device=device), settings(device, 5, temperature=0.7, top_p=0.9, top_k=50)
    sample(logits, **given)  # compiles before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, _ = sample(logits, **given)
    given["positions"] += 1  # in place: the replay sees it
    graph.replay()
    assert torch.equal(captured, sample(logits, **given)[0])
