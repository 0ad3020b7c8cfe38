"""Data: order, ids and seeds; what is accepted and what is refused; files, downloads, loaders with workers."""
import copy
import errno
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
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from robustnb import data as data_module
from robustnb.data import (
    DATA,
    Batch,
    DataSet,
    ImageFiles,
    asset,
    batches,
    bounds_of,
    cache_folder,
    can_shuffle,
    cifar10,
    cifar100,
    classes_of,
    digits,
    from_arrays,
    from_folder,
    load_data,
    mnist,
    moons,
    size_of,
    tiny_imagenet,
)
from robustnb.guard import match_dtype


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
    with pytest.raises(ValueError, match=r'none with a name, so give them: DataSet\(x, y, classes='):
        DataSet(data.x, data.y).of_class(1)
    moved = data.to('meta')
    assert {t.device.type for t in (moved.x, moved.y, moved.ids)} == {'meta'} and moved.name == data.name


# digits, moons, and what torchvision downloads

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


def test_moons():
    train, test = moons(n_train=101, n_test=40, noise=0)
    assert (len(train), len(test), train.name, test.name) == (101, 40, 'moons train', 'moons test')
    assert train.x.dtype == torch.float32 and train.y.dtype == torch.int64 and train.bounds is None
    assert test.y.bincount().tolist() == [20, 20] and sorted(train.ids.tolist() + test.ids.tolist()) == list(range(141))
    x, ids = torch.cat([train.x, test.x]), torch.cat([train.ids, test.ids])
    angle = torch.linspace(0, np.pi, 70)
    upper = torch.stack([angle.cos(), angle.sin()], 1)
    torch.testing.assert_close(x[ids.argsort()][:70], upper, atol=1e-6, rtol=0)
    assert same(moons(seed=3).train, moons(seed=3).train)
    assert not torch.equal(moons(seed=3).test.x, moons(seed=4).test.x)
    spread = moons(20_000, 0, noise=0.2).train.x - moons(20_000, 0, noise=0).train.x
    assert float(spread.std()) == pytest.approx(0.2, rel=0.02)
    assert len(moons(n_train=0).train) == 0
    for wrong in ({'n_train': -1}, {'n_train': 0, 'n_test': 1}, {'noise': -1}):
        with pytest.raises(ValueError, match='two points|noise'):
            moons(**wrong)


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


class FakeDownload:
    "Stands for a data set of torchvision: 20 images to train, 10 to test, in torchvision's shapes."
    error = None
    classes = ['cat', 'dog']

    def __init__(self, root, train, download):
        if self.error is not None:
            raise self.error
        n = 20 if train else 10
        self.data = np.arange(n * 32 * 32 * 3, dtype=np.uint32).astype(np.uint8).reshape(n, 32, 32, 3)
        self.targets = [i % 2 for i in range(n)]


@pytest.fixture
def torchvision_fakes(monkeypatch):
    from torchvision import datasets
    kind = type('Fake', (FakeDownload,), {})
    for name in ('MNIST', 'CIFAR10', 'CIFAR100'):
        monkeypatch.setattr(datasets, name, kind)
    return kind


@pytest.mark.parametrize('load, name', [(cifar10, 'cifar10'), (cifar100, 'cifar100')])
def test_cifar_from_torchvision(load, name, torchvision_fakes, tmp_path):
    train, test = load(tmp_path)
    assert (train.name, test.name, train.classes) == (f'{name} train', f'{name} test', ('cat', 'dog'))
    raw = torchvision_fakes(tmp_path, False, False)
    assert test.x.shape == (10, 3, 32, 32) and test.x.is_contiguous() and test.x.dtype == torch.float32
    np.testing.assert_allclose(test.x, raw.data.transpose(0, 3, 1, 2) / 255, rtol=1e-6)
    assert test.y.tolist() == raw.targets and test.y.dtype == torch.int64 and len(train) == 20


