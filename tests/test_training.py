"""The loop: which images a step sees, exact resumption, checkpoints that survive a crash, scores against NumPy."""
import json
from dataclasses import replace
from collections import Counter
from collections.abc import Callable

import equinox as eqx
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given

import pcnb.training
from pcnb.augmentation import Affine, AlternatingFlip, Compose, Crop, CutMix, Cutout, Flip, Mixup, Shift
from pcnb.data import Dataset, Records, Scale
from pcnb.diagnostics import Recorder, read_records
from pcnb.energy import CrossEntropy, ForwardEnergy, SquaredError
from pcnb.inference import GaussNewton, GradientDescent
from pcnb.learning import AbstractRule, Backprop, PredictiveCoding, Report
from pcnb.models import BatchNorm, BatchNormConv, Chain, Dense, GlobalAverage, cnn, mlp
from pcnb.network import InputError, PCNetwork
from pcnb.training import Diverged, evaluate, fit, load_checkpoint, read_metrics, save_checkpoint

N, CLASSES = 22, 3
arrays = lambda tree: jax.tree.leaves(eqx.filter(tree, eqx.is_array))


@pytest.fixture(scope="module")
def data():
    "Image i is filled with i, and its label is i modulo 3: what a rule sees tells which examples it was given."
    image = lambda i: np.full((2, 2, 1), i, np.float32)
    images, labels = np.stack([image(i) for i in range(N)]), np.arange(N) % CLASSES
    return Dataset("tiny", images, labels, images[:7] + 0.5, labels[:7], ("a", "b", "c"))


class Tell(AbstractRule):
    "Changes no weight; hands on what it is given."
    tell: Callable = eqx.field(static=True)
    loss_value: float = 1.0

    def gradient(self, net, x, y): raise NotImplementedError

    def update(self, net, optimiser, state, x, y):
        jax.debug.callback(self.tell, x, y, ordered=True)
        out = jax.vmap(net)(x)
        return net, state, Report(out, jnp.float32(self.loss_value), jnp.float32(2.0))

    @property
    def energy(self): return ForwardEnergy()


class Fixed(eqx.Module):
    "A function as a layer, with a weight that it does not use: `fit` wants something to train."
    f: Callable = eqx.field(static=True)
    weight: jax.Array = eqx.field(default_factory=lambda: jnp.zeros(1))
    def __call__(self, x): return self.f(x)


def seen(data, epochs, batch_size=5, net=None, **settings):
    "(images, targets) of every step."
    got = []
    net = net or mlp((2, 2, 1), CLASSES, depth=1, key=jax.random.key(0))
    rule = Tell(lambda x, y: got.append((np.asarray(x), np.asarray(y))))
    run = fit(net, rule, optax.sgd(0.1), data, epochs, batch_size, **{"scale": lambda image: image, "progress": False, "diagnose_examples": 0} | settings)
    jax.effects_barrier()
    return got, run


class Disk:
    "A data source as TFDS has them, which notes what is read at once."
    def __init__(self, images): self.images, self.read = images, []
    def __len__(self): return len(self.images)
    def __getitem__(self, i): return {"image": self.images[i]}
    def __getitems__(self, rows):
        self.read.append(len(rows))
        return [{"image": self.images[i]} for i in rows]


def on_disk(data):
    parts = {f"{part}_images": Disk(getattr(data, f"{part}_images")) for part in ("train", "test")}
    return replace(data, **{name: Records(disk) for name, disk in parts.items()}), parts


def bytes_of(data): return replace(data, train_images=data.train_images.astype(np.uint8), test_images=data.test_images.astype(np.uint8))


