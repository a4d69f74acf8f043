"""Other libraries beside pcnb: the process that computes, what it is given and checked for, and its environment; each library where it is installed."""
import gc
import re
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pcnb.augmentation import Shift
from pcnb.bench import Case, bench_images, bench_rule, load_opponents
from pcnb.energy import ForwardEnergy
from pcnb.inference import GradientDescent
from pcnb.learning import PredictiveCoding
from pcnb.models import cnn, mlp
from pcnb.network import InputError

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.append(str(FOLDER))
import peers

ECHO = """import json, sys
for line in sys.stdin:
    what, *args = json.loads(line)
    if what == "fail": print(json.dumps(dict(error="ValueError: no such thing")), flush=True)
    elif what == "die": sys.exit("the library broke")
    else: print(json.dumps(dict(got=args)), flush=True)
open(sys.argv[1], "w").close()
"""

# gradient descent on the states written out, and Hebbian weight gradients; "wrong" has another output precision
NUMPY = f"""import sys
sys.path.append({str(FOLDER)!r})
import numpy as np
import peers

def inner(x): return np.sqrt(2 / np.pi) * (x + 0.044715 * x ** 3)
def gelu(x): return 0.5 * x * (1 + np.tanh(inner(x)))
def slope(x): return 0.5 * (1 + np.tanh(inner(x))) + 0.5 * x / np.cosh(inner(x)) ** 2 * np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * x ** 2)

def learner(task, learning_rate, way):
    print("a line that is no answer")
    weights, p, found = [(w.astype(float), b.astype(float)) for w, b in task.weights], task.precision * (2 if way == "wrong" else 1), {{}}
    def predict(z): return [(gelu(v) if i else v) @ w.T + b for i, (v, (w, b)) in enumerate(zip(z, weights))]
    def errors(z, y):
        *mu, out = predict(z)
        return [*(v - m for v, m in zip(z[1:], mu)), p * (y - out)]
    def step(x, y):
        z = [x]
        for i in range(len(weights) - 1): z.append(predict([*z, 0][:i + 1])[i])
        for _ in range(task.steps):
            e = errors(z, y)
            z = [x, *(v - task.rate * (e[i] - slope(v) * (e[i + 1] @ weights[i + 1][0])) for i, v in enumerate(z[1:]))]
        found["states"] = z[1:]
        e, rate = errors(z, y), learning_rate / len(x)
        weights[:] = [(w + rate * e[i].T @ (gelu(z[i]) if i else z[i]), b + rate * e[i].sum(0)) for i, (w, b) in enumerate(weights)]
    return step, lambda: (found["states"], weights)

peers.serve(learner)
"""


def small(name="gd2", net=None, rule=None, batch=6):
    "A case of a small network."
    net = net or mlp((4, 4, 1), 10, 8, 3, key=jax.random.key(0))
    data = bench_images((4, 4, 1), batch)
    x, y = jnp.asarray(data.train_images / 128 - 1, jnp.float32), jax.nn.one_hot(data.train_labels, 10)
    return Case("small", net, name, rule or bench_rule(name, net)[0], x, y, data, Shift(2))


@pytest.fixture
def echo(tmp_path):
    "Starts the process that answers with what it is asked, and leaves a file `left` when it ends in order."
    (tmp_path / "echo.py").write_text(ECHO)
    return lambda: peers.Child(sys.executable, tmp_path / "echo.py", tmp_path / "left")


def wait_for(path):
    for _ in range(500):
        if path.exists(): return True
        time.sleep(0.01)
    return False


# The process

def test_commands_and_answers(echo):
    child = echo()
    assert child.ask("say", 1, "two") == dict(got=[1, "two"]) and child.ask("say") == dict(got=[])
    with pytest.raises(RuntimeError, match="echo.py could not answer 'fail': ValueError: no such thing"): child.ask("fail")
    assert child.ask("say", 3) == dict(got=[3])  # an error is not the end


