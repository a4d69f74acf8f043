"""Augmentation: shapes, dtypes, exact cases, statistics against NumPy, and how a batch is changed in the jitted step."""
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given

import pcnb.augmentation
from pcnb.augmentation import Affine, AlternatingFlip, Batch, Compose, Crop, Cutout, CutMix, Flip, Mixup, Shift, augment_batch, warp
from pcnb.data import Dataset
from pcnb.learning import Backprop
from pcnb.models import mlp
from pcnb.network import InputError
from pcnb.training import fit

IMAGES = st.sampled_from([(4, 3, 1), (1, 5, 3)]).flatmap(lambda shape: hnp.arrays(np.uint8, shape))  # few shapes: each is compiled
SIZES = st.sampled_from([(1, 1), (3, 5), (6, 2)])


def message(error):
    "The text of a caught InputError, which must be short."
    assert len(str(error.value).splitlines()) <= 2
    return str(error.value)


# ---- where it is

def moved(image, rows, columns):
    "The image moved down and to the right, zeros coming in, one pixel at a time."
    out = np.zeros_like(image)
    for i in range(image.shape[0]):
        for j in range(image.shape[1]):
            if 0 <= i - rows < image.shape[0] and 0 <= j - columns < image.shape[1]: out[i, j] = image[i - rows, j - columns]
    return out


def distinct(height, width, dtype=np.uint8):
    "An image without zeros or repetitions: how it was moved can be read off."
    return np.arange(1, 1 + height * width, dtype=dtype).reshape(height, width, 1)


@given(SIZES, st.integers(0, 3), st.integers(0, 2**31), st.sampled_from([np.uint8, np.float32]))
def test_shift_moves_by_whole_pixels(size, pixels, seed, dtype):
    image, key = distinct(*size, dtype), jax.random.key(seed)
    out = np.asarray(Shift(pixels)(jnp.asarray(image), key=key))
    reach = range(-pixels, pixels + 1)
    assert out.dtype == dtype and any((out == moved(image, i, j)).all() for i in reach for j in reach)
    assert (np.asarray(Shift(pixels)(jnp.asarray(image), key=key)) == out).all()


@given(IMAGES, st.integers(0, 2**31))
def test_shift_by_none_is_the_identity(image, seed):
    assert (np.asarray(Shift(0)(jnp.asarray(image), key=jax.random.key(seed))) == image).all()


def test_shift_draws_every_offset_equally_often():
    image, n = distinct(5, 5), 5000
    out = jax.jit(jax.vmap(lambda key: Shift(2)(image, key=key)))(jax.random.split(jax.random.key(3), n))
    counts = np.array([(np.asarray(out) == moved(image, i, j)).all((1, 2, 3)).sum() for i in range(-2, 3) for j in range(-2, 3)])
    assert counts.sum() == n  # 25 different results, none else
    assert ((counts - n / 25) ** 2 / (n / 25)).sum() < 52.6  # chi-square, 24 degrees of freedom: exceeded once in 1,500 keys


def test_shift_under_jit_and_vmap_is_the_plain_one(getkey):
    images, keys = jnp.stack([distinct(6, 4)] * 8), jax.random.split(getkey(), 8)
    plain = jnp.stack([Shift(3)(image, key=key) for image, key in zip(images, keys)])
    assert (jax.jit(jax.vmap(lambda image, key: Shift(3)(image, key=key)))(images, keys) == plain).all()


@pytest.mark.parametrize("pixels", [-1, 1.5, True, "2"])
def test_shift_refuses_bad_pixels(pixels):
    with pytest.raises(InputError) as error: Shift(pixels)
    assert f"`pixels` (={pixels!r})" in message(error)


@given(st.sampled_from([1, 4, 5]), st.integers(-3, 3), st.integers(-3, 3))
def test_warp_by_quarter_turns_and_whole_pixels_is_exact(side, rows, columns):
    image = distinct(side, side)
    for turns in range(4): assert (np.asarray(warp(jnp.asarray(image), turns * np.pi / 2, 1.0, (0.0, 0.0))) == np.rot90(image, turns)).all()
    assert (np.asarray(warp(jnp.asarray(image), 0.0, 1.0, (float(rows), float(columns)))) == moved(image, rows, columns)).all()


