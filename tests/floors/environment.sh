#!/usr/bin/env bash
# Makes an environment with the lowest versions that pyproject.toml admits:
#
#   tests/floors/environment.sh VENV
#
# then `VENV/run -m pytest ...`. transformers, which compressed-tensors asks for, is kept at 4.x:
# its newest would lift the floors of huggingface_hub and safetensors. PyPI's torch is a CUDA build
# of gigabytes, most of it in packages of their own; empty libraries stand for those.
set -euo pipefail
mkdir -p "$1"
venv=$(cd "$1" && pwd)
cd "$(dirname "$0")/../.."
uv venv -q --clear --python "$(command -v python3)" "$venv"
python="$venv/bin/python"
uv pip compile -q --python "$python" --resolution lowest-direct --no-annotate --no-header \
  --constraint <(echo 'transformers<5') pyproject.toml |
  grep -Ev '^(nvidia|cuda)-' >"$venv/floors.txt"
uv pip install -q --python "$python" --no-deps -r "$venv/floors.txt" -e .
uv pip install -q --python "$python" --constraint "$venv/floors.txt" \
  pytest pytest-timeout pytest-xdist 'hypothesis>=6' setuptools
"$python" tests/floors/cuda_stubs.py "$(echo "$venv"/lib/python3*/site-packages/torch/lib)" "$venv/stubs"
cat >"$venv/run" <<END
#!/bin/sh
LD_LIBRARY_PATH="$venv/stubs" exec "$python" "\$@"
END
chmod +x "$venv/run"
grep -E '^(torch|triton|safetensors|compressed-tensors|msgspec|google-re2|typer|rich|huggingface-hub)==' "$venv/floors.txt"
