"""Inputs and models as people have them: what is wrong is refused with a reason, what is only unusual works.

Each row goes through every public door that takes a model and data. The doors that only take data have their rows in
test_data.py.
"""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from robustnb.attacks import FGSM
from robustnb.coverage import KMNC, NC, TKNC, TKNP, Coverage, assess
from robustnb.devices import seeded
from robustnb.evaluation import accuracy, evaluate
from robustnb.guard import Normalized, _say_once
from robustnb.lsa import layer_sustainability
from robustnb.measures import MEASURES
from robustnb.noises import Gaussian, matched
from robustnb.suites import growth, prioritize, suite_difference
from robustnb.surprise import DSC, MDSC, surprise_adequacy
from robustnb.uncovered import explore
from robustnb.vulnerable import most_vulnerable

PERTURBATIONS = [Gaussian(0.1), matched(Gaussian(), FGSM(0.05)), FGSM(0.05)]


def measure_accuracy(model, data, **kw):
    return accuracy(model, data, **kw)


def measure_robustness(model, data, **kw):
    return evaluate(model, data, PERTURBATIONS, show_progress=False, **kw).table()['accuracy'].to_numpy()


def measure_layers(model, data, **kw):
    result = layer_sustainability(model, data, PERTURBATIONS, show_progress=False, **kw)
    return result.table()['mean'].to_numpy()


def measure_coverage(model, data, **kw):
    criteria = ['NC', 'KMNC', 'NBC', 'SNAC', 'TKNC', 'TKNP', 'CC', 'NLC', 'MDSC']
    return assess(model, learned(), data, criteria, show_progress=False, **kw).table()['value'].to_numpy()


def measure_surprise(model, data, **kw):
    scores = surprise_adequacy(model, images(48), data, show_progress=False, **kw).dataset['score'].to_numpy()
    return scores.ravel()


def measure_growth(model, data, **kw):
    result = growth(model, learned(), data, ['NC', 'KMNC', 'NLC'], orders=2, show_progress=False, **kw)
    return result.table()['mean'].to_numpy()


def measure_priorities(model, data, **kw):
    result = prioritize(model, images(48), data, ['CTM', 'DSC', 'gini'], NC(), show_progress=False, **kw)
    return result.dataset['score'].to_numpy().ravel()


DOORS = {
    'accuracy': measure_accuracy,
    'evaluate': measure_robustness,
    'layer_sustainability': measure_layers,
    'assess': measure_coverage,
    'surprise_adequacy': measure_surprise,
    'growth': measure_growth,
    'prioritize': measure_priorities,
}
WITHOUT_LABELS = 'assess', 'surprise_adequacy', 'growth', 'prioritize'
WITHOUT_ATTACK = 'accuracy', *WITHOUT_LABELS
every_door = pytest.mark.parametrize('door', DOORS)


def make_net() -> nn.Sequential:
    "Convolution, batch norm, dropout and an in-place ReLU, with statistics that are not the initial ones."
    with seeded(0):
        net = nn.Sequential(
            nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Flatten(), nn.Linear(216, 3)
        )
        net.train()
        net(torch.rand(32, 1, 8, 8))
    return net.eval()


def images(n: int = 24, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 1, 8, 8, generator=generator), torch.randint(0, 3, (n,), generator=generator)


def learned() -> tuple[torch.Tensor, torch.Tensor]:
    "Images to learn ranges from. Others than those: on the border of a range the last bit of a sum decides."
    return images(48, seed=1)


def spoilt(value: float) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = images()
    x[3, 0, 2, 2] = value
    return x, y


