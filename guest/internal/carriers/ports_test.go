package carriers

import (
	"os"
	"path/filepath"
	"testing"
)

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestAPortIsFoundByItsName(t *testing.T) {
	sysfs := t.TempDir()
	if HasPorts(sysfs) || FindPort(sysfs, "pandastack") != "" {
		t.Fatal("nothing is there")
	}
	write(t, filepath.Join(sysfs, "bus/virtio/devices/virtio0/device"), "0x0002\n")
	if HasPorts(sysfs) {
		t.Fatal("a disk has no ports")
	}
	write(t, filepath.Join(sysfs, "bus/virtio/devices/virtio1/device"), "0x0003\n")
	write(t, filepath.Join(sysfs, "class/virtio-ports/vport1p0/name"), "pandastack-other\n")
	if err := os.MkdirAll(filepath.Join(sysfs, "class/virtio-ports/vport1p2"), 0o700); err != nil { // It has no name.
		t.Fatal(err)
	}
	if !HasPorts(sysfs) || FindPort(sysfs, "pandastack") != "" {
		t.Fatal("another port is not ours")
	}
	write(t, filepath.Join(sysfs, "class/virtio-ports/vport1p1/name"), "pandastack\n")
	if found := FindPort(sysfs, "pandastack"); found != "/dev/vport1p1" {
		t.Fatal(found)
	}
}
