"""Data: order, ids and seeds; what is accepted and what is refused; loaders with workers and short last batches."""
import hashlib
import logging
import sys
import types
import urllib.error

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from robustnb import data as data_module
from robustnb.data import (
    DATA,
    Batch,
    DataSet,
    asset,
    batches,
    bounds_of,
    cache_folder,
    classes_of,
    digits,
    from_arrays,
    load_data,
    mnist,
    size_of,
)


def make(n=10, classes=3, seed=0) -> DataSet:
    "A data set whose sample i is filled with i, so that a mix-up shows."
    y = torch.from_numpy(np.random.default_rng(seed).integers(classes, size=n))
    x = torch.arange(n, dtype=torch.float32)[:, None].expand(n, 2) / max(n, 1)
    return DataSet(x.clone(), y, tuple(f'c{i}' for i in range(classes)), 'toy', ids=100 + torch.arange(n))


def same(a: DataSet, b: DataSet) -> bool:
    return torch.equal(a.x, b.x) and torch.equal(a.y, b.y) and torch.equal(a.ids, b.ids)


@pytest.fixture(autouse=True)
def global_generators_stay():
    "Nothing in this module may draw from anybody's global generator."
    numpy, pytorch = np.random.get_state()[1].copy(), torch.get_rng_state()
    yield
    assert (np.random.get_state()[1] == numpy).all() and torch.equal(torch.get_rng_state(), pytorch)


# DataSet

@pytest.mark.parametrize('index', [
    slice(2, 7), slice(None, None, 3), slice(-3, None), [4, 0, 4], [], (1, 2), np.array([3, 1]), torch.tensor([9]),
    np.arange(10)[::-1], np.array([True] * 4 + [False] * 6), torch.arange(10) % 2 == 0, [False] * 10, [-1, -2],
    np.array([], dtype=int), torch.tensor([], dtype=torch.long), np.arange(3, dtype=np.uint16),
])
def test_indexing_follows_numpy(index):
    data = make()
    part = data[index]
    rows = np.arange(10)[index if isinstance(index, slice) else np.asarray(index, dtype=None if len(index) else int)]
    assert part.ids.tolist() == (100 + rows).tolist()
    np.testing.assert_array_equal(part.x, data.x.numpy()[rows])
    np.testing.assert_array_equal(part.y, data.y.numpy()[rows])
    assert (part.classes, part.name, part.bounds) == (data.classes, data.name, data.bounds)


def test_one_sample_is_a_pair():
    data = make()
    for index in (3, np.int64(3), torch.tensor(3), -7):
        x, y = data[index]
        assert torch.equal(x, data.x[3]) and y == data.y[3] and y.dim() == 0
    assert len(list(data)) == 10, 'iteration ends'
    for wrong in (10, [0, 10], [0.5], [True] * 9):
        with pytest.raises(IndexError):
            data[wrong]


def test_a_data_set_is_frozen_and_consistent():
    data = make()
    with pytest.raises(AttributeError):
        data.x = data.x * 2
    with pytest.raises(ValueError, match='10 samples, 9 labels and 9 ids'):
        DataSet(data.x, data.y[:9], data.classes)
    with pytest.raises(ValueError, match='10 samples, 10 labels and 3 ids'):
        DataSet(data.x, data.y, data.classes, ids=torch.arange(3))
    assert DataSet(data.x, data.y, data.classes).ids.tolist() == list(range(10))
    assert data != make() and data == data and hash(data), 'compared by identity: tensors have no single truth value'


def test_repr_is_one_line():
    assert repr(make()) == 'DataSet(toy: 10 samples of 2, in [0, 1], 3 classes)'
    free = DataSet(torch.zeros(2, 3, 4, 5), torch.zeros(2, dtype=int), ('a',), bounds=None)
    assert repr(free) == 'DataSet(arrays: 2 samples of 3×4×5, unbounded, 1 classes)'
    assert '[-2.5, 255]' in repr(DataSet(free.x, free.y, ('a',), bounds=(-2.5, 255)))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(0, 2**40))