@pytest.mark.parametrize("cut", [lambda d: d, lambda d: d.take(17), lambda d: d.validation(6, 3)])
def test_streamed_batches_are_the_same(data, cut):
    "Order, targets, held-out examples; and nothing but batches is ever read."
    data = bytes_of(data)
    streamed, disks = on_disk(data)
    (got, run), (want, other) = (seen(cut(d), 3, scale=lambda image: image.astype(jnp.float32)) for d in (streamed, data))
    assert len(got) == len(want) > 0
    for a, b in zip(got, want):
        for u, v in zip(a, b): np.testing.assert_array_equal(u, v)
    assert [m["test_top1"] for m in run.metrics] == [m["test_top1"] for m in other.metrics]
    assert max(disks["train_images"].read) <= 6  # a batch, or the held-out examples


def test_a_streamed_run_is_the_same_run(data, tmp_path):
    "With augmentation, diagnostics and a stop in between."
    data = bytes_of(data)
    streamed, _ = on_disk(data)
    net = mlp((2, 2, 1), CLASSES, width=4, depth=2, key=jax.random.key(0))
    rule = PredictiveCoding(inference=GradientDescent(2))
    run = lambda d, epochs, **how: fit(net, rule, optax.sgd(0.1, 0.9), d, epochs, 5, augment=Shift(1), progress=False, diagnose_examples=6, **how)
    whole = run(data, 3)
    run(streamed, 2, folder=tmp_path)
    again = run(streamed, 3, folder=tmp_path, resume=True)
    for a, b in zip(arrays(whole.net), arrays(again.net), strict=True): np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
    for a, b in zip(whole.metrics, again.metrics, strict=True):
        for key in ("loss", "train_top1", "test_top1", "test_loss", "cosine", "relative_residual"): np.testing.assert_allclose(a[key], b[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("changes", [(AlternatingFlip(), Crop(1), Cutout(2, jnp.zeros(1))), (Flip(), CutMix(1.0)), (Affine(1, 20.0), Mixup(0.5))], ids=["crop", "cutmix", "mixup"])
def test_streamed_images_change_as_held_ones_do(changes):
    "Pictures in which every change shows: each step sees the same bytes of the same example, at random and in every other epoch."
    rng, dtypes = np.random.default_rng(0), set()
    images, labels = rng.integers(0, 256, (N, 4, 4, 1), np.uint8), np.arange(N) % CLASSES
    held = Dataset("random", images, labels, images[:7], labels[:7], ("a", "b", "c"))
    def scale(image):
        dtypes.add(image.dtype)
        return image.astype(jnp.float32)
    net = mlp((4, 4, 1), CLASSES, depth=1, key=jax.random.key(0))
    (got, _), (want, _), (plain, _) = (seen(d, 2, net=net, scale=scale, augment=a) for d, a in ((on_disk(held)[0], Compose(*changes)), (held, Compose(*changes)), (held, None)))
    for a, b, c in zip(got, want, plain, strict=True):
        for u, v in zip(a, b): np.testing.assert_array_equal(u, v)
        assert (a[0] != c[0]).any()
    assert dtypes == {np.dtype(np.uint8)}  # until they are scaled, in the step


def test_measured_statistics_of_streamed_images(data):
    "The same as those of held ones, of no more than a batch at a time."
    data = bytes_of(data)
    streamed, disks = on_disk(data)
    keys = jax.random.split(jax.random.key(0))
    net = PCNetwork([BatchNormConv(1, 3, key=keys[0]), Chain(GlobalAverage(jnp.tanh), Dense(3, CLASSES, key=keys[1]))], (2, 2, 1))
    held, other = (fit(net, Backprop(), optax.sgd(0.1), d, 1, 5, statistics_examples=12, scale=lambda image: image.astype(jnp.float32), progress=False, diagnose_examples=0).net for d in (data, streamed))
    for a, b in zip(arrays(held), arrays(other), strict=True): np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert max(disks["train_images"].read) <= 5


def test_order_of_examples(data):
    batches, run = seen(data, 3)
    assert len(batches) == 3 * (N // 5)  # the last two examples are dropped
    orders = []
    for epoch in range(3):
        part = batches[4 * epoch:4 * epoch + 4]
        for x, y in part:
            assert x.shape == (5, 2, 2, 1) and (x == x[:, :1, :1]).all()
            np.testing.assert_array_equal(y, np.eye(CLASSES)[x[:, 0, 0, 0].astype(int) % CLASSES])  # labels stay with their images
        orders.append([int(v) for x, _ in part for v in x[:, 0, 0, 0]])
        assert max(Counter(orders[-1]).values()) == 1 and len(orders[-1]) == 20  # at most once each
    assert len({tuple(o) for o in orders}) == 3 and all(o != sorted(o) for o in orders)
    assert len(set(map(frozenset, orders))) > 1  # not the same two are left out
    assert [m["epoch"] for m in run.metrics] == [1, 2, 3]


def test_seed_decides_the_order(data):
    flat = lambda **kw: [x.tolist() for x, _ in seen(data, 1, **kw)[0]]
    first = flat(seed=1)
    assert first == flat(seed=1) and first != flat(seed=2)


def test_the_whole_set_as_one_batch(data):
    batches, _ = seen(data, 1, N)
    assert len(batches) == 1 and sorted(batches[0][0][:, 0, 0, 0]) == list(range(N))


def test_augmentation_has_its_own_key_for_each_example_step_and_epoch(data):
    noise = lambda image, key: image * 0 + jax.random.uniform(key)
    drawn = lambda **kw: [float(v) for x, _ in seen(data, 2, augment=noise, **kw)[0] for v in x[:, 0, 0, 0]]
    first = drawn()
    assert len(first) == 40 and len(set(first)) == 40
    assert first == drawn() and not set(first) & set(drawn(seed=1))


def test_augmentation_comes_before_the_scale_and_only_in_training(data):
    class Count(eqx.Module):
        def __call__(self, image): return 10 * image
    x = np.concatenate([x for x, _ in seen(data, 1, augment=lambda image, key: image + 1, scale=Count())[0]])
    assert set(x[:, 0, 0, 0]) <= {10.0 * (i + 1) for i in range(N)}
    net = PCNetwork([Fixed(lambda x: jnp.zeros(CLASSES).at[0].set(x.reshape(-1)[0]))], (2, 2, 1))
    _, run = seen(data, 1, net=net, augment=lambda image, key: image * jnp.nan, scale=Count())
    want = evaluate(net, data.test_images, data.test_labels, Count(), SquaredError())
    assert run.metrics[0]["test_loss"] == want.loss and np.isfinite(want.loss)


def test_default_scale_is_that_of_the_training_set(data):
    x = np.concatenate([x for x, _ in seen(data, 1, scale=None)[0]])[:, 0, 0, 0]
    levels = (np.arange(N) - np.arange(N).mean()) / np.arange(N).std()
    assert np.abs(x[:, None] - levels).min(1).max() < 1e-5


def test_metrics_are_means_over_the_epoch(data):
    "A network that always says class 1; the rule reports loss 1 and energy 2."
    net = PCNetwork([Fixed(lambda x: jnp.array([0.0, 1.0, 0.0]))], (2, 2, 1))
    batches, run = seen(data, 1, net=net)
    line = run.metrics[0]
    labels = np.concatenate([y for _, y in batches]).argmax(1)
    np.testing.assert_allclose([line["loss"], line["train_energy"], line["train_top1"]], [1, 2, (labels == 1).mean()], rtol=1e-6)
    test = data.test_labels
    np.testing.assert_allclose([line["test_top1"], line["test_top5"]], [(test == 1).mean(), 1], rtol=1e-6)
    np.testing.assert_allclose(line["test_loss"], np.mean(test != 1), rtol=1e-6)  # two entries are wrong by 1
    np.testing.assert_allclose(line["examples_per_second"] * line["seconds"], 20, rtol=1e-6)


# several steps a call
def test_a_loop_of_steps_sees_what_single_steps_see(data):
    for per_call in (3, 4, 32):  # 4 steps an epoch: a part left over, none, fewer than fit
        (one, ran), (many, looped) = (seen(data, 2, augment=Shift(1), steps_per_call=n) for n in (1, per_call))
        assert len(one) == len(many) == 8
        for a, b in zip(arrays(one), arrays(many)): np.testing.assert_array_equal(a, b)
        assert [{**m, "seconds": 0, "examples_per_second": 0, "elapsed": 0} for m in ran.metrics] == [{**m, "seconds": 0, "examples_per_second": 0, "elapsed": 0} for m in looped.metrics]


def test_a_loop_of_steps_learns_what_single_steps_learn(data):
    "Network, optimiser state with its count, and the statistics of batch normalisation go through the loop."
    net = PCNetwork([Dense(4, 8, key=jax.random.key(0)), BatchNorm(8), Dense(8, CLASSES, jax.nn.gelu, key=jax.random.key(1))], (2, 2, 1))
    rule = PredictiveCoding(inference=GradientDescent(2), joint=True)
    one, many = (fit(net, rule, optax.adam(1e-2), data, 2, 5, steps_per_call=n, progress=False, diagnose_examples=0).net for n in (1, 3))
    assert not np.allclose(one.layers[1].statistics.mean, net.layers[1].statistics.mean)
    for a, b in zip(arrays(one), arrays(many)): np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_convolutions_on_a_cpu_make_one_step_a_call(data, monkeypatch):
    made, make = [], pcnb.training._make_steps
    monkeypatch.setattr(pcnb.training, "_make_steps", lambda *args: made.append(args[-1]) or make(*args))
    general = PCNetwork([lambda x: jax.lax.conv_general_dilated(x[None], jnp.ones((1, 1, 1, 1)), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))[0], Dense(4, CLASSES, key=jax.random.key(0))], (2, 2, 1))
    for net in (cnn((4, 4, 1), CLASSES, (2,), key=jax.random.key(0)), general, tiny()):
        small = replace(data, train_images=np.zeros((N, *net.shapes[0]), np.float32), test_images=np.zeros((7, *net.shapes[0]), np.float32))
        fit(net, Backprop(), optax.sgd(0.1), small, 1, 5, scale=lambda image: image, progress=False, diagnose_examples=0)
    assert made == ([False, False, True] if jax.default_backend() == "cpu" else [True] * 3)


def test_calls_of_several_steps_that_cannot_be(data):
    class Every:
        every = 3
        def __call__(self, step, net): pass
    for most, settings in ((".", dict(steps_per_call=0)), (", and at most 1 because of the callback", dict(steps_per_call=2, callback=print)), (", and at most 3 because", dict(steps_per_call=4, callback=Every()))):
        with pytest.raises(InputError, match=f"steps_per_call is {settings['steps_per_call']}; expected at least 1{most}"):
            fit(tiny(), Backprop(), optax.sgd(0.1), data, 1, 5, progress=False, **settings)


# resumption
SETTINGS = dict(batch_size=5, progress=False, augment=lambda image, key: image + 0.1 * jax.random.normal(key, image.shape))
def tiny(): return mlp((2, 2, 1), CLASSES, 4, 2, key=jax.random.key(0))


def test_resumed_run_is_the_straight_one(data, tmp_path):
    "Interrupted after one epoch: the same weights to the bit, the same losses."
    train = lambda epochs, **kw: fit(tiny(), PredictiveCoding(inference=GradientDescent(2)), optax.adam(1e-2), data, epochs, diagnose_examples=4, **SETTINGS, **kw)
    straight = train(3)
    train(1, folder=tmp_path)
    resumed = train(3, folder=tmp_path, resume=True)
    for a, b in zip(arrays(straight.net), arrays(resumed.net), strict=True): np.testing.assert_array_equal(a, b)
    timing = ("seconds", "examples_per_second", "elapsed")
    strip = lambda lines: [{k: v for k, v in m.items() if k not in timing} for m in lines]
    assert strip(resumed.metrics) == strip(straight.metrics) and len(resumed.metrics) == 3
    assert any((a != b).any() for a, b in zip(arrays(straight.net), arrays(tiny())))

    def refuse(constant): raise AssertionError(f"{constant} is not JSON")
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_constant=refuse)["epoch"] for line in lines] == [1, 2, 3]
    assert read_metrics(tmp_path / "metrics.jsonl") == resumed.metrics
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.eqx", "metrics.jsonl"]  # no temporary files are left

    done = train(3, folder=tmp_path, resume=True)  # nothing left to do
    for a, b in zip(arrays(done.net), arrays(straight.net), strict=True): np.testing.assert_array_equal(a, b)
    assert done.metrics == resumed.metrics and done.compile_seconds == 0


