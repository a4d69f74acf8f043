"""Inference against NumPy: loops and dense matrices for every algorithm, the closed form of linear networks, and what holds for any network."""
from collections.abc import Callable

import equinox as eqx
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given

from pcnb.energy import BidirectionalEnergy, CrossEntropy, ForwardEnergy, SquaredError, Tied
from pcnb.inference import ErrorDescent, GaussNewton, GradientDescent, LBFGS, Sweep, _conjugate_gradients, _conjugate_gradients_by_output, _truncated_newton, infer, wave
from pcnb.models import mlp
from pcnb.network import InputError, PCNetwork, Skip

run = eqx.filter_jit(infer)
learn = eqx.filter_jit(eqx.filter_grad(lambda net, energy, s, y, ref: energy.learning(net, s, y, ref)))
run_batch = eqx.filter_jit(jax.vmap(infer, (None, None, None, 0, 0)))
LOSSES = [SquaredError(), CrossEntropy()]
kind = lambda v: type(v).__name__


class Layer(eqx.Module):
    "`W act(x) + b`"
    W: jax.Array
    b: jax.Array
    act: Callable = eqx.field(static=True)

    def __call__(self, x): return self.W @ self.act(x) + self.b


def identity(x): return x


class Oracle:
    """A network with its energy, in NumPy: mu_l is the sum of W act(x_src) + b over the edges (src, l).

    Hidden states are a list h (h[0] is x_1); z is the vector of sqrt(p_l) eps_l.
    """
    def __init__(self, seed=0, sizes=(4, 5, 4, 5, 3), skips=((1, 3),), loss=None, linear=False, gain=0.9, p_out=0.8, alpha=None):
        rng = np.random.default_rng(seed)
        self.sizes, self.L, self.linear, self.loss = sizes, len(sizes) - 1, linear, loss or SquaredError()
        edges = [(l - 1, l) for l in range(1, self.L + 1)] + list(skips)
        self.edges = {(i, j): (gain * rng.normal(size=(sizes[j], sizes[i])) / sizes[i] ** 0.5, 0.3 * rng.normal(size=sizes[j])) for i, j in edges}
        self.p, self.p_out = tuple(0.5 + 1.5 * rng.random(self.L - 1)), p_out
        self.x0, self.y = rng.normal(size=sizes[0]), rng.random(sizes[-1])
        self.y /= self.y.sum()
        self.alpha = alpha  # one a layer, of the tied difference form; None: no backward errors

    # the same in pcnb
    def problem(self):
        layer = lambda k: Layer(*map(jnp.asarray, self.edges[k]), identity if self.linear else jnp.tanh)
        net = PCNetwork([layer((l - 1, l)) for l in range(1, self.L + 1)], (self.sizes[0],), [Skip(*k, layer(k)) for k in list(self.edges)[self.L:]])
        energy = ForwardEnergy(self.loss, self.p, self.p_out) if self.alpha is None else BidirectionalEnergy(self.loss, self.p, self.p_out, self.alpha, Tied())
        return net, energy, jnp.asarray(self.x0), jnp.asarray(self.y)

    def act(self, x): return x if self.linear else np.tanh(x)
    def parents(self, l): return [i for i, j in self.edges if j == l]
    def mu(self, l, x): return sum(self.edges[i, l][0] @ self.act(x[i]) + self.edges[i, l][1] for i in self.parents(l))
    def jacobian(self, i, l, x): return self.edges[i, l][0] * (1 if self.linear else (1 - np.tanh(x[i]) ** 2)[None, :])

    def states(self, h):
        x = [self.x0, *h]
        return [*x, self.mu(self.L, x)]

    def errors(self, h): return [v - self.mu(l, self.states(h)) for l, v in enumerate(h, 1)]

    def from_errors(self, eps):
        x = [self.x0]
        for l, e in enumerate(eps, 1): x.append(self.mu(l, x) + e)
        return x[1:]

    def rest(self): return self.from_errors([np.zeros(n) for n in self.sizes[1:-1]])

    def output(self, mu):
        "Loss, slope and Hessian of the output's term."
        if isinstance(self.loss, SquaredError): value, slope, hessian = 0.5 * np.sum((mu - self.y) ** 2), mu - self.y, np.eye(len(mu))
        else:
            q = np.exp(mu - mu.max())
            q /= q.sum()
            value, slope, hessian = -np.sum(self.y * np.log(q)), q - self.y, np.diag(q) - np.outer(q, q)
        return self.p_out * value, self.p_out * slope, self.p_out * hessian

    def backward(self, h):
        "Tied backward errors b_0 .. b_{L-1} in difference form, and the matrices in them."
        x, ref = self.states(h), self.states(self.rest())
        back = [self.jacobian(l - 1, l, ref).T for l in range(1, self.L + 1)]
        return [x[l] - ref[l] - G @ (x[l + 1] - ref[l + 1]) for l, G in enumerate(back)], back

    def energies(self, h):
        F = np.array([*(q / 2 * e @ e for q, e in zip(self.p, self.errors(h))), self.output(self.states(h)[-1])[0]])
        if self.alpha is not None: F += [a / 2 * b @ b for a, b in zip(self.alpha, self.backward(h)[0])]
        return F

    def energy(self, h): return self.energies(h).sum()

    def slope(self, h):
        "dF/dx_l: the state's own error, less what its successors' errors send back."
        x, weighted = self.states(h), [q * e for q, e in zip(self.p, self.errors(h))]
        up = {l: -w for l, w in enumerate(weighted, 1)} | {self.L: self.output(x[-1])[1]}  # dF/dmu_l
        if self.alpha is not None:
            b, back = self.backward(h)
            up[self.L] = up[self.L] - self.alpha[-1] * back[-1].T @ b[-1]
        g = []
        for l in range(1, self.L):
            v = weighted[l - 1] + sum(self.jacobian(l, j, x).T @ up[j] for i, j in self.edges if i == l)
            if self.alpha is not None: v = v + self.alpha[l] * b[l] - self.alpha[l - 1] * back[l - 1].T @ b[l - 1]
            g.append(v)
        return g

    def residual(self, h): return np.sqrt(sum(g @ g for g in self.slope(h)))

    # whitened error coordinates
    def split(self, z):
        eps, at = [], 0
        for n, q in zip(self.sizes[1:-1], self.p): eps, at = [*eps, z[at:at + n] / q ** 0.5], at + n
        return eps

    def moves(self, h):
        "dx_l/dz, dense, for l = 0..L."
        x, N, at = self.states(h), sum(self.sizes[1:-1]), 0
        D = [np.zeros((self.sizes[0], N))]
        for l in range(1, self.L + 1):
            M = sum(self.jacobian(i, l, x) @ D[i] for i in self.parents(l))
            if l < self.L:
                n = self.sizes[l]
                M[:, at:at + n] += np.eye(n) / self.p[l - 1] ** 0.5
                at += n
            D.append(M)
        return D

    def gauss_newton_system(self, z):
        "Gradient and Gauss-Newton matrix in z."
        h = self.from_errors(self.split(z))
        D, (_, s, H) = self.moves(h), self.output(self.states(h)[-1])
        r, J = [z], [np.eye(len(z))]
        if self.alpha is not None:
            b, back = self.backward(h)
            r += [a ** 0.5 * v for a, v in zip(self.alpha, b)]
            J += [a ** 0.5 * (D[l] - G @ D[l + 1]) for l, (a, G) in enumerate(zip(self.alpha, back))]
        r, J = np.concatenate(r), np.concatenate(J)
        return J.T @ r + D[-1].T @ s, J.T @ J + D[-1].T @ H @ D[-1]

    def energy_at(self, z): return self.energy(self.from_errors(self.split(z)))

    def whitened_slope(self, z): return self.gauss_newton_system(z)[0]


