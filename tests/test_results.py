"""Files and results: what goes in comes out, exactly; what cannot go in is refused at once; nothing in a file is run."""

import copy
import errno
import hashlib
import json
import logging
import math
import os
import re
import stat
import subprocess
import sys
import threading
import time
import types
from collections import deque
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as torch_save

from robustnb import results
from robustnb.results import Records, Result, load_arrays, per_layer, provenance, ragged, save_arrays, task_key

quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
WORDS = st.text(max_size=8)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=12,
)
NUMBERS = hnp.boolean_dtypes() | hnp.integer_dtypes(endianness='=') | hnp.unsigned_integer_dtypes(endianness='=')
NUMBERS |= hnp.floating_dtypes(endianness='=', sizes=(16, 32, 64)) | st.just(np.dtype('complex64'))
SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)
ARRAYS = NUMBERS.flatmap(lambda dtype: hnp.arrays(dtype, SHAPES))
NAMES = st.text(max_size=8).filter(lambda name: name != '__metadata__')


def same(a, b) -> bool:
    "Equality of plain values in which nan equals nan, types count, and a tuple counts as a list."
    if isinstance(a, list | tuple):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return type(b) is dict and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, float) and math.isnan(a):
        return isinstance(b, float) and math.isnan(b)
    return type(a) is type(b) and a == b and (not isinstance(a, float) or math.copysign(1, a) == math.copysign(1, b))


def equal(a: np.ndarray, b: np.ndarray) -> bool:
    "Same type, same shape, same bits."
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


# ----------------------------------------------------------------------------------------------------------- arrays


@given(st.dictionaries(NAMES, ARRAYS, max_size=4), st.dictionaries(WORDS, PLAIN, max_size=4))
@quick
def test_arrays_and_meta_come_back(tmp_path, arrays, meta):
    save_arrays(tmp_path / 'f', arrays, meta)
    found, about = load_arrays(tmp_path / 'f')
    assert list(found) == list(arrays)
    assert all(equal(found[name], arrays[name]) for name in arrays)
    assert same(meta, about)


@pytest.mark.parametrize(
    'dtype',
    'bool uint8 int8 int16 int32 int64 float16 float32 float64 complex64'.split(),
)
def test_tensors(tmp_path, dtype):
    tensor = torch.arange(6).view(2, 3).to(getattr(torch, dtype)).t()
    save_arrays(tmp_path / 'f', {'t': tensor, 'grad': torch.ones(2, requires_grad=True)})
    found, meta = load_arrays(tmp_path / 'f')
    assert equal(found['t'], np.ascontiguousarray(tensor.numpy())) and meta == {}


def test_bfloat16_is_exact_in_float32(tmp_path):
    tensor = torch.randn(100, generator=torch.Generator().manual_seed(0)).bfloat16()
    save_arrays(tmp_path / 'f', {'t': tensor})
    found = load_arrays(tmp_path / 'f')[0]['t']
    assert found.dtype == np.float32 and torch.equal(torch.from_numpy(found).bfloat16(), tensor)


def test_views_and_byte_orders(tmp_path):
    base = np.arange(24).reshape(4, 6)
    arrays = {'reversed': base[::-1, ::2], 'transposed': base.T, 'big': base.astype('>i4'), 'scalar': np.float32(3)}
    save_arrays(tmp_path / 'f', arrays)
    found = load_arrays(tmp_path / 'f')[0]
    assert all(np.array_equal(found[name], arrays[name]) for name in arrays)
    assert found['scalar'].shape == () and found['big'].dtype == np.int32
    found['reversed'][:] = 0  # what is loaded can be written to


def test_the_file_is_plain_safetensors(tmp_path):
    save_arrays(tmp_path / 'f', {'a': np.arange(3)}, {'seed': 7})
    assert load_file(tmp_path / 'f')['a'].tolist() == [0, 1, 2]
    save_file({'b': np.arange(2), 'a': np.arange(3)}, tmp_path / 'g', {'made by': 'somebody else'})
    arrays, meta = load_arrays(str(tmp_path / 'g'))
    assert {name: array.tolist() for name, array in arrays.items()} == {'a': [0, 1, 2], 'b': [0, 1]}
    assert meta == {'made by': 'somebody else'}


@pytest.mark.parametrize('shape', [(), (0,), (1,), (7,), (8,), (9,), (3, 0, 2), (1, 1), (3, 5), (2, 3, 11), (8, 16)])
def test_booleans_are_packed(tmp_path, shape):
    array = np.random.default_rng(0).random(shape) < 0.5
    arrays = {'bits': array, 'turned': array.T, 'tensor': torch.from_numpy(np.asarray(array)), 'numbers': np.ones(3)}
    save_arrays(tmp_path / 'f', arrays)
    found = load_arrays(tmp_path / 'f')[0]
    assert list(found) == list(arrays) and found['numbers'].tolist() == [1, 1, 1]
    assert equal(found['bits'], array) and equal(found['tensor'], array)
    assert equal(found['turned'], np.asarray(array.T, order='C'))
    found['bits'][...] = True  # what is loaded can be written to

    stored = load_file(tmp_path / 'f')['bits']  # as any other reader sees it
    assert stored.dtype == np.uint8 and stored.shape == ((array.size + 7) // 8,)
    assert np.array_equal(np.unpackbits(stored, count=array.size).reshape(shape), array)


@given(hnp.arrays(bool, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=9)))
@quick
def test_booleans_of_any_shape_come_back(tmp_path, array):
    save_arrays(tmp_path / 'f', {'a': array})
    assert equal(load_arrays(tmp_path / 'f')[0]['a'], array)


def test_booleans_are_eight_times_smaller_also_in_a_result(tmp_path):
    fooled = np.random.default_rng(0).random((1000, 80)) < 0.5
    sizes = {}
    for kind in (bool, 'uint8'):
        Result(xr.Dataset({'fooled': (('sample', 'attack'), fooled.astype(kind))})).save(tmp_path / 'f')
        assert equal(Result.load(tmp_path / 'f').dataset.fooled.values, fooled.astype(kind))
        sizes[kind] = (tmp_path / 'f').stat().st_size
    assert 10_000 < sizes[bool] < 12_000 and sizes['uint8'] > 80_000


def test_booleans_that_somebody_else_stored(tmp_path):
    save_file({'a': np.array([[True, False]])}, tmp_path / 'f')
    assert equal(load_arrays(tmp_path / 'f')[0]['a'], np.array([[True, False]]))
    header = {'format': 1, 'names': ['a'], 'meta': {}}  # no note about bits: nothing is unpacked
    save_file({'a': np.array([3], 'uint8')}, tmp_path / 'f', {'robustnb': json.dumps(header)})
    assert equal(load_arrays(tmp_path / 'f')[0]['a'], np.array([3], 'uint8'))


@pytest.mark.parametrize('stored', [np.zeros(2, 'uint8'), np.zeros(1, 'int8'), np.zeros((1, 1), 'uint8')])
def test_a_note_that_does_not_fit_the_bits(tmp_path, stored):
    header = {'format': 1, 'names': ['a'], 'bits': {'a': [2, 2]}, 'meta': {}}
    save_file({'a': stored}, tmp_path / 'f', {'robustnb': json.dumps(header)})
    with pytest.raises(ValueError, match=r"array 'a' should hold the bits of the shape \[2, 2\], but is"):
        load_arrays(tmp_path / 'f')


def test_the_same_content_is_the_same_bytes(tmp_path):
    for name in 'fg':
        save_arrays(tmp_path / name, {'b': np.eye(2), 'a': np.arange(3)}, {'seed': 7})
    assert (tmp_path / 'f').read_bytes() == (tmp_path / 'g').read_bytes()


