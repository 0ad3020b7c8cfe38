"""Measures against slow literal formulas in double precision, and their promises."""

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn

from robustnb.measures import (
    MEASURES,
    EnergyRelativeError,
    Measure,
    as_measure,
    cosine_distance,
    mse,
    relative_error,
)

inf = math.inf
SAMPLE = [m for m in MEASURES.values() if not m.stream]
STREAM = [m for m in MEASURES.values() if m.stream]
every_measure = pytest.mark.parametrize('measure', MEASURES.values(), ids=MEASURES.keys())
every_sample_measure = pytest.mark.parametrize('measure', SAMPLE, ids=[m.name for m in SAMPLE])
every_stream_measure = pytest.mark.parametrize('measure', STREAM, ids=[m.name for m in STREAM])

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


LITERAL = {
    'relative_error': literal_relative_error,
    'cosine_distance': literal_cosine_distance,
    'mse': literal_mse,
}


def literal(name, clean, pert):
    "A sample measure, one sample after the other, or the stream measure over all of them."
    clean, pert = (np.asarray(t.detach().double()).reshape(len(t), math.prod(t.shape[1:])) for t in (clean, pert))
    if name == 'energy_relative_error':
        return quotient(length((pert - clean).ravel()), length(clean.ravel()))
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
    assert set(MEASURES) == {*LITERAL, 'energy_relative_error'}


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
    close(got, literal(measure.name, clean, pert), rtol=1e-5)


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
        atol=0 if measure is MEASURES['mse'] else 1e-6,
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
    for measure in (relative_error, cosine_distance):
        assert measure(zero, zero).tolist() == [0], 'silent twice: nothing moved'
        assert measure(zero, one).tolist() == [inf], 'undefined'
    assert relative_error(one, zero).tolist() == [1]
    assert cosine_distance(one, zero).tolist() == [inf]
    assert mse(zero, zero).tolist() == [0] and mse(zero, one).tolist() == [1]


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


@every_measure
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


@every_measure
@pytest.mark.parametrize('rows', [1, 4])
def test_gradients_at_no_change(measure, rows):
    clean = pair((rows, 5))[0]
    a, b = clean.clone().requires_grad_(), clean.clone().requires_grad_()
    for g in torch.autograd.grad(measure(a, b).sum(), (a, b)):
        assert g.isfinite().all()


@every_measure
@pytest.mark.parametrize('shape', [(3, 4), (3,), (2, 2, 3)], ids=str)
def test_gradients_are_right(measure, shape):
    clean, pert = pair(shape, torch.float64)
    assert torch.autograd.gradcheck(measure, (clean.requires_grad_(), pert.requires_grad_()))


def test_gradient_of_an_undefined_value_is_zero():
    for measure in (relative_error, cosine_distance):
        clean, pert = torch.zeros(1, 3, requires_grad=True), torch.ones(1, 3, requires_grad=True)
        for g in torch.autograd.grad(measure(clean, pert).sum(), (clean, pert)):
            assert torch.equal(g, torch.zeros(1, 3))


# Promises

numbers = st.floats(-1e6, 1e6, width=32, allow_subnormal=False).map(lambda v: 0.0 if abs(v) < 1e-6 else v)


@st.composite
def pairs(draw, smallest=1, largest=5):
    "A clean and a perturbed representation of `smallest` to `largest` samples."
    shape = draw(st.integers(smallest, largest)), draw(st.integers(1, 6))
    return tuple(torch.from_numpy(draw(arrays(np.float32, shape, elements=numbers))) for _ in range(2))


@every_measure
@given(reps=pairs())
@settings(max_examples=60, deadline=None)
def test_values_stay_in_range(measure, reps):
    for clean, pert in (reps, reps[::-1], (reps[0], -reps[0]), (reps[0], reps[0])):
        value = measure(clean, pert)
        assert not value.isnan().any()
        assert (value >= 0).all()
        assert ((value <= measure.high) | (value == inf)).all()


@every_measure
@given(reps=pairs())
@settings(max_examples=30, deadline=None)
def test_no_change_is_exactly_zero(measure, reps):
    assert (measure(reps[0], reps[0].clone()) == 0).all()


