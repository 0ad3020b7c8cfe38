"""Components on XLA's CPU device equal the same on the plain CPU.

In a process of their own: torch_xla has to be loaded before the first backward pass of a process.
"""

import importlib.util
import os
import subprocess
import sys

import pytest

SCRIPT = """
import copy, tempfile
import torch_xla, torch, numpy as np
from dataclasses import replace
from functools import partial
from torch import nn
from robustnb.attacks import APGD, FGSM, L2, PGD, WorstOf
from robustnb.attribution import relevance
from robustnb.blackbox import Square
from robustnb.coverage import Coverage
from robustnb.devices import compile_count, pick_device, seeded
from robustnb.evaluation import evaluate
from robustnb.idc import IDC, importance_coverage
from robustnb.lsa import layer_sustainability
from robustnb.minimal import CW, DeepFool, Smallest
from robustnb.noises import Blur, Gaussian, Poisson, SaltPepper, Uniform, matched
from robustnb.training import Standard, fit

class Block(nn.Module):
    def __init__(self, a, b, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b)
        self.conv2, self.bn2 = nn.Conv2d(b, b, 3, 1, 1, bias=False), nn.BatchNorm2d(b)
        self.short = nn.Sequential(nn.Conv2d(a, b, 1, stride, bias=False), nn.BatchNorm2d(b))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += self.short(x)
        return self.relu(out)

with seeded(0):
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU(), Block(8, 8, 1), Block(8, 16, 2),
                        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))
    net(torch.rand(64, 3, 12, 12))
    x, y = torch.rand(16, 3, 12, 12), torch.arange(16) % 5
net.eval()
device = pick_device('xla')
other = copy.deepcopy(net).to(device)
with seeded(0):
    small = nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(150, 5)).eval()
small_other = copy.deepcopy(small).to(device)

def compared(attack, here, there):
    here, there = attack.run(here, x, y), attack.run(there, x.to(device), y.to(device))
    apart = ((here.x_adv - there.x_adv.cpu()).abs() > 1e-5).float().mean()
    loss, success = (here.loss - there.loss.cpu()).abs().max(), (here.success == there.success.cpu()).all()
    print('attack', float(apart), float(loss), bool(success), attack.name)

compared(PGD(0.05, steps=5), net, other)
for attack in (PGD(0.05, steps=5, random_start=False), PGD(0.05, steps=5, keep_going=False), FGSM(0.05, norm=L2()),
               PGD(0.5, steps=3, norm=L2(), loss='dlr', target='runner-up'), APGD(0.05, steps=6),
               WorstOf([FGSM(0.05), PGD(0.05, steps=3)]), Square(0.1, queries=10), DeepFool(steps=6),
               CW(steps=6, searches=2), Smallest(PGD(steps=3), tries=3)):
    compared(attack, small, small_other)

seen = []
for seed in range(12):
    PGD(0.05 + 0.01 * seed, steps=5, seed=seed)(other, x.to(device), y.to(device)).cpu()
    seen.append(compile_count())
print('compilations', seen[-1] - seen[1], seen)
for make in (lambda i: PGD(0.05 + 0.01 * i, steps=5, keep_going=False, seed=i),
             lambda i: APGD(0.05 + 0.01 * i, steps=6, seed=i)):
    seen = []
    for i in range(8):
        make(i)(small_other, x.to(device), y.to(device)).cpu()
        seen.append(compile_count())
    print('again', seen[-1] - seen[1])

MEASURES = ('relative_error', 'topk_overlap', 'energy_relative_error', 'centred_error', 'linear_cka')
for measure in MEASURES:
    a, b = (layer_sustainability(m, (x, y), Gaussian(0.1), measure=measure, show_progress=False).table()['mean'].to_numpy()
            for m in (net, other))
    print(measure, len(a), float(np.abs(a - b).max()))
a, b = (evaluate(m, (x, y), Gaussian(0.1), show_progress=False).dataset['correct'].values for m in (net, other))
print('evaluation', bool((a == b).all()))

with seeded(0):
    young = nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(150, 5))
how = {'objective': Standard(), 'optimizer': partial(torch.optim.SGD, lr=0.1, momentum=0.9),
       'batch_size': 8, 'show_progress': False}
a, b = (fit(m, (x, y), epochs=3, schedule='cosine', **how).model for m in (young, copy.deepcopy(young).to(device)))
apart = max(float((p - q.cpu()).abs().max()) for p, q in zip(a.parameters(), b.parameters()))
seen = compile_count()
fit(copy.deepcopy(young).to(device), (x, y), epochs=6, schedule='cosine', **how)
print('training', apart, compile_count() - seen)
with tempfile.TemporaryDirectory() as folder:
    there = copy.deepcopy(young).to(device)
    fit(there, (x, y), epochs=1, checkpoint=folder + '/run', **how)
    again = fit(there, (x, y), epochs=3, checkpoint=folder + '/run', **how).model
whole = fit(there, (x, y), epochs=3, **how).model
print('resumed', all(torch.equal(p.cpu(), q.cpu()) for p, q in zip(again.parameters(), whole.parameters())))

for noise in (Uniform(0.1), Poisson(0.1), Blur(0.8), SaltPepper(0.1), matched(Uniform(), FGSM(0.05))):
    def noisy(seed=0, strength=noise.strength):
        changed = replace(noise.at(strength), seed=seed)
        return changed(net, x, y), changed(other, x.to(device), y.to(device)).cpu()
    here, there = noisy()
    apart = ((here - there).abs() > 1e-5).float().mean()
    seen = [compile_count() for seed in range(4) if noisy(seed, 0.05 + 0.01 * seed)]
    print('noise', float(apart), seen[-1] - seen[1])

CODES = ['NC', 'KMNC', 'NBC', 'SNAC', 'TKNC', 'TKNP', 'NLC', 'MDSC']
with seeded(0):
    flat = nn.Sequential(nn.Flatten(), nn.Linear(432, 6), nn.ReLU(), nn.Linear(6, 5))
def covered(model):
    seen, coverage = [], Coverage(model, CODES, batch_size=16, show_progress=False).learn((x, y))
    for i in range(5):
        found = coverage.update(((x + 0.02 * i) % 1, y)).compute()
        seen.append(compile_count())
    return np.array(list(found.values())), seen
(a, _), (b, seen) = covered(flat), covered(copy.deepcopy(flat).to(device))
print('coverage', len(a), float(np.abs(a / b - 1).max()), seen[-1] - seen[2])

for name, here, there in ('small', small, small_other), ('net', net, other):
    a, b = (relevance(m, (x, y), ['lrp', 'lc'], by_class=True, batch_size=16, show_progress=False) for m in (here, there))
    for method in 'lrp', 'lc':
        for score in 'signed', 'absolute':
            one, two = (found.dataset[score].sel({'method': found.dataset['method'] == method}).values for found in (a, b))
            print('relevance', name, method, float(np.abs(one - two).max() / np.abs(one).max()))
train = torch.cat([(x + 0.05 * i) % 1 for i in range(4)])
def important(model, units):
    coverage = Coverage(model, IDC(4, units, k=3), batch_size=16, show_progress=False).learn((train, y.repeat(4)))
    idc, seen = coverage.update((x, y)).criteria['IDC'], []
    for i in range(5):
        coverage.update(((x + 0.03 * i) % 1, y))
        seen.append(compile_count())
    found = importance_coverage(model, (train, y.repeat(4)), (x, y), 4, k=3, units=units, batch_size=16, show_progress=False)
    return [idc.fitted().units, idc.covered()['all layers'].tolist(), idc.counts(), found.table().to_csv(),
            found.seen(model, x).tolist()], seen
for units in 'lrp', {'0': [0, 2, 3], '4': [3]}:
    (a, _), (b, seen) = (important(m, units) for m in (small, small_other))
    print('idc', a == b, seen[-1] - seen[1])
"""


