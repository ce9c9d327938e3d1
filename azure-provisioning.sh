#!/bin/sh
# The provisioning agent in one file; azure-provisioning.py is the same program in Python, function by function.
# Needs curl, or wget with head, timeout and tr. Sources: https://learn.microsoft.com/azure/virtual-machines/, the pages
# linux/no-agent and linux/provisioning for the protocol, instance-metadata-service for IMDS.
set -fu # -f: what a server sent is split into words below, not matched with file names; all variables are global
export LC_ALL=C
umask 077
trap '' PIPE # the VM is Ready whether or not somebody listens
VERSION=1.0.0
USAGE='usage: azure-provisioning [-h | --help | --version | -n | --dry-run] [STEP]...
  ready      tell Azure that this Linux VM is Ready: a health report to the WireServer, for the goal state it gives
  hostname   set the hostname the user asked for, from IMDS, the Instance Metadata Service
  disable    disable azure-provisioning.service, so that it runs on the first boot only
  user       create the admin user that IMDS names, with its SSH keys, and with sudo or doas without a password
  password   set the password of that user, from the DVD, and whether sshd takes passwords
  data       write userData, from IMDS, and customData, from the DVD, to /var/lib/azure-provisioning, for root alone
  publish    renew the DHCP lease, so that the DNS of Azure learns the hostname
  remember   record the id of this VM, on which a run that names this step does nothing from then on