@pytest.mark.parametrize('load, by_hand', [
    (mnist, r'its four files .* into \S+MNIST/raw'), (cifar10, r'cifar-10-python\.tar\.gz from https://www\.cs\.toronto\.edu'),
    (cifar100, r'cifar-100-python\.tar\.gz from https://www\.cs\.toronto\.edu'),
])
@pytest.mark.parametrize('error, download, cause', [
    (urllib.error.URLError('no route to host'), True, 'no route to host.*is this machine offline'),
    (urllib.error.HTTPError('https://x', 503, 'busy', None, None), True, '503.*not reached'),
    (RuntimeError('Error downloading t10k.gz:\nTried https://x, got:\n<urlopen error>'), True, 'is this machine offline'),
    (ConnectionResetError(errno.ECONNRESET, 'reset by peer'), True, 'is this machine offline'),
    (PermissionError(errno.EACCES, 'Permission denied'), True, 'root= names a folder that you may write to'),
    (OSError(errno.ENOSPC, 'No space left on device'), True, 'No space left.*has room'),
    (RuntimeError('File not found or corrupted.'), True, 'damaged, such as half a download, or a web page'),
    (EOFError('Compressed file ended early'), True, 'half a download'),
    (AssertionError(), False, 'damaged'),
    (RuntimeError('Dataset not found or corrupted.'), False, r'download=True fetches it'),
])
def test_failed_downloads(load, by_hand, error, download, cause, torchvision_fakes, tmp_path):
    torchvision_fakes.error = error
    with pytest.raises(FileNotFoundError, match=f'(?s){cause}.*{by_hand}.*Without a download: digits') as caught:
        load(tmp_path, download)
    assert caught.value.__cause__ is error


def test_half_a_file(data_root, tmp_path):
    "The real class of torchvision, on a file that was cut off and on a page in place of images."
    raw = tmp_path / 'MNIST' / 'raw'
    raw.mkdir(parents=True)
    for file in (data_root / 'MNIST' / 'raw').glob('*-ubyte'):
        (raw / file.name).symlink_to(file)
    images = raw / 'train-images-idx3-ubyte'
    for content in (images.read_bytes()[:100_000], b'<html>Please log in</html>'):
        images.unlink()
        images.write_bytes(content)
        with pytest.raises(FileNotFoundError, match='damaged'):
            mnist(tmp_path, download=False)


@pytest.mark.parametrize('error', [
    ImportError('No module named torchvision'), RuntimeError('operator torchvision::nms does not exist'),
])
def test_a_broken_torchvision(error, monkeypatch):
    class Broken(types.ModuleType):
        def __getattr__(self, name):
            raise error
    monkeypatch.setitem(sys.modules, 'torchvision', Broken('torchvision'))
    for load in (mnist, cifar10):
        with pytest.raises(ImportError, match='(No module|nms).*built for another torch.*pip install.*moons.. need neither'):
            load()


def test_torchvision_and_sklearn_are_imported_late():
    import subprocess
    code = "import sys, robustnb.data; print([m for m in ('torchvision', 'sklearn', 'pandas') if m in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.strip() == '[]'


def test_load_data():
    for name in ('digits', 'digits28', 'digits32', 'moons'):
        assert load_data(name).test.name == f'{name} test'
    assert {'mnist', 'cifar10', 'cifar100', 'tiny_imagenet'} < DATA.keys()
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


def test_from_arrays_scales_bytes_and_says_so_once(caplog):
    images = np.random.default_rng(0).integers(0, 256, (3, 1, 2, 2), dtype=np.uint8)
    data_module._say_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger='robustnb.data'):  # the level that Python shows by itself
        for x in (images, torch.from_numpy(images), np.asfortranarray(images)):
            data = from_arrays(x, [0, 1, 2], name='bytes')
            np.testing.assert_allclose(data.x, images / 255, rtol=1e-6)
            assert data.x.is_contiguous()
        assert caplog.messages == ['bytes: uint8 samples are divided by 255, to lie in [0, 1]']
        caplog.clear()
        assert torch.equal(from_arrays(images, [0, 1, 2], bounds=(0, 255)).x, torch.from_numpy(images).float())
        assert not caplog.messages


def test_from_arrays_of_nothing():
    for y in ([], np.zeros(0, dtype=int), torch.zeros(0)):
        data = from_arrays(np.zeros((0, 3, 4, 4)), y, classes=['a', 'b'])
        assert len(data) == 0 and data.x.shape == (0, 3, 4, 4) and data.y.dtype == torch.int64
        assert list(batches(data)) == []


NAN, INF = np.array([[0, np.nan], [0, 0]]), np.array([[0, 0], [0, np.inf]])
ZEROS, PHOTOS = np.zeros((2, 2)), np.zeros((2, 8, 8, 3), dtype=np.uint8)

