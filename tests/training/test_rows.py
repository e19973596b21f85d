import numpy as np

from training.rows import Rows


def test_rows_are_read_from_the_file_when_they_are_asked_for(tmp_path):
    images = np.lib.format.open_memmap(tmp_path / "images.npy", "w+", np.uint8, (20, 4, 6, 3))
    images[:] = np.arange(20, dtype=np.uint8)[:, None, None, None]
    rows = Rows(images, np.array([3, 17, 5]))

    assert (len(rows), rows.shape) == (3, (3, 4, 6, 3))
    assert rows[1].shape == (4, 6, 3)
    assert [block[:, 0, 0, 0].tolist() for block in (rows[0:2], rows[np.array([2, 2])])] == [[3, 17], [5, 5]]
    images[17] = 99
    assert rows[1].max() == 99