@pytest.mark.parametrize(
    'arrays, message',
    [
        ({'a': np.array(['x'])}, "array 'a' has the type <U1"),
        ({'a': np.array([None])}, 'type object'),
        ({'a': np.zeros(2, 'complex128')}, 'type complex128; a file can hold'),
        ({'a': np.zeros(2, np.longdouble)}, 'a file can hold'),
        ({'a': np.zeros(2, 'M8[s]')}, 'datetime64'),
        ({'a': np.zeros(2, [('x', 'f4')])}, "array 'a'"),
        ({3: np.zeros(2)}, 'needs a word as its name.*got 3'),
        ({'__metadata__': np.zeros(2)}, 'reserved'),
    ],
)
def test_arrays_that_are_refused(tmp_path, arrays, message):
    with pytest.raises(TypeError, match=message):
        save_arrays(tmp_path / 'f', arrays)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    'meta, message',
    [
        ({'a': object()}, r"meta\['a'\] is a object"),
        ({'a': [1, {'b': {1, 2}}]}, r"meta\['a'\]\[1\]\['b'\] is a set"),
        ({'a': np.zeros(2)}, r"meta\['a'\] is a ndarray.*tolist"),
        ({'a': torch.zeros(2)}, r"meta\['a'\] is a Tensor"),
        ({'a': datetime(2026, 1, 1)}, 'datetime'),
        ({'a': b'bytes'}, 'bytes'),
        ({'a': 1j}, 'complex'),
        ({'a': np.datetime64('2026-01-01', 'ns')}, 'is a datetime64'),  # whose item() would be a number
        ({'a': np.timedelta64(1, 'ns')}, 'is a timedelta64'),
        ({'a': np.longdouble(1)}, 'is a longdouble'),
        ({'a': np.zeros(1, 'i4,f4')[0]}, 'is a void'),
        ({1: 'a'}, "meta has the key 1; keys are words, so write '1'"),
        ({'a': {None: 1}}, r"meta\['a'\] has the key None"),
        ({'a': {('x', 'y'): 1}}, 'keys are words'),
        ({True: 1}, 'the key True'),
    ],
)
def test_meta_that_is_refused(tmp_path, meta, message):
    with pytest.raises(TypeError, match=message):
        save_arrays(tmp_path / 'f', {}, meta)
    assert not list(tmp_path.iterdir())


def test_numpy_numbers_become_ordinary_ones(tmp_path):
    meta = {'i': np.int64(3), 'f': np.float32(0.5), 'b': np.bool_(True), 's': np.str_('x'), 't': (1, (2,))}
    save_arrays(tmp_path / 'f', {}, meta)
    assert same({'i': 3, 'f': 0.5, 'b': True, 's': 'x', 't': [1, [2]]}, load_arrays(tmp_path / 'f')[1])


def test_too_many_words(tmp_path):
    with pytest.raises(ValueError, match='at most 40 MB'):
        save_arrays(tmp_path / 'f', {}, {'words': 'x' * 41_000_000})
    save_arrays(tmp_path / 'f', {}, {'words': '"' * 19_000_000})  # each one is escaped twice, and must still be readable
    assert len(load_arrays(tmp_path / 'f')[1]['words']) == 19_000_000


# ------------------------------------------------------------------------------------------------------------ files


@pytest.fixture
def file_limit():
    "A context in which no file can grow beyond so many bytes, as on a disk that is full."
    resource = pytest.importorskip('resource')

    class Limit:
        def __init__(self, size):
            self.size = size

        def __enter__(self):
            self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.before[1]))

        def __exit__(self, *args):
            resource.setrlimit(resource.RLIMIT_FSIZE, self.before)

    return Limit


def test_folders_are_made_and_rights_are_the_usual_ones(tmp_path):
    path = tmp_path / 'new' / 'folder' / 'f.safetensors'
    save_arrays(str(path), {'a': np.zeros(2)})
    usual = tmp_path / 'usual'
    usual.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(usual.stat().st_mode)


@pytest.mark.parametrize('step', ['fsync', 'replace'])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step):
    path = tmp_path / 'f'
    save_arrays(path, {'a': np.zeros(2)}, {'version': 'old'})

    def fail(*args):
        raise OSError('disk full')

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match='f could not be written; what was there before still is. disk full'):
        save_arrays(path, {'a': np.ones(2)}, {'version': 'new'})
    assert load_arrays(path)[1] == {'version': 'old'} and [p.name for p in tmp_path.iterdir()] == ['f']


def test_a_disk_that_is_full(tmp_path, file_limit):
    path = tmp_path / 'f'
    save_arrays(path, {'a': np.zeros(2)}, {'version': 'old'})
    with file_limit(4_000), pytest.raises(OSError, match='could not be written; what was there before still is') as caught:
        save_arrays(path, {'a': np.ones(1000)})
    assert caught.value.errno == errno.EFBIG
    assert load_arrays(path)[1] == {'version': 'old'} and [p.name for p in tmp_path.iterdir()] == ['f']


@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() == 0, reason='nothing is read-only for root')
def test_a_folder_that_is_read_only(tmp_path):
    path = tmp_path / 'f'
    save_arrays(path, {}, {'version': 'old'})
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PermissionError, match='could not be written; what was there before still is'):
            save_arrays(path, {}, {'version': 'new'})
    finally:
        tmp_path.chmod(0o700)
    assert load_arrays(path)[1] == {'version': 'old'} and [p.name for p in tmp_path.iterdir()] == ['f']


def test_a_folder_that_refuses_new_files(tmp_path, monkeypatch):
    path = tmp_path / 'f'
    save_arrays(path, {}, {'version': 'old'})

    def refuse(*args):
        raise PermissionError(errno.EACCES, 'Permission denied', str(args[0]))

    with monkeypatch.context() as patch:
        patch.setattr(Path, 'open', refuse)
        with pytest.raises(PermissionError, match='f could not be written; what was there before still is. Permission denied$'):
            save_arrays(path, {}, {'version': 'new'})
    assert load_arrays(path)[1] == {'version': 'old'} and [p.name for p in tmp_path.iterdir()] == ['f']


KILLED = """
import os, random, signal, sys, time
import numpy as np
from robustnb.results import Records, load_arrays, save_arrays

def killed(work, wait):
    "Let a process do `work(tell)` and kill it `wait` seconds after it told something first; how often it told."
    out, into = os.pipe()
    if not (child := os.fork()):
        try:
            work(lambda: os.write(into, b'.'))
        finally:
            os._exit(1)
    os.close(into)
    told = len(os.read(out, 1))
    time.sleep(wait)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while more := os.read(out, 1 << 16):
        told += len(more)
    os.close(out)
    return told

path, moments = sys.argv[1], random.Random(0)
"""