# What people hand over -> what the error says: a piece of what was got, and of what to do.
BAD_ARRAYS = {
    'a NaN': (NAN, [0, 1], {}, 'NaN or infinity in sample 0; repair them'),
    'an infinity, unbounded': (INF, [0, 1], {'bounds': None}, 'NaN or infinity in sample 1'),
    'above the bounds': (2 + ZEROS, [0, 1], {}, r'outside the bounds \(0, 1\)'),
    'normalised': (ZEROS - 1, [0, 1], {}, r'\[-1, -1\].*Normalized'),
    'images as floats 0-255': (PHOTOS.transpose(0, 3, 1, 2) + 200.0, [0, 1], {}, r'\[200, 200\].*give x / 255'),
    'channels last': (PHOTOS, [0, 1], {}, r'\(2, 8, 8, 3\).*x\.transpose\(0, 3, 1, 2\)'),
    'channels last, grey tensor': (torch.zeros(2, 8, 8, 1), [0, 1], {}, r'x\.permute\(0, 3, 1, 2\)'),
    'one number a sample': (np.zeros(2), [0, 1], {}, r'shape \(n, \.\.\.\), one row each; got \(2,\)'),
    'one number': (np.zeros(()), 0, {}, 'one row each'),
    'words as samples': (np.array([['a', 'b']]), [0], {}, 'samples of type <U1 are not numbers'),
    'complex samples': (np.array([[1j, 0]]), [0], {}, 'are not numbers'),
    'complex tensor': (torch.zeros(2, 2) + 1j, [0, 1], {}, 'samples of type complex64 are not numbers'),
    'rows of different lengths': ([[0, 1], [0]], [0, 1], {}, 'inhomogeneous'),
    'too few labels': (np.zeros((3, 2)), [0, 1], {}, r'labels have shape \(2,\), expected \(3,\)'),
    'labels in a column': (ZEROS, [[0], [1]], {}, r'of shape \(2, 1\).*y\[:, 0\]'),
    'one-hot floats': (ZEROS, np.eye(2), {}, r'float32 of shape \(2, 2\).*expected integer.*y\.argmax\(1\)'),
    'one-hot integers': (ZEROS, np.eye(2, dtype=int), {}, r'y\.argmax\(1\)'),
    'whole floats': (ZEROS, [0.0, 1.0], {}, r'float32.*y\.astype\(int\)'),
    'fractions': (ZEROS, [0.5, 1.0], {}, 'float32; expected integer class indices'),
    'NaN labels': (ZEROS, [0, np.nan], {}, 'expected integer class indices'),
    'truth values': (ZEROS, [True, False], {}, r'bool.*y\.astype\(int\)'),
    'words as labels': (ZEROS, ['cat', 'dog'], {}, r'np\.unique\(y, return_inverse=True\)'),
    'no label': (ZEROS, [0, -1], {}, 'from -1 to 0, expected 0 and above.*leave those samples out'),
    'more labels than names': (ZEROS, [0, 2], {'classes': 'ab'}, 'from 0 to 2, but `classes` holds 2 names'),
    'counted from 1': (ZEROS, [1, 2], {'classes': 'ab'}, 'count them from 0: y - 1'),
    'ids as labels': (ZEROS, [0, 10**9], {}, 'too many for classes'),
}


@pytest.mark.parametrize('x, y, kw, message', BAD_ARRAYS.values(), ids=BAD_ARRAYS)
def test_from_arrays_refuses(x, y, kw, message):
    with pytest.raises((ValueError, TypeError), match=message):
        from_arrays(x, y, **kw)


@pytest.mark.parametrize('shape', [(2, 3, 8, 3), (2, 1, 8, 1), (2, 3, 8, 8), (2, 8, 3), (2, 8, 8, 8, 3), (2, 3)])
def test_channels_last_is_not_seen_where_it_is_not(shape):
    assert from_arrays(np.zeros(shape), [0, 1]).x.shape == shape


@pytest.mark.parametrize('x, y, ids, message', [
    (np.zeros((2, 2)), torch.arange(2), None, 'samples must be a tensor.*got ndarray; from_arrays'),
    (torch.zeros(2, 2), [0, 1], None, 'labels must be a tensor.*got list'),
    (torch.zeros(2, 2), torch.arange(2), [0, 1], 'ids must be a tensor.*got list'),
    (torch.tensor(1.0), torch.tensor(1), None, 'samples must be.*got a single number'),
])
def test_a_data_set_is_made_of_tensors(x, y, ids, message):
    with pytest.raises(TypeError, match=message):
        DataSet(x, y, ids=ids)


def strips(folder, *names) -> np.ndarray:
    "Images kept as strips: one a row, 32 x 32 pixels one after the other."
    return np.concatenate([np.asarray(Image.open(folder / f'{name}.png')).reshape(1000, 32, 32, 3) for name in names])


