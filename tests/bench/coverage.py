"""How long coverage and surprise adequacy take and how much memory, side by side: robustnb and dnn-tip 0.1.1.

Both get the same activations, arrays of single precision that robustnb took from LeNet-5, and give the same values. After that,
several criteria over the images themselves, against the bare forward pass. Times are taken in one process, one contestant after
the other, in the order of the list in even rounds and backwards in odd ones. Memory is taken in processes of their own. See
README.md.
"""

import argparse
import contextlib
import datetime
import gc
import io
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ |= {'OMP_WAIT_POLICY': 'passive', 'TQDM_DISABLE': '1'}  # dnn-tip shows a bar

import numpy as np
import torch
from dnn_tip.surprise import DSA, LSA, MDSA
from peers_coverage import BATCH, Pair, Seen, arrays, covered, facts_of, kmnc, look, nbc, nc, ranges_of, snac, tknc
from torch import Tensor, nn

from robustnb.coverage import Coverage
from robustnb.models import build
from robustnb.results import provenance
from robustnb.surprise import DistanceSurprise, LikelihoodSurprise, MahalanobisSurprise

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / 'data' / 'results' / 'bench_coverage.json'
OURS, THEIRS, PROFILES = 'robustnb', 'dnn-tip', 'dnn-tip, profiles alone'
BARE, NOTHING, SIX = 'bare forward pass', 'no criterion', 'NC KMNC NBC SNAC TKNC TKNP'
N, T, MANY = 2000, 1000, 10000  # training images; test images, and those of the longer suite
SEED = 0
LEAST_SECONDS = 0.1  # a measurement repeats its call until it takes as long
DSA_ROUNDS = 2  # at most: dnn-tip takes about a minute for each
MEMORY_ROUNDS = 3  # at most: they hardly differ, and each starts a Python
LSA_UNITS = 30  # those that vary most
GIVES_BACK = {'MALLOC_MMAP_THRESHOLD_': '131072'}  # freed memory goes back at once, so what is resident is in use


# ---------------------------------------------------------------------------------------------------- what is looked at


@dataclass(frozen=True)
class Work:
    "A network, training and test images, and their activations."

    model: nn.Module
    x_train: Tensor
    x: Tensor
    train: Seen
    suite: Seen

    def save(self, path: Path) -> None:
        "Write it, for another process."
        parts = {'train': self.train, 'suite': self.suite}
        seen = {name: {'layers': part.layers, 'classes': part.classes} for name, part in parts.items()}
        torch.save({'model': self.model.state_dict(), 'x_train': self.x_train, 'x': self.x, **seen}, path)

    @classmethod
    def load(cls, path: str) -> 'Work':
        "Read it."
        found = torch.load(path, weights_only=True)
        model = build('lenet5')
        model.load_state_dict(found['model'])
        return cls(model.eval(), found['x_train'], found['x'], Seen(**found['train']), Seen(**found['suite']))


def work() -> tuple[str, Work]:
    "LeNet-5 with images of MNIST, or untrained with noise where there is no MNIST; and which of the two."
    from peers import data_root, lenet, mnist  # here, because it takes seconds

    if data_root() is None:
        what, model = 'LeNet-5, untrained, noise instead of images', build('lenet5', SEED).eval()
        train, x = torch.rand(N + MANY, 1, 28, 28, generator=torch.Generator().manual_seed(SEED)).split([N, MANY])
    else:
        what, (model, test) = 'LeNet-5 on MNIST', lenet()
        train, x = mnist(data_root(), download=False).train.x[:N], test.x[:MANY]
    return what, Work(model, train, x, look(model, train), look(model, x[:T]))


# ------------------------------------------------------------------------------------------------------ who takes part


@dataclass(frozen=True)
class Side:
    "One way to do a thing: what is made of the training activations, and what that says about the test activations."

    build: Callable[[Seen], Any]
    assess: Callable[[Any, Seen], np.ndarray | float]


