#!/bin/sh
# Runs the command that the guest was booted for; sends its output through the virtio-serial port `tare.output`, then the closing line
# that `output.py` looks for. Ends by turning the machine off, in case nobody has done so by then.
#
#   run.sh JOB      a directory with `command` (a shell script) and `mark` (the closing line's first word)
job=$1
read -r mark <"$job/mark"
for entry in /sys/class/virtio-ports/*; do
    read -r name <"$entry/name"
    [ "$name" != tare.output ] || port=/dev/${entry##*/}
done
# The port can be opened once only, and a program may open /dev/stdout anew: so a pipe is its standard output.
mkfifo /run/guest-output
cat /run/guest-output >"$port" &
exec 3<>/run/guest-output
/bin/sh "$job/command" </dev/null >&3 2>&1 3>&-
printf '\n%s %s\n' "$mark" "$?" >&3
sleep 5
echo o >/proc/sysrq-trigger
sleep 60
