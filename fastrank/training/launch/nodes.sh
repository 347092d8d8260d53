#!/usr/bin/env bash
# Several machines: run the same line on each, with the address of one of them.
#
#   HEAD=10.0.0.1 NODES=4 bash nodes.sh train --model MODEL --data FILE --output_dir SHARED/run
#
# ENGINE=fsdp2 (or zero2, zero3) shards the model; MACHINE is then the number of this machine, and
# HEAD the address of number 0. All machines must see the same --output_dir, or --resume_from_checkpoint
# is refused with a line that says which does not.
set -euo pipefail
: "${HEAD:?must be the address of one machine}" "${NODES:?must be the number of machines}"
processes=${PROCESSES:-$(nvidia-smi --list-gpus | wc -l)}
port=${PORT:-29400}
if [ -z "${ENGINE:-}" ]; then
  exec torchrun --nnodes "$NODES" --nproc_per_node "$processes" --rdzv_backend c10d \
    --rdzv_endpoint "$HEAD:$port" --rdzv_id "${RUN:-fastrank}" -m fastrank "$@"
fi
exec accelerate launch --config_file "$(python -m fastrank.training.configs "$ENGINE")" \
  --num_machines "$NODES" --num_processes "$((NODES * processes))" \
  --machine_rank "${MACHINE:?must be the number of this machine, from 0}" \
  --main_process_ip "$HEAD" --main_process_port "$port" -m fastrank "$@"