def conjugate_gradients(M, b, steps):
    d, r, p = np.zeros_like(b), b.copy(), b.copy()
    for _ in range(steps):
        a = r @ r / (p @ M @ p)
        d, new = d + a * p, r - a * M @ p
        p, r = new + new @ new / (r @ r) * p, new
    return d


# each gives the hidden states where the algorithm ends
def by_gradient_descent(o, steps, rate, momentum=0.0):
    h = o.rest()
    m = [np.zeros_like(v) for v in h]
    for _ in range(steps):
        m = [momentum * a + g for a, g in zip(m, o.slope(h))]
        h = [v - rate * a for v, a in zip(h, m)]
    return h


def by_sweep(o, sweeps, rate):
    h = o.rest()
    for _ in range(sweeps):
        for l in reversed(range(len(h))): h[l] = h[l] - rate * o.slope(h)[l]
    return h


def by_error_descent(o, steps, rate, momentum=0.0):
    eps = [np.zeros(n) for n in o.sizes[1:-1]]
    m = eps
    for _ in range(steps):
        z = np.concatenate([q ** 0.5 * e for q, e in zip(o.p, eps)])
        g = [q * e for q, e in zip(o.p, o.split(o.whitened_slope(z)))]  # dF/deps = sqrt(p) dF/dz
        m = [momentum * a + v for a, v in zip(m, g)]
        eps = [e - rate * a for e, a in zip(eps, m)]
    return o.from_errors(eps)


def by_gauss_newton(o, steps, cg_steps=None):
    "cg_steps=None solves the system. Fails if a step raises the energy, for then the guard would act."
    z = np.zeros(sum(o.sizes[1:-1]))
    for _ in range(steps):
        g, M = o.gauss_newton_system(z)
        new = z + (np.linalg.solve(M, -g) if cg_steps is None else conjugate_gradients(M, -g, cg_steps))
        assert o.energy_at(new) < o.energy_at(z)
        z = new
    return o.from_errors(o.split(z))


