"""The network: feedforward pass, states from errors and back, skips, checks. The oracle is a NumPy loop."""
import equinox as eqx
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from pcnb.models import cnn, mlp
from pcnb.network import InputError, PCNetwork, Skip, States, parameter_count

SIZES = (3, 4, 5, 4, 2)
SKIPS = ((0, 3), (1, 3), (1, 4), (3, 4))  # (src, dst); two of them meet in state 3


class Layer(eqx.Module):
    "`W tanh(x) + b`"
    W: jax.Array
    b: jax.Array

    def __call__(self, x): return self.W @ jnp.tanh(x) + self.b


def weights(rng, sizes=SIZES, skips=SKIPS):
    "(W, b) of the layers by l, and of the skips by (src, dst)."
    draw = lambda n, m: (rng.normal(size=(m, n)), rng.normal(size=m))
    return {l: draw(n, m) for l, (n, m) in enumerate(zip(sizes, sizes[1:]), 1)} | {(i, j): draw(sizes[i], sizes[j]) for i, j in skips}


def network(ws, sizes=SIZES):
    layers = [Layer(*map(jnp.asarray, ws[l])) for l in range(1, len(sizes))]
    return PCNetwork(layers, (sizes[0],), [Skip(*k, Layer(*map(jnp.asarray, w))) for k, w in ws.items() if isinstance(k, tuple)])


def predict(ws, l, x):
    "The definition: the layer's own term, and one of each skip that ends in `l`."
    terms = [(ws[l], x[l - 1])] + [(w, x[k[0]]) for k, w in ws.items() if isinstance(k, tuple) and k[1] == l]
    return sum(W @ np.tanh(v) + b for (W, b), v in terms)


def draw_states(rng): return rng.normal(size=SIZES[0]), [rng.normal(size=n) for n in SIZES[1:-1]]


def same(got, want, tol=1e-12):
    assert len(got) == len(want)
    for a, b in zip(got, want): np.testing.assert_allclose(a, b, rtol=0, atol=tol)


@given(seed=st.integers(0, 2**31))
def test_passes_against_numpy(seed):
    rng = np.random.default_rng(seed)
    ws, (x0, hidden) = weights(rng), draw_states(rng)
    with jax.enable_x64(True):
        net = network(ws)
        x = [x0]
        for l in range(1, 5): x.append(predict(ws, l, x))
        s = net.feedforward(jnp.asarray(x0))
        same(s.x, x)
        same(s.eps, [np.zeros(n) for n in SIZES[1:-1]], 0)
        same([net(jnp.asarray(x0))], [x[-1]])

        x = [x0, *hidden]
        eps = [x[l] - predict(ws, l, x) for l in range(1, 4)]
        s = net.from_states(jnp.asarray(x0), [jnp.asarray(h) for h in hidden])
        same(s.x, [*x, predict(ws, 4, x)])
        same(s.eps, eps)
        same(s.hidden, hidden, 0)

        back = net.from_errors(jnp.asarray(x0), s.eps)  # the two coordinates are each other's inverse
        same(back.x, s.x, 1e-10)
        again = net.from_states(jnp.asarray(x0), back.hidden)
        same(again.eps, eps, 1e-10)


def test_feedforward_is_zero_error_in_both_coordinates(getkey):
    net = mlp((6,), 3, 8, 5, jnp.tanh, skips=True, key=getkey())
    x0 = jax.random.normal(getkey(), (6,))
    ref = net.feedforward(x0)
    same(net.from_states(x0, ref.hidden).eps, [np.zeros(8)] * 4, 0)
    same(net.from_errors(x0, ref.eps).x, ref.x, 0)
    assert all(float(jnp.abs(h).max()) > 0.1 for h in ref.hidden)


def test_predict_reads_its_parents_only():
    net = network(weights(np.random.default_rng(0)))
    rng = np.random.default_rng(1)
    x = [jnp.asarray(rng.normal(size=n), jnp.float32) for n in SIZES]
    parents = {1: {0}, 2: {1}, 3: {2, 0, 1}, 4: {3, 1}}
    for l, want in parents.items():
        assert set(net.parents(l)) == want
        spoiled = [v if i in want else v * jnp.nan for i, v in enumerate(x)]
        np.testing.assert_array_equal(net.predict(l, x), net.predict(l, spoiled))
        for i in want:
            assert jnp.isnan(net.predict(l, [v * jnp.nan if i == j else v for j, v in enumerate(x)])).all()
    assert net.parents(4) == (3, 1, 3)  # a skip past one layer reads the state a second time


def test_linear_network_superposes(x64, getkey):
    "For linear layers the output is that of the forward pass plus what each error adds alone: the products of the weights after it."
    Ws = [np.asarray(jax.random.normal(getkey(), (4, 4))) for _ in range(4)]
    net = PCNetwork([lambda x, W=jnp.asarray(W): W @ x for W in Ws], (4,))
    x0, eps = np.asarray(jax.random.normal(getkey(), (4,))), [np.asarray(jax.random.normal(getkey(), (4,))) for _ in range(3)]
    want = Ws[3] @ Ws[2] @ Ws[1] @ Ws[0] @ x0 + Ws[3] @ Ws[2] @ Ws[1] @ eps[0] + Ws[3] @ Ws[2] @ eps[1] + Ws[3] @ eps[2]
    same([net.from_errors(jnp.asarray(x0), [jnp.asarray(e) for e in eps]).x[-1]], [want], 1e-11)