@pytest.mark.skipif(importlib.util.find_spec('torch_xla') is None, reason='torch_xla is not installed')
def test_components_on_xla_equal_the_cpu(tmp_path):
    ran = subprocess.run([sys.executable, '-c', SCRIPT], capture_output=True, text=True, timeout=900, cwd=tmp_path,
                         env=os.environ | {'PJRT_DEVICE': 'CPU'})
    assert ran.returncode == 0, ran.stderr[-3000:]
    lines = [line.split() for line in ran.stdout.splitlines() if line.strip()]
    attacks = [line for line in lines if line[0] == 'attack']
    assert len(attacks) >= 7
    for _, apart, loss, success, *name in attacks:  # a rare sign of a tiny gradient may differ
        assert float(apart) < 0.005 and float(loss) < 1e-3 and success == 'True', name
    found = {line[0]: line[1:] for line in lines}
    assert int(found['compilations'][0]) <= 1, 'ten more seeds and strengths do not compile ten more programs'
    # When Python lets go of a tensor may add a program, rarely; one for each of the six calls would be six.
    assert all(int(line[1]) <= 3 for line in lines if line[0] == 'again'), ran.stdout
    measures = ('relative_error', 'topk_overlap', 'energy_relative_error', 'centred_error', 'linear_cka')
    assert all(found[name][0] == '5' and float(found[name][1]) < 1e-4 for name in measures), ran.stdout
    criteria, apart, compilations = found['coverage']
    assert int(criteria) == 8 and float(apart) < 1e-6 and int(compilations) == 0, found['coverage']
    relevances = [line for line in lines if line[0] == 'relevance']
    assert len(relevances) == 8 and all(float(line[3]) < 1e-4 for line in relevances), relevances
    important = [line for line in lines if line[0] == 'idc']
    assert len(important) == 2 and all(line[1] == 'True' and int(line[2]) <= 1 for line in important), important
    assert found['evaluation'] == ['True'] and found['resumed'] == ['True']
    assert float(found['training'][0]) < 1e-3 and int(found['training'][1]) <= 1, 'a schedule does not compile more programs'
    noises = [line for line in lines if line[0] == 'noise']
    assert len(noises) == 5
    for _, apart, compilations in noises:  # a logarithm that is rounded otherwise can move a count, rarely
        assert float(apart) < 0.005 and int(compilations) <= 1, noises
