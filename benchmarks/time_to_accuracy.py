"""How long predictive coding takes to learn the digits: pcnb beside other libraries, each with its own inference.

    python benchmarks/time_to_accuracy.py --data-dir DIR --out results/speed/accuracy.json

A perceptron of 16 layers of width 128, the same weights at the beginning, Adam, batches of 128 of MNIST's training images but 5,000, on which the
network is scored after every 24 steps; the time is that of the steps until 95 % of the 5,000 are known, without compilation and scores. Each way to train has
the same two learning rates with the first order of the images; the better one has two more orders. Peers run as in `peers.py`, and
their inference is checked against pcnb's first: states and weight gradients of descent on the states; the errors, and the gradient at fixed errors, of
descent on the errors.
"""
import runpy
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import peers
from pcnb.augmentation import Shift
from pcnb.bench import Case, bench_network, exact_products
from pcnb.data import Scale, load
from pcnb.energy import ForwardEnergy, SquaredError
from pcnb.inference import ErrorDescent, GaussNewton, GradientDescent
from pcnb.learning import Backprop, PredictiveCoding
from pcnb.network import InputError
from pcnb.recipes import environment, now
from pcnb.training import evaluate, fit

EVERY, BATCH, RATES, SEEDS, LOSS = 24, 128, (1e-3, 3e-3), 3, SquaredError()


def energy(p): return ForwardEnergy(output_precision=p)


OURS = {
    "backpropagation": Backprop(),
    "Gauss-Newton 1x1, output precision 0.03": PredictiveCoding(energy(0.03), GaussNewton(1, 1)),
    "descent on errors, 1 step of 0.1, output precision 1": PredictiveCoding(energy(1.0), ErrorDescent(1, optax.sgd(0.1))),
    "descent on errors, 4 steps of 0.1, output precision 1": PredictiveCoding(energy(1.0), ErrorDescent(4, optax.sgd(0.1))),
    "descent on states, 16 steps of 0.1, output precision 0.1": PredictiveCoding(energy(0.1), GradientDescent(16, optax.sgd(0.1))),
}
THEIRS = [  # file, way, inference, output precision
    *((name, way, GradientDescent(16, optax.sgd(0.1)), 0.1) for name, way in (("pcx", "pcx"), ("fabricpc", "fabricpc"), ("jpc", "jpc.jit"))),
    *(("jpc", "jpc.jit", ErrorDescent(steps, optax.sgd(rate)), 1.0) for steps, rate in ((1, 0.1), (4, 0.1), (16, 0.5))),
]


class Clock:
    "A callback of `fit`: the seconds of its steps from the first one on, and a score after every few."
    every = EVERY

    def __init__(self, data, scale, goal):
        self.data, self.scale, self.goal, self.seconds, self.scores, self.since = data, scale, goal, 0.0, [], None

    def __call__(self, step, net):
        now = time.perf_counter()
        if self.since is not None: self.seconds += now - self.since
        if step % EVERY == 0: self.scores.append(evaluate(net, self.data.test_images, self.data.test_labels, self.scale, LOSS).top1)
        self.step = step
        if self.scores and self.scores[-1] >= self.goal: raise Known
        self.since = time.perf_counter()


class Known(Exception):
    "The goal is reached."