def test_metrics_of_an_epoch_whose_checkpoint_was_lost_are_written_again(data, tmp_path):
    "A crash between the two files leaves one line more than the checkpoint's epochs."
    train = lambda epochs, **kw: fit(tiny(), Backprop(), optax.sgd(1e-2), data, epochs, diagnose_examples=0, folder=tmp_path, **SETTINGS, **kw)
    train(1)
    old = (tmp_path / "checkpoint.eqx").read_bytes()
    straight = train(2, resume=True)
    (tmp_path / "checkpoint.eqx").write_bytes(old)
    again = train(2, resume=True)
    assert [m["epoch"] for m in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    for a, b in zip(arrays(straight.net), arrays(again.net), strict=True): np.testing.assert_array_equal(a, b)


def test_folder_is_made(data, tmp_path):
    fit(tiny(), Backprop(), optax.sgd(1e-2), data, 1, folder=tmp_path / "runs" / "first", diagnose_examples=0, **SETTINGS)
    assert len(read_metrics(tmp_path / "runs" / "first" / "metrics.jsonl")) == 1


def test_network_given_to_fit_stays_as_it_is(data):
    net = tiny()
    before = [np.array(v) for v in arrays(net)]
    run = fit(net, Backprop(), optax.sgd(0.1), data, 1, diagnose_examples=0, **SETTINGS)
    for a, b in zip(before, arrays(net)): np.testing.assert_array_equal(a, b)
    assert any((a != b).any() for a, b in zip(before, arrays(run.net)))
    nothing = fit(net, Backprop(), optax.sgd(0.1), data, 0, progress=False, batch_size=5)
    assert nothing.metrics == []
    for a, b in zip(before, arrays(nothing.net)): np.testing.assert_array_equal(a, b)


def test_bare_loop_gives_the_same_weights(data):
    "One batch of everything, so that order does not matter: Optax on the mean loss, by hand."
    scale, net, lr = Scale(*data.moments()), tiny(), 0.05
    x, y = jax.vmap(scale)(jnp.asarray(data.train_images)), jnp.asarray(np.eye(CLASSES, dtype=np.float32)[data.train_labels])
    run = fit(net, Backprop(), optax.sgd(lr), data, 3, N, progress=False, diagnose_examples=0)
    step = eqx.filter_jit(lambda n: eqx.apply_updates(n, jax.tree.map(lambda g: -lr * g, eqx.filter_grad(lambda n: jnp.sum((jax.vmap(n)(x) - y) ** 2) / (2 * N))(n))))
    for _ in range(3): net = step(net)
    for a, b in zip(arrays(run.net), arrays(net), strict=True): np.testing.assert_allclose(a, b, atol=1e-5)


# checkpoints
def tree(value): return {"w": jnp.full((3, 2), value), "b": jnp.arange(4) * int(value), "f": jnp.tanh}


@pytest.mark.parametrize("leaves_before_the_crash", [0, 1])
def test_crash_while_writing_leaves_the_previous_checkpoint(leaves_before_the_crash, tmp_path, monkeypatch):
    path = tmp_path / "c.eqx"
    save_checkpoint(path, 4, tree(1.0))
    whole, real = path.read_bytes(), eqx.tree_serialise_leaves

    def crash(f, t):
        if leaves_before_the_crash: real(f, {"b": t["b"]})
        f.write(b"half")
        f.flush()
        raise KeyboardInterrupt

    monkeypatch.setattr(pcnb.training.eqx, "tree_serialise_leaves", crash)
    with pytest.raises(KeyboardInterrupt): save_checkpoint(path, 5, tree(2.0))
    monkeypatch.undo()
    assert path.read_bytes() == whole
    epoch, back = load_checkpoint(path, tree(0.0))
    assert epoch == 4
    np.testing.assert_array_equal(back["w"], np.ones((3, 2)))
    save_checkpoint(path, 5, tree(2.0))  # and what the crash left is no hindrance
    epoch, back = load_checkpoint(path, tree(0.0))
    assert epoch == 5 and [p.name for p in tmp_path.iterdir()] == ["c.eqx"]
    np.testing.assert_array_equal(back["b"], [0, 2, 4, 6])


@pytest.mark.parametrize("spoil", [lambda b: b"", lambda b: b[:5], lambda b: b[:-20], lambda b: b"no json\n" + b, lambda b: b'{"epochs": 1}\n' + b.split(b"\n", 1)[1]])
def test_damaged_checkpoint_is_refused(spoil, tmp_path):
    path = tmp_path / "c.eqx"
    save_checkpoint(path, 1, tree(1.0))
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(InputError, match="cannot be read as a checkpoint"): load_checkpoint(path, tree(0.0))


def test_checkpoint_of_another_shape_is_refused(tmp_path):
    path = tmp_path / "c.eqx"
    save_checkpoint(path, 1, tree(1.0))
    with pytest.raises(InputError, match="cannot be read as a checkpoint"): load_checkpoint(path, tree(0.0) | {"w": jnp.zeros((2, 3))})
    with pytest.raises(InputError, match="does not exist"): load_checkpoint(tmp_path / "none.eqx", tree(0.0))
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1}\n{"epo')
    with pytest.raises(InputError, match="damaged"): read_metrics(tmp_path / "metrics.jsonl")
    with pytest.raises(InputError, match="does not exist"): read_metrics(tmp_path / "none.jsonl")


# scores
class Itself(eqx.Module):
    def __call__(self, x): return x


def itself(v): return v


@given(seed=st.integers(0, 2**31), n=st.sampled_from([1, 4, 7, 8]), loss=st.sampled_from([SquaredError(), CrossEntropy()]))
def test_scores_against_numpy(seed, n, loss):
    "Outputs on a coarse grid, so that many tie: among equals the first counts as larger, as for argmax. 4 a batch, so the last is often padded."
    rng = np.random.default_rng(seed)
    out, labels = rng.integers(0, 4, size=(n, 7)).astype(np.float32), rng.integers(0, 7, n)
    order = np.argsort(-out, 1, kind="stable")
    got = evaluate(Itself(), out, labels, itself, loss, batch_size=4)
    np.testing.assert_allclose(got.top1, (out.argmax(1) == labels).mean(), rtol=1e-6)
    np.testing.assert_allclose(got.top5, (order[:, :5] == labels[:, None]).any(1).mean(), rtol=1e-6)
    y = np.eye(7)[labels]
    each = 0.5 * ((out - y) ** 2).sum(1) if isinstance(loss, SquaredError) else np.log(np.exp(out).sum(1)) - (out * y).sum(1)
    np.testing.assert_allclose(got.loss, each.mean(), rtol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 5, 7, 500, None])
