"""Coverage criteria against what published implementations compute, literal forms, and laws that a criterion has to keep."""

import copy
import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from robustnb import coverage
from robustnb.coverage import (
    CC,
    CRITERIA,
    KMNC,
    NBC,
    NC,
    NLC,
    SNAC,
    TKNC,
    TKNP,
    Activations,
    Assessment,
    Coverage,
    Ranges,
    UnitCriterion,
    as_criterion,
    assess,
)
from robustnb.devices import seeded
from robustnb.probes import Probe
from robustnb.results import Result, load_arrays, save_arrays

CODES = 'NC', 'KMNC', 'NBC', 'SNAC', 'TKNC', 'TKNP', 'CC', 'NLC'
SETS = 'NC', 'KMNC', 'NBC', 'SNAC', 'TKNC', 'TKNP'  # what they count is a set of things that each sample brings along
GOLDEN = {case['id']: case for case in json.loads((Path(__file__).parent / 'golden' / 'coverage.json').read_text())['cases']}


def fill(criterion, layers, batch=None):
    "The criterion after all rows of these layers, `batch` of them at a time."
    layers = {name: torch.as_tensor(rows, dtype=torch.float32) for name, rows in layers.items()}
    n = len(next(iter(layers.values())))
    for start in range(0, n, batch or n):
        criterion.update({name: rows[start : start + (batch or n)] for name, rows in layers.items()})
    return criterion


# --- what the published implementations compute ---------------------------------------------------------------------------


def golden(name, criterion, batch=None):
    "The value of a criterion on a golden case."
    inputs = GOLDEN[name]['inputs']
    if 'train' in inputs:
        criterion.train = fill(Ranges(), inputs['train'])
        inputs = inputs['test']
    return fill(criterion, inputs, batch).compute()


NLC_ONE = 'definition + 1'
SAME = [  # our default, or a setting of it, agrees with every reference
    ('nc_prescaled', NC(0.5)),
    ('kmnc_interior', KMNC(4)),
    ('kmnc_constant_neuron', KMNC(2)),
    ('nbc_strict', NBC()),
    ('snac_strict', SNAC()),
    ('tknc_k1', TKNC(1)),
    ('tknc_k2', TKNC(2)),
    ('tknc_k5', TKNC(5)),
    ('tknp_one_batch', TKNP(2)),
    ('tknp_one_batch', TKNP(2, ordered=True)),
    ('nc_constant_layer', NC(0.5)),
    ('nbc_sigma', NBC(sigma=0.5, strict=False)),
    ('cc_one_batch', CC(9.0, count_first=False)),
    ('cc_small_radius', CC(4.0, count_first=False)),
    ('nlc_one_batch', NLC(gated=True)),
    ('nlc_batch_2', NLC(gated=True)),
    ('nlc_batch_3', NLC(gated=True)),
    ('nlc_shrink_batch_4', NLC(gated=True)),
]


@pytest.mark.parametrize('name, criterion', SAME, ids=lambda value: str(value))
def test_golden_cases(name, criterion):
    case = GOLDEN[name]
    assert case['agree'] in (True, None)
    value = golden(name, criterion.fresh(), case['params'].get('batch'))
    for expected in case['expected'].values():
        assert value == pytest.approx(expected, abs=case['tol'])


OPTIONS = [  # where the references differ, each one is an option
    ('nc_scaling_differs', 'NeuraL-Coverage', NC(0.5)),
    ('nc_scaling_differs', 'dnn-tip', NC(0.5, scale=None)),
    ('kmnc_edges_differ', 'NeuraL-Coverage', KMNC(4, ends='left-open')),
    ('kmnc_edges_differ', 'dnn-tip', KMNC(4, ends='right-open')),
    ('nbc_equal_differs', 'NeuraL-Coverage', NBC()),
    ('nbc_equal_differs', 'dnn-tip', NBC(strict=False)),
    ('tknp_two_batches_bug', 'WISDOM', TKNP(2, ordered=True, cumulative=False)),
    ('tknp_two_batches_bug', 'definition (ordered per-layer patterns)', TKNP(2, ordered=True)),
    ('nlc_batch_1', 'NeuraL-Coverage', NLC(gated=True)),
    ('nlc_shrink_batch_2', 'NeuraL-Coverage', NLC(gated=True)),
]


@pytest.mark.parametrize('name, reference, criterion', OPTIONS, ids=lambda value: str(value))
def test_golden_cases_that_differ(name, reference, criterion):
    case = GOLDEN[name]
    assert case['agree'] is False
    value = golden(name, criterion.fresh(), case['params'].get('batch'))
    assert value == pytest.approx(case['expected'][reference], abs=case['tol'])


@pytest.mark.parametrize('name', [name for name, case in GOLDEN.items() if case['criterion'] == 'NLC'])
def test_golden_nlc_by_definition(name):
    "The exact form does not depend on the batches: one less than the definition that starts at 1."
    case = GOLDEN[name]
    for batch in (1, 2, 3, 4):
        assert golden(name, NLC(), batch) == pytest.approx(case['expected'][NLC_ONE] - 1, abs=case['tol'])


def test_every_golden_case_of_these_criteria_is_here():
    ours = {name for name, case in GOLDEN.items() if case['criterion'] in CODES}
    assert ours == {case[0] for case in SAME + OPTIONS}


def test_golden_reduction():
    case = GOLDEN['conv_spatial_mean']
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor(case['inputs']['conv_w'], dtype=torch.float32).view(2, 1, 1, 1))
        model[0].bias.copy_(torch.tensor(case['inputs']['conv_b'], dtype=torch.float32))
        model[3].weight.copy_(torch.arange(16).view(2, 8) / 10)
        model[3].bias.zero_()
    with closing_walk(Coverage(model, ['NC'], show_progress=False), torch.tensor(case['inputs']['image'])) as (found,):
        for rows, expected in zip(found.layers.values(), case['expected']['NeuraL-Coverage'].values(), strict=True):
            np.testing.assert_allclose(rows, expected, atol=1e-5)


