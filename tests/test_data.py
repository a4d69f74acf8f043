"""The data sets: the form of `Dataset`, the files, and what goes wrong with them. No test uses the network."""
import errno
import gzip
import functools
import hashlib
import http.client
import builtins
import io
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import tarfile
import types
import urllib.request
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import PIL.Image
import pytest
from hypothesis import given

import pcnb.data
from pcnb.augmentation import Affine, AlternatingFlip, Compose, Crop, CutMix, Cutout, Flip, Mixup
from pcnb.data import SETS, Dataset, Records, Scale, batches, data_folder, describe, load, read_cifar, read_idx, read_jpeg, whiten
from pcnb.learning import Backprop
from pcnb.models import mlp
from pcnb.network import InputError
from pcnb.training import fit

ROOT = Path(__file__).resolve().parent.parent
FILES = ["train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz", "t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs): raise socket.gaierror("the network is blocked in this test")
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def idx_bytes(array):
    "The IDX file of a uint8 array, by the description of the format: magic number 0x000008NN, then lengths, big-endian."
    lengths = b"".join(n.to_bytes(4, "big") for n in array.shape)
    return (0x0800 + array.ndim).to_bytes(4, "big") + lengths + array.tobytes()


def message(error):
    "The text of a caught InputError, which must be short and without a chain of causes."
    assert len(str(error.value).splitlines()) <= 2
    assert error.value.__cause__ is None and (error.value.__context__ is None or error.value.__suppress_context__)
    return str(error.value)


class Tiny:
    "A set in the form of MNIST, 12 + 5 images of 4 x 3, whose files lie in `root/tiny`."

    def __init__(self, root, shape=(4, 3), labels=None):
        rng = np.random.default_rng(0)
        self.root, self.folder = root, root / "tiny"
        self.images = {"train": rng.integers(0, 256, (12, *shape), np.uint8), "t10k": rng.integers(0, 256, (5, *shape), np.uint8)}
        self.labels = {"train": np.arange(12, dtype=np.uint8) % 10, "t10k": np.arange(5, dtype=np.uint8)}
        self.labels |= labels or {}
        arrays = [self.images["train"], self.labels["train"], self.images["t10k"], self.labels["t10k"]]
        self.bytes = {name: gzip.compress(idx_bytes(a), mtime=0) for name, a in zip(FILES, arrays)}
        self.entry = replace(SETS["mnist"], name="tiny", shape=(4, 3, 1), n_train=12, n_test=5, url="http://sets.invalid/tiny/",
            files={name: hashlib.sha256(raw).hexdigest() for name, raw in self.bytes.items()})
        self.put()

    def put(self):
        self.folder.mkdir(exist_ok=True)
        for name, raw in self.bytes.items(): (self.folder / name).write_bytes(raw)

    def load(self): return load(self.entry, self.root)

    def check(self, data):
        assert (data.train_images == self.images["train"][..., None]).all() and (data.train_labels == self.labels["train"]).all()
        assert (data.test_images == self.images["t10k"][..., None]).all() and (data.test_labels == self.labels["t10k"]).all()

    def left(self): return sorted(p.name for p in self.folder.iterdir() if p.name not in FILES)


@pytest.fixture
def tiny(tmp_path): return Tiny(tmp_path)


@pytest.fixture(scope="module")
def prepared_once(tmp_path_factory):
    tiny = Tiny(tmp_path_factory.mktemp("once"))
    tiny.load()
    return tiny


@pytest.fixture
def prepared(prepared_once, tmp_path):
    "A prepared set in a folder of this test's own, its four files deleted."
    tiny = Tiny(tmp_path)
    shutil.copytree(prepared_once.folder / "prepared", tiny.folder / "prepared")
    for name in FILES: (tiny.folder / name).unlink()
    return tiny


# ---- Dataset

def arrays(**changes):
    rng = np.random.default_rng(1)
    fields = dict(name="toy", train_images=rng.integers(0, 256, (9, 3, 2, 2), np.uint8), train_labels=np.arange(9) % 3,
        test_images=rng.integers(0, 256, (4, 3, 2, 2), np.uint8), test_labels=np.arange(4) % 3, classes=("a", "b", "c"))
    return fields | changes


def with_value(value):
    images = np.zeros((9, 3, 2, 2), np.float32)
    images[5, 1, 0, 1] = value
    return images


BAD = {
    "float64 images": (dict(train_images=np.zeros((9, 3, 2, 2))), ["train_images", "float64", "astype"]),
    "int64 images": (dict(test_images=np.zeros((4, 3, 2, 2), int)), ["test_images", "int64", "astype"]),
    "no channel axis": (dict(train_images=np.zeros((9, 3, 2), np.uint8)), ["train_images", "(9, 3, 2)", "channels"]),
    "no images": (dict(test_images=np.zeros((0, 3, 2, 2), np.uint8), test_labels=np.zeros(0, int)), ["test_images", "(0, 3, 2, 2)", "at least 1"]),
    "no pixels": (dict(train_images=np.zeros((9, 0, 2, 2), np.uint8)), ["train_images", "(9, 0, 2, 2)"]),
    "other image shape": (dict(test_images=np.zeros((4, 2, 3, 2), np.uint8)), ["(3, 2, 2, 'uint8')", "(2, 3, 2, 'uint8')", "same"]),
    "other image dtype": (dict(test_images=np.zeros((4, 3, 2, 2), np.float32)), ["uint8", "float32", "same"]),
    "too few labels": (dict(train_labels=np.zeros(8, int)), ["train_labels", "9 and 8"]),
    "NaN": (dict(train_images=with_value(np.nan)), ["train_images", "NaN", "index 5", "1 of 9"]),
    "infinity": (dict(train_images=with_value(-np.inf)), ["train_images", "infinite", "index 5"]),
    "label too large": (dict(train_labels=np.array([0, 1, 2, 3, 0, 1, 2, 0, 1])), ["train_labels", "hold 3", "index 3", "0 to 2"]),
    "negative label": (dict(test_labels=np.array([0, 1, -1, 0])), ["test_labels", "hold -1", "index 2"]),
    "huge label": (dict(test_labels=np.array([0, 1, 2**32, 0])), ["test_labels", "4294967296", "index 2"]),
    "float labels": (dict(train_labels=np.zeros(9, np.float32)), ["train_labels", "float32", "integers"]),
    "bool labels": (dict(train_labels=np.zeros(9, bool)), ["train_labels", "bool", "integers"]),
    "one-hot labels": (dict(train_labels=np.eye(9, dtype=int)), ["train_labels", "(9, 9)", "argmax"]),
    "classes a string": (dict(classes="abc"), ["classes", "abc"]),
    "no classes": (dict(classes=()), ["classes", "()"]),
}


@pytest.mark.parametrize("changes, words", BAD.values(), ids=BAD)
def test_bad_arrays_are_refused(changes, words):
    with pytest.raises(InputError) as error: Dataset(**arrays(**changes))
    text = message(error)
    assert [word for word in words if word not in text] == []


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.int64, np.uint64])
def test_labels_become_int32_and_nothing_else_changes(dtype):
    fields = arrays(train_labels=(np.arange(9) % 3).astype(dtype))
    data = Dataset(**fields)
    assert data.train_labels.dtype == np.int32 and data.train_labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2]
    assert data.train_images is fields["train_images"] and data.image_shape == (3, 2, 2) and data.n_classes == 3 and data.source == {}


