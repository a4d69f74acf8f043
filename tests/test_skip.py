"""Skips of any span, projections and depth scaling. The oracle is NumPy: the block system of linear networks, loops over pixels."""
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pcnb.energy import ForwardEnergy
from pcnb.inference import GaussNewton, GradientDescent, infer
from pcnb.models import Conv, Dense, cnn, mlp
from pcnb.network import InputError, PCNetwork, Skip, parameter_count
from pcnb.skip import (Projection, Scaled, ZeroPad, add_skips, branch_gains, learned_projection, mupc, residual_blocks, scale_branches,
                       zero_pad)


class Linear(eqx.Module):
    weight: jax.Array

    def __call__(self, x): return self.weight @ x


def equilibrium(edges, sizes, x0, y, p, p_out):
    "Hidden states of least energy of a linear network with the matrices `edges[src, dst]`, from the block system (I - B) x = c + eps."
    start = np.cumsum([0, *sizes[1:-1]])
    place = lambda l: slice(start[l - 1], start[l])
    n, L = start[-1], len(sizes) - 1
    IB, c, C, d = np.eye(n), np.zeros(n), np.zeros((sizes[-1], n)), np.zeros(sizes[-1])
    for (s, l), W in edges.items():
        if l < L and s: IB[place(l), place(s)] -= W
        elif l < L: c[place(l)] += W @ x0
        elif s: C[:, place(s)] += W
        else: d += W @ x0
    P = np.diag(np.repeat(p, sizes[1:-1]))
    h = np.linalg.solve(IB.T @ P @ IB + p_out * C.T @ C, IB.T @ P @ c + p_out * C.T @ (y - d))
    return [h[place(l)] for l in range(1, L)]


def draw_linear(seed, depth, ends):
    "A linear network with rising widths, so that skips pad with zeros, project, or, where widths agree, pass on; and all its matrices."
    rng = np.random.default_rng(seed)
    sizes = [int(v) for v in np.sort(rng.integers(2, 6, depth))] + [3]
    draw = lambda n, m: rng.normal(size=(m, n)) / n ** 0.5
    edges, skips = {(l - 1, l): draw(sizes[l - 1], sizes[l]) for l in range(1, depth + 1)}, []
    net = PCNetwork([Linear(jnp.asarray(edges[l - 1, l])) for l in range(1, depth + 1)], (sizes[0],))
    for s, d in ends:
        if rng.random() < 0.5 and sizes[d] >= sizes[s]: module, W = zero_pad(net.shapes[s], net.shapes[d], None), np.eye(sizes[d], sizes[s])
        else:
            module = Projection(net.shapes[s], net.shapes[d], key=jax.random.key(d))
            W = np.asarray(module.weight)
        skips.append(Skip(s, d, module))
        edges[s, d] = edges.get((s, d), 0) + W
    return PCNetwork(net.layers, (sizes[0],), skips), edges, sizes, rng


@pytest.mark.parametrize("seed, depth, ends", [(0, 3, [(0, 1), (1, 3)]), (1, 5, [(1, 4), (1, 4), (2, 3), (0, 5)]), (2, 5, [(1, 2), (2, 3), (3, 4), (0, 3)])])
def test_inference_reaches_the_block_system(seed, depth, ends):
    with jax.enable_x64(True):
        net, edges, sizes, rng = draw_linear(seed, depth, ends)
        p, p_out = tuple(0.5 + rng.random(depth - 1)), 0.7
        x0, y = rng.normal(size=sizes[0]), rng.normal(size=3)
        got = eqx.filter_jit(infer)(net, ForwardEnergy(precision=p, output_precision=p_out), GaussNewton(1, 4), jnp.asarray(x0), jnp.asarray(y))
        for a, b in zip(got.states.hidden, equilibrium(edges, sizes, x0, y, p, p_out)): np.testing.assert_allclose(a, b, atol=1e-5)


