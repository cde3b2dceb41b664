#!/usr/bin/env bash
# Train on several nodes. Run the same command on every node, with its own number:
#
#   NODE_RANK=0 bash launch/multinode.sh HOSTFILE CONFIG [--resume] [overrides]
#
# HOSTFILE is as in hostfile.example; the slots of all nodes together must be parallel.pipeline x parallel.data.
# MASTER_ADDR is the first node of the hostfile unless set, MASTER_PORT is 29500 unless set. The run folder must be on
# a disk that all nodes share. Where all nodes can be reached over ssh, the launcher of DeepSpeed can also do the round:
# `deepspeed --hostfile HOSTFILE launch/train.py --config CONFIG`.
set -euo pipefail
hostfile=${1:-} config=${2:-}
if [ ! -f "$hostfile" ]; then
  # DeepSpeed itself would go on and train on this node alone.
  echo "multinode: the hostfile '$hostfile' does not exist; usage: NODE_RANK=0 $0 HOSTFILE CONFIG [overrides]" >&2
  exit 2
fi
if [ ! -f "$config" ]; then echo "multinode: the configuration '$config' does not exist" >&2; exit 2; fi
if [ -z "${NODE_RANK:-}" ]; then echo "multinode: NODE_RANK is not set: 0 on the first node of $hostfile" >&2; exit 2; fi
hostfile=$(realpath "$hostfile") config=$(realpath "$config")
shift 2
cd "$(dirname "$0")/.."
first=$(grep -vE '^[[:space:]]*(#|$)' "$hostfile" | head -n 1 | awk '{print $1}')
# Which other hosts there are: a host whose own name stands for a loopback address finds by them what others reach.
LPTRANSFORMER_HOSTS=$(grep -vE '^[[:space:]]*(#|$)' "$hostfile" | awk '{print $1}' | paste -sd,)
export LPTRANSFORMER_HOSTS
python=.venv/bin/python
[ -x "$python" ] || python=python3
exec "$python" -m deepspeed.launcher.runner --hostfile="$hostfile" --no_ssh --node_rank="$NODE_RANK" \
  --master_addr="${MASTER_ADDR:-$first}" --master_port="${MASTER_PORT:-29500}" \
  launch/train.py --config "$config" "$@"
