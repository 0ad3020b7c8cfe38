"""Checkpoints: what goes in comes out, type by type and bit by bit; what cannot go in is refused; a damaged file is noticed."""

import enum
import json
import logging
import math
import os
import random
import subprocess
import sys
from collections import Counter, OrderedDict, defaultdict, namedtuple
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as torch_save
from torch import Tensor, nn
from torch.optim import lr_scheduler

from robustnb import checkpoints
from robustnb.checkpoints import load_state, random_state, restore_random_state, save_state
from robustnb.devices import sample_normal, seeded
from robustnb.results import save_arrays

quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
pytestmark = pytest.mark.filterwarnings('ignore:ComplexHalf support')

TORCH_DTYPES = [
    getattr(torch, name)
    for name in 'bool uint8 int8 int16 int32 int64 uint16 uint32 uint64 float16 bfloat16 float32 float64 '
    'float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu complex32 complex64 complex128'.split()
]
SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)
NUMBERS = hnp.boolean_dtypes() | hnp.integer_dtypes(endianness='=') | hnp.unsigned_integer_dtypes(endianness='=')
NUMBERS |= hnp.floating_dtypes(endianness='=', sizes=(16, 32, 64)) | hnp.complex_number_dtypes(endianness='=', sizes=(64, 128))


def tensor_of(dtype: torch.dtype, shape: tuple[int, ...], bits: bytes) -> Tensor:
    "A tensor with the given bits, repeated."
    count = math.prod(shape) * dtype.itemsize
    if not count:
        return torch.zeros(shape, dtype=dtype)
    array = np.frombuffer((bits * count)[:count], np.uint8).copy()
    return torch.from_numpy(array & 1 if dtype == torch.bool else array).view(dtype).reshape(shape)


TENSORS = st.builds(tensor_of, st.sampled_from(TORCH_DTYPES), SHAPES, st.binary(min_size=1, max_size=40))
ARRAYS = NUMBERS.flatmap(lambda dtype: hnp.arrays(dtype, SHAPES))
SCALARS = NUMBERS.flatmap(lambda dtype: hnp.arrays(dtype, ())).map(lambda array: array[()])
INTS = st.integers() | st.integers(min_value=-(2**63) - 1, max_value=2**63 + 1)
LEAVES = st.none() | st.booleans() | INTS | st.floats() | st.text(max_size=6) | TENSORS | ARRAYS | SCALARS
STATES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3)
    | st.lists(inner, max_size=3).map(tuple)
    | st.dictionaries(st.text(max_size=6) | INTS, inner, max_size=3),
    max_leaves=12,
)


def bits(tensor: Tensor) -> bytes:
    "All bits of a tensor, whatever its type."
    tensor = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b''


def same(a, b) -> bool:
    "The same types, the same order, the same bits; nan equals nan."
    if isinstance(a, Tensor):
        return type(b) is Tensor and (a.dtype, a.shape) == (b.dtype, b.shape) and bits(a) == bits(b)
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray | np.generic):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return len(a) == len(b) and all(same(i, j) and same(a[i], b[j]) for i, j in zip(a, b, strict=True))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float):
        return a == b and math.copysign(1, a) == math.copysign(1, b) or math.isnan(a) and math.isnan(b)
    return a == b


def returned(path: Path, state):
    "The state after it went through a file."
    save_state(path / 'f', state)
    return load_state(path / 'f')


# ------------------------------------------------------------------------------------------------------ what comes back


@given(STATES)
@quick
def test_any_state_comes_back(tmp_path, state):
    assert same(state, returned(tmp_path, state))


@pytest.mark.parametrize('shape', [(), (0,), (1,), (7,), (2, 0, 3), (2, 3)], ids=str)
@pytest.mark.parametrize('dtype', TORCH_DTYPES, ids=str)
def test_every_type_of_tensor_in_every_shape(tmp_path, dtype, shape):
    tensor = tensor_of(dtype, shape, np.random.default_rng(0).bytes(97))  # the bits of nan and inf are among them
    assert same([tensor, {'a': tensor}], returned(tmp_path, [tensor, {'a': tensor}]))


