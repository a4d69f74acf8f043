"""Batch normalisation: NumPy's forward pass, inference that sees one example, learning that knows the statistics move, running statistics in closed form."""
import shutil

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pcnb.augmentation import Mixup
from pcnb.data import Dataset, Scale
from pcnb.diagnostics import diagnose
from pcnb.energy import CrossEntropy, ForwardEnergy
from pcnb.inference import LBFGS, ErrorDescent, GaussNewton, GradientDescent, Sweep, infer, infer_batch
from pcnb.lalr import lalr
from pcnb.learning import Backprop, IncrementalPC, PredictiveCoding, layer_cosines
from pcnb.log_determinant import LogDeterminant
from pcnb.models import BatchNorm, BatchNormConv, Chain, Conv, Dense, GlobalAverage, MaxPool, StandardisedConv, mlp, resnet, vgg
from pcnb.network import BATCH, InputError, PCNetwork, Skip, Statistics, freeze, live, parameter_count, statistics, with_statistics
from pcnb.nudging import CentredPC
from pcnb.training import average_weights, evaluate, fit

IMAGES = 2 + 3 * jax.random.normal(jax.random.key(1), (6, 4, 4, 2))
TARGETS = jax.nn.one_hot(jnp.arange(6) % 3, 3)
LOSS = CrossEntropy()


def network(conv=BatchNormConv):
    "Three convolutions, a skip, a pooling, a dense layer."
    keys = jax.random.split(jax.random.key(0), 4)
    layers = [conv(2, 4, key=keys[0]), conv(4, 4, 3, jnp.tanh, key=keys[1]), Chain(MaxPool(2), conv(4, 3, 3, jnp.tanh, key=keys[2])), Chain(GlobalAverage(jnp.tanh), Dense(3, 3, key=keys[3]))]
    return PCNetwork(layers, (4, 4, 2), [Skip(1, 2)])


NET = network()
RULES = {"backprop": Backprop(LOSS), "pc": PredictiveCoding(ForwardEnergy(LOSS), GaussNewton(1, 2)), "ipc": IncrementalPC(ForwardEnergy(LOSS), GradientDescent(2))}
leaves = lambda tree: jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array))
norm_of = lambda layer: (layer.parts[-1] if isinstance(layer, Chain) else layer)


@pytest.fixture(scope="module")
def by_numpy():
    "Statistics of the three normalisations, and the output, of the batch; the convolutions are the package's, tested elsewhere."
    kept = []
    def normalise(layer, x):
        z = np.asarray(jax.vmap(norm_of(layer).conv)(jnp.asarray(x, jnp.float32)), np.float64)
        flat = z.reshape(-1, z.shape[-1])
        kept.append((flat.mean(0), flat.var(0)))
        return (z - flat.mean(0)) / np.sqrt(flat.var(0) + 1e-5)
    one = normalise(NET.layers[0], IMAGES)
    two = one + normalise(NET.layers[1], one)
    three = normalise(NET.layers[2], two.reshape(6, 2, 2, 2, 2, 4).max((2, 4)))
    dense = NET.layers[3].parts[1]
    return kept, np.tanh(three).mean((1, 2)) @ np.asarray(dense.weight).T