class closing_walk:
    "All batches of a walk over images, and the model given back."

    def __init__(self, coverage, x):
        self.batches = list(coverage.walk((x, torch.zeros(len(x), dtype=torch.long))))

    def __enter__(self):
        return self.batches

    def __exit__(self, *error):
        pass


# --- slow literal forms ---------------------------------------------------------------------------------------------------


def literal(code, train, test, **how):
    "The value of a criterion by loops over samples and units. `train`, `test`: lists of arrays (samples, units), one per layer."
    units = [(layer, u) for layer, rows in enumerate(test) for u in range(rows.shape[1])]
    ranges = {(layer, u): (train[layer][:, u].min(), train[layer][:, u].max()) for layer, u in units}
    found = set()
    for i in range(len(test[0])):
        for layer, u in units:
            row = test[layer][i]
            value, (low, high) = row[u], ranges[layer, u]
            if code == 'NC' and value - row.min() > np.float32(how.get('threshold', 0.5)) * (row.max() - row.min()):
                found.add((layer, u))
            if code == 'KMNC' and low <= value <= high and high > low:
                place = (value - low) / (high - low) * np.float32(how['k'])
                found.add((layer, u, min(int(np.floor(place)), how['k'] - 1)))
            if code in ('NBC', 'SNAC') and value > high:
                found.add((layer, u, 'above'))
            if code == 'NBC' and value < low:
                found.add((layer, u, 'below'))
            if code == 'TKNC' and u in top(row, how['k']):
                found.add((layer, u))
        if code == 'TKNP':
            found.add(tuple(frozenset(top(rows[i], how['k'])) for rows in test))
    total = {'NC': 1, 'KMNC': how.get('k', 0), 'NBC': 2, 'SNAC': 1, 'TKNC': 1}
    return len(found) / (len(units) * total[code]) if code in total else len(found)


def top(row, k):
    "The k largest entries; among equals, the earlier ones."
    return sorted(range(len(row)), key=lambda u: (-row[u], u))[:k]


def literal_cc(test, threshold):
    "How many vectors lie apart, by a scan."
    count = 0
    for rows in test:
        stored = []
        for row in rows.astype(float):
            if all(((row - other) ** 2).sum() > threshold for other in stored):
                stored.append(row)
        count += len(stored)
    return count


def literal_nlc(test):
    return sum(np.abs(np.cov(rows.T.astype(float), bias=True)).mean() for rows in test)


@st.composite
def parts(draw, parts=2):
    "Training data and some parts of a suite, with ties, constant units and values outside of the training ranges."
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    coarse = draw(st.booleans())  # multiples of 1/2, so that values tie and meet the ends of sections

    def rows(n, reach):
        layers = [rng.normal(0, reach, (n, size)) for size in sizes]
        return [np.float32(np.round(2 * one) / 2 if coarse else one) for one in layers]

    return rows(draw(st.integers(1, 6)), 1), [rows(draw(st.integers(1, 6)), 2) for _ in range(parts)]


def named(layers):
    return {f'layer{i}': torch.from_numpy(rows) for i, rows in enumerate(layers)}


def both(a, b):
    return [np.concatenate(pair) for pair in zip(a, b, strict=True)]


HOW = {'NC': {}, 'KMNC': {'k': 4}, 'NBC': {}, 'SNAC': {}, 'TKNC': {'k': 2}, 'TKNP': {'k': 2}}


def make(code, train, **how):
    "A criterion that knows the training data."
    criterion = CRITERIA[code](**how)
    if criterion.learns() is not None:
        criterion.train = fill(criterion.learns(), named(train))
    return criterion


FEW = settings(max_examples=40, deadline=None)


@pytest.mark.parametrize('code', SETS)
@FEW
@given(data=parts())
def test_literal_form(code, data):
    train, (test, _) = data
    value = fill(make(code, train, **HOW[code]), named(test)).compute()
    assert value == pytest.approx(literal(code, train, test, **HOW[code]), abs=1e-12)


@FEW
@given(data=parts())
def test_literal_forms_of_vectors(data):
    _, (test, _) = data
    assert fill(CC(3.0), named(test), batch=2).compute() == literal_cc(test, 3.0)
    assert fill(CC(3.0, squared=False), named(test)).compute() == literal_cc(test, 9.0)
    assert fill(NLC(), named(test), batch=2).compute() == pytest.approx(literal_nlc(test), rel=1e-6, abs=1e-6)


def test_scaled_mean_is_the_neuron_coverage_of_deepimportance():
    "The whole map of a layer is scaled to [0, 1], then the mean of each channel is compared with the threshold."
    maps = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    flat, rows = maps.flatten(1), torch.randn(5, 4)
    scaled = (flat - flat.amin(1, True)) / (flat.amax(1, True) - flat.amin(1, True))
    expected = (scaled.view(5, 3, 16).mean(2) > 0.5).any(0)
    criterion = NC(0.5, scale=None)
    criterion.update(Activations({'conv': maps, 'fc': rows}, reduce='scaled-mean'))
    assert torch.equal(criterion.covered()['conv'][:, 0], expected)
    assert criterion.covered()['fc'].any()
    assert torch.equal(Activations({'a': torch.ones(2, 3)}, reduce='scaled-mean').values, torch.zeros(2, 3))


