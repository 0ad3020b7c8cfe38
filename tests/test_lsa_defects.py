"""What goes wrong in LayersSustainabilityAnalysis 1.0.4, the published package, and not here: one test for each of its defects.

Each test says in its docstring what the package does, and would fail if that happened here. D1 to D18 are the numbers under
which the defects were noted down when the package was run; D1 to D9 give wrong numbers in silence, D10 to D14 leak or crash.
"""

import copy
import gc
import io
import logging
import pickle
import sys
import warnings

import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

from robustnb.devices import seeded
from robustnb.lsa import compare, layer_sustainability
from robustnb.measures import MEASURES
from robustnb.models import build
from robustnb.noises import Gaussian


def make(*layers) -> nn.Sequential:
    "A flat network in evaluation mode; give types or functions that build layers."
    with seeded(0):
        return nn.Sequential(*(layer() for layer in layers)).eval()


def small() -> nn.Sequential:
    return make(
        lambda: nn.Conv2d(1, 8, 3), nn.ReLU, lambda: nn.Conv2d(8, 4, 3), nn.ELU, nn.Flatten, lambda: nn.Linear(64, 4)
    )


@pytest.fixture
def net() -> nn.Sequential:
    return small()


def images(n: int = 6, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    "Clean and perturbed ones."
    x = torch.rand(n, *(shape or (1, 8, 8)), generator=torch.Generator().manual_seed(n))
    return x, (x + 0.2 * torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) - 0.1).clamp(0, 1)


def by_hand(clean: torch.Tensor, pert: torch.Tensor) -> np.ndarray:
    "Relative error of each sample, in double precision."
    clean, pert = (rep.detach().double().flatten(1).numpy() for rep in (clean, pert))
    return np.linalg.norm(pert - clean, axis=1) / np.linalg.norm(clean, axis=1)


def values(result) -> np.ndarray:
    "(layer, sample) for the only perturbation."
    return result.dataset['value'].values[:, 0]


def hooks(model: nn.Module) -> int:
    tables = ('_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks')
    return sum(len(getattr(module, table)) for module in model.modules() for table in tables)


# ----------------------------------------------------------------------------------------- wrong numbers, in silence


@pytest.mark.parametrize('measure', [name for name in MEASURES if name != 'relative_error'])
def test_d01_the_measure_is_the_one_that_was_asked_for(net, measure):
    "Ignores `measure`: 'MSE', 'relative-error', 'nonsense' and None give the same numbers."
    default, other = compare(net, *images()), compare(net, *images(), measure=measure)
    assert other.settings['measure'] == measure != default.settings['measure']
    assert not np.allclose(other.table()['mean'], default.table()['mean'], rtol=1e-3)


@pytest.mark.parametrize('measure', ['nonsense', 'relative-error', 'MSE', None])
def test_d01_a_measure_that_there_is_not_is_an_error(net, measure):
    "Takes it, and reports the relative error."
    with pytest.raises(KeyError, match='relative_error'):
        compare(net, *images(), measure=measure)


class Headed(nn.Module):
    "Convolutions in a Sequential and a head beside them: the commonest layout of all."

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU())
        self.head = nn.Linear(64, 4)

    def forward(self, x):
        return self.head(self.features(x).flatten(1))


def torchvision_net(arch: str) -> nn.Module:
    return build('torchvision', arch=arch, classes=10).eval()


def test_d02_every_activation_counts_once():
    "Hooks the layers of such a network twice: four entries for two activations, the first two of them equal."
    with seeded(0):
        result = compare(Headed(), *images())
    assert result.layers == ['features.1', 'features.3']
    assert (values(result)[0] != values(result)[1]).all()


@pytest.mark.parametrize('arch, activations', [('shufflenet_v2_x0_5', 37), ('regnet_y_400mf', 65)])
def test_d02_in_networks_of_torchvision(arch, activations):
    "38 entries for the 37 activations of ShuffleNet, 66 for the 65 of RegNet."
    assert len(compare(torchvision_net(arch), *images(2, 3, 64, 64), where=nn.ReLU).layers) == activations


def test_d03_nested_activations_are_found():
    "Looks one level deep: one activation of these three."
    model = make(
        lambda: nn.Sequential(
            nn.Flatten(),
            nn.Linear(64, 8),
            nn.ReLU(),
            nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Sequential(nn.ReLU())),
        )
    )
    assert compare(model, *images()).layers == ['0.2', '0.3.1', '0.3.2.0']


