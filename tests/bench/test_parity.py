"""The same attack with the same settings gives the same result in robustnb, torchattacks, foolbox and ART.

Run by `make parity`, in .venv-bench. Where results are not the same, the tests say what makes the difference, and show that
it is that: they take the cause away and find the results equal.
"""

import copy
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from peers import LIBRARIES, Counted, Setting, data_root, lenet, packaged, robust_accuracy, sizes

NETWORKS = {  # name -> what makes it, strength in the maximum norm, strength in the Euclidean norm
    'digits': (lambda: packaged('digits'), 0.1, 0.5),
    'digits, adversarial': (lambda: packaged('digits', 'adversarial'), 0.15, 0.75),
    'digits28': (lambda: packaged('digits28'), 0.05, 1.0),
    'digits28, adversarial': (lambda: packaged('digits28', 'adversarial'), 0.15, 2.0),
    'LeNet-5 on MNIST': (lenet, 0.2, 2.0),
}
PEERS = [name for name in LIBRARIES if name != 'robustnb']
ATTACKS = ['fgsm', 'pgd-10', 'pgd-40', 'pgd-40-l2']
ONE_SAMPLE = 1 / 128 + 1e-6


@pytest.fixture(scope='module', autouse=True)
def one_thread():
    "Small networks gain nothing from more, and sums have the same order on every machine."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope='module', params=NETWORKS)
def network(request) -> str:
    "The name of a network; the one on MNIST only where the data are."
    if 'MNIST' in request.param and data_root() is None:
        pytest.skip('no MNIST: ROBUSTNB_DATA names no folder that has it, and there is none beside the project')
    return request.param


def setting(attack: str, network: str) -> Setting:
    "What an attack is asked to do on a network."
    _, linf, l2 = NETWORKS[network]
    return {
        'fgsm': Setting('fgsm', eps=linf),
        'pgd-10': Setting.pgd(10, linf),
        'pgd-40': Setting.pgd(40, linf),
        'pgd-40-l2': Setting.pgd(40, l2, 'l2'),
    }[attack]


@cache
def batch(network: str):
    "A network and 128 images with their labels."
    model, test = NETWORKS[network][0]()
    return model, test.x[:128], test.y[:128]


@cache
def attacked(library: str, attack: str, network: str) -> tuple[torch.Tensor, dict]:
    "What a library makes of the batch, and the passes that it took."
    model, x, y = batch(network)
    counted = Counted(model)
    return LIBRARIES[library](setting(attack, network), counted)(x, y).detach(), counted.passes(len(x))


