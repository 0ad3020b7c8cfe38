"""How long layer sustainability takes and how much memory, side by side: robustnb and LayersSustainabilityAnalysis 1.0.4.

All networks are flat Sequentials with activation modules, the only layout that the published package reads correctly, and both
give the same numbers. Times are taken in one process, one contestant after the other, in the order of the list in even rounds and
backwards in odd ones. Memory is taken in processes of their own. See README.md.
"""

import argparse
import copy
import datetime
import gc
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault('OMP_WAIT_POLICY', 'passive')
os.environ.setdefault('MPLBACKEND', 'Agg')  # the published package imports matplotlib.pyplot

import numpy as np
import torch
from LayerSustainabilityAnalysis import LayerSustainabilityAnalysis
from torch import Tensor, nn

from robustnb.devices import seeded
from robustnb.lsa import Comparison, compare
from robustnb.models import build
from robustnb.results import provenance

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / 'data' / 'results' / 'bench_lsa.json'
PUBLISHED, MENDED, OURS = 'published', 'published, mended', 'robustnb, compare'
STREAM, AT_ONCE = 'robustnb, Comparison', 'robustnb, one call'
BARE = 'bare passes'
SEED = 0

Job = tuple[Tensor, dict[str, Tensor]]  # clean images, perturbed ones by name
Run = Callable[[list[Job]], np.ndarray]  # jobs -> values (job, perturbation, layer)


# --------------------------------------------------------------------------------------------------- networks and images


def flat_vgg11() -> nn.Sequential:
    "The convolutions of VGG-11 for 32 by 32 pixels and one linear layer, in one flat Sequential."
    layers, channels = [], 3
    for width in (64, None, 128, None, 256, 256, None, 512, 512, None, 512, 512, None):
        if width is None:
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10))


def network(name: str) -> nn.Module:
    "An untrained network whose weights depend on `SEED` alone."
    if name == 'VGG-11':
        with seeded(SEED):
            return flat_vgg11().eval()
    return build('lsa_model_b', SEED).eval()


def images(name: str, n: int) -> Tensor:
    "Seeded noise in [0, 1] of the size that the network takes."
    shape = (3, 32, 32) if name == 'VGG-11' else (1, 28, 28)
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(SEED))


def perturbed(x: Tensor, eps: float, seed: int) -> Tensor:
    "Uniform noise of at most `eps`, clipped to [0, 1]."
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return (x + eps * noise).clamp(0, 1)


def jobs(net: str, n: int, perturbations: int = 1, apart: bool = False) -> list[Job]:
    "`n` images with their perturbed versions: as one job, or each image as a job of its own."
    x = images(net, n)
    perts = {f'noise {k}': perturbed(x, k * 8 / 255, seed=k) for k in range(1, perturbations + 1)}
    rows = [slice(i, i + 1) for i in range(n)] if apart else [slice(None)]
    return [(x[r], {name: p[r] for name, p in perts.items()}) for r in rows]


CASES = {  # name -> network, jobs, how often the jobs are gone through
    'single images': ('MNIST net', dict(n=300, apart=True), 3),
    'six perturbations': ('MNIST net', dict(n=128, perturbations=6), 1),
    'one batch': ('VGG-11', dict(n=64), 1),
}
# Network, images, whether the C library gives freed memory back at once. By itself it keeps what it may need again, in pieces
# of which many do not fit, so that more is resident than is in use.
FEW, MANY = ('MNIST net', 64, True), ('MNIST net', 1024, True)
MEMORY = [FEW, MANY, ('VGG-11', 64, True), ('MNIST net', 64, False), ('MNIST net', 1024, False)]
GIVES_BACK = {'MALLOC_MMAP_THRESHOLD_': '131072'}  # its default, which it then does not raise
MEMORY_ROUNDS = 3  # at most: they hardly differ, and each starts a Python
ROWS = 128  # of a forward pass of robustnb, and of the bare passes


# ------------------------------------------------------------------------------------------------------ who takes part