def test_batch_size_does_not_change_the_scores(batch_size):
    rng = np.random.default_rng(0)
    out, labels = rng.normal(size=(7, 6)).astype(np.float32), rng.integers(0, 6, 7)
    np.testing.assert_allclose(evaluate(Itself(), out, labels, itself, SquaredError(), batch_size), evaluate(Itself(), out, labels, itself, SquaredError(), 2), rtol=1e-5)


@pytest.mark.parametrize("value", [0.0, np.nan], ids=["constant", "nan"])
def test_a_dead_network_scores_no_better_than_guessing(value):
    "All outputs equal, or not a number: the first class at best."
    labels = np.arange(14) % 7
    got = evaluate(Itself(), np.full((14, 7), value, np.float32), labels, itself, SquaredError(), batch_size=4)
    assert got.top1 <= 1 / 7 + 1e-6 and got.top5 <= 5 / 7 + 1e-6
    few = evaluate(Itself(), np.full((14, 3), value, np.float32), np.arange(14) % 3, itself, SquaredError())
    assert few.top5 == (0 if np.isnan(value) else 1)  # fewer classes than five


# bad input
def test_bad_input_is_refused_before_any_work(data, tmp_path):
    def call(net=None, epochs=1, batch_size=5, **kw):
        batches, _ = seen(data, epochs, batch_size, net, **kw)
    with pytest.raises(InputError, match="epochs is -1"): call(epochs=-1)
    with pytest.raises(InputError, match="batch_size is 0; expected 1 to 22"): call(batch_size=0)
    with pytest.raises(InputError, match="batch_size is 23; expected 1 to 22"): call(batch_size=23)
    with pytest.raises(InputError, match=r"takes inputs of shape \(4,\)"): call(mlp((4,), CLASSES, depth=1, key=jax.random.key(0)))
    with pytest.raises(InputError, match=r"output has shape \(4,\)"): call(mlp((2, 2, 1), 4, depth=1, key=jax.random.key(0)))
    with pytest.raises(InputError, match="does not exist"): call(folder=tmp_path, resume=True)
    with pytest.raises(InputError, match="folder"): call(resume=True)  # from where?
    with pytest.raises(InputError, match="seed is 4294967296; expected a number from 0"): call(seed=2**32)
    with pytest.raises(InputError, match="diagnose_examples is -1"): call(diagnose_examples=-1)
    with pytest.raises(InputError, match="batch_size is 5.0"): call(batch_size=5.0)
    for how in (dict(resume=True), dict(steps_per_call=0)):
        with pytest.raises(InputError): call(folder=tmp_path / "new", **how)
        assert not (tmp_path / "new").exists()