# name -> (data, error, words, doors that let it through because they have no reason to refuse it)
REFUSED = {
    'a NaN pixel': (spoilt(float('nan')), ValueError, 'NaN or infinity in (sample 3|1 of the samples 0 to 23: 3)', ()),
    'an infinite pixel': (spoilt(float('inf')), ValueError, 'NaN or infinity in (sample 3|1 of the samples 0 to 23: 3)', ()),
    'pixels outside [0, 1]': (((images()[0] - 0.5) / 0.25, images()[1]), ValueError, 'Normalized', WITHOUT_ATTACK),
    'pixels from 0 to 255': ((images()[0] * 255, images()[1]), ValueError, r'outside the bounds.*x / 255', WITHOUT_ATTACK),
    'uint8 images': (((images()[0] * 255).byte(), images()[1]), TypeError, r'scale them to \[0, 1\]', ()),
    'no samples': (images(0), ValueError, 'empty', ()),
    'fractional labels': ((images()[0], images()[1].float()), TypeError, 'integer class indices', WITHOUT_LABELS),
    'one-hot labels': ((images()[0], torch.eye(3)[images()[1]]), TypeError, 'one-hot', WITHOUT_LABELS),
    'one-hot integers': (
        (images()[0], torch.eye(3).long()[images()[1]]), ValueError, 'one class index', WITHOUT_LABELS
    ),
    'labels from 1': ((images()[0], images()[1] + 1), ValueError, 'labels run from', WITHOUT_LABELS),
    'a negative label': ((images()[0], images()[1] - 1), ValueError, 'labels run from', WITHOUT_LABELS),
    'too few labels': ((images()[0], images()[1][:-1]), ValueError, '24 samples and 23 labels|24 samples, 23 labels', ()),
    'a single number': ((images()[0][0, 0, 0, 0], images()[1][0]), TypeError, 'a row for each sample', ()),
    'a single image': ((images()[0][0], images()[1][0]), TypeError, 'a row for each sample', ()),
    'an iterable of samples': ([(images()[0][0, 0, 0, 0], images()[1][0])], TypeError, 'batch', ()),
    'dictionaries': ([{'image': images()[0], 'label': images()[1]}], TypeError, 'pick them out', ()),
    'words': (['a', 'b'], TypeError, 'expected batches', ()),
}


@every_door
@pytest.mark.parametrize('row', REFUSED)
def test_what_is_wrong_is_refused_with_a_reason(row, door):
    data, error, words, passing = REFUSED[row]
    net = make_net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    if door in passing:
        DOORS[door](net, data)  # without an attack there are no bounds to keep, and coverage has no use for labels
    else:
        with pytest.raises(error, match=words):
            DOORS[door](net, data)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert not any(m.training for m in net.modules())


def test_every_refusal_comes_before_the_first_result():
    "A loader that turns bad in its second batch stops there, and not with an average over what it has seen."
    (x, y), (bad, _) = images(), spoilt(float('nan'))
    for door in DOORS.values():
        with pytest.raises(ValueError, match='sample 3|samples 24 to 47: 27'):
            door(make_net(), [(x, y), (bad, y)])


class Tuple(nn.Module):
    "Returns its logits beside something else."

    def __init__(self, net, kind):
        super().__init__()
        self.net, self.kind = net, kind

    def forward(self, x):
        logits = self.net(x)
        return {'tuple': (logits, x), 'dict': {'hidden': x, 'logits': logits}}[self.kind]


def frozen(net):
    return net.requires_grad_(False)


def in_training_mode(net):
    return net.train()


def half_frozen(net):
    net.train()
    net[1].eval()
    return net


UNUSUAL_MODELS = {
    'training mode': in_training_mode,
    'batch norm frozen in training mode': half_frozen,
    'frozen parameters': frozen,
    'inside Sequential with a normalisation': lambda net: nn.Sequential(nn.Identity(), net),
    'inside Normalized': lambda net: Normalized(net, 0.0, 1.0),
    'inside DataParallel': nn.DataParallel,
    'compiled': lambda net: torch.compile(net, backend='eager'),
    'returns a tuple': lambda net: Tuple(net, 'tuple'),
    'returns a dictionary': lambda net: Tuple(net, 'dict'),
}