def published(model: nn.Module) -> Run:
    "The published package as its README calls it: one analysis of one model, asked again and again. It leaves hooks behind."
    analysis = LayerSustainabilityAnalysis(copy.deepcopy(model))
    return lambda jobs: np.array(
        [[analysis.representation_comparisons(x, pert, verbose=False) for pert in perts.values()] for x, perts in jobs]
    )


def mended(model: nn.Module) -> Run:
    "The published package, helped from outside: without gradients, and its hooks taken off after every call."
    analysis = LayerSustainabilityAnalysis(copy.deepcopy(model))

    def one(x: Tensor, pert: Tensor) -> list:
        with torch.no_grad():
            values = analysis.representation_comparisons(x, pert, verbose=False)
        for module in analysis.pretrained_model.modules():
            module._forward_hooks.clear()
        return values

    return lambda jobs: np.array([[one(x, pert) for pert in perts.values()] for x, perts in jobs])


def ours(model: nn.Module) -> Run:
    "robustnb: one call for each job, whatever the number of perturbations, with the measure of the published package."
    return lambda jobs: np.array(
        [compare(model, x, perts, measure='energy_relative_error').dataset['value'].values.T for x, perts in jobs]
    )


def streamed(model: nn.Module) -> Run:
    "robustnb: the jobs come one by one, to a `Comparison`. Its values are per image, which for single images are the same."

    def run(jobs: list[Job]) -> np.ndarray:
        comparison = Comparison(model, batch_size=ROWS)
        for x, perts in jobs:
            comparison.update(x, perts)
        return comparison.compute().dataset['value'].values.transpose(2, 1, 0)

    return run


def at_once(model: nn.Module) -> Run:
    "robustnb: one call for all jobs. Its values are per image, which for single images are the same."

    def run(jobs: list[Job]) -> np.ndarray:
        x = torch.cat([x for x, _ in jobs])
        perts = {name: torch.cat([perts[name] for _, perts in jobs]) for name in jobs[0][1]}
        return compare(model, x, perts).dataset['value'].values.transpose(2, 1, 0)

    return run


def bare(model: nn.Module) -> Run:
    "The floor: the forward passes over clean and perturbed images, and nothing else."

    @torch.no_grad()
    def run(jobs: list[Job]) -> None:
        for x, perts in jobs:
            for part in torch.cat([x, *perts.values()]).split(ROWS):
                model(part)

    return run


CONTESTANTS = {PUBLISHED: published, MENDED: mended, OURS: ours, STREAM: streamed, AT_ONCE: at_once, BARE: bare}


def contestants(case: str) -> dict[str, Callable[[nn.Module], Run]]:
    "Who takes part in a case. Values per image are another question unless every job is one image."
    return {name: make for name, make in CONTESTANTS.items() if name not in (STREAM, AT_ONCE) or case == 'single images'}


# ---------------------------------------------------------------------------------------------------------- what it costs


def apart(net: nn.Module, work: list[Job], makers: dict) -> dict[str, float]:
    "The largest difference of any value from that of the published package."
    expected = published(net)(work)
    return {name: float(np.abs(make(net)(work) - expected).max()) for name, make in makers.items() if name != BARE}


def timed(run: Run, work: list[Job]) -> dict[str, float]:
    "CPU seconds and seconds on the clock."
    gc.collect()
    cpu, wall = time.process_time(), time.perf_counter()
    run(work)
    return {'cpu': time.process_time() - cpu, 'wall': time.perf_counter() - wall}


def race(net: nn.Module, work: list[Job], makers: dict, passes: int, rounds: int) -> dict[str, list[list[dict]]]:
    "Times of every contestant, [round][pass]. In every round each begins on a fresh copy of the network."
    found = {name: [] for name in makers}
    for make in makers.values():
        make(net)(work[:10])  # warm
    for number in range(rounds):
        runs = {name: make(net) for name, make in makers.items()}
        for name in found:
            found[name].append([])
        for turn in range(passes):
            for name in list(makers)[:: -1 if (number + turn) % 2 else 1]:
                found[name][-1].append(timed(runs[name], work))
    return found