def sides_of(pair: Pair) -> dict[str, Side]:
    "Both sides of a coverage criterion. dnn-tip gives profiles of samples, and the union is taken of them here."

    def ours(known, suite: Seen) -> float:
        criterion = pair.ours(known)
        for batch in suite.batches():
            criterion.update(batch)
        return criterion.compute()

    def theirs(known):
        return pair.theirs(facts_of(arrays(known.batches())) if pair.learns else None)

    def profiles(method, suite: Seen) -> float:
        for batch in arrays(suite.batches()):
            method(batch)
        return math.nan

    return {
        OURS: Side(lambda train: ranges_of(train.batches()) if pair.learns else None, ours),
        THEIRS: Side(theirs, lambda method, suite: covered(method, arrays(suite.batches())).mean()),
        PROFILES: Side(theirs, profiles),
    }


def surprise(adequacy, theirs: Callable, select: Callable[[Seen], tuple[np.ndarray, np.ndarray]]) -> dict[str, Side]:
    "Both sides of a surprise adequacy; `select` gives traces and classes."

    def tensors(seen: Seen) -> tuple[Tensor, Tensor]:
        rows, classes = select(seen)
        return torch.from_numpy(rows), torch.from_numpy(classes)

    return {
        OURS: Side(lambda train: adequacy.fit(tensors(train)), lambda fitted, suite: fitted(*tensors(suite)).numpy()),
        THEIRS: Side(lambda train: theirs(*select(train)), lambda known, suite: known(*select(suite))),
    }


def by_class(seen: Seen) -> tuple[np.ndarray, np.ndarray]:
    "All layers side by side, and the predicted classes."
    return seen.all(), seen.classes.numpy()


def as_one(seen: Seen) -> tuple[np.ndarray, np.ndarray]:
    "All layers side by side, and one class for all."
    return seen.all(), np.zeros(len(seen), dtype=np.int64)


CASES: dict[str, dict[str, Side]] = {
    'NC 0.5': sides_of(nc(0.5)),
    'KMNC 1000': sides_of(kmnc(1000)),
    'NBC': sides_of(nbc()),
    'SNAC': sides_of(snac()),
    'TKNC 10': sides_of(tknc(10)),
    'DSA': surprise(DistanceSurprise(), DSA, by_class),
    'MDSA': surprise(MahalanobisSurprise(shrinkage=0, squared=True), lambda rows, _: MDSA(rows), as_one),
    f'LSA {LSA_UNITS}': surprise(
        LikelihoodSurprise(min_variance=0, max_units=LSA_UNITS), lambda rows, _: LSA(rows, max_features=LSA_UNITS), as_one
    ),
}  # fmt: skip


def bare(model: nn.Module, x: Tensor) -> Callable[[], Any]:
    "The floor: the forward passes and nothing else."

    @torch.no_grad()
    def run() -> None:
        for part in x.split(BATCH):
            model(part)

    return run


def labelled(x: Tensor) -> tuple[Tensor, Tensor]:
    "Images with labels that nobody looks at."
    return x, torch.zeros(len(x), dtype=torch.long)


def watched(criteria: list[str], work: Work, x: Tensor) -> Callable[[], Any]:
    "One pass over the images with these criteria, after one over the training images that nobody times."
    coverage = Coverage(work.model, criteria, batch_size=BATCH, show_progress=False)
    coverage.learn(labelled(work.x_train))

    def run() -> dict[str, float]:
        coverage.reset()
        return coverage.update(labelled(x)).compute()

    return run


PASSES = {  # name -> criteria of one pass, on how many images
    NOTHING: ([], (T, MANY)),
    SIX: (SIX.split(), (T, MANY)),
    'CC': (['CC'], (T,)),
    'NLC': (['NLC'], (T, MANY)),
}