def run_python(script: str, *args: str) -> str:
    "What a script says in a process of its own, which must end well."
    ran = subprocess.run([sys.executable, '-c', script, *args], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


needs_fork = pytest.mark.skipif(not hasattr(os, 'fork'), reason='the test forks')


@needs_fork
def test_a_writer_that_is_killed_leaves_a_whole_file(tmp_path):
    script = """
def work(tell):
    for i in range(10**6):
        save_arrays(path, {'a': np.full(30_000, i)}, {'i': i})
        tell()

for _ in range(30):
    told = killed(work, moments.uniform(0, 0.02))
    arrays, meta = load_arrays(path)
    assert (arrays['a'] == meta['i']).all() and told - 1 <= meta['i'] <= told, (told, meta)
"""
    run_python(KILLED + script, str(tmp_path / 'f'))
    names = [p.name for p in tmp_path.iterdir()]
    assert 'f' in names and all(re.fullmatch(r'f|\.f\.[0-9a-f]{8}\.tmp', name) for name in names)


def test_what_a_killed_writer_left_is_removed_later(tmp_path):
    names = ['.f.0123abcd.tmp', '.f.aaaaaaaa.tmp', '.g.0123abcd.tmp', 'f.tmp', '.f[1].0123abcd.tmp']
    for name in names:
        (tmp_path / name).touch()
        age = 10 if 'aaaa' in name else 7200
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    save_arrays(tmp_path / 'f', {})
    assert {p.name for p in tmp_path.iterdir()} == {*names, 'f'} - {'.f.0123abcd.tmp'}
    save_arrays(tmp_path / 'f[1]', {})
    assert {p.name for p in tmp_path.iterdir()} == {*names[1:-1], 'f', 'f[1]'}


@pytest.mark.parametrize('keep', [0, 4, 8, 20, -1])
def test_damaged_files(tmp_path, keep):
    path = tmp_path / 'f'
    save_arrays(path, {'a': np.arange(100)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match='not a whole safetensors file'):
        load_arrays(path)


@pytest.mark.parametrize('content', [b'\x80\x04.', b'<!DOCTYPE html><html>', b'\xff' * 100])
def test_files_of_another_kind(tmp_path, content):
    (tmp_path / 'f').write_bytes(content)
    with pytest.raises(ValueError, match='not a whole safetensors file'):
        load_arrays(tmp_path / 'f')


@pytest.mark.parametrize('dtype, name', [(torch.bfloat16, 'BF16'), (torch.float8_e4m3fn, 'F8_E4M3')])
def test_types_that_numpy_has_not(tmp_path, dtype, name):
    torch_save({'w': torch.ones(3).to(dtype)}, tmp_path / 'f')
    with pytest.raises(TypeError, match=f"array 'w' has the type {name}; .*use safetensors.torch.load_file"):
        load_arrays(tmp_path / 'f')


def test_missing_and_newer_files(tmp_path):
    with pytest.raises(FileNotFoundError, match='absent'):
        load_arrays(tmp_path / 'absent')
    with pytest.raises(OSError, match=re.escape(str(tmp_path))):  # a folder
        load_arrays(tmp_path)
    save_file({}, tmp_path / 'f', {'robustnb': json.dumps({'format': 2, 'names': [], 'meta': {}})})
    with pytest.raises(ValueError, match='format 2: a newer robustnb wrote it'):
        load_arrays(tmp_path / 'f')


# --------------------------------------------------------------------------------------------------------- datasets

TIMES = st.sampled_from([f'{kind}8[{unit}]' for kind in 'mM' for unit in ('s', 'ms', 'us', 'ns')])
SIZES = {'a': 3, 'b': 2, 'c': 0, 'd': 1}
LETTERS = st.text('aé\u200b\U0001f600\n\0"\\', max_size=4)  # what a file of words may stumble over
INDEXES = [
    pd.Index(['x', 'y', 'z']),
    pd.Index(['x', None, 'z'], dtype=object),
    pd.Index([3, 1, 1], dtype='int8'),
    pd.Index([0.5, np.nan, -0.0], dtype='float32'),
    pd.Index([True, False, True]),
    pd.date_range('2026', periods=3),
    np.array(['x', 'yy', '']),
    np.array(['x', 1, None], dtype=object),
]


def in_shape(values: list, shape: tuple, dtype) -> np.ndarray:
    "An array of these values, each of which may be a list."
    array = np.empty(len(values), dtype)
    for i, value in enumerate(values):
        array[i] = value
    return array.reshape(shape)


@st.composite
def columns(draw, dims: tuple) -> np.ndarray:
    "An array of any type that a file can hold."
    shape = tuple(SIZES[dim] for dim in dims)
    count = math.prod(shape)
    kind = draw(st.sampled_from(['numbers', 'times', 'U', 'T', 'words', 'objects']))
    if kind == 'numbers':
        return draw(hnp.arrays(draw(NUMBERS), shape))
    if kind == 'times':
        return draw(hnp.arrays('int64', shape)).view(draw(TIMES))
    if kind == 'objects':
        return in_shape(draw(st.lists(PLAIN, min_size=count, max_size=count)), shape, object)
    dtype = {'U': '<U4', 'T': np.dtypes.StringDType(), 'words': object}[kind]
    return in_shape(draw(st.lists(LETTERS, min_size=count, max_size=count)), shape, dtype)


@st.composite
def datasets(draw) -> xr.Dataset:
    "A Dataset with anything in it that xarray allows and a file can hold."
    dimensions = st.lists(st.sampled_from(list(SIZES)), unique=True, max_size=3).map(tuple)
    variables = {}
    for name in draw(st.lists(WORDS.filter(lambda name: name not in SIZES), unique=True, max_size=5)):
        dims = draw(dimensions)
        variables[name] = (dims, draw(columns(dims)), draw(st.dictionaries(WORDS, PLAIN, max_size=2)))
    if draw(st.booleans()):
        variables['a'] = ('a', draw(st.sampled_from(INDEXES)), {'note': 'an index'})
    for name in draw(st.sets(st.sampled_from(['b', 'd']))):
        variables[name] = (name, draw(columns((name,))))
    order = draw(st.permutations(list(variables)))
    dataset = xr.Dataset({name: variables[name] for name in order}, attrs=draw(st.dictionaries(WORDS, PLAIN, max_size=2)))
    dataset = dataset.drop_indexes([name for name in list(dataset.xindexes) if draw(st.booleans())])
    rest = [name for name in dataset.variables if name not in dataset.xindexes]
    if rest:
        chosen = draw(st.sets(st.sampled_from(rest)))
        dataset = dataset.set_coords(chosen).reset_coords(set(rest) - chosen)
    if 'a' in dataset.dims and draw(st.booleans()):  # a second index on one dimension
        dataset = dataset.assign_coords(beside=('a', [5, 5, 1])).set_xindex('beside')
    return dataset


def assert_same(a: xr.Dataset, b: xr.Dataset):
    "The same in everything that can be seen: order, types, bits, notes, indexes."
    assert list(a.variables) == list(b.variables) and list(a.coords) == list(b.coords)
    assert dict(a.sizes) == dict(b.sizes) and set(a.xindexes) == set(b.xindexes)
    assert same(a.attrs, b.attrs)
    for name, one in a.variables.items():
        other = b.variables[name]
        assert (one.dtype, one.dims, one.shape, type(one)) == (other.dtype, other.dims, other.shape, type(other))
        assert same(one.attrs, other.attrs)
        if one.dtype.kind in 'OT':
            assert same(one.values.tolist(), other.values.tolist())
        else:
            assert equal(one.values, other.values)
    for name in a.xindexes:
        assert a.indexes[name].equals(b.indexes[name]) and a.indexes[name].dtype == b.indexes[name].dtype


@pytest.mark.filterwarnings('ignore:`pandas.Index` does not support the `float16`')
@given(datasets(), st.dictionaries(WORDS, PLAIN, max_size=3))
@settings(quick, max_examples=80)
def test_datasets_come_back_exactly(tmp_path, dataset, about):
    Result(dataset, about).save(tmp_path / 'f')
    found = Result.load(tmp_path / 'f')
    assert_same(dataset, found.dataset)
    assert same(about, found.settings)
    found.save(tmp_path / 'g')
    assert (tmp_path / 'f').read_bytes() == (tmp_path / 'g').read_bytes()


def back(dataset: xr.Dataset, path: Path) -> xr.Dataset:
    "A Dataset, saved and loaded."
    Result(dataset).save(path)
    return Result.load(path).dataset


@pytest.mark.parametrize('index', INDEXES, ids=repr)
def test_indexes_keep_their_type(tmp_path, index):
    dataset = xr.Dataset(coords={'a': index})
    assert_same(dataset, back(dataset, tmp_path / 'f'))
    assert_same(dataset.drop_indexes('a'), back(dataset.drop_indexes('a'), tmp_path / 'f'))
    hidden = dataset.drop_indexes('a').reset_coords('a')  # a data variable that is called as its dimension
    assert_same(hidden, back(hidden, tmp_path / 'f'))


def test_none_among_words(tmp_path):
    dataset = xr.Dataset({'v': ('i', np.array(['', ''], dtype=object)), 'w': ((), np.array('', dtype=object))})
    dataset.v.values[:] = [None, ['list', None]]
    dataset.w.values[...] = None
    found = back(dataset, tmp_path / 'f')
    assert found.v.values.tolist() == [None, ['list', None]] and found.w.values.item() is None
    dataset.v.values[:] = ['word', None]
    assert back(dataset, tmp_path / 'f').v.values.tolist() == ['word', None]


def test_lists_as_values_stay_lists(tmp_path):
    values = in_shape([[1, 2], [3, 4]], (2,), object)  # an array of two lists, not of four numbers
    found = back(xr.Dataset({'v': ('i', values)}), tmp_path / 'f')
    assert found.v.shape == (2,) and found.v.values.tolist() == [[1, 2], [3, 4]]


def profile() -> xr.Dataset:
    "A result as an analysis makes it: several dims, coordinates of all kinds, along dims and beside them."
    rng = np.random.default_rng(0)
    return xr.Dataset(
        {
            'value': (('perturbation', 'layer', 'sample'), rng.random((2, 3, 4)).astype('float32'), {'unit': 'none'}),
            'flipped': (('perturbation', 'sample'), rng.random((2, 4)) > 0.5),
            'total': 3.5,
        },
        {
            'perturbation': ['noise', 'PGD'],
            'layer': pd.Index(['conv1', 'conv2', 'fc']),
            'sample': [17, 4, 99, 5],
            'depth': ('layer', [1, 2, 3]),
            'when': ('sample', pd.date_range('2026-01-01', periods=4)),
            'label': ('sample', np.array(['cat', 'dog', None, 'cat'], dtype=object)),
            'run': 'first',
        },
        {'measure': 'relative_error', 'eps': (0.1, 0.3), 'nothing': None},
    )


def test_an_analysis_comes_back(tmp_path):
    result = Result(profile(), {'attack': 'PGD', 'bounds': (0, 1), 'limit': float('inf')}, {'robustnb': '0'})
    result.save(tmp_path / 'f')
    found = Result.load(tmp_path / 'f')
    assert found.dataset.drop_attrs(deep=False).identical(profile().drop_attrs(deep=False))
    assert found.dataset.attrs == {'measure': 'relative_error', 'eps': [0.1, 0.3], 'nothing': None}
    assert found.settings == {'attack': 'PGD', 'bounds': [0, 1], 'limit': float('inf')} == result.settings
    assert found.provenance == {'robustnb': '0'}
    pd.testing.assert_frame_equal(found.table(), result.table())
    assert found.dataset.sel(perturbation='PGD', layer='fc').value.shape == (4,)
    found.save(tmp_path / 'g')
    assert (tmp_path / 'f').read_bytes() == (tmp_path / 'g').read_bytes()


def test_a_dataset_of_a_table(tmp_path):
    table = pd.DataFrame({'layer': ['a', 'b'], 'score': [0.5, np.nan]}, index=pd.Index(['x', 'y'], name='row'))
    Result(xr.Dataset.from_dataframe(table)).save(tmp_path / 'f')
    assert Result.load(tmp_path / 'f').dataset.identical(xr.Dataset.from_dataframe(table))


@pytest.mark.parametrize(
    'make, message',
    [
        (lambda: xr.Dataset({'v': ('i', np.array([object()]))}), r"variable 'v'\['words'\]\[0\] is a object"),
        (lambda: xr.Dataset({'v': ('i', np.array([b'x']))}), "variable 'v' has the type"),
        (lambda: xr.Dataset({'v': ('i', np.zeros(2, 'complex128'))}), 'complex128'),
        (lambda: xr.Dataset({3: ('i', np.zeros(2))}), 'got 3'),
        (lambda: xr.Dataset({'v': ('i', [1], {'note': {1}})}), r"variable 'v'\['attrs'\]\['note'\] is a set"),
        (lambda: xr.Dataset(attrs={'model': torch.nn.ReLU()}), r"dataset\['attrs'\]\['model'\] is a ReLU"),
        (lambda: xr.Dataset(coords={'a': ('i', [1]), 'b': ('i', [3])}).set_index(i=['a', 'b']), r"reset_index\('i'\)"),
        (lambda: xr.Dataset({'v': ('i', pd.Categorical(['x', 'y']))}), "'v' has the type category of pandas; call astype"),
        (lambda: xr.Dataset({'v': ('i', pd.array([1, None], dtype='Int64'))}), "'v' has the type Int64 of pandas"),
        (lambda: xr.Dataset(coords={'i': pd.CategoricalIndex(['x', 'y'])}), "'i' has the type category"),
        (lambda: xr.Dataset({'v': ('i', np.array(['x', None], np.dtypes.StringDType(na_object=None)))}), "'v' has the type"),
        (lambda: xr.Dataset({'v': ((3,), [1])}), "'v' has the dimension 3; dimensions are words"),
        (lambda: xr.Dataset({'__metadata__': ('i', np.zeros(1, 'M8[s]'))}), 'reserved'),
        (lambda: xr.Dataset(coords={'i': pd.date_range('2026', periods=2, tz='UTC')}), "'i'"),
    ],
)
def test_what_cannot_be_saved_is_refused_at_once(make, message):
    with pytest.raises(TypeError, match=message):
        Result(make())


# ---------------------------------------------------------------------------------------------------------- results


@pytest.fixture
def kinds(monkeypatch):
    "The registry of kinds, given back as it was."
    monkeypatch.setattr(results, '_KINDS', dict(results._KINDS))


UNITS = {'conv1': np.arange(6.0).reshape(2, 3), 'fc': -np.arange(8.0).reshape(2, 4), 'a first letter': np.ones((2, 1))}


@given(
    st.dictionaries(st.text('abé_.0', max_size=5), st.integers(1, 4), min_size=1, max_size=4),
    st.lists(st.integers(0, 2), max_size=2),
    NUMBERS,
    st.data(),
)
@quick
def test_units_come_back(tmp_path, widths, leading, dtype, data):
    arrays = {name: data.draw(hnp.arrays(dtype, (*leading, width))) for name, width in widths.items()}
    long = ragged(arrays, *('sample', 'seed')[: len(leading)])
    assert long.dtype == dtype and long.shape == (*leading, sum(widths.values()))
    for array in (long, back(xr.Dataset({'v': long}), tmp_path / 'f').v, long.transpose('unit', ...)):
        found = per_layer(array)
        assert list(found) == list(arrays)
        assert all(equal(found[name], arrays[name]) for name in arrays)


def test_labels_of_units():
    long = ragged({name: torch.from_numpy(values) for name, values in UNITS.items()}, 'sample')
    assert long.layer.values.tolist() == ['conv1'] * 3 + ['fc'] * 4 + ['a first letter']
    assert long.unit.values.tolist() == [0, 1, 2, 0, 1, 2, 3, 0]
    table = Result(xr.Dataset({'value': long})).table()
    assert set(table) == {'sample', 'unit', 'layer', 'value'} and len(table) == 2 * 8
    row = table[(table.layer == 'fc') & (table.unit == 2) & (table['sample'] == 1)]
    assert row.value.item() == UNITS['fc'][1, 2]
    one = ragged({'x': [1, 2], 'y': [3]})
    assert one.dims == ('unit',) and {k: v.tolist() for k, v in per_layer(one).items()} == {'x': [1, 2], 'y': [3]}


@pytest.mark.parametrize(
    'arrays, message',
    [
        ({}, 'no layers were given'),
        ({'x': np.ones((2, 3, 8, 8))}, "layer 'x' has the shape .2, 3, 8, 8.; 2 axes are named"),
        ({'x': np.ones(3)}, "layer 'x' has the shape .3,.; 2 axes"),
        ({'x': np.ones((2, 0))}, "layer 'x' has the shape .2, 0."),
        ({'x': np.ones((2, 3)), 'y': np.ones((3, 3))}, 'number of units only; got x float64 .2, 3., y float64 .3, 3.'),
        ({'x': np.ones((2, 3)), 'y': np.ones((2, 3), 'float32')}, 'y float32'),
    ],
)
def test_units_that_are_refused(arrays, message):
    with pytest.raises(ValueError, match=message):
        ragged(arrays, 'sample')


def test_subclasses_come_back(tmp_path, kinds):
    class Mine(Result):
        kind = 'mine'

    class Finer(Mine):
        kind = 'finer'

    Finer(profile()).save(tmp_path / 'f')
    for cls in (Result, Mine, Finer):
        assert type(cls.load(tmp_path / 'f')) is Finer
    Mine(profile()).save(tmp_path / 'g')
    with pytest.raises(ValueError, match='holds a Mine, not a Finer; Result.load reads every kind'):
        Finer.load(tmp_path / 'g')


def test_kinds(kinds):
    with pytest.raises(TypeError, match="Nameless needs a kind of its own, for example kind = 'nameless'"):

        class Nameless(Result):
            pass

    class Mine(Result):
        kind = 'mine'

    with pytest.raises(TypeError, match="kind 'mine' belongs to .*Mine already"):

        class Other(Result):
            kind = 'mine'

    first = Mine

    class Mine(Result):  # noqa: F811 - a notebook's cell that is run again
        kind = 'mine'

    assert results._KINDS['mine'] is Mine is not first


def strange(path: Path, **changes) -> Path:
    "A file of a result whose header has been tampered with."
    Result(profile()).save(path)
    arrays, meta = load_arrays(path)
    save_arrays(path, arrays, meta | changes)
    return path


@pytest.mark.parametrize(
    'module',
    ['os', 'evil', 'robustnb', 'robustnbx.y', 'robustnb..lsa', 'robustnb.lsa.x', 'robustnb.__main__', 'robustnb.a b', ''],
)
def test_only_our_modules_are_imported(tmp_path, monkeypatch, module):
    def never(name):
        raise AssertionError(f'{name} was imported')

    path = strange(tmp_path / 'f', kind='backup', module=module)
    monkeypatch.setattr(results.importlib, 'import_module', never)
    with pytest.raises(ValueError, match='no class is known for results of kind .backup.: (import|upgrade)'):
        Result.load(path)


def test_a_module_of_ours_is_imported(tmp_path, monkeypatch, kinds):
    imported = []

    def found(name):
        imported.append(name)
        type('Late', (Result,), {'kind': 'late', '__module__': name})

    path = strange(tmp_path / 'f', kind='late', module='robustnb.late_one')
    finder = types.SimpleNamespace(find_spec=lambda name: True)
    monkeypatch.setattr(results, 'importlib', types.SimpleNamespace(util=finder, import_module=found))  # as this module sees it
    assert type(Result.load(path)).__name__ == 'Late' and imported == ['robustnb.late_one']
    Result.load(path)
    assert len(imported) == 1


@pytest.mark.parametrize('module', ['robustnb.results', 'robustnb.of_next_year'])
def test_a_kind_of_a_newer_version(tmp_path, module):
    with pytest.raises(ValueError, match="no class is known for results of kind 'absent': upgrade robustnb first"):
        Result.load(strange(tmp_path / 'f', kind='absent', module=module))


def test_arrays_are_no_result(tmp_path):
    save_arrays(tmp_path / 'f', {'a': np.zeros(2)}, {'kind': 'result'})
    with pytest.raises(ValueError, match='holds arrays but no result'):
        Result.load(tmp_path / 'f')


def test_tables():
    table = Result(profile()[['value']]).table()
    assert len(table) == 2 * 3 * 4 and {'perturbation', 'layer', 'sample', 'value', 'depth'} <= set(table)
    row = table[(table.perturbation == 'PGD') & (table.layer == 'fc') & (table['sample'] == 99)]
    assert row.value.item() == profile().value.values[1, 2, 2]
    moment = np.datetime64('2026-01-01T12:00', 'ns')
    assert Result(xr.Dataset({'when': moment})).table().when.item() == pd.Timestamp(moment)
    assert Result(xr.Dataset({'a': 3.5, 'b': 'x'})).table().to_dict('records') == [{'a': 3.5, 'b': 'x'}]


def test_no_figure_and_no_explorer():
    result = Result(profile())
    for act, word in ((result.plot, 'figure'), (result.explore, 'explorer')):
        with pytest.raises(TypeError, match=f'Result has no {word} of its own'):
            act()


def test_what_a_notebook_shows():
    dataset = xr.Dataset({'score': ('layer', [0.123456789, 2])}, {'layer': ['<script>alert(1)</script>', 'fc']})
    result = Result(dataset, {'<img src=x>': '<b>'}, {'robustnb': '"0" & more'})
    html = result._repr_html_()
    for raw in ('<script', '<img', '<b></', '& more'):
        assert raw not in html
    assert '<b>Result</b> (layer 2)' in html and '&lt;img src=x&gt; &lt;b&gt;' in html and '0.1235' in html
    assert repr(result) == 'Result (layer 2)'
    assert len(Result(xr.Dataset({'a': ('i', np.zeros(10_000))}), {'ids': list(range(10_000))})._repr_html_()) < 4_000
    assert '<div style' not in Result(dataset, {}, {})._repr_html_().replace('<div><style', '')


def test_settings_are_a_copy():
    settings = {'eps': [0.1]}
    result = Result(profile(), settings)
    settings['eps'].append(0.2)
    assert result.settings == {'eps': [0.1]}


def test_provenance():
    found = provenance()
    assert found['torch'] == torch.__version__.split('+')[0] and found['numpy'] == np.__version__
    assert found['python'] == '.'.join(map(str, sys.version_info[:3]))
    age = datetime.now().astimezone() - datetime.fromisoformat(found['time'])
    assert timedelta(seconds=-1) < age < timedelta(seconds=60)
    assert set(Result(profile()).provenance) == set(found) == {'robustnb', 'torch', 'numpy', 'python', 'time'}


def test_import_is_light():
    script = 'import sys, robustnb.results; print([m for m in ("torch", "xarray", "pandas") if m in sys.modules])'
    ran = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True)
    assert ran.stdout.strip() == '[]', ran.stderr


# ---------------------------------------------------------------------------------------------------------- records


def small(path: Path, count: int = 4) -> Records:
    "A store with a few records."
    store = Records(path)
    for seed in range(count):
        store.add({'layer': 'conv1', 'seed': seed}, {'accuracy': seed / 10})
    return store


@given(st.lists(st.tuples(st.dictionaries(WORDS, PLAIN, max_size=3), st.dictionaries(WORDS, PLAIN, max_size=3)), max_size=6))
@quick
def test_records_come_back(tmp_path, pairs):
    path = tmp_path / 'f'
    path.unlink(missing_ok=True)
    store, expected = Records(path), {}
    for task, values in pairs:
        values = {f'value {name}': value for name, value in values.items() if f'value {name}' not in task}
        store.add(task, values, replace=True)
        key = task_key(task)
        if key not in expected or task_key(expected[key][1]) != task_key(values):
            expected[key] = task, values
    for found in (store, Records(path)):
        assert len(found) == len(expected)
        for (task, values), (kept, others) in zip(expected.values(), found, strict=True):
            assert same(task, kept) and same(values, others)
            assert task in found and same(values, found[task])
    assert all(json.loads(line) for line in path.read_bytes().splitlines()) if pairs else not path.exists()


@given(st.dictionaries(WORDS, PLAIN, max_size=4), st.randoms())
@quick
def test_keys_do_not_depend_on_the_order(task, random):
    names = list(task)
    random.shuffle(names)
    assert task_key({name: task[name] for name in names}) == task_key(task) == task_key(json.loads(json.dumps(task)))
    assert re.fullmatch('[0-9a-f]{64}', task_key(task))


ALIKE = [
    [1, 1.0, np.int8(1), np.float16(1)],
    [0, 0.0, -0.0],
    [10**20, 1e20],
    [True, np.True_],
    [float('nan'), np.float32('nan')],
    [[1, 2], (1, 2.0)],
    [0.1, np.float64(0.1)],
    [np.float32(0.1)],
    ['1'],
    [None],
    [[]],
    [{}],
    [''],
    [float('inf')],
    [False],
    [{'a': 1}, {'a': 1.0}],
]


def test_which_values_are_one_task():
    keys = [{task_key({'value': value}) for value in values} for values in ALIKE]
    assert all(len(of_one) == 1 for of_one in keys) and len(set.union(*keys)) == len(ALIKE)
    text = b'{"layer":"conv1","threshold":0.2}'
    assert task_key({'threshold': 0.2, 'layer': 'conv1'}) == hashlib.sha256(text).hexdigest()


@pytest.mark.parametrize('end', ['', '\n', '\x00', 'é', '"}'])
def test_words_stay_on_their_line(tmp_path, end):
    store = Records(tmp_path / 'f')
    store.add({'name': f'a\nb\r{end}'}, {'out': f'\u2028{end}', 'list': [1, [None, {'x': float('-inf')}]]})
    (task, values), = Records(tmp_path / 'f')
    assert task == {'name': f'a\nb\r{end}'} and values == {'out': f'\u2028{end}', 'list': [1, [None, {'x': float('-inf')}]]}
    assert (tmp_path / 'f').read_bytes().count(b'\n') == 2


def test_the_same_task_twice(tmp_path):
    store = small(tmp_path / 'f')
    size = store.path.stat().st_size
    store.add({'seed': 2.0, 'layer': 'conv1'}, {'accuracy': np.float64(0.2)})
    assert store.path.stat().st_size == size
    with pytest.raises(ValueError, match=r"has other values already: {'accuracy': 0.2}, not {'accuracy': 0.5}; pass replace"):
        store.add({'layer': 'conv1', 'seed': 2}, {'accuracy': 0.5})
    assert store.path.stat().st_size == size
    store.add({'layer': 'conv1', 'seed': 2}, {'accuracy': 0.5}, replace=True)
    for found in (store, Records(store.path)):
        assert found[{'layer': 'conv1', 'seed': 2}] == {'accuracy': 0.5} and len(found) == 4
        assert [task['seed'] for task, _ in found] == [0, 1, 2, 3]


def test_undefined_values_are_the_same_twice(tmp_path):
    store = Records(tmp_path / 'f')
    for _ in range(2):
        store.add({'eps': float('inf')}, {'loss': float('nan')})
    assert len(store) == 1 and math.isnan(store[{'eps': float('inf')}]['loss'])


def test_what_a_store_refuses(tmp_path):
    store = Records(tmp_path / 'f')
    for task, values, error, message in [
        ({'seed': 1}, {'seed': 2}, ValueError, "'seed' is in the task and in the values"),
        ({'model': torch.nn.ReLU()}, {}, TypeError, r"task\['model'\] is a ReLU"),
        ({'seed': 1}, {'x': np.zeros(3)}, TypeError, r"values\['x'\] is a ndarray.*tolist"),
        ({1: 1}, {}, TypeError, 'task has the key 1; keys are words'),
        ('seed', {}, TypeError, 'task is a str; it should be a dict'),
        ({'seed': 1}, 0.5, TypeError, 'values is a float; it should be a dict'),
    ]:
        with pytest.raises(error, match=message):
            store.add(task, values)
    with pytest.raises(TypeError, match='task is a int'):
        3 in store  # noqa: B015
    with pytest.raises(KeyError, match="f has no record of {'seed': 9}"):
        store[{'seed': 9}]
    assert not store.path.exists()


def test_what_is_read_is_a_copy(tmp_path):
    store = Records(tmp_path / 'f')
    values = {'list': [1]}
    store.add({'seed': 1}, values)
    values['list'].append(2)
    store[{'seed': 1}]['list'].append(3)
    for task, found in store:
        found['list'].append(4)
        task['seed'] = 5
    assert list(store) == [({'seed': 1}, {'list': [1]})]


def test_tables_of_records(tmp_path):
    store = Records(tmp_path / 'f')
    assert store.table().empty and repr(store) == 'Records (f, 0 records)'
    store.add({'layer': 'conv1', 'seed': 0}, {'accuracy': 0.5, 'note': None})
    store.add({'layer': 'fc', 'seed': 1, 'eps': 0.1}, {'accuracy': float('nan'), 'flipped': [1, 2]})
    table = store.table()
    assert list(table) == ['layer', 'seed', 'eps', 'accuracy', 'note', 'flipped'] and len(table) == 2
    assert table.seed.tolist() == [0, 1] and table.seed.dtype == 'int64' and table.flipped[1] == [1, 2]
    assert repr(store) == 'Records (f, 2 records)'


def test_folders_of_records_are_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = Records('new/folder/f.jsonl')
    monkeypatch.chdir('/')
    store.add({'seed': 0}, {})
    usual = tmp_path / 'usual'
    usual.touch()
    assert (tmp_path / 'new/folder/f.jsonl').stat().st_mode == usual.stat().st_mode


def test_two_stores_become_one(tmp_path):
    one, other = small(tmp_path / 'f', 3), small(tmp_path / 'g', 5)
    for task, values in other:
        one.add(task, values)
    assert list(one) == list(other)


def test_adding_does_not_read_again(tmp_path, monkeypatch):
    store, read = Records(small(tmp_path / 'f', 50).path), []
    parse = results._parse
    monkeypatch.setattr(results, '_parse', lambda *args: read.append(1) or parse(*args))
    for seed in range(50, 60):
        store.add({'layer': 'conv1', 'seed': seed}, {})
        assert {'layer': 'conv1', 'seed': seed} in store and {'seed': seed} not in store
    assert len(read) == 10 and len(store) == 60


def test_durable_records_wait_for_the_disk(tmp_path, monkeypatch):
    calls = []
    fsync = os.fsync
    monkeypatch.setattr(os, 'fsync', lambda file: calls.append(file) or fsync(file))
    small(tmp_path / 'f')
    assert not calls
    Records(tmp_path / 'f', durable=True).add({'seed': 9}, {})
    assert len(calls) == 1


# ----------------------------------------------------------------------------------------- records: what can go wrong


def test_a_line_torn_at_any_byte(tmp_path):
    store = small(tmp_path / 'f', 3)
    whole, path = store.path.read_bytes(), tmp_path / 'g'
    starts = [0, *(i + 1 for i, byte in enumerate(whole) if byte == 10)]
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        found = Records(path)
        survived = max(0, sum(start - 1 <= cut for start in starts[1:]) - 1)  # the line break alone may be missing
        assert [task['seed'] for task, _ in found] == list(range(survived))
        assert path.read_bytes() == whole[:cut]  # reading repairs nothing
        for seed in range(3):
            found.add({'layer': 'conv1', 'seed': seed}, {'accuracy': seed / 10})
        assert path.read_bytes() == (whole if cut != len(whole) - 1 else whole[:-1])


def test_an_editor_that_took_the_last_line_break_away(tmp_path):
    path = small(tmp_path / 'f').path
    path.write_bytes(path.read_bytes()[:-1])
    store = Records(path)
    assert len(store) == len(list(store)) == 4
    with pytest.raises(ValueError, match='other values'):
        store.add({'layer': 'conv1', 'seed': 3}, {'accuracy': 9})
    store.add({'layer': 'conv1', 'seed': 4}, {'accuracy': 0.4})
    assert path.read_bytes() == small(tmp_path / 'g', 5).path.read_bytes() and len(store) == len(Records(path)) == 5


def test_a_store_that_is_open_survives_a_torn_line(tmp_path):
    store = small(tmp_path / 'f')
    whole = store.path.read_bytes()
    with store.path.open('ab') as file:
        file.write(b'{"task":{"layer":"conv')
    assert len(store) == 4
    store.add({'seed': 'next'}, {})
    assert store.path.read_bytes().startswith(whole + b'{"task":{"seed":"next"}') and len(Records(store.path)) == 5


def test_any_damaged_byte_is_found(tmp_path):
    whole, path = small(tmp_path / 'f').path.read_bytes(), tmp_path / 'g'
    header = whole.index(b'\n') + 1
    for place in range(len(whole) - 1):
        number = whole[:place].count(b'\n') + 1
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        message = f'line {number} of .*g is damaged' if place >= header else 'line 1 of|not a record store|another format'
        with pytest.raises(ValueError, match=message):
            Records(path)
    path.write_bytes(b'\n' + whole)
    with pytest.raises(ValueError, match='line 1 of .*g is damaged: .*; restore the file$'):
        Records(path)
    for strange in (b'\n', b'\0' * 30 + b'\n', b'{"task":{},"values":{}}\n'):
        path.write_bytes(whole[:header] + strange + whole[header:])
        with pytest.raises(ValueError, match='line 2 of .*g is damaged.*delete this line and do its task again'):
            Records(path)


def test_nothing_is_added_to_a_damaged_store(tmp_path):
    store = small(tmp_path / 'f')
    with store.path.open('ab') as file:
        file.write(b'something else\n')
    before = store.path.read_bytes()
    with pytest.raises(ValueError, match='line 6 of .* is damaged: .*something else'):
        store.add({'seed': 9}, {})
    assert store.path.read_bytes() == before
    store.path.write_bytes(before.replace(b'something else\n', b''))  # as the message says
    store.add({'seed': 9}, {})
    assert len(store) == 5


@pytest.mark.parametrize('content', [b'\x80\x04.', b'<!DOCTYPE html>', b'{"a": 1}\n', b'{"robustnb":"other"}\n', b'x'])
def test_files_that_are_no_store(tmp_path, content):
    (tmp_path / 'f').write_bytes(content)
    with pytest.raises(ValueError, match='f is not a record store: it begins with'):
        Records(tmp_path / 'f')
    assert (tmp_path / 'f').read_bytes() == content


def test_a_result_is_no_store(tmp_path):
    Result(profile()).save(tmp_path / 'f')
    with pytest.raises(ValueError, match='is not a record store'):
        Records(tmp_path / 'f')


@pytest.mark.parametrize('number', [b'2', b'10', b'"x"'])
def test_a_store_of_a_newer_version(tmp_path, number):
    (tmp_path / 'f').write_bytes(b'{"robustnb":"records","format":%s,"version":"9"}\n' % number)
    with pytest.raises(ValueError, match='another format: a newer robustnb wrote it; upgrade to read it'):
        Records(tmp_path / 'f')


def test_the_header(tmp_path):
    header = json.loads(small(tmp_path / 'f').path.read_bytes().splitlines()[0])
    header.pop('sum')
    assert header == {'robustnb': 'records', 'format': 1, 'version': provenance()['robustnb']}


@pytest.mark.parametrize('harm', [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:200])])
def test_a_store_that_was_cut_or_removed(tmp_path, harm):
    store = small(tmp_path / 'f')
    harm(store.path)
    for act in (lambda: store.add({'seed': 9}, {}), lambda: len(store), lambda: store.table(), lambda: {} in store):
        with pytest.raises(ValueError, match='is not the file that it was.*Open it again with Records'):
            act()


