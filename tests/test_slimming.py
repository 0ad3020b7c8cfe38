"""Slimmed networks compute what the full ones do, have the sizes that they should have, and cost what is counted by hand."""

import copy
import sys

import pytest
import torch
from masked_nets import NETS, Functional, Sum, mlp
from torch import nn

from robustnb.attacks import PGD
from robustnb.devices import seeded
from robustnb.dropout import BetaBernoulliDropout, insert_masks, kept_units, mask_mode
from robustnb.evaluation import evaluate
from robustnb.guard import Normalized
from robustnb.models import build, save
from robustnb.slimming import costs, load_slimmed, published_costs, slim, slim_sums


def masks_of(model):
    return [module for module in model.modules() if isinstance(module, BetaBernoulliDropout)]


def half_dead(model, x, seed=0, **how):
    "The network in double precision, with masks of all values, half of them dead, and normalisations that have seen data."
    masked = insert_masks(model, x, **how).double()
    with seeded(seed), torch.no_grad():
        for module in masked.modules():
            if isinstance(module, nn.BatchNorm2d) and module.affine:
                module.running_mean.normal_(0, 0.3), module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 2), module.bias.normal_(0, 0.3)
        for mask in masks_of(masked):
            mask.a_raw.normal_(0, 2)
            mask.a_raw[torch.randperm(len(mask.a_raw))[: len(mask.a_raw) // 2]] = -9.0
    return masked.eval()


@pytest.mark.parametrize('name', [pytest.param(n, marks=[pytest.mark.slow] * n.endswith(('vit', 'vgg11'))) for n in NETS])
def test_slim_networks_compute_the_same(name):
    make, shape, hosts = NETS[name]
    x = torch.rand(3, *shape, generator=torch.Generator().manual_seed(0))
    masked = half_dead(make().eval(), x)
    before = {key: value.clone() for key, value in masked.state_dict().items()}
    small, x = slim(masked), x.double()
    with torch.no_grad():
        torch.testing.assert_close(small(x), masked(x), rtol=1e-9, atol=1e-10)
    assert all(torch.equal(value, before[key]) for key, value in masked.state_dict().items())
    assert not masks_of(small) and not any(module._forward_hooks for module in small.modules())
    alive = kept_units(masked).groupby('layer')['alive'].sum()
    for host in hosts:
        first = next(readers_of(small, host, x))
        assert first == alive[host], host
    full, less = (sum(v.numel() for v in net.parameters()) for net in (make(), small))
    assert less < 0.75 * full or name == 'torchvision vit'


def readers_of(net, host, x):
    "How many units the module after which the mask stood gives now."
    found = []
    hook = net.get_submodule(host).register_forward_hook(lambda module, args, output: found.append(output))
    with torch.no_grad():
        net(x)
    hook.remove()
    yield found[0].shape[-1 if found[0].dim() <= 3 else 1]


@pytest.mark.parametrize(('name', 'shape', 'settings'), [
    ('lenet5_caffe', (1, 28, 28), {}), ('vgg16', (3, 32, 32), {'width': 0.1}), ('resnet18', (3, 32, 32), {'width': 0.125}),
])  # fmt: skip
def test_attacks_see_the_same_network(name, shape, settings):
    x = torch.rand(40, *shape, generator=torch.Generator().manual_seed(0)).double()
    masked = half_dead(build(name, 0, **settings), x[:2].float())
    head = [module for module in masked.modules() if isinstance(module, nn.Linear)][-1]
    with torch.no_grad():
        head.bias -= masked(x).mean(0)  # so that images differ in their class
        y = masked(x).argmax(1)  # all right before the attack
    small = slim(masked)
    assert sum(p.numel() for p in small.parameters()) < 0.6 * sum(p.numel() for p in masked.parameters())
    found = {}
    for who, net in {'full': masked, 'slim': small}.items():
        x_adv = PGD(0.002, steps=4)(net, x, y)
        with torch.no_grad():
            found[who] = x_adv, net(x_adv).argmax(1) == y
    torch.testing.assert_close(found['slim'][0], found['full'][0], rtol=0, atol=1e-9)
    assert torch.equal(found['slim'][1], found['full'][1]) and 0 < found['full'][1].sum() < 40


def test_masks_of_maps_and_of_their_flattened_features_work_together():
    x = torch.rand(4, 1, 28, 28)
    masked = half_dead(build('lenet5_caffe', 0), x, where=['relu1', 'relu2', 'flatten', 'relu3'])
    with torch.no_grad():
        alive = masked.relu2.mask.alive.nonzero().flatten()
        masked.flatten.mask.a_raw[:] = 1.0
        masked.flatten.mask.a_raw.view(50, 16)[alive[:3]] = -9.0  # three channels that nobody reads any more
        masked.flatten.mask.a_raw.view(50, 16)[alive[5], 2:] = -9.0  # one of which little is left
    small = slim(masked)
    torch.testing.assert_close(small(x.double()), masked(x.double()), rtol=1e-9, atol=1e-10)
    assert small.conv2.out_channels == len(alive) - 3 and small.linear1.in_features == 16 * (len(alive) - 3)


@pytest.mark.parametrize('make, shape', [(Functional, (1, 10, 10)), (Sum, (1, 8, 8))])
def test_masks_by_hand_are_folded_whatever_comes_next(make, shape):
    x = torch.rand(4, *shape)
    for where in ('fc', 'head') if make is Functional else ('norm', 'point', 'out', 'deep'):
        masked = half_dead(make(), x, where=where)
        small = slim(masked)
        torch.testing.assert_close(small(x.double()), masked(x.double()), rtol=1e-9, atol=1e-10)


def test_sizes_in_the_code_stay():
    class Fixed(Functional):
        def forward(self, x):
            x = self.act(self.second(self.act(self.norm(self.conv(x)))))
            return self.head(self.act(self.fc(x.view(-1, 6 * 4 * 4))))

    net, x = Fixed(), torch.rand(3, 1, 8, 8)
    net.fc = nn.Linear(96, 8)
    small = slim(half_dead(net, x))
    torch.testing.assert_close(small(x.double()), half_dead(net, x)(x.double()), rtol=1e-9, atol=1e-10)
    assert (small.conv.out_channels, small.second.out_channels, small.fc.out_features) == (3, 6, 4)


def test_a_mask_that_cannot_be_folded():
    with pytest.raises(ValueError, match='mask after tanh cannot be folded'):
        slim(insert_masks(Sum(), torch.rand(2, 1, 8, 8), where='tanh'))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.act, self.two = nn.Linear(64, 5), nn.Tanh(), nn.Linear(64, 5)

        def forward(self, x):
            return self.act(self.one(x.flatten(1))) + self.two(x.flatten(1))

    with pytest.raises(ValueError, match='mask after act cannot be folded'):
        slim(insert_masks(Net(), torch.rand(2, 1, 8, 8), where='act'))


def test_without_masks_zeros_decide():
    net, x = mlp(), torch.rand(5, 1, 8, 8)
    assert slim(net)[1].out_features == 12 and torch.equal(slim(net)(x), net(x))
    with torch.no_grad():
        net[1].weight[:3] = 0  # silent, but for its bias
        net[1].bias[0] = 0
        net[3].weight[:, 7:9] = 0  # unread
    small = slim(net)
    assert small[1].out_features == small[3].in_features == 9
    torch.testing.assert_close(small(x), net(x), rtol=1e-5, atol=1e-6)


def test_what_only_dead_units_read_is_dead():
    with seeded(0):
        net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    with torch.no_grad():
        net[4].weight[:, 1:] = 0  # one of the five is read,
        net[2].weight[0, 4:] = 0  # and that one reads four of the eight
    small, x = slim(net), torch.rand(4, 6)
    assert [small[0].out_features, small[2].out_features] == [4, 1]
    torch.testing.assert_close(small(x), net(x), rtol=1e-5, atol=1e-6)


def test_one_unit_stays():
    x = torch.rand(5, 1, 8, 8)
    masked = insert_masks(mlp(), x)
    with torch.no_grad():
        masked[2].mask.a_raw[:] = -9
    small = slim(masked)
    assert small[1].out_features == 1
    torch.testing.assert_close(small(x), masked.eval()(x), rtol=1e-5, atol=1e-6)


def test_other_layers():
    with seeded(0):
        net = nn.Sequential(
            nn.ConvTranspose2d(2, 6, 3), nn.PReLU(6), nn.Conv2d(6, 5, 3, groups=1, bias=False), nn.BatchNorm2d(5, affine=False),
            nn.ReLU(), nn.ConvTranspose2d(5, 4, 2, stride=2), nn.LeakyReLU(), nn.AdaptiveAvgPool2d(1),
            nn.Flatten(), nn.Linear(4, 3),
        ).eval()  # fmt: skip
    x = torch.rand(3, 2, 7, 7)
    masked = half_dead(net, x)
    small = slim(masked)
    torch.testing.assert_close(small(x.double()), masked(x.double()), rtol=1e-9, atol=1e-10)
    assert [small[0].out_channels, small[1].num_parameters, small[2].out_channels, small[3].num_features] == [3, 3, 3, 3]
    assert small[5].in_channels == 3 and small[9].in_features == 2
    small.train()(x.double()).sum().backward()
    assert all(parameter.grad is not None for parameter in small.parameters())


def test_a_wrapped_network():
    model, x = Normalized(mlp(), [0.5], [0.5]), torch.rand(3, 1, 8, 8)
    masked = half_dead(model, x)
    small = slim(masked)
    assert type(small) is Normalized
    torch.testing.assert_close(small(x.double()), masked(x.double()), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize('name', ['lenet5_caffe', 'vgg16', 'resnet18'])
def test_kept_in_a_file(name, tmp_path):
    make, shape, _ = NETS[name]
    x = torch.rand(2, *shape)
    small = slim(half_dead(make(), x)).float()
    save(small, tmp_path / 'net.safetensors')
    again = load_slimmed(make(), tmp_path / 'net.safetensors')
    with torch.no_grad():
        assert torch.equal(again(x), small(x)) and repr(again) == repr(small)
    with pytest.raises(ValueError, match='holds another architecture'):
        load_slimmed(mlp(), tmp_path / 'net.safetensors')


def test_costs_are_those_counted_by_hand():
    nets = {'lenet': build('lenet5_caffe', 0), 'mlp': mlp()}
    with torch.no_grad():
        nets['mlp'][1].weight[0] = 0
    table = costs({'mlp': nets['mlp']}, torch.rand(7, 1, 8, 8), repeats=2)
    row = table.iloc[0]
    assert row.parameters == 64 * 12 + 12 + 12 * 4 + 4 and row.not_zero == row.parameters - 64
    assert row.bytes == 4 * row.parameters and row.operations == 7 * 2 * (64 * 12 + 12 * 4)
    assert row.activations == 4 * 7 * (64 + 64) and row.milliseconds > 0
    lenet = costs(nets['lenet'], torch.rand(1, 1, 28, 28), 1).iloc[0]
    assert lenet.operations == 4_586_000 and lenet.parameters == 431_080 and lenet.model == 'model'


def published_vgg():
    "The network of the published tables."
    layers, channels = [], 3
    for size, depth in zip((64, 128, 256, 512, 512), (2, 2, 3, 3, 3), strict=True):
        for _ in range(depth):
            layers += [nn.Conv2d(channels, size, 3, padding=1), nn.BatchNorm2d(size), nn.ReLU()]
            channels = size
        layers.append(nn.MaxPool2d(2))
    head = nn.Flatten(), nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 10)
    return nn.Sequential(*layers, *head).eval()


def test_published_formulas_give_the_published_constants():
    assert published_costs(build('lenet5_caffe', 0), torch.rand(1, 1, 28, 28)) == (4_615_950, 477_410)
    net, x = published_vgg(), torch.rand(2, 3, 32, 32)
    assert published_costs(net, x) == (627_329_546, 16_655_818)
    assert published_costs(net, x, as_coded=True) == (627_329_546, 19_881_538)
    assert costs(net, x[:1], 1).operations.item() == 626_927_616
    part = published_costs(slim(half_dead(build('lenet5_caffe', 0), torch.rand(1, 1, 28, 28))).float(), torch.rand(1, 1, 28, 28))
    assert part.flops < 0.4 * 4_615_940 and part.memory < 0.4 * 477_410


@pytest.mark.parametrize('mode', ['mean', 'hard', 'off', 'sample'])
def test_masks_are_folded_as_they_are(mode):
    x = torch.rand(4, 1, 8, 8)
    masked = half_dead(mlp(), x)
    with mask_mode(masked, mode):
        expected, small = masked(x.double()), slim(masked)
        assert masked[2].mask.mode == mode
    if mode == 'sample':  # in evaluation there is nothing random
        expected = masked(x.double())
    torch.testing.assert_close(small(x.double()), expected, rtol=1e-9, atol=1e-10)
    assert small[1].out_features == (12 if mode == 'off' else 6)


def test_a_forward_pass_that_branches_is_refused():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.out = nn.Linear(8, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.out(self.fc(x).relu()) if x.sum() > 0 else self.out(self.fc(x))

    with pytest.raises(ValueError, match='cannot be followed'):
        slim(Branches())
    assert copy.deepcopy(Branches()) is not None


class Odd(nn.Module):
    "Modules by name, and a function that calls them."

    def __init__(self, way, **modules):
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        self.way = way

    def forward(self, x):
        return self.way(self, x)


def conv(*sizes, **how):
    return nn.Conv2d(*sizes, 3, padding=1, **how)


ODD = {  # name -> (the network, shape of its inputs, where masks stand)
    'places into a linear layer': (
        lambda: Odd(lambda m, x: m.c(m.b(m.a(x).relu().flatten(2)).mean(2)), a=conv(1, 4), b=nn.Linear(64, 8), c=nn.Linear(4, 3)),
        (1, 8, 8), None,
    ),
    'a mean over the channels': (
        lambda: Odd(lambda m, x: m.b(m.a(x).mean(1).flatten(1)), a=conv(1, 4), b=nn.Linear(64, 3)), (1, 8, 8), None,
    ),
    'tokens flattened': (
        lambda: Odd(lambda m, x: m.b(m.a(x).relu().flatten(1)), a=nn.Linear(6, 4), b=nn.Linear(20, 3)), (5, 6), None,
    ),
    'pooling over units': (
        lambda: Odd(lambda m, x: m.b(m.pool(m.a(x).relu())), a=nn.Linear(6, 8), pool=nn.MaxPool1d(2), b=nn.Linear(4, 3)),
        (6,), None,
    ),
    'gates': (lambda: nn.Sequential(nn.Linear(6, 8), nn.GLU(), nn.Linear(4, 3)), (6,), None),
    'gates behind a layer': (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.GLU(), nn.Linear(4, 3)), (6,), ['1'],
    ),
    'two readers': (
        lambda: Odd(lambda m, x: m.b(h := m.act(m.a(x))).mean((2, 3)) + m.c(h).amax((2, 3)), a=conv(1, 6), act=nn.ReLU(),
                    b=conv(6, 3), c=conv(6, 3)), (1, 8, 8), ['act'],
    ),
    'channels side by side': (
        lambda: Odd(lambda m, x: m.c(torch.cat([m.a(x).relu(), m.b(x).relu()], 1)), a=conv(1, 4), b=conv(1, 5), c=conv(9, 3)),
        (1, 8, 8), None,
    ),
    'enlarged': (
        lambda: nn.Sequential(conv(1, 6), nn.ReLU(), nn.Upsample(scale_factor=2), conv(6, 4), nn.ReLU(), conv(4, 2)),
        (1, 8, 8), ['4'],
    ),
    'group normalisation': (
        lambda: nn.Sequential(conv(1, 6), nn.GroupNorm(2, 6), nn.ReLU(), conv(6, 4), nn.SiLU(), conv(4, 2)), (1, 8, 8), ['4'],
    ),
    'activations that are not zero at zero': (
        lambda: nn.Sequential(conv(1, 6), nn.Hardsigmoid(), nn.MaxPool2d(2), nn.Softplus(), conv(6, 6), nn.Hardtanh(0.2, 1.0),
                              conv(6, 6), nn.BatchNorm2d(6, affine=False), nn.Sigmoid(), conv(6, 2)), (1, 8, 8), ['5', '8'],
    ),
    'a convolution over time': (
        lambda: nn.Sequential(nn.Conv1d(2, 6, 3), nn.BatchNorm1d(6), nn.ELU(), nn.AvgPool1d(2), nn.Flatten(), nn.Linear(18, 3)),
        (2, 8), ['2'],
    ),
    'sizes read from the input': (
        lambda: Odd(lambda m, x: m.b((h := m.a(x).relu()).view(h.size(0), h.size(1) * h.size(2) * h.size(3))), a=conv(1, 6),
                    b=nn.Linear(384, 3)), (1, 8, 8), ['a'],
    ),
    'flattened by default': (
        lambda: Odd(lambda m, x: m.b(torch.flatten(m.a(x), start_dim=1)), a=conv(1, 6), b=nn.Linear(384, 3)), (1, 8, 8), ['a'],
    ),
}  # fmt: skip


@pytest.mark.parametrize('name', ODD)
def test_odd_networks(name):
    make, shape, hosts = ODD[name]
    with seeded(0):
        net, x = make().eval(), torch.rand(3, *shape)
    if hosts is None:
        with pytest.raises(ValueError, match='no unit .* alone'):
            insert_masks(net, x)
        assert repr(slim(net)) == repr(net)
        return
    masked = half_dead(net, x)
    assert list(dict.fromkeys(kept_units(masked)['layer'])) == hosts
    small = slim(masked)
    torch.testing.assert_close(small(x.double()), masked(x.double()), rtol=1e-9, atol=1e-10)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in net.parameters())


def test_silence_is_no_zero_behind_some_layers():
    for act in (nn.Sigmoid(), nn.BatchNorm1d(6, affine=False), nn.Hardtanh(0.1, 1)):
        with seeded(0):
            net, x = nn.Sequential(nn.Linear(5, 6), act, nn.Linear(6, 3)).eval(), torch.rand(4, 5)
        with torch.no_grad():
            net[0].weight[:3], net[0].bias[:3] = 0, 0
            if isinstance(act, nn.BatchNorm1d):
                act.running_mean.fill_(0.7)
        small = slim(net)
        assert small[0].out_features == 6
        torch.testing.assert_close(small(x), net(x))


class Swish(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x)


def tied():
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 5))
    net[2].weight = net[0].weight
    return net