@every_door
@pytest.mark.parametrize('row', UNUSUAL_MODELS)
def test_unusual_models_give_the_same_numbers(row, door):
    expected = DOORS[door](make_net(), images())
    model = UNUSUAL_MODELS[row](make_net())
    modes = [m.training for m in model.modules()]
    np.testing.assert_allclose(DOORS[door](model, images()), expected, rtol=1e-4, atol=1e-6)
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())


def strided(x):
    return torch.stack([x, x], dim=-1)[..., 0]


UNUSUAL_DATA = {
    'float64 images': lambda x, y: (x.double(), y),
    'int32 labels': lambda x, y: (x, y.int()),
    'uint8 labels': lambda x, y: (x, y.byte()),
    'NumPy arrays': lambda x, y: (x.numpy(), y.numpy()),
    'images with a gradient': lambda x, y: (x.clone().requires_grad_(), y),
    'images that are not contiguous': lambda x, y: (strided(x), y),
    'a data set': lambda x, y: TensorDataset(x, y),
    'a loader with a short last batch': lambda x, y: DataLoader(TensorDataset(x, y), batch_size=7),
    'a loader with workers': lambda x, y: DataLoader(TensorDataset(x, y), batch_size=9, num_workers=1),
    'a list of batches': lambda x, y: [(x[:5], y[:5]), (x[5:], y[5:])],
}


@every_door
@pytest.mark.parametrize('row', UNUSUAL_DATA)
def test_unusual_data_give_the_same_numbers(row, door):
    expected = DOORS[door](make_net(), images())
    data = UNUSUAL_DATA[row](*images())
    np.testing.assert_allclose(DOORS[door](make_net(), data), expected, rtol=2e-3, atol=1e-5)


