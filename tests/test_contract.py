"""The promise: whatever robustnb does with a model, the model comes back exactly as it was given.

Every public callable with a parameter named `model` is found by itself. One without a case here fails, so nobody can
forget to say how a new function is held to the promise.
"""

import contextlib
import copy
import importlib
import inspect
import pkgutil
import random
import tempfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import robustnb
from robustnb import (
    adapters,
    amplification,
    anpvs,
    attacks,
    attribution,
    bayesian,
    blackbox,
    combinations,
    coverage,
    cuts,
    distributed,
    dropout,
    evaluation,
    explorer,
    filters,
    fuzzing,
    guard,
    idc,
    inside,
    layerwise,
    links,
    lrp,
    lsa,
    magnitudes,
    masking,
    models,
    noises,
    paths,
    plans,
    probes,
    pruning,
    report,
    selective,
    slimming,
    studies,
    suites,
    suppression,
    surprise,
    synaptic,
    thresholds,
    training,
    uncovered,
    voting,
)
from robustnb.data import Batch


class Bomb(nn.Module):
    "Does nothing, or raises at a chosen call."

    fuse = None

    def forward(self, x):
        if self.fuse is not None:
            if self.fuse == 0:
                raise RuntimeError('boom')
            object.__setattr__(self, 'fuse', self.fuse - 1)
        return x


def make_net(state: str) -> nn.Sequential:
    "Convolution, batch norm, in-place ReLU and dropout, with a gradient, a frozen weight and a hook of its owner."
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            Bomb(),
            nn.Conv2d(4, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            nn.Flatten(),
            nn.Linear(144, 3),
        )
        net(torch.rand(16, 1, 8, 8))  # statistics that are not the initial ones
    net.train(state != 'eval')
    if state == 'frozen batch norm':
        net[1].eval()
    net[0].weight.grad = torch.full_like(net[0].weight, 0.25)
    net[5].bias.requires_grad_(False)
    net[7].register_forward_hook(owners_hook)
    return net


def owners_hook(module, args, output):
    pass


def snapshot(net: nn.Module) -> dict:
    return {
        'modes': [m.training for m in net.modules()],
        'modules': [id(m) for m in net.modules()],
        'values': {k: v.clone() for k, v in net.state_dict().items()},
        'parameters': [id(p) for p in net.parameters()],
        'flags': [p.requires_grad for p in net.parameters()],
        'grads': [None if p.grad is None else (id(p.grad), p.grad.clone()) for p in net.parameters()],
        'hooks': [[(k, list(v.items())) for k, v in vars(m).items() if 'hooks' in k] for m in net.modules()],
        'forward': [vars(m).get('forward') for m in net.modules()],
    }


def rng_state() -> list:
    return [torch.get_rng_state().tolist(), random.getstate(), [str(part) for part in np.random.get_state()]]


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_untouched(before: dict, net: nn.Module):
    for what, now in snapshot(net).items():
        assert same(before[what], now), f'{what} changed'


X = torch.linspace(0, 1, 6 * 64).view(6, 1, 8, 8)
Y = torch.tensor([0, 1, 2, 0, 1, 2])
DATA = (X, Y)


EVERY = ['NC', 'KMNC', 'NBC', 'SNAC', 'TKNC', 'TKNP', 'CC', 'NLC', 'MDSC']


def careless(model, x, y):
    "A perturbation by somebody who does everything wrong."
    model.train()
    model(x).sum().backward()
    model[2].register_forward_hook(owners_hook)
    model[9].weight.requires_grad_(False)
    return x.add_(0.01).clamp_(0, 1)


def settings_for(cls):
    return cls(**{k: v for k, v in {'steps': 2, 'restarts': 2, 'queries': 6}.items() if k in cls.__dataclass_fields__})


METHODS_BY_PLACE = [(type(one).__module__.rpartition('.')[2], one) for one in map(attribution.as_method, attribution.METHODS)]


