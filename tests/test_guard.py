"""The promise that a model comes back untouched, held against everything a careless guest can do; and bad inputs."""

import contextlib
import copy
import io
from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.utils.prune as prune
from torch import nn
from torch.nn.utils import parametrizations

from robustnb.guard import (
    Logits,
    Normalized,
    check_inputs,
    check_labels,
    first_tensor,
    logits_of,
    match_dtype,
    untouched,
    unwrap,
)


@pytest.fixture(autouse=True)
def generator():
    "The global generator, given back after each test."
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)


# Models to be lent


class Stateful(nn.Module):
    "Keeps things as plain attributes, as many models do."

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer('seen', torch.zeros(()))
        self.register_buffer('optional', None)
        self.register_buffer('scratch', torch.ones(3), persistent=False)
        self.calls, self.last = 0, None
        self.history, self.cache, self.shapes = [], {}, set()

    def forward(self, x):
        self.calls += 1
        self.last = x
        self.history.append(x)
        self.cache[len(x)] = x
        self.shapes.add(x.shape)
        self.seen += len(x)
        self.optional = torch.ones(2)
        return self.layer(x)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.again = self.first
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.register_buffer('one', torch.zeros(2))
        self.register_buffer('same', self.one)

    def forward(self, x):
        return self.second(self.again(self.first(x)))


def conv_net():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Dropout(),
        nn.Flatten(),
        nn.Linear(64, 3),
    )


def frozen_bn():
    net = conv_net()
    net[1].eval()
    return net


def partly_frozen():
    net = conv_net()
    net[0].weight.requires_grad_(False)
    net[5].bias.requires_grad_(False)
    return net


def with_gradients():
    net = conv_net()
    for p in list(net.parameters())[::2]:
        p.grad = torch.randn_like(p)
    return net


def hooked():
    net = conv_net()
    net[0].register_forward_hook(returns_none)
    net[0].register_forward_pre_hook(returns_none)
    net[5].register_full_backward_hook(returns_none)
    net[5].register_state_dict_post_hook(returns_none)
    return net


def returns_none(*args, **kwargs):
    "A hook that does nothing."


def recurrent():
    return nn.LSTM(4, 5, num_layers=2, dropout=0.5, batch_first=True)


def normalised_by_hand():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    parametrizations.spectral_norm(net[0])
    parametrizations.weight_norm(net[1])
    return net


def normalised_the_old_way():
    return nn.Sequential(torch.nn.utils.spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 2))


def pruned():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    prune.l1_unstructured(net[0], 'weight', 0.5)
    return net


def expanded_buffer():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    net.register_buffer('wide', torch.ones(1).expand(6))
    net.register_buffer('sparse', torch.eye(3).to_sparse())
    return net


def half_frozen_trunk():
    "The idiom that adversarial libraries get wrong: a training wrapper around a model in evaluation mode."
    return nn.Sequential(nn.Identity(), conv_net().eval())


IMAGE, ROW = (4, 1, 6, 6), (4, 4)
MODELS = {
    'conv net': (conv_net, IMAGE),
    'in evaluation mode': (lambda: conv_net().eval(), IMAGE),
    'frozen batch norm': (frozen_bn, IMAGE),
    'training wrapper': (half_frozen_trunk, IMAGE),
    'partly frozen': (partly_frozen, IMAGE),
    'with gradients': (with_gradients, IMAGE),
    'hooked': (hooked, IMAGE),
    'double': (lambda: conv_net().double(), IMAGE),
    'channels last': (lambda: conv_net().to(memory_format=torch.channels_last), IMAGE),
    'data parallel': (lambda: nn.DataParallel(frozen_bn()), IMAGE),
    'normalized': (lambda: Normalized(frozen_bn(), 0.1, 0.3), IMAGE),
    'stateful': (Stateful, ROW),
    'tied': (Tied, ROW),
    'recurrent': (recurrent, (4, 3, 4)),
    'parametrised': (normalised_by_hand, ROW),
    'spectral norm by hooks': (normalised_the_old_way, ROW),
    'pruned': (pruned, ROW),
    'expanded and sparse buffers': (expanded_buffer, ROW),
    'transformer': (lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), (4, 3, 4)),
    'scripted': (lambda: torch.jit.script(frozen_bn()), IMAGE),
    'traced': (lambda: torch.jit.trace(conv_net().eval(), torch.rand(IMAGE)), IMAGE),
    'scripted and frozen': (lambda: torch.jit.freeze(torch.jit.script(conv_net().eval())), IMAGE),
    'fx graph': (lambda: torch.fx.symbolic_trace(conv_net()), IMAGE),
    'exported': (lambda: torch.export.export(conv_net().eval(), (torch.rand(IMAGE),)).module(), IMAGE),
    'nothing inside': (nn.Identity, ROW),
}
every_model = pytest.mark.parametrize('name', MODELS)
EAGER = [n for n in MODELS if n not in ('scripted', 'traced', 'scripted and frozen', 'fx graph', 'exported')]


def make(name):
    build, shape = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = build(), torch.rand(shape)
    p = next((p for p in model.parameters() if p.is_floating_point()), x)
    return model, x.to(p.dtype)


