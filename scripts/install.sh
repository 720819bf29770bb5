# Sourced by quickstart.sh and test.sh: `install plot` or `install dev` makes or reuses .venv in the repository's root and
# installs this package with that extra. Sets $venv_python. PYTHON names the Python to make .venv with.

stop() {
    echo "hf_efx: $*" >&2
    exit 1
}

say() {
    echo "hf_efx: $*"
}

# The first Python of at least 3.11 that can make virtual environments.
find_python() {
    local candidate found_old="" found_bare=""
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.14 python}; do
        command -v "$candidate" >/dev/null 2>&1 || continue
        "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { found_old=$candidate; continue; }
        "$candidate" -c 'import ensurepip, venv' 2>/dev/null || { found_bare=$candidate; continue; }
        base_python=$candidate
        return
    done
    if [ -n "$found_bare" ]; then
        stop "$found_bare has no venv or ensurepip module. On Debian and Ubuntu: apt install python3-venv."
    elif [ -n "$found_old" ]; then
        stop "$found_old is $("$found_old" --version 2>&1), but Python 3.11 or newer is needed. Install one, or name it: PYTHON=/path/to/python3.12"
    fi
    stop "there is no Python (looked for: ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.14 python}). Install Python 3.11 or newer."
}

check_disk() {
    local free
    free=$(df -Pk . | awk 'NR == 2 {print int($4 / 1048576)}')
    [ "$free" -ge 4 ] || stop "only $free GB are free in $PWD, the installation needs 4. Free some, or clone elsewhere."
}

make_venv() {
    find_python
    say "making .venv with $("$base_python" --version)"
    "$base_python" -m venv --clear .venv || stop "making .venv failed, see above"
}

# pip's output goes into a log; a terminal shows one line of it, which moves on.
pip_install() {
    local log=.venv/install.log pip status
    "$venv_python" -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt -e ".[$1]" \
        >"$log" 2>&1 &
    pip=$!
    trap 'kill "$pip" 2>/dev/null; exit 130' INT TERM
    while [ -t 1 ] && kill -0 "$pip" 2>/dev/null; do
        printf '\r\033[K%.100s' "$(grep -v '^ *$' "$log" | tail -n 1)"
        sleep 1
    done
    wait "$pip"
    status=$?
    trap - INT TERM
    [ ! -t 1 ] || printf '\r\033[K'
    if [ "$status" -eq 0 ]; then
        "$venv_python" -c 'import torch, transformers, peft, datasets, hf_efx' >>"$log" 2>&1
        status=$?
    fi
    [ "$status" -eq 0 ] || { tail -n 15 "$log" >&2; say "all of it: $log"; }
    return "$status"
}

install() {
    local extra=$1 stamp wanted reused=yes
    venv_python=.venv/bin/python
    stamp=.venv/installed-$extra
    if ! "$venv_python" -m pip --version >/dev/null 2>&1; then
        [ ! -e .venv ] || say ".venv is broken, making it anew"
        check_disk
        make_venv
        reused=no
    fi
    # What is installed is what these files said, in this folder.
    wanted=$({ pwd; cat pyproject.toml constraints.txt; } | "$venv_python" -c \
        'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        say "reusing .venv: pyproject.toml and constraints.txt are as they were when it was installed"
        return
    fi
    [ "$reused" = no ] || check_disk
    say "installing with pip, into .venv (about 2 GB, a few minutes; pip says what it does in .venv/install.log)"
    if ! pip_install "$extra"; then
        [ "$reused" = yes ] || stop "the installation failed, see above. Run this again once that is mended; it goes on from here."
        say ".venv can't be mended by pip, making it anew"
        make_venv
        pip_install "$extra" || stop "the installation failed, see above. Run this again once that is mended."
    fi
    echo "$wanted" >"$stamp"
}
