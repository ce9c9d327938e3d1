# What holds for the project's files: layout, style, the likeness of the two scripts, the Makefile, the unit.

bats_require_minimum_version 1.5.0

setup_file() {
    cd "$BATS_TEST_DIRNAME/../.." || exit
    timeout 120 make -s .venv/lint-tools.txt >/dev/null 2>&1 || : # then they may be on PATH
}

setup() {
    cd "$BATS_TEST_DIRNAME/../.." || exit
    unset MAKEFLAGS MAKELEVEL MFLAGS # of `make test`: make would say which folder it enters
    folder=$BATS_TEST_TMPDIR
}

@test "nothing stands at the top level but the program, its unit, and what every project has" {
    { git ls-files 2>/dev/null || ls; } | cut -d / -f 1 | sort -u >"$folder/names"
    while read -r name; do
        echo "$name"
        case $name in
        azure-provisioning.py | azure-provisioning.sh | azure-provisioning.service) ;;
        tests | docs | recipes | drop-ins | Makefile | .*) ;;
        README.md | CONTRIBUTING.md | CHANGELOG.md | SECURITY.md | LICENSE) ;;
        *) false ;;
        esac
    done <"$folder/names"
}

lint() { # CHECK: run it, or skip where its tool cannot be had
    local said code=0
    said=$(python3 tests/checks/lint.py "$1") || code=$?
    echo "$said"
    [ "$code" -ne 3 ] || skip "$said"
    [ "$code" -eq 0 ]
}

@test "ruff format changes no Python file" {
    lint ruff-format
}

@test "ruff check has nothing to say" {
    lint ruff-check
}

@test "shfmt changes no shell file" {
    lint shfmt
}

@test "shellcheck has nothing to say, for sh, dash and Bash" {
    lint shellcheck
}

@test "the style of the scripts is theirs: short functions and lines, no condition that acts" {
    python3 tests/checks/style.py azure-provisioning.py azure-provisioning.sh
}

@test "the check of the style finds what is wrong" {
    spoiled() { # FILE LINES: how many lines of a file are complained of
        run python3 tests/checks/style.py "$1"
        echo "$output"
        [ "$(cut -d : -f 2 <<<"$output" | sort -u | wc -l)" -eq "$2" ]
    }
    cat >"$folder/spoiled.py" <<'END'
def short(x):
    """A text."""
    call(x)
    return x and call(x)


x and y()
1
x = 1; y = 2
if x: y = 3
END
    spoiled "$folder/spoiled.py" 4
    { echo 'def long():' && seq -f '    x = %g' 40; } >"$folder/spoiled.py"
    spoiled "$folder/spoiled.py" 1
    cat >"$folder/spoiled.sh" <<'END'
short() {
    call '; a && b' "$(call "$x")" || return # ; a && b
    [ "$x" ] && [ "$y" ] || fail '; a'
    if [ "$x" ] && call; then
        call || call
    fi
    case $x in
    'a;') call ;;
    *"$b"*) return 1 ;;
    esac
}

[ "$x" ] && call
[ "$x" ] || x=y
is_x || call
call && call
x=$(call; call)
call; call
case $x in
a) call; call ;;
*) [ "$x" ] || call ;;
esac
short() { call; }
long() {
END
    { seq -f '    x=%g' 40 && echo '}'; } >>"$folder/spoiled.sh"
    spoiled "$folder/spoiled.sh" 10
    printf '# %0100d\n' 1 >"$folder/spoiled.sh"
    spoiled "$folder/spoiled.sh" 1
}

@test "the two scripts are one program: sections, functions, settings, defaults, version, usage" {
    python3 tests/checks/alike.py
}

@test "the check of the likeness finds what differs" {
    while read -r language change; do
        cp azure-provisioning.py azure-provisioning.sh "$folder/"
        sed -i "$change" "$folder/azure-provisioning.$language"
        ! cmp -s {,"$folder/"}azure-provisioning."$language"
        run python3 tests/checks/alike.py "$folder"/azure-provisioning.{py,sh}
        echo "$change: $output"
        [ "$status" -eq 1 ]
    done <<'END'
py s/^# ---- Attempts/# ---- Tries/
sh s/^set_hostname() {/new() {\n    :\n}\n\n&/
py s/^def set_hostname/def new():\n    pass\n\n\n&/
sh s/^# The default run ends here/# It ends here/
py s/attempts=240/attempts=241/
sh s/INTERVAL-5}/INTERVAL-6}/
sh s/^VERSION=.*/VERSION=0/
py s/^options:/Options:/
END
}