@pytest.mark.parametrize(
    'state',
    [
        None, True, 0, -1, 2**63, -(2**63), 2**64, 10**400, 0.1, 5e-324, math.inf, -math.inf, math.nan, -0.0,
        '', 'x', '\0', '\ud800', '\U0001f600\u200b"\\', [], (), {}, [[]], ((),), ({}, [()]), Counter({3: 2, 'a': -1}), Counter(),
        {'': None}, {'\ud800': 1}, {0: 'a', '0': 'b', -1: 'c'}, {2**70: 1}, {'b': 1, 'a': 2, 3: 4, 0: 5},
        {'dict': [['a', 1]]}, {'tuple': [1, 2]}, {'tensor': ['state', 'float32']}, {'int': '0x1'},  # like our own notes
    ],
    ids=ascii,
)  # fmt: skip
def test_plain_states(tmp_path, state):
    assert same(state, returned(tmp_path, state))


def test_whole_numbers_of_any_size(tmp_path):
    state = [sign * 10**power for power in (18, 19, 100, 5000) for sign in (1, -1)]  # Python writes at most 4300 decimal digits
    assert returned(tmp_path, state) == state


def test_deep_and_long_states(tmp_path):
    deep = torch.ones(1)
    for i in range(60):
        deep = [{i: (deep,)}]
    assert same(deep, returned(tmp_path, deep))
    wide = {i: torch.full((1,), i) for i in range(3000)}
    assert same(wide, returned(tmp_path, wide))


def test_places_are_told_apart(tmp_path):
    names = [3, '3', "a']['b", 'a"', "a'", '__metadata__', '', 'a/b', 'a.b', '\n', '\ud800']
    state = {name: torch.tensor(float(i)) for i, name in enumerate(names)}
    state |= {'a': {'b': torch.tensor(-1.0)}, 'l': [torch.tensor(-2.0)], 't': (torch.tensor(-3.0),), 'd': {0: torch.tensor(-4.0)}}
    assert same(state, returned(tmp_path, state))


def test_the_file_shows_its_arrays_to_other_readers(tmp_path):
    save_state(tmp_path / 'f', {'net': {'0.weight': torch.ones(2)}, 'epochs': [torch.tensor(3)]})
    found = load_file(tmp_path / 'f')
    assert {name: array.tolist() for name, array in found.items()} == {
        "state['net']['0.weight']": [1, 1], "state['epochs'][0]": 3,
    }  # fmt: skip


def test_the_same_state_is_the_same_bytes(tmp_path):
    for name in 'fg':
        save_state(tmp_path / name, {'b': torch.ones(2), 'a': (1, 2.5)})
    assert (tmp_path / 'f').read_bytes() == (tmp_path / 'g').read_bytes()


def test_views_of_all_kinds(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    views = {
        'turned': base.t(), 'steps': base[::2, 1::3], 'expanded': base[:1].expand(5, 6), 'shared': base[1], 'again': base[1],
        'flipped': base.flip(0), 'last': base.to(memory_format=torch.contiguous_format)[-1, -1],
        'channels': torch.arange(16.0).reshape(1, 2, 2, 4).to(memory_format=torch.channels_last),
        'half': base.bfloat16().t(), 'double': torch.complex(base, -base).to(torch.complex128).t(),
    }  # fmt: skip
    assert same(views, returned(tmp_path, views))
    assert (tmp_path / 'f').stat().st_size < 10_000  # a view, not what lies behind it


def test_conjugates_negatives_and_gradients(tmp_path):
    number = torch.complex(torch.arange(3.0), torch.ones(3))
    state = [number.conj(), number.conj().imag, nn.Parameter(torch.ones(2)), torch.ones(2, requires_grad=True) * 2]
    found = returned(tmp_path, state)
    assert all(type(a) is Tensor and not a.requires_grad and a.is_leaf for a in found)
    assert torch.equal(found[0], state[0]) and torch.equal(found[1], state[1])
    assert torch.equal(found[3], torch.full((2,), 2.0)) and state[2].requires_grad


def test_what_is_loaded_is_ones_own(tmp_path):
    tensor, array = torch.ones(4), np.ones(4)
    found = returned(tmp_path, {'a': tensor, 'b': tensor, 'c': array, 'd': torch.tensor([True, False])})
    found['a'].zero_()
    found['c'][:] = 0
    found['d'].logical_not_()
    assert found['b'].sum() == 4 and tensor.sum() == 4 and array.sum() == 4
    found['a'].resize_(100)  # memory of PyTorch's own


def test_numpy(tmp_path):
    base = np.arange(24).reshape(4, 6)
    state = {'turned': base.T, 'reversed': base[::-1, ::2], 'number': np.float64(0.1), 'bool': np.bool_(True), 'z': np.zeros(0)}
    found = returned(tmp_path, state)
    assert all(np.array_equal(found[name], value) and type(found[name]) is type(value) for name, value in state.items())
    big = returned(tmp_path, [base.astype('>i4'), np.array(3, '>f8')[()]])
    assert np.array_equal(big[0], base) and big[0].dtype == np.int32 and big[1] == 3
    frozen = np.ones(2)
    frozen.flags.writeable = False
    assert returned(tmp_path, frozen).tolist() == [1, 1]


def test_types_that_come_back_as_the_plain_one(tmp_path):
    nested = defaultdict(dict, a=OrderedDict(b=torch.Size([2, 3])), version=torch.__version__, word=np.str_('x'))
    assert same(returned(tmp_path, nested), {'a': {'b': (2, 3)}, 'version': str(torch.__version__), 'word': 'x'})


def test_the_default_device_and_type_do_not_matter(tmp_path):
    state = {'a': torch.ones(2), 'b': torch.ones(2).bfloat16(), 'c': np.ones(3), 'd': np.float32(1), 'chance': random_state()}
    with torch.device('meta'):
        assert same(state, returned(tmp_path, state))
        restore_random_state(random_state())


# ---------------------------------------------------------------------------------------------------------- real states


def problem() -> tuple[nn.Module, Tensor, Tensor]:
    "A small net that has everything to forget, and data."
    with seeded(0):
        net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3))
    x = sample_normal((6,), torch.arange(32))
    return net, x, x[:, :3].argmax(1)