def measure(case: str, rounds: int) -> dict[str, dict]:
    "One case: for every contestant how far its values are from the published, the medians over rounds, and the rounds."
    name, what, passes = CASES[case]
    net, work, makers = network(name), jobs(name, **what), contestants(case)
    difference, found = apart(net, work, makers), race(net, work, makers, passes, rounds)
    return {
        who: {
            'difference': difference.get(who),
            'cpu': [statistics.median(row[turn]['cpu'] for row in rows) for turn in range(passes)],
            'faster': [faster(found[PUBLISHED], rows, turn) for turn in range(passes)],
            'rounds': rows,
        }
        for who, rows in found.items()
    }


def faster(theirs: list, rows: list, turn: int) -> float:
    "How many times the CPU seconds of these rounds the published package needs: the median over rounds."
    return statistics.median(a[turn]['cpu'] / b[turn]['cpu'] for a, b in zip(theirs, rows, strict=True))


# ------------------------------------------------------------------------------------------------------------- memory


def status(key: str) -> float:
    "A line of /proc/self/status, in MiB."
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f'{key}:')) / 1024


def extra_memory(who: str, name: str, n: int) -> float:
    "How far the resident memory of this process rises during one call, in MiB; after a call with two images, to be warm."
    net, (warm, work) = network(name), (jobs(name, 2), jobs(name, n))
    CONTESTANTS[who](net)(warm)
    run = CONTESTANTS[who](net)
    gc.collect()
    Path('/proc/self/clear_refs').write_text('5')  # the peak is now what is resident now
    before = status('VmRSS')
    run(work)
    return status('VmHWM') - before


def in_its_own_process(who: str, name: str, n: int, gives_back: bool, threads: int) -> float:
    "`extra_memory` in a fresh Python."
    command = [sys.executable, __file__, '--threads', str(threads), '--worker', json.dumps([who, name, n])]
    environment = os.environ | (GIVES_BACK if gives_back else {})
    return float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def memory(rounds: int, threads: int) -> list[dict]:
    "Medians over fresh processes, and what each found."
    found = []
    for cell in MEMORY:
        for who in (PUBLISHED, MENDED, OURS):
            each = [in_its_own_process(who, *cell, threads) for _ in range(rounds)]
            about = dict(zip(('network', 'images', 'gives_back'), cell, strict=True))
            found.append(about | {'who': who, 'mib': statistics.median(each), 'rounds': each})
    return found


# ----------------------------------------------------------------------------------------------------------- what to say


def table(case: str, found: dict[str, dict]) -> str:
    "One case, one line for each contestant."
    passes = len(found[OURS]['cpu'])
    head = ''.join(f'{f"pass {turn + 1}":>17}' for turn in range(passes)) if passes > 1 else f'{"":17}'
    lines = [f'{case:<28}{head}{"difference":>13}']
    for who, row in found.items():
        cells = ''.join(f'{cpu:9.3f} s {ratio:5.2f}x' for cpu, ratio in zip(row['cpu'], row['faster'], strict=True))
        lines.append(f'  {who:<26}{cells}' + ('' if row['difference'] is None else f'{row["difference"]:13.1e}'))
    return '\n'.join(lines)


def memory_table(rows: list[dict]) -> str:
    "One line for each network and number of images."
    sides = (PUBLISHED, MENDED, OURS)
    lines = [f'{"extra memory, MiB":<44}' + ''.join(f'{who:>19}' for who in sides)]
    for cell in MEMORY:
        name, n, gives_back = cell
        what = f'{name}, {n:,} images' + ('' if gives_back else ', resident')
        lines.append(f'  {what:<42}' + ''.join(f'{mib(rows, who, *cell):19.1f}' for who in sides))
    return '\n'.join(lines)


def mib(rows: list[dict], who: str, name: str, n: int, gives_back: bool) -> float:
    "The median of one cell."
    cell = (who, name, n, gives_back)
    return next(row['mib'] for row in rows if (row['who'], row['network'], row['images'], row['gives_back']) == cell)