def test_repr_is_one_short_line():
    assert repr(Dataset(**arrays())) == "Dataset(toy: 9 train + 4 test, 3x2x2 uint8, 3 classes)"


@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))))
def test_moments_equal_the_sums_in_double_precision(images):
    pixels = images.reshape(-1, images.shape[-1]) / 255
    common = dict(name="toy", train_labels=np.zeros(len(images), int), test_labels=np.zeros(len(images), int), classes=("a",))
    floats = (images / 255).astype(np.float32)
    for x in (images, floats):
        mean, std = Dataset(train_images=x, test_images=x, **common).moments()
        assert mean.dtype == std.dtype == np.float32 and mean.shape == std.shape == (images.shape[-1],)
        np.testing.assert_allclose(mean, pixels.mean(0), rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(std, pixels.std(0), rtol=1e-5, atol=1e-6)


def test_moments_of_more_images_than_are_looked_at_at_once():
    "In slices of 10,000: each has its own value, and the last is shorter."
    images = np.repeat(np.array([10, 100, 200], np.uint8), [10000, 10000, 5000]).reshape(-1, 1, 1, 1)
    mean, std = Dataset("toy", images, np.zeros(25000, int), images[:1], np.zeros(1, int), ("a",)).moments()
    np.testing.assert_allclose([mean[0], std[0]], [images.mean() / 255, images.std() / 255], rtol=1e-5)


def numbered(n):
    "A set whose example i has the pixel i and the label i, so that each can be recognised."
    images = np.arange(n, dtype=np.uint8).reshape(n, 1, 1, 1)
    return Dataset("numbered", images, np.arange(n), images[:1], np.arange(1), tuple(map(str, range(n))), {"files": {}})


@given(st.integers(2, 60).flatmap(lambda total: st.tuples(st.just(total), st.integers(1, total - 1))), st.integers(0, 2**32 - 1))
def test_validation_parts_the_training_set(sizes, seed):
    total, n = sizes
    split, twin = numbered(total).validation(n, seed), numbered(total).validation(n, seed=seed)
    held, kept = split.test_labels.tolist(), split.train_labels.tolist()
    assert len(held) == n and sorted(held + kept) == list(range(total)) and kept == sorted(kept)
    assert split.test_images.ravel().tolist() == held and split.train_images.ravel().tolist() == kept
    assert held == twin.test_labels.tolist() and split.name == "numbered"
    assert split.source == {"files": {}, "validation": {"n": n, "seed": seed}}


def test_validation_draws_anew_for_each_seed():
    draws = {tuple(numbered(50).validation(5, seed).test_labels.tolist()) for seed in range(20)}
    assert len(draws) == 20 and len({i for draw in draws for i in draw}) > 30  # 100 draws of 50: 43 on average


@pytest.mark.parametrize("n", [0, -1, 10, 2.0, True, "3"])
def test_validation_and_take_refuse_a_bad_number(n):
    with pytest.raises(InputError) as error: numbered(10).validation(n)
    assert f"`n` (={n!r})" in message(error) and "from 1 to 9" in message(error)
    with pytest.raises(InputError) as error: numbered(10).take(11 if n == 10 else n)
    assert "`n`" in message(error) and "from 1 to 10" in message(error)


@pytest.mark.parametrize("seed", [-1, 2**32, 0.5])
def test_validation_refuses_a_bad_seed(seed):
    with pytest.raises(InputError, match="seed"): numbered(10).validation(2, seed)


def test_take_keeps_the_first_examples():
    data = numbered(10).take(4)
    assert data.train_labels.tolist() == [0, 1, 2, 3] == data.train_images.ravel().tolist() and len(data.test_labels) == 1


# ---- IDX files

@given(hnp.arrays(np.uint8, hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=5)))
def test_idx_round_trip(tmp_path_factory, array):
    path = tmp_path_factory.getbasetemp() / "round.gz"
    path.write_bytes(gzip.compress(idx_bytes(array)))
    back = read_idx(path)
    assert back.dtype == np.uint8 and back.shape == array.shape and (back == array).all()


WHOLE = idx_bytes(np.arange(24, dtype=np.uint8).reshape(2, 3, 4))
NOT_IDX = {
    "empty": b"", "only the magic number": WHOLE[:4], "header cut": WHOLE[:10], "one byte short": WHOLE[:-1], "one byte long": WHOLE + b"\0",
    "floats": b"\0\0\x0d" + WHOLE[3:], "other magic": b"\0\1\x08" + WHOLE[3:], "no axes": b"\0\0\x08\0" + WHOLE[4:],
    "vast lengths": WHOLE[:4] + b"\xff" * 12 + WHOLE[16:], "lengths whose product is 2**64": b"\0\0\x08\4" + b"\0\1\0\0" * 4, "web page": b"<html></html>",
}


@pytest.mark.parametrize("raw", NOT_IDX.values(), ids=NOT_IDX)
def test_what_is_no_idx_file_is_refused(tmp_path, raw):
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(raw))
    with pytest.raises(InputError) as error: read_idx(path)
    assert str(path) in message(error)


@given(st.data())
def test_a_truncated_or_altered_gzip_file_is_never_read_as_another(tmp_path_factory, data):
    path, packed = tmp_path_factory.getbasetemp() / "cut.gz", gzip.compress(WHOLE)
    path.write_bytes(packed[:data.draw(st.integers(0, len(packed) - 1))])
    with pytest.raises(InputError) as error: read_idx(path)
    assert str(path) in message(error)


def test_a_missing_file_and_a_file_without_gzip_are_refused(tmp_path):
    (tmp_path / "plain").write_bytes(WHOLE)
    for name in ("plain", "missing"):
        with pytest.raises(InputError) as error: read_idx(tmp_path / name)
        assert name in message(error)


# ---- load: what works

def test_load_gives_what_the_files_hold(tiny):
    data = tiny.load()
    tiny.check(data)
    assert data.name == "tiny" and data.classes == tuple("0123456789") and tiny.left() == ["prepared"]
    assert data.source["files"] == tiny.entry.files and data.source["verified"] is True
    assert "tensorflow" not in sys.modules


def test_records_are_a_tfds_data_set_in_the_order_of_the_files(prepared):
    import tensorflow_datasets as tfds
    builder = tfds.builder_from_directory(prepared.folder / "prepared/tfds/pcnb_images/1.0.0")
    for part, stem in (("train", "train"), ("test", "t10k")):
        rows = list(builder.as_data_source(part))
        assert (np.stack([row["image"][..., 0] for row in rows]) == prepared.images[stem]).all()
        assert [row["label"] for row in rows] == prepared.labels[stem].tolist()


def test_prepared_set_needs_neither_files_nor_tfds(prepared, monkeypatch):
    for name in [m for m in sys.modules if m.split(".")[0] == "tensorflow_datasets"]: monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    monkeypatch.setitem(sys.modules, "array_record", None)
    prepared.check(prepared.load())


def test_prepared_set_in_a_folder_that_is_not_written(prepared, monkeypatch):
    def refuse(*args, **kwargs): raise AssertionError("a load of a prepared set must write nothing")
    for name in ("mkdir", "rename", "replace"): monkeypatch.setattr(os, name, refuse)
    prepared.check(prepared.load())


def serve(monkeypatch, answer):
    "Let `urlopen` return what `answer(name of the file)` gives, and collect the addresses."
    asked = []
    def urlopen(url, timeout):
        asked.append(url)
        return io.BytesIO(answer(url.rsplit("/", 1)[1]))
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return asked