def test_balanced_order_against_queues(labels, seed):
    "Deal the shuffled samples of each class out in rounds, one by one."
    order = data_module._balanced_order(torch.tensor(labels), seed)
    shuffled = np.random.RandomState(seed % 2**32).permutation(len(labels))
    queues = {label: [i for i in shuffled if labels[i] == label] for label in set(labels)}
    dealt = []
    for turn in range(len(labels)):
        dealt += [i for i in shuffled if turn < len(queues[labels[i]]) and queues[labels[i]][turn] == i]
    assert order.tolist() == dealt
    for n in range(1, len(labels) + 1):
        counts = np.bincount(np.array(labels)[order[:n]], minlength=5)
        for label, queue in queues.items():
            assert counts[label] >= min(counts.max() - 1, len(queue)), 'every beginning is as balanced as it can be'


def test_take():
    data = make(60)
    assert sorted(data.take(60).ids.tolist()) == data.ids.tolist()
    assert same(data.take(20, seed=3), data.take(20, seed=3))
    assert not torch.equal(data.take(20, seed=3).ids, data.take(20, seed=4).ids)
    assert torch.equal(data.take(30).ids[:20], data.take(20).ids)
    assert data.take(21).y.bincount().tolist() == [7, 7, 7]
    plain = data.take(20, balanced=False)
    assert plain.ids.tolist() == (100 + np.random.RandomState(0).permutation(60)[:20]).tolist()
    assert len(data.take(0)) == 0
    for n in (-1, 61):
        with pytest.raises(ValueError, match=f'cannot take {n} of 60'):
            data.take(n)


def test_of_class_and_to():
    data = make(30)
    for number, name in enumerate(data.classes):
        assert same(data.of_class(name), data.of_class(number))
        assert (data.of_class(name).y == number).all()
    for wrong in ('C0', 3, -1, None):
        with pytest.raises(ValueError, match='there are: c0, c1, c2'):
            data.of_class(wrong)
    moved = data.to('meta')
    assert {t.device.type for t in (moved.x, moved.y, moved.ids)} == {'meta'} and moved.name == data.name


# digits, MNIST

def test_digits_are_the_same_for_everybody():
    train, test = digits()
    assert (len(train), len(test)) == (1297, 500)
    assert test.y.bincount().tolist() == [50] * 10
    assert sorted(train.ids.tolist() + test.ids.tolist()) == list(range(1797))
    fingerprint = hashlib.sha256(torch.cat([test.ids, train.ids]).numpy().astype('<i8').tobytes()).hexdigest()
    # The split may never change: results and weights refer to it.
    assert fingerprint == '5b26adab038071ffb552b5ab40d5d44a683c3d58fc5017cc3997a431033cd106'


def bilinear(size: int) -> np.ndarray:
    "Weights (size, 8): each enlarged pixel mixes the two whose centres it lies between."
    weights = np.zeros((size, 8))
    for i in range(size):
        centre = min(max((i + 0.5) * 8 / size - 0.5, 0), 7)
        below = min(int(centre), 6)
        weights[i, below + 1] = centre - below
        weights[i, below] = 1 - weights[i, below + 1]
    return weights


@pytest.mark.parametrize('size', [8, 28, 32])
def test_digits_against_the_source(size):
    from sklearn.datasets import load_digits
    raw = load_digits()
    for part in digits(size):
        assert part.x.shape == (len(part), 1, size, size) and part.x.dtype == torch.float32
        assert part.x.min() == 0 and part.x.max() == 1 and part.bounds == (0, 1)
        assert part.y.dtype == part.ids.dtype == torch.int64
        assert torch.equal(part.y, torch.from_numpy(raw.target)[part.ids])
        enlarged = bilinear(size) @ (raw.images[part.ids] / 16) @ bilinear(size).T
        np.testing.assert_allclose(part.x[:, 0], enlarged, atol=1e-6)
        for n in (10, 95, 300):
            counts = part.y[:n].bincount(minlength=10)
            assert counts.max() - counts.min() <= 1, 'every beginning is balanced'
    assert [part.name for part in digits(size)] == [f'digits{"" if size == 8 else size} {p}' for p in ('train', 'test')]


