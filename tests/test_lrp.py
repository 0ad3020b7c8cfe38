"""LRP and DeepLIFT against Captum, against the formulas of the textbook written out in loops, and against their own books."""

import copy
import gc
import json
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from robustnb.attribution import Passes, _lent
from robustnb.devices import seeded
from robustnb.lrp import LRP, DeepLift, DeepLiftShap, balance

RULES = (LRP(), LRP(eps=0.1), LRP('gamma'), LRP('gamma', gamma=2.0, eps=0.05), LRP('alpha-beta'), LRP('alpha-beta', alpha=1.0))
captum_attr = pytest.importorskip('captum.attr')
pytestmark = pytest.mark.filterwarnings('ignore:Setting forward, backward hooks')


def settled(net, *shape):
    "A network with random, but used batch statistics, in evaluation mode."
    with torch.no_grad():
        for parameter in net.parameters():
            spread = 0.7 if parameter.dim() == 1 else 2 / max(parameter[0].numel(), 1)
            parameter.copy_(torch.randn_like(parameter) * spread ** 0.5)
        for _ in range(3):
            net.train()(torch.randn(8, *shape[1:]))
    return net.eval()


def worst_gap(method, net, x, target=None, where='weights'):
    "The largest gap of any layer, as a share of the largest logit."
    with _lent(net):
        batch = Passes(net, x, target, where, inputs=x.is_floating_point())
        method.attribute(batch)
        gaps = method.gaps(batch)
        return max(float(gap.abs().max()) for gap in gaps.values()) / float(batch.plain.score.abs().max())


# --- the textbook, in loops -----------------------------------------------------------------------------------------------


def redistribute(W, b, a, R, method):
    "One layer with weights: R_i = sum_j (share of i in j) R_j, for one sample."
    found = np.zeros(len(a))
    for j in range(len(b)):
        parts = np.array([a[i] * W[j, i] for i in range(len(a))] + [b[j]])
        z = parts.sum()
        if method.rule == 'alpha-beta':
            pro, con = parts.clip(min=0), parts.clip(max=0)
            one_side = pro.sum() == 0 or con.sum() == 0
            alpha, beta = (1, 1) if one_side else (method.alpha, 1 - method.alpha)
            found += (alpha * pro / (pro.sum() or 1) + beta * con / (con.sum() or 1))[:-1] * R[j]
            continue
        if method.rule == 'gamma':
            parts = parts + method.gamma * (parts.clip(min=0) if z > 0 else parts.clip(max=0))
        total = parts.sum()
        found += (parts / (total + method.eps * np.sign(total) or 1))[:-1] * R[j]
    return found


def matrix(module, shape):
    "A layer as a matrix and a constant."
    zero = torch.zeros(1, *shape, dtype=torch.double)
    with torch.no_grad():
        constant = module(zero).flatten()
        columns = [module(row.view(1, *shape)).flatten() - constant for row in torch.eye(zero.numel(), dtype=torch.double)]
    return torch.stack(columns, 1).numpy(), constant.numpy()