def hooked():
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Identity(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    net[2].register_forward_hook(lambda module, args, output: output + 1)
    return net


COMPUTED = {
    'tied': (tied, ['5']), 'hooked': (hooked, ['4']),
    'weight norm': (lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 7)), nn.ReLU(), nn.Linear(7, 5),
                                          nn.ReLU(), nn.Linear(5, 2)), ['3']),
    'read from outside': (lambda: Odd(lambda m, x: m.c(m.act(torch.nn.functional.linear(m.b(m.a(x).relu()), m.a.weight))),
                                      a=nn.Linear(6, 8), b=nn.Linear(8, 6), c=nn.Linear(8, 2), act=nn.ReLU()), None),
    'a size as a number': (lambda: Odd(lambda m, x: m.b(h := m.a(x).relu()) / h.size(1), a=nn.Linear(6, 8), b=nn.Linear(8, 2)),
                           None),
    'another attribute': (lambda: Odd(lambda m, x: m.b(h := m.a(x).relu()) + h.mT.mean(), a=nn.Linear(6, 8), b=nn.Linear(8, 2)),
                          None),
    'two inputs': (lambda: Odd(lambda m, x: m.b(m.a(x).relu(), m.c(x).relu()), a=nn.Linear(6, 8), c=nn.Linear(6, 7),
                               b=nn.Bilinear(8, 7, 2)), None),
}  # fmt: skip


