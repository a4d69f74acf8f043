"""Recipes: what a setting builds, against Optax's formulas and the augmentations themselves; image networks from the command line to the folder."""
import json
from dataclasses import replace
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pcnb.recipes
from pcnb.augmentation import Affine, AlternatingFlip, Batch, Crop, CutMix, Cutout, Flip, Mixup, Shift, augment_batch
from pcnb.cli import main
from pcnb.data import Dataset, load
from pcnb.diagnostics import diagnose, read_records
from pcnb.energy import Anchor
from pcnb.inference import LBFGS, GaussNewton, Sweep
from pcnb.learning import Backprop
from pcnb.models import AvgPool, BatchNormConv, Dense, MaxPool, mlp
from pcnb.network import InputError, PCNetwork, statistics
from pcnb.recipes import RECIPES, AdamSetting, AugmentSetting, CNNSetting, EnergySetting, ErrorDescentSetting, GaussNewtonSetting, GradientDescentSetting, ImageNetworkSetting, LBFGSSetting, MLPSetting, MuonSetting, Recipe, SGDSetting, SweepSetting, build_rule, evaluate_run, from_json, load_run, read_run, report_figure, to_json, train
from pcnb.skip import Scaled
from pcnb.training import Mirrored, average_weights, averaged, load_checkpoint

SINCE = ("mnist-best", "mnist-validation")  # made with the options of today
RESULTS = [p for p in sorted((Path(__file__).parent.parent / "results").glob("mnist-*/*/config.json")) if p.parts[-3] not in SINCE]


def pictures(n=32, side=8, classes=10, name="cifar10"):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (n, side, side, 3), np.uint8), np.arange(n) % classes
    return Dataset(name, images, labels, images[:10], labels[:10], tuple(map(str, range(classes))))


DATA = pictures()
BATCH = Batch(jnp.asarray(DATA.train_images), jnp.eye(10)[DATA.train_labels], jnp.arange(32), jnp.int32(1))


def same(a, b):
    for key in jax.random.split(jax.random.key(3), 3):
        a_, b_ = augment_batch(a, BATCH, key=key), augment_batch(b, BATCH, key=key)
        for u, v in zip(a_, b_, strict=True): np.testing.assert_array_equal(u, v)


@pytest.mark.parametrize("setting, change", [
    (AugmentSetting(), None), (AugmentSetting(pixels=2), Shift(2)), (AugmentSetting(pixels=1, degrees=10.0), Affine(1, 10.0, 0.0)),
    (AugmentSetting(flip="random"), Flip()), (AugmentSetting(flip="alternating"), AlternatingFlip()), (AugmentSetting(crop=3), Crop(3)),
    (AugmentSetting(mixup=0.3), Mixup(0.3)), (AugmentSetting(cutmix=1.0), CutMix(1.0)),
])
def test_one_augmentation_draws_as_it_does_alone(setting, change):
    "So that the recipes recorded before there were several keep their numbers."
    same(setting.build(DATA), change)


def test_several_augmentations_come_in_order_each_with_its_own_key():
    built = AugmentSetting("random", crop=2, cutout=3, mixup=0.2).build(DATA)
    assert [type(c) for c in built.changes] == [Flip, Crop, Cutout, Mixup]
    grey = np.asarray(DATA.train_images).reshape(-1, 3).mean(0)
    np.testing.assert_allclose(built.changes[2].fill, grey, rtol=1e-5)
    def by_hand(batch, key):
        for i, change in enumerate((Flip(), Crop(2), Cutout(3, built.changes[2].fill), Mixup(0.2))): batch = augment_batch(change, batch, key=jax.random.fold_in(key, i))
        return batch
    got, want = augment_batch(built, BATCH, key=jax.random.key(1)), by_hand(BATCH, jax.random.key(1))
    for u, v in zip(got, want, strict=True): np.testing.assert_array_equal(u, v)


@pytest.mark.parametrize("setting, said", [
    (AugmentSetting(crop=1, pixels=1), "leave one at 0"), (AugmentSetting(mixup=0.1, cutmix=0.1), "leave one at 0"), (AugmentSetting("sideways"), "flip 'sideways' is unknown"),
    (AugmentSetting(crop=-1), "-1"), (AugmentSetting(cutout=-1), "-1"), (AugmentSetting(mixup=-0.5), "-0.5"),
])
def test_augmentations_that_will_not_do(setting, said):
    with pytest.raises(InputError) as error: setting.build(DATA)
    assert said in str(error.value)


@pytest.mark.parametrize("path", RESULTS, ids=lambda p: "/".join(p.parts[-3:-1]))
def test_recorded_settings_still_mean_what_they_meant(path):
    "What has become an option since then is off: one augmentation at most, decay of every array, no smoothing."
    recipe = from_json(json.loads(path.read_text())["settings"])
    assert recipe.label_smoothing == 0 and recipe.optimiser.decay_all and not getattr(recipe.optimiser, "nesterov", False)
    assert isinstance(recipe.augment.build(DATA), (Shift, Affine, type(None)))


# one step with a gradient of 1 and weights of 2, at the second step of two, where the rate is known
PARAMS = {"weight": jnp.full((2, 3), 2.0), "bias": jnp.full(3, 2.0)}