# --- laws -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('code', SETS)
@FEW
@given(data=parts(), seed=st.integers(0, 99))
def test_laws_of_sets(code, data, seed):
    "A union covers at least as much as its parts; neither order, batches nor repetition matter; merging is the union."
    train, (a, b) = data
    criterion = make(code, train, **HOW[code])
    one, two, union = (fill(criterion.fresh(), named(rows)) for rows in (a, b, both(a, b)))
    assert union.compute() >= max(one.compute(), two.compute())
    order = np.random.default_rng(seed).permutation(len(a[0]) + len(b[0]))
    shuffled = fill(criterion.fresh(), named([rows[order] for rows in both(a, b)]), batch=1 + seed % 4)
    assert shuffled.compute() == union.compute()
    assert fill(fill(criterion.fresh(), named(a)), named(a)).compute() == one.compute()
    one.merge(two)
    assert one.compute() == union.compute()
    assert all(torch.equal(v, union.state_dict()[name]) for name, v in one.state_dict().items())


@FEW
@given(data=parts(3), seed=st.integers(0, 99))
def test_laws_of_nlc(data, seed):
    "Neither order, batches nor repetition matter, and states merge in any order; but more data may lower it."
    _, (a, b, c) = data
    whole = both(both(a, b), c)
    one, two, three = (fill(NLC(), named(rows)) for rows in (a, b, c))
    union = fill(NLC(), named(whole)).compute()
    order = np.random.default_rng(seed).permutation(len(whole[0]))
    assert fill(NLC(), named([rows[order] for rows in whole]), 1 + seed % 4).compute() == pytest.approx(union, rel=1e-6, abs=1e-6)
    assert fill(fill(NLC(), named(a)), named(a)).compute() == pytest.approx(one.compute(), rel=1e-6, abs=1e-6)
    two.merge(three)
    one.merge(two)
    assert one.compute() == pytest.approx(union, rel=1e-6, abs=1e-6)


def test_counterexamples():
    "What the laws do not hold for, and why they are not asked of it."
    ends, middle = {'a': [[-1.5], [1.5], [0.0]]}, {'a': [[0.0], [-1.5], [1.5]]}
    assert (fill(CC(4.0), ends).compute(), fill(CC(4.0), middle).compute()) == (2, 1)  # order
    assert fill(CC(4.0), ends, batch=1).compute() == 2  # but not batches
    rows = {'a': [[0.0], [10.0], [5.0], [5.0]]}
    assert [fill(NLC(gated=True), rows, n).compute() for n in (1, 2, 4)] == [1, 26, 13.5]
    assert fill(NLC(), {'a': [[0.0], [10.0]]}).compute() > fill(NLC(), rows).compute()  # a larger suite, a smaller value


@given(data=parts())
@FEW
def test_training_data_as_suite(data):
    "They cover nothing beyond their ranges, and both end sections of every unit that varies."
    train, _ = data
    assert fill(make('NBC', train), named(train)).compute() == fill(make('SNAC', train), named(train)).compute() == 0
    assert fill(make('NBC', train, strict=False), named(train)).compute() == 1
    criterion = fill(make('KMNC', train, k=5), named(train))
    ends = torch.cat([*criterion.covered().values()])[:, [0, -1]]
    varies = torch.cat([torch.from_numpy(np.ptp(rows, axis=0) > 0) for rows in train])
    assert torch.equal(ends, varies[:, None].expand(-1, 2))
    assert criterion.unreachable() == 5 * int((~varies).sum())


def test_items_are_what_update_covers():
    train, test = torch.randn(20, 6), torch.randn(8, 6) * 2
    for code in ('NC', 'KMNC', 'NBC', 'SNAC', 'TKNC'):
        criterion = make(code, [train.numpy()], **HOW[code])
        items = criterion.items({'layer0': test})
        criterion.update({'layer0': test})
        assert items.dtype == torch.int64
        assert set(items[items >= 0].tolist()) == set(criterion.state['hit'].nonzero()[:, 0].tolist())


def test_a_pattern_does_not_depend_on_the_batch_and_hardly_ever_meets_another():
    "Every set of 3 of 12 units has bits of its own, and thousands of batches are kept small."
    sets = torch.combinations(torch.arange(12), 3)
    rows = torch.zeros(len(sets), 12).scatter_(1, sets, 1.0)
    criterion = fill(TKNP(3), {'a': torch.cat([rows] * 30)}, batch=7)
    assert criterion.counts() == (220, None)
    assert len(criterion.state['patterns']) == 220
    assert torch.equal(criterion.state['patterns'], fill(TKNP(3), {'a': rows.flip(0)}).state_dict()['patterns'])
    keys = coverage._keys(12, 1)[:, 0]
    mask = rows > 0
    assert torch.equal(coverage._sum_of_keys(mask, keys), (mask[:, :, None] * keys).sum(1))


NAN, INFINITY = float('nan'), float('inf')


@pytest.mark.parametrize('low, high', [(-3e38, 3e38), (0.0, 1e-44), (1.0, 1 + 2**-22), (-1e-45, 0.0)])
def test_ranges_of_any_width(low, high):
    "Differences that overflow, and widths of one or a few steps of single precision."
    train = fill(Ranges(), {'a': [[low], [high]]})
    for ends, expected in (('closed', [0, 3]), ('left-open', [-1, 3]), ('right-open', [0, -1])):
        criterion = KMNC(4, ends, train=train)
        items = criterion.items({'a': torch.tensor([[low], [high], [INFINITY], [-INFINITY], [NAN]])})
        assert items[:, 0].tolist() == [*expected, -1, -1, -1]
    assert KMNC(2, train=train).items({'a': torch.tensor([[low / 2 + high / 2]])}) >= 0
    for threshold in (0.0, 0.5, 0.9) if high - low > 1e-38 else ():
        assert fill(NC(threshold), {'a': [[low, high]]}).covered()['a'][:, 0].tolist() == [False, True]


@pytest.mark.parametrize('threshold, row', [(10.0, [1.0, 3.0]), (2.0, [1.0, 1.0]), (5.0, [1.0, 2.0]), (0.0, [0.0, 0.0])])
def test_exactly_at_the_threshold_is_not_apart(threshold, row):
    assert fill(CC(threshold), {'a': [[0.0, 0.0], row]}).compute() == 1
    assert fill(CC(threshold), {'a': [[0.0, 0.0], row]}, batch=1).compute() == 1
    assert fill(CC(threshold), {'a': [[0.0, 0.0], [row[0], row[1] + 1e-3]]}).compute() == 2