def test_digits_refuses_other_sizes():
    with pytest.raises(ValueError, match='8, 28 and 32; got 16'):
        digits(16)


def test_mnist(data_root):
    train, test = mnist(data_root)
    assert (len(train), len(test)) == (60_000, 10_000)
    assert train.x.shape[1:] == (1, 28, 28) and train.x.dtype == torch.float32 and train.y.dtype == torch.int64
    assert (float(train.x.min()), float(train.x.max())) == (0, 1)
    assert float(train.x.mean()) == pytest.approx(0.1307, abs=1e-4)
    assert test.y.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert train.name == 'mnist train' and test.classes == tuple('0123456789')


def test_mnist_that_is_not_there(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match='MNIST/raw'):
        mnist(tmp_path, download=False)
    monkeypatch.setenv('ROBUSTNB_HOME', str(tmp_path / 'home'))
    with pytest.raises(FileNotFoundError, match='home'):
        mnist(download=False)

    from torchvision.datasets import MNIST

    def offline(self):
        raise urllib.error.URLError('no route to host')
    monkeypatch.setattr(MNIST, 'download', offline)
    with pytest.raises(FileNotFoundError, match='no route to host.*digits'):
        mnist(tmp_path)


@pytest.mark.parametrize('error', [
    ImportError('No module named torchvision'), RuntimeError('operator torchvision::nms does not exist'),
])
def test_mnist_with_a_broken_torchvision(error, monkeypatch):
    class Broken(types.ModuleType):
        def __getattr__(self, name):
            raise error
    monkeypatch.setitem(sys.modules, 'torchvision', Broken('torchvision'))
    with pytest.raises(ImportError, match='(No module|nms).*built for another torch.*pip install torch torchvision'):
        mnist()


def test_torchvision_and_sklearn_are_imported_late():
    import subprocess
    code = "import sys, robustnb.data; print([m for m in ('torchvision', 'sklearn', 'pandas') if m in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.strip() == '[]'


def test_load_data():
    for name in ('digits', 'digits28', 'digits32'):
        assert load_data(name).test.name == f'{name} test'
    assert 'mnist' in DATA
    with pytest.raises(ValueError, match="no data set 'cifar'; there are: digits"):
        load_data('cifar')


def test_load_data_hands_the_root_on(data_root):
    assert len(load_data('mnist', data_root).test) == 10_000


# from_arrays

@pytest.mark.parametrize('kind', ['float16', 'float32', 'float64', '>f8', 'int64', 'bool'])
@pytest.mark.parametrize('label_kind', ['int8', 'uint8', 'int32', 'int64', 'uint16', '>i4'])
def test_from_arrays_kinds(kind, label_kind):
    x = np.array([[0, 1], [1, 0], [1, 1]]).astype(kind)
    y = np.array([1, 0, 2]).astype(label_kind)
    if kind == 'bool':
        x = x.astype('uint8') * 255
    data = from_arrays(x, y)
    assert data.x.dtype == torch.float32 and data.y.dtype == data.ids.dtype == torch.int64
    assert data.x.tolist() == [[0, 1], [1, 0], [1, 1]] and data.y.tolist() == [1, 0, 2]
    assert data.classes == ('0', '1', '2')