def cases(p) -> dict:
    "How each callable is called; `p` stands where it takes a perturbation."
    from robustnb import devices, probes

    noisy = attacks.PGD(steps=1)
    quiet = {'show_progress': False}
    return {
        'devices.device_of': lambda m: devices.device_of(m),
        'devices.xla_safe': lambda m: devices.xla_safe(m).__enter__(),
        'guard.untouched': lambda m: guarded(m, p),
        'guard.unwrap': lambda m: guard.unwrap(m),
        'guard.match_dtype': lambda m: guard.match_dtype(X.double(), m),
        'guard.Normalized.__init__': lambda m: guard.Normalized(m, 0.5, 0.5),
        'guard.Logits.__init__': lambda m: guard.Logits(m),
        'probes.select': lambda m: probes.select(m),
        'probes.Probe.__init__': lambda m: probed(m, probes.Probe),
        'models.describe': lambda m: models.describe(m, X),
        'noises.Matched.__call__': lambda m: noises.matched(noises.Gaussian(), p)(m, X, Y),
        'noises.perturb': lambda m: noises.perturb(lambda model, x, y: p(model, x, y), m, X, Y),
        'evaluation.predict': lambda m: evaluation.predict(m, X),
        'attacks.Problem.__init__': lambda m: attacks.Problem(attacks.PGD(), m, X, Y, torch.arange(6)),
        'blackbox.Transfer.__call__': lambda m: blackbox.Transfer(make_net('train'), p)(m, X, Y),
        'blackbox.Transfer.run': lambda m: blackbox.Transfer(make_net('train'), p).run(m, X, Y),
        'paths.trace': lambda m: paths.trace(m, X, Y, noisy),
        'paths.explore': lambda m: paths.explore(m, X[:1], Y[:1], noisy, [0.1], **quiet),
        'masking.check_masking': lambda m: masking.check_masking(m, DATA, noisy, n=6, queries=2, draws=2, **quiet),
        'distributed.mean_buffers': lambda m: distributed.mean_buffers(m),  # alone: nothing happens
        'evaluation.calibrate': lambda m: evaluation.calibrate(m, DATA, p, accuracy=0.0, **quiet),
        'evaluation.accuracy': lambda m: evaluation.accuracy(m, DATA),
        'evaluation.evaluate': lambda m: evaluation.evaluate(m, DATA, {'PGD': noisy, 'p': p}, **quiet),
        'training.attacked': lambda m: training.attacked(p, m, Batch(X, Y, torch.arange(6)), 0),
        'training.Ramped.__call__': lambda m: training.Ramped(attacks.FGSM(0.05), 2)(m, X, Y),
        'training.fit': lambda m: training.fit(m, DATA, training.Adversarial(p), epochs=2, valid=DATA, **quiet),
        'lsa.layer_sustainability': lambda m: lsa.layer_sustainability(m, DATA, {'PGD': noisy, 'p': p}, **quiet),
        'lsa.compare': lambda m: lsa.compare(m, X, X.flip(0)),
        'lsa.Comparison.__init__': lambda m: compared(m, lsa.Comparison),
        'explorer.explore': lambda m: explorer.explore(m, DATA, {'noise': noises.Gaussian(), 'p': p}, factors=[0.5, 1], **quiet),
        'lsa.surface': lambda m: lsa.surface(m, DATA, [noises.Gaussian(), noisy], [0.0, 0.1], **quiet),
        'inside.look_inside': lambda m: inside.look_inside(m, DATA, {'PGD': noisy, 'p': p}, '7', **quiet),
        'amplification.spectral_norms': lambda m: amplification.spectral_norms(m, X, steps=20),
        'layerwise.constant_share': lambda m: layerwise.constant_share(m, DATA),
        'coverage.Coverage.__init__': lambda m: covered(m, coverage.Coverage),
        'coverage.assess': lambda m: coverage.assess(m, DATA, {'a': DATA, 'b': DATA}, EVERY, **quiet),
        'surprise.surprise_adequacy': lambda m: surprise.surprise_adequacy(m, DATA, DATA, by='label', **quiet),
        'suites.growth': lambda m: suites.growth(m, DATA, DATA, ['NC', 'CC', 'MDSC'], orders=2, **quiet),
        'suites.prioritize': lambda m: suites.prioritize(m, DATA, DATA, ['CTM', 'CAM', 'MDSC', 'gini'], **quiet),
        'suites.suite_difference': lambda m: suites.suite_difference(m, DATA, {'a': DATA, 'b': DATA}, ['NC', 'KMNC'], **quiet),
        'uncovered.explore': lambda m: uncovered.explore(m, DATA, DATA, **quiet),
        'attribution.relevance': lambda m: attribution.relevance(m, DATA, ['lrp', 'lc', 'ldl', 'la'], by_class=True, **quiet),
        **{f'{place}.{type(method).__name__}.__call__': lambda m, method=method: method(m, X, Y)
           for place, method in METHODS_BY_PLACE},
        'attribution.Passes.__init__': lambda m: attribution.Passes(m, X, Y),
        'attribution.unit_relevance': lambda m: attribution.unit_relevance(m, {'0': torch.zeros(6, 2, 3, 3)}),
        'attribution.Own.__call__': lambda m: attribution.as_method(by_hand)(m, X, Y),
        'lrp.balance': lambda m: lrp.balance(m, X, Y),
        'voting.vote': lambda m: voting.vote(m, DATA, ['la', 'lrp'], m=2, **quiet),
        'voting.loss_gain': lambda m: voting.loss_gain(m, X, Y, {'0': [1]}),
        'voting.pruned': lambda m: silenced(m, voting.pruned),
        'idc.importance_coverage': lambda m: idc.importance_coverage(m, DATA, {'a': DATA, 'b': DATA}, m=3, k=2, **quiet),
        'idc.ImportanceCoverage.seen': lambda m: idc.importance_coverage(m, DATA, DATA, m=3, k=2, **quiet).seen(m, X),
        'combinations.explore': lambda m: combinations.explore(m, DATA, DATA, 'lrp', [2], **quiet),
        'studies.critical_units': lambda m: studies.critical_units(m, DATA, DATA, ['lrp', 'la'], [2], draws=1, **quiet),
        'studies.diversity': lambda m: studies.diversity(m, DATA, DATA, ['NC', idc.IDC(2, k=2)], iterations=1, **quiet),
        'studies.sensitivity': lambda m: studies.sensitivity(m, DATA, DATA, ['NC'], [2], [0.5], {'p': p}, runs=1, **quiet),
        'studies.correlation': lambda m: studies.correlation(m, DATA, DATA, ['NC'], [2], 4, {'p': p}, **quiet),
        'studies.overhead': lambda m: studies.overhead(m, DATA, DATA, ['NC'], **quiet),
        'studies.fragility': lambda m: studies.fragility(m, DATA, DATA, attacks.FGSM(0.05), ['high'], 3, **quiet),
        'studies.adversarial_pruning': lambda m: studies.adversarial_pruning(
            m, DATA, DATA, 'ANP-VS', **quiet,
            changes={'eps': 0.1, 'attack_steps': 1, 'epochs': 2, 'tuning_epochs': 1, 'judge_steps': 2}),
        'fuzzing.fuzz': lambda m: fuzzing.fuzz(m, DATA, X, budget=10, generation=5, **quiet),
        'fuzzing.versus_luck': lambda m: fuzzing.versus_luck(m, DATA, X, 'NLC', ['gain', 'all'], 1, 0, 5, generation=5, **quiet),
        'cuts.Cuts.__init__': cut_everywhere,
        'filters.pools': lambda m: filters.pools(m),
        'filters.scoped_pools': lambda m: filters.scoped_pools(m, scope='together'),
        'filters.filtered': lambda m: under_a_filter(m, filters.filtered),
        'synaptic.sweep': lambda m: [synaptic.sweep(m, DATA, {'p': p}, thresholds=3, against=against, norms=norms, **quiet)
                                     for against in ('original', 'filtered') for norms in ('eval', 'batch')],
        'synaptic.plan': lambda m: synaptic.plan(m, DATA, {'p': p}, thresholds=3),
        'selective.layer_masks': lambda m: selective.layer_masks(m, {'0': 'fragile', '5': 'robust', '9': 'robust'}),
        'selective.band_masks': lambda m: selective.band_masks(m, bands_of(m)),
        'selective.retrain': lambda m: selective.retrain(m, {'0.weight': True}, DATA, DATA, seeds=[0], **quiet),
        'links.explore': lambda m: links.explore(m, DATA, {'p': p}, thresholds=3, **quiet),
        'suppression.vulnerability': lambda m: suppression.vulnerability(m, DATA, {'p': p}, **quiet),
        'slimming.slim': lambda m: slimming.slim(m),
        'slimming.slim_sums': slimmed_with_sums,
        'slimming.load_slimmed': saved_and_slimmed,
        'slimming.costs': lambda m: slimming.costs(m, X, repeats=1),
        'slimming.published_costs': lambda m: slimming.published_costs(m, X),
        'magnitudes.weight_sparsity': lambda m: magnitudes.weight_sparsity(m),
        'magnitudes.units_per_layer': lambda m: magnitudes.units_per_layer(m),
        'magnitudes.prune_units': lambda m: magnitudes.prune_units(m, 0.9),
        'bayesian.gaussian_weights': lambda m: bayesian.gaussian_weights(m),
        **{f'bayesian.{name}': lambda m, use=use: with_gaussian_weights(m, use) for name, use in GAUSSIAN_USES.items()},
        **{f'pruning.{name}': lambda m, use=use: with_masks(m, use) for name, use in PRUNING_USES.items()},
        'plans.published_cifar_attack': lambda m: plans.published_cifar_attack(m, X, Y, steps=2),
        'anpvs.judge': lambda m: anpvs.judge(m, DATA, BRIEF, p, X.flip(-1)),
        'anpvs.sizes': lambda m: [anpvs.sizes(m, copy.deepcopy(m), X[:1]), anpvs.sizes(copy.deepcopy(m), m, X[:1])],
        'anpvs.compare': lambda m: anpvs.compare(m, DATA, DATA, ('AT', 'ANP-VS'), BRIEF, worst=noisy, source=m, **quiet),
        'thresholds.threshold_sweep': lambda m: with_masks(m, lambda masked: thresholds.threshold_sweep(
            masked, DATA, [0.1, 0.8], {'p': p}, **quiet)),
        'thresholds.explore': lambda m: with_masks(m, lambda masked: thresholds.explore(
            masked, DATA, {'p': p}, [0.1, 0.8], before=m, **quiet)),
        'dropout.insert_masks': lambda m: dropout.insert_masks(m, X, where='0'),
        **{f'dropout.{name}': lambda m, use=use: with_masks(m, use) for name, use in MASK_USES.items()},
        'report.full_report': lambda m: report.full_report(m, DATA, attacks.PGD(steps=2), eps=[0.1], **quiet),
    }