def test_gradient_descent_reaches_the_block_system(x64):
    net, edges, sizes, rng = draw_linear(3, 5, [(1, 3), (0, 2), (2, 5), (1, 4)])
    x0, y = rng.normal(size=sizes[0]), rng.normal(size=3)
    got = eqx.filter_jit(infer)(net, ForwardEnergy(), GradientDescent(100_000, optax.sgd(0.05), tolerance=1e-9), jnp.asarray(x0), jnp.asarray(y))
    for a, b in zip(got.states.hidden, equilibrium(edges, sizes, x0, y, (1.0,) * 4, 1.0)): np.testing.assert_allclose(a, b, atol=1e-5)


# sizes of pixels before and after, and the stride between: poolings that drop a rest, padded convolutions that keep it
@pytest.mark.parametrize("n, m, s", [(8, 8, 1), (8, 4, 2), (7, 3, 2), (7, 4, 2), (9, 3, 3), (10, 4, 3), (5, 1, 5), (3, 2, 2)])
def test_zero_pad_against_a_loop(n, m, s, getkey):
    x = jax.random.normal(getkey(), (n, n, 2))
    want = np.zeros((m, m, 5))
    for i in range(m):
        for j in range(m): want[i, j, :2] = x[i * s, j * s]
    np.testing.assert_array_equal(ZeroPad((m, m, 5))(x), want)


@pytest.mark.parametrize("n, m, s", [(6, 6, 1), (7, 4, 2), (9, 3, 3)])
def test_projection_is_a_strided_convolution(n, m, s, getkey):
    x, f = jax.random.normal(getkey(), (n, n, 3)), Projection((n, n, 3), (m, m, 4), key=getkey())
    conv = eqx.nn.Conv2d(3, 4, 1, stride=s, use_bias=False, key=getkey())
    conv = eqx.tree_at(lambda c: c.weight, conv, f.weight[:, :, None, None])
    np.testing.assert_allclose(f(x), jnp.moveaxis(conv(jnp.moveaxis(x, 2, 0)), 0, 2), atol=1e-5)


def test_projection_to_a_vector_is_dense(getkey):
    x, f = jax.random.normal(getkey(), (3, 2, 2)), Projection((3, 2, 2), (5,), key=getkey())
    np.testing.assert_allclose(f(x), np.asarray(f.weight) @ np.asarray(x).reshape(12), atol=1e-5)
    assert f.weight.shape == (5, 12)


def images(getkey, channels=(2, 4)):
    "Three layers: 9x9 to 5x5 by a strided convolution, to 2x2 by a pooling, to a vector."
    a, b = channels
    return PCNetwork([Conv(1, a, stride=2, key=getkey()), Conv(a, b, pool=2, key=getkey()), Dense(4 * b, 3, key=getkey())], (9, 9, 1))


def test_add_skips_projects_where_shapes_change(getkey):
    net, x = images(getkey), jax.random.normal(getkey(), (9, 9, 1))
    h1 = net.layers[0](x)
    pad = np.zeros((2, 2, 4))
    pad[..., :2] = np.asarray(h1)[0:4:2, 0:4:2]
    np.testing.assert_allclose(add_skips(net)(x), net.layers[2](net.layers[1](h1) + pad), atol=1e-5)

    learned = add_skips(net, projection=learned_projection, key=jax.random.key(1))
    W = np.asarray(learned.skips[0].module.weight)
    shortcut = np.einsum("ijc,oc->ijo", np.asarray(h1)[0:4:2, 0:4:2], W)
    np.testing.assert_allclose(learned(x), net.layers[2](net.layers[1](h1) + shortcut), atol=1e-5)
    assert parameter_count(learned) == parameter_count(net) + 2 * 4
    assert parameter_count(add_skips(net)) == parameter_count(net)


