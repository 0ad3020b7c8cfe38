"""How long importance takes, side by side: robustnb, and Captum layer by layer, and scikit-learn unit by unit.

Times are taken in one process, one contestant after the other, in the order of the list in even rounds and backwards in odd ones.
Memory is taken in processes of their own. See README.md.
"""

import argparse
import copy
import datetime
import gc
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ |= {'OMP_WAIT_POLICY': 'passive', 'TQDM_DISABLE': '1'}

import captum.attr as captum
import numpy as np
import torch
from captum.attr._utils.lrp_rules import EpsilonRule
from sklearn.cluster import KMeans
from sklearn.metrics import silhouette_score
from torch import Tensor, nn

from robustnb.attribution import Passes, _lent, as_method, relevance, unit_relevance
from robustnb.coverage import Coverage, _distinct
from robustnb.data import mnist
from robustnb.idc import IDC, Clustering
from robustnb.models import build
from robustnb.results import provenance
from robustnb.stats import kmeans_1d, silhouette_1d
from robustnb.training import trained

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / 'data' / 'results' / 'bench_idc.json'
N, T, M, BATCH = 2000, 1000, 10, 128  # training images, test images, important units, images per step
FEW, STEPS = 32, 50  # images and steps of the voting
POINTS = 10_000  # values whose silhouette is taken
SEED = 0
OURS, PEER = 'robustnb', 'peer'
LAYERS = ('conv1', 'conv2', 'linear1', 'linear2', 'linear3')
GIVES_BACK = {'MALLOC_MMAP_THRESHOLD_': '131072'}  # freed memory goes back at once, so what is resident is in use


# ---------------------------------------------------------------------------------------------------- what is looked at


def data_root() -> Path | None:
    "The folder of real data sets, `ROBUSTNB_DATA` or shared/data beside the project, if there is one."
    folder = Path(os.environ.get('ROBUSTNB_DATA') or ROOT.parent / 'shared' / 'data')
    return folder if (folder / 'MNIST').is_dir() else None