def steps(setting, n):
    "The last of `n` updates, all with gradient 1, the rate held at its peak."
    optimiser = replace(setting, warmup=0.0).build(10**6)  # a cosine over so many steps stays at its peak
    state, ones = optimiser.init(PARAMS), jax.tree.map(jnp.ones_like, PARAMS)
    for _ in range(n): updates, state = optimiser.update(ones, state, PARAMS)
    return updates


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("everything", [False, True])
def test_sgd_is_its_formula(nesterov, everything):
    rate, m, decay = 0.1, 0.5, 0.25
    v = 1 + m + m**2  # momentum after three gradients of 1
    step = 1 + m * v if nesterov else v
    got = steps(SGDSetting(rate, m, nesterov, weight_decay=decay, decay_all=everything), 3)
    np.testing.assert_allclose(got["weight"], np.full((2, 3), -rate * (step + decay * 2)), rtol=1e-5)
    np.testing.assert_allclose(got["bias"], np.full(3, -rate * (step + (decay * 2 if everything else 0))), rtol=1e-5)


@pytest.mark.parametrize("setting", [SGDSetting(0.4, 0.0), AdamSetting(0.4), MuonSetting(0.4)], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("warmup", [0.0, 0.25])
def test_the_rate_rises_in_a_line_and_falls_as_a_cosine(setting, warmup):
    "Against steps at the peak: 0 at the first of 40, all of them at the end of the warm-up, one hundredth at the end."
    ones, first = jax.tree.map(jnp.ones_like, PARAMS), round(40 * warmup)

    def taken(optimiser):
        state, update = optimiser.init(PARAMS), jax.jit(optimiser.update)
        for _ in range(41):
            updates, state = update(ones, state, PARAMS)
            yield updates
    for t, (got, peak) in enumerate(zip(taken(replace(setting, warmup=warmup).build(40)), taken(replace(setting, warmup=0.0).build(10**6)))):
        share = t / first if t < first else 0.01 + 0.99 * (1 + np.cos(np.pi * (t - first) / (40 - first))) / 2
        for name in PARAMS: np.testing.assert_allclose(got[name], share * peak[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("change", [dict(warmup=1.0), dict(warmup=-0.1), dict(rate=-0.1), dict(weight_decay=-1.0)], ids=str)
def test_a_schedule_that_cannot_be(change):
    (name, value), = change.items()
    for setting in (SGDSetting(), AdamSetting(), MuonSetting()):
        with pytest.raises(InputError, match=f"{name}\\D* {value}"): replace(setting, **change).build(10)


@pytest.mark.parametrize("everything", [False, True])
def test_adam_decays_what_it_should(everything):
    "With equal gradients Adam's step is the rate."
    got = steps(AdamSetting(0.1, weight_decay=0.25, decay_all=everything), 3)
    np.testing.assert_allclose(got["weight"], np.full((2, 3), -0.1 * (1 + 0.5)), rtol=1e-5)
    np.testing.assert_allclose(got["bias"], np.full(3, -0.1 * (1 + (0.5 if everything else 0))), rtol=1e-5)


@pytest.mark.parametrize("shape", [(6, 4), (3, 3, 4, 5), (2, 2, 3, 40)])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_muon_steps_are_orthogonal(shape, size):
    "Whatever the gradient's size, all singular values of a step are 0.2 rate sqrt(longer side), within what five Newton-Schulz iterations leave (0.7 to 1.2), and its vectors are the gradient's."
    rng = np.random.default_rng(0)
    fold = lambda v: np.asarray(v, np.float64).reshape(-1, shape[-1])
    params, gradient = ({"w": jnp.asarray(rng.normal(size=shape) * c, jnp.float32)} for c in (1, size))
    optimiser = MuonSetting(0.1, warmup=0.0).build(10**6)
    step = fold(optimiser.update(gradient, optimiser.init(params), params)[0]["w"])
    u, s, vt = np.linalg.svd(fold(gradient["w"]), full_matrices=False)
    unit = 0.1 * 0.2 * np.sqrt(max(step.shape))
    singular = np.diag(u.T @ step @ vt.T)
    np.testing.assert_allclose(u @ np.diag(singular) @ vt, step, atol=0.02 * unit)
    assert (singular < -0.6 * unit).all() and (singular > -1.3 * unit).all()


@pytest.mark.parametrize("setting", [SGDSetting(0.1, 0.0), SGDSetting(0.1, 0.0, lalr=True)], ids=["SGD", "LALR"])
def test_a_layers_gradient_is_shortened_to_its_limit(setting):
    "Ones of norm sqrt(6) and sqrt(3) become a norm of 2, or stay; LALR afterwards makes either a norm of 1."
    first, limit = steps(replace(setting, clip=2.0), 1), 1.0 if setting.lalr else 2.0
    np.testing.assert_allclose(first["weight"], np.full((2, 3), -0.1 * limit / 6 ** 0.5), rtol=1e-5)
    np.testing.assert_allclose(first["bias"], np.full(3, -0.1 * (3 ** -0.5 if setting.lalr else 1)), rtol=1e-5)
    for clip in (-1.0, float("inf"), float("nan")):
        with pytest.raises(InputError, match=f"clip is {clip}; expected a finite number"): replace(setting, clip=clip).build(10)


def test_lalr_before_muon_weighs_batches_and_nothing_else():
    "An orthogonal step does not see a layer's size: equal gradients give the same steps with LALR, of two that differ the momentum becomes another mean."
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(6, 4)), jnp.float32)}
    first, second = (jnp.asarray(rng.normal(size=(6, 4)) * size, jnp.float32) for size in (1.0, 30.0))

    def last(gradients, **change):
        optimiser = MuonSetting(0.1, warmup=0.0, **change).build(10**6)
        state = optimiser.init(params)
        for g in gradients: update, state = optimiser.update({"w": g}, state, params)
        return update["w"]
    size = abs(last([first])).max()
    np.testing.assert_allclose(last([first, first]), last([first, first], lalr=True), atol=1e-3 * size)
    assert abs(last([first, second]) - last([first, second], lalr=True)).max() > 0.02 * size


