"Objectives of pruning: what each group of parameters is told, shared masks, balance, collapse, and trainings that go on."

import copy
import os
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from xla_process import checks_of, outcomes, run_checks

from robustnb import dropout, training
from robustnb.attacks import FGSM, PGD
from robustnb.checkpoints import load_state
from robustnb.data import Batch, digits
from robustnb.devices import pick_device, seeded
from robustnb.dropout import insert_masks, mask_kl, mask_mode, paired
from robustnb.models import build
from robustnb.pruning import AdversarialPruning, Balanced, BayesianPruning, Collapse, dead_layers
from robustnb.suppression import suppress, vulnerability
from robustnb.training import Adversarial, Ramped, Standard, clipped, fit

ATTACK = FGSM(eps=0.1)


def small(seed: int = 0) -> nn.Sequential:
    "A network with two layers of units."
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 12), nn.ReLU(), nn.Linear(12, 10))


def masked(seed: int = 0, **settings) -> nn.Module:
    return insert_masks(small(seed), torch.rand(2, 1, 8, 8), **settings).double().train()


@pytest.fixture
def batch() -> Batch:
    draw = torch.Generator().manual_seed(1)
    x = torch.rand(8, 1, 8, 8, generator=draw, dtype=torch.float64)
    return Batch(x, torch.arange(8) % 10, torch.arange(8))


def by_hand(model, x, x_adv) -> tuple:
    "Logits and activations of both halves of one pass, by the letter: a draw for each sample, used twice."
    z = {name: model.get_submodule(name).mask for name in ('1', '4')}
    drawn = {name: dropout._relaxed(*mask.ab(), len(x), mask.temperature) for name, mask in z.items()}
    found = []
    for half in (x, x_adv):
        h1 = F.relu(F.conv2d(half, model[0].weight, model[0].bias)) * drawn['1'][:, :, None, None]
        h2 = F.relu(h1.flatten(1) @ model[3].weight.T + model[3].bias) * drawn['4']
        found.append((h2 @ model[5].weight.T + model[5].bias, (h1, h2)))
    return found


def literal_terms(model, batch, seed: int) -> dict:
    "Clean and attacked loss and vulnerability, literally."
    with seeded(seed):
        x_adv = ATTACK(copy.deepcopy(model).eval(), batch.x, batch.y, batch.ids)
        (clean, calm), (attacked, moved) = by_hand(model, batch.x, x_adv)
    distance = [(b - a).abs().mean() for a, b in zip(calm, moved, strict=True)]
    return {'clean': F.cross_entropy(clean, batch.y), 'attacked': F.cross_entropy(attacked, batch.y), 'V': sum(distance) / 2}


def gradients(loss, parameters) -> list:
    return torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)


