"""`emu2 data inspect` as a user runs it."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from emu2_megatron.data.shards import RawSample, write_shard

REPOSITORY = Path(__file__).parents[2]


def emu2(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "emu2_megatron.cli", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_a_page_of_any_data(tmp_path: Path, make_png: Callable[..., bytes]) -> None:
    """Also where half of the samples are bad, which would end a training run."""
    good = [
        RawSample(f"good{i}", {"kind": "caption", "text": "the whale", "image": "0.png"}, {"0.png": make_png()})
        for i in range(80)
    ]
    write_shard(tmp_path / "0.tar", [*good, *(RawSample(f"bad{i}", {"kind": "none"}) for i in range(80))])
    asked = ("data", "inspect", "--config", "tiny_interleaved", f"data.shards=[{tmp_path}/0.tar]")
    done = emu2(*asked, "--output", str(tmp_path / "new" / "page.html"), "--rows", "20")
    assert done.returncode == 0, done.stderr
    warning = done.stderr.splitlines()[-1]
    assert warning.startswith("emu2: ") and " of the 160 samples cannot be used" in warning
    assert warning.endswith("Training would end: data.max_bad_share is 0.05")
    page = (tmp_path / "new" / "page.html").read_text(encoding="utf-8")
    assert page.count("Row ") >= 20 and "20 packed sequences" in page
    assert "good1" in page and "data:image/" in page and "skipped: sample does not follow the format" in page

    wrong = emu2(*asked, "--rows", "0")
    assert wrong.returncode == 2 and wrong.stderr == "emu2: --rows: 0; legal: 1 or more\n"
