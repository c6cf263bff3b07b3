package carriers

import (
	"errors"
	"io/fs"
	"syscall"
	"testing"
	"time"
	"unsafe"
)

const thisContext = 1 // VMADDR_CID_LOCAL: loopback

func TestOnlyTheHostIsServedOverVsock(t *testing.T) {
	const port = 51024
	listener, err := ListenVsock(port)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.EAFNOSUPPORT) {
		t.Skip("no vsock here")
	}
	if err != nil {
		t.Fatal(err)
	}
	defer syscall.Close(listener.descriptor)
	client, err := syscall.Socket(familyVsock, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer syscall.Close(client)
	name := address{family: familyVsock, port: port, context: thisContext}
	if _, _, errno := syscall.Syscall(syscall.SYS_CONNECT, uintptr(client), uintptr(unsafe.Pointer(&name)), unsafe.Sizeof(name)); errno != 0 {
		t.Skip("no vsock loopback here:", errno)
	}
	accepted := make(chan struct{})
	go func() {
		listener.Accept()
		close(accepted)
	}()
	limit := syscall.Timeval{Sec: 5}
	_ = syscall.SetsockoptTimeval(client, syscall.SOL_SOCKET, syscall.SO_RCVTIMEO, &limit)
	if count, err := syscall.Read(client, make([]byte, 1)); count > 0 || err == syscall.EAGAIN {
		t.Fatal("it was not hung up on", count, err)
	}
	select {
	case <-accepted:
		t.Fatal("somebody of this machine was taken for the host")
	case <-time.After(50 * time.Millisecond):
	}
}
