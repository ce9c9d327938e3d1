#!/bin/sh
# Make an image on Azure, with your subscription, and try it. `az-image.sh -h` prints the usage.

set -eu

USAGE='usage: az-image.sh [OPTION]... IMAGE [STEP]...

Make a managed image named IMAGE that azure-provisioning provisions with these
steps; the default is: user hostname ready remember. A VM is made of it, to see
that it works. Run "az login" first. Both VMs are in a resource group of their
own, which is deleted in the end. If anything fails, the image is deleted, too.

options:
  -b BASE      image of the base VM, a Debian or Ubuntu
               (default: Debian:debian-12:12-gen2:latest)
  -g GROUP     resource group of the image, which must exist (default: images)
  -i IMPL      sh or py: the program in shell or in Python (default: sh)
  -k           keep everything if something fails, to look for the reason
  -l LOCATION  where all of this is (default: the one of GROUP)
  -s SIZE      size of the VMs (default: Standard_B2s)
  -h           print this text'

BASE=Debian:debian-12:12-gen2:latest
GROUP=images
IMPL='sh'
KEEP=''
LOCATION=''
SIZE=Standard_B2s

PROJECT=$(cd "$(dirname "$0")/../.." && pwd)
BASE_USER=baker
TEST_USER=tester
TEST_VM=image-test

# What has to be removed in the end
folder=''
has_group=''
has_image=''

main() {
    parse_arguments "$@"
    trap clean_up EXIT
    trap 'exit 1' HUP INT TERM
    prepare
    make_base_vm
    bake
    make_image
    make_test_vm
    check_test_vm
    has_image=''
    say "The image is ready: $image_id"
}

parse_arguments() {
    while getopts b:g:i:kl:s:h option; do
        case $option in
        b) BASE=$OPTARG ;;
        g) GROUP=$OPTARG ;;
        i) IMPL=$OPTARG ;;
        k) KEEP=yes ;;
        l) LOCATION=$OPTARG ;;
        s) SIZE=$OPTARG ;;
        h)
            printf '%s\n' "$USAGE"
            exit
            ;;
        *)
            printf '%s\n' "$USAGE" >&2
            exit 2
            ;;
        esac
    done
    shift $((OPTIND - 1))
    if [ $# -eq 0 ]; then
        printf '%s\n' "$USAGE" >&2
        exit 2
    fi
    IMAGE=$1
    case $IMAGE in
    [A-Za-z0-9]*) ;;
    *) fail "no name for an image: $IMAGE" ;;
    esac
    shift
    STEPS=${*:-user hostname ready remember}
    VM_GROUP=$IMAGE-$(date +%Y%m%d%H%M%S)
}

say() {
    printf '== %s\n' "$*"
}

fail() {
    printf 'az-image.sh: %s\n' "$1" >&2
    exit 1
}

# prepare: check what can be checked before anything is made
prepare() {
    for command in az make ssh ssh-keygen tar; do
        command -v "$command" >/dev/null || fail "install $command first"
    done
    folder=$(mktemp -d)
    say 'Installing to a temporary folder'
    make -s -C "$PROJECT" install IMPL="$IMPL" STEPS="$STEPS" DESTDIR="$folder/root" >/dev/null
    ssh-keygen -q -t rsa -b 3072 -N '' -f "$folder/key"
    if [ -z "$LOCATION" ]; then
        LOCATION=$(az group show --name "$GROUP" --query location --output tsv)
    fi
    if [ "$(az group exists --name "$VM_GROUP")" != false ]; then
        fail "there is a resource group $VM_GROUP"
    fi
    names=$(az image list --resource-group "$GROUP" --query '[].name' --output tsv)
    if printf '%s\n' "$names" | grep -qixF -e "$IMAGE"; then
        fail "there is an image $IMAGE in $GROUP"
    fi
}

make_base_vm() {
    say "Making the base VM, of $BASE"
    has_group=yes
    az group create --name "$VM_GROUP" --location "$LOCATION" --output none
    # A VM of another security type cannot become a managed image.
    az vm create --resource-group "$VM_GROUP" --name base --image "$BASE" --size "$SIZE" \
        --security-type Standard --admin-username "$BASE_USER" \
        --ssh-key-values "$folder/key.pub" --output none
}