def steps(net, x, y, optimizer, schedule, count) -> Tensor:
    "Train for some steps; all weights and buffers, as one row of numbers."

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        return loss

    for _ in range(count):
        loss = optimizer.step(closure)
        if schedule is not None:
            schedule.step(*([loss.item()] if isinstance(schedule, lr_scheduler.ReduceLROnPlateau) else []))
    return torch.cat([value.double().flatten() for value in net.state_dict().values()])


def check_resumes(tmp_path, make_optimizer, make_schedule=lambda optimizer: None):
    "Four steps, and two steps, a file and two more steps in fresh objects, give the same bits."
    net, x, y = problem()
    optimizer = make_optimizer(net.parameters())
    schedule = make_schedule(optimizer)
    torch.manual_seed(0)
    steps(net, x, y, optimizer, schedule, 2)
    state = {'net': net.state_dict(), 'optimizer': optimizer.state_dict(), 'chance': random_state()}
    state |= {'schedule': schedule.state_dict()} if schedule else {}
    save_state(tmp_path / 'f', state)
    expected = steps(net, x, y, optimizer, schedule, 2)

    net = problem()[0]
    torch.nn.init.ones_(net[0].weight)
    optimizer = make_optimizer(net.parameters())
    schedule = make_schedule(optimizer)
    found = load_state(tmp_path / 'f')
    net.load_state_dict(found['net'])
    optimizer.load_state_dict(found['optimizer'])
    if schedule:
        schedule.load_state_dict(found['schedule'])
    restore_random_state(found['chance'])
    assert bits(steps(net, x, y, optimizer, schedule, 2)) == bits(expected)


OPTIMIZERS = {
    'SGD': lambda p: torch.optim.SGD(p, 0.1),
    'momentum': lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=1e-4),
    'Adam': lambda p: torch.optim.Adam(p, 0.01, betas=(0.8, 0.99)),
    'tensor lr': lambda p: torch.optim.Adam(p, torch.tensor(0.01), foreach=False),
    'NumPy lr': lambda p: torch.optim.SGD(p, np.float64(0.1)),
    'AdamW amsgrad': lambda p: torch.optim.AdamW(p, 0.01, amsgrad=True),
    'LBFGS': lambda p: torch.optim.LBFGS(p, 0.1, max_iter=3, history_size=4),
    'strong wolfe': lambda p: torch.optim.LBFGS(p, 0.1, max_iter=3, line_search_fn='strong_wolfe'),
    'Adagrad': lambda p: torch.optim.Adagrad(p, 0.1),
    'Adadelta': lambda p: torch.optim.Adadelta(p),
    'Adafactor': lambda p: torch.optim.Adafactor(p),
    'Adamax': lambda p: torch.optim.Adamax(p),
    'NAdam': lambda p: torch.optim.NAdam(p),
    'RAdam': lambda p: torch.optim.RAdam(p),
    'RMSprop': lambda p: torch.optim.RMSprop(p, centered=True, momentum=0.5),
    'Rprop': lambda p: torch.optim.Rprop(p),
    'ASGD': lambda p: torch.optim.ASGD(p),
    'two groups': lambda p: torch.optim.Adam([{'params': q, 'lr': 0.1**i, 'name': str(i)} for i, q in enumerate(p)]),
}


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_every_optimizer_resumes(tmp_path, name):
    check_resumes(tmp_path, OPTIMIZERS[name])


