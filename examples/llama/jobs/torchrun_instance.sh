#!/usr/bin/env bash
# Pretrain on all devices of this one instance.
#
#   examples/llama/jobs/torchrun_instance.sh [CONFIG] [options of pretrain.py …]
#
#   NPROC   ranks to start (default: the devices that torch sees; on a CPU 4)
set -euo pipefail

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
config=${1:-$here/configs/llama-8b.yaml}
if (($# > 0)); then shift; fi

if [[ -z ${NPROC:-} ]]; then
  NPROC=$(python - <<'PYTHON'
from neuron_lightning.backends import select_backend

backend, _ = select_backend()
print(4 if backend.name == "cpu" else backend.device_count())
PYTHON
  )
fi

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
echo "starting $NPROC ranks with $config" >&2
exec python -m torch.distributed.run --standalone --nproc-per-node "$NPROC" \
  "$here/pretrain.py" fit --config "$config" "$@"
