"""Visual embeddings computed beforehand, as members `KEY.NAME.safetensors` of a shard.

They stand where a picture's file stood; `emu2 embed` puts them there (`training/embed.py`). The sample's JSON then has
`"emu2_encoder"`: the fingerprint of the encoder they are from.
"""

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from emu2_megatron.config.schema import Config
from emu2_megatron.data.sequence import Features
from emu2_megatron.data.shards import RawSample
from emu2_megatron.errors import DataError, FeaturesError
from emu2_megatron.platform.precision import DTYPES

EXTENSION = "safetensors"
"""What a member with features ends with."""
ENCODER = "emu2_encoder"
"""Field of the sample's JSON: the fingerprint of the encoder, `model/parameters.fingerprint`."""


def to_bytes(rows_QE: torch.Tensor) -> bytes:
    """A picture's visual embeddings [Q, E] as the content of a member."""
    return save({"rows_QE": rows_QE.contiguous()})


def read_features(raw: RawSample, name: str, config: Config) -> Features:
    """The features in member `name` of a sample.

    Raises:
        DataError: they cannot be read or have the wrong width; `"reason: detail"`.
        FeaturesError: they are sound and made for another configuration: skipping them would skip all of them.
    """
    try:
        rows_QE = load(raw.files[name])["rows_QE"]
    except (SafetensorError, KeyError) as error:
        raise DataError(f"features cannot be read: {raw.key}.{name}: {error}") from error
    if rows_QE.ndim != 2:
        raise DataError(f"features cannot be read: {raw.key}.{name}: shape {list(rows_QE.shape)}, wanted [Q, E]")
    encoder = raw.meta.get(ENCODER)
    if not isinstance(encoder, str):
        raise DataError(f"features cannot be read: {raw.key}.json does not name their {ENCODER}")
    queries, width = config.model.image_queries, config.model.encoder.hidden_size
    dtype = DTYPES[config.training.precision]
    for key, wanted, found in (
        ("model.image_queries", queries, rows_QE.shape[0]),
        ("model.encoder.hidden_size", width, rows_QE.shape[-1]),
        ("training.precision", dtype, rows_QE.dtype),
    ):
        if wanted != found:
            raise FeaturesError(
                f"{key}: {wanted}; the precomputed features of {raw.key}.{name} in data.shards have {found}, "
                "run `emu2 embed` with this run's configuration"
            )
    return Features(rows_QE, encoder)