def test_a_layer_of_two_arrays_is_shortened_as_one():
    "Weights of norm 6 and a bias of norm 8 are a gradient of norm 10."
    optimiser = SGDSetting(1.0, 0.0, warmup=0.0, clip=1.5).build(10**6)
    params = [{"weight": jnp.zeros((2, 2)), "bias": jnp.zeros(2)}]
    got = optimiser.update([{"weight": jnp.full((2, 2), 3.0), "bias": jnp.array([8.0, 0.0])}], optimiser.init(params), params)[0][0]
    np.testing.assert_allclose(got["weight"], np.full((2, 2), -0.45), rtol=1e-5)
    np.testing.assert_allclose(got["bias"], [-1.2, 0], rtol=1e-5)


def test_settings_build_what_they_say():
    assert LBFGSSetting(5, 3).build() == LBFGS(5, 3) and SweepSetting(2, 0.4).build() == Sweep(2, 0.4) and GaussNewtonSetting(3, 4).build() == GaussNewton(3, 4)
    for setting in (GradientDescentSetting(2, 0.2, 0.5), ErrorDescentSetting(2, 0.2, 0.5)):
        algorithm = setting.build()
        state = algorithm.stepper.init(jnp.zeros(()))
        first, state = algorithm.stepper.update(jnp.ones(()), state)
        assert algorithm.steps == 2 and first == pytest.approx(-0.2) and algorithm.stepper.update(jnp.ones(()), state)[0] == pytest.approx(-0.3)
    build = lambda **choices: MLPSetting(8, 4, **choices).build((3,), 5, jax.random.key(0))
    deep = build(skips=True, mupc=True)
    assert all(isinstance(f, Scaled) for f in deep.layers) and [(s.src, s.dst) for s in deep.skips] == [(1, 2), (2, 3)]
    plain, loud = build(), build(gain=2.0)
    for l in range(4): np.testing.assert_allclose(loud.layers[l].weight, plain.layers[l].weight * (2 if l < 3 else 1), rtol=1e-6)
    assert not plain.skips and build(activation="relu").layers[1].activation is jax.nn.relu
    pools = lambda setting: {type(p) for p in jax.tree.leaves(setting.build((32, 32, 3), 5, jax.random.key(0)), is_leaf=lambda p: isinstance(p, (AvgPool, MaxPool))) if isinstance(p, (AvgPool, MaxPool))}
    for setting in (ImageNetworkSetting("vgg5", (8,)), ImageNetworkSetting("resnet9", (8,))):
        assert pools(setting) == {MaxPool} and pools(replace(setting, pool="average")) == {AvgPool}


def test_the_mean_of_weights_leaves_statistics_alone():
    "They are measured, of the batches that the network saw."
    net = PCNetwork([BatchNormConv(2, 4, key=jax.random.key(0)), Dense(4 * 16, 3, key=jax.random.key(1))], (4, 4, 2))
    optimiser = optax.chain(optax.sgd(0.1), average_weights(0.5))
    state, x, y = optimiser.init(eqx.filter(net, eqx.is_inexact_array)), jax.random.normal(jax.random.key(2), (5, 4, 4, 2)), jax.nn.one_hot(jnp.arange(5) % 3, 3)
    for k in range(2): net, state, _ = eqx.filter_jit(Backprop().update)(net, optimiser, state, (k + 1) * x, y)
    mean = averaged(net, state)
    assert eqx.tree_equal(statistics(mean), statistics(net)) and not eqx.tree_equal(mean.layers[0].conv.weight, net.layers[0].conv.weight)


def test_each_seed_has_its_own_alternating_flips():
    images = jnp.arange(64.0)[:, None, None, None] + jnp.arange(2.0).reshape(1, 1, 2, 1)
    turned = lambda seed: AugmentSetting("alternating").build(DATA, seed)(Batch(images, jnp.zeros((64, 2)), jnp.arange(64), jnp.array(0)), key=None).images[:, 0, 0, 0] > images[:, 0, 0, 0]
    assert (turned(0) != turned(1)).any() and 16 < turned(1).sum() < 48


def test_muon_decays_matrices_and_leaves_vectors_to_adam():
    step = lambda decay: steps(MuonSetting(0.1, weight_decay=decay), 3)
    np.testing.assert_allclose(step(0.25)["weight"] - step(0.0)["weight"], np.full((2, 3), -0.1 * 0.25 * 2), rtol=1e-5)
    np.testing.assert_allclose(steps(MuonSetting(0.1, weight_decay=0.25), 100)["bias"], np.full(3, -0.1), rtol=1e-2)  # equal gradients: the rate, after Adam's start-up
    with pytest.raises(InputError, match="momentum is 1"): MuonSetting(momentum=1.0).build(10)