@every_measure
@given(reps=pairs())
@settings(max_examples=60, deadline=None)
def test_any_change_is_seen(measure, reps):
    clean, pert = reps
    expected = np.asarray(literal(measure.name, clean, pert))
    got = np.asarray(measure(clean, pert).double())
    np.testing.assert_array_equal(np.isinf(got), np.isinf(expected))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@every_sample_measure
@given(reps=pairs(smallest=2), order=st.randoms())
@settings(max_examples=40, deadline=None)
def test_samples_do_not_influence_each_other(measure, reps, order):
    clean, pert = reps
    whole = measure(clean, pert)
    places = list(range(len(clean)))
    order.shuffle(places)
    torch.testing.assert_close(measure(clean[places], pert[places]), whole[places], rtol=1e-6, atol=1e-7)
    cut = order.randrange(1, len(clean))
    parts = torch.cat([measure(clean[:cut], pert[:cut]), measure(clean[cut:], pert[cut:])])
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-7)


@every_measure
@given(reps=pairs(), order=st.randoms())
@settings(max_examples=40, deadline=None)
def test_the_order_of_units_does_not_matter(measure, reps, order):
    clean, pert = reps
    places = list(range(clean.shape[1]))
    order.shuffle(places)
    torch.testing.assert_close(measure(clean[:, places], pert[:, places]), measure(clean, pert), rtol=1e-5, atol=1e-6)


SCALES = st.sampled_from([1e-8, 1e-3, 0.5, 3.0, 1e4, 1e9])