def test_a_run_of_more_epochs_is_not_taken_for_one_of_fewer(data, tmp_path):
    seen(data, 2, folder=tmp_path)
    with pytest.raises(InputError, match="has 2 epochs, and epochs is 1"): seen(data, 1, folder=tmp_path, resume=True)


def test_a_number_of_numpys_is_a_batch_size(data, tmp_path):
    net = mlp((2, 2, 1), CLASSES, width=3, depth=2, key=jax.random.key(0))
    recorder = Recorder(Backprop(), jnp.zeros((1, 2, 2, 1)), jnp.eye(CLASSES)[:1], 2, tmp_path / "layers.jsonl")
    fit(net, Backprop(), optax.sgd(0.1), data, 1, np.int64(5), callback=recorder, progress=False)
    assert [r["step"] for r in read_records(tmp_path / "layers.jsonl")] == [1, 2, 4]


def test_an_optimiser_may_keep_the_first_weights(data):
    "Prodigy's state holds the weights that it began with, the very arrays."
    net = mlp((2, 2, 1), CLASSES, width=4, depth=2, key=jax.random.key(0))
    before = [np.array(p) for p in arrays(net)]
    run = fit(net, Backprop(), optax.contrib.prodigy(), bytes_of(data), 3, 5, progress=False)
    for trained, a, b in zip(arrays(run.net), arrays(net), before, strict=True):
        np.testing.assert_array_equal(a, b)
        assert np.abs(trained - b).max() > 0


