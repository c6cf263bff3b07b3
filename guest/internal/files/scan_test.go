package files

import (
	"crypto/sha256"
	"encoding/hex"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"

	"pandastack/guest/internal/session"
)

func TestNamesAreInTheOrderOfBytes(t *testing.T) {
	root := t.TempDir()
	for _, name := range []string{"b", "a.c", "a", "\xff", "B"} {
		if err := os.WriteFile(filepath.Join(root, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if names := namesOf(root, 100); !slices.Equal(names, []string{"B", "a", "a.c", "b", "\xff"}) {
		t.Fatal(names)
	}
	if names := namesOf(filepath.Join(root, "gone"), 100); names != nil {
		t.Fatal(names)
	}
	if err := os.Symlink(root, filepath.Join(root, "link")); err != nil {
		t.Fatal(err)
	}
	if names := namesOf(filepath.Join(root, "link"), 100); names != nil {
		t.Fatal("a link was followed", names)
	}
}

func TestDigestsAreOfFilesOnly(t *testing.T) {
	root, content := t.TempDir(), make([]byte, 1<<20+17)
	file := filepath.Join(root, "file")
	if err := os.WriteFile(file, content, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(file, filepath.Join(root, "link")); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mkfifo(filepath.Join(root, "pipe"), 0o600); err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(content)
	digest, err := digestOf(&session.Stream{}, file)
	if err != nil || digest == nil || *digest != hex.EncodeToString(sum[:]) {
		t.Fatal(digest, err)
	}
	for _, name := range []string{"", "link", "pipe", "gone"} {
		if digest, err := digestOf(&session.Stream{}, filepath.Join(root, name)); digest != nil || err != nil {
			t.Fatal(name, digest, err)
		}
	}
}

func TestWhereFilesAreWrittenIsKnownForTheRootOnly(t *testing.T) {
	var root syscall.Stat_t
	if err := syscall.Stat("/", &root); err != nil {
		t.Fatal(err)
	}
	if writable(root.Dev+12345) != 0 {
		t.Fatal("of another file system nothing is known")
	}
	left, _ := filepath.Glob("/" + temporaryPrefix + "*")
	writable(root.Dev)
	if after, _ := filepath.Glob("/" + temporaryPrefix + "*"); len(after) > len(left) {
		t.Fatal("a file was left")
	}
}
