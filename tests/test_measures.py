"""Measures against slow literal formulas in double precision, and their promises."""

import copy
import math
import warnings
from functools import partial

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn

from robustnb.measures import (
    MEASURES,
    Accumulator,
    CentredError,
    EnergyRelativeError,
    LinearCKA,
    Measure,
    _sketches,
    as_measure,
    block_gain,
    change_norm,
    cosine_distance,
    lipschitz_ratio,
    mse,
    pearson_distance,
    relative_error,
    relative_l1,
    relative_linf,
    sign_flip,
    topk_overlap,
)

inf = math.inf
SAMPLE = [m for m in MEASURES.values() if not m.stream]
STREAM = [m for m in MEASURES.values() if m.stream]
SMOOTH = [m for m in MEASURES.values() if m.differentiable]
every_measure = pytest.mark.parametrize('measure', MEASURES.values(), ids=MEASURES.keys())
every_sample_measure = pytest.mark.parametrize('measure', SAMPLE, ids=[m.name for m in SAMPLE])
every_stream_measure = pytest.mark.parametrize('measure', STREAM, ids=[m.name for m in STREAM])
every_smooth_measure = pytest.mark.parametrize('measure', SMOOTH, ids=[m.name for m in SMOOTH])

SHAPES = [(5, 7), (5, 3, 4, 2), (5,), (5, 1), (1, 6), (5, 2, 3), (0, 7), (0,), (0, 3, 4, 4)]
every_shape = pytest.mark.parametrize('shape', SHAPES, ids=str)


# The formulas, written down literally: loops, double precision, one sample at a time


def length(v):
    return math.sqrt(math.fsum(float(a) ** 2 for a in v))


def quotient(top, bottom):
    return top / bottom if bottom else (inf if top else 0.0)


def literal_relative_error(clean, pert):
    return quotient(length([p - c for c, p in zip(clean, pert, strict=True)]), length(clean))


def literal_cosine_distance(clean, pert):
    a, b = length(clean), length(pert)
    if not a or not b:
        return inf if a or b else 0.0
    return 1 - math.fsum(float(c) * float(p) for c, p in zip(clean, pert, strict=True)) / (a * b)


def literal_mse(clean, pert):
    return math.fsum((float(p) - float(c)) ** 2 for c, p in zip(clean, pert, strict=True)) / len(clean)


def literal_relative_l1(clean, pert):
    return quotient(math.fsum(abs(p - c) for c, p in zip(clean, pert, strict=True)), math.fsum(abs(c) for c in clean))


def literal_relative_linf(clean, pert):
    return quotient(max(abs(p - c) for c, p in zip(clean, pert, strict=True)), max(abs(c) for c in clean))


def less_its_mean(values):
    mean = math.fsum(values) / len(values)
    return [v - mean for v in values]


def literal_pearson_distance(clean, pert):
    return literal_cosine_distance(less_its_mean(clean), less_its_mean(pert))


def literal_change_norm(clean, pert):
    return length([p - c for c, p in zip(clean, pert, strict=True)])


def literal_sign_flip(clean, pert):
    return sum((c > 0) != (p > 0) for c, p in zip(clean, pert, strict=True)) / len(clean)