RUNS_NOTHING = {
    'devices.device_of', 'devices.xla_safe', 'guard.unwrap', 'guard.match_dtype', 'guard.Normalized.__init__',
    'guard.Logits.__init__', 'probes.select', 'models.save', 'attacks.Problem.__init__', 'distributed.mean_buffers',
    'blackbox.Transfer.__call__', 'attribution.Passes.__init__', 'attribution.unit_relevance', 'filters.pools',
    'filters.scoped_pools', 'selective.layer_masks', 'selective.band_masks', 'dropout.mask_kl', 'dropout.mask_groups',
    'dropout.kept_units', 'dropout.mask_mode', 'dropout.paired', 'slimming.slim', 'slimming.load_slimmed',
    'magnitudes.weight_sparsity', 'magnitudes.units_per_layer', 'magnitudes.prune_units', 'bayesian.gaussian_weights',
    'pruning.dead_layers', 'pruning.BayesianPruning.groups', 'pruning.AdversarialPruning.groups', 'pruning.Balanced.groups',
    'bayesian.weight_mode', 'bayesian.one_draw', 'bayesian.weight_kl', 'bayesian.mean_weights', 'bayesian.Ensemble.__init__',
    *(f'noises.{noise}.__call__' for noise in
      ('Gaussian', 'Uniform', 'Speckle', 'Salt', 'Pepper', 'SaltPepper', 'Poisson', 'Blur')),
}
ABSTRACT = {'attribution.Method.__call__', 'noises.Noise.__call__', 'noises.PixelNoise.__call__', 'attacks.Attack.__call__',
            'attacks.Attack.run'}
