#!/usr/bin/env bash
# What the other scripts stand on: finds out what this machine lacks, installs it, builds.
#
# Sourced (scripts/demo, test, dev, bench) it defines the setup_* functions below; run, it does it all:
#
#     scripts/setup.sh [demo|test|dev|bench]        default: test
#
# It is idempotent, and needs no network once everything is there. Nothing outside build/ is touched,
# but for Debian packages that are missing.
#
#     MQTT2MONGO_MONGOD, MQTT2MONGO_MOSQUITTO   the servers to use, instead of those on PATH
#     MQTT2MONGO_VENV                           the Python environment, default build/venv

set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
LOGS=$ROOT/build/logs
VENV=${MQTT2MONGO_VENV:-$ROOT/build/venv}
PYTHON=$VENV/bin/python
# Never a python3 that a version manager put in front: Debian's has the libraries Debian's packages need.
SYSTEM_PYTHON=/usr/bin/python3
PATH=$PATH:/usr/sbin:/sbin # where Debian puts mosquitto and ldconfig

say() {
	printf '%s\n' "$*" >&2
}

die() {
	printf 'error: %s\n' "$1" >&2
	shift
	for line in "$@"; do
		printf '       %s\n' "$line" >&2
	done
	exit 1
}

# --- Debian packages -------------------------------------------------------------------------------------------------

# Print the packages that are missing for LEVEL, one a line: what is looked for is the tool or the library itself, so
# that one from elsewhere counts too.
missing_packages() {
	local level=$1 major
	tool() {
		command -v "$1" >/dev/null 2>&1 || printf '%s\n' "$2"
	}
	library() {
		pkg-config --exists "$1" 2>/dev/null || printf '%s\n' "$2"
	}

	tool gcc build-essential
	tool meson meson
	tool ninja ninja-build
	tool pkg-config pkg-config
	library libuv libuv1-dev
	library libmosquitto libmosquitto-dev
	library libcjson libcjson-dev
	library openssl libssl-dev
	library sqlite3 libsqlite3-dev
	library libmicrohttpd libmicrohttpd-dev
	pkg-config --exists mongoc2 2>/dev/null || library libmongoc-1.0 libmongoc-dev
	library cmocka libcmocka-dev
	[ -n "${MQTT2MONGO_MOSQUITTO:-}" ] || tool mosquitto mosquitto
	tool mosquitto_sub mosquitto-clients
	tool $SYSTEM_PYTHON python3
	$SYSTEM_PYTHON -c 'import ensurepip, venv' 2>/dev/null || printf 'python3-venv\n'
	[[ $(ldconfig -p) == *'libcurl.so.4 '* ]] || printf 'libcurl4\n' # mongod of the Python wheel links to it
	[ "$level" != demo ] || return 0
	if [ "$level" = bench ]; then
		tool node nodejs
		tool npm npm
		tool strace strace
		tool valgrind valgrind
		return 0
	fi

	tool openssl openssl
	tool groff groff-base
	tool pgrep procps
	tool mount mount
	compgen -G '/usr/lib/*/faketime/libfaketime.so.1' >/dev/null || printf 'libfaketime\n'
	tool clang clang
	tool llvm-symbolizer llvm
	major=$(clang -dumpversion 2>/dev/null || printf 14)
	compgen -G "$(clang -print-resource-dir 2>/dev/null)/lib/*/libclang_rt.fuzzer*.a" >/dev/null ||
		printf 'libclang-rt-%s-dev\n' "${major%%.*}"
	[ "$level" != test ] || return 0

	tool clang-format clang-format
	tool clang-tidy clang-tidy
	tool valgrind valgrind
	tool shellcheck shellcheck
}