def test_a_process_that_ends_says_why(echo):
    child = echo()
    for command in ("die", "say"):
        with pytest.raises(RuntimeError, match=f"could not answer '{command}': it ended with exit code 1.\nthe library broke"): child.ask(command)


@pytest.mark.parametrize("how", ["asked", "forgotten"])
def test_a_process_ends_with_its_owner(echo, tmp_path, how):
    child = echo()
    process, end = child.process, child.end
    child.ask("say")
    if how == "asked": end()
    del child
    gc.collect()
    assert process.returncode == 0 and (tmp_path / "left").exists()


def test_a_process_ends_with_a_parent_that_is_killed(echo, tmp_path):
    start = f"child = peers.Child(sys.executable, {str(tmp_path / 'echo.py')!r}, {str(tmp_path / 'left')!r})"
    code = f"import os, sys; sys.path.append({str(FOLDER)!r}); import peers; {start}; child.ask('say'); os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9 and wait_for(tmp_path / "left")


# What is computed

def test_the_right_is_timed_and_the_wrong_refused(tmp_path, monkeypatch):
    (tmp_path / "other.py").write_text(NUMPY)
    monkeypatch.setattr(peers, "environment", lambda name, packages: sys.executable)
    peer = peers.Peer("numpy", str(tmp_path / "other.py"), (), "", ("right",))
    case = small()
    want = peers.reference(case)
    monkeypatch.setattr(peers, "reference", lambda case: want)  # compiled once
    found, = peers.opponents(peer, case)
    assert found.framework == "right" and found.epoch is None and found.facts["versions"] == dict(numpy=np.__version__, jax=jax.__version__)
    assert set(found.facts["difference"]) == {"states", "gradients"} and max(found.facts["difference"].values()) <= 1e-4
    found.step(1)
    with pytest.raises(RuntimeError, match="numpy's gd2 on small differs from pcnb's by .*; expected at most 1e-04. Nothing was timed"):
        peers.opponents(peer._replace(ways=("wrong",)), case)


def test_training_ends_at_the_goal(tmp_path):
    "A process learns which of ten pixels is bright; its scores are those of the network that it has then, and it stops at the first that reaches the goal."
    (tmp_path / "other.py").write_text(NUMPY)
    labels = np.arange(60) % 10
    images = np.float32(2 * np.eye(16)[labels])
    order = np.random.default_rng(0).permuted(np.tile(np.arange(60), (200, 1)), axis=1)[:, :20]
    np.savez(tmp_path / "data.npz", images=images, targets=np.eye(10, dtype=np.float32)[labels], order=order, held=images, labels=labels)
    case = small("gd4", rule=PredictiveCoding(ForwardEnergy(), GradientDescent(4, optax.sgd(0.2))))
    child, *_ = peers.checked(peers.Peer("numpy", str(tmp_path / "other.py"), (), "", ()), "gd4 on small", peers.task(case, "numpy"), peers.reference(case), sys.executable, "right")
    short, long, all = (child.ask("train", str(tmp_path / "data.npz"), 1.0, 5, goal) for goal in (0.5, 0.9, 1.1))
    for found, goal in ((short, 0.5), (long, 0.9)):
        assert found["steps"] == 5 * len(found["scores"]) and found["scores"][-1] >= goal > max([0, *found["scores"][:-1]])
    assert short["steps"] < long["steps"] < all["steps"] == 200 and long["scores"] == all["scores"][:len(long["scores"])] and short["seconds"] > 0


def test_score_is_of_the_same_network():
    net, x = mlp((16,), 10, 8, 3, key=jax.random.key(0)), np.random.default_rng(0).normal(size=(5, 16)).astype(np.float32)
    np.testing.assert_allclose(peers.forward([(f.weight, f.bias) for f in net.layers], x), jax.vmap(net)(x), rtol=1e-4, atol=1e-6)