def literal(layers, x, target, method):
    "Relevance of the output of every module of a chain, for one sample; batch normalisation belongs to the layer before."
    layers, outs = list(layers), [x[None]]
    with torch.no_grad():
        for layer in layers:
            outs.append(layer(outs[-1]))
    R = np.zeros(outs[-1].numel())
    R[target] = outs[-1][0, target]
    found, n = {}, len(layers) - 1
    while n >= 0:
        found[n], layer, a = R, layers[n], outs[n][0]
        if isinstance(layer, nn.BatchNorm2d | nn.BatchNorm1d) and method.rule == 'epsilon':  # a layer of its own
            R = redistribute(*matrix(layer, a.shape), a.flatten().numpy(), R, LRP())
        elif isinstance(layer, nn.BatchNorm2d | nn.BatchNorm1d):  # folded
            n -= 1
            found[n] = R
            R = redistribute(*matrix(nn.Sequential(layers[n], layer), outs[n].shape[1:]), outs[n].flatten().numpy(), R, method)
        elif isinstance(layer, nn.Conv2d | nn.Linear):
            R = redistribute(*matrix(layer, a.shape), a.flatten().numpy(), R, method)
        elif isinstance(layer, nn.AvgPool2d | nn.AdaptiveAvgPool2d):
            R = redistribute(*matrix(layer, a.shape), a.flatten().numpy(), R, LRP())
        elif isinstance(layer, nn.MaxPool2d):
            _, places = F.max_pool2d(a, layer.kernel_size, layer.stride, layer.padding, return_indices=True)
            size, R = a[0].numel(), R.reshape(places.shape)
            passed = np.zeros(a.numel())
            for channel in range(len(a)):
                for place, amount in zip(places[channel].flatten().tolist(), R[channel].flatten(), strict=True):
                    passed[channel * size + place] += amount
            R = passed
        n -= 1
    return found, R


CHAINS = {
    'linear': (lambda: [nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3)], (5,)),
    'signs': (lambda: [nn.Linear(5, 7), nn.Identity(), nn.Linear(7, 6, bias=False), nn.Dropout(), nn.Linear(6, 3)], (5,)),
    'conv': (lambda: [nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2), nn.ReLU(), nn.Conv2d(4, 4, 2, dilation=2, padding=1,
             bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)], (2, 7, 7)),
    'pools': (lambda: [nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(3, 4, 1), nn.ReLU(), nn.AvgPool2d(2),
              nn.Flatten(), nn.Linear(4, 3)], (1, 8, 8)),
    'folded': (lambda: [nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4, bias=False),
               nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3)], (1, 6, 6)),
}


@pytest.mark.parametrize('method', RULES, ids=repr)
@pytest.mark.parametrize('name', CHAINS)
def test_the_formulas_of_the_textbook(name, method):
    make, shape = CHAINS[name]
    with seeded(1):
        net = settled(nn.Sequential(*make()), 1, *shape).double()
        x = torch.randn(3, *shape, dtype=torch.double)
    target = torch.tensor([0, 2, 1])
    found = method(net, x, target, where=lambda name, module: name.isdigit(), inputs=True)
    for n in range(len(x)):
        expected, below = literal(net, x[n], int(target[n]), method)
        for layer, values in expected.items():
            np.testing.assert_allclose(found[str(layer)][n].flatten(), values, rtol=1e-6, atol=1e-8, err_msg=str(layer))
        np.testing.assert_allclose(found['inputs'][n].flatten(), below, rtol=1e-6, atol=1e-8)
    assert worst_gap(method, net, x, target) < 1e-8


@pytest.mark.parametrize('method', RULES, ids=repr)
def test_batch_norm_is_the_same_as_the_fused_layer(method):
    with seeded(2):
        net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.ConvTranspose2d(4, 3, 2), nn.BatchNorm2d(3),
                            nn.ReLU(), nn.Flatten(), nn.Linear(75, 3))
        net = settled(net, 1, 2, 6, 6).double()
        x = torch.randn(4, 2, 6, 6, dtype=torch.double)
    fused = copy.deepcopy(net)
    for n in (0, 3):
        fused[n] = nn.utils.fusion.fuse_conv_bn_eval(fused[n], fused[n + 1], transpose=n == 3)
        fused[n + 1] = nn.Identity()
    ours, theirs = method(net, x, 1, inputs=True), method(fused, x, 1, inputs=True)
    for name in ('inputs', '0', '3', '7') if method.rule != 'epsilon' else ('inputs', '7') if not method.eps else ('7',):
        torch.testing.assert_close(ours[name], theirs[name])


