"""The energies: values against NumPy, gradients against finite differences of NumPy, and what must leave them unchanged."""
import equinox as eqx
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from pcnb.energy import Anchor, BidirectionalEnergy, CrossEntropy, ForwardEnergy, Learned, SquaredError, Tied, layer_energies
from pcnb.network import InputError, PCNetwork, Skip

SIZES = (3, 4, 4, 3)
P, P_OUT, ALPHA = (0.5, 2.0), 0.3, (0.1, 0.4, 0.7)
LOSSES = [SquaredError(), CrossEntropy()]
BACKWARD = [Tied(), Learned(), Anchor()]
FORMS = [(g, d) for g in BACKWARD for d in (True, False)]
KINDS = [None, *FORMS]  # None: no backward errors
name = lambda v: type(v).__name__ if not isinstance(v, tuple) else f"{type(v[0]).__name__}-{'difference' if v[1] else 'plain'}"


class Layer(eqx.Module):
    "`W tanh(x)`"
    W: jax.Array

    def __call__(self, x): return self.W @ jnp.tanh(x)


def problem(seed=0):
    "Weights (W_1..W_3, the skip's from 1 to 3, g_1..g_3), input, hidden states and target, in NumPy."
    rng = np.random.default_rng(seed)
    draw = lambda n, m: rng.normal(size=(m, n))
    pairs = list(zip(SIZES, SIZES[1:]))
    ws = {l: draw(n, m) for l, (n, m) in enumerate(pairs, 1)} | {"skip": draw(SIZES[1], SIZES[3])} | {-l: draw(m, n) for l, (n, m) in enumerate(pairs, 1)}
    y = rng.random(3)
    return ws, rng.normal(size=3), [rng.normal(size=4) for _ in range(2)], y / y.sum()


def network(ws):
    f = lambda k: Layer(jnp.asarray(ws[k]))
    return PCNetwork([f(1), f(2), f(3)], (3,), [Skip(1, 3, f("skip"))], [f(-1), f(-2), f(-3)])


def energy_of(loss, kind, p=P, p_out=P_OUT, alpha=ALPHA):
    if kind is None: return ForwardEnergy(loss, p, p_out)
    return BidirectionalEnergy(loss, p, p_out, alpha, *kind)


def numpy_loss(loss, mu, y):
    if isinstance(loss, SquaredError): return 0.5 * sum((m - t) ** 2 for m, t in zip(mu, y))
    top = mu.max()
    return -sum(t * (m - top - np.log(np.exp(mu - top).sum())) for m, t in zip(mu, y))


def predictions(ws, x):
    return [ws[1] @ np.tanh(x[0]), ws[2] @ np.tanh(x[1]), ws[3] @ np.tanh(x[2]) + ws["skip"] @ np.tanh(x[1])]


def feedforward(ws, x0):
    x = [x0]
    for l in range(3): x.append(predictions(ws, x + [np.zeros(4)] * 2)[l])
    return x


def numpy_energy(ws, x0, hidden, y, loss, kind, p=P, p_out=P_OUT, alpha=ALPHA, ref=None):
    "By layer, term by term from the definition. `ref`: the weights that give the reference, if they are held."
    x = [x0, *hidden]
    mu = predictions(ws, x)
    F = [p[0] / 2 * np.sum((x[1] - mu[0]) ** 2), p[1] / 2 * np.sum((x[2] - mu[1]) ** 2), p_out * numpy_loss(loss, mu[2], y)]
    if kind is None: return np.array(F)
    x.append(mu[2])
    at = feedforward(ws if ref is None else ref, x0)
    for l in range(1, 4):
        if isinstance(kind[0], Anchor): nu = lambda v: np.zeros(SIZES[l - 1])
        elif isinstance(kind[0], Learned): nu = lambda v: ws[-l] @ np.tanh(v)
        else:
            jacobian = ws[l] * (1 - np.tanh(at[l - 1]) ** 2)[None, :]
            nu = lambda v: jacobian.T @ v
        b = x[l - 1] - nu(x[l])
        if kind[1]: b = b - (at[l - 1] - nu(at[l]))
        F[l - 1] += alpha[l - 1] / 2 * np.sum(b ** 2)
    return np.array(F)


