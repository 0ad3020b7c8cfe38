"""Models: sizes by hand, seeded builds, weights that survive any wrapper, and files that are refused with advice."""
import argparse
import copy
import importlib.util
import io
import multiprocessing
import pickle
import sys
import urllib.error
import warnings
import zipfile
from collections import OrderedDict
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from robustnb import models
from robustnb.data import batches
from robustnb.devices import pick_device, seeded
from robustnb.guard import Normalized
from robustnb.models import MODELS, BasicBlock, WideBlock, build, describe, digits_cnn, lenet5, lsa_model_a, lsa_model_b
from robustnb.probes import Probe, select

SHAPES = {
    'digits_cnn': (1, 8, 8), 'lsa_model_a': (2,), 'lsa_model_b': (1, 28, 28), 'lenet5': (1, 28, 28),
    'wisdom_lenet5': (1, 32, 32), 'lenet5_caffe': (1, 28, 28), 'vgg16': (3, 32, 32), 'vgg19': (3, 32, 32),
    'resnet18': (3, 32, 32), 'wide_resnet28_10': (3, 32, 32), 'shufflenet': (3, 32, 32), 'squeezenet': (3, 32, 32),
    'torchvision': (3, 64, 64),
}  # fmt: skip
SMALL = ['digits_cnn', 'lsa_model_a', 'lsa_model_b', 'lenet5', 'wisdom_lenet5', 'lenet5_caffe']
NARROW = {  # the large ones, in a size that a test can afford
    'vgg16': partial(models.vgg16, width=1 / 16),
    'vgg19': partial(models.vgg19, width=1 / 16),
    'resnet18': partial(models.resnet18, width=1 / 16),
    'wide_resnet28_10': partial(models.wide_resnet, 10, 1),
    'shufflenet': models.shufflenet,
    'squeezenet': models.squeezenet,
    'torchvision': partial(models.torchvision_model, 'mobilenet_v3_small', 10),
}


def dense(inputs, outputs):
    return outputs * (inputs + 1)


def conv(inputs, outputs, kernel):
    return outputs * (inputs * kernel**2 + 1)


def norm(channels):
    return 2 * channels


VGG = [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
PARAMETERS = {
    'digits_cnn': conv(1, 16, 3) + conv(16, 32, 3) + dense(32 * 2 * 2, 100) + dense(100, 10),
    'lsa_model_a': dense(2, 100) + 2 * dense(100, 100) + dense(100, 1),
    'lsa_model_b': conv(1, 16, 5) + conv(16, 32, 5) + conv(32, 64, 5) + dense(64 * 3 * 3, 100) + dense(100, 10),
    'lenet5': conv(1, 6, 5) + conv(6, 16, 5) + dense(16 * 5 * 5, 120) + dense(120, 84) + dense(84, 10),
    'wisdom_lenet5': conv(1, 6, 5) + conv(6, 16, 5) + dense(16 * 5 * 5, 120) + dense(120, 84) + dense(84, 10),
    'lenet5_caffe': conv(1, 20, 5) + conv(20, 50, 5) + dense(50 * 4 * 4, 500) + dense(500, 10),
    'vgg16': sum(conv(i, o, 3) + norm(o) for i, o in zip([3, *VGG], VGG, strict=False)) + dense(512, 10),
    'vgg19': 20_040_522,
    'resnet18': 11_173_962,
    'wide_resnet28_10': 36_479_194,
    'shufflenet': 352_042,
    'squeezenet': 727_626,
    'torchvision': 28_589_128,  # of convnext_tiny
}
ACTIVATIONS = {
    'digits_cnn': 3, 'lsa_model_a': 3, 'lsa_model_b': 4, 'lenet5': 4, 'wisdom_lenet5': 4, 'lenet5_caffe': 3, 'vgg16': 13,
    'vgg19': 16, 'resnet18': 17, 'wide_resnet28_10': 25, 'shufflenet': 37, 'squeezenet': 26, 'torchvision': 18,
}  # fmt: skip
BLOCKS = {'resnet18': 8, 'wide_resnet28_10': 12, 'shufflenet': 16, 'squeezenet': 8, 'torchvision': 1 + 18}


def on_meta(name):
    "The network without memory: only shapes, and at once."
    with torch.device('meta'):
        return build(name, **({'arch': 'convnext_tiny'} if name == 'torchvision' else {}))


def small(name, seed=0):
    "The network itself, or a narrow one of its kind."
    if name in SMALL:
        return build(name, seed)
    with seeded(seed):
        return NARROW[name]()


def inputs(name, samples=3):
    return torch.rand(samples, *SHAPES[name], generator=torch.Generator().manual_seed(0))


def count(net):
    return sum(p.numel() for p in net.parameters())


def equal_states(a: nn.Module, b: nn.Module) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


class Odd(nn.Module):
    "A parameter of its own, a layer used twice, a buffer, one layer never called, and a dictionary as output."

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.ones(4))
        self.twice = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.never = nn.Linear(4, 9)
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.twice.weight

    def forward(self, x):
        return {'logits': self.tied(self.norm(self.twice(self.twice(x + self.token))))}


# architectures

def test_registry_is_complete_and_tested():
    assert list(MODELS) == list(SHAPES) == list(PARAMETERS) == list(ACTIVATIONS) == [*SMALL, *NARROW]
    assert list(PARAMETERS.values())[:7] == [18_710, 20_601, 123_222, 61_706, 61_706, 431_080, 14_728_266]


