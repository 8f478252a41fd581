#!/bin/sh
# During the build of an image: installs znormseg's dependencies into /opt/venv, with a pip in /opt/pip that is not
# copied to the final image. Environment variables: TORCH_INDEX, and those of pip.
set -eu
python3 -c 'import ensurepip' 2>/dev/null || "$(dirname "$0")/install-python.sh" python3-venv
python3 -m venv /opt/pip
python3 -m venv --without-pip /opt/venv
python3 requirements.py build >build.txt
python3 requirements.py run >run.txt
# Wheels only, since installing a source package runs its code.
export PIP_ONLY_BINARY=:all:
PIP_CONSTRAINT=/src/constraints.txt
[ -n "$TORCH_INDEX" ] || PIP_CONSTRAINT="$PIP_CONSTRAINT /src/torch-constraints.txt"
export PIP_CONSTRAINT
/opt/pip/bin/pip install -r build.txt
if [ -n "$TORCH_INDEX" ]; then
    /opt/pip/bin/pip --python /opt/venv/bin/python install --no-deps --index-url "$TORCH_INDEX" torch
fi
/opt/pip/bin/pip --python /opt/venv/bin/python install -r run.txt
/opt/pip/bin/pip --python /opt/venv/bin/python check
