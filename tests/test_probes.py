"""Probes: right values whatever the model does next, stable names, clear errors, and no trace."""

import copy
import gc
import io
import pickle
import re
import warnings
import weakref
from collections import OrderedDict
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from robustnb.guard import Logits, Normalized, untouched
from robustnb.probes import Probe, select


@pytest.fixture(autouse=True)
def generator():
    "The global generator, given back after each test."
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)


def modes():
    "How many function modes are in force."
    return torch.overrides._len_torch_function_stack()


def hooks_of(model):
    "How many hooks there are in the whole tree."
    return sum(len(v) for m in model.modules() for k, v in vars(m).items() if 'hook' in k and hasattr(v, '__len__'))


def assert_clean(model):
    assert hooks_of(model) == 0 and modes() == 0
    pickle.dumps(model)
    torch.save(model, io.BytesIO())


def conv_net(inplace=True):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=inplace), nn.Flatten(), nn.Linear(144, 3)
    )
    nn.init.normal_(net[1].bias)
    return net.eval()


IMAGES = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(3))


class Fn(nn.Module):
    "A module made of a function and some layers."

    def __init__(self, forward, **layers):
        super().__init__()
        self.fn = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.fn(self, x)


def linear(seed=0, size=4):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(size, size)


ROWS = torch.randn(3, 4, generator=torch.Generator().manual_seed(4))
grad_modes = pytest.mark.parametrize('mode', [torch.no_grad, torch.enable_grad, torch.inference_mode])


# In-place operations


@grad_modes
@pytest.mark.parametrize('detach', [True, False])
def test_in_place_relu_after_batch_norm(mode, detach):
    net = conv_net()
    with mode(), Probe(net, ['0', '1', '2'], detach=detach) as probe:
        out = net(IMAGES)
    with torch.no_grad():
        a = net[0](IMAGES)
        b = net[1](a)
    torch.testing.assert_close(probe['0'], a)
    torch.testing.assert_close(probe['1'], b)
    torch.testing.assert_close(probe['2'], b.relu())
    assert probe['1'].min() < 0
    torch.testing.assert_close(out, conv_net(inplace=False)(IMAGES))
    assert probe['1'].requires_grad == (mode is torch.enable_grad and not detach)


def test_gradients_through_rescued_representations():
    "Equal to those of a twin that writes nothing in place, with respect to input and weights, in train and eval mode."

    def gradients(inplace, training):
        net = conv_net(inplace).train(training)
        x = IMAGES.clone().requires_grad_()
        with Probe(net, ['0', '1', '2', '4'], detach=False) as probe:
            out = net(x)
        loss = sum((i + 1) * rep.square().mean() for i, rep in enumerate(probe.values())) + out.sin().sum()
        return torch.autograd.grad(loss, (x, *net.parameters()))

    for training in (False, True):
        for a, b in zip(gradients(True, training), gradients(False, training), strict=True):
            torch.testing.assert_close(a, b)


def rescue_case(name, write, needs_no_grad=False):
    return pytest.param(write, needs_no_grad, id=name)


OVERWRITES = [
    rescue_case('x += y', lambda h: h.__iadd__(torch.ones(4))),
    rescue_case('x *= y', lambda h: h.__imul__(3)),
    rescue_case('x -= y', lambda h: h.__isub__(3)),
    rescue_case('x /= y', lambda h: h.__itruediv__(3)),
    rescue_case('x[...] = y', lambda h: h.__setitem__(..., 7.0)),
    rescue_case('x[mask] = y', lambda h: h.__setitem__(h < 0, 7.0)),
    rescue_case('x[0] += y', lambda h: h[0].add_(1)),
    rescue_case('view', lambda h: h.view(-1).mul_(2)),
    rescue_case('view of a view', lambda h: h.t()[1:].view(3, 3).fill_(1)),
    rescue_case('unbind', lambda h: h.unbind(0)[1].zero_(), True),
    rescue_case('chunk', lambda h: h.chunk(2, dim=1)[1].zero_(), True),
    rescue_case('data', lambda h: h.data.add_(1)),
    rescue_case('detach', lambda h: h.detach().add_(1)),
    rescue_case('relu_', lambda h: h.relu_()),
    rescue_case('torch.relu_', lambda h: torch.relu_(h)),
    rescue_case('torch.relu_ by keyword', lambda h: torch.relu_(input=h)),
    rescue_case('F.relu_', lambda h: F.relu_(h)),
    rescue_case('F.relu(inplace)', lambda h: F.relu(h, inplace=True)),
    rescue_case('F.relu(True)', lambda h: F.relu(h, True)),
    rescue_case('F.leaky_relu_', lambda h: F.leaky_relu_(h, 0.5)),
    rescue_case('F.elu', lambda h: F.elu(h, 1.0, True)),
    rescue_case('F.hardtanh', lambda h: F.hardtanh(h, -0.1, 0.1, inplace=True)),
    rescue_case('F.silu', lambda h: F.silu(h, inplace=True)),
    rescue_case('F.dropout', lambda h: F.dropout(h, 0.5, training=True, inplace=True)),
    rescue_case('nn.ReLU', lambda h: nn.ReLU(inplace=True)(h)),
    rescue_case('nn.Dropout', lambda h: nn.Dropout(0.9, inplace=True).train()(h)),
    rescue_case('clamp_', lambda h: h.clamp_(-0.1, 0.1)),
    rescue_case('copy_', lambda h: h.copy_(torch.ones(4))),
    rescue_case('masked_fill_', lambda h: h.masked_fill_(h > 0, 9)),
    rescue_case('index_add_', lambda h: h.index_add_(0, torch.tensor([0]), torch.ones(1, 4))),
    rescue_case('scatter_', lambda h: h.scatter_(1, torch.tensor([[0]]), 5.0)),
    rescue_case('init', lambda h: nn.init.zeros_(h)),
    rescue_case('out', lambda h: torch.mul(torch.ones(3, 4), 2, out=h), True),
    rescue_case('tuple out', lambda h: torch.sort(torch.rand(3, 4), out=(h, torch.empty(3, 4).long())), True),
    rescue_case('foreach', lambda h: torch._foreach_add_([h, torch.ones(2)], 1)),
    rescue_case('aten', lambda h: torch.ops.aten.relu_(h)),
    rescue_case('aten overload', lambda h: torch.ops.aten.relu_.default(h)),
    rescue_case('metadata', lambda h: h.t_()),
]


@grad_modes
@pytest.mark.parametrize('detach', [True, False])
@pytest.mark.parametrize('write, needs_no_grad', OVERWRITES)
@pytest.mark.filterwarnings('ignore')
def test_whatever_overwrites_the_capture(write, needs_no_grad, detach, mode):
    layer = linear()

    def forward(self, x):
        h = self.layer(x)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not needs_no_grad):
            write(h)
        return h.reshape(-1)[:3].sum() + x.sum()

    net = Fn(forward, layer=layer)
    with mode(), Probe(net, 'layer', detach=detach) as probe:
        net(ROWS)
    torch.testing.assert_close(probe['layer'], layer(ROWS).detach(), check_dtype=False)
    assert_clean_but_for_lambdas(net)


def assert_clean_but_for_lambdas(model):
    assert hooks_of(model) == 0 and modes() == 0


