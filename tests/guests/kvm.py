"""Asks this machine's KVM whether it can run a stock guest that believes it is on Hyper-V."""

from __future__ import annotations

import fcntl
import os
import re
from pathlib import Path

_KVM_CHECK_EXTENSION = 0xAE03
# linux/kvm.h
_NEEDED = {
    "KVM_CAP_HYPERV": 44,
    "KVM_CAP_HYPERV_SYNIC2": 148,
    "KVM_CAP_HYPERV_VP_INDEX": 149,
    "KVM_CAP_HYPERV_EVENTFD": 154,
}


def missing() -> str | None:
    """Why this machine cannot run stock Hyper-V guests by itself, in words; None when it can."""
    if not re.search(r"^flags\s*:.*\b(vmx|svm)\b", Path("/proc/cpuinfo").read_text(), re.M):
        return "the processor offers no VMX or SVM"
    try:
        kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return f"/dev/kvm: {error.strerror}"
    try:
        for name, number in _NEEDED.items():
            if fcntl.ioctl(kvm, _KVM_CHECK_EXTENSION, number) <= 0:
                return f"this machine's KVM lacks {name}"
    finally:
        os.close(kvm)
    return None
