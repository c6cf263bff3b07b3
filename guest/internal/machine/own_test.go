package machine

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"regexp"
	"syscall"
	"testing"
)

func TestSizeOfAFileSystem(t *testing.T) {
	superblock := make([]byte, superblockBytes)
	if _, _, err := parseSuperblock(superblock); err == nil {
		t.Fatal("no ext4")
	}
	binary.LittleEndian.PutUint16(superblock[0x38:], ext4Magic)
	binary.LittleEndian.PutUint32(superblock[0x04:], 1000)
	binary.LittleEndian.PutUint32(superblock[0x18:], 2)
	binary.LittleEndian.PutUint32(superblock[0x150:], 1)
	if blocks, block, err := parseSuperblock(superblock); err != nil || blocks != 1000 || block != 4096 {
		t.Fatal(blocks, block, err)
	}
	binary.LittleEndian.PutUint32(superblock[0x60:], incompat64Bit)
	if blocks, _, err := parseSuperblock(superblock); err != nil || blocks != 1000+1<<32 {
		t.Fatal(blocks, err)
	}
}

func TestBootIDIsNewEachTime(t *testing.T) {
	var calls []bool
	own := &Own{BootID: filepath.Join(t.TempDir(), "boot_id"), Writable: func(wanted bool) error {
		calls = append(calls, wanted)
		return nil
	}}
	seen := map[string]bool{}
	for range 3 {
		if detail, err := own.renewBootID(); detail != "set" || err != nil {
			t.Fatal(detail, err)
		}
		text, _ := os.ReadFile(own.BootID)
		if !regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}\n$`).Match(text) || seen[string(text)] {
			t.Fatal(string(text))
		}
		seen[string(text)] = true
	}
	if len(calls) != 6 || !calls[0] || calls[1] {
		t.Fatal(calls)
	}
}

func TestAnOverwrittenFileIsTheSameFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "name")
	var inode uint64
	for _, content := range []string{"", "first name\n", "second, longer name\n", "x\n", ""} {
		if err := overwrite(path, []byte(content)); err != nil {
			t.Fatal(err)
		}
		if text, err := os.ReadFile(path); err != nil || string(text) != content {
			t.Fatalf("%q %v", text, err)
		}
		var status syscall.Stat_t
		if err := syscall.Stat(path, &status); err != nil || inode != 0 && status.Ino != inode {
			t.Fatal(status.Ino, err)
		}
		inode = status.Ino
	}
	if overwrite(t.TempDir(), nil) == nil {
		t.Fatal("a folder")
	}
}

func TestWithoutAKernelOfItsOwnNothingIsTouched(t *testing.T) {
	var own *Own
	for _, do := range []func() (string, error){own.renewBootID, own.grow} {
		if detail, err := do(); detail != "runtime" || err != nil {
			t.Fatal(detail, err)
		}
	}
}