@pytest.mark.parametrize('name', COMPUTED)
def test_shared_and_computed_weights_stay(name):
    make, hosts = COMPUTED[name]
    with seeded(0):
        net, x = make().eval(), torch.rand(4, 6)
    if hosts is None:
        with pytest.raises(ValueError, match='no unit .* alone'):
            insert_masks(net, x)
        return
    masked = half_dead(net, x)
    assert list(dict.fromkeys(kept_units(masked)['layer'])) == hosts
    torch.testing.assert_close(slim(masked)(x.double()), masked(x.double()), rtol=1e-9, atol=1e-10)


def test_pruned_weights_have_to_be_made_plain():
    from torch.nn.utils import prune

    net, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval(), torch.rand(4, 6)
    prune.ln_structured(net[2], 'weight', 0.5, n=2, dim=1)
    for use in (slim, lambda net: insert_masks(net, x)):
        with pytest.raises(ValueError, match='prune.remove'):
            use(net)
    prune.remove(net[2], 'weight')
    small = slim(net)
    assert small[0].out_features == 4
    torch.testing.assert_close(small(x), net(x))


@pytest.mark.parametrize(
    'net, where, how',
    [
        (nn.Sequential(conv(1, 4), Swish(), conv(4, 2)), '1', {}),
        (nn.Sequential(nn.Sequential(conv(1, 4), nn.ReLU()), conv(4, 2)), '0', {}),
        (nn.Sequential(conv(1, 4), nn.ReLU(), conv(4, 2)), '1', {'dim': 2}),
        (nn.Sequential(nn.ConvTranspose2d(1, 1, 3), nn.ConvTranspose2d(1, 4, 3), nn.Sigmoid(), conv(4, 2, groups=2)), '2', {}),
    ],
)
def test_masks_that_stand_in_the_way(net, where, how):
    masked = insert_masks(net, torch.rand(2, 1, 8, 8), where=where, **how)
    with pytest.raises(ValueError, match='cannot be folded'):
        slim(masked)


