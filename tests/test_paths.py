"""Paths of attacks: nothing is changed by looking, everything is kept, and the explorer only slices."""

import json
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn

from robustnb import paths
from robustnb.attacks import APGD, FGSM, L2, PGD, Attack, Linf, WorstOf
from robustnb.blackbox import Square
from robustnb.devices import seeded
from robustnb.minimal import CW, DeepFool, Smallest
from robustnb.noises import Gaussian
from robustnb.paths import explore, trace
from robustnb.plots import png
from robustnb.results import Result


class Counted(nn.Module):
    "A model that counts its calls."

    def __init__(self, model):
        super().__init__()
        self.model, self.calls = model, 0

    def forward(self, x):
        self.calls += 1
        return self.model(x)


def network(kind: str) -> nn.Module:
    "A small network for one kind of input."
    with seeded(1):
        return {
            'image': lambda: nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 5)),
            'colour': lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)),
            'table': lambda: nn.Sequential(nn.Linear(7, 16), nn.ReLU(), nn.Linear(16, 5)),
            'plane': lambda: nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 5)),
            'one logit': lambda: nn.Sequential(nn.Linear(7, 16), nn.ReLU(), nn.Linear(16, 1)),
        }[kind]().eval()


SHAPES = {'image': (1, 8, 8), 'colour': (3, 8, 8), 'table': (7,), 'plane': (2,), 'one logit': (7,)}
ATTACKS = [
    FGSM(0.2),
    PGD(0.2, steps=5),
    PGD(0.2, steps=5, random_start=False, keep_going=False),
    PGD(0.2, steps=3, restarts=3),
    PGD(0.8, steps=4, norm=L2(), loss='dlr'),
    PGD(0.2, steps=4, target='runner-up'),
    APGD(0.2, steps=12),
    APGD(0.8, steps=6, restarts=2, norm=L2()),
]
every_attack = pytest.mark.parametrize('attack', ATTACKS, ids=lambda a: f'{a.name}{"" if a.keep_going else " stops"}')
every_kind = pytest.mark.parametrize('kind', SHAPES)


def samples(kind: str, n: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    classes = 2 if kind == 'one logit' else 5
    return torch.rand(n, *SHAPES[kind], generator=generator), torch.randint(0, classes, (n,), generator=generator)


# ------------------------------------------------------------------------------------------------------------- paths


@every_kind
@every_attack
def test_the_path_is_that_of_the_attack(kind, attack):
    model, (x, y), ids = network(kind), samples(kind), torch.tensor([4, 9, 2])
    whole = replace(attack, keep_going=True)
    outcome, path = whole.run(model, x, y, ids), trace(model, x, y, attack, ids)
    data = path.dataset
    assert torch.equal(torch.from_numpy(path.x_adv), outcome.x_adv)
    assert path.settings['passes'] == outcome.passes
    if attack.target is None:  # choosing a target takes one pass more
        assert data.sizes['point'] == outcome.passes['forward']
    if isinstance(attack, FGSM) or isinstance(attack, PGD) and attack.restarts == 1:
        assert (data['returned'] == data.sizes['point'] - 1).all()
    rows = np.arange(3)
    for name, expected in {'wrong': outcome.success, 'loss': outcome.loss, 'size': outcome.size}.items():
        np.testing.assert_array_equal(data[name].values[data['returned'].values, rows], expected.numpy())


@every_kind
def test_logits_are_those_of_the_model(kind):
    model, (x, y) = network(kind), samples(kind)
    path = trace(model, x, y, PGD(0.2, steps=4))
    with torch.no_grad():
        for point, logits in zip(path.dataset['points'].values, path.dataset['logits'].values, strict=True):
            expected = model(torch.from_numpy(point)).numpy()
            if kind == 'one logit':
                expected = np.concatenate([np.zeros_like(expected), expected], 1)
            np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)  # kernels depend on where data lie
        clean = path.dataset['clean_logits'].values[:, -1]
        np.testing.assert_allclose(clean, model(x).numpy()[:, -1], rtol=1e-5, atol=1e-6)
    assert path.dataset['class'].values.tolist() == [str(c) for c in range(2 if kind == 'one logit' else 5)]


