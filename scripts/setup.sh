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
#     MQTT2MONGO_MOSQUITTO_SHARED               a mosquitto from 2.0.12 on, for the tests of shared subscriptions
#     MQTT2MONGO_LIBMOSQUITTO_NEXT              a directory with a libmosquitto from 2.1 on, for the tests with that
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

	library cmocka libcmocka-dev
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

# Print the version of the mosquitto PROGRAM, as in 2.0.11; nothing when it does not run. It exits with an error after its help.
mosquitto_version() {
	{ "$1" -h 2>/dev/null || true; } | sed -n 's/^mosquitto version //p'
}

# Is mosquitto PROGRAM one that keeps the shared subscriptions of a session that is taken up again? Those before 2.0.12 forget them
# until they are subscribed anew, unless they are patched, as Debian's 2.0.11 is, which its version does not show.
mosquitto_shares() {
	local version
	version=$(mosquitto_version "$1")
	[ -n "$version" ] && printf '2.0.12\n%s\n' "$version" | sort -V -C
}

# Print the sources of packages that are configured here for RELEASE's component main, in Debian's deb822 form, for SUITE instead.
sources_for() {
	local release=$1 suite=$2
	# A stanza at a time; its field Suites may go on over several lines, as Signed-By does when it holds the key itself.
	awk -v release="$release" -v suite="$suite" '
		BEGIN { RS = ""; FS = "\n" }
		{
			split("", is); split("", value); name = ""
			for (line = 1; line <= NF; line++) {
				if ($line ~ /^#/) continue
				if ($line ~ /^[^ \t]/) { name = tolower($line); sub(/:.*/, "", name); sub(/^[^:]*:/, "", $line) }
				is[name] = 1
				value[name] = value[name] (value[name] == "" ? "" : "\n") $line
			}
			words = " " value["suites"] " "; gsub(/[ \t\n]+/, " ", words)
			parts = " " value["components"] " "; gsub(/[ \t\n]+/, " ", parts)
			if (!index(words, " " release " ") || !index(parts, " main ") || tolower(value["enabled"]) ~ /no/) next
			is["targets"] = 1; value["targets"] = " Packages"
			value["types"] = " deb"; value["suites"] = " " suite; value["components"] = " main"
			for (name in is) print name ":" value[name]
			print ""
		}' /etc/apt/sources.list.d/*.sources 2>/dev/null || true
	# deb [signed-by=FILE …] URI RELEASE COMPONENT...
	cat /etc/apt/sources.list /etc/apt/sources.list.d/*.list 2>/dev/null | sed -nE \
		"s/^deb +(\[ *([^]]*)\] +)?([^ ]+) +$release +(.* )?main( .*)?\$/\2 uris=\3/p" | while read -r line; do
		printf 'types: deb\nsuites: %s\ncomponents: main\ntargets: Packages\n' "$suite"
		tr ' ' '\n' <<<"$line" | sed -nE 's/^([a-z-]+)=(.*)/\1: \2/p' | sed -E 's/^arch:/architectures:/; /^uris/!s/,/ /g'
		printf '\n'
	done
}

# fetch_packages DIRECTORY SUITES PACKAGE...: download Debian packages of those suites into DIRECTORY/apt, with lists, cache and sources of
# its own: nothing is installed. Called again for the same DIRECTORY it keeps the lists. Returns 1 when one cannot be had.
fetch_packages() {
	local apt=$1/apt suites=$2 release options
	shift 2
	release=$(. /etc/os-release && [ "$ID" = debian ] && printf '%s' "${VERSION_CODENAME:-}") || return 1
	command -v apt-get >/dev/null && command -v dpkg >/dev/null || return 1
	options=(-o "Dir::Etc::sourcelist=/dev/null" -o "Dir::Etc::sourceparts=$apt/sources" -o "Dir::State::lists=$apt/lists"
		-o "Dir::Cache=$apt/cache" -o Acquire::Retries=1 -o Acquire::http::Timeout=15 -o Acquire::Languages=none)
	if [ ! -d "$apt" ]; then
		mkdir -p "$apt"/{sources,lists/partial,cache/archives/partial}
		sources_for "$release" "$suites" >"$apt/sources/debian.sources"
		[ -s "$apt/sources/debian.sources" ] || return 1
		# A source that has not all of the suites is no matter, if another has.
		timeout 120 apt-get "${options[@]}" update || true
	fi
	(cd "$apt" && timeout 120 apt-get "${options[@]}" download "$@")
}

# unpack_packages DIRECTORY: what fetch_packages has downloaded, into DIRECTORY itself.
unpack_packages() {
	local package
	for package in "$1"/apt/*.deb; do
		dpkg -x "$package" "$1" || return 1
	done
	rm -rf "$1/apt"
}

# fetch_shared_broker DIRECTORY: Debian's backport of mosquitto, unpacked into DIRECTORY with the libraries that are missing here, and
# DIRECTORY/mosquitto, which runs it. Returns 1 when it cannot be had.
fetch_shared_broker() {
	local into=$1 release suites libraries missing=() package
	release=$(. /etc/os-release && printf '%s' "${VERSION_CODENAME:-}")
	suites="$release $release-backports"
	rm -rf "$into"
	fetch_packages "$into" "$suites" "mosquitto/$release-backports" || return 1
	libraries=$(dpkg-deb -f "$into"/apt/mosquitto_*.deb Depends | tr ',' '\n' | sed -nE 's/^ *(lib[^ :]+).*/\1/p')
	for package in $libraries; do
		dpkg -s "$package" >/dev/null 2>&1 || missing+=("$package")
	done
	[ ${#missing[@]} -eq 0 ] || fetch_packages "$into" "$suites" "${missing[@]}" || return 1
	unpack_packages "$into" || return 1
	cat >"$into/mosquitto" <<-'END'
		#!/bin/sh
		here=$(dirname "$0")
		for libraries in "$here"/usr/lib/*-linux-*; do
			LD_LIBRARY_PATH=$libraries exec "$here/usr/sbin/mosquitto" "$@"
		done
	END
	chmod +x "$into/mosquitto"
	mosquitto_shares "$into/mosquitto"
}

# Set and export MQTT2MONGO_MOSQUITTO_SHARED: a broker from 2.0.12 on. The installed one if it is, else Debian's backport, in
# build/mosquitto-backports. Without either it is not set, and the tests that need it are skipped.
setup_shared_broker() {
	local fetched=$ROOT/build/mosquitto-backports log=$LOGS/mosquitto-backports.log candidate
	local program=$fetched/mosquitto
	for candidate in "${MQTT2MONGO_MOSQUITTO_SHARED:-}" "$MQTT2MONGO_MOSQUITTO" "$program"; do
		if [ -n "$candidate" ] && mosquitto_shares "$candidate"; then
			export MQTT2MONGO_MOSQUITTO_SHARED=$candidate
			return 0
		fi
	done
	unset MQTT2MONGO_MOSQUITTO_SHARED
	mkdir -p "$LOGS"
	say "fetching Debian's backport of mosquitto into ${fetched#"$ROOT"/}: the installed one is $(mosquitto_version "$MQTT2MONGO_MOSQUITTO")"
	if (
		flock 9 # two scripts at once
		mosquitto_shares "$program" || fetch_shared_broker "$fetched"
	) </dev/null >"$log" 2>&1 9>"$fetched.lock"; then
		export MQTT2MONGO_MOSQUITTO_SHARED=$program
	else
		say "no mosquitto from 2.0.12 on could be had (log: $log): the tests that need one are skipped;" \
			"name one in MQTT2MONGO_MOSQUITTO_SHARED to run them"
	fi
}

# Is the libmosquitto that programs load with DIRECTORY in front one from 2.1 on?
library_is_next() {
	LD_LIBRARY_PATH=$1 $SYSTEM_PYTHON - 2>/dev/null <<-'END'
		import ctypes, sys
		sys.exit(ctypes.CDLL("libmosquitto.so.1").mosquitto_lib_version(None, None, None) < 2_001_000)
	END
}

# Set and export MQTT2MONGO_LIBMOSQUITTO_NEXT: a directory with a libmosquitto from 2.1 on, which the program is tested with beside the
# installed one. Debian's next release has it; it goes to build/libmosquitto-next. Without it that is not set, and those tests are skipped.
setup_next_library() {
	local fetched=$ROOT/build/libmosquitto-next log=$LOGS/libmosquitto-next.log candidate
	local libraries=$fetched/lib
	for candidate in "${MQTT2MONGO_LIBMOSQUITTO_NEXT:-}" "$libraries"; do
		if [ -n "$candidate" ] && library_is_next "$candidate"; then
			export MQTT2MONGO_LIBMOSQUITTO_NEXT=$candidate
			return 0
		fi
	done
	unset MQTT2MONGO_LIBMOSQUITTO_NEXT
	mkdir -p "$LOGS"
	say "fetching the next libmosquitto into ${fetched#"$ROOT"/}, for the tests"
	if (
		flock 9 # two scripts at once
		library_is_next "$libraries" && exit 0
		rm -rf "$fetched"
		# With what Debian 12 has not; the rest of what it needs is the same there.
		fetch_packages "$fetched" sid libmosquitto1 libpicohttpparser1 && unpack_packages "$fetched" &&
			mkdir "$libraries" && mv "$fetched"/usr/lib/*/*.so.* "$libraries" && ldconfig -n "$libraries" &&
			library_is_next "$libraries"
	) </dev/null >"$log" 2>&1 9>"$fetched.lock"; then
		export MQTT2MONGO_LIBMOSQUITTO_NEXT=$libraries
	else
		say "no libmosquitto from 2.1 on could be had (log: $log): the tests with one are skipped;" \
			"name a directory that has it in MQTT2MONGO_LIBMOSQUITTO_NEXT to run them"
	fi
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

# The program alone, in build/release: whoever only runs it need not have what the tests are built with.
setup_program() {
	TARGETS=src/mqtt2mongo setup_build release
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
	if [ "${1:-test}" = demo ]; then
		setup_program
	else
		setup_build release
	fi
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
	setup_all "$@"
	say "ready: build/release/src/mqtt2mongo, $MQTT2MONGO_MOSQUITTO, $MQTT2MONGO_MONGOD"
fi