def test_what_a_file_of_odd_layers_gives_back(tmp_path):
    with seeded(0):
        make = lambda: nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8, affine=False, track_running_stats=False),  # noqa: E731
                                     nn.ReLU(), nn.Linear(8, 3)).eval().requires_grad_(False)
        net, x = make(), torch.rand(9, 6)
    with torch.no_grad():
        net[3].weight[:, :3] = 0
    small = slim(net)
    save(small, tmp_path / 'net.safetensors')
    again = load_slimmed(make(), tmp_path / 'net.safetensors')
    assert again[0].out_features == 5 and not any(p.requires_grad for p in [*again.parameters(), *small.parameters()])
    torch.testing.assert_close(again(x), net(x))


@pytest.mark.parametrize('kind', [torch.float16, torch.bfloat16])
def test_masks_of_networks_in_half_precision(kind):
    masked, x = insert_masks(mlp(), torch.rand(2, 1, 8, 8)).to(kind), torch.rand(40, 1, 8, 8).to(kind)
    assert masked.train()(x).dtype == kind and masked(x).isfinite().all()
    assert masked[2].mask.keep.tolist() == pytest.approx([0.75] * 12, rel=1e-2)
    torch.testing.assert_close(slim(masked)(x), masked.eval()(x), rtol=2e-2, atol=2e-2)


