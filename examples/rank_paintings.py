"""Paints every caption of a folder of photos with an Emu2-Gen folder, by diffusers alone, and says how often the painting
is closer to the caption's own photo than to the others: by the encoder's embeddings, on which the decoder was trained.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from rich.progress import track


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="Emu2-Gen's folder, exported")
    parser.add_argument("--photos", type=Path, required=True, metavar="DIR", help="with images/captions.jsonl")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where paintings go")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    records = [json.loads(line) for line in (options.photos / "images/captions.jsonl").read_text().splitlines()]
    pipe = DiffusionPipeline.from_pretrained(options.model, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    photos, paintings = [], []
    for number, record in enumerate(track(records, "painting")):
        painting = pipe(record["caption"]).image
        painting.save(options.output / f"{number:05d}.png")
        paintings.append(embeddings(pipe, painting))
        photos.append(embeddings(pipe, Image.open(options.photos / record["file"]).convert("RGB")))
    distances = torch.cdist(torch.stack(paintings), torch.stack(photos))
    closer = (distances < distances.diagonal()[:, None]).sum(1)
    share = float((closer <= 0.1 * (len(records) - 1)).double().mean())
    print(f"{options.output}: {len(records)} paintings; {float((closer == 0).double().mean()):.0%} are closest to their own")
    print(f"closer to it than to 90 % of the others are {share:.0%} (wanted: at least 90 %)")
    return int(share < 0.9)


def embeddings(pipe: DiffusionPipeline, picture: Image.Image) -> torch.Tensor:
    """What the encoder makes of a picture, as one vector."""
    return pipe.encode_image(picture).flatten().float()


if __name__ == "__main__":
    sys.exit(main())