@pytest.mark.parametrize('torn', [b'', b'{"task":{"seed'])
def test_a_store_that_was_replaced_by_a_longer_one(tmp_path, torn):
    store, other = small(tmp_path / 'f'), Records(tmp_path / 'g')
    for seed in range(40):
        other.add({'seed': seed}, {'loss': 1})
    with other.path.open('ab') as file:
        file.write(torn)
    os.replace(other.path, store.path)
    whole = store.path.read_bytes()
    for act in (lambda: store.add({'seed': 9}, {}), lambda: len(store), lambda: {} in store):
        with pytest.raises(ValueError, match='is not the file that it was.*Open it again with Records'):
            act()
    assert store.path.read_bytes() == whole and len(Records(store.path)) == 40


@pytest.mark.parametrize('harm', [lambda path: os.replace(path.with_name('g'), path), Path.unlink])
def test_a_store_that_is_replaced_during_the_wait_for_the_lock(tmp_path, monkeypatch, harm):
    store = small(tmp_path / 'f')
    (tmp_path / 'g').write_bytes(store.path.read_bytes())
    lock = results._lock
    monkeypatch.setattr(results, '_lock', lambda file, hold: (hold and harm(store.path), lock(file, hold)))
    with pytest.raises(ValueError, match='is not the file that it was'):
        store.add({'seed': 9}, {})  # would go into a file without a name