def test_a_wrapped_network_kept_in_a_file(tmp_path):
    x = torch.rand(3, 1, 8, 8)
    small = slim(half_dead(Normalized(mlp(), [0.5], [0.5]), x)).float()
    save(small, tmp_path / 'net.safetensors')
    again = load_slimmed(Normalized(mlp(), [0.5], [0.5]), tmp_path / 'net.safetensors')
    assert torch.equal(again(x), small(x))


def live(net, seed=0):
    "The network in double precision, with normalisations that have seen data."
    net = net.double().eval()
    with seeded(seed), torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d) and module.affine:
                module.running_mean.normal_(0, 0.3), module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 2), module.bias.normal_(0, 0.3)
    return net


def close(net, channels, *names):
    "Set the rows of these modules to zero."
    with torch.no_grad():
        for name in names:
            module = net.get_submodule(name)
            module.weight[channels] = 0
            if module.bias is not None:
                module.bias[channels] = 0


def sums(net, x):
    "`slim_sums` of a network, which computes the same, and leaves the network as it was."
    pytest.importorskip('torch_pruning')
    before = {name: value.clone() for name, value in net.state_dict().items()}
    small = slim_sums(net, x)
    with torch.no_grad():
        torch.testing.assert_close(small(x), net(x), rtol=1e-9, atol=1e-9)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    return small


