"""Firecracker microVMs: each sandbox has a kernel of its own on KVM, and a process outside that is jailed by Firecracker's jailer."""