TORCH = {
    *vars(nn.Module()),
    '_flat_weights',
    '_flat_weights_names',
    'bias',
    'eps',
    'p',
    'in_features',
    'model',
    'forward',
}
HOOKS = [k for k in vars(nn.Module()) if 'hook' in k]


def snapshot(model):
    "Everything there is to know about a model; identity for objects, values for tensors."
    modules = list(model.modules())
    tensors = [t for m in modules for t in (*m.parameters(recurse=False), *m.buffers(recurse=False))]
    scripted = isinstance(model, torch.jit.ScriptModule)
    return {
        'modules': [(name, type(m), None if scripted else id(m)) for name, m in model.named_modules()],
        'training': [getattr(m, 'training', None) for m in modules],
        'attributes': [] if scripted else [list(vars(m)) for m in modules],
        'of PyTorch': [] if scripted else [{k: describe(v) for k, v in vars(m).items() if k in TORCH} for m in modules],
        'hooks': [] if scripted else [[repr(vars(m)[k]) for k in HOOKS] for m in modules],
        'values': [None if t.is_meta else t.to_dense().tolist() for t in tensors],
        'kinds': [(t.dtype, t.device, t.shape, t.layout) for t in tensors],
        'versions': [t._version for t in model.parameters()],
        'places': [t.data_ptr() for t in model.parameters()],
        'requires_grad': [p.requires_grad for p in model.parameters()],
        'gradients': [None if p.grad is None else (id(p.grad), p.grad.tolist()) for p in model.parameters()],
    }


def describe(value):
    "Which object it is and, one level deep, what it holds."
    if isinstance(value, dict):
        return id(value), [(k, id(v)) for k, v in value.items()]
    return id(value), [id(v) for v in value] if isinstance(value, list | set) else None


def assert_same(before, after):
    for key in before:
        assert before[key] == after[key], key


# What a careless guest does


def run(model, x):
    model(x)


def differentiate(model, x):
    out = first_tensor(model(x.clone().requires_grad_()))
    if out.requires_grad:
        out.sum().backward()


def input_gradient(model, x):
    x = x.clone().requires_grad_()
    torch.autograd.grad(first_tensor(model(x)).sum(), x)


def run_without_gradients(model, x):
    with torch.no_grad():
        model(x)


def run_in_inference_mode(model, x):
    with torch.inference_mode():
        model(x)


def flip_modes(model, x):
    with contextlib.suppress(NotImplementedError):  # an exported model does not know how
        model.train()
    model(x)
    for m in model.modules():
        m.training = True


def freeze(model, x):
    for p in model.parameters():
        p.requires_grad_(False)
    model(x)


def thaw(model, x):
    for p in model.parameters():
        p.requires_grad_(p.is_floating_point())


def fill_gradients(model, x):
    for p in model.parameters():
        p.grad = torch.ones_like(p)


def add_hooks(model, x):
    for m in model.modules():
        m.register_forward_hook(returns_none)
        m.register_forward_hook(returns_none, prepend=True, with_kwargs=True, always_call=True)
        m.register_forward_pre_hook(returns_none, with_kwargs=True)
        m.register_full_backward_hook(returns_none)
        m.register_full_backward_pre_hook(returns_none)
        m.register_state_dict_post_hook(returns_none)
        m.register_state_dict_pre_hook(returns_none)
        m.register_load_state_dict_pre_hook(returns_none)
        m.register_load_state_dict_post_hook(returns_none)
    with torch.no_grad():
        model(x)


def remove_hooks(model, x):
    for m in model.modules():
        for k in HOOKS:
            if hasattr(getattr(m, k), 'clear'):
                getattr(m, k).clear()


def replace_children(model, x):
    for m in list(model.modules()):
        for name, _ in list(m.named_children()):
            setattr(m, name, nn.Identity())


def remove_and_reorder_children(model, x):
    for m in list(model.modules()):
        for name in list(m._modules)[::-1][1:]:
            m._modules.move_to_end(name) if isinstance(m._modules, OrderedDict) else m._modules.pop(name)
        m.add_module('guest', nn.Linear(2, 2))


def replace_members(model, x):
    for m in list(model.modules()):
        for name in list(m._parameters):
            setattr(m, name, nn.Parameter(torch.zeros(1)))
        for name in list(m._buffers):
            m._buffers[name] = torch.zeros(1)
        m.register_buffer('guest', torch.ones(1), persistent=False)
        m.register_parameter('visitor', nn.Parameter(torch.ones(1)))


def delete_members(model, x):
    for m in list(model.modules()):
        m._parameters.clear()
        m._buffers.clear()


def set_attributes(model, x):
    for m in model.modules():
        m.guest = 'was here'
        m.forward = lambda *args: 0


def overwrite_buffers(model, x):
    for b in model.buffers():
        if b.layout == torch.strided and 0 not in b.stride():
            b.zero_().sub_(5)
    for b in model.buffers():
        if b.layout == torch.strided and b.dim() == 1 and 0 not in b.stride():
            b.resize_(17)


def convert(model, x):
    model.to(torch.float16)


def move_away(model, x):
    model.to('meta')


def rebind_data(model, x):
    for p in model.parameters():
        p.data = torch.zeros(1, dtype=p.dtype)


