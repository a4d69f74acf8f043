"""The rules: limits in which predictive coding is backpropagation, NumPy for incremental steps, locality, and the envelope theorem."""
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pcnb.energy import BidirectionalEnergy, CrossEntropy, ForwardEnergy, Learned, SquaredError
from pcnb.inference import ErrorDescent, GaussNewton, GradientDescent, Sweep
from pcnb.learning import Backprop, IncrementalPC, PredictiveCoding, layer_cosines
from pcnb.models import cnn, mlp
from pcnb.network import InputError, PCNetwork, Skip, States

LOSSES = [SquaredError(), CrossEntropy()]
kind = lambda v: type(v).__name__
gradient = eqx.filter_jit(lambda rule, net, x, y: rule.gradient(net, x, y))
arrays = lambda tree: jax.tree.leaves(eqx.filter(tree, eqx.is_array))


def close(a, b, **tol):
    assert len(arrays(a)) == len(arrays(b)) > 0
    for u, v in zip(arrays(a), arrays(b)): np.testing.assert_allclose(u, v, **tol)


class Layer(eqx.Module):
    "`W act(x)`"
    W: jax.Array
    act: Callable = eqx.field(static=True)

    def __call__(self, x): return self.W @ self.act(x)


def identity(x): return x


def chain(Ws, act=identity, skips=()): return PCNetwork([Layer(jnp.asarray(W), act) for W in Ws], (Ws[0].shape[1],), skips)


def batch(seed, n=4, size=5, classes=3):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(n, size)), jnp.float32), jax.nn.one_hot(rng.integers(0, classes, n), classes)


@pytest.fixture(scope="module")
def net(): return mlp((5,), 3, 6, 4, skips=True, output_gain=1.0, key=jax.random.key(0))


@pytest.mark.parametrize("loss", LOSSES, ids=kind)
def test_backprop_against_finite_differences(loss, x64):
    rng = np.random.default_rng(0)
    Ws = [rng.normal(size=(4, 3)), rng.normal(size=(2, 4))]
    x, y = rng.normal(size=(5, 3)), np.eye(2)[rng.integers(0, 2, 5)]

    def mean_loss():
        out = np.tanh(x @ Ws[0].T) @ Ws[1].T  # act(x) of layer 1 is the identity
        if isinstance(loss, SquaredError): return 0.5 * np.sum((out - y) ** 2, 1).mean()
        return -np.mean(np.sum(y * (out - np.log(np.exp(out).sum(1, keepdims=True))), 1))

    net = PCNetwork([Layer(jnp.asarray(Ws[0]), identity), Layer(jnp.asarray(Ws[1]), jnp.tanh)], (3,))
    got, report = gradient(Backprop(loss), net, jnp.asarray(x), jnp.asarray(y))
    np.testing.assert_allclose(report.loss, mean_loss(), rtol=1e-12)
    assert report.energy == report.loss
    np.testing.assert_allclose(report.output, np.tanh(x @ Ws[0].T) @ Ws[1].T, rtol=1e-12)
    for f, W in zip(got.layers, Ws):
        for i in np.ndindex(W.shape):
            old = W[i]
            W[i] = old + 1e-5
            up = mean_loss()
            W[i] = old - 1e-5
            slope, W[i] = (up - mean_loss()) / 2e-5, old
            np.testing.assert_allclose(f.W[i], slope, atol=1e-8)


@settings(max_examples=5)
@given(seed=st.integers(0, 2**31), loss=st.sampled_from(LOSSES), scale=st.floats(0.2, 2))
def test_held_sweep_is_backpropagation(seed, loss, scale):
    "One sweep of step 1 from the output with unit precisions carries backpropagation's deltas, and held predictions learn from them."
    net = mlp((5,), 3, 6, 4, jnp.tanh, skips=True, output_gain=1.0, key=jax.random.key(seed))
    net = jax.tree.map(lambda p: np.float32(scale) * p if eqx.is_array(p) else p, net)
    x, y = batch(seed)
    (got, report), (bp, twin) = (gradient(rule, net, x, y) for rule in (PredictiveCoding(ForwardEnergy(loss), Sweep(1, 1.0), held=True), Backprop(loss)))
    size = max(float(jnp.abs(v).max()) for v in arrays(bp))
    close(got, bp, rtol=0, atol=2e-5 * max(size, 1))
    np.testing.assert_allclose(report.loss, twin.loss, rtol=1e-6)
    np.testing.assert_array_equal(layer_cosines(got, bp) > 0.999, True)


