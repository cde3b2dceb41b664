#!/usr/bin/env bash
# Train on several nodes. Where this one reaches the others by ssh, and pdsh is installed, one command starts all:
#
#   bash launch/multinode.sh HOSTFILE CONFIG [--resume] [overrides]
#
# Else run the same command on every node, with its own number: NODE_RANK=0 bash launch/multinode.sh HOSTFILE CONFIG ...
# HOSTFILE is as in hostfile.example; the slots of all nodes together must be parallel.pipeline x parallel.data. With
# NODE_RANK, MASTER_ADDR is the first node of the hostfile unless set, and MASTER_PORT 29500. The run folder must be on a
# disk that all nodes share. CUDA_VISIBLE_DEVICES counts: with NODE_RANK every node's own, else this one's everywhere.
set -euo pipefail
hostfile=${1:-} config=${2:-}
if [ ! -f "$hostfile" ]; then
  # DeepSpeed itself would go on and train on this node alone.
  echo "multinode: the hostfile '$hostfile' does not exist; usage: NODE_RANK=0 $0 HOSTFILE CONFIG [overrides]" >&2
  exit 2
fi
case $hostfile in *.yaml | *.yml)
  echo "multinode: '$hostfile' looks like a configuration: HOSTFILE comes first, then CONFIG" >&2
  exit 2 ;;
esac
if [ ! -f "$config" ]; then echo "multinode: the configuration '$config' does not exist" >&2; exit 2; fi
hostfile=$(realpath "$hostfile") config=$(realpath "$config")
shift 2
cd "$(dirname "$0")/.."
first=$(grep -vE '^[[:space:]]*(#|$)' "$hostfile" | head -n 1 | awk '{print $1}')
# Which other hosts there are: a host whose own name stands for a loopback address finds by them what others reach.
LPTRANSFORMER_HOSTS=$(grep -vE '^[[:space:]]*(#|$)' "$hostfile" | awk '{print $1}' | paste -sd,)
export LPTRANSFORMER_HOSTS
python=.venv/bin/python
[ -x "$python" ] || python=python3
if [ -z "${NODE_RANK:-}" ]; then exec "$python" -m lptransformer train "$config" --hostfile "$hostfile" "$@"; fi
nodes=$(grep -cvE '^[[:space:]]*(#|$)' "$hostfile")
if ! [ "$NODE_RANK" -ge 0 ] 2>/dev/null || [ "$NODE_RANK" -ge "$nodes" ]; then
  echo "multinode: NODE_RANK=$NODE_RANK, but $hostfile has $nodes nodes: give 0 to $((nodes - 1))" >&2
  exit 2
fi
# DeepSpeed's launcher sets CUDA_VISIBLE_DEVICES to its own numbers; a process takes these back.
if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then export LPTRANSFORMER_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES; fi
exec "$python" -m deepspeed.launcher.runner --hostfile="$hostfile" --no_ssh --node_rank="$NODE_RANK" \
  --master_addr="${MASTER_ADDR:-$first}" --master_port="${MASTER_PORT:-29500}" \
  launch/train.py --config "$config" "$@"