def test_missing_files_are_downloaded_once(tiny, monkeypatch):
    for name in FILES[1:]: (tiny.folder / name).unlink()
    asked = serve(monkeypatch, tiny.bytes.get)
    tiny.check(tiny.load())
    assert sorted(asked) == sorted("http://sets.invalid/tiny/" + name for name in FILES[1:])
    assert all((tiny.folder / name).read_bytes() == tiny.bytes[name] for name in FILES)
    tiny.load()
    assert len(asked) == 3


def test_data_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("PCNB_DATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data_folder() == tmp_path / ".cache/pcnb"
    monkeypatch.setenv("PCNB_DATA", "~/sets")
    assert data_folder() == tmp_path / "sets"
    assert data_folder(tmp_path / "mine") == tmp_path / "mine"


def test_load_uses_the_data_folder_of_the_environment(prepared, monkeypatch):
    monkeypatch.setenv("PCNB_DATA", str(prepared.root))
    prepared.check(load(prepared.entry))


# ---- load: what goes wrong

@pytest.mark.parametrize("name", ["fashion-mnist", "Mnist", "nonsense", "", 5, None])
def test_unknown_set(name):
    with pytest.raises(InputError) as error: load(name)
    text = message(error)
    assert repr(name) in text and all(known in text for known in SETS)
    meant = {"fashion-mnist": "fashion_mnist", "Mnist": "mnist"}.get(name)
    assert (f"did you mean {meant!r}?" in text) if meant else ("did you mean" not in text)


@pytest.mark.parametrize("gone", [FILES[:1], FILES[2:3], FILES])
def test_missing_files_without_network(tiny, gone):
    for name in gone: (tiny.folder / name).unlink()
    with pytest.raises(InputError) as error: tiny.load()
    text = message(error)
    assert str(tiny.folder) in text and tiny.entry.url in text and "blocked" in text
    asked = text[text.index("Put there"):]
    assert [name in asked for name in FILES] == [name in gone for name in FILES] and tiny.left() == []
    tiny.put()
    tiny.check(tiny.load())


def test_no_folder_and_no_network_leaves_a_place_to_put_the_files(tmp_path):
    with pytest.raises(InputError, match="cannot be downloaded"): load("mnist", tmp_path / "new")
    assert [p.name for p in (tmp_path / "new").rglob("*")] == ["mnist"]


@pytest.mark.parametrize("answer", [lambda name: b"<html>log in first</html>", lambda name: b""])
def test_a_download_of_something_else_is_not_kept(tiny, monkeypatch, answer):
    (tiny.folder / FILES[0]).unlink()
    serve(monkeypatch, answer)
    with pytest.raises(InputError) as error: tiny.load()
    assert tiny.entry.url + FILES[0] in message(error) and str(tiny.folder) in message(error)
    assert tiny.left() == [] and not (tiny.folder / FILES[0]).exists()


@pytest.mark.parametrize("failure", [http.client.IncompleteRead(b"12"), TimeoutError("timed out"), ConnectionResetError("reset by peer")])
def test_a_download_that_breaks_off_leaves_nothing(tiny, monkeypatch, failure):
    (tiny.folder / FILES[2]).unlink()
    def answer(name): raise failure
    serve(monkeypatch, answer)
    with pytest.raises(InputError) as error: tiny.load()
    assert "cannot be downloaded" in message(error) and FILES[2] in message(error)
    assert tiny.left() == [] and not (tiny.folder / FILES[2]).exists()


def test_a_download_that_fills_the_disk_leaves_no_part_of_a_file(tiny, monkeypatch):
    (tiny.folder / FILES[0]).unlink()
    serve(monkeypatch, tiny.bytes.get)
    write = Path.write_bytes
    def half(path, raw):
        write(path, raw[:len(raw) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(InputError, match="No space left on device"): tiny.load()
    assert tiny.left() == [] and not (tiny.folder / FILES[0]).exists()


def flip(path, at):
    raw = bytearray(path.read_bytes())
    raw[int(at * (len(raw) - 1))] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", [lambda p: flip(p, 0.0), lambda p: flip(p, 0.9), lambda p: p.write_bytes(p.read_bytes()[:-5]), lambda p: p.write_bytes(b"")],
    ids=["first byte", "late byte", "truncated", "empty"])
def test_a_damaged_file_is_refused_and_kept(tiny, name, harm):
    harm(tiny.folder / name)
    damaged = (tiny.folder / name).read_bytes()
    with pytest.raises(InputError) as error: tiny.load()
    text = message(error)
    assert str(tiny.folder / name) in text and "Delete it" in text and tiny.entry.url + name in text
    assert (tiny.folder / name).read_bytes() == damaged and tiny.left() == []


@pytest.mark.parametrize("make, words", [
    (lambda root: Tiny(root, shape=(3, 4)), ["(12, 3, 4, 1)", "(12, 4, 3, 1)"]),
    (lambda root: Tiny(root, labels={"train": np.full(12, 10, np.uint8)}), ["train_labels", "hold 10", "0 to 9"]),
    (lambda root: Tiny(root, labels={"t10k": np.zeros(4, np.uint8)}), ["test_labels", "5 and 4"]),
    (lambda root: Tiny(root, labels={"train": np.zeros((12, 1), np.uint8)}), ["train_labels", "(12, 1)"]),
], ids=["image shape", "label", "label count", "label rank"])
def test_right_checksums_with_wrong_contents(tmp_path, make, words):
    tiny = make(tmp_path)
    with pytest.raises(InputError) as error: tiny.load()
    assert [word for word in words if word not in message(error)] == [] and tiny.left() == []


def test_another_number_of_examples_than_the_entry_says(tiny):
    with pytest.raises(InputError) as error: load(replace(tiny.entry, n_test=6), tiny.root)
    assert "(5, 4, 3, 1)" in message(error) and "(6, 4, 3, 1)" in message(error) and tiny.left() == []


CACHE_HARM = {
    "pixel": ("arrays.npz", lambda p: flip(p, 0.5)), "first byte": ("arrays.npz", lambda p: flip(p, 0.0)), "last byte": ("arrays.npz", lambda p: flip(p, 1.0)),
    "truncated": ("arrays.npz", lambda p: p.write_bytes(p.read_bytes()[:-100])), "empty": ("arrays.npz", lambda p: p.write_bytes(b"")),
    "no arrays": ("arrays.npz", Path.unlink), "no record": ("arrays.json", Path.unlink), "record cut": ("arrays.json", lambda p: p.write_bytes(p.read_bytes()[:-9])),
    "record a list": ("arrays.json", lambda p: p.write_text("[1]")), "record empty": ("arrays.json", lambda p: p.write_text("{}")),
    "record of bytes": ("arrays.json", lambda p: p.write_bytes(b"\xff\xfe")),
    "record of another archive": ("arrays.json", lambda p: p.write_text(json.dumps(json.loads(p.read_text()) | {"sha256": "0" * 64}))),
}


@pytest.mark.parametrize("name, harm", CACHE_HARM.values(), ids=CACHE_HARM)
def test_a_damaged_prepared_copy_is_refused_and_not_mended(prepared, name, harm):
    prepared.put()
    harm(prepared.folder / "prepared" / name)
    for _ in range(2):
        with pytest.raises(InputError) as error: prepared.load()
        assert str(prepared.folder / "prepared") in message(error) and "Delete this folder" in message(error)
    shutil.rmtree(prepared.folder / "prepared")
    prepared.check(prepared.load())


def test_a_copy_prepared_from_other_files_is_refused(prepared):
    with pytest.raises(InputError, match="other files"): load(replace(prepared.entry, files=prepared.entry.files | {FILES[0]: "0" * 64}), prepared.root)


def test_the_data_folder_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError) as error: load("mnist", tmp_path / "file")
    assert str(tmp_path / "file" / "mnist") in message(error) and "data_dir" in message(error)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_the_data_folder_cannot_be_written(tiny, monkeypatch, code):
    def refuse(path, *args, **kwargs): raise OSError(code, os.strerror(code), str(path))
    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(InputError) as error: tiny.load()
    assert os.strerror(code) in message(error) and str(tiny.folder) in message(error) and "$PCNB_DATA" in message(error)


def last_rename(then):
    "An `os.rename` that calls `then(new, final)` where the prepared folder would be put in its place."
    rename = os.rename  # which TFDS calls too
    return lambda new, final: then(new, final) if Path(final).name == "prepared" else rename(new, final)


def fails_full(*args, **kwargs): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_too_little_room_is_seen_before_the_work(tiny, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=100))
    with pytest.raises(InputError, match="no space left"): tiny.load()
    assert tiny.left() == []


