"""Convolutional models: numbers of weights by formula, shapes, poolings and normalisation against NumPy, gradients in every layer."""
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pcnb.energy import CrossEntropy, ForwardEnergy, SquaredError
from pcnb.inference import GaussNewton
from pcnb.learning import Backprop, PredictiveCoding
from pcnb.models import (AvgPool, BatchNormConv, Chain, Conv, Dense, GlobalAverage, GroupNorm, MaxPool, PoolAndPad, StandardisedConv, airnet, avg_pool, cnn, layer_norm, layer_table,
                         max_pool, mlp, pool_and_pad, resnet, resnet9, resnet18, vgg, vgg5, vgg7, vgg9, vgg10, wideresnet)
from pcnb.network import InputError, PCNetwork, parameter_count
from pcnb.skip import learned_projection

KEY = jax.random.key(0)


def sketch(f, *args, **choices):
    "A network without numbers, and how many trainable numbers it would hold."
    net = eqx.filter_eval_shape(f, *args, key=KEY, **choices)
    return net, sum(leaf.size for leaf in jax.tree.leaves(net) if hasattr(leaf, "size"))


def convolutions(channels): return sum(9 * n * m + m for n, m in zip(channels, channels[1:]))


VGG = {vgg5: ([128, 256, 512, 512], 4), vgg7: ([128] * 2 + [256] * 2 + [512] * 2, 3), vgg9: ([128] * 2 + [256] * 2 + [512] * 4, 4),
       vgg10: ([64] + [128] * 2 + [256] * 2 + [512] * 4, 5)}


