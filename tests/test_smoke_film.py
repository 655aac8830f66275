"""Films of smoke: what a picture shows, interruption, and the command."""

import itertools
import sys

import numpy as np
import pytest

from solvers import smoke_film

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_smoke_and_solids_are_seen_where_they_are():
    density, solid = np.zeros((32, 32, 32)), np.zeros((32, 32, 32), bool)
    solid[20:28, 12:20, 4:12] = True
    density[4:10, 12:20, 20:26] = 1.0
    image = smoke_film.rendered(density, solid)
    assert image.shape == (128, 128) and image.min() == 0 and image.max() <= 1
    rows, columns = 127 - 4 * 23, 4 * 7  # the middle of the smoke, rows from the top
    assert image[rows, columns] > 0.5 and image[127 - 4 * 8, 4 * 24] > 0.2
    assert image[4, 4] == 0 and image[rows, 4 * 24] == 0
    behind = density.copy()
    behind[20:28, 24:30, 4:12] = 1.0  # behind the solid
    hidden = (slice(127 - 4 * 11, 127 - 4 * 5), slice(4 * 21, 4 * 27))  # but for the soft edge
    np.testing.assert_allclose(smoke_film.rendered(behind, solid)[hidden], image[hidden], atol=0.01)
    assert np.abs(smoke_film.rendered(behind[:, ::-1], solid)[hidden] - image[hidden]).min() > 0.1
    flat = smoke_film.rendered(density[:, 14], solid[:, 14])
    assert flat[rows, columns] > 0.9 and flat[4, 4] == 0


FILM = dict(cells=16, dimensions=2, frames=7, every=2)


def test_an_interrupted_film_goes_on_to_the_same_files(tmp_path, monkeypatch):
    from PIL import Image

    whole = smoke_film.film(tmp_path / "whole", solids="paddle", **FILM)
    count = itertools.count()

    def rendered(*given):
        if next(count) == 5:
            raise KeyboardInterrupt
        return draw(*given)

    draw = smoke_film.rendered
    monkeypatch.setattr(smoke_film, "rendered", rendered)
    with pytest.raises(KeyboardInterrupt):
        smoke_film.film(tmp_path / "parts", solids="paddle", **FILM)
    assert [p.name for p in (tmp_path / "parts").iterdir()] == ["state.npz"]
    parts = smoke_film.film(tmp_path / "parts", solids="paddle", **FILM)
    assert next(count) == 5 + 1 + 3  # after four frames were written, three more
    for a, b in zip(whole, parts, strict=True):
        assert a.read_bytes() == b.read_bytes()
    with Image.open(parts[1]) as animation:
        assert animation.n_frames == 7 and animation.size == (200, 200)
    assert sorted(p.name for p in (tmp_path / "parts").iterdir()) == ["smoke.gif", "smoke.png", "state.npz"]
    with pytest.raises(ValueError, match=r"state.npz is of a run with .*'seed': 0.*expected .*'seed': 1"):
        smoke_film.film(tmp_path / "parts", solids="paddle", seed=1, **FILM)
    (tmp_path / "parts" / "state.npz").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"film: .*state.npz is not a file of film"):
        smoke_film.film(tmp_path / "parts", solids="paddle", **FILM)


def test_a_missing_matplotlib_is_said_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"film: pictures are drawn with matplotlib; pip install"):
        smoke_film.film(tmp_path, **FILM)
    assert list(tmp_path.iterdir()) == []


def test_the_command(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "made"
    command = [
        "smoke_film",
        "--cells",
        "16",
        "--dimensions",
        "2",
        "--frames",
        "3",
        "--solids",
        "ball",
        "--out",
        str(folder),
    ]
    monkeypatch.setattr("sys.argv", command)
    smoke_film.main()
    assert "written:" in capsys.readouterr().out and (folder / "smoke.gif").is_file()
    with pytest.raises(ValueError, match=r"solids: got 'cube', expected one of"):
        smoke_film.places(16, 2, 3, "cube")
