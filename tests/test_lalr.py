"""LALR: its layers, its bounds and invariances, and its place among Optax's transformations. Expectations come from NumPy."""
import equinox as eqx
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given

from pcnb.energy import ForwardEnergy
from pcnb.inference import GaussNewton, GradientDescent, infer
from pcnb.lalr import LalrState, lalr, layer_groups
from pcnb.learning import PredictiveCoding
from pcnb.models import mlp
from pcnb.network import InputError, PCNetwork, Skip
from pcnb.skip import Projection, mupc
from pcnb.training import load_checkpoint, save_checkpoint


def network(key):
    "Three dense layers, a learned skip and decoders."
    k = jax.random.split(key, 3)
    layers = mlp((4,), 2, 4, 3, key=k[0]).layers
    decoders = [eqx.nn.Linear(n, 4, key=k[1]) for n in (4, 4, 2)]
    return PCNetwork(layers, (4,), [Skip(0, 2, Projection((4,), (4,), key=k[2]))], decoders)


def parameters(net): return eqx.filter(net, eqx.is_inexact_array)


def random_like(tree, seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(scale * rng.normal(size=p.shape), p.dtype), tree)


def flat(layer): return np.concatenate([np.ravel(p) for p in jax.tree.leaves(layer)]).astype(np.float64)


def layers_of(net): return [*net.layers, *(s.module for s in net.skips), *net.decoders]


def test_groups_of_a_network(getkey):
    net = parameters(network(getkey()))
    leaves, groups = jax.tree.leaves(net), layer_groups(net)
    assert list(groups) == [f".layers[{i}]" for i in range(3)] + [".skips[0]"] + [f".decoders[{i}]" for i in range(3)]
    for members, layer in zip(groups.values(), layers_of(net), strict=True):
        assert [id(leaves[i]) for i in members] == [id(p) for p in jax.tree.leaves(layer)]
    assert sorted(i for g in groups.values() for i in g) == list(range(len(leaves)))


@pytest.mark.parametrize("tree, names", [
    ([1.0, {"w": 1.0, "b": 1.0}, (1.0, [1.0])], ["[0]", "[1]", "[2]"]),
    ({"first": {"w": 1.0, "b": 1.0}, "second": {"w": 1.0}}, ["['first']", "['second']"]),
    (1.0, [""]), ([], []), ([None, 1.0], ["[1]"])])
def test_groups_of_other_trees(tree, names): assert list(layer_groups(tree)) == names


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_against_numpy(decay, getkey):
    "g_t / sqrt(v_t / (1 - d^t)), v_t = d v_{t-1} + (1 - d) |g_t|^2, weight and bias of a layer together."
    net = parameters(network(getkey()))
    transformation, v = lalr(decay), np.zeros(7)
    state = transformation.init(net)
    for t in range(1, 5):
        g = random_like(net, t, 10.0 ** (t - 3))
        updates, state = transformation.update(g, state)
        for l, (before, after) in enumerate(zip(layers_of(g), layers_of(updates), strict=True)):
            v[l] = decay * v[l] + (1 - decay) * (flat(before) ** 2).sum()
            np.testing.assert_allclose(flat(after), flat(before) / np.sqrt(v[l] / (1 - decay ** t)), rtol=2e-5)
    assert jax.tree.structure(updates) == jax.tree.structure(net)


scales = st.sampled_from([0.0, 1e-37, 1e-30, 1e-12, 1.0, 1e12, 1e30])


@given(seed=st.integers(0, 2**31), decay=st.sampled_from([0.0, 0.5, 0.9, 0.99]), steps=st.lists(st.tuples(scales, scales), min_size=1, max_size=8))
def test_no_step_is_larger_than_stated(seed, decay, steps):
    "Whatever the gradients and their history: no layer's update has a norm above 1 / sqrt(1 - decay); zero stays zero."
    tree = [jnp.zeros((3, 2)), {"w": jnp.zeros(4), "b": jnp.zeros(1)}]
    transformation = lalr(decay)
    state = transformation.init(tree)
    for t, scale in enumerate(steps):
        g = [random_like(part, seed + t, c) for part, c in zip(tree, scale)]
        updates, state = transformation.update(g, state)
        for u, before in zip(updates, g):
            assert np.linalg.norm(flat(u)) <= 1 / np.sqrt(1 - decay) * (1 + 1e-5)
            if not flat(before).any(): assert not flat(u).any()


