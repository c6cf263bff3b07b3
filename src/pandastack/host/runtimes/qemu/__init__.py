"""QEMU microVMs: each sandbox has a kernel of its own, run by KVM where it works and by emulation elsewhere."""
