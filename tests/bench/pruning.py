"""How long one step of adversarial neural pruning takes, beside adversarial training with the same attack; and the smaller net.

Steps are taken in one process, one objective after the other, in the order of the list in even rounds and backwards in odd
ones; what counts is CPU time, the median over rounds of each objective's ratio to mixed adversarial training in the same round.
See README.md.
"""

import argparse
import copy
import json
import os
import shlex
import statistics
import sys
import time
from functools import partial
from pathlib import Path

os.environ |= {'OMP_WAIT_POLICY': 'passive', 'TQDM_DISABLE': '1'}

import torch

from robustnb.attacks import PGD
from robustnb.data import Batch, mnist
from robustnb.devices import env
from robustnb.dropout import insert_masks
from robustnb.models import build
from robustnb.pruning import AdversarialPruning, Balanced
from robustnb.results import provenance
from robustnb.slimming import slim
from robustnb.suppression import suppress
from robustnb.training import Adversarial, _Trainer, clipped

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / 'data' / 'results' / 'bench_pruning.json'
ATTACK, BATCH = PGD(eps=0.3, steps=10), 64
WANTED = 1.20  # CPU time of a step of ANP-VS, in steps of mixed adversarial training
HALF = {'relu1': 10, 'relu2': 25, 'relu3': 250}  # units that stay in the smaller network


def images() -> Batch:
    "A batch of MNIST, or of noise where there is none: the time is the same."
    folder = Path(os.environ.get('ROBUSTNB_DATA') or ROOT.parent / 'shared' / 'data')
    if (folder / 'MNIST').is_dir():
        train = mnist(folder, download=False).train[:BATCH]
        return Batch(train.x, train.y, torch.arange(BATCH))
    chance = torch.Generator().manual_seed(0)
    return Batch(torch.rand(BATCH, 1, 28, 28, generator=chance), torch.arange(BATCH) % 10, torch.arange(BATCH))


def contestants() -> dict[str, _Trainer]:
    "Trainings of LeNet-5-Caffe, by name."
    adam = partial(torch.optim.Adam, lr=1e-3, weight_decay=1e-4)
    makers = {'weights': adam, 'masks': clipped(partial(torch.optim.Adam, lr=1e-2), 1.0)}
    net = build('lenet5_caffe', seed=0)
    masked = insert_masks(net, torch.rand(2, 1, 28, 28))
    vs = AdversarialPruning(ATTACK, samples=60_000, suppression=suppress())
    plain = {'mixed AT': Adversarial(ATTACK, clean_weight=1 / 3), 'Madry AT': Adversarial(ATTACK),
             'AT-VS': Adversarial(ATTACK, clean_weight=1 / 3, regularizers=suppress())}
    pruned = {'ANP': AdversarialPruning(ATTACK, samples=60_000), 'ANP-VS': vs, 'ANP-VS, joint gradients': AdversarialPruning(
        ATTACK, samples=60_000, suppression=suppress(), split=False), 'ANP-VS, balanced': Balanced(vs)}
    return {name: _Trainer(copy.deepcopy(net), one, adam, None) for name, one in plain.items()} | {
        name: _Trainer(copy.deepcopy(masked), one, makers, None) for name, one in pruned.items()}


def seconds(trainer: _Trainer, batch: Batch, steps: int) -> float:
    "CPU time of a step."
    start = time.process_time()
    for _ in range(steps):
        trainer(batch)
    return (time.process_time() - start) / steps


def measured(rounds: int, steps: int) -> dict:
    "CPU milliseconds of a step, and its ratio to mixed adversarial training, for each contestant."
    batch, arms = images(), contestants()
    for trainer in arms.values():
        seconds(trainer, batch, 2)
    found = {name: [] for name in arms}
    for number in range(rounds):
        for name in list(arms)[::1 if number % 2 == 0 else -1]:
            found[name].append(seconds(arms[name], batch, steps))
    ratios = {name: [t / mixed for t, mixed in zip(times, found['mixed AT'], strict=True)] for name, times in found.items()}
    return {name: {'ms': round(1000 * statistics.median(times), 2), 'to mixed AT': round(statistics.median(ratios[name]), 3),
                   'least': round(min(ratios[name]), 3), 'most': round(max(ratios[name]), 3)} for name, times in found.items()}


def latency(rounds: int) -> dict:
    "Wall time of a forward pass of the dense network, of the one with masks, and of the smaller one: medians, in milliseconds."
    net = build('lenet5_caffe', seed=0).eval()
    masked = insert_masks(net, torch.rand(2, 1, 28, 28))
    with torch.no_grad():
        for name, kept in HALF.items():
            masked.get_submodule(name).mask.a_raw[kept:] = -10
    nets, found = {'dense': net, 'masked': masked, 'smaller': slim(masked)}, {}
    torch.testing.assert_close(nets['smaller'](images().x), masked(images().x), rtol=1e-4, atol=1e-5)
    for size in (1, 256):
        x, times = torch.rand(size, 1, 28, 28), {name: [] for name in nets}
        with torch.no_grad():
            for number in range(20 * rounds + 3):
                for name, one in nets.items():
                    start = time.perf_counter()
                    one(x)
                    times[name] += [time.perf_counter() - start] if number > 2 else []
        found[f'batch of {size}'] = {name: round(1000 * statistics.median(several), 3) for name, several in times.items()}
    found['parameters'] = {name: sum(p.numel() for p in nets[name].parameters()) for name in ('dense', 'smaller')}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--rounds', type=int, default=9, help='odd numbers make medians of something measured (default: 9)')
    parser.add_argument('--steps', type=int, default=6, help='steps of each objective in a round (default: 6)')
    parser.add_argument('--out', type=Path, default=RESULTS, help=f'where to write (default: {RESULTS.name} in data/results)')
    args = parser.parse_args()
    torch.set_num_threads(1)  # CPU time of several threads is that of their waiting, too
    steps, passes = measured(args.rounds, args.steps), latency(args.rounds)
    for name, row in steps.items():
        print(f'{name:26}{row["ms"]:9.2f} ms   {row["to mixed AT"]:.3f} of mixed AT ({row["least"]:.3f} to {row["most"]:.3f})')
    print(json.dumps(passes, indent=1))
    ratio = steps['ANP-VS']['to mixed AT']
    print(f'ANP-VS takes {ratio:.3f} of a step of mixed AT; wanted: at most {WANTED}: {"yes" if ratio <= WANTED else "missed"}')
    command = shlex.join(['python', 'tests/bench/pruning.py', *sys.argv[1:]])
    about = {'command': command, 'network': 'LeNet-5-Caffe', 'batch': BATCH, 'attack': 'PGD, 10 steps', 'rounds': args.rounds,
             'machine': env(), 'versions': provenance()}
    args.out.write_text(json.dumps(about | {'step': steps, 'forward pass': passes, 'wanted': WANTED}, indent=1) + '\n')


if __name__ == '__main__':
    main()