def test_the_bound_is_reached():
    "A gradient after a long silence: v is (1 - d) |g|^2, and its correction has worn off."
    transformation, zero, g = lalr(0.9), jnp.zeros(3), jnp.array([0.0, 3e-20, 4e-20])
    state = transformation.init(zero)
    for _ in range(200): updates, state = transformation.update(zero, state)
    assert not flat(updates).any()
    updates, _ = transformation.update(g, state)
    assert np.linalg.norm(flat(updates)) == pytest.approx(10 ** 0.5, rel=1e-5)


@given(seed=st.integers(0, 2**31), power=st.lists(st.integers(-40, 40), min_size=2, max_size=2))
def test_scale_of_a_layer_does_not_matter(seed, power):
    "Bit for bit for powers of two: every layer's gradients times a constant of its own."
    tree = [jnp.zeros((3, 2)), (jnp.zeros(4), jnp.zeros(1))]
    transformation = lalr()
    a, b = transformation.init(tree), transformation.init(tree)
    for t in range(4):
        g = random_like(tree, seed + t)
        u, a = transformation.update(g, a)
        v, b = transformation.update([jax.tree.map(lambda p: p * 2.0 ** k, part) for k, part in zip(power, g)], b)
        for p, q in zip(jax.tree.leaves(u), jax.tree.leaves(v)): np.testing.assert_array_equal(p, q)


def test_precision_does_not_matter(getkey):
    "At all precisions times c the equilibrium is the same and the gradient c times as large: with LALR the weights move the same, and by plain SGD c times as far."
    net = mlp((5,), 3, 6, 4, output_gain=1.0, key=getkey())
    X, Y = jax.random.normal(getkey(), (8, 5)), jax.nn.one_hot(jnp.arange(8) % 3, 3)
    @eqx.filter_jit
    def gradient(c): return PredictiveCoding(ForwardEnergy(precision=c, output_precision=c), GaussNewton(1, 2)).gradient(net, X, Y)[0]
    moved = lambda c, optimiser: [flat(f) for f in optimiser.update(gradient(jnp.asarray(c)), optimiser.init(parameters(net)))[0].layers]
    for optimiser, factor in ((optax.chain(lalr(), optax.sgd(0.1)), 1), (optax.sgd(0.1), 4)):
        for a, b in zip(moved(1.0, optimiser), moved(4.0, optimiser)): np.testing.assert_allclose(factor * a, b, rtol=1e-3, atol=1e-5)


def test_zero_weights_neither_freeze_nor_explode(getkey):
    net = jax.tree.map(jnp.zeros_like, parameters(network(getkey())))
    optimiser = optax.chain(lalr(), optax.sgd(0.1))
    updates, _ = optimiser.update(random_like(net, 1, 1e6), optimiser.init(net), net)
    for layer in layers_of(updates): assert np.linalg.norm(flat(layer)) == pytest.approx(0.1, rel=1e-5)


def test_half_precision_keeps_its_type():
    g = [jnp.full(4, 3e4, jnp.float16), jnp.full(9, 2.0, jnp.bfloat16)]  # the first's squares overflow in its own type
    updates, state = lalr().update(g, lalr().init(g))
    assert [u.dtype for u in updates] == [jnp.float16, jnp.bfloat16] and state.norm.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(updates[0], np.float32), 0.5, rtol=1e-2)
    np.testing.assert_allclose(np.asarray(updates[1], np.float32), 1 / 3, rtol=1e-2)


