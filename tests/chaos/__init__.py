"""Tests with faults: killed processes, full disks, changed clocks, lost connections."""