def test_held_sweep_is_backpropagation_for_images():
    loss = CrossEntropy()
    net = cnn((8, 8, 1), 3, channels=(2, 3), output_gain=1.0, key=jax.random.key(0))
    x, y = jax.random.normal(jax.random.key(1), (3, 8, 8, 1)), jax.nn.one_hot(jnp.arange(3), 3)
    got, bp = (gradient(rule, net, x, y)[0] for rule in (PredictiveCoding(ForwardEnergy(loss), Sweep(1, 1.0), held=True), Backprop(loss)))
    assert min(float(jnp.abs(f.weight).max()) for f in bp.layers) > 1e-3
    close(got, bp, rtol=0, atol=2e-5)


@pytest.mark.parametrize("rule", [PredictiveCoding(ForwardEnergy(CrossEntropy()), Sweep(2, 0.3)), PredictiveCoding(ForwardEnergy(precision=(0.5, 2.0, 1.0)), GradientDescent(4)),
                                  PredictiveCoding(inference=GaussNewton(1, 1)), PredictiveCoding(inference=ErrorDescent(2), held=True), IncrementalPC(), Backprop()],
                         ids=["sweep", "descent", "Gauss-Newton", "held", "incremental", "backprop"])
def test_gradient_is_the_mean_over_examples(rule, net):
    x, y = batch(0)
    whole, report = gradient(rule, net, x, y)
    alone = [gradient(rule, net, x[jnp.full(4, i)], y[jnp.full(4, i)]) for i in range(4)]  # four times the same
    close(whole, jax.tree.map(lambda *v: sum(v) / 4, *[eqx.filter(g, eqx.is_array) for g, _ in alone]), rtol=0, atol=1e-5)
    np.testing.assert_allclose(report.loss, np.mean([r.loss for _, r in alone]), rtol=1e-5)
    np.testing.assert_allclose(report.energy, np.mean([r.energy for _, r in alone]), rtol=1e-5)
    order = jnp.array([2, 0, 3, 1])
    turned, other = gradient(rule, net, x[order], y[order])
    close(turned, whole, rtol=0, atol=1e-6)
    np.testing.assert_allclose(other.output, report.output[order], atol=1e-6)
    # the report tells of the forward pass: its output, and its loss before inference
    out = np.asarray(jax.vmap(net)(x), np.float64)
    np.testing.assert_allclose(report.output, out, atol=1e-5)
    loss = (rule.loss if isinstance(rule, Backprop) else rule.energy.loss)
    want = 0.5 * np.sum((out - y) ** 2, 1) if isinstance(loss, SquaredError) else -np.sum(y * (out - np.log(np.exp(out).sum(1, keepdims=True))), 1)
    np.testing.assert_allclose(report.loss, want.mean(), rtol=1e-5)


@pytest.mark.parametrize("loss", LOSSES, ids=kind)
def test_learning_is_local(loss):
    "Layer l learns from its parents and its own error alone: all else may be replaced, and not one bit changes."
    rng = np.random.default_rng(0)
    draw = lambda *s: jnp.asarray(rng.normal(size=s), jnp.float32)
    sizes, skips = (3, 4, 5, 4, 2), [Skip(1, 3, Layer(draw(4, 4), jnp.tanh))]
    net = PCNetwork([Layer(draw(m, n), jnp.tanh) for n, m in zip(sizes, sizes[1:])], (3,), skips)
    y, energy = jnp.array([0.25, 0.75]), ForwardEnergy(loss, (0.5, 1.0, 2.0), 0.7)
    s, t = (States([draw(n) for n in sizes], [draw(n) for n in sizes[1:-1]]) for _ in range(2))
    learn = jax.jit(lambda s: arrays(eqx.filter_grad(lambda n: energy.learning(n, s, y, s))(net)))
    pick = lambda keep_x, keep_eps: States([a if l in keep_x else b for l, (a, b) in enumerate(zip(s.x, t.x))],
                                           [a if l in keep_eps else b for l, (a, b) in enumerate(zip(s.eps, t.eps), 1)])
    needs = [({0}, {1}), ({1}, {2}), ({2}, {3}), ({3}, set()), ({1}, {3})]  # layers 1..4, then the skip
    full, changed = learn(s), learn(t)
    assert len(full) == 5
    for i, (keep_x, keep_eps) in enumerate(needs):
        np.testing.assert_array_equal(learn(pick(keep_x, keep_eps))[i], full[i])
        assert np.abs(full[i] - changed[i]).max() > 0.01
        for lost in keep_x: assert np.abs(learn(pick(keep_x - {lost}, keep_eps))[i] - full[i]).max() > 0.01
        for lost in keep_eps: assert np.abs(learn(pick(keep_x, keep_eps - {lost}))[i] - full[i]).max() > 0.01


