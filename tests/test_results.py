"""Files and results: what goes in comes out, exactly; what cannot go in is refused at once; nothing in a file is run."""

import json
import math
import os
import stat
import subprocess
import sys
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

from robustnb import results
from robustnb.results import Result, load_arrays, provenance, save_arrays

quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
WORDS = st.text(max_size=8)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=12,
)
NUMBERS = hnp.boolean_dtypes() | hnp.integer_dtypes(endianness='=') | hnp.unsigned_integer_dtypes(endianness='=')
NUMBERS |= hnp.floating_dtypes(endianness='=', sizes=(16, 32, 64))
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


def test_the_same_content_is_the_same_bytes(tmp_path):
    for name in 'fg':
        save_arrays(tmp_path / name, {'b': np.eye(2), 'a': np.arange(3)}, {'seed': 7})
    assert (tmp_path / 'f').read_bytes() == (tmp_path / 'g').read_bytes()


@pytest.mark.parametrize(
    'arrays, message',
    [
        ({'a': np.array(['x'])}, "array 'a' has the type <U1"),
        ({'a': np.array([None])}, 'type object'),
        ({'a': np.zeros(2, 'complex128')}, 'complex128'),
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
    with pytest.raises(OSError, match='disk full'):
        save_arrays(path, {'a': np.ones(2)}, {'version': 'new'})
    assert load_arrays(path)[1] == {'version': 'old'} and [p.name for p in tmp_path.iterdir()] == ['f']


def test_a_killed_writer_leaves_the_old_file(tmp_path):
    path = tmp_path / 'f'
    save_arrays(path, {'a': np.zeros(2)}, {'version': 'old'})
    script = (
        'import os, sys, numpy as np\n'
        'from robustnb.results import save_arrays\n'
        'os.replace = lambda *args: os._exit(9)\n'
        'save_arrays(sys.argv[1], {"a": np.ones(2)}, {"version": "new"})\n'
    )
    ran = subprocess.run([sys.executable, '-c', script, str(path)])
    assert ran.returncode == 9
    assert load_arrays(path)[1] == {'version': 'old'}


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


def test_missing_and_newer_files(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_arrays(tmp_path / 'absent')
    save_file({}, tmp_path / 'f', {'robustnb': json.dumps({'format': 2, 'names': [], 'meta': {}})})
    with pytest.raises(ValueError, match='format 2: a newer robustnb wrote it'):
        load_arrays(tmp_path / 'f')


# --------------------------------------------------------------------------------------------------------- datasets

COLUMNS = st.sampled_from(
    [
        np.array([1.5, np.nan, -np.inf]),
        np.array([1, 2, 3], 'float16'),
        np.array([2**63, 0, 1], 'uint64'),
        np.array([True, False, True]),
        np.array(['conv1', '', 'Überschall\u200b\U0001f600']),
        np.array(['a', None, 3.5], dtype=object),
        np.array([True, 7, float('nan')], dtype=object),
        np.array(['2026-01-01T12:30:00.123456789', 'NaT', '1970-01-01'], 'M8[ns]'),
        np.array(['2026-01-01', 'NaT', '1066-10-14'], 'M8[s]'),
        np.array([1, -5, 'NaT'], 'm8[ms]'),
        np.array(['x', 'yy', ''], dtype=np.dtypes.StringDType()),
        np.zeros((3, 0)),
        np.arange(12.0).reshape(3, 4)[:, ::2],
    ]
)


INDEXES = [None, ['a', 'b', 'c'], [3, 1, 2], [0.5, 0.25, np.nan], pd.date_range('2026', periods=3)]


@given(
    st.dictionaries(WORDS.filter(lambda name: name not in ('i', 'j0', 'j2')), COLUMNS, max_size=4),
    st.sampled_from(INDEXES),
    st.dictionaries(WORDS, PLAIN, max_size=3),
)
@quick
def test_datasets_come_back_identical(tmp_path, columns, index, attrs):
    variables = {
        name: (['i', *(f'j{n}' for n in column.shape[1:])], column, {'note': f'about {name}', 'list': [1, None]})
        for name, column in columns.items()
    }
    dataset = xr.Dataset(variables, {} if index is None else {'i': index}, attrs)
    Result(dataset, {'seed': 3}).save(tmp_path / 'f')
    found = Result.load(tmp_path / 'f').dataset
    assert found.drop_attrs().identical(dataset.drop_attrs())
    assert list(found.variables) == list(dataset.variables) and list(found.coords) == list(dataset.coords)
    for name, variable in dataset.variables.items():
        other = found.variables[name]
        assert (other.dtype, other.dims, other.shape) == (variable.dtype, variable.dims, variable.shape)
        assert same(variable.attrs, other.attrs)
        if variable.dtype == object:
            assert same(variable.values.tolist(), other.values.tolist())
    assert same(attrs, found.attrs)


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
        (lambda: xr.Dataset(coords={'a': ('i', [1]), 'b': ('i', [3])}).set_index(i=['a', 'b']), 'reset_index'),
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
    monkeypatch.setattr(results.importlib.util, 'find_spec', lambda name: True)
    monkeypatch.setattr(results.importlib, 'import_module', found)
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
    assert len(Result(xr.Dataset({'a': ('i', np.zeros(10_000))}))._repr_html_()) < 4_000


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