@pytest.mark.parametrize('mode', [torch.no_grad, torch.inference_mode])
def test_resized(mode):
    net = Fn(lambda self, x: self.layer(x).resize_(100), layer=linear())
    with mode(), Probe(net, 'layer') as probe:
        net(ROWS)
        torch.testing.assert_close(probe['layer'], net.layer(ROWS))


def test_whole_numbers_and_truth_values():
    def forward(self, x):
        h = self.layer(x)
        h |= x > 100
        h &= x > 100
        h ^= x < 100
        return h

    net = Fn(forward, layer=Fn(lambda self, x: x > 0))
    with Probe(net, 'layer') as probe:
        out = net(ROWS)
    assert torch.equal(probe['layer'], ROWS > 0) and out.all()


def test_overwriting_under_no_grad_keeps_the_copy_in_the_graph():
    "As in models that clamp a hidden layer outside the graph."

    def forward(self, x):
        h = self.layer(x)
        with torch.no_grad():
            h.clamp_(-0.1, 0.1)
        return h

    net = Fn(forward, layer=linear())
    with Probe(net, 'layer', detach=False) as probe:
        net(ROWS)
    torch.testing.assert_close(probe['layer'], net.layer(ROWS))
    grad = torch.autograd.grad(probe['layer'].sum(), net.layer.weight)[0]
    torch.testing.assert_close(grad, torch.autograd.grad(net.layer(ROWS).sum(), net.layer.weight)[0])


def test_several_captures_of_one_memory():
    "Flatten returns a view, Identity the very same tensor: all three are rescued, and the last one is what it became."
    net = nn.Sequential(nn.Identity(), linear(), nn.Identity(), nn.Flatten(), nn.ReLU(inplace=True), nn.Identity())
    with torch.no_grad(), Probe(net, re.compile('.')) as probe:
        net(ROWS)
    before = net[1](ROWS).detach()
    for name in '123':
        torch.testing.assert_close(probe[name], before)
    for name in '45':
        torch.testing.assert_close(probe[name], before.relu())


def test_twice_overwritten():
    net = nn.Sequential(linear(), nn.LeakyReLU(0.5, inplace=True), nn.Hardtanh(-0.1, 0.1, inplace=True), nn.Identity())
    with torch.no_grad(), Probe(net, ['0', '1', '2']) as probe:
        net(ROWS)
    h = net[0](ROWS).detach()
    torch.testing.assert_close(probe['0'], h)
    torch.testing.assert_close(probe['1'], F.leaky_relu(h, 0.5))
    torch.testing.assert_close(probe['2'], F.leaky_relu(h, 0.5).clamp(-0.1, 0.1))


def test_a_residual_sum_in_place():
    def forward(self, x):
        out = self.a(x)
        out += x
        out = self.b(out)
        out += x
        return out

    net = Fn(forward, a=linear(0), b=linear(1))
    with torch.no_grad(), Probe(net, ['a', 'b']) as probe:
        net(ROWS)
        a = net.a(ROWS)
        b = net.b(a + ROWS)
    with torch.no_grad(), Probe(net, ['a', 'b']) as probe:
        net(ROWS)
    torch.testing.assert_close(probe['a'], a)
    torch.testing.assert_close(probe['b'], b)


def test_the_output_is_overwritten_inside_the_block():
    net = nn.Sequential(linear())
    with torch.no_grad(), Probe(net, '0') as probe:
        out = net(ROWS)
        out -= 100
    torch.testing.assert_close(probe['0'], net[0](ROWS).detach())


def test_nothing_is_copied_that_is_not_overwritten():
    net = conv_net(inplace=False)
    with torch.no_grad(), Probe(net, ['3', '4']) as probe:
        out = net(IMAGES)
    assert probe['4'].data_ptr() == out.data_ptr()
    other = nn.Sequential(linear(), nn.ReLU(), linear(1), nn.ReLU(inplace=True))
    with torch.no_grad(), Probe(other, ['0', '1']) as probe:
        kept = []
        other[0].register_forward_hook(lambda m, a, out: kept.append(out.data_ptr()))
        other(ROWS)
    assert probe['0'].data_ptr() == kept[0], 'another tensor was overwritten, not this one'


@torch.jit.script
def scripted_overwrite(x: torch.Tensor):
    x.mul_(2)
    return x


