"""Remedies of peers: a rule's update is its gradient through the optimiser, on the same network object as the others; schedules weight what they say."""
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pcnb.energy import ForwardEnergy
from pcnb.inference import GaussNewton, Sweep
from pcnb.learning import Backprop, IncrementalPC, PredictiveCoding
from pcnb.log_determinant import LogDeterminant, log_determinant
from pcnb.models import mlp
from pcnb.network import InputError
from pcnb.nudging import CentredPC
from pcnb.schedules import Spike, arrivals

leaves = lambda tree: jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array))
pc = PredictiveCoding(ForwardEnergy(output_precision=0.2), GaussNewton(1, 1))


@pytest.fixture(scope="module")
def net(): return mlp((5,), 3, 6, 3, output_gain=1.0, key=jax.random.key(0))


@pytest.mark.parametrize("rule", [CentredPC(pc.energy, pc.inference), LogDeterminant(pc, examples=2)], ids=lambda r: type(r).__name__)
def test_update_is_the_gradient_through_the_optimiser(rule, net, getkey):
    x, y, optimiser = jax.random.normal(getkey(), (4, 5)), jax.nn.one_hot(jnp.arange(4) % 3, 3), optax.sgd(0.5)
    gradient, report = eqx.filter_jit(rule.gradient)(net, x, y)
    moved, _, seen = eqx.filter_jit(rule.update)(net, optimiser, optimiser.init(eqx.filter(net, eqx.is_inexact_array)), x, y)
    for a, b, g in zip(leaves(moved), leaves(net), leaves(gradient)): np.testing.assert_allclose(a, b - 0.5 * g, atol=1e-6)
    np.testing.assert_allclose(seen.loss, Backprop().gradient(net, x, y)[1].loss, rtol=1e-6)


def test_log_determinant_of_one_layer_is_that_of_the_output_precision(getkey):
    "No hidden errors: the determinant of I / p, and no gradient."
    flat = mlp((5,), 3, depth=1, key=getkey())
    x = jax.random.normal(getkey(), (5,))
    np.testing.assert_allclose(log_determinant(flat, ForwardEnergy(output_precision=0.2), x), -1.5 * np.log(0.2), rtol=1e-6)


def test_log_determinants_that_cannot_be(net, getkey):
    x = jax.random.normal(getkey(), (5,))
    for energy in (ForwardEnergy(precision=(1.0, 0.0)), ForwardEnergy(output_precision=0.0)):
        with pytest.raises(InputError, match="precisions > 0; got 0"): log_determinant(net, energy, x)
    for how, said in ((dict(rule=IncrementalPC()), "for PredictiveCoding; got IncrementalPC"), (dict(rule=CentredPC()), "got CentredPC"), (dict(rule=Backprop()), "got Backprop"),
                      (dict(examples=0), "examples is 0"), (dict(weight=-1.0), "weight is -1")):
        with pytest.raises(InputError, match=said): LogDeterminant(**how)
    for p in (0.0, np.float32(0), jnp.asarray(-1.0)):
        with pytest.raises(InputError, match="centred nudging needs a number > 0"): CentredPC(ForwardEnergy(output_precision=p) if p >= 0 else eqx.tree_at(lambda e: e.output_precision, ForwardEnergy(), p))


def test_spike_weights_by_step(net):
    energy = ForwardEnergy(precision=(2.0, 3.0), output_precision=0.5)
    assert arrivals(net) == (3, 2, 1)
    own = np.array([2.0, 3.0, 0.5])
    for t, factors in ((1, (0.1, 0.1, 4.0)), (2, (0.1, 4.0, 0.1 * np.exp(-1))), (3, (4.0, 0.1 * np.exp(-1), 0.1 * np.exp(-2))), (4, (1, 1, 1)), (9, (1, 1, 1))):
        at = Spike(4.0, 0.1, 1.0)(net, energy, t)
        np.testing.assert_allclose([*at.precision, at.output_precision], own * factors, rtol=1e-6)
    with pytest.raises(InputError, match="rest is -1"): Spike(rest=-1)
    with pytest.raises(InputError, match="peak is inf"): Spike(peak=float("inf"))


def test_centred_nudging_with_held_predictions_is_backpropagation():
    "One sweep of step 1 with held predictions: its errors are backpropagation's times p or -p."
    net, x, y = mlp((5,), 3, 6, 4, output_gain=1.0, key=jax.random.key(0)), jax.random.normal(jax.random.key(1), (4, 5)), jax.nn.one_hot(jnp.arange(4) % 3, 3)
    got, want = (eqx.filter_jit(rule.gradient)(net, x, y)[0] for rule in (CentredPC(ForwardEnergy(output_precision=0.1), Sweep(), held=True), Backprop()))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True): np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