def test_the_golden_case():
    case = next(case for case in json.loads((Path(__file__).parent / 'golden' / 'coverage.json').read_text())['cases']
                if case['id'] == 'lrp_epsilon_mlp')
    given = {name: torch.tensor(value) for name, value in case['inputs'].items()}
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        for layer, n in ((net[0], '1'), (net[2], '2')):
            layer.weight.copy_(given[f'W{n}'])
            layer.bias.copy_(given[f'b{n}'])
    expected = torch.tensor(case['expected']['Captum LayerLRP'])
    torch.testing.assert_close(LRP()(net, given['x'], given['target'])['0'], expected)
    torch.testing.assert_close(LRP(eps=1e-9)(net, given['x'], given['target'])['0'], expected)


# --- Captum ---------------------------------------------------------------------------------------------------------------


def captum_lrp(net, x, target, names):
    "Captum's epsilon rule, one pass per layer, on a copy; layers that only move values get a rule that does the same."
    from captum.attr._utils.lrp_rules import EpsilonRule
    net = copy.deepcopy(net)
    layers, found = dict(net.named_modules()), {}
    for name in names:
        for module in net.modules():  # Captum removes its rules after each pass
            if isinstance(module, nn.Flatten | nn.AdaptiveAvgPool2d | nn.Identity):
                module.rule = EpsilonRule()
            if hasattr(module, 'inplace'):
                module.inplace = False
        found[name] = captum_attr.LayerLRP(net, layers[name]).attribute(x, target=target)
    return found


def lenet():
    from robustnb.models import lenet5
    return settled(lenet5(), 1, 1, 28, 28), (1, 28, 28)


def vgg_bn():
    torchvision = pytest.importorskip('torchvision.models')
    features = torchvision.vgg.make_layers(torchvision.vgg.cfgs['D'], batch_norm=True)
    head = nn.Linear(2048, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 10)
    net = nn.Sequential(*features, nn.AdaptiveAvgPool2d(2), nn.Flatten(), *head)
    return settled(net, 1, 3, 32, 32), (3, 32, 32)


@pytest.mark.parametrize('make', [lenet, vgg_bn])
def test_epsilon_is_captums_layer_lrp(make):
    with seeded(3):
        net, shape = make()
        x = torch.rand(2, *shape)
    target = torch.tensor([1, 7])
    ours = LRP()(net, x, target)
    names = list(ours) if len(ours) < 8 else [*ours][::5] + [[*ours][-1]]
    for name, values in captum_lrp(net, x, target, names).items():
        assert (values - ours[name]).abs().max() <= 1e-4 * values.abs().max(), name
    assert worst_gap(LRP(), net, x, target) < 1e-4


@pytest.fixture(scope='module')
def small_resnet():
    "A narrow ResNet-18, trained a little on digits."
    from robustnb.data import load_data
    from robustnb.models import resnet18
    with seeded(0):
        net, data = resnet18(10, 1, 0.125), load_data('digits')
        x, y = data.train.x, data.train.y
        optimiser = torch.optim.Adam(net.parameters(), 3e-3)
        for step in range(25):
            rows = torch.arange(step * 48, step * 48 + 48) % len(x)
            optimiser.zero_grad()
            F.cross_entropy(net(x[rows]), y[rows]).backward()
            optimiser.step()
    return net.eval(), x[:64], y[:64]


@pytest.mark.parametrize('method', [LRP(), LRP('gamma'), LRP('alpha-beta', dense='epsilon'), LRP(eps=0.01)], ids=repr)
def test_a_trained_residual_network_hands_on_the_whole_logit(small_resnet, method):
    net, x, y = small_resnet
    assert (net(x).argmax(1) == y).float().mean() > 0.6
    logits = net(x).gather(1, y[:, None])[:, 0].detach()
    for name, parts in balance(net, x, y, method).items():
        total = parts['relevance'] + parts['around'] + parts['constants'] + parts['absorbed']
        assert ((total - logits).abs() <= 1e-3 * logits.abs()).all(), name