@given(st.floats(-0.4, 0.4), st.floats(0.8, 1.25), st.floats(-1, 1), st.floats(-1, 1))
def test_warp_carries_a_linear_ramp_along(angle, factor, down, across):
    # Bilinear interpolation is exact on a ramp, so away from the border the result is the ramp at the point that is carried there.
    side, c = 15, 7
    y, x = np.mgrid[:side, :side].astype(float)
    out = np.asarray(warp(jnp.asarray((2 * x + 3 * y)[..., None], jnp.float32), angle, factor, (down, across)))[..., 0]
    # Where a point goes: anticlockwise as seen, rows counted downwards.
    turn = factor * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    v, u = np.linalg.inv(turn) @ np.stack([y - c - down, x - c - across]).reshape(2, -1)
    expected = (2 * (u + c) + 3 * (v + c)).reshape(side, side)
    inner = slice(4, 11)
    np.testing.assert_allclose(out[inner, inner], expected[inner, inner], atol=1e-3)


def test_affine_without_range_is_the_identity_and_moves_up_to_its_range(getkey):
    image = np.zeros((21, 21, 1), np.float32)
    image[10, 10] = 1
    assert (Affine(0, 0, 0)(jnp.asarray(image), key=getkey()) == image).all()
    out = np.asarray(jax.jit(jax.vmap(lambda key: Affine(3, 0, 0)(image, key=key)))(jax.random.split(getkey(), 400)))[..., 0]
    centre = np.stack([(out.sum(2) * np.arange(21)).sum(1), (out.sum(1) * np.arange(21)).sum(1)])  # bilinear weights keep the mean
    assert abs(centre - 10).max() <= 3.001 and (centre.min(1) < 7.2).all() and (centre.max(1) > 12.8).all()


def test_affine_draws_its_four_amounts_from_their_ranges_and_apart(getkey):
    image = np.zeros((21, 21, 1), np.float32)
    image[10, [4, 16]] = 1  # 6 pixels left and right of the centre: what lies between them tells angle and factor, their middle the move
    out = np.asarray(jax.jit(jax.vmap(lambda key: Affine(1, 30, 0.2)(image, key=key)))(jax.random.split(getkey(), 400)))[..., 0]
    def place(part, first):
        weight = part.sum((1, 2))
        return np.stack([(part.sum(2) * np.arange(21)).sum(1), (part.sum(1) * np.arange(first, first + 10)).sum(1)]) / weight
    left, right = place(out[:, :, :10], 0), place(out[:, :, 11:], 11)
    (down, across), (row, column) = (left + right) / 2 - 10, (right - left) / 2
    angle, factor = np.degrees(np.arctan2(-row, column)), np.hypot(row, column) / 6
    # Interpolation puts each point off by less than half a pixel: 5 degrees and 0.08 at this distance.
    for value, centre, reach, error in ((down, 0, 1, 0.5), (across, 0, 1, 0.5), (angle, 0, 30, 5), (factor, 1, 0.2, 0.08)):
        assert abs(value - centre).max() < reach + error and value.min() < centre - reach / 2 and value.max() > centre + reach / 2
    correlation = np.corrcoef([down, across, angle, factor]) - np.eye(4)
    assert abs(correlation).max() < 0.25  # deviation 0.05 for 400 independent draws


def test_affine_keeps_the_dtype_and_depends_on_the_key_only(getkey):
    image, key = jnp.asarray(distinct(8, 8)), getkey()
    out = Affine()(image, key=key)
    assert out.dtype == jnp.uint8 and out.shape == image.shape
    assert (out == Affine()(image, key=key)).all() and (out != Affine()(image, key=getkey())).any()


@pytest.mark.parametrize("wrong", [dict(pixels=-1), dict(degrees=181), dict(degrees=-1), dict(scale=1), dict(scale=-0.1), dict(pixels=np.nan), dict(pixels=np.inf)])
def test_affine_refuses_bad_ranges(wrong):
    with pytest.raises(InputError) as error: Affine(**wrong)
    assert all(f"`{name}` (={value!r})" in message(error) for name, value in wrong.items())


# ---- crop, flips, cutout