def test_nan_covers_nothing():
    "Not even in a layer that is covered whole, nor as a pattern; the other units of the sample count."
    assert fill(TKNC(10), {'a': [[NAN, 1.0]]}).covered()['a'][:, 0].tolist() == [False, True]
    assert fill(TKNP(1), {'a': [[NAN, 1.0], [NAN, NAN]]}).compute() == 0
    assert fill(TKNP(1, ordered=True), {'a': [[NAN, 1.0], [0.0, INFINITY]]}).compute() == 1
    assert fill(NC(), {'a': [[NAN, 1.0]]}).compute() == 0


def test_spread_of_large_values():
    assert fill(Ranges(), {'a': [[0.0], [2e25]]}).compute()['std'].tolist() == [pytest.approx(1e25)]


def test_stored_things_come_to_the_cpu():
    "Patterns and vectors are kept there, wherever a state was loaded to."
    for criterion in (TKNP(1), CC()):
        loaded = criterion.fresh()
        state = fill(criterion, {'a': [[1.0, 2.0]]}).state_dict()
        loaded.load_state_dict({name: OnAnotherDevice(value) for name, value in state.items()})
        assert not any(isinstance(value, OnAnotherDevice) for value in loaded.state.values())


class OnAnotherDevice(torch.Tensor):
    "Stands for a tensor of an accelerator: only `cpu` makes it an ordinary one."

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_many_vectors_at_once():
    "In blocks, so that a merged state of many vectors needs no square of their number; the same as one by one."
    rows = torch.randn(2500, 2, generator=torch.Generator().manual_seed(0))
    whole = fill(CC(0.01), {'a': rows})
    assert torch.equal(whole.state['a'], fill(CC(0.01), {'a': rows}, batch=100).state['a']) and whole.compute() > 500
    other = CC(0.01)
    other.merge(whole)
    assert torch.equal(whole.state['a'], other.state['a'])


@pytest.mark.parametrize('offset, dtype', [(0.0, 'float32'), (1e4, 'float32'), (1e30, 'float32'), (1e200, 'float64')])
def test_near_is_what_the_differences_say(offset, dtype):
    "By one matrix product, with pairs at the threshold computed again: the same as from all differences."
    rng = np.random.default_rng(0)
    rows = torch.from_numpy((offset + np.round(4 * rng.normal(0, 1, (60, 5))) / 4).astype(dtype))
    rows[7] = rows[3]
    exact = (rows[:, None].double() - rows.double()).square().sum(2).sqrt()
    for reach in (0.0, 1.0, 2.0, math.sqrt(10), 1e31, 1e201, INFINITY):
        assert torch.equal(coverage._near(rows, rows, reach), exact <= reach), reach
        assert coverage._near(rows, rows[:0], reach).shape == (60, 0)


def test_few_pairs_are_computed_again(monkeypatch):
    "Distances among 600 wide vectors need no differences, unless they lie at the threshold."
    rows = torch.randn(600, 64, generator=torch.Generator().manual_seed(0))
    parts = []
    monkeypatch.setattr(torch.Tensor, 'nonzero', lambda self, found=torch.nonzero: parts.append(found(self)) or parts[-1])
    assert fill(CC(100.0), {'a': rows}, batch=200).compute() == literal_cc([rows.numpy()], 100.0)
    assert sum(map(len, parts)) == 0
    assert fill(CC(0.0), {'a': rows}).compute() == 600 and sum(map(len, parts)) == 600  # each with itself


def test_a_threshold_without_relation_to_the_network(network, caplog):
    caplog.set_level(logging.WARNING)
    found = Coverage(network, {'near': CC(1e-9), 'far': CC(1e9)}, show_progress=False)
    found.update(images(10))
    assert not caplog.records  # too few to tell
    found.update(images(40, 1)).update(images(40, 2))
    assert [r.getMessage().split(':')[0] for r in caplog.records] == ['near']  # once
    assert 'more than half of the samples are stored in 0, 5, 7' in caplog.text
    result = assess(network, None, {'a': images(30), 'b': images(30, 1)}, CC(1e-9), show_progress=False)
    assert list(result.settings['notes']) == ['CC'] and caplog.text.count('more than half') == 2


def test_lists_of_a_json_file_are_not_rounded():
    train = Ranges()
    train.update({'a': torch.tensor([[0.1], [0.2]], dtype=torch.float64)})
    again = Ranges()
    again.load_state_dict(json.loads(json.dumps({name: value.tolist() for name, value in train.state_dict().items()})))
    assert NBC(train=again).items({'a': torch.tensor([[0.1], [0.2]], dtype=torch.float64)}).tolist() == [[-1, -1]] * 2


def test_gated_states_merge_through_the_gate():
    "In the order of merging, as `gather` does it in order of rank."
    one, two = fill(NLC(gated=True), {'a': [[0.0], [10.0]]}), fill(NLC(gated=True), {'a': [[5.0], [5.0]]})
    one.merge(two)
    assert one.compute() == 26


def test_layers_in_another_order():
    with pytest.raises(ValueError, match='they come in another order'):
        fill(fill(NC(), {'a': [[1.0, 2.0]], 'b': [[0.0]]}), {'b': [[0.0]], 'a': [[1.0, 2.0]]})


def test_fresh_shares_nothing_but_what_was_learned():
    for code in CODES:
        one = make(code, [np.float32([[0, 1], [2, 3]])])
        fill(one, {'layer0': [[5.0, -1.0], [0.0, 9.0]]})
        value, two = one.compute(), one.fresh()
        assert two.compute() == 0 and two.train is one.train
        fill(two, {'layer0': [[7.0, 7.0], [-9.0, 90.0], [8.0, 0.0]]})
        assert one.compute() == value and two.state is not one.state