@pytest.mark.parametrize("span", [1, 2, 3])
def test_blocks_of_any_span_against_a_loop(span, getkey):
    net, x = mlp((4,), 3, 5, 8, key=getkey()), jax.random.normal(getkey(), (4,))
    states = [x]
    for l, f in enumerate(net.layers, 1):
        mu = f(states[-1])
        if l < 8 and l > span and (l - 1) % span == 0: mu = mu + states[l - span]  # blocks end at 1 + span, 1 + 2 span, ..
        states.append(mu)
    got = add_skips(net, span).feedforward(x)
    for a, b in zip(got.x, states, strict=True): np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_add_skips_keeps_skips_and_decoders(getkey):
    net = mlp((4,), 3, 4, 4, key=getkey())
    decoders = [lambda x: jnp.zeros(4)] * 4
    got = add_skips(PCNetwork(net.layers, (4,), [Skip(0, 2)], decoders), 2)
    assert [(s.src, s.dst) for s in got.skips] == [(0, 2), (1, 3)]
    assert got.decoders == tuple(decoders)


def test_what_does_not_fit_is_an_error(getkey):
    net = images(getkey, (4, 2))  # channels shrink
    with pytest.raises(InputError, match=r"Skip\(1, 2\) \(ZeroPad\) cannot take a state of shape \(5, 5, 4\): padding cannot take 4 channels to 2; use a Projection"):
        add_skips(net)
    grows = PCNetwork([lambda x: x[:2], lambda x: jnp.ones((3, 1))], (4, 1))
    with pytest.raises(InputError, match=r"Skip\(1, 2\).*no stride takes 2 pixels to 3"): PCNetwork(grows.layers, (4, 1), [Skip(1, 2, ZeroPad((3, 1)))])
    with pytest.raises(InputError, match=r"Skip\(2, 3\).*a state of shape \(2, 2, 2\) cannot become one of shape \(3,\)"):
        PCNetwork(net.layers, (9, 9, 1), [Skip(2, 3, ZeroPad((3,)))])
    with pytest.raises(InputError, match="give add_skips a key"): add_skips(images(getkey), projection=learned_projection)
    with pytest.raises(InputError, match="span is 0"): add_skips(net, 0)
    with pytest.raises(InputError, match="span is -2"): mlp((4,), 3, 5, 6, skips=-2, key=getkey())
    with pytest.raises(InputError, match=r"Skip\(3, 1\) must lead from a state to a later one"): PCNetwork(net.layers, (9, 9, 1), [Skip(3, 1)])  # a cycle
    with pytest.raises(InputError, match="0 <= src < dst <= 3"): PCNetwork(net.layers, (9, 9, 1), [Skip(1, 4)])                                  # no such state
    with pytest.raises(InputError, match=r"layer 1 \(Conv\) has no weight of shape \(n_out, n_in\); muPC is for dense layers"):
        mupc(net, key=getkey())
    bare = PCNetwork([jnp.tanh, jnp.tanh, jnp.tanh], (3,), [Skip(1, 2)])
    with pytest.raises(InputError, match=r"layer 2 \(tanh\) has no weights in which its branch could be scaled. Wrap it: Scaled\(layer, 0.577\)"): scale_branches(bare)


def test_branch_gains():
    assert branch_gains(4, ()) == (1.0,) * 4
    np.testing.assert_allclose(branch_gains(8, residual_blocks(8)), [1] + [8 ** -0.5] * 6 + [1])
    np.testing.assert_allclose(branch_gains(9, residual_blocks(9, 3)), [1, 1, 1, 3 ** -0.5, 1, 1, 3 ** -0.5, 1, 1])
    np.testing.assert_allclose(branch_gains(8, ((0, 4), (2, 4))), [1, 1, 1, 0.5, 1, 1, 1, 1])  # the shorter one counts