@pytest.mark.parametrize('name', MODELS)
def test_parameters_and_probes(name):
    "Counts, and what a probe sees in the full network; on the meta device, so that none is computed."
    net = on_meta(name)
    assert count(net) == PARAMETERS[name] and net.training
    relus = [module for module in net.modules() if isinstance(module, nn.ReLU)]
    assert not any(relu.inplace for relu in relus), 'nothing is overwritten in place'
    x = torch.zeros(2, *SHAPES[name], device='meta')
    with torch.no_grad(), Probe(net.eval(), reduce=lambda layer, rep: tuple(rep.shape)) as probe:
        out = net(x)
    assert len(probe) == ACTIVATIONS[name] and all(shape[0] == 2 for shape in probe.values())
    assert not any('#' in layer or '()' in layer for layer in probe), 'modules, each used once'
    assert out.shape == {'lsa_model_a': (2, 1), 'torchvision': (2, 1000)}.get(name, (2, 10))
    if name in BLOCKS:
        assert len(select(net, 'blocks')) == BLOCKS[name]
    table = describe(net, x)
    assert {*select(net, 'weights')} <= {*table.layer} and table.parameters.sum() == PARAMETERS[name]


@pytest.mark.parametrize('name', MODELS)
def test_a_sample_does_not_depend_on_its_batch(name):
    net, x = small(name).eval(), inputs(name)
    with torch.no_grad():
        together, alone = net(x), torch.cat([net(sample[None]) for sample in x])
    assert together.shape == (3, 1 if name == 'lsa_model_a' else 10)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-6)
    assert together.isfinite().all() and not torch.equal(together[0], together[1])


@pytest.mark.parametrize('name', ['digits_cnn', 'lsa_model_a', 'lsa_model_b', 'lenet5', 'lenet5_caffe', 'vgg16', 'vgg19'])
def test_layers_are_numbered_by_kind(name):
    names = [n for n, _ in on_meta(name).named_children()]
    kinds = {'Conv2d': 'conv', 'ReLU': 'relu', 'ELU': 'elu', 'MaxPool2d': 'pool', 'Linear': 'linear', 'BatchNorm2d': 'bn'}
    alone = {'Flatten': 'flatten', 'AdaptiveAvgPool2d': 'avgpool'}
    seen = {}
    for n, child in on_meta(name).named_children():
        kind = type(child).__name__
        if kind in alone or n == 'linear':
            assert n == alone.get(kind, 'linear')
        else:
            seen[kind] = seen.get(kind, 0) + 1
            assert n == f'{kinds[kind]}{seen[kind]}', 'numbered by kind, in order'
    assert names[-1].startswith('linear')


def test_models_as_published():
    layers = [(type(m).__name__, getattr(m, 'out_channels', getattr(m, 'out_features', None))) for m in lsa_model_b()]
    assert layers == [
        ('Conv2d', 16), ('ReLU', None), ('Conv2d', 32), ('ReLU', None), ('MaxPool2d', None),
        ('Conv2d', 64), ('ReLU', None), ('MaxPool2d', None), ('Flatten', None),
        ('Linear', 100), ('ReLU', None), ('Linear', 10),
    ]
    shapes = describe(lsa_model_b(), torch.zeros(1, 1, 28, 28)).set_index('layer').output
    assert [shapes[n] for n in ('conv1', 'conv2', 'pool1', 'conv3', 'pool2', 'flatten')] == [
        (16, 24, 24), (32, 20, 20), (32, 10, 10), (64, 6, 6), (64, 3, 3), (576,)]
    shapes = describe(lenet5(), torch.zeros(1, 1, 28, 28)).set_index('layer').output
    assert [shapes[n] for n in ('conv1', 'pool1', 'conv2', 'pool2', 'linear1', 'linear2')] == [
        (6, 28, 28), (6, 14, 14), (16, 10, 10), (16, 5, 5), (120,), (84,)]
    assert [type(m).__name__ for m in lsa_model_a()] == ['Linear', 'ELU'] * 3 + ['Linear']
    shapes = describe(models.wisdom_lenet5(), torch.zeros(1, 1, 32, 32)).set_index('layer').output
    assert {n: shapes[n] for n in ('conv1', 'conv2', 'fc1', 'fc2', 'fc3')} == {
        'conv1': (6, 28, 28), 'conv2': (16, 10, 10), 'fc1': (120,), 'fc2': (84,), 'fc3': (10,)}
    shapes = describe(models.lenet5_caffe(), torch.zeros(1, 1, 28, 28)).set_index('layer').output
    assert [shapes[n] for n in ('conv1', 'conv2', 'flatten', 'linear1')] == [(20, 24, 24), (50, 8, 8), (800,), (500,)]
    layers = [getattr(m, 'out_channels', 'P') for m in on_meta('vgg16') if isinstance(m, nn.Conv2d | nn.MaxPool2d)]
    assert layers == [64, 64, 'P', 128, 128, 'P', *[256] * 3, 'P', *[512] * 3, 'P', *[512] * 3, 'P']
    stages = [sum(isinstance(m, nn.Conv2d) for m in stage.modules()) for stage in on_meta('resnet18') if len([*stage.children()])]
    assert stages == [4, 5, 5, 5], 'shortcuts are convolutions where the size changes'


def units(net):
    "The number of maps and neurons, as importance-driven coverage counts them."
    return sum(m.out_channels if isinstance(m, nn.Conv2d) else m.out_features for m in select(net, 'weights').values())