Without STEP: ready hostname disable. Steps run in the order given; the first that fails ends the run, and Azure is told
NotReady if ready was still to come. With -n or --dry-run, what would be done is said and not done. Progress goes to
stdout, trouble to stderr. Exit status: 0 every step done, 1 a step failed, 2 usage.
Settings, from the environment, and their defaults:
  AZURE_PROVISIONING_WIRESERVER  base URL of the WireServer (http://168.63.129.16)
  AZURE_PROVISIONING_IMDS        base URL of IMDS (http://169.254.169.254)
  AZURE_PROVISIONING_ATTEMPTS    attempts a step makes before it gives up, from 1 (240)
  AZURE_PROVISIONING_INTERVAL    longest wait between two attempts, in seconds, from 0 (5)
  AZURE_PROVISIONING_TIMEOUT     time for one exchange, in seconds, from 1 (30)'
WIRESERVER=${AZURE_PROVISIONING_WIRESERVER-http://168.63.129.16}
IMDS=${AZURE_PROVISIONING_IMDS-http://169.254.169.254}
ATTEMPTS=${AZURE_PROVISIONING_ATTEMPTS-240}
INTERVAL=${AZURE_PROVISIONING_INTERVAL-5}
TIMEOUT=${AZURE_PROVISIONING_TIMEOUT-30}
BODY_LIMIT=65536 # bytes
DATA_LIMIT=122880 # bytes, of what has 64 KiB in base64 in it
PRINT='BEGIN { print ENVIRON["TEXT"] }' # of awk: arguments and files can be seen, the environment cannot
STATE=/var/lib/azure-provisioning
OVF=/Environment/ProvisioningSection/LinuxProvisioningConfigurationSet
NEWLINE='
'
SPACE=" $(printf '\t\n\r')" # XML's white space
CONTROL=$(printf '\001-\037\177')
ID='!#-%(-;=?-~' # what an id is made of: visible ASCII, but for < > & " and '
KEY='(ssh-rsa AAAAB3Nz|ssh-ed25519 AAAAC3Nz|ecdsa-sha2-nistp(256|384|521) AAAAE2Vj|sk-ssh-ed25519@openssh.com AAAAGnNr|'
KEY=$KEY"sk-ecdsa-sha2-nistp256@openssh.com AAAAInNr)[A-Za-z0-9+/=]*( [^$CONTROL]*)?"
BASE64='([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{4}|[A-Za-z0-9+/]{2}[AEIMQUYcgkosw048]=|[A-Za-z0-9+/][AQgw]==)'

say() { { printf '%s\n' "$@" || :; } 2>/dev/null; }
did() { [ "$dry_run" ] || say "$@"; }
complain() { say "$@" >&2; }
misused() { complain "azure-provisioning: $1" "$USAGE"; exit 2; }
call() { command -v "$1" >/dev/null && command "$@"; } # COMMAND [ARGUMENT]...: if there is such a command
run() { if [ "$dry_run" ]; then IFS=$SPACE && command -v "$1" >/dev/null && say "Would run: $*"; else call "$@"; fi; }

put() { # FILE MODE OWNER COMMAND [ARGUMENT]...: replace the file by what the command prints, atomically
    file=$1 mode=$2 owner=$3
    shift 3
    [ -z "$dry_run" ] || { say "Would write $file" && return; }
    reason="cannot write $file"
    { { mkdir -p "${file%/*}" && [ ! -d "$file" ] && (rm -f "$file.new" && set -C && "$@" >"$file.new") &&
        chmod "$mode" "$file.new" && { [ -z "$owner" ] || chown -h "$owner" "$file.new"; } &&
        mv -f "$file.new" "$file"; } || { rm -f "$file.new" && return 1; }; } 2>/dev/null
}

check_url() { # NAME URL: http://HOST[:PORT][/PATH]
    rest=${2#http://}
    case $rest in "$2" | *[!A-Za-z0-9._~:/-]* | *//*) misused "bad $1" ;; esac
    case ${rest%%/*} in '' | :* | *: | *:*[!0-9]* | *:0* | *:??????*) misused "bad $1" ;; esac
}

check_number() { # NAME NUMBER LEAST: without leading zeros, of six digits at most
    case $2 in '' | *[!0-9]* | 0?* | ???????*) misused "bad $1" ;; esac
    [ "$2" -ge "$3" ] || misused "bad $1"
}

exchange() { # LABEL URL DATA [--header HEADER]...: POST the DATA, or GET without; sets $status and $body, or $reason
    label=$1 url=$2 data=$3 limit=$BODY_LIMIT
    shift 3
    [ "$label" != userData ] || limit=$DATA_LIMIT
    transfer "$@" --header "User-Agent: azure-provisioning/$VERSION" --header 'Accept: */*' \
        --header 'Accept-Encoding: identity' --header 'Connection: close'
    case ${data:+POST}$status:$code in # status 000: none; code, of curl: 28 too slow, 63 too large
    200:0 | POST2??:0) return 0 ;;
    200:28 | POST2??:28 | *000:28) reason="$label: timed out" ;;
    200:63 | POST2??:63) reason="$label: reply too large" ;;
    200:* | POST2??:* | *000:[018] | *000:27) reason="$label: broken reply" ;;
    *000:127) reason="$label: no curl or wget" ;;
    *000:*) reason="$label: no connection" ;;
    *) reason="$label: HTTP $status" ;;
    esac
    return 1
}

