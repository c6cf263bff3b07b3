package carriers

import (
	"fmt"
	"io/fs"
	"os"
	"syscall"
	"time"
	"unsafe"
)

const (
	familyVsock = 40
	anyContext  = 0xffffffff // VMADDR_CID_ANY
	hostContext = 2          // VMADDR_CID_HOST
	backlog     = 64
	acceptPause = 100 * time.Millisecond
)

// address is struct sockaddr_vm.
type address struct {
	family, _     uint16
	port, context uint32
	_             [4]byte
}

// Vsock is a listener that only the host reaches.
type Vsock struct{ descriptor int }

// ListenVsock listens on a port. fs.ErrNotExist: this machine has no vsock.
func ListenVsock(port uint32) (*Vsock, error) {
	if _, err := os.Stat("/dev/vsock"); err != nil {
		return nil, fs.ErrNotExist
	}
	descriptor, err := syscall.Socket(familyVsock, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("vsock: %w", err)
	}
	name := address{family: familyVsock, port: port, context: anyContext}
	_, _, errno := syscall.Syscall(syscall.SYS_BIND, uintptr(descriptor), uintptr(unsafe.Pointer(&name)), unsafe.Sizeof(name))
	if errno == 0 {
		_, _, errno = syscall.Syscall(syscall.SYS_LISTEN, uintptr(descriptor), backlog, 0)
	}
	if errno != 0 {
		_ = syscall.Close(descriptor)
		return nil, fmt.Errorf("vsock port %d: %w", port, errno)
	}
	return &Vsock{descriptor}, nil
}

// Accept waits for the host and returns a connection with it. Whoever else comes, from inside the machine, is hung up on.
func (v *Vsock) Accept() *os.File {
	for {
		var peer address
		size := uint32(unsafe.Sizeof(peer))
		connection, _, errno := syscall.Syscall6(syscall.SYS_ACCEPT4, uintptr(v.descriptor), uintptr(unsafe.Pointer(&peer)),
			uintptr(unsafe.Pointer(&size)), syscall.SOCK_CLOEXEC|syscall.SOCK_NONBLOCK, 0, 0)
		switch {
		case errno == syscall.EINTR:
		case errno != 0:
			time.Sleep(acceptPause)
		case peer.context != hostContext:
			_ = syscall.Close(int(connection))
		default:
			return os.NewFile(connection, "vsock") // Not blocking, so it has deadlines.
		}
	}
}
