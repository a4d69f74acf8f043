"""Other predictive-coding libraries beside pcnb, each with its own JAX in an environment and a process of its own.

    pcnb bench --networks mlp4x512 mlp16 --inference gd8 --against benchmarks/pcx_peer.py        (or fabricpc_peer.py, or jpc_peer.py)

A file `NAME_peer.py` describes a library as a `Peer`, and says in `learner` how the library trains. It is read twice: by pcnb, which asks it for
`opponents`, and by the Python of the environment, which runs it as a script; `serve` then answers commands from its standard input. Nothing that the second
one needs may import pcnb. The environment is made with pip at first use, in a folder beside this file.

`benchmarks/time_to_accuracy.py` has them train until a network knows its digits.

Known: chains of `Dense` with GELU before all but the first, gradient descent on the states with a fixed rate, and the forward energy with squared error and
precision 1. States and weight gradients must agree with pcnb's before anything is timed. An epoch is not compared: these libraries have no loop with pcnb's
data and augmentation.
"""
import json
import os
import subprocess
import sys
import tempfile
import time
import weakref
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

TOLERANCE = 1e-4
ENVIRONMENTS = Path(__file__).resolve().parent / ".envs"


class Peer(NamedTuple):
    "Another library."
    name: str
    file: str                  # the script of its process
    packages: tuple[str, ...]  # what pip installs, pinned, beside jax
    jax: str                   # version
    ways: tuple[str, ...]      # of using it; each is a contestant of this name


class Task(NamedTuple):
    "What a peer's process is given."
    weights: list     # (weight, bias) of each layer; the weight is (n_out, n_in)
    steps: int        # of inference
    rate: float       # of a step
    precision: float  # of the output
    x: np.ndarray     # (batch, n)
    y: np.ndarray     # (batch, classes)
    check_x: np.ndarray
    check_y: np.ndarray
    errors: bool = False    # whether inference moves the errors, not the states
    optimiser: str = "sgd"  # of the weights: sgd or adam


def optimiser(task, learning_rate):
    "The optimiser of the weights."
    import optax
    return dict(sgd=optax.sgd, adam=optax.adam)[task.optimiser](learning_rate)


# The side of pcnb

def tail(text, lines=15): return "\n".join(text.strip().splitlines()[-lines:])


def environment(name, packages):
    "The Python of an environment with these packages, made now if there is none. Raises `InputError` if that fails."
    from pcnb.network import InputError
    home = ENVIRONMENTS / name
    python, made = home / ("Scripts" if os.name == "nt" else "bin") / "python", home / "packages.txt"
    wanted = "\n".join(packages) + "\n"
    if made.is_file() and made.read_text() == wanted: return python
    print(f"making benchmarks/.envs/{name} with {', '.join(packages)}: once, a few minutes", flush=True)
    ENVIRONMENTS.mkdir(parents=True, exist_ok=True)
    (ENVIRONMENTS / ".gitignore").write_text("*\n")
    for command in ([sys.executable, "-m", "venv", "--clear", home], [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *packages]):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode: raise InputError(f"benchmarks/.envs/{name} could not be made: {' '.join(map(str, command[1:]))} says\n{tail(done.stdout + done.stderr)}")
    made.write_text(wanted)
    return python