def prune_weights(model, x):
    for m in list(model.modules()):
        if type(m) in (nn.Linear, nn.Conv2d) and 'weight' in m._parameters:
            prune.random_unstructured(m, 'weight', 0.5)
    model(x)


def reparametrise(model, x):
    for m in list(model.modules()):
        if type(m) in (nn.Linear, nn.Conv2d) and 'weight' in m._parameters:
            torch.nn.utils.parametrize.register_parametrization(m, 'weight', nn.Identity(), unsafe=True)
    model(x)


def cast_to_its_type(model, x):
    "What `model.compile` and accelerators do: other attributes, other classes."
    for m in model.modules():
        m.__class__ = type('Guest' + type(m).__name__, (type(m),), {})


def change_in_place(model, x=None):
    with torch.no_grad():
        model[5].bias.add_(1)


VISITS = [
    run,
    differentiate,
    input_gradient,
    run_without_gradients,
    run_in_inference_mode,
    flip_modes,
    freeze,
    thaw,
    fill_gradients,
]
ROUGH = [
    add_hooks,
    remove_hooks,
    replace_children,
    remove_and_reorder_children,
    replace_members,
    delete_members,
    set_attributes,
    overwrite_buffers,
    convert,
    move_away,
    rebind_data,
    prune_weights,
    cast_to_its_type,
]


class Impatient(Exception):
    pass


@pytest.mark.parametrize('visit', [*VISITS, *ROUGH, change_in_place], ids=lambda f: f.__name__)
@pytest.mark.filterwarnings('ignore')
def test_without_a_guard_every_visit_leaves_a_trace(visit):
    "So that the tests below can fail."
    model, x = make('hooked' if visit is remove_hooks else 'partly frozen')
    before = snapshot(model)
    visit(model, x)
    assert before != snapshot(model)


@every_model
@pytest.mark.parametrize('training', [False, True, None])
@pytest.mark.parametrize('visit', VISITS, ids=lambda f: f.__name__)
@pytest.mark.filterwarnings('ignore')
def test_visits(name, visit, training):
    model, x = make(name)
    before, versions = snapshot(model), [b._version for b in model.buffers()]
    with untouched(model, training):
        visit(model, x)
    assert_same(before, snapshot(model))
    if visit is run_without_gradients and training is False:
        now = [b._version for b in model.buffers()]
        assert name == 'stateful' or now == versions, 'restoring counted as a change'


@pytest.mark.parametrize('name', EAGER)
@pytest.mark.parametrize('visit', ROUGH, ids=lambda f: f.__name__)
@pytest.mark.filterwarnings('ignore')
def test_rough_visits(name, visit):
    model, x = make(name)
    before = snapshot(model)
    with untouched(model, training=None):
        visit(model, x)
    assert_same(before, snapshot(model))
    with untouched(model), untouched(make(name)[0]) as twin:
        torch.testing.assert_close(first_tensor(model(x)), first_tensor(twin(x)))
    torch.save(model.state_dict(), io.BytesIO())


@pytest.mark.parametrize('name', EAGER)
@pytest.mark.parametrize('error', [Impatient, KeyboardInterrupt, StopIteration, SystemExit, GeneratorExit])
@pytest.mark.filterwarnings('ignore')
def test_after_an_error(name, error):
    model, x = make(name)
    before = snapshot(model)
    with pytest.raises(error), untouched(model, training=True):
        differentiate(model, x)
        add_hooks(model, x)
        freeze(model, x)
        set_attributes(model, x)
        raise error
    assert_same(before, snapshot(model))


@every_model
@pytest.mark.filterwarnings('ignore')
def test_nested(name):
    model, x = make(name)
    before = snapshot(model)
    with untouched(model, training=True):
        first = snapshot(model)
        differentiate(model, x)
        with untouched(model):
            assert not any(getattr(m, 'training', False) for m in model.modules())
            assert all(p.grad is None for p in model.parameters()), 'gradients would be added to those of outside'
            differentiate(model, x)
            with pytest.raises(Impatient), untouched(model, training=True):
                run(model, x)
                raise Impatient
        second = snapshot(model)
        for key in ('modules', 'training', 'hooks', 'requires_grad'):
            assert first[key] == second[key], key
    assert_same(before, snapshot(model))


def test_a_counter_of_the_model_itself_counts():
    model, x = make('stateful')
    with untouched(model):
        model(x), model(x)
        model.guest = 'was here'
    assert model.calls == 2 and model.last is x and len(model.history) == 2 and not hasattr(model, 'guest')
    assert model.seen == 0 and model.optional is None, 'buffers are not for counting'


def test_nested_around_a_part():
    model, x = make('with gradients')
    before = snapshot(model)
    with untouched(model[5]), untouched(model):
        differentiate(model, x)
    assert_same(before, snapshot(model))


def test_the_same_guard_twice_in_a_row():
    model, x = make('conv net')
    before = snapshot(model)
    for _ in range(3):
        with untouched(model) as lent:
            assert lent is model
            run(model, x)
    assert_same(before, snapshot(model))