def by_lbfgs(o, steps, memory):
    "The inverse Hessian as a dense matrix, built anew from the last changes. Fails if a step raises the energy, for then the guard would act."
    z = np.zeros(sum(o.sizes[1:-1]))
    (g, M), changes = o.gauss_newton_system(z), []
    for _ in range(steps):
        if not changes: d = -(g @ g) / (g @ M @ g) * g
        else:
            s, t = changes[-1]
            B, one = s @ t / (t @ t) * np.eye(len(z)), np.eye(len(z))
            for s, t in changes[-memory:]: B = (one - np.outer(s, t) / (s @ t)) @ B @ (one - np.outer(t, s) / (s @ t)) + np.outer(s, s) / (s @ t)
            d = -B @ g
        new = z + d
        assert o.energy_at(new) < o.energy_at(z)
        slope = o.whitened_slope(new)
        changes.append((d, slope - g))
        z, g = new, slope
    return o.from_errors(o.split(z))


def agrees(o, algorithm, h, tol=1e-10):
    "All that `infer` reports, against NumPy at the states `h`."
    net, energy, x, y = o.problem()
    got = run(net, energy, algorithm, x, y)
    for a, b in zip(got.states.x, o.states(h), strict=True): np.testing.assert_allclose(a, b, rtol=0, atol=tol)
    for a, b in zip(got.states.eps, o.errors(h), strict=True): np.testing.assert_allclose(a, b, rtol=0, atol=tol)
    for a, b in zip(got.ref.x, o.states(o.rest()), strict=True): np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)
    np.testing.assert_allclose(got.energy, o.energies(h), atol=tol)
    np.testing.assert_allclose(got.initial_energy, o.energies(o.rest()), atol=1e-12)
    np.testing.assert_allclose(got.residual, o.residual(h), atol=10 * tol)
    np.testing.assert_allclose(got.relative_residual, o.residual(h) / o.residual(o.rest()), atol=10 * tol)
    return got


STEPS = {
    "gradient descent 1": (GradientDescent(1, optax.sgd(0.2)), lambda o: by_gradient_descent(o, 1, 0.2)),
    "gradient descent 3": (GradientDescent(3, optax.sgd(0.2)), lambda o: by_gradient_descent(o, 3, 0.2)),
    "gradient descent 7, momentum": (GradientDescent(7, optax.sgd(0.1, 0.9)), lambda o: by_gradient_descent(o, 7, 0.1, 0.9)),
    "sweep 1": (Sweep(1, 0.7), lambda o: by_sweep(o, 1, 0.7)),
    "sweep 3": (Sweep(3, 0.4), lambda o: by_sweep(o, 3, 0.4)),
    "error descent 1": (ErrorDescent(1, optax.sgd(0.2)), lambda o: by_error_descent(o, 1, 0.2)),
    "error descent 4, momentum": (ErrorDescent(4, optax.sgd(0.1, 0.9)), lambda o: by_error_descent(o, 4, 0.1, 0.9)),
    "Gauss-Newton 1x1": (GaussNewton(1, 1), lambda o: by_gauss_newton(o, 1, 1)),
    "Gauss-Newton 1x2": (GaussNewton(1, 2), lambda o: by_gauss_newton(o, 1, 2)),
    "Gauss-Newton 2x1": (GaussNewton(2, 1), lambda o: by_gauss_newton(o, 2, 1)),
    "Gauss-Newton 2xfull": (GaussNewton(2, 4), lambda o: by_gauss_newton(o, 2)),
    "Gauss-Newton 3x2": (GaussNewton(3, 2), lambda o: by_gauss_newton(o, 3, 2)),
    "Gauss-Newton 9x1": (GaussNewton(9, 1), lambda o: by_gauss_newton(o, 9, 1)),  # a compiled loop, as all counts above eight
    "LBFGS 1": (LBFGS(1), lambda o: by_gauss_newton(o, 1, 1)),
    "LBFGS 3": (LBFGS(3), lambda o: by_lbfgs(o, 3, 10)),
    "LBFGS 5, memory 2": (LBFGS(5, 2), lambda o: by_lbfgs(o, 5, 2)),
}


@pytest.mark.parametrize("loss, name", [(CrossEntropy(), n) for n in STEPS] + [(SquaredError(), n) for n in ("gradient descent 1", "Gauss-Newton 1x1")],
                         ids=lambda v: v if isinstance(v, str) else kind(v))
def test_steps_against_numpy(name, loss, x64):
    "Four tanh layers, a skip, different precisions."
    algorithm, oracle = STEPS[name]
    o = Oracle(loss=loss)
    agrees(o, algorithm, oracle(o))


@pytest.mark.parametrize("name", ["gradient descent 3", "Gauss-Newton 1x2", "LBFGS 3"])
def test_steps_of_the_bidirectional_energy(name, x64):
    algorithm, oracle = STEPS[name]
    o = Oracle(seed=1, loss=CrossEntropy(), alpha=(0.2, 0.5, 0.3, 0.4))
    agrees(o, algorithm, oracle(o))


@pytest.mark.parametrize("alpha", [None, (0.2, 0.5, 0.3)], ids=["forward", "bidirectional"])
def test_many_conjugate_gradient_iterations(alpha, x64):
    "More than are written out, on an output wide enough that they are not done sooner."
    o = Oracle(seed=4, sizes=(4, 18, 17, 16), skips=(), alpha=alpha, gain=1.2, p_out=5.0)
    done, nearly = (by_gauss_newton(o, 1, n) for n in (12, 11))
    assert max(np.abs(a - b).max() for a, b in zip(done, nearly)) > 1e-3
    agrees(o, GaussNewton(1, 12), done, 1e-9)