class Child:
    "A process that answers commands, one line of JSON each. It ends with this object, and with the process that holds it."

    def __init__(self, *command):
        self.log = tempfile.TemporaryFile("w+")
        own = ("PYTHONPATH", "XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")  # other packages; flags and programs of another version
        outside = {k: v for k, v in os.environ.items() if k not in own}
        # pcnb holds most of an accelerator's memory
        self.process = subprocess.Popen([str(c) for c in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, bufsize=1,
                                        env={"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **outside})
        self.end = weakref.finalize(self, end, self.process)

    def ask(self, *command):
        "The answer to a command. Raises `RuntimeError` with what the process says if it fails or ends."
        try: print(json.dumps(command), file=self.process.stdin, flush=True)
        except (BrokenPipeError, ValueError): pass  # it has ended
        line = "" if self.process.stdout.closed else self.process.stdout.readline()
        answer = json.loads(line) if line else dict(error=f"it ended with exit code {self.process.wait()}.\n{self.said()}")
        if error := answer.get("error"): raise RuntimeError(f"{Path(self.process.args[1]).name} could not answer {command[0]!r}: {error}")
        return answer

    def said(self):
        self.log.seek(0)
        return tail(self.log.read())


def end(process):
    "Let the process leave its loop, and wait for that."
    with suppress(OSError): process.stdin.close()  # with a command in it that nobody read
    try: process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()


def task(case, name):
    "A case as arrays and numbers; None for an algorithm that no peer has. Raises `InputError` for a network or an energy that none can represent."
    import jax
    import jax.numpy as jnp
    from pcnb.bench import check_batch
    from pcnb.energy import ForwardEnergy, SquaredError
    from pcnb.inference import GradientDescent
    from pcnb.learning import PredictiveCoding
    from pcnb.models import Dense, identity
    from pcnb.network import InputError
    rule = case.rule
    if type(rule) is not PredictiveCoding or rule.held or rule.joint or type(rule.inference) is not GradientDescent: return None
    if rule.inference.tolerance or rule.inference.schedule is not None: return None
    if type(rule.energy) is not ForwardEnergy or type(rule.energy.loss) is not SquaredError or rule.energy.precision != 1:
        raise InputError(f"{name} is compared with ForwardEnergy, squared error and precision 1.")
    for i, f in enumerate(case.net.layers):
        if type(f) is not Dense or f.pool != 1 or f.activation is not (jax.nn.gelu if i else identity) or case.net.skips:
            raise InputError(f"{name} is compared on chains of Dense with GELU before all but the first, such as mlp4x512 and mlp16; got {case.network}.")
    one, stepper = jnp.ones(()), rule.inference.stepper
    rate = -float(stepper.update(one, stepper.init(one), one)[0])
    flat = lambda x: np.array(x).reshape(len(x), -1)
    x, y = check_batch(case.x, case.y)
    return Task([(np.array(f.weight), np.array(f.bias)) for f in case.net.layers], rule.inference.steps, rate, float(rule.energy.output_precision),
                flat(case.x), np.array(case.y), flat(x), np.array(y))


def reference(case):
    "pcnb's hidden states and weight gradients on the batch for checks."
    import jax
    from pcnb.bench import check_batch
    def both(x, y):
        layers = case.rule.gradient(case.net, x, y)[0].layers
        return dict(states=case.rule.infer(case.net, x, y).states.hidden, gradients=[(f.weight, f.bias) for f in layers])
    return {what: jax.tree.leaves(v) for what, v in jax.jit(both)(*check_batch(case.x, case.y)).items()}


def check(peer, what, want, child, folder, tolerance):
    "Differences of hidden states and weight gradients from pcnb's. Raises `CheckFailed` above the tolerance."
    from pcnb.bench import CheckFailed, relative_difference
    child.ask("check", str(folder / "found.npz"))
    with np.load(folder / "found.npz") as found:
        off = {part: relative_difference([found[f"{part}{i}"] for i in range(len(w))], w) for part, w in want.items()}
    if not max(off.values()) <= tolerance:
        raise CheckFailed(f"{peer.name}'s {what} differs from pcnb's by {off}; expected at most {tolerance:.0e}. Nothing was timed.")
    return off


def checked(peer, what, given, want, python, way, tolerance=TOLERANCE):
    "The process of one way to use a peer, what it says of itself, and its differences from pcnb. Raises `CheckFailed` if they are too large, `InputError` if it computes on another kind of device."
    import jax
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        arrays = {f"{part}{i}": v for i, layer in enumerate(given.weights) for part, v in zip(("weight", "bias"), layer)}
        np.savez(folder / "task.npz", **arrays, **{k: v for k, v in given._asdict().items() if k != "weights"})
        child = Child(python, peer.file, folder / "task.npz", way)
        start = child.ask("start", peer.name)
        if start["platform"] != jax.default_backend():
            from pcnb.network import InputError
            raise InputError(f"{peer.name} runs on {start['platform']} and pcnb on {jax.default_backend()}; set JAX_PLATFORMS=cpu to compare both there.")
        return child, start["versions"], check(peer, what, want, child, folder, tolerance)


def contestant(peer, case, given, want, python, way):
    "One way to use a peer, checked."
    from pcnb.bench import Contestant
    child, versions, off = checked(peer, f"{case.name} on {case.network}", given, want, python, way)
    seconds = child.ask("compile")["seconds"]
    def step(n): child.ask("step", n)
    return Contestant(way, step, None, dict(compile_seconds=seconds, difference=off, versions=versions, message_seconds=message(child)))


def message(child, times=100):
    "Seconds that a command and its answer take; they are part of every measured turn."
    took = []
    for _ in range(times):
        start = time.perf_counter()
        child.ask("step", 0)
        took.append(time.perf_counter() - start)
    return float(np.median(took))


def home(peer):
    "The Python of a peer's environment."
    import jax
    platform = jax.default_backend()
    return environment(f"{peer.name}-{platform}", [*peer.packages, f"jax{'[cuda12]' if platform == 'gpu' else ''}=={peer.jax}"])


def opponents(peer, case):
    "Each way to use a peer on a case; none for an algorithm that it does not have."
    if (given := task(case, peer.name)) is None: return []
    python, want = home(peer), reference(case)
    return [contestant(peer, case, given, want, python, way) for way in peer.ways]


# The side of the peer

def read_task(path):
    with np.load(path) as f: found = dict(f)
    layers = [(found[f"weight{i}"], found[f"bias{i}"]) for i in range(sum(k.startswith("weight") for k in found))]
    return Task(layers, int(found["steps"]), float(found["rate"]), float(found["precision"]), *(found[k] for k in ("x", "y", "check_x", "check_y")), bool(found["errors"]), str(found["optimiser"]))


def forward(weights, x):
    "The output of the network with these (weight, bias)."
    for i, (w, b) in enumerate(weights):
        if i: x = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x ** 3)))
        x = x @ np.asarray(w).T + np.asarray(b)
    return x