def test_a_run_by_muon_on_whitened_patches_is_recorded_and_scored_again(tmp_path, monkeypatch):
    "A network with every kind of array trains by Muon, is recorded, and scores from its weights what it scored."
    data = pictures(side=32)
    monkeypatch.setattr(pcnb.recipes, "load", lambda name, folder, stream=False: data)
    recipe = replace(RECIPES["cifar10-cpu"], network=ImageNetworkSetting(width=(4, 4), norm="batch", whiten=True), inference=GaussNewtonSetting(1, 1), optimiser=MuonSetting(), epochs=2, batch_size=32)
    whole = train("cifar10-cpu", recipe, tmp_path / "whole", progress=False)
    assert from_json(json.loads((tmp_path / "whole/config.json").read_text())["settings"]) == recipe
    score = pcnb.evaluate_run(tmp_path / "whole")
    net, scale, data, _ = pcnb.load_run(tmp_path / "whole")
    assert np.mean(jax.vmap(lambda image: net(scale(image)))(data.test_images).argmax(1) == data.test_labels) == pytest.approx(score.top1)
    assert score.top1 == whole["test_top1"]
    net = recipe.network.build((32, 32, 32), 10, jax.random.key(0))
    assert net.depth == 5 and net.shapes[1] == (16, 16, 4)  # no layer before the first block


def test_the_whitening_of_a_run_is_kept(tmp_path, monkeypatch):
    "Eigenvectors have signs of the machine's choice: elsewhere a network is scored, and goes on, with those that it was trained with."
    data, eigh, epoch = pictures(side=32), np.linalg.eigh, pcnb.training._epoch
    monkeypatch.setattr(pcnb.recipes, "load", lambda name, folder, stream=False: data)
    recipe = replace(RECIPES["cifar10-cpu"], network=ImageNetworkSetting(width=(4, 4), norm="batch", whiten=True), inference=GaussNewtonSetting(1, 1), epochs=2, batch_size=16)
    train("cifar10-cpu", recipe, tmp_path / "whole", progress=False)
    def stopped(*args):
        if "epoch 2/2" in [a for a in args if isinstance(a, str)]: raise KeyboardInterrupt
        return epoch(*args)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(pcnb.training, "_epoch", stopped)
        train("cifar10-cpu", recipe, tmp_path / "run", progress=False)
    monkeypatch.setattr(np.linalg, "eigh", lambda a: (lambda values, vectors: (values, -vectors))(*eigh(a)))
    train("cifar10-cpu", recipe, tmp_path / "run", resume=True, progress=False)
    (net, *_), (again, *_) = load_run(tmp_path / "whole"), load_run(tmp_path / "run")
    for a, b in zip(*(jax.tree.leaves(eqx.filter(n, eqx.is_array)) for n in (net, again)), strict=True): np.testing.assert_array_equal(a, b)  # a run by Muon, in bfloat16, that was stopped
    assert evaluate_run(tmp_path / "run").loss == pytest.approx(read_run(tmp_path / "whole")[1][-1]["test_loss"], rel=1e-5)
    (tmp_path / "run/scale.eqx").unlink()  # as an earlier version left it
    with pytest.warns(UserWarning, match="has no scale.eqx"): score = evaluate_run(tmp_path / "run")
    assert score.loss != pytest.approx(read_run(tmp_path / "whole")[1][-1]["test_loss"], rel=1e-3)


def test_the_mirrored_score_turns_the_picture_before_whitening(tmp_path, monkeypatch):
    "A picture and its mirror image then have one output; whitened patches that are turned are those of no picture."
    scored, score = [], pcnb.recipes.evaluate
    monkeypatch.setattr(pcnb.recipes, "load", lambda name, folder, stream=False: pictures(side=32))
    monkeypatch.setattr(pcnb.recipes, "evaluate", lambda net, *rest: (scored.append(net), score(net, *rest))[1])
    recipe = replace(RECIPES["cifar10-cpu"], network=ImageNetworkSetting(width=(4, 4), norm="layer", whiten=True), joint=False, inference=GaussNewtonSetting(1, 1), epochs=1, batch_size=32)
    train("cifar10-cpu", recipe, tmp_path / "run", "backprop", progress=False)
    (net,), image = scored, jnp.asarray(pictures(side=32).train_images[0])
    assert isinstance(net, Mirrored)
    np.testing.assert_allclose(net(image), net(image[:, ::-1]), rtol=1e-4, atol=1e-5)
    assert abs(net.net(image) - net.net(image[:, ::-1])).max() > 1e-3


@pytest.mark.parametrize("options, said", [
    ("--network.norm batches", "invalid choice 'batches' for argument '--network.norm'"), ("--network.model vgg6", "invalid choice 'vgg6'"),
    ("--network.width 8 8", "width has 2 values; expected one number or 4"), ("--network.width 0", "width of stage 0 is 0"),
    ("--network.width 12 --network.norm group", "divisor of the 12 channels"), ("--label-smoothing 1", "label_smoothing is 1.0"), ("--augment.mixup 1 --augment.cutmix 1", "leave one at 0"),
    ("--augment.flip up", "invalid choice 'up'"),
])
def test_bad_options_of_image_networks(options, said, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pcnb.recipes, "load", lambda name, folder, stream=False: pictures(side=32, name=name))
    with pytest.raises(SystemExit) as stop: main(["train", "cifar10-resnet9", "--out", str(tmp_path / "run"), "--batch-size", "32", "--network.width", "8", *options.split()])
    assert stop.value.code == 2 and said in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize("setting", [AdamSetting, SGDSetting, MuonSetting])