def test_oracle_slopes_are_those_of_its_energy():
    "The oracle itself, by central differences in the states and in z."
    for alpha in (None, (0.2, 0.5, 0.3, 0.4)):
        for loss in LOSSES:
            o = Oracle(seed=2, loss=loss, alpha=alpha)
            rng, n = np.random.default_rng(0), sum(o.sizes[1:-1])
            z = rng.normal(size=n)
            want = [(o.energy_at(z + d) - o.energy_at(z - d)) / 2e-5 for d in 1e-5 * np.eye(n)]
            np.testing.assert_allclose(o.whitened_slope(z), want, atol=1e-8)
            h, parts = np.concatenate(o.from_errors(o.split(z))), np.cumsum(o.sizes[1:-2])
            want = [(o.energy(np.split(h + d, parts)) - o.energy(np.split(h - d, parts))) / 2e-5 for d in 1e-5 * np.eye(n)]
            np.testing.assert_allclose(np.concatenate(o.slope(np.split(h, parts))), want, atol=1e-8)


@pytest.mark.parametrize("loss", LOSSES, ids=kind)
def test_exact_is_a_newton_step_where_the_hessian_is_positive(loss, x64):
    o = Oracle(seed=3, sizes=(3, 2, 2, 2), skips=((1, 3),), loss=loss, gain=1.2)
    z = np.zeros(4)
    for _ in range(2):
        g, M = o.gauss_newton_system(z)
        hessian = np.array([(o.whitened_slope(z + d) - o.whitened_slope(z - d)) / 2e-5 for d in 1e-5 * np.eye(4)])
        assert np.linalg.eigvalsh((hessian + hessian.T) / 2).min() > 0.1
        if z.any(): assert np.abs(hessian - M).max() > 1e-3  # not the Gauss-Newton matrix again
        new = z - np.linalg.solve(hessian, g)
        assert o.energy_at(new) < o.energy_at(z)
        z = new
    for cg_steps in (4, 12): agrees(o, GaussNewton(2, cg_steps, exact=True), o.from_errors(o.split(z)), 1e-7)


