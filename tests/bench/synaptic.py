"""How long sweeps of synaptic filters take and how much memory: robustnb, and a sweep written as the published notebooks are.

Times are taken in one process, one contestant after the other, in the order of the list in even rounds and backwards in odd ones.
Memory is taken in processes of their own. See README.md.
"""

import argparse
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
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ |= {'OMP_WAIT_POLICY': 'passive', 'TQDM_DISABLE': '1'}
sys.path.append(str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from synaptic_reference import FILTERS, naive
from torch import nn

from robustnb.attacks import FGSM
from robustnb.data import DataSet, mnist
from robustnb.fragility import scores
from robustnb.models import build
from robustnb.responses import Responses
from robustnb.results import provenance
from robustnb.synaptic import sweep
from robustnb.training import fit, trained

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / 'data' / 'results' / 'bench_synaptic.json'
SEED, EPS = 0, 0.1
FEW, ENOUGH, WHOLE = 500, 2000, 10_000  # images: of the naive sweep that is extrapolated; of a sub-sample; of the test set
OURS, NAIVE = 'robustnb', 'naive'
AGAINST = ('original', 'filtered')  # the attack is made once on the untouched network, or on each filtered one
GIVES_BACK = {'MALLOC_MMAP_THRESHOLD_': '131072'}  # freed memory goes back at once, so what is resident is in use


class Case(NamedTuple):
    "A network, how many images and thresholds, and how many times faster the three comparisons should be."

    images: int
    thresholds: int
    same_attack: float
    published: float
    attacked_once: float


CASES = {'lenet5': Case(2000, 25, 2.2, 1.1, 7), 'resnet18': Case(64, 5, 1.7, 1.6, 4.5)}
Call = Callable[[], Any]


# ---------------------------------------------------------------------------------------------------- what is looked at


def data_root() -> Path:
    "The folder of real data sets, `ROBUSTNB_DATA` or shared/data beside the project."
    folder = Path(os.environ.get('ROBUSTNB_DATA') or ROOT.parent / 'shared' / 'data')
    if not (folder / 'MNIST').is_dir():
        raise SystemExit(f'this measurement needs MNIST, and {folder} does not have it; ROBUSTNB_DATA names another folder')
    return folder


@cache
def test_images() -> DataSet:
    return mnist(data_root(), download=False).test


def untrained_resnet18() -> nn.Module:
    return build('torchvision', SEED, arch='resnet18', classes=10, channels=1)


@cache
def network(name: str) -> nn.Module:
    "LeNet-5 of the package's recipe, or torchvision's ResNet-18 for one channel after a short training."
    if name == 'lenet5':
        return trained('lenet5', 'mnist', root=data_root(), show_progress=False)
    train = mnist(data_root(), download=False).train.take(3000, SEED)
    return fit(untrained_resnet18(), train, epochs=2, batch_size=100, seed=SEED, show_progress=False).model.eval()


def ours(model: nn.Module, data: DataSet, filters: tuple, thresholds: int, against: str = 'original', **how) -> Responses:
    "The library's sweep, on this device and in this process."
    how = {'against': against, 'seed': SEED, 'show_progress': False} | how
    return sweep(model, data, {'attacked': FGSM(EPS)}, filters, thresholds, **how)


def contestants(model: nn.Module, data: DataSet, filters: tuple, thresholds: int) -> dict[str, Call]:
    "Both sides, with both attacks."
    calls: dict[str, Call] = {}
    for against in AGAINST:
        calls[f'{NAIVE}, {against}'] = partial(naive, model, data.x, data.y, EPS, filters, thresholds, against)
        calls[f'{OURS}, {against}'] = partial(ours, model, data, filters, thresholds, against)
    return calls


# ---------------------------------------------------------------------------------------------------------- what it costs


def timed(call: Call) -> tuple[dict[str, float], Any]:
    "CPU seconds and seconds on the clock, and what was returned."
    gc.collect()
    cpu, wall = time.process_time(), time.perf_counter()
    said = call()
    return {'cpu': time.process_time() - cpu, 'wall': time.perf_counter() - wall}, said


def race(calls: dict[str, Call], rounds: int) -> tuple[dict[str, list[dict]], dict[str, Any]]:
    "The times of everybody in every round, and what each returned the last time."
    found: dict[str, list[dict]] = {name: [] for name in calls}
    said = {}
    for number in range(rounds):
        for name in list(calls)[:: -1 if number % 2 else 1]:
            seconds, said[name] = timed(calls[name])
            found[name].append(seconds)
            print(f'  {name:<20}{seconds["cpu"]:9.1f} CPU s', flush=True)
    return found, said


def times(found: dict[str, list[dict]], slow: str, fast: str) -> float:
    "How many times the CPU seconds of `fast` those of `slow` are, the median of the ratios within a round."
    return statistics.median(a['cpu'] / b['cpu'] for a, b in zip(found[slow], found[fast], strict=True))


# --------------------------------------------------------------------------------------------------- what the curves say


def counts(result: Responses, layer: str, kind: str, response: str) -> np.ndarray:
    "Right answers at each threshold, ascending."
    rows = result.curve(layer, kind, response).sort_values('threshold')
    return (rows['accuracy'] * rows['n']).round().to_numpy()


def differences(result: Responses, curves: dict) -> dict[str, float]:
    "The largest and the mean difference of any accuracy, clean and attacked, and how many thresholds differ at all."
    found: dict[str, float] = {}
    n = result.dataset.sizes['sample']
    for response, field in ('clean', 'clean'), ('attacked', 'attacked'):
        pairs = [(counts(result, *key, response), getattr(curve, field)) for key, curve in curves.items()]
        apart = np.abs(np.concatenate([a - b for a, b in pairs])) / n
        found |= {f'{response}, largest': float(apart.max()), f'{response}, mean': float(apart.mean())}
        found |= {f'{response}, thresholds': int((apart > 0).sum())}
    return found


def measure_network(name: str, case: Case, rounds: int) -> dict:
    "All four contestants on one network."
    model, data = network(name), test_images()[: case.images]
    for call in contestants(model, data[:20], FILTERS, 2).values():
        call()
    found, said = race(contestants(model, data, FILTERS, case.thresholds), rounds)
    plain = said[f'{OURS}, original']
    accuracy = plain.accuracy[0]
    return {
        'images': len(data), 'thresholds': case.thresholds, 'eps': EPS,
        'accuracy': {'clean': float(accuracy[0]), 'attacked': float(accuracy[1])},
        'evaluations': len(plain.layers) * len(FILTERS) * case.thresholds, 'states': plain.dataset.sizes['state'],
        'cpu': {who: statistics.median(row['cpu'] for row in rows) for who, rows in found.items()},
        'same attack': times(found, f'{NAIVE}, original', f'{OURS}, original'),
        'published': times(found, f'{NAIVE}, filtered', f'{OURS}, filtered'),
        'attacked once': times(found, f'{NAIVE}, filtered', f'{OURS}, original'),
        'difference': {
            'same attack': differences(plain, said[f'{NAIVE}, original']),
            'published': differences(said[f'{OURS}, filtered'], said[f'{NAIVE}, filtered']),
            'attacked once': differences(plain, said[f'{NAIVE}, filtered']),
        },
        'rounds': found,
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------ sub-samples and stopping


def intervals(result: Responses) -> dict[tuple[str, str, str], tuple[float, float, float]]:
    "The score, and the ends of its interval, of each layer, filter and kind."
    rows = scores(result, seed=SEED).table()
    return {(row.layer, row.filter, row.kind): (row.value, row.low, row.high) for row in rows.itertuples()}


def measure_sampling(case: Case, whole: int, how: dict, rounds: int) -> dict:
    "A sub-sample with early stopping, against the naive sweep of all images, and its scores against those of all images."
    model, data = network('lenet5'), test_images()[:whole]
    few = data[: min(FEW, whole)]
    calls = {
        f'{NAIVE}, {len(few)} images': partial(naive, model, few.x, few.y, EPS, FILTERS, case.thresholds, 'filtered'),
        OURS: partial(ours, model, data, FILTERS, case.thresholds, **how),
    }
    found, said = race(calls, rounds)
    full = {key: value for key, (value, _, _) in intervals(ours(model, data, FILTERS, case.thresholds)).items()}
    part = intervals(said[OURS])
    kinds = sorted({kind for _, _, kind in part})
    half = {kind: max((high - low) / 2 for (_, _, k), (_, low, high) in part.items() if k == kind) for kind in kinds}
    hits = {key: low <= full[key] <= high for key, (_, low, high) in part.items()}
    inside = {kind: float(np.mean([hit for key, hit in hits.items() if key[2] == kind])) for kind in kinds}
    looked = said[OURS].looked_at
    return {
        'images': len(data), 'thresholds': case.thresholds, 'naive on': len(few), 'how': how,
        'cpu': {who: statistics.median(row['cpu'] for row in rows) for who, rows in found.items()},
        'times': times(found, f'{NAIVE}, {len(few)} images', OURS) * len(data) / len(few),
        'images looked at, mean': float(looked[1:].sum((1, 2)).mean() / looked.shape[1]), 'states': len(looked),
        'half-width': half, 'inside': inside, 'rounds': found,
        'scores': {' | '.join(key): [full[key], *part[key]] for key in part},
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- memory


def status(key: str) -> float:
    "A line of /proc/self/status, in MiB."
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f'{key}:')) / 1024


def extra_memory(name: str, who: str, images: int) -> float:
    "How far the resident memory rises in a sweep of one filter at two thresholds, in MiB; after one with few images, to be warm."
    model, data = (network(name) if name == 'lenet5' else untrained_resnet18().eval()), test_images()[:images]
    contestants(model, data[:20], FILTERS[:1], 2)[who]()
    gc.collect()
    Path('/proc/self/clear_refs').write_text('5')  # the peak is now what is resident now
    before = status('VmRSS')
    contestants(model, data, FILTERS[:1], 2)[who]()
    return status('VmHWM') - before


def memory(cases: dict[str, Case], threads: int) -> dict[str, dict[str, float]]:
    "By the network and by who it was."
    found: dict[str, dict[str, float]] = {}
    for name, case in cases.items():
        for who in contestants(None, test_images(), FILTERS[:1], 2):
            command = [sys.executable, __file__, '--threads', str(threads), '--worker', name, who, str(case.images)]
            ran = subprocess.run(command, env=os.environ | GIVES_BACK, capture_output=True, text=True, check=True)
            found.setdefault(name, {})[who] = float(ran.stdout)
    return found


# ----------------------------------------------------------------------------------------------------------- what to say


def targets(found: dict) -> list[tuple[str, float, bool]]:
    "What robustnb is held against: (in words, the number, whether it is met)."
    goals: list[tuple[str, float, bool]] = []
    for name in CASES.keys() & found.keys():
        case, seen = CASES[name], found[name]
        wanted = {'same attack': case.same_attack, 'published': case.published, 'attacked once': case.attacked_once}
        words = {
            'same attack': 'one attack for all, on both sides',
            'published': 'an attack on each filtered network, on both sides',
            'attacked once': 'one attack for all here, one on each filtered network there',
        }
        for kind, least in wanted.items():
            goals.append((f'{name}, {words[kind]}: at least {least} times less CPU', seen[kind], seen[kind] >= least))
            apart = seen['difference'][kind]
            same = ['clean'] if kind == 'attacked once' else ['clean', 'attacked']
            largest = max(apart[f'{response}, largest'] for response in same)
            goals.append((f'{name}, {words[kind]}: equal curves ({", ".join(same)})', largest, largest == 0))
    if seen := found.get('sampling'):
        goals.append(('sub-sample and stopping: at least 40 times less CPU', seen['times'], seen['times'] >= 40))
        half, inside = seen['half-width']['attacked'], seen['inside']['attacked']
        goals.append(('half-width of the score under attack, 95 %: at most 0.025', half, half <= 0.025))
        goals.append(('the score of all images lies inside for at least 90 %', inside, inside >= 0.9))
    return goals


def about(args: argparse.Namespace) -> dict:
    "What a reader needs to run it again."
    return {
        'command': shlex.join(['python', 'tests/bench/synaptic.py', *sys.argv[1:]]),
        'versions': provenance(),
        'date': datetime.date.today().isoformat(),
        'machine': f'{platform.system()} {platform.machine()}, {os.cpu_count()} cores',
        'threads': args.threads, 'rounds': args.rounds, 'seed': SEED, 'data': 'the first test images of MNIST',
        'networks': {
            'lenet5': "LeNet-5, trained by the package's recipe",
            'resnet18': 'ResNet-18 of torchvision for one channel, trained on 3,000 images for two epochs',
        },
        'notes': 'cpu: CPU seconds of one sweep, the median over the rounds; same attack, published, attacked once: the CPU '
        'seconds of the naive sweep divided by ours, the median of the ratios within a round; difference: of the accuracies at '
        'any threshold, as a share of the images; scores: of all images, then of the sub-sample with the ends of its interval; '
        'memory: rise of the resident memory in MiB during a sweep of one filter at two thresholds, in a process of its own',
    }  # fmt: skip


EVERYTHING = (*CASES, 'sampling', 'memory')


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rounds', type=int, default=3, help='how often each is measured (3)')
    parser.add_argument('--threads', type=int, default=1, help='threads of PyTorch (1)')
    parser.add_argument('--only', nargs='+', choices=EVERYTHING, default=EVERYTHING, help='what to measure (all)')
    parser.add_argument('--images', type=int, help='of each sweep, instead of the numbers that the targets are about')
    parser.add_argument('--thresholds', type=int, help='instead of the numbers that the targets are about')
    parser.add_argument('--whole', type=int, default=WHOLE, help=f'images of which a sub-sample is taken ({WHOLE:,})')
    parser.add_argument('--samples', type=int, default=ENOUGH, help=f'images of the sub-sample ({ENOUGH:,})')
    parser.add_argument('--tolerance', type=float, default=0.025, help='where a filtered network is settled (0.025)')
    parser.add_argument('--refine', type=float, help='tolerance of the adaptive grid; by itself the whole grid')
    parser.add_argument('--out', type=Path, default=RESULTS, help='where the numbers go')
    parser.add_argument('--worker', nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


def sized(case: Case, args: argparse.Namespace) -> Case:
    return case._replace(images=args.images or case.images, thresholds=args.thresholds or case.thresholds)


def measure(name: str, args: argparse.Namespace) -> dict:
    "One case."
    cases = {key: sized(case, args) for key, case in CASES.items()}
    if name == 'memory':
        return memory(cases, args.threads) if Path('/proc/self/clear_refs').exists() else {}
    if name == 'sampling':
        how = {'samples': args.samples, 'tolerance': args.tolerance, 'refine': args.refine}
        return measure_sampling(cases['lenet5'], args.whole, how, args.rounds)
    return measure_network(name, cases[name], args.rounds)


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    if args.worker:
        name, who, images = args.worker
        print(extra_memory(name, who, int(images)))
        return
    print(f'MNIST; {args.threads} thread(s), median of {args.rounds} rounds')
    print('a machine that does something else as well disturbs even CPU seconds\n', flush=True)
    found = {}
    for name in args.only:
        print(name, flush=True)
        found[name] = measure(name, args)
        print({k: v for k, v in found[name].items() if k not in ('rounds', 'scores')}, '\n', flush=True)
    reached = targets(found)
    for words, number, met in reached:
        print(f'{"ok" if met else "missed":<8}{number:10.3g}  {words}')
    args.out.parent.mkdir(parents=True, exist_ok=True)
    goals = [{'target': words, 'value': number, 'met': met} for words, number, met in reached]
    args.out.write_text(json.dumps(about(args) | {'targets': goals} | found, indent=1) + '\n')
    print(f'\nnumbers in {args.out.name}')


if __name__ == '__main__':
    main()
