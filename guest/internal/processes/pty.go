package processes

import (
	"fmt"
	"os"
	"syscall"
	"unsafe"
)

func ioctl(descriptor uintptr, request, argument uintptr) error {
	if _, _, errno := syscall.Syscall(syscall.SYS_IOCTL, descriptor, request, argument); errno != 0 {
		return errno
	}
	return nil
}

// openPTY returns the master, ready for the poller, and the terminal for the child.
func openPTY(rows, cols uint16, owner User) (master, terminal *os.File, err error) {
	descriptor, err := syscall.Open("/dev/ptmx", syscall.O_RDWR|syscall.O_NOCTTY|syscall.O_CLOEXEC|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, err
	}
	var number, unlocked uint32
	err = ioctl(uintptr(descriptor), syscall.TIOCGPTN, uintptr(unsafe.Pointer(&number)))
	if err == nil {
		err = ioctl(uintptr(descriptor), syscall.TIOCSPTLCK, uintptr(unsafe.Pointer(&unlocked)))
	}
	path := fmt.Sprintf("/dev/pts/%d", number)
	var slave int
	if err == nil {
		slave, err = syscall.Open(path, syscall.O_RDWR|syscall.O_NOCTTY|syscall.O_CLOEXEC, 0)
	}
	if err != nil {
		_ = syscall.Close(descriptor)
		return nil, nil, err
	}
	if owner.UID != 0 {
		_ = os.Chown(path, int(owner.UID), -1) // Refused by some kernels; programs then just cannot reopen it by name.
	}
	master, terminal = os.NewFile(uintptr(descriptor), "ptmx"), os.NewFile(uintptr(slave), path)
	if rows > 0 && cols > 0 {
		err = setSize(master, rows, cols)
	}
	return master, terminal, err
}

func setSize(terminal *os.File, rows, cols uint16) error {
	size := [4]uint16{rows, cols}
	connection, err := terminal.SyscallConn()
	if err != nil {
		return err
	}
	var result error
	err = connection.Control(func(descriptor uintptr) {
		result = ioctl(descriptor, syscall.TIOCSWINSZ, uintptr(unsafe.Pointer(&size)))
	})
	if err != nil {
		return err
	}
	return result
}