def test_from_arrays_takes_what_people_have():
    x = torch.linspace(0, 1, 12).view(4, 3).requires_grad_()
    assert not from_arrays(x, [0, 1, 1, 0]).x.requires_grad
    assert torch.equal(from_arrays(x.detach().numpy()[::-1], np.arange(4)[::-1]).x, x.detach().flip(0))
    assert from_arrays([[0, 1], [0.5, 0.5]], [0, 1]).x.tolist() == [[0, 1], [0.5, 0.5]]
    assert from_arrays(x, torch.zeros(4, dtype=torch.uint8), classes=['only']).classes == ('only',)
    assert from_arrays(x, [0, 1, 1, 0], classes=np.array(['a', 'b', 'c'])).classes == ('a', 'b', 'c')
    assert from_arrays(1000 * x - 3, [0] * 4, bounds=None).bounds is None
    frozen = np.random.default_rng(0).random((4, 3), dtype=np.float32)
    frozen.flags.writeable = False
    assert len(from_arrays(frozen, [0] * 4)) == 4


def test_from_arrays_copies():
    for x in (np.zeros((2, 2), dtype=np.float32), torch.zeros(2, 2)):
        y = np.array([0, 1])
        data = from_arrays(x, y)
        x += 1
        y += 1
        assert data.x.sum() == 0 and data.y.tolist() == [0, 1]


def test_from_arrays_scales_bytes_and_says_so(caplog):
    images = np.random.default_rng(0).integers(0, 256, (3, 1, 2, 2), dtype=np.uint8)
    with caplog.at_level(logging.INFO, logger='robustnb.data'):
        for x in (images, torch.from_numpy(images)):
            np.testing.assert_allclose(from_arrays(x, [0, 1, 2], name='bytes').x, images / 255, rtol=1e-6)
        assert caplog.messages == ['bytes: uint8 samples are divided by 255, to lie in [0, 1]'] * 2
        caplog.clear()
        assert torch.equal(from_arrays(images, [0, 1, 2], bounds=(0, 255)).x, torch.from_numpy(images).float())
        assert not caplog.messages


@pytest.mark.parametrize('x, y, kw, message', [
    (np.zeros((3, 2)), [0, 1], {}, r'expected \(3,\)'),
    (np.zeros((2, 2)), [[0], [1]], {}, r'expected \(2,\)'),
    (np.zeros((2, 2)), np.eye(2), {}, r'y\.argmax'),
    (np.zeros((2, 2)), [0.0, 1.0], {}, 'integer class indices'),
    (np.zeros((2, 2)), [True, False], {}, 'integer class indices'),
    (np.zeros((2, 2)), ['cat', 'dog'], {}, 'np.unique'),
    (np.zeros((2, 2)), [0, -1], {}, 'run from -1 to 0'),
    (np.zeros((2, 2)), [0, 2], {'classes': 'ab'}, 'run from 0 to 2'),
    (np.zeros(2), [0, 1], {}, 'one row each'),
    (np.zeros(()), 0, {}, 'one row each'),
    (np.array([[0, np.nan], [0, 0]]), [0, 1], {}, 'sample 0'),
    (np.array([[0, 0], [0, np.inf]]), [0, 1], {'bounds': None}, 'sample 1'),
    (np.array([[0, 2.0], [0, 0]]), [0, 1], {}, r'outside the bounds \(0, 1\)'),
    (np.array([[0, -1], [0, 0]]), [0, 1], {}, 'Normalized'),
    (np.array([['a', 'b']]), [0], {}, 'are not numbers'),
    (np.array([[1j, 0]]), [0], {}, 'are not numbers'),
    ([[0, 1], [0]], [0, 1], {}, 'inhomogeneous'),
])
def test_from_arrays_refuses(x, y, kw, message):
    with pytest.raises((ValueError, TypeError), match=message):
        from_arrays(x, y, **kw)


# batches