@pytest.mark.parametrize("eigenvalues, kept", [((-1, 3, 2), 0), ((4, 3, 1), 3), ((9, 1, -0.5), None)], ids=["at once", "never", "on the way"])
def test_newton_stops_at_negative_curvature(eigenvalues, kept, x64):
    "In NumPy: as many conjugate-gradient iterations as have positive curvature; the gradient itself, if the first has none."
    rng = np.random.default_rng(0)
    Q = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    H, b = (Q * eigenvalues) @ Q.T, Q @ (1.0, 0.2, 0.3)
    d, r, p, done = np.zeros(3), b, b, 0
    for _ in range(3):
        if p @ H @ p <= 0: break
        a = r @ r / (p @ H @ p)
        d, new, done = d + a * p, r - a * H @ p, done + 1
        r, p = new, new + new @ new / (r @ r) * p
    assert done == kept if kept is not None else 0 < done < 3
    if kept == 3: np.testing.assert_allclose(d, np.linalg.solve(H, b), rtol=1e-9)
    np.testing.assert_allclose(_truncated_newton(lambda v: H @ v, jnp.asarray(b), 3), d if done else b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("curvatures", [(4.0, -3.0, 1.0), (-9.0, -9.0, -9.0), (4.0, 2.0, 1.0)], ids=["on the way", "at once", "never"])
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 10])
@pytest.mark.parametrize("seed", range(5))
def test_conjugate_gradients_end_where_curvature_does(curvatures, steps, seed, x64):
    "Both forms, in NumPy: iterations up to the first direction without positive curvature, as in the negative phase of centred nudging."
    rng = np.random.default_rng(seed)
    A, h, b = rng.normal(size=(3, 6)), np.array(curvatures), rng.normal(size=6)
    M = np.eye(6) + A.T @ (h[:, None] * A)
    d, r, p, done = np.zeros(6), b, b, 0
    for _ in range(steps):
        if r @ r < 1e-24 or p @ M @ p <= 0: break
        a = r @ r / (p @ M @ p)
        d, new, done = d + a * p, r - a * M @ p, done + 1
        r, p = new, new + new @ new / (r @ r) * p
    assert done == 0 if h.max() < 0 else done == min(steps, 4) if h.min() > 0 else done < 4
    plain = _conjugate_gradients(lambda v: (v, A @ v), lambda u: u[0] + A.T @ u[1], lambda v: h * v, jnp.asarray(b), steps)
    by_output = _conjugate_gradients_by_output(lambda v: A @ v, lambda u: A.T @ u, lambda v: h * v, jnp.asarray(b), steps)
    for got, gain in (plain, by_output):
        np.testing.assert_allclose(got, d, rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(gain, b @ d, rtol=1e-6, atol=1e-8)


def test_lbfgs_stays_where_it_finds_no_minimum(small):
    "A negative phase far beyond its threshold: the first step has no length, and the second is no longer."
    net, _, x, y = small
    got = infer(net, eqx.tree_at(lambda e: e.output_precision, ForwardEnergy(), -50.0), LBFGS(3), x[0], y[0])
    for a, b in zip(got.states.hidden, got.ref.hidden, strict=True): np.testing.assert_array_equal(a, b)


def test_what_is_not_a_number_does_not_pass_for_converged(small):
    net, _, x, y = small
    assert jnp.isnan(infer(net, ForwardEnergy(), GaussNewton(1, 1), x[0] * jnp.nan, y[0]).relative_residual)


def rising():
    "A network whose full Gauss-Newton step from rest raises the energy, with that step."
    for seed in range(200):
        o = Oracle(seed=seed, sizes=(4, 5, 4, 2), gain=3.0, p_out=50.0)
        z = np.zeros(sum(o.sizes[1:-1]))
        g, M = o.gauss_newton_system(z)
        d = np.linalg.solve(M, -g)
        if o.energy_at(d) > 1.1 * o.energy_at(z): return o, d
    raise AssertionError("no such network among 200")


def test_guard_shortens_a_step_that_rises(x64):
    o, d = rising()
    net, energy, x, y = o.problem()
    whitened = lambda got: np.concatenate([q ** 0.5 * np.asarray(e) for q, e in zip(o.p, got.states.eps)])
    dropped, shorter = (run(net, energy, GaussNewton(1, 3, backtracks=n), x, y) for n in (0, 8))
    np.testing.assert_array_equal(whitened(dropped), 0 * d)
    np.testing.assert_allclose(dropped.energy, dropped.initial_energy, rtol=1e-12)
    z = whitened(shorter)
    t = z @ d / (d @ d)
    assert 0 < t < 1
    np.testing.assert_allclose(z, t * d, atol=1e-8)
    assert shorter.energy.sum() < shorter.initial_energy.sum() and shorter.passes > dropped.passes


def test_guard_does_not_chase_rounding(x64):
    "A rise within the rounding is none; a step that rises by more, but promises less than the rounding, is dropped at its first trial."
    whitened = lambda o, got: np.concatenate([q ** 0.5 * np.asarray(e) for q, e in zip(o.p, got.states.eps)])
    o, d = rising()
    z = np.zeros_like(d)
    net, energy, x, y = o.problem()
    e, rise = o.energy_at(z), o.energy_at(d) - o.energy_at(z)
    once = run(net, energy, GaussNewton(1, 3, backtracks=0), x, y).passes
    taken = run(net, energy, GaussNewton(1, 3, rounding=1.01 * rise / e), x, y)
    np.testing.assert_allclose(whitened(o, taken), d, atol=1e-8)
    assert taken.passes == once
    seen = 0
    for seed in range(200):
        o = Oracle(seed=seed, sizes=(4, 5, 4, 2), gain=3.0, p_out=50.0)
        g, M = o.gauss_newton_system(z)
        d = np.linalg.solve(M, -g)
        e, promise, rise = o.energy_at(z), -g @ d, o.energy_at(d) - o.energy_at(z)
        if rise < 1.1 * promise: continue
        seen += 1
        net, energy, x, y = o.problem()
        given_up = run(net, energy, GaussNewton(1, 3, rounding=1.05 * promise / e), x, y)
        np.testing.assert_array_equal(whitened(o, given_up), z)
        tried = run(net, energy, GaussNewton(1, 3, rounding=0.95 * promise / e), x, y)
        assert given_up.passes == once and tried.passes > once
        if seen == 3: return
    raise AssertionError(f"{seen} such networks among 200; expected 3")


GUARDED = [  # depth, width, activation, loss, algorithm
    (2, 3, jax.nn.relu, SquaredError(), GaussNewton(2, 2)),
    (4, 6, jax.nn.gelu, CrossEntropy(), GaussNewton(2, 1)),
    (6, 6, jnp.tanh, SquaredError(), GaussNewton(1, 3)),
    (3, 4, jax.nn.relu, CrossEntropy(), GaussNewton(2, 8)),
    (3, 5, jax.nn.gelu, SquaredError(), GaussNewton(2, 2, exact=True)),
    (4, 5, jax.nn.relu, CrossEntropy(), LBFGS(4)),
]


def random_network(depth, width, act, rng, scale):
    sizes = [5, *[width] * (depth - 1), 4]
    draw = lambda *s: jnp.asarray(rng.normal(size=s), jnp.float32)
    return PCNetwork([Layer(scale * draw(m, n) / n ** 0.5, 0.1 * draw(m), act) for n, m in zip(sizes, sizes[1:])], (5,))


@pytest.mark.parametrize("case", GUARDED, ids=lambda c: f"{c[0]}x{c[1]}-{c[2].__name__}-{kind(c[3])}-{'LBFGS' if isinstance(c[4], LBFGS) else 'exact' if c[4].exact else f'{c[4].steps}x{c[4].cg_steps}'}")
@given(seed=st.integers(0, 2**31), scale=st.floats(0, 4), decade=st.floats(-2, 2))
def test_energy_never_rises(case, seed, scale, decade):
    depth, width, act, loss, algorithm = case
    rng = np.random.default_rng(seed)
    net = random_network(depth, width, act, rng, np.float32(scale))
    energy = ForwardEnergy(loss, output_precision=jnp.float32(10 ** decade))
    x = jnp.asarray(rng.normal(size=(8, 5)) * 10 ** rng.uniform(-1, 1, size=(8, 1)), jnp.float32)
    got = run_batch(net, energy, algorithm, x, jax.nn.one_hot(rng.integers(0, 4, 8), 4))
    before, after = np.asarray(got.initial_energy, np.float64).sum(1), np.asarray(got.energy, np.float64).sum(1)
    assert np.isfinite(after).all() and np.isfinite(before).all()
    assert (after <= before * (1 + 1e-5)).all(), (after / before).max()
    assert all(np.isfinite(v).all() for v in jax.tree.leaves(got))


# the closed form
def equilibrium(o):
    "Least squares over all hidden states: rows sqrt(p_l) (x_l - sum W x_src - b_l), and the output's."
    at = np.cumsum([0, *o.sizes[1:-1]])
    rows, rhs = [], []
    for l in range(1, o.L + 1):
        w = (o.p_out if l == o.L else o.p[l - 1]) ** 0.5
        row, c = np.zeros((o.sizes[l], at[-1])), o.y.copy() if l == o.L else np.zeros(o.sizes[l])
        c = -c if l == o.L else c  # the output row is y - mu, the hidden ones x - mu
        if l < o.L: row[:, at[l - 1]:at[l]] += np.eye(o.sizes[l])
        for i in o.parents(l):
            W, b = o.edges[i, l]
            c = c + b
            if i == 0: c = c + W @ o.x0
            else: row[:, at[i - 1]:at[i]] -= W
        rows.append(w * row)
        rhs.append(w * c)
    B, c = np.concatenate(rows), np.concatenate(rhs)
    h = np.linalg.solve(B.T @ B, B.T @ c)
    return np.split(h, at[1:-1]), 0.5 * np.sum((B @ h - c) ** 2)


CONVERGED = {
    "to a residual": GradientDescent(100_000, optax.sgd(0.15), tolerance=1e-9),
    "sweeps": Sweep(1500, 0.2),
    "error descent": ErrorDescent(3000, optax.sgd(0.08)),
    "Gauss-Newton": GaussNewton(60, 1, tolerance=1e-9),
    "Gauss-Newton 1xfull": GaussNewton(1, 3),
    "exact 1xfull": GaussNewton(1, 3, exact=True),
    "LBFGS": LBFGS(60, 4, tolerance=1e-9),
}


@pytest.mark.parametrize("name", CONVERGED)
def test_linear_equilibrium(name, x64):
    "States, energy and weight gradients of a linear network with three skips, from the input and to the output."
    o = Oracle(seed=5, sizes=(4, 5, 4, 2), skips=((0, 2), (0, 3), (1, 3)), linear=True, gain=0.7)
    h, F = equilibrium(o)
    assert max(np.abs(g).max() for g in o.slope(h)) < 1e-12 and o.energy(h) < 0.9 * o.energy(o.rest())
    np.testing.assert_allclose(o.energy(h), F, rtol=1e-12)
    got = agrees(o, CONVERGED[name], h, 1e-5)
    net, energy, _, y = o.problem()
    grads = learn(net, energy, got.states, y, got.ref)
    x, sent = o.states(h), [*(-q * e for q, e in zip(o.p, o.errors(h))), o.p_out * (o.states(h)[-1] - o.y)]  # dF/dmu_l
    modules = {(l, l + 1): f for l, f in enumerate(grads.layers)} | {(s.src, s.dst): s.module for s in grads.skips}
    assert modules.keys() == o.edges.keys()
    for (i, j), f in modules.items():
        np.testing.assert_allclose(f.W, np.outer(sent[j - 1], x[i]), atol=1e-5)
        np.testing.assert_allclose(f.b, sent[j - 1], atol=1e-5)


# the wave
@given(seed=st.integers(0, 2**31), depth=st.integers(1, 7), data=st.data())
def test_wave_against_brute_force(seed, depth, data):
    "First step at which a state moves, seen by stepping a random network in NumPy: gradients are exact zeros before."
    far = [(i, j) for j in range(2, depth + 1) for i in range(j - 1)]
    skips = data.draw(st.lists(st.sampled_from(far), unique=True, max_size=4)) if far else []
    o = Oracle(seed, (2,) * (depth + 1), skips)
    h, first = o.rest(), {}
    for step in range(1, depth + 1):
        g = o.slope(h)
        for l, v in enumerate(g):
            if v.any(): first.setdefault(l, step)
        h = [v - 0.1 * u for v, u in zip(h, g)]
    net = PCNetwork([identity] * depth, (2,), [Skip(*k) for k in skips])
    assert wave(net) == tuple(first[l] for l in range(depth - 1))


# any network, any algorithm
ALGORITHMS = {
    "gradient descent": GradientDescent(5), "gradient descent to a residual": GradientDescent(40, tolerance=0.3), "sweep": Sweep(2), "error descent": ErrorDescent(3),
    "Gauss-Newton": GaussNewton(1, 2), "Gauss-Newton to a residual": GaussNewton(9, 1, tolerance=0.05),
    "exact": GaussNewton(1, 2, exact=True), "LBFGS": LBFGS(2), "LBFGS to a residual": LBFGS(9, tolerance=0.05)}
every = pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=list(ALGORITHMS))


