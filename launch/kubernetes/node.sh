#!/usr/bin/env bash
# What every pod of launch/kubernetes/job.yaml runs: this node's ranks of one training run.
#
#     bash launch/kubernetes/node.sh launch/recipes/ucf101.yaml [key=value ...]
#
# Environment: NODES, SLOTS (ranks on each), NODE_RANK, MASTER_ADDR, OUTPUT_DIR. Needs no ssh: each pod starts its own
# ranks, and they meet at MASTER_ADDR. Leaves with the run's exit code, and with 0 only when the run has finished.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

# DeepSpeed only counts these lines: with --no_ssh the names mean nothing.
hostfile=$(mktemp)
trap 'rm -f "$hostfile"' EXIT
for ((node = 0; node < NODES; node++)); do echo "node$node slots=$SLOTS"; done >"$hostfile"

# A pod's name resolves a moment after it runs. The master's may have to be started anew.
for ((second = 0; second < 600; second++)); do
  getent hosts "$MASTER_ADDR" >/dev/null && break
  sleep 1
done

code=0
deepspeed --hostfile "$hostfile" --no_ssh --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR" --master_port 29500 \
  launch/train.py "$@" resume_from_checkpoint=latest output_dir="$OUTPUT_DIR" || code=$?

# deepspeed leaves with 0 when its launcher was killed, as by the memory limit: believe the run itself.
if [ "$code" = 0 ]; then
  for ((second = 0; second < 60; second++)); do # a shared file system shows the file a little later
    grep -qs '"outcome": *"finished"' "$OUTPUT_DIR/outcome.json" && exit 0
    sleep 1
  done
  echo "error: deepspeed left with 0, but $OUTPUT_DIR/outcome.json does not say finished" >&2
  code=71
fi
exit "$code"