SCHEDULES = {
    'StepLR': lambda o: lr_scheduler.StepLR(o, 3),
    'MultiStepLR': lambda o: lr_scheduler.MultiStepLR(o, [1, 3, 3]),
    'LambdaLR': lambda o: lr_scheduler.LambdaLR(o, lambda t: 0.9**t),
    'MultiplicativeLR': lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.9),
    'ConstantLR': lambda o: lr_scheduler.ConstantLR(o, total_iters=3),
    'LinearLR': lambda o: lr_scheduler.LinearLR(o, total_iters=3),
    'ExponentialLR': lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    'PolynomialLR': lambda o: lr_scheduler.PolynomialLR(o, 5, 2.0),
    'CosineAnnealingLR': lambda o: lr_scheduler.CosineAnnealingLR(o, 4),
    'warm restarts': lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    'CyclicLR': lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 3, cycle_momentum=True),
    'OneCycleLR': lambda o: lr_scheduler.OneCycleLR(o, 0.1, 10),
    'ReduceLROnPlateau': lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=0.5),
    'SequentialLR': lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=2), lr_scheduler.CosineAnnealingLR(o, 4)], [3]
    ),
    'ChainedScheduler': lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.StepLR(o, 2), lr_scheduler.ExponentialLR(o, 0.9)]),
}


@pytest.mark.parametrize('name', SCHEDULES)
def test_every_schedule_resumes(tmp_path, name):
    check_resumes(tmp_path, OPTIMIZERS['momentum'], SCHEDULES[name])


def test_the_table_of_optimizers_and_schedules_is_whole():
    known = {'SparseAdam', 'Muon'} | {type(make([nn.Parameter(torch.ones(2))])).__name__ for make in OPTIMIZERS.values()}
    assert {name for name in torch.optim.__all__ if name[0].isupper()} - {'Optimizer'} <= known
    with pytest.warns(UserWarning, match='before'):  # no step of the optimizer comes first here
        made = [make(OPTIMIZERS['momentum']([nn.Parameter(torch.ones(2))])) for make in SCHEDULES.values()]
        made[0].step()
    assert {name for name in lr_scheduler.__all__ if name[0].isupper()} - {'LRScheduler'} <= {type(s).__name__ for s in made}


def test_the_schedule_keeps_its_counter(tmp_path):
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], 0.1)
    state = lr_scheduler.MultiStepLR(optimizer, [1, 3, 3]).state_dict()
    found = returned(tmp_path, state)
    assert type(found['milestones']) is Counter and found == state


def test_other_states_of_pytorch(tmp_path):
    net = problem()[0]
    averaged = torch.optim.swa_utils.AveragedModel(net)
    averaged.update_parameters(net)
    scaler = torch.amp.GradScaler('cpu', init_scale=8.0)
    scaler.scale(torch.ones(1))  # its state is empty before
    state = {'scaler': scaler.state_dict(), 'averaged': dict(averaged.state_dict()), 'generator': torch.Generator().get_state()}
    found = returned(tmp_path, state)
    assert same(state, found) and found['scaler']['scale'] == 8
    torch.amp.GradScaler('cpu').load_state_dict(found['scaler'])
    torch.optim.swa_utils.AveragedModel(net).load_state_dict(found['averaged'])
    torch.Generator().set_state(found['generator'])


# ----------------------------------------------------------------------------------------------------- what is refused


class Colour(enum.IntEnum):
    RED = 1


class Word(str):
    pass


class MyTensor(Tensor):
    pass


Point = namedtuple('Point', 'x y')
LOOP: list = []
LOOP.append(LOOP)