@every_model
def test_modes_inside(name):
    model, _ = make(name)
    modes = [getattr(m, 'training', None) for m in model.modules()]
    with untouched(model):
        assert not any(getattr(m, 'training', False) for m in model.modules())
    with untouched(model, training=True):
        assert all(m.training for m in model.modules())
    with untouched(model, training=None):
        assert [getattr(m, 'training', None) for m in model.modules()] == modes


def test_evaluation_mode_runs_nobodys_code():
    "Some adapters merge weights in `train()`. A flag that is set back later would leave them merged."

    class Merging(nn.Linear):
        def train(self, mode=True):
            self.weight.data += 1.0
            return super().train(mode)

    model = nn.Sequential(Merging(2, 2))
    before = model[0].weight.detach().clone()
    with untouched(model):
        model(torch.ones(1, 2))
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize('mode', [torch.no_grad, torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize('name', ['conv net', 'with gradients', 'parametrised', 'stateful'])
@pytest.mark.filterwarnings('ignore')
def test_guarding_inside_other_modes(name, mode):
    model, x = make(name)
    before = snapshot(model)
    with mode(), untouched(model, training=True):
        run(model, x)
        overwrite_buffers(model, x)
    assert_same(before, snapshot(model))


def test_a_model_of_inference_tensors():
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    assert all(t.is_inference() for t in (*model.parameters(), *model.buffers()))
    state = {k: v.tolist() for k, v in model.state_dict().items()}
    x = torch.rand(5, 4)
    with untouched(model), torch.no_grad():
        outside = model(x)
    with torch.inference_mode(), untouched(model, training=True):
        model(x)
    with torch.inference_mode(), untouched(model):
        torch.testing.assert_close(model(x), outside)
    assert {k: v.tolist() for k, v in model.state_dict().items()} == state
    assert model.training and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize('lazy', [lambda: nn.LazyLinear(3), nn.LazyBatchNorm1d, lambda: nn.LazyConv1d(3, 1)])
def test_lazy_models_are_refused_before_anything_happens(lazy):
    model = nn.Sequential(nn.Linear(2, 2), lazy())
    model[0].weight.grad = grad = torch.ones(2, 2)
    with pytest.raises(ValueError, match='run the model once on a batch'), untouched(model):
        raise AssertionError('the block must not run')
    assert model[0].weight.grad is grad and model.training


def test_lazy_models_after_their_first_batch():
    model = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d())
    model(torch.rand(5, 2))
    before = snapshot(model)
    with untouched(model, training=True):
        model(torch.rand(5, 2))
    assert_same(before, snapshot(model))


@pytest.mark.parametrize('model', [lambda x: x, None, 'resnet18', nn.Linear])
def test_a_model_is_a_module(model):
    with pytest.raises(TypeError, match='must be a torch.nn.Module'), untouched(model):
        pass


# Graphs that the caller still needs


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('outer', [True, False])
@pytest.mark.parametrize('name', ['conv net', 'with gradients', 'parametrised', 'tied', 'recurrent'])
@pytest.mark.filterwarnings('ignore')
def test_an_outer_graph_stays_differentiable(name, outer, training):
    def gradients(visited):
        model, x = make(name)
        model.train(outer)
        x.requires_grad_()
        torch.manual_seed(1)
        loss = first_tensor(model(x)).square().sum()
        if visited:
            with untouched(model, training):
                differentiate(model, x.detach() * 3)
                flip_modes(model, x.detach())
        parameters = [p for p in model.parameters() if p.requires_grad]
        return torch.autograd.grad(loss, (x, *parameters), allow_unused=True)

    for a, b in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_graph_made_inside_stays_differentiable_outside():
    model, x = make('conv net')
    with untouched(model):
        loss = model(x).square().sum()
    grads = torch.autograd.grad(loss, list(model.parameters()))
    assert all(g.isfinite().all() for g in grads)


def test_training_goes_on_as_if_nothing_had_happened():
    def trained(visited):
        model, x = make('conv net')
        model[3].p = 0.0
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for step in range(4):
            model(x + step).square().sum().backward()
            if visited:  # between backward and step, where it is most dangerous
                with untouched(model, training=bool(step % 2)):
                    differentiate(model, x * 2)
            optimiser.step()
            optimiser.zero_grad()
        return model.state_dict()

    a, b = trained(True), trained(False)
    assert all(torch.equal(a[k], b[k]) for k in a)


# What cannot be undone


def take_a_step(model):
    model(torch.rand(IMAGE)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def load_weights(model):
    model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()})


@pytest.mark.parametrize('change', [change_in_place, take_a_step, load_weights])
def test_changed_parameters_are_reported_and_all_else_is_restored(change):
    model, x = make('with gradients')
    before = snapshot(model)
    with pytest.raises(RuntimeError, match='changed in place while the model was only lent: '):
        with untouched(model, training=True):
            add_hooks(model, x)
            set_attributes(model, x)
            remove_hooks(model, x)
            for m in model.modules():
                vars(m).pop('forward')
            change(model)
    after = snapshot(model)
    for key in set(before) - {'values', 'versions'}:
        assert before[key] == after[key], key
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, make('with gradients')[0].get_buffer(name))


def test_an_error_inside_wins_over_the_report():
    model, _ = make('conv net')
    with pytest.raises(Impatient), untouched(model):
        change_in_place(model)
        raise Impatient