def test_cifar10_from_arrays(data_root):
    folder = data_root / 'cifar10'
    if not folder.is_dir():
        pytest.skip(f'no real data: {folder} is not a folder')
    labels = np.loadtxt(folder / 'labels.txt', dtype=int)
    assert len(labels) == 51_000 and np.bincount(labels[:50_000]).tolist() == [5000] * 10
    images = strips(folder, 'train_00', 'train_01')
    with pytest.raises(ValueError, match='channels last'):
        from_arrays(images, labels[:2000])
    train = from_arrays(images.transpose(0, 3, 1, 2), labels[:2000], name='cifar10 train')
    test = from_arrays(strips(folder, 'test_00').transpose(0, 3, 1, 2), labels[50_000:], name='cifar10 test')
    for part in (train, test):
        assert part.x.shape[1:] == (3, 32, 32) and (float(part.x.min()), float(part.x.max())) == (0, 1)
        assert part.y.bincount(minlength=10).min() > 0.08 * len(part), 'no class is rare'
        assert part.take(500).y.bincount().tolist() == [50] * 10
    # The published means of the training set; 2,000 images come close to them.
    assert train.x.mean((0, 2, 3)).tolist() == pytest.approx([0.4914, 0.4822, 0.4465], abs=0.01)
    np.testing.assert_array_equal((255 * train.x[7]).round().byte().permute(1, 2, 0), images[7])


# images in files

def write_images(root, classes=('ant', 'bee', 'cat'), each=4, size=(8, 8), ending='png', seed=0):
    "Images of noise, one folder for each class; hands their pixels back, by path."
    rng = np.random.default_rng(seed)
    written = {}
    for name in classes:
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(each):
            path = root / name / f'{i}.{ending}'
            written[path] = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(written[path]).save(path)
    return written


def test_image_files_read_what_was_written(tmp_path):
    written = write_images(tmp_path / 'pets')
    files = from_folder(tmp_path / 'pets')
    assert (len(files), files.classes, files.name, files.bounds) == (12, ('ant', 'bee', 'cat'), 'pets', (0, 1))
    assert repr(files) == 'ImageFiles(pets: 12 images, in [0, 1], 3 classes)'
    assert files.y.tolist() == [0] * 4 + [1] * 4 + [2] * 4 and files.ids.tolist() == list(range(12))
    for path, (x, y) in zip(files.paths, files, strict=True):
        assert x.dtype == torch.float32 and x.is_contiguous() and path.parent.name == files.classes[y]
        np.testing.assert_allclose(x, written[path].transpose(2, 0, 1) / 255, rtol=1e-6)
    whole = files.read(show_progress=False)
    assert isinstance(whole, DataSet) and torch.equal(whole.x[3], files[3][0]) and torch.equal(whole.ids, files.ids)


def test_image_files_are_drawn_as_samples_in_memory_are(tmp_path):
    write_images(tmp_path, each=5)
    files = from_folder(tmp_path)
    held = files.read(show_progress=False)
    for kw in ({}, {'seed': 3}, {'balanced': False}):
        assert same(files.take(7, **kw, show_progress=False), held.take(7, **kw))
    for index in (slice(2, 9, 3), [4, 0, 4], [], np.array([3, 1]), held.y == 1, np.arange(15)[::-1], [-1]):
        part = files[index]
        assert isinstance(part, ImageFiles) and same(part.read(show_progress=False), held[index]) or not len(part)
        assert torch.equal(part.ids, held[index].ids) and (part.classes, part.name) == (files.classes, files.name)
    bees = files.of_class('bee')
    assert same(bees[1:].take(2, show_progress=False), held.of_class(1)[1:].take(2)), 'ids survive selection after selection'
    assert files.take(0, show_progress=False).x.shape[0] == 0
    for wrong in (-1, 16):
        with pytest.raises(ValueError, match=f'cannot take {wrong} of 15'):
            files.take(wrong)
    with pytest.raises(IndexError):
        files[15]
    with pytest.raises(ValueError, match='there are: ant, bee, cat'):
        files.of_class('dog')


def test_image_files_are_read_when_they_are_needed(tmp_path, monkeypatch):
    write_images(tmp_path)
    opened = []
    read = data_module._read_image
    monkeypatch.setattr(data_module, '_read_image', lambda path, size: opened.append(path) or read(path, size))
    files = from_folder(tmp_path)
    assert (size_of(files), bounds_of(files), classes_of(files), len(files.of_class(1))) == (12, (0, 1), files.classes, 4)
    assert not opened
    next(batches(files, 3))
    assert opened == list(files.paths[:3])
    next(batches(files, 3, limit=2))
    assert len(opened) == 6