def test_a_record_that_does_not_fit_on_the_disk(tmp_path, file_limit):
    store = small(tmp_path / 'f')
    before = store.path.read_bytes()
    with file_limit(len(before) + 30), pytest.raises(OSError, match='only 30 of .* bytes of a record could be written'):
        store.add({'seed': 9}, {})  # the system did write 30 bytes of it
    assert store.path.read_bytes() == before and len(store) == 4
    with file_limit(len(before)), pytest.raises(OSError):
        store.add({'seed': 9}, {})
    assert store.path.read_bytes() == before
    store.add({'seed': 9}, {})
    assert len(Records(store.path)) == 5


def test_a_disk_that_does_not_confirm(tmp_path, monkeypatch):
    store = small(tmp_path / 'f')
    store.durable = True

    def fail(file):
        raise OSError(errno.EIO, 'disk broken')

    monkeypatch.setattr(os, 'fsync', fail)
    with pytest.raises(OSError, match='disk broken'):
        store.add({'seed': 9}, {})
    assert len(store) == 4


def test_a_store_that_is_read_only(tmp_path, monkeypatch):
    store = small(tmp_path / 'f')
    store.path.chmod(0o400)
    assert len(Records(store.path)) == 4
    real = os.open

    def refuse(path, flags, *args):  # as the system does for anybody but root
        if flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, 'Permission denied', str(path))
        return real(path, flags, *args)

    monkeypatch.setattr(os, 'open', refuse)
    with pytest.raises(PermissionError, match='Permission denied: .*f'):
        store.add({'seed': 9}, {})
    assert len(store) == 4