@pytest.mark.parametrize('mode', [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize('detach', [True, False])
def test_lost_captures_are_reported(mode, detach):
    net = Fn(lambda self, x: scripted_overwrite(self.layer(x)), layer=linear())
    with mode(), pytest.raises(RuntimeError, match=r'layer was overwritten in place.*rep\.clone\(\)'):
        with Probe(net, 'layer', detach=detach) as probe:
            net(ROWS)
    assert_clean_but_for_lambdas(net)
    with pytest.raises(RuntimeError, match='layer was overwritten'):
        probe['layer']
    with mode(), Probe(net, 'layer', reduce=lambda name, rep: rep.clone()) as probe:
        net(ROWS)
    torch.testing.assert_close(probe['layer'], net.layer(ROWS))


def test_lost_through_a_view_and_a_layer_called_directly():
    net = Fn(lambda self, x: scripted_overwrite(self.layer(x).view(-1)[1:]), layer=linear())
    with torch.no_grad(), pytest.raises(RuntimeError, match='layer was overwritten'), Probe(net, 'layer'):
        net(ROWS)
    with torch.no_grad(), Probe(net, 'layer') as probe:
        scripted_overwrite(net.layer(ROWS))
    with pytest.raises(RuntimeError, match='layer was overwritten'):
        probe['layer']


def test_lost_after_the_block():
    net = nn.Sequential(linear())
    with torch.no_grad(), Probe(net, '0') as probe:
        out = net(ROWS)
    torch.testing.assert_close(probe['0'], out)
    out.add_(1)
    with pytest.raises(RuntimeError, match='0 was overwritten'):
        probe['0']


def test_overwriting_something_else_is_not_reported():
    def forward(self, x):
        h = self.layer(x)
        return scripted_overwrite(h * 1) + h

    net = Fn(forward, layer=linear())
    with torch.no_grad(), Probe(net, 'layer') as probe:
        net(ROWS)
    torch.testing.assert_close(probe['layer'], net.layer(ROWS).detach())


# Reducers


@grad_modes
@pytest.mark.parametrize(
    'part',
    [
        lambda rep: rep,
        lambda rep: rep[:1],
        lambda rep: rep[:, :2],
        lambda rep: rep.view(-1),
        lambda rep: rep.t(),
        lambda rep: (rep[0], rep.mean(0)),
        lambda rep: {'first': rep[0], 'norm': rep.norm(dim=1), 'list': [rep[1]]},
    ],
    ids=range(7),
)
def test_a_reducer_may_return_a_part_of_the_representation(part, mode):
    net = nn.Sequential(linear(), nn.ReLU(inplace=True))
    with mode(), Probe(net, '0', reduce=lambda name, rep: part(rep)) as probe:
        net(ROWS)
    torch.testing.assert_close(probe['0'], part(net[0](ROWS).detach()))


def test_a_reducer_runs_at_once_and_with_the_name():
    net = conv_net()
    seen = []

    def reduce(name, rep):
        seen.append((name, float(rep.min())))
        return rep.sum()

    with torch.no_grad(), Probe(net, ['0', '1', '2'], reduce) as probe:
        net(IMAGES)
        b = net[1](net[0](IMAGES))
    assert [s[0] for s in seen][:3] == ['0', '1', '2']
    assert seen[1][1] < 0 == seen[2][1]
    assert float(probe['1#0'] if '1#0' in probe else probe['1']) == pytest.approx(float(b.sum()), rel=1e-5)


@pytest.mark.parametrize('result', [None, 3, 'text', [], object()])
def test_a_reducer_may_return_anything(result):
    net = conv_net()
    with Probe(net, '0', reduce=lambda name, rep: result) as probe:
        net(IMAGES)
    assert probe['0'] is result


def test_the_functions_of_a_reducer_are_not_seen():
    "Neither by its own probe nor by another one around it."
    net = nn.Sequential(OrderedDict(fc=linear(), relu=nn.ReLU()))
    with Probe(net) as outer:
        with Probe(
            net, ['fc', 'activations'], reduce=lambda name, rep: torch.sigmoid(rep).tanh().relu().mean()
        ) as inner:
            net(ROWS)
    assert list(inner) == ['fc', 'relu'] and list(outer) == ['relu']


def test_a_reducer_may_call_layers_of_the_model():
    "As for looking at each block through the last layer."
    net = nn.Sequential(OrderedDict(a=linear(0), b=linear(1), head=linear(2)))
    with torch.no_grad(), Probe(net, 'weights', reduce=lambda name, rep: net.head(rep)) as probe:
        out = net(ROWS)
    assert list(probe) == ['a', 'b', 'head']
    torch.testing.assert_close(probe['b'], out)
    with torch.no_grad(), Probe(net, 'a', reduce=lambda name, rep: net(rep)) as probe:
        net(ROWS)
    assert list(probe) == ['a']


def test_reduced_values_keep_the_graph_if_asked():
    net = nn.Sequential(linear(), nn.ReLU())
    with Probe(net, '0', reduce=lambda name, rep: rep.square().mean(), detach=False) as probe:
        net(ROWS)
    expected = torch.autograd.grad(net[0](ROWS).square().mean(), net[0].weight)[0]
    torch.testing.assert_close(torch.autograd.grad(probe['0'], net[0].weight)[0], expected)
    with Probe(net, '0', reduce=lambda name, rep: rep.requires_grad) as probe:
        net(ROWS)
    assert probe['0'] is False


def test_reduced_values_with_a_graph_before_an_activation_in_place():
    "What autograd has saved for the reducer is overwritten: PyTorch says so, and a copy in the reducer helps."
    net = nn.Sequential(linear(), nn.ReLU(inplace=True))
    with Probe(net, '0', reduce=lambda name, rep: rep.square().mean(), detach=False) as probe:
        net(ROWS)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        probe['0'].backward()
    with Probe(net, '0', reduce=lambda name, rep: rep.clone().square().mean(), detach=False) as probe:
        net(ROWS)
    expected = torch.autograd.grad(net[0](ROWS).square().mean(), net[0].weight)[0]
    torch.testing.assert_close(torch.autograd.grad(probe['0'], net[0].weight)[0], expected)


def test_a_detached_probe_does_not_keep_the_graph():
    "Otherwise all that autograd has saved would live as long as the probe."
    net = nn.Sequential(linear(), nn.ReLU())
    x = ROWS.clone().requires_grad_()
    saved = torch.ones(3, 4) * 2
    alive = weakref.ref(saved)
    net.append(Fn(lambda self, h, saved=[saved]: h * saved.pop()))
    with Probe(net, ['0', '2']) as probe:
        net(x)
    del saved
    gc.collect()
    assert probe['2'].grad_fn is None
    assert alive() is None, 'the graph is still alive'


def test_old_representations_are_let_go():
    net = nn.Sequential(linear())
    alive = []
    with torch.no_grad(), Probe(net, '0') as probe:
        for _ in range(3):
            net(ROWS)
            alive.append(weakref.ref(probe['0']))
    gc.collect()
    assert [a() is not None for a in alive] == [False, False, True]


# Functions


SPELLINGS = {
    'relu': [
        F.relu, torch.relu, torch.Tensor.relu, lambda x: x.relu(), lambda x: F.relu(x, inplace=True), lambda x: x.relu_(),
        torch.relu_, F.relu_, lambda x: F.relu(input=x), lambda x: torch.relu(input=x),
    ],
    'sigmoid': [F.sigmoid, torch.sigmoid, lambda x: x.sigmoid(), torch.sigmoid_, lambda x: x.sigmoid_(),
                lambda x: torch.sigmoid(x, out=torch.empty(3, 4))],
    'tanh': [F.tanh, torch.tanh, lambda x: x.tanh(), lambda x: x.tanh_()],
    'leaky_relu': [F.leaky_relu, lambda x: F.leaky_relu(x, 0.1, True), F.leaky_relu_],
    'elu': [F.elu, F.elu_, lambda x: F.elu(x, inplace=True)],
    'selu': [F.selu, torch.selu, torch.selu_],
    'celu': [F.celu, torch.celu, torch.celu_],
    'rrelu': [F.rrelu, torch.rrelu],
    'prelu': [lambda x: F.prelu(x, torch.tensor([0.1])), lambda x: torch.prelu(x, torch.tensor([0.1]))],
    'gelu': [F.gelu, lambda x: F.gelu(x, approximate='tanh')],
    'silu': [F.silu, lambda x: F.silu(x, inplace=True)],
    'mish': [F.mish], 'relu6': [F.relu6], 'hardswish': [F.hardswish], 'hardsigmoid': [F.hardsigmoid],
    'hardtanh': [F.hardtanh, F.hardtanh_], 'softplus': [F.softplus], 'softsign': [F.softsign], 'glu': [F.glu],
    'tanhshrink': [F.tanhshrink], 'hardshrink': [F.hardshrink], 'softshrink': [F.softshrink],
    'logsigmoid': [F.logsigmoid], 'threshold': [lambda x: F.threshold(x, 0.1, 0), lambda x: torch.threshold(x, 0.1, 0)],
}  # fmt: skip


@grad_modes
@pytest.mark.parametrize('name, function', [(n, f) for n, fs in SPELLINGS.items() for f in fs])
@pytest.mark.filterwarnings('ignore')
def test_every_spelling_of_every_activation(name, function, mode):
    block = Fn(lambda self, x: function(self.layer(x)) * 1, layer=linear())
    net = nn.Sequential(OrderedDict(block=block))
    try:
        with mode(), Probe(net, 'activations') as probe:
            out = net(ROWS)
    except RuntimeError as error:
        assert "don't support automatic differentiation" in str(error)
        return
    assert list(probe) == [f'block.{name}()']
    torch.testing.assert_close(probe[f'block.{name}()'], out)


def test_functions_are_named_after_their_owner():
    inner = Fn(lambda self, x: torch.tanh(F.relu(x)))
    outer = Fn(lambda self, x: self.inner(F.gelu(x)).sigmoid(), inner=inner)
    net = Fn(lambda self, x: F.relu(self.outer(F.relu(x))), outer=outer)
    with Probe(net) as probe:
        net(ROWS)
    assert list(probe) == [
        'relu()#0',
        'outer.gelu()',
        'outer.inner.relu()',
        'outer.inner.tanh()',
        'outer.sigmoid()',
        'relu()#1',
    ]
    torch.testing.assert_close(probe['relu()#0'], ROWS.relu())


ACTIVATION_MODULES = [
    nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.LeakyReLU(), nn.PReLU(), nn.RReLU(), nn.ELU(), nn.CELU(), nn.SELU(),
    nn.GELU(), nn.SiLU(), nn.Mish(), nn.GLU(), nn.Hardswish(), nn.Hardsigmoid(), nn.Hardtanh(), nn.Hardshrink(),
    nn.Softplus(), nn.Softshrink(), nn.Softsign(), nn.Tanhshrink(), nn.Sigmoid(), nn.LogSigmoid(), nn.Tanh(),
    nn.Threshold(0.1, 0),
]  # fmt: skip


@pytest.mark.parametrize('module', ACTIVATION_MODULES, ids=lambda m: type(m).__name__)
def test_a_module_is_seen_once_and_not_as_a_function(module):
    net = nn.Sequential(linear(), copy.deepcopy(module))
    with Probe(net) as probe:
        out = net(ROWS)
    assert list(probe) == ['1']
    torch.testing.assert_close(probe['1'], out.detach())


def test_subclasses_of_activations():
    class MyReLU(nn.ReLU):
        def forward(self, x):
            return F.relu(x) * 2

    net = nn.Sequential(linear(), MyReLU())
    with Probe(net) as probe:
        out = net(ROWS)
    assert list(probe) == ['1']
    torch.testing.assert_close(probe['1'], out.detach())
    assert list(select(net, nn.ReLU)) == ['1'] and list(select(net, MyReLU)) == ['1']


def test_functions_outside_of_the_model_are_not_seen():
    net = nn.Sequential(linear(), nn.ReLU())
    with Probe(net) as probe:
        torch.sigmoid(net(F.gelu(ROWS)))
    assert list(probe) == ['1']


@pytest.mark.parametrize(
    'where, expected',
    [
        ('relu()', ['relu()']),
        ('block.relu()', ['block.relu()']),
        ('block.*', ['block.layer', 'block.relu()']),
        ('*relu()', ['block.relu()', 'relu()']),
        (re.compile(r'relu\(\)$'), ['block.relu()', 'relu()']),
        (['block.layer', 'block.relu()'], ['block.layer', 'block.relu()']),
        ('weights', ['block.layer']),
        (nn.ReLU, None),
        (lambda name, module: 'relu' in name, None),
        ('nowhere.relu()', None),
        ('block.layer.relu', None),
        ('relu()#3', []),
    ],
)
def test_choosing_functions(where, expected):
    net = Fn(lambda self, x: F.relu(self.block(x)), block=Fn(lambda self, x: F.relu(self.layer(x)), layer=linear()))
    if expected is None:
        with pytest.raises(ValueError, match='chooses no layer'):
            Probe(net, where)
        return
    if not expected:
        with pytest.raises(ValueError, match='chooses no layer'), Probe(net, where):
            net(ROWS)
        return
    with Probe(net, where) as probe:
        net(ROWS)
    assert list(probe) == expected


def test_no_activation_at_all():
    net = nn.Sequential(linear())
    with pytest.raises(ValueError, match=r'chooses no layer.*0 \(Linear\)'), Probe(net):
        net(ROWS)
    assert_clean(net)


# Names, calls and passes


def test_reused_modules():
    net = Fn(lambda self, x: self.act(self.b(self.act(self.a(self.act(x))))), a=linear(0), b=linear(1), act=nn.ReLU())
    with torch.no_grad(), Probe(net, ['activations', 'b']) as probe:
        out = net(ROWS)
    assert list(probe) == ['act#0', 'act#1', 'b', 'act#2'] and len(probe) == 4
    torch.testing.assert_close(probe['act#0'], ROWS.relu())
    torch.testing.assert_close(probe['act#2'], out)
    with pytest.raises(KeyError, match='act#0, act#1, b, act#2'):
        probe['act']
    with torch.no_grad(), Probe(net, ['act#2', 'act#0']) as some:
        net(ROWS)
    assert list(some) == ['act#0', 'act#2']
    torch.testing.assert_close(some['act#2'], out)


def test_the_order_is_that_of_the_computation():
    net = Fn(lambda self, x: self.a(self.c(self.b(x))), a=linear(0), b=linear(1), c=linear(2))
    with Probe(net, 'weights') as probe:
        net(ROWS)
    assert list(probe) == ['b', 'c', 'a']
    assert list(select(net, 'weights')) == ['a', 'b', 'c']


@pytest.mark.parametrize('where', ['act#3', 'act#9', ['act#7', 'act#8']], ids=str)
def test_a_call_that_never_comes(where):
    net = Fn(lambda self, x: self.act(self.act(x)), act=nn.ReLU())
    with pytest.raises(ValueError, match='chooses no layer.*act#0, act#1'), Probe(net, where):
        net(ROWS)


def test_a_shared_module_registered_twice():
    shared = linear()
    net = Fn(lambda self, x: self.second(self.first(x).relu()), first=shared, second=shared)
    with torch.no_grad(), Probe(net, 'weights') as probe:
        out = net(ROWS)
    assert list(probe) == ['first#0', 'first#1'], 'one module, one name: the first one'
    torch.testing.assert_close(probe['first#0'], shared(ROWS).detach())
    torch.testing.assert_close(probe['first#1'], out)
    assert_clean_but_for_lambdas(net)


def test_several_forward_passes_show_the_last():
    net = conv_net()
    with torch.no_grad(), Probe(net) as probe:
        assert list(probe) == [] and len(probe) == 0
        with pytest.raises(KeyError, match='none yet, run the model'):
            probe['2']
        for batch in (IMAGES, IMAGES * 2, IMAGES[:1]):
            net(batch)
            assert list(probe) == ['2'] and len(probe['2']) == len(batch)
    torch.testing.assert_close(probe['2'], net[1](net[0](IMAGES[:1])).relu().detach())


def test_a_layer_called_directly():
    net = conv_net()
    with torch.no_grad(), Probe(net, ['0', '1']) as probe:
        alone = net[0](IMAGES)
        assert list(probe) == ['0']
        torch.testing.assert_close(probe['0'], alone)
        net[0](IMAGES * 2)
        assert list(probe) == ['0#0', '0#1']
        net(IMAGES)
        assert list(probe) == ['0', '1'], 'the whole model starts anew'


def test_a_probe_used_for_two_blocks():
    net = conv_net()
    probe = Probe(net, ['1'])
    for scale in (1, 2):
        with torch.no_grad(), probe as entered:
            assert entered is probe
            net(IMAGES * scale)
        assert_clean(net)
        torch.testing.assert_close(probe['1'], net[1](net[0](IMAGES * scale)).detach())
    net(IMAGES * 5)
    torch.testing.assert_close(probe['1'], net[1](net[0](IMAGES * 2)).detach())


def test_a_probe_cannot_enter_itself():
    net = conv_net()
    with Probe(net) as probe:
        with pytest.raises(RuntimeError, match='already at work'), probe:
            pass
        net(IMAGES)
    assert list(probe) == ['2']
    assert_clean(net)


@pytest.mark.parametrize('inplace', [True, False])
def test_nested_probes(inplace):
    net = conv_net(inplace)
    with torch.no_grad():
        with Probe(net, ['0', '1']) as outer:
            net(IMAGES)
            with Probe(net, ['1', '2']) as inner, Probe(net, 'weights', reduce=lambda n, r: r.mean()) as third:
                net(IMAGES * 2)
            assert hooks_of(net) > 0 and modes() == 1
            torch.testing.assert_close(outer['1'], inner['1'])
            torch.testing.assert_close(inner['2'], inner['1'].relu())
            torch.testing.assert_close(third['0'], outer['0'].mean())
            net(IMAGES)
        torch.testing.assert_close(outer['1'], net[1](net[0](IMAGES)))
        torch.testing.assert_close(inner['1'], net[1](net[0](IMAGES * 2)))
    assert_clean(net)


def test_nested_probes_on_model_and_part():
    net = nn.Sequential(OrderedDict(body=conv_net()[:3], flat=nn.Flatten(), head=nn.Linear(144, 3)))
    with torch.no_grad(), Probe(net, 'body.*') as whole, Probe(net.body, ['0', '1']) as part:
        net(IMAGES)
    assert list(whole) == ['body.0', 'body.1', 'body.2'] and list(part) == ['0', '1']
    torch.testing.assert_close(whole['body.1'], part['1'])


def test_a_probe_reads_like_a_dictionary():
    net = conv_net()
    with Probe(net, ['1', '2']) as probe:
        net(IMAGES)
    assert '1' in probe and '7' not in probe and probe.get('7') is None
    assert list(dict(probe)) == list(probe.keys()) == ['1', '2']
    assert [v.shape for v in probe.values()] == [(2, 4, 6, 6)] * 2
    assert probe.get('7', 3) == 3


# Models of every kind


def test_nested_containers():
    net = nn.Sequential(
        nn.Sequential(nn.Sequential(linear(), nn.ReLU()), nn.ReLU()),
        Fn(lambda self, x: self.d['b'](self.l[0](x)), l=nn.ModuleList([nn.ReLU()]), d=nn.ModuleDict({'b': nn.ReLU()})),
        nn.ReLU(),
    )
    with Probe(net) as probe:
        net(ROWS)
    assert list(probe) == ['0.0.1', '0.1', '1.l.0', '1.d.b', '2'], 'each once, at any depth'


@dataclass
class Output:
    last_hidden_state: torch.Tensor
    hidden_states: tuple | None = None


class ModelOutput(OrderedDict):
    "As in transformers."


OUTPUTS = {
    'tuple': (lambda h: (h, None), lambda h: h),
    'list': (lambda h: [None, h], lambda h: h),
    'dict': (lambda h: {'hidden': h, 'n': 3}, lambda h: h),
    'nested': (lambda h: ({'a': [h]}, h + 1), lambda h: h),
    'dataclass': (lambda h: Output(h, (h + 1,)), lambda h: h),
    'mapping': (lambda h: ModelOutput(last_hidden_state=h), lambda h: h),
    'named tuple': (lambda h: torch.max(h, dim=1), lambda h: h.max(dim=1).values),
}


@pytest.mark.parametrize('name', OUTPUTS)
def test_outputs_of_every_kind(name):
    wrap, expected = OUTPUTS[name]
    net = Fn(lambda self, x: self.part(x), part=Fn(lambda self, x: wrap(self.layer(x)), layer=linear()))
    with torch.no_grad(), Probe(net, 'part') as probe:
        net(ROWS)
    torch.testing.assert_close(probe['part'], expected(net.part.layer(ROWS).detach()))


@pytest.mark.parametrize('nothing', ['text', 3.0, (), {}, [None]], ids=str)
def test_an_output_without_a_tensor(nothing):
    net = Fn(lambda self, x: self.part(x) and x, part=Fn(lambda self, x: nothing))
    with pytest.raises(TypeError, match=f'part returns {type(nothing).__name__} without a tensor'), Probe(net, 'part'):
        net(ROWS)
    assert_clean_but_for_lambdas(net)


def test_recurrent_and_attention_layers():
    def forward(self, x):
        h, _ = self.lstm(x)
        h, _ = self.attention(h, h, h)
        return self.gru(h)[0]

    net = Fn(
        forward,
        lstm=nn.LSTM(4, 4, 2, batch_first=True),
        attention=nn.MultiheadAttention(4, 2, batch_first=True),
        gru=nn.GRU(4, 4, bidirectional=True),
    )
    x = torch.rand(3, 5, 4)
    for mode in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        with mode(), Probe(net, ['lstm', 'attention', 'gru']) as probe:
            net(x)
        assert {name: tuple(rep.shape) for name, rep in probe.items()} == {
            'lstm': (3, 5, 4),
            'attention': (3, 5, 4),
            'gru': (3, 5, 8),
        }
        torch.testing.assert_close(probe['lstm'], net.lstm(x)[0].detach())


@grad_modes
def test_a_transformer_does_not_hide_in_its_fast_path(mode):
    "In evaluation mode one fused call would replace the encoder layer, and nothing inside would be seen."
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation='gelu')
    net = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.rand(3, 5, 8)
    with mode(), Probe(net, ['weights', 'activations', 'blocks']) as probe:
        out = net(x)
    assert {'layers.0.gelu()', 'layers.1.gelu()', 'layers.0.linear1', 'layers.1', 'layers.0'} <= set(probe)
    torch.testing.assert_close(probe['layers.1'], out.detach())
    with torch.no_grad():
        torch.testing.assert_close(net(x), out.detach(), atol=1e-5, rtol=1e-4)


def test_wrappers():
    net = conv_net()
    wraps = {
        'plain': net,
        'normalized': Normalized(net, 0.1, 0.3),
        'logits': Logits(net),
        'parallel': nn.DataParallel(net),
        'both': nn.DataParallel(Normalized(Logits(net), 0.1, 0.3)),
    }
    for model in wraps.values():
        assert list(select(model, 'weights')) == ['0', '4']
        with torch.no_grad(), Probe(model, ['1', '2']) as probe:
            model(IMAGES)
        assert list(probe) == ['1', '2']
        torch.testing.assert_close(probe['2'], probe['1'].relu())
        assert_clean(model)
    torch.testing.assert_close(probe['1'], net[1](net[0]((IMAGES - 0.1) / 0.3)).detach())


def test_data_parallel_on_several_devices_is_refused():
    model = nn.DataParallel(conv_net())
    model.device_ids = [0, 1]
    with pytest.raises(ValueError, match=r'probe model\.module'):
        Probe(model)
    with pytest.raises(ValueError, match=r'probe model\.module'):
        Probe(nn.Sequential(model))
    Probe(model.module)


@pytest.fixture
def backend():
    "A compiler that counts what it compiles."
    torch._dynamo.reset()

    def compile_graph(graph, inputs):
        compile_graph.graphs.append(graph)
        return graph.forward

    compile_graph.graphs = []
    yield compile_graph
    torch._dynamo.reset()


class Block(nn.Module):
    "A class of its own: PyTorch 2.9 compiles nothing when `compile` is called on a bare nn.Sequential."

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize('how', ['torch.compile', 'model.compile', 'a part', 'a part in place', 'inside', 'outside'])
@pytest.mark.parametrize('warm', [True, False])
@pytest.mark.parametrize('detach', [True, False])
def test_compiled_models(backend, how, warm, detach):
    bn, relu = ('layers.1.layers.1', 'layers.1.layers.2')
    plain = conv_net()
    net = Block(plain[0], Block(nn.Identity(), plain[1], plain[2]), *plain[3:]).eval()
    twin = copy.deepcopy(net)
    model = net
    if how == 'torch.compile':
        model = torch.compile(net, backend=backend)
    elif how == 'model.compile':
        net.compile(backend=backend)
    elif how == 'a part in place':
        net.layers[1].compile(backend=backend)
    elif how == 'a part':
        net.layers[1] = torch.compile(net.layers[1], backend=backend)
        bn, relu = ('layers.1._orig_mod.layers.1', 'layers.1._orig_mod.layers.2')
    elif how == 'inside':
        model = Normalized(torch.compile(net, backend=backend), 0.0, 1.0)
    else:
        model = torch.compile(Normalized(net, 0.0, 1.0), backend=backend)
    expected = twin(IMAGES)
    if warm:
        torch.testing.assert_close(model(IMAGES), expected)
        assert backend.graphs
    compiled = len(backend.graphs)
    for _ in range(2):
        with Probe(model, [bn, relu], detach=detach) as probe:
            torch.testing.assert_close(model(IMAGES), expected)
        assert list(probe) == [bn, relu] and probe[bn].requires_grad == (not detach)
        torch.testing.assert_close(probe[bn].detach(), plain[1](plain[0](IMAGES)).detach())
        assert hooks_of(net) == 0 and modes() == 0
    assert len(backend.graphs) == compiled, 'probing compiled something'
    torch.testing.assert_close(model(IMAGES), expected)
    if warm:
        assert len(backend.graphs) == compiled, 'compiled again after the probe'
    else:
        assert len(backend.graphs) > compiled, 'still runs in its plain form'


def test_nested_probes_on_a_compiled_model(backend):
    net = conv_net()
    model = torch.compile(net, backend=backend)
    with torch.no_grad(), Probe(model, '1') as outer:
        with pytest.raises(KeyError), Probe(model, '2') as inner:
            model(IMAGES)
            raise KeyError
        model(IMAGES)
    assert not backend.graphs
    torch.testing.assert_close(inner['2'], outer['1'].relu())
    model(IMAGES)
    assert backend.graphs


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64], ids=str)
@grad_modes
def test_other_precisions(dtype, mode):
    net = conv_net().to(dtype)
    with mode(), Probe(net, ['1', '2', 'weights']) as probe:
        net(IMAGES.to(dtype))
    assert all(rep.dtype == dtype for rep in probe.values())
    assert probe['1'].min() < 0 == probe['2'].min()


