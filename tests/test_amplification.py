"""Gains and Lipschitz constants against literal loops, operator norms against matrices that are written down."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from robustnb.amplification import Amplification, SpectralNorms, decompose, spectral_norms
from robustnb.attacks import FGSM
from robustnb.devices import seeded
from robustnb.guard import Normalized
from robustnb.lsa import compare, layer_sustainability
from robustnb.noises import Gaussian
from robustnb.results import Result


@pytest.fixture(scope='module')
def net():
    with seeded(0):
        return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3),
                             nn.ReLU(), nn.Flatten(), nn.Linear(16, 8), nn.ELU(), nn.Linear(8, 3)).eval()  # fmt: skip


@pytest.fixture(scope='module')
def profile(net):
    generator = torch.Generator().manual_seed(1)
    data = (torch.rand(21, 1, 8, 8, generator=generator), torch.randint(0, 3, (21,), generator=generator))
    return layer_sustainability(net, data, {'noise': Gaussian(0.1), 'attack': FGSM(0.1)}, show_progress=False)


# ------------------------------------------------------------------------------------------------- the split and constants


def test_table_is_that_of_literal_loops(profile):
    damage, data = decompose(profile), profile.dataset
    table = damage.table().set_index(['perturbation', 'layer'])
    assert damage.layers == profile.layers and damage.perturbations == ['noise', 'attack']
    for p, name in enumerate(profile.perturbations):
        before = math.fsum(data['input_change'].values[p].tolist()) / 21
        start = before
        for number, layer in enumerate(profile.layers):
            mean = math.fsum(data['value'].values[number, p].tolist()) / 21
            row = table.loc[name, layer]
            assert row['mean'] == pytest.approx(mean) and row.inherited == pytest.approx(before)
            assert row.created == pytest.approx(mean - before) and row.gain == pytest.approx(mean / before)
            assert row.log_gain == pytest.approx(math.log(mean / before)) and row.low <= row.gain <= row.high
            before = mean
        assert table.loc[name].log_gain.sum() == pytest.approx(math.log(mean / start))


def test_intervals_are_those_of_resampled_ratios_of_means(profile):
    values = decompose(profile).dataset['value'].sel(perturbation='attack').values.astype(float)
    rng, gains = np.random.default_rng(5), []
    for _ in range(4000):
        drawn = values[:, rng.integers(21, size=21)].mean(1)
        gains.append(drawn[1:] / drawn[:-1])
    low, high = np.quantile(gains, [0.025, 0.975], axis=0)
    table = decompose(profile).table().query("perturbation == 'attack'")
    np.testing.assert_allclose(table.low, low, rtol=0.02)
    np.testing.assert_allclose(table.high, high, rtol=0.02)


def test_constants_are_those_of_literal_loops(profile):
    data, table = profile.dataset, decompose(profile).constants(quantile=0.5).set_index(['perturbation', 'layer'])
    for p, name in enumerate(profile.perturbations):
        for number, layer in enumerate(profile.layers):
            ratios, blocks, conditions = [], [], []
            for m in range(21):
                size, start = float(data['size'].values[number, p, m]), float(data['input_size'].values[p, m])
                earlier = float(data['size'].values[number - 1, p, m]) if number else start
                ratios.append(size / start)
                blocks.append(size / earlier)
                conditions.append(float(data['value'].values[number, p, m]) / float(data['input_change'].values[p, m]))
            row = table.loc[name, layer]
            assert row.lipschitz == pytest.approx(max(ratios)) and row['mean'] == pytest.approx(np.mean(ratios))
            assert row['quantile'] == pytest.approx(np.median(ratios)) and row.block == pytest.approx(max(blocks))
            assert row.condition == pytest.approx(np.mean(conditions))


def test_nothing_changed_and_one_sample(net, profile, tmp_path):
    x = torch.rand(5, 1, 8, 8)
    still = decompose(compare(net, x, x))
    table, constants = still.table(), still.constants()
    assert (table.gain == 0).all() and table.log_gain.isna().all() and (table.created == 0).all()
    assert (constants[['lipschitz', 'block', 'condition', 'mean']] == 0).all(axis=None)
    single = decompose(compare(net, x[:1], x[:1] + 0.1)).table()
    assert single.gain.notna().all() and single.low.isna().all()
    still.plot()
    damage = decompose(profile)
    damage.save(tmp_path / 'damage.safetensors')
    again = Result.load(tmp_path / 'damage.safetensors')
    assert isinstance(again, Amplification) and again.table().equals(damage.table()) and 'gain' in again._repr_html_()


def test_undefined_values_are_left_out():
    silent = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU())
    with torch.no_grad():
        for layer in (silent[0], silent[2]):
            nn.init.eye_(layer.weight)
            layer.bias.zero_()
        silent[0].bias.fill_(-1.5)  # silent below 1.5
    x = torch.tensor([[1.0, 1.0], [2.0, 2.0]])
    damage = decompose(compare(silent, x, x + 1))
    assert damage.table().gain.tolist() == pytest.approx(
        [2 / 0.75, 1.0]
    )  # of the second sample over the mean input change
    assert damage.table().low.isna().all() and damage.table().undefined.tolist() == [1, 1]
    damage.plot()


def test_other_measures_are_refused(net):
    x = torch.rand(4, 1, 8, 8)
    for measure in ('cosine_distance', 'linear_cka'):
        with pytest.raises(ValueError, match=f'this result holds {measure}'):
            decompose(compare(net, x, x + 0.1, measure=measure))


def test_figures(net, profile):
    damage = decompose(profile)
    assert damage.plot().axes and damage.plot(spectral_norms(net, torch.rand(1, 1, 8, 8))).axes
    many = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(12)))
    x = torch.rand(5, 4)
    decompose(compare(many, x, {f'p{i}': x + 0.1 * (i + 1) for i in range(5)})).plot()
    assert damage.plot(spectral_norms(nn.Sequential(*net, nn.GELU()), torch.rand(1, 1, 8, 8))).axes
    with pytest.raises(ValueError, match='know no product at 2, 5, 8'):
        damage.plot(spectral_norms(many, x))


# --------------------------------------------------------------------------------------------------------------- the norms


def norm_of_matrix(layer, shape):
    "The largest singular value of the matrix of an affine map, written down column by column."
    with torch.no_grad():
        layer = layer.double()
        pixels = torch.eye(math.prod(shape), dtype=torch.float64).view(-1, *shape)
        matrix = (layer(pixels) - layer(torch.zeros(1, *shape, dtype=torch.float64))).flatten(1)
    return float(torch.linalg.svdvals(matrix)[0])


CONVS = {
    'plain': (lambda: nn.Conv2d(2, 3, 3), (2, 6, 6)),
    'padded': (lambda: nn.Conv2d(2, 3, 3, padding=1), (2, 6, 5)),
    'stride': (lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1), (2, 7, 6)),
    'stride beyond the kernel': (lambda: nn.Conv2d(2, 3, 1, stride=3), (2, 7, 7)),
    'dilation': (lambda: nn.Conv2d(1, 4, 3, dilation=2, padding=2), (1, 7, 7)),
    'groups': (lambda: nn.Conv2d(4, 8, 3, groups=4, padding=1, bias=False), (4, 5, 5)),
    'circular': (lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode='circular'), (2, 5, 5)),
    'reflect': (lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode='reflect'), (2, 5, 5)),
    'transposed': (lambda: nn.ConvTranspose2d(3, 2, 3, stride=2, padding=1, output_padding=1), (3, 4, 4)),
    'one axis': (lambda: nn.Conv1d(2, 3, 3, padding=1), (2, 11)),
    'three axes': (lambda: nn.Conv3d(1, 2, 2), (1, 3, 4, 3)),
    'normed by weight': (lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 3, 3)), (2, 5, 5)),
}


@pytest.mark.parametrize('name', CONVS)
def test_norms_of_convolutions_are_those_of_their_matrices(name):
    make, shape = CONVS[name]
    with seeded(3):
        layer = make().eval()
    table = spectral_norms(nn.Sequential(layer), torch.zeros(1, *shape), steps=2000, tol=1e-7).table()
    exact = norm_of_matrix(layer, shape)
    assert table.norm[0] == pytest.approx(exact, rel=2e-4) and table.method[0] == 'power iteration'
    assert table.norm[0] <= exact * (1 + 1e-5), 'from below'


def batch_norm(kind, channels):
    norm = kind(channels).eval()
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(-2, 1, channels))
        norm.bias.fill_(0.7)
        norm.running_mean.fill_(0.3)
        norm.running_var.copy_(torch.linspace(0.2, 3, channels))
    return norm


def test_norms_of_linear_layers_are_exact():
    with seeded(0):
        net = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 9, bias=False))
    table = spectral_norms(net, torch.zeros(3, 7)).table()
    for norm, layer in zip(table.norm, (net[0], net[2]), strict=True):
        assert norm == pytest.approx(float(torch.linalg.svdvals(layer.weight.detach().double())[0]), rel=1e-12)
    assert table['product'][1] == pytest.approx(table.norm[0] * table.norm[1]) and table.settled.all()
    tokens = spectral_norms(net, torch.zeros(1, 4, 7)).table()
    assert tokens.norm.tolist() == table.norm.tolist(), 'a linear layer does the same to each token'


def test_wide_linear_layers_are_iterated():
    layer = nn.Linear(2049, 2049, bias=False)
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight.diagonal().copy_(torch.linspace(1, 0.1, 2049))
        layer.weight[0, 0] = 2
    table = spectral_norms(nn.Sequential(layer), torch.zeros(1, 2049)).table()
    assert table.method[0] == 'power iteration' and table.norm[0] == pytest.approx(2, rel=1e-4)


def test_batch_norm_behind_a_weight_layer_is_part_of_its_map():
    with seeded(1):
        conv, fc = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(4, 6)
    for layer, norm, shape in (
        (conv, batch_norm(nn.BatchNorm2d, 4), (2, 5, 5)),
        (fc, batch_norm(nn.BatchNorm1d, 6), (4,)),
    ):
        net = nn.Sequential(layer, norm, nn.ReLU())
        found = spectral_norms(net, torch.zeros(1, *shape), steps=2000, tol=1e-7)
        table, scale = found.table(), float((norm.weight.detach().abs() / (norm.running_var + norm.eps).sqrt()).max())
        assert len(table) == 1 and table.kind[0] == f'{type(layer).__name__} + {type(norm).__name__}'
        exact = norm_of_matrix(net[:2], shape)
        net.float()
        alone = norm_of_matrix(layer, shape)
        layer.float()
        assert table.norm[0] == pytest.approx(exact, rel=2e-4) and exact < alone * scale
        assert set(found.products()) == {'1', '2'}, 'no product is known between the two'


class Inside(nn.Module):
    "A batch norm whose input is the very tensor that the convolution returned, but written into on the way."

    def __init__(self, between):
        super().__init__()
        self.conv, self.norm, self.between = nn.Conv2d(1, 2, 3), batch_norm(nn.BatchNorm2d, 2), between

    def forward(self, x):
        out = self.conv(x)
        return self.norm(self.between(out))


@pytest.mark.parametrize('between', [lambda t: t.add_(t * 2), lambda t: t + 0, torch.relu_])
def test_batch_norm_elsewhere_has_a_line_of_its_own(between):
    table = spectral_norms(Inside(between), torch.rand(1, 1, 5, 5)).table()
    norm = Inside(between).norm
    scale = float((norm.weight.detach().abs() / (norm.running_var + norm.eps).sqrt()).max())
    assert table.kind.tolist() == ['Conv2d', 'BatchNorm2d'] and table.norm[1] == pytest.approx(scale)
    assert table.method[1] == 'largest scale'


def test_what_has_no_norm_is_said_to_have_none():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, track_running_stats=False), nn.ReLU(), nn.Conv2d(2, 2, 3))
    found = spectral_norms(net, torch.rand(1, 1, 6, 6))
    assert found.table().method.tolist() == ['unknown', 'power iteration']
    assert found.table().norm.isna().tolist() == [True, False] and np.isnan(found.products()['2'])


def test_normalisation_counts_and_wrappers_do_not_matter(net):
    x = torch.rand(2, 1, 8, 8)
    plain, wrapped = spectral_norms(net, x), spectral_norms(Normalized(net, 0.5, [0.25]), x)
    assert wrapped.settings['normalisation'] == 4
    for name, product in plain.products().items():
        assert wrapped.products()[name] == pytest.approx(4 * product)


def test_reused_layers_have_a_row_for_each_size():
    conv = nn.Conv2d(1, 1, 3)
    net = nn.Sequential(conv, nn.ReLU(), conv)
    table = spectral_norms(net, torch.rand(1, 1, 7, 7), steps=2000, tol=1e-7).table()
    assert table.layer.tolist() == ['0#0', '0#1']
    assert table.norm[0] == pytest.approx(norm_of_matrix(conv, (1, 7, 7)), rel=2e-4)
    assert table.norm[1] == pytest.approx(norm_of_matrix(conv, (1, 5, 5)), rel=2e-4)


def test_it_is_deterministic_in_any_precision_and_says_when_it_has_not_settled(net):
    x = torch.rand(1, 1, 8, 8)
    first, second = spectral_norms(net, x).table(), spectral_norms(net, 1 - x).table()
    assert first.equals(second), 'only the sizes matter'
    half = spectral_norms(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()).half(), x.half()).table()
    assert np.isfinite(half.norm).all()
    short = spectral_norms(net, x, steps=3).table()
    assert short.steps[0] == 3 and not short.settled[0] and short.norm[0] < first.norm[0]
    with torch.inference_mode():
        assert spectral_norms(net, torch.rand(1, 1, 8, 8)).table().equals(first)


def test_zero_weights():
    conv = nn.Conv2d(1, 2, 3)
    nn.init.zeros_(conv.weight)
    table = spectral_norms(nn.Sequential(conv), torch.rand(1, 1, 5, 5)).table()
    assert table.norm[0] == 0 and table.settled[0]


class Echo(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


OTHERS = {  # module, shape of one input, whether it may stretch a change
    'relu': (nn.ReLU(), (20,), False),
    'celu': (nn.CELU(3.0), (20,), False),
    'softmax': (nn.Softmax(1), (20,), False),
    'softplus': (nn.Softplus(beta=5), (20,), False),
    'log of sigmoid': (nn.LogSigmoid(), (20,), False),
    'tanh and the rest': (nn.Tanhshrink(), (20,), False),
    'shuffled pixels': (nn.PixelShuffle(2), (4, 3, 3), False),
    'padded with zeros': (nn.ZeroPad2d(2), (1, 3, 3), False),
    'dropout': (nn.Dropout(), (20,), False),
    'elu': (nn.ELU(1.0), (20,), False),
    'steep elu': (nn.ELU(2.0), (20,), True),
    'selu': (nn.SELU(), (20,), True),
    'gelu': (nn.GELU(), (200,), True),
    'silu': (nn.SiLU(), (200,), True),
    'mish': (nn.Mish(), (200,), True),
    'hardswish': (nn.Hardswish(), (200,), True),
    'glu': (nn.GLU(1), (20,), True),
    'log of softmax': (nn.LogSoftmax(1), (20,), True),
    'leaky': (nn.LeakyReLU(0.2), (20,), False),
    'steep leaky': (nn.LeakyReLU(1.5), (20,), True),
    'learnt slope': (nn.PReLU(init=0.9), (20,), False),
    'steep learnt slope': (nn.PReLU(init=-1.2), (20,), True),
    'maximum': (nn.MaxPool2d(2), (1, 6, 6), False),
    'maximum with a border': (nn.MaxPool2d(3, 3, padding=1, ceil_mode=True), (1, 7, 7), False),
    'overlapping maximum': (nn.MaxPool2d(3, 2), (1, 7, 7), True),
    'overlapping in one axis': (nn.MaxPool2d((2, 3), 2), (1, 7, 7), True),
    'dilated maximum': (nn.MaxPool2d(2, 2, dilation=2), (1, 7, 7), True),
    'maximum in one axis': (nn.MaxPool1d(3, 1), (1, 9), True),
    'greatest of all': (nn.AdaptiveMaxPool2d(1), (2, 5, 5), False),
    'adaptive maximum': (nn.AdaptiveMaxPool2d(3), (1, 5, 5), True),
    'mean': (nn.AvgPool2d(3, 1, padding=1), (1, 6, 6), False),
    'mean of what there is': (nn.AvgPool2d(3, 1, padding=1, count_include_pad=False), (1, 6, 6), True),
    'means apart': (nn.AvgPool2d(2, 2, ceil_mode=True), (1, 5, 5), False),
    'sum': (nn.AvgPool2d(2, divisor_override=1), (1, 4, 4), True),
    'mean of all': (nn.AdaptiveAvgPool2d(1), (2, 4, 4), False),
    'mean of copies': (nn.AdaptiveAvgPool2d(4), (1, 2, 2), True),
    'reflected border': (nn.ReflectionPad2d(1), (1, 4, 4), True),
    'unfolded': (nn.Unfold(2), (1, 4, 4), True),
    'layer norm': (nn.LayerNorm(20), (20,), True),
    'a forward of its own': (Echo(nn.ReLU()), (20,), True),
}


@pytest.mark.parametrize('name', OTHERS)
def test_what_stretches_is_doubted_and_what_is_trusted_does_not_stretch(name):
    module, shape, stretches = OTHERS[name]
    first = {1: nn.Linear, 2: partial(nn.Conv1d, kernel_size=1), 3: partial(nn.Conv2d, kernel_size=1)}[len(shape)]
    doubts = spectral_norms(nn.Sequential(first(shape[0], shape[0]), module), torch.zeros(1, *shape)).settings['doubts']
    assert doubts == ([type(module).__name__] if stretches else [])
    scale = 0.1 if name == 'layer norm' else 2
    points = scale * torch.randn(10, 1, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    module = module.eval().double()
    slopes = [torch.autograd.functional.jacobian(module, point).reshape(-1, math.prod(shape)) for point in points]
    steepest = max(float(torch.linalg.matrix_norm(slope, 2)) for slope in slopes)
    module.float()
    assert steepest > 1.001 if stretches else steepest <= 1 + 1e-9


def test_weights_without_a_norm_are_doubted(net):
    x = torch.rand(1, 1, 8, 8)
    assert spectral_norms(net, x).settings['doubts'] == []
    assert spectral_norms(Normalized(net, 0.5, 0.5), x).settings['doubts'] == []
    assert spectral_norms(net, x, where=nn.Conv2d).settings['doubts'] == ['Linear']


def test_a_layer_that_runs_twice_may_be_asked_for_once():
    conv = nn.Conv2d(1, 1, 3)
    net = nn.Sequential(conv, nn.ReLU(), conv)
    both = spectral_norms(net, torch.rand(1, 1, 7, 7)).table().norm
    assert spectral_norms(net, torch.rand(1, 1, 7, 7), where='0#1').table().norm.tolist() == [both[1]] != [both[0]]


def test_growth_is_over_ten_steps_also_at_the_end(net):
    x = torch.rand(1, 1, 8, 8)
    first, last = (spectral_norms(net, x, steps=steps, tol=0).table() for steps in (2, 12))
    assert last.growth[0] == pytest.approx(1 - first.norm[0] / last.norm[0], rel=1e-6)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.float64])
def test_pruned_weights_are_those_that_count(dtype):
    with seeded(0):
        conv = nn.Conv2d(1, 2, 3)
    prune.l1_unstructured(conv, 'weight', 0.5)
    found = (
        spectral_norms(nn.Sequential(conv, nn.ReLU()).to(dtype), torch.rand(1, 1, 6, 6, dtype=dtype)).table().norm[0]
    )
    plain = nn.Conv2d(1, 2, 3)
    with torch.no_grad():
        plain.weight.copy_(conv.weight_orig * conv.weight_mask)
    assert found == pytest.approx(norm_of_matrix(plain, (1, 6, 6)), rel=2e-4)


def test_bad_choices(net):
    x = torch.rand(1, 1, 8, 8)
    for settings, words in (({'steps': 0}, 'at least one step'), ({'where': 'nothing'}, 'chooses no layer')):
        with pytest.raises(ValueError, match=words):
            spectral_norms(net, x, **settings)

    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.act = nn.Linear(1, 1), nn.ReLU()

        def forward(self, x):
            return self.act(x)

    with pytest.raises(ValueError, match='none of them ran'):
        spectral_norms(Idle(), x)
    with pytest.raises(TypeError, match=r'such as data\.x of a DataSet; got list'):
        spectral_norms(net, [x])


def test_only_a_profile_can_be_decomposed(net):
    with pytest.raises(TypeError, match=r'got Tensor.*surface\.at\(eps\)'):
        decompose(torch.rand(3))


# ------------------------------------------------------------------------------------------------------- seen and at most


@pytest.mark.parametrize('seed', range(3))
def test_what_is_seen_stays_below_the_product(seed):
    with seeded(seed):
        net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), batch_norm(nn.BatchNorm2d, 4), nn.ReLU(inplace=True), nn.MaxPool2d(2),
                            nn.Conv2d(4, 3, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(3, 4)).eval()  # fmt: skip
        x = torch.rand(40, 1, 8, 8)
        changes = {'small': x + 0.001 * torch.randn(x.shape), 'large': torch.rand(x.shape) * 3}
    constants = decompose(compare(net, x, changes)).constants()
    products = spectral_norms(net, x, steps=2000, tol=1e-7).products()
    assert (constants.lipschitz <= constants.layer.map(products) * (1 + 1e-4)).all()


def test_a_change_along_aligned_top_directions_reaches_the_product():
    with seeded(0):
        basis = torch.linalg.qr(torch.randn(6, 6))[0]
        x = torch.randn(9, 6)
    net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6))
    with torch.no_grad():
        for layer, top in zip(net, (3.0, 0.5, 2.0), strict=True):
            layer.weight.copy_(basis @ torch.tensor([top, *[0.3] * 5]).diag() @ basis.T)
    seen = decompose(compare(net, x, x + 0.3 * basis[:, 0], where='weights')).constants().lipschitz
    np.testing.assert_allclose(seen, [3, 1.5, 3], rtol=1e-4)
    np.testing.assert_allclose(list(spectral_norms(net, x).products().values()), [3, 1.5, 3], rtol=1e-5)


def test_round_trip(net, tmp_path):
    found = spectral_norms(net, torch.rand(1, 1, 8, 8))
    found.save(tmp_path / 'norms.safetensors')
    again = Result.load(tmp_path / 'norms.safetensors')
    assert (
        isinstance(again, SpectralNorms)
        and again.table().equals(found.table())
        and again.products() == found.products()
    )
    assert 'power iteration' in again._repr_html_()