@test "the defaults are those of the usage and the README" {
    sed -n 's/^[A-Z]*=${\(AZURE[A-Z_]*\)-\([^}]*\)}.*/\1 \2/p' azure-provisioning.sh >"$folder/defaults"
    [ "$(wc -l <"$folder/defaults")" -eq 5 ]
    ./azure-provisioning.sh --help | tr '\n' ' ' >"$folder/usage"
    while read -r name value; do
        grep -q "$name [^(]*(default: $value)" "$folder/usage"
        grep -q "$name.*$value" README.md
    done <"$folder/defaults"
}

@test "nothing happens when the Python script is imported" {
    python3 tests/checks/import_check.py azure-provisioning.py
    for line in 'os.umask(1)' 'signal.signal(signal.SIGINT, signal.SIG_DFL)' 'sys.argv.clear()' \
        'threading.Thread(target=time.sleep, args=[9], daemon=True).start()' '__import__("colorsys")'; do
        sed "s/^VERSION = /$line\n&/" azure-provisioning.py >"$folder/spoiled.py"
        run python3 tests/checks/import_check.py "$folder/spoiled.py"
        echo "$line: $output"
        [ "$status" -eq 1 ]
    done
}

@test "dying commands and a silent resolver: no line of a file is lost, and no time" {
    run python3 tests/checks/broken_machine.py
    echo "$output"
    [ "$status" -eq 0 ]
    [[ $output != *'# skip this machine'* ]] || skip "$(sed -n 's/.*# skip //p' <<<"$output" | head -n 1)"
}

@test "the version is the same in both scripts, in what they print and send, and in the changelog" {
    version=$(sed -n "s/^VERSION = '\(.*\)'$/\1/p" azure-provisioning.py)
    [ "$(sed -n 's/^VERSION=//p' azure-provisioning.sh)" = "$version" ]
    for script in ./azure-provisioning.py ./azure-provisioning.sh; do
        [ "$("$script" --version)" = "azure-provisioning $version" ]
        make demo IMPL="$script" | grep -q "^    User-Agent: azure-provisioning/$version$"
    done
    [ "$(sed -n 's/^## \([0-9.]*\) - .*/\1/p' CHANGELOG.md | head -n 1)" = "$version" ]
}

@test "docs/troubleshooting.md has a row for each reason that the scripts can give, and no other" {
    for language in py sh; do
        python3 tests/checks/reasons.py "azure-provisioning.$language" | sort >"$folder/$language"
    done
    [ "$(wc -l <"$folder/sh")" -gt 30 ]
    # shellcheck disable=SC2016 # of the page
    sed -n '/^## What the program says/,/^## /s/^| `\([^`]*\)`.*/\1/p' docs/troubleshooting.md | sort >"$folder/page"
    diff "$folder/sh" "$folder/page"
    # Python needs neither a client nor uname, and says in words of its own what is wrong with it.
    diff "$folder/py" <(grep -vx -e 'azure-provisioning: no curl or wget' -e 'uname failed' -e 'unknown error' "$folder/sh")
}

@test "the check of the reasons finds a new one, in each way to give one" {
    while read -r language change; do
        sed "$change" "azure-provisioning.$language" >"$folder/spoiled.$language"
        ! cmp -s "azure-provisioning.$language" "$folder/spoiled.$language"
        run python3 tests/checks/reasons.py "$folder/spoiled.$language"
        echo "$change: $output"
        grep -qx 'a new reason' <<<"$output"
    done <<'END'
py s/'no valid hostname'/'a new reason'/
py s/^NO_LOGIN_REASON = .*/NO_LOGIN_REASON = 'a new reason'/
py s/'; is this a VM on Azure?'/'; a new reason'/
py s/'hostnamectl failed'/'a new reason'/
sh s/'no valid hostname'/'a new reason'/
sh s/^NO_LOGIN_REASON=.*/NO_LOGIN_REASON='a new reason'/
sh s/'; is this a VM on Azure?'/'; a new reason'/
sh s/'hostnamectl failed; '/'a new reason; '/
END
}

@test "every link in the pages leads somewhere" {
    python3 tests/checks/links.py
}