def test_what_a_peer_is_given():
    case = small("gd5", batch=6)
    task = peers.task(case, "other")
    assert (task.steps, task.precision) == (5, 0.1) and task.rate == pytest.approx(0.1)
    assert task.x.shape == (6, 16) and task.y.shape == (6, 10) and [w.shape for w, _ in task.weights] == [(8, 16), (8, 8), (10, 8)]
    np.testing.assert_array_equal(task.check_x[4:], task.x[:2])
    np.testing.assert_array_equal(task.check_y[:4], 1000 * task.y[:4])
    halves = small(rule=PredictiveCoding(ForwardEnergy(output_precision=0.5), GradientDescent(2, optax.sgd(0.3))))
    assert (peers.task(halves, "other").precision, peers.task(halves, "other").rate) == (0.5, pytest.approx(0.3))


@pytest.mark.parametrize("name", ["pcx", "fabricpc", "jpc"])
def test_other_algorithms_and_networks(name, monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "run", None)  # nothing is installed for these
    opponents = load_opponents(FOLDER / f"{name}_peer.py")
    for rule in ("backprop", "gn1x1", "ed2", "sweep"): assert opponents(small(rule)) == []
    key = jax.random.key(0)
    for net in (mlp((4, 4, 1), 10, 8, 3, jnp.tanh, key=key), mlp((4, 4, 1), 10, 8, 3, skips=True, key=key), cnn((4, 4, 1), 10, (2,), key=key)):
        assert opponents(small(net=net)) == []
        assert re.search(f"{name}_peer.py leaves out small, .*: {name} is compared on chains of Dense with GELU before all but the first, .*; got small", capsys.readouterr().out)
    other = PredictiveCoding(ForwardEnergy(precision=2.0), GradientDescent())
    assert opponents(small(rule=other)) == [] and "ForwardEnergy, squared error and precision 1" in capsys.readouterr().out


# Environments

def test_environment_is_made_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(peers, "ENVIRONMENTS", tmp_path / "envs")
    ran = []
    def run(command, **_):
        ran.append([str(c) for c in command[1:]])
        (tmp_path / "envs" / "other-cpu").mkdir(exist_ok=True)
        return subprocess.CompletedProcess(command, 0, "", "")
    monkeypatch.setattr(subprocess, "run", run)
    python = peers.environment("other-cpu", ["other==1", "jax==2"])
    assert "making benchmarks/.envs/other-cpu with other==1, jax==2" in capsys.readouterr().out
    assert [r[:3] for r in ran] == [["-m", "venv", "--clear"], ["-m", "pip", "install"]] and ran[1][-2:] == ["other==1", "jax==2"]
    assert peers.environment("other-cpu", ["other==1", "jax==2"]) == python and len(ran) == 2 and capsys.readouterr().out == ""
    peers.environment("other-cpu", ["other==2", "jax==2"])
    assert len(ran) == 4 and (tmp_path / "envs" / ".gitignore").read_text() == "*\n"


def test_environment_that_cannot_be_made(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "ENVIRONMENTS", tmp_path)
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, int("pip" in command), "", "No matching distribution found for other==1"))
    for _ in range(2):  # a failure leaves nothing that passes for an environment
        with pytest.raises(InputError, match="benchmarks/.envs/other-cpu could not be made: -m pip install .* says\nNo matching distribution found for other==1"):
            (tmp_path / "other-cpu").mkdir(exist_ok=True)
            peers.environment("other-cpu", ["other==1"])


# The libraries, where their environments have been made

@pytest.mark.parametrize("name", ["pcx", "fabricpc", "jpc"])
def test_library_computes_the_same(name):
    if not (FOLDER / ".envs" / f"{name}-{jax.default_backend()}" / "packages.txt").exists(): pytest.skip(f"benchmarks/.envs holds no {name}")
    for found in load_opponents(FOLDER / f"{name}_peer.py")(small("gd2", batch=5)):
        assert max(found.facts["difference"].values()) <= 1e-4 and found.facts["versions"].keys() == {name, "jax"}
        found.step(1)