transfer() { # [--header HEADER]...: sets $status, $body, and $code to curl's exit status, or the one that fits wget's
    if command -v curl >/dev/null; then
        [ -z "$data" ] || set -- "$@" --data-binary "$data"
        # Before curl 8.4, only --limit-rate bounds a body without a length: to 4 limits, and 4 KiB for each second.
        { reply=$(curl -q --silent --fail --noproxy '*' --proto =http --max-time "$TIMEOUT" \
            --limit-rate $((4 * limit / TIMEOUT + 4096)) --max-filesize "$limit" \
            --write-out ' %{http_code} %{size_download}' "$@" "$url"); } 2>/dev/null
        code=$? size=${reply##* }
    else
        [ -z "$data" ] || set -- "$@" --post-data "$data"
        case $(wget --help 2>&1) in *--max-redirect*) set -- --no-config --tries=1 --max-redirect=0 "$@" ;; esac # GNU's
        reply=$({
            said=$(timeout "$TIMEOUT" wget -q -S -Y off -O - "$@" "$url" 2>&1 >&3)
            code=$? status=000
            case $said in *'  HTTP/1.'?' '[1-9][0-9][0-9]*) status=${said#*  HTTP/1.? } ;; esac
            # timeout ends with 124 (coreutils) or 143 (BusyBox); wget indents what the server sent
            case $code:$said in 124:* | 143:*) code=28 ;; [!0]:*'  '*) code=8 ;; [!0]:*) code=7 ;; esac
            printf ' %.3s %s' "$status" "$code"
        } 3>&1 2>/dev/null | head -c $((limit + 10)) | tr '\000' '\001')
        [ "${#reply}" -lt $((limit + 10)) ] || reply="$reply 200 0" # cut there, and with it the end
        code=${reply##* }
        size=$((${#reply} - 5 - ${#code})) # without " STATUS CODE"
    fi
    reply=${reply% *}
    status=${reply##* }
    body=${reply% *}
    [ "${#body}" -eq "$size" ] || body='\0' # a NUL byte was dropped: put in what is neither goal state nor hostname
    [ "$size" -le "$limit" ] || code=63
}

retry() { # STEP ATTEMPTS COMMAND [ARGUMENT]...: until COMMAND succeeds, or returns 2 for what will not change
    step=$1 attempts=$2 attempt=1
    shift 2
    until "$@"; do
        final=$?
        complain "$step: attempt $attempt of $attempts: $reason"
        last=$reason
        case $final:$attempt in 2:* | *:"$attempts") reason="gave up after $attempt attempts" && return 1 ;; esac
        sleep $((attempt < INTERVAL ? attempt : INTERVAL))
        attempt=$((attempt + 1))
    done
}

trim() { # TEXT: sets $value to its words, with a space between: a value has one
    IFS=$SPACE
    # shellcheck disable=SC2048,SC2086 # words; then without the empty ones that a CR makes
    set -- $1 && set -- $*
    value="$*"
}

parse() { # ROOT: read the document in $body, whose values are named at the end of tag; sets those that are in it
    unset incarnation container instance user_name user_password no_passwords custom_data secret
    wanted=$1 path='' place='' root='' text='' inside='' IFS='<'
    case $body in *[$(printf '\001-\010\013\014\016-\037')]*) return 1 ;; esac # XML has no such characters
    # Between two '<' stand a tag and the text behind it, or a part of a comment or processing instruction. What is
    # before the first is put behind an instruction, ?x?>; the space keeps the shell from dropping a '<' at the end.
    case $body in ["$SPACE<"]*) ;; $(printf '\357\273\277')["$SPACE<"]*) body=${body#???} ;; esac # byte order mark
    case $body in '<?xml'["$SPACE"]*) body='<?x'${body#?????} ;; esac # the declaration, which stands nowhere else
    for piece in '?x?>'$body' '; do
        [ -n "$inside" ] || case $piece in
        '!--'*) inside='-->' piece=${piece#!--} ;;
        '!'* | '?'["$SPACE"?\>]* | '?'[Xx][Mm][Ll]["$SPACE"?]*) return 1 ;; # a DTD, CDATA; no name, or a reserved one
        '?'*) inside='?>' ;;
        *) tag || return 1 ;;
        esac
        [ -z "$inside" ] || case "$inside$piece " in
        '-->'"${piece%%--*}--"[!\>]*) return 1 ;;          # '--' in a comment
        "$path$inside"*"$inside"*[!"$SPACE"]*) return 1 ;; # text outside the root: $path is empty there
        "$inside"*"$inside"*) inside='' text='<' ;;        # '<' spoils a value with a comment inside
        esac
    done
    [ -z "$path$inside" ] && [ -n "$root" ]
}

