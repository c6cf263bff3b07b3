package boot

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
)

func write(t *testing.T, path, text string) string {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestModulesAreLoadedInTheOrderGiven(t *testing.T) {
	directory := t.TempDir()
	write(t, filepath.Join(directory, "order"), "virtio.ko\nvirtio_ring.ko\nvirtio-rng.ko\n")
	names, err := readOrder(directory)
	if err != nil || !slices.Equal(names, []string{"virtio.ko", "virtio_ring.ko", "virtio-rng.ko"}) {
		t.Fatal(names, err)
	}
	for _, text := range []string{"../virtio.ko\n", "virtio\n", "/virtio.ko\n"} {
		write(t, filepath.Join(directory, "order"), text)
		if names, err := readOrder(directory); err == nil {
			t.Fatal(text, names)
		}
	}
	if _, err := readOrder(t.TempDir()); !os.IsNotExist(err) {
		t.Fatal(err)
	}
}

func TestProcessLimitIsAKernelArgument(t *testing.T) {
	path := filepath.Join(t.TempDir(), "cmdline")
	for line, wanted := range map[string]int{"quiet pandastack.processes=300 panic=-1\n": 300, "quiet\n": defaultProcesses} {
		if found, err := processLimit(write(t, path, line)); err != nil || found != wanted {
			t.Fatal(line, found, err)
		}
	}
	for _, line := range []string{"pandastack.processes=0", "pandastack.processes=-5", "pandastack.processes=many"} {
		if found, err := processLimit(write(t, path, line)); err == nil {
			t.Fatal(line, found)
		}
	}
}

func TestOnlyTheFirstProcessOfAnInitramfsBoots(t *testing.T) {
	if Wanted() {
		t.Fatal("this process is none")
	}
}