def slopes(f, place, h=1e-5):
    "Central differences of `f()` in the entries of the array `place`, which is changed and put back."
    out = np.zeros_like(place)
    for i in np.ndindex(place.shape):
        old = place[i]
        place[i] = old + h
        up = f()
        place[i] = old - h
        out[i] = (up - f()) / (2 * h)
        place[i] = old
    return out


def by_layer(energy, ws, x0, hidden, y):
    net = network(ws)
    return layer_energies(energy, net, net.from_states(jnp.asarray(x0), [jnp.asarray(h) for h in hidden]), jnp.asarray(y), net.feedforward(jnp.asarray(x0)))


@pytest.mark.parametrize("kind", KINDS, ids=name)
@pytest.mark.parametrize("loss", LOSSES, ids=name)
def test_values_and_slopes_in_the_states(loss, kind, x64):
    ws, x0, hidden, y = problem()
    energy = energy_of(loss, kind)
    value = lambda: numpy_energy(ws, x0, hidden, y, loss, kind)
    np.testing.assert_allclose(by_layer(energy, ws, x0, hidden, y), value(), rtol=1e-12)
    got = jax.jit(jax.grad(lambda h: by_layer(energy, ws, x0, h, y).sum()))([jnp.asarray(h) for h in hidden])
    for g, place in zip(got, hidden):
        np.testing.assert_allclose(g, slopes(lambda: value().sum(), place), atol=1e-8)


@pytest.mark.parametrize("kind", [None, (Learned(), True), (Learned(), False), (Tied(), True)], ids=name)
@pytest.mark.parametrize("loss", LOSSES, ids=name)
def test_learning_slopes_in_the_weights(loss, kind, x64):
    "Layers and skips descend the forward errors at held states; decoders their reconstruction with unit weight, of the states or of the reference."
    ws, x0, hidden, y = problem(1)
    net, energy, frozen = network(ws), energy_of(loss, kind), {k: w.copy() for k, w in ws.items()}
    s, ref = net.from_states(jnp.asarray(x0), [jnp.asarray(h) for h in hidden]), net.feedforward(jnp.asarray(x0))
    got = eqx.filter_jit(eqx.filter_grad(lambda n: energy.learning(n, s, jnp.asarray(y), ref)))(net)
    forward = lambda: numpy_energy(ws, x0, hidden, y, loss, None).sum()
    for k, f in ((1, got.layers[0]), (2, got.layers[1]), (3, got.layers[2]), ("skip", got.skips[0].module)):
        np.testing.assert_allclose(f.W, slopes(forward, ws[k]), atol=1e-8)
    if kind is None or not isinstance(kind[0], Learned): return
    held = feedforward(frozen, x0) if kind[1] else [np.asarray(v) for v in s.x]
    for l, g in enumerate(got.decoders, 1):
        reconstruction = lambda: 0.5 * np.sum((held[l - 1] - ws[-l] @ np.tanh(held[l])) ** 2)
        np.testing.assert_allclose(g.W, slopes(reconstruction, ws[-l]), atol=1e-8)


@pytest.mark.parametrize("kind", KINDS, ids=name)
def test_scale_of_each_weight(kind, x64):
    "Each precision and each alpha multiplies its own term and nothing else."
    ws, x0, hidden, y = problem(2)
    part = lambda p, p_out, alpha: np.asarray(by_layer(energy_of(SquaredError(), kind, p, p_out, alpha), ws, x0, hidden, y))
    none = (0.0,) * 3
    np.testing.assert_array_equal(part((0.0, 0.0), 0.0, none), np.zeros(3))
    first, second, out = part((1.0, 0.0), 0.0, none), part((0.0, 1.0), 0.0, none), part((0.0, 0.0), 1.0, none)
    backs = [part((0.0, 0.0), 0.0, tuple(float(i == l) for i in range(3))) for l in range(3)]
    for l, v in enumerate((first, second, out)): assert v[l] > 0.01 and np.abs(np.delete(v, l)).max() == 0
    if kind is not None:
        for l, v in enumerate(backs): assert np.abs(np.delete(v, l)).max() == 0
        if kind != (Anchor(), True): assert all(v[l] > 0.01 for l, v in enumerate(backs))
    want = 0.7 * first + 3 * second + 0.2 * out + 5 * backs[0] + 0.3 * backs[1] + 2 * backs[2]
    np.testing.assert_allclose(part((0.7, 3.0), 0.2, (5.0, 0.3, 2.0)), want, rtol=1e-12)
    np.testing.assert_allclose(part(0.7, 0.2, 0.3), part((0.7, 0.7), 0.2, (0.3,) * 3), rtol=1e-14)  # one number stands for all