@pytest.fixture(scope="module")
def small():
    net = random_network(3, 4, jnp.tanh, np.random.default_rng(0), np.float32(1.5))
    return net, ForwardEnergy(), jax.random.normal(jax.random.key(1), (3, 5)), jax.nn.one_hot(jnp.arange(3), 4)


@every
def test_examples_do_not_touch_each_other(algorithm, small):
    net, energy, x, y = small
    got = run_batch(net, energy, algorithm, x, y)
    # one neighbour is far harder, the other is not a number
    other = run_batch(net, energy, algorithm, x.at[1].mul(30.0).at[2].set(jnp.nan), y)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(other)): np.testing.assert_allclose(a[0], b[0], rtol=1e-5, atol=1e-6)
    assert np.isnan(other.energy[2]).any() and not np.allclose(got.energy[1], other.energy[1])
    order = jnp.array([2, 0, 1])
    turned = run_batch(net, energy, algorithm, x[order], y[order])
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(turned)): np.testing.assert_allclose(a[order], b, rtol=1e-5, atol=1e-6)
    assert {str(v.dtype) for v in jax.tree.leaves(got)} == {"float32"}


@every
def test_target_already_met(algorithm, small):
    "Where the output equals its target there is nothing to infer: zero residual over zero is 0, and nothing moves."
    net, energy, x, _ = small
    got = run_batch(net, energy, algorithm, x, jax.vmap(net)(x))
    assert all(np.isfinite(v).all() for v in jax.tree.leaves(got))
    assert float(got.energy.max()) < 1e-10
    for a, b in zip(got.states.hidden, got.ref.hidden): np.testing.assert_allclose(a, b, atol=1e-5)