def test_one_logit_has_the_loss_of_two():
    model, (x, y) = network('one logit'), samples('one logit')
    data = trace(model, x, y, PGD(0.2, steps=4)).dataset
    two = torch.from_numpy(data['logits'].values).flatten(0, 1)
    expected = nn.functional.cross_entropy(two, y.repeat(5), reduction='none')
    np.testing.assert_allclose(data['loss'].values.ravel(), expected.numpy(), rtol=1e-5)


def test_the_table():
    model, (x, y) = network('image'), samples('image')
    path = trace(model, x, y, APGD(0.2, steps=6), ids=torch.tensor([4, 9, 2]), classes=tuple('abcde'))
    table = path.table()
    assert list(table) == ['sample', 'point', 'size', 'loss', 'seen', 'wrong', 'probability', 'returned']
    assert table['sample'].unique().tolist() == [4, 9, 2] and len(table) == 3 * 7
    assert (table['returned'].groupby(table['sample']).sum() == 1).all()
    assert ((table['seen'] != 'abcde'[y[0]]) == table['wrong'])[table['sample'] == 4].all()
    np.testing.assert_allclose(-np.log(table['probability']), table['loss'], rtol=1e-4)
    worst = table.loc[table.groupby('sample')['loss'].idxmax()]
    assert worst['returned'].all() or worst['wrong'].any(), 'APGD returns the worst point'


@every_kind
def test_round_trip_and_figures(tmp_path, kind):
    model, (x, y) = network(kind), samples(kind)
    path = trace(model, x, y, PGD(0.2, steps=3))
    path.save(tmp_path / 'path.safetensors')
    again = Result.load(tmp_path / 'path.safetensors')
    assert type(again).__name__ == 'AttackPath' and again.dataset.identical(path.dataset) and again.settings == path.settings
    pictures = {png(again.plot(sample, point)) for sample, point in ((0, None), (0, 1), (2, None))}
    assert len(pictures | {png(path.plot(probabilities=True))}) == 4
    assert png(path.plot(point=3)) == png(again.plot()), 'the last point is the one that is returned'


def test_the_model_is_left_alone():
    model, (x, y) = network('image'), samples('image')
    model[1].train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trace(model, x, y, PGD(0.2, steps=3))
    explore(model, x[:1], y[:1], PGD(steps=2), [0.1, 0.2], show_progress=False).static()
    assert model[1].training and not model[0].training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and not any(m._forward_hooks for m in model.modules())


def test_an_attack_of_your_own():
    "One that returns a point that it never asked about."

    @dataclass(frozen=True)
    class Corner(Attack):
        eps: float = 0.1

        def search(self, problem):
            problem.judge(problem.x)
            return problem.project(problem.x + problem.eps), (problem.x.new_zeros(len(problem.x)),) * 2

    model, (x, y) = network('table'), samples('table')
    path = trace(model, x, y, Corner())
    assert path.dataset.sizes['point'] == 2 and (path.dataset['returned'] == 1).all()
    np.testing.assert_array_equal(path.x_adv, (x + 0.1).clamp(max=1).numpy())


@pytest.mark.parametrize('attack', [CW(steps=4), DeepFool(), Smallest(PGD(0.2, steps=3), tries=4), Square(0.2, queries=9)],
                         ids=lambda a: a.name)  # fmt: skip
def test_attacks_of_other_rooms_have_paths_too(attack):
    model, (x, y) = network('table'), samples('table')
    path = trace(model, x, y, attack)
    np.testing.assert_allclose(path.x_adv, attack(model, x, y).numpy(), atol=1e-5)
    assert np.isfinite(path.dataset['loss'].values).all() and path.dataset.sizes['point'] > 1
    png(path.plot())


