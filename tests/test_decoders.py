"""Decoders: a run with learned backward predictions goes on from its checkpoint to the same end, and its forward part starts as without."""
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pcnb.data import load
from pcnb.decoders import Decoder, with_decoders
from pcnb.models import cnn, identity, mlp
from pcnb.recipes import RECIPES, GradientDescentSetting, MLPSetting, build_rule
from pcnb.training import fit

recipe = replace(RECIPES["digits"], network=MLPSetting(8, 3), inference=GradientDescentSetting(2), epochs=2,
                 energy=replace(RECIPES["digits"].energy, alpha=0.1, backward="learned"))


@pytest.mark.parametrize("build", [lambda key: mlp((5, 3), 4, 6, 3, skips=True, key=key), lambda key: cnn((13, 9, 2), 4, (3, 5), key=key)], ids=["mlp", "cnn"])
def test_shapes_and_forward_part(build, getkey):
    plain = build(key := getkey())
    net, x = with_decoders(plain, key=getkey()), jax.random.normal(key, plain.shapes[0])
    np.testing.assert_array_equal(net(x), plain(x))
    s = eqx.filter_jit(net.feedforward)(x).x
    for g, before, after in zip(net.decoders, s, s[1:]):
        # each entry of the reconstruction depends on the state
        got, slope = jax.jit(lambda v: (g(v), jax.jacobian(g)(v)))(after)
        assert got.shape == before.shape and (slope.reshape(got.size, -1) != 0).any(1).all()
    assert net.decoders[-1].layer.activation is identity and all(g.layer.activation is not identity for g in net.decoders[:-1])


def test_images_are_enlarged_by_their_nearest_pixels(getkey):
    g, x = Decoder((3, 3, 2), (6, 6, 4), key=getkey()), jax.random.normal(getkey(), (3, 3, 2))
    np.testing.assert_allclose(g(x), g.layer(jnp.asarray(np.repeat(np.repeat(x, 2, 0), 2, 1))), rtol=1e-5)


def test_resumed_run(tmp_path):
    data = load("digits").take(128)
    net = recipe.energy.equip(recipe.network.build(data.image_shape, data.n_classes, jax.random.key(0)), jax.random.key(1))
    run = lambda epochs, **how: fit(net, build_rule(recipe, "pc"), recipe.optimiser.build(4), data, epochs, 64, diagnose_examples=0, progress=False, **how).net
    whole = run(2)
    run(1, folder=tmp_path)
    resumed = run(2, folder=tmp_path, resume=True)
    leaves = lambda n: jax.tree.leaves(eqx.filter(n, eqx.is_array))
    for a, b, c in zip(leaves(whole), leaves(resumed), leaves(net)):
        np.testing.assert_array_equal(a, b)
        assert (np.asarray(a) != np.asarray(c)).any()   # decoders too have moved