def test_autocast():
    net = conv_net()
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16), Probe(net, ['0', '1']) as probe:
        net(IMAGES)
    assert probe['0'].dtype == torch.bfloat16


def test_models_on_meta():
    net = conv_net().to('meta')
    with torch.no_grad(), Probe(net, ['1', '2']) as probe:
        net(IMAGES.to('meta'))
    assert {n: tuple(r.shape) for n, r in probe.items()} == {'1': (2, 4, 6, 6), '2': (2, 4, 6, 6)}


def test_sparse_representations():
    net = Fn(
        lambda self, x: self.after((self.graph(x) @ x).relu_()),
        graph=Fn(lambda self, x: torch.eye(3).to_sparse()),
        after=nn.ReLU(inplace=True),
    )
    with torch.no_grad(), Probe(net, ['graph', 'activations']) as probe:
        net(ROWS)
    assert torch.equal(probe['graph'].to_dense(), torch.eye(3))


def test_empty_batches():
    net = conv_net()
    with torch.no_grad(), Probe(net, ['1', '2', '4']) as probe:
        net(IMAGES[:0])
    assert [len(v) for v in probe.values()] == [0, 0, 0]


def test_parametrised_models():
    net = nn.Sequential(
        parametrizations.spectral_norm(linear()), nn.ReLU(inplace=True), parametrizations.weight_norm(linear(1))
    )
    net.eval()
    with torch.no_grad(), Probe(net, ['0', '1', '2']) as probe:
        out = net(ROWS)
    torch.testing.assert_close(probe['0'], net[0](ROWS).detach())
    torch.testing.assert_close(probe['2'], out)


