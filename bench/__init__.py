# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: vmbus beside libvirt, QEMU and a bare KVM_RUN loop, in the same run on the same host.

    python -m bench              all of them (`make bench`)
    python -m bench start list   some

Each prints one line of JSON: the figures, what they are compared with, and the host's load meanwhile. They
are not tests: nothing fails because a figure is bad. docs/performance.md says what they mean and how they
came out.
"""
