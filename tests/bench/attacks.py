"""How long attacks take, side by side: robustnb, torchattacks, foolbox, ART, and the bare passes that none can do without.

All run in one process, on the same network and the same batch, one after the other in every round, in the order of the list
in even rounds and backwards in odd ones. A time is divided by that of the bare passes of the same round: those on the images that
the attack passes through and, beside it, those on the clean ones. See README.md.
"""

import argparse
import datetime
import gc
import json
import os
import platform
import shlex
import statistics
import sys
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault('OMP_WAIT_POLICY', 'passive')
os.environ |= {'KINETO_LOG_LEVEL': '5', 'TORCH_CPP_LOG_LEVEL': 'ERROR'}  # the profiler would report that there is no GPU

import numpy as np
import torch
import torch.nn.functional as F
from peers import LIBRARIES, ROOT, Call, Counted, Setting, data_root, lenet, packaged, robust_accuracy, sizes
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from robustnb.plots import COLORS, figure, style
from robustnb.results import provenance

RESULTS = ROOT / 'data' / 'results' / 'bench_attacks.json'
BARE, CLEAN, STOP = 'bare passes', 'bare passes, clean images', 'robustnb, keep_going=False'
FLOORS = (BARE, CLEAN)
CASES = {
    'fgsm': Setting('fgsm', eps=0.2),
    'pgd-10': Setting.pgd(10, 0.2),
    'pgd-40': Setting.pgd(40, 0.2),
    'pgd-40-l2': Setting.pgd(40, 2.0, 'l2'),
    'cw-50': Setting('cw', 'l2', steps=50, step=0.1, c=10.0),
}
LEAST_SECONDS = 0.2  # a measurement repeats its call until the bare passes take as long
ART_CW_STEPS = 10  # of the 50: each costs ART a search along the line, and one backward pass for each class it meets


# ------------------------------------------------------------------------------------------------------ who takes part


def gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    "One forward pass, and the gradient of the loss at the input."
    start = x.detach().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(model(start), y, reduction='sum'), start)[0]


class Kept(nn.Module):
    "A model that keeps the inputs for which it is asked for a gradient."

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.inputs = model, []
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            self.inputs.append(x.detach().clone())
        return self.model(x)


def bare_passes(s: Setting, model: nn.Module) -> Call:
    "The floor: a forward pass and a gradient at each of the images that the attack passes through, and nothing else."
    path = []

    def call(x: Tensor, y: Tensor) -> Tensor:
        if not path:  # in the call that warms up
            kept = Kept(model)
            LIBRARIES['robustnb'](s, kept)(x, y)
            path.extend(kept.inputs[: s.steps])
        for point in path:
            gradient(model, point, y)
        return x

    return call


def clean_passes(s: Setting, model: nn.Module) -> Call:
    "As many at the clean images. They take a CPU less time: attacked images keep its maximum poolings guessing."

    def call(x: Tensor, y: Tensor) -> Tensor:
        for _ in range(s.steps):
            gradient(model, x, y)
        return x

    return call


def contestants(s: Setting) -> dict:
    "name -> function (setting, model) -> call (x, y) -> x_adv."
    makers = {BARE: bare_passes, CLEAN: clean_passes, **LIBRARIES}
    if s.kind == 'pgd':
        makers[STOP] = partial(LIBRARIES['robustnb'], keep_going=False)
    if s.kind == 'cw':
        makers['ART'] = lambda s, model: LIBRARIES['ART'](Setting('cw', 'l2', None, ART_CW_STEPS, s.step, s.c), model)
    return makers


def network() -> tuple[str, nn.Module, Tensor, Tensor, float]:
    "What is attacked: its name, the network, a batch of 128 with labels, and its accuracy on all test images."
    if data_root() is None:
        print('No MNIST here (ROBUSTNB_DATA names the folder that has it): using the small network for digits of 28 by 28 pixels')
        print('that comes with robustnb. Ratios then are not those of the README, which are for LeNet-5 on MNIST.\n')
        name, (model, test) = 'digits_cnn on digits28', packaged('digits28')
    else:
        name, (model, test) = 'LeNet-5 on MNIST', lenet()
    clean = robust_accuracy(model, test.x, test.y)
    return name, model, test.x[:128], test.y[:128], clean


# ---------------------------------------------------------------------------------------------------------- what it costs


def timed(call: Call, x: Tensor, y: Tensor, repeats: int) -> dict[str, float]:
    "CPU seconds and seconds on the clock of one call, as the mean of `repeats`."
    gc.collect()
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(repeats):
        call(x, y)
    return {'cpu': (time.process_time() - cpu) / repeats, 'wall': (time.perf_counter() - wall) / repeats}