STAGE = 'layer2.0.conv2', 'layer2.0.bn2', 'layer2.0.shortcut.0', 'layer2.0.shortcut.1', 'layer2.1.conv2', 'layer2.1.bn2'


@pytest.fixture
def resnet():
    "ResNet-18 with 8 to 64 channels, and images."
    x = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return live(build('resnet18', 0, width=0.125)), x


def test_channels_of_a_stage_go_together(resnet, tmp_path):
    net, x = resnet
    close(net, [1, 4, 5], *STAGE)
    close(net, [0, 2], 'conv1', 'bn1', 'layer1.0.bn2', 'layer1.1.bn2')  # the convolutions of the blocks need not be zero
    small = sums(net, x)
    assert [small.layer2[b].conv2.out_channels for b in (0, 1)] == [13, 13]
    assert [small.layer2[0].shortcut[0].out_channels, small.layer3[0].conv1.in_channels, small.bn1.num_features] == [13, 13, 6]
    assert slim(net).layer2[0].conv2.out_channels == 16 and small.linear.in_features == 64
    assert all(parameter.requires_grad for parameter in small.parameters())
    y = net(x).argmax(1)
    table = evaluate({'full': net, 'small': small}, (x, y), PGD(8 / 255, steps=3), show_progress=False).table()
    found = [table[table.model == name].accuracy.tolist() for name in ('full', 'small')]
    assert found[0] == found[1]
    save(small, tmp_path / 'net.safetensors')
    again = load_slimmed(build('resnet18', 0, width=0.125).double(), tmp_path / 'net.safetensors')
    with torch.no_grad():
        assert torch.equal(again(x), small(x)) and repr(again) == repr(small)