def test_a_lazy_model_is_made_while_it_is_probed():
    net = nn.Sequential(nn.LazyLinear(3), nn.ReLU())
    with Probe(net, ['0', '1']) as probe:
        net(ROWS)
    assert probe['0'].shape == (3, 3) and type(net[0]) is nn.Linear
    assert_clean(net)


def test_graph_modules():
    net = torch.fx.symbolic_trace(Fn(lambda self, x: F.relu(self.layer(x)), layer=linear()))
    with torch.no_grad(), Probe(net, ['layer', 'activations']) as probe:
        net(ROWS)
    assert list(probe) == ['layer', 'relu()']


def test_training_goes_on_while_probed():
    def trained(probed):
        net = conv_net().train()
        optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
        for step in range(3):
            if probed:
                with Probe(net, ['0', '1', '2', '4']):
                    loss = net(IMAGES + step).square().sum()
            else:
                loss = net(IMAGES + step).square().sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        return net.state_dict()

    a, b = trained(True), trained(False)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_hooks_of_the_owner_stay_and_are_honoured():
    net = conv_net()
    seen = []
    net[0].register_forward_hook(lambda m, a, out: out * 2)
    net[0].register_forward_pre_hook(lambda m, a: seen.append('pre'))
    handles = hooks_of(net)
    with torch.no_grad(), Probe(net, '0') as probe:
        net(IMAGES)
        inside = net[2].register_forward_hook(lambda m, a, out: seen.append('inside'))
        net(IMAGES)
    assert hooks_of(net) == handles + 1
    inside.remove()
    assert seen == ['pre', 'pre', 'inside']
    with torch.no_grad():
        torch.testing.assert_close(probe['0'], net[0](IMAGES))


