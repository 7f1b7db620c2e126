"""Our own kernels: the layout of weights, the reference against plain formulas, the kernels against the reference.

Where this machine has none, the tests of the kernels themselves say so and are skipped; the others run everywhere.
"""

import math
import os
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from bert_evaluation import kernels, varlen
from bert_evaluation.kernels import build, reference

CPU = torch.device("cpu")
KINDS = (torch.int8, torch.bfloat16, torch.float32)
SLICES = "float32 in slices"
FLOAT32 = (torch.float32, SLICES)
LINEAR, LINEARS = kernels.LINEAR, kernels.LINEARS
ATTENTION, PACKED = kernels.ATTENTION, kernels.PACKED_ATTENTION
PLAIN = kernels.TWINS[LINEAR]
UNIT = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7}  # from one number of a type to the next, relatively
MASKED = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 0, 0, 0], [0, 1, 0, 1, 1], [1, 1, 1, 1, 1]])

sizes = st.integers(1, 200)
seeds = st.integers(0, 2**31)


def able(kind):
    if reason := kernels.why_not(torch.float32 if kind is SLICES else kind, CPU):
        pytest.skip(reason)
    if kind is SLICES and not kernels.multiplies_slices(CPU):
        pytest.skip("This processor has no AMX.")
    return kind


@pytest.fixture(scope="module", params=(*KINDS, SLICES), ids=str)
def kind(request):
    """The type of a weight that this machine has kernels for, or `SLICES`."""
    return able(request.param)


@pytest.fixture(scope="module", params=kernels.TYPES_OF_ATTENTION["cpu"], ids=str)
def attends(request):
    """A type that this machine has a kernel of attention for."""
    able(torch.int8 if request.param is torch.float32 else request.param)  # what is built has float32 everywhere
    return request.param


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def random(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=random(seed))


def stored(weight, kind):
    """A weight as the operator takes it, and its scales."""
    if kind is SLICES:
        return kernels.slice_up(weight)
    if kind is torch.int8:
        rounded, steps = kernels.quantize(weight)
        return kernels.pack(rounded.to(torch.int8)), steps.squeeze(-1)
    return kernels.pack(weight.to(kind)), None


def run(program, *arguments, **environment):
    """What a Python process of its own prints."""
    command = [sys.executable, "-W", "ignore", "-c", program, *map(str, arguments)]
    variables = os.environ | {name: str(value) for name, value in environment.items()}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=variables).stdout.strip()


# The layout and the reference.