@pytest.mark.parametrize('left_out', ['layer2.0.bn2', 'layer2.0.shortcut.1', 'layer2.1.bn2'])
def test_channels_that_one_member_makes_stay(resnet, left_out):
    net, x = resnet
    close(net, [1, 4, 5], *(name for name in STAGE if name != left_out))
    assert sums(net, x).layer2[0].conv2.out_channels == 16


def test_channels_that_nobody_reads_go(resnet):
    net, x = resnet
    with torch.no_grad():
        for name in ('layer2.1.conv1', 'layer3.0.conv1', 'layer3.0.shortcut.0'):
            net.get_submodule(name).weight[:, :4] = 0
        net.layer3[0].conv1.weight[5, 3] = 1.0  # one is read by one
    assert sums(net, x).layer2[1].conv2.out_channels == 13


def test_one_mask_for_a_stage(resnet):
    net, x = resnet
    masked = insert_masks(net, x, where=['layer2.*.bn2', 'layer2.0.shortcut.1', 'layer3.0.relu1'])
    shared = masked.layer2[0].bn2.mask
    masked.layer2[1].bn2.mask = masked.layer2[0].shortcut[1].mask = shared
    assert len(masks_of(masked)) == 2
    with torch.no_grad():
        shared.a_raw[:] = torch.linspace(-2, 3, 16)
        shared.a_raw[::2] = -9
    small = sums(masked.eval(), x)
    assert small.layer2[1].conv2.out_channels == 8 and not masks_of(small)


def test_everything_closed_leaves_one_channel(resnet):
    net, x = resnet
    close(net, range(16), *STAGE)
    assert sums(net, x).layer2[0].conv2.out_channels == 1