def test_slope_in_a_precision_is_half_the_squared_error(x64):
    ws, x0, hidden, y = problem(3)
    eps = [h - m for h, m in zip(hidden, predictions(ws, [x0, *hidden]))]
    got = jax.grad(lambda p: by_layer(ForwardEnergy(precision=p), ws, x0, hidden, y).sum())((jnp.array(0.5), jnp.array(2.0)))
    np.testing.assert_allclose(got, [0.5 * e @ e for e in eps], rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS, ids=name)
def test_batch_is_a_loop(kind, getkey):
    ws = problem()[0]
    net = jax.tree.map(lambda v: v.astype(jnp.float32), network(ws))
    energy = energy_of(CrossEntropy(), kind)
    X, H, Y = jax.random.normal(getkey(), (5, 3)), jax.random.normal(getkey(), (2, 5, 4)), jax.nn.one_hot(jnp.arange(5) % 3, 3)
    one = lambda x, h, y: layer_energies(energy, net, net.from_states(x, list(h)), y, net.feedforward(x))
    whole = jax.jit(jax.vmap(one, (0, 1, 0)))(X, H, Y)
    assert whole.shape == (5, 3) and whole.dtype == jnp.float32
    np.testing.assert_allclose(whole, np.stack([one(X[i], H[:, i], Y[i]) for i in range(5)]), rtol=1e-4, atol=1e-5)


@settings(max_examples=8)
@given(seed=st.integers(0, 2**31), loss=st.sampled_from(LOSSES))
def test_renaming_units_changes_nothing(seed, loss):
    "Hidden units in another order, with the weights that belong to them; classes in another order, with their targets."
    ws, x0, hidden, y = problem(seed)
    rng = np.random.default_rng(seed)
    a, b, c = rng.permutation(4), rng.permutation(4), rng.permutation(3)
    new = {1: ws[1][a], 2: ws[2][b][:, a], 3: ws[3][c][:, b], "skip": ws["skip"][c][:, a],
           -1: ws[-1][:, a], -2: ws[-2][a][:, b], -3: ws[-3][b][:, c]}
    with jax.enable_x64(True):
        for kind in KINDS:
            energy = energy_of(loss, kind)
            np.testing.assert_allclose(by_layer(energy, new, x0, [hidden[0][a], hidden[1][b]], y[c]), by_layer(energy, ws, x0, hidden, y), rtol=1e-10)


class Affine(eqx.Module):
    W: jax.Array
    b: jax.Array

    def __call__(self, x): return self.W @ x + self.b


@given(seed=st.integers(0, 2**31))
def test_moving_the_origin_changes_nothing(seed):
    "Affine layers: each state x_l + c_l with biases b_l + c_l - W_l c_{l-1}; also the target, for squared error."
    rng = np.random.default_rng(seed)
    with jax.enable_x64(True):
        W, b, c, x = ([jnp.asarray(rng.normal(size=s)) for s in shapes] for shapes in (((4, 3), (4, 4), (3, 4)), ((4,), (4,), (3,)), ((3,), (4,), (4,), (3,)), ((3,), (4,), (4,), (3,))))
        def energies(b, x):
            net = PCNetwork([Affine(*v) for v in zip(W, b)], (3,))
            return [layer_energies(e, net, net.from_states(x[0], x[1:3]), x[3], net.feedforward(x[0])) for e in (ForwardEnergy(precision=P), BidirectionalEnergy(alpha=ALPHA))]
        moved = [bias + hi - w @ lo for bias, w, lo, hi in zip(b, W, c, c[1:])]
        for old, new in zip(energies(b, x), energies(moved, [v + s for v, s in zip(x, c)])): np.testing.assert_allclose(new, old, rtol=1e-8)