CARELESS = ['noises.perturb', 'noises.Matched.__call__', 'guard.untouched', 'evaluation.evaluate', 'training.fit',
            'lsa.layer_sustainability', 'explorer.explore', 'inside.look_inside']
# Their purpose is to change the model that they are given.
BY_DESIGN = {
    'models.load': 'writes weights into the model',
    **{
        f'{objective}.{method}': 'one step of training, on the model in training'
        for objective in ('training.Objective', 'training.Standard', 'training.Adversarial', 'defences.TRADES', 'defences.MART',
                          'pruning.BayesianPruning', 'pruning.AdversarialPruning')
        for method in ('perturbed', 'risk', 'terms', 'loss')
    },
    **{
        f'defences.{regularizer}.__call__': 'a term of the loss, on the model in training'
        for regularizer in ('WeightSize', 'InputGradient', 'LogitPairing')
    },
    'pruning.Balanced.loss': 'one step of training, on the model in training',
    'pruning.Balanced.after_step': 'part of a step of training, on the model in training',
    'layerwise.LayerRegularizer.__call__': 'a term of the loss, on the model in training',
    **{
        f'layerwise.Refreshed.{method}': 'part of a step of training, on the model in training'
        for method in ('setup', 'loss', 'after_step')
    },
    'bayesian.WeightPrior.__call__': 'a term of the loss, on the model in training',
    **{
        f'magnitudes.ADMM.{method}': 'part of a step of training, on the model in training'
        for method in ('setup', 'loss', 'after_step')
    },
    **{
        f'selective.Only.{method}': 'part of a step of training, on the model in training'
        for method in ('setup', 'loss', 'after_step')
    },
}