def test_captum_makes_relevance_at_additions(small_resnet):
    net, x, y = small_resnet
    logits = net(x).gather(1, y[:, None])[:, 0].detach().abs()
    theirs = captum_lrp(net, x[:8], y[:8], ['conv1'])['conv1'].flatten(1).sum(1).abs()
    ours = balance(net, x, y)['conv1']['relevance'].abs()
    assert (theirs / logits[:8]).median() > 100 * (ours / logits).median()


# --- architectures: every way in which a network can be written ----------------------------------------------------------


class Branches(nn.Module):
    "Two branches, a shared layer, writes in place, functional everything, an auxiliary output and a layer off the path."

    def __init__(self):
        super().__init__()
        self.a, self.b, self.shared = nn.Conv2d(1, 4, 3), nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, padding=1)
        self.relu, self.empty, self.aux, self.head = nn.ReLU(inplace=True), nn.Sequential(), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x):
        left, right = self.relu(self.a(x)), F.relu(self.b(x))
        left = self.shared(self.shared(left)) + self.empty(left)
        left += 0.5 * right
        left = torch.add(left, right, alpha=-0.3) + 0.1
        both = torch.cat([left, torch.sub(right, left)], 1).relu_()
        out = both.new_ones(len(x), 8)
        out[:, :4] = both.mean((2, 3))[:, :4] - 1
        out[:, 4:] = both.flatten(2).amax(2).T.T[:, 4:] * torch.sigmoid(both.mean((2, 3))[:, :4])
        return {'logits': self.head(out), 'aux': self.aux(out)}


class Tokens(nn.Module):
    "A small transformer, by `nn.MultiheadAttention` or by the function, with two kinds of normalisation."

    def __init__(self, kind):
        super().__init__()
        self.kind, self.first, self.norm, self.group = kind, nn.Linear(6, 8), nn.LayerNorm(8), nn.GroupNorm(1, 5)
        self.heads, self.qkv = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 24)
        self.glu, self.out = nn.Linear(8, 16), nn.Linear(8, 3)
        for bias in (self.heads.in_proj_bias, self.heads.out_proj.bias):  # 0 otherwise, which would hide an error in the books
            nn.init.normal_(bias)

    def forward(self, x):
        x = self.norm(self.first(x))
        if self.kind == 'module':
            x = x + self.heads(x, x, x, need_weights=False)[0]
        else:
            query, key, value = self.qkv(x).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            if self.kind == 'function':
                seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
            else:
                seen = ((query * 0.5) @ key.transpose(-2, -1)).softmax(-1) @ value
            x = x + seen.transpose(1, 2).flatten(2)
        x = x + F.glu(self.glu(self.group(x)))
        return self.out(F.gelu(x).mean(1) / 2)


def nets():
    with seeded(4):
        yield 'branches', Branches().eval(), torch.randn(3, 1, 8, 8)
        for kind in ('module', 'function', 'product'):
            yield kind, Tokens(kind).eval(), torch.randn(3, 5, 6)
        yield 'curves', nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Softplus(), nn.Linear(6, 6), nn.Hardswish(),
                                      nn.Linear(6, 1)).eval(), torch.randn(3, 4)


NETS = {name: (net, x) for name, net, x in nets()}


@pytest.mark.parametrize('method', [*RULES, DeepLift(), DeepLift(0.3), DeepLiftShap(torch.zeros(2, 1))], ids=repr)
@pytest.mark.parametrize('name', NETS)
def test_books_close_however_the_network_is_written(name, method, caplog):
    net, x = (thing.double() for thing in NETS[name])
    assert worst_gap(method, net, x, torch.tensor([0, 1, 0])) < 1e-8
    assert not caplog.records, caplog.text


