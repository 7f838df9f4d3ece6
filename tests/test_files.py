import pytest

from minillm.files import replacing, write_atomically


def test_a_failure_leaves_the_old_content_and_no_litter(tmp_path):
    path = tmp_path / "folder" / "file.txt"
    write_atomically(path, "old")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half of the new")
        raise RuntimeError("killed")
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]
    write_atomically(path, b"new")
    assert path.read_text() == "new" and list(path.parent.iterdir()) == [path]
