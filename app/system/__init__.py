"""The machine: memory, processors, devices, worker processes and full disks."""
