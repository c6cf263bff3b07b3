package machine

import (
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"os"
	"syscall"
	"unsafe"
)

const (
	blockSize64 = 0x80081272 // BLKGETSIZE64
	resizeFS    = 0x40086610 // EXT4_IOC_RESIZE_FS

	superblockAt    = 1024
	superblockBytes = 1024
	ext4Magic       = 0xef53
	incompat64Bit   = 0x80
)

// Own is what a machine has to itself where a kernel is its own. Others share theirs with their host.
type Own struct {
	Disk     string // the block device of the root file system, an ext4
	BootID   string // the file that is seen as the kernel's boot id
	Writable func(wanted bool) error
}

// Settle does once, before this machine is saved, what would be slow in every copy of it: its disk is filled, and the files that an
// identity writes are in memory and have their blocks.
func (o *Own) Settle() error {
	if _, err := o.grow(); err != nil {
		return err
	}
	name, err := os.Hostname()
	if err != nil {
		return err
	}
	if _, err := os.ReadFile(machineIDFile); err != nil && !os.IsNotExist(err) {
		return err
	}
	return setHostname(name)
}

// renewBootID makes this a boot of its own: copies of a machine share what the kernel says.
func (o *Own) renewBootID() (detail string, err error) {
	if o == nil {
		return "runtime", nil
	}
	if err := o.Writable(true); err != nil {
		return "", err
	}
	defer func() {
		if closed := o.Writable(false); err == nil {
			err = closed
		}
	}()
	return "set", overwrite(o.BootID, []byte(newUUID()+"\n"))
}

func newUUID() string {
	var id [16]byte
	_, _ = rand.Read(id[:]) // The kernel's, after the entropy of this identity; it does not fail.
	id[6], id[8] = id[6]&0x0f|0x40, id[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", id[0:4], id[4:6], id[6:8], id[8:10], id[10:])
}

// grow lets the root file system fill its disk, which may have become larger since it was made.
func (o *Own) grow() (detail string, err error) {
	if o == nil {
		return "runtime", nil
	}
	disk, err := os.Open(o.Disk)
	if err != nil {
		return "", err
	}
	defer disk.Close()
	var size uint64
	if _, _, errno := syscall.Syscall(syscall.SYS_IOCTL, disk.Fd(), blockSize64, uintptr(unsafe.Pointer(&size))); errno != 0 {
		return "", fmt.Errorf("%s: %w", o.Disk, errno)
	}
	superblock := make([]byte, superblockBytes)
	if _, err := disk.ReadAt(superblock, superblockAt); err != nil {
		return "", err
	}
	blocks, block, err := parseSuperblock(superblock)
	if err != nil {
		return "", err
	}
	// A last group too small for its own tables is left out by the kernel, so less than one group more is no growth.
	wanted := size / block
	if wanted <= blocks {
		return "kept", nil
	}
	root, err := os.Open("/")
	if err != nil {
		return "", err
	}
	defer root.Close()
	// New tables of inodes would now be filled with zeros, which a disk that just grew has already; many GiB of them on a large
	// one. To leave that to a thread for later, and to stop the thread before it begins, is the kernel's one way not to.
	if err := remountRoot("init_itable"); err != nil {
		return "", err
	}
	defer func() {
		if later := remountRoot("noinit_itable"); err == nil {
			err = later
		}
	}()
	if _, _, errno := syscall.Syscall(syscall.SYS_IOCTL, root.Fd(), resizeFS, uintptr(unsafe.Pointer(&wanted))); errno != 0 {
		return "", fmt.Errorf("resize from %d to %d blocks: %w", blocks, wanted, errno)
	}
	return fmt.Sprintf("grown to %d MiB", wanted*block>>20), nil
}

func remountRoot(option string) error {
	if err := syscall.Mount("", "/", "", syscall.MS_REMOUNT|syscall.MS_NOATIME, option); err != nil {
		return fmt.Errorf("remount with %s: %w", option, err)
	}
	return nil
}

// parseSuperblock returns the number of blocks of an ext4 file system and their size in bytes.
func parseSuperblock(superblock []byte) (blocks, block uint64, err error) {
	if binary.LittleEndian.Uint16(superblock[0x38:]) != ext4Magic {
		return 0, 0, fmt.Errorf("the disk has no ext4 file system")
	}
	blocks = uint64(binary.LittleEndian.Uint32(superblock[0x04:]))
	if binary.LittleEndian.Uint32(superblock[0x60:])&incompat64Bit != 0 {
		blocks |= uint64(binary.LittleEndian.Uint32(superblock[0x150:])) << 32
	}
	return blocks, 1024 << binary.LittleEndian.Uint32(superblock[0x18:]), nil
}