tag() { # read the tag at the start of $piece, and the text behind it
    while head=${piece%%[\"\'\>]*} && rest=${piece#"$head"}; do # drop the attributes: one may hold a '>'
        case $rest in
        '>'*) break ;;
        \"*\"*) rest=${rest#?*\"} ;;
        \'*\'*) rest=${rest#?*\'} ;;
        *) return 1 ;;
        esac
        case $head in [!/]*["$SPACE"][!"$SPACE"=]*=*) piece="${head%%["$SPACE"]*} $rest" ;; *) return 1 ;; esac
    done
    name=${head#/}
    name=${name%%["$SPACE"/]*} rest=${rest#>}
    case $head in '' | / | ["$SPACE"]* | "/$name"*[!"$SPACE"]* | "$name"*/?* | "$name"*[!"$SPACE"/]*) return 1 ;; esac
    case $head in
    [!/]*) [ -n "$path" ] || [ "$root${name##*:}" = "$wanted" ] || return 1
        root=$wanted path=$path/$name place=$place/${name##*:} text='' ;; # the place is without prefixes
    esac
    case $head in
    /* | */)
        [ "${path##*/}" = "$name" ] || return 1
        case $place in
        /GoalState/Incarnation) trim "$text"; incarnation=${incarnation-$value} ;;
        /GoalState/Container/ContainerId) trim "$text"; container=${container-$value} ;;
        /GoalState/Container/RoleInstanceList/RoleInstance/InstanceId) trim "$text"; instance=${instance-$value} ;;
        "$OVF/UserName") trim "$text"; user_name=${user_name-$value} ;;
        "$OVF/UserPassword") user_password=${user_password-$text} ;;
        "$OVF/DisableSshPasswordAuthentication") trim "$text"; no_passwords=${no_passwords-$value} ;;
        "$OVF/CustomData") custom_data=${custom_data-$text} ;;
        esac
        path=${path%/*} place=${place%/*} text='<' ;; # '<' spoils a value with an element inside
    *) text=$rest ;;
    esac
    [ -n "$path" ] || case $rest in *[!"$SPACE"]*) return 1 ;; esac
}

goal_state() {
    exchange 'goal state' "${WIRESERVER%/}/machine?comp=goalstate" '' --header 'x-ms-version: 2012-11-30' \
        --header 'x-ms-agent-name: custom-provisioning' || return
    if parse GoalState; then reason=''; else reason='not a goal state'; fi
    case ${incarnation-} in '' | *[!0-9]*) reason=${reason:-no Incarnation} ;; esac
    case ${container-} in '' | *[!$ID]*) reason=${reason:-no ContainerId} ;; esac
    case ${instance-} in '' | *[!$ID]*) reason=${reason:-no InstanceId} ;; esac
    [ -z "$reason" ] || { reason="goal state: $reason" && return 1; }
    say "ContainerId: $container" "InstanceId: $instance" "Incarnation: $incarnation"
}

health_report() { # STATE DETAILS: only for a goal state just read: the WireServer refuses an earlier incarnation
    goal_state || return
    report="<Health><GoalStateIncarnation>$incarnation</GoalStateIncarnation><Container><ContainerId>$container\
</ContainerId><RoleInstanceList><Role><InstanceId>$instance</InstanceId><Health><State>$1</State>$2</Health></Role>\
</RoleInstanceList></Container></Health>"
    [ -z "$dry_run" ] || { say 'Would send the following data to Wireserver:' "$report" && return; }
    say 'Sending the following data to Wireserver:' "$report"
    exchange 'health report' "${WIRESERVER%/}/machine?comp=health" "$report" --header 'x-ms-version: 2012-11-30' \
        --header 'x-ms-agent-name: custom-provisioning' --header 'Content-Type: text/xml;charset=utf-8' || return
    say "Response: $status"
}

ready() {
    say 'Retrieving goal state from the Wireserver'
    retry ready "$ATTEMPTS" health_report Ready ''
}

not_ready() { # REASON: tell Azure that this VM will not be Ready, so that nobody waits for it
    vm_id
    case $1 in *': gave up after '*) set -- "$1: $last" ;; esac
    description=$(printf '%.512s' "result=error|reason=$1|agent=azure-provisioning/$VERSION|vm_id=$id|timestamp=$(
        date -u +%Y-%m-%dT%H:%M:%SZ)" | tr -c " -%'-;=?-~" ' ')
    say 'Retrieving goal state from the Wireserver'
    retry NotReady "$ATTEMPTS" health_report NotReady "<Details><SubStatus>ProvisioningFailed</SubStatus>\
<Description>$description</Description></Details>" || complain "NotReady: $reason"
}

metadata() { # LEAF API_VERSION [EMPTY]: ask IMDS; sets $value; EMPTY is the reason why an empty one is no good
    exchange "${1##*/}" "${IMDS%/}/metadata/instance/compute/$1?api-version=$2&format=text" '' \
        --header 'Metadata: true' || case $reason in
    *'HTTP 404' | *'HTTP 410' | *'HTTP 429' | *'HTTP 5'?? | *[!0-9]) return 1 ;; # the last: no status
    *) return 2 ;; # any other status
    esac
    trim "$body"
    reason="${1##*/}: ${3-}"
    [ -n "$value" ] || [ -z "${3-}" ]
}