def passes(work: Work, images: int) -> dict[str, Callable[[], Callable[[], Any]]]:
    "Who takes part in passes over so many images, each still to be made."
    x = work.x[:images]
    return {BARE: partial(bare, work.model, x)} | {
        name: partial(watched, criteria, work, x) for name, (criteria, sizes) in PASSES.items() if images in sizes
    }


# ---------------------------------------------------------------------------------------------------------- what it costs


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    "dnn-tip prints, and warns of a version of scipy that is newer than it."
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield


def timed(call: Callable[[], Any], repeats: int) -> dict[str, float]:
    "CPU seconds and seconds on the clock, of one call."
    gc.collect()
    with quiet():
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(repeats):
            call()
        return {'cpu': (time.process_time() - cpu) / repeats, 'wall': (time.perf_counter() - wall) / repeats}


def race(calls: dict[str, Callable[[], Any]], rounds: int) -> tuple[dict[str, list[dict]], dict[str, Any]]:
    "Times of every contestant, round by round, and what each returned in the call that warmed it up."
    said, repeats = {}, {}
    for name, call in calls.items():
        start = time.process_time()
        with quiet():
            said[name] = call()
        repeats[name] = min(1000, math.ceil(LEAST_SECONDS / max(time.process_time() - start, 1e-6)))
    found = {name: [] for name in calls}
    for number in range(rounds):
        for name in list(calls)[:: -1 if number % 2 else 1]:
            found[name].append(timed(calls[name], repeats[name]))
    return found, said


def measure(case: str, work: Work, rounds: int) -> dict[str, dict]:
    "One case: what each says, how far apart that is, and the times of both halves of the work."
    sides = CASES[case]
    rounds = min(rounds, DSA_ROUNDS) if case == 'DSA' else rounds
    building, known = race({name: partial(side.build, work.train) for name, side in sides.items()}, rounds)
    assessing, said = race(
        {name: partial(side.assess, known[name], work.suite) for name, side in sides.items()}, rounds
    )
    return {
        name: {
            'value': float(np.mean(said[name])),
            'difference': difference(said[name], said[THEIRS]),
            'build': medians(building, name, THEIRS),
            'assess': medians(assessing, name, THEIRS),
        }
        for name in sides
    }


def difference(ours: np.ndarray | float, theirs: np.ndarray | float) -> float:
    "The largest relative difference of any value."
    return float(np.max(np.abs(ours - theirs) / np.maximum(np.abs(theirs), 1e-12)))


def medians(found: dict[str, list[dict]], name: str, other: str) -> dict:
    "Median CPU seconds, how many times those of `other` they are, and the rounds."
    ratios = [a['cpu'] / b['cpu'] for a, b in zip(found[name], found[other], strict=True)]
    cpu = statistics.median(row['cpu'] for row in found[name])
    return {'cpu': cpu, 'times': statistics.median(ratios), 'rounds': found[name]}


def measure_passes(work: Work, rounds: int) -> list[dict]:
    "Passes over images, held against the bare forward pass of the same round."
    rows = []
    for images in (T, MANY):
        calls = {name: make() for name, make in passes(work, images).items()}
        found, said = race(calls, rounds)
        rows += [{'images': images, 'who': name, 'values': said[name], **medians(found, name, BARE)} for name in calls]
    return rows


# ------------------------------------------------------------------------------------------------------------- memory


def status(key: str) -> float:
    "A line of /proc/self/status, in MiB."
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f'{key}:')) / 1024


def extra_memory(path: str, case: str, who: str) -> float:
    "How far the resident memory of this process rises during one call, in MiB; after a call with few images, to be warm."
    job = Work.load(path)
    if case in CASES:
        side = CASES[case][who]
        with quiet():
            known = side.build(job.train)
            side.assess(
                known, Seen({name: rows[:20] for name, rows in job.suite.layers.items()}, job.suite.classes[:20])
            )
        call = partial(side.assess, known, job.suite)
    else:
        few, call = (passes(replace(job, x=x), int(case))[who]() for x in (job.x[:BATCH], job.x))
        few()
    gc.collect()
    Path('/proc/self/clear_refs').write_text('5')  # the peak is now what is resident now
    before = status('VmRSS')
    with quiet():
        call()
    return status('VmHWM') - before