@pytest.mark.parametrize('method', [LRP(), LRP('gamma'), LRP('alpha-beta'), DeepLift()], ids=repr)
@pytest.mark.parametrize('arch', ['swin_t', 'densenet121', 'googlenet', 'shufflenet_v2_x0_5'])
@pytest.mark.slow
def test_architectures(arch, method):
    models = pytest.importorskip('torchvision.models')
    with seeded(5):
        settings = {'aux_logits': False} if arch == 'googlenet' else {}
        net = models.get_model(arch, weights=None, num_classes=10, **settings)
        x = torch.rand(2, 3, 64, 64)
        net.train()(torch.rand(4, 3, 64, 64))
    assert worst_gap(method, net.eval(), x) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize('arch', ['vgg16', 'convnext_tiny', 'mobilenet_v3_large', 'vit_b_16'])
def test_architectures_of_full_size(arch):
    models = pytest.importorskip('torchvision.models')
    with seeded(6):
        net = models.get_model(arch, weights=None)
        if arch == 'vit_b_16':  # its head is zero
            nn.init.normal_(net.heads.head.weight, std=0.02)
        x = torch.rand(1, 3, 224, 224)
    assert worst_gap(LRP('gamma'), net.eval(), x) < 1e-3
    assert worst_gap(LRP(), net, x) < 1e-2


def test_a_layer_off_the_path_has_no_relevance_and_no_gap():
    net, x = (thing.double() for thing in NETS['branches'])
    for method in (LRP(), DeepLift()):
        found = method(net, x, 1)
        assert (found['aux'] == 0).all() and {'shared#0', 'shared#1'} <= set(found)


# --- DeepLIFT -------------------------------------------------------------------------------------------------------------


def multipliers(layers, x, past):
    "DeepLIFT of a chain for one sample, in loops: the multiplier of each layer's output, from the last layer on."
    outs, pasts = [x[None]], [past[None]]
    with torch.no_grad():
        for layer in layers:
            outs.append(layer(outs[-1]))
            pasts.append(layer(pasts[-1]))
    m, found = np.array([1.0] + [0.0] * (outs[-1].numel() - 1)), {}
    for n in reversed(range(len(layers))):
        found[n], layer, (a, b) = m, layers[n], (outs[n][0], pasts[n][0])
        if isinstance(layer, nn.MaxPool2d):
            change, gained = (a - b).flatten().numpy(), np.zeros(a.numel())
            (now, here), (then, there) = (F.max_pool2d(t, layer.kernel_size, layer.stride, return_indices=True) for t in (a, b))
            most, size = torch.maximum(now, then), a[0].numel()
            for place, amount in enumerate(m):
                offset = place // now[0].numel() * size
                gained[offset + here.flatten()[place]] += amount * float((most - then).flatten()[place])
                gained[offset + there.flatten()[place]] += amount * float((now - most).flatten()[place])
            m = gained / change
        elif isinstance(layer, nn.Conv2d | nn.Linear):
            m = m @ matrix(layer, a.shape)[0]
        elif not isinstance(layer, nn.Flatten):
            m = m * ((outs[n + 1] - pasts[n + 1]) / (outs[n] - pasts[n])).flatten().numpy()
    return found, m