def test_a_change_is_reported_by_every_guard_around_it():
    model, _ = make('conv net')
    with pytest.raises(RuntimeError, match='only lent'), untouched(model):
        with pytest.raises(RuntimeError, match='only lent'), untouched(model):
            change_in_place(model)


def test_many_changes_are_summed_up():
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(4)])
    with pytest.raises(RuntimeError) as error, untouched(model), torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert str(error.value).count('.weight') + str(error.value).count('.bias') == 5 and ' ...;' in str(error.value)


def test_a_reparametrised_model_is_usable_again():
    "Registering a parametrisation writes into the parameter, so it is reported; but the class and the members come back."
    model, x = make('conv net')
    before, out = snapshot(model), copy.deepcopy(model).eval()(x)
    with pytest.raises(RuntimeError, match='only lent'), untouched(model):
        reparametrise(model, x)
    after = snapshot(model)
    for key in set(before) - {'versions'}:
        assert before[key] == after[key], key
    torch.testing.assert_close(model.eval()(x), out)


def test_memory_is_not_copied():
    model = nn.Linear(1000, 1000)
    with untouched(model), torch.no_grad():
        assert model.weight.data_ptr() == model.weight.data.data_ptr()
        assert model.weight.untyped_storage().nbytes() == 4_000_000
    assert isinstance(model.weight, nn.Parameter) and model.weight.is_leaf


def test_copies_made_inside_are_free():
    model, x = make('with gradients')
    with untouched(model):
        twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(1)
    assert not any(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.filterwarnings('ignore')
def test_compiled_models():
    compiled_graphs = []

    def backend(graph, inputs):
        compiled_graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    try:
        for wrap in (lambda m: torch.compile(m, backend=backend), lambda m: m.compile(backend=backend) or m):
            net, x = make('conv net')
            model = wrap(net.eval())
            expected = model(x)
            count = len(compiled_graphs)
            assert count
            before = snapshot(net)
            for _ in range(2):
                with untouched(model):
                    torch.testing.assert_close(model(x), expected)
            assert_same(before, snapshot(net))
            torch.testing.assert_close(model(x), expected)
            assert len(compiled_graphs) == count, 'the guard made it compile again'
    finally:
        torch._dynamo.reset()


# Normalisation inside


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    'shape, mean, std',
    [
        ((2, 3, 4, 5), 0.5, 0.25),
        ((2, 3, 4, 5), [0.1, 0.2, 0.3], [1.0, 2.0, 4.0]),
        ((2, 3, 4, 5), [0.1, 0.2, 0.3], 0.5),
        ((2, 3, 4, 5), 0.5, (1, 2, 4)),
        ((2, 1, 4, 5), [0.13], [0.31]),
        ((2, 3, 4), [0.1, 0.2, 0.3], [1.0, 2.0, 4.0]),
        ((2, 3, 4, 5, 6), [0.1, 0.2, 0.3], [1.0, 2.0, 4.0]),
        ((6, 3), [0.1, 0.2, 0.3], [1.0, 2.0, 4.0]),
        ((6, 3), 0.5, 2),
        ((0, 3, 4, 5), [0.1, 0.2, 0.3], [1.0, 2.0, 4.0]),
    ],
    ids=str,
)
def test_normalized(shape, mean, std, dtype):
    x = torch.rand(shape).to(dtype)
    channels = (1, -1) + (1,) * (len(shape) - 2)
    m, s = (np.asarray(v, dtype=np.float32).astype(np.float64) for v in (mean, std))
    expected = (x.double().numpy() - (m.reshape(channels) if m.ndim else m)) / (s.reshape(channels) if s.ndim else s)
    for given in (lambda v: v, np.asarray, lambda v: torch.tensor(v, dtype=torch.float64)):
        got = Normalized(nn.Identity(), given(mean), given(std))(x)
        assert got.dtype == dtype
        np.testing.assert_allclose(
            got.double().numpy(),
            expected,
            atol=8 * torch.finfo(dtype).eps,
            rtol=1e-6 if dtype != torch.bfloat16 else 1e-2,
        )


@pytest.mark.parametrize('training', [True, False])
def test_normalized_takes_the_mode_of_the_model(training):
    inner = frozen_bn().train(training)
    inner[1].eval()
    wrapped = Normalized(inner, 0.1, 0.3)
    assert wrapped.training == training
    assert inner.training == training
    if not training:
        assert not any(m.training for m in wrapped.modules())


def test_normalized_leaves_a_frozen_layer_frozen():
    for wrap in (lambda m: Normalized(m, 0.1, 0.3), Logits):
        inner = frozen_bn()
        wrap(inner)
        assert inner.training and not inner[1].training


def test_normalized_is_a_module():
    wrapped = Normalized(nn.Linear(3, 2), [0.1, 0.2, 0.3], [1, 2, 3])
    assert set(wrapped.state_dict()) == {'mean', 'std', 'model.weight', 'model.bias'}
    other = Normalized(nn.Linear(3, 2), 3 * [0.0], 3 * [1.0])
    other.load_state_dict(wrapped.state_dict())
    x = torch.rand(4, 3, requires_grad=True)
    torch.testing.assert_close(other(x), wrapped(x))
    torch.testing.assert_close(copy.deepcopy(wrapped)(x), wrapped(x))
    grad = torch.autograd.grad(wrapped(x).sum(), x)[0]
    torch.testing.assert_close(grad, (wrapped.model.weight.sum(0) / torch.tensor([1.0, 2, 3])).expand(4, 3))
    assert wrapped.half()(x.half()).dtype == torch.float16