def test_a_sample_that_is_its_own_target_stays():
    model, (x, y) = network('table'), samples('table')
    path = trace(model, x, y, PGD(0.2, steps=3, target=int(y[0])))
    np.testing.assert_array_equal(path.x_adv[0], x[0].numpy())
    assert not path.dataset['wrong'].values[-1, 0]


@pytest.mark.parametrize(
    'call, error, message',
    [
        (lambda m, x, y: trace(m, x, y, Gaussian(0.1)), TypeError, 'only an attack of robustnb.attacks has a path'),
        (lambda m, x, y: trace(m, x, y, WorstOf([FGSM(), PGD()])), TypeError, 'Trace its members one by one'),
        (lambda m, x, y: trace(m, x[:0], y[:0], FGSM()), ValueError, 'the batch is empty'),
        (lambda m, x, y: trace(m, x, y[:1], FGSM()), ValueError, 'labels have shape'),
        (lambda m, x, y: trace(m, x + 3, y, FGSM()), ValueError, 'outside the bounds'),
        (lambda m, x, y: trace(m, x, y, FGSM(0.1)).plot(point=7), IndexError, 'out of range'),
        (lambda m, x, y: trace(m, x, y, FGSM(0.1)).explore(), TypeError, 'an explorer needs the model'),
        (lambda m, x, y: explore(m, x, y), ValueError, r'one sample: x\[:1\] and y\[:1\], or x\[0\] and y\[0\]'),
        (lambda m, x, y: explore(m, x[0], y), ValueError, 'one sample'),
        (lambda m, x, y: explore(m, x[0], y[0], WorstOf()), TypeError, 'Trace its members'),
        (lambda m, x, y: explore(m, x[0], y[0], bounds=None), ValueError, 'no range to take strengths from'),
        (lambda m, x, y: explore(m, x[0], y[0], eps={'Linf': [0.1]}), ValueError, 'one for each of Linf, L2'),
        (lambda m, x, y: explore(m, x[0], y[0], eps={'Linf': [0.1], 'L2': [1, 2]}), ValueError, 'equal lengths'),
        (lambda m, x, y: explore(m, x[0], y[0], eps=[]), ValueError, 'eps takes a list'),
        (lambda m, x, y: explore(m, x[0], y[0], eps=[0.1, 0.2, 0.1]), ValueError, 'must differ'),
        (lambda m, x, y: explore(m, x[0], y[0], norms=[L2(), L2(scale=2)]), ValueError, 'one of each shape at most'),
        (lambda m, x, y: explore(m, x[0], y[0], norms=['L2']), ValueError, 'one of each shape at most'),
    ],
)
def test_errors_teach(call, error, message):
    with pytest.raises(error, match=message):
        call(network('table'), *samples('table'))


def test_questions_about_some_samples_have_no_path():
    @dataclass(frozen=True)
    class Some(Attack):
        eps: float = 0.1

        def search(self, problem):
            problem.judge(problem.x)
            problem.answer(problem.x[:1], slice(0, 1), slope=False)
            return problem.x, None

    with pytest.raises(ValueError, match='asks about 1 inputs at once, for 3 samples'):
        trace(network('table'), *samples('table'), Some())


# ---------------------------------------------------------------------------------------------------------- explorer


@pytest.fixture(scope='module')
def shown():
    "An explorer, its model, and the sample."
    model, (x, y) = Counted(network('image')), samples('image')
    explorer = explore(model, x[:1], y[:1], sample=7, show_progress=False)
    return explorer, model, x[:1], y[:1]


@pytest.fixture
def spied(monkeypatch):
    "The view of every picture that an explorer draws."
    views, draw = [], paths._draw

    def spy(view):
        views.append(view)
        return draw(view)

    monkeypatch.setattr(paths, '_draw', spy)
    return views


