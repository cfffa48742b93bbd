#!/usr/bin/env bash
# Pretrain on an AWS ParallelCluster: SLURM gives the instances, torchrun starts the ranks on each.
#
#   NODES=16 NPROC=32 examples/llama/jobs/parallel_cluster.sh [CONFIG] [options of pretrain.py …]
#
#   NODES       instances (default 1)
#   NPROC       ranks of an instance (default 32)
#   PARTITION   SLURM queue (default: the cluster's own)
#
# The repository, the environment and the run folder must lie on a file system that all instances share. Run
# from the repository's root with that environment active.
set -euo pipefail

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

submit() {
  local options=(--job-name llama --nodes "${NODES:-1}" --ntasks-per-node 1 --exclusive --output '%x-%j.log')
  if [[ -n ${PARTITION:-} ]]; then options+=(--partition "$PARTITION"); fi
  # a batch script is copied before it runs, so it is told where the examples are
  sbatch "${options[@]}" --export "ALL,LLAMA_HOME=$here,NPROC=${NPROC:-32}" "${BASH_SOURCE[0]}" "$@"
}

run() {
  local config=${1:-$LLAMA_HOME/configs/llama-8b.yaml}
  if (($# > 0)); then shift; fi
  local first port
  first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  port=$((20000 + SLURM_JOB_ID % 20000))
  # Elastic Fabric Adapter, which carries the collectives between instances
  export FI_PROVIDER=${FI_PROVIDER:-efa} FI_EFA_USE_DEVICE_RDMA=${FI_EFA_USE_DEVICE_RDMA:-1}
  export FI_EFA_FORK_SAFE=${FI_EFA_FORK_SAFE:-1} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
  echo "$SLURM_NNODES nodes x $NPROC ranks, first node $first:$port, $config"
  srun --kill-on-bad-exit=1 python -m torch.distributed.run \
    --nnodes "$SLURM_NNODES" --nproc-per-node "$NPROC" \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$first:$port" \
    "$LLAMA_HOME/pretrain.py" fit --config "$config" "$@"
}

# Inside a job, SLURM's own variables are there; else this is the submission.
if [[ -n ${SLURM_JOB_ID:-} && -n ${LLAMA_HOME:-} ]]; then run "$@"; else submit "$@"; fi