@given(st.sampled_from([(4, 5), (6, 3)]), st.integers(0, 2), st.integers(0, 2**31), st.sampled_from([np.uint8, np.float32]))
def test_crop_is_a_window_of_the_mirrored_image(size, pixels, seed, dtype):
    image = distinct(*size, dtype)
    wide = np.pad(image, ((pixels, pixels), (pixels, pixels), (0, 0)), mode="reflect")
    windows = [wide[r:r + size[0], c:c + size[1]] for r in range(2 * pixels + 1) for c in range(2 * pixels + 1)]
    out = np.asarray(Crop(pixels)(jnp.asarray(image), key=jax.random.key(seed)))
    assert out.dtype == dtype and any((out == w).all() for w in windows)


@pytest.mark.parametrize("pixels", [-1, 1.5, True])
def test_crop_refuses_bad_pixels(pixels):
    with pytest.raises(InputError) as error: Crop(pixels)
    assert f"`pixels` (={pixels!r})" in message(error)


def test_crop_refuses_a_border_as_wide_as_the_image(getkey):
    Crop(3)(jnp.zeros((4, 9, 1)), key=getkey())
    with pytest.raises(InputError) as error: Crop(4)(jnp.zeros((4, 9, 1)), key=getkey())
    assert "`pixels` (=4)" in message(error) and "4x9" in message(error)


def batch_of(n, shape=(3, 5, 2), classes=4, seed=0):
    rng = np.random.default_rng(seed)
    return Batch(jnp.asarray(rng.integers(0, 256, (n, *shape), np.uint8)), jax.nn.one_hot(rng.integers(0, classes, n), classes), jnp.arange(100, 100 + n), jnp.int32(0))


def test_flip_turns_half_of_the_images(getkey):
    batch, n = batch_of(4000), 4000
    out, turned = np.asarray(augment_batch(Flip(), batch, key=getkey()).images), np.asarray(batch.images)[:, :, ::-1]
    flipped = (out == turned).all((1, 2, 3))
    assert (out[~flipped] == batch.images[~flipped]).all() and out.dtype == np.uint8
    assert abs(flipped.mean() - 0.5) < 4.5 * 0.5 / np.sqrt(n)


def test_alternating_flip_depends_on_example_and_epoch_only(getkey):
    batch = batch_of(1000)
    plain, turned = np.asarray(batch.images), np.asarray(batch.images)[:, :, ::-1]
    out = [np.asarray(AlternatingFlip()(batch._replace(epoch=jnp.int32(e)), key=getkey()).images) for e in range(3)]
    first = (out[0] == turned).all((1, 2, 3))
    assert (out[1] == np.where(first[:, None, None, None], plain, turned)).all() and (out[2] == out[0]).all()
    assert abs(first.mean() - 0.5) < 4.5 * 0.5 / np.sqrt(1000)
    order = np.random.default_rng(1).permutation(1000)  # another order of the same examples
    mixed = batch._replace(images=batch.images[order], index=batch.index[order])
    assert (np.asarray(AlternatingFlip()(mixed, key=getkey()).images) == out[0][order]).all()
    other = (np.asarray(AlternatingFlip(seed=1)(batch, key=getkey()).images) == turned).all((1, 2, 3))
    assert abs((other == first).mean() - 0.5) < 4.5 * 0.5 / np.sqrt(1000)


@given(st.integers(1, 7), st.integers(0, 2**31))
def test_cutout_fills_a_square_around_a_pixel(size, seed):
    image = jnp.full((5, 6, 3), 200, jnp.uint8)
    hidden = np.asarray(Cutout(size, (1, 2.6, 3.4))(image, key=jax.random.key(seed)))
    squares = []
    for r in range(5):
        for c in range(6):
            square, top, left = np.full((5, 6, 3), 200), r - size // 2, c - size // 2
            square[max(top, 0):top + size, max(left, 0):left + size] = (1, 3, 3)  # a colour between two of uint8 is rounded
            squares.append(square)
    assert hidden.dtype == np.uint8 and any((hidden == s).all() for s in squares)


def test_cutout_draws_every_centre_equally_often():
    image, n = jnp.ones((4, 5, 1)), 4000
    out = jax.jit(jax.vmap(lambda key: Cutout(1)(image, key=key)))(jax.random.split(jax.random.key(2), n))
    counts = n - np.asarray(out).sum(0).ravel()
    assert counts.sum() == n and ((counts - n / 20) ** 2 / (n / 20)).sum() < 45.3  # chi-square, 19 degrees of freedom: exceeded once in 1,500 keys


@pytest.mark.parametrize("size", [0, -1, 1.5, True])
def test_cutout_refuses_a_bad_size(size):
    with pytest.raises(InputError, match="size"): Cutout(size)