def test_a_drive_without_locks(tmp_path, monkeypatch, caplog):
    def no_lock(file, hold):
        raise OSError(errno.ENOLCK, 'no locks available')

    monkeypatch.setattr(results, '_lock', no_lock)
    with caplog.at_level(logging.WARNING, 'robustnb.results'):
        store = small(tmp_path / 'f')
    assert len(Records(store.path)) == 4
    assert [record.message for record in caplog.records] == [
        f'{store.path} cannot be locked where it is: let one process at a time add records'
    ]

    def broken(file, hold):
        raise OSError(errno.EIO, 'broken')

    monkeypatch.setattr(results, '_lock', broken)
    with pytest.raises(OSError, match='broken'):
        store.add({'seed': 9}, {})


def test_a_system_without_fcntl(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, 'fcntl', None)  # importing it raises ImportError
    assert len(small(tmp_path / 'f')) == 4 and 'cannot be locked' in caplog.text


def test_the_calls_on_windows(tmp_path, monkeypatch):
    calls = []
    fake = types.SimpleNamespace(LK_LOCK=1, LK_UNLCK=0, locking=lambda file, mode, size: calls.append((mode, size)))
    monkeypatch.setitem(sys.modules, 'msvcrt', fake)
    monkeypatch.setattr(sys, 'platform', 'win32')
    store = small(tmp_path / 'f', 2)
    monkeypatch.undo()
    assert calls == [(1, 1), (0, 1)] * 2
    assert len(store) == 2 and store.path.stat().st_size < 1000  # the lock far behind the data made no hole