def test_course_of_the_rate(setting):
    "Of the first weight step's length: linear warm-up, then a line or a cosine to one hundredth."
    steps, warm = 50, 10
    for schedule, share in (("linear", lambda t: t), ("cosine", lambda t: (1 - np.cos(np.pi * t)) / 2)):
        rate = pcnb.recipes._schedule(setting(0.4, warmup=warm / steps, schedule=schedule), steps)
        after = [0.4 - (0.4 - 0.004) * share((i - warm) / (steps - warm)) for i in range(warm, steps + 1)]
        np.testing.assert_allclose([float(rate(i)) for i in range(steps + 1)], [0.04 * i for i in range(warm)] + after, rtol=1e-5)
    lengths = {}
    for schedule in ("cosine", "linear"):
        optimiser, w = setting(0.4, warmup=0.0, schedule=schedule).build(20), jnp.eye(3)
        state = optimiser.init(w)
        for _ in range(9): updates, state = optimiser.update(w, state, w)
        lengths[schedule] = float(jnp.abs(updates).max())
    t = 8 / 20  # of the ninth step
    if setting is not MuonSetting: assert lengths["linear"] / lengths["cosine"] == pytest.approx((1 - 0.99 * t) / (1 - 0.99 * (1 - np.cos(np.pi * t)) / 2), rel=1e-4)
    else: assert lengths["linear"] < lengths["cosine"]
    with pytest.raises(InputError, match="schedule 'line' is unknown; did you mean 'linear'"): setting(schedule="line").build(10)


def test_diagnosis_is_of_the_first_examples(tmp_path):
    "Those of the metrics, and those of the records, here of one and the same step."
    recipe = replace(RECIPES["digits"], network=MLPSetting(8, 3), epochs=1, batch_size=len(load("digits").train_images))
    sensitivities = {}
    for n in (3, 40):
        out = tmp_path / str(n)
        train("digits", replace(recipe, diagnose_examples=n), out, progress=False, record_every=1)
        net, scale, data, _ = load_run(out)
        found = diagnose(net, build_rule(recipe, "pc"), jax.vmap(scale)(jnp.asarray(data.train_images[:n])), jnp.eye(10)[data.train_labels[:n]])
        (line,) = read_run(out)[1]
        np.testing.assert_allclose(line["cosine"], found.cosine, rtol=1e-4)
        assert line["relative_residual"] == pytest.approx(float(found.relative_residual), rel=1e-3)
        np.testing.assert_allclose(read_records(out / "layers.jsonl")[-1]["cosine"], line["cosine"], rtol=1e-4)
        sensitivities[n] = line["sensitivity"]
        assert sensitivities[n] == pytest.approx(float(found.sensitivity), rel=1e-4)
    assert sensitivities[3] != pytest.approx(sensitivities[40], rel=1e-3)
    with pytest.raises(InputError, match="diagnose_examples is 0; expected at least 1"): train("digits", replace(recipe, diagnose_examples=0), tmp_path / "0", progress=False)
    assert not (tmp_path / "0").exists()