def race(calls: dict[str, Call], x: Tensor, y: Tensor, rounds: int) -> dict[str, list[dict]]:
    "Times of every contestant in every round, each with its ratios to both kinds of bare passes of that round."
    for call in calls.values():
        call(x, y)  # warm
    repeats = max(1, round(LEAST_SECONDS / timed(calls[BARE], x, y, 1)['cpu']))
    found = {name: [] for name in calls}
    for number in range(rounds):
        for name in list(calls)[:: -1 if number % 2 else 1]:
            found[name].append(timed(calls[name], x, y, repeats))
        for rows in found.values():
            rows[-1]['ratio'], rows[-1]['to_clean'] = (rows[-1]['cpu'] / found[floor][-1]['cpu'] for floor in FLOORS)
    return found


def peak_memory(call: Call, x: Tensor, y: Tensor) -> float:
    "The most that the tensors of one call take up at any time, in MiB, beyond what was there before."
    gc.collect()  # what earlier calls left in circles would be given back during this one
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call(x, y)
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == '[memory]']
    taken = np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    return float(taken.max(initial=0)) / 2**20


# ----------------------------------------------------------------------------------------------------- what comes of it


def outcome(s: Setting, make, model: nn.Module, x: Tensor, y: Tensor) -> dict:
    "What one call, which nobody times, comes to: robust accuracy, sizes of the changes that fool, passes."
    counted = Counted(model)
    x_adv = make(s, counted)(x, y).detach()
    with torch.no_grad():
        fooled = model(x_adv).argmax(1) != y
    if s.kind == 'cw':
        fooled &= x_adv.flatten(1).any(1)  # foolbox returns a black image where it found nothing
    length = sizes(x_adv - x, s.norm)
    return {
        'robust_accuracy': 1 - float(fooled.float().mean()),
        'median_size': float(length[fooled].median()) if fooled.any() else None,
        'largest_size': float(length.max()),
        **counted.passes(len(x)),
    }


def measure(s: Setting, model: nn.Module, x: Tensor, y: Tensor, rounds: int) -> dict[str, dict]:
    "One attack: for every contestant the outcome, the medians over rounds, and the rounds."
    makers = contestants(s)
    calls = {name: make(s, model) for name, make in makers.items()}
    rows = race(calls, x, y, rounds)
    found = {}
    for name, make in makers.items():
        found[name] = {key: statistics.median(row[key] for row in rows[name]) for key in ('cpu', 'wall', 'ratio', 'to_clean')}
        found[name] |= {'peak_mib': peak_memory(calls[name], x, y)}
        found[name] |= {} if name in FLOORS else outcome(s, make, model, x, y)
        found[name] |= {'rounds': rows[name]}
    return found


# ----------------------------------------------------------------------------------------------------------- what to say


def table(case: str, found: dict[str, dict]) -> str:
    "One attack, one line for each contestant."
    lines = [f'{case:<28}{"CPU s":>9}{"ratio":>8}{"to clean":>10}{"robust acc.":>13}{"median size":>13}{"passes":>14}{"MiB":>7}']
    for name, row in found.items():
        line = f'  {name:<26}{row["cpu"]:9.4f}{row["ratio"]:7.2f}x{row["to_clean"]:9.2f}x'
        if name not in FLOORS:
            size = '–' if row['median_size'] is None else f'{row["median_size"]:.3f}'
            line += f'{row["robust_accuracy"]:13.4f}{size:>13}{row["forward"]:>7g} +{row["backward"]:>5g}'
        lines.append(f'{line:<94}{row["peak_mib"]:7.1f}')
    return '\n'.join(lines)


def targets(found: dict[str, dict]) -> list[tuple[str, float, bool]]:
    "What PGD-40 is held against: (in words, the number, whether it is met)."
    ours, peer, stopping = found['robustnb'], found['torchattacks'], found[STOP]
    against = statistics.median(a['cpu'] / b['cpu'] for a, b in zip(ours['rounds'], peer['rounds'], strict=True))
    equal, found_in = stopping['robust_accuracy'] <= ours['robust_accuracy'], []
    for key, where in (('ratio', 'the images that it passes through'), ('to_clean', 'the clean images')):
        found_in += [
            (f'PGD-40 in at most 1.10x the bare passes on {where}', ours[key], ours[key] <= 1.10),
            (f'keep_going=False in at most 0.35x those on {where}, at no higher robust accuracy', stopping[key],
             stopping[key] <= 0.35 and equal),
        ]  # fmt: skip
    return [*found_in, ('PGD-40 in at most 1.00x the time of torchattacks', against, round(against, 2) <= 1.0)]