@pytest.mark.parametrize(
    'value, message',
    [
        (lambda: 0, 'is a function, which a file of plain values cannot hold; save what it can be made from again'),
        (nn.Linear(1, 1), r'is a Linear.*save its state_dict\(\)'),
        ({1, 2}, r'is a set.*save sorted\(\) of it'),
        (frozenset(), r'is a frozenset.*sorted'),
        (Point(1, 2), r'is a Point.*plain tuple, so save tuple\(\) of it'),
        (Colour.RED, r'is a Colour.*plain int, so save int\(\)'),
        (Word('x'), r'is a Word.*plain str'),
        (type('Names', (dict,), {})(), r'is a Names.*plain dict'),
        (type('Row', (list,), {})(), r'is a Row.*plain list'),
        (b'bytes', 'is a bytes'),
        (1j, 'is a complex'),
        (datetime(2026, 1, 1), 'is a datetime'),
        (Path('a'), 'Path'),
        (torch.float32, 'is a dtype'),
        (torch.device('cpu'), 'is a device'),
        (torch.Generator(), 'is a Generator'),
        (np.datetime64('2026-01-01'), 'is a datetime64'),
        (np.longdouble(1), 'is a longdouble'),
        (np.zeros(1, 'i4,f4')[0], 'is a void'),
        (np.array(['x']), 'is a ndarray of <U1'),
        (np.array([None]), 'is a ndarray of object'),
        (np.zeros(2, np.longdouble), 'is a ndarray of'),
        (np.ma.masked_array([1, 2], [0, 1]), 'is a MaskedArray'),
        (torch.zeros(3).to_sparse(), r'without plain values: save what to_dense\(\)'),
        (torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8), r'quint8.*without plain values.*dequantize\(\)'),
        (torch.zeros(3, device='meta'), 'meta.*without plain values'),
        (torch.ones(3).as_subclass(MyTensor), 'is a MyTensor.*without plain values.*as_subclass'),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else '',
)
def test_what_is_refused(tmp_path, value, message):
    for state, place in [
        (value, 'state'), ({'a': [1, {3: (0, value)}]}, r"state\['a'\]\[1\]\[3\]\[1\]"), ([torch.ones(2), value], r'state\[1\]'),
    ]:  # fmt: skip
        with pytest.raises(TypeError, match=f'^{place} .*{message}'):
            save_state(tmp_path / 'f', state)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('key', [None, True, 0.5, (1, 2), b'x', Colour.RED, Word('x'), np.int64(3), torch.Size([1])], ids=repr)
def test_keys_that_are_refused(tmp_path, key):
    with pytest.raises(TypeError, match=r"^state\['a'\] has the key .*; keys are words and whole numbers"):
        save_state(tmp_path / 'f', {'a': {'fine': 1, key: 2}})
    assert not list(tmp_path.iterdir())


def test_a_state_that_contains_itself(tmp_path):
    with pytest.raises(ValueError, match='nested too deeply to be saved; does it contain itself'):
        save_state(tmp_path / 'f', {'a': LOOP})
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------------- files that fail


SMALL = {'a': torch.arange(6.0).reshape(2, 3), 'b': (3, [torch.tensor([True, False, True]), 2.5]), 'c': torch.ones(3).bfloat16()}


def test_a_file_that_is_cut_off_at_any_byte(tmp_path):
    path = tmp_path / 'f'
    save_state(path, SMALL)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match='f is not a whole safetensors file'):
            load_state(path)
    path.write_bytes(whole + b'\0')
    with pytest.raises(ValueError, match='not a whole safetensors file'):
        load_state(path)


def test_a_change_of_any_byte_is_noticed(tmp_path):
    path, generator = tmp_path / 'f', random.Random(0)
    save_state(path, SMALL)
    whole, quiet = path.read_bytes(), []
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= generator.randrange(1, 256)
        path.write_bytes(changed)
        try:
            quiet.append((whole[place : place + 1], same(SMALL, load_state(path))))
        except ValueError as error:
            assert str(path) in str(error) or 'array' in str(error)
    assert all(unharmed for _, unharmed in quiet), quiet  # a change that is not noticed changes nothing


@pytest.mark.parametrize('content', [b'', b'\x80\x04.', b'<!DOCTYPE html><html>', b'\xff' * 100, b'\0' * 100])
def test_files_of_another_kind(tmp_path, content):
    (tmp_path / 'f').write_bytes(content)
    with pytest.raises(ValueError, match='f is not a whole safetensors file'):
        load_state(tmp_path / 'f')


