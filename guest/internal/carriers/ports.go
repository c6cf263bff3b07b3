// Package carriers has the ways to a host that a machine with devices of its own knows: a port of virtio-serial, and vsock.
package carriers

import (
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"
	"unsafe"
)

const (
	pollIn   = 1
	pollOut  = 4
	pollErr  = 8
	pollHup  = 16
	oAsync   = 0x2000 // FASYNC; not in package syscall of all architectures
	setOwner = 8      // F_SETOWN

	consoleDevice = "0x0003" // VIRTIO_ID_CONSOLE

	// How long a change of the host's end is noticed after if its signal was lost.
	lookAgain = 200 * time.Millisecond
)

// FindPort returns the device of the port of this name, empty if there is none (yet). `sysfs` is /sys.
func FindPort(sysfs, name string) string {
	found, _ := filepath.Glob(filepath.Join(sysfs, "class/virtio-ports/*/name"))
	for _, path := range found {
		text, err := os.ReadFile(path)
		if err == nil && strings.TrimSpace(string(text)) == name {
			return filepath.Join("/dev", filepath.Base(filepath.Dir(path)))
		}
	}
	return ""
}

// HasPorts says whether this machine has a device with ports at all. The ports themselves appear a little later.
func HasPorts(sysfs string) bool {
	found, _ := filepath.Glob(filepath.Join(sysfs, "bus/virtio/devices/*/device"))
	for _, path := range found {
		if text, err := os.ReadFile(path); err == nil && strings.TrimSpace(string(text)) == consoleDevice {
			return true
		}
	}
	return false
}

// Port is a virtio-serial port, which one process at a time has open. It has no sessions: the host's end is there or not, and
// whoever comes there goes on in the middle of what was before.
type Port struct {
	descriptor int
	signals    chan os.Signal
}

// OpenPort opens a device as FindPort returns it.
func OpenPort(device string) (*Port, error) {
	descriptor, err := syscall.Open(device, syscall.O_RDWR|syscall.O_NONBLOCK|syscall.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", device, err)
	}
	port := &Port{descriptor: descriptor, signals: make(chan os.Signal, 1)}
	signal.Notify(port.signals, syscall.SIGIO)
	_, _, _ = syscall.Syscall(syscall.SYS_FCNTL, uintptr(descriptor), setOwner, uintptr(os.Getpid()))
	return port, nil
}

func (p *Port) poll(events int16) (happened int16) {
	poll := struct {
		descriptor      int32
		events, revents int16
	}{int32(p.descriptor), events, 0}
	_, _, _ = syscall.Syscall6(syscall.SYS_PPOLL, uintptr(unsafe.Pointer(&poll)), 1, 0, 0, 0, 0)
	return poll.revents
}

// Read returns io.EOF when the host's end was closed and all that came before has been read.
func (p *Port) Read(into []byte) (int, error) {
	for {
		count, err := syscall.Read(p.descriptor, into)
		switch {
		case err == syscall.EAGAIN:
			p.poll(pollIn)
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

// Write fails with EPIPE when nobody is at the host's end: the kernel would keep what is written for whoever comes next.
func (p *Port) Write(from []byte) (int, error) {
	written := 0
	for written < len(from) {
		count, err := syscall.Write(p.descriptor, from[written:])
		switch {
		case err == syscall.EAGAIN:
			if happened := p.poll(pollOut); happened&pollErr != 0 || happened&pollHup != 0 && !p.hostComes() {
				return written, syscall.EPIPE
			}
		case err == syscall.EINTR:
		case err != nil:
			return written, err
		default:
			written += count
		}
	}
	return written, nil
}

// hostComes says whether somebody is at the host's end, or will be in a moment: what a host sends can be here before the kernel
// knows that it came, where another one left just before.
func (p *Port) hostComes() bool {
	for ends := time.Now().Add(lookAgain); p.poll(pollOut)&pollHup != 0; time.Sleep(lookAgain / 40) {
		if time.Now().After(ends) {
			return false
		}
	}
	return true
}

// WaitForHost returns when somebody is at the host's end. The kernel has no wait for that, but it sends a signal when the end
// is opened or closed, to those who ask for it; asking always would mean a signal with each byte that arrives.
func (p *Port) WaitForHost() {
	for p.poll(pollIn)&pollHup != 0 {
		p.notify(true)
		if p.poll(pollIn)&pollHup != 0 { // It may have come before we asked.
			select {
			case <-p.signals:
			case <-time.After(lookAgain):
			}
		}
		p.notify(false)
	}
}

func (p *Port) notify(wanted bool) {
	flags := uintptr(syscall.O_NONBLOCK)
	if wanted {
		flags |= oAsync
	}
	_, _, _ = syscall.Syscall(syscall.SYS_FCNTL, uintptr(p.descriptor), syscall.F_SETFL, flags)
}