@pytest.mark.parametrize('act', [nn.Tanh, nn.ELU, nn.GELU])
def test_deep_lift_is_what_the_paper_says(act):
    with seeded(11):
        layers = [nn.Conv2d(1, 3, 3), nn.MaxPool2d(3, 2), act(), nn.Conv2d(3, 4, 2), act(), nn.Flatten(), nn.Linear(16, 3)]
        net = nn.Sequential(*layers).double().eval()
        x, past = torch.rand(2, 1, 9, 9, dtype=torch.double), torch.rand(1, 9, 9, dtype=torch.double)
    found = DeepLift(past)(net, x, 0, where=lambda name, module: name.isdigit(), inputs=True)
    for n in range(2):
        expected, below = multipliers(layers, x[n], past)
        np.testing.assert_allclose(found['inputs'][n].flatten(), below * (x[n] - past).flatten().numpy(), rtol=1e-5, atol=1e-9)
        now, then = x[n : n + 1], past[None]
        for place, layer in enumerate(layers):
            now, then = layer(now), layer(then)
            values = expected[place] * (now - then).detach().flatten().numpy()
            np.testing.assert_allclose(found[str(place)][n].flatten(), values, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize('act', [nn.ReLU, nn.Tanh, nn.Sigmoid])
def test_deep_lift_is_captums(act):
    with seeded(7):
        net = nn.Sequential(nn.Conv2d(1, 4, 5), act(), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), act(), nn.AvgPool2d(2),
                            nn.Flatten(), nn.Linear(54, 12), act(), nn.Linear(12, 5))
        net = settled(net, 1, 1, 12, 12).double()
        x, baselines = torch.rand(4, 1, 12, 12, dtype=torch.double), torch.rand(3, 1, 12, 12, dtype=torch.double)
    y, layers = torch.tensor([0, 4, 2, 1]), dict(net.named_modules())
    one, several = DeepLift(baselines[0])(net, x, y), DeepLiftShap(baselines)(net, x, y)
    for name in one:
        theirs = captum_attr.LayerDeepLift(net, layers[name]).attribute(x, baselines[:1], target=y)
        assert (theirs - one[name]).abs().max() <= 1e-4 * theirs.abs().max(), name
        theirs = captum_attr.LayerDeepLiftShap(net, layers[name]).attribute(x, baselines, target=y)
        assert (theirs - several[name]).abs().max() <= 1e-4 * theirs.abs().max(), name


class Apart(nn.Module):
    "Hands on a copy, so that the hooks of two modules are not on one tensor."

    def forward(self, x):
        return x.clone()


def pooled(act, *between):
    with seeded(7):
        net = nn.Sequential(nn.Conv2d(1, 4, 5), act(), *(module() for module in between), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3),
                            nn.BatchNorm2d(6), act(), *(module() for module in between), nn.MaxPool2d(2), nn.Flatten(),
                            nn.Linear(54, 5))
        net = settled(net, 1, 1, 20, 20).double()
        return net, torch.rand(4, 1, 20, 20, dtype=torch.double), torch.rand(1, 1, 20, 20, dtype=torch.double)


@pytest.mark.parametrize('image', [False, True], ids=['black', 'image'])
@pytest.mark.parametrize('act', [nn.ReLU, nn.Tanh, nn.Sigmoid])
def test_deep_lift_is_captums_behind_a_max_pooling_if_a_copy_keeps_its_hooks_apart(act, image):
    net, x, other = pooled(act, Apart)
    other, y = other * image, torch.tensor([0, 4, 2, 1])
    ours = DeepLift(other[0])(net, x, y)
    for name, values in ours.items():
        theirs = captum_attr.LayerDeepLift(net, net[int(name)]).attribute(x, other, target=y)
        assert (theirs - values).abs().max() <= 1e-4 * theirs.abs().max(), name
    for values, same in zip(ours.values(), DeepLift(other[0])(pooled(act)[0], x, y).values(), strict=True):
        torch.testing.assert_close(values, same)  # for us, a copy changes nothing


def test_captums_deep_lift_loses_a_max_pooling_directly_behind_an_activation():
    net, x, other = pooled(nn.ReLU)
    y = torch.tensor([0, 4, 2, 1])
    _, missed = captum_attr.LayerDeepLift(net, net[0]).attribute(x, other, target=y, return_convergence_delta=True)
    assert missed.abs().max() > 0.01
    assert worst_gap(DeepLift(other[0]), net, x, y) < 1e-8


class Written(nn.Module):
    def __init__(self, functional):
        super().__init__()
        self.a, self.b, self.relu, self.functional = nn.Linear(5, 9), nn.Linear(9, 3), nn.ReLU(), functional

    def forward(self, x):
        return self.b(F.relu(self.a(x)) if self.functional else self.relu(self.a(x)))