def test_files_that_somebody_else_wrote(tmp_path):
    path = tmp_path / 'f'
    save_file({'a': np.ones(2)}, path)
    with pytest.raises(ValueError, match='not one of save_state; load_arrays reads it'):
        load_state(path)
    for meta in ({}, {'state': 1}, {'made by': 'somebody'}):
        save_arrays(path, {'a': np.ones(2)}, meta)
        with pytest.raises(ValueError, match='not one of save_state; load_arrays reads it'):
            load_state(path)
    for header in ('', 'no JSON', '[]', '{}', '3', '{"names": ["b"], "meta": {}}', '{"names": [], "meta": [1]}', '[' * 10**5):
        save_file({'a': np.ones(2)}, path, {'robustnb': header})
        with pytest.raises(ValueError, match='f is '):
            load_state(path)
    save_file({}, path, {'robustnb': json.dumps({'format': 2, 'names': [], 'meta': {}})})
    with pytest.raises(ValueError, match='format 2: a newer robustnb wrote it'):
        load_state(path)
    torch_save({'w': torch.ones(3).bfloat16()}, path)
    with pytest.raises(ValueError, match='not a file of save_state.*type BF16'):
        load_state(path)
    torch.save({'a': 1}, path)
    with pytest.raises(ValueError, match='not a whole safetensors file'):
        load_state(path)


def test_a_type_that_this_pytorch_has_not(tmp_path, monkeypatch):
    save_state(tmp_path / 'f', torch.ones(2).bfloat16())
    monkeypatch.delitem(checkpoints._TYPES, 'bfloat16')
    with pytest.raises(ValueError, match=r'numbers of type bfloat16, which PyTorch .* has not; upgrade it'):
        load_state(tmp_path / 'f')


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match='absent'):
        load_state(tmp_path / 'absent')
    with pytest.raises(OSError, match=str(tmp_path)):
        load_state(tmp_path)
    save_state(str(tmp_path / 'new' / 'folder' / 'f'), {'a': 1})
    assert load_state(str(tmp_path / 'new' / 'folder' / 'f')) == {'a': 1}


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    save_state(tmp_path / 'f', {'version': 'old'})

    def fail(*args):
        raise OSError('disk full')

    monkeypatch.setattr(os, 'replace', fail)
    with pytest.raises(OSError, match='f could not be written; what was there before still is. disk full'):
        save_state(tmp_path / 'f', {'version': 'new', 'w': torch.ones(9)})
    assert load_state(tmp_path / 'f') == {'version': 'old'} and [p.name for p in tmp_path.iterdir()] == ['f']


KILLED = """
import os, random, signal, sys, time, torch
from robustnb.checkpoints import load_state, save_state

path, moments = sys.argv[1], random.Random(0)

def write(tell):
    "Write states that grow, and tell the number of each one that is written."
    state = {'step': 0, 'weights': torch.zeros(20_000), 'mask': torch.zeros(1000, dtype=torch.bool)}
    while True:
        save_state(path, state)
        os.write(tell, b'.')
        state = {'step': state['step'] + 1, 'weights': state['weights'] + 1, 'mask': ~state['mask']}

for _ in range(20):
    listen, tell = os.pipe()
    if not (child := os.fork()):
        write(tell)
    os.close(tell)
    told = len(os.read(listen, 1))
    time.sleep(moments.uniform(0, 0.02))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while more := os.read(listen, 1 << 16):
        told += len(more)
    os.close(listen)
    state = load_state(path)
    assert told - 1 <= state['step'] <= told, (told, state['step'])
    assert (state['weights'] == state['step']).all() and (state['mask'] == bool(state['step'] % 2)).all()
    print(state['step'])
"""


def run_python(script: str, *args: str) -> str:
    "What a script says in a process of its own, which must end well."
    env = os.environ | {'PJRT_DEVICE': 'CPU', 'OMP_NUM_THREADS': '1'}
    ran = subprocess.run([sys.executable, '-c', script, *args], capture_output=True, text=True, timeout=120, env=env)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='the test forks')
def test_a_writer_that_is_killed_leaves_a_whole_file(tmp_path):
    written = [int(step) for step in run_python(KILLED, str(tmp_path / 'f')).split()]
    assert len(written) == 20 and max(written) > 0