@pytest.mark.parametrize('arch, activations', [('squeezenet1_0', 26), ('mnasnet0_5', 35)])
def test_d03_in_networks_of_torchvision(arch, activations):
    "Two of the 26 activations of SqueezeNet, 3 of the 35 of MNASNet."
    assert len(compare(torchvision_net(arch), *images(2, 3, 64, 64)).layers) == activations


class Functional(nn.Module):
    "Activations as functions, the way most research code has them."

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 4, 3), nn.Linear(144, 4)

    def forward(self, x):
        h = torch.relu(self.conv(x))
        return self.fc(F.gelu(h.flatten(1) - 0.1).tanh())


def test_d04_activations_as_functions_are_seen():
    "Sees modules only: an empty list, and no error."
    model, (x, x_pert) = Functional(), images()
    result = compare(model, x, x_pert)
    assert result.layers == ['relu()', 'gelu()', 'tanh()']
    np.testing.assert_allclose(values(result)[0], by_hand(model.conv(x).relu(), model.conv(x_pert).relu()), rtol=1e-4)


@pytest.mark.parametrize('arch, activations', [('mobilenet_v2', 35), ('googlenet', 57)])
def test_d04_in_networks_of_torchvision(arch, activations):
    "None for either: MobileNet has ReLU6, GoogLeNet F.relu."
    assert len(compare(torchvision_net(arch), *images(2, 3, 64, 64)).layers) == activations


def test_d04_a_network_without_activations_is_an_error():
    "An empty list."
    with pytest.raises(ValueError, match='Linear'):  # says what there is
        compare(make(nn.Flatten, lambda: nn.Linear(64, 4)), *images())


class OwnReLU(nn.ReLU):
    "A subclass."


@pytest.mark.parametrize('kind', [OwnReLU, nn.GELU, nn.SiLU, nn.ReLU6, nn.PReLU, nn.Hardswish, nn.Tanh, nn.Sigmoid])
def test_d05_kinds_and_subclasses_of_activations_are_known(kind):
    "Compares printed class names with 'ReLU', 'ELU' and 'LeakyReLU': none of these is found."
    assert compare(make(nn.Flatten, lambda: nn.Linear(64, 8), kind), *images()).layers == ['2']


def test_d05_a_choice_is_not_read_letter_by_letter(net):
    "A choice given as a string is searched for parts of itself: 'ReLU6' would choose ReLU."
    assert compare(net, *images(), where=nn.ReLU).layers == ['1']
    assert compare(net, *images(), where='3').layers == ['3']
    for part in ('ReLU6', 'onv', '13'):
        with pytest.raises(ValueError, match='chooses no layer'):
            compare(net, *images(), where=part)


@pytest.mark.parametrize('second', [nn.ReLU(inplace=True), nn.Hardtanh(0, 1, inplace=True)])
def test_d06_what_is_overwritten_later_is_read_before(second):
    "Keeps the tensor itself: batch normalisation before `ReLU(inplace=True)` gets the numbers of the activation."
    model, (x, x_pert) = make(lambda: nn.Conv2d(1, 4, 3), lambda: nn.BatchNorm2d(4), lambda: second), images()
    result = compare(model, x, x_pert, where=['1', '2'])
    np.testing.assert_allclose(values(result)[0], by_hand(model[:2](x), model[:2](x_pert)), rtol=1e-4)
    assert (np.abs(values(result)[1] / values(result)[0] - 1) > 1e-3).all()


@pytest.mark.parametrize('dtype, rtol', [(torch.float16, 2e-2), (torch.bfloat16, 0.1)])
def test_d07_half_precision_does_not_overflow(dtype, rtol):
    "float16: the length overflows to infinity, and every layer gets 0.0."
    exact = make(nn.Flatten, lambda: nn.Linear(64, 2048), nn.ReLU)
    with torch.no_grad():
        exact[1].weight.abs_().mul_(20)  # activations of about 40; a length of about 1,800, whose square float16 lacks
    x, x_pert = images()
    found = values(compare(copy.deepcopy(exact).to(dtype), x, x_pert))
    assert exact(x).square().sum(1).min() > 65504
    np.testing.assert_allclose(found[0], by_hand(exact(x), exact(x_pert)), rtol=rtol)


@pytest.mark.parametrize('shape', [(1, 1, 8, 8), (6, 1, 8, 1), (1, 8, 8)])
def test_d08_pairs_that_do_not_belong_together_are_an_error(net, shape):
    "Lets them broadcast: four clean images and one perturbed give a number."
    x, _ = images()
    with pytest.raises(ValueError, match='shape'):
        compare(net, x, torch.rand(shape))


