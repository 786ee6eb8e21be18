"""An output folder appears whole or not at all, and a disk that is too small is told before any work."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_export.errors import EnvironmentUnusable
from lora_export.staging import require_disk, staging


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    out = tmp_path / "deep" / "er" / "out"
    with staging(out, overwrite=False, n_bytes=1) as stage:
        (stage / "file").write_text("x")
        assert not out.exists()
    assert [path.name for path in out.iterdir()] == ["file"]
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    with pytest.raises(ZeroDivisionError), staging(tmp_path / "other", overwrite=False, n_bytes=1):
        _ = 1 / 0
    assert not (tmp_path / "other").exists()


def test_a_parent_that_is_a_file_is_an_environment_error(tmp_path):
    (tmp_path / "file").write_text("")
    build = staging(tmp_path / "file" / "out", overwrite=False, n_bytes=1)
    with pytest.raises(EnvironmentUnusable, match="The output folder cannot be written"), build:
        pass


def test_the_free_disk_is_told(tmp_path):
    require_disk(tmp_path, 1)
    with pytest.raises(EnvironmentUnusable, match="The disk is too small for this export") as refused:
        require_disk(Path(tmp_path), 10**18)
    assert refused.value.expected == "1,000,000,000,000 MB free"


def test_a_failure_leaves_no_folders_that_were_made_for_it(tmp_path):
    (tmp_path / "there").mkdir()
    for out in (tmp_path / "deep" / "er" / "out", tmp_path / "there" / "deep" / "out"):
        with pytest.raises(ZeroDivisionError), staging(out, overwrite=False, n_bytes=1):
            _ = 1 / 0
        with (
            pytest.raises(EnvironmentUnusable, match="The disk is too small"),
            staging(out, overwrite=False, n_bytes=10**18),
        ):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["there"] and not any((tmp_path / "there").iterdir())
    with pytest.raises(ZeroDivisionError), staging(tmp_path / "new" / "out", overwrite=False, n_bytes=1):
        (tmp_path / "new" / "other").touch()  # another's, made meanwhile
        _ = 1 / 0
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["other"]