@test "the check of the links finds those that lead nowhere" {
    mkdir -p "$folder/pages/docs"
    cat >"$folder/pages/README.md" <<'END'
# A page
## A `b`, c
```
[no](link)
```
`[no](link)`, [other](docs/other.md#a-b-c)
[own](#a-b-c-1) and [a site](https://example.com/)
## A b c
[a
folder](docs), [label][x], `docs/other.md`

[x]: docs
END
    printf '%s\n' '# A b c' >"$folder/pages/docs/other.md"
    python3 tests/checks/links.py "$folder/pages"
    while read -r line; do
        cp -r "$folder/pages" "$folder/spoiled"
        printf '%s\n' "$line" >>"$folder/spoiled/README.md"
        run python3 tests/checks/links.py "$folder/spoiled"
        echo "$line: $output"
        [ "$status" -eq 1 ]
        [ "${#lines[@]}" -eq 1 ]
        rm -r "$folder/spoiled"
    done <<'END'
[a](b.md)
[a](#no-heading)
[a](docs/other.md#a-page)
[a](docs#a)
[a](../pages)
[a](http://example.com/)
[a][y]
[y]: docs
`docs/b.md`
END
}

@test "the README has 250 lines at most, and its two commands in the first 40" {
    [ "$(wc -l <README.md)" -le 250 ]
    for words in 'make demo' 'Disabled azure-provisioning.service' 'make test' ' passed, 0 failed'; do
        head -n 40 README.md | grep -q "$words"
    done
}

@test "each page says in its first line whom it is for" {
    for page in docs/*.md tests/README.md CONTRIBUTING.md; do
        echo "$page"
        sed -n 3p "$page" | grep -q '^This page is for people who'
    done
}

@test "the README shows the journal of the demo" {
    run make demo IMPL=sh
    sed -n '/^    Retrieving goal state/,/^    Disabled/p' README.md | head -n 10 >"$folder/readme"
    [ "$(wc -l <"$folder/readme")" -eq 10 ]
    diff <(sed -n '/journal$/,/^$/s/<Health>.*/<Health>…<\/Health>/; /^    Retrieving goal state/,/^    Disabled/p' \
        <<<"$output" | sed 's/<Health>.*/<Health>…<\/Health>/') "$folder/readme"
}

@test "the README's commands install a program that runs, and enable its unit" {
    command -v systemctl || skip 'no systemctl'
    mkdir -p "$folder/tree/usr/local/sbin" "$folder/tree/etc/systemd/system"
    sed -n '/^    # install by hand/,/^$/p' README.md |
        sed "s|/usr/local|$folder/tree&|g; s|/etc/systemd|$folder/tree&|g; s|systemctl|& --root=$folder/tree|" |
        sh -eux
    "$folder/tree/usr/local/sbin/azure-provisioning" --version
    [ -L "$folder/tree/etc/systemd/system/multi-user.target.wants/azure-provisioning.service" ]
}

@test "the demo runs both scripts, and shows what it should" {
    run make demo
    [ "$status" -eq 0 ]
    [ "$(grep -c 'exit status 0' <<<"$output")" -eq 2 ]
    for line in 'Incarnation: 16' 'POST /machine?comp=health HTTP/1.1' 'Metadata: true' 'Response: 200' \
        'hostnamectl set-hostname thstringnopa2' 'systemctl --no-reload disable azure-provisioning.service'; do
        [ "$(grep -cF "    $line" <<<"$output")" -eq 2 ]
    done
}

@test "the demo runs one program, and fails with it" {
    run make demo IMPL=./azure-provisioning.sh
    [ "$status" -eq 0 ]
    [ "$(grep -c 'exit status' <<<"$output")" -eq 1 ]
    run make demo IMPL='./azure-provisioning.sh --bad'
    [ "$status" -ne 0 ]
}

@test "make alone and make help list the targets, a line each" {
    run make
    [ "$status" -eq 0 ]
    [ "$output" = "$(make help)" ]
    sed -n 's/^\.PHONY: //p' Makefile | tr ' ' '\n' | grep -vx check-install >"$folder/targets"
    diff <(sed -nE 's/^make ([a-z-]+) +[^ ].*/\1/p' <<<"$output" | sort) <(sort "$folder/targets")
    [ "$(wc -l <<<"$output")" -eq "$(wc -l <"$folder/targets")" ]
}

@test "the Makefile's example installs without a warning" {
    # shellcheck disable=SC2016 # of the example's shell
    sed -n 's/^#     \(make install .*\)/\1 DESTDIR="$1"/p' Makefile >"$folder/example"
    run --separate-stderr sh -eu "$folder/example" "$folder/tree"
    [ "$status" -eq 0 ]
    [ -z "$stderr" ]
    [ -f "$folder/tree/etc/systemd/system/azure-provisioning.service.d/steps.conf" ]
}

@test "make install puts either script and the unit in place, make uninstall takes both away" {
    tree="$folder/an image"
    for implementation in py sh; do
        make install DESTDIR="$tree" IMPL="$implementation"
        cmp "azure-provisioning.$implementation" "$tree/usr/local/sbin/azure-provisioning"
        cmp azure-provisioning.service "$tree/etc/systemd/system/azure-provisioning.service"
        "$tree/usr/local/sbin/azure-provisioning" --version
        make uninstall DESTDIR="$tree"
        [ -z "$(find "$tree" -type f)" ]
        [ "$(ls "$folder")" = 'an image' ] # nothing is written beside it
    done
}

@test "make install STEPS writes the steps and copies their drop-ins, and removes those of other steps" {
    drop_ins="$folder/an image/etc/systemd/system/azure-provisioning.service.d"
    make_install() { make install DESTDIR="$folder/an image" IMPL=sh STEPS="$1"; }
    make_install 'user data hostname ready remember'
    [ "$(cd "$drop_ins" && echo *)" = 'data.conf remember.conf steps.conf user.conf' ]
    for step in data remember user; do cmp {drop-ins,"$drop_ins"}/$step.conf; done
    diff "$drop_ins/steps.conf" - <<END
[Service]
ExecStart=
ExecStart=/usr/local/sbin/azure-provisioning user data hostname ready remember
Environment=AZURE_PROVISIONING_ATTEMPTS=450
END
    make_install ' ready  publish disable '
    [ "$(cd "$drop_ins" && echo *)" = 'publish.conf steps.conf' ]
    diff "$drop_ins/steps.conf" - <<END
[Service]
ExecStart=
ExecStart=/usr/local/sbin/azure-provisioning ready publish disable
END
    make_install ''
    [ ! -e "$drop_ins" ]
}

@test "make install has no output of its own but the next command, which enables the unit" {
    command -v systemctl || skip 'no systemctl'
    for tree in "$folder/tree" "$folder/an \"image\" & more"; do
        run --separate-stderr make -s install DESTDIR="$tree" IMPL=sh STEPS='user hostname ready disable'
        [ "${lines[0]}" = 'Next, as root:' ]
        [ "${#lines[@]}" -eq 2 ]
        [ -z "$stderr" ]
        sh -euc "${lines[1]}"
        [ -L "$tree/etc/systemd/system/multi-user.target.wants/azure-provisioning.service" ]
    done
    [[ $(make -n install IMPL=sh) == *"'    systemctl enable azure-provisioning.service'" ]]
}

@test "make install warns of steps without ready, without disable and remember, and of publish before hostname" {
    warnings() {
        run --separate-stderr make -s install DESTDIR="$folder/tree" IMPL=sh STEPS="$1"
        [ "$status" -eq 0 ]
        grep -c '^make install: warning: ' <<<"$stderr" || :
    }
    for steps in '' 'user hostname ready disable' 'ready remember'; do
        [ "$(warnings "$steps")" -eq 0 ]
    done
    [ "$(warnings 'hostname disable')" -eq 1 ]
    grep -q 'no ready' <<<"$(make install DESTDIR="$folder/tree" IMPL=sh STEPS='hostname disable' 2>&1 >/dev/null)"
    [ "$(warnings 'user hostname ready')" -eq 1 ]
    [ "$(warnings 'user')" -eq 2 ]
    [ "$(warnings 'publish hostname ready disable')" -eq 1 ]
    [ "$(warnings 'publish ready disable')" -eq 1 ]
}

@test "make install writes nothing if it cannot go on" {
    mkdir -p "$folder/half/etc"
    touch "$folder/file" "$folder/half/etc/systemd"
    mkdir -p "$folder/folder/usr/local/sbin/azure-provisioning"
    while read -r arguments; do
        before=$(find "$folder" | sort)
        run eval "make -s install $arguments"
        echo "$arguments: $output"
        [ "$status" -ne 0 ]
        [ "$(find "$folder" | sort)" = "$before" ]
    done <<'END'
DESTDIR="$folder/tree"
DESTDIR="$folder/tree" IMPL=both
DESTDIR="$folder/tree" IMPL='py sh'
DESTDIR="$folder/tree" IMPL=sh STEPS='user nonsense'
DESTDIR="$folder/tree" IMPL=sh STEPS='user --dry-run ready'
DESTDIR="$folder/tree" IMPL=sh STEPS='ready --version'
DESTDIR="$folder/tree" IMPL=sh STEPS='ready; disable'
DESTDIR="$folder/tree" IMPL=sh STEPS='*'
DESTDIR="$folder/tree" IMPL=sh STEPS="'ready'"
DESTDIR="$folder/an admin's tree" IMPL=sh
DESTDIR="$folder/tree" IMPL=sh PREFIX=usr
DESTDIR="$folder/tree" IMPL=sh PREFIX=/100%
DESTDIR="$folder/tree" IMPL=sh UNITDIR=units
DESTDIR="$folder/file" IMPL=sh
DESTDIR="$folder/half" IMPL=sh
DESTDIR="$folder/folder" IMPL=sh
END
}

@test "make install writes nothing if one of the folders cannot be written" {
    mkdir -p "$folder/tree/etc"
    chmod 555 "$folder/tree/etc"
    as=()
    if [ "$(id -u)" -eq 0 ]; then # may write there all the same, but not to a file system that is read-only
        unshare --mount true || skip 'no namespaces'
        # shellcheck disable=SC2016 # of the inner shell
        as=(unshare --mount sh -euc 'mount -t tmpfs -o ro none "$1" && shift && "$@"' sh "$folder/tree/etc")
    fi
    run "${as[@]}" make -s install DESTDIR="$folder/tree" IMPL=sh
    [ "$status" -ne 0 ]
    [[ $output == *"cannot write to $folder/tree/etc"* ]]
    [ ! -e "$folder/tree/usr" ]
}

@test "make uninstall takes away what install put there, whatever the steps were, and nothing else" {
    drop_ins=$folder/tree/etc/systemd/system/azure-provisioning.service.d
    mkdir -p "$drop_ins"
    touch "$drop_ins/local.conf"
    make install DESTDIR="$folder/tree" IMPL=sh STEPS='user password data hostname publish ready remember'
    [ "$(find "$drop_ins" -type f | wc -l)" -eq 7 ]
    make uninstall DESTDIR="$folder/tree"
    [ "$(find "$folder/tree" -type f)" = "$drop_ins/local.conf" ]
    make uninstall DESTDIR="$folder/tree" # what is gone is no error
    rm "$drop_ins/local.conf"
    make install DESTDIR="$folder/tree" IMPL=sh STEPS='user ready disable'
    make uninstall DESTDIR="$folder/tree"
    [ ! -e "$drop_ins" ]
}

@test "make install replaces a unit that is masked" {
    mkdir -p "$folder/tree/etc/systemd/system"
    ln -s /dev/null "$folder/tree/etc/systemd/system/azure-provisioning.service"
    make install DESTDIR="$folder/tree" IMPL=sh
    cmp azure-provisioning.service "$folder/tree/etc/systemd/system/azure-provisioning.service"
}

@test "each drop-in is named after a step, and says why it has its directives" {
    for drop_in in azure-provisioning.service drop-ins/*; do
        step=$(basename "$drop_in" .conf)
        [ "$step" = azure-provisioning.service ] || ./azure-provisioning.sh "$step" --version
        # neither directives without a comment above them, nor comments that are directives
        run awk '/^$/ || /^\[/ { told = /^\[(Unit|Install)\]$/ } /^#/ { told = 1 } /^[A-Z]/ && !told { print; bad = 1 }
            /^#(.*:)? *[A-Z][A-Za-z]*=/ { print; bad = 1 } END { exit bad }' "$drop_in"
        echo "$drop_in: $output"
        [ "$status" -eq 0 ]
    done
}

security() { # STEPS [OPTION]...: what systemd-analyze security says of the unit with the drop-ins for them
    make -s install DESTDIR="$folder/tree" IMPL=sh STEPS="$1" >/dev/null 2>&1
    systemd-analyze security --no-pager --offline=true --root="$folder/tree" "${@:2}" azure-provisioning.service
}

scores() { # skip where systemd-analyze is missing, or too old
    command -v systemd-analyze || skip 'no systemd-analyze'
    systemd-analyze security --help | grep -q -e --threshold || skip 'systemd-analyze cannot score a file'
}

@test "the scores are those that docs/unit.md tells" {
    scores
    # shellcheck disable=SC2016 # of the page
    sed -n 's/.*`systemd-analyze security` gives \(the unit\|`\(.*\)`\) \([0-9]\)\.\([0-9]\) of 10.*/\3\4 \2/p' \
        docs/unit.md >"$folder/scores"
    [ "$(wc -l <"$folder/scores")" -eq 2 ]
    while read -r score steps; do
        echo "$steps: $score"
        security "$steps" --threshold="$score" >/dev/null
        run security "$steps" --threshold="$((score - 1))"
        [ "$status" -ne 0 ]
    done <"$folder/scores"
}

@test "the drop-ins of several steps add up, and open nothing else" {
    scores
    opened() { # STEPS: what is open then
        security "$1" | sed -n 's/^✗ \([^ ]*\) .*/\1/p'
    }
    for step in user password data publish remember; do opened "$step"; done | sort -u >"$folder/each"
    opened 'user password data publish remember' | sort >"$folder/all"
    [ "$(wc -l <"$folder/all")" -gt 10 ]
    diff "$folder/each" "$folder/all"
}

@test "make install follows PREFIX and UNITDIR" {
    make install DESTDIR="$folder/tree" PREFIX=/opt/azure UNITDIR=/usr/lib/systemd/system IMPL=sh
    grep -q '^ExecStart=/opt/azure/sbin/azure-provisioning$' \
        "$folder/tree/usr/lib/systemd/system/azure-provisioning.service"
    [ -x "$folder/tree/opt/azure/sbin/azure-provisioning" ]
    make install DESTDIR="$folder/tree" PREFIX='/opt/my tools' IMPL=sh STEPS='ready disable'
    [ -x "$folder/tree/opt/my tools/sbin/azure-provisioning" ]
    cd "$folder/tree/etc/systemd/system"
    grep -qx 'ExecStart="/opt/my tools/sbin/azure-provisioning"' azure-provisioning.service
    grep -qx 'ExecStart="/opt/my tools/sbin/azure-provisioning" ready disable' azure-provisioning.service.d/steps.conf
}

verify() { # [ARGUMENT]...: install with these arguments of make, and verify the unit
    [ -d "$folder/tree/usr/lib/systemd/system" ] || {
        mkdir -p "$folder/tree/usr/lib/systemd"
        cp -r /lib/systemd/system "$folder/tree/usr/lib/systemd/" # the targets it names
    }
    make -s install DESTDIR="$folder/tree" IMPL=sh "$@" >/dev/null 2>&1
    run --separate-stderr systemd-analyze verify --man=no --root="$folder/tree" azure-provisioning.service
}

@test "the unit and each drop-in pass systemd-analyze verify without a word" {
    command -v systemd-analyze || skip 'no systemd-analyze'
    for steps in '' user password data publish remember 'user password data publish remember'; do
        verify STEPS="$steps"
        echo "$steps: $output$stderr"
        [ "$status" -eq 0 ]
        [ -z "$output$stderr" ]
    done
    verify STEPS=user PREFIX='/opt/my tools'
    [ "$status" -eq 0 ]
    [ -z "$output$stderr" ]
}

@test "systemd-analyze verify finds what is wrong in the unit or a drop-in" {
    command -v systemd-analyze || skip 'no systemd-analyze'
    for name in azure-provisioning.service azure-provisioning.service.d/user.conf; do
        verify STEPS=user
        echo Nonsense=1 >>"$folder/tree/etc/systemd/system/$name"
        run --separate-stderr systemd-analyze verify --man=no --root="$folder/tree" azure-provisioning.service
        [ -n "$stderr" ]
    done
}

@test "the unit's sandbox scores 1.5 or better" {
    scores
    score() { systemd-analyze security --no-pager --offline=true --threshold=15 "$folder/azure-provisioning.service"; }
    cp azure-provisioning.service "$folder/"
    score
    # and it would have failed
    grep -v '^CapabilityBoundingSet=' azure-provisioning.service >"$folder/azure-provisioning.service"
    run score
    [ "$status" -ne 0 ]
}

@test "the unit has what the README and docs/unit.md say of it" {
    grep -q '^RuntimeMaxSec=40min$' azure-provisioning.service
    for name in ATTEMPTS INTERVAL; do
        value=$(sed -n "s/^Environment=.*AZURE_PROVISIONING_$name=\([0-9]*\).*/\1/p" azure-provisioning.service)
        grep -q "^| .AZURE_PROVISIONING_$name. | .[0-9]*. | .$value. |" README.md
    done
    # shellcheck disable=SC2016 # of the script, not of this shell
    addresses=$(sed -n 's/^[A-Z]*=${AZURE_.*-http:\/\/\(.*\)}$/\1/p' azure-provisioning.sh)
    [ "$(sed -n 's/^IPAddressAllow=//p' azure-provisioning.service)" = "$(xargs <<<"$addresses") localhost" ]
}

@test "make dist: two clones of a commit give the same bytes, and all files are in them" {
    git rev-parse HEAD >/dev/null 2>&1 || skip 'this is no git repository'
    command -v sha256sum || skip 'no sha256sum'
    mkdir "$folder/origin"
    git ls-files -z | xargs -0 tar -c | tar -C "$folder/origin" -x
    git -C "$folder/origin" init -q
    git -C "$folder/origin" add -A
    git -C "$folder/origin" -c user.name=a -c user.email=a@example.com commit -q -m 'All files'
    git clone -q "$folder/origin" "$folder/one"
    (umask 077 && git clone -q "$folder/origin" "$folder/two")
    git -C "$folder/two" config tar.umask 0077
    make -C "$folder/one" -s dist
    (umask 027 && TZ=Asia/Tokyo LC_ALL=C make -C "$folder/two" -s dist)
    diff -r "$folder/one/dist" "$folder/two/dist"
    cd "$folder/one/dist"
    sha256sum -c SHA256SUMS
    name=$(basename azure-provisioning-*.tar.gz .tar.gz)
    tar -xf "$name.tar.gz"
    diff -r --exclude=.git --exclude=dist "$folder/one" "$name"
    [ "$("$name/azure-provisioning.sh" --version)" = "${name%-*} ${name##*-}" ]
    make -s -C "$name" install IMPL=sh DESTDIR="$folder/tree"
}

@test "make dist warns of what is not committed, and fails outside of a repository" {
    command -v git || skip 'no git'
    mkdir "$folder/project"
    cp Makefile azure-provisioning.sh "$folder/project/"
    GIT_CEILING_DIRECTORIES=$folder run make -s -C "$folder/project" dist
    [ "$status" -ne 0 ]
    [ ! -e "$folder/project/dist" ]
    git -C "$folder/project" init -q
    echo /dist/ >"$folder/project/.gitignore"
    git -C "$folder/project" add -A
    git -C "$folder/project" -c user.name=a -c user.email=a@example.com commit -q -m 'Two files'
    run --separate-stderr make -s -C "$folder/project" dist
    [ "$status" -eq 0 ]
    [ -z "$stderr" ]
    echo >>"$folder/project/Makefile"
    run --separate-stderr make -s -C "$folder/project" dist
    [ "$status" -eq 0 ]
    [[ $stderr == *warning* ]]
}

# The runner with cases of our own: copies of the kit, to be spoiled.
copy_kit() {
    rm -rf "$folder/kit"
    cp -r tests/kit "$folder/kit"
}

@test "the Python script refuses lengths that HTTP does not allow, though a port may take them" {
    copy_kit
    sed -i 's/^either/must-not/' "$folder/kit/cases/goal-state-faults/lengths.cases"
    for cases in length chunk; do
        run python3 "$folder/kit/run.py" --strict --only "goal-state-faults/must-not-$cases" "$PWD/azure-provisioning.py"
        echo "$output"
        [[ $output == *' passed, 0 failed' ]] || [ "$status" -eq 3 ]
    done
}

@test "custom data of 64 KiB takes at most 2 seconds of CPU" {
    while read -r program; do
        run python3 tests/kit/run.py --only data/must-custom-64-kib \
            "sh -c 'ulimit -t 2; exec \"\$@\"' sh $program"
        echo "$program: $output"
        [[ $output == *'1 passed, 0 failed' ]] || [ "$status" -eq 3 ]
    done <<END
$PWD/azure-provisioning.py
$PWD/azure-provisioning.sh
bash $PWD/azure-provisioning.sh
END
}

@test "the runner refuses a base URL that is not on loopback" {
    copy_kit
    printf 'settings: AZURE_PROVISIONING_IMDS=http://192.0.2.1\n' >>"$folder/kit/cases/runs/must-hostname.case"
    run python3 "$folder/kit/run.py" --only runs/must-hostname true
    [ "$status" -eq 2 ]
    [[ $output == *'not on loopback'* ]]
}

@test "the runner fails where there is no case, or one is not in order" {
    run python3 tests/kit/run.py --only no-such-case true
    [ "$status" -eq 2 ]
    copy_kit
    for spoil in 'sed -i /^why/d must-named.case' 'echo x >rubbish' 'mv must-named.case named.case' \
        'sed -i /goalstate:/d family' 'sed -i /^exit/d family' 'echo "nonsense: x" >>must-named.case' \
        'echo "    x" >>must-default.case' 'echo "answers: x: y" >>must-named.case'; do
        rm -rf "$folder/kit/cases"
        cp -r tests/kit/cases "$folder/kit/cases"
        (cd "$folder/kit/cases/runs" && eval "$spoil")
        run python3 "$folder/kit/run.py" true
        echo "$spoil: $output"
        [ "$status" -eq 2 ]
        [[ $output == *'runs'* ]]
    done
}

@test "the runner fails a program that does nothing, or cannot be started" {
    run python3 tests/kit/run.py --only runs true
    [ "$status" -eq 1 ]
    [[ $output == *$'\n0 passed'* ]]
    run python3 tests/kit/run.py --only runs /nowhere/no-such-program
    [ "$status" -ne 0 ]
}

@test "the runner tells of a usage that differs once" {
    copy_kit
    sed -i 's/^    usage: /    usage: other /' "$folder/kit/cases/values"
    run python3 "$folder/kit/run.py" --strict --only command-line "$PWD/azure-provisioning.sh"
    [ "$status" -eq 1 ]
    [ "$(grep -c '^FAILED' <<<"$output")" -eq 1 ]
    [[ $output == *'^'* ]]
}

@test "each family notices an expectation that is changed" {
    copy_kit
    for family in "$folder"/kit/cases/*/family; do sed -i 's/^exit: .*/exit: 7/' "$family"; done
    sed -i 's/^exit: .*/exit: 7/' "$folder"/kit/cases/*/*.case*
    chosen='command-line/must-help data/must-default dry-run/must-default goal-state-faults/must-chunked
        goal-states/must-platform health-report-faults/must-close hostnames/must-64 imds/must-close
        keys/must-blank-late not-ready/must-not-default passwords/must-default publish/must-networkctl
        remember/must-default runs/must-default users/must-default'
    # shellcheck disable=SC2086 # words
    [ "$(dirname $chosen)" = "$(cd "$folder/kit/cases" && dirname -- */family)" ]
    for case in $chosen; do
        run python3 "$folder/kit/run.py" --only "$case" "sh $PWD/azure-provisioning.sh"
        [[ $output == *$'\n0 passed, '[1-9]* ]]
    done
}

@test "nothing of a test changes this machine, whatever its PATH has" {
    name=$(uname -n) hostname=$(cat /etc/hostname)
    # a program that does not look for hostnamectl, and calls all that it can
    printf '%s\n' '#!/bin/sh' 'echo changed >/etc/hostname' 'echo changed >/proc/sys/kernel/hostname' \
        'echo x >/tmp/azure-provisioning-was-here' '/usr/bin/hostnamectl set-hostname changed' \
        '/bin/systemctl --no-reload disable azure-provisioning.service' >"$folder/wild"
    chmod 755 "$folder/wild"
    run python3 tests/kit/run.py --only runs "$folder/wild"
    run python3 tests/kit/demo.py "$folder/wild"
    run python3 tests/checks/conditions.py "$folder/wild"
    [ "$(uname -n)" = "$name" ]
    [ "$(cat /etc/hostname)" = "$hostname" ]
    [ ! -e /tmp/azure-provisioning-was-here ]
}

@test "the stubs change nothing outside of a sandbox" {
    [ ! -e /etc/sandbox ]
    for stub in useradd adduser chpasswd usermod mount umount; do
        COMMANDS=/dev/null run "tests/kit/stubs/$stub" one two </dev/null
        [ "$status" -ne 0 ]
    done
}