@pytest.mark.parametrize('std', [0, -1, [1, 0, 1], float('nan'), [1, float('nan')], torch.zeros(3)], ids=str)
def test_std_is_positive(std):
    with pytest.raises(ValueError, match='std must be positive'):
        Normalized(nn.Identity(), 0.5, std)


@pytest.mark.parametrize('dtype', [torch.uint8, torch.int64, torch.bool], ids=str)
def test_normalized_refuses_whole_numbers(dtype):
    "Mean and std would be rounded to the type of the image: 0.13 becomes 0."
    with pytest.raises(TypeError, match=r'x\.float\(\) / 255'):
        Normalized(nn.Identity(), 0.13, 0.31)(torch.ones(1, 1, 2, 2, dtype=dtype))


# Outputs

Pair = namedtuple('Pair', 'logits aux')
Other = namedtuple('Other', 'hidden scores')


@dataclass
class Output:
    loss: object = None
    logits: object = None
    hidden: object = None


@dataclass(slots=True)
class SlotsOutput:
    loss: object
    scores: object


class PlainObject:
    def __init__(self, **values):
        vars(self).update(values)


class ModelOutput(OrderedDict):
    "As in transformers: a mapping that also takes an index and an attribute."

    def __getitem__(self, key):
        return list(self.values())[key] if isinstance(key, int) else super().__getitem__(key)

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


A, B = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])
LOSS = torch.zeros(())

OUTPUTS = [
    # output, logits=, expected; None for an error
    (A, None, A),
    ((A, B), None, A),
    ([A, B], None, A),
    ((None, A), None, A),
    ([[], (), {}, [A]], None, A),
    ({'a': A, 'b': B}, None, A),
    ({'loss': LOSS, 'logits': A}, None, A),
    ({'out': {'deep': (A, B)}}, None, A),
    (Pair(A, B), None, A),
    (Other(B, A), None, B),
    (Output(loss=LOSS, logits=A), None, A),
    (Output(loss=LOSS), None, LOSS),
    (Output(hidden=(A, B)), None, A),
    (SlotsOutput(None, A), None, A),
    (PlainObject(x=3, y=A), None, A),
    (PlainObject(loss=LOSS, logits=A), None, A),
    (ModelOutput(loss=LOSS, logits=A), None, A),
    ((A, B), 1, B),
    ((A, B), -1, B),
    ([A, B], 0, A),
    (Pair(A, B), 1, B),
    (Pair(A, B), 'aux', B),
    (Other(B, A), 'scores', A),
    ({'a': A, 'b': B}, 'b', B),
    ({0: A, 1: B}, 1, B),
    (Output(logits=A, hidden=B), 'hidden', B),
    (SlotsOutput(LOSS, A), 'scores', A),
    (PlainObject(logits=A, head=B), 'head', B),
    (ModelOutput(loss=LOSS, scores=A), 'scores', A),
    (ModelOutput(loss=LOSS, scores=A), 1, A),
    ((A, {'deep': B}), lambda out: out[1]['deep'], B),
    (A, lambda out: out * 2, 2 * A),
    ('a string', None, None),
    (None, None, None),
    (3.0, None, None),
    ((), None, None),
    ({'loss': 1.0}, None, None),
    ((A, B), 2, None),
    ((A, B), 'logits', None),
    ({'a': A}, 'b', None),
    ({'a': A}, 0, None),
    (Output(logits=A), 'head', None),
    (Output(logits=A), 0, None),
    (A, 0, None),
    (A, 'logits', None),
    ({'a': (A, B)}, 'a', None),
    (A, lambda out: out.tolist(), None),
]


@pytest.mark.parametrize('output, logits, expected', OUTPUTS, ids=range(len(OUTPUTS)))
def test_logits_of(output, logits, expected):
    if expected is None:
        with pytest.raises(TypeError, match=r'logits=<key, index or function>'):
            logits_of(output, logits)
        return
    found = logits_of(output, logits)
    assert found is expected or torch.equal(found, expected)
    model = nn.Module()
    model.forward = lambda x: output
    assert torch.equal(Logits(model, logits)(torch.ones(1)), expected)


def test_the_error_says_what_was_asked_and_got():
    with pytest.raises(TypeError, match="no logits under logits='head' in an output of type dict"):
        logits_of({'a': A}, 'head')
    with pytest.raises(TypeError, match='no logits in an output of type NoneType'):
        logits_of(None)


@pytest.mark.parametrize('output', ['abc', None, 3, {}, [], {'a': 'b'}, object(), {1, 2}, range(3)])
def test_first_tensor_of_nothing(output):
    assert first_tensor(output) is None


def test_first_tensor_keeps_the_graph():
    x = torch.ones(2, requires_grad=True) * 2
    assert first_tensor([None, {'a': x}]) is x


# Wrappers