def test_units_as_in_the_study_of_importance_driven_coverage():
    assert [units(on_meta(name)) for name in ('wisdom_lenet5', 'vgg16', 'resnet18')] == [236, 4_234, 4_810]


def test_wide_resnet_as_published():
    net = on_meta('wide_resnet28_10')
    of = {kind: [n for n, m in net.named_modules() if isinstance(m, kind)] for kind in (nn.Conv2d, nn.BatchNorm2d, nn.Dropout)}
    assert [len(names) for names in of.values()] == [28, 25, 12]
    assert [n for n in of[nn.Conv2d] if 'Shortcut' in n] == [f'block{i}.layer.0.convShortcut' for i in (1, 2, 3)]
    assert {m.p for m in net.modules() if isinstance(m, nn.Dropout)} == {0.3}
    shapes = describe(net, torch.zeros(1, 3, 32, 32)).set_index('layer').output
    assert [shapes[f'block{i}.layer.3.conv2'] for i in (1, 2, 3)] == [(160, 32, 32), (320, 16, 16), (640, 8, 8)]
    assert [count(models.wide_resnet(10, 1, classes=c)) for c in (10, 20)] == [77_850, 77_850 + 650]
    with pytest.raises(TypeError, match='multiple values'):
        build('wide_resnet28_10', depth=16)  # the name says which one it is


def test_blocks_by_hand():
    "The two kinds of blocks, written with functions."
    from torch.nn.functional import relu
    x = torch.randn(2, 4, 6, 6)
    for block in (BasicBlock(4, 4), BasicBlock(4, 8, 2), BasicBlock(4, 8)):
        out = block.eval().bn2(block.conv2(relu(block.bn1(block.conv1(x)))))
        torch.testing.assert_close(block(x), relu(out + block.shortcut(x)))
    for block in (WideBlock(4, 4), WideBlock(4, 8, 2, dropout=0.5), WideBlock(4, 8)):
        first = relu(block.eval().bn1(x))
        out = block.conv2(relu(block.bn2(block.conv1(first))))
        torch.testing.assert_close(block(x), out + (x if block.convShortcut is None else block.convShortcut(first)))
        assert (block.convShortcut is None) == (out.shape == x.shape)
    assert not torch.equal(block.train()(x), WideBlock(4, 8)(x))


@pytest.mark.parametrize('name', ['digits_cnn', 'lsa_model_b', 'lenet5', 'wisdom_lenet5', 'lenet5_caffe', *NARROW])
def test_classes_and_channels(name):
    builder = {n: MODELS[n] for n in SMALL} | NARROW
    settings = {'channels': 2} | ({'classes': 3} if name != 'torchvision' else {})
    net = builder[name](**settings).eval()
    first = next(m for m in net.modules() if isinstance(m, nn.Conv2d))
    assert first.weight.shape[1] == first.in_channels == 2
    assert net(torch.zeros(2, 2, *SHAPES[name][1:])).shape == (2, settings.get('classes', 10))


def test_larger_images():
    for name in ('vgg16', 'resnet18', 'wide_resnet28_10', 'shufflenet', 'squeezenet'):
        assert small(name).eval()(torch.zeros(1, 3, 64, 48)).shape == (1, 10)
    for size in (12, 16, 28, 32):
        assert lenet5(size)(torch.zeros(2, 1, size, size)).shape == (2, 10)
    assert NARROW['squeezenet']().eval()(torch.zeros(1, 3, 17, 17)).shape == (1, 10)


@pytest.mark.parametrize('builder, settings, message', [
    (models.digits_cnn, {'classes': 0}, '`classes` is a whole number, at least 1; got 0'),
    (models.lsa_model_b, {'channels': 0}, '`channels` is a whole number'),
    (models.lenet5, {'size': 8}, '`size` is a multiple of 4 and at least 12'),
    (models.lenet5, {'size': 30}, '`size` is a multiple of 4'),
    (models.lenet5, {'size': 28.0}, '`size` is a whole number'),
    (models.wisdom_lenet5, {'classes': 2.5}, '`classes` is a whole number, at least 1; got 2.5'),
    (models.lenet5_caffe, {'channels': -1}, '`channels` is a whole number'),
    (models.vgg16, {'width': 0}, '`width` multiplies the number of channels, so it is above 0'),
    (models.vgg19, {'width': float('nan')}, '`width` multiplies'),
    (models.resnet18, {'width': -1}, '`width` multiplies'),
    (models.resnet18, {'channels': 0}, '`channels` is a whole number'),
    (models.wide_resnet, {'width': 0}, '`width` is a whole number, at least 1; got 0'),
    (models.wide_resnet, {'width': 1.5}, '`width` is a whole number'),
    (models.wide_resnet, {'depth': 27}, r'`depth` is 10, 16, .* 6 n \+ 4; got 27'),
    (models.wide_resnet, {'depth': 4}, '`depth` is 10'),
    (models.wide_resnet, {'dropout': 1.5, 'depth': 10, 'width': 1}, 'dropout probability'),
    (models.shufflenet, {'scale': 0.75}, '`scale` is 0.5, 1.0, 1.5 or 2.0; got 0.75'),
    (models.squeezenet, {'classes': 0}, '`classes` is a whole number'),
])
def test_wrong_settings(builder, settings, message):
    with pytest.raises(ValueError, match=message):
        builder(**settings)


