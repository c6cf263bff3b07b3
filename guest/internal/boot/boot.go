// Package boot brings a machine with a kernel of its own from the initramfs to where the daemon can work: modules, the root
// file system, what is mounted in it, and the daemon again, from a place that nobody in the machine can write to.
// The view is that of the other runtimes: the same mounts, limits and environment.
package boot

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"
)

const (
	Home    = "/.pandastack"
	Program = Home + "/pandastack-guest"
	Disk    = "/dev/vda"
	BootID  = Home + "/boot_id" // is what is seen as the kernel's

	Cgroup = cgroups + "/sandbox" // of all that the daemon starts

	cgroups      = "/sys/fs/cgroup"
	threadsMax   = "/proc/sys/kernel/threads-max"
	spareTasks   = 512
	kernelBootID = "/proc/sys/kernel/random/boot_id"
	newRoot      = "/root"
	modules      = "/modules"
	diskPatience = 10 * time.Second
	lookAgain    = 2 * time.Millisecond

	openFiles        = 65536
	defaultProcesses = 1024
	rlimitNProc      = 6
	rlimitNoFile     = 7
	rlimitCore       = 4
	interfaceUp      = 0x1
)

var environment = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LANG=C.UTF-8"}

// Wanted says whether this process is the first of a machine whose root is still the initramfs.
func Wanted() bool { return os.Getpid() == 1 && os.Args[0] == "/init" }

// Run does it all and becomes the daemon with these arguments. It does not return: where a step fails the machine has no
// purpose, says why on its console, and goes off.
func Run(arguments ...string) {
	err := run(arguments)
	fmt.Fprintln(os.Stderr, "pandastack-guest: this machine cannot start:", err)
	PowerOff()
}

// PowerOff ends the machine. A hypervisor told not to reboot ends with it, whichever of the two ways the machine knows.
func PowerOff() {
	syscall.Sync()
	_ = syscall.Reboot(syscall.LINUX_REBOOT_CMD_RESTART)
	_ = syscall.Reboot(syscall.LINUX_REBOOT_CMD_POWER_OFF)
	os.Exit(1) // The kernel panics, and with panic=-1 it restarts.
}

type step struct {
	name string
	do   func() error
}

func run(arguments []string) error {
	var program []byte
	var processes int
	steps := []step{
		{"devices", func() error { return mount("devtmpfs", "/dev", "devtmpfs", syscall.MS_NOSUID, "mode=755") }},
		{"modules", func() error { return loadModules(modules) }},
		{"program", func() (err error) { program, err = os.ReadFile("/init"); return }},
		{"disk", func() error { return waitFor(Disk, diskPatience) }},
		// What is deleted goes back to the host; new tables of inodes are zero as they are. Nothing reads all maps of blocks in
		// the background: every copy of this machine would.
		{"root file system", func() error {
			return mount(Disk, newRoot, "ext4", syscall.MS_NOATIME, "discard,noinit_itable,no_prefetch_block_bitmaps")
		}},
		{"new root", switchRoot},
		{"mounts", mountAll},
		{"daemon", func() error { return install(program) }},
		{"boot id", ownBootID},
		{"kernel arguments", func() (err error) { processes, err = processLimit("/proc/cmdline"); return }},
		{"limits", func() error { return limit(processes) }},
		{"loopback", func() error { return interfaceFlagsUp("lo") }},
		{"hostname", func() error { return syscall.Sethostname([]byte("sandbox")) }},
	}
	for _, step := range steps {
		if err := step.do(); err != nil {
			return fmt.Errorf("%s: %w", step.name, err)
		}
	}
	return fmt.Errorf("daemon: %w", syscall.Exec(Program, append([]string{Program}, arguments...), environment))
}

func mount(source, target, kind string, flags uintptr, data string) error {
	if err := syscall.Mount(source, target, kind, flags, data); err != nil {
		return fmt.Errorf("mount %s: %w", target, err)
	}
	return nil
}

func waitFor(path string, patience time.Duration) error {
	deadline := time.Now().Add(patience)
	for {
		_, err := os.Stat(path)
		if err == nil {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("no %s after %s", path, patience)
		}
		time.Sleep(lookAgain)
	}
}

// switchRoot makes the disk the root. The initramfs is memory, so its files are removed first; this process still runs one.
func switchRoot() error {
	if err := syscall.Mount("/dev", newRoot+"/dev", "", syscall.MS_MOVE, ""); err != nil {
		return fmt.Errorf("move /dev: %w", err)
	}
	if err := os.RemoveAll(modules); err != nil {
		return err
	}
	if err := os.Remove("/init"); err != nil {
		return err
	}
	if err := os.Chdir(newRoot); err != nil {
		return err
	}
	if err := syscall.Mount(".", "/", "", syscall.MS_MOVE, ""); err != nil {
		return fmt.Errorf("move the root: %w", err)
	}
	if err := syscall.Chroot("."); err != nil {
		return fmt.Errorf("chroot: %w", err)
	}
	return os.Chdir("/")
}

type place struct {
	kind, target string
	flags        uintptr
	data         string
}

