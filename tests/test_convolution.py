"""The convolution's fast forms against SciPy's definition, for many shapes, through the layers and rules that use them."""
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.signal import correlate2d

from pcnb import Backprop, ForwardEnergy, GaussNewton, InputError, PredictiveCoding, conv, layer_cosines, vgg
from pcnb.convolution import _taps, _winograd, _winograd_gradient
from pcnb.models import BatchNormConv, Conv, StandardisedConv, cnn
from pcnb.recipes import ImageNetworkSetting


def by_definition(x, w):
    "y[..., d] = sum over c of the cross-correlation of channel c, zeros outside; in double precision."
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    return np.stack([sum(correlate2d(x[..., c], w[..., c, d], "same") for c in range(w.shape[2])) for d in range(w.shape[3])], -1)


def near(a, b, tolerance): return np.linalg.norm(np.asarray(a, np.float64) - b) <= tolerance * np.linalg.norm(b)


@given(height=st.integers(1, 9), width=st.integers(1, 9), seed=st.integers(0, 99))
def test_any_size_of_image(height, width, seed):
    a, b = jax.random.split(jax.random.key(seed))
    x, w = jax.random.normal(a, (height, width, 32)), jax.random.normal(b, (3, 3, 32, 32))
    assert near(conv(x, w), by_definition(x, w), 2e-6)


@pytest.mark.parametrize("size, c, d", [(1, 3, 2), (3, 2, 5), (5, 4, 3), (3, 64, 32)])
def test_definition_and_finite_differences(size, c, d, getkey):
    x, w, g = jax.random.normal(getkey(), (7, 6, c)), jax.random.normal(getkey(), (size, size, c, d)), np.asarray(jax.random.normal(getkey(), (7, 6, d)), np.float64)
    assert near(conv(x, w), by_definition(x, w), 2e-6)
    scalar = jax.jit(jax.grad(lambda x, w: jnp.vdot(conv(x, w), jnp.asarray(g, jnp.float32)), (0, 1)))
    u, v = jax.random.normal(getkey(), x.shape), jax.random.normal(getkey(), w.shape)
    of_x, of_w = scalar(x, w)  # a bilinear map: its differences are exact
    assert np.isclose(np.vdot(of_x, u), np.vdot(g, by_definition(u, w)), rtol=1e-4, atol=1e-2)
    assert np.isclose(np.vdot(of_w, v), np.vdot(g, by_definition(x, v)), rtol=1e-4, atol=1e-2)


def test_double_precision_stays(getkey, x64):
    x, w = jax.random.normal(getkey(), (5, 6, 32), jnp.float64), jax.random.normal(getkey(), (3, 3, 32, 32), jnp.float64)
    assert conv(x, w).dtype == jnp.float64 and near(conv(x, w), by_definition(x, w), 1e-14)


def test_networks_in_double_precision(getkey, x64):
    "Strides and even kernels too; float32 images, as of Scale, are taken as they are."
    net = cnn((8, 8, 3), 5, (4, 8), key=getkey())
    x = jax.random.normal(getkey(), (8, 8, 3), jnp.float32)
    assert net(x).dtype == jnp.float64 and {p.dtype for p in jax.tree.leaves(jax.grad(lambda n: jnp.sum(n(x)**2))(net))} == {jnp.dtype(jnp.float64)}


@pytest.mark.parametrize("n_in, size, stride", [(32, 3, 1), (2, 3, 1), (2, 5, 2), (2, 2, 1)])
def test_whole_numbers_are_read_as_they_are(n_in, size, stride, getkey):
    layer, image = Conv(n_in, 32, size, stride=stride, key=getkey()), jax.random.randint(getkey(), (6, 6, n_in), 0, 256).astype(jnp.uint8)
    np.testing.assert_allclose(layer(image), layer(image.astype(jnp.float32)), rtol=1e-5, atol=1e-3)


def test_rounding_acts_in_both_directions_alike(getkey):
    "Where a kernel has no fast form its arithmetic is left out, in the product and in its slopes: a bilinear map's slope in the kernel, times the kernel, is the map."
    x, w = jax.random.normal(getkey(), (6, 6, 32)), jax.random.normal(getkey(), (5, 5, 32, 32))
    out, back = jax.vjp(lambda w: conv(x, w, "bfloat16"), w)
    assert np.isclose(np.vdot(back(out)[0], w), np.vdot(out, out), rtol=1e-5)


def test_rounding_is_of_operands_only(getkey):
    "Operands that bfloat16 holds exactly, with sums of tiles that it holds too, give the exact result: products and sums are not rounded."
    x, w = (jax.random.randint(getkey(), s, -4, 5).astype(jnp.float32) for s in ((6, 6, 32), (3, 3, 32, 32)))
    w = 4 * w  # halves and quarters of its sums are integers
    exact = by_definition(x, w)
    assert np.array_equal(conv(x, w, "bfloat16"), exact)
    g = jax.random.randint(getkey(), (6, 6, 32), -4, 5).astype(jnp.float32)
    gradient = jax.grad(lambda w: jnp.vdot(conv(x, w, "bfloat16"), g))(w)
    assert np.array_equal(gradient, jax.grad(lambda w: jnp.vdot(conv(x, w), g))(w))