# Install what is missing for LEVEL (demo, test, dev or bench).
setup_packages() {
	local level=$1 missing as_root=() log=$LOGS/packages.log
	[ "$(uname -s)" = Linux ] ||
		die "mqtt2mongo runs on Linux only; this is $(uname -s)" "Use a Debian 12 machine, virtual machine or container."
	mapfile -t missing < <(missing_packages "$level")
	[ ${#missing[@]} -gt 0 ] || return 0

	command -v apt-get >/dev/null ||
		die "missing: ${missing[*]}" "These are Debian's names: install their like with this system's package manager."
	if [ "$(id -u)" -ne 0 ]; then
		if command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
			as_root=(sudo -n)
		else
			die "packages are missing, and installing them needs root. Run this, then try again:" \
				"sudo apt-get install -y --no-install-recommends ${missing[*]}"
		fi
	fi
	say "installing Debian packages: ${missing[*]}"
	mkdir -p "$LOGS"
	if ! {
		"${as_root[@]}" apt-get -o DPkg::Lock::Timeout=300 update &&
			"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 \
				install -y --no-install-recommends "${missing[@]}"
	} </dev/null >"$log" 2>&1; then
		tail -n 15 "$log" >&2
		die "apt-get failed (whole log: $log)" \
			"Without a network: install the packages named above by other means, then try again."
	fi
	mapfile -t missing < <(missing_packages "$level")
	[ ${#missing[@]} -eq 0 ] || die "still missing after apt-get install: ${missing[*]}" "See $log."
}

# --- Python ----------------------------------------------------------------------------------------------------------

# Install the given requirements files into the venv, once: a stamp of their content tells that it is done.
setup_requirements() {
	local name=$1 stamp want log=$LOGS/python.log arguments=()
	shift
	want=$( ($SYSTEM_PYTHON --version && cat "$@") | sha256sum)
	stamp=$VENV/stamp-$name
	[ "$(cat "$stamp" 2>/dev/null)" != "$want" ] || return 0

	say "installing Python packages into ${VENV#"$ROOT"/}"
	mkdir -p "$LOGS" "$(dirname "$VENV")"
	local file
	for file in "$@"; do
		arguments+=(-r "$file")
	done
	(
		flock 9 && # two scripts at once
			{ "$PYTHON" -c '' 2>/dev/null || $SYSTEM_PYTHON -m venv --clear "$VENV"; } &&
			"$PYTHON" -m pip install --quiet --only-binary :all: --disable-pip-version-check "${arguments[@]}" &&
			printf '%s\n' "$want" >"$stamp"
	) </dev/null >"$log" 2>&1 9>"$VENV.lock" || {
		tail -n 15 "$log" >&2
		die "cannot install Python packages (whole log: $log)" \
			"This needs the network once. Offline: elsewhere, 'pip download -d DIRECTORY ${*/#$ROOT\//-r }'; bring the" \
			"directory here and set PIP_FIND_LINKS=DIRECTORY PIP_NO_INDEX=1."
	}
}

# The Python environment of tests and demo, with a mongod if the machine has none.
setup_python() {
	local files=("$ROOT/tests/requirements.txt")
	if [ -z "${MQTT2MONGO_MONGOD:-}" ] && ! command -v mongod >/dev/null; then
		check_processor
		files+=("$ROOT/tests/requirements-mongod.txt")
	fi
	setup_requirements run "${files[@]}"
}

# --- servers ---------------------------------------------------------------------------------------------------------

# MongoDB 5 and newer need AVX, on ARM version 8.2; without it mongod dies of SIGILL and says nothing.
check_processor() {
	local remedy="Put a mongod that runs here on PATH, or name it in MQTT2MONGO_MONGOD (MongoDB 4.4 needs no AVX)."
	case $(uname -m) in
	x86_64) grep -qw avx /proc/cpuinfo || die "this processor has no AVX, which mongod needs" "$remedy" \
		"In a virtual machine: pass the host's processor through (QEMU: -cpu host)." ;;
	aarch64) grep -qwE 'asimddp|dcpop' /proc/cpuinfo || die "this processor is older than ARMv8.2, which mongod needs" "$remedy" ;;
	*) die "no mongod is packaged for $(uname -m)" "$remedy" ;;
	esac
}

# Set and export MQTT2MONGO_MONGOD and MQTT2MONGO_MOSQUITTO: servers that were seen to run.
setup_servers() {
	local mongod=${MQTT2MONGO_MONGOD:-}
	if [ -z "$mongod" ] && ! mongod=$(command -v mongod); then
		mongod=$(compgen -G "$VENV/lib/python3*/site-packages/fiftyone/db/bin/mongod" || true)
		[ -n "$mongod" ] || die "no mongod" "Put one on PATH, or remove $VENV and try again."
		chmod +x "$mongod" 2>/dev/null || true
	fi
	if ! "$mongod" --version >/dev/null 2>&1; then
		check_processor
		"$mongod" --version >&2 || true
		die "mongod does not run: $mongod" "Name one that does in MQTT2MONGO_MONGOD, or remove $VENV and try again."
	fi
	MQTT2MONGO_MONGOD=$mongod
	MQTT2MONGO_MOSQUITTO=${MQTT2MONGO_MOSQUITTO:-$(command -v mosquitto)}
	[ -x "$MQTT2MONGO_MOSQUITTO" ] || die "no mosquitto broker: $MQTT2MONGO_MOSQUITTO" "MQTT2MONGO_MOSQUITTO must name the program."
	export MQTT2MONGO_MONGOD MQTT2MONGO_MOSQUITTO
}

# --- build -----------------------------------------------------------------------------------------------------------

# setup_build NAME [MESON OPTION]...: configure build/NAME and build it; silent unless it fails (then returns 1).
# Configured anew when the options are others than last time; without options, as it is.
# TARGETS in the environment: build these only.
setup_build() {
	local name=$1 dir=$ROOT/build/$1 log=$LOGS/build-$1.log options
	shift
	options="CC=${CC:-} $*"
	mkdir -p "$LOGS"
	if [ ! -f "$dir/build.ninja" ] || { [ $# -gt 0 ] && [ "$(cat "$dir/.options" 2>/dev/null)" != "$options" ]; }; then
		rm -rf "$dir"
		if ! meson setup "$dir" "$ROOT" "$@" </dev/null >"$log" 2>&1; then
			tail -n 30 "$log" >&2
			say "error: meson setup build/$name failed (whole log: $log)"
			return 1
		fi
		printf '%s' "$options" >"$dir/.options"
	fi
	# shellcheck disable=SC2086 # several targets are several words
	if ! ninja -C "$dir" ${TARGETS:-} </dev/null >"$log" 2>&1; then
		grep -vE '^\[[0-9]+/[0-9]+\] (Compiling|Linking)|^ninja: Entering' "$log" | head -n 60 >&2
		say "error: building build/$name failed (whole log: $log)"
		return 1
	fi
}

setup_all() {
	case ${1:-test} in
	demo | test | dev | bench) ;;
	*) die "unknown argument: $1" "usage: scripts/setup.sh [demo|test|dev|bench]" ;;
	esac
	setup_packages "${1:-test}"
	setup_python
	[ "${1:-test}" != dev ] || setup_requirements dev "$ROOT/tests/requirements-dev.txt"
	[ "${1:-test}" != bench ] || setup_requirements bench "$ROOT/bench/requirements.txt"
	setup_servers
	setup_build release
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
	setup_all "$@"
	say "ready: build/release/src/mqtt2mongo, $MQTT2MONGO_MOSQUITTO, $MQTT2MONGO_MONGOD"
fi
