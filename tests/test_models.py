"""Models: sizes by hand, seeded builds, weights that survive any wrapper, and files that are refused with advice."""
import copy
import importlib.util
import io
import multiprocessing
import pickle
import zipfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from robustnb import models
from robustnb.data import batches
from robustnb.devices import pick_device
from robustnb.guard import Normalized
from robustnb.models import MODELS, build, describe, digits_cnn, lenet5, load_weights, lsa_model_b, save_weights

SIZES = {'digits_cnn': 8, 'lsa_model_b': 28, 'lenet5': 28}


def dense(inputs, outputs):
    return outputs * (inputs + 1)


def conv(inputs, outputs, kernel):
    return outputs * (inputs * kernel**2 + 1)


PARAMETERS = {
    'digits_cnn': conv(1, 16, 3) + conv(16, 32, 3) + dense(32 * 2 * 2, 100) + dense(100, 10),
    'lsa_model_b': conv(1, 16, 5) + conv(16, 32, 5) + conv(32, 64, 5) + dense(64 * 3 * 3, 100) + dense(100, 10),
    'lenet5': conv(1, 6, 5) + conv(6, 16, 5) + dense(16 * 5 * 5, 120) + dense(120, 84) + dense(84, 10),
}


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
    assert set(MODELS) == set(SIZES) == set(PARAMETERS)
    assert PARAMETERS == {'digits_cnn': 18_710, 'lsa_model_b': 123_222, 'lenet5': 61_706}


@pytest.mark.parametrize('name', MODELS)
def test_architectures(name):
    net, size = build(name), SIZES[name]
    assert sum(p.numel() for p in net.parameters()) == PARAMETERS[name]
    assert net(torch.zeros(3, 1, size, size)).shape == (3, 10)
    assert net.training, 'as any fresh torch module'
    names = [n for n, _ in net.named_children()]
    kinds = {'Conv2d': 'conv', 'ReLU': 'relu', 'MaxPool2d': 'pool', 'Linear': 'linear', 'Flatten': 'flatten'}
    seen = {}
    for n, child in net.named_children():
        kind = kinds[type(child).__name__]
        seen[kind] = seen.get(kind, 0) + 1
        assert n == ('flatten' if kind == 'flatten' else f'{kind}{seen[kind]}'), 'numbered by kind, in order'
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


@pytest.mark.parametrize('size', [8, 12, 16, 28, 32, 64])
def test_digits_cnn_at_any_size(size):
    net = digits_cnn(size, classes=7)
    assert sum(p.numel() for p in net.parameters()) == 18_710 - 3 * 101
    assert net(torch.zeros(2, 1, size, size)).shape == (2, 7)


@pytest.mark.parametrize('size', [0, 4, 7, 10, 30])
def test_digits_cnn_refuses(size):
    with pytest.raises(ValueError, match='multiple of 4'):
        digits_cnn(size)


# seeds

@pytest.mark.parametrize('name', MODELS)
def test_builds_are_functions_of_the_seed(name):
    numpy, pytorch = np.random.get_state()[1].copy(), torch.get_rng_state()
    first, again, other = build(name, 3), build(name, 3), build(name, 4)
    assert (np.random.get_state()[1] == numpy).all() and torch.equal(torch.get_rng_state(), pytorch)
    assert equal_states(first, again) and not equal_states(first, other)
    torch.manual_seed(3)
    assert equal_states(first, MODELS[name]()), 'the same as seeding by hand'


def test_build_passes_settings_on_and_names_its_models():
    assert build('digits_cnn', size=32, classes=5)(torch.zeros(1, 1, 32, 32)).shape == (1, 5)
    with pytest.raises(ValueError, match="no model 'vgg'; there are: digits_cnn, lsa_model_b, lenet5"):
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
    net, path = build(name, seed=1), tmp_path / 'weights'
    if kind == 'safetensors':
        save_weights(net, path, meta={'seed': 1, 'note': 'é', 'loss': float('nan')})
    elif kind == 'checkpoint':
        optimizer = torch.optim.Adam(net.parameters())
        net(torch.zeros(1, 1, SIZES[name], SIZES[name])).sum().backward()
        optimizer.step()
        torch.save({'epoch': 3, 'model': net.state_dict(), 'optimizer': optimizer.state_dict()}, path)
    else:
        torch.save(net.state_dict(), path, _use_new_zipfile_serialization=kind == 'state dict')
    target = build(name, seed=2)
    assert load_weights(target, str(path)) is target
    assert equal_states(target, net)
    assert [p.name for p in tmp_path.iterdir()] == ['weights'], 'no temporary file is left'