def slimmed_with_sums(model):
    if not find_spec('torch_pruning'):
        pytest.skip("torch-pruning is not installed: pip install 'robustnb[prune]'")
    slimming.slim_sums(model, X)


def saved_and_slimmed(model):
    with tempfile.TemporaryDirectory() as folder:
        models.save(model, Path(folder) / 'net.safetensors')
        slimming.load_slimmed(model, Path(folder) / 'net.safetensors')


def in_a_block(block, *args):
    def use(model):
        with block(model, *args):
            model(X)

    return use


MASK_USES = {
    'mask_mode': in_a_block(dropout.mask_mode, 'hard'), 'paired': in_a_block(dropout.paired),
    'mask_kl': dropout.mask_kl, 'mask_groups': dropout.mask_groups, 'kept_units': dropout.kept_units,
}  # fmt: skip


def with_masks(model, use):
    "The copy with masks is what has to come back as it was."
    masked = dropout.insert_masks(model, X, where='0')
    with guard.untouched(masked):  # the modes of batch normalisation are not what this is about
        masked.eval()
        before = snapshot(masked)
        use(masked)
        assert_untouched(before, masked)


BRIEF = plans.DefencePlan(eps=0.05, attack_steps=1, epochs=2, tuning_epochs=1, judge_steps=1)
PRUNING_USES = {
    'dead_layers': pruning.dead_layers, 'BayesianPruning.groups': pruning.BayesianPruning(samples=6).groups,
    'AdversarialPruning.groups': pruning.AdversarialPruning(samples=6).groups,
    'Balanced.groups': lambda model: pruning.Balanced(training.Adversarial()).groups(model),
}  # fmt: skip