def test_more_distant_ties_and_large_k():
    assert fill(TKNC(3), {'a': [[0.0, 0.0, 0.0, 0.0]]}).covered()['a'][:, 0].tolist() == [True] * 3 + [False]
    assert fill(TKNC(10**6), {'a': [[0.0, 1.0]]}).compute() == 1
    assert fill(TKNP(10**6, ordered=True), {'a': [[0.0, 1.0], [1.0, 0.0]]}).compute() == 2
    assert fill(TKNP(10**6), {'a': [[0.0, 1.0], [1.0, 0.0]]}).compute() == 1
    assert fill(NC(), {'a': [[0.3]]}).unreachable() == 1  # one unit is never above the others


# --- networks ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def network():
    with seeded(0):
        return nn.Sequential(
            *(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(), nn.Flatten()),
            *(nn.Linear(216, 8), nn.ReLU(), nn.Linear(8, 4)),
        )


def images(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(n, 1, 8, 8, generator=g), torch.randint(0, 4, (n,), generator=g)


def test_coverage_is_what_the_criteria_find_one_by_one(network):
    "Before and after the activation, mean and maximum, by a probe and a loop."
    train, (x, y) = images(40), images(30, 1)
    for where in ('weights', 'activations'):
        for reduce in ('mean', 'max', 'all'):
            found = Coverage(network, CODES, where, reduce, batch_size=7, show_progress=False).learn(train).update((x, y))
            assert found.samples == 30 and network.training
            network.eval()
            with Probe(network, where) as probe, torch.no_grad():
                network(train[0])
                learned = fill(Ranges(), Activations(dict(probe.items()), reduce=reduce).layers)
                network(x)
                rows = Activations(dict(probe.items()), reduce=reduce)
            network.train()
            for code, value in found.compute().items():
                criterion = as_criterion(code)
                criterion.train = learned if criterion.learns() is not None else None
                assert value == pytest.approx(fill(criterion, rows.layers).compute(), rel=1e-4), (where, reduce, code)


def test_signals_have_their_channels_first():
    model = nn.Sequential(nn.Conv1d(2, 5, 3), nn.BatchNorm1d(5), nn.Flatten(), nn.Linear(30, 2))
    coverage = Coverage(model, ['NC'], ['0', '1', '3'], show_progress=False).update((torch.randn(3, 2, 8), torch.zeros(3).long()))
    assert coverage.criteria['NC'].layers == {'0': 5, '1': 5, '3': 2}


def test_maps_of_a_linear_layer_have_their_features_last():
    "As those of a Swin transformer, (batch, height, width, features)."
    model = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Flatten(), nn.Linear(60, 2))
    x, y = torch.randn(4, 3, 4, 3), torch.zeros(4).long()
    for reduce, expected in (('mean', model[0](x).mean((1, 2))), ('max', model[0](x).amax((1, 2)))):
        coverage = Coverage(model, ['NLC'], ['0', '1', '3'], reduce, show_progress=False)
        (found,) = coverage.walk((x, y))
        assert found.sizes == {'0': 5, '1': 5, '3': 2}
        torch.testing.assert_close(found.layers['0'], expected.detach())


def test_layer_norms_of_maps_have_their_channels_first():
    "Over the whole map, or in a class of its own that turns the axes, as in ConvNeXt."

    class Turned(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    model = nn.Sequential(nn.Conv2d(1, 5, 3), Turned(5), nn.LayerNorm([5, 6, 6]), nn.Flatten(), nn.Linear(180, 2))
    (found,) = Coverage(model, ['NC'], ['0', '1', '2'], show_progress=False).walk(images(4))
    assert found.sizes == {'0': 5, '1': 5, '2': 5}


def test_the_model_is_given_back(network):
    "After a walk that is left early, closed, or ends in an error of whoever walks."
    coverage = Coverage(network.train(), ['NC'], batch_size=4, show_progress=False)

    def untouched():
        return network.training and not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())

    for _ in coverage.walk(images(20)):
        assert not network.training
        break
    assert untouched()
    batches = coverage.walk(images(20))
    next(batches)
    batches.close()
    assert untouched()
    for error in (ValueError, KeyboardInterrupt):
        coverage.criteria = {'broken': Broken(error)}
        with pytest.raises(error):
            coverage.update(images(20))
        assert untouched() and coverage.samples == 0


class Broken(NC):
    "Fails in its first batch."

    def __init__(self, error):
        super().__init__()
        self.error = error

    def mask(self, activations):
        raise self.error


def test_assessment(network, tmp_path):
    train = images(40)
    found = assess(network, train, {'a': images(30, 1), 'b': images(20, 2)}, CODES, show_progress=False)
    table = found.table()
    assert list(table.columns) == ['suite', 'criterion', 'value', 'covered', 'total', 'unreachable', 'samples']
    assert table['samples'].tolist() == [30] * 8 + [20] * 8
    shares = table[table['total'].notna()]
    np.testing.assert_allclose(shares['value'], shares['covered'] / shares['total'])
    assert len(found.plot().axes) == 8
    found.save(tmp_path / 'found')
    assert Assessment.load(tmp_path / 'found').table().equals(table)
    alone = assess(network, train, images(20, 2), ['KMNC', KMNC(10)], show_progress=False)
    assert alone.dataset['criterion'].values.tolist() == ["KMNC(k=1000, ends='closed')", "KMNC(k=10, ends='closed')"]
    own = assess(network, train, images(5), 'NC', reduce=lambda name, rep: rep.amax((2, 3)), show_progress=False)
    assert 'at 0x' not in str(own.settings)


def test_gain_adds_nothing(network):
    found = Coverage(network, CODES, show_progress=False).learn(images(40)).update(images(20, 1))
    before, state = found.compute(), found.state_dict()
    gain = found.gain(images(20, 2))
    assert found.compute() == before and all(torch.equal(v, state[k]) for k, v in found.state_dict().items())
    after = found.update(images(20, 2)).compute()
    assert {name: after[name] - before[name] for name in after} == pytest.approx(gain)
    assert all(value == 0 for name, value in found.gain(images(20, 2)).items() if name in SETS)