def test_deep_lift_knows_functional_relu():
    with seeded(8):
        net, x = Written(True).eval(), torch.randn(6, 5)
    module = Written(False).eval()
    module.load_state_dict(net.state_dict())
    theirs = captum_attr.LayerDeepLift(module, module.a).attribute(x, 0, target=1)
    torch.testing.assert_close(DeepLift()(net, x, 1)['a'], theirs)
    assert not torch.allclose(captum_attr.LayerDeepLift(net, net.a).attribute(x, 0, target=1), theirs)


def test_deep_lift_says_when_the_two_ways_part():
    class Moody(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            x = self.a(x)
            return self.b(x.tanh() if x.sum() > self.a.bias.sum() * len(x) else x.relu())
    with seeded(9):
        net = Moody().eval()
        x = torch.linalg.pinv(net.a.weight.detach()).sum(1)[None] * 9
    with pytest.raises(ValueError, match='the two ways part'):
        DeepLift()(net, x)
    with pytest.raises(ValueError, match='a baseline is a number or an image'):
        DeepLift(torch.zeros(7))(net, x)


# --- care -----------------------------------------------------------------------------------------------------------------


def marks(net, x):
    return [name for tensor in (*net.parameters(), *net.buffers(), x) for name in vars(tensor) if name.startswith('_')]


class Strange(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.b(torch.erfinv(self.a(x).tanh() * 0.9))


def test_a_function_without_a_rule_is_named_once(caplog):
    net, x = Strange().eval(), torch.randn(3, 4)
    LRP()(net, x)
    assert 'no rule for erfinv, after a' in caplog.text
    caplog.clear()
    LRP()(net, x)
    assert not caplog.records
    assert worst_gap(LRP(), net, x) > 1e-4
    lstm = nn.Sequential(nn.LSTM(3, 4, batch_first=True), Last(), nn.Linear(4, 2)).eval()
    caplog.clear()
    LRP()(lstm, torch.randn(2, 5, 3))
    assert 'lstm' in caplog.text


class Last(nn.Module):
    def forward(self, x):
        return x[0][:, -1]


@pytest.mark.parametrize('method', [LRP(), LRP('gamma'), DeepLift()], ids=repr)
def test_nothing_is_left_behind(method):
    net, x = copy.deepcopy(NETS['branches'][0]).float(), torch.randn(3, 1, 8, 8)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    found = method(net, x, inputs=True)
    assert not marks(net, x) and not x.requires_grad and not any(values.requires_grad for values in found.values())
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])
    assert not any(module._forward_hooks or module._backward_hooks for module in net.modules())
    ends = weakref.ref(found['a'])
    del found
    gc.collect()
    assert ends() is None
    net.head.forward = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        method(net, x)
    assert not marks(net, x)
    assert type(F.relu(x)) is torch.Tensor and not torch.overrides._get_current_function_mode_stack()


@pytest.mark.parametrize('method', [LRP(), LRP('gamma'), LRP('alpha-beta'), DeepLift()], ids=repr)
def test_batches_of_any_size_and_precision(method):
    net, x = NETS['curves'][0].float(), torch.randn(5, 4)
    whole = method(net, x, 1, inputs=True)
    for n in range(5):
        for name, values in method(net, x[n : n + 1], 1, inputs=True).items():
            torch.testing.assert_close(values[0], whole[name][n], rtol=1e-4, atol=1e-5)
    for name, values in method(copy.deepcopy(net).double(), x.double(), 1, inputs=True).items():
        torch.testing.assert_close(values.float(), whole[name], rtol=1e-3, atol=1e-4)
    half = method(copy.deepcopy(net).bfloat16(), x.bfloat16(), 1)
    assert all(values.dtype == torch.bfloat16 and values.isfinite().all() for values in half.values())
    with torch.autocast('cpu', torch.bfloat16):
        assert all(values.isfinite().all() for values in method(net, x, 1).values())