def test_batch_of_images_is_a_loop(getkey):
    net = cnn((8, 8, 1), 3, channels=(4, 6), key=getkey())
    assert net.shapes == ((8, 8, 1), (4, 4, 4), (2, 2, 6), (3,))
    x = jax.random.normal(getkey(), (3, 8, 8, 1))
    one = eqx.filter_jit(lambda n, v: n.feedforward(v))
    batch = eqx.filter_jit(jax.vmap(lambda v: net.feedforward(v)))(x)
    for i in range(3):
        alone = one(net, x[i])
        same([v[i] for v in batch.x], alone.x, 1e-5)
        assert [v.shape for v in alone.x] == list(net.shapes)
        assert {str(v.dtype) for v in jax.tree.leaves(alone)} == {"float32"}


def test_one_layer_has_no_hidden_state():
    net = PCNetwork([lambda x: 2 * x], (2,), [Skip(0, 1)])
    s = net.feedforward(jnp.array([1.0, -3.0]))
    assert s.hidden == [] and s.eps == [] and net.depth == 1
    np.testing.assert_array_equal(s.x[-1], [3.0, -9.0])  # 2 x by the layer, x by the skip
    for same_state in (net.from_states(s.x[0], []), net.from_errors(s.x[0], [])):
        np.testing.assert_array_equal(same_state.x[-1], s.x[-1])


def test_states_without_ends():
    assert States([0, 1, 2, 3], [4, 5]).hidden == [1, 2]


@pytest.mark.parametrize("src", range(-2, 5))
@pytest.mark.parametrize("dst", range(-1, 6))
def test_skip_is_accepted_if_and_only_if_it_leads_forward(src, dst):
    layers = [lambda x: 2 * x] * 3
    if 0 <= src < dst <= 3:
        x0 = jnp.array([1.0, 2.0])
        # 2^src x0 joins in state dst and is doubled by each layer after it
        np.testing.assert_array_equal(PCNetwork(layers, (2,), [Skip(src, dst)])(x0), (2 ** 3 + 2 ** (src + 3 - dst)) * x0)
    else:
        with pytest.raises(InputError, match=rf"Skip\({src}, {dst}\)"): PCNetwork(layers, (2,), [Skip(src, dst)])


def test_bad_parts_are_refused_by_name():
    wide, narrow = (lambda x: jnp.concatenate([x, x])), (lambda x: x[:2])
    net = PCNetwork([wide, narrow], (2,), decoders=[narrow, wide])
    assert len(net.decoders) == 2 and net.shapes == ((2,), (4,), (2,))
    with pytest.raises(InputError, match="decoders has 1 entries; expected one a layer, 2"): PCNetwork([wide, narrow], (2,), decoders=[narrow])
    with pytest.raises(InputError, match=r"decoder 1 gives shape \(8,\), but state 0 has shape \(2,\)"): PCNetwork([wide, narrow], (2,), decoders=[wide, wide])
    with pytest.raises(InputError, match=r"Skip\(0, 1\) gives shape \(2,\), but state 1 has shape \(4,\)"): PCNetwork([wide, narrow], (2,), [Skip(0, 1)])
    matrix = jnp.ones((3, 3))
    with pytest.raises(InputError, match=r"layer 2 .* cannot take a state of shape \(4,\)"): PCNetwork([wide, lambda x: matrix @ x], (2,))
    with pytest.raises(InputError, match=r"shape \(5, 2\).*jax.vmap"): net(jnp.ones((5, 2)))
    with pytest.raises(ValueError): PCNetwork([], (2,))  # an InputError is a ValueError


@pytest.mark.parametrize("sizes", [(7, 5, 3), (7, 6, 6, 6, 3)])
def test_parameter_count(sizes, getkey):
    net = mlp((sizes[0],), sizes[-1], sizes[1], len(sizes) - 1, skips=True, key=getkey())
    want = sum(n * m + m for n, m in zip(sizes, sizes[1:]))
    assert parameter_count(net) == want
    assert parameter_count(net.layers[0]) == sizes[0] * sizes[1] + sizes[1]
    assert parameter_count((net, jnp.arange(5), jnp.tanh)) == want  # whole numbers and functions are not trained


def test_gradients_reach_layers_skips_and_inputs(x64):
    "Finite differences of the NumPy loop in every weight."
    rng = np.random.default_rng(3)
    ws, x0, v = weights(rng), rng.normal(size=3), rng.normal(size=2)

    def value(ws):
        x = [x0]
        for l in range(1, 5): x.append(predict(ws, l, x))
        return v @ x[-1]

    got = eqx.filter_grad(lambda n: jnp.asarray(v) @ n(jnp.asarray(x0)))(network(ws))
    parts = {l: f for l, f in enumerate(got.layers, 1)} | {(s.src, s.dst): s.module for s in got.skips}
    for k, (W, b) in ws.items():
        for place, g in ((W, parts[k].W), (b, parts[k].b)):
            want = np.zeros_like(place)
            for i in np.ndindex(place.shape):
                old = place[i]
                place[i] = old + 1e-5
                up = value(ws)
                place[i] = old - 1e-5
                want[i] = (up - value(ws)) / 2e-5
                place[i] = old
            np.testing.assert_allclose(g, want, atol=1e-8)
            assert np.abs(want).max() > 1e-3
