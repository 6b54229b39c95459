"""A checkpoint from elsewhere cannot run code, and a damaged one is named."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from emu2_megatron.checkpoint import metadata
from emu2_megatron.errors import CheckpointError


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_code_is_refused_and_not_run(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps({"a": Evil(tmp_path / "made")}))
    with pytest.raises(CheckpointError, match="mkdir"):
        metadata.table(tmp_path)
    assert not (tmp_path / "made").exists()


def test_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps({"state_dict_metadata": {}}))
    with pytest.raises(CheckpointError, match="not a table of contents that torch wrote: it is a dict"):
        metadata.table(tmp_path)


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    info = _StorageInfo("../secret", 0, 1)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Metadata({}, storage_data={MetadataIndex("a"): info})))
    assert metadata.shapes(metadata.table(tmp_path)) == {}
    assert metadata.table(tmp_path, ["../secret"]).storage_data is not None
    with pytest.raises(CheckpointError, match="it refers to ../secret, which is no file of this checkpoint"):
        metadata.table(tmp_path, ["__0_0.distcp"])


@pytest.mark.parametrize("content", [b"", b"\x80\x04", b"no pickle", b"\x80\x05\x95\xff\xff\xff\xff\xff\xff\xff\xff"])
def test_damage_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"\.metadata"):
        metadata.table(tmp_path)


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        metadata.table(tmp_path)
