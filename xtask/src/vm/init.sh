#!/bin/busybox sh
# The first process of a machine of `cargo xtask vm-test`: runs /plan and stops the machine. vm/console.rs reads the lines that
# begin with @.

/bin/busybox mkdir -p /sbin /usr/bin /usr/sbin
/bin/busybox --install -s
export PATH=/tools:/bin:/sbin:/usr/bin:/usr/sbin

mount -t proc none /proc
mount -t sysfs none /sys
mount -t devtmpfs none /dev
mount -t tmpfs none /tmp
case "$(cat /proc/cmdline)" in
*penstock.cgroup=no*) ;;
*) mount -t cgroup2 none /sys/fs/cgroup ;;
esac
ip link set lo up
for module in /modules/*.ko; do
    if [ -e "$module" ]; then insmod "$module"; fi
done

# A program may end without a newline, so each marker begins with one.
run() {
    name=$1 limit=$2
    shift 2
    printf '\n@begin %s\n' "$name"
    timeout "$limit" "$@" </dev/null 2>&1
    printf '\n@end %s %s\n' "$name" "$?"
}

run doctor 120 /tests/penstock doctor
while read -r name limit args; do
    # The arguments are split into words on purpose.
    # shellcheck disable=SC2086
    run "$name" "$limit" "/tests/deps/$name" $args
done </plan
run dmesg 60 dmesg
reboot -f
