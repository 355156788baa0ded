#!/usr/bin/env bash
# The main job from video files to a trained, evaluated, usable classifier.
#
#   bash launch/quickstart.sh [FOLDER_OF_CLASS_FOLDERS]
#
# Without a folder it makes its own small videos: four classes that differ only in the direction of motion.
# A quarter of each class is kept away from training. Everything is written to runs/quickstart/.
set -euo pipefail
videos=${1:+$(realpath -- "$1")}
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

run=${VIDCLS_QUICKSTART_DIR:-runs/quickstart}
step="the start"
say() { step=$1; printf '\n== %s\n' "$*"; }
trap 'echo "error: quickstart stopped in: $step" >&2' ERR
case $videos/ in
  "$(realpath -m -- "$run")"/*) echo "error: $videos is inside $run, which is made anew; move it elsewhere" >&2; exit 2 ;;
esac
# The launcher starts one rank per GPU, or two on a machine without any.
gpus=$(python -c 'from deepspeed.accelerator import get_accelerator as a; print(0 if a().device_name() == "cpu" else a().device_count())' | tail -n 1)
ranks=$((gpus > 0 ? gpus : 2))
[ "$gpus" != 0 ] || export DS_ACCELERATOR=cpu # not looked for, and not warned about, by every process again
launch() {
  local port
  port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
  deepspeed --quiet --num_gpus "$ranks" --master_port "$port" "$@"
}

mkdir -p "$run"
rm -rf "$run/videos" "$run/shards" "$run/train"
if [ -z "$videos" ]; then
  videos=$run/videos
  say "1/5 making 400 small videos (left, right, up, down) in $videos"
  python tools/make_motion_clips.py --out "$videos" --per-class 100
else
  say "1/5 using the videos in $videos"
fi

say "2/5 decoding the videos into shards, once"
for split in train test; do
  code=0
  python tools/make_shards.py folder --videos "$videos" --split $split --out "$run/shards/$split" --frames 8 --short-side 112 || code=$?
  # 3: some clips cannot be decoded; they are listed, and the others are there
  [ $code = 0 ] || [ $code = 3 ] || exit $code
done
python tools/inspect_shards.py "$run/shards/train" --html "$run/clips.html" | grep '^page'

say "3/5 training on $ranks ranks (the first time, DeepSpeed compiles its optimizer: one to four minutes)"
launch launch/train.py launch/recipes/quickstart.yaml dataset="$run/shards/train" output_dir="$run/train"
checkpoint=$(ls -d "$run"/train/checkpoint-* | sort -V | tail -n 1)

say "4/5 evaluating on clips that were never trained on"
launch launch/evaluate.py "$checkpoint" --data "$run/shards/test"

say "5/5 predicting one video that was never trained on"
clip=$(python - "$run/shards/test" "$videos" <<'PYTHON'
import sys
from vidcls.data.index import ShardIndex
from vidcls.data.shards import ShardReader
print(f"{sys.argv[2]}/{ShardReader(ShardIndex.open(sys.argv[1])).read(0).about.source}")
PYTHON
)
python launch/predict.py "$checkpoint" "$clip"

say "done; look at"
cat <<TEXT
  $run/clips.html                     what the model was shown, class by class: open it in a browser
  $run/train/report.html              the curves, the accuracy above, what is taken for what, the surest mistakes
  $run/train/train_log.jsonl          loss, learning rate, gradient norm, speed, by step
  $checkpoint    adapter, head, <ACTION>, tokenizer, and all that a resume needs
  $checkpoint/evaluation/predictions.jsonl     every test clip with its scores
  .venv/bin/tensorboard --logdir $run/train/tensorboard     the curves in a browser
  .venv/bin/python launch/predict.py $checkpoint VIDEO      try a video of your own
  .venv/bin/python launch/serve.py $checkpoint              the same in a browser, http://127.0.0.1:8000
TEXT
