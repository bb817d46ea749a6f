# Runs in the virtual machine, as root, in a unit to which systemd delegates its control group.
uname -r
stat -f -c 'cgroups: %T' /sys/fs/cgroup
export HOME=/root TMPDIR=/var/tmp
pytest() {
    .venv/bin/python -m pytest -n 0 -v --color=no -m "not ray and not fidelity" --basetemp=/var/tmp/tests "$@"
}
if [ -n "$VM_TEST_ARGUMENTS" ]; then
    eval "pytest $VM_TEST_ARGUMENTS"
    exit
fi
status=0
pytest tests/vm/installed_unit.py || status=1
pytest $(cat tests/vm/suites) || status=1
exit $status