def close(a, b) -> None:
    for one, other in zip(a, b, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize('split', [True, False])
def test_each_group_is_told_what_the_formula_says(batch, split):
    model = masked()
    objective = AdversarialPruning(ATTACK, samples=500, beta=3.0, suppression=suppress(0.7), clean_weight=0.25, split=split)
    with seeded(5):
        losses = objective.loss(model, batch, 0)
    model.zero_grad()
    literal, groups = literal_terms(model, batch, 5), objective.groups(model)
    mixed, price = 0.25 * literal['clean'] + 0.75 * literal['attacked'], 3 * mask_kl(model) / 500
    expected = {'weights': mixed + 0.7 * literal['V'], 'masks': literal['attacked'] + price} if split else {
        name: mixed + 0.7 * literal['V'] + price for name in groups}
    for name, parameters in groups.items():
        loss = losses[name] if split else losses
        torch.testing.assert_close(loss, expected[name], rtol=1e-9, atol=1e-11)
        close(gradients(loss, parameters), gradients(expected[name], parameters))


def test_bayesian_pruning_is_the_loss_and_the_price(batch):
    model = masked()
    for step, share in ((0, 0.0), (5, 0.5), (10, 1.0), (30, 1.0)):
        with seeded(3):
            loss = BayesianPruning(samples=50, beta=2.0, warm_up=10).loss(model, batch, step)
        with seeded(3):
            plain = Standard().loss(model, batch, step)
        torch.testing.assert_close(loss, plain + share * 2 / 50 * mask_kl(model))


def test_without_a_difference_there_is_no_vulnerability(batch):
    model, same = masked(), lambda model, x, y: x
    same_draws = AdversarialPruning(same, samples=8, suppression=suppress())
    assert same_draws.terms(model, batch, 0)[1] == 0
    term = suppress()
    apart = term(model, batch, batch.x.clone(), 0)  # the term alone repeats its draws as well
    assert apart == 0
    halves = [{'1': model[1](model[0](batch.x))} for _ in range(2)]
    assert term.between(*halves, 0) > 0  # draws of their own would have been noise


def test_dropout_and_the_price_come_in_slowly(batch):
    model = masked()
    objective = AdversarialPruning(ATTACK, samples=10, warm_up=4, suppression=suppress(1.0, warm_up=2))
    found = []
    for step in range(5):
        with seeded(0):
            risk, term = objective.terms(model, batch, step)
        found.append((risk['masks'].item(), term.item() if torch.is_tensor(term) else term))
    price = np.diff([masks for masks, _ in found])
    assert np.allclose(price, mask_kl(model).item() / 10 / 4)
    assert found[0][1] == 0 and np.isclose(found[1][1] * 2, found[2][1]) and found[2][1] == found[4][1]


def test_the_attack_sees_the_mean_masks_and_they_are_let_go(batch):
    model, seen = masked(), []

    def attack(net, x, y):
        seen.append((net.training, [m.held is not None for m in net.modules() if hasattr(m, 'held')], net(x), net(x)))
        return x

    AdversarialPruning(attack, samples=8).loss(model, batch, 0)
    training, held, once, again = seen[0]
    assert not training and all(held) and torch.equal(once, again)
    with mask_mode(model.eval(), 'mean'):
        assert torch.equal(once, model(batch.x))
    assert all(m.held is None for m in model.modules() if hasattr(m, 'held'))

    def broken(net, x, y):
        raise RuntimeError('no')

    with pytest.raises(RuntimeError, match='no'):
        AdversarialPruning(broken, samples=8).loss(model, batch, 0)
    assert all(m.held is None for m in model.modules() if hasattr(m, 'held'))


def test_activations_of_masks_are_none_of_the_network():
    x = torch.rand(6, 1, 8, 8)
    found = vulnerability(masked().float(), (x, torch.zeros(6).long()), FGSM(0.1), show_progress=False)
    assert found.layers == ['1', '4']


@pytest.mark.parametrize('form', ['mean', 'sum', 'relative'])
def test_balanced_pulls_by_the_ratio(batch, form):
    model = masked()
    objective = AdversarialPruning(ATTACK, samples=8, suppression=suppress(1.0, form))
    balanced = Balanced(objective, ratio=0.2, every=3)
    with seeded(0):
        balanced.loss(model, batch, 0)
    with seeded(0):
        risk, term = objective.terms(model, batch, 0)
    weights = objective.groups(model)['weights']
    squares = [[g.square().sum() for g in gradients(loss, weights) if g is not None] for loss in (risk['weights'], term)]
    length = [torch.stack(parts).sum().sqrt() for parts in squares]
    torch.testing.assert_close(balanced.weight, (0.2 * length[0] / length[1]).item(), rtol=1e-5, atol=0)
    before, again = balanced.weight, Balanced(objective, ratio=0.2, every=3)
    other = batch._replace(x=batch.x.flip(0))
    for step, kept in ((1, True), (2, True), (3, False)):
        with seeded(step):
            balanced.loss(model, other, step)
        assert (balanced.weight == before) == kept
    with seeded(3):
        again.loss(model, other, 0)
    assert np.isclose(balanced.weight, (before * again.weight) ** 0.5)  # half of the weight is the old one


def test_balanced_takes_objectives_without_groups(batch):
    model = small().double()
    balanced = Balanced(Adversarial(ATTACK, regularizers=suppress(5.0)), ratio=0.1)
    losses = balanced.loss(model, batch, 0)
    risk, term = balanced.objective.terms(model, batch, 0)
    torch.testing.assert_close(losses, risk + balanced.weight * term)
    again = Balanced(Adversarial(ATTACK, regularizers=suppress(50.0)), ratio=0.1)  # its own weight makes no difference
    torch.testing.assert_close(again.loss(model, batch, 0), losses)
    restored = Balanced(Adversarial(ATTACK, regularizers=suppress(5.0)), ratio=0.1)
    restored.load_state_dict(balanced.state_dict())
    torch.testing.assert_close(restored.loss(model, batch, 1), losses)


def test_balanced_holds_the_ratio_while_the_attack_grows(batch):
    model = masked()
    objective = AdversarialPruning(Ramped(ATTACK, 20), samples=8, suppression=suppress())
    balanced, weights = Balanced(objective, ratio=0.15, every=25), objective.groups(model)['weights']
    for step in (0, 1, 7, 19):
        with seeded(step):
            balanced.loss(model, batch, step)
        with seeded(step):
            risk, term = objective.terms(model, batch, step)
        pulls = [sum(g.square().sum() for g in gradients(loss, weights) if g is not None) ** 0.5
                 for loss in (risk['weights'], balanced.weight * term)]
        assert np.isclose(float(pulls[1] / pulls[0]), 0.15, rtol=1e-4), step


def test_balanced_keeps_its_weight_where_there_is_no_gradient(batch):
    same = Balanced(AdversarialPruning(lambda model, x, y: x, samples=8, suppression=suppress()), every=1)
    risk, term = same.objective.terms(masked(), batch, 0)
    losses = same.loss(masked(), batch, 0)
    assert same.weight is None and float(losses['weights'].detach()) > 0
    same.weight = 3.0
    same.loss(masked(), batch, 1)
    assert same.weight == 3.0


def test_balanced_asks_the_terms_and_loses_none(batch):
    def l1(model, batch, x_adv, step):
        return sum(p.abs().sum() for p in model.parameters()) * 1e-3

    model, plain = masked(), BayesianPruning(samples=8, beta=2.0, regularizers=l1)
    balanced = Balanced(plain, ratio=0.5)
    with seeded(0):
        loss = balanced.loss(model, batch, 0)
    with seeded(0):
        risk, term = plain.terms(model, batch, 0)
    with seeded(0):
        torch.testing.assert_close(plain.loss(model, batch, 0), risk + term)
    torch.testing.assert_close(loss, risk + balanced.weight * term)
    with seeded(0):
        torch.testing.assert_close(risk, Standard().loss(model, batch, 0) + 2 / 8 * mask_kl(model))

    class Own(Adversarial):
        def loss(self, model, batch, step):
            return super().loss(model, batch, step) + 1

    with pytest.raises(TypeError, match='terms\\(model, batch, step\\)'):
        Balanced(Own(ATTACK, regularizers=l1))
    for slow in (Adversarial(ATTACK, regularizers=suppress(warm_up=3)),
                 AdversarialPruning(ATTACK, samples=8, suppression=suppress(warm_up=3))):
        with pytest.raises(ValueError, match='warm_up=0'):
            Balanced(slow)


def test_ordinary_dropout_is_shared_by_both_halves(batch):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Dropout2d(0.5), nn.Flatten(), nn.Linear(216, 12), nn.ReLU(),
                        nn.Dropout(0.4), nn.Linear(12, 10))
    model, same = insert_masks(net, torch.rand(2, 1, 8, 8)).double().train(), lambda model, x, y: x
    assert AdversarialPruning(same, samples=8, suppression=suppress()).terms(model, batch, 0)[1] == 0
    with paired(model):
        whole = torch.nn.Sequential(*list(model)[:3])(torch.cat([batch.x, batch.x]))
    assert torch.equal(*whole.chunk(2)) and (whole == 0).all((2, 3)).any()  # drawn, and alike
    assert not any(module._forward_hooks for module in model if isinstance(module, nn.Dropout | nn.Dropout2d))
    with paired(model.eval()):
        assert torch.equal(model(batch.x), model(batch.x))