# --------------------------------------------------------------------------------------- records: several and killed


@needs_fork
@pytest.mark.parametrize('length, rounds', [(10, 20), (400_000, 20)])  # of the long ones some are torn
def test_a_sweep_that_is_killed_goes_on(tmp_path, length, rounds):
    script = f"""
def work(tell):
    store = Records(path)
    for i in range(len(store), 10**6):
        store.add({{'i': i}}, {{'out': 'x' * {length}}})
        tell()

total = 0
for _ in range({rounds}):
    told = killed(work, moments.uniform(0, 0.01))
    found = [task['i'] for task, _ in Records(path)]
    assert found == list(range(len(found))) and total + told <= len(found) <= total + told + 1, (total, told, len(found))
    total = len(found)
    if total * {length} > 10**7:  # begin again, to keep the file small
        os.remove(path)
        total = 0
"""
    run_python(KILLED + script, str(tmp_path / 'f'))


@needs_fork
def test_several_processes_lose_nothing(tmp_path):
    script = """
import os, sys
from robustnb.results import Records

path, processes, count = sys.argv[1], 4, 150
out, into = os.pipe()
children = []
for process in range(processes):
    if not (child := os.fork()):
        os.close(into)
        os.read(out, 1)  # until all are there
        try:
            store = Records(path)
            for i in range(count):
                store.add({'process': process, 'i': i}, {'out': 'x' * (i % 7) * 100})
                if {'shared': i} not in store:
                    store.add({'shared': i}, {'out': i})
                assert {'process': process, 'i': i} in store
            os._exit(0)
        finally:
            os._exit(1)
    children.append(child)
os.close(out), os.close(into)
store = Records(path)
while children:
    len(store)  # a reader in the middle of it meets nothing strange
    child, status = os.waitpid(-1, os.WNOHANG)
    if child:
        assert status == 0, status
        children.remove(child)
expected = [{'process': p, 'i': i} for p in range(processes) for i in range(count)] + [{'shared': i} for i in range(count)]
for found in (store, Records(path)):
    assert len(found) == len(expected) and all(task in found for task in expected)
assert open(path, 'rb').read().count(b'\\n') == len(expected) + 1
"""
    run_python(script, str(tmp_path / 'f'))