class Twice(nn.Module):
    "Runs its activation again for bright images."

    def __init__(self):
        super().__init__()
        self.act = nn.ReLU()

    def forward(self, x):
        x = self.act(x)
        return self.act(x - 0.1) if x.mean() > 0.5 else x


@pytest.mark.parametrize('order', [1, -1])
def test_d08_layers_that_do_not_always_run_are_an_error(order):
    "Drops the surplus in silence, or raises IndexError, depending on which side has more."
    x = torch.cat([torch.zeros(1, 4), torch.ones(1, 4)][::order])
    with pytest.raises(ValueError, match='other layers for other samples'):
        compare(Twice(), x, x + 0.01, batch_size=2)


def test_d09_silent_layers_are_told_apart():
    "Gives nan for a dead layer and infinity for one that wakes up, with a RuntimeWarning at most."
    model = make(nn.Identity, nn.ReLU)
    x = torch.tensor([[-1.0], [-1.0], [2.0]])
    x_pert = torch.tensor([[-2.0], [1.0], [3.0]])  # stays silent, wakes up, moves by a half
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        result = compare(model, x, x_pert)
        row = result.table().iloc[0]
    assert values(result)[0].tolist() == [0, np.inf, 0.5]
    assert row.undefined == 1 and row['mean'] == 0.25
    energies = compare(model, x[:1], x_pert[:1], measure='energy_relative_error')
    assert values(energies).tolist() == [0]


def test_d09_an_empty_batch_is_an_error(net):
    "nan."
    with pytest.raises(ValueError, match='empty'):
        compare(net, *(v[:0] for v in images()))


# ------------------------------------------------------------------------------------------------- leaks and crashes


def test_d10_no_hook_stays(net):
    "Leaves all its hooks: 4, 8, 12, ..."
    for _ in range(50):
        compare(net, *images(1))
        assert hooks(net) == 0


def test_d10_your_own_hooks_stay(net):
    "Whoever clears away its hooks by hand easily takes their own as well."
    seen = []
    net[1].register_forward_hook(lambda module, args, output: seen.append(len(output)))
    compare(net, *images(4))
    assert hooks(net) == 1 and seen == [8]


class Fails(nn.Module):
    def forward(self, x):
        raise ArithmeticError('in the middle of the forward pass')


@pytest.mark.parametrize('where', ['activations', 'weights', '*'])
def test_d10_no_hook_stays_after_an_exception(where):
    "Leaves them behind here too."
    model = make(lambda: nn.Conv2d(1, 4, 3), nn.ReLU, Fails)
    with pytest.raises(ArithmeticError):
        compare(model, *images(), where=where)
    assert hooks(model) == 0


def tensors() -> list[torch.Tensor]:
    "All that are in memory, whether anybody can still reach them or not."
    return [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor) and has_memory(o)]


def has_memory(tensor: torch.Tensor) -> bool:
    "Not so the sparse, fake and uninitialised ones that other tests leave behind, each of which says so in its own way."
    try:
        return tensor.untyped_storage().data_ptr() is not None
    except Exception:
        return False


def living_bytes() -> int:
    "The memory of all tensors that are alive, shared memory counted once."
    storages = [t.untyped_storage() for t in tensors()]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


class Watched(nn.Module):
    "Looks around in every forward pass."

    def __init__(self):
        super().__init__()
        self.bytes, self.grad = [], []

    def forward(self, x):
        self.bytes.append(living_bytes())
        self.grad.append(torch.is_grad_enabled())
        return x


def test_d11_nothing_is_kept_of_later_passes(net):
    "Its old hooks go on appending what you compute afterwards to lists that nobody reads."
    compare(net, *images())
    gc.collect()
    before = living_bytes()
    for _ in range(10):
        net(images()[0])
    gc.collect()
    assert living_bytes() <= before


def test_d11_memory_does_not_grow(net):
    "30 MiB more after each comparison of 256 images."
    compare(net, *images(1))
    gc.collect()
    before = len(tensors()), living_bytes()
    for _ in range(50):
        compare(net, *images(1))
    gc.collect()
    assert len(tensors()) <= before[0] and living_bytes() <= before[1]