@pytest.mark.parametrize('name', ['relative_error', 'cosine_distance', 'energy_relative_error'])
@given(reps=pairs(), scale=SCALES)
@settings(max_examples=40, deadline=None)
def test_scaling_a_layer_changes_nothing(name, reps, scale):
    clean, pert = reps
    measure = MEASURES[name]
    torch.testing.assert_close(measure(scale * clean, scale * pert), measure(clean, pert), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(measure(-clean, -pert), measure(clean, pert))


@given(reps=pairs(), scale=SCALES)
@settings(max_examples=40, deadline=None)
def test_cosine_distance_forgives_length(reps, scale):
    clean, pert = reps
    torch.testing.assert_close(cosine_distance(clean, scale * pert), cosine_distance(clean, pert), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(cosine_distance(pert, clean), cosine_distance(clean, pert), rtol=1e-4, atol=1e-6)


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


# The accumulator


def fed(pieces, state=None):
    accumulator = EnergyRelativeError()
    if state is not None:
        accumulator.load_state_dict(state)
    for clean, pert in pieces:
        accumulator.update(clean, pert)
    return accumulator


def split(t, cuts):
    return torch.tensor_split(t, sorted(cuts))


@given(reps=pairs(largest=9), cuts=st.lists(st.integers(0, 9), max_size=4))
@settings(max_examples=60, deadline=None)
def test_batches_add_up(reps, cuts):
    pieces = list(zip(split(reps[0], cuts), split(reps[1], cuts), strict=True))
    whole, parts = fed([reps]).compute(), fed(pieces).compute()
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=0)
    np.testing.assert_allclose(float(whole), literal('energy_relative_error', *reps), rtol=1e-6)


@given(reps=st.lists(pairs(), min_size=3, max_size=3))
@settings(max_examples=40, deadline=None)
def test_merging_is_associative_and_has_a_neutral_element(reps):
    def merged(*accumulators):
        total = EnergyRelativeError()
        for a in accumulators:
            total.merge(a)
        return total

    a, b, c = (lambda i=i: fed([reps[i]]) for i in range(3))
    left = merged(merged(a(), b()), c()).compute()
    right = merged(a(), merged(b(), c())).compute()
    swapped = merged(c(), a(), b()).compute()
    expected = fed(reps).compute()
    for value in (left, right, swapped):
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    assert float(merged(a(), EnergyRelativeError()).compute()) == float(a().compute())
    assert float(merged(EnergyRelativeError(), a()).compute()) == float(a().compute())


def test_merging_leaves_the_other_alone():
    a, b = fed([pair((3, 2))]), fed([pair((3, 2), seed=1)])
    before = copy.deepcopy(b.state_dict())
    a.merge(b)
    a.update(*pair((4, 2)))
    assert b.state_dict() == before


def test_state_round_trip():
    first, second = pair((5, 3)), pair((2, 3), seed=1)
    stored = copy.deepcopy(fed([first]).state_dict())
    assert set(stored) == {'change', 'energy'}
    going_on = fed([second], state=stored)
    assert float(going_on.compute()) == float(fed([first, second]).compute())
    numbers = {k: float(v) for k, v in stored.items()}  # as a file of JSON would hold them
    assert float(fed([second], state=numbers).compute()) == pytest.approx(float(going_on.compute()), rel=1e-12)
    assert float(fed([], state=numbers).compute()) == pytest.approx(float(fed([first]).compute()), rel=1e-6)


def test_state_is_a_copy_of_the_moment():
    accumulator = fed([pair((5, 3))])
    stored = accumulator.state_dict()
    before = copy.deepcopy(stored)
    accumulator.update(*pair((5, 3), seed=2))
    assert stored == before


def test_reset_and_nothing_seen():
    accumulator = EnergyRelativeError()
    assert float(accumulator.compute()) == 0 and accumulator.compute().shape == ()
    accumulator.update(*pair((5, 3)))
    assert float(accumulator.compute()) > 0
    accumulator.reset()
    assert float(accumulator.compute()) == 0
    accumulator.update(*pair((0, 3)))
    assert float(accumulator.compute()) == 0


def test_sums_are_in_double_precision():
    "In float32 the small batches would vanish beside the loud one."
    loud = torch.full((1, 1), 1e5), torch.full((1, 1), 1.1e5)
    quiet = torch.full((1, 1), 0.1), torch.full((1, 1), 0.2)
    accumulator = fed([loud] + 1000 * [quiet])
    for name in ('change', 'energy'):
        assert accumulator.state_dict()[name].dtype == torch.float64
    clean, pert = (torch.cat([loud[i]] + 1000 * [quiet[i]]).double() for i in range(2))
    assert float(accumulator.energy) == pytest.approx(float(clean.square().sum()), rel=1e-9)
    assert float(accumulator.energy) - 1e10 == pytest.approx(10, rel=1e-3)
    assert float(accumulator.change) == pytest.approx(float((pert - clean).square().sum()), rel=1e-6)


@pytest.mark.parametrize(
    'shapes', [((4, 2), (1, 2)), ((4, 2), (4, 1)), ((4, 2), (2,)), ((4,), (1,)), ((2, 3), (3, 2)), ((), ())]
)
def test_shapes_that_differ_never_broadcast(shapes):
    clean, pert = (torch.ones(s) for s in shapes)
    calls = [MEASURES[name] for name in MEASURES] + [relative_error, cosine_distance, mse, EnergyRelativeError().update]
    for call in calls + [Measure('mine', lambda c, p: torch.zeros(len(c)))]:
        with pytest.raises(ValueError, match='equal shape'):
            call(clean, pert)


# The registry


@pytest.mark.parametrize('name', MEASURES)
def test_registry_entries_state_their_facts(name):
    m = MEASURES[name]
    assert m.name == name and m.high > 0 and m.formula and m.source
    assert as_measure(name) is m and as_measure(m) is m
    assert m.stream == (name == 'energy_relative_error')
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


def test_measures_of_ones_own():
    clean, pert = pair((4, 3))
    for mine, name in ((Manhattan(), 'Manhattan'), (nn.PairwiseDistance(), 'PairwiseDistance'), (mse, 'mse')):
        m = as_measure(mine)
        assert m.name == name and not m.stream and m.high == inf
        assert torch.equal(m(clean, pert), mine(clean, pert))
    stream = as_measure(Largest)
    assert stream.stream and stream.name == 'Largest'
    assert stream(clean, pert) == (pert - clean).abs().max()


@pytest.mark.parametrize('unknown', ['relative-error', 'MSE', 'nonsense', '', None, 3])
def test_unknown_measures_are_refused(unknown):
    with pytest.raises((KeyError, TypeError), match='relative_error, cosine_distance'):
        as_measure(unknown)


@pytest.mark.parametrize('fn', [torch.sub, lambda c, p: (p - c).norm(), lambda c, p: (p - c).norm(dim=1)[:, None]])
def test_a_measure_returns_one_number_per_sample(fn):
    with pytest.raises(ValueError, match='one value per sample'):
        as_measure(fn)(*pair((4, 3)))


def test_measures_differ():
    "In the reference implementation every name gives the same number."
    clean, pert = pair((6, 5))
    values = [float(m(clean, pert).mean()) for m in MEASURES.values()]
    assert len(set(values)) == len(values)