def test_small_output_precision_is_backpropagation(x64):
    "1 - cosine falls with the square of the output precision, in every layer."
    rng = np.random.default_rng(0)
    net = chain([rng.normal(size=(5, 5)) / 2 for _ in range(2)] + [rng.normal(size=(3, 5))], jnp.tanh)
    x, y = jnp.asarray(rng.normal(size=(4, 5))), jnp.asarray(np.eye(3)[rng.integers(0, 3, 4)])
    loss = CrossEntropy()
    bp = gradient(Backprop(loss), net, x, y)[0]
    learned = [gradient(PredictiveCoding(ForwardEnergy(loss, output_precision=jnp.array(p)), GaussNewton(2, 2)), net, x, y)[0] for p in (1.0, 0.1, 0.01, 1e-3, 1e-4)]
    gaps = np.array([1 - layer_cosines(g, bp) for g in learned])
    assert (gaps >= -1e-12).all() and (gaps[0] > 1e-3).any()
    assert (gaps[1:] < gaps[:-1]).all()
    np.testing.assert_allclose(gaps[4] / gaps[3], 0.01, rtol=0.1)
    away = [max(float(jnp.abs(u / p - v).max()) for u, v in zip(arrays(g), arrays(bp))) for g, p in zip(learned[3:], (1e-3, 1e-4))]
    np.testing.assert_allclose(away[1] / away[0], 0.1, rtol=0.1)  # divided by the precision it is backpropagation's gradient, to first order


def closed_energy(Ws, x0, y, p, p_out):
    "F at the equilibrium of a linear network with an identity skip from 1 to 2: the output error is Gaussian, with covariance I/p_out + sum A_l A_l'/p_l."
    M2 = Ws[1] + np.eye(len(Ws[1]))
    A1, A2 = Ws[2] @ M2, Ws[2]
    r = y - A1 @ Ws[0] @ x0
    return 0.5 * r @ np.linalg.solve(np.eye(len(y)) / p_out + A1 @ A1.T / p[0] + A2 @ A2.T / p[1], r)