@settings(max_examples=60, deadline=None)
@given(st.integers(0, 23), st.integers(1, 9), st.none() | st.integers(0, 5), st.none() | st.integers(0, 30))
def test_batches_of_samples_in_memory(n, batch_size, shuffle, limit):
    data = make(n)
    found = list(batches(data, batch_size, shuffle=shuffle, limit=limit))
    expected = min(n, n if limit is None else limit)
    assert sum(len(b.x) for b in found) == expected
    assert all(len(b.x) == batch_size for b in found[:-1])
    assert all(len(b.x) == len(b.y) == len(b.ids) > 0 for b in found)
    for b in found:
        assert torch.equal(b.x, data.x[b.ids - 100]) and torch.equal(b.y, data.y[b.ids - 100])
    order = np.arange(n) if shuffle is None else np.random.RandomState(shuffle).permutation(n)
    assert [int(i) - 100 for b in found for i in b.ids] == order[:expected].tolist()


def test_batches_do_not_depend_on_the_batch_size():
    data = make(23)
    for shuffle in (None, 4):
        whole, = batches(data, 23, shuffle=shuffle)
        for batch_size in (1, 5, 22, 100):
            parts = zip(*batches(data, batch_size, shuffle=shuffle), strict=True)
            for pieces, column in zip(parts, whole, strict=True):
                assert torch.equal(torch.cat(pieces), column)


def test_batches_of_pairs():
    data = make(7)
    x, y = data.x, data.y
    for pair in ((x, y), [x, y], (x.numpy(), y.numpy()), (x.double().numpy(), y)):
        found = list(batches(pair, 3))
        assert [len(b.x) for b in found] == [3, 3, 1]
        assert torch.cat([b.ids for b in found]).tolist() == list(range(7))
        assert torch.equal(torch.cat([b.x for b in found]), x) and found[0].x.dtype == torch.float32
        assert torch.equal(torch.cat([b.y for b in found]), y)
    with pytest.raises(ValueError, match='7 samples, 6 labels'):
        batches((x, y[:6]))
    again = list(batches(next(batches(data, 5)), 2))
    assert torch.cat([b.ids for b in again]).tolist() == list(range(100, 105)), 'a Batch keeps its ids'


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('limit', [None, 0, 4, 8, 9, 50])
def test_batches_of_a_loader(workers, limit):
    data = make(10)
    loader = DataLoader(data, batch_size=4, num_workers=workers, generator=torch.Generator())
    found = list(batches(loader, batch_size=3, limit=limit))
    expected = 10 if limit is None else min(limit, 10)
    assert sum(len(b.x) for b in found) == expected
    if limit is None:
        assert [len(b.x) for b in found] == [4, 4, 2], 'its own batch size, and a short last batch'
    ids = torch.cat([b.ids for b in found]) if found else torch.arange(0)
    assert ids.tolist() == list(range(expected)), 'ids count up in order'
    if found:
        assert torch.equal(torch.cat([b.x for b in found]), data.x[:expected])


def test_batches_ask_for_no_more_than_they_need():
    asked = []

    def source():
        for i in range(5):
            asked.append(i)
            yield torch.full((4, 1), float(i)), torch.zeros(4, dtype=torch.int64)
    assert [len(b.x) for b in batches(source(), limit=8)] == [4, 4]
    assert asked == [0, 1]
    asked.clear()
    assert list(batches(source(), limit=0)) == [] and asked == []
    assert [len(b.x) for b in batches(source(), limit=6)] == [4, 2] and asked == [0, 1]


def test_batches_pass_ids_through():
    data = make(9)
    again = list(batches(batches(data, 4)))
    assert torch.equal(torch.cat([b.ids for b in again]), data.ids)


def test_batches_of_torch_data_sets():
    data = make(10)
    for held in (TensorDataset(data.x, data.y), Subset(data, range(10))):
        found = list(batches(held, 4))
        assert [len(b.x) for b in found] == [4, 4, 2]
        assert torch.equal(torch.cat([b.x for b in found]), data.x)

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(zip(data.x, data.y, strict=True))
    assert [len(b.x) for b in batches(Stream(), 4)] == [4, 4, 2]
    assert size_of(Stream()) is None and size_of(DataLoader(Stream(), 4)) is None