def test_inside_untouched():
    net = conv_net().train()
    with untouched(net), torch.no_grad(), Probe(net) as probe:
        net(IMAGES)
    assert list(probe) == ['2'] and net.training
    with Probe(net) as probe:
        with untouched(net):
            net(IMAGES)
        net(IMAGES)
    assert list(probe) == ['2']
    assert_clean(net)


# Errors, and no trace


@pytest.mark.parametrize('model', [lambda x: x, None, 'resnet18', nn.Linear, torch.relu])
def test_a_model_is_a_module(model):
    for use in (Probe, select):
        with pytest.raises(TypeError, match='must be a torch.nn.Module'):
            use(model)


@pytest.mark.parametrize('kind', [torch.jit.script, lambda m: torch.jit.trace(m, IMAGES)])
def test_scripted_models_are_refused(kind):
    scripted = kind(conv_net())
    for model in (scripted, nn.Sequential(nn.Identity(), scripted), Normalized(scripted, 0.1, 0.3)):
        with pytest.raises(TypeError, match='probe the model it was made from'):
            Probe(model)


class Impatient(Exception):
    pass


def raises(*args):
    raise Impatient('here')


@pytest.mark.parametrize('error', [Impatient, KeyboardInterrupt, StopIteration, SystemExit])
@pytest.mark.parametrize('place', ['forward', 'reduce', 'block', 'function', 'hook'])
@pytest.mark.parametrize('compiled', [False, True])
def test_after_an_error_nothing_is_left(error, place, compiled):
    def fail(*args):
        raise error

    body = Fn(lambda self, x: fail() if place == 'forward' else F.relu(self.layer(x)), layer=linear())
    net = nn.Sequential(linear(), body, nn.ReLU(inplace=True))
    model = torch.compile(net, backend='eager') if compiled else net
    reduce = fail if place == 'reduce' else None
    if place == 'function':
        reduce = lambda name, rep: fail() if '()' in name else rep  # noqa: E731
    handle = net[1].register_forward_pre_hook(fail) if place == 'hook' else None
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        with pytest.raises(error), Probe(model, ['0', 'activations'], reduce) as probe:
            model(ROWS)
            fail()
    if handle:
        handle.remove()
    assert hooks_of(net) == 0 and modes() == 0
    assert probe._recorder.running == []
    place = 'none'
    body.fn = lambda self, x: F.relu(self.layer(x))
    with torch.no_grad(), Probe(model, ['0', 'activations']) as again:
        model(ROWS)
    assert list(again) == ['0', '1.relu()', '2']


