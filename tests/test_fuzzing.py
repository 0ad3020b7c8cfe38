"""The fuzzer against literal forms of what it does: gains from the union, limits of chains, draws; and what it must survive."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from robustnb import fuzzing
from robustnb.coverage import CC, CRITERIA, KMNC, NBC, NC, NLC, TKNP, Activations, Coverage, Criterion
from robustnb.data import DataSet
from robustnb.devices import seeded
from robustnb.fuzzing import (
    TRANSFORMS,
    Campaign,
    Mutation,
    VersusLuck,
    _ByItems,
    _drawn,
    _OneByOne,
    _weights,
    as_mutation,
    fuzz,
    versus_luck,
    within_limits,
)
from robustnb.noises import Gaussian, Salt
from robustnb.results import Result

QUIET = {'show_progress': False}


def images(n, seed=0, channels=1, size=8):
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 3
    x = rng.random((n, channels, size, size)) * 0.4
    for row, label in enumerate(y):  # a bright bar in another place for each class
        x[row, :, 2 * label : 2 * label + 2] += 0.2
    return DataSet(torch.tensor(x, dtype=torch.float32), torch.tensor(y), ('top', 'middle', 'bottom'), 'bars')


def network(channels=1, size=8):
    with seeded(0):
        maps = nn.Conv2d(channels, 4, 3), nn.ReLU(), nn.Flatten()
        net = nn.Sequential(*maps, nn.Linear(4 * (size - 2) ** 2, 6), nn.ReLU(), nn.Linear(6, 3))
    data, optimizer = images(120, 7, channels, size), torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(data.x), data.y).backward()
        optimizer.step()
    return net.eval()


MODEL, TRAIN, SEEDS = network(), images(90, 1), images(24, 2)
POINTS = DataSet(torch.randn(40, 4, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 3, bounds=None)
POINTS_WITHOUT_LABELS = DataSet(POINTS.x, torch.full((40,), -1), bounds=None)
with seeded(3):
    PLANE = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def nudge(x, numbers):
    return x + 0.4 * (numbers[:4] - 0.5)


def hunt(criterion='NBC', budget=60, **settings):
    return fuzz(MODEL, TRAIN, SEEDS, criterion, budget=budget, generation=20, **QUIET, **settings)


@pytest.fixture(scope='module')
def campaign():
    return hunt(budget=200, keep=10_000)


# --------------------------------------------------------------------------------------------------------------- gain
def activations(n, seed, spread=1.0):
    rng = np.random.default_rng(seed)
    return Activations({'a': torch.tensor(rng.normal(size=(n, 5)) * spread), 'b': torch.tensor(rng.normal(size=(n, 3)) * spread)})


def taught(criterion):
    learner = criterion.learns()
    if learner is not None:
        learner.update(activations(60, 0))
        criterion.train = learner
    return criterion


@pytest.mark.parametrize('criterion', [KMNC(k=7), NBC(), NC(), CC(threshold=1.0), NLC(), TKNP(k=2)], ids=lambda c: c.code)
def test_gain_is_that_of_the_union_one_sample_after_the_other(criterion):
    criterion, batches = taught(criterion), [activations(9, 1), activations(14, 2, 1.4)]
    judge = fuzzing._judge(criterion.fresh())
    judge.see(batches[0])
    union, good = criterion.fresh(), np.arange(14) % 4 != 1
    union.update(batches[0])
    expected = np.zeros(14)
    for row in good.nonzero()[0]:
        before = union.compute()
        trial = criterion.fresh()
        trial.merge(union)
        trial.update(fuzzing._row_of(batches[1], row))
        if trial.compute() > before:
            expected[row], union = trial.compute() - before, trial
    np.testing.assert_allclose(judge.judge(batches[1], good), expected, atol=1e-12)
    assert judge.value == pytest.approx(union.compute())
    assert not judge.judge(batches[1], np.zeros(14, bool)).any()


def test_both_judges_agree_where_there_are_items():
    criterion, batch = taught(KMNC(k=20)), activations(30, 5)
    judges = _ByItems(criterion.fresh()), _OneByOne(criterion.fresh())
    gains = [judge.judge(batch, np.ones(30, bool)) for judge in judges]
    np.testing.assert_allclose(*gains, atol=1e-12)
    np.testing.assert_allclose(judges[0].judge(batch, np.ones(30, bool)), 0)  # nothing is new the second time
    assert judges[0].value == pytest.approx(judges[1].value)


def test_accepted_mutants_and_seeds_have_the_coverage_that_is_said(campaign):
    coverage = Coverage(MODEL, 'NBC', **QUIET).learn(TRAIN).update(SEEDS)
    assert campaign.settings['start'] == pytest.approx(coverage.compute()['NBC'])
    coverage.update(campaign.suite('gain'))
    assert campaign.summary()['coverage'] == pytest.approx(coverage.compute()['NBC'])
    gains = campaign.dataset['gain'].values
    np.testing.assert_allclose(campaign.dataset['value'].values, campaign.settings['start'] + gains.cumsum(), atol=1e-12)
    assert 0 < (gains > 0).sum() < len(gains)


@pytest.mark.parametrize('code', CRITERIA)
def test_every_criterion_guides_a_campaign(code):
    found = hunt(code, budget=20)
    assert isinstance(found, Campaign) and len(found.mutants()) == 20 and np.isfinite(found.dataset['value']).all()
    assert (np.diff(found.dataset['value'].values) >= 0).all()


# -------------------------------------------------------------------------------------------------------------- limits
@pytest.mark.parametrize('alpha, beta', [(0.02, 0.2), (0.0, 0.1), (0.4, 0.0)])
def test_chains_stay_within_the_limits_and_move_once(alpha, beta):
    found = hunt(budget=120, alpha=alpha, beta=beta, parents='all')
    moves = {name for name, m in TRANSFORMS.items() if m.moves}
    for number in found.dataset['mutant'].values[found.dataset['transform'].values != '']:
        chain = found.chain(int(number))
        assert sum(name in moves for name in chain) <= 1
        assert len(chain) == found.dataset['depth'].values[number]
    kept = found.dataset['kept'].values
    still = [i for i, number in enumerate(kept) if not moves & {*found.chain(int(number))}]
    assert still or not beta  # every change of values alters all of these noisy ones
    for i in still:
        assert within_limits(found.suite().x[i], SEEDS.x[found.dataset['seed'].values[kept[i]]], alpha, beta)
    assert found.suite().x.min() >= 0 and found.suite().x.max() <= 1


def test_within_limits_is_the_published_rule():
    rng = np.random.default_rng(0)
    for _ in range(50):
        x, reference = rng.random((2, 3, 4, 5)).astype(np.float32)
        x = np.where(rng.random(x.shape) < rng.random(), x, reference)
        share, largest = (np.abs(x - reference) > 1 / 510).mean(), np.abs(x - reference).max()
        expected = share <= 0.3 + 1e-9 or largest <= 0.6
        assert within_limits(torch.tensor(x), torch.tensor(reference), 0.3, 0.6) == expected


def test_only_those_that_may_become_parents_do():
    for parents in ('gain', 'all', 'seeds'):
        data = hunt(budget=120, parents=parents, alpha=0.4, beta=0.8, seed=4).dataset
        made, fault, gain = data['transform'].values != '', data['fault'].values, data['gain'].values > 0
        may = made & ~fault & {'gain': gain, 'all': made, 'seeds': np.zeros_like(made)}[parents]
        assert (data['queued'].values == may).all()
        assert {*data['parent'].values.tolist()} - {-1} <= {*may.nonzero()[0].tolist()}
        assert (data['depth'].values > 1).any() == (parents != 'seeds')


def test_weights_and_draws():
    counts = np.array([0.0, 3.0, 50.0])
    np.testing.assert_allclose(_weights(counts, 5), [1, 0.4, 0.01])
    shares = np.bincount(_drawn(counts, 5, (np.arange(14100) + 0.5) / 14100)) / 14100
    np.testing.assert_allclose(shares, np.array([1, 0.4, 0.01]) / 1.41, atol=2e-4)
    assert _drawn(counts, 5, np.array([0.0, 1 - 2**-24])).tolist() == [0, 2]


# -------------------------------------------------------------------------------------------------------------- faults
def test_faults_are_answers_other_than_the_label_of_a_seed_that_was_right(campaign):
    found = fuzz(MODEL, TRAIN, SEEDS, budget=150, alpha=0.4, beta=0.8, **QUIET)
    right = MODEL(SEEDS.x).argmax(1) == SEEDS.y
    data = found.dataset
    assert right[data['seed'].values].all() and found.summary()['usable seeds'] == int(right.sum())
    faults = found.suite('faults')
    assert len(faults) == len(found.faults) > 0 and faults.ids.tolist() == found.faults.tolist()
    assert (MODEL(faults.x).argmax(1) != faults.y).all() and (MODEL(found.suite('gain').x).shape[1]) == 3
    assert (data['label'].values == SEEDS.y.numpy()[data['seed'].values]).all()
    assert found.table().iloc[-1]['faults'] == len(found.faults) == found.table()['faults'][:-1].sum()
    assert found.summary()['pairs (label, answer)'] <= len(found.faults)


def test_seeds_that_are_wrong_are_never_changed():
    y = SEEDS.y.clone()
    y[:5] = (y[:5] + 1) % 3
    found = fuzz(MODEL, TRAIN, (SEEDS.x, y), budget=50, **QUIET)
    assert found.settings['usable'] == int((MODEL(SEEDS.x).argmax(1) == y).sum()) and found.dataset['seed'].values.min() >= 5


def test_seeds_without_labels_take_the_word_of_the_network():
    found = fuzz(MODEL, TRAIN, SEEDS.x, budget=50, **QUIET)
    assert found.settings['usable'] == 24
    assert (found.dataset['label'].values == MODEL(SEEDS.x).argmax(1).numpy()[found.dataset['seed'].values]).all()


def test_an_answer_that_is_no_number_is_a_fault():
    class Fragile(nn.Module):
        def __init__(self, limit):
            super().__init__()
            self.net, self.limit = MODEL, limit

        def forward(self, x):
            return self.net(x).masked_fill((x.amax((1, 2, 3)) > self.limit)[:, None], torch.nan)

    limit = float(SEEDS.x.amax())
    found = fuzz(Fragile(limit), None, SEEDS, 'NC', ['contrast', 'brightness'], budget=50, **QUIET)
    lost = found.dataset['predicted'].values == -1
    assert lost.any() and found.dataset['fault'].values[lost].all() and not found.dataset['queued'].values[lost].any()
    assert found.summary()['answers that are NaN'] == lost.sum() and found.summary()['classes of the faults'] <= 3
    assert (found.suite('faults').x.amax((1, 2, 3)) > limit).sum() == lost.sum() and found.plot_faults()._repr_png_()
    half = fuzz(Fragile(float(SEEDS.x.amax((1, 2, 3)).median())), None, SEEDS.x, 'NC', budget=20, **QUIET).settings['usable']
    assert 0 < half < 24  # nor is NaN the label of a seed without one


# --------------------------------------------------------------------------------------------------------- determinism
def test_the_same_seed_gives_the_same_campaign(campaign):
    again = hunt(budget=200, keep=10_000, batch_size=7)
    same = ['seed', 'parent', 'transform', 'failures', 'depth', 'fault', 'queued']
    assert again.mutants()[same].equals(campaign.mutants()[same])
    torch.testing.assert_close(again.suite().x, campaign.suite().x, rtol=0, atol=0)
    assert not hunt(budget=200, seed=1).mutants()[same].equals(campaign.mutants()[same])


def test_the_global_generators_are_left_alone():
    torch.manual_seed(5), np.random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    from torchvision.transforms import v2

    found = hunt(budget=40, transforms=[v2.RandomErasing(p=1, scale=(0.01, 0.02)), Gaussian(0.05), 'blur'])
    assert {*found.dataset['transform'].values} >= {'RandomErasing', 'Gaussian'}
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()


@pytest.mark.parametrize('code', ['NBC', 'DSC', 'NLC', 'IDC'])
def test_going_on_is_as_if_nothing_had_stopped(code, tmp_path):
    whole, file = hunt(code, budget=60), tmp_path / 'campaign.safetensors'
    hunt(code, budget=20, resume=file)
    longer = hunt(code, budget=60, resume=file)
    assert longer.mutants().equals(whole.mutants())
    torch.testing.assert_close(longer.suite().x, whole.suite().x, rtol=0, atol=0)
    held = hunt(code, budget=60, resume=hunt(code, budget=40))
    assert held.mutants().equals(whole.mutants())
    assert type(Result.load(file)).__name__ == 'Campaign'
    assert hunt(code, budget=20, resume=longer).mutants().equals(whole.mutants())  # nothing is left to do
    assert {key: longer.settings[key] for key in whole.settings} == whole.settings


@pytest.mark.parametrize('after', [1, 2, 3])
def test_an_interruption_keeps_whole_generations(monkeypatch, after):
    whole, calls = hunt(budget=60), []
    real = fuzzing._verdicts

    def stop(*args):
        calls.append(1)
        answer = real(*args)
        if len(calls) == after:
            raise KeyboardInterrupt
        return answer

    monkeypatch.setattr(fuzzing, '_verdicts', stop)
    if after == 1:
        with pytest.raises(KeyboardInterrupt):
            hunt(budget=60)
        return
    part = hunt(budget=60)
    monkeypatch.undo()
    assert len(part.mutants()) == 20 * (after - 1)
    assert hunt(budget=60, resume=part).mutants().equals(whole.mutants())


def test_going_on_in_another_way_is_an_error():
    begun = hunt(budget=20)
    with pytest.raises(ValueError, match='beta=0.2, now 0.3'):
        hunt(budget=40, resume=begun, beta=0.3)
    with pytest.raises(ValueError, match='other network'):
        fuzz(nn.Sequential(MODEL), TRAIN, SEEDS, budget=40, generation=20, resume=begun, **QUIET)
    with pytest.raises(ValueError, match='other seeds'):
        fuzz(MODEL, TRAIN, images(24, 3), budget=40, generation=20, resume=begun, **QUIET)


    with pytest.raises(ValueError, match='other training data'):
        fuzz(MODEL, images(90, 11), SEEDS, budget=40, generation=20, resume=begun, **QUIET)


@pytest.mark.parametrize('kind', [torch.bfloat16, torch.float16, torch.float64])
def test_seeds_of_every_precision(kind):
    seeds = DataSet(SEEDS.x.to(kind), SEEDS.y)
    found = fuzz(MODEL, TRAIN, seeds, budget=20, generation=20, **QUIET)
    again = fuzz(MODEL, TRAIN, seeds, budget=40, generation=20, resume=found, **QUIET)
    assert again.suite().x.dtype == (torch.float32 if kind == torch.bfloat16 else kind)
    assert again.mutants().equals(fuzz(MODEL, TRAIN, seeds, budget=40, generation=20, **QUIET).mutants())


def test_a_transform_with_luck_of_its_own_cannot_go_on():
    rng = np.random.default_rng(0)

    def lucky(x, numbers):
        return x if rng.random() < 0.5 else (x + 0.2 * float(rng.random())).clamp(0, 1)

    begun = hunt(budget=40, transforms=[lucky], parents='all')
    with pytest.raises(ValueError, match='by its numbers alone'):
        for _ in range(20):
            hunt(budget=60, transforms=[lucky], parents='all', resume=begun)


# ----------------------------------------------------------------------------------------------------------- transforms
@pytest.mark.parametrize('name', TRANSFORMS)
@pytest.mark.parametrize('shape', [(1, 8, 8), (5, 9, 20), (3, 2, 3), (1, 1, 12)])
def test_transforms_keep_form_and_type(name, shape):
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    for value in (0.0, 0.3, 0.9999):
        found = TRANSFORMS[name].change(x, torch.full((8,), value))
        assert found.shape == x.shape and found.dtype == x.dtype and found.isfinite().all()
    x = x.double()
    assert TRANSFORMS[name].change(x, torch.full((8,), 0.3)).dtype == torch.float64


def test_colour_images_of_other_bounds():
    model, data = network(3, 10), images(30, 2, 3, 10)
    data = DataSet(data.x * 2 - 1, data.y, bounds=(-1, 1))
    found = fuzz(nn.Sequential(model), data, data, budget=50, beta=0.3, **QUIET)
    assert found.suite().x.shape[1:] == (3, 10, 10) and found.suite().bounds == (-1, 1)
    assert -1 <= found.suite().x.min() < -0.2 and found.suite().x.max() <= 1


def test_vectors_take_functions_and_refuse_images():
    found = fuzz(PLANE, POINTS, POINTS_WITHOUT_LABELS, 'KMNC', [nudge], budget=100, alpha=0, beta=0.1, **QUIET)
    assert found.suite().x.shape[1] == 4 and found.suite().bounds is None
    with pytest.raises(ValueError, match='change images'):
        fuzz(PLANE, POINTS, POINTS, transforms=[nudge, 'blur'], **QUIET)
    with pytest.raises(ValueError, match='no images'):
        found.plot_faults()


def test_salt_takes_the_bounds_of_the_data():
    salt = as_mutation(Salt(1.0), (-3, 5))
    assert salt.change(torch.zeros(1, 2, 2), torch.zeros(8)).unique().tolist() == [5.0]


def test_transforms_that_break(caplog):
    bad = {
        'nan': lambda x, n: x * float('nan'),
        'inf': lambda x, n: x + math.inf,
        'fine': lambda x, n: x + 0.1 * n[0],
    }
    found = hunt(budget=40, transforms=bad)
    assert {*found.dataset['transform'].values} <= {'fine', ''} and 'NaN or infinity' in caplog.text
    caplog.clear()
    found = hunt(budget=20, transforms={'nan': bad['nan']})
    assert not len(found.faults) and 'beyond the limits' in caplog.text
    assert found.summary()['mutants'] == 0 and len(found.table()) == 1
    for wrong in (lambda x, n: x[0], lambda x, n: x.long(), lambda x, n: None):
        with pytest.raises(ValueError, match='keep the form'):
            hunt(budget=20, transforms={'wrong': wrong})


def test_nothing_changes_means_no_mutants():
    found = hunt(budget=20, transforms={'none': lambda x, n: x})
    assert (found.dataset['transform'].values == '').all() and (found.dataset['predicted'].values == -1).all()
    with pytest.raises(ValueError, match='no fault was kept'):
        found.plot_faults()
    with pytest.raises(ValueError, match='no such mutant'):
        found.suite()


def test_moves_alone_never_become_parents():
    found = hunt(budget=60, transforms=['shift', 'rotation'], parents='all')
    assert not found.dataset['queued'].values.any() and (found.dataset['depth'].values == 1).all()


WRONG = [(7, 'numbers'), ('flip', 'there are'), ([], 'one or'), (['blur', 'blur'], 'different'), ([Mutation], 'a transform is'),
         ([Gaussian], 'a transform is')]


@pytest.mark.parametrize('wrong, words', WRONG)
def test_transforms_that_are_none(wrong, words):
    with pytest.raises((TypeError, KeyError, ValueError), match=words):
        hunt(transforms=wrong)


# ------------------------------------------------------------------------------------------------------------ bad input
def test_bad_inputs():
    def attempt(model=MODEL, train=TRAIN, seeds=SEEDS, *args, **more):
        return fuzz(model, train, seeds, *args, **QUIET, **more)

    with pytest.raises(ValueError, match='no seeds'):
        attempt(seeds=SEEDS[:0])
    with pytest.raises(ValueError, match='none of the 24 seeds'):
        attempt(seeds=(SEEDS.x, torch.full((24,), 9)))
    with pytest.raises(TypeError, match='x.float'):
        attempt(seeds=((255 * SEEDS.x).byte(), SEEDS.y))
    with pytest.raises(ValueError, match='outside the bounds'):
        attempt(seeds=(255 * SEEDS.x, SEEDS.y))
    with pytest.raises(ValueError, match='NaN'):
        attempt(seeds=(SEEDS.x / 0 * 0, SEEDS.y))
    with pytest.raises(ValueError, match='training data'):
        attempt(train=None)
    with pytest.raises(KeyError, match='did you mean'):
        attempt(criterion='nbc')
    with pytest.raises((TypeError, KeyError)):
        attempt(criterion=['NBC', 'NC'])
    with pytest.raises(ValueError, match='logits='):
        attempt(model=nn.Sequential(nn.Conv2d(1, 2, 3)), criterion='NC', train=None)
    numbers = {'budget': 0, 'generation': 0, 'tries': 0, 'keep': -1, 'alpha': 2, 'beta': -1, 'patience': 0}
    for name, value in (numbers | {'parents': 'x'}).items():
        with pytest.raises(ValueError, match=name):
            attempt(**{name: value})


def test_a_criterion_that_cannot_grow_says_so(caplog):
    class Full(Criterion):
        code = 'Full'

        def update(self, activations):
            self.add({'one': torch.ones(())})

        def combine(self, ours, theirs):
            return ours

        def compute(self):
            return 1.0

    found = hunt(Full(), budget=20)
    assert 'no mutant raised' in caplog.text and not found.dataset['queued'].values.any()

    class Words(Full):
        def compute(self):
            return {'a': 1}

    with pytest.raises(ValueError, match='one number'):
        hunt(Words(), budget=20)


def test_keep_is_a_limit_and_does_not_change_the_campaign(campaign):
    few = hunt(budget=200, keep=3)
    assert few.mutants().equals(campaign.mutants()) and len(few.dataset['kept']) == 3
    assert torch.equal(few.suite().x, campaign.suite().x[:3])
    assert len(hunt(budget=20, keep=0).dataset['kept']) == 0


def test_the_budget_is_rounded_up_and_batches_have_one_size(monkeypatch):
    sizes, real = [], fuzzing._walk

    def walk(model, parts, *args):
        sizes.extend(len(part.x) for part in parts)
        return real(model, parts, *args)

    monkeypatch.setattr(fuzzing, '_walk', walk)
    assert len(hunt(budget=41, transforms={'rare': lambda x, n: x + 0.1 * (n[0] > 0.95)}, tries=1).mutants()) == 60
    assert {*sizes[1:]} == {20}


# -------------------------------------------------------------------------------------------------------------- figures
def test_figures_and_files(campaign, tmp_path):
    assert campaign.plot({'again': campaign})._repr_png_()
    assert fuzz(MODEL, TRAIN, SEEDS, budget=150, alpha=0.4, beta=0.8, **QUIET).plot_faults(3)._repr_png_()
    campaign.save(tmp_path / 'c.safetensors')
    loaded = Result.load(tmp_path / 'c.safetensors')
    assert loaded.table().equals(campaign.table()) and loaded.summary() == pytest.approx(campaign.summary(), nan_ok=True)
    assert 'Campaign' in campaign._repr_html_()


def test_versus_luck_is_the_campaigns_one_by_one(tmp_path):
    how = {'budget': 40, 'generation': 20, 'alpha': 0.4, 'beta': 0.8}
    luck = versus_luck(MODEL, TRAIN, SEEDS, parents=('gain', 'seeds'), repeats=2, seed=3, **how, **QUIET)
    for parents in ('gain', 'seeds'):
        for repeat in (3, 4):
            alone = hunt(budget=40, parents=parents, seed=repeat, alpha=0.4, beta=0.8).dataset
            mine = luck.dataset.sel(parents=parents, repeat=repeat)
            assert mine['faults'].values[-1] == alone['fault'].values.sum()
            assert mine['seeds with a fault'].values[-1] == len({*alone['seed'].values[alone['fault'].values].tolist()})
            np.testing.assert_allclose(mine['coverage'].values[1:], alone['value'].values)
    ends = luck.dataset['faults'].values[:, :, -1]
    assert luck.gap('faults')['value'][0] == pytest.approx((ends[0] - ends[1]).mean())
    assert luck.table()['faults'].tolist() == pytest.approx(ends.mean(1).tolist())
    assert luck.plot()._repr_png_()
    luck.save(tmp_path / 'l.safetensors')
    assert isinstance(Result.load(tmp_path / 'l.safetensors'), VersusLuck)
    with pytest.raises(KeyError, match='there are'):
        luck.gap('bugs')


def test_comparisons_that_there_are_not():
    for wrong in ({'parents': []}, {'parents': ['gain', 'luck']}, {'resume': 'campaign.safetensors'}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            versus_luck(MODEL, TRAIN, SEEDS, **wrong, **QUIET)


def test_no_word_below_a_picture_is_cut():
    names = [*TRANSFORMS, 'RandomErasing', 'upside-down automobile']
    short = [fuzzing._abbreviated(name) for name in names]
    assert short[:7] == ['shift', 'scale', 'rotation', 'shear', 'contrast', 'bright.', 'blur']
    assert short[7:] == ['Random.', 'upside. automo.']
    assert fuzzing._in_short(['blur', 'shift', 'brightness']) == '..., shift, bright.'