def test_gradient_at_the_equilibrium_is_that_of_the_closed_form(x64):
    "Envelope theorem: the states' own dependence on the weights drops out at their minimum."
    rng = np.random.default_rng(1)
    Ws, X, Y, p, p_out = [rng.normal(size=s) / 2 for s in ((4, 3), (4, 4), (2, 4))], rng.normal(size=(3, 3)), rng.normal(size=(3, 2)), (0.5, 2.0), 1.7
    value = lambda: np.mean([closed_energy(Ws, x, y, p, p_out) for x, y in zip(X, Y)])
    rule = PredictiveCoding(ForwardEnergy(precision=p, output_precision=p_out), GaussNewton(2, 3))
    got, report = gradient(rule, chain(Ws, skips=[Skip(1, 2)]), jnp.asarray(X), jnp.asarray(Y))
    np.testing.assert_allclose(report.energy, value(), rtol=1e-10)
    for f, W in zip(got.layers, Ws):
        for i in np.ndindex(W.shape):
            old = W[i]
            W[i] = old + 1e-5
            up = value()
            W[i] = old - 1e-5
            slope, W[i] = (up - value()) / 2e-5, old
            np.testing.assert_allclose(f.W[i], slope, atol=1e-8)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_incremental_steps_against_numpy(momentum, x64):
    "Three times: states of all examples one step, then weights one step at the new states. The stepper's momentum belongs to an example and starts at zero."
    rng = np.random.default_rng(2)
    W1, W2, X, Y = rng.normal(size=(4, 3)), rng.normal(size=(2, 4)), rng.normal(size=(5, 3)), rng.normal(size=(5, 2))
    p, p_out, rate, lr = 1.5, 0.7, 0.1, 0.05
    net, optimiser = chain([W1, W2]), optax.sgd(lr)
    rule = IncrementalPC(ForwardEnergy(precision=p, output_precision=p_out), GradientDescent(3, optax.sgd(rate, momentum or None)))
    state = optimiser.init(eqx.filter(net, eqx.is_inexact_array))
    got, _, report = eqx.filter_jit(lambda n, s, x, y: rule.update(n, optimiser, s, x, y))(net, state, jnp.asarray(X), jnp.asarray(Y))
    out = X @ W1.T @ W2.T
    np.testing.assert_allclose(report.output, out, rtol=1e-10)
    np.testing.assert_allclose(report.loss, 0.5 * np.sum((out - Y) ** 2, 1).mean(), rtol=1e-10)
    H = X @ W1.T
    M = np.zeros_like(H)
    for _ in range(3):
        M = momentum * M + p * (H - X @ W1.T) + p_out * (H @ W2.T - Y) @ W2
        H = H - rate * M
        E1, E2 = H - X @ W1.T, Y - H @ W2.T
        energy = np.mean(p / 2 * np.sum(E1 ** 2, 1) + p_out / 2 * np.sum(E2 ** 2, 1))
        W1, W2 = W1 + lr * p * E1.T @ X / 5, W2 + lr * p_out * E2.T @ H / 5
    np.testing.assert_allclose(got.layers[0].W, W1, rtol=1e-10)
    np.testing.assert_allclose(got.layers[1].W, W2, rtol=1e-10)
    np.testing.assert_allclose(report.energy, energy, rtol=1e-10)


def test_incremental_gradient_is_that_of_its_own_inference(x64):
    "Three steps on the states with the weights held, then the slopes in the weights."
    rng = np.random.default_rng(3)
    W1, W2, X, Y = rng.normal(size=(4, 3)), rng.normal(size=(2, 4)), rng.normal(size=(5, 3)), rng.normal(size=(5, 2))
    p, p_out = 1.5, 0.7
    got = IncrementalPC(ForwardEnergy(precision=p, output_precision=p_out), GradientDescent(3, optax.sgd(0.1))).gradient(chain([W1, W2]), jnp.asarray(X), jnp.asarray(Y))[0]
    H = X @ W1.T
    for _ in range(3): H = H - 0.1 * (p * (H - X @ W1.T) + p_out * (H @ W2.T - Y) @ W2)
    np.testing.assert_allclose(got.layers[0].W, -p * (H - X @ W1.T).T @ X / 5, rtol=1e-10)
    np.testing.assert_allclose(got.layers[1].W, p_out * (H @ W2.T - Y).T @ H / 5, rtol=1e-10)


def test_incremental_settings_that_cannot_be():
    with pytest.raises(InputError, match="steps is 0; incremental predictive coding needs at least 1"): IncrementalPC(inference=GradientDescent(0))
    with pytest.raises(InputError, match="takes no schedule"): IncrementalPC(inference=GradientDescent(2, schedule=lambda net, energy, t: energy))


@pytest.mark.parametrize("steps", [1, 5])
def test_incremental_steps_its_optimiser_once_a_step(steps, net):
    optimiser = optax.chain(optax.scale_by_schedule(lambda count: 0.0 * count))
    x, y = batch(1)
    state = optimiser.init(eqx.filter(net, eqx.is_inexact_array))
    _, state, _ = eqx.filter_jit(IncrementalPC(inference=GradientDescent(steps)).update)(net, optimiser, state, x, y)
    assert state[0].count == steps