# -------------------------------------------------------------------------------------------------------------- chance


def draws() -> tuple:
    "Numbers from every generator, an odd count of normal ones: half of a pair waits for the next call."
    ours = torch.rand(3).tolist(), torch.randn(17).tolist()
    return *ours, random.gauss(0, 1), random.random(), np.random.normal(), np.random.rand()


@pytest.fixture(autouse=True)
def keep_chance():
    "Tests of chance leave it as it was."
    before = random_state()
    yield
    restore_random_state(before)


@pytest.mark.parametrize('warm', [0, 1, 2, 700])
def test_chance_comes_back(tmp_path, warm):
    torch.manual_seed(warm), random.seed(warm), np.random.seed(warm)
    for _ in range(warm):
        draws()
    state = random_state()
    expected = [draws() for _ in range(3)]
    assert draws() not in expected
    found = returned(tmp_path, state)
    assert same(found, state)
    for chance in (state, found, state):  # a state is not used up
        restore_random_state(chance)
        assert [draws() for _ in range(3)] == expected


def test_asking_draws_nothing():
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    expected = draws()
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    random_state()
    assert draws() == expected


def test_chance_in_another_process(tmp_path):
    save_state(tmp_path / 'f', random_state())
    script = (
        'import sys, random, numpy as np, torch\nfrom robustnb.checkpoints import *\n'
        'restore_random_state(load_state(sys.argv[1]))\n'
        'print(torch.rand(3).tolist(), random.random(), np.random.rand())'
    )
    assert run_python(script, str(tmp_path / 'f')).strip() == f'{torch.rand(3).tolist()} {random.random()} {np.random.rand()}'


def test_another_bit_generator_of_numpy(tmp_path):
    before = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(3))
    try:
        found = returned(tmp_path, random_state())
        expected = np.random.rand(3).tolist()
        restore_random_state(found)
        assert np.random.rand(3).tolist() == expected
    finally:
        np.random.set_bit_generator(before)


@pytest.mark.parametrize('state', [{}, {'torch': torch.zeros(3)}, {'weights': 1}])
def test_what_is_no_state_of_chance(state):
    expected = random_state()
    with pytest.raises(ValueError, match=r'not what random_state\(\) returns: it has no .*cuda, numpy, python'):
        restore_random_state(state)
    assert same(expected, random_state())


class Cuda:
    "Generators of CUDA devices that are not there."

    def __init__(self, monkeypatch, count):
        self.bits = [torch.full((16,), i, dtype=torch.uint8) for i in range(count)]
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: bool(self.bits))
        monkeypatch.setattr(torch.cuda, 'device_count', lambda: len(self.bits))
        monkeypatch.setattr(torch.cuda, 'get_rng_state_all', lambda: [bits.clone() for bits in self.bits])
        monkeypatch.setattr(torch.cuda, 'set_rng_state', self.restore)

    def restore(self, bits, device):
        assert bits.device.type == 'cpu' and bits.dtype == torch.uint8
        self.bits[device] = bits


@pytest.mark.parametrize('saved, here', [(0, 0), (1, 1), (2, 2), (2, 1), (1, 2), (2, 0), (0, 2)])
def test_cuda_devices_as_many_or_not(tmp_path, monkeypatch, caplog, saved, here):
    with monkeypatch.context() as patch:
        Cuda(patch, saved)
        save_state(tmp_path / 'f', random_state())
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        cuda = Cuda(patch, here)
        cuda.bits = [bits + 100 for bits in cuda.bits]
        restore_random_state(load_state(tmp_path / 'f'))
        assert [int(bits[0]) for bits in cuda.bits] == [i if i < saved else i + 100 for i in range(here)]
    told = [record.getMessage() for record in caplog.records]
    expected = f'the generators of {saved} CUDA devices were saved and {here} are here'
    assert (not told) if saved == here else (len(told) == 1 and told[0].startswith(expected))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
def test_on_a_gpu(tmp_path):
    state = {'w': torch.randn(5, device='cuda').bfloat16(), 'chance': random_state()}
    expected = torch.rand(5, device='cuda')
    found = returned(tmp_path, state)
    assert found['w'].device.type == 'cpu' and torch.equal(found['w'], state['w'].cpu())
    restore_random_state(found['chance'])
    assert torch.equal(torch.rand(5, device='cuda'), expected)