# torchvision

@pytest.mark.parametrize('arch, settings, size', [
    ('resnet18', {}, 64), ('mobilenet_v2', {}, 64), ('vit_b_16', {'image_size': 64}, 64),
    ('inception_v3', {'aux_logits': False}, 299), ('googlenet', {'aux_logits': True}, 64), ('swin_t', {}, 64),
])
def test_torchvision_classifiers(arch, settings, size):
    with warnings.catch_warnings(), torch.device('meta'):
        warnings.simplefilter('error')
        net = models.torchvision_model(arch, 7, channels=1, **settings).eval()
        whole = models.torchvision_model(arch)
        assert net(torch.zeros(2, 1, size, size)).shape == (2, 7)
    published = importlib.import_module('torchvision.models').get_model_weights(arch).DEFAULT.meta['num_params']
    assert count(whole) == published + (count(whole.aux1) + count(whole.aux2) if arch == 'googlenet' else 0)
    assert not any(getattr(m, 'inplace', False) for m in net.modules())


def test_another_first_convolution():
    "All its settings stay, also a bias or its absence."
    for arch, bias in (('resnet18', False), ('alexnet', True)):
        with torch.device('meta'):
            one, three = (next(m for m in models.torchvision_model(arch, channels=c).modules() if isinstance(m, nn.Conv2d))
                          for c in (1, 3))
        assert one.weight.shape == (64, 1, *three.kernel_size) and (one.bias is not None) == bias
        assert one.weight.requires_grad and str(one).replace('Conv2d(1', 'Conv2d(3') == str(three)
    net = build('torchvision', 0, arch='squeezenet1_1', channels=1)
    assert net.features[0].weight.std() > 0.01, 'new weights, not memory as it was found'


@pytest.mark.parametrize('name, settings', [
    ('vgg16', {'width': 1 / 16}), ('vgg19', {'width': 1 / 16}), ('resnet18', {'width': 1 / 16}), ('squeezenet', {}),
    ('shufflenet', {'scale': 1.0}), ('torchvision', {'arch': 'mobilenet_v3_small', 'channels': 1}),
])
def test_large_ones_by_seed(name, settings):
    before = torch.get_rng_state()
    first, again, other = (build(name, seed, **settings) for seed in (1, 1, 2))
    assert equal_states(first, again) and not equal_states(first, other)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize('arch, message', [
    ('convnext_tyni', 'no classifier .*did you mean one of these: convnext_tiny'),
    ('ResNet18', 'did you mean one of these: .*resnet18'),
    ('zzz', 'did you mean one of these: alexnet, convnext_base.*wide_resnet50_2'),
    ('fcn_resnet50', "'fcn_resnet50' is in torchvision, but it is no image classifier"),
    ('fasterrcnn_resnet50_fpn', 'no image classifier'),
    ('quantized_resnet18', 'no image classifier'),
    ('r3d_18', 'no image classifier'),
])
def test_unknown_torchvision_names(arch, message):
    with pytest.raises(ValueError, match=message):
        build('torchvision', arch=arch)