optional() { # STEP LEAF: ask IMDS for what may not be there; $value is empty then
    retry "$1" 5 metadata "$2" 2021-02-01 && return
    case $status in 400 | 404) value='' && return ;; esac # 400: an IMDS that does not know it
    retry "$1" "$ATTEMPTS" metadata "$2" 2021-02-01
}

hostname() {
    say 'Retrieving hostname from IMDS'
    retry hostname 5 metadata osProfile/computerName 2021-02-01 'no valid hostname' ||
        retry hostname "$ATTEMPTS" metadata name 2019-06-01 'no valid hostname' || return
    case $value in *.*) longest=64 ;; *) longest=63 ;; esac # Linux takes 64 in all, DNS 63 between two dots
    case $value in *[!A-Za-z0-9._-]* | [!A-Za-z0-9]* | *[!A-Za-z0-9] | *..*) longest=0 ;; esac
    [ "${#value}" -le "$longest" ] || { reason='no valid hostname' && return 1; }
    say "Hostname: $value"
    run hostnamectl set-hostname "$value" && return
    put /etc/hostname 644 '' printf '%s\n' "$value" || return
    reason="cannot set the kernel's hostname"
    { [ -n "$dry_run" ] || command hostname "$value" || printf '%s\n' "$value" >/proc/sys/kernel/hostname; } 2>/dev/null
}

disable() {
    reason='neither systemctl nor rc-update disabled azure-provisioning'
    run systemctl disable azure-provisioning.service || run rc-update del azure-provisioning || return
    did 'Disabled azure-provisioning.service'
}

user() {
    say 'Retrieving user from IMDS'
    retry user "$ATTEMPTS" metadata osProfile/adminUsername 2021-02-01 'no valid user name' || return
    user=$value reason='no valid user name'
    valid_user "$user" || return
    say "User: $user"
    ssh_keys || return
    shell=$(command -v /bin/bash || say /bin/sh)
    account "$user" /etc/passwd || run useradd -m -s "$shell" "$user" || run adduser -D -s "$shell" "$user"
    [ -z "$dry_run" ] || account "$user" /etc/passwd || return 0
    reason='neither useradd nor adduser made the user'
    account "$user" /etc/shadow || account "$user" /etc/passwd || return
    reason='chpasswd failed' # with '!', sshd without PAM takes no key, either; '*' is just no password
    case $secret in '!'*) say "$user:*" | run chpasswd -e || run usermod -p '*' "$user" || return ;; esac
    account "$user" /etc/passwd && authorize && grant
}

# sudo takes names in capitals, such as ALL, for something else
valid_user() { printf '%s\n' "$1" | grep -Ex '[A-Za-z_][A-Za-z0-9._-]{0,31}' | grep '[a-z]' | grep -qvx root; }

account() { # NAME FILE: find it in /etc/passwd or /etc/shadow; sets $secret, $owner and $home
    while IFS=: read -r name secret uid gid _ home _ || [ -n "$name" ]; do
        [ "$name" != "$1" ] || { owner=$uid:$gid && return; }
    done 2>/dev/null <"$2"
    return 1
}

ssh_keys() { # sets $keys, a line each
    optional user publicKeys || return
    list=$value keys='' number=0 IFS=$SPACE
    for entry in $list; do
        reason='publicKeys: no valid list' # 0/ 1/ 2/ and so on
        [ "${entry%/}" = $number ] && [ $number -lt 100 ] || return 1
        optional user publicKeys/$number/keyData || return
        trim "$(printf '%s' "${value:+$body}" | tr -d '\r\n')" # a key may be broken into lines
        { printf '%s\n' "$value" | grep -Eqx "$KEY" && say "SSH key: ${value%% *}" && keys=$keys$value$NEWLINE; } ||
            complain "user: publicKeys/$number: no OpenSSH public key"
        number=$((number + 1))
    done
    [ -z "$keys" ] || return 0
    optional user osProfile/disablePasswordAuthentication || return
    reason='no valid SSH key, and no password'
    [ "$value" = false ]
}