@pytest.mark.parametrize('attack', [FGSM(), PGD(steps=20), APGD(steps=20), PGD(steps=3, step=0.05, eps=0.1)])
@pytest.mark.parametrize('norm', [Linf(), L2()])
def test_one_batch_of_strengths_equals_separate_runs(spied, attack, norm):
    "Up to rounding: the kernels of a linear layer may depend on the number of rows, and a sign may then tip over."
    model, (x, y), eps = network('table'), samples('table'), [0.05, 0.1, 0.3]
    model, x = model.double(), x.double()
    explorer = explore(model, x[0], y[0], attack, eps, [norm], sample=5, show_progress=False)
    for e in eps:
        alone = trace(model, x[:1], y[:1], replace(attack.at(e), norm=norm), torch.tensor([5])).dataset.isel(sample=0)
        explorer.static(eps=e)
        view = spied[-1]
        np.testing.assert_allclose(view.logits, alone['logits'].values, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(view.data['loss'].values, alone['loss'].values, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(view.x_adv, alone['points'].values[-1], atol=1e-3)  # kept in half precision
        assert view.point == alone.sizes['point'] - 1 and view.returned == int(alone['returned'])


def test_sliding_asks_no_model(shown):
    explorer, model, *_ = shown
    assert model.calls > 0
    before = model.calls
    part = explorer.widget
    for state in (
        {'attack': 'FGSM'},
        {'norm': 'L2'},
        {'eps': 0.2, 'point': 3},
        {'attack': 'APGD-20', 'probabilities': True},
    ):
        explorer.update(**state)
        png(explorer.static())
    assert model.calls == before and part is explorer.widget


def test_state_round_trip(shown):
    explorer, _, x, y = shown
    explorer.update(attack='PGD-20', norm='Linf', eps=0.12, point=4, probabilities=True)
    state = json.loads(json.dumps(explorer.state))
    assert state == {'attack': 'PGD-20', 'norm': 'Linf', 'probabilities': True, 'eps': 0.12, 'point': 4}
    copy = explore(network('image'), x[0], int(y), sample=7, show_progress=False)
    copy.update(**state)
    assert copy.state == explorer.state and png(copy.static()) == png(explorer.static())


def test_controls_say_both_strengths(shown):
    from test_widgets import part, walk

    explorer, *_ = shown
    slider = part(explorer, 'rnb-eps')
    assert slider.description == 'eps (Linf | L2)' and slider.options[0] == ('0.01 | 0.02', 0)  # 0.01 * sqrt(64) / 4
    assert part(explorer, 'rnb-point').options[-1] == ('20', 20)
    assert [part(explorer, f'rnb-{name}')._model_name for name in ('attack', 'norm', 'probabilities', 'eps', 'point')] == [
        'DropdownModel', 'DropdownModel', 'CheckboxModel', 'SelectionSliderModel', 'SelectionSliderModel']  # fmt: skip
    assert {type(w).__module__.split('.')[0] for w in walk(explorer.widget)} == {'ipywidgets'}
    single = explore(network('image'), *[v[:1] for v in samples('image')], FGSM(), [0.1], [L2()], show_progress=False)
    assert part(single, 'rnb-eps').options == (('0.1', 0),)


def test_a_short_path_shows_its_last_point(shown, spied):
    explorer, *_ = shown
    explorer.static(attack='FGSM', point=20)
    assert spied[-1].point == 1 and 'Point 1 of 1:' in explorer.describe(**explorer.state | {'attack': 'FGSM'})


def test_the_strength_at_which_it_starts(shown):
    fresh = explore(network('image'), *shown[2:], sample=7, show_progress=False)
    words = fresh.describe(**fresh.state)
    assert f'at which PGD-20 in Linf succeeds is {float(fresh.state["eps"])}' in words or 'does not succeed' in words


def test_every_state_can_be_drawn(spied):
    for kind in ('colour', 'table', 'plane', 'one logit'):
        model, (x, y) = network(kind), samples(kind)
        explorer = explore(model, x[0], y[0], [FGSM(), PGD(steps=2)], [0.1, 0.3], show_progress=False)
        for attack, norm, point in (('FGSM', 'L2', 0), ('PGD-2', 'Linf', 2)):
            png(explorer.static(attack=attack, norm=norm, point=point, eps=0.3))
        assert explorer.bundle_bytes < 500_000
    assert len(spied) == 8


def test_images_too_large_are_refused_before_anything_is_computed():
    model = Counted(nn.Sequential(nn.AvgPool2d(32), nn.Flatten(), nn.Linear(432, 3)))
    with pytest.raises(ValueError, match='8 strengths of 3 attacks in 2 norms take 42 MB'):
        explore(model, torch.rand(1, 3, 384, 384), torch.tensor([1]), show_progress=False)
    assert model.calls == 0


@pytest.mark.parametrize(
    'shape, layout',
    [((28, 28), 'image'), ((1, 8, 8), 'image'), ((3, 32, 64), 'image'), ((2,), 'plane'), ((7,), 'values'), ((2, 200), 'values'),
     ((4, 8, 8), 'values'), ((1, 1, 50), 'values')],
)  # fmt: skip
def test_layouts(shape, layout):
    assert paths._layout(shape) == layout


def test_long_names_and_many_classes(spied):
    "Names that differ in their middle stay different, small shares are not rounded to nothing, and nothing is read as HTML."
    from test_widgets import part

    with seeded(0):
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 1000))
    x, names = torch.rand(1, 1, 8, 8), [f'<b>class {i}</b>, with a long name' for i in range(1000)]
    y = model(x).argmax(1)
    explorer = explore(model, x, y, PGD(steps=5), [0.3, 0.5], classes=names, show_progress=False)
    png(explorer.static())
    view = spied[-1]
    assert view.rival != view.label and view.name(view.label) != view.name(view.rival)
    assert len(view.name(view.rival)) <= 11 and view.name(view.rival, 16) in view.title
    assert '(0%)' not in view.read(view.logits[-1]) and 'with 0%' not in explorer.describe(**explorer.state)
    alike = f'{"a" * 40}0{"b" * 40}', f'{"a" * 40}1{"b" * 40}'
    view.names = [alike[c == view.label] for c in range(1000)]
    assert len(view.name(view.rival)) == 11, 'what no few letters tell apart is cut all the same'
    words = part(explorer, 'rnb-words').value
    assert '&lt;b&gt;class' in words and '<b>' not in words