def test_checkpoint_of_another_network_is_refused(data, tmp_path):
    seen(data, 1, net=mlp((2, 2, 1), CLASSES, 4, 2, key=jax.random.key(0)), folder=tmp_path)
    with pytest.raises(InputError, match="cannot be read as a checkpoint"):
        seen(data, 2, net=mlp((2, 2, 1), CLASSES, 5, 2, key=jax.random.key(0)), folder=tmp_path, resume=True)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_divergence_stops_the_run_after_its_metrics_are_written(value, data, tmp_path):
    steps = []
    rule = Tell(lambda x, y: steps.append(1), value)
    with pytest.raises(Diverged, match="after epoch 1"):
        fit(mlp((2, 2, 1), CLASSES, depth=1, key=jax.random.key(0)), rule, optax.sgd(0.1), data, 3, 5, folder=tmp_path, progress=False, diagnose_examples=0)
    jax.effects_barrier()
    assert len(steps) == 4
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert len(lines) == 1 and not np.isfinite(lines[0]["loss"])


def test_what_cannot_be_trained_or_would_be_lost_is_refused(data, tmp_path):
    learn = lambda net, **how: fit(net, Backprop(), optax.sgd(0.1), data, how.pop("epochs", 1), 5, progress=False, **{"scale": lambda image: image} | how)
    with pytest.raises(InputError, match="no weights to train"): learn(PCNetwork([lambda x: jnp.zeros(CLASSES)], (2, 2, 1)))
    net = mlp((2, 2, 1), CLASSES, depth=1, key=jax.random.key(0))
    learn(net, folder=tmp_path / "run")
    with pytest.raises(InputError, match="holds a run"): learn(net, folder=tmp_path / "run")
    with pytest.raises(Diverged): learn(net, folder=tmp_path / "bad", scale=lambda image: image * jnp.inf)
    with pytest.raises(Diverged, match="had diverged after epoch 1"): learn(net, folder=tmp_path / "bad", resume=True, epochs=2)