def test_statistics_are_of_plain_images(tmp_path, monkeypatch):
    "What is saved and scored once more has the mean and variance, in its first layer, of the first training images as they are."
    data = pictures(side=16)
    monkeypatch.setattr(pcnb.recipes, "load", lambda name, folder, stream=False: data)
    recipe = replace(RECIPES["cifar10-cpu"], network=ImageNetworkSetting("vgg5", (4,), norm="batch"), augment=AugmentSetting(mixup=1.0), epochs=1, batch_size=8, statistics_examples=16)
    summary = train("cifar10-cpu", recipe, tmp_path / "run", progress=False)
    net, scale, *_ = load_run(tmp_path / "run")
    z = np.asarray(jax.vmap(lambda image: net.layers[0].conv(scale(image)))(data.train_images[:16]), np.float64)
    np.testing.assert_allclose(statistics(net)[0].mean, z.mean((0, 1, 2)), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(statistics(net)[0].variance, z.var((0, 1, 2)), rtol=1e-3)
    assert evaluate_run(tmp_path / "run").loss == pytest.approx(read_run(tmp_path / "run")[1][-1]["test_loss"], rel=1e-5) and evaluate_run(tmp_path / "run").top1 == summary["test_top1"]
    for change, said in (({"statistics_examples": 7}, "statistics_examples is 7; expected at least 8"), ({"network": MLPSetting(4, 1), "joint": False}, "statistics_examples is 16, but this network keeps no statistics")):
        with pytest.raises(InputError, match=said): train("cifar10-cpu", replace(recipe, **change), tmp_path / "other", progress=False)
        assert not (tmp_path / "other").exists()


def test_smoothed_targets_reach_the_rule(tmp_path, monkeypatch):
    "With no steps, the loss of an epoch is what NumPy says of the network's outputs and the smoothed targets."
    data = pictures()
    monkeypatch.setattr(pcnb.recipes, "load", lambda name, folder, stream=False: data)
    recipe = replace(RECIPES["cifar10-cpu"], network=MLPSetting(4, 1), augment=AugmentSetting(), epochs=1, batch_size=32, optimiser=AdamSetting(0.0))
    train("cifar10-cpu", recipe, tmp_path / "run", "backprop", progress=False)
    levels = data.train_images.reshape(-1, 3) / 255
    x = (data.train_images / 255 - levels.mean(0)) / levels.std(0)
    out = np.asarray(jax.vmap(recipe.network.build((8, 8, 3), 10, jax.random.key(0)))(jnp.asarray(x, jnp.float32)), np.float64)
    y = 0.9 * np.eye(10)[data.train_labels] + 0.01
    want = np.mean(np.log(np.exp(out).sum(1)) - (y * out).sum(1))
    np.testing.assert_allclose(json.loads((tmp_path / "run" / "metrics.jsonl").read_text())["loss"], want, rtol=1e-4)


def test_skips_of_a_cnn_pass_blocks_of_two(getkey):
    key, channels = getkey(), (4, 4, 8, 8, 8)
    plain, skipped = (CNNSetting(channels, skips=s).build((16, 16, 3), 10, key) for s in (False, True))
    assert plain.shapes == skipped.shapes and plain.depth == 6
    assert [(s.src, s.dst) for s in skipped.skips] == [(1, 3), (3, 5)] and not jax.tree.leaves(skipped.skips)
    for l, (a, b) in enumerate(zip(plain.layers, skipped.layers), 1):  # the layer that a skip joins is scaled by 1/sqrt(depth / span)
        np.testing.assert_allclose(b.weight, a.weight * (1 / np.sqrt(3) if l in (3, 5) else 1), rtol=1e-6)
    x = jax.random.normal(getkey(), (16, 16, 3))
    states = skipped.feedforward(x).x
    carried = np.zeros(plain.shapes[3])
    carried[..., :4] = np.asarray(states[1])[::2, ::2]
    np.testing.assert_allclose(states[3], carried + skipped.layers[2](states[2]), rtol=1e-5, atol=1e-6)


def test_mirror_image_and_mean_weights_are_scored_as_numpy_says(tmp_path, monkeypatch):
    "A linear network on the mean of the weights after each of two steps; 2/3 of the last and 1/3 of the first for a decay of 1/2."
    data, seen = pictures(), []
    monkeypatch.setattr(pcnb.recipes, "load", lambda name, folder, stream=False: data)
    fit = pcnb.recipes.fit
    monkeypatch.setattr(pcnb.recipes, "fit", lambda *a, **kw: fit(*a, **kw | {"callback": lambda step, net: seen.append(np.asarray(net.layers[0].weight, np.float64))}))
    recipe = replace(RECIPES["cifar10-cpu"], network=MLPSetting(4, 1), augment=AugmentSetting("random"), epochs=2, batch_size=32, average=0.5, optimiser=AdamSetting(0.1, 0.0))
    summary = train("cifar10-cpu", recipe, tmp_path / "run", "backprop", progress=False)
    assert len(seen) == 2
    levels = data.train_images.reshape(-1, 3) / 255
    x = ((data.test_images / 255 - levels.mean(0)) / levels.std(0))
    weight = (seen[0] + 2 * seen[1]) / 3
    _, net = load_checkpoint(tmp_path / "run" / "weights.eqx", recipe.network.build((8, 8, 3), 10, jax.random.key(0)))
    np.testing.assert_allclose(net.layers[0].weight, weight, rtol=1e-4, atol=1e-6)
    bias, score = np.asarray(net.layers[0].bias), lambda x: x.reshape(len(x), -1) @ weight.T + np.asarray(net.layers[0].bias)
    assert summary["test_top1"] == pytest.approx((score(x).argmax(1) == data.test_labels).mean())
    assert summary["test_top1_flip"] == pytest.approx(((score(x) + score(x[:, :, ::-1])).argmax(1) == data.test_labels).mean())
    again = train("cifar10-cpu", recipe, tmp_path / "run", "backprop", resume=True, progress=False)  # nothing is left to do
    assert again["test_top1_flip"] == summary["test_top1_flip"] and (load_checkpoint(tmp_path / "run" / "weights.eqx", net)[1].layers[0].bias == bias).all()


@pytest.mark.parametrize("rule", ["pc", "backprop"])
def test_small_batches_make_the_step_of_a_large_one(rule, tmp_path, monkeypatch):
    "Four of 8 examples or one of 32, with a mean over the steps and a schedule that ends with the run; without augmentation, whose keys are the batches'."
    monkeypatch.setattr(pcnb.recipes, "load", lambda name, folder, stream=False: pictures(96))
    recipe = replace(RECIPES["cifar10-cpu"], network=MLPSetting(8, 3), augment=AugmentSetting(), inference=GaussNewtonSetting(1, 2), joint=False, epochs=2, batch_size=32, average=0.5, optimiser=AdamSetting(0.03))
    nets = []
    for accumulate in (1, 4):
        train("cifar10-cpu", replace(recipe, batch_size=32 // accumulate, accumulate=accumulate), tmp_path / str(accumulate), rule, progress=False)
        nets.append(load_checkpoint(tmp_path / str(accumulate) / "weights.eqx", recipe.network.build((8, 8, 3), 10, jax.random.key(0)))[1])
    fresh, *nets = (jax.tree.leaves(eqx.filter(net, eqx.is_array)) for net in (recipe.network.build((8, 8, 3), 10, jax.random.key(0)), *nets))
    for start, one, four in zip(fresh, *nets, strict=True):
        assert abs(one - start).max() > 0.01
        np.testing.assert_allclose(four, one, atol=1e-4)


@pytest.mark.parametrize("accumulate, rule, said", [(0, "pc", "accumulate is 0; expected 1 to 4"), (5, "backprop", "accumulate is 5; expected 1 to 4, the number of batches in an epoch"), (2, "ipc", "rule ipc steps the weights several times a batch; leave accumulate at 1")])
def test_accumulation_that_cannot_be(accumulate, rule, said, tmp_path, monkeypatch):
    monkeypatch.setattr(pcnb.recipes, "load", lambda name, folder, stream=False: pictures())
    recipe = replace(RECIPES["mnist-mlp"], network=MLPSetting(4, 2), inference=GradientDescentSetting(), batch_size=8, accumulate=accumulate)
    with pytest.raises(InputError, match=said): train("mnist-mlp", recipe, tmp_path / "run", rule, progress=False)
    assert not (tmp_path / "run").exists()


# a table of runs

def record(folder, rule="pc", seed=0, top1=0.9, epochs=2, device="cpu", **changed):
    "A finished run's folder, without training."
    recipe = replace(RECIPES["cifar10-vgg5"], **changed)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(dict(recipe="cifar10-vgg5", settings=to_json(recipe), rule=rule, seed=seed)))
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"epoch": e + 1, "loss": 1.0, "test_top1": top1 * (e + 1) / epochs, "cosine": [0.6 - seed / 10, 1.0], "relative_residual": 0.25}) + "\n" for e in range(epochs)))
    (folder / "summary.json").write_text(json.dumps(dict(test_top1=top1, test_top5=1.0, seconds_per_epoch=10.0 * (rule == "pc") + 5, energy_ratio=0.5, relative_residual=0.25, cosine_to_backprop={"mean": 0.75},
                                                         passes=6.0 * (rule == "pc"), device=device)))
    return folder


