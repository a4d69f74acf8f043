"""Diagnoses: each field against its definition in NumPy, and what cannot be drawn or read is refused."""
import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pcnb.diagnostics import LAYER_QUANTITIES, Recorder, diagnose, layer_figures, read_records, run_figures, sensitivity
from pcnb.energy import ForwardEnergy
from pcnb.inference import GaussNewton, GradientDescent
from pcnb.learning import Backprop, IncrementalPC, PredictiveCoding, layer_cosines
from pcnb.models import Dense, identity, mlp
from pcnb.network import InputError, PCNetwork

NET = mlp((5,), 3, 6, 4, key=jax.random.key(0))
X, Y = jax.random.normal(jax.random.key(1), (7, 5)), jax.nn.one_hot(jnp.arange(7) % 3, 3)
RULE = PredictiveCoding(ForwardEnergy(precision=(1.0, 2.0, 0.5), output_precision=3.0), GaussNewton(2, 2))


def test_every_field_is_what_it_is_called():
    got, found = diagnose(NET, RULE, X, Y), eqx.filter_jit(RULE.infer)(NET, X, Y)
    norm = lambda vs: [np.linalg.norm(np.asarray(v), axis=1).mean() for v in vs]
    np.testing.assert_allclose(got.error_norm, norm(found.states.eps), rtol=1e-4)
    np.testing.assert_allclose(got.state_change, norm([a - b for a, b in zip(found.states.hidden, found.ref.hidden)]), rtol=1e-4)
    np.testing.assert_allclose(got.energy, np.asarray(found.energy).mean(0), rtol=1e-4)
    np.testing.assert_allclose(got.energy_ratio, np.asarray(found.energy).sum() / np.asarray(found.initial_energy).sum(), rtol=1e-5)
    np.testing.assert_allclose(got.relative_residual, np.asarray(found.relative_residual).mean(), rtol=1e-3)
    np.testing.assert_allclose(got.passes, np.asarray(found.passes).mean(), rtol=1e-6)
    gradient, twin = RULE.gradient(NET, X, Y)[0], Backprop().gradient(NET, X, Y)[0]
    np.testing.assert_allclose(got.gradient_norm, [np.sqrt(sum((np.asarray(p) ** 2).sum() for p in jax.tree.leaves(f))) for f in gradient.layers], rtol=1e-4)
    np.testing.assert_allclose(got.cosine, layer_cosines(gradient, twin), rtol=1e-5)


def test_incremental_predictive_coding_is_diagnosed_by_its_own_inference():
    energy, descent = ForwardEnergy(output_precision=2.0), GradientDescent(3, optax.sgd(0.2))
    got, want = (diagnose(NET, rule, X, Y) for rule in (IncrementalPC(energy, descent), PredictiveCoding(energy, GradientDescent(3, optax.sgd(0.2), wavefront=False))))
    for a, b in zip(got, want): np.testing.assert_allclose(a, b, rtol=1e-5)
    assert got.state_change[0] > 0


def test_sensitivity_is_the_mean_eigenvalue_for_outputs_of_another_size_than_the_states():
    rng = np.random.default_rng(0)
    W = [rng.normal(size=s).astype(np.float32) for s in ((6, 4), (5, 6), (3, 5))]
    layers = [eqx.tree_at(lambda f: f.weight, Dense(w.shape[1], w.shape[0], identity, key=jax.random.key(0)), jnp.asarray(w)) for w in W]
    exact = np.trace(W[2] @ W[1] @ (W[2] @ W[1]).T + W[2] @ W[2].T) / 3
    np.testing.assert_allclose(sensitivity(PCNetwork(layers, (4,)), jnp.ones((20_000, 4)), key=jax.random.key(1)), exact, rtol=0.03)


def test_small_gradients_have_cosines_and_norms():
    "Entries whose squares float32 does not hold."
    tiny = jax.tree.map(lambda p: 1e-30 * p if eqx.is_inexact_array(p) else p, NET)
    np.testing.assert_allclose(layer_cosines(tiny, tiny), np.ones(4), rtol=1e-5)
    np.testing.assert_allclose(layer_cosines(tiny, jax.tree.map(lambda p: -p if eqx.is_inexact_array(p) else p, NET)), -np.ones(4), rtol=1e-5)


def test_a_cut_line_is_left_out_only_if_asked(tmp_path):
    path = tmp_path / "layers.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_records(path, partial=True) == [{"step": 1}, {"step": 2}]
    with pytest.raises(InputError, match="layers.jsonl is damaged"): read_records(path)
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(InputError, match="layers.jsonl is damaged"): read_records(path, partial=True)
    path.write_text(json.dumps({"step": 1}) + "\n" + json.dumps({"step": 4}) + "\n")
    assert Recorder(RULE, X, Y, 2, path, done=3).records == [{"step": 1}] and read_records(path) == [{"step": 1}]


def test_what_has_no_diagnosis_is_not_drawn():
    line = {"epoch": 1, "test_top1": 0.5, "train_top1": 0.5}
    for draw in (run_figures, layer_figures):
        with pytest.raises(InputError, match="train with diagnose_examples above 0"): draw([line])
        with pytest.raises(InputError, match="there are no records to draw"): draw([])


def test_an_energy_that_overflowed_is_drawn(tmp_path):
    "With what is finite beside it."
    record = {"step": 1} | {name: [1.0, 2.0] for name in LAYER_QUANTITIES}
    for energy in ([np.inf, 1.0], [np.inf, np.inf], [np.nan, 1.0]):
        for name, figure in layer_figures([record, record | {"step": 2, "energy": energy}]).items(): figure.savefig(tmp_path / f"{name}.png")
    figure.savefig(tmp_path / "again.png")
    assert (tmp_path / "again.png").stat().st_size > 1000