@pytest.mark.parametrize('shuffle', [None, 0, 5])
def test_batches_of_image_files(tmp_path, shuffle):
    write_images(tmp_path)
    files = from_folder(tmp_path)[2:]
    held = files.read(show_progress=False)
    assert can_shuffle(files)
    kw = {'batch_size': 4, 'shuffle': shuffle, 'limit': 9}
    for ours, expected in zip(batches(files, **kw), batches(held, **kw), strict=True):
        assert all(map(torch.equal, ours, expected)), 'streamed as if they lay in memory'


@pytest.mark.parametrize('workers', [0, 2])
def test_loaders_of_image_files(tmp_path, workers):
    write_images(tmp_path)
    files = copy.deepcopy(from_folder(tmp_path))  # by the protocol that sends it to a worker
    for data in (files, Subset(files, range(2, 12))):
        loader = DataLoader(data, 4, num_workers=workers, generator=torch.Generator())
        assert (size_of(loader), bounds_of(loader), classes_of(loader)) == (len(data), (0, 1), files.classes)
        x = torch.cat([b.x for b in batches(loader)])
        assert torch.equal(x, torch.stack([data[i][0] for i in range(len(data))]))


@pytest.mark.parametrize('mode', ['L', '1', 'P', 'LA', 'RGBA', 'CMYK', 'RGB'])
def test_every_image_becomes_rgb(tmp_path, mode):
    grey = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 4), dtype=np.uint8))
    (tmp_path / 'a').mkdir()
    grey.convert(mode).save(tmp_path / 'a' / '0.tif')
    x, _ = from_folder(tmp_path)[0]
    assert x.shape == (3, 5, 4) and 0 <= x.min() <= x.max() <= 1
    expected = np.asarray(Image.open(tmp_path / 'a' / '0.tif').convert('RGB')).transpose(2, 0, 1) / 255
    np.testing.assert_allclose(x, expected, rtol=1e-6)
    if mode == 'L':
        assert torch.equal(x[0], x[1]) and torch.equal(x[0], x[2])


@pytest.mark.parametrize('shape', [(40, 30), (30, 40), (31, 31), (9, 100), (33, 32)])
@pytest.mark.parametrize('size', [8, 31, 50])
def test_size_is_what_torchvision_makes_of_it(tmp_path, shape, size):
    from torchvision.transforms import CenterCrop, Compose, Resize, ToTensor
    path, = write_images(tmp_path, ('a',), 1, shape)
    expected = Compose([Resize(size), CenterCrop(size), ToTensor()])(Image.open(path).convert('RGB'))
    x, _ = from_folder(tmp_path, size)[0]
    assert x.shape == (3, size, size)
    torch.testing.assert_close(x, expected, atol=1e-6, rtol=0)


def test_from_folder_against_image_folder(tmp_path):
    from torchvision.datasets import ImageFolder
    write_images(tmp_path, ('b', 'A', 'c 1', 'ä'), ending='jpg')
    for hidden in (tmp_path / '.ipynb_checkpoints', tmp_path / 'b' / '.ipynb_checkpoints'):
        write_images(hidden.parent, (hidden.name,), 1)
    (tmp_path / 'b' / '._0.jpg').write_bytes(b'what another system leaves behind')
    (tmp_path / 'b' / 'Thumbs.db').write_bytes(b'')
    write_images(tmp_path / 'b', ('deeper',), 1)
    files = from_folder(tmp_path)
    assert files.classes == ('A', 'b', 'c 1', 'ä') and files.y.bincount().tolist() == [4, 5, 4, 4]
    for part in (tmp_path / '.ipynb_checkpoints', tmp_path / 'b' / '.ipynb_checkpoints', tmp_path / 'b' / 'deeper'):
        for file in part.iterdir():
            file.unlink()
        part.rmdir()
    (tmp_path / 'b' / '._0.jpg').unlink()
    theirs, ours = ImageFolder(tmp_path), from_folder(tmp_path)
    assert list(ours.classes) == theirs.classes
    assert [(str(path), y) for path, y in zip(ours.paths, ours.y.tolist(), strict=True)] == theirs.samples