def ours(rule, data, scale, net, rate, seed, goal, steps):
    "Train by pcnb until the goal, or so many steps."
    clock, unscored = Clock(data, scale, goal), replace(data, test_images=data.test_images[:1], test_labels=data.test_labels[:1])
    try: fit(net, rule, optax.adam(rate), unscored, -(-steps // (len(data.train_labels) // BATCH)), BATCH, scale=scale, seed=seed, callback=clock, diagnose_examples=0, progress=False)
    except Known: pass
    return dict(seconds=clock.seconds * clock.step / (clock.step - 1), steps=clock.step, scores=clock.scores)  # the first step is not timed


def errors_and_gradients(case):
    "pcnb's hidden errors after its descent, and the gradient in the weights of the energy at these errors."
    def both(x, y):
        eps = case.rule.infer(case.net, x, y).states.eps
        def total(net):
            s = jax.vmap(net.from_errors)(x, eps)
            return jnp.mean(jax.vmap(LOSS)(s.x[-1], y))
        return dict(states=eps, gradients=[(f.weight, f.bias) for f in eqx.filter_grad(total)(case.net).layers])
    return {what: jax.tree.leaves(v) for what, v in jax.jit(both)(case.x, case.y).items()}


def described(name): return runpy.run_path(str(Path(__file__).with_name(f"{name}_peer.py")))["PEER"]


def peer(name, way, inference, precision, data, scale, net):
    "A checked process of a peer, and its versions."
    x, y = jax.vmap(scale)(jnp.asarray(data.train_images[:BATCH])), jax.nn.one_hot(data.train_labels[:BATCH], 10)
    states = GradientDescent(inference.steps, inference.stepper)
    case = Case("mlp16", net, "descent", PredictiveCoding(energy(precision), states), x, y, data, Shift(0))
    library, given, want = described(name), peers.task(case, name), None
    if type(inference) is ErrorDescent:  # targets as they are, for large ones send so many steps anywhere
        given, want = given._replace(errors=True, check_x=given.x, check_y=given.y), errors_and_gradients(replace(case, rule=PredictiveCoding(energy(precision), inference)))
    return peers.checked(library, f"{describe(inference, precision)} on mlp16", given, want or peers.reference(case), peers.home(library), way, 1e-3)  # of states and gradients after 16 steps in float32


def describe(inference, precision):
    rate = -float(inference.stepper.update(jnp.ones(()), inference.stepper.init(jnp.ones(())), jnp.ones(()))[0])
    what = "errors" if type(inference) is ErrorDescent else "states"
    return f"descent on {what}, {inference.steps} step{'s' * (inference.steps > 1)} of {rate:g}, output precision {precision:g}"


def theirs(child, data, scale, rate, seed, goal, steps, folder):
    "Train by a peer."
    images = lambda part: np.asarray(jax.vmap(scale)(jnp.asarray(part))).reshape(len(part), -1)
    if not (folder / f"{seed}.npz").exists():
        rng, n = np.random.default_rng(seed), len(data.train_labels)
        order = np.concatenate([rng.permutation(n)[:n // BATCH * BATCH].reshape(-1, BATCH) for _ in range(-(-steps // (n // BATCH)))])
        np.savez(folder / f"{seed}.npz", images=images(data.train_images), targets=np.eye(10, dtype=np.float32)[data.train_labels], order=order, held=images(data.test_images), labels=data.test_labels)
    return child.ask("train", str(folder / f"{seed}.npz"), rate, EVERY, goal)


def row(framework, algorithm, train, goal, **facts):
    "The runs of one way to train: each rate once, the better one with more orders."
    runs = []
    def run(rate, seed):
        found = train(rate, seed)
        runs.append(dict(rate=rate, seed=seed, **found))
        last = found["scores"][-1]
        print(f"{framework}: {algorithm}; Adam {rate:g}, order {seed}: {100 * last:.1f} % after {found['steps']} steps, {found['seconds']:.2f} s", flush=True)
        return found["seconds"] if last >= goal else float("inf")
    took = {rate: run(rate, 0) for rate in RATES}
    best = min(took, key=took.get)
    if took[best] < float("inf"): times = [took[best], *(run(best, seed) for seed in range(1, SEEDS))]
    else: times = []
    return dict(framework=framework, algorithm=algorithm, rate=best if times else None, seconds=statistics.median(times) if times else None, runs=runs, **facts)


def main(
    data_dir: Annotated[Path, tyro.conf.arg(metavar="DIR", help="The data folder, as of `pcnb train`.")],
    out: Annotated[Path, tyro.conf.arg(metavar="FILE", help="Where to write the figures as JSON.")] = Path("runs", "accuracy.json"),
    goal: Annotated[float, tyro.conf.arg(help="Part of the 5,000 held images to be known.")] = 0.95,
    epochs: Annotated[int, tyro.conf.arg(help="After which a run that is not there ends.")] = 2,
    overwrite: tyro.conf.FlagCreatePairsOff[Annotated[bool, tyro.conf.arg(help="Replace the file.")]] = False,
):
    "How long each library takes to learn the digits."
    import json
    if out.exists() and not overwrite: raise SystemExit(f"{out} exists; use --overwrite to replace it, or another file.")
    try:
        data = load("mnist", data_dir).validation(5000)
        for name in {name for name, *_ in THEIRS}: peers.home(described(name))  # which installs it, before anything is trained
    except InputError as e: raise SystemExit(str(e))
    scale, net = Scale(*data.moments()), bench_network("mlp16")
    steps = epochs * (len(data.train_labels) // BATCH)
    with exact_products():
        rows = [row("pcnb", name, lambda rate, seed: ours(rule, data, scale, net, rate, seed, goal, steps), goal) for name, rule in OURS.items()]
        with tempfile.TemporaryDirectory() as folder:
            for name, way, inference, precision in THEIRS:
                child, versions, off = peer(name, way, inference, precision, data, scale, net)
                rows.append(row(way, describe(inference, precision), lambda rate, seed: theirs(child, data, scale, rate, seed, goal, steps, Path(folder)), goal, versions=versions, difference=off))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(dict(**environment(), taken=now(), goal=goal, epochs=epochs, network="mlp16", batch_size=BATCH, rows=rows), indent=1) + "\n")
    for r in rows: print(f"{r['framework']:10} {r['algorithm']:60} " + (f"{r['seconds']:6.2f} s (Adam {r['rate']:g})" if r["seconds"] else "not reached"))


if __name__ == "__main__": tyro.cli(main)