def kill(model: nn.Module, name: str) -> None:
    with torch.no_grad():
        model.get_submodule(name).mask.a_raw.fill_(-10)


class Branch(nn.Module):
    "A branch beside a way around it."

    def __init__(self):
        super().__init__()
        self.first, self.act, self.second = nn.Linear(64, 9), nn.ReLU(), nn.Linear(9, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        x = x.flatten(1)
        return self.head(x + self.second(self.act(self.first(x))))


def test_a_dead_network_is_told_and_a_dead_branch_is_none(batch):
    model = masked()
    assert dead_layers(model) == []
    kill(model, '4')
    assert dead_layers(model) == ['4']
    for objective in (BayesianPruning(samples=8), AdversarialPruning(ATTACK, samples=8)):
        with pytest.raises(Collapse, match='all units of 4 are off.*smaller beta'):
            objective.loss(model, batch, 100)
        objective.loss(model, batch, 101)  # it looks every hundred steps
    assert model.training
    one = batch._replace(x=batch.x[:1], y=batch.y[:1], ids=batch.ids[:1])
    BayesianPruning(samples=8).loss(model, one, 100)  # one sample cannot tell
    residual = insert_masks(Branch(), torch.rand(2, 1, 8, 8), where=['act']).double().train()
    kill(residual, 'act')
    assert dead_layers(residual) == ['act']
    BayesianPruning(samples=8).loss(residual, batch, 0)


def test_a_price_that_is_too_high_ends_in_an_error():
    train, _ = digits()
    makers = {'weights': torch.optim.Adam, 'masks': partial(torch.optim.Adam, lr=0.5)}
    with pytest.raises(Collapse, match='says the same for every input'):
        fit(masked().float(), train.take(400), BayesianPruning(samples=400, beta=1e5), epochs=60, batch_size=100,
            optimizer=makers, show_progress=False)


@pytest.mark.parametrize('wrong, error, words', [
    ({'samples': 0}, ValueError, 'len\\(train\\)'),
    ({'samples': 64.0}, ValueError, 'whole number from 1'),
    ({'beta': -1}, ValueError, 'at least 0'),
    ({'beta': float('nan')}, ValueError, 'at least 0'),
    ({'warm_up': -1}, ValueError, 'number of steps'),
    ({'clean_weight': 1.5}, ValueError, 'share from 0 to 1'),
    ({'suppression': 1.0}, TypeError, 'suppress\\(weight\\)'),
    ({'attack': PGD}, TypeError, 'PGD\\(eps=0.1\\)'),
])
def test_what_means_nothing_is_refused(wrong, error, words):
    with pytest.raises(error, match=words):
        AdversarialPruning(**{'attack': ATTACK, 'samples': 8} | wrong)


def test_other_mistakes_teach(batch):
    with pytest.raises(ValueError, match='insert_masks'):
        AdversarialPruning(ATTACK, samples=8).loss(small().double(), batch, 0)
    with pytest.raises(ValueError, match='nothing to balance'):
        Balanced(AdversarialPruning(ATTACK, samples=8)).loss(masked(), batch, 0)
    with pytest.raises(TypeError, match='without a memory'):
        Balanced(Balanced(Adversarial(ATTACK)))
    for wrong in ({'ratio': -0.1}, {'every': 0}, {'ratio': float('inf')}):
        with pytest.raises(ValueError, match='at least'):
            Balanced(Adversarial(ATTACK), **wrong)
    with pytest.raises(ValueError, match='from 1'):
        Ramped(ATTACK, 0)
    with pytest.raises(TypeError, match='with a strength'):
        Ramped(lambda model, x, y: x, 3)
    with pytest.raises(ValueError, match='above 0'):
        clipped(torch.optim.SGD, 0)


def test_a_ramp_grows_evenly_and_moves_its_seed(batch):
    model, seen = small().double(), []
    attack = Ramped(PGD(eps=0.2, steps=2, step=0.1), 4)
    for step in range(6):
        x_adv = Adversarial(attack).perturbed(model, batch, step)
        seen.append((x_adv - batch.x).abs().max().item())
        literal = PGD(eps=0.2 * min(1, (step + 1) / 4), steps=2, step=0.1 * min(1, (step + 1) / 4), seed=step)
        torch.testing.assert_close(x_adv, literal(model, batch.x, batch.y, batch.ids))
    assert np.allclose(seen, [0.05, 0.1, 0.15, 0.2, 0.2, 0.2])
    torch.testing.assert_close(attack(model, batch.x, batch.y), attack.attack(model, batch.x, batch.y))


def test_augmented_images_are_what_everything_sees(batch):
    model, seen = masked(), []

    def attack(net, x, y):
        seen.append(x.clone())
        return x

    for objective in (Adversarial(attack), AdversarialPruning(attack, samples=8)):
        flipped = replace(objective, augment=lambda x: x.flip(-1)).loss
        plain = objective.loss
        with seeded(0):
            a = flipped(model, batch, 0)
        with seeded(0):
            b = plain(model, batch._replace(x=batch.x.flip(-1)), 0)
        assert torch.equal(seen[-1], seen[-2]) and torch.equal(seen[-1], batch.x.flip(-1))
        assert str(a) == str(b)


@pytest.mark.parametrize('split', [True, False])
def test_a_loop_by_hand_takes_the_steps_of_fit(split):
    data, found = digits()[0].take(60), []
    objective = AdversarialPruning(ATTACK, samples=60, beta=5.0, warm_up=4, suppression=suppress(), split=split)
    makers = {'weights': partial(torch.optim.Adam, lr=1e-3), 'masks': partial(torch.optim.Adam, lr=0.1)}
    for by_hand in (False, True):
        model = insert_masks(small(), torch.rand(2, 1, 8, 8)).train()
        groups = objective.groups(model)
        optimizers = {name: make(groups[name]) for name, make in makers.items()}
        trainer = training._Trainer(model, objective, makers, None)
        for step in range(6):
            rows = torch.arange(10 * step, 10 * step + 10)
            batch = Batch(data.x[rows], data.y[rows], rows)
            with seeded(step):
                if not by_hand:
                    trainer(batch)
                    continue
                losses = objective.loss(model, batch, step)
                for name, parameters in groups.items():
                    loss = losses[name] if split else losses
                    for p, g in zip(parameters, gradients(loss, parameters), strict=True):
                        p.grad = g
                for optimizer in optimizers.values():
                    optimizer.step()
        found.append([p.detach() for p in model.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def how() -> dict:
    "A training of a masked network with all that has a memory: two optimizers, a schedule, a weight by ratio, drawn masks."
    objective = Balanced(AdversarialPruning(Ramped(FGSM(0.1), 10), samples=300, beta=5.0, warm_up=10, suppression=suppress()),
                         every=4)
    makers = {'weights': partial(torch.optim.Adam, lr=1e-3, weight_decay=1e-4),
              'masks': clipped(partial(torch.optim.Adam, lr=0.05), 1.0)}
    return {'objective': objective, 'epochs': 3, 'batch_size': 50, 'optimizer': makers, 'schedule': 'linear', 'every': 2,
            'show_progress': False}


def trained_on(path: Path | None):
    return fit(insert_masks(small(), torch.rand(2, 1, 8, 8)), digits()[0].take(300), checkpoint=path, **how())


def test_killed_in_a_step_it_ends_with_the_same_bits(tmp_path):
    path = tmp_path / 'training.safetensors'
    beside = os.environ | {'PYTHONPATH': str(Path(__file__).parent)}  # even if Python does not look beside scripts
    killed = subprocess.run([sys.executable, __file__, 'die', str(path)], capture_output=True, text=True, env=beside)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert load_state(path)['step'] == 8
    resumed, straight = trained_on(path), trained_on(None)
    for (name, a), b in zip(resumed.model.state_dict().items(), straight.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert resumed.objective.weight == straight.objective.weight != 1
    losses = [{key: value for key, value in entry.items() if key != 'seconds'} for entry in resumed.history]
    assert losses == [{key: value for key, value in entry.items() if key != 'seconds'} for entry in straight.history]


def die(path: str) -> None:
    "Train, and die by the kernel's hand in the tenth step."
    counted, step = [0], torch.optim.Adam.step

    def mortal(self, *args, **kwargs):
        counted[0] += 1
        if counted[0] == 2 * 9 + 1:  # two optimizers
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *args, **kwargs)

    torch.optim.Adam.step = mortal
    trained_on(Path(path))


def check_a_step_equals_eager():
    "One step of adversarial neural pruning with suppression, the masks drawn on the CPU."
    def relaxed(a, b, rows, temperature):
        draw = torch.Generator().manual_seed(rows + len(a))
        u, v = (torch.rand(shape, generator=draw).clamp(min=1e-10).to(a.device) for shape in ((len(a),), (rows, len(a))))
        log_pi = dropout._log1mexp(torch.log(u) / b) / a
        return torch.special.expit((torch.log(v) - torch.log1p(-v) + log_pi - dropout._log1mexp(log_pi)) / temperature)

    dropout._relaxed, found = relaxed, []
    for device in ('cpu', pick_device('xla')):
        model = insert_masks(build('digits_cnn', seed=0).to(device), torch.rand(2, 1, 8, 8))
        objective = AdversarialPruning(PGD(0.1, steps=2, random_start=False), samples=64, suppression=suppress())
        makers = {'weights': partial(torch.optim.SGD, lr=0.1), 'masks': clipped(partial(torch.optim.SGD, lr=1.0), 1.0)}
        done = fit(model, digits()[0].take(64), objective, epochs=1, batch_size=64, optimizer=makers, show_progress=False)
        found.append((done.history[0], {name: p.detach().cpu() for name, p in done.model.named_parameters()}))
    (here, weights), (there, others) = found
    for name in ('loss of weights', 'loss of masks'):
        assert abs(here[name] - there[name]) < 1e-4 * abs(here[name]), (here, there)
    for name, value in weights.items():
        torch.testing.assert_close(others[name], value, rtol=1e-3, atol=1e-4, msg=lambda words, name=name: f'{name}: {words}')


CHECKS = checks_of(globals(), __name__)


@pytest.mark.slow
@pytest.mark.parametrize('check', CHECKS)
def test_on_xla(check, tmp_path):
    found = outcomes(Path(__file__), [check], tmp_path)[check]
    assert not found, found


if __name__ == '__main__':
    if sys.argv[1] == 'die':
        die(sys.argv[2])
    else:
        run_checks(CHECKS, *sys.argv[1:])