@pytest.mark.parametrize("rule", [PredictiveCoding(inference=ErrorDescent(1)), Backprop()], ids=["pc", "backprop"])
def test_update_is_one_optimiser_step_down_the_gradient(rule, net):
    x, y = batch(2)
    optimiser = optax.sgd(0.3)
    new, _, report = eqx.filter_jit(rule.update)(net, optimiser, optimiser.init(eqx.filter(net, eqx.is_inexact_array)), x, y)
    g, same = gradient(rule, net, x, y)
    close(new, jax.tree.map(lambda p, d: p - 0.3 * d, eqx.filter(net, eqx.is_array), eqx.filter(g, eqx.is_array)), rtol=0, atol=1e-6)
    np.testing.assert_allclose(report.energy, same.energy, rtol=1e-5)
    assert [f.activation for f in new.layers] == [f.activation for f in net.layers] and new.shapes == net.shapes


def test_decoders_learn_and_leave_the_layers_alone(net):
    "With learned backward predictions a decoder's gradient comes from its reconstruction only, the layers' from the forward errors only."
    x, y = batch(3)
    rng = np.random.default_rng(0)
    decoders = [Layer(jnp.asarray(rng.normal(size=(n, m)) / 3, jnp.float32), jnp.tanh) for n, m in ((5, 6), (6, 6), (6, 6), (6, 3))]
    two_way = PCNetwork(net.layers, (5,), net.skips, decoders)
    rule = PredictiveCoding(BidirectionalEnergy(backward=Learned()), GradientDescent(0))
    g = gradient(rule, two_way, x, y)[0]
    close(g.layers, gradient(PredictiveCoding(inference=GradientDescent(0)), net, x, y)[0].layers, rtol=0, atol=1e-6)
    ref = [np.asarray(v, np.float64) for v in jax.vmap(net.feedforward)(x).x]
    for l, f in enumerate(g.decoders, 1):
        V = np.tanh(ref[l])
        np.testing.assert_allclose(f.W, -(ref[l - 1] - V @ np.asarray(decoders[l - 1].W).T).T @ V / 4, atol=1e-5)


def test_cosines_against_numpy(net):
    rng = np.random.default_rng(0)
    a, b = (jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), eqx.filter(net, eqx.is_array)) for _ in range(2))
    flat = lambda f: np.concatenate([np.ravel(f.weight), np.ravel(f.bias)]).astype(np.float64)
    want = [flat(f) @ flat(g) / np.sqrt((flat(f) @ flat(f)) * (flat(g) @ flat(g))) for f, g in zip(a.layers, b.layers)]
    np.testing.assert_allclose(layer_cosines(a, b), want, atol=1e-6)
    np.testing.assert_allclose(layer_cosines(a, jax.tree.map(lambda v: -3 * v, a)), -np.ones(4), atol=1e-6)
    np.testing.assert_array_equal(layer_cosines(a, jax.tree.map(jnp.zeros_like, b)), np.zeros(4))


@pytest.mark.parametrize("rule", [Backprop(), PredictiveCoding(), IncrementalPC()], ids=lambda r: type(r).__name__)
def test_a_network_of_one_layer_learns_by_every_rule(rule, getkey):
    "No hidden state: a gradient step on the loss, or as many as incremental predictive coding takes."
    net, x, y, optimiser = mlp((5,), 3, depth=1, key=getkey()), jax.random.normal(getkey(), (4, 5)), jax.nn.one_hot(jnp.arange(4) % 3, 3), optax.sgd(0.1)
    got, _, _ = eqx.filter_jit(rule.update)(net, optimiser, optimiser.init(eqx.filter(net, eqx.is_inexact_array)), x, y)
    W, b = np.asarray(net.layers[0].weight, np.float64), np.asarray(net.layers[0].bias, np.float64)
    for _ in range(rule.inference.steps if isinstance(rule, IncrementalPC) else 1):
        e = np.asarray(x) @ W.T + b - np.asarray(y)
        W, b = W - 0.1 * e.T @ np.asarray(x) / 4, b - 0.1 * e.mean(0)
    np.testing.assert_allclose(got.layers[0].weight, W, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(got.layers[0].bias, b, rtol=1e-4, atol=1e-6)


def test_cosines_of_what_is_not_a_number(getkey):
    net = mlp((5,), 3, 4, 2, key=getkey())
    broken = eqx.tree_at(lambda n: n.layers[0].weight, net, net.layers[0].weight * jnp.nan)
    got = layer_cosines(broken, net)
    assert jnp.isnan(got[0]) and abs(got[1] - 1) < 1e-5