// places are what the other runtimes mount, too; see host/runtimes/gvisor/command.py.
var places = []place{
	{"proc", "/proc", syscall.MS_NOSUID | syscall.MS_NODEV | syscall.MS_NOEXEC, ""},
	{"devpts", "/dev/pts", syscall.MS_NOSUID | syscall.MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620"},
	{"tmpfs", "/dev/shm", syscall.MS_NOSUID | syscall.MS_NODEV, "mode=1777,size=256m"},
	{"sysfs", "/sys", syscall.MS_RDONLY | syscall.MS_NOSUID | syscall.MS_NODEV | syscall.MS_NOEXEC, ""},
	{"cgroup2", cgroups, syscall.MS_NOSUID | syscall.MS_NODEV | syscall.MS_NOEXEC, ""},
}

func mountAll() error {
	for _, place := range places {
		if strings.HasPrefix(place.target, "/dev/") || !strings.HasPrefix(place.target, "/sys/") {
			if err := os.MkdirAll(place.target, 0o755); err != nil {
				return err
			}
		}
		if err := mount(place.kind, place.target, place.kind, place.flags, place.data); err != nil {
			return err
		}
	}
	for name, target := range map[string]string{"fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1",
		"stderr": "/proc/self/fd/2"} {
		if err := os.Symlink(target, "/dev/"+name); err != nil {
			return err
		}
	}
	return nil
}

// install puts the daemon where nobody can change it: a file system of its own, mounted read-only.
func install(program []byte) error {
	if err := os.MkdirAll(Home, 0o755); err != nil {
		return err
	}
	if err := mount("tmpfs", Home, "tmpfs", syscall.MS_NOSUID|syscall.MS_NODEV, "mode=755"); err != nil {
		return err
	}
	return os.WriteFile(Program, program, 0o555)
}

// ownBootID covers the kernel's boot id, which all copies of a machine share, by a file that an identity can change.
func ownBootID() error {
	id, err := os.ReadFile(kernelBootID)
	if err != nil {
		return err
	}
	if err := os.WriteFile(BootID, id, 0o444); err != nil {
		return err
	}
	if err := syscall.Mount(BootID, kernelBootID, "", syscall.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind: %w", err)
	}
	for _, path := range []string{kernelBootID, Home} {
		if err := Writable(path, false); err != nil {
			return err
		}
	}
	return nil
}

// Writable lets a mount of ours be written to, or no more.
func Writable(path string, wanted bool) error {
	flags := uintptr(syscall.MS_REMOUNT | syscall.MS_BIND | syscall.MS_NOSUID | syscall.MS_NODEV)
	if !wanted {
		flags |= syscall.MS_RDONLY
	}
	if err := syscall.Mount("", path, "", flags, ""); err != nil {
		return fmt.Errorf("remount %s: %w", path, err)
	}
	return nil
}

// processLimit reads pandastack.processes from the kernel's arguments.
func processLimit(path string) (int, error) {
	line, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	for _, argument := range strings.Fields(string(line)) {
		if value, found := strings.CutPrefix(argument, "pandastack.processes="); found {
			limit, err := strconv.Atoi(value)
			if err != nil || limit < 1 {
				return 0, fmt.Errorf("%.80q", argument)
			}
			return limit, nil
		}
	}
	return defaultProcesses, nil
}

// limit sets what all processes inherit, and how many tasks there may be beside the daemon's and the kernel's. Only a cgroup
// bounds root, who is everybody here. The kernel's own bound must never be the one that is met: the daemon is under it, too.
func limit(processes int) error {
	for resource, value := range map[int]uint64{rlimitNoFile: openFiles, rlimitNProc: uint64(processes), rlimitCore: 0} {
		if err := syscall.Setrlimit(resource, &syscall.Rlimit{Cur: value, Max: value}); err != nil {
			return fmt.Errorf("resource %d: %w", resource, err)
		}
	}
	if err := os.WriteFile(cgroups+"/cgroup.subtree_control", []byte("+pids"), 0); err != nil {
		return err
	}
	if err := os.Mkdir(Cgroup, 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(Cgroup+"/pids.max", []byte(strconv.Itoa(processes)), 0); err != nil {
		return err
	}
	text, err := os.ReadFile(threadsMax)
	if err != nil {
		return err
	}
	if most, _ := strconv.Atoi(strings.TrimSpace(string(text))); most < processes+spareTasks {
		return os.WriteFile(threadsMax, []byte(strconv.Itoa(processes+spareTasks)), 0)
	}
	return nil
}

func interfaceFlagsUp(name string) error {
	descriptor, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_DGRAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer syscall.Close(descriptor)
	var request struct {
		name  [syscall.IFNAMSIZ]byte
		flags uint16
		_     [22]byte
	}
	copy(request.name[:], name)
	for _, turn := range []uintptr{syscall.SIOCGIFFLAGS, syscall.SIOCSIFFLAGS} {
		if _, _, errno := syscall.Syscall(syscall.SYS_IOCTL, uintptr(descriptor), turn, uintptr(unsafe.Pointer(&request))); errno != 0 {
			return errno
		}
		request.flags |= interfaceUp
	}
	return nil
}
