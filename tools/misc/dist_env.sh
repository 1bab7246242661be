# Sourced by dist_*.sh: where the workers meet, from NNODES NODE_RANK MASTER_ADDR PORT, and which Python runs them.
# shellcheck shell=bash disable=SC2034
python=${PYTHON:-python}
nnodes=${NNODES:-1}
if [[ $nnodes == 1 && -z ${PORT:-} ]]; then
    # one node: a free port, so that two jobs on a machine never meet
    port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
else
    port=${PORT:-29500}
fi
rendezvous=(--nnodes="$nnodes" --node_rank="${NODE_RANK:-0}" --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="$port")