GAUSSIAN_USES = {
    'weight_mode': in_a_block(bayesian.weight_mode, 'sample'), 'one_draw': in_a_block(bayesian.one_draw),
    'weight_kl': bayesian.weight_kl, 'mean_weights': bayesian.mean_weights,
    'Ensemble.__init__': lambda model: bayesian.Ensemble(model, 2).eval()(X),
}  # fmt: skip


def with_gaussian_weights(model, use):
    "The copy with distributions is what has to come back as it was; what a draw in a block takes from chance is its own."
    drawn = bayesian.gaussian_weights(model)
    with guard.untouched(drawn), torch.random.fork_rng():
        drawn.eval()
        before = snapshot(drawn)
        use(drawn)
        assert_untouched(before, drawn)


def guarded(model, p):
    with guard.untouched(model):
        p(model, X, Y)
        model(X)


def probed(model, probe):
    "A probe changes no mode, so the model is put into evaluation mode around it, and every mode back."
    with guard.untouched(model), probe(model):
        model(X)


def compared(model, comparison):
    "What waits leaves no trace either."
    pairs = comparison(model, batch_size=4)
    before = snapshot(model)
    for x in X.split(1):
        pairs.update(x, x.flip(-1))
        assert_untouched(before, model)
    pairs.compute()


def silenced(model, pruned):
    "A block in which units are silent, and in which nobody has run the model."
    with guard.untouched(model), pruned(model, {'0': [0, 1]}):
        model(X)


def cut_everywhere(model):
    "A network that runs in parts, again and again."
    with guard.untouched(model):
        found = cuts.Cuts(model, ['0', '5', '9'], X)
        for layer in found.layers:
            found.at(layer, X)()


def under_a_filter(model, filtered):
    "A block in which weights are zero, and in which nobody has run the model."
    with guard.untouched(model), filtered(model, 'high', 0.0):
        model(X)


def bands_of(model):
    "A label for each band of each layer."
    rows = [{'layer': name, 'filter': 'pulse', 'response': 'clean', 'position': position, 'threshold': threshold,
             'removed': removed, 'label': 'robust'} for name, pool in filters.pools(model).items()
            for steps in [filters.Pulse().steps(pool)]
            for position, threshold, removed in zip(steps.position, steps.threshold, steps.removed, strict=True)]
    return pd.DataFrame(rows)


def by_hand(model, x, target, layers):
    "A method of one's own."
    with torch.no_grad():
        return {name: torch.zeros(len(x), *rep.shape[1:]) for name, rep in shapes(model, x, layers).items()}


def shapes(model, x, layers):
    "What the layers return."
    with probes.Probe(model, layers) as probe:
        model(x)
        return dict(probe.items())


def covered(model, coverage):
    "A coverage that lives on holds no hook, also while somebody looks at its batches one by one."
    found, before = coverage(model, EVERY, batch_size=4, show_progress=False), snapshot(model)
    for step in (found.learn, found.update, found.gain):
        step(DATA)
        assert_untouched(before, model)
    batches = found.walk(DATA)
    next(batches)
    batches.close()


def public_callables_with_a_model() -> list[str]:
    found = []
    for info in pkgutil.iter_modules(robustnb.__path__):
        if info.name.startswith('_'):
            continue
        module = importlib.import_module(f'robustnb.{info.name}')
        for name in getattr(module, '__all__', []):
            symbol = getattr(module, name)
            if inspect.isclass(symbol):
                methods = {
                    m: f
                    for m, f in inspect.getmembers(symbol, inspect.isfunction)
                    if m[0] != '_' or m in ('__init__', '__call__')
                }
                found += [
                    f'{info.name}.{name}.{m}'
                    for m, f in methods.items()
                    if takes_model(f) and not is_dataclass_init(symbol, m)
                ]
            elif callable(symbol) and takes_model(symbol):
                found.append(f'{info.name}.{name}')
    return found


def takes_model(function) -> bool:
    try:
        return 'model' in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


def is_dataclass_init(cls, method: str) -> bool:
    return method == '__init__' and hasattr(cls, '__dataclass_fields__')  # holds a result, runs nothing