@pytest.mark.parametrize('share, words', [(0.5, '50%'), (0.004, '0.4%'), (0.0001, '0%'), (0.0, '0%'), (1.0, '100%')])
def test_percent(share, words):
    assert paths._percent(share) == words


def test_large_images_are_thinned_out(spied):
    model = nn.Sequential(nn.AvgPool2d(32), nn.Flatten(), nn.Linear(147, 3))
    x, y = torch.rand(1, 3, 224, 224), torch.tensor([1])
    explorer = explore(model, x, y, PGD(steps=8), eps=[0.1, 0.2, 0.3, 0.4], norms=[Linf(), L2()], show_progress=False)
    assert 10_000_000 < explorer.bundle_bytes < 20_000_000
    explorer.static(point=1)
    view = spied[-1]
    assert view.logits.shape == (9, 3) and view.point in (0, 2), 'images of some points, logits of all'


@pytest.mark.parametrize(
    'points, most, expected', [(5, 9, [0, 1, 2, 3, 4]), (5, 0, [4]), (5, 3, [0, 2, 4]), (2, 1, [1])]
)
def test_kept(points, most, expected):
    assert paths._kept(points, most).tolist() == expected


@pytest.mark.parametrize(
    'largest, factor', [(0.1, 10), (0.03, 20), (0.2, 5), (0.0, 1), (2.0, 1), (1 / 255, 200), (0.9, 1)]
)
def test_magnifier(largest, factor):
    assert paths._magnifier(np.array([0.0, -largest]), 1.0) == factor