@pytest.mark.parametrize('dtype', [torch.float64, torch.float16, torch.bfloat16])
def test_types_buffers_and_ties_survive(dtype, tmp_path):
    net = Odd().to(dtype)
    net.norm.num_batches_tracked += 7
    net.twice.weight.data = net.twice.weight.data.t()  # not contiguous
    save_weights(net, tmp_path / 'odd.safetensors')
    target = load_weights(Odd().to(dtype), tmp_path / 'odd.safetensors')
    assert equal_states(target, net) and target.norm.num_batches_tracked == 7
    assert target.tied.weight is target.twice.weight
    single = load_weights(Odd(), tmp_path / 'odd.safetensors')
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
    save_weights(WRAPPERS[saved](net), tmp_path / 'w')
    wrapped = WRAPPERS[loaded](target)
    assert load_weights(wrapped, tmp_path / 'w') is wrapped and equal_states(net, target)


@pytest.mark.parametrize('wrap', [
    nn.DataParallel, lambda net: torch.compile(net, backend='eager'),
    lambda net: torch.compile(nn.DataParallel(net), backend='eager'),
    lambda net: nn.DataParallel(torch.compile(net, backend='eager')),
])
def test_prefixes_of_foreign_checkpoints_are_stripped(wrap, tmp_path):
    net, target = build('digits_cnn', 1), build('digits_cnn', 2)
    torch.save(wrap(net).state_dict(), tmp_path / 'w.pt')
    assert equal_states(load_weights(target, tmp_path / 'w.pt'), net)


def test_a_model_whose_child_is_called_module(tmp_path):
    net = nn.ModuleDict({'module': nn.Linear(2, 2)})
    save_weights(net, tmp_path / 'w')
    assert equal_states(load_weights(nn.ModuleDict({'module': nn.Linear(2, 2)}), tmp_path / 'w'), net)


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
        load_weights(target, tmp_path / 'w.pt')
    assert equal_states(target, build('digits_cnn', 2))


def test_wrong_architecture(tmp_path):
    save_weights(build('lenet5'), tmp_path / 'lenet5.safetensors')
    with pytest.raises(ValueError, match=r'lenet5\.safetensors does not fit this Sequential.*another architecture\?'):
        load_weights(build('digits_cnn'), tmp_path / 'lenet5.safetensors')


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


WHOLE = [r"save_weights\(model, '.*bad\.safetensors'\)", r"torch\.load\('.*bad\.pt', weights_only=False\)", 'trust its']
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
        content_of(lambda f: torch.save(lenet5().state_dict(), f))[:5000], ['cut off, damaged or a TorchScript']),
    'half a safetensors file': (b'\x10\x00\x00\x00\x00\x00\x00\x00{"a":', ['cut off or damaged']),
    'another zip': (content_of(write_zip), ['cut off, damaged or a TorchScript']),
    'a number': (content_of(lambda f: torch.save(3, f)), ['holds no weights']),
    'a bare tensor': (content_of(lambda f: torch.save(torch.zeros(2), f)), ['holds no weights']),
    'two sets': (content_of(lambda f: torch.save({k: {'a': torch.zeros(1)} for k in ('ema', 'net')}, f)),
                 ['2 entries with weights: ema, net', r'torch\.save\(checkpoint']),
}


@pytest.mark.filterwarnings('ignore::UserWarning')
@pytest.mark.parametrize('kind', FILES)
def test_bad_files_are_refused_with_advice(kind, tmp_path):
    content, messages = FILES[kind]
    path, target = tmp_path / 'bad.pt', build('lenet5', 1)
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        load_weights(target, path)
    for message in messages:
        caught.match(message)
    assert equal_states(target, build('lenet5', 1))


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_weights(build('lenet5'), tmp_path / 'none.safetensors')


def test_the_advice_in_the_message_works(tmp_path, monkeypatch):
    "Run the three lines of the message, as a reader would."
    monkeypatch.chdir(tmp_path)
    net = build('lenet5', 5)
    torch.save(net, 'whole.pt')
    with pytest.raises(ValueError) as caught:
        load_weights(build('lenet5'), 'whole.pt')
    lines = [line.strip() for line in str(caught.value).splitlines() if line.startswith('    ')]
    assert len(lines) == 3
    exec('\n'.join(lines), {'torch': torch})
    assert equal_states(load_weights(build('lenet5'), 'whole.safetensors'), net)


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
    for name, size in SIZES.items():
        x = torch.linspace(0, 1, 2 * size**2).view(2, 1, size, size)
        net = build(name).eval()
        moved = copy.deepcopy(net).to(xla)
        for batch in batches((x, torch.zeros(2, dtype=torch.int64)), device=xla):
            torch.testing.assert_close(moved(batch.x).cpu(), net(x), rtol=1e-4, atol=1e-5)
        save_weights(moved, folder / name)
        assert equal_states(load_weights(build(name, 9), folder / name), net)
        assert describe(moved, x).equals(describe(net, x))


@pytest.mark.skipif(importlib.util.find_spec('torch_xla') is None, reason='torch_xla is not installed')
def test_models_on_xla_equal_eager(tmp_path):
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context('spawn')) as processes:
        processes.submit(forward_on_xla, tmp_path).result()
