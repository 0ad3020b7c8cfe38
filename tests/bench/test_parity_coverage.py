"""dnn-tip 0.1.1 and robustnb find the same things covered, and the same inputs surprising.

Run by `make parity`, in .venv-bench. Both see the activations that robustnb takes from a network, most of the time in double
precision. Where dnn-tip stops or says something else, a test shows it, and what robustnb says there.
"""

import copy
from functools import cache
from importlib.metadata import version

import numpy as np
import pytest
import torch
from dnn_tip import apfd as peer_apfd
from dnn_tip import neuron_coverage as peer
from dnn_tip import prioritizers as peer_orders
from dnn_tip.surprise import DSA, LSA, MDSA, MultiModalSA, SurpriseCoverageMapper
from peers_coverage import arrays, covered, facts_of, kmnc, look, nbc, nc, ranges_of, snac, tknc
from torch import nn

from robustnb.coverage import KMNC, NBC, TKNC, Activations, as_activations
from robustnb.data import digits
from robustnb.devices import seeded
from robustnb.models import build
from robustnb.suites import apfd, coverage_additional, coverage_total
from robustnb.surprise import DSC, DistanceSurprise, LikelihoodSurprise, MahalanobisSurprise
from robustnb.training import trained

pytestmark = [
    pytest.mark.filterwarnings('ignore:The version of scipy you are using:UserWarning'),
    pytest.mark.filterwarnings('ignore:Expected peak memory use for DSA:UserWarning'),
]


@pytest.fixture(scope='module', autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# -------------------------------------------------------------------------------------------------- networks and data


def colours() -> nn.Sequential:
    "With batch normalisation, of which the values before it are looked at."
    with seeded(3):
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3), nn.ELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
        ).eval()  # fmt: skip


def noise(n: int, *shape: int) -> torch.Tensor:
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(n))


NETWORKS = {
    'digits': lambda: (trained('digits_cnn', 'digits'), digits().train.x[:600], digits().test.x[:297]),
    'LeNet-5, noise': lambda: (build('lenet5', 7), noise(300, 1, 28, 28), noise(150, 1, 28, 28)),
    'colours, noise': lambda: (colours(), noise(300, 3, 16, 16), noise(150, 3, 16, 16)),
}


@cache
def activations(name: str):
    "What a network says to its training and its test images, in double precision."
    model, train, test = NETWORKS[name]()
    return look(model.eval(), train).double(), look(model, test).double()


@pytest.fixture(params=NETWORKS)
def data(request):
    return activations(request.param)


@pytest.fixture
def traces():
    "The last layer but one of the trained network: (rows, classes) of the training and of the test images, as arrays."
    return [([*seen.layers.values()][-2].numpy().copy(), seen.classes.numpy().copy()) for seen in activations('digits')]


def test_it_is_the_version_that_is_meant():
    assert version('dnn-tip') == '0.1.1'


