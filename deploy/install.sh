#!/bin/sh
# Makes the environment: install.sh PYTHON FOLDER
# uv does it in seconds and is installed into the environment itself. It does not read pip's settings, so
# a local wheel folder that pip knows (a CPU build of torch, say) is passed on to it.
set -eu
python=$1
venv=$2

"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || {
    echo "Python 3.11 to 3.13 is needed, $python is $("$python" -V); try: make PYTHON=python3.12 …" >&2
    exit 1
}
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet uv

links=${UV_FIND_LINKS:-${PIP_FIND_LINKS:-$("$venv/bin/python" -m pip config get global.find-links 2>/dev/null || true)}}
if [ -n "$links" ]; then
    UV_FIND_LINKS=$(printf '%s' "$links" | tr -s ' ' ',')
    export UV_FIND_LINKS
else
    # The build of torch that fits this machine: CUDA where there is a GPU, else the small CPU build.
    UV_TORCH_BACKEND=${UV_TORCH_BACKEND:-auto}
    export UV_TORCH_BACKEND
fi

install() { "$venv/bin/uv" pip install --python "$venv/bin/python" "$@"; }
install -c constraints.txt -e '.[test]'
# Its metadata asks for an old nnsight and for packages that it uses only to draw; none is needed here.
install --no-deps -c constraints.txt dictionary-learning==0.1.0