@every_door
@pytest.mark.parametrize('caller', [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_it_does_not_matter_who_calls(caller, door):
    expected, net = DOORS[door](make_net(), images()), make_net()
    with caller():
        found = DOORS[door](net, images())
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@every_door
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_models_in_other_precisions_come_close(dtype, door):
    expected = DOORS[door](make_net(), images())
    tolerance = {torch.float16: 0.02, torch.bfloat16: 0.15, torch.float64: 1e-4}[dtype]
    found = DOORS[door](make_net().to(dtype), images())
    np.testing.assert_allclose(found, expected, atol=tolerance)


@every_door
def test_one_by_one_is_the_same_as_all_at_once(door):
    together, alone = (DOORS[door](make_net(), images(), batch_size=n) for n in (24, 1))
    np.testing.assert_allclose(together, alone, rtol=1e-4)


@pytest.mark.parametrize('door', [door for door in DOORS if door not in ('surprise_adequacy', 'prioritize')])
def test_silent_layers_and_batch_norm_with_one_sample(door):
    net = make_net()
    with torch.no_grad():
        net[1].weight.zero_()
        net[1].bias.fill_(-1)  # nothing passes the ReLU: 0/0 at this layer
    value = DOORS[door](net, images(1))
    assert np.isfinite(value).all()


@pytest.fixture
def notes(caplog):
    "What was said, each thing once."
    _say_once.cache_clear()
    caplog.set_level('WARNING')
    return caplog


@pytest.mark.parametrize('door', ['evaluate', 'layer_sustainability'])
def test_an_attack_that_leaves_the_range_is_told_once(door, notes):
    def loud(model, x, y):
        return x + 0.5

    analyse = {'evaluate': evaluate, 'layer_sustainability': layer_sustainability}[door]
    analyse(make_net(), images(), loud, batch_size=5, show_progress=False)
    assert [r.message for r in notes.records if 'loud leaves the range' in r.message] and len(notes.records) == 1
    notes.clear()
    analyse(make_net(), (images()[0] * 4 - 2, images()[1]), loud, show_progress=False)
    assert not notes.records, 'inputs that have no such range cannot leave it'


def test_normalised_twice_is_told(notes):
    x, y = images()
    model = Normalized(make_net(), 0.5, 0.25)
    accuracy(model, (x, y))
    assert not notes.records
    accuracy(model, ((x - 0.5) / 0.25, y), batch_size=3)
    assert len(notes.records) == 1 and 'normalised twice' in notes.text, 'once, and not once for each batch'


def test_a_choice_among_several_outputs_is_told(notes):
    accuracy(Tuple(make_net(), 'tuple'), images(), batch_size=5)
    assert len(notes.records) == 1 and 'taken as its logits' in notes.text
    accuracy(Tuple(make_net(), 'dict'), images()), accuracy(Tuple(make_net(), 'tuple'), images(), logits=0)
    assert len(notes.records) == 1, 'where the name says it, or the caller does, nothing is to tell'


def test_a_strength_beyond_the_range_is_told(notes):
    assert FGSM(0.5) == FGSM(0.5) and not notes.records
    FGSM(8.0), FGSM(8.0)
    assert len(notes.records) == 1 and '8 / 255' in notes.text
    FGSM(8.0, bounds=None), FGSM(8.0, bounds=(0, 255))
    assert len(notes.records) == 1


def test_grey_images_for_three_means():
    with pytest.raises(ValueError, match='3 channels that mean and std have'):
        accuracy(Normalized(make_net(), (0.5, 0.5, 0.5), 0.2), images())
    with pytest.raises(ValueError, match='3 channels that mean and std have'):
        accuracy(Normalized(make_net(), (0.5, 0.5, 0.5), 0.2), (torch.rand(4, 8, 8, 3), images(4)[1]))


def own(function, name='mine'):
    function.__name__ = name
    return function


BAD_ATTACKS = {
    'a list': (lambda m, x, y: list(x), 'got list'),
    'another shape': (lambda m, x, y: x[:, :, :4], r'got \(24, 1, 4, 8\)'),
    'NaN': (lambda m, x, y: x * float('nan'), 'NaN or infinity in sample'),
    'bytes': (lambda m, x, y: (x * 255).byte(), 'uint8'),
    'nothing': (lambda m, x, y: None, 'got NoneType'),
}


@pytest.mark.parametrize('row', BAD_ATTACKS)
def test_a_bad_attack_is_named(row):
    function, words = BAD_ATTACKS[row]
    for door in (evaluate, layer_sustainability):
        with pytest.raises((ValueError, TypeError), match=f'mine .*{words}'):
            door(make_net(), images(), own(function), show_progress=False)


def subtract_in_place(clean, pert):
    pert -= clean
    return pert.flatten(1).norm(dim=1)


class SubtractInPlace(MEASURES['energy_relative_error'].fn):
    "The same as an accumulator."

    def update(self, clean, pert):
        pert -= clean


BAD_MEASURES = {
    'a list': (lambda c, p: [1.0] * len(c), 'got list'),
    'one number': (lambda c, p: (c - p).norm(), r'got \(\)'),
    'an array': (lambda c, p: (c - p).flatten(1).norm(dim=1).numpy(), 'got ndarray'),
    'in place': (subtract_in_place, 'in place'),
    'a stream in place': (SubtractInPlace, 'in place'),
}


@pytest.mark.parametrize('row', BAD_MEASURES)
def test_a_bad_measure_is_named(row):
    function, words = BAD_MEASURES[row]
    with pytest.raises(ValueError, match=f'mine .*{words}'):
        layer_sustainability(make_net(), images(), FGSM(0.1), measure=own(function), show_progress=False)


def test_a_measure_that_is_never_defined_says_so():
    def undefined(clean, pert):
        return torch.full((len(clean),), float('nan'))

    result = layer_sustainability(make_net(), images(), FGSM(0.1), measure=undefined, show_progress=False)
    assert not most_vulnerable(result).layers and 'undefined in every layer' in most_vulnerable(result).reason
    result.plot()
    with pytest.raises(TypeError, match="has no setting 'n'; it has k"):
        most_vulnerable(result, n=2)


@pytest.mark.parametrize('make', [lambda: FGSM('0.1'), lambda: Gaussian(None), lambda: Gaussian([0.1])])
def test_a_strength_is_a_number(make):
    with pytest.raises(TypeError, match='must be a number'):
        make()


COVERAGE_DOORS = {
    'assess': lambda model, data, criteria: assess(model, data, images(), criteria, show_progress=False),
    'Coverage': lambda model, data, criteria: Coverage(model, criteria, show_progress=False).learn(data).update(images()),
    'growth': lambda model, data, criteria: growth(model, data, images(), criteria, show_progress=False),
    'suite_difference': lambda model, data, criteria: suite_difference(
        model, data, {'a': images(), 'b': images(5)}, criteria, show_progress=False),
    'prioritize': lambda model, data, criteria: prioritize(model, data, images(), 'CTM', criteria[0], show_progress=False),
    'explore': lambda model, data, criteria: explore(model, data, images(), criteria, show_progress=False),
}  # fmt: skip
every_coverage_door = pytest.mark.parametrize('door', COVERAGE_DOORS)


@every_coverage_door
@pytest.mark.parametrize('row', ['a NaN pixel', 'uint8 images', 'no samples', 'a single image', 'dictionaries'])
def test_training_data_are_looked_at_like_a_suite(row, door):
    data, error, words, _ = REFUSED[row]
    with pytest.raises(error, match=words):
        COVERAGE_DOORS[door](make_net(), data, ['KMNC'])


@every_coverage_door
@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_a_model_that_says_nan_is_named(value, door):
    net = make_net()
    with torch.no_grad():
        net[0].bias[2] = value
    with pytest.raises(ValueError, match='NaN or infinity'):
        COVERAGE_DOORS[door](net, images(), ['KMNC'])


@every_coverage_door
def test_what_is_no_criterion_is_named(door):
    with pytest.raises(KeyError, match="no criterion 'KNC'; .*there are NC, KMNC"):
        COVERAGE_DOORS[door](make_net(), images(), ['KNC'])


@pytest.mark.parametrize('door', [assess, growth, explore], ids=lambda door: door.__name__)
def test_layers_that_are_not_there(door):
    with pytest.raises((ValueError, KeyError), match='conv9'):
        door(make_net(), images(), images(), ['NC'], where='conv9', show_progress=False)


def covered(net, criteria, data, train=None) -> dict[str, float]:
    coverage = Coverage(net, criteria, show_progress=False).learn(images(48) if train is None else train)
    return coverage.update(data).compute()


def test_more_active_units_than_there_are():
    assert covered(make_net(), [TKNC(1000), TKNP(1000)], images()) == {'TKNC': 1.0, 'TKNP': 1.0}


def test_a_constant_unit_has_no_sections_but_is_counted():
    net = make_net()
    with torch.no_grad():
        net[0].weight[2] = 0
    coverage = Coverage(net, KMNC(10), show_progress=False).learn(images()).update(images())
    hits = coverage.criteria['KMNC'].covered()['0']
    assert not hits[2].any() and hits[[0, 1, 3, 4, 5]].any() and coverage.criteria['KMNC'].counts()[1] == 90


def test_a_class_that_the_training_data_never_show(caplog):
    x, y = images()
    found = covered(make_net(), [DSC(by='label'), MDSC(by='label')], (x, torch.full_like(y, 2)), (x[y < 2], y[y < 2]))
    assert found == {'DSC': 0.0, 'MDSC': 0.0} and 'class 2' in caplog.text


def test_one_logit_is_two_classes():
    net = make_net()
    net[5] = nn.Linear(216, 1)
    with torch.no_grad():
        net[5].bias -= net(images()[0]).median()  # both classes are predicted
    found = covered(net, ['NC', 'KMNC', 'TKNC', 'NLC', 'DSC', 'MDSC'], images())
    assert all(np.isfinite(value) for value in found.values()) and found['DSC'] > 0


def test_maps_are_not_logits():
    net = make_net()[:3]
    assert covered(net, ['NC', 'KMNC', 'NLC'], images())['NC'] > 0, 'what needs no class works'
    with pytest.raises(ValueError, match="by='label', or by=None"):
        covered(net, 'MDSC', images())