@pytest.mark.parametrize("span", [1, 2])
def test_scaled_branches_are_scaled(span, getkey):
    "Biases included, and nothing else: each block is x + (span / L)^1/2 f(x)."
    net = eqx.tree_at(lambda n: [f.bias for f in n.layers], add_skips(mlp((4,), 3, 5, 6, key=getkey()), span), replace_fn=lambda b: b + 0.3)
    got, x, ends = scale_branches(net), jax.random.normal(getkey(), (4,)), dict((d, s) for s, d in residual_blocks(6, span))
    states = [x]
    for l, f in enumerate(net.layers, 1):
        mu = f(states[-1])
        states.append(states[ends[l]] + (span / 6) ** 0.5 * mu if l in ends else mu)
    np.testing.assert_allclose(got(x), states[-1], rtol=1e-5, atol=1e-6)
    half = scale_branches(jax.tree.map(lambda p: p.astype(jnp.bfloat16) if eqx.is_inexact_array(p) else p, net))
    assert {p.dtype for p in jax.tree.leaves(eqx.filter(half, eqx.is_inexact_array))} == {jnp.dtype(jnp.bfloat16)}


def test_mlp_draws_what_scaling_would(getkey):
    key = getkey()
    a, b = mlp((4,), 3, 5, 6, skips=2, key=key), scale_branches(add_skips(mlp((4,), 3, 5, 6, key=key), 2))
    for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True): np.testing.assert_allclose(u, v, rtol=1e-6)
    assert [(s.src, s.dst) for s in a.skips] == [(s.src, s.dst) for s in b.skips] == [(1, 3), (3, 5)]


def test_mupc_against_numpy(getkey):
    plain = mlp((7,), 3, 50, 6, jnp.tanh, skips=True, key=getkey())
    net, x = mupc(plain, key=getkey()), np.asarray(jax.random.normal(getkey(), (7,)))
    W = [np.asarray(f.layer.weight) for f in net.layers]
    h = W[0] @ x / 7 ** 0.5
    for w in W[1:-1]: h = h + w @ np.tanh(h) / (50 * 6) ** 0.5
    np.testing.assert_allclose(net(jnp.asarray(x)), W[-1] @ np.tanh(h) / 50, rtol=1e-4, atol=1e-5)
    entries = np.concatenate([w.ravel() for w in W[1:-1]])
    assert abs(entries.std() - 1) < 5 / (2 * entries.size) ** 0.5 and abs(entries.mean()) < 5 / entries.size ** 0.5
    assert parameter_count(net) == parameter_count(plain)
    assert [f.factor for f in mupc(mlp((7,), 3, 4, 3, key=getkey()), key=getkey()).layers] == pytest.approx([7 ** -0.5, 4 ** -0.5, 1 / 4])


def test_the_factor_is_no_parameter(getkey):
    "The gradient of the weights carries the factor once, so that a gradient step changes the function by its square."
    f, x = Dense(4, 3, key=getkey()), jax.random.normal(getkey(), (4,))
    step = lambda f: eqx.apply_updates(f, jax.tree.map(lambda g: -g, eqx.filter_grad(lambda f: f(x)[0])(f)))
    moved = lambda f: float((step(f)(x) - f(x))[0])
    assert moved(Scaled(f, 0.25)) == pytest.approx(moved(f) / 16, rel=1e-4)
    assert moved(f) == pytest.approx(-float(x @ x) - 1, rel=1e-4)


def test_a_small_cnn_with_skips_is_a_network(getkey):
    net = add_skips(cnn((8, 8, 1), 3, (2, 2, 4), key=getkey()))
    assert [type(s.module).__name__ for s in net.skips] == ["Identity", "ZeroPad"]


def test_a_projection_keeps_the_size_of_what_it_reads(getkey):
    assert np.std(Projection((100,), (400,), key=getkey()).weight) == pytest.approx(0.1, rel=0.05)
    assert np.std(Projection((5, 5, 100), (5, 5, 400), key=getkey()).weight) == pytest.approx(0.1, rel=0.05)