def test_states_of_criteria_and_coverage(network, tmp_path):
    "Stored in a file, as JSON, or in memory: a later coverage goes on from there, without the training data."
    mix = [*(c for c in CODES if c != 'NLC'), NLC(gated=True), NC(0.2, scale=None), KMNC(7)]
    whole = Coverage(network, mix, show_progress=False).learn(images(40)).update(images(20, 1))
    save_arrays(tmp_path / 'state', whole.state_dict())
    stored, _ = load_arrays(tmp_path / 'state')
    for state in (stored, whole.state_dict(), {k: v.tolist() for k, v in whole.state_dict().items()}):
        again = Coverage(network, mix, show_progress=False)
        again.load_state_dict(state)
        assert again.compute() == pytest.approx(whole.compute(), rel=1e-6) and again.samples == 20
        assert again.gain(images(20, 2)) == pytest.approx(whole.gain(images(20, 2)), rel=1e-4, abs=1e-6)
    assert again.criteria['NBC'].covered().keys() == {'0', '5', '7'}
    only_learned = Coverage(network, mix, show_progress=False).learn(images(40))
    again.load_state_dict(only_learned.state_dict())
    assert again.samples == 0 and again.compute()['KMNC(k=7, ends=\'closed\')'] == 0
    again.update(images(20, 1))
    assert again.compute() == pytest.approx(whole.compute(), rel=1e-6)


def test_a_state_of_other_criteria(network):
    whole = Coverage(network, ['NC', 'KMNC'], show_progress=False).learn(images(40)).update(images(20, 1))
    other = Coverage(network, ['NC', 'NBC'], show_progress=False).learn(images(40)).update(images(9, 2))
    before = other.compute()
    for wrong in (whole.state_dict(), {}, {'weight': torch.zeros(2)}):
        with pytest.raises(ValueError, match='not a state of the criteria NC, NBC'):
            other.load_state_dict(wrong)
    for more in (['NC', 'TKNC'], ['NC', 'NBC']):  # nobody knows what the second one would have covered
        with pytest.raises(ValueError, match=f'holds nothing of {more[1]}'):
            Coverage(network, more, show_progress=False).load_state_dict(
                Coverage(network, ['NC'], show_progress=False).update(images(5)).state_dict())
    without = Coverage(network, ['NC'], show_progress=False)
    with pytest.raises(ValueError, match='not a state of the criteria NC, but of NBC'):
        without.load_state_dict(other.state_dict())
    assert other.compute() == before and other.samples == 9


def test_given_ranges_are_shared_and_stored(network):
    ranges = Coverage(network, 'NBC', show_progress=False).learn(images(40)).criteria['NBC'].train
    mine = Coverage(network, [NBC(train=ranges), KMNC(5, train=ranges), 'SNAC'], show_progress=False).learn(images(10, 3))
    assert mine.criteria['NBC'].train is mine.criteria['KMNC'].train is ranges and mine.criteria['SNAC'].train is not ranges
    mine.update(images(20, 1))
    again = Coverage(network, [NBC(train=ranges), KMNC(5, train=ranges), 'SNAC'], show_progress=False)
    again.load_state_dict(mine.state_dict())
    assert again.compute() == mine.compute() and again.gain(images(9, 4)) == mine.gain(images(9, 4))


def test_ranges_that_were_given_empty_are_learned(network):
    found = Coverage(network, [NBC(train=Ranges())], show_progress=False).learn(images(20)).update(images(20))
    assert found.compute() == {'NBC': 0}


def test_merging(network):
    one, two, whole = (Coverage(network, SETS, batch_size=16, show_progress=False).learn(images(40)) for _ in range(3))
    x, y = images(30, 1)
    one.update((x[:16], y[:16]))
    two.update((x[16:], y[16:]))
    one.merge(two)
    assert one.compute() == whole.update((x, y)).compute() and one.samples == 30
    stranger = Coverage(network, SETS, show_progress=False).learn(images(40, 5)).update((x, y))
    before = one.compute()
    with pytest.raises(ValueError, match='KMNC have learned from different training data'):
        one.merge(stranger)
    assert one.compute() == before and one.samples == 30  # nothing half merged
    with pytest.raises(ValueError, match='the criteria differ'):
        one.merge(Coverage(network, ['NC'], show_progress=False))
    with pytest.raises(ValueError, match='the settings differ'):
        KMNC(4).merge(KMNC(5))
    with pytest.raises(ValueError, match='now there are others'):
        fill(NC(), {'a': [[0.0, 1.0]]}).merge(fill(NC(), {'b': [[0.0, 1.0]]}))