def memory(job: Work, cases: list[str], rounds: int, threads: int) -> list[dict]:
    "Medians over fresh processes, and what each found."
    cells = [(case, who) for case in cases for who in CASES[case] if who != PROFILES]
    cells += [(str(images), who) for images in (T, MANY) for who in (BARE, SIX)]
    found = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'work.pt'
        job.save(path)
        for case, who in cells:
            command = [
                sys.executable,
                __file__,
                '--threads',
                str(threads),
                '--worker',
                json.dumps([str(path), case, who]),
            ]
            each = [
                float(
                    subprocess.run(
                        command, env=os.environ | GIVES_BACK, capture_output=True, text=True, check=True
                    ).stdout
                )
                for _ in range(1 if case == 'DSA' else rounds)  # of dnn-tip it takes a minute
            ]
            found.append({'case': case, 'who': who, 'mib': statistics.median(each), 'rounds': each})
    return found


# ----------------------------------------------------------------------------------------------------------- what to say


def table(cases: dict[str, dict], forward: float) -> str:
    "One line for each case: CPU milliseconds, how many times as fast as dnn-tip, without and with the forward pass."
    head = f'{"on arrays, ms of CPU":<22}{"build":>9}{"dnn-tip":>10}{"":>8}{"assess":>9}{"dnn-tip":>11}'
    lines = [head + f'{"":>9}{"profiles":>11}{"+ pass":>8}{"difference":>12}']
    for case, found in cases.items():
        ours, theirs = found[OURS], found[THEIRS]
        build, assess = (theirs[part]['cpu'] / ours[part]['cpu'] for part in ('build', 'assess'))
        alone = f'{faster(found, PROFILES):10.1f}x' if PROFILES in found else ''
        whole = (theirs['assess']['cpu'] + forward) / (ours['assess']['cpu'] + forward)
        lines.append(
            f'  {case:<20}{ours["build"]["cpu"] * 1e3:9.2f}{theirs["build"]["cpu"] * 1e3:10.2f}{build:7.2f}x'
            f'{ours["assess"]["cpu"] * 1e3:9.2f}{theirs["assess"]["cpu"] * 1e3:11.2f}{assess:8.1f}x{alone:>11}'
            f'{whole:7.1f}x{ours["difference"]:12.1e}'
        )
    return '\n'.join(lines)


def faster(found: dict[str, dict], other: str = THEIRS) -> float:
    "How many times our CPU seconds another side needs to assess: the median over rounds."
    return statistics.median(
        b['cpu'] / a['cpu'] for a, b in zip(*(found[who]['assess']['rounds'] for who in (OURS, other)), strict=True)
    )


def pass_table(rows: list[dict]) -> str:
    "One line for each way to go through the images."
    lines = [f'{"over images":<46}{"ms of CPU":>12}{"bare":>9}']
    lines += [f'  {row["images"]:>6,}  {row["who"]:<36}{row["cpu"] * 1e3:12.1f}{row["times"]:8.2f}x' for row in rows]
    return '\n'.join(lines)


def memory_table(rows: list[dict]) -> str:
    "One line for each call."
    named = [(f'{int(row["case"]):,} images' if row['case'].isdigit() else row['case'], row) for row in rows]
    return '\n'.join(['extra memory, MiB'] + [f'  {what:<16}{row["who"]:<36}{row["mib"]:10.1f}' for what, row in named])