def work() -> tuple[str, nn.Module, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    "LeNet-5 with images of MNIST, or untrained with noise where there is no MNIST; and which of the two."
    root = data_root()
    if root is None:
        model, chance = build('lenet5', SEED).eval(), torch.Generator().manual_seed(SEED)
        x, y = torch.rand(N + T, 1, 28, 28, generator=chance), torch.arange(N + T) % 10
        return 'LeNet-5, untrained, noise instead of images', model, (x[:N], y[:N]), (x[N:], y[N:])
    (train, test), model = mnist(root, download=False), trained('lenet5', 'mnist', root=root)
    return 'LeNet-5 on MNIST', model, (train.x[:N], train.y[:N]), (test.x[:T], test.y[:T])


# ------------------------------------------------------------------------------------------------------ who takes part


def peer_lrp(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    "Captum, one pass for each layer: it has no rule for `Flatten`, and is given one each time."
    found = {}
    for name in LAYERS:
        model.flatten.rule = EpsilonRule()
        found[name] = captum.LayerLRP(model, getattr(model, name)).attribute(x, target=y)
    return found


def peer(kind: str, how: dict, model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    "One of Captum's methods, one call for each layer."
    method = getattr(captum, kind)
    return {name: method(model, getattr(model, name)).attribute(x, **how(x, y)) for name in LAYERS}


PEERS: dict[str, Callable] = {
    'lc': partial(peer, 'LayerConductance', lambda x, y: {'target': y, 'n_steps': STEPS}),
    'la': partial(peer, 'LayerActivation', lambda x, y: {}),
    'ii': partial(peer, 'InternalInfluence', lambda x, y: {'target': y, 'n_steps': STEPS}),
    'ldl': partial(peer, 'LayerDeepLift', lambda x, y: {'target': y, 'baselines': 0}),
    'ldls': partial(peer, 'LayerDeepLiftShap', lambda x, y: {'target': y, 'baselines': torch.zeros_like(x)}),
    'lgs': partial(peer, 'LayerGradientShap', lambda x, y: {'target': y, 'baselines': torch.zeros_like(x[:1])}),
    'lig': partial(peer, 'LayerIntegratedGradients', lambda x, y: {'target': y, 'n_steps': STEPS}),
    'lrp': peer_lrp,
}


def attribution(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Callable[[], dict[str, np.ndarray]]]:
    "Mean relevance of every unit of every layer, by both."

    def ours() -> dict[str, np.ndarray]:
        return relevance(model, (x, y), 'lrp', batch_size=BATCH, show_progress=False).scores('signed')

    def theirs() -> dict[str, np.ndarray]:
        sums: dict[str, Any] = dict.fromkeys(LAYERS, 0)
        for part, labels in zip(x.split(BATCH), y.split(BATCH), strict=True):
            for name, rows in unit_relevance(other, peer_lrp(other, part, labels)).items():
                sums[name] = sums[name] + rows.detach().sum(0)
        return {name: total.double().numpy() / len(x) for name, total in sums.items()}

    other = copy.deepcopy(model)  # Captum leaves rules behind
    return {OURS: ours, PEER: theirs}


class Apart(nn.Module):
    """Hands on a copy. Captum hooks the tensor between a ReLU and a pooling twice, and the ReLU then reads a gradient that the
    pooling has not corrected yet, so its DeepLIFT is another one; with a copy in between it is the published one."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clone()


def parted(model: nn.Sequential) -> nn.Sequential:
    "The same network, with a copy before every pooling."
    layers = {}
    for name, layer in copy.deepcopy(model).named_children():
        if isinstance(layer, nn.MaxPool2d):
            layers[f'before_{name}'] = Apart()
        layers[name] = layer
    return nn.Sequential(OrderedDict(layers)).eval()


def voting(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Callable[[], dict[str, dict[str, Tensor]]]]:
    "Relevance of one batch by the eight methods of the vote: a shared `Passes`, or Captum method by method and layer by layer."
    methods = {code: as_method(code) for code in PEERS}

    def ours() -> dict[str, dict[str, Tensor]]:
        with _lent(model):
            batch = Passes(model, x, y)
            return {code: method.attribute(batch) for code, method in methods.items()}

    whole, split = copy.deepcopy(model), parted(model)
    networks = {code: split if code in ('ldl', 'ldls') else whole for code in PEERS}
    return {OURS: ours, PEER: lambda: {code: call(networks[code], x, y) for code, call in PEERS.items()}}


def silhouettes() -> dict[str, Callable[[], float]]:
    "The mean silhouette of values on a line, three clusters."
    values = np.random.default_rng(SEED).normal(size=POINTS) ** 2
    centres = kmeans_1d(values, 3)
    labels = np.abs(values[:, None] - centres).argmin(1)
    return {OURS: lambda: silhouette_1d(values, centres), PEER: lambda: silhouette_score(values[:, None], labels)}


def assignment(model: nn.Module, train, suite) -> dict[str, Callable[[], int]]:
    "Which combinations the test images make, from the values of their units: `IDC`, or `KMeans.predict` value by value."
    coverage = Coverage(model, IDC(M, clustering=Clustering(2)), batch_size=BATCH, show_progress=False).learn(train)
    fitted = coverage.criteria['IDC'].fitted()
    rows = torch.cat([coverage.criteria['IDC'].learned().pick(found)[0] for found in coverage.walk(suite)]).cpu()
    classes = torch.zeros(len(rows), dtype=torch.long)
    trained_rows = coverage.criteria['IDC'].learned().state['rows'].double().numpy()
    peers = [KMeans(2, n_init=10, random_state=42).fit(column[:, None]) for column in trained_rows.T]

    def ours() -> int:
        parts = zip(rows.split(BATCH), classes.split(BATCH), strict=True)
        return len(_distinct(torch.cat([fitted.keys(part, one)[0] for part, one in parts])))

    def theirs() -> int:
        found = set()
        for row in rows.double().numpy():
            found.add(tuple(int(one.predict(np.array([[value]]))[0]) for one, value in zip(peers, row, strict=True)))
        return len(found)

    return {OURS: ours, PEER: theirs}


# ---------------------------------------------------------------------------------------------------------- what it costs


def timed(call: Callable[[], Any], repeats: int) -> dict[str, float]:
    "CPU seconds and seconds on the clock, of one call."
    gc.collect()
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(repeats):
        call()
    return {'cpu': (time.process_time() - cpu) / repeats, 'wall': (time.perf_counter() - wall) / repeats}


def race(calls: dict[str, Callable[[], Any]], rounds: int) -> tuple[dict[str, dict], dict[str, Any]]:
    "Median times of both and how many times ours the peer needs, and what each returned in the call that warmed it up."
    said, repeats = {}, {}
    for name, call in calls.items():
        start = time.process_time()
        said[name] = call()
        repeats[name] = min(1000, math.ceil(0.1 / max(time.process_time() - start, 1e-6)))
    found: dict[str, list[dict]] = {name: [] for name in calls}
    for number in range(rounds):
        for name in list(calls)[:: -1 if number % 2 else 1]:
            found[name].append(timed(calls[name], repeats[name]))
    times = statistics.median(b['cpu'] / a['cpu'] for a, b in zip(found[OURS], found[PEER], strict=True))
    cpu = {name: statistics.median(row['cpu'] for row in rows) for name, rows in found.items()}
    return {'cpu': cpu, 'times': times, 'rounds': found}, said


def difference(ours: Any, theirs: Any) -> float:
    "The largest difference of any value, as a share of the largest value of its layer."
    if isinstance(ours, dict):
        return max(difference(ours[name], theirs[name]) for name in theirs)
    ours, theirs = (np.asarray(torch.as_tensor(one).detach(), float) for one in (ours, theirs))
    return float(np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-12))


def measure_voting(model: nn.Module, x: Tensor, y: Tensor, rounds: int) -> dict:
    "All eight methods at once, and how far each is from Captum's."
    found, said = race(voting(model, x, y), rounds)
    apart = {code: difference(unit_relevance(model, said[OURS][code]), unit_relevance(model, said[PEER][code])) for code in PEERS}
    return found | {'difference': apart}


# ------------------------------------------------------------------------------------------------------------- memory


class Noise:
    "Batches of noise, made when they are asked for, as often as they are."

    def __init__(self, images: int):
        self.images = images

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        chance = torch.Generator().manual_seed(SEED)
        for start in range(0, self.images, BATCH):
            size = min(BATCH, self.images - start)
            yield torch.rand(size, 1, 28, 28, generator=chance), torch.arange(size) % 10


def status(key: str) -> float:
    "A line of /proc/self/status, in MiB."
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f'{key}:')) / 1024


def extra_memory(images: int) -> float:
    "How far the resident memory rises while `IDC` learns from so many images, in MiB; after a few, to be warm."
    model = build('lenet5', SEED).eval()

    def learn(data: Iterable) -> None:
        Coverage(model, IDC(M, clustering=Clustering(2)), batch_size=BATCH, show_progress=False).learn(data)

    learn(Noise(2 * BATCH))
    gc.collect()
    Path('/proc/self/clear_refs').write_text('5')  # the peak is now what is resident now
    before = status('VmRSS')
    learn(Noise(images))
    return status('VmHWM') - before


def memory(threads: int) -> dict[str, float]:
    "By the number of training images."
    found = {}
    for images in (N, 4 * N, 16 * N):
        command = [sys.executable, __file__, '--threads', str(threads), '--worker', str(images)]
        ran = subprocess.run(command, env=os.environ | GIVES_BACK, capture_output=True, text=True, check=True)
        found[str(images)] = float(ran.stdout)
    return found


# ----------------------------------------------------------------------------------------------------------- what to say


def targets(found: dict) -> list[tuple[str, float, bool]]:
    "What robustnb is held against: (in words, the number, whether it is met)."
    goals = []
    if 'attribution' in found:
        times, apart = found['attribution']['times'], found['attribution']['difference']
        goals.append(('attribution of all layers: at least 10 times less CPU than one LayerLRP for each', times, times >= 10))
        goals.append(('the same relevance, relative to 1e-4', apart, apart <= 1e-4))
    if 'assignment' in found:
        speed = T / found['assignment']['cpu'][OURS]
        goals.append(('assignment: at least 100,000 images a second', speed, speed >= 100_000))
    if 'silhouette' in found:
        times = found['silhouette']['times']
        goals.append((f'exact silhouette of {POINTS:,} values: at least 100 times as fast as scikit-learn', times, times >= 100))
    if 'voting' in found:
        times, apart = found['voting']['times'], max(d for code, d in found['voting']['difference'].items() if code != 'lgs')
        goals.append(('voting: at least 3 times less CPU than method by method, layer by layer', times, times >= 3))
        goals.append(('each method equals that of Captum to 1e-4, but for lgs, which draws lots', apart, apart <= 1e-4))
    if 'memory' in found:
        few, many = found['memory'][str(N)], found['memory'][str(16 * N)]
        trace = 15 * N * M * 4 / 2**20
        words = f'memory for {16 * N:,} images above that for {N:,}: at most 3 tables of {M} numbers, {trace:.1f} MiB, and 8 MiB'
        goals.append((words, many - few, many - few <= 3 * trace + 8))
    return goals


def about(args: argparse.Namespace, what: str) -> dict:
    "What a reader needs to run it again."
    return {
        'command': shlex.join(['python', 'tests/bench/idc.py', *sys.argv[1:]]),
        'versions': provenance() | {name: version(name) for name in ('captum', 'scikit-learn')},
        'date': datetime.date.today().isoformat(),
        'machine': f'{platform.system()} {platform.machine()}, {os.cpu_count()} cores',
        'threads': args.threads, 'rounds': args.rounds, 'seed': SEED,
        'network': what, 'training images': N, 'test images': T, 'important units': M, 'batch': BATCH,
        'notes': 'cpu: CPU seconds of one call, the median over the rounds; times: those of the peer divided by ours, the median '
        'of the ratios within a round; difference: the largest of any value, relative to the largest value of its layer; memory: '
        'rise of the resident memory in MiB while IDC learns from so many images made on the way, in a process of its own',
    }  # fmt: skip


CASES = ('attribution', 'assignment', 'silhouette', 'voting', 'memory')


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rounds', type=int, default=5, help='how often each is measured (5)')
    parser.add_argument('--threads', type=int, default=1, help='threads of PyTorch (1)')
    parser.add_argument('--only', nargs='+', choices=CASES, default=CASES, help='what to measure (all)')
    parser.add_argument('--out', type=Path, default=RESULTS, help='where the numbers go')
    parser.add_argument('--worker', type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(case: str, model: nn.Module, train, suite, rounds: int, threads: int) -> dict:
    "One case."
    if case == 'memory':
        return memory(threads) if Path('/proc/self/clear_refs').exists() else {}
    if case == 'voting':
        return measure_voting(model, *(one[:FEW] for one in train), rounds)
    calls = {'attribution': lambda: attribution(model, *train), 'silhouette': silhouettes,
             'assignment': lambda: assignment(model, train, suite)}[case]()  # fmt: skip
    found, said = race(calls, rounds)
    return found | {'difference': difference(said[OURS], said[PEER])}


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    warnings.simplefilter('ignore')  # Captum says that it puts hooks on modules
    if args.worker:
        print(extra_memory(args.worker))
        return
    what, model, train, suite = work()
    print(f'{what}, {N:,} training and {T:,} test images; {args.threads} thread(s), median of {args.rounds} rounds')
    print('a machine that does something else as well disturbs even CPU seconds\n', flush=True)
    found = {}
    for case in args.only:
        found[case] = measure(case, model, train, suite, args.rounds, args.threads)
        words = {k: v for k, v in found[case].items() if k != 'rounds'}
        print(f'{case:<14}{words}', flush=True)
    reached = targets(found)
    for words, number, met in reached:
        print(f'{"ok" if met else "missed":<8}{number:10.3g}  {words}')
    args.out.parent.mkdir(parents=True, exist_ok=True)
    goals = [{'target': words, 'value': number, 'met': met} for words, number, met in reached]
    args.out.write_text(json.dumps(about(args, what) | {'targets': goals} | found, indent=1) + '\n')
    print(f'\nnumbers in {args.out.name}')


if __name__ == '__main__':
    main()
