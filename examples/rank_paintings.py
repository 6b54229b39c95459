"""Says how often what was painted of a caption is closer to the caption's own photo than to the others, by the
embeddings of the encoder that the painter was trained on.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from PIL import Image

from emu2_megatron.config.loading import load
from emu2_megatron.data.decode import normalize, prepare
from emu2_megatron.parallel.wrap import build_encoder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE", help="of the run, whose encoder is frozen and fresh")
    parser.add_argument("--photos", type=Path, required=True, metavar="DIR", help="with images/captions.jsonl")
    parser.add_argument("--paintings", type=Path, required=True, metavar="DIR", help="00000.png and so on, as captions")
    options = parser.parse_args()
    config = load(options.config)
    encoder, size = build_encoder(config).eval(), config.model.encoder.image_size

    def embeddings(files: list[Path]) -> torch.Tensor:
        pictures = torch.stack([prepare(Image.open(file).convert("RGB"), size) for file in files])
        with torch.no_grad():
            rows = encoder(normalize(pictures, torch.float32), [config.model.image_queries] * len(files))
        return rows.view(len(files), -1)

    records = [json.loads(line) for line in (options.photos / "images/captions.jsonl").read_text().splitlines()]
    paintings = embeddings(sorted(options.paintings.glob("*.png")))
    photos = embeddings([options.photos / record["file"] for record in records])
    distances = torch.cdist(paintings, photos)
    closer = (distances < distances.diagonal()[:, None]).sum(1)
    first, share = (float((closer <= most * (len(records) - 1)).double().mean()) for most in (0, 0.1))
    print(f"{options.paintings}: of {len(records)} paintings {first:.0%} are closest to their caption's photo")
    print(f"closer to it than to 90 % of the others are {share:.0%} (wanted: at least 80 %)")
    return int(share < 0.8)


if __name__ == "__main__":
    sys.exit(main())