def targets(cases: dict, rows: list[dict]) -> list[tuple[str, float, bool]]:
    "What robustnb is held against: (in words, the number, whether it is met)."
    found = []
    if 'KMNC 1000' in cases:
        speed = min(faster(cases['KMNC 1000']), faster(cases['KMNC 1000'], PROFILES))
        found.append(('KMNC on arrays: at least 5 times as fast as the profiles of dnn-tip alone', speed, speed >= 5))
    if 'DSA' in cases:
        speed, apart = faster(cases['DSA']), cases['DSA'][OURS]['difference']
        found.append(('DSA: at least 100 times as fast as dnn-tip', speed, speed >= 100))
        found.append(('DSA: the same values, relative to 1e-4', apart, apart <= 1e-4))
    for row in rows:
        if row['who'] == SIX:
            words = f'six criteria in one pass, {row["images"]:,} images: at most 1.5 times the bare forward pass'
            found.append((words, row['times'], row['times'] <= 1.5))
    return found


def about(args: argparse.Namespace, what: str) -> dict:
    "What a reader needs to run it again."
    return {
        'command': shlex.join(['python', 'tests/bench/coverage.py', *sys.argv[1:]]),
        'versions': provenance() | {'dnn-tip': version('dnn-tip')},
        'date': datetime.date.today().isoformat(),
        'machine': f'{platform.system()} {platform.machine()}, {os.cpu_count()} cores',
        'threads': args.threads, 'rounds': args.rounds, 'seed': SEED,
        'network': what, 'training images': N, 'test images': T, 'batch': BATCH,
        'notes': 'cpu and wall: seconds of one call, cpu beside times the median over the rounds; times: CPU seconds divided '
        'by those of dnn-tip, or of the bare forward pass, the median of the ratios within a round; difference: the largest '
        'relative one of any value from that of dnn-tip; forward pass: CPU seconds for the test images; mib: rise of the '
        'resident memory during one call, in a process of its own with MALLOC_MMAP_THRESHOLD_ set, so that freed memory is '
        'given back at once',
    }  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    everything = [*CASES, 'passes', 'memory']
    parser.add_argument(
        '--rounds', type=int, default=5, help=f'how often each is measured (5), DSA at most {DSA_ROUNDS} times'
    )
    parser.add_argument('--threads', type=int, default=1, help='threads of PyTorch (1)')
    parser.add_argument('--only', nargs='+', choices=everything, default=everything, help='what to measure (all)')
    parser.add_argument('--out', type=Path, default=RESULTS, help='where the numbers go')
    parser.add_argument('--worker', type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    if args.worker:
        print(extra_memory(*args.worker))
        return
    what, job = work()
    print(f'{what}, {N:,} training and {T:,} test images; {args.threads} thread(s), median of {args.rounds} rounds')
    print('a machine that does something else as well disturbs even CPU seconds\n', flush=True)
    forward = statistics.median(row['cpu'] for row in race({BARE: bare(job.model, job.x[:T])}, args.rounds)[0][BARE])
    cases = {case: measure(case, job, args.rounds) for case in args.only if case in CASES}
    if cases:
        print(table(cases, forward), '\n', flush=True)
    rows = measure_passes(job, args.rounds) if 'passes' in args.only else []
    if rows:
        print(pass_table(rows), '\n', flush=True)
    peaks = []
    if 'memory' in args.only and Path('/proc/self/clear_refs').exists():  # on Linux
        wanted = [case for case in CASES if case.split()[0] in ('KMNC', 'DSA', 'MDSA', 'LSA')]
        peaks = memory(job, wanted, min(args.rounds, MEMORY_ROUNDS), args.threads)
        print(memory_table(peaks), '\n')
    reached = targets(cases, rows)
    for words, number, met in reached:
        print(f'{"ok" if met else "missed":<8}{number:8.2g}  {words}')
    args.out.parent.mkdir(parents=True, exist_ok=True)
    goals = [{'target': words, 'value': number, 'met': met} for words, number, met in reached]
    found = {'forward pass': forward, 'targets': goals, 'cases': cases, 'passes': rows, 'memory': peaks}
    args.out.write_text(json.dumps(about(args, what) | found, indent=1) + '\n')
    print(f'\nnumbers in {args.out.name}')


if __name__ == '__main__':
    main()