@style()
def picture(cases: dict[str, dict], name: str):
    "Ratios to the bare passes: the median of each contestant as a dot, its rounds as a line from the least to the most."
    fig, ax = figure(height=0.9 + 0.32 * sum(len(found) - 2 for found in cases.values()) + 0.2 * len(cases))
    colors, place, ticks = dict(zip(['robustnb', *list(LIBRARIES)[1:], STOP], COLORS, strict=False)), 0.0, []
    for case, found in cases.items():
        for who in [who for who in found if who not in FLOORS]:
            ratios = [row['ratio'] for row in found[who]['rounds']]
            ax.plot([min(ratios), max(ratios)], [place, place], color=colors[who], alpha=0.5)
            ax.plot(found[who]['ratio'], place, 'o', color=colors[who], markersize=7)
            ax.annotate(f'{found[who]["ratio"]:.2f}', (max(ratios), place), (7, 0), textcoords='offset points', va='center')
            ticks.append((place, f'{case}   {who}'))
            place += 1
        ax.vlines(found[CLEAN]['ratio'], place - len(found) + 1.6, place - 0.6, color='#444444', linewidth=1, linestyle='--')
        place += 0.8
    ax.axvline(1, color='#444444', linewidth=1, linestyle=':')
    ax.set(xscale='log', title=f'Attacks on {name}', xlabel='CPU time, bare passes = 1 (dashed: on clean images)')
    ax.set_yticks(*zip(*ticks, strict=True))
    ax.set_xticks(marks := [t for t in (0.1, 0.25, 0.5, 1, 2, 4, 8) if ax.get_xlim()[0] <= t], [f'{t:g}' for t in marks])
    ax.minorticks_off()
    ax.invert_yaxis()
    ax.margins(x=0.12)
    return fig


def about(args: argparse.Namespace, name: str, clean: float) -> dict:
    "What a reader needs to run it again."
    libraries = ('torchattacks', 'foolbox', 'adversarial-robustness-toolbox', 'torchvision')
    return {
        'command': shlex.join(['python', 'tests/bench/attacks.py', *sys.argv[1:]]),
        'versions': provenance() | {library: version(library) for library in libraries},
        'date': datetime.date.today().isoformat(),
        'machine': f'{platform.system()} {platform.machine()}, {os.cpu_count()} cores',
        'threads': args.threads, 'rounds': args.rounds, 'seed': 0,
        'network': name, 'clean_accuracy': clean, 'batch': 128,
        'settings': {case: vars(s) for case, s in CASES.items()},
        'notes': 'cpu and wall: seconds of one call. ratio: cpu to that of the bare passes on the images that the attack passes '
        'through; to_clean: to that of those on the clean images. All are medians over the rounds. '
        f'In cw-50 ART takes {ART_CW_STEPS} steps',
    }  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rounds', type=int, default=7, help='how often each is measured (7)')
    parser.add_argument('--threads', type=int, default=1, help='threads of PyTorch (1)')
    parser.add_argument('--only', nargs='+', choices=CASES, default=list(CASES), help='the attacks to measure (all)')
    parser.add_argument('--out', type=Path, default=RESULTS, help='where the numbers go; the figure lies beside them')
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    name, model, x, y, clean = network()
    print(f'{name}, {clean:.2%} right, a batch of {len(x)}, {args.threads} thread(s), median of {args.rounds} rounds\n')
    cases = {}
    for case in args.only:
        cases[case] = measure(CASES[case], model, x, y, args.rounds)
        print(table(case, cases[case]), '\n', flush=True)
    reached = targets(cases['pgd-40']) if 'pgd-40' in cases else []
    for words, number, met in reached:
        print(f'{"ok" if met else "missed":<8}{number:5.2f}  {words}')
    args.out.parent.mkdir(parents=True, exist_ok=True)
    goals = [{'target': words, 'value': number, 'met': met} for words, number, met in reached]
    args.out.write_text(json.dumps(about(args, name, clean) | {'targets': goals, 'attacks': cases}, indent=1) + '\n')
    picture(cases, name).savefig(args.out.with_suffix('.png'), metadata={'Software': None})
    print(f'\nnumbers in {args.out.name}, drawn in {args.out.with_suffix(".png").name}')


if __name__ == '__main__':
    main()