# --- what goes wrong ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'make, error',
    [
        (lambda: NC(1.5), 'threshold'),
        (lambda: NC(scale='unit'), "scale is 'layer'"),
        (lambda: KMNC(0), 'at least 1'),
        (lambda: KMNC(2.5), 'whole number'),
        (lambda: KMNC(ends='open'), 'ends is one of'),
        (lambda: TKNC(0), 'at least 1'),
        (lambda: KMNC(INFINITY), 'whole number'),
        (lambda: NBC(sigma=-1.0), 'sigma'),
        (lambda: SNAC(sigma=NAN), 'sigma'),
        (lambda: Ranges().compute(), 'nothing has been seen'),
        (lambda: TKNP(-1), 'at least 1'),
        (lambda: CC(-1.0), 'at least 0'),
        (lambda: CC(float('nan')), 'at least 0'),
        (lambda: as_criterion('NCC'), 'no criterion'),
        (lambda: as_criterion('nbc'), "did you mean 'NBC'"),
        (lambda: as_criterion(12), 'a criterion is'),
        (lambda: NC().load_state_dict(({}, {})), r'take load_arrays\(path\)\[0\]'),
        (lambda: CC().load_state_dict(({}, {})), r'take load_arrays\(path\)\[0\]'),
        (lambda: TKNP().load_state_dict([1]), 'a state is a dictionary'),
        (lambda: as_criterion(torch.nn.ReLU), 'a criterion is'),
        (lambda: coverage._criteria(['NC', NC()]), 'twice'),
        (lambda: fill(KMNC(), {'a': [[1.0]]}), 'Coverage.learn'),
        (lambda: fill(SNAC(train=Ranges()), {'a': [[1.0]]}), 'Coverage.learn'),
        (lambda: NBC(train=fill(Ranges(), {'a': [[1.0, 2.0]]})).update({'b': torch.ones(1, 2)}), 'now there are others'),
        (lambda: fill(fill(NC(), {'a': [[1.0]]}), {'a': [[1.0, 2.0]]}), 'had 1 units and has 2'),
        (lambda: Activations({}), 'there are none'),
        (lambda: Activations({'a': torch.zeros(2, 3, 4, 4)}, reduce='median'), "reduce='median'"),
        (lambda: Activations({'a': torch.zeros(2, 3, 4, 4)}, reduce=lambda name, rep: rep), 'one value for each sample and unit'),
    ],
)  # fmt: skip
def test_errors(make, error):
    with pytest.raises((ValueError, KeyError, TypeError), match=error):
        make()


def test_empty_data(network):
    x, y = images(10)
    for nothing in ((x[:0], y[:0]), []):
        with pytest.raises(ValueError, match="suite 'b' is empty"):
            assess(network, (x, y), {'a': (x, y), 'b': nothing}, ['NC'], show_progress=False)
        with pytest.raises(ValueError, match='training data are empty'):
            assess(network, nothing, (x, y), ['NBC'], show_progress=False)
        found = Coverage(network, CODES, show_progress=False).learn((x, y)).update(nothing)
        assert found.samples == 0 and set(found.compute().values()) == {0}


class Explodes(nn.Module):
    "Overflows for bright images, as a network in half precision does."

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x):
        rows = self.first(x.flatten(1))
        return self.second(torch.where(x.flatten(1).amax(1, keepdim=True) > 0.9, rows / 0, rows))


def test_overflow_is_said_once(caplog):
    x, y = torch.full((8, 1, 2, 2), 0.5), torch.zeros(8, dtype=torch.long)
    x += torch.arange(8).view(8, 1, 1, 1) / 100
    bright = torch.cat([x, torch.ones(2, 1, 2, 2)]), torch.zeros(10, dtype=torch.long)
    with seeded(0):
        model = Explodes()
    coverage = Coverage(model, ['KMNC', 'NC', 'SNAC', 'CC'], batch_size=3, show_progress=False)
    with pytest.raises(ValueError, match='NaN or infinity to 2 of 10 samples, in the layers second, so nothing can be learned'):
        coverage.learn(bright)
    assert coverage.criteria['KMNC'].train is None  # nothing half learned
    coverage.learn((x, y))
    caplog.set_level(logging.WARNING)
    coverage.update((x, y))
    assert not caplog.records
    before = coverage.compute()
    coverage.update(bright)
    said = [r.getMessage().split(',')[0] for r in caplog.records if 'units say' in r.getMessage()]
    assert said == ['units say NaN or infinity to 2 of 10 samples']
    assert all(coverage.compute()[name] == before[name] for name in ('KMNC', 'CC'))
    assert np.isnan(Coverage(model, 'NLC', show_progress=False).update(bright).compute()['NLC'])


def test_learning_after_looking(network):
    found = Coverage(network, ['NBC'], show_progress=False).learn(images(20)).update(images(5, 1))
    with pytest.raises(ValueError, match=r'call reset\(\) first'):
        found.learn(images(20, 2))
    found.reset()
    low = found.criteria['NBC'].train.state['low']
    assert not torch.equal(found.learn(images(20, 2)).criteria['NBC'].train.state['low'], low)
    assert float(found.criteria['NBC'].train.state['count']) == 20  # what was learned before is forgotten


def test_an_interruption_keeps_the_finished_suites(network, caplog):
    caplog.set_level(logging.WARNING)

    def stopped():
        yield images(5, 1)
        raise KeyboardInterrupt

    found = assess(network, images(20), {'a': images(9), 'b': stopped(), 'c': images(9)}, ['NC'], show_progress=False)
    assert found.dataset['suite'].values.tolist() == ['a']
    assert 'interrupted; the result holds the suites that were done: a' in caplog.text
    with pytest.raises(KeyboardInterrupt):
        assess(network, images(20), {'b': stopped()}, ['NC'], show_progress=False)
    with pytest.raises(KeyboardInterrupt):
        assess(network, stopped(), {'a': images(9)}, ['KMNC'], show_progress=False)
    assert network.training and not network._forward_hooks


class Moody(nn.Module):
    "Runs another layer for dark images."

    def __init__(self, dark):
        super().__init__()
        self.a, self.b = nn.Linear(64, 4), nn.Linear(64, dark)

    def forward(self, x):
        return (self.a if x.mean() > 0 else self.b)(x.flatten(1))


@pytest.mark.parametrize('dark', [4, 5])
def test_other_layers_for_other_batches(dark):
    x, y = images(8)
    with pytest.raises(ValueError, match='now there are others: a, b'):
        Coverage(Moody(dark), ['NC'], batch_size=4, show_progress=False).update((torch.cat([x[:4], -x[4:]]), y))