def test_a_layer_without_weights_is_diagnosed(data):
    net = PCNetwork([*mlp((2, 2, 1), 4, depth=1, key=jax.random.key(0)).layers, jax.nn.relu, *mlp((4,), CLASSES, depth=1, key=jax.random.key(1)).layers], (2, 2, 1))
    line = fit(net, PredictiveCoding(), optax.sgd(0.1), data, 1, 5, progress=False).metrics[0]
    assert line["cosine"][1] == 0 == line["gradient_norm"][1] and line["cosine"][2] > 0.5


def test_scores_of_nonsense_are_refused(data):
    net = mlp((2, 2, 1), CLASSES, depth=1, key=jax.random.key(0))
    score = lambda labels, **how: evaluate(net, data.test_images, labels, lambda image: image, SquaredError(), **how)
    for labels, said in ((data.test_labels[:5], "one for each of 7 images"), (data.test_labels + 100, "expected 0 to 2"), (data.test_labels - 1, "expected 0 to 2")):
        with pytest.raises(InputError, match=said): score(labels)
    with pytest.raises(InputError, match="batch_size is 0"): score(data.test_labels, batch_size=0)


def test_seconds_are_those_of_the_steps(data, monkeypatch):
    "By a clock that only a callback moves, a hundred seconds at each of four calls."
    clock = [0.0]
    def read(): clock[0] += 1e-9; return clock[0]
    def late(step, net): clock[0] += 100
    monkeypatch.setattr(pcnb.training.time, "perf_counter", read)
    net = mlp((2, 2, 1), CLASSES, depth=1, key=jax.random.key(0))
    line = fit(net, Backprop(), optax.sgd(0.1), data, 1, 5, progress=False, diagnose_examples=0, callback=late).metrics[0]
    assert line["elapsed"] >= 400 and 0 < line["seconds"] < 1


@pytest.mark.parametrize("rule, still", [(PredictiveCoding(ForwardEnergy(), GaussNewton(1, 1)), False), (PredictiveCoding(ForwardEnergy(), GaussNewton(0)), True), (Backprop(), False)])
def test_inference_that_moves_nothing_is_told(rule, still, data, recwarn):
    fit(mlp((2, 2, 1), CLASSES, width=3, depth=3, key=jax.random.key(0)), rule, optax.sgd(0.1), data, epochs=2, batch_size=11, progress=False)
    assert [w.category for w in recwarn if "moved no state" in str(w.message)] == [UserWarning] * still