@pytest.mark.parametrize("where", ["numpy.savez", "os.rename", "os.replace", "array_record"])
def test_the_disk_fills_up(tiny, monkeypatch, where):
    if where == "array_record":
        import tensorflow_datasets as tfds
        def stopped(self, **kwargs): raise RuntimeError("write() failed: No space left on device")  # what it says on a full disk
        monkeypatch.setattr(tfds.core.GeneratorBasedBuilder, "download_and_prepare", stopped)
    else: monkeypatch.setattr(where, last_rename(fails_full) if where == "os.rename" else fails_full)
    with pytest.raises(InputError) as error: tiny.load()
    assert "No space left on device" in message(error) and str(tiny.folder) in message(error) and tiny.left() == []
    monkeypatch.undo()
    tiny.check(tiny.load())


def test_an_interruption_leaves_nothing(tiny, monkeypatch):
    import tensorflow_datasets as tfds
    def stopped(*args, **kwargs): raise KeyboardInterrupt
    for target, name, change in ((tfds.core.GeneratorBasedBuilder, "download_and_prepare", stopped), (np, "savez", stopped), (os, "rename", last_rename(stopped))):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, change)
            with pytest.raises(KeyboardInterrupt): tiny.load()
        assert tiny.left() == []
    tiny.check(tiny.load())


KILLED = """
import os, pickle, sys
import pcnb.data as data
entry = pickle.load(open(sys.argv[1], "rb"))
rename = os.rename
os.rename = lambda new, final: os._exit(9) if str(final).endswith("prepared") else rename(new, final)  # all is written, nothing is in place
data.load(entry, sys.argv[2])
"""


def test_a_killed_process_leaves_nothing_that_is_trusted(tiny, tmp_path):
    (tmp_path / "entry").write_bytes(pickle.dumps(tiny.entry))
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "entry", tmp_path], env=env, capture_output=True, text=True)
    assert done.returncode == 9, done.stderr
    assert len(tiny.left()) == 1 and tiny.left()[0].startswith(".preparing-")
    tiny.check(tiny.load())


def test_another_process_was_faster(tiny, prepared_once, monkeypatch):
    def lose(new, final):
        shutil.copytree(prepared_once.folder / "prepared", final)
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))
    monkeypatch.setattr(os, "rename", last_rename(lose))
    tiny.check(tiny.load())
    assert tiny.left() == ["prepared"]


def test_preparing_without_tfds(tiny, monkeypatch):
    monkeypatch.setattr(pcnb.data, "_builder_class", pcnb.data._builder_class.__wrapped__)  # not the class of an earlier test
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(InputError) as error: tiny.load()
    assert "tensorflow-datasets" in message(error) and tiny.left() == []


def test_preparing_again_after_the_module_was_reloaded(tiny, monkeypatch):
    for _ in range(2):  # TFDS refuses a second class of the same name, unless it is told not to keep a list of them
        monkeypatch.setattr(pcnb.data, "_builder_class", pcnb.data._builder_class.__wrapped__)
        tiny.check(tiny.load())
        shutil.rmtree(tiny.folder / "prepared")
        monkeypatch.undo()


def test_preparing_is_quiet(tiny, capfd):
    tiny.load()
    assert capfd.readouterr() == ("", "")


# ---- the registry

@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "cifar100"])
def test_addresses_and_checksums_are_those_that_tfds_records(name):
    folder = Path(find_spec("tensorflow_datasets").submodule_search_locations[0]) / "url_checksums"
    rows = [line.split() for line in (folder / f"{name}.txt").read_text().splitlines()]
    assert {row[0]: row[2] for row in rows} == {SETS[name].url + file: sha for file, sha in SETS[name].files.items()}


def test_entries_are_complete():
    for name, entry in SETS.items():
        named = isinstance(entry.classes, tuple)
        assert (len(entry.classes) if named else entry.classes) == {"cifar100": 100, "cifar100_coarse": 20, "tiny_imagenet": 200, "tiny_imagenet_subset": 0}.get(name, 10)
        assert entry.name == name and (not named or len(set(entry.classes)) == len(entry.classes))
        assert all((entry.title, entry.homepage.startswith("http"), entry.citation, entry.licence))
        assert not entry.files or entry.url.endswith("/")


def test_describe(tmp_path, prepared_once):
    part = tmp_path / "mnist"
    part.mkdir()
    for name in FILES[1:]: (part / name).write_bytes(b"")
    (tmp_path / "fashion_mnist/prepared").mkdir(parents=True)
    assert "prepared in" not in describe(tmp_path)  # an empty folder is no prepared set
    (tmp_path / "fashion_mnist/prepared/arrays.json").write_text("{}")
    (tmp_path / "cifar100/cifar-100-binary").mkdir(parents=True)
    digits, mnist, fashion, cifar10, cifar100, coarse, tiny, subset = describe(tmp_path).split("\n\n")
    assert "embedded" in digits and "1,437 train + 360 test, 8x8x1, 10 classes" in digits
    assert str(part) in mnist and SETS["mnist"].url in mnist and "60,000 train + 10,000 test" in mnist
    assert [name in mnist for name in FILES] == [True, False, False, False]
    assert f"prepared in {tmp_path / 'fashion_mnist'}" in fashion and "not here" not in fashion
    assert f"put into {tmp_path / 'cifar10'} from" in cifar10 and "cifar-10-binary.tar.gz, or the folder cifar-10-batches-bin" in cifar10
    assert "200 classes" in tiny and "or the folder tiny-imagenet-*" in tiny
    assert "as many classes as are there" in subset and "not the benchmark" in subset and f"put a folder tiny-imagenet-* into {tmp_path / 'tiny_imagenet'}" in subset
    assert all(f"cifar-100-binary is in {tmp_path / 'cifar100'}" in text and "unverified" in text for text in (cifar100, coarse))
    (part / FILES[0]).write_bytes(b"")
    assert f"files are in {part}" in describe(tmp_path).split("\n\n")[1]