def test_layers_whose_first_dimension_is_not_the_batch():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Linear(8, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.embed(x[:, 0].flatten(0, 1))).view(len(x), -1, 2).mean(1)

    with pytest.raises(ValueError, match='their first dimension has to be the batch'):
        Coverage(Tokens(), ['NC'], show_progress=False).update(images(3))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(network, dtype):
    "Half precision is widened before anything is counted, and double precision stays."
    model = copy.deepcopy(network).eval().to(dtype)
    found = Coverage(model, CODES, show_progress=False).learn(images(30)).update(images(30))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert found.criteria['KMNC'].train.state['low'].dtype == wide
    assert found.compute()['NBC'] == 0 and found.compute()['TKNC'] > 0.5
    assert Activations({'a': torch.full((1, 2, 64, 64), 60000, dtype=torch.float16)}).values.tolist() == [[60000.0, 60000.0]]


class Ours(UnitCriterion):
    "Without a code, and with a mask that is given."

    per_unit = 2

    def __init__(self, make):
        super().__init__()
        self._make = make

    def mask(self, activations):
        return self._make(activations.values)


@pytest.mark.parametrize(
    'make, got',
    [
        (lambda values: values > 0, r'\(4, 3\) of torch.bool'),
        (lambda values: values.repeat(1, 2), r'\(4, 6\) of torch.float32'),
        (lambda values: (values > 0).any(0).repeat(2), r'\(6,\) of torch.bool'),
        (lambda values: (values > 0).T.repeat(2, 1), r'\(6, 4\)'),
        (lambda values: None, 'NoneType'),
    ],
)
def test_a_mask_of_another_form(make, got):
    for ask in (lambda c, rows: c.update(rows), lambda c, rows: c.items(rows)):
        with pytest.raises(ValueError, match=rf'mask of Ours .* here \(4, 6\), with column unit \* per_unit .* got {got}'):
            ask(Ours(make), {'a': torch.randn(4, 3)})


def test_a_criterion_is_called_by_its_class(network):
    ours = Ours(lambda values: torch.stack([values < 0, values > 0], 2).flatten(1))
    assert list(assess(network, None, images(5), ours, show_progress=False).dataset['criterion'].values) == ['Ours']
    assert [c.code for c in (NC(), SNAC(), CC(), type('Mine', (NC,), {})())] == ['NC', 'SNAC', 'CC', 'Mine']
    assert 'unit * per_unit + which' in UnitCriterion.mask.__doc__


def test_inputs_on_another_scale(network, caplog):
    (x, y), train = images(20), images(40, 1)
    found = Coverage(network, ['NC', 'NBC'], batch_size=7, show_progress=False).learn(train)
    found.update((x, y)).update((1.9 * x, y)).update((x - 0.9, y))
    assert not caplog.records
    for _ in range(2):
        found.update((255 * x, y))
    (record,) = caplog.records
    assert 'training data in [' in record.getMessage() and 'x / 255' in record.getMessage() and ', 25' in record.getMessage()
    caplog.clear()
    assess(network, train, {'a': (x, y), 'b': (x - 5, y)}, ['NC', 'SNAC'], show_progress=False)
    assert len(caplog.records) == 1
    caplog.clear()
    Coverage(network, ['NC'], show_progress=False).learn(train).update((255 * x, y))  # nothing was learned, nothing to compare
    assert not caplog.records


def test_whole_numbers_as_inputs(network):
    x, y = images(4)
    with pytest.raises(TypeError, match=r'inputs are torch.int64, .* x.float\(\) / 255'):
        assess(network, None, ((255 * x).long(), y), 'NC', show_progress=False)
    words = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 2))
    pair = torch.randint(0, 9, (6, 3)), torch.zeros(6).long()
    assert assess(words, pair, pair, ['NC', 'NBC'], show_progress=False).dataset['samples'] == 6
    with pytest.raises(RuntimeError, match='shape|size'):
        assess(network, None, (torch.rand(2, 3, 8, 8), y[:2]), 'NC', show_progress=False)


def test_without_training_data(network):
    test = images(20)
    alone = assess(network, None, test, ['NC', 'TKNC', 'NLC'], show_progress=False)
    assert alone.table().equals(assess(network, images(9), test, ['NC', 'TKNC', 'NLC'], show_progress=False).table())
    with pytest.raises(ValueError, match='KMNC, NBC compare with the training data, and there are none'):
        assess(network, None, test, ['NC', 'KMNC', 'NBC'], show_progress=False)
    ranges = Coverage(network, 'NBC', show_progress=False).learn(images(40)).criteria['NBC'].train
    brighter = 2 * test[0], test[1]
    assert assess(network, None, brighter, NBC(train=ranges), show_progress=False).dataset['value'] > 0
    for nothing in ([], {}, ()):
        with pytest.raises(ValueError, match='no criteria to assess by'):
            assess(network, None, test, nothing, show_progress=False)
    with pytest.raises(ValueError, match='no suite to assess'):
        assess(network, None, {}, 'NC', show_progress=False)
    with pytest.raises(TypeError, match=r'load_arrays\(path\)\[0\]'):
        Coverage(network, 'NC', show_progress=False).load_state_dict(({}, {}))


def test_settings_say_what_was_looked_at(network, caplog, tmp_path):
    caplog.set_level(logging.WARNING)
    found = assess(network, images(40), {'a': images(9), 'b': images(9, 1)}, ['TKNC', TKNC(3), 'LSC'], show_progress=False)
    found.save(tmp_path / 'found')
    settings = Result.load(tmp_path / 'found').settings
    assert settings['layers'] == {'0': 6, '5': 8, '7': 4} and settings['where'] == "'weights'"
    words = 'k=10 is not below the number of units in 0, 5, 7: covered whole by any sample'
    assert settings['notes']['TKNC(k=10)'] == {'k': words}
    assert 'TKNC(k=3)' not in settings['notes']
    assert set(settings['notes'].get('LSC', {})) == set(map(str, as_learned(network).notes))
    assert caplog.text.count('k=10 is not below') == 1


def as_learned(network):
    "What LSC has learned from the same data."
    return Coverage(network, 'LSC', show_progress=False).learn(images(40)).criteria['LSC'].fitted()