@pytest.mark.parametrize("form", FORMS, ids=name)
def test_backward_errors_at_rest(form, x64):
    "At the feedforward state the difference form is silent in value and slope; the plain form is not."
    ws, x0, _, y = problem(4)
    at = [jnp.asarray(h) for h in feedforward(ws, x0)[1:3]]
    backward = lambda h: by_layer(energy_of(SquaredError(), form, alpha=(1.0,) * 3), ws, x0, h, y).sum() - by_layer(energy_of(SquaredError(), None), ws, x0, h, y).sum()
    value, slope = jax.value_and_grad(backward)(at)
    size = max(float(jnp.abs(g).max()) for g in slope)
    if form[1]: assert abs(value) < 1e-12 and size < 1e-12
    else: assert value > 0.1 and size > 0.01


@settings(max_examples=10)
@given(seed=st.integers(0, 2**31))
def test_losses(seed):
    rng = np.random.default_rng(seed)
    mu, y, order = 5 * rng.normal(size=6), rng.random(6), rng.permutation(6)
    y /= y.sum()
    with jax.enable_x64(True):
        m, t = jnp.asarray(mu), jnp.asarray(y)
        for loss in LOSSES:
            np.testing.assert_allclose(loss(m, t), numpy_loss(loss, mu, y), rtol=1e-12)
            np.testing.assert_allclose(loss(m[order], t[order]), loss(m, t), rtol=1e-12)
            np.testing.assert_allclose(jax.grad(loss)(m, t), slopes(lambda: numpy_loss(loss, mu, y), mu), atol=1e-7)
            assert np.linalg.eigvalsh(jax.hessian(loss)(m, t)).min() > -1e-12  # convex, as Gauss-Newton needs
        shift = 3.7
        np.testing.assert_allclose(CrossEntropy()(m + shift, t), CrossEntropy()(m, t), rtol=1e-11)
        np.testing.assert_allclose(SquaredError()(m + shift, t + shift), SquaredError()(m, t), rtol=1e-11)
        entropy = -(y * np.log(y)).sum()
        assert CrossEntropy()(m, t) >= entropy - 1e-12
        np.testing.assert_allclose(CrossEntropy()(jnp.log(t), t), entropy, rtol=1e-12)
        Q = np.linalg.qr(rng.normal(size=(6, 6)))[0]
        np.testing.assert_allclose(SquaredError()(Q @ m, Q @ t), SquaredError()(m, t), rtol=1e-11)


def test_cross_entropy_of_huge_outputs():
    mu, y = jnp.array([1e4, 0.0, -1e4]), jnp.array([0.0, 1.0, 0.0])
    np.testing.assert_allclose(CrossEntropy()(mu, y), 1e4)
    np.testing.assert_allclose(jax.grad(CrossEntropy())(mu, y), [1.0, -1.0, 0.0])


@pytest.mark.parametrize("make", [
    lambda: ForwardEnergy(precision=-1.0), lambda: ForwardEnergy(precision=(1.0, -2.0)), lambda: ForwardEnergy(output_precision=-0.1),
    lambda: ForwardEnergy(precision=float("nan")), lambda: ForwardEnergy(precision=jnp.array([1.0, -1.0])), lambda: ForwardEnergy(output_precision=np.float32(-1)), lambda: BidirectionalEnergy(precision=-1.0), lambda: BidirectionalEnergy(output_precision=float("nan")),
    lambda: BidirectionalEnergy(alpha=-1.0), lambda: BidirectionalEnergy(alpha=(0.1, float("nan"), 0.1))])
def test_weights_below_zero_are_refused(make):
    with pytest.raises(InputError, match="expected a number >= 0"): make()


@pytest.mark.parametrize("energy, text", [
    (ForwardEnergy(precision=(1.0,)), "precision has 1 values; expected one number or 2"),
    (ForwardEnergy(precision=()), "precision has 0 values"),
    (BidirectionalEnergy(alpha=(1.0, 1.0)), "alpha has 2 values; expected one number or 3")])
def test_wrong_number_of_weights_is_refused(energy, text):
    with pytest.raises(InputError, match=text): by_layer(energy, *problem())


def test_learned_needs_decoders(getkey):
    net = PCNetwork([lambda x: x, lambda x: x], (2,))
    s = net.feedforward(jnp.ones(2))
    with pytest.raises(InputError, match="decoders"): layer_energies(BidirectionalEnergy(backward=Learned()), net, s, jnp.ones(2), s)