FOUND = [name for name in public_callables_with_a_model() if name not in ABSTRACT]
HELD = [name for name in FOUND if name not in BY_DESIGN]


def adapted(cls):
    "An adapter of any library around an attack with bad manners, which needs none of them."

    def rude(shown, x, y):
        shown.train()
        shown(x.requires_grad_()).logsumexp(1).sum().backward()
        return (x + 0.01 * torch.rand_like(x) * x.grad.sign()).clamp(0, 1).detach()

    find = {'find': lambda self, problem, x, y, bounds: rude(adapters._Shown(problem), x, y)}
    return type(cls.__name__, (cls,), find)(lambda model: rude)


def case_of(name: str, folder, p=attacks.FGSM(0.05)):
    if name == 'models.save':
        return lambda m: models.save(m, folder / 'weights.safetensors')
    if name in cases(p):
        return cases(p)[name]
    module, cls, method = (*name.split('.'), '')[:3]
    cls = getattr(importlib.import_module(f'robustnb.{module}'), cls)
    rooms = ('noises', 'attacks', 'blackbox', 'minimal')
    if module in rooms and issubclass(cls, noises.Perturbation) and method in ('__call__', 'run'):
        return lambda m: getattr(settings_for(cls), method)(m, X, Y)
    if module == 'adapters':
        return lambda m: getattr(adapted(cls), method)(m, X, Y)
    pytest.fail(f'{name} takes a model and has no case here: say how it is held to the promise')


def test_the_search_finds_what_it_should():
    some = {'evaluation.evaluate', 'lsa.layer_sustainability', 'attacks.PGD.run', 'guard.untouched', 'training.fit'}
    assert some <= set(FOUND) and set(cases(careless)) | RUNS_NOTHING <= set(FOUND), 'every case belongs to something'


@pytest.mark.parametrize('state', ['train', 'eval', 'frozen batch norm'])
@pytest.mark.parametrize('name', HELD)
def test_model_comes_back_untouched(name, state, tmp_path):
    case, net = case_of(name, tmp_path), make_net(state)
    before, noise, data = snapshot(net), rng_state(), (X.clone(), Y.clone())
    case(net)
    assert_untouched(before, net)
    assert same(noise, rng_state()), 'a global random generator was used'
    assert same(data, DATA), 'the data were changed'
    copy.deepcopy(net)


@pytest.mark.parametrize('state', ['train', 'frozen batch norm'])
@pytest.mark.parametrize('name', CARELESS)
def test_model_and_data_survive_a_careless_perturbation(name, state, tmp_path):
    net, data = make_net(state), (X.clone(), Y.clone())
    before = snapshot(net)
    case_of(name, tmp_path, careless)(net)
    assert_untouched(before, net)
    if name != 'guard.untouched':  # it guards the model only
        assert same(data, DATA), 'the data were changed'
    X.copy_(data[0])


@pytest.mark.parametrize('fuse', [0, 1, 3])
@pytest.mark.parametrize('name', HELD)
def test_model_comes_back_untouched_after_an_exception(name, fuse, tmp_path):
    case, net = case_of(name, tmp_path), make_net('frozen batch norm')
    before = snapshot(net)
    object.__setattr__(net[4], 'fuse', fuse)
    if fuse == 0 and name not in RUNS_NOTHING:
        with pytest.raises(RuntimeError, match='boom'):
            case(net)
    else:  # it may be done before the fuse has burnt down
        with contextlib.suppress(RuntimeError):
            case(net)
    object.__setattr__(net[4], 'fuse', None)
    assert_untouched(before, net)


def test_the_check_notices_a_difference():
    for spoil in (
        lambda n: n.eval(),
        lambda n: n[1].running_mean.add_(1),
        lambda n: n[0].weight.grad.add_(1),
        lambda n: n[2].register_forward_hook(owners_hook),
        lambda n: n[9].weight.requires_grad_(False),
        lambda n: n[9].weight.data.add_(1),
    ):
        net = make_net('train')
        before = snapshot(net)
        spoil(net)
        with pytest.raises(AssertionError):
            assert_untouched(before, net)