def targets(cases: dict, rows: list[dict]) -> list[tuple[str, float, bool]]:
    "What robustnb is held against: (in words, the number, whether it is met)."
    found = []
    if cases:
        worst = max(
            row['difference'] for case in cases.values() for row in case.values() if row['difference'] is not None
        )
        found.append(('the same values, to 1e-6', worst, worst <= 1e-6))
    if singles := cases.get('single images'):
        speed, cpu = singles[STREAM]['faster'], singles[STREAM]['cpu']
        found += [
            ('single images, Comparison, first pass: at least 1.8 times as fast', speed[0], speed[0] >= 1.8),
            ('single images, Comparison, third pass: at least 3 times as fast', speed[2], speed[2] >= 3),
            ('single images, Comparison: its third pass in at most 1.1 times its first', cpu[2] / cpu[0], cpu[2] <= 1.1 * cpu[0]),
        ]
    if six := cases.get('six perturbations'):
        found.append(
            ('six perturbations: at least 1.5 times as fast', six[OURS]['faster'][0], six[OURS]['faster'][0] >= 1.5)
        )
    if rows:
        few, many, theirs = mib(rows, OURS, *FEW), mib(rows, OURS, *MANY), mib(rows, PUBLISHED, *MANY)
        found += [
            ('1,024 images: at most 1/15 of the extra memory', theirs / many, many * 15 <= theirs),
            ('its own memory equal within 10 % at 64 and 1,024 images', many / few, abs(many / few - 1) <= 0.1),
        ]
    return found


def about(args: argparse.Namespace) -> dict:
    "What a reader needs to run it again."
    return {
        'command': shlex.join(['python', 'tests/bench/lsa.py', *sys.argv[1:]]),
        'versions': provenance() | {'LayersSustainabilityAnalysis': version('LayersSustainabilityAnalysis')},
        'date': datetime.date.today().isoformat(),
        'machine': f'{platform.system()} {platform.machine()}, {os.cpu_count()} cores',
        'threads': args.threads, 'rounds': args.rounds, 'seed': SEED,
        'networks': {'MNIST net': 'lsa_model_b, 28 x 28', 'VGG-11': 'flat, 32 x 32'},
        'settings': {case: {'network': net, **what, 'passes': passes} for case, (net, what, passes) in CASES.items()},
        'notes': 'cpu and wall: seconds of one pass over all jobs, medians over the rounds; faster: CPU seconds of the published '
        'package divided by those of this line, the median of the ratios within a round; difference: the largest of any value '
        'from the published one; mib: rise of the resident memory during one call, in a process of its own; gives_back: with '
        'MALLOC_MMAP_THRESHOLD_ set, so that freed memory is given back at once',
    }  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rounds', type=int, default=5, help='how often each is measured (5)')
    parser.add_argument('--threads', type=int, default=1, help='threads of PyTorch (1)')
    parser.add_argument(
        '--only', nargs='+', choices=[*CASES, 'memory'], default=[*CASES, 'memory'], help='what to measure (all)'
    )
    parser.add_argument('--out', type=Path, default=RESULTS, help='where the numbers go')
    parser.add_argument('--worker', type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    if args.worker:
        print(extra_memory(*args.worker))
        return
    print(
        f'{args.threads} thread(s), median of {args.rounds} rounds; CPU seconds, and how many times as fast as published\n'
    )
    cases = {}
    for case in [case for case in args.only if case in CASES]:
        cases[case] = measure(case, args.rounds)
        print(table(case, cases[case]), '\n', flush=True)
    rows = []
    if 'memory' in args.only and Path('/proc/self/clear_refs').exists():  # on Linux
        rows = memory(min(args.rounds, MEMORY_ROUNDS), args.threads)
        print(memory_table(rows), '\n')
    reached = targets(cases, rows)
    for words, number, met in reached:
        print(f'{"ok" if met else "missed":<8}{number:8.2g}  {words}')
    args.out.parent.mkdir(parents=True, exist_ok=True)
    goals = [{'target': words, 'value': number, 'met': met} for words, number, met in reached]
    args.out.write_text(json.dumps(about(args) | {'targets': goals, 'cases': cases, 'memory': rows}, indent=1) + '\n')
    print(f'\nnumbers in {args.out.name}')


if __name__ == '__main__':
    main()