class SomebodysWrapper(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.module = self.model = model


def test_unwrap():
    net = conv_net()
    wraps = [
        lambda m: Normalized(m, 0.1, 0.3),
        lambda m: Logits(m, 'logits'),
        nn.DataParallel,
        lambda m: torch.compile(m, backend='eager'),
    ]
    assert unwrap(net) is net
    for outer in wraps:
        assert unwrap(outer(net)) is net
        for inner in wraps[:-1]:
            assert unwrap(outer(inner(net))) is net
            for innermost in wraps:
                assert unwrap(outer(inner(innermost(net)))) is net
    strange = SomebodysWrapper(net)
    assert unwrap(strange) is strange, 'a module that happens to be called module is no wrapper of ours'
    net.compile(backend='eager')
    assert unwrap(net) is net


def test_unwrap_distributed(tmp_path):
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        net = nn.Linear(2, 2)
        parallel = nn.parallel.DistributedDataParallel(net)
        assert unwrap(Normalized(parallel, 0.0, 1.0)) is net
        parallel(torch.rand(3, 2)).sum().backward()
        before = snapshot(net)
        with untouched(parallel):
            x = torch.rand(3, 2, requires_grad=True)
            torch.autograd.grad(parallel(x).sum(), x)
        assert_same(before, snapshot(net))
        net.zero_grad()
        parallel(torch.rand(3, 2)).sum().backward()
        assert all(p.grad is not None for p in net.parameters())
    finally:
        torch.distributed.destroy_process_group()


# Bad inputs

nan, inf = float('nan'), float('inf')


def image(value=None, at=()):
    x = torch.rand(8, 1, 4, 4)
    for i in at:
        x[i, 0, 1, 2] = value
    return x


BAD_INPUTS = {
    'nan pixel': (image(nan, [3]), (0, 1), ValueError, 'NaN or infinity in sample 3;'),
    'nan pixels': (image(nan, [0, 2]), (0, 1), ValueError, 'in samples 0, 2;'),
    'nan everywhere': (image(nan, range(8)), (0, 1), ValueError, r'in samples 0, 1, 2, 3, 4 \.\.\.;'),
    'inf pixel': (image(inf, [7]), (0, 1), ValueError, 'in sample 7;'),
    '-inf pixel': (image(-inf, [7]), None, ValueError, 'in sample 7;'),
    'nan in a column': (torch.tensor([0.1, nan]), (0, 1), ValueError, 'in sample 1;'),
    'nan in a row': (torch.tensor([[0.1, nan]]), (0, 1), ValueError, 'in sample 0;'),
    'half nan': (image(nan, [1]).half(), (0, 1), ValueError, 'in sample 1;'),
    'normalised': (image() * 4 - 2, (0, 1), ValueError, r'outside the bounds \(0, 1\).*Normalized\(model, mean, std\)'),
    'a little below': (image(-0.001, [1]), (0, 1), ValueError, 'outside'),
    'a little above': (image(1.001, [1]), (0, 1), ValueError, 'outside'),
    'bytes as floats': (image() * 255, (0, 1), ValueError, 'bounds='),
    'uint8': ((image() * 255).byte(), (0, 1), TypeError, r'torch.uint8; scale them to \[0, 1\] first'),
    'uint8 for 255': ((image() * 255).byte(), (0, 255), TypeError, 'torch.uint8'),
    'int64': (torch.ones(2, 3).long(), None, TypeError, 'torch.int64'),
    'bool': (torch.ones(2, 3).bool(), None, TypeError, 'torch.bool'),
    'complex': (torch.ones(2, 3) + 1j, None, TypeError, 'torch.complex64'),
    'array': (np.ones((2, 3)), (0, 1), TypeError, 'ndarray.*from_arrays'),
    'list': ([0.1], (0, 1), TypeError, 'list'),
    'none': (None, (0, 1), TypeError, 'NoneType'),
    'a number': (torch.tensor(0.5), (0, 1), ValueError, 'no batch dimension'),
}


@pytest.mark.parametrize('name', BAD_INPUTS)
def test_bad_inputs(name):
    x, bounds, error, words = BAD_INPUTS[name]
    with pytest.raises(error, match=words):
        check_inputs(x, bounds)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize('shape', [(3,), (3, 4), (3, 1, 2, 2), (0, 1, 2, 2), (0,), (2, 0)], ids=str)
def test_good_inputs(shape, dtype):
    x = torch.rand(shape).to(dtype).requires_grad_()
    got = check_inputs(x)
    assert got.shape == x.shape and got.dtype == dtype and not got.requires_grad and x.requires_grad
    assert torch.equal(got, x.detach())


@pytest.mark.parametrize(
    'values, bounds',
    [([0.0, 1.0], (0, 1)), ([0, 255], (0, 255)), ([-3, 9e9], None), ([-3, 9e9], (-inf, inf)), ([2.0, 9.0], (0, inf))],
)
def test_bounds_are_what_they_say(values, bounds):
    x = torch.tensor(values, dtype=torch.float32)
    assert torch.equal(check_inputs(x, bounds), x)


def test_rounding_is_forgiven():
    "Interpolating an image in [0, 1] may give 1.0000001, and a message about [0, 1] outside (0, 1) teaches nobody."
    check_inputs(torch.tensor([1.0000001, -1e-7]))
    with pytest.raises(ValueError):
        check_inputs(torch.tensor([1.00001]))
    with pytest.raises(ValueError):
        check_inputs(torch.tensor([-1e-5]), (0, inf))


def test_non_contiguous_inputs():
    x = torch.rand(4, 6, 6, 3).permute(0, 3, 1, 2)[:, :, ::2]
    assert torch.equal(check_inputs(x), x)
    with pytest.raises(ValueError, match='in samples 0, 1, 2, 3;'):
        check_inputs(torch.tensor([nan]).expand(4, 3))


def test_checks_inside_inference_mode():
    with torch.inference_mode():
        assert check_inputs(torch.rand(2, 3)).shape == (2, 3)
        assert check_labels(torch.tensor([0, 1]), 2).tolist() == [0, 1]


BAD_LABELS = {
    'float': (torch.tensor([0.0, 1.0]), None, TypeError, r'torch.float32.*y\.argmax\(1\)'),
    'one-hot': (torch.eye(2), None, TypeError, r'y\.argmax\(1\)'),
    'one-hot integers': (torch.eye(2).long(), None, ValueError, r'expected \(2,\)'),
    'bool': (torch.tensor([True, False]), None, TypeError, 'torch.bool'),
    'complex': (torch.tensor([1j, 2j]), None, TypeError, 'torch.complex64'),
    'list': ([0, 1], None, TypeError, 'list.*torch.as_tensor'),
    'array': (np.array([0, 1]), None, TypeError, 'ndarray'),
    'column': (torch.tensor([[0], [1]]), None, ValueError, r'\(2, 1\), expected \(2,\)'),
    'scalar': (torch.tensor(1), None, ValueError, r'expected \(2,\)'),
    'short': (torch.tensor([1]), None, ValueError, r'\(1,\), expected \(2,\)'),
    'long': (torch.tensor([1, 0, 1]), None, ValueError, r'\(3,\), expected \(2,\)'),
    'too large': (torch.tensor([0, 10]), 10, ValueError, 'from 0 to 10, the model knows 0 to 9'),
    'negative': (torch.tensor([-1, 3]), 10, ValueError, 'from -1 to 3, the model knows 0 to 9'),
    'ignored index': (torch.tensor([-100, 3]), None, ValueError, 'the model knows at least 0'),
    'too large uint8': (torch.tensor([0, 200], dtype=torch.uint8), 10, ValueError, 'to 200'),
}


@pytest.mark.parametrize('name', BAD_LABELS)
def test_bad_labels(name):
    y, classes, error, words = BAD_LABELS[name]
    with pytest.raises(error, match=words):
        check_labels(y, 2, classes)


INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64]