@given(sizes, sizes, st.sampled_from(KINDS), seeds)
def test_packing_keeps_every_bit_in_its_place(outputs, inputs, kind, seed):
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32}[kind.itemsize]
    ends = torch.iinfo(integers)
    weight = torch.randint(ends.min, ends.max, (outputs, inputs), dtype=integers, generator=random(seed)).view(kind)
    packed, group = kernels.pack(weight), reference.GROUP[kind]
    assert packed.dtype is kind
    assert packed.is_contiguous()
    step = reference.STEP[kind]
    assert packed.shape == (-(-outputs // 32) * 2, -(-inputs // step) * step // group, 16, group)
    assert torch.equal(kernels.unpack(packed, outputs, inputs).view(integers), weight.view(integers))
    out, into = torch.arange(outputs)[:, None], torch.arange(inputs)
    bits = packed.view(integers).clone()
    place = (out // 16, into // group, out % 16, into % group)
    assert torch.equal(bits[place], weight.view(integers))
    bits[place] = 0
    assert not bits.any()


scales = st.sampled_from([0.0, 1e-38, 1e-3, 1.0, 1e4, 1e30])


@st.composite
def factors(draw):
    """What a linear reads and its weight: random, constant, zero, or with a huge outlier, in rows of any size."""
    tokens, inputs, outputs = draw(st.integers(1, 9)), draw(sizes), draw(st.integers(1, 9))
    generator = random(draw(seeds))

    def made(count):
        numbers = torch.randn(count, inputs, generator=generator)
        if draw(st.booleans()):
            numbers[0, draw(st.integers(0, inputs - 1))] = 1000.0
        if draw(st.booleans()):
            numbers[-1] = draw(st.sampled_from([0.0, 1.0, -1.0]))
        return numbers

    return made(tokens) * draw(scales), made(outputs)


@settings(deadline=None)
@given(factors())
def test_numbers_are_rounded_to_the_nearest_step_of_their_row(pair):
    for rows in pair:
        rounded, steps = kernels.quantize(rows)
        assert torch.equal(rounded, rounded.round())
        assert int(rounded.abs().max()) <= reference.LARGEST
        # Half a step, and what dividing in float32 rounds.
        assert bool(((rounded.double() * steps - rows).abs() <= (0.5 + 1e-4) * steps).all())


@settings(deadline=None)
@given(factors())
def test_slices_hold_a_number_to_24_bits_of_its_rows_largest(pair):
    rows, weight = pair
    packed, worth = kernels.slice_up(weight)
    outputs, inputs = weight.shape
    assert packed.dtype is torch.int8
    assert packed.shape == (-(-outputs // 32) * 2, -(-inputs // 64), 3, 16, 16, 4)
    assert kernels.is_sliced(packed)
    assert not kernels.is_sliced(kernels.pack(weight))
    held = kernels.unslice(packed, outputs, inputs).double() * worth[:, None].double()
    largest = weight.abs().amax(-1, keepdim=True).double()
    # Half of the finest step, and what the scale and the product with it round.
    assert bool(((held - weight).abs() <= 2.0**-24 * (1.02 * largest + 2.1 * weight.abs()) + 1e-38).all())
    # And so is a product, which in float64 is that of what is held.
    exact, sizes = rows.double() @ held.T, rows.double().abs() @ held.abs().T
    product = PLAIN(rows.double(), packed, worth.double(), None, outputs)
    assert bool(((product - exact).abs() <= 1e-12 * sizes + 1e-30).all())
    off = inputs * 2.0**-21 * rows.abs().amax(-1, keepdim=True).double() * largest.T + 1e-37
    assert bool(
        ((PLAIN(rows, packed, worth, None, outputs).double() - rows.double() @ weight.double().T).abs() <= off).all()
    )


@pytest.mark.parametrize("outlier", [1.0, 30.0, 1000.0])
@pytest.mark.parametrize(("rows", "inputs"), [(1, 768), (40, 3072), (300, 384), (7, 5)])
def test_slices_are_as_exact_as_float32_may_be(rows, inputs, outlier):
    able(SLICES)
    x, weight = normal(rows, inputs), normal(90, inputs, seed=1)
    x[:, inputs // 2] *= outlier
    weight[:, inputs // 3] *= outlier
    exact = x.double() @ weight.double().T
    found = LINEAR(x, *kernels.slice_up(weight), None, 90)
    lengths = x.double().norm(dim=-1, keepdim=True) * weight.double().norm(dim=-1)
    assert bool(((found - exact).abs() <= (inputs**0.5 + 2) * 2.0**-23 * lengths + 2.0**-23 * exact.abs()).all())


@settings(deadline=None)
@given(factors())
def test_the_reference_sums_integers_exactly(pair):
    x, weight = pair
    (tokens, steps), (rounded, worth) = kernels.quantize(x), kernels.quantize(weight)
    sums = (tokens.to(torch.int64) @ rounded.to(torch.int64).T).float()
    assert torch.equal(PLAIN(x, *stored(weight, torch.int8), None, len(weight)), sums * (steps * worth.T))


@pytest.mark.parametrize("activation", kernels.ACTIVATIONS)
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32])
def test_the_reference_is_a_linear_with_what_follows_it(kind, activation):
    x, weight, bias, r = normal(7, 20), normal(9, 20, seed=1).to(kind), normal(9, seed=2), normal(7, 9, seed=3)
    gain, shift = normal(9, seed=4), normal(9, seed=5)
    y = F.linear(x.to(kind).float(), weight.float(), bias)
    y = {
        "none": lambda: y,
        "gelu": lambda: F.gelu(y),
        "gelu_tanh": lambda: F.gelu(y, approximate="tanh"),
        "relu": lambda: y.relu(),
    }[activation]()
    arguments = (x, *stored(weight, kind), bias, 9, activation)
    assert torch.allclose(PLAIN(*arguments), y, atol=1e-5)
    assert torch.allclose(PLAIN(*arguments, r), y + r, atol=1e-5)
    for more in (shift, None):
        expected = F.layer_norm(y + r, (9,), gain, more, 1e-5)
        assert torch.allclose(PLAIN(*arguments, r, gain, more, 1e-5), expected, atol=1e-4)
    low = PLAIN(x.bfloat16(), *arguments[1:], r.bfloat16())
    assert low.dtype is torch.bfloat16
    assert torch.allclose(low.float(), PLAIN(x.bfloat16().float(), *arguments[1:], r.bfloat16().float()), rtol=2.0**-8)


def test_in_double_the_reference_is_double():
    x, weight = normal(7, 20).double(), normal(9, 20, seed=1)
    found = PLAIN(x, kernels.pack(weight.bfloat16()).double(), None, None, 9)
    assert torch.equal(found, F.linear(x, weight.bfloat16().double()))


@pytest.mark.parametrize("arguments", ["linear", "linears", "attention", "packed_attention"])
def test_shapes_are_known_without_computing(arguments):
    q, mask = normal(2, 5, 8).bfloat16(), torch.ones(2, 5, dtype=torch.bool)
    weight, scales = stored(normal(9, 8), torch.int8)
    operator, given = {
        "linear": (LINEAR, (normal(2, 5, 8), weight, scales, normal(9), 9, "gelu")),
        "linears": (
            LINEARS,
            (normal(2, 5, 8), [weight, scales, None, None, None], [9], "relu", normal(2, 5, 9), [0], [0.0]),
        ),
        "attention": (ATTENTION, (q, q, q, mask[:, None, None], 2, 0.5)),
        "packed_attention": (PACKED, (*[q.reshape(1, 10, 8)] * 3, mask, 2, 0.5)),
    }[arguments]
    for each in (operator, kernels.TWINS[operator]):
        torch.library.opcheck(each, given, test_utils=("test_schema", "test_faketensor"))


# Linears.


@st.composite
def linears(draw):
    """What the operator is called with, but for the weight, and how far the weight's numbers lie apart in memory."""
    rows, inputs, outputs, generator = draw(st.integers(1, 300)), draw(sizes), draw(sizes), random(draw(seeds))

    def made(*shape):
        return torch.randn(shape, generator=generator)

    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    x = made(rows, inputs) * draw(st.sampled_from([1e-3, 1.0, 30.0]))
    if draw(st.booleans()):
        x[draw(st.integers(0, rows - 1)), draw(st.integers(0, inputs - 1))] = 1000.0
    x = x.to(dtype)
    match draw(st.sampled_from(["plain", "columns", "transposed", "rows", "batch", "one row again"])):
        case "columns":
            x = torch.cat([made(rows, 3).to(dtype), x, made(rows, 2).to(dtype)], dim=1)[:, 3 : 3 + inputs]
        case "transposed":
            x = x.t().contiguous().t()
        case "rows":
            x = x.repeat_interleave(2, dim=0)[::2]
        case "batch":
            x = torch.stack([x, -x]).transpose(0, 1)
        case "one row again":
            x = x[:1].expand(rows, inputs)
    end = {"activation": draw(st.sampled_from(list(kernels.ACTIVATIONS)))}
    if draw(st.booleans()):
        end["residual"] = made(*x.shape[:-1], outputs).to(dtype)
    if draw(st.booleans()):
        end |= {"norm_weight": made(outputs), "norm_bias": made(outputs) if draw(st.booleans()) else None, "eps": 1e-5}
    return x, made(outputs, inputs), made(outputs) if draw(st.booleans()) else None, end


def allowed(x, weight, bias, end, kind):
    """How far the kernel's result may be from the reference's, for each number."""
    outputs, inputs = weight.shape
    packed = stored(weight, kind)
    before = PLAIN(x, *packed, bias, outputs).float()  # no more than a unit from what the activation gets
    size = x.float().abs() @ weight.abs().T + (0 if bias is None else bias.abs())
    off = (2 * inputs + 8) * 2.0**-23 * size
    if kind is torch.int8:
        off = 2.0**-21 * size
    if kind is SLICES:  # the sums are exact, but for the products of the last slices
        largest = x.float().abs().amax(-1, keepdim=True) * weight.abs().amax(-1)
        off = 2.0**-19 * size + inputs * 2.0**-32 * largest
    if end["activation"] == "gelu" and x.dtype is torch.bfloat16:
        off = off + 7e-5 * before.abs().clamp_min(1)
    off = 1.2 * off + 4e-7 * size + 1e-36
    plain = PLAIN(x, *packed, bias, outputs, end["activation"], end.get("residual")).float()
    unit = UNIT[x.dtype]
    if "norm_weight" not in end:
        return off + unit * plain.abs()
    # From here on in float64, as rounding the sum has to be left out.
    wide = PLAIN(
        x.float(), *packed, bias, outputs, end["activation"], None if (r := end.get("residual")) is None else r.float()
    )
    wide = wide.double()
    spread = (wide.var(-1, correction=0, keepdim=True) + end["eps"]).sqrt()
    places = (wide - wide.mean(-1, keepdim=True)) / spread
    worst = (off + 4e-7 * wide.abs()).amax(-1, keepdim=True)
    gain = end["norm_weight"].abs()
    result = PLAIN(x, *packed, bias, outputs, **end).float().abs()
    return gain * (2 + places.abs()) * 2 * worst / spread + 1e-5 * gain * (1 + places.abs()) + 1e-6 + unit * result


@settings(deadline=None, max_examples=150)
@given(given=linears())
def test_kernels_against_the_reference(kind, given):
    x, weight, bias, end = given
    if kind in FLOAT32 and x.dtype is not torch.float32:
        x = x.float()
        end = {name: each.float() if name == "residual" else each for name, each in end.items()}
    packed = stored(weight, kind)
    found, expected = (each(x, *packed, bias, len(weight), **end) for each in (LINEAR, PLAIN))
    assert found.dtype is expected.dtype is x.dtype
    assert found.shape == expected.shape
    assert bool(((found.float() - expected.float()).abs() <= allowed(x, weight, bias, end, kind)).all())


@pytest.mark.parametrize("outputs", [700, 1500])
def test_more_than_fits_into_caches_at_once(kind, outputs):
    x, weight, bias = normal(300, 900), normal(outputs, 900, seed=1), normal(outputs, seed=2)
    end = {
        "activation": "none",
        "residual": normal(300, outputs, seed=3),
        "norm_weight": torch.ones(outputs),
        "eps": 1e-5,
    }
    packed = stored(weight, kind)
    found, expected = (each(x, *packed, bias, outputs, **end) for each in (LINEAR, PLAIN))
    assert bool(((found - expected).abs() <= allowed(x, weight, bias, end, kind)).all())


@pytest.mark.parametrize("inputs", [1, 63, 64, 65, 1000, reference.LONGEST])
def test_the_largest_sums_of_integers_are_exact(inputs):
    able(torch.int8)
    rows, outputs = (40, 33) if inputs < 5000 else (2, 3)
    weight = torch.full((outputs, inputs), 127, dtype=torch.int8)
    weight[1] = -127
    x = torch.full((rows, inputs), 127.0)
    x[1] = -127.0
    found = LINEAR(x, kernels.pack(weight), torch.ones(outputs), None, outputs)
    expected = torch.full((rows, outputs), 127.0 * 127 * inputs)
    expected[1] *= -1
    expected[:, 1] *= -1
    assert torch.equal(found, expected.double().float())


@pytest.mark.parametrize("inputs", [1, 63, 65, 1000, reference.LONGEST_SLICED])
def test_the_largest_sums_of_slices_fit(inputs):
    able(SLICES)
    # The second and the third slice are -128.
    largest = (127 * 2**16 - 2**15 - 2**7) / 2**23
    x, weight = torch.full((33, inputs), largest), torch.full((40, inputs), -largest)
    x[:, 0], weight[:, 0] = 127 / 128, 127 / 128
    found, exact = LINEAR(x, *kernels.slice_up(weight), None, 40).double(), x.double() @ weight.double().T
    assert bool(((found - exact).abs() <= 2.0**-22 * exact.abs()).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 33, 200])
def test_zeros_give_the_bias_and_what_is_not_finite_stays_in_its_row(kind, rows, dtype):
    if kind in FLOAT32 and dtype is not torch.float32:
        pytest.skip("Weights in float32 are for x in float32.")
    weight, bias = normal(40, 50), normal(40, seed=1)
    packed = stored(weight, kind)
    x = normal(rows, 50, seed=2).to(dtype)
    x[0] = 0
    assert torch.equal(LINEAR(x, *packed, bias, 40)[0], bias.to(dtype))
    for activation in kernels.ACTIVATIONS:
        clean = LINEAR(x, *packed, bias, 40, activation)
        for number in (torch.nan, torch.inf, -torch.inf):
            spoilt = x.clone()
            spoilt[rows // 2, 7] = number
            found = LINEAR(spoilt, *packed, bias, 40, activation)
            others = torch.arange(rows) != rows // 2
            assert torch.equal(found[others], clean[others])
            spoilt_row = found[rows // 2]
            assert spoilt_row.isnan().all() or not math.isnan(number)
            # What is -inf may be 0 behind ReLU or GELU.
            assert activation != "none" or not spoilt_row.isfinite().any()
            norm = (bias + 2, None, 1e-5)
            assert LINEAR(spoilt, *packed, bias, 40, activation, None, *norm)[rows // 2].isnan().all()


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_gelu_is_as_exact_as_what_is_returned(kind, activation):
    x = torch.cat([torch.linspace(-9, 9, 3601), torch.tensor([-1e30, -1e6, -100.0, 100.0, 1e6, 1e30])])[
        :, None
    ].bfloat16()
    one = stored(torch.ones(1, 1), kind)
    exact = kernels.ACTIVATIONS[activation](x.double())
    found = LINEAR(x.float(), *one, None, 1, activation).double()
    assert bool(((found - exact).abs() <= 4e-7 * x.double().abs()).all())
    if kind not in FLOAT32:
        found = LINEAR(x, *one, None, 1, activation).double()
        assert bool(((found - exact).abs() <= 2.0**-8 * exact.abs() + 7e-5 * x.double().abs().clamp_min(1)).all())


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(1, 300), inputs=sizes, outputs=sizes, seed=seeds, data=st.data())
def test_a_row_does_not_depend_on_those_beside_it(kind, rows, inputs, outputs, seed, data):
    weight, x = normal(outputs, inputs, seed=seed), normal(rows, inputs, seed=seed + 1)
    row, packed = data.draw(st.integers(0, rows - 1)), stored(weight, kind)
    end = ("gelu", None, torch.ones(outputs), None, 1e-5)
    found = LINEAR(x, *packed, None, outputs, *end)[row]
    others = torch.arange(rows)[:, None] != row
    assert torch.equal(LINEAR(torch.where(others, 1e6, x), *packed, None, outputs, *end)[row], found)
    alone = LINEAR(x[row : row + 1], *packed, None, outputs, *end)[0]
    assert torch.equal(alone, found)


@pytest.mark.parametrize("rows", [1, 31, 100, 256, 300, 600, 1100])
@pytest.mark.parametrize("norm", [False, True])
def test_threads_change_nothing(kind, threads, rows, norm):
    weight, x, bias = normal(130, 70), normal(rows, 70, seed=1), normal(130, seed=2)
    end = (torch.ones(130), bias, 1e-5) if norm else ()
    found = []
    for number in (1, 2, 3):
        threads(number)
        for dtype in (torch.float32,) if kind in FLOAT32 else (torch.float32, torch.bfloat16):
            r = normal(rows, 130, seed=3).to(dtype)
            found.append((dtype, LINEAR(x.to(dtype), *stored(weight, kind), bias, 130, "gelu_tanh", r, *end)))
    for dtype, each in found:
        assert torch.equal(each, next(other for kind_of, other in found if kind_of is dtype))


def test_of_no_rows_there_is_nothing(kind):
    packed = stored(normal(40, 50), kind)
    assert LINEAR(torch.empty(0, 50), *packed, None, 40).shape == (0, 40)
    assert LINEAR(torch.empty(2, 0, 50), *packed, None, 40).shape == (2, 0, 40)
    assert LINEAR(torch.ones(50), *packed, None, 40).shape == (40,)


def test_x_in_float16_is_computed_in_plain_pytorch(kind):
    x, (weight, scales) = normal(3, 40).half(), stored(normal(5, 40, seed=1), kind)
    assert torch.equal(LINEAR(x, weight, scales, None, 5), PLAIN(x, weight, scales, None, 5))


@st.composite
def chains(draw):
    """Linears in a row: what each is, ready but for the layout of its weight; x, and what may be added."""
    rows, generator = draw(st.integers(1, 700)), random(draw(seeds))
    widths = [draw(sizes) for _ in range(draw(st.integers(1, 3)))]
    widths += [widths[draw(st.integers(0, len(widths) - 1))], draw(sizes)]  # one width is there twice

    def made(*shape):
        return torch.randn(shape, generator=generator)

    residual, links = (made(rows, widths[-1]) if draw(st.booleans()) else None), list[tuple[object, ...]]()
    for place, (inputs, outputs) in enumerate(pairwise(widths)):
        before = [-1, *(which + 1 for which in range(place) if widths[which + 1] == outputs)]
        if residual is not None and outputs == widths[-1]:
            before.append(0)
        normed = (made(outputs), made(outputs)) if draw(st.booleans()) else (None, None)
        end = (draw(st.sampled_from(list(kernels.ACTIVATIONS))), draw(st.sampled_from(before)))
        links.append((made(outputs, inputs), made(outputs) if draw(st.booleans()) else None, *end, *normed))
    return made(rows, widths[0]), residual, links


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(given=chains(), low=st.booleans(), count=st.sampled_from([1, 2, 3]))
def test_a_chain_computes_what_its_linears_do_to_the_bit(kind, given, low, count, threads):
    x, residual, links = given
    if low and kind not in FLOAT32:
        x, residual = x.bfloat16(), None if residual is None else residual.bfloat16()
    packed = [stored(weight, kind) for weight, *_ in links]
    for linear, linears in ((LINEAR, LINEARS), (PLAIN, kernels.TWINS[LINEARS])):
        made = [residual]
        for (weight, scales), (plain, bias, activation, added, *normed) in zip(packed, links, strict=True):
            more = made[added] if added >= 0 else None
            read = x if len(made) == 1 else made[-1]
            made.append(linear(read, weight, scales, bias, len(plain), activation, more, *normed, 1e-5))
        tensors = [
            tensor
            for each, (_, bias, _, _, *normed) in zip(packed, links, strict=True)
            for tensor in (*each, bias, *normed)
        ]
        names, places = " ".join(each[2] for each in links), [each[3] for each in links]
        threads(count)
        outputs, eps = [len(each[0]) for each in links], [1e-5] * len(links)
        found = linears(x, tensors, outputs, names, residual, places, eps)
        assert torch.equal(found, made[-1])


def test_a_chain_of_no_rows_has_none(kind):
    of = [*stored(normal(5, 8), kind), None, None, None]
    assert LINEARS(torch.empty(2, 0, 8), of, [5], "none", None, [-1], [0.0]).shape == (2, 0, 5)


WITHOUT_AMX = """
import sys, torch
from bert_evaluation import kernels
assert kernels.why_not(torch.int8, torch.device("cpu")) is None
calls = torch.load(sys.argv[1])
torch.save([getattr(kernels, name)(*arguments) for name, arguments in calls], sys.argv[2])
"""


def test_on_avx512_as_on_amx(tmp_path):
    if not torch.cpu.get_capabilities().get("amx_tile"):
        pytest.skip("This processor has no AMX.")
    q, mask = normal(3, 40, 64).bfloat16(), torch.rand(3, 1, 1, 40, generator=random()) < 0.5
    calls = [("ATTENTION", (q, q.flip(1), -q, mask, 4, 0.25))]
    exact = [False]
    for kind in (*KINDS, SLICES):
        for rows, inputs, outputs in ((1, 7, 5), (40, 130, 100), (300, 64, 33), (70, 2000, 32), (300, 300, 900)):
            x, bias = normal(rows, inputs), normal(outputs, seed=1)
            packed = stored(normal(outputs, inputs, seed=2), kind)
            calls.append(("LINEAR", (x, *packed, bias, outputs, "gelu")))
            exact.append(kind is torch.int8)
    torch.save(calls, tmp_path / "calls.pt")
    run(WITHOUT_AMX, tmp_path / "calls.pt", tmp_path / "found.pt", BERT_EVALUATION_AMX=0)
    for (name, arguments), same, found in zip(calls, exact, torch.load(tmp_path / "found.pt"), strict=True):
        here = getattr(kernels, name)(*arguments)
        if same:
            assert torch.equal(found, here)
        else:
            assert torch.allclose(found.float(), here.float(), rtol=2.0**-8, atol=1e-3)


# Attention.


def heads_of(tensor, heads):
    return tensor.double().view(*tensor.shape[:2], heads, -1).transpose(1, 2)


def attended(q, k, v, mask, heads, scale):
    """Attention in float64 by its formula, and the mean of the values' sizes that it weighs."""
    q, k, v = (heads_of(each, heads) for each in (q, k, v))
    scores = scale * q @ k.transpose(2, 3)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0.0)
    return tuple((weights @ each).transpose(1, 2).flatten(2) for each in (v, v.abs()))


def near(found, q, k, v, mask, heads, scale):
    exact, size = attended(q, k, v, mask, heads, scale)
    # Weights and results are rounded to the type, scores and sums are float32.
    scores = (scale * heads_of(q, heads)).abs().sum(-1).amax() * heads_of(k, heads).abs().amax()
    rounded = 2.0**-20 if q.dtype is torch.float32 else 2.0**-8
    off = (rounded + 2.0**-20 * float(scores)) * size + rounded * exact.abs() + 1e-30
    return bool(((found.double() - exact).abs() <= 1.05 * off).all())


SHAPES = {
    "none": None,
    "of keys": (1, 1, 1, "L"),
    "of keys, alone": ("L",),
    "of each sequence": ("B", 1, 1, "L"),
    "of queries": ("B", 1, "L", 1),
    "of pairs": ("L", "L"),
    "of each sequence's pairs": ("B", 1, "L", "L"),
    "of heads": (1, "H", 1, "L"),
    "of everything": ("B", "H", "L", "L"),
    "of nothing": (1, 1, 1, 1),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("length", [1, 31, 32, 33, 70])
def test_attention_with_every_shape_of_mask(attends, shape, length):
    batch, heads, width = 3, 2, 10
    q, k, v = (2 * normal(batch, length, heads * width, seed=seed).to(attends) for seed in range(3))
    masks = [None]
    if SHAPES[shape] is not None:
        sizes = [{"B": batch, "H": heads, "L": length}.get(size, size) for size in SHAPES[shape]]
        masks = [torch.rand(sizes, generator=random(4)) < share for share in (0.0, 0.1, 0.6, 2.0)]
        masks.append(masks[2].transpose(-1, -2).contiguous().transpose(-1, -2) if len(sizes) > 1 else masks[2])
    for mask in masks:
        found = ATTENTION(q, k, v, mask, heads, 0.3)
        assert near(found, q, k, v, mask, heads, 0.3)
        if mask is not None:
            blind = ~mask.expand(batch, heads, length, length).any(-1).transpose(1, 2)
            assert not found.view(batch, length, heads, width)[blind].any()


@settings(deadline=None, max_examples=60)
@given(
    batch=st.integers(1, 4),
    length=st.integers(1, 100),
    heads=st.integers(1, 4),
    half=st.integers(1, 40),
    scale=st.sampled_from([0.125, 1.0, -0.5, 0.0, 3.0]),
    seed=seeds,
)
def test_attention_of_any_size(attends, batch, length, heads, half, scale, seed):
    q, k, v = (normal(batch, length, heads * 2 * half, seed=seed + i).to(attends) for i in range(3))
    mask = torch.rand(batch, 1, 1, length, generator=random(seed)) < 0.7
    for each in (None, mask):
        assert near(ATTENTION(q, k, v, each, heads, scale), q, k, v, each, heads, scale)


@pytest.mark.parametrize("width", [2, 32, 62, 64, 128])
def test_attention_of_512_tokens(attends, width):
    q, k, v = (normal(2, 512, 2 * width, seed=seed).to(attends) for seed in range(3))
    mask = (torch.arange(512) < torch.tensor([[300], [512]]))[:, None, None]
    assert near(ATTENTION(q, k, v, mask, 2, width**-0.5), q, k, v, mask, 2, width**-0.5)


def test_attention_of_parts_of_something_wider(attends):
    merged = normal(3, 40, 3 * 24).to(attends)
    parts = merged.split(24, dim=-1)
    expected = ATTENTION(*(part.contiguous() for part in parts), None, 3, 0.4)
    assert torch.equal(ATTENTION(*parts, None, 3, 0.4), expected)
    turned = [part.transpose(0, 1).contiguous().transpose(0, 1) for part in parts]
    assert torch.equal(ATTENTION(*turned, None, 3, 0.4), expected)
    backwards = [part.contiguous().flip(2)[..., torch.arange(23, -1, -1)] for part in parts]
    assert torch.equal(ATTENTION(*backwards, None, 3, 0.4), expected)
    assert torch.equal(
        ATTENTION(*(part[:, ::2] for part in parts), None, 3, 0.4)[2],
        ATTENTION(*(part[2:, ::2].contiguous() for part in parts), None, 3, 0.4)[0],
    )
    # A dimension of size 1 has a stride that says nothing.
    single = normal(1, 300, 24).to(attends).transpose(0, 1)
    assert torch.allclose(ATTENTION(single, single, single, None, 3, 0.4), single, rtol=1e-6)


def test_a_query_that_is_not_finite_stays_so_and_leaves_others_alone(attends):
    q, k, v = (normal(2, 40, 24, seed=seed).to(attends) for seed in range(3))
    clean = ATTENTION(q, k, v, None, 3, 0.4)
    for tensor in (0, 1):
        spoilt = [q.clone(), k.clone(), v]
        spoilt[tensor][1, 7, 8:16] = torch.nan
        found = ATTENTION(*spoilt, None, 3, 0.4)
        wrong = torch.zeros(2, 40, 24, dtype=torch.bool)
        wrong[1, 7 if tensor == 0 else slice(None), 8:16] = True
        assert found[wrong].isnan().all()
        assert torch.equal(found[~wrong], clean[~wrong])
    seen = torch.arange(40) != 7
    assert torch.equal(ATTENTION(*spoilt, seen, 3, 0.4), ATTENTION(q, k, v, seen, 3, 0.4))


@pytest.mark.parametrize("others", [-1024.0, -64.0, 32.0, 64.0, 128.0, 1024.0])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_where_the_first_score_says_little_about_others(attends, others, masked):
    # Half of the queries see scores of 0 alone, others also one, or many, that are out of range of that.
    length = 100
    keys = torch.zeros(3, length, 8)
    keys[0, 70, 0] = keys[1, 1:, 0] = keys[2, 40:, 0] = others
    keys[2, 99, 0] = 1.5 * others
    queries = torch.zeros(3, length, 8)
    queries[:, ::2, 0] = 1
    q, k, v = (each.to(attends) for each in (queries, keys, normal(3, length, 8)))
    mask = torch.rand(3, 1, length, length, generator=random(1)) < 0.6 if masked else None
    found = ATTENTION(q, k, v, mask, 1, 1.0)
    assert near(found, q, k, v, mask, 1, 1.0)
    # Those that see nothing of that are as they are without it.
    assert torch.equal(found[:, 1::2], ATTENTION(torch.zeros_like(q), k, v, mask, 1, 1.0)[:, 1::2])


def test_a_key_whose_score_is_minus_infinity_is_not_seen(attends):
    q, k, v = (normal(1, 40, 2, seed=seed).to(attends) for seed in range(3))
    q, seen = q.abs(), torch.ones(40, dtype=torch.bool)
    for key in (0, 35):
        k[0, key], seen[key] = -torch.inf, False
    found, expected = ATTENTION(q, k, v, None, 1, 1.0), ATTENTION(q, k, v, seen, 1, 1.0)
    assert torch.allclose(found, expected, rtol=0, atol=1e-6)


def test_attention_on_several_threads_and_alone(attends, threads):
    q, k, v = (normal(5, 70, 48, seed=seed).to(attends) for seed in range(3))
    mask = torch.rand(5, 1, 1, 70, generator=random(4)) < 0.6
    found = []
    for number in (1, 2, 3):
        threads(number)
        found.append(ATTENTION(q, k, v, mask, 3, 0.4))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    alone = ATTENTION(q[3:4], k[3:4], v[3:4], mask[3:4], 3, 0.4)
    assert torch.equal(alone[0], found[0][3])


def test_the_references_attention():
    q, k, v = (normal(4, 5, 24, seed=seed).bfloat16() for seed in range(3))
    mask = MASKED.bool()[:, None, None]
    found = kernels.TWINS[ATTENTION](q, k, v, mask, 3, 0.4)
    assert torch.allclose(found.double(), attended(q, k, v, mask, 3, 0.4)[0], atol=0.03)
    assert not found[1].any()


@pytest.mark.parametrize("twin", [False, True])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_packed_attention_is_that_of_each_sequence(attends, dtype, twin):
    packs, one = (kernels.TWINS[each] if twin else each for each in (PACKED, ATTENTION))
    mask = MASKED.to(dtype)
    merged = normal(1, int(MASKED.sum()), 72).to(attends)
    q, k, v = merged.split(24, dim=-1)
    found, start = packs(q, k, v, mask, 3, 0.4), 0
    assert found.shape == q.shape
    for count in MASKED.sum(1).tolist():
        part = slice(start, start + count)
        if count:
            alone = one(*(each[:, part].contiguous() for each in (q, k, v)), None, 3, 0.4)
            assert torch.allclose(found[:, part].float(), alone.float(), atol=0.02 if twin else 0)
        start += count
    assert packs(*(each[:, :0] for each in (q, k, v)), torch.zeros_like(mask), 3, 0.4).shape == (1, 0, 24)


@settings(deadline=None, max_examples=30)
@given(lengths=st.lists(st.integers(0, 70), min_size=1, max_size=5), seed=seeds)
def test_packed_attention_of_any_lengths(attends, lengths, seed):
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    q, k, v = (normal(1, sum(lengths), 24, seed=seed + i).to(attends) for i in range(3))
    found = PACKED(q, k, v, mask, 3, 0.4)
    padded = [varlen.pad(each, mask) for each in (q, k, v)]
    expected = varlen.unpad(ATTENTION(*padded, mask[:, None, None], 3, 0.4), varlen.places(mask))
    assert torch.allclose(found.float(), expected.float(), atol=0.02)


def test_attention_in_float16_is_computed_in_plain_pytorch():
    able(torch.int8)
    q, mask = normal(4, 5, 24).half(), MASKED.bool()
    assert torch.equal(
        ATTENTION(q, q, q, mask[:, None, None], 3, 0.4), kernels.TWINS[ATTENTION](q, q, q, mask[:, None, None], 3, 0.4)
    )
    packed = varlen.unpad(q, varlen.places(mask))
    assert torch.equal(
        PACKED(packed, packed, packed, mask, 3, 0.4), kernels.TWINS[PACKED](packed, packed, packed, mask, 3, 0.4)
    )


def test_the_largest_products_are_summed_exactly():
    """Where there is no VNNI, as elsewhere: 127 * 127 each, all of one sign, in pairs and in all."""
    able(torch.int8)
    x, weight = torch.full((33, 3000), -127.0), torch.full((40, 3000), 127.0)
    found = LINEAR(x, kernels.pack(weight.to(torch.int8)), torch.ones(40), None, 40)
    assert torch.equal(found, torch.full((33, 40), -127.0 * 127 * 3000))


# What they do not take.


X, Q = torch.ones(3, 8), torch.ones(2, 4, 8).bfloat16()
W = kernels.pack(torch.ones(5, 8).bfloat16())
CALLS = {
    "x is one number": (LINEAR, (torch.tensor(1.0), W, None, None, 5), "with one input at least"),
    "no inputs": (LINEAR, (torch.ones(3, 0), W, None, None, 5), "with one input at least"),
    "integers": (LINEAR, (X.int(), W, None, None, 5), "x is float32 or bfloat16"),
    "more inputs": (LINEAR, (torch.ones(3, 33), W, None, None, 5), "packed for other sizes"),
    "more outputs": (LINEAR, (X, W, None, None, 40), "packed for other sizes"),
    "fewer than no outputs": (LINEAR, (X, W, None, None, -5), "packed for other sizes"),
    "a plain weight": (LINEAR, (X, torch.ones(5, 8).bfloat16(), None, None, 5), "The weight is packed"),
    "a weight in float64": (LINEAR, (X, W.double(), None, None, 5), "The weight is packed"),
    "a weight in float32, x in bfloat16": (LINEAR, (X.bfloat16(), W.float(), None, None, 5), "The weight is packed"),
    "a part of a weight": (LINEAR, (X, W[:, :, :8].contiguous(), None, None, 5), "packed for other sizes"),
    "a weight turned": (LINEAR, (X, W.transpose(1, 2), None, None, 5), "The weight is packed"),
    "another group": (LINEAR, (X, W.view(2, 8, 16, 4), None, None, 5), "packed for other sizes"),
    "scales for bfloat16": (LINEAR, (X, W, torch.ones(5), None, 5), "The weight is packed"),
    "slices of another size": (LINEAR, (X, *kernels.slice_up(torch.ones(5, 65)), None, 5), "packed for other sizes"),
    "slices, x in bfloat16": (
        LINEAR,
        (X.bfloat16(), *kernels.slice_up(torch.ones(5, 8)), None, 5),
        "The weight is packed",
    ),
    "slices without scales": (
        LINEAR,
        (X, kernels.slice_up(torch.ones(5, 8))[0], None, None, 5),
        "The weight is packed",
    ),
    "int8 without scales": (LINEAR, (X, W.to(torch.int8), None, None, 5), "The weight is packed"),
    "a bias too short": (LINEAR, (X, W, None, torch.ones(4), 5), "one number for each output"),
    "a bias in float64": (LINEAR, (X, W, None, torch.ones(5).double(), 5), "one number for each output"),
    "a residual of another shape": (LINEAR, (X, W, None, None, 5, "none", torch.ones(5)), "What is added"),
    "a residual of another type": (LINEAR, (X, W, None, None, 5, "none", torch.ones(3, 5).half()), "What is added"),
    "another activation": (LINEAR, (X, W, None, None, 5, "tanh"), "There is no activation 'tanh' here."),
    "chain: none": (LINEARS, (X, [], [], "", None, [], []), "Of each linear there are five tensors"),
    "chain: a tensor too few": (
        LINEARS,
        (X, [W] + 3 * [None], [5], "none", None, [-1], [0.0]),
        "there are five tensors",
    ),
    "chain: no weight": (LINEARS, (X, 5 * [None], [5], "none", None, [-1], [0.0]), "Each linear has a weight."),
    "chain: nothing to add": (LINEARS, (X, [W] + 4 * [None], [5], "none", None, [0], [0.0]), "What is added"),
    "chain: what is still to come": (LINEARS, (X, [W] + 4 * [None], [5], "none", X, [1], [0.0]), "was made before"),
    "chain: an activation too few": (
        LINEARS,
        (X[:, :5], 2 * ([kernels.pack(torch.ones(5, 5))] + 4 * [None]), [5, 5], "none", None, [-1, -1], [0.0, 0.0]),
        "There is no activation ''",
    ),
    "chain: two kinds": (
        LINEARS,
        (X, [W, *4 * [None], W.float(), *4 * [None]], [5, 5], "none none", None, [-1, -1], [0.0, 0.0]),
        "The weights of a chain are of one kind.",
    ),
    "no heads": (ATTENTION, (Q, Q, Q, None, 0, 1.0), "are of one shape"),
    "fewer than no heads": (ATTENTION, (Q, Q, Q, None, -2, 1.0), "are of one shape"),
    "heads of odd width": (ATTENTION, (Q, Q, Q, None, 8, 1.0), "are of one shape"),
    "two types": (ATTENTION, (Q, Q.float(), Q, None, 2, 1.0), "are of one shape"),
    "keys of other sequences": (ATTENTION, (Q, Q[:, :3], Q[:, :3], None, 2, 1.0), "are of one shape"),
    "one dimension": (ATTENTION, (Q[0, 0], Q[0, 0], Q[0, 0], None, 2, 1.0), "are of one shape"),
    "a mask of numbers": (ATTENTION, (Q, Q, Q, torch.zeros(4, 4), 2, 1.0), "The mask is boolean."),
    "a mask of another shape": (ATTENTION, (Q, Q, Q, torch.ones(3, 4).bool(), 2, 1.0), "size"),
    "packed: more tokens": (PACKED, (Q[:1], Q[:1], Q[:1], torch.ones(1, 3), 2, 1.0), "as many tokens as the mask has"),
    "packed: a batch": (PACKED, (Q, Q, Q, torch.ones(2, 4), 2, 1.0), "as many tokens as the mask has"),
    "packed: no rows": (PACKED, (Q[:1], Q[:1], Q[:1], torch.ones(4), 2, 1.0), "(batch, length)"),
    "packed: no heads": (PACKED, (Q[:1], Q[:1], Q[:1], torch.ones(1, 4), 0, 1.0), "are of one shape"),
}


@pytest.mark.parametrize("call", CALLS)
def test_what_they_do_not_take_is_said(call):
    able(SLICES if call.startswith("slices") else torch.bfloat16)
    operator, arguments, said = CALLS[call]
    with pytest.raises(RuntimeError) as caught:
        operator(*arguments)
    assert said in str(caught.value).splitlines()[0]


# Whether there are any, and compiling them.


def test_why_there_are_none(monkeypatch):
    assert "for a CPU, and the graph is on cuda" in kernels.why_not(torch.int8, torch.device("cuda"))
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert kernels.why_not(torch.int8, CPU) == "This processor has no AVX2."
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(("avx2", "avx512_f", "avx512_vnni"), True))
    assert kernels.why_not(torch.bfloat16, CPU) == "This processor has no AVX-512 with BF16."
    assert kernels.why_not(torch.float32, CPU) == kernels.why_not(torch.int8, CPU)


def test_why_there_is_no_attention():
    assert kernels.why_no_attention(torch.float32, 64, CPU) == kernels.why_not(torch.float32, CPU)
    assert kernels.why_no_attention(torch.float64, 64, CPU).endswith("the kernels are for bfloat16 and float32.")
    assert kernels.why_no_attention(torch.bfloat16, 63, CPU) == "A head's width is odd."


NO_COMPILER = """
import sys, torch
from bert_evaluation import kernels
from bert_evaluation.kernels.build import why_not_built
print(why_not_built())
torch.save(kernels.LINEAR(*torch.load(sys.argv[1])), sys.argv[2])
"""


def test_without_a_compiler_the_same_is_computed(tmp_path):
    arguments = (normal(5, 20), *stored(normal(9, 20), torch.int8), normal(9), 9, "gelu")
    torch.save(arguments, tmp_path / "arguments.pt")
    nowhere = {"CXX": tmp_path / "nowhere", "XDG_CACHE_HOME": tmp_path / "cache", "HOME": tmp_path}
    said = run(NO_COMPILER, tmp_path / "arguments.pt", tmp_path / "found.pt", **nowhere)
    assert said.startswith("The kernels could not be compiled (")
    assert said.endswith("); they need g++ and ninja.")
    assert f"there is no {tmp_path / 'nowhere'}" in said
    assert len(said.splitlines()) == 1
    assert torch.equal(torch.load(tmp_path / "found.pt"), PLAIN(*arguments))


FROM_THE_CACHE = """
from bert_evaluation import extension
from bert_evaluation.kernels import build
def _compile(*_): raise RuntimeError("it was compiled again")
extension._compile = _compile
print(build.why_not_built())
"""


def test_a_second_process_compiles_nothing(attends):
    assert build.why_not_built() is None
    assert run(FROM_THE_CACHE) == "None"