def calls_of(function) -> int:
    "How many Python functions a call runs: time that does not depend on the machine."
    count = 0

    def tick(frame, event, arg):
        nonlocal count
        count += event == 'call'

    sys.setprofile(tick)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def test_d11_the_fiftieth_call_does_no_more_than_the_third(net):
    "Every call adds hooks, and runs those of all calls before it: three passes over 300 images took 2.0, 2.5 and 4.0 s."
    x, x_pert = images(1)
    counts = [calls_of(lambda: compare(net, x, x_pert)) for _ in range(50)]
    assert counts[-1] <= 1.02 * counts[2]
    plain = calls_of(lambda: net(x))
    assert plain == calls_of(lambda: small()(x)) - calls_of(small)


def test_d12_no_graph_is_built():
    "Runs with gradients: two graphs and all activations of both inputs live at once."
    watch = Watched()
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), watch)
    compare(model, *images())
    assert watch.grad == [False] and torch.is_grad_enabled()
    assert all(p.grad is None for p in model.parameters())


def test_d12_representations_are_let_go_piece_by_piece():
    "All are kept until the end, and copied to the host."
    watch = Watched()
    compare(nn.Sequential(nn.ReLU(), nn.ReLU(), watch), *images(64, 100, 100), batch_size=32)
    assert len(watch.bytes) == 4
    assert watch.bytes[-1] - watch.bytes[0] < 10_000  # some numbers for each image; one representation has 40,000 bytes


@pytest.mark.parametrize('keep', [copy.deepcopy, pickle.dumps, lambda model: torch.save(model, io.BytesIO())])
def test_d13_a_model_can_be_copied_and_stored_afterwards(net, keep):
    "`torch.save(model)` fails on a local hook, and a deep copy copies what leaked."
    before = pickle.dumps(small())
    compare(net, *images())
    assert keep(net) is not NotImplemented
    assert len(pickle.dumps(net)) == len(before)


class Reader(nn.Module):
    "Rows of an image as a sequence; the LSTM returns tuples, and the output is a dictionary."

    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 6, batch_first=True), nn.Linear(6, 4)

    def forward(self, x):
        states, (hidden, _) = self.lstm(x[:, 0])
        return {'states': states, 'logits': self.head(hidden[-1])}


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.attention(x[:, 0], x[:, 0], x[:, 0])[0].mean(1))


@pytest.mark.parametrize('kind, layer', [(Reader, 'lstm'), (Attends, 'attention')])
def test_d14_layers_that_return_tuples(kind, layer):
    "AttributeError: a tuple has no `detach`."
    with seeded(0):
        model = kind().eval()
    x, x_pert = images()
    kept = [getattr(model, layer)(*[v[:, 0]] * (1 if layer == 'lstm' else 3))[0] for v in (x, x_pert)]
    np.testing.assert_allclose(values(compare(model, x, x_pert, where=layer))[0], by_hand(*kept), rtol=1e-3)


def test_d14_bfloat16(net):
    "TypeError: NumPy has no such type."
    result = compare(copy.deepcopy(net).bfloat16(), *images())
    np.testing.assert_allclose(result.table()['mean'], compare(net, *images()).table()['mean'], rtol=0.1)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.act = nn.Linear(64, 4), nn.Linear(3, 4), nn.ReLU()

    def forward(self, image, *, context):
        return self.act(self.a(image.flatten(1)) + self.b(context) + 1)


class WithContext(nn.Module):
    "A wrapper of five lines: what is perturbed goes in, what is not is held."

    def __init__(self, model, context):
        super().__init__()
        self.model, self.context = model, context

    def forward(self, x):
        return self.model(x, context=self.context.expand(len(x), -1))


def test_d14_models_with_several_inputs_through_a_wrapper():
    "TypeError; and a wrapper hides the layers from it, for it looks one level deep."
    with seeded(0):
        inner = TwoInputs()
    context, (x, x_pert) = torch.tensor([[0.2, 0.4, 0.6]]), images()
    result = compare(WithContext(inner, context), x, x_pert)
    clean, pert = (inner(v, context=context.expand(len(v), -1)) for v in (x, x_pert))
    assert len(result.layers) == 1 and result.layers[0].endswith('act')
    np.testing.assert_allclose(values(result)[0], by_hand(clean, pert), rtol=1e-4)


def test_d14_a_scripted_model_is_refused_in_words(net):
    "KeyError."
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', DeprecationWarning)
        scripted = torch.jit.script(net)
    with pytest.raises(TypeError, match='scripted'):
        compare(scripted, *images())