@pytest.mark.parametrize('dtype', INTEGERS, ids=str)
@pytest.mark.parametrize('classes', [None, 3])
def test_integer_labels_of_any_width(dtype, classes):
    got = check_labels(torch.tensor([2, 0, 1]).to(dtype), 3, classes)
    assert got.dtype == torch.int64 and got.tolist() == [2, 0, 1]
    empty = check_labels(torch.tensor([]).to(dtype), 0, classes)
    assert empty.dtype == torch.int64 and empty.shape == (0,)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_match_dtype(dtype):
    model = nn.Linear(3, 2).to(dtype)
    x = torch.rand(4, 3, dtype=torch.float64, requires_grad=True)
    got = match_dtype(x, model)
    assert got.dtype == dtype
    model(got).sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float64
    same = torch.rand(4, 3, dtype=dtype)
    assert match_dtype(same, model) is same
    assert match_dtype(x, nn.ReLU()) is x


def test_match_dtype_looks_past_whole_numbers():
    class Codebook(nn.Module):
        def __init__(self):
            super().__init__()
            self.codes = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
            self.scale = nn.Parameter(torch.ones(3, dtype=torch.float64))

    assert match_dtype(torch.rand(3), Codebook()).dtype == torch.float64
    assert match_dtype(torch.rand(3), nn.Linear(2, 2, device='meta')).device.type == 'meta'


@pytest.mark.parametrize('bounds', [(0, 1), (0.0, torch.tensor(1.0)), (torch.zeros(8), 1.0), (torch.zeros(8), torch.ones(8))])
@pytest.mark.parametrize(('value', 'fits'), [(0.5, True), (1 + 5e-7, True), (-5e-7, True), (1.01, False), (-0.01, False)])
def test_usable_says_what_check_inputs_takes(bounds, value, fits):
    from robustnb.guard import check_inputs, usable

    x = torch.full((3, 8), 0.5)
    x[1, 2] = value
    assert usable(x, bounds).tolist() == [True, fits, True]
    check_inputs(x[usable(x, bounds)], bounds)
    if not fits:
        with pytest.raises(ValueError, match='outside the bounds'):
            check_inputs(x, bounds)


def test_number_bounds_make_no_copy_of_the_inputs():
    from torch.utils._python_dispatch import TorchDispatchMode

    from robustnb.guard import check_inputs

    made = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.is_floating_point() and out.numel() > 1 and 'detach' not in str(function):
                made.append(str(function))
            return out

    x = torch.rand(10, 100)
    with Watching():
        check_inputs(x)
    assert not made