authorize() { # let the user of $home in with $keys
    [ -n "$keys" ] || return 0
    reason="$home/.ssh: a symlink is in the way"
    [ ! -L "$home/.ssh" ] && [ ! -L "$home/.ssh/authorized_keys" ] || return
    reason="cannot make $home/.ssh"
    [ -d "$home" ] || { run mkdir -p "$home" && run chown "$owner" "$home"; } || return # an earlier run was cut off
    run mkdir -p "$home/.ssh" && run chown -h "$owner" "$home/.ssh" && run chmod 700 "$home/.ssh" &&
        run chmod go-w "$home" || return
    known=$(cat "$home/.ssh/authorized_keys" 2>/dev/null) IFS=$NEWLINE
    known=$known${known:+$NEWLINE}
    for key in $keys; do
        blob=${key#* }
        blob="${key%% *} ${blob%% *}"
        case $NEWLINE$known in *"$NEWLINE$blob "* | *"$NEWLINE$blob$NEWLINE"*) ;; *) known=$known$key$NEWLINE ;; esac
    done
    put "$home/.ssh/authorized_keys" 600 "$owner" printf %s "$known"
}

grant() { # sudo or doas to the user, without a password
    doas=/etc/doas.conf
    [ ! -d /etc/doas.d ] || doas=/etc/doas.d/azure-provisioning.conf
    rule="$user ALL=(ALL:ALL) NOPASSWD:ALL" rules=$(grep -vxF "permit nopass $user" $doas 2>/dev/null)
    rules="${rules:+$rules$NEWLINE}permit nopass $user"
    if say "$rule" | run visudo -q -c -f -; then put /etc/sudoers.d/azure-provisioning 440 '' printf '%s\n' "$rule"
    elif say "$rules" | run doas -C /dev/stdin; then put $doas 440 '' printf '%s\n' "$rules"
    else complain "user: neither sudo nor doas takes a rule for $user"; fi
}

dvd() { # read the DVD that is in the drive on the first boot
    folder=/run/azure-provisioning/dvd reason='ovf-env.xml: no DVD'
    mkdir -p $folder && { [ -f $folder/ovf-env.xml ] || { [ -e /dev/sr0 ] && # there already: a run was cut off
        call mount -t udf,iso9660 -o ro,nosuid,nodev,noexec /dev/sr0 $folder; }; } || return
    body=$([ ! -f $folder/ovf-env.xml ] || head -c $DATA_LIMIT $folder/ovf-env.xml | tr '\000' '\001')
    call umount $folder
    reason='ovf-env.xml: not an OVF environment'
    parse Environment
}

password() {
    say 'Retrieving password from the DVD'
    retry password 5 dvd || return
    reason='no valid user name'
    valid_user "${user_name-}" || return
    reason='no valid password'
    case ${user_password-} in *['<'$CONTROL]*) return 1 ;; esac
    TEXT=${user_password-} awk "$PRINT" | sed -E 's/&(lt|gt|quot|apos|amp);//g' | grep -q '&' && return 1
    secret=$(TEXT=${user_password-} awk "$PRINT" |
        sed "s/&lt;/</g; s/&gt;/>/g; s/&quot;/\"/g; s/&apos;/'/g; s/&amp;/\&/g")
    [ -n "$secret" ] || [ -z "${user_password-}" ] && [ ${#secret} -le 72 ] || return
    reason='chpasswd failed'
    [ -z "$secret" ] || TEXT=$user_name:$secret awk "$PRINT" 2>/dev/null | run chpasswd || return
    [ -z "$secret" ] || did 'Password set'
    case ${no_passwords-} in [Tt][Rr][Uu][Ee]) sshd no ;; [Ff][Aa][Ll][Ss][Ee]) sshd yes ;; esac
}