@pytest.mark.parametrize("f", VGG, ids=lambda f: f.__name__)
def test_vgg_has_the_weights_of_its_name(f):
    channels, poolings = VGG[f]
    side = 32 // 2**poolings
    net, n = sketch(f, (32, 32, 3), 10)
    assert net.depth == int(f.__name__[3:]) == len(channels) + 1 and not net.skips
    assert n == convolutions([3, *channels]) + side * side * 512 * 10 + 10
    assert [shape[-1] for shape in net.shapes] == [3, *channels, 10]
    normed, with_norm = sketch(f, (32, 32, 3), 10, norm=GroupNorm)
    assert with_norm - n == 2 * sum(channels) and normed.shapes == net.shapes  # a scale and a bias for each channel that is read
    assert sketch(f, (32, 32, 3), 10, conv=StandardisedConv)[1] - n == sum(channels)
    small, _ = sketch(f, (32, 32, 3), 10, width=channels[0] // 8)
    assert [shape[-1] for shape in small.shapes] == [3, *(c // 8 for c in channels), 10]


def test_resnet18_has_18_layers_and_8_skips():
    net, n = sketch(resnet18, (32, 32, 3), 10)
    channels = [64] * 5 + [128] * 4 + [256] * 4 + [512] * 4
    assert net.depth == 18 and [(s.src, s.dst) for s in net.skips] == [(l, l + 2) for l in range(1, 17, 2)]
    assert n == convolutions([3, *channels]) + 512 * 10 + 10
    assert net.shapes == ((32, 32, 3), *[(32 * 64 // c, 32 * 64 // c, c) for c in channels], (10,))
    projected = sketch(resnet18, (32, 32, 3), 10, project=learned_projection)[1]
    assert projected - n == sum(c * 2 * c for c in (64, 128, 256))


def test_resnet9_and_airnet_by_formula():
    net, n = sketch(resnet9, (32, 32, 3), 10)
    assert net.depth == 9 and n == convolutions([3, 64, 128, 128, 128, 256, 512, 512, 512]) + 512 * 10 + 10
    assert [(s.src, s.dst) for s in net.skips] == [(2, 4), (6, 8)]
    net, n = sketch(airnet, (32, 32, 3), 100, norm=None)
    assert net.depth == 8 and n == 4 * 3 * 32 + 32 + convolutions([32, 64, 64, 256, 256, 256, 256]) + 256 * 100 + 100


@pytest.mark.parametrize("convolutions", [3, 4])
def test_a_deeper_block_of_airnet_is_the_identity_where_its_last_convolution_is_zero(convolutions, getkey):
    net = airnet((8, 8, 3), 5, (8, 16), 8, convolutions=convolutions, norm=None, key=KEY)
    ends = [s.dst - 1 for s in net.skips]
    assert ends == [convolutions, 2 * convolutions]
    where = lambda n: [getattr(n.layers[i], name) for i in ends for name in ("weight", "bias")]
    zeroed = eqx.tree_at(where, net, replace_fn=jnp.zeros_like)
    x = zeroed.feedforward(jax.random.normal(getkey(), (8, 8, 3))).x
    for s in net.skips: np.testing.assert_array_equal(x[s.dst], x[s.src])
    assert not np.allclose(net(x[0]), zeroed(x[0]))


@pytest.mark.parametrize("norm", [dict(norm=None), dict(norm=layer_norm), dict(conv=BatchNormConv)], ids=["none", "layer", "batch"])
def test_skips_of_a_vgg_add_what_they_lead_past(norm):
    "State 3 is predicted as the means of state 1 over 2x2 pixels, beside zeros in new channels, plus the block; all other layers are those of the plain network."
    plain, net = (vgg((8, 8, 3), 5, ((4, 4), (8, 8)), skips=span, key=KEY, **norm) for span in (False, 2))
    x = net.feedforward(jax.random.normal(jax.random.key(1), (8, 8, 3)))
    states = [np.asarray(v) for v in x.x]
    means = states[1].reshape(4, 2, 4, 2, 4).mean((1, 3))
    branch = np.asarray(net.layers[2](net.layers[1](x.x[1])))
    np.testing.assert_allclose(states[3], np.concatenate([means, np.zeros((4, 4, 4))], -1) + branch, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(branch, np.asarray(plain.layers[2](plain.layers[1](x.x[1]))) / np.sqrt(5 / 2), rtol=1e-4, atol=1e-5)
    assert not plain.skips and all(eqx.tree_equal(net.layers[l], plain.layers[l]) for l in (0, 1, 3, 4))


@pytest.mark.parametrize("shape, span", [((24, 32, 3), 1), ((30, 32, 3), 3), ((28, 28, 3), 3), ((15, 15, 3), 2)])
def test_a_skip_pools_by_the_windows_of_the_poolings_that_it_passes(shape, span):
    "A skip past poolings by 2 takes means over 2, 4 or 8 pixels, on any size and any shape, and leaves out the edge that they leave out."
    net = vgg(shape, 5, ((4,), (4,), (4,), (4,))[:3 if shape[0] < 24 else 4], skips=span, key=KEY)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(*shape[:2], 4)), jnp.float32)
    for s in net.skips:
        h, w, _ = net.shapes[s.src]
        wanted = x[:h, :w]
        for _ in range(span): wanted = avg_pool(wanted, 2)
        np.testing.assert_allclose(s.module(x[:h, :w]), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("depth, widen", [(10, 1), (16, 4), (28, 10)])
def test_wideresnet_by_formula(depth, widen):
    blocks = (depth - 4) // 6
    channels = [16] + [16 * widen] * 2 * blocks + [32 * widen] * 2 * blocks + [64 * widen] * 2 * blocks
    net, n = sketch(wideresnet, (32, 32, 3), 100, 16 * widen, depth)
    assert net.depth == len(channels) + 1 and len(net.skips) == 3 * blocks
    assert n == convolutions([3, *channels]) + 64 * widen * 100 + 100


@pytest.mark.parametrize("build", [lambda **how: mlp((5,), 3, 6, 4, key=KEY, **how), lambda **how: cnn((8, 8, 1), 3, (2, 3), key=KEY, **how), lambda **how: vgg((8, 8, 3), 5, ((8,),), key=KEY, **how),
                                   lambda **how: resnet((8, 8, 3), 5, 8, (8,), (1,), key=KEY, **how), lambda **how: resnet9((8, 8, 3), 5, 8, key=KEY, **how), lambda **how: airnet((8, 8, 3), 5, (8, 16), 8, key=KEY, **how)],
                         ids=["mlp", "cnn", "vgg", "resnet", "resnet9", "airnet"])
def test_output_gain_is_of_the_output_layer(build):
    usual, louder = (build(**how).layers for how in ({}, {"output_gain": 1.0}))
    assert eqx.tree_equal(usual[:-1], louder[:-1])
    for a, b in zip(jax.tree.leaves(eqx.filter(usual[-1], eqx.is_array)), jax.tree.leaves(eqx.filter(louder[-1], eqx.is_array)), strict=True): np.testing.assert_allclose((10 if a.ndim == 2 else 1) * a, b, rtol=1e-5)


def test_sizes_that_cannot_be():
    with pytest.raises(InputError, match="patch is -1"): airnet((8, 8, 3), 5, (8,), -1, key=KEY)
    with pytest.raises(InputError, match=r"channels\[0\] is 0"): cnn((8, 8, 1), 3, (0,), key=KEY)
    with pytest.raises(InputError, match="0x0"): max_pool(jnp.zeros((4, 4, 1)), 0)
    with pytest.raises(InputError, match="5x5; expected at least 1x1 and at most the image, 4x4"): avg_pool(jnp.zeros((4, 4, 1)), 5)


TINY = {
    "vgg": lambda **kw: vgg((8, 8, 3), 5, ((8,), (8, 16)), key=KEY, **kw), "resnet": lambda **kw: resnet((8, 8, 3), 5, 8, (8, 16), (1, 1), key=KEY, **kw),
    "resnet9": lambda **kw: resnet9((8, 8, 3), 5, 8, key=KEY, **kw), "airnet": lambda **kw: airnet((8, 8, 3), 5, (8, 16), 8, key=KEY, **kw),
    "wideresnet": lambda **kw: wideresnet((8, 8, 3), 5, 16, 10, key=KEY, **kw),
    "projected": lambda **kw: resnet((8, 8, 3), 5, 8, (8, 16), (1, 1), project=learned_projection, key=KEY, **kw),
}
NORMS = {"none": dict(norm=None), "group": dict(norm=GroupNorm), "layer": dict(norm=layer_norm), "standardised": dict(norm=None, conv=StandardisedConv)}


@pytest.mark.parametrize("name, kind", [*((name, "group") for name in TINY), *(("resnet", kind) for kind in NORMS if kind != "group")])
def test_a_gradient_reaches_every_parameter(name, kind):
    net = TINY[name](**NORMS[kind])
    x = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))
    grads = eqx.filter_jit(eqx.filter_grad(lambda n: jnp.sum(jax.vmap(n)(x) ** 2)))(net)
    leaves = jax.tree.leaves(grads)
    assert len(leaves) == len(jax.tree.leaves(eqx.filter(net, eqx.is_inexact_array)))
    assert all(jnp.isfinite(g).all() and (g != 0).any() for g in leaves)


@pytest.mark.parametrize("name, skips, loss", [("vgg", False, SquaredError()), ("vgg", True, CrossEntropy()), ("resnet", False, CrossEntropy()), ("resnet", True, SquaredError()),
                                               ("resnet9", True, CrossEntropy()), ("resnet9", False, SquaredError()), ("wideresnet", True, CrossEntropy()), ("airnet", False, SquaredError()), ("airnet", True, CrossEntropy())], ids=lambda v: str(v).strip("()"))
def test_predictive_coding_learns_in_every_model(name, skips, loss):
    "Inference lowers the energy, and where the output precision p is small, the learning gradient over p is backpropagation's, in every layer, up to an error that falls with p."
    net = TINY[name](norm=GroupNorm, **({"vgg": dict(skips=skips), "airnet": dict(convolutions=2 + skips)}.get(name, {})))
    net = net if skips else PCNetwork(net.layers, net.shapes[0])
    assert bool(net.skips) == skips
    x, y = jax.random.normal(jax.random.key(1), (2, 8, 8, 3)), jnp.eye(5)[:2]

    @eqx.filter_jit
    def learn(net, p):
        learned, report = PredictiveCoding(ForwardEnergy(loss, output_precision=p), GaussNewton(1, 2)).gradient(net, x, y)
        return jax.tree.map(lambda g: g / p, learned), report.energy / p
    wanted, report = eqx.filter_jit(Backprop(loss).gradient)(net, x, y)
    (far, lower), (near, low) = (learn(net, jnp.array(p)) for p in (1e-2, 1e-4))
    assert lower < low and lower < report.loss
    away = lambda g: np.array([sum(float(jnp.sum((a - b)**2)) for a, b in zip(jax.tree.leaves(u), jax.tree.leaves(v))) ** 0.5 for u, v in zip(g.layers, wanted.layers)])
    size = away(jax.tree.map(jnp.zeros_like, near))
    assert (away(near) < 0.1 * size).all() and (away(near) < 0.2 * away(far)).all(), (away(near) / size, away(near) / away(far))


@pytest.mark.parametrize("name", ["resnet9", "airnet"])
def test_an_example_does_not_see_the_others(name):
    net, x = TINY[name](norm=GroupNorm), jax.random.normal(jax.random.key(1), (3, 8, 8, 3))
    run = eqx.filter_jit(lambda n, x: jax.vmap(n)(x))
    np.testing.assert_allclose(run(net, x)[0], run(net, x.at[1:].multiply(10.0))[0], rtol=1e-5, atol=1e-6)


def test_means_of_bytes_do_not_overflow():
    np.testing.assert_array_equal(AvgPool(2)(jnp.full((4, 4, 1), 200, jnp.uint8)), np.full((2, 2, 1), 200.0))


@pytest.mark.parametrize("build", [lambda: vgg((0, 8, 3), 5, ((8,),), key=KEY), lambda: resnet18((8, 0, 3), 5, key=KEY), lambda: airnet((8, 8, 0), 5, (8,), key=KEY)])
def test_images_of_no_size_are_refused(build):
    with pytest.raises(InputError, match="(height|width|channels) is 0"): build()


def test_pool_and_pad_is_for_images():
    with pytest.raises(InputError, match=r"a skip from \(8,\) to \(16,\) is not between images"): pool_and_pad((8,), (16,), KEY)
    assert pool_and_pad((8,), (8,), KEY)(jnp.ones(8)).shape == (8,)


@given(st.sampled_from([(4, 6), (5, 7)]), st.sampled_from([1, 2, 3]), st.integers(0, 2**31))
def test_pooling_is_that_of_numpy(side, size, seed):
    x = np.random.default_rng(seed).normal(size=(*side, 2)).astype(np.float32)
    h, w = (n // size for n in side)
    windows = x[:h * size, :w * size].reshape(h, size, w, size, 2)
    np.testing.assert_allclose(avg_pool(jnp.asarray(x), size), windows.mean((1, 3)), rtol=1e-5, atol=1e-6)
    assert (np.asarray(max_pool(jnp.asarray(x), size)) == windows.max((1, 3))).all()
    assert (AvgPool(size)(jnp.asarray(x)) == avg_pool(jnp.asarray(x), size)).all() and (MaxPool(size)(jnp.asarray(x)) == max_pool(jnp.asarray(x), size)).all()


@pytest.mark.parametrize("pool", [avg_pool, max_pool])
def test_pooling_passes_its_gradient_on_as_finite_differences_say(pool, x64):
    x = np.random.default_rng(0).normal(size=(5, 4, 2))
    weight = np.random.default_rng(1).normal(size=(2, 2, 2))
    f = lambda x: jnp.sum(pool(jnp.asarray(x), 2) * weight)
    grad = np.zeros_like(x)
    for i in np.ndindex(*x.shape):
        d = np.zeros_like(x)
        d[i] = 1e-6
        grad[i] = (f(x + d) - f(x - d)) / 2e-6
    np.testing.assert_allclose(jax.grad(f)(jnp.asarray(x)), grad, atol=1e-7)


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_group_norm_is_that_of_numpy(groups):
    x = np.random.default_rng(0).normal(3, 2, (3, 5, 6))
    norm = eqx.tree_at(lambda n: (n.scale, n.bias), GroupNorm(6, groups), (jnp.arange(1.0, 7.0), jnp.arange(6.0)))
    expected = np.zeros_like(x)
    for g in np.split(np.arange(6), groups): expected[..., g] = (x[..., g] - x[..., g].mean()) / np.sqrt(x[..., g].var() + 1e-5)
    np.testing.assert_allclose(norm(jnp.asarray(x, jnp.float32)), expected * np.arange(1, 7) + np.arange(6), rtol=1e-4, atol=1e-4)


def test_standardised_filters_have_mean_zero_and_keep_unit_variance():
    conv = StandardisedConv(16, 64, 3, jax.nn.relu, key=KEY)
    out = conv(jax.random.normal(jax.random.key(1), (24, 24, 16)))[1:-1, 1:-1]  # where no zeros are padded
    assert abs(float(out.std()) - 1) < 0.05
    moved = eqx.tree_at(lambda c: c.conv.weight, conv, 3 * conv.conv.weight - 2)
    np.testing.assert_allclose(moved(jnp.ones((4, 4, 16))), conv(jnp.ones((4, 4, 16))), atol=1e-4)
    assert abs(conv(jnp.ones((4, 4, 16)))[1:-1, 1:-1]).max() < 1e-4  # a constant is not seen


def test_projections_of_skips():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6, 3)), jnp.float32)
    out = pool_and_pad((4, 6, 3), (2, 3, 5), KEY)(x)
    np.testing.assert_allclose(out[..., :3], np.asarray(x).reshape(2, 2, 3, 2, 3).mean((1, 3)), rtol=1e-5, atol=1e-6)
    assert (out[..., 3:] == 0).all() and isinstance(pool_and_pad((4, 6, 3), (2, 3, 5), KEY), PoolAndPad)
    assert (pool_and_pad((4, 6, 3), (4, 6, 3), KEY)(x) == x).all()


@pytest.mark.parametrize("kind", NORMS)
def test_states_of_a_residual_network_begin_near_unit_variance(kind):
    net = resnet((16, 16, 3), 10, 32, (32, 64), (3, 3), key=KEY, **NORMS[kind])
    states = eqx.filter_jit(lambda n, x: [h.std() for h in jax.vmap(n.feedforward)(x).hidden])(net, jax.random.normal(jax.random.key(1), (8, 16, 16, 3)))
    sums = [float(s) for s in states[::2]]  # the stream; padding with zeros takes a little
    assert all(0.8 < s < 2**0.5 for s in sums)


def test_layer_table_adds_up():
    net = resnet((8, 8, 3), 5, 8, (8, 16), (1, 1), project=learned_projection, norm=GroupNorm, key=KEY)
    lines = layer_table(net).splitlines()
    assert len(lines) == net.depth + 3 and "2 skips" in lines[-1] and f"{parameter_count(net):,}" in lines[-1]
    assert [line.split()[1] for line in lines[1:-1]] == ["x".join(map(str, shape)) for shape in net.shapes]
    assert sum(int(line.split()[2].replace(",", "")) for line in lines[2:-1]) == parameter_count(net)
    chain = PCNetwork([Conv(3, 4, 3, key=KEY), Chain(MaxPool(2), GlobalAverage(jnp.tanh), Dense(4, 2, key=KEY))], (8, 8, 3))
    assert "MaxPool 2, GlobalAverage, Dense" in layer_table(chain)


@pytest.mark.parametrize("f, words", [
    (lambda: vgg5((784,), 10, key=KEY), "height, width, channels"), (lambda: vgg5((8, 8, 3), 10, key=KEY), "too small"),
    (lambda: airnet((4, 4, 3), 10, key=KEY), "too small"), (lambda: airnet((8, 8, 3), 10, convolutions=1, key=KEY), "convolutions is 1; expected at least 2"), (lambda: resnet9((7, 7, 3), 10, key=KEY), "too small"),
    (lambda: resnet18((28, 28, 1), 10, key=KEY), "divisible by 8"), (lambda: resnet((8, 8, 3), 10, 8, (8, 16), (1,), key=KEY), "2 stages and blocks 1"),
    (lambda: wideresnet((32, 32, 3), 10, depth=18, key=KEY), "depth is 18"), (lambda: vgg((8, 8, 3), 0, ((8,),), key=KEY), "classes is 0"),
    (lambda: vgg((8, 8, 3), 3, ((0,),), key=KEY), "is 0; expected at least 1"), (lambda: GroupNorm(6, 4), "divisor of the 6 channels"),
    (lambda: GroupNorm(6, 0), "divisor"), (lambda: vgg9((32, 32, 3), 10, (8, 8), key=KEY), "width has 2 values"), (lambda: vgg((8, 8, 3), 3, ((6,), (6,)), norm=GroupNorm, key=KEY), "divisor of the 6 channels"),
], ids=range(14))
def test_bad_input(f, words):
    with pytest.raises(InputError) as error: f()
    assert words in str(error.value)