@pytest.mark.parametrize('method', [LRP(), LRP('gamma'), DeepLift()], ids=repr)
def test_inputs_that_are_whole_numbers(method):
    with seeded(10):
        net = nn.Sequential(nn.Embedding(9, 6), nn.Flatten(), nn.Linear(24, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    x = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    assert set(method(net, x, 1)) >= {'2', '4'}
    assert worst_gap(method, net, x, torch.tensor([1, 1])) < 1e-4


def test_settings_are_looked_at():
    for settings in ({'rule': 'zplus'}, {'dense': 'no'}, {'eps': -1}, {'gamma': -1}, {'alpha': 0.5}):
        with pytest.raises(ValueError):
            LRP(**settings)


@pytest.mark.parametrize('method', RULES, ids=repr)
def test_tiny_numbers_make_no_infinity(method):
    with seeded(12):
        net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    with torch.no_grad():
        net[0].weight[:3] *= 1e-40
        net[0].bias[:3] = 0
    assert all(values.isfinite().all() for values in method(net, torch.rand(5, 4), 1, inputs=True).values())


class TokensFirst(nn.Module):
    "Tokens come first inside, and the samples second."

    def __init__(self):
        super().__init__()
        self.a, self.heads, self.b, self.out = nn.Linear(6, 8), nn.MultiheadAttention(8, 2), nn.Linear(8, 8), nn.Linear(8, 3)
        nn.init.normal_(self.heads.in_proj_bias)

    def forward(self, x):
        x = self.a(x.transpose(0, 1))
        x = x + self.heads(x, x, x)[0]
        return self.out((x + self.b(x).relu()).mean(0))


@pytest.mark.parametrize('method', [LRP(), LRP('gamma'), DeepLift()], ids=repr)
def test_books_are_kept_for_each_sample_where_tokens_come_first(method):
    with seeded(13):
        net, x = TokensFirst().double().eval(), torch.randn(3, 5, 6, dtype=torch.double)
    assert worst_gap(method, net, x, where=lambda name, module: name == 'out') < 1e-8


def test_a_batch_without_samples_is_an_error():
    net = NETS['curves'][0].float()
    for ask in (LRP(), LRP('gamma'), DeepLift(), lambda net, x: balance(net, x)):
        with pytest.raises(ValueError, match='the batch is empty'):
            ask(net, torch.zeros(0, 4))


def test_balance_looks_at_the_classes():
    net, x = NETS['curves'][0].float(), torch.randn(3, 4)  # one logit, so classes 0 and 1
    for wrong in (2, -1, torch.tensor([0, 1, 5])):
        with pytest.raises(ValueError):
            balance(net, x, wrong)
    with pytest.raises((TypeError, ValueError)):
        balance(net, x, 0.5)


def test_several_baselines_run_once_for_relevance_and_gaps():
    net, x, runs = copy.deepcopy(NETS['curves'][0]).float(), torch.randn(3, 4), []
    net[0].register_forward_hook(lambda *_: runs.append(1))
    method = DeepLiftShap(torch.randn(4, 4))
    with _lent(net):
        batch = Passes(net, x, torch.tensor([0, 1, 0]))
        method.attribute(batch)
        method.gaps(batch)
    assert len(runs) == 8  # each baseline, and the inputs against it


@pytest.mark.parametrize('method', [LRP(), LRP('gamma'), LRP('alpha-beta'), DeepLift()], ids=repr)
def test_half_precision(method):
    with seeded(14):
        net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3))
        x = torch.rand(6, 1, 8, 8)
    whole, half = method(net.eval(), x, 1), method(copy.deepcopy(net).half(), x.half(), 1)
    for name, values in half.items():
        assert values.dtype == torch.float16
        assert (values.float() - whole[name]).abs().max() < 0.02 * whole[name].abs().max()