sshd() { # ANSWER: whether it takes passwords, at either of its two prompts; of each, the first line counts
    [ -f /etc/ssh/sshd_config ] || return 0
    others=$(sed '1,2{/^PasswordAuthentication /d;/^KbdInteractiveAuthentication /d;}' /etc/ssh/sshd_config)
    put /etc/ssh/sshd_config 644 '' printf 'PasswordAuthentication %s\nKbdInteractiveAuthentication %s\n%s' "$1" "$1" \
        "${others:+$others$NEWLINE}" || return
    did "PasswordAuthentication: $1"
    run systemctl try-reload-or-restart sshd.service || run systemctl try-reload-or-restart ssh.service ||
        run rc-service --ifstarted sshd reload || :
}

data() {
    say 'Retrieving user data from IMDS'
    optional data userData && save userData user-data || return
    say 'Retrieving custom data from the DVD'
    ! retry data 5 dvd || { trim "${custom_data-}" && save customData custom-data; }
}

save() { # LABEL NAME: write $value, which is base64, to a file of $STATE; without one, remove that of another VM
    file=$STATE/$2 reason="$1: no base64"
    [ -n "$value" ] || { reason="cannot remove $file" && run rm -f "$file" && did "$1: none"; return; }
    value=$(TEXT=$value awk "$PRINT" | tr -d ' ' | grep -Ex "$BASE64") || return
    reason="cannot write $file"
    TEXT=$value awk "$PRINT" 2>/dev/null | put "$file" 600 '' base64 -d && did "$1: $file"
}

publish() {
    interface='' reason='no default route'
    while IFS=$SPACE read -r name destination _ _ _ _ _ mask _; do
        case $name/$destination/$mask in '*'*) ;; */00000000/00000000) interface=${interface:-$name} ;; esac
    done </proc/self/net/route
    [ -n "$interface" ] || return
    reason="no DHCP client renewed the lease of $interface"
    run networkctl reconfigure "$interface" || run nmcli device reapply "$interface" || run dhcpcd -n "$interface" ||
        { run dhclient -1 -q -sf /bin/true "$interface" && run dhclient -x -q "$interface"; } || # a second, for once
        run killall -USR1 udhcpc || return
    did "Renewed the DHCP lease of $interface"
}

vm_id() { id=$({ tr A-F a-f </sys/class/dmi/id/product_uuid; } 2>/dev/null | grep -Ex '[0-9a-f-]{36}'); } # sets $id

remember() {
    reason='cannot read /sys/class/dmi/id/product_uuid'
    vm_id && put $STATE/vm-id 600 '' printf '%s\n' "$id" && did "Remembered: $id"
}

main() { # [STEP]...
    steps='' dry_run='' told='' IFS=$SPACE
    for step; do
        case $step in
        ready | hostname | disable | user | password | data | publish | remember) steps="$steps $step" ;;
        -n | --dry-run) dry_run=yes ;;
        -h | --help) say "$USAGE" && exit ;;
        --version) say "azure-provisioning $VERSION" && exit ;;
        *) misused "unknown step or option: $step" ;;
        esac
    done
    check_url AZURE_PROVISIONING_WIRESERVER "$WIRESERVER"
    check_url AZURE_PROVISIONING_IMDS "$IMDS"
    check_number AZURE_PROVISIONING_ATTEMPTS "$ATTEMPTS" 1
    check_number AZURE_PROVISIONING_INTERVAL "$INTERVAL" 0
    check_number AZURE_PROVISIONING_TIMEOUT "$TIMEOUT" 1
    [ -n "$steps" ] || steps=' ready hostname disable'
    case $steps in *remember*) vm_id && grep -qsx "$id" $STATE/vm-id && say "Already provisioned: $id" && exit ;; esac
    for step in $steps; do
        steps=${steps#*" $step"} # what is still to come
        [ "$step" != ready ] || told=yes
        "$step" && continue
        complain "$step: $reason"
        case $told:$steps in :*ready*) not_ready "$step: $reason" ;; esac
        exit 1
    done
}

main "$@"