def test_masked_layers_keep_their_gradient(getkey):
    net = parameters(network(getkey()))
    g = random_like(net, 3)
    mask = lambda net: eqx.tree_at(lambda m: m.layers[1], jax.tree.map(lambda _: False, net), jax.tree.map(lambda _: True, net.layers[1]))
    masked = optax.masked(lalr(), mask)
    updates, _ = masked.update(g, masked.init(net), net)
    for i, (before, after) in enumerate(zip(layers_of(g), layers_of(updates))):
        np.testing.assert_allclose(flat(after), flat(before) / (np.linalg.norm(flat(before)) if i == 1 else 1), rtol=1e-5)


def test_multi_transform_gives_each_part_its_own(getkey):
    net = parameters(network(getkey()))
    g = random_like(net, 4)
    label = lambda net: eqx.tree_at(lambda t: t.decoders, jax.tree.map(lambda _: "forward", net), jax.tree.map(lambda _: "backward", net.decoders))
    optimiser = optax.multi_transform({"forward": optax.chain(lalr(), optax.sgd(0.5)), "backward": optax.sgd(2.0)}, label)
    updates, _ = jax.jit(optimiser.update)(g, optimiser.init(net), net)
    for i, (before, after) in enumerate(zip(layers_of(g), layers_of(updates))):
        want = -0.5 * flat(before) / np.linalg.norm(flat(before)) if i < 4 else -2.0 * flat(before)
        np.testing.assert_allclose(flat(after), want, rtol=1e-5)


def test_injected_decay_can_be_set_later():
    optimiser, g = optax.inject_hyperparams(lalr)(decay=0.5), [jnp.array([3.0, 4.0])]
    state = optimiser.init(g)
    state.hyperparams["decay"] = jnp.asarray(0.75)
    _, state = jax.jit(optimiser.update)(g, state)
    assert float(state.inner_state.norm[0]) == pytest.approx(5 * 0.25 ** 0.5, rel=1e-5)


def test_checkpoint_goes_on_exactly(tmp_path, getkey):
    net = parameters(network(getkey()))
    optimiser = optax.chain(lalr(), optax.sgd(0.1, 0.9))
    state = optimiser.init(net)
    for t in range(3): _, state = optimiser.update(random_like(net, t), state, net)
    save_checkpoint(tmp_path / "c.eqx", 3, state)
    _, again = load_checkpoint(tmp_path / "c.eqx", optimiser.init(net))
    assert isinstance(again[0], LalrState) and int(again[0].count) == 3
    g = random_like(net, 9)
    for a, b in zip(*(jax.tree.leaves(optimiser.update(g, s, net)) for s in (state, again)), strict=True): np.testing.assert_array_equal(a, b)


def test_states_each_get_their_own_rate(getkey):
    "As the stepper of gradient descent on the states: a state moves by the rate as soon as the error is there, and not before."
    net = mlp((4,), 3, 5, 5, output_gain=1.0, key=getkey())
    x, y = jax.random.normal(getkey(), (4,)), jax.nn.one_hot(1, 3)
    got = infer(net, ForwardEnergy(), GradientDescent(2, optax.chain(lalr(0.0), optax.sgd(1e-3))), x, y)
    moved = [float(jnp.linalg.norm(a - b)) for a, b in zip(got.states.hidden, got.ref.hidden)]
    assert moved[:2] == [0, 0]
    assert moved[2] == pytest.approx(1e-3, rel=1e-3)
    assert 1e-3 < moved[3] <= 2e-3 * (1 + 1e-3)


def test_jit_is_no_jit(getkey):
    net = parameters(mupc(mlp((4,), 2, 5, 4, skips=True, key=getkey()), key=getkey()))
    g, transformation = random_like(net, 5), lalr()
    state = transformation.init(net)
    for a, b in zip(jax.tree.leaves(transformation.update(g, state)), jax.tree.leaves(jax.jit(transformation.update)(g, state)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5])
def test_bad_decay(decay):
    with pytest.raises(InputError, match=f"decay is {decay}; expected a number from 0"): lalr(decay)
