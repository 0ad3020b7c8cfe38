"""Square against a literal re-implementation, what it may do and what it may see; transfer against the same by hand."""

import copy
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_attacks import Counter
from test_contract import assert_untouched, make_net, rng_state, same, snapshot
from torch import nn

from robustnb.attacks import FGSM, L2, LOSSES, PGD, Linf, Problem, WorstOf
from robustnb.blackbox import Square, Transfer, _bump, _Canvas, _Corners, _hill, _Lengths, _share, _Table
from robustnb.data import digits, moons
from robustnb.devices import sample_uniform, seeded
from robustnb.noises import Gaussian, settings_of
from robustnb.training import fit, trained

SQUARES = [
    Square(0.1, queries=12),
    Square(1.0, queries=12, norm=L2()),
    Square(0.1, queries=6, restarts=2),
    Square(0.1, queries=8, target='runner-up'),
    Square(0.1, queries=8, loss='ce', norm=Linf(scale=torch.linspace(0, 1, 8))),
    Square(1.0, queries=8, norm=L2(scale=torch.linspace(0, 1, 8))),
    Square(0.1, queries=12, keep_going=False),
]


@pytest.fixture(scope='module')
def net():
    with seeded(0):
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(288, 4))


@pytest.fixture(scope='module')
def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.rand(10, 3, 8, 8, generator=generator), torch.randint(0, 4, (10,), generator=generator)


@pytest.fixture(scope='module')
def standard():
    return trained()


@pytest.fixture(scope='module')
def robust():
    return trained(training='adversarial')


@pytest.fixture(scope='module')
def some():
    test = digits().test
    return test.x[:60], test.y[:60]


# ------------------------------------------------------------------------------------------------- literal re-implementations


def literal_share(p, query, queries):
    "The table of the paper: p, p/2, p/4 ... between 10, 50, 200 ... of 10 000 queries."
    ends = [10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000]
    place = query / queries * 10_000
    return p * 0.5 ** len([end for end in ends if place > end])


