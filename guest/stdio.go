package main

import (
	"io"
	"syscall"
	"unsafe"
)

const (
	pollIn  = 1
	pollOut = 4
)

// descriptor is stdin or stdout. The runtime below may set O_NONBLOCK on the description behind it at any time (gVisor
// does), so EAGAIN is answered by waiting, never by an error.
type descriptor int

func (d descriptor) wait(events int16) {
	poll := struct {
		descriptor      int32
		events, revents int16
	}{int32(d), events, 0}
	_, _, _ = syscall.Syscall6(syscall.SYS_PPOLL, uintptr(unsafe.Pointer(&poll)), 1, 0, 0, 0, 0)
}

func (d descriptor) Read(into []byte) (int, error) {
	for {
		count, err := syscall.Read(int(d), into)
		switch {
		case err == syscall.EAGAIN:
			d.wait(pollIn)
		case err == syscall.EINTR:
		case err != nil:
			return 0, err
		case count == 0:
			return 0, io.EOF
		default:
			return count, nil
		}
	}
}

func (d descriptor) Write(from []byte) (int, error) {
	written := 0
	for written < len(from) {
		count, err := syscall.Write(int(d), from[written:])
		switch {
		case err == syscall.EAGAIN:
			d.wait(pollOut)
		case err == syscall.EINTR:
		case err != nil:
			return written, err
		default:
			written += count
		}
	}
	return written, nil
}
