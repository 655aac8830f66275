#!/bin/sh
# Make one of the two pinned environments ready: sh tools/environment.sh a|b
#
# Lane a is built in .venv, lane b in .venv-b, from requirements/lane-a.txt and lane-b.txt.  A second run finds
# two stamps and does nothing.  A stamp holds a checksum of all that its environment was made from, the place of
# the checkout included (scripts hold absolute paths), and is written last: an interrupted, moved or outdated
# environment has no valid stamp and is built anew.
set -eu

lane=${1-}
case $lane in
    a) venv=.venv versions='3.11 3.12' ;;
    # 3.12 before the newer ones because the pins were made and tested there.
    b) venv=.venv-b versions='3.12 3.13 3.14 3.11' ;;
    *) echo "usage: sh tools/environment.sh a|b" >&2; exit 2 ;;
esac
cd "$(dirname "$0")/.."
pins=requirements/lane-$lane.txt

# Prints "3.11 3.11.7", or fails: what is on the path may be a version manager's stub that only prints advice,
# and a distribution may ship Python without venv or pip.
probe() {
    "$1" -I -c 'import ensurepip, platform, sys, venv
print("%d.%d" % sys.version_info[:2], platform.python_version())' 2>/dev/null
}

say() { echo "environment: $*"; }

# Sets `python`, or ends with what was tried.
find_python() {
    if [ -n "${PYTHON-}" ]; then
        version=$(probe "$PYTHON") || version=unusable
        case " $versions " in
            *" ${version% *} "*) python=$PYTHON; return ;;
        esac
        say "PYTHON=$PYTHON cannot be used: it is $version;" \
            "needed is a working Python of one of $versions with venv and ensurepip" >&2
        exit 1
    fi
    tried=
    for wanted in $versions; do
        for candidate in "python$wanted" python3 python \
            "${PYENV_ROOT:-${HOME-}/.pyenv}"/versions/"$wanted"*/bin/python; do
            version=$(probe "$candidate") || version=
            [ "${version% *}" = "$wanted" ] && python=$candidate && return
            case "$tried" in
                *"    $candidate: "*) ;;
                *) tried="$tried    $candidate: ${version:-absent, or cannot import venv and ensurepip}
" ;;
            esac
        done
    done
    say "found no Python of $versions with venv and ensurepip (on Debian: the package python3-venv). Tried:" >&2
    printf '%s' "$tried" >&2
    say "name one with: make PYTHON=/path/to/python ..." >&2
    exit 1
}

checksum() { cksum | tr ' \t' '--'; }

# What the environment's own interpreter says, so that a moved or removed base interpreter shows.
built_with=$(probe "$venv/bin/python") || built_with=none
pins_stamp() { { echo "$built_with" && pwd -P && cat "$pins"; } | checksum; }
project_stamp() { { pins_stamp && cat pyproject.toml; } | checksum; }
holds() { [ -f "$1" ] && [ "$(cat "$1")" = "$2" ]; }
pip_install() { "$venv/bin/python" -I -m pip install --quiet --no-input --no-user --no-deps "$@"; }

if ! holds "$venv/pins.stamp" "$(pins_stamp)" ||
    { [ -n "${PYTHON-}" ] && [ "$(probe "$PYTHON")" != "$built_with" ]; }; then
    find_python
    if [ -e "$venv" ]; then say "$venv is incomplete, moved or outdated: replacing it"; fi
    say "building $venv from $pins with $python (Python ${version#* });" \
        "about a minute, downloads 0.3 GB, takes 1.3 GB of disk"
    rm -rf "$venv"
    "$python" -I -m venv "$venv"
    pip_install -r "$pins" || { say "the installation failed; trying once more" >&2; pip_install -r "$pins"; }
    built_with=$(probe "$venv/bin/python")
    pins_stamp > "$venv/pins.stamp"
fi
if ! holds "$venv/project.stamp" "$(project_stamp)"; then
    pip_install --no-build-isolation --editable .
    project_stamp > "$venv/project.stamp"
    say "$venv is ready (Python ${built_with#* })"
fi