def serve(learner):
    """Answer commands until the input ends. `learner(task, learning_rate, way)` gives two functions: `step(x, y)` trains on a batch, with the task's optimiser of the
    weights, and waits for it, and `read()` gives the hidden states where the last inference ended, and the (weight, bias) of each layer."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # so that nothing a library prints is taken for an answer
    task, way, timed = read_task(sys.argv[1]), sys.argv[2], []

    def start(name):
        from importlib.metadata import version
        import jax
        return dict(platform=jax.default_backend(), versions={n: version(n) for n in (name, "jax")})

    def check(path):
        step, read = learner(task, 1.0, way)
        step(task.check_x, task.check_y)
        states, weights = read()
        gradients = [np.asarray(a) - np.asarray(b) for old, new in zip(task.weights, weights, strict=True) for a, b in zip(old, new, strict=True)]
        np.savez(path, **{f"{what}{i}": v for what, values in (("states", states), ("gradients", gradients)) for i, v in enumerate(values)})
        return {}

    def compile():
        import jax.numpy as jnp
        begin = time.perf_counter()
        train, _ = learner(task, 1e-3, way)  # perceptrons, which do not diverge at it
        timed[:] = train, jnp.asarray(task.x), jnp.asarray(task.y)
        step(2)  # pcx compiles twice
        return dict(seconds=time.perf_counter() - begin)

    def step(n):
        for _ in range(n): timed[0](*timed[1:])
        return {}

    def train(path, learning_rate, every, goal):
        "Train with Adam on the batches of `order`, until `goal` of the held images are known at one of the scores after each `every` steps."
        with np.load(path) as f: images, targets, order, held, labels = (f[k] for k in ("images", "targets", "order", "held", "labels"))
        train, read = learner(task._replace(optimiser="adam"), learning_rate, way)
        seconds, scores = [], []
        for i, index in enumerate(order, 1):
            begin = time.perf_counter()
            train(images[index], targets[index])
            seconds.append(time.perf_counter() - begin)
            if i % every == 0: scores.append(float((forward(read()[1], held).argmax(1) == labels).mean()))
            if scores and scores[-1] >= goal: break
        seconds[:2] = [float(np.median(seconds[2:]))] * 2  # where it compiles
        return dict(seconds=sum(seconds), steps=len(seconds), scores=scores)

    commands = dict(start=start, check=check, compile=compile, step=step, train=train)
    for line in sys.stdin:
        what, *args = json.loads(line)
        try: answer = commands[what](*args)
        except Exception as e: answer = dict(error=f"{type(e).__name__}: {e}")
        print(json.dumps(answer), file=answers, flush=True)
