"""PyTorch's side of the bench, where torch is installed: skips, poolings and every algorithm against pcnb."""
import runpy
from dataclasses import replace
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

from pcnb.augmentation import Shift
from pcnb.bench import Case, bench_images, bench_rule
from pcnb.models import Chain, Conv, Dense, MaxPool, resnet
from pcnb.network import InputError, PCNetwork, Skip

pytest.importorskip("torch")
FILE = Path(__file__).resolve().parent.parent / "benchmarks" / "torch_pc.py"


def residual():
    "Both orders of pooling and activation, and skips of two spans, one of them into the output's neighbour."
    keys = jax.random.split(jax.random.key(0), 5)
    layers = [Conv(1, 4, key=keys[0]), Chain(MaxPool(2), Conv(4, 4, activation=jax.nn.gelu, key=keys[1])), Conv(4, 4, activation=jnp.tanh, key=keys[2]),
              Conv(4, 4, activation=jax.nn.gelu, key=keys[3]), Dense(16, 10, jax.nn.gelu, 2, key=keys[4])]
    return perturbed(PCNetwork(layers, (8, 8, 1), [Skip(2, 4), Skip(3, 4)]))


def perturbed(net): return jax.tree.map(lambda v: v + 0.05 * jax.random.normal(jax.random.key(v.size), v.shape) if eqx.is_inexact_array(v) else v, net)


def strided(): return perturbed(resnet((8, 8, 1), 10, 4, (4, 6), (1, 1), key=jax.random.key(0)))  # a stage of half the size, a skip that pools and widens, a mean over all pixels


@pytest.mark.parametrize("build", [residual, strided])
@pytest.mark.parametrize("name", ["backprop", "gn2x2", "gd4", "sweep2"])
def test_torch_computes_the_same(name, build):
    torch_pc, net, data = runpy.run_path(str(FILE)), build(), bench_images((8, 8, 1), 6)
    x, y = jnp.asarray(data.train_images / 128 - 1, jnp.float32), jax.nn.one_hot(data.train_labels, 10)
    case = Case("small", net, name, bench_rule(name, net)[0], x, y, data, Shift(2))
    want = torch_pc["reference"](case)
    found = lambda case: torch_pc["contestant"](case, want, lambda: dict(wide=float("inf")), "torch", lambda f: f).facts["difference"]
    assert max(found(case).values()) <= 1e-4
    with pytest.raises(RuntimeError, match="differs from pcnb.s by"): found(replace(case, y=2 * y))  # another problem


def test_both_on_one_kind_of_device(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(InputError, match="torch sees no GPU; install torch with CUDA, or set JAX_PLATFORMS=cpu"): runpy.run_path(str(FILE))