def test_importing_starts_nothing():
    code = ("import sys; net = []; sys.addaudithook(lambda event, args: event.startswith(('socket.connect', 'socket.getaddrinfo')) and net.append(event));"
        "import pcnb.data; print(net + [m for m in sys.argv[1:] if m in sys.modules])")
    heavy = ["tensorflow", "tensorflow_datasets", "sklearn", "matplotlib", "array_record"]
    done = subprocess.run([sys.executable, "-c", code, *heavy], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


# ---- digits

def test_digits_are_all_of_scikit_learn_once():
    from sklearn.datasets import load_digits
    scans, labels = load_digits(return_X_y=True)
    data = load("digits")
    images = np.concatenate([data.train_images, data.test_images])
    found = np.concatenate([data.train_labels, data.test_labels])
    sixteenths = np.round(images.reshape(-1, 64) / 255 * 16)  # one step of the scan is 16 steps of the image: no doubt
    assert abs(images.reshape(-1, 64) - sixteenths * 255 / 16).max() <= 0.5 and images.max() == 255
    def rows(x, y): return sorted((*row, label) for row, label in zip(x.astype(int).tolist(), y.tolist()))
    assert rows(sixteenths, found) == rows(scans, labels)


def test_digits_split_is_the_documented_one():
    data = load("digits")
    n_train, n_test = np.bincount(data.train_labels), np.bincount(data.test_labels)
    assert n_train.sum() == 1437 and n_test.sum() == 360 and (abs(n_test - (n_train + n_test) / 5) < 1).all()
    twin = load("digits")
    assert (twin.train_images == data.train_images).all() and (twin.test_labels == data.test_labels).all()
    assert data.source["verified"] is True


# ---- CIFAR, as a folder or an archive

def cifar_bytes(images, *labels):
    "Records by the description of the binary version: label bytes, then the red, the green and the blue plane, row by row."
    return b"".join(bytes(row) + b"".join(image[..., channel].tobytes() for channel in range(3)) for image, *row in zip(images, *labels))


class Cifar:
    "A set in the form of CIFAR-100, two coarse classes of two fine ones, 8 + 4 images, whose files lie in `root/tiny/tiny-bin`."
    FINE, COARSE = ("ant", "bee", "cat", "dog"), ("insect", "mammal")

    def __init__(self, root):
        rng = np.random.default_rng(0)
        self.root, self.folder, self.unpacked = root, root / "tiny", root / "tiny/tiny-bin"
        self.fine = {"train": np.array([3, 0, 1, 2, 2, 1, 0, 3]), "test": np.array([1, 0, 3, 2])}
        self.images = {part: rng.integers(0, 256, (len(y), 32, 32, 3), np.uint8) for part, y in self.fine.items()}
        self.unpacked.mkdir(parents=True)
        for part, y in self.fine.items(): (self.unpacked / f"{part}.bin").write_bytes(cifar_bytes(self.images[part], y // 2, y))
        (self.unpacked / "fine_label_names.txt").write_text("\n".join(self.FINE) + "\n\n")
        (self.unpacked / "coarse_label_names.txt").write_text("\n".join(self.COARSE) + "\n")
        common = dict(n_train=8, n_test=4, url="http://sets.invalid/tiny/", unpacked="tiny-bin", files={"tiny.tar.gz": "0" * 64})
        self.entry = replace(SETS["cifar100"], name="tiny", classes=self.FINE, **common)
        self.coarse = replace(SETS["cifar100_coarse"], name="tiny_coarse", classes=self.COARSE, files_of="tiny", **common)

    def pack(self, cut=None):
        "Put an archive, cut short if asked, in the place of the folder; the entry knows its checksum."
        path = self.folder / "tiny.tar.gz"
        with tarfile.open(path, "w:gz") as archive: archive.add(self.unpacked, "tiny-bin")
        path.write_bytes(path.read_bytes()[:cut])
        shutil.rmtree(self.unpacked)
        self.entry = replace(self.entry, files={"tiny.tar.gz": hashlib.sha256(path.read_bytes()).hexdigest()})
        return path

    def check(self, data, labels=lambda fine: fine):
        for part, fine in self.fine.items():
            assert (getattr(data, f"{part}_images") == self.images[part]).all() and (getattr(data, f"{part}_labels") == labels(fine)).all()

    def refused(self, entry=None):
        with pytest.raises(InputError) as error: load(entry or self.entry, self.root)
        assert not list(self.root.rglob("*prepar*"))
        return message(error)


@pytest.fixture
def cifar(tmp_path): return Cifar(tmp_path)


def test_a_folder_of_cifar_is_read_and_recorded_as_unverified(cifar):
    for _ in range(2):  # from the files, then from the prepared copy
        data = load(cifar.entry, cifar.root)
        cifar.check(data)
        assert data.source["verified"] is False and "unverified" in data.source["note"] and list(data.source["files"]) == ["tiny-bin/"]
    shutil.rmtree(cifar.folder / "prepared")
    flip(cifar.unpacked / "test.bin", 1.0)  # a pixel, which no check can see, but the record does
    assert load(cifar.entry, cifar.root).source["files"] != data.source["files"]


def test_coarse_labels_come_from_the_same_files(cifar):
    data = load(cifar.coarse, cifar.root)
    cifar.check(data, lambda fine: fine // 2)
    assert data.classes == cifar.COARSE and sorted(p.name for p in cifar.root.iterdir()) == ["tiny", "tiny_coarse"]
    assert [p.name for p in cifar.folder.iterdir()] == ["tiny-bin"]


def test_an_archive_of_cifar_is_verified_and_preferred_to_a_folder(cifar):
    path = cifar.pack()
    cifar.unpacked.mkdir()
    data = load(cifar.entry, cifar.root)
    cifar.check(data)
    assert data.source["verified"] is True and data.source["files"] == cifar.entry.files and "note" not in data.source
    assert sorted(p.name for p in cifar.folder.iterdir()) == ["prepared", "tiny-bin", path.name]


def test_a_missing_archive_is_downloaded(cifar, monkeypatch):
    raw = cifar.pack().read_bytes()
    (cifar.folder / "tiny.tar.gz").unlink()
    asked = serve(monkeypatch, {"tiny.tar.gz": raw}.get)
    cifar.check(load(cifar.entry, cifar.root))
    assert asked == ["http://sets.invalid/tiny/tiny.tar.gz"]


@pytest.mark.parametrize("cut", [0, 10, 1000, -1000])
def test_an_archive_that_stops_half_way_is_refused(cifar, cut):
    path = cifar.pack(cut)
    assert str(path) in cifar.refused() and "get it again" in cifar.refused()  # even if its checksum were right
    changed = replace(cifar.entry, files={"tiny.tar.gz": "0" * 64})
    assert str(path) in cifar.refused(changed) and "SHA-256" in cifar.refused(changed)


def test_an_archive_without_its_folder_is_refused(cifar):
    cifar.pack()
    assert "must hold one folder other-bin" in cifar.refused(replace(cifar.entry, unpacked="other-bin"))


CIFAR_HARM = {
    "truncated": (lambda c: (c.unpacked / "train.bin").write_bytes((c.unpacked / "train.bin").read_bytes()[:-100]), ["train.bin", "24,492 bytes", "3,074", "truncated"]),
    "empty": (lambda c: (c.unpacked / "test.bin").write_bytes(b""), ["test.bin", "holds 0 bytes"]),
    "missing": (lambda c: (c.unpacked / "test.bin").unlink(), ["has no test.bin"]),
    "no names": (lambda c: (c.unpacked / "coarse_label_names.txt").unlink(), ["has no coarse_label_names.txt"]),
    "other classes": (lambda c: (c.unpacked / "fine_label_names.txt").write_text("ant bee cat"), ["names 3 classes", "tiny has 4", "another set"]),
    "a class twice as large": (lambda c: (c.unpacked / "test.bin").write_bytes(cifar_bytes(c.images["test"], [0] * 4, [0, 0, 1, 2])), ["equally large", "0 to 2", "test.bin"]),
    "label": (lambda c: (c.unpacked / "test.bin").write_bytes(cifar_bytes(c.images["test"], [0] * 4, [0, 1, 2, 99])), ["equally large", "0 to 1"]),
    "only half": (lambda c: (c.unpacked / "train.bin").write_bytes(cifar_bytes(c.images["test"], [0] * 4, range(4))), ["(4, 32, 32, 3)", "(8, 32, 32, 3)"]),
}


@pytest.mark.parametrize("harm, words", CIFAR_HARM.values(), ids=CIFAR_HARM)
def test_a_folder_of_cifar_that_is_not_whole_is_refused(cifar, harm, words):
    harm(cifar)
    text = cifar.refused()
    assert [word for word in words if word not in text] == []


def test_the_folder_of_another_set_is_refused(cifar):
    other = replace(SETS["cifar10"], name="tiny", unpacked="tiny-bin", files=cifar.entry.files)
    assert "has no data_batch_1.bin" in cifar.refused(other) and "another set" in cifar.refused(other)
    for name in ("data_batch_1.bin", "test_batch.bin"): (cifar.unpacked / "train.bin").rename(cifar.unpacked / name) and shutil.copy(cifar.unpacked / name, cifar.unpacked / "train.bin")
    (cifar.unpacked / "batches.meta.txt").write_text("\n".join(SETS["cifar10"].classes))
    renamed = replace(other, read=functools.partial(other.read, train=("data_batch_1.bin",)))
    assert "data_batch_1.bin holds 24,592 bytes" in cifar.refused(renamed) and "3,073" in cifar.refused(renamed)


def test_a_folder_without_permission(cifar, monkeypatch):
    def deny(path): raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    monkeypatch.setattr(Path, "iterdir", deny)
    with pytest.raises(InputError) as error: load(cifar.entry, cifar.root)
    assert "Permission denied" in message(error) and str(cifar.folder) in message(error)
    monkeypatch.undo()
    assert not list(cifar.root.rglob("*prepar*"))


@pytest.mark.parametrize("name, prepared", [("train.bin", False), ("arrays.json", True), ("arrays.npz", True)])
def test_a_file_without_permission(name, prepared, cifar, monkeypatch):
    "It is named, and nobody is told to delete what he may not read."
    if prepared: load(cifar.entry, cifar.root)
    before = sorted(cifar.root.rglob("*"))
    def denied(real):
        def call(path, *args, **kwargs):
            if Path(path).name == name: raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return real(path, *args, **kwargs)
        return call
    with monkeypatch.context() as patch:
        for owner, function in ((Path, "read_bytes"), (Path, "read_text"), (builtins, "open")): patch.setattr(owner, function, denied(getattr(owner, function)))
        with pytest.raises(InputError) as error: load(cifar.entry, cifar.root)
    assert name in message(error) and "Permission denied" in message(error) and "elete" not in message(error)
    assert sorted(cifar.root.rglob("*")) == before
    cifar.check(load(cifar.entry, cifar.root))


@given(st.integers(1, 4), st.integers(1, 2), st.integers(0, 2**32 - 1))
def test_cifar_round_trip(tmp_path_factory, n, n_labels, seed):
    rng, path = np.random.default_rng(seed), tmp_path_factory.getbasetemp() / "round.bin"
    images, labels = rng.integers(0, 256, (n, 32, 32, 3), np.uint8), rng.integers(0, 256, (n, n_labels), np.uint8)
    path.write_bytes(cifar_bytes(images, *labels.T))
    back, found = read_cifar(path, n_labels)
    assert back.dtype == np.uint8 and back.shape == images.shape and (back == images).all() and (found == labels).all()


# ---- Tiny ImageNet

def jpeg_bytes(colour, size=(64, 64), mode="RGB"):
    out = io.BytesIO()
    PIL.Image.new(mode, size, colour).save(out, "JPEG", quality=95)
    return out.getvalue()


class TinyImages:
    "A set in the form of Tiny ImageNet: two classes of 3 + 2 images of one colour each, the first one grey, in `root/tiny/tiny-imagenet-2`."
    WNIDS = ("n02", "n01")  # not sorted, as in the official file

    def __init__(self, root):
        self.root, self.folder, self.unpacked = root, root / "tiny", root / "tiny/tiny-imagenet-2"
        colours = np.random.default_rng(0).integers(0, 256, (2, 5, 3), np.uint8)
        colours[0, 0] = 77
        self.colours = {"train": colours[:, :3], "test": colours[:, 3:]}
        (self.unpacked / "val/images").mkdir(parents=True)
        notes = []
        for wnid, own in zip(self.WNIDS, colours):
            (self.unpacked / "train" / wnid / "images").mkdir(parents=True)
            for k, colour in enumerate(own[:3]): self.jpeg("train", wnid, k).write_bytes(jpeg_bytes(77, mode="L") if colour.tolist() == [77] * 3 else jpeg_bytes(tuple(colour.tolist())))
            for k, colour in enumerate(own[3:]):
                (self.unpacked / f"val/images/{wnid}{k}.JPEG").write_bytes(jpeg_bytes(tuple(colour.tolist())))
                notes.append(f"{wnid}{k}.JPEG\t{wnid}\t0\t0\t62\t62\n")
        (self.unpacked / "val/val_annotations.txt").write_text("".join(notes))
        (self.unpacked / "wnids.txt").write_text("n02\nn01\n")
        (self.unpacked / "words.txt").write_text("n00\tnothing\nn01\tgoldfish, Carassius auratus\nn02\tcrane\n")
        read = functools.partial(SETS["tiny_imagenet"].read, n_train=3, n_test=2)
        self.entry = replace(SETS["tiny_imagenet"], name="tiny", classes=2, n_train=6, n_test=4, read=read, url="http://sets.invalid/tiny/", files={"tiny.zip": "0" * 64})
        self.subset = replace(SETS["tiny_imagenet_subset"], name="tiny_subset", read=read, files_of="tiny")

    def jpeg(self, part, wnid, k): return self.unpacked / part / wnid / f"images/{wnid}_{k}.JPEG"

    def check(self, data):
        for part, colours in self.colours.items():
            images, labels = getattr(data, f"{part}_images"), getattr(data, f"{part}_labels")
            assert images.shape == (len(labels), 64, 64, 3) and labels.tolist() == [0, 1] * colours.shape[1]  # in rounds of one of each class
            assert abs(images - colours.swapaxes(0, 1).reshape(-1, 1, 1, 3).astype(float)).max() < 6  # JPEG loses a little

    refused = Cifar.refused


@pytest.fixture
def photos(tmp_path): return TinyImages(tmp_path)


def test_a_folder_of_tiny_imagenet(photos):
    for _ in range(2):
        data = load(photos.entry, photos.root)
        photos.check(data)
        assert data.classes == ("n02 crane", "n01 goldfish") and data.source["classes"] == 2 and data.source["verified"] is False
    assert np.ptp(data.train_images[0], axis=-1).max() == 0  # grey: three equal channels


def test_a_zip_of_tiny_imagenet(photos):
    raw = Path(shutil.make_archive(photos.folder / "tiny", "zip", photos.folder, "tiny-imagenet-2")).read_bytes()
    shutil.rmtree(photos.unpacked)
    entry = replace(photos.entry, files={"tiny.zip": hashlib.sha256(raw).hexdigest()})
    data = load(entry, photos.root)
    photos.check(data)
    assert data.source["verified"] is True
    shutil.rmtree(photos.folder / "prepared")
    for cut in (0, 100, len(raw) // 2, len(raw) - 1):  # even if its checksum were right
        (photos.folder / "tiny.zip").write_bytes(raw[:cut])
        text = photos.refused(replace(entry, files={"tiny.zip": hashlib.sha256(raw[:cut]).hexdigest()}))
        assert "tiny.zip" in text and "get it again" in text
        assert "SHA-256" in photos.refused(entry)


def test_tiny_imagenet_streams_the_same_batches(photos):
    "From its files: as arrays and as records, both parts, and what is made of them."
    held, streamed = load(photos.entry, photos.root), load(photos.entry, photos.root, stream=True)
    assert isinstance(streamed.train_images, Records) and streamed.train_images.shape == held.train_images.shape and streamed.source == held.source
    order = np.random.default_rng(0).permutation(len(held.train_labels))
    got = list(batches(streamed.train_images, order, 2))
    assert len(got) == len(order) // 2 == 3
    for i, images in enumerate(got): np.testing.assert_array_equal(images, held.train_images[order[2 * i:2 * i + 2]])
    np.testing.assert_array_equal(streamed.test_images[:], held.test_images)
    for part in ("train_labels", "test_labels"): np.testing.assert_array_equal(getattr(streamed, part), getattr(held, part))
    np.testing.assert_array_equal(streamed.moments(), held.moments())
    a, b = (d.take(5).validation(2).train_images[:] for d in (streamed, held))
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("changes", [(AlternatingFlip(), Crop(4), Cutout(8, jnp.zeros(3)), Mixup(0.5)), (Flip(), Affine(2, 8.0, 0.08), CutMix(1.0))], ids=["mixup", "cutmix"])
def test_tiny_imagenet_trains_the_same_both_ways(changes, photos):
    "Streamed or held: the same weights and the same score."
    runs = []
    for stream in (False, True):
        data = load(photos.entry, photos.root, stream=stream)
        net = mlp(data.image_shape, data.n_classes, 4, 2, key=jax.random.key(0))
        runs.append(fit(net, Backprop(), optax.sgd(1e-3), data, 3, 2, augment=Compose(*changes), progress=False))
    held, streamed = runs
    start = jax.tree.leaves(net)
    for a, b, before in zip(jax.tree.leaves(held.net), jax.tree.leaves(streamed.net), start, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
        if before.size: assert np.abs(a - before).max() > 1e-4
    assert [m["loss"] for m in held.metrics] == pytest.approx([m["loss"] for m in streamed.metrics], rel=1e-5)
    assert [m["test_top1"] for m in held.metrics] == [m["test_top1"] for m in streamed.metrics]


def test_records_are_indexed_as_an_array_is(photos):
    held, images = (load(photos.entry, photos.root, stream=stream).train_images for stream in (False, True))
    n = len(held)
    for index in (0, n - 1, slice(2, 5), slice(0), [3, 3, 1], np.arange(n)[::-1], jnp.array([1, 0])): np.testing.assert_array_equal(images[index], held[index])
    assert images[slice(0)].shape == (0, *held.shape[1:])
    chosen = images.select(np.array([4, 2, 0]))
    np.testing.assert_array_equal(chosen[1:], held[[2, 0]])
    assert len(chosen) == 3 and chosen.shape == (3, *held.shape[1:]) and chosen.dtype == np.uint8


def test_streams_that_cannot_be(photos):
    with pytest.raises(InputError, match="leave out stream"): load("digits", stream=True)
    load(photos.entry, photos.root)
    records = photos.root / photos.entry.name / "prepared" / "tfds"
    shutil.rmtree(records)
    assert load(photos.entry, photos.root).n_classes  # arrays do not need them
    with pytest.raises(InputError, match="cannot be trusted.*Delete this folder"): load(photos.entry, photos.root, stream=True)
    class Floats(list):
        def __getitem__(self, i): return {"image": np.zeros((2, 2, 1), np.float32)}
    with pytest.raises(InputError, match="float32"): Records(Floats([1]))


def test_a_part_of_the_classes_is_not_the_benchmark(photos):
    entry = replace(photos.entry, classes=3, n_train=9, n_test=6)
    text = photos.refused(entry)
    assert "has 2 classes, but tiny has 3" in text and "tiny_imagenet_subset" in text
    data = load(photos.subset, photos.root)
    photos.check(data)
    assert data.name == "tiny_subset" and data.source["set"] == "tiny_subset" and data.source["classes"] == 2 and data.source["verified"] is False
    photos.unpacked.rename(photos.folder / "elsewhere")
    assert load(photos.subset, photos.root).source == data.source  # from the prepared copy
    shutil.rmtree(photos.root / "tiny_subset/prepared")
    assert "needs one folder tiny-imagenet-*" in photos.refused(photos.subset)


TINY_HARM = {
    "truncated image": (lambda p: p.jpeg("train", "n01", 1).write_bytes(p.jpeg("train", "n01", 1).read_bytes()[:-20]), ["n01_1.JPEG", "truncated", "get it again"]),
    "empty image": (lambda p: p.jpeg("train", "n02", 2).write_bytes(b""), ["n02_2.JPEG", "no JPEG file"]),
    "web page": (lambda p: (p.unpacked / "val/images/n020.JPEG").write_bytes(b"<html>"), ["n020.JPEG", "no JPEG file"]),
    "png": (lambda p: PIL.Image.new("RGB", (64, 64)).save(p.jpeg("train", "n01", 0), "PNG"), ["n01_0.JPEG", "no JPEG file"]),
    "other size": (lambda p: p.jpeg("train", "n01", 2).write_bytes(jpeg_bytes((1, 2, 3), (32, 64))), ["n01_2.JPEG", "64x32", "64x64"]),
    "ink": (lambda p: p.jpeg("train", "n01", 2).write_bytes(jpeg_bytes((1, 2, 3, 4), mode="CMYK")), ["n01_2.JPEG", "CMYK"]),
    "missing image": (lambda p: p.jpeg("train", "n01", 2).unlink(), ["2 training images of the class n01", "have 3"]),
    "missing validation image": (lambda p: (p.unpacked / "val/images/n011.JPEG").unlink(), ["n011.JPEG"]),
    "missing annotation": (lambda p: (p.unpacked / "val/val_annotations.txt").write_text("n020.JPEG\tn02\nn021.JPEG\tn02\n"), ["0 validation images of the class n01", "have 2"]),
    "unknown class": (lambda p: (p.unpacked / "val/val_annotations.txt").write_text("n020.JPEG\tn03\n"), ["val_annotations.txt", "n03", "not in wnids.txt"]),
    "no words": (lambda p: (p.unpacked / "words.txt").unlink(), ["has no words.txt"]),
    "words without a tab": (lambda p: (p.unpacked / "words.txt").write_text("n01\tcat\nn02 dog\n"), ["Line 2 of", "words.txt", "'n02 dog'", "parted by a tab"]),
    "blank annotation": (lambda p: (p.unpacked / "val/val_annotations.txt").write_text("\n"), ["Line 1 of", "val_annotations.txt", "two columns"]),
    "classes are no text": (lambda p: (p.unpacked / "wnids.txt").write_bytes(b"\xff\xfe"), ["wnids.txt is not text", "get it again"]),
    "missing class": (lambda p: shutil.rmtree(p.unpacked / "train/n01"), ["not the 2 classes"]),
    "two folders": (lambda p: shutil.copytree(p.unpacked, p.folder / "tiny-imagenet-3"), ["needs one folder", "there are 2", "tiny-imagenet-2, tiny-imagenet-3"]),
    "folder of another set": (lambda p: shutil.rmtree(p.unpacked / "val") or (p.unpacked / "val").mkdir(), ["has no val/images", "another set"]),
}


@pytest.mark.parametrize("harm, words", TINY_HARM.values(), ids=TINY_HARM)
def test_a_folder_of_tiny_imagenet_that_is_not_whole_is_refused(photos, harm, words):
    harm(photos)
    text = photos.refused()
    assert [word for word in words if word not in text] == []


def test_every_cut_of_a_jpeg_file_is_refused(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "x.JPEG"
    PIL.Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(path)
    raw, whole = path.read_bytes(), read_jpeg(path, 8, 8)
    assert whole.shape == (8, 8, 3) and (whole == np.asarray(PIL.Image.open(path))).all()
    for cut in range(0, len(raw), 5):
        path.write_bytes(raw[:cut])
        with pytest.raises(InputError) as error: read_jpeg(path, 8, 8)
        assert str(path) in message(error)


# ---- scaling

IMAGES = st.sampled_from([(4, 3, 1), (1, 5, 3)]).flatmap(lambda shape: hnp.arrays(np.uint8, shape))  # few shapes: each is compiled


@given(IMAGES, st.floats(-1, 1, width=32), st.floats(0.125, 2, width=32))
def test_scale_is_the_formula(image, mean, std):
    channels = image.shape[-1]
    scale = Scale(np.full(channels, mean) + np.arange(channels), np.full(channels, std))
    expected = (image / 255 - mean - np.arange(channels)) / std  # in double precision
    out = scale(jnp.asarray(image))
    assert out.dtype == jnp.float32 and out.shape == image.shape
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(jax.jit(lambda x: scale(x))(image), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(scale(jnp.asarray(image / 255, jnp.float32)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mean, std", [([0.5], [0.0]), ([0.5], [-1.0]), ([0.5], [np.nan]), ([np.inf], [1.0]), ([0.5, 0.5], [1.0]), (0.5, 1.0), ([], [np.inf])])
def test_scale_refuses_bad_moments(mean, std):
    with pytest.raises(InputError) as error: Scale(mean, std)
    assert "`mean`" in message(error) and "`std`" in message(error)


@pytest.mark.parametrize("image", [np.zeros((2, 2, 1), np.int32), np.zeros((2, 2, 3), np.uint8), np.zeros((5, 2, 2, 1), np.uint8), np.zeros((2, 1), np.uint8)])
def test_scale_refuses_other_images(image):
    for scale in (Scale([0.5], [1.0]), jax.jit(lambda x: Scale([0.5], [1.0])(x))):
        with pytest.raises(InputError, match="image"): scale(image)


# ---- whitened patches

def colours(n=40, side=9, channels=3, dtype=np.uint8):
    "Images whose neighbouring pixels and channels are alike."
    rng = np.random.default_rng(1)
    images = rng.normal(size=(n, side, side, channels)).cumsum(1).cumsum(2) + rng.normal(size=(n, side, side, 1)) * 3
    images = np.clip(128 + 12 * images, 0, 255).astype(np.uint8) if dtype == np.uint8 else images.astype(dtype)
    return Dataset("toy", images, np.arange(n) % 2, images[:2], np.arange(2), ("a", "b"))


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("size, directions", [(3, 16), (3, 27), (1, 3), (5, 4)])
def test_whitened_patches_have_the_identity_as_second_moments(dtype, size, directions):
    data = colours(450, dtype=dtype)  # more than are looked at in a slice
    white, edge = whiten(data, directions, size), size // 2
    out = np.asarray(jax.vmap(white)(data.train_images), np.float64)
    assert out.shape == (450, 9, 9, 2 * directions)
    np.testing.assert_array_equal(out[..., directions:], -out[..., :directions])
    inside = out[:, edge:9 - edge, edge:9 - edge, :directions].reshape(-1, directions)
    np.testing.assert_allclose(inside.T @ inside / len(inside), np.eye(directions), atol=5e-3)


def test_a_whitened_pixel_is_its_patch_projected():
    "By loops, the mean colour around the image; and the directions are the leading ones: no others of one length hold more of a patch."
    data = colours()
    white, scale = whiten(data, 16), Scale(*data.moments())
    x = np.pad(np.asarray(scale(jnp.asarray(data.train_images[3])), np.float64), ((1, 1), (1, 1), (0, 0)))
    out, kernel = np.asarray(white(jnp.asarray(data.train_images[3]))), np.asarray(white.kernel, np.float64)
    for i, j in ((0, 0), (4, 7), (8, 8)):
        want = [np.sum(x[i:i + 3, j:j + 3] * kernel[..., k]) for k in range(16)]
        np.testing.assert_allclose(out[i, j, :16], want, rtol=1e-4, atol=1e-4)
    rows = kernel.reshape(27, 16)
    lengths = 1 / np.linalg.norm(rows, axis=0)  # the square roots of the eigenvalues
    np.testing.assert_allclose((rows * lengths).T @ (rows * lengths), np.eye(16), atol=1e-5)
    all_lengths = 1 / np.linalg.norm(np.asarray(whiten(data, 27).kernel).reshape(27, 27), axis=0)
    np.testing.assert_allclose(lengths, np.sort(all_lengths)[::-1][:16], rtol=1e-4)


@pytest.mark.parametrize("directions, size, said", [(28, 3, "directions"), (0, 3, "directions"), (4, 2, "size is 2"), (4, 11, "size is 11"), (4, -1, "size is -1")])
def test_whitening_that_cannot_be(directions, size, said):
    with pytest.raises(InputError, match=said): whiten(colours(), directions, size)


def test_patches_that_do_not_vary_are_said():
    grey = colours()
    grey = replace(grey, train_images=np.repeat(grey.train_images[..., :1], 3, -1))  # three equal channels: 9 directions
    with pytest.raises(InputError, match="vary in 9 directions only"): whiten(grey, 16)
    assert whiten(grey, 9).kernel.shape == (3, 3, 3, 9)


# ---- the real thing

@pytest.mark.skipif("PCNB_DATA_TEST" not in os.environ, reason="PCNB_DATA_TEST does not name a folder with mnist/*.gz")
def test_mnist(tmp_path):
    (tmp_path / "mnist").mkdir()
    for name in FILES: shutil.copy(Path(os.environ["PCNB_DATA_TEST"]) / "mnist" / name, tmp_path / "mnist")
    first, later = load("mnist", tmp_path), load("mnist", tmp_path)
    for data in (first, later):  # facts about MNIST from its literature
        assert data.train_labels[:5].tolist() == [5, 0, 4, 1, 9] and data.test_labels[:5].tolist() == [7, 2, 1, 0, 4]
        assert np.bincount(data.train_labels).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
        np.testing.assert_allclose(np.concatenate(data.moments()), [0.1307, 0.3081], atol=5e-5)
    assert (read_idx(tmp_path / "mnist" / FILES[2])[..., None] == later.test_images).all()


def test_streaming_without_the_packages_and_missing_pictures_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(InputError, match="Streaming an image set needs the package grain"): pcnb.data.batches(None, np.arange(4), 2)
    with pytest.raises(InputError, match="gone.JPEG is missing"): pcnb.data.read_jpeg(tmp_path / "gone.JPEG", 64, 64)