def literal_numbers(size, ids, seed, move):
    "The random numbers of one move: those of sixteen moves are drawn together."
    return sample_uniform((16, size), ids, seed, move // 16)[:, move % 16].numpy()


def literal_margin(net, image, label, targeted=False):
    with torch.no_grad():
        logits = net(torch.tensor(image, dtype=torch.float32)[None])[0].numpy()
    margin = np.delete(logits, label).max() - logits[label]
    return -margin if targeted else margin


def literal_linf(net, image, label, eps, queries, p, sample, seed, targeted=False):
    "Andriushchenko et al. 2020, algorithms 1 and 2, for one image with loops; keeps what is as good."
    channels, height, width = image.shape
    ids, asked = torch.tensor([sample]), []

    def clipped(values):
        return np.minimum(np.maximum(values, 0), 1).astype(np.float32)

    low, high = clipped(image - np.float32(eps)), clipped(image + np.float32(eps))
    coins = sample_uniform((channels * width,), ids, seed, -1)[0].numpy().reshape(channels, width)
    best = image.copy()
    for c in range(channels):
        for column in range(width):
            best[c, :, column] = (low if coins[c, column] < 0.5 else high)[c, :, column]
    loss = literal_margin(net, best, label, targeted)
    asked.append(loss)
    for query in range(1, queries):
        side = max(1, round(literal_share(p, query, queries) ** 0.5 * width))
        numbers = literal_numbers(2 + channels, ids, seed, query)[0]
        top, left = int(numbers[0] * (height - side + 1)), int(numbers[1] * (width - side + 1))
        for turn in (False, True):
            new = best.copy()
            for c in range(channels):
                for row in range(top, top + side):
                    for column in range(left, left + side):
                        new[c, row, column] = (low if (numbers[2 + c] < 0.5) != turn else high)[c, row, column]
            if (new != best).any():
                break
        answer = literal_margin(net, new, label, targeted)
        asked.append(answer)
        if answer >= loss:
            best, loss = new, answer
    return best, loss, asked


@pytest.mark.parametrize('targeted', [False, True])
def test_linf_equals_the_literal_form(targeted, net, batch):
    x, y = batch
    net.eval()
    target = (y + 1) % 4 if targeted else None
    attack = Square(0.08, queries=40, seed=3, target=target)
    problem = Problem(attack, net, x, y, torch.arange(10))
    x_adv, loss, _ = attack.explore(problem)
    for i in range(10):
        label = int(y[i]) if target is None else int(target[i])
        expected, value, _ = literal_linf(net, x[i].numpy(), label, 0.08, 40, 0.8, i, 3, targeted)
        assert np.array_equal(x_adv[i].numpy(), expected), i
        assert float(loss[i]) == pytest.approx(value, abs=1e-5)


def literal_hill(height, width):
    "The formula of the paper, one value after the other; of length 1."
    hill, most = np.zeros((height, width)), max(height // 2, width // 2) + 1
    for row in range(height):
        for column in range(width):
            away = max(abs(row - height // 2), abs(column - width // 2))
            hill[row, column] = sum(1 / k**2 for k in range(away + 1, most + 1))
    return hill / np.linalg.norm(hill)


def literal_l2_move(image, best, eps, share, channels, numbers):
    "Algorithm 3 of the paper for one image: the length of two windows goes into the first."
    size = image.shape[1]
    side = max(3, round(share**0.5 * size))
    side += side % 2 == 0
    corners = [int(n * (size - side + 1)) for n in numbers[:4]]
    (top, left), (top2, left2), coins, upright = corners[:2], corners[2:4], numbers[4 : 4 + channels], numbers[-1] >= 0.5
    bump = np.concatenate([literal_hill(side // 2, side), -literal_hill(side - side // 2, side)])
    bump = (bump.T if upright else bump) / np.linalg.norm(bump)
    delta = (best - image).astype(np.float64)
    first, second = (np.zeros_like(delta, dtype=bool) for _ in range(2))
    first[:, top : top + side, left : left + side] = True
    second[:, top2 : top2 + side, left2 : left2 + side] = True
    spare = max(eps**2 - (delta**2).sum(), 0) / channels
    moved = delta.copy()
    moved[second] = 0
    for c in range(channels):
        old = delta[c, top : top + side, left : left + side]
        new = bump * (-1 if coins[c] < 0.5 else 1) + old / max(np.linalg.norm(old), 1e-12)
        length = np.sqrt(spare + (delta[c][first[c] | second[c]] ** 2).sum())
        moved[c, top : top + side, left : left + side] = new / np.linalg.norm(new) * length
    return np.clip(image + moved / np.linalg.norm(moved) * eps, 0, 1)


def test_an_l2_move_equals_the_literal_form(net, batch):
    x, y = batch[0].double(), batch[1]
    moves = _Lengths(Problem(Square(1.0, norm=L2()), net, x, y, torch.arange(10)))
    best = moves.start(0)
    for stream, share in enumerate((0.8, 0.4, 0.1, 0.01), 1):
        numbers = literal_numbers(8, torch.arange(10), 0, stream)
        new = moves.move(best, share, stream)
        for i in range(10):
            expected = literal_l2_move(x[i].numpy(), best[i].numpy(), 1.0, share, 3, numbers[i])
            assert np.allclose(new[i].numpy(), expected, atol=1e-5), (share, i)
        best = new


def test_hills_and_bumps():
    for sides in ((3, 5), (4, 4), (9, 2), (1, 3)):
        assert np.allclose(_hill(list(sides)).numpy(), literal_hill(*sides), atol=1e-6)
    for sides in ((5, 5), (7, 3), (9,), (3, 3, 3), (1,), (2,)):
        assert _bump(sides).shape == (len(sides), *sides)
        assert torch.allclose(_bump(sides).flatten(1).norm(dim=1), torch.ones(len(sides)))
    assert torch.allclose(_bump((7, 7))[0], _bump((7, 7))[1].T)


def test_the_schedule():
    for queries in (50, 1000, 5000, 10_000):
        for query in range(0, queries, 7):
            assert _share(0.8, query, queries) == pytest.approx(literal_share(0.8, query, queries))


# ------------------------------------------------------------------------------------------------------ windows and starts


def problem_for(x, attack=None, net=None):
    return Problem(attack or Square(0.1), net or nn.Identity(), x, torch.zeros(len(x), dtype=torch.long), torch.arange(len(x)))


@pytest.mark.parametrize('shape', [(2, 9, 9), (1, 6, 12), (3, 20), (1, 5, 6, 7)])
def test_a_window_is_one_block_anywhere_in_the_sample(shape):
    canvas = _Canvas(problem_for(torch.rand(400, *shape)), (400, *shape))
    window, _ = canvas.window(canvas.draw(0, canvas.numbers)[0], 0.25)
    assert window.shape == (400, 1, *shape[1:]) and (window.flatten(1).sum(1) == np.prod(canvas.sides(0.25))).all()
    assert window.any(0).all(), 'every place is reached'
    for axis in range(len(shape) - 1):
        along = window.any(dim=tuple(d for d in range(1, window.dim()) if d != axis + 2))
        assert ((along[:, 1:] != along[:, :-1]).sum(1) <= 2).all(), 'in one piece'


def test_a_window_of_a_table_is_any_subset():
    table = problem_for(torch.rand(500, 8))
    canvas = _Table(table, (500, 1, 8))
    window, _ = canvas.window(canvas.draw(0, 8)[0], 0.5)
    assert (window.sum((1, 2)) == 4).all() and ((window.float().mean(0)[0] - 0.5).abs() < 0.1).all()
    assert len({tuple(row) for row in window[:, 0].tolist()}) > 50, 'of the 70 that there are'


def test_every_move_has_numbers_of_its_own():
    "Windows of different moves, searches and seeds have nothing in common, also where numbers are drawn in advance."
    canvas = _Canvas(problem_for(torch.rand(200, 2, 9, 9)), (200, 2, 9, 9))
    drawn = [canvas.first(restart, 4)[0] for restart in (0, 1)] + [canvas.draw(move, 2, 2) for move in range(40)]
    rows = torch.stack([torch.cat(d, 1) if isinstance(d, tuple) else d for d in drawn]).flatten(1)  # (draw, numbers)
    apart = torch.corrcoef(rows) - torch.eye(len(rows))
    assert apart.abs().max() < 0.2, 'all look independent'
    again = _Canvas(problem_for(torch.rand(200, 2, 9, 9)), (200, 2, 9, 9))
    assert torch.equal(torch.cat(again.draw(37, 2, 2), 1), torch.cat(drawn[39], 1)), 'in whatever order they are asked for'


def test_windows_stay_where_something_may_change():
    mask = torch.zeros(1, 10, 10)
    mask[:, 2:5, 6:9] = 1
    problem = problem_for(torch.rand(100, 1, 10, 10), Square(0.1, norm=Linf(scale=mask)))
    canvas = _Canvas(problem, (100, 1, 10, 10))
    for share in (0.8, 0.1):
        window, _ = canvas.window(canvas.draw(0, 2)[0], share)
        assert not (window & (mask == 0)).any() and window.flatten(1).any(1).all()
    table = problem_for(torch.rand(100, 5), Square(0.1, norm=Linf(scale=torch.tensor([0.0, 1, 1, 0, 1]))))
    window, _ = _Table(table, (100, 1, 5)).window(torch.rand(100, 5), 0.5)
    assert not window[:, 0, [0, 3]].any() and (window.sum((1, 2)) == 2).all()


def test_it_starts_with_stripes_and_with_tiles(batch):
    x = torch.full((6, 2, 10, 10), 0.5)
    stripes = _Corners(problem_for(x)).start(0) - x
    assert (stripes == stripes[:, :, :1]).all() and stripes.unique().numel() == 2
    assert not (stripes == stripes[..., :1]).all()
    tiles = _Lengths(problem_for(x, Square(0.5, norm=L2()))).start(0) - x
    assert torch.allclose(tiles.flatten(1).norm(dim=1), torch.full((6,), 0.5)) and (tiles != 0).float().mean() > 0.9


# ---------------------------------------------------------------------------------------------- what holds for every search


@pytest.mark.parametrize('attack', SQUARES, ids=repr)
def test_what_holds_for_every_search(attack, net, batch):
    x, y = batch
    x_adv = attack(net, x, y)
    assert x_adv.shape == x.shape and x_adv.dtype == x.dtype and not x_adv.requires_grad
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    assert attack.norm.on(x).size(x_adv - x).max() <= attack.eps * (1 + 1e-5) + 1e-6
    assert torch.equal(attack(net, x, y), x_adv) and not torch.equal(x_adv, x)
    assert torch.equal(attack.at(0.0)(net, x, y), x), 'no strength, no change'
    assert not torch.equal(replace(attack, seed=1)(net, x, y), x_adv)
    assert attack(net, x[:0], y[:0]).shape == (0, 3, 8, 8)
    assert attack.run(net, x[:0], y[:0]).passes == {'forward': 0, 'backward': 0}
    result = attack.run(net, x, y)
    with torch.no_grad():
        seen = net.eval()(result.x_adv).argmax(1)
    assert torch.equal(result.x_adv, x_adv) and (attack.target is not None or torch.equal(result.success, seen != y))


@pytest.mark.parametrize('attack', SQUARES, ids=repr)
def test_neither_batch_size_nor_order_matters(attack, net, batch):
    x, y = batch
    ids = torch.arange(100, 110)
    whole, order = attack(net, x, y, ids=ids), torch.tensor([7, 3, 0, 5, 1, 2, 9, 4, 6, 8])
    assert torch.equal(whole, torch.cat([attack(net, x[i : i + 1], y[i : i + 1], ids=ids[i : i + 1]) for i in range(10)]))
    assert torch.equal(whole[order], attack(net, x[order], y[order], ids=ids[order]))


@pytest.mark.parametrize('norm', [Linf(), L2()])
def test_the_best_loss_never_falls(norm, net, batch):
    x, y = batch
    told = []
    attack = Square(0.3, queries=60, norm=norm)
    problem = Problem(attack, net.eval(), x, y, torch.arange(10))
    problem.listen = lambda point, logits: told.append((point.clone(), LOSSES['margin'](logits, y)))
    x_adv, loss, wrong = attack.explore(problem)
    assert len(told) == 60
    best = torch.stack([values for _, values in told]).cummax(0).values
    assert all((after >= before).all() for before, after in pairwise(best)) and torch.equal(best[-1], loss)
    assert torch.equal(loss > 0, wrong)
    kept = torch.stack([(point == x_adv).flatten(1).all(1) for point, _ in told])
    assert kept.any(0).all(), 'the outcome is one of the points that were asked about'
    if isinstance(norm, Linf):
        assert all((a != b).flatten(1).any(1).all() for (a, _), (b, _) in pairwise(told[:2]))


def test_queries_are_counted(net, batch):
    for attack, forwards in ((Square(0.01, queries=20), 21), (Square(0.01, queries=5, restarts=3, norm=L2()), 16)):
        counter = Counter(net)
        result = attack.run(counter, *batch)
        assert result.passes == {'forward': forwards, 'backward': 0} and counter.forwards == forwards
        assert counter.backwards == 0
    easy = replace(SQUARES[0], eps=0.5, queries=100, keep_going=False).run(net, *batch)
    full = replace(SQUARES[0], eps=0.5, queries=100).run(net, *batch)
    assert torch.equal(easy.success, full.success) and easy.passes['forward'] < full.passes['forward'] == 101


def test_what_is_misclassified_anyway_counts(net, batch):
    x, _ = batch
    wrong = (net.eval()(x).argmax(1) + 1) % 4
    result = Square(0.001, queries=5, keep_going=False).run(net, x, wrong)
    assert result.success.all() and torch.equal(result.x_adv, x) and result.passes['forward'] == 1


@pytest.mark.parametrize('norm', [Linf(), L2()])
@pytest.mark.parametrize('shape', [(7,), (2, 12), (1, 2), (2, 3, 4), (1, 4, 4, 4)])
def test_any_shape(shape, norm):
    with seeded(1):
        x = torch.randn(6, *shape)
        net = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 3))
    attack = Square(0.5, queries=15, norm=norm, bounds=None)
    result = attack.run(net, x, torch.arange(6) % 3)
    assert result.x_adv.shape == x.shape and result.size.max() <= 0.5 + 1e-5 and result.x_adv.isfinite().all()


def test_bounds_and_scales_for_each_feature(some, standard):
    x, y = some
    scale = torch.zeros(8, 8)
    scale[2:6] = torch.linspace(0.2, 1, 8)
    bounds = (torch.full((8, 8), -0.1), torch.linspace(1, 1.3, 8))
    for eps, norm in ((0.4, Linf(scale)), (2.0, L2(scale))):
        attack = Square(eps, queries=30, norm=norm, bounds=bounds)
        x_adv = attack(standard, x, y)
        assert (x_adv >= bounds[0]).all() and (x_adv <= bounds[1]).all() and (x_adv > 1).any()
        assert ((x_adv - x)[:, :, scale == 0] == 0).all()
        assert attack.norm.on(x).size(x_adv - x).max() <= attack.eps * (1 + 1e-5)
    given = Square(1.0, queries=10, norm=Linf(scale=torch.rand(64))).at(torch.tensor(0.1))
    assert given(nn.Sequential(nn.Linear(64, 2)), torch.rand(4, 64), torch.tensor([0, 1, 0, 1])).shape == (4, 64)


def test_other_precisions(net, batch):
    x, y = batch
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        for norm in (Linf(), L2()):
            x_adv = Square(0.1, queries=4, norm=norm)(copy.deepcopy(net).to(dtype), x.to(dtype), y)
            assert x_adv.dtype == dtype and norm.size(x_adv.double() - x.to(dtype).double()).max() <= 0.1 + 4e-3


# -------------------------------------------------------------------------------------------------------------- how strong


def test_more_queries_find_more(some, standard):
    found = [int(Square(0.12, queries=n, keep_going=False).run(standard, *some).success.sum()) for n in (3, 25, 200)]
    assert found[0] < found[1] < found[2]
    restarts = [Square(0.12, queries=30, restarts=n).run(standard, *some).success for n in (1, 3)]
    assert (restarts[1] >= restarts[0]).all() and restarts[1].sum() > restarts[0].sum()


def test_about_as_strong_as_pgd_and_not_much_stronger(some, standard, robust):
    x, y = some
    for model, eps in ((standard, 0.15), (robust, 0.2)):
        square = int(Square(eps, queries=300, keep_going=False).run(model, x, y).success.sum())
        pgd = int(PGD(eps, steps=20, restarts=2).run(model, x, y).success.sum())
        assert abs(square - pgd) <= 6, (square, pgd)


def test_l2_finds_a_good_part_of_what_pgd_finds(some, standard):
    square = int(Square(0.8, queries=250, norm=L2(), keep_going=False).run(standard, *some).success.sum())
    pgd = int(PGD(0.8, norm=L2()).run(standard, *some).success.sum())
    assert 0.4 * pgd < square <= pgd + 1


class Steps(nn.Module):
    "A network whose input is rounded, so that its gradient is zero."

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net((4 * x).round() / 4)


class Decided(Steps):
    "A network that says a class and nothing else; its output has no gradient at all."

    def forward(self, x):
        return F.one_hot(self.net(x).argmax(1), 10).float()


def test_a_gradient_is_not_needed(some, standard):
    x, y = some
    found = {a.name: int(a.run(Steps(standard), x, y).success.sum()) for a in
             (PGD(0.2, steps=10), Square(0.2, queries=120, keep_going=False), Transfer(standard, PGD(0.2, steps=10), 'it'))}
    pgd, square, transfer = found.values()
    assert pgd < 10 and square > 50 and transfer > 40, found
    with pytest.raises(ValueError, match='not differentiable'):
        PGD(0.2)(Decided(standard), x, y)
    blind, clean = Square(0.2, queries=120, keep_going=False).run(Decided(standard), x, y), (standard(x).argmax(1) != y).sum()
    assert blind.success.sum() > clean + 8


def test_plateaus_are_crossed(some, standard):
    "With answers in steps, a search that keeps what is as good finds more than one that wants better."
    x, y = some
    found = []
    for rule in (torch.ge, torch.gt):
        attack, model = Square(0.15, queries=100), Decided(standard)
        problem = Problem(attack, model, x, y, torch.arange(len(x)))
        moves = _Corners(problem)
        point = moves.start(0)
        loss, wrong = problem.judge(point)
        for query in range(1, 100):
            new = moves.move(point, _share(0.8, query, 100), query)
            value, now_wrong = problem.judge(new)
            take = torch.where(wrong == now_wrong, rule(value, loss), now_wrong)
            point, loss = torch.where(take[:, None, None, None], new, point), torch.where(take, value, loss)
            wrong = wrong | now_wrong
        found.append(int(wrong.sum()))
    assert found[0] > found[1]
    assert found[0] == int(Square(0.15, queries=100).explore(problem)[2].sum()), 'and it is our rule'


def test_moons_with_one_logit():
    points = moons(n_train=200, n_test=100)
    with seeded(0):
        net = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 1))
    net = fit(net, points.train, epochs=25, optimizer=lambda p: torch.optim.Adam(p, lr=0.03), show_progress=False).model
    x, y = points.test.x, points.test.y
    for norm, least in ((Linf(), -2), (L2(), -6)):
        square = Square(0.4, queries=100, norm=norm, bounds=None).run(net, x, y)
        pgd = PGD(0.4, norm=norm, bounds=None).run(net, x, y)
        assert least <= int(square.success.sum()) - int(pgd.success.sum()) <= 2
        assert square.size.max() <= 0.4 + 1e-5 and square.x_adv.min() < 0


def test_targets(net, batch):
    x, y = batch
    result = Square(0.3, queries=100, target=2).run(net, x, y)
    with torch.no_grad():
        seen = net.eval()(result.x_adv).argmax(1)
    assert torch.equal(result.success, (seen == 2) & (y != 2)) and result.success.any()
    assert torch.equal(result.x_adv[y == 2], x[y == 2])


def test_settings_of_square():
    for wrong in ({'queries': 0}, {'restarts': 0}, {'p': 0}, {'p': 1.1}, {'eps': -1}):
        with pytest.raises(ValueError, match='at least|at most'):
            Square(**wrong)
    with pytest.raises(TypeError, match=r'Linf\(\)'):
        Square(norm='l2')
    assert Square(queries=50, restarts=2).name.startswith('Square-50x2') and 'L2' in Square(norm=L2()).name
    assert settings_of(Square())['loss'] == 'margin'


# --------------------------------------------------------------------------------------------------------------- transfer


ATTACKS = [PGD(0.1, steps=3, seed=4), PGD(1.0, steps=3, norm=L2(), loss='dlr'), PGD(0.2, steps=3, target='runner-up'),
           PGD(0.2, steps=3, target=1, keep_going=False), Square(0.1, queries=5), WorstOf([FGSM(0.1), PGD(0.1, steps=2)])]


@pytest.fixture(scope='module')
def other():
    with seeded(7):
        return nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.Dropout(), nn.ReLU(), nn.Linear(16, 4))


@pytest.mark.parametrize('attack', ATTACKS, ids=lambda a: a.name)
def test_transfer_is_the_attack_on_the_surrogate(attack, net, other, batch):
    x, y = batch
    ids = torch.arange(30, 40)
    transfer, by_hand = Transfer(other, attack), attack(other, x, y, ids=ids)
    result = transfer.run(net, x, y, ids)
    assert torch.equal(transfer(net, x, y, ids), by_hand) and torch.equal(result.x_adv, by_hand)
    assert result.passes == {'forward': 1, 'backward': 0}
    with torch.no_grad():
        seen, theirs = net.eval()(by_hand).argmax(1), other.eval()(x)
    aims = {'runner-up': theirs.scatter(1, y[:, None], -torch.inf).argmax(1), 1: torch.ones_like(y)}
    aim = aims.get(getattr(attack, 'target', None))
    assert torch.equal(result.success, seen != y if aim is None else (seen == aim) & (aim != y))
    norm = getattr(attack, 'norm', Linf())
    assert torch.allclose(result.size, norm.size(by_hand - x))
    single = torch.cat([transfer(net, x[i : i + 1], y[i : i + 1], ids[i : i + 1]) for i in range(10)])
    assert torch.allclose(single, by_hand, atol=1e-5)  # matrix products round differently for other batch sizes


def test_transfer_to_itself_is_the_attack(net, batch):
    attack = PGD(0.1, steps=4)
    here, there = attack.run(net, *batch), Transfer(net, attack).run(net, *batch)
    assert torch.equal(here.x_adv, there.x_adv) and torch.equal(here.success, there.success)
    assert torch.allclose(here.loss, there.loss) and torch.equal(here.size, there.size)


@pytest.mark.parametrize('state', ['train', 'eval', 'frozen batch norm'])
def test_both_models_come_back_untouched(state):
    x, y = torch.linspace(0, 1, 6 * 64).view(6, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])

    def careless(model, x, y):
        model.train()
        model(x).sum().backward()
        return x.add_(0.01).clamp_(0, 1)

    for attack in (PGD(0.1, steps=2), PGD(0.1, steps=2, target='least likely'), careless):
        model, surrogate, noise = make_net(state), make_net('train'), rng_state()
        before = snapshot(model), snapshot(surrogate)
        transfer = Transfer(surrogate, attack)
        transfer(model, x, y), transfer.run(model, x, y), transfer.settings
        assert_untouched(before[0], model)
        assert_untouched(before[1], surrogate)
        assert attack is careless or same(noise, rng_state()), 'its dropout draws, ours does not'
        assert torch.equal(x, torch.linspace(0, 1, 6 * 64).view(6, 1, 8, 8))
        object.__setattr__(surrogate[4], 'fuse', 0)
        with pytest.raises(RuntimeError, match='boom'):
            transfer.run(model, x, y)
        object.__setattr__(surrogate[4], 'fuse', None)
        assert_untouched(before[1], surrogate)


def test_square_leaves_a_model_untouched():
    x, y = torch.linspace(0, 1, 6 * 64).view(6, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    for norm in (Linf(), L2()):
        for fuse in (None, 2):
            model, noise = make_net('frozen batch norm'), rng_state()
            before = snapshot(model)
            object.__setattr__(model[4], 'fuse', fuse)
            if fuse:
                with pytest.raises(RuntimeError, match='boom'):
                    Square(queries=6, norm=norm).run(model, x, y)
                object.__setattr__(model[4], 'fuse', None)
            else:
                Square(queries=6, norm=norm).run(model, x, y)
            assert_untouched(before, model)
            assert same(noise, rng_state())


def test_seed_bounds_and_strength_of_a_transfer(net, other, batch):
    x, y = batch
    inside = Transfer(other, PGD(0.1, seed=5, bounds=(-1, 1)))
    assert (inside.seed, inside.bounds, inside.strength) == (5, (-1, 1), 0.1)
    outside = Transfer(other, PGD(0.1, seed=5), seed=0, bounds=(-1, 1))
    assert (outside.seed, outside.attack.seed, outside.attack.bounds) == (0, 0, (-1, 1))
    again = replace(inside, seed=9)
    assert again.attack.seed == 9 and not torch.equal(again(net, x, y), inside(net, x, y))
    assert inside.at(0.3).attack == replace(inside.attack, eps=0.3) and inside.scaled(2).strength == 0.2
    assert torch.equal(inside.at(0.0)(net, x, y), x)
    assert inside(net, x[:0], y[:0]).shape == (0, 3, 8, 8) and len(inside.run(net, x[:0], y[:0]).success) == 0
    assert inside.name == 'PGD-40 from Sequential' and replace(inside, label='digits_cnn').name == 'PGD-40 from digits_cnn'
    assert (WorstOf([PGD(0.1, steps=2), inside.at(0.1)]).run(net, x, y).passes['forward']) > 0


def test_settings_name_the_surrogate_by_its_fingerprint(other):
    settings = Transfer(other, PGD(0.1)).settings
    assert settings['kind'] == 'Transfer' and settings['attack']['kind'] == 'PGD'
    assert settings['surrogate']['module'] == 'Sequential' and settings_of(WorstOf([Transfer(other)])) == settings_of(
        WorstOf([Transfer(copy.deepcopy(other))]))
    changed = copy.deepcopy(other)
    assert Transfer(changed, PGD(0.1)).settings == settings
    with torch.no_grad():
        changed[1].weight[0, 0] += 1e-3
    assert Transfer(changed, PGD(0.1)).settings != settings and len(str(settings)) < 1000


def test_functions_and_noises_transfer_too(net, other, batch):
    x, y = batch

    def brighter(model, x, y):
        return (x + 0.1).clamp(0, 1)

    transfer = Transfer(other, brighter)
    assert transfer.name == 'brighter from Sequential' and transfer.strength != transfer.strength
    assert torch.allclose(transfer.run(net, x, y).x_adv, (x + 0.1).clamp(0, 1))
    assert torch.equal(Transfer(other, Gaussian(0.1))(None, x, y), Gaussian(0.1)(None, x))
    with pytest.raises(ValueError, match='plain function'):
        transfer.at(0.2)
    for wrong in (lambda: Transfer(PGD(), other), lambda: Transfer(other, PGD), lambda: Transfer('net', PGD())):
        with pytest.raises(TypeError, match='a model and an attack'):
            wrong()
    with pytest.raises(ValueError, match='expected \\(10,\\)'):
        Transfer(other, PGD(0.1))(net, x, y[:3])


def test_models_of_another_precision(net, other, batch):
    x, y = batch
    transfer = Transfer(copy.deepcopy(other).double(), PGD(0.1, steps=3))
    result = transfer.run(net, x, y)
    assert result.x_adv.dtype == torch.float32 and result.size.max() <= 0.1 + 1e-6
    half = Transfer(other, PGD(0.1, steps=3)).run(net, x.half(), y)
    assert half.x_adv.dtype == torch.float16 and half.size.max() <= 0.1 + 4e-3