def test_cutout_of_one_colour_and_of_too_few():
    image, key = jnp.zeros((4, 4, 3), jnp.uint8), jax.random.key(0)
    np.testing.assert_array_equal(Cutout(8, 128)(image, key=key), Cutout(8, (128, 128, 128))(image, key=key))
    with pytest.raises(InputError, match="each of the image's 3 channels"): Cutout(8, (1, 2))(image, key=key)


# ---- mixing

@given(st.integers(0, 2**31), st.sampled_from([np.uint8, np.float32]))
def test_mixup_is_the_weighted_mean_of_neighbours(seed, dtype):
    batch = batch_of(6)
    batch = batch._replace(images=batch.images.astype(dtype), targets=jnp.eye(6))
    out = Mixup(1.0)(batch, key=jax.random.key(seed))
    share = float(out.targets[2, 2])
    images = np.asarray(batch.images, np.float64)
    assert 0 <= share <= 1 and out.images.dtype == dtype
    np.testing.assert_allclose(out.targets, share * np.eye(6) + (1 - share) * np.roll(np.eye(6), 1, 0), atol=1e-6)
    np.testing.assert_allclose(out.images, share * images + (1 - share) * np.roll(images, 1, 0), atol=0.51 if dtype == np.uint8 else 1e-3)


@given(st.integers(0, 2**31))
def test_cutmix_pastes_one_box_and_counts_its_area(seed):
    batch = batch_of(6, (7, 6, 2))._replace(targets=jnp.eye(6))
    distinct_images = jnp.asarray(np.arange(6, dtype=np.uint8).reshape(6, 1, 1, 1) * np.ones((1, 7, 6, 2), np.uint8))
    out = CutMix()(batch._replace(images=distinct_images), key=jax.random.key(seed))
    pasted = np.asarray(out.images)[3, ..., 0] == 2
    assert (np.asarray(out.images) == np.where(pasted[None, ..., None], np.roll(distinct_images, 1, 0), distinct_images)).all()
    rows, columns = np.flatnonzero(pasted.any(1)), np.flatnonzero(pasted.any(0))
    assert pasted.sum() == len(rows) * len(columns) and all((np.diff(i) == 1).all() for i in (rows, columns))  # a box without gaps
    np.testing.assert_allclose(out.targets, (1 - pasted.mean()) * np.eye(6) + pasted.mean() * np.roll(np.eye(6), 1, 0), atol=1e-6)


def test_a_cutmix_box_has_the_share_of_the_image_that_was_drawn(monkeypatch):
    "In the middle, where none of it is cut off: half of the image on average over shares from 0 to 1, and as high as it is wide."
    monkeypatch.setattr(pcnb.augmentation, "_centre", lambda key, shape: (shape[0] // 2, shape[1] // 2))
    images, n = jnp.asarray(np.arange(2, dtype=np.uint8).reshape(2, 1, 1, 1) * np.ones((1, 40, 64, 1), np.uint8)), 2000
    run = lambda key: CutMix()(batch_of(2, (40, 64, 1))._replace(images=images, targets=jnp.eye(2)), key=key).images[0, ..., 0]
    pasted = np.asarray(jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), n)))
    height, width = pasted.any(2).sum(1) / 40, pasted.any(1).sum(1) / 64
    assert np.abs(height - width).max() <= 2 / 40
    assert abs(pasted.mean() - 0.5) < 5 * (1 / 12 / n) ** 0.5 + 1 / 40


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_the_share_has_the_moments_of_the_beta_distribution(alpha):
    batch, n = batch_of(2, (1, 1, 1))._replace(targets=jnp.eye(2)), 4000
    shares = np.asarray(jax.jit(jax.vmap(lambda key: Mixup(alpha)(batch, key=key).targets[0, 0]))(jax.random.split(jax.random.key(0), n)))
    variance = 1 / (4 * (2 * alpha + 1))  # of Beta(alpha, alpha)
    assert abs(shares.mean() - 0.5) < 4.5 * np.sqrt(variance / n) and abs(shares.var() - variance) < 4.5 * 0.25 / np.sqrt(n)