def literal_topk_overlap(clean, pert, k=None):
    k = max(1, len(clean) // 10) if k is None else k
    tops = [sorted(range(len(rep)), key=lambda i: (-rep[i], i))[:k] for rep in (clean, pert)]
    return len(set(tops[0]) & set(tops[1])) / k


def literal_energy_relative_error(clean, pert):
    return quotient(length((pert - clean).ravel()), length(clean.ravel()))


def centred(reps):
    "Each unit less its mean over the samples."
    return np.array([less_its_mean(unit) for unit in reps.T if len(unit)]).reshape(reps.T.shape).T


def literal_centred_error(clean, pert):
    return quotient(length((pert - clean).ravel()), length(centred(clean).ravel()))


def gram_cka(clean, pert):
    "The definition, with the matrices of inner products between samples."
    k, kk = (c @ c.T for c in map(centred, (clean, pert)))
    if not k.any() or not kk.any():
        return inf if k.any() or kk.any() else 1.0
    return math.fsum((k * kk).ravel()) / (length(k.ravel()) * length(kk.ravel()))


LITERAL = {
    'relative_error': literal_relative_error,
    'relative_l1': literal_relative_l1,
    'relative_linf': literal_relative_linf,
    'cosine_distance': literal_cosine_distance,
    'pearson_distance': literal_pearson_distance,
    'mse': literal_mse,
    'change_norm': literal_change_norm,
    'sign_flip': literal_sign_flip,
    'topk_overlap': literal_topk_overlap,
}
LITERAL_STREAM = {
    'energy_relative_error': literal_energy_relative_error,
    'centred_error': literal_centred_error,
    'linear_cka': gram_cka,
}


def as_rows(*reps):
    "The samples of each representation as rows, in double precision."
    return (np.asarray(t.detach().double()).reshape(len(t), math.prod(t.shape[1:])) for t in reps)


def literal(name, clean, pert):
    "A sample measure, one sample after the other, or the stream measure over all of them."
    clean, pert = as_rows(clean, pert)
    if name in LITERAL_STREAM:
        return LITERAL_STREAM[name](clean, pert)
    return np.array([LITERAL[name](c, p) for c, p in zip(clean, pert, strict=True)])


def pair(shape, dtype=torch.float32, scale=1.0, seed=0):
    "A representation and a perturbed one."
    g = torch.Generator().manual_seed(seed)
    clean = torch.randn(shape, generator=g, dtype=torch.float64)
    pert = clean + 0.3 * torch.randn(shape, generator=g, dtype=torch.float64)
    return (clean * scale).to(dtype), (pert * scale).to(dtype)


def close(got, expected, rtol=1e-6, atol=1e-7):
    np.testing.assert_allclose(np.asarray(got.detach().double()), expected, rtol=rtol, atol=atol)


@every_measure
@every_shape
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_measure_equals_its_formula(measure, shape, dtype):
    clean, pert = pair(shape, dtype)
    expected = literal(measure.name, clean, pert)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        got = measure(clean, pert)
    precise = dtype == torch.float64
    close(got, expected, rtol=1e-12 if precise else 2e-6, atol=1e-13 if precise else 4e-7)
    assert got.shape == (() if measure.stream else shape[:1])
    assert got.dtype in (torch.float32, torch.float64) and torch.finfo(got.dtype).eps <= torch.finfo(dtype).eps


def test_every_measure_has_a_literal_form():
    assert set(LITERAL) == {m.name for m in SAMPLE} and set(LITERAL_STREAM) == {m.name for m in STREAM}


@every_measure
@pytest.mark.parametrize('dtype', [torch.int64, torch.uint8, torch.bool], ids=str)
def test_whole_numbers_are_welcome(measure, dtype):
    clean = torch.tensor([[1, 0, 1], [1, 1, 1]]).to(dtype)
    pert = torch.tensor([[1, 1, 0], [1, 1, 1]]).to(dtype)
    close(measure(clean, pert), literal(measure.name, clean, pert))


@every_measure
def test_mixed_precision(measure):
    clean, pert = pair((4, 6))
    expected = literal(measure.name, clean.half(), pert)
    close(measure(clean.half(), pert), expected, rtol=2e-6, atol=4e-7)


@every_measure
def test_any_layout(measure):
    clean, pert = pair((4, 3, 5, 5))
    expected = measure(clean, pert)
    for change in (
        lambda t: t.to(memory_format=torch.channels_last),
        lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
        lambda t: torch.stack([t, t], dim=-1)[..., 0],
    ):
        torch.testing.assert_close(measure(change(clean), pert), expected)
    once = clean[:1].expand(4, -1, -1, -1)
    torch.testing.assert_close(measure(once, pert), measure(once.contiguous(), pert))


# Half precision, and other numbers at the edge


@every_measure
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_does_not_overflow(measure, dtype):
    "Squares and sums of a representation like this leave float16 after the first unit."
    clean, pert = pair((4, 20_000), dtype, scale=3000)
    got = measure(clean, pert)
    assert got.isfinite().all()
    close(got, literal(measure.name, clean, pert), rtol=0.02 if measure.fn is LinearCKA else 1e-5)  # CKA: an estimate


@every_measure
def test_extreme_float16(measure):
    clean = torch.full((2, 1000), 65504, dtype=torch.float16)
    close(measure(clean, -clean), literal(measure.name, clean, -clean), rtol=1e-5)


@every_measure
@pytest.mark.parametrize('scale', [1e-15, 1e-6, 1e6, 1e15])
def test_wide_range(measure, scale):
    clean, pert = pair((4, 50), scale=scale)
    close(
        measure(clean, pert),
        literal(measure.name, clean, pert),
        rtol=1e-5,
        atol=0 if measure.fn in (mse, change_norm) else 1e-6,
    )


@every_measure
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('scale', [1e19, 1e22, 1e30, 3e37])
def test_overflow_is_undefined_and_never_a_perfect_zero(measure, dtype, scale):
    clean, pert = pair((4, 50), dtype, scale=scale)
    values = measure(clean, pert)
    exact = torch.as_tensor(literal(measure.name, clean, pert), dtype=torch.float64)
    right = torch.isclose(values.double(), exact, rtol=1e-4)
    assert (right | (values == inf)).all(), values


@every_measure
@pytest.mark.parametrize('bad', [math.nan, inf, -inf])
@pytest.mark.parametrize('where', ['clean', 'pert', 'both'])
def test_numbers_that_are_none_are_never_hidden(measure, bad, where):
    clean, pert = pair((3, 4))
    for name, t in (('clean', clean), ('pert', pert)):
        if where in (name, 'both'):
            t[1, 2] = bad
    values = measure(clean, pert)
    if measure.stream:
        assert not values.isfinite()
    else:
        assert not values[1].isfinite() and values[[0, 2]].isfinite().all()


# What is undefined


@pytest.mark.parametrize('unit_shape', [(), (1,), (6,), (2, 3, 2)], ids=str)
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_silence(unit_shape, dtype):
    zero, one = torch.zeros(1, *unit_shape, dtype=dtype), torch.ones(1, *unit_shape, dtype=dtype)
    for measure in (relative_error, relative_l1, relative_linf, cosine_distance):
        assert measure(zero, zero).tolist() == [0], 'silent twice: nothing moved'
        assert measure(zero, one).tolist() == [inf], 'undefined'
    for measure in (relative_error, relative_l1, relative_linf):
        assert measure(one, zero).tolist() == [1]
    assert cosine_distance(one, zero).tolist() == [inf]
    assert mse(zero, zero).tolist() == [0] and mse(zero, one).tolist() == [1]
    assert change_norm(zero, zero).tolist() == [0]
    assert sign_flip(zero, zero).tolist() == [0] and sign_flip(zero, one).tolist() == [1]
    assert topk_overlap(zero, zero).tolist() == topk_overlap(zero, one).tolist() == [1]


@pytest.mark.parametrize('units', [2, 3, 7, 1000])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_pearson_of_constants(units, dtype):
    "The mean of equal numbers is not always that number, after rounding; a constant has to be seen as one anyway."
    tenth, seven = (torch.full((3, units), v, dtype=dtype) for v in (0.1, 7e3))
    varied = torch.arange(3 * units).reshape(3, units).to(dtype)
    assert pearson_distance(tenth, seven).tolist() == pearson_distance(tenth, tenth).tolist() == [0] * 3
    assert pearson_distance(tenth, varied).tolist() == pearson_distance(varied, seven).tolist() == [inf] * 3


def test_constants_over_the_data_set():
    "Every sample has the same representation: there is no spread to compare with."
    g = torch.Generator().manual_seed(0)
    for units in (3, 300):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            same = torch.randn(1, units, generator=g).to(dtype).expand(7, -1)
            varied = torch.randn(7, units, generator=g).to(dtype)
            for cuts in ([], [1, 3]):
                cka, error = (
                    [
                        float(fed(kind, zip(split(a, cuts), split(b, cuts), strict=True)).compute())
                        for a, b in ((same, same), (same, same + 1), (same, varied), (varied, same))
                    ]
                    for kind in (LinearCKA, CentredError)
                )
                assert cka == [1, 1, inf, inf]
                assert error[:3] == [0, inf, inf] and 0 < error[3] < inf


def test_energy_of_silence():
    zero, one = torch.zeros(3, 2), torch.ones(3, 2)
    measure = MEASURES['energy_relative_error']
    assert float(measure(zero, zero)) == 0
    assert float(measure(zero, one)) == inf
    assert float(measure(one, zero)) == 1
    mixed = torch.cat([zero, one])
    assert float(measure(mixed, torch.ones(6, 2))) == 1, 'the change of a silent sample counts'


@every_sample_measure
def test_one_silent_sample_does_not_touch_the_others(measure):
    clean, pert = pair((4, 6))
    expected = measure(clean, pert)
    clean[2] = 0
    got = measure(clean, pert)
    assert torch.equal(got[[0, 1, 3]], expected[[0, 1, 3]])


def test_negative_zero_is_silent():
    assert relative_error(torch.tensor([[-0.0]]), torch.tensor([[0.0]])).tolist() == [0]
    assert cosine_distance(torch.tensor([[-0.0]]), torch.tensor([[0.0]])).tolist() == [0]


# Gradients


def awkward_pair(dtype):
    "Rows: ordinary, equal, silent twice, silent then not, not then silent, opposite, parallel, one unit off, small."
    small = 1e-3 if dtype == torch.float16 else 1e-9  # the true slope is 1 / small, which the type has to hold
    v, zero = [1, 2, 3], [0, 0, 0]
    clean = [v, v, zero, zero, v, v, v, v, [small, 0, 0]]
    pert = [[3, 2, 5], v, zero, [1, 0, 2], zero, [-1, -2, -3], [2, 4, 6], [1, 2, 4], [0, small, 0]]
    return torch.tensor(clean, dtype=dtype), torch.tensor(pert, dtype=dtype)


@every_smooth_measure
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_gradients_are_finite_everywhere(measure, dtype):
    clean, pert = (t.requires_grad_() for t in awkward_pair(dtype))
    with torch.autograd.set_detect_anomaly(True):  # nan in the middle is as bad as nan at the end
        value = measure(clean, pert)
        defined = value[value.isfinite()].sum()
        for t in torch.autograd.grad(defined, (clean, pert), retain_graph=True):
            assert t.isfinite().all(), t
        if not measure.stream:
            for t in torch.autograd.grad(value.sum(), (clean, pert)):
                assert t.isfinite().all(), t


@every_smooth_measure
@pytest.mark.parametrize('rows', [1, 4])
def test_gradients_at_no_change(measure, rows):
    clean = pair((rows, 5))[0]
    a, b = clean.clone().requires_grad_(), clean.clone().requires_grad_()
    for g in torch.autograd.grad(measure(a, b).sum(), (a, b)):
        assert g.isfinite().all()


@every_smooth_measure
@pytest.mark.parametrize('shape', [(3, 4), (3,), (2, 2, 3)], ids=str)
def test_gradients_are_right(measure, shape):
    clean, pert = pair(shape, torch.float64)
    assert torch.autograd.gradcheck(measure, (clean.requires_grad_(), pert.requires_grad_()))


@pytest.mark.parametrize('name', ['relative_error', 'relative_l1', 'relative_linf', 'cosine_distance'])
@pytest.mark.parametrize('side', [0, 1])
def test_gradients_where_a_length_overflows(name, side):
    pairs = [torch.randn(2, 4, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    pairs[side][0] = torch.tensor([3e38, 3e38, -3e38, 3e38])
    pairs = [t.requires_grad_() for t in pairs]
    for g in torch.autograd.grad(MEASURES[name](*pairs).sum(), pairs):
        assert g.isfinite().all() and g[1].abs().sum() > 0


def test_gradient_of_an_undefined_value_is_zero():
    for measure in (relative_error, relative_l1, relative_linf, cosine_distance, pearson_distance):
        clean, pert = torch.zeros(1, 3, requires_grad=True), torch.tensor([[1.0, 2.0, 4.0]], requires_grad=True)
        value = measure(clean, pert)
        assert value.tolist() == [inf]
        for g in torch.autograd.grad(value.sum(), (clean, pert)):
            assert torch.equal(g, torch.zeros(1, 3))


def test_differentiable_is_a_fact():
    clean, pert = (t.requires_grad_() for t in pair((3, 4)))
    for measure in MEASURES.values():
        assert measure(clean, pert).requires_grad == measure.differentiable


def test_gradient_of_a_folded_cka():
    class Folded(LinearCKA):
        width = 4

    clean, pert = pair((5, 11), torch.float64)
    measure = as_measure(Folded)
    with torch.inference_mode():  # what is remembered from here must not spoil the gradient
        measure(clean, pert)
    assert torch.autograd.gradcheck(measure, (clean.requires_grad_(), pert.requires_grad_()))


# Promises

numbers = st.floats(-1e6, 1e6, width=32, allow_subnormal=False).map(lambda v: 0.0 if abs(v) < 1e-6 else v)


@st.composite
def pairs(draw, smallest=1, largest=5):
    "A clean and a perturbed representation of `smallest` to `largest` samples."
    shape = draw(st.integers(smallest, largest)), draw(st.integers(1, 6))
    return tuple(torch.from_numpy(draw(arrays(np.float32, shape, elements=numbers))) for _ in range(2))


@every_measure
@given(reps=pairs())
@settings(max_examples=25, deadline=None)
def test_values_stay_in_range(measure, reps):
    for clean, pert in (reps, reps[::-1], (reps[0], -reps[0]), (reps[0], reps[0])):
        value = measure(clean, pert)
        assert not value.isnan().any()
        assert (value >= 0).all()
        assert ((value <= measure.high) | (value == inf)).all()


@every_measure
@given(reps=pairs())
@settings(max_examples=12, deadline=None)
def test_no_change_is_no_damage(measure, reps):
    rounding = 1e-12 if measure.fn is LinearCKA else 0  # a matrix product may round its blocks differently
    assert (measure.damage(measure(reps[0], reps[0].clone())) <= rounding).all()


@every_measure
@given(reps=pairs())
@settings(max_examples=25, deadline=None)
def test_any_change_is_seen(measure, reps):
    clean, pert = reps
    expected = np.asarray(literal(measure.name, clean, pert))
    got = np.asarray(measure(clean, pert).double())
    np.testing.assert_array_equal(np.isinf(got), np.isinf(expected))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@every_sample_measure
@given(reps=pairs(smallest=2), order=st.randoms())
@settings(max_examples=15, deadline=None)
def test_samples_do_not_influence_each_other(measure, reps, order):
    clean, pert = reps
    whole = measure(clean, pert)
    places = list(range(len(clean)))
    order.shuffle(places)
    torch.testing.assert_close(measure(clean[places], pert[places]), whole[places], rtol=1e-6, atol=1e-7)
    cut = order.randrange(1, len(clean))
    parts = torch.cat([measure(clean[:cut], pert[:cut]), measure(clean[cut:], pert[cut:])])
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize('measure', [m for m in MEASURES.values() if m.fn is not topk_overlap], ids=lambda m: m.name)
@given(reps=pairs(), order=st.randoms())
@settings(max_examples=15, deadline=None)
def test_the_order_of_units_does_not_matter(measure, reps, order):
    clean, pert = reps
    places = list(range(clean.shape[1]))
    order.shuffle(places)
    torch.testing.assert_close(measure(clean[:, places], pert[:, places]), measure(clean, pert), rtol=1e-5, atol=1e-6)


@given(reps=pairs(smallest=2), order=st.randoms())
@settings(max_examples=15, deadline=None)
def test_the_order_of_samples_does_not_matter_to_streams(reps, order):
    clean, pert = reps
    places = list(range(len(clean)))
    order.shuffle(places)
    for measure in STREAM:
        torch.testing.assert_close(measure(clean[places], pert[places]), measure(clean, pert), rtol=1e-5, atol=1e-9)


SCALES = st.sampled_from([1e-3, 0.5, 3.0, 1e4])
SCALE_FREE = [
    'relative_error', 'relative_l1', 'relative_linf', 'cosine_distance', 'pearson_distance', 'energy_relative_error',
    'centred_error', 'linear_cka',
]  # fmt: skip


@pytest.mark.parametrize('name', SCALE_FREE)
@given(reps=pairs(), scale=SCALES)
@settings(max_examples=15, deadline=None)
def test_scaling_a_layer_changes_nothing(name, reps, scale):
    clean, pert = reps
    measure = MEASURES[name]
    torch.testing.assert_close(measure(scale * clean, scale * pert), measure(clean, pert), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(measure(-clean, -pert), measure(clean, pert))


@pytest.mark.parametrize('scale', [1e-8, 1e9])
@pytest.mark.parametrize('name', SCALE_FREE)
def test_scaling_a_layer_by_a_lot(name, scale):
    clean, pert = pair((5, 6))
    measure = MEASURES[name]
    torch.testing.assert_close(measure(scale * clean, scale * pert), measure(clean, pert), rtol=1e-4, atol=1e-6)


@given(reps=pairs(), scale=SCALES)
@settings(max_examples=15, deadline=None)
def test_absolute_measures_scale(reps, scale):
    clean, pert = reps
    for measure, power in ((change_norm, 1), (mse, 2)):
        torch.testing.assert_close(
            measure(scale * clean, scale * pert), scale**power * measure(clean, pert), rtol=1e-4, atol=1e-6
        )
        assert torch.equal(measure(pert, clean), measure(clean, pert))


@given(reps=pairs(), scale=SCALES)
@settings(max_examples=15, deadline=None)
def test_cosine_distance_forgives_length(reps, scale):
    clean, pert = reps
    torch.testing.assert_close(cosine_distance(clean, scale * pert), cosine_distance(clean, pert), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(cosine_distance(pert, clean), cosine_distance(clean, pert), rtol=1e-4, atol=1e-6)


@given(seed=st.integers(0, 10**6), scale=SCALES, shift=st.floats(-100, 100))
@settings(max_examples=15, deadline=None)
def test_pearson_distance_forgives_length_and_shift(seed, scale, shift):
    clean, pert = pair((4, 6), torch.float64, seed=seed)
    expected = pearson_distance(clean, pert)
    torch.testing.assert_close(pearson_distance(clean, scale * pert + shift), expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(pearson_distance(clean - shift, pert), expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(pearson_distance(pert, clean), expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(pearson_distance(clean, -pert), 2 - expected, rtol=1e-6, atol=1e-9)
    by_numpy = [1 - np.corrcoef(c, p)[0, 1] for c, p in zip(clean, pert, strict=True)]
    np.testing.assert_allclose(expected, by_numpy, atol=1e-9)


@given(reps=pairs())
@settings(max_examples=15, deadline=None)
def test_norms_are_ordered(reps):
    "Maximum <= Euclid <= L1, for the change, with a silent unit as the yardstick where it is needed."
    clean, pert = reps
    clean[:, 0] = 1  # not silent
    one = torch.ones(len(clean), 1)
    change = torch.cat([one, pert - clean], 1)
    unit = torch.cat([one, torch.zeros_like(clean)], 1)
    low, mid, high = (m(unit, unit + change) for m in (relative_linf, relative_error, relative_l1))
    assert (low <= mid * (1 + 1e-6)).all() and (mid <= high * (1 + 1e-6)).all()


@given(reps=pairs(), scale=SCALES)
@settings(max_examples=15, deadline=None)
def test_sign_flip_sees_signs_only(reps, scale):
    clean, pert = reps
    expected = sign_flip(clean, pert)
    for other in (sign_flip(scale * clean, pert), sign_flip(clean.sign(), pert), sign_flip(pert, clean),
                  sign_flip(clean.relu(), pert.relu())):  # fmt: skip
        assert torch.equal(other, expected)


def test_zeros_are_off():
    assert sign_flip(torch.tensor([[0.0, -0.0, -1.0, 0.0]]), torch.tensor([[-1.0, 0.0, 0.0, 1e-30]])).tolist() == [0.25]


@given(reps=pairs(), k=st.integers(1, 6))
@settings(max_examples=25, deadline=None)
def test_topk_overlap_with_ties(reps, k):
    clean, pert = (rep.round().clamp(-2, 2) for rep in reps)  # many equal units
    k = min(k, clean.shape[1])
    expected = [literal_topk_overlap(c, p, k) for c, p in zip(clean.tolist(), pert.tolist(), strict=True)]
    close(topk_overlap(clean, pert, k), expected)
    assert torch.equal(topk_overlap(clean, pert, k), topk_overlap(pert, clean, k))
    assert (topk_overlap(clean, clean.clone(), k) == 1).all()
    assert (topk_overlap(clean, pert, clean.shape[1]) == 1).all(), 'all units are among all units'
    assert torch.equal(topk_overlap(2 * clean - 7, pert, k), topk_overlap(clean, pert, k)), 'ranks only'


def test_topk_overlap_of_many_units():
    "Without ties the order of the units does not matter; by default a tenth of them counts."
    clean, pert = pair((3, 4, 10, 10))
    places = torch.randperm(400, generator=torch.Generator().manual_seed(1))
    got = topk_overlap(clean, pert)
    assert torch.equal(got, topk_overlap(clean, pert, k=40))
    assert torch.equal(got, topk_overlap(clean.flatten(1)[:, places], pert.flatten(1)[:, places]))
    close(got, literal('topk_overlap', clean, pert))


@pytest.mark.parametrize('k', [0, -1, 5])
def test_topk_overlap_needs_that_many_units(k):
    with pytest.raises(ValueError, match='between 1 and the number of units, 4'):
        topk_overlap(torch.ones(2, 4), torch.ones(2, 4), k=k)


@pytest.mark.parametrize('dtype', [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize('units', [1, 7, 4096])
def test_cosine_distance_never_leaves_its_range(dtype, units):
    "Rounding alone would go beyond 2 for opposite and below 0 for equal representations."
    clean = (100 * pair((500, units))[0]).to(dtype)
    for pert in (-clean, -3 * clean, clean, 3 * clean):
        values = cosine_distance(clean, pert)
        assert (values >= 0).all() and (values <= 2).all()


def test_cosine_distance_of_small_angles():
    "1 - cos would cancel: for an angle of 1e-4 it is 5e-9, below the resolution of float32 near 1."
    angle = 1e-4
    clean, pert = torch.tensor([[1.0, 0.0]]), torch.tensor([[math.cos(angle), math.sin(angle)]])
    close(cosine_distance(clean, pert), [1 - math.cos(angle)], rtol=1e-3, atol=0)


@every_measure
def test_inputs_are_left_alone(measure):
    clean, pert = pair((3, 4))
    before = clean.clone(), pert.clone()
    measure(clean, pert)
    assert torch.equal(clean, before[0]) and torch.equal(pert, before[1])
    with torch.inference_mode():
        assert torch.equal(measure(clean, pert), measure(*before))


# Accumulators


def fed(kind, pieces, state=None):
    accumulator = kind()
    if state is not None:
        accumulator.load_state_dict(state)
    for clean, pert in pieces:
        accumulator.update(clean, pert)
    return accumulator


def split(t, cuts):
    return torch.tensor_split(t, sorted(cuts))


class Narrow(LinearCKA):
    "Folds four units or more."

    width = 3


every_accumulator = pytest.mark.parametrize('kind', [m.fn for m in STREAM] + [Narrow])


@every_accumulator
@given(reps=pairs(largest=9), cuts=st.lists(st.integers(0, 9), max_size=4))
@settings(max_examples=25, deadline=None)
def test_batches_add_up(kind, reps, cuts):
    pieces = list(zip(split(reps[0], cuts), split(reps[1], cuts), strict=True))
    whole, parts = fed(kind, [reps]).compute(), fed(kind, pieces).compute()
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-9)
    if kind is not Narrow:
        expected = LITERAL_STREAM[as_measure(kind).name](*as_rows(*reps))
        np.testing.assert_allclose(float(whole), expected, rtol=1e-5, atol=1e-9)


@every_accumulator
@given(sizes=st.tuples(*[st.integers(0, 5)] * 3), seeds=st.tuples(*[st.integers(0, 10**6)] * 3))
@settings(max_examples=12, deadline=None)
def test_merging_is_associative_and_has_a_neutral_element(kind, sizes, seeds):
    reps = [pair((size, 4), seed=seed) for size, seed in zip(sizes, seeds, strict=True)]

    def merged(*accumulators):
        total = kind()
        for a in accumulators:
            total.merge(a)
        return total

    a, b, c = (lambda i=i: fed(kind, [reps[i]]) for i in range(3))
    left = merged(merged(a(), b()), c()).compute()
    right = merged(a(), merged(b(), c())).compute()
    swapped = merged(c(), a(), b()).compute()
    expected = fed(kind, reps).compute()
    for value in (left, right, swapped):
        torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-12)
    assert float(merged(a(), kind()).compute()) == float(a().compute())
    assert float(merged(kind(), a()).compute()) == float(a().compute())


@every_accumulator
def test_merging_leaves_the_other_alone(kind):
    a, b = fed(kind, [pair((3, 4))]), fed(kind, [pair((3, 4), seed=1)])
    before = copy.deepcopy(b.state_dict())
    a.merge(b)
    a.update(*pair((4, 4)))
    torch.testing.assert_close(b.state_dict(), before, rtol=0, atol=0)
    empty = kind()
    empty.merge(a)
    empty.update(*pair((4, 4)))
    assert float(fed(kind, [], state=a.state_dict()).compute()) == float(a.compute())


@every_accumulator
def test_state_round_trip(kind):
    first, second = pair((5, 4)), pair((2, 4), seed=1)
    stored = copy.deepcopy(fed(kind, [first]).state_dict())
    assert all(isinstance(value, torch.Tensor) for value in stored.values())
    numbers = {k: v.tolist() for k, v in stored.items()}  # as a file of JSON would hold them
    for state, pieces, all_pieces in (
        (stored, [second], [first, second]),
        (numbers, [second], [first, second]),
        (numbers, [], [first]),
        (kind().state_dict(), [second], [second]),
    ):
        assert float(fed(kind, pieces, state).compute()) == float(fed(kind, all_pieces).compute())


@every_accumulator
def test_state_is_a_copy_of_the_moment(kind):
    accumulator = fed(kind, [pair((5, 4))])
    stored = accumulator.state_dict()
    before = copy.deepcopy(stored)
    accumulator.update(*pair((5, 4), seed=2))
    torch.testing.assert_close(stored, before, rtol=0, atol=0)


@every_accumulator
def test_reset_and_nothing_seen(kind):
    untouched = float(issubclass(kind, LinearCKA))
    accumulator = kind()
    assert float(accumulator.compute()) == untouched and accumulator.compute().shape == ()
    accumulator.update(pair((9, 4))[0], pair((9, 4), seed=1)[1])
    assert float(accumulator.compute()) not in (untouched, inf)
    accumulator.reset()
    assert float(accumulator.compute()) == untouched
    accumulator.update(*pair((0, 4)))
    assert float(accumulator.compute()) == untouched


@pytest.mark.parametrize('kind', [CentredError, LinearCKA])
def test_one_accumulator_follows_one_layer(kind):
    accumulator = fed(kind, [pair((5, 1))])
    for call in (lambda: accumulator.update(*pair((5, 4))), lambda: accumulator.merge(fed(kind, [pair((5, 4))]))):
        with pytest.raises(ValueError, match='one layer of one size'):
            call()


@every_accumulator
def test_many_batches_of_any_size(kind):
    "Random cuts of 300 samples, merged in a random tree, against all of them at once."
    clean, pert = pair((300, 8), torch.float64, seed=3)
    clean, pert = clean + 5, pert + 5
    whole = float(fed(kind, [(clean, pert)]).compute())
    rng = np.random.default_rng(0)
    for _ in range(3):
        cuts = rng.integers(0, 301, 12).tolist()
        parts = [fed(kind, [piece]) for piece in zip(split(clean, cuts), split(pert, cuts), strict=True)]
        while len(parts) > 1:
            one, other = (parts.pop(rng.integers(len(parts))) for _ in range(2))
            one.merge(other)
            parts.append(one)
        assert float(parts[0].compute()) == pytest.approx(whole, rel=1e-11)


@pytest.mark.parametrize('kind', [CentredError, LinearCKA])
def test_a_large_mean_does_not_swallow_the_spread(kind):
    "The difference of two large sums would have no digit left."
    clean, pert = pair((200, 5), torch.float64)
    expected = float(fed(kind, [(clean, pert)]).compute())
    far = 1e8 + torch.arange(5)
    shifted = fed(kind, zip((clean + far).split(16), (pert + far).split(16), strict=True))
    assert float(shifted.compute()) == pytest.approx(expected, rel=1e-6)


def test_centred_error_sees_through_a_constant():
    "The shortcut: a constant, common to all samples, lowers the relative error and tells nothing."
    clean, pert = pair((50, 6), torch.float64)
    constant = 10 * torch.arange(1, 7)
    before, after = ([float(MEASURES[name](c, p).mean()) for name in ('relative_error', 'centred_error')]
                     for c, p in ((clean, pert), (clean + constant, pert + constant)))  # fmt: skip
    assert after[0] < before[0] / 10
    assert after[1] == pytest.approx(before[1], rel=1e-9)


def test_centred_error_of_centred_data_is_the_energy_weighted_error():
    clean, pert = pair((50, 6), torch.float64)
    mean = clean.mean(0)
    values = [float(MEASURES[name](clean - mean, pert - mean)) for name in ('centred_error', 'energy_relative_error')]
    assert values[0] == pytest.approx(values[1], rel=1e-12)


# Linear CKA


@pytest.mark.parametrize('samples, units', [(2, 1), (3, 40), (40, 3), (60, 256), (300, 17)])
def test_cka_is_the_gram_form_where_nothing_is_folded(samples, units):
    clean, pert = pair((samples, units), torch.float64)
    value = fed(LinearCKA, zip(clean.split(7), pert.split(7), strict=True)).compute()
    assert float(value) == pytest.approx(gram_cka(clean.numpy(), pert.numpy()), rel=1e-10)


@pytest.mark.parametrize('kind', ['independent', 'unequal', 'ten causes'])
@pytest.mark.parametrize('noise', [0.3, 2.0])
def test_folded_cka_is_near_the_gram_form(kind, noise):
    g = torch.Generator().manual_seed(0)
    n, extra = (torch.randn(200, 1500, generator=g) for _ in range(2))
    if kind == 'ten causes':
        weights = torch.randn(10, 1500, generator=g)
        clean, pert = (n[:, :10] @ weights).relu(), ((n + noise * extra)[:, :10] @ weights).relu()
    else:
        clean = n if kind == 'independent' else n * torch.arange(1, 1501) ** -0.75
        pert = clean + noise * clean.std() * extra
    exact = gram_cka(clean.double().numpy(), pert.double().numpy())
    value = float(fed(LinearCKA, zip(clean.split(64), pert.split(64), strict=True)).compute())
    assert value == pytest.approx(exact, abs=0.03)


@pytest.mark.parametrize('units', [257, 512, 1000, 12_544])
def test_equal_representations_have_cka_one(units):
    clean = pair((20, units))[0]
    assert float(MEASURES['linear_cka'](clean, clean.clone())) == pytest.approx(1, abs=1e-12)
    assert float(MEASURES['linear_cka'](clean, 3 * clean)) == pytest.approx(1, abs=1e-6)
    assert float(MEASURES['linear_cka'](clean.half(), clean.half())) == pytest.approx(1, abs=1e-12)


@given(seed=st.integers(0, 10**6), scale=st.floats(0.01, 100), samples=st.integers(3, 30), units=st.integers(1, 12))
@settings(max_examples=15, deadline=None)
def test_cka_forgives_rotation_scale_and_shift(seed, scale, samples, units):
    clean, pert = pair((samples, units), torch.float64, seed=seed)
    rotation = torch.linalg.qr(pair((units, units), torch.float64, seed=seed)[0]).Q
    cka = MEASURES['linear_cka']
    expected = cka(clean, pert)
    assert 0 <= expected <= 1
    for c, p in ((clean @ rotation, pert), (clean, scale * pert @ rotation), (clean + scale, pert - 3), (pert, clean)):
        torch.testing.assert_close(cka(c, p), expected, rtol=1e-8, atol=1e-8)


def test_cka_compares_layers_of_the_same_size_only_by_their_samples():
    "Two rotations of the same data agree; the same data in another order of samples do not."
    clean = pair((400, 5), torch.float64)[0]
    cka = MEASURES['linear_cka']
    assert float(cka(clean, clean.flip(1))) == pytest.approx(1, abs=1e-12)
    assert float(cka(clean, clean.roll(1, 0))) < 0.1


def test_few_samples_bring_cka_near_one():
    "The caveat: independent representations, more units than samples."
    values = [float(MEASURES['linear_cka'](pair((n, 200))[0], pair((n, 200), seed=1)[0])) for n in (5, 50, 1000)]
    assert values[0] > 0.9 > values[1] > values[2] and values[2] < 0.3


@pytest.mark.parametrize('units, width', [(5, 4), (257, 256), (1000, 256), (1024, 256)])
def test_sketches(units, width):
    state = torch.get_rng_state()
    _sketches.cache_clear()
    folds = _sketches(units, width, 0, torch.device('cpu'))
    assert torch.equal(torch.get_rng_state(), state), 'the global generator is left alone'
    _sketches.cache_clear()
    again = _sketches(units, width, 0, torch.device('cpu'))
    other = _sketches(units, width, 1, torch.device('cpu'))
    for (places, signs), (same, same_signs), (unlike, _) in zip(folds, again, other, strict=True):
        assert sorted(places[signs != 0].tolist()) == list(range(units)), 'each unit once'
        assert len(places) % width == 0 and len(places) - units < width
        assert set(signs.tolist()) <= {-1, 0, 1} and abs(int(signs.sum())) < 5 * units**0.5
        assert torch.equal(places, same) and torch.equal(signs, same_signs)
        assert units < 10 or not torch.equal(places, unlike)
    assert units < 10 or not torch.equal(folds[0][0], folds[1][0]), 'two independent sketches'


def test_folding_keeps_inner_products_on_average():
    x, y = pair((1, 40), torch.float64)
    products = []
    for seed in range(400):
        for places, signs in _sketches(40, 8, seed, torch.device('cpu')):
            a, b = ((v[:, places] * signs).unflatten(1, (-1, 8)).sum(1) for v in (x, y))
            products.append(float((a * b).sum()))
    error = abs(np.mean(products) - float((x * y).sum()))
    assert error < 4 * np.std(products) / len(products) ** 0.5


def test_another_width_is_a_subclass():
    class Wide(LinearCKA):
        width = 1000

    clean, pert = pair((30, 700), torch.float64)
    assert float(as_measure(Wide)(clean, pert)) == pytest.approx(gram_cka(clean.numpy(), pert.numpy()), rel=1e-10)
    assert fed(Wide, [(clean, pert)]).state_dict()['products'].shape == (1400, 1400)
    assert fed(LinearCKA, [(clean, pert)]).state_dict()['products'].shape == (512, 512)


# Derived quantities


def test_lipschitz_ratio_by_hand():
    change = torch.tensor([[2.0, 0.0, 1.0, inf], [6.0, 0.0, 0.0, 1.0]])
    ratio = lipschitz_ratio(change, torch.tensor([2.0, 0.0, 0.0, inf]))
    assert ratio.tolist() == [[1, 0, inf, inf], [3, 0, 0, inf]]
    close(lipschitz_ratio(np.array([3.0, 1.0]), np.array([2.0, 4.0])), [1.5, 0.25])


def test_lipschitz_ratio_is_bounded_by_the_constant():
    weight = pair((7, 5), torch.float64)[0]
    x, x_pert = pair((200, 5), torch.float64, seed=1)
    ratio = lipschitz_ratio(change_norm(x @ weight.T, x_pert @ weight.T), change_norm(x, x_pert))
    bound = torch.linalg.matrix_norm(weight, 2)
    assert ratio.max() <= bound * (1 + 1e-12) and ratio.max() > bound / 2


def test_block_gain_by_hand():
    profile = torch.tensor([[0.5, 0.0, 1.0], [1.0, 0.0, 0.0], [0.25, 3.0, 2.0]])
    gain = block_gain(profile, first=torch.tensor([0.25, 0.0, 4.0]))
    assert gain.tolist() == [[2, 0, 0.25], [2, 0, 0], [0.25, inf, inf]]
    alone = block_gain(profile)
    assert alone[0].isnan().all() and torch.equal(alone[1:], gain[1:])
    close(block_gain(np.array([1.0, 3.0]), first=0.5), [2, 3])
    assert block_gain(torch.tensor([[1.0, 2.0]]), first=2).tolist() == [[0.5, 1]]
    assert block_gain(torch.tensor([1.0, inf, 2.0]), first=1)[1:].tolist() == [inf, inf], 'undefined stays undefined'
    whole = block_gain(torch.tensor([2, 4, 1]))
    assert whole[0].isnan() and whole[1:].tolist() == [2, 0.25], 'whole numbers are welcome'


@given(profile=arrays(np.float64, st.tuples(st.integers(1, 6), st.integers(1, 3)), elements=st.floats(0.01, 100)))
@settings(max_examples=15, deadline=None)
def test_gains_multiply_to_the_gain_of_all_blocks(profile):
    gain = block_gain(profile, first=0.5)
    assert gain.shape == profile.shape
    np.testing.assert_allclose(gain.prod(0), profile[-1] / 0.5, rtol=1e-9)


def test_derived_quantities_have_finite_gradients():
    values = torch.tensor([0.0, 1.0, 0.0, 2.0], requires_grad=True)
    for value in (block_gain(values), block_gain(values, first=0.0), lipschitz_ratio(values, values.flip(0))):
        assert torch.autograd.grad(value[1:].sum(), values)[0].isfinite().all()


# Precision and shapes


def test_sums_are_in_double_precision():
    "In float32 the small batches would vanish beside the loud one."
    loud = torch.full((1, 1), 1e5), torch.full((1, 1), 1.1e5)
    quiet = torch.full((1, 1), 0.1), torch.full((1, 1), 0.2)
    accumulator = fed(EnergyRelativeError, [loud] + 1000 * [quiet])
    change, energy = (accumulator.state_dict()[name] for name in ('change', 'energy'))
    assert change.dtype == energy.dtype == torch.float64
    clean, pert = (torch.cat([loud[i]] + 1000 * [quiet[i]]).double() for i in range(2))
    assert float(energy) == pytest.approx(float(clean.square().sum()), rel=1e-9)
    assert float(energy) - 1e10 == pytest.approx(10, rel=1e-3)
    assert float(change) == pytest.approx(float((pert - clean).square().sum()), rel=1e-6)


@pytest.mark.parametrize(
    'shapes', [((4, 2), (1, 2)), ((4, 2), (4, 1)), ((4, 2), (2,)), ((4,), (1,)), ((2, 3), (3, 2)), ((), ())]
)
def test_shapes_that_differ_never_broadcast(shapes):
    clean, pert = (torch.ones(s) for s in shapes)
    calls = [*MEASURES.values(), *(m.fn().update if m.stream else m.fn for m in MEASURES.values())]
    for call in calls + [Measure('mine', lambda c, p: torch.zeros(len(c)))]:
        with pytest.raises(ValueError, match='equal shape'):
            call(clean, pert)


# The registry


@pytest.mark.parametrize('name', MEASURES)
def test_registry_entries_state_their_facts(name):
    m = MEASURES[name]
    assert m.name == name and m.high > 0 and m.formula and m.source
    assert as_measure(name) is m and as_measure(m) is m
    assert m.stream == issubclass(type(m.fn), type) and as_measure(m.fn) is m
    assert ('1 is unchanged' if m.similarity else '0 is unchanged') in m.direction
    assert m.similarity == (name in ('topk_overlap', 'linear_cka')), 'a similarity has damage 1 - value'
    assert '|' not in m.formula, 'it is shown in a table'
    with pytest.raises(AttributeError):
        m.name = 'other'


class Manhattan:
    "A measure of somebody's own, as an object."

    def __call__(self, clean, pert):
        return (pert - clean).abs().flatten(1).sum(1)


class Largest:
    "A stream measure of somebody's own."

    def __init__(self):
        self.value = torch.zeros(())

    def update(self, clean, pert):
        self.value = torch.maximum(self.value, (pert - clean).abs().max())

    def compute(self):
        return self.value


class Units(Accumulator):
    "A stream measure of somebody's own, by the sums it needs."

    def update(self, clean, pert):
        self.add({'units': clean.numel()})

    def compute(self):
        return self.state['units']


def test_other_settings_keep_the_facts():
    "A similarity that passed for a distance would turn every ranking of layers upside down."

    class Wide(LinearCKA):
        width = 1000

    class Wider(Wide):
        width = 2000

    for made, known in ((partial(topk_overlap, k=2), 'topk_overlap'), (partial(partial(mse)), 'mse'),
                        (Wide, 'linear_cka'), (Wider, 'linear_cka')):  # fmt: skip
        m = as_measure(made)
        assert m.fn is made and m.name == getattr(made, '__name__', known)
        for fact in ('similarity', 'differentiable', 'high', 'formula', 'source', 'stream'):
            assert getattr(m, fact) == getattr(MEASURES[known], fact)
    clean, pert = pair((3, 6))
    assert torch.equal(as_measure(partial(topk_overlap, k=2))(clean, pert), topk_overlap(clean, pert, k=2))
    assert not as_measure(partial(torch.dist)).similarity and not as_measure(Units).similarity


def test_damage_has_one_direction():
    distance, similarity = MEASURES['mse'], MEASURES['linear_cka']
    values = [1.0, 0.25, 0.0, inf, math.nan]
    for make in (torch.tensor, np.array, xr.DataArray, list):
        given = make(values)
        if make is list:
            got, same = [similarity.damage(v) for v in given], [distance.damage(v) for v in given]
        else:
            got, same = similarity.damage(given), distance.damage(given)
        np.testing.assert_array_equal(np.asarray(got), [0, 0.75, 1, inf, math.nan])
        np.testing.assert_array_equal(np.asarray(same), values)


def test_measures_of_ones_own():
    clean, pert = pair((4, 3))
    for mine, name in ((Manhattan(), 'Manhattan'), (nn.PairwiseDistance(), 'PairwiseDistance'), (mse, 'mse')):
        m = as_measure(mine)
        assert m.name == name and not m.stream and m.high == inf
        assert torch.equal(m(clean, pert), mine(clean, pert))
    stream = as_measure(Largest)
    assert stream.stream and stream.name == 'Largest'
    assert stream(clean, pert) == (pert - clean).abs().max()
    units = fed(Units, [(clean, pert), (clean, pert)])
    units.merge(fed(Units, [(clean, pert)]))
    assert int(units.compute()) == 36


@pytest.mark.parametrize('unknown', ['relative-error', 'MSE', 'nonsense', '', None, 3, ['mse']])
def test_unknown_measures_are_refused(unknown):
    with pytest.raises((KeyError, TypeError), match='relative_error, relative_l1'):
        as_measure(unknown)


@pytest.mark.parametrize(
    'fn',
    [
        torch.sub,
        lambda c, p: (p - c).norm(),
        lambda c, p: (p - c).norm(dim=1)[:, None],
        lambda c, p: float((p - c).norm()),
        lambda c, p: (p - c).norm(dim=1).tolist(),
    ],
)
def test_a_measure_returns_one_number_per_sample(fn):
    with pytest.raises(ValueError, match='one value per sample'):
        as_measure(fn)(*pair((4, 3)))


def test_measures_differ():
    "In the reference implementation every name gives the same number."
    clean, pert = pair((6, 5))
    values = [float(m(clean, pert).mean()) for m in MEASURES.values()]
    assert len(set(values)) == len(values)