def test_parameters_that_do_not_learn(resnet):
    net, x = resnet
    close(net, [1, 4, 5], *STAGE)
    net.conv1.requires_grad_(False)
    small = sums(net, x)
    assert [name for name, p in small.named_parameters() if not p.requires_grad] == ['conv1.weight']
    wrapped = Normalized(net, [0.5] * 3, [0.5] * 3)
    assert sums(wrapped, x).model.layer2[1].conv2.out_channels == 13


class Scaled(nn.Module):
    "Sums before a normalisation, channels side by side, and a depthwise convolution."

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = conv(3, 6), conv(6, 6), conv(6, 4)
        self.norm, self.deep = nn.BatchNorm2d(6), conv(10, 10, groups=10, bias=False)
        self.point, self.fc = nn.Conv2d(10, 5, 1), nn.Linear(20, 3)

    def forward(self, x):
        x = self.a(x)
        x = self.norm(x + self.b(x)).relu()
        x = self.point(self.deep(torch.cat([x, self.c(x)], 1)).relu())
        return self.fc(nn.functional.adaptive_avg_pool2d(x + x, 2).flatten(1))


def test_concatenation_depthwise_and_flattening(tmp_path):
    with seeded(0):
        net, x = live(Scaled()), torch.rand(4, 3, 8, 8, dtype=torch.float64)
    close(net, [0, 5], 'a', 'b')  # zero, but not behind the normalisation
    assert sums(net, x).a.out_channels == 6
    close(net, [0, 5, 2], 'norm')  # `b` reads channel 2 before it is closed
    close(net, [1], 'c')
    close(net, [3], 'point')
    small = sums(net, x)
    assert [small.a.out_channels, small.b.in_channels, small.c.in_channels, small.c.out_channels] == [4, 4, 4, 3]
    assert [small.deep.groups, small.point.in_channels, small.point.out_channels, small.fc.in_features] == [7, 7, 4, 16]
    save(small, tmp_path / 'net.safetensors')
    again = load_slimmed(Scaled().double(), tmp_path / 'net.safetensors')
    assert torch.equal(again(x), small(x)) and repr(again) == repr(small)


HELD = {
    'softmax over channels': lambda m, x: m.c((m.a(x) + m.b(x)).softmax(1)),
    'a mean over channels': lambda m, x: m.c(h := m.a(x) + m.b(x)) + h.mean(1, keepdim=True),
    'a sum with the image': lambda m, x: m.c(m.a(x) + m.b(x) + x),
    'one more': lambda m, x: m.c(m.a(x) + m.b(x) + 1),
    'a product': lambda m, x: m.c((m.a(x) + m.b(x)) * m.e(x)),
    'groups': lambda m, x: m.c(m.d(m.a(x) + m.b(x))),
    'an output': lambda m, x: m.a(x) + m.b(x),
    'shuffled': lambda m, x: m.c((m.a(x) + m.b(x)).unflatten(1, (2, 3)).transpose(1, 2).flatten(1, 2)),
    'sliced': lambda m, x: m.f((m.a(x) + m.b(x))[:, :4]),
    'twice the same weights': lambda m, x: m.c(m.b(m.a(x) + m.b(x))),
    'layer normalisation': lambda m, x: m.c(nn.functional.layer_norm(m.a(x) + m.b(x), (6, 5, 5))),
    'a size as a number': lambda m, x: m.c(h := m.a(x) + m.b(x)) / h.size(1),
}


@pytest.mark.parametrize('name', HELD)
def test_what_is_held_stays(name):
    with seeded(0):
        parts = {'a': conv(6, 6), 'b': conv(6, 6), 'c': conv(6, 3), 'd': conv(6, 6, groups=2), 'e': conv(6, 6), 'f': conv(4, 3)}
        net, x = live(Odd(HELD[name], **parts)), torch.rand(3, 6, 5, 5, dtype=torch.float64)
    close(net, [0, 3], 'a', 'b')
    assert sums(net, x).a.out_channels == 6


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch_pruning', None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install robustnb\[prune\]'):
        slim_sums(mlp(), torch.rand(2, 1, 8, 8))
