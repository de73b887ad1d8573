#!/usr/bin/env bash
# Submits sharding, all stages, and their evaluation to Slurm, chained by dependencies:
#
#   slurm/pipeline.sh --preset small --data /data/mine --run /runs/mine --sbatch "--gpus-per-node=8"
#
# This is `muomni pipeline --slurm` in the environment of MUOMNI_VENV (default: .venv of the repository);
# --help lists the options.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
export MUOMNI_ROOT=${MUOMNI_ROOT:-${here%/slurm}}
python=${MUOMNI_VENV:-$MUOMNI_ROOT/.venv}/bin/python
[ -x "$python" ] || python=python3
export PYTHONPATH=$MUOMNI_ROOT${PYTHONPATH:+:$PYTHONPATH}
exec "$python" -m muomni.cli pipeline --slurm "$@"