def test_links_are_followed_but_not_in_circles(tmp_path):
    write_images(tmp_path / 'elsewhere', ('more',), 2)
    write_images(tmp_path / 'root', ('ant', 'bee'), 2)
    (tmp_path / 'root' / 'ant' / 'linked').symlink_to(tmp_path / 'elsewhere' / 'more')
    (tmp_path / 'root' / 'bee' / 'itself').symlink_to('.')
    (tmp_path / 'root' / 'bee' / 'above').symlink_to('..')
    assert from_folder(tmp_path / 'root').y.tolist() == [0] * 4 + [1] * 2


def test_no_other_program_is_started_for_an_image(tmp_path, monkeypatch):
    "PIL hands PostScript to Ghostscript, whatever the file is called."
    from PIL import EpsImagePlugin
    monkeypatch.setattr(EpsImagePlugin, 'Ghostscript', lambda *args, **kw: pytest.fail('Ghostscript was started'))
    (tmp_path / 'a').mkdir()
    for name in ('photo.jpg', 'drawing.eps', 'drawing.ps'):
        (tmp_path / 'a' / name).write_bytes(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n')
    files = from_folder(tmp_path)
    assert [path.name for path in files.paths] == ['photo.jpg']
    with pytest.raises(ValueError, match='cannot identify image file'):
        files[0]


def test_the_first_picture_of_an_animation(tmp_path):
    write_images(tmp_path, ('a',), 2)
    first, second = (Image.open(tmp_path / 'a' / f'{i}.png') for i in (0, 1))
    first.save(tmp_path / 'a' / '2.webp', save_all=True, append_images=[second], lossless=True)
    files = from_folder(tmp_path)
    assert torch.equal(files[2][0], files[0][0]) and not torch.equal(files[1][0], files[0][0])


def test_images_of_different_sizes(tmp_path):
    write_images(tmp_path, ('a',), 2, (8, 8))
    write_images(tmp_path, ('b',), 2, (9, 8))
    files = from_folder(tmp_path)
    assert files[3][0].shape == (3, 8, 9), 'one by one is fine'
    assert [len(b.x) for b in batches(files, 2)] == [2, 2]
    message = r'different sizes.*0\.png is \(3, 8, 8\).*0\.png is \(3, 8, 9\); give size='
    with pytest.raises(ValueError, match=message):
        next(batches(files))
    with pytest.raises(ValueError, match=message):
        files.read(show_progress=False)
    with pytest.raises(ValueError, match='give size='):
        list(batches(DataLoader(files, 4, generator=torch.Generator())))
    assert next(batches(from_folder(tmp_path, size=6))).x.shape == (4, 3, 6, 6)


def broken_files(root):
    write_images(root, ('a',), 1)
    whole = (root / 'a' / '0.png').read_bytes()
    deep = Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000)
    deep.save(root / 'a' / 'deep.png')
    (root / 'a' / 'half.png').write_bytes(whole[:len(whole) // 2])
    (root / 'a' / 'page.png').write_text('<html>not found</html>')
    (root / 'a' / 'nothing.png').write_bytes(b'')


def test_files_that_are_no_images(tmp_path):
    broken_files(tmp_path)
    for size in (None, 4):
        files = from_folder(tmp_path, size)
        for path, message in {'deep': 'more than 8 bits', 'half': '', 'page': '', 'nothing': ''}.items():
            row = [p.stem for p in files.paths].index(path)
            with pytest.raises(ValueError, match=f'{path}.png cannot be read as an image.*{message}.*repair it or take it'):
                files[row]
    (tmp_path / 'a' / '0.png').unlink()
    with pytest.raises(ValueError, match='No such file'):
        files[0]


@pytest.mark.parametrize('make, message', [
    (lambda root: root.rmdir(), 'is not a folder; expected one sub-folder for each class'),
    (lambda root: None, 'holds 0 images and no sub-folder; expected'),
    (lambda root: write_images(root.parent, (root.name,), 3), 'holds 3 images and no sub-folder'),
    (lambda root: [write_images(root / part) for part in ('train', 'val')], r"parts of a data set.*from_folder\('.*train'\)"),
    (lambda root: [write_images(root / part) for part in ('Train', 'Test')], r"parts of a data set.*from_folder\('.*Test'\)"),
    (lambda root: (write_images(root), (root / 'dog').mkdir(), (root / 'eel').mkdir()), 'no images in dog, eel'),
    (lambda root: ((root / 'a').mkdir(), (root / 'a' / 'notes.txt').write_text('no image')), 'no images in a '),
])
def test_from_folder_refuses(tmp_path, make, message):
    root = tmp_path / 'root'
    root.mkdir()
    make(root)
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        from_folder(root)


def test_image_files_refuse():
    for size in (0, -3):
        with pytest.raises(ValueError, match='1 or more'):
            from_folder('.', size)
    for y, message in (([0], r'expected \(2,\)'), ([0.0, 1.0], 'astype'), ([0, 5], 'holds 2 names')):
        with pytest.raises((ValueError, TypeError), match=message):
            ImageFiles(['a.png', 'b.png'], y, ('x', 'y'))
    with pytest.raises(ValueError, match='2 samples, 2 labels and 3 ids'):
        ImageFiles(['a.png', 'b.png'], [0, 1], ids=torch.arange(3))


# Tiny-ImageNet

WNIDS = {'n02': 'goldfish, Carassius auratus', 'n01': 'crane', 'n03': 'crane', 'n04': "guinea pig, Cavia cobaya"}


@pytest.fixture
def tiny(tmp_path):
    "The layout of the archive, in small: three training images and two validation images of each class."
    folder = tmp_path / 'tiny-imagenet-200'
    (folder / 'val').mkdir(parents=True)
    (folder / 'wnids.txt').write_text('\n'.join(WNIDS))
    (folder / 'words.txt').write_text('\n'.join(f'{wnid}\t{words}' for wnid, words in {**WNIDS, 'n05': 'unused'}.items()))
    for wnid in WNIDS:
        write_images(folder / 'train' / wnid, ('images',), 3, (64, 64), 'JPEG')
        (folder / 'train' / wnid / f'{wnid}_boxes.txt').write_text('0.JPEG\t0\t0\t62\t62\n')
    grey = folder / 'train' / 'n03' / 'images' / '1.JPEG'
    Image.open(grey).convert('L').save(grey)
    write_images(folder / 'val', ('images',), 8, (64, 64), 'JPEG')
    order = [list(WNIDS)[i % 4] for i in range(8)]
    lines = [f'{i}.JPEG\t{wnid}\t0\t32\t44\t62\n' for i, wnid in enumerate(order)]
    (folder / 'val' / 'val_annotations.txt').write_text(''.join(lines))
    return folder


def test_tiny_imagenet(tiny):
    for root in (tiny, tiny.parent, str(tiny)):
        train, test = tiny_imagenet(root)
        assert (len(train), len(test), train.name, test.name) == (12, 8, 'tiny-imagenet train', 'tiny-imagenet test')
        assert train.classes == test.classes == ('crane (n01)', 'goldfish', 'crane (n03)', 'guinea pig')
        assert train.y.bincount().tolist() == [3] * 4 and test.y.tolist() == [1, 0, 2, 3] * 2
        assert [p.name for p in test.paths] == [f'{i}.JPEG' for i in range(8)]
        assert all(p.parts[-3] == sorted(WNIDS)[y] for p, y in zip(train.paths, train.y.tolist(), strict=True))
    assert next(batches(load_data('tiny_imagenet', tiny).train)).x.shape == (12, 3, 64, 64), 'a grey one among them'


@pytest.mark.parametrize('path', [
    'wnids.txt', 'words.txt', 'train/n02/images', 'train/n02', 'train', 'val/val_annotations.txt', 'val/images',
    'val/images/5.JPEG', 'val', '.',
])
def test_tiny_imagenet_with_a_piece_missing(tiny, path):
    (tiny / path).resolve().rename(tiny.parent / 'elsewhere')
    official = r'http://cs231n\.stanford\.edu/tiny-imagenet-200\.zip, unpack it \(unzip'
    missing = 'wnids.txt' if path == '.' else path
    with pytest.raises(FileNotFoundError, match=rf'Tiny-ImageNet needs \S*{missing}.*not there.*{official}'):
        tiny_imagenet(tiny.parent)


def test_tiny_imagenet_that_is_half_unpacked(tiny):
    for file in (tiny / 'train' / 'n04' / 'images').iterdir():
        file.unlink()
    with pytest.raises(FileNotFoundError, match=r'n04/images, which is empty'):
        tiny_imagenet(tiny)
    write_images(tiny / 'train' / 'n04', ('images',), 1, ending='JPEG')
    (tiny / 'wnids.txt').write_text('n01\nn02\nn04\n')
    with pytest.raises(ValueError, match='2.JPEG n03 0 32 44 62.*expected the name of an image and a class of wnids.txt'):
        tiny_imagenet(tiny)


@pytest.mark.parametrize('line', ['0.JPEG', '0.JPEG n01 0 0', '../images/0.JPEG\tn01', '/etc/passwd\tn01'])
def test_tiny_imagenet_with_odd_lines(tiny, line):
    (tiny / 'val' / 'val_annotations.txt').write_text(f'1.JPEG\tn01\t0\t32\t44\t62\n{line}\n')
    with pytest.raises(ValueError, match='expected the name of an image and a class'):
        tiny_imagenet(tiny)


def test_tiny_imagenet_lies_in_the_cache(tiny, monkeypatch):
    monkeypatch.setenv('ROBUSTNB_HOME', str(tiny.parent))
    assert len(tiny_imagenet().train) == 12


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


@pytest.mark.parametrize('transform', [None, 'tensor'])
def test_batches_of_image_folder(tmp_path, transform):
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import ToTensor
    write_images(tmp_path)
    data = ImageFolder(tmp_path, ToTensor() if transform else None)
    expected = from_folder(tmp_path)
    for shuffle in (None, 2):
        for ours, theirs in zip(batches(expected, 5, shuffle=shuffle), batches(data, 5, shuffle=shuffle), strict=True):
            assert all(map(torch.equal, ours, theirs)), 'images of PIL are converted as torchvision would'
    assert classes_of(DataLoader(Subset(data, [1]))) == ('ant', 'bee', 'cat')


def test_batches_of_grey_images_of_pil(data_root):
    from torchvision.datasets import MNIST
    batch = next(batches(MNIST(data_root, train=False), 64))
    assert torch.equal(batch.x, mnist(data_root).test.x[:64]) and batch.x.shape == (64, 1, 28, 28)


def test_loaders_that_cannot_collate(tmp_path):
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import ToTensor
    write_images(tmp_path, each=1)
    write_images(tmp_path, ('bee',), 1, (9, 9))
    private = {'generator': torch.Generator()}
    with pytest.raises(TypeError, match='transform=torchvision.transforms.ToTensor.*hand over the data set itself'):
        list(batches(DataLoader(ImageFolder(tmp_path), 3, **private)))

    def worker():  # an error with a worker in it leaves PyTorch waiting for seconds, so its words stand for it
        yield from ()
        raise RuntimeError('Caught RuntimeError in DataLoader worker process 0.\n... stack expects each tensor to be equal size')
    for data in (ImageFolder(tmp_path), DataLoader(ImageFolder(tmp_path, ToTensor()), 3, **private), worker()):
        with pytest.raises(ValueError, match='different sizes.*size=64.*Resize'):
            list(batches(data))


def test_errors_of_a_source_are_its_own():
    def source(error):
        yield torch.zeros(2, 1), torch.zeros(2, dtype=int)
        raise error
    for error in (TypeError('mine'), RuntimeError('mine'), KeyError('mine')):
        with pytest.raises(type(error), match='mine') as caught:
            list(batches(source(error)))
        assert caught.value is error


def test_bytes_of_a_loader_are_refused_before_a_model_sees_them():
    loader = [(torch.zeros(2, 3, dtype=torch.uint8), torch.zeros(2, dtype=int))]
    with pytest.raises(TypeError, match=r'uint8.*scale them to \[0, 1\] first: x\.float\(\) / 255'):
        match_dtype(next(batches(loader)).x, torch.nn.Conv2d(3, 2, 1, device='meta'))


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
    (digits(), 'got DataSet; choose one part, such as data.train'),
    (torch.zeros(2, 1), r'got Tensor; samples and labels go together.*\(x, y\)'),
    ((torch.zeros(2, 1), [0, 1]), r'got Tensor; samples and labels go together'),
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


def test_questions_convert_nothing(monkeypatch):
    "An array in double precision is converted by the walk, not by each question about it."
    monkeypatch.setattr(data_module, '_as_tensor', lambda *args: pytest.fail('converted'))
    pair = (np.zeros((3, 2)), np.zeros(3, dtype=int))
    assert (size_of(pair), can_shuffle(pair), bounds_of(pair), classes_of(pair)) == (3, True, (0, 1), None)


@pytest.mark.parametrize('classes, names', [
    (['a', 'b'], ('a', 'b')), (np.array(['a', 'b']), ('a', 'b')), ({'a': 0, 'b': 1}, ('a', 'b')), ([0, 1], ('0', '1')),
    ([('tench', 'Tinca tinca'), ('hen',)], ('tench', 'hen')), (10, None), ('words', None), ([], None),
])
def test_classes_as_other_libraries_keep_them(classes, names):
    held = TensorDataset(torch.zeros(2, 1), torch.arange(2))
    held.classes = classes
    assert classes_of(Subset(held, [0])) == names


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