def test_the_activations_are_those_of_plain_hooks():
    "So nothing that both agree on comes from a mistake in taking them."
    model, _, x = NETWORKS['digits']()
    modules = {
        name: m for name, m in copy.deepcopy(model).eval().named_modules() if isinstance(m, nn.Conv2d | nn.Linear)
    }
    said = {}
    model = copy.deepcopy(model).eval()
    for name in modules:
        model.get_submodule(name).register_forward_hook(
            lambda m, args, out, name=name: said.update({name: out.detach()})
        )
    predicted = model(x).argmax(1)
    seen = activations('digits')[1]
    assert list(seen.layers) == list(said) and torch.equal(seen.classes, predicted)
    for name, rows in seen.layers.items():
        expected = said[name].mean((2, 3)) if said[name].dim() == 4 else said[name]
        np.testing.assert_allclose(rows, expected, rtol=0, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------- criteria


def both(pair, train, suite, batch_size=64) -> tuple[np.ndarray, np.ndarray, float]:
    "What each of the two says is covered, as flags in the same order, and our value."
    known, batches = train.batches(50), suite.batches(batch_size)
    ours = pair.ours(ranges_of(known))
    for batch in batches:
        ours.update(batch)
    theirs = covered(pair.theirs(facts_of(arrays(known))), arrays(batches))
    return ours.state['hit'].numpy(), theirs.ravel(), ours.compute()


@pytest.mark.parametrize('pair', [
    pytest.param(nc(-0.1), id='NC -0.1'), pytest.param(nc(0.0), id='NC 0'), pytest.param(nc(0.5), id='NC 0.5'),
    pytest.param(kmnc(1), id='KMNC 1'), pytest.param(kmnc(10), id='KMNC 10'), pytest.param(kmnc(1000), id='KMNC 1000'),
    pytest.param(nbc(0.0), id='NBC 0'), pytest.param(nbc(0.5), id='NBC 0.5'),
    pytest.param(snac(0.0), id='SNAC 0'), pytest.param(snac(0.5), id='SNAC 0.5'),
    pytest.param(tknc(1), id='TKNC 1'), pytest.param(tknc(3), id='TKNC 3'), pytest.param(tknc(1000), id='TKNC 1000'),
])  # fmt: skip
def test_the_same_is_covered(pair, data):
    "Item by item, not only as many of them."
    ours, theirs, value = both(pair, *data)
    np.testing.assert_array_equal(ours, theirs)
    assert value == theirs.mean()


@pytest.mark.parametrize('batch_size', [1, 7, 1000])
@pytest.mark.parametrize('pair', [nc(), kmnc(), nbc(), snac(), tknc(3)], ids=['NC', 'KMNC', 'NBC', 'SNAC', 'TKNC'])
def test_however_the_suite_is_cut(pair, batch_size):
    ours, theirs, _ = both(pair, *activations('digits'), batch_size)
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize('pair', [nbc(), nbc(0.5), snac(), snac(0.5)], ids=['NBC', 'NBC 0.5', 'SNAC', 'SNAC 0.5'])
def test_at_the_ends_of_the_ranges_too(pair, data):
    "The training images themselves reach every end: with strict=False that is enough, as in dnn-tip."
    train, _ = data
    ours, theirs, _ = both(pair, train, train)
    np.testing.assert_array_equal(ours, theirs)


def test_nbc_of_the_training_images_is_all_or_nothing(data):
    "Strictly beyond the ends nothing lies; dnn-tip, which has no strict form, says that every end is covered."
    train, _ = data
    _, theirs, _ = both(nbc(), train, train)
    strict = NBC(train=ranges_of(train.batches()))
    for batch in train.batches():
        strict.update(batch)
    assert strict.compute() == 0 and theirs.all()


def steps(n: int, units: int, seed: int) -> torch.Tensor:
    "Values from 0 to 1 in steps of 1/64, both ends included: sections of such ranges begin at numbers that are exact."
    rows = torch.randint(0, 65, (n, units), generator=torch.Generator().manual_seed(seed)).double() / 64
    rows[0], rows[1] = 0.0, 1.0
    return rows


@pytest.mark.parametrize('k', [4, 16, 64])
def test_kmnc_with_a_right_open_range_is_theirs_at_the_edges(k):
    "dnn-tip lets every section have its lower edge, and no section have the largest training value."
    train, suite = {'layer': steps(200, 30, 1)}, {'layer': steps(12, 30, 2)}
    theirs = covered(kmnc(k).theirs(facts_of(arrays([train]))), arrays([suite])).ravel()
    found = {}
    for ends in ('right-open', 'closed'):
        ours = KMNC(k, ends, train=ranges_of([train]))
        ours.update(suite)
        found[ends] = ours.state['hit'].numpy()
    np.testing.assert_array_equal(found['right-open'], theirs)
    assert (found['closed'] >= theirs).all() and found['closed'].sum() > theirs.sum()  # the largest value counts here


def test_kmnc_of_theirs_ends_where_rounding_leaves_it():
    "Its last edge is low + k * width / k, here a little above the largest training value, which is then inside."
    low, high, k = 0.3, 0.9, 10
    method = peer.KMNC([np.array([low])], [np.array([high])], sections=k)
    assert method.thresh[-1] > high and method([np.array([[high]])])[1].any()
    ours = KMNC(k, 'right-open', train=ranges_of([{'layer': torch.tensor([[low], [high]], dtype=torch.float64)}]))
    ours.update({'layer': torch.tensor([[high]], dtype=torch.float64)})
    assert ours.compute() == 0


def test_kmnc_in_single_precision_parts_by_a_few_sections():
    "A value that lies on an edge up to the last digit falls on either side of it."
    model, *images = NETWORKS['digits']()
    ours, theirs, _ = both(kmnc(), *(look(model, x) for x in images))
    assert (ours != theirs).mean() <= 1e-4


def test_a_constant_unit_is_never_covered_and_counts_in_both():
    train, suite = {'layer': torch.zeros(20, 2).double()}, {'layer': torch.zeros(5, 2).double()}
    train['layer'][:, 1] = torch.arange(20)
    suite['layer'][:, 1] = torch.arange(5) + 0.5
    theirs = covered(kmnc(4).theirs(facts_of(arrays([train]))), arrays([suite]))
    ours = KMNC(4, train=ranges_of([train]))
    ours.update(suite)
    np.testing.assert_array_equal(ours.covered()['layer'], theirs)
    assert not theirs[0].any() and ours.counts()[1] == theirs.size == 8


def test_tknc_among_equals():
    "We take the earlier units; dnn-tip those that its sorting puts last."
    rows = torch.ones(1, 4).double()
    ours = TKNC(2)
    ours.update({'layer': rows})
    assert ours.state['hit'].tolist() == [True, True, False, False]
    assert peer.TKNC(2)([rows.numpy()])[1].sum() == 2


# ----------------------------------------------------------------------------------------------------------- surprise


def tensors(pair) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(pair[0]), torch.from_numpy(pair[1])


def ours_of(adequacy, train, suite) -> np.ndarray:
    return adequacy.fit(tensors(train))(*tensors(suite)).numpy()


def few(pair, n: int = 100):
    "dnn-tip compares slowly."
    return pair[0][:n], pair[1][:n]


def one_class(pair):
    return pair[0], np.zeros_like(pair[1])


@pytest.mark.parametrize('dtype', [np.float32, np.float64])
def test_dsa_is_the_same(traces, dtype):
    train, suite = ((rows.astype(dtype), classes) for rows, classes in traces)
    suite = few(suite)
    theirs = DSA(*train, badge_size=50)(*suite)
    np.testing.assert_allclose(ours_of(DistanceSurprise(), train, suite), theirs, rtol=1e-4)


@pytest.mark.parametrize('name', ['LeNet-5, noise', 'colours, noise'])
def test_dsa_is_the_same_for_any_classes_and_all_layers(name):
    "Classes are drawn at random, so that each has many."
    train, suite = ((s.all(), np.random.default_rng(len(s)).integers(0, 4, len(s))) for s in activations(name))
    suite = few(suite, 60)
    np.testing.assert_allclose(ours_of(DistanceSurprise(), train, suite), DSA(*train, badge_size=50)(*suite), rtol=1e-6)


def test_dsa_of_a_training_trace_is_0_in_both(traces):
    train, _ = traces
    suite = few(train, 20)
    assert (ours_of(DistanceSurprise(), train, suite) == 0).all() and (DSA(*train, badge_size=50)(*suite) == 0).all()


def test_dsa_of_a_class_that_training_never_showed_is_whatever_lay_in_memory(traces):
    "dnn-tip leaves out classes above the largest one of the training data, so their places are never written. Ours are nan."
    train, (rows, classes) = traces
    unseen = np.full(3, 11)
    assert np.isnan(ours_of(DistanceSurprise(), train, (rows[:3], unseen))).all()
    assert DSA(*train)(rows[:3], unseen).shape == (3,)  # no error, and no meaning


def test_dsa_of_a_class_in_a_gap_stops_theirs(traces):
    (rows, classes), (test, _) = traces
    kept = classes != 4
    train, suite = (rows[kept], classes[kept]), (test[:3], np.full(3, 4))
    assert np.isnan(ours_of(DistanceSurprise(), train, suite)).all()
    with pytest.raises(ValueError):
        DSA(*train)(*suite)


def test_mdsa_is_the_same_for_all_classes_as_one(traces):
    "The square of the distance, the covariance as it is."
    train, suite = map(one_class, traces)
    theirs = MDSA(train[0])(suite[0])
    plain = MahalanobisSurprise(shrinkage=0, squared=True)
    np.testing.assert_allclose(ours_of(plain, train, suite), theirs, rtol=1e-6)
    root = MahalanobisSurprise(shrinkage=0)
    np.testing.assert_allclose(ours_of(root, train, suite), np.sqrt(theirs), rtol=1e-6)


def test_mdsa_is_the_same_class_by_class(traces):
    "Of the first ten units, since a class has too few samples for all of them."
    train, suite = ((rows[:, :10], classes) for rows, classes in traces)
    theirs = MultiModalSA.build_by_class(*train, lambda rows, _: MDSA(rows))(*suite)
    plain = MahalanobisSurprise(shrinkage=0, squared=True)
    np.testing.assert_allclose(ours_of(plain, train, suite), theirs, rtol=1e-6)


def test_mdsa_of_units_that_repeat_each_other(traces):
    "A singular covariance: both take the pseudo-inverse, so the repeated units count as one."
    train, suite = map(one_class, traces)
    train, suite = ((np.c_[rows[:, :8], rows[:, :3]], classes) for rows, classes in (train, suite))
    plain = MahalanobisSurprise(shrinkage=0, squared=True)
    np.testing.assert_allclose(ours_of(plain, train, suite), MDSA(train[0])(suite[0]), rtol=1e-6)


def densities(max_units) -> LikelihoodSurprise:
    return LikelihoodSurprise(min_variance=0, max_units=max_units)


@pytest.mark.parametrize('units', [5, 20])
def test_lsa_is_the_same_for_all_classes_as_one(traces, units):
    "Of the units that vary most; densities by scipy there."
    train, suite = map(one_class, traces)
    theirs = LSA(train[0], max_features=units)(suite[0])
    assert np.isfinite(theirs).all()
    np.testing.assert_allclose(ours_of(densities(units), train, suite), theirs, rtol=1e-6)


def test_lsa_is_the_same_class_by_class(traces):
    train, suite = ((rows[:, :10], classes) for rows, classes in traces)
    theirs = MultiModalSA.build_by_class(*train, lambda rows, _: LSA(rows))(*suite)
    ours = ours_of(densities(300), train, suite)
    known = np.isfinite(theirs)
    assert known.mean() > 0.9
    np.testing.assert_allclose(ours[known], theirs[known], rtol=1e-6)


def test_lsa_far_away_is_a_number_here_and_infinite_there(traces):
    "Theirs takes the logarithm of a density, which is 0 in floating point; ours never leaves the logarithm."
    train, (rows, classes) = map(one_class, traces)
    far = rows[:3] + 1000
    with np.errstate(divide='ignore'):
        assert np.isinf(LSA(train[0], max_features=5)(far)).all()
    found = ours_of(densities(5), train, (far, classes[:3]))
    assert np.isfinite(found).all() and (found > 1e3).all()


def test_lsa_of_fewer_samples_than_units_stops_theirs(traces):
    "Ours shrinks the covariance and says so."
    rows, classes = one_class(traces[0])
    assert np.isfinite(ours_of(densities(20), (rows[:15], classes[:15]), (rows[15:30], classes[15:30]))).all()
    with pytest.raises((ValueError, np.linalg.LinAlgError)):
        LSA(rows[:15], max_features=20)


@pytest.mark.parametrize('more', [dict(max_features=0.5), dict(max_features=None)], ids=['a share', 'all units'])
def test_lsa_of_theirs_knows_units_only_by_number(traces, more):
    "A share of the units, which it announces, is no index; and without any choice of units it looks for one that is not there."
    with pytest.raises((TypeError, AttributeError)):
        LSA(traces[0][0], **more)


# ---------------------------------------------------------------------------------------------------- surprise coverage


@pytest.mark.parametrize('n, upper', [(4, 2.0), (1000, 2.0), (7, 0.5)])
@pytest.mark.parametrize('overflow', [False, True])
def test_surprise_coverage_is_the_same(traces, n, upper, overflow):
    train, suite = traces
    scores = ours_of(DistanceSurprise(), train, suite)
    mapper = SurpriseCoverageMapper(n, upper, overflow_bucket=overflow)
    theirs = mapper.get_coverage_profile(scores).any(0)
    ours = DSC(n, upper, layer=None, convention='overflow' if overflow else 'bounded')
    ours.train = ours.learns()
    for criterion, (rows, classes) in ((ours.train, train), (ours, suite)):
        criterion.update(as_batch(rows, classes))
    assert ours.state['sections'].tolist() == np.flatnonzero(theirs).tolist()
    assert ours.compute() == theirs.mean()


def as_batch(rows, classes):
    return Activations({'layer': torch.from_numpy(rows)}, prediction=torch.from_numpy(classes))


# ------------------------------------------------------------------------------------------------------- prioritisation


def kmnc_profiles():
    "What each test image covers: as numbers for us, and as profiles and scores from dnn-tip."
    train, suite = activations('digits')
    whole, everything = train.batches(len(train)), suite.batches(len(suite))
    pair = kmnc(20)
    items = pair.ours(ranges_of(whole)).items(as_activations(everything[0]))
    scores, profiles = pair.theirs(facts_of(arrays(whole)))(arrays(everything)[0])
    return items, scores, profiles


def test_ctm_is_the_same_up_to_the_order_of_equals():
    items, scores, _ = kmnc_profiles()
    np.testing.assert_array_equal(coverage_total(items), scores)
    order = np.array(list(peer_orders.ctm(scores)))
    np.testing.assert_array_equal(scores[order], np.sort(coverage_total(items))[::-1])


def test_cam_is_the_same_as_long_as_something_is_gained():
    "After that come those that add nothing, by their scores; equals in any order."
    items, scores, profiles = kmnc_profiles()
    order, added = coverage_additional(items)
    theirs = np.array(list(peer_orders.cam(scores, profiles.copy())))
    gaining = int((added > 0).sum())
    assert 0 < gaining < len(order)
    np.testing.assert_array_equal(order[:gaining], theirs[:gaining])
    np.testing.assert_array_equal(scores[order], scores[theirs])


def test_cam_of_theirs_empties_the_profiles_that_it_is_given():
    "A second call with the same arrays finds nothing to cover. Ours leaves what it is given alone."
    items, scores, profiles = kmnc_profiles()
    before = items.clone()
    coverage_additional(items)
    assert torch.equal(items, before)
    list(peer_orders.cam(scores, profiles))
    assert not profiles.any()


@pytest.mark.parametrize('share', [0.02, 0.3, 1.0])
def test_apfd_is_the_same(share):
    rng = np.random.default_rng(1)
    faults, order = rng.random(200) < share, rng.permutation(200)
    assert apfd(order, faults) == pytest.approx(peer_apfd.apfd_from_order(faults, order), abs=1e-12)