def test_report_puts_seeds_together_and_twins_beside(tmp_path, capsys):
    runs = [record(tmp_path / f"pc-{s}", seed=s, top1=t) for s, t in enumerate((0.90, 0.92, 0.94))]
    record(runs[0] / "twin", "backprop", 0, 0.95)
    twin = record(tmp_path / "bp-1", "backprop", 1, 0.97, device="TPU", energy=EnergySetting("cross-entropy", output_precision=1.0))  # of no account to a twin
    other = record(tmp_path / "other", seed=0, top1=0.8, label_smoothing=0.2)
    main(["report", *map(str, [*runs, twin, other, runs[0]]), "--figure", str(tmp_path / "curves.png")])
    head, _, first, second = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in capsys.readouterr().out.splitlines()]
    row = dict(zip(head, first))
    assert row == {"recipe": "cifar10-vgg5", "changed": "-", "rule": "pc", "inference": "GaussNewton 1 2", "seeds": "3", "top-1 (%)": "92.00 ± 2.00", "top-5 (%)": "100.00 ± 0.00",
                   "its twin, top-1 (%)": "96.00 ± 1.41", "twin, top-5 (%)": "100.00 ± 0.00", "cosine to backpropagation": "0.750 ± 0.000", "energy ratio": "0.500 ± 0.000", "relative residual": "0.250 ± 0.000",
                   "passes": "6.0 ± 0.0", "device": "cpu; twin TPU, cpu", "s/epoch": "15.0 ± 0.0", "twin, s/epoch": "5.0 ± 0.0"}
    assert dict(zip(head, second))["changed"] == "label_smoothing 0.2" and second[5:9] == ["80.00", "100.00", "-", "-"] and second[12:] == ["6.0", "cpu", "15.0", "-"]
    assert (tmp_path / "curves.png").stat().st_size > 1000
    main(["report", str(twin)])
    assert "| backprop | - | 1 | 97.00 | 100.00 | - | - | - | - | - | - | TPU | 5.0 | - |" in capsys.readouterr().out
    shown = [[line.get_ydata() for line in ax.lines] for ax in report_figure([*runs, twin]).axes]
    for got, want in zip(shown, ([[46, 92], [48, 96]], [[0.25, 0.25]], [[0.25, 0.25]]), strict=True): np.testing.assert_allclose(got, want, rtol=1e-6)
    assert len(report_figure([twin]).axes) == 1  # nothing of inference


def test_report_refuses(tmp_path, capsys):
    def refused(*argv):
        with pytest.raises(SystemExit) as stop: main(["report", *map(str, argv)])
        assert stop.value.code == 2
        return capsys.readouterr().err
    run = record(tmp_path / "run")
    assert "name at least one run" in refused()
    assert "has the seed 0 of another run" in refused(run, record(tmp_path / "copy"))
    assert "expected a name that ends in .png" in refused(run, "--figure", tmp_path / "curves.txt")
    assert "config.json does not exist; is" in refused(tmp_path / "none") and "a run's folder?" in refused(tmp_path / "none")
    (run / "summary.json").unlink()
    assert "summary.json does not exist" in refused(run)


