# What holds for the project's files: lint, size, the likeness of the two scripts, the Makefile, the unit.

bats_require_minimum_version 1.5.0

setup() {
    cd "$BATS_TEST_DIRNAME/../.." || exit
    folder=$BATS_TEST_TMPDIR
}

@test "the shell script is clean for sh, dash and bash" {
    for shell in sh dash bash; do shellcheck --shell="$shell" azure-provisioning.sh; done
}

@test "the shell of the tests is clean" {
    shellcheck tests/test tests/boot/tree tests/boot/container tests/boot/image/report tests/boot/image/probe \
        tests/boot/image/openrc tests/boot/image/logins tests/boot/busybox/azure-host tests/boot/busybox/report \
        tests/kit/stubs/hostnamectl tests/bench/baselines/*.sh .ci/run
    shellcheck --shell=bats tests/checks/project.bats
}

@test "each script has 450 lines at most, none longer than 120 characters" {
    for script in azure-provisioning.py azure-provisioning.sh; do
        [ "$(wc -l <"$script")" -le 450 ]
        run grep -nE '.{121}' "$script"
        [ "$status" -eq 1 ]
    done
}

@test "the two scripts have the same functions in the same order" {
    # Python's tag is inside parse, as what it reads with calls it; a shell has || return for need, and cat for contents
    sed -n 's/^def \([a-z_]*\).*/\1/p; s/^    def \(tag\)(.*/\1/p' azure-provisioning.py |
        grep -vx -e need -e contents >"$folder/py"
    sed -n 's/^\([a-z_]*\)() {.*/\1/p' azure-provisioning.sh >"$folder/sh"
    [ "$(wc -l <"$folder/sh")" -gt 15 ]
    diff "$folder/py" "$folder/sh"
}

@test "the two scripts have the same defaults" {
    sed -n "s/^[A-Z]* = os.environ.get('\(AZURE[A-Z_]*\)', '\(.*\)')/\1 \2/p" azure-provisioning.py >"$folder/py"
    sed -n 's/^[A-Z]*=${\(AZURE[A-Z_]*\)-\(.*\)}/\1 \2/p' azure-provisioning.sh >"$folder/sh"
    [ "$(wc -l <"$folder/sh")" -eq 5 ]
    diff "$folder/py" "$folder/sh"
    while read -r name value; do
        grep -q "$name .*($value)" azure-provisioning.sh # as the usage says
        grep -q "$name.*$value" README.md
    done <"$folder/sh"
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

@test "the README has a row for each reason that the scripts can give, and no other" {
    python3 tests/checks/reasons.py azure-provisioning.sh >"$folder/sh"
    [ "$(wc -l <"$folder/sh")" -gt 30 ]
    sed -n '/^## When it fails/,/^## /s/^| .\([^|]*\). | .*/\1/p' README.md | grep -v -e '^t say' -e '^--' |
        sort >"$folder/readme"
    diff <(sort "$folder/sh") "$folder/readme"
    # Python puts its reasons together otherwise: each is to be one of these
    python3 tests/checks/reasons.py azure-provisioning.py | sed 's/^goal state: //; s/[.*]/\\&/g; s/…/.*/g' >"$folder/py"
    while read -r reason; do grep -q -- "$reason$" "$folder/sh" || { echo "$reason" && return 1; }; done <"$folder/py"
    grep -v 'no curl or wget' "$folder/sh" >"$folder/both" # what Python does not need
    run grep -vxE "(…: )?($(paste -s -d '|' "$folder/py"))" "$folder/both"
    [ -z "$output" ]
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
        'hostnamectl set-hostname thstringnopa2' 'systemctl disable azure-provisioning.service'; do
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

@test "make install puts either script and the unit in place, make uninstall takes both away" {
    for implementation in py sh; do
        make install DESTDIR="$folder/tree" IMPL="$implementation"
        cmp "azure-provisioning.$implementation" "$folder/tree/usr/local/sbin/azure-provisioning"
        cmp azure-provisioning.service "$folder/tree/etc/systemd/system/azure-provisioning.service"
        "$folder/tree/usr/local/sbin/azure-provisioning" --version
        make uninstall DESTDIR="$folder/tree"
        [ -z "$(find "$folder/tree" -type f)" ]
    done
}

@test "make install STEPS writes a drop-in for these steps, and one without STEPS takes it away" {
    drop_in=$folder/tree/etc/systemd/system/azure-provisioning.service.d/steps.conf
    make install DESTDIR="$folder/tree" IMPL=sh STEPS='user data hostname ready remember'
    grep -qx 'ExecStart=/usr/local/sbin/azure-provisioning user data hostname ready remember' "$drop_in"
    grep -qx 'Environment=AZURE_PROVISIONING_ATTEMPTS=900' "$drop_in"
    grep -qx 'StateDirectory=azure-provisioning' "$drop_in"
    make install DESTDIR="$folder/tree" IMPL=sh STEPS='ready publish'
    [ "$(wc -l <"$drop_in")" -eq 4 ] # not what other steps need
    make install DESTDIR="$folder/tree" IMPL=sh
    [ ! -e "$drop_in" ]
    run make install DESTDIR="$folder/other" IMPL=sh STEPS='user nonsense'
    [ "$status" -ne 0 ]
    [ ! -e "$folder/other" ]
}

@test "the score of the README's steps is the one that it tells" {
    command -v systemd-analyze || skip 'no systemd-analyze'
    systemd-analyze security --help | grep -q -e --threshold || skip 'systemd-analyze cannot score a file'
    read -r score steps < <(
        sed -n 's/^.systemd-analyze security. scores .\(.*\). \([0-9]\)\.\([0-9]\), of 10.*/\2\3 \1/p' README.md
    )
    make install DESTDIR="$folder/tree" IMPL=sh STEPS="$steps"
    systemd-analyze security --no-pager --offline=true --root="$folder/tree" --threshold="$score" \
        azure-provisioning.service
}

@test "make install follows PREFIX and UNITDIR" {
    make install DESTDIR="$folder/tree" PREFIX=/opt/azure UNITDIR=/usr/lib/systemd/system IMPL=sh
    grep -q '^ExecStart=/opt/azure/sbin/azure-provisioning$' \
        "$folder/tree/usr/lib/systemd/system/azure-provisioning.service"
    [ -x "$folder/tree/opt/azure/sbin/azure-provisioning" ]
}

@test "make install without IMPL installs nothing" {
    run make install DESTDIR="$folder/tree"
    [ "$status" -ne 0 ]
    [ ! -e "$folder/tree" ]
}

@test "the unit passes systemd-analyze verify without a word" {
    command -v systemd-analyze || skip 'no systemd-analyze'
    make install DESTDIR="$folder/tree" IMPL=sh
    mkdir -p "$folder/tree/usr/lib/systemd"
    cp -r /lib/systemd/system "$folder/tree/usr/lib/systemd/" # the targets it names
    run --separate-stderr systemd-analyze verify --man=no --root="$folder/tree" azure-provisioning.service
    [ "$status" -eq 0 ]
    [ -z "$output$stderr" ]
    # and verify would have said something
    echo Nonsense=1 >>"$folder/tree/etc/systemd/system/azure-provisioning.service"
    run --separate-stderr systemd-analyze verify --man=no --root="$folder/tree" azure-provisioning.service
    [ -n "$stderr" ]
}

@test "the unit's sandbox scores 1.5 or better" {
    command -v systemd-analyze || skip 'no systemd-analyze'
    systemd-analyze security --help | grep -q -e --threshold || skip 'systemd-analyze cannot score a file'
    score() { systemd-analyze security --no-pager --offline=true --threshold=15 "$1"; }
    score ./azure-provisioning.service
    # and it would have failed
    grep -v '^CapabilityBoundingSet=' azure-provisioning.service >"$folder/azure-provisioning.service"
    run score "$folder/azure-provisioning.service"
    [ "$status" -ne 0 ]
}

@test "the unit has what the README says of it" {
    grep -q '^RuntimeMaxSec=40min$' azure-provisioning.service
    for name in ATTEMPTS INTERVAL; do
        value=$(sed -n "s/^Environment=.*AZURE_PROVISIONING_$name=\([0-9]*\).*/\1/p" azure-provisioning.service)
        grep -q "^| .AZURE_PROVISIONING_$name. | .[0-9]*. | .$value. |" README.md
        grep -q "AZURE_PROVISIONING_$name=$value" <(sed -n '/openrc-run/,/}/p' README.md)
    done
    # shellcheck disable=SC2016 # of the script, not of this shell
    addresses=$(sed -n 's/^[A-Z]*=${AZURE_.*-http:\/\/\(.*\)}$/\1/p' azure-provisioning.sh)
    [ "$(sed -n 's/^IPAddressAllow=//p' azure-provisioning.service)" = "$(xargs <<<"$addresses")" ]
}

# The runner with cases of our own: copies of the kit, to be spoiled.
copy_kit() {
    rm -rf "$folder/kit"
    cp -r tests/kit "$folder/kit"
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
    run python3 "$folder/kit/run.py" --only must- "sh $PWD/azure-provisioning.sh"
    [[ $output == *$'\n0 passed'* ]]
}

@test "nothing of a test changes this machine, whatever its PATH has" {
    name=$(uname -n) hostname=$(cat /etc/hostname)
    # a program that does not look for hostnamectl, and calls all that it can
    printf '%s\n' '#!/bin/sh' 'echo changed >/etc/hostname' 'echo changed >/proc/sys/kernel/hostname' \
        'echo x >/tmp/azure-provisioning-was-here' '/usr/bin/hostnamectl set-hostname changed' \
        '/bin/systemctl disable azure-provisioning.service' >"$folder/wild"
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