@pytest.mark.parametrize("mix", [Mixup, CutMix])
def test_mixing_happens_as_often_as_asked(mix):
    batch, n = batch_of(3, (8, 8, 1))._replace(targets=jnp.eye(3)), 2000
    def changed(probability):
        own = jax.jit(jax.vmap(lambda key: mix(1.0, probability)(batch, key=key).targets[0, 0]))(jax.random.split(jax.random.key(4), n))
        return float((own < 1).mean())
    assert changed(0.0) == 0 and abs(changed(0.3) - 0.3 * changed(1.0)) < 5 * np.sqrt(0.21 / n) and changed(1.0) > 0.9


@pytest.mark.parametrize("mix", [Mixup, CutMix])
@pytest.mark.parametrize("wrong", [(0.0, 1.0), (-1.0, 1.0), (np.inf, 1.0), (1.0, -0.1), (1.0, 1.1), (np.nan, 1.0)])
def test_mixing_refuses_bad_numbers(mix, wrong):
    with pytest.raises(InputError) as error: mix(*wrong)
    assert "`alpha`" in message(error) and "`probability`" in message(error)


# ---- composition, and the step

def test_a_composition_is_its_parts_one_after_the_other(getkey):
    batch, key = batch_of(20), getkey()
    step, expected = (Flip(), AlternatingFlip(), Mixup(1.0)), batch
    for i, change in enumerate(step): expected = augment_batch(change, expected, key=jax.random.fold_in(key, i))
    out = augment_batch(Compose(*step), batch, key=key)
    assert (out.images == expected.images).all() and (out.targets == expected.targets).all()
    assert augment_batch(None, batch, key=key) is batch and (Compose()(batch, key=key).images == batch.images).all()


def test_a_change_of_one_image_has_a_key_for_each(getkey):
    batch, key = batch_of(8), getkey()
    keys = jax.random.split(key, 8)
    expected = jnp.stack([Shift(2)(image, key=k) for image, k in zip(batch.images, keys)])
    assert (augment_batch(Shift(2), batch, key=key).images == expected).all()


def test_fit_hands_index_epoch_and_mixed_targets_to_the_step():
    # Images that show which example they are and whether they were turned; the scale passes them on to a network that never learns.
    rng = np.random.default_rng(0)
    images = np.zeros((12, 1, 2, 1), np.float32)
    images[:, 0, 0, 0] = np.arange(1, 13)
    seen = []
    def scale(image):
        jax.debug.callback(lambda x: seen.append(np.asarray(x).ravel().tolist()), image)
        return image
    data = Dataset("toy", images, rng.integers(0, 3, 12), images, rng.integers(0, 3, 12), ("a", "b", "c"))
    net = mlp((1, 2, 1), 3, 4, 2, key=jax.random.key(0))
    fit(net, Backprop(), optax.sgd(0.0), data, 2, 4, augment=AlternatingFlip(), scale=scale, progress=False, diagnose_examples=0)
    jax.effects_barrier()
    ways = {}
    for left, right in seen: ways.setdefault(max(left, right), []).append(left == 0)
    trained = {k: sorted(v) for k, v in ways.items()}  # each epoch trains on every example once and scores it once, unturned
    assert len(trained) == 12 and all(v.count(True) == 1 for v in trained.values())


def test_training_on_mixed_targets_is_training_on_the_mixture():
    # With one batch of two examples, mixed by share s, squared error and a linear network, the gradient is known in closed form.
    images = np.array([[1.0, 0.0], [0.0, 2.0]], np.float32).reshape(2, 1, 2, 1)
    data = Dataset("toy", images, np.array([0, 1]), images, np.array([0, 1]), ("a", "b"))
    net = mlp((1, 2, 1), 2, 4, 1, key=jax.random.key(0))
    run = fit(net, Backprop(), optax.sgd(1.0), data, 1, 2, augment=Mixup(1.0), scale=lambda image: image, progress=False, diagnose_examples=0)
    W, step = np.asarray(net.layers[0].weight), np.asarray(net.layers[0].weight - run.net.layers[0].weight)
    def gradient(share):
        x, y = np.diag([1.0, 2.0]), np.eye(2)
        x, y = share * x + (1 - share) * x[::-1], share * y + (1 - share) * y[::-1]
        return (x @ W.T - y).T @ x / 2
    best = min(np.linspace(0, 1, 2001), key=lambda s: abs(gradient(s) - step).max())
    np.testing.assert_allclose(step, gradient(best), atol=2e-3)
    assert abs(step - gradient(1.0)).max() > 1e-2  # it was mixed