@pytest.mark.parametrize("form", [_winograd, lambda x, w, *how: _taps(x, jnp.ones((*x.shape[:3], 32)), 3, how[0]), lambda x, w, *how: _winograd_gradient(x, jnp.ones((*x.shape[:3], 32)), how[0])],
                         ids=["winograd", "taps", "gradient"])
def test_examples_do_not_see_each_other(form, getkey):
    x, w = jax.random.normal(getkey(), (2, 4, 4, 32)), jax.random.normal(getkey(), (3, 3, 32, 32))
    both, alone = form(x, w, jnp.dtype("float32"), False), [form(v[None], w, jnp.dtype("float32"), False) for v in x]
    whole = jnp.concatenate(alone) if both.ndim == 4 and len(both) == 2 else sum(alone)  # outputs of each, or a sum over all
    assert near(both, np.asarray(whole, np.float64), 1e-6)


@pytest.mark.parametrize("kind", [Conv, StandardisedConv, BatchNormConv])
def test_layers_take_the_arithmetic(kind, getkey):
    key, x = getkey(), jax.random.normal(getkey(), (4, 4, 32))
    full, rounded = (kind(32, 32, activation=jax.nn.relu, arithmetic=a, key=key)(x) for a in (None, "bfloat16"))
    assert 2**-12 < np.linalg.norm(full - rounded) / np.linalg.norm(full) < 2**-6


def test_learning_in_bfloat16_is_near_learning_in_float32(getkey):
    key, x, y = getkey(), jax.random.normal(getkey(), (8, 8, 8, 32)), jax.nn.one_hot(jnp.arange(8) % 4, 4)
    build = lambda a: vgg((8, 8, 32), 4, ((32, 32), (64,)), conv=eqx.Partial(Conv, arithmetic=a), key=key)
    for rule in (Backprop(), PredictiveCoding(ForwardEnergy(output_precision=0.1), GaussNewton(1, 2))):
        gradients = [eqx.filter_jit(rule.gradient)(build(a), x, y)[0] for a in (None, "bfloat16")]
        assert float(layer_cosines(*gradients).min()) > 0.995
        assert not np.array_equal(*(np.asarray(n.layers[1].weight if not hasattr(n.layers[1], "parts") else n.layers[1].parts[-1].weight) for n in gradients))


def test_bad_input(getkey):
    w = jnp.zeros((3, 3, 2, 4))
    with pytest.raises(InputError, match=r"kernel has shape \(2, 2, 2, 4\)"): conv(jnp.zeros((4, 4, 2)), w[:2, :2])
    with pytest.raises(InputError, match=r"image has shape \(4, 4, 3\)"): conv(jnp.zeros((4, 4, 3)), w)
    with pytest.raises(InputError, match="use jax.vmap"): conv(jnp.zeros((5, 4, 4, 2)), w)
    with pytest.raises(InputError, match="the image is of uint8; expected floating-point numbers"): conv(jnp.zeros((4, 4, 2), jnp.uint8), w)
    with pytest.raises(InputError, match="float16"): ImageNetworkSetting(arithmetic="float16").build((32, 32, 3), 10, getkey())


def test_other_devices_take_the_general_form():
    "Lowered for a GPU, without one: convolutions in bfloat16, no products of matrices."
    x, w = jnp.ones((2, 8, 8, 32)), jnp.ones((3, 3, 32, 32))
    both = jax.jit(jax.grad(lambda x, w: jnp.sum(jax.vmap(lambda v: conv(v, w, "bfloat16"))(x) ** 2), (0, 1)))
    text = {p: both.trace(x, w).lower(lowering_platforms=(p,)).as_text() for p in ("cuda", "cpu")}
    assert text["cuda"].count("stablehlo.convolution") == 3 and "bf16" in text["cuda"] and "dot_general" not in text["cuda"]
    assert "stablehlo.convolution" not in text["cpu"] and "dot_general" in text["cpu"]


@pytest.mark.parametrize("channels", [3, 32])
def test_a_kernel_for_each_image_is_rounded_as_one_is(channels):
    rng = np.random.default_rng(0)
    x, w = jnp.asarray(rng.normal(size=(2, 6, 6, channels)), jnp.float32), jnp.asarray(rng.normal(size=(2, 3, 3, channels, 32)), jnp.float32)
    many = jax.vmap(lambda x, w: conv(x, w, "bfloat16"))(x, w)
    for got, a, b in zip(many, x, w): np.testing.assert_allclose(got, conv(a, b, "bfloat16"), rtol=1e-5, atol=1e-5)