@pytest.mark.parametrize("name, record", [("cifar10-equilibrium-all", "cifar10-equilibrium-all/p0.5-0"), ("cifar100-equilibrium", "beyond/cifar100/pc"), ("tiny-imagenet-equilibrium", "beyond/tiny-imagenet/p5"),
                                          ("cifar10-deep", "cifar10-deep/pc-0"), ("cifar100-gpu", "cifar100-gpu/pc-0")])
def test_a_recipe_is_what_was_recorded(name, record):
    "Under its own name or that of the recipe whose settings the run changed."
    recorded = from_json(read_run(Path(__file__).parent.parent / "results" / record)[0]["settings"])
    assert replace(recorded, dataset=RECIPES[name].dataset) == RECIPES[name] and recorded.dataset.removesuffix("_subset") == RECIPES[name].dataset


@pytest.mark.parametrize("rule, options, said", [("cpc", "", "leave out joint"), ("ipc", "inference:gradient-descent", "leave out joint")])
def test_joint_inference_is_for_rule_pc(rule, options, said, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pcnb.recipes, "load", lambda name, folder, stream=False: pictures(side=32, name=name))
    with pytest.raises(SystemExit) as stop: main(["train", "cifar10-cpu", "--out", str(tmp_path / "run"), "--rule", rule, "--batch-size", "32", *options.split()])
    assert stop.value.code == 2 and said in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_recipe_builds_what_it_says():
    rule = pcnb.recipes.build_rule(RECIPES["cifar10-cpu"], "pc")
    assert rule.joint and rule.inference.rounding == 2.0**-9  # its products are bfloat16
    assert not pcnb.recipes.build_rule(RECIPES["mnist-cnn"], "pc").joint and pcnb.recipes.build_rule(RECIPES["mnist-cnn"], "pc").inference.rounding is None


def test_a_pooling_that_a_network_does_not_have():
    for model in ("airnet", "resnet18", "wideresnet"):
        with pytest.raises(InputError, match=f"{model} has no choice of it"): ImageNetworkSetting(model, pool="average").build((32, 32, 3), 10, jax.random.key(0))
    for setting in (ImageNetworkSetting("vgg5", (8,), pool="middle"), ImageNetworkSetting("resnet9", pool="middle"), CNNSetting(pool="middle")):
        with pytest.raises(InputError, match="pool 'middle' is unknown"): setting.build((32, 32, 3), 10, jax.random.key(0))


def test_a_network_without_its_skips_is_its_layers_one_behind_the_other():
    for setting in (ImageNetworkSetting("resnet9", (8,), norm="batch"), ImageNetworkSetting("wideresnet", (16,)), ImageNetworkSetting("airnet", (8, 16, 16), whiten=True, convolutions=3)):
        in_shape = (32, 32, 12) if setting.whiten else (32, 32, 3)
        whole, plain = (replace(setting, skips=skips).build(in_shape, 10, jax.random.key(0)) for skips in (True, False))
        assert whole.skips and not plain.skips and eqx.tree_equal(whole.layers, plain.layers)
        x = h = jax.random.normal(jax.random.key(1), in_shape)
        for f in whole.layers: h = f(h)
        assert jnp.allclose(plain(x), h, rtol=1e-4, atol=1e-5) and not jnp.allclose(whole(x), h, rtol=1e-2, atol=1e-2)
    for model in ("vgg5", "airnet"):
        with pytest.raises(InputError, match=f"this {model} has none"): ImageNetworkSetting(model, skips=False).build((32, 32, 3), 10, jax.random.key(0))


def test_a_vgg_has_skips_where_a_setting_asks_for_them():
    build = lambda **choices: ImageNetworkSetting(**{"model": "vgg7", "width": (4,), "norm": "batch"} | choices).build((32, 32, 3), 10, jax.random.key(0))
    assert [[(s.src, s.dst) for s in build(skip_span=k).skips] for k in (0, 1, 2, 4)] == [[], [(l, l + 1) for l in range(1, 6)], [(1, 3), (3, 5)], [(1, 5)]]
    for model in ("airnet", "resnet9", "resnet18", "wideresnet"):
        with pytest.raises(InputError, match=f"skip_span is 1, but {model} has no choice"): build(model=model, width=(16,), skip_span=1)
    with pytest.raises(InputError, match="span is -1"): build(skip_span=-1)
    assert build(skip_span=5).skips
    with pytest.raises(InputError, match="no block of so many hidden layers; give at most 5"): build(skip_span=6)


def test_alpha_of_itself_and_what_an_alpha_of_zero_leaves_out():
    "auto is the energy's own default; where there is no backward term its kind does not count, whatever was the default when the run was recorded."
    net = mlp((3,), 4, 5, 6, key=jax.random.key(0))
    assert EnergySetting(output_precision=0.5, alpha="auto").build().alphas(net) == (0.5 / 36,) * 6
    assert isinstance(EnergySetting(alpha="auto").build().backward, Anchor)
    recorded = [from_json(to_json(Recipe("digits", MLPSetting(), energy=EnergySetting(alpha=alpha, backward=kind)))) for alpha in (0.0, 0.1) for kind in ("tied", "anchor")]
    assert recorded[0] == recorded[1] and recorded[2] != recorded[3]