# bake: install the program on the base VM, see that it would work there, and remove what an image
# must not have. With that goes the user of the base VM.
bake() {
    address=$(address_of base)
    say "Installing the program on the base VM, $address"
    until_ssh "$BASE_USER"
    tar -C "$folder/root" -c . |
        on_vm "$BASE_USER" 'sudo tar -C / -x --no-same-owner --no-overwrite-dir'
    say 'What the program would do there'
    on_vm "$BASE_USER" "sudo AZURE_PROVISIONING_ATTEMPTS=1 \
/usr/local/sbin/azure-provisioning --dry-run $(steps_to_try)" </dev/null
    say 'Baking'
    on_vm "$BASE_USER" "sudo sh -s $BASE_USER" <"$PROJECT/recipes/debian/bake.sh"
}

# steps_to_try: print the steps without "password": its DVD may be gone on a VM that has booted
steps_to_try() {
    for step in $STEPS; do
        if [ "$step" != password ]; then
            printf '%s ' "$step"
        fi
    done
}

make_image() {
    say "Making the image $IMAGE"
    az vm deallocate --resource-group "$VM_GROUP" --name base --output none
    az vm generalize --resource-group "$VM_GROUP" --name base --output none
    vm_id=$(az vm show --resource-group "$VM_GROUP" --name base --query id --output tsv)
    disk_id=$(az vm show --resource-group "$VM_GROUP" --name base \
        --query storageProfile.osDisk.managedDisk.id --output tsv)
    generation=$(az disk show --ids "$disk_id" --query hyperVGeneration --output tsv)
    has_image=yes
    az image create --resource-group "$GROUP" --name "$IMAGE" --source "$vm_id" \
        --location "$LOCATION" --os-type Linux --hyper-v-generation "$generation" --output none
    image_id=$(az image show --resource-group "$GROUP" --name "$IMAGE" --query id --output tsv)
}

# make_test_vm: this succeeds only if the VM reports Ready. The image has no agent that can run
# extensions; without --enable-agent false, Azure would wait for one.
make_test_vm() {
    say 'Making a VM of the image'
    az vm create --resource-group "$VM_GROUP" --name "$TEST_VM" --image "$image_id" \
        --size "$SIZE" --security-type Standard --enable-agent false \
        --admin-username "$TEST_USER" --ssh-key-values "$folder/key.pub" --output none
}

check_test_vm() {
    case " $STEPS " in
    *' user '*) ;;
    *)
        say 'The VM is Ready. Without the step "user" nobody can log in, to see more'
        return
        ;;
    esac
    address=$(address_of "$TEST_VM")
    say "Logging in to the VM, $address"
    until_ssh "$TEST_USER"
    on_vm "$TEST_USER" 'sudo -n journalctl --no-pager --output=cat -u azure-provisioning' </dev/null
    case " $STEPS " in
    *' hostname '*)
        name=$(on_vm "$TEST_USER" 'uname -n' </dev/null)
        [ "$name" = "$TEST_VM" ] || fail "the hostname is $name"
        ;;
    esac
}

address_of() { # VM
    az vm show --resource-group "$VM_GROUP" --name "$1" --show-details --query publicIps \
        --output tsv
}

# until_ssh USER: wait until the VM lets the user in, for five minutes at most
until_ssh() {
    tries=30
    until on_vm "$1" true </dev/null; do
        tries=$((tries - 1))
        [ "$tries" -gt 0 ] || fail "$1 cannot log in"
        sleep 10
    done
}

on_vm() { # USER COMMAND
    ssh -i "$folder/key" -o IdentitiesOnly=yes -o BatchMode=yes -o ConnectTimeout=10 \
        -o StrictHostKeyChecking=accept-new -o UserKnownHostsFile="$folder/known_hosts" \
        "$1@$address" "$2"
}

# clean_up: on every end of the script. What cannot be deleted is named.
clean_up() {
    status=$?
    trap '' HUP INT TERM
    set +e
    if [ "$status" -ne 0 ] && [ -n "$KEEP" ] && [ -n "$has_group" ]; then
        say "Kept: the resource group $VM_GROUP, the SSH key $folder/key"
        exit "$status"
    fi
    if [ -n "$has_image" ]; then
        say "Deleting the image $IMAGE"
        az image delete --resource-group "$GROUP" --name "$IMAGE" ||
            say "DELETE IT YOURSELF: the image $IMAGE in $GROUP"
    fi
    if [ -n "$has_group" ]; then
        say "Deleting the resource group $VM_GROUP"
        az group delete --name "$VM_GROUP" --yes --no-wait ||
            say "DELETE IT YOURSELF: the resource group $VM_GROUP"
    fi
    if [ -n "$folder" ]; then
        rm -rf "$folder"
    fi
    exit "$status"
}

main "$@"