# --------------------------------------------------------------------------------------------------------- manners


@pytest.mark.parametrize('training', [True, False])
def test_d15_every_module_keeps_its_mode(training):
    "Puts the model into evaluation mode, for good, when it is constructed."
    model = make(lambda: nn.Conv2d(1, 4, 3), lambda: nn.BatchNorm2d(4), nn.ReLU, nn.Dropout).train(training)
    model[1].train(not training)  # as in fine-tuning
    flags, buffers = [m.training for m in model.modules()], [b.clone() for b in model.buffers()]
    first, second = compare(model, *images()), compare(model, *images())
    assert [m.training for m in model.modules()] == flags
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), buffers, strict=True))
    np.testing.assert_array_equal(values(first), values(second))  # it ran in evaluation mode: no dropout


def test_d15_inputs_follow_the_model_and_results_have_names(net):
    "No names, no labels, and an error for inputs in another precision."
    x, x_pert = (v.double().numpy() for v in images())
    result = compare(net, x, {'flip': x_pert, 'same': x})
    assert result.layers == ['1', '3'] and result.perturbations == ['flip', 'same']
    assert result.dataset['value'].dims == ('layer', 'perturbation', 'sample')
    assert result.dataset.sel(layer='3', perturbation='same')['value'].values.tolist() == [0] * 6
    y, ids = torch.arange(6) % 4, [4, 2, 0, 1, 5, 3]
    loader = [(torch.from_numpy(x[ids]), y[ids], torch.tensor(ids))]
    data = layer_sustainability(net, (x, y), Gaussian(0.1), show_progress=False).dataset
    assert data['label'].values.tolist() == y.tolist() and len(loader) == 1


def test_d16_a_module_that_runs_twice_has_two_names():
    "Two numbers that nobody can tell apart."

    class Reused(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, x):
            return self.act(self.act(x.flatten(1) - 0.3) - 0.3)

    x, x_pert = images()
    result = compare(Reused(), x, x_pert)
    assert result.layers == ['act#0', 'act#1']
    inner = [F.relu(v.flatten(1) - 0.3) for v in (x, x_pert)]
    np.testing.assert_allclose(values(result)[0], by_hand(*inner), rtol=1e-4)
    np.testing.assert_allclose(values(result)[1], by_hand(*(F.relu(v - 0.3) for v in inner)), rtol=1e-4)
    assert compare(Reused(), x, x_pert, where='act#1').layers == ['act#1']


def test_d17_a_profile_can_be_drawn(net, tmp_path, monkeypatch):
    "Lacks `self`: a call on the object takes the object for the title, or raises. Writes the file once per layer."
    from matplotlib import pyplot

    monkeypatch.chdir(tmp_path)
    before = pyplot.get_fignums(), dict(matplotlib.rcParams)
    picture = compare(net, *images()).plot(title='What comes through')
    titles = [ax.get_title(loc) for ax in picture.axes for loc in ('left', 'center')]
    assert isinstance(picture, Figure) and 'What comes through' in titles
    assert (pyplot.get_fignums(), dict(matplotlib.rcParams)) == before and not [*tmp_path.iterdir()]


def test_d17_all_of_it_is_seen():
    "Cuts off what is above 2, does not label what is 0, and numbers the layers."
    loud, quiet = torch.full((4, 2), 0.01), torch.full((4, 2), 0.06)  # six times as large: a relative error of five
    model = make(nn.Identity, nn.ReLU, lambda: nn.Hardtanh(0, 0.005))  # the last one is the same for both
    result = compare(model, loud, quiet)
    np.testing.assert_allclose(values(result), [[5] * 4, [0] * 4], rtol=1e-5)
    (ax,) = result.plot().axes
    drawn = np.concatenate([line.get_ydata() for line in ax.lines])
    assert drawn.max() == pytest.approx(5) and drawn.min() == 0 and ax.get_ylim()[1] > 5
    assert {'1', '2'} <= {label.get_text() for label in ax.get_xticklabels()}


def test_d18_silence(net, capfd, caplog):
    "Prints every module, and the whole list, on each call."
    with caplog.at_level(logging.DEBUG), warnings.catch_warnings():
        warnings.simplefilter('error')
        compare(net, *images()).table()
        layer_sustainability(net, (images()[0], torch.zeros(6, dtype=torch.long)), Gaussian(0.1), show_progress=False)
    assert capfd.readouterr() == ('', '') and not [r for r in caplog.records if r.name.startswith('robustnb')]
