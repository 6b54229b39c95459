#!/usr/bin/env bash
# Trains a tiny Emu2 with the stage-2 objective on the pictures and pages of examples/data: tensor parallel 2 x
# pipeline parallel 2 x data parallel 2, eight gloo processes on this machine's CPU, about three minutes on two cores.
# Then exports the checkpoint and lets transformers caption a picture of the training data.
# Arguments are passed on: `bash examples/demo.sh training.steps=50`.
set -euo pipefail
cd "$(dirname "$0")/.."

rm -rf runs/demo
python tools/make_shards.py --input examples/data --output runs/demo/shards --samples-per-shard 32
emu2 train --config tiny_interleaved "$@"

python - <<'PYTHON'
import json, sys

first, *_, last = map(json.loads, open("runs/demo/log.jsonl"))
text, image = last["text_loss"] / first["text_loss"], last["image_loss"] / last["mean_predictor_image_loss"]
print(f"text loss: {text:.2f} of its first value (wanted: below 0.50)")
print(f"image loss: {image:.2f} of what predicting the mean embedding costs (wanted: below 1.00)")
sys.exit(not (text < 0.5 and image < 1))
PYTHON

checkpoint=$(ls -d runs/demo/checkpoints/step_* | tail -n 1)
emu2 convert to-hf --checkpoint "$checkpoint" --output runs/demo/hf
HF_HUB_OFFLINE=1 python - <<'PYTHON'
import json
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

record = json.loads(open("examples/data/images/captions.jsonl").readline())
picture = Image.open(f"examples/data/{record['file']}")
tokenizer = AutoTokenizer.from_pretrained("runs/demo/hf", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("runs/demo/hf", trust_remote_code=True)
prompt = model.build_input_ids(["[<IMG_PLH>]"], tokenizer, image=[picture])
answer = model.generate(**prompt, num_beams=1, max_new_tokens=24)
print(f"{record['file']}, exported and captioned by transformers: {tokenizer.decode(answer[0], skip_special_tokens=True)}")
print(f"its caption in the training data: {record['caption']}")
PYTHON