def test_batches_move_to_a_device():
    data = make(5)
    for source in (data, (data.x, data.y), [(data.x, data.y)]):
        for batch in batches(source, 2, device='meta'):
            assert isinstance(batch, Batch) and {t.device.type for t in batch} == {'meta'}


@pytest.mark.parametrize('source, message', [
    ([{'image': 1}], 'got dict'),
    ([(torch.zeros(2, 1),)], '1 things'),
    ([(torch.zeros(2, 1), torch.zeros(2), torch.zeros(2))], '3 things'),
    ([torch.zeros(2, 1)], 'got Tensor'),
    ([(torch.zeros(1), 0)], 'single samples'),
    ([(torch.zeros(2, 1), torch.zeros(3))], '2 samples and 3 labels'),
    ([(torch.zeros(2, 1), ['cat', 'dog'])], 'np.unique'),
    (3, 'not iterable'),
])
def test_batches_refuse(source, message):
    with pytest.raises((TypeError, ValueError), match=message):
        list(batches(source))


def test_batches_check_before_the_first_batch():
    for wrong in ({'batch_size': 0}, {'limit': -1}):
        with pytest.raises(ValueError, match='starts at 1'):
            batches(make(), **wrong)
    with pytest.raises(ValueError, match='DataLoader'):
        batches([], shuffle=0)


# questions about data

def test_size_bounds_classes():
    data = DataSet(torch.zeros(10, 2), torch.zeros(10, dtype=int), ('a', 'b'), bounds=(-1, 3))
    private = {'generator': torch.Generator()}  # a loader draws a seed for its workers each time
    loader = DataLoader(data, batch_size=4, **private)
    pair = (data.x, data.y)
    listed = [pair, (data.x[:3], data.y[:3])]
    sources = {
        'data': (data, 10, (-1, 3), ('a', 'b')),
        'pair': (pair, 10, (0, 1), None),
        'batch': (Batch(*pair, data.ids), 10, (0, 1), None),
        'loader': (loader, 10, (-1, 3), ('a', 'b')),
        'whole batches': (DataLoader(data, 4, drop_last=True, **private), 8, (-1, 3), ('a', 'b')),
        'part': (DataLoader(Subset(data, [1, 2, 3]), 2, **private), 3, (-1, 3), ('a', 'b')),
        'tensors': (TensorDataset(*pair), 10, (0, 1), None),
        'list': (listed, 13, (0, 1), None),
        'generator': ((p for p in listed), None, (0, 1), None),
        'sampler': (DataLoader(data, batch_sampler=[[0, 1], [2]]), None, (-1, 3), ('a', 'b')),
    }
    for name, (source, size, bounds, classes) in sources.items():
        assert (size_of(source), bounds_of(source), classes_of(source)) == (size, bounds, classes), name
        if size is not None:
            assert sum(len(b.x) for b in batches(source)) == size, name


# assets

def test_asset(tmp_path, monkeypatch):
    package = tmp_path / 'package'
    (package / 'assets' / 'folder').mkdir(parents=True)
    (package / 'assets' / 'tiny.safetensors').write_bytes(b'123')
    (package / 'secret').write_text('x')
    monkeypatch.setattr(data_module.resources, 'files', lambda name: package)
    assert asset('tiny.safetensors').read_bytes() == b'123'
    for name in ('tiny', '../secret', 'folder', str(package / 'secret')):
        with pytest.raises(FileNotFoundError, match='there are: tiny.safetensors'):
            asset(name)
    monkeypatch.setattr(data_module.resources, 'files', lambda name: tmp_path)
    with pytest.raises(FileNotFoundError, match='there are: none'):
        asset('tiny.safetensors')


def test_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv('ROBUSTNB_HOME', str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.setenv('HOME', str(tmp_path))
    for value in (None, ''):
        monkeypatch.delenv('ROBUSTNB_HOME') if value is None else monkeypatch.setenv('ROBUSTNB_HOME', value)
        assert cache_folder() == tmp_path / '.cache' / 'robustnb'