@pytest.mark.parametrize('arch, settings', [
    ('shufflenet_v2_x0_5', {}), ('googlenet', {}), ('squeezenet1_1', {'classes': 1000}),
])
def test_pretrained(arch, settings, monkeypatch):
    "With random weights in place of the file; the normalisation is that of the published weights."
    tv = importlib.import_module('torchvision.models')
    with torch.random.fork_rng():
        theirs = tv.get_model(arch, **({'init_weights': False} if arch == 'googlenet' else {})).eval()
    asked = []

    def get_state_dict(weights, **kwargs):
        asked.append(kwargs)
        return copy.deepcopy(theirs.state_dict())

    monkeypatch.setattr(tv.WeightsEnum, 'get_state_dict', get_state_dict)
    net = models.torchvision_model(arch, pretrained=True, **settings).eval()
    assert asked[0] == {'check_hash': True, 'weights_only': True}, 'opened safely before torchvision opens it'
    assert isinstance(net, Normalized)
    x = torch.rand(1, 3, 64, 64)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normalised = (x - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    if getattr(net.model, 'transform_input', False):  # from ImageNet's normalisation to that of these weights
        normalised = theirs._transform_input(normalised) if theirs.transform_input else net.model._transform_input(normalised)
    with torch.no_grad():
        torch.testing.assert_close(net(x), theirs(normalised))


def test_pretrained_errors(monkeypatch):
    for settings in ({'classes': 10}, {'channels': 1}):
        with pytest.raises(ValueError, match='for 1,000 classes and 3 channels'):
            build('torchvision', arch='resnet18', pretrained=True, **settings)

    def offline(*args, **kwargs):
        raise urllib.error.URLError('no network')

    monkeypatch.setattr(torch.hub, 'download_url_to_file', offline)
    monkeypatch.setattr('torch.hub.get_dir', lambda: '/nowhere-at-all')
    monkeypatch.setattr('torch.hub.os.makedirs', lambda *args, **kwargs: None)
    with pytest.raises(FileNotFoundError, match='weights of resnet18 were not fetched .*no network.*put the file https.*pth'):
        build('torchvision', arch='resnet18', pretrained=True)


@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
@pytest.mark.parametrize(
    'content', [b'<html>Please log in</html>', b'', pickle.dumps(argparse.Namespace())], ids=['page', 'empty', 'program'])
def test_pretrained_weights_that_are_something_else(content, tmp_path, monkeypatch):
    monkeypatch.setattr('torch.hub.get_dir', lambda: str(tmp_path))
    (tmp_path / 'checkpoints').mkdir()
    (tmp_path / 'checkpoints' / 'shufflenetv2_x0.5-f707e7126e.pth').write_bytes(content)
    with pytest.raises(ValueError, match=r'x0\.5-f707e7126e\.pth is not what torchvision published .*: remove it'):
        build('torchvision', arch='shufflenet_v2_x0_5', pretrained=True)


@pytest.mark.parametrize('error', [
    ImportError('No module named torchvision'), RuntimeError('operator torchvision::nms does not exist'),
])
def test_a_broken_torchvision(error, monkeypatch):
    class Broken(ModuleType):
        def __getattr__(self, name):
            raise error

    monkeypatch.setitem(sys.modules, 'torchvision', Broken('torchvision'))
    with pytest.raises(ImportError, match='(No module|nms).*built for another torch.*pip install torch torchvision'):
        build('squeezenet')


@pytest.mark.parametrize('size', [8, 12, 16, 28, 32, 64])
def test_digits_cnn_at_any_size(size):
    net = digits_cnn(size, classes=7)
    assert sum(p.numel() for p in net.parameters()) == 18_710 - 3 * 101
    assert net(torch.zeros(2, 1, size, size)).shape == (2, 7)


@pytest.mark.parametrize('size', [0, 4, 7, 10, 30])
def test_digits_cnn_refuses(size):
    with pytest.raises(ValueError, match='multiple of 4|at least 1; got 0'):
        digits_cnn(size)


# seeds

@pytest.mark.parametrize('name', SMALL)
def test_builds_are_functions_of_the_seed(name):
    numpy, pytorch = np.random.get_state()[1].copy(), torch.get_rng_state()
    first, again, other = build(name, 3), build(name, 3), build(name, 4)
    assert (np.random.get_state()[1] == numpy).all() and torch.equal(torch.get_rng_state(), pytorch)
    assert equal_states(first, again) and not equal_states(first, other)
    torch.manual_seed(3)
    assert equal_states(first, MODELS[name]()), 'the same as seeding by hand'


def test_build_passes_settings_on_and_names_its_models():
    assert build('digits_cnn', size=32, classes=5)(torch.zeros(1, 1, 32, 32)).shape == (1, 5)
    with pytest.raises(ValueError, match="no model 'vgg'; there are: digits_cnn, lsa_model_a, .*vgg16, .*torchvision"):
        build('vgg')


# describe

def test_describe():
    net = build('lenet5')
    net.train()
    net.conv1.eval()
    table = describe(net, torch.zeros(4, 1, 28, 28, dtype=torch.float64))
    assert table.layer.tolist() == [name for name, _ in net.named_children()]
    assert table.parameters.tolist() == [sum(p.numel() for p in m.parameters()) for m in net]
    assert table.type.tolist() == [type(m).__name__ for m in net]
    assert not net.conv1.training and net.conv2.training
    assert not any(m._forward_hooks for m in net.modules())


def test_describe_an_odd_model():
    net = Odd()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    table = describe(nn.DataParallel(Normalized(net, 0.5, 2)), torch.rand(1, 4))
    assert table.layer.tolist() == ['twice', 'twice', 'norm', 'tied', '']
    assert table.parameters.tolist() == [20, 0, 8, 4, 4], 'each counts once, the shared weight where first used'
    assert table.output.tolist() == [(4,)] * 5
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_describe_cleans_up_after_an_error():
    net = build('lenet5')
    with pytest.raises(RuntimeError):
        describe(net, torch.zeros(1, 1, 8, 8))
    assert not any(m._forward_hooks for m in net.modules()) and net.training
    assert len(describe(nn.Sequential(nn.Identity()), torch.zeros(2, 3))) == 1


# weights

@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('kind', ['safetensors', 'state dict', 'old state dict', 'checkpoint'])
def test_round_trips(name, kind, tmp_path):
    net, path = small(name, seed=1), tmp_path / 'weights'
    if kind == 'safetensors':
        models.save(net, path, meta={'seed': 1, 'note': 'é', 'loss': float('nan')})
    elif kind == 'checkpoint':
        optimizer = torch.optim.Adam(net.parameters())
        net(inputs(name)).sum().backward()
        optimizer.step()
        torch.save({'epoch': 3, 'model': net.state_dict(), 'optimizer': optimizer.state_dict()}, path)
    else:
        torch.save(net.state_dict(), path, _use_new_zipfile_serialization=kind == 'state dict')
    target = small(name, seed=2)
    assert not equal_states(target, net) and models.load(target, str(path)) is target
    assert equal_states(target, net)
    assert [p.name for p in tmp_path.iterdir()] == ['weights'], 'no temporary file is left'


@pytest.mark.parametrize('dtype', [torch.float64, torch.float16, torch.bfloat16])
def test_types_buffers_and_ties_survive(dtype, tmp_path):
    net = Odd().to(dtype)
    net.norm.num_batches_tracked += 7
    net.twice.weight.data = net.twice.weight.data.t()  # not contiguous
    models.save(net, tmp_path / 'odd.safetensors')
    target = models.load(Odd().to(dtype), tmp_path / 'odd.safetensors')
    assert equal_states(target, net) and target.norm.num_batches_tracked == 7
    assert target.tied.weight is target.twice.weight
    single = models.load(Odd(), tmp_path / 'odd.safetensors')
    assert single.twice.weight.dtype == torch.float32, 'the model keeps its type'


WRAPPERS = {
    'plain': lambda net: net,
    'parallel': nn.DataParallel,
    'normalized': lambda net: Normalized(net, 0.1, 0.3),
    'both': lambda net: nn.DataParallel(Normalized(net, 0.1, 0.3)),
    'compiled': lambda net: torch.compile(net, backend='eager'),
}


@pytest.mark.parametrize('saved', WRAPPERS)
@pytest.mark.parametrize('loaded', WRAPPERS)
def test_wrappers_do_not_matter(saved, loaded, tmp_path):
    net, target = build('digits_cnn', 1), build('digits_cnn', 2)
    models.save(WRAPPERS[saved](net), tmp_path / 'w')
    wrapped = WRAPPERS[loaded](target)
    assert models.load(wrapped, tmp_path / 'w') is wrapped and equal_states(net, target)


@pytest.mark.parametrize('wrap', [
    nn.DataParallel, lambda net: torch.compile(net, backend='eager'),
    lambda net: torch.compile(nn.DataParallel(net), backend='eager'),
    lambda net: nn.DataParallel(torch.compile(net, backend='eager')),
])
def test_prefixes_of_foreign_checkpoints_are_stripped(wrap, tmp_path):
    net, target = build('digits_cnn', 1), build('digits_cnn', 2)
    torch.save(wrap(net).state_dict(), tmp_path / 'w.pt')
    assert equal_states(models.load(target, tmp_path / 'w.pt'), net)


@pytest.mark.parametrize('prefix', ['net.', 'model.', 'model.net.', 'model._orig_mod.', 'module.model.'])
def test_a_lightning_checkpoint(prefix, tmp_path):
    net, target = build('digits_cnn', 1), build('digits_cnn', 2)
    torch.save({
        'epoch': 3, 'global_step': 30, 'pytorch-lightning_version': '2.5.0', 'optimizer_states': [{'state': {0: {}}}],
        'hyper_parameters': {'lr': 0.1}, 'callbacks': {'ModelCheckpoint': {'best_model_score': torch.tensor(0.9)}},
        'state_dict': {f'{prefix}{name}': tensor for name, tensor in net.state_dict().items()},
    }, tmp_path / 'last.ckpt')
    assert equal_states(models.load(target, tmp_path / 'last.ckpt'), net)


def test_an_entry_by_its_name(tmp_path):
    net, average = build('digits_cnn', 1), build('digits_cnn', 2)
    torch.save({'state_dict': net.state_dict(), 'ema': average.state_dict(), 'epoch': 3}, tmp_path / 'w.pt')
    for entry, expected in (('state_dict', net), ('ema', average)):
        assert equal_states(models.load(build('digits_cnn'), tmp_path / 'w.pt', entry=entry), expected)
    for entry in ('epoch', 'nothing'):
        with pytest.raises(ValueError, match=f"no entry '{entry}' with weights; there are: state_dict, ema"):
            models.load(build('digits_cnn'), tmp_path / 'w.pt', entry=entry)
    torch.save(net.state_dict(), tmp_path / 'plain.pt')
    with pytest.raises(ValueError, match="is a state dict without entries; leave entry='net' out"):
        models.load(build('digits_cnn'), tmp_path / 'plain.pt', entry='net')


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize('kind', ['safetensors', 'pt'])
def test_a_file_in_another_precision(dtype, kind, tmp_path):
    state = {name: tensor.to(dtype) for name, tensor in build('digits_cnn', 1).state_dict().items()}
    write = safetensors.torch.save_file if kind == 'safetensors' else torch.save
    write(state, tmp_path / 'w')
    target = models.load(build('digits_cnn'), tmp_path / 'w')
    assert all(torch.equal(tensor, state[name].float()) for name, tensor in target.state_dict().items())
    assert target.conv1.weight.dtype == torch.float32, 'the model keeps its type'


def test_the_state_of_a_normalized_model(tmp_path):
    "Written by torch.save, it holds the mean too, and fits a model that has one."
    net, target = (Normalized(build('digits_cnn', i), mean, 0.5) for i, mean in ((1, 0.1), (2, 0.2)))
    torch.save(net.state_dict(), tmp_path / 'w.pt')
    assert equal_states(models.load(target, tmp_path / 'w.pt'), net)
    with pytest.raises(ValueError, match='unexpected: mean, std'):
        models.load(build('digits_cnn'), tmp_path / 'w.pt')


def test_a_prefix_that_the_model_has_itself(tmp_path):
    "A model whose only child is called `model`, inside a trainer that calls it `model` too."
    net, target = (nn.Sequential(OrderedDict(model=build('digits_cnn', i))) for i in (1, 2))
    torch.save({f'model.{name}': tensor for name, tensor in net.state_dict().items()}, tmp_path / 'w.pt')
    assert equal_states(models.load(target, tmp_path / 'w.pt'), net)


def test_a_model_without_memory(tmp_path):
    with pytest.raises(ValueError, match=r"conv1\.weight lies on the meta device.*to_empty\(device='cpu'\)"):
        models.save(on_meta('lenet5'), tmp_path / 'w')
    assert not [*tmp_path.iterdir()]
    net, target = build('lenet5', 1), on_meta('lenet5')
    models.save(net, tmp_path / 'w')
    with pytest.raises(ValueError, match='lies on the meta device'):
        models.load(target, tmp_path / 'w')
    assert equal_states(models.load(target.to_empty(device='cpu'), tmp_path / 'w'), net)


def test_what_is_no_model_is_not_saved(tmp_path):
    with pytest.raises(TypeError, match=r"got dict\. If that is a checkpoint.*torch\.save\(checkpoint\['state_dict'\]"):
        models.save({'state_dict': {}}, tmp_path / 'w')
    with pytest.raises(TypeError, match='the first argument is the model to fill.*got .*Path'):
        models.load(tmp_path / 'w', build('lenet5'))


@pytest.mark.parametrize('name', [n for n in NARROW if n != 'torchvision'])
def test_names_and_shapes_of_two_builds_agree(name):
    "The large ones, without memory."
    states = [on_meta(name).state_dict() for _ in range(2)]
    assert models._misfits(*states) == ''
    prefixed = {f'module.{n}': t for n, t in states[1].items()}
    assert models._without_prefix(prefixed, states[0]).keys() == states[0].keys()


def test_names_of_shared_weights():
    "As in most files for CIFAR-10, without which they would not fit."
    net = on_meta('resnet18').state_dict()
    assert [n for n in net if n.startswith('layer2.0.') and n.endswith('weight')] == [
        f'layer2.0.{n}.weight' for n in ('conv1', 'bn1', 'conv2', 'bn2', 'shortcut.0', 'shortcut.1')]
    assert {'conv1.weight', 'bn1.weight', 'linear.weight'} <= {*net} and len(net) == 122
    net = on_meta('wide_resnet28_10').state_dict()
    assert [n for n in net if n.startswith('block2.layer.0.') and n.endswith('weight')] == [
        f'block2.layer.0.{n}.weight' for n in ('bn1', 'conv1', 'bn2', 'conv2', 'convShortcut')]
    assert {'conv1.weight', 'block1.layer.3.bn2.bias', 'bn1.running_var', 'fc.bias'} <= {*net}
    assert {n.partition('.')[0] for n in on_meta('wisdom_lenet5').state_dict()} == {'conv1', 'conv2', 'fc1', 'fc2', 'fc3'}


def test_a_model_whose_child_is_called_module(tmp_path):
    net = nn.ModuleDict({'module': nn.Linear(2, 2)})
    models.save(net, tmp_path / 'w')
    assert equal_states(models.load(nn.ModuleDict({'module': nn.Linear(2, 2)}), tmp_path / 'w'), net)


# files that do not fit

@pytest.mark.parametrize('change, message', [
    (lambda s: s.pop('conv1.bias'), r'1 missing: conv1\.bias\.'),
    (lambda s: s.update(extra=torch.zeros(1)), r'1 unexpected: extra\.'),
    (lambda s: s.update({'linear2.bias': torch.zeros(3)}), r'linear2\.bias is \(3,\) instead of \(10,\)'),
    (lambda s: s.clear() or s.update(a=torch.zeros(1)), r'8 missing: conv1.weight, .* \.\.\.; 1 unexpected: a\. Is it'),
])
def test_misfits_change_nothing(change, message, tmp_path):
    state = build('digits_cnn', 1).state_dict()
    change(state)
    torch.save(dict(state), tmp_path / 'w.pt')
    target = build('digits_cnn', 2)
    with pytest.raises(ValueError, match=message):
        models.load(target, tmp_path / 'w.pt')
    assert equal_states(target, build('digits_cnn', 2))


@pytest.mark.parametrize('there, here, layer', [
    ({'classes': 100}, {'classes': 10}, 'linear2'), ({'channels': 3}, {'channels': 1}, 'conv1'),
])
def test_another_number_of_classes_or_channels(there, here, layer, tmp_path):
    models.save(build('digits_cnn', **there), tmp_path / 'w')
    target = build('digits_cnn', 2, **here)
    with pytest.raises(ValueError, match=f'{layer}.weight is .* Only {layer} differs: for another number of classes or ch'):
        models.load(target, tmp_path / 'w')
    assert equal_states(target, build('digits_cnn', 2, **here))


def test_wrong_architecture(tmp_path):
    models.save(build('lenet5'), tmp_path / 'lenet5.safetensors')
    with pytest.raises(ValueError, match=r'lenet5\.safetensors does not fit this Sequential.*another architecture\?'):
        models.load(build('digits_cnn'), tmp_path / 'lenet5.safetensors')


def content_of(writer) -> bytes:
    file = io.BytesIO()
    writer(file)
    return file.getvalue()


def write_zip(file):
    with zipfile.ZipFile(file, 'w') as archive:
        archive.writestr('a.txt', 'hi')


class Bomb:
    "A pickle of this object runs code when it is opened."

    def __reduce__(self):
        return pytest.fail, ('a pickle was executed',)


WHOLE = [
    'trust its', r"torch\.load\('.*bad\.pt', weights_only=False\)", 'from robustnb import models',
    r"models\.save\(model, '.*bad\.safetensors'\)",
]
FILES = {
    'whole model': (content_of(lambda f: torch.save(build('lenet5'), f)), WHOLE),
    'whole model, old format': (
        content_of(lambda f: torch.save(build('lenet5'), f, _use_new_zipfile_serialization=False)), WHOLE),
    'program': (content_of(lambda f: torch.save(Bomb(), f)), WHOLE),
    'pickled program': (pickle.dumps(Bomb()), WHOLE),
    'web page': (b'\n <!DOCTYPE html><html>Sign in</html>', ['a web page.*log in']),
    'web page in capitals': (b'<HTML><body>', ['a web page']),
    'answer of a cloud store': (b'<?xml version="1.0"?><Error><Code>NoSuchKey</Code></Error>', ['a web page']),
    'lfs pointer': (b'version https://git-lfs.github.com/spec/v1\noid sha256:0', ['git lfs pull']),
    'nothing': (b'', ['is empty']),
    'text': (b'hello world', ["neither safetensors nor a PyTorch checkpoint; it starts with b'hello wo'"]),
    'half a checkpoint': (
        content_of(lambda f: torch.save(lenet5().state_dict(), f))[:5000], ['cut off, damaged or an archive of another kind']),
    'settings beside the weights': (
        content_of(lambda f: torch.save({'state_dict': lenet5().state_dict(), 'args': argparse.Namespace(lr=1)}, f)), WHOLE),
    'a safetensors file that was cut off': (
        safetensors.torch.save(lenet5().state_dict())[:-100], ['cut off or damaged']),
    'half a safetensors file': (b'\x10\x00\x00\x00\x00\x00\x00\x00{"a":', ['cut off or damaged']),
    'another zip': (content_of(write_zip), ['cut off, damaged or an archive of another kind']),
    'a number': (content_of(lambda f: torch.save(3, f)), ['holds no weights']),
    'a bare tensor': (content_of(lambda f: torch.save(torch.zeros(2), f)), ['holds no weights']),
    'two sets': (content_of(lambda f: torch.save({k: {'a': torch.zeros(1)} for k in ('ema', 'net')}, f)),
                 ['2 entries with weights: ema, net', r"load\(model, path, entry='ema'\)"]),
    'numbers as names': (content_of(lambda f: torch.save({0: torch.zeros(1)}, f)), ['holds no weights']),
    'tensors by layer': (content_of(lambda f: torch.save({'a': {'b': {'c': torch.zeros(1)}}}, f)), ['holds no weights']),
}


@pytest.mark.filterwarnings('ignore::UserWarning')
@pytest.mark.parametrize('kind', FILES)
def test_bad_files_are_refused_with_advice(kind, tmp_path):
    content, messages = FILES[kind]
    path, target = tmp_path / 'bad.pt', build('lenet5', 1)
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        models.load(target, path)
    for message in messages:
        caught.match(message)
    assert equal_states(target, build('lenet5', 1))


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        models.load(build('lenet5'), tmp_path / 'none.safetensors')


def test_the_advice_in_the_message_works(tmp_path, monkeypatch):
    "Run the three lines of the message, as a reader would."
    monkeypatch.chdir(tmp_path)
    net = build('lenet5', 5)
    torch.save(net, 'whole.pt')
    with pytest.raises(ValueError) as caught:
        models.load(build('lenet5'), 'whole.pt')
    lines = [line.strip() for line in str(caught.value).splitlines() if line.startswith('    ')]
    assert len(lines) == 3
    exec('\n'.join(lines), {'torch': torch})
    assert equal_states(models.load(build('lenet5'), 'whole.safetensors'), net)


def test_safetensors_whose_length_looks_like_a_zip(tmp_path):
    "A header of 0x04034b50 bytes would start like a zip archive; 0x80 bytes like a pickle. The brace decides."
    path = tmp_path / 'w'
    for start in (b'\x80\x00', b'PK\x03\x04'):
        path.write_bytes(start.ljust(8, b'\x00') + b'{')
        assert models._kind_of_file(path) == 'safetensors'


def test_describe_a_model_of_integers():
    table = describe(nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 2)), torch.tensor([[1, 4]]))
    assert table.output.tolist() == [(2, 3), (6,), (2,)]