def test_an_error_that_the_user_catches_inside_the_block():
    net = conv_net()
    with torch.no_grad(), Probe(net, ['1', '2']) as probe:
        with pytest.raises(RuntimeError):
            net(torch.rand(2, 3, 8, 8))
        net(IMAGES)
        assert list(probe) == ['1', '2']
    torch.testing.assert_close(probe['1'], net[1](net[0](IMAGES)).detach())


@pytest.mark.parametrize('how', ['forward', 'pre-hook', 'hook'])
def test_an_error_that_the_model_catches_itself(how):
    "The names after it must not be shifted."
    broken = nn.Sequential(OrderedDict(inner=Fn(raises) if how == 'forward' else nn.ReLU()))
    if how == 'pre-hook':
        broken.inner.register_forward_pre_hook(raises)
    if how == 'hook':
        broken.inner.register_forward_hook(raises)

    def forward(self, x):
        try:
            x = self.broken(x)
        except Impatient:
            x = F.gelu(x)
        return self.layer(x).tanh()

    net = Fn(forward, broken=broken, layer=linear())
    with torch.no_grad(), Probe(net, ['weights', re.compile(r'gelu|tanh')]) as probe:
        net(ROWS)
        net(ROWS)
    assert list(probe) == ['gelu()', 'layer', 'tanh()']


def test_if_the_hooks_cannot_be_placed_none_stays():
    net = conv_net()

    def refuse(*args, **kwargs):
        raise Impatient

    net[2].register_forward_hook = refuse
    with pytest.raises(Impatient), Probe(net):
        pass
    del net[2].register_forward_hook
    assert_clean(net)


def test_the_model_pickles_and_copies_afterwards():
    net = conv_net()
    before = pickle.dumps(net)
    with Probe(net) as probe:
        net(IMAGES)
    assert pickle.dumps(net) == before
    twin = copy.deepcopy(net)
    assert hooks_of(twin) == 0
    twin(IMAGES * 3)
    assert list(probe) == ['2'], 'the copy does not report to the probe'
    torch.jit.script(net)


def test_many_probes_leave_nothing():
    net = conv_net()
    for _ in range(50):
        with torch.no_grad(), Probe(net):
            net(IMAGES[:1])
    assert_clean(net)
    assert all(len(vars(m)) == len(vars(type(m)(*args))) for m, args in ((net[2], ()), (net[3], ())))


def test_the_probe_changes_no_result():
    net = conv_net()
    expected = net(IMAGES)
    with Probe(net, ['0', '1', '2', '3', '4'], detach=False):
        inside = net(IMAGES)
    assert torch.equal(inside, expected)
    assert [p.grad for p in net.parameters()] == [None] * 6
    assert torch.equal(
        torch.autograd.grad(inside.sum(), net[0].weight)[0], torch.autograd.grad(expected.sum(), net[0].weight)[0]
    )


# Choosing


class MyConv(nn.Conv2d):
    pass


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = MyConv(1, 2, 3)
        self.norm = nn.BatchNorm2d(2)
        self.layer1 = nn.Sequential(
            nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU()), nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU())
        )
        self.layer10 = nn.Sequential(nn.Conv2d(2, 2, 1))
        self.table = nn.Embedding(3, 2)
        self.head = nn.Bilinear(2, 2, 2)


WHERE = {
    'activations': ['layer1.0.1', 'layer1.1.1'],
    'weights': ['stem', 'layer1.0.0', 'layer1.1.0', 'layer10.0', 'head'],
    'stem': ['stem'],
    'layer1': ['layer1'],
    'layer1.*': ['layer1.0', 'layer1.0.0', 'layer1.0.1', 'layer1.1', 'layer1.1.0', 'layer1.1.1'],
    'layer1*': [
        'layer1',
        'layer1.0',
        'layer1.0.0',
        'layer1.0.1',
        'layer1.1',
        'layer1.1.0',
        'layer1.1.1',
        'layer10',
        'layer10.0',
    ],
    'layer?.0.[0-1]': ['layer1.0.0', 'layer1.0.1'],
    '*': None,
    re.compile(r'^layer1\.\d$'): ['layer1.0', 'layer1.1'],
    re.compile('LAYER10$', re.I): ['layer10'],
    nn.ReLU: ['layer1.0.1', 'layer1.1.1'],
    nn.Conv2d: ['stem', 'layer1.0.0', 'layer1.1.0', 'layer10.0'],
    MyConv: ['stem'],
    nn.Module: None,
    (nn.ReLU, nn.BatchNorm2d): ['norm', 'layer1.0.1', 'layer1.1.1'],
}


def select_cases():
    yield from WHERE.items()
    yield [nn.ReLU, nn.BatchNorm2d], ['norm', 'layer1.0.1', 'layer1.1.1']
    yield {nn.ReLU, nn.LSTM}, ['layer1.0.1', 'layer1.1.1']
    yield ['head', 'stem'], ['stem', 'head']
    yield ['head', nn.BatchNorm2d, re.compile('10$')], ['norm', 'layer10', 'head']
    yield ['activations', 'stem'], ['stem', 'layer1.0.1', 'layer1.1.1']
    yield ['stem', 'stem'], ['stem']
    yield ('stem', lambda name, module: isinstance(module, nn.Embedding)), ['stem', 'table']
    yield (lambda name, module: hasattr(module, 'num_embeddings')), ['table']
    yield (lambda name, module: 1 if name == 'norm' else 0), ['norm']