def test_several_threads_lose_nothing(tmp_path):
    store, errors = Records(tmp_path / 'f'), []

    def work(thread):
        try:
            for i in range(40):
                store.add({'thread': thread, 'i': i}, {'out': i})
                assert {'thread': thread, 'i': i} in store and len(list(store)) > i
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(store) == len(Records(store.path)) == 240


def test_two_stores_of_one_file_see_each_other(tmp_path):
    one, other = Records(tmp_path / 'f'), Records(tmp_path / 'f')
    one.add({'seed': 1}, {'out': 1})
    assert {'seed': 1} in other and len(other) == 1
    other.add({'seed': 1}, {'out': 2}, replace=True)
    assert one[{'seed': 1}] == {'out': 2}
    with pytest.raises(ValueError, match='other values'):
        one.add({'seed': 1}, {'out': 1})


def test_a_store_can_be_copied(tmp_path):
    store = small(tmp_path / 'f')
    other = copy.deepcopy(store)  # it holds no open file and no lock, so it can also be sent to another process
    other.add({'seed': 9}, {})
    assert list(store) == list(other) and len(store) == 5


@needs_fork
def test_a_lock_does_not_outlive_its_owner(tmp_path):
    script = """
import os, signal, sys
from robustnb.results import Records, _appending
from pathlib import Path

out, into = os.pipe()
if not (child := os.fork()):
    with _appending(Path(sys.argv[1])):
        os.write(into, b'.')
        signal.pause()
os.read(out, 1)
os.kill(child, signal.SIGKILL)
Records(sys.argv[1]).add({'seed': 1}, {})
with _appending(Path(sys.argv[1])):
    if not (child := os.fork()):
        signal.pause()  # a process that was forked while the lock was held
signal.alarm(5)
Records(sys.argv[1]).add({'seed': 2}, {})
os.kill(child, signal.SIGKILL)
"""
    run_python(script, str(tmp_path / 'f'))
    assert len(Records(tmp_path / 'f')) == 2


def test_a_dataset_that_is_made_when_it_is_asked_for(tmp_path):
    calls = deque()

    def make():
        calls.append(1)
        return profile()

    result = Result(make, {'why': 'late'})
    assert not calls and result.dataset is result.dataset and len(calls) == 1
    assert result.table().equals(Result(profile()).table())
    Result(make).save(tmp_path / 'late.safetensors')
    assert Result.load(tmp_path / 'late.safetensors').dataset.identical(profile())
    bad = Result(lambda: profile().assign(mean=('layer', [object()] * profile().sizes['layer'])))
    with pytest.raises((TypeError, ValueError)):
        _ = bad.dataset


def test_a_class_loads_its_own_files_after_a_cell_defined_it_again(tmp_path):
    def define():
        class Again(Result):
            kind = 'defined again'

            def table(self):
                return self.dataset.to_dataframe()

        return Again

    first, second = define(), define()
    first(xr.Dataset({'value': ('sample', [1.0, 2.0])})).save(tmp_path / 'first.safetensors')
    assert type(first.load(tmp_path / 'first.safetensors')) is first
    assert type(second.load(tmp_path / 'first.safetensors')) is second
    assert type(Result.load(tmp_path / 'first.safetensors')) is second