def apart(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    "The largest difference of any value, for each sample."
    return (a - b).abs().flatten(1).amax(1)


def test_the_networks_read_their_images(network):
    model, x, y = batch(network)
    assert robust_accuracy(model, x, y) >= 0.9


# -------------------------------------------------------------------------------------------------- the same numbers


@pytest.mark.parametrize('attack', ATTACKS)
@pytest.mark.parametrize('library', PEERS)
def test_robust_accuracy_within_one_sample(library, attack, network):
    model, _, y = batch(network)
    ours, theirs = (robust_accuracy(model, attacked(name, attack, network)[0], y) for name in ('robustnb', library))
    assert abs(ours - theirs) <= ONE_SAMPLE, f'robustnb {ours:.4f}, {library} {theirs:.4f}'


@pytest.mark.parametrize('attack', ATTACKS)
@pytest.mark.parametrize('library', LIBRARIES)
def test_all_keep_to_the_rules(library, attack, network):
    _, x, _ = batch(network)
    s, (x_adv, _) = setting(attack, network), attacked(library, attack, network)
    assert sizes(x_adv - x, s.norm).max() <= s.eps + 1e-6
    assert x_adv.min() >= 0 and x_adv.max() <= 1


@pytest.mark.parametrize('attack', ATTACKS)
def test_the_work_done(attack, network):
    k = setting(attack, network).steps
    more = {'robustnb': 0, 'torchattacks': 0, 'foolbox': 1, 'ART': 0 if attack == 'fgsm' else 2}  # forward passes for a verdict
    for library in LIBRARIES:
        assert attacked(library, attack, network)[1] == {'forward': k + more[library], 'backward': k}


# --------------------------------------------------------------------------------------------------- the same images


@pytest.mark.parametrize('library', PEERS)
def test_fgsm_gives_the_same_images(library, network):
    ours, theirs = (attacked(name, 'fgsm', network)[0] for name in ('robustnb', library))
    assert apart(ours, theirs).max() <= 1e-7


@pytest.mark.parametrize('attack', ['pgd-10', 'pgd-40'])
@pytest.mark.parametrize('library', PEERS)
def test_pgd_gives_the_same_images_but_for_rounding(library, attack, network):
    """Bounds are kept by `clamp(x_adv, x - eps, x + eps)` here and by `x + clamp(x_adv - x, -eps, eps)` in the others.

    That is the same formula, rounded differently in the last digit. Where two values of a maximum pooling are equal up to
    that digit, or a gradient is zero up to it, the next step goes another way: a few samples part.
    """
    ours, theirs = (attacked(name, attack, network)[0] for name in ('robustnb', library))
    assert (apart(ours, theirs) > 1e-6).sum() <= 4


@pytest.mark.parametrize('attack', ['pgd-10', 'pgd-40', 'pgd-40-l2'])
@pytest.mark.parametrize('library', ['torchattacks', 'foolbox'])
def test_in_double_precision_the_images_are_the_same(library, attack, network):
    "So it was rounding. (torchattacks adds 1e-10 to the length of a gradient; here it does not. ART has no double precision.)"
    model, x, y = batch(network)
    model, x, s = copy.deepcopy(model).double(), x[:32].double(), setting(attack, network)
    ours, theirs = (LIBRARIES[name](s, model) for name in ('robustnb', library))
    if hasattr(theirs, 'eps_for_division'):
        theirs.eps_for_division = 0
    assert (apart(ours(x, y[:32]), theirs(x, y[:32])) > 1e-9).sum() <= 1  # exact ties do not go away


def literal_l2(model, x, y, s: Setting, clip_first: bool) -> torch.Tensor:
    "PGD in the Euclidean norm, line by line, with the pixels brought back into [0, 1] before or after the projection."

    def project(moved):
        change = moved - x
        length = change.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
        return x + change * (s.eps / length).clamp(max=1)

    x_adv = x
    for _ in range(s.steps):
        start = x_adv.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(start), y, reduction='sum'), start)
        moved = x_adv + s.step * gradient / gradient.flatten(1).norm(dim=1).clamp_min(1e-30).view(-1, 1, 1, 1)
        x_adv = project(moved.clamp(0, 1)) if clip_first else project(moved).clamp(0, 1)
    return x_adv


def test_in_the_euclidean_norm_art_clips_first(network):
    "The order of clipping and projecting does not matter in the maximum norm; in the Euclidean norm it gives other images."
    model, x, y = batch(network)
    s = setting('pgd-40-l2', network)
    for library, clip_first in [('ART', True), ('robustnb', False), ('foolbox', False)]:
        result = attacked(library, 'pgd-40-l2', network)[0]
        same, other = (apart(result, literal_l2(model, x, y, s, first)) for first in (clip_first, not clip_first))
        assert (same > 1e-4).sum() <= 6 and (other > 1e-4).sum() > 64


# ------------------------------------------------------------------------------------------------ the same descent in CW


@pytest.mark.parametrize('name', ['digits28', 'LeNet-5 on MNIST'])
def test_cw_goes_the_way_of_foolbox(name):
    "With one weight and one learning rate. foolbox does not look at the point after the last step, so ours gets a step less."
    if 'MNIST' in name and data_root() is None:
        pytest.skip('no MNIST')
    model, x, y = batch(name)
    theirs, ours = (Setting('cw', 'l2', steps=steps, step=0.01, c=1.0) for steps in (20, 19))
    found = {}
    for library, s in (('foolbox', theirs), ('robustnb', ours)):
        x_adv = LIBRARIES[library](s, model)(x, y).detach()
        with torch.no_grad():
            fooled = (model(x_adv).argmax(1) != y) & x_adv.flatten(1).any(1)  # foolbox: black where it found nothing
        found[library] = float(fooled.float().mean()), float(sizes(x_adv - x, 'l2')[fooled].median())
    assert abs(found['robustnb'][0] - found['foolbox'][0]) <= ONE_SAMPLE and found['robustnb'][0] > 0.02, found
    assert found['robustnb'][1] == pytest.approx(found['foolbox'][1], rel=0.01)