def test_forward_pass_is_that_of_numpy(by_numpy):
    kept, want = by_numpy
    frozen = freeze(NET, IMAGES)
    for s, (mean, variance) in zip(statistics(frozen), kept, strict=True):
        np.testing.assert_allclose(s.mean, mean, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(s.variance, variance, rtol=1e-4)
    np.testing.assert_allclose(jax.vmap(frozen)(IMAGES), want, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(jax.vmap(live(NET), axis_name=BATCH)(IMAGES), want, rtol=1e-3, atol=1e-4)


def test_a_part_outside_the_forward_pass_is_refused():
    decoders = [Conv(4, 2, key=jax.random.key(0)), BatchNormConv(4, 4, key=jax.random.key(0))]
    net = PCNetwork([BatchNormConv(2, 4, key=jax.random.key(0)), Conv(4, 4, key=jax.random.key(0))], (4, 4, 2), decoders=decoders)
    with pytest.raises(InputError, match="is in no layer or skip"): freeze(net, IMAGES)


def test_one_value_a_channel_has_no_variance():
    net = PCNetwork([Chain(Dense(3, 4, key=jax.random.key(0)), BatchNorm(4)), Dense(4, 2, key=jax.random.key(1))], (3,))
    with pytest.raises(InputError, match="a batch of one example, of shape \\(4,\\), has no variance"): freeze(net, jnp.ones((1, 3)))
    freeze(net, jnp.ones((2, 3)))
    freeze(NET, IMAGES[:1])  # an image has many values a channel


def test_a_scale_of_whole_numbers_is_trained():
    for part in (BatchNorm(4, 1), BatchNormConv(2, 4, gain=1, key=jax.random.key(0)), StandardisedConv(2, 4, gain=2, key=jax.random.key(0))):
        assert all(eqx.is_inexact_array(p) for p in jax.tree.leaves(eqx.filter(part, eqx.is_array)))


def test_inference_sees_the_others_through_the_statistics_alone():
    frozen, rule = freeze(NET, IMAGES), RULES["pc"]
    run = eqx.filter_jit(jax.vmap(lambda x, y: infer(frozen, rule.energy, rule.inference, x, y)))
    alone, among = run(IMAGES, TARGETS), run(IMAGES.at[1:].multiply(-5.0), TARGETS)
    for a, b in zip(alone.states.x, among.states.x): np.testing.assert_allclose(a[0], b[0], rtol=1e-4, atol=1e-5)
    assert abs(alone.states.x[1][1] - among.states.x[1][1]).max() > 0.1
    found = eqx.filter_jit(rule.infer)(NET, IMAGES, TARGETS)  # and the rule freezes what it is given
    for a, b in zip(alone.states.x, found.states.x): np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["backprop", "pc"])
def test_gradient_is_orthogonal_to_the_filters_that_are_normalised(name):
    "Scaling a filter changes nothing, but for the 1e-5 in the root; through frozen statistics it would."
    rule = RULES[name]
    gradient, _ = eqx.filter_jit(rule.gradient)(NET, IMAGES, TARGETS)
    constant = with_statistics(NET, [lambda z, s=s: (s.mean, s.variance) for s in statistics(freeze(NET, IMAGES))])
    fixed = eqx.filter_jit(rule.gradient)(constant, IMAGES, TARGETS)[0]
    cosine = lambda g: [float(jnp.vdot(norm_of(a).conv.weight, norm_of(b).conv.weight) / jnp.linalg.norm(norm_of(a).conv.weight.ravel()) / jnp.linalg.norm(norm_of(b).conv.weight.ravel()))
                        for a, b in zip(NET.layers[:3], g.layers[:3])]
    assert max(map(abs, cosine(gradient))) < 1e-3
    assert max(map(abs, cosine(fixed))) > 0.02
    assert all((g == 0).all() for s in statistics(gradient) for g in (s.mean, s.variance))


def test_the_log_determinant_does_not_see_the_size_of_filters_that_are_normalised():
    "Its gradient is what a rule with it has more than the rule alone."
    rule = RULES["pc"]
    alone, both = (eqx.filter_jit(r.gradient)(NET, IMAGES, TARGETS)[0] for r in (rule, LogDeterminant(rule, weight=1.0, examples=3)))
    for layer, a, b in zip(NET.layers[:3], alone.layers[:3], both.layers[:3]):
        w, g = (np.asarray(v, np.float64).ravel() for v in (norm_of(layer).conv.weight, norm_of(b).conv.weight - norm_of(a).conv.weight))
        assert np.linalg.norm(g) > 1e-3 and abs(w @ g) < 2e-3 * np.linalg.norm(w) * np.linalg.norm(g)


def test_small_output_precision_gives_errors_through_frozen_statistics():
    "The limit: output errors carried back by the frozen network, and each layer's own gradient with live statistics."
    frozen = freeze(NET, IMAGES)
    def carried(x, y):
        ref = frozen.feedforward(x)
        return ref, jax.grad(lambda eps: LOSS(frozen.from_errors(x, eps).x[-1], y))(ref.eps)
    ref, delta = jax.jit(jax.vmap(carried))(IMAGES, TARGETS)
    def local(net):
        def one(ref, delta, y):
            n = live(net)
            return sum(jnp.sum(d * n.predict(l, ref.x)) for l, d in enumerate(delta, 1)) + LOSS(n.predict(4, ref.x), y)
        return jnp.mean(jax.vmap(one, axis_name=BATCH)(ref, delta, TARGETS))
    want = eqx.filter_jit(eqx.filter_grad(local))(NET)
    rule = lambda p: PredictiveCoding(ForwardEnergy(LOSS, output_precision=p), GaussNewton(1, 1))
    got = {p: eqx.filter_jit(rule(p).gradient)(NET, IMAGES, TARGETS)[0] for p in (1e-1, 1e-3)}
    far, near = (1 - layer_cosines(got[p], want) for p in (1e-1, 1e-3))
    assert near.max() < 1e-5 and far.max() > 10 * near.max()
    for a, b in zip(leaves(got[1e-3]), leaves(want), strict=True): np.testing.assert_allclose(a * 1e3, b, rtol=0.02, atol=0.02 * float(abs(b).max()) + 1e-6)


@pytest.mark.parametrize("name", RULES)
def test_running_statistics_move_by_the_momentum_alone(name):
    "Whatever the optimiser does to them: here decay, and steps of the rate's size."
    optimiser = optax.adamw(0.05, weight_decay=0.3)
    net, _, report = eqx.filter_jit(RULES[name].update)(NET, optimiser, optimiser.init(eqx.filter(NET, eqx.is_inexact_array)), IMAGES, TARGETS)
    batch = statistics(freeze(NET, IMAGES))
    for s, old, new, told in zip(statistics(net), statistics(NET), batch, report.statistics, strict=True):
        for field in ("mean", "variance"):
            np.testing.assert_allclose(getattr(s, field), 0.9 * getattr(old, field) + 0.1 * getattr(new, field), rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(getattr(told, field), getattr(new, field), rtol=1e-4, atol=1e-5)
    assert all((a != b).any() for a, b in zip(leaves(net.layers[3]), leaves(NET.layers[3])))


@pytest.mark.parametrize("rule", [CentredPC(ForwardEnergy(LOSS, output_precision=0.1), GaussNewton(1, 1)), LogDeterminant(PredictiveCoding(ForwardEnergy(LOSS), GaussNewton(1, 1)))], ids=["cpc", "log-determinant"])
def test_rules_built_on_predictive_coding_move_them_too(rule):
    keys, x = jax.random.split(jax.random.key(2)), jax.random.normal(jax.random.key(3), (6, 5))
    net = PCNetwork([Chain(Dense(5, 4, key=keys[0]), BatchNorm(4)), Dense(4, 3, jnp.tanh, key=keys[1])], (5,))
    optimiser = optax.adamw(0.05, weight_decay=0.3)
    new, *_ = eqx.filter_jit(rule.update)(net, optimiser, optimiser.init(eqx.filter(net, eqx.is_inexact_array)), x, TARGETS)
    z = np.asarray(x) @ np.asarray(net.layers[0].parts[0].weight).T
    np.testing.assert_allclose(statistics(new)[0].mean, 0.1 * z.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(statistics(new)[0].variance, 0.9 + 0.1 * z.var(0), rtol=1e-4)
    gradient = eqx.filter_jit(rule.gradient)(net, x, TARGETS)[0]
    assert not any(g.any() for g in jax.tree.leaves(statistics(gradient)))


def test_running_statistics_after_three_batches():
    still, net, update, seen = optax.sgd(0.0), NET, eqx.filter_jit(RULES["backprop"].update), []
    state = still.init(eqx.filter(NET, eqx.is_inexact_array))
    for factor in (1.0, 2.0, -1.0):
        net, state, _ = update(net, still, state, factor * IMAGES, TARGETS)
        seen.append(statistics(freeze(NET, factor * IMAGES))[1])
    got = statistics(net)[1]
    np.testing.assert_allclose(got.variance, 0.9**3 + sum(0.1 * 0.9**(2 - i) * np.asarray(s.variance) for i, s in enumerate(seen)), rtol=1e-4)
    np.testing.assert_allclose(got.mean, sum(0.1 * 0.9**(2 - i) * np.asarray(s.mean) for i, s in enumerate(seen)), rtol=1e-4, atol=1e-5)


def test_with_momentum_one_evaluation_is_the_training_pass(by_numpy):
    whole = with_statistics(NET, [Statistics(s.mean, s.variance, 1.0) for s in statistics(NET)])
    still = optax.sgd(0.0)
    net, *_ = eqx.filter_jit(RULES["backprop"].update)(whole, still, still.init(eqx.filter(whole, eqx.is_inexact_array)), IMAGES, TARGETS)
    np.testing.assert_allclose(jax.vmap(net)(IMAGES), by_numpy[1], rtol=1e-3, atol=1e-4)
    score = evaluate(net, IMAGES, np.arange(6) % 3, lambda x: x, LOSS, 4)
    np.testing.assert_allclose(score.loss, np.mean(np.log(np.exp(by_numpy[1]).sum(1)) - (by_numpy[1] * np.asarray(TARGETS)).sum(1)), rtol=1e-3)


def test_statistics_are_no_parameters():
    assert parameter_count(NET) == 9 * (2 * 4 + 4 * 4 + 4 * 3) + 2 * (4 + 4 + 3) + 3 * 3 + 3
    assert parameter_count(NET) - parameter_count(network(Conv)) == 4 + 4 + 3  # a scale and a bias instead of a bias
    # the size of a layer's gradient is that of its weights
    gradient = eqx.filter_jit(RULES["backprop"].gradient)(NET, IMAGES, TARGETS)[0]
    state = lalr(0.0)
    norm = state.update(gradient, state.init(gradient))[1].norm[0]
    own = gradient.layers[0]
    np.testing.assert_allclose(norm, jnp.sqrt(sum(jnp.sum(g**2) for g in (own.conv.weight, own.norm.scale, own.norm.bias))), rtol=1e-5)


@pytest.mark.parametrize("rule", [Backprop(), PredictiveCoding(inference=GaussNewton(1, 2))], ids=["backprop", "pc"])
def test_network_without_it_is_computed_as_before(rule):
    "To the letter: the same operations as of a gradient that knows nothing of batches."
    net, x, y = mlp((3,), 2, 4, 3, key=jax.random.key(0)), jnp.ones((5, 3)), jnp.ones((5, 2))
    assert freeze(net, x) is net and live(net) is net
    def plain(net, x, y):
        if isinstance(rule, Backprop): return eqx.filter_grad(lambda n: jnp.mean(jax.vmap(rule.loss)(jax.vmap(n)(x), y)))(net)
        found = jax.vmap(infer, (None, None, None, 0, 0))(net, rule.energy, rule.inference, x, y)
        return eqx.filter_grad(lambda n: jnp.mean(jax.vmap(lambda s, t, r: rule.energy.learning(n, s, t, r))(found.states, y, found.ref)))(net)
    compiled = lambda f: jax.jit(lambda p: eqx.filter(f(eqx.combine(p, eqx.filter(net, eqx.is_array, inverse=True)), x, y), eqx.is_array)).lower(eqx.filter(net, eqx.is_array)).compile()
    new, old = compiled(lambda *a: rule.gradient(*a)[0]), compiled(plain)
    for a, b in zip(jax.tree.leaves(new(eqx.filter(net, eqx.is_array))), jax.tree.leaves(old(eqx.filter(net, eqx.is_array))), strict=True): np.testing.assert_array_equal(a, b)
    assert new.cost_analysis()["flops"] == old.cost_analysis()["flops"]


def test_backpropagation_agrees_with_itself_and_inference_lowers_the_energy():
    assert diagnose(NET, RULES["backprop"], IMAGES, TARGETS).cosine == pytest.approx(np.ones(4), abs=1e-4)
    look = diagnose(NET, RULES["pc"], IMAGES, TARGETS)
    assert look.energy_ratio < 1 and look.relative_residual < 1


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    return Dataset("noise", rng.integers(0, 256, (16, 4, 4, 2), np.uint8), np.arange(16) % 3, rng.integers(0, 256, (6, 4, 4, 2), np.uint8), np.arange(6) % 3, ("a", "b", "c"))


def test_resumed_run_is_the_straight_one(data, tmp_path):
    train = lambda epochs, **kw: fit(NET, Backprop(LOSS), optax.adamw(1e-2), data, epochs, 4, diagnose_examples=0, progress=False, **kw)
    straight = train(2)
    train(1, folder=tmp_path)
    resumed = train(2, folder=tmp_path, resume=True)
    for a, b in zip(leaves(straight.net), leaves(resumed.net), strict=True): np.testing.assert_array_equal(a, b)
    assert statistics(straight.net)[0].mean.any() and [m["test_loss"] for m in straight.metrics] == [m["test_loss"] for m in resumed.metrics]


def test_measured_statistics_are_scored_and_returned_and_do_not_train(data, tmp_path):
    "Those of the first plain images, for the mean weights; the checkpoint goes on from the running ones."
    scale = Scale(*data.moments())
    train = lambda epochs, **kw: fit(NET, Backprop(LOSS), optax.chain(optax.adamw(1e-2), average_weights(0.9)), data, epochs, 4, augment=Mixup(1.0), scale=scale, diagnose_examples=0, progress=False, **kw)
    running, measured = train(2), train(2, statistics_examples=9)
    weights = lambda net: leaves(with_statistics(net, [None] * len(statistics(net))))
    for a, b in zip(weights(running.net), weights(measured.net), strict=True): np.testing.assert_array_equal(a, b)
    z = np.asarray(jax.vmap(lambda image: measured.net.layers[0].conv(scale(image)))(data.train_images[:8]), np.float64)  # two batches of 4, the ninth left out
    np.testing.assert_allclose(statistics(measured.net)[0].mean, z.mean((0, 1, 2)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(statistics(measured.net)[0].variance, z.var((0, 1, 2)), rtol=1e-4)
    loss = np.mean([LOSS(measured.net(scale(x)), jax.nn.one_hot(y, 3)) for x, y in zip(data.test_images, data.test_labels)])
    assert measured.metrics[-1]["test_loss"] == pytest.approx(loss, rel=1e-4) and running.metrics[-1]["test_loss"] != pytest.approx(loss, rel=1e-4)
    train(1, statistics_examples=9, folder=tmp_path)
    plain = train(2, folder=shutil.copytree(tmp_path, tmp_path / "plain"), resume=True)
    for a, b in zip(leaves(plain.net), leaves(running.net), strict=True): np.testing.assert_array_equal(a, b)
    for _ in range(2):  # goes on, and then has nothing left to do
        resumed = train(2, statistics_examples=9, folder=tmp_path, resume=True)
        for a, b in zip(leaves(resumed.net), leaves(measured.net), strict=True): np.testing.assert_array_equal(a, b)


def test_fewer_examples_to_measure_than_asked_for(data, tmp_path):
    "All of them are taken then; fewer than a batch, or a network without statistics, is refused before anything is written."
    run = lambda n, net=NET, **kw: fit(net, Backprop(LOSS), optax.sgd(0.1), data, 1, 4, statistics_examples=n, diagnose_examples=0, progress=False, **kw)
    for a, b in zip(leaves(run(16).net), leaves(run(5000).net), strict=True): np.testing.assert_array_equal(a, b)
    with pytest.raises(InputError, match="statistics_examples is 3; expected at least 4"): run(3, folder=tmp_path / "run")
    with pytest.raises(InputError, match="keeps no statistics"): run(8, network(Conv), folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("build", [lambda: vgg((8, 8, 3), 5, ((8,), (8, 16)), conv=BatchNormConv, key=jax.random.key(0)),
                                   lambda: resnet((8, 8, 3), 5, 8, (8, 16), (1, 1), conv=BatchNormConv, key=jax.random.key(0))])
def test_models_normalise_every_convolution(build):
    "The mean of a state that no skip joins is 0 in each channel, its deviation 1 before training."
    net, x = build(), 1 + 2 * jax.random.normal(jax.random.key(1), (16, 8, 8, 3))
    states = eqx.filter_jit(lambda n, x: jax.vmap(freeze(n, x).feedforward)(x))(net, x).x[1:-1]
    assert len(statistics(net)) == len(states)
    for l, state in enumerate(states, 1):
        if any(s.dst == l for s in net.skips): continue
        np.testing.assert_allclose(state.mean((0, 1, 2)), 0, atol=1e-3)
        np.testing.assert_allclose(state.std((0, 1, 2)), 1, atol=0.02)


# ---- joint inference: the batch as one problem

def smooth():
    "Dense layers, so that the energy has no kinks."
    keys = jax.random.split(jax.random.key(4), 3)
    return PCNetwork([Chain(Dense(5, 6, key=keys[0]), BatchNorm(6)), Chain(Dense(6, 4, jnp.tanh, key=keys[1]), BatchNorm(4)), Dense(4, 3, jnp.tanh, key=keys[2])], (5,))


ROWS = np.random.default_rng(5).normal(size=(6, 5))


def doubles(tree): return jax.tree.map(lambda v: jnp.asarray(v, jnp.float64) if eqx.is_inexact_array(v) else v, tree)


def batch_energy(net, hidden, p):
    "The batch's energy as a function of all hidden states, written out."
    def one(x, hidden, y):
        n, states = live(net), [x, *hidden]
        errors = [states[l] - n.predict(l, states) for l in range(1, n.depth)]
        return 0.5 * sum(jnp.sum(e**2) for e in errors) + p * LOSS(n.predict(n.depth, states), y)
    return jnp.sum(jax.vmap(one, axis_name=BATCH)(jnp.asarray(ROWS), hidden, doubles(TARGETS)))


JOINT = {"Gauss-Newton": GaussNewton(300, 6, tolerance=1e-6), "LBFGS": LBFGS(500, tolerance=1e-6), "gradient descent": GradientDescent(5000, optax.sgd(0.2)), "error descent": ErrorDescent(5000, optax.sgd(0.1))}


@pytest.mark.parametrize("name", JOINT)
def test_joint_inference_ends_where_the_batch_is_at_rest(name):
    with jax.enable_x64(True):
        net, p = doubles(smooth()), 0.5
        found = eqx.filter_jit(infer_batch)(net, ForwardEnergy(LOSS, output_precision=p), JOINT[name], jnp.asarray(ROWS), doubles(TARGETS))
        value, slope = jax.jit(jax.value_and_grad(lambda h: batch_energy(net, h, p)))(found.states.hidden)
        np.testing.assert_allclose(found.energy.sum(), value, rtol=1e-9)
        np.testing.assert_allclose(found.initial_energy.sum(), p * jax.vmap(LOSS)(jax.vmap(live(net), axis_name=BATCH)(jnp.asarray(ROWS)), doubles(TARGETS)).sum(), rtol=1e-9)
        size = np.sqrt(sum(float(jnp.sum(s**2)) for s in slope))
        np.testing.assert_allclose(found.residual, np.full(6, size), rtol=1e-3, atol=1e-9)
        assert size < 1e-5 and found.energy.sum() < 0.99 * found.initial_energy.sum() and found.relative_residual.shape == (6,)
        frozen = eqx.filter_jit(PredictiveCoding(ForwardEnergy(LOSS, output_precision=p), GaussNewton(300, 6, tolerance=1e-8)).infer)(net, jnp.asarray(ROWS), doubles(TARGETS))
        apart = max(float(abs(a - b).max()) for a, b in zip(found.states.hidden, frozen.states.hidden))
        assert apart > 1e-2  # another equilibrium than with frozen statistics


def test_joint_learning_is_the_slope_of_the_equilibrium_energy():
    "By the envelope theorem, against finite differences of the minimum over the states in the weights; frozen inference has no such energy."
    with jax.enable_x64(True):
        net, energy, x, y = doubles(smooth()), ForwardEnergy(LOSS, output_precision=0.5), jnp.asarray(ROWS), doubles(TARGETS)
        way = jax.tree.map(lambda v: jax.random.normal(jax.random.key(v.size), v.shape, v.dtype), eqx.filter(net, eqx.is_inexact_array))
        way = with_statistics(way, [jax.tree.map(jnp.zeros_like, s) for s in statistics(way)])
        moved = lambda t: eqx.apply_updates(net, jax.tree.map(lambda v: t * v, way))
        for joint, exact in ((True, True), (False, False)):
            rule = PredictiveCoding(energy, GaussNewton(300, 6, tolerance=1e-8), joint=joint)
            lowest = eqx.filter_jit(lambda t: rule.infer(moved(t), x, y).energy.sum() / 6)
            slope = (lowest(jnp.float64(1e-4)) - lowest(jnp.float64(-1e-4))) / 2e-4
            got = sum(jnp.vdot(a, b) for a, b in zip(leaves(eqx.filter_jit(rule.gradient)(net, x, y)[0]), leaves(way), strict=True))
            assert (abs(got - slope) < 1e-5 * abs(slope)) == exact, (joint, float(got), float(slope))


def test_joint_inference_learns_along_backpropagation_in_the_limit():
    rule = lambda p, joint: PredictiveCoding(ForwardEnergy(LOSS, output_precision=p), GaussNewton(1, 2), joint=joint)
    far = lambda p, joint: 1 - layer_cosines(eqx.filter_jit(rule(p, joint).gradient)(NET, IMAGES, TARGETS)[0], eqx.filter_jit(RULES["backprop"].gradient)(NET, IMAGES, TARGETS)[0])
    assert far(1e-3, True).max() < 1e-5 and far(1e-1, True).max() > 1e-3
    assert far(1e-3, False).max() > 0.01


@pytest.mark.parametrize("algorithm", [GradientDescent(3, optax.sgd(0.2)), ErrorDescent(3), Sweep(2, 0.5)])
def test_without_statistics_joint_is_example_by_example(algorithm):
    "Where every example takes the same steps; an algorithm that chooses its step lengths chooses them for the batch."
    net = mlp((5,), 3, 4, 4, key=jax.random.key(0))
    x, energy = jax.random.normal(jax.random.key(3), (6, 5)), ForwardEnergy(LOSS, output_precision=2.0)
    one, all_ = (eqx.filter_jit(PredictiveCoding(energy, algorithm, joint=joint).infer)(net, x, TARGETS) for joint in (False, True))
    for a, b in zip(jax.tree.leaves((one.states, one.energy, one.passes)), jax.tree.leaves((all_.states, all_.energy, all_.passes)), strict=True): np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_the_guard_looks_at_the_batch():
    "Its energy never rises, on weights that make a full step overshoot; single examples may."
    loud = eqx.tree_at(lambda n: n.layers[3].parts[1].weight, NET, 40 * NET.layers[3].parts[1].weight)
    run = lambda algorithm: eqx.filter_jit(infer_batch)(loud, ForwardEnergy(LOSS, output_precision=30.0), algorithm, IMAGES, TARGETS)
    for algorithm in (GaussNewton(3, 2), LBFGS(3)):
        found = run(algorithm)
        assert (found.energy.sum(1) > found.initial_energy.sum(1)).any()
        assert found.energy.sum() <= found.initial_energy.sum() * (1 + 1e-5) and np.isfinite(found.energy).all()
    unguarded = run(GaussNewton(3, 2, rounding=1e6))  # every step is within such rounding
    assert unguarded.energy.sum() > 10 * unguarded.initial_energy.sum()


def test_joint_training_goes_on_and_diagnoses(tmp_path):
    data = Dataset("toy", np.asarray(IMAGES), np.arange(6) % 3, np.asarray(IMAGES), np.arange(6) % 3, ("a", "b", "c"))
    run = fit(NET, PredictiveCoding(ForwardEnergy(LOSS, output_precision=0.1), GaussNewton(1, 2), joint=True), optax.adam(1e-2), data, 3, 6, scale=lambda x: x, progress=False)
    assert run.metrics[-1]["loss"] < run.metrics[0]["loss"] and 0 < run.metrics[-1]["relative_residual"] < 1 and len(run.metrics[-1]["cosine"]) == 4
