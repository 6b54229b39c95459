"""Samples that cannot be used: counted by reason, listed once each in a file; too many of them end the run."""

import json
import logging
import math
from collections import Counter
from pathlib import Path
from typing import Any

from emu2_megatron.data.samples import reason_of
from emu2_megatron.errors import DataError

logger = logging.getLogger(__name__)

ENOUGH = 100
"""Samples that have to be read before their share of bad ones means anything."""


HINTS = {
    "longer than the context": "raise data.sequence_length, or make the shards with a smaller --max-tokens",
    "vocabulary has no": "data.tokenizer or model.preset is not the one this kind of data is for",
}
"""Beginning of a reason to what can be done about most samples being bad for it."""


class Quarantine:
    """The bad samples that one rank has met.

    Args:
        file: JSON lines, one a sample: shard, key, byte at which it begins, reason and the whole message; appended to.
            None writes none.
        max_share: of the samples read; more bad ones end the run.
    """

    def __init__(self, file: Path | None, max_share: float) -> None:
        self.file, self.max_share = file, max_share
        self.read = self.bad = 0
        self.reasons: Counter[str] = Counter()
        self._listed: set[tuple[str, str]] = set()

    def good(self) -> None:
        """One more sample was read and is fine, so far."""
        self.read += 1

    def add(self, shard: str, offset: int, key: str, error: DataError, new: bool = True) -> None:
        """One more cannot be used.

        Args:
            shard, offset: where it is, -1 for a byte that is not known.
            key: its name, or what stands for it as long as it cannot be read; unique in the shard.
            error: what is wrong, "reason: detail".
            new: whether it has not been counted by `good` before.

        Raises:
            DataError: too many are bad.
        """
        reason = reason_of(error)
        self.read += new
        self.bad += 1
        self.reasons[reason] += 1
        if (shard, key) not in self._listed:
            self._listed.add((shard, key))
            logger.warning("skipped sample %s of %s: %s", key, shard, error)
            self._write({"shard": shard, "key": key, "byte": offset, "reason": reason, "error": str(error)})
        # Five standard deviations beyond the share: thousands of ranks look at every read, and chance must end none.
        allowed = self.max_share * self.read
        if self.read >= ENOUGH and self.bad > allowed + 5 * math.sqrt(allowed * (1 - self.max_share)):
            where = f"; they are listed in {self.file}" if self.file else ""
            raise DataError(
                f"data.max_bad_share: {self.bad} of {self.read} samples cannot be used, allowed is a share of "
                f"{self.max_share:g} ({_listed(self.reasons)}){where}{_hint(self.reasons)}"
            )

    @property
    def distinct(self) -> int:
        """How many samples are bad, however often they were met."""
        return len(self._listed)

    def _write(self, entry: dict[str, Any]) -> None:
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(entry) + "\n")


def _hint(reasons: Counter[str]) -> str:
    most = max(reasons, key=lambda reason: reasons[reason])
    return next((f"; {hint}" for start, hint in HINTS.items() if most.startswith(start)), "")


def _listed(reasons: Counter[str]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
