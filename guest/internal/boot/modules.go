package boot

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"unsafe"
)

// loadModules loads what the file `order` of a directory names, a line each, in this order.
func loadModules(directory string) error {
	names, err := readOrder(directory)
	if err != nil {
		return err
	}
	for _, name := range names {
		if err := loadModule(filepath.Join(directory, name)); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}

func readOrder(directory string) ([]string, error) {
	text, err := os.ReadFile(filepath.Join(directory, "order"))
	if err != nil {
		return nil, err
	}
	names := strings.Fields(string(text))
	for _, name := range names {
		if name != filepath.Base(name) || !strings.HasSuffix(name, ".ko") {
			return nil, fmt.Errorf("%.80q is no name of a module", name)
		}
	}
	return names, nil
}

func loadModule(path string) error {
	descriptor, err := syscall.Open(path, syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer syscall.Close(descriptor)
	parameters := []byte{0}
	_, _, errno := syscall.Syscall(sysFinitModule, uintptr(descriptor), uintptr(unsafe.Pointer(&parameters[0])), 0)
	runtime.KeepAlive(parameters)
	if errno != 0 && errno != syscall.EEXIST {
		return errno
	}
	return nil
}