@every
def test_single_precision_stays_single_with_double_enabled(algorithm, small):
    net, energy, x, y = small
    with jax.enable_x64(True):
        got = eqx.filter_eval_shape(infer, net, energy, algorithm, x[0], y[0])
    assert {str(v.dtype) for v in jax.tree.leaves(got[:-1])} == {"float32"}


def test_jit_is_no_jit(small):
    _, energy, x, y = small
    net, algorithm = random_network(2, 4, jnp.tanh, np.random.default_rng(0), np.float32(1.5)), Sweep(1)
    for a, b in zip(jax.tree.leaves(infer(net, energy, algorithm, x[0], y[0])), jax.tree.leaves(run(net, energy, algorithm, x[0], y[0])), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


MAKE = {"gradient descent": lambda n: GradientDescent(n), "no wave": lambda n: GradientDescent(n, wavefront=False), "sweep": lambda n: Sweep(n, 0.05),
        "error descent": lambda n: ErrorDescent(n, optax.sgd(0.02)), "Gauss-Newton": lambda n: GaussNewton(n, 1),
        "exact": lambda n: GaussNewton(n, 1, exact=True), "LBFGS": lambda n: LBFGS(n)}


@pytest.mark.parametrize("make", MAKE.values(), ids=list(MAKE))
def test_no_steps_and_more_steps(make, small):
    net, energy, x, y = small
    nothing, *more = eqx.filter_jit(lambda net, x, y: [infer(net, energy, make(n), x, y) for n in (0, 1, 2)])(net, x[0], y[0])
    for a, b in zip(nothing.states.hidden, nothing.ref.hidden, strict=True): np.testing.assert_array_equal(a, b)
    for e in nothing.states.eps: np.testing.assert_allclose(e, 0 * e, atol=1e-6)
    np.testing.assert_allclose(nothing.energy, nothing.initial_energy, rtol=1e-5, atol=1e-10)
    np.testing.assert_array_equal(nothing.initial_energy[:-1], 0)
    np.testing.assert_allclose(nothing.relative_residual, 1, rtol=1e-5)
    assert nothing.passes == 0
    assert 0 < more[0].passes < more[1].passes
    assert more[0].energy.sum() < nothing.energy.sum()
    assert more[1].energy.sum() <= more[0].energy.sum() * (1 + 1e-5)


@pytest.mark.parametrize("algorithm, passes", [
    (GaussNewton(2, 2), 12), (GaussNewton(1, 1), 4), (GaussNewton(1, 2, exact=True), 7), (GaussNewton(2, 1, tolerance=1e-9), 14), (Sweep(2, 0.1), 6), (ErrorDescent(3), 6), (LBFGS(3), 8),
    (GradientDescent(6), 11), (GradientDescent(6, wavefront=False), 12), (GradientDescent(6, tolerance=1e-9), 15)], ids=str)
def test_passes_are_counted(algorithm, passes, small):
    """By hand, on three layers, where no step is shortened. Gauss-Newton: one to linearise, two for each iteration, one to try the step, and two for each test of a residual, at the start and after each step.
    Descent on states: two a step, one in the first, when the error is in the last of three layers only, and four for its tests. LBFGS: the gradient at the start and the first length, then two a step and one for the last."""
    net, _, x, y = small
    np.testing.assert_allclose(run_batch(net, ForwardEnergy(output_precision=0.01), algorithm, x, y).passes, np.full(3, passes))


def test_wave_saves_passes_and_nothing_else(small):
    net, energy, x, y = small
    with_wave, without = (run_batch(net, energy, GradientDescent(6, optax.sgd(0.05, 0.9), wavefront=w), x, y) for w in (True, False))
    for a, b in zip(with_wave.states.hidden, without.states.hidden): np.testing.assert_allclose(a, b, atol=1e-5)
    assert (with_wave.passes < without.passes).all() and (without.passes == 12).all()


@pytest.mark.parametrize("algorithm", [GradientDescent(5000, optax.sgd(0.1), tolerance=1e-2), GaussNewton(200, 1, tolerance=1e-2), LBFGS(200, tolerance=1e-2)], ids=["descent", "Gauss-Newton", "LBFGS"])
def test_tolerance_is_reached_and_not_overdone(algorithm, x64):
    o = Oracle(seed=7, sizes=(3, 4, 4, 3), skips=(), gain=1.3)
    net, energy, x, y = o.problem()
    got = run(net, energy, algorithm, x, y)
    h = [np.asarray(v) for v in got.states.hidden]
    assert o.residual(h) <= 1e-2 * o.residual(o.rest())
    loose = run(net, energy, eqx.tree_at(lambda a: a.tolerance, algorithm, 0.3), x, y)
    assert loose.passes < got.passes and 1e-2 < loose.relative_residual <= 0.3


@every
def test_one_layer_has_nothing_to_infer(algorithm):
    net = mlp((3,), 4, depth=1, key=jax.random.key(0))
    x, y = jnp.ones(3), jax.nn.one_hot(1, 4)
    got = run(net, ForwardEnergy(output_precision=2.0), algorithm, x, y)
    np.testing.assert_allclose(got.energy, [np.sum((np.asarray(net(x)) - np.asarray(y)) ** 2)], rtol=1e-6)  # 2 x 1/2
    assert got.states.hidden == [] and got.residual == 0 and got.relative_residual == 0


@pytest.mark.parametrize("make", [
    lambda: GradientDescent(-1), lambda: GradientDescent(tolerance=-1.0), lambda: GradientDescent(tolerance=float("nan")), lambda: Sweep(-1), lambda: Sweep(rate=-1.0),
    lambda: ErrorDescent(-1), lambda: GaussNewton(-1), lambda: GaussNewton(1, -1), lambda: GaussNewton(tolerance=-0.1), lambda: GaussNewton(backtracks=-1), lambda: GaussNewton(rounding=-1.0),
    lambda: LBFGS(-1), lambda: LBFGS(tolerance=-0.1), lambda: LBFGS(backtracks=-1),
    lambda: GradientDescent(2.5), lambda: Sweep(1.5), lambda: ErrorDescent(2.0), lambda: GaussNewton(1.5), lambda: GaussNewton(1, 2.0), lambda: LBFGS(memory=2.5)])
def test_negative_settings_and_parts_of_a_step_are_refused(make):
    with pytest.raises(InputError, match="expected a (whole )?number >= 0"): make()


@pytest.mark.parametrize("precision", [(1.0, 0.0), np.array([1.0, 0.0], np.float32), jnp.zeros(()), np.int64(0)])
@pytest.mark.parametrize("algorithm", [GaussNewton(1, 1), LBFGS(1)], ids=["Gauss-Newton", "LBFGS"])
def test_a_precision_of_zero_is_refused_where_it_is_divided_by(algorithm, precision, small):
    net, _, x, y = small
    with pytest.raises(InputError, match="need precisions > 0; got 0"): infer(net, ForwardEnergy(precision=precision), algorithm, x[0], y[0])  # a traced one cannot be looked at


def test_what_does_not_go_together_is_refused(small):
    net, _, x, y = small
    call = lambda energy, algorithm: infer(net, energy, algorithm, x[0], y[0])
    for algorithm in (GaussNewton(), LBFGS()):
        with pytest.raises(InputError, match="precisions > 0"): call(ForwardEnergy(precision=(1.0, 0.0)), algorithm)
    with pytest.raises(InputError, match="memory is 0; expected at least 1"): LBFGS(memory=0)
    with pytest.raises(InputError, match="wavefront=False"): call(BidirectionalEnergy(difference=False), GradientDescent())
    with pytest.raises(InputError, match="jax.vmap"): infer(net, ForwardEnergy(), Sweep(), x, y)