# XLA

def forward_on_xla(folder: Path) -> None:
    "Runs in a process of its own: where PyTorch has already differentiated, XLA no longer can."
    xla = pick_device('xla')
    for name in ('lsa_model_a', 'lenet5', 'wide_resnet28_10'):
        x, net = inputs(name, 2), small(name).eval()
        moved = copy.deepcopy(net).to(xla)
        for batch in batches((x, torch.zeros(2, dtype=torch.int64)), device=xla):
            torch.testing.assert_close(moved(batch.x).cpu(), net(x), rtol=1e-4, atol=1e-5)
        models.save(moved, folder / name)
        assert equal_states(models.load(small(name, 9), folder / name), net)
        assert describe(moved, x).equals(describe(net, x))


@pytest.mark.skipif(importlib.util.find_spec('torch_xla') is None, reason='torch_xla is not installed')
def test_models_on_xla_equal_eager(tmp_path):
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context('spawn')) as processes:
        processes.submit(forward_on_xla, tmp_path).result()


def test_load_wants_a_model_and_not_its_class(tmp_path):
    class Net(nn.Module):
        pass

    with pytest.raises(TypeError, match=r'write Net\(\)'):
        models.load(Net, tmp_path / 'weights.safetensors')


def test_masks_are_weights_too(tmp_path):
    def make():
        net = nn.Linear(3, 2)
        net.register_buffer('mask', torch.tensor([True, False, True]))
        return net

    net, other = make(), make()
    models.save(net, tmp_path / 'net.safetensors')
    other.mask.zero_()
    models.load(other, tmp_path / 'net.safetensors')
    assert other.mask.dtype == torch.bool and torch.equal(other.mask, net.mask)