@pytest.mark.parametrize('where, expected', list(select_cases()))
def test_select(where, expected):
    model = Deep()
    chosen = select(model, where)
    names = [name for name, _ in model.named_modules() if name]
    assert list(chosen) == (names if expected is None else expected)
    assert all(model.get_submodule(name) is module for name, module in chosen.items())


@pytest.mark.parametrize(
    'where',
    ['', 'layer2', 'layer2.*', 'relu', 'Stem', 'activation', 'ReLU', [], (), set(), nn.LSTM, [nn.LSTM], str,
     re.compile('nothing'), lambda name, module: False, 'layer2.relu()', 'stem.relux()', 'layer1.0.1.7',
     ['stem', 'stemm'], ['activations', 'layer1.9']],
)  # fmt: skip
def test_a_choice_of_nothing_lists_what_there_is(where):
    model = Deep()
    for use in (select, Probe):
        with pytest.raises(ValueError, match=r'chooses no layer of this Deep; there are stem \(MyConv\), norm'):
            use(model, where)
    assert hooks_of(model) == 0


@pytest.mark.parametrize('where', [None, 3, 0.5, object(), b'stem', nn.ReLU(), ['stem', 3]])
def test_a_choice_of_the_wrong_kind(where):
    with pytest.raises(TypeError, match='expected a word, name, pattern, module type, function or a list'):
        select(Deep(), where)


def test_long_lists_of_candidates_are_cut():
    net = nn.Sequential(*[nn.Identity() for _ in range(50)])
    with pytest.raises(ValueError, match=r'19 \(Identity\) and 30 more'):
        select(net, 'x')
    with pytest.raises(ValueError, match='there are none'):
        select(nn.Identity(), 'x')


def test_an_error_in_the_chooser_is_the_users():
    with pytest.raises(ZeroDivisionError):
        select(Deep(), lambda name, module: 1 / 0)


def test_a_chosen_layer_that_is_not_used():
    net = Fn(lambda self, x: self.a(x), a=linear(), b=linear(1))
    with Probe(net, ['a', 'b']) as probe:
        net(ROWS)
    assert list(probe) == ['a']
    with pytest.raises(ValueError, match='chooses no layer'), Probe(net, 'b'):
        net(ROWS)
    assert_clean_but_for_lambdas(net)


# The nets of the field


def torchvision_model(name):
    models = pytest.importorskip('torchvision.models', exc_type=Exception)
    return getattr(models, name)(weights=None).eval()


BLOCKS = {
    'resnet18': [f'layer{i}.{j}' for i in range(1, 5) for j in range(2)],
    'vit_b_16': [f'encoder.layers.encoder_layer_{i}' for i in range(12)],
    'mobilenet_v3_small': [f'features.{i}' for i in range(13)],
}
SIZE = {'vit_b_16': 224}


@pytest.mark.parametrize('name', BLOCKS)
def test_blocks_of_known_nets(name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = torchvision_model(name)
    assert list(select(net, 'blocks')) == BLOCKS[name]
    x = torch.rand(1, 3, SIZE.get(name, 64), SIZE.get(name, 64))
    with torch.inference_mode():
        with Probe(net, 'blocks', reduce=lambda n, rep: rep.flatten(1).norm(dim=1)) as probe:
            out = net(x)
        assert list(probe) == BLOCKS[name]
        assert all(rep.shape == (1,) and rep.isfinite().all() for rep in probe.values())
        torch.testing.assert_close(net(x), out)
    assert hooks_of(net) == 0


@pytest.mark.parametrize(
    'name, count',
    [('resnet18', 17), ('alexnet', 7), ('vgg11', 10), ('squeezenet1_0', 26), ('mobilenet_v2', 35), ('densenet121', 121),
     ('shufflenet_v2_x0_5', 37), ('googlenet', 57)],
)  # fmt: skip
def test_activations_of_known_nets(name, count):
    "Each activation once: the reference implementation counts some twice, and misses nested and functional ones."
    models = pytest.importorskip('torchvision.models', exc_type=Exception)
    kwargs = {'init_weights': False} if name == 'googlenet' else {}
    with torch.random.fork_rng():
        net = getattr(models, name)(weights=None, **kwargs).eval()
    with torch.inference_mode(), Probe(net, reduce=lambda n, rep: rep.shape) as probe:
        net(torch.rand(1, 3, 64, 64))
    assert len(probe) == count
    assert hooks_of(net) == 0


def test_in_place_activations_in_a_real_net():
    "ResNet writes every ReLU and every sum in place; a twin that does not has to give the same representations."
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = torchvision_model('resnet18')
    twin = copy.deepcopy(net)
    for m in twin.modules():
        if isinstance(m, nn.ReLU):
            m.inplace = False
    x = torch.rand(2, 3, 48, 48)
    everything = re.compile('.')
    with torch.no_grad(), Probe(net, everything) as a, Probe(twin, everything) as b:
        net(x), twin(x)
    assert list(a) == list(b) and len(a) > 60
    for name in a:
        torch.testing.assert_close(a[name], b[name], msg=name)


@pytest.mark.parametrize('how', ['forward hook', 'pre-hook', 'subclass', 'in place', 'parametrised'])
def test_functions_called_by_the_owner_are_seen_among_plain_layers(how):
    "Layers of PyTorch's own need no watching, unless their owner has added something to them."

    class Own(nn.Linear):
        def forward(self, x):
            return F.relu(super().forward(x))

    net = nn.Sequential(nn.Linear(4, 4), nn.Identity(), nn.ReLU(inplace=how == 'in place'))
    if how == 'forward hook':
        net[0].register_forward_hook(lambda module, args, output: F.relu(output))
    if how == 'pre-hook':
        net[0].register_forward_pre_hook(lambda module, args: F.relu(args[0]))
    if how == 'subclass':
        net[0] = Own(4, 4)
    if how == 'parametrised':
        class Positive(nn.Module):
            def forward(self, weight):
                return F.relu(weight)

        nn.utils.parametrize.register_parametrization(net[0], 'weight', Positive())
    x = torch.linspace(-1, 1, 8).view(2, 4)
    expected = {'in place': ['1', '2'], 'pre-hook': ['relu()', '1', '2'],  # called before the layer is
                'parametrised': ['0.parametrizations.weight.0.relu()', '1', '2']}
    with torch.no_grad(), Probe(net, ['1', 'activations'], reduce=lambda name, rep: rep) as probe:
        net(x)
        assert list(probe) == expected.get(how, ['0.relu()', '1', '2'])
        assert torch.equal(probe['2'], probe['1'].relu())
        if how == 'in place':
            assert probe['1'].min() < 0, 'as it was before it was overwritten'


def test_plain_layers_get_no_hooks():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    with Probe(net):
        hooked = {name for name, module in net.named_modules() if module._forward_hooks}
    assert hooked == {'', '1', '2', '2.1'}


def test_a_forward_of_its_owner_on_a_plain_layer_is_followed():
    "A method put on one layer by hand may call an activation function, or write in place."
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    plain = net[2].forward
    net[2].forward = lambda x: F.relu(plain(x))
    for reduce in (None, lambda name, rep: rep.clone()):
        with Probe(net, 'activations', reduce=reduce) as probe:
            net(torch.ones(2, 3))
        assert list(probe) == ['1', '2.relu()']
